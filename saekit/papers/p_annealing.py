"""p-annealing: an L1 penalty that becomes one near L0 (2408.00113)."""

import torch

from saekit import metrics
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import make, stream
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.planted import PlantedConfig, PlantedWorld

WIDTH, K, STEPS, BATCH = 256, 8, 1500, 512


@torch.no_grad()
def measure(seed: int, tell: Tell) -> Found:
    """p-annealed beside L1 at equal L0 on planted features."""
    world = PlantedWorld(PlantedConfig(seed=1))
    x = world.evaluation_set(16384)[0]
    kinds = {"p-annealed": "p_annealing", "L1": "relu", "gated": "gated", FROZEN: "frozen"}
    ds = {name: make(world, preset, WIDTH, seed, k=K) for name, preset in kinds.items()}
    with torch.enable_grad():
        fit_all(ds, stream(world), STEPS, BATCH, seed=seed)
    ds[RANDOM] = untrained(ds[FROZEN])
    term = ds["p-annealed"].terms["p_annealed"]
    return {
        "l0": {name: metrics.l0(d.encode(x)) for name, d in ds.items()},
        "fvu": {name: metrics.fvu(x, d(x)) for name, d in ds.items()},
        "end": term.power(int(term.stage)),
    }


def judge(found: Found) -> Reproduction:
    """Error and L0 of p-annealed against L1's."""
    l0, fvu = found["l0"], found["fvu"]
    return Reproduction(
        title="p-annealing lowers the error of an L1 dictionary at the same L0",
        source="Karvonen et al. 2024, arXiv 2408.00113",
        setting=f"512 planted features in 64 dimensions, {WIDTH} latents, L0 steered to {K}, {STEPS} steps of {BATCH} rows; p from 1 to 0.2 in 10 changes",
        claims=[
            Claim("mean L0 against its target (share off)", "the paper sweeps the coefficient instead", [abs(v / K - 1) for v in l0["p-annealed"]], "<=", 0.05),
            Claim("FVU over that of L1 at the same L0", "better loss recovered than L1 at equal L0 (figure)", [a / b for a, b in zip(fvu["p-annealed"], fvu["L1"], strict=True)], "<", 1.0, [a / b for a, b in zip(fvu["gated"], fvu["L1"], strict=True)], "gated over L1"),
            Claim("p at the end", "0.2", found["end"], "<=", 0.2001),
        ],
        figure=bars("Error at equal L0", "FVU", {"FVU": fvu}),
        controls={"FVU": fvu, "L0": l0},
    )  # fmt: skip


ROW = Row(measure, judge)
