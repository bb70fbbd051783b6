"""JumpReLU's pseudo-gradients are those of Rajamanoharan et al. 2024 (2407.14435), eq. 11 and 12."""

import pytest
import torch
from torch import Tensor

from saekit.kernels import jumprelu

BANDWIDTH = 0.8
THETAS = (0.0, 0.3, 1.0, 2.5)
SECOND = {"rectangle": 1 / 12, "triangle": 1 / 24, "parabola": 1 / 20}  # moment of a kernel of width 1
KERNEL = {
    "rectangle": lambda t: 1.0 * (t.abs() < 0.5),
    "triangle": lambda t: (2 - 4 * t.abs()).clamp(min=0),
    "parabola": lambda t: (1.5 - 6 * t.square()).clamp(min=0),
}
every_kernel = pytest.mark.parametrize("kernel", list(KERNEL))


def pulls(
    u: Tensor, features: Tensor, theta: Tensor, kernel: str, z: Tensor | None, on: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients for u and for the thresholds, of the outputs z and on with these cotangents (None is 0)."""
    u, theta = u.clone().requires_grad_(), theta.clone().requires_grad_()
    outputs = jumprelu(u, features, theta, BANDWIDTH, kernel)
    given = [torch.zeros_like(u) if c is None else c for c in (z, on)]
    torch.autograd.backward(outputs, given)
    assert u.grad is not None and theta.grad is not None
    return u.grad, theta.grad


def grid(kernel: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Pre-activations of a feature for each threshold, spaced evenly over twice the window around it."""
    theta, n = torch.tensor(THETAS, dtype=torch.float64), 8000
    away = BANDWIDTH * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    features = torch.arange(len(theta)).repeat_interleave(n).int()
    return (theta[:, None] + away).flatten(), features, theta, 2 * BANDWIDTH / n


@every_kernel
def test_kernels_integrate_to_1(kernel: str) -> None:
    u, features, theta, du = grid(kernel)
    _, of_z = pulls(u, features, theta, kernel, torch.ones_like(u), None)
    _, of_on = pulls(u, features, theta, kernel, None, torch.ones_like(u))
    torch.testing.assert_close(of_z * du, -theta, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(of_on * du, -torch.ones_like(theta), rtol=1e-3, atol=0)


@every_kernel
def test_second_moments_are_those_of_the_kernels(kernel: str) -> None:
    u, features, theta, du = grid(kernel)
    weight, moment = (u - theta[features.long()]).square(), BANDWIDTH**2 * SECOND[kernel]
    _, of_z = pulls(u, features, theta, kernel, weight, None)
    _, of_on = pulls(u, features, theta, kernel, None, weight)
    torch.testing.assert_close(of_z * du, -theta * moment, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(of_on * du, torch.full_like(theta, -moment), rtol=1e-3, atol=0)


@every_kernel
def test_each_entry_pulls_as_the_formula_says(kernel: str) -> None:
    """Each entry with a threshold of its own: exactly 0 outside the window, eq. 11 and 12 inside."""
    g = torch.Generator().manual_seed(0)
    theta = 2 * torch.rand(4000, generator=g, dtype=torch.float64)
    u = theta + 2 * BANDWIDTH * (torch.rand(4000, generator=g, dtype=torch.float64) - 0.5)
    u[:100] = theta[:100]
    z, on = torch.randn(2, 4000, generator=g, dtype=torch.float64)
    of_u, of_theta = pulls(u, torch.arange(4000).int(), theta, kernel, z, on)
    t = (u - theta) / BANDWIDTH
    outside = t.abs() >= 0.5
    assert 1000 < outside.sum() < 3000 and (of_theta[outside] == 0).all()
    torch.testing.assert_close(of_theta, -(theta * z + on) * KERNEL[kernel](t) / BANDWIDTH)
    assert torch.equal(of_u, torch.where(u > theta, z, 0.0))


@every_kernel
def test_the_slope_is_1_above_the_threshold_and_0_at_or_below(kernel: str) -> None:
    theta = torch.tensor(THETAS, dtype=torch.float64)
    for away, slope in ((1e-9, 1.0), (0.0, 0.0), (-1e-9, 0.0), (5.0, 1.0), (-5.0, 0.0)):
        of_u, _ = pulls(theta + away, torch.arange(4).int(), theta, kernel, torch.ones(4).double(), None)
        assert (of_u == slope).all()
