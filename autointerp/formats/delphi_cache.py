"""delphi's cache of activations (eai-delphi 0.1.x): what it holds, to :class:`Firings` and back.

A run's folder has ``latents/<hookpoint>/config.json`` and ``{first}_{last}.safetensors``, the last latent included:
``locations`` uint16 or uint32 [nnz, 3] (row, position, latent - first), ``activations`` float16 [nnz], and ``tokens``
[row, ctx], the same in each file. Bounds are ``linspace(0, n_features, n_splits + 1)``, rounded down.

A cache knows neither documents nor masked tokens: read back, each row is a document of its own and all tokens count.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray

from saekit import records
from saekit.autointerp.firings import ENTRY, Firings, Writer
from saekit.autointerp.formats.strict import inside, read_json, whole
from saekit.harvest import check_writable
from saekit.types import Codes, SaekitError

WINDOW = 32  # tokens of the windows that delphi cuts rows into
LARGEST, LEAST = 65504.0, 2.0**-24  # of float16
CHUNK = 1 << 22  # entries in memory at a time
BLOCKS = 256  # files at most into which entries are sorted by row
WIDEST = 1 << 24  # latents; the names of files may claim any number
FIX = "write the cache again"
CONFIG = {"model_name?": str, "dataset_repo?": str, "dataset_split?": str, "cache_ctx_len?": int}
NOTE = "delphi's cache holds no documents and no mask: each row stands for a document, and all tokens were looked at"
INTEGERS = ("U16", "U32", "I32", "I64")
KINDS = {"locations": INTEGERS, "tokens": INTEGERS, "activations": ("F16", "F32")}


def write_cache(firings: Firings, path: "str | Path", hookpoint: str, n_splits: int = 5) -> Path:
    """Write firings as delphi's cache of one hook point into a run's folder, in bounded memory; gives its folder.

    Values are rounded to float16. One above 65504 is refused: as infinity it would be every window's peak, and a
    clipped one would change which windows are the strongest. One that would round to 0 becomes the least float16
    (6e-8), so that no firing is lost.
    """
    folder = Path(path) / "latents" / inside(hookpoint, "hookpoint")
    if not 1 <= n_splits <= firings.n_features:
        raise SaekitError(f"n_splits = {n_splits} must be from 1 to the {firings.n_features} features")
    if firings.seq % WINDOW:
        raise SaekitError(
            f"rows of {firings.seq} tokens don't fit delphi's windows of {WINDOW}; record with a context that is a multiple of {WINDOW}"
        )
    for start, stop in _chunks(0, len(firings.places)):
        values = _part(firings, "values", start, stop)
        sound = np.abs(values) <= LARGEST  # false of NaN too
        if not sound.all():
            raise SaekitError(
                f"a value of {values[~sound][0]:g} is none that delphi's float16 can hold, up to {LARGEST:g}; scale the dictionary's codes down"
            )
    bounds = _bounds(firings, n_splits)
    about = firings.about
    config = {
        "dataset_repo": _name(about.get("text")), "dataset_split": str(about.get("split", "")), "dataset_name": "", "dataset_column": "text",
        "batch_size": 32, "cache_ctx_len": firings.seq, "n_tokens": int(firings.tokens.size), "n_splits": n_splits,
        "model_name": _name(about.get("model")),
    }  # fmt: skip
    with whole(folder) as made:
        for first, stop in pairwise(bounds):
            with (made / f"{first}_{stop - 1}.safetensors").open("wb") as file:
                _write_shard(file, firings, first, stop)
        (made / "config.json").write_text(json.dumps(config, indent=4))
    return folder


def _name(of: Any) -> str:
    return str(of.get("name", "")) if isinstance(of, dict) else ""


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, CHUNK):
        yield at, min(at + CHUNK, stop)


def _part(firings: Firings, name: str, start: int, stop: int) -> ndarray:
    """Entries read, not mapped: pages of a map stay in memory for as long as it is open."""
    mapped = getattr(firings, name)
    at = start * mapped.dtype.itemsize
    return np.fromfile(firings.path / f"{name}.bin", mapped.dtype, stop - start, offset=at)


def _bounds(firings: Firings, n_splits: int) -> list[int]:
    """Where shards begin and end, as delphi has it; but one in which nothing fires joins its neighbour.

    delphi's writer fails at an empty shard, and its reader of some latents takes the end of one file for the start of
    the next, so a shard may not simply be left out.
    """
    bounds = torch.linspace(0, firings.n_features, n_splits + 1).long().tolist()
    kept = [bounds[0]]
    for stop in bounds[1:-1]:
        if firings.offsets[kept[-1]] < firings.offsets[stop] < firings.offsets[-1]:
            kept.append(stop)
    return [*kept, bounds[-1]]


def _write_shard(file: BinaryIO, firings: Firings, first: int, stop: int) -> None:
    start, end = int(firings.offsets[first]), int(firings.offsets[stop])
    alive = np.flatnonzero(np.diff(firings.offsets[first : stop + 1]))
    short = max(len(firings.tokens), firings.seq, int(alive.max(initial=0)) + 1) <= 2**16
    kind = np.dtype("<u2" if short else "<u4")
    parts = {
        "tokens": ("I32", list(firings.tokens.shape), firings.tokens.size * 4),
        "locations": ("U16" if short else "U32", [end - start, 3], (end - start) * 3 * kind.itemsize),
        "activations": ("F16", [end - start], (end - start) * 2),
    }
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, size) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for top in range(0, len(firings.tokens), 1 << 12):
        file.write(np.ascontiguousarray(firings.tokens[top : top + (1 << 12)], "<i4").data)
    for a, b in _chunks(start, end):
        row, position = np.divmod(_part(firings, "places", a, b), np.uint32(firings.seq))
        counts = np.diff(np.clip(firings.offsets[first : stop + 1], a, b))
        latent = np.repeat(np.arange(stop - first), counts)
        file.write(np.stack([row, position, latent], 1).astype(kind).tobytes())
    for a, b in _chunks(start, end):
        values = _part(firings, "values", a, b)
        half = values.astype("<f2")
        file.write(np.where(half == 0, np.copysign(np.float16(LEAST), values), half).astype("<f2").tobytes())


def read_cache(path: "str | Path", hookpoint: str, out: "str | Path | None" = None) -> Firings:
    """Firings of one hook point of a run's folder, in bounded memory; without ``out`` in a temporary folder.

    Entries may stand in any order; one that lies outside of its file's range or of the text, stands twice or isn't a
    number is refused. As many features are taken as the last file's name says.
    """
    source = Path(path) / "latents" / inside(hookpoint, "hookpoint")
    shards = _shards(source)
    config = read_json(source / "config.json", FIX)
    records.check(config, CONFIG, f"config {str(source / 'config.json')!r}", FIX)
    for shard in shards:
        _check_text(shards[0], shard)
    if out is not None:
        if Path(out).exists():
            raise SaekitError(f"out {str(out)!r} exists already; name another folder, or remove it first")
        check_writable(Path(out))
    about = {
        "format": "delphi", "hookpoint": hookpoint, "note": NOTE, "model": {"name": config.get("model_name", "")},
        "text": {"name": config.get("dataset_repo", "")}, "split": config.get("dataset_split", ""),
    }  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="saekit-firings-") if out is None else out)
    try:
        folder.mkdir(exist_ok=True, parents=True)
        found = _taken(shards, folder, about)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SaekitError(f"out {str(folder)!r} can't be written: {error.strerror}; free some space, or choose another folder") from None  # fmt: skip
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


class _Shard:
    """One file of a cache, opened anew for each part, so that no more than that part stays in memory."""

    def __init__(self, file: Path, first: int, last: int):
        self.file, self.first, self.last, self.where = file, first, last, f"shard {str(file)!r}"
        shapes = {name: self._shape(name, kinds) for name, kinds in KINDS.items()}
        self.nnz, self.text = shapes["activations"][0], shapes["tokens"]
        flat = shapes["activations"] == [self.nnz] and shapes["locations"] == [self.nnz, 3]
        if not flat or len(self.text) != 2 or 0 in self.text:
            raise SaekitError(f"{self.where} has shapes that don't fit, {shapes}; {FIX}")

    def _shape(self, name: str, kinds: tuple[str, ...]) -> list[int]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "numpy") as tensors:
                if name not in tensors.keys():  # noqa: SIM118
                    raise SaekitError(f"{self.where} holds no {name!r}; {FIX}, with its tokens")
                found = tensors.get_slice(name)
                dtype, shape = found.get_dtype(), found.get_shape()
        except (SafetensorError, OSError) as error:
            why = " ".join(str(error).split())
            raise SaekitError(f"{self.where} is not an intact safetensors file ({why}); {FIX}") from None
        if dtype not in kinds or not shape:
            raise SaekitError(f"{self.where} holds {name!r} as {dtype} {shape}, not as {' or '.join(kinds)}; {FIX}")  # fmt: skip
        return shape

    def part(self, name: str, start: int, stop: int) -> ndarray:
        """Some of the entries, or rows, of a tensor."""
        from safetensors import safe_open

        with safe_open(self.file, "numpy") as tensors:
            return np.array(tensors.get_slice(name)[start:stop])

    def entries(self, start: int, stop: int) -> ndarray:
        """Some entries, checked, as :data:`ENTRY`; latents counted from 0, places by row."""
        at = self.part("locations", start, stop).astype(np.int64)
        limits = np.array([*self.text, self.last - self.first + 1])
        if ((at < 0) | (at >= limits)).any():
            wrong = at[((at < 0) | (at >= limits)).any(1)][0].tolist()
            raise SaekitError(f"{self.where} has an entry at {wrong} (row, position, latent), beyond {limits.tolist()}; {FIX}")  # fmt: skip
        values = self.part("activations", start, stop).astype(np.float32)
        if not np.isfinite(values).all():
            raise SaekitError(f"{self.where} holds a value that is NaN or infinite; {FIX}")
        out = np.empty(len(at), ENTRY)
        out["feature"], out["place"], out["value"] = at[:, 2] + self.first, at[:, 0] * self.text[1] + at[:, 1], values  # fmt: skip
        return out

    def tokens(self, start: int, stop: int) -> Int64[ndarray, "row ctx"]:
        """Some rows of the text."""
        rows = self.part("tokens", start, stop).astype(np.int64)
        if rows.min() < 0 or rows.max() >= 2**31:
            raise SaekitError(f"{self.where} holds a token that is no token, {rows.min()} or {rows.max()}; {FIX}")  # fmt: skip
        return rows


def _shards(source: Path) -> list[_Shard]:
    """The files of a hook point by rising latents; ranges that overlap or are beyond measure are refused."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    if not files:
        raise SaekitError(f"folder {str(source)!r} holds no cache of delphi; name a run's folder and a hook point of it")  # fmt: skip
    ranges = []
    for file in files:
        ends = file.stem.split("_")
        sound = len(ends) == 2 and all(one.isascii() and one.isdigit() and len(one) < 10 for one in ends)
        if not sound or not int(ends[0]) <= int(ends[1]) < WIDEST:
            raise SaekitError(
                f"shard {file.name[:80]!r} of {str(source)!r} isn't called after its first and last latent, below {WIDEST}; {FIX}"
            )
        ranges.append((int(ends[0]), int(ends[1]), file))
    ranges.sort()
    for (_, last, one), (first, _, other) in pairwise(ranges):
        if first <= last:
            raise SaekitError(
                f"shards {one.name!r} and {other.name!r} of {str(source)!r} share latents; {FIX}"
            )
    return [_Shard(file, first, last) for first, last, file in ranges]


def _check_text(one: _Shard, other: _Shard) -> None:
    """Raise unless tokens are tokens, and the same in both."""
    same = one.text == other.text
    step = max(1, CHUNK // one.text[1])
    for row in range(0, one.text[0] if same else 0, step):
        stop = min(row + step, one.text[0])
        same = same and bool((one.tokens(row, stop) == other.tokens(row, stop)).all())
    if not same:
        raise SaekitError(f"{one.where} and {other.where} are of different texts; {FIX}")


def _taken(shards: list[_Shard], folder: Path, about: dict[str, Any]) -> Firings:
    """Sort entries into files by blocks of rows, then write them block by block; all checks come before the writing."""
    (rows, ctx), nnz = shards[0].text, sum(shard.nnz for shard in shards)
    height = -(-rows // min(rows, BLOCKS, max(1, -(-nnz // CHUNK))))
    blocks = [(start, min(start + height, rows)) for start in range(0, rows, height)]
    files = [folder / f"block{i}.bin" for i in range(len(blocks))]
    _deal(shards, files, height * ctx)
    for file in files:
        _sort(file, ctx, f"cache {str(shards[0].file.parent)!r}")
    writer = Writer(folder, shards[-1].last + 1)
    for (start, stop), file in zip(blocks, files, strict=True):
        entries = np.fromfile(file, ENTRY)
        file.unlink()
        counts = np.bincount(entries["place"].astype(np.int64) - start * ctx, minlength=(stop - start) * ctx)
        tokens = torch.from_numpy(shards[0].tokens(start, stop))
        codes = Codes(
            torch.from_numpy(np.concatenate([[0], counts.cumsum()])), torch.from_numpy(entries["feature"].astype(np.int32)),
            torch.from_numpy(entries["value"].copy()), writer.n_features, tuple(tokens.shape),
        )  # fmt: skip
        writer.add(tokens, None, torch.ones(tokens.shape, dtype=torch.bool), codes)
    return writer.close(about)


def _sort(file: Path, ctx: int, where: str) -> None:
    """Sort a block's entries by place, then latent; raise where one stands twice."""
    entries = np.fromfile(file, ENTRY)
    key = entries["place"].astype(np.uint64) * np.uint64(WIDEST) + entries["feature"]
    order = np.argsort(key)
    twice = np.flatnonzero(np.diff(key[order]) == 0)
    if len(twice):
        one = entries[order[twice[0]]]
        raise SaekitError(
            f"{where} holds latent {one['feature']} twice at row {one['place'] // ctx}, position {one['place'] % ctx}; {FIX}"
        )
    entries[order].tofile(file)


def _deal(shards: list[_Shard], files: list[Path], size: int) -> None:
    """Append all entries to the files of their blocks, each of ``size`` places."""
    if shards[0].text[0] * shards[0].text[1] >= 2**32:
        raise SaekitError("firings of more than 4 billion tokens are not kept; read a cache of fewer tokens")
    open_files = [file.open("wb") for file in files]
    try:
        for shard in shards:
            for start, stop in _chunks(0, shard.nnz):
                entries = shard.entries(start, stop)
                block = (entries["place"] // size).astype(np.uint8)
                order = np.argsort(block, kind="stable")
                ends = np.searchsorted(block[order], np.arange(len(files) + 1))
                for i, file in enumerate(open_files):
                    file.write(entries[order[ends[i] : ends[i + 1]]].tobytes())
    finally:
        for file in open_files:
            file.close()
