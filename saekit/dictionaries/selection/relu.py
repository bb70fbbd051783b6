"""ReLU: every positive pre-activation is a code; how many there are is up to a penalty (Bricken et al. 2023)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.topk import dead_codes
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import threshold_encode
from saekit.types import Codes


def above(x: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor) -> Codes:
    """Codes of the pre-activations above each feature's ``lower`` [n_features], by rising index."""
    offsets, indices, values = threshold_encode(x, W_enc, b_enc, lower)
    return Codes(offsets, indices, values, len(W_enc), (len(x),))


def preactivations(
    x: Float[Tensor, "rows *blocks d_in"],
    W_enc: Float[Tensor, "feature d_in"],
    b_enc: Float[Tensor, " feature"],
) -> Float[Tensor, "rows feature"]:
    """All of them, dense: for a few rows."""
    if x.ndim == 2:
        return torch.addmm(b_enc, x, W_enc.T)
    return torch.einsum("rbi,bfi->rbf", x, W_enc.unflatten(0, (x.shape[1], -1))).flatten(1) + b_enc


@dataclass(frozen=True)
class ReLUConfig:
    """Nothing to choose."""

    def check(self, n_features: int) -> None:
        """Any width will do."""


class ReLU(nn.Module):
    """``z = max(u, 0)``."""

    Config = ReLUConfig
    offers = frozenset({"values", "dead", "free_l0"})
    affine = True
    elementwise = True

    def __init__(self, config: ReLUConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: the positive entries, by rising index."""
        return above(x, W_enc, b_enc, torch.zeros_like(b_enc))

    def train_codes(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes, and those of the k_aux largest dead features of each row."""
        return Selected(self(x, W_enc, b_enc), dead_codes(x, W_enc, b_enc, state, k_aux))
