"""Every kernel equals its reference, forward and through every gradient."""

import pytest
import torch

from saekit.kernels import sparse_decode, topk_encode
from saekit.kernels.sparse_decode import reference as decode_reference
from saekit.kernels.topk_encode import cpu, eager, reference

SHAPES = [(1, 1, 1, 1), (5, 3, 7, 2), (63, 5, 100, 7), (100, 17, 63, 63), (0, 4, 9, 3), (3, 64, 1000, 1)]


def inputs(rows: int, d: int, n: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(rows * 1000 + n)
    shapes = ((rows, d), (n, d), (n,))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("rows", "d", "n", "k"), SHAPES)
def test_topk_encode_equals_its_reference(rows: int, d: int, n: int, k: int) -> None:
    ours, theirs = inputs(rows, d, n), inputs(rows, d, n)
    values, indices = topk_encode(*ours, k)
    expected, at = reference.topk_encode(*theirs, k)
    assert torch.equal(indices, at)
    torch.testing.assert_close(values, expected)
    cotangent = torch.randn_like(values)
    values.backward(cotangent)
    expected.backward(cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 1, 1), (5, 7, 7), (63, 100, 1), (100, 1000, 32), (0, 9, 3), (33, 4096, 65)]
)
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_selections_agree_bit_for_bit_with_a_stable_sort(rows, n, k, levels, dtype) -> None:
    g = torch.Generator().manual_seed(n + k)
    pre = torch.randn(rows, n, generator=g, dtype=dtype)
    if levels is not None:  # ties everywhere
        pre = torch.randint(-levels, levels, (rows, n), generator=g).to(dtype)
    expected = torch.sort(pre, dim=-1, descending=True, stable=True)
    for select in (cpu.select_topk, eager.sorted_topk):
        values, indices = select(pre, k)
        assert torch.equal(values, expected.values[:, :k]) and torch.equal(indices, expected.indices[:, :k])


@pytest.mark.parametrize("k", [1, 3, 8])
def test_ties_go_to_the_lowest_index(k: int) -> None:
    pre = torch.tensor([[1.0, 2, 2, 0, 2, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0], [8, 7, 6, 5, 4, 3, 2, 1]])
    x, eye = pre.clone(), torch.eye(8)
    values, indices = topk_encode(x, eye, torch.zeros(8), k)
    expected, at = reference.topk_encode(x, eye, torch.zeros(8), k)
    assert torch.equal(indices, at) and torch.equal(values, expected)
    assert indices[0].tolist() == [1, 2, 4, 0, 5, 6, 3, 7][:k]


def test_row_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = inputs(101, 6, 50)
    whole = topk_encode(x, w, b, 5)
    monkeypatch.setattr(eager, "BLOCK_ENTRIES", 50 * 7)
    for a, c in zip(whole, topk_encode(x, w, b, 5), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *a: topk_encode(*a, 3)[0], inputs(7, 5, 11))
    offsets, indices = torch.tensor([0, 2, 2, 5]), torch.tensor([3, 1, 0, 3, 10], dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    values = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(offsets, indices, v, w), (values, weight))


@pytest.mark.parametrize("counts", [[], [0], [3], [0, 4, 0, 1], [1] * 63, [0, 100, 5]])
def test_sparse_decode_equals_its_reference(counts: list[int]) -> None:
    g = torch.Generator().manual_seed(len(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    indices = torch.randint(
        13, (int(offsets[-1]),), generator=g, dtype=torch.int32
    )  # repeats within a row too
    ours = [
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for s in ((int(offsets[-1]),), (13, 6))
    ]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    got, expected = (
        sparse_decode(offsets, indices, *ours),
        decode_reference.sparse_decode(offsets, indices, *theirs),
    )
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got)
    got.backward(cotangent)
    expected.backward(cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_non_contiguous_input() -> None:
    x, w, b = inputs(8, 6, 20)
    values, indices = topk_encode(x.detach().T.contiguous().T, w.detach().T.contiguous().T, b.detach(), 4)
    expected, at = reference.topk_encode(x, w, b, 4)
    assert torch.equal(indices, at)
    torch.testing.assert_close(values, expected.detach())


@pytest.mark.parametrize(
    ("x", "k", "words"),
    [((4, 3), 2, "expected"), ((4, 5), 0, "k = 0"), ((4, 5), 12, "k = 12"), ((5,), 2, "shape")],
)
def test_bad_input_is_refused(x: tuple[int, ...], k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        topk_encode(torch.zeros(x), torch.zeros(11, 5), torch.zeros(11), k)
