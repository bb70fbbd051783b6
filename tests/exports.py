"""Dictionaries of every architecture and normalisation, which formats can say them, and peers that read and write.

For the tests of formats and for the table of pairs (peers/table.py).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saekit
from saekit.dictionaries import Dictionary

HERE = Path(__file__).parent
PEERS = HERE / "peers"
_spec = importlib.util.spec_from_file_location("peers_golden", PEERS / "golden.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
D, F, K, ROWS, inputs = golden.D, golden.F, golden.K, golden.ROWS, golden.inputs

NORMALISE = ("none", "centre", "scale", "whiten", "row_std", "row_norm")
DTYPES = ("float32", "bfloat16", "float16")
# preset, its options, and the rule that it comes down to at inference
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "relu": ("relu", {}, "relu"),
    "p_annealing": ("p_annealing", {}, "relu"),
    "topk": ("topk", {"k": K}, "topk"),
    "topk_linear": ("topk", {"k": K, "relu": False}, "linear"),
    "abstopk": ("abstopk", {"k": K}, "abstopk"),
    "groupmax": ("groupmax", {"k": K}, "groupmax"),
    "batchtopk": ("batchtopk", {"k": K}, "jumprelu"),
    "matryoshka": ("matryoshka", {"k": K, "prefixes": (8, 24)}, "jumprelu"),
    "jumprelu": ("jumprelu", {}, "jumprelu"),
    "gated": ("gated", {}, "jumprelu"),
    "pursuit": ("matching_pursuit", {"k": K}, "pursuit"),
    **{
        f"{'skip_' * skip}transcoder_{rule}": (
            "transcoder",
            {"selection": rule, "skip": skip, **({"k": K} if rule in ("topk", "groupmax") else {})},
            rule,
        )
        for rule in ("relu", "topk", "groupmax", "jumprelu")
        for skip in (False, True)
    },
    "narrow_transcoder": ("transcoder", {"selection": "jumprelu", "d_out": 6}, "jumprelu"),
    "narrow_transcoder_topk": ("transcoder", {"k": K, "d_out": 6}, "topk"),
}
OBJECTIVE = {"relu": ("reconstruction", "l1"), "jumprelu": ("reconstruction", "l0")}
RULES = {
    "dictionary_learning": ("relu", "topk", "jumprelu"), "sparsify": ("topk", "groupmax"),
    "gemma_scope": ("relu", "jumprelu"), "gemma_scope_2": ("relu", "jumprelu"), "openai": ("relu", "topk", "linear"),
}  # fmt: skip
# the script that reads what each format's writer writes, and the variable that names its environment's python
SCRIPTS = {
    "dictionary_learning": ("dictionary_learning", "SAEKIT_PEERS2"), "sparsify": ("sparsify", "SAEKIT_PEERS2"),
    "overcomplete": ("overcomplete", "SAEKIT_PEERS2"), "saelens": ("saelens", "SAEKIT_PEERS"),
    "gemma_scope": ("documented", None), "gemma_scope_2": ("documented", None), "openai": ("documented", None),
    "llama_scope": ("documented", None), "bare": ("documented", None),
}  # fmt: skip
RANKED = ("topk", "topk-batchnorm", "topk-multiplier", "topk-tied", "topk-untied", "pursuit", "bare-qwen_scope", "bare-qwen_scope-square")  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {  # what files don't say, by the name of the case
    **{case: {"k": K} for case in RANKED},
    "batchtopk": {"threshold": 0.75}, "archetypal-topk": {"k": K, "delta": 1.0}, "archetypal-jump": {"delta": 1.0},
}  # fmt: skip
GOLDEN = HERE / "golden"
FAMILIES = ("dictionary_learning", "sparsify", "overcomplete", "documented")
CASES = [f"{family}/{case.name}" for family in FAMILIES for case in sorted((GOLDEN / family).iterdir()) if case.is_dir()]  # fmt: skip
CLOSE = 1e-5  # of codes, and of outputs as a share of the largest


def family_of(case: str) -> str:
    """The format of a golden."""
    family, name = case.split("/")
    return name.split("-")[0] if family == "documented" else family


def folder_of(case: str) -> tuple[Path, str]:
    """The folder of a golden's family, and its name there."""
    family, name = case.split("/")
    return GOLDEN / family, name


def loaded(case: str, **options: Any) -> Dictionary:
    """A golden, read by what is in it."""
    folder, name = folder_of(case)
    return saekit.load(folder / name, **{**OPTIONS.get(name, {}), **options})


def edited(case: str, tmp_path: Path, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a golden with a changed file: the content of JSON, or the tensors."""
    folder, name = folder_of(case)
    out = tmp_path / "edited"
    shutil.copytree(folder / name, out)
    at = next(p for p in sorted(out.rglob("*")) if p.name == file)
    if at.suffix == ".json":
        content = json.loads(at.read_text())
        at.write_text(json.dumps(change(content) or content))
    elif at.suffix == ".safetensors":
        state = load_file(at)
        save_file(change(state) or state, at)
    elif at.suffix == ".npz":
        with np.load(at) as arrays:
            state = dict(arrays)
        np.savez(at, **(change(state) or state))
    else:
        state = torch.load(at, weights_only=True)
        torch.save(change(state) or state, at)
    return out


def without(name: str) -> Callable[[dict], Any]:
    """A change that leaves an entry out."""
    return lambda content: {key: value for key, value in content.items() if key != name}


def setting(name: str, value: Any) -> Callable[[dict], Any]:
    """A change that sets an entry."""
    return lambda content: content | {name: value}


@torch.no_grad()
def made(architecture: str, normalise: str, seed: int = 0) -> Dictionary:
    """A dictionary with random weights, biases and thresholds, and the normalisation of rows far off zero."""
    preset, options, _ = ARCHITECTURES[architecture]
    if preset == "transcoder":
        options = {
            "d_out": D,
            "objective": OBJECTIVE.get(options.get("selection", ""), ("reconstruction",)),
        } | options
    d = saekit.create(preset, d_in=D, n_features=F, seed=seed, normalise=normalise, **options)
    g = torch.Generator().manual_seed(seed + 1)
    rows = inputs(rows=256, seed=seed)
    d.set_normalisation(
        rows if preset != "transcoder" else torch.cat([rows, inputs(d.d_out, 256, seed + 2)], 1)
    )
    for value in d.parameters():
        # a pursuit has no biases, and atoms of norm 1
        if value.requires_grad and not (preset == "matching_pursuit" and value.ndim == 2):
            scale = D**-0.5 if value.ndim == 2 else 0.3
            value.copy_(scale * torch.randn(value.shape, generator=g))
    if hasattr(d.selection, "threshold"):
        threshold = d.selection.threshold
        threshold.copy_(0.3 + 0.3 * torch.rand(threshold.shape, generator=g))
    d.after_step()
    d.prepared.fill_(True)
    site = (
        ("model.layers.3.mlp:in", "model.layers.3.mlp:out")
        if preset == "transcoder"
        else ("blocks.3.hook_resid_post",) * 2
    )
    d.reads, d.writes = site[:1], site[1:]
    return d.eval()


def says(format: str, architecture: str, normalise: str) -> bool:
    """Whether a format has words for a dictionary; of the rest it says why not."""
    preset, options, rule = ARCHITECTURES[architecture]
    transcodes, by_row = preset == "transcoder", normalise.startswith("row_")
    if rule not in RULES[format] or (transcodes and format in ("dictionary_learning", "openai")):
        return False
    if format == "openai":
        return normalise == "row_std" if rule != "relu" else not by_row
    wide = options.get("d_out", D) != D
    return (
        not by_row
        and not (format == "sparsify" and wide)
        and not (format == "gemma_scope" and options.get("skip"))
    )


# what a format refuses for its architecture is tried with one normalisation
PAIRS = [(f, a, n) for f in RULES for a in ARCHITECTURES for n in NORMALISE if n == "scale" or any(says(f, a, m) for m in NORMALISE)]  # fmt: skip


def untold(format: str, d: Dictionary) -> dict[str, str]:
    """Options that a format's reader needs to know where a dictionary reads and writes."""
    if format not in ("gemma_scope", "openai"):
        return {}
    return {"hook_point": d.reads[0], **({"hook_point_out": d.writes[0]} if d.writes != d.reads else {})}


def exported(format: str, folder: Path, everything: bool) -> dict[str, Dictionary]:
    """Every architecture that a format has words for, by the names of the cases.

    With each normalisation in each dtype, or with one of both by turns.
    """
    out: dict[str, Dictionary] = {}
    for i, architecture in enumerate(ARCHITECTURES):
        ways = [n for n in NORMALISE if says(format, architecture, n)]
        dtypes = ("float32",) if format == "gemma_scope" else DTYPES
        pairs = list(product(ways, dtypes))
        for normalise, dtype in pairs if everything or not pairs else [pairs[5 * i % len(pairs)]]:
            case = f"{architecture}-{normalise}-{dtype}"
            options = {} if format == "gemma_scope" else {"dtype": dtype}
            out[case] = made(architecture, normalise, seed=i)
            saekit.save(out[case], folder / case, format=format, **options)
            given(folder, case, seed=i)
    return out


def label_of(case: str) -> str:
    """The architecture of a case: its name without normalisation, dtype or checkpoint's scale."""
    beside = (*DTYPES, *NORMALISE, "float64", "layer_norm", "constant_norm_rescale")
    return "-".join(part for part in case.split("-") if part not in beside)


def run(script: str, mode: str, folder: Path, *more: str, python: str | None = None) -> None:
    """Let a script of peers/ write or open the cases of a folder; see golden.py."""
    command = [python or sys.executable, "-P", str(PEERS / f"{script}.py"), mode, str(folder), *more]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def given(folder: Path, case: str, seed: int = 0) -> None:
    """The inputs of a case, for the peer that will open it."""
    save_file({"x": inputs(seed=seed)}, folder / f"{case}.safetensors")


@torch.no_grad()
def difference(d: Dictionary, held: Mapping[str, Tensor]) -> tuple[float, float, bool]:
    """Largest difference of codes and of outputs (as a share of the largest output), and whether supports are the same."""
    codes = d.encode(held["x"])
    dense, out = codes.to_dense(), d.decode(codes, held["x"])
    return (
        float((dense - held["codes"]).abs().max()),
        float((out - held["out"]).abs().max() / held["out"].abs().max()),
        torch.equal(dense != 0, held["codes"] != 0),
    )


def held(folder: Path, case: str) -> dict[str, Tensor]:
    """Inputs, and a peer's codes and outputs."""
    return load_file(folder / f"{case}.safetensors")
