"""budget_error in plain torch: the entries of all rows one after another."""

import torch

from saekit.kernels.product import eager as product


def budget_error(indices, values, weight, bias, target, shares):
    """See ``cpu.py``."""
    e = bias - target
    squared, slopes = torch.empty_like(values), torch.empty_like(values)
    for j in range(len(shares)):
        e = e + values[:, j, None] * weight[indices[:, j]]
        squared[:, j] = e.square().sum(-1)
    later = torch.zeros_like(e)
    for j in reversed(range(len(shares))):
        atoms = weight[indices[:, j]]
        later = later + shares[j] * e
        slopes[:, j] = (later * atoms).sum(-1)
        e = e - values[:, j, None] * atoms
    return squared, slopes, later


def budget_outer(indices, values, weight, bias, target, shares, scale):
    """See ``cpu.py``."""
    rows = torch.arange(len(target), device=target.device)
    e = bias - target
    for j in range(len(shares)):
        e = e + values[:, j, None] * weight[indices[:, j]]
    out, later = torch.zeros_like(weight), torch.zeros_like(e)
    for j in reversed(range(len(shares))):
        later = later + shares[j] * e
        out += product.sum_outer(rows, indices[:, j], values[:, j] * scale, later, len(weight))
        e = e - values[:, j, None] * weight[indices[:, j]]
    return out
