"""Orthogonality: atoms are kept from copying their nearest neighbour (OrtSAE, 2509.22033).

The dictionary is cut into random chunks each step, so the cost is ``n_features * chunk * d_out``, and
every pair meets in time.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import check_coefficient
from saekit.dictionaries.training import Forward
from saekit.types import SaekitError

PURPOSE = 2  # of its random numbers


@dataclass(frozen=True)
class OrthogonalityConfig:
    """``coefficient`` of the term; ``chunk`` atoms are compared with each other."""

    coefficient: float = 0.25
    chunk: int = 128

    def __post_init__(self):
        if self.chunk < 2:
            raise SaekitError(f"chunk = {self.chunk} must be at least 2; atoms are compared within it")
        check_coefficient("coefficient", self.coefficient)


class Orthogonality(nn.Module):
    """``coefficient * d_out * mean_i max_{j in i's chunk} cos(d_i, d_j)^2``."""

    Config = OrthogonalityConfig
    fit = False
    moves_atoms = True
    needs: frozenset[str] = frozenset()

    def __init__(self, config: OrthogonalityConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        atoms = forward.atoms if forward.unit else nn.functional.normalize(forward.atoms, dim=-1)
        n, chunk = len(atoms), min(self.config.chunk, len(atoms))
        order = torch.randperm(n, generator=forward.state.generator(PURPOSE))[: n - n % chunk]
        parts = atoms[order.to(atoms.device)].view(-1, chunk, atoms.shape[1])
        itself = torch.eye(chunk, dtype=torch.bool, device=atoms.device)
        nearest = torch.bmm(parts, parts.mT).square().masked_fill(itself, 0.0)
        return self.config.coefficient * atoms.shape[1] * nearest.amax(-1).mean()
