"""Types of what people write: fields of configs, and JSON files that a hand or a crash may have changed."""

import functools
import json
import operator
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError

Shape = Any  # a type, a union of types, [Shape] for a list, {"field": Shape, "optional?": Shape, "*": Shape}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: a plain one, a union, ``tuple[str, ...]``; other annotations take anything."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, kind) for kind in typing.get_args(hint))
    if hint is None or hint is types.NoneType:
        return value is None
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if not isinstance(hint, type):
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint) or (hint is float and isinstance(value, int))


def name_of(hint: Any) -> str:
    """A type as people write it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_origin(hint) else str(hint)


def check_types(config: Any) -> None:
    """Raise unless every field of a dataclass is of the type that it says."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not fits(value, field.type):
            raise SaekitError(f"{field.name} = {value!r} must be of type {name_of(field.type)}")


def shape_of(config: type) -> dict[str, Any]:
    """The shape of a dataclass as JSON holds it: every field may be left out, tuples are lists."""

    def plain(hint: Any) -> Any:
        if isinstance(hint, types.UnionType):
            kinds = [plain(kind) for kind in typing.get_args(hint)]
            return functools.reduce(operator.or_, kinds)
        return list if typing.get_origin(hint) is tuple else hint

    return {f"{f.name}?": plain(f.type) for f in fields(config)}


def check(data: Any, shape: Shape, what: str, fix: str, where: str = "") -> None:
    """Raise unless data has a shape; ``what`` names the file or object, ``fix`` says what to do."""
    if isinstance(shape, list):
        kind: Any = list
    else:
        kind = dict if isinstance(shape, dict) else shape
    if not fits(data, kind):
        named = f" {where} = {_short(data)}" if where else f" {_short(data)}"
        raise SaekitError(f"{what} has{named}; expected {name_of(kind)}, {fix}")
    if isinstance(shape, list):
        for i, item in enumerate(data):
            check(item, shape[0], what, fix, f"{where}[{i}]")
    if isinstance(shape, dict):
        for field, inner in shape.items():
            name = field.removesuffix("?")
            if field == "*":
                for key, item in data.items():
                    check(item, inner, what, fix, f"{where}.{key}".lstrip("."))
            elif name in data:
                check(data[name], inner, what, fix, f"{where}.{name}".lstrip("."))
            elif name == field:
                inside = f" in {where}" if where else ""
                raise SaekitError(f"{what} lacks the field {field!r}{inside}; {fix}")


def difference(field: str, theirs: Any, mine: Any) -> str:
    """The first field in which two records differ, with both values: ``settings.tokens (3000 there, 6000 here)``."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in (*theirs, *mine):
            if theirs.get(key) != mine.get(key):
                return difference(f"{field}.{key}", theirs.get(key), mine.get(key))
    return f"{field} ({_short(theirs)} there, {_short(mine)} here)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read(file: Path, what: str, shape: Shape, fix: str, schema: int | None = None) -> Any:
    """The JSON of a file, of the schema and shape that are asked for; raises in one sentence that names the field."""
    named = f"{what.rsplit(' ', 1)[-1]} {str(file)!r}"
    if not file.is_file():
        raise SaekitError(f"{named} is not there; name a file that exists")
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or (schema is not None and "schema" not in data):
        raise SaekitError(f"{named} is not {what}; {fix}")
    if schema is not None and data["schema"] != schema:
        raise SaekitError(
            f"{named} has schema {data['schema']!r} and this saekit reads {schema}; {fix}, or install another saekit"
        )
    check(data, shape, named, fix)
    return data
