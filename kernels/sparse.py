"""Dense rows to sparse ones: the strongest entries, and the sums of the rest."""

import numpy as np

from saekit.kernels.jit import jit


@jit
def count(block, first, stop, most, cuts, counts):
    """How many entries of each row stay, and the size down to which they do."""
    for r in range(first, stop):
        row, n = block[r], 0
        for value in row:
            n += value != 0
        cuts[r], counts[r] = 0, n
        if n > most:
            counts[r] = most + 1  # one for the rest
            cuts[r] = -np.partition(-np.abs(row), most - 1)[most - 1]


@jit
def fill(block, first, stop, rest, cuts, offsets, data, indices, sizes):
    """The entries that :func:`count` leaves, and at each row's end the sum of the others; the first ones of equal size stay."""
    for r in range(first, stop):
        at, end, cut = offsets[r], offsets[r + 1], cuts[r]
        row = block[r]
        above = 0
        if cut > 0:
            for value in row:
                above += abs(value) > cut
        ties = end - 1 - at - above  # of the entries at the cut, the first ones stay
        lost, size = 0.0, 0.0
        for c in range(len(row)):
            value = row[c]
            stays = value != 0 if cut == 0 else abs(value) > cut
            if cut > 0 and abs(value) == cut and ties > 0:
                stays, ties = True, ties - 1
            if stays:
                data[at], indices[at] = value, c
                at += 1
            elif value != 0:
                lost += value
                size += abs(value)
        if cut > 0:
            data[at], indices[at] = lost, rest
        sizes[r] = size
