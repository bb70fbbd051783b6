"""BatchTopK: the k * batch largest pre-activations of a whole batch (Bussmann et al. 2024, 2412.06410).

Rows share a budget, so easy ones spend less of it. That couples the rows of a batch, so at inference
a threshold takes its place: a running mean of the smallest activation that a batch kept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.relu import above
from saekit.dictionaries.selection.topk import annealed, check_annealing, check_k, dead_codes
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import batchtopk_encode
from saekit.types import Codes

MEMORY = 1000  # steps that the running mean of the threshold looks back on, in a long run


@dataclass(frozen=True)
class BatchTopKConfig:
    """``k`` active features per row on average.

    ``k_start``: training begins with this k and comes linearly to k over the first ``anneal`` share of
    the run.
    """

    k: int
    k_start: int | None = None
    anneal: float = 0.5

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        check_k(self.k, n_features)
        check_annealing(self.k_start, self.anneal, n_features)


class BatchTopK(nn.Module):
    """Selection by rank within a batch in training, by one threshold at inference."""

    Config = BatchTopKConfig
    offers = frozenset({"values", "dead"})
    affine = True
    elementwise = True
    threshold: Tensor
    observed: Tensor

    def __init__(self, config: BatchTopKConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))

    def begin(self, b_enc: Tensor, threshold: Tensor | None) -> Tensor:
        """Take over what another dictionary ended with; returns the encoder's bias."""
        if threshold is not None:
            self.threshold.copy_(threshold.mean())
        return b_enc

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: the entries above the threshold, by rising index."""
        return above(x, W_enc, b_enc, self.threshold.expand_as(b_enc))

    def train_codes(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The k * rows largest entries of the batch, then ReLU; and those of dead features."""
        c = self.config
        k = annealed(c.k, c.k_start, c.anneal, state)
        offsets, indices, values = batchtopk_encode(x, W_enc, b_enc, k)
        codes = Codes(offsets, indices, values.relu(), len(W_enc), (len(x),))
        return Selected(codes, dead_codes(x, W_enc, b_enc, state, k_aux))

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Take the smallest kept activation of a training batch into the threshold's running mean."""
        kept = codes.values[codes.values > 0]
        if len(kept) == 0:
            return
        memory = MEMORY if state.steps is None else min(MEMORY, max(1, state.steps // 20))
        self.observed += 1
        self.threshold.lerp_(kept.min(), 1 / self.observed.clamp(max=memory))

    def thresholds(self, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its rule at inference is a JumpReLU with one threshold for all."""
        return W_enc, b_enc, self.threshold.expand_as(b_enc).clone()
