"""What kernels write at every place of a ring or a torus: one feature for each kernel and place."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.types import SaekitError


def kernels_of(name: str, n_features: int, places: int) -> int:
    """How many kernels features are the shifts of; raises unless each has all of its shifts."""
    if n_features % places:
        raise SaekitError(
            f"n_features = {n_features} must be a multiple of the {places} places that atoms {name!r} shift each kernel to; choose {max(1, n_features // places) * places}"
        )
    return n_features // places


def shifts(grid: Sequence[int]) -> Int[Tensor, "shift place"]:
    """Which place of a kernel stands at each place of the grid, by how far it is shifted; flat, and around the edges."""
    place = torch.arange(math.prod(grid)).view(*grid)
    every = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)).tolist()
    return torch.stack([place.roll(by, tuple(range(len(grid)))).flatten() for by in every])


def shifted(kernels: Float[Tensor, "kernel place"], by: Int[Tensor, "shift place"]) -> Float[Tensor, "feature place"]:  # fmt: skip
    """Every shift of every kernel, the first kernel's before the second's."""
    return kernels[:, by].flatten(0, 1)
