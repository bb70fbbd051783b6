"""How a refusal is asked for and judged, and the commands that the tables of bad input vary."""

import sys
import time
from pathlib import Path

import pytest

from saekit.cli import main

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


def sentence(out: str, err: str, seconds: float, limit: float = LIMIT) -> str:
    """The text of an error that is one line, on stderr, in time."""
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert seconds < limit, (seconds, err)
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
