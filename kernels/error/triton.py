"""nested_error on a GPU: a program decodes a piece of one row for all prefixes, in fp32; the slopes are sampled after."""

import torch
import triton
import triton.language as tl

from saekit.kernels.product.triton import ENTRIES, WIDTH, sample_rows


@triton.jit
def _errors(
    offsets, indices, values, weight, bias, target, ends, shares, later, squares, rows, width, levels,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """later[p, r]: what the features of level p are responsible for; squares[p, r, piece]: of error p."""
    r, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = piece * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    start, end = tl.load(offsets + r), tl.load(offsets + r + 1)
    error = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    error -= tl.load(target + r * width + columns, mask=inside, other=0.0).to(tl.float32)
    begin = tl.full([], 0, tl.int32)
    for p in range(levels):
        stop = tl.load(ends + p)
        part = tl.zeros([ENTRIES, WIDTH], dtype=tl.float32)
        for first in range(start, end, ENTRIES):
            e = first + tl.arange(0, ENTRIES)
            feature = tl.load(indices + e, mask=e < end, other=-1).to(tl.int64)
            live = (feature >= begin) & (feature < stop)
            value = tl.load(values + e, mask=live, other=0.0).to(tl.float32)
            at = weight + feature[:, None] * width + columns[None, :]
            atoms = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)
            part += value[:, None] * atoms.to(tl.float32)
        error += tl.sum(part, axis=0)
        begin = stop
        tl.store(squares + (p * rows + r) * tl.num_programs(1) + piece, tl.sum(error * error, axis=0))
        weighted = tl.load(shares + p) * error
        for q in range(p + 1):  # each thread adds to what it wrote itself
            place = later + (q * rows + r) * width + columns
            before = tl.load(place, mask=inside & (q < p), other=0.0).to(tl.float32)
            tl.store(place, (before + weighted).to(later.dtype.element_ty), mask=inside)


def nested_error(offsets, indices, values, weight, bias, target, prefixes, shares):
    """See ``cpu.py``."""
    rows, width = target.shape
    device, levels, pieces = target.device, len(prefixes), triton.cdiv(width, WIDTH)
    ends = torch.tensor(prefixes, dtype=torch.int32).to(device, non_blocking=True)
    of_level = torch.tensor(shares, dtype=torch.float32).to(device, non_blocking=True)
    later = torch.empty(levels, rows, width, dtype=target.dtype, device=device)
    squares = torch.empty(levels, rows, pieces, device=device)
    at = torch.repeat_interleave(torch.arange(rows, device=device), offsets.diff(), output_size=len(indices))
    if rows:
        _errors[(rows, pieces)](
            offsets, indices, values, weight, bias, target, ends, of_level, later, squares, rows, width, levels,
            ENTRIES=ENTRIES, WIDTH=WIDTH,
        )  # fmt: skip
    if levels > 1:
        at += rows * torch.searchsorted(ends, indices, right=True)
    slopes = sample_rows(offsets, indices, weight, at, later.flatten(0, 1))
    return squares.sum(-1).to(target.dtype), later, slopes.to(values.dtype)
