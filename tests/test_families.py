"""Dead features, detectors, positional ones and suppression: planted ones are found, and counts are exact."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import saekit
from saekit.autointerp import families as module
from saekit.autointerp.families import FIRINGS, Families, FamilyCollector, families, wilson
from saekit.autointerp.grams import Grams
from saekit.autointerp.neurons import logits_of, neurons_of
from saekit.hooks import intervene
from saekit.models import load_model
from saekit.testbed.detectors import DetectorsConfig, PlantedDetectors, planted_detectors
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import Codes

WORLDS = {
    "small": (DetectorsConfig(), 500),
    "wide": (DetectorsConfig(vocabulary=64, context=32, random=200), 1000),
    "many": (DetectorsConfig(vocabulary=90, context=96, random=100, dead=5, tokens=4, bigrams=4, trigrams=8), 400),
}  # fmt: skip


def found_in(world: PlantedDetectors, rows: int, **options: Any) -> Families:
    return families(world.model, world.text(rows, 1), hook_point="mlp", max_tokens=10**6, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", WORLDS)
def test_planted_families_are_found_and_nothing_else(size: str, seed: int) -> None:
    config, rows = WORLDS[size]
    world = planted_detectors(config, seed)
    found = found_in(world, rows)
    assert set(found.dead) == world.dead and not found.undecided and not found.rare
    assert {i: frozenset(d.grams) for i, d in found.detectors.items()} == dict(world.detectors)
    assert all(d.n == len(d.grams[0]) and d.exact and d.coverage == 1.0 for d in found.detectors.values())
    assert {i: p.kind for i, p in found.positional.items()} == dict(world.positional)
    assert {i for i, rank in found.ranks.items() if rank < 0.05} == world.suppressing
    assert {i for i, rank in found.ranks.items() if rank < 0.95} == world.suppressing
    assert found.suppression is not None and found.suppression.suppressing == len(world.suppressing)


def slow(
    tokens: np.ndarray, documents: np.ndarray, mask: np.ndarray, on: np.ndarray, n: int
) -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]:
    """Grams at which a feature fires, and those of the text, by the definition."""
    own: Counter[tuple[int, ...]] = Counter()
    text: Counter[tuple[int, ...]] = Counter()
    for r in range(len(tokens)):
        for p in range(n - 1, tokens.shape[1]):
            span = slice(p - n + 1, p + 1)
            if mask[r, span].all() and len(set(documents[r, span].tolist())) == 1:
                gram = tuple(tokens[r, span].tolist())
                text[gram] += 1
                own[gram] += int(on[r, p])
    return +own, text


def made(seed: int, rows: int, seq: int = 12, vocabulary: int = 12, n_features: int = 40) -> tuple[Tensor, ...]:  # fmt: skip
    """Random text with masks, borders and padding, and features that fire on tokens or grams, more or less."""
    g = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(rows, seq, generator=g).square() * vocabulary).long()
    documents = (torch.rand(rows, seq, generator=g) < 0.1).long().cumsum(1)
    mask = torch.rand(rows, seq, generator=g) < 0.93
    long = torch.randint(seq // 2, seq + 1, (rows, 1), generator=g)
    padding = torch.arange(seq) >= long
    documents[padding], mask[padding] = -1, False
    on = torch.zeros(rows, seq, n_features)
    for f in range(n_features):
        at = torch.ones_like(mask)
        for back in range(1 + f % 3):  # on grams of up to three tokens, each of the 1 to 8 commonest
            at &= (
                (tokens.roll(back, 1) <= f % 8) & mask.roll(back, 1) & (documents.roll(back, 1) == documents)
            )
            at[:, :back] = False
        noise = torch.rand(rows, seq, generator=g)
        on[..., f] = at & (noise > 0.1) | (noise < 0.004 * (f % 4))
    return tokens, documents, mask, on


def collected(tokens: Tensor, documents: Tensor | None, mask: Tensor, dense: Tensor, cuts: Any = (), **options: Any) -> Families:  # fmt: skip
    collector = FamilyCollector(dense.shape[-1], **options)
    edges = [0, *cuts, len(tokens)]
    for begin, end in itertools.pairwise(edges):
        part = slice(begin, end)
        own = None if documents is None else documents[part]
        collector.add(tokens[part], own, mask[part], Codes.from_dense(dense[part]))
    return collector.result()


@pytest.mark.parametrize("seed", range(3))
def test_detectors_are_those_of_the_definition(seed: int) -> None:
    tokens, documents, mask, on = made(seed, 600, vocabulary=8)
    found = collected(tokens, documents, mask, on)
    text, owner, kept = tokens.numpy(), documents.numpy(), mask.numpy()
    n_detectors = 0
    for f in range(on.shape[-1]):
        fires = on[..., f].bool().numpy()
        fired = int((fires & kept).sum())
        assert found.n_active[f] == fired
        covered, reached = {}, {}
        for n in (1, 2, 3):
            own, whole = slow(text, owner, kept, fires, n)
            best = sorted(own.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
            covered[n] = sum(c for _, c in best)
            some = next((i for i in range(1, len(best) + 1) if 20 * (fired - sum(c for _, c in best[:i])) <= fired), 5)  # fmt: skip
            reached[n] = (best[:some], sum(c for _, c in best[:some]) / sum(whole[g] for g, _ in best[:some]))
        assert covered[1] >= covered[2] >= covered[3]  # why the least n by coverage would always be 1
        sizes = [n for n in (1, 2, 3) if 20 * (fired - covered[n]) <= fired]
        if fired < FIRINGS or not sizes:
            assert f not in found.detectors
            continue
        n_detectors += 1
        n = next((n for n in sizes if reached[n][1] >= 0.5), 1)
        d, (best, reach) = found.detectors[f], reached[n]
        assert d.n == n and d.exact and dict(zip(d.grams, d.counts, strict=True)) == dict(best)
        assert d.coverage == sum(d.counts) / fired and d.reach == reach
    assert (
        5 < n_detectors < 35 and not found.undecided and {d.n for d in found.detectors.values()} == {1, 2, 3}
    )


@pytest.mark.parametrize("grams", [6, 10, 20])
def test_few_counters_give_verdicts_that_are_certain(grams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 256)
    g = torch.Generator().manual_seed(grams)
    rows, seq, n = 400, 16, 120
    rare = torch.randint(5, 4000, (rows, seq), generator=g)
    tokens = torch.where(torch.rand(rows, seq, generator=g) < 0.5, torch.randint(5, (rows, seq), generator=g), rare)  # fmt: skip
    share = torch.linspace(
        0, 0.12, n
    )  # of firings that are elsewhere: around the 5 % that a detector may have
    common = (tokens < 5)[..., None] & (torch.rand(rows, seq, n, generator=g) < 0.5)
    on = common | (tokens >= 5)[..., None] & (torch.rand(rows, seq, n, generator=g) < 0.5 * share)
    found = collected(tokens, None, torch.ones_like(tokens, dtype=torch.bool), on.float(), grams=grams)
    true = (on & (tokens < 5)[..., None]).sum((0, 1)).double() / on.sum((0, 1))
    surely = 0.95 + 0.25 / (grams - 4)
    for f, coverage in enumerate(true.tolist()):
        assert f not in found.detectors or coverage >= 0.95
        assert coverage < surely or f in found.detectors
        assert coverage < 0.95 or f in found.detectors or f in found.undecided
        if f in found.detectors:
            assert found.detectors[f].coverage <= coverage + 1e-12
    assert len(found.detectors) > 5 and not all(d.exact for d in found.detectors.values())
    assert len(found.undecided) < 0.5 * n


def test_summaries_stay_small_and_bound_the_truth() -> None:
    rng = np.random.default_rng(0)
    kept, truth, fired = Grams(3, 10), [Counter[int]() for _ in range(3)], np.zeros(3, dtype=np.int64)
    for _ in range(50):
        keys = np.where(rng.random(500) < 0.5, rng.integers(0, 4, 500), rng.integers(4, 10**6, 500))
        keys[:20] = -1  # what no gram ends at
        columns, places = rng.integers(0, 3, 400), rng.integers(0, 500, 400)
        kept = kept.plus(columns, places, keys)
        for c, key in zip(columns.tolist(), keys[places].tolist(), strict=True):
            truth[c][key] += key >= 0
            fired[c] += 1
        assert len(kept.counts) <= 3 * 10
    for c in range(3):
        grams, counts = kept.of(c)
        common = [gram for gram, _ in truth[c].most_common(5)]
        assert set(common[:4]) <= set(grams.tolist()) and (np.diff(counts) <= 0).all()
        assert all(0 <= truth[c][g] - n <= kept.dropped[c] for g, n in zip(grams.tolist(), counts.tolist(), strict=True))  # fmt: skip
        rest = (sum(truth[c].values()) - sum(truth[c][g] for g in common)) / (10 + 1 - 5)
        assert 0 < kept.dropped[c] <= rest


CUTS: dict[str, Callable[[int], Any]] = {
    "halves": lambda n: (n // 2,),
    "rows": lambda n: range(1, n),
    "uneven": lambda n: (1, 2, 7, 100, n - 3),
}


@pytest.mark.parametrize("grams", [6, 128])
@pytest.mark.parametrize("cut", CUTS)
def test_results_do_not_depend_on_batches(cut: str, grams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 500)  # so that rows are counted together several times
    tokens, documents, mask, on = made(7, 200)
    whole = collected(tokens, documents, mask, on, grams=grams)
    parts = collected(tokens, documents, mask, on, CUTS[cut](len(tokens)), grams=grams)
    assert whole.rows() == parts.rows() and str(whole) == str(parts) and whole.undecided == parts.undecided
    assert whole.detectors == parts.detectors and whole.positional == parts.positional
    assert np.array_equal(whole.fired_at, parts.fired_at) and np.array_equal(whole.tokens_at, parts.tokens_at)


def test_a_result_may_be_asked_for_before_the_end() -> None:
    tokens, documents, mask, on = made(8, 120)
    collector = FamilyCollector(on.shape[-1])
    collector.add(tokens[:60], documents[:60], mask[:60], Codes.from_dense(on[:60]))
    half = collector.result()
    collector.add(tokens[60:], documents[60:], mask[60:], Codes.from_dense(on[60:]))
    assert half.rows() == collected(tokens[:60], documents[:60], mask[:60], on[:60]).rows()
    assert collector.result().rows() == collected(tokens, documents, mask, on).rows()


@pytest.mark.parametrize("broken", ["mask", "documents", "padding", "row", "nothing"])
def test_what_breaks_a_gram(broken: str) -> None:
    rows = 80
    tokens = torch.tensor([[1, 2, 3, 9]]).repeat(rows, 1)
    documents, mask = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    decoys = torch.tensor([[9, 2, 3, 9]]).repeat(3 * rows, 1)  # the bigram alone is not enough
    if broken == "mask":
        mask[:, 0] = False
    elif broken == "documents":
        documents[:, 1:] = 1
    elif broken == "padding":
        documents[:, 0], mask[:, 0] = -1, False
    elif broken == "row":
        tokens = tokens[:, [1, 2, 3, 0]]
    on = torch.zeros(4 * rows, 4, 1)
    on[:rows, 1 if broken == "row" else 2] = 1.0
    found = collected(
        torch.cat([tokens, decoys]),
        torch.cat([documents, torch.zeros_like(decoys)]),
        torch.cat([mask, torch.ones_like(decoys, dtype=torch.bool)]),
        on,
    ).detectors[0]
    # a trigram where there is one; else its last tokens, which it fires on in a quarter of all cases only
    assert (found.n, found.grams) == ((3, ((1, 2, 3),)) if broken == "nothing" else (1, ((3,),)))
    assert found.coverage == 1.0 and found.reach == (1.0 if broken == "nothing" else 0.25)


@pytest.mark.parametrize("fired", [0, 1, FIRINGS - 1, FIRINGS])
def test_dead_is_what_never_fired_where_it_counts(fired: int) -> None:
    rows = 100
    tokens = torch.full((rows, 4), 3)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    on = torch.zeros(rows, 4, 2)
    on[:, 0], on[:fired, 2, 0], on[:, 3, 1] = 1.0, 1.0, 1.0
    found = collected(tokens, None, mask, on)
    assert found.n_tokens == 300 and "on 300 tokens" in str(found)
    assert found.dead == ((0,) if fired == 0 else ())
    assert found.rare == ((0,) if 0 < fired < FIRINGS else ())
    assert (0 in found.detectors) == (fired >= FIRINGS)
    assert found.rows()[0]["dead"] == (fired == 0) and found.rows()[0]["density"] == fired / 300


def test_rows_may_differ_in_length() -> None:
    collector = FamilyCollector(1)
    for seq in (3, 8, 5):
        tokens = torch.ones(40, seq, dtype=torch.int64)
        on = torch.zeros(40, seq, 1)
        on[:, -1] = 1.0
        collector.add(tokens, None, tokens > 0, Codes.from_dense(on))
    found = collector.result()
    assert found.tokens_at.tolist() == [120, 120, 120, 80, 80, 40, 40, 40]
    assert found.fired_at[0].tolist() == [0, 0, 40, 0, 40, 0, 0, 40]


def test_codes_that_are_chosen_twice_are_summed() -> None:
    tokens = torch.full((FIRINGS, 1), 3)
    indices = torch.tensor([[1, 0, 1]]).repeat(FIRINGS, 1)
    codes = {"stay": [1.0, 2.0, 0.5], "cancel": [1.0, 2.0, -1.0]}
    for name, values in codes.items():
        collector = FamilyCollector(2)
        given = Codes.from_rectangular(indices, torch.tensor([values]).repeat(FIRINGS, 1), 2, (FIRINGS, 1))
        collector.add(tokens, None, tokens > 0, given)
        assert collector.result().n_active.tolist() == [FIRINGS, FIRINGS if name == "stay" else 0]


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (87, 110), (1, 1)])
def test_the_interval_is_wilsons(hits: int, n: int) -> None:
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-12)


def test_random_directions_suppress_a_half() -> None:
    config = DetectorsConfig(vocabulary=200, tokens=40, bigrams=0, trigrams=0, random=4)
    world = planted_detectors(config, 5)
    found = found_in(world, 500, seed=3).suppression
    assert found is not None and found.n == 40 and found.share == 0.5 and found.lowest == 20
    assert abs(found.random - 0.5) < 0.03  # of 8000 pairs; directions are shared
    assert found.interval == wilson(20, 40)


def _settled(norm: nn.Module, weight: Tensor) -> nn.Module:
    with torch.no_grad():
        next(norm.parameters()).copy_(weight)
    return norm


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_ranks_are_those_of_the_logits_that_a_direction_moves(norm: str) -> None:
    """In the model's own logits, by a small step from a random stream whose size is held."""
    model = Transformer(TransformerConfig(vocabulary=50, norm=norm, d_model=24), seed=1)
    g = torch.Generator().manual_seed(0)
    if norm != "none":
        _settled(model.norm, 0.2 + torch.rand(24, generator=g))
    directions = torch.randn(5, 24, generator=g)
    logits = logits_of(load_model(model), directions)
    assert logits is not None and logits.centred == (norm == "layer")
    x = torch.randn(24, generator=g).double()
    middle = x - x.mean() if norm == "layer" else x
    size = 1.0 if norm == "none" else middle.square().mean().sqrt()
    gain = torch.ones(24) if norm == "none" else model.norm.weight.detach()
    for d in directions.double():
        step = (d - d.mean() if norm == "layer" else d) / size * gain
        effect = model.lm_head.weight.detach().double() @ step
        want = (effect[None] < effect[:, None]).sum(1).numpy() / 49
        assert logits.ranks(d[None].float(), np.arange(50))[0] == pytest.approx(want, abs=1e-12)


def test_the_gain_of_a_norm_that_adds_one_is_known() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    model: Any = Gemma2ForCausalLM(config).eval()
    _settled(model.model.norm, torch.rand(16))
    _settled(model.model.layers[0].post_feedforward_layernorm, torch.rand(16))
    view = load_model(model, name="gemma")
    neurons = neurons_of(view, "blocks.0.mlp", None)
    layer = model.model.layers[0]
    want = layer.mlp.down_proj.weight.T * (1 + layer.post_feedforward_layernorm.weight)
    assert torch.allclose(neurons.written, want, atol=1e-5)
    logits = logits_of(view, neurons.written)
    assert logits is not None and not logits.centred
    assert torch.allclose(logits.gain, 1 + model.model.norm.weight, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu"])
def test_a_neuron_fires_where_its_activation_lets_through(activation: str) -> None:
    model = Transformer(TransformerConfig(vocabulary=30, activation=activation), seed=2)
    view = load_model(model)
    tokens = torch.randint(30, (6, 20), generator=torch.Generator().manual_seed(0))
    mlp = model.layers[0].mlp
    seen: list[Tensor] = []
    with intervene([(view.site("layers.0.mlp:in"), seen.append)]), torch.no_grad():
        model(tokens)
    before = (mlp.gate_proj or mlp.up_proj)(seen[0])
    for threshold in (None, 0.3):
        found = families(view, tokens, hook_point="layers.0.mlp", threshold=threshold, max_tokens=120)
        assert found.n_active.tolist() == (before > (threshold or 0.0)).sum((0, 1)).tolist()
        assert found.n_tokens == 120 and found.n_features == 64


def test_the_sign_of_what_a_gate_multiplies_turns_the_direction() -> None:
    model = Transformer(TransformerConfig(vocabulary=4, activation="swiglu", n_layers=1, norm="none"), seed=2)
    tokens = torch.randint(4, (60, 30), generator=torch.Generator().manual_seed(0))
    mlp: Any = model.layers[0].mlp
    found = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            mlp.gate_proj.bias.fill_(1e3)
            mlp.up_proj.weight.zero_()
            mlp.up_proj.bias.fill_(sign)
        found.append(families(model, tokens, hook_point="layers.0.mlp", max_tokens=1800).ranks)
    assert len(found[0]) == 64  # always on, and 4 tokens are all there are
    assert all(found[0][i] + found[1][i] == pytest.approx(1) for i in found[0])


def _neurons_as_dictionary(world: PlantedDetectors, preset: str) -> saekit.Dictionary:
    """A dictionary with the neurons' weights: a transcoder of the MLP, or an SAE of its input."""
    mlp: Any = world.model.module.mlp
    n, d_in = mlp.up_proj.weight.shape
    more = {"d_out": len(mlp.down_proj.weight), "selection": "relu"} if preset == "transcoder" else {}
    d = saekit.create(preset, d_in=d_in, n_features=n, normalise="none", **more)
    with torch.no_grad():
        d.encoder.copy_(mlp.up_proj.weight)
        d.b_enc.copy_(mlp.up_proj.bias)
        if more:
            d.atoms.weight.copy_(mlp.down_proj.weight.T)
    d.reads, d.writes = ("mlp:in",), ("mlp:out" if more else "mlp:in",)
    return d.eval()


@pytest.mark.parametrize("preset", ["relu", "transcoder"])
def test_features_of_a_dictionary_are_found_as_neurons_are(preset: str) -> None:
    world = planted_detectors(seed=4)
    neurons = found_in(world, 400)
    text, d = world.text(400, 1), _neurons_as_dictionary(world, preset)
    found = families(world.model, text, d, max_tokens=10**6)
    d.reads = ()
    assert found.rows() == families(world.model, text, d, "mlp:in", max_tokens=10**6).rows()
    assert found.dead == neurons.dead and found.detectors == neurons.detectors
    assert found.positional == neurons.positional
    if preset == "transcoder":
        assert found.ranks == neurons.ranks and found.suppression == neurons.suppression
    else:  # what it writes is no part of the stream
        assert found.suppression is None and found.ranks == {} and "not measured" in str(found)


def test_a_model_of_text(code_lm: Any) -> None:
    told: list[int] = []
    found = families(code_lm, "stdlib", hook_point="blocks.1.mlp", max_tokens=20_480, threshold=0.5, on_batch=lambda done, _: told.append(done))  # fmt: skip
    assert found.n_features == 1024 and told == [8192, 16384, 20480]
    assert (
        found.tokens_at[0] == 0 and found.tokens_at.sum() == found.n_tokens < 20_480
    )  # each row begins with a separator
    assert found.counts()["dead"] > 0 and found.suppression is not None
    for i, d in found.detectors.items():
        assert found.n_active[i] >= FIRINGS and d.coverage >= 0.95 and len(d.grams) <= 5
    assert sum(row["dead"] for row in found.rows()) == len(found.dead)


def _with_act(act: nn.Module) -> Transformer:
    model = Transformer(TransformerConfig(vocabulary=8))
    model.layers[0].mlp.act_fn = act
    return model


TEXT = torch.zeros(2, 8, dtype=torch.int64)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: families(_with_act(nn.ReLU()), TEXT), "give dictionary="),
    "tanh": (lambda: families(_with_act(nn.Tanh()), TEXT, hook_point="layers.0.mlp"), "Tanh, which .* give threshold="),
    "sigmoid": (lambda: families(_with_act(nn.Sigmoid()), TEXT, hook_point="layers.0.mlp"), "give threshold="),
    "no MLP": (lambda: families(_with_act(nn.ReLU()), TEXT, hook_point="layers.0.self_attn"), "name it, as in blocks.1.mlp"),
    "no place": (lambda: families(_with_act(nn.ReLU()), TEXT, hook_point="layers.0.mlq"), "layers.0.mlp"),
    "no reads": (lambda: families(_with_act(nn.ReLU()), TEXT, saekit.create("topk", d_in=32, n_features=4, k=1)), "give hook_point="),
    "threshold": (lambda: families(_with_act(nn.ReLU()), TEXT, saekit.create("topk", d_in=32, n_features=4, k=1), threshold=1.0), "threshold = 1.0"),
    "counters": (lambda: FamilyCollector(3, grams=5), "grams = 5 must be above"),
    "no features": (lambda: FamilyCollector(0), "n_features = 0"),
    "too many tokens": (lambda: collected(TEXT + 2**21, None, TEXT == 0, torch.ones(2, 8, 1)), "tokens: ids"),
    "other codes": (lambda: FamilyCollector(1).add(TEXT, None, TEXT == 0, Codes.from_dense(torch.ones(8, 1))), "codes: shape"),
    "another width": (lambda: FamilyCollector(2).add(TEXT, None, TEXT == 0, Codes.from_dense(torch.ones(2, 8, 1))), "codes: 1 features"),
    "nan": (lambda: collected(TEXT, None, TEXT == 0, torch.full((2, 8, 1), torch.nan)), "nan or infinite"),
    "small vocabulary": (lambda: DetectorsConfig(vocabulary=20), "vocabulary = 20"),
    "short context": (lambda: DetectorsConfig(context=8), "context = 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_told_in_a_sentence(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(saekit.SaekitError, match=words):
        call()


def test_an_activation_that_is_no_rectifier_takes_a_threshold() -> None:
    model = _with_act(nn.Tanh())
    assert (
        families(model, TEXT, hook_point="layers.0.mlp", threshold=-1e9, max_tokens=16).n_active.min() == 16
    )


def test_activations_that_are_no_numbers_are_seen() -> None:
    model = _with_act(nn.ReLU())
    with torch.no_grad():
        model.layers[0].mlp.up_proj.bias[0] = torch.nan
    with pytest.raises(saekit.SaekitError, match=r"'layers.0.mlp.up_proj' hold NaN"):
        families(model, TEXT, hook_point="layers.0.mlp")
