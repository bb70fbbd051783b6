"""Features set, scaled, added to or ablated in a running model: the one engine behind circuits and steering.

What a feature writes changes by ``(new value - value) * direction`` at the places that its dictionary writes; all else
that is there, the dictionary's error included, stays, and the model behind it reacts as it does.
"""

import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.dictionaries.sequences import Sequences
from saekit.hooks import Clock, Site, intervene, passes, whole_sequences
from saekit.models import Model, load_model
from saekit.types import Codes, SaekitError

WAYS = ("set", "scale", "add")


@dataclass(frozen=True)
class Edit:
    """One feature's new value: ``set`` to a number, times ``scale``, or plus ``add``; ``scale=0`` ablates.

    ``position`` counts from the text's beginning (None: everywhere); a set feature need not have been active.
    Values of another run are patched in by setting them.
    """

    feature: int
    position: int | None = None
    set: float | None = None
    scale: float | None = None
    add: float | None = None

    def __post_init__(self):
        given = [way for way in WAYS if getattr(self, way) is not None]
        if len(given) != 1:
            raise SaekitError(
                f"an edit of feature {self.feature} has {given or 'nothing'}; give one of set, scale and add"
            )
        value = getattr(self, given[0])
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise SaekitError(
                f"{given[0]} = {value!r} of an edit of feature {self.feature} must be a finite number"
            )
        if not isinstance(self.feature, numbers.Integral):
            raise SaekitError(f"feature {self.feature!r} of an edit must be a number of a feature")
        if self.position is not None and (
            not isinstance(self.position, numbers.Integral) or self.position < 0
        ):
            raise SaekitError(
                f"position {self.position} of an edit must be counted from the beginning, from 0"
            )

    def of(self, value: Tensor) -> Tensor:
        """The new value."""
        if self.set is not None:
            return torch.full_like(value, self.set)
        return value * self.scale if self.scale is not None else value + (self.add or 0.0)


Edits = Mapping[int, float] | Sequence[Edit]


def pairs(changes: Any) -> list[tuple[Dictionary, list[Edit]]]:
    """Dictionaries and their edits; raises where they are anything else."""
    if not isinstance(changes, Sequence):
        raise SaekitError(
            f"changes are a {type(changes).__name__}; give a list of pairs of a dictionary and edits"
        )
    for change in changes:
        one = change[0] if isinstance(change, tuple | list) and len(change) == 2 else change
        if one is change or not isinstance(one, Dictionary):
            raise SaekitError(
                f"changes has a {type(one).__name__}; give pairs of a dictionary and edits, as in [(dictionary, {{3: 0.0}})]"
            )
    return [(dictionary, edits_of(dictionary, edits)) for dictionary, edits in changes]


def edits_of(dictionary: Dictionary, edits: Edits) -> list[Edit]:
    """Edits of a dictionary's features; a mapping gives values to set."""
    if not isinstance(edits, Mapping | Sequence):
        raise SaekitError(f"edits are a {type(edits).__name__}; give a list of edits, or {{feature: value}}")
    listed = [Edit(f, set=v) for f, v in edits.items()] if isinstance(edits, Mapping) else list(edits)
    for edit in listed:
        if not isinstance(edit, Edit):
            raise SaekitError(f"edit {edit!r} is none; write Edit(feature, set=..., scale=... or add=...)")
        if not 0 <= edit.feature < dictionary.n_features:
            raise SaekitError(f"feature {edit.feature} is none of the dictionary's {dictionary.n_features}")
    return listed


@contextmanager
def intervened(
    model: "Model | str | nn.Module", changes: "Sequence[tuple[Dictionary, Edits]]"
) -> Iterator[Model]:
    """Run the model with edits of dictionaries' features; also in generation, with or without cached keys and values.

    The hooks are gone when the context ends, however it ends. Edits at positions that no pass came to are warned of.
    """
    model = load_model(model)
    hooks: list[tuple[Site, Any]] = []
    listed = pairs(changes)
    with ExitStack() as stack:
        clock = stack.enter_context(passes(model.module))
        for dictionary, edits in listed:
            if not dictionary.writes:
                raise SaekitError(
                    "a dictionary doesn't name its hook points; set reads and writes, or train it on a store"
                )
            if not edits:
                continue
            hooks += _hooks(model, dictionary, edits, clock)
            if isinstance(dictionary, Sequences):
                stack.enter_context(whole_sequences(model.module))
        stack.enter_context(intervene(hooks))
        yield model
        missed = [
            e for _, edits in listed for e in edits if e.position is not None and e.position >= clock.end
        ]
        if missed and clock.end:
            warnings.warn(
                f"the edit of feature {missed[0].feature} at position {missed[0].position} did nothing: the longest text had {clock.end} tokens",
                stacklevel=3,
            )


def _hooks(model: Model, dictionary: Dictionary, edits: list[Edit], clock: Clock) -> list[tuple[Site, Any]]:
    """What reads a dictionary's places, and what adds to those that it writes."""
    reads, writes = dictionary.reads, dictionary.writes
    layered = isinstance(dictionary, CrossLayer)
    if len(reads) > 1 and not layered:
        raise SaekitError(
            f"a dictionary reads {', '.join(reads)} at once; edit features of dictionaries of one place"
        )
    added: dict[int, list[Tensor]] = {}  # by place that is written, in the pass that runs

    def see(part: int) -> Any:
        def read(x: Tensor) -> None:
            change = change_of(dictionary, edits, x, part if layered else None, clock.start)
            if change is None:
                return
            wiring: Any = dictionary.wiring
            for place in range(*(wiring.written(part) if layered else (0, len(writes)))):
                added.setdefault(place, []).append(written_by(dictionary, change, x, part, place, layered))

        return read

    def change_at(place: int) -> Any:
        def add(x: Tensor) -> Tensor | None:
            if reads == writes:
                see(place)(x)
            return sum(added.pop(place, []), x)

        return add

    hooks = [] if reads == writes else [(model.site(point), see(i)) for i, point in enumerate(reads)]
    return hooks + [(model.site(point), change_at(i)) for i, point in enumerate(writes)]


def change_of(dictionary: Any, edits: list[Edit], x: Tensor, layer: int | None, start: int) -> Codes | None:
    """By how much the codes of edited features change; of a layer, its features count from 0."""
    each = dictionary.n_features if layer is None else dictionary.n_features // dictionary.layers
    first = 0 if layer is None else layer * each
    seq = x.shape[1]
    here = [
        e for e in edits
        if first <= e.feature < first + each and (e.position is None or start <= e.position < start + seq)
    ]  # fmt: skip
    if not here:
        return None
    features = sorted({e.feature - first for e in here})
    codes = dictionary.encode(x) if layer is None else dictionary.encode_layer(layer, x)
    old = codes.select(torch.tensor(features, device=x.device))
    new = old.clone()
    for edit in here:
        at = (
            slice(None),
            slice(None) if edit.position is None else edit.position - start,
            features.index(edit.feature - first),
        )
        new[at] = edit.of(new[at])
    indices = torch.tensor(features, device=x.device).expand(old[..., 0].numel(), -1)
    return Codes.from_rectangular(indices, (new - old).flatten(0, -2), codes.n_features, tuple(x.shape[:2]))


def written_by(dictionary: Any, change: Codes, x: Tensor, part: int, place: int, layered: bool) -> Tensor:
    """What a change of codes adds at a place; decoding is linear but for what it adds to nothing."""
    nothing = change.with_values(torch.zeros_like(change.values))
    if layered:
        some = [change if i == part else nothing for i in range(place + 1)]
        moved = dictionary.decode_layer(place, some) - dictionary.decode_layer(place, [nothing] * (place + 1))
    else:
        moved = dictionary.decode(change, x) - dictionary.decode(nothing, x)
        moved = moved.split(dictionary.wiring.parts_out, -1)[place]
    return moved.to(x.dtype).view(*x.shape[:2], *moved.shape[2:])
