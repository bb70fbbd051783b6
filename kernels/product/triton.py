"""Sparse products on a GPU: a program sums the rows of a table that its segment names, in order, without atomics."""

import torch
import triton
import triton.language as tl

ENTRIES, WIDTH = 2, 512  # of a block that a program gathers at once


@triton.jit
def _sum_segments(starts, rows, values, table, out, width, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """out[s] = sum over the entries e of segment s of values[e] * table[rows[e]]."""
    segment, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    total = tl.zeros([ENTRIES, WIDTH], dtype=tl.float32)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    for first in range(start, end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        live = e < end
        row = tl.load(rows + e, mask=live, other=0).to(tl.int64)
        value = tl.load(values + e, mask=live, other=0.0).to(tl.float32)
        part = tl.load(
            table + row[:, None] * width + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        total += value[:, None] * part.to(tl.float32)
    out_at = out + segment * width + columns
    tl.store(out_at, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots(starts, rows, table, at, grad, out, width, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """out[e] = <table[rows[e]], grad[at[e]]> for the entries e of segment s."""
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    for first in range(start, end, ENTRIES):
        e = first + tl.arange(0, ENTRIES)
        live = e < end
        row = tl.load(rows + e, mask=live, other=0).to(tl.int64)
        other = tl.load(at + e, mask=live, other=0)
        total = tl.zeros([ENTRIES, WIDTH], dtype=tl.float32)
        for begin in range(0, width, WIDTH):
            columns = begin + tl.arange(0, WIDTH)
            mask = live[:, None] & (columns < width)[None, :]
            part = tl.load(table + row[:, None] * width + columns[None, :], mask=mask, other=0.0)
            g = tl.load(grad + other[:, None] * width + columns[None, :], mask=mask, other=0.0)
            total += part.to(tl.float32) * g.to(tl.float32)
        tl.store(out + e, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=live)


def sum_segments(starts, rows, values, table):
    """Weighted sums of rows of a table by segment: starts int64 [segments + 1] -> [segments, width]."""
    segments, width = len(starts) - 1, table.shape[1]
    out = table.new_empty(segments, width)
    if segments:
        grid = (segments, triton.cdiv(width, WIDTH))
        _sum_segments[grid](starts, rows, values, table, out, width, ENTRIES=ENTRIES, WIDTH=WIDTH)
    return out


def by_feature(rows, features, values, n_features, orders=None):
    """The entries sorted by feature, stably: starts int64 [n + 1], rows, values.

    ``orders`` keeps the order found for these features, which encoder and decoder share.
    """
    orders = {} if orders is None else orders
    key = (features.data_ptr(), len(features), n_features)
    if key not in orders:  # the features are kept too: while they live nothing else has their address
        ordered, order = torch.sort(features, stable=True)
        ends = torch.arange(n_features + 1, dtype=features.dtype, device=features.device)
        orders[key] = torch.searchsorted(ordered, ends), order, features
    starts, order, _ = orders[key]
    return starts, rows[order].int(), values[order]


def decode(offsets, indices, values, weight):
    """``out[r] = sum_e values[e] weight[indices[e]]`` over the entries of row r."""
    return sum_segments(offsets, indices, values, weight)


def sample_rows(offsets, indices, weight, at, grad):
    """``out[e] = <weight[indices[e]], grad[at[e]]>``."""
    out = weight.new_empty(len(indices))
    if len(offsets) > 1:
        _dots[(len(offsets) - 1,)](
            offsets, indices, weight, at, grad, out, weight.shape[1], ENTRIES=ENTRIES, WIDTH=WIDTH
        )
    return out


def sample(offsets, indices, weight, grad):
    """``out[e] = <weight[indices[e]], grad[row of e]>``."""
    rows = torch.repeat_interleave(
        torch.arange(len(grad), device=grad.device), offsets.diff(), output_size=len(indices)
    )
    return sample_rows(offsets, indices, weight, rows, grad)


def sum_outer(rows, features, values, matrix, n_features):
    """``out[i] = sum of values[e] matrix[rows[e]]`` over the entries e of feature i, in their order."""
    starts, sorted_rows, sorted_values = by_feature(rows, features, values, n_features)
    return sum_segments(starts, sorted_rows, sorted_values, matrix)
