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


# as many steps of both, without AuxK, whose memory begins with the first dead feature
PLAIN = ("--steps", "390", "--k", "8", "--set", 'objective=["reconstruction"]')
SMALL = (*PLAIN, "--n-features", "1024", "--batch-size", "1024")
MLP = ("--hook-point", "blocks.1.mlp:in", "--hook-point", "blocks.1.mlp:out")
RESID = ("--hook-point", "blocks.1.hook_resid_post")
# hook points to harvest, how many stores of them a training reads, and the training
JOBS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "rows": (RESID, 1, ("topk", *SMALL)),
    "pairs": (MLP, 1, ("transcoder", *SMALL)),
    "sequences": (
        ("--hook-point", "blocks.1.attn:in", "--hook-point", "blocks.1.attn:out"),
        1,
        ("lorsa", *PLAIN, "--n-features", "256", "--batch-size", "4"),
    ),
    "two stores": (RESID, 2, ("crosscoder", *SMALL)),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(("job", "times"), [pytest.param(job, 10, marks=pytest.mark.slow) for job in JOBS])
def test_peak_anonymous_memory_of_harvest_and_training_does_not_grow_with_the_tokens(
    job: str, times: int, tmp_path: Path
) -> None:
    points, stores, train = JOBS[job]
    counts = ("40000", str(times * 40000))
    folders = {n: [str(tmp_path / f"{n}-{i}") for i in range(stores)] for n in counts}
    harvests = [
        max(peak("harvest", "code-lm", *points, "--tokens", n, "--out", out) for out in folders[n])
        for n in counts
    ]
    assert harvests[1] <= 1.05 * harvests[0], harvests
    trainings = [
        peak("train", *train, *(part for out in folders[n] for part in ("--acts", out)), "--out", str(tmp_path / f"{n}-run"))
        for n in counts
    ]  # fmt: skip
    assert trainings[1] <= 1.05 * trainings[0], trainings


def run(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "saekit.cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow  # times are only as steady as the machine
@pytest.mark.parametrize(("tokens", "steps"), [(8000, 3), (400_000, 90)])
def test_plan_is_within_a_quarter_of_what_the_job_takes(tokens: int, steps: int, tmp_path: Path) -> None:
    acts, run_ = str(tmp_path / "a"), tmp_path / "r"
    harvest = ("harvest", "code-lm", "--hook-point", "blocks.1.hook_resid_post", "--dtype", "bf16")
    harvest += ("--tokens", str(tokens), "--out")
    train = ("train", "topk", "--acts", acts, "--batch-size", "2048", "--steps", str(steps), "--out")
    plans = (
        run("plan", "harvest", "--tokens", str(tokens), "--dtype", "bf16"),
        run("plan", "train", "--batch-size", "2048", "--steps", str(steps)),
    )
    for plan, command, out in zip(plans, (harvest, train), (acts, run_), strict=True):
        began = time.monotonic()
        run(*command, str(out))
        seconds = time.monotonic() - began
        size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
        peaks = peak(*command, f"{out}2")
        print(
            f"{command[0]}: {plan['seconds']:.1f} s of {seconds:.1f}, {plan['memory_bytes'] / peaks:.2f}, {plan['disk_bytes'] / size:.2f}"
        )
        assert plan["seconds"] == pytest.approx(seconds, rel=0.25)
        assert plan["disk_bytes"] == pytest.approx(size, rel=0.25)
        assert plan["memory_bytes"] == pytest.approx(peaks, rel=0.25)


@pytest.mark.slow  # a harvest of all of a text beside it
def test_plan_reads_no_more_tokens_than_the_text_has(tmp_path: Path) -> None:
    text = tmp_path / "small.txt"
    text.write_text("def square(x):\n    return x * x\n" * 200)
    plans = [
        run("plan", "harvest", "--text", str(text), "--tokens", n, "--context", "64")
        for n in ("0", "9000000")
    ]
    done = run(
        "harvest", "code-lm", str(text), "--hook-point", "blocks.1.hook_resid_post", "--split", "train",
        "--context", "64", "--out", str(tmp_path / "a"),
    )  # fmt: skip
    for plan in plans:
        assert plan["disk_bytes"] == pytest.approx(done["bytes"], rel=0.25)


@pytest.mark.parametrize(
    "options",
    [
        ("lorsa", "--set", "n_qk=2", "--set", "d_qk=8", "--context", "16"),
        (
            "clt",
            "--set",
            "n_layers=4",
            "--set",
            "selection=relu",
            "--set",
            'objective=["reconstruction","tanh"]',
        ),
    ],
)
def test_plan_knows_what_reads_several_places_and_sequences(options: tuple[str, ...]) -> None:
    small = ("--d-in", "16", "--n-features", "64", "--k", "4", "--steps", "5", "--batch-size", "32")
    plan = run("plan", "train", "--architecture", *options, *small)
    assert plan["seconds"] > 0 and plan["disk_bytes"] > 0
