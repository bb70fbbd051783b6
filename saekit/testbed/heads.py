"""A planted attention layer: rank-one units under two patterns, of which one dense head would be the sum.

Of every position is known its place (a code of sines and cosines), whether it is marked, and which features it has. One
pattern looks at the position before, the other at the marked positions so far; two units read under each.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.attention import PatternConfig, Patterns

D, SEQ, UNITS, FEATURES = (
    32,
    24,
    4,
    10,
)  # units 0 and 1 read under the first pattern, 2 and 3 under the second
FREQUENCIES = torch.tensor([1.0, 2.0, 5.0, 11.0]) * 2 * torch.pi / SEQ
SHARP = 5.0  # of scores: 1 - exp(-SHARP) of the attention is where it should be, or nearly


@dataclass(frozen=True)
class PlantedHeads:
    """``read`` and ``written`` are the units' directions, ``patterns`` the true ones; ``rows(n)`` draws sequences."""

    read: Float[Tensor, "unit d"]
    written: Float[Tensor, "unit d"]
    patterns: Patterns
    basis: Float[Tensor, "d d"]

    @staticmethod
    def draw(seed: int) -> "PlantedHeads":
        """Directions and patterns; the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        basis, written = (torch.linalg.qr(torch.randn(D, D, generator=g)).Q for _ in range(2))
        places, mark, features = basis[:8], basis[8], basis[9 : 9 + FEATURES]
        patterns = Patterns(PatternConfig(D, 2, 16)).requires_grad_(False)
        for p in patterns.parameters():
            p.zero_()
        cos, sin = FREQUENCIES.cos(), FREQUENCIES.sin()
        for j in range(4):  # a place turned back by one step is the place before
            a, b = places[2 * j], places[2 * j + 1]
            patterns.W_K[0, 2 * j], patterns.W_K[0, 2 * j + 1] = a, b
            patterns.W_Q[0, 2 * j] = 4 * SHARP * (cos[j] * a + sin[j] * b)
            patterns.W_Q[0, 2 * j + 1] = 4 * SHARP * (cos[j] * b - sin[j] * a)
        patterns.W_K[1, 0] = mark
        patterns.b_Q[1, 0] = 4 * 2 * SHARP
        return PlantedHeads(features[:UNITS], written[:UNITS], patterns, basis)

    def rows(self, n: int, generator: torch.Generator) -> Float[Tensor, "n seq columns"]:
        """Sequences of inputs and, beside them, of outputs."""
        angles = torch.arange(SEQ)[:, None] * FREQUENCIES
        places = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
        mark = (torch.rand(n, SEQ, generator=generator) < 0.1).float()
        mark[:, 0] = 1
        on = torch.rand(n, SEQ, FEATURES, generator=generator) < 0.25
        features = on * (0.5 + torch.rand(n, SEQ, FEATURES, generator=generator))
        known = torch.cat([places.expand(n, -1, -1), mark[..., None], features], -1)
        x = known @ self.basis[: known.shape[-1]]
        read = torch.einsum("nsd,ud->nus", x, self.read).unflatten(1, (2, 2))
        codes = torch.einsum("nhqs,nhus->nqhu", self.patterns(x), read).flatten(2)
        return torch.cat([x, codes @ self.written], -1)
