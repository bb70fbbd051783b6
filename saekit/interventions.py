"""Features set, scaled, added to, clamped or ablated in a running model: the one engine behind circuits and steering.

What a feature writes changes by ``(new value - value) * direction`` at the places that its dictionary writes; all else
that is there, the dictionary's error included, stays, and the model behind it reacts as it does.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.dictionaries.sequences import Sequences
from saekit.hooks import Clock, Site, intervene, passes, whole_sequences
from saekit.models import Model, load_model
from saekit.tokens import Special
from saekit.types import Codes, SaekitError

WAYS = ("set", "scale", "add", "clamp")


@dataclass(frozen=True)
class When:
    """A condition: the code of ``feature``, as the model has it, lies above a bound (0: the feature is active)."""

    feature: int
    above: float = 0.0

    def __post_init__(self):
        if not isinstance(self.feature, numbers.Integral) or isinstance(self.feature, bool):
            raise SaekitError(f"feature {self.feature!r} of a condition must be a number of a feature")
        if not _finite(self.above):
            raise SaekitError(f"above = {self.above!r} of a condition must be a finite number")


Condition = When | Callable[[Tensor], Tensor]


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


@dataclass(frozen=True)
class Edit:
    """One feature's new value: ``set`` to a number, times ``scale``, plus ``add``, or brought into the range ``clamp``.

    ``scale=0`` ablates; of ``clamp=(low, high)`` one side may be None, for no bound. ``position`` counts from the text's
    beginning, behind padding on the left (None: everywhere); a set feature need not have been active. Values of another
    run are patched in by setting them. ``when`` says where: a :class:`When`, or a function of a pass's token ids
    [batch, seq] to booleans of the same shape. With cached keys and values it sees the new tokens alone, so it must judge
    each token by itself.
    """

    feature: int
    position: int | None = None
    set: float | None = None
    scale: float | None = None
    add: float | None = None
    clamp: tuple[float | None, float | None] | None = None
    when: Condition | None = None

    def __post_init__(self):
        given = [way for way in WAYS if getattr(self, way) is not None]
        if len(given) != 1:
            raise SaekitError(
                f"an edit of feature {self.feature} has {given or 'nothing'}; give one of set, scale and add, or clamp"
            )
        value = getattr(self, given[0])
        if self.clamp is not None:
            self._check_range(self.clamp)
        elif not _finite(value):
            raise SaekitError(
                f"{given[0]} = {value!r} of an edit of feature {self.feature} must be a finite number"
            )
        if not isinstance(self.feature, numbers.Integral) or isinstance(self.feature, bool):
            raise SaekitError(f"feature {self.feature!r} of an edit must be a number of a feature")
        if self.position is not None and (
            not isinstance(self.position, numbers.Integral) or self.position < 0
        ):
            raise SaekitError(
                f"position {self.position} of an edit must be counted from the beginning, from 0"
            )
        if self.when is not None and not isinstance(self.when, When) and not callable(self.when):
            raise SaekitError(
                f"when = {self.when!r} of an edit of feature {self.feature} must be a When or a function of token ids"
            )

    def _check_range(self, ends: Any) -> None:
        both = isinstance(ends, tuple | list) and len(ends) == 2
        bounds = [end for end in ends if end is not None] if both else []
        if not bounds or not all(map(_finite, bounds)) or bounds[0] > bounds[-1]:
            raise SaekitError(
                f"clamp = {ends!r} of an edit of feature {self.feature} must be (low, high), finite numbers with low <= high, one of which may be None"
            )

    def of(self, value: Tensor) -> Tensor:
        """The new value."""
        if self.set is not None:
            return torch.full_like(value, self.set)
        if self.clamp is not None:
            return value.clamp(*self.clamp)
        return value * self.scale if self.scale is not None else value + (self.add or 0.0)


Edits = Mapping[int, float] | Sequence[Edit]


@dataclass(frozen=True)
class Text:
    """Where a running pass is: each token's position ``at`` in its text, and what of it is edited.

    ``real`` is false on padding, ``edited`` where edits without a position don't act; ``reach`` are the positions that
    the pass may hold, which is known without a look at tensors that may be on a GPU.
    """

    at: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    edited: Bool[Tensor, "batch seq"]
    tokens: Int[Tensor, "batch seq"] | None
    reach: range

    @staticmethod
    def of(clock: Clock, x: Tensor, special: Tensor | None = None, limit: float | None = None) -> "Text":
        """The pass that runs, of which ``x`` [batch, seq, d] is an activation.

        ``special``: ids of tokens that aren't edited (None: all are); ``limit``: nor are tokens whose norm exceeds it.
        """
        batch, seq = x.shape[:2]
        at = torch.arange(clock.start, clock.start + seq, device=x.device).expand(batch, seq)
        real = torch.ones(batch, seq, dtype=torch.bool, device=x.device)
        reach = range(clock.start, clock.start + seq)
        whole, tokens = clock.attention, clock.tokens
        if whole is not None and len(whole) == batch and whole.shape[1] >= seq:
            whole = whole.to(x.device).bool()
            unsaid = max(0, clock.start + seq - whole.shape[1])  # cached tokens that the mask leaves out
            real, at = whole[:, -seq:], whole.long().cumsum(1)[:, -seq:] - 1 + unsaid
            reach = range(clock.start + seq)  # less far where padding stands on the left
        edited = real
        if not isinstance(tokens, Tensor) or tokens.shape != (batch, seq) or tokens.is_floating_point():
            tokens = None
        if special is not None and tokens is not None:
            edited = edited & ~torch.isin(tokens.to(x.device), special.to(x.device))
        if limit is not None:
            norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
            edited = edited & ~((norms > limit) & norms.isfinite())
        return Text(at, real, edited, tokens, reach)


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
            raise SaekitError(
                f"edit {edit!r} is none; write Edit(feature, set=..., scale=..., add=... or clamp=...)"
            )
        asked = [edit.feature, *([edit.when.feature] if isinstance(edit.when, When) else [])]
        for feature in asked:
            if not 0 <= feature < dictionary.n_features:
                raise SaekitError(f"feature {feature} is none of the dictionary's {dictionary.n_features}")
        if isinstance(dictionary, CrossLayer) and len({_layer_of(dictionary, f) for f in asked}) > 1:
            raise SaekitError(
                f"feature {asked[1]} of a condition is of another layer than feature {edit.feature}; ask for one of the same layer"
            )
    return listed


def _layer_of(dictionary: CrossLayer, feature: int) -> int:
    return feature // (dictionary.n_features // dictionary.layers)


@contextmanager
def intervened(
    model: "Model | str | nn.Module",
    changes: "Sequence[tuple[Dictionary, Edits]]",
    *,
    error: bool = True,
    masked: bool = False,
) -> Iterator[Model]:
    """Run the model with edits of dictionaries' features; also in generation, with or without cached keys and values.

    The hooks are gone when the context ends, however it ends. Edits at positions that no pass came to, padding counted, are
    warned of.
    Without ``error`` the dictionary's reconstruction takes the place of what the model has. ``masked``: special tokens,
    and tokens whose norm exceeds the limits of the dictionary's store, stay as they are but for edits that name their
    position (of a model without a tokenizer none is known to be special). Padding always does.
    """
    model = load_model(model)
    hooks: list[tuple[Site, Any]] = []
    listed = pairs(changes)
    _check_places(model, listed, error)
    with ExitStack() as stack:
        clock = stack.enter_context(passes(model.module))
        for dictionary, edits in listed:
            if error and not edits:
                continue
            hooks += _Editor(model, dictionary, edits, clock, error, masked).hooks()
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


def _check_places(model: Model, listed: "list[tuple[Dictionary, list[Edit]]]", error: bool) -> None:
    """Raise unless every dictionary can be edited where it stands, and reconstructions don't stand in one place."""
    taken: dict[tuple[str, str], str] = {}
    for dictionary, _ in listed:
        if not dictionary.writes:
            raise SaekitError(
                "a dictionary doesn't name its hook points; set reads and writes, or train it on a store"
            )
        if len(dictionary.reads) > 1 and not isinstance(dictionary, CrossLayer):
            raise SaekitError(
                f"a dictionary reads {', '.join(dictionary.reads)} at once; edit features of dictionaries of one place"
            )
        for point in dictionary.reads:
            model.site(point)
        for point in dictionary.writes:
            site = model.site(point)
            if not error and (site.path, site.side) in taken:
                raise SaekitError(
                    f"hook point {point!r} is written by two dictionaries, and error = False puts one in its place; leave one out"
                )
            taken[site.path, site.side] = point


class _Editor:
    """One dictionary's edits: what reads its places, and what adds to those that it writes."""

    def __init__(
        self, model: Model, dictionary: Dictionary, edits: list[Edit], clock: Clock, error: bool, masked: bool
    ):
        self.model, self.dictionary, self.edits, self.clock, self.error = (
            model,
            dictionary,
            edits,
            clock,
            error,
        )
        self.layered = isinstance(dictionary, CrossLayer)
        ids = sorted(Special.of(model.tokenizer).all) if masked and model.tokenizer is not None else None
        self.special = None if ids is None else torch.tensor(ids, dtype=torch.int64)
        limits = dictionary.card.get("data", {}).get("norm_limits", {}) if masked else {}
        self.limits = [limits.get(point) for point in dictionary.reads]
        self.added: dict[int, list[Tensor]] = {}  # by place that is written, in the pass that runs
        self.read: list[
            tuple[Codes, Tensor, Text]
        ] = []  # of the parts that have been read, without the error

    def hooks(self) -> list[tuple[Site, Any]]:
        """Functions at sites, in the order in which they have to be registered."""
        reads, writes = self.dictionary.reads, self.dictionary.writes

        def see(part: int) -> Any:
            return lambda x: self._see(part, x)

        def write(place: int) -> Any:
            def written(x: Tensor) -> Tensor:
                if reads == writes:
                    self._see(place, x)
                return self._write(place, x)

            return written

        hooks = [] if reads == writes else [(self.model.site(p), see(i)) for i, p in enumerate(reads)]
        return hooks + [(self.model.site(p), write(i)) for i, p in enumerate(writes)]

    def _see(self, part: int, x: Tensor) -> None:
        d, layer = self.dictionary, part if self.layered else None
        if part == 0:
            self.added.clear()  # of a pass that was stopped before it came to what is written
        text = Text.of(self.clock, x, self.special, self.limits[part])
        codes = _encoded(d, x, layer)
        change = _change(d, codes, self.edits, layer, text)
        if not self.error:
            del self.read[part:]  # of the pass before
            self.read.append((codes, x, text))
        if change is None:
            return
        wiring: Any = d.wiring
        for place in range(*(wiring.written(part) if self.layered else (0, len(d.writes)))):
            self.added.setdefault(place, []).append(written_by(d, change, x, part, place, self.layered))

    def _write(self, place: int, y: Tensor) -> Tensor:
        added = self.added.pop(place, [])
        if self.error:
            return sum(added, y)
        d: Any = self.dictionary
        if self.layered:
            hat = d.decode_layer(place, [codes for codes, _, _ in self.read[: place + 1]])
        else:
            codes, x, _ = self.read[0]
            hat = d.decode(codes, x).split(d.wiring.parts_out, -1)[place]
        text = self.read[place if self.layered else 0][2]
        return torch.where(text.edited[..., None], sum(added, hat.to(y.dtype).view(y.shape)), y)


def _encoded(dictionary: Any, x: Tensor, layer: int | None) -> Codes:
    return dictionary.encode(x) if layer is None else dictionary.encode_layer(layer, x)


def change_of(dictionary: Any, edits: list[Edit], x: Tensor, layer: int | None, start: int) -> Codes | None:
    """By how much the codes of edited features change in a text that begins at ``start``; of a layer, its features count from 0."""
    if any(edit.when is not None for edit in edits):
        raise SaekitError(
            "an edit has a condition, and where nothing reacts there are none; edit with intervened or steer"
        )
    at = torch.arange(start, start + x.shape[1], device=x.device).expand(x.shape[:2])
    everywhere = torch.ones_like(at, dtype=torch.bool)
    codes = _encoded(dictionary, x, layer)
    return _change(
        dictionary,
        codes,
        edits,
        layer,
        Text(at, everywhere, everywhere, None, range(start, start + x.shape[1])),
    )


def _change(dictionary: Any, codes: Codes, edits: list[Edit], layer: int | None, text: Text) -> Codes | None:
    each = dictionary.n_features if layer is None else dictionary.n_features // dictionary.layers
    first = 0 if layer is None else layer * each
    here = [
        e for e in edits
        if first <= e.feature < first + each and (e.position is None or e.position in text.reach)
    ]  # fmt: skip
    if not here:
        return None
    features = sorted({e.feature - first for e in here})
    device = codes.values.device
    old = codes.select(torch.tensor(features, device=device))
    columns = list(old.unbind(-1))
    for edit in here:
        i = features.index(edit.feature - first)
        columns[i] = torch.where(_where(edit, text, codes, first), edit.of(columns[i]), columns[i])
    change = torch.stack(columns, -1) - old
    indices = torch.tensor(features, device=device).expand(text.at.numel(), -1)
    return Codes.from_rectangular(
        indices, change.flatten(0, -2), codes.n_features, (text.at.shape[0], text.at.shape[1])
    )


def _where(edit: Edit, text: Text, codes: Codes, first: int) -> Bool[Tensor, "batch seq"]:
    """The tokens at which an edit acts."""
    here = text.edited if edit.position is None else text.real & (text.at == edit.position)
    if edit.when is None:
        return here
    if isinstance(edit.when, When):
        asked = codes.select(torch.tensor([edit.when.feature - first], device=here.device))[..., 0]
        return here & (asked > edit.when.above)
    if text.tokens is None:
        raise SaekitError(
            f"when of an edit of feature {edit.feature} is a function of token ids, and the model runs on none; run it on input_ids, or give a When"
        )
    chosen: Any = edit.when(text.tokens)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != here.shape:
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise SaekitError(
            f"when of an edit of feature {edit.feature} gave {got} for token ids {tuple(here.shape)}; return booleans of the same shape"
        )
    return here & chosen.to(here.device)


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
