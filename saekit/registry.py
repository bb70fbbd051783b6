"""Tables that map a name to the place where the thing is defined, loaded on first use."""

import difflib
import importlib
from collections.abc import Iterator
from typing import Any


def nearest(name: str, known: "list[str] | dict[str, Any]", n: int = 3) -> str:
    """``; did you mean 'a' or 'b'?`` for the closest known names, or the whole list when it is short."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = sorted(known)[:12]
    return "; known: " + ", ".join(shown) + (", ..." if len(known) > len(shown) else "")


def load(place: str) -> Any:
    """What ``"module:attr"`` names."""
    module, attr = place.split(":")
    return getattr(importlib.import_module(module), attr)


class Registry:
    """One table: ``name -> "module:attr"``. Adding a row is adding a line to the dict."""

    def __init__(self, kind: str, table: dict[str, str]):
        self.kind, self.table = kind, dict(table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def add(self, name: str, place: str) -> None:
        """Add a row at run time (a plug-in); a name that exists is never overwritten."""
        if name in self.table:
            raise ValueError(f"{self.kind} {name!r} exists already ({self.table[name]}); choose another name")
        self.table[name] = place

    def __getitem__(self, name: str) -> Any:
        if name not in self.table:
            raise ValueError(f"{self.kind} {name!r} is unknown{nearest(name, self.table)}")
        return load(self.table[name])
