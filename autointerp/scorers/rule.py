"""Rule: how well does an executable explanation foretell every token? At the tokens' own rarity, no judge between."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from saekit.autointerp import stats
from saekit.autointerp.explanation import Rule as Executable
from saekit.autointerp.explanation import Score
from saekit.autointerp.negatives import silent
from saekit.autointerp.prompts import Reader
from saekit.autointerp.scorers.binary import FEWEST
from saekit.autointerp.windows import Examples, Windows

FIRING, SILENT = 4, 8  # windows of each kind, times what detection shows


@dataclass(frozen=True)
class Natural:
    """Windows of a side, firing and silent ones; ``weights`` [n] say for how many windows of the text each stands."""

    examples: Examples
    weights: Float[ndarray, " n"]

    @property
    def truth(self) -> Bool[ndarray, "n width"]:
        """On which tokens the feature fires."""
        return self.examples.values > 0


class Rule:
    """F1 over tokens, precision by how rare the feature is in the text."""

    name, metric, by = "rule", "F1", "rule"

    def trials(self, windows: Windows, feature: int, side: str, n: int, seed: int) -> "Natural | None":
        """Four times ``n`` firing windows and eight times as many silent ones; None where the feature fires too rarely."""
        on = windows.firing(feature, side, FIRING * n, "random", seed)
        off = silent(windows, feature, side, SILENT * n, ("random",), seed)
        if len(on) < FEWEST:
            return None
        own = np.isin(windows.peaks(feature)[0], windows.of_side(side)).sum()
        weights = [
            np.full(len(on), own / len(on)),
            np.full(len(off), (len(windows.of_side(side)) - own) / max(1, len(off))),
        ]
        return Natural(Examples.beside([on, off]), np.concatenate(weights))

    def execute(self, trials: Natural, rule: Executable) -> Float[ndarray, "n width"]:
        """The chances of all tokens."""
        return np.asarray(rule.strength(trials.examples.tokens), np.float64)

    def measure(self, trials: Natural, guesses: Float[ndarray, "n width"], seed: int) -> Score:
        """F1 with its interval over windows, at the share of them in which it fires here; ``strata`` are its precision and recall."""
        said, truth, fires = guesses > 0, trials.truth, trials.examples.fires
        each = np.stack([(said & truth).sum(1), said.sum(1), truth.sum(1)]).astype(np.float64)
        hits, n_said, n_true = (each * trials.weights).sum(1)
        found = float(2 * hits / max(n_said + n_true, 1e-30))
        own_hits, own_said, own_true = each[:, fires]
        ratio = float(trials.weights[~fires].sum() / trials.weights[fires].sum())
        low, high = stats.f1_interval(own_hits, own_said - own_hits, own_true, each[1, ~fires], ratio)
        strata = {"precision": float(hits / max(n_said, 1e-30)), "recall": float(hits / max(n_true, 1e-30))}
        return Score(self.name, self.metric, found, low, high, len(truth), found, strata=strata)

    def blind(self, learnt: "Natural | None", trials: Natural, reader: Reader) -> dict[str, float | None]:
        """A rule that says yes to every token."""
        return {"always": self.measure(trials, np.ones(trials.truth.shape), 0).value}
