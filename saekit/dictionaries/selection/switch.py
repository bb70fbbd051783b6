"""Switch: a router sends each row to one expert, whose features alone may be active (Mudide et al. 2024, 2410.08201).

The product with the encoder shrinks to one expert's share of it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.topk import check_k, dead_codes
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import topk_encode
from saekit.kernels.checks import finite
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class SwitchConfig:
    """``experts`` equal runs of features; ``k`` features of the chosen one are active.

    Codes are weighted with the chosen expert's probability, which is how the router learns;
    ``heaviside`` drops the weight.
    """

    k: int
    experts: int = 8
    heaviside: bool = False

    @property
    def requires(self) -> str | None:
        """The term without which a part isn't trained: codes that aren't weighted tell the router nothing."""
        return "load_balance" if self.heaviside else None

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        if self.experts < 1 or n_features % self.experts:
            raise SaekitError(
                f"experts = {self.experts} does not divide n_features = {n_features}; switch needs experts of equal size"
            )
        check_k(self.k, n_features // self.experts)


class Switch(nn.Module):
    """``p = softmax(router x)``, ``z = TopK(ReLU(W x + b)) p`` within the expert of the largest p, 0 elsewhere."""

    Config = SwitchConfig
    offers = frozenset({"values", "dead", "routes", "ranked"})
    affine = True

    def __init__(self, config: SwitchConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.randn(config.experts, d_in) * d_in**-0.5)
        self.b_router = nn.Parameter(torch.zeros(config.experts))

    def forward(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: k entries each, by falling value."""
        return self._routed(x, W_enc, b_enc)[0]

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes, with the probability of each expert; and those of dead features."""
        codes, p = self._routed(x, W_enc, b_enc)
        return Selected(codes, dead_codes(x, W_enc, b_enc, state, k_aux), routes=p)

    def tangent(
        self, codes: Codes, x: Float[Tensor, "entry d_in"], W_enc: Float[Tensor, "feature d_in"]
    ) -> tuple[Tensor, Tensor]:
        """``value = w x + b`` of each code, with the probability of its expert as it is."""
        weight = W_enc[codes.indices.long()]
        if not self.config.heaviside:
            weight = weight * self._experts(x).amax(1, keepdim=True)
        return weight, codes.values - (weight * x).sum(1)

    def _experts(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_router, x, self.router.T).softmax(-1)

    def _routed(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Codes, Tensor]:
        finite(x, x=x)
        p = self._experts(x)
        weight, expert = p.max(-1)
        order = expert.argsort(stable=True)
        size, values, indices = len(W_enc) // self.config.experts, [], []
        ends = torch.bincount(expert, minlength=self.config.experts).cumsum(0).tolist()
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            block = slice(e * size, (e + 1) * size)
            v, i = topk_encode(x[order[start:end]], W_enc[block], b_enc[block], self.config.k)
            values.append(v)
            indices.append(i + e * size)
        back = order.argsort()
        chosen = torch.cat(values)[back].relu()
        if not self.config.heaviside:
            chosen = chosen * weight[:, None]
        return Codes.from_rectangular(torch.cat(indices)[back], chosen, len(W_enc)), p

    @torch.no_grad()
    def fold(self, weight) -> None:
        """Read raw rows: ``weight(W)`` gives the folded weights and the bias that they need."""
        router, bias = weight(self.router)
        self.router.copy_(router)
        self.b_router.add_(bias)
