"""Sparse coding of natural images with four penalties: at equal error L1 needs the most active atoms (Rentzeperis et al. 2023)."""

import itertools
import math

import torch
from torch import Tensor

from saekit import metrics
from saekit.analyses.gabor import LIKE, WAVE, fit_gabors
from saekit.dictionaries import Dictionary, create
from saekit.dictionaries.selection.proximal import PENALTIES, iterate
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.row import Found, Row
from saekit.papers.training import fit
from saekit.testbed.photographs import patches, photographs, whitened

SIDE, ATOMS, TRAIN, TEST = 12, 300, 20_000, 600  # pixels, atoms, patches
EDGE = 420  # columns left of it are trained on, those right of it judged
WEIGHTS = (0.05, 0.12, 0.3, 0.8, 2.0)  # the same for all penalties
LEVELS = (0.8, 0.9, 0.95)  # of R2, at which L0 is compared
STEPS, BATCH, LR = 600, 64, 1e-2
PROXIMAL, TO_THE_END, LEARNT = 10, 200, 5  # proximal steps in training, in judging, of a learnt encoder


def brute_force(penalty: str, by: str, seed: int) -> float:
    """Largest distance of the step of the penalty ``by`` from the minimum of ``penalty`` on a fine grid, over 200 inputs."""
    g = torch.Generator().manual_seed(seed)
    u = 2 * torch.randn(200, generator=g, dtype=torch.float64)
    size = torch.arange(0, 8, 5e-5, dtype=torch.float64)
    cost = 0.3 * PENALTIES[penalty].cost(size, 0.5)
    best = torch.stack([size[((size - one).square() / 2 + cost).argmin()] for one in u.abs()])
    return (PENALTIES[by].prox(u, 0.3, 0.5) - u.sign() * best).abs().max().item()


def dictionary(preset: str, selection: str, penalty: str, weight: float, steps: int, seed: int) -> Dictionary:
    """One of ``ATOMS`` atoms of norm 1 for patches of ``SIDE`` x ``SIDE``."""
    return create(preset, selection=selection, d_in=SIDE**2, n_features=ATOMS, penalty=penalty, weight=weight, steps=steps, seed=seed)  # fmt: skip


def standing(d: Dictionary, test: Tensor) -> dict[str, float]:
    """R2 and L0 on held-out patches, and the share of Gabor-like atoms.

    Sparse coding goes on to the end; an encoder that was learnt takes the steps that it learnt.
    """
    name, c = d.config.selection
    atoms = d.W_dec.detach()
    if name == "iterative":
        codes = iterate(d.read(test), atoms, c.penalty, c.weight, TO_THE_END)
        y, l0 = d.norm_out.invert(codes @ atoms + d.b_dec), (codes != 0).double().sum(1).mean().item()
    else:
        encoded = d.encode(test)
        y, l0 = d.decode(encoded), metrics.l0(encoded)
    return {"R2": metrics.explained_variance(test, y), "L0": l0, "Gabor": fit_gabors(atoms.unflatten(1, (SIDE, SIDE))).like}  # fmt: skip


@torch.no_grad()
def measure(seed: int, tell: Tell) -> Found:
    """A dictionary for each penalty and weight, and those whose atoms stay random."""
    g = torch.Generator().manual_seed(seed)
    images = whitened(photographs())
    train = patches(images[:, :, :EDGE], SIDE, TRAIN, g)
    test = patches(images[:, :, EDGE:], SIDE, TEST, g)
    kinds = {
        **{name: ("omp", "iterative", name, PROXIMAL) for name in PENALTIES},
        FROZEN: ("frozen", "unrolled", "cel0", LEARNT),
        **{f"{RANDOM}, {name}": ("random_omp", "iterative", name, PROXIMAL) for name in PENALTIES},
    }
    curves: dict[str, dict[str, list[float]]] = {}
    for j, (name, (preset, selection, penalty, steps)) in enumerate(kinds.items()):
        points = []
        for i, weight in enumerate(WEIGHTS):
            d = dictionary(preset, selection, penalty, weight, steps, seed)
            if d.atoms.trained:
                with torch.enable_grad():
                    fit(d, train, STEPS, BATCH, lr=LR)
            else:
                d.set_normalisation(train)
            points.append(standing(d, test))
            tell(j * len(WEIGHTS) + i + 1, len(kinds) * len(WEIGHTS), name)
        curves[name] = {key: [p[key] for p in points] for key in points[0]}
    others = [name for name in PENALTIES if name != "soft"]
    return {
        "curves": curves,
        "brute force": max(brute_force(name, name, seed) for name in PENALTIES),
        "soft for the others": min(brute_force(name, "soft", seed) for name in others),
    }


def at(curve: dict[str, list[float]], level: float) -> float:
    """L0 at an R2, on straight lines of its logarithm between the weights; NaN beyond them."""
    points = sorted(zip(curve["R2"], curve["L0"], strict=True))
    for (a, low), (b, high) in itertools.pairwise(points):
        if a <= level <= b and low > 0:
            share = (level - a) / (b - a) if b > a else 0.0
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return math.nan


def nearest(curve: dict[str, list[float]], level: float) -> float:
    """Share of Gabor-like atoms at the weight whose R2 is nearest to the level."""
    return min(zip(curve["R2"], curve["Gabor"], strict=True), key=lambda p: abs(p[0] - level))[1]


def judge(found: Found) -> Reproduction:
    """L0 at equal R2."""
    seeds = range(len(found["brute force"]))
    curves = {
        name: [{key: values[s] for key, values in curve.items()} for s in seeds]
        for name, curve in found["curves"].items()
    }

    def denser(name: str, of: str = "", level: float | None = None) -> list[float]:
        """L0 of soft over that of another penalty, of each seed; the least of the levels, or at one."""
        levels = LEVELS if level is None else (level,)
        pairs = list(zip(curves[f"{of}soft"], curves[of + name], strict=True))
        ratios = [[at(soft, one) / at(own, one) for one in levels] for soft, own in pairs]
        # of levels that the curves don't reach nothing is known, and so of the least
        return [math.nan if any(map(math.isnan, r)) else min(r) for r in ratios]

    rows = {name: curves[name] for name in (*PENALTIES, FROZEN)} | {RANDOM: curves[f"{RANDOM}, cel0"]}
    levels = ", ".join(map(str, LEVELS))
    mean = {name: {key: [sum(c[key][i] for c in cs) / len(cs) for i in range(len(WEIGHTS))] for key in ("R2", "L0")} for name, cs in rows.items()}  # fmt: skip
    said = [
        f"{name} {', '.join(f'{sum(v) / len(v):.2f}' for v in (denser(name, level=one) for one in LEVELS))}"
        for name in ("hard", "half", "cel0")
    ]
    return Reproduction(
        title="At equal error L1 codes of natural images are the densest",
        source="Rentzeperis, Calatroni, Perrinet and Prandi 2023, Beyond l1 sparse coding in V1",
        setting=f"{TRAIN:,} patches of {SIDE} x {SIDE} of two whitened photographs' left parts, {ATOMS} atoms of norm 1, {STEPS} steps of {BATCH} patches with {PROXIMAL} proximal steps each, for each of the weights {', '.join(map(str, WEIGHTS))}; judged on {TEST} patches of their right parts, with {TO_THE_END} proximal steps",
        claims=[
            Claim("largest distance of a proximal step from brute-force minimisation, of the four", "an identity", found["brute force"], "<=", 1e-4, found["soft for the others"], "soft's step for the others"),
            Claim(f"L0 of soft over that of CEL0 at R2 {levels}, the least", "sparser (figures)", denser("cel0"), ">=", 1.3, denser("cel0", f"{RANDOM}, "), RANDOM),
            Claim(f"L0 of soft over that of hard at R2 {levels}, the least", "sparser (figures)", denser("hard"), ">=", 1.3, denser("hard", f"{RANDOM}, "), RANDOM),
        ],
        figure=figure("Sparseness against error, on patches held out", "active atoms (L0)", "R2", {name: (c["L0"], c["R2"]) for name, c in mean.items()}, xaxis_type="log"),
        notes=[
            f"L0 of soft over that of each other at R2 {levels}: {'; '.join(said)}.",
            f"A Gabor-like atom is one of which a Gabor function explains {LIKE:.0%} of the square, with {WAVE:.0%} or more of its own on either side of 0 (a blob is none); shares are those at the weight whose R2 is nearest to {LEVELS[1]}. nan: an R2 that no weight reaches.",
            f"{FROZEN}: random atoms under an unrolled encoder of {LEARNT} steps that is learnt; {RANDOM}: the same atoms, and sparse coding. Both with CEL0.",
        ],
        controls={
            **{f"L0 at R2 {level}": {name: [at(c, level) for c in cs] for name, cs in rows.items()} for level in LEVELS},
            "share of Gabor-like atoms": {name: [nearest(c, LEVELS[1]) for c in cs] for name, cs in rows.items()},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
