"""What a dictionary does with planted features that it splits or lacks.

``decoder`` [feature, d_in] are the dictionary's decoder rows and ``truth`` [n_true, d_in] the planted
directions, of any norm. The *nearest* true feature of a dictionary feature is the one of largest
|cosine|; ties go to the lowest index. ``codes`` and ``true_codes`` belong to the same rows in the same
order; a feature fires where its code is not 0.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evaluate.geometry import cosine_blocks
from saekit.types import Codes, SaekitError, check_codes


class Splitting(NamedTuple):
    """Over the true features that have a dictionary feature; NaN with none."""

    share: float  # of them with more than one, in [0, 1]
    mean: float  # dictionary features of each, in [1, n_features]
    counts: Int[Tensor, " n_true"]  # dictionary features of every true feature, 0 where it has none


@torch.no_grad()
def splitting(
    decoder: Float[Tensor, "feature d_in"],
    truth: Float[Tensor, "n_true d_in"],
    codes: Codes,
    true_codes: Codes,
    threshold: float = 0.5,
) -> Splitting:
    """How many dictionary features a true feature is spread over.

    Dictionary feature f is *of* true feature t when t is nearest to f, f fires, and t is active in more
    than ``threshold`` of the rows in which f fires. ``counts[t]`` is the number of such f; a true
    feature with more than one is split. A copy that never fires, and a direction that fires where t
    is not, don't count. True features with none are lost, not split: they are left out of share and
    mean. A perfect dictionary has share 0 and mean 1; one in which every true feature has its own s
    features (Bricken et al. 2023, feature splitting) has share 1 and mean s. A child's feature that
    leans towards its parent counts for the parent: absorption looks like splitting here.
    """
    check_codes(decoder, truth, codes, true_codes)
    if not 0 <= threshold < 1:
        raise SaekitError(f"threshold = {threshold} must lie in 0..1, 1 excluded; it is a share of rows")
    true_of, n_true = _nearest(decoder, truth), len(truth)
    row, feature = codes.active()
    true_row, true_feature = true_codes.active()
    both = torch.isin(row * n_true + true_of[feature], true_row * n_true + true_feature)
    hits = torch.bincount(feature[both], minlength=len(decoder))
    own = hits > threshold * codes.firing_counts()  # false where neither ever is
    counts = torch.bincount(true_of[own], minlength=n_true)
    found = counts[counts > 0].double()
    return Splitting((found > 1).double().mean().item(), found.mean().item(), counts)


@torch.no_grad()
def hedging(decoder: Float[Tensor, "feature d_in"], truth: Float[Tensor, "n_true d_in"]) -> float:
    """How much dictionary features mix in true features that have none of their own, in [0, 1].

    A true feature is *unmatched* when it is nearest to no dictionary feature. For every dictionary
    feature w with nearest true feature t, fit ``w ~ c_t v_t + sum_u c_u v_u`` by least squares over t
    and the unmatched u (unit rows); its share is ``sum_u c_u^2 / (c_t^2 + sum_u c_u^2)``, and the value
    is the mean over dictionary features. Features of zeros are left out; NaN with no other.

    0 for a perfect dictionary, for one that has some of the true features exactly, and where no true
    feature is unmatched; 1/2 for one feature that is the sum of two orthogonal ones. Where t and the
    unmatched features are linearly dependent the fit is not unique: the solution with the smallest
    ``sum_u c_u^2`` is taken, which is 0 for an exact w; but as d_in or more of them fit anything, every
    error of w then counts as mixed in. Invariant to the scale and sign of rows. Feature hedging is of
    Chanin et al. (2025, 2505.11756). One pseudo-inverse [unmatched, d_in] per nearest true feature.
    """
    rows = F.normalize(decoder.double(), dim=1, eps=1e-300)
    alive = rows.any(1)
    rows, true_of = rows[alive], _nearest(decoder, truth)[alive]
    unit = F.normalize(truth.double(), dim=1, eps=1e-300)
    matched = true_of.unique()
    unmatched = torch.ones(len(truth), dtype=torch.bool, device=truth.device)
    unmatched[matched] = False
    if not len(rows):
        return math.nan
    if not bool(unmatched.any()):
        return 0.0
    others, shares = unit[unmatched], []
    for t in matched.tolist():
        v, of_t = unit[t], rows[true_of == t]
        # what v_t can fit is projected out of both sides (Frisch & Waugh), so c_t carries no penalty
        rest = others - torch.outer(others @ v, v)
        remainder = of_t - torch.outer(of_t @ v, v)
        c_u = remainder @ torch.linalg.pinv(rest, atol=1e-6)  # directions of float32
        c_t = (of_t - c_u @ others) @ v
        mixed = c_u.square().sum(1)
        shares.append(mixed / (c_t.square() + mixed))
    return torch.cat(shares).nanmean().item()


def _nearest(decoder: Tensor, truth: Tensor) -> Tensor:
    for name, rows in (("decoder", decoder), ("truth", truth)):
        if not len(rows):
            raise SaekitError(f"{name} has no rows; give 1 direction or more")
    return torch.cat([cosine.abs().argmax(1) for _, cosine in cosine_blocks(decoder, truth)])
