"""Archetypal dictionaries: atoms near the data's hull make trainings agree (2502.12892)."""

import itertools
from collections.abc import Sequence

import torch

from saekit import metrics
from saekit.dictionaries import Dictionary, create
from saekit.evaluate.stability import stability
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.testbed.digits import digits
from saekit.trainers import train_many

WIDTH, K, STEPS, BATCH, LR = 100, 5, 1500, 128, 1e-3
DELTA = 0.01


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
        ("archetypal from the candidates", "archetypal", {"delta": DELTA, "start": "identity"}),
        ("archetypal from random mixtures", "archetypal", {"delta": DELTA, "start": "random"}),
        ("TopK from the candidates", "topk", {}),
        ("TopK from random directions", "topk", {}),
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
    data = digits(0)
    x = torch.cat([data.train, data.test])
    shared = _candidates(x, 0)
    trained: dict[str, list[Dictionary]] = {}
    again: dict[str, list[Dictionary]] = {}
    for i, seed in enumerate(seeds):
        for table, points in ((trained, shared), (again, _candidates(x, 100 + seed))):
            ds = _dictionaries(x, points, seed)
            train_many(ds, x, STEPS, BATCH, seed=seed, lr=LR)
            for name, d in ds.items():
                table.setdefault(name, []).append(d)
        tell(i + 1, len(seeds), "seeds")

    def agree(ds: list[Dictionary]) -> list[float]:
        return [stability(a.W_dec.detach(), b.W_dec.detach()) for a, b in itertools.combinations(ds, 2)]

    stable = {name: agree(ds) for name, ds in trained.items()}
    apart = {name: agree(ds) for name, ds in again.items()}
    r2 = {name: [metrics.explained_variance(x, d(x).detach()) for d in ds] for name, ds in trained.items()}
    mine, theirs = "archetypal from the candidates", "TopK from the candidates"
    free, plain = "archetypal from random mixtures", "TopK from random directions"
    gain = [a - b for a, b in zip(stable[mine], stable[theirs], strict=True)]
    loss = [b - a for a, b in zip(r2[mine], r2[theirs], strict=True)]
    unconfounded = [a - b for a, b in zip(stable[free], stable[plain], strict=True)]
    return Reproduction(
        title="Archetypal dictionaries agree between trainings",
        source="Fel et al. 2025, arXiv 2502.12892",
        setting=f"scikit-learn's digits, {WIDTH} features, k = {K}, {WIDTH} k-means candidates, delta {DELTA}, {STEPS} steps of {BATCH}; agreement of each pair of seeds (Hungarian cosine)",
        claims=[
            Claim("agreement of seeds above that of TopK from the same candidates", "DINOv2: far above TopK (figure)", gain, ">=", 0.07, stable[theirs], "TopK from the same candidates"),
            Claim("explained variance lost against TopK from the same candidates", "small (table)", loss, "<=", 0.05, r2[theirs], "its explained variance"),
            Claim("the same without a common start: random mixtures against random directions", "not separated in the paper", unconfounded, ">", 0.0, stable[plain], "TopK from random directions"),
        ],
        figure=bars("Agreement of seeds and explained variance", "cosine, or share", {"agreement, same candidates": stable, "agreement, candidates of each seed's own": apart, "explained variance": r2}),
        notes=[
            "A start at shared candidates makes seeds agree before any training, so both sides begin there, and a pair without a common start is shown. "
            + "; ".join(f"{name}: agreement {sum(stable[name]) / len(stable[name]):.3f}, with candidates of each seed's own {sum(apart[name]) / len(apart[name]):.3f}, explained variance {sum(r2[name]) / len(r2[name]):.3f}" for name in stable) + "."
        ],
    )  # fmt: skip
