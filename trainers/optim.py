"""Optimizer and schedule as plain functions; the ones that choose a value say why."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saekit.kernels import Factors, adam_step, collect, gradient_norm
from saekit.registry import nearest
from saekit.types import SaekitError

# name -> whether entries without a gradient stay where they are (SparseAdam, Wang et al. 2025, 2508.16929)
OPTIMIZERS = {"adam": False, "sparse_adam": True}
# a feature that fires after a long rest moves by (1 - b1) / sqrt(1 - b2) rates at first: 1 with these, 3.2 with .999
BETAS = (0.9, 0.99)
# no gradient of a feature that fires is this small; larger values slow rare features down
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Chosen:
    """A value and the reason for it."""

    value: float
    reason: str


def learning_rate(n_features: int, steps: int | None) -> Chosen:
    """Adam's peak rate: ``2e-4 sqrt(2^14 / n_features)`` (Gao et al. 2024), more for a short run.

    A run of fewer than 10,000 steps can't afford the slow rate: it gets the factor
    ``sqrt(10000 / steps)``, at most 8. That is a rule of thumb that worked on code-lm, not a fit.
    """
    scaling = 2e-4 * math.sqrt(2**14 / n_features)
    boost = 1.0 if steps is None else min(8.0, max(1.0, math.sqrt(10_000 / steps)))
    reason = f"2e-4 * sqrt(2^14 / {n_features})" + (
        f" * {boost:.2f} for a run of {steps} steps" if boost > 1 else ""
    )
    return Chosen(scaling * boost, reason)


def warmup_steps(steps: int | None) -> Chosen:
    """Linear warm-up: 5 % of the run, at most 1000 steps."""
    if steps is None:
        return Chosen(100, "100 steps, for a run of unknown length")
    return Chosen(min(1000, max(1, steps // 20)), "5 % of the run, at most 1000 steps")


def rate_factor(step: int, steps: int | None, warmup: int, decay: float) -> float:
    """Factor on the peak rate at ``step`` (from 0): linear up, flat, linear to zero over the last ``decay`` share."""
    up = min(1.0, (step + 1) / max(1, warmup))
    if steps is None:
        return up
    left = (steps - step) / max(1.0, decay * steps)
    return min(up, 1.0, left)


def is_masked(optimizer: str) -> bool:
    """Whether an optimizer's name means the masked step; raises for a name that is none."""
    if optimizer not in OPTIMIZERS:
        raise SaekitError(f"optimizer {optimizer!r} is unknown{nearest(optimizer, OPTIMIZERS)}")
    return OPTIMIZERS[optimizer]


class Adam:
    """Adam over the trained parameters, each in one fused pass; see :func:`saekit.kernels.adam_step`.

    Rows of ``unit`` weights stay on the sphere. ``masked`` moves only what has a gradient (SparseAdam).
    Gradients are those of ``collect`` (for weights,
    as sums of outer products) and of ``.grad``.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        unit: Iterable[Tensor] = (),
        *,
        betas: tuple[float, ...] = BETAS,
        masked: bool = False,
    ):
        self.betas, self.masked = betas, masked
        self.parameters = [p for p in parameters if p.requires_grad]
        self.unit = [any(p is u for u in unit) for p in self.parameters]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def collect(self) -> AbstractContextManager[dict[Tensor, Factors]]:
        """Context of a forward and backward pass, in which weights gather their sparse gradients."""
        return collect([p for p in self.parameters if p.ndim == 2])

    def step(
        self, factors: Mapping[Tensor, Factors], rate: float, step: int, clip: float | None = None
    ) -> None:
        """One step (from 1) with the gradients of a backward pass, which are used up."""
        gradients = [self._gradient(p, factors.get(p)) for p in self.parameters]
        found = [
            (p, g, *moments, unit)
            for p, g, moments, unit in zip(self.parameters, gradients, self.moments, self.unit, strict=True)
            if g is not None
        ]
        scale = 1.0
        if clip is not None:
            weights, grads, _, _, units = zip(*found, strict=True)
            scale = min(1.0, clip / (gradient_norm(weights, grads, units).item() + 1e-6))
        for p, g, m, v, unit in found:
            adam_step(
                p, g, m, v, rate=rate, step=step, betas=self.betas, eps=ADAM_EPS, scale=scale, unit=unit,
                masked=self.masked,
            )  # fmt: skip
            p.grad = None

    def forget(self, which: Tensor, of: Iterable[Tensor]) -> None:
        """Clear the moments of some features in parameters that have a row or an entry for each."""
        own = {id(p) for p in of}
        for p, moments in zip(self.parameters, self.moments, strict=True):
            if id(p) in own:
                for moment in moments:
                    moment[which] = 0

    @staticmethod
    def _gradient(parameter: Tensor, factors: Factors | None) -> "Tensor | Factors | None":
        if not factors:
            return parameter.grad
        if parameter.grad is None:
            return factors
        return parameter.grad + factors.dense(len(parameter))  # some of it came another way
