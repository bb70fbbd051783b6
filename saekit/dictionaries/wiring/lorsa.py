"""Lorsa: low-rank sparse attention, which stands in for an attention layer (He et al. 2025, 2504.20938).

A feature is an attention head of rank one: it reads a direction at the positions where its QK head looks and
writes a direction where that head stands. Features are shared out evenly among the QK heads, whose weights are
trained with them. Since a pattern's rows sum to 1, a feature's pre-activation ``sum_s A_ts (w x_s + b)`` is
``w (sum_s A_ts x_s) + b``: what a head has gathered comes first, and an ordinary encoder reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.attention import PatternConfig, Patterns
from saekit.dictionaries.normalisation import Normalisation, check_kind
from saekit.dictionaries.wiring.pair import Pair
from saekit.types import SaekitError


@dataclass(frozen=True)
class LorsaConfig(PatternConfig):
    """``d_in`` and ``d_out`` are the widths read and written (``d_out`` None: the same).

    ``n_qk`` heads of ``d_qk`` dimensions look where attention goes, as :class:`PatternConfig` says. ``normalise``:
    "scale" (centred, one scale), "whiten", "centre" or "none", for both sides.
    """

    d_out: int | None = None
    normalise: str = "scale"

    def __post_init__(self):
        super().__post_init__()
        if self.d_out is not None and self.d_out < 1:
            raise SaekitError(f"d_out = {self.d_out} must be at least 1")
        check_kind(self.normalise)

    def check(self, n_features: int) -> None:
        """Raise unless every QK head gets as many features."""
        if n_features % self.n_qk:
            raise SaekitError(
                f"n_features = {n_features} can't be shared out among n_qk = {self.n_qk} heads; choose a multiple"
            )


class Lorsa(Pair):
    """Rows come as whole sequences; ``patterns`` are where its QK heads look."""

    Config = LorsaConfig
    kind = "sequences"
    natural: Tensor

    def __init__(self, config: LorsaConfig):
        super().__init__(config)
        self.patterns = Patterns(config)
        # whether the heads read the units of the model still, as copies of a layer's do before normalisation
        self.register_buffer("natural", torch.tensor(False))

    def mix(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "head rows d_in"]:
        """What each QK head has gathered at every position."""
        return (self.patterns(x).transpose(0, 1) @ x).flatten(1, 2)

    @torch.no_grad()
    def normalised(self, norm: Normalisation) -> None:
        """Let the heads read normalised inputs and look where they did."""
        for weight, bias in self._projections(self.patterns):
            new, shift = norm.unfold(weight.flatten(0, 1))
            weight.copy_(new.view(weight.shape))
            bias.add_(shift.view(bias.shape))
        self.natural.fill_(False)

    @torch.no_grad()
    def fold_into(self, other: "Lorsa", norm: Normalisation) -> None:
        """Give another wiring, which reads the units of the model, heads that look where these do."""
        other.patterns.load_state_dict(self.patterns.state_dict())
        for weight, bias in self._projections(other.patterns):
            new, shift = norm.fold(weight.flatten(0, 1))
            weight.copy_(new.view(weight.shape))
            bias.add_(shift.view(bias.shape))

    @staticmethod
    def _projections(patterns: Patterns) -> Sequence[tuple[Tensor, Tensor]]:
        return (patterns.W_Q, patterns.b_Q), (patterns.W_K, patterns.b_K)
