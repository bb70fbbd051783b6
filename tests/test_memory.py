"""Memory does not grow with the number of tokens, and ``plan`` predicts what a job takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARVEST = """
import sys
from saekit.harvest import harvest
from saekit.models import load_model
from saekit.verbs.memory import PeakAnonymous
model = load_model("code-lm")
with PeakAnonymous() as peak:
    harvest(model, "stdlib", ["blocks.0.hook_resid_post"], out=sys.argv[1], tokens=int(sys.argv[2]), context=128)
print(peak.bytes)
"""
TRAIN = """
import sys, saekit
from saekit.verbs.memory import PeakAnonymous
with PeakAnonymous() as peak:
    store = saekit.Store(sys.argv[1])
    d = saekit.create("topk", d_in=256, n_features=1024, k=8)
    saekit.train(d, store, steps=store.n_rows // 1024, batch_size=1024)
print(peak.bytes)
"""


def peak(code: str, *arguments: str) -> int:
    # a fixed number of arenas: glibc opens one per thread when it likes, which is not ours to measure
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def test_peak_anonymous_memory_of_harvest_and_training_stays_from_1x_to_10x_the_tokens(
    tmp_path: Path,
) -> None:
    # one shard is the unit: below it there is less to hold
    small, large = 80_000, 800_000
    harvests = [peak(HARVEST, str(tmp_path / str(n)), str(n)) for n in (small, large)]
    assert harvests[1] <= 1.05 * harvests[0], harvests
    trainings = [peak(TRAIN, str(tmp_path / str(n))) for n in (small, large)]
    assert trainings[1] <= 1.05 * trainings[0], trainings


def run(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "saekit.cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_plan_is_within_a_quarter_of_what_the_job_takes(tmp_path: Path) -> None:
    plan = run("plan", "harvest", "--tokens", "400000", "--dtype", "bf16")
    done = run(
        "harvest",
        "code-lm",
        "--hook-point",
        "blocks.1.hook_resid_post",
        "--tokens",
        "400000",
        "--dtype",
        "bf16",
        "--out",
        str(tmp_path / "a"),
    )
    assert plan["disk_bytes"] == pytest.approx(done["bytes"], rel=0.25)
    assert plan["seconds"] == pytest.approx(done["seconds"], rel=0.25)
    plan = run("plan", "train", "--steps", "90")
    done = run("train", "topk", "--acts", str(tmp_path / "a"), "--steps", "90", "--out", str(tmp_path / "r"))
    assert plan["seconds"] == pytest.approx(done["seconds"], rel=0.25)
    size = sum(f.stat().st_size for f in (tmp_path / "r").rglob("*") if f.is_file())
    assert plan["disk_bytes"] == pytest.approx(size, rel=0.25)
