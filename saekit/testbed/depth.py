"""Depth of brackets: behind each bracket of a word without a close too many, how many are open."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

START, OPEN, CLOSE, DEPTH = 0, 1, 2, 3  # tokens; depth d is token DEPTH + d
LENGTH, DEEPEST = 20, 8  # brackets behind the start; how many may be open
VOCABULARY = DEPTH + DEEPEST + 1


def depths(tokens: Int[Tensor, "n seq"]) -> Int[Tensor, "n seq"]:
    """How many brackets are open behind each position."""
    return ((tokens == OPEN).int() - (tokens == CLOSE).int()).cumsum(1)


def line(stream: Float[Tensor, "n seq d"], tokens: Int[Tensor, "n seq"]) -> tuple[Float[Tensor, " d"], float]:
    """The direction and bias by which vectors of a stream say the depth, by least squares: ``stream @ direction + bias``."""
    x = torch.nn.functional.pad(stream.flatten(0, 1).double(), (0, 1), value=1.0)
    # normal equations with a slight ridge, for a normed stream fills one dimension fewer than it has
    ridge = 1e-6 * x.square().mean() * len(x) * torch.eye(x.shape[1])
    found = torch.linalg.solve(x.T @ x + ridge, x.T @ depths(tokens).flatten().double())
    return found[:-1].to(stream), found[-1].item()


def _of(tokens: Int[Tensor, "n seq"]) -> Prompts:
    return single(tokens, DEPTH + depths(tokens), VOCABULARY)


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Words in which each bracket opens or closes alike, where it can do both."""
    coins = torch.rand(n, LENGTH, generator=generator) < 0.5
    at, brackets = torch.zeros(n, dtype=torch.int64), []
    for i in range(LENGTH):
        opens = (coins[:, i] | (at == 0)) & (at < DEEPEST)
        at = at + opens.long().where(opens, -1)
        brackets.append(opens.long().where(opens, CLOSE))
    return _of(torch.stack([torch.full_like(at, START), *brackets], 1))


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts, and the same with one bracket turned round: from there on, two more or two fewer are open."""
    clean = prompts(n, generator).tokens
    turned = clean[:, None].expand(-1, LENGTH, -1).clone()
    each = torch.arange(LENGTH)
    turned[:, each, each + 1] = OPEN + CLOSE - clean[:, 1:]
    deep = depths(turned.flatten(0, 1)).view(n, LENGTH, -1)
    legal = (deep.amin(-1) >= 0) & (deep.amax(-1) <= DEEPEST)  # the last one can always be turned, or another
    at = (torch.rand(n, LENGTH, generator=generator) * legal).argmax(1)
    return _of(clean), _of(turned[torch.arange(n), at])


TASK = Task(
    name="depth",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH + 1, d_model=64, n_layers=2, n_heads=4, d_head=16, d_mlp=128
    ),
    prompts=prompts, pairs=pairs, demand=0.99, steps=200, rows=64, rate=3e-3,
)  # fmt: skip
