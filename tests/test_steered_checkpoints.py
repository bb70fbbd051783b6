"""Steering that is the same everywhere becomes a checkpoint of transformers, or is refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import LLAMA, model
from test_circuits import stand
from test_steer import BOTH, dictionary, family, seen
from test_weights import toy

import saekit
from saekit.dictionaries import Dictionary
from saekit.interventions import Edit, When
from saekit.models import Model
from saekit.steer import Steering
from saekit.types import SaekitError

BIASED = {
    "gpt2": ("stream", "attention", "mlp"), "gpt2, scaled by layer": ("stream",), "neox, part rotary": ("stream", "attention", "mlp"),
    "llama, grouped keys": ("stream", "attention", "mlp"), "llama, biases and scaled positions": ("stream", "attention"),
    "qwen3, norms": ("attention",), "gemma, norms that add 1": ("attention",),
}  # fmt: skip


AT = {
    "stream": "blocks.0.hook_resid_post",
    "attention": "blocks.1.hook_attn_out",
    "mlp": "blocks.1.hook_mlp_out",
}


@pytest.mark.parametrize(("name", "place"), [(n, p) for n, places in BIASED.items() for p in places])
def test_what_adds_the_same_everywhere_is_a_checkpoint_of_transformers(
    name: str, place: str, tmp_path: Path
) -> None:
    import transformers

    m = family(name)
    d, e = dictionary(m, AT[place]), dictionary(m, AT[place], seed=1)
    before = seen(m, (), BOTH)["logits"]
    made = Steering.of([(d, [Edit(3, add=6.0), Edit(9, add=-2.0)]), (e, [Edit(1, add=4.0)])], masked=False)
    out = made.save_pretrained(m, [d, e], tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        theirs = plain(BOTH).logits
    with saekit.steer(m, [d, e], made):
        ours = seen(m, (), BOTH)["logits"]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert (ours - before).abs().max() > 1e-2
    assert torch.equal(seen(m, (), BOTH)["logits"], before)  # the model itself is as it was
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def refusals() -> dict[str, tuple[Model, Dictionary, dict[str, Any], str]]:
    llama, gpt2 = family("llama, grouped keys"), family("gpt2")
    gemma = model("Gemma2ForCausalLM", {**LLAMA, "head_dim": 16, "sliding_window": 64})
    granite = model("GraniteForCausalLM", {**LLAMA, "residual_multiplier": 0.5})
    t = toy("layer norms, learned")
    add: dict[str, Any] = {"add": {3: 2.0}, "masked": False}
    maps = saekit.create("molt", d_in=32, n_features=64, k=4, ranks=(1, 2))
    maps.reads, maps.writes = ("blocks.1.mlp:in",), ("blocks.1.mlp:out",)
    return {
        "set": (gpt2, dictionary(gpt2), {"edits": {3: 2.0}, "masked": False}, "what 'set' does to feature 3 depends on its value"),
        "clamp": (gpt2, dictionary(gpt2), {"clamp": {3: (0, 1)}, "masked": False}, "what 'clamp' does to feature 3"),
        "a condition": (gpt2, dictionary(gpt2), {**add, "when": When(5)}, "acts at some tokens only"),
        "a position": (gpt2, dictionary(gpt2), {**add, "position": 0}, "acts at some tokens only"),
        "masked": (gpt2, dictionary(gpt2), {"add": {3: 2.0}}, "masked=False"),
        "no error": (gpt2, dictionary(gpt2), {**add, "error": False}, "in the place of activations"),
        "the embeddings": (gpt2, dictionary(gpt2, "blocks.0.hook_resid_pre"), add, "there are embeddings only"),
        "what a norm reads": (gpt2, dictionary(gpt2, "blocks.0.hook_resid_mid"), add, "is no place that an attention layer or MLP"),
        "behind the blocks": (gpt2, dictionary(gpt2, "transformer.ln_f"), add, "is at no block"),
        "norms behind": (gemma, dictionary(gemma), add, "normalises what its layers write"),
        "no bias to be had": (family("mistral, window"), dictionary(family("mistral, window")), add, "has none, and no setting of MistralConfig"),
        "what is scaled before it is added": (granite, dictionary(granite), add, "misses the steered one by"),
        "maps": (llama, maps, add, "write what they make of the input"),
        "no model of transformers": (t, stand("topk", t), add, "which transformers can't save"),
    }  # fmt: skip


REFUSED = refusals()


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_bias_can_do_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    m, d, given, words = REFUSED[case]
    with pytest.raises(SaekitError, match=words):
        Steering.of(d, **given).save_pretrained(m, d, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_replaces_nothing(tmp_path: Path) -> None:
    m = family("gpt2")
    d = dictionary(m)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(SaekitError, match="holds something already"):
        Steering.of(d, add={3: 1.0}, masked=False).save_pretrained(m, d, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
