"""pursuit_encode in plain torch, on any device and in any dtype."""

import torch

from saekit.kernels.encode import eager as encode
from saekit.kernels.product import eager as product


def pursue(x, weight, k, shortlist):
    """Values, residual and indices; see ``cpu.py``."""
    residual, none = x.clone(), weight.new_zeros(len(weight))
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    for step in range(k):
        value, at = encode.topk(residual, weight, none, 1, len(weight), False, None, 0, shortlist)
        values[:, step], indices[:, step] = value[:, 0].relu(), at[:, 0]
        residual -= values[:, step, None] * weight[at[:, 0]]
    return values, residual, indices


def pursue_backward(indices, values, weight, residual, grad_values, grad_residual):
    """Gradients of x and weight; see ``cpu.py``."""
    rows = torch.arange(len(residual), device=residual.device)
    r, gradient, out = residual, grad_residual, torch.zeros_like(weight)
    for step in reversed(range(values.shape[1])):
        at, value = indices[:, step], values[:, step]
        atoms = weight[at]
        r = r + value[:, None] * atoms
        slope = torch.where(value > 0, grad_values[:, step] - (gradient * atoms).sum(-1), 0)
        out += product.sum_outer(rows, at, slope, r, len(weight))
        out -= product.sum_outer(rows, at, value, gradient, len(weight))
        gradient = gradient + slope[:, None] * atoms
    return gradient, out
