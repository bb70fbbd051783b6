"""The compiled half of encoding on the CPU: find what may be selected in a tile, then settle it exactly.

A tile holds pre-activations that a matrix product made, in fp32 or bf16, so each is off by an
error with a known bound: for row r and feature i

    spread[r] * norm[i] + slack * |tile|

``spread`` carries what depends on the row (its norm times the relative error of operands and
product), ``norm`` is the length of the feature's encoder row, ``slack`` the rounding of the tile
itself; what adding the bias rounds away comes on top. So every entry has a lower and an upper bound. It is dropped once its upper bound is below
the k-th largest lower bound; what is left, hardly more than k entries, is computed again as a dot
product in fp32 in one order. The support is that of the dot products, whatever made the tile and
however rows and features were cut.
"""

import numpy as np

from saekit.kernels.jit import WORD as CHUNK
from saekit.kernels.jit import bf16_bits, dot, inline, jit, jit_loose, lowest_bit, number, prefetch, reaching

MANY, TOGETHER = 64, 128  # k from which rows are settled together, and how many
AHEAD = 2  # rows asked for before they are needed
SLOTS = 32  # candidates beyond k, or k if that is more, at which a row's limit is raised
GROUPS = 64  # of the first limit
ADDED = np.float32(2.0**-22)  # relative error of adding a bias here and there, and of the bounds themselves
LEAST = np.float32(-3.4e38)  # below every finite key
SMALLEST = np.float32(1e-16)  # of a length: below, squares vanish
MASKED = np.float32(-np.inf)  # the bias of a feature that is left out; its key is below LEAST
TOO_MANY = -1  # in place of a count


@inline
def _key(v, b, absolute):
    s = v + b
    if absolute:
        s = abs(s) if b > MASKED else s
    return s


@inline
def _bounded(v, b, norm, spread, slack, absolute):
    """The key of an entry, and what it may be off by."""
    s = v + b
    return _key(v, b, absolute), spread * norm + slack * abs(v) + (
        ADDED * abs(s) if b > MASKED else np.float32(0)
    )


@jit
def _find(line, most_bias, most_norm, alive, spread, slack, absolute, limit, places):
    """Places in a line whose upper bound may reach the limit, by the largest bias and norm of their chunk."""
    width, found = len(line), 0
    for c in range(len(most_bias)):
        start = c * CHUNK
        least = _reach(limit, most_bias[c], most_norm[c], spread, slack)
        if least > 0 and start + CHUNK <= width:
            word = reaching(line, start, least, absolute) & alive[c]
            while word:
                places[found] = start + lowest_bit(word)
                found += 1
                word &= word - np.uint64(1)
            continue
        for j in range(start, min(width, start + CHUNK)):
            v = number(line[j])
            places[found] = j
            found += (abs(v) if absolute else v) >= least
    return found


@inline
def _reach(limit, most_bias, most_norm, spread, slack):
    """What an entry (its absolute value) must be at least for its upper bound to reach the limit."""
    least = limit - most_bias - spread * most_norm
    if most_bias > MASKED:
        least -= np.float32(4) * ADDED * (abs(limit) + abs(most_bias))
    shrink = slack + np.float32(1e-6)  # bounds 1 / (1 + slack) from below and 1 / (1 - slack) from above
    return least - least * shrink if least > 0 else least + least * (shrink + shrink)


@jit
def chunk_maxima(bias, norm, absolute, most_bias, most_norm, alive):
    """The largest bias and norm of every CHUNK features, and which of them aren't masked, as bits."""
    for c in range(len(most_bias)):
        b, length, word = MASKED, np.float32(0), np.uint64(0)
        for i in range(c * CHUNK, min(len(bias), (c + 1) * CHUNK)):
            if bias[i] > MASKED:
                b, length = max(b, abs(bias[i]) if absolute else bias[i]), max(length, norm[i])
                word |= np.uint64(1) << np.uint64(i - c * CHUNK)
        most_bias[c], most_norm[c], alive[c] = b, length, word


@jit
def largest_first(keys, other, at, n, k):
    """Partition the first n entries so that the k with the largest keys come first (Hoare's select)."""
    left, right = 0, n - 1
    while left < right:
        pivot = keys[(left + right) >> 1]
        i, j = left, right
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                other[i], other[j] = other[j], other[i]
                at[i], at[j] = at[j], at[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            right = j
        elif k - 1 >= i:
            left = i
        else:
            break


@jit
def _smallest(keys, k):
    least = keys[0]
    for i in range(1, k):
        least = min(least, keys[i])
    return least


@jit
def drop(low, high, at, n, k):
    """The k-th largest lower bound, and how many of the n entries reach it with their upper bound."""
    if n <= k:
        return LEAST, n
    largest_first(low, high, at, n, k)
    limit, kept = _smallest(low, k), k
    for i in range(k, n):
        if high[i] >= limit:
            low[kept], high[kept], at[kept] = low[i], high[i], at[i]
            kept += 1
    return limit, kept


@jit
def _first_limit(line, bias, norm, spread, slack, absolute, k, peaks, spare, places):
    """A first bound: at least k lower bounds reach the k-th largest of the maxima of GROUPS groups."""
    for j in range(GROUPS):
        peaks[j] = LEAST
    for start in range(0, len(line) - len(line) % GROUPS, GROUPS):
        for j in range(GROUPS):
            v = number(line[start + j])
            s, error = _bounded(v, bias[start + j], norm[start + j], spread, slack, absolute)
            low = s - error
            peaks[j] = low if low > peaks[j] else peaks[j]
    largest_first(peaks, spare, places, GROUPS, k)
    return _smallest(peaks, k)


@jit
def _scan_line(line, places, found, first, bias, norm, spread, slack, absolute, k, limit, n, low, high, at):
    """Add to a row's candidates those of the places found; returns the new limit and count."""
    room = len(at)
    for i in range(found):
        j = places[i]
        v = number(line[j])
        s, error = _bounded(v, bias[j], norm[j], spread, slack, absolute)
        if s + error < limit:
            continue
        if n == room:
            limit, n = drop(low, high, at, n, k)
            if n == room:
                return limit, TOO_MANY
            if s + error < limit:
                continue
        low[n], high[n], at[n] = s - error, s + error, first + j
        n += 1
    return limit, n


@jit
def scan(
    tile, first, bias, norm, most_bias, most_norm, alive, spread, slack, absolute, group, k,
    limits, counts, full, low, high, at,
):  # fmt: skip
    """Keep what may be among the k largest of its row, or of its group of features.

    tile [rows, width] of the features ``first``, ...; ``group`` features make a group, and a tile
    holds whole groups. State per row and group: limits, counts, the count at which
    the limit is raised (full), candidates low, high, at [room].
    most_bias, most_norm and alive are those of every CHUNK features of a line.
    """
    rows, width = tile.shape
    peaks, spare = np.empty(GROUPS, dtype=np.float32), np.empty(GROUPS, dtype=np.float32)
    order = np.empty(GROUPS, dtype=np.int32)
    places = np.empty(width + 1, dtype=np.int32)
    for r in range(rows):
        e = spread[r]
        for start in range(0, width, group):
            g = (first + start) // group
            end = min(width, start + group)
            n, limit = counts[r, g], limits[r, g]
            if n == TOO_MANY:
                continue
            line, b, length = tile[r, start:end], bias[start:end], norm[start:end]
            if limit == LEAST and k <= GROUPS // 2 and len(line) >= 4 * GROUPS:
                limit = _first_limit(line, b, length, e, slack, absolute, k, peaks, spare, order)
            found = _find(line, most_bias, most_norm, alive, e, slack, absolute, limit, places)
            limit, n = _scan_line(
                line, places, found, first + start, b, length, e, slack, absolute, k, limit, n,
                low[r, g], high[r, g], at[r, g],
            )  # fmt: skip
            if n >= full[r, g]:
                limit, n = drop(low[r, g], high[r, g], at[r, g], n, k)
                full[r, g] = n + max(k, SLOTS)
            limits[r, g], counts[r, g] = limit, n


@inline
def _before(value, index, other, other_index):
    return value > other or (value == other and index < other_index)


@jit
def _sift_down(keys, at, root, size):
    """Restore the heap below ``root``: on top is what comes last (smallest key, then largest index)."""
    key, index = keys[root], at[root]
    child = 2 * root + 1
    while child < size:
        right = child + 1
        if right < size and _before(keys[child], at[child], keys[right], at[right]):
            child = right
        if _before(keys[child], at[child], key, index):
            break
        keys[root], at[root] = keys[child], at[child]
        root = child
        child = 2 * root + 1
    keys[root], at[root] = key, index


@jit
def sort_first(keys, at, n, k):
    """Of n entries the first k by falling key, exact ties to the lowest index, in order, in place."""
    for i in range(k // 2 - 1, -1, -1):
        _sift_down(keys, at, i, k)
    for i in range(k, n):
        if _before(keys[i], at[i], keys[0], at[0]):
            keys[0], at[0] = keys[i], at[i]
            _sift_down(keys, at, 0, k)
    for size in range(k - 1, 0, -1):
        keys[0], keys[size] = keys[size], keys[0]
        at[0], at[size] = at[size], at[0]
        _sift_down(keys, at, 0, size)


@jit
def _exact_by_row(x, weight, bias, counts, high, low, at, k):
    """Write every candidate's dot product over its lower bound, after a last drop."""
    for r in range(counts.shape[0]):
        for g in range(counts.shape[1]):
            if counts[r, g] != TOO_MANY:
                place = at[r, g]
                n = drop(low[r, g], high[r, g], place, counts[r, g], k)[1]
                counts[r, g] = n
                for i in range(n):
                    if i + AHEAD < n:
                        prefetch(weight[place[i + AHEAD]])
                    low[r, g, i] = dot(x[r], weight[place[i]]) + bias[place[i]]


@jit
def _exact_by_feature(x, weight, bias, counts, high, low, at, k):
    """The same, some rows at a time and in the order of the features: a weight's row is read once for them."""
    n_features = len(bias)
    for first in range(0, counts.shape[0], TOGETHER):
        last = min(counts.shape[0], first + TOGETHER)
        starts, total = np.zeros(n_features + 1, np.int32), 0
        for r in range(first, last):
            if counts[r, 0] != TOO_MANY:
                counts[r, 0] = drop(low[r, 0], high[r, 0], at[r, 0], counts[r, 0], k)[1]
                total += counts[r, 0]
                for i in range(counts[r, 0]):
                    starts[at[r, 0, i] + 1] += 1
        for f in range(1, n_features + 1):
            starts[f] += starts[f - 1]
        rows, slots = np.empty(total, np.int32), np.empty(total, np.int32)
        for r in range(first, last):
            for i in range(max(0, counts[r, 0])):
                f = at[r, 0, i]
                rows[starts[f]], slots[starts[f]] = r, i
                starts[f] += 1
        begin = 0
        for f in range(n_features):
            for e in range(begin, starts[f]):
                low[rows[e], 0, slots[e]] = dot(x[rows[e]], weight[f]) + bias[f]
            begin = starts[f]


@jit
def settle(x, weight, bias, absolute, k, counts, low, high, at, values, indices):
    """The k largest of each row (and group) by exact key, in order, exact ties to the lowest index.

    values, indices [rows, groups, k]. A row with too few candidates (a mask leaves fewer than k)
    is filled up with value -inf at index 0.
    """
    rows, groups = counts.shape
    if groups == 1 and k >= MANY:
        _exact_by_feature(x, weight, bias, counts, high, low, at, k)
    else:
        _exact_by_row(x, weight, bias, counts, high, low, at, k)
    for r in range(rows):
        for g in range(groups):
            n = counts[r, g]
            if n == TOO_MANY:
                continue
            key, place = low[r, g], at[r, g]
            if absolute:
                for i in range(n):
                    key[i] = abs(key[i]) if key[i] > MASKED else key[i]
            found = min(n, k)
            sort_first(key, place, n, found)
            for i in range(k):
                if i >= found or key[i] == MASKED:
                    indices[r, g, i], values[r, g, i] = 0, MASKED
                    continue
                f = place[i]
                indices[r, g, i] = f
                values[r, g, i] = (dot(x[r], weight[f]) + bias[f]) if absolute else key[i]


@jit_loose
def row_norms(weight, norm):
    """Length of every row."""
    for i in range(weight.shape[0]):
        norm[i] = max(np.sqrt(dot(weight[i], weight[i])), SMALLEST)


@jit_loose
def round_rows(weight, rounded, norm, lost):
    """bf16 bits of every row, the length of the row and of what rounding took from it."""
    for i in range(weight.shape[0]):
        total, gone = np.float32(0), np.float32(0)
        for j in range(weight.shape[1]):
            bits = bf16_bits(weight[i, j])
            rounded[i, j] = bits
            d = weight[i, j] - number(bits)
            total += weight[i, j] * weight[i, j]
            gone += d * d
        norm[i], lost[i] = max(np.sqrt(total), SMALLEST), np.sqrt(gone)


@jit
def scan_above(
    tile, row, first, base, bias, norm, most_bias, most_norm, alive, spread, slack, limit, n, low, high, at
):
    """Append entries of a tile, from ``row`` on, whose upper bound reaches ``limit``.

    ``at`` gets (base + row) << 32 | feature. Returns ``(count, row)`` where it stopped: the end, or
    a row there may be no room for.
    """
    rows, width = tile.shape
    places = np.empty(width + 1, dtype=np.int32)
    for r in range(row, rows):
        if n + width > len(at):
            return n, r
        line, e = tile[r], spread[r]
        found = _find(line, most_bias, most_norm, alive, e, slack, False, limit, places)
        for i in range(found):
            j = places[i]
            v = number(line[j])
            s, error = _bounded(v, bias[j], norm[j], e, slack, False)
            low[n], high[n], at[n] = s - error, s + error, (base + r) << 32 | (first + j)
            n += s + error >= limit
    return n, rows


@jit
def settle_entries(x, weight, bias, at, values):
    """Pre-activations of single entries, as dot products."""
    for i in range(len(at)):
        if i + AHEAD < len(at):
            prefetch(weight[at[i + AHEAD] & 0xFFFFFFFF])
        r, f = at[i] >> 32, at[i] & 0xFFFFFFFF
        values[i] = dot(x[r], weight[f]) + bias[f]
