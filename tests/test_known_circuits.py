"""Attribution finds the circuits that are known because they are built, and says by how much each part adds."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import saekit
from saekit.circuits import qk
from saekit.circuits.intervene import FrozenPass
from saekit.circuits.patching import effects
from saekit.circuits.places import Heads, Neurons, Stand
from saekit.circuits.spliced import Spliced
from saekit.circuits.targets import Target
from saekit.circuits.weights import weights
from saekit.graph import KINDS, Graph, Nodes
from saekit.hooks import intervene
from saekit.testbed import known_circuits, known_neurons
from saekit.testbed.handbuilt import SHARP, Known, Node, Prompt, directions
from saekit.testbed.known_circuits import INHIBITION, SHARE
from saekit.testbed.known_neurons import YEARS
from saekit.types import SaekitError

TOYS: dict[str, Callable[..., Known]] = {
    "induction": known_circuits.induction, "indirect object": known_circuits.indirect_object,
    "lookup": known_circuits.lookup, "backup": known_circuits.backup, "boolean": known_neurons.boolean,
    "greater than": known_neurons.greater_than, "amplification": known_neurons.amplification,
}  # fmt: skip
Links = dict[tuple[Node, Node, str], float]


def drawn(known: Known, n: int, seed: int = 0) -> list[Prompt]:
    return known.prompts(n, torch.Generator().manual_seed(seed))


def units(known: Known) -> list[Stand]:
    """All heads and neurons of a model."""
    shape = known.model.module.shape
    heads: list[Stand] = [Heads(f"layers.{i}.self_attn") for i in range(shape.n_layers)]
    return heads + [Neurons(f"layers.{i}.mlp") for i in range(shape.n_layers) if shape.d_mlp]


def logit(known: Known, token: int) -> Target:
    w = weights(known.model)
    return Target(str(token), w.W_U[token], float(w.b_U[token]))


def names(known: Known, nodes: Nodes, stands: Sequence[str], targets: Sequence[int] = ()) -> list[Node]:
    """Nodes by the names of the testbed; heads are the sums of their dimensions."""
    out: list[Node] = []
    for kind, layer, at, stand, place in zip(nodes.kind, nodes.layer, nodes.position, nodes.stand, nodes.place, strict=True):  # fmt: skip
        layer, at, place, own = int(layer), int(at), int(place), stands[stand] if stand >= 0 else ""
        match KINDS[kind]:
            case "feature" if own.endswith("self_attn"):
                out.append(("head", layer, place // known.model.module.shape.d_head, at))
            case "feature":
                out.append(("neuron" if own.endswith("mlp") else "feature", layer, place, at))
            case "bias" if own.endswith("mlp") and at < 0:
                out.append(("bias", layer))
            case "target":
                out.append(("target", targets[place]))
            case "token" | "position":
                out.append((KINDS[kind], at))
            case _:
                out.append((f"other {KINDS[kind]}", place, layer, at))
    return out


class Traced:
    """A graph whose nodes have the names of the testbed."""

    def __init__(
        self, known: Known, prompt: Prompt, stands: Sequence[Stand] = (), targets: Sequence[int] = ()
    ):
        self.targets = list(targets or prompt.answers[:1])
        stands = stands or units(known)
        goals = [logit(known, t) for t in self.targets]
        self.graph: Graph = saekit.trace(known.model, stands, prompt.tokens, goals, scores="whole")
        missed = self.graph.rows.sum(1) - self.graph.nodes.value[self.graph.of]
        assert np.abs(missed).max() <= 1e-4  # rounding is no small share of what is off but for rounding
        self.names = names(known, self.graph.nodes, self.graph.stands, self.targets)
        rows = self.graph.rows.tocoo()
        self.source, self.target, self.weight = rows.col, self.graph.of[rows.row], rows.data

    def sums(self, values: np.ndarray) -> dict[tuple[Node, Node], float]:
        """Of one value for each edge."""
        out: dict[tuple[Node, Node], float] = defaultdict(float)
        for s, t, value in zip(self.source, self.target, values, strict=True):
            out[self.names[s], self.names[t]] += float(value)
        return out

    def edges(self) -> dict[tuple[Node, Node], float]:
        """Direct contributions."""
        return self.sums(self.weight)

    def through(self, aware: bool = False) -> dict[tuple[Node, Node], float]:
        """How much of the first target goes through each edge."""
        total = self.graph.aware[0] if aware else self.graph.total_effects()[0]
        total = total.copy()
        values = self.graph.nodes.value.copy()
        goal = self.graph.of[-len(self.targets)]
        total[goal] = values[goal]
        return self.sums(self.weight * (total / values)[self.target])

    def totals(self) -> dict[tuple[Node, Node], float]:
        """Total effects, of each node on each target."""
        out: dict[tuple[Node, Node], float] = defaultdict(float)
        for token, row in zip(self.targets, self.graph.total_effects(), strict=True):
            for name, value in zip(self.names, row, strict=True):
                out[name, "target", token] += value
        return {(key[0], key[1:]): value for key, value in out.items()}


def auroc(scores: dict[tuple[Node, Node], float], true: set[tuple[Node, Node]]) -> float:
    assert true <= set(scores)
    return float(roc_auc_score([edge in true for edge in scores], [abs(v) for v in scores.values()]))


@pytest.mark.parametrize("toy", TOYS)
def test_each_does_its_task(toy: str) -> None:
    """Also rotated, which changes no logit, and among distractors."""
    known = TOYS[toy]()
    prompts = drawn(known, 500)
    assert known.solved(prompts).all()
    prompts = prompts[:200]
    turned = TOYS[toy](rotate=True)
    torch.testing.assert_close(turned.logits(prompts), known.logits(prompts), rtol=0, atol=1e-4)
    others, both = TOYS[toy](distractors=2), TOYS[toy](distractors=2, rotate=True)
    assert others.solved(prompts).all()
    torch.testing.assert_close(both.logits(prompts), others.logits(prompts), rtol=0, atol=1e-4)
    assert (others.logits(prompts) - known.logits(prompts)).abs().max() > 1e-3
    wrong = [Prompt(p.tokens, (int(known.outputs[0]),), ()) for p in prompts]
    assert known.solved(wrong).float().mean() < 0.3


@pytest.mark.parametrize("toy", ["induction", "indirect object", "lookup"])
def test_heads_find_their_way_through_root_mean_squares_and_superposition(toy: str) -> None:
    known = TOYS[toy](norm="rms")
    assert known.solved(drawn(known, 100)).all()
    n = len(known.frame)
    packed = TOYS[toy](width=int(0.8 * n))
    assert packed.frame.shape == (n, int(0.8 * n))
    assert packed.solved(drawn(packed, 200)).float().mean() >= 0.99


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(
        SaekitError, match="width = 96 must be at least 1 and at most the number of features, 95"
    ):
        known_circuits.induction(width=96)
    with pytest.raises(SaekitError, match="norm = 'layer'"):
        known_circuits.induction(norm="layer")


@pytest.mark.parametrize("options", [{}, {"rotate": True}])
@pytest.mark.parametrize("toy", TOYS)
def test_edges_and_totals_are_those_that_were_built(toy: str, options: dict[str, Any]) -> None:
    """Edges to 1e-5 and no others, signed totals to 1e-4."""
    known = TOYS[toy](**options)
    for prompt in drawn(known, 2, seed=1):
        targets = sorted({int(e.target[1]) for e in prompt.edges if e.target[0] == "target"})
        traced = Traced(known, prompt, targets=targets)
        found, true = traced.edges(), {(e.source, e.target): e.weight for e in prompt.edges}
        ends = {target for _, target in true}
        for (source, target), weight in found.items():
            if target in ends:
                assert weight == pytest.approx(true.get((source, target), 0.0), abs=1e-5), (source, target)
        assert set(true) <= set(found)
        totals = traced.totals()
        for pair, value in prompt.totals.items():
            if pair[1][1] in targets:
                assert totals[pair] == pytest.approx(value, abs=1e-4), pair


@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"distractors": 2}])
def test_induction_is_found(options: dict[str, Any]) -> None:
    """Values by total effects; with where heads look, the head behind the key too."""
    known = known_circuits.induction(**options)
    for prompt in drawn(known, 2, seed=2):
        traced = Traced(known, prompt)
        first, second, third = ((e.source, e.target) for e in prompt.edges)
        assert auroc(traced.through(), {second, third}) == pytest.approx(1, abs=1e-12)
        assert auroc(traced.through(aware=True), {first, second, third}) == pytest.approx(1, abs=1e-12)
        if not options.get("distractors"):
            assert traced.totals()[prompt.edges[0].target, prompt.edges[2].target] == pytest.approx(
                0, abs=1e-5
            )
        pair = prompt.pairs[1]
        found = qk.qk(known.model, units(known), prompt.tokens, 1, 0)
        assert found.places == (len(prompt.tokens) - 1, pair.at)
        own = names(known, found.nodes, traced.graph.stands)
        i, j, weight = found.pairs(1)[0]
        assert (own[i], own[j]) == (pair.query, pair.key)
        assert weight >= (0.9 if options.get("distractors") else 0.99) * found.score
        assert found.score == pytest.approx(SHARP, rel=0.3 if options.get("distractors") else 1e-4)


def links(known: Known, prompt: Prompt, least: float) -> Links:
    """Walk from the logit to what moves values and what says where heads look; each link's share of its end's strongest."""
    stands = units(known)
    traced = Traced(known, prompt)
    inputs: dict[Node, dict[Node, float]] = defaultdict(dict)
    for (source, target), weight in traced.edges().items():
        inputs[target][source] = abs(weight)
    heads = qk.Heads(qk.traced(known.model, stands, prompt.tokens))
    own = names(known, heads.nodes, traced.graph.stands)
    worth: dict[Node, float] = {("target", prompt.answers[0]): 1.0}
    out: Links = {}
    top = known.model.module.shape.n_layers
    for layer in range(top, -1, -1):
        here = [n for n in worth if n[0] in ("head", "target") and (n[1] if n[0] == "head" else top) == layer]
        for node in (n for n in here if worth[n] >= least):
            roles = {"V": inputs[node]}
            if node[0] == "head":
                roles |= looks(heads, own, node)
            for role, sources in roles.items():
                most = max(sources.values(), default=0.0)
                for source, weight in sources.items():
                    score = worth[node] * weight / most
                    out[source, node, role] = score
                    worth[source] = max(worth.get(source, 0.0), score)
    return out


def looks(heads: qk.Heads, own: list[Node], node: Node) -> dict[str, dict[Node, float]]:
    """What is in a head's query, and what in its keys, by the strongest pair that it is part of."""
    _, layer, head, query = (node[0], *map(int, node[1:]))
    out: dict[str, dict[Node, float]] = {"Q": defaultdict(float), "K": defaultdict(float)}
    number = {name: i for i, name in enumerate(dict.fromkeys(own))}
    same = np.zeros((len(number), len(own)), np.float32)
    same[[number[name] for name in own], np.arange(len(own))] = 1
    for key in range(query + 1):
        found = heads.qk(layer, head, query, key)
        pairs = np.abs((same @ found.query_parts.T) @ (same @ found.key_parts.T).T)
        for side, axis in (("Q", 1), ("K", 0)):
            for name, weight in zip(number, pairs.max(axis), strict=True):
                out[side][name] = max(out[side][name], float(weight))
    return out


def test_indirect_objects_are_found_with_the_role_of_each_link() -> None:
    known = known_circuits.indirect_object()
    orders = set()
    for prompt in drawn(known, 3, seed=3):
        found = {link for link, score in links(known, prompt, 0.1).items() if score >= 0.1}
        assert found == prompt.roles
        first, second = (int(prompt.edges[i].source[1]) for i in (0, 2))
        orders.add(first < second)
    assert orders == {True, False}  # BABA and ABBA


def average_precision(found: Links, true: set[tuple[Node, Node, str]]) -> float:
    """True links that were not found count as 0."""
    ranked = [link in true for link in sorted(found, key=lambda link: -found[link])]
    precisions = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precisions[ranked].sum() / len(true))


def test_indirect_objects_are_found_among_distractors() -> None:
    known = known_circuits.indirect_object(distractors=2)
    for prompt in drawn(known, 2, seed=4):
        assert average_precision(links(known, prompt, 0.05), prompt.roles) >= 0.95


@pytest.mark.parametrize("operation", ["xor", "or"])
def test_cancellation_misleads_influence_and_not_total_effects(operation: str) -> None:
    """Of two ones; what each bit and the bias do is what the logit loses without them."""
    known = known_neurons.boolean()
    prompt = next(p for p in drawn(known, 50) if p.tokens[1] == p.tokens[2] == 2)
    yes = int(known.outputs[2 * list(known_neurons.OPERATIONS).index(operation)])
    traced = Traced(known, prompt, targets=[yes])
    module = known.model.module
    before = known.logits([prompt])[0, yes]
    true: dict[Node, float] = {}
    for at in (1, 2):
        tokens = prompt.tokens.clone()
        tokens[at] = 1
        true["token", at] = float(before - known.logits([Prompt(tokens, (), ())])[0, yes])
    bias = module.layers[0].mlp.up_proj.bias
    with torch.no_grad():
        kept = bias.clone()
        bias.zero_()
        true["bias", 0] = float(before - known.logits([prompt])[0, yes])
        bias.copy_(kept)
    totals = traced.totals()
    influence: dict[Node, float] = defaultdict(float)
    for name, share in zip(traced.names, traced.graph.influence(), strict=True):
        influence[name] += share
    for node, effect in true.items():
        assert totals[node, ("target", yes)] == pytest.approx(effect, abs=1e-5)
    assert abs(true["bias", 0]) > max(abs(true["token", at]) for at in (1, 2))
    assert influence["bias", 0] < min(influence["token", at] for at in (1, 2))


@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"distractors": 2, "rotate": True}])
def test_ramps_read_the_year(options: dict[str, Any]) -> None:
    """From the weights alone: what each year adds to each neuron through the head, and where it sets in."""
    known = known_neurons.greater_than(**options)
    w = weights(known.model)
    attention, mlp = w.blocks[0].attention, w.blocks[0].mlp
    assert mlp is not None
    moved = w.W_E[known.outputs] @ attention.W_V[0].T @ attention.W_O[0].T
    read = (moved @ mlp.W_in[:YEARS].T).T  # [neuron, year]
    order = torch.arange(YEARS)
    assert all(spearmanr(row, order).statistic >= 0.99 for row in read.tolist())
    starts = (read + mlp.b_in[:YEARS, None] > 0).int().argmax(1)
    assert spearmanr(starts, order).statistic >= 0.99
    prompt = max(drawn(known, 20), key=lambda p: -len(p.answers))
    year = YEARS - 1 - len(prompt.answers)
    if not options.get("distractors"):
        years = known.outputs[: year + 1].tolist()
        found = Traced(known, prompt, targets=years).edges()
        q = len(prompt.tokens) - 1
        steps = [found[("neuron", 0, k, q), ("target", t)] for k, t in enumerate(years)]
        assert np.all(np.diff(steps) > 0.99) and max(steps) < 0


@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"distractors": 2}])
def test_the_path_of_a_lookup_is_the_strongest(options: dict[str, Any]) -> None:
    """Greedily along edges, by total effects, and by integrated gradients."""
    known = known_circuits.lookup(**options)
    prompt = drawn(known, 1, seed=5)[0]
    true = [prompt.edges[0].source, *(e.target for e in prompt.edges)]
    traced = Traced(known, prompt)
    edges, path = traced.edges(), [true[-1]]
    while path[0][0] in ("target", "head"):
        into = {s: abs(v) for (s, t), v in edges.items() if t == path[0]}
        path.insert(0, max(into, key=lambda s: into[s]))
    assert path == true
    totals = {node: abs(value) for (node, _), value in traced.totals().items()}
    by_head = {n: v for n, v in totals.items() if n[0] == "head"}
    assert sorted(by_head, key=lambda n: -by_head[n])[:2] in (true[1:3], true[2:0:-1])
    tokens = {n: v for n, v in totals.items() if n[0] in ("token", "position")}
    assert max(tokens, key=lambda n: tokens[n]) == true[0]
    heads = [Heads(f"layers.{i}.self_attn") for i in range(2)]
    moved = effects(Spliced(known.model, heads), lambda x: x[:, -1, prompt.answers[0]], prompt.tokens[None])
    for layer, (each, node) in enumerate(zip(moved.mean(), true[1:3], strict=True)):
        by_head = each.unflatten(1, (-1, known.model.module.shape.d_head)).sum(2)
        at, head = divmod(int(by_head.abs().argmax()), by_head.shape[1])
        assert ("head", layer, head, at) == node
        assert by_head[at, head] == pytest.approx(-1.0, abs=0.3 if options.get("distractors") else 1e-4)


def test_ablation_wakes_a_backup_and_frozen_ablation_does_not() -> None:
    """Without the first head the logit rises by a quarter; with attention as it was it falls by a half."""
    known = known_circuits.backup(rotate=True)
    prompt = drawn(known, 1, seed=6)[0]
    head, target = prompt.edges[2].source, prompt.edges[3].target
    q, size, answer = len(prompt.tokens) - 1, known.model.module.shape.d_head, prompt.answers[0]
    total = Traced(known, prompt).totals()[head, target]
    assert total == pytest.approx(1 - INHIBITION, abs=1e-4)

    def without(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, q, :size] = 0
        return z

    before = known.logits([prompt])[0, answer]
    with intervene([(known.model.site("layers.0.self_attn.o_proj:in"), without)]):
        free = float(known.logits([prompt])[0, answer] - before)
    assert free == pytest.approx(INHIBITION - SHARE, abs=1e-4) and free > 0
    record = weights(known.model)
    run = qk.traced(known.model, [], prompt.tokens)
    z = run.frozen.at((0, "z"))[None]
    change = FrozenPass(run, {(0, "z"): without(z) - z}).last[0, -1] - run.frozen.last[-1]
    assert float(change @ record.W_U[answer]) == pytest.approx(-total, abs=1e-4)
    gate = prompt.pairs[2]
    at = qk.qk(known.model, units(known), prompt.tokens, 1, 0, q, gate.at)
    own = names(known, at.nodes, [f"layers.{i}.self_attn" for i in range(2)])
    gained = sum(v for name, v in zip(own, at.query, strict=True) if name == gate.query)
    assert gained == pytest.approx(gate.weight, rel=1e-4)


@pytest.mark.parametrize("rotate", [False, True])
def test_paths_are_as_long_as_the_dictionaries_make_them(rotate: bool) -> None:
    """A feature in each of three layers, or one that writes to all of them; either way nothing is left over."""
    known = known_neurons.amplification(rotate=rotate)
    single, across = known_neurons.transcoders(known)
    for prompt in drawn(known, 2):
        for stands, length in ((units(known), 3), (single, 3), ([across], 1)):
            traced = Traced(known, prompt, stands)
            scores = traced.graph.scores()
            assert scores.steps - 1 == pytest.approx(length, abs=1e-3)  # the last step is the logit's
            assert scores.replacement == pytest.approx(1, abs=1e-5)
            total = {n: v for (n, _), v in traced.totals().items() if n[0] == "token"}
            assert total["token", 3] == pytest.approx(prompt.edges[-1].weight, abs=1e-4)


@pytest.mark.parametrize("toy", ["induction", "indirect object", "lookup"])
def test_superposed_circuits_are_found_with_the_right_dictionary(toy: str) -> None:
    """Features in four fifths as many dimensions; a wrong frame finds nothing of the path."""
    known = TOYS[toy](width=int(0.8 * len(TOYS[toy]().frame)))
    stands = [known.dictionary(layer) for layer in range(known.model.module.shape.n_layers)]
    wrong = dataclasses.replace(known, frame=directions(*known.frame.shape, False, 9))
    others = [wrong.dictionary(layer) for layer in range(len(stands))]
    for prompt in [p for p in drawn(known, 5, seed=7) if known.solved([p])][:2]:
        true = set(itertools.pairwise(prompt.path))
        assert auroc(Traced(known, prompt, stands).through(), true) >= 0.98
        missed = Traced(known, prompt, others).through()
        assert auroc({edge: missed.get(edge, 0.0) for edge in {*missed, *true}}, true) <= 0.8
