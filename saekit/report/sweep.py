"""The front of a sweep: error over L0 of runs that shared a stream, as a page and as rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import metrics
from saekit.activations import write_atomic
from saekit.dictionaries import Dictionary
from saekit.dictionaries.sequences import GATHERED
from saekit.evaluate.core import controls_for
from saekit.trainers import Run
from saekit.trainers.log import read
from saekit.trainers.loop import as_source


def rows(runs: Mapping[str, Run], source: Any, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """One row per finished run, and per frozen control one of the random dictionary of its shape.

    L0 and FVU are those of the rule at inference, on one batch of the stream, the same for all.
    """
    out: list[dict[str, Any]] = []
    batches: dict[tuple[str, ...], Any] = {}
    for name, run in runs.items():
        d = run.dictionary
        if not run.finished or run.path is None:
            continue
        points = d.wiring.points(d.reads, d.writes)
        if points not in batches:
            stream = as_source(source, d.wiring.kind == "sequences")
            batches[points] = next(stream.batches(points, batch_size, seed + 1))
        batch = d.gather([batches[points]])
        mine = _row(name, d, batch)
        last = read(run.path)[-1]
        out.append({**mine, "out": str(run.path), "dead_share": last["dead_share"]})
        if d.config.atoms[0] == "frozen":
            random = controls_for(d, d.loss(batch).codes)["random"]
            out.append(_row(name.replace("frozen", "random"), random, batch))
    return with_front(out)


def with_front(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with ``front``: whether no other is at most as large in L0 and FVU, and smaller in one of them."""
    for row in found:
        here = (row["l0"], row["fvu"])
        rivals = [(o["l0"], o["fvu"]) for o in found]
        row["front"] = not any(a <= here[0] and b <= here[1] and (a, b) != here for a, b in rivals)
    return found


@torch.no_grad()
def _row(name: str, d: Dictionary, batch: Any) -> dict[str, Any]:
    whole, mask = (batch, None) if isinstance(batch, Tensor) else (batch.activations[GATHERED], batch.mask)
    given, target = d.wiring.split(whole)
    codes, hat = d.encode(given), d(given)
    here = torch.ones(whole.shape[:-1], dtype=torch.bool, device=whole.device) if mask is None else mask
    silent = (codes.firing_counts() == 0).float().mean().item()
    fvu, l0 = metrics.fvu(target[here], hat[here]), codes.l0()[here].double().mean().item()
    return {"name": name, "out": None, "l0": l0, "fvu": fvu, "dead_share": silent}


def draw(found: list[dict[str, Any]], path: Path) -> Path:
    """Write the figure of the rows as one self-contained page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    front = sorted((row for row in found if row["front"]), key=lambda row: row["l0"])
    figure.add_scatter(
        x=[r["l0"] for r in front],
        y=[r["fvu"] for r in front],
        mode="lines",
        name="front",
        line={"dash": "dot"},
    )
    figure.add_scatter(
        x=[r["l0"] for r in found], y=[r["fvu"] for r in found], mode="markers+text", name="runs",
        text=[r["name"] for r in found], textposition="top center",
    )  # fmt: skip
    figure.update_layout(
        title="Error by number of active features", template="plotly_white",
        xaxis={"title": "L0, active features per row", "type": "log"}, yaxis={"title": "FVU", "type": "log"},
    )  # fmt: skip
    write_atomic(path, figure.to_html(include_plotlyjs=True).encode())
    return path
