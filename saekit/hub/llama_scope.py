"""Llama Scope's folder (the first, of 2024): ``hyperparams.json`` and ``checkpoints/final.safetensors``.

``encoder.weight`` [F, d], ``decoder.weight`` [d, F] and their biases work in a space where rows have the norm
``sqrt(d)`` on average: ``s_in = sqrt(d) / norm_in`` and ``s_out`` likewise are two factors, and differ where another
place is written than read. The one threshold is in the units of raw inputs, so pre-activations of that space are
compared with it times ``s_in``; with ``sparsity_include_decoder_norm`` they are first multiplied by their atoms' norms.
A trained k stands beside it (``top_k``), near which the L0 on text should be. The releases since (config.json and
sae_weights.safetensors) are of format "openmoss".
"""

import math
from typing import Any

import torch

from saekit import records
from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, to_dictionary
from saekit.types import SaekitError

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
FIELDS = {
    "d_model": int, "hook_point_in": str, "hook_point_out?": str, "act_fn?": str, "jump_relu_threshold?": float | None,
    "norm_activation?": str, "dataset_average_activation_norm?": {"in": float, "out": float}, "top_k?": int,
    "sparsity_include_decoder_norm?": bool, "apply_decoder_bias_to_pre_encoder?": bool, "use_glu_encoder?": bool,
}  # fmt: skip
KEYS = ("encoder.weight", "encoder.bias", "decoder.weight")
FIX = "take an intact folder"


def detect(files: Files) -> bool:
    """Both files, by their places."""
    return files.has(CONFIG) and files.has(WEIGHTS)


def load(files: Files) -> Dictionary:
    """The dictionary of a folder."""
    where = str(files.root / CONFIG)
    config = files.json(CONFIG)
    records.check(config, FIELDS, f"file {where!r}", FIX)
    if config.get("use_glu_encoder"):
        raise SaekitError(
            f"use_glu_encoder of {where!r}: no dictionary here has an encoder of two layers; take another"
        )
    state = files.tensors(WEIGHTS)
    for name in KEYS:
        if name not in state:
            raise SaekitError(f"file {str(files.root / WEIGHTS)!r} lacks the tensor {name!r}; {FIX}")
    read, written = config["hook_point_in"], config.get("hook_point_out", config["hook_point_in"])
    s_in, s_out = _scales(config, where)
    atoms = state["decoder.weight"].T
    b_dec = state.get("decoder.bias", torch.zeros(len(state["decoder.weight"])))
    card = about(
        "llama_scope",
        str(atoms.dtype).removeprefix("torch."),
        model="meta-llama/Llama-3.1-8B",
        metadata=config,
    )
    record = Record(
        encoder=state["encoder.weight"], b_enc=state["encoder.bias"], atoms=atoms, b_dec=b_dec,
        pre_bias=b_dec if config.get("apply_decoder_bias_to_pre_encoder") else None, scale_in=s_in, scale_out=s_out,
        wiring="autoencoder" if read == written else "transcoder", reads=(read,), writes=(written,),
        domain="norm" if config.get("sparsity_include_decoder_norm") else "pre", card=card,
        **_rule(config, s_in, state["encoder.bias"], where),
    )  # fmt: skip
    return to_dictionary(record)


def _scales(config: dict[str, Any], where: str) -> tuple[float, float]:
    """``s_in`` and ``s_out``; both 1 where they are in the weights already."""
    kind, norms = config.get("norm_activation", "dataset-wise"), config.get("dataset_average_activation_norm")
    if kind == "inference":
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise SaekitError(
            f"norm_activation {kind!r} of {where!r} depends on the batch or the token; 'dataset-wise' and 'inference' are read"
        )
    if norms is None or min(norms["in"], norms["out"]) <= 0:
        raise SaekitError(
            f"dataset_average_activation_norm of {where!r} must hold a norm above 0 for 'in' and 'out'; {FIX}"
        )
    root = math.sqrt(config["d_model"])
    return root / norms["in"], root / norms["out"]


def _rule(config: dict[str, Any], s_in: float, b_enc: torch.Tensor, where: str) -> dict[str, Any]:
    name, threshold = config.get("act_fn", "jumprelu"), config.get("jump_relu_threshold")
    if name == "jumprelu" and threshold is not None:
        return {
            "selection": "jumprelu",
            "threshold": torch.full_like(b_enc, threshold * s_in, dtype=torch.float32),
        }
    if name == "topk" and "top_k" in config:
        return {"selection": "topk", "options": {"k": config["top_k"]}}
    if name == "relu":
        return {"selection": "relu"}
    raise SaekitError(
        f"act_fn {name!r} of {where!r} is unknown, or lacks its jump_relu_threshold or top_k; 'jumprelu', 'topk' and 'relu' are read"
    )


FORMAT = Format(f"{CONFIG} and {WEIGHTS}", detect, load)
