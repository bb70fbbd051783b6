"""Bad input: one sentence that names the field, the value and the fix; exit code 2; nothing half-written; under 5 s."""

import contextlib
import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit.activations import Store
from saekit.cli import main
from saekit.harvest import harvest
from saekit.models import Model, load_model
from saekit.types import SaekitError

POINT = "blocks.1.hook_resid_post"
LIMIT = 5.0  # seconds
WRITTEN = (
    "manifest.json",
    "config.json",
    "card.json",
    "dictionary.safetensors",
    "log.jsonl",
    "checkpoints",
    "eval.json",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on two threads wait for each other, for milliseconds where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def good(tiny_gpt2: Model, small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good input: ``model``, ``store``, ``run`` (with its dictionary) and ``text.py``."""
    root = tmp_path_factory.mktemp("good")
    tiny_gpt2.module.save_pretrained(root / "model")
    tiny_gpt2.tokenizer.save_pretrained(root / "model")
    shutil.copytree(small_store.path, root / "store")
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    saekit.train(dictionary, root / "store", steps=2, batch_size=64, out=root / "run")
    nan = copy.deepcopy(tiny_gpt2.module)
    nan.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    harvest(
        load_model(nan, tokenizer=tiny_gpt2.tokenizer, name="nan"),
        "stdlib",
        POINT,
        out=root / "nan_store",
        tokens=512,
        context=64,
    )
    saekit.save(saekit.create("topk", d_in=16, n_features=64, k=4), root / "narrow")
    (root / "text.py").write_text("import os\n" * 50)
    (root / "long.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(1500)))
    (root / "empty.py").write_text("")
    (root / "blank.py").write_text("\n \n")
    (root / "empty_folder").mkdir()
    (root / "pictures").mkdir()
    (root / "pictures" / "a.png").write_bytes(b"\x89PNG\xff\xfe\xfa")
    (root / "latin.py").write_bytes("é".encode("latin-1") * 9)
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "numbers.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    return root


@pytest.fixture
def here(good: Path, tmp_path: Path) -> Path:
    """A copy of the good input that a test may damage (the model is shared)."""
    for name in ("store", "run", "nan_store", "narrow"):
        shutil.copytree(good / name, tmp_path / name)
    for path in good.iterdir():
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def refusal(argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command line refuses; everything else about a refusal is checked."""
    monkeypatch.setattr(sys, "argv", ["saekit", *argv])
    capfd.readouterr()
    began = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        main()
    seconds = time.monotonic() - began
    out, err = capfd.readouterr()
    assert exit_.value.code == 2, (out, err)
    return sentence(out, err, seconds)


def sentence(out: str, err: str, seconds: float) -> str:
    """The text of an error that is one line, on stderr, in time."""
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert seconds < LIMIT, (seconds, err)
    assert "Traceback" not in err
    return err.removeprefix("error: ").strip()


def leftovers(folder: Path) -> list[str]:
    """What a store or a run would have left in a folder."""
    return (
        [p.name for p in folder.rglob("*") if p.name in WRITTEN or p.suffix in (".safetensors", ".tmp")]
        if folder.is_dir()
        else []
    )


HARVEST = [
    "harvest",
    "{good}/model",
    "{good}/text.py",
    "--split",
    "all",
    "--hook-point",
    POINT,
    "--out",
    "{out}",
]
TRAIN = [
    "train",
    "topk",
    "--acts",
    "{here}/store",
    "--n-features",
    "64",
    "--k",
    "4",
    "--batch-size",
    "64",
    "--steps",
    "2",
    "--out",
    "{out}",
]
EVAL = ["eval", "{here}/run", "--model", "{good}/model", "--tokens", "128"]
CONFIG = ["train", "--config", "{here}/config.json", "--out", "{out}"]


def swap(argv: list[str], *changes: str) -> list[str]:
    """A command with some of its words replaced: old, new, old, new, ...; an old of "" adds a word."""
    argv = list(argv)
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        if old:
            argv[argv.index(old)] = new
        else:
            argv.append(new)
    return argv


# command, and words that the sentence holds: the field, the value, the fix
WRONG: dict[str, tuple[list[str], list[str]]] = {
    # models
    "a model path that is not there": (swap(HARVEST, "{good}/model", "./nosuch"), ["model", "./nosuch", "config.json"]),
    "a model folder without a config": (swap(HARVEST, "{good}/model", "{good}/empty_folder"), ["model", "empty_folder", "config.json"]),
    "a model name that is no id": (swap(HARVEST, "{good}/model", "a/b/c"), ["model", "'a/b/c'", "hub id"]),
    "an unknown hub id": (swap(HARVEST, "{good}/model", "nosuch/model"), ["model", "'nosuch/model'", "HF_HUB_OFFLINE is set", "local path"]),
    "a package that is not installed": (swap(HARVEST, "{good}/model", "package:nosuch"), ["'package:nosuch'", "pip install"]),
    # hook points
    "a misspelt hook point": (swap(HARVEST, POINT, "blocks.1.hook_resid_pots"), ["hook point", "'blocks.1.hook_resid_pots'", "'blocks.1.hook_resid_post'"]),
    "a layer that is not there": (swap(HARVEST, POINT, "transformer.h.7.mlp"), ["'transformer.h.7.mlp'", "'transformer.h.1.mlp'"]),
    "a glob that matches nothing": (swap(HARVEST, POINT, "blocks.*.hook_x"), ["'blocks.*.hook_x'", "matches nothing"]),
    "no hook point": (["harvest", "{good}/model", "{good}/text.py", "--out", "{out}"], ["hook_points is empty", "blocks."]),
    # texts
    "a text that is not there": (swap(HARVEST, "{good}/text.py", "/no/such.txt"), ["'/no/such.txt'", "no such file or folder"]),
    "a text id that is not there": (swap(HARVEST, "{good}/text.py", "nosuch/text"), ["'nosuch/text'", "HF_HUB_OFFLINE is set"]),
    "an empty file": (swap(HARVEST, "{good}/text.py", "{good}/empty.py"), ["text", "empty.py", "is empty", "give a text"]),
    "a blank file": (swap(HARVEST, "{good}/text.py", "{good}/blank.py"), ["text", "blank.py", "is empty", "give a text"]),
    "an empty folder": (swap(HARVEST, "{good}/text.py", "{good}/empty_folder"), ["text", "empty_folder", "is empty", "give a text"]),
    "a folder without text": (swap(HARVEST, "{good}/text.py", "{good}/pictures"), ["text", "pictures", "is empty", "give a text"]),
    "a text that is not UTF-8": (swap(HARVEST, "{good}/text.py", "{good}/latin.py"), ["text", "latin.py", "UTF-8"]),
    "a data set that cannot be read": (swap(HARVEST, "{good}/text.py", "{good}/broken.jsonl"), ["dataset", "broken.jsonl", "can't be read"]),
    "a data set without text": (swap(HARVEST, "{good}/text.py", "{good}/numbers.jsonl"), ["dataset", "numbers.jsonl", "no text column", "columns are n"]),
    "a text whose side of the split is empty": (swap(HARVEST, "all", "held_out"), ["'held_out' side", "split='all'"]),
    # settings of a harvest
    "an unknown dtype": (swap(HARVEST, "", "--dtype", "", "fp61"), ["dtype", "'fp61'", "fp16"]),
    "no tokens": (swap(HARVEST, "", "--tokens", "", "-5"), ["tokens = -5", "at least 1"]),
    "more context than the model has": (swap(HARVEST, "", "--context", "", "65"), ["context = 65", "64 positions", "fewer"]),
    "context without room for text": (swap(HARVEST, "", "--context", "", "1"), ["context = 1", "at least 2"]),
    "an unknown split": (swap(HARVEST, "all", "trian"), ["split", "'trian'", "'train'"]),
    "an outlier that masks all": (swap(HARVEST, "", "--outlier", "", "0.5"), ["outlier = 0.5", "above 1"]),
    # where to write
    "a folder below a file": (swap(HARVEST, "{out}", "{good}/text.py/acts"), ["out", "text.py/acts", "is a file"]),
    "a folder that cannot be made": (swap(HARVEST, "{out}", "/proc/nosuch/acts"), ["out", "'/proc/nosuch/acts'", "can't be written", "another folder"]),
    "a run below a file": (swap(TRAIN, "{out}", "{good}/text.py/run"), ["out", "text.py/run", "is a file"]),
    "a run that cannot be made": (swap(TRAIN, "{out}", "/proc/nosuch/run"), ["out", "'/proc/nosuch/run'", "can't be written"]),
    "a folder that holds another harvest": (swap(HARVEST, "{out}", "{here}/store"), ["out", "store", "another model", "another folder"]),
    "a folder that holds another run": (swap(TRAIN, "{out}", "{here}/run", "--steps", "--seed"), ["out", "run", "another", "another folder"]),
    # training
    "no store": (swap(TRAIN, "{here}/store", "{here}/nosuch"), ["store", "nosuch", "no manifest.json", "saekit harvest"]),
    "neither store nor hook point": (["train", "--out", "{out}"], ["--acts", "--hook-point"]),
    "a store that is something else": (swap(TRAIN, "{here}/store", "{here}/run"), ["store", "run", "no manifest.json"]),
    "an unknown architecture": (swap(TRAIN, "topk", "topkk"), ["architecture", "'topkk'", "'topk'"]),
    "k above n_features": (swap(TRAIN, "4", "65"), ["k = 65", "n_features = 64", "smaller k"]),
    "k of zero": (swap(TRAIN, "4", "0"), ["k = 0", "1..n_features"]),
    "no features": (swap(TRAIN, "64", "0"), ["n_features = 0", "at least 1"]),
    "another width than the store's": (swap(TRAIN, "", "--set", "", "d_in=16"), ["width 32", "d_in = 16", "d_in=32"]),
    "an option that no choice has": (swap(TRAIN, "", "--set", "", "k_axu=8"), ["option", "'k_axu'", "'k_aux'"]),
    "an option of another type": (swap(TRAIN, "", "--set", "", "k_aux=few"), ["k_aux = 'few'", "objective 'auxk'", "int"]),
    "an option that has a flag": (swap(TRAIN, "", "--set", "", "n_features=128"), ["n_features", "--n-features 128"]),
    "an option without a value": (swap(TRAIN, "", "--set", "", "k_aux"), ["--set", "'k_aux'", "k_aux=VALUE"]),
    "a hook point that the store lacks": (swap(TRAIN, "", "--hook-point", "", "blocks.1.hook_resid_pre"), ["hook point", "'blocks.1.hook_resid_pre'", f"'{POINT}'"]),
    "too little data for one batch": ([*TRAIN[:8], "--batch-size", "99999", *TRAIN[10:]], ["rows", "batch_size = 99999", "more tokens", "smaller"]),
    "too little data for one batch, live": (["train", "--model", "{good}/model", "--text", "{good}/empty.py", "--hook-point", POINT, "--out", "{out}"], ["text", "is empty"]),
    "no steps": (swap(TRAIN, "2", "0"), ["steps = 0", "at least 1"]),
    "no rows in a batch": ([*TRAIN[:8], "--batch-size", "0", *TRAIN[10:]], ["batch_size = 0", "at least 1"]),
    "a rate below zero": (swap(TRAIN, "", "--lr", "", "-1"), ["lr = -1", "above 0"]),
    "activations with NaN": (swap(TRAIN, "{here}/store", "{here}/nan_store"), ["store", "NaN or Inf", POINT, "harvest again"]),
    # evaluation and the rest
    "a dictionary that is not there": (swap(EVAL, "{here}/run", "{here}/nosuch"), ["dictionary", "nosuch", "not a folder"]),
    "a folder without a dictionary": (swap(EVAL, "{here}/run", "{good}/empty_folder"), ["dictionary", "empty_folder", "no card.json"]),
    "a dictionary of another width": ([*swap(EVAL, "{here}/run", "{here}/narrow"), "--hook-point", POINT], ["width 32", "d_in = 16"]),
    "a dictionary without a hook point": (swap(EVAL, "{here}/run", "{here}/narrow"), ["hook_point", "doesn't name one"]),
    "evaluation at a wrong hook point": ([*EVAL, "--hook-point", "blocks.1.hook_resid_psot"], ["'blocks.1.hook_resid_psot'", f"'{POINT}'"]),
    "evaluation on an empty text": ([*EVAL, "--text", "{good}/empty.py"], ["text", "empty.py", "is empty"]),
    "an unknown ablation": ([*EVAL, "--ablation", "median"], ["ablation", "'median'", "'mean'"]),
    "a dashboard of nothing": (["dashboard", "{here}/nosuch"], ["nosuch"]),
    "a question to the doctor about text": (["doctor", "{good}/text.py"], ["text.py", "not an intact safetensors file"]),
    "a question to the doctor about nothing": (["doctor", "{here}/nosuch"], ["path", "nosuch", "no store, dictionary, run"]),
    "a plan for an unknown job": (["plan", "bake"], ["job", "'bake'", "'harvest'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_the_command_line_refuses_in_one_sentence(
    case: str,
    here: Path,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    template, words = WRONG[case]
    out = tmp_path / "made" / "out"
    argv = [part.format(here=here, good=good, out=out) for part in template]
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file() and not p.is_symlink()}
    said = refusal(argv, monkeypatch, capfd)
    for word in words:
        assert word in said, (word, said)
    assert leftovers(out) == []
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file() and not p.is_symlink()} == before


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
    "a card with a config of another kind": (card(lambda c: c.update(config="topk")), ["'config'", "card.json", "dict"]),
    "a card with hook points of another kind": (card(lambda c: c.update(reads=None)), ["'reads'", "card.json", "list"]),
    "a config without a field": (card(lambda c: c["config"].pop("n_features")), ["'n_features'", "missing"]),
    "a config with a field too many": (card(lambda c: c["config"].update(n_featurse=3)), ["'n_featurse'", "unknown"]),
    "a config with an unknown choice": (card(lambda c: c["config"]["selection"].update(name="topkk")), ["selection", "'topkk'", "'topk'"]),
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
        (lambda c: c.pop("dictionary"), ["lacks the key", "'dictionary'"]),
        (lambda c: c["dictionary"]["selection"].update(kk=1), ["selection", "'kk'", "'k'"]),
        (lambda c: c.update(source={}), ["tensor in memory", "from Python"]),
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
    assert "config" in said and "can't be read as JSON" in said


# real processes


def command(*argv: str, **environment: str) -> subprocess.Popen[str]:
    """``saekit argv`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "saekit.cli", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], began: float) -> tuple[str, str, float]:
    """Its output, and the seconds it took, without those it waited for a core that others had."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.monotonic() - began
    with contextlib.suppress(OSError, ValueError, IndexError):
        seconds -= int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    out, err = process.communicate()
    return out, err, seconds


def test_processes_answer_in_under_five_seconds_imports_included(here: Path, good: Path) -> None:
    out = str(here / "out")
    cases = [
        (["harvest", "nosuch/model", "--hook-point", "x", "--out", out], {"HF_HUB_OFFLINE": "0"}, ["'nosuch/model'", "the hub answers"]),
        (["harvest", "code-lm", "--hook-point", "blocks.1.hook_resid_pots", "--out", out], {}, ["'blocks.1.hook_resid_post'"]),
        (["train", "--acts", str(good / "store"), "--n-features", "8", "--k", "9", "--batch-size", "64", "--out", out], {}, ["k = 9", "n_features = 8"]),
        (["eval", str(good / "narrow"), "--model", str(good / "model"), "--hook-point", POINT], {}, ["width 32", "d_in = 16"]),
    ]  # fmt: skip
    for argv, environment, words in cases:
        began = time.monotonic()
        process = command(*argv, **environment)
        said = sentence(*finish(process, began))
        assert process.returncode == 2
        for word in words:
            assert word in said, (word, said)
        assert not Path(out).exists() or leftovers(Path(out)) == []


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.fixture
def full_disk() -> Iterator[Callable[..., tuple[Path, dict[str, Any]]]]:
    """A folder on a disk of one megabyte, where this user may mount one; else a limit on the size of files."""
    folder = Path(tempfile.mkdtemp())
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    yield folder, {} if mounted else {"preexec_fn": limit_file_size}
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_full_disk_is_one_sentence_and_leaves_only_whole_shards(good: Path, full_disk: Any) -> None:
    folder, limits = full_disk
    base = [sys.executable, "-P", "-m", "saekit.cli"]
    harvesting = [
        *base,
        "harvest",
        str(good / "model"),
        str(good / "long.py"),
        "--split",
        "all",
        "--hook-point",
        POINT,
        "--out",
        str(folder / "acts"),
    ]
    known = subprocess.run([*harvesting, "--tokens", "1000000"], capture_output=True, text=True, **limits)
    said = sentence(known.stdout, known.stderr, 0)
    assert known.returncode == 2
    assert "out" in said and str(folder / "acts") in said and "free some space" in said
    assert leftovers(folder / "acts") == []
    # where the size is not known before: the shard that did not fit leaves nothing behind
    blind = subprocess.run([*harvesting, "--tokens", "0"], capture_output=True, text=True, **limits)
    assert blind.returncode == 2, blind.stderr
    assert "can't be written" in sentence(blind.stdout, blind.stderr, 0)
    assert leftovers(folder / "acts") == []


def fill(folder: Path) -> None:
    """Take what is left of a disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_disk_that_is_full_already_is_refused_before_any_work(
    good: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, limits = full_disk
    if limits:
        pytest.skip("only a disk of its own can be filled; mounting one is not permitted here")
    shutil.copytree(good / "run", folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
    fill(folder)
    for template in (TRAIN, HARVEST):
        argv = [part.format(here=good, good=good, out=folder / "out") for part in template]
        said = refusal(argv, monkeypatch, capfd)
        assert "out" in said and "can't be written" in said and "free some space" in said
        assert leftovers(folder / "out") == []
    said = refusal(["eval", str(folder / "run"), "--model", str(good / "model")], monkeypatch, capfd)
    assert str(folder / "run") in said and "can't be written" in said


def test_a_disk_that_fills_up_while_training_is_one_sentence(
    good: Path, full_disk: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, limits = full_disk
    if limits:
        pytest.skip("only a disk of its own can be filled; mounting one is not permitted here")
    argv = [
        part.format(here=good, good=good, out=folder / "run") for part in [*TRAIN[:5], "4096", *TRAIN[6:]]
    ]
    said = refusal(argv, monkeypatch, capfd)
    assert "run" in said and "No space left" in said
