"""The entry: a live stream, or a store on disk that resumes at the shard."""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from saekit.activations import (
    DTYPES,
    SCHEMA,
    Store,
    file_sha256,
    read_manifest,
    write_atomic,
)
from saekit.harvest.shards import SHARD_BYTES, ShardWriter
from saekit.harvest.stream import HarvestConfig, Stream
from saekit.models import load_model
from saekit.records import difference
from saekit.registry import nearest
from saekit.tokens import GIVEN, Given
from saekit.types import ActivationBatch, SaekitError


@overload
def harvest(
    model: Any,
    text: Any = ...,
    hook_points: Sequence[str] = ...,
    *,
    out: None = None,
    device: "str | torch.device | None" = None,
    on_batch: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> Stream: ...


@overload
def harvest(
    model: Any,
    text: Any = ...,
    hook_points: Sequence[str] = ...,
    *,
    out: "str | os.PathLike",
    device: "str | torch.device | None" = None,
    on_batch: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> Store: ...


def harvest(
    model: Any,
    text: Any = "stdlib",
    hook_points: Sequence[str] = (),
    *,
    out: "str | os.PathLike | None" = None,
    device: "str | torch.device | None" = None,
    on_batch: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> "Stream | Store":
    """Activations of ``text`` at ``hook_points``: a :class:`Stream`, or with ``out`` a :class:`Store`.

    ``text`` is a path, a data set (its name or a ``datasets`` object), ``stdlib``, or an iterable of
    strings, chats, token rows (integer tensors), pixels (float tensors) or keyword arguments of the
    model, read no further than ``tokens`` asks. ``options`` are the fields
    of :class:`HarvestConfig`. A harvest into a folder that holds part of the same harvest goes on
    where it stopped. ``on_batch(tokens_done, tokens_wanted)`` is called after each forward pass.
    """
    unknown = sorted(set(options) - set(HarvestConfig.__dataclass_fields__))
    if unknown:
        raise SaekitError(
            f"option {unknown[0]!r} is not one of harvest's{nearest(unknown[0], list(HarvestConfig.__dataclass_fields__))}"
        )
    for name, value in (("model", model), ("text", text), ("out", out)):
        if isinstance(value, str) and not value:
            raise SaekitError(f"{name} is an empty string; name one, or leave it out")
    roles = options.get("roles")
    if roles is not None:
        options["roles"] = (roles,) if isinstance(roles, str) else tuple(roles)
    config = HarvestConfig(
        hook_points=tuple([hook_points] if isinstance(hook_points, str) else hook_points), **options
    )
    stream = Stream(load_model(model, device=device), text, config)
    return stream if out is None else _to_store(stream, Path(out), on_batch)


def check_writable(path: Path, needed: int = 0) -> None:
    """Raise unless a folder can be made and written, with so many bytes free."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise SaekitError(f"out {str(path)!r} can't be a folder: {parent} is a file; choose another path")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / ".probe", b"x" * 4096)
        (path / ".probe").unlink()
    except OSError as error:
        raise SaekitError(
            f"out {str(path)!r} can't be written: {error.strerror}; choose another folder or free some space"
        ) from None
    status = os.statvfs(path)
    if needed > status.f_bavail * status.f_frsize:
        raise SaekitError(
            f"out {str(path)!r} has {status.f_bavail * status.f_frsize / 1e9:.2f} GB free and the harvest needs {needed / 1e9:.2f} GB; "
            "free some space, choose fewer tokens or a smaller dtype"
        )


def bytes_per_token(widths: Iterable[int], dtype: str) -> int:
    """Bytes that one token takes in a store: activations, scales, ids, document, mask and index."""
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    widths = list(widths)
    return sum(widths) * size + (4 * len(widths) if dtype == "int8" else 0) + 4 + 4 + 1 + 4


def _to_store(stream: Stream, path: Path, on_batch: Callable[[int, int | None], None] | None) -> Store:
    manifest: dict[str, Any] = {
        "schema": SCHEMA, "complete": False, "hook_points": {}, "dtype": stream.config.dtype, "seq": 0,
        "shards": [], "model": stream.model.identity(), "text": stream.text_identity(),
        "settings": stream.settings(), "norm_limits": {}, "batches_per_shard": 0,
    }  # fmt: skip
    previous = _resumable(path, manifest)
    if previous is not None:
        manifest = previous
        if manifest["complete"]:
            return Store(path)
    existed = path.exists()
    check_writable(path)
    for stale in path.glob(".*.tmp"):
        stale.unlink()
    stream.norm_limits = dict(manifest["norm_limits"])
    stream.done_tokens = sum(entry["tokens"] for entry in manifest["shards"])
    if isinstance(stream.text, Given):
        stream.text.keep = False  # it is read once
    stream.skip_batches = len(manifest["shards"]) * manifest["batches_per_shard"]
    try:
        with ShardWriter(path, manifest) as writer:
            _write(stream, writer, on_batch)
    except OSError as error:
        raise SaekitError(
            f"out {str(path)!r} can't be written: {error.strerror}; free some space and run the same command again: it goes on where it stopped"
        ) from None
    finally:
        if not existed and not manifest["shards"]:
            with contextlib.suppress(OSError):
                path.rmdir()
    return Store(path, verify_seconds=0)


def _write(stream: Stream, writer: ShardWriter, on_batch: Callable[[int, int | None], None] | None) -> None:
    """Fill shards from the stream until it ends."""
    manifest, in_shard = writer.manifest, 0
    done = sum(entry["tokens"] for entry in manifest["shards"])
    for batch in stream:
        if not manifest["hook_points"]:
            _describe(manifest, stream, batch)
            wanted = 0 if stream.raw else stream.config.tokens or 0
            widths = (site["width"] for site in manifest["hook_points"].values())
            check_writable(writer.path, wanted * bytes_per_token(widths, stream.config.dtype))
        if batch.mask.shape[1] != manifest["seq"]:
            raise SaekitError(
                f"a row has {batch.mask.shape[1]} positions and the rows before it {manifest['seq']}; pad them to one length (with attention_mask)"
            )
        writer.add(batch)
        in_shard += 1
        done += batch.mask.numel()
        if on_batch:
            on_batch(done, stream.config.tokens)
        if in_shard == manifest["batches_per_shard"]:
            writer.flush(wait=False)
            in_shard = 0
    writer.flush()
    if not manifest["shards"]:
        side = (
            ""
            if not stream.named or stream.config.split == "all"
            else f" on the {stream.config.split!r} side of its split (split='all' takes both)"
        )
        raise SaekitError(f"the text gives no row of tokens{side}; give more text")
    if stream.config.roles and not any(entry["kept"] for entry in manifest["shards"]):
        raise SaekitError(
            f"roles = {list(stream.config.roles)} keep no token of the text; name roles that its chats have"
        )
    manifest["complete"] = True
    writer.write_manifest()


def _describe(manifest: dict[str, Any], stream: Stream, batch: ActivationBatch) -> None:
    """Fill in what only the first batch tells: widths, the row length, the outlier limits, the shard size."""
    widths = {name: a.shape[-1] for name, a in batch.activations.items()}
    manifest["hook_points"] = {
        name: {"width": width, "module": stream.sites[name].path, "side": stream.sites[name].side}
        for name, width in widths.items()
    }
    manifest["seq"] = batch.mask.shape[1]
    manifest["norm_limits"] = stream.norm_limits
    per_batch = batch.mask.numel() * bytes_per_token(widths.values(), stream.config.dtype)
    manifest["batches_per_shard"] = max(1, SHARD_BYTES // per_batch)


def _resumable(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a part of the same harvest with its broken last shards taken off, or None."""
    if not (path / "manifest.json").exists():
        return None
    found = read_manifest(path)
    for field in ("model", "text", "settings"):
        if found[field] != manifest[field]:
            raise SaekitError(
                f"out {str(path)!r} holds a harvest with another {difference(field, found[field], manifest[field])}; choose another folder, or delete it"
            )
    if (
        found["text"].get("name") == GIVEN
        and found["text"].get("fingerprint", found["text"].get("sha256")) is None
    ):
        raise SaekitError(
            f"out {str(path)!r} holds a harvest of a text given as an iterable, which can't be compared with this one; choose another folder, or delete it"
        )
    good = list(itertools.takewhile(lambda entry: _intact(path, entry), found["shards"]))
    if len(good) < len(found["shards"]):
        bad = found["shards"][len(good)]["file"]
        warnings.warn(f"shard {bad} of {path} is damaged; going on from the shard before it", stacklevel=2)
        found["shards"], found["complete"] = good, False
    return found


def _intact(path: Path, entry: Mapping[str, Any]) -> bool:
    file = path / entry["file"]
    return file.is_file() and file.stat().st_size == entry["bytes"] and file_sha256(file) == entry["sha256"]
