"""How windows and questions are put to a language model.

An example is one line: line breaks are shown as ↵, and what is marked stands between « and », word by word; mere spaces
that are marked are shown as ·, so that no mark is unseen. Every prompt of a scorer has the explanation on a line of its own,
and examples with numbers by which the answers name them. What is the same in all prompts comes first, so that servers can
keep it.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from saekit.autointerp.requests import Message
from saekit.tokens import Decode, in_text
from saekit.types import SaekitError

TASK = "You judge whether a feature of a language model is active in texts, going by an explanation of the feature alone."
WORDS = {"\n": "↵", "\r": "", "\t": "⇥", "«": "‹", "»": "›"}  # marks in the text itself mark nothing


class Reader:
    """Token ids as text that is shown; ``decode`` takes a list of ids."""

    def __init__(self, decode: Decode, n_tokens: int):
        self.decode, self.n_tokens = decode, n_tokens

    @cached_property
    def within(self) -> Decode:
        """What ``decode`` says of tokens within a text."""
        return in_text(self.decode, self.n_tokens)

    @cached_property
    def texts(self) -> list[str]:
        """Each token's own text."""
        return [self.within([token]) for token in range(self.n_tokens)]

    @cached_property
    def sizes(self) -> Int64[ndarray, " token"]:
        """Characters of each token's own text."""
        return np.array([len(text) for text in self.texts])

    @cached_property
    def _opens(self) -> Bool[ndarray, " token"]:
        """Tokens that begin a word: with white space in front, or nothing but it."""
        return np.array([text[:1].isspace() for text in self.texts])

    def line(self, tokens: Int64[ndarray, " width"], marked: "Bool[ndarray, ' width'] | None" = None) -> str:
        """A window as one line, with its marked words between « and »."""
        if marked is None or not marked.any():
            return shown(self.decode(tokens.tolist())).strip()
        # a piece ends where marks begin or end, and before each marked word
        cuts = np.flatnonzero((marked[1:] != marked[:-1]) | (marked[1:] & self._opens[tokens[1:]])) + 1
        out = []
        for piece, on in zip(np.split(tokens, cuts), np.split(marked, cuts), strict=True):
            text = shown(self.within(piece.tolist()))
            if on[0]:
                inner = text.strip()
                if not inner:  # a mark that nobody sees would tell by its absence
                    text = inner = seen(text)
                lead = text[: len(text) - len(text.lstrip())]
                text = f"{lead}«{inner}»{text[len(lead) + len(inner) :]}"
            out.append(text)
        return "".join(out).strip()


def shown(text: str) -> str:
    """Text on one line, in which no mark stands."""
    for old, new in WORDS.items():
        text = text.replace(old, new)
    return text


def seen(text: str) -> str:
    """A marked text without what surrounds it; mere white space as signs, and nothing at all as one."""
    return text.strip() or "·" * len(text) or "∅"


def chat(system: str, *parts: str) -> tuple[Message, ...]:
    """What a model is, and the question, as messages."""
    return Message("system", system), Message("user", "\n\n".join(parts))


def explained(text: str) -> str:
    """The line that holds an explanation; a blind control has none."""
    return f"Explanation: {' '.join(text.split())}"


def numbered(lines: Sequence[str]) -> str:
    """Examples, counted from 1."""
    return "\n\n".join(f"Example {i}: {line}" for i, line in enumerate(lines, 1))


def reader_of(model: Any) -> Reader:
    """The reader of a model's tokens; raises where it has no tokenizer."""
    if model.tokenizer is None:
        raise SaekitError(f"model {model.name!r} has no tokenizer, so its features can't be shown as text")
    return Reader(lambda ids: model.tokenizer.decode(ids), len(model.tokenizer))
