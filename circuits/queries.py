"""Queries and keys of one sequence as linear maps of what they read, and what attention scores pass back to it."""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.attention import Patterns

POINTS = 16  # at which the softmax's Jacobian is averaged


class Queries:
    """Of patterns on ``x``: ``q = scale * turn * (size * (W_Q x + b_Q))`` and k alike, with the sizes of QK norms frozen."""

    def __init__(self, patterns: Patterns, x: Float[Tensor, "seq d_in"]):
        self.patterns, self.seq = patterns, len(x)
        self.heads, self.kv = len(patterns.W_Q), len(patterns.W_K)
        self.turns = patterns.turns(self.seq)
        self.q_size, self.k_size = (self._size(x, s) for s in ("Q", "K"))
        self.q = self._made(x, "Q") * patterns.scale
        self.k = self._made(x, "K")

    def _raw(self, x: Tensor, side: str) -> Tensor:
        w, b = getattr(self.patterns, f"W_{side}"), getattr(self.patterns, f"b_{side}")
        return torch.einsum("si,hdi->hsd", x, w) + b[:, None]

    def _size(self, x: Tensor, side: str) -> Tensor:
        """What each dimension is multiplied by before it turns, [head, seq, d_qk] or [1, 1, d_qk]."""
        weight = getattr(self.patterns, f"norm_{side.lower()}")
        if weight is None:
            return x.new_ones(1, 1, self.turns.shape[-1])
        raw = self._raw(x, side)
        return torch.rsqrt(raw.square().mean(-1, keepdim=True) + self.patterns.config.eps) * weight

    def _made(self, x: Tensor, side: str) -> Tensor:
        size = self.q_size if side == "Q" else self.k_size
        return torch.einsum("sde,hse->hsd", self.turns, size * self._raw(x, side))

    def of_head(self, head: int) -> int:
        """The set of keys of a head."""
        return head * self.kv // self.heads

    @cached_property
    def scores(self) -> Float[Tensor, "head query source"]:
        """The scores, without those that are not seen (-inf)."""
        k = self.k.repeat_interleave(self.heads // self.kv, 0)
        return (self.q @ k.transpose(1, 2)).masked_fill(~self.patterns.seen(self.seq), float("-inf"))

    def vectors(
        self, side: str, head: int
    ) -> tuple[Float[Tensor, "seq d_qk d_in"], Float[Tensor, "seq d_qk"]]:
        """What each dimension of a head's query ("Q") or key ("K") at each position reads, and its bias."""
        p = self.patterns
        if side == "K":
            head = self.of_head(head)
        w, b = getattr(p, f"W_{side}")[head], getattr(p, f"b_{side}")[head]
        size = self.q_size if side == "Q" else self.k_size
        size = size.expand(self.heads if side == "Q" else self.kv, self.seq, -1)[head]
        maps = self.turns * size[:, None, :] * (p.scale if side == "Q" else 1.0)
        return maps @ w, maps @ b

    def back(
        self, looked: Float[Tensor, "head query batch source"], of: str
    ) -> tuple[Float[Tensor, "seq batch d_in"], Float[Tensor, "seq batch"]]:
        """From what targets gain per unit of each pattern, what they gain per unit of the input, through the scores,
        and what biases of queries and keys add.

        A pattern changes by the softmax's Jacobian: as it is (``of`` = "slope"), which is what a small part of the scores
        does, or averaged on the way from even attention to the pattern ("whole": integrated gradients over the
        scores), so that saturated attention, which no small part changes, is not taken for free.
        """
        seq = looked.shape[1]
        scores = self.scores[:, :seq, :seq]
        seen = torch.isfinite(scores)
        gain = torch.zeros_like(looked)
        points = [1.0] if of == "slope" else [(i + 0.5) / POINTS for i in range(POINTS)]
        for point in points:
            a = (scores.masked_fill(~seen, 0) * point).masked_fill(~seen, float("-inf")).softmax(-1)
            mean = torch.einsum("hqbk,hqk->hqb", looked, a)
            gain += a[:, :, None] * (looked - mean[..., None])
        gain /= len(points)
        k = self.k[:, :seq].repeat_interleave(self.heads // self.kv, 0)
        to_q = torch.einsum("hqbk,hkd->hqbd", gain, k)
        to_k = torch.einsum("hqbk,hqd->hkbd", gain, self.q[:, :seq])
        to_k = to_k.unflatten(0, (self.kv, -1)).sum(1)
        p = self.patterns
        out, bias = to_q.new_zeros(()), to_q.new_zeros(())
        for to, size, w, b in (
            (to_q * p.scale, self.q_size, p.W_Q, p.b_Q),
            (to_k, self.k_size, p.W_K, p.b_K),
        ):
            raw = torch.einsum("hsbd,sde->hsbe", to, self.turns[:seq]) * size[:, :seq, None]
            out = out + torch.einsum("hsbe,hei->sbi", raw, w)
            bias = bias + torch.einsum("hsbe,he->sb", raw, b)
        return out, bias
