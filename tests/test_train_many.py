"""Many dictionaries from one stream: each as if alone, failures, controls, peers, sweeps."""

import json
import shutil
from pathlib import Path

import commandline
import pytest
import torch
from test_zoo import make

import saekit
from saekit.activations import DrawnSource
from saekit.report.sweep import with_front
from saekit.trainers import checkpoint
from saekit.trainers.job import Job
from saekit.types import SaekitError
from saekit.verbs.evaluate import _trained_control


def test_many_from_one_stream_are_each_as_if_alone(rows: torch.Tensor, tmp_path: Path) -> None:
    names = ("topk", "batchtopk", "matching_pursuit")
    options = {"steps": 9, "batch_size": 200, "lr": 1e-3, "checkpoint_every": 3}
    together = saekit.train_many({n: make(n) for n in names}, rows, out=tmp_path / "many", **options)
    for name in names:
        alone = saekit.train(make(name), rows, out=tmp_path / name, **options)
        assert together[name].finished and together[name].metrics == alone.metrics
        files = [p / "dictionary.safetensors" for p in (tmp_path / name, tmp_path / "many" / name)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert saekit.load(tmp_path / "many" / name).config == make(name).config


def test_a_control_is_trained_beside_as_if_alone(rows: torch.Tensor, tmp_path: Path) -> None:
    options = {"steps": 6, "batch_size": 200, "lr": 1e-3}
    run = saekit.train(make("topk"), rows, out=tmp_path / "run", control=make("frozen"), **options)
    saekit.train(make("frozen"), rows, out=tmp_path / "alone", **options)
    files = [p / "dictionary.safetensors" for p in (tmp_path / "run" / "control", tmp_path / "alone")]
    assert run.finished and files[0].read_bytes() == files[1].read_bytes()
    assert saekit.load(tmp_path / "run").config.atoms[0] == "unit_norm"
    with pytest.raises(SaekitError, match="width 32 is not"):
        saekit.train(make("topk"), rows, control=make("frozen", d_in=16), **options)


def test_one_failure_leaves_the_others_alone(rows: torch.Tensor, tmp_path: Path) -> None:
    runs = saekit.train_many(
        {"good": make("topk"), "bad": make("topk")}, rows, 30, 200, tmp_path, each={"bad": {"lr": 1e30}}
    )
    assert runs["good"].finished and runs["good"].error is None
    assert not runs["bad"].finished and "smaller lr" in runs["bad"].error
    assert not (tmp_path / "bad" / "config.json").exists()  # free for another try
    assert (tmp_path / "good" / "dictionary.safetensors").exists()


def test_a_failure_of_any_kind_ends_its_run_alone(
    rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Job.step

    def failing(job: Job, *args) -> None:
        if job.name == "bad" and job.trainer.step_number == 3:
            raise KeyError("x")
        step(job, *args)

    monkeypatch.setattr(Job, "step", failing)
    runs = saekit.train_many({"bad": make("topk"), "good": make("topk")}, rows, 6, 200, lr=1e-3)
    assert runs["good"].finished and runs["good"].error is None and runs["good"].steps == 6
    assert not runs["bad"].finished and runs["bad"].error == "KeyError: 'x'" and runs["bad"].steps == 3


def test_runs_that_were_interrupted_at_different_steps_go_on(rows: torch.Tensor, tmp_path: Path) -> None:
    options = {"steps": 8, "batch_size": 200, "lr": 1e-3, "checkpoint_every": 2}
    saekit.train_many({"a": make("topk"), "b": make("abstopk")}, rows, out=tmp_path, **options)
    wanted = {n: (tmp_path / n / "dictionary.safetensors").read_bytes() for n in "ab"}
    for name, keep in (("a", 1), ("b", 2)):
        (tmp_path / name / "dictionary.safetensors").unlink()
        for old in sorted((tmp_path / name / "checkpoints").iterdir())[keep:]:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
    assert checkpoint.latest(tmp_path / "a" / "checkpoints")[1]["step"] == 6
    saekit.train_many({"a": make("topk"), "b": make("abstopk")}, rows, out=tmp_path, **options)
    for name in "ab":
        assert (tmp_path / name / "dictionary.safetensors").read_bytes() == wanted[name]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dictionaries": {}}, "dictionaries is empty"),
        ({"dictionaries": {"a/b": "topk"}}, "can't be a folder's"),
        ({"each": {"c": {}}}, "each names 'c'"),
        ({"each": {"a": {"seed": 3}}}, "seed = 3 of 'a' alone"),
    ],
)
def test_bad_sets_are_refused(given: dict, words: str, rows: torch.Tensor, tmp_path: Path) -> None:
    dictionaries = {name: make(kind) for name, kind in given.get("dictionaries", {"a": "topk"}).items()}
    with pytest.raises(SaekitError, match=words):
        saekit.train_many(dictionaries, rows, 2, 100, tmp_path / "x", each=given.get("each"))
    assert not (tmp_path / "x").exists()


def test_weights_of_one_are_not_trained_by_another(rows: torch.Tensor) -> None:
    d = make("topk")
    with pytest.raises(SaekitError, match="'slow' and 'fast' share weights"):
        saekit.train_many({"slow": d, "fast": d}, rows, 2, 100, each={"fast": {"lr": 0.1}})
    with pytest.raises(SaekitError, match="'dictionary' and 'control' share weights"):
        saekit.train(d, rows, 2, 100, control=d)


def test_peers_see_each_other_as_they_were_before_the_step(rows: torch.Tensor) -> None:
    def pair(order: str) -> dict[str, torch.Tensor]:
        ds = {n: make("topk", objective=("reconstruction", "mutual"), seed="ab".index(n)) for n in order}
        saekit.train_many(ds, rows, 5, 200, lr=1e-2)
        return {n: d.W_dec.detach() for n, d in ds.items()}

    one, other = pair("ab"), pair("ba")
    assert all(torch.equal(one[n], other[n]) for n in "ab")


def test_dictionaries_drawn_to_each_other_need_starts_of_their_own(rows: torch.Tensor) -> None:
    def make(seed: int) -> saekit.Dictionary:
        return saekit.create(
            "topk", d_in=32, n_features=48, k=4, objective=("reconstruction", "mutual"), seed=seed
        )

    with pytest.warns(UserWarning, match="there is one, so the term does nothing"):
        saekit.train(make(0), rows, steps=2, batch_size=64)
    with pytest.warns(UserWarning, match="one start for all, so"):
        saekit.train_many({"a": make(0), "b": make(0)}, rows, steps=2, batch_size=64)
    assert saekit.train_many({"a": make(0), "b": make(1)}, rows, steps=2, batch_size=64)["a"].finished


def test_a_sweep_is_many_runs_and_a_front(small_store, tmp_path: Path) -> None:
    command = ("train", "--acts", str(small_store.path), "--n-features", "64", "--steps", "6", "--batch-size", "256")  # fmt: skip
    out = tmp_path / "sweep"
    done = commandline.saekit(
        *command, "--sweep", "k=2,8", "--sweep", "architecture=topk,relu", "--out", str(out), "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["runs"]}
    kinds = {f"k-{k}_architecture-{a}" for k in (2, 8) for a in ("topk", "relu")}
    untrained = {name: rows.pop(name) for name in ("random_k-2", "random_k-8")}
    assert set(rows) == kinds | {"frozen_k-2", "frozen_k-8"}
    assert all(untrained[f"random_k-{k}"]["l0"] == k for k in (2, 8))
    assert untrained["random_k-2"]["fvu"] > rows["k-2_architecture-topk"]["fvu"]
    assert rows["k-2_architecture-topk"]["front"] and (out / "sweep.html").stat().st_size > 10_000
    for name in rows:
        assert saekit.load(out / name).n_features == 64
    for k, kind in ((2, "relu"), (8, "topk"), (8, "relu")):  # eval finds the control of a run's own k
        run = out / f"k-{k}_architecture-{kind}"
        control = _trained_control(run, saekit.load(run))
        assert control.config.selection[1].k == k and control.config.atoms[0] == "frozen"
    for given, words in (
        ("steps=1,2", "all runs share one stream"),
        ("k", "has no values"),
        ("k=2,999", "k = 999"),
    ):
        bad = commandline.saekit(*command, "--sweep", given, "--out", str(tmp_path / "bad"))
        assert bad.returncode == 2 and words in bad.stderr and not (tmp_path / "bad").exists()


def test_the_front_holds_what_nothing_beats() -> None:
    found = {"a": (4.0, 0.5), "b": (4.0, 0.6), "c": (8.0, 0.2), "d": (9.0, 0.3)}
    rows = [{"name": name, "l0": l0, "fvu": fvu} for name, (l0, fvu) in found.items()]
    assert {row["name"] for row in with_front(rows) if row["front"]} == {"a", "c"}


def test_runs_at_several_hook_points_share_a_stream(rows: torch.Tensor, tmp_path: Path) -> None:
    class Two:
        hook_points, n_rows = ("a", "b"), None

        def width(self, point):
            return 32

        def batches(self, points, batch_size, seed, start=0):
            while True:
                here = {"a": rows[start * batch_size :][:batch_size], "b": rows.flip(0)[:batch_size]}
                yield torch.cat([here[p] for p in points], 1)
                start += 1

        def identity(self):
            return {"kind": "two"}

    def at(point: str) -> saekit.Dictionary:
        d = make("topk")
        d.reads = d.writes = (point,)
        return d

    options = {"steps": 4, "batch_size": 200, "lr": 1e-3}
    saekit.train_many({"a": at("a"), "b": at("b")}, Two(), out=tmp_path / "many", **options)
    saekit.train(at("b"), Two(), out=tmp_path / "b", **options)
    files = [p / "b" / "dictionary.safetensors" for p in (tmp_path, tmp_path / "many")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_peers_resume_from_one_step(rows: torch.Tensor, tmp_path: Path) -> None:
    def run(out: Path) -> list[bytes]:
        ds = {n: make("topk", objective=("reconstruction", "mutual"), seed=i) for i, n in enumerate("ab")}
        saekit.train_many(ds, rows, 8, 200, out, lr=1e-3, checkpoint_every=4)
        return [(out / n / "dictionary.safetensors").read_bytes() for n in "ab"]

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "cut") == whole
    # killed between the two's last checkpoints: a is finished, b is a checkpoint behind
    shutil.rmtree(tmp_path / "cut" / "b" / "checkpoints" / "step-00000008")
    (tmp_path / "cut" / "b" / "dictionary.safetensors").unlink()
    assert run(tmp_path / "cut") == whole


def test_dictionaries_trained_together_take_their_beginnings_from_one_pass() -> None:
    drawn = []

    def draw(rows: int, step: int, seed: int) -> torch.Tensor:
        drawn.append(step)
        return torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))

    def count(names: list[str]) -> int:
        drawn.clear()
        made = {
            name: saekit.create("jumprelu", d_in=16, n_features=32, seed=i) for i, name in enumerate(names)
        }
        saekit.train_many(made, DrawnSource(draw, 16, "noise"), steps=1, batch_size=4096)
        return len(drawn)

    assert count(["a", "b", "c"]) == count(["a"])
