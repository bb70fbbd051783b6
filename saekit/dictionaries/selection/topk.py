"""TopK: the k largest pre-activations of each row, then ReLU (Gao et al. 2024, 2406.04093, eq. 3)."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from saekit.kernels import topk_encode, topk_encode_aux
from saekit.types import Codes, SaekitError


def check_k(k: int, n_features: int) -> None:
    """Raise unless so many features can be active."""
    if not 1 <= k <= n_features:
        raise SaekitError(
            f"k = {k} must lie in 1..n_features = {n_features}; choose a smaller k or a wider dictionary"
        )


@dataclass(frozen=True)
class TopKConfig:
    """``k`` entries per row are kept; ``relu`` sets the negative ones among them to zero."""

    k: int
    relu: bool = True

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        check_k(self.k, n_features)


class TopK(nn.Module):
    """Selection by rank within a row; a function of its own row alone."""

    Config = TopKConfig
    affine = True  # whether codes depend on the input through W x + b alone

    def __init__(self, config: TopKConfig):
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: k entries each, by falling value, ties to the lowest index."""
        values, indices = topk_encode(x, W_enc, b_enc, self.config.k)
        return self._codes(values, indices, len(W_enc))

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        dead: Bool[Tensor, " feature"] | None = None,
        k_aux: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """Codes of the rows, and those of the k_aux largest dead features of each row (None without any)."""
        if dead is None or not k_aux:
            return self(x, W_enc, b_enc), None
        k = self.config.k
        values, indices, aux_values, aux_indices = topk_encode_aux(x, W_enc, b_enc, k, dead, k_aux)
        aux = Codes.from_rectangular(aux_indices, aux_values.relu(), len(W_enc))
        return self._codes(values, indices, len(W_enc)), aux

    def _codes(self, values: Tensor, indices: Tensor, n_features: int) -> Codes:
        return Codes.from_rectangular(indices, values.relu() if self.config.relu else values, n_features)
