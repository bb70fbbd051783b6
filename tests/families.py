"""Small models with random weights, of each family whose attention is known, for several test files."""

from typing import Any

import torch

from saekit.models import Model, load_model

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
    "gemma, norms that add 1": ("GemmaForCausalLM", {**LLAMA, "head_dim": 16}),
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
