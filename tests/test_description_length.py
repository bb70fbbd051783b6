"""Laws of the description length of codes, and of the precision that they are quantised to."""

import math

import pytest
import torch
from drawn_codes import entropy, normal, sparse

from saekit import metrics
from saekit.evaluate.mdl import coarsest_precision, description_length, quantised, upper_bound
from saekit.types import Codes, SaekitError


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_independent_bernoulli_codes_cost_their_entropy(p: float) -> None:
    codes = sparse(4000, 50, p)
    codes = codes.with_values(torch.ones_like(codes.values))
    assert description_length(codes, 0.1) == pytest.approx(50 * entropy(p), rel=0.02)


def test_a_hand_computed_length() -> None:
    # feature 0: p = 3/4, values 1, 1, 2; feature 1: p = 1/4, one value; feature 2: silent; 3: always on
    dense = torch.tensor([[1.0, 0, 0, 5], [1, 0, 0, 5], [2, 3, 0, 5], [0, 0, 0, 5]])
    q = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    expected = entropy(0.75) + 0.75 * q + entropy(0.25)
    assert description_length(Codes.from_dense(dense), 1.0) == pytest.approx(expected, rel=1e-12)
    # at 2, 1 / 2 rounds to even: 0, silent; one firing of 2 is left, one of 3, and 5 is always on
    assert description_length(Codes.from_dense(dense), 2.0) == pytest.approx(2 * entropy(0.25), rel=1e-12)


def test_the_order_of_features_and_the_scale_do_not_matter() -> None:
    codes = sparse(300, 40, 0.2)
    base = description_length(codes, 0.25)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    permuted = Codes.from_dense(codes.to_dense()[:, order])
    assert description_length(permuted, 0.25) == pytest.approx(base, rel=1e-12)
    shuffled = Codes.from_dense(codes.to_dense().flip(0))
    assert description_length(shuffled, 0.25) == pytest.approx(base, rel=1e-12)
    for scale in (2.0**-60, 1024.0):
        scaled = codes.with_values(scale * codes.values)
        assert description_length(scaled, scale * 0.25) == pytest.approx(base, rel=1e-12)


def test_a_one_hot_dictionary_costs_up_to_log2_e_more_than_its_index() -> None:
    for n in (2, 16, 512):
        codes = Codes.from_rectangular(torch.arange(n)[:, None], torch.ones(n, 1), n)
        expected = math.log2(n) + (n - 1) * math.log2(n / (n - 1))
        found = description_length(codes, 0.5)
        assert found == pytest.approx(expected, rel=1e-12) == pytest.approx(n * entropy(1 / n))
        assert upper_bound(codes, 0) == math.log2(n) < found < math.log2(n) + math.log2(math.e)


@pytest.mark.parametrize("p", [0.001, 0.02, 0.3, 1.0])
def test_the_length_is_never_negative_and_bounded(p: float) -> None:
    codes = sparse(500, 64, p, quantum=0.5)
    for precision in (1e-6, 0.5, 3.0, 1e9):
        found = description_length(codes, precision)
        bits = math.log2(max(1, quantised(codes, precision).values.unique().numel()))
        bound = upper_bound(codes, bits)
        assert 0 <= found <= bound + math.log2(math.e)
        if metrics.l0(codes) >= math.e:
            assert found <= bound
    assert description_length(codes, 1e9) == 0
    assert upper_bound(codes, 7) == pytest.approx(metrics.l0(codes) * (7 + 6), rel=1e-12)


def test_stored_zeros_cost_nothing_and_silent_codes_have_length_0() -> None:
    codes = sparse(200, 30, 0.2)
    padded = torch.cat([codes.to_dense(), torch.zeros(200, 30)], 1)
    indices, values = padded.abs().topk(30).indices, padded.gather(1, padded.abs().topk(30).indices)
    stored = Codes.from_rectangular(indices, values, 60)
    assert (stored.values == 0).any()
    assert description_length(stored, 0.1) == pytest.approx(description_length(codes, 0.1), rel=1e-12)
    assert description_length(Codes.from_dense(torch.zeros(5, 4)), 1.0) == 0
    always = Codes.from_rectangular(torch.zeros(7, 1, dtype=torch.int64), torch.full((7, 1), 0.3), 1)
    assert description_length(always, 0.01) == 0


def test_quantising_rounds_and_keeps_the_support() -> None:
    codes = sparse(100, 20, 0.3)
    coarse = quantised(codes, 0.5)
    assert torch.equal(coarse.indices, codes.indices) and torch.equal(coarse.offsets, codes.offsets)
    assert torch.equal(2 * coarse.values, (2 * coarse.values).round())
    assert (coarse.values - codes.values).abs().max() <= 0.25
    assert torch.equal(quantised(coarse, 0.5).values, coarse.values)
    assert description_length(coarse, 0.5) == description_length(codes, 0.5)
    assert metrics.l0(coarse) < metrics.l0(codes)
    rectangular = Codes.from_rectangular(torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 0.7), 2)
    assert quantised(rectangular, 1.0).rectangular()[1].tolist() == [[1.0]] * 3


def test_the_coarsest_precision_holds_and_the_next_does_not() -> None:
    codes = sparse(400, 24, 0.2)
    atoms = normal(24, 12, seed=5)
    x = codes.to_dense() @ atoms + 0.1 * normal(400, 12, seed=6)
    runs = []

    def decode(given: Codes) -> torch.Tensor:
        runs.append(given)
        return given.to_dense() @ atoms

    def rise(precision: float) -> float:
        return metrics.fvu(x, decode(quantised(codes, precision))) - metrics.fvu(x, decode(codes))

    found = [coarsest_precision(codes, decode, x, tolerance) for tolerance in (0.001, 0.01, 0.1)]
    assert found == sorted(found) and found[0] > 0
    for precision, tolerance in zip(found, (0.001, 0.01, 0.1), strict=True):
        assert rise(precision) <= tolerance < rise(precision * 2 ** (1 / 32) * (1 + 1e-9))
    assert len(runs) < 60
    # uniform rounding errors: variance precision^2 / 12 per active value, none of them 0
    assert rise(found[0]) == pytest.approx(0.001, rel=0.2)
    scaled = codes.with_values(4 * codes.values)
    same = coarsest_precision(scaled, lambda c: decode(c) / 4, x, 0.01)
    assert same == pytest.approx(4 * found[1], rel=1e-9)


def test_a_tolerance_that_silence_meets_is_met_by_silence() -> None:
    codes = sparse(50, 8, 0.5)
    x = normal(50, 8, seed=4)
    found = coarsest_precision(codes, lambda c: c.to_dense(), x, 1e6)
    assert found == 2 * codes.values.abs().max().item() and metrics.l0(quantised(codes, found)) == 0
    whole = Codes.from_dense(torch.tensor([[4.0, 0], [0, 1], [2, 2]]))
    assert coarsest_precision(whole, lambda c: c.to_dense(), whole.to_dense(), 0.0) == 1


def test_bad_codes_and_precisions() -> None:
    codes = Codes.from_dense(torch.tensor([[1.0, 0], [0, 2]]))
    for precision in (0, -1.0, math.nan, math.inf):
        for call in (description_length, quantised):
            with pytest.raises(SaekitError, match=r"precision = .* must be above 0"):
                call(codes, precision)
    for value in (math.nan, math.inf):
        with pytest.raises(SaekitError, match="not finite"):
            description_length(codes.with_values(torch.tensor([1.0, value])), 1.0)
    with pytest.raises(SaekitError, match="not finite"):
        quantised(codes, 5e-324)
    with pytest.raises(SaekitError, match="no rows"):
        description_length(Codes.from_dense(torch.zeros(0, 3)), 1.0)
    twice = Codes.from_rectangular(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), 3)
    with pytest.raises(SaekitError, match="more than once in a row"):
        description_length(twice, 1.0)
    with pytest.raises(SaekitError, match="bits = -1"):
        upper_bound(codes, -1)


def test_bad_distortion_targets() -> None:
    codes = Codes.from_dense(torch.tensor([[1.0, 0], [0, 2]]))
    x = codes.to_dense()

    def decode(given: Codes) -> torch.Tensor:
        return given.to_dense()

    with pytest.raises(SaekitError, match=r"tolerance = -0\.1"):
        coarsest_precision(codes, decode, x, -0.1)
    with pytest.raises(SaekitError, match=r"x has rows of shape \(1, 2\)"):
        coarsest_precision(codes, decode, x[None], 0.1)
    with pytest.raises(SaekitError, match="FVU of the exact codes is"):
        coarsest_precision(codes, decode, torch.ones(2, 2), 0.1)
    with pytest.raises(SaekitError, match="no active values"):
        coarsest_precision(codes.with_values(torch.zeros(2)), decode, x, 0.1)
    third = codes.with_values(torch.tensor([1.0, 1 / 3], dtype=torch.float64))
    target = third.to_dense()
    with pytest.raises(SaekitError, match="give a larger one"):
        coarsest_precision(third, decode, target, 0.0)
