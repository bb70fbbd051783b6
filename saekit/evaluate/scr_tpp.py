"""What ablating features does to probes: spurious correlations removed (SCR), and one concept perturbed alone (TPP).

After SHIFT (Marks et al. 2024, 2403.19647) and SAEBench (Karvonen et al. 2025, 2503.09532). Features are ablated with the
error kept, and rows are means over a text's tokens: decoding is linear, so that the mean of ablated activations is the mean
less what mean codes write. The texts that a probe is judged on are the same with and without the features.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.evaluate.core import Report
from saekit.evaluate.labelled import (
    Labelled,
    Texts,
    about,
    atoms_of,
    difference,
    gather,
    halves,
    labels_of,
    split,
)
from saekit.evaluate.measure import Measure, Resampler, by_source
from saekit.models import Model
from saekit.probes import Probe, linear
from saekit.types import Codes, SaekitError

LEAST = 1e-3  # gap of accuracies that a share can be taken of
ABLATED = (2, 5, 10, 20, 50, 100, 500)  # features at once
RANDOM, DRAWS = "random features", 10  # as many, of those that are active; the mean over draws


@torch.no_grad()
def spurious_effects(
    codes: Codes,
    labels: Bool[Tensor, " rows"],
    atoms: Float[Tensor, "feature d"],
    direction: Float[Tensor, " d"],
) -> Float[Tensor, " feature"]:
    """How much each feature parts the classes along a probe's direction: \\|(mean code of true - of false rows) w d_i\\|."""
    return (difference(codes, labels) * (atoms.double() @ direction.double())).abs().float()


@torch.no_grad()
def targeted_effects(
    codes: Codes,
    labels: Bool[Tensor, " rows"],
    atoms: Float[Tensor, "feature d"],
    direction: Float[Tensor, " d"],
) -> Float[Tensor, " feature"]:
    """The same of features that are more active in true rows, with its sign: max(0, mean of true - of false rows) w d_i."""
    return (difference(codes, labels).clamp_min(0) * (atoms.double() @ direction.double())).float()


def strongest(effect: Float[Tensor, " feature"], n: int) -> Int[Tensor, " chosen"]:
    """The ``n`` features of the largest effects, or as many as have one above 0; the first of equals.

    SAEBench fills up with features of no or of the contrary effect.
    """
    order = effect.sort(descending=True, stable=True).indices
    return order[: min(n, int((effect > 0).sum()))]


@torch.no_grad()
def ablated(
    x: Float[Tensor, "rows d"],
    codes: Codes,
    atoms: Float[Tensor, "feature d"],
    features: Int[Tensor, " chosen"],
) -> Float[Tensor, "rows d"]:
    """Rows without what some features write: x - sum_i z_i d_i."""
    return x - codes.select(features) @ atoms[features].to(x)


def removed(clean: float, biased: float, changed: float) -> float:
    """SCR: share of the accuracy that a bias costs which an ablation brings back; 0 where it costs nothing."""
    return 0.0 if clean - biased < LEAST else (changed - biased) / (clean - biased)


def targeted(lost: np.ndarray) -> np.ndarray:
    """TPP of each class, [..., i]: accuracy that its probe loses by ablations for it, less the mean loss of the others.

    ``lost[..., i, j]`` is what the probe of class j loses without the features for class i.
    """
    n = lost.shape[-1]
    if n < 2:
        raise SaekitError(f"{n} class is there; give at least 2")
    own = np.diagonal(lost, axis1=-2, axis2=-1)
    return own - (lost.sum(-1) - own) / (n - 1)


# spurious correlations


def spurious_removal(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str, spurious: str, *,
    pool: str = "mean", controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """SCR: a probe of ``attribute`` that learnt ``spurious`` with it is mended by ablating the features of ``spurious``.

    The two most frequent values of each. Both directions are measured; ``scr_N`` is the one whose biased probe is
    worse (the mean of both where they are equal). Intervals are over the documents of judged texts.
    """
    if attribute == spurious:
        raise SaekitError(
            f"spurious {spurious!r} is the attribute that is asked about; name another of {', '.join(texts.attributes)}"
        )
    sides = [texts.values(texts.only(name))[:2] for name in (attribute, spurious)]
    labels = [
        labels_of(texts, name, side[0]) for name, side in zip((attribute, spurious), sides, strict=True)
    ]
    some = [
        labels_of(texts, name, side[1]) | own
        for name, side, own in zip((attribute, spurious), sides, labels, strict=True)
    ]
    used = (some[0] & some[1]).nonzero()[:, 0]
    found = gather(dictionary, model, texts, pool, controls, seed, on_batch)
    pair = (labels[0][used], labels[1][used])
    runs = {}
    for name, one in found.items():
        runs[name] = mended(one.at(used), atoms_of(one.dictionary, "scr"), pair, seed)
    sources = texts.sources()[used][_split(pair, texts.sources()[used], seed)[1]]
    facts = {"attribute": attribute, "spurious": spurious, "values": sides, "pool": pool, "seed": seed}
    return Report(scr_measures(runs, seed, sources), about("scr", dictionary, model, texts, facts))


Ways = list[
    dict[str, Bool[Tensor, " judged"]]
]  # of both directions: hits by clean, biased and each number of features


def mended(
    one: Labelled, atoms: Float[Tensor, "feature d"], labels: tuple[Tensor, Tensor], seed: int
) -> Ways:
    """Which judged texts probes are right about: clean, biased, and biased without the other attribute's features.

    All four pairs of values are as frequent where probes are judged, and where the clean ones are fitted; the biased
    one is fitted to the two pairs in which both attributes agree.
    """
    train, test = _split(labels, one.sources, seed)
    fitted, judged = one.at(train), one.at(test)
    agree = labels[0][train] == labels[1][train]
    biased = linear(fitted.x[agree], labels[0][train][agree], seed=seed)
    probes = [linear(fitted.x, own[train], seed=seed) for own in labels]
    out: Ways = []
    for asked, other in ((0, 1), (1, 0)):
        true = labels[asked][test]
        effect = spurious_effects(fitted.codes, labels[other][train], atoms, probes[other].weight)
        hits = {"clean": (probes[asked](judged.x) > 0) == true, "biased": (biased(judged.x) > 0) == true}
        for n in ABLATED:
            x = ablated(judged.x, judged.codes, atoms, strongest(effect, n))
            hits[str(n)] = (biased(x) > 0) == true
        out.append(hits)
    return out


def _split(
    labels: tuple[Tensor, Tensor], sources: Tensor | None, seed: int
) -> tuple[Int[Tensor, " fitted"], Int[Tensor, " judged"]]:
    """Texts to fit on and to judge on, as many of each pair of values."""
    cells = labels[0].long() + 2 * labels[1].long()
    sides = halves([str(c) for c in cells.tolist()], seed, sources=sources)
    return _level(cells, sides[0], seed), _level(cells, sides[1], seed)


def _level(cells: Int[Tensor, " texts"], rows: Int[Tensor, " some"], seed: int) -> Int[Tensor, " fewer"]:
    """As many rows of each of four cells."""
    generator = torch.Generator().manual_seed(seed)
    own = [rows[cells[rows] == cell] for cell in range(4)]
    n = min(map(len, own))
    if n < 2:
        raise SaekitError(
            f"of the four pairs of values one has {n} texts to fit or judge on; give more of it"
        )
    return torch.cat([side[torch.randperm(len(side), generator=generator)[:n]] for side in own])


def scr_measures(
    runs: dict[str, Ways], seed: int, sources: Int[Tensor, " judged"] | None = None
) -> dict[str, Measure]:
    """Shares of what the bias cost, of a dictionary ("") beside others.

    ``sources``: the document of each judged text (None: each stands alone).
    """

    def share(hits: dict[str, Tensor], key: str) -> float:
        return removed(*(hits[name].double().mean().item() for name in ("clean", "biased", key)))

    def chosen(ways: Ways) -> Ways:
        accuracies = [hits["biased"].double().mean().item() for hits in ways]
        return [hits for hits, own in zip(ways, accuracies, strict=True) if own == min(accuracies)]

    def gained(clean: np.ndarray, biased: np.ndarray, changed: np.ndarray, n: np.ndarray) -> np.ndarray:
        gap = (clean - biased) / n[:, None]
        share = np.where(gap < LEAST, 0.0, (changed - biased) / n[:, None] / np.where(gap < LEAST, 1.0, gap))
        return share.mean(-1)  # over directions that tie

    out, tests = {}, len(runs[""][0]["clean"])
    if any(share(hits, "clean") == 0 for hits in chosen(runs[""])):
        warnings.warn(
            f"on {tests} texts the biased probe is as accurate as the clean one: there is nothing to remove, and SCR is 0 "
            f"whatever the dictionary; give more texts, or a stronger spurious attribute",
            stacklevel=3,
        )  # fmt: skip
    of = np.arange(tests) if sources is None else sources.numpy()
    resampler = Resampler(len(np.unique(of)), seed)
    for key in map(str, ABLATED):
        values = {
            name: float(np.mean([share(hits, key) for hits in chosen(ways)])) for name, ways in runs.items()
        }
        own = chosen(runs[""])
        sums = [
            np.stack([hits[name].double().numpy() for hits in own], 1) for name in ("clean", "biased", key)
        ]
        out[f"scr_{key}"] = Measure(
            values.pop(""),
            tests,
            "share of the accuracy lost to a bias",
            resampler.interval(gained, *by_source(of, *sums, np.ones(tests))),
            values,
            "texts",
        )
        for i, hits in enumerate(runs[""], 1):
            out[f"scr_dir{i}_{key}"] = Measure(
                share(hits, key), tests, "share of the accuracy lost to a bias", unit_n="texts"
            )
    return out


# targeted perturbations


def targeted_perturbation(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str | None = None, *,
    pool: str = "mean", controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """TPP: probes of one value each, of which ablations for one value should lower that one's accuracy alone."""
    asked = texts.only(attribute)
    values = texts.values(asked)
    labels = [labels_of(texts, asked, value) for value in values]
    found = gather(dictionary, model, texts, pool, controls, seed, on_batch)
    runs = {}
    for name, one in found.items():
        runs[name] = perturbed(one, atoms_of(one.dictionary, "tpp"), labels, seed)
    runs[RANDOM] = perturbed(found[""], atoms_of(dictionary, "tpp"), labels, seed, drawn=True)
    facts = {"attribute": asked, "values": values, "pool": pool, "seed": seed}
    sources = [texts.sources()[split(own, texts.sources(), seed)[1]] for own in labels]
    return Report(tpp_measures(runs, seed, sources), about("tpp", dictionary, model, texts, facts))


Lost = dict[
    str, list[Float[Tensor, "_ ablated"]]
]  # of judged texts, by number of features, for each class's probe


def perturbed(
    one: Labelled, atoms: Float[Tensor, "feature d"], labels: Sequence[Bool[Tensor, " texts"]], seed: int, drawn: bool = False
) -> Lost:  # fmt: skip
    """Whether a class's probe, right about a text, is so no more without the features for each class: 1, 0, or -1.

    ``drawn`` ablates drawn features in place of the strongest, and gives the mean over ``DRAWS`` of them: their TPP is 0 but
    for the chance by which a class's own feature is among its draws.
    """
    generator, sets, probes, effect = torch.Generator().manual_seed(seed), [], [], []
    for own in labels:
        train, test = split(own, one.sources, seed)
        fitted = one.at(train)
        probes.append(linear(fitted.x, own[train], seed=seed))
        sets.append((one.at(test), own[test]))
        strength = targeted_effects(fitted.codes, own[train], atoms, probes[-1].weight)
        used = fitted.codes.firing_counts() > 0
        draws = [torch.rand(strength.shape, generator=generator) * used for _ in range(DRAWS)]
        effect.append(draws if drawn else [strength])

    def without(judged: Labelled, strength: Tensor, k: int) -> Tensor:
        return ablated(judged.x, judged.codes, atoms, strongest(strength, k))

    def right(probe: Probe, x: Tensor, true: Tensor) -> Tensor:
        return ((probe(x) > 0) == true).double()

    return {
        str(k): [
            torch.stack([
                right(probe, judged.x, true)
                - torch.stack([right(probe, without(judged, strength, k), true) for strength in tries]).mean(0)
                for tries in effect
            ], 1)
            for probe, (judged, true) in zip(probes, sets, strict=True)
        ]
        for k in ABLATED
    }  # fmt: skip


def tpp_measures(
    runs: dict[str, Lost], seed: int, sources: Sequence[Int[Tensor, "_"]] | None = None
) -> dict[str, Measure]:
    """Mean TPP over classes, of a dictionary ("") beside others and random features.

    ``sources``: the documents of the texts that each class's probe is judged on (None: each text stands alone).
    """

    def mean(sums: np.ndarray, texts: np.ndarray) -> np.ndarray:
        known = np.where(texts > 0, texts, np.nan)  # a draw may miss a class
        return targeted(sums / known[..., None, :]).mean(-1)

    def of(lost: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """What each judged text adds to the sums [ablated, probed], and to the number of its class's texts."""
        probed = np.repeat(np.eye(len(lost)), [len(one) for one in lost], axis=0)
        return torch.cat(lost).numpy()[..., None] * probed[:, None], probed

    out = {}
    for key in map(str, ABLATED):
        parts = {name: of(lost[key]) for name, lost in runs.items()}
        values = {
            name: mean(*(part.sum(0, keepdims=True) for part in one)).item() for name, one in parts.items()
        }
        tests = len(parts[""][0])
        own = by_source(np.arange(tests) if sources is None else torch.cat(list(sources)).numpy(), *parts[""])
        interval = Resampler(len(own[0]), seed).interval(mean, *own)
        out[f"tpp_{key}"] = Measure(values.pop(""), tests, "accuracy", interval, values, "texts")
    return out
