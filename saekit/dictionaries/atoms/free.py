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
    unit = False  # whether the optimizer keeps the rows on the sphere
    tied = False

    def __init__(self, config: FreeConfig, directions: Float[Tensor, "feature d_out"]):
        super().__init__()
        self.weight = nn.Parameter(directions)

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """The decoder, one row per feature."""
        return self.weight

    @torch.no_grad()
    def after_step(self) -> None:
        """Nothing to restore."""
