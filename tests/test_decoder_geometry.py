"""Laws of decoders beside each other and by themselves: stability, MMCS, rank, coherence, projections."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from drawn_codes import normal, orthogonal, sparse

from saekit.evaluate.geometry import (
    babel,
    coactive_babel,
    cosine_blocks,
    decoder_projection,
    effective_rank,
    mean_decoder_cosine,
)
from saekit.evaluate.stability import mmcs, shared_features, stability
from saekit.types import Codes, SaekitError

GEOMETRY = sys.modules["saekit.evaluate.geometry"]  # by its module: saekit.evaluate is the function


@pytest.fixture(params=[1 << 24, 64, 1], ids=["whole", "blocks", "single rows"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results must not depend on how many numbers are held at a time."""
    monkeypatch.setattr(GEOMETRY, "BLOCK", request.param)


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
