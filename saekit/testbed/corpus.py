"""A seeded text of made-up words in which every line holds what concepts look for, and near misses of it.

About 2000 word types: pronounceable fillers of a seed's own, and families that are planted. Text is lines of exactly
``WIDTH`` tokens and of whole words; documents are 4 to 24 lines, begin on a row of their own, and have a topic that
decides which topic's words and which fillers are frequent. No filler holds a planted word, or part of a pattern.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy import ndarray
from torch import Tensor

from saekit.types import SaekitError

WIDTH = 32  # tokens of a line
LINES = 4  # of a row
DOCUMENTS = 680  # about 300 000 tokens
PIECE = 6  # letters of a token; longer words are cut evenly, into 3 tokens at most
PAD = "<pad>"
TOPICS = 8  # of documents; the first ones are those of words below
GENERAL = 700  # common words of all documents; each topic has as many of its own as the rest gives
WORDY = 0.75  # share of lines with two-letter words, which are so large a share of their fillers
SMALL = 0.52

COLOURS = ("black", "blue", "brown", "green", "purple", "yellow")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
UNITS = ("litres", "miles", "pounds")
TOPIC_WORDS = {
    "sea": ("anchor", "captain", "deck", "gull", "harbour", "mast", "port", "rudder", "sail", "ship", "tide", "wave"),
    "kitchen": ("bake", "boil", "bowl", "butter", "flour", "knife", "oven", "pan", "pepper", "salt", "spoon", "sugar"),
    "court": ("appeal", "bail", "crime", "judge", "jury", "lawyer", "oath", "plea", "prison", "trial", "verdict", "witness"),
}  # fmt: skip
# no filler holds these
PATTERNS = ("ish", "hood", "wax", "hal", "mola", "oil", "olive", "bank", "river", "quagga", "stone", "dodo")
HANDWRITTEN = {
    *PATTERNS,
    *COLOURS,
    *DAYS,
    *UNITS,
    *(word for words in TOPIC_WORDS.values() for word in words),
}


class Phrase(NamedTuple):
    """Words that ``share`` of the lines hold; a line holds at most one phrase of a ``family``.

    ``slots``: words and names of pools; ``=`` repeats the word before it. Words of one pool differ from each other.
    A topic's phrases are frequent in its documents and rare in others, ``share`` is the mean.
    ``scattered``: other words may stand between; ``first``: the phrase opens its line.
    """

    family: str
    share: float
    slots: str
    scattered: bool = False
    first: bool = False


PHRASES = (
    Phrase("hal", 0.10, "hal"), Phrase("hal", 0.05, "hall"),
    Phrase("question", 0.10, "?"),
    Phrase("colour", 0.11, "colour"),
    Phrase("day", 0.11, "day"),
    Phrase("capitals", 0.10, "MOLA"), Phrase("capitals", 0.05, "mola"), Phrase("capitals", 0.04, "Mola"),
    Phrase("ish", 0.11, "ish"), Phrase("ish", 0.05, "ish inside"),
    Phrase("hood", 0.10, "hood"), Phrase("hood", 0.04, "hood inside"),
    Phrase("wax", 0.11, "wax"),
    Phrase("hyphen", 0.10, "hyphen"),
    Phrase("oil", 0.11, "olive oil"), Phrase("oil", 0.05, "oil"), Phrase("oil", 0.05, "olive"),
    Phrase("unit", 0.11, "count unit"), Phrase("unit", 0.05, "unit"), Phrase("unit", 0.05, "count"),
    Phrase("bank", 0.11, "bank"), Phrase("bank", 0.06, "river bank"), Phrase("bank", 0.04, "river"),
    *(Phrase(topic, share, " ".join([topic] * n), scattered=True)
      for topic in TOPIC_WORDS for n, share in ((1, 0.03), (2, 0.03), (3, 0.05), (4, 0.04), (5, 0.02))),
    Phrase("opening", 0.12, "name", first=True),
    Phrase("name", 0.11, "name =", scattered=True), Phrase("name", 0.07, "name"),
    Phrase("year", 0.10, "year"),
    Phrase("decimal", 0.10, "decimal"),
    Phrase("ordinal", 0.10, "ordinal"),
    Phrase("quoted", 0.05, '" plain plain "'), Phrase("quoted", 0.05, '" plain plain plain plain "'),
    Phrase("echo", 0.10, "plain ="),
    Phrase("st", 0.11, "st"), Phrase("stone", 0.10, "stone"),
    Phrase("quagga", 0.0026, "quagga"),
)  # fmt: skip


class Tokenizer:
    """Words behind a space each, in whole or in pieces; token 0 is padding, and no text holds it.

    ``texts`` are the tokens as they stand in text: the first piece of a word begins with its space, so that the texts
    of tokens side by side are the text.
    """

    pad_token_id = 0
    all_special_ids = (0,)

    def __init__(self, words: Sequence[str]):
        pieces = [cut(word) for word in words]
        self.texts = [PAD, *sorted({piece for own in pieces for piece in own})]
        ids = {text: i for i, text in enumerate(self.texts)}
        self._ids = {word: [ids[p] for p in own] for word, own in zip(words, pieces, strict=True)}

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.texts)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, whose words must be the world's."""
        words = text.split()
        unknown = next((word for word in words if word not in self._ids), None)
        if unknown is not None:
            raise SaekitError(
                f"text has the word {unknown!r}, which this world lacks; use words of its texts"
            )
        return [i for word in words for i in self._ids[word]]

    def decode(self, ids: Sequence[int] | Int64[Tensor, " seq"]) -> str:
        """The text of token ids, exactly."""
        return "".join(self.texts[int(i)] for i in ids)

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list]:
        """``input_ids`` of a text, or of each of several; there are no special tokens to add."""
        return {"input_ids": self.encode(text) if isinstance(text, str) else [self.encode(t) for t in text]}


@dataclass(frozen=True)
class Corpus:
    """Rows of ``LINES`` lines; a document begins on a row of its own, and its last row is padded.

    ``documents`` holds a token's document, -1 for padding; ``mask`` is false there. ``texts`` are the documents.
    """

    tokens: Int64[Tensor, "row seq"]
    documents: Int64[Tensor, "row seq"]
    mask: Bool[Tensor, "row seq"]
    tokenizer: Tokenizer
    texts: tuple[str, ...]


def cut(word: str) -> list[str]:
    """The tokens of a word: the word behind its space, or if it is long two or three pieces of about equal length."""
    n = min(3, -(-len(word) // PIECE))
    ends = [len(word) * i // n for i in range(n + 1)]
    pieces = [word[a:b] for a, b in pairwise(ends)]
    return [" " + pieces[0], *pieces[1:]]


def pools(seed: int) -> dict[str, list[str]]:
    """Words to draw from, by the names that phrases use; ``common`` are fillers of one token, ``long`` of several."""
    rng, taken = np.random.default_rng([seed, 0]), set[str]()
    signs = {"C": [*"bdfgklmnprstv"], "V": [*"aeiou"], "E": [*"lnrs"]}

    def made(n: int, *patterns: str) -> list[str]:
        """New words by patterns, whose signs stand for one of several strings, and other letters for themselves."""
        out: list[str] = []
        while len(out) < n:
            pattern = patterns[len(out) % len(patterns)]
            parts = [signs[s][rng.integers(len(signs[s]))] if s in signs else s for s in pattern]
            word = "".join(parts)
            plain = "".join(part for part, s in zip(parts, pattern, strict=True) if s in signs)
            if word not in taken and not any(known in plain for known in HANDWRITTEN):
                taken.add(word)
                out.append(word)
        return out

    common = made(GENERAL + 60 * TOPICS, "CVCV", "CVCVE", "CVCVE")
    # where longer words are cut, so that they share pieces with each other and with words
    signs |= {"4": [w for w in common if len(w) == 4], "5": [w for w in common if len(w) == 5]}
    signs |= {"T": made(30, "CVCV"), "U": made(20, "CVCVE")}
    return {
        "small": made(40, "CV"),
        "common": common,
        "plain": common[:300],
        "long": made(280, "4T", "5U", "4U", "4UU"),
        "name": [word.title() for word in made(40, "CVCVE", "CVCVCV", "CVCVCVCVE")],
        "ish": made(24, "CVCish", "4Cish", "5VCish"),
        "ish inside": made(8, "CishVCV", "CVCishVCV"),
        "hood": made(20, "CVhood", "4hood", "4Ehood"),
        "hood inside": made(6, "hoodVCV", "CVhoodVE"),
        "wax": made(24, "waxVE", "CVwaxV", "CVCVwax", "CVCVwaxVCV"),
        "st": made(20, "stVCV", "stVCVE", "stVCVCV"),
        "hyphen": made(24, "4-T", "CV-CVCVE"),
        "year": [str(year) for year in sorted(rng.choice(np.arange(1100, 2100), 40, replace=False))],
        "count": [str(count) for count in range(12, 92, 2)],
        "decimal": [f"{n / 100:.2f}" for n in sorted(rng.choice(np.arange(101, 999), 40, replace=False))],
        "ordinal": [f"{n}th" for n in (*range(4, 21), *range(24, 31))],
        "colour": list(COLOURS), "day": list(DAYS), "unit": list(UNITS),
        **{topic: list(words) for topic, words in TOPIC_WORDS.items()},
    }  # fmt: skip


def corpus(seed: int = 0, documents: int = DOCUMENTS) -> Corpus:
    """A text of its seed; 100 documents are about 45 000 tokens."""
    if documents < 1:
        raise SaekitError(f"documents = {documents} must be at least 1")
    vocabulary = _Vocabulary(pools(seed))
    rng = np.random.default_rng([seed, 1])
    length = rng.integers(4, 25, documents)  # in lines
    topic = np.repeat(rng.permutation(np.arange(documents) % TOPICS), length)
    planted = _planted(rng, vocabulary, topic)
    fillers = _fillers(rng, vocabulary, topic, planted)
    line, key, place, word = (np.concatenate(part) for part in zip(planted, fillers, strict=True))
    word = word[np.lexsort((place, key, line))]
    pieces = vocabulary.pieces[word]
    lines = pieces[pieces >= 0].reshape(-1, WIDTH)

    document, first = np.repeat(np.arange(documents), length), length.cumsum() - length
    inside = np.arange(len(lines)) - first[document]
    rows = -(-length // LINES)
    at = (rows.cumsum() - rows)[document] * LINES + inside
    tokens = np.zeros((rows.sum() * LINES, WIDTH), dtype=np.int64)
    owner = np.full_like(tokens, -1)
    tokens[at], owner[at] = lines, document[:, None]
    texts = np.array(vocabulary.tokenizer.texts, dtype=object)[lines]
    return Corpus(
        torch.from_numpy(tokens.reshape(-1, LINES * WIDTH)),
        torch.from_numpy(owner.reshape(-1, LINES * WIDTH)),
        torch.from_numpy((owner >= 0).reshape(-1, LINES * WIDTH)),
        vocabulary.tokenizer,
        tuple("".join(part.ravel()) for part in np.split(texts, first[1:])),
    )


class _Vocabulary:
    """Word types by number: the pools as numbers, and the tokens of each word, [words, 3], -1 behind the last."""

    def __init__(self, pools: dict[str, list[str]]):
        literal = {slot for phrase in PHRASES for slot in _slots(phrase, pools) if slot not in pools}
        words = sorted({*literal, *(word for pool in pools.values() for word in pool)})
        number = {word: i for i, word in enumerate(words)}
        self.tokenizer = Tokenizer(words)
        self.pieces = np.full((len(words), 3), -1, dtype=np.int64)
        for word, i in number.items():
            own = self.tokenizer.encode(word)
            self.pieces[i, : len(own)] = own
        self.size = (self.pieces >= 0).sum(1)
        self.pools = {name: np.array([number[word] for word in pool]) for name, pool in pools.items()}
        self.pools |= {word: np.array([number[word]]) for word in literal}


def _slots(phrase: Phrase, pools: dict) -> list[str]:
    """The slots of a phrase without repeats; a phrase may be the name of one pool, of two words."""
    return [phrase.slots] if phrase.slots in pools else [s for s in phrase.slots.split() if s != "="]


_Words = tuple[ndarray, ndarray, ndarray, ndarray]  # line, key, place behind equal keys, word; all [words]


def _planted(rng: np.random.Generator, vocabulary: _Vocabulary, topic: Int64[ndarray, " line"]) -> _Words:
    """The words of phrases; a line that would grow too long is left without some of its phrases."""
    n, names = len(topic), list(TOPIC_WORDS)
    lot: dict[str, ndarray] = {}  # place of each line in the shares of a family, each as often as the other
    parts: list[list[ndarray]] = []
    phrase_line: list[ndarray] = []
    phrase_size: list[ndarray] = []
    for phrase in PHRASES:
        family = phrase.family
        u = lot.setdefault(family, (rng.permutation(n) + 0.5) / n)
        share = np.full(n, phrase.share)
        if family in names:
            share *= np.where(topic == names.index(family), 4.0, 4 / 7)
        lines = ((u >= 0) & (u < share)).nonzero()[0]
        lot[family] = np.where(u < share, -1, u - share)  # what is left to the family's next phrase
        words = _drawn(rng, vocabulary, phrase, len(lines))
        key = rng.random(words.shape if phrase.scattered else (len(lines), 1)) - (2 if phrase.first else 0)
        number = sum(map(len, phrase_line)) + np.arange(len(lines))
        place = np.arange(words.shape[1])
        parts.append([a.ravel() for a in np.broadcast_arrays(number[:, None], key, place, words)])
        phrase_line.append(lines)
        phrase_size.append(vocabulary.size[words].sum(1))
    number, key, place, word = (np.concatenate(part) for part in zip(*parts, strict=True))
    of, size = np.concatenate(phrase_line), np.concatenate(phrase_size)
    order = np.lexsort((rng.random(len(of)), of))
    total = size[order].cumsum()
    starts = np.searchsorted(of[order], np.arange(n))
    before = np.append(0, total)[starts][of[order]]
    fits = np.zeros(len(of), dtype=bool)
    fits[order] = total - before <= WIDTH
    kept = fits[number]
    return of[number][kept], key[kept], place[kept], word[kept]


def _drawn(
    rng: np.random.Generator, vocabulary: _Vocabulary, phrase: Phrase, n: int
) -> Int64[ndarray, "phrase word"]:
    """Words of ``n`` phrases of a kind; several words of one pool are different ones."""
    slots = _slots(phrase, vocabulary.pools)
    columns: dict[str, Iterator[ndarray]] = {}
    for slot in dict.fromkeys(slots):
        pool = vocabulary.pools[slot]
        columns[slot] = iter(pool[rng.random((n, len(pool))).argsort(1)[:, : slots.count(slot)]].T)
        if len(pool) == 1:
            columns[slot] = repeat(np.repeat(pool, n))
    drawn = [next(columns[slot]) for slot in slots]
    return np.stack([*drawn, *drawn[-1:] * phrase.slots.count("=")], 1)


def _fillers(
    rng: np.random.Generator, vocabulary: _Vocabulary, topic: Int64[ndarray, " line"], planted: _Words
) -> _Words:
    """Words that fill the lines up to ``WIDTH`` tokens: frequent ones, ones of the document's topic, long ones."""
    n = len(topic)
    used = np.bincount(planted[0], weights=vocabulary.size[planted[3]], minlength=n).astype(np.int64)
    cells = (n, WIDTH + 2)  # the last two are for what long words leave over
    pools = vocabulary.pools
    general, local = pools["common"][:GENERAL], pools["common"][GENERAL:].reshape(TOPICS, -1)
    word = general[_zipf(rng, len(general), cells)]
    own = local[topic[:, None], _zipf(rng, local.shape[1], cells)]
    word = np.where(rng.random(cells) < 0.35, own, word)
    body = np.arange(cells[1]) < WIDTH
    word = np.where((rng.random(cells) < 0.12) & body, rng.choice(pools["long"], cells), word)
    small = rng.random(cells) < SMALL * (rng.random((n, 1)) < WORDY)
    word = np.where(small & body, pools["small"][_zipf(rng, len(pools["small"]), cells)], word)
    size = vocabulary.size[word[:, :WIDTH]].cumsum(1)
    left = (WIDTH - used)[:, None]
    kept = size <= left
    over = left - np.where(kept, size, 0).max(1, keepdims=True)
    kept = np.concatenate([kept, np.arange(2) < over], 1)
    line = kept.nonzero()[0]
    return line, rng.random(len(line)), np.zeros(len(line), dtype=np.int64), word[kept]


def _zipf(rng: np.random.Generator, n: int, shape: tuple[int, ...]) -> ndarray:
    """Ranks below ``n`` by Zipf's law, flattened at the top."""
    weight = 1 / (np.arange(n) + 8.0)
    return np.searchsorted(weight.cumsum() / weight.sum(), rng.random(shape))
