"""Short lives of people of two fields and two genders: a classifier's task and what it can be confounded with.

After De-Arteaga et al. 2019 (1901.09451), as in SHIFT (Marks et al. 2025, 2403.19647): ``Ada . she cures patients .`` and
two sentences more. Gender shows in the name and in every pronoun, the field in ``TOLD`` of the six other words.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

START, STOP, FIRST_PRONOUN = 0, 1, 2  # she, he
FIRST_NAME, NAMES = 4, 16  # of each gender
FIRST_VERB, VERBS = FIRST_NAME + 2 * NAMES, 10  # of each field, and as many that say nothing
FIRST_OBJECT, OBJECTS = FIRST_VERB + 3 * VERBS, 10
VOCABULARY = FIRST_OBJECT + 3 * OBJECTS
SENTENCES, TOLD = 3, 3
LENGTH = 3 + 4 * SENTENCES


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
        tokens += [FIRST_PRONOUN + gender, verb, thing, stop]
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
    """Lives up to the second pronoun, and the same of people of the other gender."""
    whole = lives(*drawn(n, generator), generator)[:, :8]
    other = whole.clone()
    other[:, 1] = FIRST_NAME + (whole[:, 1] - FIRST_NAME + NAMES) % (2 * NAMES)
    other[:, 3::4] = 2 * FIRST_PRONOUN + 1 - whole[:, 3::4]
    out = []
    for tokens in (whole, other):
        answers = torch.full((n, tokens.shape[1] - 1), -1)
        answers[:, -1] = tokens[:, -1]
        out.append(single(tokens[:, :-1], answers, VOCABULARY))
    return out[0], out[1]


TASK = Task(
    name="biographies",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH, d_model=64, n_layers=2, n_heads=4, d_head=16, d_mlp=256
    ),
    # words are drawn, so that no accuracy can be demanded
    prompts=prompts, pairs=pairs, demand=0.0, steps=500, rows=64, rate=3e-3,
)  # fmt: skip
