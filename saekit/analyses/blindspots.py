"""Concepts that a generator fires too little or too much: conceptual blindspots (2506.19708).

The energy of concept i on a set of samples is ``E_i``, the mean over samples of the sum over tokens of its code z_i; its
difference is ``delta_i = E_i(generated) / (E_i(generated) + E_i(real))``: 1/2 where they agree, 0 where the generator lacks it.
The ratio is our reading of the paper's difference in [0, 1].
Energies are sums over what passes by, so sets of any size stream; their intervals are by a bootstrap that does too, in which
every draw counts each sample as often as a Poisson variable of mean 1 says (Hanley and MacGibbon 2006).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.types import Codes, SaekitError

DRAWS = 400
SUPPRESSED, EXAGGERATED = 0.1, 0.9
TAIL = 0.025  # on each side of an interval
COLUMNS = 4096  # that a quantile takes at once


@dataclass(frozen=True)
class Energies:
    """Energies of concepts on ``n`` samples: their means, float64, in the units of codes; the same of each of ``DRAWS`` resamplings;
    and how many samples fire each concept. ``seed`` is that of the resampling."""

    mean: Float[Tensor, " feature"]
    draws: Float[Tensor, "draw feature"]
    fired: Int[Tensor, " feature"]
    n: int
    seed: int


def energies(batches: Iterable[Codes], seed: int) -> Energies:
    """Energies on a set that passes by in batches of codes of [samples, tokens]; equal however it is cut into batches.

    Holds one batch and ``DRAWS`` numbers a concept. Sets that are compared need a ``seed`` each, lest they are resampled alike.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    rng, n = np.random.default_rng(seed), 0
    for batch in batches:
        _check(batch)
        samples, tokens = batch.shape
        if n == 0:
            total, fired = np.zeros(batch.n_features), np.zeros(batch.n_features, np.int64)
            draws, weight = np.zeros((batch.n_features, DRAWS)), np.zeros(DRAWS)
        if batch.n_features != len(total):
            raise SaekitError(f"batches have codes of {len(total)} and of {batch.n_features} features; give those of one dictionary")  # fmt: skip
        sample, feature = (part.cpu().numpy() for part in (batch.row_ids() // max(1, tokens), batch.indices))
        values = batch.values.detach().double().cpu().numpy()
        own = csr_matrix(
            (values, (sample, feature)), (samples, len(total))
        )  # tokens of a sample are added up
        counts = rng.poisson(1.0, (samples, DRAWS)).astype(float)
        total += own.sum(0).A1
        fired += (own > 0).sum(0).A1
        draws += own.T @ counts
        weight += counts.sum(0)
        n += samples
    if n < 2:
        raise SaekitError(f"batches hold {n} samples, which have no interval; give 2 or more")
    mean, resampled = total / n, draws / np.maximum(weight, 1)
    return Energies(torch.from_numpy(mean), torch.from_numpy(resampled.T), torch.from_numpy(fired), n, seed)


@dataclass(frozen=True)
class Differences:
    """Energy differences of concepts in [0, 1], NaN where neither set fires one, and the ends of their 95 % intervals over samples."""

    delta: Float[Tensor, " feature"]
    low: Float[Tensor, " feature"]
    high: Float[Tensor, " feature"]

    def suppressed(self, surely: bool = False) -> Bool[Tensor, " feature"]:
        """Which are below ``SUPPRESSED``; ``surely`` with their whole interval."""
        return (self.high if surely else self.delta) < SUPPRESSED

    def exaggerated(self, surely: bool = False) -> Bool[Tensor, " feature"]:
        """Which are above ``EXAGGERATED``; ``surely`` with their whole interval."""
        return (self.low if surely else self.delta) > EXAGGERATED


def differences(generated: Energies, real: Energies) -> Differences:
    """How the energies of generated samples differ from those of real ones.

    Intervals are percentiles of the draws. These can't see what no sample has: where a set never fires a concept, its energy may
    still be that of a concept which fires in a share ``-ln(0.025) / n`` of samples (missed with a chance of 2.5 %), each time with
    the other set's energy, and the interval reaches as far.
    """
    if len(generated.mean) != len(real.mean):
        raise SaekitError(f"generated has {len(generated.mean)} features, and real {len(real.mean)}; give those of one dictionary")  # fmt: skip
    if generated.seed == real.seed:
        raise SaekitError(f"generated and real are both of seed = {real.seed}, and resampled alike; give each its own")  # fmt: skip
    delta = generated.mean / (generated.mean + real.mean)  # 0 / 0 is NaN
    drawn = generated.draws / (generated.draws + real.draws)
    q = torch.tensor([TAIL, 1 - TAIL], dtype=drawn.dtype)
    low, high = torch.cat([torch.nanquantile(part, q, dim=0) for part in drawn.split(COLUMNS, 1)], 1)
    unseen = _unseen(generated, real)
    high = torch.where((generated.fired == 0) & (real.fired > 0), unseen / (unseen + real.mean), high)
    unseen = _unseen(real, generated)
    low = torch.where((real.fired == 0) & (generated.fired > 0), generated.mean / (generated.mean + unseen), low)  # fmt: skip
    return Differences(delta, low, high)


def _unseen(silent: Energies, other: Energies) -> Tensor:
    """The largest energy that a concept may have in a set that has shown none of it."""
    each = other.mean * other.n / other.fired.clamp_min(1)
    return each * -math.log(TAIL) / silent.n


def _check(batch: Codes) -> None:
    if len(batch.shape) != 2:
        raise SaekitError(f"codes have shape {batch.shape}; give those of [samples, tokens], of 1 token where a sample is a row")  # fmt: skip
    if not bool(batch.values.isfinite().all()) or bool((batch.values < 0).any()):
        raise SaekitError("codes hold NaN, inf or values below 0, which are no energies; give a dictionary's whose codes are not negative")  # fmt: skip
