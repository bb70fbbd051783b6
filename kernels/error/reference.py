"""The definition of nested_error: one dense reconstruction per prefix of the features."""

import torch

from saekit.kernels.product.reference import dense


def nested_error(offsets, indices, values, weight, bias, target, prefixes, shares):
    """``(total [rows], squared [prefixes, rows], error of the last prefix [rows, d])``."""
    codes = dense(offsets, indices, values, len(weight))
    errors = torch.stack([codes[:, :p] @ weight[:p] + bias - target for p in prefixes])
    squared = errors.square().sum(-1)
    return (
        (torch.tensor(shares, dtype=squared.dtype, device=squared.device)[:, None] * squared).sum(0),
        squared,
        errors[-1],
    )
