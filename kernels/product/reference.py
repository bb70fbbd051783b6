"""The definition of the sparse products: scatter to a dense matrix, multiply."""

import torch


def dense(offsets, indices, values, n_features):
    """Codes in compressed sparse rows as a dense [rows, n_features]; entries of a feature add up."""
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    out = values.new_zeros(len(offsets) - 1, n_features)
    return out.index_put((rows, indices.long()), values, accumulate=True)


def decode(offsets, indices, values, weight):
    """``codes @ weight``, weight [n_features, d]."""
    return dense(offsets, indices, values, len(weight)) @ weight
