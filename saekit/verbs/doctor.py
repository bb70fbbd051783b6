"""``saekit doctor``: the environment, the backends, and what a file or folder contains."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Json, result

PACKAGES = ("torch", "numpy", "numba", "triton", "transformers", "transformer-lens", "datasets", "safetensors", "huggingface_hub", "wandb", "plotly")  # fmt: skip


def doctor(
    path: Annotated[
        str | None,
        typer.Argument(
            help="A store, a dictionary of any known format (also hf://owner/repo/name), a run, a graph, or a file of tensors."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine offers, or what a file contains and whether it is intact.

    Example: `saekit doctor acts`
    """
    from saekit.hub import remote

    if path is not None and path.startswith(remote.SCHEME):
        path = str(remote.fetch(path, None))
    data = environment() if path is None else explain(Path(path))
    width = max(len(key) for key in data)
    result(data, as_json, "\n".join(f"{key:{width}}  {_text(value)}" for key, value in data.items()))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def environment() -> dict[str, Any]:
    """Versions, devices, memory, disk, and which kernel backend runs and why."""
    import torch

    from saekit.kernels.backend import explain, matrix_unit

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pairs = [("cpu", torch.float32), ("cpu", torch.float64)]
    pairs += [("cuda", torch.float32)] if cuda else []
    return {
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "packages": versions,
        "threads": torch.get_num_threads(),
        "memory": f"{memory / 1e9:.1f} GB",
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here",
        "gpu": cuda or "none",
        "bf16 matrix unit": "yes: products shortlist in bf16" if matrix_unit() else "no: products in fp32",
        "kernels": [
            f"{device} {str(dtype).removeprefix('torch.')}: {' - '.join(explain(device, dtype))}"
            for device, dtype in pairs
        ],
        "network": "off (HF_HUB_OFFLINE)"
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
        else "allowed",
    }


def explain(path: Path) -> dict[str, Any]:
    """What a path holds; raises in one sentence when it is damaged or unknown."""
    from saekit.hub.tensors import PICKLED

    if (path / "manifest.json").is_file():
        return _store(path)
    if (path / "card.json").is_file():
        return _dictionary(path)
    if (path / "graph.json").is_file():
        return _graph(path)
    if path.suffix == ".json" and path.is_file():
        return _json(path)
    foreign = _foreign(path) if path.exists() else None
    if foreign is not None:
        return foreign
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return _run(path)
    if path.is_file() and path.suffix in (".safetensors", ".npz", *PICKLED):
        return _tensors(path)
    if path.is_dir():
        _look_inside(path)
    raise SaekitError(f"path {str(path)!r} is {KNOWN}")


KNOWN = "no store, dictionary, run, graph, steering, explanations or safetensors file; give one of these"


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file is, by its fields."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SaekitError(
            f"file {str(path)!r} is no JSON ({error}): it was cut, or is something else"
        ) from None
    named = set(data) if isinstance(data, dict) else set()
    if "nodes" in named:
        return _graph(path)
    if named == {"schema", "about", "features"}:
        return _explanations(path)
    if {"schema", "dictionaries"} <= named:
        return _steering(path)
    beside = path.parent
    if (
        path.name in ("card.json", "config.json", "manifest.json", "eval.json", "graph.json")
        and (beside / "card.json").is_file()
    ):
        return explain(beside)
    raise SaekitError(f"path {str(path)!r} is {KNOWN}")


def _explanations(path: Path) -> dict[str, Any]:
    from saekit.autointerp.explanation import load
    from saekit.autointerp.scoring import summaries

    listed, about = load(path)
    methods = sorted({one.method for one in listed})
    return {
        "explanations": str(path), "of dictionary": about.get("dictionary", "not stated"), "model": about.get("model", "not stated"),
        "features": len({one.feature for one in listed}), "by": methods,
        **{one.scorer: f"{one.metric} {one.value:.3f} over {one.n} features" for one in summaries(listed) if one.value is not None},
    }  # fmt: skip


def _steering(path: Path) -> dict[str, Any]:
    from saekit.steer import Steering

    found = Steering.load(path)
    return {"steering": str(path), **{f"dictionary {part.digest}": f"{len(part.edits)} edits at {', '.join(part.writes)}" for part in found.parts}}  # fmt: skip


def _graph(path: Path) -> dict[str, Any]:
    from saekit.graph.files import load_graph

    graph = load_graph(path)
    scores = graph.scores() if len(graph.present) == 1 else None
    return {
        "graph": str(path), "of": graph.title, "model": graph.about.get("model", "unknown"), "dictionaries": list(graph.stands),
        "nodes": len(graph.nodes), "edges": int(graph.rows.nnz), "targets": [graph.output(i) for i in range(len(graph.targets))],
        "closure": graph.check(),
        **({} if scores is None else {"replacement": round(scores.replacement, 4), "completeness": round(scores.completeness, 4)}),
    }  # fmt: skip


def _store(path: Path) -> dict[str, Any]:
    from saekit.activations import Store

    store = Store(path, verify_seconds=float("inf"))
    m = store.manifest
    shards = m["shards"]
    return {
        "store": str(path), "complete": m["complete"], "model": m["model"], "text": m["text"], "dtype": m["dtype"],
        "hook points": {name: f"width {site['width']} ({site['module']}:{site['side']})" for name, site in m["hook_points"].items()},
        "rows": f"{store.n_rows:,} unmasked of {sum(s['tokens'] for s in shards):,} tokens in sequences of {m['seq']}",
        "shards": f"{len(shards)}, {sum(s['bytes'] for s in shards) / 1e6:,.0f} MB, every hash verified",
        "finite": "yes" if not any(n for s in shards for n in s["nonfinite"].values()) else {s["file"]: s["nonfinite"] for s in shards if any(s["nonfinite"].values())},
    }  # fmt: skip


def _dictionary(path: Path) -> dict[str, Any]:
    from saekit.activations import file_sha256
    from saekit.hub import native

    dictionary, card = native.load(path), native.read_card(path)
    intact = file_sha256(path / native.WEIGHTS) == card["sha256"]
    config = card["config"]
    return {
        "dictionary": str(path), "n_features": config["n_features"],
        **{choice: config[choice] for choice in ("wiring", "selection", "atoms")},
        "objective": [term["name"] for term in config["objective"]],
        "reads": list(dictionary.reads), "writes": list(dictionary.writes), "normalised": bool(dictionary.normalised),
        "tensors": {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in dictionary.state_dict().items()},
        "hash": "matches the card" if intact else "DIFFERS from the card: the weights were changed after saving",
        "data": card.get("data", "not stated"),
    }  # fmt: skip


def _foreign(path: Path) -> dict[str, Any] | None:
    """A dictionary of another tool's format; None where it is of none."""
    from saekit.hub import load
    from saekit.hub.files import Files
    from saekit.hub.formats import FORMATS

    files = Files(path)
    found = [name for name in FORMATS if FORMATS[name].detect(files)]
    if not found:
        return None
    if len(found) > 1:
        return {"dictionary": str(path), "formats that it may be of": found}
    d = load(path, found[0])
    config, imported = d.config.to_json(), d.card.get("imported", {})
    return {
        "dictionary": str(path), "format": found[0], "dtype": imported.get("dtype", "not stated"), "n_features": d.n_features,
        **{choice: config[choice] for choice in ("wiring", "selection")},
        "reads": list(d.reads), "writes": list(d.writes), "folded by saekit": imported.get("folded", []),
        "not in the files": imported.get("missing", []), "data": d.card.get("data", "not stated"),
    }  # fmt: skip


def _look_inside(path: Path) -> None:
    """Raise with the dictionaries that are in a folder, or what else is."""
    from saekit.hub.files import Files
    from saekit.hub.formats import detected

    detected(Files(path))


def _run(path: Path) -> dict[str, Any]:
    from saekit.trainers import read_config
    from saekit.trainers.checkpoint import latest

    config = read_config(path / "config.json")
    found = latest(path / "checkpoints")
    step = found[1]["step"] if found else 0
    return {
        "run": str(path),
        "finished": False,
        "newest intact checkpoint": f"step {step} of {config['train'].get('steps', '?')}",
        "train": config["train"],
    }


def _tensors(path: Path) -> dict[str, Any]:
    from saekit.hub.files import Files

    heads = Files(path.parent).heads(path.name)
    return {
        "file": str(path),
        "of a dictionary": "not by itself; if it is one, give the folder that it lies in, or load it with format=",
        **{
            name: f"{str(head.dtype).removeprefix('torch.')} {tuple(head.shape)}"
            for name, head in heads.items()
        },
    }
