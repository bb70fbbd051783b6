"""circuit-tracer's formats: a transcoder for each layer, or a cross-layer transcoder, with ``config.yaml``.

A set has ``layer_{i}.safetensors``: ``W_enc [F, d]`` (the transpose of SAELens'), ``W_dec [F, d]``, ``b_enc [F]``,
``b_dec [d]``, where there is one ``W_skip [d, d]`` (applied as ``W_skip x``), and ``activation_function.threshold [F]``.
A cross-layer transcoder of L layers has ``W_enc_{i}.safetensors`` with ``W_enc_{i} [F, d]``, ``b_enc_{i}``,
``b_dec_{i}`` (and ``threshold_{i}``), and ``W_dec_{i}.safetensors`` with ``W_dec_{i} [F, L - i, d]``, for layers i to L - 1.
Without thresholds it is a ReLU; with them a pre-activation passes strictly above its own, negative ones too where that is
negative. No bias is taken off the input. As read from circuit-tracer 0.5.0, and run against it.

``config.yaml`` names the model and the hook points inside a block: ``feature_input_hook: ln2.hook_normalized`` is read
at ``blocks.{i}.ln2.hook_normalized``. Where it lists ``transcoders`` at other addresses, these are other tools' files.

A whole set is a cross-layer transcoder of reach 1, which is the same function; a set with skips is not, so its layers
are read one by one, by ``layer``.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hub.assembled import cross_layer
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.names import lens
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary
from saekit.hub.written import as_safetensors, stored, write
from saekit.types import SaekitError

NAME, CONFIG = "circuit_tracer", "config.yaml"
SET, CROSS = "transcoder_set", "cross_layer_transcoder"
SELECTIONS = ("relu", "jumprelu")
THRESHOLD = "activation_function.threshold"
HOOKS = ("feature_input_hook", "feature_output_hook")


def _numbered(files: Files, before: str) -> dict[int, str]:
    """Files called ``before`` and a number, by number, rising."""
    form = re.compile(re.escape(before) + r"(0|[1-9]\d{0,3})\.safetensors")
    found = ((form.fullmatch(name), name) for name in files.names())
    return dict(sorted((int(match[1]), name) for match, name in found if match))


def detect(files: Files) -> bool:
    """Whether there are files of layers of either kind, or a config that names a kind."""
    if _numbered(files, "W_enc_"):
        return True
    layers = _numbered(files, "layer_")
    if layers:
        try:
            return {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(files.heads(next(iter(layers.values()))))
        except SaekitError:
            return False
    return bool(_config(files).get("transcoders")) if files.has(CONFIG) else False


def _config(files: Files) -> dict[str, Any]:
    """What config.yaml says, {} where it says nothing that is read."""
    try:
        held = files.yaml(CONFIG) if files.has(CONFIG) else {}
    except SaekitError:
        return {}
    return held if isinstance(held, dict) else {}


def _hooks(files: Files, given: Sequence[str | None], layers: Sequence[int]) -> list[tuple[str, ...]]:
    """Hook points that are read, and written, at these layers; () where nothing names them."""
    config, out = _config(files), []
    for name, own in zip(HOOKS, given, strict=True):
        hook = own or config.get(name)
        if hook is not None and not isinstance(hook, str):
            raise SaekitError(f"file {str(files.root / CONFIG)!r} has {name} = {hook!r}; it must be a name")
        out.append(tuple(f"blocks.{i}.{hook}" for i in layers) if hook else ())
    return out


def _card(files: Files, dtype: torch.dtype, hooks: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    config = _config(files)
    model = config.get("model_name")
    kept = {key: value for key, value in config.items() if isinstance(value, (str, int, float, bool))}
    missing = [
        *([] if isinstance(model, str) else ["the model"]),
        *([] if all(hooks) else ["the hook points"]),
        "the text",
    ]
    named = model if isinstance(model, str) else None
    return about(NAME, str(dtype).removeprefix("torch."), model=named, metadata=kept, missing=tuple(missing))


class _Tensors:
    """The tensors of one file, taken one by one and compared with the shapes that they must have."""

    def __init__(self, files: Files, name: str):
        self.where, self.held = f"file {str(files.root / name)!r}", files.tensors(name)

    def take(self, name: str, *shape: int | None, optional: bool = False) -> Any:
        """A tensor; None in a shape is any size. Where it is ``optional`` and missing, None."""
        if name not in self.held:
            if optional:
                return None
            raise SaekitError(f"{self.where} lacks the tensor {name!r}; get the file again")
        tensor = self.held.pop(name)
        wrong = [a for a, b in zip(tensor.shape, shape, strict=False) if b not in (a, None)]
        if tensor.ndim != len(shape) or wrong or not tensor.is_floating_point():
            turned = (
                "; it may be turned: W_enc has a row for each feature here"
                if name.startswith("W_enc")
                else ""
            )
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise SaekitError(
                f"tensor {name!r} of {self.where} is {tensor.dtype} {tuple(tensor.shape)}, and its other tensors mean ({wanted}){turned}; get the file again"
            )
        return tensor

    def done(self) -> None:
        """Raise if something is left."""
        for name in sorted(self.held):
            raise SaekitError(
                f"{self.where} holds a tensor {name!r} that the format doesn't know; get the file again"
            )


def _layer(
    files: Files, name: str, number: int, hooks: Sequence[str | None], jumps: bool = False
) -> Dictionary:
    """The transcoder of a layer; with ``jumps`` as a JumpReLU in any case."""
    file = _Tensors(files, name)
    b_enc, b_dec = file.take("b_enc", None), file.take("b_dec", None)
    n, d = len(b_enc), len(b_dec)
    threshold = file.take(THRESHOLD, n, optional=True)
    if threshold is None and jumps:
        threshold = torch.zeros(n)
    reads, writes = _hooks(files, hooks, (number,))
    encoder = file.take("W_enc", n, d)
    made = Record(
        encoder=encoder, atoms=file.take("W_dec", n, d), b_enc=b_enc, b_dec=b_dec,
        selection="relu" if threshold is None else "jumprelu", threshold=threshold,
        relu="none" if threshold is not None else "after", skip=file.take("W_skip", d, d, optional=True),
        wiring="transcoder", reads=reads, writes=writes, card=_card(files, encoder.dtype, (reads, writes)),
    )  # fmt: skip
    file.done()
    return to_dictionary(made)


def load_set(
    files: Files, *, input_hook: str | None = None, output_hook: str | None = None
) -> list[Dictionary]:
    """All transcoders of a set, by layer, skips and all."""
    layers = _whole(files, "layer_")
    return [_layer(files, name, i, (input_hook, output_hook)) for i, name in layers.items()]


def _whole(files: Files, before: str) -> dict[int, str]:
    """The files of all layers, of which none may be missing."""
    layers = _numbered(files, before)
    if not layers:
        raise SaekitError(
            f"folder {str(files.root)!r} has no files {before}0.safetensors, ...; {CONFIG} lists transcoders of other formats: fetch and load each of them"
        )
    missing = sorted(set(range(max(layers) + 1)) - set(layers))
    if missing:
        raise SaekitError(
            f"folder {str(files.root)!r} lacks {before}{missing[0]}.safetensors and has {before}{max(layers)}.safetensors; fetch all, or give layer = ... of a set"
        )
    return layers


def load(
    files: Files, *, layer: int | None = None, input_hook: str | None = None, output_hook: str | None = None
) -> Dictionary:
    """One dictionary: a cross-layer transcoder, a whole set as one of reach 1, or of a set the transcoder of one ``layer``.

    ``input_hook`` and ``output_hook`` are names inside a block ("ln2.hook_normalized"), where config.yaml doesn't say.
    Of several layers a row is all of them side by side.
    """
    hooks = (input_hook, output_hook)
    if _numbered(files, "W_enc_"):
        if layer is not None:
            raise SaekitError(
                f"layer = {layer} is for a set of transcoders, and this one is cross-layer; leave it out"
            )
        return _cross(files, hooks)
    layers = _numbered(files, "layer_")
    if layer is None and len(layers) == 1 and len(files.names()) == 1:
        layer = next(iter(layers))  # a file by itself
    if layer is not None:
        if layer not in layers:
            raise SaekitError(
                f"layer = {layer} is not one of the set's, {', '.join(map(str, layers)) or 'of which there are no files'}; choose one"
            )
        return _layer(files, layers[layer], layer, hooks)
    layers = _whole(files, "layer_")
    heads = [files.heads(name) for name in layers.values()]
    if any("W_skip" in head for head in heads):
        raise SaekitError(
            f"folder {str(files.root)!r} is a set of transcoders with skips, which are read one by one; give layer = 0, ..., {len(layers) - 1}"
        )
    sizes = {head["b_enc"].shape for head in heads if "b_enc" in head}
    if len(sizes) != 1:
        raise SaekitError(
            f"folder {str(files.root)!r} is a set of transcoders of different widths, which are read one by one; give layer = 0, ..., {len(layers) - 1}"
        )
    jumps = any(THRESHOLD in head for head in heads)
    parts: list[Any] = [_layer(files, name, i, hooks, jumps) for i, name in layers.items()]
    out = cross_layer(parts, torch.cat([part.b_dec.detach() for part in parts]), reach=1)
    out.reads, out.writes = _hooks(files, hooks, list(layers))
    return out


def _cross(files: Files, hooks: Sequence[str | None]) -> Dictionary:
    layers = _whole(files, "W_enc_")
    numbers = list(layers)
    parts: list[Any] = []
    biases: list[Tensor] = []
    reads, writes = _hooks(files, hooks, numbers)
    jumps = any(f"threshold_{i}" in files.heads(name) for i, name in layers.items())
    n = None
    for i, name in layers.items():
        file, other = _Tensors(files, name), _Tensors(files, f"W_dec_{i}.safetensors")
        b_enc, b_dec = file.take(f"b_enc_{i}", n), file.take(f"b_dec_{i}", len(biases[0]) if biases else None)
        n = len(b_enc)
        encoder = file.take(f"W_enc_{i}", n, len(b_dec))
        atoms = other.take(f"W_dec_{i}", n, len(numbers) - i, len(b_dec)).flatten(1)
        threshold = file.take(f"threshold_{i}", n) if jumps else None
        file.done()
        other.done()
        biases.append(b_dec.float())
        parts.append(
            to_dictionary(
                Record(
                    encoder=encoder, atoms=atoms, b_enc=b_enc, b_dec=torch.zeros(atoms.shape[1]),
                    selection="jumprelu" if jumps else "relu", threshold=threshold, relu="none" if jumps else "after",
                    wiring="transcoder", card=_card(files, encoder.dtype, (reads, writes)),
                )
            )
        )  # fmt: skip
    out = cross_layer(parts, torch.cat(biases))
    out.reads, out.writes = reads, writes
    return out


def save(
    dictionary: "Dictionary | Sequence[Dictionary]",
    folder: "str | Path",
    *,
    model: str | None = None,
    input_hook: str | None = None,
    output_hook: str | None = None,
    scan: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write transcoders, one for each layer from 0 on, or a cross-layer transcoder (of reach 1: as a set).

    ``model`` (None: the card's), ``input_hook`` and ``output_hook`` (None: those of ``blocks.{i}.NAME``, the same in
    all layers) and ``scan``, the name of its features' pages, go into config.yaml; ``dtype`` is that of the weights.
    """
    given = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    if not given:
        raise SaekitError("dictionary is an empty list; give the transcoders of layers 0, 1, ...")
    several = given[0].config.wiring[0] == "cross_layer"
    if several and len(given) > 1:
        raise SaekitError(
            f"{len(given)} cross-layer transcoders are given, and format {NAME!r} stores one; give one"
        )
    model = model or given[0].card.get("data", {}).get("model", {}).get("name")
    if model is None:
        raise SaekitError(
            f"model is not given, and format {NAME!r} names one, which the card doesn't; give model = ..."
        )
    sides = [
        [lens(point, d.card) for d in given for point in side(d)]
        for side in (lambda d: d.reads, lambda d: d.writes)
    ]
    config: dict[str, Any] = {"model_name": model, "model_kind": SET}
    for name, option, own, points in zip(
        HOOKS, ("input_hook", "output_hook"), (input_hook, output_hook), sides, strict=True
    ):
        config[name] = own or _common(option, points)
    config["scan"] = scan
    if several and given[0].wiring.reach > 1:
        config["model_kind"] = CROSS
        tensors = _cross_tensors(given[0])
    else:
        parts = _split(given[0]) if several else given
        tensors = {f"layer_{i}.safetensors": each for i, each in enumerate(map(_layer_tensors, parts))}
        _check_alike(tensors)
    import yaml

    files = {name: as_safetensors(stored(each, dtype)) for name, each in tensors.items()}
    return write(folder, files | {CONFIG: yaml.safe_dump(config, sort_keys=False).encode()})


def _common(option: str, points: Sequence[str]) -> str:
    """The name inside a block that hook points share, which must go from block 0 on."""
    found = [re.fullmatch(r"blocks\.(\d+)\.(.+)", point) for point in points]
    names = {match[2] for match in found if match}
    numbers = [int(match[1]) for match in found if match]
    if len(names) != 1 or numbers != list(range(len(points))) or not points:
        raise SaekitError(
            f"{option} is not given, and hook points {', '.join(points) or '(none)'} are not blocks.0.NAME, blocks.1.NAME, ...; give the name inside a block, as circuit-tracer's {option} = 'hook_resid_mid'"
        )
    return names.pop()


def _layer_tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    record = from_dictionary(dictionary, NAME)
    refuse_unless(record, NAME, selections=SELECTIONS, wirings=("transcoder",), linear=True)
    if record.d_in != record.d_out:
        raise SaekitError(
            f"format {NAME!r} has transcoders of one width only, and this one reads {record.d_in} columns and writes {record.d_out}; choose another format"
        )
    tensors = {"W_enc": record.encoder, "W_dec": record.atoms, "b_enc": record.b_enc, "b_dec": record.b_dec}
    if record.threshold is not None:
        tensors[THRESHOLD] = record.threshold
    if record.skip is not None:
        tensors["W_skip"] = record.skip
    return tensors


def _check_alike(tensors: dict[str, dict[str, Tensor]]) -> None:
    """Raise unless the peer takes these layers for one set: as many features, and skips in all or none."""
    for what, values in (
        ("numbers of features", {len(each["b_enc"]) for each in tensors.values()}),
        ("kinds, with skips and without", {"W_skip" in each for each in tensors.values()}),
    ):
        if len(values) > 1:
            raise SaekitError(
                f"the layers have different {what}, and format {NAME!r} takes sets of one; write several sets"
            )


def _split(dictionary: Dictionary) -> list[Dictionary]:
    """The transcoders of one of reach 1, in raw units, each with its own bias."""
    whole: Any = dictionary.to_inference()
    parts = [whole.whole_part(layer) for layer in range(whole.layers)]
    for part, bias in zip(parts, whole.b_dec.detach().split(whole.wiring.parts_out), strict=True):
        part.b_dec.data.copy_(bias)
    return parts


def _cross_tensors(dictionary: Dictionary) -> dict[str, dict[str, Tensor]]:
    whole: Any = dictionary.to_inference().cpu()
    name, _ = whole.config.selection
    if name not in SELECTIONS:
        raise SaekitError(
            f"format {NAME!r} has no selection {name!r} (it has {', '.join(SELECTIONS)}); choose another format"
        )
    layers, d = whole.layers, whole.wiring.parts_in[0]
    if {*whole.wiring.parts_in, *whole.wiring.parts_out} != {d}:
        raise SaekitError(
            f"format {NAME!r} has one width for inputs and outputs, and these are {d} and {whole.wiring.parts_out[0]}; choose another format"
        )
    out = {}
    for i, (part, bias) in enumerate(zip(whole.parts, whole.b_dec.split(d), strict=True)):
        first, stop = whole.wiring.written(i)
        rows = part.W_dec.detach().view(len(part.b_enc), stop - first, d)
        own = {f"W_enc_{i}": part.W_enc.T, f"b_enc_{i}": part.b_enc, f"b_dec_{i}": bias}
        if name == "jumprelu":
            own[f"threshold_{i}"] = part.selection.threshold
        out[f"W_enc_{i}.safetensors"] = own
        # 0 beyond the reach
        out[f"W_dec_{i}.safetensors"] = {
            f"W_dec_{i}": torch.nn.functional.pad(rows, (0, 0, 0, layers - stop))
        }
    return out


FORMAT = Format("layer_0.safetensors, ... or W_enc_0.safetensors, ..., config.yaml", detect, load, save)
