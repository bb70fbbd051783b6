"""Row-wise selection of the k largest on the CPU: one pass with a running threshold, in numba."""

import numba
import torch

from saekit.kernels.threads import use_torch_threads


@numba.njit(inline="always")
def _sift_down(values, indices, at, size):
    """Restore the heap below ``at``: its root is what goes first (smallest value, then largest index)."""
    value, index = values[at], indices[at]
    child = 2 * at + 1
    while child < size:
        other = child + 1
        if other < size and (
            values[other] < values[child]
            or (values[other] == values[child] and indices[other] > indices[child])
        ):
            child = other
        if values[child] > value or (values[child] == value and indices[child] < index):
            break
        values[at], indices[at] = values[child], indices[child]
        at = child
        child = 2 * at + 1
    values[at], indices[at] = value, index


@numba.njit(parallel=True, cache=True, nogil=True)
def _select(pre, values, indices):
    rows, n = pre.shape
    k = values.shape[1]
    for row in numba.prange(rows):
        heap, at = values[row], indices[row]
        for i in range(k):
            heap[i], at[i] = pre[row, i], i
        for i in range(k // 2 - 1, -1, -1):
            _sift_down(heap, at, i, k)
        threshold = heap[0]
        for i in range(k, n):
            # a later index loses against an equal value, so only a larger one enters
            if pre[row, i] > threshold:
                heap[0], at[0] = pre[row, i], i
                _sift_down(heap, at, 0, k)
                threshold = heap[0]
        for size in range(k - 1, 0, -1):
            # the root is the least of what is left: it goes last
            heap[0], heap[size] = heap[size], heap[0]
            at[0], at[size] = at[size], at[0]
            _sift_down(heap, at, 0, size)


def select_topk(pre, k):
    """Values and int64 indices of the k largest of each row, by falling value, ties to the lowest index.

    pre [rows, n], contiguous, fp32 or fp64. A heap of the k best so far gives the threshold; after
    the first few hundred entries hardly any passes it, so the cost is one comparison an entry.
    """
    values = torch.empty(pre.shape[0], k, dtype=pre.dtype)
    indices = torch.empty(pre.shape[0], k, dtype=torch.int64)
    use_torch_threads()
    _select(pre.numpy(), values.numpy(), indices.numpy())
    return values, indices
