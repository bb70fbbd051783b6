"""Mutual feature regularisation: dictionaries trained together are drawn to features they share (2411.01220).

What several dictionaries find is more often real than what one does. Peers are cut from the graph:
each dictionary is drawn to where the others were before the step.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import check_coefficient, check_share
from saekit.dictionaries.training import Forward


@dataclass(frozen=True)
class MutualConfig:
    """``coefficient`` of the term, reached after ``warmup`` (a share of the run)."""

    coefficient: float = 1.0
    warmup: float = 0.05

    def __post_init__(self):
        check_coefficient("coefficient", self.coefficient)
        check_share("warmup", self.warmup)


class Mutual(nn.Module):
    """``coefficient * mean over peers of (1 - MMCS)``; MMCS is the mean of both ways' mean largest cosine."""

    Config = MutualConfig
    fit = False
    moves_atoms = True
    needs: frozenset[str] = frozenset()
    peers = True  # whether training has to hand in the decoders of the others

    def __init__(self, config: MutualConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term; 0 without peers."""
        if not forward.state.peers:
            return forward.atoms.new_zeros(())
        mine = forward.atoms if forward.unit else nn.functional.normalize(forward.atoms, dim=-1)
        distances = []
        for peer in forward.state.peers:
            cosine = mine @ nn.functional.normalize(peer, dim=-1).T
            distances.append(1 - (cosine.amax(1).mean() + cosine.amax(0).mean()) / 2)
        weight = self.config.coefficient * forward.state.ramp(self.config.warmup)
        return weight * torch.stack(distances).mean()
