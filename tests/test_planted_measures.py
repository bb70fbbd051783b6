"""Laws of what is measured against planted features: splitting and hedging."""

import math

import pytest
import torch
import torch.nn.functional as F
from drawn_codes import normal, orthogonal, sparse

from saekit.evaluate.planted import hedging, splitting
from saekit.types import Codes, SaekitError


@pytest.fixture
def world() -> tuple[torch.Tensor, Codes]:
    """8 orthonormal true features in 10 dimensions, each active in a fifth of 200 rows."""
    return orthogonal(10)[:8], sparse(200, 8, 0.2, seed=3)


def test_a_perfect_dictionary_neither_splits_nor_hedges(world: tuple[torch.Tensor, Codes]) -> None:
    truth, codes = world
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    decoder = (-3 * truth)[order]
    found = splitting(decoder, truth, Codes.from_dense(codes.to_dense()[:, order]), codes)
    assert found.share == 0 and found.mean == 1 and found.counts.tolist() == [1] * 8
    assert hedging(decoder, truth) == 0


def test_features_split_by_rows_are_counted(world: tuple[torch.Tensor, Codes]) -> None:
    """True feature t of the first two fires through 3 features in turn; the others keep one."""
    truth, codes = world
    dense, turn = codes.to_dense(), torch.arange(200)[:, None] % 3 == torch.arange(3)
    split = [dense[:, t : t + 1] * turn for t in (0, 1)]
    noise = 0.2 * normal(6, 10, seed=8)
    decoder = torch.cat([truth[[0, 0, 0, 1, 1, 1]] + noise, truth[2:]])
    found = splitting(decoder, truth, Codes.from_dense(torch.cat([*split, dense[:, 2:]], 1)), codes)
    assert found.counts.tolist() == [3, 3, 1, 1, 1, 1, 1, 1]
    assert found.share == pytest.approx(2 / 8) and found.mean == pytest.approx(12 / 8)


def test_what_does_not_fire_with_a_true_feature_is_not_a_part_of_it() -> None:
    truth = torch.eye(3)
    # row: 0 alone, 0 alone, 1 alone, 1 alone; feature 2 is never active
    true_codes = Codes.from_dense(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]))
    decoder = truth[[0, 0, 0, 1]]
    # the second copy of 0 never fires, the third fires with 0 in 1 of 3 rows
    codes = Codes.from_dense(torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]))
    found = splitting(decoder, truth, codes, true_codes)
    assert found.counts.tolist() == [1, 1, 0] and found.share == 0 and found.mean == 1
    lax = splitting(decoder, truth, codes, true_codes, threshold=0.3)
    assert lax.counts.tolist() == [2, 1, 0] and lax.share == 0.5 and lax.mean == 1.5
    # more than half is asked for, not half
    half = Codes.from_dense(torch.tensor([[1.0, 0, 0, 0], [0] * 4, [1, 0, 0, 0], [0] * 4]))
    nothing = splitting(decoder, truth, half, true_codes)
    assert nothing.counts.tolist() == [0, 0, 0] and math.isnan(nothing.share) and math.isnan(nothing.mean)


def test_splitting_ignores_order_scale_and_sign(world: tuple[torch.Tensor, Codes]) -> None:
    truth, codes = world
    decoder, fired = normal(14, 10, seed=2), sparse(200, 14, 0.5, seed=9)
    base = splitting(decoder, truth, fired, codes, threshold=0.2)
    assert base.counts.sum() > 0
    order = torch.randperm(14, generator=torch.Generator().manual_seed(4))
    other = splitting(
        (decoder * torch.linspace(-1, 1.5, 14)[:, None])[order],
        truth,
        Codes.from_dense(fired.to_dense()[:, order]),
        codes,
        threshold=0.2,
    )
    assert torch.equal(other.counts, base.counts) and other[:2] == base[:2]


@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_hedging_is_the_squared_share_of_the_missing_feature(mixed: float) -> None:
    truth = orthogonal(6)
    decoder = truth[:3].clone()
    decoder[0] -= mixed * truth[4]
    share = mixed**2 / (1 + mixed**2)
    assert hedging(decoder, truth) == pytest.approx(share / 3, abs=1e-6)
    assert hedging(decoder[:1], truth) == pytest.approx(share, abs=1e-6)
    # with a feature of its own the same mixture is no hedging
    assert hedging(torch.cat([decoder, truth[4:5]]), truth) == pytest.approx(0, abs=1e-10)


def test_the_overlap_of_planted_features_is_not_hedging() -> None:
    """Coefficients are of a fit, not cosines; with few features they are the mixture's own."""
    truth = F.normalize(normal(6, 8), dim=1)
    assert (truth[0] @ truth[5]).abs() > 0.1
    decoder = truth[:4].clone()
    assert hedging(5 * decoder, truth) == pytest.approx(0, abs=1e-9)
    decoder[0] = decoder[0] + 0.4 * truth[5]
    assert cosine_nearest(decoder, truth) == [0, 1, 2, 3]
    assert hedging(decoder, truth) == pytest.approx(0.16 / 1.16 / 4, rel=1e-4)


def test_a_part_of_the_truth_in_superposition_hedges_nothing() -> None:
    truth = normal(40, 8)
    assert cosine_nearest(truth[:5], truth) == list(range(5))
    assert hedging(truth[:5], truth) == pytest.approx(0, abs=1e-9)
    doubled = torch.cat([truth[:5], truth[:5]])  # dependent with the features of the dictionary itself
    assert hedging(truth[:5], doubled) == pytest.approx(0, abs=1e-9)
    assert 0 < hedging(truth[:5] + 0.3 * normal(5, 8, seed=1), truth) < 1


def test_hedging_ignores_order_scale_sign_and_dead_rows() -> None:
    truth, decoder = normal(9, 12), normal(5, 12, seed=1)
    base = hedging(decoder, truth)
    assert 0 < base < 1
    other = decoder.flip(0) * torch.tensor([1.0, -2, 3, 1e-20, -5])[:, None]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert hedging(other, -7 * truth[order]) == pytest.approx(base, rel=1e-5)
    assert hedging(torch.cat([torch.zeros(3, 12), decoder]), truth) == pytest.approx(base, rel=1e-9)
    assert math.isnan(hedging(torch.zeros(2, 12), truth))
    # a dead row is nobody's feature: true feature 0 stays unmatched
    assert hedging(torch.tensor([[0.0, 0, 0], [0.5, 1, 0]]), torch.eye(3)) == pytest.approx(0.2)


def test_directions_that_float32_cannot_tell_apart_are_one() -> None:
    v = F.normalize(normal(1, 20), dim=1)
    truth = torch.cat([v, v + 1e-8 * normal(1, 20, seed=1)])
    assert hedging(v + 1e-7 * normal(1, 20, seed=2), truth) == pytest.approx(0, abs=1e-6)


def cosine_nearest(decoder: torch.Tensor, truth: torch.Tensor) -> list[int]:
    return F.cosine_similarity(decoder[:, None], truth[None], dim=2).abs().argmax(1).tolist()


def test_bad_planted_input(world: tuple[torch.Tensor, Codes]) -> None:
    truth, codes = world
    with pytest.raises(SaekitError, match=r"codes\.n_features is 8: its directions have 7 rows"):
        splitting(truth[:7], truth, codes, codes)
    with pytest.raises(SaekitError, match=r"true_codes\.n_features is 8"):
        splitting(truth, truth[:7], codes, codes)
    with pytest.raises(SaekitError, match="encode the 5 rows"):
        splitting(truth, truth, codes, sparse(5, 8, 0.5))
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(SaekitError, match="threshold = "):
            splitting(truth, truth, codes, codes, threshold)
    with pytest.raises(SaekitError, match="truth has no rows"):
        hedging(truth, truth[:0])
    with pytest.raises(SaekitError, match="decoder has no rows"):
        hedging(truth[:0], truth)
    with pytest.raises(SaekitError, match="NaN or inf"):
        hedging(truth * math.nan, truth)
