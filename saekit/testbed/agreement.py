"""Subjects and verbs that agree in number, across other nouns (Marks et al. 2025, 2403.19647, table 1).

Sentences are ``the dog runs .``, ``the dog near the cats runs .`` or ``the dog that the cats see runs .``: a verb agrees
with its own subject, and the noun that stands nearer may have the other number.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

START, END, THE, THAT, FIRST_PREPOSITION = 0, 1, 2, 3, 4
PREPOSITIONS, NOUNS, VERBS = 4, 24, 16
FIRST_NOUN = FIRST_PREPOSITION + PREPOSITIONS  # singulars, then their plurals
FIRST_VERB = FIRST_NOUN + 2 * NOUNS
VOCABULARY = FIRST_VERB + 2 * VERBS
ACROSS = 7  # tokens before the main verb of a sentence with a relative clause
LENGTH = ACROSS + 2


def _noun(n: int, plural: Tensor, generator: torch.Generator) -> Tensor:
    return FIRST_NOUN + torch.randint(NOUNS, (n,), generator=generator) + NOUNS * plural


def _verb(n: int, plural: Tensor, generator: torch.Generator) -> Tensor:
    return FIRST_VERB + torch.randint(VERBS, (n,), generator=generator) + VERBS * plural


def _sentences(n: int, kind: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n seq"]:
    """Sentences of kinds: 0 simple, 1 with a preposition, 2 with a relative clause."""
    subject, other = torch.randint(2, (2, n), generator=generator)
    first, second = _noun(n, subject, generator), _noun(n, other, generator)
    inner, main = _verb(n, other, generator), _verb(n, subject, generator)
    preposition = FIRST_PREPOSITION + torch.randint(PREPOSITIONS, (n,), generator=generator)
    start, the, that, end = (torch.full((n,), token) for token in (START, THE, THAT, END))
    forms = [
        [start, the, first, main, end, end, end, end, end],
        [start, the, first, preposition, the, second, main, end, end],
        [start, the, first, that, the, second, inner, main, end],
    ]
    return torch.stack([torch.stack(form, 1) for form in forms])[kind, torch.arange(n)]


def _asked(tokens: Int[Tensor, "n seq"]) -> Prompts:
    """Each next token is asked for, up to the end."""
    answers = torch.full_like(tokens, -1)
    answers[:, :-1] = tokens[:, 1:].where(tokens[:, :-1] != END, -1)
    return single(tokens, answers, VOCABULARY)


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Sentences of all kinds alike."""
    return _asked(_sentences(n, torch.randint(3, (n,), generator=generator), generator))


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Sentences with a relative clause, up to the main verb, and the same with the subject's number changed."""
    whole = _sentences(n, torch.full((n,), 2), generator)
    other = whole.clone()
    for at, first, step in ((2, FIRST_NOUN, NOUNS), (ACROSS, FIRST_VERB, VERBS)):
        other[:, at] = first + (whole[:, at] - first + step) % (2 * step)
    out = []
    for sentences in (whole, other):
        answers = torch.full((n, ACROSS), -1)
        answers[:, -1] = sentences[:, ACROSS]
        out.append(single(sentences[:, :ACROSS], answers, VOCABULARY))
    return out[0], out[1]


def preference(logits: Float[Tensor, "n seq vocabulary"], plural: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """By how much the last position prefers verbs of the wrong number, in their mean logits; ``plural``: the right one."""
    forms = logits[:, -1, FIRST_VERB:].unflatten(-1, (2, VERBS)).mean(-1)
    return (forms[:, 1] - forms[:, 0]) * (1 - 2 * plural)


TASK = Task(
    name="agreement",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH, d_model=64, n_layers=2, n_heads=4, d_head=16, d_mlp=256
    ),
    # words are drawn, so that no accuracy can be demanded
    prompts=prompts, pairs=pairs, demand=0.0, steps=500, rows=64, rate=3e-3,
)  # fmt: skip
