"""Circuits from weights: what features read of each other whatever the prompt, and what a prompt makes of it.

Dunefsky et al. 2024 (2406.11944): an attribution between transcoder features is what the prompt has (activation,
pattern, sizes of norms) times what the weights have (``d_i . w_j``, or through a head ``d_i W_V W_O w_j``).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Site, canonical, depth
from saekit.circuits.rows import Own, Trace
from saekit.circuits.weights import Norm, Weights
from saekit.graph import Graph
from saekit.types import SaekitError

SITES = {"mlp_in": "before_mlp", "attn_in": "before_attention"}
STREAM = ("resid_pre", "resid_mid", "resid_post")
POST = {"attn_out": ("after_attention", "heads"), "mlp_out": ("after_mlp", "MLP")}  # norms behind what writes


def through(weights: Weights, site: Site, read: Float[Tensor, "feature d"]) -> Float[Tensor, "feature d"]:
    """What covectors at a site read of the stream before its norm, but for the size that the prompt divides by.

    The site is one of the stream, or what the MLP or the heads read.
    """
    layer, name = site
    _stream(weights, site)
    norm: Norm | None = getattr(weights.blocks[layer], SITES[name]) if name in SITES else None
    return read if norm is None else norm.back(read, read.new_ones(1))


def _stream(weights: Weights, site: Site) -> Site:
    """The place of the stream that is read at a site; raises where something else is."""
    layer, name = site
    if name not in (*SITES, *STREAM):
        raise SaekitError(
            f"{name} of layer {layer} doesn't read the stream, and what lies between is not in the weights alone; trace a prompt, or choose features that read the stream, mlp_in or attn_in"
        )
    late = name == "mlp_in" and not weights.blocks[layer].parallel
    return canonical(site if name in STREAM else (layer, "resid_mid" if late else "resid_pre"))


def _check_written(weights: Weights, site: Site) -> None:
    """Raise unless what is written at a site is in the stream as it is."""
    layer, name = site
    if name not in (*POST, "attn_add", "mlp_add", *STREAM):
        raise SaekitError(
            f"{name} of layer {layer} is not added to the stream, and what lies between is not in the weights alone; trace a prompt, or choose features that write the stream, mlp_out or attn_out"
        )
    if name in POST:
        norm, writer = POST[name]
        if getattr(weights.blocks[layer], norm) is not None:
            raise SaekitError(
                f"layer {layer} has a norm behind its {writer}, whose size stands between the weights; trace a prompt"
            )


def de_embedding(
    weights: Weights, site: Site, read: Float[Tensor, "feature d"]
) -> Float[Tensor, "feature vocabulary"]:
    """What each token's embedding gives features that read a site, but for the norm's size."""
    return through(weights, site, read) @ weights.W_E.T


def connections(
    weights: Weights, written: Float[Tensor, "earlier d"], site: Site, read: Float[Tensor, "later d"],
    head: tuple[int, int] | None = None,
) -> Float[Tensor, "later earlier"]:  # fmt: skip
    """What a unit of each earlier feature adds to each later one, whatever the prompt: by the stream, or by a head.

    ``written``: what is added to the stream by itself, with no norm behind it. ``head`` (layer, head): per unit of its
    pattern; sizes of norms and patterns are the prompt's.
    """
    covectors = through(weights, site, read)
    if head is not None:
        layer, h = head
        if not 0 <= layer < len(weights.blocks) or not 0 <= h < len(weights.blocks[layer].attention.W_O):
            raise SaekitError(f"head {head} is none of the model's; give (layer, head), each counted from 0")
        _check_written(weights, (layer, "attn_out"))
        if depth((layer, "attn_out")) > depth(_stream(weights, site)):
            raise SaekitError(f"head {head} adds nothing to what is read at {site}; give one before it")
        a = weights.blocks[layer].attention
        kv = h * len(a.W_V) // len(a.W_O)
        covectors = through(weights, (layer, "attn_in"), covectors @ a.W_O[h] @ a.W_V[kv])
    return covectors @ written.T


@dataclass(frozen=True)
class Factors:
    """An edge as ``invariant * dependent``, [later, earlier]: weights alone, and what the prompt has."""

    invariant: Float[Tensor, "later earlier"]
    dependent: Float[Tensor, "later earlier"]

    @property
    def edges(self) -> Float[Tensor, "later earlier"]:
        """What each earlier entry adds to each later one by this way."""
        return self.invariant * self.dependent


def factors(run: Trace, earlier: Own, later: Own, head: tuple[int, int] | None = None) -> Factors:
    """Edges between the active features of two parts by the stream (same position), or by one head, in two factors.

    Written directions are of one unit of activation, and the sum over all places where a feature writes that the later
    part reads, or the head.
    """
    frozen, w = run.frozen, run.frozen.weights
    written = _written(run, earlier, later, head)
    values = earlier.part.values
    units = written / values[:, None]
    fixed = connections(w, units, later.read, later.part.w.to(units), head)
    at, source = later.part.positions, earlier.part.positions
    dependent = values.expand_as(fixed) / _size(run, later.read)[at][:, None]
    if head is None:
        return Factors(fixed, dependent * (at[:, None] == source))
    layer, h = head
    pattern = frozen.seen[layer]["patterns"][h][at][:, source]
    return Factors(fixed, dependent * pattern / _size(run, (layer, "attn_in"))[source])


def _written(
    run: Trace, earlier: Own, later: Own, head: tuple[int, int] | None
) -> Float[Tensor, "earlier d"]:
    """What the earlier features write of what the later ones, or the head, read; raises unless it gets there as it is."""
    w, to = run.frozen.weights, later.read if head is None else (head[0], "attn_in")
    if later.part.patterns is not None:
        raise SaekitError(
            f"features of {run.placed[later.stand].name} read what heads gather, not what stands at their own position; trace a prompt, or give a later part that is behind no heads"
        )
    own = {later.read} if later.before else set()  # is read as it was before dictionaries wrote there
    found = [
        (site, vectors)
        for site, vectors in zip(earlier.writes, earlier.part.written, strict=True)
        if depth(site) <= depth(_stream(w, to)) and site not in own
    ]
    if not found:
        raise SaekitError(f"a dictionary that writes {earlier.writes[0]} is not before one that reads {to}")
    way = [place for site, _ in found for place in _way(w, site, to)]
    if head is not None:
        way += [(head[0], "z"), (head[0], "attn_out"), *_way(w, (head[0], "attn_out"), later.read)]
    for site, _ in found:
        _check_written(w, site)
    if taken := [place for place in way if place in run.cuts and place not in own]:
        raise SaekitError(
            f"a dictionary writes {taken[0]} in between, and no edge passes it; trace without that dictionary"
        )
    return torch.stack([vectors for _, vectors in found]).sum(0)


def _way(weights: Weights, start: Site, to: Site) -> list[Site]:
    """The places by which the stream takes what is written at ``start`` to what reads ``to``."""
    stream = [(layer, name) for layer in range(len(weights.blocks)) for name in ("resid_mid", "resid_post")]
    return [*(site for site in stream if depth(start) < depth(site) <= depth(_stream(weights, to))), to]


def _size(run: Trace, site: Site) -> Tensor:
    """What the norm before a site divides by, at each position."""
    layer, name = site
    sizes = run.frozen.sizes[layer]
    return sizes[SITES[name]][:, 0] if SITES.get(name) in sizes else torch.ones(run.seq).to(run.frozen.last)


@dataclass(frozen=True)
class Path:
    """Nodes from a target back to a source, and what comes along this one path."""

    nodes: tuple[int, ...]
    value: float


def paths(graph: Graph, target: int = 0, branches: int | None = 5, least: float = 0.0) -> list[Path]:
    """Paths into a target, each step from a node to what adds to it; those that end in leaves, the strongest first.

    Greedy (Dunefsky et al.): from all paths of a length the ``branches`` that carry most are followed, of either sign.
    Exact with ``branches=None``: every path that carries more than ``least``; with 0 they add up to the target.
    A difference of graphs has no paths: a feature that is as active on both sides is 0 there, of which edges have no share.
    """
    if len(graph.present) > 1:
        raise SaekitError(
            "a difference has no paths, for what comes through features whose values don't change has no share in them; take those of its graphs"
        )
    if not 0 <= target < len(graph.targets):
        raise SaekitError(f"target {target} is none of the graph's {len(graph.targets)}; count from 0")
    node = int(graph.of[len(graph.of) - len(graph.targets) + target])
    leaves = graph.leaves
    going, done = [Path((node,), float("nan"))], list[Path]()
    while going:
        found: list[Path] = []
        for path in going:
            last = path.nodes[-1]
            share = 1.0 if np.isnan(path.value) else path.value / graph.nodes.value[last]
            for source, weight in graph.inputs(last):
                value = float(weight * share)
                if abs(value) <= least:
                    continue
                (done if leaves[source] else found).append(Path((*path.nodes, source), value))
        found.sort(key=lambda path: -abs(path.value))
        going = found if branches is None else found[:branches]
    return sorted(done, key=lambda path: -abs(path.value))
