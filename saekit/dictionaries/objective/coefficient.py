"""The weight of a penalty: fixed, or steered so that a wanted number of features is active.

Penalties know sparsity only through a coefficient, and what coefficient gives what L0 depends on the
data. With ``k`` an integral controller looks for it: each step multiplies the coefficient by
``(average L0 / k)^gain`` (as SynthSAEBench's trainers do, in logarithms).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import TrainState
from saekit.types import Codes, SaekitError

LIMITS = (1e-6, 1e6)  # of a steered coefficient
AVERAGE = 20  # steps that the controller's view of L0 looks back on


@dataclass(frozen=True)
class PenaltyConfig:
    """``coefficient`` of the penalty, reached after ``warmup`` (a share of the run).

    With ``k`` it is where the coefficient starts, which is then steered until k features are active per
    row on average.
    """

    coefficient: float = 1.0
    k: float | None = None
    warmup: float = 0.05

    def __post_init__(self):
        if not 0 <= self.coefficient < float("inf"):
            raise SaekitError(f"coefficient = {self.coefficient} must be a number of at least 0")
        if self.k is not None and not (self.k > 0 and self.coefficient > 0):
            raise SaekitError(f"k = {self.k} and coefficient = {self.coefficient} must be above 0")
        if not 0 <= self.warmup <= 1:
            raise SaekitError(f"warmup = {self.warmup} must lie in 0..1; it is a share of the run")

    def check(self, n_features: int) -> None:
        """Raise unless so many features can be active."""
        if self.k is not None and self.k > n_features:
            raise SaekitError(f"k = {self.k} is more than n_features = {n_features}; ask for fewer")


class Coefficient(nn.Module):
    """The current weight, and the L0 that it has led to."""

    value: Tensor
    l0: Tensor

    def __init__(self, config: PenaltyConfig):
        super().__init__()
        self.config = config
        self.register_buffer("value", torch.tensor(float(config.coefficient)))
        self.register_buffer("l0", torch.zeros(()))  # running mean; 0 before the first step

    def forward(self, state: TrainState) -> Float[Tensor, ""]:
        """The weight at a step."""
        return self.value * state.ramp(self.config.warmup)

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Take a batch's L0 into account."""
        now = (codes.values != 0).sum() / max(1, codes.rows)
        self.l0.copy_(torch.where(self.l0 > 0, torch.lerp(self.l0, now, 1 / AVERAGE), now))
        if self.config.k is not None:
            ratio = (self.l0 / self.config.k).clamp(0.1, 10.0)
            self.value.mul_(ratio ** self._gain(state)).clamp_(*LIMITS)

    def _gain(self, state: TrainState) -> float:
        # the coefficient may change e-fold in a hundredth of the run, and in no less than 50 steps
        return 1 / max(50.0, (state.steps or 10_000) / 100)

    def missed(self) -> str | None:
        """Why the wanted L0 was not reached, or None where it was (within 10 %)."""
        k, l0 = self.config.k, self.l0.item()
        if k is None or l0 == 0 or abs(math.log(l0 / k)) < math.log(1.1):
            return None
        limit = " and its limit is reached" if self.value.item() in LIMITS else ""
        return f"k = {k:g} was asked for and L0 is {l0:.1f}; the penalty's coefficient stands at {self.value.item():.3g}{limit}"
