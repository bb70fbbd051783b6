"""The run report: what was trained, how well it works and what its features are, as one HTML file.

The file opens offline and asks for nothing: scripts, styles and data lie inside, and a content security
policy admits those scripts only. Text of tokens is data from arbitrary corpora. It reaches the page as
JSON and is put there as text nodes, never as markup. Each feature is a line of JSON that is read when it
is opened or searched, so that thousands of them cost little.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saekit.autointerp.explanation import Score
from saekit.pages import printable, script_json, sha256
from saekit.report.charts import Number, charts, number
from saekit.report.contexts import Context, FeatureContexts

SCRIPTS = ("text.js", "search.js", "list.js", "detail.js", "run.js")


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
class Explained:
    """What is said of a feature, by which method ("statistics", "llm", "human", "imported"), and how it scored.

    ``label`` is a few words of it, for lists; the text itself where there is none.
    """

    text: str
    method: str
    scores: tuple[Score, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class FeatureCard:
    """One feature: how often and how strongly it fires, on what, and which next tokens it favours.

    ``density`` is the share of ``n_tokens`` it fires on; ``promoted`` and ``suppressed`` are (token,
    logit) pairs, strongest first. ``histogram_counts`` [bins], ``histogram_edges`` [bins + 1].
    ``nearest`` are the features that write what is most alike, as (feature, cosine of the decoder's rows), and
    ``together`` those that fire on the same tokens, as (feature, Jaccard index of the tokens), closest first.
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
    nearest: tuple[tuple[int, Number], ...] = ()
    together: tuple[tuple[int, Number], ...] = ()
    explanations: tuple[Explained, ...] = ()


@dataclass(frozen=True)
class RunReport:
    """Everything on the page; ``dataclasses.asdict`` of it is JSON.

    ``facts`` are (label, value) pairs: what was trained, on what. ``curves`` maps a name to (steps,
    values), None where nothing was measured; names that agree up to a "/" share a chart:
    "loss/reconstruction", "loss/auxk". ``density`` holds the share of tokens that each feature of the dictionary fires on.
    ``pictures`` are figures of features on images, as HTML. ``elsewhere`` says in words what features are that have no card and are named as neighbours.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    curves: Mapping[str, tuple[Sequence[Number], Sequence[Number | None]]] = field(default_factory=dict)
    density: Sequence[Number] = ()
    metrics: tuple[Metric, ...] = ()
    features: tuple[FeatureCard, ...] = ()
    pictures: tuple[str, ...] = ()
    elsewhere: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def feature_card(
    found: FeatureContexts,
    token_text: Callable[[int], str],
    promoted: Sequence[tuple[str, Number]] = (),
    suppressed: Sequence[tuple[str, Number]] = (),
    document_name: Callable[[int], str] | None = None,
    **more: Any,
) -> FeatureCard:
    """The card of what a ``ContextCollector`` found; ``token_text`` gives the text of a token id.

    ``more`` are other fields of the card: ``nearest``, ``together``, ``explanations``.
    """

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
        **more,
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
    environment.filters["number"] = number
    drawn = charts(report.curves, report.density)
    figures = {chart["id"]: chart.pop("figure") for chart in drawn}
    summaries, cards, vocabulary = _packed(report.features)
    # a parser reads \r\n as \n, and the policy's hash is taken over what the parser read
    own = "\n".join((here / name).read_text("utf-8") for name in SCRIPTS)
    scripts = [
        f'"use strict";\n(() => {{\n{own}}})();\n',
        get_plotlyjs().replace("\r\n", "\n") if drawn else "",
    ]
    return environment.get_template("run.html").render(
        report=report,
        metrics=[(metric, _strip(metric), _verdict(metric)) for metric in report.metrics],
        charts=drawn,
        policy=" ".join(f"'sha256-{sha256(script)}'" for script in scripts),
        style=Markup((here / "run.css").read_text("utf-8")),
        data=Markup(
            script_json(
                {
                    "features": summaries,
                    "elsewhere": dict(report.elsewhere),
                    "vocabulary": vocabulary,
                    "figures": figures,
                }
            )
        ),
        cards=Markup("\n".join(map(script_json, cards))),
        script=Markup(scripts[0]),
        plotly=Markup(scripts[1]),
    )


def _packed(
    features: Sequence[FeatureCard],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Features for the page's script: what the list shows of each, its card, and every distinct token text."""
    vocabulary: dict[str, int] = {}

    def token(text: str) -> int:
        return vocabulary.setdefault(text, len(vocabulary))

    def pairs(listed: Sequence[tuple[str, Number]]) -> list[list[Number | None]]:
        return [[token(text), _float32(value)] for text, value in listed]

    summaries, cards = [], []
    for one in features:
        said = [explained for explained in one.explanations if explained.text]
        summaries.append(
            {
                "index": one.index,
                "density": one.density,
                "max": _float32(one.max_activation),
                "peaks": list(dict.fromkeys(token(window.tokens[window.peak]) for window in one.top))[:8],
                "said": [explained.text for explained in said],
                "label": (said[0].label or said[0].text) if said else "",
                "scores": {
                    score.scorer: score.value
                    for explained in reversed(one.explanations)  # where two have one, the first counts
                    for score in explained.scores
                },
            }
        )
        cards.append(
            {
                "n": one.n_tokens,
                "edges": one.histogram_edges,
                "counts": one.histogram_counts,
                "top": [_window(window, token) for window in one.top],
                "bands": [
                    {
                        **{key: _float32(getattr(band, key)) for key in ("lower", "upper", "low", "high")},
                        "windows": [_window(window, token) for window in band.windows],
                    }
                    for band in one.bands
                ],
                "promoted": pairs(one.promoted),
                "suppressed": pairs(one.suppressed),
                "nearest": one.nearest,
                "together": one.together,
                "explanations": [
                    {
                        **asdict(explained),
                        "scores": [{**asdict(s), "corrected": s.corrected} for s in explained.scores],
                    }
                    for explained in one.explanations
                ],
            }
        )
    return summaries, cards, list(vocabulary)


def _window(one: Window, token: Callable[[str], int]) -> dict[str, Any]:
    """A window without its zeros: ``active`` holds places and activations in turn; ``masked``, ``foreign`` places."""
    active = [(at, _float32(value)) for at, value in enumerate(one.activations) if value]
    places = {
        "masked": [at for at, value in enumerate(one.activations) if value is None],
        "foreign": [at for at, flag in enumerate(one.foreign) if flag],
    }
    out: dict[str, Any] = {
        "tokens": [token(text) for text in one.tokens],
        "active": [number for pair in active for number in pair],
        "peak": one.peak,
        "source": one.source,
        **{name: found for name, found in places.items() if found},
    }
    if one.strongest is not None:
        back, text, adds = one.strongest
        out["looked"] = [_float32(value) for value in one.looked]
        out["strongest"] = [back, token(text), _float32(adds)]
    return out


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
