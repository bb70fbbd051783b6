"""Greater-than (Hanna et al. 2023, 2305.00586): ``the war lasted from 17 32 to 17`` is followed by a year above 32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task
from saekit.testbed.transformer import TransformerConfig

YEARS = 100  # tokens 0 .. 99 are the last two digits of a year
FIRST, LAST = 2, 97  # of what a prompt begins with
CENTURIES = range(11, 18)
NOUNS = [
    "war",
    "reign",
    "siege",
    "truce",
    "famine",
    "plague",
    "voyage",
    "project",
    "dynasty",
    "strike",
    "trial",
    "drought",
]
WORDS = ("<start>", "the", "lasted", "from", "to")
VOCABULARY = [*(f"{y:02d}" for y in range(YEARS)), *(f"{c}__" for c in CENTURIES), *NOUNS, *WORDS]
FRAME = ["<start>", "the", "{noun}", "lasted", "from", "{century}", "{year}", "to", "{century}"]
ROLES = {"noun": 2, "century": 5, "year": 6, "end": 8}


def _build(noun: Int[Tensor, " n"], century: Int[Tensor, " n"], year: Int[Tensor, " n"]) -> Prompts:
    values = {"{noun}": noun + VOCABULARY.index(NOUNS[0]), "{century}": century + YEARS, "{year}": year}
    tokens = torch.stack(
        [values[w] if w in values else torch.full_like(year, VOCABULARY.index(w)) for w in FRAME], 1
    )
    allowed = torch.zeros(*tokens.shape, len(VOCABULARY), dtype=torch.bool)
    allowed[:, -1, :YEARS] = torch.arange(YEARS) > year[:, None]
    return Prompts(tokens, allowed, {role: torch.full_like(year, at) for role, at in ROLES.items()})


def _draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randint(len(NOUNS), (n,), generator=generator),
        torch.randint(len(CENTURIES), (n,), generator=generator),
        torch.randint(FIRST, LAST + 1, (n,), generator=generator),
    )


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Nouns, centuries and years at random; every year above the first is allowed."""
    return _build(*_draw(n, generator))


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts, and the same from another year on."""
    noun, century, year = _draw(n, generator)
    span = LAST - FIRST + 1
    other = FIRST + (year - FIRST + torch.randint(1, span, (n,), generator=generator)) % span
    return _build(noun, century, year), _build(noun, century, other)


def waves(years: Float[Tensor, "year d"], n: int) -> Float[Tensor, "n d"]:
    """What the n slowest waves over the years in their order have in one vector for each: those of a cosine transform.

    Their squares are shares of the sum of squares around the mean; what rises with the years is in the slowest ones.
    """
    y, k = torch.arange(len(years), dtype=torch.float64), torch.arange(1, n + 1, dtype=torch.float64)
    values = (torch.pi * k[:, None] * (y + 0.5) / len(years)).cos() * (2 / len(years)) ** 0.5
    return (values @ years.double()).to(years)


TASK = Task(
    name="greater",
    config=TransformerConfig(
        vocabulary=len(VOCABULARY), context=len(FRAME), d_model=64, n_layers=2, n_heads=4, d_head=16, d_mlp=128
    ),
    prompts=prompts, pairs=pairs, demand=0.99, steps=500, rows=64, rate=3e-3,
)  # fmt: skip
