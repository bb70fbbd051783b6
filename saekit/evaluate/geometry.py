"""How directions lie in their space: effective rank, coherence, and diagnostics of a wrong L0.

``atoms`` [feature, d_in] are a dictionary's decoder rows. Cosines are of unit rows, whatever the norm
of the rows given; a row of zeros has cosine 0 with every row. Cosines and projections are made in
blocks: nothing of shape [feature, feature] or [rows, feature] is held.
"""

from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saekit.types import Codes, SaekitError

BLOCK = 1 << 24  # numbers held at a time (64 MB in float32)


class EffectiveRank(NamedTuple):
    """Three counts of the dimensions that activations use, of the eigenvalues λ of their covariance."""

    entropy: float  # exp(H(λ / sum λ)), H in nats
    participation: float  # (sum λ)^2 / sum λ^2
    dimensions: int  # how many of the largest λ hold ``share`` of their sum


class CoactiveBabel(NamedTuple):
    """The Babel function of the features of a row, over the rows with 2 active features or more."""

    mean: float
    max: float
    rows: int  # how many rows have 2 active features or more


@torch.no_grad()
def effective_rank(x: Float[Tensor, "*rows d_in"], share: float = 0.99) -> EffectiveRank:
    """Effective rank of activations, in dimensions; each number in [1, min(d_in, rows - 1)].

    ``participation <= entropy``, both equal to r for a covariance with r equal eigenvalues.
    Unchanged by rotation, shift and scale of x. The three readings of the dimensional collapse of
    attention outputs (Wang et al. 2025, 2508.16929); time grows with the cube of d_in.
    """
    if not 0 < share <= 1:
        raise SaekitError(f"share = {share} must lie in 0..1; 0.99 counts the dimensions of 99 % of variance")
    rows = x.reshape(-1, x.shape[-1])
    mean = rows.mean(0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in rows.split(max(1, BLOCK // len(mean))):
        centred = block.double() - mean
        covariance += centred.T @ centred
    rounding = 1e-28 * len(rows) * float(mean.square().sum())  # of the mean, in float64
    if not rounding < float(covariance.trace()) < float("inf"):
        raise SaekitError("x has no variance or is not finite; give 2 or more different finite rows")
    spectrum = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    spectrum /= spectrum.sum()
    entropy, participation = torch.special.entr(spectrum).sum().exp(), 1 / spectrum.square().sum()
    held = spectrum.cumsum(0) >= share - 1e-12  # the last bits of a sum of shares are rounding
    return EffectiveRank(entropy.item(), participation.item(), 1 + int((~held).sum()))


@torch.no_grad()
def babel(atoms: Float[Tensor, "feature d_in"], r: int) -> float:
    """Babel function ``max_{|S| = r} max_{j not in S} sum_{i in S} |cos(w_i, w_j)|``, in [0, r].

    The best S for an atom are the r others nearest to it, so it is the largest sum of r |cosines| of
    one row with others. 0 for orthogonal atoms; never falls as r grows; r = 1 is the coherence. Tropp
    (2004); of dictionaries Costa et al. (2025, 2506.03093).
    """
    if not 1 <= r < len(atoms):
        raise SaekitError(f"r = {r} must lie in 1..{len(atoms) - 1}: one atom is compared with r others")
    return max(cosine.topk(r).values.double().sum(1).max().item() for cosine in _coherence(atoms))


@torch.no_grad()
def coactive_babel(atoms: Float[Tensor, "feature d_in"], codes: Codes, r: int) -> CoactiveBabel:
    """The Babel function within the set of features that are active in a row, mean and max over rows.

    For a row with active features A it is ``max_{S in A, |S| = min(r, |A| - 1)} max_{j in A - S} sum_S
    |cos|``. Rows with fewer than 2 active features have no pair to compare and are left out; NaN with
    no other row. ``max <= babel(atoms, r)`` where that exists: a dictionary whose features are coherent but not when
    they are active together (conditional orthogonality, Costa et al. 2025, 2506.03093) has a large
    ``babel`` and a small ``coactive_babel``.
    """
    if r < 1:
        raise SaekitError(f"r = {r} must be at least 1: one atom is compared with r others")
    if codes.n_features != len(atoms):
        raise SaekitError(f"codes.n_features is {codes.n_features}: atoms has {len(atoms)} rows")
    unit = torch.cat([_unit(atoms), atoms.new_zeros(1, atoms.shape[1], dtype=torch.float32)])
    feature = codes.indices[codes.values != 0].long()
    counts = codes.l0().reshape(-1)
    start = counts.cumsum(0) - counts
    # by falling count, so that the rows of a block are padded little
    order = counts.argsort(descending=True, stable=True)[: int((counts > 1).sum())]
    found, at = [unit.new_zeros(0, dtype=torch.float64)], 0
    while at < len(order):
        k = int(counts[order[at]])
        chosen = order[at : at + max(1, BLOCK // (k * max(k, unit.shape[1])))]
        at += len(chosen)
        place = torch.arange(k, device=feature.device)
        entry = (start[chosen, None] + place).clamp(max=len(feature) - 1)
        active = torch.where(place < counts[chosen, None], feature[entry], len(atoms))  # the row of zeros
        together = unit[active]
        cosine = (together @ together.mT).abs()
        cosine.diagonal(dim1=1, dim2=2).zero_()
        found.append(cosine.topk(min(r, k - 1)).values.double().sum(2).amax(1))
    values = torch.cat(found)
    largest = values.max().item() if len(values) else float("nan")
    return CoactiveBabel(values.mean().item(), largest, len(values))


@torch.no_grad()
def mean_decoder_cosine(atoms: Float[Tensor, "feature d_in"]) -> float:
    """Mean |cosine| over pairs of different rows, in [0, 1].

    c_dec of "Sparse but Wrong" (Chanin & Garriga-Alonso 2025, 2508.16560): over dictionaries trained
    at different L0 it is smallest near the true one, as features mixed with each other overlap.
    """
    n = len(atoms)
    if n < 2:
        raise SaekitError(f"atoms has {n} row(s): a cosine needs 2 or more")
    return sum(cosine.double().sum().item() for cosine in _coherence(atoms)) / (n * (n - 1))


@overload
def decoder_projection(x: Tensor, atoms: Tensor, bias: Tensor, n: int) -> float: ...
@overload
def decoder_projection(x: Tensor, atoms: Tensor, bias: Tensor, n: list[int]) -> list[float]: ...
@torch.no_grad()
def decoder_projection(
    x: Float[Tensor, "rows d_in"],
    atoms: Float[Tensor, "feature d_in"],
    bias: Float[Tensor, " d_in"],
    n: int | list[int],
) -> float | list[float]:
    """n-th decoder projection: the ``n * rows``-th largest of all ``(x - bias) atoms^T`` of the rows.

    In units of x for unit atoms, signed, never rising with n; atoms are taken as given, at their
    norms. s_n^dec of "Sparse but Wrong" (Chanin & Garriga-Alonso 2025, 2508.16560): for n above the
    true L0 it is smallest in the dictionary whose L0 is right. Ranks count from 1, so that n =
    n_features is the smallest projection; the authors' code takes the next one. Holds ``max(n) *
    rows`` numbers beside a block.
    """
    wanted = n if isinstance(n, list) else [n]
    for value in wanted:
        if not 1 <= value <= len(atoms):
            raise SaekitError(f"n = {value} must lie in 1..{len(atoms)}, the number of atoms")
    if not wanted or not len(x):
        raise SaekitError(f"n = {n} of {len(x)} rows has no rank; give 1 or more of both")
    keep = max(wanted) * len(x)
    top = x.new_zeros(0)
    for block in (x - bias).split(max(1, BLOCK // len(atoms))):
        top = torch.cat([top, (block @ atoms.T).reshape(-1)])
        top = top.topk(min(keep, len(top)), sorted=False).values
    top = top.sort(descending=True).values
    values = [top[value * len(x) - 1].item() for value in wanted]
    return values if isinstance(n, list) else values[0]


def cosine_blocks(
    a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"]
) -> Iterator[tuple[int, Float[Tensor, "block n_b"]]]:
    """Cosines of rows of a with all rows of b, signed, in [-1, 1]: a block's first row, and the block."""
    unit_a, unit_b = _unit(a), _unit(b)
    step = max(1, BLOCK // max(1, len(b)))
    for start in range(0, len(a), step):
        yield start, (unit_a[start : start + step] @ unit_b.T).clamp(-1, 1)


def _coherence(atoms: Tensor) -> Iterator[Tensor]:
    """|cosine| of atoms with all atoms, 0 with themselves, in blocks of rows."""
    for start, cosine in cosine_blocks(atoms, atoms):
        row = torch.arange(len(cosine), device=cosine.device)
        cosine[row, start + row] = 0.0
        yield cosine.abs_()


def _unit(rows: Tensor) -> Tensor:
    if not bool(rows.isfinite().all()):
        raise SaekitError("the directions hold NaN or inf; give finite decoder rows")
    # in float64, where no float32 norm overflows or vanishes
    return F.normalize(rows.double(), dim=1, eps=1e-300).float()
