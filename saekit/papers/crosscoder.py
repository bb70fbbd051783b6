"""Crosscoders for model diffing: what is of one model alone, and what only looks so (2504.02922)."""

from typing import Any

import torch
from torch import Tensor

from saekit import metrics
from saekit.activations import DrawnSource
from saekit.dictionaries import Dictionary, create
from saekit.evaluate.diffing import norm_difference, specific
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import STRIDE
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.two_models import TwoModels, TwoModelsConfig

WIDTH, K, STEPS, BATCH, LR = 128, 3, 2000, 512, 2e-3
NORM = 0.9  # the norm difference from which a feature counts as one model's
ALIVE = 20  # of the rows measured on, that a feature must fire in to be counted
L1: dict[str, Any] = {"selection": "relu", "objective": ("reconstruction", "l1"), "k": 5}
KINDS: dict[str, dict[str, Any]] = {"BatchTopK": {"k": K}, "L1": L1}


def _found(world: TwoModels, d: Dictionary, mask: Tensor, source: int) -> tuple[float, float]:
    """Precision and recall of some features as the private ones of a model (0: the base, 1: the fine-tune)."""
    c = world.config
    true = (world.base, world.tuned)[source]
    block = d.norm_out.directions(d.W_dec.detach()).split(d.wiring.parts_out, 1)[source]
    cosine = torch.nn.functional.normalize(block, dim=1) @ torch.nn.functional.normalize(true, dim=1).T
    best = cosine.argmax(1)[mask]
    first = c.shared + source * c.private
    hits = (best >= first) & (best < first + c.private)
    precision = hits.double().mean().item() if len(best) else 0.0
    return precision, len(best[hits].unique()) / c.private


def _scores(world: TwoModels, d: Dictionary, x: Tensor) -> dict[str, float]:
    """Precision and recall by norms alone and with latent scaling, mean over the two models; L0 and FVU."""
    codes = d.encode(x)
    alive = codes.firing_counts() >= ALIVE
    out: dict[str, float] = {"L0": metrics.l0(codes), "FVU": metrics.fvu(x, d.decode(codes).detach())}
    for name in ("norms", "latent scaling"):
        sides = []
        for source in (0, 1):
            mask = norm_difference(d, source, 1 - source) > NORM
            if name == "latent scaling":
                mask = specific(d, x, source, 1 - source, NORM)
            sides.append(_found(world, d, mask & alive, source))
        out[f"precision, {name}"] = sum(p for p, _ in sides) / 2
        out[f"recall, {name}"] = sum(r for _, r in sides) / 2
    return out


def measure(seed: int, tell: Tell) -> Found:
    """Private features of two planted models, by BatchTopK and L1 crosscoders."""
    world = TwoModels(TwoModelsConfig(seed=seed))
    c = world.config

    def draw(rows: int, step: int, seed: int) -> Tensor:
        return world.batch(rows, step + seed * STRIDE)

    shape: dict[str, Any] = {"d_in": (c.d, c.d), "n_features": WIDTH, "seed": seed}
    ds = {name: create("crosscoder", **shape, **options) for name, options in KINDS.items()}
    ds[FROZEN] = create("frozen", wiring="crosscoder", k=K, **shape)
    fit_all(ds, DrawnSource(draw, 2 * c.d, "two models"), STEPS, BATCH, seed=seed, lr=LR)
    x = world.batch(20_000, (1 << 30) + seed)
    ds[RANDOM] = untrained(ds[FROZEN])
    return {name: _scores(world, d, x) for name, d in ds.items()}


def judge(found: Found) -> Reproduction:
    """Private sets of BatchTopK against L1's, with latent scaling and by norms alone."""
    c = TwoModelsConfig()
    batch, l1 = found["BatchTopK"], found["L1"]
    false = [1 - p for p in l1["precision, norms"]]
    shown = ("precision, norms", "recall, norms", "precision, latent scaling", "recall, latent scaling")
    return Reproduction(
        title="A crosscoder finds what two models don't share",
        source="Lindsey et al. 2024 (transformer-circuits.pub); Minder et al. 2025, arXiv 2504.02922",
        setting=f"two models of {c.d} dimensions with {c.shared} planted features in common, of strength {c.weakest} to 1 in the first, and {c.private} of their own each; {WIDTH} latents, {STEPS} steps of {BATCH} rows; L1 steered to L0 {L1['k']}, BatchTopK at {K} (the truth: {c.p * (c.shared + 2 * c.private):.1f} with both models' own)",
        claims=[
            Claim("BatchTopK with latent scaling: precision of the private sets", "BatchTopK mostly lacks L1's artefacts", batch["precision, latent scaling"], ">=", 0.95, l1["precision, latent scaling"], "L1 with latent scaling"),
            Claim("BatchTopK with latent scaling: recall of the private sets", "no number", batch["recall, latent scaling"], ">=", 0.95, l1["recall, latent scaling"], "L1 with latent scaling"),
            Claim("L1, by norms alone: share of false ones among the features it calls private", "complete shrinkage and latent decoupling (figures)", false, ">", 0.1, [1 - p for p in batch["precision, norms"]], "BatchTopK"),
        ],
        figure=bars("Private features found", "share", {name: {key: found[name][key] for key in shown} for name in KINDS}),
        controls={key: {name: m[key] for name, m in found.items()} for key in l1},
    )  # fmt: skip


ROW = Row(measure, judge)
