"""The weight of a penalty: fixed, or steered so that a wanted number of features is active.

Penalties know sparsity only through a coefficient, and what coefficient gives what L0 depends on the
data. With ``k`` a controller looks for it. It is a proportional-integral one on logarithms (SynthSAEBench's
trainers use the integral part): with ``e = log(L0 / target)`` each step adds ``INTEGRAL e + PROPORTIONAL
(e - e before)`` to the coefficient's logarithm. The target comes down from the first L0 to k over the first
``descent`` of the run: a coefficient that has to do so at once overshoots, and kills features.
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
PROPORTIONAL, INTEGRAL = 1.0, 0.02


def check_coefficient(name: str, value: float) -> None:
    """Raise unless it can weigh a term: a negative weight would reward what the term is there to lower."""
    if not 0 <= value < math.inf:
        raise SaekitError(f"{name} = {value} must be a number of at least 0")


def check_share(name: str, value: float) -> None:
    """Raise unless it is a share of the run, as warm-ups are."""
    if not 0 <= value <= 1:
        raise SaekitError(f"{name} = {value} must lie in 0..1; it is a share of the run")


@dataclass(frozen=True)
class PenaltyConfig:
    """``coefficient`` of the penalty, reached after ``warmup`` (a share of the run).

    With ``k`` it is where the coefficient starts, which is then steered so that the number of active
    features per row comes to k over the first ``descent`` of the run.
    """

    coefficient: float = 1.0
    k: float | None = None
    warmup: float = 0.05
    descent: float = 0.3

    def __post_init__(self):
        check_coefficient("coefficient", self.coefficient)
        if self.k is not None and not (self.k > 0 and self.coefficient > 0):
            raise SaekitError(f"k = {self.k} and coefficient = {self.coefficient} must be above 0")
        check_share("warmup", self.warmup)
        check_share("descent", self.descent)

    def check(self, n_features: int) -> None:
        """Raise unless so many features can be active."""
        if self.k is not None and self.k > n_features:
            raise SaekitError(f"k = {self.k} is more than n_features = {n_features}; ask for fewer")


class Coefficient(nn.Module):
    """The current weight, and the L0 that it has led to."""

    value: Tensor
    l0: Tensor
    first: Tensor
    before: Tensor

    def __init__(self, config: PenaltyConfig):
        super().__init__()
        self.config = config
        self.register_buffer("value", torch.tensor(float(config.coefficient)))
        self.register_buffer("l0", torch.zeros(()))  # running mean; 0 before the first step
        self.register_buffer("first", torch.zeros(()))  # the L0 of the first step
        self.register_buffer("before", torch.zeros(()))  # the error of the step before

    def forward(self, state: TrainState) -> Float[Tensor, ""]:
        """The weight at a step."""
        return self.value * state.ramp(self.config.warmup)

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Take a batch's L0 into account."""
        now = ((codes.values != 0).sum() / max(1, codes.rows)).to(self.l0).clamp(min=1e-3)
        fresh = self.l0 == 0
        self.l0.copy_(torch.where(fresh, now, torch.lerp(self.l0, now, 1 / AVERAGE)))
        if self.config.k is None:
            return
        self.first.copy_(torch.where(fresh, now, self.first))
        done = state.ramp(self.config.descent)
        target = (1 - done) * self.first.log() + done * math.log(self.config.k)
        error = self.l0.log() - target
        change = INTEGRAL * error + PROPORTIONAL * (error - self.before) * (~fresh)
        self.before.copy_(error)
        self.value.mul_(change.exp()).clamp_(*LIMITS)

    def missed(self) -> str | None:
        """Why the wanted L0 was not reached, or None where it was (within 10 %)."""
        k, l0 = self.config.k, self.l0.item()
        if k is None or l0 == 0 or abs(math.log(l0 / k)) < math.log(1.1):
            return None
        limit = " and its limit is reached" if self.value.item() in LIMITS else ""
        return f"k = {k:g} was asked for and L0 is {l0:.1f}; the penalty's coefficient stands at {self.value.item():.3g}{limit}"
