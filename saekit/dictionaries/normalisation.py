"""Normalisation of what a dictionary reads or writes: centred, and scaled or whitened; folds away exactly."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.registry import nearest
from saekit.types import SaekitError

KINDS = ("none", "centre", "scale", "whiten")
ROWS = ("row_std", "row_norm")  # by each row's own statistics, which no weights can fold
EPS = 1e-5  # beside a row's standard deviation
FLOOR = 1e-4  # of the mean variance: directions with less are not blown up further


def check_kind(kind: str, more: Sequence[str] = ()) -> None:
    """Raise unless it is a kind of normalisation, of those that fold or of those named."""
    if kind not in (*KINDS, *more):
        raise SaekitError(f"normalise {kind!r} is unknown{nearest(kind, [*KINDS, *more])}")


class Normalisation(nn.Module):
    """``(x - mean) * scale``, after which rows have a mean squared norm of d; ``(x - mean) W`` for whitening.

    Where nothing is normalised ``mean`` is for whoever asks: a folded dictionary keeps that of its data.
    ``parts`` are the widths of what stands side by side in a row, each with a scale of its own. ``none``
    leaves rows as they are and ``centre`` only takes the mean off. Whitening (as SAELens'
    covariance whitening, 2511.13981) is symmetric (ZCA), so that directions stay recognisable.

    ``row_std`` first standardises each row by its own mean and unbiased standard deviation (+ 1e-5, as SAELens'
    "layer_norm" and OpenAI's), ``row_norm`` scales each to the norm sqrt(d) (SAELens' "constant_norm_rescale"). Neither
    is fitted, nor folds; outputs are brought back by the statistics of the row that was read.
    """

    mean: Tensor
    scale: Tensor
    whitening: Tensor
    unwhitening: Tensor
    fitted: Tensor

    def __init__(self, parts: Sequence[int], kind: str):
        super().__init__()
        self.parts, self.kind = tuple(parts), kind
        d = sum(self.parts)
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(() if len(self.parts) == 1 else d))
        self.register_buffer("fitted", torch.tensor(kind == "none" or kind in ROWS))
        if kind == "whiten":
            self.register_buffer("whitening", torch.eye(d))
            self.register_buffer("unwhitening", torch.eye(d))

    def forward(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Rows in normalised space."""
        if self.kind == "none":
            return x
        if self.by_rows:
            mean, size = self.statistics(x)
            x = (x - mean) / (size + EPS if self.kind == "row_std" else size)
        centred = x - self.mean
        return centred @ self.whitening.to(x.dtype) if self.kind == "whiten" else centred.mul_(self.scale)

    @property
    def by_rows(self) -> bool:
        """Whether rows are normalised by statistics of their own."""
        return self.kind in ROWS

    def statistics(self, x: Float[Tensor, "rows d"]) -> tuple[Tensor, Tensor]:
        """Mean and size [rows, 1] of raw rows, by which their outputs are brought back."""
        if self.kind == "row_std":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-30)
        return torch.zeros_like(norm), norm / x.shape[-1] ** 0.5

    def some(self, first: int, stop: int) -> "Normalisation":
        """The normalisation of some of the parts."""
        out = Normalisation(self.parts[first:stop], self.kind).to(self.mean)
        at = slice(sum(self.parts[:first]), sum(self.parts[:stop]))
        out.mean.copy_(self.mean[at])
        here = self.scale[at] if self.scale.ndim else self.scale
        out.scale.copy_(here if out.scale.ndim else here.reshape(-1)[0])
        out.fitted.copy_(self.fitted)
        return out

    def invert(
        self, y: Float[Tensor, "rows d"], x: Float[Tensor, "rows d"] | None = None
    ) -> Float[Tensor, "rows d"]:
        """Rows back in the units of the data; ``x`` are the raw rows that were read, where each has its own units."""
        if not self.by_rows:
            return self.unscaled(y)
        if x is None:
            raise SaekitError(
                f"x is not given, and normalise = {self.kind!r} brings outputs back by the rows that were read; decode(codes, x)"
            )
        mean, size = self.statistics(x)
        return self.unscaled(y) * size + mean

    def unscaled(self, y: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Rows without mean and scale; in the units of the data, but for what depends on the row."""
        return y if self.kind == "none" else self.directions(y) + self.mean

    def directions(self, rows: Float[Tensor, "feature d"]) -> Float[Tensor, "feature d"]:
        """Directions that are written in normalised space, in the units of the data."""
        return rows @ self.unwhitening.to(rows.dtype) if self.kind == "whiten" else rows / self.scale

    def fold(
        self, weight: Float[Tensor, "feature d"], x: Float[Tensor, "feature d"] | None = None
    ) -> tuple[Float[Tensor, "feature d"], Float[Tensor, " feature"]]:
        """``(weight', bias)`` of float64 with ``weight' x + bias = weight normalised(x)``.

        Where each row has its own statistics, they are those of ``x``, one raw row for each of the weights, held
        fixed; without ``x`` what a row is standardised by stays out of the weights.
        """
        weight = weight.double()
        if self.kind == "none":
            return weight, weight.new_zeros(len(weight))
        weight = weight @ self.whitening.double().T if self.kind == "whiten" else weight * self.scale.double()
        bias = -weight @ self.mean.double()
        if x is None or not self.by_rows:
            return weight, bias
        mean, size = self.statistics(x.double())
        weight = weight / (size + EPS if self.kind == "row_std" else size)
        return weight, bias - weight.sum(1) * mean[:, 0]

    def normalised(self, rows: Float[Tensor, "feature d"]) -> Float[Tensor, "feature d"]:
        """Directions in the units of the data, as they are written in normalised space."""
        return rows @ self.whitening.to(rows.dtype) if self.kind == "whiten" else rows * self.scale

    def unfold(
        self, weight: Float[Tensor, "feature d"]
    ) -> tuple[Float[Tensor, "feature d"], Float[Tensor, " feature"]]:
        """``(weight', bias)`` of float64 with ``weight' normalised(x) + bias = weight x``: undoes :meth:`fold`."""
        weight = weight.double()
        if self.kind == "none":
            return weight, weight.new_zeros(len(weight))
        bias = weight @ self.mean.double()
        whole = self.unwhitening.double().T if self.kind == "whiten" else 1 / self.scale.double()
        return weight @ whole if self.kind == "whiten" else weight * whole, bias

    @torch.no_grad()
    def fit(self, moments: "Moments") -> None:
        """Take it from the moments of rows of the data."""
        self.fitted.fill_(True)
        if self.kind == "none" or self.by_rows or moments.n == 0:
            return
        self.mean.copy_(moments.mean())
        if self.kind == "scale":
            variances = [part.sum().item() for part in moments.variance().split(self.parts)]
            sizes = zip(self.parts, variances, strict=True)
            scales = torch.tensor([math.sqrt(d / v) if v > 0 else 1.0 for d, v in sizes])
            if self.scale.ndim:
                scales = scales.repeat_interleave(torch.tensor(self.parts))
            self.scale.copy_(scales.view_as(self.scale))
        if self.kind == "whiten":
            values, vectors = torch.linalg.eigh(moments.covariance())
            spread = (values.clamp(min=0) + FLOOR * values.mean().clamp(min=1e-30)).sqrt()
            self.whitening.copy_(vectors / spread @ vectors.T)
            self.unwhitening.copy_(vectors * spread @ vectors.T)


class Moments:
    """Mean, variance and, on request, covariance of rows that come in batches; in fp64."""

    def __init__(self, covariance: bool = False):
        self.n, self.covariances = 0, covariance
        self._shift = self._total = self._products = self._square = torch.zeros(())

    @torch.no_grad()
    def add(self, x: Float[Tensor, "rows d"]) -> None:
        """Take a batch of rows in."""
        x = x.double().cpu()
        if self.n == 0:
            self._shift = x.mean(0)  # sums are taken about the first batch's mean: no cancellation
        centred = x - self._shift
        self.n += len(x)
        self._total = self._total + centred.sum(0)
        self._square = self._square + centred.square().sum(0)
        if self.covariances:
            self._products = self._products + centred.T @ centred

    def mean(self) -> Float[Tensor, " d"]:
        """Mean row."""
        return self._shift + self._total / self.n

    def variance(self) -> Float[Tensor, " d"]:
        """Of each column."""
        return self._square / self.n - (self._total / self.n).square()

    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance matrix."""
        off = self._total / self.n
        return self._products / self.n - torch.outer(off, off)
