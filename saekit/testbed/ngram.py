"""Interpolated Kneser-Ney n-grams over token ids: the baseline a language model has to beat.

Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1998 (eq. 18): the highest order
uses counts, the lower ones the number of distinct left neighbours, each with one absolute discount
``D = n1 / (n1 + 2 n2)`` from its own counts of counts.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


class KneserNey:
    """An n-gram model; n-grams are packed into 64-bit keys, so ``order * bits(vocab)`` is at most 64."""

    def __init__(self, tokens: Int[ndarray, " tokens"], vocab: int, order: int = 5):
        self.bits, self.order, self.vocab = max(1, (vocab - 1).bit_length()), order, vocab
        if self.bits * order > 64:
            raise ValueError(
                f"order = {order} needs {self.bits * order} bits at a vocabulary of {vocab}; at most 64 fit"
            )
        grams, counts = np.unique(self._keys(tokens, order), return_counts=True)
        self.levels = []  # for n = order .. 1: (keys, counts, discount, contexts, context totals, context types)
        for n in range(order, 0, -1):
            self.levels.append(self._level(grams, counts))
            if n > 1:
                # continuation counts: how many distinct tokens precede the shorter gram
                grams, counts = np.unique(
                    grams & np.uint64((1 << self.bits * (n - 1)) - 1), return_counts=True
                )

    def _keys(self, tokens: ndarray, n: int) -> ndarray:
        tokens = tokens.astype(np.uint64)
        keys = np.zeros(len(tokens) - n + 1, dtype=np.uint64)
        for i in range(n):
            keys = (keys << np.uint64(self.bits)) | tokens[i : len(tokens) - n + 1 + i]
        return keys

    def _level(self, keys: ndarray, counts: ndarray) -> tuple:
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / max(1, ones + 2 * twos)
        contexts, first, types = np.unique(
            keys >> np.uint64(self.bits), return_index=True, return_counts=True
        )
        return keys, counts, discount, contexts, np.add.reduceat(counts, first), types

    def probabilities(self, tokens: Int[ndarray, " tokens"]) -> Float[ndarray, " predicted"]:
        """Probability of each token from index ``order - 1`` on, given the ``order - 1`` before it."""
        keys = self._keys(tokens, self.order)
        p = np.full(len(keys), 1 / self.vocab)
        for n, (grams, counts, discount, contexts, totals, types) in zip(
            range(1, self.order + 1), reversed(self.levels), strict=True
        ):
            own = keys & np.uint64((1 << self.bits * n) - 1) if self.bits * n < 64 else keys
            count = _look_up(grams, counts, own)
            context = own >> np.uint64(self.bits)
            total, kinds = _look_up(contexts, totals, context), _look_up(contexts, types, context)
            seen = total > 0
            mixed = (np.maximum(count - discount, 0) + discount * kinds * p) / np.maximum(total, 1)
            p = np.where(seen, mixed, p)
        return p


def _look_up(keys: ndarray, values: ndarray, wanted: ndarray) -> ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
