"""Features that are read off late in a network are learnt late: bits, XORs and parities (2407.06076)."""

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from saekit.analyses.complexity import Complexity, complexity, importance, learning_time, v_information
from saekit.dictionaries import Dictionary, create
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.parities import BLOCKS, KINDS, LINEAR, PARITY, STEPS, WIDTH, XOR, Residual, bits, learning

ROWS, FEATURES, K, FITTED, BATCH = 2000, 64, 6, 500, 256
CHECKPOINTS = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 120, 140, 160, 180, 200, 250, 300, 400, 500, 700, 1000, 1400, STEPS)  # fmt: skip
ORDER = (LINEAR, XOR, PARITY)
TRAINED, UNTRAINED = "trained", "untrained network"
INPUT, NOTHING = "an input coordinate", "labels shuffled"


def _said(net: Residual, x: Tensor, targets: Tensor) -> Tensor:
    """What the network's own output tells of each target."""
    outputs = net(x).detach()
    own = zip(outputs.T[..., None], targets.T[..., None], strict=True)
    return torch.cat([v_information(output, target) for output, target in own])


def _by_kind(found: Complexity) -> dict[str, Any]:
    """Mean K, and information by layer, of the targets of each kind."""
    of = {kind: torch.tensor([one == kind for one in KINDS]) for kind in ORDER}
    return {
        "K": {kind: found.k[on].mean().item() for kind, on in of.items()},
        "information": {kind: found.information[:, on].mean(1).tolist() for kind, on in of.items()},
    }


def _spearman(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


@torch.no_grad()
def _features(net: Residual, streams: list[Tensor], g: torch.Generator, seed: int) -> Found:
    """Complexity and importance of the features of dictionaries of the last stream, and how both go together."""
    last = net.streams(bits(2 * ROWS, g).x)[-1]
    shape: dict[str, Any] = {"d_in": WIDTH, "n_features": FEATURES, "k": K, "seed": seed}
    ds: dict[str, Dictionary] = {"TopK": create("topk", **shape), FROZEN: create("frozen", **shape)}
    with torch.enable_grad():
        fit_all(ds, last, FITTED, BATCH, lr=3e-3, seed=seed)
    out: Found = {}
    for name, d in (ds | {RANDOM: untrained(ds[FROZEN])}).items():
        codes = d.encode(streams[-1])
        often = (codes.firing_counts() >= ROWS // 50).nonzero()[:, 0]
        hard = complexity(streams, codes.select(often)).k
        effects = d.to_inference().W_dec @ net.read.weight.T
        # every target is an output, so the mean over them is taken
        outputs = [torch.full((codes.rows,), i) for i in range(len(KINDS))]
        weight = torch.stack([importance(codes, effects, o) for o in outputs]).mean(0)[often]
        out[name] = {"K": hard.mean().item(), "spearman": _spearman(hard, weight)}
    return out


def measure(seed: int, tell: Tell) -> Found:
    """K of targets, when they are learnt, and K and importance of a dictionary's features."""
    g = torch.Generator().manual_seed(1000 + seed)
    (x, targets), curves = bits(ROWS, g), list[Tensor]()
    for step, net in enumerate(learning(seed)):
        if step == 0:
            before = complexity([s.detach() for s in net.streams(x)], targets)
        if step in CHECKPOINTS:
            tell(step, STEPS + 200, "training")
            curves.append(_said(net, x, targets))
    streams = [s.detach() for s in net.streams(x)]
    found, times = complexity(streams, targets), learning_time(CHECKPOINTS, torch.stack(curves))
    shuffled = targets[torch.randperm(ROWS, generator=g)]
    tell(STEPS + 100, STEPS + 200, "dictionaries")
    return {
        TRAINED: _by_kind(found), UNTRAINED: _by_kind(before),
        INPUT: complexity(streams, x).k.max().item(), NOTHING: complexity(streams, shuffled).k.min().item(),
        "order": _spearman(times, found.k), "order, untrained": _spearman(times, before.k),
        "times": {kind: times[[one == kind for one in KINDS]].mean().item() for kind in ORDER},
        "right": (net(x) * targets > 0).float().mean().item(),
        "features": _features(net, streams, g, seed),
    }  # fmt: skip


def judge(found: Found) -> Reproduction:
    """The order of complexity, and of learning, against an untrained network."""
    k, before, features = found[TRAINED]["K"], found[UNTRAINED]["K"], found["features"]

    def gap(by: dict[str, list[float]], more: str, less: str) -> list[float]:
        return [a - b for a, b in zip(by[more], by[less], strict=True)]

    def curve(name: str, kind: str) -> list[float]:
        return [fmean(list(one)) for one in zip(*found[name]["information"][kind], strict=True)]

    layers = list(range(BLOCKS + 1))
    return Reproduction(
        title="What a network computes late is learnt late: bits before XORs before parities",
        source="Fel, Bethune, Lampinen, Serre and Hermann 2024, arXiv 2407.06076",
        setting=f"a residual network of {BLOCKS} blocks and width {WIDTH} that learnt {len(KINDS)} targets of 8 noisy bits at once, a network a seed ({fmean(found['right']):.1%} right): bits, XORs of two, parities of four; linear information in the embedding and after each block, cross-validated on {ROWS} fresh rows",
        claims=[
            Claim("K of XORs less that of single bits", "complex features are read off late (figures)", gap(k, XOR, LINEAR), ">=", 0.15, gap(before, XOR, LINEAR), UNTRAINED),
            Claim("K of parities less that of XORs", "the same", gap(k, PARITY, XOR), ">=", 0.15, gap(before, PARITY, XOR), UNTRAINED),
            Claim("Spearman of K and the step at which the network's own output has half of its information", "simple features emerge first (figures)", found["order"], ">=", 0.8, found["order, untrained"], "K in the untrained network"),
            Claim("K of an input coordinate, the largest", "0, a sanity check", found[INPUT], "<=", 0.1, found[NOTHING], "shuffled targets"),
            Claim("K of shuffled targets, the smallest", "1, a sanity check", found[NOTHING], ">=", 0.95, found[INPUT], "input coordinates"),
        ],
        figure=figure("What a linear reader tells of a target", "block (0: the embedding)", "information, as R2", {
            kind + ("" if name == TRAINED else f", {name}"): (layers, curve(name, kind)) for name in (TRAINED, UNTRAINED) for kind in ORDER
        }, xaxis={"dtick": 1}),
        notes=[
            "In the untrained network the order of complexity goes with the time of learning as well (see the control): the claim says what is learnt first, and not that training made it complex.",
            "Half learnt at step: " + ", ".join(f"{kind} {fmean(found['times'][kind]):.0f}" for kind in ORDER) + ". An XOR lies in what one block adds, and a parity in what two do: with the embedding K of an XOR is about 1/5 wherever one block finds it.",
            f"Features of dictionaries of the last stream ({FEATURES}, k = {K}) that fire in 2 % of rows and more: mean K, and Spearman of K and importance (gradient x input, over all outputs). It is negative, as the paper finds, and so is that of atoms that nothing was learnt by: what varies for no target is both unimportant and nowhere linear.",
        ],
        controls={
            **{f"K, {kind}": {TRAINED: k[kind], UNTRAINED: before[kind]} for kind in ORDER},
            "K of features": {name: one["K"] for name, one in features.items()},
            "Spearman, K and importance": {name: one["spearman"] for name, one in features.items()},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
