"""Which n-grams end where features fire, counted in memory that doesn't grow with the tokens.

Grams are counted per feature by the summaries of Misra and Gries (1982), of ``grams`` counters each. A
feature that never had more distinct grams has exact counts. Beyond that, whenever it holds more, the largest count that
has no place is taken off all: D in sum. Every kept count c is at most the true one, and that at most c + D. Each unit
of D took one from ``grams`` + 1 different grams, and of these at most 5 are the commonest ones, so where those leave out
a share r of F firings, D <= r F / (grams - 4). So no feature is wrongly called a detector, and every one that covers
more than 0.95 + 0.25 / (grams - 4) is found; those between are counted as undecided.
"""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

MOST = 5  # grams of a detector
SIZES = (1, 2, 3)
BITS = 21  # of a token id in a gram: three of them are a number


class Grams:
    """Summaries of Misra and Gries, one for each column: ``counts`` of the ``grams`` kept, sorted by column and gram.

    ``dropped`` [column] is what may be missing from each of a column's counts.
    """

    def __init__(self, n_columns: int, size: int):
        self.size = size
        self.columns = self.grams = self.counts = np.zeros(0, dtype=np.int64)
        self.dropped = np.zeros(n_columns, dtype=np.int64)

    def plus(
        self, columns: Int64[ndarray, " entry"], places: Int64[ndarray, " entry"], keys: Int64[ndarray, " cell"]
    ) -> "Grams":  # fmt: skip
        """With the grams ``keys[places]`` of the columns, where these are not below 0."""
        there = keys[places] >= 0
        columns, places = columns[there], places[there]
        known = np.union1d(self.grams, keys)
        held = self.columns * len(known) + np.searchsorted(known, self.grams)
        new, found = np.unique(
            columns * len(known) + np.searchsorted(known, keys)[places], return_counts=True
        )
        at = np.searchsorted(held, new)
        again = np.zeros(len(new), dtype=bool)
        again[at < len(held)] = held[at[at < len(held)]] == new[at < len(held)]
        counts = self.counts.copy()
        counts[at[again]] += found[again]
        held = np.insert(held, at[~again], new[~again])
        return self._kept(*np.divmod(held, len(known)), known, np.insert(counts, at[~again], found[~again]))

    def _kept(self, columns: ndarray, ids: ndarray, known: ndarray, counts: ndarray) -> "Grams":
        """What has a place: the first count that has none is taken off all of its column."""
        out = Grams(len(self.dropped), self.size)
        start = np.searchsorted(columns, np.arange(len(self.dropped) + 1))
        full = np.flatnonzero(np.diff(start) > self.size)
        taken = np.zeros(len(self.dropped), dtype=np.int64)
        if len(full):
            most = int(counts.max()) + 1
            ordered = np.sort(columns * most + (most - 1 - counts))
            taken[full] = most - 1 - ordered[start[full] + self.size] % most
            counts = counts - taken[columns]
        left = counts > 0
        out.columns, out.grams, out.counts = columns[left], known[ids[left]], counts[left]
        out.dropped = self.dropped + taken
        return out

    def of(self, column: int) -> tuple[Int64[ndarray, " kept"], Int64[ndarray, " kept"]]:
        """Grams and counts of a column, the commonest first, of equal ones the lowest."""
        part = slice(*np.searchsorted(self.columns, [column, column + 1]))
        order = np.argsort(-self.counts[part], kind="stable")
        return self.grams[part][order], self.counts[part][order]


def gram_keys(tokens: ndarray, documents: ndarray, mask: ndarray) -> list[Int64[ndarray, " cell"]]:
    """The grams that end at each cell of [rows, seq], as numbers, of every size; -1 where something breaks them."""
    keys, whole, out = np.where(mask, tokens, 0), mask, []
    last = keys
    for n in SIZES:
        if n > 1:
            same = np.zeros_like(mask)
            same[:, n - 1 :] = (documents[:, n - 1 :] == documents[:, : 1 - n]) & mask[:, : 1 - n]
            before = np.zeros_like(keys)
            before[:, n - 1 :] = last[:, : 1 - n]
            whole = whole & same
            keys = keys | before << BITS * (n - 1)
        out.append(np.where(whole, keys, -1).reshape(-1))
    return out


def gram_of(key: int, n: int) -> tuple[int, ...]:
    """The ``n`` tokens of a gram, from the number that it is kept as."""
    return tuple(key >> BITS * i & (1 << BITS) - 1 for i in reversed(range(n)))
