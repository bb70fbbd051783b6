"""budget_error on the CPU: one running sum per row, forwards and back; columns by threads for the weights."""

import numpy as np
import torch

from saekit.kernels.jit import dot, jit, prefetch
from saekit.kernels.threads import parallel

ROWS, COLUMNS = 32, 64  # of a range that a thread takes
AHEAD = 2  # atoms asked for before they are needed


@jit
def _errors(first, last, indices, values, weight, bias, target, shares, squared, slopes, later):
    d, k = target.shape[1], values.shape[1]
    e = np.empty(d, np.float32)
    for r in range(first, last):
        for j in range(d):
            e[j] = bias[j] - target[r, j]
        for i in range(k):
            if i + AHEAD < k:
                prefetch(weight[indices[r, i + AHEAD]])
            v, w = values[r, i], weight[indices[r, i]]
            if v != 0:
                for j in range(d):
                    e[j] += v * w[j]
            squared[r, i] = dot(e, e)
        s = later[r]
        s[:] = 0
        for i in range(k - 1, -1, -1):
            v, w, share = values[r, i], weight[indices[r, i]], shares[i]
            for j in range(d):
                s[j] += share * e[j]
            slopes[r, i] = dot(s, w)
            if v != 0:
                for j in range(d):
                    e[j] -= v * w[j]


@jit
def _outer(first, last, indices, values, weight, bias, target, shares, scale, out):
    """Columns first..last of the gradient: no other thread writes there, and rows come in order."""
    width, k = last - first, values.shape[1]
    e, s = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(out.shape[0]):
        out[i, first:last] = 0
    for r in range(target.shape[0]):
        for j in range(width):
            e[j] = bias[first + j] - target[r, first + j]
        for i in range(k):
            v, w = values[r, i], weight[indices[r, i], first:last]
            if v != 0:
                for j in range(width):
                    e[j] += v * w[j]
        s[:] = 0
        for i in range(k - 1, -1, -1):
            v, share = values[r, i], shares[i]
            w, y = weight[indices[r, i], first:last], out[indices[r, i], first:last]
            by = v * scale[r]
            for j in range(width):
                s[j] += share * e[j]
                y[j] += by * s[j]
                e[j] -= v * w[j]


def budget_error(indices, values, weight, bias, target, shares):
    """Squared errors [rows, k], slopes [rows, k] and the sum over all budgets of share times error [rows, d].

    The slope of an entry is the product of its atom with the sum, over the budgets that hold it, of
    share times error: half the gradient of the total.
    """
    out = torch.empty_like(values), torch.empty_like(values), torch.empty_like(target)
    given = [t.numpy() for t in (indices, values, weight, bias, target)] + [np.array(shares, np.float32)]
    arrays = [t.numpy() for t in out]
    parallel(lambda a, b: _errors(a, b, *given, *arrays), len(target), ROWS)
    return out


def budget_outer(indices, values, weight, bias, target, shares, scale):
    """The gradient of the weights [n, d], with ``scale`` [rows] for each row's total."""
    out = torch.empty_like(weight)
    given = [t.numpy() for t in (indices, values, weight, bias, target)] + [np.array(shares, np.float32)]
    parallel(lambda a, b: _outer(a, b, *given, scale.numpy(), out.numpy()), weight.shape[1], COLUMNS)
    return out
