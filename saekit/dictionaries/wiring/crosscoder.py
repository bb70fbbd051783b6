"""Crosscoder: reads and writes several hook points, or the same one of several models (Lindsey et al. 2024).

Its features are shared: one code writes a direction into every source. Penalties fall on ``z sum_s ||d_s||``,
the norms of a feature's directions in the sources added up, and each source has a normalisation of its own. TopK
and BatchTopK rank by z, which with unit rows is the norm of what is written into all sources together (Minder et
al. 2025 rank by ``z sum_s ||d_s||``, at most sqrt(2) apart for two sources).
``dedicated`` features read and write one source alone (Mishra-Sharma et al. 2025), so that what two models
share and what they don't needn't compete for the same features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from saekit.dictionaries.normalisation import check_kind
from saekit.dictionaries.wiring.autoencoder import Autoencoder
from saekit.types import SaekitError


@dataclass(frozen=True)
class CrosscoderConfig:
    """``d_in`` holds the width of each source: ``(512, 512)``.

    ``normalise``: "scale" (centred, one scale for each source), "centre" or "none". ``dedicated``: how many
    features belong to each source alone; they are the last ones, in the order of the sources.
    """

    d_in: tuple[int, ...]
    normalise: str = "scale"
    dedicated: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.d_in or min(self.d_in) < 1:
            raise SaekitError(f"d_in = {self.d_in} must hold the width of each source, at least 1")
        check_kind(self.normalise)
        if self.normalise == "whiten" and len(self.d_in) > 1:
            raise SaekitError(
                "normalise = 'whiten' would mix the sources, whose norms count one by one; choose 'scale'"
            )
        if self.dedicated is not None and (len(self.dedicated) != len(self.d_in) or min(self.dedicated) < 0):
            raise SaekitError(
                f"dedicated = {self.dedicated} must hold a number of features for each of {len(self.d_in)} sources"
            )

    def check(self, n_features: int) -> None:
        """Raise unless a dictionary of this width has room for the dedicated features."""
        if self.dedicated is not None and sum(self.dedicated) > n_features:
            raise SaekitError(
                f"dedicated = {self.dedicated} are more than n_features = {n_features}; choose fewer, or a wider dictionary"
            )


class Crosscoder(nn.Module):
    """The columns of all sources side by side, each source read and written."""

    Config = CrosscoderConfig
    same_space = True
    kind = "rows"
    takes = "all"
    skip = None

    def __init__(self, config: CrosscoderConfig):
        super().__init__()
        self.config = config
        self.parts_in = self.parts_out = config.d_in
        self.d_in = self.d_out = self.columns = sum(config.d_in)
        self.stated = f"d_in = {' + '.join(map(str, config.d_in))}"
        self.unnamed = tuple(f"x{i}" for i in range(len(config.d_in)))
        self.normalise = config.normalise

    @staticmethod
    def shape(reads: Sequence[int], writes: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The widths of its config, from those of the hook points."""
        return {"d_in": tuple(reads)}

    @staticmethod
    def sites(hook_points: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``(reads, writes)``: all hook points given, for both."""
        return tuple(hook_points), tuple(hook_points)

    points = staticmethod(Autoencoder.points)
    split = Autoencoder.split

    def mask(self, n_features: int) -> Bool[Tensor, "feature d_in"] | None:
        """Which columns each feature may read and write; None where no feature is dedicated."""
        dedicated = self.config.dedicated
        if dedicated is None or not any(dedicated):
            return None
        mask = torch.zeros(n_features, self.d_in, dtype=torch.bool)
        mask[: n_features - sum(dedicated)] = True
        feature, column = n_features - sum(dedicated), 0
        for count, width in zip(dedicated, self.parts_in, strict=True):
            mask[feature : feature + count, column : column + width] = True
            feature, column = feature + count, column + width
        return mask
