"""nested_error on the CPU: decode, compare, and take the slopes while the atoms are in cache."""

import numpy as np
import torch

from saekit.kernels.jit import add_rows, dot, jit, prefetch
from saekit.kernels.product.cpu import ROWS
from saekit.kernels.threads import parallel

AHEAD = 2  # atoms asked for before they are needed


@jit
def _decode(begin, end, entries, weight, part):
    """Add to ``part`` the atoms of a row's entries whose feature lies in begin..end."""
    indices, values = entries
    for i in range(len(indices)):
        if i + AHEAD < len(indices):
            prefetch(weight[indices[i + AHEAD]])
        if begin <= indices[i] < end and values[i] != 0:
            v, w = values[i], weight[indices[i]]
            for j in range(len(part)):
                part[j] += v * w[j]


@jit
def _errors(
    first, last, offsets, indices, values, weight, bias, target, prefixes, shares, squared, later, slopes
):
    levels, d = len(prefixes), target.shape[1]
    for r in range(first, last):
        entries = indices[offsets[r] : offsets[r + 1]], values[offsets[r] : offsets[r + 1]]
        for p in range(levels):  # later[p] holds the error of level p until all are known
            e, begin = later[p, r], 0
            if p == 0:
                for j in range(d):
                    e[j] = bias[j] - target[r, j]
            else:
                begin = prefixes[p - 1]
                e[:] = later[p - 1, r]
            if levels == 1:
                add_rows(e, indices, values, offsets[r], offsets[r + 1], weight)
            else:
                _decode(begin, prefixes[p], entries, weight, e)
            squared[p, r] = dot(e, e)
        for p in range(levels - 1, -1, -1):
            e = later[p, r]
            if shares[p] != 1:
                for j in range(d):
                    e[j] *= shares[p]
            if p < levels - 1:
                after = later[p + 1, r]
                for j in range(d):
                    e[j] += after[j]
        p = 0
        for i in range(offsets[r], offsets[r + 1]):
            if levels > 1:
                p = 0
                while prefixes[p] <= indices[i]:
                    p += 1
            slopes[i] = dot(later[p, r], weight[indices[i]])


def nested_error(offsets, indices, values, weight, bias, target, prefixes, shares):
    """Per row and prefix the squared error, and what the gradient needs.

    Returns ``squared [prefixes, rows]``, ``later [prefixes, rows, d]`` (the sum over this and later
    prefixes of share times error: half the gradient at the reconstruction of a feature of this
    level) and ``slopes [nnz]`` (its product with each entry's atom).
    """
    levels, (rows, d) = len(prefixes), target.shape
    out = torch.empty(levels, rows), torch.empty(levels, rows, d), torch.empty_like(values)
    given = [t.numpy() for t in (offsets, indices, values, weight, bias, target)]
    given += [np.array(prefixes, np.int64), np.array(shares, np.float32)]
    arrays = [t.numpy() for t in out]
    parallel(lambda a, b: _errors(a, b, *given, *arrays), rows, ROWS)
    return out
