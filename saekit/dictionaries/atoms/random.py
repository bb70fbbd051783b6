"""Random unit-norm atoms that are never trained, tied to the encoder: the control of every table."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomConfig:
    """Nothing to choose."""


class Random(nn.Module):
    """Frozen directions; the encoder reads what the decoder writes."""

    Config = RandomConfig
    unit = False  # whether the optimizer keeps the rows on the sphere
    tied = True
    weight: Tensor

    def __init__(self, config: RandomConfig, directions: Float[Tensor, "feature d_out"]):
        super().__init__()
        self.register_buffer("weight", torch.nn.functional.normalize(directions, dim=-1))

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """The decoder, one row per feature."""
        return self.weight

    def after_step(self) -> None:
        """Nothing is trained."""
