"""topk_encode by row blocks forward and with sparse gradients backward, on any device."""

import torch

from saekit.kernels.gather import csc, segment_sum

BLOCK_ENTRIES = 1 << 22  # pre-activations held at a time: 16 MB in fp32


def sorted_topk(pre, k):
    """Values and int64 indices of the k largest of each row, ties to the lowest index, in plain torch.

    torch.topk promises no order among equal values, so rows with a tie at or above the k-th place
    are redone with a stable sort; on real activations there are hardly any.
    """
    if k == pre.shape[-1]:
        ordered = torch.sort(pre, dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    values, indices = pre.topk(k + 1, dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1)
    values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    if tied.any():
        ordered = torch.sort(pre[tied], dim=-1, descending=True, stable=True)
        values[tied], indices[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, indices


def select(pre, k):
    """The selection that is fastest for the tensor: numba on the CPU in fp32 and fp64, else torch."""
    if pre.device.type == "cpu" and pre.dtype in (torch.float32, torch.float64):
        from saekit.kernels.topk_encode.cpu import select_topk

        return select_topk(pre, k)
    return sorted_topk(pre, k)


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, k):
        rows, n_features = x.shape[0], weight.shape[0]
        values = x.new_empty(rows, k)
        indices = torch.empty(rows, k, dtype=torch.int64, device=x.device)
        block = max(1, BLOCK_ENTRIES // n_features)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            values[part], indices[part] = select(torch.addmm(bias, x[part], weight.T), k)
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad_values, _):
        x, weight, indices = ctx.saved_tensors
        rows, k = indices.shape
        grad_x = grad_weight = grad_bias = None
        flat, grads = indices.reshape(-1), grad_values.reshape(-1)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            order, starts = csc(flat, weight.shape[0])
            grad_weight = segment_sum(x, order // k, starts, grads[order])
            grad_bias = torch.zeros_like(weight[:, 0]).index_add_(0, flat, grads)
        if ctx.needs_input_grad[0]:
            starts = torch.arange(0, rows * k, k, device=x.device)
            grad_x = segment_sum(weight, flat, starts, grads)
        return grad_x, grad_weight, grad_bias, None


def topk_encode(x, weight, bias, k):
    """Same contract as the reference; never holds more than a block of pre-activations."""
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [rows, {weight.shape[1]}]")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k = {k} is outside 1..n_features = {weight.shape[0]}")
    return _TopKEncode.apply(x, weight, bias, k)
