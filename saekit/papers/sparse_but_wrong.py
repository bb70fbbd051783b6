"""Sparse but wrong: an L0 that is off mixes correlated features, and the decoder tells (2508.16560)."""

import torch

from saekit import metrics
from saekit.evaluate.geometry import decoder_projection, mean_decoder_cosine
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import make, stream
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.planted import PlantedConfig, PlantedWorld
from saekit.testbed.recovery import mcc

WIDTH, STEPS, BATCH = 50, 1500, 512
KS = (4, 6, 8, 10, 12, 14, 16, 18)  # the truth is 9.5
RANK = 11  # a little above the true L0, where the projection is read (chosen on seeds 11 and 12)
SAME = 1e-3  # FVU: errors no farther apart say nothing


def _world() -> tuple[PlantedWorld, list[int]]:
    """Correlated features, and the k around their true L0."""
    world = PlantedWorld(
        PlantedConfig(n_features=50, d_in=100, exponent=0.1, p_max=0.34, p_min=0.15, rank=10, correlation=0.2, roots=0, orthogonal_steps=1000, magnitude_mean=(1.0, 1.0), magnitude_std=(0.0, 0.0), bias=0.0, seed=3)
    )  # fmt: skip
    return world, list(KS)


@torch.no_grad()
def measure(seed: int, tell: Tell) -> Found:
    """BatchTopK dictionaries at every k around the true L0, on correlated features."""
    world, ks = _world()
    x = world.evaluation_set(8192)[0]
    ds = {str(k): make(world, "batchtopk", WIDTH, seed, k=k) for k in ks}
    ds[FROZEN] = make(world, "frozen", WIDTH, seed, k=_nearest(ks, float(world.rates.sum())))
    with torch.enable_grad():
        fit_all(ds, stream(world), STEPS, BATCH, seed=seed, lr=3e-3)
    ds[RANDOM] = untrained(ds[FROZEN])
    return {
        "cosine": {k: mean_decoder_cosine(d.W_dec) for k, d in ds.items()},
        "projection": {k: decoder_projection(d.norm_in(x), d.W_dec, d.b_dec, RANK) for k, d in ds.items()},
        "MCC": {k: mcc(d.W_dec, world.directions) for k, d in ds.items()},
        "FVU": {k: metrics.fvu(x, d(x)) for k, d in ds.items()},
    }


def _nearest(ks: list[int], l0: float) -> int:
    return min(ks, key=lambda k: abs(k - l0))


def judge(found: Found) -> Reproduction:
    """The k at which each diagnostic is least, against the true L0."""
    world, ks = _world()
    true_l0 = float(world.rates.sum())
    nearest = _nearest(ks, true_l0)
    cosine, projection, recovered, error = (
        {k: found[key][str(k)] for k in ks} for key in ("cosine", "projection", "MCC", "FVU")
    )
    n_seeds = range(len(error[nearest]))

    def off(table: dict[int, list[float]]) -> list[float]:
        return [abs(min(ks, key=lambda k: table[k][i]) - true_l0) for i in n_seeds]

    best = [min(error[k][i] for k in ks) for i in n_seeds]
    by_error = [max(abs(k - true_l0) for k in ks if error[k][i] <= best[i] + SAME) for i in n_seeds]
    untold = f"the farthest k whose error is within {SAME} of the least"
    names = {
        "decoder cosine": cosine,
        "decoder projection": projection,
        "recovery (MCC)": recovered,
        "FVU": error,
    }
    means = {n: [sum(t[k]) / len(t[k]) for k in ks] for n, t in names.items()}
    scaled = {n: [v / max(values) for v in values] for n, values in means.items()}
    return Reproduction(
        title="The decoder tells the true L0",
        source="Chanin and Garriga-Alonso 2025, arXiv 2508.16560",
        setting=f"50 correlated features in 100 dimensions, {true_l0:.1f} active on average; BatchTopK of {WIDTH} latents at k = {ks[0]} to {ks[-1]}, {STEPS} steps of {BATCH} rows, one stream for all",
        claims=[
            Claim("the k of the smallest mean |cosine| between atoms, against the true L0 (distance)", "minimal near the true L0 (figure)", off(cosine), "<=", 2.0, by_error, untold),
            Claim(f"the k of the smallest decoder projection at rank {RANK} per row, against the true L0 (distance)", "minimal near the true L0 (figure)", off(projection), "<=", 2.0, by_error, untold),
        ],
        figure=figure("Diagnostics by k, each as a share of its largest value", "k", "share of the largest", {n: (ks, v) for n, v in scaled.items()}),
        notes=[f"True L0 {true_l0:.2f}. " + "; ".join(f"{n}: " + ", ".join(f"{k}: {v:.3f}" for k, v in zip(ks, values, strict=True)) for n, values in means.items()) + "."],
        controls={
            f"{key} at k = {nearest}": {"BatchTopK": found[key][str(nearest)]} | {name: found[key][name] for name in (FROZEN, RANDOM)}
            for key in ("cosine", "projection", "MCC", "FVU")
        },
    )  # fmt: skip


ROW = Row(measure, judge)
