"""Training: exact resume, clean interruption, logs, sources, schedules."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import saekit
from saekit.activations import TensorSource
from saekit.harvest import StreamSource, harvest
from saekit.trainers import checkpoint, dead, optim
from saekit.trainers import log as logs
from saekit.types import SaekitError

STEPS = 60


def command(store: Path, out: Path, *more: str) -> list[str]:
    arguments = ["train", "topk", "--acts", str(store), "--n-features", "64", "--k", "4", "--out", str(out)]
    options = [
        "--steps",
        str(STEPS),
        "--batch-size",
        "256",
        "--checkpoint-every",
        "7",
        "--log-every",
        "1",
        "--dead-after",
        "1024",
    ]
    return [sys.executable, "-P", "-m", "saekit.cli", *arguments, *options, *more]


def step_reached(out: Path) -> int:
    lines = logs.read(out) if (out / "log.jsonl").exists() else []  # once: a resumed run drops lines
    return lines[-1]["step"] if lines else 0


@pytest.fixture(scope="module")
def finished(small_store, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(small_store.path, out), check=True, capture_output=True)
    return out


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_steps_and_resumed_the_weights_are_the_same_bytes(
    kills: int, small_store, finished: Path, tmp_path: Path
) -> None:
    out, draw = tmp_path / "killed", random.Random(0)
    for _ in range(kills):
        target = step_reached(out) + draw.randint(1, 9)
        process = subprocess.Popen(
            command(small_store.path, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and step_reached(out) < target:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was over before the kill"
    subprocess.run(command(small_store.path, out), check=True, capture_output=True)
    for file in ("dictionary.safetensors", f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        assert (out / file).read_bytes() == (finished / file).read_bytes(), file
    timeless = [
        [{k: v for k, v in r.items() if k != "rows_per_second"} for r in logs.read(p)]
        for p in (out, finished)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    sent: int, small_store, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    slow = command(small_store.path, out)
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while step_reached(out) < 10:
        time.sleep(0.002)
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came")
    assert process.returncode == 130 and "saved at step" in said and "Traceback" not in said
    saved = int(said.split("saved at step ")[1].split()[0])
    assert checkpoint.latest(out / "checkpoints")[1]["step"] == saved
    assert not (out / "dictionary.safetensors").exists()
    subprocess.run(slow, check=True, capture_output=True)
    assert (out / "dictionary.safetensors").read_bytes() == (finished / "dictionary.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, small_store, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    d = saekit.create("topk", d_in=32, n_features=64, k=4)
    options = {"batch_size": 256, "checkpoint_every": 7, "log_every": 1, "dead_after": 1024}
    saekit.train(d, small_store, STEPS, out=out, **options)
    (out / "dictionary.safetensors").unlink()
    file = out / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(
            data[: len(data) // 2] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1])
        )
    with pytest.warns(UserWarning, match=f"step-{STEPS:08d} is damaged"):
        run = saekit.train(
            saekit.create("topk", d_in=32, n_features=64, k=4), small_store, STEPS, out=out, **options
        )
    assert run.finished
    assert (out / "dictionary.safetensors").read_bytes() == (finished / "dictionary.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_is_never_saved(planted_rows: torch.Tensor, tmp_path: Path) -> None:
    d = saekit.create("topk", d_in=16, n_features=64, k=4)
    with pytest.raises(SaekitError, match=r"the loss is .* choose a smaller lr"):
        saekit.train(d, planted_rows, 40, 128, tmp_path / "run", lr=1e30, checkpoint_every=3)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is None or all(t.isfinite().all() for t in found[0].values() if t.is_floating_point())


def test_two_checkpoints_are_kept(finished: Path) -> None:
    kept = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert kept == ["step-00000056", "step-00000060"]


def test_another_setting_in_the_same_folder_is_refused(small_store, finished: Path) -> None:
    before = (finished / "config.json").read_bytes()
    done = subprocess.run(command(small_store.path, finished, "--lr", "0.5"), capture_output=True, text=True)
    assert done.returncode == 2 and "another train.lr (0.0256 there, 0.5 here)" in done.stderr
    assert (finished / "config.json").read_bytes() == before


def test_config_json_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    repeat = [
        sys.executable,
        "-P",
        "-m",
        "saekit.cli",
        "train",
        "--config",
        str(finished / "config.json"),
        "--out",
        str(out),
    ]
    subprocess.run(repeat, check=True, capture_output=True)
    assert (out / "dictionary.safetensors").read_bytes() == (finished / "dictionary.safetensors").read_bytes()


def test_seed_decides_and_the_global_generator_does_not(planted_rows: torch.Tensor) -> None:
    def weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        d = saekit.create("topk", d_in=16, n_features=64, k=4, seed=seed)
        saekit.train(d, planted_rows, 5, 64, seed=seed)
        return d.atoms.weight.detach().clone()

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


def test_every_row_is_seen_once_an_epoch() -> None:
    rows = torch.arange(103.0)[:, None]
    batches = TensorSource(rows).batches(["x"], 10, seed=3)
    seen = torch.cat([next(batches) for _ in range(103)])[:, 0]
    epochs = seen.view(10, 103)
    assert all(torch.equal(e.sort().values, rows[:, 0]) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    later = next(TensorSource(rows).batches(["x"], 10, seed=3, start=50))
    assert torch.equal(later[:, 0], seen[500:510])


def test_store_tensor_and_stream_train_alike(tiny_gpt2, small_store) -> None:
    point = "blocks.1.hook_resid_post"
    rows = torch.cat([b.rows(point) for b in small_store.sequences()])
    stream = harvest(tiny_gpt2, "stdlib", [point], tokens=4096, context=64, batch_rows=8)
    fvus = []
    for source in (small_store, rows, StreamSource(stream, buffer_bytes=2048 * 32 * 4)):
        d = saekit.create("topk", d_in=32, n_features=128, k=8)
        saekit.train(d, source, 120, 256)
        fvus.append(saekit.metrics.fvu(rows, d(rows).detach()))
    assert max(fvus) < 1.25 * min(fvus)


def test_a_stream_resumes_to_the_same_weights(tiny_gpt2, tmp_path: Path) -> None:
    def source() -> StreamSource:
        stream = harvest(
            tiny_gpt2, "stdlib", ["blocks.0.hook_mlp_out"], tokens=4096, context=64, batch_rows=8
        )
        return StreamSource(stream, buffer_bytes=1024 * 32 * 4)

    def run(out: Path) -> bytes:
        saekit.train(
            saekit.create("topk", d_in=32, n_features=64, k=4), source(), 12, 256, out, checkpoint_every=5
        )
        return (out / "dictionary.safetensors").read_bytes()

    whole = run(tmp_path / "a")
    run(tmp_path / "b")
    for path in ("dictionary.safetensors", "checkpoints/step-00000012/state.safetensors"):
        (tmp_path / "b" / path).unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert run(tmp_path / "b") == whole


def test_trainer_step_by_hand_equals_a_dense_loop(planted_rows: torch.Tensor) -> None:
    """Adam on the definition, with plain dense autograd, gives the same weights."""
    d = saekit.create("topk", d_in=16, n_features=64, k=4, seed=2)
    trainer = saekit.Trainer(d, lr=1e-2, warmup=1)
    w, a = d.encoder.detach().clone().requires_grad_(), d.atoms.weight.detach().clone().requires_grad_()
    b, c = torch.zeros(64, requires_grad=True), torch.zeros(16, requires_grad=True)
    adam = torch.optim.Adam([w, b, c, a], lr=1e-2, betas=(0.9, 0.99))
    for i in range(5):
        batch = planted_rows[i * 200 : (i + 1) * 200]
        trainer.step(batch)
        x = d.norm_in(batch)
        pre = x @ w.T + b
        top = pre.topk(4)
        codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        adam.zero_grad()
        (x - codes @ a - c).square().sum(-1).mean().backward()
        a.grad -= (a.grad * a).sum(-1, keepdim=True) * a.detach()
        adam.step()
        with torch.no_grad():
            a /= a.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(d.encoder, w, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(d.atoms.weight, a, rtol=1e-3, atol=1e-4)


def test_the_log_is_json_lines_and_wandb_is_written_offline(
    planted_rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    d = saekit.create("topk", d_in=16, n_features=64, k=4)
    saekit.train(d, planted_rows, 6, 128, tmp_path / "run", log_every=2, wandb="saekit-test")
    records = logs.read(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2, 4, 6]
    assert {"loss", "reconstruction", "auxk", "fvu", "l0", "dead_share", "lr", "rows_per_second"} <= set(
        records[0]
    )
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_a_cut_log_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert logs.read(tmp_path) == [{"step": 1}, {"step": 2}]


def test_dead_counts() -> None:
    silent = torch.tensor([0, 5, 90])
    dead.update(silent, torch.tensor([3, 0, 0]), rows=10)
    assert silent.tolist() == [0, 15, 100] and dead.dead(silent, 100).tolist() == [False, False, True]
    chosen = [dead.dead_after(*run).value for run in ((10_000, 100), (1000, 1000), (10**6, 10**6))]
    assert chosen == [50_000, 100_000, 10_000_000]  # a share of the run, 100 batches, 10M rows


def test_the_rate_goes_up_stays_and_falls_to_zero() -> None:
    factors = [optim.rate_factor(s, 100, 10, 0.3) for s in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9:70] == [1.0] * 61 and factors[100] == 0.0
    assert factors[70:] == sorted(factors[70:], reverse=True)
    assert "4096" in optim.learning_rate(4096, None).reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"batch_size": 3000}, "2000 rows and one batch takes batch_size = 3000"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
        ({"decay": 2.0}, "decay = 2.0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    options: dict, words: str, planted_rows: torch.Tensor, tmp_path: Path
) -> None:
    d = saekit.create("topk", d_in=16, n_features=64, k=4)
    with pytest.raises(SaekitError, match=words):
        saekit.train(d, planted_rows, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_controls_and_wrong_widths_are_refused(planted_rows: torch.Tensor) -> None:
    with pytest.raises(SaekitError, match="nothing to train"):
        saekit.train(saekit.create("random", d_in=16, n_features=64, k=4), planted_rows, 1, 16)
    with pytest.raises(SaekitError, match="width 16 is not the dictionary's d_in = 15"):
        saekit.train(saekit.create("topk", d_in=15, n_features=64, k=4), planted_rows, 1, 16)
    planted_rows[7, 3] = float("nan")
    with pytest.raises(SaekitError, match="NaN or Inf, first in row 7"):
        saekit.train(saekit.create("topk", d_in=16, n_features=64, k=4), planted_rows, 1, 16)


def test_the_state_on_disk_has_no_pickle(finished: Path) -> None:
    for file in finished.rglob("*"):
        if file.is_file():
            assert file.suffix in {".json", ".jsonl", ".safetensors"}, file
    assert json.loads((finished / "card.json").read_text())["schema"] == 1
    assert os.path.getsize(finished / "dictionary.safetensors") < 64 * (32 + 32 + 1) * 4 + 4096


def test_a_run_that_ran_away_leaves_its_folder_free(tmp_path: Path, planted_rows: torch.Tensor) -> None:
    def run(lr: float) -> Any:
        dictionary = saekit.create("topk", d_in=16, n_features=64, k=4)
        return saekit.train(
            dictionary, planted_rows, steps=20, batch_size=64, out=tmp_path / "run", lr=lr, warmup=0
        )

    with pytest.raises(SaekitError, match="choose a smaller lr"):
        run(1e30)
    assert run(1e-3).finished


@pytest.mark.parametrize("source", [None, 5, [[1.0]]])
def test_a_source_of_another_kind_is_refused(source: object) -> None:
    with pytest.raises(SaekitError, match="source is of type"):
        saekit.train(saekit.create("topk", d_in=16, n_features=64, k=4), source)


def test_numpy_rows_are_rows(planted_rows: torch.Tensor) -> None:
    dictionary = saekit.create("topk", d_in=16, n_features=64, k=4)
    assert saekit.train(dictionary, planted_rows.numpy(), steps=1, batch_size=64).finished


def test_a_config_does_not_claim_to_repeat_a_run_from_trained_weights(small_store, tmp_path: Path) -> None:
    from saekit.verbs.train import _repeat

    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    saekit.train(dictionary, small_store, steps=2, batch_size=64, out=tmp_path / "first")
    _repeat(tmp_path / "first" / "config.json")
    saekit.train(dictionary, small_store, steps=2, batch_size=64, out=tmp_path / "second")
    with pytest.raises(SaekitError, match="went on from trained weights"):
        _repeat(tmp_path / "second" / "config.json")
