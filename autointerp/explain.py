"""Features in words, and how well the words foretell them: from a dictionary, its model and a text to scored explanations."""

import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saekit.autointerp import llm
from saekit.autointerp.explanation import Explanation, feature_numbers, save
from saekit.autointerp.firings import Firings, record
from saekit.autointerp.neurons import directions_of, logits_of
from saekit.autointerp.prompts import Reader, reader_of
from saekit.autointerp.scorers import SCORERS
from saekit.autointerp.scorers.binary import FEWEST as FEWEST_SHOWN
from saekit.autointerp.scoring import SHUFFLED, Judge, N, Summary, score, summaries
from saekit.autointerp.statistics import Statistics
from saekit.autointerp.windows import SIDES, WIDTH, Windows
from saekit.dictionaries import Dictionary
from saekit.hub import dictionary_of
from saekit.hub.native import origin
from saekit.models import Model, load_model
from saekit.registry import Registry, nearest
from saekit.types import SaekitError

FEWEST = (
    10  # windows in which a feature fires, on each side: below that there is nothing to explain and to score
)
WON = (
    0.05  # by which a blind judge beats chance, from which a score can be won without reading the explanation
)
CHANCE = {
    "detection": 0.5,
    "fuzzing": 0.5,
    "embedding": 0.5,
    "surprisal": 0.5,
    "intruder": 1 / 5,
    "intervention": 1 / 3,
    "simulation": 0.0,
}
SHOWN = 10  # tokens that a feature promotes, and suppresses
DEFAULT = ("rule", "detection", "fuzzing")
# a function of (windows, features, reader, judge, seed, promoted, draw) -> (explanations, failures by kind)
EXPLAINERS = Registry(
    "explainer",
    {
        "statistics": "saekit.autointerp.explain:by_statistics",
        "llm": "saekit.autointerp.explain:by_llm",
        "contrastive": "saekit.autointerp.explain:by_contrast",
    },
)
Draw = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Explanations(Sequence[Explanation]):
    """Explanations of a dictionary's features; a list of them, with what is known of how they were made."""

    listed: tuple[Explanation, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, at: Any) -> Any:
        return self.listed[at]

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.listed)

    def of(self, feature: int) -> Explanation:
        """The explanation of one feature."""
        found = next((one for one in self.listed if one.feature == feature), None)
        if found is None:
            raise SaekitError(
                f"feature {feature} has no explanation here; explain it, or choose one that has"
            )
        return found

    def summaries(self) -> list[Summary]:
        """Each scorer over all features."""
        return summaries(self.listed)

    def save(self, path: "str | Path") -> Path:
        """Write them to a file, or to ``explanations.json`` of a folder."""
        return save(self.listed, path, self.about)

    def __repr__(self) -> str:
        lines = [f"{len(self)} explanations by {self.about.get('method', 'several methods')}"]
        if failures := self.about.get("failures"):
            lines.append(f"  not explained: {_counts(failures)}")
        if rare := self.about.get("left_out"):
            lines.append(
                f"  left out: {', '.join(map(str, rare))}, firing in fewer than {FEWEST} windows on a side; read more tokens"
            )
        lines += [f"  {said(one)}" for one in self.summaries()]
        if judge := self.about.get("judge"):
            n = judge["prompt_tokens"] + judge["completion_tokens"]
            lines.append(
                f"  {judge['name']}: {judge['questions']:,} questions, {n:,} tokens, {n / max(1, len(self)):,.0f} a feature"
            )
        return "\n".join(lines)


def said(summary: Summary) -> str:
    """A summary in a line."""
    if summary.value is None:
        return f"{summary.scorer}: nothing scored ({_counts(summary.failures)})"
    interval = (
        f" ({summary.low:.3f} to {summary.high:.3f})" if summary.low is not None and summary.n > 1 else ""
    )
    controls = ", ".join(f"{name} {value:.3f}" for name, value in summary.controls.items())
    parts = [f"{summary.scorer}: {summary.metric} {summary.value:.3f}{interval} over {summary.n} features"]
    parts += (
        [f"{summary.corrected:.3f} without the judge's own errors"] if summary.corrected is not None else []
    )
    parts += [f"blind: {controls}"] if controls else []
    # "shuffled" reads an explanation, of another feature that may fire in the same texts
    bar = CHANCE.get(summary.scorer, 1.0) + WON
    won = [name for name, value in summary.controls.items() if name != SHUFFLED and value > bar]
    parts += [f"can be won without the explanation, by {' and '.join(won)}"] if won else []
    if summary.failures:
        parts.append(
            f"failed: {_counts(summary.failures)}"
            + (
                f"; {summary.wrong:.3f} if they count as wrong"
                if summary.wrong not in (None, summary.value)
                else ""
            )
        )
    return "; ".join(parts)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "none"


def explain(
    dictionary: "Dictionary | str | Path",
    model: Any = None,
    text: Any = None,
    features: "Iterable[Any] | int | None" = None,
    *,
    method: str = "statistics",
    given: "Iterable[Explanation] | None" = None,
    judge: "Judge | None" = None,
    scorers: "Iterable[Any]" = DEFAULT,
    tokens: int | None = 200_000,
    n: int = N,
    width: int = WIDTH,
    controls: bool = True,
    firings: "Firings | str | Path | None" = None,
    seed: int = 0,
    draw: "Draw | None" = None,
) -> Explanations:
    """Explain features of a dictionary from ``tokens`` tokens of a text, and score what was said on documents left out.

    ``features``: numbers, or how many (spread over the densities; None: all that fire often enough). ``method``:
    "statistics" counts, without a language model; "llm" and "contrastive" ask the ``judge``. ``given``: explanations that
    there are (a person's, another tool's), to be scored and not made. ``scorers``: names or
    scorers; without a judge, those that would ask one execute the explanations' rules. ``n``: firing windows of ``width``
    tokens that each scorer shows of a feature, and as many silent ones. ``firings``: a folder to keep (or find) the
    recorded firings in. ``draw`` is told (what, done, of how many).
    """
    scorers = list(scorers)
    for scorer in scorers:
        if isinstance(scorer, str) and scorer not in SCORERS:
            raise SaekitError(f"scorer {scorer!r} is unknown{nearest(scorer, list(SCORERS))}")
        if not isinstance(scorer, str) and not hasattr(scorer, "trials"):
            raise SaekitError(f"scorer {scorer!r} is none; give a name of {', '.join(SCORERS)}, or a scorer")
    for name, value, least in (("n", n, FEWEST_SHOWN), ("width", width, 2), ("seed", seed, 0)):
        if not isinstance(value, numbers.Integral) or value < least:
            raise SaekitError(f"{name} = {value!r} must be a whole number from {least}")
    n, width, seed = int(n), int(width), int(seed)  # NumPy's can't be kept in a file
    tokens = int(tokens) if isinstance(tokens, numbers.Integral) else tokens
    if given is not None:
        given = list(given)
        if features is not None or not given or not all(isinstance(one, Explanation) for one in given):
            raise SaekitError(
                "given are explanations of their own features; give some, and leave features out"
            )
        method, features = "given", list(dict.fromkeys(one.feature for one in given))
    elif method not in EXPLAINERS:
        raise SaekitError(f"method {method!r} is unknown{nearest(method, list(EXPLAINERS))}")
    elif method != "statistics" and judge is None:
        raise SaekitError(
            f"method {method!r} asks a language model; give judge= (--endpoint), or choose 'statistics'"
        )
    d = dictionary_of(dictionary)
    features = _checked(features, d.n_features)
    own_model, own_text = origin(d.card)
    view = load_model(model if model is not None else own_model)
    if text is None and own_text is None:
        raise SaekitError("the dictionary was trained on text given in Python; give a text")
    reader = reader_of(view)
    tell = draw or (lambda *_: None)
    if isinstance(firings, Firings) and (
        firings.n_features != d.n_features or firings.about.get("dictionary", d.digest()) != d.digest()
    ):
        raise SaekitError("firings are of another dictionary; record this one's, or leave firings out")
    found = firings if isinstance(firings, Firings) else record(view, d, own_text if text is None else text, firings, tokens, on_batch=lambda a, b: tell("record", a, b))  # fmt: skip
    windows = Windows(found, width, seed, reader.texts)
    chosen, rare = _chosen(windows, features)
    if given is not None:
        made, failures = [one for one in given if one.feature in set(chosen)], {}
    else:
        made, failures = EXPLAINERS[method](
            windows, chosen, reader, judge, seed, lambda f: promoted(d, view, reader, f), tell
        )
    scored = score(made, windows, reader, [_made(s, view, d) for s in scorers], judge, n, controls, seed, on_feature=lambda a, b: tell("score", a, b))  # fmt: skip
    about = {
        "method": method, "tokens": found.n_tokens, "windows": len(windows), "width": width, "n": n, "seed": seed, "too_rare": len(rare), "left_out": [] if features is None or isinstance(features, int) else rare,
        "failures": failures, "firings": {k: v for k, v in found.about.items() if k != "model"}, "model": view.name, "dictionary": d.digest(),
        **({"judge": {"name": judge.endpoint.name, **judge.used}} if judge is not None else {}),
    }  # fmt: skip
    return Explanations(tuple(scored), about)


def _made(scorer: Any, model: Model, d: Dictionary) -> Any:
    """A scorer by its name, with what it needs."""
    if not isinstance(scorer, str):
        return scorer
    return SCORERS[scorer](model, d) if scorer == "intervention" else SCORERS[scorer]()


def _checked(features: "Iterable[Any] | int | None", n_features: int) -> "list[int] | int | None":
    """The features asked for, or how many, as ints."""
    if features is None:
        return None
    if isinstance(features, numbers.Integral):
        if features < 1:
            raise SaekitError(f"features = {features} must be numbers of features, or how many from 1")
        return int(features)
    listed = feature_numbers(features, n_features)
    if not listed or len(set(listed)) < len(listed):
        raise SaekitError("features are empty, or some are listed twice; give each once")
    return listed


def _chosen(windows: Windows, features: "Sequence[int] | int | None") -> tuple[list[int], list[int]]:
    """The features that are explained, and those that were asked for and fire too rarely."""
    asked = range(windows.firings.n_features) if features is None or isinstance(features, int) else features
    often = [f for f in asked if _often(windows, f)]
    if not often:
        raise SaekitError(
            f"none of the features fires in {FEWEST} windows on each side of the text, which has {len(np.unique(windows.documents))} documents; give more tokens, or other features"
        )
    rare = sorted(set(asked) - set(often))
    if isinstance(features, int) and features < len(often):
        by_density = sorted(often, key=lambda f: (windows.firings.counts[f], f))
        often = sorted(by_density[i] for i in np.linspace(0, len(often) - 1, features).round().astype(int))
    return often, rare


def _often(windows: Windows, feature: int) -> bool:
    found, _ = windows.peaks(feature)
    return bool((np.bincount(windows.side[found], minlength=len(SIDES)) >= FEWEST).all())


Promoted = Callable[[int], "tuple[list[str], list[str]] | None"]


def promoted(
    d: Dictionary, model: Model, reader: Reader, feature: int
) -> "tuple[list[str], list[str]] | None":
    """Tokens whose logits a feature raises and lowers the most, directly; None where it writes no one direction in the stream."""
    written = directions_of(d, [feature])
    way = None if written is None else logits_of(model, written)
    if way is None:
        return None
    order = way.effects(way.directions)[0].argsort(descending=True, stable=True).tolist()
    known = [t for t in order if t < reader.n_tokens]
    return [reader.texts[t] for t in known[:SHOWN]], [reader.texts[t] for t in known[::-1][:SHOWN]]


Made = tuple[list[Explanation], dict[str, int]]


def by_statistics(windows: Windows, features: Sequence[int], reader: Reader, judge: Any, seed: int, promoted: Promoted, draw: Draw) -> Made:  # fmt: skip
    """Counts, and the simplest rule that holds."""
    statistics, out = Statistics(windows, reader.texts), []
    for i, feature in enumerate(features):
        out.append(statistics.explain(feature, promoted(feature)))
        draw("explain", i + 1, len(features))
    return out, {}


def by_llm(windows: Windows, features: Sequence[int], reader: Reader, judge: Any, seed: int, promoted: Promoted, draw: Draw) -> Made:  # fmt: skip
    """A language model, from texts in which a feature fires."""
    return llm.explain(windows, features, reader, judge, seed)


def by_contrast(windows: Windows, features: Sequence[int], reader: Reader, judge: Any, seed: int, promoted: Promoted, draw: Draw) -> Made:  # fmt: skip
    """A language model, from texts in which a feature fires and texts in which it doesn't."""
    return llm.explain(windows, features, reader, judge, seed, contrastive=True)
