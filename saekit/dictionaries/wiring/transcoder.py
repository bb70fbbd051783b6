"""Transcoder: reads what a module reads and writes what it writes (Dunefsky et al. 2024, 2406.11944).

With ``skip`` a linear map runs beside the features (Paulo et al. 2025, 2501.18823), trained with them from
zero. Input and output have normalisations of their own, and fold separately.
"""

from dataclasses import dataclass

import torch
from torch import nn

from saekit.dictionaries.normalisation import ROWS, check_kind
from saekit.dictionaries.wiring.pair import Pair
from saekit.types import SaekitError


@dataclass(frozen=True)
class TranscoderConfig:
    """``d_in`` and ``d_out`` are the widths of the hook points read and written; ``d_out`` None: the same.

    ``normalise``: "scale" (centred, one scale), "whiten", "centre" or "none", for both; "row_std" or "row_norm" by each
    row's own statistics, for what the features read alone. ``skip``: a linear map from input to output beside the
    features.
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
        check_kind(self.normalise, ROWS)


class Transcoder(Pair):
    """With ``skip``, a linear map [d_out, d_in] from input to output."""

    Config = TranscoderConfig
    kind = "rows"

    def __init__(self, config: TranscoderConfig):
        super().__init__(config)
        if config.skip:
            self.skip = nn.Parameter(torch.zeros(self.d_out, self.d_in))
