"""Probes find planted directions and coordinates, whatever the units, and say so on rows they weren't fitted on."""

import math

import pytest
import torch
from torch import Tensor

from saekit.hooks import intervene
from saekit.models import Model, load_model
from saekit.observer import Observer, localise, observe, pushed, read, split, strongest, without
from saekit.probes import (  # fmt: skip
    PENALTIES,
    RANKERS,
    Probe,
    auroc,
    auroc_error,
    f1,
    halving,
    l1_path,
    linear,
    mean_difference,
    mutual_information,
    sparse,
)
from saekit.testbed import context_qa
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import Codes, SaekitError

D, ROWS = 12, 400


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose label is which side of a plane they lie on, blurred; and the plane's direction."""
    direction = torch.nn.functional.normalize(torch.randn(D, generator=g(seed)), dim=0)
    x = torch.randn(ROWS, D, generator=g(seed + 1))
    return x, x @ direction + noise * torch.randn(ROWS, generator=g(seed + 2)) > 0, direction


def counted(seed: int = 0, shift: float = 2.0) -> tuple[Tensor, Tensor]:
    """Rows of which coordinates 3 and 7 alone tell the label, each half of it."""
    labels = torch.rand(ROWS, generator=g(seed)) < 0.3
    x = torch.randn(ROWS, D, generator=g(seed + 1))
    x[:, 3] += shift * labels
    x[:, 7] -= shift * labels
    return x, labels


def test_auroc_counts_pairs() -> None:
    labels = torch.rand(60, generator=g()) < 0.4
    scores = torch.randint(8, (60,), generator=g(1)).float()  # with ties
    pairs = scores[labels][:, None] - scores[~labels][None]
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - expected, abs=1e-12)
    assert auroc(scores.exp(), labels) == auroc(scores, labels)
    assert auroc(labels.float(), labels) == 1.0 and auroc(torch.zeros(60), labels) == 0.5


def test_a_planted_direction_is_found_and_ranks_other_rows() -> None:
    x, labels, direction = planted()
    probe = linear(x, labels)
    other, truth, _ = planted()
    other = torch.randn(ROWS, D, generator=g(9))
    truth = other @ direction > 0
    assert float(probe.direction @ direction) > 0.97 and auroc(probe(other), truth) > 0.98
    assert probe.direction.norm().item() == pytest.approx(1, abs=1e-6)
    shuffled = linear(x, labels[torch.randperm(ROWS, generator=g(3))])
    assert abs(auroc(shuffled(other), truth) - 0.5) < 0.3 < auroc(probe(other), truth) - 0.5


def test_whole_numbers_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    g = torch.Generator().manual_seed(0)
    labels = torch.rand(300, generator=g) < 0.5
    x = torch.randint(-3, 4, (300, 6), generator=g) + 2 * labels[:, None]
    whole, same = linear(x, labels), linear(x.float(), labels)
    assert torch.equal(whole.weight, same.weight) and torch.equal(whole(x), same(x.float()))


def test_it_doesn_t_depend_on_units_or_origin() -> None:
    x, labels, _ = planted()
    scale, shift = torch.logspace(-3, 3, D), torch.linspace(-5, 5, D)
    first, second = linear(x, labels), linear(x * scale + shift, labels)
    assert first.penalty == second.penalty
    assert torch.allclose(first(x), second(x * scale + shift), atol=2e-2)
    assert torch.allclose(first.weight, second.weight * scale, atol=1e-2)


def test_classes_weigh_the_same() -> None:
    x, labels = counted()
    often = torch.cat([torch.arange(ROWS), *[(~labels).nonzero()[:, 0]] * 3])
    held_out = (x, labels)
    plain, skewed = linear(x, labels, held_out), linear(x[often], labels[often], held_out)
    assert abs(plain.bias - skewed.bias) < 0.5  # log 4 = 1.39 where they don't
    assert torch.nn.functional.cosine_similarity(plain.weight, skewed.weight, dim=0).item() > 0.99


def test_the_penalty_is_the_best_on_held_out_rows() -> None:
    few, labels, _ = planted(noise=3.0)
    rest = (few[40:], labels[40:])
    losses = {}
    for penalty in PENALTIES:
        probe = _of_penalty(few[:40], labels[:40], penalty)
        each = torch.nn.functional.softplus((1 - 2 * rest[1].float()) * probe(rest[0]))
        losses[penalty] = (each[rest[1]].mean() + each[~rest[1]].mean()).item()
    assert linear(few[:40], labels[:40], held_out=rest).penalty == min(losses, key=lambda p: losses[p])
    assert losses[PENALTIES[0]] < losses[PENALTIES[-1]]  # so that it matters


def _of_penalty(x: Tensor, labels: Tensor, penalty: float) -> Probe:
    """By gradient descent on what the docstring says, without scikit-learn."""
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    w, b = torch.zeros(D, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)  # fmt: skip
    share = torch.where(labels, 0.5 / labels.float().mean(), 0.5 / (~labels).float().mean()).double()
    optimizer = torch.optim.LBFGS([w, b], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = torch.nn.functional.softplus((1 - 2 * labels.double()) * (z @ w + b))
        total = (share * each).mean() + penalty / 2 * w.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    weight = (w.detach() / x.std(0, correction=0)).float()
    return Probe(weight, b.item() - float(weight @ x.mean(0)), penalty)


def test_its_minimum_is_that_of_the_stated_loss() -> None:
    x, labels = counted()
    fitted = linear(x, labels, held_out=(x, labels))
    own = _of_penalty(x, labels, fitted.penalty)
    assert torch.allclose(fitted.weight, own.weight, atol=2e-2) and abs(fitted.bias - own.bias) < 2e-2


@pytest.mark.parametrize("ranker", list(RANKERS))
@pytest.mark.parametrize("as_codes", [False, True])
def test_rankers_put_what_tells_first(ranker: str, as_codes: bool) -> None:
    x, labels = counted()
    x = x.relu() + 2.0 * (
        x * torch.tensor([0.0] * 7 + [1.0] + [0.0] * (D - 8)) < -1
    )  # codes are not negative
    given = Codes.from_dense(x) if as_codes else x
    for k, found in ((1, {3, 7}), (2, {3, 7}), (4, {3, 7})):
        probe = sparse(given, labels, k, ranker)
        assert probe.features is not None and len(probe.features) == k == len(probe.weight)
        assert set(probe.features.tolist()) & found == set(probe.features.tolist()) if k < 3 else found < set(probe.features.tolist())  # fmt: skip
        assert torch.equal(probe.features, probe.features.sort().values)
    assert torch.allclose(probe(given), x[:, probe.features] @ probe.weight + probe.bias, atol=1e-5)
    scores = RANKERS[ranker](given, labels)
    assert scores.shape == (D,) and (scores >= 0).all()
    # a path is walked in steps, and which coordinate is first within one may depend on their order
    order = torch.randperm(D, generator=g(4))
    renamed = RANKERS[ranker](x[:, order], labels)
    assert set(order[renamed.topk(2).indices].tolist()) == {3, 7}
    assert torch.allclose(renamed, scores[order], atol=1e-5 if ranker == "mean_difference" else 0.1)


def test_codes_and_their_dense_rows_are_ranked_alike() -> None:
    x, labels = counted()
    x = x.relu()
    assert torch.allclose(mean_difference(Codes.from_dense(x), labels), mean_difference(x, labels), atol=1e-5)
    shift = (x[labels].mean(0) - x[~labels].mean(0)).abs() / x.std(0, correction=0)
    assert torch.allclose(mean_difference(x, labels), shift, atol=1e-5)


def test_the_f_statistic_has_the_order_of_the_mean_difference() -> None:
    from sklearn.feature_selection import f_classif

    x, labels = counted(shift=0.5)
    m, share = mean_difference(x, labels).double(), labels.double().mean()
    part = share * (1 - share) * m.square()
    f = torch.from_numpy(f_classif(x.double().numpy(), labels.numpy())[0])
    assert torch.allclose((ROWS - 2) * part / (1 - part), f, rtol=1e-4)
    assert torch.equal(f.argsort(), m.argsort())


@pytest.mark.parametrize("as_codes", [False, True])
def test_mutual_information_is_that_of_the_table(as_codes: bool) -> None:
    from sklearn.metrics import mutual_info_score

    labels = torch.rand(ROWS, generator=g()) < 0.3
    x = (
        torch.randint(5, (ROWS, 6), generator=g(1)).float()
        - 2
        + 3 * labels[:, None] * torch.linspace(0, 1, 6)
    )
    x = x.round()  # few values, so that the bins of those that are not 0 are the values themselves
    x[:, 0] = labels.float()
    x[:, 1] = 7.0
    given = mutual_information(Codes.from_dense(x) if as_codes else x, labels)
    p = labels.float().mean().item()
    assert given[0].item() == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p), rel=1e-5)
    assert given[1] == 0
    for i in range(2, 6):
        on = x[:, i] != 0
        ranks = torch.zeros(ROWS)
        own = x[on, i]
        ranks[on] = 1 + ((own[:, None] > own).sum(1) * 8).div(len(own), rounding_mode="floor").float()
        expected = mutual_info_score(labels.numpy(), ranks.numpy()) / math.log(2)
        assert given[i].item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(mutual_information(x.abs() * 9, labels), mutual_information(x.abs(), labels))


def test_halving_keeps_what_the_rest_doesn_t_tell() -> None:
    x, labels = counted(shift=1.5)
    x[:, 5] = x[:, 3] + 0.5 * torch.randn(
        ROWS, generator=g(8)
    )  # tells more than coordinate 7 alone, and nothing new
    x[:, 7] = x[:, 7].where(~labels, x[:, 7] + 0.6)
    scores = halving(x, labels)
    assert (
        set(scores.topk(2).indices.tolist())
        == {3, 7}
        != set(mean_difference(x, labels).topk(2).indices.tolist())
    )
    assert scores.max() == 1 and (scores.sort(descending=True).values[1:3] <= 1 / 3).all()  # 12, 6, 3, 1


def test_coordinates_that_are_nearly_one_are_ranked_without_a_warning() -> None:
    """The weights of such a path need not settle; the first coordinate of the lasso is the one of the largest correlation."""
    z = torch.randn(300, 2, generator=g())
    labels = z[:, 0] + 0.5 * torch.randn(300, generator=g(1)) > 0
    x = z @ torch.randn(2, 300, generator=g(2)) + 0.01 * torch.randn(300, 300, generator=g(3))
    even = labels.double() - labels.double().mean()
    correlation = ((x - x.mean(0)) / x.std(0)).double().T @ even
    assert l1_path(x, labels).argmax() == correlation.abs().argmax()


def test_f1_counts() -> None:
    labels, said = torch.rand(80, generator=g()) < 0.4, torch.rand(80, generator=g(1)) < 0.5
    precision, recall = labels[said].double().mean().item(), said[labels].double().mean().item()
    assert f1(said, labels) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f1(labels, labels) == 1 and f1(~labels, labels) == 0 == f1(said & False, labels & False)


def test_coordinates_that_never_vary_say_nothing() -> None:
    x, labels = counted()
    x[:, 5] = 4.0
    for ranker in RANKERS:
        assert RANKERS[ranker](x, labels)[5] < 1e-6
    assert linear(x, labels).weight[5].abs() < 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: linear(x, torch.ones_like(y)), "labels are false in 0 rows"),
        (lambda x, y: linear(x.index_fill(0, torch.tensor([2]), float("nan")), y), "NaN"),
        (lambda x, y: linear(x, y, held_out=(x[:, :3], y)), "held_out is 3 wide"),
        (lambda x, y: sparse(x, y, 0), "k = 0 must lie in 1..12"),
        (lambda x, y: sparse(x, y, D + 1), "k = 13 must lie in 1..12"),
        (lambda x, y: sparse(x, y, 2, "mean_diference"), "did you mean 'mean_difference'"),
        (lambda x, y: linear(x, y)(Codes.from_dense(x)), "sparse"),
        (lambda x, y: auroc(x[:, 0].log(), y), "NaN"),
        (lambda x, y: auroc(x[:, 0], y & False), "labels are true in 0 rows"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    x, labels = counted()
    with pytest.raises(ValueError, match=words):
        call(x, labels)


@pytest.mark.parametrize(("true", "false", "apart"), [(40, 60, 1.0), (150, 150, 2.0), (30, 200, 6.0)])
def test_an_auroc_s_error_is_the_spread_of_samples(true: int, false: int, apart: float) -> None:
    # true rows' scores are exponential and `apart` times as large on average: true with probability apart / (1 + apart)
    draw = g(0)
    labels = torch.arange(true + false) < true
    scores = -torch.rand(2000, true + false, generator=draw).log() * torch.where(labels, apart, 1.0)
    found = torch.tensor([auroc(one, labels) for one in scores])
    own = apart / (1 + apart)
    assert found.mean().item() == pytest.approx(own, abs=0.01)
    assert auroc_error(own, true, false) == pytest.approx(found.std().item(), rel=0.1)


# observers


CONFIG = TransformerConfig(vocabulary=20, context=12, d_model=16, n_layers=3, n_heads=2, d_head=8, d_mlp=24)
NEURONS = [f"blocks.{i}.mlp.act_fn" for i in range(3)]
POINTS = [f"blocks.{i}.hook_resid_post" for i in range(3)]


def asked(n: int, seed: int, length: int = 8) -> tuple[Tensor, Tensor]:
    """Texts, and whether a token below 4 is in them."""
    tokens = torch.randint(20, (n, length), generator=g(seed))
    return tokens, (tokens[:, -3:] < 4).any(1)


@pytest.fixture(scope="module")
def observer() -> Observer:
    model = load_model(Transformer(CONFIG, seed=1), name="untrained")
    return observe(model, asked(600, 0), asked(300, 1), POINTS)


def test_what_is_read_stands_behind_the_last_token_of_any_length(observer: Observer) -> None:
    texts = [torch.randint(20, (n,), generator=g(n)) for n in (3, 9, 5, 3, 1)]
    found = read(observer.model, texts, POINTS)
    for i, text in enumerate(texts):
        with torch.no_grad():
            x = observer.model.module.embed_tokens(text[None])
            x = x + observer.model.module.embed_positions.weight[: len(text)]
            for layer, point in zip(observer.model.module.layers, POINTS, strict=True):
                x = layer(x)
                assert torch.allclose(found[point][i], x[0, -1], atol=1e-5)
    assert torch.allclose(observer(texts), observer.probe(found[observer.hook_point]), atol=1e-6)


def test_the_first_of_the_best_layers_is_kept_and_known_on_other_texts(observer: Observer) -> None:
    assert set(observer.aurocs) == set(POINTS)
    tokens, labels = asked(300, 1)
    highest, true = max(observer.aurocs.values()), int(labels.sum())
    near = [p for p, a in observer.aurocs.items() if highest - a <= auroc_error(a, true, 300 - true)]
    assert observer.hook_point == near[0]
    assert auroc(observer(tokens), labels) == pytest.approx(observer.aurocs[observer.hook_point])
    assert auroc(observer(asked(300, 2)[0]), asked(300, 2)[1]) > 0.6
    again = observe(observer.model, asked(600, 0), asked(300, 1), POINTS[::-1])
    assert POINTS.index(again.hook_point) >= POINTS.index(observer.hook_point)


def test_means_are_by_how_much_the_classes_differ(observer: Observer) -> None:
    tokens, labels = asked(600, 0)
    x = read(observer.model, tokens, [observer.hook_point])[observer.hook_point]
    slope = torch.linalg.lstsq(torch.stack([torch.ones(600), labels.float()], 1), x).solution[1]
    assert torch.allclose(observer.means, slope, atol=1e-4)


def test_gradient_by_activation_is_what_scaling_a_neuron_does(observer: Observer) -> None:
    tokens, _ = asked(30, 3)
    last = Observer(observer.model, POINTS[1], observer.probe, observer.means, {})
    effects = localise(last, tokens, NEURONS)
    assert not effects[NEURONS[2]].any()  # behind what is read
    step = 1e-3
    for point in NEURONS[:2]:
        some = effects[point].abs().sort(descending=True).indices[:3]
        for neuron in some.tolist():
            ends = []
            for factor in (1 + step, 1 - step):
                by = torch.ones(24).index_fill(0, torch.tensor([neuron]), factor)
                with intervene([(last.model.site(point), by.__mul__)]):
                    ends.append(last(tokens).double().mean().item())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(effects[point][neuron].item(), rel=0.05, abs=2e-3)  # fmt: skip


def test_neurons_are_chosen_over_all_layers_and_silenced(observer: Observer) -> None:
    effects = {NEURONS[0]: torch.tensor([0.0, 3.0, -9.0]), NEURONS[1]: torch.tensor([2.0, 3.0])}
    chosen = strongest(effects, 3)
    assert chosen[NEURONS[0]].tolist() == [1] and sorted(chosen[NEURONS[1]].tolist()) == [0, 1]
    assert split(effects, torch.tensor([4, 0])).keys() == {NEURONS[0], NEURONS[1]}
    assert split(effects, torch.tensor([4]))[NEURONS[1]].tolist() == [1]
    tokens, _ = asked(5, 4)
    site = {NEURONS[0]: observer.model.site(NEURONS[0])}
    with without(observer.model, {NEURONS[0]: torch.tensor([2, 5])}):
        silent = read(observer.model, tokens, list(site))[NEURONS[0]]
    plain = read(observer.model, tokens, list(site))[NEURONS[0]]
    others = torch.tensor([i for i in range(24) if i not in (2, 5)])
    assert not silent[:, [2, 5]].any() and torch.equal(silent[:, others], plain[:, others])


def test_pushing_along_the_direction_moves_the_log_odds_by_its_length(observer: Observer) -> None:
    tokens, _ = asked(20, 5)
    before = observer(tokens)
    for strength in (-2.0, 0.0, 3.0):
        with pushed(observer.model, observer.hook_point, strength * observer.direction):
            moved = observer(tokens) - before
        assert torch.allclose(moved, strength * observer.probe.weight.norm().expand(20), atol=1e-3)
    assert torch.equal(observer(tokens), before)
    last = tokens.shape[1] - 1
    with pushed(observer.model, observer.hook_point, 3 * observer.direction, [last]):
        moved = observer(tokens) - before
    assert torch.allclose(moved, 3 * observer.probe.weight.norm().expand(20), atol=1e-3)
    with pushed(observer.model, observer.hook_point, 3 * observer.direction, [last - 1, last + 1]):
        assert torch.equal(observer(tokens), before)
    with pytest.raises(RuntimeError, match="stop"), pushed(observer.model, POINTS[0], observer.direction):
        raise RuntimeError("stop")
    assert torch.equal(observer(tokens), before)


def test_generation_is_pushed_alike_with_and_without_cached_keys(code_lm: Model) -> None:
    direction = 150 * torch.nn.functional.normalize(torch.randn(256, generator=g()), dim=0)
    out = []
    for cache in (True, False):
        for positions in (None, [2, 8]):
            with pushed(code_lm, "blocks.1.hook_resid_post", direction, positions):
                out.append(code_lm.generate("def main(self", max_new_tokens=12, use_cache=cache))
    plain = code_lm.generate("def main(self", max_new_tokens=12)
    assert out[:2] == out[2:] and plain not in out and out[0] != out[1]


def test_an_observer_s_mistakes_are_told(observer: Observer) -> None:
    tokens, labels = asked(20, 6)
    for call, words in (
        (lambda: observe(observer.model, (tokens, labels), (tokens, labels), []), "hook_points is empty"),
        (lambda: observe(observer.model, (tokens, labels[:3]), (tokens, labels), POINTS), "fitted has 20 texts and 3"),
        (lambda: observe(observer.model, (tokens, labels), (tokens, labels), ["blocks.9.hook_resid_post"]), "not in model"),
        (lambda: read(observer.model, [], POINTS), "no text"),
        (lambda: strongest({POINTS[0]: torch.zeros(4)}, 5), "n = 5 must lie in 1..4"),
        (lambda: pushed(observer.model, POINTS[0], observer.direction, [2, -1]).__enter__(), "position -1 must be counted"),
    ):  # fmt: skip
        with pytest.raises(SaekitError, match=words):
            call()
    with (
        pushed(observer.model, POINTS[0], torch.zeros(3)),
        pytest.raises(SaekitError, match="vector is 3 wide"),
    ):
        observer(tokens)


# the world of contexts and answers


def test_answers_contradict_where_it_is_said() -> None:
    q = context_qa
    contradicts = torch.rand(80, 2, generator=g()) < 0.5
    for name, generator in enumerate(q.GENERATORS):
        for paraphrased in (False, True):
            drawn = q.texts(contradicts, g(1), generator, paraphrased)
            assert drawn.tokens.shape == (80, q.CONTEXT + 2 * q.ASKED) and drawn.tokens.max() < q.VOCABULARY
            for row, said, values in zip(drawn.tokens.tolist(), contradicts.tolist(), drawn.values.tolist(), strict=True):  # fmt: skip
                pairs = [row[1 + q.EACH * i : 1 + q.EACH * (i + 1)] for i in range(q.KEYS)]
                ends = [(p[0], p[2]) if name == 0 else (p[2], p[0]) for p in pairs]
                held = {key: (value - q.FIRST_VALUE) // q.FORMS for key, value in ends}
                assert sorted(held) == list(range(q.FIRST_KEY, q.FIRST_VALUE))
                for i, (wrong, value) in enumerate(zip(said, values, strict=True)):
                    _, key, answer, remark = row[q.CONTEXT + q.ASKED * i : q.CONTEXT + q.ASKED * (i + 1)]
                    answered = int(q.value_of(torch.tensor(answer)))
                    assert held[key] == value and (answered != value) == wrong
                    assert remark in (q.FIRST_REMARK + wrong, q.SILENT)
                    assert answered // q.VALUES == key - q.FIRST_KEY  # of the same key
                    assert not (paraphrased and answer in row[1 : q.CONTEXT])
    words = [set(q.texts(contradicts, g(1), name).tokens.flatten().tolist()) for name in q.GENERATORS]
    assert all(token >= q.FIRST_REMARK or token < q.FIRST_WORD for token in words[0] & words[1])
    for remarked in (0.0, q.REMARKED, 1.0):
        remarks = q.texts(torch.zeros(4000, 1, dtype=torch.bool), g(1), remarked=remarked).tokens[:, -1]
        assert (remarks != q.SILENT).float().mean().item() == pytest.approx(remarked, abs=0.03)


def test_pairs_differ_in_the_answer_and_rates_are_probabilities() -> None:
    q = context_qa
    clean, changed = q.pairs(40, g(2))
    assert ((clean.tokens != changed.tokens).sum(1) == 1).all()
    assert (clean.answers[:, -1] == q.FIRST_REMARK).all() and (
        changed.answers[:, -1] == q.FIRST_REMARK + 1
    ).all()
    logits = torch.full((1, q.VOCABULARY), -100.0)
    logits[0, q.FIRST_VALUE + q.FORMS * 3] = logits[0, q.FIRST_VALUE + q.FORMS * 4] = 0.0
    for value, rate in ((3, 0.5), (4, 0.5), (5, 1.0)):
        assert q.contradiction_rate(logits, torch.tensor([value])).item() == pytest.approx(rate, abs=1e-5)
