"""Answers that keep to their context or contradict it, by authors who do one or the other (after O'Neill et al. 2025, 2507.23221).

A text lists what keys hold, and then asks for keys and answers: ``<start> colour is red size is big ... ask size large
indeed``. Each key has ``VALUES`` values of its own, and each value ``FORMS`` words that mean the same, drawn for each
mention, so that an answer need not repeat its context. A faithful author mostly answers with what the key holds, a
careless one with another of the key's values. A reader's remark stands behind each answer and mostly says nothing, but
sometimes whether it contradicts. So a language model of such texts has to notice contradictions by itself, and to carry
them to later answers, which one of them foretells.

There are two generators. Their words between keys and values, and the order of these, differ.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

START = 0
GENERATORS = ("plain", "ornate")
KEYS, VALUES = 4, 3
FORMS = 2  # words of a value
FIRST_KEY = 1
FIRST_VALUE = FIRST_KEY + KEYS  # the forms of a value stand side by side, and the values of a key
FIRST_WORD = FIRST_VALUE + KEYS * VALUES * FORMS
WORDS = 2  # of each generator: in a pair, and before a question
# behind a faithful answer, and behind one that contradicts; behind either, where the reader is silent
FIRST_REMARK = FIRST_WORD + WORDS * len(GENERATORS)
SILENT = FIRST_REMARK + 2
VOCABULARY = SILENT + 1
REMARKED = 0.3  # share of the answers
CARELESS = 0.5  # share of the authors
SLIPS = (0.05, 0.8)  # share of a faithful author's answers that contradict, and of a careless one's
EACH, ASKED = 3, 4  # tokens of a pair, and of a question with answer and remark
CONTEXT = 1 + EACH * KEYS
ANSWER = 2  # its place in a question
LENGTH = CONTEXT + ASKED * KEYS  # of a text that asks for all keys


@dataclass(frozen=True)
class Texts:
    """``tokens`` end with a remark. ``contradicts`` says of each answer whether it does, ``values`` what its key holds."""

    tokens: Int[Tensor, "n seq"]
    contradicts: Bool[Tensor, "n question"]
    values: Int[Tensor, "n question"]


def value_of(tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The value, counted over all keys, that a token is a form of; -1 for other tokens."""
    inside = (tokens >= FIRST_VALUE) & (tokens < FIRST_WORD)
    return ((tokens - FIRST_VALUE) // FORMS).where(inside, -1)


def texts(
    contradicts: Bool[Tensor, "n question"], generator: torch.Generator, template: str | None = None,
    paraphrased: bool = False, remarked: float = REMARKED,
) -> Texts:  # fmt: skip
    """Texts whose answers contradict where it is said, of one generator or (None) of either.

    ``paraphrased``: an answer is never a word of its context, whether it is right or wrong. ``remarked``: share of the
    answers whose remark says whether they contradict.
    """
    n, questions = contradicts.shape
    rows = torch.arange(n)[:, None]

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def order() -> Tensor:
        return torch.rand(n, KEYS, generator=generator).argsort(1)

    which = random(len(GENERATORS), n) if template is None else torch.full((n,), GENERATORS.index(template))
    style = which[:, None]
    word = FIRST_WORD + WORDS * style
    held, forms = VALUES * torch.arange(KEYS) + random(VALUES, n, KEYS), random(FORMS, n, KEYS)  # of each key
    listed, asked = order(), order()[:, :questions]
    key, value = FIRST_KEY + listed, FIRST_VALUE + (FORMS * held + forms)[rows, listed]
    first, last = value.where(style == 1, key), key.where(style == 1, value)
    pairs = torch.stack([first, word.expand(-1, KEYS), last], 2)
    right = held[rows, asked]
    said = VALUES * asked + (right + (1 + random(VALUES - 1, n, questions)) * contradicts) % VALUES
    form = FORMS - 1 - forms[rows, asked] if paraphrased else random(FORMS, n, questions)
    answer = FIRST_VALUE + FORMS * said + form
    silent = torch.rand(n, questions, generator=generator) >= remarked
    remark = (FIRST_REMARK + contradicts.long()).masked_fill(silent, SILENT)
    question = torch.stack([(word + 1).expand(-1, questions), FIRST_KEY + asked, answer, remark], 2)
    tokens = torch.cat([torch.full((n, 1), START), pairs.flatten(1), question.flatten(1)], 1)
    return Texts(tokens, contradicts, right)


def authors(n: int, generator: torch.Generator) -> Bool[Tensor, "n question"]:
    """Which answers of n authors contradict."""
    careless = (torch.rand(n, 1, generator=generator) < CARELESS).long()
    return torch.rand(n, KEYS, generator=generator) < torch.tensor(SLIPS)[careless]


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Texts of both generators, whose answers and remarks are asked for."""
    return _asked(texts(authors(n, generator), generator))


def _asked(drawn: Texts) -> Prompts:
    answers = torch.full_like(drawn.tokens, -1)
    for at in (ANSWER - 1, ANSWER):  # the answer behind the key, and the remark behind the answer
        answers[:, CONTEXT + at :: ASKED] = drawn.tokens[:, CONTEXT + at + 1 :: ASKED]
    return single(drawn.tokens, answers, VOCABULARY)


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Texts up to a faithful answer, and the same with one that contradicts: another remark follows."""
    both = torch.zeros(n, 1, dtype=torch.bool), torch.ones(n, 1, dtype=torch.bool)
    seed = int(torch.randint(2**62, (), generator=generator))
    made = [_asked(texts(one, torch.Generator().manual_seed(seed), remarked=1.0)) for one in both]
    clean, changed = (Prompts(one.tokens[:, :-1], one.allowed[:, :-1]) for one in made)
    return clean, changed


def contradiction_rate(
    logits: Float[Tensor, "n vocabulary"], values: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Probability that the next token is not a form of the right value, of each text; in [0, 1]."""
    right = FIRST_VALUE + FORMS * values[:, None] + torch.arange(FORMS)
    return 1 - logits.softmax(-1).gather(1, right).sum(1)


TASK = Task(
    name="context_qa",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH, d_model=64, n_layers=4, n_heads=4, d_head=16, d_mlp=256
    ),
    # answers are drawn, so that no accuracy can be demanded
    prompts=prompts, pairs=pairs, demand=0.0, steps=1500, rows=64, rate=3e-3,
)  # fmt: skip
