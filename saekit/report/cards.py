"""Features as cards: what they fire on in a text, what they write, what is said of them, and which are alike."""

import mmap
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations import Store
from saekit.autointerp import explanation
from saekit.autointerp.explanation import Explanation
from saekit.autointerp.neurons import directions_of, logits_of
from saekit.dictionaries import Dictionary
from saekit.dictionaries.sequences import Sequences
from saekit.harvest import harvest
from saekit.hub import native
from saekit.models import Model, load_model
from saekit.report.contexts import ContextCollector, Looks
from saekit.report.nearest import CoFiring, nearest_by_decoder
from saekit.report.page import Explained, FeatureCard, Number, feature_card
from saekit.tokens import documents, in_text
from saekit.types import ActivationBatch, SaekitError

Logits = tuple[list[tuple[str, Number]], list[tuple[str, Number]]]
N_LOGITS = 10
DENSITY_TOKENS = 65_536  # that tell which features fire, where no evaluation does
BATCH_ROWS = 4  # of a forward pass: a page needs no speed that costs memory
CELLS = 1 << 24  # of logits at once: 64 MiB


@dataclass(frozen=True)
class Reading:
    """A dictionary with the model and the ``tokens`` of a text that it is shown on.

    ``acts`` is the store to read, if one holds this text; else the text is harvested.
    """

    dictionary: Dictionary
    view: Model
    text: Any
    split: str
    acts: str | None
    tokens: int

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Whole sequences, with their tokens."""
        if self.acts is None or not (Path(self.acts) / "manifest.json").is_file():
            if self.text is None:
                raise SaekitError(
                    "this dictionary was trained on text given in Python, and its store is gone; name a text with text= (--text)"
                )
            yield from harvest(
                self.view,
                self.text,
                self.dictionary.reads,
                tokens=self.tokens,
                split=self.split,
                context=self.dictionary.context,
                batch_rows=BATCH_ROWS,
            )
            return
        seen, store = 0, Store(self.acts, verify_seconds=0)
        for batch in store.sequences(BATCH_ROWS):
            if seen >= self.tokens:
                return
            seen += batch.mask.numel()
            yield batch
            _forget(store)


def _forget(store: Store) -> None:
    """Give back the pages read: mapped files count as the process's memory, all of a store that was read through."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for shard in store.shards:
        for name in shard.header:
            base = shard.array(name).base
            if isinstance(base, mmap.mmap):
                base.madvise(mmap.MADV_DONTNEED)


def reading(
    dictionary: Dictionary,
    model: Any,
    text: Any,
    tokens: int,
    config: Mapping[str, Any],
    device: "str | torch.device | None" = None,
) -> Reading:
    """What a dictionary is shown on: by default the model and text that it was trained on, out of its run's store.

    ``config`` is the run's, {} where there is none.
    """
    own_model, own_text = native.origin(dictionary.card)
    data = dictionary.card.get("data", {})
    view = load_model(model or own_model, device=device)
    # the store it was trained on shows the same data, unless another text or model is asked for
    own = text is None and view.identity() == data.get("model")
    split = data.get("text", {}).get("split", "train") if text is None else "train"
    if not dictionary.reads:
        raise SaekitError(
            "the dictionary names no hook point, so there is no model to show it on; set its reads and writes"
        )
    acts = config.get("source", {}).get("acts") if own else None
    return Reading(dictionary, view, text if text is not None else own_text, split, acts, tokens)


@torch.no_grad()
def codes_of(dictionary: Dictionary, batch: ActivationBatch) -> Any:
    """Codes of all positions of a batch, masked ones too; raises where activations aren't finite."""
    x = torch.cat([batch.activations[point] for point in dictionary.reads], -1)
    if not torch.isfinite(x[batch.mask]).all():
        raise SaekitError(
            f"activations at {dictionary.reads[0]!r} hold NaN or Inf; find what makes the model overflow"
        )
    return dictionary.encode(x.to(dictionary.device))


def cards(
    source: Reading,
    features: Sequence[int],
    seed: int = 0,
    explanations: Mapping[int, Sequence[Explained]] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[list[FeatureCard], int]:
    """The cards of features, and on how many tokens co-firing was counted.

    ``seed`` decides which contexts are drawn; ``on_batch(done, total)`` is told the tokens read.
    """
    dictionary, view = source.dictionary, source.view
    collector: ContextCollector | None = None
    together, done, last = CoFiring(dictionary.n_features, features), 0, -1
    for batch in source:
        collector = collector or ContextCollector(
            dictionary.n_features, features, seq_len=batch.mask.shape[1], seed=seed,
            looks_back=isinstance(dictionary, Sequences),
        )  # fmt: skip
        if batch.tokens is None or view.tokenizer is None:
            raise SaekitError(
                f"model {view.name!r} reads no tokens, and the report shows features on their tokens; evaluate it, or see saekit.fires"
            )
        codes = codes_of(dictionary, batch)
        collector.add(batch.tokens, batch.documents, batch.mask, codes, _looks(dictionary, batch))
        together.add(batch.mask, codes)
        last = last if batch.documents is None else max(last, int(batch.documents.max()))
        done += batch.mask.numel()
        if on_batch is not None:
            on_batch(done, source.tokens)
    if collector is None:
        raise SaekitError("the text gives no tokens to show; give more text")
    beside, counted = together.nearest(), together.n_tokens
    del together  # it is large, and what comes next is too
    spell = speller(view.tokenizer)
    names = _document_names(source.text, source.split, last)
    parts = zip(
        collector.each(),
        _logits(dictionary, view, features, spell),
        nearest_by_decoder(dictionary, features),
        beside,
        strict=True,
    )
    out = [
        feature_card(
            one, spell, *logits, lambda document: names.get(document, f"document {document}"),
            nearest=tuple(alike), together=tuple(near), explanations=tuple((explanations or {}).get(one.index, ())),
        )
        for one, logits, alike, near in parts
    ]  # fmt: skip
    return out, counted


def _looks(dictionary: Dictionary, batch: ActivationBatch) -> Looks | None:
    """What positions add to a feature's activation, of a dictionary whose features look back."""
    if not isinstance(dictionary, Sequences):
        return None
    lookup = dictionary.looking(torch.cat([batch.activations[point] for point in dictionary.reads], -1))

    def looks(features: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return lookup(*map(torch.from_numpy, (features, rows, queries))).float().cpu().numpy()

    return looks


def explained(
    given: "Sequence[Explanation] | str | Path | None", folder: Path | None, dictionary: Dictionary
) -> dict[int, list[Explained]]:
    """What is said of each feature: as given, of a file, or of the ``explanations.json`` beside the dictionary."""
    if given is None:
        beside = folder / explanation.FILE if folder is not None else None
        given = beside if beside is not None and beside.is_file() else ()
    listed = explanation.load_of(dictionary, given) if isinstance(given, str | Path) else given
    explanation.check_features(listed, dictionary, "explanations")
    out: dict[int, list[Explained]] = {}
    for one in listed:
        out.setdefault(one.feature, []).append(Explained(one.text, one.method, one.scores, one.label))
    return out


def speller(tokenizer: Any) -> Callable[[int], str]:
    """The text of a token by itself; bytes that make no character alone are spelled out, as ``\\xe2``."""
    within = in_text(tokenizer.decode, len(tokenizer))

    @cache
    def spell(token: int) -> str:
        text = within([token])
        if "\ufffd" not in text:
            return text
        piece = tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str) or re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return piece or text
        raw = [_bytes().get(sign) for sign in piece]
        if None in raw:
            return text
        return bytes(byte for byte in raw if byte is not None).decode(errors="backslashreplace")

    return spell


@cache
def _bytes() -> dict[str, int]:
    """What the signs of byte-level tokenizers stand for: printable bytes for themselves, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _document_names(text: Any, split: str, last: int) -> dict[int, str]:
    """Names of the documents up to the last one read, where the text has names."""
    if not isinstance(text, str):
        return {}
    read = islice(documents(text, split), last + 1)
    return {i: d.name for i, d in enumerate(read) if hasattr(d, "name")}


@torch.no_grad()
def _logits(
    dictionary: Dictionary, view: Model, features: Sequence[int], spell: Callable[[int], str]
) -> list[Logits]:
    """The next tokens that each feature's direction favours most and least, with their logits about the mean.

    None of a feature that writes no one direction in the model's stream.
    """
    written = directions_of(dictionary, features)
    way = None if written is None else logits_of(view, written)
    if way is None:
        return [([], []) for _ in features]
    out: list[Logits] = []
    for part in way.directions.split(max(1, CELLS // len(way.W_U))):
        logits = way.effects(part)
        ends = [_ranked(logits.topk(N_LOGITS, largest=most), spell) for most in (True, False)]
        out += zip(*ends, strict=True)
    return out


def _ranked(best: Any, spell: Callable[[int], str]) -> list[list[tuple[str, Number]]]:
    values, tokens = (part.cpu().tolist() for part in best)
    return [
        [(spell(token), value) for token, value in zip(*row, strict=True)]
        for row in zip(tokens, values, strict=True)
    ]


def density_over(dictionary: Dictionary, source: Iterable[ActivationBatch]) -> Tensor:
    """How often each feature fires over the first ``DENSITY_TOKENS`` unmasked positions."""
    counts, n = torch.zeros(dictionary.n_features, dtype=torch.float64), 0
    for batch in source:
        codes = dictionary.codes_of(batch)
        n += codes.rows
        counts += codes.firing_counts().cpu()
        if n >= DENSITY_TOKENS:
            break
    return counts / max(n, 1)


def spread(density: Tensor, n: int, first: Collection[int] = ()) -> list[int]:
    """``n`` features that fire, at evenly spaced ranks of density, so that rare and common ones are all seen.

    All of them, if fewer fire; those of ``first`` before others.
    """
    order = density.argsort(descending=True, stable=True).tolist()
    alive = order[: int((density > 0).sum())] or order

    def evenly(pool: list[int], some: int) -> list[int]:
        at = torch.linspace(0, len(pool) - 1, min(some, len(pool))).round().long()
        return [pool[place] for place in at.tolist()]

    chosen = evenly([f for f in alive if f in first], n)
    rest = evenly([f for f in alive if f not in first], n - len(chosen))
    return sorted(chosen + rest)
