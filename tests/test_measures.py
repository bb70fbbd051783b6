"""Laws of the measures of dictionaries: stability, description length, geometry, planted structure."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from saekit import metrics
from saekit.evaluate.geometry import (
    babel,
    coactive_babel,
    cosine_blocks,
    decoder_projection,
    effective_rank,
    mean_decoder_cosine,
)
from saekit.evaluate.mdl import coarsest_precision, description_length, quantised, upper_bound
from saekit.evaluate.planted import hedging, splitting
from saekit.evaluate.stability import mmcs, shared_features, stability
from saekit.types import Codes, SaekitError

GEOMETRY = sys.modules["saekit.evaluate.geometry"]  # by its module: saekit.evaluate is the function


@pytest.fixture(params=[1 << 24, 64, 1], ids=["whole", "blocks", "single rows"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results must not depend on how many numbers are held at a time."""
    monkeypatch.setattr(GEOMETRY, "BLOCK", request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(rows: int, features: int, p: float, seed: int = 0, quantum: float = 0.0) -> Codes:
    """Independent features that fire with probability p, normal values or multiples of a quantum."""
    on = torch.rand(rows, features, generator=torch.Generator().manual_seed(seed)) < p
    values = normal(rows, features, seed=seed + 1)
    if quantum:
        values = quantum * (1 + (4 * values.abs()).floor())
    return Codes.from_dense(on * values)


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed).double()).Q.float()


def entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


# stability


def test_the_same_features_in_any_order_scale_and_basis_are_stable(block: None) -> None:
    a = normal(20, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    other = a[order] * torch.linspace(1e-25, 1e25, 20)[:, None]
    assert stability(a, other) == pytest.approx(1, abs=1e-6)
    assert mmcs(a, other) == pytest.approx(1, abs=1e-6)
    pairs = shared_features(a, other, 0.999)
    assert pairs.a.tolist() == list(range(20)) and order[pairs.b].tolist() == list(range(20))
    b, turn = normal(15, 8, seed=2), orthogonal(8)
    assert stability(a, b) == pytest.approx(stability(b, a), abs=1e-6)
    assert stability(a @ turn, b @ turn) == pytest.approx(stability(a, b), abs=1e-5)
    assert mmcs(a @ turn, b @ turn) == pytest.approx(mmcs(a, b), abs=1e-5)


def test_a_feature_and_its_opposite_are_different() -> None:
    eye = torch.eye(3)
    assert stability(eye, -eye) == 0  # a derangement: cosine 0 everywhere but on the diagonal, -1
    assert mmcs(eye[:1], -eye[:1]) == stability(eye[:1], -eye[:1]) == -1


def test_matching_is_one_to_one_and_mmcs_is_not() -> None:
    a = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    b = torch.tensor([[1.0, 0], [0.6, 0.8]])
    # best: b0 with one of the twins, b1 with e2 (0.8)
    assert stability(a, b) == pytest.approx(0.9)
    assert mmcs(a, b) == pytest.approx((1 + 1 + 0.8) / 3) and mmcs(b, a) == pytest.approx(0.9)
    pairs = shared_features(a, b, 0.5)
    assert pairs.b.tolist() == [0, 1] and pairs.a[1] == 2
    assert pairs.cosine.tolist() == pytest.approx([1, 0.8])
    assert len(shared_features(a, b, 0.9).a) == 1 and len(shared_features(a, b, 1.0).a) == 1


def test_the_best_matching_is_not_the_greedy_one() -> None:
    b = F.normalize(torch.tensor([[1.0, 0.2], [1.0, -2.0]]), dim=1)
    # greedy takes (e1, b0) at 0.98 and is left with (e2, b1) at -0.89
    best = (b[1, 0] + b[0, 1]).item() / 2
    assert best > (b[0, 0] + b[1, 1]).item() / 2
    assert stability(torch.eye(2), b) == pytest.approx(best, abs=1e-6)


def test_mmcs_is_at_least_stability_for_the_smaller_side() -> None:
    for seed in range(3):
        a, b = normal(9, 6, seed=seed), normal(12, 6, seed=seed + 9)
        assert mmcs(a, b) >= stability(a, b) - 1e-6


def test_bad_dictionaries_to_compare() -> None:
    a = normal(4, 3)
    for call in (stability, mmcs, lambda a, b: shared_features(a, b, 0.5)):
        with pytest.raises(SaekitError, match="b has no rows"):
            call(a, a[:0])
        with pytest.raises(SaekitError, match="NaN or inf"):
            call(a, a * math.nan)
        with pytest.raises(SaekitError, match="b has 2 columns and a 3"):
            call(a, a[:, :2])
    with pytest.raises(SaekitError, match=r"cosine = 1\.5"):
        shared_features(a, a, 1.5)
    assert stability(a, torch.zeros(2, 3)) == 0


# description length


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


# geometry


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_r_equal_directions_have_effective_rank_r(shift: float, block: None) -> None:
    frame = torch.linalg.qr(normal(12, 5).double()).Q
    points = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    found = effective_rank(7 * points @ frame.T + shift)
    assert found.entropy == pytest.approx(5) and found.participation == pytest.approx(5)
    assert found.dimensions == 5
    assert effective_rank(points @ frame.T, share=0.6).dimensions == 3
    assert effective_rank(points @ frame.T, share=0.61).dimensions == 4
    assert effective_rank(points @ frame.T, share=1.0).dimensions == 5


def test_a_hand_computed_spectrum() -> None:
    scale = torch.tensor([3.0, 1.0, 0.0]).sqrt()
    x = torch.cat([torch.diag(scale), -torch.diag(scale)])  # eigenvalues 3 : 1 : 0
    found = effective_rank(x, share=0.75)
    assert found.entropy == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)), rel=1e-6)
    assert found.participation == pytest.approx(16 / 10, rel=1e-6)
    assert effective_rank(x, share=0.7).dimensions == 1 and effective_rank(x, share=0.8).dimensions == 2


def test_effective_rank_is_ordered_and_knows_no_basis() -> None:
    x = normal(200, 10) * torch.linspace(0.1, 3, 10)
    base = effective_rank(x)
    assert 1 <= base.participation <= base.entropy <= 10 and 1 <= base.dimensions <= 10
    turned = effective_rank((5 * x @ orthogonal(10) + 2).view(20, 10, 10))
    assert turned == pytest.approx(base, rel=1e-4)
    assert effective_rank(x[:3]).entropy <= 2 + 1e-9


def test_babel_of_an_equiangular_frame_is_r_times_its_coherence(block: None) -> None:
    n = 6
    simplex = torch.eye(n) - 1 / n  # cosine -1 / (n - 1) between any two
    for r in range(1, n):
        assert babel(simplex, r) == pytest.approx(r / (n - 1), rel=1e-5)
    assert mean_decoder_cosine(simplex) == pytest.approx(1 / (n - 1), rel=1e-5)
    assert babel(torch.eye(n), n - 1) == mean_decoder_cosine(torch.eye(n)) == 0


def test_babel_equals_its_definition_by_brute_force(block: None) -> None:
    from itertools import combinations

    atoms = normal(7, 4)
    gram = F.normalize(atoms, dim=1) @ F.normalize(atoms, dim=1).T
    for r in (1, 2, 3):
        slow = max(
            gram[j, list(chosen)].abs().sum().item()
            for chosen in combinations(range(7), r)
            for j in set(range(7)) - set(chosen)
        )
        assert babel(atoms, r) == pytest.approx(slow, rel=1e-5)
    pairs = [abs(gram[i, j].item()) for i, j in combinations(range(7), 2)]
    assert mean_decoder_cosine(atoms) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_coherence_ignores_sign_scale_and_order() -> None:
    atoms = normal(9, 5)
    other = (atoms * torch.linspace(-2, 3, 9)[:, None]).flip(0)
    values = [babel(atoms, r) for r in range(1, 9)]
    assert values == sorted(values) and all(value <= r for r, value in enumerate(values, 1))
    assert babel(other, 3) == pytest.approx(values[2], rel=1e-5)
    assert mean_decoder_cosine(other) == pytest.approx(mean_decoder_cosine(atoms), rel=1e-5)


def test_conditional_orthogonality_is_seen_only_among_active_features(block: None) -> None:
    """Two bases at an angle: each row uses one of them, so its features are orthogonal."""
    atoms = torch.cat([torch.eye(6), orthogonal(6)])
    on = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    dense = torch.zeros(40, 12)
    dense[:20, :6], dense[20:, 6:] = on[:20].float(), on[20:].float()
    codes = Codes.from_dense(dense)
    assert babel(atoms, 3) > 1
    together = coactive_babel(atoms, codes, 3)
    assert together.max < 1e-5 and together.mean < 1e-5
    assert together.rows == int((codes.l0() >= 2).sum())


def test_coactive_babel_equals_babel_of_the_active_atoms(block: None) -> None:
    atoms, codes = normal(15, 6), sparse(30, 15, 0.3)
    active = [row.nonzero()[:, 0] for row in codes.to_dense()]
    for r in (1, 2, 5):
        slow = [babel(atoms[a], min(r, len(a) - 1)) for a in active if len(a) > 1]
        found = coactive_babel(atoms, codes, r)
        assert found.max == pytest.approx(max(slow), rel=1e-5) and found.max <= babel(atoms, r) + 1e-6
        assert found.mean == pytest.approx(sum(slow) / len(slow), rel=1e-5) and found.rows == len(slow)
    everything = Codes.from_dense(torch.ones(2, 15))
    assert coactive_babel(atoms, everything, 4).mean == pytest.approx(babel(atoms, 4), rel=1e-6)


def test_a_stored_zero_is_not_active_and_lone_features_have_no_pair() -> None:
    atoms = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    dense = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    codes = Codes.from_rectangular(torch.tensor([[0, 1], [0, 2]]), dense, 3)
    assert coactive_babel(atoms, codes, 1) == (0.0, 0.0, 1)
    none = coactive_babel(atoms, Codes.from_dense(torch.eye(3)), 1)
    assert none.rows == 0 and math.isnan(none.mean) and math.isnan(none.max)


def test_the_decoder_projection_is_a_rank_of_all_projections(block: None) -> None:
    x, atoms, bias = normal(11, 5), normal(8, 5, seed=1), normal(5, seed=2)
    ordered = ((x - bias) @ atoms.T).flatten().sort(descending=True).values
    ranks = [3, 1, 8, 3]
    expected = [ordered[n * 11 - 1].item() for n in ranks]
    assert decoder_projection(x, atoms, bias, ranks) == pytest.approx(expected, rel=1e-5)
    assert decoder_projection(x, atoms, bias, 3) == pytest.approx(expected[0], rel=1e-5)
    assert decoder_projection(x, atoms, bias, 8) == pytest.approx(ordered[-1].item(), rel=1e-5)
    shifted = decoder_projection(x + 1, atoms, bias + 1, ranks)
    assert shifted == pytest.approx(expected, abs=1e-5)


def test_the_projection_falls_to_0_past_the_true_l0_of_orthogonal_features() -> None:
    chosen = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)).topk(3).indices
    x = torch.zeros(50, 12).scatter(1, chosen, 1.0) @ orthogonal(12)
    found = decoder_projection(x, orthogonal(12), torch.zeros(12), [1, 3, 4, 9])
    assert found == pytest.approx([1, 1, 0, 0], abs=1e-5)


def test_cosine_blocks_cover_the_table(block: None) -> None:
    a, b = normal(9, 4), normal(7, 4, seed=1)
    a[2] = 0
    whole = torch.full((9, 7), math.nan)
    for start, part in cosine_blocks(a, b):
        assert whole[start : start + len(part)].isnan().all()
        whole[start : start + len(part)] = part
    expected = F.cosine_similarity(a[:, None], b[None], dim=2)
    torch.testing.assert_close(whole, expected)
    assert (whole[2] == 0).all()


def test_bad_directions_and_ranks() -> None:
    atoms = normal(4, 3)
    for r in (0, 4, -1):
        with pytest.raises(SaekitError, match=rf"r = {r} must lie in 1..3"):
            babel(atoms, r)
    with pytest.raises(SaekitError, match="r = 0 must be at least 1"):
        coactive_babel(atoms, sparse(5, 4, 0.5), 0)
    with pytest.raises(SaekitError, match=r"codes\.n_features is 5: atoms has 4 rows"):
        coactive_babel(atoms, sparse(5, 5, 0.5), 1)
    nan = atoms.clone()
    nan[1, 1] = math.nan
    for call in (lambda: babel(nan, 1), lambda: mean_decoder_cosine(nan), lambda: coactive_babel(nan, sparse(5, 4, 0.5), 1)):  # fmt: skip
        with pytest.raises(SaekitError, match="NaN or inf"):
            call()
    with pytest.raises(SaekitError, match=r"atoms has 1 row"):
        mean_decoder_cosine(atoms[:1])
    for n in (0, 5, [1, 5]):
        with pytest.raises(SaekitError, match=r"n = [05] must lie in 1..4"):
            decoder_projection(normal(6, 3), atoms, torch.zeros(3), n)
    for rows, n in ((0, 1), (6, [])):
        with pytest.raises(SaekitError, match="has no rank"):
            decoder_projection(normal(rows, 3), atoms, torch.zeros(3), n)
    constant = torch.full((11, 2), 0.1, dtype=torch.float64)  # its mean in float64 is not quite 0.1
    assert (constant - constant.mean(0)).any()
    for bad in (constant, normal(1, 4), torch.full((3, 2), math.inf), nan):
        with pytest.raises(SaekitError, match="x has no variance or is not finite"):
            effective_rank(bad)
    for share in (0, 1.5, math.nan):
        with pytest.raises(SaekitError, match="share = "):
            effective_rank(atoms, share)


# planted structure


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
