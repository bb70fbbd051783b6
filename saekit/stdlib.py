"""The Python standard library as a text corpus, with one fixed train / held-out split.

Every Python installation carries this text, so it is the default corpus wherever saekit needs
one offline. The split is by module *family* (a module, its private twin and its tests stay
together), decided by a hash of the family's name: it is the same on every machine and every
Python version, and nobody chose its members.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 16  # one family in this many, by hash, is held out
NEVER = {"site-packages", "__pycache__", "lib-dynload"}
# machine-made tables: thousands of near-identical lines in files that differ by a few bytes, so
# a file of one family would leak into the other side of the split
GENERATED = ("encodings", "pydoc_data", "_sysconfigdata", "lib2to3/pgen2", "lib2to3/tests/data", "config-")
# families whose files are copies or continuations of another family's text
TWINS = {
    "pyio": "io", "pydecimal": "decimal", "datetimetester": "datetime", "strptime": "time",
    "collections": "collections", "userdict": "collections", "userlist": "collections",
    "userstring": "collections", "bz2": "compression", "lzma": "compression", "gzip": "compression",
    "zlib": "compression", "profile": "cprofile", "smtpd": "smtplib", "smtpnet": "smtplib",
    "asyncore": "asynchat", "ntpath": "posixpath", "genericpath": "posixpath", "sre": "re",
    "lib2to3": "tokenize", "token": "tokenize", "xmlrpc": "xml", "sax": "xml", "pulldom": "xml",
    "minidom": "xml", "imp": "importlib", "zipimport": "importlib", "httplib": "http",
    "httpservers": "http", "urllib2": "urllib", "urllibnet": "urllib", "urlparse": "urllib",
    "urllib2net": "urllib", "robotparser": "urllib", "poplib": "imaplib", "long": "int",
    "poll": "selectors", "epoll": "selectors", "select": "selectors", "kqueue": "selectors",
    "devpoll": "selectors", "tk": "tkinter", "ttk": "tkinter", "tix": "tkinter",
    "turtledemo": "turtle", "bootsubprocess": "subprocess",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text with a name that identifies it (a path relative to its source)."""

    name: str
    text: str


def root() -> Path:
    """Folder that holds the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def family(name: str) -> str:
    """Module family of a path relative to the library: ``test/test_json/test_dump.py`` -> ``json``."""
    parts = [part.removesuffix(".py") for part in name.split("/")]
    if parts[0] in ("test", "idlelib", "unittest", "tkinter") and len(parts) > 1:
        inner = next((p for p in parts[1:] if p.startswith(("test_", "_test_", "datetimetester"))), None)
        head = inner.lstrip("_").removeprefix("test_") if inner and parts[0] == "test" else parts[0]
    else:
        head = parts[0]
    head = head.strip("_").lower()
    for twin in (head, head.split("_")[0]):
        if twin in TWINS:
            return TWINS[twin].lower()
    return head.split("_")[0] or "init"


def is_held_out(name: str) -> bool:
    """Whether the file belongs to the held-out side, by SHA-256 of its family's name."""
    return hashlib.sha256(family(name).encode()).digest()[0] % HELD_OUT_SHARE == 0


def files(split: str = "train") -> list[str]:
    """Sorted relative paths of one side of the split: ``train``, ``held_out`` or ``all``."""
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split {split!r} is not one of 'train', 'held_out', 'all'")
    base = root()
    names = []
    for folder, inside, found in os.walk(base):
        inside[:] = [
            name for name in inside if name not in NEVER
        ]  # site-packages is far larger than the rest
        at = Path(folder).relative_to(base)
        names += [(at / name).as_posix() for name in found if name.endswith(".py")]
    names = [name for name in names if not name.startswith(GENERATED)]
    return sorted(n for n in names if split == "all" or is_held_out(n) == (split == "held_out"))


def documents(split: str = "train") -> Iterator[Document]:
    """The files of one side of the split, in a fixed pseudo-random order (by hash of the name)."""
    base = root()
    for name in sorted(files(split), key=lambda n: hashlib.sha256(n.encode()).digest()):
        text = (base / name).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(name, text)
