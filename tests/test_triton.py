"""The GPU's kernels equal the references: by Triton's interpreter where there is no GPU (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from saekit import kernels
from saekit.kernels import backend
from saekit.kernels.adam import reference as adam_reference
from saekit.kernels.adam import triton as adam
from saekit.kernels.adam.short import restored
from saekit.kernels.encode import eager
from saekit.kernels.encode import reference as encode_reference
from saekit.kernels.encode import triton as encode
from saekit.kernels.error import eager as error_eager
from saekit.kernels.error import triton as error
from saekit.kernels.product import eager as product_eager
from saekit.kernels.product import triton as product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter, on inf - inf


def inputs(rows: int, d: int, n: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(rows + n)
    return [torch.randn(s, generator=g).to(DEVICE) for s in ((rows, d), (n, d), (n,))]


def codes(rows: int, n: int, most: int = 40) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(rows)
    counts = torch.randint(0, most, (rows,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    nnz = int(offsets[-1])
    values, indices = torch.randn(nnz, generator=g), torch.randint(0, n, (nnz,), generator=g).int()
    return offsets.to(DEVICE), indices.to(DEVICE), values.to(DEVICE)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("rows", "d", "n", "k"),
    [
        (1, 1, 1, 1),
        (5, 3, 7, 7),
        (33, 30, 300, 5),
        (3, 64, 2048, 1),
        *(pytest.param(*shape, marks=SLOW) for shape in ((65, 30, 300, 5), (6, 133, 1500, 200))),
    ],
)
def test_topk(rows: int, d: int, n: int, k: int, absolute: bool) -> None:
    of = inputs(rows, d, n)
    values, indices = encode.topk(*of, k, n, absolute, None, 0, "fp32")
    expected, at = encode_reference.topk(*of, k, n, absolute)
    assert torch.equal(indices, at)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2])
def test_ties_go_to_the_lowest_index(levels: int) -> None:
    g = torch.Generator().manual_seed(levels)
    x = torch.randint(-levels, levels + 1, (4, 600), generator=g).float().to(DEVICE)
    eye, zero = torch.eye(600, device=DEVICE), torch.zeros(600, device=DEVICE)
    for k in (1, 32, 300):
        values, indices = encode.topk(x, eye, zero, k, 600, False, None, 0, "fp32")
        expected, at = encode_reference.topk(x, eye, zero, k, 600, False)
        assert torch.equal(indices, at) and torch.equal(values, expected)


def test_where_the_first_features_say_little_of_the_others() -> None:
    x, weight, bias = inputs(5, 8, 900)
    bias[:128] = -9.0  # the first tile, whose largest is the bound for the others
    values, indices = encode.topk(x, weight, bias, 3, 900, False, None, 0, "fp32")
    expected, at = encode_reference.topk(x, weight, bias, 3, 900, False)
    assert torch.equal(indices, at)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, pytest.param(0.02, marks=SLOW), 0.5])
def test_picks_among_the_dead(share: float) -> None:
    of = inputs(20, 16, 300)
    dead = (torch.rand(300, generator=torch.Generator().manual_seed(1)) < share).to(DEVICE)
    mine = encode.topk(*of, 5, 300, False, dead, 16, "fp32")
    theirs = encode_reference.topk(*of, 5, 300, False, dead, 16)
    assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[3], theirs[3])
    torch.testing.assert_close(mine[2].relu(), theirs[2].relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("large", [1.0, 100.0])  # a row that owns the batch takes the fallback
def test_batchtopk(large: float) -> None:
    x, weight, bias = inputs(40, 16, 300)
    x[3] *= large
    for a, b in zip(
        encode.batchtopk(x, weight, bias, 4, "fp32"),
        encode_reference.batchtopk(x, weight, bias, 4),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "n", "d"), [(0, 5, 3), (1, 1, 1), (63, 20, 100), (30, 1000, 133)])
def test_products(rows: int, n: int, d: int) -> None:
    offsets, indices, values = codes(rows, n)
    weight, grad = torch.randn(n, d, device=DEVICE), torch.randn(rows, d, device=DEVICE)
    owner = torch.repeat_interleave(torch.arange(rows, device=DEVICE), offsets.diff())
    for name, given in (
        ("decode", (offsets, indices, values, weight)),
        ("sample", (offsets, indices, weight, grad)),
        ("sum_outer", (owner, indices, values, grad, n)),
    ):
        mine, theirs = getattr(product, name)(*given), getattr(product_eager, name)(*given)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefixes", [[100], [7, 20, 100]])
def test_nested_error(prefixes: list[int]) -> None:
    offsets, indices, values = codes(33, 100)
    weight, bias, target = (torch.randn(s, device=DEVICE) for s in ((100, 50), (50,), (33, 50)))
    given = (
        offsets,
        indices,
        values,
        weight,
        bias,
        target,
        prefixes,
        [0.5 + i for i in range(len(prefixes))],
    )
    for a, b in zip(error.nested_error(*given), error_eager.nested_error(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("unit", "masked"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=SLOW),
        pytest.param(True, False, marks=SLOW),
    ],
)
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, torch.uint8])
def test_adam(unit: bool, masked: bool, states: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(40, 33, generator=g), dim=-1).to(DEVICE)
    mine = [weight.clone(), *(torch.zeros_like(weight, dtype=states) for _ in range(2))]
    theirs = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    for step in range(1, 4):
        f = kernels.Factors()
        for _ in range(2):
            rows, features = (
                torch.randint(0, 50, (300,), generator=g),
                torch.randint(0, 35, (300,), generator=g),
            )
            given = (rows, features, torch.randn(300, generator=g), torch.randn(50, 33, generator=g))
            f.add(*(t.to(DEVICE) for t in given))
        options = (0.01, step, (0.9, 0.99), 1e-8, 0.7, unit, masked)
        adam.adam_step(mine[0], f, mine[1], mine[2], *options)
        adam_reference.adam_step(theirs[0], f.dense(40), theirs[1], theirs[2], *options)
    moved = (theirs[0] - weight).norm()
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.uint8: 0.3}[states]
    assert (mine[0] - theirs[0]).norm() <= max(allowed, 1e-3) * moved
    for a, b, signed in zip(mine[1:], theirs[1:], (True, False), strict=True):
        assert (restored(a, signed, torch.float32) - b).norm() <= allowed * b.norm()


@pytest.mark.parametrize("absolute", [False, True])
def test_nan_shows_in_the_values(absolute: bool) -> None:
    x, weight, bias = inputs(8, 5, 20)
    x[2, 1], bias[7] = -torch.nan, torch.inf
    values, indices = encode.topk(x, weight, bias, 3, 20, absolute, None, 0, "fp32")
    assert values[2].isnan().all() and indices[2].tolist() == [0, 1, 2]
    others = torch.arange(8) != 2
    assert (values[others, 0] == torch.inf).all() and (indices[others, 0] == 7).all()


@pytest.mark.parametrize("absolute", [False, True])
def test_groups(absolute: bool) -> None:
    of = inputs(6, 9, 280)
    values, indices = encode.topk(*of, 3, 70, absolute, None, 0, "fp32")
    expected, at = encode_reference.topk(*of, 3, 70, absolute)
    assert torch.equal(indices, at)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter lets pass what the compiler doesn't: types that depend on a branch, for one."""
    outside = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, env=outside)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels compiled" in done.stdout


def test_where_triton_fails_plain_torch_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(backend, "explain", lambda device, dtype: ("triton", "as on a GPU"))
    monkeypatch.setattr(backend, "_broken", {})
    monkeypatch.setattr(encode, "topk", broken)
    of = inputs(6, 5, 20)
    with pytest.warns(UserWarning, match="encode runs in plain torch on this GPU.*C compiler"):
        mine = backend.run("encode", "topk", of[0], *of, 3, 20, False, None, 0, "fp32")
    again = backend.run("encode", "topk", of[0], *of, 3, 20, False, None, 0, "fp32")  # and no second warning
    theirs = eager.topk(*of, 3, 20, False, None, 0, "fp32")
    assert all(torch.equal(a, b) and torch.equal(c, b) for a, b, c in zip(mine, theirs, again, strict=True))
