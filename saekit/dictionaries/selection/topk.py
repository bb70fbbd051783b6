"""TopK: the k largest pre-activations of each row, then ReLU (Gao et al. 2024, 2406.04093, eq. 3).

With ``relu=False``, ``alpha`` and ``k_start`` it is the k-sparse autoencoder (Makhzani & Frey 2014,
1312.5663): linear units, a slightly larger support at inference, and a k that falls in training.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import topk_encode, topk_encode_aux
from saekit.types import Codes, SaekitError

NEVER = -1e15  # a bias that no pre-activation outweighs


def check_k(k: int, n_features: int, name: str = "k") -> None:
    """Raise unless so many features can be active."""
    if not 1 <= k <= n_features:
        raise SaekitError(
            f"{name} = {k} must lie in 1..n_features = {n_features}; choose a smaller {name} or a wider dictionary"
        )


def annealed(k: int, k_start: int | None, anneal: float, state: TrainState) -> int:
    """k of a step: from k_start linearly to k over the first ``anneal`` share of the run."""
    if k_start is None:
        return k
    return round(k_start + (k - k_start) * state.ramp(anneal))


def check_annealing(k_start: int | None, anneal: float, n_features: int) -> None:
    """Raise unless k can start there and fall (or rise) for such a share of the run."""
    if k_start is not None:
        check_k(k_start, n_features, "k_start")
    if not 0 <= anneal <= 1:
        raise SaekitError(f"anneal = {anneal} must lie in 0..1; it is a share of the run")


def ranked(indices: Tensor, values: Tensor, n_features: int, relu: bool = True) -> Codes:
    """Codes of [rows, k] entries, negative ones silenced where there is a ReLU."""
    return Codes.from_rectangular(indices, values.relu() if relu else values, n_features)


@dataclass(frozen=True)
class TopKConfig:
    """``k`` entries per row are kept; ``relu`` sets the negative ones among them to zero.

    ``alpha``: at inference ``alpha * k`` are kept. ``k_start``: training begins with this k and comes
    linearly to k over the first ``anneal`` share of the run.
    """

    k: int
    relu: bool = True
    alpha: float = 1.0
    k_start: int | None = None
    anneal: float = 0.5

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        check_k(self.k, n_features)
        check_annealing(self.k_start, self.anneal, n_features)
        if not 0 < self.alpha < math.inf:
            raise SaekitError(
                f"alpha = {self.alpha} must be a number above 0; 1 keeps k entries at inference"
            )


class TopK(nn.Module):
    """Selection by rank within a row; a function of its own row alone."""

    Config = TopKConfig
    offers = frozenset({"values", "dead", "ranked"})
    affine = True

    def __init__(self, config: TopKConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config
        self.k_inference = min(n_features, max(1, round(config.alpha * config.k)))

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: alpha * k entries each, by falling value, ties to the lowest index."""
        values, indices = topk_encode(x, W_enc, b_enc, self.k_inference)
        return ranked(indices, values, len(W_enc), self.config.relu)

    def train_codes(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """Codes of the rows, and those of the k_aux largest dead features of each row."""
        c, n = self.config, len(W_enc)
        k = annealed(c.k, c.k_start, c.anneal, state)
        if state.dead is None or not k_aux:
            values, indices = topk_encode(x, W_enc, b_enc, k)
            return Selected(ranked(indices, values, n, c.relu))
        values, indices, aux_values, aux = topk_encode_aux(x, W_enc, b_enc, k, state.dead, k_aux)
        return Selected(ranked(indices, values, n, c.relu), ranked(aux, aux_values, n))


def dead_codes(x: Tensor, W_enc: Tensor, b_enc: Tensor, state: TrainState, k_aux: int) -> Codes | None:
    """Codes of the k_aux largest dead features of each row, for selections that don't find them by the way."""
    if state.dead is None or not k_aux:
        return None
    if x.ndim == 3:  # the dead are not shared out evenly among the blocks: all are ranked, and no other wins
        values, at = topk_encode(x, W_enc, b_enc.masked_fill(~state.dead, NEVER), k_aux)
        return ranked(at, values, len(W_enc))
    which = state.dead.nonzero()[:, 0]
    values, at = topk_encode(x, W_enc[which], b_enc[which], k_aux)
    return ranked(which.to(torch.int32)[at.long()], values, len(W_enc))
