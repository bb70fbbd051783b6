"""What a feature of a vision dictionary sees: the images it is strongest on, and where in them.

As concept figures of Fel et al. 2025, "Archetypal SAE" (2502.12892), show it: of each feature the images of the largest
activation, each with the map of its activations over the image's patches. The dictionary may stand at any module of any
model that gives rows for places of an image: patches of a transformer, cells of a convolution.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.types import ActivationBatch, SaekitError

FIRST = 8  # positions at most that stand before the patches: a class token, registers


@dataclass(frozen=True)
class Grid:
    """How positions lie in an image: ``height`` x ``width`` of them, row by row, behind the ``first`` ones."""

    height: int
    width: int
    first: int = 0

    @property
    def places(self) -> int:
        """Positions in the image."""
        return self.height * self.width


def grid_of(positions: int, aspect: float = 1.0) -> Grid:
    """The grid of ``positions`` for images of ``aspect`` = height / width: the largest of that shape, the rest before it."""
    if not 0 < aspect < math.inf:
        raise SaekitError(f"aspect = {aspect} must be above 0, and finite; give height / width")
    for first in range(min(FIRST, positions - 1) + 1):
        left = positions - first
        width = round(math.sqrt(left / aspect))
        if width and left % width == 0 and abs(left / width - aspect * width) < 1:
            return Grid(left // width, width, first)
    raise SaekitError(
        f"positions = {positions} are no grid of images whose height is {aspect:.3g} of their width, not even without up to {FIRST} first ones; give grid=(height, width)"
    )


@dataclass(frozen=True)
class Seen:
    """Of some features the images of the largest activation, best first, and what each is at every place of them.

    ``images`` are numbers of images, -1 where a feature fires on fewer; ``values`` its largest magnitude there, with its
    sign; ``maps`` its activations, 0 where masked. ``share`` of ``n_images`` holds a place at which it fires; ``rate`` is the
    share of unmasked places at which it does, and ``energy`` its mean sum over an image's places, both of all images.
    """

    features: tuple[int, ...]
    images: Int[Tensor, "feature top"]
    values: Float[Tensor, "feature top"]
    maps: Float[Tensor, "feature top height width"]
    share: Float[Tensor, " feature"]
    rate: Float[Tensor, " feature"]
    energy: Float[Tensor, " feature"]
    grid: Grid
    n_images: int


@torch.no_grad()
def strongest_images(
    dictionary: Dictionary,
    batches: Iterable[ActivationBatch],
    features: Sequence[int],
    top: int = 6,
    grid: "tuple[int, int] | None" = None,
    aspect: float = 1.0,
) -> Seen:
    """Where each of ``features`` is strongest in the images of ``batches``, read once; held are ``top`` maps a feature.

    A row of a batch is an image. ``grid`` is its height and width in positions, those before it (a class token) are left
    out; by default what fits images of ``aspect`` = height / width. Of images of equal value the first counts.
    """
    if top < 1:
        raise SaekitError(f"top = {top} must be at least 1")
    outside = [f for f in features if not 0 <= f < dictionary.n_features]
    if outside or not features:
        raise SaekitError(
            f"features {list(outside)[:3]} are not in a dictionary of {dictionary.n_features}; name at least one that is"
        )
    chosen = torch.tensor(list(features), device=dictionary.device)
    n = len(chosen)
    found: Grid | None = None
    seen = places = 0
    images, values, maps = torch.full((n, 0), -1), torch.zeros(n, 0), torch.zeros(0)
    hits, share, energy = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    for batch in batches:
        rows, positions = batch.mask.shape
        if found is None:
            found = _checked(positions, grid, aspect)
            maps = torch.zeros(n, 0, found.places)
        if positions != found.first + found.places:
            raise SaekitError(
                f"an image gives {positions} positions and those before it {found.first + found.places}; give images of one size"
            )
        own = _dense(dictionary, batch, chosen)[:, found.first :]  # [rows, places, feature]
        mask = batch.mask[:, found.first :]
        on = own != 0
        places, hits = places + int(mask.sum()), hits + on.sum((0, 1))
        share, energy = share + on.any(1).sum(0), energy + own.sum((0, 1))
        at = own.abs().argmax(1, keepdim=True)
        best = own.gather(1, at)[:, 0].T
        number = torch.arange(seen, seen + rows).expand(n, rows)
        number = torch.where(best != 0, number, -1)
        images, values = torch.cat([images, number], 1), torch.cat([values, best], 1)
        order = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :top]
        maps = _kept(maps, own.permute(2, 0, 1), order)
        images, values = images.gather(1, order), values.gather(1, order)
        seen += rows
    if found is None:
        raise SaekitError("there is no image; give at least one")
    shaped = maps.view(n, -1, found.height, found.width)
    return Seen(
        tuple(features), images, values, shaped, share / seen, hits / max(places, 1), energy / seen, found, seen
    )  # fmt: skip


def _checked(positions: int, given: "tuple[int, int] | None", aspect: float) -> Grid:
    if given is None:
        return grid_of(positions, aspect)
    height, width = given
    if not (height > 0 and width > 0 and height * width <= positions):
        raise SaekitError(
            f"grid = {given} has {height * width} places and an image gives {positions} positions; give one with at most as many"
        )
    return Grid(height, width, positions - height * width)


def _dense(
    dictionary: Dictionary, batch: ActivationBatch, chosen: Int[Tensor, " feature"]
) -> Float[Tensor, "rows positions feature"]:
    """The features' activations at all positions, 0 at masked ones."""
    x = [batch.rows(point) for point in dictionary.reads]
    for point, rows in zip(dictionary.reads, x, strict=True):
        if not rows.isfinite().all():
            raise SaekitError(f"activations at {point!r} hold NaN or Inf; find what makes the model overflow")
    codes = dictionary.encode(torch.cat(x, -1).to(dictionary.device)).select(chosen).float().cpu()
    out = torch.zeros(*batch.mask.shape, len(chosen))
    out[batch.mask.cpu()] = codes
    return out


def _kept(
    old: Float[Tensor, "feature kept places"],
    new: Float[Tensor, "feature rows places"],
    order: Int[Tensor, "feature top"],
) -> Float[Tensor, "feature top places"]:
    """The maps that ``order`` names, of the old ones and the new ones behind them."""
    held = old.shape[1]
    which = torch.arange(len(order))[:, None]
    from_new = new[which, (order - held).clamp_min(0)]
    if not held:
        return from_new.contiguous()
    from_old = old[which, order.clamp_max(held - 1)]
    return torch.where((order < held)[..., None], from_old, from_new)
