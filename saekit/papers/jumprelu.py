"""JumpReLU: thresholds learn through pseudo-gradients that are right on average (2407.14435)."""

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.dictionaries import Dictionary, TrainState
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import make, stream
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.planted import PlantedConfig, PlantedWorld

WIDTH, STEPS, BATCH = 256, 1500, 512
TARGETS = (4, 8, 16)
ROWS = 1 << 19  # for the gradients of thresholds
BANDWIDTH = 0.05  # of the test of gradients: narrow enough for the limit, wide enough for many rows


def threshold_gradients(
    d: Dictionary, x: Float[Tensor, "rows d_in"], penalty: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the expected loss by the thresholds: pseudo-gradients, and differences of the loss itself.

    The expected loss is smooth in a threshold, since rows lie to both sides of it. Its difference over the
    kernel's window is what the rectangle kernel estimates: turning a code off costs the mean of the two
    slopes, at the code and at 0, times the code.
    """
    d.zero_grad()
    assert d.encoder is not None  # of its own
    x = d.norm_in(x)
    selection = type(d.selection)(type(d.selection.config)(bandwidth=BANDWIDTH), d.n_features, d.d_in)
    # away from where training ended: there the gradients are 0 but for noise
    generator = torch.Generator().manual_seed(0)
    factor = 0.7 + 0.6 * torch.rand(d.n_features, generator=generator)
    selection.threshold.data.copy_(d.selection.threshold.detach() * factor)
    got = selection.train_codes(x, d.encoder, d.b_enc, TrainState())
    codes = got.codes
    dense = codes.to_dense()
    loss = (dense @ d.W_dec + d.b_dec - x).square().sum(1).mean() + penalty * got.on.sum() / len(x)
    mine = torch.autograd.grad(loss, selection.threshold)[0]
    with torch.no_grad():
        u = torch.addmm(d.b_enc, x, d.encoder.T)
        z = u * (u > selection.threshold)
        error = z @ d.W_dec + d.b_dec - x
        along, norms = error @ d.W_dec.T, d.W_dec.square().sum(1)

        def loss_at(threshold: Tensor) -> Tensor:
            change = u * (u > threshold) - z  # of each code by itself, the others as they are
            return (2 * change * along + change.square() * norms + penalty * (u > threshold)).mean(0)

        half = BANDWIDTH / 2
        theirs = (loss_at(selection.threshold + half) - loss_at(selection.threshold - half)) / BANDWIDTH
    return mine, theirs


def measure(seed: int, tell: Tell) -> Found:
    """L0 on target over a range of targets, and pseudo-gradients against differences of the loss."""
    world = PlantedWorld(PlantedConfig(seed=1))
    x = world.evaluation_set(16384)[0]
    kinds = {"JumpReLU": "jumprelu", "TopK": "topk"}
    ds = {
        f"{name} {k}": make(world, preset, WIDTH, seed, k=k)
        for k in TARGETS
        for name, preset in kinds.items()
    }
    ds[FROZEN] = make(world, "frozen", WIDTH, seed, k=8)
    fit_all(ds, stream(world), STEPS, BATCH, seed=seed)
    ds[RANDOM] = untrained(ds[FROZEN])
    fvu = {name: metrics.fvu(x, d(x).detach()) for name, d in ds.items()}
    tell(1, 2, "gradients of thresholds")
    penalty = float(ds["JumpReLU 8"].terms["l0"].coefficient.value)
    wide = (world.batch(ROWS // 8, (1 << 30) - 8 + i)[0] for i in range(8))
    pairs = [threshold_gradients(ds["JumpReLU 8"], rows, penalty) for rows in wide]
    a, b = (torch.stack(side).mean(0) for side in zip(*pairs, strict=True))
    return {
        "off": {str(k): abs(metrics.l0(ds[f"JumpReLU {k}"].encode(x)) / k - 1) for k in TARGETS},
        "fvu": {name: {f"L0 {k}": fvu[f"{name} {k}"] for k in TARGETS} for name in kinds},
        "plain": {name: fvu[name] for name in (FROZEN, RANDOM)},
        "relative": ((a - b).norm() / b.norm()).item(),
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
    }


def judge(found: Found) -> Reproduction:
    """L0 against its targets, error against TopK's, and both gradients."""
    fvu = found["fvu"]
    ratios = [a / b for a, b in zip(fvu["JumpReLU"]["L0 8"], fvu["TopK"]["L0 8"], strict=True)]
    return Reproduction(
        title="JumpReLU's thresholds are learned by gradients that are right on average",
        source="Rajamanoharan et al. 2024, arXiv 2407.14435",
        setting=f"512 planted features in 64 dimensions, {WIDTH} latents, {STEPS} steps of {BATCH} rows; L0 penalty steered to its target; gradients over {ROWS} rows, bandwidth {BANDWIDTH}",
        claims=[
            *[Claim(f"mean L0 against a target of {k} (share off)", "the paper sweeps the coefficient instead", found["off"][str(k)], "<=", 0.05) for k in TARGETS],
            Claim("threshold pseudo-gradients against differences of the smoothed loss (relative error over all thresholds)", "equal in expectation", found["relative"], "<=", 0.1, found["cosine"], "cosine"),
            Claim("FVU over that of TopK at L0 8", "at or below TopK at equal L0 (figure)", ratios, "<=", 1.1),
        ],
        figure=bars("Error by L0", "FVU", fvu),
        controls={"FVU at L0 8": {name: by_l0["L0 8"] for name, by_l0 in fvu.items()} | found["plain"]},
    )  # fmt: skip


ROW = Row(measure, judge)
