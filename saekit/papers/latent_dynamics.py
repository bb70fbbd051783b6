"""What an autoencoder of few images remembers are the attractors of its loop; of many they are no image (2505.22785)."""

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from saekit.analyses.dynamics import Flow, attractors, flow, nearest, outlier_scores
from saekit.dictionaries import Dictionary, create
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.probes import auroc
from saekit.testbed.autoencoders import Autoencoder, autoencoder
from saekit.testbed.digits import Digits, digits

LATENT, NEAR = 16, 0.95
FEW, SIZES, ALL = 20, (20, 60, 200), "all"
STRANGE, STEPS, NEIGHBOURS = (8, 9), 5, 1  # held-out digits, and the score that other digits and seeds chose
WIDTH, K, FITTED, BATCH = 128, 8, 500, 256
UNTRAINED = "untrained network"
TRAJECTORY, CODE, ERROR = "trajectory", "code alone, no step", "reconstruction error"


def _settled(found: Flow) -> Found:
    return {
        "converge": found.converged.float().mean().item(),
        "cycle": (found.period > 1).float().mean().item(),
        "diverge": found.diverged.float().mean().item(),
    }


def _remembered(net: Autoencoder, images: Tensor, test: Tensor) -> Found:
    """Where held-out codes end, and how near the attractors' images are to those that were learnt, and to others."""
    found = flow(net.step, net.encode(test))
    ends = attractors(net.step, found)
    drawn = net.decode(ends.points)
    own, _ = nearest(drawn, images)
    on = (ends.of >= 0) & (own >= NEAR)[ends.of.clamp_min(0)]
    none = float("nan")  # a mean over no attractors
    return {
        **_settled(found), "attractors": float(len(own)),
        "learnt": own.mean().item() if len(own) else none, "least": own.min().item() if len(own) else none,
        "held out": nearest(drawn, test)[0].mean().item() if len(own) else none,
        "near": on.float().mean().item(), "error": (net(test) - test).square().mean().item(),
        "own error": (net(images) - images).square().mean().item(),
    }  # fmt: skip


def _outliers(data: Digits, seed: int) -> Found:
    """AUROC of digits that an autoencoder has never seen against held-out ones of the others."""
    known = data.train[~torch.isin(data.train_labels, torch.tensor(STRANGE))]
    strange, net = torch.isin(data.test_labels, torch.tensor(STRANGE)), autoencoder(known, LATENT, seed)
    codes = net.encode(known), net.encode(data.test)
    return {
        TRAJECTORY: auroc(outlier_scores(net.step, *codes, STEPS, NEIGHBOURS), strange),
        CODE: auroc(outlier_scores(net.step, *codes, 0, NEIGHBOURS), strange),
        ERROR: auroc((net(data.test) - data.test).square().sum(1), strange),
    }


def _dictionaries(data: Digits, seed: int) -> Found:
    """Whether dictionaries of the images settle, from held-out images."""
    shape: dict[str, Any] = {"d_in": 64, "n_features": WIDTH, "k": K, "seed": seed}
    ds: dict[str, Dictionary] = {"TopK": create("topk", **shape), FROZEN: create("frozen", **shape)}
    fit_all(ds, data.train, FITTED, BATCH, lr=3e-3, seed=seed)
    return {name: _settled(flow(d, data.test)) for name, d in (ds | {RANDOM: untrained(ds[FROZEN])}).items()}


def measure(seed: int, tell: Tell) -> Found:
    """Autoencoders of more and more images, one that lacks two digits, and dictionaries."""
    data, g = digits(seed), torch.Generator().manual_seed(1000 + seed)
    order, out = torch.randperm(len(data.train), generator=g), dict[str, Found]()
    for j, size in enumerate((*SIZES, len(data.train))):
        tell(j, len(SIZES) + 2, f"{size} images")
        images = data.train[order[:size]]
        name = str(size) if size in SIZES else ALL
        out[name] = _remembered(autoencoder(images, LATENT, seed), images, data.test)
    few = data.train[order[:FEW]]
    out[UNTRAINED] = _remembered(autoencoder(few, LATENT, seed, steps=0), few, data.test)
    tell(len(SIZES) + 1, len(SIZES) + 2, "outliers")
    return {
        "images": out, "n": len(data.train), "outliers": _outliers(data, seed), "dictionaries": _dictionaries(data, seed),
    }  # fmt: skip


def judge(found: Found) -> Reproduction:
    """Few images against all, and trajectories against reconstruction errors."""
    by, outliers, ds = found["images"], found["outliers"], found["dictionaries"]
    few, every, raw = by[str(FEW)], by[ALL], by[UNTRAINED]

    names, n = (*map(str, SIZES), ALL), found["n"][0]
    lines = {"cosine of attractors and the nearest learnt image": "learnt", "and the nearest held-out one": "held out", f"share of codes that end within {NEAR} of a learnt image": "near"}  # fmt: skip
    return Reproduction(
        title="Decoded and encoded again and again, codes come to the images that were learnt, where these were few",
        source="Fumero, Moschella, Rodola and Locatello 2025, arXiv 2505.22785",
        setting=f"ReLU autoencoders 64-128-{LATENT}-128-64 of scikit-learn's digits, with weight decay and a little noise, of {FEW} to {n} images; started from the codes of all held-out images, at most 3000 steps; settings were chosen on other seeds",
        claims=[
            Claim(f"{FEW} images: share of held-out codes that converge", "attractors in all networks (figures)", few["converge"], ">=", 1.0, raw["converge"], UNTRAINED),
            Claim("cosine of their attractors and the nearest learnt image", "memorised where training sets are small (figures)", few["learnt"], ">=", NEAR, raw["learnt"], UNTRAINED),
            Claim(f"{n} images: share of held-out codes that converge to an attractor so near to a learnt image", "not where they are large (figures)", every["near"], "<=", 0.5, few["near"], f"{FEW} images"),
            Claim(f"AUROC of digits {STRANGE[0]} and {STRANGE[1]}, never seen: of trajectories less that of reconstruction errors", "AUROC 91 on iNaturalist and Places, ViT-MAE", [a - b for a, b in zip(outliers[TRAJECTORY], outliers[ERROR], strict=True)], ">=", 0.0, outliers[ERROR], ERROR),
        ],
        figure=figure("What the attractors are", "images learnt", "cosine, or share", {label: ([*SIZES, n], [fmean(by[name][key]) for name in names]) for label, key in lines.items()}, xaxis={"type": "log", "tickvals": [*SIZES, n]}),
        notes=[
            f"Convergence alone tells nothing: an untrained network has it, at one point, and so has that of all images ({fmean(every['converge']):.1%} of codes). Of {FEW} images' attractors the least near is at {fmean(few['least']):.3f} (mean over seeds), and {fmean(few['near']):.1%} of codes end within {NEAR}. Nearness to one of {n} images is easy, whatever was learnt: the attractors of the network of all are hardly nearer to what it learnt than to held-out images. With linear outputs and no noise in training, which was tried first on three other seeds, 19 to 47 % of codes converged with {FEW} images, and 38 to 57 % diverged.",
            f"Trajectories are compared by the nearest training trajectory over {STEPS} steps. With no step, by the nearest training code, the AUROC is {fmean(outliers[CODE]):.3f}: where it is as high, the steps add nothing to it.",
            "Dictionaries: x -> decode(encode(x)) from held-out images. They are no contractions: most images grow without end, and what neither converges, cycles nor diverges had not settled after 3000 steps.",
        ],
        controls={
            **{key: {**{f"{name} images": by[name][of] for name in names}, UNTRAINED: raw[of]} for key, of in {
                "converge": "converge", "cycle": "cycle", "diverge": "diverge", "attractors": "attractors", "cosine, learnt": "learnt", "cosine, held out": "held out", f"codes within {NEAR}": "near", "error, held out": "error", "error, learnt": "own error",
            }.items()},
            "AUROC": outliers,
            **{f"dictionary: {key}": {name: one[key] for name, one in ds.items()} for key in ("converge", "cycle", "diverge")},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
