"""Dictionaries made from dictionaries or from weights: calibration, pruning, merging, warm starts."""

import inspect
from pathlib import Path

import pytest
import torch

import saekit
from saekit.dictionaries import PRESETS, TrainState, from_weights, merge, warm_start
from saekit.dictionaries.surgery import calibrate, duplicates, prune
from saekit.types import SaekitError

pytestmark = pytest.mark.filterwarnings("ignore:k = 4 was asked")  # runs this short don't reach their L0


def make(name: str, **options) -> saekit.Dictionary:
    d_in = (12, 20) if name == "crosscoder" else 32
    return saekit.create(name, **{"d_in": d_in, "n_features": 128, "k": 4, "seed": 0, **options})


def trained(name: str, rows: torch.Tensor, **options) -> saekit.Dictionary:
    d = make(name, **options)
    saekit.train(d, rows, steps=40, batch_size=256, lr=2e-3)
    return d


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in PRESETS
        if n not in ("abstopk", "omp", "switch", "codebook", "clt", "lorsa", "random", "random_omp")
    ],
)
def test_calibration_gives_the_wanted_l0_exactly(name: str, rows: torch.Tensor) -> None:
    d = make(name)
    d.prepare(rows if d.wiring.columns == 32 else torch.cat([rows, rows], 1))
    for k in (3, 7.5):
        got = calibrate(d, rows, k)
        codes = got.encode(rows)
        assert got.config.selection[0] == "jumprelu" and len(codes.values) == round(k * len(rows))
        assert (codes.values > 0).all()


@pytest.mark.parametrize("name", ["groupmax", "switch", "codebook"])
def test_groups_of_equal_size_are_not_cut(name: str, rows: torch.Tensor) -> None:
    d = make(name, **{"switch": {"experts": 4}, "codebook": {"groups": 4}}.get(name, {}))
    d.prepare(rows)
    keep = torch.arange(128) >= 10
    with pytest.raises(SaekitError, match="of equal size, which pruning would break"):
        prune(d, keep)
    if name == "codebook":
        whole = make(name)
        whole.prepare(rows)
        assert prune(whole, keep)[0].n_features == 118


def test_calibration_of_a_topk_keeps_its_values(rows: torch.Tensor) -> None:
    d = make("topk")
    d.prepare(rows)
    got = calibrate(d, rows, 4)
    theirs, mine = d.encode(rows).to_dense(), got.encode(rows).to_dense()
    both = (theirs > 0) & (mine > 0)
    assert both.sum() > 0.5 * len(rows) * 4
    torch.testing.assert_close(mine[both], theirs[both], rtol=1e-3, atol=1e-3)
    for bad, words in ((0, "k = 0 must"), (200, "k = 200 must"), (127, "positive pre-activations")):
        with pytest.raises(SaekitError, match=words):
            calibrate(d, rows, bad)
    with pytest.raises(SaekitError, match="its codes have signs"):
        calibrate(make("abstopk"), rows, 4)
    with pytest.raises(SaekitError, match="'codebook' can't be calibrated: its codes are 1"):
        calibrate(make("codebook"), rows, 4)


@pytest.mark.parametrize(
    "name", ["topk", "batchtopk", "jumprelu", "gated", "matryoshka", "matching_pursuit", "archetypal"]
)
def test_pruning_what_never_fires_changes_nothing(name: str, rows: torch.Tensor, tmp_path: Path) -> None:
    d = make(name)
    d.prepare(rows)
    d.observe(d.loss(rows).codes, TrainState())
    with torch.no_grad():
        if name == "matching_pursuit":
            d.atoms.weight[::3] = d.atoms.weight[1]  # ties go to the first: index 0
        else:
            d.b_enc[::3] = -1e4
    keep = d.encode(rows).firing_counts() > 0
    assert 0 < keep.sum() < 128
    small, remap = prune(d, keep)
    assert small.n_features == keep.sum() and (remap[~keep] == -1).all()
    assert remap[keep].tolist() == list(range(int(keep.sum())))
    torch.testing.assert_close(small(rows), d(rows), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        small.encode(rows).to_dense(), d.encode(rows).to_dense()[:, keep], rtol=1e-5, atol=1e-4
    )
    saekit.save(small, tmp_path)
    assert torch.equal(saekit.load(tmp_path)(rows), small(rows))
    assert not small.loss(rows).total.isnan()


def test_duplicates_are_mapped_onto_the_first(rows: torch.Tensor) -> None:
    d = make("relu")
    d.prepare(rows)
    with torch.no_grad():
        for weight in (d.encoder, d.atoms.weight):
            weight[[9, 40]] = weight[2].clone()
    first = duplicates(d)
    assert first[9] == first[40] == 2 and (first == torch.arange(128)).sum() == 126
    small, remap = prune(d, first == torch.arange(128), first)
    assert small.n_features == 126 and remap[9] == remap[40] == remap[2] == 2 and remap.min() == 0
    with pytest.raises(SaekitError, match="groups of equal size"):
        prune(make("groupmax"), torch.ones(128, dtype=torch.bool))


def test_a_copy_of_a_copy_is_a_copy_only_if_it_is_alike() -> None:
    """Atoms of steps of 0.3 radians, of which neighbours alone are alike: each second one stands for itself and the next."""
    angles = 0.3 * torch.arange(6)
    fan = torch.nn.functional.pad(torch.stack([angles.cos(), angles.sin()], 1), (0, 30))
    d = make("relu", n_features=6, atoms="free")
    with torch.no_grad():
        for weight in (d.encoder, d.atoms.weight):
            weight.copy_(fan)
    onto = duplicates(d, cosine=0.95)
    assert onto.tolist() == [0, 0, 2, 2, 4, 4] and torch.equal(onto[onto], onto)
    merge(d, onto)


def test_calibration_says_where_equals_stand_in_its_way() -> None:
    d = saekit.create("relu", d_in=8, n_features=8, atoms="free", normalise="none")
    with torch.no_grad():
        for weight in (d.encoder, d.atoms.weight):
            weight.copy_(torch.eye(8))
    rows = torch.eye(8).repeat(100, 1)
    for k, found in ((0.3, 0.0), (0.999, 1.0)):
        if found == 0:
            with pytest.warns(
                UserWarning,
                match=r"800 pre-activations are equal at the threshold that k = 0\.3 needs, so that L0 is 0",
            ):
                out = calibrate(d, rows, k)
        else:
            out = calibrate(d, rows, k)
        assert out.encode(rows).l0().float().mean() == found


def test_pruning_counts_dedicated_features_anew(rows: torch.Tensor) -> None:
    d = make("crosscoder", n_features=24, dedicated=(6, 5), objective="reconstruction")
    saekit.train(d, rows, steps=5, batch_size=256)
    keep = torch.ones(24, dtype=torch.bool)
    keep[[0, 13, 14, 15, 20]] = False  # of all, of the first source, and of the second
    small, _ = prune(d, keep)
    assert small.config.wiring[1].dedicated == (3, 4)
    before = [part.norm(dim=1) for part in small.W_dec.detach().split((12, 20), 1)]
    saekit.train(small, rows, steps=1, batch_size=256, lr=1e-6)
    for old, new in zip(before, small.W_dec.detach().split((12, 20), 1), strict=True):
        torch.testing.assert_close(new.norm(dim=1), old, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "batchtopk", "topk"])
def test_duplicates_fire_together_where_features_decide_by_themselves(name: str) -> None:
    """Copies of twice and half the size are found; with another threshold, or a bias for it, they are no copies."""
    d = make(name, atoms="free")
    with torch.no_grad():
        d.b_enc[2] = -0.6 if name in ("relu", "gated") else 0.2
        if name in ("jumprelu", "batchtopk"):
            d.selection.threshold.fill_(0.5)
        for i, size in ((9, 2.0), (40, 0.5)):
            d.encoder[i], d.b_enc[i] = size * d.encoder[2], size * d.b_enc[2]
            d.atoms.weight[i] = d.atoms.weight[2] / size
            if name == "jumprelu":
                d.selection.threshold[i] = size * d.selection.threshold[2]
            if name == "batchtopk":  # one threshold for all
                d.b_enc[i] = 0.5 - size * (0.5 - d.b_enc[2])
        assert duplicates(d)[[2, 9, 40]].tolist() == [2, 2, 2]
        d.b_enc[9] -= 0.3
        if name == "jumprelu":
            d.selection.threshold[40] += 0.3
    rivals = name == "topk"  # rank decides, whatever the bias
    assert duplicates(d)[[2, 9]].tolist() == ([2, 2] if rivals else [2, 9])
    assert duplicates(d)[40] == (40 if name == "jumprelu" else 2)


def test_pruning_refuses_what_names_no_features() -> None:
    d, all_of = make("relu"), torch.ones(128, dtype=torch.bool)
    onto = torch.arange(128)
    unchecked = inspect.unwrap(prune)  # as users call it: the tests' checker of types would be first
    for keep, onto_, words in (
        ([True] * 128, None, "keep is of type list; give a tensor of 128 bools"),
        (torch.ones(128), None, "keep is torch.float32 of shape"),
        (all_of[:5], None, "give one bool for each of n_features = 128"),
        (all_of, onto + 1, r"onto holds 1..128; its indices must lie in 0..127"),
        (all_of, onto - 1, r"onto holds -1..126; its indices must lie in 0..127"),
        (all_of, onto[:5], r"onto is torch.int64 of shape \(5,\); give one index"),
        (all_of, onto / 2, "onto is torch.float32 of shape"),
        (all_of, [0] * 128, "onto is list; give one index for each of n_features = 128"),
    ):
        with pytest.raises(SaekitError, match=words):
            unchecked(d, keep, onto_)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "batchtopk"])
def test_merging_copies_leaves_outputs_as_they_are(name: str, rows: torch.Tensor) -> None:
    d = trained(name, rows, atoms="free").to_inference()
    with torch.no_grad():
        for i, factor in ((9, 1.0), (40, 0.5)):  # a copy, and one of half the size
            d.encoder[i], d.b_enc[i] = factor * d.encoder[2], factor * d.b_enc[2]
            if name != "relu":
                d.selection.threshold[i] = factor * d.selection.threshold[2]
    onto = torch.arange(128)
    onto[[9, 40]] = 2
    small, remap = merge(d, onto)
    assert small.n_features == 126 and remap[9] == remap[40] == remap[2] == 2
    torch.testing.assert_close(small(rows), d(rows), rtol=1e-5, atol=1e-4)
    with pytest.raises(SaekitError, match="lets copies compete"):
        merge(make("topk"), onto)
    onto[2] = 0
    with pytest.raises(SaekitError, match="onto must name"):
        merge(d, onto)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("topk", {}, {}),
        ("topk", {}, {"objective": "matryoshka"}),
        ("relu", {"normalise": "whiten"}, {"normalise": "whiten"}),
        ("relu", {"normalise": "whiten", "atoms": "free"}, {"normalise": "scale"}),
        ("relu", {"normalise": "none", "atoms": "free"}, {"normalise": "scale", "atoms": "free"}),
        ("jumprelu", {}, {}),
        ("jumprelu", {}, {"selection": "gated", "objective": ("reconstruction", "gate", "l1")}),
        ("gated", {}, {}),
        ("gated", {}, {"selection": "jumprelu", "objective": ("reconstruction", "l0")}),
        ("batchtopk", {}, {"selection": "jumprelu", "objective": ("reconstruction", "l0")}),
        ("batchtopk", {}, {}),
        ("matching_pursuit", {}, {}),
        ("archetypal", {}, {"atoms": "free"}),
        ("k_sparse", {}, {}),
    ],
)
def test_a_warm_start_is_the_same_function(
    name: str, before: dict, after: dict, rows: torch.Tensor, tmp_path: Path
) -> None:
    other = trained(name, rows, **before)
    d = make(name, **after, seed=1)
    d.set_normalisation(rows[:1000])
    warm_start(d, other)
    error = (d(rows) - other(rows)).norm(dim=1) / rows.std(0).norm()
    # a rule by rank or a threshold may turn the other way at a near tie
    assert error.quantile(0.99) < 1e-3
    saekit.save(other, tmp_path / "other")
    run = saekit.train(
        make(name, **after, seed=1), rows, steps=1, batch_size=256, lr=1e-9, init=str(tmp_path / "other")
    )
    if d.config.selection[0] == other.config.selection[0] == "topk":
        assert saekit.metrics.fvu(rows, run.dictionary(rows)) == pytest.approx(
            saekit.metrics.fvu(rows, other(rows)), rel=1e-3
        )


def test_it_begins_at_a_checkpoint_of_a_run_that_is_not_finished(rows: torch.Tensor, tmp_path: Path) -> None:
    saekit.train(make("topk"), rows, steps=20, batch_size=256, lr=2e-3, checkpoint_every=10, out=tmp_path)
    whole = saekit.load(tmp_path)
    (tmp_path / "dictionary.safetensors").unlink()
    (tmp_path / "card.json").unlink()
    begun = {}
    for name in ("", "checkpoints/step-00000010", "checkpoints/step-00000020"):
        d = make("topk", seed=1)
        saekit.train(d, rows, steps=1, batch_size=256, lr=1e-9, init=str(tmp_path / name))
        begun[name] = d
    assert torch.equal(begun[""].W_dec, begun["checkpoints/step-00000020"].W_dec)
    torch.testing.assert_close(begun[""](rows), whole(rows), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(begun["checkpoints/step-00000010"](rows), whole(rows), rtol=1e-2, atol=1e-2)
    for name in ("checkpoints/step-00000015", "checkpoints/step-00000010"):
        file = tmp_path / name / "state.safetensors"
        if file.exists():
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file.parent.mkdir()
        with pytest.raises(SaekitError, match="holds no intact checkpoint"):
            saekit.train(make("topk"), rows, steps=1, batch_size=256, init=str(tmp_path / name))


def test_a_warm_start_takes_the_normalisation_or_says_what_is_missing(rows: torch.Tensor) -> None:
    other = trained("topk", rows)
    d = make("topk", seed=1)
    warm_start(d, other)
    torch.testing.assert_close(d(rows), other(rows), rtol=1e-5, atol=1e-4)
    for bad, words in (
        (make("topk", n_features=64), "n_features = 64 differs from the 128"),
        (make("topk", normalise="whiten"), "call set_normalisation"),
        (make("archetypal"), "choose 'free'"),
    ):
        with pytest.raises(SaekitError, match=words):
            warm_start(bad, other)
    with pytest.raises(SaekitError, match="neither a folder with a dictionary"):
        saekit.train(make("topk"), rows, steps=1, batch_size=8, init="nowhere")


def test_weights_of_any_tool_become_a_dictionary(rows: torch.Tensor, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(32, 128, generator=g) / 32, torch.randn(128, 32, generator=g)
    b_enc, b_dec, pre = (torch.randn(n, generator=g) for n in (128, 32, 32))
    threshold = torch.rand(128, generator=g)
    d = from_weights(W_enc, W_dec, b_enc, b_dec, selection="jumprelu", threshold=threshold, pre_bias=pre)
    u = (rows - pre) @ W_enc + b_enc
    torch.testing.assert_close(d(rows), (u * (u > threshold)) @ W_dec + b_dec, rtol=1e-4, atol=1e-3)
    top = from_weights(W_enc, W_dec, selection="topk", k=3)
    assert saekit.metrics.l0(top.encode(rows)) <= 3
    saekit.save(d, tmp_path)
    assert torch.equal(saekit.load(tmp_path)(rows), d(rows))
    warm = make("jumprelu")
    saekit.train(warm, rows, steps=1, batch_size=256, lr=1e-9, init=str(tmp_path))
    assert saekit.metrics.fvu(rows, warm(rows)) == pytest.approx(saekit.metrics.fvu(rows, d(rows)), rel=1e-2)
    for options, words in (
        ({"threshold": 1.0}, "selection 'relu' has none"),
        ({"b_enc": b_dec}, "b_enc has shape"),
        ({"selection": "pursuit", "k": 4}, "selection 'pursuit' reads x by more"),
        ({"selection": "switch", "k": 4, "experts": 2}, "selection 'switch' reads x by more"),
        (
            {"selection": "jumprelu", "threshold": torch.ones(3)},
            r"threshold has shape \(3,\), .* one of \(128,\)",
        ),
        ({"b_enc": torch.full((128,), torch.nan)}, "b_enc holds NaN"),
    ):
        with pytest.raises(SaekitError, match=words):
            from_weights(W_enc, W_dec, **options)
    with pytest.raises(SaekitError, match="W_dec has shape"):
        from_weights(W_enc, W_enc)
