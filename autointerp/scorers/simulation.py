"""Simulation: how active is the feature on each token? (Bills et al. 2023)

The score is one correlation over all tokens shown, of firing and of silent windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saekit.autointerp import prompts, stats
from saekit.autointerp.explanation import Rule, Score
from saekit.autointerp.negatives import silent
from saekit.autointerp.prompts import Reader
from saekit.autointerp.requests import Request
from saekit.autointerp.scorers.binary import FEWEST
from saekit.autointerp.windows import Examples, Windows

LEVELS = 10
SHARE = 4  # one window is asked about for as many that detection shows: each is a prompt
SYSTEM = (
    f"{prompts.TASK} You are shown a text and its tokens, one a line with its number. Say for every token how active the "
    'feature is, from 0 (not at all) to 10. Answer with JSON: {"activations": [{"id": 0, "value": 0}, ...]}, one entry '
    "for each token in order."
)


@dataclass(frozen=True)
class Simulated:
    """Windows whose every token is asked about; ``truth`` [n, width] are strengths in tenths of the largest, rounded up."""

    examples: Examples

    @property
    def truth(self) -> Float[ndarray, "n width"]:
        """What is to be guessed, 0 to 10."""
        values = self.examples.values.astype(np.float64)
        return np.ceil(LEVELS * values / max(values.max(initial=0), 1e-30))


@cache
def _schema() -> type:
    from pydantic import BaseModel, ConfigDict, Field

    class Level(BaseModel):
        model_config = ConfigDict(extra="forbid")
        id: int
        value: float = Field(ge=0, le=LEVELS)

    class Levels(BaseModel):
        model_config = ConfigDict(extra="forbid")
        activations: list[Level]

    return Levels


def _complete(width: int) -> Any:
    def check(value: Any) -> str | None:
        ids = sorted(one.id for one in value.activations)
        return (
            None if ids == list(range(width)) else f"activations must have each id from 0 to {width - 1} once"
        )

    return check


class Simulation:
    """Pearson's correlation of strengths with what the explanation makes a judge expect; 0 is chance."""

    name, metric, by = "simulation", "correlation", "judge"

    def trials(self, windows: Windows, feature: int, side: str, n: int, seed: int) -> "Simulated | None":
        """A quarter of ``n`` firing and as many silent windows (at least five); None where there are too few."""
        n = max(FEWEST, n // SHARE)
        on = windows.firing(feature, side, n, "quantiles", seed)
        off = silent(windows, feature, side, len(on), seed=seed)
        return Simulated(Examples.beside([on, off])) if min(len(on), len(off)) >= FEWEST else None

    def requests(self, trials: Simulated, text: str, unit: str, reader: Reader) -> list[Request]:
        """One prompt for each window."""
        out = []
        for i, tokens in enumerate(trials.examples.tokens, 1):
            words = [prompts.shown(reader.texts[t]) for t in tokens]
            listed = "Tokens:\n" + "\n".join(f"{at}\t{word}" for at, word in enumerate(words))
            parts = (prompts.explained(text), prompts.numbered([reader.line(tokens)]), listed)
            out.append(Request(
                f"{unit} {self.name} {i}", prompts.chat(SYSTEM, *parts), _schema(), max_tokens=64 + 16 * len(tokens),
                check=_complete(len(tokens)),
            ))  # fmt: skip
        return out

    def read(self, trials: Simulated, values: Sequence[Any]) -> Float[ndarray, "n width"]:
        """Strengths by the answers; NaN throughout a window whose answer failed."""
        out = np.full(trials.examples.values.shape, np.nan)
        for line, value in zip(out, values, strict=True):
            for one in () if value is None else value.activations:
                line[one.id] = one.value
        return out

    def execute(self, trials: Simulated, rule: Rule) -> Float[ndarray, "n width"]:
        """Chances that tokens fire, in tenths."""
        return LEVELS * np.asarray(rule.strength(trials.examples.tokens), np.float64)

    def measure(self, trials: Simulated, guesses: Float[ndarray, "n width"], seed: int) -> Score:
        """The correlation over all tokens; a guess without variation scores 0."""
        truth, known = trials.truth, np.isfinite(guesses).all(1)
        found, ends = None, None
        if known.sum() >= 2 * FEWEST:
            own, said = truth[known], guesses[known]
            found = stats.pearson(own.reshape(-1), said.reshape(-1)) or 0.0
            ends = stats.correlation_interval(own, said, own.any(1))
        low, high = ends or (None, None)
        wrong = (
            stats.pearson(truth.reshape(-1), np.where(known[:, None], guesses, LEVELS - truth).reshape(-1))
            or 0.0
        )
        still = known.any() and np.ptp(guesses[known]) == 0
        notes = ("constant judge: every token was judged alike",) if still else ()
        return Score(self.name, self.metric, found, low, high, int(known.sum()), wrong, notes=notes)

    def blind(self, learnt: "Simulated | None", trials: Simulated, reader: Reader) -> dict[str, float | None]:
        """The mean strength by position in the window, and by the token's length, learnt on the other side."""
        if learnt is None:
            return {"position": None, "length of token": None}
        sizes = np.array([min(len(text.strip()), 15) for text in reader.texts])
        out: dict[str, float | None] = {"position": stats.pearson(trials.truth.reshape(-1), np.tile(learnt.truth.mean(0), len(trials.truth)))}  # fmt: skip
        seen, here = sizes[learnt.examples.tokens], sizes[trials.examples.tokens]
        mean = np.bincount(seen.reshape(-1), learnt.truth.reshape(-1), 16) / np.maximum(np.bincount(seen.reshape(-1), minlength=16), 1)  # fmt: skip
        out["length of token"] = stats.pearson(trials.truth.reshape(-1), mean[here].reshape(-1))
        return {name: value or 0.0 for name, value in out.items()}
