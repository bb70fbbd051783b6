"""Pruning by cumulative influence: exact thresholds without a sort, and nothing lost."""

import dataclasses
import numbers
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

from saekit.graph.data import Graph
from saekit.graph.scores import shares, spread
from saekit.types import SaekitError

CHUNK = 1 << 22
KEPT = ("token", "pruned", "target")


def cut(values: Float[np.ndarray, " value"], share: float) -> np.float32:
    """The largest t such that the values of at least t add up to ``share`` of the sum; values are fp32 and not negative.

    Their bits are in their order: sums of the bins by the upper 16 bits find the bin, those by the lower ones the value.
    """
    if share >= 1:
        return np.float32(0)
    high = _sums(values, lambda bits: bits >> 16)
    above = np.cumsum(high[::-1])[::-1]
    aim = share * above[0]
    top = max(int(np.searchsorted(-above, -aim, side="right")) - 1, 0)
    inside = values[(values.view(np.uint32) >> 16) == top]
    low = _sums(inside, lambda bits: bits & 0xFFFF)
    rest = above[top + 1] if top + 1 < len(above) else 0.0
    within = rest + np.cumsum(low[::-1])[::-1]
    under = max(int(np.searchsorted(-within, -aim, side="right")) - 1, 0)
    return np.uint32((top << 16) | under).view(np.float32)


def _sums(values: np.ndarray, bins: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Sums of the values in each of 65536 bins."""
    out = np.zeros(1 << 16)
    for at in range(0, len(values), CHUNK):
        part = values[at : at + CHUNK]
        out += np.bincount(bins(part.view(np.uint32)).astype(np.int32), weights=part, minlength=len(out))
    return out


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Graph:
    """The nodes and edges that carry these shares of the influence, and those without which they would hang loose.

    As circuit-tracer does, nodes are kept by their influence and edges by their share of their target's influence,
    each down to a cumulative share; then features without inputs and nodes without outputs go. Other than there,
    both are measured once, on the whole graph, so that a higher share keeps all that a lower one keeps; what goes is
    added to each row's pruned node. Tokens and targets stay.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not isinstance(share, numbers.Real) or not 0 <= share <= 1:
            raise SaekitError(f"{name} = {share!r} must be a share from 0 to 1")
    matrix = shares(graph)
    through = spread(graph, matrix)
    stay = graph.of_kind(*KEPT)
    free = ~graph.of_kind("pruned", "target")
    weight = through.astype(np.float32)
    keep = stay | (weight >= max(cut(weight[free], nodes), np.finfo(np.float32).tiny))
    size = matrix.data.astype(np.float32, copy=False)
    size *= np.repeat(weight[graph.of], np.diff(matrix.indptr))
    size[matrix.indices == graph.pruned] = 0
    strong = size >= max(cut(size, edges), np.finfo(np.float32).tiny)
    del matrix, size
    row = np.repeat(np.arange(len(graph.of), dtype=np.int32), np.diff(graph.rows.indptr))
    chosen = np.flatnonzero(strong & keep[graph.rows.indices] & keep[graph.of][row])
    source, target = graph.rows.indices[chosen], graph.of[row[chosen]]
    alive = _connected(graph, source, target, keep, stay)
    chosen = chosen[alive[source] & alive[target]]
    shares_ = {"node_threshold": nodes, "edge_threshold": edges}
    about = {**graph.about, **{name: share * graph.about.get(name, 1.0) for name, share in shares_.items()}}
    return dataclasses.replace(_only(graph, chosen, row, alive), about=about)


def without(graph: Graph, alive: Bool[np.ndarray, " node"]) -> Graph:
    """The graph of some nodes; what the others add is in each row's pruned node."""
    if alive.all():
        return graph
    row = np.repeat(np.arange(len(graph.of), dtype=np.int32), np.diff(graph.rows.indptr))
    stays = alive[graph.rows.indices] & alive[graph.of][row] & (graph.rows.indices != graph.pruned)
    return _only(graph, np.flatnonzero(stays), row, alive)


def _connected(
    graph: Graph, source: np.ndarray, target: np.ndarray, keep: np.ndarray, stay: np.ndarray
) -> np.ndarray:
    """The nodes that have outputs, and if they are features inputs, among each other."""
    features, alive = graph.of_kind("feature"), keep.copy()
    while True:
        on = alive[source] & alive[target]
        source, target = source[on], target[on]
        out, into = (np.bincount(ends, minlength=len(keep)) > 0 for ends in (source, target))
        now = alive & (stay | (out & (into | ~features)))
        if (now == alive).all():
            return now
        alive = now


def _only(graph: Graph, chosen: np.ndarray, row: np.ndarray, alive: np.ndarray) -> Graph:
    """The graph of some edges and nodes; the rest of each row is in its pruned node."""
    rows, n = graph.rows, len(graph.of)
    lost = np.ones(rows.nnz, bool)
    lost[chosen] = False
    signed = np.bincount(row[lost], weights=rows.data[lost], minlength=n)
    lost &= rows.indices != graph.pruned
    dropped = graph.dropped + np.bincount(row[lost], weights=np.abs(rows.data[lost]), minlength=n)
    del lost
    left = np.flatnonzero(alive[graph.of])
    number = np.cumsum(alive) - 1
    place = np.full(n, -1)
    place[left] = np.arange(len(left))
    at = np.concatenate([place[row[chosen]], np.arange(len(left))])
    into = np.concatenate([number[rows.indices[chosen]], np.full(len(left), number[graph.pruned])])
    data = np.concatenate([rows.data[chosen], signed[left].astype(rows.data.dtype)])
    kept = csr_array((data, (at, into)), shape=(len(left), int(alive.sum())))
    kept.sort_indices()
    ends = np.cumsum(
        np.bincount(np.searchsorted(graph.blocks, left, side="right"), minlength=len(graph.blocks))
    )
    blocks = tuple(int(end) for end in ends)
    totals = graph.total_effects().copy()
    totals[:, graph.pruned] += totals[:, graph.leaves & ~alive].sum(1)
    return dataclasses.replace(
        graph, nodes=graph.nodes.only(alive), rows=kept, of=number[graph.of[left]], dropped=dropped[left],
        blocks=tuple(dict.fromkeys(blocks)), aware=graph.aware[:, alive],
        totals=totals[:, alive], several=graph.several and graph.several.only(alive, left),
    )  # fmt: skip
