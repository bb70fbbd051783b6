"""``saekit reproduce``: a paper's claim at laptop scale, with the paper's number, ours and the controls."""

import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.registry import nearest
from saekit.verbs.console import Json, Seed, duration, progress, result, say

if TYPE_CHECKING:
    from saekit.papers.claims import Tell


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A paper's name; left out: list them.", show_default=False)
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Every paper but those that take hours or other toolkits, as one page: index.html."
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --all: one seed of each (two where one says nothing).")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Seeds to train with.", min=1)] = 3,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for result.json and figure.html; default: reproduce/NAME, of --all reproduce."
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Python of an environment with other toolkits, for the papers that compare."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Rerun a paper's claim at laptop scale: claim, paper's number, ours over seeds, control, holds or not.

    Seeds run side by side, and each is kept until all are done: a run that was stopped goes on from there, and so does
    --all, which takes results of the same code as they are.

    Example: `saekit reproduce matryoshka` or `saekit reproduce --all --quick`
    """
    from saekit.papers import PAPERS
    from saekit.papers.result import reproduced

    if everything or quick:
        _check_all(name, everything, peers)
        return _all(Path(out or "reproduce"), seed, 1 if quick else seeds, as_json)
    if name is None:
        result(list(PAPERS), as_json, "\n".join(PAPERS))
        return
    if name not in PAPERS:
        raise SaekitError(f"paper {name!r} is unknown{nearest(name, PAPERS.table)}")
    row = PAPERS[name]
    if peers is not None and not row.takes_peers:
        raise SaekitError(f"paper {name!r} compares with no other toolkit; leave --peers out")
    if row.takes_peers and (peers is None or not Path(peers).is_file()):
        raise SaekitError(
            f"peers {peers!r} is no file; give --peers the python of an environment with sae-lens and dictionary-learning, as in .peers/bin/python"
        )
    if seeds < row.least:
        raise SaekitError(
            f"seeds = {seeds}: paper {name!r} is about their agreement; give --seeds {row.least} or more"
        )
    options = {"peers": peers} if peers is not None else {}
    row.check(**options)
    folder = _made(Path(out or f"reproduce/{name}"))
    with progress(name, "steps") as draw:
        data = reproduced(name, range(seed, seed + seeds), folder, draw, **options)
    if not data["holds"]:
        say(f"{name}: not every claim holds at this scale")
    result(data, as_json, table(data, folder))


def _check_all(name: str | None, everything: bool, peers: str | None) -> None:
    if not everything:
        raise SaekitError("--quick is given without --all; add it, or choose --seeds 1 for one paper")
    if name is not None:
        raise SaekitError(f"paper {name!r} is named beside --all; leave one of them out")
    if peers is not None:
        raise SaekitError(
            "--peers is given beside --all, which leaves out papers that compare with other toolkits; leave it out"
        )


def _all(folder: Path, seed: int, seeds: int, as_json: bool) -> None:
    """Every row's result in a folder of its own, and one page."""
    from saekit.papers.result import every, included
    from saekit.report.papers import write_papers

    _made(folder)
    began, total, rows = time.monotonic(), len(included()), list[dict[str, Any]]()
    with progress("reproduce", "papers") as draw:

        def tell(name: str) -> "Tell":
            return lambda done, whole, note: draw(len(rows), total, f"{name}: {note}")

        for data in every(seed, seeds, folder, tell, say):
            rows.append(data)
            page = write_papers(rows, folder / "index.html")  # what is done can be looked at
            draw(len(rows), total, data["name"])
    failed = [row["name"] for row in rows if "failed" in row]
    claims = [claim for row in rows for claim in row.get("claims", ())]
    seconds = time.monotonic() - began
    facts = {
        "page": str(page.resolve()), "papers": len(rows), "failed": failed, "claims": len(claims),
        "hold": sum(claim["holds"] for claim in claims), "seconds": seconds,
        "not": {row["name"]: [c["claim"] for c in row["claims"] if not c["holds"]] for row in rows if not row.get("holds", True)},
    }  # fmt: skip
    text = f"{facts['hold']} of {facts['claims']} claims of {facts['papers']} papers hold, in {duration(seconds)}: {facts['page']}"
    result(facts, as_json, text)
    if failed:
        raise SaekitError(f"{', '.join(failed)} failed; run one by its name to see where")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaekitError(
            f"out {str(folder)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    return folder


def table(found: Mapping[str, Any], folder: Path) -> str:
    """The reproduction as people read it."""
    lines = [found["title"], found["source"], *textwrap.wrap(found["setting"], 110), ""]
    for claim in found["claims"]:
        spread, ours, control = "", claim["ours"], claim["control"]
        if claim["interval"] is not None:
            low, high = claim["interval"]
            spread = f" [{_number(low)}, {_number(high)}]"
        shown = ", ".join(map(_number, ours)) if len(ours) <= 5 else f"n = {len(ours)}"
        head = f"{'HOLDS' if claim['holds'] else 'DOES NOT HOLD'}  {claim['claim']}"
        lines += textwrap.wrap(head, 110, subsequent_indent="  ")
        lines.append(f"    ours {_number(claim['mean'], 4)}{spread} ({shown}); demanded: {claim['demand']}")
        if control:
            known = [v for v in control["values"] if v is not None]
            mean = _number(sum(known) / len(known) if known else None, 4)
            lines.append(f"    {control['name']}: {mean} ({', '.join(map(_number, control['values'][:5]))})")
        lines += textwrap.wrap(
            f"paper: {claim['paper']}", 106, initial_indent="    ", subsequent_indent="      "
        )
    if found["controls"]:
        lines += ["", *_controls(found["controls"])]
    for note in found["notes"]:
        lines += ["", *textwrap.wrap(note, 110)]
    return "\n".join(
        [*lines, "", f"{folder}/result.json, {folder}/figure.html; {duration(found['seconds'])}"]
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "nan" if value is None else f"{value:.{digits}g}"


def _controls(controls: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Lines of a table: dictionaries down, measures across."""
    names = dict.fromkeys(name for rows in controls.values() for name in rows)
    first = "means over seeds"
    left = max(map(len, (first, *names)))
    right = {measure: max(len(measure), 8) for measure in controls}
    lines = [f"{first:{left}}" + "".join(f"  {measure:>{w}}" for measure, w in right.items())]
    for name in names:
        values = [[v for v in controls[measure].get(name) or () if v is not None] for measure in controls]
        shown = [f"{sum(v) / len(v):.3g}" if v else "" for v in values]
        cells = "".join(f"  {text:>{w}}" for text, w in zip(shown, right.values(), strict=True))
        lines.append(f"{name:{left}}{cells}".rstrip())
    return lines
