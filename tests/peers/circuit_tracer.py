"""circuit-tracer 0.5.0: its transcoder sets and cross-layer transcoders, by its own code. See golden.py for how to run it.

A row is the layers side by side, and so are codes and outputs. Its files hold no ``config.yaml`` of their own, so that
is written here as its documentation has it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # last, so that the package of this file's name is found first

import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)
from golden import inputs

D, F, LAYERS, ROWS = 6, 12, 3, 6
CPU = torch.device("cpu")
CASES = ("set-relu", "set-jumprelu", "set-skip", "set-bfloat16", "clt-relu", "clt-jumprelu")


def drawn(module: torch.nn.Module, seed: int) -> None:
    """Random weights; some thresholds are below 0, where the peer lets negative codes through."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        size = 0.3 if parameter.ndim < 2 or "threshold" in name else D**-0.5
        parameter.copy_(size * torch.randn(parameter.shape, generator=g))


def transcoder(layer: int, jumps: bool, skip: bool) -> SingleLayerTranscoder:
    """One of a set."""
    rule = JumpReLU(torch.zeros(F)) if jumps else torch.nn.functional.relu
    return SingleLayerTranscoder(D, F, rule, layer, skip_connection=skip, device=CPU, dtype=torch.float32)


def write(folder: Path) -> None:
    """All cases, by the peer's own ``to_safetensors``."""
    for seed, case in enumerate(CASES):
        here, jumps = folder / case, "jumprelu" in case
        here.mkdir(parents=True)
        kind, model = "transcoder_set", None
        if case.startswith("set"):
            model = TranscoderSet(
                {i: transcoder(i, jumps, "skip" in case) for i in range(LAYERS)},
                "ln2.hook_normalized",
                "hook_mlp_out",
            )
        else:
            kind = "cross_layer_transcoder"
            model = CrossLayerTranscoder(
                LAYERS,
                F,
                D,
                "jump_relu" if jumps else "relu",
                lazy_decoder=False,
                device=CPU,
                dtype=torch.float32,
            )
        drawn(model, seed)
        if "bfloat16" in case:
            model.to(torch.bfloat16)
        model.to_safetensors(str(here))
        config: dict[str, Any] = {
            "model_name": "toy", "model_kind": kind, "feature_input_hook": "ln2.hook_normalized",
            "feature_output_hook": "hook_mlp_out", "scan": "toy",
        }  # fmt: skip
        (here / "config.yaml").write_text(yaml.safe_dump(config))
        x = inputs(D * LAYERS, ROWS, seed)
        save_file({"x": x, **ran(here, x)}, folder / f"{case}.safetensors")


def ran(folder: Path, x: Tensor) -> dict[str, Tensor]:
    """Codes and outputs of what the peer's own readers make of a folder, in fp32."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    hooks: dict[str, Any] = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    how: dict[str, Any] = {
        **hooks,
        "scan": config["scan"],
        "device": CPU,
        "dtype": torch.float32,
        "lazy_decoder": False,
    }
    if config["model_kind"] == "transcoder_set":
        paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(len(list(folder.glob("layer_*"))))}
        model = load_transcoder_set(paths, lazy_encoder=False, **how)
    else:
        model = load_clt(str(folder), **how)
    layers = x.view(len(x), -1, D).transpose(0, 1)
    codes = model.encode(layers)
    if config["model_kind"] == "transcoder_set":
        out = model.decode(codes, layers)
    else:
        out = model.decode(codes.to_sparse(), layers)
        silent = model.b_dec[:, None].expand(-1, len(x) - out.shape[1], -1)
        out = torch.cat([out, silent], 1)  # it leaves out rows after the last with a feature
    return {k: v.transpose(0, 1).flatten(1).contiguous() for k, v in (("codes", codes), ("out", out))}


def reopen(folder: Path) -> None:
    """Codes and outputs of the files that are there."""
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        beside = folder / f"{case.name}.safetensors"
        x = load_file(beside)["x"]
        save_file({"x": x, **ran(case, x)}, beside)


if __name__ == "__main__":
    with torch.no_grad():
        {"write": write, "open": reopen}[sys.argv[1]](Path(sys.argv[2]))
