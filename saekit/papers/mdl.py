"""Interpretability as compression: description length has an inner minimum over the width (2410.11179)."""

import itertools
import math

import torch
from torch import Tensor

from saekit import metrics
from saekit.dictionaries import Dictionary, create
from saekit.evaluate.mdl import coarsest_precision, description_length
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import cut
from saekit.papers.row import Found, Row
from saekit.papers.training import fit, fit_all
from saekit.testbed.digits import digits
from saekit.types import Codes

WIDTHS = (24, 48, 96, 192, 384, 1024)
KS = (3, 5, 8, 11, 14, 17, 20)
VARIANCE, TOLERANCE = 0.83, 0.01  # explained before, and lost by, rounding the codes
OTHERS = (0.80, 0.85)  # where it is measured too, and said
STEPS, BATCH, LR = 250, 256, 5e-3


def bernoulli(seed: int) -> float:
    """Relative error of the length of 50 planted independent features of one size, against sum H(p)."""
    g = torch.Generator().manual_seed(seed)
    p = 0.02 + 0.3 * torch.rand(50, generator=g)
    codes = Codes.from_dense((torch.rand(40_000, 50, generator=g) < p).float())
    truth = sum(-q * math.log2(q) - (1 - q) * math.log2(1 - q) for q in p.tolist())
    return abs(description_length(codes, 1.0) / truth - 1)


def described(d: Dictionary, codes: Codes, x: Tensor) -> tuple[float, float]:
    """Variance explained, and bits per row at the coarsest precision that the tolerance allows."""
    bits = description_length(codes, coarsest_precision(codes, d.decode, x, TOLERANCE))
    return metrics.explained_variance(x, d.decode(codes)), bits


@torch.no_grad()
def curve(width: int, seed: int, train: Tensor, x: Tensor) -> list[tuple[float, float]]:
    """Variance explained and bits per digit of held-out digits at this width, by rising k."""
    ds = {f"k{k}": create("topk", d_in=64, n_features=width, k=k, seed=seed) for k in KS}
    with torch.enable_grad():
        fit_all(ds, train, STEPS, BATCH, seed=seed, lr=LR)
    return [described(d, d.encode(x), x) for d in ds.values()]


@torch.no_grad()
def controls(seed: int, train: Tensor, x: Tensor) -> dict[str, tuple[float, float]]:
    """Variance explained and bits per digit of both controls, at the largest width and the k that explains most."""
    frozen = create("frozen", d_in=64, n_features=WIDTHS[-1], k=KS[-1], seed=seed)
    with torch.enable_grad():
        fit(frozen, train, STEPS, BATCH, seed=seed, lr=LR)
    random = untrained(frozen)
    codes = random.encode(x)
    return {
        FROZEN: described(frozen, frozen.encode(x), x),  # a trained encoder gains with every code
        RANDOM: max(described(random, cut(codes, k), x) for k in KS),
    }


def length(points: list[tuple[float, float]], variance: float) -> float:
    """Bits where just so much is explained, between the two k around it; NaN where no two are."""
    for (less, a), (more, b) in itertools.pairwise(points):
        if less <= variance <= more:
            return a + (variance - less) / (more - less) * (b - a)
    return math.nan


def measure(seed: int, tell: Tell) -> Found:
    """Bits per digit by the width of the dictionary, at equal distortion."""
    data = digits(seed)
    at: Found = {str(v): {} for v in (VARIANCE, *OTHERS)}
    for j, width in enumerate(WIDTHS):
        points = curve(width, seed, data.train, data.test)
        for variance in (VARIANCE, *OTHERS):
            at[str(variance)][str(width)] = length(points, variance)
        tell(j + 1, len(WIDTHS) + 1, f"{width} features")
    plain = {"TopK": max(points)} | controls(seed, data.train, data.test)
    return {
        "at": at,
        "plain": {name: list(point) for name, point in plain.items()},
        "bernoulli": bernoulli(seed),
    }


def judge(found: Found) -> Reproduction:
    """The width of the shortest description, and how much longer it is at both ends."""
    at: dict[float, dict[int, list[float]]] = {
        v: {w: found["at"][str(v)][str(w)] for w in WIDTHS} for v in (VARIANCE, *OTHERS)
    }
    lengths = at[VARIANCE]
    mean = {w: sum(v) / len(v) for w, v in lengths.items()}
    best = min((w for w in WIDTHS if math.isfinite(mean[w])), key=lambda w: mean[w])
    narrow, wide = (
        [a / b for a, b in zip(lengths[end], lengths[best], strict=True)] for end in (WIDTHS[0], WIDTHS[-1])
    )
    inner = [
        float(min(WIDTHS, key=lambda w: lengths[w][i]) not in (WIDTHS[0], WIDTHS[-1]))
        for i in range(len(lengths[best]))
    ]
    elsewhere = {v: {w: sum(b) / len(b) for w, b in at[v].items()} for v in OTHERS}
    return Reproduction(
        title="Description length has an inner minimum over the width",
        source="Ayonrinde, Pearce and Sharkey 2024, arXiv 2410.11179",
        setting=f"scikit-learn's digits, described held-out; TopK of {WIDTHS[0]} to {WIDTHS[-1]} features, k of {KS[0]} to {KS[-1]}, {STEPS} steps of {BATCH}; where {VARIANCE:.0%} of variance is explained, less {TOLERANCE:.0%} for rounding",
        claims=[
            Claim("the shortest description is at an inner width (1 is yes)", "MNIST: neither whole digits nor pixels (figure)", inner, ">=", 1.0, [float(best)], "that width, by the means"),
            Claim(f"{WIDTHS[0]} features over the shortest", "longer at both ends (figure)", narrow, ">=", 1.1),
            Claim(f"{WIDTHS[-1]} features over the shortest", "longer at both ends (figure)", wide, ">=", 1.1),
            Claim("length of planted independent features against their entropy (share off)", "an identity in expectation", found["bernoulli"], "<=", 0.02),
        ],
        figure=figure("Bits to describe a digit", "features", "bits per digit", {"description length": (WIDTHS, [mean[w] for w in WIDTHS])}, xaxis={"type": "log"}),
        notes=[
            "Bits by width: " + "; ".join(f"{v:.0%} explained: " + ", ".join(f"{w}: {b:.1f}" for w, b in table.items()) for v, table in ({VARIANCE: mean} | elsewhere).items()) + " (nan: explained at no k). "
            "The minimum depends on the distortion: where less is asked for, wide dictionaries stay as short; where more is, narrow ones can't give it. "
            "On the digits that they were trained on, 1024 features at k = 2 explain 82 % in 17 bits: they know 1797 images by heart.",
            f"Table: {WIDTHS[-1]} features, at the k up to {KS[-1]} that explains most. A control that stays below {VARIANCE:.0%} there has no length at that distortion.",
        ],
        controls={key: {name: [p[part] for p in points] for name, points in found["plain"].items()} for part, key in enumerate(("most variance explained", "bits per digit"))},
    )  # fmt: skip


ROW = Row(measure, judge)
