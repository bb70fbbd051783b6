"""dictionary_learning's folder: ``ae.pt``, a state dict, and ``config.json``, whose ``trainer.dict_class`` says what it is.

Weights are in raw activations whatever they were trained in. What the classes compute:

* AutoEncoder: ReLU, with ``bias`` taken off the input and added to the output. Its reader divides the atoms by their
  norms and multiplies the encoder, so codes here are those too;
* AutoEncoderNew: ReLU, nothing taken off the input;
* GatedAutoEncoder: ``decoder_bias`` taken off the input, for gate and magnitude both;
* JumpReluAutoEncoder: a threshold per feature, nothing taken off the input;
* AutoEncoderTopK: ``b_dec`` taken off, ReLU, then the k largest of a row; its threshold isn't used;
* BatchTopKSAE and MatryoshkaBatchTopKSAE: ``b_dec`` taken off, ReLU, then what exceeds one threshold for all. One of
  -1 was never set by training, and stands for no sparsity at all.

Matrices of ``nn.Linear`` are [out, in], ``W_enc`` and ``W_dec`` are [in, out].
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import records
from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary
from saekit.hub.written import as_json, as_torch, stored, write
from saekit.registry import nearest
from saekit.types import SaekitError

WEIGHTS, CONFIG = "ae.pt", "config.json"
SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
SHARED = ("AutoEncoderTopK", "BatchTopKSAE")  # of one layout
MINE = {"relu": "AutoEncoderNew", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
BIASES = {
    "AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias",
    "JumpReluAutoEncoder": "b_dec", "AutoEncoderTopK": "b_dec", "BatchTopKSAE": "b_dec", "MatryoshkaBatchTopKSAE": "b_dec",
}  # fmt: skip
CONFIG_FIELDS = {
    "trainer": {"dict_class": str, "k?": int | None, "lm_name?": str | None, "submodule_name?": str | None},
    "buffer?": {"io?": str, "ctx_len?": int | None},
}  # fmt: skip
CENTRED = set(BIASES) - {"AutoEncoderNew", "JumpReluAutoEncoder"}  # what takes its b_dec off the input


def detect(files: Files) -> bool:
    """Weights of that name, and a config with a trainer's ``dict_class``."""
    if not (files.has(WEIGHTS) and files.has(CONFIG)):
        return False
    config = files.json(CONFIG)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    return isinstance(trainer, dict) and "dict_class" in trainer


def load(files: Files, *, hook_point: str | None = None, threshold: float | None = None) -> Dictionary:
    """The dictionary of a folder; ``threshold`` is for a BatchTopK one whose own was never set."""
    config = files.json(CONFIG)
    if not detect(files):
        raise SaekitError(
            f"folder {str(files)!r} is none of dictionary_learning: it lacks {WEIGHTS}, or a trainer's dict_class in {CONFIG}"
        )
    records.check(config, CONFIG_FIELDS, f"file {str(files.root / CONFIG)!r}", "take an intact folder")
    trainer, buffer = config["trainer"], config.get("buffer", {})
    name = trainer["dict_class"].rpartition(".")[2]
    if name not in BIASES:
        raise SaekitError(
            f"dict_class {name!r} of {str(files)!r} is unknown{nearest(name, list(BIASES), n=2)}"
        )
    state = files.tensors(WEIGHTS)
    record = _read(name, state, trainer, threshold, str(files))
    at = (hook_point,) if hook_point else _site(trainer, buffer)
    missing = () if at else ("the hook point",)
    card = about(
        "dictionary_learning", str(record.encoder.dtype).removeprefix("torch."), model=trainer.get("lm_name"),
        context=buffer.get("ctx_len"), metadata=config, missing=missing,
    )  # fmt: skip
    return to_dictionary(dataclasses.replace(record, reads=at, writes=at, card=card))


def _take(state: Mapping[str, Tensor], names: tuple[str, ...], where: str) -> list[Tensor]:
    for name in names:
        if name not in state:
            raise SaekitError(
                f"file {WEIGHTS!r} of {where!r} lacks the tensor {name!r}; its dict_class needs it"
            )
    return [state[name] for name in names]


def _read(
    name: str, state: Mapping[str, Tensor], trainer: Mapping[str, Any], given: float | None, where: str
) -> Record:
    """What a state of a class means."""
    own = name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    keys = ("W_enc", "W_dec", "b_enc") if own else ("encoder.weight", "decoder.weight")
    if name == "GatedAutoEncoder":
        keys = (*keys, "gate_bias")
    elif not own:
        keys = (*keys, "encoder.bias")
    encoder, atoms, b_enc, b_dec = _take(state, (*keys, BIASES[name]), where)
    encoder, atoms = (encoder.T, atoms) if own else (encoder, atoms.T)
    parts: dict[str, Any] = {"selection": "relu"}
    if name == "GatedAutoEncoder":
        r, b_mag = _take(state, ("r_mag", "mag_bias"), where)
        parts = {"selection": "gated", "state": {"r": r, "b_mag": b_mag}}
    elif name == "AutoEncoderTopK":
        k = state["k"] if "k" in state else trainer.get("k")
        if k is None:
            raise SaekitError(f"k of {where!r} is in neither {WEIGHTS} nor {CONFIG}; take an intact folder")
        parts = {"selection": "topk", "options": {"k": int(k)}, "relu": "before"}
    elif name == "JumpReluAutoEncoder":
        parts = {"selection": "jumprelu", "threshold": _take(state, ("threshold",), where)[0]}
    elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        parts = _by_one_threshold(b_enc, _take(state, ("threshold",), where)[0], given, where)
    if name == "AutoEncoder":
        encoder, b_enc, atoms = _unit(encoder.double(), b_enc.double(), atoms.double())
    pre_bias = b_dec if name in CENTRED else None
    return Record(encoder=encoder, atoms=atoms, b_enc=b_enc, b_dec=b_dec, pre_bias=pre_bias, **parts)


def _by_one_threshold(b_enc: Tensor, stored: Tensor, given: float | None, where: str) -> dict[str, Any]:
    threshold = float(stored) if given is None else given
    if threshold < 0:
        raise SaekitError(
            f"threshold = {threshold:g} of {where!r} was never set by training, and every positive pre-activation would pass; give threshold=..., as saekit.calibrate finds it for a wanted L0"
        )
    return {
        "selection": "batchtopk",
        "relu": "before",
        "threshold": torch.full_like(b_enc, threshold, dtype=torch.float32),
    }


def _unit(encoder: Tensor, b_enc: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms of norm 1 and codes as long as theirs were, as the peer's reader makes them."""
    norms = torch.linalg.vector_norm(atoms, dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return encoder, b_enc, atoms
    live = torch.where(norms > 0, norms, 1.0)
    return encoder * live[:, None], b_enc * live, atoms / live[:, None]


def _site(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> tuple[str, ...]:
    """The hook point, where the config says it; a layer alone doesn't."""
    name, inside = trainer.get("submodule_name") or "", buffer.get("io", "out") == "in"
    found = re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d+)", name)
    if found and not inside:
        return (f"blocks.{found[2]}.{SITES[found[1]]}",)
    if found and found[1] == "resid_post":
        return (f"blocks.{found[2]}.hook_resid_pre",)
    return (name,) if "." in name else ()


def save(dictionary: Dictionary, folder: "str | Path", *, dtype: str = "float32") -> Path:
    """Write an autoencoder with ReLU, TopK or a threshold per feature, as any rule of that kind comes down to.

    ReLU becomes an AutoEncoderNew, since the reader of AutoEncoder changes codes by the norms of atoms.
    """
    record = from_dictionary(dictionary, "dictionary_learning")
    refuse_unless(record, "dictionary_learning", selections=tuple(MINE), wirings=("autoencoder",), skip=False)
    name = MINE[record.selection]
    encoder, b_enc = record.encoder.double(), record.b_enc.double()
    trainer: dict[str, Any] = {
        "trainer_class": "saekit", "dict_class": name, "activation_dim": record.d_in, "dict_size": record.n_features,
    }  # fmt: skip
    extra: dict[str, Tensor] = {}
    if name == "JumpReluAutoEncoder":
        assert record.threshold is not None  # its selection has one
        tensors = {"W_enc": encoder.T, "b_enc": b_enc, "W_dec": record.atoms, "b_dec": record.b_dec}
        tensors["threshold"] = record.threshold
    else:
        tensors = {"encoder.weight": encoder, "encoder.bias": b_enc, "decoder.weight": record.atoms.T}
        tensors[BIASES[name]] = record.b_dec
    if name == "AutoEncoderTopK":
        tensors["encoder.bias"] = b_enc + encoder @ record.b_dec.double()
        trainer["k"] = record.options["k"]
        extra = {"k": torch.tensor(trainer["k"], dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    trainer |= _place(record)
    data = record.card.get("data", {})
    trainer["lm_name"] = data.get("model", {}).get("name", "")
    buffer = {"d_submodule": record.d_in, "io": "out"} | (
        {"ctx_len": data["context"]} if "context" in data else {}
    )
    config = as_json({"trainer": trainer, "buffer": buffer})
    return write(folder, {WEIGHTS: as_torch(stored(tensors, dtype) | extra), CONFIG: config})


def _place(record: Record) -> dict[str, Any]:
    """Layer and submodule as the peer names them; a hook point of another name stands as it is."""
    if not record.reads:
        return {"layer": None, "submodule_name": None}
    point = record.reads[0]
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", point)
    kind = {site: name for name, site in SITES.items()}.get(found[2]) if found else None
    number = re.search(r"\.(\d+)", point)
    return {
        "layer": int(number[1]) if number else None,
        "submodule_name": f"{kind}_layer_{found[1]}" if found and kind else point,
    }


FORMAT = Format(f"{WEIGHTS} and {CONFIG}", detect, load, save)
