"""Tied atoms: the encoder reads by the rows that the decoder writes (Makhzani & Frey 2014, 1312.5663)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.atoms.unit_norm import UnitNorm


@dataclass(frozen=True)
class TiedConfig:
    """``unit_norm`` keeps the rows at norm 1, which a pursuit needs."""

    unit_norm: bool = True


class Tied(nn.Module):
    """One row per feature for both ways."""

    Config = TiedConfig
    tied = True
    trained = True

    def __init__(
        self, config: TiedConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):
        super().__init__()
        self.unit = config.unit_norm
        self.weight = nn.Parameter(directions)

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """Decoder and encoder, one row per feature."""
        return self.weight

    def after_step(self) -> None:
        """Bring the rows back to norm 1, where that is asked for."""
        if self.unit:
            UnitNorm.after_step(self)  # type: ignore[arg-type]
