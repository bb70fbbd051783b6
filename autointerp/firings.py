"""Where every feature fires in a text: codes over a corpus, by feature, on disk. Schema version 1.

A folder holds raw little-endian arrays: ``tokens`` and ``documents`` int32 [row, seq], ``mask`` bool [row, seq],
``offsets`` int64 [n_features + 1], and ``places`` uint32 and ``values`` float32 [nnz], which list for each feature, by
rising place (row * seq + position), where it fires and how strongly. ``firings.json`` is written last and holds
shapes, sizes, hashes, and of which model, text and dictionary they are.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int32, UInt32
from numpy import ndarray
from torch import Tensor

from saekit import records
from saekit.activations import file_sha256, write_atomic
from saekit.dictionaries import Dictionary
from saekit.harvest import check_writable, harvest
from saekit.models import Model
from saekit.types import Codes, SaekitError, check_beside

SCHEMA = 1
ABOUT = "firings.json"
FIX = "record them again"
ARRAYS = {
    "tokens": "<i4",
    "documents": "<i4",
    "mask": "?",
    "offsets": "<i8",
    "places": "<u4",
    "values": "<f4",
}
SHAPE = {"rows": int, "seq": int, "n_features": int, "nnz": int, "sha256": {"*": str}, "about": dict}
BUCKETS = 64  # files into which entries are sorted by feature, each small enough to be sorted in memory
HASHED = 1 << 28  # bytes up to which a file's hash is checked when it is opened
ENTRY = np.dtype([("feature", "<u4"), ("place", "<u4"), ("value", "<f4")])


class Firings:
    """Firings on disk, memory-mapped; ``of`` one feature is a slice."""

    tokens: Int32[ndarray, "row seq"]
    documents: Int32[ndarray, "row seq"]
    mask: Bool[ndarray, "row seq"]

    def __init__(self, path: "str | Path"):
        self.path = Path(path)
        data = records.read(self.path / ABOUT, "a record of firings", SHAPE, FIX, SCHEMA)
        self.n_features, self.seq, self.about = data["n_features"], data["seq"], data["about"]
        both = (data["rows"], data["seq"])
        shapes = {
            "tokens": both, "documents": both, "mask": both, "offsets": (data["n_features"] + 1,),
            "places": (data["nnz"],), "values": (data["nnz"],),
        }  # fmt: skip
        arrays = {name: self._map(name, shape, data["sha256"]) for name, shape in shapes.items()}
        self.tokens, self.documents, self.mask = (arrays[name] for name in ("tokens", "documents", "mask"))
        self.offsets, self.places, self.values = (arrays[name] for name in ("offsets", "places", "values"))
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any() or self.offsets[-1] != data["nnz"]:
            raise SaekitError(f"firings {str(self.path)!r} have offsets that don't fit; {FIX}")

    def _map(self, name: str, shape: tuple[int, ...], hashes: Mapping[str, str]) -> Any:
        file, dtype = self.path / f"{name}.bin", np.dtype(ARRAYS[name])
        size = int(np.prod(shape)) * dtype.itemsize
        if not file.is_file() or file.stat().st_size != size:
            raise SaekitError(f"file {str(file)!r} is missing or not {size} bytes long; {FIX}")
        if size <= HASHED and file_sha256(file) != hashes.get(name):
            raise SaekitError(f"file {str(file)!r} was changed after saving; {FIX}")
        return np.memmap(file, dtype, "r", shape=shape) if size else np.zeros(shape, dtype)

    def of(self, feature: int) -> tuple[UInt32[ndarray, " n"], Float32[ndarray, " n"]]:
        """Places where a feature fires, rising, and its values there."""
        if not 0 <= feature < self.n_features:
            raise SaekitError(f"feature {feature} is none of the dictionary's {self.n_features}")
        own = slice(self.offsets[feature], self.offsets[feature + 1])
        return self.places[own], self.values[own]

    @property
    def n_tokens(self) -> int:
        """Tokens that were looked at: unmasked ones."""
        return int(self.mask.sum())

    @property
    def counts(self) -> Int[ndarray, " feature"]:
        """On how many tokens each feature fires."""
        return np.diff(self.offsets)


class Writer:
    """Takes codes batch by batch and leaves :class:`Firings` in a folder; memory doesn't grow with the tokens."""

    def __init__(self, path: Path, n_features: int):
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.n_features, self.rows, self.seq = path, n_features, 0, 0
        names = ["tokens", "documents", "mask", *(f"bucket{i}" for i in range(BUCKETS))]
        self._files = {name: (path / f"{name}.bin").open("wb") for name in names}

    def add(
        self,
        tokens: Int[Tensor, "row seq"],
        documents: Int[Tensor, "row seq"] | None,
        mask: Bool[Tensor, "row seq"],
        codes: Codes,
    ) -> None:
        """Read one batch of rows; ``codes`` has shape (rows, seq). Without documents each row is one."""
        check_beside(tokens, documents, mask, codes, self.n_features, self.seq or None)
        self.seq = tokens.shape[1]
        start = self.rows * self.seq
        self.rows += len(tokens)
        if self.rows * self.seq >= 2**32:
            raise SaekitError("firings of more than 4 billion tokens are not kept; give fewer tokens")
        own = torch.arange(start // self.seq, self.rows)[:, None].expand_as(tokens) if documents is None else documents  # fmt: skip
        for name, part in (("tokens", tokens), ("documents", own), ("mask", mask)):
            self._files[name].write(np.ascontiguousarray(part.cpu().numpy(), ARRAYS[name]).data)
        row = codes.row_ids()
        kept = (codes.values != 0) & mask.reshape(-1).to(row.device)[row]
        entries = np.empty(int(kept.sum()), ENTRY)
        entries["feature"] = codes.indices[kept].cpu().numpy()
        entries["place"] = row[kept].cpu().numpy() + start
        entries["value"] = codes.values[kept].detach().float().cpu().numpy()
        bucket = entries["feature"].astype(np.int64) * BUCKETS // self.n_features
        order = np.argsort(bucket.astype(np.uint8), kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(BUCKETS + 1))
        for i in range(BUCKETS):
            self._files[f"bucket{i}"].write(entries[order[ends[i] : ends[i + 1]]].tobytes())

    def close(self, about: Mapping[str, Any]) -> Firings:
        """Sort by feature and write the record."""
        for file in self._files.values():
            file.close()
        counts = np.zeros(self.n_features, np.int64)
        with (self.path / "places.bin").open("wb") as places, (self.path / "values.bin").open("wb") as values:
            for i in range(BUCKETS):
                bucket = self.path / f"bucket{i}.bin"
                entries = np.fromfile(bucket, ENTRY)
                # places rise already, and within a place a feature stands once
                entries = entries[np.argsort(entries["feature"], kind="stable")]
                places.write(entries["place"].tobytes())
                values.write(entries["value"].tobytes())
                counts += np.bincount(entries["feature"], minlength=self.n_features)
                bucket.unlink()
        (self.path / "offsets.bin").write_bytes(np.concatenate([[0], counts.cumsum()]).astype("<i8").tobytes())  # fmt: skip
        record = {
            "schema": SCHEMA, "rows": self.rows, "seq": self.seq, "n_features": self.n_features, "nnz": int(counts.sum()),
            "sha256": {name: file_sha256(self.path / f"{name}.bin") for name in ARRAYS}, "about": dict(about),
        }  # fmt: skip
        write_atomic(self.path / ABOUT, json.dumps(record, indent=1).encode())
        return Firings(self.path)


@torch.no_grad()
def record(
    model: Model,
    dictionary: Dictionary,
    text: Any,
    out: "str | Path | None" = None,
    tokens: int | None = 200_000,
    split: str = "train",
    context: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Firings:
    """Where the features of a dictionary fire in ``tokens`` tokens of a text; without ``out`` in a temporary folder.

    A folder that holds the same already (model, text, dictionary and settings) is opened and not recorded again.
    """
    if not dictionary.reads:
        raise SaekitError("the dictionary names no hook point; set reads, or train it on a store")
    stream = harvest(model, text, list(dictionary.reads), tokens=tokens, split=split, context=context or dictionary.context)  # fmt: skip
    about = {
        "model": model.identity(), "text": stream.text_identity(), "dictionary": dictionary.digest(), "reads": list(dictionary.reads),
        "tokens": tokens, "split": split, "context": context,
    }  # fmt: skip
    if out is not None and (Path(out) / ABOUT).is_file():
        there = Firings(out)
        if there.about != about:
            raise SaekitError(f"out {str(out)!r} holds firings that differ in {records.difference('about', there.about, about)}; name another folder")  # fmt: skip
        return there
    if out is not None:
        check_writable(Path(out))
    folder = Path(tempfile.mkdtemp(prefix="saekit-firings-") if out is None else out)
    try:
        found = _written(Writer(folder, dictionary.n_features), dictionary, stream, about, on_batch)
    except BaseException:
        if out is None:
            shutil.rmtree(folder)
        raise
    if out is None:
        weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


def _written(
    writer: Writer, dictionary: Dictionary, stream: Any, about: dict[str, Any], on_batch: Callable[[int, int], None] | None
) -> Firings:  # fmt: skip
    done = 0
    for batch in stream:
        if batch.tokens is None:
            raise SaekitError(
                f"model {about['model']['name']!r} reads no tokens, so there is no text to explain features by"
            )
        x = torch.cat([batch.activations[point] for point in dictionary.reads], -1)
        codes = dictionary.encode(x.to(dictionary.device))
        writer.add(batch.tokens, batch.documents, batch.mask, codes)
        done += batch.mask.numel()
        if on_batch is not None and about["tokens"] is not None:
            on_batch(done, about["tokens"])
    return writer.close(about)
