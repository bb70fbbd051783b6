"""nested_error on the CPU: decode, compare, and take the slopes while the atoms are in cache."""

import numpy as np
import torch

from saekit.kernels.jit import dot, jit, prefetch
from saekit.kernels.product.cpu import ROWS
from saekit.kernels.threads import parallel


@jit
def _errors(
    first,
    last,
    offsets,
    indices,
    values,
    weight,
    bias,
    target,
    prefixes,
    shares,
    squared,
    error,
    later,
    slopes,
):
    levels, d = len(prefixes), target.shape[1]
    for r in range(first, last):
        for p in range(levels):
            later[p, r] = 0
        e = error[r]
        for j in range(d):
            e[j] = bias[j] - target[r, j]
        for p in range(levels):
            # later[p] holds this level's part until the errors are known
            part = later[p, r] if levels > 1 else e
            begin = prefixes[p - 1] if p else 0
            for i in range(offsets[r], offsets[r + 1]):
                if begin <= indices[i] < prefixes[p] and values[i] != 0:
                    if i + 2 < offsets[r + 1]:
                        prefetch(weight[indices[i + 2]])
                    v, w = values[i], weight[indices[i]]
                    for j in range(d):
                        part[j] += v * w[j]
            if levels > 1:
                for j in range(d):
                    e[j] += part[j]
                    part[j] = e[j]
            squared[p, r] = dot(e, e)
        for j in range(d):
            later[levels - 1, r, j] = shares[levels - 1] * e[j]
        for p in range(levels - 2, -1, -1):
            for j in range(d):
                later[p, r, j] = later[p + 1, r, j] + shares[p] * later[p, r, j]
        for i in range(offsets[r], offsets[r + 1]):
            p = 0
            while prefixes[p] <= indices[i]:
                p += 1
            slopes[i] = dot(later[p, r], weight[indices[i]])


def nested_error(offsets, indices, values, weight, bias, target, prefixes, shares):
    """Per row and prefix the squared error, and what the gradient needs.

    Returns ``squared [prefixes, rows]``, the last prefix's ``error [rows, d]``, ``later
    [prefixes, rows, d]`` (the sum over this and later prefixes of share times error: half the
    gradient at the reconstruction of a feature of this level) and ``slopes [nnz]`` (its product
    with each entry's atom).
    """
    levels, (rows, d) = len(prefixes), target.shape
    squared, error, later = torch.empty(levels, rows), torch.empty(rows, d), torch.empty(levels, rows, d)
    slopes = torch.empty_like(values)
    given = [t.numpy() for t in (offsets, indices, values, weight, bias, target)]
    given += [np.array(prefixes, np.int64), np.array(shares, np.float32)]
    out = [t.numpy() for t in (squared, error, later, slopes)]
    parallel(lambda a, b: _errors(a, b, *given, *out), rows, ROWS)
    return squared, error, later, slopes
