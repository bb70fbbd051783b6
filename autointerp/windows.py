"""Windows of a text: what is shown of a feature, to explain it and to score what was said.

Windows are runs of tokens without a gap, each of one document, and no two share a token. Documents are dealt to two
sides before anything is drawn, so that what an explanation is made from and what it is scored on never share one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64
from numpy import ndarray
from scipy.sparse import csr_array

from saekit.autointerp.firings import Firings
from saekit.types import SaekitError

WIDTH = 32  # tokens of a window
SIDES = ("explain", "score")
SAMPLINGS = ("top", "quantiles", "random")
BANDS = 10  # of equal count, by strength, for quantiles
NEIGHBOURS = 8192  # windows from which co-firing is counted
NEAR = 4  # times as many lexically near windows as are asked for are drawn from


@dataclass(frozen=True)
class Examples:
    """Windows as they are shown: ``values`` [n, width] are the feature's strengths (sizes of its codes), 0 where silent.

    ``kinds`` says how each was found: ``firing``, or the kind of its silence (see ``NEGATIVES``).
    """

    windows: Int64[ndarray, " n"]
    tokens: Int64[ndarray, "n width"]
    values: Float32[ndarray, "n width"]
    documents: Int64[ndarray, " n"]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def fires(self) -> Bool[ndarray, " n"]:
        """Whether the feature fires anywhere in each window."""
        return np.any(self.values > 0, axis=1)

    def only(self, some: "Int[ndarray, ' some'] | Bool[ndarray, ' n']") -> "Examples":
        """Some of the examples, in the order given."""
        at = np.arange(len(self))[some]
        return Examples(
            self.windows[at], self.tokens[at], self.values[at], self.documents[at], tuple(self.kinds[i] for i in at)
        )  # fmt: skip

    @staticmethod
    def beside(parts: "Sequence[Examples]") -> "Examples":
        """Examples of all parts, one after the other."""
        return Examples(
            np.concatenate([part.windows for part in parts]), np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.values for part in parts]), np.concatenate([part.documents for part in parts]),
            tuple(kind for part in parts for kind in part.kinds),
        )  # fmt: skip


class Windows:
    """All windows of a text in which features fire, on two sides that share no document.

    ``texts``: of each token, so that silent windows can be as long as firing ones, and marks fall on words alike.
    """

    def __init__(
        self, firings: Firings, width: int = WIDTH, seed: int = 0, texts: "Sequence[str] | None" = None
    ):
        if width < 2 or width > firings.seq:
            raise SaekitError(f"width = {width} must be from 2 to the {firings.seq} tokens of a row")
        self.firings, self.width, self.seed = firings, width, seed
        self.starts = _starts(firings, width)
        self.documents = np.asarray(firings.documents).reshape(-1)[self.starts].astype(np.int64)
        self.side = self._dealt()
        self.texts = texts

    def __len__(self) -> int:
        return len(self.starts)

    def _dealt(self) -> Int64[ndarray, " window"]:
        """A side for each window: documents in random order, until the first side has half of the windows."""
        found, of = np.unique(self.documents, return_inverse=True)
        if len(found) < 2:
            raise SaekitError(
                f"the text has {len(found)} {'document' if len(found) == 1 else 'documents'} with {self.width} tokens in a row; give a text of more documents, or a smaller width"
            )
        order = np.random.default_rng([self.seed, 1]).permutation(len(found))
        sizes = np.bincount(of)[order]
        first = np.cumsum(sizes) - sizes / 2 <= len(of) / 2
        first[0], first[-1] = True, False
        side = np.empty(len(found), np.int64)
        side[order] = np.where(first, 0, 1)
        return side[of]

    def of_side(self, side: str) -> Int64[ndarray, " window"]:
        """Windows of a side."""
        if side not in SIDES:
            raise SaekitError(f"side {side!r} is not one of {', '.join(SIDES)}")
        return np.flatnonzero(self.side == SIDES.index(side))

    @cached_property
    def tokens(self) -> Int64[ndarray, "window width"]:
        """Token ids of all windows."""
        at = self.starts[:, None] + np.arange(self.width)
        return np.asarray(self.firings.tokens).reshape(-1)[at].astype(np.int64)

    @cached_property
    def opens(self) -> Bool[ndarray, " token"]:
        """Tokens that begin a word: all of them, where no texts are given."""
        n = int(self.tokens.max(initial=0)) + 1
        return np.array([text[:1].isspace() for text in self.texts]) if self.texts else np.ones(n, bool)

    def lengths(self, windows: Int[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """Characters of each window."""
        sizes = (
            np.array([len(text) for text in self.texts]) if self.texts else np.ones(len(self.opens), np.int64)
        )
        return sizes[self.tokens[windows]].sum(1)

    def peaks(self, feature: int) -> tuple[Int64[ndarray, " firing"], Float32[ndarray, " firing"]]:
        """Windows in which a feature fires, rising, and how strongly at most."""
        window, _, value = self._inside(feature)
        found, first = np.unique(window, return_index=True)
        return found, np.maximum.reduceat(value, first) if len(found) else value

    def _inside(self, feature: int) -> tuple[ndarray, ndarray, ndarray]:
        """Window, position in it and strength of each firing that is in a window."""
        places, values = self.firings.of(feature)
        at = np.asarray(places, np.int64)
        window = np.searchsorted(self.starts, at, side="right") - 1
        inside = window >= 0
        inside[inside] = at[inside] < self.starts[window[inside]] + self.width
        window = window[inside]
        return window, at[inside] - self.starts[window], np.abs(np.asarray(values)[inside])

    def values(self, feature: int, windows: Int[ndarray, " n"]) -> Float32[ndarray, "n width"]:
        """A feature's strength at each token of some windows."""
        window, position, value = self._inside(feature)
        out = np.zeros((len(windows), self.width), np.float32)
        order = np.argsort(windows, kind="stable")
        first, stop = (np.searchsorted(windows[order], window, side=side) for side in ("left", "right"))
        for line in range(int((stop - first).max(initial=0))):  # a window may be asked for more than once
            on = first + line < stop
            out[order[first[on] + line], position[on]] = value[on]
        return out

    def examples(self, feature: int, windows: Int[ndarray, " n"], kinds: Sequence[str]) -> Examples:
        """Some windows as examples of a feature."""
        own = np.asarray(windows, np.int64)
        return Examples(own, self.tokens[own], self.values(feature, own), self.documents[own], tuple(kinds))

    def firing(self, feature: int, side: str, n: int, how: str = "quantiles", seed: int = 0) -> Examples:
        """Up to ``n`` windows in which a feature fires, the strongest first.

        ``how``: the strongest (``top``), as many from each of ten bands of equal count by strength (``quantiles``), or
        any (``random``).
        """
        if how not in SAMPLINGS:
            raise SaekitError(f"how = {how!r} is not one of {', '.join(SAMPLINGS)}")
        window, peak = self.peaks(feature)
        own = np.isin(window, self.of_side(side))
        window, peak = window[own], peak[own]
        order = np.argsort(-peak, kind="stable")
        rng = np.random.default_rng([self.seed, seed, feature, 2])
        if how == "top":
            chosen = np.arange(min(n, len(order)))
        elif how == "random":
            chosen = rng.permutation(len(order))[:n]
        else:
            chosen = _by_band(len(order), n, rng)
        return self.examples(feature, window[order[np.sort(chosen)]], ["firing"] * len(chosen))

    @cached_property
    def words(self) -> csr_array:
        """Windows by tokens: how often each token stands in each, by its rarity, of length 1."""
        n_tokens = int(self.tokens.max(initial=0)) + 1
        row = np.repeat(np.arange(len(self)), self.width)
        counts = csr_array(
            (np.ones(len(row), np.float32), (row, self.tokens.reshape(-1))), (len(self), n_tokens)
        )
        counts.sum_duplicates()
        seen = np.bincount(counts.indices, minlength=n_tokens)
        counts.data *= np.log(len(self) / np.maximum(seen, 1)).astype(np.float32)[counts.indices]
        lengths = np.sqrt(np.maximum(counts.multiply(counts).sum(1), 1e-12))
        counts.data /= np.repeat(lengths, np.diff(counts.indptr)).astype(np.float32)
        return counts

    @cached_property
    def fired(self) -> tuple[Int64[ndarray, " some"], csr_array]:
        """Some windows of the explaining side, and which features fire in each: [feature, some]."""
        pool = self.of_side("explain")
        some = np.sort(np.random.default_rng([self.seed, 3]).permutation(pool)[:NEIGHBOURS])
        columns, ends = [], [0]
        for feature in range(self.firings.n_features):
            window, _ = self.peaks(feature)
            at = np.searchsorted(some, window)
            at = at[(at < len(some)) & (some[np.minimum(at, len(some) - 1)] == window)]
            columns.append(at)
            ends.append(ends[-1] + len(at))
        indices = np.concatenate(columns).astype(np.int32)
        shape = (self.firings.n_features, len(some))
        return some, csr_array((np.ones(len(indices), np.float32), indices, np.array(ends)), shape)

    def neighbours(self, feature: int, n: int) -> Int64[ndarray, " neighbour"]:
        """Features that fire in the same windows the most often, by the Jaccard index over windows."""
        matrix = self.fired[1]
        sizes = np.diff(matrix.indptr)
        both = matrix @ matrix[[feature]].toarray()[0]
        score = both / np.maximum(sizes + sizes[feature] - both, 1)
        score[feature] = 0
        order = np.argsort(-score, kind="stable")[:n]
        return order[score[order] > 0]


def _starts(firings: Firings, width: int) -> Int64[ndarray, " window"]:
    """Where windows begin: runs of unmasked tokens of one document in one row, cut from their beginning."""
    documents, keep = np.asarray(firings.documents), np.asarray(firings.mask)
    same = np.zeros(documents.shape, bool)
    same[:, 1:] = keep[:, 1:] & keep[:, :-1] & (documents[:, 1:] == documents[:, :-1])
    at = np.arange(documents.size)
    begin = np.maximum.accumulate(np.where(same.reshape(-1), 0, at))  # of the run that each token is in
    run = at - begin
    length = np.bincount(begin, minlength=len(at))[begin]
    return np.flatnonzero(keep.reshape(-1) & (run % width == 0) & (run + width <= length))


def _by_band(n_found: int, n: int, rng: np.random.Generator) -> Int64[ndarray, " n"]:
    """``n`` of ranks 0 to ``n_found``, as many from each band as can be, none twice."""
    if n_found <= n:
        return np.arange(n_found)
    edges = np.linspace(0, n_found, min(BANDS, n) + 1).round().astype(int)
    bands = [rng.permutation(np.arange(a, b)) for a, b in pairwise(edges)]
    turns = np.concatenate([np.arange(len(band)) for band in bands])
    # one of each band in turn; ties by the band, in an order drawn
    order = np.lexsort((np.repeat(rng.permutation(len(bands)), [len(band) for band in bands]), turns))
    return np.concatenate(bands)[order[:n]]
