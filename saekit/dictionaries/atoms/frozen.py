"""Random atoms that are never trained, under an encoder that is: the control that tells what the decoder learns."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class FrozenConfig:
    """Nothing to choose."""


class Frozen(nn.Module):
    """Random unit directions."""

    Config = FrozenConfig
    unit = False  # nothing for an optimizer to keep
    tied = False
    trained = True
    fixed = True
    weight: Tensor

    def __init__(
        self, config: FrozenConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):
        super().__init__()
        self.register_buffer("weight", directions)

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """The decoder, one row per feature."""
        return self.weight

    def after_step(self) -> None:
        """Nothing to restore."""
