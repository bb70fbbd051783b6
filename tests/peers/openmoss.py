"""llamascopium 2.0.0b34 (OpenMOSS): its five types of dictionary, written and read by its own code. See golden.py for how to run it.

Inputs are raw. Of a clt or a crosscoder a row is its layers or heads side by side, and so are codes and outputs; of a
lorsa they are sequences. Outputs are brought back to raw units where the peer can: a transcoder whose rows are scaled
one by one writes a space of its own. ``threshold`` beside them is what a batch's ranks came down to.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(
    str(Path(__file__).parent)
)  # last, so that the packages of this folder's files are found first

from golden import inputs
from llamascopium.models.clt import CLTConfig
from llamascopium.models.crosscoder import CrosscoderConfig
from llamascopium.models.lorsa import LorsaConfig
from llamascopium.models.molt import MOLTConfig
from llamascopium.models.sae import SAEConfig
from llamascopium.models.sparse_dictionary import SparseDictionary

D, F, K, ROWS, PARTS = 6, 12, 3, 6, 3
IN, OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
PAIR: dict[str, Any] = {"hook_point_in": IN, "hook_point_out": OUT}
SAME: dict[str, Any] = {"hook_point_in": OUT, "hook_point_out": OUT}
READS = [f"blocks.{i}.ln2.hook_normalized" for i in range(PARTS)]
WRITES = [f"blocks.{i}.hook_mlp_out" for i in range(PARTS)]
LAYERS: dict[str, Any] = {"hook_points_in": READS, "hook_points_out": WRITES}
HEADS: dict[str, Any] = {"hook_points": WRITES[:2]}
HEAD: dict[str, Any] = {**PAIR, "n_qk_heads": 2, "d_qk_head": 4, "rotary_dim": 4, "n_ctx": 6}
RANKS: dict[str, Any] = {**PAIR, "rank_counts": {3: 3, 1: 6, 2: 3}}
NTK: dict[str, Any] = {
    "use_NTK_by_parts_rope": True,
    "NTK_by_parts_factor": 8.0,
    "NTK_by_parts_high_freq_factor": 4.0,
    "old_context_len": 64,
}

# name: (config class, act_fn, norm_activation, sparsity_include_decoder_norm, the rest)
CASES: dict[str, tuple[Any, str, str, bool, dict[str, Any]]] = {
    "sae-relu-dataset": (SAEConfig, "relu", "dataset-wise", True, SAME),
    "sae-relu-token": (SAEConfig, "relu", "token-wise", True, SAME),
    "sae-relu-unbiased": (SAEConfig, "relu", "dataset-wise", False, {**SAME, "use_decoder_bias": False}),
    "sae-jumprelu-inference-plain": (SAEConfig, "jumprelu", "inference", False, SAME),
    "sae-jumprelu-batch": (SAEConfig, "jumprelu", "batch-wise", True, SAME),
    "sae-jumprelu-bfloat16": (SAEConfig, "jumprelu", "dataset-wise", True, SAME),
    "sae-topk-inference-plain-pt": (SAEConfig, "topk", "inference", False, SAME),
    "sae-topk-token": (SAEConfig, "topk", "token-wise", True, SAME),
    "sae-batchtopk-dataset": (SAEConfig, "batchtopk", "dataset-wise", True, SAME),
    "transcoder-jumprelu-dataset": (SAEConfig, "jumprelu", "dataset-wise", True, PAIR),
    "transcoder-jumprelu-dataset-plain": (SAEConfig, "jumprelu", "dataset-wise", False, PAIR),
    "transcoder-jumprelu-token": (SAEConfig, "jumprelu", "token-wise", True, PAIR),
    "transcoder-jumprelu-folded": (SAEConfig, "jumprelu", "dataset-wise", True, PAIR),
    "transcoder-topk-dataset": (SAEConfig, "topk", "dataset-wise", True, PAIR),
    "clt-relu-dataset": (CLTConfig, "relu", "dataset-wise", True, LAYERS),
    "clt-jumprelu-dataset": (CLTConfig, "jumprelu", "dataset-wise", True, LAYERS),
    "clt-jumprelu-folded": (CLTConfig, "jumprelu", "dataset-wise", True, LAYERS),
    "clt-topk-inference": (CLTConfig, "topk", "inference", True, LAYERS),
    "clt-batchlayertopk-dataset-plain": (CLTConfig, "batchlayertopk", "dataset-wise", False, LAYERS),
    "crosscoder-relu-dataset": (CrosscoderConfig, "relu", "dataset-wise", True, HEADS),
    "crosscoder-jumprelu-inference": (CrosscoderConfig, "jumprelu", "inference", True, HEADS),
    "lorsa-topk-dataset": (LorsaConfig, "topk", "dataset-wise", True, {**HEAD, "rotary_dim": 2}),
    "lorsa-relu-norms": (LorsaConfig, "relu", "inference", False, {**HEAD, "positional_embedding_type": "none", "use_post_qk_ln": True, "normalization_type": "RMS"}),
    "lorsa-jumprelu-turns": (LorsaConfig, "jumprelu", "dataset-wise", False, {**HEAD, **NTK, "rotary_adjacent_pairs": False, "attn_scale": 1.5}),
    "lorsa-jumprelu-folded": (LorsaConfig, "jumprelu", "dataset-wise", True, HEAD),
    "molt-relu-dataset": (MOLTConfig, "relu", "dataset-wise", True, RANKS),
    "molt-jumprelu-dataset": (MOLTConfig, "jumprelu", "dataset-wise", True, RANKS),
    "molt-topk-inference": (MOLTConfig, "topk", "inference", True, RANKS),
}  # fmt: skip


def norms(hooks: list[str]) -> dict[str, float]:
    """Mean norms of what lies at hook points: different for each, and far from sqrt(d)."""
    return {hook: 9.0 / (1.5 + i) for i, hook in enumerate(dict.fromkeys(hooks))}


def made(name: str, seed: int) -> SparseDictionary:
    """A dictionary of the peer's own class, with random weights whose features write vectors of very different norms."""
    kind, act, mode, include, rest = CASES[name]
    config = kind(
        d_model=D, expansion_factor=F / D, act_fn=act, norm_activation=mode, sparsity_include_decoder_norm=include,
        top_k=K * PARTS if act == "batchlayertopk" else K, **rest,
    )  # fmt: skip
    model, g = SparseDictionary.from_config(config), torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        size = 0.3 if parameter.ndim == 1 else D**-0.5
        parameter.copy_(size * torch.randn(parameter.shape, generator=g))
        if key.startswith(("W_D", "W_O", "U_matrices")):
            rows = (
                parameter.shape[0]
                if key.startswith(("W_O", "U")) or parameter.ndim == 2
                else parameter.shape[1]
            )
            sizes = 0.3 + 2 * torch.rand(rows, generator=g)
            at = 1 if key.startswith("W_D") and parameter.ndim == 3 else 0
            parameter.mul_(sizes.view([-1 if i == at else 1 for i in range(parameter.ndim)]))
        if key.endswith("log_jumprelu_threshold"):
            parameter.copy_(torch.rand(parameter.shape, generator=g) - (1.5 if kind is LorsaConfig else 0.5))
        if key in ("ln_q.w", "ln_k.w"):
            parameter.copy_(1 + 0.3 * parameter[:1].clone().expand_as(parameter))
    if mode == "dataset-wise":
        model.set_dataset_average_activation_norm(norms(config.associated_hook_points))
    return model


def ran(model: SparseDictionary, x: Tensor) -> dict[str, Tensor]:
    """Codes and outputs of raw inputs."""
    c = model.cfg
    side = len(c.hooks_in)
    parts = x.split(c.d_model, -1)
    batch, factors = model.normalize_activations(
        dict(zip(c.hooks_in, parts, strict=True)), return_scale_factor=True
    )
    read, encoder, decoder = model.prepare_input(batch)
    codes = model.encode(read, **encoder)
    out = model.decode(codes, **decoder)
    if c.sae_type == "clt":
        out = out.transpose(0, 1)
    if side > 1:
        out = out.reshape(*x.shape[:-1], side, c.d_model)
    own = {hook: factors[hook] for hook in c.hooks_out if hook in factors}
    if c.norm_activation in ("dataset-wise", "inference"):
        own = {hook: model.compute_norm_factor(x, hook) for hook in c.hooks_out}
    raw = [out if side == 1 else out[..., i, :] for i in range(side)]
    out = torch.cat([part / own.get(hook, 1.0) for part, hook in zip(raw, c.hooks_out, strict=True)], -1)
    result = {"codes": codes.flatten(2 if c.sae_type == "lorsa" else 1), "out": out}
    if c.act_fn.startswith("batch"):
        norm = model.decoder_norm() if c.sparsity_include_decoder_norm else torch.ones(())
        compared = codes * norm
        result["threshold"] = compared[compared > 0].min() * (1 - 1e-5)
    return result


def rows(model: SparseDictionary, seed: int) -> Tensor:
    """Raw inputs, of mean 3 and standard deviation 1."""
    if model.cfg.sae_type == "lorsa":
        return inputs(D, 12, seed).view(2, 6, D) / 3
    return inputs(D * len(model.cfg.hooks_in), ROWS, seed)


def write(folder: Path) -> None:
    """All cases, by the peer's own ``save_pretrained``."""
    for seed, name in enumerate(CASES):
        model, here = made(name, seed), folder / name
        here.mkdir(parents=True)
        x = rows(model, seed)
        beside = {"x": x}
        if name.endswith("folded"):  # what it was in training
            beside |= {f"trained.{key}": value for key, value in ran(model, x).items()}
        if name.endswith("bfloat16"):
            model.cfg.dtype = torch.bfloat16
            model.to(torch.bfloat16)
        model.save_pretrained(here, fold_activation_scale=name.endswith("folded"))
        model.cfg.save_hyperparameters(here)
        if name.endswith("pt"):
            (here / "sae_weights.safetensors").unlink()
            model.save_checkpoint(here / "sae_weights.pt")
        beside |= ran(reopened(here), x)
        if "batch-wise" in model.cfg.norm_activation:
            beside["norm"] = x.norm(dim=-1).mean()
        save_file({key: value.contiguous() for key, value in beside.items()}, folder / f"{name}.safetensors")


def reopened(folder: Path) -> Any:
    """What the peer's own reader makes of a folder, in fp32."""
    return SparseDictionary.from_pretrained(str(folder))


def reopen(folder: Path) -> None:
    """Codes and outputs of the files that are there."""
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        beside = folder / f"{case.name}.safetensors"
        x = load_file(beside)["x"]
        found = {key: value.contiguous() for key, value in ran(reopened(case), x).items()}
        save_file({"x": x, **found}, beside)


if __name__ == "__main__":
    modes: dict[str, Callable[[Path], None]] = {"write": write, "open": reopen}
    with torch.no_grad():
        modes[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"cases": len(CASES)}))
