"""Encoding where features are shared out evenly among blocks of the input, each reading its own alone.

Each block selects by itself, and of what the blocks have found the selection keeps what it would have kept of
all features together. Gradients are those of ordinary rows, one for each block and row, so they stay sparse. Nothing
is copied where each block of x [rows, blocks, d_in] is contiguous by itself: x is ``[blocks, rows, d_in].movedim(0, 1)``.
"""

import torch

from saekit.kernels.factors import collector


def parts(x, weight, *others):
    """``(first feature, x [rows, d_in], weight, ...)`` of every block of x [rows, blocks, d_in]."""
    blocks = x.shape[1]
    if len(weight) % blocks:
        raise ValueError(f"n_features = {len(weight)} can't be shared out among {blocks} blocks of x")
    n = len(weight) // blocks
    with torch.no_grad():
        for i in range(blocks):
            own = slice(i * n, (i + 1) * n)
            yield (
                i * n,
                x.detach()[:, i].contiguous(),
                weight[own],
                *(None if o is None else o[own] for o in others),
            )


def ranked(found, k, absolute):
    """``(values, indices)`` [rows, k] of the largest of what blocks have found, ``[(values, indices), ...]``."""
    values, indices = (torch.cat(side, 1) for side in zip(*found, strict=True))
    size = values.abs() if absolute else values
    best = size.argsort(dim=1, descending=True, stable=True)[:, :k]  # ties to the lowest index
    return values.gather(1, best), indices.gather(1, best)


def in_rows(found):
    """``(rows, indices, values)`` of the entries of all blocks, row by row, from ``[(offsets, indices, values), ...]``."""
    owners = [
        torch.repeat_interleave(torch.arange(len(o) - 1, device=o.device), o.diff()) for o, _, _ in found
    ]
    rows, indices, values = (torch.cat(s) for s in (owners, [f[1] for f in found], [f[2] for f in found]))
    order = rows.argsort(stable=True)
    return rows[order], indices[order], values[order]


def offsets_of(rows, n):
    """Compressed sparse rows' offsets [n + 1], from the row of every entry."""
    return torch.nn.functional.pad(torch.bincount(rows, minlength=n).cumsum(0), (1, 0))


class Entries(torch.autograd.Function):
    """Gives values that were found without a graph their gradients: ``apply(x, weight, bias, rows, indices, values)``."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows, indices, values):
        """The values themselves."""
        ctx.save_for_backward(x.movedim(1, 0).contiguous(), weight, rows, indices)
        ctx.into = collector(weight)
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        """Those of x, weight and bias."""
        from saekit.kernels.encode import gradients

        x, weight, rows, indices = ctx.saved_tensors  # x as [blocks, rows, d_in]
        blocks, n = x.shape[:2]
        own = indices.long() // (len(weight) // blocks) * n + rows  # the row of a block
        order = own.argsort(stable=True)
        entries = [(offsets_of(own, blocks * n), indices[order], grad[order].contiguous())]
        grad_x, grad_weight, grad_bias = gradients(ctx, x.flatten(0, 1), weight, entries)
        grad_x = None if grad_x is None else grad_x.view(x.shape).movedim(0, 1)
        return grad_x, grad_weight, grad_bias, None, None, None


def attached(x, weight, bias, indices, values):
    """``values`` [rows, k] with their gradients; those of -inf, which stand for no entry, get none."""
    rows = torch.arange(len(x), device=x.device).repeat_interleave(indices.shape[1])
    flat = Entries.apply(x, weight, bias, rows, indices.reshape(-1), values.reshape(-1))
    return torch.where(values.isinf(), values, flat.view(values.shape))
