"""Encode and select in one operation: ``u = x W^T + b``, of which only the selected entries are ever kept.

Gradients flow through the selected entries only, so all of them are sparse. Selections follow the
fp32 dot products exactly, with exact ties to the lowest index. ``shortlist="bf16"`` makes the CPU's
matrix unit find the candidates, which changes the time and not the result; ``"auto"`` does so where
the CPU has one.

x may be [rows, blocks, d_in]: then the features are shared out evenly among the blocks, in order, and each
reads its own block's columns. Groups are shared out among the blocks too.
"""

import torch
from torch import Tensor

from saekit.kernels import checks
from saekit.kernels.backend import run
from saekit.kernels.encode import blocks
from saekit.kernels.factors import collector
from saekit.kernels.operators import operator
from saekit.kernels.product import _decode, feature_sums, weight_gradient

SHORTLISTS = ("auto", "fp32", "bf16")


@operator("topk_encode")
def _topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, group: int, absolute: bool,
    dead: Tensor | None, k_aux: int, shortlist: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = run("encode", "topk", x, x, weight, bias, k, group, absolute, dead, k_aux, shortlist)
    if dead is None:
        out = (*out, x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int32, device=x.device))
    return out


@operator("batchtopk_encode")
def _batchtopk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, shortlist: str
) -> tuple[Tensor, Tensor, Tensor]:
    offsets, indices, values = run("encode", "batchtopk", x, x, weight, bias, k, shortlist)
    return values, offsets, indices


@operator("threshold_encode")
def _threshold(
    x: Tensor, weight: Tensor, bias: Tensor, lower: Tensor, shortlist: str
) -> tuple[Tensor, Tensor, Tensor]:
    offsets, indices, values = run("encode", "threshold", x, x, weight, bias, lower, shortlist)
    return values, offsets, indices


@_topk.register_fake
def _(x, weight, bias, k, group, absolute, dead, k_aux, shortlist):
    rows, width = x.shape[0], k * (weight.shape[0] // group)
    aux = k_aux if dead is not None else 0
    int32 = torch.int32
    return (
        x.new_empty(rows, width), x.new_empty(rows, width, dtype=int32),
        x.new_empty(rows, aux), x.new_empty(rows, aux, dtype=int32),
    )  # fmt: skip


def _fake_csr(x, nnz):
    offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return x.new_empty(nnz), offsets, x.new_empty(nnz, dtype=torch.int32)


@_batchtopk.register_fake
def _(x, weight, bias, k, shortlist):
    return _fake_csr(x, k * x.shape[0])


@_threshold.register_fake
def _(x, weight, bias, lower, shortlist):
    return _fake_csr(x, torch.library.get_ctx().new_dynamic_size())


def gradients(ctx, x, weight, entries):
    """Gradients of x, weight and bias from entries ``(offsets, indices, gradients)`` of u."""
    grad_x = grad_weight = grad_bias = None
    n = weight.shape[0]
    for offsets, indices, grads in entries:
        if ctx.needs_input_grad[0]:
            part = _decode(offsets, indices, grads, weight)
            grad_x = part if grad_x is None else grad_x + part
        if ctx.needs_input_grad[1]:
            part = weight_gradient(ctx.into, offsets, indices, grads, x, n)
            grad_weight = part if grad_weight is None else grad_weight + part
        if ctx.needs_input_grad[2]:
            part = feature_sums(indices, grads, n)
            grad_bias = part if grad_bias is None else grad_bias + part
    return grad_x, grad_weight, grad_bias


def _setup_topk(ctx, inputs, output):
    x, weight = inputs[:2]
    _, indices, _, aux_indices = output
    ctx.save_for_backward(x, weight, indices, aux_indices)
    ctx.into = collector(weight)
    ctx.mark_non_differentiable(indices, aux_indices)
    ctx.set_materialize_grads(False)


def _backward_topk(ctx, grad, _, grad_aux, __):
    x, weight, indices, aux_indices = ctx.saved_tensors
    entries = [
        (torch.arange(x.shape[0] + 1, device=x.device) * i.shape[1], i.reshape(-1), g.reshape(-1))
        for i, g in ((indices, grad), (aux_indices, grad_aux))
        if g is not None and i.shape[1]
    ]
    return *gradients(ctx, x, weight, entries), None, None, None, None, None, None


def _setup_rows(ctx, inputs, output):
    x, weight = inputs[:2]
    _, offsets, indices = output
    ctx.save_for_backward(x, weight, offsets, indices)
    ctx.into = collector(weight)
    ctx.mark_non_differentiable(offsets, indices)
    ctx.set_materialize_grads(False)


def _backward_rows(ctx, grad, *_):
    x, weight, offsets, indices = ctx.saved_tensors
    entries = [] if grad is None else [(offsets, indices, grad.contiguous())]
    return *gradients(ctx, x, weight, entries), None, None


_topk.register_autograd(_backward_topk, setup_context=_setup_topk)
_batchtopk.register_autograd(_backward_rows, setup_context=_setup_rows)
_threshold.register_autograd(_backward_rows, setup_context=_setup_rows)


def _check(x, weight, bias, shortlist):
    checks.matrix("weight", weight)
    if x.ndim == 3:
        checks.matrix("x", x.flatten(1), x.shape[1] * weight.shape[1])
    else:
        checks.matrix("x", x, weight.shape[1])
    checks.vector("bias", bias, weight.shape[0])
    checks.alike(x=x, weight=weight, bias=bias)
    if shortlist not in SHORTLISTS:
        raise ValueError(f"shortlist = {shortlist!r} is not one of 'auto', 'fp32', 'bf16'")
    return x if x.ndim == 3 else x.contiguous(), weight.contiguous(), bias.contiguous()


def topk_encode(x, weight, bias, k, *, groups=1, absolute=False, shortlist="auto"):
    """``(values [rows, k], indices int32 [rows, k])`` of the k largest entries of each row of u.

    x [rows, d_in], weight [n_features, d_in], bias [n_features]. By falling value. ``absolute``
    ranks by |u| and returns u. With ``groups`` the features are cut into as many equal runs, k is
    taken from each, and the results stand side by side. Gao et al. 2024 (2406.04093), eq. 3.
    """
    values, indices, _, _ = _topk_call(x, weight, bias, k, groups, absolute, None, 0, shortlist)
    return values, indices


def topk_encode_aux(x, weight, bias, k, dead, k_aux, *, groups=1, absolute=False, shortlist="auto"):
    """As :func:`topk_encode`, and beside it the k_aux largest entries among the dead features of each row.

    dead bool [n_features]. Returns ``(values, indices, aux_values, aux_indices)``; where fewer than
    k_aux features are dead the rest is -inf at index 0, which a ReLU turns into nothing.
    """
    checks.vector("dead", dead, weight.shape[0])
    checks.beside("dead", dead, "weight", weight)
    if dead.dtype != torch.bool:
        raise ValueError(f"dead has dtype {dead.dtype}; expected torch.bool")
    checks.count("k_aux", k_aux, weight.shape[0], "n_features")
    return _topk_call(x, weight, bias, k, groups, absolute, dead, k_aux, shortlist)


def _topk_call(x, weight, bias, k, groups, absolute, dead, k_aux, shortlist):
    x, weight, bias = _check(x, weight, bias, shortlist)
    n = weight.shape[0]
    if groups < 1 or n % groups:
        raise ValueError(f"groups = {groups} doesn't divide n_features = {n}")
    checks.count("k", k, n // groups, "n_features" if groups == 1 else "n_features / groups")
    dead = None if dead is None else dead.contiguous()
    if x.ndim == 3:
        return _topk_blocks(x, weight, bias, k, groups, absolute, dead, k_aux, shortlist)
    return _topk(x, weight, bias, k, n // groups, absolute, dead, k_aux, shortlist)


def _topk_blocks(x, weight, bias, k, groups, absolute, dead, k_aux, shortlist):
    each, over = divmod(groups, x.shape[1])
    if groups > 1 and over:
        raise ValueError(f"groups = {groups} can't be shared out among {x.shape[1]} blocks of x")
    found, aux = [], []
    for first, own, w, b, d in blocks.parts(x, weight, bias, dead):
        n = len(w)
        values, indices, aux_values, aux_indices = _topk(
            own, w, b, min(k, n), n if groups == 1 else n // each, absolute, d, min(k_aux, n), shortlist
        )
        found.append((values, indices + first))
        aux.append((aux_values, aux_indices + first))
    out = []
    for parts, most in ((found, k * groups), (aux, k_aux)):
        # groups stand side by side in the order of the features; without them the blocks compete
        values, indices = (
            (torch.cat(side, 1) for side in zip(*parts, strict=True))
            if groups > 1 and parts is found
            else blocks.ranked(parts, most, absolute and parts is found)  # the dead are ranked by value
        )
        out += [blocks.attached(x, weight, bias, indices, values), indices]
    return tuple(out)


def batchtopk_encode(x, weight, bias, k, *, shortlist="auto"):
    """``(offsets, indices, values)`` of the k * rows largest entries of u in the whole batch.

    Compressed sparse rows, by rising index. Exact ties at the cut go to the first row, then to the
    lowest index. Bussmann et al. 2024 (2412.06410).
    """
    x, weight, bias = _check(x, weight, bias, shortlist)
    checks.count("k", k, weight.shape[0], "n_features")
    if x.ndim == 3:
        found = []
        for first, own, w, b in blocks.parts(x, weight, bias):
            values, offsets, indices = _batchtopk(own, w, b, min(k, len(w)), shortlist)
            found.append((offsets, indices + first, values))
        return _joined(x, weight, bias, found, k * len(x))
    values, offsets, indices = _batchtopk(x, weight, bias, k, shortlist)
    return offsets, indices, values


def threshold_encode(x, weight, bias, lower, *, shortlist="auto"):
    """``(offsets, indices, values)`` of the entries of u above their feature's ``lower`` [n_features].

    Compressed sparse rows, by rising index. For JumpReLU, lower is the threshold less half its
    bandwidth: what lies between is silent, and trains the threshold.
    """
    x, weight, bias = _check(x, weight, bias, shortlist)
    checks.vector("lower", lower, weight.shape[0])
    checks.alike(weight=weight, lower=lower)
    checks.finite(lower, lower=lower)
    if x.ndim == 3:
        found = []
        for first, own, w, b, low in blocks.parts(x, weight, bias, lower):
            values, offsets, indices = _threshold(own, w, b, low, shortlist)
            found.append((offsets, indices + first, values))
        return _joined(x, weight, bias, found)
    values, offsets, indices = _threshold(x, weight, bias, lower.detach().contiguous(), shortlist)
    return offsets, indices, values


def _joined(x, weight, bias, found, most=None):
    """``(offsets, indices, values)`` of the entries of all blocks, or of the ``most`` largest of them."""
    rows, indices, values = blocks.in_rows(found)
    if most is not None and most < len(values):
        kept = values.argsort(descending=True, stable=True)[:most].sort().values
        rows, indices, values = rows[kept], indices[kept], values[kept]
    values = blocks.Entries.apply(x, weight, bias, rows, indices, values)
    return blocks.offsets_of(rows, len(x)), indices, values
