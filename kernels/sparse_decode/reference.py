"""The definition of sparse_decode: scatter to a dense matrix, multiply."""

import torch


def sparse_decode(offsets, indices, values, weight):
    """``[rows, d_out]``: codes in compressed sparse rows times weight [n_features, d_out]."""
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    dense = values.new_zeros(len(offsets) - 1, weight.shape[0])
    dense = dense.index_put((rows, indices.long()), values, accumulate=True)
    return dense @ weight
