"""Induction, by two layers of attention, with MLPs or without: in a repeated sequence, what came next before."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.models import Model, load_model
from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

VOCABULARY, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
LENGTH, PERIODS = 24, (12, 20)  # tokens behind the separator; how soon they repeat, each at most once
ROWS, RATE = 64, 2e-3


class _Nothing(nn.Module):
    """In the place of an MLP: adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


def sequences(n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n seq"], Int[Tensor, " n"]]:
    """A separator (token 0), then different tokens that repeat with a period of each sequence's own: tokens and periods.

    Since periods differ, no head can find the previous occurrence by its distance.
    """
    drawn = torch.rand(n, VOCABULARY - 1, generator=generator).argsort(1)[:, : PERIODS[1]] + 1
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (n,), generator=generator)
    at = torch.arange(LENGTH) % periods[:, None]
    return torch.cat([torch.zeros(n, 1, dtype=torch.int64), drawn.gather(1, at)], 1), periods


def known(periods: Int[Tensor, " n"]) -> Bool[Tensor, "n seq"]:
    """The positions whose next token has been seen behind the same token."""
    return torch.arange(LENGTH + 1) > periods[:, None]


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Sequences, asked at each position that is known; ``roles``: ``source`` has the last answer, ``end`` asks for it."""
    tokens, periods = sequences(n, generator)
    answers = tokens.roll(-1, 1)
    # behind the last token comes what its period says
    answers[:, -1] = tokens[torch.arange(n), LENGTH + 1 - periods]
    answers = answers.where(known(periods), -1)
    return single(
        tokens, answers, VOCABULARY, {"source": LENGTH + 1 - periods, "end": torch.full((n,), LENGTH)}
    )


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts, and the same with another token behind the previous occurrence of the last one: the end alone is asked."""
    clean = prompts(n, generator)
    rows, source = torch.arange(n), clean.roles["source"]
    absent = torch.rand(n, VOCABULARY, generator=generator).scatter(1, clean.tokens, -1.0)
    absent[:, 0] = -1
    changed = clean.tokens.clone()
    changed[rows, source] = absent.argmax(1)
    last = torch.arange(LENGTH + 1) == LENGTH

    def asked_last(tokens: Tensor) -> Prompts:
        answers = tokens[rows, source][:, None].where(last, -1)
        return single(tokens, answers, VOCABULARY, clean.roles)

    return asked_last(clean.tokens), asked_last(changed)


def trained(steps: int, seed: int = 0) -> Model:
    """The model after so many steps on fresh sequences; 1500 are enough for induction."""
    import transformers

    torch.manual_seed(seed)
    config: Any = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = transformers.GPT2LMHeadModel(config)
    for block in module.transformer.h:
        block.mlp = _Nothing()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.01, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for _ in range(steps):
        tokens, periods = sequences(ROWS, generator)
        counts = known(periods)[:, :-1]
        loss = nn.functional.cross_entropy(module(tokens).logits[:, :-1][counts], tokens[:, 1:][counts])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return load_model(module, name="induction")


def mass_after_previous(
    patterns: Float[Tensor, "batch head query source"], periods: Int[Tensor, " batch"]
) -> Float[Tensor, " head"]:
    """Mean attention of queries whose token came before to the token after its previous occurrence."""
    sequence, query = known(periods).nonzero(as_tuple=True)
    return patterns[sequence, :, query, query - periods[sequence] + 1].mean(0)


TASK = Task(
    name="induction",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH + 1, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_head=16, d_mlp=128
    ),
    prompts=prompts, pairs=pairs, demand=0.99, steps=600, rows=ROWS, rate=RATE,
)  # fmt: skip
