"""The exam that every preset takes; a new row of a table takes it for free."""

import dataclasses
from pathlib import Path

import pytest
import torch

import saekit
from saekit.contract import CONTRACT, laws
from saekit.dictionaries import PRESETS, Dictionary, TrainState
from saekit.types import Codes, SaekitError


@pytest.fixture(params=PRESETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str) -> Dictionary:
    experts = {"experts": 4} if name == "switch" else {}
    d_in = (6, 10) if name == "crosscoder" else 16
    layers = {"n_layers": 2} if name == "clt" else {}
    heads = {"n_qk": 2, "d_qk": 4} if name == "lorsa" else {}
    return saekit.create(name, d_in=d_in, n_features=64, k=4, seed=0, **experts, **layers, **heads)


def columns(d: Dictionary, rows: torch.Tensor) -> torch.Tensor:
    """Rows of training data: for a transcoder the target is a map of what is read."""
    if d.config.wiring[0] == "cross_layer":
        rows = torch.cat([rows, rows.roll(3, 1)], 1)
    rows = rows if d.wiring.columns == rows.shape[1] else torch.cat([rows, rows.flip(1).abs()], 1)
    return rows.unflatten(0, (-1, 8)) if d.wiring.kind == "sequences" else rows


@pytest.mark.parametrize("law", CONTRACT)
def test_a_preset_keeps_the_contract(name: str, law: str, planted_rows: torch.Tensor, tmp_path: Path) -> None:
    if law in laws(make(name)):
        CONTRACT[law](lambda: make(name), columns(make(name), planted_rows), tmp_path)


@pytest.mark.parametrize(("shift", "size"), [(0.0, 1e-3), (3.0, 1.0), (1000.0, 10.0)])
def test_normalisation_gives_unit_mean_square_and_folds_exactly(
    planted_rows: torch.Tensor, shift: float, size: float
) -> None:
    rows = planted_rows * size + shift
    d = saekit.create("topk", d_in=16, n_features=64, k=4)
    d.set_normalisation(rows)
    read = d.norm_in(rows)
    assert read.square().sum(-1).mean().item() == pytest.approx(16, rel=1e-3)
    assert read.mean(0).abs().max() < 1e-3
    # the folded weights see raw rows, so the error is relative to the rows' own size
    scale = rows.abs().max()
    torch.testing.assert_close(d(rows) / scale, d.to_inference()(rows) / scale, rtol=1e-5, atol=1e-5)


def test_auxk_trains_encoder_and_decoder_of_dead_features(planted_rows: torch.Tensor) -> None:
    d = saekit.create("topk", d_in=16, n_features=64, k=4, k_aux=6)
    d.set_normalisation(planted_rows)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[40:] = True
    loss = d.loss(planted_rows, TrainState(dead=dead))
    loss.terms["auxk"].backward()
    assert d.encoder.grad[40:].abs().sum() > 0 and d.atoms.weight.grad[40:].abs().sum() > 0
    # the residual is detached: the live features get nothing from this term
    assert d.encoder.grad[:40].abs().sum() == 0 and d.atoms.weight.grad[:40].abs().sum() == 0


def test_auxk_equals_its_definition_in_dense_autograd(planted_rows: torch.Tensor) -> None:
    d = saekit.create("topk", d_in=16, n_features=64, k=4, k_aux=6, coefficient=0.25)
    d.set_normalisation(planted_rows)
    dead = torch.arange(64) % 3 == 0
    term = d.loss(planted_rows, TrainState(dead=dead)).terms["auxk"]
    x = d.norm_in(planted_rows)
    pre = x @ d.encoder.T + d.b_enc
    top = pre.topk(4)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    residual = (x - codes @ d.atoms.weight - d.b_dec).detach()
    at = pre.masked_fill(~dead, -torch.inf).topk(6)
    e_hat = torch.zeros_like(pre).scatter(1, at.indices, at.values.relu()) @ d.atoms.weight
    variance = (residual - residual.mean(0)).square().sum()
    expected = 0.25 * 16 * (residual - e_hat).square().sum() / variance
    torch.testing.assert_close(term, expected)
    mine = torch.autograd.grad(term, d.encoder)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(expected, d.encoder)[0], rtol=1e-4, atol=1e-5)


def test_unit_norm_atoms_stay_on_the_sphere_and_their_gradient_along_it(planted_rows: torch.Tensor) -> None:
    trainer = saekit.Trainer(saekit.create("topk", d_in=16, n_features=64, k=4))
    for _ in range(3):
        trainer.step(planted_rows)
        weight = trainer.dictionary.atoms.weight
        torch.testing.assert_close(weight.norm(dim=-1), torch.ones(64))
    fresh = saekit.Trainer(saekit.create("topk", d_in=16, n_features=64, k=4))
    before = fresh.dictionary.atoms.weight.detach().clone()
    fresh.step(planted_rows)
    optimizer = fresh.optimizer
    weights = zip(optimizer.parameters, optimizer.moments, strict=True)
    moment = next(m for p, (m, _) in weights if p is fresh.dictionary.atoms.weight)
    assert torch.linalg.vecdot(moment, before).abs().max() < 1e-4 * moment.abs().max()
    assert moment.abs().max() > 0


def test_omp_is_the_least_squares_fit_of_what_it_chose(planted_rows: torch.Tensor) -> None:
    d = saekit.create("random_omp", d_in=16, n_features=64, k=5)
    d.set_normalisation(planted_rows)
    x = d.norm_in(planted_rows[:40]).double()
    indices, values = d.encode(planted_rows[:40]).rectangular()
    for row, at, value in zip(x, indices.long(), values.double(), strict=True):
        atoms = d.W_dec[at].double()
        best = torch.linalg.lstsq(atoms.T, row[:, None]).solution[:, 0]
        torch.testing.assert_close(value, best, rtol=1e-3, atol=1e-3)
        assert len(set(at.tolist())) == 5
        # greedy: the first atom is the one most aligned with the row
        assert at[0] == (d.W_dec.double() @ row).abs().argmax()


def test_omp_error_never_rises_with_k(planted_rows: torch.Tensor) -> None:
    errors = []
    for k in (1, 2, 4, 8, 16):
        d = saekit.create("random_omp", d_in=16, n_features=64, k=k)
        d.set_normalisation(planted_rows)
        errors.append(saekit.metrics.fvu(planted_rows, d(planted_rows)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6  # 16 atoms span 16 dimensions


def test_more_steps_of_a_trained_pursuit_are_never_worse(planted_rows: torch.Tensor) -> None:
    d = saekit.create("matching_pursuit", d_in=16, n_features=64, k=4)
    trainer = saekit.Trainer(d, lr=1e-3)
    for _ in range(50):
        trainer.step(planted_rows)
    read, before = d.norm_in(planted_rows), torch.tensor(torch.inf)
    for steps in (1, 2, 4, 8, 16, 32):
        wider = saekit.create("matching_pursuit", d_in=16, n_features=64, k=4, k_inference=steps)
        wider.load_state_dict(d.state_dict())
        # of what the pursuit works on: with centred data the bias is not part of its residual
        left = (read - wider.encode(planted_rows).to_dense() @ wider.W_dec).detach().norm(dim=1)
        assert (left <= before + 1e-5).all() and left.mean() < before.mean()
        before = left


def test_training_recovers_planted_features_and_beats_the_controls() -> None:
    g = torch.Generator().manual_seed(77)
    truth = torch.nn.functional.normalize(torch.randn(64, 32, generator=g), dim=-1)
    chosen = torch.rand(8000, 64, generator=g).topk(2).indices
    rows = (truth[chosen] * (1 + torch.rand(8000, 2, generator=g))[..., None]).sum(1) + 5
    d = saekit.create("topk", d_in=32, n_features=96, k=2, seed=1)
    saekit.train(d, rows, steps=600, batch_size=256, lr=3e-3)
    control = saekit.create("random_omp", d_in=32, n_features=96, k=2)
    control.set_normalisation(rows)
    ours, theirs = (saekit.metrics.fvu(rows, m(rows).detach()) for m in (d, control))
    assert ours < 0.1 and ours < 0.25 * theirs
    assert (truth @ d.W_dec.detach().T).amax(-1).mean() > 0.95


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 65}, "k = 65 must lie in 1..n_features = 64"),
        ({"k": 0}, "k = 0"),
        ({"k": 4, "kaux": 3}, "did you mean 'k_aux'"),
        ({"k": 4, "k_aux": 0}, "k_aux = 0"),
        ({}, "needs k"),
        ({"k": 4, "d_in": 0}, "d_in = 0"),
        ({"k": 4, "selection": "tpok"}, "did you mean 'topk'"),
    ],
)
def test_an_impossible_choice_is_refused(options: dict, words: str) -> None:
    with pytest.raises(SaekitError, match=words):
        saekit.create("topk", **{"d_in": 16, "n_features": 64, **options})


def test_a_wrong_width_is_refused(small_dictionary: Dictionary) -> None:
    with pytest.raises(SaekitError, match="width 15 is not the dictionary's d_in = 16"):
        small_dictionary.encode(torch.zeros(3, 15))


def test_codes_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 5, 20, generator=g) * (torch.rand(3, 5, 20, generator=g) < 0.2)
    codes = Codes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    assert torch.equal(codes.l0(), (dense != 0).sum(-1))
    assert torch.equal(codes.firing_counts(), (dense != 0).sum((0, 1)))
    for chosen in (torch.tensor([7, 0, 13]), torch.tensor([3, 3, 0])):
        assert torch.equal(codes.select(chosen), dense[..., chosen])
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="rows are bools; give the numbers of rows"):
        codes.at(torch.ones(15, dtype=torch.bool))
    by = torch.arange(20.0)
    assert torch.equal(codes.scale(by).to_dense(), dense * by)
    with pytest.raises(ValueError, match="different numbers"):
        codes.rectangular()
    values, indices = dense.view(15, 20).topk(3)
    flat = Codes.from_rectangular(indices, values, 20)
    assert flat.rectangular()[1].data_ptr() == flat.values.data_ptr() == values.data_ptr()  # views
    grown = dataclasses.replace(flat, values=values.reshape(-1).clone().requires_grad_())
    grown.to_dense().square().sum().backward()
    torch.testing.assert_close(grown.values.grad, 2 * values.reshape(-1))
