"""Two models that share most of their features: a base and its fine-tune, as model diffing meets them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.testbed.planted import sparse_bernoulli
from saekit.types import SaekitError


@dataclass(frozen=True)
class TwoModelsConfig:
    """``shared`` features of both models and ``private`` ones of each, in ``d`` dimensions.

    Each fires at rate ``p`` with values ``1 + |Normal| / 2``. A shared feature has the same direction in both
    models, and in the first a strength between ``weakest`` and 1: what is weak there is what an L1 penalty
    takes for absent.
    """

    shared: int = 48
    private: int = 8
    d: int = 32
    p: float = 0.05
    weakest: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.weakest <= 1:
            raise SaekitError(f"weakest = {self.weakest} must lie in 0..1, without 0")
        if not 0 < self.p < 1:
            raise SaekitError(f"p = {self.p} must lie in 0..1; it is a rate")


class TwoModels:
    """``base`` and ``tuned`` [n, d]: what each feature writes in either model; private ones write 0 in the other.

    Features are the shared ones, then the base's own, then the fine-tune's.
    """

    def __init__(self, config: TwoModelsConfig):
        self.config = config
        g = torch.Generator().manual_seed(config.seed)
        n = config.shared + 2 * config.private
        directions = torch.nn.functional.normalize(torch.randn(n, config.d, generator=g), dim=1)
        strength = torch.ones(n)
        strength[: config.shared] = config.weakest ** torch.rand(config.shared, generator=g)
        first, second = torch.ones(n), torch.ones(n)
        second[config.shared : config.shared + config.private] = 0
        first[config.shared + config.private :] = 0
        self.base: Float[Tensor, "feature d"] = directions * (strength * first)[:, None]
        self.tuned: Float[Tensor, "feature d"] = directions * second[:, None]

    def batch(self, rows: int, step: int) -> Float[Tensor, "rows columns"]:
        """Rows of both models on the same inputs: the base's columns, then the fine-tune's."""
        g = torch.Generator().manual_seed(step)
        row, feature = sparse_bernoulli(torch.full((len(self.base),), self.config.p), rows, g)
        codes = torch.zeros(rows, len(self.base))
        codes[row, feature] = 1 + torch.randn(len(row), generator=g).abs() / 2
        return torch.cat([codes @ self.base, codes @ self.tuned], 1)
