"""Readings that other converters have, each of which the goldens tell from the right one; and files that are damaged."""

import dataclasses
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import (  # fmt: skip
    CLOSE,
    GOLDEN,
    OPTIONS,
    D,
    F,
    difference,
    edited,
    family_of,
    folder_of,
    held,
    loaded,
    setting,
    without,
)

import saekit
from saekit import SaekitError
from saekit.hub.files import Files
from saekit.hub.record import Record, to_dictionary


def stated(case: str, monkeypatch: pytest.MonkeyPatch) -> Record:
    """The record that a golden's reader comes to."""
    kept: list[Record] = []
    module = import_module(f"saekit.hub.{family_of(case).removesuffix('_2')}")
    monkeypatch.setattr(
        module, "to_dictionary", lambda record: (kept.append(record), to_dictionary(record))[1]
    )
    loaded(case)
    return kept[0]


def changed(**fields: Any) -> Callable[[Record], Record]:
    """A reading that differs in some fields."""
    return lambda record: dataclasses.replace(record, **fields)


def before_its_norm(record: Record) -> torch.Tensor:
    """The linear layer before its batch norm."""
    files = Files(GOLDEN / "overcomplete" / "topk-batchnorm")
    return files.tensors("model.pt")["encoder.final_block.0.weight"]


WRONG = {
    "batchtopk read as relu": ("dictionary_learning/BatchTopKSAE-float32", changed(selection="relu", threshold=None)),
    "matryoshka read as relu": ("dictionary_learning/MatryoshkaBatchTopKSAE-float32", changed(selection="relu", threshold=None)),
    "b_dec taken off in JumpReluAutoEncoder": ("dictionary_learning/JumpReluAutoEncoder-float32", lambda r: dataclasses.replace(r, pre_bias=r.b_dec)),
    "b_dec not taken off in TopK": ("dictionary_learning/AutoEncoderTopK-float32", changed(pre_bias=None)),
    "b_dec taken off in AutoEncoderNew": ("dictionary_learning/AutoEncoderNew-float32", lambda r: dataclasses.replace(r, pre_bias=r.b_dec)),
    "the gate's bias taken off and the magnitude's not": ("dictionary_learning/GatedAutoEncoder-float32", changed(pre_bias=None)),
    "b_dec taken off a transcoder's input": ("sparsify/topk-transcode-float32", lambda r: dataclasses.replace(r, pre_bias=r.b_dec)),
    "b_dec not taken off an autoencoder's": ("sparsify/groupmax-float32", changed(pre_bias=None)),
    "a skip transposed": ("sparsify/topk-skip-transcode-float32", lambda r: dataclasses.replace(r, skip=r.skip.T)),
    "a skip left out": ("sparsify/topk-skip-transcode-float32", changed(skip=None)),
    "groups read as ranks": ("sparsify/groupmax-float32", changed(selection="topk")),
    "an affine skip transposed": ("documented/gemma_scope_2-unsaid", lambda r: dataclasses.replace(r, skip=r.skip.T)),
    "the embedding read unscaled": ("documented/gemma_scope-embedding", changed(scale_in=1.0, scale_out=1.0)),
    "one scale for input and output": ("documented/llama_scope-transcoder", lambda r: dataclasses.replace(r, scale_out=r.scale_in)),
    "a threshold in the units of normalised rows": ("documented/llama_scope-sae", lambda r: dataclasses.replace(r, threshold=r.threshold / r.scale_in)),
    "norms left out of the comparison": ("documented/llama_scope-norms", changed(domain="pre")),
    "rows not standardised": ("documented/openai-TopK", changed(per_row="none")),
    "W_dec transposed (Qwen)": ("documented/bare-qwen_scope-square", lambda r: dataclasses.replace(r, atoms=r.atoms.T)),
    "W_dec transposed (Goodfire)": ("documented/bare-goodfire-square", lambda r: dataclasses.replace(r, atoms=r.atoms.T)),
    "W_enc transposed (Qwen)": ("documented/bare-qwen_scope-square", lambda r: dataclasses.replace(r, encoder=r.encoder.T)),
    "b_dec taken off (Qwen)": ("documented/bare-qwen_scope", lambda r: dataclasses.replace(r, pre_bias=r.b_dec)),
    "b_dec not taken off (hook_z)": ("documented/bare-hook_z", changed(pre_bias=None)),
    "thresholds that are logarithms": ("overcomplete/jump", lambda r: dataclasses.replace(r, threshold=r.threshold.log())),
    "a batch norm left out": ("overcomplete/topk-batchnorm", lambda r: dataclasses.replace(r, encoder=before_its_norm(r))),
}  # fmt: skip


@pytest.mark.parametrize("reading", WRONG)
def test_a_wrong_reading_would_show(reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change = WRONG[reading]
    record, golden = stated(case, monkeypatch), held(*folder_of(case))
    codes, out, same = difference(to_dictionary(record), golden)
    assert same and max(codes, out) <= CLOSE
    codes, out, _ = difference(to_dictionary(change(record)), golden)
    assert max(codes, out) > 0.01


BAD: dict[str, tuple[str, str, Callable, str]] = {
    "no such class": ("dictionary_learning/AutoEncoder-float32", "config.json", lambda c: {"trainer": {**c["trainer"], "dict_class": "AutoEncoderTopKK"}}, "dict_class 'AutoEncoderTopKK' .* did you mean 'AutoEncoderTopK'"),
    "a tensor lacks": ("dictionary_learning/GatedAutoEncoder-float32", "ae.pt", without("r_mag"), "lacks the tensor 'r_mag'"),
    "another shape": ("dictionary_learning/AutoEncoder-float32", "ae.pt", setting("bias", torch.zeros(3)), r"b_dec has shape \\(3,\\)"),
    "a class of a number": ("dictionary_learning/AutoEncoder-float32", "config.json", lambda c: {"trainer": {"dict_class": 3}}, "trainer.dict_class = 3"),
    "no such activation": ("sparsify/topk-float32", "cfg.json", setting("activation", "relu"), "activation 'relu' .* sparsify has 'topk' and 'groupmax'"),
    "signed codes": ("sparsify/topk-float32", "cfg.json", setting("signed", True), "signed = true"),
    "a skip not there": ("sparsify/topk-float32", "cfg.json", setting("skip_connection", True), "lacks 'W_skip'"),
    "a skip not spoken of": ("sparsify/topk-skip-float32", "cfg.json", setting("skip_connection", False), "'W_skip'"),
    "k as a text": ("sparsify/topk-float32", "cfg.json", setting("k", "4"), "has k = '4'"),
    "other latents": ("sparsify/topk-float32", "cfg.json", setting("num_latents", 25), "num_latents = 25 .* 24"),
    "no thresholds": ("documented/gemma_scope-res", "params.npz", without("threshold"), "lacks the tensor 'threshold'"),
    "a scaling factor": ("documented/gemma_scope-res", "params.npz", setting("scaling_factor", np.full(F, 2, np.float32)), "scaling_factor other than 1"),
    "layers of a CLT": ("documented/gemma_scope_2-affine", "params.safetensors", setting("w_dec", torch.zeros(F, 5, 12)), "one layer of a cross-layer transcoder, which writes 5 layers"),
    "an affine skip not there": ("documented/gemma_scope_2-affine", "params.safetensors", without("affine_skip_connection"), "lacks the tensor 'affine_skip_connection'"),
    "another architecture": ("documented/gemma_scope_2-affine", "config.json", setting("architecture", "topk"), "is not 'jump_relu'"),
    "token-wise norms": ("documented/llama_scope-sae", "hyperparams.json", setting("norm_activation", "token-wise"), "norm_activation 'token-wise'"),
    "no norms": ("documented/llama_scope-sae", "hyperparams.json", without("dataset_average_activation_norm"), "must hold a norm above 0"),
    "no threshold": ("documented/llama_scope-sae", "hyperparams.json", without("jump_relu_threshold"), "act_fn 'jumprelu' .* lacks its jump_relu_threshold"),
    "a gated encoder": ("documented/llama_scope-sae", "hyperparams.json", setting("use_glu_encoder", True), "use_glu_encoder"),
    "one place, two norms": ("documented/llama_scope-sae", "hyperparams.json", setting("dataset_average_activation_norm", {"in": 2.0, "out": 3.0}), "scale_in .* differ"),
    "no encoder's bias": ("documented/llama_scope-sae", "final.safetensors", without("encoder.bias"), "lacks the tensor 'encoder.bias'"),
    "another activation": ("documented/openai-ReLU", "autoencoder.pt", setting("activation", "GELU"), "activation 'GELU'"),
    "no k": ("documented/openai-TopK", "autoencoder.pt", setting("activation_state_dict", {}), "k = None"),
    "two layers": ("overcomplete/topk", "model.pt", setting("encoder.mlp_blocks.0.0.weight", torch.zeros(D, D)), "'encoder.mlp_blocks.0.0.weight' of an encoder that is not linear"),
    "a layer norm": ("overcomplete/topk", "model.pt", setting("encoder.final_block.1.weight", torch.ones(F)), "not linear"),
    "two rules": ("overcomplete/topk", "model.pt", setting("thresholds", torch.zeros(F)), "k and the file's thresholds are two rules"),
    "no mixture": ("overcomplete/archetypal-topk", "model.pt", without("dictionary.W"), "lacks the tensor 'dictionary.W'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_damage_is_told_in_one_sentence(damage: str, tmp_path: Path) -> None:
    case, file, change, told = BAD[damage]
    folder = edited(case, tmp_path, file, change)
    with pytest.raises(SaekitError, match=told.replace("\\\\", "\\")) as error:
        saekit.load(folder, **OPTIONS.get(case.split("/")[1], {}))
    assert "\n" not in str(error.value)


def test_a_pickle_that_may_run_code_is_no_hindrance_beside_and_is_told_alone(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sparsify" / "topk-float32", tmp_path / "run")
    torch.save({"scheduler": torch.nn.Linear(2, 2)}, tmp_path / "run" / "state.pt")
    assert difference(saekit.load(tmp_path / "run"), held(GOLDEN / "sparsify", "topk-float32"))[2]
    with pytest.raises(SaekitError, match=r"state\.pt' names '.*Linear' in its pickle"):
        saekit.load(tmp_path / "run" / "state.pt")
