"""A record of an attention layer computes what the layer computes, whatever its family."""

from typing import Any

import pytest
import torch
from torch import nn

from saekit.hooks import capture
from saekit.layers import attention
from saekit.models import Model, load_model
from saekit.types import SaekitError

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**SMALL, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 40, "rope_theta": 1e4}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2, scaled by layer": ("GPT2LMHeadModel", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True}),
    "neox, part rotary": ("GPTNeoXForCausalLM", {**SMALL, "rotary_pct": 0.5}),
    "llama, grouped keys": ("LlamaForCausalLM", LLAMA),
    "llama, biases and scaled positions": ("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "rope_parameters": SCALED}),
    "qwen2, biases": ("Qwen2ForCausalLM", LLAMA),
    "qwen3, norms": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    "mistral, window": ("MistralForCausalLM", {**LLAMA, "sliding_window": 6}),
}  # fmt: skip


def model(name: str, options: dict[str, Any]) -> Model:
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    module = cls(cls.config_class(**options))
    with torch.no_grad():  # biases and norms start at 0 and 1, where they could not be told from none
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return load_model(module)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_record_is_the_layer(case: str) -> None:
    m = model(*FAMILIES[case])
    record = attention(m, "blocks.1.attn" if "gpt2" in case else m.site("blocks.1.hook_attn_out").path)
    tokens = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(7))
    path = m.site("blocks.1.hook_attn_out").path
    sites = {side: m.site(f"{path}:{side}") for side in ("in", "out")}
    found = capture(lambda: m(m.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))), sites)
    out = record(found["in"])
    assert (out - found["out"]).norm() < 1e-5 * found["out"].norm()
    patterns = record.patterns(found["in"])
    torch.testing.assert_close(patterns.sum(-1), torch.ones(patterns.shape[:-1]))
    assert patterns.triu(1).abs().max() == 0


def test_half_precision_is_the_layers_own_rounding() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        m = load_model(model("LlamaForCausalLM", LLAMA).module.to(dtype))
        assert attention(m, "model.layers.1.self_attn").W_V.dtype == torch.float32


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "softcap": ("Gemma2ForCausalLM", {**LLAMA, "head_dim": 16, "attn_logit_softcapping": 50.0, "sliding_window": 64}, "attn_logit_softcapping"),
    "norms that add 1": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 16, "sliding_window": 64}, "Gemma3Attention"),
    "positions of the length": ("Phi3ForCausalLM", {**LLAMA, "pad_token_id": 0, "rope_parameters": LONG}, "Phi3Attention"),
    "frequencies of the length": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": LONG}, "longrope, whose frequencies change"),
    "positions turned otherwise": ("CohereForCausalLM", LLAMA, "computes something else"),
    "not causal": ("BertModel", SMALL, "BertAttention"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_attention_is_refused(case: str) -> None:
    name, options, word = REFUSED[case]
    m = model(name, options)
    path = next(p for p, _ in m.module.named_modules() if p.endswith(("1.self_attn", "1.attention")))
    with pytest.raises(SaekitError, match=word):
        attention(m, path)
    with pytest.raises(SaekitError, match="is a Linear"):
        attention(m, next(p for p, s in m.module.named_modules() if isinstance(s, nn.Linear)))
