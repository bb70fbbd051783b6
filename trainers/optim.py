"""Optimizer and schedule as plain functions; the ones that choose a value say why."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

ADAM_BETAS = (0.9, 0.999)
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


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Fused Adam over the parameters that are trained."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.Adam(trained, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)


@torch.no_grad()
def clip_scale(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients down together so that their norm is at most ``limit``."""
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], limit, foreach=True)
