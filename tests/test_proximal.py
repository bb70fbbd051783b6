"""Proximal steps against brute force, the energy that they lower, and the two selections that are made of them."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import saekit
from saekit.contract import examine
from saekit.dictionaries import Dictionary, TrainState
from saekit.dictionaries.selection.proximal import PENALTIES, energy, iterate, step_size
from saekit.types import SaekitError

penalties = pytest.mark.parametrize("penalty", PENALTIES)


def atoms_and_rows(n: int, d: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)
    return atoms, torch.randn(rows, d, generator=g, dtype=torch.float64)


def created(selection: str, **options: object) -> Dictionary:
    atoms = {"iterative": "tied"}.get(selection, "unit_norm")
    return saekit.create("topk", d_in=16, n_features=64, selection=selection, atoms=atoms, objective=("reconstruction",), **options)  # fmt: skip


@penalties
@pytest.mark.parametrize(("gamma", "weight"), [(0.1, 0.5), (0.3, 0.02), (0.7, 1.3), (1.0, 0.4)])
def test_a_step_is_the_minimum_by_brute_force(penalty: str, gamma: float, weight: float) -> None:
    if penalty == "cel0" and gamma == 1:
        pytest.skip("many minima: hard's is one of them")
    u = torch.linspace(-3, 3, 241, dtype=torch.float64)
    grid = torch.arange(1, 70_001, dtype=torch.float64) * 5e-5
    z = torch.cat([-grid, torch.zeros(1, dtype=torch.float64), grid])  # 0 itself is one of them
    cost = gamma * PENALTIES[penalty].cost(z, weight)
    best = torch.stack([z[((z - one).square() / 2 + cost).argmin()] for one in u])
    ours = PENALTIES[penalty].prox(u, gamma, weight)
    off = (ours - best).abs()
    # where 0 and a size are as good as each other the grid may take either: there the costs are compared
    tied = off > 1e-4

    def value(at: torch.Tensor) -> torch.Tensor:
        return (at - u).square() / 2 + gamma * PENALTIES[penalty].cost(at, weight)

    assert tied.sum() <= 2 and ((value(ours) - value(best)).abs() <= 1e-9)[tied].all()


def test_at_a_step_of_one_cel0_is_hard() -> None:
    u = torch.linspace(-3, 3, 100)
    assert torch.equal(PENALTIES["cel0"].prox(u, 1.0, 0.4), PENALTIES["hard"].prox(u, 1.0, 0.4))


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.3])
def test_cel0_has_the_global_minimum_of_l0(weight: float) -> None:
    atoms, rows = atoms_and_rows(4, 3, 6)
    for x in rows:
        # L0 by trying every support; CEL0 by many descents from all over
        best, found = math.inf, None
        for support in itertools.product([False, True], repeat=4):
            on = torch.tensor(support)
            z = torch.zeros(4, dtype=torch.float64)
            if on.any():
                z[on] = torch.linalg.lstsq(atoms[on].T, x[:, None], driver="gelsd").solution[:, 0]
            e = energy(x[None], z[None], atoms, "hard", weight).item()
            best, found = (e, z) if e < best else (best, found)
        g = torch.Generator().manual_seed(1)
        z = 2 * torch.randn(3000, 4, generator=g, dtype=torch.float64)
        gamma = step_size(atoms)
        for _ in range(3000):
            z = PENALTIES["cel0"].prox(z + gamma * (x - z @ atoms) @ atoms.T, gamma, weight)
        relaxed = energy(x.expand(3000, 3), z, atoms, "cel0", weight)
        assert found is not None and relaxed.min().item() == pytest.approx(best, abs=1e-6)
        lowest = z[relaxed <= relaxed.min() + 1e-8]
        # it is one of L0's own minimisers, and L0's is one of its
        assert energy(x[None], lowest[:1], atoms, "hard", weight).item() == pytest.approx(best, abs=1e-4)
        assert energy(x[None], found[None], atoms, "cel0", weight).item() == pytest.approx(best, abs=1e-9)


@penalties
def test_the_energy_never_rises(penalty: str) -> None:
    atoms, x = atoms_and_rows(40, 12, 50)
    before = (x.square().sum(1) / 2).clone()
    for steps in range(1, 40):
        now = energy(x, iterate(x, atoms, penalty, 0.1, steps), atoms, penalty, 0.1)
        assert (now <= before + 1e-12).all()
        before = now
    assert (before < 0.9 * x.square().sum(1) / 2).all()


def test_a_longer_step_may_raise_it() -> None:
    atoms, x = atoms_and_rows(40, 12, 50)
    long = 2.5 * step_size(atoms)
    z = torch.zeros(50, 40, dtype=torch.float64)
    energies = []
    for _ in range(20):
        z = PENALTIES["soft"].prox(z + long * (x - z @ atoms) @ atoms.T, long, 0.1)
        energies.append(energy(x, z, atoms, "soft", 0.1))
    assert (torch.stack(energies).diff(dim=0) > 1e-3).any()


def test_many_soft_steps_are_the_lasso() -> None:
    from sklearn.linear_model import Lasso

    atoms, x = atoms_and_rows(20, 12, 5)
    z = iterate(x, atoms, "soft", 0.2, 4000)
    for row, own in zip(x, z, strict=True):
        # scikit-learn's loss is a mean over the columns
        lasso = Lasso(alpha=0.2 / 12, fit_intercept=False, tol=1e-10, max_iter=100_000)
        fitted = lasso.fit(atoms.T.numpy(), row.numpy())
        torch.testing.assert_close(own, torch.from_numpy(fitted.coef_), rtol=1e-4, atol=1e-5)


def test_one_soft_step_of_a_tied_encoder_is_a_shifted_relu() -> None:
    atoms, x = atoms_and_rows(30, 12, 20)
    gamma = step_size(atoms)
    codes = iterate(x, atoms, "soft", 0.3, 1)
    relu = (gamma * x @ atoms.T - gamma * 0.3).relu()
    torch.testing.assert_close(codes.where(codes > 0, 0.0), relu)
    assert (relu > 0).any() and (codes < 0).any()


@penalties
@pytest.mark.parametrize("selection", ["iterative", "unrolled"])
def test_the_selections_keep_the_contract(
    selection: str, penalty: str, planted_rows: torch.Tensor, tmp_path: Path
) -> None:
    options = {"penalty": penalty, "steps": 8 if selection == "iterative" else 3}
    examine(lambda: created(selection, **options), planted_rows, tmp_path)


@penalties
def test_unrolled_gradients_are_those_of_finite_differences(penalty: str) -> None:
    atoms, x = atoms_and_rows(10, 6, 4)
    gamma, toward = step_size(atoms), torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # fmt: skip

    def of(w: torch.Tensor) -> torch.Tensor:  # with the step's length as given
        z = PENALTIES[penalty].prox(gamma * x @ w.T, gamma, 0.1)
        for _ in range(3):
            z = PENALTIES[penalty].prox(z + gamma * (x - z @ w) @ w.T, gamma, 0.1)
        return z.square().sum()

    w = atoms.clone().requires_grad_()
    iterate(x, w, penalty, 0.1, 4).square().sum().backward()
    numeric = (of(atoms + 1e-6 * toward) - of(atoms - 1e-6 * toward)) / 2e-6
    assert (w.grad * toward).sum().item() == pytest.approx(numeric.item(), rel=1e-5)


def test_iterative_atoms_learn_from_the_error_alone(planted_rows: torch.Tensor) -> None:
    d = created("iterative", penalty="cel0", weight=0.3)
    d.set_normalisation(planted_rows)
    x = d.norm_in(planted_rows[:64])
    z = d.encode(planted_rows[:64]).to_dense().detach()
    own = d.W_dec.detach().clone().requires_grad_()
    ((x - z @ own).square().sum(1).mean()).backward()
    d.loss(planted_rows[:64], TrainState()).total.backward()
    torch.testing.assert_close(d.atoms.weight.grad, own.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty": "sotf"}, "did you mean 'soft'"),
        ({"weight": -0.1}, "weight = -0.1"),
        ({"weight": math.nan}, "weight = nan"),
        ({"steps": 0}, "steps = 0"),
    ],
)
def test_what_is_impossible_is_refused(options: dict, words: str) -> None:
    for selection in ("iterative", "unrolled"):
        with pytest.raises(SaekitError, match=words):
            created(selection, **options)


def test_codes_of_many_rows_are_those_of_few(planted_rows: torch.Tensor) -> None:
    d = created("unrolled")
    d.set_normalisation(planted_rows)
    many = d.encode(planted_rows)  # several blocks
    few = torch.cat([d.encode(part).to_dense() for part in planted_rows.split(100)])
    torch.testing.assert_close(many.to_dense(), few, rtol=1e-4, atol=1e-5)
