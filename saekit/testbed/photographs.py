"""Two photographs, a temple and a flower: the natural images that scikit-learn carries along."""

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError

CUTOFF = 0.4  # cycles a pixel, above which whitening would raise the grain of the film
NAMES = ("china", "flower")


def photographs() -> Float[Tensor, "2 427 640"]:
    """Both in grey, in 0..1."""
    from sklearn.datasets import load_sample_images

    try:
        images = load_sample_images().images
    except ImportError as error:
        raise SaekitError("the photographs are JPEG files, which scikit-learn reads by Pillow, and it is not installed; pip install pillow") from error  # fmt: skip
    return torch.stack([torch.tensor(image, dtype=torch.float32).mean(2) for image in images]) / 255


def whitened(images: Float[Tensor, "image h w"]) -> Float[Tensor, "image h w"]:
    """Images whose spectrum is about flat: by ``f exp(-(f / CUTOFF)^4)`` (Olshausen and Field 1997), each of variance 1.

    Refuses an image of one grey.
    """
    flat = images.flatten(1).std(1) <= 1e-6 * images.flatten(1).abs().amax(1).clamp_min(1e-12)
    if flat.any():
        raise SaekitError(f"image {int(flat.nonzero()[0])} is of one grey, and has no spectrum to flatten; leave it out")  # fmt: skip
    h, w = images.shape[1:]
    f = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None])
    by = f * torch.exp(-((f / CUTOFF) ** 4))
    out = torch.fft.irfft2(torch.fft.rfft2(images) * by, s=(h, w))
    return out / out.flatten(1).std(1)[:, None, None]


def patches(
    images: Float[Tensor, "image h w"], size: int, n: int, generator: torch.Generator
) -> Float[Tensor, "n pixels"]:
    """``n`` squares of ``size`` pixels a side from random places of random images, as rows."""
    count, h, w = images.shape
    if not 1 <= size <= min(h, w):
        raise SaekitError(f"size = {size} must lie in 1..{min(h, w)}, the images' shorter side")
    of, y, x = (
        torch.randint(below, (n,), generator=generator) for below in (count, h - size + 1, w - size + 1)
    )
    steps = torch.arange(size)
    rows, columns = y[:, None, None] + steps[:, None], x[:, None, None] + steps
    return images[of[:, None, None], rows, columns].flatten(1)
