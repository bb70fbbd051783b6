"""Gated dictionaries don't shrink what they reconstruct (2404.16014)."""

import torch

from saekit import metrics
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import make, stream
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.planted import PlantedConfig, PlantedWorld
from saekit.testbed.recovery import shrinkage

WIDTH, K, STEPS, BATCH = 128, 4, 1500, 512  # of the features 3.5 are active


def _world() -> PlantedWorld:
    config = PlantedConfig(n_features=96, d_in=64, roots=0, correlation=0.0, p_max=0.1, p_min=0.03, seed=1)
    return PlantedWorld(config)


@torch.no_grad()
def measure(seed: int, tell: Tell) -> Found:
    """Gated beside L1 at equal L0, on features that the dictionary has room for."""
    world = _world()
    x, true = world.evaluation_set(16384)
    kinds = {"gated": "gated", "L1": "relu", "p-annealed": "p_annealing", FROZEN: "frozen"}
    ds = {name: make(world, preset, WIDTH, seed, k=K) for name, preset in kinds.items()}
    with torch.enable_grad():
        fit_all(ds, stream(world), STEPS, BATCH, seed=seed)
    ds[RANDOM] = untrained(ds[FROZEN])
    found: Found = {"short": {}, "l0": {}, "fvu": {}}
    for name, d in ds.items():
        folded, codes = d.to_inference(), d.encode(x)
        found["short"][name] = shrinkage(
            folded.W_dec, world.directions, codes, true, folded.b_dec - world.bias
        )
        found["l0"][name] = metrics.l0(codes)
        found["fvu"][name] = metrics.fvu(x, d.decode(codes))
    return found


def judge(found: Found) -> Reproduction:
    """Shrinkage and error of both at equal L0."""
    short, l0, fvu = found["short"], found["l0"], found["fvu"]
    apart = [abs(a / b - 1) for a, b in zip(l0["gated"], l0["L1"], strict=True)]
    return Reproduction(
        title="Gated dictionaries don't shrink",
        source="Rajamanoharan et al. 2024, arXiv 2404.16014",
        setting=f"96 planted features in 64 dimensions ({float(_world().rates.sum()):.1f} active), {WIDTH} latents, L0 steered to {K}, {STEPS} steps of {BATCH} rows",
        claims=[
            Claim("gated: norm of reconstructions over that of activations", "about 1 (figure on relative reconstruction bias)", short["gated"], ">=", 0.98, short["L1"], "L1"),
            Claim("L1 shrinks at the same L0", "clearly below 1 (same figure)", short["L1"], "<=", 0.93),
            Claim("gated and L1 have equal L0 (share apart)", "compared at equal L0", apart, "<=", 0.1),
            Claim("mean L0 of gated against its target (share off)", "the paper sweeps the coefficient instead", [abs(v / K - 1) for v in l0["gated"]], "<=", 0.05),
            Claim("FVU of gated over that of L1", "lower error at equal L0 (figure)", [a / b for a, b in zip(fvu["gated"], fvu["L1"], strict=True)], "<", 1.0),
        ],
        figure=bars("Shrinkage and error at equal L0", "share", {"norm ratio": short, "FVU": fvu}),
        controls={"norm ratio": short, "FVU": fvu, "L0": l0},
    )  # fmt: skip


ROW = Row(measure, judge)
