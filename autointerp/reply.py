"""From a reply's text to a value, without guessing.

A reply is taken as it stands if it is JSON of the schema in pydantic's strict mode: no number for a truth, no text for a
number, no NaN, no key twice. Otherwise one repair is tried, and flagged: the JSON is cut out of the prose and fences
around it, and its commas, quotes and Python's True, False and None are put right by json-repair, where that is
installed. A repair may change no word, number, bracket or colon: it can't close what was cut off, pad, drop or round.
Where the prose holds two answers that differ, neither is taken.

Reasons are our own words, not pydantic's, whose wording changes with the version: they are quoted in the re-ask, and the
re-ask's key must not change.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from saekit.autointerp.requests import Completion, canonical

_SORRY = r"(?:(?:i'm|i am|we're|we are) (?:really |very |so |truly )?sorry|sorry|my apologies|apologies|i apologi[sz]e)"
_CANT = r"(?:(?:i|we) (?:can't|cannot|can not|won't|will not|couldn't|could not)|i(?:'m| am) (?:not able|unable|not allowed|not permitted) to)"
_HELP = r"(?:help|assist|comply|provide|answer|fulfil|continue|engage|do (?:that|this|so)|respond|participate|complete|discuss|support|judge|rate|label|analy[sz]e|process)"
_REFUSAL = re.compile(
    rf"(?:{_SORRY}\b[^.!?]{{0,60}}?[,.!]? ?(?:but |however,? )?)?(?:as an? (?:ai|artificial|(?:large )?language)\b[^.]{{0,60}}?,? )?{_CANT} {_HELP}\b"
    rf"|{_SORRY}[.!]?$|{_SORRY},? but (?:no|that|this) "
    r"|i (?:must |have to |will have to |respectfully )*decline\b|(?:this|that|the) request (?:violates|goes against)\b"
)
_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_WORDS = re.compile(r"[^\s\[\]{},:\"'“”‘’]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class Read:
    """A reply as it was understood: ``status`` is ok, invalid_reply or refused."""

    status: str
    value: Any
    repaired: bool
    reason: str


def read(reply: Completion, schema: type | None, check: Callable[[Any], str | None] | None = None) -> Read:
    """The value of a reply: of the schema, or its words where there is none; ``check`` as in ``Request``."""
    if reply.refusal or reply.finish == "content_filter":
        return Read("refused", None, False, "it is a refusal")
    text = _THOUGHTS.sub("", reply.text, count=1) if reply.text.lstrip().startswith("<think>") else reply.text
    thoughtful, text = text != reply.text, text.strip()
    cut = reply.finish == "length"
    if not text:
        return _invalid("it was cut off by the limit of tokens" if cut else "it is empty")
    if schema is None:
        return _words(text, cut, thoughtful, check)
    data, reason = _strict(text)
    if data is not None:
        value, reason = _fitted(text, schema)
        reason = reason or (check(value) if check else "") or ""
        return _invalid(reason) if reason else Read("ok", value, thoughtful, "")
    if text.startswith("<think>") or cut:
        return _invalid("it was cut off by the limit of tokens" if cut else "its thoughts don't end")
    return _repaired(text, schema, check, reason)


def _invalid(reason: str) -> Read:
    return Read("invalid_reply", None, False, reason)


def _refuses(text: str) -> bool:
    return _REFUSAL.match(" ".join(text.replace("’", "'").lower().split())) is not None


def _words(text: str, cut: bool, thoughtful: bool, check: Callable[[Any], str | None] | None) -> Read:
    if _refuses(text):
        return Read("refused", None, False, "it is a refusal")
    if cut or text.startswith("<think>"):
        return _invalid("it was cut off by the limit of tokens")
    reason = check(text) if check else None
    return _invalid(reason) if reason else Read("ok", text, thoughtful, "")


def _repaired(text: str, schema: type, check: Callable[[Any], str | None] | None, reason: str) -> Read:
    good: dict[str, Any] = {}
    for part in _outermost(text):
        data, why = _strict(part)
        mended = part if data is not None else _mended(part)
        if mended is not None:
            value, wrong = _fitted(mended, schema)
            why = (
                wrong if data is not None else why
            )  # what json-repair made of it is not the model's business
            if value is not None and not (why := (check(value) or "") if check else ""):
                good[canonical(json.loads(mended))] = value
        reason = why or reason
    if len(good) > 1:
        return _invalid("it holds more than one answer, and they differ")
    if good:
        return Read("ok", next(iter(good.values())), True, "")
    if _refuses(text):
        return Read("refused", None, False, "it is a refusal")
    return _invalid(reason)


class _NotTaken(ValueError):
    """JSON as Python's parser takes it, and strict JSON doesn't."""


def _strict(text: str) -> tuple[Any, str]:
    """``(data,)`` of strict JSON and no reason, or None and why it isn't."""
    try:
        data = json.loads(
            text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_without_doubles
        )
    except _NotTaken as error:
        return None, str(error)
    except (ValueError, RecursionError):
        return None, "it is not JSON"
    return (data,), ""


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise _NotTaken("it holds a number that is not finite")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _NotTaken("it holds a field twice")
    return fields


def _outermost(text: str) -> Iterator[str]:
    """What stands in balanced brackets and in no others; nothing after a bracket that isn't closed as it should be."""
    open_: list[str] = []
    start, quoted, escaped = 0, False, False
    for i, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = bool(open_)
        elif char in "{[":
            start = start if open_ else i
            open_.append("}" if char == "{" else "]")
        elif char in "}]" and open_:
            if open_.pop() != char:
                return
            if not open_:
                yield text[start : i + 1]


def _mended(text: str) -> str | None:
    """The text as JSON by json-repair, if commas, quotes and Python's names are all that it changed."""
    try:
        from json_repair import loads
    except ImportError:
        return None
    try:
        mended = json.dumps(loads(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError, TypeError):
        return None
    return mended if _skeleton(text) == _skeleton(mended) else None


def _skeleton(text: str) -> tuple[list[str], list[Any]]:
    """Brackets and colons in their order, and words and numbers in theirs."""
    words = [_PYTHON.get(word, word) for word in _WORDS.findall(text)]
    return re.findall(r"[\[\]{}:]", text), [float(w) if _NUMBER.fullmatch(w) else w for w in words]


def _fitted(text: str, schema: type) -> tuple[Any, str]:
    """The value of strict JSON, or None and why it is not of the schema."""
    from pydantic import ValidationError

    model: Any = schema
    try:
        return model.model_validate_json(text, strict=True), ""
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return None, f"{where or 'it'} is wrong ({first['type'].replace('_', ' ')})"
