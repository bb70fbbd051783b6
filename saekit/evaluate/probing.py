"""Sparse probing: how well few features tell an attribute of texts, beside all of them and the activations themselves.

After SAEBench (Karvonen et al. 2025, 2503.09532) and Gurnee et al. 2023 (2305.01610), one value of an attribute against the
others, as many of each. Features are chosen as SAEBench chooses them, by the difference of means of what they write (codes times
their atoms' lengths). What is judged on was seen by no fit and no choice, and is of other documents.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.dictionaries.rows import Rows
from saekit.evaluate.core import Report
from saekit.evaluate.labelled import Labelled, Texts, about, gather, labels_of, split
from saekit.evaluate.measure import Measure, over_tasks
from saekit.models import Model
from saekit.probes import columns, linear, sparse
from saekit.types import Codes, SaekitError

KS, RANKER = (1, 2, 5), "raw_difference"
ALL = "all"
Hits = dict[str, Bool[Tensor, " judged"]]


def sparse_probing(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str | None = None, *,
    pool: str = "mean", controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """Accuracy of probes of 1, 2 and 5 features and of all, and of as many coordinates of the activations, mean over values.

    ``attribute``: the one that is asked about (None: the only one). Intervals are over the documents of judged texts.
    """
    asked = texts.only(attribute)
    values = texts.values(asked)
    found = gather(dictionary, model, texts, pool, controls, seed, on_batch)
    tasks = [labels_of(texts, asked, value) for value in values]
    hits = {name: [told(one, labels, seed) for labels in tasks] for name, one in found.items()}
    sources = [texts.sources()[split(labels, found[""].sources, seed)[1]] for labels in tasks]
    measures = {key: _measure(key, hits, sources, seed) for key in hits[""][0]}
    facts = {"attribute": asked, "values": values, "pool": pool, "seed": seed}
    return Report(measures, about("sparse_probing", dictionary, model, texts, facts))


def told(one: Labelled, labels: Bool[Tensor, " texts"], seed: int) -> Hits:
    """Which judged texts each probe is right about."""
    train, test = split(labels, one.sources, seed)
    fitted, judged, known, true = one.at(train), one.at(test), labels[train], labels[test]
    out: Hits = {}
    for name, a, b in (("features", _written(fitted), _written(judged)), ("coordinates", fitted.x, judged.x)):
        width = a.n_features if isinstance(a, Codes) else a.shape[1]
        for k in KS:
            probe = sparse(a, known, min(k, width), RANKER, seed=seed)
            out[f"{name}_{k}"] = (probe(b) > 0) == true
    used = fitted.codes.firing_counts().nonzero()[:, 0]
    if not len(used):
        raise SaekitError(
            f"no feature fires on the {len(train)} texts that probes are fitted to; give texts like those that the dictionary was trained on"
        )
    every = linear(columns(fitted.codes, used), known, seed=seed)
    out[f"features_{ALL}"] = (every(columns(judged.codes, used)) > 0) == true
    out[f"coordinates_{ALL}"] = (linear(fitted.x, known, seed=seed)(judged.x) > 0) == true
    return out


def _written(one: Labelled) -> Codes:
    """Codes in units of what they write, where each writes one atom; by itself a code's unit is any."""
    d = one.dictionary
    if not isinstance(d, Rows) or d.n_atoms != d.n_features:
        return one.codes
    lengths = d.W_dec.detach().flatten(1).norm(dim=1).cpu()
    return one.codes.with_values(one.codes.values * lengths[one.codes.indices.long()])


def _measure(key: str, hits: dict[str, list[Hits]], sources: list[Int[Tensor, "_"]], seed: int) -> Measure:
    def mean(tasks: list[Hits]) -> float:
        return float(np.mean([task[key].double().mean().item() for task in tasks]))

    right = [task[key].double().numpy() for task in hits[""]]
    interval = over_tasks(right, [own.numpy() for own in sources], seed)
    beside = {name: mean(tasks) for name, tasks in hits.items() if name and key.startswith("features")}
    return Measure(mean(hits[""]), sum(map(len, right)), "share of texts", interval, beside, "texts")
