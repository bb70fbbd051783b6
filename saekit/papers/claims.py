"""What a reproduction says: a claim, the paper's number, ours over seeds, a control, and whether it holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Tell = Callable[[int, int | None, str], None]

SIGNS = {"<=": "at most", ">=": "at least", "<": "below", ">": "above"}


@dataclass(frozen=True)
class Claim:
    """``ours`` holds one value per seed (or one, where nothing is random); its mean is compared with ``bound``.

    ``control`` holds the same measure for what the claim is measured against; its name says what that is.
    ``paper`` quotes the paper's number, with its setting, or says that there is none at this scale.
    """

    text: str
    paper: str
    ours: Sequence[float]
    sign: str
    bound: float
    control: Sequence[float] = ()
    control_name: str = ""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return sum(self.ours) / len(self.ours)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean by Student's t; None for fewer than two seeds."""
        return _interval(self.ours)

    @property
    def holds(self) -> bool:
        """Whether the mean is on the right side of the bound; a NaN never is."""
        a, b = self.mean, self.bound
        return {"<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b}[self.sign]

    @property
    def demand(self) -> str:
        """The bound in words."""
        return f"{SIGNS[self.sign]} {self.bound:.4g}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        control = {"name": self.control_name, "values": list(self.control)} if self.control else None
        return {
            "claim": self.text, "paper": self.paper, "ours": list(self.ours), "mean": self.mean,
            "interval": self.interval, "demand": self.demand, "control": control, "holds": self.holds,
        }  # fmt: skip


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2 or not all(math.isfinite(v) for v in values):
        return None
    from scipy.stats import t

    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(t.ppf(0.975, n - 1)) * spread
    return mean - half, mean + half


@dataclass(frozen=True)
class Reproduction:
    """The result of a paper's row. ``figure`` is a plotly figure as JSON; ``notes`` are said beside the table.

    ``controls`` maps a measure to ``{dictionary: values over seeds}``: those that the paper compares, and
    beside them the controls of :mod:`saekit.papers.controls`, on the same rows at the same k.
    """

    title: str
    source: str
    setting: str
    claims: Sequence[Claim]
    figure: dict[str, Any]
    notes: Sequence[str] = field(default=())
    controls: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every claim does."""
        return all(claim.holds for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "title": self.title, "source": self.source, "setting": self.setting, "holds": self.holds,
            "claims": [claim.to_json() for claim in self.claims], "notes": list(self.notes), "figure": self.figure,
            "controls": {m: {name: list(v) for name, v in rows.items()} for m, rows in self.controls.items()},
        }  # fmt: skip


def figure(
    title: str, x: str, y: str, lines: Mapping[str, tuple[Sequence[Any], Sequence[float]]], **layout: Any
) -> dict[str, Any]:
    """A line chart as JSON: ``lines`` maps a name to its x and y values."""
    import plotly.graph_objects as go

    drawn = go.Figure()
    for name, (xs, ys) in lines.items():
        drawn.add_scatter(x=list(xs), y=list(ys), name=name, mode="lines+markers")
    drawn.update_layout(
        title=title,
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
        **layout,
    )
    return drawn.to_plotly_json()


def bars(
    title: str, y: str, groups: Mapping[str, Mapping[str, Sequence[float]]], **layout: Any
) -> dict[str, Any]:
    """A bar chart as JSON: ``groups`` maps a name to ``{bar: values over seeds}``; whiskers span the seeds."""
    import plotly.graph_objects as go

    drawn = go.Figure()
    for name, values in groups.items():
        means = [sum(v) / len(v) for v in values.values()]
        up = [max(v) - m for v, m in zip(values.values(), means, strict=True)]
        down = [m - min(v) for v, m in zip(values.values(), means, strict=True)]
        drawn.add_bar(
            x=list(values), y=means, name=name,
            error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down},
        )  # fmt: skip
    drawn.update_layout(title=title, yaxis_title=y, template="plotly_white", barmode="group", **layout)
    return drawn.to_plotly_json()
