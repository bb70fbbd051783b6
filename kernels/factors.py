"""Gradients of weights as sums of outer products, kept as such until the optimizer needs them.

The gradient of an encoder or decoder whose codes are sparse is ``sum_e value_e * (feature_e (x)
matrix[row_e])``: a few numbers per entry and a matrix that exists anyway. Inside ``collect`` the
operations of this package hand it over in that form, so that the optimizer can sum, project and
apply it row by row, and no dense gradient is ever written.
"""

import threading
from contextlib import contextmanager

import torch

_open = threading.local()


class Factors:
    """A gradient [n, d] in parts: entries (row of a matrix, feature, value) for each of some matrices."""

    def __init__(self, orders=None):
        self.terms = []
        self.orders = {} if orders is None else orders  # found while sorting; shared by one collect

    def __bool__(self):
        return bool(self.terms)

    def add(self, rows, features, values, matrix):
        """One sum: int rows and features [nnz], values [nnz], matrix [m, d]."""
        self.terms.append((rows, features, values, matrix))

    def joined(self):
        """All terms as one; matrices that are the same are not repeated."""
        if len(self.terms) == 1:
            return self.terms[0]
        matrices, place, size = [], {}, 0
        rows = []
        for r, _, _, matrix in self.terms:
            key = (matrix.data_ptr(), matrix.shape)
            if key not in place:
                place[key] = size
                matrices.append(matrix)
                size += len(matrix)
            rows.append(r + place[key])
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        features, values = (torch.cat([term[i] for term in self.terms]) for i in (1, 2))
        return torch.cat(rows), features, values, matrix

    def dense(self, n_features):
        """The gradient itself."""
        from saekit.kernels.product import sum_outer

        rows, features, values, matrix = self.joined()
        return sum_outer(rows, features, values, matrix, n_features)


@contextmanager
def collect(weights):
    """Within it, weights get their sparse gradients as the Factors of this mapping, not as ``.grad``.

    Yields ``{weight: Factors}``. Both the forward and the backward pass belong inside. What reaches
    a weight through other operations still arrives in ``.grad``.
    """
    orders: dict = {}
    found = {weight: Factors(orders) for weight in weights}
    before = getattr(_open, "by_address", {})
    _open.by_address = {**before, **{(w.data_ptr(), w.shape): f for w, f in found.items()}}
    try:
        yield found
    finally:
        _open.by_address = before


def collector(weight):
    """Where the sparse gradient of a weight goes, or None; asked for in the forward pass."""
    by_address = None if torch.compiler.is_compiling() else getattr(_open, "by_address", None)
    return by_address.get((weight.data_ptr(), weight.shape)) if by_address else None
