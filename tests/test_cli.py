"""The command line: every verb's help, its JSON, the demo in small, and the README's example."""

import json
import re
from pathlib import Path

import pytest
import torch
from commandline import saekit

from saekit.cli import VERBS
from saekit.kernels import bench, bench_gpu
from saekit.verbs.step_costs import WIRINGS

ROOT = Path(__file__).parent.parent
DRAWS_NOTHING = ("doctor", "convert", "publish", "released")  # so these have no seed


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_common_options(verb: str) -> None:
    done = saekit(verb, "--help")
    assert done.returncode == 0 and f"saekit {verb}" in done.stdout and "Example" in done.stdout
    assert "--json" in done.stdout
    assert verb in DRAWS_NOTHING or "--seed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "--bogus", "1"), "--bogus"),
        (("train", "--steps", "ten"), "'--steps'"),
        (("tarin",), "'tarin'"),
        (("plan",), "job"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments: tuple[str, ...], named: str) -> None:
    done = saekit(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and named in done.stderr and done.stderr.count("\n") == 1


def test_every_verb_of_the_readme_exists() -> None:
    named = set(re.findall(r"^    saekit ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named and named <= set(VERBS)


def test_doctor_tells_the_environment() -> None:
    data = json.loads(saekit("doctor", "--json").stdout)
    assert {"python", "packages", "threads", "kernels", "gpu"} <= set(data) and data["packages"]["torch"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict]:
    """The demo at a fraction of its size."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    done = saekit(
        "demo",
        "--out",
        str(out),
        "--tokens",
        "40000",
        "--eval-tokens",
        "4096",
        "--n-features",
        "512",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.slow
def test_the_demo_ends_in_a_table_and_a_page(demo) -> None:
    out, data = demo
    keys = {"l0", "fvu", "explained_variance", "ce_recovered", "kl", "dead_share", "density"}
    assert keys <= set(data["measures"]) and Path(data["report"]) == (out / "report.html").resolve()
    fvu = data["measures"]["fvu"]
    assert set(fvu["control"]) == {"frozen", "random", "random_omp"}
    assert (
        fvu["value"] < fvu["control"]["frozen"] < 1 and fvu["interval"][0] < fvu["value"] < fvu["interval"][1]
    )
    page = (out / "report.html").read_text()
    assert "ce_recovered" in page and "blocks.1.hook_resid_post" in page


@pytest.mark.slow
def test_eval_dashboard_and_doctor_on_the_demos_run(demo, tmp_path: Path) -> None:
    run = demo[0] / "run"
    table = saekit("eval", str(run), "--tokens", "2048").stdout
    assert " frozen" in table and " random_omp" in table  # the run has trained its control
    table = saekit("eval", str(run), "--tokens", "2048", "--no-controls").stdout
    assert " frozen" not in table
    assert "ce_recovered" in table and "nats per token" in table
    assert (run / "eval.json").exists()
    page = saekit(
        "dashboard", str(run), "--tokens", "8192", "--features", "10", "--out", str(tmp_path / "x.html")
    )
    assert page.returncode == 0 and (tmp_path / "x.html").exists()
    for path, word in (
        (run, "n_features"),
        (demo[0] / "acts", "hook points"),
        (run / "dictionary.safetensors", "encoder"),
    ):
        done = saekit("doctor", str(path))
        assert done.returncode == 0 and word in done.stdout, done.stderr


def test_bench_proves_before_it_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (
        "--d-in",
        "32",
        "--n-features",
        "256",
        "--k",
        "4",
        "--batch",
        "64",
        "--steps",
        "2",
        "--no-record",
    )
    done = saekit("bench", "--case", "auxk32", "--case", "encode", *small, "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and {row["case"] for row in rows} == {"auxk32", "encode"}
    for row in rows:
        assert row["parity_holds"] and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["ratio"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
        assert row["case"] == "encode" or row["extra"] > 0
    done = saekit("bench", *(part for name in WIRINGS for part in ("--case", name)), *small, "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and [row["case"] for row in rows] == list(WIRINGS), done.stderr
    assert all(row["parity_holds"] and row["ratio"] > 0 and row["over_autoencoder"] > 0 for row in rows)
    monkeypatch.setattr(bench, "TOLERANCE", 0.0)  # nothing is exactly its dense definition
    row = bench.measure("topk", bench.Shape(32, 256, 4, 64), steps=2)
    assert not row["parity_holds"] and "p50_ms" not in row and "ratio" not in row


def test_the_gpus_bench_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its whole path, on the CPU in fp32: proof, floors, our step, the dense one."""
    monkeypatch.setattr(bench_gpu, "PARITY", {torch.float32: 1e-3})
    row = bench_gpu.main("cpu", bench.Shape(32, 256, 4, 64), torch.float32, steps=2)
    assert row["parity_holds"] and row["ratio"] > 0 and row["over_dense"] > 0
    monkeypatch.setattr(bench_gpu, "PARITY", {torch.float32: 0.0})
    assert "p50_ms" not in bench_gpu.main("cpu", bench.Shape(32, 256, 4, 64), torch.float32, steps=2)


@pytest.mark.gpu
def test_the_gpus_step_is_as_fast_as_promised() -> None:
    row = bench_gpu.main()
    assert row["parity_holds"] and row["ratio"] <= 1.5 and row["over_dense"] >= 8 and row["no_dense_codes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--case", "topc"), "case 'topc' is unknown"),
        (("--k", "0"), "k = 0 must lie in 1..n_features = 16384"),
        (("--steps", "1"), "steps = 1 is too small"),
        (("--shortlist", "fp8"), "shortlist 'fp8'"),
        (("--peers", "/nowhere/python"), "peers '/nowhere/python' is no file"),
    ],
)
def test_bench_refuses_in_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    done = saekit("bench", *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_demo_meets_its_demands(tmp_path: Path) -> None:
    done = saekit("demo", "--out", str(tmp_path / "demo"), "--json")
    data = json.loads(done.stdout)
    m = {key: value["value"] for key, value in data["measures"].items()}
    assert data["seconds"] <= 180
    assert m["ce_recovered"] >= 0.94 and m["fvu"] <= 0.15 and m["dead_share"] <= 0.03
    pursuit = {key: value["control"].get("random_omp") for key, value in data["measures"].items()}
    assert m["fvu"] < pursuit["fvu"] and m["ce_spliced"] < pursuit["ce_spliced"]
