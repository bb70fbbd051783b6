"""Encoding on the CPU: tiles of pre-activations that stay in cache, made and searched by one thread.

The product of a tile runs in fp32, or in bf16 on the matrix unit (``shortlist="bf16"``); both only
shortlist. What is returned are dot products in fp32, so values and supports are the same bits for
either, for any number of threads, and for any tile. See ``scan.py`` for the bounds.
"""

import numpy as np
import torch

from saekit.kernels.backend import matrix_unit
from saekit.kernels.encode import scan
from saekit.kernels.threads import count, parallel, scratch

TILE = 1 << 21  # entries of a tile: 8 MB in fp32; smaller ones cost more in calls than they gain in cache
ROWS = 1024  # of a block: the product is fastest with many rows and few features
CANDIDATES = 1 << 18  # of all rows of a block: bounds their memory to a few MB
UNIT = 2.0**-24  # relative error of one fp32 operation
BF16_TILE = 2.0**-8 * 1.01  # relative error of rounding an entry of a tile to bf16, which has 8 bits
HUGE = 1e18  # of lengths, so that products and their squares stay finite
REDUCED = 2.0**-7 * 1.01  # of a product of two operands rounded to bf16
SAFETY = np.float32(1.001)  # for the rounding of the bounds themselves


class Products:
    """The products of one encode: operands in the tile's dtype, and the error bounds that go with them."""

    def __init__(self, x, weight, bias, shortlist):
        if shortlist == "auto":
            shortlist = "bf16" if matrix_unit() else "fp32"
        self.left, self.right, self.shortlist = x, weight, shortlist
        n, d_in = weight.shape
        self.x, self.weight, self.bias = x.numpy(), weight.numpy(), bias.numpy()
        self.norm, self.spread = np.empty(n, np.float32), np.empty(len(x), np.float32)
        self.rounding = 2 * (d_in + 8) * UNIT  # of the product, and of the dot product it is compared with
        if torch.get_float32_matmul_precision() != "highest":
            self.rounding += REDUCED  # torch may then round the operands of an fp32 product to bf16 as well
        self.slack = np.float32(BF16_TILE if shortlist == "bf16" else 0)
        if shortlist == "bf16":
            self.right = scratch("weight", (n, d_in), torch.bfloat16)
            lost = np.empty(n, np.float32)
            parallel(
                lambda a, b: _round(self.weight[a:b], self.right[a:b], self.norm[a:b], lost[a:b]), n, 512
            )
        else:
            parallel(lambda a, b: scan.row_norms(self.weight[a:b], self.norm[a:b]), n, 512)
        _check_finite("weight", self.norm, 0)
        _check_finite("bias", np.abs(self.bias), 0)
        if shortlist == "bf16":
            self.lost = float((lost / self.norm).max(initial=0))

    def _rows(self, start, end):
        """The rows of a block as an operand; sets their spread."""
        x, norm = self.x[start:end], np.empty(end - start, np.float32)
        if self.shortlist == "bf16":
            left = scratch("rows", x.shape, torch.bfloat16)
            lost = np.empty_like(norm)
            _round(x, left, norm, lost)
            spread = lost + (norm + lost) * (self.lost + self.rounding)
        else:
            left = self.left[start:end]
            scan.row_norms(x, norm)
            spread = norm * self.rounding
        _check_finite("x", norm, start)
        self.spread[start:end] = spread * SAFETY
        return left

    def maxima(self, bias, absolute=False):
        """Of every chunk of features: largest bias, largest norm, and bits of those not masked."""
        n = -(-len(bias) // scan.CHUNK)
        out = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.uint64)
        scan.chunk_maxima(bias, self.norm, absolute, *out)
        return out

    def sweep(self, *selections):
        """Show every tile to every selection, block of rows by block of rows.

        Where one's groups don't line up with another's chunks, each gets tiles of its own.
        """
        widest = max(s.multiple for s in selections)
        if any(widest % s.multiple for s in selections):
            for selection in selections:
                self.sweep(selection)
            return
        rows, most = len(self.x), max(1, CANDIDATES // max(s.room for s in selections))
        parallel(
            lambda a, b: self.block(a, b, selections), rows, min(ROWS, most, max(1, -(-rows // count())))
        )

    def block(self, start, end, selections):
        """The tiles of one block of rows; each is made and searched before the next."""
        n, multiple = len(self.weight), max(s.multiple for s in selections)  # features that a tile can't part
        left = self._rows(start, end)
        begun = [s.begin(start, end, str(i)) for i, s in enumerate(selections)]
        width = max(1, TILE // (end - start) // multiple) * multiple
        for first in range(0, n, width):
            last = min(n, first + width)
            tile = scratch("tile", (end - start, last - first), left.dtype)
            torch.mm(left, self.right[first:last].T, out=tile)
            for visit, _ in begun:
                visit(tile, first, last)
        for _, finish in begun:
            finish()


def _check_finite(name, sizes, first):
    """Raise unless no product can overflow or be NaN."""
    if not sizes.max(initial=0) < HUGE:
        bad = first + int(np.flatnonzero(~(sizes < HUGE))[0])
        raise ValueError(f"{name} holds NaN, Inf or more than {HUGE:.0e} in row {bad}; remove it")


def _round(rows, out, norm, lost):
    scan.round_rows(rows, out.view(torch.int16).numpy(), norm, lost)


def _array(tile):
    return (tile.view(torch.int16) if tile.dtype == torch.bfloat16 else tile).numpy()


class LargestOfRow:
    """The k largest of each row, or of each group of features of a row; ``mask`` leaves features out."""

    def __init__(self, products, k, group, absolute=False, mask=None):
        self.products, self.k, self.group, self.absolute = products, k, group, absolute
        n = len(products.weight)
        self.bias = products.bias if mask is None else np.where(mask, products.bias, np.float32(-np.inf))
        self.groups = n // group
        self.width = min(group, 4 * k + 128)  # candidates of a row and group
        self.room, self.multiple = self.groups * self.width, group if self.groups > 1 else scan.CHUNK
        self.maxima = products.maxima(self.bias, absolute)
        if self.groups > 1:  # chunks would begin anew with each group
            n = -(-group // scan.CHUNK)
            most_bias, most_norm, _ = self.maxima
            self.maxima = np.full(n, most_bias.max()), np.full(n, most_norm.max()), np.full(n, ~np.uint64(0))
        shape = (len(products.x), self.groups, k)
        self.values, self.indices = np.empty(shape, np.float32), np.empty(shape, np.int32)

    def begin(self, start, end, name):
        """For a block of rows: what takes a tile, and what ends the block."""
        p, shape = self.products, (end - start, self.groups)
        limits, counts = np.full(shape, scan.LEAST), np.zeros(shape, np.int64)
        full = np.full(shape, self.k + max(self.k, scan.SLOTS))
        low, high, at = (
            scratch(name + part, (*shape, self.width), dtype).numpy()
            for part, dtype in (("low", torch.float32), ("high", torch.float32), ("at", torch.int32))
        )

        def visit(tile, first, last):
            part = slice(first, last)
            chunks = slice(first // scan.CHUNK, -(-last // scan.CHUNK)) if self.groups == 1 else slice(None)
            scan.scan(
                _array(tile), first, self.bias[part], p.norm[part], *(m[chunks] for m in self.maxima),
                p.spread[start:end], p.slack, self.absolute, self.group, self.k, limits, counts, full, low, high, at,
            )  # fmt: skip

        def finish():
            self._settle(start, end, counts, low, high, at)
            for r in np.unique((counts == scan.TOO_MANY).nonzero()[0]):
                self._settle_whole(start + int(r))

        return visit, finish

    def _settle(self, start, end, counts, low, high, at):
        part = slice(start, end)
        scan.settle(
            self.products.x[part], self.products.weight, self.bias, self.absolute, self.k, counts,
            low, high, at, self.values[part], self.indices[part],
        )  # fmt: skip

    def _settle_whole(self, row):
        """A row with more near-ties than there is room for: all its entries are candidates."""
        shape = (1, self.groups, self.group)
        at = np.arange(self.groups * self.group, dtype=np.int32).reshape(shape)
        bounds = np.full(shape, np.inf, np.float32)
        counts = np.full(shape[:2], self.group, np.int64)
        self._settle(row, row + 1, counts, bounds, bounds.copy(), at)

    def result(self):
        """Values fp32 and indices int32, [rows, groups * k]."""
        shape = (len(self.values), self.groups * self.k)
        return tuple(torch.from_numpy(a.reshape(shape)) for a in (self.values, self.indices))


class Above:
    """The entries above a limit; with ``most``, only those that may be among the so many largest of all.

    ``lower`` [n_features] is the limit of each feature, or -inf with ``most``.
    """

    multiple = scan.CHUNK
    room = 1
    even = True  # no row is taken to hold much more than its share, until that proves wrong

    def __init__(self, products, lower=None, most=None):
        self.products, self.most = products, most
        self.lower = np.zeros_like(products.bias) if lower is None else lower
        self.bias = products.bias - self.lower
        self.maxima = products.maxima(self.bias)
        self.limit = np.float32(0) if most is None else scan.LEAST
        self.found, self.limits = [], []  # per block: (low, high, at), and the limit it ended with

    def begin(self, start, end, name):
        """For a block of rows: what takes a tile, and what ends the block."""
        p, n, limit = self.products, 0, self.limit
        share = self.most
        if (
            share is not None and self.even
        ):  # twice a block's share of the largest is enough, which is checked
            share = min(share, 2 * -(-share * (end - start) // len(p.x)))
        size = 64 * (end - start) if share is None else 2 * min(share, 64 * (end - start)) + 4096
        low, high, at = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.int64)

        def visit(tile, first, last):
            nonlocal n, limit, low, high, at
            part, row = slice(first, last), 0
            numbers = _array(tile)
            chunks = slice(first // scan.CHUNK, -(-last // scan.CHUNK))
            while True:
                n, row = scan.scan_above(
                    numbers, row, first, start, self.bias[part], p.norm[part], *(m[chunks] for m in self.maxima),
                    p.spread[start:end], p.slack, limit, n, low, high, at,
                )  # fmt: skip
                if row == len(tile):
                    return
                if share is not None:
                    limit, n = scan.drop(low, high, at, n, share)
                if n + tile.shape[1] > len(at):
                    low, high, at = (np.concatenate([a, np.empty_like(a)]) for a in (low, high, at))

        def finish():
            self.found.append(tuple(a[:n].copy() for a in (low, high, at)))
            self.limits.append(limit)

        return visit, finish

    def places(self):
        """``row << 32 | feature`` of what may belong to the result, in order; None when a limit was too high."""
        none = np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int64)
        low, high, at = (np.concatenate(parts) for parts in zip(none, *self.found, strict=True))
        if self.most:  # every block holds its share at least
            limit = np.partition(low, len(low) - self.most)[len(low) - self.most]
            if max(self.limits) > limit:
                self.limit, self.found, self.limits, self.even = limit, [], [], False
                return None
            at = at[high >= limit]
        return np.sort(at)


def topk(x, weight, bias, k, group, absolute, dead, k_aux, shortlist):
    """Values and indices of the k largest per row and group; and of the k_aux largest dead ones per row."""
    products = Products(x, weight, bias, shortlist)
    selections = [LargestOfRow(products, k, group, absolute)]
    if dead is not None:
        selections.append(LargestOfRow(products, k_aux, len(weight), mask=dead.numpy()))
    products.sweep(*selections)
    return tuple(out for s in selections for out in s.result())


def batchtopk(x, weight, bias, k, shortlist):
    """CSR of the k * rows largest entries of the batch; exact ties go to the first row, then feature."""
    most = k * len(x)
    products = Products(x, weight, bias, shortlist)
    above = Above(products, most=most)
    at = None
    while at is None:
        products.sweep(above)
        at = above.places()
    values = _exact(products, at)
    if not most:
        return _rows(products, at, values)
    cut = np.partition(values, len(values) - most)[len(values) - most]
    keep = values > cut
    ties = np.flatnonzero(values == cut)
    keep[ties[: most - int(keep.sum())]] = True
    return _rows(products, at[keep], values[keep])


def threshold(x, weight, bias, lower, shortlist):
    """CSR of the entries above their feature's ``lower``."""
    products = Products(x, weight, bias, shortlist)
    above = Above(products, lower.numpy())
    products.sweep(above)
    at = above.places()
    values = _exact(products, at)
    keep = values > lower.numpy()[at & 0xFFFFFFFF]
    return _rows(products, at[keep], values[keep])


def _exact(products, at):
    values = np.empty(len(at), np.float32)

    def settle(a, b):
        scan.settle_entries(products.x, products.weight, products.bias, at[a:b], values[a:b])

    parallel(settle, len(at), 4096)
    return values


def _rows(products, at, values):
    offsets = np.zeros(len(products.x) + 1, np.int64)
    np.cumsum(np.bincount(at >> 32, minlength=len(products.x)), out=offsets[1:])
    return tuple(torch.from_numpy(a) for a in (offsets, (at & 0xFFFFFFFF).astype(np.int32), values))
