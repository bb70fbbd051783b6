"""Where dictionaries, neurons and heads stand in a frozen model, and what they read and write there."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Frozen, Site, canonical, depth
from saekit.dictionaries import Dictionary
from saekit.dictionaries.parts import Attending, Part, constant, parts
from saekit.models import Model
from saekit.types import SaekitError


@dataclass(frozen=True)
class Neurons:
    """The neurons of an MLP as features: what they are multiplied by is frozen, and nothing is left over."""

    hook_point: str


@dataclass(frozen=True)
class Heads:
    """The dimensions of an attention layer's heads as features, n_heads * d_head of them; nothing is left over."""

    hook_point: str


Stand = Dictionary | Neurons | Heads


@dataclass(frozen=True)
class Written:
    """One place that is written: what is left over there (None: nothing) and what is written whatever is active."""

    site: Site
    error: Float[Tensor, "seq d"] | None
    constant: Float[Tensor, " d"]
    skip: "tuple[Site, Float[Tensor, 'd_out d_in']] | None" = None


@dataclass(frozen=True)
class Placed:
    """A stand on a prompt: its parts, each with the site that it reads and those that it writes."""

    name: str
    parts: tuple[tuple[Part, Site, tuple[Site, ...]], ...]
    written: tuple[Written, ...]


@torch.no_grad()
def place(frozen: Frozen, model: Model, stand: Stand) -> Placed:
    """A stand in its place; raises where it doesn't fit into the model."""
    if isinstance(stand, Neurons):
        return _neurons(frozen, model, stand)
    if isinstance(stand, Heads):
        return _heads(frozen, model, stand)
    reads, writes = ([_site(frozen, model, p) for p in points] for points in (stand.reads, stand.writes))
    if not writes:
        raise SaekitError(
            "a dictionary doesn't name its hook points; set reads and writes, or train it on a store"
        )
    by_layer = stand.wiring.kind == "cross_layer"
    if len(reads) > 1 and not by_layer:
        raise SaekitError(
            f"a dictionary reads {', '.join(stand.reads)} at once, and its features would act on what came before them; trace with dictionaries of one place, or a cross-layer transcoder"
        )
    for read, write in zip(reads, writes, strict=True):
        if depth(read) > depth(write):
            raise SaekitError(f"a dictionary reads {read} behind {write}, which it writes; swap them")
    x = torch.cat([frozen.at(site) for site in reads], -1)
    _check_widths(stand, x.shape[-1], frozen, writes)
    x = x.to(stand.dtype)
    hats = stand(x).split(stand.wiring.parts_out, -1)
    fixed = constant(stand)
    written = tuple(
        Written(site, frozen.at(site) - hat.to(frozen.at(site)), b, None if fixed.skip is None else (reads[0], fixed.skip))
        for site, hat, b in zip(writes, hats, fixed.b.split(stand.wiring.parts_out), strict=True)
    )  # fmt: skip
    own = tuple((part, reads[part.read], tuple(writes[i] for i in part.writes)) for part in parts(stand, x))
    return Placed(", ".join(stand.writes), own, written)


def _site(frozen: Frozen, model: Model, point: str) -> Site:
    at = model.site(point)
    found = frozen.weights.places.get(f"{at.path}:{at.side}")
    if found is None:
        raise SaekitError(
            f"hook point {point!r} ({at.path}:{at.side}) is inside of what a circuit takes as one step; choose one of {', '.join(list(frozen.weights.places)[:12])}, ..."
        )
    return canonical(found)


def _check_widths(d: Dictionary, width: int, frozen: Frozen, writes: Sequence[Site]) -> None:
    have = sum(frozen.at(site).shape[-1] for site in writes)
    if width != d.d_in or have != d.d_out:
        raise SaekitError(
            f"a dictionary of d_in = {d.d_in} and d_out = {d.d_out} stands where the model is {width} and {have} wide; give one of this model"
        )


def _all(values: Float[Tensor, "seq unit"]) -> tuple[Tensor, Tensor]:
    """Positions and units of everything that is active, beyond what rounding makes of nothing."""
    least = 4 * torch.finfo(values.dtype).eps * values.abs().max()
    at = (values.abs() > least).nonzero()
    return at[:, 0], at[:, 1]


def _neurons(frozen: Frozen, model: Model, stand: Neurons) -> Placed:
    layer, site = _site(frozen, model, stand.hook_point)
    mlp = frozen.weights.blocks[layer].mlp
    if mlp is None or not site.startswith("mlp"):
        raise SaekitError(f"hook point {stand.hook_point!r} is no MLP; name one, as in blocks.1.mlp")
    slopes = frozen.slopes[layer]
    values = slopes * (frozen.seen[layer]["mlp_in"] @ mlp.W_in.T + mlp.b_in)
    p, n = _all(values)
    slope, value = slopes[p, n], values[p, n]
    written = mlp.W_out.T[n] * value[:, None]
    part = Part(0, (0,), p, n, value, mlp.W_in[n] * slope[:, None], mlp.b_in[n] * slope, (written,))
    out = (layer, "mlp_out")
    return Placed(stand.hook_point, ((part, (layer, "mlp_in"), (out,)),), (Written(out, None, mlp.b_out),))


def _heads(frozen: Frozen, model: Model, stand: Heads) -> Placed:
    layer, site = _site(frozen, model, stand.hook_point)
    if not site.startswith("attn"):
        raise SaekitError(
            f"hook point {stand.hook_point!r} is no attention layer; name one, as in blocks.1.attn"
        )
    a, seen = frozen.weights.blocks[layer].attention, frozen.seen[layer]
    p, n = _all(seen["z"])
    d_v, value = a.W_V.shape[1], seen["z"][p, n]
    head, dim = n // d_v, n % d_v
    kv = head * len(a.W_V) // len(a.W_O)
    written = a.W_O[head, :, dim] * value[:, None]
    part = Part(0, (0,), p, n, value, a.W_V[kv, dim], a.b_V[kv, dim], (written,), seen["patterns"], head,
                Attending(a.patterns, seen["attn_in"]))  # fmt: skip
    out = (layer, "attn_out")
    return Placed(stand.hook_point, ((part, (layer, "attn_in"), (out,)),), (Written(out, None, a.b_O),))


def in_order(part: Part) -> Part:
    """The same part with its entries by rising position, then feature."""
    width = int(part.features.max()) + 1 if len(part.features) else 1
    order = torch.argsort(part.positions * width + part.features)
    some = {f: getattr(part, f)[order] for f in ("positions", "features", "values", "w", "b")}
    heads = None if part.heads is None else part.heads[order]
    return dataclasses.replace(part, **some, heads=heads, written=tuple(w[order] for w in part.written))
