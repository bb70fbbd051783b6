"""Every kernel equals its reference, forward and through every gradient, and says no to what it can't do."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels import threads
from saekit.kernels.encode import cpu, eager, scan
from saekit.kernels.encode import reference as encode_reference

SHAPES = [(1, 1, 1, 1), (5, 3, 7, 2), (63, 5, 100, 7), (100, 17, 63, 63), (0, 4, 9, 3), (3, 64, 1000, 1), (65, 100, 1000, 40)]  # fmt: skip


DTYPES = [torch.float32, torch.float64]  # numba, and plain torch


def inputs(rows: int, d: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows * 1000 + n)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in ((rows, d), (n, d), (n,))]


def gradients(outputs: list[Tensor], of: list[Tensor]) -> tuple[Tensor, ...]:
    """Through all outputs at once, with random cotangents."""
    g = torch.Generator().manual_seed(7)
    total = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, of)


def same(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        tolerance = {"rtol": 2e-4, "atol": 2e-4} if a.dtype == torch.float32 else {}
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("rows", "d", "n", "k"), SHAPES)
def test_topk_equals_its_reference(
    rows: int, d: int, n: int, k: int, absolute: bool, dtype: torch.dtype
) -> None:
    of = inputs(rows, d, n, dtype)
    values, indices = kernels.topk_encode(*of, k, absolute=absolute)
    expected, at = encode_reference.topk(*of, k, n, absolute)
    assert torch.equal(indices, at)
    same((values, *gradients([values], of)), (expected, *gradients([expected], of)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "groups", "k"), [(12, 12, 1), (100, 4, 3), (1000, 8, 5), (640, 5, 128), (630, 7, 1)]
)
def test_groups_equal_their_reference(n: int, groups: int, k: int, dtype: torch.dtype) -> None:
    of = inputs(33, 20, n, dtype)
    values, indices = kernels.topk_encode(*of, k, groups=groups)
    expected, at = encode_reference.topk(*of, k, n // groups, False)
    assert torch.equal(indices, at)
    same((values, *gradients([values], of)), (expected, *gradients([expected], of)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("k_aux", [1, 32, 200])
def test_picks_among_the_dead_equal_their_reference(share: float, k_aux: int, dtype: torch.dtype) -> None:
    of = inputs(40, 20, 200, dtype)
    dead = torch.rand(200, generator=torch.Generator().manual_seed(3)) < share
    mine = kernels.topk_encode_aux(*of, 9, dead, k_aux)
    theirs = encode_reference.topk(*of, 9, 200, False, dead, k_aux)
    assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[3], theirs[3])
    same(
        (mine[0], mine[2].relu(), *gradients([mine[0], mine[2].relu()], of)),
        (theirs[0], theirs[2].relu(), *gradients([theirs[0], theirs[2].relu()], of)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "n", "k"), SHAPES)
def test_batchtopk_equals_its_reference(rows: int, d: int, n: int, k: int, dtype: torch.dtype) -> None:
    of = inputs(rows, d, n, dtype)
    offsets, indices, values = kernels.batchtopk_encode(*of, k)
    expected = encode_reference.batchtopk(*of, k)
    assert torch.equal(offsets, expected[0]) and torch.equal(indices, expected[1])
    same((values, *gradients([values], of)), (expected[2], *gradients([expected[2]], of)))


def test_batchtopk_when_one_row_owns_the_batch() -> None:
    x, weight, bias = (t.detach() for t in inputs(64, 20, 500, torch.float32))
    x[5] *= 100  # its entries alone are more than its block's share
    offsets, indices, _ = kernels.batchtopk_encode(x, weight, bias, 4)
    expected = encode_reference.batchtopk(x, weight, bias, 4)
    assert torch.equal(offsets, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [-100.0, 0.0, 1.5, 100.0])
def test_threshold_equals_its_reference(level: float, dtype: torch.dtype) -> None:
    of = inputs(63, 12, 200, dtype)
    lower = level + torch.rand(200, dtype=dtype, generator=torch.Generator().manual_seed(1))
    offsets, indices, values = kernels.threshold_encode(*of, lower)
    expected = encode_reference.threshold(*of, lower)
    assert torch.equal(offsets, expected[0]) and torch.equal(indices, expected[1])
    same((values, *gradients([values], of)), (expected[2], *gradients([expected[2]], of)))


def exact(kind: str, x: Tensor, weight: Tensor, bias: Tensor, shortlist: str) -> tuple[Tensor, ...]:
    if kind == "topk":
        return kernels.topk_encode(x, weight, bias, 16, shortlist=shortlist)
    if kind == "absolute":
        return kernels.topk_encode(x, weight, bias, 16, absolute=True, shortlist=shortlist)
    if kind == "groups":
        return kernels.topk_encode(x, weight, bias, 1, groups=16, shortlist=shortlist)
    if kind == "aux":
        return kernels.topk_encode_aux(
            x, weight, bias, 16, torch.arange(len(weight)) % 3 == 0, 8, shortlist=shortlist
        )
    if kind == "batchtopk":
        return kernels.batchtopk_encode(x, weight, bias, 16, shortlist=shortlist)
    return kernels.threshold_encode(x, weight, bias, torch.full_like(bias, 5.0), shortlist=shortlist)


KINDS = ["topk", "absolute", "groups", "aux", "batchtopk", "threshold"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["normal", "near ties", "scales", "offset", "bias rules", "tiny"])
def test_a_bf16_shortlist_changes_no_bit(kind: str, data: str) -> None:
    x, weight, bias = (t.detach() for t in inputs(130, 96, 2048, torch.float32))
    if data == "near ties":  # hundreds of features that bf16 can't tell apart
        weight[:] = weight[:8].repeat(256, 1) * (
            1 + 1e-6 * torch.randn(2048, 1, generator=torch.Generator().manual_seed(0))
        )
        bias.zero_()
    elif data == "scales":
        weight *= torch.logspace(-3, 3, 2048)[:, None]
        x *= torch.logspace(-4, 4, 130)[:, None]
    elif data == "offset":
        bias -= 40  # everything is negative
    elif data == "bias rules":  # the product changes only the last bits of the sum
        weight *= 1e-6
        bias.fill_(100.0)
    elif data == "tiny":  # squares vanish
        weight *= 1e-20
        bias.zero_()
    for mine, theirs in zip(
        exact(kind, x, weight, bias, "bf16"), exact(kind, x, weight, bias, "fp32"), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_reduced_precision_changes_no_bit(kind: str) -> None:
    of = [t.detach() for t in inputs(130, 96, 2048, torch.float32)]
    whole = exact(kind, *of, "fp32")
    torch.set_float32_matmul_precision("medium")
    try:
        for mine, theirs in zip(exact(kind, *of, "fp32"), whole, strict=True):
            assert torch.equal(mine, theirs)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [False, True])
def test_tiles_and_threads_change_no_bit(kind: str, rule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    of = [t.detach() for t in inputs(130, 96, 2048, torch.float32)]
    if rule:  # the bias rules, and the product changes the last bits of the sum only
        of[1] *= 1e-6
        of[2].fill_(100.0)
    whole = exact(kind, *of, "fp32")
    for tile, rows, n_threads in ((1 << 12, 7, 2), (1 << 15, 64, 1), (1 << 17, 1024, 2)):
        monkeypatch.setattr(cpu, "TILE", tile)
        monkeypatch.setattr(cpu, "ROWS", rows)
        monkeypatch.setattr(threads, "count", lambda n=n_threads: n)
        monkeypatch.setattr(cpu, "count", lambda n=n_threads: n)
        for mine, theirs in zip(exact(kind, *of, "fp32"), whole, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("shortlist", ["fp32", "bf16"])
def test_exact_ties_go_to_the_lowest_index(k: int, shortlist: str) -> None:
    x = torch.tensor([[1.0, 2, 2, 0, 2, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0], [8, 7, 6, 5, 4, 3, 2, 1]])
    values, indices = kernels.topk_encode(x, torch.eye(8), torch.zeros(8), k, shortlist=shortlist)
    expected, at = encode_reference.topk(x, torch.eye(8), torch.zeros(8), k, 8, False)
    assert torch.equal(indices, at) and torch.equal(values, expected)
    mine = kernels.batchtopk_encode(x, torch.eye(8), torch.zeros(8), k, shortlist=shortlist)
    for a, b in zip(mine, encode_reference.batchtopk(x, torch.eye(8), torch.zeros(8), k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("levels", [1, 3])
def test_ties_everywhere(levels: int) -> None:
    g = torch.Generator().manual_seed(levels)
    x = torch.randint(-levels, levels + 1, (50, 1000), generator=g).float()
    for k in (1, 32, 700, 1000):
        for shortlist in ("fp32", "bf16"):
            mine = kernels.topk_encode(x, torch.eye(1000), torch.zeros(1000), k, shortlist=shortlist)
            theirs = encode_reference.topk(x, torch.eye(1000), torch.zeros(1000), k, 1000, False)
            assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[0], theirs[0])


def test_the_row_by_row_fallback_is_reached_and_right() -> None:
    """A thousand copies of one feature are all within the error of bf16, more than a row has room for."""
    x, weight, bias = (t.detach() for t in inputs(9, 96, 2048, torch.float32))
    weight[:] = weight[0] + 1e-5 * torch.randn(2048, 96, generator=torch.Generator().manual_seed(0))
    products = cpu.Products(x, weight, bias * 0, "bf16")
    selection = cpu.LargestOfRow(products, 16, 2048)
    settled = []
    selection._settle_whole = lambda row, of=selection._settle_whole: (settled.append(row), of(row))
    products.sweep(selection)
    assert settled
    values, indices = selection.result()
    expected, at = kernels.topk_encode(x, weight, bias * 0, 16, shortlist="fp32")
    assert torch.equal(values, expected) and torch.equal(indices, at)


def test_a_shortlist_is_right_where_rounding_to_bf16_is_at_its_worst() -> None:
    x, bias = torch.ones(1, 2), torch.tensor([0.0, -2.5])
    weight = torch.tensor([[128.0, 129.0], [129.0, 130.0]])
    for shortlist in ("fp32", "bf16"):
        values, indices = kernels.topk_encode(x, weight, bias, 1, shortlist=shortlist)
        assert indices.item() == 0 and values.item() == 257


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_that_part_chunks_and_dead_features_go_together(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(264, 16, generator=g, dtype=dtype),
        torch.randn(22500, 16, generator=g, dtype=dtype),
    )
    dead = torch.rand(22500, generator=g) < 0.1
    out = kernels.topk_encode_aux(x, weight, torch.zeros(22500, dtype=dtype), 1, dead, 8, groups=15)
    pre = x @ weight.T
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out[0], pre.unflatten(1, (15, -1)).amax(-1), **close)
    torch.testing.assert_close(out[2], pre.masked_fill(~dead, -math.inf).topk(8).values, **close)


def test_a_few_rows_may_own_the_batch() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4096, 16, generator=g), torch.randn(2048, 16, generator=g)
    x[:1024] *= 100
    offsets, indices, values = kernels.batchtopk_encode(x, weight, torch.zeros(2048), 16, shortlist="fp32")
    cut = (x @ weight.T).flatten().topk(16 * 4096).values
    torch.testing.assert_close(values.sort(descending=True).values, cut, rtol=1e-4, atol=1e-4)
    assert offsets[1024] == offsets[-1] == len(indices)


def test_threads_that_begin_together_share_one_pool() -> None:
    code = """
import threading, torch
torch.set_num_threads(2)
from saekit import kernels
x, w, b = torch.randn(600, 16), torch.randn(4096, 16), torch.zeros(4096)
out = []
ts = [threading.Thread(target=lambda: out.append(kernels.topk_encode(x, w, b, 4))) for _ in range(8)]
[t.start() for t in ts]; [t.join() for t in ts]
assert len(out) == 8 and all(torch.equal(o[1], out[0][1]) for o in out)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_lies_in_scratch_changes_nothing() -> None:
    of = [t.detach() for t in inputs(130, 96, 2048, torch.float32)]
    before = [exact(kind, *of, "bf16") for kind in KINDS]

    def poison(*_: int) -> None:
        for kept in threads._scratch.__dict__.get("kept", {}).values():
            kept.view(torch.uint8).fill_(0xFF)  # NaN in every float

    poison()
    threads.parallel(poison, 2, 1)
    for kind, expected in zip(KINDS, before, strict=True):
        for mine, theirs in zip(exact(kind, *of, "bf16"), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_inputs_need_not_be_contiguous() -> None:
    x, weight, bias = (t.detach() for t in inputs(30, 20, 100, torch.float32))
    mine = kernels.topk_encode(
        x.T.contiguous().T, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0], 5
    )
    for a, b in zip(mine, kernels.topk_encode(x, weight, bias, 5), strict=True):
        assert torch.equal(a, b)


def test_the_first_limit_and_the_partition_bound_what_they_say() -> None:
    g = np.random.default_rng(0)
    for n, k in ((5, 2), (64, 1), (64, 64), (200, 31)):
        keys = g.standard_normal(n).astype(np.float32)
        moved, at = keys.copy(), np.arange(n, dtype=np.int32)
        scan.largest_first(moved, keys.copy(), at, n, k)
        assert set(moved[:k]) == set(np.sort(keys)[::-1][:k]) and np.array_equal(keys[at], moved)


def codes(rows: int, n: int, dtype: torch.dtype, k: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged codes, empty rows among them, features repeated within a row."""
    g = torch.Generator().manual_seed(rows + n)
    counts = torch.randint(0, k, (rows,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    nnz = int(offsets[-1])
    values = torch.randn(nnz, generator=g, dtype=dtype)
    values[::4] = 0  # what ReLU silenced has a gradient all the same
    return offsets, torch.randint(0, n, (nnz,), generator=g).int(), values.requires_grad_()


def test_bad_arguments_are_one_sentence() -> None:
    x, weight, bias = (t.detach() for t in inputs(4, 5, 12, torch.float32))
    offsets, indices, values = (t.detach() for t in codes(4, 12, torch.float32))
    target, out = torch.zeros(4, 5), torch.zeros(5)

    def nan(t: Tensor) -> Tensor:
        bad = t.clone()
        bad[2] = torch.nan
        return bad

    encode, error = kernels.topk_encode, kernels.nested_error
    grid = kernels.topk_encode(x, weight, bias, 2)[::-1]
    factors = kernels.Factors()
    factors.add(indices * 0, indices, values, nan(x))
    for call, words in (
        (lambda: encode(x[:, :4], weight, bias, 2), "x has shape (4, 4)"),
        (lambda: encode(x[0], weight, bias, 2), "x has shape (5,)"),
        (lambda: encode(x, weight, bias[:3], 2), "bias has shape (3,)"),
        (lambda: encode(x.double(), weight, bias, 2), "weight has dtype torch.float32 and x torch.float64"),
        (lambda: encode(x.to("meta"), weight, bias, 2), "weight is on cpu and x on meta"),
        (lambda: encode(x.int(), weight, bias, 2), "x has dtype torch.int32"),
        (lambda: encode(x, weight, bias, 0), "k = 0 is outside 1..n_features = 12"),
        (lambda: encode(x, weight, bias, 13), "k = 13 is outside"),
        (lambda: encode(x, weight, bias, 2, groups=5), "groups = 5 doesn't divide"),
        (lambda: encode(x, weight, bias, 2, shortlist="fp8"), "shortlist = 'fp8'"),
        (lambda: encode(nan(x), weight, bias, 2), "x holds NaN"),
        (lambda: encode(x, nan(weight), bias, 2), "weight holds NaN"),
        (lambda: encode(x, weight, nan(bias), 2), "bias holds NaN"),
        (lambda: encode(x * torch.inf, weight, bias, 2, shortlist="bf16"), "x holds NaN, Inf"),
        (lambda: encode(nan(x).double(), weight.double(), bias.double(), 2), "x holds NaN"),
        (lambda: kernels.batchtopk_encode(nan(x), weight, bias, 2), "x holds NaN"),
        (lambda: kernels.threshold_encode(x, weight, bias, bias[:2]), "lower has shape (2,)"),
        (lambda: kernels.topk_encode_aux(x, weight, bias, 2, bias[:2] > 0, 1), "dead has shape (2,)"),
        (
            lambda: kernels.sparse_decode(offsets, indices + 9, values, weight),
            "expected 0..n_features - 1 = 11",
        ),
        (lambda: kernels.topk_encode_aux(x, weight, bias, 2, bias, 1), "dead has dtype torch.float32"),
        (lambda: kernels.threshold_encode(x, weight, bias, bias.double()), "lower has dtype torch.float64"),
        (lambda: kernels.threshold_encode(x, weight, bias, nan(bias)), "lower holds NaN or Inf at 2"),
        (
            lambda: kernels.sparse_decode(offsets, indices, nan(values), weight),
            "values holds NaN or Inf at 2",
        ),
        (
            lambda: kernels.sparse_decode(offsets, indices, values, weight * torch.nan),
            "weight holds NaN or Inf at 0",
        ),
        (
            lambda: kernels.sparse_decode(offsets.int(), indices, values, weight),
            "dtype torch.int32; expected int64",
        ),
        (
            lambda: kernels.sampled_product(offsets, indices, weight, x[1:]),
            "a row of weight's width for each",
        ),
        (lambda: kernels.sparse_decode(offsets, indices.short(), values, weight), "int32 or int64"),
        (lambda: kernels.sparse_decode(offsets.to("meta"), indices, values, weight), "offsets is on meta"),
        (
            lambda: error(offsets, indices, nan(values), weight, out, target, [12]),
            "values holds NaN or Inf at 2",
        ),
        (
            lambda: error(offsets, indices, values, weight, out, nan(target), [12]),
            "target holds NaN or Inf at 2",
        ),
        (lambda: error(offsets, indices, values * 1e30, weight, out, target, [12]), "are so large"),
        (lambda: error(offsets, indices, values, weight, out, target, [12], [torch.nan]), "shares = [nan]"),
        (
            lambda: kernels.budget_error(grid[0], nan(grid[1]), weight, out, target),
            "values holds NaN or Inf at 2",
        ),
        (
            lambda: kernels.adam_step(weight, nan(weight), weight, weight, rate=1, step=1),
            "gradient holds NaN or Inf at 2",
        ),
        (
            lambda: kernels.adam_step(weight, factors, weight, weight, rate=1, step=1),
            "matrix holds NaN or Inf at 2",
        ),
        (lambda: kernels.sparse_decode(offsets[:-1], indices, values, weight), "offsets must rise"),
        (lambda: kernels.sparse_decode(offsets, indices[:1], values, weight), "indices has shape (1,)"),
        (lambda: error(offsets, indices, values, weight, out, target[:2], [12]), "target has shape (2, 5)"),
        (lambda: error(offsets, indices, values, weight, out, target, [5, 3, 12]), "prefixes = [5, 3, 12]"),
        (lambda: error(offsets, indices, values, weight, out, target, [5]), "prefixes = [5]"),
        (lambda: error(offsets, indices, values, weight, out, target, [12], [1, 2]), "shares has 2"),
        (lambda: kernels.adam_step(weight, x, weight, weight, rate=1, step=1), "gradient has shape"),
        (lambda: kernels.adam_step(weight, weight, x, weight, rate=1, step=1), "m has shape"),
        (lambda: kernels.adam_step(weight, weight, weight, weight, rate=1, step=0), "step = 0"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_plain_torch_is_exact_on_ties() -> None:
    keys = torch.randint(-3, 3, (30, 100), generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 10, 100):
        assert torch.equal(
            eager.largest(keys, k), torch.sort(keys, dim=-1, descending=True, stable=True).indices[:, :k]
        )
