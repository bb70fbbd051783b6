"""An attribution graph as data: nodes, and what each adds to the value of another. No model."""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

KINDS = ("token", "position", "bias", "error", "feature", "target")


@dataclass(frozen=True)
class Nodes:
    """Columns of the nodes' table, one entry each; -1 stands for what a kind has none of.

    ``kind`` counts in KINDS, ``stand`` in the graph's stands. ``place`` is a token's id, the number of a feature or
    target, or where a bias comes from (in the graph's ``biases``). ``value`` is a feature's activation or a target's value.
    """

    kind: Int[Tensor, " node"]
    layer: Int[Tensor, " node"]
    position: Int[Tensor, " node"]
    stand: Int[Tensor, " node"]
    place: Int[Tensor, " node"]
    value: Float[Tensor, " node"]


@dataclass(frozen=True)
class Graph:
    """``rows`` [row, node]: what every node adds to the value of a feature or target, whose node is in ``of``.

    Each row adds up to its node's value. Rows stand in the order in which the model comes by, and ``blocks`` cuts
    them where one block's nodes can add to the next's; the targets are the last block.
    """

    nodes: Nodes
    rows: Float[Tensor, "row node"]
    of: Int[Tensor, " row"]
    blocks: tuple[int, ...]  # where each block of rows ends
    tokens: tuple[int, ...]
    stands: tuple[str, ...]
    biases: tuple[str, ...]
    targets: tuple[str, ...]

    def closure(self) -> Float[Tensor, " row"]:
        """By how much each row misses its node's value, over the larger of that and the row's root mean square sum."""
        values = self.nodes.value[self.of]
        size = torch.maximum(values.abs(), self.rows.norm(dim=1)).clamp(min=1e-30)
        return (self.rows.sum(1) - values).abs() / size

    def total_effects(self) -> Float[Tensor, "target node"]:
        """What every node adds to each target over all paths, signed: ``w (I - W)^-1``, block by block from the end,
        where W holds each row over its node's value.

        The totals of the leaves (all that are no features) add up to the target's value.
        """
        starts = (0, *self.blocks[:-1])
        total = self.rows[starts[-1] :].clone()
        for first, stop in reversed(list(itertools.pairwise(starts))):
            at = self.of[first:stop]
            # of a feature's share in the target each of its inputs has the share that it has in the feature
            total += (total[:, at] / self.nodes.value[at].to(total)) @ self.rows[first:stop]
        return total

    @property
    def leaves(self) -> Tensor:
        """Mask of the nodes that nothing adds to."""
        return (self.nodes.kind != KINDS.index("feature")) & (self.nodes.kind != KINDS.index("target"))
