"""What weights say of circuits whatever the prompt is, with what the prompt has, is what a trace says."""

import numpy as np
import pytest
import torch
from test_circuits import TOKENS, stand
from test_weights import toy

import saekit
from saekit.circuits.invariant import connections, de_embedding, factors, paths
from saekit.circuits.places import Heads, Neurons
from saekit.circuits.qk import loadings
from saekit.circuits.targets import Feature
from saekit.circuits.trace import trace, traced
from saekit.types import SaekitError

CASES = ["layer norms, learned", "root mean squares, rotary, gated, grouped", "no norms, gelu"]


@pytest.mark.parametrize("case", CASES)
def test_weights_times_prompt_are_the_traced_edges(case: str) -> None:
    """By the stream and by each head they add up to the edge; shuffled they don't."""
    run = traced(toy(case), [Neurons(f"blocks.{i}.mlp") for i in range(2)], TOKENS)
    earlier, later = run.parts
    rows = run.features(later, torch.arange(len(later.part.positions)))[:, earlier.nodes]
    ways = [None, *((1, h) for h in range(run.frozen.queries[1].heads))]
    edges = sum(factors(run, earlier, later, way).edges for way in ways)
    torch.testing.assert_close(edges, rows, rtol=0, atol=1e-5)
    assert (edges - rows.flip(0)).abs().max() > 0.1
    with pytest.raises(SaekitError, match="is not before one that reads"):
        factors(run, later, earlier)


def test_what_is_written_in_many_places_is_a_sum() -> None:
    """Of a cross-layer transcoder over three layers, with the attention between silenced: edges are the traced ones."""
    m = toy(CASES[0], n_layers=3)
    with torch.no_grad():
        for p in m.module.layers[1].self_attn.o_proj.parameters():
            p.zero_()
    clt = saekit.create("clt", d_in=32, n_features=96, k=9, n_layers=3, seed=1)
    clt.reads, clt.writes = (tuple(f"layers.{i}.mlp:{side}" for i in range(3)) for side in ("in", "out"))
    run = traced(m, clt, TOKENS)
    earlier, _, later = run.parts
    rows = run.features(later, torch.arange(len(later.part.positions)))[:, earlier.nodes]
    found = [factors(run, earlier, later, way).edges for way in (None, *((2, h) for h in range(4)))]
    assert len(earlier.writes) == 3 and all(part.abs().max() > 1e-2 for part in found)
    torch.testing.assert_close(sum(found), rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_de_embedding_is_what_tokens_give_by_the_stream(case: str) -> None:
    run = traced(toy(case), [Neurons("blocks.0.mlp")], TOKENS)
    (own,) = run.parts
    found = de_embedding(run.frozen.weights, own.read, own.part.w)
    norm = run.frozen.sizes[0].get("before_mlp")
    for entry in range(0, len(own.part.positions), 60):
        at = int(own.part.positions[entry])
        target = Feature(int(own.part.features[entry]), own.stand, at)
        rest = loadings(run, target).rest[run.tokens]
        size = 1.0 if norm is None else norm[at].item()
        assert rest[at] == pytest.approx(found[entry, TOKENS[at]].item() / size, abs=1e-5)


def test_all_paths_add_up_and_greedy_ones_are_among_them() -> None:
    m = toy("attention alone")
    graph = trace(m, [Heads("blocks.1.self_attn")], TOKENS, [3, 5])
    for target in range(2):
        every = paths(graph, target, branches=None)
        value = graph.nodes.value[graph.of[len(graph.of) - 2 + target]]
        assert sum(path.value for path in every) == pytest.approx(value, abs=1e-4)
        sizes = [abs(path.value) for path in every]
        assert sizes == sorted(sizes, reverse=True)
        totals = np.zeros(len(graph.nodes))
        for path in every:
            totals[path.nodes[-1]] += path.value
        leaves = graph.leaves
        np.testing.assert_allclose(totals[leaves], graph.total_effects()[target][leaves], atol=1e-4)
        greedy = paths(graph, target, branches=5)
        assert 0 < len(greedy) < len(every) and {p.nodes for p in greedy} <= {p.nodes for p in every}


def test_what_has_no_weights_between_is_refused() -> None:
    post, plain = (traced(toy(case), [], TOKENS).frozen.weights for case in ("post norms, silu", CASES[0]))
    x = torch.zeros(1, 32)
    for weights, head, words in (
        (post, (1, 0), "has a norm behind its heads"),
        (plain, (1, 99), r"head \(1, 99\) is none of the model's"),
    ):
        with pytest.raises(SaekitError, match=words):
            connections(weights, x, (1, "mlp_in"), x, head)
    graph = trace(toy(CASES[0]), [], TOKENS, 3)
    with pytest.raises(SaekitError, match="target 2 is none of the graph's 1"):
        paths(graph, 2)
    with pytest.raises(SaekitError, match="a difference has no paths"):
        paths(graph - graph)


@pytest.mark.parametrize(
    ("case", "names", "head", "words"),
    [
        (CASES[0], ("skip_transcoder", "codebook"), None, "mlp_out of layer 1 doesn't read the stream"),
        (CASES[0], ("skip_transcoder", "switch"), None, "attn_out of layer 1 doesn't read the stream"),
        (CASES[0], ("jumprelu", "transcoder"), None, "z of layer 0 is not added to the stream"),
        (CASES[0], ("abstopk", "matching_pursuit"), None, "mlp_in of layer 1 is not added to the stream"),
        (CASES[0], ("skip_transcoder", "lorsa"), None, "features of layers.1.self_attn:out read what heads gather"),
        ("post norms, silu", ("skip_transcoder", "topk"), None, "layer 0 has a norm behind its MLP"),
        ("parallel, norms of queries", ("skip_transcoder", "transcoder"), (1, 0), r"head \(1, 0\) adds nothing to"),
        (CASES[0], ("skip_transcoder", "transcoder"), (0, 0), r"is not before one that reads \(0, 'attn_in'\)"),
        (CASES[0], ("skip_transcoder", "transcoder", "topk"), None, r"writes \(0, 'resid_post'\) in between"),
        (CASES[0], ("skip_transcoder", "transcoder", "switch"), (1, 0), r"writes \(1, 'attn_out'\) in between"),
    ],
)  # fmt: skip
def test_edges_that_the_weights_alone_do_not_give_are_refused(
    case: str, names: tuple[str, ...], head: tuple[int, int] | None, words: str
) -> None:
    m = toy(case)
    run = traced(m, [stand(name, m) for name in names], TOKENS)
    earlier, later = (next(own for own in run.parts if own.stand == i) for i in range(2))
    with pytest.raises(SaekitError, match=words):
        factors(run, earlier, later, head)
