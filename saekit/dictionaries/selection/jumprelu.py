"""JumpReLU: a pre-activation counts where it exceeds its feature's threshold, which is learned.

Rajamanoharan et al. 2024 (2407.14435). The threshold is stored as it is, not as a logarithm, and its
pseudo-gradients look at pre-activations, so both halves of the kernel's window teach it. Where a feature has
died, AuxK teaches it what the others leave, and its threshold sinks until that is enough to fire.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.relu import above, preactivations
from saekit.dictionaries.selection.topk import dead_codes
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import KERNELS, jumprelu, threshold_encode
from saekit.registry import nearest
from saekit.types import Codes, SaekitError

SINKING = 0.95  # of a dead feature's threshold, a step: no row is near it, so that no gradient lowers it


@dataclass(frozen=True)
class JumpReLUConfig:
    """``bandwidth``: full width of the ``kernel``'s window around a threshold, in normalised units.

    ``start``: threshold before training; None takes the one that leaves ``density`` of the
    pre-activations of the data's first rows active.
    """

    bandwidth: float = 1.0
    kernel: str = "rectangle"
    start: float | None = None
    density: float = 0.05

    def __post_init__(self):
        if not 0 < self.bandwidth < float("inf"):
            raise SaekitError(f"bandwidth = {self.bandwidth} must be a number above 0")
        if self.kernel not in KERNELS:
            raise SaekitError(f"kernel {self.kernel!r} is unknown{nearest(self.kernel, list(KERNELS))}")
        if self.start is not None and not 0 <= self.start < float("inf"):
            raise SaekitError(f"start = {self.start} must be a threshold of at least 0")
        if not 0 < self.density < 1:
            raise SaekitError(f"density = {self.density} must lie between 0 and 1; it is a share of features")

    def check(self, n_features: int) -> None:
        """Any width will do."""


class JumpReLU(nn.Module):
    """``z = u 1[u > threshold]`` with a threshold >= 0 per feature."""

    Config = JumpReLUConfig
    offers = frozenset({"values", "dead", "on", "free_l0"})
    affine = True
    elementwise = True

    def __init__(self, config: JumpReLUConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config
        self.threshold = nn.Parameter(torch.full((n_features,), config.start or 0.0))

    @torch.no_grad()
    def prepare(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
        """Choose the first threshold by the data, unless the config names one."""
        if self.config.start is None:
            u = preactivations(x[:4096], W_enc, b_enc)
            count = max(1, round(self.config.density * u.numel()))
            self.threshold.fill_(u.flatten().topk(count).values[-1].clamp(min=0))

    @torch.no_grad()
    def reset(self, dead: Tensor) -> None:
        """Give resampled features the threshold of the others."""
        live = self.threshold[~dead]
        self.threshold[dead] = live.mean() if len(live) else 0.0

    def begin(self, b_enc: Tensor, threshold: Tensor | None) -> Tensor:
        """Take over what another dictionary ended with; returns the encoder's bias."""
        if threshold is not None:
            self.threshold.data.copy_(threshold)
        return b_enc

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: the entries above their thresholds, by rising index."""
        return above(x, W_enc, b_enc, self.threshold.detach())

    def train_codes(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes; entries of the window below a threshold are silent, and teach it."""
        c, n = self.config, len(W_enc)
        offsets, indices, u = threshold_encode(x, W_enc, b_enc, self.threshold - c.bandwidth / 2)
        values, on = jumprelu(u, indices, self.threshold, c.bandwidth, c.kernel)
        codes = Codes(offsets, indices, values, n, (len(x),))
        return Selected(codes, dead_codes(x, W_enc, b_enc, state, k_aux), on=on)

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Let thresholds of dead features sink until they fire, and none below 0, where codes would turn negative."""
        if state.dead is not None:
            self.threshold.mul_(torch.where(state.dead, SINKING, 1.0))
        self.threshold.clamp_(min=0)

    def thresholds(self, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Itself."""
        return W_enc, b_enc, self.threshold.detach().clone()
