"""Experts that are routed to by how sparse they will be, and how well their neurons tell of factors (MoE-X, 2503.07639)."""

from statistics import fmean

import torch
from torch import Tensor, nn

from saekit.analyses.coverage import coverage
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.row import Found, Row
from saekit.testbed.moe import BITS, FACTORS, STEPS, TOPICS, WORDS, Drawn, Mixture, World, active_share, learn

EXPERTS, UNITS, K = 8, 32, 2
FLAT = 32  # factors of a world of one topic
CHOSEN, JUDGED = 4000, 20_000  # rows
INPUTS, WIDE, D = 200, 1024, 64  # of the router's check on Gaussian weights
MOE, SOFTMAX, GELU, RELU, UNTRAINED = "MoE-X", "softmax router", "dense GELU", "dense ReLU", "untrained"
SMALL = "dense GELU of as many active units"
MEASURES = ("loss", "coverage", "reconstruction", "active")


def _made(name: str, seed: int, topics: int = TOPICS) -> Mixture:
    if name in (GELU, RELU, SMALL):
        units = K * UNITS if name == SMALL else EXPERTS * UNITS
        return Mixture(seed, 1, units, 1, "sparsity", name != RELU, topics)
    return Mixture(seed, EXPERTS, UNITS, K, "softmax" if name == SOFTMAX else "sparsity", topics=topics)


def _ranks(predicted: Tensor, true: Tensor) -> float:
    """Spearman of the experts' shares, mean over inputs; experts that tie share their rank."""
    from scipy.stats import rankdata

    a, b = (torch.from_numpy(rankdata(one.numpy(), axis=1)) for one in (predicted, true))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return nn.functional.cosine_similarity(a, b).mean().item()


def _shares(w_in: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return active_share(w_in, x), (torch.einsum("rd,eud->reu", x, w_in) > 0).float().mean(2)


def _gaussian(g: torch.Generator) -> Found:
    """The router's estimate against the truth, for experts of Gaussian weights, and for experts in another order."""
    mu, sigma = torch.randn(EXPERTS, 1, D, generator=g), 0.5 + torch.rand(EXPERTS, 1, D, generator=g)
    w_in = mu + sigma * torch.randn(EXPERTS, WIDE, D, generator=g)
    predicted, true = _shares(w_in, torch.randn(INPUTS, D, generator=g))
    other = predicted.roll(1, 1)
    return {
        "error": (predicted - true).abs().mean().item(), "largest": (predicted - true).abs().max().item(),
        "half": (0.5 - true).abs().mean().item(), "ranks": _ranks(predicted, true), "others": _ranks(other, true),
    }  # fmt: skip


@torch.no_grad()
def _measured(model: Mixture, some: Drawn, other: Drawn) -> Found:
    a, b = (model.hidden(model.stream(one.seen)) for one in (some, other))
    found = coverage(a, some.factors, b, other.factors)
    predicted, true = _shares(model.w_in, model.stream(other.seen))
    return {
        "loss": nn.functional.cross_entropy(model(other.seen), other.words).item(), "coverage": found.coverage,
        "reconstruction": found.reconstruction, "active": (b > 0).float().sum(1).mean().item(),
        "error": (predicted - true).abs().mean().item(), "ranks": _ranks(predicted, true) if len(model.w_in) > 1 else 1.0,
    }  # fmt: skip


def measure(seed: int, tell: Tell) -> Found:
    """The router on Gaussian weights, and models that learnt the same world."""
    g = torch.Generator().manual_seed(1000 + seed)
    out: Found = {"gaussian": _gaussian(g), "models": {}, "flat": {}}
    jobs = [("models", name) for name in (MOE, SOFTMAX, GELU, SMALL, RELU, UNTRAINED)]
    jobs += [("flat", name) for name in (MOE, GELU)]
    worlds = {"models": World(seed), "flat": World(seed, 1, FLAT)}
    rows = {key: (world.draw(CHOSEN, g), world.draw(JUDGED, g)) for key, world in worlds.items()}
    out["entropy"] = worlds["models"].entropy(rows["models"][1])
    for i, (key, name) in enumerate(jobs):
        tell(i, len(jobs), name if key == "models" else f"{name}, one topic")
        model = _made(name, seed, len(worlds[key].pairs))
        if name != UNTRAINED:
            learn(model, worlds[key], seed)
        out[key][name] = _measured(model, *rows[key])
    return out


def judge(found: Found) -> Reproduction:
    """The router's two claims, and coverage and loss beside the dense model's."""
    gaussian, models, flat = found["gaussian"], found["models"], found["flat"]
    own, dense = models[MOE], models[GELU]

    def above(name: str, other: str) -> list[float]:
        return [a - b for a, b in zip(models[name]["coverage"], models[other]["coverage"], strict=True)]

    def worse(name: str) -> list[float]:
        return [a / b - 1 for a, b in zip(models[name]["loss"], dense["loss"], strict=True)]

    def apart(name: str) -> float:
        return fmean([a - b for a, b in zip(flat[MOE][name], flat[GELU][name], strict=True)])

    fewer = [a / b for a, b in zip(own["active"], models[SOFTMAX]["active"], strict=True)]

    def over(name: str) -> float:
        return fmean(models[name]["loss"]) - fmean(found["entropy"])

    short = [text for text, is_short in (
        (f"coverage is {fmean(above(MOE, GELU)):+.3f} of the dense model's, where 0.05 above it is demanded", fmean(above(MOE, GELU)) < 0.05),
        (f"the loss is {fmean(worse(MOE)):+.1%} of the dense model's, where 3 % at most is demanded", fmean(worse(MOE)) > 0.03),
    ) if is_short]  # fmt: skip
    return Reproduction(
        title="Experts that are routed to by their predicted sparsity have neurons that tell of factors",
        source="Yang, Venhoff, Khakzar et al. 2025, ICML, arXiv 2503.07639",
        setting=f"a row is of one of {TOPICS} topics, of which each has {FACTORS} conjunctions of the same {BITS} bits that set the next of {WORDS} words; {EXPERTS} experts of {UNITS} units, {K} a row, against dense layers of as many units in total; {STEPS} steps each; neurons and thresholds chosen by {CHOSEN:,} rows, judged on {JUDGED:,} others. The router's check: {EXPERTS} experts of {WIDE} Gaussian units",
        claims=[
            Claim("error of the predicted active share, Gaussian weights, mean over inputs and experts", "none given", gaussian["error"], "<=", 0.03, gaussian["half"], "one half"),
            Claim("Spearman of predicted and true active shares of the experts", "none given", gaussian["ranks"], ">=", 0.9, gaussian["others"], "another expert's prediction"),
            Claim("the same error of the trained experts, whose weights are no longer Gaussian", "none given", own["error"], "<=", 0.03, gaussian["error"], "Gaussian weights"),
            Claim("Spearman of the trained experts", "none given", own["ranks"], ">=", 0.9, gaussian["ranks"], "Gaussian weights"),
            Claim("coverage above that of the dense GELU model of as many parameters", "above dense (chess)", above(MOE, GELU), ">=", 0.05, above(SOFTMAX, GELU), SOFTMAX),
            Claim("coverage above that of a softmax router over the same experts", "no number read", above(MOE, SOFTMAX), ">=", 0.05, models[SOFTMAX]["coverage"], "its coverage"),
            Claim("active units a row over those with the softmax router", "sparser (the method)", fewer, "<", 1.0, models[SOFTMAX]["active"], "its active units"),
            Claim("loss above that of the dense GELU model, as a share of it", "comparable to dense", worse(MOE), "<=", 0.03, worse(SOFTMAX), SOFTMAX),
        ],
        figure=bars("Single neurons and factors, on rows that nothing was chosen by", "F1", {m: {name: models[name][m] for name in models} for m in ("coverage", "reconstruction")}),
        notes=[
            *(["The claim of coverage at an equal loss does not hold here: " + "; ".join(short) + "."] if short else []),
            f"Experts gain where factors are of topics: in a world of one topic with {FLAT} conjunctions, of which about five hold at once, coverage is {apart('coverage'):+.3f} of the dense model's, and the loss {apart('loss'):+.3f} nats. The world was chosen on seeds 10 to 12. The dense model is slower, not worse: after 5000 steps its neurons are the cleaner ones (two seeds, LOG).",
            "Against a softmax router over the same experts, MoE-X has sparser rows and worse neurons: here experts help because they part the topics, however they are routed to.",
            f"The largest error of Gaussian weights is {fmean(gaussian['largest']):.3f}; the words' entropy is {fmean(found['entropy']):.3f} nats, which losses include: above it MoE-X has {over(MOE):.3f}, dense GELU {over(GELU):.3f}, the softmax router {over(SOFTMAX):.3f}.",
        ],
        controls={m if m != "active" else "active units a row": {name: models[name][m] for name in models} for m in MEASURES},
    )  # fmt: skip


ROW = Row(measure, judge)
