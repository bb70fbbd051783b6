"""Products of sparse codes with weights: what decoding and every sparse gradient is made of.

For codes S [rows, n_features] in compressed sparse rows: ``decode`` is ``S W``, ``sample`` the
entries of ``G W^T`` where S has one, ``sum_outer`` ``S^T M``.
"""

import torch
from torch import Tensor

from saekit.kernels import checks
from saekit.kernels.backend import run
from saekit.kernels.factors import collector
from saekit.kernels.operators import operator


@operator("decode")
def _decode(offsets: Tensor, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    return run("product", "decode", weight, offsets, indices, values, weight)


@operator("sample")
def _sample(offsets: Tensor, indices: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return run("product", "sample", weight, offsets, indices, weight, grad)


@operator("sum_outer")
def _sum_outer(rows: Tensor, features: Tensor, values: Tensor, matrix: Tensor, n_features: int) -> Tensor:
    return run("product", "sum_outer", matrix, rows, features, values, matrix, n_features)


@_decode.register_fake
def _(offsets, indices, values, weight):
    return weight.new_empty(offsets.shape[0] - 1, weight.shape[1])


@_sample.register_fake
def _(offsets, indices, weight, grad):
    return weight.new_empty(indices.shape[0])


@_sum_outer.register_fake
def _(rows, features, values, matrix, n_features):
    return matrix.new_empty(n_features, matrix.shape[1])


def row_ids(offsets, nnz):
    """Row of every entry, int64 [nnz]."""
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=nnz)


def sum_outer(rows, features, values, matrix, n_features):
    """``out[i] = sum of values[e] matrix[rows[e]]`` over the entries e of feature i: [n_features, d]."""
    return _sum_outer(rows, features, values.contiguous(), matrix.contiguous(), n_features)


def feature_sums(features, values, n_features):
    """``out[i] = sum of the values of feature i``, in their order on every device: [n_features]."""
    if values.device.type == "cpu":
        wide = (
            values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        )  # sums would stall
        return wide.new_zeros(n_features).index_add_(0, features.long(), wide).to(values.dtype)
    one = values.new_ones(1, 1)  # index_add_ would add in any order
    return sum_outer(torch.zeros_like(features), features, values, one, n_features)[:, 0]


def weight_gradient(into, offsets, indices, values, matrix, n_features):
    """The gradient ``S^T M`` of a weight: dense, or None where it went to a collector."""
    rows = row_ids(offsets, indices.shape[0])
    if into is None:
        return sum_outer(rows, indices, values, matrix, n_features)
    into.add(rows, indices, values, matrix)
    return None


def _setup(ctx, inputs, output):
    offsets, indices, values, weight = inputs
    ctx.save_for_backward(offsets, indices, values, weight)
    ctx.into = collector(weight)


def _backward(ctx, grad):
    offsets, indices, values, weight = ctx.saved_tensors
    grad_values = None
    if ctx.needs_input_grad[2]:
        grad_values = _sample(offsets, indices, weight, grad.contiguous())
    grad_weight = None
    if ctx.needs_input_grad[3]:  # a view of a wider gradient is kept as such until the optimizer needs it
        grad_weight = weight_gradient(ctx.into, offsets, indices, values, grad, weight.shape[0])
    return None, None, grad_values, grad_weight


_decode.register_autograd(_backward, setup_context=_setup)


def _setup_sample(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.into = collector(inputs[2])


def _backward_sample(ctx, grad):
    offsets, indices, weight, x = ctx.saved_tensors
    grad = grad.contiguous()
    grad_weight = None
    if ctx.needs_input_grad[2]:
        grad_weight = weight_gradient(ctx.into, offsets, indices, grad, x, weight.shape[0])
    grad_x = _decode(offsets, indices, grad, weight) if ctx.needs_input_grad[3] else None
    return None, None, grad_weight, grad_x


_sample.register_autograd(_backward_sample, setup_context=_setup_sample)


def sampled_product(offsets, indices, weight, x):
    """``x W^T`` at some entries alone: [nnz], that of row r and feature i is ``x[r] weight[i]``.

    offsets int64 [rows + 1], indices int [nnz], weight [n_features, d], x [rows, d]. Differentiable in weight and
    x. Raises ValueError for shapes or indices that don't fit.
    """
    checks.matrix("weight", weight)
    checks.matrix("x", x)
    checks.alike(weight=weight, x=x)
    checks.entries(offsets, indices, indices, weight.shape[0])
    if x.shape != (offsets.shape[0] - 1, weight.shape[1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected {(offsets.shape[0] - 1, weight.shape[1])}, a row of weight's width for each row of entries"
        )
    out = _sample(offsets.contiguous(), indices.contiguous(), weight.contiguous(), x.contiguous())
    checks.finite(out.detach(), weight=weight, x=x)
    return out


def sparse_decode(offsets, indices, values, weight):
    """``[rows, d]``: every row the weighted sum of the atoms it holds.

    offsets int64 [rows + 1], indices int [nnz], values [nnz], weight [n_features, d].
    Differentiable in values and weight. Raises ValueError for shapes or indices that don't fit.
    """
    checks.matrix("weight", weight)
    checks.alike(weight=weight, values=values)
    checks.entries(offsets, indices, values, weight.shape[0])
    out = _decode(offsets.contiguous(), indices.contiguous(), values.contiguous(), weight.contiguous())
    checks.finite(out.detach(), values=values, weight=weight)
    return out
