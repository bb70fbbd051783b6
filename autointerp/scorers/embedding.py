"""Embedding: are the texts in which the feature fires nearer to the explanation than silent ones? (Paulo et al. 2024)"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saekit.autointerp.explanation import Rule, Score
from saekit.autointerp.prompts import Reader
from saekit.autointerp.scorers import binary
from saekit.autointerp.scorers.binary import Binary
from saekit.autointerp.windows import Windows

Embed = Callable[[Sequence[str]], Float[ndarray, "text d"]]
NGRAMS, FEATURES = (3, 5), 2**18  # characters of lexical embeddings, and their dimensions


def lexical(texts: Sequence[str]) -> Any:
    """Texts as counts of their character n-grams, of length 1: needs no weights, and no network."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(analyzer="char_wb", ngram_range=NGRAMS, n_features=FEATURES, alternate_sign=False).transform(texts)  # fmt: skip


class Embedding:
    """AUC of the cosine between text and explanation; 0.5 is chance.

    ``embed`` makes rows of length 1 of texts: by default counts of character n-grams; give a sentence-transformer's
    ``lambda texts: model.encode(texts, normalize_embeddings=True)`` for meaning.
    """

    name, metric, by = "embedding", "AUC", "model"

    def __init__(self, embed: "Embed | None" = None):
        self.embed: Any = embed or lexical

    def trials(self, windows: Windows, feature: int, side: str, n: int, seed: int) -> "Binary | None":
        """As detection's."""
        return binary.drawn(windows, feature, side, n, seed, marked=False)

    def lines(self, trials: Binary, reader: Reader) -> list[str]:
        """The examples as text."""
        return [reader.line(tokens) for tokens in trials.examples.tokens]

    def compute(self, trials: Binary, text: str, reader: Reader) -> Float[ndarray, " n"]:
        """Cosines; 0 for an empty explanation."""
        if not text.strip():
            return np.zeros(len(trials.examples))
        found = self.embed(self.lines(trials, reader)) @ self.embed([text]).T
        return np.asarray(found.todense() if hasattr(found, "todense") else found, np.float64).reshape(-1)

    def execute(self, trials: Binary, rule: Rule) -> Float[ndarray, " n"]:
        """The largest chance of any token."""
        return binary.judged(rule.strength(trials.examples.tokens)).max(1)

    def measure(self, trials: Binary, guesses: Float[ndarray, " n"], seed: int) -> Score:
        """The AUC."""
        return binary.measure(self.name, self.metric, trials, guesses)

    def blind(self, learnt: "Binary | None", trials: Binary, reader: Reader) -> dict[str, float | None]:
        """What the length of texts gives away."""
        return binary.blind(learnt, trials, reader.sizes, auc=True)
