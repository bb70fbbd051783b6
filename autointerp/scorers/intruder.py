"""Intruder: which of five texts is the one in which the feature doesn't fire? (Paulo and Belrose 2025)

Without an explanation, as its blind control is, it says how alike the texts look in which the feature fires.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from saekit.autointerp import prompts, stats
from saekit.autointerp.explanation import Rule, Score
from saekit.autointerp.negatives import silent
from saekit.autointerp.prompts import Reader
from saekit.autointerp.requests import Request
from saekit.autointerp.scorers.binary import SPARE, STRONG, alike, moved
from saekit.autointerp.windows import Examples, Windows

GROUP = 5  # texts of a question; chance is one in five
SYSTEM = (
    f"{prompts.TASK} In each example some words are marked with « and ». In all but one the feature is active on the "
    'marked words. Find the one that doesn\'t belong. Answer with JSON: {"intruder": 3}, its number.'
)


@dataclass(frozen=True)
class Intruders:
    """Questions of five windows each: ``groups`` [question, 5] are numbers of examples, ``truth`` the place of the silent one."""

    examples: Examples
    marks: Bool[ndarray, "n width"]
    groups: Int64[ndarray, "question 5"]
    truth: Int64[ndarray, " question"]


@cache
def _schema() -> type:
    from pydantic import BaseModel, ConfigDict, Field

    class Found(BaseModel):
        model_config = ConfigDict(extra="forbid")
        intruder: int = Field(ge=1, le=GROUP)

    return Found


class Intruder:
    """Share of questions in which the silent text is found; one in five is chance."""

    name, metric, by = "intruder", "accuracy", "judge"

    def trials(self, windows: Windows, feature: int, side: str, n: int, seed: int) -> "Intruders | None":
        """Up to half of ``n`` questions, no window in two of them.

        The four firing windows of each are near in strength; the silent one is as long as a fifth, and has its marks.
        """
        on = windows.firing(feature, side, GROUP * n, "quantiles", seed)
        count = min(n // 2, len(on) // GROUP)
        if not count:
            return None
        rng = np.random.default_rng([windows.seed, seed, feature, 6])
        # firing windows stand by strength, so those of one question are neighbours
        chosen = np.sort(rng.permutation(len(on) // GROUP)[:count])
        parts = np.stack([rng.permutation(np.arange(GROUP) + GROUP * c) for c in chosen])
        fifths = on.only(parts[:, 0])
        off = alike(windows, fifths, silent(windows, feature, side, SPARE * count, seed=seed))
        if len(off) < count:
            return None
        strong = (on.values > 0) & (on.values >= STRONG * on.values.max(1, keepdims=True))
        marks = moved(windows.opens, fifths.tokens, strong[parts[:, 0]], off.tokens, np.arange(count), rng)
        truth = rng.integers(0, GROUP, count)
        groups = np.stack(
            [
                np.insert(part[1:], place, len(on) + q)
                for q, (part, place) in enumerate(zip(parts, truth, strict=True))
            ]
        )
        return Intruders(Examples.beside([on, off]), np.concatenate([strong, marks]), groups, truth)

    def requests(self, trials: Intruders, text: str, unit: str, reader: Reader) -> list[Request]:
        """One prompt for each question."""
        pairs = zip(trials.examples.tokens, trials.marks, strict=True)
        lines = [reader.line(tokens, marks) for tokens, marks in pairs]
        return [
            Request(
                f"{unit} {self.name} {i}",
                prompts.chat(SYSTEM, prompts.explained(text), prompts.numbered([lines[at] for at in group])),
                _schema(), max_tokens=64,
            )
            for i, group in enumerate(trials.groups, 1)
        ]  # fmt: skip

    def read(self, trials: Intruders, values: Sequence[Any]) -> Float[ndarray, " question"]:
        """Places by the answers, from 0."""
        return np.array([np.nan if value is None else value.intruder - 1.0 for value in values])

    def execute(self, trials: Intruders, rule: Rule) -> Float[ndarray, " question"]:
        """The text whose marked tokens have the least chance; of several the first."""
        strength = np.asarray(rule.strength(trials.examples.tokens), np.float64)
        least = np.where(trials.marks, strength, 1.0).min(1)
        return least[trials.groups].argmin(1).astype(float)

    def measure(self, trials: Intruders, guesses: Float[ndarray, " question"], seed: int) -> Score:
        """The share found, with Wilson's interval."""
        known = np.isfinite(guesses)
        right = guesses == trials.truth
        n = int(known.sum())
        low, high = stats.wilson(float(right[known].sum()), n) if n else (None, None)
        still = n > 1 and np.ptp(guesses[known]) == 0
        notes = ("constant judge: the same place in every question",) if still else ()
        return Score(self.name, self.metric, float(right[known].mean()) if n else None, low, high, n, float(right.mean()), notes=notes)  # fmt: skip

    def blind(self, learnt: "Intruders | None", trials: Intruders, reader: Reader) -> dict[str, float | None]:
        """The text that is the shortest or the longest, and the one whose count of marked words is the odd one."""
        pairs = zip(trials.examples.tokens, trials.marks, strict=True)
        lines = [reader.line(tokens, marks) for tokens, marks in pairs]
        sizes = np.array([len(line) for line in lines])[trials.groups]
        counts = np.array([line.count("«") for line in lines])[trials.groups]
        odd = np.abs(counts - np.median(counts, axis=1, keepdims=True)).argmax(1)
        guesses = {"shortest text": sizes.argmin(1), "longest text": sizes.argmax(1), "number of marks": odd}
        return {name: float((guess == trials.truth).mean()) for name, guess in guesses.items()}
