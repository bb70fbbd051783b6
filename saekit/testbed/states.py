"""A language of states: a random walk on a graph, each state written as two digits (Tamkin et al. 2023, 2310.17230)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.models import Model, load_model

BASE, EDGES, LENGTH = 5, 4, 24  # digits; ways out of a state; states of a sequence
STATES, START = BASE**2, BASE  # the token that begins a sequence is the one behind the digits
WIDTH, LAYERS, HEADS = 64, 2, 4


@dataclass(frozen=True)
class StateLanguage:
    """``edges[s]`` are the states that may follow state s."""

    edges: Int[Tensor, "state edge"]

    @staticmethod
    def draw(seed: int) -> "StateLanguage":
        """A random graph; the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        return StateLanguage(torch.rand(STATES, STATES, generator=g).argsort(1)[:, :EDGES])

    def walks(self, n: int, generator: torch.Generator) -> Int[Tensor, "n state"]:
        """States of n walks."""
        at = torch.randint(STATES, (n,), generator=generator)
        out = [at]
        for _ in range(LENGTH - 1):
            at = self.edges[at, torch.randint(EDGES, (n,), generator=generator)]
            out.append(at)
        return torch.stack(out, 1)

    def next(self) -> Bool[Tensor, "state state"]:
        """Whether the second may follow the first."""
        return torch.zeros(STATES, STATES, dtype=torch.bool).scatter(1, self.edges, True)

    def accuracy(self, logits: Float[Tensor, "n seq token"], walks: Int[Tensor, "n state"]) -> float:
        """Share of the transitions whose two predicted digits, the second behind the true first, are an allowed state's."""
        follows = self.next()[walks[:, :-1]].unflatten(-1, (BASE, BASE))  # [n, state, first, second]
        first = logits[:, 2:-1:2, :BASE].argmax(-1)
        right = follows.any(-1).gather(-1, first[..., None])
        given = follows.gather(2, (walks[:, 1:] // BASE)[..., None, None].expand(-1, -1, 1, BASE))[:, :, 0]
        second = logits[:, 3:-1:2, :BASE].argmax(-1)
        return (right[..., 0] & given.gather(-1, second[..., None])[..., 0]).double().mean().item()


def tokens_of(walks: Int[Tensor, "n state"]) -> Int[Tensor, "n seq"]:
    """A start token, then the two digits of every state."""
    digits = torch.stack([walks // BASE, walks % BASE], -1).flatten(1)
    return torch.cat([torch.full((len(walks), 1), START), digits], 1)


def trained(language: StateLanguage, steps: int, seed: int = 0) -> Model:
    """A small GPT-2 after so many steps of 64 fresh walks."""
    import transformers

    torch.manual_seed(seed)
    config: Any = transformers.GPT2Config(
        vocab_size=BASE + 1, n_positions=2 * LENGTH + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=START, eos_token_id=START,
    )  # fmt: skip
    module = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for _ in range(steps):
        tokens = tokens_of(language.walks(64, generator))
        loss = nn.functional.cross_entropy(
            module(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return load_model(module, name="states")
