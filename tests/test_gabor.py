"""Gabor fits recover planted Gabors, and find none in noise; the photographs are what they are said to be."""

import math

import pytest
import torch

from saekit.analyses.gabor import Gabors, fit_gabors, gabor
from saekit.testbed.photographs import patches, photographs, whitened
from saekit.types import SaekitError


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters, and fields of 12 x 12."""
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(n, 8, generator=g, dtype=torch.float64)
    low = torch.tensor([4, 4, math.log(1.2), math.log(1.5), 0, math.log(0.12), 0.3, 0.3], dtype=torch.float64)
    high = torch.tensor([8, 8, math.log(2.5), math.log(3), math.pi, math.log(0.3), 1, 1], dtype=torch.float64)
    p = low + (high - low) * r
    y, x = (a.flatten().double() for a in torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"))
    return p, gabor(p, y, x)[0].unflatten(1, (12, 12))


def test_planted_gabors_are_recovered() -> None:
    p, fields = planted(60, 0)
    found = fit_gabors(fields.float())
    good = found.r2 >= 0.999
    assert good.double().mean() >= 0.95 and found.like >= 0.98 and (found.r2 <= 1 + 1e-9).all()
    turned = (found.theta - p[:, 4] + math.pi / 2).remainder(math.pi) - math.pi / 2
    close = good & ((found.frequency / p[:, 5].exp() - 1).abs() < 0.02) & (turned.abs() < 0.02)
    assert close.double().mean() >= 0.9
    assert ((found.centre - p[:, :2])[close].abs() < 0.1).all()
    assert ((found.sigma / p[:, 2:4].exp() - 1)[close].abs() < 0.05).all()


@pytest.mark.parametrize("size", [32, 33, 48])
def test_fields_are_read_to_their_ends(size: int) -> None:
    p, _ = planted(20, 6)
    p[:, 2:4] += math.log(3)
    p[:, 5] -= math.log(3)
    p[:, :2] = size - 12 + p[:, :2]  # towards the last corner
    y, x = (a.flatten().double() for a in torch.meshgrid(*2 * [torch.arange(size)], indexing="ij"))
    fields = gabor(p, y, x)[0].unflatten(1, (size, size))
    noise = 0.03 * torch.randn(fields.shape, generator=torch.Generator().manual_seed(2)).double()
    assert (fit_gabors(fields + noise).r2 >= 0.7).double().mean() >= 0.9


def test_the_derivatives_are_those_of_finite_differences() -> None:
    p, _ = planted(5, 4)
    y, x = (a.flatten().double() for a in torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"))
    slopes = gabor(p, y, x)[1]
    for j, step in enumerate(1e-6 * torch.eye(8, dtype=torch.float64)):
        numeric = (gabor(p + step, y, x)[0] - gabor(p - step, y, x)[0]) / 2e-6
        torch.testing.assert_close(slopes[..., j], numeric, rtol=1e-5, atol=1e-7)


def test_the_fit_is_the_same_for_any_size_and_sign() -> None:
    _, fields = planted(10, 1)
    noisy = fields + 0.1 * torch.randn(fields.shape, generator=torch.Generator().manual_seed(2)).double()
    one, other = fit_gabors(noisy), fit_gabors(-1e-4 * noisy)
    torch.testing.assert_close(one.r2, other.r2, rtol=0, atol=1e-6)


def test_noise_is_not_like_a_gabor() -> None:
    noise = torch.randn(100, 12, 12, generator=torch.Generator().manual_seed(3))
    found = fit_gabors(noise)
    assert isinstance(found, Gabors) and found.like == 0 and (found.r2 > 0).all() and found.r2.mean() < 0.3


def test_what_has_one_sign_is_not_like_a_gabor() -> None:
    """However well a window without a wave explains it."""
    y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    blob = torch.exp(-((y - 5) ** 2 + (x - 6.5) ** 2) / 8)
    pixel = torch.zeros(12, 12).index_put((torch.tensor(5), torch.tensor(6)), torch.tensor(1.0))
    found = fit_gabors(torch.stack([torch.ones(12, 12), blob, -blob, pixel]))
    assert (found.r2 > 0.99).all() and found.like == 0 and found.lesser.max() < 1e-3
    noise = torch.randn(100, 12, 12, generator=torch.Generator().manual_seed(3))
    assert (fit_gabors(blob + 0.05 * noise).r2 > 0.9).all() and fit_gabors(blob + 0.05 * noise).like == 0
    edges = torch.stack([(x < 6) * 2.0 - 1, blob * (x - 6.5), blob * torch.cos(0.25 * 2 * math.pi * (y - 5))])
    assert fit_gabors(edges).like == 1


def test_fields_of_nothing_are_refused() -> None:
    fields = torch.ones(3, 5, 5)
    fields[1] = 0
    with pytest.raises(SaekitError, match="field 1 holds NaN or Inf, or nothing but 0"):
        fit_gabors(fields)
    fields[1, 0, 0] = math.nan
    with pytest.raises(SaekitError, match="field 1 holds NaN"):
        fit_gabors(fields)
    with pytest.raises(SaekitError, match=r"shape \(0, 5, 5\)"):
        fit_gabors(fields[:0])


def test_whitening_flattens_the_spectrum() -> None:
    images = photographs()
    assert images.shape == (2, 427, 640) and images.min() >= 0 and images.max() <= 1

    def slope(image: torch.Tensor) -> float:
        """Of log power over log frequency, between 0.02 and 0.2 cycles a pixel."""
        f = torch.hypot(torch.fft.fftfreq(427)[:, None], torch.fft.rfftfreq(640)[None])
        band = (f > 0.02) & (f < 0.2)
        x, y = f[band].log(), torch.fft.rfft2(image).abs().square()[band].log()
        return (torch.cov(torch.stack([x, y]))[0, 1] / x.var()).item()

    for before, after in zip(images, whitened(images), strict=True):
        assert slope(before) < -1.5 and abs(slope(after)) < 1.0 and after.std() == pytest.approx(1)


def test_patches_are_squares_of_the_images() -> None:
    images = torch.arange(2 * 9 * 11).float().view(2, 9, 11)
    rows = patches(images, 4, 50, torch.Generator().manual_seed(0)).view(50, 4, 4)
    for square in rows:
        image, at = divmod(int(square[0, 0]), 99)
        y, x = divmod(at, 11)
        assert torch.equal(square, images[image, y : y + 4, x : x + 4])
    assert len(rows[:, 0, 0].unique()) > 30
    with pytest.raises(SaekitError, match="size = 10"):
        patches(images, 10, 1, torch.Generator())
    with pytest.raises(SaekitError, match="image 1 is of one grey"):
        whitened(torch.stack([images[0], torch.ones(9, 11)]))
