"""``saekit reproduce``: a paper's claim at laptop scale, with the paper's number, ours and the controls."""

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.pages import finite
from saekit.registry import nearest
from saekit.verbs.console import Json, Seed, duration, progress, result, say


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A paper's name; left out: list them.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds to train with.", min=1)] = 3,
    out: Annotated[
        str | None, typer.Option(help="Folder for result.json and figure.html; default: reproduce/NAME.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Python of an environment with other toolkits, for the papers that compare."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Rerun a paper's claim at laptop scale: claim, paper's number, ours over seeds, control, holds or not.

    Seeds run side by side, and each is kept until all are done: a run that was stopped goes on from there.

    Example: `saekit reproduce matryoshka`
    """
    from saekit.activations import write_atomic
    from saekit.papers import PAPERS
    from saekit.papers.row import run

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
    options = {"peers": peers} if peers is not None else {}
    row.check(seeds, **options)
    folder = Path(out or f"reproduce/{name}")
    began = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaekitError(
            f"out {str(folder)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    with progress(name, "steps") as draw:
        found, seed_seconds = run(PAPERS.table[name], range(seed, seed + seeds), folder, draw, **options)
    seconds = time.monotonic() - began
    data = {"name": name, "seeds": seeds, "seconds": seconds, "seed_seconds": seed_seconds, **found.to_json()}
    write_atomic(folder / "result.json", json.dumps(finite(data), indent=1, default=_plain).encode())
    import plotly.graph_objects as go
    import plotly.io

    page = plotly.io.to_html(go.Figure(found.figure), include_plotlyjs=True, full_html=True)
    write_atomic(folder / "figure.html", page.encode())
    if not found.holds:
        say(f"{name}: not every claim holds at this scale")
    result(
        json.loads(json.dumps(finite(data), default=_plain)), as_json, table(found, data["seconds"], folder)
    )


def _plain(value: Any) -> Any:
    return value.tolist()  # what plotly keeps as arrays


def table(found: Any, seconds: float, folder: Path) -> str:
    """The reproduction as people read it."""
    lines = [found.title, found.source, *textwrap.wrap(found.setting, 110), ""]
    for claim in found.claims:
        spread = ""
        if claim.interval is not None:
            low, high = claim.interval
            spread = f" [{low:.3g}, {high:.3g}]"
        shown = (
            ", ".join(f"{v:.3g}" for v in claim.ours) if len(claim.ours) <= 5 else f"n = {len(claim.ours)}"
        )
        lines += textwrap.wrap(
            f"{'HOLDS' if claim.holds else 'DOES NOT HOLD'}  {claim.text}", 110, subsequent_indent="  "
        )
        lines.append(f"    ours {claim.mean:.4g}{spread} ({shown}); demanded: {claim.demand}")
        if claim.control:
            mean = sum(claim.control) / len(claim.control)
            lines.append(
                f"    {claim.control_name}: {mean:.4g} ({', '.join(f'{v:.3g}' for v in claim.control[:5])})"
            )
        lines += textwrap.wrap(
            f"paper: {claim.paper}", 106, initial_indent="    ", subsequent_indent="      "
        )
    if found.controls:
        lines += ["", *_controls(found.controls)]
    for note in found.notes:
        lines += ["", *textwrap.wrap(note, 110)]
    return "\n".join([*lines, "", f"{folder}/result.json, {folder}/figure.html; {duration(seconds)}"])


def _controls(controls: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Lines of a table: dictionaries down, measures across."""
    names = dict.fromkeys(name for rows in controls.values() for name in rows)
    first = "means over seeds"
    left = max(map(len, (first, *names)))
    right = {measure: max(len(measure), 8) for measure in controls}
    lines = [f"{first:{left}}" + "".join(f"  {measure:>{w}}" for measure, w in right.items())]
    for name in names:
        values = [controls[measure].get(name) for measure in controls]
        shown = [f"{sum(v) / len(v):.3g}" if v else "" for v in values]
        cells = "".join(f"  {text:>{w}}" for text, w in zip(shown, right.values(), strict=True))
        lines.append(f"{name:{left}}{cells}".rstrip())
    return lines
