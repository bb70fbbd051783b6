"""What every verb shares: progress on stderr, results on stdout, options with one meaning."""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.pages import finite


def _usable(device: str | None) -> str | None:
    """The device, if a tensor can be put there."""
    if device is not None:
        from saekit.types import check_device

        check_device(device)
    return device


Device = Annotated[
    str | None,
    typer.Option(
        help="torch device, for example cuda; default: the CPU.", metavar="DEVICE", callback=_usable
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0, max=2**31 - 1)]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout; all else goes to stderr.")
]

LINE_SECONDS = 10.0  # between plain progress lines, where there is no terminal


def say(text: str) -> None:
    """A line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def result(data: Any, as_json: bool, text: str) -> None:
    """The result of a verb, on stdout."""
    print(json.dumps(finite(data), indent=1) if as_json else text, flush=True)


def option_of(item: str, flags: Collection[str] = ()) -> tuple[str, Any]:
    """The name and the value of a ``--set``; ``flags`` are names that have flags of their own."""
    name, sign, value = item.partition("=")
    if not sign:
        raise SaekitError(f"--set {item!r} has no value; write --set {item}=VALUE")
    if name in flags:
        flag = name.replace("_", "-")
        raise SaekitError(f"--set {item!r}: {name} has a flag of its own; write --{flag} {value}")
    try:
        found = json.loads(value)
        return name, tuple(found) if isinstance(found, list) else found
    except ValueError:
        return name, value


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s`` or ``4.2 s``."""
    seconds = seconds if seconds < 59.95 else round(seconds)  # no "1 min 60 s"
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.1f} s"


def _rate(rate: float, unit: str) -> str:
    """``1,234 rows/s``; nothing where a unit takes longer than a second."""
    return f"{rate:,.0f} {unit}/s" if rate >= 1 else ""


@contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """A function ``(done, total, note)`` that draws a bar on a terminal and plain lines elsewhere."""
    began = last = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None, note="")

            def draw(done: int, total: int | None, note: str = "") -> None:
                rate = done / max(1e-9, time.monotonic() - began)
                bar.update(task, completed=done, total=total, note=f"{_rate(rate, unit)} {note}")

            yield draw
        return

    def line(done: int, total: int | None, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        finished = total is not None and done >= total
        if now - last < LINE_SECONDS and not finished:
            return
        last = now
        rate = done / max(1e-9, now - began)
        left = f"{duration((total - done) / max(rate, 1e-9))} left" if total and done and not finished else ""
        of = f" of {total:,}" if total else ""
        said = (f"{title}: {done:,}{of} {unit}", _rate(rate, unit), left, note)
        say(", ".join(part for part in said if part))

    yield line
