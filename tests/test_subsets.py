"""The best subset is that of brute force, and redundant neurons are counted."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from saekit.analyses.subsets import best_subset, gain, repeats
from saekit.probes import mean_difference, sparse
from saekit.testbed.shifts import shifted
from saekit.types import Codes


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(seed: int, rows: int = 80, d: int = 9) -> tuple[Tensor, Tensor]:
    """Rows of correlated coordinates, some of which tell of the label."""
    labels = torch.rand(rows, generator=g(seed)) < 0.3
    x = torch.randn(rows, d, generator=g(seed + 1)) + labels[:, None] * torch.randn(d, generator=g(seed + 2))
    return x @ torch.randn(d, d, generator=g(seed + 3)) + 5, labels


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shrink", [0.0, 0.2])
def test_it_is_that_of_brute_force(k: int, seed: int, shrink: float) -> None:
    x, labels = mixed(seed)
    gains = {s: gain(x[:, list(s)], labels, shrink) for s in combinations(range(9), k)}
    found = best_subset(x, labels, k, shrink=shrink)
    best = max(gains, key=lambda s: gains[s])
    assert tuple(found.features.tolist()) == best
    assert found.explained == pytest.approx(gains[best], abs=1e-9)


def test_the_gain_is_the_variance_that_least_squares_explain() -> None:
    x, labels = mixed(3)
    y = (labels.double() - labels.double().mean()) / labels.double().std(correction=0)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    solved = torch.linalg.lstsq(z, y[:, None]).solution[:, 0]
    assert gain(x, labels) == pytest.approx(1 - (y - z @ solved).square().mean().item(), abs=1e-6)


def test_shrinking_is_by_what_chance_gives() -> None:
    x, labels = mixed(2, rows=400)
    own = x[:, mean_difference(x, labels).sort(descending=True).indices[:5]].double()
    r = own.T.corrcoef()[~torch.eye(5, dtype=torch.bool)].square()
    shrink = ((1 - r) ** 2).sum().item() / 399 / r.sum().item()
    found = best_subset(x, labels, 3, candidates=5)
    assert 1e-3 < shrink < 1 and found.explained == pytest.approx(
        gain(x[:, found.features], labels, shrink), abs=1e-9
    )
    # correlations that count for nothing leave the largest mean differences
    marginal = best_subset(x, labels, 3, shrink=1.0).features
    assert set(marginal.tolist()) == set(mean_difference(x, labels).topk(3).indices.tolist())
    independent = torch.randn(2000, 40, generator=g(7))
    chance = best_subset(independent, torch.rand(2000, generator=g(8)) < 0.2, 4).features
    assert set(chance.tolist()) == set(
        mean_difference(independent, torch.rand(2000, generator=g(8)) < 0.2).topk(4).indices.tolist()
    )


def test_branches_are_left_out_and_none_that_counts() -> None:
    x, labels, support = shifted(2000, 200, 4, 0.5, 0.3, g(), echoes=3)
    found = best_subset(x, labels, 4, shrink=0.0)
    assert found.features.tolist() == support.tolist()
    assert found.visited < 500  # of 20 876
    fifty = mean_difference(x, labels).topk(50).indices
    others = [gain(x[:, fifty[torch.randperm(50, generator=g(i))[:4]]], labels) for i in range(200)]
    assert found.explained > max(others)


def test_it_is_the_set_of_the_largest_mahalanobis_distance() -> None:
    x, labels = mixed(4)
    p = labels.double().mean().item()

    def distance(chosen: list[int]) -> float:
        own = x[:, chosen].double()
        apart = own[labels].mean(0) - own[~labels].mean(0)
        within = p * own[labels].T.cov(correction=0) + (1 - p) * own[~labels].T.cov(correction=0)
        return (apart @ torch.linalg.solve(within, apart)).item()

    for chosen in combinations(range(9), 3):
        d = p * (1 - p) * distance(list(chosen))
        assert gain(x[:, list(chosen)], labels) == pytest.approx(d / (1 + d), rel=1e-4)


def test_one_coordinate_is_that_of_the_largest_mean_difference() -> None:
    for seed in range(10):
        x, labels = mixed(seed)
        assert best_subset(x, labels, 1).features.tolist() == [int(mean_difference(x, labels).argmax())]


def test_units_and_order_don_t_matter() -> None:
    x, labels = mixed(1)
    first = best_subset(x, labels, 3)
    order = torch.randperm(9, generator=g(5))
    moved = (x * torch.logspace(-2, 2, 9) + 7)[:, order]
    assert set(order[best_subset(moved, labels, 3).features].tolist()) == set(first.features.tolist())


def test_codes_are_read_as_their_dense_rows() -> None:
    x, labels, _ = shifted(400, 20, 2, 1.0, 0.4, g())
    x = (x - 0.5).relu()
    dense, codes = best_subset(x, labels, 2), best_subset(Codes.from_dense(x), labels, 2)
    assert torch.equal(dense.features, codes.features) and dense.explained == codes.explained


def test_what_an_echo_tells_was_told() -> None:
    x, labels, support = shifted(2000, 50, 3, 1.0, 0.3, g(2), echoes=3)
    ranked = sparse(x, labels, 3).features
    assert torch.equal(best_subset(x, labels, 3).features, support) and not torch.equal(ranked, support)


@pytest.mark.parametrize("as_codes", [False, True])
def test_sets_never_share_a_coordinate(as_codes: bool) -> None:
    """Though all others never vary, so that what was taken is as good as they are."""
    labels = torch.rand(600, generator=g()) < 0.3
    x = torch.zeros(600, 8)
    x[:, [0, 2, 5]] = labels[:, None] + 0.1 * torch.rand(600, 3, generator=g(1))
    given, rest = ((Codes.from_dense(some) if as_codes else some) for some in (x[:400], x[400:]))
    found = repeats(given, labels[:400], (rest, labels[400:]), k=2)
    assert (
        len(found) == 2 and len(torch.cat(found).unique()) == 4 and {0, 2, 5} < set(torch.cat(found).tolist())
    )


@pytest.mark.parametrize("as_codes", [False, True])
def test_redundant_coordinates_are_counted(as_codes: bool) -> None:
    labels = torch.rand(600, generator=g()) < 0.3
    x = 0.1 * torch.rand(600, 12, generator=g(1))
    x[:, [2, 5, 7]] += labels[:, None].float()
    given = Codes.from_dense(x[:400]) if as_codes else x[:400]
    rest = Codes.from_dense(x[400:]) if as_codes else x[400:]
    found = repeats(given, labels[:400], (rest, labels[400:]))
    assert sorted(int(one) for one in found) == [2, 5, 7]
    pairs = repeats(given, labels[:400], (rest, labels[400:]), k=2)
    assert len(pairs) == 2 and len(torch.cat(pairs).unique()) == 4
    shuffled = labels[torch.randperm(600, generator=g(3))]
    assert repeats(given, shuffled[:400], (rest, shuffled[400:])) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: best_subset(x, y, 0), "k = 0 must lie in 1..9"),
        (lambda x, y: best_subset(x, y, 10), "k = 10 must lie in 1..9"),
        (lambda x, y: best_subset(x, y, 4, candidates=3), "1..3"),
        (lambda x, y: best_subset(x, y, 2, shrink=1.5), "shrink = 1.5 must lie in 0..1"),
        (lambda x, y: best_subset(x * 0 + 1, y, 1), "1..0, the number of candidates that vary"),
        (lambda x, y: best_subset(x, y | True, 2), "labels are false in 0 rows"),
        (lambda x, y: best_subset(x.log() * float("nan"), y, 2), "NaN"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    x, labels = mixed(0)
    with pytest.raises(ValueError, match=words):
        call(x, labels)


def test_shifted_classes_are_as_far_apart_as_said() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    for echoes, shifts in ((0, [1.0, 1.0, 1.0]), (2, [1.0, 1.5, 2.0])):
        x, labels, support = shifted(40_000, 30, 3, 1.0, 0.2, g(), echoes)
        assert labels.float().mean() == pytest.approx(0.2)
        on = x[labels].gt(0).float().mean(0)  # gelu keeps the sign
        assert on[support].sort().values == pytest.approx(normal.cdf(torch.tensor(shifts)), abs=0.02)
        others = torch.tensor([i for i in range(30) if i not in support.tolist()])
        away = (on - x[~labels].gt(0).float().mean(0)).abs()[others] > 0.1
        assert int(away.sum()) == echoes
        if echoes:
            strongest = x[:, support[on[support].argmax()], None]
            rest = x[:, others[away]] - 0.8 * strongest
            assert rest.var(0) == pytest.approx(torch.full((2,), 0.36), abs=0.02)
            assert (rest[labels].mean(0) - rest[~labels].mean(0)).abs().max() < 0.03
    with pytest.raises(ValueError, match="give both classes rows"):
        shifted(10, 5, 2, 1.0, 0.01, g())
