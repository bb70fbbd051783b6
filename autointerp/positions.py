"""Features that tell the position: the mutual information of firing and position, and what chance gives of it.

In text of which only few rows were read, all features seem to tell positions: the counted information is too high by
about (T - 1) / 2N for N tokens at T positions. So a feature of one rate everywhere is drawn 100 times, and its mean
information taken off. Its tokens are drawn independently, while features come in bursts; that spreads the information
of chance, but not its mean, and by little from 30 rows on, which a position has to have to be counted.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

NATS = 0.05  # of a positional feature
ROWS = 30  # fewer of them say little about a position, where features fire in bursts
DRAWS = 100  # of a feature that fires at one rate everywhere
DEVIATIONS = 5.0  # by which a positional feature is beyond these
SWINGS = 4  # times that an oscillatory feature goes through its mean rate
SURE = 3.0  # standard errors by which a rate is on one side of it


@dataclass(frozen=True)
class Positional:
    """How firing depends on the position: ``information`` in nats, as counted, and what ``chance`` gives of it.

    ``strong``: the position settles at least half of the entropy of firing (all of it, if it is on or off by
    position), else weak. ``oscillatory``: the rate passes its mean at least 4 times.
    """

    information: float
    chance: float
    strong: bool
    oscillatory: bool

    @property
    def kind(self) -> str:
        """In words."""
        return ("strong" if self.strong else "weak") + (", oscillatory" if self.oscillatory else "")


def position_information(
    fired: Int64[ndarray, "row position"], tokens: Int64[ndarray, " position"]
) -> Float64[ndarray, " row"]:
    """Mutual information of firing and position in nats, from counts; at least 0, at most the entropy of firing.

    With as many tokens at each of T positions it is ``(1/T) sum_pos [fr_pos log(fr_pos/fr) + (1-fr_pos) log((1-fr_pos)/(1-fr))]``
    of the rates ``fr_pos`` and their mean ``fr``; else positions are weighted by their tokens.
    """
    from scipy.special import xlogy

    seen = tokens > 0
    rate, weight = fired[..., seen] / tokens[seen], tokens[seen] / max(1, tokens.sum())
    mean = rate @ weight
    inside = (xlogy(rate, rate) + xlogy(1 - rate, 1 - rate)) @ weight
    return np.maximum(inside - xlogy(mean, mean) - xlogy(1 - mean, 1 - mean), 0.0)


def positional(
    fired: Int64[ndarray, " position"], tokens: Int64[ndarray, " position"], seed: tuple[int, ...]
) -> Positional | None:
    """How a feature is positional, if it is so beyond what chance gives."""
    reached = tokens >= ROWS
    fired, tokens = fired[reached], tokens[reached]
    information = float(position_information(fired[None], tokens)[0])
    if information <= NATS:
        return None
    mean = float(fired.sum() / tokens.sum())
    drawn = np.random.default_rng(seed).binomial(tokens, mean, size=(DRAWS, len(tokens)))
    null = position_information(drawn, tokens)
    excess = information - float(null.mean())
    if excess <= max(NATS, DEVIATIONS * float(null.std(ddof=1))):
        return None
    entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    off = (fired / tokens - mean) / np.sqrt(mean * (1 - mean) / tokens)
    sides = np.sign(off[np.abs(off) > SURE])
    swings = int((np.diff(sides) != 0).sum())
    return Positional(information, float(null.mean()), excess >= entropy / 2, swings >= SWINGS)
