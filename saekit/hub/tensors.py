"""Readers of ``.safetensors``, ``.npz`` and what ``torch.save`` wrote, for :class:`saekit.hub.files.Files`.

Each has ``heads(file)`` and ``tensors(file, unchecked)``. Headers are compared with the sizes on disk before anything
is allocated, so what is held is at most the file's own size (of an ``.npz`` :data:`TIMES` that), and once.
"""

import fnmatch
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from saekit.hub import pickles
from saekit.hub.pickles import Refused, Storage, View

LONGEST = 1 << 22  # bytes of a JSON text or a safetensors header that are read
TIMES = 8  # how far an .npz may be compressed: weights hardly are
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NUMPY = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "i4": torch.int32,
    "i2": torch.int16, "i1": torch.int8, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip
PICKLED = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Head:
    """What a file says of a tensor: its shape and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes its numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number in it")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is beyond all numbers")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return out


# JSON as it is specified: no NaN, nothing infinite, no key twice
DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_finite, object_pairs_hook=_once)


def _plain(names: Collection[str]) -> None:
    """Refuse names of tensors, or of an archive's entries, that are no plain ones."""
    for name in names:
        if (
            not name
            or not name.isprintable()
            or name.startswith(("/", "\\"))
            or ".." in name
            or len(name) > 1000
        ):
            raise Refused(f"holds something of the name {name[:60]!r}, which is no plain one")
    if len(set(names)) != len(names):
        raise Refused("holds two things of one name")


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def _fill(file: Any, dtype: torch.dtype, numel: int) -> Tensor:
    """The next ``numel`` numbers of a file, as [numel]; nothing is held twice."""
    out = torch.empty(numel, dtype=dtype)
    held: Any = out.view(torch.uint8).numpy() if numel else bytearray()
    view = memoryview(held)
    at = 0
    while at < len(view):
        got = file.readinto(view[at : at + (1 << 20)])
        if not got:
            raise Refused("ends too soon: it was cut short")
        at += got
    return out


def _check_numbers(name: str, tensor: Tensor, unchecked: Collection[str]) -> None:
    """Refuse NaN, Inf and bools that are neither 0 nor 1, looking at a few numbers [numel] at a time."""
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise Refused(f"holds bools in {name!r} that are neither 0 nor 1")
    if tensor.is_floating_point() and _checked(name, unchecked):
        for part in tensor.split(1 << 20):
            if not part.isfinite().all():
                raise Refused(f"holds NaN or Inf in {name!r}")


def _checked(name: str, unchecked: Collection[str]) -> bool:
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in unchecked)


def _shape(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and len(value) <= 16
    if not whole or not all(type(size) is int and 0 <= size < 1 << 48 for size in value):
        raise Refused(f"holds a tensor of shape {str(value)[:60]}, which is none")
    return tuple(value)


class Safetensors:
    """8 bytes for the header's length n, n bytes of JSON, then the tensors without gaps."""

    @staticmethod
    def header(file: BinaryIO) -> tuple[int, list[tuple[int, str, Head]]]:
        """Where data begins, and every tensor with its place in it, in the order of the places."""
        size = size_of(file)
        n = int.from_bytes(file.read(8), "little")
        if size < 8 or n > size - 8:
            raise Refused(f"is no intact safetensors file: {size} bytes, and its header alone would have {n}")
        if n > LONGEST:
            raise Refused(f"has a header of {n} bytes, and at most {LONGEST} are read")
        try:
            entries = DECODER.decode(file.read(n).decode())
        except (ValueError, RecursionError) as error:
            raise Refused(f"has a header that is not JSON ({' '.join(str(error).split())[:80]})") from None
        if not isinstance(entries, dict):
            raise Refused("has a header that is no JSON object")
        entries.pop("__metadata__", None)
        _plain(entries)
        # what is empty stands before what begins at the same place
        found = sorted(
            (Safetensors.entry(*item) for item in entries.items()), key=lambda f: (f[0], f[2].nbytes)
        )
        at = 0
        for start, name, head in found:
            if start != at:
                raise Refused(f"has {'a gap before' if start > at else 'other data inside'} {name!r}")
            at += head.nbytes
        if 8 + n + at != size:
            raise Refused(f"has {size} bytes, and its header says {8 + n + at}: it was cut short or changed")
        return 8 + n, found

    @staticmethod
    def entry(name: str, entry: Any) -> tuple[int, str, Head]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise Refused(f"has a header whose {name!r} lacks dtype, shape or data_offsets")
        dtype, places = entry["dtype"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise Refused(f"holds {name!r} of dtype {str(dtype)[:20]!r}; read are {', '.join(DTYPES)}")
        head = Head(_shape(entry["shape"]), DTYPES[dtype])
        whole = (
            isinstance(places, list) and len(places) == 2 and all(type(p) is int and p >= 0 for p in places)
        )
        if not whole or places[1] - places[0] != head.nbytes:
            raise Refused(
                f"holds {name!r} of shape {head.shape} in {str(places)[:40]}, and it takes {head.nbytes} bytes"
            )
        return places[0], name, head

    @staticmethod
    def heads(file: BinaryIO) -> dict[str, Head]:
        return {name: head for _, name, head in Safetensors.header(file)[1]}

    @staticmethod
    def tensors(file: BinaryIO, unchecked: Collection[str]) -> dict[str, Tensor]:
        start, found = Safetensors.header(file)
        file.seek(start)
        out = {}
        for _, name, head in found:
            numbers = _fill(file, head.dtype, math.prod(head.shape))
            _check_numbers(name, numbers, unchecked)
            out[name] = numbers.view(head.shape)
        return out


@contextmanager
def _archive(file: BinaryIO, times: int) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose entries are plain, apart, and unpacked at most so many times as large as the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_entries(archive, size_of(file), times)
            yield archive
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError) as error:
        said = " ".join(str(error).split())[:120] or "it ends too soon"
        raise Refused(f"is not an intact archive ({said})") from None


def _check_entries(archive: zipfile.ZipFile, size: int, times: int) -> None:
    entries = archive.infolist()
    _plain([entry.filename for entry in entries])
    for entry in entries:
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
        if not stored and (times == 1 or entry.compress_type != zipfile.ZIP_DEFLATED):
            raise Refused(f"holds {entry.filename!r} compressed in a way that is not read")
        if entry.flag_bits & 1:
            raise Refused(f"holds {entry.filename!r} under a password")
    if sum(entry.compress_size for entry in entries) > size:
        raise Refused("is a zip archive whose entries lie over each other")
    whole = sum(entry.file_size for entry in entries)
    if whole > times * size:
        raise Refused(f"has {size} bytes and would unpack to {whole}, more than {times} times as many")


class Npz:
    """A zip archive of .npy files."""

    @staticmethod
    def head(stream: Any, name: str, size: int) -> tuple[Head, bool, bool]:
        """Of an entry: shape and dtype, whether columns come first, and whether bytes are the other way round."""
        fmt = np.lib.format
        readers = {(1, 0): fmt.read_array_header_1_0, (2, 0): fmt.read_array_header_2_0}
        try:
            version = fmt.read_magic(stream)
            if version not in readers:
                raise ValueError(f"version {version}")
            shape, columns, dtype = readers[version](stream)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise Refused(f"holds {name!r}, which is no .npy ({' '.join(str(error).split())[:60]})") from None
        if dtype.hasobject or dtype.str[1:] not in NUMPY:
            raise Refused(f"holds {name!r} of dtype {str(dtype)[:40]!r}; read are {', '.join(NUMPY)}")
        head = Head(_shape(shape), NUMPY[dtype.str[1:]])
        if stream.tell() + head.nbytes != size:
            raise Refused(
                f"holds {name!r} of shape {head.shape} in {size} bytes, and its numbers take {head.nbytes}"
            )
        return head, columns, not dtype.isnative

    @staticmethod
    def each(archive: zipfile.ZipFile) -> Iterator[tuple[str, Any, Head, bool, bool]]:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name == entry.filename:
                raise Refused(f"holds {name!r}, which is no .npy")
            with archive.open(entry) as stream:
                yield name, stream, *Npz.head(stream, name, entry.file_size)

    @staticmethod
    def heads(file: BinaryIO) -> dict[str, Head]:
        with _archive(file, TIMES) as archive:
            return {name: head for name, _, head, _, _ in Npz.each(archive)}

    @staticmethod
    def tensors(file: BinaryIO, unchecked: Collection[str]) -> dict[str, Tensor]:
        out = {}
        with _archive(file, TIMES) as archive:
            for name, stream, head, columns, swapped in Npz.each(archive):
                tensor = _fill(stream, head.dtype, math.prod(head.shape))
                if stream.read(1):  # at its end an entry's checksum is compared
                    raise Refused(f"holds more in {name!r} than it says")
                if swapped:
                    tensor.numpy().byteswap(inplace=True)
                _check_numbers(name, tensor, unchecked)
                turned = tuple(reversed(range(len(head.shape))))
                flipped = tensor.view(head.shape[::-1]).permute(turned)
                out[name] = flipped if columns else tensor.view(head.shape)
        return out


class Pickled:
    """What ``torch.save`` wrote, see :mod:`saekit.hub.pickles`; tensors that share numbers go on sharing them."""

    @staticmethod
    @contextmanager
    def opened(file: BinaryIO) -> "Iterator[tuple[zipfile.ZipFile, str, dict[str, Any]]]":
        """The archive, the name in front of its entries, and all leaves of its pickle by flattened names."""
        if file.read(4) != b"PK\x03\x04":
            raise Refused("is not what torch.save has written since 1.6 (a zip archive)")
        with _archive(file, 1) as archive:
            start = pickles.root(archive)
            size = archive.getinfo(f"{start}data.pkl").file_size
            if size > pickles.LONGEST:
                raise Refused(f"has a pickle of {size} bytes, and at most {pickles.LONGEST} are read")
            held = pickles.walk(archive.read(f"{start}data.pkl"))
            if not isinstance(held, dict):
                raise Refused("holds no mapping of names to tensors")
            found = list(pickles.leaves(held))
            _plain([name for name, _ in found])
            yield archive, start, dict(found)

    @staticmethod
    def heads(file: BinaryIO) -> dict[str, Head]:
        with Pickled.opened(file) as (_, _, leaves):
            views = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, View)}
        return {name: Head(view.shape, view.storage.dtype) for name, view in views.items()}

    @staticmethod
    def storage(archive: zipfile.ZipFile, start: str, storage: Storage) -> Tensor:
        """The numbers of a storage, [numel]."""
        name = f"{start}data/{storage.key}"
        if name not in archive.NameToInfo:
            raise Refused(f"lacks the numbers of a tensor, {name!r}")
        have, wanted = archive.getinfo(name).file_size, storage.numel * storage.dtype.itemsize
        if have != wanted:
            raise Refused(f"has {have} bytes in {name!r}, and its pickle says {wanted}")
        with archive.open(name) as stream:
            out = _fill(stream, storage.dtype, storage.numel)
            stream.read(1)  # at its end an entry's checksum is compared
        return out

    @staticmethod
    def state(file: BinaryIO, unchecked: Collection[str]) -> dict[str, Any]:
        """All leaves: tensors, numbers, texts, bools and None."""
        held: dict[str, tuple[Storage, Tensor]] = {}
        out, fine = {}, set()
        with Pickled.opened(file) as (archive, start, leaves):
            for name, leaf in leaves.items():
                if isinstance(leaf, (Storage, pickles.Name)):
                    raise Refused(f"holds in {name!r} what is no tensor")
                out[name] = leaf
                if not isinstance(leaf, View):
                    continue
                key = leaf.storage.key
                if key not in held:
                    held[key] = leaf.storage, Pickled.storage(archive, start, leaf.storage)
                if held[key][0] != leaf.storage:
                    raise Refused(f"gives the numbers of {name!r} two dtypes or sizes")
                # once for each storage, however many tensors look at it
                if key not in fine and _checked(name, unchecked):
                    _check_numbers(name, held[key][1], unchecked)
                    fine.add(key)
                out[name] = torch.as_strided(held[key][1], leaf.shape, leaf.stride, leaf.offset)
        return out

    @staticmethod
    def tensors(file: BinaryIO, unchecked: Collection[str]) -> dict[str, Tensor]:
        return {k: v for k, v in Pickled.state(file, unchecked).items() if isinstance(v, Tensor)}


def reader(name: str) -> Any:
    """What reads a file, by the end of its name."""
    for ends, found in (((".safetensors",), Safetensors), ((".npz",), Npz), (PICKLED, Pickled)):
        if name.endswith(ends):
            return found
    raise Refused("is no file of tensors (.safetensors, .npz, .pt)")
