"""Codebook: the activation is snapped to the sum of the k codes that are nearest to it (Tamkin et al. 2023, 2310.17230).

Nearest is by inner product with the code's direction. A code is on or off: it adds itself, whatever the activation's
size, so its value is 1 and carries no gradient; codes learn from the error, and from whatever the model makes of the
sum where they are spliced in (see :meth:`saekit.replacement.Replacement.spliced`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from saekit.dictionaries.selection.topk import check_k
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import topk_encode
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class CodebookConfig:
    """``k`` codes are added up. ``groups``: as many codebooks side by side, of equal size, each of its own columns, as
    those of attention heads are; k codes come from each.
    """

    k: int
    groups: int = 1

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        if self.groups < 1 or n_features % self.groups:
            raise SaekitError(f"groups = {self.groups} does not divide n_features = {n_features}")
        check_k(self.k, n_features // self.groups)


class Codebook(nn.Module):
    """Selection by rank within a row (and group); every chosen code has value 1."""

    Config = CodebookConfig
    offers: frozenset[str] = frozenset()
    affine = False
    tied_only = True  # codes are constants: an encoder of its own would never be trained
    biased = False

    def __init__(self, config: CodebookConfig, n_features: int, d_in: int):
        super().__init__()
        if d_in % config.groups:
            raise SaekitError(f"groups = {config.groups} does not divide d_in = {d_in}; choose a divisor")
        self.config = config

    def mask(self, n_features: int, d_in: int) -> Bool[Tensor, "feature d_in"] | None:
        """Which columns each code has: those of its group."""
        c = self.config
        if c.groups == 1:
            return None
        block = torch.ones(n_features // c.groups, d_in // c.groups, dtype=torch.bool)
        return torch.block_diag(*[block] * c.groups).bool()

    @torch.no_grad()
    def prepare(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
        """Begin with activations of the data, so that k of them add up to one; each once while there are enough."""
        n, have = len(W_enc), len(x)
        chosen = torch.cat([torch.randperm(have) for _ in range(-(-n // have))])[:n]
        W_enc.copy_(x[chosen.to(x.device)] / self.config.k)

    @torch.no_grad()
    def forward(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: k ones from each group, the nearest first; the bias is not used."""
        c = self.config
        values, indices = topk_encode(
            x, normalize(W_enc, dim=-1), torch.zeros_like(b_enc), c.k, groups=c.groups
        )
        return Codes.from_rectangular(indices, torch.ones_like(values), len(W_enc))

    def read_by(self, codes: Codes, W_enc: Float[Tensor, "feature d_in"]) -> tuple[Tensor, Tensor]:
        """``value = w x + b`` of each code: constants read nothing."""
        return W_enc.new_zeros(len(codes.values), W_enc.shape[1]), codes.values

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes."""
        return Selected(self(x, W_enc, b_enc))
