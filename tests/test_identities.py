"""The identities of circuits, over every make of model and every kind of dictionary: contracts over tables.

Normally a covering array of 16 rows is run, in which every two of norm, positions, activation, heads, precision and
kind of dictionary meet; the whole product is marked slow. Rows are fp32, at the tolerances of the identities, or fp64, at 1e-10.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from frozen_toy import FrozenToy
from test_circuits import OPTIONS, POINTS

import saekit
from saekit.circuits.attention_saes import by_source
from saekit.circuits.intervene import FrozenPass
from saekit.circuits.places import Heads, Neurons, Stand
from saekit.circuits.qk import Heads as Looking
from saekit.circuits.qk import loadings
from saekit.circuits.rows import Trace
from saekit.circuits.targets import Feature, Logit, Target, resolve
from saekit.circuits.trace import trace, traced
from saekit.circuits.verify import ablations
from saekit.graph import Graph
from saekit.graph.export import ids, read
from saekit.models import Model, load_model
from saekit.testbed.transformer import Transformer, TransformerConfig

# widths that no two axes of a tensor share, so that an axis of the residual stream is known by its length
WIDE, SIZES = 28, {"vocabulary": 50, "d_model": 28, "d_head": 6, "d_mlp": 20}
TOKENS = torch.randint(50, (12,), generator=torch.Generator().manual_seed(0))
NORMS: dict[str, dict[str, Any]] = {"layer": {}, "rms": {"norm": "rms"}, "none": {"norm": "none"}, "pre and post": {"post_norms": True}}  # fmt: skip
POSITIONS, ACTIVATIONS = ("learned", "rotary"), ("relu", "gelu", "swiglu", "silu")
HEADS = {"MHA": None, "GQA": 2}
# kinds that stand beside each other
GROUPS = (
    ("topk", "heads", "transcoder", "lorsa"), ("jumprelu", "clt", "switch"),
    ("omp", "molt", "skip_transcoder"), ("abstopk", "codebook", "matching_pursuit", "neurons"),
)  # fmt: skip
BUILT_IN: dict[str, Stand] = {"neurons": Neurons("layers.0.mlp"), "heads": Heads("layers.0.self_attn")}


class Make(NamedTuple):
    """What a model is made of."""

    norm: str
    positions: str
    activation: str
    heads: str


MAKES = [Make(*one) for one in itertools.product(NORMS, POSITIONS, ACTIVATIONS, HEADS)]
OTHERS = {
    "parallel, norms of queries": {"parallel": True, "qk_norm": True, "positions": "rotary"},
    "attention alone": {"d_mlp": 0, "positions": "none"},
}


def covering() -> "list[tuple[Make, tuple[str, ...], bool]]":
    """Make, kinds and precision: the orthogonal array of 4 x 4 over the field of four elements."""
    times = (0, 2, 3, 1)  # by its generator
    out = []
    for i, j in itertools.product(range(4), repeat=2):
        positions, heads = divmod(i ^ times[j], 2)
        make = Make(list(NORMS)[i], POSITIONS[positions], ACTIVATIONS[j], list(HEADS)[heads])
        out.append((make, GROUPS[i ^ j], bool((i ^ times[times[j]]) & 1)))
    return out


def model(make: "Make | str", double: bool = False) -> Model:
    """A toy of this make whose biases and norms are not those that it was born with."""
    options = OTHERS[make] if isinstance(make, str) else {
        **NORMS[make.norm], "positions": make.positions, "activation": make.activation, "n_kv": HEADS[make.heads],
    }  # fmt: skip
    module = Transformer(TransformerConfig(**{**SIZES, **options}))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    if double:
        module.double()
        if module.rotary_emb is not None:
            module.rotary_emb.float()  # angles are fp32 everywhere
    return load_model(module, name="toy")


def stand(name: str, m: Model) -> Stand:
    """A dictionary fitted to what the model has at its places, with biases."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    wide = 24 if name == "jumprelu" else WIDE
    d = saekit.create(name, d_in=wide, n_features=96, seed=1, **{"k": 4, **OPTIONS.get(name, {})})
    d.reads, d.writes = d.wiring.sites(list(POINTS[name]))
    tokens = torch.randint(50, (20, 12), generator=torch.Generator().manual_seed(1))
    seen = saekit.hooks.capture(lambda: m.module(tokens), {p: m.site(p) for p in d.points}, stop=False)
    d.to(m.module.lm_head.weight.dtype)
    seen = {point: value.detach() for point, value in seen.items()}
    d.prepare(d.gather([saekit.types.ActivationBatch(seen, torch.ones(20, 12, dtype=torch.bool), tokens)]))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for bias in (d.b_dec, getattr(d, "b_enc", None)):
            if bias is not None:
                bias.add_(0.1 * torch.randn(bias.shape, generator=g))
    return d


@dataclass(frozen=True)
class Case:
    """A prompt in a model with dictionaries, its graph, and the oracle's rows and values."""

    model: Model
    stands: list[Stand]
    double: bool
    run: Trace
    targets: list[Target]
    graph: Graph
    oracle: FrozenToy

    @property
    def near(self) -> float:
        """The tolerance of what is linear algebra."""
        return 1e-10 if self.double else 1e-5

    @property
    def rows(self) -> np.ndarray:
        """What the trace's nodes add to all features and targets."""
        return self.graph.rows.toarray()[:, : self.run.columns.n]

    def equal(self, found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=self.near)


def case(make: "Make | str", kinds: tuple[str, ...], double: bool) -> Case:
    m = model(make, double)
    stands = [stand(name, m) for name in kinds]
    run = traced(m, stands, TOKENS)
    direction = torch.randn(WIDE, generator=torch.Generator().manual_seed(3))
    given = [3, Logit(5) - Logit(7), Target("a direction", direction.to(run.frozen.last), 0.5, position=7)]
    targets: Any = resolve(run.frozen, m, given)
    return Case(m, stands, double, run, targets, trace(m, stands, TOKENS, given), FrozenToy(m.module, run))


def rows_close(c: Case) -> None:
    """I1: what adds to a feature, and its encoder's bias, is its pre-activation in the model's own pass."""
    values = c.oracle.values(c.targets).detach().numpy()
    assert np.linalg.norm(c.rows.sum(1) - values) <= c.near * np.linalg.norm(values)
    c.graph.check(c.near, 10 * c.near)
    c.equal(c.graph.nodes.value[c.graph.of], values)


def targets_close(c: Case) -> None:
    """I2, I3: the inputs of a target, and the totals of all leaves, add up to what the model itself says."""
    last = saekit.hooks.capture(
        lambda: c.model.module(TOKENS[None]), {"x": c.model.site("norm:out")}, stop=False
    )["x"][0]
    logits, direction = c.model.module.lm_head(last)[-1], c.targets[2].direction
    true = torch.stack([logits[3] - logits.mean(), logits[5] - logits[7], last[7] @ direction + 0.5])
    true = true.detach().numpy()
    most = c.near if c.double else 1e-4
    np.testing.assert_allclose(c.rows[-3:].sum(1), true, rtol=0, atol=most)
    np.testing.assert_allclose(c.graph.total_effects()[:, c.graph.leaves].sum(1), true, rtol=0, atol=most)


def rows_are_gradients(c: Case) -> None:
    """I4: every entry of every row, of all kinds of nodes, is the gradient of the frozen model."""
    c.equal(c.rows, c.oracle.rows(c.targets).numpy())


def interventions_are_columns(c: Case) -> None:
    """I5: every feature, error, token and position scaled by 0, 2 and -3; two of them add."""
    g, run, final = c.graph, c.run, c.run.frozen.weights.norm
    sources = np.flatnonzero(g.of_kind("feature", "error", "token", "position"))
    each = ablations(run, [[int(node)] for node in sources])
    sites = {site for one in each for site in one}
    seq = len(TOKENS)
    gone = {s: torch.stack([one.get(s, torch.zeros(seq, 24 if s[1] == "z" else WIDE).to(run.frozen.last)) for one in each]) for s in sites}  # fmt: skip

    def changes(taken: "dict[Any, torch.Tensor]") -> np.ndarray:
        """By how much features and targets change, [change, row]."""
        out = FrozenPass(run, taken)
        moved = out.last - run.frozen.last
        sizes = None if final is None else final.size(run.frozen.last)
        back = [
            t.direction if final is None else final.back(t.direction, sizes[t.position]) for t in c.targets
        ]
        ends = [moved[:, t.position] @ w for t, w in zip(c.targets, back, strict=True)]
        return torch.cat([*(out.change(own) for own in run.parts), torch.stack(ends, 1)], 1).numpy()

    for scale in (0.0, 2.0, -3.0):
        c.equal(changes({s: (1 - scale) * x for s, x in gone.items()}) / (scale - 1), c.rows[:, sources].T)
    one, two = np.random.default_rng(0).integers(len(sources), size=(2, 40))
    c.equal(changes({s: x[one] + 3 * x[two] for s, x in gone.items()}), -(c.rows[:, sources[one]] + 3 * c.rows[:, sources[two]]).T)  # fmt: skip


def scores_are_sums(c: Case) -> None:
    """I9: a score is the sum over pairs of nodes; a feature of what heads gather, over sources."""
    looking = Looking(c.run)
    for layer, scores in enumerate(c.oracle.scores):
        found = [*looking.layer(layer, 6), *looking.layer(layer, 11), looking.qk(layer, 2, 9, 4)]
        for one in found:
            true = float(scores[one.head[1], one.places[0], one.places[1]])
            products = one.query_parts.T @ one.key_parts
            c.equal([one.score, one.query.sum(), one.key.sum(), products.sum(dtype=np.float64)], true)
            c.equal(products.sum(1), one.query)
            c.equal(products.sum(0), one.key)
    for own in c.run.parts:
        part = own.part
        if own.read[1] == "z":
            c.equal(by_source(c.run.frozen, part, own.read).sum((1, 2)) + part.b, part.values)
        if part.patterns is not None:
            from_source = part.patterns[part.heads, part.positions] * (part.w @ c.run.frozen.at(own.read).T)
            c.equal(from_source.sum(1) + part.b, part.values)


def edges_are_loadings(c: Case) -> None:
    """I10: over all heads, and what goes by none, loadings add up to a row, of targets and of a feature."""
    own = c.run.parts[-1]
    feature = Feature(int(own.part.features[-1]), own.stand, int(own.part.positions[-1]))
    rows = {feature: c.rows[-4], **dict(zip(range(3), c.rows[-3:], strict=True))}
    for target, row in rows.items():
        found = loadings(c.run, target if isinstance(target, Feature) else c.targets[target])
        c.equal(found.heads.sum((0, 1)) + found.rest, row)


def pruning_loses_nothing(c: Case) -> None:
    """I11: rows close through the pruned node, and scores never rise with what is left out."""
    last, whole = None, c.graph.scores()
    for share in (0.98, 0.8, 0.4):
        part = c.graph.prune(share, share)
        part.check(10 * c.near, 100 * c.near)
        now = part.scores()
        for before in (whole, last or whole):
            assert (
                now.replacement <= before.replacement + 1e-6
                and now.completeness <= before.completeness + 1e-6
            )
        last = now
    given = [3, *c.targets[1:]]
    for budget in (20,):
        small = trace(c.model, c.stands, TOKENS, given, budget=budget, batch=20)
        small.check(10 * c.near, 100 * c.near)
        assert small.of_kind("feature").sum() == budget and small.of_kind("pruned").sum() == 1
        assert small.scores().completeness <= whole.completeness + 1e-6


NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
}


def files_are_whole(c: Case) -> None:
    """I12: ids are unique, the JSON has what its readers need, and comes back as it was."""
    names = ids(c.graph)
    assert len(set(names)) == len(names)
    small = c.graph.prune(0.7, 0.7)
    data = json.loads(json.dumps(small.to_json()))
    assert all(data["metadata"][key] for key in ("slug", "scan", "prompt_tokens", "prompt"))
    assert {"nodes", "links", "qParams"} <= data.keys() and "clerps" in data["qParams"]
    known = {node["node_id"] for node in data["nodes"]}
    for node in data["nodes"]:
        assert all(isinstance(node[key], kind) for key, kind in NODE.items()), node
        assert 0 <= node["ctx_idx"] < len(TOKENS)
        if node["feature_type"] == "logit":
            assert re.fullmatch(r'Output "[^"]*" \(p=\d\.\d+\)', node["clerp"])
    assert all(link["source"] in known and link["target"] in known for link in data["links"])
    back = read(data)
    assert abs(back.rows - small.rows).nnz == 0 and back.rows.dtype == small.rows.dtype
    for name in ("kind", "layer", "position", "stand", "place", "value"):
        np.testing.assert_array_equal(getattr(back.nodes, name), getattr(small.nodes, name))


LAWS: dict[str, Callable[[Case], None]] = {
    "I1": rows_close, "I2, I3": targets_close, "I4": rows_are_gradients, "I5": interventions_are_columns,
    "I9": scores_are_sums, "I10": edges_are_loadings, "I11": pruning_loses_nothing, "I12": files_are_whole,
}  # fmt: skip
cached = functools.lru_cache(maxsize=None)(case)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("make, kinds, double", covering())
def test_an_identity_holds(law: str, make: Make, kinds: tuple[str, ...], double: bool) -> None:
    LAWS[law](cached(make, kinds, double))
