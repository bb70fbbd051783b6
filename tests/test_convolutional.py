"""Convolutional sparse coding against dense matrices; kernels, their bandwidths, and what learning makes of them."""

import math

import numpy as np
import pytest
import torch

from saekit.analyses.convolutional import bandwidths, code, convolved, learn, log_gabors
from saekit.types import SaekitError


def tiny(seed: int = 0, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    kernels = torch.randn(3, 3, 2, generator=g, dtype=torch.float64)
    kernels /= kernels.flatten(1).norm(dim=1)[:, None, None]
    return torch.randn(n, 7, 6, generator=g, dtype=torch.float64), kernels


def matrix(kernels: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """What every code writes, one row each, placed pixel by pixel."""
    rows = []
    for kernel in kernels:
        for y in range(h):
            for x in range(w):
                image = torch.zeros(h, w, dtype=torch.float64)
                for a in range(kernel.shape[0]):
                    for b in range(kernel.shape[1]):
                        image[(y + a) % h, (x + b) % w] += kernel[a, b]
                rows.append(image.flatten())
    return torch.stack(rows)


def test_a_sum_of_convolutions_is_the_dense_product() -> None:
    _, kernels = tiny()
    codes = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = codes.flatten(1) @ matrix(kernels, 7, 6)
    torch.testing.assert_close(convolved(codes, kernels).flatten(1), dense)


@pytest.mark.parametrize("weight", [0.05, 0.3, 1.0])
def test_the_solution_is_that_of_a_dense_lasso(weight: float) -> None:
    from sklearn.linear_model import Lasso

    images, kernels = tiny()
    dense = matrix(kernels, 7, 6)
    found = code(images, kernels, weight, steps=1500)
    for image, codes, last in zip(images, found.codes, found.objective[-1], strict=True):
        # scikit-learn's loss is a mean over the pixels
        lasso = Lasso(alpha=weight / 42, fit_intercept=False, tol=1e-12, max_iter=200_000)
        best = torch.from_numpy(lasso.fit(dense.T.numpy(), image.flatten().numpy()).coef_)
        left = image.flatten() - best @ dense
        objective = left.square().sum() / 2 + weight * best.abs().sum()
        assert last.item() == pytest.approx(objective.item(), rel=1e-7)
        written = convolved(codes[None], kernels)[0].flatten()
        torch.testing.assert_close(written, best @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5])
def test_the_objective_is_what_it_says_and_never_rises(weight: float) -> None:
    images, kernels = tiny(3, n=4)
    found = code(images, kernels, weight, steps=80)
    assert found.objective.shape == (81, 4) and (found.objective.diff(dim=0) <= 0).all()
    left = images - convolved(found.codes, kernels)
    now = left.square().sum((1, 2)) / 2 + weight * found.codes.abs().sum((1, 2, 3))
    torch.testing.assert_close(found.objective[-1], now)
    assert (now < 0.9 * found.objective[0]).all()


def test_pixels_may_be_whole_numbers() -> None:
    images, kernels = torch.arange(2 * 81).view(2, 9, 9) % 7, torch.ones(1, 2, 2)
    assert torch.equal(
        code(images.byte(), kernels, 0.1, 5).codes, code(images.float(), kernels, 0.1, 5).codes
    )


def test_images_are_coded_each_by_itself_and_wherever_they_are_moved() -> None:
    images, kernels = tiny(4, n=3)
    together = code(images, kernels, 0.2, steps=30)
    alone = torch.cat([code(image[None], kernels, 0.2, steps=30).codes for image in images])
    torch.testing.assert_close(together.codes, alone)
    moved = code(images.roll((2, 3), (1, 2)), kernels, 0.2, steps=30)
    torch.testing.assert_close(moved.codes, together.codes.roll((2, 3), (2, 3)))
    none = code(images, kernels, 100.0)
    assert none.zeros == 1 and together.zeros == (together.codes == 0).double().mean().item() < 1


def test_log_gabors_are_pairs_of_norm_1_whose_bandwidths_are_those_asked_for() -> None:
    asked = [math.radians(b) for b in (6, 12, 24)]
    kernels = log_gabors(33, 4, asked)
    assert kernels.shape == (24, 33, 33)
    torch.testing.assert_close(kernels.flatten(1).norm(dim=1), torch.ones(24))
    assert kernels.mean((1, 2)).abs().max() < 1e-6
    even, odd = kernels[::2].flatten(1), kernels[1::2].flatten(1)
    assert (even * odd).sum(1).abs().max() < 0.05
    # of power, whose logarithm is twice the amplitude's, a von Mises in the doubled angle of concentration 1 / 2 B^2
    found = bandwidths(kernels).view(3, 8)
    for b, own in zip(asked, found, strict=True):
        kappa = 1 / (2 * b**2)
        from scipy.special import ive

        true = math.degrees(math.sqrt(-2 * math.log(ive(1, kappa) / ive(0, kappa))) / 2)
        assert np.allclose(own, true, rtol=0.12), (true, own)


def test_a_bandwidth_is_that_of_the_shape_alone() -> None:
    kernels = log_gabors(12, 3, [0.2, 0.4])
    own = bandwidths(kernels)
    torch.testing.assert_close(bandwidths(-3 * kernels), own)
    torch.testing.assert_close(bandwidths(kernels.transpose(1, 2)), own, rtol=1e-6, atol=1e-6)
    short, line, spot = torch.zeros(3, 12, 12)
    short[6, 4:8], line[6], spot[6, 6] = 1, 1, 1
    narrow, between, broad = bandwidths(torch.stack([line, short, spot]))
    assert narrow < between < broad and broad > 45


def test_kernels_are_learnt_back() -> None:
    g = torch.Generator().manual_seed(5)
    truth = log_gabors(7, 3, [0.3])
    on = torch.rand(120, 6, 24, 24, generator=g) < 0.01
    images = convolved(on * (1 + torch.rand(on.shape, generator=g)), truth)
    start = truth + 0.15 * torch.randn(truth.shape, generator=g)
    start /= start.flatten(1).norm(dim=1)[:, None, None]
    found = learn(images, start, 0.1, steps=30)
    before, after = ((k * truth).sum((1, 2)) for k in (start, found))
    assert (after > before).all() and after.mean() > 0.9 > before.max()
    left, right = (code(images[:8], k, 0.1).objective[-1].mean() for k in (found, truth))
    assert left < 1.1 * right
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(6))


def test_what_is_impossible_is_refused() -> None:
    images, kernels = (t.float() for t in tiny())
    with pytest.raises(SaekitError, match=r"kernels have shape \(3, 3, 2\), and images \(2, 2\)"):
        code(images[:, :2, :2], kernels, 0.1)
    with pytest.raises(SaekitError, match="nothing but 0"):
        code(images, 0 * kernels, 0.1)
    with pytest.raises(SaekitError, match="weight = -1"):
        code(images, kernels, -1.0)
    with pytest.raises(SaekitError, match="steps = 0"):
        code(images, kernels, 0.1, 0)
    with pytest.raises(SaekitError, match="NaN or Inf"):
        code(images * math.nan, kernels, 0.1)
    with pytest.raises(SaekitError, match="orientations = 0"):
        log_gabors(12, 0, [0.1])
