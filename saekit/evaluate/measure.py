"""A number with what makes it readable, and its interval by resampling documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A measured value: ``n`` is how many of ``unit_n`` it was measured on.

    ``interval`` is the 95 % percentile interval over resampled documents, None with fewer than
    three; ``control`` gives the same measure for the control dictionaries.
    """

    value: "float | list[float]"
    n: int
    unit: str
    interval: tuple[float, float] | None = None
    control: dict[str, float] = field(default_factory=dict)
    unit_n: str = "tokens"

    def __float__(self) -> float:
        if isinstance(self.value, list):
            raise TypeError("this measure is a vector; read its .value")
        return float(self.value)


class Resampler:
    """Bootstrap over documents from per-document sums: the same draws for every measure."""

    def __init__(self, n_documents: int, seed: int):
        self.n = n_documents
        rng = np.random.default_rng(seed)
        self.weights = (
            rng.multinomial(self.n, np.full(self.n, 1 / self.n), size=RESAMPLES).astype(np.float64)
            if self.n >= 3
            else None
        )

    def interval(self, statistic: Callable[..., np.ndarray], *sums: np.ndarray) -> tuple[float, float] | None:
        """Interval of ``statistic(*totals)``; each of ``sums`` is [documents, ...], totals are [resamples, ...]."""
        if self.weights is None:
            return None
        values = statistic(*(np.tensordot(self.weights, s, 1) for s in sums))
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.nanpercentile(values, [tail, 100 - tail])
        return float(low), float(high)

    def of_pairs(self, one: np.ndarray, other: np.ndarray) -> "Resampler":
        """The same for pairs of documents, given by number: a pair counts as often as both of it are drawn, times each other.

        The pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1(2)): pairs that share a document are not independent.
        """
        out = Resampler(0, 0)
        out.n, out.weights = (
            len(one),
            None if self.weights is None else self.weights[:, one] * self.weights[:, other],
        )
        return out


def over_tasks(values: Sequence[np.ndarray], sources: Sequence[np.ndarray] | None, seed: int) -> tuple[float, float] | None:  # fmt: skip
    """Interval of the mean over tasks of each one's mean over its rows.

    What is drawn anew are documents, ``sources`` of each task's rows, which may have rows of several tasks (None: each row
    stands alone).
    """
    asked = np.repeat(np.eye(len(values)), [len(one) for one in values], axis=0)
    own = np.concatenate(values)[:, None] * asked
    of = np.arange(len(own)) if sources is None else np.concatenate(sources)
    sums = by_source(of, own, asked)
    return Resampler(len(sums[0]), seed).interval(mean_of_means, *sums)


def mean_of_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the last axis of sums over counts, of those that a draw has not missed."""
    return np.nanmean(sums / np.where(counts > 0, counts, np.nan), -1)


def by_source(sources: np.ndarray, *each: np.ndarray) -> list[np.ndarray]:
    """Sums over the rows of each source, [sources, ...], of what rows have, [rows, ...]."""
    names, which = np.unique(sources, return_inverse=True)
    out = []
    for one in each:
        total = np.zeros((len(names), *one.shape[1:]))
        np.add.at(total, which, one)
        out.append(total)
    return out
