"""Encoding by blocks is encoding with weights that are zero outside each feature's own block."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saekit import kernels
from saekit.types import Codes

ROWS, BLOCKS, D, N = 40, 3, 16, 48
DEAD = torch.arange(N) % 5 == 0


def ranked(values: Tensor, indices: Tensor) -> Tensor:
    return Codes.from_rectangular(indices, values.clamp(min=-1e9), N).to_dense()


def sparse(offsets: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    assert all((i.diff() > 0).all() for i in indices.tensor_split(offsets[1:-1]))  # by rising index
    return Codes(offsets, indices, values, N, (ROWS,)).to_dense()


def with_dead(k_aux: int, absolute: bool = False) -> Callable[..., list[Tensor]]:
    def way(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        values, indices, aux_values, aux = kernels.topk_encode_aux(x, w, b, 5, DEAD, k_aux, absolute=absolute)
        aux_values = aux_values.where(aux_values.isfinite(), 0.0)  # -inf stands for no entry
        return [ranked(values, indices), ranked(aux_values, aux)]

    return way


WAYS: dict[str, Callable[..., list[Tensor]]] = {
    "topk": lambda *a: [ranked(*kernels.topk_encode(*a, 5))],
    "topk, more than a block has": lambda *a: [ranked(*kernels.topk_encode(*a, 20))],
    "topk of magnitude": lambda *a: [ranked(*kernels.topk_encode(*a, 5, absolute=True))],
    "groups": lambda *a: [ranked(*kernels.topk_encode(*a, 2, groups=6))],
    "topk and dead": with_dead(7),
    "more than are dead": with_dead(12),
    "topk of magnitude and dead": with_dead(9, absolute=True),
    "batchtopk": lambda *a: [sparse(*kernels.batchtopk_encode(*a, 4))],
    "batchtopk, more than a block has": lambda *a: [sparse(*kernels.batchtopk_encode(*a, 18))],
    "threshold": lambda *a: [sparse(*kernels.threshold_encode(*a, torch.full((N,), 0.7, dtype=a[0].dtype)))],
}


def entry() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, BLOCKS, D, generator=g, dtype=torch.float64)
    w = torch.randn(N, D, generator=g, dtype=torch.float64) * (1 + torch.arange(N)[:, None] / N)
    return x, w, torch.randn(N, generator=g, dtype=torch.float64) / 4


def widened(w: Tensor) -> Tensor:
    """The weights over all columns, zero outside the block of their feature."""
    return torch.block_diag(*w.split(N // BLOCKS))


@pytest.mark.parametrize("way", WAYS)
def test_blocks_equal_weights_that_are_zero_elsewhere(way: str) -> None:
    results = []
    for wide in (False, True):
        x, w, b = (t.requires_grad_() for t in entry())
        out = WAYS[way](x.flatten(1), widened(w), b) if wide else WAYS[way](x, w, b)
        weigh = torch.linspace(1, 2, ROWS * N, dtype=x.dtype).view(ROWS, N)
        torch.stack([(dense * weigh).sum() for dense in out]).sum().backward()
        results.append([*out, x.grad, w.grad, b.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_collected_gradients_are_the_dense_ones() -> None:
    grads = []
    for collected in (False, True):
        x, w, b = (t.float().detach().requires_grad_() for t in entry())
        with kernels.collect([w] if collected else []) as factors:
            values, _ = kernels.topk_encode(x, w, b, 5)
            (values.relu() * torch.linspace(1, 2, 5)).sum().backward()
        assert (w.grad is None) == collected  # sparse to the end
        grads.append(factors[w].dense(N) if collected else w.grad)
    torch.testing.assert_close(*grads)


def test_what_cannot_be_shared_out_is_one_sentence() -> None:
    x, w, b = entry()
    with pytest.raises(ValueError, match="n_features = 47"):
        kernels.topk_encode(x, w[1:], b[1:], 2)
    with pytest.raises(ValueError, match="groups = 4 can't be shared out among 3 blocks"):
        kernels.topk_encode(x, w, b, 1, groups=4)
    with pytest.raises(ValueError, match="x has shape"):
        kernels.topk_encode(x[..., 1:].contiguous(), w, b, 2)
