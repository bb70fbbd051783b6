"""Few neurons tell of a feature: one where it has its own, several where it is in superposition (2305.01610)."""

import torch
from torch import Tensor

from saekit.analyses.subsets import best_subset
from saekit.hooks import capture, intervene
from saekit.metrics import cross_entropy
from saekit.models import Model
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.row import Found, Row
from saekit.probes import RANKERS, f1, linear, mean_difference, sparse
from saekit.testbed import neurons
from saekit.testbed.neurons import CODES, PAIRS, POINT, Texts
from saekit.testbed.shifts import shifted

SHIFTS = (0.1, 0.2, 0.4, 0.7, 1.0, 2.0)
DRAWS, WIDTHS, KS = 6, (400, 800), (2, 3, 4)
ROWS, SHARES = (500, 4000), (0.01, 0.5)  # log-uniform
LARGE = 1.0  # shifts from which nearly all is to be found
PLAIN, ECHOES = "as in the paper", "with echoes"
HEURISTICS = tuple(RANKERS)
EXACT, UNSHRUNK, SHUFFLED = "exact", "exact, nothing shrunk", "exact, labels shuffled"
SHRINK = "shrink"
FITTED, TEST = 200, 400  # texts
ENOUGH, MOST = 0.95, 4  # an F1, and neurons


def _between(low: float, high: float, g: torch.Generator) -> float:
    return low * (high / low) ** torch.rand((), generator=g).item()


def _recovered(shift: float, echoes: bool, g: torch.Generator) -> dict[str, float]:
    """Share of the neurons that shift which each way finds, in one draw; and by how much the exact one shrinks correlations."""
    n, share = round(_between(*ROWS, g)), _between(*SHARES, g)
    d, k = (choices[int(torch.randint(len(choices), (), generator=g))] for choices in (WIDTHS, KS))
    x, labels, support = shifted(n, d, k, shift, share, g, echoes=k if echoes else 0)
    found = {name: RANKERS[name](x, labels).topk(k).indices for name in HEURISTICS}
    exact = best_subset(x, labels, k)
    found[EXACT], found[UNSHRUNK] = exact.features, best_subset(x, labels, k, shrink=0.0).features
    found[SHUFFLED] = best_subset(x, labels[torch.randperm(n, generator=g)], k).features
    shares = {name: torch.isin(own, support).double().mean().item() for name, own in found.items()}
    return shares | {SHRINK: exact.shrink}


def _synthetic(seed: int, tell: Tell, done: int, total: int) -> Found:
    # of seeds that nothing was chosen by
    g, out = torch.Generator().manual_seed(10_000 + seed), {}
    for world in (PLAIN, ECHOES):
        rows = []
        for shift in SHIFTS:
            tell(done, total, f"{world}, shift {shift:g}")
            draws = [_recovered(shift, world == ECHOES, g) for _ in range(DRAWS)]
            rows.append({name: sum(one[name] for one in draws) / DRAWS for name in draws[0]})
            done += 1
        out[world] = {f"{shift:g}": row for shift, row in zip(SHIFTS, rows, strict=True)}
    return out


def _read(model: Model, drawn: Texts) -> Tensor:
    """The neurons behind each token but the one that names the tongue."""
    read = capture(lambda: model.module(drawn.tokens), {POINT: model.site(POINT)})[POINT]
    return read[:, 1:].flatten(0, 1).detach()


def _probed(x: Tensor, labels: Tensor, other: Tensor, truth: Tensor, k: int) -> dict[str, tuple[Tensor, float]]:  # fmt: skip
    """The k neurons that each way chooses, and the F1 of a probe of them on other texts."""
    out = {}
    for name in (EXACT, "mean_difference"):
        chosen = best_subset(x, labels, k).features if name == EXACT else mean_difference(x, labels).topk(k).indices  # fmt: skip
        probe = linear(x[:, chosen], labels)
        out[name] = chosen, f1(probe(other[:, chosen]) > 0, truth)
    return out


def _silenced(model: Model, drawn: Texts, neuron: int) -> tuple[float, float]:
    """By how much the loss of the next token rises where a neuron is silent: in the first tongue, and in others."""

    def loss() -> Tensor:
        with torch.no_grad():
            return cross_entropy(model.module(drawn.tokens)[:, :-1], drawn.tokens[:, 1:])

    by = torch.ones(neurons.CONFIG.d_mlp).index_fill(0, torch.tensor([neuron]), 0.0)
    before = loss()
    with intervene([(model.site(POINT), by.__mul__)]):
        rise = loss() - before
    own = drawn.tongue == 0
    return rise[own, 1:].mean().item(), rise[~own, 1:].mean().item()


def _language(seed: int) -> Found:
    model, g = neurons.model(seed), torch.Generator().manual_seed(1000 + seed)
    fitted, test = neurons.texts(FITTED, g), neurons.texts(TEST, g)
    x, other = _read(model, fitted), _read(model, test)
    labels, truth = (one.first_tongue[:, 1:].flatten() for one in (fitted, test))
    tongue = _probed(x, labels, other, truth, 1)
    shuffled = sparse(x, labels[torch.randperm(len(labels), generator=g)], 1)
    out: Found = {
        "tongue": {name: best for name, (_, best) in tongue.items()},
        "found": {name: float(chosen.tolist() == [0]) for name, (chosen, _) in tongue.items()},
        SHUFFLED: f1(shuffled(other) > 0, truth),
    }
    best, codes = torch.zeros(PAIRS, MOST, 2), torch.zeros(PAIRS, 2)
    for pair in range(PAIRS):
        labels, truth = (one.pair[:, 1:].flatten() == pair for one in (fitted, test))
        for k in range(1, MOST + 1):
            ways = _probed(x, labels, other, truth, k)
            best[pair, k - 1] = torch.tensor([found for _, found in ways.values()])
            if k == CODES.shape[1]:
                codes[pair] = torch.tensor([float(set(c.tolist()) == set(CODES[pair].tolist())) for c, _ in ways.values()])  # fmt: skip
    needed = [next((k + 1 for k in range(MOST) if one[k] >= ENOUGH), MOST + 1) for one in best.amax(2).tolist()]  # fmt: skip
    out |= {"needed": float(min(needed)), "needed at most": float(max(needed)), "F1": {}}
    for i, name in enumerate((EXACT, "mean_difference")):
        out["F1"][name] = {str(k + 1): best[:, k, i].mean().item() for k in range(MOST)}
        out["found"][f"pairs, {name}"] = codes[:, i].mean().item()
    for name, neuron in (("tongue's neuron", 0), ("another neuron", neurons.NEURONS + 1 + seed)):
        out[name] = dict(zip(("in", "out"), _silenced(model, test, neuron), strict=True))
    return out


def measure(seed: int, tell: Tell) -> Found:
    """Neurons that shift, found in many draws; then a language model whose neurons are known, probed."""
    total = 2 * len(SHIFTS) + 1
    tell(0, total, "a language model")
    out = _language(seed)
    return out | {"synthetic": _synthetic(seed, tell, 1, total)}


def _mean(world: Found, name: str, least: float = 0.0) -> list[float]:
    """A way's recovery over the shifts, of each seed."""
    rows = [row[name] for shift, row in world.items() if float(shift) >= least]
    return [sum(one) / len(one) for one in zip(*rows, strict=True)]


def _overall(world: Found, name: str) -> float:
    values = _mean(world, name)
    return sum(values) / len(values)


def _worst(world: Found) -> tuple[str, str, list[float]]:
    """The shift and the ranker against which the exact subset does worst, by the mean over seeds; and what it finds more."""
    over = {
        (shift, name): [a - b for a, b in zip(row[EXACT], row[name], strict=True)]
        for shift, row in world.items()
        for name in HEURISTICS
    }
    (shift, name), least = min(over.items(), key=lambda one: sum(one[1]))
    return shift, name, least


def judge(found: Found) -> Reproduction:
    """The exact subset against rankers, and what one and three neurons tell."""
    worlds, f1s = found["synthetic"], found["F1"]
    claims = []
    for world in (PLAIN, ECHOES):
        own = worlds[world]
        best = max(HEURISTICS, key=lambda name: sum(_mean(own, name)))
        over = [a - b for a, b in zip(_mean(own, EXACT), _mean(own, best), strict=True)]
        shift, ranker, least = _worst(own)
        claims += [
            Claim(f"{world}: recovery of the exact subset less that of the best ranker ({best}), mean over shifts", "optimal probing no worse than heuristics (figure)", over, ">=", 0.0, _mean(own, best), "that ranker's recovery"),
            Claim(f"{world}: the same at the shift and against the ranker where it is least ({shift}, {ranker})", "no number", least, ">=", 0.0, own[shift][ranker], "that ranker's recovery there"),
            Claim(f"{world}: recovery of the exact subset where the shift is at least {LARGE:g}", "no number", _mean(own, EXACT, LARGE), ">=", 0.95, _mean(own, SHUFFLED, LARGE), "labels shuffled"),
        ]  # fmt: skip
    means = {name: [sum(row[name]) / len(row[name]) for row in worlds[ECHOES].values()] for name in (*HEURISTICS, EXACT)}  # fmt: skip
    return Reproduction(
        title="Few neurons tell of a feature: one where it has its own, several where it is in superposition",
        source="Gurnee et al. 2023 (2305.01610)",
        setting=f"{DRAWS} draws a shift of the paper's synthetic neurons (n {ROWS[0]} to {ROWS[1]}, {WIDTHS[0]} or {WIDTHS[1]} neurons, k 2 to 4, {SHARES[0]:.0%} to {SHARES[1]:.0%} true), and as many with an echo of the strongest for each; a transformer of two layers trained on pairs of words in four tongues, one neuron held to the first tongue and six to {PAIRS} pairs; probes fitted on {FITTED} texts, F1 on {TEST} others",
        claims=[
            *claims,
            Claim("F1 of one neuron on the tongue, whose neuron was planted", "context neurons, as French (figures)", found["tongue"][EXACT], ">=", ENOUGH, found[SHUFFLED], "labels shuffled"),
            Claim(f"neurons that F1 of {ENOUGH} on a pair in superposition takes, fewest of the {PAIRS} pairs", "several neurons for an n-gram (figures)", found["needed"], ">=", 3.0, found["needed at most"], "most of the pairs"),
            Claim("F1 of three neurons on a pair, chosen by mean difference", "no number", f1s["mean_difference"]["3"], ">=", ENOUGH, f1s[EXACT]["3"], "chosen exactly, by squared loss"),
        ],
        figure=figure("Neurons that shift, with echoes of the strongest", "shift", "share found", {name: (SHIFTS, values) for name, values in means.items()}, xaxis={"type": "log"}),
        notes=[
            "The exact subset is that of a squared loss (Fisher's discriminant), among the 50 candidates of the largest mean difference; the paper's is of a hinge loss. "
            f"Of the pairs' own triples it chooses {sum(found['found'][f'pairs, {EXACT}']) / len(found['needed']):.0%}, and mean difference {sum(found['found']['pairs, mean_difference']) / len(found['needed']):.0%}: a squared loss also counts how far rows lie beyond the boundary. That no subset of the candidates has a larger gain is tested by brute force.",
            f"Correlations are shrunk by what chance gives them, which is {_overall(worlds[PLAIN], SHRINK):.2f} where neurons are independent ({PLAIN}) and {_overall(worlds[ECHOES], SHRINK):.2f} {ECHOES}: the nearer that is to 1, the nearer the exact subset is to that of the largest mean differences, which it hardly can lose to {PLAIN}. Where nothing is shrunk, chance correlations count as if they were real, and it finds {_overall(worlds[PLAIN], UNSHRUNK):.2f} of the neurons {PLAIN} and {_overall(worlds[ECHOES], UNSHRUNK):.2f} {ECHOES} (shrunk: {_overall(worlds[PLAIN], EXACT):.2f} and {_overall(worlds[ECHOES], EXACT):.2f}).",
            "The F statistic puts neurons in the order of the mean difference and is no further ranker.",
        ],
        controls={
            **{f"recovery, {world}": {name: _mean(worlds[world], name) for name in (EXACT, UNSHRUNK, *HEURISTICS, SHUFFLED)} for world in (PLAIN, ECHOES)},
            **{f"F1 on pairs, {name}": {f"{k} neurons": values for k, values in f1s[name].items()} for name in (EXACT, "mean_difference")},
            "share whose own neurons are chosen": found["found"],
            "loss, more where it is silent": {f"{name}, {where}": found[name][key] for name in ("tongue's neuron", "another neuron") for key, where in (("in", "in its tongue"), ("out", "in others"))},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
