"""Absorption: rows of a concept on which the concept's own features are silent, since another feature writes it too.

After SAEBench (Karvonen et al. 2025, 2503.09532) and Chanin et al. 2024 (2409.14507), for any concept that a linear probe
reads. A code times its atom's norm is what a feature writes, so atoms may have any norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
)
from saekit.evaluate.measure import Measure, over_tasks
from saekit.models import Model
from saekit.probes import RANKERS, Probe, columns, f1, linear
from saekit.types import Codes, SaekitError

ABSORBERS = 3  # features that may together take a concept over
ALIGNED, BARELY = 0.1, 0.025  # least cosine with the probe: of absorbers, and of the one of a full absorption
SHARE = 0.4  # of the probe's projection that absorbers must write
SPLITS, GAIN = 10, 0.03  # features that a concept may be split over, and by how much each must raise F1
CANDIDATES = 256  # features that the ranker sees, those that are most unlike between texts
RELIABLE = 0.6  # least F1 of a concept's probe
SILENT = 1e-8


def absorption(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str | None = None, *,
    pool: str = "last", controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """Share of texts on which a value's own features are silent or too weak, as another feature writes what it stands for.

    Of texts that have the value and whose probe says so, mean over values whose probe has an F1 of ``RELIABLE`` on texts
    that it wasn't fitted to. ``splits``: features that a value is split over, its first one among them.
    """
    asked = texts.only(attribute)
    values = texts.values(asked)
    found = gather(dictionary, model, texts, pool, controls, seed, on_batch)
    sources = texts.sources()
    probes = {value: probed(found[""].x, labels_of(texts, asked, value), seed, sources) for value in values}
    kept = [value for value in values if probes[value].f1 >= RELIABLE]
    if not kept:
        best = max(one.f1 for one in probes.values())
        raise SaekitError(
            f"attribute {asked!r} has no value whose probe reads it well (best F1 {best:.2f}, {RELIABLE} asked); choose another attribute or hook point"
        )
    judged = {
        name: [concept(one, atoms_of(one.dictionary, "absorption"), probes[v], seed) for v in kept] for name, one in found.items()
    }  # fmt: skip
    each = {value: one.to_json() for value, one in zip(kept, judged[""], strict=True)}
    left_out = [value for value in values if value not in kept]
    facts = {"attribute": asked, "each": each, "left_out": left_out, "pool": pool, "seed": seed}
    of = [sources[probes[value].right] for value in kept]
    return Report(measures(judged, seed, of), about("absorption", dictionary, model, texts, facts))


def measures(
    found: "dict[str, list[Concept]]", seed: int, sources: Sequence[Int[Tensor, "_"]] | None = None
) -> dict[str, Measure]:
    """What is said of a dictionary ("") beside others, mean over concepts.

    ``sources``: the documents of each concept's texts (None: each text stands alone).
    """

    def each(key: str) -> dict[str, list[Tensor]]:
        return {name: [getattr(one.absorbed, key).double() for one in own] for name, own in found.items()}

    out = {}
    for key in ("full", "fraction"):
        rows = {name: [one for one in own if len(one)] for name, own in each(key).items()}
        mean = {
            name: float(np.mean([one.mean().item() for one in own])) if own else 0.0
            for name, own in rows.items()
        }
        of = None if sources is None else [own.numpy() for own in sources if len(own)]
        interval = over_tasks([one.numpy() for one in rows[""]], of, seed)
        beside = {name: value for name, value in mean.items() if name}
        out[f"absorption_{key}"] = Measure(
            mean[""], sum(map(len, rows[""])), "share of texts", interval, beside, "texts"
        )
    sizes = {name: float(np.mean([len(one.own) for one in own])) for name, own in found.items()}
    out["splits"] = Measure(sizes.pop(""), len(found[""]), "features per value", None, sizes, "values")
    return out


@dataclass(frozen=True)
class Absorbed:
    """Of each row: whether one feature has taken all of the concept over, and the share that up to three have, in [0, 1]."""

    full: Bool[Tensor, " rows"]
    fraction: Float[Tensor, " rows"]


@torch.no_grad()
def absorbed(
    x: Float[Tensor, "rows d"], codes: Codes, atoms: Float[Tensor, "feature d"], direction: Float[Tensor, " d"], own: Sequence[int]
) -> Absorbed:  # fmt: skip
    """What other features write along a probe's direction where the concept's ``own`` features write less than there is.

    With the unit direction w, P = w x and p_i = z_i w d_i, own features' sum M, and B the sum of the ``ABSORBERS``
    largest p_i > 0 of others whose atoms have a cosine of ``ALIGNED`` with w: the fraction is 0 where M >= P or
    B < ``SHARE`` P, else 1 where M <= 0, else b / (b + M) with b = min(B, P - M). Full: all own features are silent, and
    the largest p_i of all is ``SHARE`` of P, from an atom of cosine ``BARELY``.
    """
    if not len(own):
        raise SaekitError("own is empty; give at least one feature of the concept")
    w = torch.nn.functional.normalize(direction.double(), dim=0)
    unit = torch.nn.functional.normalize(atoms.double(), dim=1)
    cosine, writes = unit @ w, atoms.double() @ w
    mine = torch.zeros(codes.n_features, dtype=torch.bool).index_fill(0, torch.tensor(list(own)), True)
    row, feature, value = codes.row_ids(), codes.indices.long(), codes.values.double()
    projection, whole = value * writes[feature], x.double() @ w
    main = torch.zeros(codes.rows, dtype=torch.float64).index_add(
        0, row[mine[feature]], projection[mine[feature]]
    )
    active = (value >= SILENT) & mine[feature]
    loud = torch.zeros(codes.rows, dtype=torch.bool).index_fill(0, row[active].unique(), True)
    others = ~mine[feature] & (cosine[feature] >= ALIGNED) & (projection > 0)
    taken = _largest(row[others], projection[others], codes.rows, ABSORBERS).sum(1)
    b = torch.minimum(taken, whole - main)
    fraction = torch.where(main <= 0, 1.0, b / (b + main))
    fraction = fraction.where((main < whole) & (taken / whole >= SHARE), 0.0).clamp(0, 1)
    top, at = _first(row, projection, codes.rows)
    aligned = (at >= 0) & (cosine[feature[at.clamp_min(0)]] >= BARELY)
    full = ~loud & aligned & (whole >= 0) & (top / whole >= SHARE)
    return Absorbed(full, fraction.float())


def _largest(row: Tensor, value: Tensor, rows: int, k: int) -> Float[Tensor, "rows k"]:
    """The k largest values of each row, 0 where it has fewer."""
    order = value.sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row[order]]
    kept = place < k
    return value.new_zeros(rows, k).index_put((row[order][kept], place[kept]), value[order][kept])


def _first(row: Tensor, value: Tensor, rows: int) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """The largest entry of each row and its number; 0 and -1 where there is none above 0."""
    some = (value > 0).nonzero()[:, 0]
    best = value.new_zeros(rows).scatter_reduce(0, row[some], value[some], "amax")
    at = torch.full((rows,), -1)
    hit = some[value[some] == best[row[some]]].flip(0)  # the first of equals is written last
    at[row[hit]] = hit
    return best, at


@dataclass(frozen=True)
class Concept:
    """``absorbed`` are the judged texts that have the concept and whose probe says so; ``own`` its features."""

    absorbed: Absorbed
    own: list[int]

    def to_json(self) -> dict[str, float]:
        """Means over its texts, how many these are, and over how many features it is split."""
        n = len(self.absorbed.full)
        full, fraction = (
            float(one.double().mean()) if n else 0.0 for one in (self.absorbed.full, self.absorbed.fraction)
        )
        return {"full": full, "fraction": fraction, "texts": n, "splits": len(self.own)}


@dataclass(frozen=True)
class Probed:
    """A concept's probe, fitted to ``train``, and the texts of the others that have the concept and of which it says so."""

    probe: Probe
    labels: Bool[Tensor, " texts"]
    train: Int[Tensor, " fitted"]
    right: Int[Tensor, " judged"]
    f1: float


def probed(
    x: Float[Tensor, "texts d"], labels: Bool[Tensor, " texts"], seed: int, sources: Int[Tensor, " texts"] | None = None
) -> Probed:  # fmt: skip
    """The probe of a concept, from four fifths of the texts."""
    train, test = halves(labels, seed, sources=sources)
    probe = linear(x[train], labels[train], seed=seed)
    said = probe(x[test]) > 0
    return Probed(probe, labels, train, test[said & labels[test]], f1(said, labels[test]))


def concept(one: Labelled, atoms: Float[Tensor, "feature d"], of: Probed, seed: int) -> Concept:
    """What a dictionary does with one concept; its features are chosen on the texts that the probe was fitted to."""
    known = one.at(of.train).sources
    a, b = (of.train[rows] for rows in halves(of.labels[of.train], seed + 1, sources=known))
    own = splits(one.at(a).codes, of.labels[a], (one.at(b).codes, of.labels[b]), seed)
    some = one.at(of.right)
    return Concept(absorbed(some.x, some.codes, atoms, of.probe.weight, own), own)


def splits(
    codes: Codes, labels: Bool[Tensor, " rows"], held_out: tuple[Codes, Bool[Tensor, "_"]], seed: int = 0
) -> list[int]:
    """Features that a concept is split over: the first by the L1 ranker, and more while each raises a probe's F1 by ``GAIN``.

    Only features that are more active where the label is true.

    Probes of the first 1, 2, ... features are fitted to ``codes`` and judged on ``held_out``.
    """
    # a feature that says what a text is not, as that of the only other value, is none of the concept's
    apart = RANKERS["mean_difference"](codes, labels) * (difference(codes, labels) > 0)
    some = apart.sort(descending=True, stable=True).indices[: min(CANDIDATES, max(1, int((apart > 0).sum())))]
    order = RANKERS["l1"](columns(codes, some), labels).sort(descending=True, stable=True).indices[:SPLITS]
    before, chosen = -GAIN, list[int]()
    for feature in some[order].tolist():
        tried = torch.tensor([*chosen, feature])
        probe = linear(columns(codes, tried), labels, seed=seed)
        now = f1(probe(columns(held_out[0], tried)) > 0, held_out[1])
        if chosen and now - before <= GAIN:
            break
        before, chosen = now, tried.tolist()
    return chosen
