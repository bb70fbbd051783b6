"""An attribution graph as data: nodes, signed edges, and what follows from them by linear algebra. No model."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from saekit.registry import load
from saekit.types import SaekitError

if TYPE_CHECKING:
    from saekit.graph.scores import Scores

KINDS = ("token", "position", "bias", "error", "feature", "pruned", "target")
LINE = 80  # characters of a title
Array = np.ndarray
Number = int | np.integer


@dataclass(frozen=True)
class Nodes:
    """Columns of the nodes' table, one entry each; -1 stands for what a kind has none of.

    ``kind`` counts in KINDS, ``stand`` in the graph's stands. ``place`` is a token's id, the number of a feature or
    target, or where a bias comes from (in the graph's ``biases``). ``value`` is a feature's activation or a target's value.
    """

    kind: Int[Array, " node"]
    layer: Int[Array, " node"]
    position: Int[Array, " node"]
    stand: Int[Array, " node"]
    place: Int[Array, " node"]
    value: Float[Array, " node"]

    def __len__(self) -> int:
        return len(self.kind)

    def only(self, keep: Array) -> "Nodes":
        """The table of some nodes."""
        return Nodes(*(getattr(self, f.name)[keep] for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Several:
    """What a mean or difference of graphs holds besides, for its rows don't give it.

    ``present`` [side, node]: the share of prompts that have each node; a difference has two sides, what is subtracted
    second. ``sizes`` [row]: of the rows that were combined, which may cancel.
    """

    present: Float[Array, "side node"]
    sizes: Float[Array, " row"]

    def only(self, alive: Array, rows: Array) -> "Several":
        """That of some nodes and rows."""
        return Several(self.present[:, alive], self.sizes[rows])


def lines(matrix: csr_array, first: int, stop: int) -> csr_array:
    """Some rows of a matrix, without a copy."""
    a, b = matrix.indptr[first], matrix.indptr[stop]
    part = (matrix.data[a:b], matrix.indices[a:b], matrix.indptr[first : stop + 1] - a)
    return csr_array(part, shape=(stop - first, matrix.shape[1]), copy=False)


@dataclass(frozen=True, repr=False)
class Graph:
    """``rows`` [row, node]: what every node adds to the value of a feature or target, whose node is in ``of`` (rising).

    Each row adds up to its node's value; what was left out is one node, "pruned", signed, and ``dropped`` [row] has
    the sum of its sizes. Rows stand in the order in which the model comes by, and ``blocks`` cuts them where one
    block's nodes can add to the next's; the targets are the last block.
    """

    nodes: Nodes
    rows: csr_array
    of: Int[Array, " row"]
    blocks: tuple[int, ...]  # where each block of rows ends
    dropped: Float[Array, " row"]
    aware: Float[Array, "target node"]  # total effects that also go through attention scores
    weights: tuple[float, ...]  # of the targets, such as their probabilities
    tokens: tuple[int, ...]
    words: tuple[str, ...]  # the tokens as text
    stands: tuple[str, ...]
    biases: tuple[str, ...]
    targets: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)
    totals: Float[Array, "target node"] | None = None  # total effects, where the rows left don't give them
    several: Several | None = None  # of a mean (saekit.graph.average) or a difference (``graph - other``)

    def __repr__(self) -> str:
        return f"Graph({self.title!r}: {len(self.nodes):,} nodes, {self.rows.nnz:,} edges, targets {', '.join(map(repr, map(self.output, range(len(self.targets)))))})"

    def __sub__(self, other: "Graph") -> "Graph":
        """What this graph has more than another; see :func:`saekit.graph.align.difference`."""
        if not isinstance(other, Graph):
            raise SaekitError(
                f"a {type(other).__name__} can't be subtracted from a graph; give another graph"
            )
        return load("saekit.graph.align:difference")(self, other)

    def of_kind(self, *kinds: str) -> Bool[Array, " node"]:
        """Mask of the nodes of some kinds."""
        for kind in kinds:
            if kind not in KINDS:
                raise SaekitError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        return np.isin(self.nodes.kind, [KINDS.index(kind) for kind in kinds])

    @property
    def leaves(self) -> Bool[Array, " node"]:
        """Mask of the nodes that have no row: nothing adds to them, or what does is not in the graph."""
        mask = np.ones(len(self.nodes), bool)
        mask[self.of] = False
        return mask

    @property
    def pruned(self) -> int:
        """The node that stands for everything that was left out."""
        return int(np.flatnonzero(self.of_kind("pruned"))[0])

    @property
    def present(self) -> Float[Array, "side node"]:
        """The share of prompts that have each node: 1, or what :class:`Several` says; a difference has two sides."""
        return np.ones((1, len(self.nodes))) if self.several is None else self.several.present

    @property
    def title(self) -> str:
        """The prompt, or what the graph is of, in a line."""
        text = " ".join("".join(self.words).split()) or " ".join(map(str, self.tokens))
        text = text if len(text) <= LINE else text[: LINE - 1] + "…"
        if len(self.present) > 1:
            return f"Difference: {text}"
        return f"Mean of {self.about['averaged']} prompts: {text}" if self.several is not None else text

    def find(self, kind: str, layer: int | None = None, position: int | None = None, stand: int | None = None,
             place: int | None = None) -> Int[Array, " found"]:  # fmt: skip
        """Numbers of the nodes of a kind with these entries in the table."""
        found = self.of_kind(kind)
        for column, value in (("layer", layer), ("position", position), ("stand", stand), ("place", place)):
            found &= True if value is None else getattr(self.nodes, column) == value
        return np.flatnonzero(found)

    def _check(self, node: Number) -> None:
        if not 0 <= node < len(self.nodes):
            raise SaekitError(f"node {node} is none of the graph's {len(self.nodes)}")

    def row(self, node: Number) -> int:
        """The row of a feature or target."""
        self._check(node)
        at = int(np.searchsorted(self.of, node))
        if at == len(self.of) or self.of[at] != node:
            raise SaekitError(f"node {node} ({self.label(node)}) has no row; choose a feature or a target")
        return at

    def edge(self, source: Number, target: Number) -> float:
        """What one node adds to another directly."""
        self._check(source)
        at = self.row(target)
        part = slice(self.rows.indptr[at], self.rows.indptr[at + 1])
        return float(self.rows.data[part][self.rows.indices[part] == source].sum())

    def inputs(self, node: Number) -> list[tuple[int, float]]:
        """What adds to a node, the strongest first."""
        at = self.row(node)
        part = slice(self.rows.indptr[at], self.rows.indptr[at + 1])
        order = np.argsort(-np.abs(self.rows.data[part]), kind="stable")
        return [(int(self.rows.indices[part][i]), float(self.rows.data[part][i])) for i in order]

    def label(self, node: Number) -> str:
        """A node in words."""
        self._check(node)
        note = self.note(node)
        return self._named(node) + (f", {note}" if note else "")

    def note(self, node: Number) -> str:
        """What there is to say of a node in a mean or difference of graphs: whether all of them have it."""
        shares = self.present[:, node].tolist()
        match shares:
            case [_, 0.0]:
                return "appeared"
            case [0.0, _]:
                return "vanished"
            case [share] if share < 1:
                return f"in {share:.0%} of prompts"
        return f"in {shares[0]:.0%} of prompts, not {shares[1]:.0%}" if shares[0] != shares[-1] else ""

    def _named(self, node: Number) -> str:
        n = self.nodes
        kind, layer, at, place = (int(getattr(n, c)[node]) for c in ("kind", "layer", "position", "place"))
        where = "" if at < 0 else f" at {at}" + (f" ({self.words[at]!r})" if self.words else "")
        match KINDS[kind]:
            case "target":
                return f"target {self.output(place)}{where}"
            case "token" | "position":
                return f"{KINDS[kind]}{where}"
            case "bias":
                return f"bias of {self.biases[place]}{where}"
            case "pruned":
                return "pruned"
        what = f"feature {place}" if KINDS[kind] == "feature" else "error"
        return f"{what} of {self.stands[int(n.stand[node])]} in layer {layer}{where}"

    def output(self, target: int) -> str:
        """A target in words: its token's text, where that is known."""
        if not 0 <= target < len(self.targets):
            raise SaekitError(f"target {target} is none of the graph's {len(self.targets)}")
        return str(self.about.get("outputs", {}).get(self.targets[target], self.targets[target]))

    def sizes(self) -> Float[Array, " row"]:
        """The larger of each row's value and root sum of squares; of several graphs combined, that of the parts."""
        if self.several is not None:
            return self.several.sizes
        squares = csr_array((np.square(self.rows.data, dtype=np.float64), self.rows.indices, self.rows.indptr), self.rows.shape)  # fmt: skip
        return np.maximum(np.abs(self.nodes.value[self.of]), np.sqrt(squares @ np.ones(self.rows.shape[1])))

    def closure(self) -> Float[Array, " row"]:
        """By how much each row misses its node's value, over the row's size."""
        sums = self.rows @ np.ones(self.rows.shape[1], np.float64)
        return np.abs(sums - self.nodes.value[self.of]) / np.maximum(self.sizes(), 1e-30)

    def total_effects(self) -> Float[Array, "target node"]:
        """What every node adds to each target over all paths, signed: ``w (I - W)^-1``, block by block from the end,
        where W holds each row over its node's value.

        The totals of the leaves add up to the target's value. Those of a traced graph are the frozen model's own, over all
        paths, also those through features beyond the budget; pruning keeps them, and combining graphs combines them.
        """
        if self.totals is not None:
            return self.totals
        starts = (0, *self.blocks[:-1])
        total = lines(self.rows, starts[-1], self.blocks[-1]).toarray().astype(np.float64)
        for first, stop in reversed(list(itertools.pairwise(starts))):
            at = self.of[first:stop]
            # of a feature's share in the target each of its inputs has the share that it has in the feature
            total += (total[:, at] / self.nodes.value[at]) @ lines(self.rows, first, stop)
        return total

    def check(self, row: float = 1e-4, target: float = 1e-3) -> dict[str, float]:
        """Prove that the graph closes: the worst row, and by how much the leaves' totals miss a target's value.

        Raises where a row misses by more than ``row`` of its size or a target by more than ``target`` (of the larger
        of 1 and its value).
        """
        worst = float(self.closure().max(initial=0.0))
        values = self.nodes.value[self.of[-len(self.targets) :]]
        off = np.abs(self.total_effects()[:, self.leaves].sum(1) - values) / np.maximum(np.abs(values), 1)
        found = {"row": worst, "target": float(off.max(initial=0.0))}
        for name, most in (("row", row), ("target", target)):
            if not found[name] <= most:
                raise SaekitError(
                    f"a graph's worst {name} misses its value by {found[name]:.2g} ({most:g} is allowed); trace again, in float64 if it is deep"
                )
        return found

    def influence(self) -> Float[Array, " node"]:
        """Share of the targets' absolute mass that comes through each node (Ameisen et al. 2025; circuit-tracer)."""
        return load("saekit.graph.scores:influence")(self)

    def scores(self) -> "Scores":
        """Replacement and completeness scores, on the full mass."""
        return load("saekit.graph.scores:scores")(self)

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "Graph":
        """The graph of what carries these shares of the influence; the rest goes to the pruned node of each row."""
        return load("saekit.graph.prune:prune")(self, nodes, edges)

    def save(self, path: "str | Path") -> Path:
        """Write the graph to a folder: ``graph.safetensors`` and ``graph.json``."""
        return load("saekit.graph.files:save")(self, path)

    def to_json(self, path: "str | Path | None" = None, **options: Any) -> dict[str, Any]:
        """The graph in circuit-tracer's and Neuronpedia's format; see :func:`saekit.graph.export.export`."""
        return load("saekit.graph.export:export")(self, path, **options)

    def to_html(self, path: "str | Path | None" = None, **options: Any) -> str:
        """The graph as one page that needs no network; see :func:`saekit.graph.export.html`."""
        return load("saekit.graph.export:html")(self, path, **options)

    def verify(
        self, model: Any, dictionaries: Any, top: int = 50, seed: int = 0, target: Any = None
    ) -> "Graph":
        """Ablate the strongest nodes and as many random ones; see :func:`saekit.circuits.verify.verify`."""
        if self.several is not None:
            raise SaekitError("the graph is of several prompts or models; verify those that it was made of")
        return load("saekit.circuits.verify:verify")(self, model, dictionaries, top, seed, target)


def with_targets(
    nodes: Nodes, layer: int, positions: Int[Array, " target"], values: Sequence[float]
) -> Nodes:
    """The table with targets behind it."""
    n = len(values)
    ends = (np.full(n, KINDS.index("target")), np.full(n, layer), positions, np.full(n, -1), np.arange(n), np.asarray(values, np.float64))  # fmt: skip
    names = [f.name for f in dataclasses.fields(Nodes)]
    return Nodes(
        *(np.concatenate([getattr(nodes, name), end]) for name, end in zip(names, ends, strict=True))
    )
