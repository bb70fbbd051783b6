"""Whether two dictionaries hold the same features: cosines of their decoder rows.

``a`` [n_a, d_in] and ``b`` [n_b, d_in] are decoder rows of any norm, such as those of two seeds, or
of a dictionary and a planted truth. Cosines are signed: a feature and its opposite are different. A
row of zeros has cosine 0 with every row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evaluate.geometry import cosine_blocks
from saekit.types import SaekitError


class Pairs(NamedTuple):
    """Matched rows of two dictionaries, by rising row of ``a``; on the CPU."""

    a: Int[Tensor, " pairs"]
    b: Int[Tensor, " pairs"]
    cosine: Float[Tensor, " pairs"]


def stability(a: Float[Tensor, "n_a d_a"], b: Float[Tensor, "n_b d_b"]) -> float:
    """Mean cosine of the best one-to-one matching, ``max_P (1 / n) sum_i cos(a_i, b_P(i))``, in [-1, 1].

    n = min(n_a, n_b) pairs (Hungarian). 1 for the same features in any order; symmetric; unchanged by
    positive scales and by one rotation of both. Two random dictionaries are not at 0: the more rows,
    the better the best matching, so report it beside a random pair of the same shapes. Stab(D, D') of
    Fel et al. (2025, 2502.12892). Time grows with the cube of n, and it holds n_a * n_b float64.
    """
    return _matched(a, b).cosine.mean().item()


@torch.no_grad()
def mmcs(a: Float[Tensor, "n_a d_a"], b: Float[Tensor, "n_b d_b"]) -> float:
    """Mean over rows of a of the largest cosine with a row of b, in [-1, 1].

    Mean max cosine similarity (Sharkey et al. 2022). Not symmetric: 1 where b has every feature of a,
    whatever else it has. ``mmcs(a, b) >= stability(a, b)`` for n_a <= n_b.
    """
    _check(a, b)
    best = [cosine.amax(1).double() for _, cosine in cosine_blocks(a, b)]
    return torch.cat(best).mean().item()


def shared_features(a: Float[Tensor, "n_a d_a"], b: Float[Tensor, "n_b d_b"], cosine: float) -> Pairs:
    """The pairs of the matching of ``stability`` whose cosine is at least ``cosine``.

    One-to-one, at most min(n_a, n_b) pairs; what share of features two seeds have in common is their
    number over n (Paulo & Belrose 2025, 2501.16615).
    """
    if not -1 <= cosine <= 1:
        raise SaekitError(f"cosine = {cosine} must lie in -1..1; 0.7 is a common choice")
    pairs = _matched(a, b)
    kept = pairs.cosine >= cosine
    return Pairs(*(column[kept] for column in pairs))


@torch.no_grad()
def _matched(a: Tensor, b: Tensor) -> Pairs:
    from scipy.optimize import linear_sum_assignment

    _check(a, b)
    table = torch.empty(len(a), len(b), dtype=torch.float64)  # what the solver reads without a copy
    for start, block in cosine_blocks(a, b):
        table[start : start + len(block)] = block
    row, column = (torch.from_numpy(index) for index in linear_sum_assignment(table.numpy(), maximize=True))
    return Pairs(row, column, table[row, column])


def _check(a: Tensor, b: Tensor) -> None:
    for name, given in (("a", a), ("b", b)):
        if not len(given):
            raise SaekitError(f"{name} has no rows; give the decoder of a dictionary")
    if a.shape[1] != b.shape[1]:
        raise SaekitError(f"b has {b.shape[1]} columns and a {a.shape[1]}; compare dictionaries of one space")
