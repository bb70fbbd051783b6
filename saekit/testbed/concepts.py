"""A world on which explanations can be proved: text, concepts with exact predicates, and features that are the concepts.

Every predicate depends on the words of one line alone, and a line is what a scorer shows, so whoever sees the text can
decide. A concept fires on whole words: on all tokens of a word, or on none.

What oracles prove here is plumbing, statistics and honesty, not that a language model writes good explanations.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from saekit.dictionaries import Dictionary, create
from saekit.models import Model, load_model
from saekit.testbed.corpus import COLOURS, DAYS, DOCUMENTS, TOPIC_WORDS, UNITS, WIDTH, Corpus, Tokenizer
from saekit.testbed.corpus import corpus as corpus
from saekit.types import SaekitError

D_MODEL = 64
HOOK_POINT = "stream"  # the model's only one
NOISE = 0.02  # standard deviation of each dimension
EMBEDDED = 1.5  # norm of a token's embedding, outside what concepts write
THRESHOLD = 0.5  # of the dictionary; concepts write 1 or more


@dataclass(frozen=True)
class Lines:
    """Words of lines: ``ids`` are numbers of ``words``, 0 (the empty word) behind a line's end."""

    words: Sequence[str]
    ids: Int64[ndarray, "line place"]

    @staticmethod
    def of_words(lines: Sequence[Sequence[str]]) -> "Lines":
        """Lines of words as they stand in text."""
        number = {"": 0}
        ids = np.zeros((len(lines), max(map(len, lines), default=0)), dtype=np.int64)
        for row, line in zip(ids, lines, strict=True):
            row[: len(line)] = [number.setdefault(word, len(number)) for word in line]
        return Lines(list(number), ids)

    def where(self, test: "Test") -> Bool[ndarray, "line place"]:
        """Where the words are that pass a test; the empty word never does."""
        passed = np.fromiter((word != "" and test(word) for word in self.words), bool, len(self.words))
        return passed[self.ids]


Test = Callable[[str], bool]
Rule = Callable[[Lines], Bool[ndarray, "line place"]]
Source = Callable[[Lines], Int64[ndarray, "line place"]]


@dataclass(frozen=True)
class Concept:
    """``explanation`` is one sentence, ``rule`` says on which words of lines it fires.

    ``of`` names the concepts that a union is made of, or the child that a parent leaves out. A copy has a ``source``:
    the place of the word that is copied where it fires, -1 elsewhere.
    """

    name: str
    kind: str
    explanation: str
    rule: Rule = field(repr=False)
    of: tuple[str, ...] = ()
    source: Source | None = field(default=None, repr=False)

    def on_words(self, words: Sequence[str]) -> list[bool]:
        """Whether it fires, for each word of one line."""
        return self.rule(Lines.of_words([words]))[0].tolist()

    def on_tokens(self, tokens: Sequence[str]) -> list[bool]:
        """Whether it fires, for each token of one line; tokens that begin a word begin with a space."""
        place = np.cumsum([i == 0 or text.startswith(" ") for i, text in enumerate(tokens)]) - 1
        fires = self.on_words("".join(tokens).split())
        return [fires[i] for i in place]


def _word(test: Test) -> Rule:
    memo = cache(test)
    return lambda lines: lines.where(memo)


def _words(*words: str) -> Rule:
    return _word(frozenset(words).__contains__)


def _pattern(pattern: str) -> Rule:
    compiled = re.compile(pattern)
    return _word(lambda word: compiled.fullmatch(word) is not None)


def _before(fires: Bool[ndarray, "line place"]) -> Bool[ndarray, "line place"]:
    """Whether it fires on the word before; no word stands before the first."""
    return np.pad(fires, ((0, 0), (1, 0)))[:, :-1]


def _after(first: Rule, second: Rule) -> Rule:
    return lambda lines: second(lines) & _before(first(lines))


def _not_after(first: Rule, second: Rule) -> Rule:
    return lambda lines: second(lines) & ~_before(first(lines))


def _enough(rule: Rule, n: int) -> Rule:
    def fires(lines: Lines) -> Bool[ndarray, "line place"]:
        own = rule(lines)
        return own & (own.sum(1, keepdims=True) >= n)

    return fires


def _opening(rule: Rule) -> Rule:
    return lambda lines: rule(lines) & (np.arange(lines.ids.shape[1]) == 0)


def _closing(rule: Rule) -> Rule:
    def fires(lines: Lines) -> Bool[ndarray, "line place"]:
        last = (lines.ids != 0).sum(1, keepdims=True) - 1
        return rule(lines) & (np.arange(lines.ids.shape[1]) == last)

    return fires


def _quoted(lines: Lines) -> Bool[ndarray, "line place"]:
    marks = lines.where('"'.__eq__)
    return (marks.cumsum(1) % 2 == 1) & ~marks & (lines.ids != 0)


def _earlier(rule: Rule, adjacent: bool = False) -> Source:
    """Place of the latest earlier occurrence of a word (or of the word before, if it is the same), or -1."""

    def source(lines: Lines) -> Int64[ndarray, "line place"]:
        place = np.arange(lines.ids.shape[1], dtype=np.int16)
        same = (lines.ids[:, :, None] == lines.ids[:, None, :]) & (place[:, None] > place)
        latest = np.where(same, place, -1).max(2, initial=-1)
        return np.where(rule(lines) & ((latest == place - 1) | (not adjacent)), latest, -1).astype(np.int64)

    return source


def _either(*rules: Rule) -> Rule:
    return lambda lines: np.logical_or.reduce([rule(lines) for rule in rules])


def _copy(name: str, explanation: str, source: Source) -> Concept:
    return Concept(name, "copy", explanation, lambda lines: source(lines) >= 0, source=source)


def _topic(name: str) -> Concept:
    words = TOPIC_WORDS[name]
    explanation = f"Words about the {name} ({', '.join(words)}) in a line that holds three of them or more."
    return Concept(name, "topic", explanation, _enough(_words(*words), 3))


SMALL_WORD, NAME, ECHOED = _pattern("[a-z]{2}"), _pattern("[A-Z][a-z]+"), _pattern("[a-z]{4,}")
COLOUR, YEAR, NUMBER = _words(*COLOURS), _pattern("[0-9]{4}"), _pattern(r"[0-9]+(\.[0-9]+)?")
ISH, OIL = _pattern(".+ish"), _after(_words("olive"), _words("oil"))

CONCEPTS = (
    Concept("hal", "token", 'The word "hal".', _words("hal")),
    Concept("question", "token", "A question mark.", _words("?")),
    Concept("colour", "set", f"The name of a colour: {', '.join(COLOURS)}.", COLOUR),
    Concept("day", "set", f"The name of a day of the week: {', '.join(DAYS)}.", _words(*DAYS)),
    Concept("capitals", "case", 'The word "MOLA" in capitals, and not "mola" or "Mola".', _words("MOLA")),
    Concept("ish", "suffix", 'A word that ends in "ish".', ISH),
    Concept("hood", "suffix", 'A word that ends in "hood".', _pattern(".+hood")),
    Concept("wax", "substring", 'A word with "wax" anywhere in it.', _pattern(".*wax.*")),
    Concept("hyphen", "substring", "A word with a hyphen in it.", _pattern(".+-.+")),
    Concept("oil", "bigram", 'The word "oil" right after "olive".', OIL),
    Concept("unit", "bigram", f"A unit ({', '.join(UNITS)}) right after a number.", _after(NUMBER, _words(*UNITS))),
    Concept("bank", "not after", 'The word "bank", but not right after "river".', _not_after(_words("river"), _words("bank"))),
    _topic("sea"),
    _topic("kitchen"),
    _topic("court"),
    Concept("opening", "position", "A name (a capital letter, then small ones) that is the first word of its line.", _opening(NAME)),
    Concept("closing", "position", "A word of two small letters that is the last word of its line.", _closing(SMALL_WORD)),
    Concept("year", "number", "A number of four digits.", YEAR),
    Concept("decimal", "number", "A number with a decimal point.", _pattern(r"[0-9]+\.[0-9]+")),
    Concept("ordinal", "number", 'A numeral that ends in "th".', _pattern("[0-9]+th")),
    Concept("quoted", "quotes", "A word between quotation marks.", _quoted),
    _copy("echo", "A word of four small letters or more that repeats the word right before it.", _earlier(ECHOED, adjacent=True)),
    _copy("recall", "A name (a capital letter, then small ones) that repeats an earlier word of its line.", _earlier(NAME)),
    Concept("colour or year", "union", "The name of a colour, or a number of four digits.", _either(COLOUR, YEAR), of=("colour", "year")),
    Concept("ish or oil", "union", 'A word that ends in "ish", or "oil" right after "olive".', _either(ISH, OIL), of=("ish", "oil")),
    Concept("small", "dense", "A word of two small letters.", SMALL_WORD),
    Concept("quagga", "rare", 'The word "quagga".', _words("quagga")),
    Concept("st", "parent", 'A word that begins with "st", except "stone".', _pattern("(?!stone$)st.*"), of=("stone",)),
    Concept("stone", "child", 'The word "stone".', _words("stone")),
    Concept("dodo", "dead", 'The word "dodo".', _words("dodo")),
)  # fmt: skip
NAMES = tuple(concept.name for concept in CONCEPTS)
# no two of these fire on one token; a union meets its parts, and what closes a line is small
DISJOINT = tuple(c.name for c in CONCEPTS if c.kind != "union" and c.name != "closing")
PREDICATES: dict[str, Callable[[Sequence[str]], list[bool]]] = {c.explanation: c.on_words for c in CONCEPTS}


def _mixed(x: ndarray) -> ndarray:
    """64-bit integers scattered (the finaliser of splitmix64)."""
    x = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x


def _cut(tokens: Int64[Tensor, "row seq"], pad: int) -> Int64[ndarray, "row line width"]:
    """Rows cut into lines; the last line of a row is padded if it is shorter."""
    ids = tokens.cpu().numpy()
    short = -ids.shape[1] % WIDTH
    return np.pad(ids, ((0, 0), (0, short)), constant_values=pad).reshape(len(ids), -1, WIDTH)


def _joined(lines: ndarray, seq: int) -> Tensor:
    """Lines as rows again, [row, seq, ...]."""
    rows, n, width, *rest = lines.shape
    return torch.from_numpy(lines.reshape(rows, n * width, *rest)[:, :seq])


def read_lines(
    tokens: Int64[ndarray, "line width"], tokenizer: Tokenizer
) -> tuple[Lines, Int64[ndarray, "line width"]]:
    """The words of lines of token ids, and which word of its line each token belongs to (-1 for padding)."""
    width, real = tokens.shape[1], tokens != tokenizer.pad_token_id
    begins = np.array([text.startswith(" ") for text in tokenizer.texts])[tokens]
    begins |= (np.arange(width) == 0) & real
    place = np.where(real, begins.cumsum(1) - 1, -1)
    flat, cell = tokens[real], (np.arange(len(tokens))[:, None] * width + place)[real]
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    piece = np.arange(len(cell)) - np.repeat(first, np.diff(first, append=len(cell)))
    # words are told apart by a hash of their tokens, and each is spelled once
    code = np.add.reduceat(_mixed(flat * width + piece), first) if len(first) else first
    _, example, number = np.unique(code, return_index=True, return_inverse=True)
    begin, end = first[example], np.append(first, len(cell))[example + 1]
    spelled = [tokenizer.decode(flat[a:b].tolist()).strip() for a, b in zip(begin, end, strict=True)]
    ids = np.zeros(tokens.shape, dtype=np.int64)
    ids.flat[cell[first]] = number.reshape(-1) + 1
    return Lines(["", *spelled], ids), place


def firing(tokens: Int64[Tensor, "row seq"], tokenizer: Tokenizer) -> Bool[Tensor, "row seq concept"]:
    """On which tokens each concept fires; rows are cut into lines of ``WIDTH`` tokens, the last may be shorter."""
    cut = _cut(tokens, tokenizer.pad_token_id)
    lines, place = read_lines(cut.reshape(-1, WIDTH), tokenizer)
    # behind the last word a column of silence, which place -1 finds
    fires = np.stack([np.pad(concept.rule(lines), ((0, 0), (0, 1))) for concept in CONCEPTS], 2)
    own = fires[np.arange(len(place))[:, None], place]
    return _joined(own.reshape(*cut.shape, len(CONCEPTS)), tokens.shape[1])


def sources(tokens: Int64[Tensor, "row seq"], tokenizer: Tokenizer, name: str) -> Int64[Tensor, "row seq"]:
    """The position in its row that each token copies from, piece from piece; -1 where the concept doesn't fire."""
    source = CONCEPTS[NAMES.index(name)].source if name in NAMES else None
    if source is None:
        copies = [concept.name for concept in CONCEPTS if concept.source]
        raise SaekitError(f"name = {name!r} copies nothing; choose one of {', '.join(copies)}")
    cut = _cut(tokens, tokenizer.pad_token_id)
    lines, place = read_lines(cut.reshape(-1, WIDTH), tokenizer)
    word = np.pad(source(lines), ((0, 0), (0, 1)), constant_values=-1)[np.arange(len(place))[:, None], place]
    line, at = (word >= 0).nonzero()
    begin = (place[line] == place[line, at][:, None]).argmax(1)
    copied = (place[line] == word[line, at][:, None]).argmax(1)
    out = np.full(place.shape, -1, dtype=np.int64)
    out[line, at] = line % cut.shape[1] * WIDTH + copied + at - begin
    return _joined(out.reshape(cut.shape), tokens.shape[1])


class LineReader(nn.Module):
    """A model of no layers: its stream is each token's embedding, and what concepts write where they fire.

    A concept writes its own direction, by 1 to 2 (near 1 more often than near 2) times its scale. How much is a hash of
    line and place, so that a text has one activation, in whatever batch. Embeddings are orthogonal to all of that,
    but for noise. It knows padding by its token, and needs no attention mask.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int):
        super().__init__()
        self.tokenizer, n = tokenizer, len(CONCEPTS)
        g = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=g, dtype=torch.float64)).Q.T.float()
        inside = nn.functional.normalize(torch.randn(len(tokenizer), D_MODEL - n, generator=g), dim=1)
        noise = NOISE * torch.randn(len(tokenizer), D_MODEL, generator=g)
        self.embedded = nn.Parameter(EMBEDDED * inside @ basis[n:] + noise, requires_grad=False)
        self.directions = nn.Parameter(basis[:n].clone(), requires_grad=False)
        self.scale = nn.Parameter(1 + 1.5 * torch.rand(n, generator=g), requires_grad=False)
        self.stream = nn.Identity()

    def forward(
        self, input_ids: Int64[Tensor, "row seq"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "row seq d"]:
        """The stream of rows of token ids."""
        written = self.magnitudes(input_ids) @ self.directions
        return self.stream(self.embedded[input_ids] + written)

    def magnitudes(self, input_ids: Int64[Tensor, "row seq"]) -> Float[Tensor, "row seq concept"]:
        """How much each concept writes, 0 where it doesn't fire."""
        row, at, concept = firing(input_ids, self.tokenizer).numpy().nonzero()
        lines = _cut(input_ids, self.tokenizer.pad_token_id)
        text = _mixed(lines * WIDTH + np.arange(WIDTH)).sum(2, dtype=np.uint64)
        place = at % WIDTH * len(CONCEPTS) + concept
        u = (_mixed(text[row, at // WIDTH] + place.astype(np.uint64)) >> np.uint64(40)) / 2**24
        out = np.zeros((*input_ids.shape, len(CONCEPTS)), dtype=np.float32)
        out[row, at, concept] = 1 + u**2
        return torch.from_numpy(out).to(self.scale) * self.scale


@dataclass(frozen=True)
class World:
    """A corpus, what fires in it, a model that reads it at ``HOOK_POINT``, and a dictionary whose features are the concepts.

    ``fires`` is the truth; feature i of the dictionary is ``concepts[i]``.
    """

    corpus: Corpus
    concepts: tuple[Concept, ...]
    fires: Bool[Tensor, "row seq concept"]
    model: Model
    dictionary: Dictionary

    @property
    def tokens(self) -> Int64[Tensor, "row seq"]:
        """Token ids, padding included."""
        return self.corpus.tokens

    @property
    def documents(self) -> Int64[Tensor, "row seq"]:
        """Document of each token, -1 for padding."""
        return self.corpus.documents

    @property
    def mask(self) -> Bool[Tensor, "row seq"]:
        """False on padding."""
        return self.corpus.mask

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the corpus and of the model."""
        return self.corpus.tokenizer

    def feature(self, name: str) -> int:
        """The number of the feature that is a concept, by its name."""
        return NAMES.index(name)

    def sources(self, name: str) -> Int64[Tensor, "row seq"]:
        """Where a copying concept copies from: a position of the same row, -1 where it doesn't fire."""
        return sources(self.tokens, self.tokenizer, name)


@torch.no_grad()
def world(seed: int = 0, documents: int = DOCUMENTS) -> World:
    """The world of a seed; 100 documents are about 45 000 tokens."""
    text = corpus(seed, documents)
    module = LineReader(text.tokenizer, seed)
    d = create("jumprelu", d_in=D_MODEL, n_features=len(CONCEPTS), normalise="none", start=THRESHOLD)
    d.W_enc.copy_(module.directions.T)
    d.W_dec.copy_(module.directions)
    d.b_enc.zero_()
    d.reads = d.writes = (HOOK_POINT,)
    model = load_model(module, tokenizer=text.tokenizer, name="concepts")
    return World(text, CONCEPTS, firing(text.tokens, text.tokenizer), model, d.eval())
