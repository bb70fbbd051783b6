"""Spliced passes are the model's, and what patching says of nodes obeys its laws."""

from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from test_circuits import POINTS
from test_circuits import stand as make
from test_weights import TOYS, toy
from torch import Tensor

import saekit
from saekit.circuits.ablation import ABLATIONS, Yardstick, ablate, above, areas, complement
from saekit.circuits.patching import METHODS, Effects, edges, effects, measure, way
from saekit.circuits.places import Heads, Neurons
from saekit.circuits.spliced import Changes, Spliced
from saekit.models import load_model
from saekit.testbed import agreement, biographies
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import SaekitError

CLEAN, PATCH = torch.randint(64, (2, 2, 6), generator=torch.Generator().manual_seed(0))
PATCH[:, ::2] = CLEAN[:, ::2]
CASE = "layer norms, learned"


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def units(case: str) -> list[Any]:
    neurons = [] if TOYS[case].get("d_mlp") == 0 else [Neurons(f"blocks.{i}.mlp") for i in range(2)]
    return [*(Heads(f"blocks.{i}.self_attn") for i in range(2)), *neurons]


@cache
def stand(name: str) -> saekit.Dictionary:
    """A dictionary that was made for one toy, and fits into all."""
    return make(name, toy(CASE))


def mixed() -> list[Any]:
    """An SAE of a residual stream, features behind attention, a cross-layer transcoder, and an SAE of heads."""
    return [stand(name) for name in ("topk", "lorsa", "clt", "jumprelu")]


def identity(point: str) -> saekit.Dictionary:
    """A dictionary of every coordinate and its negative, which leaves nothing over."""
    d: Any = saekit.create("relu", d_in=32, n_features=64, normalise="none")
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    with torch.no_grad():
        d.encoder.copy_(both)
        d.atoms.weight.copy_(both)
    d.reads = d.writes = (point,)
    return d.double()


def flat(found: Effects) -> Tensor:
    return torch.cat([codes.values.detach() for codes in found.by_prompt])


@pytest.mark.parametrize("case", [*TOYS, *POINTS])
def test_the_pass_is_the_models(case: str) -> None:
    """Where nothing is set, where everything is set to what it is, and where functions give it back; gradients too."""
    m = toy(case if case in TOYS else CASE)
    spliced = Spliced(m, units(case) if case in TOYS else stand(case))
    with torch.no_grad():
        theirs = m.logits(m.inputs(CLEAN, torch.ones_like(CLEAN, dtype=torch.bool)))
    run = spliced.run(CLEAN)
    kinds = [group.kind for group in spliced.groups]
    features = [g for g, kind in enumerate(kinds) if kind == "feature"]
    errors = [g for g, kind in enumerate(kinds) if kind == "error"]
    held = Changes(
        {g: run.codes(g).detach() for g in features},
        {g: run.error(spliced.groups[g].writes[0]).detach() for g in errors},
    )
    given = Changes(dict.fromkeys(features, lambda codes: codes), dict.fromkeys(errors, lambda error: error))
    for changes in (None, held, given):
        torch.testing.assert_close(spliced.run(CLEAN, changes).out, theirs, rtol=0, atol=1e-5)
    plain, through = (
        torch.autograd.grad(metric(one.out).sum(), list(one.at.values()), allow_unused=True)
        for one in (run, spliced.run(CLEAN, given))
    )
    for a, b in zip(plain, through, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [CASE, *POINTS])
def test_what_nodes_write_adds_up(case: str) -> None:
    m = toy(CASE)
    spliced = Spliced(m, units(case) if case in TOYS else stand(case))
    run = spliced.run(CLEAN)
    for g, group in enumerate(spliced.groups):
        rows, _ = run.entries(g)
        for site, vectors in zip(group.writes, run.vectors(g, torch.arange(len(rows))), strict=True):
            total = (
                torch.zeros(CLEAN.numel(), vectors.shape[1])
                .index_add(0, rows, vectors)
                .view(*CLEAN.shape, -1)
            )
            torch.testing.assert_close(total, run.written_by(g, site), rtol=0, atol=1e-4)


def test_a_site_set_to_another_prompts_is_that_prompt() -> None:
    m = toy(CASE)
    spliced = Spliced(m, stand("topk"))
    with torch.no_grad():
        other = spliced.run(PATCH)
        (site,) = spliced.written
        swapped = spliced.run(CLEAN, Changes({0: other.codes(0)}, {1: other.error(site)}))
        torch.testing.assert_close(swapped.out, other.out, rtol=0, atol=1e-4)
        features_alone = spliced.run(CLEAN, Changes({0: other.codes(0)}))
    assert (features_alone.out - other.out).abs().max() > 1e-2


def test_all_methods_agree_where_the_model_is_linear() -> None:
    module = Transformer(TransformerConfig(norm="none", d_mlp=0))
    for layer in module.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)  # attention is even
        torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    stands = [stand(name) for name in ("topk", "lorsa", "omp", "jumprelu")]
    spliced = Spliced(load_model(module.double()), stands)
    for patch in (PATCH, None):
        exact, *others = (flat(effects(spliced, metric, CLEAN, patch, method)) for method in METHODS)
        assert exact.abs().max() > 0.1
        for other in others:
            torch.testing.assert_close(other, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patch", [PATCH, None])
def test_integrated_effects_of_a_site_add_up_to_patching_it(patch: Tensor | None) -> None:
    m = toy("no norms, gelu")
    m.module.double()
    spliced = Spliced(m, mixed())
    with torch.no_grad():
        start, end = spliced.run(CLEAN), None if patch is None else spliced.run(patch)
        patched = [spliced.run(CLEAN, Changes(added=way(start, end, unit))) for unit in spliced.units]
        true = torch.stack([metric(run.out) - metric(start.out) for run in patched])
        if end is not None:  # all of a residual stream
            torch.testing.assert_close(true[0], metric(end.out) - metric(start.out))
    missed = []
    for steps in (1, 4, 16):
        found = effects(spliced, metric, CLEAN, patch, steps=steps)
        sums = [sum(found.by_prompt[g].to_dense().sum((1, 2)) for g in unit) for unit in spliced.units]
        missed.append((torch.stack(sums) - true).abs().max().item())
    assert missed[0] > 1e-3 and missed[2] < missed[1] / 8  # as the square of the steps, or nearly
    assert missed[2] < 0.01 * true.abs().max()


def test_integrated_gradients_rank_as_exact_patching_does() -> None:
    """Where one token differs. Where many do, IG moves all of a site at once and exact patching one node: 0.82 to 0.93."""
    m = toy(CASE)
    m.module.double()
    patch = CLEAN.clone()
    patch[:, 2] = PATCH[:, 1]
    points = ("layers.0.self_attn:out", "layers.0.mlp:out", "layers.0:out")
    spliced = Spliced(m, [identity(point) for point in points])
    exact, integrated = (
        effects(spliced, metric, CLEAN, patch, method, steps=64) for method in ("exact", "integrated")
    )
    for codes, group in zip(exact.by_prompt, spliced.groups, strict=True):
        assert group.kind == "feature" or codes.values.abs().max() < 1e-9  # nothing is left over
    differs = flat(exact).abs() > 1e-9
    assert differs.sum() > 250
    assert spearmanr(flat(exact)[differs], flat(integrated)[differs]).statistic >= 0.95


@pytest.mark.parametrize("positions", [True, False])
def test_what_leaves_a_node_adds_up_to_its_effect(positions: bool) -> None:
    """The chain rule over the next nodes on each way, errors among them."""
    m = toy(CASE)
    others = [Heads("blocks.1.self_attn"), stand("transcoder"), stand("skip_transcoder")]
    spliced = Spliced(m, mixed() if positions else others)
    found = effects(spliced, metric, CLEAN, PATCH, "attribution")
    means, circuit = found.mean(positions), found.active(positions)
    graph = edges(spliced, metric, found, circuit, CLEAN, PATCH)
    own = torch.cat([mean[kept] for mean, kept in zip(means, circuit, strict=True)]).detach()
    assert len(graph.nodes) == len(own) and own.abs().max() > 0.1
    torch.testing.assert_close(graph.weights.sum(0), own, rtol=0, atol=1e-5)
    some = above(means, 0.02)
    part = edges(spliced, metric, found, some, CLEAN, PATCH)
    among = torch.cat([kept[on] for kept, on in zip(some, circuit, strict=True)])
    rows = torch.cat([among, torch.ones(1, dtype=torch.bool)])
    torch.testing.assert_close(part.weights, graph.weights[rows][:, among], rtol=0, atol=1e-6)
    assert 0 < len(part.nodes) < len(graph.nodes)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_everything_is_faithful_and_nothing_is_not(ablation: str) -> None:
    m = toy(CASE)
    spliced = Spliced(m, units(CASE) if ablation == "resample" else mixed())
    found = effects(spliced, metric, CLEAN, PATCH, steps=2)
    yardstick = Yardstick(spliced, metric, CLEAN, PATCH, ablation)
    assert yardstick.whole == pytest.approx(metric(spliced.run(CLEAN).out).mean().item(), abs=1e-5)
    for positions in (True, False):
        every = [torch.ones_like(on) for on in found.active(positions)]
        assert yardstick.faithfulness(every) == pytest.approx(1, abs=1e-3)
        assert yardstick.completeness(every) == pytest.approx(0, abs=1e-3)
        assert yardstick.faithfulness(complement(every)) == pytest.approx(0, abs=1e-3)
    curve = yardstick.curve(found, shares=(0.0, 0.1, 1.0))
    assert curve == [pytest.approx(0, abs=1e-3), curve[1], pytest.approx(1, abs=1e-3)]


def test_mean_ablation_of_a_last_site_is_its_mean() -> None:
    """By hand: at the last residual stream nothing responds."""
    m = toy(CASE)
    d = stand("matching_pursuit")
    spliced = Spliced(m, d, readout="layers.1:out")
    weight = torch.randn(32, generator=torch.Generator().manual_seed(4))
    yardstick = Yardstick(spliced, lambda x: x[:, -1] @ weight, CLEAN, PATCH)
    x, other = (spliced.run(tokens).out.detach()[:, -1] for tokens in (CLEAN, PATCH))
    kept = [torch.zeros(96, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    kept[0][::2] = True
    inside, outside = (d.encode(y).to_dense().detach() for y in (x, other))
    inside[:, 1::2], outside[:, ::2] = 0, 0
    made = [d.decode(saekit.types.Codes.from_dense(codes)).detach() for codes in (inside, outside)]
    mean = (made[1] + other - d(other).detach()).mean(0) - d.norm_out.invert(d.b_dec[None])[0].detach()
    assert yardstick._kept(kept) == pytest.approx(((made[0] + mean) @ weight).mean().item(), abs=1e-4)


def test_ablated_features_are_gone_and_errors_stay() -> None:
    m = toy(CASE)
    d = stand("matching_pursuit")
    spliced = Spliced(m, [stand("clt"), d], readout="layers.1:out")
    x = spliced.run(CLEAN).out
    features = d.encode(x).indices.unique()[:20].long()
    written = torch.zeros(x.numel() // 32, 32)
    codes = d.encode(x)
    gone = torch.isin(codes.indices.long(), features)
    written.index_add_(0, codes.row_ids()[gone], d.written_by(codes, x)[gone].detach())
    torch.testing.assert_close(
        ablate(spliced, CLEAN, {1: features}), x - written.view_as(x), rtol=0, atol=1e-4
    )
    late = {0: range(48, 96)}  # of the second layer: the first MLP writes what it did
    before, after = (Spliced(m, spliced_stands, readout=None) for spliced_stands in ([stand("clt")], []))
    changed = ablate(before, CLEAN, late)
    assert (changed - after.run(CLEAN).out).abs().max() > 1e-2
    assert torch.equal(ablate(before, CLEAN, {0: []}), before.run(CLEAN).out)


def test_areas_are_mibs() -> None:
    assert areas([1.0] * 10) == (pytest.approx(0.999), 0.0)
    assert areas([0.0, 2.0], [0.0, 1.0]) == (1.0, 1.0)
    assert areas([0.0, 1.0, 1.0], [0.0, 0.5, 1.0]) == (0.75, 0.25)


def test_what_means_nothing_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users run without checks of shapes
    m = toy(CASE)
    d = stand("topk")
    spliced = Spliced(m, d)
    found = effects(spliced, metric, CLEAN, PATCH, "exact")
    whole = [torch.ones(96, dtype=torch.bool), torch.ones(1, dtype=torch.bool)]
    two: Any = saekit.create("crosscoder", d_in=(32, 32), n_features=64, k=4)
    two.reads = two.writes = ("layers.0", "layers.1")
    narrow: Any = saekit.create("topk", d_in=16, n_features=64, k=4)
    narrow.reads = narrow.writes = ("layers.0",)
    for words, call in (
        (r"metric gives shape \(2, 6\) for what is read, \(2, 6, 64\); return one number", lambda: effects(spliced, lambda x: x[..., 0], CLEAN)),
        ("metric gives type float", lambda: measure(lambda x: 0.5, spliced.run(CLEAN))),
        ("metric is not differentiable", lambda: effects(spliced, lambda x: x.argmax(-1)[:, -1].float(), CLEAN)),
        ("method 'exakt' is unknown; did you mean 'exact'", lambda: effects(spliced, metric, CLEAN, method="exakt")),
        ("steps = 0 and batch = 256 must be at least 1", lambda: effects(spliced, metric, CLEAN, steps=0)),
        (r"patch prompts are \(2, 5\) and clean ones \(2, 6\)", lambda: effects(spliced, metric, CLEAN, PATCH[:, 1:])),
        ("there are no nodes", lambda: effects(Spliced(m, []), metric, CLEAN)),
        ("have no gradients, of which edges are made", lambda: edges(spliced, metric, found, whole, CLEAN, PATCH)),
        (r"circuit has \(95,\) for group 0 of 2; give a mask \(96,\) or \(6, 96\)", lambda: Yardstick(spliced, metric, CLEAN, PATCH).faithfulness([whole[0][1:], whole[1]])),
        (r"circuit has int64 for group 0; give a mask of bools, as in circuit\[0\] > 0", lambda: Yardstick(spliced, metric, CLEAN, PATCH).faithfulness([part.long() for part in whole])),
        ("circuit has float32 for group 1", lambda: Yardstick(spliced, metric, CLEAN, PATCH).completeness([whole[0], whole[1].float()])),
        ("circuit has list for group 1", lambda: edges(spliced, metric, effects(spliced, metric, CLEAN), [whole[0], [True]], CLEAN)),
        ("ablation 'meen' is unknown; did you mean 'mean'", lambda: Yardstick(spliced, metric, CLEAN, PATCH, "meen")),
        ("other is not given, and ablation 'mean'", lambda: Yardstick(spliced, metric, CLEAN)),
        ("other prompts have 5 tokens and the metric's 6", lambda: Yardstick(spliced, metric, CLEAN, PATCH[:, 1:])),
        ("with all nodes and with none", lambda: Yardstick(spliced, lambda x: 0 * x[:, 0, 0], CLEAN, PATCH)),
        ("feature 96 of stand 0 is none; it has 0 to 95", lambda: ablate(spliced, CLEAN, {0: [96]})),
        ("stand 1 is none; there are 1", lambda: ablate(spliced, CLEAN, {1: [0]})),
        (r"tokens have shape \(6,\); give ids", lambda: spliced.run(CLEAN[0])),
        ("tokens are no prompts of one length", lambda: spliced.run([[1, 2], [3]])),
        ("tokens are no prompts of one length", lambda: spliced.run(row for row in CLEAN.tolist())),
        ("prompts have 36 tokens and model 'toy' reads 32", lambda: spliced.run(CLEAN.repeat(1, 6))),
        ("token 64 is none; the model has 0 to 63", lambda: spliced.run([[64]])),
        ("group 1 is not one of features", lambda: spliced.run(CLEAN, Changes({1: spliced.run(CLEAN).codes(0)}))),
        (r"group 0 is set to codes of 96 features on \(1, 6\); it has 96 on \(2, 6\)", lambda: spliced.run(CLEAN, Changes({0: spliced.run(CLEAN[:1]).codes(0)}))),
        ("nothing writes", lambda: spliced.run(CLEAN, Changes(added={(1, "mlp_out"): torch.zeros(32)}))),
        ("is written by two dictionaries", lambda: Spliced(m, [d, d])),
        ("is written behind 'layers.0.mlp:in', which metrics read", lambda: Spliced(m, d, readout="layers.0.mlp:in")),
        ("is inside of what a circuit takes as one step", lambda: Spliced(m, [], readout="layers.0.mlp.act_fn")),
        ("reads layers.0, layers.1 at once", lambda: Spliced(m, two)),
        ("d_in = 16 and d_out = 16 stands where the model is 32 and 32 wide", lambda: Spliced(m, narrow)),
        ("nowhere/run", lambda: Spliced(m, "nowhere/run")),
        ("<generator object .* is no dictionary; give a dictionary or its path", lambda: Spliced(m, (one for one in [d]))),
        ("is no MLP", lambda: Spliced(m, Neurons("blocks.0.self_attn"))),
        ("is no attention layer", lambda: Spliced(m, Heads("blocks.0.mlp"))),
    ):  # fmt: skip
        with pytest.raises(SaekitError, match=words):
            call()


def test_verbs_agree_with_their_own_subjects() -> None:
    g = torch.Generator().manual_seed(0)
    a = agreement
    tokens = a.prompts(500, g).tokens
    noun = (tokens >= a.FIRST_NOUN) & (tokens < a.FIRST_VERB)
    plural = torch.where(noun, tokens - a.FIRST_NOUN >= a.NOUNS, tokens - a.FIRST_VERB >= a.VERBS)
    main = (tokens != a.END).int().argmin(1) - 1
    subject, verb = plural[:, 2], plural[torch.arange(500), main]
    assert (tokens[torch.arange(500), main] >= a.FIRST_VERB).all() and torch.equal(subject, verb)
    long = main == a.ACROSS
    assert torch.equal(plural[long, 5], plural[long, 6]) and (plural[long, 5] != subject[long]).any()
    clean, patch = a.pairs(200, g)
    assert ((clean.tokens != patch.tokens).sum(1) == 1).all() and (clean.tokens != patch.tokens)[:, 2].all()
    logits = torch.zeros(200, a.ACROSS, a.VOCABULARY).scatter(2, clean.answers[..., None].clamp(min=0), 5.0)
    right = (clean.answers[:, -1] >= a.FIRST_VERB + a.VERBS).long()
    assert (a.preference(logits, right) < 0).all() and (a.preference(logits, 1 - right) > 0).all()


def test_lives_show_gender_everywhere_and_the_field_in_some_words() -> None:
    b, g = biographies, torch.Generator().manual_seed(0)
    field, gender = b.drawn(500, g)
    tokens = b.lives(field, gender, g)
    assert tokens.shape == (500, b.LENGTH) and tokens.max() < b.VOCABULARY
    assert torch.equal((tokens[:, 1] - b.FIRST_NAME) // b.NAMES, gender)
    assert torch.equal(tokens[:, 3::4], (b.FIRST_PRONOUN + gender)[:, None].expand(-1, b.SENTENCES))
    kinds = torch.cat(
        [(tokens[:, 4::4] - b.FIRST_VERB) // b.VERBS, (tokens[:, 5::4] - b.FIRST_OBJECT) // b.OBJECTS], 1
    )
    assert ((kinds < 2).sum(1) == b.TOLD).all() and (
        kinds.where(kinds < 2, field[:, None]) == field[:, None]
    ).all()
    clean, patch = b.pairs(100, g)
    changed = torch.zeros(100, clean.tokens.shape[1], dtype=torch.bool)
    changed[:, [1, 3]] = True
    assert torch.equal(clean.tokens != patch.tokens, changed)
    assert torch.equal(
        clean.answers[:, -1] + patch.answers[:, -1], torch.full((100,), 2 * b.FIRST_PRONOUN + 1)
    )
