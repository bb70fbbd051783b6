"""A model trained on with dictionaries in place: both learn what the model loses through them (2310.17230)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.harvest import SequenceSource, Stream
from saekit.replacement import Replacement
from saekit.types import ActivationBatch, SaekitError


def finetune(
    replacement: Replacement,
    stream: Any,
    steps: int,
    *,
    batch_size: int = 16,
    lr: float = 3e-4,
    dictionary_lr: float = 3e-2,
    reconstruction: float = 1.0,
    warmup: float = 0.1,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train a language model and the dictionaries in it on next tokens, both in place.

    ``stream`` is what :func:`saekit.harvest.harvest` gives without ``out``: the model runs as it changes, so a store
    doesn't do. ``batch_size`` counts sequences of the stream's text. The loss is the cross-entropy of the replaced model, in nats
    per token, and ``reconstruction`` times the share of the variance that each dictionary leaves. AdamW, with the rates (``lr`` of the
    model, ``dictionary_lr`` of normalised space) up over the first ``warmup`` share and down to 0 by a cosine. Codes
    that carry no gradient let it through to the model as if nothing had been replaced (straight-through).
    """
    model, dictionaries = replacement.model, replacement.dictionaries
    if not model.predicts_tokens:
        raise SaekitError(f"model {model.name!r} predicts no tokens, so there is nothing to train it on")
    if steps < 1 or not 0 <= warmup <= 1:
        raise SaekitError(f"steps = {steps} must be at least 1, and warmup = {warmup} lie in 0..1")
    _check_stream(replacement, stream)
    source = SequenceSource(stream)
    batches = source.batches((), batch_size, seed)
    _prepare(dictionaries, next(source.batches(stream.hook_points, batch_size, seed)))
    own_weights = [p for d in dictionaries for p in d.parameters() if p.requires_grad]
    parameters = [
        {"params": list(model.module.parameters()), "weight_decay": 0.01},
        {"params": own_weights, "weight_decay": 0.0, "lr": dictionary_lr},
    ]
    optimizer = torch.optim.AdamW(parameters, lr, fused=True)
    risen = max(1, round(warmup * steps))

    def share(step: int) -> float:
        """Of the rates, at a step from 0."""
        return min(
            (step + 1) / risen, (1 + math.cos(math.pi * max(0, step - risen) / max(1, steps - risen))) / 2
        )

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step in range(1, steps + 1):
        batch = next(batches)
        assert batch.tokens is not None and batch.documents is not None
        own: list[Tensor] = []
        counted = batch.documents[:, 1:] >= 0
        given = model.inputs(batch.tokens, batch.documents >= 0)
        with replacement.spliced(batch.mask, straight_through=own):
            logits = model.logits(given)[:, :-1][counted]
        ce = nn.functional.cross_entropy(logits, batch.tokens[:, 1:][counted].to(logits.device))
        fit = torch.stack(own).sum()
        optimizer.zero_grad()
        (ce + reconstruction * fit).backward()
        optimizer.step()
        rate.step()
        for d in dictionaries:
            d.after_step()
        if on_step is not None:
            on_step(step, {"ce": ce.item(), "reconstruction": fit.item()})


def _check_stream(replacement: Replacement, stream: Any) -> None:
    """Raise unless the model can be run on its text, and fresh dictionaries find there what they read and write."""
    if not isinstance(stream, Stream):
        raise SaekitError(
            f"stream is of type {type(stream).__name__}, and the model changes while it is trained; give a live stream, harvest() without out"
        )
    fresh = [point for d in replacement.dictionaries if not d.prepared for point in d.points]
    missing = [point for point in fresh if point not in stream.hook_points]
    if missing:
        raise SaekitError(
            f"stream lacks {missing[0]!r}, a hook point of the replacement; harvest(model, text, replacement.points) has them all"
        )


def _prepare(dictionaries: Sequence[Dictionary], batch: ActivationBatch) -> None:
    """What fresh dictionaries take from data."""
    for d in dictionaries:
        if not d.prepared:
            if hasattr(d.selection, "observe"):
                raise SaekitError(
                    f"selection {d.config.selection[0]!r} learns its threshold from batches of rows, and is fresh; train() it before, or choose another"
                )
            d.prepare(d.gather([batch]))
