"""Cross-layer transcoders: less error at equal L0, and shorter chains (Ameisen et al. 2025)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import metrics
from saekit.activations import DrawnSource
from saekit.dictionaries import Dictionary, create
from saekit.evaluate import evaluate
from saekit.harvest import harvest
from saekit.models import load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.planted import STRIDE
from saekit.papers.row import Found, Row
from saekit.papers.training import fit, fit_all
from saekit.testbed.chain import Chain, ChainConfig, path_length

LAYERS, WIDTH, K = 4, 512, 16  # of code-lm; features and k of each layer
TOKENS, STEPS, BATCH = 200_000, 150, 2048
CHAIN_WIDTH, CHAIN_STEPS = 32, 2000
LENGTHS = ("MLPs' own weights", "transcoders", "CLT")
PER_LAYER, CLT = "per-layer transcoders", "CLT"
KEYS = {"fvu": "FVU", "l0": "L0", "ce_recovered": "CE recovered", "kl": "KL"}


def _chain_lengths(seed: int) -> dict[str, float]:
    """Mean path length in the hand-built chain, of exact per-layer transcoders, trained ones, and a CLT."""
    world = Chain(ChainConfig(seed=seed))
    c = world.config
    layers, d = c.layers, c.d

    def draw(rows: int, step: int, seed: int) -> Tensor:
        return world.batch(rows, step + seed * STRIDE)

    source = DrawnSource(draw, 2 * layers * d, "chains")
    rows = world.batch(2000, (1 << 30) + seed)
    x, y = rows.split(layers * d, 1)
    inputs = x.split(d, 1)
    penalty: dict[str, Any] = {"selection": "relu", "objective": ("reconstruction", "l1"), "coefficient": 0.1, "normalise": "none"}  # fmt: skip
    clt: Any = create("clt", d_in=d, n_layers=layers, n_features=layers * CHAIN_WIDTH, seed=seed, **penalty)
    fit(clt, source, CHAIN_STEPS, 256, seed=seed, lr=2e-3)
    out = {}
    for name in LENGTHS:
        encoders, decoders, codes = [], [], []
        for layer in range(layers):
            behind = (layers - layer - 1) * d
            if name == CLT:
                part = clt.parts[layer]
                encoder, decoder, z = part.W_enc.T, part.W_dec, part.encode(inputs[layer]).to_dense()
            elif name == "transcoders":
                one = create("transcoder", d_in=d, n_features=CHAIN_WIDTH, seed=seed, **penalty)
                pairs = torch.cat([world.batch(256 * 200, seed * STRIDE).split(d, 1)[i] for i in (layer, layers + layer)], 1)  # fmt: skip
                fit(one, pairs, CHAIN_STEPS, 256, seed=seed, lr=2e-3)
                encoder, z = one.W_enc.T, one.encode(inputs[layer]).to_dense()
                decoder = torch.nn.functional.pad(one.W_dec, (0, behind))
            else:
                encoder = world.stages[layer]
                z = (inputs[layer] @ encoder.T).relu()
                decoder = torch.nn.functional.pad(world.stages[layer + 1], (0, behind))
            encoders.append(encoder)
            decoders.append(decoder)
            codes.append(z)
        out[name] = path_length(encoders, decoders, codes, inputs[0], world.stages[-1])
    out["FVU"] = metrics.fvu(y, clt(x).detach())
    return out


def _spliced(d: Dictionary, points: tuple[list[str], list[str]]) -> Dictionary:
    d.reads, d.writes = tuple(points[0]), tuple(points[1])
    return d


READS, WRITES = ([f"blocks.{layer}.mlp:{side}" for layer in range(LAYERS)] for side in ("in", "out"))


def common(folder: Path) -> None:
    """What all MLPs read and write."""
    points = [*READS, *WRITES]
    harvest(load_model("code-lm"), "stdlib", points, out=folder / "acts", tokens=TOKENS, dtype="bf16")


def measure(seed: int, tell: Tell, folder: Path) -> Found:
    """A CLT beside per-layer transcoders on code-lm's MLPs, and both on the hand-built chain."""
    shape: dict[str, Any] = {"d_in": 256, "n_layers": LAYERS, "n_features": LAYERS * WIDTH, "k": LAYERS * K}
    ds = {
        CLT: create("clt", seed=seed, **shape),
        PER_LAYER: create("clt", reach=1, seed=seed, **shape),
        FROZEN: create("clt", seed=seed, atoms="frozen", **shape),
    }
    placed = {n: _spliced(d, (READS, WRITES)) for n, d in ds.items()}
    fit_all(placed, folder / "acts", STEPS, BATCH, seed=seed)
    tell(1, 3, "evaluating")
    beside = {name: ds[name] for name in (PER_LAYER, FROZEN)}
    report = evaluate(ds[CLT], load_model("code-lm"), "stdlib", tokens=16_384, controls=beside, seed=seed)
    tell(2, 3, "chains")
    controls = {PER_LAYER: PER_LAYER, FROZEN: FROZEN, RANDOM: "random"}
    return {
        "found": {
            CLT: {key: float(report[key]) for key in KEYS},
            **{name: {key: report[key].control[of] for key in KEYS} for name, of in controls.items()},
        },
        "chains": _chain_lengths(seed),
    }


def judge(found: Found) -> Reproduction:
    """Error of the CLT against per-layer transcoders', and path lengths in the chain."""
    found, chains = found["found"], found["chains"]
    ratio = [a / b for a, b in zip(found[CLT]["fvu"], found[PER_LAYER]["fvu"], strict=True)]
    return Reproduction(
        title="A cross-layer transcoder replaces all MLPs with less error, and shortens chains",
        source="Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs",
        setting=f"the {LAYERS} MLPs of code-lm, {WIDTH} features and k = {K} a layer, {STEPS} steps of {BATCH} tokens; {ChainConfig().chains} chains through {ChainConfig().layers} hand-built MLPs, L1",
        claims=[
            Claim("total error of the CLT over that of per-layer transcoders at equal total L0", "lower (figure on replacement error)", ratio, "<=", 1.0, found[PER_LAYER]["fvu"], "FVU of per-layer transcoders"),
            Claim("chain: mean path length with the CLT", "amplification chains collapse (text)", chains[CLT], "<=", 1.1, chains["transcoders"], "trained per-layer transcoders"),
            Claim("chain: mean path length with the MLPs' own weights, distance from 3", "a feature for each layer", [abs(v - 3) for v in chains["MLPs' own weights"]], "<=", 1e-4),
            Claim("chain: error of the CLT (FVU)", "no number", chains["FVU"], "<=", 0.05),
        ],
        figure=bars("Path length and error", "features on the path, or FVU", {"chain": {n: chains[n] for n in LENGTHS}, "code-lm, FVU": {n: found[n]["fvu"] for n in (CLT, PER_LAYER)}}),
        controls={name: {n: m[key] for n, m in found.items()} for key, name in KEYS.items()},
    )  # fmt: skip


ROW = Row(measure, judge, common=common)
