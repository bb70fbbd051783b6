"""Charts of a report: the curves of training, and how often features fire."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from saekit.pages import printable

Number = float | int
MAX_POINTS = 2000  # points drawn of one curve; more cannot be seen
CURVE_TITLES = {
    "loss": "Loss terms",
    "l0": "L0: active features per token",
    "dead_share": "Share of features that are dead",
    "fvu": "FVU: fraction of variance unexplained",
    "lr": "Learning rate",
    "learning_rate": "Learning rate",
}


def charts(
    curves: Mapping[str, tuple[Sequence[Number], Sequence[Number | None]]], density: Sequence[Number]
) -> list[dict[str, Any]]:
    """Charts of the training curves and of the densities: id, title, caption and plotly figure of each."""
    panels: dict[str, dict[str, Any]] = {}
    for name, curve in curves.items():
        panel, _, term = name.partition("/")
        panels.setdefault(panel, {})[term or panel] = curve
    found = [
        {"title": CURVE_TITLES.get(panel.replace(" ", "_"), panel), **_curve_chart(lines)}
        for panel, lines in panels.items()
        if any(len(steps) for steps, _ in lines.values())
    ]
    if len(density):
        found.append({"title": "How often features fire", **_density_chart(np.asarray(density))})
    return [{"id": f"chart-{place}", **chart} for place, chart in enumerate(found)]


def _curve_chart(curves: Mapping[str, tuple[Sequence[Number], Sequence[Number | None]]]) -> dict[str, Any]:
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "none", "xaxis": {"title": {"text": "step"}}})
    last, positive = [], []
    for name, (steps, values) in curves.items():
        x, y = _thinned(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64))
        # plotly reads a subset of HTML in names, but not &quot;
        figure.add_scatter(
            x=x.tolist(), y=y.tolist(), name=html.escape(printable(name), quote=False), mode="lines"
        )
        last.append(f"{name} {number(y[-1])}" if len(curves) > 1 else number(y[-1]))
        positive.extend(y[np.isfinite(y)])
    figure.update_layout(showlegend=len(curves) > 1)
    if positive and min(positive) > 0 and max(positive) > 30 * min(positive):
        figure.update_yaxes(type="log", dtick=1)
    return {
        "caption": f"At step {number(x[-1])}: {', '.join(last)}",
        "figure": figure.to_plotly_json(),
    }


def _density_chart(density: np.ndarray) -> dict[str, Any]:
    """Histogram of log10 of the firing shares; features that never fired are told in the caption."""
    import plotly.graph_objects as go

    firing = np.log10(density[density > 0])
    lowest = math.floor(firing.min()) if len(firing) else -1
    counts, edges = np.histogram(firing, bins=-lowest * 10 or 10, range=(lowest, 0 if lowest else 1))
    ticks = list(range(lowest, 1))
    figure = go.Figure(
        data=go.Bar(
            x=((edges[1:] + edges[:-1]) / 2).tolist(),
            y=counts.tolist(),
            width=np.diff(edges).tolist(),
            customdata=[f"{percent(10**low)} to {percent(10**high)}" for low, high in pairwise(edges)],
            hovertemplate="%{customdata} of tokens: %{y} features<extra></extra>",
        ),
        layout={
            "template": "none",
            "showlegend": False,
            "xaxis": {
                "title": {"text": "% of tokens (log scale)"},
                "tickvals": ticks,
                "ticktext": [f"{10.0 ** (tick + 2):g}" for tick in ticks],
                "tickangle": 0,
            },
            "yaxis": {"title": {"text": "features"}},
        },
    )
    never = int((density == 0).sum())
    caption = f"{never:,} of {len(density):,} features ({percent(never / len(density))}) never fired"
    if len(firing):
        caption += f"; the median of the others fires on {percent(10 ** float(np.median(firing)))} of tokens"
    return {"caption": caption, "figure": figure.to_plotly_json()}


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MAX_POINTS`` points of a curve: the lowest and highest of every stretch, and the last."""
    if len(x) <= MAX_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MAX_POINTS // 2, dtype=np.int64)
    keep = {len(x) - 1}
    for low, high in pairwise(cuts):
        stretch = np.nan_to_num(y[low:high])
        keep |= {low + int(stretch.argmin()), low + int(stretch.argmax())}
    kept = np.array(sorted(keep))
    return x[kept], y[kept]


def number(value: Number | None) -> str:
    """A number as people read it: four digits, nothing for None."""
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    """A share (0 to 1) in percent, three digits."""
    return f"{100 * share:.3g} %"
