"""A residual network that learns bits, XORs of two and parities of four at once: targets of known order of complexity."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

BITS = 8
LINEAR, XOR, PARITY = "linear", "XOR", "parity"
SETS = {
    LINEAR: ((0,), (2,), (5,), (7,)),
    XOR: ((0, 1), (2, 3), (4, 5), (6, 7)),
    PARITY: ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 4, 5), (2, 3, 6, 7)),
}  # bits whose product is a target
KINDS = tuple(kind for kind, sets in SETS.items() for _ in sets)  # of each target
WIDTH, HIDDEN, BLOCKS, NOISE = 32, 32, 4, 0.2
STEPS, BATCH, LR, DECAY = 2000, 256, 2e-3, 1e-2


class Bits(NamedTuple):
    """Noisy bits, each 1 or -1 and a normal error of ``NOISE``; and the targets, 1 or -1, in the order of ``KINDS``."""

    x: Float[Tensor, "rows bits"]
    targets: Float[Tensor, "rows targets"]


def bits(rows: int, generator: torch.Generator) -> Bits:
    """Rows of independent fair bits."""
    signs = 2.0 * torch.randint(2, (rows, BITS), generator=generator) - 1
    targets = [signs[:, list(some)].prod(1) for sets in SETS.values() for some in sets]
    return Bits(signs + NOISE * torch.randn(rows, BITS, generator=generator), torch.stack(targets, 1))


class Residual(nn.Module):
    """x, embedded in ``WIDTH`` dimensions, to which each block adds W2 relu(W1 norm(h)); a linear readout of each target."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.embed = nn.Linear(BITS, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(BLOCKS))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(BLOCKS))
        self.read = nn.Linear(WIDTH, len(KINDS))
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 * ("weight" in name))

    def streams(self, x: Float[Tensor, "rows bits"]) -> list[Float[Tensor, "rows width"]]:
        """The embedding, and the stream after each block."""
        out = [self.embed(x)]
        for up, down in zip(self.up, self.down, strict=True):
            h = nn.functional.layer_norm(out[-1], (WIDTH,))
            out.append(out[-1] + down(up(h).relu()))
        return out

    def forward(self, x: Float[Tensor, "rows bits"]) -> Float[Tensor, "rows targets"]:
        """Log odds of each target being 1."""
        return self.read(self.streams(x)[-1])


def learning(seed: int, steps: int = STEPS) -> Iterator[Residual]:
    """The network before each step, and after the last: the same object, which goes on learning."""
    g = torch.Generator().manual_seed(seed)
    net = Residual(g)
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
    for _ in range(steps):
        yield net
        x, targets = bits(BATCH, g)
        loss = nn.functional.softplus(-targets * net(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    yield net
