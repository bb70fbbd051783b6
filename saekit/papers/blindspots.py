"""Concepts that a generator lacks are those whose energy it does not have (conceptual blindspots, 2506.19708)."""

from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit import metrics
from saekit.analyses.blindspots import EXAGGERATED, SUPPRESSED, Differences, Energies, differences, energies
from saekit.dictionaries import Dictionary, create
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.digits import digits

CLASSES, COPIES = 10, 5
WIDTH, K, STEPS, BATCH, LR, MIXTURE_LR, DELTA = 100, 5, 1500, 128, 3e-3, 7e-4, 0.01  # those of `archetypal`
MINE, THEIRS = "archetypal", "TopK"
TOP = 10  # images by which a concept's class is judged
CHUNK = 64  # images encoded at once
MOST = 0.7  # a difference above it: more than half of the energy is of the class that comes COPIES times
HALVES = "two halves of real images"


class Images(NamedTuple):
    """Real images in parts that share none: to learn from, two to compare, and one to judge concepts by."""

    fit: Tensor
    real: Tensor
    pool: Tensor
    pool_labels: Tensor
    judged: Tensor
    judged_labels: Tensor


def _images(seed: int) -> Images:
    from sklearn.model_selection import StratifiedKFold

    data = digits(0)
    x, labels = torch.cat([data.train, data.test]), torch.cat([data.train_labels, data.test_labels])
    folds = [torch.from_numpy(rest) for _, rest in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, labels)]  # fmt: skip
    real, pool, judged = folds[:3]
    return Images(x[torch.cat(folds[3:])], x[real], x[pool], labels[pool], x[judged], labels[judged])


def _dictionaries(x: Tensor, seed: int) -> dict[str, Dictionary]:
    from sklearn.cluster import KMeans

    points = KMeans(WIDTH, random_state=seed, n_init=1).fit(x.numpy()).cluster_centers_
    shape: dict[str, Any] = {"d_in": x.shape[1], "n_features": WIDTH, "k": K, "seed": seed}
    ds = {
        MINE: create("archetypal", delta=DELTA, start="identity", **shape),
        THEIRS: create("topk", **shape),
        FROZEN: create("frozen", **shape),
    }
    for d in ds.values():
        d.set_normalisation(x)
    ds[MINE].atoms.set_points(ds[MINE].norm_out(torch.from_numpy(points).float()))
    fit_all(ds, x, STEPS, BATCH, lr=LR, seed=seed, each={MINE: {"lr": MIXTURE_LR}})
    return ds | {RANDOM: untrained(ds[FROZEN])}


def _generated(images: Images, removed: int, repeated: int) -> Tensor:
    """What a generator makes that has all classes but one, and one ``COPIES`` times as often."""
    times = torch.where(images.pool_labels == repeated, COPIES, 1) * (images.pool_labels != removed)
    return images.pool.repeat_interleave(times, 0)


def _energies(d: Dictionary, x: Tensor, seed: int) -> Energies:
    return energies((d.encode(part[:, None]) for part in x.split(CHUNK)), seed)


def _classes(d: Dictionary, images: Images) -> Tensor:
    """The commonest class of the ``TOP`` images that fire each concept most; -1 where none fires it."""
    top = d.encode(images.judged).to_dense().detach().topk(TOP, 0)
    votes = torch.nn.functional.one_hot(images.judged_labels[top.indices], CLASSES) * (top.values > 0)[..., None]  # fmt: skip
    most = votes.sum(0).max(1)
    return torch.where(most.values > 0, most.indices, -1)


def _share(of: Tensor, among: Tensor) -> float:
    """Share of concepts that are ``of`` something; NaN of none."""
    return of[among].double().mean().item()


def _judged(found: Differences, classes: Tensor, removed: int, repeated: int) -> Found:
    alive, low, most = ~found.delta.isnan(), found.suppressed(), found.delta > MOST
    return {
        "precision": _share(classes == removed, low), "base": _share(classes == removed, alive),
        "recall": _share(low, alive & (classes == removed)), "suppressed": float(low.sum()), "called": _share(low, alive),
        "surely": float(found.suppressed(surely=True).sum()),
        "exaggerated": float(found.exaggerated().sum()), "most": float(most.sum()),
        "precision, most": _share(classes == repeated, most),
    }  # fmt: skip


def _apart(found: Differences) -> Found:
    """Shares of concepts that are called suppressed or exaggerated, and whose interval holds 1/2."""
    alive = ~found.delta.isnan()
    return {
        "called": _share(found.suppressed() | found.exaggerated(), alive),
        "called, surely": _share(found.suppressed(surely=True) | found.exaggerated(surely=True), alive),
        "covered": _share((found.low <= 0.5) & (found.high >= 0.5), alive),
    }


def measure(seed: int, tell: Tell) -> Found:
    """Energy differences of a generator without each class in turn, and of images that lack nothing."""
    tell(0, 3, "dictionaries")
    images = _images(seed)
    ds = _dictionaries(images.fit, seed)
    tell(2, 3, "energies")
    own, out = (7 + 3 * seed) % CLASSES, dict[str, Found]()
    for name, d in ds.items():
        classes, real = _classes(d, images), _energies(d, images.real, 1)
        halves = differences(_energies(d, images.pool, 2), real)
        by_class: Found = {}
        for removed in range(CLASSES):
            repeated = (removed + 5) % CLASSES
            found = differences(_energies(d, _generated(images, removed, repeated), 2), real)
            by_class[str(removed)] = _judged(found, classes, removed, repeated)
            if removed == own:
                drawn = found.delta.tolist()
        out[name] = {
            "own": by_class[str(own)], "by class": by_class, "halves": _apart(halves), "delta": drawn,
            "half delta": halves.delta.tolist(), "classes": classes.tolist(),
            "R2": metrics.explained_variance(images.judged, d(images.judged).detach()),
        }  # fmt: skip
    return {"removed": own, "dictionaries": out}


def _ratio(shares: list[float], counts: list[float]) -> float:
    """Of all concepts together: a set of none has no share, and adds none."""
    hits = sum(share * count for share, count in zip(shares, counts, strict=True) if count)
    return hits / sum(counts) if any(counts) else float("nan")


def _over(d: Found, share: str, count: str) -> list[float]:
    """Of each seed: over the concepts of all ten generators."""
    by = d["by class"].values()
    return [_ratio([one[share][i] for one in by], [one[count][i] for one in by]) for i in range(len(d["R2"]))]


def _curve(d: Found, key: str, of: int | None = None) -> tuple[list[float], list[float]]:
    """The first seed's differences against their ranks, as shares; those of the concepts of one class, or all."""
    alive = sorted((v, c) for v, c in zip(d[key][0], d["classes"][0], strict=True) if v == v)
    kept = [(j / len(alive), v) for j, (v, c) in enumerate(alive, 1) if of in (None, c)]
    return [rank for rank, _ in kept], [v for _, v in kept]


def _drawn(ds: Found, removed: int) -> dict[str, Any]:
    gone = f"class {removed} removed"
    lines = {
        f"{MINE}, {gone}": _curve(ds[MINE], "delta"), "its concepts of that class": _curve(ds[MINE], "delta", removed),
        f"{MINE}, {HALVES}": _curve(ds[MINE], "half delta"), f"{RANDOM}, {gone}": _curve(ds[RANDOM], "delta"),
    }  # fmt: skip
    bounds = [{"type": "line", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"dash": "dot"}} for y in (SUPPRESSED, EXAGGERATED)]  # fmt: skip
    drawn = figure("Energy differences of concepts, rising, first seed", "share of concepts", "generated / (generated + real)", lines, shapes=bounds)  # fmt: skip
    drawn["data"][1]["mode"] = "markers"
    return drawn


def judge(found: Found) -> Reproduction:
    """Suppressed and exaggerated concepts against their classes, and against halves of real images."""
    ds, removed = found["dictionaries"], found["removed"]
    mine, halves = ds[MINE]["own"], ds[MINE]["halves"]
    low = {name: _over(d, "precision", "suppressed") for name, d in ds.items()}
    most = {name: _over(d, "precision, most", "most") for name, d in ds.items()}
    counts = ", ".join(f"{n:.0f} of class {c}" for n, c in zip(mine["suppressed"], removed, strict=True))
    none = sum(n == 0 for one in ds[MINE]["by class"].values() for n in one["suppressed"])
    limit = COPIES * CLASSES / (CLASSES - 2 + COPIES)
    return Reproduction(
        title="Concepts without energy in a generator's images are those of the class that it lacks",
        source="Bohacek, Fel, Agrawala and Lubana 2025, arXiv 2506.19708",
        setting=f"scikit-learn's digits; {WIDTH} features, k = {K}, an image a token; two fifths to learn from, and a fifth each for the real images, the generator's (without a class, {', '.join(map(str, removed))} by seed, and with another {COPIES} times), and the judging of classes, by the {TOP} images that fire a concept most",
        claims=[
            Claim(f"share of concepts with an energy difference below {SUPPRESSED} that are of the removed class, of all seeds together", "no truth is known; bird feeders, DVD discs, blank spaces (Stable Diffusion and others)", [_ratio(mine["precision"], mine["suppressed"])], ">=", 0.8, mine["base"], "among all concepts"),
            Claim("the same of each seed, over the concepts of ten generators that lack each class in turn", "as above", low[MINE], ">=", 0.8, low[RANDOM], RANDOM),
            Claim(f"share of their concepts with a difference above {MOST} that are of the class which comes {COPIES} times", "wood texture, palm trees", most[MINE], ">=", 0.8, most[RANDOM], RANDOM),
            Claim(f"share of concepts with a difference below {SUPPRESSED} or above {EXAGGERATED} between {HALVES}", "no such control", halves["called"], "<=", 0.05, mine["called"], "suppressed by the generator"),
        ],
        figure=_drawn(ds, removed[0]),
        notes=[
            f"Suppressed: {counts}. {none} of {CLASSES * len(removed)} generators have no suppressed concept, and what they lack is not found: a seed without one has no precision, so the first claim takes all seeds' concepts together. Of the removed class's concepts {fmean(mine['recall']):.0%} are suppressed; the others have energy of other classes too.",
            f"By their whole interval {fmean(mine['surely']):.1f} of {fmean(mine['suppressed']):.1f} concepts are suppressed: a fifth of the images has 36 of a class, and a concept that no generated image fires is sure where about as many real ones do.",
            f"A class that comes {COPIES} times has {limit:.2f} times its share of real images, as others make room, so no difference can be above {limit / (1 + limit):.2f} but by chance: {EXAGGERATED} is out of reach, and {fmean(mine['exaggerated']):.1f} concepts (mean over seeds) are above it. Above {MOST} more than half of a concept's energy is of that class.",
            f"What few images fire is below {SUPPRESSED} by chance. Tried on seeds 10 and 11, ten generators each: of 200 archetypal features precision is 0.72 and 0.84, of 300 it is 0.57 and 0.65; TopK's is 0.36 to 0.56. With k = 4 and these three seeds that of the first claim is the same, and class 3 has no suppressed concept either; with k = 3 (seeds 10 to 13, ten generators each) it is 0.77 to 0.94.",
            "Copies count as samples, though they show nothing new: intervals of what is exaggerated are too narrow.",
        ],
        controls={
            **{label: {name: d["own"][key] for name, d in ds.items()} for label, key in {
                "suppressed": "suppressed", "removed class's suppressed": "recall", "surely suppressed": "surely", "exaggerated": "exaggerated", f"above {MOST}": "most",
            }.items()},
            "precision, all ten": low,
            f"precision above {MOST}, all ten": most,
            **{f"{HALVES}: {label}": {name: d["halves"][key] for name, d in ds.items()} for label, key in {
                "called": "called", "surely": "called, surely", "intervals that hold 1/2": "covered",
            }.items()},
            "explained variance": {name: d["R2"] for name, d in ds.items()},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
