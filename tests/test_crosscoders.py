"""Dictionaries of several sources: an autoencoder where there is one, and what tells the sources apart."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import saekit as command

import saekit
from saekit.activations import Store
from saekit.evaluate.diffing import latent_scaling, norm_difference, specific
from saekit.harvest import SideBySide, harvest
from saekit.types import SaekitError


def make(**options) -> saekit.Dictionary:
    chosen = {"d_in": (12, 20), "n_features": 128, "k": 4, "seed": 0, **options}
    return saekit.create("crosscoder", **{key: value for key, value in chosen.items() if value is not None})


def test_of_one_source_it_is_the_autoencoder(rows: torch.Tensor) -> None:
    options = {"n_features": 64, "k": 4, "seed": 0}
    one = saekit.create("crosscoder", d_in=(32,), **options)
    two = saekit.create("batchtopk", d_in=32, **options)
    for d in (one, two):
        saekit.train(d, rows, steps=20, batch_size=256, lr=2e-3)
    assert torch.equal(one(rows), two(rows))
    assert torch.equal(one.encode(rows).to_dense(), two.encode(rows).to_dense())


def test_each_source_is_normalised_by_itself(rows: torch.Tensor) -> None:
    rows = torch.cat([rows[:, :12], 100 * rows[:, 12:] + 7], 1)
    d = make()
    d.set_normalisation(rows)
    for part, width in zip(d.norm_in(rows).split((12, 20), 1), (12, 20), strict=True):
        assert part.square().sum(1).mean().item() == pytest.approx(width, rel=1e-3)
    torch.testing.assert_close(d.norm_out.invert(d.norm_in(rows)), rows, rtol=1e-4, atol=1e-2)
    folded = d.to_inference()
    torch.testing.assert_close(folded(rows), d(rows), rtol=1e-3, atol=1e-2)


def test_the_penalty_adds_up_the_norms_in_the_sources(rows: torch.Tensor) -> None:
    d = make(selection="relu", objective=("reconstruction", "l1"))
    d.prepare(rows)
    term = d.loss(rows).terms["l1"]
    norms = sum(part.norm(dim=1) for part in d.W_dec.split((12, 20), 1))
    codes = d.encode(rows).to_dense()
    weight = d.terms["l1"].coefficient(saekit.dictionaries.TrainState())
    torch.testing.assert_close(term, weight * (codes * norms).sum(1).mean())


@pytest.mark.parametrize("kind", ["batchtopk", "relu", "pursuit"])
def test_dedicated_features_keep_to_their_source(kind: str, rows: torch.Tensor) -> None:
    objective = ("reconstruction",)
    options = {} if kind != "relu" else {"k": None}
    d = make(selection=kind, dedicated=(16, 24), objective=objective, **options)
    saekit.train(d, rows, steps=30, batch_size=256, lr=2e-3)
    for weight in (d.W_dec, d.W_enc.T):
        first, second = weight[88:104], weight[104:]
        assert (first[:, 12:] == 0).all() and (second[:, :12] == 0).all()
        assert (first[:, :12] != 0).any() and (second[:, 12:] != 0).any() and (weight[:88] != 0).all()
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(128))
    assert torch.equal(norm_difference(d)[88:104], torch.zeros(16))
    assert torch.equal(norm_difference(d)[104:], torch.ones(24))


def test_resampled_dedicated_features_keep_to_their_source(rows: torch.Tensor) -> None:
    d = make(dedicated=(60, 60))
    saekit.train(d, rows, steps=20, batch_size=64, lr=2e-3, dead_after=64, resample_every=5)
    assert (d.W_dec[8:68, 12:] == 0).all() and (d.W_dec[68:, :12] == 0).all()


def test_latent_scaling_equals_least_squares(rows: torch.Tensor) -> None:
    d = make(d_in=(16, 16))
    saekit.train(d, rows, steps=40, batch_size=256, lr=2e-3)
    error, reconstruction = latent_scaling(d, rows)
    x, x_hat = d.norm_in(rows), d.norm_out(d(rows)).detach()
    codes = d.encode(rows).to_dense().detach()
    fired = codes.square().sum(0) > 0
    for j in fired.nonzero()[::9, 0].tolist():
        written = torch.outer(codes[:, j], d.W_dec[j, 16:].detach())

        def beta(y: torch.Tensor, written: torch.Tensor = written) -> float:
            return torch.linalg.lstsq(written.reshape(-1, 1), y.reshape(-1, 1)).solution.item()

        mine = beta((x - x_hat)[:, :16]) / beta((x - x_hat)[:, 16:] + written)
        assert error[j].item() == pytest.approx(mine, rel=1e-3, abs=1e-4)
        mine = beta(x_hat[:, :16].contiguous()) / beta(x_hat[:, 16:].contiguous())
        assert reconstruction[j].item() == pytest.approx(mine, rel=1e-3, abs=1e-4)
    assert not specific(d, rows)[~fired].any()


def test_bad_sources_are_refused(rows: torch.Tensor) -> None:
    for options, words in (
        ({"d_in": ()}, "must hold the width"),
        ({"d_in": (4, 0)}, "must hold the width"),
        ({"dedicated": (1, 2, 3)}, "a number of features for each of 2"),
        ({"dedicated": (100, 100)}, "more than n_features = 128"),
        ({"normalise": "whiten"}, "would mix the sources"),
        ({"atoms": "archetypal", "dedicated": (1, 1)}, "would cut them to one source"),
        ({"objective": ("reconstruction", "end_to_end")}, "from one place, and wiring 'crosscoder' writes 2"),
        ({"d_in": 32}, "must be of type"),
    ):
        with pytest.raises(SaekitError, match=words):
            make(**options)
    with pytest.raises(SaekitError, match="width 32 is not the dictionary's d_in = 12 \\+ 21"):
        saekit.train(make(d_in=(12, 21)), rows, steps=1, batch_size=8)
    with pytest.raises(SaekitError, match=r"source = 2 is not in 0\.\.1"):
        norm_difference(make(), 2)
    with pytest.raises(SaekitError, match=r"expected \[rows, 16 \+ 16\], the sources side by side"):
        latent_scaling(make(d_in=(16, 16)), rows[:, :31])
    with pytest.raises(SaekitError, match="needs equal widths"):
        latent_scaling(make(), rows)


def test_what_has_no_comparable_norms_is_not_compared(rows: torch.Tensor) -> None:
    """Of sources in units of their own, folding makes the norms differ where the features don't."""
    scaled = torch.cat([rows[:, :16], 100 * rows[:, 16:]], 1)
    d = make(d_in=(16, 16))
    saekit.train(d, scaled, steps=20, batch_size=256, lr=2e-3)
    plain = make(d_in=(16, 16), normalise="none")
    saekit.train(plain, scaled, steps=2, batch_size=256, lr=2e-3)
    clt = saekit.create("clt", d_in=8, n_layers=2, n_features=64, k=4)
    for fine in (d, plain):
        assert norm_difference(fine).isfinite().all() and len(latent_scaling(fine, scaled)) == 2
    for bad, words in (
        (d.to_inference(), "as to_inference.. and calibrate.. leave it"),
        (clt, "'cross_layer'"),
    ):
        with pytest.raises(SaekitError, match=words):
            norm_difference(bad)
        with pytest.raises(SaekitError, match=words):
            latent_scaling(bad, scaled)


@pytest.fixture(scope="module")
def two_stores(tiny_gpt2, code_lm, tmp_path_factory) -> dict[str, Path]:
    """The same text by two models: code-lm, and a random one with its tokenizer."""
    folder = tmp_path_factory.mktemp("two")
    where = {"base": (code_lm, "blocks.1.hook_resid_post"), "tuned": (tiny_gpt2, "blocks.1.hook_resid_post")}
    for name, (model, point) in where.items():
        harvest(model, "stdlib", [point], out=folder / name, tokens=4096, context=64, batch_rows=8)
    return {name: folder / name for name in where}


def test_stores_of_two_models_stand_side_by_side(two_stores: dict[str, Path], small_store: Store) -> None:
    stores = {name: Store(path) for name, path in two_stores.items()}
    both = SideBySide(stores)
    points = both.hook_points
    assert points == ["base/blocks.1.hook_resid_post", "tuned/blocks.1.hook_resid_post"]
    # rows are those of tokens that both keep, found the slow way
    kept = []
    for store in stores.values():
        mask = torch.cat([batch.mask.flatten() for batch in store.sequences()])
        values = torch.cat([batch.activations[points[0][5:]].flatten(0, 1) for batch in store.sequences()])
        kept.append((mask, values))
    common = kept[0][0] & kept[1][0]
    assert both.n_rows == int(common.sum())
    rows = np.arange(both.n_rows)
    for point, (_, values) in zip(points, kept, strict=True):
        assert torch.equal(both.gather(point, rows), values[common])
    first = next(both.batches(points, 64, seed=0))
    assert first.shape == (64, sum(both.width(p) for p in points))
    short = two_stores["base"].parent / "short"
    harvest(
        "code-lm", "stdlib", ["blocks.1.hook_resid_post"], out=short, tokens=2048, context=64, batch_rows=8
    )
    ways = [SideBySide(dict(pair)) for pair in itertools.permutations([("base", stores["base"]), ("short", Store(short))])]  # fmt: skip
    assert ways[0].n_rows == ways[1].n_rows == Store(short).n_rows
    name = "short/blocks.1.hook_resid_post"
    assert torch.equal(*(way.gather(name, np.arange(way.n_rows)) for way in ways))
    with pytest.raises(SaekitError, match="hold different tokens"):
        other = two_stores["base"].parent / "other"
        harvest("code-lm", "stdlib", ["blocks.1.hook_resid_post"], out=other, tokens=2048, context=32)
        SideBySide({**stores, "other": Store(other)})
    with pytest.raises(SaekitError, match="is of none of the stores"):
        both.check("third/blocks.1.hook_resid_post")


def test_stores_of_other_inputs_that_are_no_tokens_are_not_paired(tmp_path: Path) -> None:
    net, g = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU()), torch.Generator().manual_seed(0)
    one, other = (torch.randn(50, 4, generator=g) for _ in range(2))
    stores = [harvest(net, [x], ["1"], out=tmp_path / str(i)) for i, x in enumerate((one, other, one))]
    assert SideBySide({"a": stores[0], "b": stores[2]}).n_rows == 50
    with pytest.raises(SaekitError, match="hold different"):
        SideBySide({"a": stores[0], "b": stores[1]})


def test_the_command_trains_one_of_two_models_and_one_of_all_layers(
    two_stores: dict[str, Path], tmp_path: Path
) -> None:
    train = ("train", "crosscoder", "--n-features", "64", "--k", "4", "--steps", "3", "--batch-size", "256")
    acts = [part for path in two_stores.values() for part in ("--acts", str(path))]
    done = command(*train, *acts, "--out", str(tmp_path / "two"), "--control")
    assert done.returncode == 0, done.stderr
    d = saekit.load(tmp_path / "two")
    assert d.reads == ("base/blocks.1.hook_resid_post", "tuned/blocks.1.hook_resid_post")
    again = command(
        "train", "--config", str(tmp_path / "two" / "config.json"), "--out", str(tmp_path / "again")
    )
    assert again.returncode == 0, again.stderr
    files = [p / "dictionary.safetensors" for p in (tmp_path / "two", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    done = command(*train, "--hook-points", "blocks.*.hook_resid_post", "--out", str(tmp_path / "all"))
    assert done.returncode == 0, done.stderr
    d = saekit.load(tmp_path / "all")
    assert len(d.reads) == 4 and len(d.wiring.parts_in) == 4
    report = saekit.evaluate(d, "code-lm", "stdlib", tokens=1024)
    assert {"fvu", "ce_recovered"} <= set(report) and "random" in report["fvu"].control
    bad = command("eval", str(tmp_path / "two"), "--tokens", "512")
    assert bad.returncode == 2 and "`saekit diff`" in bad.stderr
    done = command("diff", str(tmp_path / "two"), "--rows", "500", "--json")
    assert done.returncode == 2 and "32 wide and other 0 256" in done.stderr
    done = command("diff", str(tmp_path / "all"), "--json")
    assert done.returncode == 2 and "live stream" in done.stderr


def test_the_command_compares_two_models(two_stores: dict[str, Path], tmp_path: Path) -> None:
    """A model beside itself: nothing is of one alone, and every live feature is as strong in both."""
    twin = tmp_path / "twin"
    twin.symlink_to(two_stores["base"])
    train = ("train", "crosscoder", "--n-features", "64", "--k", "4", "--steps", "60", "--batch-size", "512")
    acts = ("--acts", str(two_stores["base"]), "--acts", str(twin))
    done = command(*train, *acts, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    done = command("diff", str(tmp_path / "run"), "--source", "twin", "--rows", "2000", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    found = data["features"]
    assert (data["source"], data["other"], data["rows"]) == ("twin", "base", 2000)
    assert len(found["side"]) == 64 and set(found["side"]) <= {"shared", "dead"}
    alive = [i for i, side in enumerate(found["side"]) if side == "shared"]
    assert alive and all(found["nu_reconstruction"][i] == pytest.approx(1, abs=0.5) for i in alive)
    assert json.loads((tmp_path / "run" / "diff.json").read_text())["features"] == found
    assert (tmp_path / "run" / "diff.html").stat().st_size > 100_000
    bad = command("diff", str(tmp_path / "run"), "--source", "twim")
    assert bad.returncode == 2 and "did you mean" in bad.stderr
