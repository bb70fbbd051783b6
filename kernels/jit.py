"""numba's settings for kernels: compiled once and cached on disk, run without the interpreter's lock."""

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

jit = numba.njit(nogil=True, cache=True, error_model="numpy")
# for bounds only: the compiler chooses the order of sums, and may choose differently next time
jit_loose = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
inline = numba.njit(nogil=True, inline="always")


@intrinsic
def _float_of_bits(_context, bits):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of_float(_context, value):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


# Floats of 8 bits: the upper 11 bits of fp32 but for the exponents that are left out, 2 of them mantissa.
# Signed (int8) they reach from 2^-28 to 2^4, unsigned (uint8) from 2^-56 to 2^8; code 0 is 0.
SIGNED, UNSIGNED = 396, 284
DROPPED = 21  # bits of fp32


def number(entry):
    """An entry of an array as fp32; arrays of fewer bits come as integers: bf16 as int16, 8 bits as int8 and uint8."""
    raise TypeError(entry)


@overload(number, inline="always")
def _number(entry):
    if entry == types.int16:
        return lambda entry: _float_of_bits(np.uint32(np.uint16(entry)) << np.uint32(16))
    if entry == types.int8:
        return lambda entry: _widened(np.uint32(np.uint8(entry) & 127), np.uint32(SIGNED), entry < 0)
    if entry == types.uint8:
        return lambda entry: _widened(np.uint32(entry), np.uint32(UNSIGNED), False)
    return lambda entry: entry


@jit
def _widened(code, offset, negative):
    size = _float_of_bits((code + offset) << np.uint32(DROPPED)) if code > 0 else np.float32(0)
    return -size if negative else size


@jit
def bf16_bits(value):
    """The bits of the nearest bf16 number, ties to even."""
    bits = _bits_of_float(value)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.int16(np.uint16(bits >> np.uint32(16)))


WORD = 64  # entries that reaching() looks at


@intrinsic
def _reaching(context, line, start, least, absolute):
    """The machine's vectors, spelled out: what numba makes of the loop is four times slower."""
    element, i64 = line.dtype, types.uint64

    def generate(context, builder, signature, arguments):
        array, start, least, absolute = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        of = ir.FloatType() if element == types.float32 else ir.IntType(16)
        vector = ir.VectorType(of, WORD)
        at = builder.bitcast(builder.gep(data, [start]), vector.as_pointer())
        entries = builder.load(at, align=element.bitwidth // 8)

        def splat(value):
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

        bits = ir.VectorType(ir.IntType(element.bitwidth), WORD)
        sign = 1 << (element.bitwidth - 1)
        keep = builder.select(
            absolute, ir.IntType(element.bitwidth)(sign - 1), ir.IntType(element.bitwidth)(2 * sign - 1)
        )
        one = builder.insert_element(ir.Constant(bits, ir.Undefined), keep, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
        mask = builder.shuffle_vector(one, ir.Constant(bits, ir.Undefined), zeros)
        entries = builder.bitcast(builder.and_(builder.bitcast(entries, bits), mask), vector)
        if element == types.float32:
            reached = builder.fcmp_ordered(">=", entries, splat(least))
        else:
            reached = builder.icmp_signed(">=", entries, splat(least))
        return builder.bitcast(reached, ir.IntType(64))

    return i64(line, types.intp, element, types.boolean), generate


@intrinsic
def _prefetch(context, line, at):
    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.type, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte.type], kind)
        builder.call(function, [byte, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(line, types.intp), generate


@jit
def prefetch(line):
    """Ask for a row of fp32 before it is needed: rows come in no order that the processor could guess."""
    for at in range(0, len(line), 16):
        _prefetch(line, at)


@intrinsic
def lowest_bit(_context, word):
    """The place of the lowest set bit of a word that isn't 0."""

    def generate(_context, builder, _signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.uint64(types.uint64), generate


def reaching(line, start, least, absolute):
    """Bits: which of WORD entries from ``start`` on are (in absolute value) at least ``least`` > 0."""
    raise TypeError(line)


@overload(reaching, inline="always")
def _reaching_of(line, start, least, absolute):
    if line.dtype == types.int16:  # bf16: positive numbers are ordered like their bits
        return lambda line, start, least, absolute: _reaching(line, start, bf16_below(least), absolute)
    return lambda line, start, least, absolute: _reaching(line, start, least, absolute)


@jit
def bf16_below(value):
    """The bits of a bf16 number that is at most a positive fp32 number."""
    return np.int16(np.uint16(_bits_of_float(value) >> np.uint32(16)))


def stored(like, value, noise):
    """What an array like this holds for a value: itself, or the fewer bits of it, rounded up or down at random.

    Rounding to the nearest would lose every change of a moment that is smaller than half a unit in
    its last place, so that Adam's second moment could never fall.
    """
    raise TypeError(like)


@overload(stored, inline="always")
def _stored(like, value, noise):
    if like.dtype == types.int16:
        return lambda like, value, noise: np.int16(np.uint16(_dithered(value, noise, np.uint32(16))))
    if like.dtype == types.int8:
        return lambda like, value, noise: _signed(value, noise)
    if like.dtype == types.uint8:
        return lambda like, value, noise: np.uint8(_code(value, noise, UNSIGNED, 255))
    return lambda like, value, noise: value


@jit
def _dithered(value, noise, dropped):
    noise = np.uint32((noise ^ (noise >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    noise = np.uint32((noise ^ (noise >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(_bits_of_float(value) + (noise >> (np.uint32(32) - dropped))) >> dropped


@jit
def _code(value, noise, offset, most):
    return min(
        max(np.int32(_dithered(abs(value), noise, np.uint32(DROPPED))) - np.int32(offset), np.int32(0)),
        np.int32(most),
    )


@jit
def _signed(value, noise):
    code = np.uint8(_code(value, noise, SIGNED, 127))
    return np.int8(code | np.uint8(128)) if value < 0 else np.int8(code)


LANES, CHAINS = 8, 4


@intrinsic
def _dot(context, a, b):
    """The sum of products in one stated order: 32 running sums, added in pairs, then the rest.

    Spelled out because a compiler that may choose the order chooses by context: the same function
    compiled afresh or taken from the cache would differ in its last bits, and so would a resumed run.
    """

    def generate(context, builder, signature, arguments):
        arrays = [
            context.make_array(t)(context, builder, x) for t, x in zip(signature.args, arguments, strict=True)
        ]
        n = builder.extract_value(arrays[0].shape, 0)
        vector, step = ir.VectorType(ir.FloatType(), LANES), LANES * CHAINS
        i32, size = ir.IntType(32), n.type
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(CHAINS)]
        blocks = builder.udiv(n, size(step))
        with cgutils.for_range(builder, blocks) as loop:
            start = builder.mul(loop.index, size(step))
            for c, total in enumerate(sums):
                at = builder.add(start, size(c * LANES))
                x, y = (
                    builder.load(builder.bitcast(builder.gep(arr.data, [at]), vector.as_pointer()), align=4)
                    for arr in arrays
                )
                builder.store(builder.fadd(builder.load(total), builder.fmul(x, y)), total)
        parts = [builder.load(total) for total in sums]
        while len(parts) > 1:
            parts = [builder.fadd(x, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
        lanes = [builder.extract_element(parts[0], i32(i)) for i in range(LANES)]
        while len(lanes) > 1:
            lanes = [builder.fadd(x, y) for x, y in zip(lanes[::2], lanes[1::2], strict=True)]
        result = cgutils.alloca_once_value(builder, lanes[0])
        done = builder.mul(blocks, size(step))
        with cgutils.for_range(builder, builder.sub(n, done)) as loop:
            at = builder.add(done, loop.index)
            x, y = (builder.load(builder.gep(arr.data, [at])) for arr in arrays)
            builder.store(builder.fadd(builder.load(result), builder.fmul(x, y)), result)
        return builder.load(result)

    return types.float32(a, b), generate


@jit
def dot(a, b):
    """The sum of the products of two contiguous fp32 rows, in one order whatever the machine."""
    return _dot(a, b)


AHEAD = 4  # rows asked for before they are needed


@jit
def add_rows(y, rows, values, begin, end, table):
    """``y += sum of values[e] table[rows[e]]`` for the entries begin..end, in their order.

    Four rows at a time: y is loaded and stored once for them. Every element is summed one entry
    after another, so the bits are those of the plain loop.
    """
    e = begin
    while e + 4 <= end:
        for i in range(e + AHEAD, min(e + 4 + AHEAD, len(rows))):
            prefetch(table[rows[i]])
        a, b, c, d = table[rows[e]], table[rows[e + 1]], table[rows[e + 2]], table[rows[e + 3]]
        u, v, w, x = values[e], values[e + 1], values[e + 2], values[e + 3]
        for j in range(len(y)):
            y[j] = (((y[j] + u * a[j]) + v * b[j]) + w * c[j]) + x * d[j]
        e += 4
    while e < end:
        a, u = table[rows[e]], values[e]
        for j in range(len(y)):
            y[j] += u * a[j]
        e += 1
