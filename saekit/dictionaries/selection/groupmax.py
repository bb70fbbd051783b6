"""GroupMax: the features are cut into k equal groups, and the largest of each is kept.

The sparsity of TopK without a ranking across the dictionary, as sparsify's activation of that name.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.topk import check_k, dead_codes, ranked
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import topk_encode
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class GroupMaxConfig:
    """``k`` groups of neighbouring features, one active feature in each."""

    k: int

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        check_k(self.k, n_features)
        if n_features % self.k:
            raise SaekitError(
                f"k = {self.k} does not divide n_features = {n_features}; groupmax needs groups of equal size"
            )


class GroupMax(nn.Module):
    """Selection by rank within a group of a row, then ReLU."""

    Config = GroupMaxConfig
    offers = frozenset({"values", "dead"})
    affine = True

    def __init__(self, config: GroupMaxConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: one entry per group, by rising index."""
        values, indices = topk_encode(x, W_enc, b_enc, 1, groups=self.config.k)
        return ranked(indices, values, len(W_enc))

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
