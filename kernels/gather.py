"""The two primitives of sparse gradients: sort entries by feature, and sum scaled rows by segment."""

import torch
import torch.nn.functional as F


def csc(indices, n_features):
    """``(order, starts)``: a stable order of the entries by feature, and each feature's first entry.

    indices int [nnz]; order int64 [nnz]; starts int64 [n_features].
    """
    order = torch.argsort(indices, stable=True)
    counts = torch.bincount(indices, minlength=n_features)
    return order, counts.cumsum(0) - counts


def segment_sum(table, rows, starts, weights):
    """``out[s] = sum over entries e of segment s of weights[e] * table[rows[e]]``.

    table [n, d]; rows int [nnz]; starts int64 [segments], rising; weights [nnz] -> [segments, d].
    Each segment is summed in entry order by one thread, so the result is deterministic.
    """
    if rows.numel() == 0:
        return table.new_zeros(starts.numel(), table.shape[1])
    return F.embedding_bag(
        rows.long(), table, starts.long(), mode="sum", per_sample_weights=weights.to(table.dtype)
    )
