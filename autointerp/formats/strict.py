"""What all formats need of files that others wrote: names that stay inside a folder, JSON that is JSON, whole folders."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saekit.hub.tensors import DECODER
from saekit.types import SaekitError

LONGEST = 1 << 28  # bytes of one JSON text; what is longer is not read


def inside(name: str, what: str) -> str:
    """The name, if joined to a folder it lies inside of it: plain parts with ``/`` between them."""
    parts = name.split("/")
    odd = [part for part in parts if part in ("", ".", "..") or len(part) > 200]
    if odd or "\\" in name or not name.isprintable():
        raise SaekitError(
            f"{what} {name[:80]!r} is no plain name; give one of parts with '/' between them, without '..'"
        )
    return name


def parse(text: bytes, where: str, fix: str) -> Any:
    """What a JSON text says. NaN, infinite numbers, keys that stand twice, and nesting or digits beyond measure are refused."""
    try:
        return DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise SaekitError(f"{where} is not JSON ({' '.join(str(error).split())[:80]}); {fix}") from None


def read_json(file: Path, fix: str) -> Any:
    """The JSON of a file; one that is missing, too long or no JSON raises in one sentence."""
    where = f"file {str(file)!r}"
    try:
        if file.stat().st_size > LONGEST:
            raise SaekitError(f"{where} is longer than {LONGEST} bytes; {fix}")
        return parse(file.read_bytes(), where, fix)
    except OSError as error:
        raise SaekitError(f"{where} can't be read: {error.strerror}; {fix}") from None


def numbered(folder: Path, before: str, after: str) -> dict[int, Path]:
    """Files of a folder that are called ``before``, a number and ``after``, by number, rising."""
    if not folder.is_dir():
        return {}
    form = re.compile(re.escape(before) + r"(0|[1-9]\d{0,8})" + re.escape(after))
    found = ((form.fullmatch(file.name), file) for file in folder.iterdir())
    return dict(sorted((int(match[1]), file) for match, file in found if match))


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which gets its name when all is written, and is removed after an error."""
    if folder.exists():
        raise SaekitError(f"out {str(folder)!r} exists already; name another folder, or remove it first")
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        made.mkdir(parents=True)
        yield made
        made.replace(folder)
    except OSError as error:
        raise SaekitError(
            f"out {str(folder)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
