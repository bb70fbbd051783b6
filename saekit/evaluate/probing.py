"""Sparse probing: how well few features tell an attribute of texts, beside all of them and the activations themselves.

After SAEBench (Karvonen et al. 2025, 2503.09532) and Gurnee et al. 2023 (2305.01610), one value of an attribute against the
others, as many of each. What is judged on was seen by no fit and no choice.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.evaluate.core import Report
from saekit.evaluate.labelled import Labelled, Texts, about, balanced, gather, halves, labels_of
from saekit.evaluate.measure import Measure, Resampler
from saekit.models import Model
from saekit.probes import columns, linear, sparse
from saekit.types import Codes, SaekitError

KS = (1, 2, 5)
ALL = "all"
Hits = dict[str, Bool[Tensor, " judged"]]


def sparse_probing(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str | None = None, *,
    pool: str = "mean", controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """Accuracy of probes of 1, 2 and 5 features and of all, and of as many coordinates of the activations, mean over values.

    ``attribute``: the one that is asked about (None: the only one). Intervals are over judged texts.
    """
    asked = texts.only(attribute)
    values = texts.values(asked)
    found = gather(dictionary, model, texts.texts, pool, controls, seed, on_batch)
    tasks = [labels_of(texts, asked, value) for value in values]
    hits = {name: [told(one, labels, seed) for labels in tasks] for name, one in found.items()}
    measures = {key: _measure(key, hits, seed) for key in hits[""][0]}
    facts = {"attribute": asked, "values": values, "pool": pool, "seed": seed}
    return Report(measures, about("sparse_probing", dictionary, model, texts, facts))


def told(one: Labelled, labels: Bool[Tensor, " texts"], seed: int) -> Hits:
    """Which judged texts each probe is right about."""
    train, test = (balanced(labels, rows, seed) for rows in halves(labels, seed))
    fitted, judged, known, true = one.at(train), one.at(test), labels[train], labels[test]
    out: Hits = {}
    for name, a, b in (("features", fitted.codes, judged.codes), ("coordinates", fitted.x, judged.x)):
        width = a.n_features if isinstance(a, Codes) else a.shape[1]
        for k in KS:
            out[f"{name}_{k}"] = (sparse(a, known, min(k, width), seed=seed)(b) > 0) == true
    used = fitted.codes.firing_counts().nonzero()[:, 0]
    if not len(used):
        raise SaekitError(
            f"no feature fires on the {len(train)} texts that probes are fitted to; give texts like those that the dictionary was trained on"
        )
    every = linear(columns(fitted.codes, used), known, seed=seed)
    out[f"features_{ALL}"] = (every(columns(judged.codes, used)) > 0) == true
    out[f"coordinates_{ALL}"] = (linear(fitted.x, known, seed=seed)(judged.x) > 0) == true
    return out


def _measure(key: str, hits: dict[str, list[Hits]], seed: int) -> Measure:
    def mean(tasks: list[Hits]) -> float:
        return float(np.mean([task[key].double().mean().item() for task in tasks]))

    right = torch.cat([task[key] for task in hits[""]]).double().numpy()
    interval = Resampler(len(right), seed).interval(lambda a, n: a / n, right, np.ones(len(right)))
    beside = {name: mean(tasks) for name, tasks in hits.items() if name and key.startswith("features")}
    return Measure(mean(hits[""]), len(right), "share of texts", interval, beside, "texts")
