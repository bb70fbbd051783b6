"""The definition of pursuit_encode: dense scores at every step, differentiable by plain autograd."""

import torch


def pursue(x, weight, k):
    """``(values, indices, residual)``; exact ties go to the lowest index."""
    residual, values, indices = x, [], []
    for _ in range(k):
        scores = residual @ weight.T
        at = scores.detach().argmax(-1)
        atoms = weight[at]
        value = (residual * atoms).sum(-1).relu()
        residual = residual - value[:, None] * atoms
        values.append(value)
        indices.append(at)
    return torch.stack(values, 1), torch.stack(indices, 1).int(), residual
