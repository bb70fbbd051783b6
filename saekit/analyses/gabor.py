"""How much a receptive field is a Gabor function: a wave under a Gaussian window (Ringach 2002; Rentzeperis et al. 2023).

``g(x, y) = exp(-1/2 (x'^2 / s_x^2 + y'^2 / s_y^2)) (p cos 2 pi f x' + q sin 2 pi f x')``, where ``x'`` runs across the
stripes and ``y'`` along them, from the window's centre. Eight parameters, fitted by Levenberg-Marquardt to all fields
at once, from the peak of each field's spectrum.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.errors import SaekitError

STEPS, PADDED = 60, 32  # of the descent; pixels a side, at least, of the spectra that it begins from
WIDTHS = (0.7, 1.4)  # of the windows begun with, over the field's own spread
LIKE = 0.7  # share of a field's variance about 0 that makes it Gabor-like,
WAVE = 0.02  # where this share of the fit or more has either sign: with half a cycle under its window it has only one


@dataclass(frozen=True)
class Gabors:
    """Of each field: ``r2``, the share of its square that its Gabor explains (at most 1); ``centre`` (y, x) and
    ``sigma`` (across, along the stripes) in pixels; ``theta`` of the wave, in radians in [0, pi); ``frequency`` in cycles a pixel;
    ``lesser``, the share of the Gabor's square, on the field's pixels, where it has the rarer sign: 0 of a blob, 1/2 of an edge.
    """

    r2: Float[Tensor, " field"]
    centre: Float[Tensor, "field 2"]
    sigma: Float[Tensor, "field 2"]
    theta: Float[Tensor, " field"]
    frequency: Float[Tensor, " field"]
    lesser: Float[Tensor, " field"]

    @property
    def like(self) -> float:
        """Share of the fields of which a Gabor explains ``LIKE``, and whose Gabor is more than its window."""
        return ((self.r2 >= LIKE) & (self.lesser >= WAVE)).double().mean().item()


def fit_gabors(fields: Float[Tensor, "field h w"]) -> Gabors:
    """The Gabor nearest to each field; a constant is no wave, so means are not taken off. Refuses fields of nothing but 0."""
    check_axes("fields", fields, "field", "h", "w")
    if len(fields) == 0 or min(fields.shape[1:]) < 3:
        raise SaekitError(f"fields have shape {tuple(fields.shape)}; give at least one, of 3 x 3 pixels or more")  # fmt: skip
    fields = fields.detach().cpu().double()
    size = fields.flatten(1).norm(dim=1)
    bad = ~(size.isfinite() & (size > 0))
    if bad.any():
        raise SaekitError(f"field {int(bad.nonzero()[0])} holds NaN or Inf, or nothing but 0; leave it out")
    unit = fields / size[:, None, None]
    tries = [_descend(unit, _start(unit, width)) for width in WIDTHS]
    left = torch.stack([t[1] for t in tries])
    best = torch.stack([t[0] for t in tries])[left.argmin(0), torch.arange(len(unit))]
    fitted = gabor(best, *_pixels(unit))[0]
    sides = torch.stack([side.square().sum(1) for side in (fitted.clamp_min(0), fitted.clamp_max(0))])
    y, x, across, along, theta, f, _, _ = best.T
    return Gabors(
        1 - left.amin(0), torch.stack([y, x], 1), torch.stack([across, along], 1).exp(),
        theta.remainder(math.pi), f.exp(), sides.amin(0) / sides.sum(0),
    )  # fmt: skip


def gabor(
    p: Float[Tensor, "field 8"], y: Float[Tensor, " pixel"], x: Float[Tensor, " pixel"]
) -> tuple[Float[Tensor, "field pixel"], Float[Tensor, "field pixel 8"]]:
    """The functions of (centre y, x, log widths across and along, angle, log frequency, p, q), and their derivatives."""
    cy, cx, wide, long, theta, log_f, cosine, sine = p.T[..., None]
    dy, dx, c, s = y - cy, x - cx, theta.cos(), theta.sin()
    across, along = dx * c + dy * s, dy * c - dx * s
    a, b = across / wide.exp(), along / long.exp()
    window, k = torch.exp(-0.5 * (a**2 + b**2)), 2 * math.pi * log_f.exp()
    even, odd = window * (k * across).cos(), window * (k * across).sin()
    g, turned = (
        cosine * even + sine * odd,
        sine * even - cosine * odd,
    )  # the wave, and a quarter of a period on
    by_across, by_along = k * turned - g * a / wide.exp(), -g * b / long.exp()
    slopes = (
        -s * by_across - c * by_along, s * by_along - c * by_across, g * a**2, g * b**2,
        along * by_across - across * by_along, turned * k * across, even, odd,
    )  # fmt: skip
    return g, torch.stack(slopes, -1)


def _pixels(fields: Tensor) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in fields.shape[1:]), indexing="ij")
    return y.flatten(), x.flatten()


def _start(fields: Tensor, width: float) -> Tensor:
    """Parameters [field, 8] from the spectrum's peak and the moments of the square; the wave's size by least squares."""
    y, x = _pixels(fields)
    square = fields.flatten(1).square()
    cy, cx = square @ y, square @ x
    spread = ((square @ (y**2 + x**2) - cy**2 - cx**2) / 2).clamp_min(0.25).sqrt() * width
    n = 2 * math.ceil(max(PADDED, *fields.shape[1:]) / 2)
    power = torch.fft.fft2(fields, s=(n, n)).abs()[:, :, : n // 2]
    peak = power.flatten(1).argmax(1)
    fy = torch.fft.fftfreq(n, dtype=torch.float64)[peak // (n // 2)]
    fx = (peak % (n // 2)).double() / n
    f = torch.hypot(fy, fx).clamp_min(0.5 / n)
    p = torch.stack([cy, cx, spread.log(), spread.log(), torch.atan2(fy, fx), f.log()], 1)
    waves = gabor(torch.cat([p, torch.ones(len(p), 2)], 1), y, x)[1][..., 6:]
    gram = waves.mT @ waves + 1e-9 * torch.eye(2, dtype=torch.float64)
    pq = torch.linalg.solve(gram, waves.mT @ fields.flatten(1)[..., None])[..., 0]
    return torch.cat([p, pq], 1)


def _descend(fields: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt of each field by itself: parameters, and the square that they leave."""
    y, x = _pixels(fields)
    target = fields.flatten(1)
    damping = torch.full((len(p),), 1e-2, dtype=torch.float64)
    now, jacobian = gabor(p, y, x)
    left = (target - now).square().sum(1)
    for _ in range(STEPS):
        gram = jacobian.mT @ jacobian
        diagonal = gram.diagonal(dim1=1, dim2=2) * damping[:, None] + 1e-9
        toward = jacobian.mT @ (target - now)[..., None]
        step = torch.linalg.solve(gram + torch.diag_embed(diagonal), toward)[..., 0]
        tried = p + step.clamp(-1.0, 1.0)
        there, slopes = gabor(tried, y, x)
        after = (target - there).square().sum(1)
        better = after < left  # never of NaN
        now, jacobian = (
            torch.where(better[:, None], there, now),
            torch.where(better[:, None, None], slopes, jacobian),
        )
        p, left = torch.where(better[:, None], tried, p), torch.where(better, after, left)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-9, 1e9)
    return p, left
