"""Where dictionaries, neurons and heads stand in a frozen model, and what they read and write there."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Frozen, Site, canonical, depth
from saekit.circuits.weights import Weights
from saekit.dictionaries import Dictionary
from saekit.dictionaries.parts import Attending, Part, constant, parts
from saekit.hub import load
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
Placeable = Stand | str | Path  # a dictionary may be named by its path


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


def stands_of(given: "Placeable | Sequence[Placeable]") -> list[Stand]:
    """The stands that are given, one or several, with dictionaries read that are named by their paths."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return [_stand(one) for one in (given if several else [given])]  # type: ignore[union-attr]


def _stand(one: Any) -> Stand:
    if isinstance(one, str | Path):
        return load(one)
    if not isinstance(one, Dictionary | Neurons | Heads):
        raise SaekitError(
            f"{one!r} is no dictionary; give a dictionary or its path, Neurons(hook point) or Heads(hook point)"
        )
    return one


@torch.no_grad()
def place(frozen: Frozen, model: Model, stand: Stand) -> Placed:
    """A stand in its place; raises where it doesn't fit into the model."""
    if isinstance(stand, Neurons):
        return _neurons(frozen, model, stand)
    if isinstance(stand, Heads):
        return _heads(frozen, model, stand)
    reads, writes = sites_of(frozen.weights, model, stand)
    x = torch.cat([frozen.at(site) for site in reads], -1)
    x = x.to(stand.dtype)
    hats = stand(x).split(stand.wiring.parts_out, -1)
    fixed = constant(stand)
    written = tuple(
        Written(site, frozen.at(site) - hat.to(frozen.at(site)), b, None if fixed.skip is None else (reads[0], fixed.skip))
        for site, hat, b in zip(writes, hats, fixed.b.split(stand.wiring.parts_out), strict=True)
    )  # fmt: skip
    own = tuple((part, reads[part.read], tuple(writes[i] for i in part.writes)) for part in parts(stand, x))
    return Placed(", ".join(stand.writes), own, written)


def site_of(weights: Weights, model: Model, point: str) -> Site:
    """The site of a hook point; raises where it is no place between the steps of a circuit."""
    at = model.site(point)
    found = weights.places.get(f"{at.path}:{at.side}")
    if found is None:
        raise SaekitError(
            f"hook point {point!r} ({at.path}:{at.side}) is inside of what a circuit takes as one step; choose one of {', '.join(list(weights.places)[:12])}, ..."
        )
    return canonical(found)


def sites_of(weights: Weights, model: Model, d: Dictionary) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Where a dictionary reads and where it writes; raises where it doesn't fit into the model."""
    _check_origin(model, d)
    reads, writes = (tuple(site_of(weights, model, p) for p in points) for points in (d.reads, d.writes))
    if not writes:
        raise SaekitError(
            "a dictionary doesn't name its hook points; set reads and writes, or train it on a store"
        )
    if len(reads) > 1 and d.wiring.kind != "cross_layer":
        raise SaekitError(
            f"a dictionary reads {', '.join(d.reads)} at once, and its features would act on what came before them; use dictionaries of one place, or a cross-layer transcoder"
        )
    for read, write in zip(reads, writes, strict=True):
        if depth(read) > depth(write):
            raise SaekitError(f"a dictionary reads {read} behind {write}, which it writes; swap them")
    d_in, d_out = (sum(_width(weights, site) for site in sites) for sites in (reads, writes))
    if (d_in, d_out) != (d.d_in, d.d_out):
        raise SaekitError(
            f"a dictionary of d_in = {d.d_in} and d_out = {d.d_out} stands where the model is {d_in} and {d_out} wide; give one of this model"
        )
    return reads, writes


def _check_origin(model: Model, d: Dictionary) -> None:
    """Refuse a dictionary that was trained on another model, where its card and the model's weights can tell."""
    known, here = d.card.get("data", {}).get("model") or {}, model.identity()
    weights = next(model.module.parameters())
    rounded = weights.dtype not in (torch.float32, torch.float64)  # other bits of the same weights
    fields = ("class", "parameters") if rounded else ("digest",)
    if any(known.get(field, here[field]) != here[field] for field in fields):
        raise SaekitError(
            f"a dictionary of {', '.join(d.writes)} was trained on model {known.get('name')!r} with other weights than model {model.name!r} has; give its own model, or take card['data']['model'] from the dictionary to trace it here"
        )


def _width(weights: Weights, site: Site) -> int:
    a = weights.blocks[site[0]].attention
    return len(a.W_O) * a.W_V.shape[1] if site[1] == "z" else weights.W_E.shape[1]


def layer_of(weights: Weights, model: Model, stand: Neurons | Heads) -> int:
    """The layer whose neurons or heads are meant; raises where the hook point is none of theirs."""
    layer, site = site_of(weights, model, stand.hook_point)
    if isinstance(stand, Heads) and not site.startswith("attn"):
        raise SaekitError(
            f"hook point {stand.hook_point!r} is no attention layer; name one, as in blocks.1.attn"
        )
    if isinstance(stand, Neurons) and (weights.blocks[layer].mlp is None or not site.startswith("mlp")):
        raise SaekitError(f"hook point {stand.hook_point!r} is no MLP; name one, as in blocks.1.mlp")
    return layer


def _all(values: Float[Tensor, "seq unit"]) -> tuple[Tensor, Tensor]:
    """Positions and units of everything that is active, beyond what rounding makes of nothing."""
    least = 4 * torch.finfo(values.dtype).eps * values.abs().max()
    at = (values.abs() > least).nonzero()
    return at[:, 0], at[:, 1]


def _neurons(frozen: Frozen, model: Model, stand: Neurons) -> Placed:
    layer = layer_of(frozen.weights, model, stand)
    mlp = frozen.weights.blocks[layer].mlp
    assert mlp is not None
    slopes = frozen.slopes[layer]
    values = slopes * (frozen.seen[layer]["mlp_in"] @ mlp.W_in.T + mlp.b_in)
    p, n = _all(values)
    slope, value = slopes[p, n], values[p, n]
    read, written = mlp.W_in[n].mul_(slope[:, None]), mlp.W_out.T[n].mul_(value[:, None])  # large
    part = Part(0, (0,), p, n, value, read, mlp.b_in[n] * slope, (written,))
    out = (layer, "mlp_out")
    return Placed(stand.hook_point, ((part, (layer, "mlp_in"), (out,)),), (Written(out, None, mlp.b_out),))


def _heads(frozen: Frozen, model: Model, stand: Heads) -> Placed:
    layer = layer_of(frozen.weights, model, stand)
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
    keys = part.positions * width + part.features
    if bool((keys[1:] >= keys[:-1]).all()):
        return part
    order = torch.argsort(keys)
    some = {f: getattr(part, f)[order] for f in ("positions", "features", "values", "w", "b")}
    heads = None if part.heads is None else part.heads[order]
    return dataclasses.replace(part, **some, heads=heads, written=tuple(w[order] for w in part.written))
