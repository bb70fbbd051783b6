"""The architecture of a dictionary as plain data: its width and four choices, checked against each other."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.objective.coefficient import PenaltyConfig
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.wiring import WIRINGS
from saekit.records import check, fits, name_of
from saekit.registry import Registry, nearest
from saekit.types import SaekitError

CHOICES = {"wiring": WIRINGS, "selection": SELECTIONS, "atoms": ATOMS, "objective": OBJECTIVES}
Choice = tuple[str, Any]  # a row's name and its frozen config
_NAMED = {"name": str}
CONFIG = {
    "n_features": int, "wiring": _NAMED, "selection": _NAMED, "atoms": _NAMED, "objective": [_NAMED]
}  # fmt: skip
NEEDS = {  # what a term may need of a selection, in words
    "dead": "looks for dead features among the pre-activations, and what goes step by step has none",
    "values": "acts on codes, and this selection's carry no gradient",
    "on": "acts on learned thresholds, which only selection 'jumprelu' has",
    "gate": "trains a gate, which only selection 'gated' has",
    "routes": "balances experts, which only selection 'switch' has",
    "ranked": "cuts rows short by rank, so each must hold k entries by falling importance: choose 'topk', 'abstopk' or 'pursuit'",
    "free_l0": "steers the number of active features, which this selection fixes itself: leave k out of the term, or choose 'relu', 'jumprelu' or 'gated'",
}


def configure(table: Registry, name: str, options: Mapping[str, Any], unused: set[str]) -> Any:
    """The config of one row, from those options that it has a field for; takes them off ``unused``."""
    if name not in table:
        raise SaekitError(f"{table.kind} {name!r} is unknown{nearest(name, table.table)}")
    config = table[name].Config
    mine = {f.name for f in fields(config)} & set(options)
    missing = [
        f.name
        for f in fields(config)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in mine
    ]
    if missing:
        raise SaekitError(f"{table.kind} {name!r} needs {missing[0]}; give {missing[0]}=...")
    unused -= mine
    values = {key: tuple(options[key]) if isinstance(options[key], list) else options[key] for key in mine}
    for f in fields(config):
        if f.name in mine and not fits(values[f.name], f.type):
            raise SaekitError(
                f"{f.name} = {options[f.name]!r} of {table.kind} {name!r} must be of type {name_of(f.type)}"
            )
    return config(**values)


@dataclass(frozen=True)
class Config:
    """The architecture of a dictionary: its width and the four choices."""

    n_features: int
    wiring: Choice
    selection: Choice
    atoms: Choice
    objective: tuple[Choice, ...]

    def __post_init__(self):
        if not isinstance(self.n_features, int) or self.n_features < 1:
            raise SaekitError(f"n_features = {self.n_features!r} must be a whole number of at least 1")
        for _, config in (self.wiring, self.selection, *self.objective):
            if hasattr(config, "check"):
                config.check(self.n_features)
            if hasattr(config, "check_beside"):
                config.check_beside(self.selection[1])
        self._check_fit()
        self._check_needs()
        self._check_encoder()

    def _check_encoder(self) -> None:
        name, selection, atoms = self.selection[0], SELECTIONS[self.selection[0]], ATOMS[self.atoms[0]]
        long = atoms.tied and atoms.trained and not getattr(self.atoms[1], "unit_norm", True)
        if getattr(atoms, "shifts_over_rows", False) and self.wiring[0] != "autoencoder":
            raise SaekitError(
                f"atoms {self.atoms[0]!r} stand at every place of one row, and wiring {self.wiring[0]!r} reads or writes several; choose wiring='autoencoder'"
            )
        if atoms.tied and not WIRINGS[self.wiring[0]].same_space:
            raise SaekitError(
                f"atoms {self.atoms[0]!r} read by the rows that they write, and wiring {self.wiring[0]!r} writes another space than it reads; choose atoms='unit_norm'"
            )
        if getattr(atoms, "hull", False) and any(getattr(self.wiring[1], "dedicated", None) or ()):
            raise SaekitError(
                f"atoms {self.atoms[0]!r} are mixtures of candidates, and dedicated = {self.wiring[1].dedicated} would cut them to one source; leave one of the two out"
            )
        if getattr(selection, "unit_encoder", False) and long:
            raise SaekitError(
                f"selection {name!r} needs atoms of norm 1 and unit_norm = False lets them grow; leave it out"
            )
        if getattr(selection, "tied_only", False) and not WIRINGS[self.wiring[0]].same_space:
            raise SaekitError(
                f"selection {name!r} reads by the atoms that it writes, and wiring {self.wiring[0]!r} writes another space than it reads; choose another selection"
            )
        if getattr(selection, "tied_only", False) and not atoms.tied:
            raise SaekitError(
                f"selection {name!r} sends the encoder no gradient, and atoms {self.atoms[0]!r} leave it one of its own; choose atoms='tied'"
            )
        required = getattr(selection, "requires", None) or getattr(self.selection[1], "requires", None)
        if required is not None and required not in [term for term, _ in self.objective]:
            raise SaekitError(
                f"selection {name!r} without objective {required!r} leaves a part of it untrained; add it to objective"
            )

    def _check_fit(self) -> None:
        names = [name for name, _ in self.objective]
        fits_ = [name for name in names if OBJECTIVES[name].fit]
        if len(fits_) != 1 or names[0] != fits_[0]:
            raise SaekitError(
                f"objective {names} must begin with one term that fits the data (reconstruction, matryoshka or hierarchical) and hold no other"
            )
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise SaekitError(f"objective {names} names {twice[0]!r} twice; name it once")

    def _check_needs(self) -> None:
        selection = self.selection[0]
        offers = SELECTIONS[selection].offers
        for name, config in self.objective:
            if getattr(OBJECTIVES[name], "moves_atoms", False) and getattr(
                ATOMS[self.atoms[0]], "fixed", False
            ):
                raise SaekitError(
                    f"objective {name!r} moves atoms, and atoms {self.atoms[0]!r} stay as they are; leave one of them out"
                )
            if getattr(OBJECTIVES[name], "downstream", False) and isinstance(self.wiring[1].d_in, tuple):
                raise SaekitError(
                    f"objective {name!r} goes on through a model from one place, and wiring {self.wiring[0]!r} writes {len(self.wiring[1].d_in)}; leave it out"
                )
            needs = set(OBJECTIVES[name].needs)
            if isinstance(config, PenaltyConfig) and config.k is not None:
                needs.add("free_l0")
            for need in sorted(needs - offers):
                raise SaekitError(f"objective {name!r} with selection {selection!r}: the term {NEEDS[need]}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; :meth:`from_json` inverts it."""

        def plain(choice: Choice) -> dict[str, Any]:
            return {"name": choice[0], **dataclasses.asdict(choice[1])}

        return {
            "n_features": self.n_features,
            **{c: plain(getattr(self, c)) for c in ("wiring", "selection", "atoms")},
            "objective": [plain(term) for term in self.objective],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Config":
        """Read a config back; an unknown or missing field raises by name."""

        def choice(kind: str, entry: Mapping[str, Any]) -> Choice:
            options = {key: value for key, value in entry.items() if key != "name"}
            unused = set(options)
            name = entry["name"]
            if name not in CHOICES[kind]:
                raise SaekitError(
                    f"{kind} {name!r} is unknown{nearest(name, CHOICES[kind].table)}; if it is one of your own, import its module before the dictionary is loaded"
                )
            config = configure(CHOICES[kind], name, options, unused)
            if unused:
                field = sorted(unused)[0]
                raise SaekitError(
                    f"{kind} {name!r} has no field {field!r}{nearest(field, list(vars(config)))}"
                )
            return name, config

        check(data, CONFIG, "the dictionary's config", "save the dictionary again")
        for key in sorted(set(data) - set(CONFIG)):
            raise SaekitError(
                f"field {key!r} of the dictionary's config is unknown{nearest(key, list(CONFIG))}"
            )
        single = {c: choice(c, data[c]) for c in ("wiring", "selection", "atoms")}
        return Config(
            n_features=data["n_features"],
            objective=tuple(choice("objective", t) for t in data["objective"]),
            **single,
        )
