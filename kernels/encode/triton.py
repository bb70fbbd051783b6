"""Encodings on a GPU: products tile by tile in registers; only what may be selected is ever written.

A program owns a block of rows and a run of features. It goes through the run tile by tile and
appends each entry above its row's limit to the row's candidates. When they might not fit any more
it keeps the k largest, whose least becomes the limit. A last selection over the candidates of all
runs is exact: within a run candidates stand by rising index, so equal keys go to the lowest.
"""

import torch
import triton
import triton.language as tl

from saekit.kernels.encode import eager

ROWS, FEATURES, DEPTH = 64, 128, 32  # of a tile, and of a step along d_in
RUNS = 8  # of features, so that enough programs run side by side
MOST = 512  # k beyond which a block's candidates no longer fit into registers


@triton.jit
def _ordered(key):
    """Integers in the order of the floats."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _keep_largest(found, places, base, slots, count, limit, k, ABSOLUTE: tl.constexpr, ROWS: tl.constexpr):
    """Reduce every row's candidates to the k largest, in their order; returns the new limits and counts."""
    tl.debug_barrier()  # what other threads have just written
    have = slots[None, :] < count[:, None]
    v = tl.load(found + base[:, None] + slots[None, :], mask=have, other=0.0)
    p = tl.load(places + base[:, None] + slots[None, :], mask=have, other=0)
    order = tl.where(have, _ordered(tl.abs(v) if ABSOLUTE else v), -2147483648)
    low, high = (
        tl.full([ROWS], -2147483648, dtype=tl.int64),
        tl.full([ROWS], 2147483647, dtype=tl.int64),
    )
    for _ in range(32):  # the largest number that k candidates reach
        middle = (low + high + 1) >> 1
        enough = tl.sum((order.to(tl.int64) >= middle[:, None]).to(tl.int32), axis=1) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    above, equal = order.to(tl.int64) > low[:, None], (order.to(tl.int64) == low[:, None]) & have
    spare = k - tl.sum(above.to(tl.int32), axis=1)
    keep = (above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= spare[:, None]))) & have
    full = count >= k
    keep = tl.where(full[:, None], keep, have)
    slot = tl.cumsum(keep.to(tl.int32), axis=1) - 1
    tl.debug_barrier()  # all have read
    tl.store(found + base[:, None] + slot, v, mask=keep)
    tl.store(places + base[:, None] + slot, p, mask=keep)
    tl.debug_barrier()
    smallest = tl.min(tl.where(keep, tl.abs(v) if ABSOLUTE else v, float("inf")), axis=1)
    limit = tl.where(full, smallest, limit)
    count = tl.sum(keep.to(tl.int32), axis=1)
    return limit, count


@triton.jit
def _candidates(
    x, weight, bias, found, places, counts, rows, n, d_in, run, k,
    ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, ROOM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = r < rows
    first, runs = tl.program_id(1) * run, tl.num_programs(1)
    last = tl.minimum(first + run, n)
    base = (r.to(tl.int64) * runs + tl.program_id(1)) * ROOM
    slots = tl.arange(0, ROOM)
    limit = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    count = tl.zeros([ROWS], dtype=tl.int32)
    for start in range(first, last, FEATURES):
        f = start + tl.arange(0, FEATURES)
        live = f < last
        u = tl.zeros([ROWS, FEATURES], dtype=tl.float32)
        for depth in range(0, d_in, DEPTH):
            c = depth + tl.arange(0, DEPTH)
            a = tl.load(
                x + r.to(tl.int64)[:, None] * d_in + c[None, :],
                mask=here[:, None] & (c < d_in)[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + f.to(tl.int64)[None, :] * d_in + c[:, None],
                mask=live[None, :] & (c < d_in)[:, None],
                other=0.0,
            )
            u = tl.dot(a, b, u, input_precision=PRECISION)
        u += tl.load(bias + f, mask=live, other=0.0).to(tl.float32)[None, :]
        key = tl.abs(u) if ABSOLUTE else u
        take = (key > limit[:, None]) & live[None, :] & here[:, None]
        slot = count[:, None] + tl.cumsum(take.to(tl.int32), axis=1) - 1
        tl.store(found + base[:, None] + slot, u, mask=take)
        tl.store(places + base[:, None] + slot, tl.broadcast_to(f[None, :], [ROWS, FEATURES]), mask=take)
        count += tl.sum(take.to(tl.int32), axis=1)
        if tl.max(count, axis=0) + FEATURES > ROOM:
            limit, count = _keep_largest(found, places, base, slots, count, limit, k, ABSOLUTE, ROWS)
    tl.store(counts + r.to(tl.int64) * runs + tl.program_id(1), count, mask=here)


def _largest(x, weight, bias, k, absolute):
    """Values and indices of the k largest per row."""
    rows, n = len(x), len(weight)
    room = triton.next_power_of_2(k + 2 * FEATURES)
    run = triton.cdiv(triton.cdiv(n, RUNS), FEATURES) * FEATURES
    runs = triton.cdiv(n, run)
    found = torch.empty(rows, runs, room, device=x.device)
    places = torch.empty(rows, runs, room, dtype=torch.int32, device=x.device)
    counts = torch.empty(rows, runs, dtype=torch.int32, device=x.device)
    _candidates[(triton.cdiv(rows, ROWS), runs)](
        x, weight, bias, found, places, counts, rows, n, x.shape[1], run, k, ABSOLUTE=absolute, ROWS=ROWS,
        FEATURES=FEATURES, DEPTH=DEPTH, ROOM=room, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    empty = torch.arange(room, device=x.device) >= counts[..., None]
    keys = (found.abs() if absolute else found).masked_fill(empty, -torch.inf).flatten(1)
    at = eager.largest(keys, k)
    return found.flatten(1).gather(1, at).to(x.dtype), places.flatten(1).gather(1, at)


def _check(values, x, weight, bias):
    """Raise when NaN or Inf came in: such entries are never, or always, among the largest."""
    if not torch.isfinite(values).all() or not all(torch.isfinite(t).all() for t in (x, weight, bias)):
        name = next(
            (n for n, t in (("x", x), ("weight", weight), ("bias", bias)) if not torch.isfinite(t).all()),
            "a product",
        )
        raise ValueError(f"{name} holds NaN or Inf; remove it")


def topk(x, weight, bias, k, group, absolute, dead, k_aux, shortlist):
    """Values and indices of the k largest per row and group; and of the k_aux largest dead ones per row."""
    if group < len(weight) or max(k, k_aux) > MOST or len(x) == 0:
        return eager.topk(x, weight, bias, k, group, absolute, dead, k_aux, shortlist)
    values, indices = _largest(x, weight, bias, k, absolute)
    _check(values, x, weight, bias)
    if dead is None:
        return values, indices
    chosen = dead.nonzero()[:, 0]
    picks = min(k_aux, len(chosen))
    aux_values = x.new_full((len(x), k_aux), -torch.inf)
    aux_indices = torch.zeros(len(x), k_aux, dtype=torch.int32, device=x.device)
    if picks:
        v, i = _largest(x, weight[chosen], bias[chosen], picks, False)
        aux_values[:, :picks], aux_indices[:, :picks] = v, chosen[i.long()].int()
    return values, indices, aux_values, aux_indices


def batchtopk(x, weight, bias, k, shortlist):
    """CSR of the k * rows largest entries of the batch; exact ties go to the first row, then feature.

    Each row offers its 4 k largest. That is enough unless a row's offer lies wholly at or above the cut.
    """
    n, most, offer = len(weight), k * len(x), min(len(weight), 4 * k)
    if offer > MOST or len(x) == 0:
        return eager.batchtopk(x, weight, bias, k, shortlist)
    values, indices = _largest(x, weight, bias, offer, False)
    _check(values, x, weight, bias)
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
