"""Squared errors of nested budgets: the first entry of a row alone, the first two, ..., all k.

HierarchicalTopK (Balagansky et al. 2025, 2505.24473) trains one dictionary for every k at once. The
reconstructions differ by one atom each, so one running sum per row serves them all, forwards and,
by taking the atoms off again, backwards; nothing of size rows * k * d exists.
"""

import torch
from torch import Tensor

from saekit.kernels import checks
from saekit.kernels.backend import run
from saekit.kernels.operators import operator


@operator("budget_error")
def _budgets(
    indices: Tensor, values: Tensor, weight: Tensor, bias: Tensor, target: Tensor, shares: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    squared, slopes, all_later = run(
        "budgets", "budget_error", weight, indices, values, weight, bias, target, shares
    )
    total = squared @ torch.tensor(shares, dtype=squared.dtype, device=squared.device)
    return total, squared, slopes, all_later


@operator("budget_outer")
def _outer(
    indices: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    shares: list[float],
    scale: Tensor,
) -> Tensor:
    return run("budgets", "budget_outer", weight, indices, values, weight, bias, target, shares, scale)


@_budgets.register_fake
def _(indices, values, weight, bias, target, shares):
    rows = target.new_empty(target.shape[0])
    return rows, torch.empty_like(values), torch.empty_like(values), torch.empty_like(target)


@_outer.register_fake
def _(indices, values, weight, bias, target, shares, scale):
    return torch.empty_like(weight)


def _setup(ctx, inputs, output):
    *tensors, shares = inputs
    _, squared, slopes, all_later = output
    ctx.save_for_backward(*tensors, slopes, all_later)
    ctx.shares = shares
    ctx.mark_non_differentiable(squared, slopes, all_later)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    indices, values, weight, bias, target, slopes, all_later = ctx.saved_tensors
    needs, twice = ctx.needs_input_grad, 2 * grad
    grad_weight = _outer(indices, values, weight, bias, target, ctx.shares, twice) if needs[2] else None
    return (
        None, slopes * twice[:, None] if needs[1] else None, grad_weight,
        twice @ all_later if needs[3] else None, twice[:, None] * -all_later if needs[4] else None, None,
    )  # fmt: skip


_budgets.register_autograd(_backward, setup_context=_setup)


def budget_error(indices, values, weight, bias, target, shares=None):
    """``(total [rows], squared [rows, k])`` of the reconstructions from the first 1, 2, ..., k entries of a row.

    indices and values [rows, k] in the order that budgets take them (falling value); weight
    [n_features, d]. ``squared[:, j] = |sum of the first j + 1 values times atoms + bias - target|^2``,
    cut from the graph; ``total = squared @ shares`` is differentiable in values, weight, bias and
    target. Shares default to 1 / k; a budget of share 0 costs nothing in the loss.
    """
    checks.matrix("weight", weight)
    checks.matrix("target", target, weight.shape[1])
    checks.matrix("values", values, rows=target.shape[0])
    checks.matrix("indices", indices, *values.shape[::-1])
    checks.vector("bias", bias, weight.shape[1])
    checks.alike(weight=weight, values=values, bias=bias, target=target)
    rows, k = values.shape
    offsets = torch.arange(rows + 1, device=values.device) * k
    checks.entries(offsets, indices.reshape(-1), values.reshape(-1), weight.shape[0])
    shares = [1 / k] * k if shares is None else [float(s) for s in shares]
    if len(shares) != k:
        raise ValueError(f"shares has {len(shares)} entries and a row k = {k}; give one per budget")
    total, squared, _, _ = _budgets(
        indices.contiguous(),
        values.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        target.contiguous(),
        shares,
    )
    checks.finite(total.detach(), values=values, weight=weight, bias=bias, target=target)
    return total, squared.detach()
