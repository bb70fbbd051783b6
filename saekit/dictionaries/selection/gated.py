"""Gated: one set of directions decides whether a feature is active and, rescaled, how much.

Rajamanoharan et al. 2024 (2404.16014). The sparsity penalty falls on the gate alone, so it doesn't
shrink the magnitudes; a second reconstruction from the gate, through a frozen decoder, trains it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.relu import above
from saekit.dictionaries.selection.topk import dead_codes
from saekit.dictionaries.training import Selected, TrainState
from saekit.types import Codes


@dataclass(frozen=True)
class GatedConfig:
    """Nothing to choose."""

    def check(self, n_features: int) -> None:
        """Any width will do."""


class Gated(nn.Module):
    """``z = 1[W x + b_enc > 0] * ReLU(exp(r) * W x + b_mag)``; b_enc is the gate's bias."""

    Config = GatedConfig
    offers = frozenset({"values", "dead", "gate", "free_l0"})
    affine = True
    elementwise = True
    requires = "gate"

    def __init__(self, config: GatedConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config
        self.r = nn.Parameter(torch.zeros(n_features))
        self.b_mag = nn.Parameter(torch.zeros(n_features))

    @torch.no_grad()
    def reset(self, dead: Tensor) -> None:
        """Give resampled features magnitudes as their gate has them."""
        self.r[dead] = 0
        self.b_mag[dead] = 0

    @torch.no_grad()
    def begin(self, b_enc: Tensor, threshold: Tensor | None) -> Tensor:
        """Take over what another dictionary ended with; returns the gate's bias."""
        self.b_mag.copy_(b_enc)
        return b_enc if threshold is None else b_enc - threshold

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: the entries with an open gate, by rising index."""
        codes = above(x, W_enc, b_enc, torch.zeros_like(b_enc))
        return codes.with_values(self._magnitude(codes, b_enc))

    def train_codes(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes, and the gate's positive pre-activations."""
        # the gate's bias belongs to the gate alone: magnitudes must not send it a gradient
        bias = b_enc.detach()
        pi = above(x, W_enc, bias, torch.zeros_like(bias))
        gate = pi.with_values(pi.values + (b_enc - bias)[pi.indices.long()])
        codes = pi.with_values(self._magnitude(pi, bias))
        return Selected(codes, dead_codes(x, W_enc, b_enc, state, k_aux), gate=gate)

    def read_by(self, codes: Codes, W_enc: Float[Tensor, "feature d_in"]) -> tuple[Tensor, Tensor]:
        """``value = w x + b`` of each code: its magnitude, with the gate as it is."""
        at = codes.indices.long()
        return W_enc[at] * self.r.exp()[at, None], self.b_mag[at]

    def _magnitude(self, gate: Codes, b_enc: Tensor) -> Tensor:
        at = gate.indices.long()
        return torch.relu(self.r.exp()[at] * (gate.values - b_enc[at]) + self.b_mag[at])

    @torch.no_grad()
    def thresholds(self, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its rule at inference is a JumpReLU (2404.16014, appendix): the gate opens where the magnitude passes a value."""
        scale = self.r.exp()
        threshold = (self.b_mag - scale * b_enc).clamp(min=0)
        return W_enc * scale[:, None], self.b_mag.clone(), threshold
