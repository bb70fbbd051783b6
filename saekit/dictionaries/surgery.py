"""Dictionaries made from dictionaries: other objectives, thresholds for a wanted L0, fewer or joined features."""

import copy
from typing import Any

from saekit.dictionaries.config import CHOICES, configure
from saekit.dictionaries.dictionary import Dictionary
from saekit.registry import nearest
from saekit.types import SaekitError


def with_objective(dictionary: Dictionary, objective: "str | tuple[str, ...]", **options: Any) -> Dictionary:
    """The same dictionary, weights and all, that minimises something else; for going on with training.

    ``options`` are the fields of the new terms, as in :func:`create`.
    """
    names = (objective,) if isinstance(objective, str) else tuple(objective)
    unused = set(options)
    terms = tuple((name, configure(CHOICES["objective"], name, options, unused)) for name in names)
    if unused:
        known = sorted({f for _, config in terms for f in vars(config)})
        field = sorted(unused)[0]
        raise SaekitError(f"option {field!r} is not one of objective {names}{nearest(field, known)}")
    import dataclasses

    changed = Dictionary(dataclasses.replace(dictionary.config, objective=terms), dictionary.seed)
    mine = {k: v for k, v in dictionary.state_dict().items() if not k.startswith("terms.")}
    changed.load_state_dict({**changed.state_dict(), **mine})
    changed.reads, changed.writes = dictionary.reads, dictionary.writes
    changed.card = copy.deepcopy(dictionary.card)
    return changed.to(dictionary.device)
