"""Load balance of a switch: experts get rows in equal shares (Fedus et al. 2022; Mudide et al. 2024, 2410.08201)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import check_coefficient
from saekit.dictionaries.training import Forward


@dataclass(frozen=True)
class LoadBalanceConfig:
    """``coefficient`` of the term."""

    coefficient: float = 0.01

    def __post_init__(self):
        check_coefficient("coefficient", self.coefficient)


class LoadBalance(nn.Module):
    """``coefficient * d_out * experts * sum_e share_e * mean probability_e``; 1 in the bracket where balanced."""

    Config = LoadBalanceConfig
    fit = False
    needs = frozenset({"routes"})

    def __init__(self, config: LoadBalanceConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        p = forward.selected.routes
        assert p is not None  # checked by ``needs``
        experts = p.shape[1]
        share = torch.bincount(p.argmax(1), minlength=experts) / max(1, len(p))
        return self.config.coefficient * forward.y.shape[1] * experts * (share * p.mean(0)).sum()
