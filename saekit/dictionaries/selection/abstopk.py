"""AbsTopK: the k entries of largest magnitude, with their signs (2510.00404)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.topk import check_k, ranked
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import topk_encode, topk_encode_aux
from saekit.types import Codes


@dataclass(frozen=True)
class AbsTopKConfig:
    """``k`` entries per row are kept, whatever their sign."""

    k: int

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        check_k(self.k, n_features)


class AbsTopK(nn.Module):
    """Selection by magnitude within a row; codes may be negative, so one feature serves two directions."""

    Config = AbsTopKConfig
    offers = frozenset({"values", "dead", "ranked"})
    affine = True

    def __init__(self, config: AbsTopKConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: k entries each, by falling magnitude."""
        values, indices = topk_encode(x, W_enc, b_enc, self.config.k, absolute=True)
        return ranked(indices, values, len(W_enc), relu=False)

    def train_codes(
        self,
        x: Float[Tensor, "rows *blocks d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """Codes of the rows, and those of the k_aux largest dead features of each row."""
        if state.dead is None or not k_aux:
            return Selected(self(x, W_enc, b_enc))
        n = len(W_enc)
        values, indices, aux_values, aux = topk_encode_aux(
            x, W_enc, b_enc, self.config.k, state.dead, k_aux, absolute=True
        )
        return Selected(ranked(indices, values, n, relu=False), ranked(aux, aux_values, n, relu=False))
