"""Encodings on a GPU: products of a block of rows by the vendor's library, then the largest of each row.

The k-th largest of a row's first products is a bound that its k largest reach. Many programs go
through all products and append what reaches their row's bound to its candidates, in whatever order
they run; one program per row keeps the k largest of these. Where there was no room for all, that
program goes through the row once more, alone. An entry is one integer that orders by key and then
by falling index, so all differ: the order of appending doesn't show, and ties go to the lowest index.
"""

import torch
import triton
import triton.language as tl

from saekit.kernels.encode import eager

BLOCK = 1 << 26  # products held at a time, in fp32
ROOM = 16384  # candidates of a row at most
MOST = 1024  # k beyond which they are too few
PIECE = 1024  # of a row that a program looks at
NOTHING = tl.constexpr(-(1 << 63))  # below every entry
HIGHEST = tl.constexpr(2147483647)


@triton.jit
def _entry(u, f, ABSOLUTE: tl.constexpr):
    """Integers in the order of the keys, then of falling features f; NaN lies above all. The last bit is u's sign."""
    bits = ((tl.abs(u) if ABSOLUTE else u) + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    order = tl.where(u != u, HIGHEST, tl.where(bits >= 0, bits, bits ^ HIGHEST))
    low = ((f ^ HIGHEST) << 1).to(tl.int64) & 0xFFFFFFFF | (u < 0).to(tl.int64)
    return (order.to(tl.int64) << 32) | low


@triton.jit
def _feature(entry):
    return ((entry >> 1) & HIGHEST).to(tl.int32) ^ HIGHEST


@triton.jit
def _number(entry, ABSOLUTE: tl.constexpr):
    order = (entry >> 32).to(tl.int32)
    size = tl.where(order >= 0, order, order ^ HIGHEST).to(tl.float32, bitcast=True)
    return tl.where((entry & 1) > 0, -size, size) if ABSOLUTE else size


@triton.jit
def _kth_largest(entry, k):
    """A number that k of the entries reach, and no more where they differ."""
    order = (entry >> 32).to(tl.int32)
    low, high = tl.min(order, axis=0), tl.max(order, axis=0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        enough = tl.sum((order >= middle).to(tl.int32), axis=0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    least = low.to(tl.int64) << 32
    if tl.sum((order >= low).to(tl.int32), axis=0) > k:  # equal keys, among which the features decide
        most = least | 0xFFFFFFFF
        while least < most:
            half = (least | most) - ((least ^ most) >> 1)
            enough = tl.sum((entry >= half).to(tl.int32), axis=0) >= k
            least, most = tl.where(enough, half, least), tl.where(enough, most, half - 1)
    return least


@triton.jit
def _entries(products, bias, dead, row, first, n, f, live, DEAD: tl.constexpr, ABSOLUTE: tl.constexpr):
    """The entries of features first + f, NOTHING where they aren't to be chosen."""
    f = first + f
    if DEAD:
        live &= tl.load(dead + f, mask=live, other=0) != 0
    u = tl.load(products + row * n + f, mask=live, other=0.0)
    u += tl.load(bias + f, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, _entry(u, f, ABSOLUTE), NOTHING)


@triton.jit
def _bounds(
    products, bias, dead, bounds, n, group, k, DEAD: tl.constexpr, ABSOLUTE: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, ROOM)
    entry = _entries(products, bias, dead, row, run * group, n, f, f < group, DEAD, ABSOLUTE)
    tl.store(bounds + row * tl.num_programs(1) + run, _kth_largest(entry, k))


@triton.jit
def _append(
    products, bias, dead, bounds, found, counts, n, group, groups,
    DEAD: tl.constexpr, ABSOLUTE: tl.constexpr, ROOM: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(0).to(tl.int64)
    row, run = owner // groups, owner % groups
    f = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    entry = _entries(products, bias, dead, row, run * group, n, f, f < group, DEAD, ABSOLUTE)
    take = (entry >= tl.load(bounds + owner)) & (entry > NOTHING)
    slot = tl.atomic_add(counts + owner + 0 * f, 1, mask=take, sem="relaxed")
    tl.store(found + owner * ROOM + slot, entry, mask=take & (slot < ROOM))


@triton.jit
def _keep_largest(at, count, k, ROOM: tl.constexpr):
    """Reduce the candidates to the k largest; returns the least of them and how many there are."""
    tl.debug_barrier()  # what other threads have just written
    slots = tl.arange(0, ROOM)
    entry = tl.load(at + slots, mask=slots < count, other=NOTHING)
    least = _kth_largest(entry, k)
    keep = (slots < count) & (entry >= least)
    tl.debug_barrier()  # all have read
    tl.store(at + tl.cumsum(keep.to(tl.int32), axis=0) - 1, entry, mask=keep)
    tl.debug_barrier()
    return least, tl.minimum(count, k)


@triton.jit
def _select(
    products, bias, dead, found, counts, values, indices, n, group, k,
    DEAD: tl.constexpr, ABSOLUTE: tl.constexpr, ROOM: tl.constexpr, PIECE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row, run, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    owner = row * groups + run
    at, count = found + owner * ROOM, tl.load(counts + owner)
    if count > ROOM:
        bound, count = tl.full([], NOTHING, tl.int64), 0
        for start in range(0, group, PIECE):
            f = start + tl.arange(0, PIECE)
            entry = _entries(products, bias, dead, row, run * group, n, f, f < group, DEAD, ABSOLUTE)
            take = (entry >= bound) & (entry > NOTHING)
            tl.store(at + count + tl.cumsum(take.to(tl.int32), axis=0) - 1, entry, mask=take)
            count += tl.sum(take.to(tl.int32), axis=0)
            if count + PIECE > ROOM:
                bound, count = _keep_largest(at, count, k, ROOM)
    _, count = _keep_largest(at, count, k, ROOM)
    places = tl.arange(0, K)
    there = places < count
    best = tl.sort(tl.load(at + places, mask=there, other=NOTHING), descending=True)
    out = owner * k + places
    number = tl.where(there, _number(best, ABSOLUTE), float("-inf"))
    tl.store(values + out, number.to(values.dtype.element_ty), mask=places < k)
    tl.store(indices + out, tl.where(there, _feature(best), 0), mask=places < k)


def _products(x, weight):
    """``x W^T`` in fp32, whatever the operands are."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def _choose(products, bias, values, indices, k, group, absolute, dead):
    """Write the k largest of each row and group of products."""
    rows, n = products.shape
    # k group / room entries are expected to reach the bound of so many first ones: a quarter of the room
    room = min(
        triton.next_power_of_2(max(int(2 * (k * group) ** 0.5), k, 2)), triton.next_power_of_2(group), ROOM
    )
    room, piece = max(room, 2), min(PIECE, max(room // 2, 2))
    of = products, bias, dead
    how = {
        "DEAD": dead is not None,
        "ABSOLUTE": absolute,
        "ROOM": room,
        "num_warps": max(1, min(room // 512, 16)),
    }
    found = torch.empty(rows, n // group, room, dtype=torch.int64, device=bias.device)
    bounds = found.new_empty(rows, n // group)
    counts = torch.zeros(rows, n // group, dtype=torch.int32, device=bias.device)
    _bounds[tuple(bounds.shape)](*of, bounds, n, group, k, **how)
    grid = (bounds.numel(), triton.cdiv(group, PIECE))
    _append[grid](*of, bounds, found, counts, n, group, n // group, PIECE=PIECE, **how | {"num_warps": 4})
    _select[tuple(bounds.shape)](
        *of,
        found,
        counts,
        values,
        indices,
        n,
        group,
        k,
        PIECE=piece,
        K=max(triton.next_power_of_2(k), 2),
        **how,
    )


def _largest(x, weight, bias, k, group, absolute=False, dead=None, k_aux=0):
    """Values and indices of the k largest per row and group; and of the k_aux largest dead ones per row."""
    n = len(weight)
    cases = [(k, group, absolute, None)] + ([(k_aux, n, False, dead)] if dead is not None else [])
    widths = [most * (n // run) for most, run, *_ in cases]
    out = [
        (x.new_empty(len(x), w), torch.empty(len(x), w, dtype=torch.int32, device=x.device)) for w in widths
    ]
    size = max(1, BLOCK // n)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        products = _products(x[part], weight)
        for case, (values, indices) in zip(cases, out, strict=True):
            _choose(products, bias, values[part], indices[part], *case)
    return tuple(tensor for pair in out for tensor in pair)


def topk(x, weight, bias, k, group, absolute, dead, k_aux, shortlist):
    """Values and indices of the k largest per row and group; and of the k_aux largest dead ones per row.

    NaN lies above all numbers here, so it is chosen and shows in the values: to look for it would stall the GPU.
    """
    if max(k, k_aux) > MOST or len(x) == 0:
        return eager.topk(x, weight, bias, k, group, absolute, dead, k_aux, shortlist)
    return _largest(x, weight, bias, k, group, absolute, dead, k_aux)


def batchtopk(x, weight, bias, k, shortlist):
    """CSR of the k * rows largest entries of the batch; exact ties go to the first row, then feature.

    Each row offers its 4 k largest. That is enough unless a row's offer lies wholly at or above the cut.
    """
    n, most, offer = len(weight), k * len(x), min(len(weight), 4 * k)
    if offer > MOST or len(x) == 0:
        return eager.batchtopk(x, weight, bias, k, shortlist)
    values, indices = _largest(x, weight, bias, offer, n)
    cut = values.flatten().topk(most).values[-1]
    if offer < n and bool((values[:, -1] >= cut).any()):
        return eager.batchtopk(x, weight, bias, k, shortlist)
    rows = torch.arange(len(x), device=x.device)[:, None].expand_as(indices)
    place = (rows * n + indices).flatten().sort()
    keys = values.flatten()[place.indices]
    keep = keys > cut
    ties = (keys == cut).nonzero()[:, 0]
    keep[ties[: most - int(keep.sum())]] = True
    at = place.values[keep]
    return eager._rows(at // n, at % n, keys[keep], len(x))


threshold = eager.threshold  # in blocks of rows
