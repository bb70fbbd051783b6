"""Archetypal dictionaries: atoms near the data's hull make trainings agree (2502.12892)."""

import itertools

import torch

from saekit import metrics
from saekit.dictionaries import Dictionary, create
from saekit.evaluate.stability import stability
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.digits import digits

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


def measure(seed: int, tell: Tell) -> Found:
    """Atoms of archetypal and TopK dictionaries of digits, from candidates of this seed and from common ones."""
    data = digits(0)
    x = torch.cat([data.train, data.test])
    found: Found = {}
    for j, (name, chosen) in enumerate((("own", 100 + seed), ("shared", 0))):
        ds = _dictionaries(x, _candidates(x, chosen), seed)
        if name == "shared":
            ds = {kind: ds[kind] for kind in (MINE, THEIRS)}
        slow = {kind: {"lr": MIXTURE_LR} for kind in ds if kind.startswith("archetypal")}
        fit_all(ds, x, STEPS, BATCH, seed=seed, lr=LR, each=slow)
        if name == "own":
            ds[RANDOM] = untrained(ds[FROZEN])
            found["r2"] = {kind: metrics.explained_variance(x, d(x).detach()) for kind, d in ds.items()}
        found[name] = {kind: d.W_dec.detach().tolist() for kind, d in ds.items()}
        tell(j + 1, 2, f"{name} candidates")
    return found


def judge(found: Found) -> Reproduction:
    """Agreement of each pair of seeds."""

    def agree(decoders: list[list[list[float]]]) -> list[float]:
        atoms = map(torch.tensor, decoders)
        return [stability(a, b) for a, b in itertools.combinations(atoms, 2)]

    stable = {name: agree(decoders) for name, decoders in found["own"].items()}
    confounded = {name: agree(decoders) for name, decoders in found["shared"].items()}
    r2 = found["r2"]

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


ROW = Row(measure, judge, least=2)  # the paper is about their agreement
