"""Results of rows on disk: one row's, and all of them with what was kept of a run that was stopped."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saekit.activations import write_atomic
from saekit.pages import finite
from saekit.papers import PAPERS
from saekit.papers.claims import Tell
from saekit.papers.row import mark_of, run
from saekit.types import SaekitError

RESULT, FIGURE = "result.json", "figure.html"


def reproduced(name: str, seeds: range, folder: Path, tell: Tell, **options: str) -> dict[str, Any]:
    """Measure and judge a row, and write ``result.json`` and ``figure.html``; returns what the former holds."""
    import plotly.graph_objects as go
    import plotly.io

    place, began = PAPERS.table[name], time.monotonic()
    found, seed_seconds = run(place, seeds, folder, tell, **options)
    data = {
        "name": name, "of": mark_of(place, options), "seeds": len(seeds), "first": seeds.start,
        "seconds": time.monotonic() - began, "seed_seconds": seed_seconds, **found.to_json(),
    }  # fmt: skip
    data = json.loads(json.dumps(finite(data), default=lambda a: a.tolist()))  # plotly keeps arrays
    page = plotly.io.to_html(go.Figure(data["figure"]), include_plotlyjs=True, full_html=True)
    write_atomic(folder / FIGURE, page.encode())
    write_atomic(folder / RESULT, json.dumps(data, indent=1).encode())
    return data


def kept(name: str, seeds: range, folder: Path) -> dict[str, Any] | None:
    """The result that lies in a folder, if it is whole, of these seeds and of the code of now."""
    try:
        data = json.loads((folder / RESULT).read_bytes())
    except (OSError, ValueError):
        return None
    wanted = {"name": name, "of": mark_of(PAPERS.table[name], {}), "seeds": len(seeds), "first": seeds.start}
    return data if isinstance(data, dict) and wanted.items() <= data.items() else None


def included() -> list[str]:
    """Rows that ``--all`` runs: those that take no hours, and no other toolkits."""
    return [name for name in PAPERS if not (PAPERS[name].slow or PAPERS[name].takes_peers)]


def every(
    seed: int, n_seeds: int, folder: Path, tell: Callable[[str], Tell], told: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Results of all rows of :func:`included`, in their order; what is there already is taken as it is.

    A row that fails gives ``{"name", "failed"}`` and stops no other. ``tell(name)`` draws a row's progress.
    """
    for name in included():
        seeds = range(seed, seed + max(n_seeds, PAPERS[name].least))
        data = kept(name, seeds, folder / name)
        if data is None:
            try:
                data = reproduced(name, seeds, folder / name, tell(name))
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = (
                    ""
                    if isinstance(error, SaekitError)
                    else f" ({Path(last.filename).name}, line {last.lineno})"
                )
                data = {"name": name, "failed": f"{type(error).__name__}: {error}{where}"}
        told(verdict(data))
        yield data


def verdict(data: dict[str, Any]) -> str:
    """One line on a row."""
    if "failed" in data:
        return f"{data['name']}: failed, {data['failed']}"
    held = sum(claim["holds"] for claim in data["claims"])
    return f"{data['name']}: {held} of {len(data['claims'])} claims hold, {data['seconds']:.0f} s"
