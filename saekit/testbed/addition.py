"""Addition modulo a prime: ``a b =`` is followed by (a + b) mod p (Power et al. 2022, 2201.02177; Nanda et al. 2023, 2301.05217)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

P = 31
EQUALS = P
TRAINED_ON = 0.8  # share of the pairs (a, b)


def _split() -> tuple[Tensor, Tensor]:
    every = torch.randperm(P * P, generator=torch.Generator().manual_seed(0))
    return every[: int(TRAINED_ON * P * P)], every[int(TRAINED_ON * P * P) :]


SEEN, UNSEEN = _split()


def _of(which: Int[Tensor, " n"]) -> Prompts:
    a, b = which // P, which % P
    tokens = torch.stack([a, b, torch.full_like(a, EQUALS)], 1)
    answers = torch.full_like(tokens, -1)
    answers[:, -1] = (a + b) % P
    return single(tokens, answers, P + 1)


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Pairs that are trained on."""
    return _of(SEEN[torch.randint(len(SEEN), (n,), generator=generator)])


def held_out(n: int, generator: torch.Generator) -> Prompts:
    """Pairs that are never trained on; each once, for there are fewer than any n that means something."""
    return _of(UNSEEN)


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts, and the same with another second summand."""
    which = torch.randint(P * P, (n,), generator=generator)
    other = (which % P + torch.randint(1, P, (n,), generator=generator)) % P
    return _of(which), _of(which // P * P + other)


def waves(numbers: Float[Tensor, "p d"]) -> tuple[Float[Tensor, "p wave"], Float[Tensor, "wave d"]]:
    """The numbers' vectors as their mean and waves, exactly: ``numbers = mean + values @ vectors``.

    Values are ``cos(2 pi f a / p)`` for every frequency f = 1 .. (p - 1) / 2 of the number a, then the same of sin;
    vectors are what each of them writes.
    """
    n = len(numbers)
    a, f = torch.arange(n, dtype=torch.float64), torch.arange(1, (n + 1) // 2, dtype=torch.float64)
    angles = 2 * torch.pi * a[:, None] * f / n
    values = torch.cat([angles.cos(), angles.sin()], 1)
    return values.to(numbers), (2 / n * values.T @ numbers.double()).to(numbers)


def spectrum(numbers: Float[Tensor, "p d"]) -> Float[Tensor, " frequency"]:
    """Share of the variance over the numbers that each frequency 1 .. (p - 1) / 2 has; they sum to 1.

    Of the numbers' embeddings a few frequencies have most: the model adds angles (Nanda et al. 2023).
    """
    power = torch.fft.rfft(numbers.double(), dim=0)[1:].abs().square().sum(1)
    return power / power.sum()


TASK = Task(
    name="addition",
    config=TransformerConfig(
        vocabulary=P + 1, context=3, d_model=64, n_layers=1, n_heads=4, d_head=16, d_mlp=256, norm="none",
    ),
    prompts=prompts, pairs=pairs, held_out=held_out, demand=0.99, steps=1500, rows=256, rate=5e-3, decay=1.0,
)  # fmt: skip
