"""How much of a graph's targets comes through each node, and how much of that is explained, on the full mass."""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from saekit.graph.data import Graph, lines
from saekit.types import SaekitError


@dataclass(frozen=True)
class Scores:
    """``replacement``: share of the targets' influence that starts in tokens, positions and biases; the rest starts in
    errors and in what was pruned. ``completeness``: share of the inputs of a node, over the nodes by their influence,
    that is neither error nor pruned (Ameisen et al. 2025). Both fall, or stay, when more is pruned.

    ``steps`` is the mean length of the paths; ``completeness = 1 - (1 - replacement) / steps``.
    """

    replacement: float
    completeness: float
    steps: float


def shares(graph: Graph) -> csr_array:
    """``rows`` as shares of each row's absolute mass; of the pruned node the mass is that of all it stands for."""
    rows = graph.rows
    data = np.abs(rows.data)
    of_pruned = np.flatnonzero(rows.indices == graph.pruned)
    at = np.searchsorted(rows.indptr, of_pruned, side="right") - 1
    data[of_pruned] = graph.dropped[at]
    sizes = np.maximum(
        csr_array((data, rows.indices, rows.indptr), rows.shape) @ np.ones(rows.shape[1]), 1e-300
    )
    data /= np.repeat(sizes.astype(data.dtype), np.diff(rows.indptr))
    return csr_array((data, rows.indices, rows.indptr), rows.shape, copy=False)


def spread(graph: Graph, matrix: csr_array) -> Float[np.ndarray, " node"]:
    """``u = p + u A`` by one pass from the targets, whose weights are p, to the leaves."""
    out = np.zeros(matrix.shape[1])
    weights = np.asarray(graph.weights, np.float64)
    out[graph.of[-len(weights) :]] = weights / max(weights.sum(), 1e-300)
    for first, stop in reversed(list(itertools.pairwise((0, *graph.blocks)))):
        out += out[graph.of[first:stop]] @ lines(matrix, first, stop)
    return out


def influence(graph: Graph) -> Float[np.ndarray, " node"]:
    """Share of the targets' absolute mass that comes through each node; a target's own is its weight."""
    return spread(graph, shares(graph))


def scores(graph: Graph) -> Scores:
    """Replacement and completeness of a graph, or of the mean edges of several; a difference has none."""
    if len(graph.present) > 1:
        raise SaekitError(
            "a difference has no scores, for edges that don't change count as explained; take those of its graphs"
        )
    through = influence(graph)
    dark = graph.of_kind("error", "pruned") | (graph.leaves & graph.of_kind("feature"))
    unexplained, steps = float(through[dark].sum()), float(through[~graph.leaves].sum())
    return Scores(1 - unexplained, 1 - unexplained / max(steps, 1e-300), steps)
