"""Convolutional sparse coding: an image as a sum of kernels at few places (Ladret, Casanova and Perrinet 2023).

``min_z 1/2 ||x - sum_k d_k * z_k||^2 + w sum_k ||z_k||_1``, where ``*`` is circular convolution and every kernel has a
map ``z_k`` as large as the image; a kernel's first pixel falls on the place of its code. It is solved by ADMM, whose
linear step is one row a frequency in the Fourier domain (Bristow, Eriksson and Lucey 2013; Wohlberg 2014). Kernels that
are much alike, as oriented ones are, make proximal gradient steps so slow that hundreds of them leave several times as
many codes active as the minimum has. ADMM's objective may rise, so of its sparse iterates the best is kept: what is
returned never gets worse by more steps. Kernels are log-Gabors (Fischer et al. 2007), and are learnt online, an image at a time.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Real
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.errors import SaekitError

RELAXED, LEAST = 1.8, 1e-3  # over-relaxation of ADMM; the least weight that its step is chosen by
FORGOTTEN = 0.1  # share of the past, at each image of learning
PADDED = 64  # pixels a side of the spectra that bandwidths are read from


@dataclass(frozen=True)
class Maps:
    """Codes of images, and the ``objective`` of each image before the first step and after each."""

    codes: Float[Tensor, "image kernel h w"]
    objective: Float[Tensor, "steps image"]

    @property
    def zeros(self) -> float:
        """Share of the codes that are 0: the sparseness."""
        return (self.codes == 0).double().mean().item()


def convolved(codes: Float[Tensor, "image kernel h w"], kernels: Float[Tensor, "kernel a b"]) -> Float[Tensor, "image h w"]:  # fmt: skip
    """``sum_k d_k * z_k``, around the edges; differentiable in both."""
    shape = codes.shape[2:]
    _check(kernels, shape)
    spectrum = torch.einsum("nkyx,kyx->nyx", torch.fft.rfft2(codes), torch.fft.rfft2(kernels, s=shape))
    return torch.fft.irfft2(spectrum, s=shape)


@torch.no_grad()
def code(
    images: Real[Tensor, "image h w"], kernels: Float[Tensor, "kernel a b"], weight: float, steps: int = 200
) -> Maps:
    """Codes of images after ``steps`` steps from 0; ``weight`` is in the images' units times a kernel's norm.

    Memory: about 8 maps of [image, kernel, h, w].
    """
    check_axes("images", images, "image", "h", "w")
    shape = images.shape[1:]
    _check(kernels, shape)
    if not 0 <= weight < math.inf or steps < 1:
        raise SaekitError(f"weight = {weight} must be at least 0, and steps = {steps} at least 1")
    if len(images) == 0 or not images.isfinite().all():
        raise SaekitError(f"images have shape {tuple(images.shape)}, or hold NaN or Inf; give at least one of finite pixels")  # fmt: skip
    images = images.to(kernels)  # pixels may be integers
    d, x = torch.fft.rfft2(kernels, s=shape), torch.fft.rfft2(images)
    # codes are of the images' size: a step that shrinks by their deviation finds few, and soon
    size = images.square().mean((1, 2)).sqrt()
    rho = (max(weight, LEAST) / size.clamp_min(1e-12))[:, None, None]
    shrink, power = weight / rho[:, None], d.abs().square().sum(0)
    best = codes = images.new_zeros(len(images), len(kernels), *shape)
    dual, codes_f, dual_f = torch.zeros_like(codes), torch.fft.rfft2(codes), torch.fft.rfft2(codes)
    made, made_dual = torch.zeros_like(x), torch.zeros_like(x)  # sum_k d_k of codes_f and of dual_f
    objective = [images.square().sum((1, 2)) / 2]
    for _ in range(steps):
        # (d* d + rho) z = d* x + rho near, of rank one: what near = codes - dual leaves of x, shared out among the kernels;
        # what over-relaxation makes of it, relaxed z + (1 - relaxed) codes, is codes - relaxed dual and that share
        left = RELAXED * (x - made + made_dual) / (rho + power)
        linear = torch.sub(codes_f, dual_f, alpha=RELAXED).addcmul_(d.conj(), left[:, None])
        raised = torch.fft.irfft2(linear, s=shape).add_(dual)
        dual = raised.clamp(-shrink, shrink)
        codes = raised.sub_(dual)
        codes_f = torch.fft.rfft2(codes)
        dual_f.add_(linear).sub_(codes_f)
        now = torch.einsum("nkyx,kyx->nyx", codes_f, d)
        made, made_dual = now, made + (1 - RELAXED) * made_dual + power * left - now
        rest = torch.fft.irfft2(x - made, s=shape)
        cost = rest.square().sum((1, 2)) / 2 + weight * torch.linalg.vector_norm(codes, 1, (1, 2, 3))
        better = cost <= objective[-1]
        best = codes if better.all() else torch.where(better[:, None, None, None], codes, best)
        objective.append(torch.minimum(cost, objective[-1]))
    return Maps(best, torch.stack(objective))


def log_gabors(
    size: int,
    orientations: int,
    bandwidths: "tuple[float, ...] | list[float]",
    frequency: float = 0.2,
    spread: float = 0.5,
) -> Float[Tensor, "kernel size size"]:
    """Oriented kernels of norm 1: each bandwidth at each of the evenly spaced orientations, as a cosine and as a sine.

    In the Fourier domain ``exp(-log(f / frequency)^2 / (2 spread^2)) exp(cos(2 (theta - theta_0)) / (4 B^2))``, with
    ``frequency`` in cycles a pixel, ``spread`` that of its natural logarithm (low frequencies, which a wide one lets in, are cut off by the window, and widen narrow bandwidths), and the orientation bandwidth B in radians; the window cuts off what is farther than half its size.
    """
    if not (0 < frequency <= 0.5 and 0 < spread < math.inf):
        raise SaekitError(f"frequency = {frequency} must lie in (0, 0.5] cycles a pixel, and spread = {spread} be above 0")  # fmt: skip
    if size < 3 or orientations < 1 or not bandwidths or not all(0 < b < math.inf for b in bandwidths):
        raise SaekitError(f"size = {size}, orientations = {orientations} and bandwidths = {tuple(bandwidths)} must be at least 3, 1 and above 0")  # fmt: skip
    n = 4 * size
    fy, fx = torch.fft.fftfreq(n)[:, None], torch.fft.fftfreq(n)[None]
    f = torch.hypot(fy, fx).clamp_min(1e-9)
    radial = torch.exp(-((f / frequency).log() ** 2) / (2 * spread**2))
    out = []
    for bandwidth in bandwidths:
        for i in range(orientations):
            theta = math.pi * i / orientations
            angle = torch.atan2(fy, fx) - theta
            around = radial * torch.exp(((2 * angle).cos() - 1) / (4 * bandwidth**2))
            # one half of the plane alone makes the pair that is a quarter of a period apart
            pair = torch.fft.fftshift(torch.fft.ifft2(around * (angle.cos() > 0)))
            low = (n - size) // 2
            cut = pair[low : low + size, low : low + size]
            out += [cut.real, cut.imag]
    kernels = torch.stack(out)
    kernels = kernels - kernels.mean((1, 2), keepdim=True)
    return kernels / kernels.flatten(1).norm(dim=1)[:, None, None]


def bandwidths(kernels: Float[Tensor, "kernel a b"]) -> Float[Tensor, " kernel"]:
    """Orientation bandwidth of each kernel, in degrees: the circular standard deviation of its power over orientations.

    ``1/2 sqrt(-2 log |sum P e^(2 i theta)| / sum P)``: 0 of one orientation, large where all are alike.
    """
    if not kernels.isfinite().all() or not kernels.flatten(1).any(1).all():
        raise SaekitError("kernels hold NaN or Inf, or one that is 0 everywhere; leave those out")
    size = max(PADDED, *kernels.shape[1:])
    power = torch.fft.fft2(kernels.detach().cpu().double(), s=(size, size)).abs().square()
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    twice = 2 * torch.atan2(f[:, None], f[None])
    power[:, 0, 0] = 0  # of no orientation
    total = power.sum((1, 2)).clamp_min(1e-300)
    along = torch.hypot((power * twice.cos()).sum((1, 2)), (power * twice.sin()).sum((1, 2))) / total
    return torch.rad2deg((-2 * along.clamp(1e-12, 1.0).log()).sqrt() / 2)


def learn(
    images: Float[Tensor, "image h w"], kernels: Float[Tensor, "kernel a b"], weight: float, steps: int = 60
) -> Float[Tensor, "kernel a b"]:
    """Kernels after one look at each image: its codes are found, then each kernel steps towards what these leave.

    A kernel's step is 1 over the square of its codes so far, which are forgotten by ``FORGOTTEN`` an image (as in online
    dictionary learning, Mairal et al. 2009), so that one that is rarely used isn't led by one place. Norms stay 1.
    """
    own, used = kernels.detach().clone(), kernels.new_zeros(len(kernels))
    for image in images:
        codes = code(image[None], own, weight, steps).codes
        square = codes.square().sum((0, 2, 3))
        used = (1 - FORGOTTEN) * used + square
        own.requires_grad_()
        cost = (image - convolved(codes, own)[0]).square().sum() / 2
        (slope,) = torch.autograd.grad(cost, own)
        # a mean kernel's share for all, so that the first codes of one don't replace it
        own = own.detach() - slope / (used + used.mean()).clamp_min(1e-12)[:, None, None]
        own /= own.flatten(1).norm(dim=1)[:, None, None]
    return own


def _check(kernels: Tensor, shape: "torch.Size | tuple[int, ...]") -> None:
    if len(kernels) == 0 or kernels.shape[1] > shape[0] or kernels.shape[2] > shape[1]:
        raise SaekitError(f"kernels have shape {tuple(kernels.shape)}, and images {tuple(shape)}; give at least one that is no larger")  # fmt: skip
    norms = kernels.detach().flatten(1).norm(dim=1)
    if not (norms.isfinite() & (norms > 0)).all():
        raise SaekitError("kernels hold NaN or Inf, or one of nothing but 0; leave it out")
