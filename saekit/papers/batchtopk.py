"""BatchTopK: a budget shared by a batch in training, one threshold at inference (2412.06410)."""

import torch

from saekit import metrics
from saekit.dictionaries import TrainState
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import make, stream
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.planted import PlantedConfig, PlantedWorld

WIDTH, K, STEPS, BATCH = 256, 8, 1500, 512


@torch.no_grad()
def measure(seed: int, tell: Tell) -> Found:
    """BatchTopK beside TopK and JumpReLU at the same L0 on planted features."""
    world = PlantedWorld(PlantedConfig(seed=1))
    x = world.evaluation_set(16384)[0]
    kinds = {"BatchTopK": "batchtopk", "TopK": "topk", "JumpReLU": "jumprelu", FROZEN: "frozen"}
    ds = {name: make(world, preset, WIDTH, seed, k=K) for name, preset in kinds.items()}
    with torch.enable_grad():
        fit_all(ds, stream(world), STEPS, BATCH, seed=seed)
    ds[RANDOM] = untrained(ds[FROZEN])
    batch = ds["BatchTopK"]
    rows = [
        batch.selection.train_codes(batch.norm_in(r[None]), batch.encoder, batch.b_enc, TrainState())
        for r in x[:64]
    ]
    top = make(world, "topk", WIDTH, seed, k=K)
    each = [top.selection(batch.norm_in(r[None]), batch.encoder, batch.b_enc) for r in x[:64]]
    pairs = zip(rows, each, strict=True)
    return {
        "l0": {name: metrics.l0(d.encode(x)) for name, d in ds.items()},
        "fvu": {name: metrics.fvu(x, d(x)) for name, d in ds.items()},
        "spread": batch.encode(x).l0().double().std().item(),
        "single": max((a.codes.to_dense() - b.to_dense()).abs().max().item() for a, b in pairs),
    }


def judge(found: Found) -> Reproduction:
    """Error and L0 of BatchTopK against TopK's."""
    l0, fvu = found["l0"], found["fvu"]
    off = [abs(v / K - 1) for v in l0["BatchTopK"]]
    return Reproduction(
        title="BatchTopK spends its budget where it is needed",
        source="Bussmann, Leask and Nanda 2024, arXiv 2412.06410",
        setting=f"512 planted features in 64 dimensions, {WIDTH} latents, k = {K}, {STEPS} steps of {BATCH} rows",
        claims=[
            Claim("mean L0 at inference against k (share off)", "the threshold keeps the mean", off, "<=", 0.05),
            Claim("FVU over that of TopK at the same L0", "lower error than TopK at equal L0 (figure)", [a / b for a, b in zip(fvu["BatchTopK"], fvu["TopK"], strict=True)], "<", 1.0, [a / b for a, b in zip(fvu["JumpReLU"], fvu["TopK"], strict=True)], "JumpReLU over TopK"),
            Claim("L0 varies between rows (standard deviation)", "varies (figure)", found["spread"], ">", 0.5, [0.0], "TopK"),
            Claim("a batch of one row gives TopK's codes (largest difference)", "an identity", found["single"], "<=", 1e-5),
        ],
        figure=bars("Error at equal L0", "FVU", {"FVU": fvu}),
        controls={"FVU": fvu, "L0": l0},
    )  # fmt: skip


ROW = Row(measure, judge)
