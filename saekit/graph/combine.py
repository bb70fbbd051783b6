"""Graphs added up or subtracted: nodes that are the same become one, and rows, values and totals add.

All of it is linear, and nothing is left out before it: rows go on adding up to their nodes' values, and the totals of
leaves to the targets'.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array

from saekit.graph.data import Graph, Nodes, Several
from saekit.types import SaekitError


@dataclass(frozen=True)
class _Union:
    """The nodes of several graphs; ``to`` has for each graph the numbers that its nodes have here."""

    nodes: Nodes
    of: Int[np.ndarray, " row"]
    blocks: tuple[int, ...]
    to: tuple[Int[np.ndarray, " _"], ...]


def combine(
    graphs: Sequence[Graph], at: Sequence[Int[np.ndarray, " _"]], subtract: bool,
    tokens: tuple[int, ...], words: tuple[str, ...], about: dict[str, object],
) -> Graph:  # fmt: skip
    """The mean of graphs or (``subtract``) the first less the second; ``at`` [position] says where each graph's
    positions are in it.

    Nodes are the same if kind, layer, stand, position and place are, tokens also if they aren't the same token. Of
    nodes of one graph that become one, edges, values and totals add. A node that a graph lacks counts as 0.
    """
    union = _union(graphs, at)
    n, n_rows = len(union.nodes), len(union.of)
    line = np.full(n, -1)
    line[union.of] = np.arange(n_rows)
    rows, values = csr_array((n_rows, n), dtype=np.float64), np.zeros(n)
    dropped, sizes = np.zeros(n_rows), np.zeros(n_rows)
    totals, aware = np.zeros((2, len(graphs[0].targets), n))
    seen = []
    for graph, to, sign in zip(graphs, union.to, (1, -1) if subtract else [1] * len(graphs), strict=True):
        columns, lines = _ones(to, n), _ones(line[to[graph.of]], n_rows)
        rows = rows + sign * (lines.T @ graph.rows.astype(np.float64) @ columns)
        values += sign * (graph.nodes.value @ columns)
        totals += sign * (graph.total_effects() @ columns)
        aware += sign * (graph.aware @ columns)
        dropped += graph.dropped @ lines
        sizes += graph.sizes() @ lines
        present = np.zeros((len(graph.present), n))
        for side, shares in zip(present, graph.present, strict=True):
            np.maximum.at(side, to, shares)
        seen.append(present)
    over = 1 if subtract else len(graphs)
    kept = csr_array(rows / over).astype(np.result_type(*(graph.rows.dtype for graph in graphs)))
    kept.sort_indices()
    several = Several(np.concatenate(seen) if subtract else np.mean(seen, 0), sizes / over)
    nodes = dataclasses.replace(union.nodes, value=values / over)
    return Graph(
        nodes, kept, union.of, union.blocks, dropped / over, aware / over,
        tuple(np.mean([graph.weights for graph in graphs], 0).tolist()), tokens, words, graphs[0].stands,
        graphs[0].biases, graphs[0].targets, about, totals / over, several,
    )  # fmt: skip


def _ones(to: Int[np.ndarray, " own"], n: int) -> csr_array:
    """The matrix [own, n] that adds each own entry to its new one."""
    return csr_array((np.ones(len(to)), to, np.arange(len(to) + 1)), shape=(len(to), n))


def _union(graphs: Sequence[Graph], at: Sequence[Int[np.ndarray, " _"]]) -> _Union:
    """All nodes, leaves first, then those with rows in an order in which all graphs come by."""
    keys = np.concatenate([_keys(graph, own) for graph, own in zip(graphs, at, strict=True)])
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    to = np.split(inverse.ravel(), np.cumsum([len(graph.nodes) for graph in graphs])[:-1])
    level = _levels(graphs, to, len(unique))
    order = np.lexsort((np.arange(len(unique)), level))
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    to = [number[own] for own in to]
    low, high = np.full(len(order), np.iinfo(np.int64).max), np.full(len(order), -1)
    for graph, own in zip(graphs, to, strict=True):
        np.minimum.at(low, own, graph.nodes.place)
        np.maximum.at(high, own, graph.nodes.place)
    kind, layer, stand, position, _ = unique[order].T
    place = np.where(low == high, low, -1)
    table = Nodes(kind, layer, position, stand, place, np.full(len(order), np.nan))
    of = np.flatnonzero(level[order] >= 0)
    ends = np.cumsum(np.bincount(level[order][of]))
    return _Union(table, of, tuple(dict.fromkeys(ends.tolist())), tuple(to))


def _keys(graph: Graph, at: Int[np.ndarray, " position"]) -> Int[np.ndarray, "node 5"]:
    """What makes a node the same in another graph."""
    n = graph.nodes
    position = np.append(at, -1)[n.position]  # -1 stays
    place = np.where(graph.of_kind("token"), -1, n.place)
    return np.stack([n.kind, n.layer, n.stand, position, place], 1)


def _levels(graphs: Sequence[Graph], to: Sequence[Int[np.ndarray, " _"]], n: int) -> Int[np.ndarray, " node"]:
    """The block of each node's row, such that in no graph a later block adds to an earlier one; -1 for leaves."""
    each = [
        [own[graph.of[first:stop]] for first, stop in zip((0, *graph.blocks), graph.blocks, strict=False)]
        for graph, own in zip(graphs, to, strict=True)
    ]
    level = np.full(n, -1)
    most = sum(len(graph.blocks) for graph in graphs)
    before = None
    while before is None or (before != level).any():
        before = level.copy()
        for blocks in each:
            now = -1
            for block in blocks:
                now = max(now + 1, int(level[block].max(initial=-1)))
                level[block] = now
        if level.max() > most:
            raise SaekitError(
                "the graphs' features come by in orders that don't agree; give graphs of the same dictionaries"
            )
    return level
