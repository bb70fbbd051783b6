"""Linear probes: what a direction, or k coordinates, of activations tell of a label.

A probe is L2 logistic regression on standardised coordinates in which both classes weigh the same; the standardisation is
folded into its weights, so that it reads activations as they are. k-sparse probes are those of Gurnee et al. 2023
(2305.01610): a ranker of ``RANKERS`` chooses k coordinates, and a probe is fitted on them alone. A ranker takes activations
or codes, and labels, and gives each coordinate a score; the k highest are taken.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.registry import Registry
from saekit.types import Codes, SaekitError

RANKERS = Registry(
    "ranker",
    {
        "mean_difference": "saekit.probes:mean_difference",
        "raw_difference": "saekit.probes:raw_difference",
        "mutual_information": "saekit.probes:mutual_information",
        "l1": "saekit.probes:l1_path",
        "halving": "saekit.probes:halving",
    },
)
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # of the squared weights, beside a mean loss
CANDIDATES = 256  # coordinates that the L1 path and halving begin from, those of the largest mean difference
SMALLEST, STEPS = 1e-3, 100  # of the path's penalties, over the largest, and how many
BINS = 8  # of a coordinate's values, for mutual information
HALVED = 0.01  # the penalty of the probes between which halving drops coordinates
ITERATIONS = 10_000
NARROW = 512  # coordinates of which a matrix of second derivatives costs less than the steps that it saves
FLOOR = 1e-6  # of a coordinate's size: what varies less doesn't vary, but by rounding

Rows: TypeAlias = Float[Tensor, "rows d"] | Codes
Labelled: TypeAlias = tuple[
    Float[Tensor, "_ _"] | Codes, Bool[Tensor, "_"]
]  # as many of each, but not as of other rows


@dataclass(frozen=True)
class Probe:
    """``probe(x)`` is the log odds of the label where both classes are as frequent, in nats.

    ``weight`` is in nats per unit of x, of the coordinates ``features`` (None: of all), ``penalty`` the one chosen.
    """

    weight: Float[Tensor, " chosen"]
    bias: float
    penalty: float
    features: Int[Tensor, " chosen"] | None = None

    def __call__(self, x: "Float[Tensor, '*shape d'] | Codes") -> Float[Tensor, "*shape"]:
        """Log odds of each row; differentiable in x."""
        read = x if self.features is None and isinstance(x, Tensor) else columns(x, self.features)
        if read.shape[-1] != len(self.weight):
            raise SaekitError(f"x is {read.shape[-1]} wide, and the probe {len(self.weight)}; give the coordinates that it was fitted to")  # fmt: skip
        read = read if read.is_floating_point() else read.to(self.weight)
        return read @ self.weight.to(read) + self.bias

    @property
    def direction(self) -> Float[Tensor, " chosen"]:
        """The weights at length 1: along it the log odds rise fastest."""
        return self.weight / self.weight.norm()


def columns(x: "Float[Tensor, '*shape d'] | Codes", features: Int[Tensor, " chosen"] | None) -> Float[Tensor, "*shape chosen"]:  # fmt: skip
    """Some coordinates of activations, or some features of codes; codes have to be asked for some."""
    if features is not None and len(features) and int(features.max()) >= _width(x):
        raise SaekitError(f"x is {_width(x)} wide, and coordinate {int(features.max())} is asked for; give rows that have it")  # fmt: skip
    if isinstance(x, Codes):
        if features is None:
            raise SaekitError("x is Codes, of which a probe of all features would make a dense matrix; fit it by sparse(x, labels, k)")  # fmt: skip
        return x.select(features)
    return x if features is None else x[..., features]


def _width(x: "Float[Tensor, '*shape d'] | Codes") -> int:
    return x.n_features if isinstance(x, Codes) else x.shape[-1]


def auroc(scores: Float[Tensor, " rows"], labels: Bool[Tensor, " rows"]) -> float:
    """Share of pairs of a true and a false row that the scores put in this order, ties by half; in [0, 1], 0.5 is chance.

    Raises unless both classes are there and all scores are numbers.
    """
    from scipy.stats import rankdata

    _check_labels(labels, len(scores), 1)
    if scores.isnan().any():
        raise SaekitError(f"scores hold NaN in row {int(scores.isnan().nonzero()[0])}; remove it")
    ranks = torch.from_numpy(rankdata(scores.detach().cpu().double().numpy()))
    own, n = labels.cpu(), int(labels.sum())
    return ((ranks[own].sum() - n * (n + 1) / 2) / (n * (len(scores) - n))).item()


def auroc_error(value: float, true: int, false: int) -> float:
    """Standard error of an AUROC that was measured on so many true and false rows (Hanley and McNeil 1982, eq. 1).

    Its two probabilities are those of exponential scores: p / (2 - p) that two true rows outrank one false row, and
    2 p^2 / (1 + p) that one true row outranks two.
    """
    own, other = value / (2 - value) - value**2, 2 * value**2 / (1 + value) - value**2
    spread = value * (1 - value) + (true - 1) * own + (false - 1) * other
    return float(spread / (true * false)) ** 0.5


def linear(
    x: Float[Tensor, "rows d"], labels: Bool[Tensor, " rows"], held_out: Labelled | None = None, seed: int = 0
) -> Probe:
    """A probe of all coordinates.

    The penalty is the one with the least loss on ``held_out``, rows and labels; by default on a fifth of each class,
    drawn by ``seed``, after which the probe is fitted on all. Give rows of other texts where rows of one text are alike.
    """
    check_rows(x, labels)
    return _fitted(x, labels, _held_out(held_out, x, None), seed, None)


def sparse(
    x: Rows, labels: Bool[Tensor, " rows"], k: int, ranker: str = "mean_difference", held_out: Labelled | None = None, seed: int = 0
) -> Probe:  # fmt: skip
    """A probe of the ``k`` coordinates, or features of codes, that a ranker of ``RANKERS`` puts first; see :func:`linear`.

    The ranker sees ``x`` only, never ``held_out``. Of equal scores the lower coordinate is taken.
    """
    check_rows(x, labels)
    if not 1 <= k <= _width(x):
        raise SaekitError(f"k = {k} must lie in 1..{_width(x)}, the number of coordinates; choose a smaller k")  # fmt: skip
    rank: Callable[[Rows, Tensor], Tensor] = RANKERS[ranker]
    chosen = rank(x, labels).sort(descending=True, stable=True).indices[:k].sort().values
    return _fitted(columns(x, chosen), labels, _held_out(held_out, x, chosen), seed, chosen)


def mean_difference(x: Rows, labels: Bool[Tensor, " rows"]) -> Float[Tensor, " d"]:
    """By how many standard deviations the classes' means lie apart, in each coordinate; at least 0.

    The F statistic puts coordinates in the same order: F = (n - 2) p q m^2 / (1 - p q m^2), with m this, n the rows, and
    p and q the classes' shares.
    """
    check_rows(x, labels)
    means = [_mean(x, on.double() / on.sum()) for on in (labels, ~labels)]
    even = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64, device=labels.device)
    centre = _mean(x, even)
    spread = (_mean(x, even, square=True) - centre.square()).clamp_min(0).sqrt()
    return ((means[0] - means[1]).abs() / _floored(spread, centre)).float()


def raw_difference(x: Rows, labels: Bool[Tensor, " rows"]) -> Float[Tensor, " d"]:
    """By how much the classes' means lie apart in each coordinate, in its own units; at least 0.

    SAEBench's choice of features (Karvonen et al. 2025, 2503.09532): what is loud comes before what is telling.
    """
    check_rows(x, labels)
    sign = torch.where(labels, 1 / labels.sum(), -1 / (~labels).sum()).double()
    return _mean(x, sign).abs().float()


def l1_path(x: Rows, labels: Bool[Tensor, " rows"]) -> Float[Tensor, " d"]:
    """How strong an L1 penalty may be before a coordinate's weight is 0, over the strongest that leaves any; in [0, 1].

    The path is that of least squares on the labels (the lasso), over the ``CANDIDATES`` of the largest mean difference.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    some, read, out = _candidates(x, labels)
    if not len(some):
        return out
    target = labels.cpu().double() - labels.double().mean().item()
    largest = (read.T @ target).abs().max().item() / len(read)  # that leaves any
    penalties = largest * np.geomspace(1, SMALLEST, STEPS)
    with (
        warnings.catch_warnings()
    ):  # where coordinates are nearly one, their order is settled before their weights are
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, weights, _ = lasso_path(read.numpy(), target.numpy(), alphas=penalties, max_iter=ITERATIONS)
    on = torch.from_numpy(weights != 0)
    entered = torch.from_numpy(penalties)[on.int().argmax(1)].where(on.any(1), 0.0)
    # at the path's first point nothing is on yet, and what comes together is told apart by its weight at the end
    size = torch.from_numpy(weights[:, -1]).abs()
    out[some.cpu()] = (entered / penalties[0] + 1e-6 * size / max(size.max().item(), 1e-12)).float().clamp_max(1.0)  # fmt: skip
    return out


def mutual_information(x: Rows, labels: Bool[Tensor, " rows"]) -> Float[Tensor, " d"]:
    """What a coordinate tells of the label, in bits: of it being 0, else in which of ``BINS`` bins of as many rows it lies.

    Equal values lie in one bin. The estimate is of the rows' own frequencies, which tell about BINS / (2 n ln 2) bits too
    much of a coordinate that is nowhere 0.
    """
    check_rows(x, labels)
    codes = x if isinstance(x, Codes) else Codes.from_dense(x)
    row, cell = binned(codes, BINS)
    own, size = labels[row], codes.n_features * BINS
    tables = torch.stack([torch.bincount(cell[own == say], minlength=size).view(-1, BINS) for say in (False, True)], 1)  # fmt: skip
    totals = torch.stack([(~labels).sum(), labels.sum()])
    tables = torch.cat([tables, (totals - tables.sum(2))[..., None]], 2).double() / len(labels)
    alone = tables.sum(1, keepdim=True) * (totals.double() / len(labels))[:, None]
    return torch.special.xlogy(tables, tables / alone.clamp_min(1e-300)).sum((1, 2)).clamp_min(0).div(np.log(2)).float()  # fmt: skip


def binned(codes: Codes, bins: int) -> tuple[Int[Tensor, " active"], Int[Tensor, " _"]]:
    """Of each value that isn't 0 its row, and its cell, feature x bins + bin: a bin holds as many of a feature's values as
    another, and equal values lie in one."""
    on = codes.values != 0
    feature, value, row = codes.indices[on].long(), codes.values[on].detach(), codes.row_ids()[on]
    order = value.argsort(stable=True)
    order = order[feature[order].argsort(stable=True)]
    feature, value = feature[order], value[order]
    counts = torch.bincount(feature, minlength=codes.n_features)
    place = torch.arange(len(feature), device=feature.device)
    again = torch.zeros_like(feature, dtype=torch.bool)
    again[1:] = (feature[1:] == feature[:-1]) & (value[1:] == value[:-1])
    first = place.masked_fill(again, 0).cummax(0).values  # of equal values
    begin = counts.cumsum(0) - counts
    return row[order], feature * bins + (first - begin[feature]) * bins // counts[feature]


def halving(x: Rows, labels: Bool[Tensor, " rows"]) -> Float[Tensor, " d"]:
    """How long a coordinate stays where probes are fitted again and again to the half of the largest weights; in [0, 1].

    Adaptive thresholding of Gurnee et al. 2023, from the ``CANDIDATES`` of the largest mean difference down to one
    coordinate. A coordinate that was among the last s, of standardised weight w, has (1 + |w| / max |w|) / (2 s).
    """
    some, read, out = _candidates(x, labels)
    left = torch.arange(len(some))
    while len(left):
        weight = _regression(read[:, left], labels.cpu(), HALVED)[0].abs()
        out[some.cpu()[left]] = ((1 + weight / weight.max().clamp_min(1e-300)) / (2 * len(left))).float()
        left = left[weight.sort(descending=True, stable=True).indices[: len(left) // 2].sort().values]
    return out


def _candidates(x: Rows, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The coordinates of the largest mean difference, their standardised values, and a score of 0 for each coordinate."""
    first = mean_difference(x, labels).sort(descending=True, stable=True)
    some = first.indices[: min(CANDIDATES, int((first.values > FLOOR).sum()))]
    read = columns(x, some).detach().cpu().double()
    centre = read.mean(0)
    return some, (read - centre) / _floored(read.std(0, correction=0), centre), torch.zeros(len(first.values))


def f1(said: Bool[Tensor, " rows"], labels: Bool[Tensor, " rows"]) -> float:
    """Harmonic mean of the share of what was said that is true and of what is true that was said; 0 where nothing is both."""
    right = int((said & labels).sum())
    return 2 * right / max(1, int(said.sum()) + int(labels.sum()))


def _mean(x: Rows, weights: Float[Tensor, " rows"], square: bool = False) -> Float[Tensor, " d"]:
    """Weighted sum of rows, or of their squares; of codes it takes the entries alone."""
    if isinstance(x, Tensor):
        own = x.double()
        return weights @ (own.square() if square else own)
    values = x.values.detach().double()
    values = (values.square() if square else values) * weights[x.row_ids()]
    return values.new_zeros(x.n_features).index_add(0, x.indices.long(), values)


def _floored(spread: Float[Tensor, " d"], mean: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Standard deviations to divide by: coordinates that don't vary stay as they are."""
    return spread.where(spread > FLOOR * torch.hypot(spread, mean), 1.0)


def _fitted(
    x: Float[Tensor, "rows d"], labels: Tensor, held_out: "tuple[Tensor, Tensor] | None", seed: int, chosen: Tensor | None
) -> Probe:  # fmt: skip
    rows, own = x.detach().cpu().double(), labels.cpu()
    if held_out is None:
        kept = _drawn(own, seed)
        penalty = _penalty((rows[~kept], own[~kept]), (rows[kept], own[kept]))
    else:
        check_rows(*held_out)
        penalty = _penalty((rows, own), (held_out[0].detach().cpu().double(), held_out[1].cpu()))
    weight, bias = _regression(rows, own, penalty)
    return Probe(
        weight.to(x.device, x.dtype if x.is_floating_point() else torch.float32),
        bias,
        penalty,
        None if chosen is None else chosen.to(x.device),
    )


def _held_out(held_out: Labelled | None, x: Rows, chosen: Tensor | None) -> "tuple[Tensor, Tensor] | None":
    if held_out is None:
        return None
    if _width(held_out[0]) != _width(x):
        raise SaekitError(f"held_out is {_width(held_out[0])} wide, and x {_width(x)}; give the same coordinates")  # fmt: skip
    return columns(held_out[0], chosen), held_out[1]


def _drawn(labels: Bool[Tensor, " rows"], seed: int) -> Bool[Tensor, " rows"]:
    """A fifth of each class, at least one row."""
    generator, kept = torch.Generator().manual_seed(seed), torch.zeros_like(labels)
    for own in (labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]):
        kept[own[torch.randperm(len(own), generator=generator)[: max(1, len(own) // 5)]]] = True
    return kept


def _penalty(fitted: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor]) -> float:
    """The penalty of the least loss on what is judged, where classes weigh the same; the stronger of equals."""
    (x, labels), losses = judged, []
    for penalty in PENALTIES:
        weight, bias = _regression(*fitted, penalty)
        each = torch.nn.functional.softplus((1 - 2 * labels.double()) * (x @ weight + bias))
        losses.append((each[labels].mean() + each[~labels].mean()).item())
    return PENALTIES[losses.index(min(losses))]


def _regression(x: Float[Tensor, "rows d"], labels: Tensor, penalty: float) -> tuple[Tensor, float]:
    """Weights and bias for x as it is, of the minimum over standardised x of mean loss + penalty / 2 ||w||^2."""
    from sklearn.linear_model import LogisticRegression

    centre = x.mean(0)
    scale = _floored(x.std(0, correction=0), centre)
    solver = "newton-cholesky" if x.shape[1] <= NARROW else "lbfgs"
    model = LogisticRegression(C=1 / (penalty * len(x)), class_weight="balanced", max_iter=ITERATIONS, solver=solver)  # fmt: skip
    with warnings.catch_warnings():  # it then goes on by another solver, which says whether it gets there
        warnings.filterwarnings("ignore", "Line search of Newton solver")
        model.fit(((x - centre) / scale).numpy(), labels.numpy())
    weight = torch.from_numpy(model.coef_[0]) / scale
    return weight, float(model.intercept_[0] - (weight @ centre).item())


def check_bools(name: str, labels: Any) -> None:
    """Raise unless labels are bools: of others ``~`` isn't what is false."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
        kind = str(getattr(labels, "dtype", type(labels).__name__)).removeprefix("torch.")
        raise SaekitError(f"{name} are {kind}; give a tensor of bools, as in {name} == 1")


def _check_labels(labels: Tensor, rows: int, least: int) -> None:
    check_bools("labels", labels)
    if labels.ndim != 1 or len(labels) != rows:
        raise SaekitError(f"labels have shape {tuple(labels.shape)}, and there are {rows} rows; give one label a row")  # fmt: skip
    for name, n in (("true", int(labels.sum())), ("false", int((~labels).sum()))):
        if n < least:
            raise SaekitError(f"labels are {name} in {n} rows; give at least {least} of each class")


def check_rows(x: Rows, labels: Tensor) -> None:
    """Raise unless all values are finite and each class has two rows or more."""
    if isinstance(x, Tensor) and x.ndim != 2:
        raise SaekitError(f"x has shape {list(x.shape)}; give [rows, d]")
    _check_labels(labels, x.rows if isinstance(x, Codes) else len(x), 2)
    values = x.values if isinstance(x, Codes) else x
    if not values.isfinite().all():
        raise SaekitError("x holds NaN or Inf; remove its row")
