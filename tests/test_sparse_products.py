"""Decoders, errors, pursuit and their gradients, against plain torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import DTYPES, codes, gradients, inputs, same
from torch import Tensor

from saekit import kernels
from saekit.kernels.budgets import reference as budgets_reference
from saekit.kernels.encode import reference as encode_reference
from saekit.kernels.error import reference as error_reference
from saekit.kernels.product import feature_sums
from saekit.kernels.product import reference as product_reference
from saekit.kernels.pursuit import reference as pursuit_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "d"), [(0, 5, 3), (1, 1, 1), (63, 20, 100), (100, 1000, 33)])
def test_decode_equals_its_reference(rows: int, n: int, d: int, dtype: torch.dtype) -> None:
    offsets, indices, values = codes(rows, n, dtype)
    weight = torch.randn(n, d, dtype=dtype, requires_grad=True)
    mine = kernels.sparse_decode(offsets, indices, values, weight)
    theirs = product_reference.decode(offsets, indices, values, weight)
    same((mine, *gradients([mine], [values, weight])), (theirs, *gradients([theirs], [values, weight])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "d"), [(0, 5, 3), (1, 1, 1), (63, 20, 100), (100, 1000, 33)])
def test_sampled_product_equals_the_dense_one(rows: int, n: int, d: int, dtype: torch.dtype) -> None:
    offsets, indices, _ = codes(rows, n, dtype)
    x, weight = (torch.randn(m, d, dtype=dtype, requires_grad=True) for m in (rows, n))
    mine = kernels.sampled_product(offsets, indices, weight, x)
    at = torch.repeat_interleave(torch.arange(rows), offsets.diff())
    theirs = (x.float() @ weight.float().T)[at, indices.long()].to(dtype) if dtype != torch.float64 else (x @ weight.T)[at, indices.long()]  # fmt: skip
    same((mine, *gradients([mine], [weight, x])), (theirs, *gradients([theirs], [weight, x])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefixes", [[100], [1, 100], [7, 20, 50, 99, 100]])
@pytest.mark.parametrize(("rows", "d"), [(0, 3), (1, 1), (63, 100), (65, 33)])
def test_nested_error_equals_its_reference(
    rows: int, d: int, prefixes: list[int], dtype: torch.dtype
) -> None:
    offsets, indices, values = codes(rows, 100, dtype)
    g = torch.Generator().manual_seed(rows)
    weight, bias, target = (
        torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in ((100, d), (d,), (rows, d))
    )
    shares = [0.5 + p for p in range(len(prefixes))]
    mine = kernels.nested_error(offsets, indices, values, weight, bias, target, prefixes, shares)
    theirs = error_reference.nested_error(offsets, indices, values, weight, bias, target, prefixes, shares)
    same(mine, theirs)
    of = [values, weight, bias, target]
    same(gradients([mine[0]], of), gradients([theirs[0]], of))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "d", "k"), [(0, 5, 3, 2), (1, 1, 1, 1), (63, 20, 100, 20), (65, 1000, 33, 7)]
)
def test_budget_error_equals_its_reference(rows: int, n: int, d: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rows)
    weight, bias, target, values = (
        torch.randn(s, generator=g, dtype=dtype).requires_grad_()
        for s in ((n, d), (d,), (rows, d), (rows, k))
    )
    indices = torch.randint(0, n, (rows, k), generator=g).int()
    for shares in ([1 / k] * k, [float(j % 3) for j in range(k)]):
        mine = kernels.budget_error(indices, values, weight, bias, target, shares)
        theirs = budgets_reference.budget_error(indices, values, weight, bias, target, shares)
        same(mine, theirs)
        of = [values, weight, bias, target]
        same(gradients([mine[0]], of), gradients([theirs[0]], of))


@pytest.mark.parametrize("shortlist", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "d", "k"), [(0, 5, 3, 2), (1, 1, 1, 1), (63, 200, 40, 9), (65, 30, 33, 50)]
)
def test_pursuit_equals_its_reference(
    rows: int, n: int, d: int, k: int, dtype: torch.dtype, shortlist: str
) -> None:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.nn.functional.normalize(
        torch.randn(n, d, generator=g, dtype=dtype), dim=-1
    ).requires_grad_()
    values, indices, residual = kernels.pursuit_encode(x, weight, k, shortlist=shortlist)
    theirs = pursuit_reference.pursue(x, weight, k)
    assert torch.equal(indices[values > 1e-4], theirs[1][values > 1e-4])
    same((values, residual), (theirs[0], theirs[2]))
    same(gradients([values, residual], [x, weight]), gradients([theirs[0], theirs[2]], [x, weight]))
    offsets = torch.arange(rows + 1) * k
    same((kernels.sparse_decode(offsets, indices.flatten(), values.flatten(), weight) + residual,), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_many_rows_do_not_stall_in_half_precision(dtype: torch.dtype) -> None:
    features = torch.zeros(10_000, dtype=torch.int32)
    assert feature_sums(features, torch.ones(10_000, dtype=dtype), 2).tolist() == [
        torch.tensor(1e4).to(dtype).item(),
        0,
    ]


def test_rows_of_many_entries_equal_their_reference() -> None:
    """The encode kernel settles them together, feature by feature."""
    x, weight, bias = inputs(150, 40, 300, torch.float32)
    values, indices = kernels.topk_encode(x, weight, bias, 100)
    expected, at = encode_reference.topk(x, weight, bias, 100, 300, False)
    assert torch.equal(indices, at)
    same((values,), (expected,))
    atoms, out = torch.randn(300, 40, requires_grad=True), torch.zeros(40, requires_grad=True)
    entries = (values.detach().flatten() * 0.01).requires_grad_()
    given = torch.arange(151) * 100, indices.flatten(), entries, atoms, out, x
    mine = kernels.nested_error(*given, [300], [1.0])
    theirs = error_reference.nested_error(*given, [300], [1.0])
    same(mine, theirs)
    of = [entries, atoms, out, x]
    same(gradients([mine[0]], of), gradients([theirs[0]], of))


def test_gradients_that_are_collected_are_the_dense_ones() -> None:
    x, weight, bias = inputs(40, 20, 200, torch.float32)
    atoms = torch.randn(200, 20, requires_grad=True)

    def loss() -> Tensor:
        dead = torch.arange(200) % 2 == 0
        values, indices, aux_values, aux_indices = kernels.topk_encode_aux(x, weight, bias, 9, dead, 4)
        offsets = torch.arange(41)
        squared, error = kernels.squared_error(
            offsets * 9, indices.flatten(), values.flatten(), atoms, bias[:20], x
        )
        aux, _ = kernels.squared_error(
            offsets * 4, aux_indices.flatten(), aux_values.flatten(), atoms, bias[:20], error
        )
        return squared.sum() + 0.3 * aux.sum()

    dense = torch.autograd.grad(loss(), [weight, atoms])
    with kernels.collect([weight, atoms]) as found:
        loss().backward()
    assert weight.grad is None and atoms.grad is None
    same((found[weight].dense(200), found[atoms].dense(200)), dense)
    loss().backward()
    same((weight.grad, atoms.grad), dense)  # outside, they arrive as ever


def operations(dtype: torch.dtype) -> dict:
    x, weight, bias = inputs(6, 5, 12, dtype)
    offsets, indices, values = codes(6, 12, dtype)
    atoms, target = (
        torch.randn(12, 5, dtype=dtype).requires_grad_(),
        torch.randn(6, 5, dtype=dtype).requires_grad_(),
    )
    out = torch.randn(5, dtype=dtype).requires_grad_()
    dead = torch.arange(12) % 2 == 0
    return {
        "topk_encode": (x, weight, bias, 3, 12, False, dead, 2, "fp32"),
        "batchtopk_encode": (x, weight, bias, 3, "fp32"),
        "threshold_encode": (x, weight, bias, torch.zeros(12, dtype=dtype), "fp32"),
        "decode": (offsets, indices, values, atoms),
        "sample": (offsets, indices, atoms.detach(), target.detach()),
        "sum_outer": (torch.zeros_like(indices).long(), indices, values.detach(), target.detach(), 12),
        "nested_error": (offsets, indices, values, atoms, out, target, [5, 12], [0.5, 1.0]),
        "budget_error": (torch.arange(12).view(6, 2).int(), x[:, :2].detach().requires_grad_(), atoms, out, target, [0.5, 1.0]),
        "budget_outer": (torch.arange(12).view(6, 2).int(), x[:, :2].detach().contiguous(), atoms.detach(), out.detach(), target.detach(), [0.5, 1.0], bias[:6].detach()),
        "pursue": (x, weight, 3, "fp32"),
        "pursue_backward": (torch.arange(12).view(6, 2).int(), x[:, :2].detach().contiguous(), weight.detach(), x.detach(), x[:, :2].detach().contiguous(), x.detach()),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(operations(torch.float32)))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.saekit, name).default, operations(dtype)[name])


def test_gradcheck_in_fp64() -> None:
    x, weight, bias = inputs(6, 5, 12)
    dead = torch.arange(12) % 2 == 0
    check = torch.autograd.gradcheck
    assert check(lambda *a: kernels.topk_encode(*a, 3)[0], (x, weight, bias))
    assert check(lambda *a: kernels.topk_encode_aux(*a, 3, dead, 2)[::2], (x, weight, bias))
    assert check(lambda *a: kernels.batchtopk_encode(*a, 3)[2], (x, weight, bias))
    assert check(lambda *a: kernels.threshold_encode(*a, torch.zeros(12).double())[2], (x, weight, bias))
    offsets, indices, values = codes(6, 12, torch.float64)
    atoms, out, target = (
        torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((12, 5), (5,), (6, 5))
    )
    assert check(lambda v, w: kernels.sparse_decode(offsets, indices, v, w), (values, atoms))
    rows = torch.randn(6, 5, dtype=torch.float64).requires_grad_()
    assert check(lambda w, r: kernels.sampled_product(offsets, indices, w, r), (atoms, rows))
    assert check(
        lambda v, w, b, t: kernels.nested_error(offsets, indices, v, w, b, t, [4, 12])[0],
        (values, atoms, out, target),
    )


def test_a_compiled_step_is_the_eager_one() -> None:
    code = """
import torch
from saekit import kernels
x, w, b, a = torch.randn(30, 8), torch.randn(40, 8).requires_grad_(), torch.zeros(40), torch.randn(40, 8).requires_grad_()
def loss(x):
    v, i = kernels.topk_encode(x, w, b, 4)
    return kernels.squared_error(torch.arange(31) * 4, i.flatten(), v.relu().flatten(), a, torch.zeros(8), x)[0].sum()
eager = loss(x); eager.backward(); g = w.grad.clone(), a.grad.clone(); w.grad = a.grad = None
compiled = torch.compile(loss, backend="aot_eager")(x); compiled.backward()
assert torch.allclose(eager, compiled) and torch.allclose(w.grad, g[0]) and torch.allclose(a.grad, g[1])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_run_where_only_torch_is(tmp_path: Path) -> None:
    """Without numba, Triton or the rest of saekit, in plain torch."""
    (tmp_path / "saekit").mkdir()
    (tmp_path / "saekit" / "__init__.py").touch()
    (tmp_path / "saekit" / "kernels").symlink_to(Path(kernels.__file__).parent)
    code = """
import sys
sys.modules.update(dict.fromkeys(("numba", "llvmlite", "triton", "jaxtyping", "transformers")))
import torch
from saekit import kernels
from saekit.kernels.backend import explain
assert explain("cpu", torch.float32)[0] == "eager", explain("cpu", torch.float32)
x, w = torch.randn(9, 5), torch.randn(20, 5).requires_grad_()
values, indices = kernels.topk_encode(x, w, torch.zeros(20), 3)
kernels.squared_error(torch.arange(10) * 3, indices.flatten(), values.flatten(), w, torch.zeros(5), x)[0].sum().backward()
kernels.adam_step(w, w.grad, torch.zeros(20, 5), torch.zeros(20, 5), rate=0.1, step=1, unit=True)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
