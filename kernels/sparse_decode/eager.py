"""sparse_decode in plain torch: gather-sum forward, sparse gradients backward."""

import torch

from saekit.kernels.gather import csc, segment_sum

BLOCK_ELEMENTS = 1 << 21  # gathered elements held at a time in the gradient to the values


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets, indices, values, weight):
        ctx.save_for_backward(offsets, indices, values, weight)
        return segment_sum(weight, indices, offsets[:-1], values)

    @staticmethod
    def backward(ctx, grad):
        offsets, indices, values, weight = ctx.saved_tensors
        grad = grad.contiguous()
        rows = torch.repeat_interleave(torch.arange(grad.shape[0], device=grad.device), offsets.diff())
        grad_values = grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_values = torch.empty_like(values)
            block = max(1, BLOCK_ELEMENTS // weight.shape[1])
            for start in range(0, values.numel(), block):
                part = slice(start, start + block)
                grad_values[part] = (weight[indices[part]] * grad[rows[part]]).sum(-1)
        if ctx.needs_input_grad[3]:
            order, starts = csc(indices, weight.shape[0])
            grad_weight = segment_sum(grad, rows[order], starts, values[order])
        return None, None, grad_values, grad_weight


def sparse_decode(offsets, indices, values, weight):
    """Same contract as the reference, without a dense [rows, n_features] matrix."""
    return _SparseDecode.apply(offsets, indices, values, weight)
