"""Training for reproductions: a missed L0 is the claim's own business, an interrupted or failed run ends it all."""

import warnings
from collections.abc import Mapping
from typing import Any

from saekit.dictionaries import Dictionary
from saekit.trainers import Run, train, train_many


def fit(dictionary: Dictionary, source: Any, steps: int, batch_size: int, **options: Any) -> Run:
    """Train one dictionary; the arguments are those of :func:`saekit.train`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return _whole(train(dictionary, source, steps, batch_size, **options))


def fit_all(
    dictionaries: Mapping[str, Dictionary], source: Any, steps: int, batch_size: int, **options: Any
) -> dict[str, Run]:
    """Train several from one stream; the arguments are those of :func:`saekit.train_many`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        runs = train_many(dictionaries, source, steps, batch_size, **options)
    return {name: _whole(run) for name, run in runs.items()}


def _whole(run: Run) -> Run:
    if run.error is not None:
        raise RuntimeError(run.error)
    if not run.finished:  # Ctrl-C, which training takes for itself
        raise KeyboardInterrupt
    return run
