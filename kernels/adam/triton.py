"""Adam on a GPU in one pass: a program sums one row's gradient from its terms and takes the row's step."""

import triton
import triton.language as tl

from saekit.kernels.adam import eager, short
from saekit.kernels.factors import Factors
from saekit.kernels.product.triton import by_feature

SIGNED, UNSIGNED, DROPPED = (tl.constexpr(number) for number in (short.SIGNED, short.UNSIGNED, short.DROPPED))
LOW = tl.constexpr((1 << short.DROPPED) - 1)
WARPS = 8
WIDEST = 8192  # a row is held in registers; wider ones take the eager path


@triton.jit(do_not_specialize=["seed"])
def _row(
    starts, rows, values, matrix, weight, m, v, width, seed, rate, idle, scale, beta1, beta2, eps, correct1, correct2,
    UNIT: tl.constexpr, SHORT_W: tl.constexpr, SHORT_M: tl.constexpr, SHORT_V: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = columns < width
    at = i * width + columns
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    mean = _restored(tl.load(m + at, mask=inside, other=0), SHORT_M, 127, SIGNED)
    square = _restored(tl.load(v + at, mask=inside, other=0), SHORT_V, 255, UNSIGNED)
    g = tl.zeros([WIDTH], dtype=tl.float32)
    for e in range(tl.load(starts + i), tl.load(starts + i + 1)):
        row, value = tl.load(rows + e).to(tl.int64), tl.load(values + e).to(tl.float32)
        g += value * tl.load(matrix + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if UNIT:
        g -= tl.sum(g * w, axis=0) * w
    g *= scale
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g * g
    w -= tl.where(g != 0, rate, idle) * (mean * correct1) / (tl.sqrt(square * correct2) + eps)
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1e-12)
    noise = _noise(at, seed)
    new_w = _short(w, SHORT_W, noise & LOW, 127, SIGNED)
    new_m = _short(mean, SHORT_M, (noise * 0x9E3779B1) >> 11, 127, SIGNED)
    new_v = _short(square, SHORT_V, (noise * 0x85EBCA6B) >> 11, 255, UNSIGNED)
    tl.store(weight + at, new_w.to(weight.dtype.element_ty), mask=inside)
    tl.store(m + at, new_m.to(m.dtype.element_ty), mask=inside)
    tl.store(v + at, new_v.to(v.dtype.element_ty), mask=inside)


@triton.jit
def _noise(at, seed):
    """uint32 numbers that look random: where an entry stands and the step, mixed (the constants are of lowbias32)."""
    h = at.to(tl.uint32) ^ (seed.to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _restored(state, BITS: tl.constexpr, MOST: tl.constexpr, OFFSET: tl.constexpr):
    """Numbers of a state in fp32; see short.py for those of 8 bits."""
    if BITS == 8:
        code = state.to(tl.int32)
        size = code & MOST
        value = tl.where(size > 0, ((size + OFFSET) << DROPPED).to(tl.float32, bitcast=True), 0.0)
        number = tl.where(code > MOST, -value, value)
    else:
        number = state.to(tl.float32)
    return number


@triton.jit
def _short(value, BITS: tl.constexpr, noise, MOST: tl.constexpr, OFFSET: tl.constexpr):
    """A number as a state of so many bits keeps it, rounded up or down at random."""
    bits = value.to(tl.int32, bitcast=True)
    if BITS == 32:
        stored = value
    elif BITS == 16:
        stored = ((bits + (noise & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    else:
        size = (bits & 0x7FFFFFFF) + (noise & LOW).to(tl.int32)
        code = tl.minimum(tl.maximum((size >> DROPPED) - OFFSET, 0), MOST)
        stored = tl.where(value < 0, code | 128, code)
    return stored


def adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked):
    """In place; the gradient is dense or Factors. See the package."""
    if not isinstance(gradient, Factors) or weight.shape[1] > WIDEST:
        return eager.adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked)
    rows, features, values, matrix = gradient.joined()
    entries = by_feature(rows, features, values, len(weight), gradient.orders)
    width = triton.next_power_of_2(weight.shape[1])
    _row[(len(weight),)](
        *entries, matrix.contiguous(), weight, m, v, weight.shape[1], step, rate, 0.0 if masked else rate, scale, *betas,
        eps, 1 / (1 - betas[0] ** step), 1 / (1 - betas[1] ** step), UNIT=unit,
        SHORT_W=8 * weight.itemsize, SHORT_M=8 * m.itemsize, SHORT_V=8 * v.itemsize, WIDTH=width,
        num_warps=min(max(width // 512, 1), WARPS),
    )  # fmt: skip
    return None


squares = eager.squares
