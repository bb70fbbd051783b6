"""Fixed points, cycles and divergence of maps that are known; what an autoencoder of few images remembers."""

import math

import pytest
import torch
from torch import Tensor

import saekit
from saekit.analyses.dynamics import attractors, flow, nearest, outlier_scores, trajectories
from saekit.testbed.autoencoders import autoencoder
from saekit.testbed.digits import digits


def drawn(rows: int = 50, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(z: Tensor, degrees: float, scale: float = 1.0) -> Tensor:
    """Turned in the first two coordinates; the others shrink."""
    a = math.radians(degrees)
    x, y = z[:, 0], z[:, 1]
    turned = torch.stack([x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a)], 1)
    return torch.cat([scale * turned, z[:, 2:] / 2], 1)


def test_a_contraction_ends_at_its_fixed_point_in_as_many_steps_as_it_should() -> None:
    """z_t - p = (z_0 - p) r^t, so that a step is (1 - r) r^t |z_0 - p|."""
    p, rate, z = torch.tensor([3.0, -1, 2, 0.5]).double(), 0.8, drawn()
    found = flow(lambda x: p + rate * (x - p), z)
    assert found.converged.all() and not found.diverged.any()
    expected = torch.log(1e-4 * p.norm() / ((1 - rate) * (z - p).norm(dim=1))) / math.log(rate)
    assert (found.steps - (expected.ceil() + 1)).abs().max() <= 1
    ends = attractors(lambda x: p + rate * (x - p), found)
    assert ends.basins.tolist() == [50] and torch.allclose(ends.points[0], p, rtol=1e-2)


def test_what_does_not_move_has_converged() -> None:
    found = flow(lambda x: x, drawn())
    assert found.converged.all() and (found.steps == 1).all() and torch.equal(found.ends, drawn())
    assert len(attractors(lambda x: x, found).points) == 50


def test_a_fixed_point_at_0_is_reached() -> None:
    found = flow(lambda x: x / 2, drawn())
    assert found.converged.all() and found.ends.norm(dim=1).max() < 1e-3
    assert attractors(lambda x: x / 2, found).basins.tolist() == [50]


@pytest.mark.parametrize("period", [2, 3, 5, 8])
def test_cycles_are_found_and_are_one_whatever_their_phase(period: int) -> None:
    """Onto the unit circle at multiples of a part of it, and on by one of these."""

    def step(z: Tensor) -> Tensor:
        angle = torch.atan2(z[:, 1], z[:, 0])
        near = (angle / (2 * math.pi / period)).round() * (2 * math.pi / period)
        angle = near + (angle - near) / 2 + 2 * math.pi / period
        return torch.stack([angle.cos(), angle.sin()], 1)

    found = flow(step, drawn(d=2))
    assert (found.period == period).all() and not found.converged.any() and not found.diverged.any()
    assert attractors(step, found).basins.tolist() == [50] and attractors(step, found).period.tolist() == [
        period
    ]
    assert (flow(step, drawn(d=2), longest=period - 1, limit=200).period == 0).all()


@pytest.mark.parametrize("rate", [-0.9, -0.99, -0.997])
def test_swinging_into_a_fixed_point_is_no_cycle(rate: float) -> None:
    found = flow(lambda z: 1 + rate * (z - 1), drawn(), limit=20_000)
    assert found.converged.all() and (found.ends - 1).abs().max() < 1e-2


def test_a_spiral_is_no_cycle_and_a_turn_is_one() -> None:
    assert flow(lambda z: turn(z, 90, 0.98), drawn()).converged.all()
    found = flow(lambda z: turn(z, 90), drawn())
    assert (found.period == 4).all()
    # of circles of any size: as many cycles as starts
    assert len(attractors(lambda z: turn(z, 90), found).points) == 50
    assert (flow(lambda z: turn(z, 100 * math.sqrt(2)), drawn(), limit=300).period == 0).all()


@pytest.mark.parametrize("step", [lambda z: 2 * z, lambda z: z + z**3 * 10, lambda z: (z - 10).sqrt()])
def test_divergence_is_found_and_ends_where_all_was_finite(step) -> None:
    found = flow(step, drawn())
    assert found.diverged.all() and (found.period == 0).all() and found.ends.isfinite().all()
    assert found.steps.max() < 60 and not len(attractors(step, found).points)


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0])
def test_starts_near_0_may_go_far(size: float) -> None:
    found = flow(lambda z: z / 2 + 1, size * drawn())
    assert found.converged.all() and torch.allclose(found.ends, torch.full((50, 4), 2.0).double(), atol=1e-3)
    assert flow(lambda z: 2 * z + 1, size * drawn()).diverged.all()


def test_rows_do_not_depend_on_each_other() -> None:
    def step(z: Tensor) -> Tensor:  # converges to 1 or -1, but for those that are far off
        return torch.where(z.abs() > 2, 3 * z, (3 * z).tanh() / math.tanh(3))

    z = 1.5 * drawn(d=1)
    whole, order = flow(step, z), torch.arange(49, -1, -1)
    assert torch.equal(flow(step, z[order]).ends[order], whole.ends) and whole.diverged.any()
    assert torch.equal(whole.diverged, z[:, 0].abs() > 2)
    ends = attractors(step, whole)
    assert sorted(ends.points[:, 0].round().tolist()) == [-1, 1]
    assert torch.equal(ends.of == -1, whole.diverged) and ends.basins.sum() == whole.converged.sum()
    assert torch.equal(ends.points[ends.of[whole.converged], 0].sign(), z[whole.converged, 0].sign())


def test_a_limit_is_kept() -> None:
    found = flow(lambda z: 0.999 * z, drawn(), limit=7)
    assert (found.steps == 7).all() and (found.period == 0).all()
    torch.testing.assert_close(found.ends, drawn() * 0.999**7)


def test_the_nearest_is_by_cosine() -> None:
    known = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    cosine, which = nearest(torch.tensor([[5.0, 0], [1, 2], [0, 0]]), known)
    assert which[:2].tolist() == [0, 2] and cosine.tolist() == pytest.approx([1, 3 / math.sqrt(10), 0])


def test_trajectories_are_the_steps() -> None:
    z = drawn()
    path = trajectories(lambda x: 2 * x, z, 3)
    torch.testing.assert_close(path, torch.stack([z, 2 * z, 4 * z, 8 * z]))


def test_scores_are_brute_force() -> None:
    known, new = drawn(6), drawn(3, seed=1)
    found = outlier_scores(lambda z: z / 2 + 1, known, new, steps=2, neighbours=2)
    for j in range(3):
        total, k, z = 0.0, known, new[j]
        for _ in range(3):
            total += sorted((z - one).norm().item() for one in k)[1] / 3
            k, z = k / 2 + 1, z / 2 + 1
        assert found[j].item() == pytest.approx(total)
    assert outlier_scores(lambda z: z, known, torch.cat([known, known + 9]), 1, 1)[:6].abs().max() < 1e-6


def test_scores_far_from_0_are_those_of_more_precision() -> None:
    known, new = (100 + 1e-2 * drawn(n, 16, seed) for n, seed in ((200, 0), (30, 1)))
    found, exact = (
        outlier_scores(lambda z: z, one.to(kind), two.to(kind), 1)
        for kind in (torch.float32, torch.float64)
        for one, two in ((known.float(), new.float()),)
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_few_images_are_remembered() -> None:
    data = digits(0)
    images = data.train[:10]
    net = autoencoder(images, 16, seed=0, steps=700)
    assert (net(images) - images).square().mean() < 2e-3
    assert torch.equal(net.step(net.encode(images)), net.encode(net(images)))
    found = flow(net.step, net.encode(data.test[:100]))
    assert found.converged.all()
    drawn_images = net.decode(attractors(net.step, found).points)
    own, others = (nearest(drawn_images, some)[0].mean() for some in (images, data.test))
    assert own > 0.95 and own > others + 0.02


def test_a_dictionary_is_a_step() -> None:
    x = drawn(200, 8).float()
    d = saekit.create("topk", d_in=8, n_features=32, k=3, seed=0, normalise="none")
    found = flow(d, x, limit=50)
    one = flow(lambda z: d.decode(d.encode(z)), x, limit=50)
    assert torch.equal(found.ends, one.ends) and not found.ends.requires_grad
    wide = saekit.create("transcoder", d_in=8, d_out=5, n_features=32, k=3)
    with pytest.raises(ValueError, match=r"step makes \[1, 5\] of a row of \[1, 8\]"):
        flow(wide, x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: flow(lambda x: x, z[:0]), "starts holds no rows"),
        (lambda z: flow(lambda x: x, z / 0), "starts hold NaN or Inf"),
        (lambda z: flow(lambda x: x, z, tolerance=0.0), "tolerance = 0.0, .* all must be above 0"),
        (lambda z: flow(lambda x: x, z, limit=0), "limit = 0"),
        (lambda z: flow(lambda x: x, z, longest=0), "longest = 0"),
        (lambda z: attractors(lambda x: x, flow(lambda x: x, z), same=0.0), "same = 0.0 must be above 0"),
        (lambda z: nearest(z, z[:0]), "known holds no rows"),
        (lambda z: outlier_scores(lambda x: x, z, z, 3, neighbours=51), "neighbours = 51 must lie in 1..50"),
        (lambda z: trajectories(lambda x: x[:, :2], z, 3), r"step makes \[1, 2\] of a row of \[1, 4\]"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(drawn())
