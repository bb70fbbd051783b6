"""Sparse autoencoders whose atoms are functions (Tolooshams, Shen and Anandkumar 2025, 2509.03738).

Codes come of unrolled steps ``z <- relu(z + a (D^T (x - D z) - weight))`` from 0, with ``a = 1 / ||D||^2``. D is
a matrix (:class:`Lifted`), or circular convolution of signals on a ring with a map of codes for each atom
(:class:`Convolutional`, :class:`Fourier`): ``x = F^-1(sum_c W_c(f) z_c(f))`` in the Fourier domain. What W is of
differs. A kernel is so many samples, whatever a sample's length. A function's W has ``modes`` frequencies, the same
numbers at any resolution, which makes D an integral operator: codes are functions too, and what is found at n samples
is found at 2 n.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from saekit.analyses.axes import check_axes
from saekit.errors import SaekitError

FLOOR = 1e-4  # of a kernel's norm: what its modes hold below it is rounding


class _Convolving(nn.Module, ABC):
    """Inference that is shared; ``spectrum(n)`` gives each atom's W of [atom, n // 2 + 1] for n samples."""

    def __init__(self, weight: float, steps: int):
        super().__init__()
        _check(weight, steps)
        self.weight, self.steps = weight, steps

    @abstractmethod
    def spectrum(self, n: int) -> Complex[Tensor, "atom f"]:
        """W on n samples."""

    def encode(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows atom n"]:
        """Maps of codes, one value a sample, of at least 0; differentiable."""
        _check_rows(x)
        w, x_f = self.spectrum(x.shape[1]), torch.fft.rfft(x)
        a = _step(w.detach().abs().square().sum(0).max())
        z_f = torch.zeros(len(x), *w.shape, dtype=x_f.dtype, device=x.device)
        z = x.new_zeros(len(x), len(w), x.shape[1])
        for _ in range(self.steps):
            left = x_f - torch.einsum("rcf,cf->rf", z_f, w)
            back = torch.fft.irfft(w.conj() * left[:, None], n=x.shape[1])
            z = (z + a * (back - self.weight)).relu()
            z_f = torch.fft.rfft(z)
        return z

    @torch.no_grad()
    def pursue(self, x: Float[Tensor, "rows n"], k: Int[Tensor, " _"]) -> Float[Tensor, "rows atom n"]:
        """Maps of at most ``k`` codes each: one at a time, the atom and place that explain most of what is left (matching pursuit)."""
        _check_rows(x)
        if len(k) != len(x) or (k < 0).any():
            raise SaekitError(f"k has {len(k)} numbers for {len(x)} rows, or one below 0; give each row a number of codes")  # fmt: skip
        w, x_f = self.spectrum(x.shape[1]), torch.fft.rfft(x)
        length = torch.fft.irfft(w, n=x.shape[1]).norm(dim=1)
        z, left = x.new_zeros(len(x), len(w), x.shape[1]), x_f
        for step in range(int(k.max())):
            fits = torch.fft.irfft(w.conj() * left[:, None], n=x.shape[1]) / length[:, None]
            best = fits.flatten(1).max(1)
            size = best.values.clamp_min(0) / length[best.indices // x.shape[1]] * (k > step)
            z.flatten(1).scatter_add_(1, best.indices[:, None], size[:, None])
            left = x_f - torch.einsum("rcf,cf->rf", torch.fft.rfft(z), w)
        return z

    def decode(self, z: Float[Tensor, "rows atom n"]) -> Float[Tensor, "rows n"]:
        """The signals that maps stand for."""
        n = z.shape[2]
        return torch.fft.irfft(torch.einsum("rcf,cf->rf", torch.fft.rfft(z), self.spectrum(n)), n=n)

    def on(self, n: int) -> Float[Tensor, "atom n"]:
        """Each atom as n samples, of norm 1."""
        return nn.functional.normalize(torch.fft.irfft(self.spectrum(n), n=n), dim=1)


class Convolutional(_Convolving):
    """Kernels of so many samples; the first falls on the place of its code."""

    def __init__(self, kernels: Float[Tensor, "atom width"], weight: float, steps: int):
        super().__init__(weight, steps)
        _check_atoms("kernels", kernels)
        self.kernels = nn.Parameter(kernels.clone())

    def spectrum(self, n: int) -> Complex[Tensor, "atom f"]:
        """W on n samples, which may not be fewer than a kernel's."""
        if n < self.kernels.shape[1]:
            raise SaekitError(f"signals have {n} samples, and kernels {self.kernels.shape[1]}; give longer signals")  # fmt: skip
        return torch.fft.rfft(self.kernels, n=n)

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring each kernel to norm 1."""
        self.kernels.div_(self.kernels.norm(dim=1, keepdim=True))


class Fourier(_Convolving):
    """Functions of frequencies 0 to ``modes``, from kernels on the n samples where their norm is 1.

    An n of ``2 modes`` holds the highest frequency only in part: with all modes, use it at n alone.
    """

    def __init__(self, kernels: Float[Tensor, "atom n"], modes: int, weight: float, steps: int):
        super().__init__(weight, steps)
        _check_atoms("kernels", kernels)
        if not 0 <= modes <= kernels.shape[1] // 2:
            raise SaekitError(f"modes = {modes} must be from 0 to {kernels.shape[1] // 2}, half the kernels' samples")  # fmt: skip
        self.n = kernels.shape[1]
        # real, so that any optimiser moves it, and as large as kernels' samples, so that its steps are
        parts = torch.fft.rfft(kernels, norm="ortho")[:, : modes + 1]
        empty = parts.norm(dim=1) <= FLOOR * kernels.norm(dim=1)
        if empty.any():
            raise SaekitError(f"kernel {int(empty.nonzero()[0])} has nothing in its {modes} modes, and all in higher ones; choose more modes, or leave it out")  # fmt: skip
        self.parts = nn.Parameter(torch.view_as_real(parts).clone())
        self.normalise()

    def spectrum(self, n: int) -> Complex[Tensor, "atom f"]:
        """W on n samples: 0 beyond the modes."""
        w = torch.view_as_complex(self.parts) * math.sqrt(self.n)
        if n // 2 + 1 < w.shape[1]:
            raise SaekitError(f"signals have {n} samples, too few for {w.shape[1] - 1} modes; give at least {2 * w.shape[1] - 2}")  # fmt: skip
        return nn.functional.pad(w, (0, n // 2 + 1 - w.shape[1]))

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring each atom to norm 1 on ``n`` samples."""
        self.parts.div_(torch.fft.irfft(self.spectrum(self.n), n=self.n).norm(dim=1)[:, None, None])


class Lifted(nn.Module):
    """Rows lifted by L before inference: ``z <- relu(z + a ((LD)^T (L x - L D z) - weight))``, and ``x = P L D z``.

    A step's gradient is that of the plain autoencoder times ``L^T L``. L and the projection P are learnt with the atoms;
    P starts as L's pseudo-inverse, so with ``L^T L = 1`` inference is the plain one, and so are its reconstructions.
    """

    def __init__(
        self, atoms: Float[Tensor, "atom d"], lift: Float[Tensor, "wide d"], weight: float, steps: int
    ):
        super().__init__()
        _check(weight, steps)
        if lift.shape[1] != atoms.shape[1] or lift.shape[0] < lift.shape[1]:
            raise SaekitError(f"lift has shape {tuple(lift.shape)}, and atoms {tuple(atoms.shape)}; give it a column for each coordinate and at least as many rows")  # fmt: skip
        _check_atoms("atoms", atoms)
        if not lift.isfinite().all():
            raise SaekitError("lift holds NaN or Inf; give finite numbers")
        self.weight, self.steps = weight, steps
        self.atoms, self.lift = nn.Parameter(atoms.clone()), nn.Parameter(lift.clone())
        self.projection = nn.Parameter(torch.linalg.pinv(lift))
        self.normalise()

    def encode(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows atom"]:
        """Codes of at least 0; differentiable."""
        _check_rows(x)
        if x.shape[1] != self.atoms.shape[1]:
            raise SaekitError(f"x is {x.shape[1]} wide, and atoms {self.atoms.shape[1]}; give rows as wide as atoms")  # fmt: skip
        own, seen = self.atoms @ self.lift.T, x @ self.lift.T
        a = _step(torch.linalg.matrix_norm(own.detach(), 2).square())
        z = x.new_zeros(len(x), len(own))
        for _ in range(self.steps):
            z = (z + a * ((seen - z @ own) @ own.T - self.weight)).relu()
        return z

    def decode(self, z: Float[Tensor, "rows atom"]) -> Float[Tensor, "rows d"]:
        """The rows that codes stand for, projected back."""
        return z @ self.projected()

    def projected(self) -> Float[Tensor, "atom d"]:
        """``P L D``: what a code of each atom adds to a row."""
        return self.atoms @ self.lift.T @ self.projection.T

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring each atom to norm 1."""
        self.atoms.div_(self.atoms.norm(dim=1, keepdim=True))


@torch.no_grad()
def atom_error(
    found: Float[Tensor, "atom n"], planted: Float[Tensor, "planted n"], shifts: bool = True
) -> Float[Tensor, " planted"]:
    """``sqrt(1 - cos^2)`` of each planted atom and its match: least in sum over permutations, and each over ``shifts``."""
    from scipy.optimize import linear_sum_assignment

    _check_atoms("found", found)
    _check_atoms("planted", planted)
    if found.shape[1] != planted.shape[1]:
        raise SaekitError(f"found atoms have {found.shape[1]} places, and planted ones {planted.shape[1]}; give both on as many")  # fmt: skip
    if len(found) < len(planted):
        raise SaekitError(f"{len(found)} atoms can't match {len(planted)} planted ones; give at least as many")  # fmt: skip
    a, b = (nn.functional.normalize(v.cpu().double(), dim=1) for v in (found, planted))
    if shifts:
        cross = torch.fft.rfft(b)[:, None] * torch.fft.rfft(a).conj()
        cos = torch.fft.irfft(cross, n=a.shape[1]).abs().amax(2)
    else:
        cos = (b @ a.T).abs()
    error = (1 - cos.square()).clamp_min(0).sqrt()
    rows, columns = linear_sum_assignment(error.numpy())
    return error[torch.as_tensor(rows), torch.as_tensor(columns)]


def _step(square: Tensor) -> float:
    return 1 / max(float(square), 1e-12)


def _check(weight: float, steps: int) -> None:
    if not 0 <= weight < math.inf or steps < 1:
        raise SaekitError(f"weight = {weight} must be a number of at least 0, and steps = {steps} at least 1")  # fmt: skip


def _check_atoms(name: str, atoms: Tensor) -> None:
    check_axes(name, atoms, "atom", "n")
    if not len(atoms) or not (atoms.detach().norm(dim=1) > 0).all() or not atoms.isfinite().all():
        raise SaekitError(f"{name} has shape {list(atoms.shape)}, or a row that is 0, NaN or Inf; give at least one, all finite and not 0")  # fmt: skip


def _check_rows(x: Tensor) -> None:
    check_axes("x", x, "rows", "n")
    if len(x) == 0 or not x.isfinite().all():
        raise SaekitError(f"x has shape {tuple(x.shape)}, or holds NaN or Inf; give at least one finite row")  # fmt: skip
