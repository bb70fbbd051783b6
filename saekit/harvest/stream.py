"""The activations of a text as they are computed: whole sequences with their mask, or mixed rows."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations import (
    DTYPES,
)
from saekit.hooks import capture
from saekit.images import ImageFolder, image_files
from saekit.models import Model
from saekit.records import check_types
from saekit.registry import nearest
from saekit.tokens import GIVEN, Given, Special, check_text, documents, fingerprint, token_rows
from saekit.types import ActivationBatch, SaekitError

DEFAULT_CONTEXT = 512
BUFFERED = 16  # batches that are mixed


@dataclass(frozen=True)
class HarvestConfig:
    """Everything that decides what a harvest holds.

    ``tokens``: how many to read, masked ones included (None: the whole text); ``context``: tokens
    of a row (default: the model's own, at most 512); ``batch_rows``: rows of a forward pass;
    ``dtype``: fp32, bf16, fp16 or int8 (with a scale per row); ``split``: side of the text's
    split; ``isolate``: one document per row; ``roles``: roles of chats whose tokens count;
    ``outlier``: a token whose norm exceeds this many times the median of the first batch is masked.
    """

    hook_points: tuple[str, ...]
    tokens: int | None = 1_000_000
    context: int | None = None
    batch_rows: int = 16
    dtype: str = "fp32"
    split: str = "train"
    isolate: bool = False
    roles: tuple[str, ...] | None = None
    outlier: float = 10.0

    def __post_init__(self):
        check_types(self)
        if not self.hook_points:
            raise SaekitError("hook_points is empty; name at least one, for example blocks.1.hook_resid_post")
        if self.dtype not in DTYPES:
            raise SaekitError(f"dtype {self.dtype!r} is unknown{nearest(self.dtype, list(DTYPES))}")
        for field in ("tokens", "context", "batch_rows"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SaekitError(f"{field} = {value} must be at least 1")
        if self.split not in ("train", "held_out", "all"):
            raise SaekitError(f"split {self.split!r} is not one of 'train', 'held_out', 'all'")
        if not self.outlier > 1:
            raise SaekitError(
                f"outlier = {self.outlier} must be above 1; it is a multiple of the median norm"
            )


class Stream:
    """Activations of whole sequences, computed as they are asked for; iterating starts afresh."""

    def __init__(self, model: Model, text: Any, config: HarvestConfig, skip_batches: int = 0):
        self.model, self.config = model, config
        self.hook_points = model.expand(config.hook_points)
        self.sites = {name: model.site(name) for name in self.hook_points}
        self.skip_batches = skip_batches
        self.done_tokens = 0  # of the batches skipped
        self.norm_limits: dict[str, float] = {}
        self.named = isinstance(text, str | os.PathLike)
        images = self.named and model.tokenizer is None and image_files(text)
        if images:
            self.text, self.raw = _images(model, text, config), True
        else:
            self.text, self.raw = (text, False) if self.named else _given(text, config.batch_rows)
        self.source = text
        if self.raw:
            return
        check_text(self.text)
        if model.tokenizer is None:
            raise SaekitError(
                f"model {model.name!r} has no tokenizer and the text is words; give tokenizer=, or token rows as tensors"
            )
        self.context = config.context or min(model.context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if model.context and self.context > model.context:
            raise SaekitError(
                f"context = {self.context} exceeds the {model.context} positions of model {model.name!r}; choose fewer"
            )

    def inputs(self) -> Iterator[tuple[Any, ActivationBatch]]:
        """Inputs of each forward pass, with a batch that holds tokens, documents and mask only."""
        if self.raw:
            yield from self._raw_inputs()
            return
        config, left = self.config, self.config.tokens
        docs = documents(self.text, config.split)
        for rows in token_rows(
            docs, self.model.tokenizer, context=self.context, batch_rows=config.batch_rows,
            isolate=config.isolate, roles=config.roles,
        ):  # fmt: skip
            if left is not None:
                n = -(-left // self.context)  # whole rows: a row more rather than a row less
                rows = type(rows)(*(part[:n] for part in vars(rows).values()))
                left -= rows.tokens.size
            tokens, documents_, attention, keep = (torch.from_numpy(part) for part in vars(rows).values())
            yield self.model.inputs(tokens, attention), ActivationBatch({}, keep, tokens, documents_)
            if left is not None and left <= 0:
                return

    def _raw_inputs(self) -> Iterator[tuple[Any, ActivationBatch]]:
        row, device = 0, self.model.device
        special = torch.tensor(sorted(Special.of(self.model.tokenizer).all), dtype=torch.int64)
        for i, item in enumerate(self.text):
            if isinstance(item, Mapping):
                given: Any = {
                    key: value.to(device) if isinstance(value, Tensor) else value
                    for key, value in item.items()
                }
                ids, attention = item.get("input_ids"), item.get("attention_mask")
                if ids is not None and not (isinstance(ids, Tensor) and ids.ndim == 2):
                    shape = list(ids.shape) if isinstance(ids, Tensor) else f"that of a {type(ids).__name__}"
                    raise SaekitError(f"input_ids of text item {i} have shape {shape}; give a tensor [batch, seq], as a tokenizer does with return_tensors='pt'")  # fmt: skip
                n = next((len(value) for value in item.values() if isinstance(value, Tensor)), 0)
            elif isinstance(item, Tensor):
                given, ids, attention = item.to(device), None, None
                if not item.is_floating_point():
                    ids = item[None] if item.ndim == 1 else item
                    given = (
                        {"input_ids": ids.to(device)}
                        if hasattr(self.model.module, "config")
                        else ids.to(device)
                    )
                n = len(item if ids is None else ids)
            else:
                raise SaekitError(
                    f"text item {i} is a {type(item).__name__}; after a first item of model inputs, give tensors or mappings of them"
                )
            owner = torch.arange(row, row + n)[:, None]
            keep = torch.ones(
                n, 1, dtype=torch.bool
            )  # inputs that are not tokens: the model decides on positions
            if ids is not None:
                ids = ids.cpu()
                keep, owner = ~torch.isin(ids, special), owner.expand(ids.shape)
            if attention is not None and attention.ndim == 2:
                real = attention.cpu().bool()
                keep, owner = keep & real, torch.where(real, owner, -1)  # padding belongs to no document
            row += n
            yield given, ActivationBatch({}, keep, ids, owner)

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Batches in the order of the text; the mask leaves out special tokens, padding and outliers."""
        done = self.done_tokens
        for i, (given, batch) in enumerate(self.inputs()):
            if i < self.skip_batches and self.norm_limits:
                continue
            if self._enough(done):
                return
            out = self.masked(batch, capture(partial(self.model, given), self.sites))
            done += out.mask.numel()
            yield out

    def _enough(self, done: int) -> bool:
        """Whether inputs that are tensors have given as many positions as were asked for; text is cut before."""
        return self.raw and self.config.tokens is not None and done >= self.config.tokens

    def with_logits(self, logits: bool = True) -> Iterator[tuple[ActivationBatch, Tensor | None, Any]]:
        """``(batch, logits, inputs)`` of whole forward passes, for evaluations that run the model on."""
        done = 0
        for given, batch in self.inputs():
            if self._enough(done):
                return
            done += batch.mask.numel()
            output: list[Tensor] = []

            def run(given: Any = given, output: list[Tensor] = output) -> None:
                if logits:
                    output.append(self.model.logits(given))
                else:
                    self.model(given)

            found = capture(run, self.sites, stop=not logits)
            yield self.masked(batch, found), output[0] if output else None, given

    def masked(self, batch: ActivationBatch, found: Mapping[str, Tensor]) -> ActivationBatch:
        """The activations with their mask; the first batch sets what counts as an outlier."""
        grid = batch.mask.shape
        acts = {name: _positions(name, a, grid) for name, a in found.items()}
        first = next(iter(acts))
        shape = acts[first].shape[:2]
        for name, a in acts.items():
            if not a.is_floating_point():
                raise SaekitError(f"hook point {name!r} gives {a.dtype}, no activations; choose another")
            if a.shape[:2] != shape:
                raise SaekitError(
                    f"hook point {name!r} has {tuple(a.shape[:2])} positions and {first!r} has {tuple(shape)}; harvest them one by one"
                )
        fits = grid == shape
        if not fits and batch.tokens is not None and shape.numel() == grid.numel():
            raise SaekitError(
                f"hook point {first!r} gives {tuple(shape)} rows and positions for tokens of {tuple(grid)}: its axes are in another order; "
                "choose a hook point whose first axis is the batch"
            )
        mask = batch.mask if fits else torch.ones(shape, dtype=torch.bool)
        norms = {
            name: torch.linalg.vector_norm(a, dim=-1, dtype=torch.float32).cpu() for name, a in acts.items()
        }
        if not self.norm_limits:
            self.norm_limits = {name: self._limit(n[mask]) for name, n in norms.items()}
        for name, n in norms.items():
            # NaN and Inf are kept: they must be seen, not hidden
            mask = mask & ~((n > self.norm_limits[name]) & n.isfinite())
        owner = None
        if batch.documents is not None and len(batch.documents) == shape[0]:
            owner = (batch.documents if fits else batch.documents[:, :1]).expand(shape)
        return ActivationBatch(acts, mask, batch.tokens if fits else None, owner)

    def _limit(self, norms: Tensor) -> float:
        finite = norms[torch.isfinite(norms) & (norms > 0)]  # a sparse hook point is silent at most positions
        return self.config.outlier * finite.median().item() if len(finite) else float("inf")

    def settings(self) -> dict[str, Any]:
        """The resolved settings, as they stand in the manifest."""
        out = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.config).items()
        }
        return {**out, "hook_points": self.hook_points, "context": None if self.raw else self.context}

    def text_identity(self) -> dict[str, Any]:
        """What the text is: its name, or a digest of what was given."""
        if self.named:
            return {
                "name": os.fspath(self.source),
                "split": self.config.split,
                "state": fingerprint(self.source),
            }
        if isinstance(self.text, Given):
            return self.text.identity()
        digest = hashlib.sha256()
        for item in self.text:
            parts = item.values() if isinstance(item, Mapping) else [item]
            for part in parts:
                data = (
                    part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                    if isinstance(part, Tensor)
                    else json.dumps(part, default=str).encode()
                )
                digest.update(
                    f"{getattr(part, 'dtype', '')} {tuple(getattr(part, 'shape', ()))} ".encode() + data
                )
        return {"name": GIVEN, "items": len(self.text), "sha256": digest.hexdigest()}


def _images(model: Model, folder: Any, config: HarvestConfig) -> ImageFolder:
    if model.processor is None:
        raise SaekitError(
            f"text {os.fspath(folder)!r} holds images and model {model.name!r} has no image processor; give processor= to load_model, or pixels as tensors"
        )
    return ImageFolder(folder, model.processor, config.batch_rows, config.split)


def _given(text: Any, batch_rows: int) -> tuple[Any, bool]:
    """A text that is no name as a sequence or :class:`Given`, and whether its items are inputs of the model."""
    if isinstance(text, Tensor):
        return list((text[None] if text.ndim == 1 else text).split(batch_rows)), True
    if isinstance(text, Mapping):
        tables = [part for part in text.values() if hasattr(part, "column_names")]  # of a DatasetDict
        if tables:
            return Given(text.get("train", tables[0])), False
        return [text], "role" not in text
    if not isinstance(text, Iterable):
        raise SaekitError(
            f"text is of type {type(text).__name__}; give a path, a data set, or strings, chats or tensors in a list"
        )
    if isinstance(text, np.ndarray):
        return _given(torch.from_numpy(text), batch_rows)
    items = text if isinstance(text, Sequence) else Given(text)
    if isinstance(items, Given) and items.table:
        return items, False
    first = next(iter(items), None)
    if isinstance(first, Mapping) and "role" in first:
        return [list(items)], False  # one chat
    if isinstance(first, Mapping) and isinstance(first.get("text", first.get("messages")), str | list):
        return Given(items, table=True), False
    return items, isinstance(first, Tensor | Mapping)


def _positions(name: str, a: Tensor, grid: torch.Size) -> Tensor:
    """Activations as [batch, seq, width]; ``grid`` is the [batch, seq] of the tokens ([batch, 1] without any).

    Heads of a position stand side by side; positions that the model flattened are taken apart
    again; a module without positions gives one per input.
    """
    if a.ndim < 2:
        raise SaekitError(
            f"hook point {name!r} gives a tensor of shape {tuple(a.shape)}, not one vector per position; choose another"
        )
    if a.ndim == 2:
        return a.view(*grid, -1) if len(a) == grid.numel() > grid[0] else a[:, None]
    if a.ndim == 4 and grid[1] == 1:
        a = a.movedim(1, -1)  # a convolution's channels come before its positions
    return a.flatten(2) if a.shape[:2] == grid else a.flatten(1, -2)


class StreamSource:
    """A live stream as a source of training rows, mixed through a shuffling buffer.

    The buffer holds 16 batches, as far as they fit into ``buffer_bytes`` (and 2 in any case); half of it is used up,
    then refilled. The order is fixed by the seed, so a resumed run replays the stream to where it was: a store on
    disk resumes at once.
    """

    def __init__(self, stream: Stream, buffer_bytes: int = 1 << 29):
        self.stream, self.buffer_bytes, self.n_rows = stream, buffer_bytes, None
        first = next(iter(stream), None)
        if first is None:
            raise SaekitError("the text is too short for one row; give more text")
        self._widths = {name: a.shape[-1] for name, a in first.activations.items()}

    def width(self, hook_point: str | None) -> int:
        """Width of the rows of a hook point."""
        return self._widths[hook_point or self.stream.hook_points[0]]

    def _rows(self, hook_points: Sequence[str], least: int) -> Iterator[Tensor]:
        while True:
            n = 0
            for batch in self.stream:
                n += int(batch.mask.sum())
                rows = torch.cat([batch.rows(h).float().cpu() for h in hook_points], -1)
                if not torch.isfinite(rows).all():
                    raise SaekitError(
                        f"activations at {hook_points[0]!r} hold NaN or Inf; harvest in fp32, or find what makes the model overflow"
                    )
                yield rows
            if n < least:
                raise SaekitError(
                    f"the text gives {n} unmasked tokens and one batch takes batch_size = {least}; give more text, or a smaller batch"
                )

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Endless batches; the text is read again when it ends."""
        generator = torch.Generator().manual_seed(seed)
        columns, step = sum(self._widths[h] for h in hook_points), 0
        fit = self.buffer_bytes // (4 * columns)
        buffer = torch.empty(max(min(fit, BUFFERED * batch_size), 2 * batch_size), columns)
        free, rows, fresh = torch.arange(len(buffer)), self._rows(hook_points, batch_size), buffer[:0]
        while True:
            while len(free):
                if not len(fresh):
                    fresh = next(rows)
                n = min(len(free), len(fresh))
                buffer[free[:n]] = fresh[:n]
                free, fresh = free[n:], fresh[n:]
            order, used = torch.randperm(len(buffer), generator=generator), 0
            while used + batch_size <= len(buffer) - len(buffer) // 2:
                if step >= start:
                    yield buffer[order[used : used + batch_size]]
                used, step = used + batch_size, step + 1
            free = order[:used]

    def identity(self) -> dict[str, Any]:
        """Model, text and settings."""
        return {
            "kind": "stream",
            "model": self.stream.model.identity(),
            "text": self.stream.text_identity(),
            "settings": self.stream.settings(),
        }
