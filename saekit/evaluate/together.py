"""What a language model loses when dictionaries stand in for its modules all at once."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from saekit import metrics
from saekit.dictionaries import Dictionary
from saekit.evaluate.core import (
    MAX_DOCUMENTS,
    Report,
    check_ablation,
    controls_for,
    mean_written,
    warn_of_training_text,
)
from saekit.evaluate.measure import Measure, Resampler
from saekit.harvest import HarvestConfig, Stream
from saekit.hooks import intervene
from saekit.hub import dictionary_of
from saekit.models import load_model
from saekit.replacement import Replacement
from saekit.types import ActivationBatch, SaekitError

UNITS = {
    "l0": "features per token", "ce_original": "nats per token", "ce_replaced": "nats per token",
    "ce_ablated": "nats per token", "ce_recovered": "1", "kl": "nats per token",
    "ce_with_errors": "nats per token", "kl_with_errors": "nats per token",
}  # fmt: skip


@torch.no_grad()
def evaluate_together(
    dictionaries: "Iterable[Dictionary | str | os.PathLike]",
    model: Any = "code-lm",
    text: Any = "stdlib",
    *,
    tokens: int = 65536,
    split: str = "held_out",
    controls: bool = True,
    ablation: str = "zero",
    batch_rows: int = 8,
    context: int | None = None,
    device: "str | torch.device | None" = None,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Report:
    """What a language model loses when all the dictionaries stand in at once, on held-out documents.

    ``ce_recovered`` is against zeros (or, by ``ablation``, the mean of the training data) in all their places; where they
    are most of a model, zeros leave so much worse than a uniform guess that anything recovers much. ``kl`` of the original to the replaced model; ``_with_errors``
    are those with error terms, where nothing should be lost. The control ``random`` has random dictionaries in the
    same places. ``l0`` is the sum of all, on the original's activations. Masked positions are not replaced.
    """
    check_ablation(ablation)
    found = [dictionary_of(d) for d in dictionaries]
    view = load_model(model, device=device)
    if not view.predicts_tokens:
        raise SaekitError(
            f"model {view.name!r} predicts no tokens, and CE and KL are all that dictionaries are measured by together; evaluate them one by one"
        )
    whole = Replacement(view, [d.to(view.device) for d in found])
    lengths = [d.context for d in whole.dictionaries if d.context is not None]
    context = min(lengths, default=None) if context is None else context
    config = HarvestConfig(
        tuple(whole.points), tokens=tokens, split=split, batch_rows=batch_rows, context=context
    )
    stream = Stream(view, text, config)
    for d in whole.dictionaries:
        warn_of_training_text(d, stream)
    random: Replacement | None = None
    sums: dict[str, list[np.ndarray]] = defaultdict(list)
    owners: list[np.ndarray] = []
    index: dict[int, int] = defaultdict(lambda: len(index) % MAX_DOCUMENTS)
    done = 0
    for batch, logits, given in stream.with_logits():
        assert logits is not None and batch.documents is not None and batch.tokens is not None
        counted = batch.mask[:, :-1] & (batch.documents[:, 1:] >= 0)
        codes = [d.codes_of(batch) for d in whole.dictionaries]
        if controls and random is None:
            random = Replacement(
                view, [_random(d, c, seed) for d, c in zip(whole.dictionaries, codes, strict=True)]
            )
        own, targets = logits[:, :-1][counted], batch.tokens[:, 1:][counted].to(logits.device)
        l0 = torch.zeros(batch.mask.shape, dtype=torch.float64)
        for c in codes:
            l0[batch.mask] += c.l0().double().cpu()
        sums["l0"].append(l0[:, :-1][counted].numpy())
        sums["ce_original"].append(metrics.cross_entropy(own, targets).cpu().numpy())
        passes = {
            "replaced": whole.spliced(batch.mask),
            "with_errors": whole.spliced(batch.mask, whole.errors(batch.activations)),
            "ablated": _ablated(whole, batch, ablation),
            **({"random": random.spliced(batch.mask)} if random is not None else {}),
        }
        for name, inside in passes.items():
            with inside:
                changed = view.logits(given)[:, :-1][counted]
            sums[f"ce_{name}"].append(metrics.cross_entropy(changed, targets).cpu().numpy())
            sums[f"kl_{name}"].append(metrics.kl(own, changed).cpu().numpy())
        owners.append(np.array([index[int(d)] for d in batch.documents[:, :-1][counted]], dtype=np.int64))
        done += batch.mask.numel()
        if on_batch:
            on_batch(done, tokens)
    if not owners:
        raise SaekitError(
            f"the text gives no unmasked token on the {split!r} side of its split; give more text, or split='all' (--split all)"
        )
    about = {
        "model": view.identity(), "text": stream.text_identity(), "hook_point": ", ".join(whole.writes), "documents": len(index),
        "tokens": done, "ablation": ablation, "context": getattr(stream, "context", None), "seed": seed, "split": split if stream.named else "all",
    }  # fmt: skip
    return Report(_measures(sums, np.concatenate(owners), min(len(index), MAX_DOCUMENTS), seed), about)


def _ablated(whole: Replacement, batch: ActivationBatch, ablation: str) -> Any:
    here = batch.mask[..., None]

    def constant(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda y: torch.where(here.to(y.device), value.to(y), y)

    if ablation == "mean":
        values = [m for d in whole.dictionaries for m in mean_written(d).split(d.wiring.parts_out, -1)]
    else:
        values = [torch.zeros(()) for _ in whole.writes]
    pairs = zip(whole.writes, values, strict=True)
    return intervene([(whole.model.site(point), constant(value)) for point, value in pairs])


def _random(d: Dictionary, codes: Any, seed: int) -> Dictionary:
    out = controls_for(d, codes, seed)["random"]
    out.reads, out.writes = d.reads, d.writes
    return out


def _measures(
    sums: Mapping[str, Sequence[np.ndarray]], owners: np.ndarray, documents: int, seed: int
) -> dict[str, Measure]:
    """Means over tokens, with intervals over documents."""
    n = np.bincount(owners, minlength=documents).astype(np.float64)
    c = {key: np.bincount(owners, np.concatenate(parts), minlength=documents) for key, parts in sums.items()}
    resampler = Resampler(documents, seed)

    def recovered(original: Any, replaced: Any, ablated: Any) -> Any:
        return (ablated - replaced) / (ablated - original)

    def measured(statistic: Callable[..., Any], *names: str) -> tuple[float, tuple[float, float] | None]:
        columns = [n if name == "n" else c[name] for name in names]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(statistic(*(column.sum() for column in columns))), resampler.interval(
                statistic, *columns
            )

    def names_of(key: str, run: str) -> tuple[str, ...]:
        return (
            ("ce_original", f"ce_{run}", "ce_ablated")
            if key == "ce_recovered"
            else (key.replace("replaced", run), "n")
        )

    out = {}
    for key, unit in UNITS.items():
        statistic = recovered if key == "ce_recovered" else np.divide
        name = f"{key}_replaced" if key == "kl" else key
        value, interval = measured(statistic, *names_of(name, "replaced"))
        compared = key in ("ce_replaced", "ce_recovered", "kl") and "ce_random" in c
        control = {"random": measured(statistic, *names_of(name, "random"))[0]} if compared else {}
        out[key] = Measure(value, int(n.sum()), unit, interval, control)
    return out
