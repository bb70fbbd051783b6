"""The k coordinates that tell of a label best together, exactly; and how often another k tell of it as well.

Optimal sparse probing of Gurnee et al. 2023 (2305.01610, §3), with squared loss in place of the hinge, so that no solver is
needed: the gain of a set of coordinates has a closed form, and never falls where the set grows. That is all that branch and
bound needs (Narendra and Fukunaga 1977): whole branches are left out whose coordinates, all taken together, gain less than the
best k that are known.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.probes import FLOOR, RANKERS, Labelled, Rows, check_rows, columns, f1, linear, mean_difference
from saekit.types import Codes, SaekitError

CANDIDATES = 50


@dataclass(frozen=True)
class Subset:
    """``explained``: the gain of the coordinates ``features``, at least 0, and at most 1 where nothing is shrunk. ``shrink``: by how
    much correlations were shrunk, in [0, 1]. ``visited``: how many sets were branched from."""

    features: Int[Tensor, " k"]
    explained: float
    shrink: float
    visited: int


def best_subset(
    x: Rows, labels: Bool[Tensor, " rows"], k: int, candidates: int = CANDIDATES, shrink: float | None = None
) -> Subset:
    """The ``k`` coordinates of the largest gain among the ``candidates`` of the largest mean difference; no others do better.

    The gain of the coordinates S is m_S^T ((1 - a) G_SS + a I)^-1 m_S, with m their correlations with the label, G those among
    each other and a = ``shrink`` in [0, 1]. Where a is 0 it is the share of the labels' variance that least squares explain,
    p q D / (1 + p q D), where p and q are the classes' shares and D their squared Mahalanobis distance in S: so the set is that
    of Fisher's discriminant, however rare a class is. (Weights that balance the classes would let a few rows decide.) Where a is
    1 correlations count for nothing, and the set is that of the largest mean differences. By default a is what chance gives
    to the candidates' correlations (Schaefer and Strimmer 2005): sum_ij (1 - G_ij^2)^2 / (n - 1) / sum_ij G_ij^2, i != j.

    At worst candidates^(k - 1) / (k - 1)! sets are branched from: a second or so at 50 candidates and k = 4.
    """
    if shrink is not None:
        _check_shrink(shrink)
    first = mean_difference(x, labels).sort(descending=True, stable=True)
    some = first.indices[: min(candidates, int((first.values > FLOOR).sum()))]
    if not 1 <= k <= len(some):
        raise SaekitError(f"k = {k} must lie in 1..{len(some)}, the number of candidates that vary with the label; choose another k")  # fmt: skip
    _check_size(k, len(labels))
    gram, moment = _moments(columns(x, some).detach().cpu().double().numpy(), labels.cpu().numpy())
    search = _Search(k)
    shrink = _by_chance(gram, len(labels)) if shrink is None else shrink
    search.branch(_shrunk(gram, shrink), moment, np.arange(len(some)), (), 0.0)
    return Subset(some[sorted(search.best)].sort().values, search.gain, shrink, search.visited)


def gain(x: Float[Tensor, "rows chosen"], labels: Bool[Tensor, " rows"], shrink: float = 0.0) -> float:
    """How much coordinates tell of the label together, see :func:`best_subset`; the share of its variance where nothing is shrunk."""
    check_rows(x, labels)
    _check_size(x.shape[1], len(labels))
    _check_shrink(shrink)
    gram, moment = _moments(x.detach().cpu().double().numpy(), labels.cpu().numpy())
    return float(moment @ np.linalg.solve(_shrunk(gram, shrink), moment))


def repeats(
    x: Rows, labels: Bool[Tensor, " rows"], held_out: Labelled, k: int = 1, level: float = 0.95, ranker: str = "mean_difference"
) -> list[Int[Tensor, " k"]]:  # fmt: skip
    """Sets of k coordinates, no two of which share any, that each tell of the label with an F1 of ``level`` on held-out rows.

    Iterative pruning: each is what the ranker puts first when the ones before it are taken away. The number of sets is that
    of redundant neurons, or groups.
    """
    check_rows(x, labels)
    check_rows(*held_out)
    rank, (width, other) = RANKERS[ranker], (one.n_features if isinstance(one, Codes) else one.shape[1] for one in (x, held_out[0]))  # fmt: skip
    if other != width:
        raise SaekitError(f"held_out is {other} wide, and x {width}; give the same coordinates")
    kept, found = torch.ones(width), list[Tensor]()
    while int(kept.sum()) >= k:
        left: Any = x.scale(kept.to(x.values)) if isinstance(x, Codes) else x * kept.to(x)
        scores = rank(left, labels).cpu().masked_fill(kept == 0, -1.0)
        chosen = scores.sort(descending=True, stable=True).indices[:k].sort().values
        probe = linear(columns(x, chosen), labels)
        if f1(probe(columns(held_out[0], chosen)) > 0, held_out[1]) < level:
            break
        found.append(chosen)
        kept[chosen] = 0.0
    return found


def _check_shrink(shrink: float) -> None:
    if not 0 <= shrink <= 1:
        raise SaekitError(f"shrink = {shrink} must lie in 0..1; or leave it out")


def _check_size(k: int, rows: int) -> None:
    if rows < k + 2:
        raise SaekitError(
            f"{rows} rows are explained by any {k} coordinates; give at least {k + 2}, or choose a smaller k"
        )


def _moments(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of coordinates, and with the labels."""
    z, y = (one / np.maximum(one.std(0), 1e-300) for one in (x - x.mean(0), labels - labels.mean()))
    return z.T @ z / len(z), y @ z / len(z)


def _shrunk(gram: np.ndarray, shrink: float) -> np.ndarray:
    """Correlations between the given ones and none; a trace of none keeps those of copies invertible."""
    shrink = max(shrink, 1e-9)
    return (1 - shrink) * gram + shrink * np.eye(len(gram))


def _by_chance(gram: np.ndarray, rows: int) -> float:
    off = gram[~np.eye(len(gram), dtype=bool)]
    return (
        float(min(1.0, ((1 - off**2) ** 2).sum() / (rows - 1) / max((off**2).sum(), 1e-12)))
        if len(off)
        else 0.0
    )


class _Search:
    """The best set that is known, and how it is bettered."""

    def __init__(self, k: int):
        self.k, self.gain, self.visited = k, -1.0, 0
        self.best: tuple[int, ...] = ()

    def branch(self, gram: Any, moment: Any, left: Any, chosen: tuple[int, ...], gained: float) -> None:
        """Try all completions of ``chosen`` from ``left``, of which ``gram`` and ``moment`` are what the chosen leave."""
        self.visited += 1
        gains = moment**2 / gram.diagonal()
        if len(chosen) == self.k - 1:
            j = int(gains.argmax())
            if gained + gains[j] > self.gain:
                self.gain, self.best = float(gained + gains[j]), (*chosen, int(left[j]))
            return
        order = np.argsort(-gains, kind="stable")
        gram, moment, left, gains = gram[np.ix_(order, order)], moment[order], left[order], gains[order]
        # what all from each place on gain together: a Cholesky factor from the end gives all of these at once
        factor = np.linalg.cholesky(gram[::-1, ::-1])
        together = np.cumsum(_solve(factor, moment[::-1]) ** 2)[::-1]
        for i in range(len(left) - (self.k - len(chosen)) + 1):
            if gained + together[i] <= self.gain:
                return
            row, rest = gram[i, i + 1 :], slice(i + 1, None)
            self.branch(
                gram[rest, rest] - np.outer(row, row) / gram[i, i], moment[rest] - row * moment[i] / gram[i, i],
                left[rest], (*chosen, int(left[i])), gained + gains[i],
            )  # fmt: skip


def _solve(factor: np.ndarray, b: np.ndarray) -> np.ndarray:
    from scipy.linalg import solve_triangular

    return solve_triangular(factor, b, lower=True, check_finite=False)
