"""What the papers on planted worlds share: a stream of their rows, and a training on it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import DrawnSource
from saekit.dictionaries import Dictionary, create
from saekit.testbed.planted import PlantedWorld
from saekit.types import Codes

STRIDE, SEEDS = 1 << 20, 1 << 10  # steps between two seeds' parts of a stream, and how many it has


def stream(world: PlantedWorld) -> DrawnSource:
    """Batches of a world; each seed reads other steps of the world's training stream."""

    def draw(rows: int, step: int, seed: int) -> Tensor:
        return world.batch(rows, step + seed % SEEDS * STRIDE)[0]

    return DrawnSource(draw, world.config.d_in, "planted")


def make(world: PlantedWorld, preset: str, n_features: int, seed: int, **options: Any) -> Dictionary:
    """A fresh dictionary of a world's width."""
    return create(preset, d_in=world.config.d_in, n_features=n_features, seed=seed, **options)


def cut(codes: Codes, k: int) -> Codes:
    """The first k codes of each row: the largest, for codes that come by falling value."""
    indices, values = codes.rectangular()
    return Codes.from_rectangular(indices[:, :k], values[:, :k].contiguous(), codes.n_features, codes.shape)


@torch.no_grad()
def reconstruct(
    d: Dictionary, x: Float[Tensor, "rows d_in"], k: int | None = None
) -> Float[Tensor, "rows d_in"]:
    """The dictionary's output, from all codes or from the first k of each row."""
    codes = d.encode(x)
    return d.decode(codes if k is None else cut(codes, k), x)
