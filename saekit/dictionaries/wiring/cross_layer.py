"""Cross-layer transcoder: each layer's features read that layer and write to it and to every later one.

Ameisen et al. and Lindsey et al. 2025 (transformer-circuits.pub). A per-layer transcoder is its diagonal case.
"""

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
        """``(reads, writes)``: inputs and outputs of modules, or the hook points read, then those written."""
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
        return reads, writes

    points = staticmethod(Transcoder.points)
    split = Transcoder.split
