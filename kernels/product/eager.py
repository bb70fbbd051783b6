"""Sparse products in plain torch, on any device and in any dtype."""

import torch
import torch.nn.functional as F

BLOCK = 1 << 21  # gathered elements held at a time


def _bags(table, rows, starts, values):
    if rows.numel() == 0:
        return table.new_zeros(starts.numel(), table.shape[1])
    return F.embedding_bag(rows.long(), table, starts, mode="sum", per_sample_weights=values.to(table.dtype))


def decode(offsets, indices, values, weight):
    """``out[r] = sum_e values[e] weight[indices[e]]`` over the entries of row r."""
    return _bags(weight, indices, offsets[:-1], values)


def sample(offsets, indices, weight, grad):
    """``out[e] = <weight[indices[e]], grad[row of e]>``."""
    rows = torch.repeat_interleave(torch.arange(len(grad), device=grad.device), offsets.diff())
    out = weight.new_empty(len(indices))
    block = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(indices), block):
        part = slice(start, start + block)
        out[part] = (weight[indices[part]] * grad[rows[part]]).sum(-1)
    return out


def sum_outer(rows, features, values, matrix, n_features):
    """``out[i] = sum of values[e] matrix[rows[e]]`` over the entries e of feature i, in their order."""
    order = torch.argsort(features, stable=True)
    counts = torch.bincount(features, minlength=n_features)
    return _bags(matrix, rows[order], counts.cumsum(0) - counts, values[order])
