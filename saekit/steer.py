"""Steering: features of dictionaries set, added to, scaled, ablated or clamped while a model runs, and kept as a file.

    with saekit.steer(model, d, {123: 8.0}):
        model.generate("def ", max_new_tokens=20)

A steering as data is one small JSON file, schema version 1::

    {"schema": 1, "error": true, "masked": true, "dictionaries": [
        {"digest": "...", "reads": ["blocks.1.hook_resid_post"], "writes": ["blocks.1.hook_resid_post"], "n_features": 4096,
         "edits": [{"feature": 123, "set": 8.0, "position": null, "when": {"feature": 7, "above": 0.5}}]}]}

An edit has one of ``set``, ``scale``, ``add`` (numbers) and ``clamp`` ([low, high], one of which may be null); ``position`` and
``when`` may be left out. Dictionaries are known by their digest, so a steering can't act on
others than those that it was made for. It names no model: steering a fine-tuned model with its base's dictionary is meant.

What adds the same to every token's stream is a bias, and :meth:`Steering.save_pretrained` writes a checkpoint that has it.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saekit import records
from saekit.activations import write_atomic
from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.harvest import check_writable
from saekit.hub import dictionary_of
from saekit.interventions import (
    WAYS,
    Condition,
    Edit,
    When,
    change_of,
    edits_of,
    intervened,
    pairs,
    written_by,
)
from saekit.models import ATTENTION, MLP, Model, load_model
from saekit.types import SaekitError

SCHEMA = 1
FIX = "save the steering again"
SHAPE = {
    "error": bool, "masked": bool,
    "dictionaries": [{
        "digest": str, "reads": [str], "writes": [str], "n_features": int,
        "edits": [{
            "feature": int, "position?": int | None, "set?": float | None, "scale?": float | None, "add?": float | None,
            "clamp?": list | None, "when?": dict | None,
        }],
    }],
}  # fmt: skip
Changes = list[tuple[Dictionary, list[Edit]]]
# what writes to the residual stream last, by the half of a block, and the field of a config that gives it a bias
PROJECTIONS = {
    "attention": (ATTENTION, ("c_proj", "o_proj", "dense", "out_proj"), "attention_bias"),
    "MLP": (MLP, ("c_proj", "down_proj", "dense_4h_to_h", "fc2", "fc_out"), "mlp_bias"),
}
PROBE = (2, 12)  # rows and tokens on which a checkpoint is compared with the steered model
# of the logits' norm; half precision is the model's own rounding
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@contextmanager
def steer(
    model: "Model | str | nn.Module",
    dictionary: Any,
    edits: Any = None,
    *,
    add: Mapping[int, float] | None = None,
    scale: Mapping[int, float] | None = None,
    ablate: Iterable[int] | None = None,
    clamp: Mapping[int, tuple[float | None, float | None]] | None = None,
    position: int | Sequence[int] | None = None,
    when: Condition | None = None,
    error: bool | None = None,
    masked: bool | None = None,
) -> Iterator[Model]:
    """Run the model with edits of features; the model is what it was when the context ends, however it ends (but in eval mode).

    ``edits``: {feature: value to set}, a list of :class:`saekit.Edit`, a :class:`Steering` or the file of one. The keywords
    make more of them, by feature: a number to add or to scale by, a range (low, high), ``ablate`` is a list. They act in
    this order: set, add, scale, ablate, clamp. Values are codes, in the units of ``dictionary.encode``. ``position``
    (from the text's beginning, or several) and ``when`` (see :class:`saekit.Edit`) go for all but listed Edits, which have
    their own. Several dictionaries: pairs, as in ``[(d, {3: 8.0}), (e, [Edit(5, add=1.0)])]``, or a mapping of
    dictionaries to edits; each sees what those before it have done. A folder stands for its dictionary.

    ``error`` (default True): what the dictionary leaves of the activation stays, so that an edit moves it by
    ``decode(edited) - decode(codes)``; False puts ``decode(edited)`` in its place. ``masked`` (default True): special
    tokens, which a model with a tokenizer knows, and outliers in norm as the dictionary's harvest saw them, are left alone by
    edits without a position. Padding always is. Works in generation, with cached keys and values or without, and in batches with padding on either side.
    """
    if isinstance(edits, str | Path):
        edits = Steering.load(edits)
    if isinstance(edits, Steering):
        if any(given is not None for given in (add, scale, ablate, clamp, position, when)):
            raise SaekitError(
                "a Steering is given, which is complete; leave add, scale, ablate, clamp, position and when out"
            )
        listed = edits.pairs(dictionary)
        error = edits.error if error is None else error
        masked = edits.masked if masked is None else masked
    else:
        listed = _changes(dictionary, edits, add, scale, ablate, clamp, position, when)
    for name, given in (("error", error), ("masked", masked)):
        if not isinstance(given, bool | None):
            raise SaekitError(f"{name} = {given!r} must be True or False")
    view = load_model(model)
    for one, _ in listed:
        one.to(view.device)
    with intervened(view, listed, error=error is not False, masked=masked is not False) as running:
        yield running


def _changes(
    dictionary: Any, edits: Any, add: Any = None, scale: Any = None, ablate: Any = None, clamp: Any = None,
    position: Any = None, when: Any = None,
) -> Changes:  # fmt: skip
    """Dictionaries and their edits, however they are given."""
    keywords = {"add": add, "scale": scale, "ablate": ablate, "clamp": clamp}
    if isinstance(dictionary, Dictionary | str | Path):
        one = _opened(dictionary)
        if edits is None and all(given is None for given in keywords.values()):
            raise SaekitError(
                "edits is not given; write {feature: value}, or one of add=, scale=, ablate= and clamp="
            )
        return [(one, _edits(one, edits, keywords, position, when))]
    if edits is not None or any(given is not None for given in (*keywords.values(), position, when)):
        raise SaekitError(
            "several dictionaries are given, and edits beside them; give each its own, as in [(dictionary, {3: 8.0})]"
        )
    listed = list(dictionary.items()) if isinstance(dictionary, Mapping) else dictionary
    if isinstance(listed, Sequence):
        listed = [(_opened(c[0]), *c[1:]) if isinstance(c, tuple | list) and c else c for c in listed]
    return pairs(listed)


def _opened(dictionary: Any) -> Any:
    """A dictionary, or the one that a folder holds; what is neither is left for :func:`pairs` to name."""
    return dictionary_of(dictionary) if isinstance(dictionary, str | Path) else dictionary


def _edits(
    dictionary: Dictionary, edits: Any, keywords: dict[str, Any], position: Any, when: Any
) -> list[Edit]:
    """One dictionary's edits, of all that is given for it."""
    several = isinstance(position, Sequence | range) and not isinstance(position, str)
    places = list(position) if several else [position]
    if not places:
        raise SaekitError("position is empty; give at least one, or leave it out for every token")
    plain = edits is None or isinstance(edits, Mapping)
    if not plain and (position is not None or when is not None):
        raise SaekitError("position and when are given beside Edits, which have their own; put them there")
    out = [] if plain else edits_of(dictionary, edits)
    ablate = keywords.pop("ablate")
    ways = [("set", edits if plain else None), *keywords.items()]
    if ablate is not None:
        if isinstance(ablate, str) or not isinstance(ablate, Iterable):
            raise SaekitError(f"ablate = {ablate!r} must be a list of features, as in [3, 7]")
        ways.insert(-1, ("scale", dict.fromkeys(ablate, 0.0)))
    for way, given in ways:
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise SaekitError(f"{way} is a {type(given).__name__}; give {{feature: value}}")
        values: Mapping[int, Any] = given
        out += [Edit(f, at, when=when, **{way: v}) for f, v in values.items() for at in places]
    return edits_of(dictionary, out)


@dataclass(frozen=True)
class Part:
    """One dictionary's edits, and what it is known by."""

    digest: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    n_features: int
    edits: tuple[Edit, ...]

    @staticmethod
    def of(dictionary: Dictionary, edits: Sequence[Edit]) -> "Part":
        """The part of a dictionary."""
        return Part(
            dictionary.digest(), dictionary.reads, dictionary.writes, dictionary.n_features, tuple(edits)
        )


@dataclass(frozen=True)
class Steering:
    """Edits of dictionaries as data; ``error`` and ``masked`` as in :func:`steer`."""

    parts: tuple[Part, ...]
    error: bool = True
    masked: bool = True

    @staticmethod
    def of(
        dictionary: Any, edits: Any = None, *, error: bool = True, masked: bool = True, **ways: Any
    ) -> "Steering":
        """What :func:`steer` would do with the same arguments (``ways``: add, scale, ablate, clamp, position, when)."""
        known = ("add", "scale", "ablate", "clamp", "position", "when")
        unknown = next((way for way in ways if way not in known), None)
        if unknown is not None:
            raise SaekitError(f"{unknown} is no way of steering; choose among {', '.join(known)}")
        listed = _changes(dictionary, edits, **ways)
        return Steering(tuple(Part.of(d, each) for d, each in listed), error, masked)

    def pairs(self, dictionary: Any) -> Changes:
        """Its edits with the dictionaries that they are of, which are found among those given by their digests."""
        several = isinstance(dictionary, Iterable) and not isinstance(dictionary, str)
        given = list(dictionary) if several else [dictionary]
        found = {id(d): d for d in map(_opened, given)}
        wrong = next((d for d in found.values() if not isinstance(d, Dictionary)), None)
        if wrong is not None:
            raise SaekitError(
                f"dictionary is of type {type(wrong).__name__}; give a dictionary, the folder of one, or several"
            )
        known = {d.digest(): d for d in found.values()}
        placed = {(d.digest(), d.reads, d.writes): d for d in found.values()}
        out = []
        for part in self.parts:
            one = placed.get((part.digest, part.reads, part.writes), known.get(part.digest))
            if one is None:
                raise SaekitError(
                    f"the steering is of a dictionary {part.digest} of {part.n_features} features at {', '.join(part.writes)}, and those given are {', '.join(known)}; give the one that it was made for"
                )
            if (one.reads, one.writes) != (part.reads, part.writes):
                raise SaekitError(
                    f"the steering is of {', '.join(part.writes)} and the dictionary writes {', '.join(one.writes) or 'nowhere'}; set its reads and writes to those"
                )
            out.append((one, edits_of(one, list(part.edits))))
        return out

    def save(self, path: "str | Path") -> Path:
        """Write it as JSON, whole or not at all; conditions that are functions can't be written."""
        data = {
            "schema": SCHEMA, "error": self.error, "masked": self.masked,
            "dictionaries": [{
                "digest": part.digest, "reads": list(part.reads), "writes": list(part.writes),
                "n_features": part.n_features, "edits": [_plain(edit) for edit in part.edits],
            } for part in self.parts],
        }  # fmt: skip
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(data, indent=1).encode())
        except OSError as problem:
            raise SaekitError(
                f"path {str(path)!r} can't be written: {problem.strerror}; choose another"
            ) from None
        return path

    @staticmethod
    def load(path: "str | Path") -> "Steering":
        """Read one back; a missing, unknown or misshapen field raises by name."""
        data = records.read(Path(path), "a steering", SHAPE, FIX, SCHEMA)
        if not data["dictionaries"]:
            raise SaekitError(f"steering {str(path)!r} has no dictionaries; {FIX}")
        parts = []
        for one in data["dictionaries"]:
            try:
                edits = tuple(_edit(edit) for edit in one["edits"])
            except SaekitError as problem:
                raise SaekitError(f"steering {str(path)!r}: {problem}") from None
            parts.append(
                Part(one["digest"], tuple(one["reads"]), tuple(one["writes"]), one["n_features"], edits)
            )
        return Steering(tuple(parts), data["error"], data["masked"])

    def save_pretrained(self, model: "Model | str | nn.Module", dictionary: Any, out: "str | Path") -> Path:
        """Write the steered model as an ordinary checkpoint of transformers, in which biases do what the steering does.

        For edits that add to features at every token, without conditions, with the error kept and ``masked=False`` (a bias
        acts on special tokens too). The place must be one that an MLP or an attention layer writes to the residual stream;
        where the projection has no bias, it is made if the architecture's config can (Llama's ``mlp_bias``). All else is
        refused with the reason. What was written is loaded and compared with the steered model before it gets its name.
        """
        listed = self.pairs(dictionary)
        self._check_linear(listed)
        return _write_checkpoint(load_model(model), listed, Path(out))

    def _check_linear(self, listed: Changes) -> None:
        """Raise unless the steering adds the same at every token."""
        reason = None
        if not self.error:
            reason = "it puts reconstructions in the place of activations (error=False)"
        elif self.masked:
            reason = "it leaves special tokens alone, which a bias can't; make it with masked=False"
        for dictionary, edits in listed:
            if dictionary.wiring.kind == "transforms":
                reason = reason or "features of a mixture of transforms write what they make of the input"
            for edit in edits:
                if edit.add is None:
                    way = next(way for way in WAYS if getattr(edit, way) is not None)
                    reason = (
                        reason or f"what {way!r} does to feature {edit.feature} depends on its value; use add"
                    )
                elif edit.position is not None or edit.when is not None:
                    reason = reason or f"the edit of feature {edit.feature} acts at some tokens only"
        if reason is not None:
            raise SaekitError(f"the steering can't be a bias: {reason}")


def _plain(edit: Edit) -> dict[str, Any]:
    """An edit as JSON has it."""
    if edit.when is not None and not isinstance(edit.when, When):
        raise SaekitError(
            f"when of an edit of feature {edit.feature} is a function, which no file can hold; use a When, or give it where you steer"
        )
    out: dict[str, Any] = {"feature": int(edit.feature)}
    for way in WAYS:
        value = getattr(edit, way)
        if way == "clamp" and value is not None:
            out[way] = [None if end is None else float(end) for end in value]
        elif value is not None:
            out[way] = float(value)
    if edit.position is not None:
        out["position"] = int(edit.position)
    if edit.when is not None:
        out["when"] = {"feature": int(edit.when.feature), "above": float(edit.when.above)}
    return out


def _edit(data: dict[str, Any]) -> Edit:
    """An edit from JSON."""
    unknown = next((key for key in data if key not in (*WAYS, "feature", "position", "when")), None)
    if unknown is not None:
        raise SaekitError(f"an edit has a field {unknown!r} that is none; {FIX}")
    fields = {key: value for key, value in data.items() if value is not None}
    if "clamp" in fields:
        fields["clamp"] = tuple(fields["clamp"])
    if "when" in fields:
        records.check(fields["when"], {"feature": int, "above": float}, "a condition", FIX)
        fields["when"] = When(fields["when"]["feature"], fields["when"]["above"])
    return Edit(**fields)


@torch.no_grad()
def _constants(dictionary: Any, edits: list[Edit]) -> dict[str, Tensor]:
    """What edits that add write at each hook point, [d]: the same whatever is read."""
    layered = isinstance(dictionary, CrossLayer)
    out: dict[str, Tensor] = {}
    for part, width in enumerate(dictionary.wiring.parts_in):
        x = torch.zeros(1, 1, width, device=dictionary.device, dtype=dictionary.dtype)
        change = change_of(dictionary, edits, x, part if layered else None, 0)
        if change is None:
            continue
        for place in range(*(dictionary.wiring.written(part) if layered else (0, len(dictionary.writes)))):
            vector = written_by(dictionary, change, x, part, place, layered)[0, 0]
            point = dictionary.writes[place]
            out[point] = out[point] + vector if point in out else vector
    return out


def _carrier(model: Model, point: str) -> tuple[str, str]:
    """The path of the projection whose bias adds to the stream what is added at a hook point, and the half that it is of."""
    site, blocks = model.site(point), model.block_path
    found = re.fullmatch(re.escape(blocks or "") + r"\.(\d+)(?:\.(.+))?", site.path) if blocks else None
    if found is None:
        raise SaekitError(
            f"the steering can't be a bias: hook point {point!r} is at no block of model {model.name!r}"
        )
    layer, rest = int(found[1]), found[2] or ""
    if not rest and site.side == "in":  # what goes into a block is what came out of the one before
        layer -= 1
    modules = dict(model.module.named_modules())
    block = modules.get(f"{blocks}.{layer}")
    if block is None:
        raise SaekitError(
            f"the steering can't be a bias: before hook point {point!r} there are embeddings only, which have none"
        )
    children = dict(block.named_children())
    if "post_feedforward_layernorm" in children:
        raise SaekitError(
            f"the steering can't be a bias: model {model.name!r} normalises what its layers write before it is added to the stream"
        )
    for half, (names, projections, _) in PROJECTIONS.items():
        own = next((name for name in names if name in children), None)
        inner = next((p for p in projections if own and hasattr(children[own], p)), None)
        wanted = {own, f"{own}.{inner}"} if rest or half == "attention" else {""}
        if own and inner and rest in wanted and (site.side == "out" or not rest):
            return f"{blocks}.{layer}.{own}.{inner}", half
    raise SaekitError(
        f"the steering can't be a bias: hook point {point!r} ({site.path}, {site.side}) is no place that an attention layer or MLP of a known make writes to the stream"
    )


@torch.no_grad()
def _with_biases(model: Model, vectors: dict[str, tuple[Tensor, str]]) -> tuple[Any, dict[str, Tensor]]:
    """Config and tensors of the model with vectors added to the biases of its projections, made where there are none."""
    module: Any = model.module
    config, state = copy.deepcopy(module.config), dict(module.state_dict())
    missing = {path: half for path, (_, half) in vectors.items() if f"{path}.bias" not in state}
    for half in missing.values():
        flag = PROJECTIONS[half][2]
        if getattr(config, flag, None) is False:
            setattr(config, flag, True)
    if missing:
        with torch.device("meta"):
            names = {name: t.shape for name, t in type(module)(config).state_dict().items()}
        path = next((path for path in missing if f"{path}.bias" not in names), None)
        if path is not None:
            raise SaekitError(
                f"the steering can't be a bias: {path!r} of model {model.name!r} has none, and no setting of {type(config).__name__} gives it one"
            )
        like = state[f"{next(iter(missing))}.weight"]
        state |= {name: like.new_zeros(shape) for name, shape in names.items() if name not in state}
    for path, (vector, _) in vectors.items():
        bias = state[f"{path}.bias"]
        state[f"{path}.bias"] = bias + vector.to(bias)
    config.architectures = [type(module).__name__]
    return config, state


def _write_checkpoint(model: Model, listed: Changes, out: Path) -> Path:
    """Write a checkpoint in which biases carry what the edits add; whole or not at all."""
    module: Any = model.module
    if not hasattr(module, "save_pretrained") or not hasattr(module, "config"):
        raise SaekitError(
            f"model {model.name!r} is a {type(module).__name__}, which transformers can't save; give a model of transformers"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SaekitError(f"out {str(out)!r} holds something already; choose a new folder")
    vectors: dict[str, tuple[Tensor, str]] = {}
    for dictionary, edits in listed:
        for point, vector in _constants(dictionary.to(model.device), edits).items():
            path, half = _carrier(model, point)
            before = vectors[path][0] if path in vectors else 0
            vectors[path] = (before + vector, half)
    config, state = _with_biases(model, vectors)
    check_writable(out.parent)
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        module.save_pretrained(unfinished, state_dict=state)
        config.save_pretrained(unfinished)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(unfinished)
        _compare(model, listed, unfinished)
        unfinished.replace(out)  # which may be an empty folder
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


@torch.no_grad()
def _compare(model: Model, listed: Changes, folder: Path) -> None:
    """Raise unless the checkpoint computes what the steered model does."""
    written = load_model(folder, device=model.device, dtype=next(model.module.parameters()).dtype)
    module: Any = model.module
    n = module.get_input_embeddings().weight.shape[0]
    ids = torch.randint(n, PROBE, generator=torch.Generator().manual_seed(0))
    given = model.inputs(ids, torch.ones_like(ids, dtype=torch.bool))
    theirs = written(given)[0]
    with intervened(model, listed):
        ours = model(given)[0]
    off = float((theirs - ours).norm() / ours.norm())
    if not off <= TOLERANCES.get(ours.dtype, 1e-5):
        raise SaekitError(
            f"the steering can't be a bias: with it model {model.name!r} misses the steered one by {off:.2g} of its outputs' norm, so what its layers write is changed before it is added"
        )
