"""Damaged stores, dictionaries, configs and runs: refused in one sentence that names the file, the field and the fix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import POINT, TRAIN, leftovers, refusal
from safetensors.torch import load_file, save_file

import saekit
from saekit.activations import Store
from saekit.types import SaekitError

# damaged stores


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda store: rewrite(store / "manifest.json", change)


def first_shard(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        file = store / "shard-00000.safetensors"
        file.write_bytes(change(bytearray(file.read_bytes())))

    return damage


def flip(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 1
    return data


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A shard whose header says something else, with a manifest that agrees with the file as it is."""

    def damage(store: Path) -> None:
        import hashlib

        file = store / "shard-00000.safetensors"
        data = file.read_bytes()
        n = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + n])
        entries = change(entries) or entries
        text = json.dumps(entries).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + n :]
        file.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        rewrite(store / "manifest.json", lambda m: m["shards"][0].update(bytes=len(data), sha256=digest))

    return damage


STORES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a shard cut short": (first_shard(lambda d: d[:-100]), ["shard-00000.safetensors", "bytes", "truncated"]),
    "a shard with a flipped bit": (first_shard(flip), ["shard-00000.safetensors", "hash"]),
    "a shard gone": (lambda s: (s / "shard-00000.safetensors").unlink(), ["shard-00000.safetensors", "not on disk"]),
    "a manifest with another size": (manifest(lambda m: m["shards"][0].update(bytes=12)), ["shard-00000.safetensors", "the manifest says 12"]),
    "a manifest with another hash": (manifest(lambda m: m["shards"][0].update(sha256="0" * 64)), ["shard-00000.safetensors", "hash"]),
    "a manifest with another width": (manifest(lambda m: m["hook_points"][POINT].update(width=33)), ["shard-00000.safetensors", POINT]),
    "a manifest with another hook point": (manifest(lambda m: m["hook_points"].update(x={"width": 3})), ["shard-00000.safetensors", "'x'"]),
    "a manifest with more tokens": (manifest(lambda m: m["shards"][0].update(tokens=99999)), ["shard-00000.safetensors", POINT]),
    "a manifest that is no JSON": (lambda s: (s / "manifest.json").write_text('{"schema": 1'), ["manifest.json", "not a store's manifest"]),
    "a manifest that is a list": (lambda s: (s / "manifest.json").write_text("[1]"), ["manifest.json", "not a store's manifest"]),
    "a manifest that is not text": (lambda s: (s / "manifest.json").write_bytes(b"\xff\xfe\x00"), ["manifest.json", "not a store's manifest"]),
    "a manifest of another schema": (manifest(lambda m: m.update(schema=99)), ["manifest.json", "schema 99", "reads 1"]),
    "a manifest without a field": (manifest(lambda m: m.pop("dtype")), ["manifest.json", "lacks", "'dtype'"]),
    "a shard entry without a field": (manifest(lambda m: m["shards"][0].pop("sha256")), ["manifest.json", "lacks", "'sha256'"]),
    "a shard outside the store": (manifest(lambda m: m["shards"][0].update(file="../text.py")), ["manifest.json", "outside the store"]),
    "a manifest without shards": (manifest(lambda m: m.update(shards=[])), ["store", "no finished shard"]),
    "a manifest gone": (lambda s: (s / "manifest.json").unlink(), ["store", "no manifest.json"]),
    "a header that is no JSON": (first_shard(lambda d: d[:8] + b"x" + d[9:]), ["shard-00000.safetensors", "not a safetensors file"]),
    "a header of absurd length": (first_shard(lambda d: b"\xff" * 8 + d[8:]), ["shard-00000.safetensors", "not a safetensors file"]),
    "a header that is a list": (header(lambda h: [1]), ["shard-00000.safetensors", "not a safetensors file"]),
    "a header with an unknown dtype": (header(lambda h: h["mask"].update(dtype="F1")), ["shard-00000.safetensors", "not a safetensors file"]),
    "a header with offsets beyond the file": (header(lambda h: h["mask"].update(data_offsets=[0, 10**12])), ["shard-00000.safetensors", "not a safetensors file"]),
    "a header with another shape": (header(lambda h: h["mask"].update(shape=[1, 2, 3])), ["shard-00000.safetensors", "not a safetensors file"]),
    "a header without the mask": (header(lambda h: {k: v for k, v in h.items() if k != "kept"}), ["shard-00000.safetensors", "'kept'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", STORES)
def test_a_damaged_store_is_refused_in_one_sentence(
    case: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = STORES[case]
    damage(here / "store")
    out = tmp_path / "out"
    argv = [part.format(here=here, out=out, good="") for part in TRAIN]
    said = refusal(argv, monkeypatch, capfd)
    for word in words:
        assert word in said, (word, said)
    assert leftovers(out) == []
    with pytest.raises(SaekitError) as caught:
        Store(here / "store")
    assert str(caught.value) == said
    if (here / "store" / "manifest.json").exists():
        assert said == refusal(["doctor", str(here / "store")], monkeypatch, capfd)


def test_a_store_that_is_intact_is_read(here: Path) -> None:
    header(lambda h: h)(here / "store")  # the tool that damages headers does no other damage
    assert Store(here / "store").n_rows > 3000


# damaged dictionaries


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        state = load_file(run / "dictionary.safetensors")
        change(state)
        save_file(state, run / "dictionary.safetensors")

    return damage


def card(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda run: rewrite(run / "card.json", change)


DICTIONARIES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a tensor missing": (tensors(lambda t: t.pop("b_dec")), ["lacks the tensor", "'b_dec'"]),
    "a tensor too many": (tensors(lambda t: t.update(b_dce=torch.zeros(32))), ["unknown tensor", "'b_dce'", "'b_dec'"]),
    "a tensor of another shape": (tensors(lambda t: t.update(b_dec=torch.zeros(31))), ["'b_dec'", "(31,)", "(32,)"]),
    "a tensor of another dtype": (tensors(lambda t: t.update(b_dec=torch.zeros(32).half())), ["'b_dec'", "float16", "float32"]),
    "a tensor with NaN": (tensors(lambda t: t["encoder"][3].fill_(float("nan"))), ["'encoder'", "NaN or Inf"]),
    "a tensor with Inf": (tensors(lambda t: t["atoms.weight"][3, 0].fill_(float("inf"))), ["'atoms.weight'", "NaN or Inf"]),
    "a file that is not safetensors": (lambda r: (r / "dictionary.safetensors").write_text("not this"), ["dictionary.safetensors", "not an intact safetensors file"]),
    "an empty file": (lambda r: (r / "dictionary.safetensors").write_bytes(b""), ["dictionary.safetensors", "not an intact safetensors file"]),
    "a file cut short": (lambda r: (r / "dictionary.safetensors").write_bytes((r / "dictionary.safetensors").read_bytes()[:-9]), ["dictionary.safetensors", "not an intact safetensors file"]),
    "a pickle": (lambda r: torch.save({"b_dec": torch.zeros(32)}, r / "dictionary.safetensors"), ["dictionary.safetensors", "not an intact safetensors file"]),
    "the tensors gone": (lambda r: (r / "dictionary.safetensors").unlink(), ["dictionary.safetensors", "is not there"]),
    "the card gone": (lambda r: (r / "card.json").unlink(), ["no card.json"]),
    "a card that is no JSON": (lambda r: (r / "card.json").write_text("{"), ["card.json", "not a dictionary's card"]),
    "a card that is a list": (lambda r: (r / "card.json").write_text("[]"), ["card.json", "not a dictionary's card"]),
    "a card of another schema": (card(lambda c: c.update(schema=7)), ["card.json", "schema 7", "reads 1"]),
    "a card without a field": (card(lambda c: c.pop("config")), ["card.json", "lacks", "'config'"]),
    "a card with a config of another kind": (card(lambda c: c.update(config="topk")), ["config = 'topk'", "card.json", "dict"]),
    "a card with hook points of another kind": (card(lambda c: c.update(reads=None)), ["reads = None", "card.json", "list"]),
    "a card with numbers for hook points": (card(lambda c: c.update(reads=[3])), ["reads[0] = 3", "card.json", "str"]),
    "a card without data": (card(lambda c: c.update(data=None)), ["data = None", "card.json", "dict"]),
    "a card with an odd model": (card(lambda c: c["data"].update(model=[1])), ["data.model = [1]", "card.json", "dict"]),
    "a config without a field": (card(lambda c: c["config"].pop("n_features")), ["lacks", "'n_features'"]),
    "a config with a field too many": (card(lambda c: c["config"].update(n_featurse=3)), ["'n_featurse'", "unknown"]),
    "a config with an unknown choice": (card(lambda c: c["config"]["selection"].update(name="topkk")), ["selection", "'topkk'", "'topk'", "import its module"]),
    "a config with an unknown option": (card(lambda c: c["config"]["selection"].update(kk=3)), ["selection", "'kk'", "'k'"]),
    "a config with k above n_features": (card(lambda c: c["config"]["selection"].update(k=65)), ["k = 65", "n_features = 64"]),
    "a config with words for numbers": (card(lambda c: c["config"].update(n_features="many")), ["card.json"]),
    "a config with an option of another type": (card(lambda c: c["config"]["selection"].update(k=[4])), ["k = [4]", "selection", "int"]),
    "a config with a choice that is no mapping": (card(lambda c: c["config"].update(wiring="autoencoder")), ["card.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DICTIONARIES)
def test_a_damaged_dictionary_is_refused_in_one_sentence(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = DICTIONARIES[case]
    damage(here / "run")
    said = refusal(["eval", str(here / "run")], monkeypatch, capfd)
    for word in words:
        assert word in said, (word, said)
    with pytest.raises(SaekitError) as caught:
        saekit.load(here / "run")
    assert str(caught.value) == said
    assert not (here / "run" / "eval.json").exists()


# configurations


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(trian={}), ["key", "'trian'", "'train'"]),
        (lambda c: c["train"].update(stpes=5), ["key", "'train.stpes'", "'steps'"]),
        (lambda c: c["train"].update(lr=-1.0), ["lr = -1", "above 0"]),
        (lambda c: c.pop("dictionary"), ["config.json", "lacks the field", "'dictionary'"]),
        (lambda c: c["dictionary"]["selection"].update(kk=1), ["selection", "'kk'", "'k'"]),
        (lambda c: c.update(source={}), ["tensor in memory", "from Python"]),
        (lambda c: c.update(train=5), ["config.json", "train = 5", "expected dict"]),
        (lambda c: c["train"].update(warmup="5"), ["train.warmup = '5'", "int"]),
        (lambda c: c["train"].update(steps=True), ["train.steps = True", "int"]),
        (lambda c: c["source"].update(outlier="high"), ["config.json", "source.outlier = 'high'", "float"]),
        (lambda c: c.update(init_seed="5"), ["config.json", "init_seed = '5'", "expected int"]),
        (lambda c: c.update(hook_points=5), ["config.json", "hook_points = 5", "expected list"]),
        (lambda c: c.update(hook_points=[5]), ["config.json", "hook_points[0] = 5", "expected str"]),
        (lambda c: c["source"].update(acts=5), ["config.json", "source.acts = 5", "expected str"]),
        (lambda c: c.update(source={"model": "code-lm"}), ["tensor in memory", "from Python"]),
        (lambda c: c.update(dictionary=None), ["config.json", "dictionary = None", "expected dict"]),
        (
            lambda c: c["dictionary"]["wiring"].update(name=5),
            ["dictionary's config", "wiring.name = 5", "expected str"],
        ),
        (
            lambda c: c["dictionary"].update(objective=[5]),
            ["dictionary's config", "objective[0] = 5", "expected dict"],
        ),
        (lambda c: c["source"].update(acts="/no/store"), ["store", "'/no/store'", "manifest.json"]),
    ],
)
def test_a_config_with_something_wrong_is_refused_in_one_sentence(
    change: Callable[[dict[str, Any]], Any],
    words: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rewrite(here / "run" / "config.json", change)
    out = here / "out"
    said = refusal(
        ["train", "--config", str(here / "run" / "config.json"), "--out", str(out)], monkeypatch, capfd
    )
    for word in words:
        assert word in said, (word, said)
    assert leftovers(out) == []


@pytest.mark.parametrize("text", ["{", "[1]", "null", ""])
def test_a_config_that_is_none_is_refused_in_one_sentence(
    text: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "run" / "config.json").write_text(text)
    said = refusal(
        ["train", "--config", str(here / "run" / "config.json"), "--out", str(here / "out")],
        monkeypatch,
        capfd,
    )
    assert "config" in said and "is not a run's config" in said


def test_other_files_of_a_run_are_checked_field_by_field(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, log = here / "run", here / "run" / "log.jsonl"
    about = {"tokens": 1, "documents": 1, "split": "all", "hook_point": POINT, "ablation": "zero"}
    about |= {"text": {"name": "x"}, "model": {"name": "x"}}
    density = {"value": ["a"], "n": 1, "unit": "1", "interval": None, "control": {}}
    odd = {"about": about, "measures": {"density": density}}
    for text, words in (
        ("[]", ["eval.json", "is not an evaluation"]),
        ('{"about": {}}', ["eval.json", "lacks the field", "'tokens'"]),
        ('{"about": 3}', ["eval.json", "about = 3"]),
        (json.dumps(odd), ["density", "eval.json"]),
    ):
        (run / "eval.json").write_text(text)
        said = refusal(["dashboard", str(run), "--model", str(here / "model")], monkeypatch, capfd)
        assert all(word in said for word in words), said
    (run / "eval.json").unlink()
    (run / "config.json").write_text("{}")
    for argv in (
        ["dashboard", str(run), "--model", str(here / "model")],
        [part.format(here=here, out=run, good=here) for part in TRAIN],
    ):
        said = refusal(argv, monkeypatch, capfd)
        assert "config.json" in said and "lacks the field" in said
    (run / "card.json").unlink()
    said = refusal(["doctor", str(run)], monkeypatch, capfd)
    assert "config.json" in said and "lacks the field" in said
    assert log.exists()


def test_a_finished_run_without_its_log_is_still_finished(here: Path) -> None:
    (here / "run" / "log.jsonl").unlink()
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    done = saekit.train(dictionary, here / "store", steps=2, batch_size=64, out=here / "run")
    assert done.finished and done.metrics == {}


def test_what_cannot_be_saved_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    good, other, wide = (saekit.create("topk", d_in=8, n_features=16, k=2, seed=seed) for seed in range(3))
    saekit.save(good, tmp_path / "d")
    other.card["metrics"] = {"fvu": torch.tensor(0.1)}
    wide = wide.double()
    assert wide.to_inference().dtype == torch.float64
    refused: list[tuple[Any, str]] = [
        (other, "card holds what no JSON can"),
        (wide, "of float64, .* save dictionary.float"),
        ([good], "is of type list"),
    ]
    for bad, words in refused:
        with pytest.raises(SaekitError, match=words):
            saekit.save(bad, tmp_path / "d")
    x = torch.randn(5, 8)
    assert torch.equal(saekit.load(tmp_path / "d")(x), good(x))
    with pytest.raises(SaekitError, match="device 'nodevice' can't be used here"):
        saekit.load(tmp_path / "d", device="nodevice")
    with pytest.raises(SaekitError, match="path is of type int"):
        saekit.load(5)  # type: ignore[arg-type]


def test_a_state_of_another_kind_is_a_damaged_checkpoint(here: Path) -> None:
    newest = max((here / "run" / "checkpoints").iterdir())
    (newest / "state.json").write_text("[]")
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    with pytest.warns(UserWarning, match="is damaged"):
        saekit.train(dictionary, here / "store", steps=2, batch_size=64, out=here / "run")


def test_an_unfinished_store_says_so(here: Path, tmp_path: Path) -> None:
    rewrite(here / "store" / "manifest.json", lambda m: m.update(complete=False))
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    with pytest.warns(UserWarning, match="unfinished"):
        saekit.train(dictionary, here / "store", steps=1, batch_size=64)
