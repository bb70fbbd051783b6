"""Cross-layer transcoders: their diagonal case, their gradient, and a set of layers from one command."""

from pathlib import Path

import pytest
import torch
from commandline import saekit as command
from largest import Largest

import saekit
from saekit.dictionaries import TrainState, calibrate, prune
from saekit.kernels import collect
from saekit.types import Codes, SaekitError
from saekit.verbs.places import _places

LAYERS, D, D_OUT = 3, 10, 8


def make(**options) -> saekit.Dictionary:
    shape = {"d_in": D, "d_out": D_OUT, "n_layers": LAYERS, "n_features": 96, "k": 9, "seed": 0}
    return saekit.create("clt", **{**shape, **options})


@pytest.fixture
def pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows of three layers' inputs, then outputs, that depend on this layer's and earlier inputs."""
    x = rows[:, : LAYERS * D].split(D, 1)
    outputs = [(sum(x[: layer + 1]) / (layer + 1)).abs()[:, :D_OUT] for layer in range(LAYERS)]
    return torch.cat([*x, *outputs], 1)


@pytest.mark.parametrize("reach", [None, 1])
def test_a_diagonal_one_equals_its_transcoders(reach: int | None, pairs: torch.Tensor) -> None:
    x, y = pairs.split((LAYERS * D, LAYERS * D_OUT), 1)
    inputs, outputs = x.split(D, 1), y.split(D_OUT, 1)
    d = make(atoms="free", reach=reach)
    d.set_normalisation(pairs)
    singles = []
    for layer, part in enumerate(d.parts):
        one = saekit.create("transcoder", d_in=D, d_out=D_OUT, n_features=32, k=3, seed=layer, atoms="free")
        saekit.train(one, (inputs[layer], outputs[layer]), steps=20, batch_size=256, lr=2e-3)
        # those of the transcoders come from fewer rows
        one.norm_in, one.norm_out = d.norm_in.some(layer, layer + 1), d.norm_out.some(layer, layer + 1)
        with torch.no_grad():
            part.encoder.copy_(one.encoder)
            part.b_enc.copy_(one.b_enc)
            part.atoms.weight.zero_()[:, :D_OUT] = one.W_dec
            d.b_dec[layer * D_OUT : (layer + 1) * D_OUT] = one.b_dec
        singles.append(one)
    theirs = torch.cat([one(x_) for one, x_ in zip(singles, inputs, strict=True)], 1)
    torch.testing.assert_close(d(x), theirs, rtol=1e-5, atol=1e-5)
    codes = Codes.beside([one.encode(x_) for one, x_ in zip(singles, inputs, strict=True)])
    torch.testing.assert_close(d.encode(x).to_dense(), codes.to_dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", [None, 1, 2])
@pytest.mark.parametrize("selection", ["topk", "batchtopk", "jumprelu", "relu"])
def test_its_gradient_is_that_of_the_summed_error(
    selection: str, reach: int | None, pairs: torch.Tensor
) -> None:
    options = {"objective": ("reconstruction",)}
    if selection in ("jumprelu", "relu"):
        d = saekit.create("clt", d_in=D, d_out=D_OUT, n_layers=LAYERS, n_features=96, selection=selection, reach=reach, **options)  # fmt: skip
    else:
        d = make(selection=selection, reach=reach, **options)
    d.prepare(pairs)
    batch = pairs[:200]
    loss = d.loss(batch)
    loss.total.backward()
    mine = {name: p.grad.clone() for name, p in d.named_parameters() if p.grad is not None}
    d.zero_grad()
    x, y = d.norm_in(batch[:, : LAYERS * D]).split(D, 1), d.norm_out(batch[:, LAYERS * D :])
    state = TrainState()
    hat = d.b_dec.expand(len(batch), -1)
    for layer, part in enumerate(d.parts):
        codes = part.select(x[layer].contiguous(), state).codes.to_dense()
        first, stop = d.wiring.written(layer)
        behind = (LAYERS - stop) * D_OUT
        hat = hat + torch.nn.functional.pad(codes @ part.W_dec, (first * D_OUT, behind))
    error = (hat - y).square().sum(1).mean()
    torch.testing.assert_close(loss.total, error, rtol=1e-4, atol=1e-4)
    error.backward()
    for name, p in d.named_parameters():
        if p.requires_grad and p.grad is not None:
            torch.testing.assert_close(mine[name], p.grad, rtol=1e-3, atol=1e-4)


def test_of_one_layer_it_is_a_transcoder(pairs: torch.Tensor) -> None:
    rows = torch.cat([pairs[:, :D], pairs[:, LAYERS * D : LAYERS * D + D_OUT]], 1)
    one = make(n_layers=1)
    two = saekit.create("transcoder", d_in=D, d_out=D_OUT, n_features=96, k=9, seed=0)
    for d in (one, two):
        saekit.train(d, rows, steps=30, batch_size=256, lr=2e-3)
    torch.testing.assert_close(one(rows[:, :D]), two(rows[:, :D]), rtol=1e-4, atol=1e-4)


def test_its_layers_are_calibrated_together(pairs: torch.Tensor, tmp_path: Path) -> None:
    d = make()
    saekit.train(d, pairs, steps=60, batch_size=256, lr=3e-3)
    x = pairs[:, : LAYERS * D]
    at = calibrate(d, x, 6)
    assert at.config.selection[0] == "jumprelu" and saekit.metrics.l0(at.encode(x)) == pytest.approx(
        6, rel=1e-3
    )
    saekit.save(at, tmp_path / "at")
    assert torch.equal(saekit.load(tmp_path / "at")(x), at(x))
    y, same = pairs[:, LAYERS * D :], calibrate(d, x, 9)  # as many codes as before, shared out by thresholds
    assert saekit.metrics.fvu(y, same(x)) < 1.2 * saekit.metrics.fvu(y, d(x).detach())


@pytest.mark.slow
def test_it_beats_per_layer_transcoders_where_layers_repeat_each_other(pairs: torch.Tensor) -> None:
    x, y = pairs.split((LAYERS * D, LAYERS * D_OUT), 1)
    d = make()
    saekit.train(d, pairs, steps=200, batch_size=256, lr=3e-3)
    errors = 0.0
    for layer in range(LAYERS):
        one = saekit.create("transcoder", d_in=D, d_out=D_OUT, n_features=32, k=3, seed=layer)
        mine = (x.split(D, 1)[layer], y.split(D_OUT, 1)[layer])
        saekit.train(one, mine, steps=200, batch_size=256, lr=3e-3)
        errors += (one(mine[0]) - mine[1]).square().sum().item()
    assert (d(x) - y).square().sum().item() < errors


def test_codes_of_parts_are_put_together_and_taken_apart() -> None:
    g = torch.Generator().manual_seed(0)
    dense = [torch.rand(7, n, generator=g) * (torch.rand(7, n, generator=g) < 0.4) for n in (5, 3, 4)]
    parts = [Codes.from_dense(d) for d in dense]
    whole = Codes.beside(parts)
    assert torch.equal(whole.to_dense(), torch.cat(dense, 1))
    for (first, stop), d in zip(((0, 5), (5, 8), (8, 12)), dense, strict=True):
        assert torch.equal(whole.part(first, stop).to_dense(), d)


def test_bad_layers_are_refused(pairs: torch.Tensor) -> None:
    for options, words in (
        ({"n_features": 97}, "can't be shared out among 3 layers"),
        ({"k": 8}, "k = 8 can't be shared out among 3 layers"),
        ({"n_layers": 0}, "n_layers = 0 must be at least 1"),
        ({"normalise": "whiten"}, "would mix the layers"),
        ({"atoms": "tied"}, "writes another space"),
        ({"objective": ("reconstruction", "mutual")}, "has one for each layer"),
    ):
        with pytest.raises(SaekitError, match=words):
            make(**options)
    with pytest.raises(SaekitError, match="width 20 is not"):
        saekit.train(make(), pairs[:, :20], steps=1, batch_size=8)
    with pytest.raises(SaekitError, match="is made of parts"):
        prune(make(), torch.ones(96, dtype=torch.bool))
    with pytest.raises(SaekitError, match="expected \\[rows, d_in = 30\\]"):
        calibrate(make(), pairs, 3)
    wiring = make().wiring
    with pytest.raises(SaekitError, match="reads as many hook points as it writes"):
        wiring.sites(["a:in", "b:in", "a:out"])
    with pytest.raises(SaekitError, match="needs layers of one width"):
        wiring.shape([4, 5], [4, 4])
    assert wiring.sites(["blocks.0.mlp", "blocks.1.mlp"])[1] == ("blocks.0.mlp:out", "blocks.1.mlp:out")


def test_layers_go_from_block_to_block(pairs: torch.Tensor) -> None:
    """Found in any order they are put in order; given in another they are refused. Names may say nothing of it."""
    d = make()

    def modules(*layers: int, name: str = "blocks.{}.mlp") -> list[str]:
        return [name.format(layer) for layer in layers]

    def both(*layers: int) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(f"{name}:{side}" for name in modules(*layers)) for side in ("in", "out"))

    for found in (modules(10, 2, 9), [*both(10, 2, 9)[1], *both(9, 10, 2)[0]]):
        assert d.wiring.sites(found) == both(2, 9, 10) == _places(d.wiring, None, None, found)[""]
    assert d.wiring.sites(["b", "a"]) == (("b:in", "a:in"), ("b:out", "a:out"))
    assert d.wiring.sites(["encoder.1", "decoder.0"])[0] == ("encoder.1:in", "decoder.0:in")
    for reads, writes, words in (
        ((1, 0, 2), (0, 1, 2), "blocks.1.mlp:in, .* are not in the order of their blocks"),
        ((0, 1, 2), (0, 2, 1), "blocks.0.mlp:out, .* give blocks.0.mlp:out, blocks.1.mlp:out"),
        ((0, 1, 2), (0, 1, 3), "layer 2 reads 'blocks.2.mlp:in' and writes 'blocks.3.mlp:out'"),
    ):
        d.reads, d.writes = both(*reads)[0], both(*writes)[1]
        with pytest.raises(SaekitError, match=words):
            saekit.train(d, pairs, steps=1, batch_size=8)
    with pytest.raises(SaekitError, match=r"names 'blocks\.1\.mlp:in' before 'blocks\.0\.mlp:in'"):
        _places(d.wiring, "blocks.1.mlp,blocks.0.mlp", None, [])


def test_a_glob_that_skips_a_block_is_refused_and_a_list_may_skip() -> None:
    wiring, known = make().wiring, [f"blocks.{i}.mlp:{side}" for i in (0, 1, 3) for side in ("in", "out")]
    with pytest.raises(SaekitError, match=r"skips 'blocks\.2\.mlp'; harvest it, or name the layers"):
        _places(wiring, None, "blocks.*.mlp", known)
    reads, writes = _places(wiring, "blocks.0.mlp,blocks.1.mlp,blocks.3.mlp", None, known)[""]
    assert (reads, writes) == (tuple(known[::2]), tuple(known[1::2]))
    assert _places(wiring, None, "blocks.[01].mlp", known)[""][0] == tuple(known[:4:2])
    assert _places(wiring, None, "?", ["b", "a"])[""][0] == ("b:in", "a:in")


@pytest.mark.slow  # test_crosscoders runs the command as well
def test_one_command_trains_one_over_all_layers(tmp_path: Path) -> None:
    train = ("train", "clt", "--n-features", "256", "--k", "16", "--steps", "3", "--batch-size", "256")
    done = command(*train, "--hook-points", "blocks.*.mlp", "--out", str(tmp_path / "clt"))
    assert done.returncode == 0, done.stderr
    d = saekit.load(tmp_path / "clt")
    assert d.reads == tuple(f"blocks.{i}.mlp:in" for i in range(4)) and d.n_features == 256
    report = saekit.evaluate(d, "code-lm", "stdlib", tokens=1024)
    assert float(report["l0"]) <= 16 and "random" in report["ce_recovered"].control
    bad = command(*train[:4], "--k", "7", "--hook-points", "blocks.*.mlp", "--out", str(tmp_path / "bad"))
    assert bad.returncode == 2 and "can't be shared out" in bad.stderr and not (tmp_path / "bad").exists()


def test_what_a_step_holds_grows_with_the_layers_and_not_with_their_pairs() -> None:
    held = {}
    for layers in (4, 16):
        d = saekit.create("clt", d_in=32, n_layers=layers, n_features=64 * layers, k=2 * layers, seed=0)
        batch = torch.randn(256, 2 * 32 * layers)
        d.prepare(batch)
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            if tensor.dim() == 2 and len(tensor) == 256:  # dense rows
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with collect(d.parameters()) as factors:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                total = d.loss(batch, TrainState()).total
            total.backward()
        for gradient in factors.values():
            for *_, matrix in gradient.terms:
                keep(matrix)
        held[layers] = sum(seen.values()) / (256 * 4 * 32 * layers)
    assert held[16] == held[4] < 3.2  # inputs, the error, its gradient, and the codes


@pytest.mark.parametrize("selection", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("wiring", ["clt", "crosscoder"])
def test_no_tensor_has_an_entry_for_every_row_and_feature(wiring: str, selection: str) -> None:
    """Of a cross-layer transcoder not even for those of one layer; neither in a step nor in a pass."""
    rows, layers, n_features = 2048, 4, 2048
    shape = {"clt": {"d_in": 8, "n_layers": layers}, "crosscoder": {"d_in": (8,) * layers}}[wiring]
    own = (
        {"selection": "jumprelu", "objective": ("reconstruction", "l0")}
        if selection == "jumprelu"
        else {"selection": selection, "k": 8}
    )
    d = saekit.create(wiring, n_features=n_features, seed=0, **shape, **own)
    x = torch.randn(rows, d.wiring.columns, generator=torch.Generator().manual_seed(0))
    trainer = saekit.Trainer(d, steps=10)
    trainer.step(x)
    with Largest() as largest:
        trainer.step(x)
        with torch.no_grad():
            d(x[:, : layers * 8])
    assert largest.numel < rows * n_features / (layers if wiring == "clt" else 1), largest.numel
