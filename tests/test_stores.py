"""Stores of activations: what comes back, resuming, damage, shuffling."""

import copy
import hashlib
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_harvest import POINT
from torch import Tensor, nn

from saekit.activations import DTYPES, Store, TensorSource, shuffled
from saekit.harvest import harvest
from saekit.models import Model, load_model
from saekit.types import SaekitError

SMALL = 100_000  # bytes of a shard


def files_of(store: Path) -> dict[str, str]:
    """Every file of a store with its hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir())}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of some ten sequences, so that a small harvest has many."""
    monkeypatch.setattr(importlib.import_module("saekit.harvest.store"), "SHARD_BYTES", SMALL)


@pytest.fixture(scope="module")
def stored(tiny_gpt2: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store of 6400 tokens in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("saekit.harvest.store"), "SHARD_BYTES", SMALL)
        yield harvest(
            tiny_gpt2,
            "stdlib",
            POINT,
            out=tmp_path_factory.mktemp("h") / "acts",
            tokens=6400,
            context=64,
            batch_rows=8,
        )


def bound(dtype: str, x: Tensor) -> Tensor:
    """Largest error that rounding to a stored dtype may make, element by element."""
    if dtype == "int8":
        return (x.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)).expand_as(x)
    return {"fp32": 0 * x, "bf16": x.abs() * 2**-8, "fp16": x.abs() * 2**-11 + 2**-25}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_store_gives_back_is_within_the_rounding_of_its_dtype(
    tiny_gpt2: Model, tmp_path: Path, dtype: str, small_shards: None
) -> None:
    settings: dict[str, Any] = {"tokens": 2048, "context": 64, "batch_rows": 4}
    points = [POINT, "transformer.h.0.mlp:in"]
    store = harvest(tiny_gpt2, "stdlib", points, out=tmp_path / "acts", dtype=dtype, **settings)
    live = list(harvest(tiny_gpt2, "stdlib", points, **settings))
    back = list(store.sequences(batch_rows=4))
    for a, b in zip(live, back, strict=True):
        for field in ("tokens", "documents", "mask"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
        for name in points:
            x, y = a.activations[name], b.activations[name]
            assert y.dtype == torch.float32
            assert ((x - y).abs() <= bound(dtype, x)).all(), name
            assert dtype == "fp32" or not torch.equal(x, y)  # the bound is not met by not rounding
    rows = torch.cat([b.rows(POINT) for b in back])
    assert torch.equal(store.gather(POINT, np.arange(store.n_rows)), rows)
    assert len(store.manifest["shards"]) > 1


def test_a_value_too_large_for_the_store_is_counted_as_not_finite(tmp_path: Path) -> None:
    x = torch.full((6, 8), 1e5)
    x[2:] = 1.0
    model = nn.Sequential(nn.Identity())
    for dtype, n in (("fp32", 0), ("bf16", 0), ("fp16", 2)):
        store = harvest(model, [x], ["0"], out=tmp_path / dtype, dtype=dtype, outlier=1e9)
        assert store.manifest["shards"][0]["nonfinite"] == {"0": n}, dtype


def test_rows_are_gathered_in_the_order_asked_for(stored: Store) -> None:
    every = stored.gather(POINT, np.arange(stored.n_rows))
    for rows in (range(8), [stored.n_rows - 1, 0, 0, 700], np.array([5]), []):
        assert torch.equal(stored.gather(POINT, rows), every[list(rows)])
    for rows in ([-1], [0, stored.n_rows]):
        with pytest.raises(SaekitError, match=f"is not in 0..{stored.n_rows - 1}"):
            stored.gather(POINT, rows)
    for rows in (np.ones(stored.n_rows, dtype=bool), np.array([0.7])):
        with pytest.raises(SaekitError, match="give the numbers of rows"):
            stored.gather(POINT, rows)
    with pytest.raises(SaekitError, match=f"'nowhere' is not in store.*{POINT}|'nowhere' is not in store"):
        stored.gather("nowhere", [0])


def test_shards_are_safetensors_files_and_the_manifest_says_what_they_hold(stored: Store) -> None:
    manifest = json.loads((stored.path / "manifest.json").read_text())
    assert manifest["complete"] and manifest["hook_points"] == {
        POINT: {"width": 32, "module": "transformer.h.1", "side": "out"}
    }
    assert len(manifest["shards"]) > 3
    for entry in manifest["shards"]:
        path = stored.path / entry["file"]
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        with safe_open(path, "pt") as file:  # the library's own reader accepts the file
            assert set(file.keys()) == {POINT, "mask", "kept", "tokens", "documents"}
            mask, kept = file.get_tensor("mask"), file.get_tensor("kept")
            assert torch.equal(kept, mask.nonzero()[:, 0].int())
            assert (len(mask), len(kept)) == (entry["tokens"], entry["kept"])
            assert file.get_tensor(POINT).shape == (entry["tokens"], 32)
        with path.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in header.items():
            size = {"F32": 4, "I32": 4, "U8": 1}[tensor["dtype"]]
            assert tensor["data_offsets"][0] % size == 0, name
    assert sum(e["tokens"] for e in manifest["shards"]) == 6400
    assert sorted(files_of(stored.path)) == ["manifest.json", *(e["file"] for e in manifest["shards"])]


def test_a_store_that_is_there_is_not_harvested_again_and_not_mixed_with_another(
    tiny_gpt2: Model, stored: Store
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in stored.path.iterdir()}
    settings: dict[str, Any] = {"out": stored.path, "tokens": 6400, "context": 64, "batch_rows": 8}
    harvest(tiny_gpt2, "stdlib", POINT, **settings)
    assert {p.name: p.stat().st_mtime_ns for p in stored.path.iterdir()} == before
    with pytest.raises(SaekitError, match="another settings"):
        harvest(tiny_gpt2, "stdlib", POINT, **{**settings, "tokens": 12800})
    with pytest.raises(SaekitError, match="another text"):
        harvest(tiny_gpt2, ["some other text"], POINT, **settings)
    other = copy.deepcopy(tiny_gpt2.module)
    other.transformer.h[0].mlp.c_fc.weight.data.mul_(1.01)
    with pytest.raises(SaekitError, match="another model"):
        harvest(
            load_model(other, tokenizer=tiny_gpt2.tokenizer, name="tiny-gpt2"), "stdlib", POINT, **settings
        )


HARVESTER = """
# Holds the model and runs each harvest in a child of its own, which can be killed.
import importlib, os, sys, time
import torch
torch.set_num_threads(1)  # no thread pool that a fork would lose
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from saekit.models import load_model
from saekit.harvest import harvest
importlib.import_module("saekit.harvest.store").SHARD_BYTES = 100_000
model = load_model(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.close(0)
        harvest(model, "stdlib", ["blocks.1.hook_resid_post"], out=line.strip(), tokens=24_000, context=64, batch_rows=4)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # the child stays, as a zombie at least, for as long as somebody may kill it
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_harvest_killed_at_random_moments_resumes_to_the_same_bytes(
    tiny_gpt2: Model, tmp_path: Path
) -> None:
    tiny_gpt2.module.save_pretrained(tmp_path / "model")
    tiny_gpt2.tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-P", "-c", HARVESTER, str(tmp_path / "model")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as harvester:
        assert harvester.stdin and harvester.stdout

        def run(out: Path, kill_at: int | None = None) -> int:
            harvester.stdin.write(f"{out}\n")
            child = int(harvester.stdout.readline())
            if kill_at is not None:  # so many shards, and a moment more; a time would depend on the machine
                until = time.monotonic() + 60
                while len(list(out.glob("shard-*"))) < kill_at and time.monotonic() < until:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
            harvester.stdin.write("\n")
            return int(harvester.stdout.readline())

        rng, kills, partial = random.Random(0), 0, set()
        assert harvester.stdout.readline() == "ready\n"
        assert run(tmp_path / "whole") == 0
        expected = files_of(tmp_path / "whole")
        assert len(expected) > 20
        for attempt in range(4):
            out, reached = tmp_path / f"cut{attempt}", 0
            for _ in range(3):
                reached += rng.randint(0, len(expected) // 4)
                if run(out, kill_at=reached) == -signal.SIGKILL:
                    kills += 1
                    partial.add(len(list(out.glob("shard-*"))))
            assert run(out) == 0
            assert files_of(out) == expected
        assert kills >= 5 and partial - {0}, (kills, partial)  # some of them with shards to go on from
        harvester.stdin.close()


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "gone"])
def test_a_damaged_shard_is_named_and_made_again(
    tiny_gpt2: Model, stored: Store, tmp_path: Path, damage: str, small_shards: None
) -> None:
    out = tmp_path / "acts"
    out.mkdir()
    for file in stored.path.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    bad = out / "shard-00002.safetensors"
    data = bytearray(bad.read_bytes())
    if damage == "gone":
        bad.unlink()
    elif damage == "truncated":
        bad.write_bytes(data[: len(data) // 2])
    else:
        data[-100] ^= 1
        bad.write_bytes(data)
    with pytest.raises(SaekitError, match=r"shard-00002\.safetensors"):
        Store(out)
    with pytest.warns(UserWarning, match=r"shard-00002\.safetensors .* damaged"):
        harvest(tiny_gpt2, "stdlib", POINT, out=out, tokens=6400, context=64, batch_rows=8)
    assert files_of(out) == files_of(stored.path)


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_is_a_permutation_of_any_length(seed: int) -> None:
    for n in [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65_537, 100_003]:
        whole = shuffled(np.arange(n), n, seed)
        assert np.array_equal(np.sort(whole), np.arange(n)), n
        some = np.array([n - 1, 0, n // 2])
        assert np.array_equal(shuffled(some, n, seed), whole[some])
        if n > 100:
            assert not np.array_equal(whole, shuffled(np.arange(n), n, seed + 1))
            # as far from the identity as a random permutation: |i - p(i)| is n/3 in the mean
            assert abs(np.abs(whole - np.arange(n)).mean() / n - 1 / 3) < 3 / np.sqrt(n)


def test_every_epoch_holds_every_row_once_and_batches_start_anywhere() -> None:
    n, size = 37, 10
    source = TensorSource(torch.arange(n, dtype=torch.float32)[:, None])
    batches = list(itertools.islice(source.batches(["x"], size, seed=3), 4 * n))
    rows = torch.cat(batches)[:, 0].long()
    for epoch in range(len(rows) // n):
        assert torch.equal(rows[epoch * n : (epoch + 1) * n].sort().values, torch.arange(n)), epoch
    assert not torch.equal(rows[:n], rows[n : 2 * n])
    for start in (1, 5, 50):
        assert torch.equal(next(source.batches(["x"], size, seed=3, start=start)), batches[start])


def test_the_store_is_shuffled_globally(stored: Store) -> None:
    n = stored.n_rows
    mask = torch.cat([b.mask for b in stored.sequences()])
    sequence = torch.arange(len(mask))[:, None].expand_as(mask)[mask].numpy()
    order = np.concatenate(
        list(
            itertools.islice(
                importlib.import_module("saekit.activations").shuffled_rows(n, 100, 0, 0), n // 100
            )
        )
    )
    rows = torch.cat(list(itertools.islice(stored.batches([POINT], 100, seed=0), n // 100)))
    assert torch.equal(rows, stored.gather(POINT, order))
    together = (sequence[order][1:] == sequence[order][:-1]).mean()
    sizes = np.bincount(sequence)
    chance = (sizes * (sizes - 1)).sum() / (n * (n - 1))
    assert together <= 1.5 * chance, (together, chance)
    assert (
        sequence[1:] == sequence[:-1]
    ).mean() > 20 * chance  # in the order of the text it is far from that
