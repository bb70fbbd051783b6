"""p-annealing: an L1 penalty that turns step by step into one near L0 (Karvonen et al. 2024, 2408.00113).

At each change of p the coefficient is rescaled so that the penalty stays what it was.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import Coefficient, PenaltyConfig
from saekit.dictionaries.training import Forward, TrainState
from saekit.types import Codes, SaekitError

SOFT = 1e-3  # added to codes: the slope of z^p has no bound at 0
MEMORY = 10  # batches that the sums at a change of p are averaged over


@dataclass(frozen=True)
class PAnnealedConfig(PenaltyConfig):
    """A :class:`PenaltyConfig`; p falls from 1 to ``p_end`` in ``changes`` steps, from ``begin`` (a share of the run) on."""

    p_end: float = 0.2
    changes: int = 10
    begin: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.p_end <= 1:
            raise SaekitError(f"p_end = {self.p_end} must lie in 0..1; it is a power")
        if self.changes < 1 or not 0 <= self.begin < 1:
            raise SaekitError(
                f"changes = {self.changes} must be at least 1, and begin = {self.begin} lie in 0..1"
            )


def _powered(size: Tensor, p: float) -> Tensor:
    return size if p == 1 else torch.where(size > 0, (size + SOFT) ** p, 0.0)


class PAnnealed(nn.Module):
    """``coefficient * mean_rows sum_i (z_i ||d_i||)^p``."""

    Config = PAnnealedConfig
    fit = False
    needs = frozenset({"values"})
    stage: Tensor
    sums: Tensor

    def __init__(self, config: PAnnealedConfig, n_features: int):
        super().__init__()
        self.config = config
        self.coefficient = Coefficient(config)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))  # changes made so far
        self.register_buffer("sums", torch.zeros(2))  # running means with this p and the next
        self.sizes: Tensor = torch.zeros(0)  # of the codes that the last penalty fell on

    def power(self, stage: int) -> float:
        """p after so many changes."""
        c = self.config
        return 1 + (c.p_end - 1) * min(stage, c.changes) / c.changes

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        codes, p = forward.penalised, self.power(int(self.stage))
        size = forward.sizes(codes)
        self.sizes = size.detach()
        return self.coefficient(forward.state) * _powered(size, p).sum() / max(1, codes.rows)

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Steer the coefficient; change p where it is time."""
        self.coefficient.observe(codes, state)
        sizes, stage, c = self.sizes[self.sizes > 0], int(self.stage), self.config
        now = torch.stack([_powered(sizes, self.power(s)).sum() for s in (stage, stage + 1)])
        fresh = not bool(self.sums.any())
        self.sums.copy_(now if fresh else torch.lerp(self.sums, now, 1 / MEMORY))
        # the last value of p gets as long as the others
        share = (state.step + 1) / state.steps if state.steps else 0.0
        due = int((share - c.begin) / (1 - c.begin) * (c.changes + 1)) if share > c.begin else 0
        due = min(due, c.changes)
        if due > stage and self.sums[1] > 0:
            ratio = self.sums[0] / self.sums[1]
            if due > stage + 1:  # steps of so short a run skip values of p
                ratio = ratio * now[1] / _powered(sizes, self.power(due)).sum()
            self.coefficient.value.mul_(ratio)
            self.stage.fill_(due)
            self.sums.zero_()
