"""V-information is R2 on rows nothing was fitted to; complexity, learning time and importance follow their definitions."""

import pytest
import torch
from torch import Tensor

from saekit.analyses.complexity import Complexity, complexity, importance, learning_time, v_information
from saekit.testbed.parities import BITS, KINDS, SETS, Residual, bits, learning
from saekit.types import Codes


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_information_is_the_share_of_variance_that_was_planted() -> None:
    x = torch.randn(8000, 6, generator=g())
    shares = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    w = torch.nn.functional.normalize(torch.randn(6, 5, generator=g(1)), dim=0)
    z = (x @ w) * shares.sqrt() + torch.randn(8000, 5, generator=g(2)) * (1 - shares).sqrt()
    torch.testing.assert_close(v_information(x, z.float()), shares, atol=0.02, rtol=0)


def test_it_is_scikit_learns_on_held_out_rows() -> None:
    from sklearn.dummy import DummyRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = torch.randn(200, 5, generator=g())
    z = x[:, 0] + torch.randn(200, generator=g(1))
    folds = KFold(5, shuffle=True, random_state=0)
    said, constant = (
        torch.from_numpy(cross_val_predict(model, x.double(), z.double(), cv=folds))
        for model in (
            make_pipeline(StandardScaler(), RidgeCV([10.0**i for i in range(-3, 6)])),
            DummyRegressor(),
        )
    )
    r2 = 1 - (z - said).square().sum() / (z - constant).square().sum()
    assert v_information(x, z[:, None]).item() == pytest.approx(r2.item(), abs=1e-6)


def test_units_and_turns_of_a_layer_do_not_matter() -> None:
    x, z = torch.randn(300, 4, generator=g()), torch.randn(300, 2, generator=g(1)) / 3
    z = z + x[:, :2] ** 3
    own = v_information(x, z)
    torch.testing.assert_close(v_information(100 * x + 7, z / 50 - 3), own, atol=1e-5, rtol=0)
    mixing = torch.linalg.qr(torch.randn(4, 4, generator=g(2)))[0]
    torch.testing.assert_close(v_information(x @ mixing, z), own, atol=0.01, rtol=0)


@pytest.mark.parametrize("d", [1, 40])
def test_what_is_unrelated_tells_nothing(d: int) -> None:
    x, z = torch.randn(300, d, generator=g()), torch.randn(300, 8, generator=g(1))
    assert v_information(x, z).max() < 0.03


def test_complexity_is_what_layers_lack() -> None:
    z = torch.randn(2000, 1, generator=g())
    none, half = torch.randn(2000, 3, generator=g(1)), z + torch.randn(2000, 1, generator=g(2))
    found = complexity([none, half, torch.cat([z, none], 1)], z)
    torch.testing.assert_close(
        found.information[:, 0], torch.tensor([0.0, 0.5, 1.0]).double(), atol=0.04, rtol=0
    )
    torch.testing.assert_close(found.k, 1 - found.information.mean(0))
    assert Complexity(torch.eye(4, 2)).k.tolist() == [0.75, 0.75]


def test_learning_times_lie_between_checkpoints() -> None:
    curves = torch.tensor(
        [[0.0, 0.5, 0.0, 0.05], [0.2, 0.8, 0.0, 0.0], [0.8, 1.0, 0.9, 0.0], [0.6, 1.0, 0.9, 0.0]]
    )
    times = learning_time([0, 10, 20, 40], curves)
    torch.testing.assert_close(times, torch.tensor([13 + 1 / 3, 0.0, 15.0, torch.inf]).double())
    assert learning_time([0, 10, 20, 40], curves, share=1.0).tolist()[:2] == [20.0, 20.0]


@pytest.mark.parametrize("as_codes", [False, True])
def test_importance_is_the_mean_contribution_to_the_row_s_output(as_codes: bool) -> None:
    z = (torch.randn(50, 6, generator=g()) - 0.5).relu()
    effects, output = torch.randn(6, 3, generator=g(1)), torch.randint(3, (50,), generator=g(2))
    brute = torch.stack([(z[r] * effects[:, output[r]]).abs() for r in range(50)]).mean(0)
    found = importance(Codes.from_dense(z) if as_codes else z, effects, output)
    torch.testing.assert_close(found, brute.double())
    # where all contribute the same way they sum to what the output gains
    total = importance(z, effects.abs(), output).sum()
    assert total.item() == pytest.approx(
        (z @ effects.abs()).gather(1, output[:, None]).mean().item(), rel=1e-5
    )


def test_targets_are_products_of_fair_bits() -> None:
    x, targets = bits(4000, g())
    signs = x.sign()
    of = [some for sets in SETS.values() for some in sets]
    assert [len(s) for s in of] == [{"linear": 1, "XOR": 2, "parity": 4}[kind] for kind in KINDS]
    for j, some in enumerate(of):
        assert (signs[:, list(some)].prod(1) == targets[:, j]).float().mean() > 0.999
    assert targets.mean(0).abs().max() < 0.06 and x.shape[1] == BITS
    # a bit tells of itself, and nothing linear of a product
    told = v_information(x, targets)
    assert told[:4].min() > 0.9 and told[4:].max() < 0.02


def test_streams_sum_to_the_output_and_it_learns() -> None:
    x, targets = bits(500, g(5))
    for step, net in enumerate(learning(0, 60)):
        if step == 0:
            before = torch.nn.functional.softplus(-targets * net(x)).mean().item()
    assert isinstance(net, Residual) and step == 60
    assert torch.equal(net(x), net.read(net.streams(x)[-1])) and len(net.streams(x)) == 5
    assert torch.nn.functional.softplus(-targets * net(x)).mean() < 0.8 * before


def dense(rows: int = 20, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, d, generator=g(seed))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: v_information(dense() / 0, dense()), "x holds NaN or Inf"),
        (lambda: v_information(dense(), dense().log()), "z holds NaN or Inf"),
        (lambda: v_information(dense(), dense() * torch.tensor([1.0, 0.0, 1.0]) + 5), "z doesn't vary in feature 1"),
        (lambda: v_information(dense(8), dense(8)), "folds = 5 must lie in 2..4, half of the 8 rows"),
        (lambda: v_information(dense(), dense(), folds=1), "folds = 1 must lie in 2..10"),
        (lambda: complexity([], dense()), "layers is empty"),
        (lambda: learning_time([0, 1], torch.rand(3, 2)), "must rise, one for each of the 3 checkpoints"),
        (lambda: learning_time([0, 2, 1], torch.rand(3, 2)), "must rise"),
        (lambda: learning_time([0, 1, 2], torch.rand(3, 2), share=0.0), "share = 0.0 must lie in"),
        (lambda: learning_time([0, 1], torch.full((2, 2), torch.nan)), "information holds NaN"),
        (lambda: importance(dense(), torch.ones(4, 2), torch.zeros(20).long()), "effects has 4 rows, and z 3 features"),
        (lambda: importance(dense(), torch.ones(3, 2), torch.full((20,), 2)), "output must hold one of 0..1"),
        (lambda: importance(dense(), torch.ones(3, 2), torch.zeros(5).long()), "output has 5 numbers, and z 20 rows"),
    ],
)  # fmt: skip
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
