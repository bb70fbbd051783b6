"""SAELens 6.54: its architectures, normalisations and dtypes, written and read by its own code. See golden.py.

A third argument, ``all``, writes the whole product of the three; without it each architecture is there with each
normalisation, in three of the dtypes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # last, so that a package of this file's name is found first

from golden import D, F, Forward, K, drive, fill, inputs
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

DTYPES = ("float32", "bfloat16", "float16", "float64")
NORMS = ("none", "layer_norm", "constant_norm_rescale")
OUT = 6  # the width that transcoders write
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard_uncentred": ("standard", {"apply_b_dec_to_input": False}),
    "gated": ("gated", {}),
    "topk": ("topk", {"k": K}),
    "topk_rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": K}),
    "abstopk_rescaled": ("abstopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}),
    "pursuit": ("matching_pursuit", {"residual_threshold": 0.5}),
    "pursuit_uncentred": (
        "matching_pursuit",
        {"apply_b_dec_to_input": False, "max_iterations": K, "stop_on_duplicate_support": False, "residual_threshold": 0.0},
    ),
    "transcoder": ("transcoder", {"d_out": OUT}),
    "skip_transcoder": ("skip_transcoder", {"d_out": OUT}),
    "jumprelu_transcoder": ("jumprelu_transcoder", {"d_out": OUT}),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", {"d_out": OUT}),
}  # fmt: skip
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "topk": ("topk", {"k": K}),
    "abstopk": ("abstopk", {"k": K}),
    "jumprelu": ("jumprelu", {}),
    "batchtopk": ("batchtopk", {"k": K}),
    "batchtopk_plain": ("batchtopk", {"k": K, "rescale_acts_by_decoder_norm": False}),
    "matryoshka": ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [8, F]}),
    "pursuit": ("matching_pursuit", {"max_iterations": K}),
}


def metadata(transcodes: bool = False) -> SAEMetadata:
    """What a training run says of where an SAE belongs."""
    out = {"hook_name_out": "blocks.1.hook_mlp_out"} if transcodes else {}
    return SAEMetadata(
        model_name="gpt2",
        hook_name="blocks.1.hook_resid_post",
        dataset_path="some/text",
        context_size=128,
        **out,
    )


def settle(module: torch.nn.Module, seed: int) -> None:
    """Random weights, with thresholds that some features pass and atoms on which a pursuit can converge."""
    fill(module, seed)
    with torch.no_grad():
        if "threshold" in dict(module.named_parameters()):
            module.threshold.abs_().add_(0.5)  # type: ignore[operator, union-attr]
        if module.cfg.architecture() == "matching_pursuit":  # type: ignore[union-attr, operator]
            module.W_dec.div_(module.W_dec.norm(dim=1, keepdim=True))  # type: ignore[operator, union-attr]


def forward(module: Any) -> Forward:
    """Its codes at inference and its output, which of a skip transcoder is more than what it decodes."""
    heads = module.cfg.reshape_activations == "hook_z"

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.unflatten(-1, (2, -1)) if heads else x
        codes, out = module.encode(x), module(x)
        return codes.to_dense(), out.flatten(1)

    return run


def reopen(folder: Path) -> Forward:
    """What the peer's own reader makes of a folder, in fp32."""
    return forward(SAE.load_from_disk(folder, dtype="float32"))


def inference(
    architecture: str, options: dict[str, Any], norm: str, dtype: str, seed: int, folder: Path
) -> Forward:
    """An inference file."""
    cls, config = get_sae_class(architecture)
    transcodes = any(f.name == "d_out" for f in fields(config))
    plain = {"apply_b_dec_to_input": False} if transcodes else {}
    cfg = config(
        d_in=D, d_sae=F, normalize_activations=norm, metadata=metadata(transcodes), **{**plain, **options}
    )
    module = cls(cfg)
    settle(module, seed)
    module.to(dtype=getattr(torch, dtype))
    module.save_model(folder)
    return reopen(folder)


def checkpoint(
    architecture: str, options: dict[str, Any], scaler: str | None, seed: int, folder: Path
) -> Forward:
    """A training checkpoint, with the scale or the whitening of its activations beside it."""
    cls, config = get_sae_training_class(architecture)
    norms = {None: "none", "scale": "expected_average_only_in", "whiten": "covariance_whitening"}
    module = cls(config(d_in=D, d_sae=F, normalize_activations=norms[scaler], metadata=metadata(), **options))
    settle(module, seed)
    if hasattr(module, "topk_threshold"):
        module.topk_threshold.fill_(0.8)
    module.save_model(folder)
    of = ActivationScaler()
    rows = iter(inputs(rows=64, seed=s) for s in range(100, 110))
    if scaler == "scale":
        of.estimate_scaling_factor(D, rows, 10)
    if scaler == "whiten":
        of.estimate_whitening(D, rows, 10)
    if scaler is not None:
        of.save(str(folder / "activation_scaler.json"))
    if hasattr(module, "topk_threshold"):  # a whole batch decides in training; at inference its JumpReLU does
        with TemporaryDirectory() as other:
            module.save_inference_model(other)
            cfg = json.loads((Path(other) / "cfg.json").read_text())
            cfg["normalize_activations"] = "none"
            (Path(other) / "cfg.json").write_text(json.dumps(cfg))
            inner = reopen(Path(other))
    else:
        inner = forward(TrainingSAE.load_from_disk(folder, dtype="float32"))

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, out = inner(of.scale(x))
        return codes, of.unscale(out)

    return run


def old(function: str, seed: int, folder: Path) -> Forward:
    """A file as versions before 6.0 wrote them: one flat cfg."""
    architecture = "jumprelu" if function == "jumprelu" else "standard"
    cls, config = get_sae_class(architecture)
    made = cls(config(d_in=D, d_sae=F))
    settle(made, seed)
    made.save_model(folder)
    cfg = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32",
        "device": "cpu", "model_name": "gpt2", "hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1,
        "hook_point_head_index": None, "activation_fn_str": "topk" if function == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if function == "topk" else {}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "prepend_bos": True, "context_size": 128, "dataset_path": "some/text",
        "normalize_activations": False, "sae_lens_training_version": None, "lr": 1e-4,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return reopen(folder)


def in_heads(seed: int, folder: Path) -> Forward:
    """An SAE of attention heads' outputs, side by side."""
    cls, config = get_sae_class("standard")
    module = cls(
        config(
            d_in=D,
            d_sae=F,
            reshape_activations="hook_z",
            metadata=SAEMetadata(hook_name="blocks.1.attn.hook_z"),
        )
    )
    settle(module, seed)
    module.save_model(folder)
    return reopen(folder)


def cases(everything: bool) -> dict[str, Callable[[Path], Forward]]:
    """All of them by name."""
    out: dict[str, Callable[[Path], Forward]] = {}
    for i, (label, (architecture, options)) in enumerate(ARCHITECTURES.items()):
        for j, norm in enumerate(NORMS):
            for k, dtype in enumerate(DTYPES):
                if everything or k == (i + j) % len(DTYPES):
                    name = f"{label}-{norm}-{dtype}"
                    out[name] = partial(inference, architecture, options, norm, dtype, len(out))
    for label, (architecture, options) in CHECKPOINTS.items():
        scalers = (None, "scale", "whiten") if label != "pursuit" else (None, "scale")
        for scaler in (
            scalers if everything or label in ("topk", "gated", "batchtopk", "pursuit") else (None,)
        ):
            name = f"checkpoint-{label}{'' if scaler is None else f'-{scaler}'}"
            out[name] = partial(checkpoint, architecture, options, scaler, len(out))
    for function in ("relu", "topk", "jumprelu"):
        out[f"before_6-{function}"] = partial(old, function, len(out))
    out["heads"] = partial(in_heads, len(out))
    return out


if __name__ == "__main__":
    drive(cases("all" in sys.argv[3:]), reopen)
