"""Features that fire in the same pieces of text, clustered; and atoms clustered by where they point (2410.19750, §4).

An affinity of all pairs of features is a sparse matrix, of the pairs that fire together at all, and a product of two thin
ones: so its eigenvectors are found without a matrix of all pairs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.registry import Registry
from saekit.types import Codes, SaekitError

AFFINITIES = Registry(
    "affinity",
    {
        name: f"saekit.analyses.lobes:{name}"
        for name in ("simple_matching", "jaccard", "dice", "overlap", "phi")
    },
)
BLOCK = 256  # tokens of a piece of text


@dataclass(frozen=True)
class Cooccurrence:
    """``together[i, j]``: blocks in which both fire, of ``blocks``; ``own[i]``, its diagonal: in which one does. For the ``features`` that fire at all."""

    together: Any  # a scipy sparse matrix, [fired, fired]
    own: Float[np.ndarray, " fired"]
    blocks: int
    features: Int[Tensor, " fired"]


def cooccurrence(codes: Iterable[Codes], block: int = BLOCK, above: float = 0.0) -> Cooccurrence:
    """Count features that fire together in blocks of ``block`` tokens, over batches of codes of any size.

    A feature fires in a block where any of its tokens has a value over ``above`` (the paper's threshold is 1). Rows of
    batches follow each other, and tokens that fill no block are left out. Holds the pairs that fire together.
    """
    if block < 1:
        raise SaekitError(f"block = {block} must be at least 1 token; choose more")
    total: Any = None
    blocks, rest, width = 0, np.zeros((0, 2), dtype=np.int64), None
    seen = 0  # tokens since the last whole block
    for batch in codes:
        if not bool(batch.values.isfinite().all()):
            raise SaekitError("codes hold NaN or inf; give finite values")
        if width not in (None, batch.n_features):
            raise SaekitError(f"codes have {batch.n_features} features, and those before {width}; give one dictionary's")  # fmt: skip
        width = batch.n_features
        on = (batch.values > above).cpu()
        row, feature = batch.row_ids().cpu()[on] + seen, batch.indices.cpu()[on].long()
        entries = np.concatenate([rest, np.stack([row.numpy(), feature.numpy()], 1)])
        seen += batch.rows
        whole = seen // block
        inside = entries[:, 0] < whole * block
        if whole:
            fires = _fires(entries[inside], block, whole, width)
            total = fires.T @ fires if total is None else total + fires.T @ fires
        rest, seen, blocks = entries[~inside] - [whole * block, 0], seen - whole * block, blocks + whole
    own = np.zeros(0) if total is None else total.diagonal()
    features = np.flatnonzero(own)
    if len(features) < 2:
        raise SaekitError(f"{len(features)} feature(s) fire in {blocks} whole blocks of {block} tokens; give more tokens, or smaller blocks")  # fmt: skip
    if total.nnz == len(features):
        raise SaekitError(f"no two of {len(features)} features fire in the same of {blocks} blocks of {block} tokens; give more tokens, or larger blocks")  # fmt: skip
    return Cooccurrence(total.tocsr()[features][:, features], own[features].astype(float), blocks, torch.from_numpy(features))  # fmt: skip


def _fires(entries: np.ndarray, block: int, blocks: int, width: int) -> Any:
    """Which features fire in which blocks, as a sparse matrix of 0 and 1."""
    from scipy.sparse import csr_matrix

    pairs = np.unique(entries // [block, 1], axis=0)
    return csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (blocks, width))


@dataclass(frozen=True)
class Affinity:
    """``sparse + left @ right.T``, symmetric and nowhere negative."""

    sparse: Any  # [n, n]
    left: Float[np.ndarray, "n rank"]
    right: Float[np.ndarray, "n rank"]

    def __matmul__(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The product with a vector."""
        return self.sparse @ x + self.left @ (self.right.T @ x)

    @property
    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Affinities of features with themselves."""
        return self.sparse.diagonal() + (self.left * self.right).sum(1)

    def to_dense(self) -> Float[np.ndarray, "n n"]:
        """All pairs; for tests and few features only."""
        return self.sparse.toarray() + self.left @ self.right.T


def simple_matching(counts: Cooccurrence) -> Affinity:
    """(n11 + n00) / n: the share of blocks in which both fire or neither."""
    share, one = counts.own / counts.blocks, np.ones(len(counts.own))
    return Affinity(2 * counts.together / counts.blocks, np.stack([one, -share, -one], 1), np.stack([one, one, share], 1))  # fmt: skip


def jaccard(counts: Cooccurrence) -> Affinity:
    """n11 / (n11 + n10 + n01)."""
    return _sparse(counts, lambda both, a, b: both / (a + b - both))


def dice(counts: Cooccurrence) -> Affinity:
    """2 n11 / (2 n11 + n10 + n01)."""
    return _sparse(counts, lambda both, a, b: 2 * both / (a + b))


def overlap(counts: Cooccurrence) -> Affinity:
    """n11 / min(n1., n.1)."""
    return _sparse(counts, lambda both, a, b: both / np.minimum(a, b))


def phi(counts: Cooccurrence) -> Affinity:
    """1 + (n11 n00 - n10 n01) / sqrt(n1. n0. n.1 n.0), the correlation of firing; 1 with what fires in all blocks."""
    # n11 n00 - n10 n01 = n n11 - n1. n.1, so that all but the pairs that fire together is a product
    root = np.sqrt(counts.own * (counts.blocks - counts.own))
    scale = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    entries = counts.together.tocoo()
    values = counts.blocks * entries.data * scale[entries.row] * scale[entries.col]
    one, mean = np.ones(len(root)), counts.own * scale
    return Affinity(_like(entries, values), np.stack([one, -mean], 1), np.stack([one, mean], 1))


def pointing(atoms: Float[Tensor, "features d"]) -> Affinity:
    """1 + cosine of atoms."""
    unit = torch.nn.functional.normalize(atoms.detach().cpu().double(), dim=1, eps=1e-300)
    if not bool(atoms.isfinite().all()) or not bool(unit.any(1).all()):
        raise SaekitError("atoms holds NaN, inf or rows of zeros, which point nowhere; leave them out")
    from scipy.sparse import csr_matrix

    thin = np.concatenate([np.ones((len(unit), 1)), unit.numpy()], 1)
    return Affinity(csr_matrix((len(unit), len(unit))), thin, thin)


def lobes(affinity: Affinity, clusters: int, seed: int = 0) -> Int[Tensor, " n"]:
    """Spectral clusters (Shi and Malik 2000): k-means of the leading eigenvectors of D^-1/2 A D^-1/2, over D^1/2.

    A is the affinity without its diagonal, D its row sums; as scikit-learn's, which needs A as a matrix.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh
    from sklearn.cluster import KMeans

    diagonal = affinity.diagonal
    n = len(diagonal)
    if not 2 <= clusters < n:
        raise SaekitError(f"clusters = {clusters} must lie in 2..{n - 1}, below the number of features that fire; choose others")  # fmt: skip
    degree = affinity @ np.ones(n) - diagonal
    # a feature without company belongs nowhere, and the row of one must not be divided by 0
    root = np.sqrt(np.maximum(degree, 1e-12 * max(1.0, degree.max())))

    def times(x: np.ndarray) -> np.ndarray:
        y = x.reshape(-1) / root
        return (affinity @ y - diagonal * y) / root

    start = np.random.default_rng(seed).standard_normal(n)
    _, vectors = eigsh(LinearOperator((n, n), times, dtype=float), k=clusters, which="LA", v0=start)
    means = KMeans(clusters, n_init=10, random_state=seed).fit(vectors / root[:, None])
    return torch.from_numpy(means.labels_).long()


def _sparse(counts: Cooccurrence, of: Callable[[Any, Any, Any], Any]) -> Affinity:
    """An affinity that is 0 for features that never fire together."""
    entries = counts.together.tocoo()
    none = np.zeros((len(counts.own), 0))
    return Affinity(_like(entries, of(entries.data, counts.own[entries.row], counts.own[entries.col])), none, none)  # fmt: skip


def _like(entries: Any, values: np.ndarray) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((values, (entries.row, entries.col)), entries.shape)
