"""One direction of an observer's stream tells of contradictions, whoever wrote them, and steers them (2507.23221)."""

import torch
from torch import Tensor

from saekit.models import Model, load_model
from saekit.observer import Observer, localise, observe, pushed, read, split, strongest, without
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import RANDOM
from saekit.papers.row import Found, Row
from saekit.probes import auroc, linear
from saekit.testbed import context_qa
from saekit.testbed.context_qa import ANSWER, CONTEXT, EACH, GENERATORS, TASK, texts
from saekit.testbed.tasks import fit

LAYERS = TASK.config.n_layers
POINTS = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(LAYERS))]
NEURONS = [f"blocks.{i}.mlp.act_fn" for i in range(LAYERS)]
FITTED, CHOSEN, TEST, PROMPTS = 600, 300, 600, 300  # texts
SHARE, DRAWS, DIRECTIONS = 0.01, 20, 10
STRENGTHS = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]  # in distances between the classes' means
OWN, MEANS, RANDOM_DIRECTION, SHUFFLED, OVERLAP = "probe", "difference of means", "random direction", "labels shuffled", "n-gram overlap"  # fmt: skip
PARAPHRASED, FREE, ANOTHER = "paraphrased", "free", "another generator, paraphrased"


def _answered(n: int, g: torch.Generator, generator: str, paraphrased: bool = True) -> tuple[Tensor, Tensor]:
    """Texts that end with their only answer, half of them contradicting, and which do."""
    contradicts = torch.arange(n) % 2 == 1
    return texts(contradicts[:, None], g, generator, paraphrased).tokens[:, :-1], contradicts


def _overlap(tokens: Tensor) -> Tensor:
    """Share of the answer's n-grams (it alone, and with its key, in either order) that the context lacks."""
    context, (key, answer) = tokens[:, 1:CONTEXT], (tokens[:, -2, None], tokens[:, -1, None])
    first, last = context[:, ::EACH], context[:, 2::EACH]
    both = ((first == key) & (last == answer)) | ((first == answer) & (last == key))
    return 1 - ((context == answer).any(1).double() + both.any(1).double()) / 2


def _detection(seen: Observer, g: torch.Generator, seed: int) -> Found:
    """AUROCs of the probe and of what it is compared with, on texts that nothing was chosen by."""
    point, out = seen.hook_point, {}
    fitted, labels = _answered(FITTED, g, GENERATORS[0])
    x = read(seen.model, fitted, [point])[point]
    shuffled = linear(x, labels[torch.randperm(FITTED, generator=g)], seed=seed)
    drawn = torch.randn(DIRECTIONS, x.shape[1], generator=g)
    sets = {PARAPHRASED: (GENERATORS[0], True), FREE: (GENERATORS[0], False), ANOTHER: (GENERATORS[1], True)}
    for name, (generator, paraphrased) in sets.items():
        tokens, true = _answered(TEST, g, generator, paraphrased)
        own = read(seen.model, tokens, [point])[point]
        # of a direction that nothing was fitted to, the better of its two signs
        either = [max(a, 1 - a) for a in (auroc(own @ d, true) for d in drawn)]
        out[name] = {
            OWN: auroc(seen.probe(own), true), MEANS: auroc(own @ seen.means, true), OVERLAP: auroc(_overlap(tokens), true),
            SHUFFLED: auroc(shuffled(own), true), RANDOM_DIRECTION: sum(either) / DIRECTIONS,
        }  # fmt: skip
    return out


def _neurons(seen: Observer, g: torch.Generator) -> Found:
    """By how much the log odds of contradictions fall without the strongest neurons, and without as many random ones."""
    tokens, true = _answered(TEST, g, GENERATORS[0])
    found, judged = tokens[true].chunk(2)
    effects = localise(seen, found, NEURONS)
    total = sum(len(e) for e in effects.values())
    n, own = round(SHARE * total), seen(judged).mean().item()

    def lost(neurons: dict[str, Tensor]) -> float:
        with without(seen.model, neurons):
            return own - seen(judged).mean().item()

    # neurons that the direction can depend on: the others would only make the control weaker
    reached = torch.cat(list(effects.values())).nonzero()[:, 0]
    drawn = [reached[torch.randperm(len(reached), generator=g)[:n]] for _ in range(DRAWS)]
    random = [lost(split(effects, one)) for one in drawn]
    return {"neurons": n, "odds": own, "strongest": lost(strongest(effects, n)), RANDOM: sum(random) / DRAWS,
            "random, absolute": sum(abs(one) for one in random) / DRAWS}  # fmt: skip


def _rates(model: Model, point: str, vector: Tensor, prompts: context_qa.Texts) -> list[float]:
    """Share of answers that contradict, by strength: the probability, so that nothing has to be sampled.

    Pushed is where the observer reads: at the answer that stands already.
    """
    asked, out = prompts.tokens[:, :-2], []
    for strength in STRENGTHS:
        with torch.no_grad(), pushed(model, point, strength * vector, [CONTEXT + ANSWER]):
            logits = model.logits(model.inputs(asked, torch.ones_like(asked)))[:, -1]
        out.append(context_qa.contradiction_rate(logits, prompts.values[:, -1]).mean().item())
    return out


def _steering(seen: Observer, g: torch.Generator) -> Found:
    """Rates of contradiction in answers that the model writes, behind one answer of either kind."""
    from scipy.stats import spearmanr

    before = (torch.arange(PROMPTS) % 2 == 1)[:, None].expand(-1, 2)
    prompts, length = texts(before, g, remarked=0.0), seen.means.norm()
    rates, probe = (
        _rates(seen.model, seen.hook_point, v, prompts) for v in (seen.means, length * seen.direction)
    )
    # in so few dimensions a random direction has a share of the one that is judged, which takes no part in its control
    drawn = torch.randn(DIRECTIONS, len(seen.means), generator=g)
    drawn -= (drawn @ seen.means / length**2)[:, None] * seen.means
    others = [_rates(seen.model, seen.hook_point, length * d / d.norm(), prompts) for d in drawn]
    ranges = [max(one) - min(one) for one in others]
    return {
        "rates": rates, "range": max(rates) - min(rates), "spearman": float(spearmanr(STRENGTHS, rates).statistic),
        "probe": probe, "range of probe": max(probe) - min(probe),
        "others": [sum(values) / DIRECTIONS for values in zip(*others, strict=True)],
        "range of others": sum(ranges) / DIRECTIONS, "largest of others": max(ranges),
    }  # fmt: skip


def measure(seed: int, tell: Tell) -> Found:
    """An observer, trained on texts of two generators and both kinds of authors, and probes of contradictions in it."""
    for step, (module, _) in enumerate(fit(TASK, seed)):  # noqa: B007 (the last one is wanted)
        if step % 50 == 0:
            tell(step, TASK.steps, "training")
    model, g = load_model(module, name=TASK.name), torch.Generator().manual_seed(1000 + seed)
    some, other = _answered(FITTED, g, GENERATORS[0]), _answered(CHOSEN, g, GENERATORS[0])
    seen = observe(model, some, other, POINTS, seed)
    return {
        "layers": dict(seen.aurocs), "AUROC": _detection(seen, g, seed), "removed": _neurons(seen, g),
        "steering": _steering(seen, g),
    }  # fmt: skip


def judge(found: Found) -> Reproduction:
    """Detection, transfer, the neurons behind it, and steering, each beside its control."""
    aurocs, removed, steering = found["AUROC"], found["removed"], found["steering"]
    own = aurocs[PARAPHRASED]

    def over(a: list[float], b: list[float]) -> list[float]:
        return [x / y for x, y in zip(a, b, strict=True)]

    def less(a: list[float], b: list[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    def mean(curves: list[list[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*curves, strict=True)]

    return Reproduction(
        title="A single direction of an observer tells of contradictions, of any generator, and steers them",
        source="O'Neill, Chalnev, Zhao, Kirkby and Jayasekara 2025, arXiv 2507.23221",
        setting=f"a {LAYERS}-layer transformer of width {TASK.config.d_model} that learnt {TASK.steps * TASK.rows:,} texts of two generators (a model a seed); probes of the last token's stream, fitted to {FITTED} texts of one generator, layer chosen by {CHOSEN}, judged on {TEST} others, in which no answer is a word of its context; steered by the difference of the classes' means at one answer, for the rate of the next ({PROMPTS} texts, half of them behind a contradiction)",
        claims=[
            Claim("AUROC of the probe at the best layer", "0.9 and more on ContraTales, Gemma 2 (figures)", own[OWN], ">=", 0.95, own[RANDOM_DIRECTION], RANDOM_DIRECTION),
            Claim("on texts of another generator", "transfers between generators (figures)", aurocs[ANOTHER][OWN], ">=", 0.9, aurocs[ANOTHER][RANDOM_DIRECTION], RANDOM_DIRECTION),
            Claim("by how much its AUROC is above that of n-gram overlap", "5 to 27 points above baselines", less(own[OWN], own[OVERLAP]), ">=", 0.1, own[OVERLAP], OVERLAP),
            Claim(f"log odds lost without the {SHARE:.0%} of neurons of the largest gradient x activation, over what as many random ones take", "sparse late MLP neurons", over(removed["strongest"], removed["random, absolute"]), ">=", 5.0, removed["random, absolute"], "nats, random neurons"),
            Claim("Spearman of the direction's strength and the rate of contradictions", "monotonic (figures)", steering["spearman"], ">=", 0.9),
            Claim("range of that rate over the strengths", "a wide range (figures)", steering["range"], ">=", 0.3, steering["range of others"], RANDOM_DIRECTION),
            Claim("the same of random directions of the same length at right angles to it, mean of their ranges", "little", steering["range of others"], "<=", 0.05),
        ],
        figure=figure("Steering along the direction", "strength, in distances between the classes' means", "rate of contradictions", {MEANS: (STRENGTHS, mean(steering["rates"])), OWN: (STRENGTHS, mean(steering["probe"])), RANDOM_DIRECTION: (STRENGTHS, mean(steering["others"]))}),
        notes=[
            f"The observer reads remarks behind answers in training, of which {context_qa.REMARKED:.0%} say whether they contradict; the probe reads the stream before any remark, and steered texts have none. It writes the steered answers itself.",
            "By layer: " + ", ".join(f"{point} {sum(v) / len(v):.3f}" for point, v in found["layers"].items()) + ".",
        ],
        controls={
            **{f"AUROC, {name}": aurocs[name] for name in (PARAPHRASED, FREE, ANOTHER)},
            "log odds lost": {"strongest": removed["strongest"], RANDOM: removed[RANDOM], "contradictions have": removed["odds"]},
            "range of rates": {MEANS: steering["range"], OWN: steering["range of probe"], RANDOM_DIRECTION: steering["range of others"], "the largest random one": steering["largest of others"]},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
