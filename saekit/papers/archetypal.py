"""Archetypal dictionaries: atoms near the data's hull make trainings agree (2502.12892)."""

import itertools
from collections.abc import Sequence

import torch

from saekit import metrics
from saekit.dictionaries import Dictionary, create
from saekit.evaluate.stability import stability
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.training import fit_all
from saekit.testbed.digits import digits
from saekit.types import SaekitError

WIDTH, K, STEPS, BATCH, LR = 100, 5, 1500, 128, 3e-3
MIXTURE_LR = 7e-4  # of archetypal ones: faster mixtures explain more and agree less
DELTA = 0.01
MINE, THEIRS = "archetypal from the candidates", "TopK from the candidates"


def _candidates(rows: torch.Tensor, seed: int) -> torch.Tensor:
    from sklearn.cluster import KMeans

    return torch.from_numpy(
        KMeans(WIDTH, random_state=seed, n_init=1).fit(rows.numpy()).cluster_centers_
    ).float()


@torch.no_grad()
def _dictionaries(x: torch.Tensor, points: torch.Tensor, seed: int) -> dict[str, Dictionary]:
    """Fresh dictionaries of a seed; ``points`` are candidates in the units of the data."""
    made = {}
    for name, preset, options in (
        (MINE, "archetypal", {"delta": DELTA, "start": "identity"}),
        ("archetypal from random mixtures", "archetypal", {"delta": DELTA, "start": "random"}),
        (THEIRS, "topk", {}),
        ("TopK from random directions", "topk", {}),
        (FROZEN, "frozen", {}),
    ):
        d = create(preset, d_in=x.shape[1], n_features=WIDTH, k=K, seed=seed, **options)
        d.set_normalisation(x)
        if preset == "archetypal":
            d.atoms.set_points(d.norm_out(points))
        elif "candidates" in name:
            d.atoms.weight.copy_(torch.nn.functional.normalize(d.norm_out(points), dim=1))
            assert d.encoder is not None  # of its own
            d.encoder.copy_(d.atoms.weight)
        made[name] = d
    return made


def reproduce(seeds: Sequence[int], tell: Tell) -> Reproduction:
    """Agreement of seeds, and reconstruction, of archetypal and TopK dictionaries of digits."""
    if len(seeds) < 2:
        raise SaekitError(
            f"seeds = {len(seeds)}: this paper is about their agreement; give --seeds 2 or more"
        )
    data = digits(0)
    x = torch.cat([data.train, data.test])
    common = _candidates(x, 0)
    own: dict[str, list[Dictionary]] = {}
    shared: dict[str, list[Dictionary]] = {}
    for i, seed in enumerate(seeds):
        for table, points in ((own, _candidates(x, 100 + seed)), (shared, common)):
            ds = _dictionaries(x, points, seed)
            if table is shared:
                ds = {name: ds[name] for name in (MINE, THEIRS)}
            slow = {name: {"lr": MIXTURE_LR} for name in ds if name.startswith("archetypal")}
            fit_all(ds, x, STEPS, BATCH, seed=seed, lr=LR, each=slow)
            for name, d in ds.items():
                table.setdefault(name, []).append(d)
        tell(i + 1, len(seeds), "seeds")
    own[RANDOM] = [untrained(d) for d in own[FROZEN]]

    def agree(ds: list[Dictionary]) -> list[float]:
        return [stability(a.W_dec.detach(), b.W_dec.detach()) for a, b in itertools.combinations(ds, 2)]

    stable = {name: agree(ds) for name, ds in own.items()}
    confounded = {name: agree(ds) for name, ds in shared.items()}
    r2 = {name: [metrics.explained_variance(x, d(x).detach()) for d in ds] for name, ds in own.items()}

    def gain(table: dict[str, list[float]], a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(table[a], table[b], strict=True)]

    free, plain = "archetypal from random mixtures", "TopK from random directions"
    return Reproduction(
        title="Archetypal dictionaries agree between trainings",
        source="Fel et al. 2025, arXiv 2502.12892",
        setting=f"scikit-learn's digits, {WIDTH} features, k = {K}, {WIDTH} k-means candidates, anew for each seed, delta {DELTA}, {STEPS} steps of {BATCH}; agreement of each pair of seeds (Hungarian cosine)",
        claims=[
            Claim("agreement of seeds above that of TopK from the same candidates", "DINOv2: far above TopK (figure)", gain(stable, MINE, THEIRS), ">=", 0.07, gain(confounded, MINE, THEIRS), "where all seeds begin at one set of candidates"),
            Claim("explained variance lost against TopK from the same candidates", "small (table)", gain(r2, THEIRS, MINE), "<=", 0.05, r2[THEIRS], "TopK's explained variance"),
            Claim("agreement without candidates as a start: random mixtures above random directions", "not separated in the paper", gain(stable, free, plain), ">=", 0.07, stable[plain], "TopK from random directions"),
        ],
        figure=bars("Agreement of seeds and explained variance", "cosine, or share", {"agreement": stable, "agreement, one start for all seeds": confounded, "explained variance": r2}),
        notes=[
            "Where all seeds begin at one set of candidates they agree before any training: archetypal "
            f"{sum(confounded[MINE]) / len(confounded[MINE]):.3f}, TopK {sum(confounded[THEIRS]) / len(confounded[THEIRS]):.3f}. So candidates are drawn anew for each seed here."
        ],
        controls={"agreement": stable, "explained variance": r2},
    )  # fmt: skip
