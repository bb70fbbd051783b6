"""What a text's explaining side holds, counted once for all features; and tables of one feature over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64
from numpy import ndarray
from scipy.sparse import csr_array

from saekit.autointerp.rules import Pattern, Reader, word_begins
from saekit.autointerp.windows import Windows
from saekit.types import SaekitError

CHECKED = (
    1 / 3
)  # of the windows, in whole documents, on which rules are chosen that were made from the others
AFFIX = 6  # characters of beginnings, ends and insides of words that are counted
HEAD = 32  # characters of a word whose insides are counted
TYPES = 30_000  # words whose spellings are counted, the commonest
SHOWN = 20  # rows of tables of tokens
CONTEXTS = 10  # rows of tables of neighbours
PRIOR = 100.0  # tokens that the prior of log-odds is worth
CERTAIN = 2.0  # standard deviations from which log-odds are shown
CHANCE = 1e-3  # below which a difference by position is said
DIGIT, SMALL, CAPITAL = "\ue000", "\ue001", "\ue002"  # classes of characters while spellings are counted
CLASS = {DIGIT: "digit", SMALL: "small", CAPITAL: "capital"}

Mask = Bool[ndarray, "window width"]
Ids = Int64[ndarray, "window width"]


class Vocabulary:
    """The tokens of a model in text, as patterns read them."""

    def __init__(self, texts: Sequence[str]):
        self.texts, self._readers = tuple(texts), dict[Pattern, Reader]()
        bare = [text.strip() for text in texts]
        self.chars = sorted(set("".join(bare)))
        number = {char: i for i, char in enumerate(self.chars)}
        self.codes = np.full((len(bare), max(map(len, bare), default=0)), -1)
        for row, text in zip(self.codes, bare, strict=True):
            row[: len(text)] = [number[char] for char in text]

    def edges(self, by: str) -> tuple[Int64[ndarray, " token"], Int64[ndarray, " token"]]:
        """The kinds of the first and the last character of each token; a word begins where they differ, or at a space (0)."""
        ends = [("  " if not text else text[0] + text[-1]) for text in self.texts]
        kinds = np.array([[_kind(char, by) for char in two] for two in ends], np.int64).reshape(-1, 2)
        return (np.zeros(len(kinds), np.int64) if by == "tokens" else kinds[:, 0]), kinds[:, 1]

    def reader(self, pattern: Pattern) -> "Reader":
        """What finds the words of a pattern in token ids."""
        if pattern not in self._readers:
            self._readers[pattern] = self._reader(pattern)
        return self._readers[pattern]

    def _reader(self, pattern: Pattern) -> "Reader":
        states, steps = {pattern.begin(): 0}, list[list[int]]()
        waiting = list(states)
        for state in waiting:
            after = [pattern.step(state, char) for char in self.chars]
            for one in dict.fromkeys(after):
                if one not in states:
                    states[one] = len(states)
                    waiting.append(one)
            steps.append([states[one] for one in after])
        table = np.array(steps).reshape(len(states), len(self.chars))
        moved = np.tile(np.arange(len(states)), (len(self.codes), 1))
        for code in self.codes.T:
            there = np.flatnonzero(code >= 0)
            moved[there] = table[moved[there], code[there, None]]
        rows = np.column_stack([*self.edges(pattern.by), moved])
        classes, of = np.unique(rows, axis=0, return_inverse=True)
        accept = [number for state, number in states.items() if pattern.accepts(state)]
        return Reader(classes, of.reshape(-1), tuple(accept))


def _kind(char: str, by: str) -> int:
    """0 a space, 1 a part of words, 2 another sign where these are told apart."""
    if char.isspace():
        return 0
    return 2 if by == "letters" and not (char.isalnum() or char == "_") else 1


@dataclass(frozen=True)
class Column:
    """A number for each token of the side, -1 where there is none: the token itself, or the run of tokens that ends there.

    ``keys`` [number, n] are the tokens of each.
    """

    ids: Ids
    keys: Int64[ndarray, "number n"]

    def counts(self, where: Mask) -> Int64[ndarray, " number"]:
        """How often each stands where a mask is true."""
        found = self.ids[where]
        return np.bincount(found[found >= 0], minlength=len(self.keys))

    def holds(self, chosen: Int[ndarray, " some"]) -> Mask:
        """Where one of some numbers stands."""
        wanted = np.zeros(len(self.keys) + 1, bool)  # the last is for -1
        wanted[chosen] = True
        return wanted[self.ids]


class Words:
    """The words of the side, by one way to end them, and which spellings they have; ``most``: where rules are made from."""

    def __init__(self, tokens: Ids, vocabulary: Vocabulary, by: str, most: Mask):
        first, last = (kinds[tokens] for kinds in vocabulary.edges(by))
        self.by, self.begins = by, word_begins(first, last)
        self.most, self._whole = most, dict[str, ndarray]()
        self.ends = np.roll(self.begins, -1, 1)
        self.ends[:, -1] = True
        starts = np.flatnonzero(self.begins)
        sizes = np.diff(starts, append=tokens.size)
        flat, number, spelled = tokens.reshape(-1).tolist(), dict[tuple[int, ...], int](), list[str]()
        of, known = np.empty(len(starts), np.int64), dict[str, int]()
        for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            pieces = tuple(flat[start : start + size])
            if pieces not in number:
                text = "".join(vocabulary.texts[piece] for piece in pieces).strip()
                if text not in known:
                    known[text] = len(spelled)
                    spelled.append(text)
                number[pieces] = known[text]
            of[i] = number[pieces]
        self.types, self.of = spelled, np.repeat(of, sizes).reshape(tokens.shape)
        self.ons = {"all": np.ones_like(self.begins), "first": self.begins, "last": self.ends}

    def counts(self, where: Mask, on: str) -> Float64[ndarray, " type"]:
        """How often tokens of each word that are ``on`` stand where a mask is true."""
        return np.bincount(self.of[where & self.ons[on]], minlength=len(self.types)).astype(float)

    @cached_property
    def spellings(self) -> tuple[list[Pattern], csr_array]:
        """Patterns that two words or more have, and which words have them: [pattern, type]."""
        number, rows, columns = dict[tuple[str, str, bool], int](), list[int](), list[int]()
        for column in np.argsort(-np.bincount(self.of[self.begins]), kind="stable")[:TYPES].tolist():
            for key in _keys(self.types[column]):
                rows.append(number.setdefault(key, len(number)))
                columns.append(column)
        shape = (len(number), len(self.types))
        matrix = csr_array((np.ones(len(rows)), (rows, columns)), shape)
        kept = np.flatnonzero(np.diff(matrix.indptr) >= 2)
        keys = list(number)
        patterns = [_pattern(*keys[i], self.by) for i in kept]
        return patterns, matrix[kept]

    @cached_property
    def _of_types(self) -> csr_array:
        """Which spellings each word has: [type, pattern]."""
        return csr_array(self.spellings[1].T)

    def spelled(self, counts: Float64[ndarray, " type"]) -> Float64[ndarray, " pattern"]:
        """Counts of words, summed over the words of each spelling."""
        matrix = self._of_types
        some = np.flatnonzero(counts)
        sizes = np.diff(matrix.indptr)[some]
        if 4 * sizes.sum() > matrix.nnz:
            return self.spellings[1] @ counts
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        entries = np.repeat(matrix.indptr[some], sizes) + within
        weights = np.repeat(counts[some], sizes)
        return np.bincount(matrix.indices[entries], weights, minlength=matrix.shape[1]).astype(float)

    def spelled_of(self, where: Mask, on: str) -> Float64[ndarray, " pattern"]:
        """How often tokens of each spelling that are ``on`` stand where a mask is true; most masks lack little of ``most``."""
        if 2 * where.sum() < self.most.sum():
            return self.spelled(self.counts(where, on))
        if on not in self._whole:
            self._whole[on] = self.spelled(self.counts(self.most, on))
        rest = self.spelled(self.counts(self.most & ~where, on))
        return self._whole[on] - rest + self.spelled(self.counts(where & ~self.most, on))

    def having(self, row: int) -> Mask:
        """Tokens of words that have the spelling of a row."""
        matrix = self.spellings[1]
        wanted = np.zeros(len(self.types), bool)
        wanted[matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]] = True
        return wanted[self.of]


def _keys(word: str) -> set[tuple[str, str, bool]]:
    """How, what and whether in runs: the spellings of one word that are counted."""
    if not word:
        return set()
    out = set()
    digits = "".join(DIGIT if char.isdigit() else char for char in word)
    for text in {word, digits}:
        for n in range(1, min(AFFIX, len(text)) + 1):
            out |= {("begins", text[:n], False), ("ends", text[-n:], False)}
            out |= {("contains", text[i : i + n], False) for i in range(min(len(text), HEAD) - n + 1)}
    if digits != word:
        out = {
            key
            for key in out
            if DIGIT in key[1] or not any(char.isdigit() for char in key[1]) or key[1] in word
        }
        out.add(("is", digits, False)) if len(digits) <= 2 * AFFIX else None
    shape = "".join(SMALL if char.islower() else CAPITAL if char.isupper() else char for char in digits)
    if len(shape) <= AFFIX:
        out.add(("is", shape, False))
    runs = "".join(char for i, char in enumerate(shape) if i == 0 or char != shape[i - 1])
    if len(runs) <= AFFIX:
        out.add(("is", runs, True))
    return out


def _pattern(how: str, text: str, runs: bool, by: str) -> Pattern:
    return Pattern(how, (tuple(CLASS.get(char, char) for char in text),), by, runs)


class Text:
    """The explaining side of some windows, with what is counted of it for every feature.

    ``texts`` are the tokens of the vocabulary, as the tokenizer decodes each alone. Where ``check`` is true are the
    documents that rules are checked on and aren't made from; with one document it is a third of its windows.
    """

    def __init__(self, windows: Windows, texts: Sequence[str]):
        self.windows, self.own = windows, windows.of_side("explain")
        self.tokens, self.documents = windows.tokens[self.own], windows.documents[self.own]
        most = int(self.tokens.max(initial=0))
        if most >= len(texts):
            raise SaekitError(f"texts has {len(texts)} tokens, and the text holds token {most}; give the text of every token of the model")  # fmt: skip
        self.vocabulary = Vocabulary(texts)
        found, of = np.unique(self.documents, return_inverse=True)
        if len(found) == 1:
            of = np.arange(len(self.own))
        order = np.random.default_rng([windows.seed, 5]).permutation(of.max() + 1)
        sizes = np.bincount(of)[order]
        first = np.cumsum(sizes) - sizes / 2 <= len(of) * CHECKED
        first[0], first[-1] = True, False
        chosen = np.zeros(len(order), bool)
        chosen[order] = first
        self.check = np.repeat(chosen[of][:, None], windows.width, 1)
        self.split_by = "windows" if len(found) == 1 else "documents"
        self.words = {
            by: Words(self.tokens, self.vocabulary, by, ~self.check) for by in ("spaces", "letters", "tokens")
        }

    def fires(self, feature: int) -> Mask:
        """Where a feature fires on the side."""
        return self.windows.values(feature, self.own) > 0

    @cached_property
    def columns(self) -> dict[int, Column]:
        """Runs of 1, 2 and 3 tokens."""
        size, ids, out = len(self.vocabulary.texts), self.tokens, dict[int, Column]()
        for n in (1, 2, 3):
            if n == 1:
                keys = np.arange(size)[:, None]
            else:
                pair = out[n - 1].ids[:, :-1] * size + self.tokens[:, 1:]
                there = out[n - 1].ids[:, :-1] >= 0
                known, number = np.unique(pair[there], return_inverse=True)
                ids = np.full(self.tokens.shape, -1)
                ids[:, 1:][there] = number
                keys = np.column_stack([out[n - 1].keys[known // size], known % size])
            out[n] = Column(ids, keys)
        return out

    def shifted(self, column: Column, by: int) -> Column:
        """The same, of the token ``by`` places before (behind, if negative)."""
        ids = np.full_like(column.ids, -1)
        if by > 0:
            ids[:, by:] = column.ids[:, :-by]
        else:
            ids[:, :by] = column.ids[:, -by:]
        return Column(ids, column.keys)

    @cached_property
    def neighbours(self) -> dict[str, Column]:
        """The tokens right before and right after."""
        return {"left": self.shifted(self.columns[1], 1), "right": self.shifted(self.columns[1], -1)}

    def gram(self, tokens: Sequence[int]) -> str:
        """Tokens in text."""
        return "".join(self.vocabulary.texts[token] for token in tokens)

    def table(self, fired: Mask, n: int) -> list[list[Any]]:
        """[text, P(fire | it), how often it stands, lift, coverage] of the runs of n tokens on which it fires most."""
        column, everywhere = self.columns[n], np.ones_like(fired)
        found, seen = column.counts(fired), column.counts(everywhere)
        total, rate = max(1, int(fired.sum())), max(fired.mean(), 1e-12)
        rows = []
        for i in np.argsort(-found, kind="stable")[: SHOWN if n == 1 else CONTEXTS]:
            if found[i]:
                p = found[i] / seen[i]
                rows.append([self.gram(column.keys[i].tolist()), float(p), int(seen[i]), float(p / rate), float(found[i] / total)])  # fmt: skip
        return rows

    def contexts(self, fired: Mask, side: str) -> list[list[Any]]:
        """[text, log-odds, its standard deviation, n] of tokens that stand beside firings more than beside others.

        Log-odds with a Dirichlet prior of the text's own counts (Monroe, Colaresi and Quinn 2008).
        """
        column = self.neighbours[side]
        own, all_ = column.counts(fired).astype(float), column.counts(np.ones_like(fired)).astype(float)
        rest, prior = all_ - own, PRIOR * all_ / max(1.0, all_.sum())
        seen = own > 0
        a, b, prior = own[seen] + prior[seen], rest[seen] + prior[seen], prior[seen]
        odds = np.log(a / np.maximum(own.sum() + PRIOR - a, 1e-9)) - np.log(
            b / np.maximum(rest.sum() + PRIOR - b, 1e-9)
        )
        deviation = np.sqrt(1 / a + 1 / b)
        ids, score = np.flatnonzero(seen), odds / deviation
        order = [i for i in np.argsort(-score, kind="stable")[:CONTEXTS] if score[i] > CERTAIN]
        return [
            [self.vocabulary.texts[ids[i]], float(odds[i]), float(deviation[i]), int(own[ids[i]])]
            for i in order
        ]

    def positions(self, fired: Mask) -> dict[str, Any]:
        """Firing rates over thirds of the row, and on a window's first token and thirds of the others.

        ``differs``: whether windows differ by place beyond chance (an analysis of variance over windows, p < 0.001,
        since firings inside a window aren't independent).
        """
        row_third = self.windows.starts[self.own] % self.windows.firings.seq * 3 // self.windows.firings.seq
        width = fired.shape[1]
        edges = [0, 1, *(1 + (width - 1) * np.arange(1, 4) // 3)]
        parts = [fired[:, a:b].mean(1) for a, b in pairwise(edges) if b > a]
        thirds = [fired[row_third == i].mean(1) for i in range(3) if (row_third == i).any()]
        out = {}
        for name, groups in (("row", thirds), ("window", parts)):
            out[name] = {"rates": [float(group.mean()) for group in groups], "differs": _differ(groups)}
        return out

    def spread(self, fired: Mask) -> dict[str, Any]:
        """The share of documents in which it fires, beside what chance gives at its density."""
        found, of = np.unique(self.documents, return_inverse=True)
        size = np.bincount(of) * fired.shape[1]
        inside = np.bincount(of, weights=fired.sum(1)) > 0
        return {
            "n": len(found),
            "share": float(inside.mean()),
            "chance": float((1 - (1 - fired.mean()) ** size).mean()),
        }


def _differ(groups: Sequence[Float[ndarray, " _"]]) -> bool:
    """Whether means differ beyond chance."""
    from scipy.stats import f as f_distribution

    sizes, values = np.array([len(g) for g in groups]), np.concatenate(groups)
    between = sum(len(g) * (g.mean() - values.mean()) ** 2 for g in groups)
    within = sum(((g - g.mean()) ** 2).sum() for g in groups)
    free = len(values) - len(groups)
    if len(sizes) < 2 or free < 1 or within == 0:
        return bool(between > 0 and within == 0 and len(sizes) > 1)
    return bool(
        f_distribution.sf(between / (len(groups) - 1) / (within / free), len(groups) - 1, free) < CHANCE
    )
