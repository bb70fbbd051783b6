"""Energies are dense sums however a set streams, differences obey their symmetries, and intervals cover a planted truth."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.analyses.blindspots import DRAWS, Energies, differences, energies
from saekit.types import Codes


def sparse(*shape: int, seed: int = 0, share: float = 0.2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g) * (torch.rand(*shape, generator=g) < share)


def of(dense: Tensor, seed: int = 0) -> Energies:
    return energies([Codes.from_dense(dense)], seed)


def test_energies_are_the_dense_sums_and_draws_weighted_ones() -> None:
    x = sparse(11, 4, 7)
    x[..., 2] = 0
    found, samples = of(x, 3), x.double().sum(1)
    torch.testing.assert_close(found.mean, samples.mean(0))
    assert torch.equal(found.fired, (samples > 0).sum(0)) and found.n == 11 and found.seed == 3
    weights = torch.from_numpy(np.random.default_rng(3).poisson(1.0, (11, DRAWS))).double()
    torch.testing.assert_close(found.draws, (weights.T @ samples) / weights.sum(0)[:, None])


@pytest.mark.parametrize("sizes", [[1] * 30, [7, 0, 23], [29, 1]])
def test_a_stream_is_its_whole_however_it_is_cut(sizes: list[int]) -> None:
    x = sparse(30, 3, 12)
    whole, found = of(x), energies((Codes.from_dense(part) for part in x.split(sizes)), 0)
    torch.testing.assert_close(found.mean, whole.mean)
    torch.testing.assert_close(found.draws, whole.draws)
    assert torch.equal(found.fired, whole.fired) and found.n == whole.n


def test_entries_of_0_and_the_order_of_tokens_mean_nothing() -> None:
    x = sparse(10, 5, 6)
    index = torch.arange(6).expand(50, 6)
    stored = Codes.from_rectangular(index, x.flatten(0, 1), 6, (10, 5))  # with its zeros
    other = Codes.from_dense(x[:, torch.tensor([3, 1, 4, 0, 2])])
    for codes in (stored, other):
        found = energies([codes], 0)
        torch.testing.assert_close(found.draws, of(x).draws)
        assert torch.equal(found.fired, of(x).fired)


def test_a_sample_is_resampled_as_a_whole() -> None:
    """Many tokens alike add nothing: intervals are as wide as those of the samples' sums."""
    x = sparse(40, 1, 5, share=0.5)
    many = of(x.expand(40, 20, 5).contiguous() / 20)
    torch.testing.assert_close(many.draws, of(x).draws)


def test_differences_are_symmetric_and_blind_to_scale() -> None:
    a, b = of(sparse(50, 2, 20, share=0.1), 0), of(sparse(60, 2, 20, seed=2, share=0.1), 1)
    found, other = differences(a, b), differences(b, a)
    torch.testing.assert_close(found.delta, 1 - other.delta)
    torch.testing.assert_close(found.low, 1 - other.high)
    assert ((found.low <= found.delta) & (found.delta <= found.high)).all()
    scale = torch.linspace(0.1, 9, 20)
    scaled = differences(of(sparse(50, 2, 20, share=0.1) * scale, 0), of(sparse(60, 2, 20, seed=2, share=0.1) * scale, 1))  # fmt: skip
    torch.testing.assert_close(scaled.high, found.high, atol=1e-5, rtol=1e-5)


def test_its_ends() -> None:
    x, y = torch.ones(90, 1, 5), torch.ones(80, 1, 5)
    x[..., 0], y[..., 1], x[..., 4], y[..., 4] = (
        0,
        0,
        0,
        0,
    )  # lacked by one, by the other, the same, 4 times, by both
    x[..., 3] = 4
    found = differences(of(x, 0), of(y, 1))
    assert found.delta[:4].tolist() == pytest.approx([0, 1, 0.5, 0.8])
    assert all(part[4].isnan() for part in (found.delta, found.low, found.high))
    unseen = -math.log(0.025) / torch.tensor([90.0, 80.0])
    assert found.high[0].item() == pytest.approx((unseen[0] / (unseen[0] + 1)).item())
    assert found.low[1].item() == pytest.approx((1 / (1 + unseen[1])).item())
    assert found.suppressed().tolist() == found.suppressed(surely=True).tolist() == [True] + 4 * [False]
    assert found.exaggerated().tolist() == found.exaggerated(surely=True).tolist() == [False, True] + 3 * [False]  # fmt: skip


def test_one_firing_sample_makes_nothing_sure() -> None:
    x, y = torch.zeros(90, 1, 1), torch.zeros(90, 1, 1)
    y[7] = 1
    found = differences(of(x, 0), of(y, 1))
    assert found.suppressed().item() and not found.suppressed(surely=True).item()


@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.1, 0.4), (0.5, 0.02)])
def test_intervals_cover_a_planted_difference_as_often_as_they_say(rates: tuple[float, float]) -> None:
    """Concepts that fire in a share of samples, in all tokens or none: 95 % of 600, within what chance allows and the bootstrap's known few percent."""
    generated, real = (
        (torch.rand(400, 1, 600, generator=torch.Generator().manual_seed(j)) < rate).float().expand(-1, 3, -1)
        for j, rate in enumerate(rates)
    )
    found = differences(of(generated, 0), of(real, 1))
    true = rates[0] / sum(rates)
    covered = ((found.low <= true) & (found.high >= true)).double().mean().item()
    assert 0.9 <= covered <= 0.98
    # over tokens they would be narrower by the root of 3, and cover about 74 %
    alone = differences(of(generated.reshape(-1, 1, 600), 0), of(real.reshape(-1, 1, 600), 1))
    assert ((alone.low <= true) & (alone.high >= true)).double().mean().item() < 0.85


def test_what_a_generator_lacks_and_repeats_is_found() -> None:
    """Concepts of twenty kinds of samples, of which one is removed and one comes 90 times, over two tokens."""
    g, kinds = torch.Generator().manual_seed(0), torch.arange(20).repeat(60)
    z = torch.nn.functional.one_hot(kinds, 20)[:, None] * torch.rand(1200, 2, 20, generator=g)
    real, pool, own = z[:600], z[600:], kinds[600:]
    weights = torch.tensor([1.0] * 20)
    weights[3], weights[7] = 90.0, 0.0
    drawn = torch.multinomial(weights[own], 6000, replacement=True, generator=g)
    found = differences(of(pool[drawn], 0), of(real, 1))
    truth = weights / weights.sum() * 20
    torch.testing.assert_close(found.delta.float(), truth / (truth + 1), atol=0.1, rtol=0)
    lacking = found.suppressed(surely=True)
    assert (
        lacking[7] and not lacking[3] and found.exaggerated(surely=True).nonzero().flatten().tolist() == [3]
    )


X = Codes.from_dense(sparse(6, 2, 5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: energies([Codes.from_dense(sparse(6, 5))], 0), r"codes have shape \(6,\)"),
        (lambda: energies([X.with_values(-X.values)], 0), "values below 0"),
        (lambda: energies([X.with_values(X.values / 0)], 0), "NaN, inf"),
        (lambda: energies([X, Codes.from_dense(sparse(6, 2, 4))], 0), "codes of 5 and of 4 features"),
        (lambda: energies([], 0), "batches hold 0 samples"),
        (lambda: energies([Codes.from_dense(sparse(1, 2, 5))], 0), "batches hold 1 samples"),
        (
            lambda: differences(of(sparse(6, 2, 5)), of(sparse(6, 2, 4), 1)),
            "generated has 5 features, and real 4",
        ),
        (lambda: differences(of(sparse(6, 2, 5)), of(sparse(6, 2, 5))), "both of seed = 0"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
