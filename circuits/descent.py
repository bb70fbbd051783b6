"""From an MLP's input down through the attention layer before it, for targets that read one position only.

Such a gradient is a single row until attention spreads it, so it is multiplied by the layer's matrices once for each
target; :meth:`saekit.circuits.frozen.Frozen.back` would do so for each target and position.
"""

from collections.abc import Container
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.circuits.frozen import Frozen, Site

BETWEEN = ("resid_mid", "attn_add", "attn_out", "z")  # what the gradient comes by


class Descent(NamedTuple):
    """``read`` is the gradient at the attention layer's input, ``passed`` that of the stream beside the layer; what
    biases of the layer's half and of the norm before the MLP add to the targets."""

    read: Float[Tensor, "seq batch d"]
    passed: Float[Tensor, "seq batch d"]
    attn: Float[Tensor, "seq batch"]
    mlp: Float[Tensor, "seq batch"]


def descends(frozen: Frozen, read: Site, before: bool, taken: Container[Site]) -> bool:
    """Whether targets that read a site may be brought down at once; ``taken`` are sites where dictionaries write.

    ``before``: they read their site as it was before a dictionary wrote there.
    """
    layer, name = read
    if (
        name not in ("mlp_in", "resid_mid")
        or frozen.weights.blocks[layer].parallel
        or (read in taken and not before)
    ):
        return False
    return not any((layer, between) in taken for between in BETWEEN if between != name)


def descend(
    frozen: Frozen, read: Site, vectors: Float[Tensor, "batch d"], at: Int[Tensor, " batch"]
) -> Descent:
    """Targets that gain ``vectors`` from a site at one position each; positions must not fall."""
    layer, name = read
    block, seen, sizes = frozen.weights.blocks[layer], frozen.seen[layer], frozen.sizes[layer]
    a, seq, each = block.attention, int(at[-1]) + 1, torch.arange(len(at), device=at.device)
    g, mlp, attn = vectors, vectors.new_zeros(seq, len(at)), vectors.new_zeros(seq, len(at))
    if name == "mlp_in" and block.before_mlp is not None:
        mlp[at, each] = g @ block.before_mlp.bias
        g = block.before_mlp.back(g, sizes["before_mlp"][at])
    passed = vectors.new_zeros(seq, *vectors.shape)
    passed[at, each] = g
    own = g.new_zeros(len(at))
    if block.after_attention is not None:
        own += g @ block.after_attention.bias
        g = block.after_attention.back(g, sizes["after_attention"][at])
    own += g @ a.b_O
    by_head = torch.einsum("bd,hdv->hbv", g, a.W_O)
    groups = len(a.W_O) // len(a.W_V)
    w_v, b_v = a.W_V.repeat_interleave(groups, 0), a.b_V.repeat_interleave(groups, 0)
    vectors_in = by_head @ w_v
    biases = torch.einsum("hbv,hv->hb", by_head, b_v)
    out = vectors.new_zeros(seq, len(at), vectors_in.shape[2])
    ends = torch.searchsorted(at, torch.arange(seq, device=at.device), right=True).tolist()
    for p, (first, stop) in enumerate(zip((0, *ends), ends, strict=False)):
        if stop > first:
            looks = seen["patterns"][:, p, : p + 1].T
            spread = looks @ vectors_in[:, first:stop].flatten(1)
            out[: p + 1, first:stop] = spread.view(p + 1, stop - first, -1)
            attn[: p + 1, first:stop] = looks @ biases[:, first:stop]
    attn[at, each] += own
    return Descent(out, passed, attn, mlp)
