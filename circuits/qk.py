"""Why a head looks where it looks: attention scores as sums over pairs of nodes, and which heads carry an edge."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.circuits.frozen import Site
from saekit.circuits.places import Stand
from saekit.circuits.rows import Columns, Trace
from saekit.circuits.targets import Feature, Target
from saekit.circuits.trace import traced
from saekit.graph import KINDS, Nodes
from saekit.models import Model
from saekit.types import SaekitError


@dataclass(frozen=True, repr=False)
class QK:
    """A score as ``sum_ij query_parts[:, i] . key_parts[:, j]`` over the nodes i at the query's side and j at the key's.

    With ``contrast`` the key is what the looked-at key has more than the others, weighted by the head's attention to
    them, so that it says why the head looks here rather than there. Biases of queries and keys are in the last column.
    """

    head: tuple[int, int]  # layer, head
    places: tuple[int, int]  # query, key
    nodes: Nodes
    query_parts: Float[np.ndarray, "d_qk node"]
    key_parts: Float[np.ndarray, "d_qk node"]
    names: tuple[tuple[str, ...], tuple[str, ...]]  # of the dictionaries, and of the biases

    def __repr__(self) -> str:
        layer, head = self.head
        return (
            f"QK(head {head} of layer {layer}, from {self.places[0]} to {self.places[1]}: {self.score:.3f})"
        )

    def label(self, node: int) -> str:
        """A node in words; nodes are those of the trace, numbered over all of its features, and one for biases of queries
        and keys."""
        n = self.nodes
        if not 0 <= node < len(n):
            raise SaekitError(f"node {node} is none of the trace's {len(n)}")
        kind, at, layer = KINDS[n.kind[node]], int(n.position[node]), int(n.layer[node])
        where = "" if at < 0 else f" at {at}"
        if kind == "bias":
            place = int(n.place[node])
            return f"bias of {self.names[1][place] if place >= 0 else 'queries and keys'}{where}"
        if kind not in ("feature", "error"):
            return f"{kind}{where}"
        what = f"feature {int(n.place[node])}" if kind == "feature" else "error"
        return f"{what} of {self.names[0][int(n.stand[node])]} in layer {layer}{where}"

    @property
    def score(self) -> float:
        """The score, scaled as the softmax takes it."""
        return float(self.query_parts.sum(1) @ self.key_parts.sum(1))

    @property
    def query(self) -> Float[np.ndarray, " node"]:
        """What each node adds to the score by way of the query, with the key as it is."""
        return self.query_parts.T @ self.key_parts.sum(1)

    @property
    def key(self) -> Float[np.ndarray, " node"]:
        """What each node adds to the score by way of the key, with the query as it is."""
        return self.key_parts.T @ self.query_parts.sum(1)

    def pairs(self, top: int = 20) -> list[tuple[int, int, float]]:
        """The strongest pairs ``(query's node, key's node, what they add)``, of either sign.

        Nodes that add nothing to the query or the key make none, so that there may be fewer than ``top``.
        """
        left, right = (np.flatnonzero(side.any(0)) for side in (self.query_parts, self.key_parts))
        q, k = self.query_parts[:, left], self.key_parts[:, right]
        n = min(top, q.shape[1] * k.shape[1])
        if n == 0:
            return []
        sizes = [np.linalg.norm(side, axis=0) for side in (q, k)]
        some = [np.argsort(-size, kind="stable")[: max(64, n)] for size in sizes]
        least = np.sort(np.abs(q[:, some[0]].T @ k[:, some[1]]), axis=None)[-n]
        # of all pairs at least as strong both sides are among these, as no product is above that of the sizes
        rows, cols = (np.flatnonzero(a * b.max() >= least) for a, b in (sizes, sizes[::-1]))
        products = q[:, rows].T @ k[:, cols]
        order = np.argsort(-np.abs(products), axis=None, kind="stable")[:n]
        return [
            (int(left[rows[i]]), int(right[cols[j]]), float(products[i, j]))
            for i, j in zip(*np.unravel_index(order, products.shape), strict=True)
        ]


class Heads:
    """Scores of the heads of a traced prompt; what a head's key reads is worked out once for all its queries."""

    def __init__(self, run: Trace):
        self.run, self.frozen = run, run.frozen
        self.nodes = _with_biases(run.columns)

    def _check(self, layer: int, head: int, query: int) -> None:
        n_layers = len(self.frozen.seen)
        if not 0 <= layer < n_layers:
            raise SaekitError(f"layer {layer} is none of the model's {n_layers}")
        heads = self.frozen.queries[layer].heads
        if not 0 <= head < heads:
            raise SaekitError(f"head {head} is none of layer {layer}'s {heads}")
        if not -self.run.seq <= query < self.run.seq:
            raise SaekitError(f"query {query} lies outside of the prompt's {self.run.seq} tokens")

    def qk(
        self, layer: int, head: int, query: int = -1, key: int | None = None, contrast: bool = False
    ) -> QK:
        """Why a head at ``query`` looks at ``key`` (None: where it looks most)."""
        self._check(layer, head, query)
        return self._found(layer, [head], query % self.run.seq, key, contrast)[0]

    def layer(self, layer: int, query: int = -1, contrast: bool = False) -> list[QK]:
        """Why each head of a layer looks where it looks most."""
        self._check(layer, 0, query)
        return self._found(
            layer, range(self.frozen.queries[layer].heads), query % self.run.seq, None, contrast
        )

    def _found(
        self, layer: int, heads: Sequence[int], query: int, key: int | None, contrast: bool
    ) -> list[QK]:
        patterns = self.frozen.seen[layer]["patterns"]
        places, weights = [], []
        if key is not None and not -self.run.seq <= key < self.run.seq:
            raise SaekitError(f"key {key} lies outside of the prompt's {self.run.seq} tokens")
        for head in heads:
            pattern = patterns[head, query]
            to = int(pattern.argmax()) if key is None else key % self.run.seq
            if not bool(self.frozen.queries[layer].patterns.seen(self.run.seq)[query, to]):
                raise SaekitError(
                    f"key {to} is not seen from query {query}; choose one at or before it, within the window"
                )
            places.append((query, to))
            weights.append(_contrast(pattern, to) if contrast else _one(pattern, to))
        names = (tuple(one.name for one in self.run.placed), tuple(self.run.biases))
        asked = [_one(patterns[head, query], query) for head in heads]
        sides = (self._parts(layer, heads, side, at) for side, at in (("Q", asked), ("K", weights)))
        return [
            QK((layer, head), place_, self.nodes, q, k, names)
            for head, place_, q, k in zip(heads, places, *sides, strict=True)
        ]

    def _parts(self, layer: int, heads: Sequence[int], side: str, at: Sequence[Tensor]) -> np.ndarray:
        """Each dimension of heads' queries, or of sums of their keys, over the nodes: [head, d_qk, node]."""
        last = max(int(weights.nonzero().max()) for weights in at) + 1
        both = [self.frozen.queries[layer].vectors(side, head) for head in heads]
        covectors = torch.cat(
            [v[:last] * w[:last, None, None] for (v, _), w in zip(both, at, strict=True)], 1
        )
        found = self.run.rows((layer, "attn_in"), covectors)
        own = torch.cat([(w[:, None] * bias).sum(0) for (_, bias), w in zip(both, at, strict=True)])
        return torch.cat([found, own[:, None]], 1).unflatten(0, (len(heads), -1)).cpu().numpy()


def _one(pattern: Tensor, at: int) -> Tensor:
    out = torch.zeros_like(pattern)
    out[at] = 1
    return out


def _contrast(pattern: Tensor, key: int) -> Tensor:
    """The key less the others, weighted by the attention that they get."""
    others = pattern.clone()
    others[key] = 0
    return _one(pattern, key) - others / others.sum().clamp(min=1e-30)


def _with_biases(columns: Columns) -> Nodes:
    """The nodes, and the biases of queries and keys as one more."""
    table = columns.table()
    one = (KINDS.index("bias"), -1, -1, -1, -1, float("nan"))
    names = ("kind", "layer", "position", "stand", "place", "value")
    return Nodes(*(np.append(getattr(table, n), v) for n, v in zip(names, one, strict=True)))


def qk(model: "Model | str | nn.Module", dictionaries: "Stand | Sequence[Stand]",
       prompt: "str | Sequence[int] | Int[Tensor, ' seq']", layer: int, head: int, query: int = -1,
       key: int | None = None, contrast: bool = False) -> QK:  # fmt: skip
    """Why a head at ``query`` looks at ``key`` (None: where it looks most), as a sum over pairs of nodes."""
    return Heads(traced(model, dictionaries, prompt)).qk(layer, head, query, key, contrast)


@dataclass(frozen=True)
class Loadings:
    """What a target's edges pass through: ``heads`` [layer, head, node] by the last head before the target, ``rest``
    [node] by none. They add up to the target's row.
    """

    heads: Float[np.ndarray, "layer head node"]
    rest: Float[np.ndarray, " node"]


def loadings(run: Trace, target: Target | Feature) -> Loadings:
    """Which head carries each edge of a target: paths are told apart by the head that they go through last."""
    frozen, gathered = run.frozen, {}

    def keep(site: Site, gradient: Tensor) -> None:
        gathered[site[0]] = gradient

    rest = run.targets([target], catch=keep)[0]
    out = []
    for layer, block in enumerate(frozen.weights.blocks):
        heads = len(block.attention.W_O)
        if layer not in gathered:
            out.append(rest.new_zeros(heads, len(rest)))
            continue
        g = gathered[layer][:, 0].unflatten(-1, (heads, -1))
        each = torch.einsum("shv,hk->shkv", g, torch.eye(heads).to(g)).flatten(2)
        out.append(run.rows((layer, "z"), each, before=True))  # what came down has passed a dictionary there
    most = max(len(part) for part in out)
    whole = torch.stack([torch.nn.functional.pad(part, (0, 0, 0, most - len(part))) for part in out])
    return Loadings(whole.cpu().numpy(), rest.cpu().numpy())
