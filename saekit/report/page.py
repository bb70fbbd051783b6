"""The run report: what was trained, how well it works and what its features are, as one HTML file.

The file opens offline and asks for nothing: scripts, styles and data lie inside, and a content security
policy admits those scripts only. Text of tokens is data from arbitrary corpora. It reaches the page as
JSON and is put there as text nodes, never as markup.
"""

import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saekit.pages import printable, script_json, sha256
from saekit.report.contexts import Context, FeatureContexts

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


@dataclass(frozen=True)
class Metric:
    """One row of the table: a value with its unit, its n, an interval and the controls it has to beat.

    ``better`` says which direction is good, None where neither is. ``controls`` maps the name of a
    control (a random dictionary, say) to the value of this metric for it.
    """

    key: str
    value: Number
    n: int | None = None
    unit: str = ""
    low: Number | None = None
    high: Number | None = None
    controls: Mapping[str, Number] = field(default_factory=dict)
    better: Literal["higher", "lower"] | None = None
    explanation: str = ""


@dataclass(frozen=True)
class Window:
    """Tokens as text around ``peak``, an index into them.

    ``activations`` holds one value per token, None where the token is masked. ``foreign`` is true for
    tokens of another document than the peak's; empty where that is unknown. ``source`` says where it is.
    ``looked`` is what each token adds to the peak's activation, of a feature that looks back, else empty, and
    ``strongest`` the token that adds most: how far back, its text, and what it adds.
    """

    tokens: tuple[str, ...]
    activations: tuple[float | None, ...]
    peak: int
    source: str = ""
    foreign: tuple[bool, ...] = ()
    looked: tuple[float, ...] = ()
    strongest: tuple[int, str, float] | None = None


@dataclass(frozen=True)
class Band:
    """Windows drawn between two quantiles (shares, 0 to 1) of a feature's nonzero activations."""

    lower: float
    upper: float
    low: float
    high: float
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class FeatureCard:
    """One feature: how often and how strongly it fires, on what, and which next tokens it favours.

    ``density`` is the share of ``n_tokens`` it fires on; ``promoted`` and ``suppressed`` are (token,
    logit) pairs, strongest first. ``histogram_counts`` [bins], ``histogram_edges`` [bins + 1].
    """

    index: int
    density: float
    max_activation: float
    n_tokens: int
    histogram_edges: tuple[float, ...] = ()
    histogram_counts: tuple[int, ...] = ()
    top: tuple[Window, ...] = ()
    bands: tuple[Band, ...] = ()
    promoted: tuple[tuple[str, Number], ...] = ()
    suppressed: tuple[tuple[str, Number], ...] = ()


@dataclass(frozen=True)
class RunReport:
    """Everything on the page; ``dataclasses.asdict`` of it is JSON.

    ``facts`` are (label, value) pairs: what was trained, on what. ``curves`` maps a name to (steps,
    values), None where nothing was measured; names that agree up to a "/" share a chart:
    "loss/reconstruction", "loss/auxk". ``density`` holds the share of tokens that each feature of the dictionary fires on.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    curves: Mapping[str, tuple[Sequence[Number], Sequence[Number | None]]] = field(default_factory=dict)
    density: Sequence[Number] = ()
    metrics: tuple[Metric, ...] = ()
    features: tuple[FeatureCard, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def feature_card(
    found: FeatureContexts,
    token_text: Callable[[int], str],
    promoted: Sequence[tuple[str, Number]] = (),
    suppressed: Sequence[tuple[str, Number]] = (),
    document_name: Callable[[int], str] | None = None,
) -> FeatureCard:
    """The card of what a ``ContextCollector`` found; ``token_text`` gives the text of a token id."""

    def window(context: Context) -> Window:
        source = f"row {context.row}, token {context.position}"
        foreign: tuple[bool, ...] = ()
        if context.documents is not None:
            own = context.documents[context.peak]
            source = f"{document_name(own) if document_name else f'document {own}'}; {source}"
            foreign = tuple(document != own for document in context.documents)
        text = tuple(token_text(token) for token in context.tokens)
        strongest = None
        if context.strongest is not None:
            back, token, adds = context.strongest
            strongest = (back, token_text(token), adds)
        own_document = foreign if any(foreign) else ()
        return Window(
            text, context.activations, context.peak, source, own_document, context.looked or (), strongest
        )

    bands = (
        Band(band.lower, band.upper, band.low, band.high, tuple(map(window, band.contexts)))
        for band in found.bands
    )
    return FeatureCard(
        index=found.index,
        density=found.density,
        max_activation=found.max_activation,
        n_tokens=found.n_tokens,
        histogram_edges=found.histogram_edges,
        histogram_counts=found.histogram_counts,
        top=tuple(map(window, found.top)),
        bands=tuple(bands),
        promoted=tuple(promoted),
        suppressed=tuple(suppressed),
    )


def write(report: RunReport, path: str | os.PathLike[str]) -> None:
    """Write the page to ``path``: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = render(report)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def render(report: RunReport) -> str:
    """The page as HTML."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["number"] = _number
    charts = _charts(report)
    figures = {chart["id"]: chart.pop("figure") for chart in charts}
    # a parser reads \r\n as \n, and the policy's hash is taken over what the parser read
    scripts = [(here / "run.js").read_text("utf-8"), get_plotlyjs().replace("\r\n", "\n") if charts else ""]
    return environment.get_template("run.html").render(
        report=report,
        metrics=[(metric, _strip(metric), _verdict(metric)) for metric in report.metrics],
        charts=charts,
        policy=" ".join(f"'sha256-{sha256(script)}'" for script in scripts),
        style=Markup((here / "run.css").read_text("utf-8")),
        data=Markup(script_json({**_feature_data(report.features), "figures": figures})),
        script=Markup(scripts[0]),
        plotly=Markup(scripts[1]),
    )


def _feature_data(features: Sequence[FeatureCard]) -> dict[str, Any]:
    """Features for the page's script; every distinct token text is written once."""
    vocabulary: dict[str, int] = {}

    def token(text: str) -> int:
        return vocabulary.setdefault(text, len(vocabulary))

    def window(one: Window) -> dict[str, Any]:
        return {
            "tokens": [token(text) for text in one.tokens],
            "activations": [_float32(value) for value in one.activations],
            "peak": one.peak,
            "source": one.source,
            "foreign": [int(flag) for flag in one.foreign],
            **looked(one),
        }

    def looked(one: Window) -> dict[str, Any]:
        if one.strongest is None:
            return {}
        back, text, adds = one.strongest
        return {
            "looked": [_float32(value) for value in one.looked],
            "strongest": [back, token(text), _float32(adds)],
        }

    def card(one: FeatureCard) -> dict[str, Any]:
        return {
            "index": one.index,
            "density": one.density,
            "max": _float32(one.max_activation),
            "n": one.n_tokens,
            "edges": one.histogram_edges,
            "counts": one.histogram_counts,
            "top": [window(context) for context in one.top],
            "bands": [
                {
                    "lower": band.lower,
                    "upper": band.upper,
                    "low": _float32(band.low),
                    "high": _float32(band.high),
                    "windows": [window(context) for context in band.windows],
                }
                for band in one.bands
            ],
            "promoted": [[token(text), _float32(logit)] for text, logit in one.promoted],
            "suppressed": [[token(text), _float32(logit)] for text, logit in one.suppressed],
        }

    cards = [card(one) for one in features]
    return {"features": cards, "vocabulary": list(vocabulary)}


def _charts(report: RunReport) -> list[dict[str, Any]]:
    """Charts of the training curves and of the densities: id, title, caption and plotly figure of each."""
    panels: dict[str, dict[str, Any]] = {}
    for name, curve in report.curves.items():
        panel, _, term = name.partition("/")
        panels.setdefault(panel, {})[term or panel] = curve
    charts = [
        {"title": CURVE_TITLES.get(panel.replace(" ", "_"), panel), **_curve_chart(curves)}
        for panel, curves in panels.items()
        if any(len(steps) for steps, _ in curves.values())
    ]
    if len(report.density):
        charts.append({"title": "How often features fire", **_density_chart(np.asarray(report.density))})
    return [{"id": f"chart-{number}", **chart} for number, chart in enumerate(charts)]


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
        last.append(f"{name} {_number(y[-1])}" if len(curves) > 1 else _number(y[-1]))
        positive.extend(y[np.isfinite(y)])
    figure.update_layout(showlegend=len(curves) > 1)
    if positive and min(positive) > 0 and max(positive) > 30 * min(positive):
        figure.update_yaxes(type="log", dtick=1)
    return {
        "caption": f"At step {_number(x[-1])}: {', '.join(last)}",
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
            customdata=[f"{_percent(10**low)} to {_percent(10**high)}" for low, high in pairwise(edges)],
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
    caption = f"{never:,} of {len(density):,} features ({_percent(never / len(density))}) never fired"
    if len(firing):
        caption += f"; the median of the others fires on {_percent(10 ** float(np.median(firing)))} of tokens"
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


def _strip(metric: Metric) -> dict[str, Any] | None:
    """Places (0 to 100) of value, interval and controls on one line; None where nothing is compared."""
    marks = [metric.value, metric.low, metric.high, *metric.controls.values()]
    numbers = [mark for mark in marks if mark is not None and math.isfinite(mark)]
    if len(numbers) < 2 or not math.isfinite(metric.value):
        return None
    low, high = min(0.0, *numbers), max(numbers)
    if high <= 1 and low >= 0:
        high = 1.0

    def at(value: Number | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(100 * (value - low) / ((high - low) or 1), 2)

    controls = [(name, at(value)) for name, value in metric.controls.items()]
    return {"value": at(metric.value), "low": at(metric.low), "high": at(metric.high), "controls": controls}


def _verdict(metric: Metric) -> str:
    """How the value stands to its controls, in words; empty where there is nothing to say."""
    if metric.better is None or not metric.controls:
        return ""
    sign = 1 if metric.better == "higher" else -1
    rival = max(metric.controls, key=lambda name: sign * metric.controls[name])
    best = metric.controls[rival]
    if not sign * metric.value > sign * best:
        return f"does not beat {rival}"
    if metric.low is not None and metric.high is not None and metric.low <= best <= metric.high:
        return f"{rival} lies within its interval"
    return "beats its control" if len(metric.controls) == 1 else "beats its controls"


def _float32(value: Number | None) -> Number | None:
    """The shortest decimal that is the same float32: nothing is lost, and the page is half as long."""
    return float(str(np.float32(value))) if value else value


def _number(value: Number | None) -> str:
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
