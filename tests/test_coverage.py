"""Coverage is that of brute force on rows that nothing was chosen by, and the router tells how sparse experts will be."""

import pytest
import torch
from torch import Tensor

from saekit.analyses.coverage import PRECISE, THRESHOLDS, coverage
from saekit.errors import SaekitError
from saekit.testbed.moe import BITS, FACTORS, TOPICS, Mixture, World, active_share, learn


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, rows: int = 60, neurons: int = 5, factors: int = 3) -> tuple[Tensor, Tensor]:
    """Neurons of which the first have a factor each, in noise."""
    y = torch.rand(rows, factors, generator=g(seed)) < 0.4
    h = torch.randn(rows, neurons, generator=g(seed + 1))
    h[:, :factors] += 2.0 * y
    return h, y


def brute(a: Tensor, y: Tensor, b: Tensor, truth: Tensor) -> tuple[list[float], list[float]]:
    """F1 of each factor's best neuron, and of any precise one, counted row by row."""
    from sklearn.metrics import f1_score, precision_score

    best, rebuilt = [], []
    for factor in range(y.shape[1]):
        tried, said = [], torch.zeros(len(b), dtype=torch.bool)
        for t in THRESHOLDS:
            for n in range(a.shape[1]):
                at = t * a[:, n].max().clamp(min=0)
                tried.append((f1_score(y[:, factor], a[:, n] > at, zero_division=0), n, at))
                if precision_score(y[:, factor], a[:, n] > at, zero_division=0) >= PRECISE:
                    said |= b[:, n] > at
        _, n, at = max(tried, key=lambda one: one[0])  # the first of equals
        best.append(f1_score(truth[:, factor], b[:, n] > at, zero_division=0))
        rebuilt.append(f1_score(truth[:, factor], said, zero_division=0))
    return best, rebuilt


@pytest.mark.parametrize("seed", range(4))
def test_it_is_that_of_brute_force(seed: int) -> None:
    some, other = drawn(seed), drawn(seed + 50)
    found = coverage(*some, *other)
    best, rebuilt = brute(*some, *other)
    assert found.best.tolist() == pytest.approx(best, abs=1e-6)
    assert found.coverage == pytest.approx(sum(best) / len(best), abs=1e-6)
    assert found.reconstruction == pytest.approx(sum(rebuilt) / len(rebuilt), abs=1e-6)


def test_neither_scales_nor_the_order_of_neurons_matter() -> None:
    (a, y), (b, truth) = drawn(0), drawn(50)
    order, scale = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([0.5, 4.0, 2.0, 1.0, 8.0])
    ours, others = coverage(a, y, b, truth), coverage((a * scale)[:, order], y, (b * scale)[:, order], truth)
    assert torch.equal(ours.best, others.best) and ours.reconstruction == others.reconstruction


def test_factors_that_neurons_are_get_1_and_silent_neurons_get_0() -> None:
    y = drawn(0)[1]
    told = coverage(y.float() * 3, y, y.float() * 3, y)
    assert told.coverage == told.reconstruction == 1
    silent = coverage(-y.float(), y, -y.float(), y)
    assert silent.coverage == silent.reconstruction == 0


def test_chance_in_the_choice_is_not_counted() -> None:
    y, truth = (torch.rand(40, 1, generator=g(s)) < 0.2 for s in (1, 2))
    a, b = (torch.randn(40, 2000, generator=g(s)) for s in (3, 4))
    chosen, judged = coverage(a, y, a, y).coverage, coverage(a, y, b, truth).coverage
    assert chosen > judged + 0.2


@pytest.mark.parametrize(
    ("which", "value", "says"),
    [
        (0, float("nan"), "chosen has non-finite"),
        (1, False, "labels: factor 1"),
        (2, float("inf"), "judged has non-finite"),
        (3, True, "truth: factor 1"),
    ],
)
def test_bad_rows_are_refused(which: int, value: float, says: str) -> None:
    given = [one.clone() for one in (*drawn(0), *drawn(50))]
    given[which][:, 1] = value
    with pytest.raises(SaekitError, match=says):
        coverage(*given)


@pytest.mark.parametrize("seed", range(3))
def test_the_predicted_share_is_that_of_many_gaussian_units(seed: int) -> None:
    mu, sigma = torch.randn(4, 1, 16, generator=g(seed)), 0.5 + torch.rand(4, 1, 16, generator=g(seed + 1))
    w_in = mu + sigma * torch.randn(4, 4096, 16, generator=g(seed + 2))
    x = torch.randn(50, 16, generator=g(seed + 3))
    true = (torch.einsum("rd,eud->reu", x, w_in) > 0).float().mean(2)
    assert (active_share(w_in, x) - true).abs().max() < 0.03
    torch.testing.assert_close(active_share(w_in, 5 * x), active_share(w_in, x))
    torch.testing.assert_close(active_share(w_in, -x), 1 - active_share(w_in, x))


@pytest.mark.parametrize("router", ["sparsity", "softmax"])
def test_a_mixture_is_one_sparse_layer(router: str) -> None:
    model, seen = Mixture(0, 6, 5, 2, router), World(0).draw(30, g()).seen
    x = model.stream(seen)
    weights, logits = model.route(x)
    assert ((weights > 0).sum(1) == 2).all() and torch.allclose(weights.sum(1), torch.ones(30))
    assert torch.equal((weights > 0).nonzero()[:, 1].view(30, 2), logits.topk(2, 1).indices.sort(1).values)
    out = x.clone()
    for e in range(6):
        out += weights[:, e, None] * (x @ model.w_in[e].T).relu() @ model.w_out[:, 5 * e : 5 * e + 5].T
    torch.testing.assert_close(model(seen), out @ model.unembed.T)
    torch.testing.assert_close(
        model.hidden(x).view(30, 6, 5).ne(0).any(2), weights.gt(0) & (x @ model.w_in.mT > 0).any(2).T
    )


def test_the_router_takes_the_sparsest_and_learns_from_its_weights() -> None:
    model, seen = Mixture(0, 6, 5, 2, "sparsity"), World(0).draw(30, g()).seen
    shares = active_share(model.w_in, model.stream(seen))
    assert torch.equal(model.route(model.stream(seen))[0] > 0, shares.argsort(1).argsort(1) < 2)
    model.balance(seen).backward()
    assert model.w_in.grad is not None and model.w_in.grad.abs().sum() > 0


def test_factors_are_conjunctions_and_models_learn_them() -> None:
    world = World(1)
    rows, again = world.draw(500, g(1)), world.draw(500, g(1))
    bits, topic = rows.seen.split([BITS, TOPICS], 1)
    assert rows.factors.shape == (500, TOPICS * FACTORS) and torch.equal(topic.sum(1), torch.ones(500))
    first, second = world.pairs[2, 3]
    holds = (topic[:, 2] * bits[:, first] * bits[:, second]) > 0
    assert holds.any() and torch.equal(rows.factors[:, 2 * FACTORS + 3], holds)
    assert torch.equal(rows.words, again.words) and len(world.pairs[1].unique(dim=0)) == FACTORS
    world = World(1, 2)
    rows = world.draw(500, g(1))
    model, losses = Mixture(0, 4, 8, 2, "sparsity", topics=2), []
    for _ in range(2):
        losses.append(torch.nn.functional.cross_entropy(model(rows.seen), rows.words).item())
        learn(model, world, 0, 400)
    assert losses[1] < 0.8 * losses[0] and losses[1] > world.entropy(rows)


@pytest.mark.parametrize(("k", "router", "says"), [(7, "softmax", "k is 7"), (0, "softmax", "k is 0"), (2, "x", "router is 'x'")])  # fmt: skip
def test_a_wrong_mixture_is_refused(k: int, router: str, says: str) -> None:
    with pytest.raises(SaekitError, match=says):
        Mixture(0, 6, 5, k, router)
