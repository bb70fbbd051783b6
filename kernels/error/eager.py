"""nested_error in plain torch, on any device and in any dtype."""

import torch

from saekit.kernels.product import eager


def nested_error(offsets, indices, values, weight, bias, target, prefixes, shares, product=eager):
    """See ``cpu.py``; ``product`` computes the sparse products."""
    ends = torch.tensor(prefixes, device=values.device)
    levels = torch.searchsorted(ends, indices.long(), right=True)
    errors = torch.empty(len(prefixes), *target.shape, dtype=target.dtype, device=target.device)
    y = bias - target
    for p in range(len(prefixes)):
        y = y + product.decode(offsets, indices, torch.where(levels == p, values, 0), weight)
        errors[p] = y
    squared = errors.square().sum(-1)
    weighted = errors * torch.tensor(shares, dtype=target.dtype, device=target.device)[:, None, None]
    later = weighted.flip(0).cumsum(0).flip(0)  # what the features of a level are responsible for
    slopes = torch.zeros_like(values)
    for p in range(len(prefixes)):
        here = levels == p
        slopes = torch.where(here, product.sample(offsets, indices, weight, later[p]), slopes)
    return squared, later, slopes
