"""sparsify's folder of a hook point: ``cfg.json`` and ``sae.safetensors``; a run holds one such folder for each.

Tensors: ``encoder.weight`` [n_features, d], ``encoder.bias``, ``W_dec`` [n_features, d], ``b_dec`` and, with
``skip_connection``, ``W_skip`` [d_out, d_in]. ``b_dec`` is taken off the input unless ``transcode``; codes are ReLU,
then the k largest of a row, or with ``activation`` "groupmax" the largest of each of k groups of neighbours. The skip
reads raw rows. ``num_latents`` 0 means ``d_in * expansion_factor``. A folder is named by its module (``layers.10``,
``layers.10.mlp``, with ``seed0`` inside of it where there are several), whose output is what an autoencoder reads; a
transcoder reads its input. The training's ``normalize_decoder`` and ``multi_topk`` leave inference as it is.
"""

import re
from pathlib import Path
from typing import Any

from saekit import records
from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary
from saekit.hub.written import as_json, as_safetensors, stored, write
from saekit.registry import nearest
from saekit.types import SaekitError

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
FIELDS = {
    "k": int, "activation?": str, "d_in?": int, "num_latents?": int, "expansion_factor?": int, "signed?": bool,
    "transcode?": bool, "skip_connection?": bool,
}  # fmt: skip
# a model's own module, to which the peer's names are relative
BASES = ("model.", "transformer.", "gpt_neox.")


def _places(files: Files) -> list[str]:
    """Folders of hook points, relative; "" where the files are those of one."""
    found = [name for name in files.names() if Path(name).name == WEIGHTS]
    return sorted(name.removesuffix(WEIGHTS).rstrip("/") for name in found)


def detect(files: Files) -> bool:
    """At least one folder with both files."""
    return any(files.at(place).has(CONFIG) for place in _places(files))


def _hook_point(place: str, files: Files) -> str | None:
    """The module of a folder, by its name; one of a seed is inside of it."""
    parts = [files.root.name, *Path(place).parts][-2:]
    if re.fullmatch(r"seed\d+", parts[-1]):
        parts.pop()
        parts = parts or [files.root.parent.name]
    return parts[-1] if re.search(r"\.\d+(\.|$)|^embed", parts[-1]) else None


def load(files: Files, *, hook_point: str | None = None) -> Dictionary:
    """The dictionary of a hook point; ``hook_point`` chooses a folder of several, or names the module of the only one."""
    places = [place for place in _places(files) if files.at(place).has(CONFIG)]
    if not places:
        raise SaekitError(f"folder {str(files)!r} has no {WEIGHTS} beside a {CONFIG}; give one of sparsify")
    module = (hook_point or "").partition(":")[0]
    mine = [p for p in places if module and module in (p, p.partition("/")[0], _hook_point(p, files))]
    if len(mine) > 1 or (len(places) > 1 and not mine):
        given = f"hook_point {hook_point!r} is" if hook_point else f"folder {str(files)!r} holds"
        which = nearest(module, places) if module and not mine else f"; known: {', '.join(mine or places)}"
        raise SaekitError(
            f"{given} {'not one' if module and not mine else 'more than one'} of its dictionaries{which}"
        )
    place = (mine or places)[0]
    inside = files.at(place)
    config = inside.json(CONFIG)
    records.check(config, FIELDS, f"file {str(inside.root / CONFIG)!r}", "take an intact folder")
    name = module if module and not mine else _hook_point(place, files)
    return to_dictionary(_read(inside, config, name))


def _read(files: Files, config: dict[str, Any], module: str | None) -> Record:
    state = files.tensors(WEIGHTS)
    transcode, skip = config.get("transcode", False), config.get("skip_connection", False)
    wanted = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if skip else [])}
    for name in sorted(wanted ^ set(state)):
        said = "lacks" if name in wanted else "has a tensor that its cfg.json doesn't speak of:"
        raise SaekitError(f"file {str(files.root / WEIGHTS)!r} {said} {name!r}; take an intact folder")
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or config.get("signed"):
        said = "signed = true" if config.get("signed") else f"activation {activation!r}"
        raise SaekitError(
            f"{said} of {str(files.root / CONFIG)!r} is unknown; sparsify has 'topk' and 'groupmax'"
        )
    n = len(state["encoder.weight"])
    d = config.get("d_in", state["encoder.weight"].shape[1])
    latents = config.get("num_latents") or d * config.get("expansion_factor", 0)
    if latents and latents != n:
        raise SaekitError(
            f"num_latents = {latents} of {str(files.root / CONFIG)!r} and the {n} of {WEIGHTS} differ; take an intact folder"
        )
    # a skip adds what an autoencoder hasn't, even where input and output are one place
    transcodes = transcode or skip
    side = "in" if transcode else "out"
    return Record(
        encoder=state["encoder.weight"], b_enc=state["encoder.bias"], atoms=state["W_dec"], b_dec=state["b_dec"],
        pre_bias=None if transcode else state["b_dec"], skip=state.get("W_skip"),
        selection=activation, options={"k": config["k"]}, relu="before", wiring="transcoder" if transcodes else "autoencoder",
        reads=(f"{module}:{side}",) if module else (), writes=(f"{module}:out",) if module else (),
        card=about(
            "sparsify", str(state["W_dec"].dtype).removeprefix("torch."), metadata=config,
            missing=() if module else ("the hook point",),
        ),
    )  # fmt: skip


def save(dictionary: Dictionary, folder: "str | Path", *, dtype: str = "float32") -> Path:
    """Write a TopK or GroupMax autoencoder or transcoder of one width, inside of ``folder`` in one named by its module, if it has one.

    Such folders, put side by side, are a run that the peer reads as a whole.
    """
    record = from_dictionary(dictionary, "sparsify")
    refuse_unless(record, "sparsify", selections=("topk", "groupmax"))
    if record.d_in != record.d_out:
        raise SaekitError(
            f"format 'sparsify' has transcoders of one width only, and this one reads {record.d_in} columns and writes {record.d_out}; choose another format"
        )
    transcode = record.wiring == "transcoder"
    encoder, b_enc = record.encoder.double(), record.b_enc.double()
    tensors = {
        "encoder.weight": encoder, "W_dec": record.atoms, "b_dec": record.b_dec,
        "encoder.bias": b_enc if transcode else b_enc + encoder @ record.b_dec.double(),
    }  # fmt: skip
    if record.skip is not None:
        tensors["W_skip"] = record.skip
    config = {
        "activation": record.selection, "expansion_factor": -(-record.n_features // record.d_in),
        "normalize_decoder": False, "num_latents": record.n_features, "k": record.options["k"], "multi_topk": False,
        "skip_connection": record.skip is not None, "transcode": transcode, "d_in": record.d_in,
    }  # fmt: skip
    place = _module(record, transcode)
    at = f"{place}/" if place else ""
    write(
        folder,
        {f"{at}{WEIGHTS}": as_safetensors(stored(tensors, dtype)), f"{at}{CONFIG}": as_json(config)},
    )
    return Path(folder)


def _module(record: Record, transcode: bool) -> str | None:
    """The module whose output (or input and output) a dictionary is of, as the peer names it; None for other places."""
    read, write = (*record.reads, "")[0], (*record.writes, "")[0]
    name, _, side = read.partition(":")
    fits = write in (f"{name}:out", name) and (side or "out") == ("in" if transcode else "out")
    if not fits or re.match(r"blocks\.\d+\.(.*\.)?hook_", name):
        return None
    base = next((base for base in BASES if name.startswith(base)), "")
    return name.removeprefix(base)


FORMAT = Format(f"HOOKPOINT/{CONFIG} and {WEIGHTS}", detect, load, save)
