"""pursuit_encode on the CPU: the encode kernel's search for the one largest entry, step after step."""

import numpy as np
import torch

from saekit.kernels.encode.cpu import LargestOfRow, Products
from saekit.kernels.jit import dot, jit
from saekit.kernels.threads import count, parallel

BLOCK = 512  # rows pursued together: the product is faster with many
SMALL = 1 << 23  # multiplications of a step's product that one thread does alone
ROWS, COLUMNS = 64, 64  # of a range that a thread takes backwards


@jit
def _take(first, last, found, places, weight, residual, values, indices, step):
    for r in range(first, last):
        v, f = max(found[r, 0], np.float32(0)), places[r, 0]
        values[r, step], indices[r, step] = v, f
        x, w = residual[r], weight[f]
        if v > 0:
            for j in range(len(x)):
                x[j] -= v * w[j]


@jit
def _slopes(first, last, indices, values, weight, grad_values, gradient, slopes):
    """Gradient at each step's score, and in place of that of the residual, that of x."""
    for r in range(first, last):
        g = gradient[r]
        for t in range(values.shape[1] - 1, -1, -1):
            w = weight[indices[r, t]]
            s = grad_values[r, t] - dot(g, w) if values[r, t] > 0 else np.float32(0)
            slopes[r, t] = s
            for j in range(len(g)):
                g[j] += s * w[j]


@jit
def _outer(first, last, indices, values, weight, residual, grad_residual, slopes, out):
    """Columns first..last of the weights' gradient: no other thread writes there, and rows come in order."""
    width = last - first
    x, g = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(out.shape[0]):
        out[i, first:last] = 0
    for r in range(residual.shape[0]):
        x[:] = residual[r, first:last]
        g[:] = grad_residual[r, first:last]
        for t in range(values.shape[1] - 1, -1, -1):
            f, v, s = indices[r, t], values[r, t], slopes[r, t]
            w, y = weight[f, first:last], out[f, first:last]
            for j in range(width):
                x[j] += v * w[j]
                y[j] += s * x[j] - v * g[j]
                g[j] += s * w[j]


def pursue(x, weight, k, shortlist):
    """Values [rows, k], residual [rows, d], indices [rows, k]."""
    residual = x.clone()
    values, indices = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32)
    products = Products(residual, weight, torch.zeros(len(weight)), shortlist)
    w, r, v, i = (t.numpy() for t in (weight, residual, values, indices))
    selection = LargestOfRow(products, 1, len(weight))
    found = [t.numpy() for t in selection.result()]  # views of what each block overwrites

    def work(start, end):  # rows have nothing to do with each other: a thread takes its own through all steps
        for step in range(k):
            products.block(start, end, [selection])
            _take(start, end, *found, w, r, v, i, step)

    # threads that mostly call into Python wait for each other longer than a small product takes
    share = len(x) if len(x) * weight.numel() < SMALL else -(-len(x) // count())
    parallel(work, len(x), max(1, min(BLOCK, share)))
    return values, residual, indices


def pursue_backward(indices, values, weight, residual, grad_values, grad_residual):
    """Gradients of x [rows, d] and weight [n, d], through the scores and the residuals."""
    gradient, slopes, out = grad_residual.clone(), torch.empty_like(values), torch.empty_like(weight)
    i, v, w, r, gv, gr = (t.numpy() for t in (indices, values, weight, residual, grad_values, grad_residual))
    g, s, y = gradient.numpy(), slopes.numpy(), out.numpy()
    parallel(lambda a, b: _slopes(a, b, i, v, w, gv, g, s), len(residual), ROWS)
    parallel(lambda a, b: _outer(a, b, i, v, w, r, gr, s, y), weight.shape[1], COLUMNS)
    return gradient, out
