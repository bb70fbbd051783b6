"""Harvested activations are the model's own, and a store is what was harvested: demand 4 and its neighbours."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from saekit import stdlib
from saekit.activations import DTYPES, Store, TensorSource, shuffled
from saekit.harvest import StreamSource, harvest
from saekit.hooks import capture, intervene
from saekit.models import Model, load_model
from saekit.tokens import Special, documents
from saekit.types import SaekitError

POINT = "blocks.1.hook_resid_post"
SMALL = 100_000  # bytes of a shard
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
# hook point -> the module that holds it, and the side
POINTS = {
    "blocks.0.hook_resid_pre": ("transformer.h.0", "in"),
    "blocks.1.hook_resid_post": ("transformer.h.1", "out"),
    "blocks.2.hook_resid_mid": ("transformer.h.2.ln_2", "in"),
    "blocks.1.hook_attn_out": ("transformer.h.1.attn", "out"),
    "blocks.2.hook_mlp_out": ("transformer.h.2.mlp", "out"),
    "transformer.h.1.mlp": ("transformer.h.1.mlp", "out"),
    "transformer.h.1.mlp:in": ("transformer.h.1.mlp", "in"),
    "transformer.h.2:out": ("transformer.h.2", "out"),
    "blocks.0.mlp.c_fc": ("transformer.h.0.mlp.c_fc", "out"),
    "transformer.ln_f": ("transformer.ln_f", "out"),
}


def by_hand(model: Model, path: str, side: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a hand-written forward hook sees in a whole forward pass, and the pass's logits."""
    seen: list[Tensor] = []

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).clone())

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    module = model.module.get_submodule(path)
    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with torch.no_grad():
        logits = model.module(**inputs).logits
    handle.remove()
    return seen[0], logits


def rows_of_tokens(rows: int, padding: str, seq: int = 12) -> dict[str, Tensor]:
    """Random token rows of different lengths, padded with GPT-2's end of text on one side."""
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 4096, (rows, seq), generator=g)
    if padding == "none":
        return {"input_ids": ids}
    lengths = torch.randint(4, seq, (rows, 1), generator=g)
    place = torch.arange(seq)[None]
    attention = (place < lengths if padding == "right" else place >= seq - lengths).long()
    return {"input_ids": ids * attention, "attention_mask": attention}


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


# what the model gave


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("batch", [1, 8])
def test_activations_equal_a_hand_written_hook_bit_for_bit(
    tiny_gpt2: Model, name: str, padding: str, batch: int
) -> None:
    given = rows_of_tokens(8, padding)
    items = [{key: value[i : i + batch] for key, value in given.items()} for i in range(0, 8, batch)]
    batches = list(harvest(tiny_gpt2, items, [name]))
    assert len(batches) == len(items)
    for item, got in zip(items, batches, strict=True):
        expected, _ = by_hand(tiny_gpt2, *POINTS[name], item)
        assert torch.equal(got.activations[name], expected)


@pytest.mark.parametrize(
    "name", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "transformer.h.2.mlp:in"]
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_with_hooks_equal_those_without(tiny_gpt2: Model, name: str, padding: str) -> None:
    given = rows_of_tokens(8, padding)
    with torch.no_grad():
        plain = tiny_gpt2.module(**given).logits
    logits: list[Tensor] = []
    found = capture(lambda: logits.append(tiny_gpt2.logits(given)), {name: tiny_gpt2.site(name)}, stop=False)
    assert torch.equal(logits[0], plain)
    assert torch.equal(found[name], next(iter(harvest(tiny_gpt2, [given], [name]))).activations[name])
    batch, hooked, _ = next(harvest(tiny_gpt2, [given], [name]).with_logits())
    assert torch.equal(hooked, plain)
    assert torch.equal(batch.activations[name], found[name])


def test_hooks_are_gone_afterwards_however_the_pass_ended(tiny_gpt2: Model) -> None:
    site = tiny_gpt2.site(POINT)

    def fail(_x: Tensor) -> None:
        raise RuntimeError("in a hook")

    capture(lambda: tiny_gpt2(rows_of_tokens(2, "none")), {POINT: site})
    with pytest.raises(RuntimeError, match="in a hook"), intervene([(site, fail)]):
        tiny_gpt2(rows_of_tokens(2, "none"))
    for module in tiny_gpt2.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("names", "runs"),
    [
        (["blocks.0.hook_resid_post"], "transformer.h.0"),
        (["blocks.1.hook_resid_pre"], "transformer.h.0"),
        (["blocks.1.hook_resid_post"], "transformer.h.1"),
        (["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"], "transformer.h.1"),
        (["transformer.h.1.attn", "transformer.h.0.mlp:in"], "transformer.h.1.attn"),
    ],
)
def test_modules_after_the_last_hook_point_do_not_run(tiny_gpt2: Model, names: list[str], runs: str) -> None:
    calls: dict[str, int] = {}

    def count(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[path] = calls.get(path, 0) + 1

        return hook

    handles = [m.register_forward_hook(count(p)) for p, m in tiny_gpt2.module.named_modules() if p]
    try:
        list(harvest(tiny_gpt2, [rows_of_tokens(4, "none"), rows_of_tokens(3, "right")], names))
    finally:
        for handle in handles:
            handle.remove()
    paths = [f"transformer.h.{i}" for i in range(3)] + [
        "transformer.h.1.attn",
        "transformer.h.1.mlp",
        "transformer.ln_f",
        "lm_head",
    ]
    order = [
        "transformer.h.0",
        "transformer.h.1.attn",
        "transformer.h.1.mlp",
        "transformer.h.1",
        "transformer.h.2",
        "transformer.ln_f",
        "lm_head",
    ]
    # the hook that ends the pass comes before or after this test's own on the same module
    expected = dict.fromkeys(order[: order.index(runs)], 2)
    assert {p: calls[p] for p in paths if p in calls and p != runs} == expected
    assert "lm_head" not in calls


def test_several_hook_points_come_from_one_pass(tiny_gpt2: Model) -> None:
    given = rows_of_tokens(8, "left")
    passes: list[int] = []
    handle = tiny_gpt2.module.transformer.wte.register_forward_hook(lambda *_: passes.append(1))
    try:
        (batch,) = harvest(tiny_gpt2, [given], list(POINTS))
    finally:
        handle.remove()
    assert len(passes) == 1
    assert list(batch.activations) == list(POINTS)
    for name, (path, side) in POINTS.items():
        assert torch.equal(batch.activations[name], by_hand(tiny_gpt2, path, side, given)[0]), name


def test_a_later_module_that_writes_in_place_does_not_change_what_was_captured() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    (batch,) = harvest(module, [x], ["0", "2"])
    with torch.no_grad():
        assert torch.equal(batch.activations["0"][:, 0], module[0](x))
    assert (batch.activations["0"] < 0).any()


def test_heads_and_flattened_positions_become_one_vector_per_position(tiny_gpt2: Model) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.heads, self.flat = nn.Embedding(50, 6), nn.Identity(), nn.Identity()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            self.heads(x.unflatten(-1, (2, 3)))
            return self.flat(x.flatten(0, 1))

    ids = torch.arange(20).view(4, 5)
    toy = Toy()
    (batch,) = harvest(toy, [ids], ["embed", "heads", "flat"])
    for name in ("heads", "flat"):
        assert torch.equal(batch.activations[name], batch.activations["embed"]), name
    with pytest.raises(SaekitError, match="positions"):
        list(
            harvest(
                nn.Sequential(nn.Identity(), nn.Flatten(1), nn.Linear(6, 2)),
                [torch.randn(4, 3, 2)],
                ["0", "2"],
            )
        )


# the mask


def test_the_mask_leaves_out_special_tokens_padding_and_outliers(tiny_gpt2: Model) -> None:
    loud = 7
    module = copy.deepcopy(tiny_gpt2.module)
    module.transformer.wte.weight.data[loud] *= 1000
    model = load_model(module, tokenizer=tiny_gpt2.tokenizer, name="loud")
    given = rows_of_tokens(8, "right", seq=24)
    given["input_ids"][:, 2] = loud
    given["input_ids"][:, 1] = tiny_gpt2.tokenizer.eos_token_id
    given["input_ids"][given["attention_mask"] == 0] = 9  # padding need not be a special token
    (batch,) = harvest(model, [given], [POINT])
    ids, attention = given["input_ids"], given["attention_mask"].bool()
    assert torch.equal(batch.mask, attention & (ids != 0) & (ids != loud))
    norms = batch.activations[POINT].norm(dim=-1)
    assert norms[ids == loud].min() > 100 * norms[batch.mask].max()
    assert torch.equal(batch.rows(POINT), batch.activations[POINT][batch.mask])
    assert (batch.documents[~attention] == -1).all()
    assert torch.equal(batch.documents[attention], torch.arange(8)[:, None].expand(8, 24)[attention])
    (kept,) = harvest(model, [given], [POINT], outlier=1e9)
    assert torch.equal(kept.mask, attention & (ids != 0))


def test_packed_rows_mask_the_first_token_and_the_separators(tiny_gpt2: Model) -> None:
    stream = harvest(
        tiny_gpt2,
        ["import os\n", "x = 1<|endoftext|>\n", "def f():\n    return 2\n"],
        [POINT],
        context=64,
        outlier=1e9,
    )
    (batch,) = stream
    text = [tiny_gpt2.tokenizer.decode(batch.tokens[0][batch.mask[0]])]
    assert text == ["import os\nx = 1\ndef f():\n    return 2\n"]
    eos = tiny_gpt2.tokenizer.eos_token_id
    assert torch.equal(batch.mask, (batch.tokens != eos) & (batch.documents >= 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_shown_and_not_masked_as_outliers(
    tiny_gpt2: Model, tmp_path: Path, value: float
) -> None:
    module = copy.deepcopy(tiny_gpt2.module)
    module.transformer.wte.weight.data[7, 3] = value
    given = rows_of_tokens(4, "none")
    given["input_ids"][1, 5] = 7
    store = harvest(load_model(module), [given], ["transformer.wte"], out=tmp_path / "acts")
    (batch,) = store.sequences()
    assert batch.mask.all()
    assert store.manifest["shards"][0]["nonfinite"] == {"transformer.wte": 1}
    with pytest.raises(SaekitError, match=r"NaN or Inf at 'transformer.wte' \(1 rows"):
        store.check("transformer.wte")
    with pytest.raises(SaekitError, match="NaN or Inf"):
        next(
            StreamSource(harvest(load_model(module), [given], ["transformer.wte"])).batches(
                ["transformer.wte"], 4, seed=0
            )
        )


# the store


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


# resuming


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


# order


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


def test_a_live_stream_gives_the_rows_of_the_text_and_the_same_again(tiny_gpt2: Model) -> None:
    stream = harvest(tiny_gpt2, "stdlib", POINT, tokens=2048, context=64)
    every = torch.cat([b.rows(POINT) for b in stream])
    source = StreamSource(stream, buffer_bytes=600 * 4 * 32)
    rows = torch.cat(list(itertools.islice(source.batches([POINT], 100, seed=0), 10)))
    known = {row.numpy().tobytes() for row in every}
    assert all(row.numpy().tobytes() in known for row in rows)
    assert torch.equal(next(source.batches([POINT], 100, seed=0, start=7)), rows[700:800])
    assert not torch.equal(next(source.batches([POINT], 100, seed=1)), rows[:100])


@pytest.mark.parametrize("points", [1, 4])
def test_a_live_stream_holds_no_more_bytes_than_stated(tiny_gpt2: Model, points: int) -> None:
    """However many hook points: what is read before the first batch fits the bound, rows of one pass aside."""
    names = [f"blocks.{i}.hook_{where}" for i in (0, 1) for where in ("resid_pre", "mlp_out")][:points]
    stream = harvest(tiny_gpt2, "stdlib", names, tokens=4096, context=64, batch_rows=2)
    source, read = StreamSource(stream, buffer_bytes=1024 * 4 * 32), []
    source._rows = lambda h, n: (read.append(rows) or rows for rows in StreamSource._rows(source, h, n))
    assert len(next(source.batches(names, 64, seed=0))) == 64
    rows = 1024 // points
    assert rows <= sum(len(part) for part in read) <= rows + 2 * 64


def test_a_live_stream_without_a_single_unmasked_token_says_so(tiny_gpt2: Model) -> None:
    stream = harvest(tiny_gpt2, [torch.zeros(2, 8, dtype=torch.int64)], POINT)
    with pytest.raises(SaekitError, match="gives 0 unmasked tokens"):
        next(StreamSource(stream).batches([POINT], 4, seed=0))


# texts


SNIPPETS = [
    "import os\nprint(os.sep)\n",
    "class A:\n    x = 1\n",
    "def f(a, b):\n    return a + b\n",
    "for i in range(9):\n    pass\n",
]


def write_file(folder: Path) -> Any:
    (folder / "text.py").write_text(SNIPPETS[0])
    return folder / "text.py", SNIPPETS[:1]


def write_folder(folder: Path) -> Any:
    for i, text in enumerate(SNIPPETS):
        (folder / "src" / f"d{i}").mkdir(parents=True)
        (folder / "src" / f"d{i}" / "a.py").write_text(text)
    (folder / "src" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "src" / ".hidden").write_text("not this")
    return folder / "src", SNIPPETS


def write_saved_dataset(folder: Path) -> Any:
    import datasets

    datasets.Dataset.from_dict({"id": [1, 2, 3, 4], "text": SNIPPETS}).save_to_disk(folder / "data")
    return str(folder / "data"), SNIPPETS


def write_jsonl(folder: Path) -> Any:
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(SNIPPETS))
    )
    return str(folder / "data.jsonl"), SNIPPETS


def write_csv(folder: Path) -> Any:
    (folder / "data.csv").write_text("n,code\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(SNIPPETS)))
    return str(folder / "data.csv"), SNIPPETS


@pytest.mark.parametrize(
    "write", [lambda _: (SNIPPETS, SNIPPETS), lambda _: (iter(SNIPPETS), SNIPPETS), write_file, write_folder, write_saved_dataset, write_jsonl, write_csv],
    ids=["list", "iterator", "file", "folder", "saved data set", "jsonl", "csv"],
)  # fmt: skip
def test_every_kind_of_text_is_read_whole_one_document_per_row(
    tiny_gpt2: Model, tmp_path: Path, write: Callable[[Path], Any]
) -> None:
    text, expected = write(tmp_path)
    stream = harvest(tiny_gpt2, text, POINT, isolate=True, split="all", context=32, outlier=1e9, batch_rows=3)
    rows = [(b.tokens[r], b.documents[r], b.mask[r]) for b in stream for r in range(len(b.mask))]
    assert len(rows) == len(expected)
    found = [tiny_gpt2.tokenizer.decode(tokens[mask]) for tokens, _, mask in rows]
    assert sorted(found) == sorted(expected)
    for i, (_tokens, owners, mask) in enumerate(rows):
        assert set(owners[mask].tolist()) == {i}
        assert set(owners.tolist()) <= {i, -1}


def test_packed_rows_hold_several_documents_and_lose_nothing_between_them(tiny_gpt2: Model) -> None:
    docs = [d.text[:2000] for d in itertools.islice(documents("stdlib", "train"), 12)]
    stream = harvest(tiny_gpt2, docs, POINT, context=64, tokens=None)
    tokens = torch.cat([b.tokens for b in stream])
    owners = torch.cat([b.documents for b in stream])
    special = Special.of(tiny_gpt2.tokenizer)
    assert (tokens[:, 0] == special.prefix[0]).all()
    packed = tokens[:, 1:].reshape(-1).tolist()
    expected: list[int] = []
    for doc in docs:
        expected += [
            *tiny_gpt2.tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"],
            *special.separator,
        ]
    assert packed == expected[: len(packed)]
    assert len(expected) - len(packed) < 63  # at most one row is not filled
    assert (owners[:, 1:].reshape(-1).diff() >= 0).all()
    assert any(len(set(row.tolist())) > 1 for row in owners)


def test_tokens_limits_what_is_read_to_whole_rows(tiny_gpt2: Model) -> None:
    for wanted, rows in ((1, 1), (64, 1), (65, 2), (64 * 21, 21)):
        stream = harvest(tiny_gpt2, "stdlib", POINT, tokens=wanted, context=64, batch_rows=8)
        assert sum(len(b.mask) for b in stream) == rows


def test_the_split_of_a_named_text_is_a_partition_that_does_not_depend_on_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    sides = {}
    for name in ("data.jsonl", "./data.jsonl", str(tmp_path / "data.jsonl")):
        sides[name] = [[d.text for d in documents(name, split)] for split in ("train", "held_out", "all")]
    train, held_out, every = sides["data.jsonl"]
    assert sorted(train + held_out) == sorted(every) == sorted(f"document {i}" for i in range(200))
    assert 3 <= len(held_out) <= 30  # one in sixteen
    assert all(side == sides["data.jsonl"] for side in sides.values())


def test_the_standard_library_is_split_by_family() -> None:
    train, held_out = stdlib.files("train"), stdlib.files("held_out")
    assert sorted(train + held_out) == stdlib.files("all")
    assert len(train) > 5 * len(held_out) > 0
    assert not {stdlib.family(n) for n in train} & {stdlib.family(n) for n in held_out}
    assert not [n for n in train + held_out if "site-packages" in n]


CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import what?"}, {"role": "assistant", "content": "import os"}],
    [{"role": "user", "content": "user"}, {"role": "assistant", "content": "x = 1"}, {"role": "user", "content": "and"}, {"role": "assistant", "content": "y = 2"}],
]  # fmt: skip


@pytest.fixture
def chatty(tiny_gpt2: Model) -> Model:
    """The tiny GPT-2 with a tokenizer that has a chat template."""
    tokenizer = copy.deepcopy(tiny_gpt2.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return load_model(tiny_gpt2.module, tokenizer=tokenizer, name="chatty")


@pytest.mark.parametrize("roles", [None, ("assistant",), ("user", "system")])
@pytest.mark.parametrize("source", ["list", "data set"])
def test_of_a_chat_only_the_roles_asked_for_count(
    chatty: Model, tmp_path: Path, roles: tuple[str, ...] | None, source: str
) -> None:
    text: Any = CHATS
    if source == "data set":
        text = tmp_path / "chats.jsonl"
        text.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    stream = harvest(chatty, text, POINT, roles=roles, isolate=True, split="all", outlier=1e9)
    rows = [(b.tokens[r], b.mask[r]) for b in stream for r in range(len(b.mask))]
    for chat, (tokens, mask) in zip(CHATS, rows, strict=True):
        said = [f"<{m['role']}>\n{m['content']}\n" for m in chat if roles is None or m["role"] in roles]
        assert chatty.tokenizer.decode(tokens[mask]) == "".join(said)
        whole = chatty.tokenizer.decode(tokens, skip_special_tokens=True)
        assert whole == "".join(f"<{m['role']}>\n{m['content']}\n" for m in chat)  # the model reads it all


def test_one_chat_by_itself_is_a_text_and_a_bad_one_is_refused(chatty: Model, tiny_gpt2: Model) -> None:
    (batch,) = harvest(chatty, CHATS[0], POINT, roles=["assistant"], isolate=True, outlier=1e9)
    assert chatty.tokenizer.decode(batch.tokens[0][batch.mask[0]]) == "<assistant>\nimport os\n"
    with pytest.raises(SaekitError, match="no chat template"):
        list(harvest(tiny_gpt2, CHATS, POINT))
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(SaekitError, match="writes message 1 of a chat differently"):
        list(harvest(chatty, CHATS, POINT, roles=["user"]))
    chatty.tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(SaekitError, match="no system message"):
        list(harvest(chatty, CHATS, POINT))


@pytest.mark.parametrize("form", ["tensor", "list of batches", "list of rows"])
def test_token_rows_are_taken_as_they_are(tiny_gpt2: Model, form: str) -> None:
    ids = rows_of_tokens(6, "none")["input_ids"]
    ids[2, 3] = 0
    text: Any = {"tensor": ids, "list of batches": [ids[:4], ids[4:]], "list of rows": list(ids)}[form]
    batches = list(harvest(tiny_gpt2, text, POINT, batch_rows=4))
    assert [len(b.mask) for b in batches] == ([1] * 6 if form == "list of rows" else [4, 2])
    assert torch.equal(torch.cat([b.tokens for b in batches]), ids)
    assert torch.equal(torch.cat([b.mask for b in batches]), ids != 0)
    for b in batches:
        expected, _ = by_hand(tiny_gpt2, "transformer.h.1", "out", {"input_ids": b.tokens})
        assert torch.equal(b.activations[POINT], expected)
    assert torch.equal(torch.cat([b.documents for b in batches])[:, 0], torch.arange(6))


def test_pixels_are_taken_as_they_are(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    pixels = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        states = vit(pixels, output_hidden_states=True).hidden_states
    stream = harvest(vit, pixels, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], batch_rows=6)
    (batch,) = stream
    for x in batch.activations.values():
        assert torch.equal(x, states[1])
    assert batch.mask.shape == (6, 17) and batch.mask.all() and batch.tokens is None
    assert torch.equal(batch.documents, torch.arange(6)[:, None].expand(6, 17))
    store = harvest(vit, [pixels[:3], pixels[3:]], "blocks.0.hook_resid_post", out=tmp_path / "acts")
    back = torch.cat([b.activations["blocks.0.hook_resid_post"] for b in store.sequences()])
    assert torch.allclose(back, states[1], atol=1e-6)


def test_rows_of_different_lengths_do_not_go_into_one_store(tiny_gpt2: Model, tmp_path: Path) -> None:
    texts = [torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)]
    assert [b.mask.shape[1] for b in harvest(tiny_gpt2, texts, POINT)] == [8, 9]
    with pytest.raises(SaekitError, match="9 positions and the rows before it 8"):
        harvest(tiny_gpt2, texts, POINT, out=tmp_path / "acts")


# speed


TIMER = """
import json, shutil, statistics, sys, time
import torch
from saekit.harvest import harvest
from saekit.models import load_model

folder, dtype, tokens, point = sys.argv[1], sys.argv[2], 262_144, "blocks.1.hook_resid_post"
model = load_model("code-lm")
rows = [batch.tokens for _, batch in harvest(model, "stdlib", point, tokens=tokens).inputs()]

class Stop(Exception):
    pass

def stop(*_):
    raise Stop

def bare(ids):
    handle = model.module.transformer.h[1].register_forward_hook(stop)
    with torch.no_grad():
        try:
            model.module(input_ids=ids)
        except Stop:
            pass
    handle.remove()

def timed(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began

def bare_pass():
    for ids in rows:
        bare(ids)

def harvest_once(turn):
    harvest(model, "stdlib", point, out=f"{folder}-{turn}", tokens=tokens, dtype=dtype)

bare_pass()  # warms up
bares, harvests = [], []
for turn in range(5):  # in turns, each alone on the machine
    bares.append(timed(bare_pass))
    harvests.append(timed(lambda: harvest_once(turn)))
    shutil.rmtree(f"{folder}-{turn}")
print(json.dumps({"tokens": tokens, "bare": statistics.median(bares), "harvest": statistics.median(harvests)}))
"""


@pytest.mark.slow  # a ratio of times is only as steady as the machine
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_harvesting_to_disk_costs_at_most_a_tenth_more_than_the_bare_truncated_forward(
    tmp_path: Path, dtype: str
) -> None:
    # in a process of its own: the shape checks of these tests would be timed as well
    command = [sys.executable, "-P", "-W", "ignore", "-c", TIMER, str(tmp_path / "acts"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    t = json.loads(done.stdout.splitlines()[-1])
    ratio = t["harvest"] / t["bare"]
    print(
        f"\nharvest to {dtype} on disk / bare truncated forward: {ratio:.3f} ({t['tokens'] / t['harvest']:,.0f} tokens/s)"
    )
    assert ratio <= 1.10


# texts that are given


def test_an_endless_text_is_read_no_further_than_asked(tiny_gpt2) -> None:
    read = 0

    def lines():
        nonlocal read
        while True:
            read += 1
            yield f"def f{read}(x):\n    return x + {read}\n" * 20

    stream = harvest(tiny_gpt2, lines(), POINT, tokens=256, context=64)
    first, again = ([batch.tokens for batch in stream] for _ in range(2))
    assert sum(t.numel() for t in first) == 256
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert read < 300


@pytest.mark.parametrize("kind", ["dataset", "iterable", "dict"])
def test_data_set_objects_are_texts(kind: str, tiny_gpt2, tmp_path: Path) -> None:
    import datasets

    texts = [f"import os  # {i}\n" * 30 for i in range(40)]
    data = datasets.Dataset.from_dict({"id": list(range(40)), "text": texts})
    given = {
        "dataset": data,
        "iterable": data.to_iterable_dataset(),
        "dict": datasets.DatasetDict(train=data),
    }
    same = harvest(tiny_gpt2, texts, POINT, tokens=512, context=64)
    mine = harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64)
    for a, b in zip(same, mine, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.activations[POINT], b.activations[POINT])
    store = harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64, out=tmp_path / "acts")
    assert store.manifest["complete"]
    if kind == "iterable":  # what has no fingerprint can't be told from another
        with pytest.raises(SaekitError, match="can't be compared"):
            harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64, out=tmp_path / "acts")
        return
    assert (
        harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64, out=tmp_path / "acts").n_rows
        == store.n_rows
    )


def test_a_mapping_is_one_input_of_the_model(tiny_gpt2) -> None:
    encoded = tiny_gpt2.tokenizer(["import os"] * 2, return_tensors="pt", return_token_type_ids=False)
    (batch,) = harvest(tiny_gpt2, encoded, POINT)
    assert torch.equal(batch.tokens, encoded["input_ids"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (5, "text is of type int"),
        (["a", 5], "text item 1 is of type int"),
        ([], "is empty"),
        (iter([]), "is empty"),
    ],
)
def test_what_is_no_text_is_refused(text: Any, words: str, tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match=words):
        harvest(tiny_gpt2, text, POINT)


def test_a_text_without_rows_leaves_no_folder(tiny_gpt2, tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("import os\n")
    with pytest.raises(SaekitError, match="side of its split"):
        harvest(tiny_gpt2, tmp_path / "b.py", POINT, split="held_out", out=tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_tensors_are_read_no_further_than_asked_and_not_kept(mlp: nn.Module, tmp_path: Path) -> None:
    read = []

    def rows():
        for i in itertools.count():
            read.append(i)
            yield torch.randn(16, 8)

    store = harvest(mlp, rows(), ["0"], tokens=100, out=tmp_path / "acts")
    assert sum(entry["tokens"] for entry in store.manifest["shards"]) == 112 and len(read) <= 9


def test_the_text_column_is_never_guessed_among_several(tiny_gpt2, tmp_path: Path) -> None:
    import datasets

    rows = {"id": ["a", "b"], "content": ["import os\n" * 60] * 2}
    same = list(harvest(tiny_gpt2, rows["content"], POINT, tokens=64, context=64))
    mine = list(harvest(tiny_gpt2, datasets.Dataset.from_dict(rows), POINT, tokens=64, context=64))
    assert torch.equal(same[0].tokens, mine[0].tokens)
    listed = list(harvest(tiny_gpt2, [{"text": t} for t in rows["content"]], POINT, tokens=64, context=64))
    assert torch.equal(same[0].tokens, listed[0].tokens)
    for columns, words in (
        ({"a": ["x"], "b": ["y"]}, "several text columns"),
        ({"text": [["x"]]}, "row 0 of the data set given has a list"),
    ):
        with pytest.raises(SaekitError, match=words):
            list(harvest(tiny_gpt2, datasets.Dataset.from_dict(columns), POINT))
    blank = datasets.Dataset.from_dict({"text": [None, *rows["content"]]})
    assert torch.equal(
        next(iter(harvest(tiny_gpt2, blank, POINT, tokens=64, context=64))).tokens, same[0].tokens
    )


def test_integers_are_no_activations(tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match=r"gives torch.int64, no activations"):
        list(harvest(tiny_gpt2, ["import os\n" * 60], "transformer.wte:in", tokens=64))


def test_roles_choose_among_chats(tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match=r"roles = \['user'\] choose among the messages"):
        list(harvest(tiny_gpt2, ["import os\n" * 60], POINT, tokens=64, roles="user"))
