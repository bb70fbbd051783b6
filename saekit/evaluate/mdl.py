"""Description length of codes: an SAE as a code for activations (Ayonrinde et al. 2024, 2410.11179).

Bits are per row of the codes, for the codes alone: the one-off cost of the dictionary and of the
histograms is not in them, nor is the error that decoding leaves. Lengths compare dictionaries at
equal distortion, which is what ``coarsest_precision`` is for. Zeros are silence, never values: an
entry that is 0, or that quantises to 0, belongs to the firing rate and not to a histogram.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.metrics import fvu, l0
from saekit.types import Codes, SaekitError

OCTAVES = 40  # halvings of the precision before a tolerance counts as out of reach
BISECTIONS = 5  # of the octave that holds the answer: to 2^(1/32), or 2 %


@torch.no_grad()
def description_length(codes: Codes, precision: float) -> float:
    """``sum_i [H(p_i) + p_i H(q_i)]`` under independent additivity, in bits per row, [0, inf).

    p_i is the share of rows in which feature i is active once values are rounded to multiples of
    ``precision``, q_i the histogram of its active rounded values, H the entropy in bits: what an ideal
    coder needs that codes every feature on its own. Unchanged by the order of features, and by scaling
    values and precision together. Both p and q are those of the rows given: at a precision so fine that
    a feature's n values all differ, its H(q) is log2 n, below the truth.

    N features of which exactly one is active in each row, equally often, cost ``N H(1/N) = log2 N +
    (N - 1) log2(N / (N - 1))``: up to log2 e = 1.44 bits more than log2 N, as a coder of independent
    features cannot know that the others are silent.
    """
    bins = _bins(codes, precision)
    if not codes.rows:
        raise SaekitError("codes have no rows; give the codes of 1 row or more")
    active = bins != 0
    feature = codes.indices[active].long()
    values, bin_ = bins[active].unique(return_inverse=True)
    counts = (feature * len(values) + bin_).unique(return_counts=True)[1].double()
    fired = torch.bincount(feature, minlength=codes.n_features).double()
    if float(fired.max()) > codes.rows:
        raise SaekitError("codes hold a feature more than once in a row; add its values up first")
    rate = fired / codes.rows
    silence = torch.special.entr(rate) + torch.special.entr(1 - rate)
    # p H(q) = (n_i log n_i - sum_b n_ib log n_ib) / rows, with entr(n) = -n log n
    nats = silence.sum() + (torch.special.entr(counts).sum() - torch.special.entr(fired).sum()) / codes.rows
    return max(0.0, nats.item() / math.log(2))


def upper_bound(codes: Codes, bits: float) -> float:
    """``L0 (bits + log2 n_features)``: every active feature is sent as its index and a value; bits per row.

    In [0, inf). ``bits`` are those of a value: log2 of how many occur is enough. It is at least
    ``description_length`` for L0 >= e; below that a coder of independent features may need up to ``L0
    log2(e / L0)`` <= log2 e = 1.44 bits more.
    """
    if not 0 <= bits < math.inf:
        raise SaekitError(f"bits = {bits} must be 0 or more; a float16 has 16")
    return l0(codes) * (bits + math.log2(codes.n_features))


@torch.no_grad()
def quantised(codes: Codes, precision: float) -> Codes:
    """Codes with values rounded to multiples of ``precision`` (ties to even), on the same support.

    Values change by at most precision / 2; those of less become 0: stored, but not active.
    """
    return codes.with_values((_bins(codes, precision) * precision).to(codes.values.dtype))


@torch.no_grad()
def coarsest_precision(
    codes: Codes,
    decode: Callable[[Codes], Tensor],
    x: Float[Tensor, "*rows d_out"],
    tolerance: float,
) -> float:
    """The coarsest precision at which ``fvu(x, decode(quantised))`` rises by at most ``tolerance``.

    In units of the codes, at most twice the largest |value|, where all round to 0. ``tolerance`` is
    absolute, over the FVU of the exact codes. From that end precisions are halved until one holds, and
    the octave above it is bisected: the result holds, 2^(1/32) times it does not. (An FVU that rises
    and falls may hold again at a coarser precision between the halves.) ``x`` has the leading shape of
    the codes; ``decode`` runs once for each precision tried.
    """
    if not 0 <= tolerance < math.inf:
        raise SaekitError(f"tolerance = {tolerance} must be 0 or more; 0.01 allows 1 % of the variance")
    if x.shape[:-1] != codes.shape:
        raise SaekitError(f"x has rows of shape {tuple(x.shape[:-1])}: give those of codes, {codes.shape}")
    largest = _largest(codes)
    if not largest:
        raise SaekitError("codes have no active values: any precision is exact; give codes that fire")
    exact = fvu(x, decode(codes))
    if not math.isfinite(exact):
        raise SaekitError(f"the FVU of the exact codes is {exact}; give finite rows x that differ")

    def holds(precision: float) -> bool:
        return fvu(x, decode(quantised(codes, precision))) - exact <= tolerance

    for octave in range(OCTAVES):
        fine = 2 * largest / 2**octave
        if holds(fine):
            break
    else:
        raise SaekitError(
            f"tolerance = {tolerance} is below what rounding to 1e-12 leaves; give a larger one"
        )
    coarse = 2 * fine
    for _ in range(BISECTIONS if octave else 0):
        middle = math.sqrt(fine * coarse)
        fine, coarse = (middle, coarse) if holds(middle) else (fine, middle)
    return fine


def _bins(codes: Codes, precision: float) -> Tensor:
    """Values in units of the precision, rounded; float64, so that no value is out of range."""
    if not 0 < precision < math.inf:
        raise SaekitError(f"precision = {precision} must be above 0, in units of the codes")
    if not math.isfinite(_largest(codes) / precision):
        raise SaekitError(f"codes hold values that are not finite multiples of precision = {precision}")
    return (codes.values.double() / precision).round()


def _largest(codes: Codes) -> float:
    return codes.values.abs().max().item() if len(codes.values) else 0.0
