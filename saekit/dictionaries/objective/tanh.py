"""Tanh: a penalty that counts large codes and taxes small ones (Anthropic, January 2025 update)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import Coefficient, PenaltyConfig
from saekit.dictionaries.training import Forward, TrainState
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class TanhConfig(PenaltyConfig):
    """A :class:`PenaltyConfig` whose penalty saturates at codes of about ``1 / slope``."""

    slope: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.slope < math.inf:
            raise SaekitError(
                f"slope = {self.slope} must be a number above 0; codes of about 1 / slope count"
            )


class Tanh(nn.Module):
    """``coefficient * mean_rows sum_i tanh(slope z_i ||d_i||)``."""

    Config = TanhConfig
    fit = False
    needs = frozenset({"values"})

    def __init__(self, config: TanhConfig, n_features: int):
        super().__init__()
        self.slope = config.slope
        self.coefficient = Coefficient(config)

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        codes = forward.penalised
        size = torch.tanh(self.slope * forward.sizes(codes))
        return self.coefficient(forward.state) * size.sum() / max(1, codes.rows)

    def observe(self, codes: Codes, state: TrainState) -> None:
        """Steer the coefficient."""
        self.coefficient.observe(codes, state)
