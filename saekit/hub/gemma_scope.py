"""Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors``): JumpReLU, with nothing taken off the input.

* 1: float32 ``W_enc`` [d_in, F], ``W_dec`` [F, d_out], ``b_enc``, ``b_dec``, ``threshold`` [F]. What it reads stands in
  the path alone: ``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``. Attention's is the output of all heads
  side by side; a transcoder reads what Gemma's norm before the MLP makes, with the norm's weight in it. ``embedding``
  is trained on rows before Gemma multiplies them with ``sqrt(d)`` and read after it, so codes are of ``x / sqrt(d)``
  and the whole output is multiplied (SAELens leaves b_dec as it is there).
* 2: ``w_enc``, ``w_dec``, biases and thresholds likewise, with ``affine_skip_connection`` **[d_in, d_out]** in some
  transcoders, and ``config.json``: ``architecture`` "jump_relu", ``hf_hook_point_in`` and ``_out``. Where it is missing,
  the folder's name says what it may. Cross-layer transcoders, whose ``w_dec`` has a dimension for layers, are refused.
"""

import io
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary
from saekit.hub.written import as_json, as_safetensors, stored, write
from saekit.types import SaekitError

FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"
SELECTIONS = ("relu", "jumprelu")
SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
# what folders of the second generation are called, and what is read and written there, in a layer of Gemma 3
PLACES = {
    "resid_post": ("output", None), "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}  # fmt: skip


def _only(files: Files, name: str) -> Files | None:
    """The folder of the only file of this name, if there is one, and it has an encoder."""
    found = [n for n in files.names() if Path(n).name == name]
    if len(found) != 1:
        return None
    here = files.at(found[0].removesuffix(name).rstrip("/"))
    return here if "w_enc" in {key.lower() for key in here.heads(name)} else None


def _read(files: Files, name: str) -> tuple[Files, dict[str, Any], dict[str, Tensor]]:
    """The folder, the fields of a record that all have, and what the file holds beside them."""
    here = _only(files, name)
    if here is None:
        raise SaekitError(
            f"{str(files)!r} holds no single {name} with the tensor 'W_enc'; give the folder of one dictionary"
        )
    state = {key.lower(): value for key, value in here.tensors(name).items()}
    lacks = [key for key in ("w_dec", "b_enc", "b_dec", "threshold") if key not in state]
    if lacks:
        raise SaekitError(f"file {str(here.root / name)!r} lacks the tensor {lacks[0]!r}; take an intact one")
    if state["w_dec"].ndim == 3:
        raise SaekitError(
            f"file {str(here.root / name)!r} is one layer of a cross-layer transcoder, which writes {state['w_dec'].shape[1]} layers; this format's reader has transcoders of one layer only"
        )
    own = {
        "encoder": state.pop("w_enc").T, "atoms": state.pop("w_dec"), "b_enc": state.pop("b_enc"),
        "b_dec": state.pop("b_dec"), "threshold": state.pop("threshold"),
    }  # fmt: skip
    return here, own, state


def detect(files: Files) -> bool:
    """One ``params.npz`` with an encoder."""
    return _only(files, FIRST) is not None


def load(files: Files, *, hook_point: str | None = None, hook_point_out: str | None = None) -> Dictionary:
    """A dictionary of Gemma Scope 1; with ``hook_point_out``, or in a repository of them, it is a transcoder."""
    here, own, more = _read(files, FIRST)
    scaling = more.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise SaekitError(
            f"file {str(here.root / FIRST)!r} has a scaling_factor other than 1, which no documented one has; take another"
        )
    path = here.root.resolve().as_posix()
    repo = re.search(r"gemma-scope-(\d+b-(?:pt|it))-(res|mlp|att|transcoders)(?=[/-]|$)", path)
    layer = re.search(r"layer_(\d+)", path.rpartition("gemma-scope")[2])
    embedding = "/embedding" in path.rpartition("gemma-scope")[2]
    read, written = hook_point, hook_point_out
    if repo and embedding:
        read = read or "hook_embed"
    elif repo and layer:
        transcodes = repo[2] == "transcoders"
        read = read or f"blocks.{layer[1]}.{'ln2.hook_normalized' if transcodes else SITES[repo[2]]}"
        written = written or (f"blocks.{layer[1]}.hook_mlp_out" if transcodes else None)
    size = 1 / math.sqrt(own["encoder"].shape[1]) if embedding else 1.0
    card = about(
        "gemma_scope", "float32", model=f"google/gemma-2-{repo[1].removesuffix('-pt')}" if repo else None,
        missing=() if read else ("the hook point",),
    )  # fmt: skip
    return _dictionary(own, read, written, card, scale_in=size, scale_out=size)


def _dictionary(
    own: dict[str, Any], read: str | None, written: str | None, card: dict[str, Any], **more: Any
) -> Dictionary:
    transcodes = written is not None or own["encoder"].shape[1] != own["atoms"].shape[1] or "skip" in more
    written = written if transcodes else read
    return to_dictionary(
        Record(
            **own, selection="jumprelu", wiring="transcoder" if transcodes else "autoencoder", card=card,
            reads=(read,) if read else (), writes=(written,) if written else (), **more,
        )
    )  # fmt: skip


def _mine(dictionary: Dictionary, target: str, skip: bool) -> tuple[Record, Tensor]:
    """A record that the format can say, and its thresholds: ReLU is one of 0."""
    record = from_dictionary(dictionary, target)
    refuse_unless(record, target, selections=SELECTIONS, skip=skip)
    return record, torch.zeros_like(record.b_enc) if record.threshold is None else record.threshold


def save(dictionary: Dictionary, folder: "str | Path") -> Path:
    """Write ``params.npz`` in float32. What is read and written only the folder's path can say."""
    import numpy as np

    record, threshold = _mine(dictionary, "gemma_scope", skip=False)
    arrays = {
        "W_enc": record.encoder.T, "W_dec": record.atoms, "b_enc": record.b_enc, "b_dec": record.b_dec, "threshold": threshold,
    }  # fmt: skip
    buffer = io.BytesIO()
    held: dict[str, Any] = {name: value.numpy() for name, value in stored(arrays, "float32").items()}
    np.savez(buffer, **held)
    return write(folder, {FIRST: buffer.getvalue()})


def detect_second(files: Files) -> bool:
    """One ``params.safetensors`` with an encoder."""
    return _only(files, SECOND) is not None


def load_second(
    files: Files, *, hook_point: str | None = None, hook_point_out: str | None = None
) -> Dictionary:
    """A dictionary of Gemma Scope 2; the hook points are those of its config, or of the folder's name."""
    here, own, more = _read(files, SECOND)
    config = here.json(CONFIG) if here.has(CONFIG) else _guessed(here.root.resolve().as_posix())
    if not isinstance(config, dict) or config.get("architecture", "jump_relu") != "jump_relu":
        raise SaekitError(
            f"architecture of {str(here.root / CONFIG)!r} is not 'jump_relu', which is all that Gemma Scope 2 has; take an intact folder"
        )
    skip = more.get("affine_skip_connection")
    if skip is None and config.get("affine_connection"):
        raise SaekitError(
            f"file {str(here.root / SECOND)!r} lacks the tensor 'affine_skip_connection', and its config says that there is one; take an intact folder"
        )
    read = hook_point or _place(config.get("hf_hook_point_in"))
    written = hook_point_out or _place(config.get("hf_hook_point_out"))
    card = about(
        "gemma_scope_2", str(own["encoder"].dtype).removeprefix("torch."), model=config.get("model_name"),
        metadata=config, missing=() if read else ("the hook point",),
    )  # fmt: skip
    extra = {} if skip is None else {"skip": skip.T}
    return _dictionary(own, read, written, card, **extra)


def _guessed(path: str) -> dict[str, Any]:
    """The config that is missing, from the folders' names."""
    layer = re.search(r"layer_(\d+)", path)
    # the innermost folder that names a place: others may be called anything
    kind = next((name for part in reversed(path.split("/")) for name in PLACES if name in part), None)
    if not layer or not kind:
        return {}
    read, written = (f"model.layers.{layer[1]}.{at}" if at else None for at in PLACES[kind])
    return {"hf_hook_point_in": read, "hf_hook_point_out": written}


def _place(name: str | None) -> str | None:
    """A hook point by saekit's name: ``model.layers.3.output`` is ``model.layers.3:out``."""
    return name and re.sub(r"\.(in|out)put$", r":\1", name)


def save_second(dictionary: Dictionary, folder: "str | Path", *, dtype: str = "float32") -> Path:
    """Write ``params.safetensors`` and ``config.json``."""
    record, threshold = _mine(dictionary, "gemma_scope_2", skip=True)
    tensors = {
        "w_enc": record.encoder.T, "w_dec": record.atoms, "b_enc": record.b_enc, "b_dec": record.b_dec, "threshold": threshold,
    }  # fmt: skip
    if record.skip is not None:
        tensors["affine_skip_connection"] = record.skip.T
    points = [re.sub(r":(in|out)$", r".\1put", point) for point in (*record.reads, *record.writes)]
    config: dict[str, Any] = {
        "architecture": "jump_relu", "model_name": record.card.get("data", {}).get("model", {}).get("name"),
        "affine_connection": record.skip is not None, "hf_hook_point_in": points[0] if points else None,
    }  # fmt: skip
    if record.wiring == "transcoder":
        config["hf_hook_point_out"] = points[-1] if points else None
    return write(folder, {SECOND: as_safetensors(stored(tensors, dtype)), CONFIG: as_json(config)})


FORMAT = Format(FIRST, detect, load, save)
FORMAT_2 = Format(f"{SECOND} (and {CONFIG})", detect_second, load_second, save_second)
