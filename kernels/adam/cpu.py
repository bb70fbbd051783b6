"""Adam on the CPU in one pass over the rows: sum the gradient's terms, project, scale, update, renormalise."""

import numpy as np
import torch

from saekit.kernels.factors import Factors
from saekit.kernels.jit import add_rows, dot, jit, number, stored
from saekit.kernels.product.cpu import by_feature
from saekit.kernels.threads import parallel

FEATURES = 128  # rows of a range that a thread takes


@jit
def _gather(g, i, terms):
    """Row i of a gradient given as sums of outer products."""
    g[:] = 0
    for t in range(len(terms)):
        starts, rows, values, matrix = terms[t]
        add_rows(g, rows, values, starts[i], starts[i + 1], matrix)


@jit
def _update(w, g, m, v, along, noise, numbers):
    """One row; ``along`` is its gradient's component along w, which is taken off."""
    rate, idle, scale, beta1, rest1, beta2, rest2, eps, correct1, correct2 = numbers
    for j in range(len(w)):
        gradient = (g[j] - along * w[j]) * scale
        mean = beta1 * number(m[j]) + rest1 * gradient
        square = beta2 * number(v[j]) + rest2 * (gradient * gradient)
        m[j], v[j] = stored(m, mean, noise + np.uint32(j)), stored(v, square, noise - np.uint32(j))
        w[j] -= (rate if gradient != 0 else idle) * (mean * correct1) / (np.sqrt(square * correct2) + eps)


@jit
def _row(w, g, m, v, unit, noise, numbers):
    _update(w, g, m, v, dot(g, w) if unit else np.float32(0), noise, numbers)
    if unit:
        length = np.float32(1) / max(np.sqrt(dot(w, w)), np.float32(1e-12))
        for j in range(len(w)):
            w[j] *= length


@jit
def _factored(first, last, terms, unit, weight, m, v, noise, numbers):
    g = np.empty(weight.shape[1], np.float32)
    for i in range(first, last):
        _gather(g, i, terms)
        _row(weight[i], g, m[i], v[i], unit, noise + np.uint32(i) * np.uint32(0x9E3779B9), numbers)


@jit
def _dense(first, last, gradient, unit, weight, m, v, noise, numbers):
    for i in range(first, last):
        at = noise + np.uint32(i) * np.uint32(0x9E3779B9)
        _row(weight[i], gradient[i], m[i], v[i], unit, at, numbers)


@jit
def _squares(first, last, terms, unit, weight, out):
    g = np.empty(weight.shape[1], np.float32)
    for i in range(first, last):
        _gather(g, i, terms)
        along = dot(g, weight[i]) if unit else np.float32(0)
        out[i] = max(
            dot(g, g) - along * along, np.float32(0)
        )  # a row that points along its weight leaves rounding


def _array(state, signed):
    """A moment's array; fewer bits as the integers that tell ``number`` and ``stored`` what they mean."""
    kind = {torch.bfloat16: torch.int16, torch.uint8: torch.int8 if signed else torch.uint8}
    return state.view(kind.get(state.dtype, state.dtype)).numpy()


def _numbers(rate, masked, scale, betas, eps, step):
    beta1, beta2 = betas
    exact = (
        rate, 0.0 if masked else rate, scale, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 / (1 - beta1**step), 1 / (1 - beta2**step)
    )  # fmt: skip
    return tuple(np.float32(a) for a in exact)


def _terms(gradient, n_features):
    """The terms of Factors, each with its entries sorted by feature."""
    return tuple(
        (*by_feature(rows, features, values, n_features, gradient.orders), matrix.contiguous().numpy())
        for rows, features, values, matrix in gradient.terms
    )


def adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked):
    """In place; the gradient is dense or Factors. See the package."""
    numbers = _numbers(rate, masked, scale, betas, eps, step)
    noise = np.uint32(step * 0x85EBCA6B & 0xFFFFFFFF)
    shape = (1, -1) if weight.ndim == 1 else weight.shape
    w, m, v = weight.view(shape).numpy(), _array(m.view(shape), True), _array(v.view(shape), False)
    if isinstance(gradient, Factors):
        terms = _terms(gradient, len(w))
        parallel(lambda a, b: _factored(a, b, terms, unit, w, m, v, noise, numbers), len(w), FEATURES)
    else:
        g = gradient.contiguous().view(shape).numpy()
        parallel(lambda a, b: _dense(a, b, g, unit, w, m, v, noise, numbers), len(w), FEATURES)


def squares(weight, gradient, unit):
    """Squared length of every row of a gradient given as Factors, after the projection."""
    terms = _terms(gradient, len(weight))
    out, w = torch.empty(len(weight)), weight.numpy()
    o = out.numpy()
    parallel(lambda a, b: _squares(a, b, terms, unit, w, o), len(weight), FEATURES)
    return out
