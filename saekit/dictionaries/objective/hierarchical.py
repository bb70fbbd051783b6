"""HierarchicalTopK: the first code of a row alone, the first two, ..., all k must each reconstruct.

Balagansky et al. 2025 (2505.24473). One dictionary then serves every k up to the one it was trained
with: ``encode`` with the largest and cut rows short.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import Forward
from saekit.kernels import budget_error
from saekit.types import SaekitError


@dataclass(frozen=True)
class HierarchicalConfig:
    """``budgets``: the numbers of codes that must serve by themselves; None takes all of 1..k."""

    budgets: tuple[int, ...] | None = None

    def __post_init__(self):
        b = self.budgets
        if b is not None and (not b or b[0] < 1 or sorted(set(b)) != list(b)):
            raise SaekitError(f"budgets = {b} must rise from at least 1")

    def check_beside(self, selection: Any) -> None:
        """Raise unless rows have so many codes."""
        k = getattr(selection, "k", 0) * getattr(selection, "groups", 1)
        if self.budgets is not None and self.budgets[-1] > k:
            raise SaekitError(
                f"budgets = {self.budgets} end above the {k} codes of a row; end them at {k} or below"
            )


class Hierarchical(nn.Module):
    """``mean over budgets of mean_rows ||y - y_hat_budget||^2``."""

    Config = HierarchicalConfig
    fit = True
    needs = frozenset({"ranked"})

    def __init__(self, config: HierarchicalConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The term; range [0, inf)."""
        indices, values = forward.codes.rectangular()
        shares, k = None, values.shape[1]
        if self.config.budgets is not None:
            chosen = self.config.budgets
            # while k anneals, all of a row stands for the budgets above it
            shares = [sum(min(b, k) == j for b in chosen) / len(chosen) for j in range(1, k + 1)]
        total, squared = budget_error(indices, values, forward.atoms, forward.b_dec, forward.y, shares)
        forward.squared = squared[:, -1]
        with torch.no_grad():
            forward.error = forward.features() - forward.y
        return total.mean()
