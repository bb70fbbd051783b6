"""A transformer on one prompt, frozen so that it is linear: its gradients in closed form, without autograd.

Frozen are attention patterns, the sizes that norms divide by, and what neurons multiply their input by (the ReLU's
mask, the secant ``act(u) / u``, a gate's activation). Then every value is a sum over what writes to the residual
stream, and the gradient of a target, walked down once, gives each writer's share of it.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.circuits.queries import Queries
from saekit.circuits.weights import Block, Norm, Weights

Site = tuple[int, str]  # layer and name; the residual stream before a layer is that behind the one before
ORDER = ("resid_pre", "attn_in", "z", "attn_out", "attn_add", "resid_mid", "mlp_in", "mlp_out", "mlp_add", "resid_post")  # fmt: skip
Visit = Callable[[Site, "Tensor | None"], "Tensor | None"]
Bias = Callable[[int, str, Tensor], None]


def depth(site: Site) -> int:
    """Where a site stands in the order in which a forward pass comes by."""
    return site[0] * len(ORDER) + ORDER.index(site[1])


def canonical(site: Site) -> Site:
    """The one name of a place: the stream before a layer is that behind the layer before."""
    layer, name = site
    return (layer - 1, "resid_post") if name == "resid_pre" and layer else site


class Frozen:
    """``weights`` on ``tokens``: :attr:`seen` at every site of every layer, and :meth:`back`."""

    def __init__(self, weights: Weights, tokens: Int[Tensor, " seq"]):
        self.weights, self.tokens = weights, tokens
        self.seen, self.logits = weights.run(tokens)
        self.last = self.seen[-1]["resid_post"]

    def at(self, site: Site) -> Float[Tensor, "seq d"]:
        """What the model has at a site."""
        return self.seen[site[0]][site[1]]

    @cached_property
    def sizes(self) -> list[dict[str, Tensor]]:
        """What every norm of every layer divides by, at each position."""
        return [
            {
                name: norm.size(at[site])
                for name, site in self.normed(layer).items()
                if (norm := getattr(block, name)) is not None and site in at
            }
            for layer, (block, at) in enumerate(zip(self.weights.blocks, self.seen, strict=True))
        ]

    def normed(self, layer: int) -> dict[str, str]:
        """The site that each norm of a layer reads."""
        before_mlp = "resid_pre" if self.weights.blocks[layer].parallel else "resid_mid"
        return {
            "before_attention": "resid_pre", "after_attention": "attn_out",
            "before_mlp": before_mlp, "after_mlp": "mlp_out",
        }  # fmt: skip

    @cached_property
    def slopes(self) -> list[Tensor]:
        """What every neuron of every layer multiplies its input by, at each position."""
        return [
            torch.zeros(0) if block.mlp is None else block.mlp.slopes(at["mlp_in"])
            for block, at in zip(self.weights.blocks, self.seen, strict=True)
        ]

    @cached_property
    def queries(self) -> list[Queries]:
        """Queries and keys of every layer's heads."""
        return [
            Queries(block.attention.patterns, at["attn_in"])
            for block, at in zip(self.weights.blocks, self.seen, strict=True)
        ]

    @torch.no_grad()
    def back(self, start: Site, visit: Visit, bias: Bias, free: str | None = None) -> None:
        """Walk the gradients of a batch of targets down from a site; ``free``: through attention's scores as
        well, as a "whole", or by "slope" (:class:`~saekit.circuits.queries.Queries`), and then the norms' sizes too.

        ``visit(site, gradient)`` is called at every site on the way, with [seq, batch, d] or None where nothing has
        come by, and returns the gradient that goes on. ``bias(layer, half, share)`` gets what biases of a half of a
        block ("attn" or "mlp") add to the targets, [seq, batch].
        """
        begin, gradient = depth(start), None
        for layer in range(start[0], -1, -1):
            gradient = _Walk(self, layer, begin, visit, bias, free).block(gradient)
        visit((0, "resid_pre"), gradient)


class _Walk:
    """One block, from its output to its input."""

    def __init__(self, frozen: Frozen, layer: int, begin: int, visit: Visit, bias: Bias, free: str | None):
        self.frozen, self.layer, self.begin = frozen, layer, begin
        self.visit_site, self.bias, self.free = visit, bias, free
        self.part: Block = frozen.weights.blocks[layer]

    def visit(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The gradient that goes on from a site; above the start there is none."""
        if depth((self.layer, name)) > self.begin:
            return None
        return self.visit_site((self.layer, name), gradient)

    def block(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient at the block's input (which is visited by the layer before, or at the end)."""
        g = self.visit("resid_post", gradient)
        entry = None
        if self.part.mlp is not None:
            inside = self.mlp(g)
            if self.part.parallel:
                entry = inside
            else:
                g = add(g, inside)
        g = self.visit("resid_mid", g)
        return add(add(g, entry), self.attention(g))

    def mlp(self, g: Tensor | None) -> Tensor | None:
        """What comes down through the MLP."""
        mlp = self.part.mlp
        assert mlp is not None
        g = self.visit("mlp_add", g)
        g = self.visit("mlp_out", self.norm(g, "after_mlp", "mlp"))
        inside = None
        if g is not None:
            self.bias(self.layer, "mlp", g @ mlp.b_out)
            hidden = (g @ mlp.W_out) * self.frozen.slopes[self.layer][: len(g), None]
            self.bias(self.layer, "mlp", hidden @ mlp.b_in)
            inside = hidden @ mlp.W_in
        return self.norm(self.visit("mlp_in", inside), "before_mlp", "mlp")

    def attention(self, g: Tensor | None) -> Tensor | None:
        """What comes down through the attention layer."""
        a = self.part.attention
        g = self.visit("attn_add", g)
        g = self.visit("attn_out", self.norm(g, "after_attention", "attn"))
        if g is not None:
            self.bias(self.layer, "attn", g @ a.b_O)
            g = g @ a.W_O.transpose(0, 1).flatten(1)
        g = self.visit("z", g)
        if g is not None:
            values = values_back(g, self.frozen.seen[self.layer]["patterns"], len(a.W_V))
            self.bias(self.layer, "attn", values @ a.b_V.flatten())
            read = values @ a.W_V.flatten(0, 1)
            if self.free:
                read = read + self.through_scores(g, self.free)
            g = read
        return self.norm(self.visit("attn_in", g), "before_attention", "attn")

    def through_scores(self, g: Tensor, of: str) -> Tensor:
        """What comes down from what heads gather through where they look."""
        a, seq = self.part.attention, len(g)
        read = self.frozen.seen[self.layer]["attn_in"][:seq]
        values = torch.einsum("si,kvi->ksv", read, a.W_V) + a.b_V[:, None]
        values = values.repeat_interleave(len(a.W_O) // len(a.W_V), 0)
        looked = torch.einsum("qbhv,hkv->hqbk", g.unflatten(-1, (len(a.W_O), -1)), values)
        out, share = self.frozen.queries[self.layer].back(looked, of)
        self.bias(self.layer, "attn", share)
        return out

    def norm(self, g: Tensor | None, name: str, half: str) -> Tensor | None:
        """What comes down through a norm, if there is one."""
        norm: Norm | None = getattr(self.part, name)
        if norm is None or g is None:
            return g
        self.bias(self.layer, half, g @ norm.bias)
        x = self.frozen.seen[self.layer][self.frozen.normed(self.layer)[name]][: len(g), None]
        return norm.back(
            g, self.frozen.sizes[self.layer][name][: len(g), None], x if self.free == "slope" else None
        )


def values_back(
    g: Float[Tensor, "seq batch z"], patterns: Float[Tensor, "head all all"], n_kv: int
) -> Float[Tensor, "seq batch kv_d_v"]:
    """From what heads gather to their values: each query's gradient goes to where it looks."""
    seq, batch, _ = g.shape
    heads = len(patterns)
    by_head = g.view(seq, batch, heads, -1).permute(2, 0, 1, 3).reshape(heads, seq, -1)
    back = (patterns[:, :seq, :seq].transpose(1, 2) @ by_head).view(n_kv, heads // n_kv, seq, batch, -1)
    back = back.squeeze(1) if heads == n_kv else back.sum(1)
    return back.permute(1, 2, 0, 3).reshape(seq, batch, -1)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Two gradients, either of which may be none."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
