"""A language model with planted neurons: one that tells what tongue a text is in, and pairs of words in superposition.

A text has a tongue, which its first token names. It is made of fillers, first and second words; behind a first and a second
word stands the pair's follower, another one in the first tongue, whose fillers are others too. So a model gains by knowing
tongue and pair. In training some neurons of the second MLP are also held to what they are to tell: one to the first tongue
(1 in its texts, else 0), and six to the twenty pairs of words, each of which has three neurons of its own among them; all others
but the tongue's are silent where a pair ends. No two pairs have the same three, and any two neurons are of four pairs: more
features than neurons, of which three are needed to tell a pair.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saekit.hooks import intervene
from saekit.models import Model, load_model
from saekit.testbed.transformer import Transformer, TransformerConfig

TONGUES = 4
FIRST, SECOND, FILLERS = 5, 4, 8  # words; each tongue has half of the fillers
PAIRS = FIRST * SECOND
NEURONS = 6  # of the pairs
CODES = torch.tensor(list(combinations(range(1, 1 + NEURONS), 3)))  # [pair, 3], neuron 0 is the tongue's
FIRST_WORD = TONGUES
SECOND_WORD = FIRST_WORD + FIRST
FOLLOWER = SECOND_WORD + SECOND
FILLER = FOLLOWER + PAIRS
VOCABULARY = FILLER + FILLERS
LENGTH = 32
POINT = "blocks.1.mlp.act_fn"
CONFIG = TransformerConfig(
    vocabulary=VOCABULARY, context=LENGTH, d_model=48, n_layers=2, d_mlp=64, activation="gelu"
)
FIRM = 0.1  # error that a planted neuron may have, root mean square
ATTEMPTS, APART = 3, 1000  # and how far their seeds lie apart
HELD = 100.0  # weight of the neurons' squared errors, beside the loss of the next token


@dataclass(frozen=True)
class Texts:
    """``tongue`` of each text; ``pair`` that ends at a token, else -1."""

    tokens: Int[Tensor, "n seq"]
    tongue: Int[Tensor, " n"]
    pair: Int[Tensor, "n seq"]

    @property
    def first_tongue(self) -> Bool[Tensor, "n seq"]:
        """Whether a token stands in a text of the first tongue."""
        return (self.tongue == 0)[:, None].expand_as(self.tokens)


def texts(n: int, generator: torch.Generator) -> Texts:
    """Texts of any tongue: of three words a first and a second one with their follower, or either alone with fillers."""
    units = -(-(LENGTH - 1) // 3)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    tongue = random(TONGUES, n)
    own = (tongue == 0)[:, None]
    first, second = random(FIRST, n, units), random(SECOND, n, units)
    pair = SECOND * first + second
    fillers = FILLER + (FILLERS // 2) * own[..., None] + random(FILLERS // 2, n, units, 3)
    kind = random(4, n, units)  # 0, 1: a pair; 2: a first word; 3: a second word
    whole = kind < 2
    follower = FOLLOWER + (pair + PAIRS // 2 * own) % PAIRS
    words = torch.stack([
        (FIRST_WORD + first).where(kind != 3, fillers[..., 0]),
        (SECOND_WORD + second).where(kind != 2, fillers[..., 1]),
        follower.where(whole, fillers[..., 2]),
    ], -1)  # fmt: skip
    none = torch.full_like(pair, -1)
    ends = torch.stack([none, pair.where(whole, -1), none], -1)
    tokens = torch.cat([tongue[:, None], words.flatten(1)], 1)[:, :LENGTH]
    return Texts(tokens, tongue, nn.functional.pad(ends.flatten(1), (1, 0), value=-1)[:, :LENGTH])


def planted(drawn: Texts) -> Bool[Tensor, "n seq neuron"]:
    """Which of the planted neurons are to fire."""
    on = torch.zeros(*drawn.tokens.shape, 1 + NEURONS, dtype=torch.bool)
    on[..., 0] = drawn.first_tongue
    table = torch.zeros(PAIRS + 1, 1 + NEURONS, dtype=torch.bool)
    table[torch.arange(PAIRS)[:, None], CODES] = True  # the last row is that of no pair
    return on | table[drawn.pair]


def model(seed: int = 0, steps: int = 500, rows: int = 64) -> Model:
    """A transformer of two layers that foretells these texts, and whose planted neurons fire as they are to.

    Some seeds leave a neuron silent: then it is learnt again from another seed, up to three times.
    """
    check = texts(200, torch.Generator().manual_seed(2**31 + seed))
    for attempt in range(ATTEMPTS):
        own = _learnt(seed + APART * attempt, steps, rows)
        with torch.no_grad():
            fires = _run(own, check)[1]
        away = (fires[..., : 1 + NEURONS] - planted(check).float()).square().mean((0, 1)).sqrt()
        if away.max() < FIRM:
            return own
    raise RuntimeError(f"seed = {seed}: no attempt plants all neurons; choose another seed")


def _run(model: Model, drawn: Texts) -> tuple[Tensor, Tensor]:
    """Logits, and the second MLP's neurons, in one graph."""
    seen: list[Tensor] = []
    with intervene([(model.site(POINT), seen.append)]):
        logits = model.module(drawn.tokens)
    return logits, seen[0]


def _learnt(seed: int, steps: int, rows: int) -> Model:
    """By AdamW in a one-cycle."""
    lm, g = Transformer(CONFIG, seed), torch.Generator().manual_seed(seed)
    model = load_model(lm, name="planted neurons")
    optimizer = torch.optim.AdamW(lm.parameters(), 5e-3, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        drawn = texts(rows, g)
        logits, fires = _run(model, drawn)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), drawn.tokens[:, 1:].flatten())
        aim = nn.functional.pad(planted(drawn).float(), (0, CONFIG.d_mlp - 1 - NEURONS))
        held = (torch.arange(CONFIG.d_mlp) <= NEURONS) | (drawn.pair >= 0)[..., None]
        optimizer.zero_grad()
        (loss + HELD * ((fires - aim).square() * held).mean()).backward()
        optimizer.step()
        rate.step()
    lm.eval()
    return model
