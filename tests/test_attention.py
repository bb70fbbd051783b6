"""A record of an attention layer computes what the layer computes, whatever its family."""

from typing import Any

import pytest
import torch
from families import FAMILIES, LLAMA, LONG, SMALL, model
from torch import nn

from saekit.hooks import capture
from saekit.layers import attention
from saekit.models import load_model
from saekit.types import SaekitError


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
