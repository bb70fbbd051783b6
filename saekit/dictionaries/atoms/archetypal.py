"""Archetypal atoms: every atom lies in, or near, the convex hull of points of the data.

Fel et al. 2025 (2502.12892): ``D = exp(mu) (W C + L)`` with W row-stochastic, C candidate points (k-means
centroids of the data) and ``||L_i|| <= delta``. The hull anchors the dictionary, so that two trainings
find more nearly the same one.

A confound to know of: where every seed starts at the candidates themselves (``start="identity"``),
seeds agree before any training. ``start="random"`` draws the mixture of each seed from a Dirichlet law.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.types import SaekitError

SPREAD = 0.05  # of a start at the candidates: what each mixture holds of all others together
CONCENTRATION = 0.1  # of the Dirichlet law: near a vertex of the hull, but not at it


@dataclass(frozen=True)
class ArchetypalConfig:
    """``candidates`` points (default: as many as features); atoms may lie ``delta`` off their hull.

    ``delta`` is in units of a typical row's norm; 0 keeps atoms inside.

    ``start``: "identity" begins feature i at candidate i, but for a twentieth that is spread over all, "random" at a
    random mixture.
    """

    candidates: int | None = None
    delta: float = 0.0
    start: str = "random"

    def __post_init__(self):
        if self.candidates is not None and self.candidates < 2:
            raise SaekitError(f"candidates = {self.candidates} must be at least 2; they span the hull")
        if not 0 <= self.delta < float("inf"):
            raise SaekitError(f"delta = {self.delta} must be a distance of at least 0")
        if self.start not in ("identity", "random"):
            raise SaekitError(f"start = {self.start!r} is not one of 'identity', 'random'")


class Archetypal(nn.Module):
    """Mixtures of candidate points, each with a bounded deviation of its own."""

    Config = ArchetypalConfig
    unit = False
    tied = False
    trained = True
    hull = True  # atoms are mixtures, so none can be zero where others are not
    points: Tensor
    given: Tensor

    def __init__(
        self, config: ArchetypalConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):
        super().__init__()
        self.config = config
        n, d = directions.shape
        candidates = config.candidates or n
        if config.start == "identity":
            mixture = torch.eye(n, candidates)
            mixture[candidates:, :] = 1 / candidates
            # a share of 0 lies where the ReLU has no slope, and would never learn
            mixture = (1 - SPREAD) * mixture + SPREAD / candidates
        else:
            draws = torch.rand(n, candidates, generator=generator).clamp(min=1e-12)
            mixture = draws ** (1 / CONCENTRATION)  # beta(a, 1) parts: their shares are near a Dirichlet's
            mixture = mixture / mixture.sum(1, keepdim=True)
        self.mixture = nn.Parameter(mixture)
        self.deviation = nn.Parameter(torch.zeros(n, d), requires_grad=config.delta > 0)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("points", torch.randn(candidates, d, generator=generator) / d**0.5)
        self.register_buffer("given", torch.tensor(False))

    @torch.no_grad()
    def set_points(self, points: Float[Tensor, "candidate d_out"]) -> None:
        """Take these candidates, in normalised space; they are stored in units of a typical row's norm."""
        if points.shape != self.points.shape:
            raise SaekitError(
                f"points have shape {tuple(points.shape)}; expected [candidates, d_out] = {tuple(self.points.shape)}"
            )
        self.points.copy_(points / points.shape[1] ** 0.5)
        self.given.fill_(True)

    def prepare(self, y: Float[Tensor, "rows d_out"]) -> None:
        """Find the candidates by k-means over rows of the data, unless they have been given."""
        if self.given:
            return
        candidates = len(self.points)
        if len(y) < candidates:
            raise SaekitError(
                f"candidates = {candidates} are more than the {len(y)} rows that they are chosen from; ask for fewer"
            )
        from sklearn.cluster import MiniBatchKMeans

        seed = int(torch.randint(1 << 31, ()))
        means = MiniBatchKMeans(candidates, random_state=seed, n_init=1, batch_size=4096)
        means.fit(y.cpu().numpy())
        self.set_points(torch.from_numpy(means.cluster_centers_).to(self.points))

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """The decoder, one row per feature; of any norm."""
        weights = self.mixture.relu()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
        rows = weights @ self.points
        if self.config.delta > 0:
            rows = rows + self.deviation
        return rows * self.log_scale.exp()

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring deviations that are too long back to delta."""
        if self.config.delta > 0:
            norm = torch.linalg.vector_norm(self.deviation, dim=-1, keepdim=True)
            self.deviation.mul_((self.config.delta / norm.clamp(min=1e-12)).clamp(max=1))
