"""Dictionaries that stand in for a module: exact on a ReLU MLP, trained on pairs, evaluated in the model."""

import json
from pathlib import Path

import pytest
import torch
from commandline import saekit as run

import saekit
from saekit.dictionaries import from_weights, warm_start
from saekit.types import ActivationBatch, SaekitError
from saekit.verbs.places import _places


@pytest.fixture
def mlp() -> tuple[torch.nn.Sequential, torch.Tensor, torch.Tensor]:
    """A ReLU MLP of 16 to 24, what it reads and what it writes."""
    g = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 24))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
        x = torch.randn(2000, 16, generator=g) * 2 + 3
        return net, x, net(x)


def make(**options) -> saekit.Dictionary:
    return saekit.create(
        "transcoder", **{"d_in": 16, "d_out": 24, "n_features": 128, "k": 8, "seed": 0, **options}
    )


def test_a_relu_mlps_own_weights_are_a_transcoder(mlp) -> None:
    net, x, y = mlp
    d = from_weights(
        net[0].weight.T.detach(), net[2].weight.T.detach(), net[0].bias.detach(), net[2].bias.detach(), wiring="transcoder"
    )  # fmt: skip
    torch.testing.assert_close(d(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.encode(x).to_dense(), net[1](net[0](x)).detach(), rtol=1e-5, atol=1e-5)


def test_plus_and_minus_the_identity_is_an_autoencoder(mlp) -> None:
    _, x, _ = mlp
    both = torch.cat([torch.eye(16), -torch.eye(16)])
    d = from_weights(both.T.contiguous(), both)
    torch.testing.assert_close(d(x), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.encode(x).to_dense(), torch.cat([x, -x], 1).relu(), rtol=1e-5, atol=1e-5)


def test_a_linear_map_is_a_skip(mlp) -> None:
    _, x, _ = mlp
    g = torch.Generator().manual_seed(1)
    W, b = torch.randn(24, 16, generator=g), torch.randn(24, generator=g)
    zero = torch.zeros(16, 4), torch.zeros(4, 24)
    d = from_weights(*zero, b_dec=b, wiring="transcoder", W_skip=W)
    torch.testing.assert_close(d(x), x @ W.T + b, rtol=1e-4, atol=1e-4)
    with pytest.raises(SaekitError, match="passes its input on"):
        d.decode(d.encode(x))


@pytest.mark.parametrize("skip", [False, True])
def test_pairs_train_it_and_a_warm_start_keeps_it(mlp, skip: bool, tmp_path: Path) -> None:
    _, x, y = mlp
    d = make(skip=skip)
    run = saekit.train(d, (x, y), steps=150, batch_size=256, lr=3e-3, out=tmp_path / "run")
    assert saekit.metrics.fvu(y, d(x).detach()) < 0.5
    assert (run.dictionary.wiring.skip is not None) == skip
    other = make(skip=skip, normalise="whiten", atoms="free", seed=3)
    other.set_normalisation(torch.cat([x, y], 1))
    warm_start(other, d)
    torch.testing.assert_close(other(x), d(x), rtol=1e-4, atol=1e-3)
    again = saekit.train(
        make(skip=skip), (x, y), steps=1, batch_size=256, lr=1e-9, init=str(tmp_path / "run")
    )
    assert saekit.metrics.fvu(y, again.dictionary(x).detach()) == pytest.approx(
        saekit.metrics.fvu(y, d(x).detach()), rel=1e-3
    )


def test_a_batch_of_activations_is_a_pair(mlp) -> None:
    _, x, y = mlp
    d = make()
    d.reads, d.writes = ("a",), ("b",)
    batch = ActivationBatch(
        {"b": y[:512].view(4, 128, 24), "a": x[:512].view(4, 128, 16)}, torch.ones(4, 128, dtype=torch.bool)
    )
    one, two = saekit.Trainer(d), saekit.Trainer(make())
    for _ in range(2):
        mine, theirs = one.step(batch), two.step(torch.cat([x[:512], y[:512]], 1))
    assert torch.equal(mine["loss"], theirs["loss"])


def test_mismatched_pairs_are_named(mlp) -> None:
    _, x, y = mlp
    for source, words in (
        ((x[:-1], y), r"tensors of shapes \(1999, 16\), \(2000, 24\)"),
        ((x, y[:, :-1]), "width 39 is not the dictionary's d_in \\+ d_out = 40"),
        (x, "width 16 is not"),
        ((y, x), "'x' is 24 wide, and the dictionary reads 16 there"),
        ((x[:, :15], torch.cat([y, y[:, :1]], 1)), "'x' is 15 wide"),
        ((x[None, :90], y[None]), "tensors of shapes"),
    ):
        with pytest.raises(SaekitError, match=words):
            saekit.train(make(), source, steps=1, batch_size=8)
    trainer, mask = saekit.Trainer(make()), torch.ones(1, 50, dtype=torch.bool)
    trainer.dictionary.reads, trainer.dictionary.writes = ("a",), ("b",)
    for parts, words in (
        ({"a": y[None, :50], "b": x[None, :50]}, "'a' is 24 wide, and the dictionary reads 16"),
        ({"a": x[None, :50], "b": y[None, :49]}, "give them the same rows"),
        ({"a": x[None, :50]}, "batch lacks 'b'"),
    ):
        with pytest.raises(SaekitError, match=words):
            trainer.step(ActivationBatch(parts, mask))
    with pytest.raises(SaekitError, match="doesn't say which it reads"):
        saekit.Trainer(make()).step(ActivationBatch({"y": y[None, :50], "x": x[None, :50]}, mask))
    with pytest.raises(SaekitError, match="writes another space than it reads"):
        make(atoms="tied")
    with pytest.raises(SaekitError, match="hook point to read and one to write"):
        make().wiring.sites(["a", "b", "c"])


def test_what_a_module_reads_comes_before_what_it_writes(mlp) -> None:
    """Found in any order it is put in order; given backwards it is refused."""
    _, x, y = mlp
    d = make()
    for found in (["m:out", "m:in"], ["m:in", "m:out"], ["m"]):
        assert d.wiring.sites(found) == (("m:in",), ("m:out",))
    assert d.wiring.sites(["m:out", "n:in"]) == (("m:out",), ("n:in",))
    d.reads, d.writes = ("m:out",), ("m:in",)
    with pytest.raises(SaekitError, match=r"'m:out' is read and 'm:in' written, .*; swap them"):
        saekit.train(d, (x, y), steps=1, batch_size=8)
    with pytest.raises(SaekitError, match=r"names 'm:out' before 'm:in', .*; swap them"):
        _places(d.wiring, "m:out,m:in", None, [])
    assert _places(d.wiring, None, None, ["m:out", "m:in"]) == {"": (("m:in",), ("m:out",))}


def test_one_stream_trains_a_transcoder_for_every_mlp(tmp_path: Path) -> None:
    acts, out = tmp_path / "acts", tmp_path / "set"
    points = ("--hook-point", "blocks.*.mlp:in", "--hook-point", "blocks.*.mlp:out")
    done = run("harvest", "code-lm", "stdlib", *points, "--tokens", "4096", "--out", str(acts))
    assert done.returncode == 0, done.stderr
    command = ("train", "transcoder", "--acts", str(acts), "--n-features", "64", "--k", "4", "--steps", "3", "--batch-size", "512")  # fmt: skip
    done = run(*command, "--hook-points", "blocks.*.mlp", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    names = [f"blocks.{layer}.mlp" for layer in range(4)]
    assert [row["name"] for row in json.loads(done.stdout)["runs"]] == names
    alone = run(*command, "--hook-point", "blocks.2.mlp", "--out", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    files = [p / "dictionary.safetensors" for p in (out / "blocks.2.mlp", tmp_path / "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    d = saekit.load(out / "blocks.2.mlp")
    assert d.reads == ("blocks.2.mlp:in",) and d.writes == ("blocks.2.mlp:out",)
    report = saekit.evaluate(d, "code-lm", "stdlib", tokens=1024)
    assert 0 < float(report["fvu"]) < 5 and "random" in report["fvu"].control
    for arguments, words in (
        (("--hook-points", "blocks.*.mpl"), "matches nothing"),
        (("--hook-point", "blocks.9.mlp"), "is not in store"),
        ((), "holds several hook points"),
    ):
        bad = run(*command, *arguments, "--out", str(tmp_path / "bad"))
        assert bad.returncode == 2 and words in bad.stderr and not (tmp_path / "bad").exists()
