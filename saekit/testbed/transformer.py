"""A small transformer of any make: norms, positions, activations and heads to choose; its names are Llama's."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.registry import nearest
from saekit.types import SaekitError

CHOICES = {
    "norm": ("none", "layer", "rms"),
    "positions": ("none", "learned", "rotary"),
    "activation": ("relu", "gelu", "silu", "swiglu"),
}


@dataclass(frozen=True)
class TransformerConfig:
    """``n_kv`` sets of keys and values (None: one for each head); ``d_mlp`` 0 leaves the MLPs out.

    ``post_norms``: what a half adds is normalised first (Gemma 2). ``parallel``: both halves read the block's
    input (NeoX). ``bias``: biases everywhere.
    """

    vocabulary: int = 64
    context: int = 32
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    d_head: int = 8
    n_kv: int | None = None
    d_mlp: int = 64
    norm: str = "layer"
    positions: str = "learned"
    activation: str = "relu"
    bias: bool = True
    post_norms: bool = False
    parallel: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise SaekitError(f"{name} = {value!r} is unknown{nearest(value, list(choices))}")
        if self.n_heads % (self.n_kv or self.n_heads):
            raise SaekitError(f"n_kv = {self.n_kv} does not divide n_heads = {self.n_heads}")


def _norm(config: TransformerConfig, width: int | None = None) -> nn.Module:
    width = width or config.d_model
    if config.norm == "none":
        return nn.Identity()
    return nn.LayerNorm(width, bias=config.bias) if config.norm == "layer" else nn.RMSNorm(width, eps=1e-6)


class _Rotary(nn.Module):
    inv_freq: Tensor
    attention_scaling = 1.0

    def __init__(self, d_head: int):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, d_head, 2) / d_head))

    def forward(self, q: Tensor) -> Tensor:
        angles = torch.arange(q.shape[-2], device=q.device)[:, None] * self.inv_freq
        cos, sin = angles.cos().to(q), angles.sin().to(q)
        a, b = q.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Attention(nn.Module):
    def __init__(self, c: TransformerConfig, rotary: "_Rotary | None"):
        super().__init__()
        self.head_dim, self.scaling = c.d_head, c.d_head**-0.5
        heads, kv = c.n_heads * c.d_head, (c.n_kv or c.n_heads) * c.d_head
        self.q_proj = nn.Linear(c.d_model, heads, bias=c.bias)
        self.k_proj, self.v_proj = (nn.Linear(c.d_model, kv, bias=c.bias) for _ in range(2))
        self.o_proj = nn.Linear(heads, c.d_model, bias=c.bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(c.d_head, eps=1e-6) for _ in range(2))
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        z = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.o_proj(z.transpose(1, 2).flatten(-2))


class _Mlp(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        gated = c.activation == "swiglu"
        self.up_proj = nn.Linear(c.d_model, c.d_mlp, bias=c.bias)
        self.gate_proj = nn.Linear(c.d_model, c.d_mlp, bias=c.bias) if gated else None
        self.down_proj = nn.Linear(c.d_mlp, c.d_model, bias=c.bias)
        self.act_fn = {"relu": nn.ReLU, "gelu": nn.GELU}.get(c.activation, nn.SiLU)()

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class _Block(nn.Module):
    def __init__(self, c: TransformerConfig, rotary: "_Rotary | None"):
        super().__init__()
        self.use_parallel_residual = c.parallel
        self.input_layernorm, self.self_attn = _norm(c), _Attention(c, rotary)
        if c.post_norms:
            self.post_attention_layernorm, self.pre_feedforward_layernorm = _norm(c), _norm(c)
            self.post_feedforward_layernorm = _norm(c)
        elif c.d_mlp:
            self.post_attention_layernorm = _norm(c)
        self.mlp = _Mlp(c) if c.d_mlp else None
        self.post_norms = c.post_norms

    def forward(self, x: Tensor) -> Tensor:
        made: Any = self.self_attn(self.input_layernorm(x))
        made = self.post_attention_layernorm(made) if self.post_norms else made
        middle = x + made
        if self.mlp is None:
            return middle
        before = self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm
        made = self.mlp(before(x if self.use_parallel_residual else middle))
        return middle + (self.post_feedforward_layernorm(made) if self.post_norms else made)


class Transformer(nn.Module):
    """Tokens [batch, seq] to next-token logits; weights are random, by ``seed``."""

    def __init__(self, config: TransformerConfig, seed: int = 0):
        super().__init__()
        self.shape = config
        self.config = SimpleNamespace(n_ctx=config.context)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(config.vocabulary, config.d_model)
            learned = config.positions == "learned"
            self.embed_positions = nn.Embedding(config.context, config.d_model) if learned else None
            rotary = _Rotary(config.d_head) if config.positions == "rotary" else None
            self.rotary_emb = rotary
            self.layers = nn.ModuleList(_Block(config, rotary) for _ in range(config.n_layers))
            self.norm = _norm(config)
            self.lm_head = nn.Linear(config.d_model, config.vocabulary, bias=config.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        """The tokens' vectors."""
        return self.embed_tokens

    def forward(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocabulary"]:
        """Logits behind each token."""
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
