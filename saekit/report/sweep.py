"""The front of a sweep: error over L0 of runs that shared a stream, as a page and as rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saekit import metrics
from saekit.activations import write_atomic
from saekit.evaluate.core import controls_for
from saekit.trainers import Run
from saekit.trainers.log import read
from saekit.trainers.loop import as_source

SHARE = 0.1  # of a run's log lines, its last, that are averaged


@torch.no_grad()
def untrained(runs: Mapping[str, Run], source: Any, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """For each frozen control a row of the random dictionary of its shape, on one batch of the stream."""
    out: list[dict[str, Any]] = []
    for name, run in runs.items():
        d = run.dictionary
        if not run.finished or d.config.atoms[0] != "frozen":
            continue
        points = d.wiring.points(d.reads, d.writes)
        stream = as_source(source, d.wiring.kind == "sequences")
        batch = d.gather([next(stream.batches(points, batch_size, seed + 1))])
        random = controls_for(d, d.loss(batch).codes)["random"]
        loss = random.loss(batch)
        silent = (loss.codes.firing_counts() == 0).float().mean().item()
        name = name.replace("frozen", "random")
        out.append(
            {
                "name": name,
                "out": None,
                "l0": metrics.l0(loss.codes),
                "fvu": loss.fvu.item(),
                "dead_share": silent,
            }
        )
    return out


def rows(runs: Mapping[str, Run], controls: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """One row per finished run: its name, and the means of its last log lines; ``front`` where no other beats it.

    A run is on the front when no other is at most as large in L0 and FVU, and smaller in one of them.
    ``controls`` are rows of :func:`untrained`.
    """
    out = [dict(row) for row in controls]
    for name, run in runs.items():
        if not run.finished or run.path is None:
            continue
        lines = read(run.path)
        last = lines[-max(1, round(SHARE * len(lines))) :]
        means = {key: sum(line[key] for line in last) / len(last) for key in ("l0", "fvu", "dead_share")}
        out.append({"name": name, "out": str(run.path), **means})
    for row in out:
        mine = (row["l0"], row["fvu"])
        rivals = [(o["l0"], o["fvu"]) for o in out]
        row["front"] = not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in rivals)
    return out


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
