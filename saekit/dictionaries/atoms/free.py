"""Atoms without a constraint; what a folded dictionary has."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class FreeConfig:
    """Nothing to choose."""


class Free(nn.Module):
    """A decoder row per feature, of any norm."""

    Config = FreeConfig
    unit = False
    tied = False
    trained = True

    def __init__(
        self, config: FreeConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):
        super().__init__()
        self.weight = nn.Parameter(directions)

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """The decoder, one row per feature."""
        return self.weight

    def after_step(self) -> None:
        """Nothing to restore."""
