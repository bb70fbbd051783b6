"""Operators' atoms are functions: what is found at one resolution is found at another, and kinds that should agree do."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit.analyses.operators import Convolutional, Fourier, Lifted, atom_error
from saekit.testbed.signals import MODES, MOST, PLACES, functions, sampled, signals
from saekit.types import SaekitError


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, n: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(rows, n, generator=g(seed)), dim=1)


def by_hand(x: Tensor, atoms: Tensor, weight: float, steps: int) -> Tensor:
    z, a = torch.zeros(len(x), len(atoms)), 1 / torch.linalg.matrix_norm(atoms, 2) ** 2
    for _ in range(steps):
        z = (z + a * ((x - z @ atoms) @ atoms.T - weight)).clamp_min(0)
    return z


def test_convolution_is_a_matrix_of_shifted_kernels() -> None:
    kernels, x = unit(3, 5), torch.randn(4, 12, generator=g(1))
    shifted = torch.stack([torch.cat([k, torch.zeros(7)]).roll(s) for k in kernels for s in range(12)])
    sae = Convolutional(kernels, 0.1, 20)
    z = sae.encode(x)
    torch.testing.assert_close(z.flatten(1), by_hand(x, shifted, 0.1, 20), atol=1e-5, rtol=0)
    torch.testing.assert_close(sae.decode(z), z.flatten(1) @ shifted, atol=1e-5, rtol=0)
    assert (z > 0).any() and (z == 0).any()


def test_pursuit_takes_the_best_shifted_kernel_each_time() -> None:
    kernels, x = 3 * unit(3, 5), torch.randn(6, 12, generator=g(1))
    shifted = torch.stack([torch.cat([k, torch.zeros(7)]).roll(s) for k in kernels for s in range(12)])
    k = torch.tensor([0, 1, 2, 3, 8, 8])
    z = Convolutional(kernels, 0.1, 20).pursue(x, k).flatten(1)
    for row, steps in enumerate(k.tolist()):
        own, left = torch.zeros(len(shifted)), x[row].clone()
        for _ in range(steps):
            fits = shifted @ left / 3
            best = int(fits.argmax())
            own[best] += fits[best].clamp_min(0) / 3
            left = x[row] - own @ shifted
        torch.testing.assert_close(z[row], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [16, 17])
def test_all_modes_of_kernels_are_convolution_and_fewer_are_not(n: int) -> None:
    kernels, x = unit(3, 5), torch.randn(4, n, generator=g(1))
    padded = torch.nn.functional.pad(kernels, (0, n - 5))
    plain = Convolutional(kernels, 0.1, 20)
    full, cut = (Fourier(padded, modes, 0.1, 20) for modes in (n // 2, 3))
    torch.testing.assert_close(full.encode(x), plain.encode(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.decode(full.encode(x)), plain.decode(plain.encode(x)), atol=1e-5, rtol=0)
    assert (cut.encode(x) - plain.encode(x)).abs().max() > 0.1


def test_functions_have_no_resolution() -> None:
    smooth = sampled(functions(4, g()), PLACES)
    sae = Fourier(smooth, MODES, 0.1, 10)
    few, many = sae.on(PLACES), sae.on(2 * PLACES)
    torch.testing.assert_close(many[:, ::2] * 2**0.5, few, atol=1e-5, rtol=0)
    # one step's codes are a function too; a kernel's aren't
    one = Fourier(smooth, MODES, 0.1, 1)
    x = signals(functions(4, g()), 5, g(1))
    torch.testing.assert_close(
        one.encode(x.on(2 * PLACES))[..., ::2], one.encode(x.on(PLACES)), atol=1e-4, rtol=0
    )
    few, many = (Convolutional(smooth, 0.1, 1).encode(x.on(n)) for n in (PLACES, 2 * PLACES))
    assert (many[..., ::2] - few).norm() > 0.5 * few.norm()


def test_an_orthonormal_lift_is_none_and_another_is_not() -> None:
    atoms, x, wide = unit(10, 6), torch.randn(20, 6, generator=g(1)), torch.randn(9, 6, generator=g(2))
    z = by_hand(x, atoms, 0.1, 20)
    same, other = Lifted(atoms, torch.linalg.qr(wide).Q, 0.1, 20), Lifted(atoms, wide, 0.1, 20)
    torch.testing.assert_close(same.encode(x), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(same.decode(z), z @ atoms, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.encode(x), by_hand(x @ wide.T, atoms @ wide.T, 0.1, 20), atol=1e-4, rtol=0)  # fmt: skip
    assert (other.encode(x) - z).abs().max() > 0.1


@pytest.mark.parametrize("kind", [Convolutional, Fourier, Lifted])
def test_gradients_reach_all_that_is_learnt_and_norms_stay(kind: type) -> None:
    start, x = unit(4, 16), torch.randn(8, 16, generator=g(1))
    sae = kind(start, *{Fourier: [5], Lifted: [torch.eye(16)]}.get(kind, []), 0.05, 5)
    (x - sae.decode(sae.encode(x))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())
    with torch.no_grad():
        for p in sae.parameters():
            p *= 3
    sae.normalise()
    own = sae.atoms if kind is Lifted else torch.fft.irfft(sae.spectrum(16), n=16)
    torch.testing.assert_close(own.norm(dim=1), torch.ones(4))


def test_more_steps_never_cost_more() -> None:
    kernels, x = unit(3, 5), torch.randn(4, 12, generator=g(1))
    costs = []
    for steps in (1, 2, 5, 20, 100):
        sae = Convolutional(kernels, 0.1, steps)
        z = sae.encode(x)
        costs.append(((x - sae.decode(z)).square().sum() / 2 + 0.1 * z.sum()).item())
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_errors_of_atoms_are_of_the_best_match_and_shift() -> None:
    planted = unit(4, 16)
    moved = torch.stack([v.roll(s) for s, v in enumerate(planted)])[[2, 0, 3, 1]] * -2
    assert atom_error(moved, planted).max() < 1e-6
    assert atom_error(moved, planted, shifts=False).max() > 0.5
    halfway = normalize(torch.eye(4)[:2] + torch.eye(4)[2:], dim=1)
    torch.testing.assert_close(
        atom_error(halfway, torch.eye(4)[:2], shifts=False), torch.full((2,), math.sqrt(0.5)).double()
    )


def test_signals_are_one_thing_at_any_resolution() -> None:
    drawn = signals(functions(5, g()), 300, g(1))
    few, many = drawn.on(PLACES), drawn.on(3 * PLACES)
    torch.testing.assert_close(many[:, ::3], few, atol=1e-4, rtol=0)
    held = (drawn.large > 0).sum(1)
    assert set(held.tolist()) == set(range(1, MOST + 1))
    spectrum = torch.fft.rfft(few).abs()
    assert spectrum[:, MODES + 1 :].max() < 1e-3 < spectrum[:, : MODES + 1].max()


WAVES = torch.cos(2 * math.pi * torch.arange(9)[:, None] * torch.arange(16) / 16)
BAD = {
    "modes = 9": lambda: Fourier(unit(2, 16), 9, 0.1, 1),
    "kernel 1 has nothing in its 4 modes": lambda: Fourier(torch.stack([WAVES[1], WAVES[8]]), 4, 0.1, 1),
    "kernel 0 has nothing in its 5 modes": lambda: Fourier(WAVES[6:8].float(), 5, 0.1, 1),
    "steps = 0": lambda: Convolutional(unit(2, 16), 0.1, 0),
    "weight = -1": lambda: Lifted(unit(2, 4), torch.eye(4), -1.0, 1),
    "weight = nan": lambda: Convolutional(unit(2, 16), math.nan, 1),
    "lift has shape": lambda: Lifted(unit(2, 4), torch.ones(3, 4), 0.1, 1),
    "too few for": lambda: Fourier(unit(2, 16), 8, 0.1, 1).encode(torch.ones(1, 8)),
    "kernels 16": lambda: Convolutional(unit(2, 16), 0.1, 1).encode(torch.ones(1, 8)),
    "holds NaN": lambda: Convolutional(unit(2, 4), 0.1, 1).encode(torch.full((1, 8), math.nan)),
    "k has 1 numbers for 3 rows": lambda: Convolutional(unit(2, 3), 0.1, 2).pursue(
        torch.ones(3, 8), torch.tensor([1])
    ),
    "1 atoms can't match": lambda: atom_error(unit(1, 4), unit(2, 4)),
    "multiple of 64": lambda: signals(functions(2, g()), 3, g()).on(96),
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_is_refused(said: str) -> None:
    with pytest.raises(SaekitError, match=said):
        BAD[said]()
