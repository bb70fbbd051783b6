"""Laws of graphs: closed form against autograd, totals, pruning, budgets, files, and what changes nothing."""

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from test_circuits import TOKENS, stand
from test_weights import TOYS, toy

import saekit
from saekit.circuits.frozen import Frozen
from saekit.circuits.intervene import FrozenPass
from saekit.circuits.places import Heads, Neurons
from saekit.circuits.qk import Heads as Looking
from saekit.circuits.qk import loadings
from saekit.circuits.targets import Feature, Logit, Target, resolve
from saekit.circuits.trace import trace, traced
from saekit.circuits.verify import effects
from saekit.circuits.weights import weights
from saekit.graph import KINDS, Graph, Nodes
from saekit.graph.compress import compress
from saekit.graph.prune import cut
from saekit.testbed.transformer import Transformer, TransformerConfig
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
def test_the_closed_form_is_the_gradient_of_the_frozen_model(case: str) -> None:
    """I4: autograd through a pass with everything frozen gives every row."""
    m, stands = mixed(case)
    run = traced(m, stands, TOKENS)
    table, w = run.columns.table(), run.frozen.weights
    changes = {site: torch.zeros(1, *run.frozen.at(site).shape, requires_grad=True) for site in run.cuts}
    changes[0, "resid_pre"] = torch.zeros(1, *run.frozen.seen[0]["resid_pre"].shape, requires_grad=True)
    out = FrozenPass(run, changes)
    for own in run.parts:
        some = torch.arange(0, len(own.part.positions), 17)
        rows = run.features(own, some)
        moved = out.change(own)[0]
        for row, entry in zip(rows, some.tolist(), strict=True):
            grads = torch.autograd.grad(
                moved[entry], list(changes.values()), retain_graph=True, allow_unused=True
            )
            back = dict(zip(changes, grads, strict=True))
            leaf = back[0, "resid_pre"]
            if leaf is not None:
                tokens = (leaf[0] * w.W_E[TOKENS]).sum(-1)
                torch.testing.assert_close(row[run.tokens], tokens, rtol=0, atol=1e-5)
            for source in run.parts:
                found = torch.zeros(len(source.part.positions))
                for site, vectors in zip(source.writes, source.part.written, strict=True):
                    if back[site] is not None:
                        found += (back[site][0, source.part.positions] * vectors).sum(-1)
                torch.testing.assert_close(row[source.nodes], found, rtol=0, atol=1e-5)
    assert len(table) == run.columns.n


@pytest.mark.parametrize("case", TOYS)
def test_total_effects_are_one_pass_through_features_and_frozen_ablation(case: str) -> None:
    m, stands = mixed(case)
    g, run = trace(m, stands, TOKENS, [3, 5]), traced(m, stands, TOKENS)
    totals = g.total_effects()
    targets = resolve(run.frozen, m, [3, 5])
    through = run.targets(targets, through=True).double().numpy()
    np.testing.assert_allclose(totals[:, : through.shape[1]], through, atol=1e-5)
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


def own_neurons(m: Any, name: str = "transcoder") -> list[saekit.Dictionary]:
    """The neurons of every MLP as transcoders, or as one cross-layer transcoder that writes to its own layers."""
    blocks, points = weights(m).blocks, [f"layers.{i}.mlp:{side}" for i in range(2) for side in ("in", "out")]
    shape = {"d_in": 32, "selection": "relu", "normalise": "none", "atoms": "free"}
    if name == "clt":
        d = saekit.create("clt", n_layers=2, n_features=128, reach=1, **shape)
        parts, out = d.parts, [d]
        d.reads, d.writes = tuple(points[::2]), tuple(points[1::2])
    else:
        out = parts = [saekit.create("transcoder", d_out=32, n_features=64, **shape) for _ in blocks]
        for i, d in enumerate(out):
            d.reads, d.writes = (points[2 * i],), (points[2 * i + 1],)
    with torch.no_grad():
        for part, block in zip(parts, blocks, strict=True):
            part.encoder.copy_(block.mlp.W_in)
            part.b_enc.copy_(block.mlp.b_in)
            part.atoms.weight.copy_(block.mlp.W_out.T)
        biases = torch.cat([block.mlp.b_out for block in blocks])
        for d, b in zip(out, biases.split(out[0].d_out), strict=True):
            d.b_dec.copy_(b)
    return out


def test_exact_dictionaries_leave_no_error_and_empty_ones_all_of_it() -> None:
    """I7: an MLP's own neurons explain everything; dictionaries that write nothing leave the tokens' direct share."""
    m = toy("layer norms, learned")
    exact = own_neurons(m)
    g = trace(m, exact, TOKENS)
    assert abs(g.rows[:, g.find("error")]).max() < 1e-6
    s = g.scores()
    assert s.replacement == pytest.approx(1, abs=1e-6) and s.completeness == pytest.approx(1, abs=1e-6)
    for d in exact:
        with torch.no_grad():
            d.b_enc.fill_(-1e4)
            d.b_dec.zero_()
    g = trace(m, exact, TOKENS, 3)
    row = g.rows[[-1]].toarray()[0]
    explained = np.abs(row[~g.of_kind("error")]).sum() / np.abs(row).sum()
    assert not g.of_kind("feature").any() and g.scores().replacement == pytest.approx(explained, rel=1e-6)


def own_heads(m: Any) -> list[saekit.Dictionary]:
    """The heads of every layer as a Lorsa with a feature for each sign of each dimension."""
    out = []
    for i, block in enumerate(weights(m).blocks):
        a = block.attention
        d = saekit.create(
            "lorsa",
            attention=a,
            n_features=64,
            k=64,
            normalise="none",
            atoms="free",
            objective=("reconstruction",),
        )
        d.reads, d.writes = (f"layers.{i}.self_attn:in",), (f"layers.{i}.self_attn:out",)
        with torch.no_grad():
            d.encoder.copy_(torch.cat([a.W_V, -a.W_V], 1).flatten(0, 1))
            d.b_enc.copy_(torch.cat([a.b_V, -a.b_V], 1).flatten())
            d.atoms.weight.copy_(torch.cat([a.W_O, -a.W_O], 2).movedim(2, 1).flatten(0, 1))
            d.b_dec.copy_(a.b_O)
        out.append(d)
    return out


def named(g: Graph, merge: Any = None) -> dict[tuple[int, ...], np.ndarray]:
    """What each feature adds to the targets, by layer, position and number; numbers that merge go together."""
    out: dict[tuple[int, ...], np.ndarray] = {}
    totals = np.concatenate([g.total_effects(), g.rows[-len(g.targets) :].toarray()])
    for node in g.find("feature"):
        place = int(g.nodes.place[node])
        key = (
            int(g.nodes.layer[node]),
            int(g.nodes.position[node]),
            place if merge is None else merge(place),
        )
        out[key] = out.get(key, 0) + totals[:, node]
    return out


def test_equivalent_dictionaries_make_one_graph() -> None:
    """I8: neurons, transcoders and a diagonal cross-layer transcoder; heads and a Lorsa of a feature for each sign."""
    m = toy("layer norms, learned")
    neurons = named(trace(m, [Neurons(f"layers.{i}.mlp") for i in range(2)], TOKENS, 3))
    singles, whole = (named(trace(m, own_neurons(m, n), TOKENS, 3)) for n in ("transcoder", "clt"))
    whole = {(layer, at, place - 64 * layer): value for (layer, at, place), value in whole.items()}
    assert neurons.keys() == singles.keys() == whole.keys()
    for other in (singles, whole):
        np.testing.assert_allclose([other[k] for k in neurons], [neurons[k] for k in neurons], atol=1e-5)

    heads = named(trace(m, [Heads(f"layers.{i}.self_attn") for i in range(2)], TOKENS, 3))
    signed = named(trace(m, own_heads(m), TOKENS, 3), lambda place: place // 16 * 8 + place % 8)
    assert heads.keys() == signed.keys()
    np.testing.assert_allclose([signed[k] for k in heads], [heads[k] for k in heads], atol=1e-5)


@pytest.mark.parametrize("case", TOYS)
def test_scores_are_the_sum_of_their_pairs_and_edges_of_their_heads(case: str) -> None:
    """I9, I10."""
    m, stands = mixed(case)
    run = traced(m, stands, TOKENS)
    looking = Looking(run)
    for layer, queries in enumerate(run.frozen.queries):
        for found in looking.layer(layer, 8):
            true = float(queries.scores[found.head[1], 8, found.places[1]])
            assert found.score == pytest.approx(true, abs=1e-5)
            assert found.query.sum() == pytest.approx(true, abs=1e-5)
            assert found.key.sum() == pytest.approx(true, abs=1e-5)
            products = found.query_parts.T @ found.key_parts
            assert [w for *_, w in found.pairs(12)] == pytest.approx(
                products.flat[np.argsort(-np.abs(products), axis=None)[:12]].tolist(), abs=1e-6
            )
            assert products.sum() == pytest.approx(true, abs=1e-4)
        scores, pattern = queries.scores[0, 8, :9], run.frozen.seen[layer]["patterns"][0, 8, :9]
        others = (pattern * scores)[[*range(4), *range(5, 9)]].sum() / (1 - pattern[4])
        apart = looking.qk(layer, 0, 8, 4, contrast=True)
        assert apart.score == pytest.approx(float(scores[4] - others), abs=1e-5)
        with pytest.raises(SaekitError, match="key 9 is not seen from query 8"):
            looking.qk(layer, 0, 8, 9)
    run = traced(m, [stand("jumprelu", m)], TOKENS)
    target = resolve(run.frozen, m, 3)[0]
    parts = loadings(run, target)
    row = run.targets([target])[0].numpy()
    np.testing.assert_allclose(parts.heads.sum((0, 1)) + parts.rest, row, atol=1e-5)
    assert np.abs(parts.heads).max() > 1e-4


def test_totals_through_scores_are_one_whoever_stands_for_the_heads() -> None:
    """The frozen model's own attention, its heads as features, and a Lorsa that is the layer."""
    m = toy("layer norms, learned")
    found = []
    for stands in ([], [Heads(f"layers.{i}.self_attn") for i in range(2)], own_heads(m)):
        g = trace(m, stands, TOKENS, [3, 5])
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
    aware, plain = (run.targets(target, through=True, scores=s)[0] for s in (True, False))
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


def test_what_changes_nothing(graph: Graph) -> None:
    """I13: the batch's size, and the order of the features."""
    m, stands = mixed("layer norms, learned")
    for batch in (1, 17):
        other = trace(m, stands, TOKENS, batch=batch)
        np.testing.assert_allclose(other.rows.toarray(), graph.rows.toarray(), atol=1e-6)
    d = stand("transcoder", m)
    one = trace(m, d, TOKENS, 3)
    order = torch.randperm(d.n_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for tensor in (d.encoder, d.b_enc, d.atoms.weight):
            tensor.copy_(tensor[order].clone())
    two = trace(m, d, TOKENS, 3)
    features = [g.find("feature") for g in (one, two)]
    named = [
        dict(
            zip(
                zip(g.nodes.position[at].tolist(), ids, strict=True),
                g.total_effects()[0, at].tolist(),
                strict=True,
            )
        )
        for g, at, ids in zip(
            (one, two),
            features,
            (one.nodes.place[features[0]].tolist(), order[two.nodes.place[features[1]]].tolist()),
            strict=True,
        )
    ]
    assert named[0].keys() == named[1].keys()
    np.testing.assert_allclose([named[0][k] for k in named[0]], [named[1][k] for k in named[0]], atol=1e-5)


def test_regressions_of_other_tracers() -> None:
    """A square unembedding, a last position at which nothing is active, BOS id 0, features numbered as layers."""
    config = TransformerConfig(vocabulary=32, d_model=32)
    m = saekit.load_model(Transformer(config), name="square")
    tokens = torch.tensor([0, 3, 7, 0, 9])
    frozen = Frozen(weights(m), tokens)
    g = trace(m, Neurons("blocks.0.mlp"), tokens, [2, 3])
    logits = frozen.logits[-1]
    np.testing.assert_allclose(g.nodes.value[g.of[-2:]], (logits - logits.mean())[[2, 3]].numpy(), atol=1e-5)
    d = saekit.create("transcoder", d_in=32, d_out=32, n_features=64, selection="relu")
    d.reads, d.writes = ("layers.1.mlp:in",), ("layers.1.mlp:out",)
    x = frozen.seen[1]["mlp_in"]
    with torch.no_grad():
        d.b_enc.fill_(-1e4)
        d.encoder[1] = 1e4 * (x[2] - x.mean(0)) / (x[2] - x.mean(0)).square().sum()
        d.b_enc[1] = -0.9e4 - float(x.mean(0) @ d.encoder[1])
    codes = d.encode(x)
    assert codes.indices.tolist() == [1] and codes.row_ids().tolist() == [2]
    g = trace(m, d, tokens)
    g.check()
    names = [node["node_id"] for node in g.to_json()["nodes"]]
    assert "1_1_2" in names and "1_error_2" in names and len(set(names)) == len(names)
    assert list(g.tokens) == tokens.tolist()


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
