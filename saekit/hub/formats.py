"""Formats of dictionaries on disk, by name: one file and one line each.

A format's file ends in ``FORMAT = Format(...)``: ``detect(files)`` says by content, without reading weights where it can,
whether they are of it (no two formats may say so of the same files); ``load(files, **options)`` gives the dictionary,
with options (keyword-only, each with a default) only where files can't say what is needed, such as a hook point or k;
``save(dictionary, folder, **options)``, where the format can be written, refuses what it can't say before it writes
anything. ``stores`` names its files for messages.

Dictionaries that read one place and write one go through :class:`saekit.hub.record.Record`. A crosscoder, a
cross-layer transcoder, a Lorsa or a mixture of transforms has tensors of a shape of its own and hardly a trap in
common with others, so there a record would be a second config: their readers and writers build the dictionary
themselves (``build(Config(...))``), in the space of raw activations (``normalise="none"``).

saekit's own format is not in the table: it comes first, and is known by its card.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.registry import Registry, nearest
from saekit.types import SaekitError

LOOKED_AT, NAMED = 64, 8  # folders inside one that holds no dictionary itself, and how many of them are named


@dataclass(frozen=True)
class Format:
    """How a format is known, read and written; see the module's docstring."""

    stores: str
    detect: Callable[[Files], bool]
    load: Callable[..., Dictionary]
    save: Callable[..., Path] | None = None


FORMATS = Registry(
    "format",
    {
        "saelens": "saekit.hub.saelens:FORMAT",
        "dictionary_learning": "saekit.hub.dictionary_learning:FORMAT",
        "sparsify": "saekit.hub.sparsify:FORMAT",
        "gemma_scope": "saekit.hub.gemma_scope:FORMAT",
        "gemma_scope_2": "saekit.hub.gemma_scope:FORMAT_2",
        "llama_scope": "saekit.hub.llama_scope:FORMAT",
        "openai": "saekit.hub.openai:FORMAT",
        "overcomplete": "saekit.hub.overcomplete:FORMAT",
        "bare": "saekit.hub.bare:FORMAT",
        "openmoss": "saekit.hub.openmoss:FORMAT",
        "circuit_tracer": "saekit.hub.circuit_tracer:FORMAT",
    },
)


def named(name: str) -> Format:
    """The format of that name; raises with the nearest names."""
    if name not in FORMATS:
        raise SaekitError(f"format {name!r} is unknown{nearest(name, ['native', *FORMATS])}")
    return FORMATS[name]


def detected(files: Files) -> str:
    """The name of the format that files are of; raises with what is there, and the formats that there are."""
    found = [name for name in FORMATS if FORMATS[name].detect(files)]
    if len(found) == 1:
        return found[0]
    names = files.names()
    where = str(files.root / names[0] if files.root.is_dir() and len(names) == 1 else files.root)
    if found:
        raise SaekitError(
            f"{where!r} may be of the formats {' and '.join(found)}; say which, as in format={found[0]!r}"
        )
    inside = _dictionaries(files, names)
    if inside:
        raise SaekitError(f"{where!r} is a folder of dictionaries; give one of them: {', '.join(inside)}")
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    known = "; ".join(f"{name}: {FORMATS[name].stores}" for name in FORMATS)
    raise SaekitError(
        f"{where!r} is no dictionary of a known format: it has no card.json, as saekit's own do, and holds {listed or 'nothing'} (known are {known})"
    )


def _dictionaries(files: Files, names: list[str]) -> list[str]:
    """The first folders inside that are dictionaries of a known format."""
    folders = sorted({name.rpartition("/")[0] for name in names if "/" in name})[:LOOKED_AT]
    return [f for f in folders if any(FORMATS[name].detect(files.at(f)) for name in FORMATS)][:NAMED]


def checked(name: str, function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options, if a format's reader or writer has them all."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            there = nearest(option, known) if known else "; it has none"
            raise SaekitError(f"option {option!r} is not one of format {name!r}{there}")
    return options
