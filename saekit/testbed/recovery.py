"""How well a dictionary recovers planted features: pure functions of directions and sparse codes.

``decoder`` [feature, d_in] are the dictionary's decoder rows and ``truth`` [n_true, d_in] the
planted directions, of any norm; ``codes`` and ``true_codes`` belong to the same rows in the same
order, in the units of the data. A feature fires where its code is not 0. Directions are compared by
|cosine|. Nothing of shape [rows, features] is built: codes stay lists of (row, feature) pairs.

``mcc``, ``uniqueness``, ``f1``, ``precision``, ``recall`` and ``shrinkage`` follow SynthSAEBench
(Chanin & Garriga-Alonso 2026, arXiv 2602.14687); where the definitions differ the docstring says so.
``absorption`` states the absorption of Chanin et al. (2024, arXiv 2409.14507) on a known hierarchy.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saekit.types import Codes, SaekitError, check_codes

BLOCK = 1 << 24  # cosines, or coordinates of reconstructions, held at a time (64 MB)
CARRIED = 0.5  # weight of the parent in a child's feature, relative to the child, that counts as carried


class Matches(NamedTuple):
    """Nearest directions by |cosine|, both ways; ties go to the lowest index."""

    true_of: Int[Tensor, " feature"]  # the true feature nearest to each dictionary feature
    feature_of: Int[Tensor, " n_true"]  # the dictionary feature nearest to each true feature
    cosine: Float[Tensor, " n_true"]  # |cosine| of each true feature with its nearest, in [0, 1]


class Classification(NamedTuple):
    """Each dictionary feature as a detector of its nearest true feature, all in [0, 1].

    NaN where neither ever fired: such a feature was not put to the test.
    """

    f1: Float[Tensor, " feature"]
    precision: Float[Tensor, " feature"]
    recall: Float[Tensor, " feature"]


def recovery(
    decoder: Float[Tensor, "feature d_in"],
    truth: Float[Tensor, "n_true d_in"],
    codes: Codes,
    true_codes: Codes,
    parent: Int[Tensor, " n_true"],
    offset: Float[Tensor, " d_in"] | None = None,
) -> dict[str, float]:
    """All the planted metrics by key; each is defined at the function of its name.

    ``f1``, ``precision`` and ``recall`` are means over the dictionary features that were tested.
    """
    detection = classification(decoder, truth, codes, true_codes)
    return {
        "mcc": mcc(decoder, truth),
        **{key: value.nanmean().item() for key, value in detection._asdict().items()},
        "uniqueness": uniqueness(decoder, truth),
        "shrinkage": shrinkage(decoder, truth, codes, true_codes, offset),
        "absorption": absorption(decoder, truth, codes, true_codes, parent),
        "dead_share": dead_share(codes),
    }


@torch.no_grad()
def matches(decoder: Float[Tensor, "feature d_in"], truth: Float[Tensor, "n_true d_in"]) -> Matches:
    """Nearest true feature of every dictionary feature, and the other way round."""
    unit, true_unit = _unit(decoder), _unit(truth)
    best = true_unit.new_full((len(truth),), -1.0)
    feature_of = torch.zeros(len(truth), dtype=torch.int64, device=truth.device)
    true_of, step = [], max(1, BLOCK // len(truth))
    for start in range(0, len(decoder), step):
        cosine = (unit[start : start + step] @ true_unit.T).abs()
        true_of.append(cosine.argmax(1))
        value, index = cosine.max(0)
        better = value > best
        best = torch.where(better, value, best)
        feature_of = torch.where(better, index + start, feature_of)
    return Matches(torch.cat(true_of), feature_of, best.clamp(max=1.0))


@torch.no_grad()
def mcc(decoder: Float[Tensor, "feature d_in"], truth: Float[Tensor, "n_true d_in"]) -> float:
    """Mean |cosine| of the best one-to-one matching of directions (Hungarian), in [0, 1].

    The mean is over ``min(n_features, n_true)`` pairs: 1 when every feature of the smaller side has
    a partner of its own. Needs no codes. Time grows with the cube of the smaller side.
    """
    cosine = (_unit(decoder) @ _unit(truth).T).abs().cpu()
    row, column = linear_sum_assignment(cosine.numpy(), maximize=True)
    return cosine[row, column].double().mean().clamp(max=1.0).item()


def uniqueness(decoder: Float[Tensor, "feature d_in"], truth: Float[Tensor, "n_true d_in"]) -> float:
    """Different true features among the nearest ones, per dictionary feature, in (0, 1].

    1 when no two dictionary features have the same nearest true feature; above n_true features the
    most it can reach is ``n_true / n_features``.
    """
    return matches(decoder, truth).true_of.unique().numel() / len(decoder)


def classification(
    decoder: Float[Tensor, "feature d_in"],
    truth: Float[Tensor, "n_true d_in"],
    codes: Codes,
    true_codes: Codes,
) -> Classification:
    """F1, precision and recall of each dictionary feature for its nearest true feature.

    Precision: share of the rows where the feature fires in which the true feature is active.
    Recall: share of the rows where the true feature is active in which the feature fires. Each is 0
    where its own denominator is 0 and the other's is not. SynthSAEBench also scores 0 where both
    are; here those are NaN and left out of means, so that a perfect dictionary scores 1 on any rows.
    """
    check_codes(decoder, truth, codes, true_codes)
    true_of = matches(decoder, truth).true_of
    row, feature = codes.active()
    n_true = len(truth)
    both = torch.isin(row * n_true + true_of[feature], _keys(true_codes))
    hits = torch.bincount(feature[both], minlength=len(decoder)).double()
    fired, active = codes.firing_counts(), true_codes.firing_counts()[true_of]
    tested = (fired + active) > 0
    scores = (2 * hits / (fired + active), hits / fired.clamp(min=1), hits / active.clamp(min=1))
    return Classification(*(torch.where(tested, score, torch.nan) for score in scores))


def dead_share(codes: Codes) -> float:
    """Share of the dictionary's features that fire in no row, in [0, 1]."""
    return (codes.firing_counts() == 0).double().mean().item()


@torch.no_grad()
def shrinkage(
    decoder: Float[Tensor, "feature d_in"],
    truth: Float[Tensor, "n_true d_in"],
    codes: Codes,
    true_codes: Codes,
    offset: Float[Tensor, " d_in"] | None = None,
) -> float:
    """Norm of the reconstructions over norm of the activations, bias removed; 1 is no shrinkage.

    ``sum_r ||z_r D + offset|| / sum_r ||a_r V||``, below 1 when a penalty shrinks the codes. The
    world's bias is left out of both, since it would hide shrinkage: ``offset`` is the dictionary's
    decoder bias minus the world's, 0 when left out. SynthSAEBench averages the ratios of rows, bias
    included; the ratio of sums does not depend on rows that are nearly zero.
    """
    check_codes(decoder, truth, codes, true_codes)
    return _norms(codes, decoder, offset) / _norms(true_codes, truth, None)


def recovery_by_frequency_decile(
    decoder: Float[Tensor, "feature d_in"],
    truth: Float[Tensor, "n_true d_in"],
    frequency: Float[Tensor, " n_true"],
) -> Float[Tensor, "10"]:
    """Mean |cosine| of true features with their nearest dictionary feature, by tenths of frequency.

    ``frequency`` orders the true features (``PlantedWorld.rates``, or counts); entry 0 is the tenth
    that fires most often, entry 9 the rarest. Each in [0, 1].
    """
    if len(truth) < 10:
        raise SaekitError(f"truth has {len(truth)} features: deciles need 10 or more")
    order = frequency.argsort(descending=True, stable=True)
    cosine = matches(decoder, truth).cosine[order].double()
    return torch.stack([tenth.mean() for tenth in cosine.tensor_split(10)])


@torch.no_grad()
def absorption(
    decoder: Float[Tensor, "feature d_in"],
    truth: Float[Tensor, "n_true d_in"],
    codes: Codes,
    true_codes: Codes,
    parent: Int[Tensor, " n_true"],
) -> float:
    """How often a parent is left to its children's features, in [0, 1]; NaN with nothing to measure.

    ``parent`` gives each true feature's parent, -1 for none. The feature *of* a true feature t is
    the dictionary feature nearest to v_t. It counts as t's own when the true feature nearest to it
    is t or an ancestor of t (an absorbed feature leans towards the ancestors that it carries); t is
    then *tracked*.

    An event is a pair (row, p) in which p and at least one descendant c of p are truly active, p
    and c are tracked, and by different features. It is absorbed when p's feature is silent and the
    feature d of one such c is active and carries p: in the least-squares fit ``d ~ x v_c + y v_p``,
    ``y >= x / 2`` with both of d's sign. The fit keeps the overlap of v_c and v_p, which
    superposition alone brings, from counting. The value is absorbed events over events.

    0 for the true dictionary; 1 when every child's feature is child plus parent and the parent's
    feature only fires alone. Invariant to the scale and sign of decoder rows.
    """
    check_codes(decoder, truth, codes, true_codes)
    _check_parents(parent, len(truth))
    found = matches(decoder, truth)
    feature_of, tracked = found.feature_of, _tracked(found, parent)
    nearest, unit = _unit(decoder)[feature_of], _unit(truth)
    fired, active = _keys(codes), _keys(true_codes)
    n_features, n_true = len(decoder), len(truth)
    row, true_feature = true_codes.active()
    events, absorbed = [row[:0]], [row[:0]]
    ancestor = parent
    while bool((ancestor >= 0).any()):
        above = ancestor.clamp(min=0)
        pair = (ancestor >= 0) & tracked & tracked[above] & (feature_of != feature_of[above])
        carries = _carries(nearest, unit, unit[above])
        at = pair[true_feature]
        r, c = row[at], true_feature[at]
        at = torch.isin(r * n_true + above[c], active)
        r, c = r[at], c[at]
        event = r * n_true + above[c]
        silent = ~torch.isin(r * n_features + feature_of[above[c]], fired)
        lit = torch.isin(r * n_features + feature_of[c], fired)
        events.append(event)
        absorbed.append(event[silent & lit & carries[c]])
        ancestor = torch.where(ancestor >= 0, parent[above], -1)
    total = torch.cat(events).unique().numel()
    return torch.cat(absorbed).unique().numel() / total if total else math.nan


def _check_parents(parent: Tensor, n: int) -> None:
    """Raise unless it names for each feature another, or -1, and following it always ends."""
    if len(parent) != n or not bool(((parent >= -1) & (parent < n)).all()):
        raise SaekitError(f"parent must hold -1 or one of 0..{n - 1} for each of the {n} true features; it has {len(parent)} in {parent.unique().tolist()[:9]}")  # fmt: skip
    above = parent
    for _ in range(n):
        if not bool((above >= 0).any()):
            return
        above = torch.where(above >= 0, parent[above.clamp(min=0)], -1)
    raise SaekitError(f"parent leads from feature {int((above >= 0).nonzero()[0])} back to itself; give -1 for those without a parent")  # fmt: skip


def _tracked(found: Matches, parent: Tensor) -> Tensor:
    """Whether each true feature's nearest feature is nearest to it or to one of its ancestors."""
    nearest = found.true_of[found.feature_of]
    relative = torch.arange(len(parent), device=parent.device)
    tracked = nearest == relative
    while bool((relative >= 0).any()):
        relative = torch.where(relative >= 0, parent[relative.clamp(min=0)], -1)
        tracked |= nearest == relative
    return tracked


def _carries(direction: Tensor, child: Tensor, ancestor: Tensor) -> Tensor:
    """Whether rows of ``direction`` hold enough of ``ancestor`` beside ``child`` (unit rows)."""
    overlap = (child * ancestor).sum(1)
    with_child, with_ancestor = (direction * child).sum(1), (direction * ancestor).sum(1)
    # the normal equations' solution, without its common positive factor 1 / (1 - overlap^2)
    x, y = with_child - overlap * with_ancestor, with_ancestor - overlap * with_child
    return (y * x >= CARRIED * x * x) & (x != 0)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=1)


def _keys(codes: Codes) -> Tensor:
    """One number for each (row, feature) that fires."""
    row, feature = codes.active()
    return row * codes.n_features + feature


def _norms(codes: Codes, directions: Tensor, offset: Tensor | None) -> float:
    """Sum over rows of the norm of codes times directions plus offset, a block of rows at a time."""
    total, step = 0.0, max(1, BLOCK // directions.shape[1])
    for start in range(0, codes.rows, step):
        offsets = codes.offsets[start : start + step + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        summed = F.embedding_bag(
            codes.indices[entries].long(), directions.float(), offsets - offsets[0],
            mode="sum", per_sample_weights=codes.values[entries].float(), include_last_offset=True,
        )  # fmt: skip
        total += (summed if offset is None else summed + offset).norm(dim=1).double().sum().item()
    return total
