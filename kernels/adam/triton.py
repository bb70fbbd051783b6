"""Adam on a GPU in one pass: a program sums one row's gradient from its terms and takes the row's step."""

import triton
import triton.language as tl

from saekit.kernels.adam import eager, short
from saekit.kernels.factors import Factors
from saekit.kernels.product.triton import by_feature

ENTRIES = 8  # gathered at once
SIGNED, UNSIGNED, DROPPED = (tl.constexpr(number) for number in (short.SIGNED, short.UNSIGNED, short.DROPPED))
LOW = tl.constexpr((1 << short.DROPPED) - 1)
WIDEST = 8192  # a row is held in registers; wider ones take the eager path


@triton.jit
def _row(
    starts, rows, values, matrix, weight, m, v, width, numbers, seed,
    UNIT: tl.constexpr, SHORT_W: tl.constexpr, SHORT_M: tl.constexpr, SHORT_V: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = columns < width
    g = tl.zeros([WIDTH], dtype=tl.float32)
    start, end = tl.load(starts + i), tl.load(starts + i + 1)
    for first in range(start, end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        live = e < end
        row = tl.load(rows + e, mask=live, other=0).to(tl.int64)
        value = tl.load(values + e, mask=live, other=0.0).to(tl.float32)
        part = tl.load(
            matrix + row[:, None] * width + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        g += tl.sum(value[:, None] * part.to(tl.float32), axis=0)
    at = i * width + columns
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if UNIT:
        g -= tl.sum(g * w, axis=0) * w
    rate, scale = tl.load(numbers), tl.load(numbers + 1)
    beta1, beta2, eps = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    correct1, correct2, idle = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    g *= scale
    mean = beta1 * _restored(tl.load(m + at, mask=inside, other=0), SHORT_M, 127, SIGNED) + (1 - beta1) * g
    square = (
        beta2 * _restored(tl.load(v + at, mask=inside, other=0), SHORT_V, 255, UNSIGNED) + (1 - beta2) * g * g
    )
    w -= tl.where(g != 0, rate, idle) * (mean * correct1) / (tl.sqrt(square * correct2) + eps)
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1e-12)
    tl.store(
        weight + at,
        _short(w, SHORT_W, tl.randint(seed, at), 127, SIGNED).to(weight.dtype.element_ty),
        mask=inside,
    )
    tl.store(
        m + at,
        _short(mean, SHORT_M, tl.randint(seed + 1, at), 127, SIGNED).to(m.dtype.element_ty),
        mask=inside,
    )
    tl.store(
        v + at,
        _short(square, SHORT_V, tl.randint(seed + 2, at), 255, UNSIGNED).to(v.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _restored(state, BITS: tl.constexpr, MOST: tl.constexpr, OFFSET: tl.constexpr):
    """Numbers of a state in fp32; see short.py for those of 8 bits."""
    if BITS != 8:
        return state.to(tl.float32)
    code = state.to(tl.int32)
    size = code & MOST
    value = tl.where(size > 0, ((size + OFFSET) << DROPPED).to(tl.float32, bitcast=True), 0.0)
    return tl.where(code > MOST, -value, value)


@triton.jit
def _short(value, BITS: tl.constexpr, noise, MOST: tl.constexpr, OFFSET: tl.constexpr):
    """A number as a state of so many bits keeps it, rounded up or down at random."""
    if BITS == 32:
        return value
    bits = value.to(tl.int32, bitcast=True)
    if BITS == 16:
        return ((bits + (noise & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    size = (bits & 0x7FFFFFFF) + (noise & LOW).to(tl.int32)
    code = tl.minimum(tl.maximum((size >> DROPPED) - OFFSET, 0), MOST)
    return tl.where(value < 0, code | 128, code)


def adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked):
    """In place; the gradient is dense or Factors. See the package."""
    if not isinstance(gradient, Factors) or weight.shape[1] > WIDEST:
        return eager.adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked)
    rows, features, values, matrix = gradient.joined()
    entries = by_feature(rows, features, values, len(weight))
    numbers = weight.new_tensor(
        [
            rate,
            scale,
            *betas,
            eps,
            1 / (1 - betas[0] ** step),
            1 / (1 - betas[1] ** step),
            0.0 if masked else rate,
        ],
        dtype=eager.torch.float32,
    )
    _row[(len(weight),)](
        *entries, matrix.contiguous(), weight, m, v, weight.shape[1], numbers, 3 * step, UNIT=unit,
        SHORT_W=8 * weight.itemsize, SHORT_M=8 * m.itemsize, SHORT_V=8 * v.itemsize, ENTRIES=ENTRIES, WIDTH=triton.next_power_of_2(weight.shape[1]),
    )  # fmt: skip
    return None


squares = eager.squares
