"""Short lives of people of two fields and two genders: a classifier's task and what it can be confounded with.

After De-Arteaga et al. 2019 (1901.09451), as in SHIFT (Marks et al. 2025, 2403.19647): ``Ada . she cures her patient .``
and two sentences more. Gender shows in the name and in every pronoun, the field in ``TOLD`` of the six other words.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

START, STOP, FIRST_PRONOUN = 0, 1, 2  # she, he, her, his
FIRST_NAME, NAMES = 6, 16  # of each gender
FIRST_VERB, VERBS = FIRST_NAME + 2 * NAMES, 10  # of each field, and as many that say nothing
FIRST_OBJECT, OBJECTS = FIRST_VERB + 3 * VERBS, 10
VOCABULARY = FIRST_OBJECT + 3 * OBJECTS
SENTENCES, TOLD = 3, 2
LENGTH = 3 + 5 * SENTENCES


def lives(
    field: Int[Tensor, " n"], gender: Int[Tensor, " n"], generator: torch.Generator
) -> Int[Tensor, "n seq"]:
    """A life of each person's field (0, 1) and gender (0, 1)."""
    n = len(field)

    def word(first: int, each: int, of: Tensor) -> Tensor:
        return first + each * of + torch.randint(each, (n,), generator=generator)

    told = torch.rand(n, 2 * SENTENCES, generator=generator).argsort(1) < TOLD
    shows = field[:, None].where(told, 2)  # 2: a word of no field
    stop = torch.full((n,), STOP)
    tokens = [torch.full((n,), START), word(FIRST_NAME, NAMES, gender), stop]
    for sentence in range(SENTENCES):
        verb = word(FIRST_VERB, VERBS, shows[:, 2 * sentence])
        thing = word(FIRST_OBJECT, OBJECTS, shows[:, 2 * sentence + 1])
        tokens += [FIRST_PRONOUN + gender, verb, FIRST_PRONOUN + 2 + gender, thing, stop]
    return torch.stack(tokens, 1)


def drawn(n: int, generator: torch.Generator) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Fields and genders of n people, which have nothing to do with each other."""
    field, gender = torch.randint(2, (2, n), generator=generator)
    return field, gender


def _asked(tokens: Int[Tensor, "n seq"]) -> Prompts:
    answers = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -1)], 1)
    return single(tokens, answers, VOCABULARY)


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Lives, of which each next token is asked for."""
    return _asked(lives(*drawn(n, generator), generator))


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Lives up to the last pronoun, and the same of the other gender."""
    field, gender = drawn(n, generator)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    out = [lives(field, g, torch.Generator().manual_seed(seed))[:, :-2] for g in (gender, 1 - gender)]
    answers = [torch.full_like(tokens[:, :-1], -1) for tokens in out]
    for given, tokens in zip(answers, out, strict=True):
        given[:, -1] = tokens[:, -1]
    first, second = (single(t[:, :-1], a, VOCABULARY) for t, a in zip(out, answers, strict=True))
    return first, second


TASK = Task(
    name="biographies",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH, d_model=64, n_layers=2, n_heads=4, d_head=16, d_mlp=256
    ),
    prompts=prompts, pairs=pairs, demand=0.0, steps=500, rows=64, rate=3e-3,
)  # fmt: skip
