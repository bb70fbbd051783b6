"""Formats whose writers are no packages, by what is documented of them: files, and their functions in numpy.

Gemma Scope 1 and 2, Llama Scope, OpenAI's autoencoders, Goodfire, DeepSeek-R1, Qwen Scope and hook_z. Nothing here is
of saekit, so that its readers are held against a second reading of the documents. See golden.py for how to run it;
any Python with torch, numpy and safetensors will do. ``open`` knows the files that saekit writes: ``params.npz``,
``params.safetensors`` and OpenAI's ``autoencoder.pt``.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))

from golden import D, F, Forward, K, drive

Arrays = dict[str, np.ndarray]


def weights(seed: int, d_out: int = D, width: int = F, skip: bool = False) -> Arrays:
    """Random ones: ``enc`` [d, F], ``dec`` [F, d_out] of norm 1 (by rows), biases, thresholds above 0."""
    g = np.random.default_rng(seed)
    w = {
        "enc": g.standard_normal((D, width)) / math.sqrt(D), "dec": g.standard_normal((width, d_out)),
        "b_enc": 0.3 * g.standard_normal(width), "b_dec": 0.5 * g.standard_normal(d_out),
        "threshold": 0.5 + g.random(width),
    }  # fmt: skip
    w["dec"] /= np.linalg.norm(w["dec"], axis=1, keepdims=True)
    if skip:
        w["skip"] = g.standard_normal((D, d_out)) / math.sqrt(D)
    return {name: value.astype(np.float32) for name, value in w.items()}


def top(pre: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, negatives silenced."""
    kept = np.zeros_like(pre)
    at = np.argsort(-pre, axis=1, kind="stable")[:, :k]
    np.put_along_axis(kept, at, np.take_along_axis(pre, at, 1), 1)
    return np.maximum(kept, 0)


def forward(function) -> Forward:
    """A function of numpy rows, as one of tensors; it gives codes and outputs."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, out = function(x.numpy())
        return torch.from_numpy(codes.astype(np.float32)), torch.from_numpy(out.astype(np.float32))

    return run


def jump(w: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """JumpReLU without a pre-bias; the skip reads what the encoder reads."""
    pre = x @ w["enc"] + w["b_enc"]
    codes = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    return codes, codes @ w["dec"] + w["b_dec"] + (x @ w["skip"] if "skip" in w else 0)


def gemma_scope(w: Arrays, inside: str, folder: Path) -> Forward:
    """params.npz; of the embedding, weights are those of rows before Gemma multiplies them with sqrt(d)."""
    here = folder / inside
    here.mkdir(parents=True)
    names = {"enc": "W_enc", "dec": "W_dec"}
    np.savez(here / "params.npz", **{names.get(k, k): v for k, v in w.items()})
    if "embedding" not in inside:
        return forward(partial(jump, w))

    def embedded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, out = jump(w, x / math.sqrt(D))
        return codes, out * math.sqrt(D)

    return forward(embedded)


def gemma_scope_2(w: Arrays, config: dict | None, inside: str, folder: Path) -> Forward:
    """params.safetensors, with a skip [d_in, d_out], and a config that may be missing."""
    here = folder / inside
    here.mkdir(parents=True)
    names = {"enc": "w_enc", "dec": "w_dec", "skip": "affine_skip_connection"}
    save_file({names.get(k, k): torch.from_numpy(v) for k, v in w.items()}, here / "params.safetensors")
    if config is not None:
        (here / "config.json").write_text(json.dumps(config))
    return forward(partial(jump, w))


def llama_scope(w: Arrays, norm_in: float, norm_out: float, by_norm: bool, folder: Path) -> Forward:
    """Weights of a space where rows have norm sqrt(d); the threshold is in the units of raw inputs."""
    (folder / "checkpoints").mkdir()
    save_file(
        {
            "encoder.weight": torch.from_numpy(w["enc"].T.copy()), "encoder.bias": torch.from_numpy(w["b_enc"]),
            "decoder.weight": torch.from_numpy(w["dec"].T.copy()), "decoder.bias": torch.from_numpy(w["b_dec"]),
        },
        folder / "checkpoints" / "final.safetensors",
    )  # fmt: skip
    at = "blocks.5.ln2.hook_normalized" if norm_in != norm_out else "blocks.5.hook_resid_post"
    to = "blocks.5.hook_mlp_out" if norm_in != norm_out else at
    config = {
        "d_model": D, "d_sae": F, "expansion_factor": F // D, "hook_point_in": at, "hook_point_out": to,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out}, "use_decoder_bias": True,
        "sparsity_include_decoder_norm": by_norm, "apply_decoder_bias_to_pre_encoder": False, "top_k": 50,
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    s_in, s_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    size = np.linalg.norm(w["dec"], axis=1) if by_norm else 1.0

    def normalised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pre = x * s_in @ w["enc"] + w["b_enc"]
        codes = np.where(pre * size > 0.5 * s_in, pre, 0)
        return codes, (codes @ w["dec"] + w["b_dec"]) / s_out

    return forward(normalised)


def openai(state: dict) -> Forward:
    """OpenAI's: TopK standardises each row, and brings its output back by the same mean and deviation."""
    enc, dec, pre_bias, b = (
        state[k].float().numpy() for k in ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
    )
    ranked = state["activation"] == "TopK"

    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = x.mean(1, keepdims=True) if ranked else 0.0
        std = (x - mean).std(1, ddof=1, keepdims=True) if ranked else 1.0
        u = (x - mean) / (std + 1e-5) if ranked else x
        pre = (u - pre_bias) @ enc.T + b
        codes = top(pre, state["activation_state_dict"]["k"]) if ranked else np.maximum(pre, 0)
        return codes, (codes @ dec.T + pre_bias) * std + mean

    return forward(run)


def write_openai(w: Arrays, activation: str, dtype: torch.dtype, folder: Path) -> Forward:
    """autoencoder.pt, as its state_dict() is."""
    state = {
        "pre_bias": w["b_dec"], "encoder.weight": w["enc"].T.copy(), "latent_bias": w["b_enc"],
        "decoder.weight": w["dec"].T.copy(),
    }  # fmt: skip
    held: dict = {name: torch.from_numpy(value).to(dtype) for name, value in state.items()}
    held |= {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": activation}
    held["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}
    torch.save(held, folder / "autoencoder.pt")
    return openai(held)


def bare(w: Arrays, layout: str, folder: Path) -> Forward:
    """State dicts without a config; what they mean is known from where they come, and never from which side is longer."""
    t = {name: torch.from_numpy(value.copy()) for name, value in w.items()}
    dense = {"weight": t["enc"].T, "bias": t["b_enc"]}, {"weight": t["dec"].T, "bias": t["b_dec"]}
    pre_bias, k = w["b_dec"] if layout == "hook_z" else 0.0, K if layout == "qwen_scope" else len(w["b_enc"])
    if layout in ("goodfire", "deepseek"):
        sides = ("encoder_linear", "decoder_linear") if layout == "goodfire" else ("encoder", "decoder")
        held = {f"{side}.{k}": v for side, part in zip(sides, dense, strict=True) for k, v in part.items()}
        file = "Llama-3.1-8B-Instruct-SAE-l19.pth" if layout == "goodfire" else "DeepSeek-R1-SAE-l19.pt"
    else:
        turned = layout == "qwen_scope"
        enc, dec = (t["enc"].T, t["dec"].T) if turned else (t["enc"], t["dec"])
        held = {"W_enc": enc, "W_dec": dec, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
        file = "layer7.sae.pt" if turned else "gpt2-small_L7.pt"
    if layout == "hook_z":
        config = {"act_size": D, "dict_size": len(w["b_enc"]), "act_name": "blocks.7.attn.hook_z", "seed": 49}
        (folder / "gpt2-small_L7_cfg.json").write_text(json.dumps(config))
    torch.save({name: value.contiguous() for name, value in held.items()}, folder / file)

    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = top((x - pre_bias) @ w["enc"] + w["b_enc"], k)
        return codes, codes @ w["dec"] + w["b_dec"]

    return forward(run)


def reopen(folder: Path) -> Forward:
    """A folder that saekit wrote: its kind is known by the file's name."""
    if found := list(folder.rglob("params.npz")):
        with np.load(found[0]) as held:
            w = {{"W_enc": "enc", "W_dec": "dec"}.get(k, k): held[k] for k in held}
        return forward(partial(jump, w))
    if found := list(folder.rglob("params.safetensors")):
        names = {"w_enc": "enc", "w_dec": "dec", "affine_skip_connection": "skip"}
        w = {names.get(k, k): v.float().numpy() for k, v in load_file(found[0]).items()}
        return forward(partial(jump, w))
    return openai(torch.load(folder / "autoencoder.pt", weights_only=True))


LAYOUTS = ("goodfire", "deepseek", "qwen_scope", "hook_z")
LONG = {**weights(30), "dec": 2.5 * weights(30)["dec"]}
CONFIG = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
INSIDE = {"res": "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"}
INSIDE["transcoders"] = INSIDE["res"].replace("-res", "-transcoders")
INSIDE["embedding"] = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
SECOND = {
    "resid": (weights(10), {**CONFIG, "hf_hook_point_in": "model.layers.5.output", "affine_connection": False}),
    "transcoder": (weights(11, 12), {**CONFIG, "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output", "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output", "affine_connection": False}),
    "affine": (weights(12, 12, skip=True), {**CONFIG, "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output", "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output", "affine_connection": True}),
    "unsaid": (weights(13, skip=True), None),
}  # fmt: skip
PLACES = {"resid": "resid_post/layer_5_width_16k_l0_big", "unsaid": "transcoder_all/layer_0_width_16k_l0_big_affine"}  # fmt: skip
PLACES |= dict.fromkeys(("transcoder", "affine"), "transcoder/layer_5_width_16k_l0_big")
CASES = {
    **{f"gemma_scope-{n}": partial(gemma_scope, weights(i), INSIDE[n]) for i, n in enumerate(INSIDE)},
    **{f"gemma_scope_2-{n}": partial(gemma_scope_2, *SECOND[n], PLACES[n]) for n in SECOND},
    "llama_scope-sae": partial(llama_scope, weights(20), 9.0, 9.0, False),
    "llama_scope-transcoder": partial(llama_scope, weights(21), 9.0, 1.5, False),
    "llama_scope-norms": partial(llama_scope, LONG, 9.0, 9.0, True),
    "openai-TopK": partial(write_openai, weights(40), "TopK", torch.float32),
    "openai-ReLU": partial(write_openai, weights(41), "ReLU", torch.float32),
    **{f"bare-{n}": partial(bare, weights(50 + i), n) for i, n in enumerate(LAYOUTS)},
    **{f"bare-{n}-square": partial(bare, weights(60 + i, width=D), n) for i, n in enumerate(LAYOUTS[::2])},
}  # fmt: skip

if __name__ == "__main__":
    drive(CASES, reopen)
