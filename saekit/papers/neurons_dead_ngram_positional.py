"""Neurons in language models: dead, detectors of tokens and n-grams, positional; suppression of triggers (2309.04827)."""

import math
import random
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from saekit.autointerp.families import Families, FamilyCollector, families, wilson
from saekit.hooks import capture
from saekit.models import load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.row import Found, Row
from saekit.testbed.detectors import DetectorsConfig, PlantedDetectors, planted_detectors
from saekit.tokens import documents
from saekit.types import Codes

WORLDS = {
    "small": (DetectorsConfig(), 500),
    "large": (DetectorsConfig(vocabulary=120, context=128, random=500, dead=5, tokens=4, bigrams=4, trigrams=8), 400),
}  # fmt: skip
RATES = {  # by position, in 64ths, so that rows can have them exactly
    "strong": [64] * 5 + [0] * 19,
    "weak": [40] * 12 + [16] * 12,
    "oscillatory": [60, 60, 4, 4] * 6,
    "slope": list(range(8, 56, 2)),
}
TOKENS = 100_000  # of code-lm's held-out text, other documents each seed
EARLY, LATE = (0, 1), (2, 3)
CLEAR = 1.0  # what a GELU is given where a neuron clearly fires; chosen on the training side of the text
OTHERS = (0.5, 2.0)
FOUND, SHUFFLED = "planted", "text shuffled"
COUNTED = ("dead", "rare", "detectors", "positional", "strong", "oscillatory")
NONE = "no number: the paper's neurons aren't known"
OWN, RANDOM_DIRECTIONS, ELSE = "detectors", "random directions", "other detectors' triggers"


def _rates(found: Collection, planted: Collection) -> dict[str, float]:
    hits = len(set(found) & set(planted))
    return {
        "precision": hits / len(found) if found else float(not planted),
        "recall": hits / len(planted) if planted else 1.0,
    }


def _judged(found: Families, world: PlantedDetectors) -> dict[str, dict[str, float]]:
    """Precision and recall of each family; detectors have to have the right grams, positional neurons their kind."""
    planted = [(i, len(min(grams)), grams) for i, grams in world.detectors.items()]
    own = [(i, d.n, frozenset(d.grams)) for i, d in found.detectors.items()]
    return {
        "dead": _rates(found.dead, world.dead),
        "detectors": _rates(own, planted),
        "positional": _rates([(i, p.kind) for i, p in found.positional.items()], list(world.positional.items())),
        "suppressing": _rates([i for i, rank in found.ranks.items() if rank < 0.5], world.suppressing),
    }  # fmt: skip


def _shuffled(world: PlantedDetectors, text: torch.Tensor, seed: int) -> Families:
    """What is found where tokens are those of anywhere in the text, and each row's firing begins at another position."""
    g = torch.Generator().manual_seed(seed)
    rows, seq = text.shape
    shuffled = text.flatten()[torch.randperm(text.numel(), generator=g)].view(rows, seq)
    begin = torch.randint(seq, (rows, 1), generator=g)
    site = {"x": world.model.site("mlp.up_proj")}
    mlp: Any = world.model.module.mlp
    collector = FamilyCollector(mlp.up_proj.out_features)
    for own, tokens, first in zip(*(part.split(16) for part in (text, shuffled, begin)), strict=True):
        fires = (capture(partial(world.model, own), site)["x"] > 0).float()
        moved = fires[torch.arange(len(own))[:, None], (torch.arange(seq) + first) % seq]
        collector.add(tokens, None, torch.ones_like(tokens, dtype=torch.bool), Codes.from_dense(moved))
    return collector.result()


def _planted(size: str, seed: int) -> dict[str, dict[str, float]]:
    """The worst precision and recall of all families, and of detectors and positional neurons in shuffled text."""
    config, rows = WORLDS[size]
    world = planted_detectors(config, seed)
    text = world.text(rows, 1000 + seed)
    judged = _judged(families(world.model, text, hook_point="mlp", max_tokens=text.numel()), world)
    other = _judged(_shuffled(world, text, seed), world)
    return {
        FOUND: {key: min(one[key] for one in judged.values()) for key in ("precision", "recall")},
        SHUFFLED: {"recall": max(other[key]["recall"] for key in ("detectors", "positional"))},
    }


def _information(seed: int) -> float:
    """By how much the information that is counted misses the paper's formula, at most, of features of known rates."""
    g = torch.Generator().manual_seed(seed)
    worst = 0.0
    for counts in RATES.values():
        on = torch.zeros(64, len(counts), 1)
        for p, count in enumerate(counts):
            on[torch.randperm(64, generator=g)[:count], p] = 1.0
        tokens = torch.randint(9, on.shape[:2], generator=g)
        collector = FamilyCollector(1)
        collector.add(tokens, None, torch.ones_like(tokens, dtype=torch.bool), Codes.from_dense(on))
        rates = [count / 64 for count in counts]
        mean = sum(rates) / len(rates)
        pairs = [pair for r in rates for pair in ((r, mean), (1 - r, 1 - mean)) if pair[0] > 0]
        true = sum(p * math.log(p / q) for p, q in pairs) / len(rates)
        worst = max(worst, abs(float(collector.result().information[0]) - true))
    return worst


def _pooled(found: list[Families]) -> dict[str, float]:
    """Suppression of the detectors of several layers together, with the lower end of its interval."""
    parts = [f.suppression for f in found if f.suppression is not None and f.suppression.n > 1]
    n, hits = sum(s.n for s in parts), sum(s.suppressing for s in parts)
    means = {name: sum(s.n * getattr(s, field) for s in parts) / max(1, n) for name, field in ((RANDOM_DIRECTIONS, "random"), (ELSE, "others"))}  # fmt: skip
    return {"n": n, OWN: hits / max(1, n), "low": wilson(hits, n)[0], **means}


def _code_lm(seed: int, tell: Tell) -> Found:
    """Neurons of code-lm on held-out documents in an order of the seed's own."""
    model = load_model("code-lm")
    texts = [document.text for document in documents("stdlib", "held_out")]
    random.Random(seed).shuffle(texts)

    def of(layers: tuple[int, ...], threshold: float) -> list[Families]:
        tell(1, 3, f"neurons that fire above {threshold:g}")
        return [families(model, texts, None, f"blocks.{i}.mlp", TOKENS, threshold=threshold, seed=seed) for i in layers]  # fmt: skip

    every = {threshold: of((*EARLY, *LATE), threshold) for threshold in (0.0, CLEAR)}
    early = {t: found[: len(EARLY)] for t, found in every.items()} | {t: of(EARLY, t) for t in OTHERS}
    return {
        "counts": {f"above {t:g}": {key: [f.counts()[key] for f in found] for key in COUNTED} for t, found in every.items()},
        "suppression": {f"above {t:g}": _pooled(found) for t, found in sorted(early.items())},
        "tokens": every[CLEAR][0].n_tokens,
    }  # fmt: skip


def measure(seed: int, tell: Tell) -> Found:
    """Planted neurons, rates that are known, and code-lm's own neurons."""
    tell(0, 3, "planted neurons")
    planted = {size: _planted(size, seed) for size in WORLDS}
    return {"planted": planted, "information": _information(seed), "code-lm": _code_lm(seed, tell)}


def judge(found: Found) -> Reproduction:
    """What is planted is found; what detectors in early layers do to their triggers."""
    planted, lm = found["planted"], found["code-lm"]
    clear, counts = lm["suppression"][f"above {CLEAR:g}"], lm["counts"]

    def worst(kind: str, key: str, of: Callable[..., float] = min) -> list[float]:
        return [of(values) for values in zip(*(planted[size][kind][key] for size in WORLDS), strict=True)]

    def layers(threshold: float, key: str) -> list[float]:
        """Mean over seeds, by layer."""
        return [sum(v) / len(v) for v in zip(*counts[f"above {threshold:g}"][key], strict=True)]

    def said(threshold: float) -> str:
        return "; ".join(f"{key} " + ", ".join(f"{v:.0f}" for v in layers(threshold, key)) for key in COUNTED)

    return Reproduction(
        title="Neurons that are dead, that detect tokens and n-grams, and that tell positions",
        source="Voita, Ferrando and Nalmpantis 2023, arXiv 2309.04827",
        setting=f"ReLU MLPs with planted neurons, of {len(WORLDS)} sizes, one a seed; code-lm ({len(EARLY + LATE)} layers of 1024 GELU neurons) on {sum(lm['tokens']) / len(lm['tokens']):,.0f} tokens of held-out documents, others each seed; a neuron fires where its GELU is given more than {CLEAR:g}",
        claims=[
            Claim("planted neurons: least precision of any family", NONE, worst(FOUND, "precision"), ">=", 1.0),
            Claim("planted neurons: least recall of any family", NONE, worst(FOUND, "recall"), ">=", 1.0, worst(SHUFFLED, "recall", max), SHUFFLED),
            Claim("mutual information against the closed form, largest miss in nats", "a formula", found["information"], "<=", 1e-6),
            Claim("code-lm: share of detectors in the first half of the layers that put their trigger in the lower half of the logits", "most of them (figures)", clear[OWN], ">", 0.5, clear[RANDOM_DIRECTIONS], RANDOM_DIRECTIONS),
            Claim("the lower end of its 95 % interval, over detectors", "no interval", clear["low"], ">", 0.5),
        ],
        figure=bars("Neurons of code-lm by layer", "neurons", {key: {f"layer {i}": [one[i] for one in counts[f"above {CLEAR:g}"][key]] for i in EARLY + LATE} for key in COUNTED}),
        notes=[
            f"A GELU has no point where it begins to fire. Above 0, where what it gives is positive, its neurons are dense and hardly any is a detector. By layer: {said(0.0)}. Above {CLEAR:g}, chosen on the training side of the text: {said(CLEAR)}.",
            "A neuron whose trigrams cover its firing is one whose last tokens do; it counts as a detector of the shortest grams of whose occurrences it fires on half, and of tokens where there are none.",
            "The seeds read other documents to the same model: their detectors are mostly the same.",
        ],
        controls={
            f"suppressing, {name}": {kind: one[kind] for kind in (OWN, RANDOM_DIRECTIONS, ELSE)} for name, one in lm["suppression"].items()
        } | {"detectors in the first half": {name: one["n"] for name, one in lm["suppression"].items()}},
    )  # fmt: skip


ROW = Row(measure, judge)
