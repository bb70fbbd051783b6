"""Memory does not grow with the number of tokens, and ``plan`` predicts what a job takes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


def peak(*arguments: str) -> int:
    """Peak anonymous memory (RssAnon) of a command, in bytes, watched from outside."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "saekit.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    highest = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        highest = max(highest, *(int(kb) * 1024 for kb in found), 0)
        time.sleep(0.005)
    assert process.wait() == 0
    return highest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_peak_anonymous_memory_of_harvest_and_training_stays_from_1x_to_10x_the_tokens(
    tmp_path: Path,
) -> None:
    small, large = "80000", "800000"
    where = {n: str(tmp_path / n) for n in (small, large)}
    point = ("--hook-point", "blocks.0.hook_resid_post", "--context", "128")
    harvests = [peak("harvest", "code-lm", *point, "--tokens", n, "--out", where[n]) for n in (small, large)]
    assert harvests[1] <= 1.05 * harvests[0], harvests
    options = ("--n-features", "1024", "--k", "8", "--batch-size", "1024")
    trainings = [
        peak("train", "topk", "--acts", where[n], *options, "--out", where[n] + "-run")
        for n in (small, large)
    ]
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
