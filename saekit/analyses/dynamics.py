"""Where a code goes that is decoded and encoded again and again: attractors of an autoencoder, and what they remember.

Fumero, Moschella, Rodola and Locatello 2025, "Navigating the Latent Space Dynamics of Neural Models" (2505.22785). A step is
any function of rows onto rows of the same width: z -> E(D(z)) of an autoencoder, or a dictionary of ours as it stands, which
is x -> decode(encode(x)).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.types import SaekitError

Step = Callable[[Any], Any]

TOLERANCE, LIMIT, LONGEST = 1e-4, 3000, 8
SAME = 1e-2  # of an attractor's length: what ends within it is the same one
SMALL = 1e-2  # of the starts' root mean square length: below it a code counts as so long, or none could converge to 0
FAR = 1e6  # times the starts' root mean square length, or the length of its own first step: what gets so far has diverged
NEIGHBOURS = 5


@dataclass(frozen=True)
class Flow:
    """Where each row ended: ``ends``, after ``steps`` steps, on a cycle of ``period`` (1: a fixed point, 0: on none yet).

    A row that ``diverged`` ends where it was last finite and near. ``size`` is the starts' root mean square length.
    """

    ends: Float[Tensor, "rows d"]
    steps: Int[Tensor, " rows"]
    period: Int[Tensor, " rows"]
    diverged: Bool[Tensor, " rows"]
    size: float

    @property
    def converged(self) -> Bool[Tensor, " rows"]:
        """Which rows came to a fixed point."""
        return self.period == 1


@torch.no_grad()
def flow(
    step: Step, starts: Float[Tensor, "rows d"], tolerance: float = TOLERANCE, limit: int = LIMIT, longest: int = LONGEST
) -> Flow:  # fmt: skip
    """Iterate z <- step(z) from each start until it converges, cycles or diverges, at most ``limit`` times.

    It has converged where ||step(z) - z|| < ``tolerance`` ||z||, and cycles with period p, 2..``longest``, where z is nearer to
    what it was p steps ago than ``tolerance`` times the cycle is wide. So a code that swings into a fixed point is no cycle.
    A step of Jacobian near 1 can be slow rather than there: what is left may be tolerance ||z|| / (1 - its largest eigenvalue).
    """
    _check(step, starts)
    if not (tolerance > 0 and limit >= 1 and longest >= 1):
        raise SaekitError(
            f"tolerance = {tolerance}, limit = {limit}, longest = {longest}: all must be above 0"
        )
    size = max(starts.norm(dim=1).square().mean().sqrt().item(), 1e-30)
    ends, steps = starts.clone(), torch.zeros(len(starts), dtype=torch.int64, device=starts.device)
    period, diverged = torch.zeros_like(steps), torch.zeros_like(steps, dtype=torch.bool)
    left, past = torch.arange(len(starts), device=starts.device), [starts]  # the newest last
    for t in range(1, limit + 1):
        new = step(past[-1])
        if t == 1:  # starts of about 0 tell no scale, and their steps do
            reach = FAR * (new - starts).norm(dim=1).nan_to_num(0.0, posinf=0.0).clamp_min(size)
        far = ~(new.norm(dim=1) < reach[left])  # NaN too
        gaps = torch.stack([(new - old).norm(dim=1) for old in reversed(past)])
        found = _period(gaps, tolerance, new.norm(dim=1).clamp_min(SMALL * size))
        found[far] = 0
        ends[left], steps[left] = torch.where(far[:, None], past[-1], new), t
        period[left], diverged[left] = found, far
        on = ~far & (found == 0)
        left, past = left[on], [old[on] for old in [*past, new][-longest:]]
        if not len(left):
            break
    return Flow(ends, steps, period, diverged, size)


def _period(gaps: Float[Tensor, "lags rows"], tolerance: float, length: Float[Tensor, " rows"]) -> Tensor:
    """The least lag after which each row is where it was; 0 where none is."""
    width = gaps.cummax(0).values  # of the cycle, by what lies between
    again = torch.cat([gaps[:1] < tolerance * length, gaps[1:] < tolerance * width[:-1]])
    return torch.where(again.any(0), again.int().argmax(0) + 1, 0)


@dataclass(frozen=True)
class Attractors:
    """``points``, one of each attractor, its ``period``, and ``of`` each row the attractor that it ends on, or -1."""

    points: Float[Tensor, "attractors d"]
    period: Int[Tensor, " attractors"]
    of: Int[Tensor, " rows"]

    @property
    def basins(self) -> Int[Tensor, " attractors"]:
        """How many rows end on each."""
        return torch.bincount(self.of[self.of >= 0], minlength=len(self.points))


@torch.no_grad()
def attractors(step: Step, found: Flow, same: float = SAME) -> Attractors:
    """The different fixed points and cycles of a flow, in the order of its rows.

    Two ends are of one attractor if their periods are equal, and one is nearer to a point of the other's cycle than ``same``
    times its length (at least ``SMALL`` of the starts').
    """
    if same <= 0:
        raise SaekitError(f"same = {same} must be above 0; {SAME} is a hundredth of an attractor's length")
    of, firsts = torch.full_like(found.period, -1), list[int]()
    while len(left := ((of < 0) & (found.period > 0)).nonzero()[:, 0]):
        first = int(left[0])
        cycle = [found.ends[first : first + 1]]
        for _ in range(int(found.period[first]) - 1):
            cycle.append(step(cycle[-1]))
        points = torch.cat(cycle)
        gaps = _distances(found.ends[left], points) / points.norm(dim=1).clamp_min(SMALL * found.size)
        near = (gaps.min(1).values < same) & (found.period[left] == found.period[first])
        near[0] = True
        of[left[near]] = len(firsts)
        firsts.append(first)
    at = torch.tensor(firsts, dtype=torch.int64, device=of.device)
    return Attractors(found.ends[at], found.period[at], of)


def nearest(
    x: Float[Tensor, "rows d"], known: Float[Tensor, "known d"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Cosine of each row and the nearest known one, and which that is; a row of 0 has a cosine of 0.

    Of decoded attractors and training data it is how much is memorised; see that other data of the kind are less near.
    """
    if not len(known):
        raise SaekitError("known holds no rows; give at least one")
    for name, rows in (("x", x), ("known", known)):
        if rows.shape[1:] != known.shape[1:] or not rows.isfinite().all():
            raise SaekitError(f"{name} has shape {list(rows.shape)}, or holds NaN or Inf; give finite rows of one width")  # fmt: skip
    own, others = (torch.nn.functional.normalize(one, dim=1) for one in (x, known))
    best = (own @ others.T).max(1)
    return best.values, best.indices


@torch.no_grad()
def trajectories(step: Step, starts: Float[Tensor, "rows d"], steps: int) -> Float[Tensor, "points rows d"]:
    """The starts, and where they are after 1..``steps`` steps."""
    _check(step, starts)
    if steps < 0:
        raise SaekitError(f"steps = {steps} must be at least 0; choose more")
    out = [starts]
    for _ in range(steps):
        out.append(step(out[-1]))
    return torch.stack(out)


def outlier_scores(
    step: Step, known: Float[Tensor, "known d"], new: Float[Tensor, "rows _"], steps: int, neighbours: int = NEIGHBOURS
) -> Float[Tensor, " rows"]:  # fmt: skip
    """How far the trajectories of new codes lie from those of known ones; higher is stranger.

    At each of the first ``steps`` steps and before them it is the distance to the ``neighbours``-th nearest known code at that
    step; their mean is returned.
    """
    if not 1 <= neighbours <= len(known):
        raise SaekitError(f"neighbours = {neighbours} must lie in 1..{len(known)}, the number of known rows; choose fewer")  # fmt: skip
    if known.shape[1] != new.shape[1]:
        raise SaekitError(f"known codes are {known.shape[1]} wide, and new ones {new.shape[1]}; give codes of one autoencoder")  # fmt: skip
    paths = (trajectories(step, one, steps) for one in (known, new))
    each = []
    for t, (a, b) in enumerate(zip(*paths, strict=True)):
        distances = _distances(b, a)
        if not distances.isfinite().all():
            raise SaekitError(f"steps = {steps}: after {t} of them distances are not finite; choose fewer")
        each.append(distances.kthvalue(neighbours, 1).values)
    return torch.stack(each).mean(0)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # not by squares less products, which lose distances that are small beside the rows
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(step: Step, starts: Tensor) -> None:
    if not len(starts):
        raise SaekitError("starts holds no rows; give at least one")
    if starts.dtype not in (torch.float32, torch.float64):
        raise SaekitError(f"starts are {str(starts.dtype).removeprefix('torch.')}, whose rounding would pass for convergence; give float32, and a step that takes it")  # fmt: skip
    if not starts.isfinite().all():
        raise SaekitError("starts hold NaN or Inf; remove the row")
    with torch.no_grad():
        shape = tuple(step(starts[:1]).shape)
    if shape != tuple(starts[:1].shape):
        raise SaekitError(f"step makes {list(shape)} of a row of [1, {starts.shape[1]}]; it must come back to the space it began in")  # fmt: skip
