"""A row of ``saekit reproduce``: seeds are measured by themselves, side by side, and judged together.

What a seed measured is kept in a file until all are judged: a run that was stopped goes on from there.
"""

import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from saekit.activations import write_atomic
from saekit.papers.claims import Reproduction, Tell
from saekit.registry import load

Found = dict[str, Any]
CODE = (
    "saekit",
    "saekit.autointerp",
    "saekit.circuits",
    "saekit.kernels",
    "saekit.trainers",
)  # what a measurement depends on
_told: list[Any] = []  # of a worker: the queue to the process that draws


@dataclass(frozen=True)
class Row:
    """``measure(seed, tell)`` returns what a seed gives, as JSON holds it: dicts whose leaves are numbers or lists.

    ``judge(found)`` gets the same dicts with a list over the seeds at each leaf. ``tell(done, total, note)``
    draws a seed's progress. Seeds of a row that compares times (``timed``) have the machine to themselves. A row
    that compares with other toolkits also measures with ``peers``, the python of an environment they are in;
    ``common(folder)`` makes what all seeds read, as a store of activations, and ``measure`` then gets the ``folder``;
    it is begun anew after a stop, and is to go on from what it finds. ``check`` gets the ``peers`` and raises where they
    won't do. ``least`` seeds are needed; a ``slow`` row takes hours, and is run by its name alone.
    """

    measure: Callable[..., Found]
    judge: Callable[[Found], Reproduction]
    timed: bool = False
    common: Callable[[Path], None] | None = None
    check: Callable[..., None] = lambda: None
    least: int = 1
    slow: bool = False

    @property
    def takes_peers(self) -> bool:
        """Whether it compares with other toolkits."""
        return "peers" in inspect.signature(self.measure).parameters


def gather(seeds: Sequence[Found]) -> Found:
    """What the seeds measured, as one: a list over the seeds in place of each leaf."""
    return {
        key: gather([one[key] for one in seeds])
        if isinstance(seeds[0][key], dict)
        else [one[key] for one in seeds]
        for key in seeds[0]
    }


def run(
    place: str, seeds: Sequence[int], folder: Path, tell: Tell, **options: str
) -> tuple[Reproduction, list[float]]:
    """Measure each seed of the row at ``place`` (``"module:attr"``), or take it from a stopped run's files in
    ``folder``, and judge them; with the seconds that each seed took."""
    row: Row = load(place)
    kept = folder / "seeds"
    kept.mkdir(parents=True, exist_ok=True)
    mark = mark_of(place, options)
    left = [seed for seed in seeds if not _holds(_file(kept, seed), mark)]
    threads = torch.get_num_threads()
    if row.common is not None and left:
        tell(0, None, "what the seeds share")
        row.common(_common(kept))
    workers = 1 if row.timed else min(len(left), threads)
    progress = _Progress(tell, len(seeds), len(seeds) - len(left))
    if workers > 1:
        _side_by_side(place, left, kept, mark, workers, threads // workers, progress, options)
    else:
        for seed in left:
            _measure(place, seed, _file(kept, seed), mark, options, progress.of(seed))
            progress.ended(seed)
    ones = [json.loads(_file(kept, seed).read_bytes()) for seed in seeds]
    result = row.judge(gather([one["found"] for one in ones]))
    shutil.rmtree(kept)
    return result, [one["seconds"] for one in ones]


class _Progress:
    """The seeds' progress as one; a seed that has not begun counts as long as the longest known."""

    def __init__(self, tell: Tell, n_seeds: int, ended: int):
        self.tell, self.n_seeds, self.already = tell, n_seeds, ended
        self.shares: dict[int, float] = {}
        self.total = 1

    def of(self, seed: int) -> Tell:
        def told(done: int, total: int | None, note: str) -> None:
            self.total = max(self.total, total or 1)
            self.shares[seed] = done / (total or self.total)
            self._draw(f"seed {seed}: {note}")

        return told

    def ended(self, seed: int) -> None:
        self.shares[seed] = 1.0
        self._draw(f"seed {seed}: done")

    def _draw(self, note: str) -> None:
        done = self.already + sum(self.shares.values())
        self.tell(round(done * self.total), self.n_seeds * self.total, note)


def _side_by_side(
    place: str, seeds: Sequence[int], kept: Path, mark: str, workers: int, threads: int, progress: _Progress, options: Any
) -> None:  # fmt: skip
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _begin, (told, threads)) as pool:
        running = {
            pool.submit(_measure, place, seed, _file(kept, seed), mark, options): seed for seed in seeds
        }
        try:
            while running:
                ended, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not told.empty():
                    seed, *said = told.get()
                    progress.of(seed)(*said)
                for future in ended:
                    future.result()
                    progress.ended(running.pop(future))
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()  # training takes SIGTERM for itself, and nothing is half-written
            raise


def _begin(told: Any, threads: int) -> None:
    """A worker's start: Ctrl-C is for the process that draws, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _told.append(told)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed can't end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _measure(
    place: str, seed: int, file: Path, mark: str, options: dict[str, str], tell: Tell | None = None
) -> None:
    def through(done: int, total: int | None, note: str) -> None:
        _told[-1].put((seed, done, total, note))

    began = time.monotonic()
    row: Row = load(place)
    given = {"folder": _common(file.parent)} if row.common is not None else {}
    found = row.measure(seed, tell or through, **options, **given)
    seconds = time.monotonic() - began
    write_atomic(file, json.dumps({"of": mark, "seconds": seconds, "found": found}).encode())


def _common(kept: Path) -> Path:
    return kept / "common"


def _file(kept: Path, seed: int) -> Path:
    return kept / f"{seed}.json"


def mark_of(place: str, options: dict[str, str]) -> str:
    """What a seed's file must have been measured by: this row, these options, and this code."""
    digest = hashlib.sha256(repr((place, sorted(options.items()))).encode())
    for package in (place.split(":")[0], *CODE):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        own = Path(spec.origin)
        for file in sorted(own.parent.rglob("*.py")) if own.name == "__init__.py" else [own]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _holds(file: Path, mark: str) -> bool:
    """Whether the file is there, whole, and of this code."""
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("of") == mark
