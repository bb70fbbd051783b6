"""Which units of one network, or features of one dictionary, another one has too: one to one, few to one, or as subspaces.

Li, Yosinski, Clune, Lipson and Hopcroft 2016, "Convergent learning: do different neural networks learn the same
representations?" (1511.07543). All but mutual information follows from the covariances of units on the same rows, which
:func:`relate` takes from activations, or from codes as they are stored. What is chosen on some rows is judged on others, and
beside rows whose inputs are shuffled (:func:`against_null`), where whatever is found was sought.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, issparse
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.probes import binned
from saekit.types import Codes, SaekitError

BINS = 4  # of a unit's nonzero values, for mutual information
CELLS = 2**23  # of the tables that are held at once
TARGETS = 256  # units that are predicted at once
FLOOR = 1e-12  # of a unit's mean square: a variance below it is rounding


@dataclass(frozen=True)
class Related:
    """Covariances of the units of two networks over the same ``rows``, in float64: ``a`` and ``b`` within, ``between`` across."""

    a: Float[Tensor, "n n"]
    b: Float[Tensor, "m m"]
    between: Float[Tensor, "n m"]
    rows: int

    @cached_property
    def correlations(self) -> Float[Tensor, "n m"]:
        """Pearson's r of each unit of a and each of b, in [-1, 1]; 0 where one doesn't vary."""
        return _inverse(self.a)[:, None] * self.between * _inverse(self.b)

    @property
    def joint(self) -> Float[Tensor, "both both"]:
        """Pearson's r of all units, those of a before those of b; 0 on the diagonal too where a unit doesn't vary."""
        whole = torch.cat([torch.cat([self.a, self.between], 1), torch.cat([self.between.T, self.b], 1)])
        scale = _inverse(whole)
        return scale[:, None] * whole * scale


def relate(a: Float[Tensor, "rows n"] | Codes, b: Float[Tensor, "_ m"] | Codes) -> Related:
    """Covariances of the units of ``a`` and ``b`` on the same rows, in that order; either may be codes.

    Of codes only the entries are read: memory is that of the entries, and of the [n, n], [m, m] and [n, m] results.
    """
    _check(a, b)
    x, y = _units(a), _units(b)
    return Related(_covariance(x, x), _covariance(y, y), _covariance(x, y), _rows(a))


def correlations(a: Float[Tensor, "rows n"] | Codes, b: Float[Tensor, "_ m"] | Codes) -> Float[Tensor, "n m"]:
    """Pearson's r of each unit of ``a`` and each of ``b``, as :func:`relate` has it, without the matrices within each."""
    _check(a, b)
    x, y = _units(a), _units(b)
    return _over(x.variance)[:, None] * _covariance(x, y) * _over(y.variance)


def mutual_information(
    a: Float[Tensor, "rows n"] | Codes, b: Float[Tensor, "_ m"] | Codes, bins: int = BINS
) -> Float[Tensor, "n m"]:
    """What each unit of ``a`` tells of each of ``b``, in bits: of it being 0, else in which of ``bins`` bins it lies.

    A bin holds as many of a unit's nonzero values as another; equal values lie in one. The estimate is of the rows' own
    frequencies, which tell about (cells - 1)^2 / (2 rows ln 2) bits too much, with bins (+ 1 where 0 occurs) cells a unit.
    """
    _check(a, b)
    if bins < 1:
        raise SaekitError(f"bins = {bins} must be at least 1; choose 1 to ask for 0 or not 0 only")
    x, y = _cells(a, bins), _cells(b, bins)
    rows, n, m = x.shape[0], x.shape[1] // bins, y.shape[1] // bins
    own, other = (_with_rest(np.asarray(z.sum(0)).reshape(-1, bins), rows) for z in (x, y))
    step, out, x = max(1, CELLS // (m * (bins + 1) ** 2)), np.zeros((n, m)), x.tocsc()
    for first in range(0, n, step):
        part, alone = x[:, first * bins : (first + step) * bins], own[first : first + step]
        table = np.zeros((len(alone), bins + 1, m, bins + 1))
        table[:, :bins, :, :bins] = (part.T @ y).toarray().reshape(len(alone), bins, m, bins)
        # zeros are not stored: how often one goes with something is what the rest leaves
        table[:, bins, :, :bins] = other[:, :bins] - table[:, :bins, :, :bins].sum(1)
        table[..., bins] = alone[:, :, None] - table[..., :bins].sum(3)
        expected = alone[:, :, None, None] * other / rows
        ratio = np.divide(table, expected, out=np.ones_like(table), where=table > 0)
        out[first : first + step] = (table * np.log2(ratio)).sum((1, 3)) / rows
    return torch.from_numpy(out).clamp_min(0)


@dataclass(frozen=True)
class Matching:
    """``partner`` of each unit of a, a unit of b, or -1 where it has none."""

    partner: Int[Tensor, " n"]

    def scores(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, " matched"]:
        """What the pairs score, of those units that have a partner."""
        on = self.partner >= 0
        return scores[on, self.partner[on]]


def semi_matching(scores: Float[Tensor, "n m"]) -> Matching:
    """The best of b for each unit of a, by correlations, mutual information, or any score; one may be several's."""
    _check_scores(scores)
    return Matching(scores.argmax(1))


def one_to_one(scores: Float[Tensor, "n m"]) -> Matching:
    """The pairs of units, each in one pair at most, whose scores have the largest sum (the Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    _check_scores(scores)
    partner = torch.full((len(scores),), -1)
    own, other = linear_sum_assignment(scores.cpu().double().numpy(), maximize=True)
    partner[torch.from_numpy(own)] = torch.from_numpy(other)
    return Matching(partner)


def _check_scores(scores: Tensor) -> None:
    if not scores.numel():
        raise SaekitError(f"scores have shape {list(scores.shape)}; give those of at least one unit of each")
    if not scores.isfinite().all():
        raise SaekitError("scores hold NaN or Inf; leave those units out")


@dataclass(frozen=True)
class Prediction:
    """Units of b as sums of few of a: ``weight`` is in units of b's per unit of a's, 0 for those that are not used."""

    weight: Float[Tensor, "n m"]

    @property
    def predictors(self) -> Int[Tensor, " m"]:
        """How many units of a are used for each of b."""
        return (self.weight != 0).sum(0)

    def explained(self, related: Related) -> Float[Tensor, " m"]:
        """R2 of each unit of b on these rows, with the intercept that fits them; at most 1, and 0 where b doesn't vary."""
        left = related.b.diagonal() - 2 * (self.weight * related.between).sum(0)
        left = left + (self.weight * (related.a @ self.weight)).sum(0)
        return (1 - left * _inverse(related.b) ** 2).where(_inverse(related.b) > 0, 0.0)


def greedy(related: Related, k: int) -> Prediction:
    """Each unit of b by ``k`` of a: at each step the one that lowers the squared error most (forward selection)."""
    gram, moment, chosen = *_standard(related), list[np.ndarray]()
    _check_k(k, len(gram), related.rows)
    for first in range(0, moment.shape[1], TARGETS):
        chosen.append(_forward(gram, moment[:, first : first + TARGETS], k))
    return _fitted(related, gram, moment, np.concatenate(chosen))


def exact(related: Related, k: int, candidates: int = 16) -> Prediction:
    """Each unit of b by the ``k`` of its most correlated ``candidates`` of a that no other k of them explain it better than.

    All candidates! / (k! (candidates - k)!) sets are tried.
    """
    gram, moment = _standard(related)
    candidates = min(candidates, len(gram))
    _check_k(k, candidates, related.rows)
    sets = np.array(list(combinations(range(candidates), k)))
    chosen = []
    for target in moment.T:
        tried = np.argsort(-np.abs(target), kind="stable")[:candidates][sets]
        weight = _solved(gram, target, tried)
        chosen.append(tried[(weight * target[tried]).sum(1).argmax()])
    return _fitted(related, gram, moment, np.stack(chosen))


def lasso(related: Related, penalties: Sequence[float]) -> list[Prediction]:
    """Each unit of b by weights of the least mean squared error / 2 + penalty ||w||_1, both sides at variance 1.

    One prediction a penalty, in their order; each lies in (0, 1), and at the largest |r| of a unit no weight is left.
    """
    from sklearn.linear_model import lasso_path

    if not penalties or not all(0 < one < np.inf for one in penalties):
        raise SaekitError(f"penalties = {list(penalties)} must all be above 0, and finite; give some in (0, 1)")  # fmt: skip
    if not (related.a.diagonal() > 0).any():
        raise SaekitError("no unit of a varies, so that none predicts anything; give others, or more rows")
    gram, moment = _standard(related)
    # as many rows as directions that vary stand for all: they have the same second moments
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[on := values > 1e-10 * values.max()], vectors[:, on]
    x, y = np.sqrt(values)[:, None] * vectors.T, (vectors.T @ moment) / np.sqrt(values)[:, None]
    order = np.argsort(-np.asarray(penalties), kind="stable")
    alphas = np.asarray(penalties)[order] / len(x)  # sklearn's error is a mean over rows
    weights = np.zeros((len(penalties), *moment.shape))
    for j in range(moment.shape[1]):
        _, found, _ = lasso_path(x, y[:, j], alphas=alphas, max_iter=10_000, precompute=gram, Xy=moment[:, j])
        weights[order, :, j] = found.T
    scale = _inverse(related.a)[:, None] * related.b.diagonal().sqrt()
    return [Prediction(torch.from_numpy(w) * scale) for w in weights]


def clusters(
    related: Related, n_clusters: int, way: str = "spectral", seed: int = 0
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Groups of units of both networks that are correlated, of either sign: the cluster of each of a, and of each of b.

    ``way`` is "spectral", of the affinities |r|, or "agglomerative", by average linkage of 1 - |r|. A unit that doesn't vary
    is in none: -1.
    """
    from sklearn.cluster import AgglomerativeClustering, SpectralClustering

    joint = related.joint.abs().cpu().numpy()
    on = np.diagonal(joint) > 0
    if not 2 <= n_clusters <= on.sum():
        raise SaekitError(f"n_clusters = {n_clusters} must lie in 2..{int(on.sum())}, the number of units that vary; choose another")  # fmt: skip
    joint = joint[np.ix_(on, on)].clip(0, 1)
    ways: dict[str, Callable[[], Any]] = {
        "spectral": lambda: SpectralClustering(n_clusters, affinity="precomputed", random_state=seed).fit_predict(joint),
        "agglomerative": lambda: AgglomerativeClustering(n_clusters, metric="precomputed", linkage="average").fit_predict(1 - joint),
    }  # fmt: skip
    if way not in ways:
        raise SaekitError(f"way = {way!r} is none of {', '.join(ways)}")
    out = torch.full((len(on),), -1)
    out[torch.from_numpy(on)] = torch.from_numpy(ways[way]()).long()
    return out[: len(related.a)], out[len(related.a) :]


@dataclass(frozen=True)
class Against:
    """A measure of two networks, and of the same ones when b saw its inputs in random orders."""

    value: float
    null: tuple[float, ...]


def against_null(
    measure: Callable[[Any, Any], float], a: Float[Tensor, "rows n"] | Codes, b: Float[Tensor, "_ m"] | Codes,
    draws: int = 10, seed: int = 0,
) -> Against:  # fmt: skip
    """``measure(a, b)``, and its ``draws`` values with the rows of b shuffled: what matching finds where nothing is shared."""
    _check(a, b)
    generator = torch.Generator().manual_seed(seed)
    return Against(
        measure(a, b), tuple(measure(a, rows_of(b, torch.randperm(_rows(b), generator=generator))) for _ in range(draws))
    )  # fmt: skip


def rows_of(
    x: Float[Tensor, "rows n"] | Codes, rows: Int[Tensor, " some"]
) -> Float[Tensor, "some n"] | Codes:
    """Some rows of activations, or of codes, in this order."""
    return x[rows] if isinstance(x, Tensor) else x.at(rows)


def _rows(x: Tensor | Codes) -> int:
    return x.rows if isinstance(x, Codes) else len(x)


def _check(a: Tensor | Codes, b: Tensor | Codes) -> None:
    for name, x in (("a", a), ("b", b)):
        if isinstance(x, Tensor):
            check_axes(name, x, "rows", "units")
    if _rows(a) != _rows(b):
        raise SaekitError(f"a has {_rows(a)} rows and b {_rows(b)}; give both the same inputs, in the same order")  # fmt: skip
    if _rows(a) < 3:
        raise SaekitError(f"a and b have {_rows(a)} rows, of which two are always in line; give at least 3")
    for name, x in (("a", a), ("b", b)):
        if not (x.values if isinstance(x, Codes) else x).isfinite().all():
            raise SaekitError(f"{name} holds NaN or Inf; remove its row from both")


def _sparse(codes: Codes) -> csr_array:
    parts = (codes.values.double(), codes.indices, codes.offsets)
    values, indices, offsets = (part.detach().cpu().numpy() for part in parts)
    # scipy adds up in place what names a feature twice, as pursuits do: not in the caller's own
    return csr_array((values, indices, offsets), shape=(codes.rows, codes.n_features), copy=True)


class _Units(NamedTuple):
    """Rows, the means that are still to be taken from them (of codes, which would no more be sparse), and variances."""

    rows: Any
    shift: np.ndarray
    variance: np.ndarray


def _units(x: Tensor | Codes) -> _Units:
    if isinstance(x, Codes):
        rows: Any = _sparse(x)
        shift = mean = np.asarray(rows.mean(0))
        variance = np.asarray(rows.power(2).mean(0)) - mean**2
    else:
        dense = x.detach().cpu().double().numpy()
        mean = dense.mean(0)
        rows, shift = dense - mean, np.zeros(len(mean))
        variance = np.square(rows).mean(0)
    return _Units(rows, shift, np.where(variance > FLOOR * (variance + mean**2), variance, 0.0))


def _covariance(x: _Units, y: _Units) -> Float[Tensor, "n m"]:
    product = x.rows.T @ y.rows
    out = (product.toarray() if issparse(product) else product) / x.rows.shape[0]
    out -= np.outer(x.shift, y.shift)
    out[x.variance == 0], out[:, y.variance == 0] = 0.0, 0.0
    return torch.from_numpy(out)


def _over(variance: np.ndarray) -> Float[Tensor, " n"]:
    """1 over the standard deviations; 0 for what doesn't vary."""
    own = torch.from_numpy(variance)
    return own.clamp_min(1e-300).rsqrt().where(own > 0, 0.0)


def _inverse(covariance: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    return _over(covariance.diagonal().numpy())


def _cells(x: Tensor | Codes, bins: int) -> csr_array:
    """Ones where a unit's value lies in a bin, [rows, n x bins]; none where it is 0."""
    codes = x if isinstance(x, Codes) else Codes.from_dense(x)
    rows, cells = (one.cpu().numpy() for one in binned(codes, bins))
    shape = (codes.rows, codes.n_features * bins)
    return csr_array((np.ones(len(rows)), (rows, cells)), shape=shape)


def _with_rest(counts: np.ndarray, rows: int) -> np.ndarray:
    """Counts of the bins of each unit, and of its zeros."""
    return np.concatenate([counts, rows - counts.sum(1, keepdims=True)], 1)


def _check_k(k: int, most: int, rows: int) -> None:
    if rows < k + 2:
        raise SaekitError(
            f"{rows} rows are explained by any {k} units; give at least {k + 2}, or choose a smaller k"
        )
    if not 1 <= k <= most:
        raise SaekitError(f"k = {k} must lie in 1..{most}, the number of units to choose from; choose another k")  # fmt: skip


def _standard(related: Related) -> tuple[np.ndarray, np.ndarray]:
    """Correlations within a, and of a and b."""
    scale = _inverse(related.a)
    return (scale[:, None] * related.a * scale).numpy(), related.correlations.numpy()


def _forward(gram: np.ndarray, moment: np.ndarray, k: int) -> np.ndarray:
    """Forward selection for several targets at once; [targets, k].

    ``left`` are the products of each unit's new part with the target's rest, ``new`` the squared lengths of the new parts.
    """
    targets = np.arange(moment.shape[1])
    left, new = moment.copy(), np.repeat(np.diagonal(gram)[:, None], len(targets), 1)
    free, parts, chosen = np.ones_like(left, dtype=bool), list[np.ndarray](), list[np.ndarray]()
    for _ in range(k):
        gains = np.where(free, left**2 / np.where(new > 1e-9, new, np.inf), -1.0)
        j = gains.argmax(0)
        length = np.sqrt(np.maximum(new[j, targets], 1e-9))
        part = gram[:, j] - sum((q * q[j, targets] for q in parts), np.zeros_like(left))
        part /= length
        left, new = left - part * (left[j, targets] / length), new - part**2
        free[j, targets] = False
        parts.append(part)
        chosen.append(j)
    return np.stack(chosen, 1)


def _solved(gram: np.ndarray, moment: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Weights of least squares for each set of units; the shortest where several do."""
    inverse = np.linalg.pinv(gram[sets[:, :, None], sets[:, None, :]], rcond=1e-10, hermitian=True)
    return (inverse @ moment[sets][..., None])[..., 0]


def _fitted(related: Related, gram: np.ndarray, moment: np.ndarray, chosen: np.ndarray) -> Prediction:
    weight = np.zeros_like(moment)
    for j, some in enumerate(chosen):
        weight[some, j] = _solved(gram, moment[:, j], some[None])[0]
    scale = _inverse(related.a)[:, None] * related.b.diagonal().sqrt()
    return Prediction(torch.from_numpy(weight) * scale)
