"""A quadratic pull of L0 to a target, as in dictionary_learning's JumpReLU and Gemma Scope 2."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import AVERAGE, check_coefficient, check_share
from saekit.dictionaries.training import Forward, TrainState
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class L0TargetConfig:
    """``k`` active features per row are wanted on average; ``coefficient`` weighs the pull."""

    k: float
    coefficient: float = 1.0
    warmup: float = 0.05

    def __post_init__(self):
        check_coefficient("coefficient", self.coefficient)
        check_share("warmup", self.warmup)

    def check(self, n_features: int) -> None:
        """Raise unless so many features can be active."""
        if not 0 < self.k <= n_features:
            raise SaekitError(f"k = {self.k} must lie in 0..n_features = {n_features}")


class L0Target(nn.Module):
    """``coefficient * d_out * (L0 / k - 1)^2``."""

    Config = L0TargetConfig
    fit = False
    needs = frozenset({"on"})
    l0: Tensor

    def __init__(self, config: L0TargetConfig, n_features: int):
        super().__init__()
        self.config = config
        self.register_buffer("l0", torch.zeros(()))  # running mean; 0 before the first step

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        on = forward.selected.on
        assert on is not None  # checked by ``needs``
        off = on.sum() / max(1, forward.codes.rows) / self.config.k - 1
        weight = self.config.coefficient * forward.state.ramp(self.config.warmup) * forward.y.shape[1]
        return weight * off.square()

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Follow L0."""
        now = ((codes.values != 0).sum() / max(1, codes.rows)).to(self.l0)
        self.l0.copy_(torch.where(self.l0 == 0, now, torch.lerp(self.l0, now, 1 / AVERAGE)))

    def missed(self) -> str | None:
        """Why the wanted L0 was not reached, or None where it was (within 10 %)."""
        k, l0 = self.config.k, self.l0.item()
        if l0 == 0 or abs(math.log(l0 / k)) < math.log(1.1):
            return None
        return f"k = {k:g} was asked for and L0 is {l0:.1f}; the pull's coefficient is {self.config.coefficient:g}: choose a larger one, or more steps"
