"""Attribution graphs close: every row adds up to its node's value, and total effects of leaves to the target's."""

from typing import Any

import pytest
import torch
from test_weights import TOYS, toy

import saekit
from saekit.circuits.frozen import Frozen, Site
from saekit.circuits.intervene import FrozenPass
from saekit.circuits.places import Heads, Neurons, place
from saekit.circuits.rows import Trace
from saekit.circuits.targets import Target
from saekit.circuits.trace import trace
from saekit.circuits.weights import weights
from saekit.dictionaries.parts import Part
from saekit.graph import Graph
from saekit.models import Model
from saekit.types import SaekitError

LAYERS = range(2)
TOKENS = torch.randint(64, (12,), generator=torch.Generator().manual_seed(0))
POINTS = {
    "topk": ("layers.0",), "jumprelu": ("layers.0.self_attn.o_proj:in",), "abstopk": ("layers.1.mlp:in",),
    "matching_pursuit": ("layers.1:out",), "omp": ("layers.0:in",), "switch": ("layers.1.self_attn",),
    "codebook": ("layers.1.mlp",), "skip_transcoder": ("layers.0.mlp:in", "layers.0.mlp:out"),
    "transcoder": ("layers.1.mlp:in", "layers.1.mlp:out"), "molt": ("layers.1.mlp:in", "layers.1.mlp:out"),
    "lorsa": ("layers.1.self_attn:in", "layers.1.self_attn:out"),
    "clt": tuple(f"layers.{i}.mlp:{side}" for i in LAYERS for side in ("in", "out")),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "clt": {"n_layers": 2}, "lorsa": {"n_qk": 2, "d_qk": 8, "rotary": 8}, "molt": {"ranks": (1, 2)}, "switch": {"experts": 4},
}  # fmt: skip


def stand(name: str, model: Model) -> saekit.Dictionary:
    """A dictionary whose thresholds and biases are not those that it was born with."""
    d = saekit.create(name, d_in=32, n_features=96, seed=1, **{"k": 8, **OPTIONS.get(name, {})})
    points = POINTS[name]
    d.reads, d.writes = d.wiring.sites(list(points))
    tokens = torch.randint(64, (20, 12), generator=torch.Generator().manual_seed(1))
    stream = saekit.harvest(model, list(tokens), list(d.points), tokens=None)
    d.prepare(d.gather(list(stream)))
    with torch.no_grad():
        for bias in (d.b_dec, getattr(d, "b_enc", None)):
            if bias is not None:
                bias.add_(0.1 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
    return d


def check(graph: Graph, row: float = 1e-5, leaf: float = 1e-4) -> None:
    found = graph.check(row, leaf)
    assert found["row"] <= row and found["target"] <= leaf


@pytest.mark.parametrize("case", TOYS)
@pytest.mark.parametrize("double", [False, True])
def test_rows_close_over_neurons_and_heads_of_every_make(case: str, double: bool) -> None:
    m = toy(case)
    if double:
        m.module.double()
    neurons = [Neurons(f"blocks.{i}.mlp") for i in LAYERS] if TOYS[case].get("d_mlp") != 0 else []
    heads = [Heads(f"blocks.{i}.self_attn") for i in LAYERS]
    for stands in ([], neurons, heads, [*neurons, *heads]):
        direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
        targets = [3, 5, Target("a direction", direction, 0.5, position=7)]
        check(trace(m, stands, TOKENS, targets), *((1e-10, 1e-9) if double else (1e-5, 1e-4)))


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("case", ["layer norms, learned", "post norms, silu"])
def test_rows_close_over_every_kind_of_dictionary(name: str, case: str) -> None:
    m = toy(case)
    graph = trace(m, stand(name, m), TOKENS)
    assert graph.of_kind("feature").any()
    check(graph)


def test_rows_close_where_kinds_are_mixed() -> None:
    m = toy("parallel, norms of queries")
    mixed = [stand(n, m) for n in ("topk", "lorsa", "molt")]
    check(trace(m, [*mixed, Neurons("blocks.0.mlp"), Heads("blocks.0.self_attn")], TOKENS))
    check(trace(m, [stand("clt", m), stand("jumprelu", m)], TOKENS, batch=7))


def test_what_cannot_be_traced_is_refused() -> None:
    m = toy("layer norms, learned")
    two = saekit.create("crosscoder", d_in=(32, 32), n_features=64, k=4)
    two.reads = two.writes = ("layers.0", "layers.1")
    narrow = saekit.create("topk", d_in=16, n_features=64, k=4)
    narrow.reads = narrow.writes = ("layers.0",)
    inside = saekit.create("topk", d_in=64, n_features=64, k=4)
    inside.reads = inside.writes = ("layers.0.mlp.act_fn",)
    for stands, prompt, target, words in (
        (two, TOKENS, None, "reads layers.0, layers.1 at once"),
        (narrow, TOKENS, None, "d_in = 16 and d_out = 16 stands where the model is 32 and 32 wide"),
        (inside, TOKENS, None, "is inside of what a circuit takes as one step"),
        ([stand("topk", m), stand("topk", m)], TOKENS, None, "is written by two dictionaries"),
        ([], TOKENS, [64], "target 64 is no token"),
        ([], TOKENS, [], "target is empty"),
        ([], TOKENS.repeat(3), None, "prompt has 36 tokens and model 'toy' reads 32"),
        ([], TOKENS[:0], None, "give one sequence of at least one token"),
        ([], TOKENS + 60, None, r"token \d+ of the prompt is none; the model has 0 to 63"),
        ([], [3, -1], None, "token -1 of the prompt is none"),
        ([], "text", None, "has no tokenizer; give token ids"),
        (Neurons("blocks.0.self_attn"), TOKENS, None, "is no MLP"),
        (Heads("blocks.0.mlp"), TOKENS, None, "is no attention layer"),
    ):
        with pytest.raises(SaekitError, match=words):
            trace(m, stands, prompt, target)


def change(part: Part, writes: tuple[Site, ...], scale: float) -> dict[Site, torch.Tensor]:
    """For each feature of a part a pass in which it is scaled."""
    out = {}
    for site, vectors in zip(writes, part.written, strict=True):
        moved = vectors.new_zeros(len(vectors), len(TOKENS), vectors.shape[1])
        moved[torch.arange(len(vectors)), part.positions] = (scale - 1) * vectors
        out[site] = moved
    return out


@pytest.mark.parametrize("case", TOYS)
def test_a_frozen_intervention_on_every_source_is_its_column(case: str) -> None:
    """At several scales; two sources add; of features, errors, tokens and positions."""
    m = toy(case)
    names = ("topk", "lorsa", *(() if TOYS[case].get("d_mlp") == 0 else ("skip_transcoder", "molt")))
    frozen = Frozen(weights(m), TOKENS)
    run = Trace(frozen, [place(frozen, m, stand(name, m)) for name in names])
    rows = [run.features(own, torch.arange(len(own.part.positions))) for own in run.parts]
    passes: list[tuple[dict[Site, torch.Tensor], slice, float]] = []
    for own in run.parts:
        passes += [(change(own.part, own.writes, scale), own.nodes, scale - 1) for scale in (0.0, 2.0, -3.0)]
    each = torch.eye(len(TOKENS))[:, :, None]
    for site, (_, error) in run.fixed.items():
        passes.append(({site: -each * run.cuts[site].error}, error, -1.0))
    passes.append(({(0, "resid_pre"): each * frozen.weights.W_E[TOKENS]}, run.tokens, 1.0))
    for changes, nodes, factor in passes:
        out = FrozenPass(run, changes)
        for own, row in zip(run.parts, rows, strict=True):
            torch.testing.assert_close(out.change(own).T, factor * row[:, nodes], rtol=0, atol=1e-5)
    (first, _, _), (second, _, _) = passes[0], passes[3]
    both = {site: first.get(site, 0)[:1] if site in first else second[site][:1] for site in {*first, *second}}
    together = FrozenPass(run, both).last
    alone = [FrozenPass(run, {s: v[:1] for s, v in one.items()}).last for one in (first, second)]
    torch.testing.assert_close(together - frozen.last, sum(alone) - 2 * frozen.last, rtol=0, atol=1e-5)
