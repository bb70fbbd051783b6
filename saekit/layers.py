"""Layers of models taken apart into records of tensors: what a dictionary that stands in for one begins from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saekit.attention import Attention, PatternConfig, Patterns
from saekit.hooks import capture
from saekit.models import Model, load_model
from saekit.types import SaekitError

PROBE = 512  # positions of random tokens on which a record is compared with its layer, where the model takes so many
# of the output's norm; half precision is the layer's own rounding
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}
Linear = tuple[Tensor, Tensor | None]  # weight [out, in] and bias


def _record(
    qkv: Sequence[Linear], o: Linear, d_head: int, frequencies: Tensor | None = None, norms: Any = (), **options: Any,
) -> Attention:  # fmt: skip
    """A record of projections ``(weight [out, in], bias)``."""
    (w_q, w_k, w_v), d_in = (w.detach().unflatten(0, (-1, d_head)) for w, _ in qkv), qkv[0][0].shape[1]
    b_q, b_k, b_v = (
        w.new_zeros(len(w) // d_head, d_head) if b is None else b.detach().view(-1, d_head) for w, b in qkv
    )
    rotary = 0 if frequencies is None else 2 * len(frequencies)
    patterns = Patterns(
        PatternConfig(d_in, len(w_q), d_head, len(w_k), rotary=rotary, qk_norm=bool(norms), **options)
    )
    turns = torch.zeros(0) if frequencies is None else frequencies
    given = {"W_Q": w_q, "b_Q": b_q, "W_K": w_k, "b_K": b_k, "frequencies": turns}
    given |= dict(zip(("norm_q", "norm_k"), norms, strict=False))
    full = torch.float64 if o[0].dtype == torch.float64 else torch.float32
    patterns.to(o[0].device, full).load_state_dict({name: t.detach() for name, t in given.items()})
    w_o = o[0].detach().unflatten(1, (-1, d_head)).movedim(1, 0)
    b_o = torch.zeros_like(o[0][:, 0]) if o[1] is None else o[1].detach()
    return Attention(patterns.requires_grad_(False), *(t.to(full) for t in (w_v, b_v, w_o, b_o)))


def _pair(linear: Any) -> Linear:
    return linear.weight, linear.bias


def _gpt2(layer: Any, model: Model) -> Attention:
    d = layer.embed_dim
    w, b = layer.c_attn.weight.T, layer.c_attn.bias
    parts = [(w[i * d : (i + 1) * d], b[i * d : (i + 1) * d]) for i in range(3)]
    scale = layer.head_dim**-0.5 if layer.scale_attn_weights else 1.0
    if layer.scale_attn_by_inverse_layer_idx:
        scale /= layer.layer_idx + 1
    o = (layer.c_proj.weight.T, layer.c_proj.bias)
    return _record(parts, o, layer.head_dim, attn_scale=scale)


def _llama(layer: Any, model: Model) -> Attention:
    rotary = _rotary(model)
    if getattr(layer, "attn_logit_softcapping", None):
        raise AttributeError("attn_logit_softcapping")
    norms = [getattr(layer, name) for name in ("q_norm", "k_norm") if hasattr(layer, name)]
    eps = [getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)) for norm in norms]
    config = getattr(layer, "config", None)
    return _record(
        [_pair(getattr(layer, f"{name}_proj")) for name in "qkv"], _pair(layer.o_proj), layer.head_dim,
        None if rotary is None else rotary.inv_freq, [norm.weight for norm in norms],
        attn_scale=layer.scaling, rotary_scale=float(getattr(rotary, "attention_scaling", 1.0)),
        window=getattr(layer, "sliding_window", getattr(config, "sliding_window", None)),
        **({"eps": eps[0]} if eps else {}),
    )  # fmt: skip


def _neox(layer: Any, model: Model) -> Attention:
    rotary, d_head = _rotary(model), layer.head_size
    w = layer.query_key_value.weight.unflatten(0, (-1, 3, d_head))
    b = layer.query_key_value.bias
    b = None if b is None else b.unflatten(0, (-1, 3, d_head))
    parts = [(w[:, i].flatten(0, 1), None if b is None else b[:, i].flatten()) for i in range(3)]
    if rotary is None:
        raise AttributeError("rotary_emb")
    return _record(
        parts, _pair(layer.dense), d_head, rotary.inv_freq,
        attn_scale=layer.scaling, rotary_scale=float(rotary.attention_scaling),
    )  # fmt: skip


def _rotary(model: Model) -> Any:
    found = [m for name, m in model.module.named_modules() if name.split(".")[-1] == "rotary_emb"]
    if not found:
        return None
    if getattr(found[0], "rope_type", "default") == "longrope":
        raise AttributeError("longrope, whose frequencies change with the length of the text")
    return found[0]


FAMILIES: dict[str, Callable[[Any, Model], Attention]] = {  # by an attribute that only their layers have
    "c_attn": _gpt2,
    "query_key_value": _neox,
    "q_proj": _llama,
}


def attention(model: "Model | str | nn.Module", hook_point: str) -> Attention:
    """The attention layer of a model at a hook point (``blocks.1.attn``), as a record of its tensors.

    Known are the layers of GPT-2, GPT-NeoX and Llama and what is built like them (biases, grouped keys,
    rotary positions of any frequencies, norms of queries and keys, windows). The record is run on random tokens
    beside the layer itself; an attention that computes anything else is refused.
    """
    model = load_model(model)
    record = attention_of(model, hook_point)
    off = _difference(model, hook_point, record)
    layer = model.site(hook_point).module
    dtype = next(layer.parameters()).dtype
    if not off < TOLERANCES.get(dtype, 1e-3):
        raise SaekitError(
            f"{hook_point!r} of model {model.name!r} ({type(layer).__name__}) differs by {off:.2g} of its norm from softmax attention with its weights in fp32 ({TOLERANCES.get(dtype, 1e-3):g} is allowed in {str(dtype).removeprefix('torch.')}): it computes something else (softcaps, ALiBi, sinks?); choose another layer"
        )
    return record


def attention_of(model: Model, hook_point: str) -> Attention:
    """The record of a layer, on its device, without the comparison; raises where it is not built as known ones."""
    layer = model.site(hook_point).module
    family = next((f for attribute, f in FAMILIES.items() if hasattr(layer, attribute)), None)
    if family is None:
        raise SaekitError(
            f"{hook_point!r} of model {model.name!r} is a {type(layer).__name__}, and an attention layer is taken apart where it has {', '.join(FAMILIES)}; name the module itself, as in blocks.1.attn"
        )
    try:
        return family(layer, model)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise SaekitError(
            f"{hook_point!r} of model {model.name!r} is a {type(layer).__name__}, which is not built as those of GPT-2, GPT-NeoX or Llama ({error}); choose another layer"
        ) from error


def _difference(model: Model, hook_point: str, record: Attention) -> float:
    """Relative error of the record on random tokens."""
    vocabulary = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    length = min(PROBE, model.context or PROBE)
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    base = hook_point.partition(":")[0]
    sites = {side: model.site(f"{base}:{side}") for side in ("in", "out")}
    given = model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))
    found = capture(lambda: model(given), sites)
    x, y = (found[side].to(record.W_V.dtype) for side in ("in", "out"))
    return ((record(x) - y).norm() / y.norm()).item()
