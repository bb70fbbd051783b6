"""Small forests of features: children need their parent, siblings exclude each other, directions may correlate.

The toy worlds in which absorption was first shown (Nabeshima's Matryoshka toy; MP-SAE, Costa et al. 2025,
2506.03093): a sparse dictionary that folds a parent into its children saves a code whenever a child is on.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.testbed.planted import sparse_bernoulli
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class ForestConfig:
    """``roots`` trees with ``branching`` children each, and ``singles`` without a tree.

    A root fires at ``p_root``, one of its children at ``p_child`` each where the root does, a single at
    ``p_single``. Features are unit vectors in as many dimensions, orthogonal but for siblings, whose cosine
    is ``cosine``. Active values are ``magnitude + spread * Normal``, at least 0.1.
    """

    roots: int = 3
    branching: int = 3
    singles: int = 8
    p_root: float = 0.15
    p_child: float = 0.2
    p_single: float = 0.05
    cosine: float = 0.0
    magnitude: float = 1.0
    spread: float = 0.0

    def __post_init__(self):
        if not 0 <= self.p_child * self.branching <= 1:
            raise SaekitError(
                f"p_child = {self.p_child} times branching = {self.branching} must not exceed 1: siblings exclude each other"
            )
        if not 0 <= self.cosine < 1:
            raise SaekitError(f"cosine = {self.cosine} must lie in 0..1, without 1")

    @property
    def n_features(self) -> int:
        """Roots and singles first, then the children, siblings side by side."""
        return self.roots * (1 + self.branching) + self.singles


class Forest:
    """``directions`` [n_features, n_features], ``parent`` int64 [n_features] (-1 for none), ``l0`` on average."""

    def __init__(self, config: ForestConfig):
        self.config = config
        n, top = config.n_features, config.roots + config.singles
        parent = torch.full((n,), -1)
        parent[top:] = torch.arange(config.roots).repeat_interleave(config.branching)
        self.parent: Int[Tensor, " feature"] = parent
        eye = torch.eye(n)
        families = [_leaning(family, config.cosine) for family in eye[top:].split(config.branching)]
        self.directions: Float[Tensor, "feature d_in"] = torch.cat([eye[:top], *families])
        self.l0 = (
            config.roots * config.p_root * (1 + config.branching * config.p_child)
            + config.singles * config.p_single
        )

    def batch(self, rows: int, seed: int) -> tuple[Float[Tensor, "rows d_in"], Codes]:
        """Activations and their true codes; a function of rows and seed."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        rate = torch.cat([torch.full((c.roots,), c.p_root), torch.full((c.singles,), c.p_single)])
        row, feature = sparse_bernoulli(rate.double(), rows, generator)
        root = feature < c.roots
        # one uniform number decides which child comes, if any
        uniform = torch.rand(int(root.sum()), generator=generator)
        child = (uniform / c.p_child).long() if c.p_child else torch.full_like(row[root], c.branching)
        comes = child < c.branching
        below = c.roots + c.singles + feature[root] * c.branching + child
        row = torch.cat([row, row[root][comes]])
        feature = torch.cat([feature, below[comes]])
        value = (c.magnitude + c.spread * torch.randn(len(row), generator=generator)).clamp(min=0.1)
        dense = torch.zeros(rows, c.n_features).index_put((row, feature), value)
        return dense @ self.directions, Codes.from_dense(dense)


def _leaning(basis: Tensor, cosine: float) -> Tensor:
    """Unit vectors in the span of an orthonormal basis, each pair at this cosine: ``q_i + a sum_j q_j``."""
    n = len(basis)
    if n < 2 or cosine == 0:
        return basis
    # (2 a + n a^2) / (1 + 2 a + n a^2) = cosine
    s = cosine / (1 - cosine)
    a = (-1 + (1 + n * s) ** 0.5) / n
    return torch.nn.functional.normalize(basis + a * basis.sum(0), dim=1)
