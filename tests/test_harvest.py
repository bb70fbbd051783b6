"""Harvested activations are the model's own, and a store is what was harvested: demand 4 and its neighbours."""

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saekit.harvest import StreamSource, harvest
from saekit.hooks import capture, intervene
from saekit.models import Model, load_model
from saekit.types import SaekitError

POINT = "blocks.1.hook_resid_post"


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
