"""Activations as a source of training rows: shards on disk, a tensor in memory, or a live stream.

A store is a folder: ``manifest.json`` and ``shard-00000.safetensors``, ... Each shard holds whole
sequences, flattened to tokens: one tensor ``[tokens, width]`` per hook point (with
``NAME.scale [tokens]`` where it is int8), ``tokens``, ``documents``, ``mask`` (uint8) and ``kept``
(the positions where the mask is 1). The manifest is written after each shard, so a store that
was cut short is a store of fewer shards. Schema version 1.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit import records
from saekit.registry import nearest
from saekit.types import ActivationBatch, SaekitError

Int64 = np.ndarray[Any, np.dtype[np.int64]]
SCHEMA = 1
ABOUT = {  # a source of rows
    "kind?": str, "rows?": int, "context?": int, "norm_limits?": {"*": float},
    "model?": {"name?": str}, "text?": {"name?": str, "split?": str},
}  # fmt: skip
MANIFEST = {
    "complete": bool, "dtype": str, "seq": int, "batches_per_shard": int, "settings": dict, "norm_limits": {"*": float},
    "model": ABOUT["model?"], "text": ABOUT["text?"],
    "hook_points": {"*": {"width": int, "module?": str, "side?": str}},
    "shards": [{"file": str, "bytes": int, "sha256": str, "tokens": int, "kept": int, "nonfinite": {"*": int}}],
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}  # fmt: skip


@runtime_checkable
class Source(Protocol):
    """Rows to train on, in an order that a seed fixes; ``batches`` can start at any step."""

    @property
    def n_rows(self) -> int | None:
        """How many rows there are; None for a stream."""
        ...

    def width(self, hook_point: str | None) -> int:
        """Width of the rows."""
        ...

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Tensor | ActivationBatch]:
        """Endless batches [batch_size, width], or of so many whole sequences, from step ``start`` on."""
        ...

    def identity(self) -> dict[str, Any]:
        """What identifies the data in checkpoints and cards."""
        ...


def write_atomic(path: Path, *chunks: "bytes | memoryview") -> None:
    """Write a file so that after a crash it is either the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def shuffled(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A seeded permutation of ``0..n-1`` evaluated at some positions, without holding it.

    A four-round Feistel network over the next even power of two, walked along its cycles until it
    lands inside; memory does not grow with n, and any step of any epoch can be addressed.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(seed).generate_state(4, dtype=np.uint64)
    out = positions.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        value = out[todo]
        left, right = value >> half, value & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[todo] = (left << half) | right
        todo[todo] = out[todo] >= n
    return out.astype(np.int64)


def shuffled_rows(n: int, batch_size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Row numbers of batch ``start``, ``start + 1``, ...: every epoch a new permutation, no row skipped."""
    step = start
    while True:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epoch = positions // n
        out = np.empty(batch_size, dtype=np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            out[here] = shuffled(positions[here] - e * n, n, seed * 1_000_003 + int(e))
        yield out
        step += 1


class TensorSource:
    """Rows of a tensor in memory, or whole sequences of one, which then are what ``batch_size`` counts."""

    def __init__(self, rows: Float[Tensor, "rows *seq d_in"], widths: tuple[int, ...] = ()):
        if rows.ndim not in (2, 3) or rows.numel() == 0:
            raise SaekitError(
                f"source has shape {tuple(rows.shape)}; give activations as [rows, d_in], or [sequences, seq, d_in], with at least one row"
            )
        if not torch.isfinite(rows).all():
            bad = (~torch.isfinite(rows)).any(-1).flatten().nonzero()[0].item()
            raise SaekitError(f"source holds NaN or Inf, first in row {bad}; remove those rows")
        self.rows, self.n_rows = rows, len(rows)
        self.widths = widths or (rows.shape[-1],)  # of the parts that stand side by side
        if rows.ndim == 3:
            self.rows_per_item = rows.shape[1]

    def width(self, hook_point: str | None) -> int:
        """Width of the rows."""
        return self.rows.shape[-1]

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Endless batches in a seeded order."""
        for rows in shuffled_rows(self.n_rows, batch_size, seed, start):
            yield self.rows[torch.from_numpy(rows)]

    def identity(self) -> dict[str, Any]:
        """Shape and digest."""
        data = self.rows.detach().cpu().contiguous().view(torch.uint8).numpy()
        return {"kind": "tensor", "rows": self.n_rows, "sha256": hashlib.sha256(data.tobytes()).hexdigest()}


class DrawnSource:
    """Rows drawn anew for each batch: ``draw(batch_size, step, seed)`` gives ``[batch_size, width]``."""

    def __init__(self, draw: Callable[[int, int, int], Tensor], width: int, name: str):
        self.draw, self._width, self.name, self.n_rows = draw, width, name, None

    def width(self, hook_point: str | None) -> int:
        """Width of the rows."""
        return self._width

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Endless batches, each a function of seed and step."""
        step = start
        while True:
            yield self.draw(batch_size, step, seed)
            step += 1

    def identity(self) -> dict[str, Any]:
        """The name that the drawer was given."""
        return {"kind": "drawn", "name": self.name}


def _end(entry: Mapping[str, Any]) -> int:
    """Where a tensor ends, by a safetensors header's entry; raises when the entry can't be true."""
    start, end = entry["data_offsets"]
    size = math.prod(entry["shape"]) * np.dtype(_NUMPY[entry["dtype"]]).itemsize
    if start < 0 or min(entry["shape"], default=0) < 0 or end - start != size:
        raise ValueError("offsets, shape and dtype disagree")
    return end


class Shard:
    """One memory-mapped shard."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            try:
                self.header = json.loads(file.read(length)) if length <= 100 << 20 else {}
                self.header.pop("__metadata__", None)
                end = max(_end(entry) for entry in self.header.values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SaekitError(
                    f"shard {path.name} of {path.parent} is not a safetensors file; harvest again to replace it"
                ) from None
        if path.stat().st_size != 8 + length + end:
            raise SaekitError(f"shard {path.name} of {path.parent} is truncated; harvest again to replace it")
        self._start = 8 + length
        self._maps: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        """A tensor of the shard as a memory map; bf16 comes as uint16."""
        if name not in self._maps:
            entry = self.header[name]
            self._maps[name] = np.memmap(
                self.path,
                _NUMPY[entry["dtype"]],
                "r",
                self._start + entry["data_offsets"][0],
                tuple(entry["shape"]),
            )
        return self._maps[name]

    def rows(self, name: str, at: "np.ndarray | slice") -> Float[Tensor, "rows width"]:
        """Rows of a hook point as fp32 (or the stored dtype, for bf16 and fp16, widened to fp32)."""
        data = torch.from_numpy(np.array(self.array(name)[at]))  # a copy: the map stays read-only
        if self.header[name]["dtype"] == "BF16":
            data = data.view(torch.int16).view(torch.bfloat16)
        if self.header[name]["dtype"] == "I8":
            return data.float() * torch.from_numpy(np.array(self.array(f"{name}.scale")[at]))[:, None]
        return data.float()


class Store:
    """A folder of shards, read through memory maps and shuffled globally with a seed."""

    def __init__(self, path: "str | os.PathLike", verify_seconds: float = 2.0):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.shards = [self._open(entry) for entry in self.manifest["shards"]]
        if not self.shards:
            raise SaekitError(f"store {str(self.path)!r} holds no finished shard; harvest it again")
        self._ends = np.cumsum([entry["kept"] for entry in self.manifest["shards"]])
        self.n_rows: int = int(self._ends[-1])
        if self.n_rows == 0:
            raise SaekitError(f"store {str(self.path)!r} holds no unmasked token; harvest more text")
        self.unverified = self.verify(verify_seconds)

    def _open(self, entry: Mapping[str, Any]) -> Shard:
        path = self.path / entry["file"]
        if not path.is_file():
            raise SaekitError(
                f"shard {entry['file']} of {self.path} is in the manifest and not on disk; harvest again to replace it"
            )
        if path.stat().st_size != entry["bytes"]:
            raise SaekitError(
                f"shard {entry['file']} of {self.path} has {path.stat().st_size} bytes and the manifest says {entry['bytes']}: "
                "it is truncated or replaced; harvest again to replace it"
            )
        shard = Shard(path)
        shapes = {
            name: [entry["tokens"], site["width"]] for name, site in self.manifest["hook_points"].items()
        }
        for name, shape in {**shapes, "mask": [entry["tokens"]], "kept": [entry["kept"]]}.items():
            if name not in shard.header or shard.header[name]["shape"] != shape:
                raise SaekitError(
                    f"shard {entry['file']} of {self.path} doesn't hold {name!r} as the manifest says; harvest again"
                )
        return shard

    def verify(self, seconds: float = float("inf")) -> int:
        """Check shards against their hashes for about so long; returns how many were left unread."""
        start = time.monotonic()
        for i, entry in enumerate(self.manifest["shards"]):
            if time.monotonic() - start > seconds:
                return len(self.shards) - i
            if file_sha256(self.path / entry["file"]) != entry["sha256"]:
                raise SaekitError(
                    f"shard {entry['file']} of {self.path} doesn't match the hash in the manifest; harvest again to replace it"
                )
        return 0

    @property
    def hook_points(self) -> list[str]:
        """Names of the hook points it holds."""
        return list(self.manifest["hook_points"])

    def check(self, hook_point: str) -> None:
        """Raise unless the hook point is here and all its values are finite."""
        self.width(hook_point)
        for entry in self.manifest["shards"]:
            if entry["nonfinite"].get(hook_point, 0):
                raise SaekitError(
                    f"store {str(self.path)!r} holds NaN or Inf at {hook_point!r} ({entry['nonfinite'][hook_point]} rows of "
                    f"{entry['file']}); harvest again in fp32, or find what makes the model overflow"
                )

    def width(self, hook_point: str | None) -> int:
        """Width of a hook point (of the only one, when none is named)."""
        name = hook_point or self.hook_points[0]
        if name not in self.manifest["hook_points"]:
            raise SaekitError(
                f"hook point {name!r} is not in store {str(self.path)!r}{nearest(name, self.hook_points)}"
            )
        return self.manifest["hook_points"][name]["width"]

    def gather(self, hook_point: str, rows: "np.ndarray | Sequence[int]") -> Float[Tensor, "rows width"]:
        """Unmasked rows by number, in the order asked for, in fp32."""
        rows = np.asarray(rows)
        if len(rows) and rows.dtype.kind not in "iu":
            raise SaekitError(f"rows are {rows.dtype}; give the numbers of rows, as np.flatnonzero(mask)")
        rows = rows.astype(np.int64, copy=False)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_rows:
            raise SaekitError(
                f"row {rows.min()} or {rows.max()} is not in 0..{self.n_rows - 1}, the rows of this store"
            )
        out = torch.empty(len(rows), self.width(hook_point))
        shard_of = np.searchsorted(self._ends, rows, side="right")
        for s in np.unique(shard_of):
            here = np.flatnonzero(shard_of == s)
            local = rows[here] - (self._ends[s - 1] if s else 0)
            positions = self.shards[s].array("kept")[local]
            rising = np.argsort(positions)  # reads the file forwards
            out[torch.from_numpy(here[rising])] = self.shards[s].rows(hook_point, positions[rising])
        return out

    def positions(self) -> Iterator[Int64]:
        """Where each unmasked row's token stands among all tokens of the store, a shard at a time."""
        starts = np.cumsum([0, *(entry["tokens"] for entry in self.manifest["shards"])])
        for shard, start in zip(self.shards, starts, strict=False):
            yield shard.array("kept").astype(np.int64) + start

    def tokens(self, n: int) -> Iterator[Int64]:
        """The ids of all tokens, masked ones included, n at a time; none for a model of other inputs."""
        held = np.empty(0, np.int64)
        for shard in self.shards:
            own = shard.array("tokens") if "tokens" in shard.header else held[:0]
            for at in range(0, len(own), n):
                held = np.concatenate([held, own[at : at + n]])
                if len(held) >= n:
                    yield held[:n]
                    held = held[n:]
        yield held

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Endless batches of unmasked rows of one hook point, globally shuffled with the seed."""
        for rows in shuffled_rows(self.n_rows, batch_size, seed, start):
            yield (
                torch.cat([self.gather(h, rows) for h in hook_points], -1)
                if len(hook_points) > 1
                else self.gather(hook_points[0], rows)
            )

    def sequences(self, batch_rows: int = 8) -> Iterator[ActivationBatch]:
        """The stored sequences in order, as batches with tokens, documents and the mask."""
        seq = self.manifest["seq"]
        for entry, shard in zip(self.manifest["shards"], self.shards, strict=True):
            for start in range(0, entry["tokens"], batch_rows * seq):
                part = slice(start, min(start + batch_rows * seq, entry["tokens"]))

                def grid(name: str, part: slice = part, shard: Shard = shard) -> Tensor:
                    return torch.from_numpy(np.array(shard.array(name)[part])).view(-1, seq)

                yield ActivationBatch(
                    {h: shard.rows(h, part).view(-1, seq, self.width(h)) for h in self.hook_points},
                    mask=grid("mask").bool(),
                    tokens=grid("tokens").long() if "tokens" in shard.header else None,
                    documents=grid("documents").long() if "documents" in shard.header else None,
                )

    def identity(self) -> dict[str, Any]:
        """Model, text and a hash over the shards' hashes."""
        digest = hashlib.sha256("".join(e["sha256"] for e in self.manifest["shards"]).encode()).hexdigest()
        return {
            "kind": "store", "rows": self.n_rows, "sha256": digest,
            "model": self.manifest["model"], "text": self.manifest["text"],
            "norm_limits": self.manifest.get("norm_limits", {}),
        }  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, checked for schema and completeness of its fields."""
    file = path / "manifest.json"
    if not file.is_file():
        raise SaekitError(
            f"store {str(path)!r} has no manifest.json; give a folder that `saekit harvest` wrote"
        )
    manifest = records.read(file, "a store's manifest", MANIFEST, "harvest again", SCHEMA)
    points, dtype, seq = (manifest[key] for key in ("hook_points", "dtype", "seq"))
    if not points and manifest["shards"]:
        raise SaekitError(f"manifest {str(file)!r} names no hook points; harvest again")
    for name, site in points.items():
        if site["width"] < 1:
            raise SaekitError(f"manifest {str(file)!r} has no width for hook point {name!r}; harvest again")
    if dtype not in DTYPES or seq < bool(points):
        raise SaekitError(
            f"manifest {str(file)!r} has dtype {dtype!r} and seq {seq}; expected one of {', '.join(DTYPES)} and a row length, harvest again"
        )
    for i, entry in enumerate(manifest["shards"]):
        if Path(entry["file"]).name != entry["file"]:
            raise SaekitError(
                f"shard {i} in manifest {str(file)!r} lies outside the store ({entry['file']!r}); harvest again"
            )
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
