"""Cross-layer transcoder: each layer's features read that layer and write to it and to every later one.

Ameisen et al. and Lindsey et al. 2025 (transformer-circuits.pub). A per-layer transcoder is its diagonal case.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from saekit.dictionaries.normalisation import check_kind
from saekit.dictionaries.wiring.transcoder import Transcoder
from saekit.types import SaekitError


@dataclass(frozen=True)
class CrossLayerConfig:
    """``n_layers`` layers of widths ``d_in`` and ``d_out`` (None: the same).

    The dictionary's ``n_features`` and ``k`` are totals, shared out equally among the layers. ``reach``: how
    many layers a feature writes to, from its own on; None for all, 1 for per-layer transcoders. ``normalise``:
    "scale" (centred, one scale for each layer's input and output), "centre" or "none".
    """

    d_in: int
    n_layers: int
    d_out: int | None = None
    reach: int | None = None
    normalise: str = "scale"

    def __post_init__(self):
        for name in ("d_in", "n_layers", "d_out", "reach"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaekitError(f"{name} = {value} must be at least 1")
        check_kind(self.normalise)
        if self.normalise == "whiten" and self.n_layers > 1:
            raise SaekitError("normalise = 'whiten' would mix the layers; choose 'scale'")

    def check(self, n_features: int) -> None:
        """Raise unless every layer gets as many features."""
        if n_features % self.n_layers:
            raise SaekitError(
                f"n_features = {n_features} can't be shared out among {self.n_layers} layers; choose a multiple of {self.n_layers}"
            )


def block_of(hook_point: str) -> tuple[str, int]:
    """What stands before the first number of a hook point's name, and the number; ``("", 0)`` without one."""
    found = re.match(r"(.*?\.)(\d+)(?=[.:]|$)", hook_point)
    return (found[1], int(found[2])) if found else ("", 0)


class CrossLayerWiring(nn.Module):
    """A row is the inputs of all layers, then their outputs."""

    Config = CrossLayerConfig
    same_space = False
    kind = "cross_layer"
    takes = "modules"
    skip = None

    def __init__(self, config: CrossLayerConfig):
        super().__init__()
        self.layers, d_out = config.n_layers, config.d_out or config.d_in
        self.reach = min(config.reach or self.layers, self.layers)
        self.parts_in, self.parts_out = (config.d_in,) * self.layers, (d_out,) * self.layers
        self.d_in, self.d_out = sum(self.parts_in), sum(self.parts_out)
        self.columns = self.d_in + self.d_out
        self.stated = f"n_layers * (d_in + d_out) = {self.columns}"
        self.unnamed = tuple(f"{side}{layer}" for side in "xy" for layer in range(self.layers))
        self.normalise = config.normalise

    @staticmethod
    def shape(reads: Sequence[int], writes: Sequence[int]) -> dict[str, int]:
        """The widths of its config, from those of the hook points."""
        if len({*reads}) != 1 or len({*writes}) != 1:
            raise SaekitError(
                f"the layers read {', '.join(map(str, reads))} and write {', '.join(map(str, writes))} columns: a cross-layer transcoder needs layers of one width"
            )
        return {"d_in": reads[0], "n_layers": len(reads), "d_out": writes[0]}

    def written(self, layer: int) -> tuple[int, int]:
        """The layers that a layer's features write to: from the first, up to the second."""
        return layer, min(layer + self.reach, self.layers)

    @staticmethod
    def mask(n_features: int) -> None:
        """What is zero is not stored: each layer's features have a decoder of their own."""

    @staticmethod
    def sites(hook_points: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``(reads, writes)``: inputs and outputs of modules, or the hook points read, then those written.

        Both in the order of the blocks, which is the order that the model runs them in.
        """
        if not any(":" in point or "hook_" in point for point in hook_points):  # modules
            hook_points = [f"{point}:{side}" for side in ("in", "out") for point in hook_points]
        if all(point.endswith((":in", ":out")) for point in hook_points):
            reads = tuple(point for point in hook_points if point.endswith(":in"))
            writes = tuple(point for point in hook_points if point.endswith(":out"))
        else:
            half = len(hook_points) // 2
            reads, writes = tuple(hook_points[:half]), tuple(hook_points[half:])
        if len(reads) != len(writes):
            raise SaekitError(
                f"a cross-layer transcoder reads as many hook points as it writes, and {', '.join(hook_points)} are given; name modules, or the inputs and then the outputs"
            )
        return _by_block(reads), _by_block(writes)

    @staticmethod
    def points(reads: Sequence[str], writes: Sequence[str]) -> tuple[str, ...]:
        """The hook points whose columns make a row of training data; raises unless both go from block to block."""
        for side in (reads, writes):
            wanted = _by_block(side)
            if wanted != tuple(side):
                raise SaekitError(
                    f"hook points {', '.join(side)} are not in the order of their blocks, in which layers write to later ones; give {', '.join(wanted)}"
                )
        numbers = _blocks((*reads, *writes))
        for at, (read, write) in enumerate(zip(reads, writes, strict=False)):
            if numbers and numbers[at] != numbers[len(reads) + at]:
                raise SaekitError(
                    f"layer {at} reads {read!r} and writes {write!r}, which are of different blocks; name as many hook points of each block to read as to write"
                )
        return Transcoder.points(reads, writes)

    split = Transcoder.split


def _blocks(hook_points: Sequence[str]) -> list[int]:
    """The block number of each, as of ``blocks.3.mlp:in``; none where names have none or count different things."""
    found = [block_of(point) for point in hook_points]
    return [number for _, number in found] if len({stem for stem, _ in found}) == 1 and found[0][0] else []


def _by_block(hook_points: Sequence[str]) -> tuple[str, ...]:
    """In the order of their blocks; as they are where names don't tell."""
    numbers = _blocks(hook_points)
    if not numbers:
        return tuple(hook_points)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return tuple(hook_points[i] for i in order)
