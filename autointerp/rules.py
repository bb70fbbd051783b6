"""Rules that say from tokens alone where a feature fires: what a statistics explanation is when it is run.

A rule fires where its strength is above 0, and the strength is the chance that the feature fires there. Rules need no
tokenizer: what a rule needs of the spelling of tokens it carries, as token ids or as a table over the vocabulary.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from saekit import records
from saekit.types import SaekitError

MOST = 256  # tokens or grams of a rule; those that cover the most
LONGEST = 3  # tokens of a gram
DEEPEST = 4  # rules inside rules
LARGEST = 1 << 21  # tokens of a vocabulary, and entries of an automaton
SHOWN = 8  # tokens that are named in a sentence
HOWS, BYS = ("contains", "begins", "ends", "is"), ("spaces", "letters", "tokens")
ONS = ("all", "first", "last")  # tokens of a word that it fires on
FIX = "explain the feature again"

Strength = Float[ndarray, "window width"]


@runtime_checkable
class Kind(Protocol):
    """A rule, as this table holds it: see :class:`saekit.autointerp.explanation.Rule`."""

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Strength:
        """Chance that the feature fires on each token, 0 to 1; nothing is known of what stands before a window."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What :func:`rule_of` reads."""
        ...

    @classmethod
    def of_json(cls, data: Mapping[str, Any], depth: int) -> "Kind":
        """The rule of such JSON; anything that doesn't fit raises SaekitError."""
        ...

    def words(self) -> str:
        """What it fires on, to come behind "fires on"."""
        ...


@dataclass(frozen=True)
class Pattern:
    """A spelling of words: ``any`` of some strings of characters and classes (``digit``, ``small``, ``capital``).

    ``how``: the word ``is`` it, or ``begins``, ``ends`` with it or ``contains`` it; ``runs``: each character or class
    stands once or more often in a row. ``by``: words end at ``spaces``, or they are runs of ``letters``, digits and
    underscores or of other signs, or each of the ``tokens`` is one; spaces are no part of them.
    """

    how: str
    any: tuple[tuple[str, ...], ...]
    by: str = "spaces"
    runs: bool = False

    def begin(self) -> tuple[int, ...]:
        """The state before the first character: for each string, bit i is set where i of its characters were met."""
        return (1,) * len(self.any)

    def step(self, state: tuple[int, ...], char: str) -> tuple[int, ...]:
        """The state behind another character."""
        out = []
        for items, met in zip(self.any, state, strict=True):
            size = len(items)
            new = 1 if self.how in ("ends", "contains") else 0
            for i, item in enumerate(items):
                if _is(char, item):
                    new |= (met >> i & 1) << i + 1
                    if self.runs:
                        new |= (met >> i + 1 & 1) << i + 1
            if self.how in ("begins", "contains"):
                new |= met & 1 << size
            out.append(new)
        return tuple(out)

    def accepts(self, state: tuple[int, ...]) -> bool:
        """Whether a word that ends in this state is one."""
        return any(met >> len(items) & 1 for items, met in zip(self.any, state, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {"how": self.how, "any": [[*one] for one in self.any], "by": self.by, "runs": self.runs}

    def words(self) -> str:
        """What words these are."""
        thing = "token" if self.by == "tokens" else "word"
        said = joined([_spelled(items, self.runs) for items in self.any], "or")
        if self.how == "is" and not any(item in CLASSES for items in self.any for item in items):
            return f"the {thing}{'s' if len(self.any) > 1 else ''} {said.replace(' or ', ' and ')}"
        verbs = {
            "is": "made of",
            "begins": "that begin with",
            "ends": "that end in",
            "contains": "that contain",
        }
        return f"{thing}s {verbs[self.how]} {said}"


CLASSES = {"digit": str.isdigit, "small": str.islower, "capital": str.isupper}
NAMED = {
    "digit": ("a digit", "digits"),
    "small": ("a small letter", "small letters"),
    "capital": ("a capital", "capitals"),
}


@cache
def _is(char: str, item: str) -> bool:
    return CLASSES[item](char) if item in CLASSES else char == item


def _spelled(items: Sequence[str], runs: bool) -> str:
    """A string of a pattern in words: ``a digit and then "th"``."""
    parts = []
    for own, group in groupby(items, lambda item: item if item in CLASSES else ""):
        found = list(group)
        if not own:
            parts.append(quoted("".join(found)))
        elif runs:
            parts.append(NAMED[own][1])
        else:
            parts.append(NAMED[own][0] if len(found) == 1 else f"{len(found)} {NAMED[own][1]}")
    return " and then ".join(parts)


def quoted(text: str) -> str:
    """A text in quotation marks, without the space that begins a word, on one line."""
    bare = text[1:] if len(text) > 1 and text[0] == " " and text[1] != " " else text
    return json.dumps(bare, ensure_ascii=False)


def joined(named: Sequence[str], word: str = "and") -> str:
    """``a, b and c``"""
    return f" {word} ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)


def word_begins(
    first: Int64[ndarray, "window width"], last: Int64[ndarray, "window width"]
) -> Bool[ndarray, "window width"]:
    """Where words begin, from the kinds of tokens' first and last characters; the window's first token begins one."""
    begins = np.ones(first.shape, bool)
    begins[:, 1:] = (first[:, 1:] == 0) | (first[:, 1:] != last[:, :-1])
    return begins


class Reader:
    """Finds the words of a pattern by their tokens: a finite automaton whose steps are tokens.

    Tokens ``of`` one class do the same. A row of ``classes`` is the kinds of the first and last character and the state
    behind the token, for each state before it; 0 is the state in which words begin.
    """

    def __init__(
        self, classes: Int64[ndarray, "kind column"], of: Int64[ndarray, " token"], accept: tuple[int, ...]
    ):
        self.classes, self.of, self.accept = classes, of, accept
        self.good = np.isin(np.arange(classes.shape[1] - 2), accept)

    def read(self, tokens: Int64[ndarray, "window width"]) -> tuple[Bool[ndarray, "window width"], ...]:
        """Which tokens are of such words, and which begin and end a word; tokens out of the vocabulary are of none."""
        known = tokens < len(self.of)
        own = self.of[np.where(known, tokens, 0)]
        rows = self.classes[own]
        begins = word_begins(np.where(known, rows[..., 0], 0), np.where(known, rows[..., 1], 0))
        ends = np.roll(begins, -1, 1)
        ends[:, -1] = True
        state, fits = np.zeros(len(tokens), np.int64), np.zeros(tokens.shape, bool)
        for j in range(tokens.shape[1]):
            state = self.classes[own[:, j], np.where(begins[:, j], 0, state) + 2]
            fits[:, j] = self.good[state] & ends[:, j] & known[:, j]
        for j in reversed(range(tokens.shape[1] - 1)):
            fits[:, j] |= fits[:, j + 1] & ~ends[:, j]
        return fits, begins, ends

    def to_json(self) -> dict[str, Any]:
        """Classes as lists; ``of`` as 16-bit little-endian numbers, deflated, in base64."""
        of = base64.b64encode(zlib.compress(self.of.astype("<u2").tobytes(), 9)).decode()
        return {
            "classes": self.classes.tolist(),
            "accept": [*self.accept],
            "vocabulary": len(self.of),
            "of": of,
        }

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> "Reader":
        """The reader of such JSON."""
        shape = {"classes": [[int]], "accept": [int], "vocabulary": int, "of": str}
        records.check(data, shape, "a rule of words", FIX, "reader")
        size, rows = data["vocabulary"], data["classes"]
        states = len(rows[0]) - 2 if rows else 0
        try:
            packed = zlib.decompressobj()
            raw = packed.decompress(
                base64.b64decode(data["of"], validate=True), 2 * max(0, min(size, LARGEST)) + 1
            )
        except (ValueError, zlib.error):
            raw = b""
        if not (
            1 <= size <= LARGEST and len(raw) == 2 * size and states >= 1 and len(rows) * states <= LARGEST
        ):
            raise SaekitError(
                f"a rule of words has a reader whose sizes don't fit (vocabulary = {size}); {FIX}"
            )
        of = np.frombuffer(raw, "<u2").astype(np.int64)
        within = all(
            len(row) == states + 2 and min(row) >= 0 and max(row[:2]) <= 2 and max(row[2:]) < states
            for row in rows
        )
        if not within or of.max() >= len(rows) or not all(0 <= state < states for state in data["accept"]):
            raise SaekitError(f"a rule of words has a reader with numbers out of range; {FIX}")
        return cls(np.array(rows, np.int64), of, tuple(data["accept"]))


@dataclass(frozen=True)
class Tokens:
    """Fires where the token that stands ``back`` tokens before is one of ``tokens``, with the chances ``p``.

    ``texts`` are the tokens in text.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    p: tuple[float, ...]
    back: int = 0

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Strength:
        """Chance that the feature fires on each token, 0 to 1."""
        return _shifted(_looked_up(tokens, self.tokens, self.p), self.back)

    def to_json(self) -> dict[str, Any]:
        """What :func:`rule_of` reads."""
        listed = [[*row] for row in zip(self.tokens, self.texts, self.p, strict=True)]
        return {"kind": "tokens", "back": self.back, "tokens": listed}

    @classmethod
    def of_json(cls, data: Mapping[str, Any], depth: int) -> "Tokens":
        """The rule of such JSON."""
        records.check(data, {"back": int, "tokens": [[int | str | float]]}, "a rule of tokens", FIX)
        rows = _rows(data["tokens"], "tokens", (int, str, float))
        if not 0 <= data["back"] < LONGEST:
            raise SaekitError(f"a rule of tokens has back = {data['back']}, not 0 to {LONGEST - 1}; {FIX}")
        tokens, texts, p = zip(*rows, strict=True)
        _check_ids("tokens", tokens)
        return cls(tokens, texts, _chances("tokens", p), data["back"])

    def words(self) -> str:
        """What it fires on."""
        places = ("", "the token right after ", "the second token after ")
        return places[self.back] + _list(quoted(text) for text in self.texts)


@dataclass(frozen=True)
class Grams:
    """Fires on the last token of runs of 2 or 3 tokens, with the chances ``p``; where two fit, the longer one counts."""

    grams: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    p: tuple[float, ...]

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Strength:
        """Chance that the feature fires on each token, 0 to 1."""
        out = np.zeros(tokens.shape)
        known = np.unique([token for gram in self.grams for token in gram])
        at = np.minimum(np.searchsorted(known, tokens), len(known) - 1)
        own = np.where(known[at] == tokens, at, -1)
        for n in range(2, LONGEST + 1):
            some = [i for i, gram in enumerate(self.grams) if len(gram) == n]
            if some and tokens.shape[1] >= n:
                number = _numbered(own, n, len(known))
                asked = np.searchsorted(known, np.array([self.grams[i] for i in some]))
                ids = asked @ len(known) ** np.arange(n)[::-1]
                found = _looked_up(number, ids.tolist(), [self.p[i] for i in some], missing=np.nan)
                out[:, n - 1 :] = np.where(np.isnan(found), out[:, n - 1 :], found)
        return out

    def to_json(self) -> dict[str, Any]:
        """What :func:`rule_of` reads."""
        rows = zip(self.grams, self.texts, self.p, strict=True)
        return {"kind": "grams", "grams": [[[*gram], text, p] for gram, text, p in rows]}

    @classmethod
    def of_json(cls, data: Mapping[str, Any], depth: int) -> "Grams":
        """The rule of such JSON."""
        records.check(data, {"grams": [[list | str | float]]}, "a rule of grams", FIX)
        grams, texts, p = zip(*_rows(data["grams"], "grams", (list, str, float)), strict=True)
        for gram in grams:
            if not 2 <= len(gram) <= LONGEST:
                raise SaekitError(f"a rule of grams has one of {len(gram)} tokens, not 2 to {LONGEST}; {FIX}")
            _check_ids("grams", gram)
        return cls(tuple(map(tuple, grams)), texts, _chances("grams", p))

    def words(self) -> str:
        """What it fires on."""
        return "the end of " + _list(quoted(text) for text in self.texts)


@dataclass(frozen=True)
class Word:
    """Fires with chance ``p`` on ``all``, the ``first`` or the ``last`` token of words of a spelling."""

    pattern: Pattern
    reader: Reader
    p: float
    on: str = "all"

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Strength:
        """Chance that the feature fires on each token, 0 to 1."""
        fits, begins, ends = self.reader.read(tokens)
        if self.on != "all":
            fits = fits & (begins if self.on == "first" else ends)
        return np.where(fits, self.p, 0.0)

    def to_json(self) -> dict[str, Any]:
        """What :func:`rule_of` reads."""
        own = {**self.pattern.to_json(), "on": self.on, "p": self.p}
        return {"kind": "word", **own, "reader": self.reader.to_json()}

    @classmethod
    def of_json(cls, data: Mapping[str, Any], depth: int) -> "Word":
        """The rule of such JSON."""
        shape = {"how": str, "any": [[str]], "runs": bool, "by": str, "on": str, "p": float, "reader": dict}
        records.check(data, shape, "a rule of words", FIX)
        for name, known in (("how", HOWS), ("by", BYS), ("on", ONS)):
            if data[name] not in known:
                raise SaekitError(
                    f"a rule of words has {name} = {data[name]!r}, none of {', '.join(known)}; {FIX}"
                )
        _chances("words", [data["p"]])
        for items in data["any"]:
            if not items or not all(item in CLASSES or len(item) == 1 for item in items):
                raise SaekitError(
                    f"a rule of words has any = {json.dumps(items)[:60]}, not characters or {', '.join(CLASSES)}; {FIX}"
                )
        if not 1 <= len(data["any"]) <= MOST:
            raise SaekitError(
                f"a rule of words has {len(data['any'])} strings in any, not 1 to {MOST}; {FIX}"
            )
        pattern = Pattern(data["how"], tuple(map(tuple, data["any"])), data["by"], data["runs"])
        return cls(pattern, Reader.of_json(data["reader"]), float(data["p"]), data["on"])

    def words(self) -> str:
        """What it fires on."""
        part = "" if self.on == "all" or self.pattern.by == "tokens" else f"the {self.on} token of "
        return part + self.pattern.words()


@dataclass(frozen=True)
class Beside:
    """Fires with chance ``p`` where ``of`` does and, on the token before, ``other`` does (``after``) or doesn't (``not after``).

    ``except``: where ``of`` does and ``other`` doesn't, on the token itself.
    """

    kind: str
    of: "Kind"
    other: "Kind"
    p: float

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Strength:
        """Chance that the feature fires on each token, 0 to 1."""
        back = 0 if self.kind == "except" else 1
        there = _shifted(self.other.strength(tokens), back) > 0
        return np.where((self.of.strength(tokens) > 0) & (there == (self.kind == "after")), self.p, 0.0)

    def to_json(self) -> dict[str, Any]:
        """What :func:`rule_of` reads."""
        return {"kind": self.kind, "of": self.of.to_json(), "other": self.other.to_json(), "p": self.p}

    @classmethod
    def of_json(cls, data: Mapping[str, Any], depth: int) -> "Beside":
        """The rule of such JSON."""
        shape = {"kind": str, "of": dict, "other": dict, "p": float}
        records.check(data, shape, "a rule of two", FIX)
        _chances("two", [data["p"]])
        of, other = _rule_of(data["of"], depth + 1), _rule_of(data["other"], depth + 1)
        return cls(data["kind"], of, other, float(data["p"]))

    def words(self) -> str:
        """What it fires on."""
        joint = {"after": " right after ", "not after": ", but not right after ", "except": ", except "}
        return self.of.words() + joint[self.kind] + self.other.words()


@dataclass(frozen=True)
class Either:
    """Fires where any of several rules does, with the highest chance of them."""

    of: tuple["Kind", ...]

    def strength(self, tokens: Int64[ndarray, "window width"]) -> Strength:
        """Chance that the feature fires on each token, 0 to 1."""
        return np.maximum.reduce([rule.strength(tokens) for rule in self.of])

    def to_json(self) -> dict[str, Any]:
        """What :func:`rule_of` reads."""
        return {"kind": "either", "of": [rule.to_json() for rule in self.of]}

    @classmethod
    def of_json(cls, data: Mapping[str, Any], depth: int) -> "Either":
        """The rule of such JSON."""
        records.check(data, {"of": [dict]}, "a rule of several", FIX)
        if not 2 <= len(data["of"]) <= SHOWN:
            raise SaekitError(f"a rule of several has {len(data['of'])} rules, not 2 to {SHOWN}; {FIX}")
        return cls(tuple(_rule_of(one, depth + 1) for one in data["of"]))

    def words(self) -> str:
        """What it fires on."""
        return " or ".join(rule.words() for rule in self.of)


KINDS: dict[str, type[Kind]] = {
    "tokens": Tokens, "grams": Grams, "word": Word, "after": Beside, "not after": Beside, "except": Beside, "either": Either,
}  # fmt: skip


def rule_of(data: Any) -> Kind:
    """The rule that JSON holds; raises SaekitError in one sentence where it holds none."""
    return _rule_of(data, 0)


def _rule_of(data: Any, depth: int) -> Kind:
    if depth >= DEEPEST:
        raise SaekitError(f"a rule has more than {DEEPEST} rules inside each other; {FIX}")
    records.check(data, {"kind": str}, "a rule", FIX)
    if data["kind"] not in KINDS:
        raise SaekitError(f"a rule has kind = {data['kind']!r}, none of {', '.join(KINDS)}; {FIX}")
    return KINDS[data["kind"]].of_json(data, depth)


def _rows(rows: Sequence[Sequence[Any]], name: str, types: tuple[type, ...]) -> list[Sequence[Any]]:
    """Rows of JSON, each of these types."""
    if not 1 <= len(rows) <= MOST:
        raise SaekitError(f"a rule of {name} has {len(rows)} of them, not 1 to {MOST}; {FIX}")
    for row in rows:
        if len(row) != len(types) or not all(records.fits(v, t) for v, t in zip(row, types, strict=True)):
            expected = ", ".join(t.__name__ for t in types)
            raise SaekitError(f"a rule of {name} has {json.dumps(row)[:60]}, not [{expected}]; {FIX}")
    return list(rows)


def _check_ids(name: str, ids: Iterable[Any]) -> None:
    for one in ids:
        if not (records.fits(one, int) and 0 <= one < 2**31):
            raise SaekitError(f"a rule of {name} has {one!r}, which is no token; {FIX}")


def _chances(name: str, p: Iterable[float]) -> tuple[float, ...]:
    found = tuple(p)
    for one in found:
        if not 0 <= one <= 1:
            raise SaekitError(f"a rule of {name} has a chance of {one}, not 0 to 1; {FIX}")
    return tuple(float(one) for one in found)


def _looked_up(ids: ndarray, known: Sequence[int], values: Sequence[float], missing: float = 0.0) -> ndarray:
    """The value of each id, ``missing`` where it is none of the known ones."""
    order = np.argsort(known, kind="stable")
    rising, own = np.asarray(known)[order], np.asarray(values, float)[order]
    at = np.minimum(np.searchsorted(rising, ids), len(rising) - 1)
    return np.where(rising[at] == ids, own[at], missing)


def _numbered(own: ndarray, n: int, base: int) -> ndarray:
    """A number for each run of ``n`` tokens, at its last; -1 where one of them is none of the known."""
    width = own.shape[1] - n + 1
    parts = [own[:, i : i + width] for i in range(n)]
    number = sum(part * base ** (n - 1 - i) for i, part in enumerate(parts))
    return np.where(np.logical_and.reduce([part >= 0 for part in parts]), number, -1)


def _shifted(values: ndarray, back: int) -> ndarray:
    """Values ``back`` tokens before, 0 (or False) where the window doesn't reach."""
    return np.pad(values, ((0, 0), (back, 0)))[:, : values.shape[1]]


def _list(named: Iterable[str]) -> str:
    """``"a", "b" and 3 others``."""
    found = list(dict.fromkeys(named))
    if len(found) > SHOWN:
        return f"{', '.join(found[: SHOWN - 2])} and {len(found) - SHOWN + 2} others"
    return joined(found)
