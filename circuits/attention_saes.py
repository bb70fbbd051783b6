"""Dictionaries of what heads gather: which head and which token a feature is made of (Kissane et al. 2024, 2406.17759).

They read and write the heads' outputs side by side, before the output projection (``blocks.1.attn.c_proj:in``). With
patterns as they are a feature is a sum over heads and source positions (direct feature attribution, DFA), and what
each source adds is in turn a sum over all that was written there (recursive DFA).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.circuits.frozen import Frozen, Site
from saekit.circuits.rows import Own, Trace
from saekit.dictionaries import Dictionary
from saekit.dictionaries.parts import Part
from saekit.types import SaekitError


def head_shares(d: Dictionary, n_heads: int) -> Float[Tensor, "feature head"]:
    """By weights alone: the norm of what a feature writes to each head's dimensions, over their sum."""
    if d.d_out % n_heads:
        raise SaekitError(f"n_heads = {n_heads} does not divide the dictionary's width {d.d_out}")
    norms = d.norm_out.directions(d.W_dec.detach()).unflatten(-1, (n_heads, -1)).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def by_source(frozen: Frozen, part: Part, read: Site) -> Float[Tensor, "entry head source"]:
    """DFA: what every head adds to each of a part's features from each source; with ``part.b`` their values.

    Shares may be negative, and sources are seen by the patterns as they are; ``read`` is the site, ``(layer, "z")``.
    """
    layer = _layer(read)
    attention, seen = frozen.weights.blocks[layer].attention, frozen.seen[layer]
    heads = len(attention.W_O)
    values = torch.einsum("si,kvi->ksv", seen["attn_in"], attention.W_V) + attention.b_V[:, None]
    values = values.repeat_interleave(heads // len(values), 0)
    w = part.w.to(values).unflatten(-1, (heads, -1))
    return torch.einsum("ehv,hsv->ehs", w, values) * seen["patterns"][:, part.positions].transpose(0, 1)


def recursive(
    run: Trace, own: Own, entry: int, pairs: Int[Tensor, "pair 2"], through: bool = False
) -> tuple[Float[Tensor, "pair node"], Float[Tensor, " pair"]]:
    """RDFA: what all nodes of a trace add to a feature's DFA by ``pairs`` of head and source, and what b_V adds.

    The two add up to the DFA, with ``through`` those of nodes that are no features: shares are then followed through
    dictionaries, neurons and heads that stand in the layers below, down to tokens, positions, errors and biases.
    """
    layer = _layer(own.read)
    attention = run.frozen.weights.blocks[layer].attention
    head, source = pairs.T
    kv = head * len(attention.W_V) // len(attention.W_O)
    looks = run.frozen.seen[layer]["patterns"][head, own.part.positions[entry], source]
    w = own.part.w[entry].to(looks).unflatten(-1, (len(attention.W_O), -1))[head] * looks[:, None]
    covectors = w.new_zeros(int(source.max()) + 1, len(pairs), attention.W_V.shape[-1])
    covectors[source, torch.arange(len(pairs))] = torch.einsum("pv,pvi->pi", w, attention.W_V[kv])
    return run.rows((layer, "attn_in"), covectors, through=through), (w * attention.b_V[kv]).sum(-1)


def _layer(read: Site) -> int:
    if read[1] != "z":
        raise SaekitError(
            f"a dictionary reads {read[1]!r} of layer {read[0]}, and attribution to sources takes one that reads what heads gather; give one of the input of the layer's output projection, as in blocks.1.attn.c_proj:in"
        )
    return read[0]
