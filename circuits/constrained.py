"""Edits of features in a frozen model: what they do while attention, norms, gates and the choice of features stay.

The counterpart of :func:`saekit.intervened`, in which everything reacts. What changes here is linear in the edits, and
is what attribution graphs speak of.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.circuits.frozen import Site, canonical
from saekit.circuits.intervene import FrozenPass
from saekit.circuits.places import sites_of
from saekit.circuits.rows import Own, Trace
from saekit.circuits.trace import traced
from saekit.circuits.weights import final_norm
from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.hooks import Clock, intervene, passes
from saekit.hooks import Site as Hook
from saekit.interventions import Edit, Edits, change_of, pairs, written_by
from saekit.models import Model, load_model
from saekit.types import SaekitError


@contextmanager
def constrained(
    model: "Model | str | nn.Module",
    changes: Sequence[tuple[Dictionary, Edits]],
    prompt: "str | Sequence[int] | Int[Tensor, ' seq']",
    react: bool = True,
) -> Iterator[Model]:
    """Run the model on a prompt with edits of features, all else frozen; also in generation, with cached keys or without.

    On the prompt, attention patterns, norms' sizes, neurons' slopes and the choice of features stay as they are
    without the edits. ``react``: active features of all dictionaries given (those with no edits too) write what they
    make of their changed inputs, so that effects are total; else they write what they wrote, and effects are direct.
    Edited features have the values that edits give them. Tokens generated behind the prompt react freely to it; the
    model runs on nothing but this prompt and what follows it.
    """
    model = load_model(model)
    listed = pairs(changes)
    run = traced(model, [dictionary for dictionary, _ in listed], prompt)
    edits = [each for _, each in listed]
    for edit in (edit for each in edits for edit in each):
        if edit.position is not None and edit.position >= run.seq:
            raise SaekitError(
                f"position {edit.position} of an edit of feature {edit.feature} lies behind the prompt's {run.seq} tokens, where nothing is frozen; edit it with intervened"
            )
    run.readers = {
        key: [_without(own, edits[own.stand]) for own in parts] for key, parts in run.readers.items()
    }
    moved: dict[Site, Tensor] = {}
    for dictionary, each in listed:
        for site, change in _moved(run, model, dictionary, each):
            moved[site] = moved[site] + change if site in moved else change
    with torch.no_grad():
        out = FrozenPass(run, moved, react)
    with passes(model.module) as clock, intervene(_hooks(model, run, out, clock)):
        yield model


def _check(tokens: Int[Tensor, " seq"], clock: Clock) -> None:
    """Refuse a pass on other tokens than the prompt's; what comes behind them is free."""
    ids = clock.tokens
    if ids is None:
        return
    due = tokens[clock.start : clock.start + ids.shape[1]]
    if clock.start + ids.shape[1] < len(tokens) or not bool((ids[:, : len(due)] == due).all()):
        raise SaekitError(
            "the model runs on other tokens than the prompt that it is frozen on; give constrained this prompt"
        )


def _moved(run: Trace, model: Model, d: Dictionary, edits: list[Edit]) -> Iterator[tuple[Site, Tensor]]:
    """What edits of a dictionary add at the sites that it writes, [1, seq, d]."""
    reads, writes = sites_of(run.frozen.weights, model, d)
    parts: list[int | None] = list(range(len(reads))) if isinstance(d, CrossLayer) else [None]
    for part in parts:
        x = run.frozen.at(reads[part or 0])[None].to(d.device, d.dtype)
        change = change_of(d, edits, x, part, 0)
        if change is None:
            continue
        wiring: Any = d.wiring
        for place in range(*(wiring.written(part) if part is not None else (0, len(writes)))):
            written = written_by(d, change, x, part or 0, place, part is not None)
            yield canonical(writes[place]), written.to(run.frozen.last)


def _without(own: Own, edits: list[Edit]) -> Own:
    """A part without the entries that are edited: they don't react."""
    part, edited = own.part, torch.zeros_like(own.part.positions, dtype=torch.bool)
    for edit in edits:
        here = part.features == edit.feature
        edited |= here if edit.position is None else here & (part.positions == edit.position)
    if not edited.any():
        return own
    names = ("positions", "features", "values", "w", "b")
    left = {name: getattr(part, name)[~edited] for name in names}
    heads = None if part.heads is None else part.heads[~edited]
    written = tuple(vectors[~edited] for vectors in part.written)
    return dataclasses.replace(own, part=dataclasses.replace(part, **left, heads=heads, written=written))


def _hooks(model: Model, run: Trace, out: FrozenPass, clock: Clock) -> list[tuple[Hook, Any]]:
    """What puts the frozen pass in the place of the prompt's stream, at each block and behind the last norm."""
    begin = _put(out.seen[0]["resid_pre"], clock)

    def checked(x: Tensor) -> Tensor | None:
        _check(run.frozen.tokens, clock)
        return begin(x)

    hooks: list[tuple[Hook, Any]] = [(model.site(f"{model.block_path}.0:in"), checked)]
    hooks += [
        (model.site(f"{model.block_path}.{layer}:out"), _put(seen["resid_post"], clock))
        for layer, seen in enumerate(out.seen)
    ]
    w, module = run.frozen.weights, final_norm(model)
    if w.norm is not None and module is not None:
        x = out.last - out.last.mean(-1, keepdim=True) if w.norm.centred else out.last
        normed = x / w.norm.size(run.frozen.last) * w.norm.weight + w.norm.bias
        hooks.append((Hook(module, "out", "final norm"), _put(normed, clock)))
    return hooks


def _put(stream: Float[Tensor, "1 seq d"], clock: Clock) -> Callable[[Tensor], Tensor | None]:
    def put(x: Tensor) -> Tensor | None:
        n = min(stream.shape[1] - clock.start, x.shape[1])
        if n <= 0:
            return None
        new = x.clone()
        new[:, :n] = stream[:, clock.start : clock.start + n].to(x)
        return new

    return put
