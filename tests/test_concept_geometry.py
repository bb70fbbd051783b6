"""Affinities are their definitions, clusters are scikit-learn's, entropies and exponents are those of known clouds."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.analyses.concept_geometry import (
    agreement,
    clustering_entropy,
    crystals,
    power_law,
    spectrum,
)
from saekit.analyses.lobes import AFFINITIES, Cooccurrence, cooccurrence, lobes, pointing
from saekit.testbed.concept_world import firing, lobed, power, related
from saekit.types import Codes


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fired(seed: int = 0, tokens: int = 230, features: int = 7) -> tuple[Tensor, Cooccurrence]:
    """Which features fire in blocks of 5 tokens, and their counts; feature 3 never does, feature 4 always."""
    dense = torch.rand(tokens, features, generator=g(seed)) * (torch.rand(tokens, features, generator=g(seed + 1)) < 0.1)  # fmt: skip
    dense[:, 3], dense[:, 4] = 0.0, 1.0
    blocks = (dense.view(-1, 5, features) > 0).any(1)
    return blocks[:, blocks.any(0)], cooccurrence([Codes.from_dense(dense)], 5)


def test_counts_are_those_of_blocks_however_the_tokens_come() -> None:
    blocks, counts = fired()
    together = blocks.double().T @ blocks.double()
    assert np.array_equal(counts.together.toarray(), together.numpy()) and counts.blocks == len(blocks)
    assert counts.features.tolist() == [0, 1, 2, 4, 5, 6] and np.array_equal(counts.own, together.diagonal())
    dense = torch.rand(61, 4, generator=g(3)) - 0.5
    whole = cooccurrence([Codes.from_dense(dense)], 7, above=0.2)
    expected = (dense[:56].view(8, 7, 4) > 0.2).any(1).double()
    assert np.array_equal(whole.together.toarray(), (expected.T @ expected).numpy()) and whole.blocks == 8
    for sizes in ([61], [1] * 61, [5, 30, 26], [3, 0, 58]):
        parts = cooccurrence((Codes.from_dense(part) for part in dense.split(sizes)), 7, above=0.2)
        assert np.array_equal(parts.together.toarray(), whole.together.toarray()) and parts.blocks == 8


@pytest.mark.parametrize("name", list(AFFINITIES))
def test_an_affinity_is_its_definition(name: str) -> None:
    blocks, counts = fired()
    n = blocks.shape[1]
    found = AFFINITIES[name](counts)
    expected = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            a, b = blocks[:, i], blocks[:, j]
            n11, n00, n10, n01 = (int(one.sum()) for one in (a & b, ~a & ~b, a & ~b, ~a & b))
            root = math.sqrt((n11 + n10) * (n11 + n01) * (n00 + n10) * (n00 + n01))
            expected[i, j] = {
                "simple_matching": (n11 + n00) / len(blocks),
                "jaccard": n11 / (n11 + n10 + n01),
                "dice": 2 * n11 / (2 * n11 + n10 + n01),
                "overlap": n11 / min(n11 + n10, n11 + n01),
                "phi": 1 + ((n11 * n00 - n10 * n01) / root if root else 0.0),
            }[name]
    assert np.allclose(found.to_dense(), expected, atol=1e-12) and found.to_dense().min() > -1e-12
    x = np.random.default_rng(0).standard_normal(n)
    assert np.allclose(found @ x, expected @ x) and np.allclose(found.diagonal, expected.diagonal())


def test_phi_is_the_correlation_of_firing() -> None:
    blocks, counts = fired(4)
    some = [i for i in range(blocks.shape[1]) if not blocks[:, i].all()]
    expected = np.corrcoef(blocks[:, some].double().numpy().T) + 1
    assert np.allclose(AFFINITIES["phi"](counts).to_dense()[np.ix_(some, some)], expected)


def planted(seed: int = 0) -> tuple[Tensor, Tensor, Cooccurrence]:
    atoms, own = lobed(150, 6, 32, g(seed))
    counts = cooccurrence([firing(own, 300, 64, 3, g(seed + 1))], 64)
    assert len(counts.features) == 150
    return atoms, own, counts


@pytest.mark.parametrize("name", list(AFFINITIES))
def test_clusters_are_those_of_scikit_learn_on_the_whole_matrix(name: str) -> None:
    from sklearn.cluster import SpectralClustering

    affinity = AFFINITIES[name](planted()[2])
    theirs = SpectralClustering(6, affinity="precomputed", random_state=0).fit_predict(affinity.to_dense())
    assert agreement(lobes(affinity, 6), torch.from_numpy(theirs)).ami > 0.95


def test_planted_lobes_are_found_and_agree_with_the_atoms() -> None:
    atoms, own, counts = planted(3)
    found, placed = lobes(AFFINITIES["phi"](counts), 6), lobes(pointing(atoms), 6)
    assert agreement(found, own).ami > 0.95 < agreement(placed, own).ami
    both = agreement(found, placed)
    assert both.ami > 0.9 and abs(both.permuted) < 0.02 and both.deviations > 20
    isotropic = lobes(pointing(torch.randn(150, 32, generator=g(9))), 6)
    assert agreement(found, isotropic).deviations < 4
    assert torch.equal(found, lobes(AFFINITIES["phi"](counts), 6))  # the same again


def test_agreement_is_of_partitions_not_of_names() -> None:
    a = torch.randint(5, (80,), generator=g())
    assert agreement(a, (a + 3) % 5).ami == pytest.approx(1)
    b = torch.randint(5, (80,), generator=g(1))
    assert agreement(a, b).ami == pytest.approx(agreement(b, a).ami) and abs(agreement(a, b).deviations) < 4


def test_relations_come_out_on_pairs_that_nothing_was_fitted_to() -> None:
    x, own = related(400, 5, 64, g())
    found = crystals(x, own)
    assert found.after > found.before + 0.4
    shuffled = crystals(x, own[torch.randperm(400, generator=g(1))])
    assert shuffled.after < 0.05  # fitted pairs would give any labels a high one
    moved = crystals(3 * x @ torch.linalg.qr(torch.randn(64, 64, generator=g(2))).Q + 1, own)
    assert moved.before == pytest.approx(found.before, abs=1e-4)
    assert moved.after == pytest.approx(found.after, abs=5e-3)  # shrinkage works on scaled coordinates


def test_eigenvalues_add_up_to_the_variance() -> None:
    x = power(500, 20, 1.0, g())
    values = spectrum(x)
    assert values.sum().item() == pytest.approx(x.var(0).sum().item(), rel=1e-4)
    assert (values.diff() <= 0).all()


def test_an_exact_spectrum_gives_its_exponent() -> None:
    q = torch.linalg.qr(torch.randn(400, 40, generator=g(), dtype=torch.float64)).Q
    q = torch.linalg.qr(q - q.mean(0)).Q  # columns at right angles, and of mean 0
    for exponent in (0.0, 0.5, 1.7):
        x = q * torch.arange(1, 41).double().pow(-exponent / 2)
        assert power_law(x.float(), (2, 30)).fitted == pytest.approx(exponent, abs=1e-3)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_cloud_s_exponent_is_seen_through_few_rows(exponent: float) -> None:
    found = [power_law(power(1000, 120, exponent, g(i)), (10, 90), seed=i) for i in range(6)]
    # near 0 the fits of draws are at their minimum, and noise alone decides
    assert sum(one.exponent for one in found) / 6 == pytest.approx(exponent, abs=0.04 if exponent else 0.1)
    assert sum(one.fitted for one in found) / 6 > exponent + (0.1, 0.05, 0.02)[round(2 * exponent)]


def test_fewer_rows_than_dimensions_have_an_exponent_too() -> None:
    found = [power_law(power(100, 120, 1.0, g(i)), (10, 60), seed=i).exponent for i in range(6)]
    assert sum(found) / 6 == pytest.approx(1.0, abs=0.1)


def test_a_gaussian_cloud_is_not_clustered_in_any_dimension() -> None:
    for d, rows in ((2, 2000), (30, 1500)):
        x = torch.randn(rows, d, generator=g()) @ torch.randn(d, d, generator=g(1))
        found = clustering_entropy(x, d)
        assert abs(found.value) < 0.15 * d**0.5


def test_clusters_have_the_entropy_that_they_have() -> None:
    # eight corners far apart: entropy of one corner and of which corner, against the Gaussian of their covariance
    corner, side = torch.randint(2, (2400, 3), generator=g()).float(), 10.0
    x = side * corner + torch.randn(2400, 3, generator=g(1))
    normal = 1.5 * math.log(2 * math.pi * math.e)
    truth = normal + 1.5 * math.log(side**2 / 4 + 1) - (normal + math.log(8))
    found = clustering_entropy(x, 3)
    assert found.value == pytest.approx(truth, abs=0.1)
    mixed = clustering_entropy(x @ torch.randn(3, 3, generator=g(2)) + 4, 3)
    assert mixed.value == pytest.approx(found.value, abs=1e-3)
    assert clustering_entropy(torch.cat([x, torch.zeros(2400, 2)], 1), 3).value == pytest.approx(found.value, abs=1e-3)  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-13, 1e-10, 1e-6])
def test_exact_parallelograms_are_a_perfect_crystal(noise: float) -> None:
    own = torch.arange(40) % 4
    x = torch.randn(4, 16, generator=g(), dtype=torch.float64)[own]
    found = crystals(x + noise * torch.randn(40, 16, generator=g(1), dtype=torch.float64), own)
    assert found.before == pytest.approx(1, abs=1e-5) and found.after == pytest.approx(1, abs=1e-5)
    one = crystals(x, own, components=1)
    assert one.after == pytest.approx(1)


def nan(x: Tensor) -> Tensor:
    return x.index_fill(0, torch.tensor([1]), float("nan"))


X = torch.randn(20, 6, generator=g())
RELATIONS = torch.arange(20) % 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: crystals(X, torch.zeros(20).long()), "2 relations or more"),
        (lambda: crystals(X, torch.arange(20) % 7), "4 pairs or more of each"),
        (lambda: crystals(nan(X), RELATIONS), "differences holds NaN"),
        (lambda: agreement(RELATIONS, RELATIONS[:5]), "20 and 5 features"),
        (lambda: agreement(RELATIONS, RELATIONS, 1), "permutations = 1"),
        (lambda: spectrum(X[:1]), "1 row"),
        (lambda: power_law(X), r"ranks = \(10, 150\) must rise within 1..6"),
        (lambda: power_law(nan(X), (1, 5)), "atoms holds NaN"),
        (lambda: clustering_entropy(X, 7), "components = 7 must lie in 1..6"),
        (lambda: clustering_entropy(torch.cat([X[:3]] * 30), 2), "rows that are equal"),
        (lambda: clustering_entropy(nan(X), 3), "atoms holds NaN"),
        (
            lambda: cooccurrence([Codes.from_dense(torch.eye(4))], 1),
            "no two of 4 features fire in the same of 4 blocks",
        ),
        (lambda: cooccurrence([Codes.from_dense(X.relu())]), "0 feature.s. fire in 0 whole blocks of 256"),
        (lambda: cooccurrence([Codes.from_dense(0 * X)], 4), "0 feature.s. fire in 5 whole blocks"),
        (lambda: cooccurrence([], 4), "0 feature.s. fire in 0 whole blocks"),
        (lambda: cooccurrence([Codes.from_dense(X), Codes.from_dense(X[:, :4])], 4), "codes have 4 features"),
        (lambda: cooccurrence([Codes.from_dense(nan(X))], 4), "codes hold NaN"),
        (lambda: cooccurrence([Codes.from_dense(X)], 0), "block = 0"),
        (lambda: lobes(pointing(X), 20), "clusters = 20 must lie in 2..19"),
        (lambda: lobes(pointing(X), 1), "clusters = 1"),
        (lambda: pointing(torch.cat([X, 0 * X])), "rows of zeros"),
        (lambda: AFFINITIES["ph"], "did you mean 'phi'"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
