"""Laws of low-rank sparse attention: what it computes, what it begins from, where its features look."""

import itertools
from pathlib import Path

import pytest
import torch
from commandline import saekit as command
from families import FAMILIES, model
from torch import Tensor

import saekit
from saekit.contract import CONTRACT
from saekit.dictionaries import Dictionary
from saekit.harvest import SequenceSource
from saekit.layers import attention
from saekit.models import load_model
from saekit.types import ActivationBatch, SaekitError

SMALL = {"d_in": 16, "d_out": 12, "n_qk": 2, "d_qk": 4}
KINDS = {
    "learned positions": {},
    "rotary": {"rotary": 4, "rotary_pairs": "neighbours"},
    "grouped keys and norms": {"n_qk": 4, "n_kv": 2, "qk_norm": True, "rotary": 2},
    "window": {"window": 3},
}  # fmt: skip


def make(name: str = "lorsa", **options) -> Dictionary:
    return saekit.create(name, wiring="lorsa", **{"n_features": 64, "k": 4, **SMALL, **options})


def sequences(n: int = 80, seq: int = 8, seed: int = 0) -> Tensor:
    """Inputs with offset, and outputs that depend on earlier positions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, seq, 16, generator=g) + 3 * torch.randn(16, generator=g)
    past = x.cumsum(1) / torch.arange(1, seq + 1)[:, None]
    return torch.cat([x, past[..., :12].abs() + 5], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_heads_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    """What needs a long training is shown for the preset, and other selections by pairs (test_combinations)."""
    for law in set(CONTRACT) - {"training_helps", "recovers_planted_features"}:
        (tmp_path / law).mkdir()
        CONTRACT[law](lambda: make(**KINDS[kind]), sequences(), tmp_path / law)


def test_calibration_gives_the_wanted_l0_exactly() -> None:
    d, rows = make("gated"), sequences()
    d.prepare(d.gather([rows]))
    x = rows[..., :16]
    got = saekit.calibrate(d, x, 7.5)
    codes = got.encode(x)
    assert got.config.selection[0] == "jumprelu" and len(codes.values) == round(7.5 * 80 * 8)
    with pytest.raises(SaekitError, match=r"expected .batch, seq, d_in = 16"):
        saekit.calibrate(d, x.flatten(0, 1), 4)


def test_codes_are_those_of_the_paper() -> None:
    """``z = A (x w + b)`` of each feature's own head (2504.20938), before the selection."""
    d = make("relu", normalise="none")
    d.b_enc.data.normal_()
    x = sequences()[:5, :, :16]
    patterns = d.wiring.patterns(x)
    values = torch.einsum("bsi,if->bsf", x, d.W_enc) + d.b_enc
    mine = torch.stack([patterns[:, f // 32] @ values[..., f, None] for f in range(64)], -1)[..., 0, :]
    torch.testing.assert_close(d.encode(x).to_dense(), mine.relu(), rtol=1e-4, atol=1e-5)


def test_sources_add_up_to_the_pre_activation() -> None:
    d = make("relu")
    d.prepare(d.gather([sequences()]))
    d.b_enc.data.normal_()
    x, chosen = sequences()[:5, :, :16], torch.tensor([3, 40, 63])
    sources = d.sources(x, chosen)
    assert sources.shape == (5, 3, 8, 8) and sources.triu(1).abs().max() == 0
    codes = d.encode(x).select(chosen).movedim(-1, 1)
    torch.testing.assert_close(sources.sum(-1).relu(), codes, rtol=1e-4, atol=1e-5)
    rows, at = torch.tensor([4, 0, 4]), torch.tensor([7, 2, 3])
    found = d.looking(x)(chosen, rows, at)
    torch.testing.assert_close(found, sources[rows, torch.arange(3), at], rtol=1e-4, atol=1e-5)


def test_masked_positions_are_looked_at_and_not_learned_from() -> None:
    d, rows = make("topk"), sequences()[:6]
    d.prepare(d.gather([rows]))
    d.reads, d.writes = ("x",), ("y",)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 0] = False
    batch = ActivationBatch({"x": rows[..., :16], "y": rows[..., 16:]}, mask)
    codes = d.codes_of(batch)
    assert codes.rows == 6 * 7
    torch.testing.assert_close(codes.to_dense(), d.encode(rows[..., :16]).to_dense()[:, 1:].flatten(0, 1))
    other = rows.clone()
    other[:, 0, :16] *= 3
    looked = d.codes_of(ActivationBatch({"x": other[..., :16], "y": rows[..., 16:]}, mask))
    assert not torch.equal(looked.to_dense(), codes.to_dense())
    other = rows.clone()
    other[:, 0, 16:] = 1e6  # the target of a masked position
    base = d.loss(batch).total
    torch.testing.assert_close(
        d.loss(ActivationBatch({"x": rows[..., :16], "y": other[..., 16:]}, mask)).total, base
    )


@pytest.fixture(scope="module")
def layer():
    return attention(load_model("code-lm"), "blocks.1.attn")


@pytest.mark.parametrize("case", ["code-lm", *FAMILIES])
def test_an_attention_layer_is_a_lorsa_of_signed_pairs(case: str) -> None:
    """With a feature for each sign of each dimension of each head, and all of them on, the layer itself."""
    m = load_model("code-lm") if case == "code-lm" else model(*FAMILIES[case])
    layer = attention(m, m.site("blocks.1.hook_attn_out").path)
    heads, d_head = len(layer.W_O), layer.W_V.shape[1]
    n = 2 * heads * d_head
    d = saekit.create(
        "lorsa",
        attention=layer,
        n_features=n,
        k=n,
        normalise="none",
        atoms="free",
        objective=("reconstruction",),
    )
    with torch.no_grad():
        W_V, b_V = (v.repeat_interleave(heads // len(v), 0) for v in (layer.W_V, layer.b_V))  # shared ones
        read = torch.cat([W_V, -W_V], 1)
        write = torch.cat([layer.W_O, -layer.W_O], 2).movedim(2, 1)
        d.encoder.copy_(read.flatten(0, 1))
        d.b_enc.copy_(torch.cat([b_V, -b_V], 1).flatten())
        d.atoms.weight.copy_(write.flatten(0, 1))
        d.b_dec.copy_(layer.b_O)
    x = torch.randn(3, 40, d.d_in, generator=torch.Generator().manual_seed(0)) + 1
    error = (d(x) - layer(x)).norm() / layer(x).norm()
    assert error < 1e-4, error


def test_it_begins_where_the_layer_looks_and_writes(layer) -> None:
    """Copied heads look alike whatever the normalisation, and random value directions already explain much."""
    x = torch.randn(12, 50, 256, generator=torch.Generator().manual_seed(0)) + 1
    rows = torch.cat([x, layer(x)], -1)
    d = saekit.create("lorsa", attention=layer, n_features=1024, k=256, n_qk=16)
    assert torch.equal(d.wiring.patterns(x)[:, ::2], layer.patterns(x))
    assert len(d.wiring.patterns.W_K) == 16  # copies of a head may learn keys of their own
    d.prepare(d.gather([rows]))
    looked = d.wiring.patterns(d.norm_in(x.flatten(0, 1)).view(x.shape))
    torch.testing.assert_close(looked[:, 1::2], layer.patterns(x), rtol=1e-3, atol=1e-5)
    fresh = saekit.create("lorsa", d_in=256, n_features=1024, k=256, n_qk=16, d_qk=32)
    fresh.prepare(fresh.gather([rows]))
    begun, random = (one.loss(rows).fvu.item() for one in (d, fresh))
    assert begun < 0.5 < random, (begun, random)


@pytest.mark.parametrize("selection", ["topk", "batchtopk", "jumprelu", "gated", "relu", "groupmax"])
def test_it_begins_at_the_scale_that_fits_best(layer, selection: str) -> None:
    """Twice or half the encoder explains no more, by the rule of training."""
    x = torch.randn(12, 50, 256, generator=torch.Generator().manual_seed(0)) + 1
    rows, k = (
        torch.cat([x, layer(x)], -1),
        {"k": 256} if selection in ("topk", "batchtopk", "groupmax") else {},
    )
    d = saekit.create(
        "lorsa",
        attention=layer,
        n_features=1024,
        selection=selection,
        objective=("reconstruction", *(["gate"] if selection == "gated" else [])),
        **k,
    )
    d.prepare(d.gather([rows]))
    found = {}
    for scale in (1.0, 0.5, 2.0):
        d.encoder.data.mul_(scale)
        found[scale] = d.loss(rows).fvu.item()
        d.encoder.data.div_(scale)
    assert found[1.0] < min(found[0.5], found[2.0]), found


def test_what_it_cannot_be_is_refused(layer, small_store) -> None:
    for options, word in (
        ({"n_qk": 3, "n_features": 66, "n_kv": 2}, "n_kv = 2 does not divide n_qk = 3"),
        ({"n_features": 63}, "n_features = 63 can't be shared out among n_qk = 2"),
        ({"rotary": 3}, "rotary = 3 must be an even number"),
        ({"selection": "pursuit", "objective": ("reconstruction",)}, "attention stands between"),
    ):
        with pytest.raises(SaekitError, match=word):
            make("topk", **options)
    with pytest.raises(SaekitError, match="has no heads"):
        saekit.create("topk", attention=layer, n_features=64, k=4)
    with pytest.raises(SaekitError, match="n_qk = 12 is no multiple of the layer's 8 heads"):
        saekit.create("lorsa", attention=layer, n_features=96, k=4, n_qk=12)
    with pytest.raises(SaekitError, match=r"saekit.layers.attention\(model, hook_point\)"):
        saekit.create("lorsa", attention="blocks.1.attn", n_features=64, k=4)
    d = make()
    with pytest.raises(SaekitError, match=r"features name 99, which is not in 0\.\.63"):
        d.sources(sequences()[..., : d.d_in], torch.tensor([1, 99]))
    with pytest.raises(SaekitError, match=f"expected .batch, seq, d_in = {d.d_in}"):
        d.sources(sequences(), torch.tensor([1]))
    with pytest.raises(SaekitError, match="whole sequences"):
        saekit.train(make(), sequences().flatten(0, 1), 2, 4)
    with pytest.raises(SaekitError, match="resample_every"):
        saekit.train(make(), sequences(), 2, 4, resample_every=1)


def test_stored_computed_and_given_sequences_train(tiny_gpt2, tmp_path: Path) -> None:
    """A store's sequences and a model's are the same, and train the same dictionary."""
    points = ["transformer.h.1.attn:in", "transformer.h.1.attn:out"]
    options = {"tokens": 4096, "context": 32}
    store = saekit.harvest(tiny_gpt2, "stdlib", points, out=tmp_path / "acts", **options)
    stream = saekit.harvest(tiny_gpt2, "stdlib", points, **options)
    layer = attention(tiny_gpt2, "transformer.h.1.attn")
    found = []
    for source in (store, stream):
        d = saekit.create("lorsa", attention=layer, n_features=128, k=8)
        run = saekit.train(d, source, 30, 16, lr=1e-3)
        assert run.finished and d.reads == (points[0],) and run.metrics["fvu"] < 0.5
        found.append(d)
    for mine, theirs in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_sequences_of_a_long_text_are_mixed_in_a_pool(tiny_gpt2) -> None:
    """None comes twice while the text lasts, none far before its place, and it resumes where it was."""
    stream = saekit.harvest(
        tiny_gpt2, "stdlib", ["blocks.0.attn:in"], tokens=64 * 40, context=64, batch_rows=4
    )
    whole, pooled = SequenceSource(stream), SequenceSource(stream, pool=64 * 12)
    assert whole.n_rows == 40 and pooled.n_rows is None
    rows = torch.cat([batch.tokens for _, batch in stream.inputs()])
    place = {tuple(row.tolist()): i for i, row in enumerate(rows)}
    order = [
        [place[tuple(row.tolist())] for row in batch.tokens]
        for batch in itertools.islice(pooled.batches((), 3, seed=1), 13)
    ]
    flat = [i for batch in order for i in batch]
    assert len(set(flat[:24])) == 24 and flat[:24] != sorted(flat[:24])
    assert all(i <= at + 16 for at, i in enumerate(flat[:24]))  # of the pool, and of a forward pass's rows
    assert len(set(flat)) > 30  # the whole text, from its beginning again where it ends
    again = next(pooled.batches((), 3, seed=1, start=9)).tokens
    assert [place[tuple(row.tolist())] for row in again] == order[9]
    batch = next(pooled.batches(["blocks.0.attn:in"], 3, seed=1))
    assert batch.activations["blocks.0.attn:in"].shape == (3, 64, 32)


def test_the_command_trains_one_for_every_attention_layer(tmp_path: Path) -> None:
    acts, out = tmp_path / "acts", tmp_path / "set"
    points = ("--hook-point", "blocks.[01].attn:in", "--hook-point", "blocks.[01].attn:out")
    done = command("harvest", "code-lm", *points, "--tokens", "4096", "--context", "64", "--out", str(acts))
    assert done.returncode == 0, done.stderr
    train = (
        "train",
        "lorsa",
        "--acts",
        str(acts),
        "--n-features",
        "64",
        "--k",
        "4",
        "--steps",
        "3",
        "--lr",
        "1e-4",
    )
    done = command(
        *train, "--hook-points", "blocks.*.attn", "--batch-size", "4", "--out", str(out), "--control"
    )
    assert done.returncode == 0, done.stderr
    d = saekit.load(out / "blocks.1.attn")
    assert d.reads == ("blocks.1.attn:in",) and d.n_qk == 8 and not d.wiring.natural
    page = saekit.dashboard(out / "blocks.1.attn", tmp_path / "page.html", tokens=2048).read_text()
    assert '"strongest": [' in page or '"strongest":[' in page
    done = command("dashboard", str(out))
    assert done.returncode == 2 and "folder of dictionaries" in done.stderr and "blocks.0.attn" in done.stderr
    report = saekit.evaluate(d, "code-lm", "stdlib", tokens=1024)
    assert report.about["context"] == 64  # as it was trained: patterns depend on what stands before
    assert float(report["l0"]) <= 4 and float(report["fvu"]) < float(report["fvu"].control["random"])
    again = command(
        "train", "--config", str(out / "blocks.1.attn" / "config.json"), "--out", str(tmp_path / "again")
    )
    assert again.returncode == 0, again.stderr
    files = [p / "dictionary.safetensors" for p in (out / "blocks.1.attn", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for bad, words in (
        (("--hook-point", "blocks.1.attn", "--batch-size", "65"), "holds 64 sequences"),
        (("--hook-point", "blocks.1.mlp"), "is not in store"),
    ):
        done = command(*train, *bad, "--out", str(tmp_path / "bad"))
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "bad").exists()


def test_padding_before_text_is_refused_and_masked_text_is_not(layer, tmp_path: Path) -> None:
    """A Lorsa looks at every position of a row from the first, so what comes before text has to be text."""
    point, options = "blocks.1.attn", {"steps": 2, "batch_size": 4}
    tokens = torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0  # special: left out by the mask, and looked at
    real = torch.ones_like(tokens)
    for side, padding in (("right", slice(9, None)), ("left", slice(0, 3))):
        real[:] = 1
        real[5:, padding] = 0
        given = {"input_ids": tokens, "attention_mask": real.clone()}
        stream = saekit.harvest("code-lm", given, [f"{point}:in", f"{point}:out"])
        store = saekit.harvest("code-lm", given, [f"{point}:in", f"{point}:out"], out=tmp_path / side)

        def fresh() -> Dictionary:
            return saekit.create("lorsa", attention=layer, n_features=64, k=4)

        for source in (stream, store):
            d = fresh()
            if side == "right":
                saekit.train(d, source, **options)
                assert saekit.evaluate(d, "code-lm", given)["fvu"].n == 8 * 11 - 3 * 3
            else:
                with pytest.raises(SaekitError, match=r"padding before text \(row [567]\).*pad on the right"):
                    saekit.train(d, source, **options)
        if side == "left":
            d = fresh()
            d.reads, d.writes = (f"{point}:in",), (f"{point}:out",)
            for dictionaries in (d, [d]):
                with pytest.raises(SaekitError, match=r"padding before text \(row 5\)"):
                    saekit.evaluate(dictionaries, "code-lm", given)
            rows = saekit.create("transcoder", d_in=256, d_out=256, n_features=64, k=4)
            saekit.train(rows, store, **options)  # rows stand by themselves
