"""The geometry of concepts at three scales (Li et al. 2024, 2410.19750): crystals, lobes and galaxies.

*Crystals* (§3): differences of pairs of one relation are alike once directions that differ for other reasons are projected
out. *Lobes* (§4): features that fire in the same pieces of text lie together in space. *Galaxy* (§5): the point cloud of a
dictionary's atoms is neither isotropic nor Gaussian.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.types import SaekitError

LEAST = 4  # pairs of a relation, so that both halves have two
RANKS = (10, 150)  # between which the paper fits eigenvalues
EXACT = 1e-9  # of the differences' spread: what pairs of a relation differ by less is rounding
STEPS = 10  # to the exponent whose draws fit


@dataclass(frozen=True)
class Crystals:
    """Mean silhouettes of held-out differences, in [-1, 1]: as they are, and in the space that tells relations apart."""

    before: float
    after: float


def crystals(
    differences: Float[Tensor, "pairs d"], relations: Int[Tensor, " pairs"], seed: int = 0, components: int | None = None
) -> Crystals:  # fmt: skip
    """Whether differences of pairs (b - a) cluster by relation, before and after linear discriminant analysis.

    Each half of every relation's pairs is projected by the analysis of the other half (with the shrinkage of Ledoit and
    Wolf), to ``components`` dimensions, by default one fewer than relations; silhouettes are means over both halves. The
    paper judges the pairs that it fits, which gives high silhouettes to any labels.
    """
    from sklearn.metrics import silhouette_score

    check_axes("differences", differences, "pairs", "d")
    x, own = differences.detach().cpu().double().numpy(), relations.cpu().numpy()
    _, counts = np.unique(own, return_counts=True)
    _check_finite("differences", differences)
    if len(own) != len(x) or len(counts) < 2 or counts.min() < LEAST:
        raise SaekitError(f"relations name {dict(enumerate(counts.tolist()))} of {len(x)} pairs; give one each, 2 relations or more, and {LEAST} pairs or more of each")  # fmt: skip
    most = min(len(counts) - 1, x.shape[1])
    if components is not None and not 1 <= components <= most:
        raise SaekitError(f"components = {components} must lie in 1..{most}, one fewer than relations; choose fewer")  # fmt: skip
    if not x.std(0).any():
        raise SaekitError("differences are the same for all pairs; give pairs that differ")
    half, random = np.zeros(len(x), dtype=bool), np.random.default_rng(seed)
    for relation in np.unique(own):
        pairs = random.permutation(np.flatnonzero(own == relation))
        half[pairs[::2]] = True
    found = []
    for fitted in (half, ~half):
        projected = x[~fitted] @ _discriminants(x[fitted], own[fitted], components or most)
        found.append([silhouette_score(some, own[~fitted]) for some in (x[~fitted], projected)])
    before, after = np.mean(found, 0).tolist()
    return Crystals(before, after)


def _discriminants(x: np.ndarray, own: np.ndarray, components: int) -> np.ndarray:
    """Directions [d, components] that tell relations apart; of exact ones, which have no spread within, those of their means."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    names, which = np.unique(own, return_inverse=True)
    means = np.stack([x[own == one].mean(0) for one in names])
    if (x - means[which]).std() <= EXACT * (x - x.mean(0)).std():
        return np.linalg.svd(means - means.mean(0), full_matrices=False)[2][:components].T
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(x, own)
    return lda.scalings_[:, :components]


@dataclass(frozen=True)
class Agreement:
    """Adjusted mutual information of two clusterings, at most 1; and the mean and standard deviation of permuted ones."""

    ami: float
    permuted: float
    spread: float

    @property
    def deviations(self) -> float:
        """How many standard deviations it lies above what permuted clusters give."""
        return (self.ami - self.permuted) / max(self.spread, 1e-12)


def agreement(
    a: Int[Tensor, " features"], b: Int[Tensor, " others"], permutations: int = 100, seed: int = 0
) -> Agreement:
    """How alike two clusterings of the same features are, beside ``permutations`` in which the second is shuffled."""
    from sklearn.metrics import adjusted_mutual_info_score

    if len(a) != len(b) or len(a) < 2:
        raise SaekitError(f"a and b cluster {len(a)} and {len(b)} features; give as many, and 2 or more")
    if permutations < 2:
        raise SaekitError(f"permutations = {permutations}: their spread needs 2 or more")
    one, other = a.cpu().numpy(), b.cpu().numpy()
    random = np.random.default_rng(seed)
    null = [adjusted_mutual_info_score(one, random.permutation(other)) for _ in range(permutations)]
    return Agreement(float(adjusted_mutual_info_score(one, other)), float(np.mean(null)), float(np.std(null)))


def spectrum(atoms: Float[Tensor, "features d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of the atoms' covariance, falling; those that rounding makes negative are 0."""
    check_axes("atoms", atoms, "features", "d")
    _check_finite("atoms", atoms)
    if len(atoms) < 2:
        raise SaekitError(f"atoms has {len(atoms)} row(s): a covariance needs 2 or more")
    return torch.linalg.eigvalsh(atoms.detach().cpu().double().T.cov()).flip(0).clamp_min(0).float()


@dataclass(frozen=True)
class PowerLaw:
    """``fitted``: the exponent of the atoms' own eigenvalues; ``exponent``: that of a cloud of which atoms like these are drawn."""

    exponent: float
    fitted: float


def power_law(
    atoms: Float[Tensor, "features d"], ranks: tuple[int, int] = RANKS, draws: int = 4, seed: int = 0
) -> PowerLaw:
    """The exponent a of eigenvalues that fall as rank^-a, by least squares of log on log over ``ranks``, ends included.

    As few rows spread the eigenvalues even of an isotropic cloud (Marchenko and Pastur 1967), what is fitted lies above the
    cloud's own: ``exponent`` is the a for which as many Gaussian rows of eigenvalues rank^-a are fitted to what these are, on
    the mean of ``draws``, and at least 0. It is told least well near 0, where such fits are lowest and change least.
    """
    first, last = ranks
    _check_draws(draws)
    values = spectrum(atoms).double()
    size = int((values > 1e-9 * values[0]).sum())
    if not 1 <= first < last <= size:
        raise SaekitError(f"ranks = {ranks} must rise within 1..{size}, the rank of the atoms' covariance; give others")  # fmt: skip
    fitted = exponent = _slope(values, first, last)
    g = torch.Generator().manual_seed(seed)
    shapes = [_wishart_root(len(atoms) - 1, len(values), g) for _ in range(draws)]
    for _ in range(STEPS):
        scale = torch.arange(1, len(values) + 1, dtype=torch.float64).pow(-exponent / 2)[:, None]
        drawn = [torch.linalg.svdvals(scale * root).square() for root in shapes]
        exponent = max(0.0, exponent + fitted - sum(_slope(one, first, last) for one in drawn) / draws)
    return PowerLaw(exponent, fitted)


def _slope(values: Tensor, first: int, last: int) -> float:
    x, y = torch.arange(first, last + 1).double().log(), values[first - 1 : last].log()
    return -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def _wishart_root(rows: int, d: int, g: torch.Generator) -> Tensor:
    """R of which R R^T is distributed as the second moments of so many isotropic rows, of the size of d alone (Bartlett 1933)."""
    if rows < d:
        return torch.randn(d, rows, generator=g, dtype=torch.float64)
    chi = torch.distributions.Chi2(rows - torch.arange(d, dtype=torch.float64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))
        diagonal = chi.sample().sqrt()
    return torch.randn(d, d, generator=g, dtype=torch.float64).tril(-1) + diagonal.diag()


@dataclass(frozen=True)
class Deficit:
    """Nats of entropy by which atoms fall short of a Gaussian cloud of their covariance, and its spread over halves."""

    value: float
    spread: float


def clustering_entropy(
    atoms: Float[Tensor, "features d"], components: int = 100, draws: int = 10, seed: int = 0
) -> Deficit:
    """How clustered atoms are: the entropy of a Gaussian of their covariance less their own, in nats; about 0 if Gaussian.

    Entropies are of Kozachenko and Leonenko (1987), H = psi(n) - psi(1) + log V_D + D / n sum_i log r_i with r_i the
    distance of the nearest other atom, in ``components`` principal components at variance 1. Both sides are estimated from
    as many points, since in many dimensions this lies far off for any cloud: for a Gaussian too, whose true entropy the paper
    compares with. Each of ``draws`` is of half of the atoms, without replacement: a bootstrap has copies, at distance 0.
    """
    check_axes("atoms", atoms, "features", "d")
    _check_finite("atoms", atoms)
    _check_draws(draws)
    if len(atoms) < 4:
        raise SaekitError(f"atoms has {len(atoms)} row(s), and halves need 2 or more; give at least 4")
    x = atoms.detach().cpu().double()
    x = x - x.mean(0)
    basis, values = _principal(x, components)
    x, g = x @ basis / values.sqrt(), torch.Generator().manual_seed(seed)
    n, found = len(x) // 2, []
    for _ in range(draws):
        half = x[torch.randperm(len(x), generator=g)[:n]]
        normal = torch.randn(n, components, generator=g, dtype=torch.float64)
        found.append(components * (_log_distance(normal) - _log_distance(half)))
    return Deficit(float(np.mean(found)), float(np.std(found)))


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise SaekitError(f"draws = {draws} must be at least 1; choose more")


def _principal(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(x.T.cov())
    size = int((values > 1e-9 * values[-1]).sum())
    if not 1 <= components <= size:
        raise SaekitError(f"components = {components} must lie in 1..{size}, the rank of the atoms' covariance; choose fewer")  # fmt: skip
    return vectors[:, -components:], values[-components:]


def _log_distance(x: Float[Tensor, "rows d"]) -> float:
    """Mean log distance of the nearest other row; twins are refused."""
    total, norms = 0.0, x.square().sum(1)
    for start in range(0, len(x), 1024):
        block = x[start : start + 1024]
        near = norms - 2 * block @ x.T
        near[torch.arange(len(block)), start + torch.arange(len(block))] = float("inf")
        # from the coordinates, where little is left of a difference of squares
        distance = (block - x[near.argmin(1)]).norm(dim=1)
        if not distance.min() > 0:
            raise SaekitError("atoms has rows that are equal, whose entropy has no bound; remove copies")
        total += distance.log().sum().item()
    return total / len(x)


def _check_finite(name: str, x: Any) -> None:
    if not bool(x.isfinite().all()):
        raise SaekitError(f"{name} holds NaN or inf; give finite rows")
