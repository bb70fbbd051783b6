"""The definitions of the encodings: dense, slow, obviously right, differentiable by plain autograd."""

import torch


def topk(x, weight, bias, k, group, absolute, dead=None, k_aux=0):
    """Values and indices of the k largest pre-activations of each row and group of features.

    A stable descending sort keeps the lower index first among equal keys. With ``dead`` [n] also
    those of the k_aux largest dead features of each row, -inf at index 0 where there are fewer.
    """
    pre = x @ weight.T + bias
    keys = (pre.abs() if absolute else pre).detach().unflatten(-1, (-1, group))
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :k]
    first = torch.arange(0, len(weight), group, device=x.device)
    indices = (order + first[:, None]).flatten(1)
    out = pre.gather(-1, indices), indices.int()
    if dead is None:
        return out
    masked = pre.masked_fill(~dead, -torch.inf)
    order = torch.sort(masked.detach(), dim=-1, descending=True, stable=True).indices[:, :k_aux]
    values = masked.gather(-1, order)
    return *out, values, order.masked_fill(values == -torch.inf, 0).int()


def batchtopk(x, weight, bias, k):
    """CSR of the k * rows largest pre-activations of the batch, ties to the first row, then feature."""
    pre = x @ weight.T + bias
    keys = pre.detach().flatten()
    chosen = torch.sort(keys, descending=True, stable=True).indices[: k * len(x)]
    mask = torch.zeros(pre.numel(), dtype=torch.bool, device=x.device).index_fill_(0, chosen, True)
    return _csr(pre, mask.view_as(pre))


def threshold(x, weight, bias, lower):
    """CSR of the pre-activations above their feature's ``lower``."""
    pre = x @ weight.T + bias
    return _csr(pre, pre.detach() > lower)


def _csr(pre, mask):
    rows, indices = mask.nonzero(as_tuple=True)
    offsets = torch.zeros(len(pre) + 1, dtype=torch.int64, device=pre.device)
    offsets[1:] = mask.sum(-1).cumsum(0)
    return offsets, indices.int(), pre[rows, indices]
