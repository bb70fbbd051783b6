"""SAELens' format: ``cfg.json`` and ``sae_weights.safetensors``, of inference files, training checkpoints and files before 6.0.

Read off sae-lens 6.54.12. For d = d_in, o = d_out, F = d_sae: ``W_enc [d, F]``, ``W_dec [F, o]``, ``b_enc [F]``,
``b_dec [o]``; "jumprelu" adds ``threshold [F]``, "gated" has ``b_gate``, ``b_mag`` and ``r_mag [F]`` in place of
``b_enc``, "matching_pursuit" has ``W_dec`` and ``b_dec`` alone, skip transcoders have ``W_skip [o, d]``, checkpoints of
"batchtopk" and "matryoshka_batchtopk" ``topk_threshold ()``. Before the encoder b_dec is taken off where
``apply_b_dec_to_input`` says so, after the normalisation. ``rescale_acts_by_decoder_norm`` ranks pre-activations times
atoms' norms, and codes keep the factor. A checkpoint's scale or whitening lies beside it (``activation_scaler.json``,
``activation_whitening.safetensors``). Files before 6.0 have one flat cfg, ``activation_fn`` in place of "topk",
``log_threshold`` or ``scaling_factor [F]``, which multiplies codes in the decoder.

Written are "standard", "topk", "abstopk", "jumprelu" (which a gated or BatchTopK dictionary comes down to),
"matching_pursuit" and the transcoders, all folded but for normalisations by row.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import records
from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.names import lens
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary
from saekit.hub.written import as_json, as_safetensors, write
from saekit.registry import nearest
from saekit.types import SaekitError

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
VERSION = "6.54.12"  # of the package whose format is written
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
BY_ROW = {"layer_norm": "row_std", "constant_norm_rescale": "row_norm"}
BY_DATA = ("expected_average_only_in", "covariance_whitening")  # folded, or beside a checkpoint
SHAPES = ("none", "hook_z")  # of what is read: a row, or heads that are laid side by side
BASE = ("W_enc", "W_dec", "b_enc", "b_dec")
CONFIG = {
    "d_in": int, "d_sae": int, "d_out?": int, "architecture?": str, "dtype?": str, "apply_b_dec_to_input?": bool,
    "normalize_activations?": bool | str | None, "k?": int | float, "rescale_acts_by_decoder_norm?": bool,
    "residual_threshold?": float, "max_iterations?": int | None, "stop_on_duplicate_support?": bool,
    "metadata?": dict, "reshape_activations?": str | None, "activation_fn?": str, "activation_fn_kwargs?": dict | None, "finetuning_scaling_factor?": bool,
}  # fmt: skip
NAMES = {
    "hook_name?": str | None, "hook_name_out?": str | None, "model_name?": str | None, "dataset_path?": str | None,
    "context_size?": int | None,
}  # fmt: skip
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}  # fmt: skip
METADATA = (  # what a file before 6.0 may say beside its function
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos",
    "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version",
    "sae_lens_training_version", "hook_name_out", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """An architecture: saekit's selection for it, its tensors, and whether it writes where it reads."""

    selection: str
    tensors: tuple[str, ...] = BASE
    wiring: str = "autoencoder"


ARCHITECTURES = {
    "standard": Kind("relu"),
    "gated": Kind("gated", ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")),
    "topk": Kind("topk"),
    "abstopk": Kind("abstopk"),
    "jumprelu": Kind("jumprelu", (*BASE, "threshold")),
    "batchtopk": Kind("batchtopk", (*BASE, "topk_threshold")),
    "matryoshka_batchtopk": Kind("batchtopk", (*BASE, "topk_threshold")),
    "matching_pursuit": Kind("pursuit", ("W_dec", "b_dec")),
    "transcoder": Kind("relu", BASE, "transcoder"),
    "skip_transcoder": Kind("relu", (*BASE, "W_skip"), "transcoder"),
    "jumprelu_transcoder": Kind("jumprelu", (*BASE, "threshold"), "transcoder"),
    "jumprelu_skip_transcoder": Kind("jumprelu", (*BASE, "threshold", "W_skip"), "transcoder"),
}


def detect(files: Files) -> bool:
    """Whether there are a cfg with the widths of an SAE and its weights."""
    if not (files.has(CFG) and files.has(WEIGHTS)):
        return False
    cfg = files.json(CFG)
    return isinstance(cfg, dict) and {"d_in", "d_sae"} <= set(cfg)


def load(files: Files, *, hook_point: str | None = None, hook_point_out: str | None = None) -> Dictionary:
    """The dictionary of a folder; the hook points are for files that name none."""
    cfg = _config(files)
    name = cfg["architecture"]
    if name == "temporal":
        raise SaekitError(
            f"architecture 'temporal' in {str(files.root / CFG)!r} predicts codes from the ones before by attention, and encode and decode are not its reconstruction; saekit has no such dictionary"
        )
    if name not in ARCHITECTURES:
        raise SaekitError(
            f"architecture {name!r} in {str(files.root / CFG)!r} is unknown{nearest(name, ARCHITECTURES)}"
        )
    kind = ARCHITECTURES[name]
    stored = _tensors(files, cfg, kind)
    record = _record(cfg, kind, stored)
    record = _with_checkpoint(record, files, cfg)
    metadata = cfg["metadata"]
    read = hook_point or metadata.get("hook_name")
    write = hook_point_out or metadata.get("hook_name_out") if kind.wiring == "transcoder" else read
    if hook_point_out is not None and kind.wiring != "transcoder":
        raise SaekitError(
            f"hook_point_out = {hook_point_out!r}: architecture {name!r} writes what it reads; leave it out"
        )
    card = about(
        "saelens", cfg["dtype"], model=metadata.get("model_name"), text=metadata.get("dataset_path"),
        context=metadata.get("context_size"), metadata=metadata, missing=_missing(files, cfg, read, write),
    )  # fmt: skip
    reads, writes = tuple(n for n in (read,) if n), tuple(n for n in (write,) if n)
    return to_dictionary(dataclasses.replace(record, reads=reads, writes=writes, card=card))


def _missing(files: Files, cfg: Mapping[str, Any], read: str | None, write: str | None) -> tuple[str, ...]:
    metadata = cfg["metadata"]
    out = [] if read else ["the hook point"]
    out += [] if write or not read else ["the hook point that is written"]
    out += [f"the {what}" for key, what in (("model_name", "model"), ("dataset_path", "text")) if not metadata.get(key)]  # fmt: skip
    if cfg["normalize_activations"] in BY_DATA and not files.has(SCALER):
        out.append(
            f"the statistics of {cfg['normalize_activations']} ({SCALER}), so it reads raw activations"
        )
    return tuple(out)


def _config(files: Files) -> dict[str, Any]:
    """The cfg as files since 6.0 have it, with every field that is used."""
    cfg, where = files.json(CFG), f"cfg {str(files.root / CFG)!r}"
    fix = "save it again with SAELens"
    records.check(cfg, dict, where, fix)
    cfg = {RENAMED.get(key, key): value for key, value in cfg.items()}
    records.check(cfg, CONFIG, where, fix)
    metadata = cfg.get("metadata", {})
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    old = not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6
    if old:
        metadata = {key: cfg[key] for key in METADATA if key in cfg} | metadata
        _old_function(cfg, where)
    records.check(metadata, NAMES, where, fix, "metadata")
    name = cfg.get("architecture", "standard" if old else None)
    if name is None:
        raise SaekitError(f"{where} lacks the field 'architecture'; {fix}")
    transcodes = name in ARCHITECTURES and ARCHITECTURES[name].wiring == "transcoder"
    if transcodes and cfg.get("apply_b_dec_to_input"):
        raise SaekitError(
            f"{where} has apply_b_dec_to_input = true, and the b_dec of architecture {name!r} belongs to what it writes; set it to false"
        )
    normalise = cfg.get("normalize_activations") or "none"
    normalise = "expected_average_only_in" if normalise is True else normalise
    if normalise not in ("none", *BY_ROW, *BY_DATA):
        raise SaekitError(
            f"normalize_activations {normalise!r} in {where} is unknown{nearest(normalise, ['none', *BY_ROW, *BY_DATA])}"
        )
    if (shape := cfg.get("reshape_activations") or "none") not in SHAPES:
        raise SaekitError(
            f"reshape_activations {shape!r} in {where} is unknown{nearest(shape, list(SHAPES))}"
        )
    dtype = cfg.get("dtype", "float32").removeprefix("torch.")
    applied = cfg.get("apply_b_dec_to_input", not transcodes)
    return cfg | {
        "architecture": name, "metadata": metadata, "normalize_activations": normalise, "dtype": dtype, "apply_b_dec_to_input": applied,
    }  # fmt: skip


def _old_function(cfg: dict[str, Any], where: str) -> None:
    """Say the activation function of a file before 6.0 by its architecture."""
    function = cfg.get("activation_fn", "relu")
    if function == "topk":
        k = (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))
        cfg |= {"architecture": "topk", "k": k}
    elif function != "relu":
        raise SaekitError(f"activation_fn {function!r} in {where} is unknown; known: relu, topk")


def _tensors(files: Files, cfg: Mapping[str, Any], kind: Kind) -> dict[str, Tensor]:
    """The tensors of an architecture, of their names and shapes."""
    stored, where = files.tensors(WEIGHTS), repr(str(files.root / WEIGHTS))
    if "log_threshold" in stored and "threshold" not in stored:
        stored["threshold"] = stored.pop("log_threshold").double().exp()
    factor = stored.pop("scaling_factor", stored.pop("finetuning_scaling_factor", None))
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        if not cfg.get("finetuning_scaling_factor"):
            raise SaekitError(
                f"file {where} holds a scaling_factor, and finetuning_scaling_factor in its cfg is not true; set it if the factor is meant"
            )
        if "W_dec" in stored and factor.shape == stored["W_dec"].shape[:1]:
            stored["W_dec"] = stored["W_dec"].double() * factor.double()[:, None]
    d, n = cfg["d_in"], cfg["d_sae"]
    out = cfg.get("d_out", d) if kind.wiring == "transcoder" else d
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d, n), "W_dec": (n, out), "b_dec": (out,), "W_skip": (out, d), "topk_threshold": (),
    }  # fmt: skip
    for name in kind.tensors:
        shape = shapes.get(name, (n,))
        if name not in stored:
            raise SaekitError(
                f"file {where} lacks the tensor {name!r} of architecture {cfg['architecture']!r}; save it again with SAELens"
            )
        if stored[name].shape != shape:
            raise SaekitError(
                f"tensor {name!r} of {where} has shape {tuple(stored[name].shape)}, and with d_in = {d}, d_sae = {n} it must be {shape}; save it again with SAELens"
            )
    for name in sorted(set(stored) - set(kind.tensors)):
        raise SaekitError(
            f"file {where} holds the tensor {name!r}, which architecture {cfg['architecture']!r} does not have; its cfg is another file's"
        )
    return stored


def _record(cfg: Mapping[str, Any], kind: Kind, stored: Mapping[str, Tensor]) -> Record:
    """What a file without a scale or whitening means."""
    b_dec, n, applied = stored["b_dec"], cfg["d_sae"], cfg["apply_b_dec_to_input"]
    tied = kind.selection == "pursuit"
    b_enc = stored.get("b_gate", stored.get("b_enc", torch.zeros(n)))
    fields: dict[str, Any] = {"relu": "none" if kind.selection == "abstopk" else "after"}
    if kind.selection in ("topk", "abstopk"):
        fields["options"] = {"k": _whole(cfg, "k")}
        fields["domain"] = "norm" if cfg.get("rescale_acts_by_decoder_norm") else "pre"
    if kind.selection == "gated":
        fields["state"] = {"r": stored["r_mag"], "b_mag": stored["b_mag"]}
    if kind.selection == "jumprelu":
        fields["threshold"] = stored["threshold"]
    if kind.selection == "batchtopk":
        fields["threshold"] = stored["topk_threshold"].expand(n)
    if tied:
        fields["options"] = {
            "k": _whole(cfg, "max_iterations") if cfg.get("max_iterations") else cfg["d_in"],
            "residual": float(cfg.get("residual_threshold", 1e-2)),
            "until_repeat": cfg.get("stop_on_duplicate_support", True),
        }
        b_dec = b_dec if applied else torch.zeros_like(b_dec)
    record = Record(
        encoder=stored["W_dec"] if tied else stored["W_enc"].T, atoms=stored["W_dec"], b_enc=b_enc, b_dec=b_dec,
        selection=kind.selection, wiring=kind.wiring, pre_bias=b_dec if applied else None, skip=stored.get("W_skip"),
        per_row=BY_ROW.get(cfg["normalize_activations"], "none"), tied=tied, **fields,
    )  # fmt: skip
    # a BatchTopK's codes keep the norms that were compared, which its record would leave out of them
    long = kind.selection == "batchtopk" and cfg.get("rescale_acts_by_decoder_norm", True)
    return _times_norms(record) if long else record


def _times_norms(record: Record) -> Record:
    """Codes times their atoms' norms, and atoms of norm 1."""
    norms = torch.linalg.vector_norm(record.atoms.double(), dim=1).clamp(min=1e-8)
    return dataclasses.replace(
        record,
        encoder=record.encoder.double() * norms[:, None],
        b_enc=record.b_enc.double() * norms,
        atoms=record.atoms.double() / norms[:, None],
    )


def _whole(cfg: Mapping[str, Any], field: str) -> int:
    value = cfg.get(field)
    if value is None or value != int(value):
        raise SaekitError(
            f"{field} = {value!r} of architecture {cfg['architecture']!r} must be a whole number; correct its cfg"
        )
    return int(value)


def _with_checkpoint(record: Record, files: Files, cfg: Mapping[str, Any]) -> Record:
    """The function of raw activations of a checkpoint whose scale or whitening lies beside it."""
    if cfg["normalize_activations"] not in BY_DATA or not files.has(SCALER):
        return record
    data, where = files.json(SCALER), f"file {str(files.root / SCALER)!r}"
    fix = "save the checkpoint again"
    records.check(data, {"scaling_factor": float | None, "has_whitening?": bool}, where, fix)
    scale = data["scaling_factor"] or 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise SaekitError(f"{where} has scaling_factor = {scale}; it must be above 0, {fix}")
    record = dataclasses.replace(record, scale_in=scale, scale_out=scale)
    if not (data.get("has_whitening", True) and files.has(WHITENING)):
        return record
    if record.tied:
        raise SaekitError(
            "normalize_activations 'covariance_whitening' of a matching pursuit can't be folded, as its encoder is its decoder; train it without"
        )
    if record.domain == "norm":
        record = dataclasses.replace(_times_norms(record), domain="pre")
    stored = files.tensors(WHITENING)
    d = record.d_in
    for name, shape in {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}.items():
        if name not in stored or stored[name].shape != shape:
            raise SaekitError(
                f"file {str(files.root / WHITENING)!r} has no tensor {name!r} of shape {shape}; {fix}"
            )
    mean, matrix, inverse = (stored[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    taken = mean if record.pre_bias is None else mean + record.pre_bias.double() @ inverse
    return dataclasses.replace(
        record,
        encoder=record.encoder.double() @ matrix.T,
        atoms=record.atoms.double() @ inverse,
        b_dec=record.b_dec.double() @ inverse + mean,
        pre_bias=taken,
    )


def save(dictionary: Dictionary, folder: "str | Path", *, dtype: str = "float32") -> Path:
    """Write a dictionary for SAELens; ``dtype`` is that of the weights: float32, float64, float16 or bfloat16.

    Codes are the dictionary's, but a pursuit's with a scale are divided by it, since its atoms have norm 1.
    """
    if dtype not in DTYPES:
        raise SaekitError(f"dtype {dtype!r} is unknown{nearest(dtype, DTYPES)}")
    record = from_dictionary(dictionary, "saelens")
    knows = ("relu", "jumprelu") if record.wiring == "transcoder" else ("relu", "topk", "abstopk", "jumprelu", "pursuit")  # fmt: skip
    refuse_unless(record, "saelens", selections=knows, per_row=("none", *BY_ROW.values()))
    tensors, own = _pursuit(record) if record.selection == "pursuit" else _linear(record)
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in tensors.items()}
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise SaekitError(f"dtype {dtype!r} is too narrow for {name}; choose float32")
    by_row = {ours: theirs for theirs, ours in BY_ROW.items()}
    cfg = {
        "d_in": record.d_in, "d_sae": record.n_features, "dtype": dtype, "device": "cpu", "apply_b_dec_to_input": False,
        "normalize_activations": by_row.get(record.per_row, "none"),
        "reshape_activations": "hook_z" if record.reads and record.reads[0].endswith("hook_z") else "none",
        "metadata": _metadata(record), **({"d_out": record.d_out} if record.wiring == "transcoder" else {}), **own,
    }  # fmt: skip
    return write(folder, {WEIGHTS: as_safetensors(weights), CFG: as_json(cfg)})


def _linear(record: Record) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and own fields of everything but a pursuit."""
    tensors = {
        "W_enc": record.encoder.T, "W_dec": record.atoms, "b_enc": record.b_enc, "b_dec": record.b_dec,
    }  # fmt: skip
    name = "standard" if record.selection == "relu" else record.selection
    own: dict[str, Any] = {}
    if record.threshold is not None:
        tensors["threshold"] = record.threshold
    if record.skip is not None:
        tensors["W_skip"] = record.skip
    if record.wiring == "transcoder":
        rule = "jumprelu_" if record.threshold is not None else ""
        name = f"{rule}{'skip_' if record.skip is not None else ''}transcoder"
    if record.selection in ("topk", "abstopk"):
        own = {"k": record.options["k"], "rescale_acts_by_decoder_norm": False}
    return tensors, {"architecture": name, **own}


def _pursuit(record: Record) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and own fields of a matching pursuit: one matrix, and one bias that is taken off and put back."""
    options, scale = record.options, record.scale_in
    taken = torch.zeros(record.d_in) if record.pre_bias is None else record.pre_bias
    lacks = {
        "has an encoder of its own": not torch.equal(record.encoder, record.atoms),
        f"stops at tolerance = {options['tolerance']} of a row's norm": options["tolerance"] > 0,
        "adds another b_dec than it takes off": not torch.allclose(taken, record.b_dec, rtol=1e-5, atol=1e-6),
    }
    for reason, holds in lacks.items():
        if holds:
            raise SaekitError(
                f"format 'saelens' can't say this pursuit, which {reason}; choose another format"
            )
    own = {
        "architecture": "matching_pursuit", "apply_b_dec_to_input": True, "max_iterations": options["k"],
        "residual_threshold": options["residual"] / scale, "stop_on_duplicate_support": options["until_repeat"],
    }  # fmt: skip
    return {"W_dec": record.atoms, "b_dec": taken / scale}, own


def _metadata(record: Record) -> dict[str, Any]:
    """What SAELens knows of an SAE beside its function; what an imported file said is kept."""
    imported, data = record.card.get("imported", {}), record.card.get("data", {})
    kept = dict(imported.get("metadata", {})) if imported.get("format") == "saelens" else {}
    known = {
        "model_name": data.get("model", {}).get("name"), "dataset_path": data.get("text", {}).get("name"),
        "context_size": data.get("context"), "hook_name": lens(record.reads[0], record.card) if record.reads else None,
        "hook_name_out": lens(record.writes[0], record.card) if record.wiring == "transcoder" and record.writes else None,
        "sae_lens_version": VERSION,
    }  # fmt: skip
    return {**kept, **{key: value for key, value in known.items() if value is not None}}


FORMAT = Format(f"{CFG} with d_sae, and {WEIGHTS}", detect, load, save)
