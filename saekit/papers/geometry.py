"""Concepts have a geometry at three scales: crystals, lobes and galaxies (2410.19750)."""

from statistics import fmean

import torch

from saekit.analyses.concept_geometry import agreement, clustering_entropy, crystals, power_law
from saekit.analyses.lobes import AFFINITIES, cooccurrence, lobes, pointing
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.row import Found, Row
from saekit.testbed.concept_world import firing, lobed, power, related

NAMES = list(AFFINITIES)
PAIRS, RELATIONS, D = 400, 6, 64
FEATURES, LOBES, BLOCK, TEXTS, PER_TOKEN = 600, 6, 128, 500, 3
ATOMS, WIDTH = 4000, 200  # of the galaxies
EXPONENTS = (0.0, 0.25, 0.5, 1.0)
CLUSTERS, COMPONENTS = 20, 30
ISOTROPIC, SHUFFLED, RAW = "isotropic atoms", "relations shuffled", "without correction"


def _crystals(g: torch.Generator, seed: int) -> Found:
    x, own = related(PAIRS, RELATIONS, D, g)
    shuffled = own[torch.randperm(PAIRS, generator=g)]
    found = {"own": crystals(x, own, seed), SHUFFLED: crystals(x, shuffled, seed)}
    return {name: {"before": one.before, "after": one.after} for name, one in found.items()}


def _lobes(g: torch.Generator, seed: int, tell: Tell) -> Found:
    atoms, own = lobed(FEATURES, LOBES, D, g)
    batches = (firing(own, TEXTS // 10, BLOCK, PER_TOKEN, g) for _ in range(10))
    counts = cooccurrence(batches, BLOCK)
    kept = counts.features
    # the dictionary's names say nothing: another cloud of the same shape is what any would give
    isotropic = torch.randn(atoms.shape, generator=g)
    placed = {"atoms": lobes(pointing(atoms[kept]), LOBES, seed), ISOTROPIC: lobes(pointing(isotropic[kept]), LOBES, seed)}  # fmt: skip
    out: Found = {}
    for i, name in enumerate(NAMES):
        tell(1 + i, 1 + len(NAMES) + len(EXPONENTS), f"lobes, {name}")
        found = lobes(AFFINITIES[name](counts), LOBES, seed)
        both = agreement(found, placed["atoms"], seed=seed)
        out[name] = {
            "AMI": both.ami, "permuted": both.permuted, "deviations": both.deviations,
            "truth": agreement(found, own[kept], seed=seed).ami, ISOTROPIC: agreement(found, placed[ISOTROPIC], seed=seed).ami,
        }  # fmt: skip
    return out


def _galaxy(g: torch.Generator, seed: int, tell: Tell) -> Found:
    out: Found = {}
    for i, exponent in enumerate(EXPONENTS):
        tell(1 + len(NAMES) + i, 1 + len(NAMES) + len(EXPONENTS), f"an exponent of {exponent:g}")
        found = power_law(power(ATOMS, WIDTH, exponent, g), seed=seed)
        out[f"{exponent:g}"] = {"exponent": found.exponent, "fitted": found.fitted}
    clustered = lobed(ATOMS, CLUSTERS, COMPONENTS, g)[0]
    for name, atoms in (("clusters", clustered), (ISOTROPIC, torch.randn(ATOMS, COMPONENTS, generator=g))):
        out[name] = clustering_entropy(atoms, COMPONENTS, seed=seed).value
    return out


def measure(seed: int, tell: Tell) -> Found:
    """Each scale in a world whose geometry is known."""
    g = torch.Generator().manual_seed(seed)
    tell(0, 1 + len(NAMES) + len(EXPONENTS), "crystals")
    return {"crystals": _crystals(g, seed), "lobes": _lobes(g, seed, tell), "galaxy": _galaxy(g, seed, tell)}


def judge(found: Found) -> Reproduction:
    """What was planted against what is found, and each beside what chance gives."""
    rows, galaxy = found["lobes"], found["galaxy"]
    phi = rows["phi"]

    def raised(name: str) -> list[float]:
        one = found["crystals"][name]
        return [a - b for a, b in zip(one["after"], one["before"], strict=True)]

    def away(key: str) -> list[float]:
        """The largest error of the exponents above 0, of each seed."""
        errors = [[abs(v - exponent) for v in galaxy[f"{exponent:g}"][key]] for exponent in EXPONENTS[1:]]
        return [max(one) for one in zip(*errors, strict=True)]

    isotropic = [[abs(v) for v in galaxy["0"][key]] for key in ("exponent", "fitted")]
    return Reproduction(
        title="Concepts have a geometry at three scales: relations as parallelograms, lobes of features that fire together, and a spectrum that is a power law",
        source="Li, Michaud, Baek, Engels, Sun and Tegmark 2024 (2410.19750)",
        setting=f"{PAIRS} pairs of {RELATIONS} relations in {D} dimensions, beside 2 distractor directions of 4 times a relation's length; {FEATURES} features in {LOBES} lobes, whose codes are counted in {TEXTS} blocks of {BLOCK} tokens; {ATOMS} atoms in {WIDTH} dimensions of eigenvalues rank^-a",
        claims=[
            Claim("silhouette of held-out differences after LDA, less before", "about -.08 before (figure)", raised("own"), ">=", 0.4, raised(SHUFFLED), SHUFFLED),
            Claim("AMI of phi's lobes and the atoms' clusters", "954 and 74 standard deviations above chance", phi["AMI"], ">=", 0.8, phi[ISOTROPIC], ISOTROPIC),
            Claim("the same where clusters are permuted", "about 0", phi["permuted"], "<=", 0.05, phi["AMI"], "not permuted"),
            Claim(f"error of the exponent, the largest of {', '.join(f'{e:g}' for e in EXPONENTS[1:])}", "exponents of .25 to .47 in Gemma-2-2b (figure)", away("exponent"), "<=", 0.05, away("fitted"), RAW),
            Claim("exponent of isotropic atoms, without its sign", "about 0", isotropic[0], "<=", 0.05, isotropic[1], RAW),
        ],
        figure=figure("Eigenvalues of atoms between ranks 10 and 150", "planted exponent", "found", {name: (EXPONENTS, [fmean(galaxy[f"{e:g}"][key]) for e in EXPONENTS]) for name, key in (("exponent", "exponent"), (RAW, "fitted"))} | {"planted": (EXPONENTS, EXPONENTS)}),
        notes=[
            "Half of each relation's pairs are judged in the space that the other half gives, and the other way round; the paper judges the pairs it fits.",
            f"Clustering entropy in {COMPONENTS} dimensions: {fmean(galaxy['clusters']):.2f} nats of {CLUSTERS} clusters, {fmean(galaxy[ISOTROPIC]):.2f} of isotropic atoms. Both entropies are estimated from as many points; a Gaussian's true one, with which the paper compares, lies apart from any estimate in many dimensions.",
            "A sample spreads eigenvalues, so that the exponent is the one whose samples look like these.",
        ],
        controls={
            "silhouette before": {"own": found["crystals"]["own"]["before"], SHUFFLED: found["crystals"][SHUFFLED]["before"]},
            "silhouette after": {"own": found["crystals"]["own"]["after"], SHUFFLED: found["crystals"][SHUFFLED]["after"]},
            **{f"AMI: {key}": {name: rows[name][of] for name in rows} for key, of in (("with the atoms", "AMI"), ("with planted lobes", "truth"), (f"with {ISOTROPIC}", ISOTROPIC), ("permuted", "permuted"))},
            "standard deviations above chance": {name: rows[name]["deviations"] for name in rows},
            "clustering entropy": {name: galaxy[name] for name in ("clusters", ISOTROPIC)},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
