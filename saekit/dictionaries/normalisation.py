"""Normalisation of what a dictionary reads or writes: centred, and scaled or whitened; folds away exactly."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.registry import nearest
from saekit.types import SaekitError

KINDS = ("none", "centre", "scale", "whiten")
FLOOR = 1e-4  # of the mean variance: directions with less are not blown up further


def check_kind(kind: str) -> None:
    """Raise unless it is a kind of normalisation."""
    if kind not in KINDS:
        raise SaekitError(f"normalise {kind!r} is unknown{nearest(kind, list(KINDS))}")


class Normalisation(nn.Module):
    """``(x - mean) * scale``, after which rows have a mean squared norm of d; ``(x - mean) W`` for whitening.

    Where nothing is normalised ``mean`` is for whoever asks: a folded dictionary keeps that of its data.
    ``parts`` are the widths of what stands side by side in a row, each with a scale of its own. ``none``
    leaves rows as they are and ``centre`` only takes the mean off. Whitening (as SAELens'
    covariance whitening, 2511.13981) is symmetric (ZCA), so that directions stay recognisable.
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
        self.register_buffer("fitted", torch.tensor(kind == "none"))
        if kind == "whiten":
            self.register_buffer("whitening", torch.eye(d))
            self.register_buffer("unwhitening", torch.eye(d))

    def forward(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Rows in normalised space."""
        if self.kind == "none":
            return x
        centred = x - self.mean
        return centred @ self.whitening.to(x.dtype) if self.kind == "whiten" else centred.mul_(self.scale)

    def some(self, first: int, stop: int) -> "Normalisation":
        """The normalisation of some of the parts."""
        out = Normalisation(self.parts[first:stop], self.kind).to(self.mean)
        at = slice(sum(self.parts[:first]), sum(self.parts[:stop]))
        out.mean.copy_(self.mean[at])
        here = self.scale[at] if self.scale.ndim else self.scale
        out.scale.copy_(here if out.scale.ndim else here.reshape(-1)[0])
        out.fitted.copy_(self.fitted)
        return out

    def invert(self, y: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Rows back in the units of the data."""
        if self.kind == "none":
            return y
        return self.directions(y) + self.mean

    def directions(self, rows: Float[Tensor, "feature d"]) -> Float[Tensor, "feature d"]:
        """Directions that are written in normalised space, in the units of the data."""
        return rows @ self.unwhitening.to(rows.dtype) if self.kind == "whiten" else rows / self.scale

    def fold(
        self, weight: Float[Tensor, "feature d"]
    ) -> tuple[Float[Tensor, "feature d"], Float[Tensor, " feature"]]:
        """``(weight', bias)`` of float64 with ``weight' x + bias = weight normalised(x)``."""
        weight = weight.double()
        if self.kind == "none":
            return weight, weight.new_zeros(len(weight))
        weight = weight @ self.whitening.double().T if self.kind == "whiten" else weight * self.scale.double()
        return weight, -weight @ self.mean.double()

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
        if self.kind == "none" or moments.n == 0:
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
