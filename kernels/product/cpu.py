"""Sparse products on the CPU: rows by threads of their own, a counting sort where features own the sums."""

import numpy as np
import torch

from saekit.kernels.jit import add_rows, dot, jit
from saekit.kernels.threads import parallel

ROWS, FEATURES, ENTRIES = 64, 256, 1 << 15  # of a range that a thread takes


@jit
def _decode(offsets, indices, values, weight, out):
    for r in range(out.shape[0]):
        y = out[r]
        y[:] = 0
        add_rows(y, indices, values, offsets[r], offsets[r + 1], weight)


@jit
def _sample(offsets, indices, weight, grad, out):
    for r in range(grad.shape[0]):
        for e in range(offsets[r], offsets[r + 1]):
            out[e] = dot(weight[indices[e]], grad[r])


@jit
def _order(features, starts, order):
    for f in features:
        starts[f + 1] += 1
    for i in range(1, len(starts)):
        starts[i] += starts[i - 1]
    place = starts[:-1].copy()
    for e in range(len(features)):
        order[place[features[e]]] = e
        place[features[e]] += 1


@jit
def _permute(first, last, order, rows, values, sorted_rows, sorted_values):
    for i in range(first, last):
        sorted_rows[i], sorted_values[i] = rows[order[i]], values[order[i]]


@jit
def _sum_outer(starts, rows, values, matrix, out):
    for i in range(out.shape[0]):
        y = out[i]
        y[:] = 0
        add_rows(y, rows, values, starts[i], starts[i + 1], matrix)


def decode(offsets, indices, values, weight):
    """``out[r] = sum_e values[e] weight[indices[e]]`` over the entries of row r."""
    out = torch.empty(len(offsets) - 1, weight.shape[1])
    o, i, v, w, y = (t.numpy() for t in (offsets, indices, values, weight, out))
    parallel(lambda a, b: _decode(o[a : b + 1], i, v, w, y[a:b]), len(out), ROWS)
    return out


def sample(offsets, indices, weight, grad):
    """``out[e] = <weight[indices[e]], grad[row of e]>``."""
    out = torch.empty(len(indices))
    o, i, w, g, y = (t.numpy() for t in (offsets, indices, weight, grad, out))
    parallel(lambda a, b: _sample(o[a : b + 1], i, w, g[a:b], y), len(grad), ROWS)
    return out


def by_feature(rows, features, values, n_features, orders=None):
    """The entries sorted by feature, stably: starts int64 [n + 1], rows int32, values (numpy arrays).

    ``orders`` keeps the order found for these features, which encoder and decoder share.
    """
    orders = {} if orders is None else orders
    key = (features.data_ptr(), features.stride(), len(features), n_features)
    if key not in orders:  # the features are kept too: while they live nothing else has their address
        orders[key] = np.zeros(n_features + 1, np.int64), np.empty(len(features), np.int32), features
        _order(features.numpy(), *orders[key][:2])
    starts, order, _ = orders[key]
    sorted_rows, sorted_values = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    given = order, rows.numpy(), values.numpy()
    parallel(lambda a, b: _permute(a, b, *given, sorted_rows, sorted_values), len(rows), ENTRIES)
    return starts, sorted_rows, sorted_values


def sum_outer(rows, features, values, matrix, n_features):
    """``out[i] = sum of values[e] matrix[rows[e]]`` over the entries e of feature i, in their order."""
    out = torch.empty(n_features, matrix.shape[1])
    starts, sorted_rows, coefficients = by_feature(rows, features, values, n_features)
    m, y = matrix.numpy(), out.numpy()
    parallel(
        lambda a, b: _sum_outer(starts[a : b + 1], sorted_rows, coefficients, m, y[a:b]), n_features, FEATURES
    )
    return out
