"""Row-wise selection of the k largest on the CPU: a bound on the k-th largest, then its few candidates; in numba."""

import numba
import numpy as np
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


@numba.njit(inline="always")
def _keep_largest(row, candidates, count, values, indices):
    """The k largest of the candidate positions of a row, by falling value, ties to the lowest index."""
    k = len(values)
    for i in range(k):
        values[i], indices[i] = row[candidates[i]], candidates[i]
    for i in range(k // 2 - 1, -1, -1):
        _sift_down(values, indices, i, k)
    for i in range(k, count):
        # candidates come by rising index, which loses against an equal value: only a larger one enters
        if row[candidates[i]] > values[0]:
            values[0], indices[0] = row[candidates[i]], candidates[i]
            _sift_down(values, indices, 0, k)
    for size in range(k - 1, 0, -1):
        # the root is the least of what is left: it goes last
        values[0], values[size] = values[size], values[0]
        indices[0], indices[size] = indices[size], indices[0]
        _sift_down(values, indices, 0, size)


@numba.njit(parallel=True, cache=True, nogil=True)
def _select(pre, values, indices):
    rows, n = pre.shape
    k = values.shape[1]
    groups = min(n, 2 * k)
    for row in numba.prange(rows):
        line = pre[row]
        # the k-th largest of the groups' maxima: at least k entries reach it, so it bounds the k-th largest
        peaks = line[:groups].copy()
        whole = n - n % groups
        for start in range(groups, whole, groups):
            for j in range(groups):
                peaks[j] = max(peaks[j], line[start + j])
        for j in range(n - whole):
            peaks[j] = max(peaks[j], line[whole + j])
        threshold = np.partition(peaks, groups - k)[groups - k]
        candidates = np.empty(n, dtype=np.int64)
        count = 0
        for i in range(n):
            candidates[count] = i
            count += line[i] >= threshold
        if count < k:  # only NaN does that: every position is a candidate
            count = n
            for i in range(n):
                candidates[i] = i
        _keep_largest(line, candidates, count, values[row], indices[row])


def select_topk(pre, k):
    """Values and int64 indices of the k largest of each row, by falling value, ties to the lowest index.

    pre [rows, n], contiguous, fp32 or fp64. A lower bound of the k-th largest leaves a few times k
    candidates of a row, so the cost is two comparisons an entry, not a sort.
    """
    values = torch.empty(pre.shape[0], k, dtype=pre.dtype)
    indices = torch.empty(pre.shape[0], k, dtype=torch.int64)
    use_torch_threads()
    _select(pre.numpy(), values.numpy(), indices.numpy())
    return values, indices
