"""Texts of six grammars that share nearly all their tokens, and a small language model of all of them.

Most tokens of a text are common words, in shares of the text's own that say nothing of its grammar. Between them stand marks
that do: each grammar has eight, which come in a cycle.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saekit.models import Model, load_model
from saekit.testbed.transformer import Transformer, TransformerConfig

GRAMMARS, CYCLE = 6, 8
COMMON = 12
FIRST_MARK = COMMON
VOCABULARY = COMMON + GRAMMARS * CYCLE
LENGTH = 64
MARKED = 0.2  # share of tokens that are marks
STYLE = 1.0
CONFIG = TransformerConfig(vocabulary=VOCABULARY, context=LENGTH, d_model=32, n_layers=2, d_mlp=128)
POINT = "blocks.1.hook_resid_pre"


def texts(grammars: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n seq"]:
    """A text of each grammar (0 to 5)."""
    n = len(grammars)
    shares = torch.rand(n, COMMON, generator=generator).pow(1 / STYLE)
    common = torch.multinomial(shares, LENGTH, replacement=True, generator=generator)
    marked = torch.rand(n, LENGTH, generator=generator) < MARKED
    begin = torch.randint(CYCLE, (n, 1), generator=generator)
    place = (begin + marked.cumsum(1)) % CYCLE
    marks = FIRST_MARK + CYCLE * grammars[:, None] + place
    return marks.where(marked, common)


def model(seed: int = 0, steps: int = 300, rows: int = 32) -> Model:
    """A transformer of two layers that foretells texts of all grammars, trained by AdamW in a one-cycle."""
    lm, g = Transformer(CONFIG, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(lm.parameters(), 5e-3, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        tokens = texts(torch.randint(GRAMMARS, (rows,), generator=g), g)
        loss = nn.functional.cross_entropy(lm(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return load_model(lm.eval(), name="grammars")
