"""Writing a store: batches go straight to their place in a shard's file, which a thread then seals."""

import json
import math
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations import DTYPES, file_sha256, write_atomic
from saekit.types import ActivationBatch, SaekitError

SHARD_BYTES = 32 << 20
_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32",
}  # fmt: skip
_ANY_ROWS = 10**12  # a row count with more digits than any real one: what a header may need


class _Column(NamedTuple):
    """A tensor of a shard but for how many rows it has."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class _Shard:
    """A safetensors file in the making, under a temporary name.

    Columns lie one after another with room for ``capacity`` rows each, wide types first so that
    all are aligned; ``seal`` closes the gaps that are left and gives the file its name.
    """

    def __init__(self, path: Path, columns: Mapping[str, _Column], capacity: int):
        self.path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.final = path
        order = sorted(columns, key=lambda name: (-columns[name].dtype.itemsize, name))
        self.columns = {name: columns[name] for name in order}
        self.start = 8 + len(self._header(dict.fromkeys(columns, _ANY_ROWS)))
        self.rows = dict.fromkeys(self.columns, capacity)
        self.file = self.path.open("w+b")

    def write(self, name: str, at: int, values: Tensor) -> None:
        """Rows ``at``, ``at + 1``, ... of a column."""
        if at + len(values) > self.rows[name]:
            self._move(dict.fromkeys(self.columns, 2 * (at + len(values))))
        if values.numel():
            self.file.seek(self._offsets(self.rows)[name] + at * self.columns[name].row_bytes)
            self.file.write(values.contiguous().view(torch.uint8).numpy().data)

    def seal(self, rows: Mapping[str, int]) -> tuple[int, str]:
        """Bring every column to its length, write the header, fsync and rename; returns size and SHA-256."""
        with self.file:
            self._move({name: rows[name] for name in self.columns})
            header = self._header(self.rows).ljust(self.start - 8)
            self.file.seek(0)
            self.file.write(len(header).to_bytes(8, "little") + header)
            self.file.flush()
            os.fsync(self.file.fileno())
        size, digest = self.path.stat().st_size, file_sha256(self.path)
        self.path.replace(self.final)
        return size, digest

    def discard(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self.path.unlink(missing_ok=True)

    def _offsets(self, rows: Mapping[str, int]) -> dict[str, int]:
        offsets, at = {}, self.start
        for name, column in self.columns.items():
            offsets[name], at = at, at + rows[name] * column.row_bytes
        return {**offsets, "": at}  # and where the file ends

    def _move(self, rows: dict[str, int]) -> None:
        """Give every column room for so many rows; what they hold moves along."""
        old, new = self._offsets(self.rows), self._offsets(rows)
        if old != new:
            self.file.flush()
            self.file.truncate(max(old[""], new[""]))
            grows = new[""] > old[""]
            with mmap.mmap(self.file.fileno(), 0) as data:
                for name in (
                    reversed(self.columns) if grows else self.columns
                ):  # never onto what has yet to move
                    n = min(rows[name], self.rows[name]) * self.columns[name].row_bytes
                    data.move(new[name], old[name], n)
            self.file.truncate(new[""])
            self.rows = rows

    def _header(self, rows: Mapping[str, int]) -> bytes:
        entries, start = {}, 0
        for name, column in self.columns.items():
            end = start + rows[name] * column.row_bytes
            entries[name] = {
                "dtype": _NAMES[column.dtype], "shape": [rows[name], *column.shape], "data_offsets": [start, end],
            }  # fmt: skip
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)


class ShardWriter:
    """Writes batches as one shard after another, each atomically.

    Nothing is held in memory: a batch is written to its place in the shard's file at once. With
    ``flush(wait=False)`` a thread seals and hashes the shard while the model fills the next.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        path.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._sealing: Future[None] | None = None
        self._shard: _Shard | None = None
        self._masks: list[Tensor] = []
        self._nonfinite: dict[str, int] = {}
        self._filled, self._n_shards = 0, len(manifest["shards"])
        self._ids: list[str] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._thread.shutdown()
        if self._shard is not None:
            self._shard.discard()

    def add(self, batch: ActivationBatch) -> None:
        """Take a batch of sequences; activations are converted to the store's dtype."""
        mask = batch.mask.reshape(-1).cpu()
        values = {"mask": mask.to(torch.uint8)}
        ids = {f: getattr(batch, f) for f in ("tokens", "documents") if getattr(batch, f) is not None}
        if self._ids not in (None, list(ids)):
            raise SaekitError(
                f"a batch identifies positions by {list(ids)} and those before it by {self._ids}; give inputs of one kind"
            )
        self._ids = list(ids)
        for field, column in ids.items():
            values[field] = column.reshape(-1).int().cpu()
        for name, activations in batch.activations.items():
            rows = activations.flatten(0, -2)
            if self.manifest["dtype"] == "int8":
                rows = rows.float()
                scale = rows.abs().amax(-1).clamp(min=1e-12) / 127
                values[f"{name}.scale"] = scale.cpu()
                values[name] = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).cpu()
            else:
                rows = rows.to(DTYPES[self.manifest["dtype"]])  # what only overflows there counts as well
                values[name] = rows.cpu()
            bad = ~torch.isfinite(rows.sum(-1, dtype=torch.float32)).cpu()
            self._nonfinite[name] = self._nonfinite.get(name, 0) + int((bad & mask).sum())
        if self._shard is None:
            columns = {name: _Column(v.dtype, tuple(v.shape[1:])) for name, v in values.items()}
            columns["kept"] = _Column(torch.int32, ())
            name = f"shard-{self._n_shards:05d}.safetensors"
            self._shard = _Shard(self.path / name, columns, len(mask) * self.manifest["batches_per_shard"])
        for name, v in values.items():
            self._shard.write(name, self._filled, v)
        self._masks.append(mask)
        self._filled += len(mask)

    def flush(self, wait: bool = True) -> None:
        """End the shard that the batches went to, and enter it into the manifest."""
        self._settle()
        if self._shard is not None:
            kept = torch.cat(self._masks).nonzero()[:, 0].int()
            entry = {"tokens": self._filled, "kept": len(kept), "nonfinite": self._nonfinite}
            self._sealing = self._thread.submit(self._seal, self._shard, kept, entry)
            self._shard, self._masks, self._nonfinite = None, [], {}
            self._filled, self._n_shards = 0, self._n_shards + 1
        if wait:
            self._settle()

    def _settle(self) -> None:
        """Wait for the shard being sealed; what went wrong there is raised here."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def _seal(self, shard: _Shard, kept: Tensor, entry: dict[str, Any]) -> None:
        try:
            shard.write("kept", 0, kept)
            size, digest = shard.seal({**dict.fromkeys(shard.columns, entry["tokens"]), "kept": len(kept)})
        except OSError:
            shard.discard()
            raise
        self.manifest["shards"].append({"file": shard.final.name, "bytes": size, "sha256": digest, **entry})
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest as it stands."""
        write_atomic(self.path / "manifest.json", json.dumps(self.manifest, indent=1).encode())
