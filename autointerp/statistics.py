"""Explanations from counts alone, without a language model: tables of a feature, and the simplest rule that foretells it.

Rules are made from two thirds of the explaining side's documents and chosen on the others. One that is right there is
said; else the sentence says that there is no simple rule, and how much the best one covers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from saekit.autointerp.explanation import Explanation
from saekit.autointerp.rules import HOWS, MOST, SHOWN, Beside, Either, Grams, Kind, Pattern, Tokens, Word
from saekit.autointerp.tables import Column, Mask, Text, Words
from saekit.autointerp.windows import Windows

SIMPLE = 0.95  # F1 of a rule that is said without reserve
ALIKE = 0.02  # of F1: below that, the smaller rule is taken
HOLDS = 0.05  # F1 below which a rule is not worth having
SMALL = 8  # parts of a rule that needs no simpler one
PURE = 0.95  # precision of one half of a union
PART = (0.05, 0.95)  # of the firings that it covers
RARE = 20  # firings, below which a feature is called rare
CHECKED = 5  # firings on the documents that rules are chosen on, below which a rule counts as unchecked
EXCEPTIONS = 0.1  # share of a word's tokens that fire, up to which it is an exception


@dataclass(frozen=True)
class Found:
    """A rule while it is chosen: where it fires on the side, and how many parts it has.

    ``build`` makes the rule, ``again`` finds it anew from other windows (None where they hold nothing for it).
    """

    mask: Mask
    size: int
    build: Callable[[], Kind]
    again: "Callable[[Mask, Mask], Found | None]"


Finder = Callable[[Mask, Mask], Found | None]


@dataclass(frozen=True)
class Quality:
    """How right a rule is, over ``n`` firings; shares, 0 where there is nothing to be right about."""

    precision: float
    recall: float
    f1: float
    n: int

    @staticmethod
    def of(mask: Mask, fired: Mask, where: Mask) -> "Quality":
        """Of a rule that fires where ``mask`` is true."""
        said, true = mask & where, fired & where
        hits, n_said, n = int((said & true).sum()), int(said.sum()), int(true.sum())
        return Quality(hits / max(1, n_said), hits / max(1, n), 2 * hits / max(1, n_said + n), n)


class Statistics:
    """Explains features of a text by counting; what features share is counted once.

    ``texts`` are the tokens of the vocabulary, as the tokenizer decodes each alone.
    """

    def __init__(self, windows: Windows, texts: Sequence[str]):
        self.text = Text(windows, texts)

    def explain(
        self, feature: int, promoted: "tuple[Sequence[str], Sequence[str]] | None" = None
    ) -> Explanation:
        """What counts say of a feature; ``promoted``: tokens that it promotes and that it suppresses, the strongest first."""
        text, fired = self.text, self.text.fires(feature)
        n, everywhere = int(fired.sum()), np.ones_like(fired)
        about: dict[str, Any] = {
            "firings": n, "n": fired.size, "density": n / fired.size, "rare": n < RARE, "documents": text.spread(fired),
            "tokens": text.table(fired, 1), "bigrams": text.table(fired, 2), "trigrams": text.table(fired, 3),
            "left": text.contexts(fired, "left"), "right": text.contexts(fired, "right"), "position": text.positions(fired),
        }  # fmt: skip
        if promoted is not None:
            about |= {"promoted": [*promoted[0]], "suppressed": [*promoted[1]]}
        best = self._best(fired) if n else None
        if best is None:
            return Explanation(feature, _silence(about), "statistics", None, {**about, "rule": None})
        found, quality, checked = best
        whole = found.again(fired, everywhere) or found
        rule = whole.build()
        simple = checked and quality.f1 >= SIMPLE
        about["rule"] = {
            "simple": simple, "checked": checked, "split_by": text.split_by, "parts": whole.size, "precision": quality.precision,
            "recall": quality.recall, "f1": quality.f1, "n": quality.n, "coverage": quality.recall,
        }  # fmt: skip
        holds = not checked or quality.f1 >= HOLDS
        return Explanation(feature, _sentence(rule, about), "statistics", rule if holds else None, about)

    def _best(self, fired: Mask) -> tuple[Found, Quality, bool] | None:
        """The smallest of the rules that are as good as the best, its quality, and whether that is on other documents."""
        check = self.text.check
        if int((fired & check).sum()) < CHECKED or not (fired & ~check).any():
            everywhere = np.ones_like(check)
            one = self._tokens(fired, everywhere, 0)  # what is least prone to hold by chance
            return None if one is None else (one, Quality.of(one.mask, fired, everywhere), False)
        live = ~check
        found = [(one, Quality.of(one.mask, fired, check)) for one in self._singles(fired, live)]
        if not any(quality.f1 >= SIMPLE and one.size <= SMALL for one, quality in found):
            found += [(one, Quality.of(one.mask, fired, check)) for one in self._unions(fired, live)]
        if not found:
            return None
        top = max(quality.f1 for _, quality in found)
        one, quality = min(
            (pair for pair in found if pair[1].f1 >= top - ALIKE),
            key=lambda pair: (pair[0].size, -pair[1].f1),
        )
        return one, quality, True

    def _singles(self, fired: Mask, live: Mask) -> list[Found]:
        """One rule of each kind, made from where ``live`` is true."""
        finders: list[Finder] = [partial(self._tokens, back=back) for back in (0, 1, 2)]
        finders += [partial(self._grams, n=n) for n in (2, 3)]
        finders += [
            partial(self._beside, kind="after"),
            partial(self._beside, kind="not after"),
            self._after_words,
        ]
        found = [finder(fired, live) for finder in finders]
        for words in self.text.words.values():
            for on in words.ons if words.by != "tokens" else ("all",):
                found.append(self._listed_words(fired, live, words, on))
                row = _best_spelling(words, on, fired, live)
                if row is not None:
                    found += [
                        self._spelled(fired, live, words, on, row),
                        self._spelled_but(fired, live, words, on, row),
                    ]
        return [one for one in found if one is not None]

    def _unions(self, fired: Mask, live: Mask) -> list[Found]:
        """A rule that is right where it fires but covers a part, and one for the rest."""
        firsts = [self._pure_tokens(fired, live)]
        for words in self.text.words.values():
            row = _best_spelling(words, "all", fired, live, PURE)
            if row is not None:
                firsts.append(self._spelled(fired, live, words, "all", row))
        out = []
        for first in firsts:
            if first is not None and PART[0] <= Quality.of(first.mask, fired, live).recall <= PART[1]:
                rest = self._singles(fired & ~first.mask, live & ~first.mask)
                out += [_either(first, two) for two in rest]
        return out

    def _tokens(self, fired: Mask, live: Mask, back: int) -> Found | None:
        """Tokens on which it fires, or that stand before."""
        column = self.text.columns[1] if back == 0 else self.text.shifted(self.text.columns[1], back)
        chosen = _chosen(*_counts(column, fired, live), int((fired & live).sum()), int(live.sum()))
        return self._of_tokens(column, chosen, fired, live, back, partial(self._tokens, back=back))

    def _pure_tokens(self, fired: Mask, live: Mask) -> Found | None:
        """Tokens on which it nearly always fires."""
        column = self.text.columns[1]
        hits, seen = _counts(column, fired, live)
        chosen = np.flatnonzero((hits >= 2) & (hits >= PURE * seen))
        chosen = chosen[np.argsort(-hits[chosen], kind="stable")[:MOST]]
        return self._of_tokens(column, chosen, fired, live, 0, self._pure_tokens)

    def _of_tokens(
        self, column: Column, chosen: ndarray, fired: Mask, live: Mask, back: int, again: Finder
    ) -> Found | None:
        if not len(chosen):
            return None

        def build() -> Tokens:
            hits, seen = _counts(column, fired, live)
            order = chosen[np.argsort(-hits[chosen], kind="stable")]
            texts = tuple(self.text.vocabulary.texts[i] for i in order)
            return Tokens(tuple(order.tolist()), texts, tuple((hits[order] / seen[order]).tolist()), back)

        return Found(column.holds(chosen), len(chosen) + back, build, again)

    def _grams(self, fired: Mask, live: Mask, n: int) -> Found | None:
        """Runs of tokens at whose end it fires."""
        column = self.text.columns[n]
        hits, seen = _counts(column, fired, live)
        chosen = _chosen(hits, seen, int((fired & live).sum()), int(live.sum()))
        if not len(chosen):
            return None

        def build() -> Grams:
            order = chosen[np.argsort(-hits[chosen], kind="stable")]
            grams = tuple(tuple(column.keys[i].tolist()) for i in order)
            return Grams(
                grams, tuple(map(self.text.gram, grams)), tuple((hits[order] / seen[order]).tolist())
            )

        return Found(column.holds(chosen), n * len(chosen), build, partial(self._grams, n=n))

    def _beside(self, fired: Mask, live: Mask, kind: str) -> Found | None:
        """Its tokens, right after some tokens or but for right after some."""
        of = self._tokens(fired, live, 0)
        if of is None:
            return None
        column, inside = self.text.neighbours["left"], live & of.mask
        hits, seen = _counts(column, fired, inside)
        chosen = _chosen(hits, seen, int((fired & live).sum()), int(inside.sum()))
        if kind == "not after":
            out = np.ones(len(seen), bool)
            out[chosen] = False
            chosen = np.flatnonzero(out & (seen >= 3))
            chosen = chosen[np.argsort(-seen[chosen], kind="stable")[:SHOWN]]
        if not len(chosen):
            return None
        mask = of.mask & (column.holds(chosen) == (kind == "after"))

        def build() -> Beside:
            order = chosen[np.argsort(-seen[chosen], kind="stable")]
            p = (hits[order] / seen[order]).tolist() if kind == "after" else [1.0] * len(order)
            other = Tokens(
                tuple(order.tolist()), tuple(self.text.vocabulary.texts[i] for i in order), tuple(p)
            )
            return Beside(kind, of.build(), other, _share(mask, fired, live))

        return Found(mask, of.size + len(chosen) + 1, build, partial(self._beside, kind=kind))

    def _after_words(self, fired: Mask, live: Mask) -> Found | None:
        """Its tokens right after words of a spelling."""
        of = self._tokens(fired, live, 0)
        if of is None:
            return None
        best: tuple[float, Words, int] | None = None
        for words in self.text.words.values():
            before = _moved(fired & of.mask & live), _moved(of.mask & live)
            row, f1 = _spelling(words, "all", *before, int((fired & live).sum()))
            if row is not None and (best is None or f1 > best[0] + 1e-9):
                best = (f1, words, row)
        if best is None:
            return None
        _, words, row = best
        return self._after_spelling(fired, live, words, words.spellings[0][row], words.having(row))

    def _after_spelling(
        self, fired: Mask, live: Mask, words: Words, pattern: Pattern, having: Mask
    ) -> Found | None:
        of = self._tokens(fired, live, 0)
        if of is None:
            return None
        after = np.zeros_like(having)
        after[:, 1:] = having[:, :-1]
        mask = of.mask & after

        def build() -> Beside:
            other = Word(pattern, self.text.vocabulary.reader(pattern), 1.0)
            return Beside("after", of.build(), other, _share(mask, fired, live))

        again = partial(self._after_spelling, words=words, pattern=pattern, having=having)
        return Found(mask, of.size + 3, build, again)

    def _listed_words(self, fired: Mask, live: Mask, words: Words, on: str) -> Found | None:
        """A few words, whole."""
        hits, seen = words.counts(fired & live, on), words.counts(live, on)
        chosen = _chosen(hits, seen, int((fired & live).sum()), int(live.sum()))
        if not len(chosen) or len(chosen) > SHOWN or any(not words.types[i] for i in chosen):
            return None
        chosen = chosen[np.argsort(-hits[chosen], kind="stable")]
        pattern = Pattern("is", tuple(tuple(words.types[i]) for i in chosen), words.by)
        return self._of_word(pattern, words, np.isin(words.of, chosen), on, len(chosen), fired, live)

    def _spelled(self, fired: Mask, live: Mask, words: Words, on: str, row: int) -> Found:
        """Words of the spelling of a row."""
        return self._of_word(words.spellings[0][row], words, words.having(row), on, 2, fired, live)

    def _of_word(
        self, pattern: Pattern, words: Words, having: Mask, on: str, size: int, fired: Mask, live: Mask
    ) -> Found:
        mask = having & words.ons[on]

        def build() -> Word:
            return Word(pattern, self.text.vocabulary.reader(pattern), _share(mask, fired, live), on)

        size += {"all": 0, "first": 1, "last": 1}[on]
        return Found(mask, size, build, lambda f, w: self._of_word(pattern, words, having, on, size, f, w))

    def _spelled_but(self, fired: Mask, live: Mask, words: Words, on: str, row: int) -> Found | None:
        """Words of the spelling of a row, but for some."""
        of = self._spelled(fired, live, words, on, row)
        hits, seen = words.counts(fired & live & of.mask, on), words.counts(live & of.mask, on)
        out = np.flatnonzero((seen >= 3) & (hits <= EXCEPTIONS * seen))
        out = out[np.argsort(-seen[out], kind="stable")][:SHOWN]
        if not len(out):
            return None
        pattern = Pattern("is", tuple(tuple(words.types[i]) for i in out), words.by)
        mask = of.mask & ~np.isin(words.of, out)

        def build(fired: Mask = fired, live: Mask = live) -> Beside:
            other = Word(pattern, self.text.vocabulary.reader(pattern), 1.0)
            return Beside("except", of.build(), other, _share(mask, fired, live))

        def again(fired: Mask, live: Mask) -> Found:
            return Found(mask, of.size + len(out) + 1, lambda: build(fired, live), again)

        return again(fired, live)


def explain(
    windows: Windows, feature: int, texts: Sequence[str], promoted: "tuple[Sequence[str], Sequence[str]] | None" = None
) -> Explanation:  # fmt: skip
    """What counts say of one feature; for several make :class:`Statistics` once."""
    return Statistics(windows, texts).explain(feature, promoted)


def _counts(
    column: Column, fired: Mask, live: Mask
) -> tuple[Int64[ndarray, " number"], Int64[ndarray, " number"]]:
    return column.counts(fired & live), column.counts(live)


def _chosen(hits: ndarray, seen: ndarray, total: int, n: int) -> Int64[ndarray, " some"]:
    """Which of some disjoint events to fire on for the best F1; shares of rare ones are drawn to the overall rate."""
    some = np.flatnonzero(hits)
    share = (hits[some] + total / max(1, n)) / (seen[some] + 1)
    some = some[np.argsort(-share, kind="stable")]
    f1 = 2 * hits[some].cumsum() / (total + seen[some].cumsum())
    some = some[: int(f1.argmax()) + 1] if len(some) else some
    return some if len(some) <= MOST else some[np.argsort(-hits[some], kind="stable")[:MOST]]


def _best_spelling(words: Words, on: str, fired: Mask, live: Mask, pure: float = 0.0) -> int | None:
    total = int((fired & live).sum())
    return _spelling(words, on, fired & live, live, total, pure)[0]


def _spelling(
    words: Words, on: str, fired: Mask, live: Mask, total: int, pure: float = 0.0
) -> tuple[int | None, float]:
    """The row of the best spelling by F1 (by recall, of those with a precision of ``pure``), and its F1.

    Of equal ones the one that says most: the longest.
    """
    patterns, _ = words.spellings
    if not patterns:
        return None, 0.0
    hits, seen = words.spelled_of(fired, on), words.spelled_of(live, on)
    f1 = 2 * hits / np.maximum(total + seen, 1)
    score = np.where(hits >= pure * seen, hits if pure else f1, 0.0)
    if score.max() <= 0:
        return None, 0.0
    top = np.flatnonzero(score >= score.max() * (1 - 1e-9))
    row = max(
        top.tolist(),
        key=lambda i: (-patterns[i].runs, HOWS.index(patterns[i].how), len(patterns[i].any[0]), -i),
    )
    return row, float(f1[row])


def _moved(mask: Mask) -> Mask:
    """Each token takes what the next one has."""
    out = np.zeros_like(mask)
    out[:, :-1] = mask[:, 1:]
    return out


def _share(mask: Mask, fired: Mask, live: Mask) -> float:
    """P(fire) where a rule fires."""
    return Quality.of(mask, fired, live).precision


def _either(one: Found, two: Found) -> Found:
    def again(fired: Mask, live: Mask) -> Found | None:
        first = one.again(fired, live)
        second = two.again(fired & ~first.mask, live & ~first.mask) if first is not None else None
        return None if first is None or second is None else _either(first, second)

    return Found(
        one.mask | two.mask, one.size + two.size + 1, lambda: Either((one.build(), two.build())), again
    )


def _silence(about: dict[str, Any]) -> str:
    return f"Doesn't fire in the {about['n']:,} tokens that were looked at."


def _sentence(rule: Kind, about: dict[str, Any]) -> str:
    """The explanation in words."""
    found = about["rule"]
    named = rule.words()
    if isinstance(rule, Either):
        named = "two things: " + "; and ".join(one.words() for one in rule.of)
    covers = f"coverage {found['coverage']:.2f}"
    rare = f"Rare, with {about['firings']} firings in {about['n']:,} tokens. " if about["rare"] else ""
    if found["simple"]:
        return f"{rare}Fires on {named} ({covers})."
    if not found["checked"]:
        return f"{rare}No rule could be checked, for want of firings in other documents; the strongest tokens are {named} ({covers}, on these)."
    if found["f1"] < HOLDS:
        return f"{rare}No simple rule: of those tried none holds on text that it wasn't made from; the best covers {found['coverage']:.2f} of its firings there."
    if isinstance(rule, Tokens) and rule.back == 0:
        return f"{rare}No simple rule: the strongest tokens are {named}, which cover {found['coverage']:.2f} of its firings and are right {found['precision']:.2f} of the time."
    return f"{rare}No simple rule: the best found, {named}, covers {found['coverage']:.2f} of its firings and is right {found['precision']:.2f} of the time."
