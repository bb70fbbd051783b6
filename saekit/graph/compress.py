"""Dense rows to sparse ones that keep the strongest entries and the sums of the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from saekit.kernels.sparse import count, fill
from saekit.kernels.threads import parallel

ROWS = 16  # that one thread takes at a time


@dataclass(frozen=True)
class Rows:
    """Some rows of a graph: a sparse matrix, and of each row the sum of the sizes that its pruned entry stands for."""

    matrix: csr_array
    dropped: Float[np.ndarray, " row"]


def compress(block: Float[np.ndarray, "row node"], most: int, rest: int, width: int) -> Rows:
    """The strongest ``most`` entries of each row (of equal ones the first); the others' sum in column ``rest``, which
    is behind them. ``width``: columns of the matrix.
    """
    n = len(block)
    cuts, counts = np.zeros(n, block.dtype), np.zeros(n, np.int64)
    parallel(lambda a, b: count(block, a, b, most, cuts, counts), n, ROWS)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    data, indices = np.empty(offsets[-1], block.dtype), np.empty(offsets[-1], np.int32)
    sizes = np.zeros(n)
    parallel(lambda a, b: fill(block, a, b, rest, cuts, offsets, data, indices, sizes), n, ROWS)
    return Rows(csr_array((data, indices, offsets), shape=(n, width), copy=False), sizes)


def below(parts: Sequence[Rows]) -> tuple[csr_array, Float[np.ndarray, " row"]]:
    """Rows below each other."""
    starts = np.cumsum([0, *(part.matrix.nnz for part in parts)])
    offsets = np.concatenate(
        [[0], *(part.matrix.indptr[1:] + at for part, at in zip(parts, starts, strict=False))]
    )
    data, indices = (np.concatenate([getattr(part.matrix, n) for part in parts]) for n in ("data", "indices"))
    shape = (len(offsets) - 1, parts[0].matrix.shape[1])
    return csr_array((data, indices, offsets), shape=shape, copy=False), np.concatenate(
        [p.dropped for p in parts]
    )
