"""Texts of which something is said, and what a dictionary makes of each: the ground of probing, absorption and ablations.

A file of them has a line of JSON for each text: ``{"text": "...", "profession": "nurse", "gender": "f"}``. Fields other than
``text`` are attributes, whose values are short strings, numbers or booleans; ``document``, if there is one, names what a text is a
piece of.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit import stdlib
from saekit.dictionaries import Dictionary
from saekit.dictionaries.rows import Rows
from saekit.evaluate.core import controls_for, opened
from saekit.models import Model
from saekit.registry import nearest
from saekit.types import ActivationBatch, Codes, SaekitError

POOLS = ("mean", "last")
BATCH = 32  # texts of a pass
CONTEXT = 128  # tokens that are read of each text
CHARACTERS = 16  # of a token at most: later ones can't be among those that are read
FAMILIES, WINDOW = 6, 400  # of the built-in texts: classes, and characters
WORD = re.compile(r" ?[A-Za-z]{2,}")
LEAST = 10  # texts of a value, for it to be asked about


@dataclass(frozen=True)
class Texts:
    """``texts`` with the value of each attribute for each of them, and where they are from.

    ``documents``: what each is a piece of (None: it stands alone). Pieces of one document are never on both sides of a split.
    """

    name: str
    texts: list[str]
    attributes: dict[str, list[str]]
    documents: list[str] | None = None

    def sources(self) -> Int[Tensor, " texts"]:
        """A number for each document; texts that are the same are of one."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(own, len(numbers)) for own in self.documents or self.texts])

    def at(self, rows: Int[Tensor, " some"]) -> list[str]:
        """Some of the texts."""
        return [self.texts[i] for i in rows.tolist()]

    def only(self, attribute: str | None) -> str:
        """The attribute that is named, or the only one."""
        names = list(self.attributes)
        if attribute is None and len(names) != 1:
            raise SaekitError(
                f"texts have {len(names)} attributes ({', '.join(names)}); name the one to ask about"
            )
        if attribute is not None and attribute not in names:
            raise SaekitError(f"attribute {attribute!r} is none of the texts'{nearest(attribute, names)}")
        return attribute or names[0]

    def values(self, attribute: str) -> list[str]:
        """Values that ``LEAST`` texts have, the most frequent first; raises unless there are two."""
        own = self.attributes[self.only(attribute)]
        counts = Counter(sorted(own))
        found = sorted((v for v in counts if counts[v] >= LEAST), key=lambda v: -counts[v])
        if len(found) < 2:
            raise SaekitError(
                f"attribute {attribute!r} has {len(found)} value of at least {LEAST} texts (there are {dict(list(counts.items())[:6])}); give more texts"
            )
        return found


def read_texts(path: "str | Path") -> Texts:
    """The texts of a file of JSON lines; every line has the same fields."""
    path = Path(path)
    rows: list[dict[str, Any]] = []
    try:
        # JSON may hold other ends of lines than "\n", which text has within it
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SaekitError(f"labels {str(path)!r} can't be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SaekitError(f"line {number} of {str(path)!r} is no JSON: {error}") from None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("text"), str)
            or not row.keys() - {"text", "document"}
        ):
            raise SaekitError(
                f'line {number} of {str(path)!r} must hold "text" and at least one attribute, as {{"text": "...", "topic": "law"}}'
            )
        odd = next((name for name in row if not isinstance(row[name], str | int | float)), None)
        if odd is not None:
            raise SaekitError(
                f"line {number} of {str(path)!r} has {row[odd]!r} for {odd!r}; give a short string, a number, or true or false"
            )
        if rows and row.keys() != rows[0].keys():
            raise SaekitError(
                f"line {number} of {str(path)!r} has fields {sorted(row)}, and line 1 {sorted(rows[0])}; give all lines the same"
            )
        rows.append(row)
    if not rows:
        raise SaekitError(f"labels {str(path)!r} holds no line; give a text a line")
    fields = {name: [_value(row[name]) for row in rows] for name in rows[0]}
    documents = fields.pop("document", None)
    return Texts(str(path), fields.pop("text"), fields, documents)


def _value(given: Any) -> str:
    return given if isinstance(given, str) else json.dumps(given)


def families(n: int = 300, seed: int = 0) -> Texts:
    """Windows of the standard library's code, ``n`` of each of its largest families of modules.

    ``family`` is that of the module, ``self`` whether the window says "self".
    """
    found: dict[
        str, dict[str, str]
    ] = {}  # of each family its windows, each once, and the documents that they are of
    for document in stdlib.documents("all"):
        pieces = [document.text[i : i + WINDOW] for i in range(0, len(document.text) - WINDOW, WINDOW)]
        own = found.setdefault(stdlib.family(document.name), {})
        own.update((piece, document.name) for piece in pieces if piece.strip() and piece not in own)
    largest = sorted(found, key=lambda name: -len(found[name]))[:FAMILIES]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for name in largest:
        windows = list(found[name].items())
        drawn += [(name, *windows[i]) for i in torch.randperm(len(windows), generator=generator)[:n].tolist()]
    family, texts, documents = map(list, zip(*drawn, strict=True))
    said = ["yes" if re.search(r"\bself\b", text) else "no" for text in texts]
    return Texts("stdlib", texts, {"family": family, "self": said}, documents)


def letters(model: Model) -> Texts:
    """Every token of a model that is a word of two letters or more, with its first letter: to be read at the last token."""
    if model.tokenizer is None:
        raise SaekitError(
            f"model {model.name!r} has no tokenizer, so it has no words; give texts with --labels"
        )
    words = {model.tokenizer.decode([i]) for i in range(len(model.tokenizer))}
    alone = sorted(
        w
        for w in words
        if WORD.fullmatch(w) and len(model.tokenizer(w, add_special_tokens=False)["input_ids"]) == 1
    )
    words_of = [word.strip().lower() for word in alone]
    return Texts("tokens", alone, {"letter": [word[0] for word in words_of]}, words_of)


@dataclass(frozen=True)
class Labelled:
    """What a dictionary makes of texts: ``x`` is what stands where it writes, ``codes`` its own, both pooled over tokens.

    ``sources``: the document of each text (None: each stands alone).
    """

    dictionary: Dictionary
    x: Float[Tensor, "texts d_out"]
    codes: Codes
    sources: Int[Tensor, " texts"] | None = None

    def at(self, rows: Int[Tensor, " some"]) -> "Labelled":
        """Some of the texts, in the order given."""
        sources = None if self.sources is None else self.sources[rows]
        return Labelled(self.dictionary, self.x[rows], self.codes.at(rows), sources)


def halves(
    labels: Bool[Tensor, " rows"] | Sequence[str], seed: int, share: float = 0.8, sources: Int[Tensor, " rows"] | None = None
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:  # fmt: skip
    """Rows to fit on and rows to judge on, drawn by ``seed`` within each value; those of one source are on one side.

    A source of rows of several values is drawn with those of its first row's.
    """
    values = [str(v) for v in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    of = np.arange(len(values)) if sources is None else sources.numpy()
    _, first, which, sizes = np.unique(of, return_index=True, return_inverse=True, return_counts=True)
    generator, kept = torch.Generator().manual_seed(seed), np.zeros(len(first), dtype=bool)
    for value in sorted(set(values)):
        own = np.array([i for i, row in enumerate(first.tolist()) if values[row] == value], dtype=int)
        if len(own) == 1 and sizes[own[0]] > 1:
            raise SaekitError(
                f"all texts of label {value} are of one document, and what a probe is judged on is of another; give more"
            )
        order = own[torch.randperm(len(own), generator=generator).numpy()]
        before = sizes[order].cumsum() - sizes[order]
        taken = before + sizes[order] / 2 <= share * sizes[order].sum()
        kept[order[:-1]] = taken[:-1]  # one is left to judge on
    rows = torch.from_numpy(kept[which])
    return rows.nonzero()[:, 0], (~rows).nonzero()[:, 0]


def labels_of(texts: Texts, attribute: str, value: str) -> Bool[Tensor, " texts"]:
    """Which texts have a value."""
    return torch.tensor([own == value for own in texts.attributes[attribute]])


def difference(codes: Codes, labels: Bool[Tensor, " rows"]) -> Float[Tensor, " feature"]:
    """Mean code of true rows less that of false rows."""
    n = (int(labels.sum()), int((~labels).sum()))
    if not all(n):
        raise SaekitError(f"labels are true in {n[0]} rows and false in {n[1]}; give rows of both classes")
    sign = torch.where(labels, 1 / n[0], -1 / n[1]).double()
    out = torch.zeros(codes.n_features, dtype=torch.float64)
    return out.index_add_(0, codes.indices.long(), codes.values.detach().double() * sign[codes.row_ids()])


def balanced(labels: Bool[Tensor, " texts"], rows: Int[Tensor, " some"], seed: int) -> Int[Tensor, " fewer"]:
    """As many of some rows with the label as without, drawn by ``seed``, in their order."""
    generator = torch.Generator().manual_seed(seed)
    sides = [rows[labels[rows]], rows[~labels[rows]]]
    n = min(map(len, sides))
    return (
        torch.cat([side[torch.randperm(len(side), generator=generator)[:n]] for side in sides]).sort().values
    )


def split(
    labels: Bool[Tensor, " texts"], sources: Int[Tensor, " texts"] | None, seed: int
) -> tuple[Int[Tensor, " fitted"], Int[Tensor, " judged"]]:
    """Texts to fit on and to judge on, as many with the label as without."""
    train, test = (balanced(labels, rows, seed) for rows in halves(labels, seed, sources=sources))
    return train, test


def atoms_of(dictionary: Dictionary, suite: str) -> Float[Tensor, "feature d_out"]:
    """What a unit of each code writes, in the model's units; raises where a code times an atom is not what is written."""
    wiring, settings = dictionary.config.wiring
    if (
        not isinstance(dictionary, Rows)
        or len(dictionary.writes) > 1
        or dictionary.n_atoms != dictionary.n_features
    ):
        raise SaekitError(
            f"suite {suite!r} takes what features write at one place for codes times atoms, and wiring {wiring!r} writes otherwise; choose 'sparse_probing' or 'core'"
        )
    if dictionary.norm_out.by_rows:
        raise SaekitError(
            f"suite {suite!r} takes what features write for codes times atoms, and normalise = {settings.normalise!r} scales each row by itself; choose 'sparse_probing' or 'core'"
        )
    return dictionary.norm_out.directions(dictionary.W_dec).detach().float().cpu()


def about(
    suite: str, dictionary: Dictionary, model: Model, texts: Texts, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What a report was measured on."""
    return {
        "suite": suite, "model": model.identity(), "hook_point": ", ".join(dictionary.writes), "text": {"name": texts.name},
        "documents": len(texts.texts), **facts,
    }  # fmt: skip


@torch.no_grad()
def gather(
    dictionary: Dictionary, model: Model, texts: Texts, pool: str = "mean", controls: bool = True, seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Labelled]:  # fmt: skip
    """What a dictionary ("") and random ones of its width and L0 make of texts, in one pass of the model.

    ``pool``: the mean over a text's unmasked tokens, of the first ``CONTEXT``, or its last one.
    """
    if pool not in POOLS:
        raise SaekitError(f"pool {pool!r} is unknown; choose one of {', '.join(POOLS)}")
    if model.tokenizer is None:
        raise SaekitError(
            f"model {model.name!r} has no tokenizer, and labelled texts are words; give tokenizer= to load_model"
        )
    context = min(CONTEXT, model.context or CONTEXT)
    cut = beginnings(texts.texts, context)
    # short texts need no long rows; room is left for a start token and an end
    context = min(context, 2 + max(map(len, model.tokenizer(cut, add_special_tokens=False)["input_ids"])))
    stream, reads, writes = opened(
        dictionary, model, cut, None, tokens=None, batch_rows=BATCH, split="all", context=context, isolate=True
    )  # fmt: skip
    found: dict[str, _Pooled] = {}
    seen = torch.zeros(len(cut), dtype=torch.bool)
    for batch in stream:
        batch = first_rows(batch, seen)
        owner = _documents(batch)[batch.mask]
        y = torch.cat([batch.rows(point) for point in writes], -1)
        if not found:
            codes = dictionary.codes_of(batch, reads)
            beside = controls_for(dictionary, codes, seed) if controls else {}
            found = {name: _Pooled(d, len(cut)) for name, d in {"": dictionary, **beside}.items()}
        weight = _weights(owner, pool)
        for one in found.values():
            one.add(owner, weight, y, one.dictionary.codes_of(batch, reads))
        if on_batch:
            on_batch(int(seen.sum()), len(cut))
    empty = (~seen).nonzero()[:, 0]
    if len(empty):
        raise SaekitError(f"text {int(empty[0])} has no token that counts; leave it out")
    return {name: one.done(texts.sources()) for name, one in found.items()}


def beginnings(texts: Sequence[str], context: int) -> list[str]:
    """What of texts can be within their first ``context`` tokens."""
    return [text[: CHARACTERS * context] for text in texts]


def first_rows(batch: ActivationBatch, seen: Bool[Tensor, " texts"]) -> ActivationBatch:
    """The batch without rows of texts that a row before has begun; ``seen`` is brought up to date."""
    mask = batch.mask.clone()
    for i, own in enumerate(_documents(batch).amax(1).tolist()):
        if seen[own]:
            mask[i] = False
        seen[own] |= bool(mask[i].any())
    return ActivationBatch(batch.activations, mask, batch.tokens, batch.documents)


def _documents(batch: ActivationBatch) -> Int[Tensor, "batch seq"]:
    assert batch.documents is not None  # texts are words, whose batches know them
    return batch.documents


def _weights(owner: Int[Tensor, " rows"], pool: str) -> Float[Tensor, " rows"]:
    """What each token counts for in its text; tokens of a text stand side by side."""
    if pool == "last":
        last = torch.ones(len(owner), dtype=torch.bool)
        last[:-1] = owner[1:] != owner[:-1]
        return last.float()
    _, which, counts = owner.unique(return_inverse=True, return_counts=True)
    return 1 / counts[which].float()


class _Pooled:
    """Sums over the tokens of each text."""

    def __init__(self, dictionary: Dictionary, texts: int):
        self.dictionary, self.texts = dictionary, texts
        self.x: Tensor | None = None
        self.entries: list[tuple[Tensor, Tensor]] = []

    def add(self, owner: Tensor, weight: Tensor, y: Tensor, codes: Codes) -> None:
        if self.x is None:
            self.x = torch.zeros(self.texts, y.shape[1])
        self.x.index_add_(0, owner, weight[:, None] * y.float().cpu())
        row = codes.row_ids().cpu()
        key = owner[row] * codes.n_features + codes.indices.long().cpu()
        keys, which = key.unique(return_inverse=True)
        self.entries.append(
            (keys, torch.zeros(len(keys)).index_add_(0, which, codes.values.float().cpu() * weight[row]))
        )

    def done(self, sources: Int[Tensor, " texts"]) -> Labelled:
        keys, order = torch.cat([k for k, _ in self.entries]).sort(stable=True)
        values, n = torch.cat([v for _, v in self.entries])[order], self.dictionary.n_features
        keys, which = keys.unique(return_inverse=True)
        values = torch.zeros(len(keys)).index_add_(0, which, values)
        some = values != 0
        keys, values = keys[some], values[some]
        offsets = torch.zeros(self.texts + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(keys // n, minlength=self.texts).cumsum(0)
        codes = Codes(offsets, (keys % n).int(), values, n, (self.texts,))
        assert self.x is not None
        return Labelled(self.dictionary, self.x, codes, sources)
