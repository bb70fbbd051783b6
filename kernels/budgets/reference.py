"""The definition of budget_error: all reconstructions at once, by a cumulative sum over the entries."""

import torch


def budget_error(indices, values, weight, bias, target, shares):
    """``(total [rows], squared [rows, k])``."""
    parts = values[..., None] * weight[indices.long()]
    squared = (parts.cumsum(1) + bias - target[:, None]).square().sum(-1)
    return squared @ torch.tensor(shares, dtype=squared.dtype, device=squared.device), squared
