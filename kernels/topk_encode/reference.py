"""The definition of topk_encode: dense, slow, obviously right."""

import torch


def topk_encode(x, weight, bias, k):
    """``(values [rows, k], indices int64 [rows, k])`` of the k largest entries of ``x W^T + b``.

    x [rows, d_in], weight [n_features, d_in], bias [n_features]. A stable descending sort keeps the
    lower index first among equal values. Differentiable by plain autograd.
    """
    pre = x @ weight.T + bias
    indices = torch.sort(pre.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    return pre.gather(-1, indices), indices
