"""Attribution graphs against ablation: what total effects predict, frozen and free (Ameisen et al. 2025)."""

import numpy as np
import torch
from scipy.stats import spearmanr

from saekit.circuits.places import Heads, Neurons
from saekit.circuits.rows import Trace
from saekit.circuits.targets import Target, resolve
from saekit.circuits.trace import trace, traced
from saekit.circuits.verify import effects
from saekit.graph import Graph
from saekit.models import Model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.row import Found, Row
from saekit.testbed import tasks

PROMPTS, NEURONS, TOP = 6, 200, 10
SLOPE, WHOLE, TOTAL, DIRECT, ABSOLUTE, SIZE = (
    "through scores, by slope",
    "through scores, as a whole",
    "total effects",
    "direct edges",
    "absolute influence",
    "activation x norm",
)
UNSIGNED = (ABSOLUTE, SIZE)
NAMES = (SLOPE, WHOLE, TOTAL, DIRECT, ABSOLUTE, SIZE)


def _groups(run: Trace, graph: Graph, seed: int) -> list[list[int]]:
    """Every head at every position with its dimensions together, and the strongest and as many random active neurons."""
    table, groups = run.columns.table(), dict[tuple[int, int, int], list[int]]()
    heads = [i for i, one in enumerate(run.placed) if one.name.endswith("self_attn")]
    neurons: list[int] = []
    for own in run.parts:
        for node in range(own.nodes.start, own.nodes.stop):
            if own.stand in heads:
                head = int(table.place[node]) // 16
                groups.setdefault((own.stand, head, int(table.position[node])), []).append(node)
            else:
                neurons.append(node)
    totals = np.abs(graph.total_effects()[0])
    order = sorted(neurons, key=lambda node: -totals[node])
    rest = np.random.default_rng(seed).permutation(order[NEURONS // 2 :])[: NEURONS // 2].tolist()
    return [*groups.values(), *([node] for node in order[: NEURONS // 2] + rest)]


def _prompt(model: Model, tokens: torch.Tensor, answer: int, seed: int) -> dict[str, float]:
    """Rank correlations of each prediction with ablation on one prompt."""
    stands = [
        kind(f"blocks.{i}.{name}")
        for i in range(2)
        for kind, name in ((Neurons, "mlp"), (Heads, "self_attn"))
    ]
    graph = trace(model, stands, tokens, [answer], budget=10**6, edges=10**6, scores="slope")
    run = traced(model, stands, tokens)
    target = resolve(run.frozen, model, [answer])[0]
    assert isinstance(target, Target)
    groups = _groups(run, graph, seed)
    frozen, free = (-effects(run, [target], groups, free=kind)[0] for kind in (False, True))
    sizes = np.zeros(len(graph.nodes))
    for own in run.parts:
        sizes[own.nodes] = own.part.written[0].norm(dim=1).numpy()
    by_node = {
        SLOPE: graph.aware[0], WHOLE: run.targets([target], True, "whole")[0].numpy(), TOTAL: graph.total_effects()[0], DIRECT: graph.rows[[-1]].toarray()[0],
        ABSOLUTE: graph.influence(), SIZE: sizes,
    }  # fmt: skip
    predicted = {
        name: np.array([values[group].sum() for group in groups]) for name, values in by_node.items()
    }
    out = {"frozen": float(spearmanr(predicted[TOTAL], frozen).statistic)}
    for name, values in predicted.items():
        out[f"size, {name}"] = float(spearmanr(np.abs(values), np.abs(free)).statistic)
        if name not in UNSIGNED:
            out[name] = float(spearmanr(values, free).statistic)
    strongest = [set(np.argsort(-np.abs(v), kind="stable")[:TOP]) for v in (predicted[SLOPE], free)]
    return {**out, "top": float(len(strongest[0] & strongest[1])), "nodes": float(len(groups))}


def measure(seed: int, tell: Tell) -> Found:
    """A trained induction model; every head and hundreds of neurons are taken away one by one."""
    trained = tasks.trained("induction", seed)
    prompts = trained.task.prompts(PROMPTS, torch.Generator().manual_seed(100 + seed))
    found = []
    for i in range(PROMPTS):
        tell(i, PROMPTS, "ablating")
        found.append(_prompt(trained.model, prompts.tokens[i], int(prompts.answers[i, -1]), seed))
    return {
        "accuracy": trained.accuracy,
        **{key: sum(one[key] for one in found) / PROMPTS for key in found[0]},
    }


def judge(found: Found) -> Reproduction:
    """Frozen ablation is predicted exactly; free ablation best where totals go through attention scores and norms."""

    def best(*names: str) -> list[float]:
        return [max(values) for values in zip(*(found[name] for name in names), strict=True)]

    def over(name: str, others: list[float]) -> list[float]:
        return [a - b for a, b in zip(found[name], others, strict=True)]

    signed, sizes = best(TOTAL, DIRECT), best(*(f"size, {name}" for name in (TOTAL, DIRECT, ABSOLUTE, SIZE)))
    return Reproduction(
        title="Total effects are frozen ablation; through attention scores and norms they foretell free ablation",
        source="Ameisen et al. 2025 (attribution graphs); totals through scores are saekit's",
        setting=f"2-layer induction model ({sum(found['accuracy']) / len(found['accuracy']):.3f} right), {PROMPTS} prompts, {found['nodes'][0]:.0f} nodes each: every head at every position, the {NEURONS // 2} strongest neurons and {NEURONS // 2} random ones",
        claims=[
            Claim("rank correlation of total effects with frozen ablation", "exact by construction", found["frozen"], ">=", 0.99),
            Claim("rank correlation of totals through scores, by slope, with free ablation", "no number at this scale", found[SLOPE], ">=", 0.8, signed, "the best of frozen totals and direct edges"),
            Claim("by how much that is above the best of frozen totals and direct edges", "no number", over(SLOPE, signed), ">=", 0.0),
            Claim("by how much its sizes rank above those of frozen totals, direct edges, absolute influence and activation x norm", "no number", over(f"size, {SLOPE}", sizes), ">=", 0.0),
            Claim(f"of the {TOP} strongest nodes by free ablation, found", "no number", found["top"], ">=", 7.0),
        ],
        figure=bars("Rank correlation of sizes with free ablation", "Spearman", {name: {"mean": found[f"size, {name}"]} for name in NAMES}),
        controls={
            "rank correlation with free ablation": {name: found[name] for name in NAMES if name not in UNSIGNED},
            "rank correlation of sizes with free ablation": {name: found[f"size, {name}"] for name in NAMES},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
