"""Networks that start apart learn the same units in part, and the same subspaces (1511.07543); so do dictionaries."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from saekit.analyses.convergent import (
    against_null,
    clusters,
    correlations,
    exact,
    greedy,
    lasso,
    mutual_information,
    one_to_one,
    relate,
    rows_of,
    semi_matching,
)
from saekit.dictionaries import Dictionary, create
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.copies import digit_net, hidden, permuted, turned
from saekit.testbed.digits import Digits, digits

ROWS, BLOCKS = 3000, 16
LAYERS, GROUPS, DRAWS = 3, 12, 5
PENALTIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
WIDTH, K, STEPS, BATCH = 96, 6, 600, 256
ANOTHER = 100  # the start of the other network or dictionary, from the seed
SEMI, PAIRS, UNSIGNED, INFORMED, FEW, SUBSPACES = "semi-matching, r", "one-to-one, r", "one-to-one by |r|, |r|", "one-to-one, bits", "three predictors, R2", "subspaces, r within above r elsewhere"  # fmt: skip
OURS, UNTRAINED, NULL = "networks", "untrained networks", "shuffled"


def _planted(seed: int, x: Tensor) -> Found:
    """What is found of a permuted copy of real units, and of blocks that are turned."""
    from sklearn.metrics import adjusted_rand_score

    g = torch.Generator().manual_seed(2000 + seed)
    copy, went = permuted(x, g)
    alike = correlations(x, copy)
    ways = (semi_matching(alike), one_to_one(alike), one_to_one(mutual_information(x, copy)))
    known, other = turned(ROWS, BLOCKS, g), torch.randperm(ROWS, generator=g)
    fitted, judged = (relate(known.a[rows], known.b[rows]) for rows in other.chunk(2))
    null = relate(known.a, known.b[other])
    blocks = torch.cat([known.blocks_a, known.blocks_b])
    pairs = one_to_one(fitted.correlations)
    return {
        "copy": min((way.partner == went).float().mean().item() for way in ways),
        "copy, shuffled": (one_to_one(correlations(x, copy[torch.randperm(len(copy), generator=g)])).partner == went).float().mean().item(),
        "pairs": pairs.scores(judged.correlations).mean().item(), "pairs, copy": ways[1].scores(alike).mean().item(),
        "ARI": {way: adjusted_rand_score(blocks, torch.cat(clusters(fitted, BLOCKS, way))) for way in ("spectral", "agglomerative")},
        "ARI, shuffled": {way: adjusted_rand_score(blocks, torch.cat(clusters(null, BLOCKS, way))) for way in ("spectral", "agglomerative")},
        "R2": {str(k): exact(fitted, k).explained(judged).mean().item() for k in (1, 2)},
        "R2, shuffled": exact(null, 2).explained(judged).mean().item(),
    }  # fmt: skip


def _measures(chosen: Tensor, judged: Tensor) -> dict[str, Callable[[Any, Any], float]]:
    """What pairs, predictions and clusters that were chosen on some rows are worth on others."""

    def both(a: Any, b: Any) -> Any:
        return (relate(rows_of(a, rows), rows_of(b, rows)) for rows in (chosen, judged))

    def scores(a: Any, b: Any) -> Any:
        return (correlations(rows_of(a, rows), rows_of(b, rows)) for rows in (chosen, judged))

    def semi(a: Any, b: Any) -> float:
        seen, new = scores(a, b)
        return semi_matching(seen).scores(new).mean().item()

    def pairs(a: Any, b: Any) -> float:
        seen, new = scores(a, b)
        return one_to_one(seen).scores(new).mean().item()

    def informed(a: Any, b: Any) -> float:
        seen, new = (mutual_information(rows_of(a, rows), rows_of(b, rows)) for rows in (chosen, judged))
        return one_to_one(seen).scores(new).mean().item()

    def unsigned(a: Any, b: Any) -> float:
        seen, new = scores(a, b)
        return one_to_one(seen.abs()).scores(new.abs()).mean().item()

    def few(a: Any, b: Any) -> float:
        seen, new = both(a, b)
        return greedy(seen, 3).explained(new).mean().item()

    def subspaces(a: Any, b: Any) -> float:
        seen, new = both(a, b)
        own, other = clusters(seen, GROUPS)
        inside = (own[:, None] == other) & (own[:, None] >= 0)
        if not inside.any():  # every cluster is of one network
            return 0.0
        size = new.correlations.abs()
        return (size[inside].mean() - size[~inside].mean()).item()

    return {SEMI: semi, PAIRS: pairs, UNSIGNED: unsigned, INFORMED: informed, FEW: few, SUBSPACES: subspaces}


def _layers(data: Digits, seed: int, **options: int) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Units that vary of both networks, by layer, over training and held-out images; and the share that they get right."""
    nets = [digit_net(data, one, layers=LAYERS, **options) for one in (seed, seed + ANOTHER)]
    both = torch.cat([data.train, data.test])
    layers = zip(*(hidden(net, both) for net in nets), strict=True)
    right = [(net(data.test).argmax(1) == data.test_labels).float().mean().item() for net in nets]
    return [(a[:, a.std(0) > 0], b[:, b.std(0) > 0]) for a, b in layers], sum(right) / 2


def _networks(data: Digits, layers: list[tuple[Tensor, Tensor]], seed: int) -> Found:
    """Each measure of each layer, beside that of networks that learnt nothing, and of images in other orders."""
    n = len(data.train)
    measures = _measures(torch.arange(n), torch.arange(n, n + len(data.test)))
    out: Found = {}
    untrained_layers, _ = _layers(data, seed, steps=0)
    for i, ((a, b), others) in enumerate(zip(layers, untrained_layers, strict=True)):
        found = {name: against_null(one, a, b, DRAWS, seed) for name, one in measures.items()}
        out[str(i + 1)] = {
            name: {
                OURS: one.value,
                UNTRAINED: measures[name](*others),
                NULL: sum(one.null) / DRAWS,
                "largest": max(one.null),
            }
            for name, one in found.items()
        }
    return out


def _sweep(data: Digits, a: Tensor, b: Tensor) -> dict[str, dict[str, float]]:
    """Predictors a unit, and R2 on other images, by the lasso's penalty."""
    n = len(data.train)
    seen, new = relate(a[:n], b[:n]), relate(a[n:], b[n:])
    some = lasso(seen, PENALTIES)
    return {
        str(p): {"predictors": one.predictors.double().mean().item(), "R2": one.explained(new).mean().item()}
        for p, one in zip(PENALTIES, some, strict=True)
    }


@torch.no_grad()
def _dictionaries(data: Digits, seed: int) -> Found:
    """One-to-one r between codes of two dictionaries with other starts: trained, frozen and random."""
    n = len(data.train)
    pairs = _measures(torch.arange(n), torch.arange(n, n + len(data.test)))[PAIRS]
    both = torch.cat([data.train, data.test])
    ds: dict[str, list[Dictionary]] = {"TopK": [], FROZEN: [], RANDOM: []}
    for one in (seed, seed + ANOTHER):
        shape: dict[str, Any] = {"d_in": 64, "n_features": WIDTH, "k": K, "seed": one}
        trained = {"TopK": create("topk", **shape), FROZEN: create("frozen", **shape)}
        with torch.enable_grad():
            fit_all(trained, data.train, STEPS, BATCH, lr=3e-3, seed=one)
        for name, d in (trained | {RANDOM: untrained(trained[FROZEN])}).items():
            ds[name].append(d)
    out: Found = {}
    for name, (a, b) in ds.items():
        found = against_null(pairs, a.encode(both), b.encode(both), DRAWS, seed)
        out[name] = {"r": found.value, NULL: sum(found.null) / DRAWS}
    return out


def measure(seed: int, tell: Tell) -> Found:
    """Planted copies, two networks that learnt the same digits, and dictionaries of the images."""
    data = digits(seed)
    tell(0, 4, "networks")
    layers, accuracy = _layers(data, seed)
    tell(1, 4, "planted copies")
    planted = _planted(seed, layers[0][0])
    tell(2, 4, "matchings")
    found = {"planted": planted, "layers": _networks(data, layers, seed), "sweep": _sweep(data, *layers[0])}
    tell(3, 4, "dictionaries")
    return found | {"dictionaries": _dictionaries(data, seed), "accuracy": accuracy}


def judge(found: Found) -> Reproduction:
    """Planted copies against the truth, and real networks and dictionaries against shuffled images."""
    planted, layers, codes = found["planted"], found["layers"], found["dictionaries"]

    def over_layers(name: str, which: str) -> list[float]:
        values = [layers[str(i + 1)][name][which] for i in range(LAYERS)]
        return [fmean(list(one)) for one in zip(*values, strict=True)]

    def above(name: str) -> list[float]:
        return [a - b for a, b in zip(over_layers(name, OURS), over_layers(name, "largest"), strict=True)]

    def claim(text: str, paper: str, name: str, bound: float) -> Claim:
        return Claim(text, paper, above(name), ">=", bound, over_layers(name, "largest"), "images shuffled, largest")  # fmt: skip

    numbers = list(range(1, LAYERS + 1))
    return Reproduction(
        title="Networks of different starts share units in part, and subspaces; a matching finds what was planted",
        source="Li, Yosinski, Clune, Lipson and Hopcroft 2016, arXiv 1511.07543",
        setting=f"two ReLU networks of {LAYERS} x 48 units that learnt scikit-learn's digits from other starts ({fmean(found['accuracy']):.1%} of held-out digits right), two a seed; pairs, predictors and clusters are chosen on training images and judged on held-out ones, as is their null of {DRAWS} shuffles; planted: {BLOCKS} blocks of two units, turned by 30 to 60 degrees, {ROWS} rows, half of them to judge by; TopK of {WIDTH} features, k = {K}",
        claims=[
            Claim("share of a permuted copy's units found, by the worst of three ways (argmax, one to one, information)", "an identity", planted["copy"], ">=", 1.0, planted["copy, shuffled"], "rows shuffled"),
            Claim("turned blocks: ARI of the clusters (spectral)", "subspaces are shared where units are not (figures)", planted["ARI"]["spectral"], ">=", 0.9, planted["ARI, shuffled"]["spectral"], "rows shuffled"),
            Claim("the same (agglomerative)", "the same", planted["ARI"]["agglomerative"], ">=", 0.9, planted["ARI, shuffled"]["agglomerative"], "rows shuffled"),
            Claim("R2 of two predictors a unit", "few predictors lose little in lower layers (table)", planted["R2"]["2"], ">=", 0.95, planted["R2"]["1"], "one predictor"),
            Claim("mean r of one-to-one pairs of turned blocks", "units alone do not match", planted["pairs"], "<=", 0.9, planted["pairs, copy"], "a permuted copy"),
            claim("networks: r of one-to-one pairs, above the largest of shuffled ones", "most units of the first layer above .5, some with no match (figure)", PAIRS, 0.3),
            claim("R2 of three predictors, above the same", "few-to-one in lower layers", FEW, 0.3),
            claim("|r| across networks within joint clusters less elsewhere, above the same", "shared subspaces (figures)", SUBSPACES, 0.1),
            Claim("dictionaries of other starts: r of one-to-one features, above shuffled ones", "not in the paper", [a - b for a, b in zip(codes["TopK"]["r"], codes["TopK"][NULL], strict=True)], ">=", 0.3, codes[RANDOM]["r"], RANDOM),
        ],
        figure=figure("Two networks' units, on images that nothing was chosen by", "hidden layer", "mean over units", {
            name + ("" if which == OURS else f", {which}"): (numbers, [fmean(layers[str(i)][name][which]) for i in numbers])
            for name in (PAIRS, FEW, SUBSPACES) for which in (OURS, UNTRAINED, NULL)
        }, xaxis={"dtick": 1}),
        notes=[
            "The lasso's sweep, first layer: " + ", ".join(f"penalty {p}: {fmean(one['predictors']):.1f} predictors a unit, R2 {fmean(one['R2']):.2f}" for p, one in found["sweep"].items()) + ".",
"Units of networks that learnt nothing are alike too, since they see the same images: what learning adds is the difference from those. "
            "Where the sign counts, one unit's partner is not its opposite, whatever that tells of it: pairs by |r| and by information may be of either sign.",
        ],
        controls={
            **{name: {which: over_layers(name, which) for which in (OURS, UNTRAINED, NULL)} for name in (SEMI, PAIRS, UNSIGNED, INFORMED, FEW, SUBSPACES)},
            "one-to-one features, r": {name: one["r"] for name, one in codes.items()},
            "those, shuffled": {name: one[NULL] for name, one in codes.items()},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
