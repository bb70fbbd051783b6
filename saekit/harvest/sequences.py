"""Whole sequences with the model behind them: what end-to-end training needs beside the rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.activations import shuffled_rows
from saekit.harvest.stream import HarvestConfig, Stream
from saekit.hooks import Site, capture, intervene, spliced
from saekit.models import Model
from saekit.types import ActivationBatch, SaekitError

Hook = tuple[Site, Callable[[Tensor], Tensor | None]]


@dataclass(frozen=True)
class ContinuedBatch(ActivationBatch):
    """Activations of whole sequences, and ``downstream``: what the model makes of a replacement of their rows.

    ``downstream(rows, later)`` takes as many rows as are unmasked and gives ``kl``, the mean over them of
    KL(original || spliced) in nats, and on request ``later``, the mean over the later blocks of the squared
    error of their residual stream as a share of its variance; both differentiable in the rows.
    """

    downstream: Callable[[Tensor, bool], Mapping[str, Tensor]] | None = None


class SequenceSource:
    """Training batches of whole sequences from a language model; ``batch_size`` counts them.

    The first ``tokens`` of the text are tokenised at once, and their sequences come in a seeded order.
    """

    def __init__(
        self, model: Model, text: Any, hook_point: str,
        *, tokens: int = 2_000_000, context: int | None = None, split: str = "train",
    ):  # fmt: skip
        if not model.predicts_tokens:
            raise SaekitError(
                f"model {model.name!r} predicts no tokens, so there is no KL to train on; choose a language model"
            )
        self.model, self.text = model, text
        self.config = HarvestConfig((hook_point,), tokens=tokens, context=context, split=split)
        self.stream = Stream(model, text, self.config)
        self.hook_points = self.stream.hook_points
        if len(self.hook_points) > 1:
            raise SaekitError(f"hook_point {hook_point!r} means {len(self.hook_points)} of them; name one")
        first = next(iter(self.stream), None)
        if first is None:
            raise SaekitError("the text is too short for one row; give more text")
        self.rows_per_item: int = self.stream.context
        self._width = first.activations[self.hook_points[0]].shape[-1]
        read = [batch for _, batch in self.stream.inputs()]
        self._tokens, self._documents, self._keep = (
            torch.cat([getattr(batch, name) for batch in read]) for name in ("tokens", "documents", "mask")
        )
        self.n_rows = len(self._tokens)
        # of the residual stream behind each block after the hook point, by the names that the model has
        names = [n for n in model.hook_points() if n.startswith("blocks.") and n.endswith(".hook_resid_post")]
        at = self.hook_points[0].split(".")
        block = int(at[1]) if at[0] == "blocks" else len(names)
        self.later = {name: model.site(name) for name in names if int(name.split(".")[1]) > block}

    def width(self, hook_point: str | None) -> int:
        """Width of the rows."""
        return self._width

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[ContinuedBatch]:
        """Endless batches of sequences in a seeded order, every one once an epoch."""
        for rows in shuffled_rows(self.n_rows, batch_size, seed, start):
            at = torch.from_numpy(rows)
            tokens, documents = self._tokens[at], self._documents[at]
            given = self.model.inputs(tokens, documents >= 0)
            output: list[Tensor] = []
            run = partial(self._logits, given, output)
            found = capture(run, self.stream.sites, stop=False)
            bare = ActivationBatch({}, self._keep[at], tokens, documents)
            yield self._continued(self.stream.masked(bare, found), output[0], given)

    def identity(self) -> dict[str, Any]:
        """Model, text and settings."""
        return {
            "kind": "sequences",
            "model": self.model.identity(),
            "text": self.stream.text_identity(),
            "settings": self.stream.settings(),
        }

    def _logits(self, given: Any, into: list[Tensor]) -> None:
        into.append(self.model.logits(given))

    def _continued(self, batch: ActivationBatch, logits: Tensor, given: Any) -> ContinuedBatch:
        point = self.hook_points[0]
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
