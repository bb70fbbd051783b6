"""Laws of graphs: totals, through scores too, targets, pruning, budgets and size; identities over all makes are in test_identities."""

import dataclasses
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from equivalents import own_heads
from scipy.sparse import csr_array
from test_circuits import TOKENS, stand
from test_weights import TOYS, toy

from saekit.circuits.intervene import free_pass
from saekit.circuits.places import Heads
from saekit.circuits.qk import Heads as Looking
from saekit.circuits.qk import loadings
from saekit.circuits.targets import Feature, Logit, Target, resolve
from saekit.circuits.trace import trace, traced
from saekit.circuits.verify import effects
from saekit.circuits.weights import run_block
from saekit.graph import KINDS, Graph, Nodes
from saekit.graph.compress import compress
from saekit.graph.prune import cut
from saekit.types import SaekitError

MIXED = ("topk", "lorsa", "skip_transcoder", "molt")


def mixed(case: str, names: tuple[str, ...] = MIXED) -> tuple[Any, list[Any]]:
    """A toy and dictionaries of several kinds in it."""
    m = toy(case)
    return m, [
        stand(n, m) for n in names if TOYS[case].get("d_mlp") != 0 or n in ("topk", "lorsa", "jumprelu")
    ]


@pytest.fixture(scope="module")
def graph() -> Graph:
    m, stands = mixed("layer norms, learned")
    return trace(m, stands, TOKENS)


@pytest.mark.parametrize("case", TOYS)
def test_total_effects_are_one_pass_through_features_and_frozen_ablation(case: str) -> None:
    m, stands = mixed(case)
    g, run = trace(m, stands, TOKENS, [3, 5]), traced(m, stands, TOKENS)
    totals = g.total_effects()
    solved = dataclasses.replace(g, totals=None).total_effects()  # by the rows
    np.testing.assert_allclose(totals, solved, atol=1e-5)
    few = trace(m, stands, TOKENS, [3, 5], budget=40)
    some = few.find("token")
    np.testing.assert_allclose(few.total_effects()[:, some], totals[:, g.find("token")], atol=1e-6)
    assert len(few.of) < len(g.of) and few.check()["target"] < 1e-4
    targets = resolve(run.frozen, m, [3, 5])
    nodes = g.find("feature")[::9].tolist() + g.find("error")[::5].tolist() + g.find("token").tolist()
    ablated = -effects(run, targets, [[node] for node in nodes], free=False)
    np.testing.assert_allclose(totals[:, nodes], ablated, atol=2e-5)


def test_targets_are_tokens_differences_directions_and_features() -> None:
    m, stands = mixed("layer norms, learned")
    one, two = trace(m, stands, TOKENS, 3), trace(m, stands, TOKENS, 5)
    both = trace(m, stands, TOKENS, Logit(3) - Logit(5))
    difference = one.rows[[-1]].toarray() - two.rows[[-1]].toarray()
    np.testing.assert_allclose(both.rows[[-1]].toarray(), difference, atol=1e-5)
    position, feature = 9, int(one.nodes.place[one.find("feature", position=9, stand=0)[0]])
    g = trace(m, stands, TOKENS, Feature(feature, 0, position))
    assert g.check()["target"] < 1e-5
    node = g.find("feature", position=position, stand=0, place=feature)[0]
    np.testing.assert_allclose(g.rows[[-1]].toarray(), g.rows[[g.row(node)]].toarray(), atol=1e-6)
    on = one.nodes.place[one.find("feature", position=9, stand=0)]
    off = next(f for f in range(96) if f not in on)
    for target, words in (
        ("text", "has no tokenizer"),
        (Feature(off, 0, 9), f"feature {off} of dictionary 0 is not active at position 9"),
        (Target("narrow", torch.ones(5)), "has a direction of shape"),
        (Target("far", torch.ones(32), position=40), "lies outside of the prompt's 12 tokens"),
    ):
        with pytest.raises(SaekitError, match=words):
            trace(m, stands, TOKENS, target)


def test_pruning_and_budgets_keep_closure_and_never_raise_the_scores(graph: Graph) -> None:
    """I11, exactly: what a lower share keeps, a higher keeps; what goes is in the pruned node."""
    before = None
    for share in (1.0, 0.95, 0.8, 0.5, 0.2):
        for part in (graph.prune(share, 1.0), graph.prune(0.9, share), graph.prune(share, share)):
            part.check(1e-5, 1e-4)
            assert part.scores().replacement <= graph.scores().replacement + 1e-6
            assert part.scores().completeness <= graph.scores().completeness + 1e-6
            s = part.scores()
            assert s.completeness == pytest.approx(1 - (1 - s.replacement) / s.steps)
        now = graph.prune(share, share)
        if before is not None:
            assert now.scores().replacement <= before.scores().replacement + 1e-9
            assert now.scores().completeness <= before.scores().completeness + 1e-9
            assert len(now.nodes) <= len(before.nodes) and now.rows.nnz <= before.rows.nnz
        before = now
    m, stands = mixed("layer norms, learned")
    last = graph.scores()
    for budget in (150, 100, 40, 10, 1):
        part = trace(m, stands, TOKENS, budget=budget, batch=4)
        part.check(1e-5, 1e-4)
        assert part.of_kind("feature").sum() == budget
        assert part.scores().replacement <= last.replacement + 1e-6
        assert part.scores().completeness <= last.completeness + 1e-6
        last = part.scores()
    few = trace(m, stands, TOKENS, edges=20)
    few.check(1e-5, 1e-4)
    assert np.diff(few.rows.indptr).max() == 21 and few.scores().completeness < graph.scores().completeness


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.98, 0.999])
def test_the_threshold_is_that_of_a_sort(share: float) -> None:
    g = np.random.default_rng(0)
    for values in (
        g.exponential(size=10_001),
        np.repeat([0.5, 0.25, 2.0], 40),
        g.random(5) * 1e-30,
        np.ones(1),
    ):
        values = values.astype(np.float32)
        ordered = np.sort(values.astype(np.float64))[::-1]
        reached = np.cumsum(ordered)
        expected = ordered[min(np.searchsorted(reached, share * reached[-1] * (1 - 1e-12)), len(ordered) - 1)]
        found = cut(values, share)
        if share:
            assert found == pytest.approx(expected, rel=1e-6)
        kept = values[values >= found].sum(dtype=np.float64)
        assert kept >= share * values.sum(dtype=np.float64) * (1 - 1e-9)


@pytest.mark.parametrize("case", ["root mean squares, rotary, gated, grouped", "parallel, norms of queries"])
def test_the_strongest_pairs_and_what_a_key_has_more_than_others(case: str) -> None:
    m, stands = mixed(case)
    run = traced(m, stands, TOKENS)
    looking = Looking(run)
    for layer, queries in enumerate(run.frozen.queries):
        for found in looking.layer(layer, 8):
            products = found.query_parts.T @ found.key_parts
            some = min(12, np.count_nonzero(products))
            assert [w for *_, w in found.pairs(12)][:some] == pytest.approx(
                products.flat[np.argsort(-np.abs(products), axis=None)[:some]].tolist(), abs=1e-6
            )
            assert all(w == pytest.approx(float(products[i, j])) for i, j, w in found.pairs(12))
        scores, pattern = queries.scores[0, 8, :9], run.frozen.seen[layer]["patterns"][0, 8, :9]
        others = (pattern * scores)[[*range(4), *range(5, 9)]].sum() / (1 - pattern[4])
        apart = looking.qk(layer, 0, 8, 4, contrast=True)
        assert apart.score == pytest.approx(float(scores[4] - others), abs=1e-5)
        with pytest.raises(SaekitError, match="key 9 is not seen from query 8"):
            looking.qk(layer, 0, 8, 9)
    run = traced(m, [stand("jumprelu", m)], TOKENS)
    assert np.abs(loadings(run, resolve(run.frozen, m, 3)[0]).heads).max() > 1e-4


def test_totals_through_scores_are_one_whoever_stands_for_the_heads() -> None:
    """The frozen model's own attention, its heads as features, and a Lorsa that is the layer."""
    m = toy("layer norms, learned")
    found = []
    for stands in ([], [Heads(f"layers.{i}.self_attn") for i in range(2)], own_heads(m)):
        g = trace(m, stands, TOKENS, [3, 5], scores="whole")
        found.append(g.aware[:, g.of_kind("token", "position")])
        assert np.abs(g.aware - g.total_effects())[:, g.of_kind("token")].max() > 1e-3
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_totals_through_scores_are_the_derivative_where_attention_is_even() -> None:
    """Where all scores are small the averaged Jacobian is the softmax's own: totals are gradients times values."""
    m = toy("no norms, gelu")
    with torch.no_grad():
        for layer in m.module.layers:
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                proj.weight.mul_(0.1)
                proj.bias.mul_(0.1)
    run = traced(m, [Heads("layers.1.self_attn")], TOKENS)
    target = resolve(run.frozen, m, 3)
    aware, plain = (run.targets(target, through=True, free=s)[0] for s in ("whole", None))
    assert (aware - plain).abs().max() > 1e-3
    w = run.frozen.weights
    embedded = run.frozen.seen[0]["resid_pre"].clone()
    slopes = run.frozen.slopes

    def value(x: torch.Tensor) -> torch.Tensor:
        for layer, block in enumerate(w.blocks):
            p = block.attention.patterns(x[None])[0]
            values = torch.einsum("si,hvi->hsv", x, block.attention.W_V) + block.attention.b_V[:, None]
            z = (p @ values).transpose(0, 1).flatten(1)
            x = x + z @ block.attention.W_O.transpose(1, 2).flatten(0, 1) + block.attention.b_O
            x = (
                x
                + (slopes[layer] * (x @ block.mlp.W_in.T + block.mlp.b_in)) @ block.mlp.W_out.T
                + block.mlp.b_out
            )
        return target[0].direction @ x[-1]

    for patterns in [block.attention.patterns for block in w.blocks]:
        patterns.requires_grad_(False)
    gradient = torch.autograd.functional.jacobian(value, embedded)
    tokens = (gradient * w.W_E[TOKENS]).sum(-1)
    torch.testing.assert_close(aware[run.tokens], tokens, rtol=0.05, atol=3e-3)


@pytest.mark.parametrize("case", ["layer norms, learned", "attention alone"])
def test_totals_by_slope_are_the_free_models_gradient(case: str) -> None:
    """Through patterns and norms, by autograd of a pass in which everything reacts (ReLUs, whose slopes are their masks)."""
    m = toy(case)
    run = traced(m, [Heads("layers.1.self_attn")], TOKENS)
    target = resolve(run.frozen, m, 3)
    found = run.targets(target, through=True, free="slope")[0]
    w = run.frozen.weights
    change = torch.zeros(1, *run.frozen.seen[0]["resid_pre"].shape, requires_grad=True)
    last = free_pass.__wrapped__(run, {(0, "resid_pre"): change})[0, -1]
    (target[0].direction @ (last if w.norm is None else w.norm(last))).backward()
    tokens = (change.grad[0] * w.W_E[TOKENS]).sum(-1)
    torch.testing.assert_close(found[run.tokens], tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lorsa", "heads"])
def test_a_features_totals_by_slope_go_through_its_own_attention(kind: str) -> None:
    """They are the gradient of the feature itself where it is the target, by autograd of attention and norms."""
    m = toy("attention alone")
    one: Any = Heads("layers.1.self_attn") if kind == "heads" else stand("lorsa", m)
    run = traced(m, one, TOKENS)
    (own,) = run.parts
    blocks = run.frozen.weights.blocks
    embedded = run.frozen.weights.W_E[TOKENS].requires_grad_()
    seen: dict[str, torch.Tensor] = {}
    stream = run_block(blocks[0], embedded[None], lambda _, value: value)
    run_block(blocks[1], stream, lambda name, value: seen.setdefault(name, value))
    values = seen["z"] if kind == "heads" else one.encode(seen["attn_in"]).to_dense()
    for entry in range(0, len(own.part.positions), 30):
        at, feature = int(own.part.positions[entry]), int(own.part.features[entry])
        (gradient,) = torch.autograd.grad(values[0, at, feature], embedded, retain_graph=True)
        found = trace(m, one, TOKENS, Feature(feature, 0, at))
        tokens = (gradient * embedded).sum(-1).detach().numpy()
        np.testing.assert_allclose(found.aware[0, found.of_kind("token")], tokens, rtol=1e-4, atol=1e-4)


def test_targets_of_one_name_go_by_their_positions() -> None:
    """Each has the row that it has alone, and verifying finds them by their names."""
    m = toy("layer norms, learned")
    d = stand("topk", m)
    codes = trace(m, d, TOKENS, 3)
    places = codes.nodes.place[codes.find("feature")]
    feature = int(np.bincount(places).argmax())
    at = codes.nodes.position[codes.find("feature", place=feature)][:2].tolist()
    for one, given, names in (
        ("5", [Logit(5, 4), Logit(5, 9), Logit(6, 9)], ("5 (position 4)", "5 (position 9)", "6")),
        ("feature", [Feature(feature, 0, p) for p in at], tuple(f"feature {feature} of dictionary 0 (position {p})" for p in at)),
    ):  # fmt: skip
        graph = trace(m, d, TOKENS, given)
        assert graph.targets == names, one
        for i, target in enumerate(given):
            alone = trace(m, d, TOKENS, target)
            np.testing.assert_allclose(graph.total_effects()[i, : alone.pruned], alone.total_effects()[0, : alone.pruned], atol=1e-5)  # fmt: skip
        if one == "5":
            assert graph.verify(m, d, top=3).about["verified"]["frozen"] == pytest.approx(1, abs=1e-2)


def test_a_hundred_thousand_nodes_are_pruned_in_seconds() -> None:
    n, each = 100_000, 150
    g = np.random.default_rng(0)
    blocks = np.linspace(0, n, 13).astype(int)[1:].tolist()
    starts = np.repeat([0, *blocks[:-1]], np.diff([0, *blocks]))
    leaves = 1000
    sources = (g.random((n, each)) * (starts + leaves)[:, None]).astype(np.int32)
    sources.sort(1)
    data = g.standard_normal((n, each)).astype(np.float32)
    offsets = np.arange(0, n * each + 1, each)
    kind = np.full(n + leaves, KINDS.index("feature"))
    kind[:leaves], kind[leaves - 1], kind[-1] = (
        KINDS.index("token"),
        KINDS.index("pruned"),
        KINDS.index("target"),
    )
    rows = csr_array((data.ravel(), sources.ravel(), offsets), shape=(n, n + leaves))
    value = np.concatenate([np.full(leaves, np.nan), data.sum(1, dtype=np.float64)])
    zeros = np.zeros(n + leaves, np.int64)
    nodes = Nodes(kind, zeros, zeros, zeros, np.arange(n + leaves), value)
    graph = Graph(nodes, rows, np.arange(leaves, n + leaves), (*blocks[:-1], n - 1, n), np.zeros(n), np.zeros((1, n + leaves)),
                  (1.0,), (0,), (), ("d",), (), ("0",))  # fmt: skip
    tracemalloc.start()  # numpy tells it of its arrays
    start = time.process_time()
    part = graph.prune()
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1] + rows.data.nbytes + rows.indices.nbytes + rows.indptr.nbytes
    tracemalloc.stop()
    assert part.closure().max() < 1e-3 and 0 < len(part.of) < n
    assert seconds < 5 and peak < 1.5e9, (seconds, peak)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_keep_their_strongest_entries_and_the_sums_of_the_rest(dtype: type) -> None:
    g = np.random.default_rng(0)
    block = (g.integers(-3, 4, (37, 50)) * (g.random((37, 50)) > 0.3)).astype(
        dtype
    )  # ties, zeros, an empty row
    block[5] = 0
    for most in (1, 7, 40, 50):
        found = compress(block, most, 50, 53)
        dense = found.matrix.toarray()
        for row, kept, dropped in zip(block, dense, found.dropped, strict=True):
            order = np.argsort(-np.abs(row), kind="stable")[:most]
            expected = np.zeros(50, dtype)
            expected[order] = row[order]
            np.testing.assert_array_equal(kept[:50], expected)
            assert kept[50] == (row - expected).sum() and dropped == np.abs(row - expected).sum()


def test_verifying_finds_that_the_strongest_matter(graph: Graph) -> None:
    m, stands = mixed("layer norms, learned")
    found = graph.verify(m, stands, top=30).about["verified"]
    assert found["frozen"] > 0.999
    assert found["mean effect"] > 3 * found["mean effect of random nodes"]
    with pytest.raises(SaekitError, match="that these dictionaries don't make"):
        graph.verify(m, stands[:1])


def test_what_a_graph_was_not_traced_with_is_no_verification_of_it(graph: Graph) -> None:
    """Another model, and another target under the same name, are told by their values."""
    m, stands = mixed("layer norms, learned")
    other = toy("layer norms, learned")
    with torch.no_grad():
        other.module.layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(
        SaekitError, match=r"here and .* in the graph; give the model, dictionaries and target"
    ):
        trace(m, stands, TOKENS, 3).verify(other, stands)
    double = Logit(((3, 2.0), (5, -1.0)))
    traced_twice = trace(m, stands, TOKENS, double)
    assert traced_twice.targets == ("+2*3-5",)
    with pytest.raises(SaekitError, match="is no sum of tokens; give target"):
        traced_twice.verify(m, stands)
    assert traced_twice.verify(m, stands, target=double).about["verified"]["frozen"] > 0.99
    with pytest.raises(SaekitError, match="positions -1 and 4 don't add up"):
        Logit(3) - Logit(5, position=4)
