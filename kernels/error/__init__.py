"""Squared error of a sparse reconstruction, for the whole dictionary and for nested prefixes of it.

One pass over the active atoms of a row decodes all prefixes, compares them with the target, and
takes the product of the error with every active atom, which is all that the gradient needs.
Matryoshka: Bussmann et al. 2025 (2503.17547).
"""

import math

import torch
from torch import Tensor

from saekit.kernels import checks
from saekit.kernels.backend import run
from saekit.kernels.factors import collector
from saekit.kernels.operators import operator
from saekit.kernels.product import row_ids, sum_outer


@operator("nested_error")
def _nested(
    offsets: Tensor, indices: Tensor, values: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
    prefixes: list[int], shares: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    squared, later, slopes = run(
        "error", "nested_error", weight, offsets, indices, values, weight, bias, target, prefixes, shares
    )
    weights = torch.tensor(shares, dtype=squared.dtype).to(squared.device, non_blocking=True)
    return weights @ squared, squared, later, slopes


@_nested.register_fake
def _(offsets, indices, values, weight, bias, target, prefixes, shares):
    rows, d = target.shape
    levels = len(prefixes)
    return (
        target.new_empty(rows), target.new_empty(levels, rows), target.new_empty(levels, rows, d),
        torch.empty_like(values),
    )  # fmt: skip


def _setup(ctx, inputs, output):
    offsets, indices, values, weight, _, _, prefixes, _ = inputs
    _, squared, later, slopes = output
    ctx.save_for_backward(offsets, indices, values, weight, later, slopes)
    ctx.prefixes, ctx.into = prefixes, collector(weight)
    ctx.mark_non_differentiable(squared, later, slopes)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    offsets, indices, values, weight, later, slopes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    rows, twice = row_ids(offsets, indices.shape[0]), 2 * grad
    per_entry = twice[rows]
    grad_weight = None
    if needs[3]:
        at = rows
        if len(ctx.prefixes) > 1:
            ends = torch.tensor(ctx.prefixes, device=indices.device)
            at = rows + torch.searchsorted(ends, indices.long(), right=True) * grad.shape[0]
        matrix, scaled = later.flatten(0, 1), values * per_entry
        if ctx.into is None:
            grad_weight = sum_outer(at, indices, scaled, matrix, weight.shape[0])
        else:
            ctx.into.add(at, indices, scaled, matrix)
    return (
        None, None, slopes * per_entry if needs[2] else None, grad_weight,
        twice @ later[0] if needs[4] else None, twice[:, None] * -later[0] if needs[5] else None, None, None,
    )  # fmt: skip


_nested.register_autograd(_backward, setup_context=_setup)


def nested_error(offsets, indices, values, weight, bias, target, prefixes, shares=None):
    """``(total [rows], squared [prefixes, rows], error [rows, d])`` of nested reconstructions.

    Prefix p reconstructs with the features below ``prefixes[p]`` (rising, the last is n_features):
    ``y_p = sum of their values times atoms + bias``. ``squared[p] = |y_p - target|^2``, ``error``
    that of the last prefix, both cut from the graph; ``total = sum_p shares[p] squared[p]`` is
    differentiable in values, weight, bias and target. Shares default to one over their number.
    """
    checks.matrix("weight", weight)
    checks.matrix("target", target, weight.shape[1], offsets.shape[0] - 1)
    checks.vector("bias", bias, weight.shape[1])
    checks.alike(weight=weight, values=values, bias=bias, target=target)
    checks.entries(offsets, indices, values, weight.shape[0])
    prefixes = [int(p) for p in prefixes]
    if (
        not prefixes
        or prefixes[-1] != weight.shape[0]
        or sorted(set(prefixes)) != prefixes
        or prefixes[0] < 1
    ):
        raise ValueError(f"prefixes = {prefixes} must rise from at least 1 to n_features = {weight.shape[0]}")
    shares = [1 / len(prefixes)] * len(prefixes) if shares is None else [float(s) for s in shares]
    if len(shares) != len(prefixes):
        raise ValueError(
            f"shares has {len(shares)} entries and prefixes {len(prefixes)}; give one per prefix"
        )
    if not all(0 <= s < math.inf for s in shares) or not shares[-1] > 0:
        raise ValueError(f"shares = {shares} must be at least 0, and the last above 0")
    total, squared, later, _ = _nested(
        offsets.contiguous(), indices.contiguous(), values.contiguous(), weight.contiguous(), bias.contiguous(), target.contiguous(),
        prefixes, shares,
    )  # fmt: skip
    checks.finite(total.detach(), values=values, weight=weight, bias=bias, target=target)
    last = later[-1].detach()
    return total, squared.detach(), last if shares[-1] == 1 else last / shares[-1]


def squared_error(offsets, indices, values, weight, bias, target):
    """``(squared [rows], error [rows, d])`` of the reconstruction; the error is cut from the graph.

    ``squared = |sum of values times atoms + bias - target|^2``, differentiable in values, weight,
    bias and target.
    """
    total, _, error = nested_error(offsets, indices, values, weight, bias, target, [weight.shape[0]], [1.0])
    return total, error
