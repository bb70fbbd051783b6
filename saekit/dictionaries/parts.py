"""A dictionary on one sequence as a linear map with its choices frozen: what each active feature reads and writes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.attention import Patterns
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.normalisation import Normalisation
from saekit.dictionaries.sequences import Sequences
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class Attending:
    """What makes a part's patterns: the module, the input that it reads, and what that was normalised by."""

    module: Patterns
    x: Float[Tensor, "seq d_in"]
    norm: Normalisation | None = None


@dataclass(frozen=True)
class Part:
    """Active features that read one place: ``value = w x + b`` at their position, and what each writes.

    ``read`` counts the dictionary's places that are read, ``writes`` those that are written; ``written`` has
    [entry, d] for each of the latter. Of features behind attention, x is what ``heads`` gather by
    ``patterns`` [head, query, source]. Entries stand in the order of their positions.
    """

    read: int
    writes: tuple[int, ...]
    positions: Int[Tensor, " entry"]
    features: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    w: Float[Tensor, "entry d"]
    b: Float[Tensor, " entry"]
    written: tuple[Tensor, ...]
    patterns: Float[Tensor, "head query source"] | None = None
    heads: Int[Tensor, " entry"] | None = None
    attending: Attending | None = None


@dataclass(frozen=True)
class Constant:
    """What is written beside the features: ``b`` [d_out] always, and ``skip`` [d_out, d_in] of what is read."""

    b: Float[Tensor, " d_out"]
    skip: Float[Tensor, "d_out d_in"] | None


@torch.no_grad()
def parts(d: Dictionary, x: Float[Tensor, "seq d_in"]) -> list[Part]:
    """The active features of a dictionary on a sequence, for each place that it reads.

    Together with :func:`constant` what they write is the reconstruction: ``sum written + b + skip x = d(x)``.
    """
    if isinstance(d, CrossLayer):
        return [_layer(d, layer, part) for layer, part in enumerate(x.split(d.wiring.parts_in, -1))]
    codes = d.encode(x)
    weight, bias = d.read_by(codes, x)
    written = d.written_by(codes, x).split(d.wiring.parts_out, -1)
    one = _part(codes, 0, tuple(range(len(written))), weight, bias, written)
    if not isinstance(d, Sequences):
        return [one]
    heads = one.features // (d.n_features // d.n_qk)
    read = d.norm_in(x.to(d.device, d.dtype))
    attending = Attending(d.wiring.patterns, read, d.norm_in)
    return [
        dataclasses.replace(one, patterns=d.wiring.patterns(read[None])[0], heads=heads, attending=attending)
    ]


def _part(
    codes: Codes, read: int, writes: tuple[int, ...], w: Tensor, b: Tensor, written: Sequence[Tensor], first: int = 0
) -> Part:  # fmt: skip
    """Without the entries that are 0; ``first`` is added to the features' numbers."""
    on = codes.values != 0
    return Part(
        read, writes, codes.row_ids()[on], codes.indices.long()[on] + first, codes.values[on], w[on], b[on],
        tuple(part[on] for part in written),
    )  # fmt: skip


def _layer(d: CrossLayer, layer: int, x: Tensor) -> Part:
    part, norm = d.parts[layer], d.norm_in.some(layer, layer + 1)
    first, stop = d.wiring.written(layer)
    read = norm(x.to(d.dtype).clone())
    codes = part.encode(read)
    weight, bias = part.read_by(codes, read)
    weight, shift = norm.fold(weight)
    written = d.norm_out.some(first, stop).directions(part.written_by(codes, read))
    sides = written.split(d.wiring.parts_out[first:stop], -1)
    own = layer * (d.n_features // d.layers)
    return _part(
        codes, layer, tuple(range(first, stop)), weight.to(d.dtype), (bias + shift).to(d.dtype), sides, own
    )


@torch.no_grad()
def constant(d: Dictionary) -> Constant:
    """What a dictionary writes whatever is active."""
    if d.norm_in.by_rows:
        raise SaekitError(
            f"normalise = {d.norm_in.kind!r} gives each row units of its own, so nothing is written whatever is active; choose a dictionary with normalise = 'scale' or 'none'"
        )
    b, skip = d.b_dec, getattr(d.wiring, "skip", None)
    if skip is not None:
        skip, shift = d.norm_in.fold(skip)
        b = b + shift.to(b)
        skip = d.norm_out.directions(skip.T.to(b)).T
    return Constant(d.norm_out.invert(b[None])[0], skip)
