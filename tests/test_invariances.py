"""What leaves a graph as it is, and dictionaries that make one graph: other tables of the identities of circuits."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from equivalents import own_cross_layer, own_heads, own_neurons, own_outputs
from frozen_toy import FrozenToy
from makes import FEW, MAKES, TOKENS, WIDE, Make, merged, model, stand
from test_identities import cached

import saekit
from saekit.circuits.places import Heads, Neurons, Stand
from saekit.circuits.targets import Logit
from saekit.circuits.trace import trace, traced
from saekit.graph import Graph
from saekit.models import Model, load_model


def turned(m: Model, stands: list[Stand], order: torch.Tensor, centred: bool) -> "tuple[Model, list[Stand]]":
    """The same model and dictionaries in another basis of the stream, with the features in another order.

    Where norms take the mean off, the basis keeps the mean's direction. ``order`` goes by blocks of 24, within which the
    features of all kinds are alike.
    """
    g = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(torch.randn(WIDE, WIDE, generator=g, dtype=torch.float64))[0]
    if centred:
        ones = torch.full((WIDE, 1), WIDE**-0.5, dtype=torch.float64)
        basis = torch.linalg.qr(torch.cat([ones, torch.randn(WIDE, WIDE - 1, generator=g).double()], 1))[0]
        inner = torch.linalg.qr(torch.randn(WIDE - 1, WIDE - 1, generator=g).double())[0]
        turn = basis @ torch.block_diag(torch.ones(1, 1).double(), inner) @ basis.T
    maps = order[48:, None] - 48  # of MOLTs the second half of the features has two rows each
    orders = {
        96: order,
        48: order[:48],
        144: torch.cat([order[:48], (48 + 2 * maps + torch.arange(2)).flatten()]),
    }

    @torch.no_grad()
    def move(module: torch.nn.Module, features: bool) -> Any:
        out = copy.deepcopy(module)
        for name, tensor in out.state_dict().items():
            if name.endswith(("norm.weight", "layernorm.weight", ".scale")):
                continue
            new = tensor
            for axis, length in enumerate(tensor.shape):
                if length % WIDE == 0:
                    parts = new.unflatten(axis, (-1, WIDE)).movedim(axis + 1, -1)
                    new = (parts @ turn.T.to(parts)).movedim(-1, axis + 1).flatten(axis, axis + 1)
                if features and length in orders:
                    own = order[48:] - 48 if name.startswith("parts.1") else orders[length]
                    new = new.index_select(axis, own)
            tensor.copy_(new)
        return out

    moved = [one if isinstance(one, Neurons | Heads) else move(one, True) for one in stands]
    return load_model(move(m.module, False), name="toy"), moved


@pytest.mark.parametrize("make, kinds, double", [(make, kinds, True) for make, kinds, _ in FEW])
def test_neither_basis_nor_order_matters(make: Make, kinds: tuple[str, ...], double: bool) -> None:
    """I13: the basis of the residual stream, and the order of features."""
    m = model(make, double)
    with torch.no_grad():  # a norm's weights are of one basis; they can be folded into what reads it
        for name, p in m.module.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                p.fill_(1.0)
    stands = [stand(name, m) for name in kinds]
    g = torch.Generator().manual_seed(5)
    order = torch.cat([24 * i + torch.randperm(24, generator=g) for i in range(4)])
    turned_model, moved = turned(m, stands, order, make.norm in ("layer", "pre and post"))
    old = [isinstance(one, Neurons | Heads) for one in stands]
    one = merged(trace(m, stands, TOKENS, [3, 5]), lambda s, layer, place: (s, place))
    two = merged(trace(turned_model, moved, TOKENS, [3, 5]), lambda s, layer, place: (s, place if old[s] else int(order[place])))  # fmt: skip
    assert one[0] == two[0]
    np.testing.assert_allclose(two[1], one[1], rtol=0, atol=1e-10 if double else 1e-5)


def folded(m: Model) -> Model:
    """The same model with the weights and biases of the norms before its layers in the layers."""
    module = copy.deepcopy(m.module)
    with torch.no_grad():
        pairs = [(module.norm, (module.lm_head,))]
        for layer in module.layers:
            a, mlp = layer.self_attn, layer.mlp
            before = layer.pre_feedforward_layernorm if layer.post_norms else layer.post_attention_layernorm
            gates = () if mlp.gate_proj is None else (mlp.gate_proj,)
            pairs += [
                (layer.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)),
                (before, (mlp.up_proj, *gates)),
            ]
        for norm, readers in pairs:
            for reader in readers:
                if getattr(norm, "bias", None) is not None:
                    reader.bias.add_(reader.weight @ norm.bias)
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)
            if getattr(norm, "bias", None) is not None:
                norm.bias.zero_()
    return load_model(module, name="toy")


@pytest.mark.parametrize(
    "make, double",
    [
        (Make("layer", "learned", "swiglu", "GQA"), True),
        (Make("pre and post", "rotary", "gelu", "MHA"), False),
    ],
)
def test_folding_norms_moves_biases_alone(make: Make, double: bool) -> None:
    """I13: over neurons, heads and dictionaries of the stream, which read nothing behind a norm."""
    m = model(make, double)
    for kinds in (("neurons", "heads"), ("topk", "switch")):
        stands = [stand(name, m) for name in kinds]
        one, two = (
            merged(trace(it, stands, TOKENS, [3, 5]), lambda s, _, p: (s, p)) for it in (m, folded(m))
        )
        assert one[0] == two[0]
        np.testing.assert_allclose(two[1], one[1], rtol=0, atol=1e-10 if double else 1e-5)


@pytest.mark.parametrize(
    "make, kinds, double", [*FEW[:2], *(pytest.param(*row, marks=pytest.mark.slow) for row in FEW[2:])]
)
def test_neither_batches_nor_budgets_lose_anything(make: Make, kinds: tuple[str, ...], double: bool) -> None:
    """I13: the batch's size; I11: rows close however few features get one, and scores don't rise."""
    c = cached(make, kinds, double)
    given: Any = [3, *c.targets[1:]]
    other = trace(c.model, c.stands, TOKENS, given, batch=29)
    np.testing.assert_allclose(
        other.rows.toarray(), c.graph.rows.toarray(), rtol=0, atol=1e-10 if double else 1e-6
    )
    small = trace(c.model, c.stands, TOKENS, given, budget=20, batch=20)
    small.check(10 * c.near, 100 * c.near)
    assert small.of_kind("feature").sum() == 20 and small.of_kind("pruned").sum() == 1
    assert small.scores().completeness <= c.graph.scores().completeness + 1e-6
    assert small.scores().replacement <= c.graph.scores().replacement + 1e-6


def test_the_same_input_makes_the_same_bytes_on_any_number_of_threads() -> None:
    """I13."""
    c = cached(*FEW[1])
    texts, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            graph = trace(c.model, c.stands, TOKENS, [3, 5], batch=32).prune(0.9, 0.9)
            texts.append(json.dumps(graph.to_json()))
    finally:
        torch.set_num_threads(threads)
    assert texts[0] == texts[1]


def rows_of(
    stands: list[Any], m: Model, name: Callable[[int, int, int], Any]
) -> "tuple[Graph, tuple[dict[Any, int], np.ndarray]]":
    g = trace(m, stands, TOKENS, [3, Logit(5) - Logit(7)])
    return g, merged(g, name)


def equivalent_dictionaries_make_one_graph(make: Make, double: bool) -> None:
    """I7, I8: an MLP's neurons as such, as transcoders, as a diagonal cross-layer transcoder and as SAEs of its output;
    heads as such and as a Lorsa of a feature for each sign of each dimension. Nothing is left to errors.
    """
    m, near = model(make, double), 1e-10 if double else 1e-5
    neurons: list[Stand] = [Neurons(f"layers.{i}.mlp") for i in range(2)]
    heads: list[Stand] = [Heads(f"layers.{i}.self_attn") for i in range(2)]
    for builtin, others, name in (
        (neurons, (own_neurons, own_cross_layer, own_outputs), lambda _, layer, place: (layer, place % 20)),
        (heads, (own_heads,), lambda _, layer, place: (layer, place // 12 * 6 + place % 6)),
    ):
        plain = (lambda _, layer, place: (layer, place)) if builtin is heads else name
        _, (names, expected) = rows_of(builtin, m, plain)
        assert np.abs(expected).max() > 0.1 and len(names) > 200
        for make_own in others:
            g, found = rows_of(make_own(m), m, name)
            both = [key for key in names if key in found[0]]
            one, two = ([table[key] for key in both] for table in (names, found[0]))
            np.testing.assert_allclose(
                found[1][np.ix_(two, two)], expected[np.ix_(one, one)], rtol=0, atol=near
            )
            # only one of them may have a feature whose value is rounding, and the dictionaries have errors
            alone = [(found[1], at) for key, at in found[0].items() if key not in names]
            alone += [(expected, at) for key, at in names.items() if key not in found[0]]
            # I7's 1e-6 is for exact dictionaries; in fp32 an SAE's pseudo-inverse is one only to I8's 1e-5
            most = near if double or make_own is own_outputs else 1e-6
            assert all(np.abs(rows[:, at]).max() <= most for rows, at in alone)
            assert len(both) > 200
            scores = g.scores()
            assert scores.replacement == pytest.approx(1, abs=1e-6)
            assert scores.completeness == pytest.approx(1, abs=1e-6)


def test_equivalent_dictionaries_make_one_graph() -> None:
    equivalent_dictionaries_make_one_graph(Make("layer", "learned", "relu", "GQA"), True)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("make", [make for make in MAKES if make.activation == "relu"])
def test_equivalent_dictionaries_make_one_graph_in_every_make(make: Make, double: bool) -> None:
    equivalent_dictionaries_make_one_graph(make, double)


def through(layer: Any, scores: torch.Tensor, at: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The residual and OV paths of a layer, with the norm's sizes and patterns as they are, of [source, seq, d]."""
    a, norm, was = layer.self_attn, layer.input_layernorm, at["resid_pre"]
    centre = (
        (lambda t: t - t.mean(-1, keepdim=True)) if isinstance(norm, torch.nn.LayerNorm) else (lambda t: t)
    )
    read = x
    if not isinstance(norm, torch.nn.Identity):
        size = (centre(was).square().mean(-1, keepdim=True) + norm.eps).sqrt()
        read = centre(x) / size * norm.weight
    return x + gathered(a, scores, read @ a.v_proj.weight.T)


def gathered(a: Any, scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What a layer writes of values [source, seq, d_kv]."""
    heads = values.unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
    heads = heads.repeat_interleave(len(scores) // heads.shape[1], 1)
    return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2) @ a.o_proj.weight.T


@pytest.mark.parametrize("make", [Make("layer", "learned", "relu", "GQA"), Make("rms", "rotary", "swiglu", "MHA"), Make("none", "learned", "silu", "GQA")])  # fmt: skip
@torch.no_grad()
def test_empty_dictionaries_leave_the_direct_paths(make: Make) -> None:
    """I7: with nothing written but errors, replacement is the share of tokens, positions and attention's biases
    on the residual and OV paths, by the model's tensors alone.
    """
    m = model(make, double=True)
    stands = []
    for i in range(2):
        d = saekit.create("transcoder", d_in=WIDE, n_features=8, selection="relu", normalise="none").double()
        d.reads, d.writes = (f"layers.{i}.mlp:in",), (f"layers.{i}.mlp:out",)
        d.b_enc.fill_(-1e4)
        stands.append(d)
    g, run = trace(m, stands, TOKENS, 3), traced(m, stands, TOKENS)
    with torch.enable_grad():
        oracle = FrozenToy(m.module, run)
    module, seen, each = m.module, run.frozen.seen, torch.eye(len(TOKENS), dtype=torch.float64)[:, :, None]
    sources = [each * module.embed_tokens.weight[TOKENS]]
    if module.embed_positions is not None:
        sources.append(each * module.embed_positions.weight[: len(TOKENS)])
    for layer, scores, at in zip(module.layers, oracle.scores, seen, strict=True):
        a, beta = layer.self_attn, getattr(layer.input_layernorm, "bias", None)
        sources = [through(layer, scores, at, x) for x in sources]
        value = a.v_proj.bias + (0 if beta is None else a.v_proj.weight @ beta)
        sources += [gathered(a, scores, each * value) + each * a.o_proj.bias, each * at["mlp_out"]]
    back = module.lm_head.weight[3] - module.lm_head.weight.mean(0)
    end, last = module.lm_head.bias[3] - module.lm_head.bias.mean(), [x[:, -1] for x in sources]
    if make.norm != "none":
        mean = seen[-1]["resid_post"][-1].mean() if make.norm == "layer" else 0.0
        size = ((seen[-1]["resid_post"][-1] - mean).square().mean() + module.norm.eps).sqrt()
        last = [x - x.mean(-1, keepdim=True) if make.norm == "layer" else x for x in last]
        last = [x / size * module.norm.weight for x in last]
        end = end + (back @ module.norm.bias if make.norm == "layer" else 0.0)
    mass = [float((x @ back).abs().sum()) for x in last]
    errors = mass[-1] + mass[-3]
    share = 1 - errors / (sum(mass) + abs(float(end)))
    assert not g.of_kind("feature").any() and 0.05 < share < 0.95
    assert g.scores().replacement == pytest.approx(share, abs=1e-10)
