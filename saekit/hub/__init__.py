"""Dictionaries on disk: saekit's own format and those of others, one file per format, in the table of ``formats.py``."""

import os
from pathlib import Path
from typing import Any

import torch

from saekit.dictionaries import Dictionary
from saekit.hub import native, remote
from saekit.hub.files import Files
from saekit.hub.formats import checked, detected, named
from saekit.types import SaekitError, check_device


def load(
    path: "str | Path",
    format: str | None = None,
    *,
    device: "str | torch.device | None" = None,
    **options: Any,
) -> Dictionary:
    """The dictionary of a folder or file, of saekit's format or another tool's, which is known by what is in it.

    ``hf://owner/repo/name@revision`` is one on the Hub, of which only its files are fetched.

    ``format`` names one of the table ("saelens"; "native" is saekit's own) where the content leaves it open.
    ``options`` are what some formats' files don't say, such as ``hook_point``. A dictionary of another tool computes what
    it computes there: codes and outputs agree to 1e-5 in fp32; what was folded, and what the files don't say, is in
    ``dictionary.card["imported"]``. Raises SaekitError with what is there, and with the formats that there are.
    """
    if not isinstance(path, str | Path):
        raise SaekitError(
            f"path is of type {type(path).__name__}; give that of a folder or file, or an hf:// address"
        )
    if device is not None:
        check_device(device)
    address = str(path)
    path = remote.fetch(address, format) if address.startswith(remote.SCHEME) else Path(path)
    if format == "native" or (format is None and _own(path)):
        checked("native", native.load, options)
        return native.load(path, device=device)
    if format is not None:
        named(format)
    files = Files(path)
    name = format or detected(files)
    row = named(name)
    dictionary = row.load(files, **checked(name, row.load, options))
    return dictionary.to(device) if device else dictionary


def dictionary_of(given: Any, device: "str | torch.device | None" = None) -> Dictionary:
    """A dictionary, or the one that a folder, a file or an address holds."""
    if isinstance(given, str | os.PathLike):
        return load(os.fspath(given), device=device)
    if not isinstance(given, Dictionary):
        raise SaekitError(
            f"dictionary is of type {type(given).__name__}; give a dictionary, or the folder or address of one"
        )
    return given if device is None else given.to(device)


def _own(path: Path) -> bool:
    """Whether it is saekit's own, whole or damaged, a folder of them, or nothing at all."""
    names = (native.CARD, native.WEIGHTS)
    here = any((path / name).is_file() for name in names) or any(path.glob(f"*/{native.CARD}"))
    return here or not path.exists()


def save(dictionary: Dictionary, path: "str | Path", format: str = "native", **options: Any) -> Path:
    """Write a dictionary to a folder, in saekit's format or another tool's (``format="saelens"``); returns the folder.

    What the other format can't say is refused with the reason, before anything is written. A folder of another tool's is
    a new one, or empty. ``options`` are the format's, such as ``dtype`` of its weights.
    """
    if not isinstance(dictionary, Dictionary):
        raise SaekitError(f"dictionary is of type {type(dictionary).__name__}; give one dictionary")
    if format == "native":
        checked("native", native.save, options)
        return native.save(dictionary, path)
    row = named(format)
    if row.save is None:
        raise SaekitError(f"format {format!r} is read and never written; choose 'native' or another format")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SaekitError(f"out {str(path)!r} is there already; choose a new folder, or remove it")
    return row.save(dictionary, path, **checked(format, row.save, options))
