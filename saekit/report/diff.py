"""What two sources of a crosscoder share and what each has alone: a table of its features, and a page."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.activations import write_atomic
from saekit.dictionaries import Dictionary
from saekit.evaluate.diffing import alone, latent_scaling, norm_difference

LISTED = 20  # features of each side that are named
COLUMNS = ("norm_difference", "nu_error", "nu_reconstruction", "density")


def compare(
    d: Dictionary, rows: Float[Tensor, "rows columns"], source: int = 1, other: int = 0
) -> dict[str, list[Any]]:
    """Every feature's norm difference, latent scaling as seen from its stronger side, density, and whose it is.

    ``rows`` are those of both sources side by side, as the crosscoder reads them. ``side`` is "source" or "other" where
    :func:`saekit.evaluate.diffing.specific` says so, "shared", or "dead" for a feature that fires on none of the rows.
    """
    norm = norm_difference(d, source, other)
    ours, theirs = latent_scaling(d, rows, source, other), latent_scaling(d, rows, other, source)
    stronger = norm >= 0.5
    error, reconstruction = (torch.where(stronger, a, b) for a, b in zip(ours, theirs, strict=True))
    density = d.encode(rows).firing_counts().double() / len(rows)
    own, others = alone(norm, *ours), alone(1 - norm, *theirs)
    side = ["dead" if n == 0 else "source" if a else "other" if b else "shared" for n, a, b in zip(density.tolist(), own.tolist(), others.tolist(), strict=True)]  # fmt: skip
    values = zip(COLUMNS, (norm, error, reconstruction, density), strict=True)
    return {"side": side, **{name: [_number(v) for v in column.tolist()] for name, column in values}}


def measured(d: Dictionary, rows: Float[Tensor, "rows columns"]) -> dict[str, Any]:
    """How good the crosscoder is on the rows: its L0, and the FVU of each source."""
    codes = d.encode(rows)
    sides = zip(
        d.reads, rows.split(d.wiring.parts_in, 1), d.decode(codes).split(d.wiring.parts_out, 1), strict=True
    )
    return {"l0": metrics.l0(codes), "fvu": {name: metrics.fvu(x, hat) for name, x, hat in sides}}


def _number(value: float) -> float | None:
    return value if value == value else None  # JSON has no NaN


def summary(found: dict[str, list[Any]], source: str, other: str) -> str:
    """How many features are whose, and the most frequent of each side's own."""
    counts = {side: found["side"].count(side) for side in ("source", "other", "shared", "dead")}
    lines = [f"{source} alone {counts['source']}, {other} alone {counts['other']}, shared {counts['shared']}, dead {counts['dead']}"]  # fmt: skip
    for side, name in (("source", source), ("other", other)):
        own = [i for i, s in enumerate(found["side"]) if s == side]
        own.sort(key=lambda i: -found["density"][i])
        if own:
            shown = ", ".join(f"{i} ({100 * found['density'][i]:.2g} %)" for i in own[:LISTED])
            lines.append(
                f"{name} alone, most frequent first: {shown}" + (", ..." if len(own) > LISTED else "")
            )
    return "\n".join(lines)


def draw(found: dict[str, list[Any]], source: str, other: str, path: Path) -> Path:
    """Write norm differences and latent scaling as one self-contained page."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        1, 2, subplot_titles=("Norm difference of the decoder", "Latent scaling, seen from the stronger side")
    )
    names = {"other": f"{other} alone", "shared": "shared", "source": f"{source} alone"}
    colours = dict(zip(names, ("#1b6ca8", "#8a8a8a", "#b45309"), strict=True))
    for side, name in names.items():
        own = [i for i, s in enumerate(found["side"]) if s == side]
        figure.add_histogram(
            x=[found["norm_difference"][i] for i in own], name=name, legendgroup=side, xbins={"start": 0, "end": 1.0001, "size": 0.02},
            marker={"color": colours[side]}, row=1, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=[found["nu_error"][i] for i in own], y=[found["nu_reconstruction"][i] for i in own], mode="markers", name=name,
            legendgroup=side, showlegend=False, text=[f"feature {i}" for i in own], marker={"size": 5, "opacity": 0.6, "color": colours[side]}, row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(title=f"0: {other} alone, 1: {source} alone", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title="features", row=1, col=1)
    figure.update_xaxes(title="of the error", range=[-0.5, 1.5], row=1, col=2)
    figure.update_yaxes(title="of the reconstruction", range=[-0.5, 1.5], row=1, col=2)
    figure.update_layout(barmode="stack", template="plotly_white", title=f"What {source} and {other} share")
    write_atomic(path, figure.to_html(include_plotlyjs=True).encode())
    return path
