"""Attribution graphs close where kinds are mixed or missing, and what cannot be traced is refused; for all else see test_identities."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from test_weights import TOYS, toy
from tokenizers.processors import TemplateProcessing

import saekit
from saekit.circuits.places import Heads, Neurons
from saekit.circuits.targets import Logit, Target
from saekit.circuits.trace import trace, traced
from saekit.graph import Graph
from saekit.models import Model, load_model
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


def test_rows_close_where_kinds_are_mixed() -> None:
    m = toy("parallel, norms of queries")
    mixed = [stand(n, m) for n in ("topk", "lorsa", "molt")]
    check(trace(m, [*mixed, Neurons("blocks.0.mlp"), Heads("blocks.0.self_attn")], TOKENS))
    check(trace(m, [stand("clt", m), stand("jumprelu", m)], TOKENS, batch=7))


def test_what_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users run without checks of shapes
    m = toy("layer norms, learned")
    two = saekit.create("crosscoder", d_in=(32, 32), n_features=64, k=4)
    two.reads = two.writes = ("layers.0", "layers.1")
    narrow = saekit.create("topk", d_in=16, n_features=64, k=4)
    narrow.reads = narrow.writes = ("layers.0",)
    inside = saekit.create("topk", d_in=64, n_features=64, k=4)
    inside.reads = inside.writes = ("layers.0.mlp.act_fn",)
    other = stand("topk", m)
    other.card = {"data": {"model": {"name": "another", "class": "Toy", "parameters": 5, "digest": "0" * 16}}}
    for stands, prompt, target, words in (
        (other, TOKENS, None, "was trained on model 'another' with other weights than model 'toy'"),
        (two, TOKENS, None, "reads layers.0, layers.1 at once"),
        (narrow, TOKENS, None, "d_in = 16 and d_out = 16 stands where the model is 32 and 32 wide"),
        (inside, TOKENS, None, "is inside of what a circuit takes as one step"),
        ([stand("topk", m), stand("topk", m)], TOKENS, None, "is written twice"),
        ([], TOKENS, [64], "target 64 is no token"),
        ([], TOKENS, [], "target is empty"),
        ([], TOKENS.repeat(3), None, "prompt has 36 tokens and model 'toy' reads 32"),
        ([], TOKENS[:0], None, "give one sequence of at least one token"),
        ([], TOKENS + 60, None, r"token \d+ of the prompt is none; the model has 0 to 63"),
        ([], [3, -1], None, "token -1 of the prompt is none"),
        ([], "text", None, "has no tokenizer; give token ids"),
        ([], 3.5, None, "prompt has numbers of type torch.float32; give whole numbers"),
        ([], torch.tensor(3.5), None, "prompt has numbers of type torch.float32; give whole numbers"),
        ([], TOKENS, [3, Logit(3)], "target '3' is given 2 times"),
        ([], TOKENS, [Logit(3, p) for p in (1, 2, -11)], r"target '3 \(position 1\)' is given 2 times"),
        ("nowhere/run", TOKENS, None, "nowhere/run"),
        (Neurons("blocks.0.self_attn"), TOKENS, None, "is no MLP"),
        (Heads("blocks.0.mlp"), TOKENS, None, "is no attention layer"),
    ):
        with pytest.raises(SaekitError, match=words):
            trace(m, stands, prompt, target)
    for terms in (("a", "b"), ("a", 1.0), (("a", "b"),)):
        with pytest.raises(SaekitError, match="of a logit is none; give"):
            Logit(terms)
    own = stand("topk", m)
    own.card = {"data": {"model": m.identity()}}
    trace(m, own, TOKENS)
    with pytest.raises(SaekitError, match=r"budget = 0 must be a whole number"):
        trace(m, own, TOKENS, budget=0)


def test_text_is_the_same_target_where_a_tokenizer_begins_texts() -> None:
    plain = load_model("code-lm")
    assert plain.tokenizer is not None
    tokenizer = deepcopy(plain.tokenizer)
    begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    path, begun = plain.tokenizer("path")["input_ids"], tokenizer("path")["input_ids"]
    assert begun == [0, *path]
    graph = trace(load_model(plain.module, tokenizer=tokenizer), [], "import os", "path")
    assert graph.targets == (str(path[0]),) and graph.tokens[0] == 0


@pytest.mark.parametrize("names", [("abstopk", "transcoder"), ("transcoder",), ("abstopk",)])
def test_rows_that_descend_at_once_are_those_of_the_walk(names: tuple[str, ...]) -> None:
    """Also where another dictionary writes what is read, whose features then stand in between."""
    m = toy("layer norms, learned")
    run = traced(m, [stand(name, m) for name in names], TOKENS)
    for own in run.parts:
        some = torch.arange(len(own.part.positions))
        walked = run.rows(own.read, run.covectors(own, some), own.before)
        walked[:, own.bias] += own.part.b[some, None]
        torch.testing.assert_close(run.features(own, some), walked, rtol=0, atol=1e-5)
