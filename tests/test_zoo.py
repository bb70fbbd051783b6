"""What the architectures share beyond the contract: steering of L0, streams, starts, resampling, end-to-end, plug-ins."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import saekit
from saekit.activations import DrawnSource, TensorSource
from saekit.contract import examine
from saekit.dictionaries import TrainState
from saekit.dictionaries.surgery import with_objective
from saekit.harvest import ContinuedSource
from saekit.testbed.forest import Forest, ForestConfig
from saekit.types import SaekitError


def make(name: str, **options) -> saekit.Dictionary:
    return saekit.create(name, **{"d_in": 32, "n_features": 128, "k": 4, "seed": 0, **options})


STEERED = [pytest.param(name, marks=pytest.mark.slow) for name in ("relu", "gated", "p_annealing", "tanh")]


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", *STEERED])
def test_requested_l0_is_met_and_few_features_die_far_off_centre(name: str, rows: torch.Tensor) -> None:
    d = make(name, n_features=64)
    run = saekit.train(d, rows, steps=1200 if name == "tanh" else 700, batch_size=512, lr=2e-3)
    l0 = saekit.metrics.l0(d.encode(rows))
    assert l0 == pytest.approx(4, rel=0.1)
    if name in ("topk", "batchtopk", "jumprelu"):
        assert run.metrics["dead_share"] < 0.05


@pytest.mark.parametrize("name", ["switch", "codebook", "archetypal"])
def test_seeds_begin_apart_and_draw_from_no_one_else(name: str, rows: torch.Tensor) -> None:
    def begun(seed: int) -> list[torch.Tensor]:
        d = saekit.create(name, d_in=32, n_features=128, k=4, seed=seed)
        d.prepare(rows)
        parts = {"switch": lambda: d.selection.router, "archetypal": lambda: d.atoms.points}
        return [parts.get(name, lambda: d.W_dec)().detach().clone(), d.W_dec.detach().clone()]

    torch.manual_seed(5)
    after = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = begun(0), begun(0), begun(1)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert torch.equal(torch.rand(3), after)


def test_resampling_clears_the_moments_of_features_alone(rows: torch.Tensor) -> None:
    """Where there are as many features as dimensions too."""
    d = saekit.create("topk", d_in=32, n_features=32, k=4)
    trainer = saekit.Trainer(d, lr=1e-3, resample_every=3)
    for _ in range(2):
        trainer.step(rows[:256])
    at = next(i for i, p in enumerate(trainer.optimizer.parameters) if p is d.b_dec)
    with torch.no_grad():
        d.b_enc[:8] = -1e3  # silent ones
    trainer.silent[:8] = trainer.dead_after
    kept = trainer.optimizer.moments[at][1].clone()
    trainer.step(rows[:256])
    assert (trainer.optimizer.moments[at][1] > 0.9 * kept).all() and (kept > 0).all()
    which = next(i for i, p in enumerate(trainer.optimizer.parameters) if p is d.b_enc)
    cleared = trainer.optimizer.moments[which][1] == 0
    assert cleared.any() and not cleared.all()


def test_a_dial_that_saturates_says_so(rows: torch.Tensor) -> None:
    """What 64 features can't give is said after a run in which a possible L0 is met in silence."""
    with pytest.warns(UserWarning, match="k = 60 was asked for and L0 is"):
        saekit.train(make("jumprelu", k=60, n_features=64), rows, steps=500, batch_size=256, lr=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saekit.train(make("jumprelu", k=6, n_features=64), rows, steps=900, batch_size=256, lr=2e-3)


def test_a_threshold_that_has_not_settled_says_so() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 32, generator=g) * torch.randn(4000, 1, generator=g).mul(1.5).exp()
    with pytest.warns(UserWarning, match=r"k = 4 was asked for and L0 by the threshold at inference is"):
        saekit.train(make("batchtopk"), x, steps=400, batch_size=8)


@pytest.mark.parametrize(
    ("name", "latents", "steps"),
    [
        ("topk", 512, 700),
        ("jumprelu", 512, 1200),
        pytest.param("topk", 1024, 1000, marks=pytest.mark.slow),
        pytest.param("topk", 1024, 300, marks=pytest.mark.slow),
        pytest.param("batchtopk", 512, 2000, marks=pytest.mark.slow),
        pytest.param("jumprelu", 512, 2000, marks=pytest.mark.slow),
    ],
)
def test_few_features_die_where_there_are_more_than_the_data_has(name: str, latents: int, steps: int) -> None:
    """256 true features 30 standard deviations off centre, two and four times as many latents, short runs."""
    g = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(256, 64, generator=g), dim=1)
    on = (torch.rand(40_000, 256, generator=g) < 8 / 256) * (1 + torch.rand(40_000, 256, generator=g))
    x = on @ true
    x = x + 30 * x.std()
    d = saekit.create(name, d_in=64, n_features=latents, k=8)
    saekit.train(d, x, steps=steps, batch_size=512)
    assert saekit.metrics.l0(d.encode(x)) == pytest.approx(8, rel=0.1)
    assert (d.encode(x).firing_counts() == 0).float().mean() < 0.05


def test_a_batch_that_cannot_be_learned_from_is_refused_and_leaves_nothing(rows: torch.Tensor) -> None:
    trainer, bad = saekit.Trainer(make("topk")), rows[:64].clone()
    bad[3, 5] = float("nan")
    for batch, words in ((bad, "NaN or Inf in row 3"), (rows[:0], "it is empty")):
        with pytest.raises(SaekitError, match=words):
            trainer.step(batch)
    assert torch.isfinite(trainer.step(rows[:64])["loss"])


def test_starting_in_the_active_subspace_leaves_no_length_outside(rows: torch.Tensor) -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 6, generator=g)).Q
    flat = torch.randn(2000, 6, generator=g) @ basis.T + 3
    d = make("topk")
    saekit.train(d, flat, 1, 500, lr=1e-9, init="active_subspace")
    outside = d.W_dec - d.W_dec @ basis @ basis.T
    assert outside.norm(dim=1).max() < 1e-3 and d.W_dec.norm(dim=1).sub(1).abs().max() < 1e-5
    torch.testing.assert_close(d.encoder, d.atoms.weight, atol=1e-4, rtol=1e-4)
    with pytest.raises(SaekitError, match="init 'activ' is neither"):
        saekit.train(make("topk"), flat, 1, 500, init="activ")


def test_resampling_writes_new_directions_and_clears_moments(rows: torch.Tensor) -> None:
    d = make("topk", objective=("reconstruction",))
    trainer = saekit.Trainer(d, lr=1e-3, dead_after=100, resample_every=3)
    with torch.no_grad():
        d.b_enc[:10] = -1e6  # they can't fire
    for i in range(2):
        trainer.step(rows[i * 200 : i * 200 + 200])
    assert trainer.dead[:10].all()
    before = d.W_dec.detach().clone()
    trainer.step(rows[400:600])
    assert not trainer.dead[:10].any() and (d.b_enc[:10] == 0).all()
    cosine = (normalize(before[:10], dim=1) * d.W_dec[:10]).sum(1)
    assert (cosine < 0.99).all()
    moments = dict(zip(map(id, trainer.optimizer.parameters), trainer.optimizer.moments, strict=True))
    for weight in (d.encoder, d.atoms.weight, d.b_enc):
        assert all((m[:10] == 0).all() for m in moments[id(weight)])
    assert d.encode(rows).firing_counts()[:10].sum() > 0
    with pytest.raises(SaekitError, match="resample_every needs atoms"):
        saekit.Trainer(make("archetypal"), resample_every=3)


def test_k_anneals_from_its_start(rows: torch.Tensor) -> None:
    d = make("topk", k_start=20, anneal=0.5)
    d.prepare(rows)
    widths = [d.loss(rows[:50], TrainState(step=s, steps=100)).codes.width for s in (0, 24, 49, 99)]
    assert widths == [20, 12, 4, 4] and d.encode(rows[:5]).width == 4


def test_alpha_widens_the_support_at_inference(rows: torch.Tensor) -> None:
    d = make("k_sparse", alpha=1.5)
    d.prepare(rows)
    assert d.encode(rows[:5]).width == 6 and d.loss(rows[:5]).codes.width == 4


def test_whitening_gives_unit_covariance_and_folds(rows: torch.Tensor) -> None:
    d = make("topk", normalise="whiten")
    d.set_normalisation(rows)
    white = d.norm_in(rows)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(32), atol=2e-2, rtol=0)
    torch.testing.assert_close(d.norm_in.invert(white), rows, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("start", ["identity", "random"])
def test_archetypal_mixtures_learn_from_either_start(rows: torch.Tensor, start: str) -> None:
    d = saekit.create("archetypal", d_in=32, n_features=48, k=4, start=start)
    d.prepare(rows)
    before = d.W_dec.detach().clone()
    saekit.train(d, rows, steps=60, batch_size=256, lr=3e-3)
    moved = torch.nn.functional.cosine_similarity(d.W_dec, before, dim=1)
    assert (moved < 0.999).float().mean() > 0.2  # of those that fire


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_more_features_than_are_positive_are_warned_of(rows: torch.Tensor, name: str) -> None:
    d = saekit.create(name, d_in=32, n_features=40, k=38)
    with pytest.warns(UserWarning, match="k = 38 was asked for"):
        saekit.train(d, rows, steps=5, batch_size=256)


def test_archetypal_atoms_stay_in_the_hull(rows: torch.Tensor) -> None:
    d = make("archetypal", n_features=40, candidates=20)
    saekit.train(d, rows, 20, 256, lr=1e-2)
    weights = d.atoms.mixture.relu()
    weights = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(weights @ d.atoms.points * d.atoms.log_scale.exp(), d.W_dec)
    assert d.atoms.mixture.shape == (40, 20) and not d.atoms.deviation.requires_grad
    relaxed = make("relaxed_archetypal", n_features=40, candidates=20, delta=0.05)
    saekit.train(relaxed, rows, 20, 256, lr=1e-1)
    assert 0 < relaxed.atoms.deviation.norm(dim=1).max() <= 0.05 + 1e-6


def test_orthogonality_pushes_atoms_apart(rows: torch.Tensor) -> None:
    nearest = []
    for coefficient in (0.0, 0.25):
        d = make("topk", objective=("reconstruction", "orthogonality"), coefficient=coefficient)
        saekit.train(d, rows, 60, 256, lr=1e-2)
        cosine = (d.W_dec @ d.W_dec.T).detach().fill_diagonal_(0)
        nearest.append(cosine.abs().amax(1).mean())
    assert nearest[1] < nearest[0]


def test_end_to_end_training_lowers_kl_and_leaves_the_model_alone(tiny_gpt2) -> None:
    source = ContinuedSource(
        saekit.harvest(tiny_gpt2, "stdlib", ["blocks.1.hook_resid_post"], tokens=4000, context=32)
    )
    weights = {k: v.clone() for k, v in tiny_gpt2.module.state_dict().items()}
    d = saekit.create("topk", d_in=32, n_features=64, k=4)
    saekit.train(d, source, 4, 8, lr=1e-2)
    tuned = with_objective(d, ("reconstruction", "end_to_end"), kl=100.0, later=1.0)
    assert torch.equal(tuned.W_dec, d.W_dec)
    batch = next(source.batches(source.hook_points, 32, 7))
    before = batch.downstream(d(batch.rows(source.hook_points[0])).detach(), True)
    same = batch.downstream(batch.rows(source.hook_points[0]), True)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["later"] == pytest.approx(0, abs=1e-6)
    run = saekit.train(tuned, source, 30, 8, lr=3e-3)
    assert run.finished and "end_to_end" in run.metrics
    after = batch.downstream(tuned(batch.rows(source.hook_points[0])).detach(), True)
    assert after["kl"] < before["kl"]
    for key, value in tiny_gpt2.module.state_dict().items():
        assert torch.equal(value, weights[key])
    assert all(p.grad is None for p in tiny_gpt2.module.parameters())
    with pytest.raises(SaekitError, match="needs the model behind"):
        saekit.train(tuned, torch.randn(100, 32), 1, 50)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder", "molt", "lorsa"])
def test_end_to_end_training_of_what_stands_in_for_a_module(tiny_gpt2, name: str) -> None:
    """The model goes on from what the dictionary writes; what it reads is the input of the module."""
    module = "blocks.1.attn" if name == "lorsa" else "blocks.0.mlp"
    points = [f"{module}:in", f"{module}:out"]
    source = ContinuedSource(saekit.harvest(tiny_gpt2, "stdlib", points, tokens=4000, context=32))
    shape = {"n_qk": 2, "d_qk": 8} if name == "lorsa" else {}
    d = saekit.create(
        name, d_in=32, n_features=64, k=4, objective=("reconstruction", "end_to_end"), kl=100.0, **shape
    )
    batch = next(source.batches(source.hook_points, 32, 7))
    own = batch.activations[points[1]][batch.mask]
    assert batch.downstream(own, False)["kl"] == pytest.approx(0, abs=1e-6)
    seen = []
    saekit.train(d, source, 30, 8, lr=3e-3, log_every=1, on_step=lambda _, m: seen.append(m["end_to_end"]))
    assert sum(seen[-5:]) < sum(seen[:5])


def test_a_forest_is_drawn_as_its_config_says() -> None:
    forest = Forest(ForestConfig(cosine=0.4))
    x, codes = forest.batch(40_000, 0)
    on = codes.to_dense() > 0
    rates = on.double().mean(0)
    torch.testing.assert_close(rates[:3], torch.full((3,), 0.15).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(rates[11:], torch.full((9,), 0.03).double(), atol=0.005, rtol=0)
    assert codes.l0().double().mean() == pytest.approx(forest.l0, abs=0.02)
    for child in range(11, 20):
        assert on[on[:, child], forest.parent[child]].all()
    assert (on[:, 11:14].sum(1) <= 1).all()
    gram = forest.directions @ forest.directions.T
    assert (
        gram[11, 12] == pytest.approx(0.4, abs=1e-5) and abs(gram[0, 11]) < 1e-6 and abs(gram[11, 14]) < 1e-6
    )
    torch.testing.assert_close(x, codes.to_dense() @ forest.directions)


def test_options_go_to_the_first_choice_that_has_them_or_to_the_one_named(rows: torch.Tensor) -> None:
    d = make("jumprelu", **{"auxk.coefficient": 0.5, "coefficient": 2.0})
    terms = dict(d.config.objective)
    assert terms["l0"].coefficient == 2.0 and terms["auxk"].coefficient == 0.5 and terms["l0"].k == 4
    with pytest.raises(SaekitError, match="did you mean 'coefficient'"):
        make("jumprelu", **{"auxk.coeficient": 0.5})


def test_drawn_rows_resume_where_they_were() -> None:
    source = DrawnSource(lambda n, step, seed: torch.full((n, 2), float(10 * seed + step)), 2, "test")
    first = source.batches(["x"], 3, 1)
    assert [next(first)[0, 0].item() for _ in range(3)] == [10, 11, 12]
    assert next(source.batches(["x"], 3, 1, start=2))[0, 0] == 12 and source.width(None) == 2
    assert isinstance(TensorSource(torch.ones(3, 2)).width(None), int)


def test_a_selection_of_ones_own_keeps_the_contract(
    tmp_path: Path, planted_rows: torch.Tensor, code_lm
) -> None:
    path = Path(__file__).parent / "example_selection.py"
    assert len(path.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location("example_selection", path)
    sys.modules["example_selection"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def mine(d_in: int = 16) -> saekit.Dictionary:
        return saekit.create(
            "topk",
            d_in=d_in,
            n_features=64,
            k=4,
            selection="damped",
            objective=("hierarchical", "l1"),
            coefficient=0.01,
        )

    examine(mine, planted_rows, tmp_path)
    d = mine(256)
    acts = saekit.harvest(code_lm, "stdlib", ["blocks.1.hook_resid_post"], out=tmp_path / "acts", tokens=4096)
    saekit.train(d, acts, 20, 512, tmp_path / "run")
    report = saekit.evaluate(saekit.load(tmp_path / "run"), code_lm, "stdlib", tokens=2048)
    assert 0 < float(report["fvu"]) < 1.5 and float(report["l0"]) <= 4


@pytest.mark.parametrize("name", ["jumprelu", "gated"])
def test_resampled_features_can_fire_again(name: str, rows: torch.Tensor) -> None:
    d = make(name)
    trainer = saekit.Trainer(d, 1e-3, steps=40, dead_after=200, resample_every=10)
    d.prepare(rows)
    with torch.no_grad():
        (d.selection.threshold[:10].fill_(1e4) if name == "jumprelu" else d.selection.b_mag[:10].fill_(-1e4))
    for step in range(40):
        trainer.step(rows[step * 100 : step * 100 + 100])
    assert (d.encode(rows).firing_counts()[:10] > 0).sum() >= 8


def test_a_batch_of_one_row_and_constant_rows_leave_no_nan(rows: torch.Tensor) -> None:
    d = make("topk")
    trainer = saekit.Trainer(d, 1e-3, steps=10, dead_after=1)
    d.set_normalisation(rows)
    for part in (rows[:1], rows[1:2], rows[:1].expand(20, -1)):
        trainer.step(part)
    assert all(bool(p.isfinite().all()) for p in d.parameters())


@pytest.mark.filterwarnings("ignore:k = 4 was asked for")
def test_l0_target_says_what_it_missed(rows: torch.Tensor) -> None:
    d = make("jumprelu", objective=("reconstruction", "l0_target"), k=60, coefficient=1e-6)
    with pytest.warns(UserWarning, match="the pull's coefficient is 1e-06"):
        saekit.train(d, rows, steps=30, batch_size=256)


@pytest.mark.parametrize("options", [{}, {"atoms": "free"}, {"selection": "gated"}])
def test_a_change_of_p_leaves_the_penalty_as_it_was(options: dict, rows: torch.Tensor) -> None:
    gate = ("gate",) if options else ()
    terms = ("reconstruction", "p_annealed", *(gate if options.get("selection") else ()))
    d = make("p_annealing", objective=terms, begin=0.0, changes=1, k=None, coefficient=1.0, **options)
    d.set_normalisation(rows)
    with torch.no_grad():
        if options.get("atoms"):
            d.atoms.weight.mul_(5)
        if options.get("selection"):
            d.selection.r.fill_(1.0)
    state = TrainState(step=6, steps=10)
    loss = d.loss(rows, state)
    d.observe(loss.codes, state)
    assert int(d.terms["p_annealed"].stage) == 1
    assert d.loss(rows, state).terms["p_annealed"].item() == pytest.approx(
        loss.terms["p_annealed"].item(), rel=5e-3
    )
