"""Matchings and subspaces of planted copies are found; each way equals its definition."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from torch import Tensor

from saekit.analyses.convergent import (
    against_null,
    clusters,
    correlations,
    exact,
    greedy,
    lasso,
    mutual_information,
    one_to_one,
    relate,
    rows_of,
    semi_matching,
)
from saekit.dictionaries import create
from saekit.testbed.copies import digit_net, hidden, permuted, turned
from saekit.testbed.digits import digits
from saekit.types import Codes


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(seed: int, rows: int = 200, n: int = 7, m: int = 5) -> tuple[Tensor, Tensor]:
    """Correlated ReLU units of two kinds, with large means."""
    z = torch.randn(rows, 4, generator=g(seed))
    a, b = (torch.randn(4, d, generator=g(seed + 1 + d)) for d in (n, m))
    noise = torch.randn(rows, n + m, generator=g(seed + 99)) / 2
    return (z @ a + noise[:, :n]).relu() + 10, (z @ b + noise[:, n:]).relu()


def sparse_codes(seed: int, n: int, rows: int = 300) -> Codes:
    """Codes of different numbers of entries a row, one feature of which never fires."""
    x = (torch.randn(rows, n, generator=g(seed)) - 1).relu()
    x[:, 2] = 0
    return Codes.from_dense(x)


def test_correlations_are_numpys() -> None:
    a, b = mixed(0)
    both = np.corrcoef(torch.cat([a, b], 1).double().numpy(), rowvar=False)
    related = relate(a, b)
    np.testing.assert_allclose(related.joint.numpy(), both, atol=1e-9)
    for found in (related.correlations, correlations(a, b)):
        np.testing.assert_allclose(found.numpy(), both[:7, 7:], atol=1e-9)


@pytest.mark.parametrize("kinds", ["codes, codes", "codes, dense", "dense, codes"])
def test_codes_are_read_as_their_dense_rows(kinds: str) -> None:
    pair = [sparse_codes(i, n) for i, n in ((0, 12), (1, 9))]
    given = [c if kind == "codes" else c.to_dense() for c, kind in zip(pair, kinds.split(", "), strict=True)]
    dense = relate(*(c.to_dense() for c in pair))
    found = relate(*given)
    for one, other in ((found.joint, dense.joint), (found.between, dense.between)):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(correlations(*given), dense.correlations, atol=1e-9, rtol=0)
    torch.testing.assert_close(mutual_information(*given), mutual_information(*(c.to_dense() for c in pair)))


def test_codes_are_never_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Codes) -> Tensor:
        raise AssertionError("a dense matrix of codes")

    a, b = sparse_codes(0, 12), sparse_codes(1, 9)
    monkeypatch.setattr(Codes, "to_dense", fail)
    related = relate(a, b)
    assert len(one_to_one(related.correlations).partner) == 12 and len(mutual_information(a, b)) == 12
    assert against_null(lambda x, y: relate(x, y).correlations.max().item(), a, b, 2).value <= 1


def test_codes_are_left_as_they_are() -> None:
    """Those of a pursuit too, which name a feature twice where an atom is taken again."""
    d = create("matching_pursuit", d_in=8, n_features=16, k=12)
    codes = d.encode(torch.randn(50, 8, generator=g()))
    codes = codes.with_values(codes.values.double()).detach()
    before = [part.clone() for part in (codes.offsets, codes.indices, codes.values)]
    assert len(codes.indices) > len((codes.row_ids() * 16 + codes.indices).unique())
    dense = codes.to_dense()
    torch.testing.assert_close(relate(codes, codes).a, relate(dense, dense).a)
    correlations(codes, codes), mutual_information(codes, codes)
    assert all(map(torch.equal, before, (codes.offsets, codes.indices, codes.values)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(kind: torch.dtype) -> None:
    a, b = (one.to(kind) for one in mixed(0))
    for measure in (correlations, mutual_information):
        assert torch.equal(measure(a, b), measure(a.double(), b.double()))
    assert len(one_to_one(correlations(a, b).to(kind)).scores(correlations(a, b))) == 5


def test_a_unit_that_never_varies_goes_with_none() -> None:
    a, b = mixed(0)
    a[:, 3] = 0.1
    related = relate(a, b)
    for constant in (0.1, 1e4 / 3, 0.0):  # whatever rounding leaves of it
        still = torch.full((200, 1), constant)
        assert not correlations(still, b).any() and not correlations(Codes.from_dense(still), b).any()
    assert not related.correlations[3].any() and not related.joint[3].any()
    assert not greedy(related, 2).weight[3].any() and clusters(related, 3)[0][3] == -1
    assert (clusters(related, 3, "agglomerative")[0] >= 0).sum() == 6
    assert mutual_information(a, b)[3].abs().max() < 1e-12
    assert torch.equal(greedy(relate(b, a), 1).explained(relate(b, a))[3], torch.tensor(0.0).double())


@pytest.mark.parametrize("bins", [1, 3, 4])
def test_information_is_that_of_the_table(bins: int) -> None:
    a, b = mixed(0)
    b = (b * 2).round()  # ties

    def cells(x: Tensor) -> np.ndarray:
        on = x != 0
        rank = (x[on][:, None] > x[on][None]).sum(1)  # how many are smaller: ties share it
        out = torch.full((len(x),), -1)
        out[on] = rank * bins // max(1, int(on.sum()))
        return out.numpy()

    found = mutual_information(a, b, bins)
    for i, j in ((0, 0), (3, 2), (6, 4)):
        assert found[i, j].item() == pytest.approx(mutual_info_score(cells(a[:, i]), cells(b[:, j])) / np.log(2), abs=1e-9)  # fmt: skip


def test_information_doesn_t_depend_on_how_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sparse_codes(0, 12), sparse_codes(1, 9)
    whole = mutual_information(a, b)
    monkeypatch.setattr("saekit.analyses.convergent.CELLS", 1)
    assert torch.equal(mutual_information(a, b), whole)


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_those_of_the_largest_sum(seed: int) -> None:
    scores = torch.randn(5, 5, generator=g(seed), dtype=torch.float64)
    best = max(scores[range(5), list(p)].sum().item() for p in permutations(range(5)))
    pairs = one_to_one(scores)
    assert pairs.scores(scores).sum().item() == pytest.approx(best) and len(set(pairs.partner.tolist())) == 5
    assert (pairs.scores(scores) <= semi_matching(scores).scores(scores)).all()


def test_some_have_no_partner_where_there_are_too_few() -> None:
    scores = torch.rand(6, 4, generator=g())
    pairs = one_to_one(scores)
    assert (pairs.partner == -1).sum() == 2 and len(pairs.scores(scores)) == 4
    assert (one_to_one(scores.T).partner >= 0).all()


@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("way", ["correlation", "information"])
def test_a_permuted_copy_is_found(way: str, as_codes: bool) -> None:
    x = hidden(digit_net(digits(0), 0, width=24), digits(0).test)[1]
    x = x[:, x.std(0) > 0]
    copy, went = permuted(x, g())
    pair = (Codes.from_dense(x), Codes.from_dense(copy)) if as_codes else (x, copy)
    scores = relate(*pair).correlations if way == "correlation" else mutual_information(*pair)
    assert torch.equal(one_to_one(scores).partner, went)
    if way == "correlation":
        assert torch.equal(semi_matching(scores).partner, went)
        assert greedy(relate(*pair), 1).explained(relate(*pair)).min() > 1 - 1e-9


@pytest.mark.parametrize("k", [1, 2, 3])
def test_exact_is_brute_force_and_greedy_no_better(k: int) -> None:
    a, b = mixed(2)
    related = relate(a, b)
    best = [
        max(LinearRegression().fit(x := a[:, list(s)].double(), y).score(x, y) for s in combinations(range(7), k))
        for y in b.T.double()
    ]  # fmt: skip
    found = exact(related, k).explained(related)
    np.testing.assert_allclose(found, best, atol=1e-9)
    assert (greedy(related, k).explained(related) <= found + 1e-9).all()
    assert (greedy(related, k).predictors == k).all() and (exact(related, k).predictors == k).all()


def test_greedy_takes_what_helps_most() -> None:
    a, b = mixed(3)
    chosen: list[int] = []
    for k in (1, 2, 3, 4):
        scores = {i: LinearRegression().fit(a[:, [*chosen, i]], b[:, 0]).score(a[:, [*chosen, i]], b[:, 0]) for i in range(7) if i not in chosen}  # fmt: skip
        chosen.append(max(scores, key=lambda i: scores[i]))
        weight = greedy(relate(a, b), k).weight[:, 0]
        assert set(weight.nonzero()[:, 0].tolist()) == set(chosen)


def test_targets_don_t_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    related = relate(*mixed(4))
    whole = greedy(related, 3).weight
    monkeypatch.setattr("saekit.analyses.convergent.TARGETS", 2)
    assert torch.equal(greedy(related, 3).weight, whole)


def test_the_lasso_is_scikit_learns() -> None:
    a, b = (x.double() for x in mixed(5))
    z, y = ((x - x.mean(0)) / x.std(0, correction=0) for x in (a, b))
    penalties = (0.01, 0.3, 0.1)
    for penalty, found in zip(penalties, lasso(relate(a, b), penalties), strict=True):
        own = Lasso(penalty, tol=1e-10, max_iter=100_000).fit(z, y)
        ours = found.weight * a.std(0, correction=0)[:, None] / b.std(0, correction=0)
        np.testing.assert_allclose(ours.T, own.coef_, atol=2e-3)
    assert not lasso(relate(a, b), [1.0])[0].weight.any()


def test_what_is_explained_on_other_rows_is_r2_but_for_the_intercept() -> None:
    (a, b), (c, d) = mixed(6), mixed(6, rows=150)
    found = greedy(relate(a, b), 2)
    said = c.double() @ found.weight
    left = (d.double() - said).var(0) / d.double().var(0)
    torch.testing.assert_close(found.explained(relate(c, d)), 1 - left)


@pytest.mark.parametrize("way", ["spectral", "agglomerative"])
@pytest.mark.parametrize("seed", range(3))
def test_turned_blocks_are_found(way: str, seed: int) -> None:
    world = turned(2000, 12, g(seed))
    related = relate(world.a, world.b)
    found = clusters(related, 12, way)
    assert adjusted_rand_score(torch.cat([world.blocks_a, world.blocks_b]), torch.cat(found)) >= 0.9
    assert one_to_one(related.correlations).scores(related.correlations).max() < 0.9
    for prediction in (greedy(related, 2), exact(related, 2)):
        assert prediction.explained(related).min() >= 0.95
        used = [set(world.blocks_a[w.nonzero()[:, 0]].tolist()) for w in prediction.weight.T]
        assert used == [{block} for block in world.blocks_b.tolist()]


def test_a_turn_is_as_far_as_said() -> None:
    world = turned(40_000, 6, g(3))
    sizes = correlations(world.a, world.b).abs()
    assert world.angles.min() > 0.5 and world.angles.max() < 1.1
    for block, angle in enumerate(world.angles):
        own = sizes[world.blocks_a == block]
        expected = torch.stack([angle.sin(), angle.cos()]).sort().values.double().expand(2, 2)
        torch.testing.assert_close(
            own[:, world.blocks_b == block].sort(1).values, expected, atol=0.03, rtol=0
        )
        assert own[:, world.blocks_b != block].max() < 0.03


def test_shuffled_rows_share_nothing() -> None:
    a, b = mixed(0, rows=2000)

    def matched(x: Tensor, y: Tensor) -> float:
        scores = relate(x, y).correlations
        return semi_matching(scores).scores(scores).mean().item()

    found = against_null(matched, a, b, draws=5, seed=1)
    assert len(found.null) == 5 and found.value > 0.3 and max(found.null) < 0.1
    assert against_null(matched, a, b, 5, 1) == found and against_null(matched, a, b, 5, 2).null != found.null


def test_rows_of_codes_are_those_of_their_dense_rows() -> None:
    codes, order = sparse_codes(0, 12), torch.randperm(300, generator=g())[:50]
    assert torch.equal(rows_of(codes, order).to_dense(), codes.to_dense()[order])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a, b: relate(a, b[1:]), "a has 200 rows and b 199"),
        (lambda a, b: relate(a[:2], b[:2]), "2 rows, of which two are always in line"),
        (lambda a, b: relate(a, b / 0), "b holds NaN or Inf"),
        (lambda a, b: relate(Codes.from_dense(a / 0), b), "a holds NaN or Inf"),
        (lambda a, b: mutual_information(a, b, 0), "bins = 0 must be at least 1"),
        (lambda a, b: greedy(relate(a, b), 8), "k = 8 must lie in 1..7"),
        (lambda a, b: exact(relate(a, b), 0), "k = 0 must lie in 1..7"),
        (lambda a, b: exact(relate(a, b), 4, candidates=3), "1..3"),
        (lambda a, b: lasso(relate(a, b), []), "must all be above 0"),
        (lambda a, b: lasso(relate(a, b), [0.1, -1.0]), "must all be above 0"),
        (lambda a, b: clusters(relate(a, b), 13), "n_clusters = 13 must lie in 2..12"),
        (lambda a, b: clusters(relate(a, b), 3, "means"), "'means' is none of spectral, agglomerative"),
        (lambda a, b: against_null(lambda x, y: 0.0, a, b[:5]), "a has 200 rows and b 5"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(*mixed(0))
