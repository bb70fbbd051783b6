"""Unlearning by clamping: features of what is to be forgotten, set below 0 where they fire, and what that costs elsewhere.

After SAEBench (Karvonen et al. 2025, 2503.09532) and Farrell et al. 2024 (2410.19278), for any attribute of texts: the loss
takes the place of multiple-choice questions. Features, and how hard they are clamped, are chosen on other texts than the
result is measured on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit import metrics
from saekit.dictionaries import Dictionary
from saekit.evaluate.core import Report, controls_for, opened
from saekit.evaluate.labelled import CONTEXT, LEAST, Texts, about, beginnings, first_rows, halves, labels_of
from saekit.evaluate.measure import Measure, Resampler, by_source
from saekit.harvest import Stream
from saekit.interventions import Edit, When, intervened
from saekit.models import Model
from saekit.types import Codes, SaekitError

CLAMPED, TIMES = (
    (10, 20),
    (1.0, 4.0, 16.0),
)  # features at once, and to minus how many times their mean where they fire
RARE = 0.01  # share of other texts' tokens on which a feature may fire
SPARED = 0.01  # by how much of itself the loss on other texts may rise
RANDOM = "random features"  # as rare ones, of those that fire on what is to be forgotten
BATCH = 16


@torch.no_grad()
def unlearning(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str | None = None, *,
    value: str | None = None, controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """By how much the loss rises on texts with a value of an attribute (None: its most frequent), and on the others.

    ``forget`` and ``retain`` are in nats per token, on texts that nothing was chosen by. Of ``CLAMPED`` features, those that
    fire most on what is to be forgotten and on at most ``RARE`` of other tokens, and ``TIMES``, it is the choice that raises
    the loss most where the others' rises by at most ``SPARED`` of itself; where none does, nothing is clamped.
    """
    if not model.predicts_tokens:
        raise SaekitError(
            f"model {model.name!r} predicts no tokens, and unlearning is measured by their loss; choose another suite"
        )
    asked = texts.only(attribute)
    value = texts.values(asked)[0] if value is None else value
    forget = labels_of(texts, asked, value)
    if min(int(forget.sum()), int((~forget).sum())) < LEAST:
        raise SaekitError(
            f"value {value!r} of attribute {asked!r} is that of {int(forget.sum())} of {len(forget)} texts; choose one that {LEAST} or more have, and as many others not"
        )
    fitted, judged = halves(forget, seed, share=0.5, sources=texts.sources())
    rates = _rates(model, dictionary, texts, fitted, forget)
    tries = {"": (dictionary, rates.ranked())}
    if controls:
        tries[RANDOM] = (dictionary, rates.ranked(seed))
        random = controls_for(dictionary, rates.codes, seed)["random"]
        random.reads, random.writes = dictionary.reads, dictionary.writes
        tries["random"] = (random, _rates(model, random, texts, fitted, forget).ranked())
    total, done, rises, clamped = len(tries) * (1 + len(CLAMPED) * len(TIMES)), 0, {}, {}

    def told() -> None:
        nonlocal done
        done += 1
        if on_batch:
            on_batch(min(done, total), total)

    before = {
        name: losses(model, dictionary, texts.at(rows), [])
        for name, rows in (("fitted", fitted), ("judged", judged))
    }
    for name, (one, ranked) in tries.items():
        clamped[name] = _chosen(model, one, texts.at(fitted), forget[fitted], ranked, before["fitted"], told)
        rises[name] = losses(model, one, texts.at(judged), clamped[name]).nats - before["judged"].nats
        told()
    facts = {
        "attribute": asked,
        "value": value,
        "clamped": {str(edit.feature): edit.set for edit in clamped[""]},
        "seed": seed,
    }
    measured = _measures(rises, before["judged"].tokens, forget[judged], texts.sources()[judged], seed)
    return Report(measured, about("unlearning", dictionary, model, texts, facts))  # fmt: skip


@dataclass(frozen=True)
class Losses:
    """Sums over each text's tokens."""

    nats: Float[Tensor, " texts"]
    tokens: Float[Tensor, " texts"]

    def mean(self, some: Bool[Tensor, " texts"]) -> float:
        """Nats per token over some texts."""
        return (self.nats[some].sum() / self.tokens[some].sum()).item()


@torch.no_grad()
def losses(model: Model, dictionary: Dictionary, texts: Sequence[str], edits: Sequence[Edit]) -> Losses:
    """Next-token losses of texts where features are edited; of each its first ``CONTEXT`` tokens."""
    stream = _stream(model, dictionary, texts)
    nats, tokens, seen = torch.zeros(len(texts)), torch.zeros(len(texts)), torch.zeros(len(texts), dtype=torch.bool)  # fmt: skip
    for given, batch in stream.inputs():
        batch = first_rows(batch, seen)
        assert batch.tokens is not None and batch.documents is not None  # texts are words
        with intervened(model, [(dictionary, list(edits))], masked=True):
            logits = model.logits(given)
        counted = batch.mask[:, 1:]
        owner = batch.documents[:, 1:][counted]
        lost = metrics.cross_entropy(
            logits[:, :-1][counted.to(logits.device)], batch.tokens[:, 1:][counted].to(logits.device)
        )
        nats.index_add_(0, owner, lost.float().cpu())
        tokens.index_add_(0, owner, torch.ones(len(owner)))
    return Losses(nats, tokens)


def _stream(model: Model, dictionary: Dictionary, texts: Sequence[str]) -> Stream:
    context = min(CONTEXT, model.context or CONTEXT)
    cut = beginnings(texts, context)
    return opened(dictionary, model, cut, None, tokens=None, batch_rows=BATCH, split="all", context=context, isolate=True)[0]  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Of each feature the share of tokens on which it fires, in texts to forget and others, and its mean where it does."""

    forget: Float[Tensor, " feature"]
    retain: Float[Tensor, " feature"]
    active: Float[Tensor, " feature"]
    codes: Codes  # of the last batch

    def ranked(self, seed: int | None = None) -> list[tuple[int, float]]:
        """Rare features that fire on what is to be forgotten and their means, the most frequent there first, or in an order drawn by ``seed``."""
        score = self.forget
        if seed is not None:
            score = torch.rand(len(score), generator=torch.Generator().manual_seed(seed)) * (score > 0)
        score = score * (self.retain <= RARE)
        order = score.sort(descending=True, stable=True).indices[: int((score > 0).sum())]
        return [(i, float(self.active[i])) for i in order.tolist()]


def _rates(model: Model, dictionary: Dictionary, texts: Texts, rows: Int[Tensor, " some"], forget: Bool[Tensor, " texts"]) -> Rates:  # fmt: skip
    n, own = dictionary.n_features, forget[rows]
    fired, sums, tokens = torch.zeros(2, n), torch.zeros(n), torch.zeros(2)
    seen = torch.zeros(len(rows), dtype=torch.bool)
    for batch in _stream(model, dictionary, texts.at(rows)):
        batch = first_rows(batch, seen)
        assert batch.documents is not None
        codes = dictionary.codes_of(batch)
        row, feature = codes.active()
        side = own[batch.documents[batch.mask]].long()
        fired.view(-1).index_add_(0, (side[row.cpu()] * n + feature.cpu()), torch.ones(len(row)))
        tokens += torch.bincount(side, minlength=2)
        sums.index_add_(0, codes.indices.long().cpu(), codes.values.float().cpu())
    share = fired / tokens.clamp_min(1)[:, None]
    return Rates(share[1], share[0], sums / fired.sum(0).clamp_min(1), codes)


def _chosen(
    model: Model, dictionary: Dictionary, texts: Sequence[str], forget: Bool[Tensor, " texts"],
    ranked: Sequence[tuple[int, float]], before: Losses, told: Callable[[], None],
) -> list[Edit]:  # fmt: skip
    """The edits that raise the loss on what is to be forgotten most, while the others' is spared; none where none does."""
    best, chosen = 0.0, list[Edit]()
    for n in CLAMPED:
        for times in TIMES:
            edits = [Edit(i, set=-times * mean, when=When(i)) for i, mean in ranked[:n] if mean > 0]
            after = losses(model, dictionary, texts, edits) if edits else before
            told()
            spared = after.mean(~forget) <= (1 + SPARED) * before.mean(~forget)
            rise = after.mean(forget) - before.mean(forget)
            if spared and rise > best:
                best, chosen = rise, edits
    return chosen


def _measures(
    rises: dict[str, Float[Tensor, " texts"]], tokens: Float[Tensor, " texts"], forget: Bool[Tensor, " texts"],
    sources: Int[Tensor, " texts"], seed: int,
) -> dict[str, Measure]:  # fmt: skip
    out = {}
    for key, some in (("forget", forget), ("retain", ~forget)):
        n = tokens[some].double().numpy()
        values = {name: float(rise[some].sum()) / n.sum() for name, rise in rises.items()}
        sums = by_source(sources[some].numpy(), rises[""][some].double().numpy(), n)
        interval = Resampler(len(sums[0]), seed).interval(lambda a, b: a / b, *sums)
        out[key] = Measure(values.pop(""), int(np.round(n.sum())), "nats per token", interval, values)
    return out
