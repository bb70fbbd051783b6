"""A quadratic pull of L0 to a target, as in dictionary_learning's JumpReLU and Gemma Scope 2."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import Forward
from saekit.types import SaekitError


@dataclass(frozen=True)
class L0TargetConfig:
    """``k`` active features per row are wanted on average; ``coefficient`` weighs the pull."""

    k: float
    coefficient: float = 1.0
    warmup: float = 0.05

    def check(self, n_features: int) -> None:
        """Raise unless so many features can be active."""
        if not 0 < self.k <= n_features:
            raise SaekitError(f"k = {self.k} must lie in 0..n_features = {n_features}")


class L0Target(nn.Module):
    """``coefficient * d_out * (L0 / k - 1)^2``."""

    Config = L0TargetConfig
    fit = False
    needs = frozenset({"on"})

    def __init__(self, config: L0TargetConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        on = forward.selected.on
        assert on is not None  # checked by ``needs``
        off = on.sum() / max(1, forward.codes.rows) / self.config.k - 1
        weight = self.config.coefficient * forward.state.ramp(self.config.warmup) * forward.y.shape[1]
        return weight * off.square()
