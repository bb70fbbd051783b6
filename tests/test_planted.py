"""Laws of the planted world and of the metrics that score a dictionary against it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from largest import Largest

from saekit.testbed import recovery as R
from saekit.testbed.planted import PRESETS, PlantedConfig, PlantedWorld, preset, sparse_bernoulli
from saekit.types import Codes, SaekitError

ROWS = 10_240
# few dimensions, few steps: the laws of the codes do not depend on the directions
FAST = preset("small", orthogonal_steps=0)
WORLDS = {
    "correlated": FAST,
    "independent": replace(FAST, correlation=0.0),
    "deep": replace(FAST, roots=6, branching=2, depth=4, correlation=0.2, seed=5),
    "often silent": replace(FAST, magnitude_std=(3.0, 2.0), p_min=0.01, seed=2),
    "no forest": replace(FAST, roots=0, p_max=0.9, seed=3),
}


@pytest.fixture(scope="module", params=WORLDS)
def sampled(request):
    """A world and the true codes of many rows."""
    world = PlantedWorld(WORLDS[request.param])
    return world, world.evaluation_set(ROWS)[1]


@pytest.fixture(scope="module")
def orthogonal():
    """A world with as many dimensions as features and exactly orthogonal directions."""
    world = PlantedWorld(
        PlantedConfig(n_features=64, d_in=64, roots=4, branching=3, depth=2, rank=8, orthogonal_steps=0)
    )
    world.directions = torch.linalg.qr(world.directions).Q
    return world


def test_firing_rates_match_their_closed_form(sampled):
    world, codes = sampled
    p = world.rates
    z = (codes.firing_counts() - ROWS * p) / (ROWS * p * (1 - p)).sqrt()
    # 512 nearly independent normals: their largest exceeds 5 once in 3,000 runs, and seeds are fixed
    assert z.abs().max() < 5
    assert abs(z.mean()) < 5 / math.sqrt(len(z))
    assert 0.85 < z.std() < 1.15


def test_rates_stay_on_the_law_wherever_parents_can_share(sampled):
    world, _ = sampled
    free = world.parent < 0
    positive = torch.special.ndtr(world.magnitude_mean.double() / world.magnitude_std.double())
    torch.testing.assert_close(world.rates[free], torch.minimum(world.law, positive)[free])
    assert (world.rates <= world.law * (1 + 1e-9)).all()
    below = (world.rates < world.law * (1 - 1e-9)) & ~free
    for family in world.parent[below].unique().tolist():
        children = world.parent == family
        needed = (world.law[children] / positive[children]).sum()
        assert needed > world.rates[family]  # what the law asks for is more than the parent has


def test_zipf_law_runs_from_p_max_to_p_min(sampled):
    world, _ = sampled
    c = world.config
    assert world.law[0].item() == pytest.approx(c.p_max) and world.law[-1].item() == pytest.approx(c.p_min)
    rank = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    law = world.law[(rank - 1).long()]
    power = rank**-c.exponent
    torch.testing.assert_close(law.diff() / (law[1] - law[0]), power.diff() / (power[1] - power[0]))


def test_a_child_never_fires_without_its_parent_and_siblings_never_together(sampled):
    world, codes = sampled
    row, feature = codes.row_ids(), codes.indices.long()
    fired = set((row * codes.n_features + feature).tolist())
    below = world.parent[feature] >= 0
    wanted = row[below] * codes.n_features + world.parent[feature[below]]
    assert set(wanted.tolist()) <= fired
    assert wanted.unique().numel() == wanted.numel()  # two siblings would want one parent twice


def test_codes_are_positive_and_sorted(sampled):
    _, codes = sampled
    assert (codes.values > 0).all()
    order = codes.row_ids() * codes.n_features + codes.indices
    assert (order.diff() > 0).all()
    assert codes.shape == (ROWS,) and codes.offsets[-1] == codes.indices.numel()


def test_magnitudes_follow_their_gaussian_and_the_parent(sampled):
    world, codes = sampled
    row, feature, value = codes.row_ids(), codes.indices.long(), codes.values.double()
    dense = {(r, f): v for r, f, v in zip(row.tolist(), feature.tolist(), value.tolist(), strict=True)}
    parent = world.parent[feature]
    above = [dense[r, p] if p >= 0 else None for r, p in zip(row.tolist(), parent.tolist(), strict=True)]
    mean, std = world.magnitude_mean.double(), world.magnitude_std.double()
    ratio = torch.tensor(
        [1.0 if a is None else a / mean[p].item() for a, p in zip(above, parent.tolist(), strict=True)],
        dtype=torch.float64,
    )
    # a normal above 0 is, by its own distribution function, uniform on (ndtr(-mean / std), 1)
    cut = torch.special.ndtr(-mean / std)[feature]
    uniform = (torch.special.ndtr((value / ratio - mean[feature]) / std[feature]) - cut) / (1 - cut)
    n = len(uniform)
    assert (uniform.mean() - 0.5).abs() < 5 / math.sqrt(12 * n)
    assert (uniform.var() - 1 / 12).abs() < 5 / math.sqrt(180 * n)


def test_copula_sign_and_strength():
    """Features fire together more (less) than by chance where their loadings agree (oppose)."""
    half = PlantedConfig(
        n_features=40, d_in=8, p_max=0.5, p_min=0.5, rank=3, correlation=0.45, roots=0,
        orthogonal_steps=0, magnitude_std=(0.0, 0.0),
    )  # fmt: skip
    world = PlantedWorld(half)
    fires = (world.evaluation_set(ROWS)[1].to_dense() > 0).double()
    upper = torch.triu_indices(40, 40, offset=1)
    observed = torch.corrcoef(fires.T)[*upper]
    correlation = (world.loadings @ world.loadings.T)[*upper].double()
    strong = correlation.abs() > 0.15
    assert strong.sum() > 200
    assert (observed.sign() == correlation.sign())[strong].all()
    # signs of two normals of correlation rho have correlation (2 / pi) asin(rho)
    assert (observed - 2 / math.pi * correlation.asin()).abs().max() < 5 / math.sqrt(ROWS)


def test_a_child_fires_more_with_free_features_that_share_its_loadings():
    world = PlantedWorld(
        PlantedConfig(n_features=40, d_in=8, p_max=0.6, p_min=0.2, rank=6, correlation=0.35, roots=4,
                      branching=2, depth=1, orthogonal_steps=0)
    )  # fmt: skip
    fires = (world.evaluation_set(ROWS)[1].to_dense() > 0).double()
    observed, expected = [], []
    for child in range(4, 12):
        given = fires[fires[:, world.parent[child]] > 0]  # the parent's own ties are not the question
        observed.append(torch.corrcoef(given.T)[child, 12:])
        expected.append(world.loadings[12:].double() @ world.loadings[child].double())
    pair = torch.stack([torch.cat(observed), torch.cat(expected)])
    assert torch.corrcoef(pair)[0, 1] > 0.6


def test_copula_is_a_correlation_matrix_and_families_are_orthogonal():
    world = PlantedWorld(FAST)
    c = world.config
    gram = (world.loadings @ world.loadings.T).double()
    assert (gram.diag() - c.rank * c.correlation**2).abs().max() < 1e-6
    for feature in range(c.roots, c.forest_size):
        parent = int(world.parent[feature])
        family = {parent, *(world.parent == parent).nonzero()[:, 0].tolist()} - {feature}
        while parent >= 0:
            family |= set(
                ((world.parent == world.parent[parent]) & (world.parent >= 0)).nonzero()[:, 0].tolist()
            )
            family.add(parent)
            parent = int(world.parent[parent])
        assert gram[feature, sorted(family)].abs().max() < 1e-6


def test_sparse_bernoulli_is_bernoulli():
    p = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.02, 1e-3, 1e-5], dtype=torch.float64)
    rows = 200_000
    row, column = sparse_bernoulli(p, rows, torch.Generator().manual_seed(0))
    assert (row * len(p) + column).unique().numel() == row.numel()
    assert row.min() >= 0 and row.max() < rows
    count = torch.bincount(column, minlength=len(p))
    assert count[0] == rows
    assert ((count - rows * p).abs() <= 5 * (rows * p * (1 - p)).sqrt() + 1e-9).all()
    # rows are used evenly, and neighbouring rows independently
    half = torch.bincount(row[column == 3] * 2 // rows, minlength=2)
    assert (half - count[3] / 2).abs().max() < 5 * math.sqrt(count[3] / 4)
    fires = torch.zeros(rows).index_fill_(0, row[column == 3], 1.0)
    assert abs(torch.corrcoef(torch.stack([fires[1:], fires[:-1]]))[0, 1]) < 5 / math.sqrt(rows)


@pytest.mark.parametrize("config", [FAST, WORLDS["independent"]], ids=["correlated", "independent"])
def test_a_batch_is_a_function_of_seed_and_step(config):
    world, again, other = PlantedWorld(config), PlantedWorld(config), PlantedWorld(replace(config, seed=1))
    before = torch.random.get_rng_state()
    later = [world.batch(64, step) for step in range(5)]
    resumed = again.batch(64, 4)  # no earlier step was drawn
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(123)
    for x, codes in (world.batch(64, 4), resumed):
        assert torch.equal(x, later[4][0])
        assert torch.equal(codes.indices, later[4][1].indices)
        assert torch.equal(codes.values, later[4][1].values)
    seen = [x for x, _ in later] + [other.batch(64, 4)[0], world.evaluation_set(64)[0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert not torch.equal(world.directions, other.directions)


def test_generator_seeds_never_repeat():
    """All steps and streams of a run start from different states, which 32-bit hashes would not promise."""
    world = PlantedWorld(replace(FAST, n_features=16, roots=0))
    seeds = [
        world._generator(stream, i, torch.device("cpu")).initial_seed()
        for stream in range(3)
        for i in range(30_000)
    ]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32


def test_the_evaluation_set_is_frozen_and_grows_by_extension():
    world = PlantedWorld(FAST)
    x, codes = world.evaluation_set(1500)
    world.batch(10, 3)
    assert torch.equal(x, world.evaluation_set(1500)[0])
    small, small_codes = world.evaluation_set(700)
    torch.testing.assert_close(small, x[:700])
    end = int(codes.offsets[700])
    assert torch.equal(small_codes.values, codes.values[:end])
    assert torch.equal(small_codes.offsets, codes.offsets[:701])


def test_activations_are_codes_times_directions_plus_bias():
    world = PlantedWorld(FAST)
    x, codes = world.batch(33, 0)
    torch.testing.assert_close(x, codes.to_dense() @ world.directions + world.bias, atol=1e-4, rtol=1e-5)
    assert world.bias.norm().item() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(512))
    assert PlantedWorld(FAST, dtype=torch.float64).batch(3, 0)[0].dtype == torch.float64


def test_adam_steps_push_directions_apart():
    def overlap(steps, n, d):
        v = PlantedWorld(PlantedConfig(n_features=n, d_in=d, roots=0, orthogonal_steps=steps)).directions
        return (v @ v.T).square().sum().item() - n

    assert overlap(300, 48, 64) < 0.5 * overlap(0, 48, 64)
    # more features than dimensions: not below the Welch bound n^2 / d - n
    assert 512**2 / 64 - 512 - 1e-2 < overlap(100, 512, 64) < overlap(0, 512, 64)


@pytest.mark.parametrize("correlation", [0.1, 0.0])
def test_sampling_never_holds_a_dense_batch(correlation):
    world = PlantedWorld(preset("synthsaebench-16k", orthogonal_steps=0, correlation=correlation))
    with Largest() as largest:
        x, codes = world.batch(1024, 0)
    assert 33 < codes.l0().double().mean() < 37  # the paper's model card says about 34
    # with correlations, a block of thresholds; without, nothing above the activations themselves
    assert largest.numel <= (1 << 20 if correlation else x.numel())
    assert largest.numel * 16 <= 1024 * 16384


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p_min": 0.5}, "p_min is 0.5: use a probability above 0, at most p_max=0.4"),
        ({"n_features": 100}, "n_features is 100: the forest needs 168"),
        ({"rank": 4}, "rank is 4: use 1 .* = 9, or correlation=0"),
        ({"correlation": 0.4}, "correlation is 0.4: use less than"),
        ({"magnitude_mean": (5.0, -1.0)}, "magnitude_mean is"),
        ({"exponent": math.nan}, "exponent is nan"),
        ({"seed": -1}, "seed is -1: use 0 or more"),
        ({"branching": 0}, "branching is 0: use 1 or more"),
    ],
)
def test_a_bad_config_names_the_field_the_value_and_the_fix(changes, words):
    with pytest.raises(SaekitError, match=words):
        preset("small", **changes)


def test_bad_calls_are_refused():
    world = PlantedWorld(FAST)
    with pytest.raises(SaekitError, match="did you mean 'small'"):
        preset("smal")
    with pytest.raises(SaekitError, match="batch_size is 0"):
        world.batch(0, 0)
    with pytest.raises(SaekitError, match="step is -1"):
        world.batch(1, -1)
    with pytest.raises(SaekitError, match="n is 0"):
        world.evaluation_set(0)
    _, codes = world.batch(4, 0)
    with pytest.raises(SaekitError, match="n_features is 512: its directions have 10 rows"):
        R.classification(world.directions[:10], world.directions, codes, codes)
    with pytest.raises(SaekitError, match="codes have 4 rows"):
        R.absorption(world.directions, world.directions, codes, world.batch(5, 0)[1], world.parent)
    assert set(PRESETS) == {"small", "synthsaebench-16k"}


# ------------------------------------------------------------------------------------- recovery


@pytest.fixture(scope="module")
def scored():
    """The small preset as it ships, with an evaluation set."""
    world = PlantedWorld(preset("small"))
    return world, world.evaluation_set(4096)[1]


def random_codes(rows, n_features, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, n_features, generator=generator).topk(k).indices
    return Codes.from_rectangular(indices, torch.rand(rows, k, generator=generator) + 0.5, n_features)


def absorb(world, codes, share=1.0):
    """The codes and decoder of a dictionary that has absorbed parents into their children.

    A child's feature writes the child and its ancestors; an ancestor's feature is silent in the
    chosen share of the rows in which a child is on. Values are whatever: absorption ignores them.
    """
    decoder, ancestor = world.directions.clone(), world.parent.clone()
    while bool((ancestor >= 0).any()):
        inside = ancestor >= 0
        decoder[inside] += world.directions[ancestor[inside]]
        ancestor = torch.where(inside, world.parent[ancestor.clamp(min=0)], -1)
    row, feature = codes.row_ids(), codes.indices.long()
    parent = world.parent[feature]
    covered = (row * codes.n_features + parent)[parent >= 0]
    chosen = torch.rand(codes.rows, generator=torch.Generator().manual_seed(1)) < share
    silent = torch.isin(row * codes.n_features + feature, covered) & chosen[row]
    return F.normalize(decoder, dim=1), codes.with_values(codes.values * ~silent), chosen


def test_the_true_dictionary_is_perfect(scored):
    world, codes = scored
    scores = R.recovery(world.directions, world.directions, codes, codes, world.parent)
    dead = (codes.firing_counts() == 0).double().mean().item()
    perfect = dict.fromkeys(("mcc", "f1", "precision", "recall", "uniqueness", "shrinkage"), 1.0)
    assert scores == pytest.approx({**perfect, "absorption": 0.0, "dead_share": dead}, abs=1e-6)
    deciles = R.recovery_by_frequency_decile(world.directions, world.directions, world.rates)
    torch.testing.assert_close(deciles, torch.ones(10, dtype=torch.float64))


def test_a_random_dictionary_scores_low(scored):
    world, true_codes = scored
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(256, 64, generator=generator)
    scores = R.recovery(decoder, world.directions, random_codes(4096, 256, 8), true_codes, world.parent)
    assert scores["mcc"] < 0.5 and scores["f1"] < 0.1 and scores["precision"] < 0.1
    assert scores["dead_share"] == 0
    assert not scores["absorption"] > 0.2
    assert R.recovery_by_frequency_decile(decoder, world.directions, world.rates).max() < 0.5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_absorption_is_the_planted_share(orthogonal, share):
    _, codes = orthogonal.evaluation_set(ROWS)
    decoder, absorbed, chosen = absorb(orthogonal, codes, share)
    row, feature = codes.row_ids(), codes.indices.long()
    parent = orthogonal.parent[feature]
    event_rows = row[parent >= 0]  # siblings exclude each other: one event per child that is on
    expected = chosen[event_rows].double().mean().item()
    got = R.absorption(decoder, orthogonal.directions, absorbed, codes, orthogonal.parent)
    assert got == pytest.approx(expected, abs=1e-9)
    assert abs(got - share) < 0.02


@pytest.mark.parametrize(("parent", "words"), [([0, 0, 1], "leads from feature 0 back"), ([1, 0, -1], "leads from feature"), ([3, -1, -1], "one of 0..2"), ([-1], "it has 1")])  # fmt: skip
def test_parents_that_are_none_are_refused(
    parent: list[int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    atoms = torch.eye(3)
    with pytest.raises(SaekitError, match=words):
        R.absorption(atoms, atoms, Codes.from_dense(atoms), Codes.from_dense(atoms), torch.tensor(parent))


def test_absorption_in_superposition(scored):
    world, codes = scored
    decoder, absorbed, _ = absorb(world, codes)
    assert R.absorption(decoder, world.directions, absorbed, codes, world.parent) > 0.95
    # the same decoder with every parent awake, and the same silence with children that carry nothing
    assert R.absorption(decoder, world.directions, codes, codes, world.parent) < 0.02
    assert R.absorption(world.directions, world.directions, absorbed, codes, world.parent) == 0
    # detection of the parents suffers
    assert R.classification(decoder, world.directions, absorbed, codes).recall.nanmean() < 0.95


def test_absorption_has_nothing_to_measure_without_a_hierarchy(scored):
    world, codes = scored
    assert math.isnan(
        R.absorption(world.directions, world.directions, codes, codes, torch.full_like(world.parent, -1))
    )


def permuted(codes, order):
    """Codes with feature i renamed to the place of i in ``order``."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return replace(codes, indices=place[codes.indices.long()].int())


def shuffled_rows(codes, order):
    counts = codes.offsets.diff()[order]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    starts = codes.offsets[:-1][order]
    at = torch.repeat_interleave(starts - offsets[:-1], counts) + torch.arange(int(offsets[-1]))
    return replace(codes, offsets=offsets, indices=codes.indices[at], values=codes.values[at])


def test_metrics_do_not_depend_on_order_scale_or_sign(scored):
    world, true_codes = scored
    generator = torch.Generator().manual_seed(7)
    decoder, codes, _ = absorb(world, true_codes, 0.6)
    decoder = F.normalize(decoder + 0.05 * torch.randn(decoder.shape, generator=generator), dim=1)
    expected = R.recovery(decoder, world.directions, codes, true_codes, world.parent)
    assert 0.2 < expected["absorption"] < 0.8 and expected["f1"] < 0.99

    order = torch.randperm(512, generator=generator)
    by_feature = R.recovery(
        decoder[order], world.directions, permuted(codes, order), true_codes, world.parent
    )
    # true features: parents are renamed too
    place = torch.empty_like(order)
    place[order] = torch.arange(512)
    parent = torch.where(world.parent >= 0, place[world.parent.clamp(min=0)], -1)[order]
    by_truth = R.recovery(decoder, world.directions[order], codes, permuted(true_codes, order), parent)
    rows = torch.randperm(4096, generator=generator)
    by_row = R.recovery(
        decoder, world.directions, shuffled_rows(codes, rows), shuffled_rows(true_codes, rows), world.parent
    )
    factor = torch.exp(torch.randn(512, generator=generator)) * torch.randn(512, generator=generator).sign()
    by_scale = R.recovery(
        decoder * factor[:, None], world.directions, codes.scale(1 / factor), true_codes, world.parent
    )
    for scores in (by_feature, by_truth, by_row, by_scale):
        assert scores == pytest.approx(expected, abs=1e-6)


def test_classification_equals_dense_counting(scored):
    world, true_codes = scored
    decoder = world.directions[:100] + 0.3 * torch.randn(100, 64, generator=torch.Generator().manual_seed(3))
    codes = random_codes(4096, 100, 5)
    codes = codes.with_values(codes.values * (codes.indices != 7))  # stored zeros do not fire
    fires, active = codes.to_dense() > 0, true_codes.to_dense() > 0
    true_of = (F.normalize(decoder, dim=1) @ world.directions.T).abs().argmax(1)
    active = active[:, true_of]
    hits = (fires & active).sum(0).double()
    got = R.classification(decoder, world.directions, codes, true_codes)
    torch.testing.assert_close(got.precision, torch.where(fires.any(0), hits / fires.sum(0), 0.0))
    torch.testing.assert_close(got.recall, hits / active.sum(0))
    torch.testing.assert_close(got.f1, 2 * hits / (fires.sum(0) + active.sum(0)))


def test_duplicates_and_shrinkage(scored):
    world, codes = scored
    doubled = torch.cat([world.directions, world.directions])
    assert R.uniqueness(doubled, world.directions) == 0.5
    assert R.mcc(world.directions[:128], world.directions) == pytest.approx(1)
    assert R.mcc(-3 * world.directions, world.directions) == pytest.approx(1)
    half = codes.with_values(codes.values / 2)
    assert R.shrinkage(world.directions, world.directions, half, codes) == pytest.approx(0.5)
    # a decoder bias that is not the world's is part of the reconstruction
    x = codes.to_dense() @ world.directions
    offset = torch.full((64,), 0.1)
    expected = (x / 2 + offset).norm(dim=1).sum() / x.norm(dim=1).sum()
    got = R.shrinkage(world.directions, world.directions, half, codes, offset)
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_metrics_take_trained_parameters(scored):
    world, codes = scored
    decoder = torch.nn.Parameter(world.directions.clone())
    live = codes.with_values(codes.values.clone().requires_grad_())
    scores = R.recovery(decoder, world.directions, live, codes, world.parent)
    assert all(isinstance(value, float) for value in scores.values())
