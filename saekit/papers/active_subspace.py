"""Active-subspace initialisation: features that begin where the data is don't die (2508.16929)."""

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.activations import DrawnSource
from saekit.dictionaries import create
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit

D, ACTIVE, FEATURES, WIDTH, K = 64, 16, 128, 1024, 8
STEPS, BATCH, LAST = 800, 256, 200
NOISE = 0.003
KINDS: dict[str, dict[str, Any]] = {
    "random, Adam": {},
    "random, SparseAdam": {"optimizer": "sparse_adam"},
    "active subspace, Adam": {"init": "active_subspace"},
    "active subspace, SparseAdam": {"init": "active_subspace", "optimizer": "sparse_adam"},
    FROZEN: {},
}


def _directions(seed: int) -> Float[Tensor, "feature d_in"]:
    """Sparse features that all lie in a random 16-dimensional subspace of the 64 dimensions."""
    g = torch.Generator().manual_seed(1000 + seed)
    basis = torch.linalg.qr(torch.randn(D, ACTIVE, generator=g)).Q
    return torch.nn.functional.normalize(torch.randn(FEATURES, ACTIVE, generator=g), dim=1) @ basis.T


def _draw(directions: Tensor, rows: int, step: int, seed: int) -> Float[Tensor, "rows d_in"]:
    g = torch.Generator().manual_seed(100_003 * seed + step)
    on = torch.rand(rows, FEATURES, generator=g) < 5 / FEATURES
    size = on * (1 + torch.rand(rows, FEATURES, generator=g))
    return size @ directions + NOISE * torch.randn(rows, D, generator=g)


def measure(seed: int, tell: Tell) -> Found:
    """Dead features and error from both beginnings and with both optimizers, without AuxK."""
    directions = _directions(seed)
    source = DrawnSource(partial(_draw, directions), D, "subspace")
    x = _draw(directions, 8192, 1 << 30, 0)
    dead, error = {}, {}
    for j, (name, options) in enumerate(KINDS.items()):
        preset = "frozen" if name == FROZEN else "topk"
        d = create(preset, d_in=D, n_features=WIDTH, k=K, seed=seed, objective=("reconstruction",))
        run = fit(d, source, STEPS, BATCH, seed=seed, lr=1e-3, decay=0.0, dead_after=LAST * BATCH, **options)
        dead[name] = run.metrics["dead_share"]
        error[name] = metrics.fvu(x, d(x).detach())
        tell(j + 1, len(KINDS), name)
    random = untrained(d)  # the last of them is the frozen one
    last = torch.cat([_draw(directions, BATCH, step, seed) for step in range(STEPS - LAST, STEPS)])
    dead[RANDOM] = metrics.dead_share(metrics.density(random.encode(last)))
    error[RANDOM] = metrics.fvu(x, random(x))
    return {"dead": dead, "FVU": error}


def judge(found: Found) -> Reproduction:
    """Dead features by start, and the errors of both."""
    dead, error = found["dead"], found["FVU"]
    plain, started = "random, Adam", "active subspace, Adam"
    apart = [abs(math.log(a / b)) for a, b in zip(error[started], error[plain], strict=True)]
    return Reproduction(
        title="Beginning in the active subspace prevents dead features",
        source="Wang et al. 2025, arXiv 2508.16929",
        setting=f"{FEATURES} sparse features in a {ACTIVE}-dimensional subspace of {D} dimensions, noise {NOISE}; {WIDTH} latents, k = {K}, {STEPS} steps of {BATCH} rows, no AuxK",
        claims=[
            Claim(f"share that did not fire in the last {LAST} steps, random start", "87 % of 1M features (attention outputs of Llama-3.1-8B)", dead[plain], ">=", 0.1, dead["random, SparseAdam"], "random start, SparseAdam"),
            Claim(f"share that did not fire in the last {LAST} steps, active subspace", "below 1 %", dead[started], "<=", 0.01, dead["active subspace, SparseAdam"], "active subspace, SparseAdam"),
            Claim("FVU with the active subspace against the random start (absolute log ratio)", "lower error at 1M features", apart, "<=", math.log(1.15), error[plain], "FVU of the random start"),
        ],
        figure=bars("Dead features and error by start and optimizer", "share", found),
        controls=found,
    )  # fmt: skip


ROW = Row(measure, judge)
