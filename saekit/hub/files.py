"""Files that others wrote, read so that nothing runs and memory is bounded by what lies on disk.

Tensors come out of ``.safetensors``, ``.npz`` and ``.pt`` (``.pth``, ``.bin``). Offsets that overlap or leave gaps,
promises beyond the file, dtypes that are none of numbers, objects, names that leave the folder, NaN and Inf are
refused. An ``.npz`` may be compressed up to 8 times. Every refusal is a SaekitError of one sentence that names the file.
"""

import fnmatch
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from torch import Tensor

from saekit.hub.pickles import Refused
from saekit.hub.tensors import DECODER, LONGEST, PICKLED, Head, Pickled, reader, size_of
from saekit.types import SaekitError

LONGEST_YAML = 1 << 16  # bytes: it is parsed in Python, some 50 kB a second
MOST = 100_000  # files of a folder


class Files:
    """The files of a folder, or one file, by names relative to ``root``."""

    def __init__(self, path: "str | Path"):
        path = Path(path)
        if not path.exists():
            raise SaekitError(f"path {str(path)!r} is not there; give a folder or a file")
        self._single = path.name if path.is_file() else None
        if self._single is None and not path.is_dir():
            raise SaekitError(f"path {str(path)!r} is neither a folder nor a regular file; give one of them")
        self.root = path.parent if self._single else path

    def __str__(self) -> str:
        return str(self.root / self._single if self._single else self.root)

    def names(self) -> list[str]:
        """Names of all regular files, with ``/`` between their parts, sorted."""
        if self._single:
            return [self._single]
        out = []
        for folder, inside, files in os.walk(self.root):
            inside.sort()
            at = Path(folder)
            out += [(at / name).relative_to(self.root).as_posix() for name in files if (at / name).is_file()]
            if len(out) > MOST:
                raise SaekitError(
                    f"folder {str(self.root)!r} has more than {MOST} files; give the one of the dictionary"
                )
        return sorted(out)

    def has(self, name: str) -> bool:
        """Whether there is such a regular file; a name that leaves the folder raises."""
        file = self.root / inside(name)
        return file.is_file() and self._single in (None, name)

    def glob(self, pattern: str) -> list[str]:
        """Names that match a pattern (``*`` also matches ``/``), sorted."""
        return [name for name in self.names() if fnmatch.fnmatchcase(name, pattern)]

    def at(self, folder: str) -> "Files":
        """The files of a folder inside; ``""`` is this one."""
        return Files(self.root / inside(folder)) if folder else self

    def json(self, name: str) -> Any:
        """What a JSON file says. NaN, infinite numbers and nesting beyond measure are refused."""
        return _parse(self._text(name, LONGEST), f"file {str(self.root / name)!r}")

    def yaml(self, name: str) -> Any:
        """What a YAML file says: plain values only; tags, anchors and aliases are refused."""
        return _parse_yaml(self._text(name, LONGEST_YAML), f"file {str(self.root / name)!r}")

    def heads(self, name: str) -> dict[str, Head]:
        """Shape and dtype of every tensor of a file, whose data is not read."""
        with self._reading(name) as file:
            return reader(name).heads(file)

    def tensors(self, name: str, unchecked: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of a file, as they are stored; nested mappings are flattened: ``{"sae": {"W": t}}`` gives ``sae.W``.

        NaN and Inf are refused, but in tensors whose names match one of the patterns ``unchecked``.
        """
        with self._reading(name) as file:
            return reader(name).tensors(file, unchecked)

    def state(self, name: str) -> dict[str, Any]:
        """All leaves of a file of ``torch.save`` by flattened names: tensors, numbers, texts, bools and None."""
        with self._reading(name) as file:
            if not name.endswith(PICKLED):
                raise Refused(f"is no file of torch.save ({', '.join(PICKLED)})")
            return Pickled.state(file, ())

    def _text(self, name: str, longest: int) -> bytes:
        with self._reading(name) as file:
            size = size_of(file)
            if size > longest:
                raise Refused(f"has {size} bytes, and at most {longest} are read of such a file")
            return file.read(longest)

    @contextmanager
    def _reading(self, name: str) -> Iterator[BinaryIO]:
        """An open file; what goes wrong with it is told in one sentence."""
        where = f"file {str(self.root / inside(name))!r}"
        if not self.has(name):
            there = self.names()
            listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
            raise SaekitError(f"{where} is not there; the folder holds {listed or 'nothing'}")
        try:
            with (self.root / name).open("rb") as file:
                yield file
        except Refused as why:
            raise SaekitError(f"{where} {why}; get the file again, or from someone you trust") from None
        except OSError as error:
            raise SaekitError(
                f"{where} can't be read: {error.strerror or error}; check its permissions"
            ) from None


def inside(name: str) -> str:
    """The name, if it names something inside of a folder: plain parts with ``/`` between them."""
    parts = PurePosixPath(name).parts
    plain = (
        name
        and name == "/".join(parts)
        and ".." not in parts
        and "\\" not in name
        and ":" not in parts[0][:2]
    )
    if not plain or not name.isprintable() or len(name) > 1000:
        raise SaekitError(
            f"name {name[:80]!r} leaves the folder or is none; give one of parts with '/' between them, without '..'"
        )
    return name


def _parse(text: bytes, where: str) -> Any:
    try:
        return DECODER.decode(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:80]
        raise SaekitError(f"{where} is not JSON ({said}); get the file again") from None


def _parse_yaml(text: bytes, where: str) -> Any:
    import yaml  # what huggingface_hub and transformers read configs with

    class Plain(yaml.SafeLoader):
        """Without aliases, by which a few lines may stand for any number of values."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it uses an alias")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text.decode("utf-8-sig"), Plain)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())[:120]
        raise SaekitError(f"{where} is not plain YAML ({said}); get the file again") from None
