"""Matching pursuit as an encoder: k times, take the atom that explains most of what is left.

Mallat and Zhang 1993; as a dictionary's encoder Costa et al. 2025 (2506.03093): per step
``j = argmax <r, w_j>``, ``z = ReLU(<r, w_j>)``, ``r -= z w_j``. Gradients are those of the unrolled
scores; the choice of atoms is not differentiated.
"""

import torch
from torch import Tensor

from saekit.kernels import checks
from saekit.kernels.backend import run
from saekit.kernels.operators import operator

SHORTLISTS = ("auto", "fp32", "bf16")


@operator("pursue")
def _pursue(x: Tensor, weight: Tensor, k: int, shortlist: str) -> tuple[Tensor, Tensor, Tensor]:
    return run("pursuit", "pursue", x, x, weight, k, shortlist)


@operator("pursue_backward")
def _pursue_backward(
    indices: Tensor,
    values: Tensor,
    weight: Tensor,
    residual: Tensor,
    grad_values: Tensor,
    grad_residual: Tensor,
) -> tuple[Tensor, Tensor]:
    return run(
        "pursuit", "pursue_backward", weight, indices, values, weight, residual, grad_values, grad_residual
    )


@_pursue.register_fake
def _(x, weight, k, shortlist):
    rows = x.shape[0]
    return x.new_empty(rows, k), torch.empty_like(x), x.new_empty(rows, k, dtype=torch.int32)


@_pursue_backward.register_fake
def _(indices, values, weight, residual, grad_values, grad_residual):
    return torch.empty_like(residual), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    values, residual, indices = output
    ctx.save_for_backward(indices, values, inputs[1], residual)
    ctx.mark_non_differentiable(indices)


def _backward(ctx, grad_values, grad_residual, _):
    indices, values, weight, residual = ctx.saved_tensors
    grad_x, grad_weight = _pursue_backward(
        indices, values, weight, residual, grad_values.contiguous(), grad_residual.contiguous()
    )
    return grad_x, grad_weight, None, None


_pursue.register_autograd(_backward, setup_context=_setup)


def pursuit_encode(x, weight, k, *, shortlist="auto"):
    """``(values [rows, k], indices int32 [rows, k], residual [rows, d])``, steps in order.

    x [rows, d]; weight [n_features, d], whose rows should have norm 1. An atom may be taken again;
    its values add up. A row with nothing positive left keeps its residual, and the rest of its
    values are 0. ``x = sum of values times atoms + residual``. Differentiable in x and weight.
    """
    checks.matrix("weight", weight)
    checks.matrix("x", x, weight.shape[1])
    checks.alike(x=x, weight=weight)
    if k < 1:
        raise ValueError(f"k = {k} must be at least 1; it counts the steps of the pursuit")
    if shortlist not in SHORTLISTS:
        raise ValueError(f"shortlist = {shortlist!r} is not one of 'auto', 'fp32', 'bf16'")
    values, residual, indices = _pursue(x.contiguous(), weight.contiguous(), k, shortlist)
    return values, indices, residual
