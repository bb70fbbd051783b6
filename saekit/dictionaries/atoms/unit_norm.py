"""Atoms of unit norm: gradients projected on the sphere, rows renormalised after each step.

Bricken et al. 2023: without the projection Adam's moments would fill with the radial component,
which the renormalisation then throws away.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class UnitNormConfig:
    """Nothing to choose."""


class UnitNorm(nn.Module):
    """A decoder row of norm 1 per feature."""

    Config = UnitNormConfig
    unit = True
    tied = False
    trained = True

    def __init__(
        self, config: UnitNormConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):
        super().__init__()
        self.weight = nn.Parameter(directions)
        self.after_step()

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """The decoder, one row per feature."""
        return self.weight

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring every row back to norm 1."""
        self.weight.div_(torch.linalg.vector_norm(self.weight, dim=-1, keepdim=True).clamp_(min=1e-12))
