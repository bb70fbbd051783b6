"""Autoencoder: reads one hook point and writes the same one."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.normalisation import ROWS, check_kind
from saekit.types import SaekitError


@dataclass(frozen=True)
class AutoencoderConfig:
    """``d_in`` is the width of the hook point.

    ``normalise``: "scale" (centred, one scale), "whiten", "centre" or "none"; "row_std" or "row_norm" go by each row's
    own statistics.
    """

    d_in: int
    normalise: str = "scale"

    def __post_init__(self):
        if self.d_in < 1:
            raise SaekitError(f"d_in = {self.d_in} must be at least 1")
        check_kind(self.normalise, ROWS)


class Autoencoder(nn.Module):
    """The identity wiring: the target of a row is the row itself."""

    Config = AutoencoderConfig
    same_space = True
    kind = "rows"
    takes = "each"
    unnamed = ("x",)
    skip = None

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.d_in = self.d_out = self.columns = config.d_in
        self.parts_in = self.parts_out = (config.d_in,)
        self.stated = f"d_in = {config.d_in}"
        self.normalise = config.normalise

    @staticmethod
    def shape(reads: Sequence[int], writes: Sequence[int]) -> dict[str, int]:
        """The widths of its config, from those of the hook points."""
        return {"d_in": reads[0]}

    @staticmethod
    def mask(n_features: int) -> None:
        """Every feature reads and writes all columns."""

    @staticmethod
    def sites(hook_points: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``(reads, writes)``: the hook points, of those given, that this wiring reads and writes."""
        if len(hook_points) != 1:
            raise SaekitError(
                f"an autoencoder reads one hook point and {len(hook_points)} are given: {', '.join(hook_points)}; choose one"
            )
        return tuple(hook_points), tuple(hook_points)

    @staticmethod
    def points(reads: Sequence[str], writes: Sequence[str]) -> tuple[str, ...]:
        """The hook points whose columns make a row of training data."""
        return tuple(reads)

    def split(
        self, rows: Float[Tensor, "batch columns"]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """What is encoded, and what the output is compared with; the same tensor."""
        return rows, rows
