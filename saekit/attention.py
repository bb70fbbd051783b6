"""Attention layers as plain tensors: where each head looks, and what it moves."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saekit.registry import nearest
from saekit.types import SaekitError

PAIRS = ("halves", "neighbours")


@dataclass(frozen=True)
class PatternConfig:
    """Causal attention patterns of ``n_qk`` heads of ``d_qk`` dimensions, from inputs of width ``d_in``.

    ``n_kv`` sets of keys, each for ``n_qk / n_kv`` heads in order (None: one for each head). ``attn_scale``
    multiplies the scores (None: ``1 / sqrt(d_qk)``). The first ``rotary`` dimensions turn with the position,
    dimension i with ``i + rotary / 2`` ("halves", as Llama and NeoX) or with its neighbour ("neighbours", as
    GPT-J); ``rotary_scale`` multiplies both. Learned positions need nothing: they are in the input.
    ``qk_norm``: queries and keys are divided by their root mean square first, as Qwen 3's. ``window``: how many
    positions a query sees, its own included (None: all before it).
    """

    d_in: int
    n_qk: int
    d_qk: int
    n_kv: int | None = None
    attn_scale: float | None = None
    rotary: int = 0
    rotary_base: float = 10000.0
    rotary_pairs: str = "halves"
    rotary_scale: float = 1.0
    qk_norm: bool = False
    eps: float = 1e-6
    window: int | None = None

    def __post_init__(self):
        for name in ("d_in", "n_qk", "d_qk", "n_kv", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaekitError(f"{name} = {value} must be at least 1")
        if not self.rotary_base > 0:
            raise SaekitError(f"rotary_base = {self.rotary_base} must be above 0")
        if self.n_kv is not None and self.n_qk % self.n_kv:
            raise SaekitError(f"n_kv = {self.n_kv} does not divide n_qk = {self.n_qk}")
        if self.rotary % 2 or not 0 <= self.rotary <= self.d_qk:
            raise SaekitError(
                f"rotary = {self.rotary} must be an even number of the d_qk = {self.d_qk} dimensions, or 0"
            )
        if self.rotary_pairs not in PAIRS:
            raise SaekitError(
                f"rotary_pairs {self.rotary_pairs!r} is unknown{nearest(self.rotary_pairs, list(PAIRS))}"
            )


class Patterns(nn.Module):
    """Where each head looks: ``softmax(q k^T)`` over the positions up to each query's own.

    ``W_Q`` [n_qk, d_qk, d_in] with ``b_Q``, ``W_K`` [n_kv, d_qk, d_in] with ``b_K``; ``frequencies`` [rotary / 2]
    in radians per position.
    """

    frequencies: Tensor

    def __init__(self, config: PatternConfig):
        super().__init__()
        self.config, c = config, config
        generator = torch.Generator().manual_seed(c.n_qk * 1009 + c.d_qk)

        def matrices(n: int) -> nn.Parameter:
            bound = math.sqrt(6 / (c.d_in + c.d_qk))  # Glorot & Bengio 2010
            return nn.Parameter((torch.rand(n, c.d_qk, c.d_in, generator=generator) * 2 - 1) * bound)

        self.W_Q, self.W_K = matrices(c.n_qk), matrices(c.n_kv or c.n_qk)
        self.b_Q = nn.Parameter(torch.zeros(c.n_qk, c.d_qk))
        self.b_K = nn.Parameter(torch.zeros(c.n_kv or c.n_qk, c.d_qk))
        at = torch.arange(0, c.rotary, 2) / max(c.rotary, 1)
        self.register_buffer("frequencies", c.rotary_base**-at)
        self.norm_q, self.norm_k = (nn.Parameter(torch.ones(c.d_qk)) if c.qk_norm else None for _ in range(2))

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch head query source"]:
        """The share of its attention that each query gives to each source; rows sum to 1."""
        c = self.config
        q, k = (
            torch.einsum("bsi,hdi->bhsd", x, w) + b[:, None]
            for w, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K))
        )
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self._norm(q, self.norm_q), self._norm(k, self.norm_k)
        if c.rotary:
            q, k = self._turn(q), self._turn(k)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q * self.scale) @ k.transpose(-1, -2)
        return scores.masked_fill(~self.seen(x.shape[1]), float("-inf")).softmax(-1)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        given = self.config.attn_scale
        return self.config.d_qk**-0.5 if given is None else given

    def seen(self, seq: int) -> Bool[Tensor, "query source"]:
        """Which sources each query sees."""
        at = torch.arange(seq, device=self.b_Q.device)
        back = at[:, None] - at
        return back >= 0 if self.config.window is None else (back >= 0) & (back < self.config.window)

    def turns(self, seq: int) -> Float[Tensor, "position d_qk d_qk"]:
        """The matrices by which queries and keys turn with their position."""
        eye = torch.eye(self.config.d_qk).to(self.b_Q)[:, None].expand(-1, seq, -1)
        return (self._turn(eye) if self.config.rotary else eye).permute(1, 2, 0)

    def _norm(self, q: Tensor, weight: Tensor) -> Tensor:
        return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + self.config.eps) * weight

    def _turn(self, q: Tensor) -> Tensor:
        c = self.config
        angles = torch.arange(q.shape[-2], device=q.device)[:, None] * self.frequencies
        cos, sin = (f(angles.float()).to(q.dtype) * c.rotary_scale for f in (torch.cos, torch.sin))
        turned, rest = q[..., : c.rotary], q[..., c.rotary :]
        halves = c.rotary_pairs == "halves"
        a, b = turned.chunk(2, -1) if halves else (turned[..., ::2], turned[..., 1::2])
        both = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.cat(both, -1) if halves else torch.stack(both, -1).flatten(-2)
        return torch.cat([turned, rest], -1)


@dataclass(frozen=True)
class Attention:
    """A causal attention layer: ``sum_h A^h (x W_V^hT + b_V) W_O^hT + b_O``, with the patterns A.

    ``W_V`` [n_kv, d_v, d_in] and ``b_V`` belong to the sets of keys, ``W_O`` [n_heads, d_out, d_v] to the heads.
    """

    patterns: Patterns
    W_V: Float[Tensor, "kv d_v d_in"]
    b_V: Float[Tensor, "kv d_v"]
    W_O: Float[Tensor, "head d_out d_v"]
    b_O: Float[Tensor, " d_out"]

    def gather(
        self, x: Float[Tensor, "batch seq d_in"]
    ) -> "tuple[Float[Tensor, 'batch head query source'], Float[Tensor, 'batch seq z']]":
        """Patterns, and what the heads gather by them, side by side (heads * d_v columns)."""
        values = torch.einsum("bsi,hvi->bhsv", x, self.W_V) + self.b_V[:, None]
        patterns = self.patterns(x)
        z = patterns @ values.repeat_interleave(len(self.W_O) // len(self.W_V), 1)
        return patterns, z.transpose(1, 2).flatten(2)

    def write(self, z: Float[Tensor, "batch seq z"]) -> Float[Tensor, "batch seq d_out"]:
        """What the layer makes of what its heads gather."""
        return z @ self.W_O.transpose(1, 2).flatten(0, 1) + self.b_O

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        """What the layer makes of its input."""
        return self.write(self.gather(x)[1])
