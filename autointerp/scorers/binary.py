"""What detection, fuzzing, surprisal and embedding share: examples that are true or false, and guesses of which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from saekit.autointerp import stats
from saekit.autointerp.explanation import Score
from saekit.autointerp.negatives import silent
from saekit.autointerp.windows import Examples, Windows

BATCH = 8  # examples of a prompt
FEWEST = 5  # examples of a kind that say anything
STRONG = 0.3  # of a window's largest value: what is marked
SPARE = 10  # times as many silent windows as are shown are chosen from
REACH = 8  # places by which marks are moved


Sizes = Int64[ndarray, " token"]  # characters of each token


@dataclass(frozen=True)
class Binary:
    """Examples in the order in which they are shown; ``marks`` [n, width] are all False where nothing is marked."""

    examples: Examples
    marks: Bool[ndarray, "n width"]

    @property
    def truth(self) -> Bool[ndarray, " n"]:
        """Whether the feature fires in each."""
        return self.examples.fires

    def batches(self) -> list[Int64[ndarray, " batch"]]:
        """Numbers of the examples of each prompt."""
        n = len(self.examples)
        return np.array_split(np.arange(n), max(1, -(-n // BATCH))) if n else []


def drawn(windows: Windows, feature: int, side: str, n: int, seed: int, marked: bool) -> "Binary | None":
    """Firing windows by strength and as many silent ones, mixed; None where the feature fires too rarely on the side.

    ``marked``: where the feature fires strongly is marked, and each silent window has the marks of a firing one, so that
    neither the number of marks nor their places tell them apart. Silent windows are as long as firing ones.
    """
    on = windows.firing(feature, side, n, "quantiles", seed)
    off = alike(windows, on, silent(windows, feature, side, SPARE * len(on), seed=seed))
    if min(len(on), len(off)) < FEWEST:
        return None
    rng = np.random.default_rng([windows.seed, seed, feature, 5])
    marks = np.zeros((len(on) + len(off), windows.width), bool)
    if marked:
        strong = (on.values > 0) & (on.values >= STRONG * on.values.max(1, keepdims=True))
        marks = np.concatenate(
            [
                strong,
                moved(
                    windows.opens, on.tokens, strong, off.tokens, rng.permutation(len(on))[: len(off)], rng
                ),
            ]
        )
    both = Examples.beside([on, off])
    order = rng.permutation(len(both))
    return Binary(both.only(order), marks[order])


def alike(windows: Windows, on: Examples, off: Examples) -> Examples:
    """Of silent windows one for each firing one, in their order: as near in length as can be, as many of each kind as there are."""
    from scipy.optimize import linear_sum_assignment

    kinds = np.array(off.kinds)
    aims, sizes = windows.lengths(on.windows), windows.lengths(off.windows)
    names = sorted(
        set(off.kinds), key=lambda kind: (kind == "random", kind)
    )  # random ones make up for the rest
    left, chosen = np.random.default_rng([windows.seed, 9]).permutation(len(on)), np.full(len(on), -1)
    for i, kind in enumerate(names):
        own = np.flatnonzero(kinds == kind)
        some = left[: len(left) if kind == "random" else -(-len(left) // (len(names) - i))]
        rows, columns = linear_sum_assignment(np.abs(aims[some, None] - sizes[own]))
        chosen[some[rows]] = own[columns]
        left = left[~np.isin(left, some[rows])]
    return off.only(chosen[chosen >= 0])


def moved(
    opens: Bool[ndarray, " token"], tokens: Int64[ndarray, "on width"], marks: Bool[ndarray, "on width"],
    silent_tokens: Int64[ndarray, "off width"], of: Int64[ndarray, " off"], rng: np.random.Generator,
) -> Bool[ndarray, "off width"]:  # fmt: skip
    """Marks of firing windows (``of`` says whose) for silent ones: moved, if need be, by the fewest places that make them look alike.

    Alike are as many marked pieces, as many of them at a word's beginning, and at a word's end.
    """
    out = np.zeros(silent_tokens.shape, bool)
    steps = np.array(sorted(range(-REACH, REACH + 1), key=abs))
    for line, own, i in zip(out, silent_tokens, of, strict=True):
        place = np.flatnonzero(marks[i])[None] + int(rng.choice((-1, 1))) * steps[:, None]
        place = place[(place[:, 0] >= 0) & (place[:, -1] < len(own))]
        here = np.zeros((len(place), len(own)), bool)
        np.put_along_axis(here, place, True, 1)
        off = np.abs(_looks(opens[own], here) - _looks(opens[tokens[i]], marks[i][None])).sum(1)
        line[:] = here[off.argmin()]  # of several the one that is moved the least
    return out


def _looks(begins: Bool[ndarray, " width"], marks: Bool[ndarray, "way width"]) -> Int64[ndarray, "way 3"]:
    """Marked pieces, those that begin a word, and those that end one."""
    ends = np.ones_like(begins)
    ends[:-1] = begins[1:]
    first, last = marks.copy(), marks.copy()
    first[:, 1:] &= begins[1:] | ~marks[:, :-1]
    last[:, :-1] &= ends[:-1] | ~marks[:, 1:]
    return np.stack([first.sum(1), (first & begins).sum(1), (last & ends).sum(1)], 1)


@cache
def answers_schema() -> type:
    """The reply to a prompt: for each example whether, and how likely, it is true."""
    from pydantic import BaseModel, ConfigDict, Field

    class Verdict(BaseModel):
        model_config = ConfigDict(extra="forbid")
        id: int
        fires: bool
        p: float = Field(ge=0, le=1)

    class Answers(BaseModel):
        model_config = ConfigDict(extra="forbid")
        answers: list[Verdict]

    return Answers


def judged(strength: Float[ndarray, "n width"]) -> Float[ndarray, "n width"]:
    """A rule's chances as verdicts: at least 0.5 where it says that the feature fires, else 0."""
    return np.where(strength > 0, 0.5 + np.asarray(strength, np.float64) / 2, 0.0)


def complete(n: int) -> Callable[[Any], str | None]:
    """A check that a reply has one answer for each of n examples."""

    def check(value: Any) -> str | None:
        ids = sorted(one.id for one in value.answers)
        return None if ids == list(range(1, n + 1)) else f"answers must have each id from 1 to {n} once"

    return check


def read(trials: Binary, values: Sequence[Any]) -> Float[ndarray, " n"]:
    """Chances that examples are true, of the answers; at least 0.5 where the verdict is that it is."""
    out = np.full(len(trials.examples), np.nan)
    for batch, value in zip(trials.batches(), values, strict=True):
        for one in () if value is None else value.answers:
            out[batch[one.id - 1]] = max(one.p, 0.5) if one.fires else min(one.p, 0.5 - 1e-6)
    return out


def measure(
    name: str, metric: str, trials: Binary, guesses: Float[ndarray, " n"], shares: Mapping[str, float] | None = None
) -> Score:  # fmt: skip
    """Balanced accuracy (from guesses of at least 0.5), or AUC, with its interval, and the shares judged rightly by kind."""
    known, truth = np.isfinite(guesses), trials.truth
    at, judged = guesses[known], guesses[known] >= 0.5
    area = stats.auc(truth[known], at)
    if metric == "AUC":
        value, interval = area, stats.auc_interval
        ends = None if value is None else interval(truth[known], at)
        wrong = stats.auc(truth, np.where(known, guesses, np.where(truth, -np.inf, np.inf)))
    else:
        value = stats.balanced_accuracy(truth[known], judged)
        ends = None if value is None else stats.balanced_interval(truth[known], judged)
        wrong = stats.balanced_accuracy(truth, np.where(known, np.nan_to_num(guesses) >= 0.5, ~truth))
    low, high = ends or (None, None)
    constant = (
        ("constant judge: every example was judged alike",)
        if len(at) and judged.min() == judged.max()
        else ()
    )
    strata = dict(shares or {}) if metric == "AUC" else by_kind(trials, guesses)
    return Score(name, metric, value, low, high, int(known.sum()), wrong, strata=strata, auc=area, notes=(*constant, *missed(trials, guesses)) if metric != "AUC" else ())  # fmt: skip


def by_kind(trials: Binary, guesses: Float[ndarray, " n"]) -> dict[str, float]:
    """Of each kind of example, the share judged rightly."""
    known = np.isfinite(guesses)
    right = (guesses >= 0.5) == trials.truth
    kinds = np.array(trials.examples.kinds)
    return {k: float(right[known & (kinds == k)].mean()) for k in dict.fromkeys(kinds.tolist()) if (known & (kinds == k)).any()}  # fmt: skip


def missed(trials: Binary, guesses: Float[ndarray, " n"]) -> tuple[str, ...]:
    """A note where firings at some tokens are always found and at others never: the feature may be of two things."""
    on = trials.truth & np.isfinite(guesses)
    peak = trials.examples.tokens[np.arange(len(on)), trials.examples.values.argmax(1)][on]
    found = guesses[on] >= 0.5
    if not len(found) or not 0.15 < found.mean() < 0.85:
        return ()
    group = np.unique(peak, return_inverse=True)[1]
    share, size = np.bincount(group, found) / np.bincount(group), np.bincount(group)
    clear = (share == 0) | (share == 1)
    # by chance few tokens that peak twice or more would be all found or all missed
    several = size >= 2
    if not several.any() or size[clear & several].sum() < 0.8 * size[several].sum():
        return ()
    return (f"two things: all firings at {int((share == 1).sum())} of its tokens are found, and none at {int((share == 0).sum())} others",)  # fmt: skip


HEURISTICS: dict[str, Callable[[Binary, Sizes], Float[ndarray, " n"]]] = {
    "position of marks": lambda t, sizes: _first(t.marks),
    "number of marks": lambda t, sizes: t.marks.sum(1).astype(float),
    "recurrence of marked tokens": lambda t, sizes: _recurring(t),
    "length of text": lambda t, sizes: sizes[t.examples.tokens].sum(1).astype(float),
}


def _recurring(trials: Binary) -> Float[ndarray, " n"]:
    """In how many other examples of its prompt a token is marked that is marked in each: firing ones are of few words."""
    out = np.zeros(len(trials.examples))
    for batch in trials.batches():
        marked = [set(trials.examples.tokens[i][trials.marks[i]].tolist()) for i in batch]
        for i, own in zip(batch, marked, strict=True):
            out[i] = sum(bool(own & other) for other in marked) - 1
    return out


def _first(marks: Bool[ndarray, "n width"]) -> Float[ndarray, " n"]:
    return np.where(marks.any(1), marks.argmax(1), marks.shape[1]).astype(float)


def blind(
    learnt: "Binary | None", trials: Binary, sizes: Int64[ndarray, " token"], auc: bool = False
) -> dict[str, float | None]:
    """Judges that look at marks' places or number or at lengths: a threshold learnt on the other side, tried on this one.

    ``sizes`` are the characters of each token.
    """
    out: dict[str, float | None] = {}
    for name, look in HEURISTICS.items():
        if "marks" in name and not trials.marks.any():
            continue
        if learnt is None:
            out[name] = None
            continue
        seen, here = look(learnt, sizes), look(trials, sizes)
        sign = 1.0 if (stats.auc(learnt.truth, seen) or 0.5) >= 0.5 else -1.0
        if auc:
            out[name] = stats.auc(trials.truth, sign * here)
            continue
        cuts = np.unique(sign * seen)
        best = max(cuts, key=lambda cut: stats.balanced_accuracy(learnt.truth, sign * seen >= cut) or 0.5)
        out[name] = stats.balanced_accuracy(trials.truth, sign * here >= best)
    return out
