"""Indirect objects (Wang et al. 2022, 2211.00593): of two people one gives something, to the other.

``<start> when Anna and Ben went to the park , Ben gave a book to`` is followed by ``Anna``. Three fillers stand
before the first name or before the giver, so that the names' places vary; the giver's and the end's don't.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

START = 0
WORDS = ("and", "went", "to", "the", ",", "a")
NAMES = [
    "Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hal", "Ida", "Jack", "Kim", "Leo", "Mary", "Ned",
    "Olga", "Paul", "Quin", "Rosa", "Sam", "Tina", "Ugo", "Vera", "Will", "Xena", "Yuri", "Zoe", "Amy", "Bob",
    "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "John", "Kate", "Liam", "Mona", "Nick",
]  # fmt: skip
KINDS = {
    "opener": ("when", "after", "while", "once"), "place": ("park", "shop", "school", "beach", "station", "garden"),
    "verb": ("gave", "handed", "passed", "sent"), "object": ("book", "drink", "ring", "ball", "letter", "flower"),
    "filler": ("then", "today", "again", "later"),
}  # fmt: skip
VOCABULARY = ["<start>", *WORDS, *NAMES, *(w for words in KINDS.values() for w in words)]
FILLERS = 3  # in a prompt, some before the first name and the rest before the giver
FIRST_NAME = VOCABULARY.index(NAMES[0])
# {a} and {b} are the names in their order, {s} is the giver; {early} and {late} are fillers
FRAME = [
    "<start>", "{opener}", "{early}", "{a}", "and", "{b}", "went", "to", "the", "{place}", ",",
    "{late}", "{s}", "{verb}", "a", "{object}", "to",
]  # fmt: skip
LENGTH = len(FRAME) - 2 + FILLERS


def _words(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    words = KINDS[kind]
    return VOCABULARY.index(words[0]) + torch.randint(len(words), shape, generator=generator)


def _build(
    n: int, order: Int[Tensor, "n 2"], giver: Int[Tensor, " n"], generator: torch.Generator
) -> Prompts:
    """Prompts with the names ``order`` and ``giver`` (0: the first gives, 1: the second)."""
    early = torch.randint(FILLERS + 1, (n,), generator=generator)
    tokens = torch.zeros(n, LENGTH, dtype=torch.int64)
    fillers = _words("filler", (n, FILLERS), generator)
    rows, at = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    roles: dict[str, Tensor] = {}
    for word in FRAME:
        match word:
            case "{early}" | "{late}":
                count = early if word == "{early}" else FILLERS - early
                for i in range(FILLERS):
                    more = rows[i < count]
                    tokens[more, at[more] + i] = fillers[more, i]
                at = at + count
                continue
            case "{a}" | "{b}":
                value, name = order[:, int(word == "{b}")], word[1]
            case "{s}":
                value, name = order[rows, giver], "s2"
            case _ if word[0] == "{":
                value, name = _words(word[1:-1], (n,), generator), word[1:-1]
            case _:
                value, name = torch.full((n,), VOCABULARY.index(word)), ""
        tokens[rows, at] = value
        if name:
            roles[name] = at
        at = at + 1
    a, b = roles.pop("a"), roles.pop("b")
    roles |= {"io": b.where(giver == 0, a), "s1": a.where(giver == 0, b), "end": at - 1}
    answers = torch.full((n, LENGTH), -1)
    answers[:, -1] = order[rows, 1 - giver]
    return single(tokens, answers, len(VOCABULARY), roles)


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """ABBA and BABA alike: the giver is the first or the second of two names.

    ``roles``: ``io`` and ``s1`` (the names' first mentions), ``s2`` (the giver), ``end``, and each kind of word.
    """
    order = FIRST_NAME + torch.rand(n, len(NAMES), generator=generator).argsort(1)[:, :2]
    return _build(n, order, torch.randint(2, (n,), generator=generator), generator)


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts, and the same with the other one giving: the giver's token alone changes, and with it who receives."""
    clean = prompts(n, generator)
    rows, io, s1, s2 = torch.arange(n), *(clean.roles[r] for r in ("io", "s1", "s2"))
    tokens, answers = clean.tokens.clone(), clean.answers.clone()
    tokens[rows, s2], answers[:, -1] = clean.tokens[rows, io], clean.tokens[rows, s1]
    return clean, single(tokens, answers, len(VOCABULARY), clean.roles | {"io": s1, "s1": io})


def exchanged(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts, and the same with the two people in each other's place everywhere: who receives changes as well.

    Unlike :func:`pairs`, which change nothing in front of the giver, these also move what holds the names there.
    """
    clean = prompts(n, generator)
    rows, io, s1, s2 = torch.arange(n), *(clean.roles[r] for r in ("io", "s1", "s2"))
    receiver, giver = clean.tokens[rows, io], clean.tokens[rows, s1]
    tokens, answers = clean.tokens.clone(), clean.answers.clone()
    tokens[rows, io], tokens[rows, s1], tokens[rows, s2] = giver, receiver, receiver
    answers[:, -1] = giver
    return clean, single(tokens, answers, len(VOCABULARY), clean.roles)


TASK = Task(
    name="ioi",
    config=TransformerConfig(
        vocabulary=len(VOCABULARY), context=LENGTH, d_model=96, n_layers=3, n_heads=6, d_head=16, d_mlp=192
    ),
    prompts=prompts, pairs=pairs, demand=0.99, steps=1500, rows=32, rate=2e-3,
)  # fmt: skip
