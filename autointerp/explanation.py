"""What is said of a feature, by whom, and how well it held up; and the file that keeps it beside the dictionary."""

import json
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from numpy import ndarray

from saekit import records
from saekit.activations import write_atomic
from saekit.autointerp import stats
from saekit.dictionaries import Dictionary
from saekit.types import SaekitError

SCHEMA = 1
FILE = "explanations.json"
NAMED, LONGEST = 3, 60  # tokens, and characters, of a label
METHODS = ("statistics", "llm", "human", "imported")
FIX = "remove it and explain the features again"


@runtime_checkable
class Rule(Protocol):
    """An explanation that can be executed: it says from the tokens of windows alone how likely each one fires."""

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Float[ndarray, "window width"]:
        """Chance that the feature fires on each token, 0 to 1; above 0 exactly where the rule says that it does."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON, to be read by people and by :func:`saekit.autointerp.rules.rule_of`."""
        ...


@dataclass(frozen=True)
class Score:
    """How well an explanation foretells its feature, on text that it was not made from.

    ``value`` is in the unit that ``metric`` names, None where nothing could be scored, with its 95 % interval ``low``
    to ``high`` over ``n`` examples, taken as independent: those of one document are alike, so that for other documents it is
    too narrow. ``wrong`` is the value where every failed answer counts as wrong (in ``value`` it
    is left out), ``failures`` counts them by kind. ``controls`` hold the same measure for judges that don't know the
    explanation, ``strata`` the share of examples judged rightly by kind. ``auc`` goes by the judge's chances;
    ``skill`` is the judge's sensitivity + specificity - 1, by what rules say of the same examples.
    """

    scorer: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    wrong: float | None = None
    controls: Mapping[str, float | None] = field(default_factory=dict)
    strata: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    auc: float | None = None
    skill: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def corrected(self) -> float | None:
        """The balanced accuracy without the judge's own errors, 0 to 1, where its skill is known."""
        return None if self.value is None or self.skill is None else stats.corrected(self.value, self.skill)


@dataclass(frozen=True)
class Explanation:
    """A feature in words, by one of ``METHODS``; ``rule`` is the same as a predicate, where there is one.

    ``about`` holds what the method says besides: tables of tokens, the model that was asked.
    """

    feature: int
    text: str
    method: str
    rule: Rule | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()

    def __post_init__(self):
        if self.method not in METHODS:
            raise SaekitError(f"method {self.method!r} is not one of {', '.join(METHODS)}")

    @property
    def label(self) -> str:
        """The feature in a few words: the sentence, or of statistics without a simple rule tokens of which it fires on most."""
        rule, tokens = self.about.get("rule"), self.about.get("tokens")
        if self.method == "statistics" and tokens and not (rule and rule.get("simple")):
            frequent = sorted(tokens, key=lambda row: -row[4] * row[1])[:NAMED]
            return ", ".join(repr(row[0]) for row in frequent) + ", ..."
        return self.text if len(self.text) <= LONGEST else self.text[: LONGEST - 3] + "..."

    def score(self, scorer: str) -> Score | None:
        """The score by one scorer, if it has it."""
        return next((score for score in self.scores if score.scorer == scorer), None)


SHAPE = {
    "about": dict,
    "features": [
        {
            "feature": int, "text": str, "method": str, "rule?": dict, "about": dict,
            "scores": [{
                "scorer": str, "metric": str, "value": float | None, "low": float | None, "high": float | None, "n": int,
                "wrong?": float | None, "controls?": {"*": float | None}, "strata?": {"*": float}, "failures?": {"*": int}, "auc?": float | None, "skill?": float | None, "notes?": [str],
            }],
        }
    ],
}  # fmt: skip


def save(explanations: Iterable[Explanation], path: "str | Path", about: Mapping[str, Any]) -> Path:
    """Write explanations to a file (of a folder: ``explanations.json`` in it), whole or not at all."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    listed = [
        {
            "feature": int(one.feature), "text": one.text, "method": one.method, "about": dict(one.about),
            **({"rule": one.rule.to_json()} if one.rule is not None else {}),
            "scores": [asdict(score) for score in one.scores],
        }
        for one in explanations
    ]  # fmt: skip
    if file.is_file():
        load(file)  # what is something else isn't written over
    try:
        write_atomic(
            file,
            json.dumps({"schema": SCHEMA, "about": dict(about), "features": listed}, indent=1).encode(),
        )
    except OSError as error:
        raise SaekitError(
            f"out {str(file)!r} can't be written: {error.strerror}; name a file in a folder that exists"
        ) from None
    return file


def load(path: "str | Path") -> tuple[list[Explanation], dict[str, Any]]:
    """Explanations of a file (or of the folder that holds ``explanations.json``), and what is said about them all."""
    from saekit.autointerp.rules import rule_of

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    data = records.read(file, "a record of explanations", SHAPE, FIX, SCHEMA)
    out = []
    known = {field.name for field in fields(Score)}
    for one in data["features"]:
        for odd in {name for score in one["scores"] for name in score} - known:
            raise SaekitError(
                f"{str(file)!r} has scores with a field {odd!r}, which this version of saekit doesn't know; {FIX}"
            )
        rule = rule_of(one["rule"]) if "rule" in one else None
        scores = tuple(Score(**{**score, "notes": tuple(score.get("notes", ()))}) for score in one["scores"])
        out.append(Explanation(one["feature"], one["text"], one["method"], rule, one["about"], scores))
    return out, data["about"]


def load_of(dictionary: Dictionary, path: "str | Path") -> list[Explanation]:
    """Explanations of a file that are of this dictionary; raises where they are of another one, as far as it is said."""
    listed, about = load(path)
    said = about.get("dictionary", dictionary.digest())
    if said != dictionary.digest():
        raise SaekitError(
            f"explanations of {str(path)!r} are of another dictionary ({said}; this is {dictionary.digest()}); {FIX}"
        )
    check_features(listed, dictionary, f"explanations of {str(path)!r}")
    return listed


def check_features(listed: Iterable[Explanation], dictionary: Dictionary, named: str) -> None:
    """Raise unless all are of features that the dictionary has."""
    for one in listed:
        if not 0 <= one.feature < dictionary.n_features:
            raise SaekitError(
                f"{named} name feature {one.feature}, which is not in a dictionary of {dictionary.n_features} features; give this dictionary's"
            )


def feature_numbers(features: Any, n_features: int) -> list[int]:
    """Numbers of features (a list, a generator, an array, a tensor) as ints; raises unless all are of the dictionary's ``n_features``."""
    listed: list[Any] = features.tolist() if hasattr(features, "tolist") else list(features)
    for feature in listed:
        if not isinstance(feature, numbers.Integral):
            raise SaekitError(f"feature {feature!r} is no number of a feature; give a list of whole numbers")
        if not 0 <= int(feature) < n_features:
            raise SaekitError(f"feature {feature} is none of the dictionary's {n_features}")
    return [int(feature) for feature in listed]
