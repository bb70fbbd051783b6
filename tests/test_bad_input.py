"""Bad input: one sentence that names the field, the value and the fix; exit code 2; nothing half-written; under 5 s."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import EVAL, HARVEST, LIMIT, POINT, TRAIN, leftovers, refusal, sentence, swap

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
    "a folder that holds another harvest": (swap(HARVEST, "{out}", "{here}/store"), ["out", "store", "another model.name ('tiny-gpt2' there,", "another folder"]),
    "a folder that holds another run": (swap(TRAIN, "{out}", "{here}/run", "--steps", "--seed"), ["out", "run", "another init_seed (0 there, 2 here)", "another folder"]),
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
    "a question to the doctor about text": (["doctor", "{good}/text.py"], ["text.py", "no store, dictionary, run"]),
    "a question to the doctor about nothing": (["doctor", "{here}/nosuch"], ["path", "nosuch", "no store, dictionary, run"]),
    "a dashboard in place of another file": (["dashboard", "{here}/run", "--model", "{good}/model", "--out", "{here}/run/config.json"], ["out", "config.json", ".html"]),
    "a dashboard in place of a folder": (["dashboard", "{here}/run", "--model", "{good}/model", "--out", "{here}/store"], ["out", "store", "is a folder"]),
    "a dashboard that cannot be written": (["dashboard", "{here}/run", "--model", "{good}/model", "--out", "/proc/x.html"], ["out", "/proc", "can't be written"]),
    "a hook point that is several": ([*EVAL, "--hook-point", "blocks.*.hook_resid_post"], ["hook_point", "name one"]),
    "an empty name of a text": (swap(HARVEST, "{good}/text.py", ""), ["text is an empty string"]),
    "an outlier that is no number": (swap(HARVEST, "", "--outlier", "", "nan"), ["outlier = nan", "above 1"]),
    "roles of plain text": (swap(HARVEST, "", "--role", "", "user"), ["roles = ['user']", "plain text"]),
    "a seed out of range": (swap(TRAIN, "", "--seed", "", str(2**70)), ["--seed", "2147483647"]),
    "a dictionary too large for any memory": (swap(TRAIN, "64", str(10**13)), ["memory", "smaller", "saekit plan"]),
    "a demo with k above n_features": (["demo", "--k", "32", "--n-features", "16", "--out", "{out}"], ["k = 32", "n_features = 16"]),
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


@pytest.fixture(scope="module")
def limit() -> float:
    """Five seconds; on a machine that needs more for the libraries alone, twice as long as those take."""
    began = time.monotonic()
    libraries = subprocess.Popen(
        [sys.executable, "-P", "-c", "import torch, transformers.models.gpt2.modeling_gpt2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return max(LIMIT, 2 * finish(libraries, began)[2])


def test_processes_answer_in_under_five_seconds_imports_included(
    here: Path, good: Path, limit: float
) -> None:
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
        said = sentence(*finish(process, began), limit=limit)
        assert process.returncode == 2
        for word in words:
            assert word in said, (word, said)
        assert not Path(out).exists() or leftovers(Path(out)) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_is_kept(sent: signal.Signals, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        out = str(tmp_path / "acts")
        process = command("harvest", "code-lm", "--hook-point", POINT, "--tokens", "0", "--out", out)
    finally:
        signal.signal(signal.SIGINT, before)
    began = time.monotonic()
    while not any((tmp_path / "acts").glob("*.safetensors*")) and not any((tmp_path / "acts").glob(".*")):
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped;" in err and "Traceback" not in err


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
    said = [line for line in blind.stderr.splitlines(True) if not line.startswith("harvest: ")]  # slow
    assert "can't be written" in sentence(blind.stdout, "".join(said), 0)
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
