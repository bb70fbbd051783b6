"""Transcoder: reads what a module reads and writes what it writes (Dunefsky et al. 2024, 2406.11944).

With ``skip`` a linear map runs beside the features (Paulo et al. 2025, 2501.18823), trained with them from
zero. Input and output have normalisations of their own, and fold separately.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.normalisation import check_kind
from saekit.types import SaekitError


@dataclass(frozen=True)
class TranscoderConfig:
    """``d_in`` and ``d_out`` are the widths of the hook points read and written; ``d_out`` None: the same.

    ``normalise``: "scale" (centred, one scale), "whiten", "centre" or "none", for both. ``skip``: a linear
    map from input to output beside the features.
    """

    d_in: int
    d_out: int | None = None
    normalise: str = "scale"
    skip: bool = False

    def __post_init__(self):
        for name in ("d_in", "d_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaekitError(f"{name} = {value} must be at least 1")
        check_kind(self.normalise)


class Transcoder(nn.Module):
    """A row is the input's columns, then the output's."""

    Config = TranscoderConfig
    same_space = False
    kind = "rows"
    takes = "module"
    unnamed = ("x", "y")

    def __init__(self, config: TranscoderConfig):
        super().__init__()
        self.d_in, self.d_out = config.d_in, config.d_out or config.d_in
        self.columns = self.d_in + self.d_out
        self.parts_in, self.parts_out = (self.d_in,), (self.d_out,)
        self.stated = f"d_in + d_out = {self.columns}"
        self.normalise = config.normalise
        self.skip = nn.Parameter(torch.zeros(self.d_out, self.d_in)) if config.skip else None

    @staticmethod
    def sites(hook_points: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``(reads, writes)``: two hook points in this order, or the input and the output of one module."""
        if len(hook_points) == 1 and not hook_points[0].endswith((":in", ":out")):
            return (f"{hook_points[0]}:in",), (f"{hook_points[0]}:out",)
        if len(hook_points) != 2:
            raise SaekitError(
                f"a transcoder needs a hook point to read and one to write, or one module, and {len(hook_points)} are given: {', '.join(hook_points)}; name two, or a module as in blocks.1.mlp"
            )
        return (hook_points[0],), (hook_points[1],)

    @staticmethod
    def shape(reads: Sequence[int], writes: Sequence[int]) -> dict[str, int]:
        """The widths of its config, from those of the hook points."""
        return {"d_in": reads[0], "d_out": writes[0]}

    @staticmethod
    def mask(n_features: int) -> None:
        """Every feature reads and writes all columns."""

    @staticmethod
    def points(reads: Sequence[str], writes: Sequence[str]) -> tuple[str, ...]:
        """The hook points whose columns make a row of training data."""
        return (*reads, *writes)

    def split(
        self, rows: Float[Tensor, "batch columns"]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """What is encoded, and what the output is compared with."""
        return rows[:, : self.d_in], rows[:, self.d_in :]
