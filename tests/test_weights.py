"""A record of a whole model computes what the model computes, whatever its make."""

from typing import Any

import pytest
import torch
from families import FAMILIES, LLAMA, model

from saekit.circuits.weights import weights
from saekit.models import Model, load_model
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import SaekitError

TOYS: dict[str, dict[str, Any]] = {
    "layer norms, learned": {},
    "root mean squares, rotary, gated, grouped": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "n_kv": 2, "bias": False},
    "no norms, gelu": {"norm": "none", "activation": "gelu"},
    "post norms, silu": {"post_norms": True, "activation": "silu", "norm": "rms"},
    "parallel, norms of queries": {"parallel": True, "qk_norm": True, "positions": "rotary"},
    "attention alone": {"d_mlp": 0, "positions": "none"},
}  # fmt: skip


def toy(name: str, **options: Any) -> Model:
    """A toy whose biases and norms are not those that it was born with."""
    module = Transformer(TransformerConfig(**TOYS[name], **options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return load_model(module, name="toy")


@pytest.mark.parametrize("case", ["code-lm", *TOYS, *FAMILIES])
def test_the_record_is_the_model(case: str) -> None:
    m = load_model("code-lm") if case == "code-lm" else toy(case) if case in TOYS else model(*FAMILIES[case])
    record = weights(m)
    tokens = torch.randint(len(record.W_E), (1, 24), generator=torch.Generator().manual_seed(5))
    seen, logits = record.run(tokens[0])
    with torch.no_grad():
        theirs = m.logits(m.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool)))[0]
    assert (logits - theirs).norm() < 1e-5 * theirs.norm()
    from saekit.hooks import capture

    sites = {place: m.site(place) for place in record.places}
    found = capture(lambda: m(m.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))), sites, stop=False)
    for place, (layer, site) in record.places.items():
        mine, true = seen[layer][site], found[place][0]
        assert (mine - true).norm() <= 1e-5 * true.norm(), place


def test_what_is_no_such_model_is_refused() -> None:
    with pytest.raises(SaekitError, match=r"no circuit can be traced in it"):
        weights(torch.nn.Sequential(torch.nn.Linear(3, 3)))
    options = {
        **LLAMA,
        "head_dim": 16,
        "sliding_window": 64,
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": 16,
    }
    with pytest.raises(SaekitError, match="softcaps"):
        weights(model("Gemma2ForCausalLM", options))
