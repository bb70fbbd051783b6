"""Training batches of whole sequences: computed, stored, or with the model behind them for end-to-end training."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.activations import Store, shuffled_rows
from saekit.harvest.stream import Stream
from saekit.hooks import Site, capture, intervene, spliced
from saekit.models import Model
from saekit.types import ActivationBatch, SaekitError

Hook = tuple[Site, Callable[[Tensor], Tensor | None]]
POOL = 1 << 20  # positions of a text that are held at a time
Piece = tuple[Tensor, Tensor, Tensor]  # tokens, documents and mask of some sequences, each [n, seq]


@dataclass(frozen=True)
class ContinuedBatch(ActivationBatch):
    """Activations of whole sequences, and ``downstream``: what the model makes of a replacement of their rows.

    ``downstream(rows, later)`` takes as many rows as are unmasked and gives ``kl``, the mean over them of
    KL(original || spliced) in nats, and on request ``later``, the mean over the later blocks of the squared
    error of their residual stream as a share of its variance; both differentiable in the rows.
    """

    downstream: Callable[[Tensor, bool], Mapping[str, Tensor]] | None = None


class SequenceSource:
    """Training batches of whole sequences of a stream; ``batch_size`` counts them.

    Held are tokens, documents and mask, 17 bytes per position, of the whole text, whose sequences come in a seeded
    order; of a text of more than ``pool`` positions, of so many: half of them are used up in a seeded order, then
    replaced by what comes next (``n_rows`` is None). Activations are computed for each batch.
    """

    def __init__(self, stream: Stream, pool: int = POOL):
        first = next(iter(stream), None)
        if first is None:
            raise SaekitError("the text is too short for one row; give more text")
        if first.tokens is None:
            raise SaekitError(
                f"model {stream.model.name!r} reads no tokens, and whole sequences come from tokens; train on rows"
            )
        self.stream, self.model, self.hook_points = stream, stream.model, stream.hook_points
        self._widths = {name: a.shape[-1] for name, a in first.activations.items()}
        self.rows_per_item: int = first.mask.shape[1]
        self._size = max(1, pool // self.rows_per_item)
        self._read: list[Piece] = []
        self.n_rows: int | None = 0
        for piece in self._pieces():
            self._read.append(piece)
            self.n_rows += len(piece[0])
            if self.n_rows > self._size:
                self.n_rows = None
                break

    def width(self, hook_point: str | None) -> int:
        """Width of the rows of a hook point."""
        return self._widths[hook_point or self.hook_points[0]]

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[ActivationBatch]:
        """Endless batches of sequences in a seeded order; the model runs if hook points are named."""
        order = self._streamed if self.n_rows is None else self._drawn
        for tokens, documents, keep in order(batch_size, seed, start):
            if not hook_points:
                yield ActivationBatch({}, keep, tokens, documents)
                continue
            given = self.model.inputs(tokens, documents >= 0)
            batch = self._batch(given, ActivationBatch({}, keep, tokens, documents))
            for name, activations in batch.activations.items():
                if not torch.isfinite(activations[batch.mask]).all():
                    raise SaekitError(
                        f"activations at {name!r} hold NaN or Inf; find what makes the model overflow"
                    )
            yield batch

    def _pieces(self) -> Iterator[Piece]:
        """The text's token rows, batch by batch."""
        for _, batch in self.stream.inputs():
            if batch.mask.shape[1] != self.rows_per_item:
                lengths = sorted({batch.mask.shape[1], self.rows_per_item})
                raise SaekitError(f"the token rows have {lengths} positions; give rows of one length")
            assert batch.tokens is not None and batch.documents is not None  # checked of the first
            yield batch.tokens, batch.documents, batch.mask

    def _drawn(self, batch_size: int, seed: int, start: int) -> Iterator[Piece]:
        """Sequences of a text that is held whole, every one once an epoch."""
        assert self.n_rows is not None  # known where it is
        tokens, documents, masks = _joined(self._read)
        for rows in shuffled_rows(self.n_rows, batch_size, seed, start):
            at = torch.from_numpy(rows)
            yield tokens[at], documents[at], masks[at]

    def _streamed(self, batch_size: int, seed: int, start: int) -> Iterator[Piece]:
        """Sequences of a long text, mixed in a pool; the text is read again when it ends."""
        generator, step = torch.Generator().manual_seed(seed), 0
        pool = list(self._read)
        rest = itertools.islice(self._pieces(), len(pool), None)
        pieces = itertools.chain(rest, (piece for _ in itertools.count() for piece in self._pieces()))
        while True:
            held = sum(len(piece[0]) for piece in pool)
            while held < max(self._size, 2 * batch_size):
                pool.append(next(pieces))
                held += len(pool[-1][0])
            joined = _joined(pool)
            order, used = torch.randperm(held, generator=generator), 0
            while used + batch_size <= held - held // 2:
                if step >= start:
                    at = order[used : used + batch_size]
                    yield joined[0][at], joined[1][at], joined[2][at]
                used, step = used + batch_size, step + 1
            left = order[used:]
            pool = [(joined[0][left], joined[1][left], joined[2][left])]

    def _batch(self, given: Any, bare: ActivationBatch) -> ActivationBatch:
        return self.stream.masked(bare, capture(partial(self.model, given), self.stream.sites))

    def identity(self) -> dict[str, Any]:
        """Model, text and settings."""
        return {
            "kind": "sequences",
            "model": self.model.identity(),
            "text": self.stream.text_identity(),
            "settings": self.stream.settings(),
            "context": self.rows_per_item,
        }


def _joined(pieces: Sequence[Piece]) -> Piece:
    tokens, documents, masks = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(documents), torch.cat(masks)


class StoredSequences:
    """Training batches of a store's whole sequences; ``batch_size`` counts them."""

    def __init__(self, store: Store):
        self.store, self.hook_points = store, store.hook_points
        self.rows_per_item: int = store.manifest["seq"]
        self._documented = all("documents" in shard.header for shard in store.shards)
        self._starts = np.cumsum([0, *(len(s.array("mask")) // self.rows_per_item for s in store.shards)])
        self.n_rows = int(self._starts[-1])

    def check(self, hook_point: str) -> None:
        """Raise unless the hook point is here and all its values are finite."""
        self.store.check(hook_point)

    def width(self, hook_point: str | None) -> int:
        """Width of a hook point (of the only one, when none is named)."""
        return self.store.width(hook_point)

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[ActivationBatch]:
        """Endless batches of sequences in a seeded order, every one once an epoch."""
        for rows in shuffled_rows(self.n_rows, batch_size, seed, start):
            found = [self._sequence(row, hook_points) for row in rows.tolist()]
            activations = {name: torch.stack([s[0][name] for s in found]) for name in hook_points}
            mask = torch.stack([s[1]["mask"] for s in found]).bool()
            documents = torch.stack([s[1]["documents"] for s in found]).long() if self._documented else None
            yield ActivationBatch(activations, mask, documents=documents)

    def _sequence(self, row: int, hook_points: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        first = (row - int(self._starts[at])) * self.rows_per_item
        own, shard = slice(first, first + self.rows_per_item), self.store.shards[at]
        about = ("mask", "documents") if self._documented else ("mask",)
        return (
            {name: shard.rows(name, own) for name in hook_points},
            {name: torch.from_numpy(np.array(shard.array(name)[own])) for name in about},
        )

    def identity(self) -> dict[str, Any]:
        """That of the store."""
        own = {"kind": "stored sequences", "rows": self.n_rows, "context": self.rows_per_item}
        return {**self.store.identity(), **own}


class ContinuedSource(SequenceSource):
    """Whole sequences at one hook point of a language model, with the model behind it: :class:`ContinuedBatch`.

    Or at the input and the output of a module, for what stands in for it: the model goes on from the last hook point.
    """

    def __init__(self, stream: Stream, pool: int = POOL):
        if not stream.model.predicts_tokens:
            raise SaekitError(
                f"model {stream.model.name!r} predicts no tokens, so there is no KL to train on; choose a language model"
            )
        if len(stream.hook_points) > 2:
            raise SaekitError(
                f"hook_points name {len(stream.hook_points)} of them, and the model goes on from one; name it, or what is read and then what is written"
            )
        super().__init__(stream, pool)
        # of the residual stream behind each block after the hook point, by the names that the model has
        model = self.model
        names = [n for n in model.hook_points() if n.startswith("blocks.") and n.endswith(".hook_resid_post")]
        at = self.hook_points[-1].split(".")
        block = int(at[1]) if at[0] == "blocks" else len(names)
        self.later = {name: model.site(name) for name in names if int(name.split(".")[1]) > block}

    def _batch(self, given: Any, bare: ActivationBatch) -> ContinuedBatch:
        output: list[Tensor] = []
        run = partial(self._logits, given, output)
        found = capture(run, self.stream.sites, stop=False)
        return self._continued(self.stream.masked(bare, found), output[0], given)

    def _logits(self, given: Any, into: list[Tensor]) -> None:
        into.append(self.model.logits(given))

    def _continued(self, batch: ActivationBatch, logits: Tensor, given: Any) -> ContinuedBatch:
        point = self.hook_points[-1]
        own = batch.activations[point]
        site, mask = self.stream.sites[point], batch.mask.to(own.device)

        def run(rows: Float[Tensor, "rows d_in"] | None, into: dict[str, Tensor] | None) -> Tensor:
            hooks: list[Hook] = (
                [] if into is None else [(s, _keeper(name, into)) for name, s in self.later.items()]
            )
            if rows is not None:
                full = own.float().clone().index_put((mask,), rows.float())
                hooks.append((site, spliced(mask, full)))
            with _frozen(self.model), intervene(hooks):
                return self.model.logits(given)

        def downstream(rows: Float[Tensor, "rows d_in"], later: bool) -> Mapping[str, Tensor]:
            found: dict[str, Tensor] = {}
            changed = run(rows, found if later else None)
            divergence = metrics.kl(logits[mask], changed[mask]).mean()
            if not later or not self.later:
                return {"kl": divergence, "later": torch.zeros(())}
            clean: dict[str, Tensor] = {}
            with torch.no_grad():
                run(None, clean)
            errors = [_share(clean[name][mask], found[name][mask]) for name in clean]
            return {"kl": divergence, "later": torch.stack(errors).mean()}

        return ContinuedBatch(batch.activations, batch.mask, batch.tokens, batch.documents, downstream)


def _keeper(name: str, into: dict[str, Tensor]) -> Callable[[Tensor], Tensor | None]:
    def keep(tensor: Tensor) -> None:
        into[name] = tensor

    return keep


def _share(clean: Tensor, changed: Tensor) -> Tensor:
    return (changed - clean).square().sum() / (clean - clean.mean(0)).square().sum()


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Gradients pass through the model, and none are kept for its own weights."""
    trained = [p for p in model.module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
