"""Signals on a ring: sums of a few shifted smooth functions, sampled at any resolution (after 2509.03738)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError

MODES = 12  # highest frequency of a function
PLACES = 64  # that a shift may fall on
MOST = 3  # shifted atoms of a signal


@dataclass(frozen=True)
class Signals:
    """Which ``atom`` stands at which ``place`` (of ``PLACES``), how ``large``; 0 where a signal has fewer than ``MOST``."""

    functions: Float[Tensor, "atom parts 2"]
    atom: Int[Tensor, "rows most"]
    place: Int[Tensor, "rows most"]
    large: Float[Tensor, "rows most"]

    def on(self, n: int) -> Float[Tensor, "rows n"]:
        """The signals on n samples, a multiple of ``PLACES``."""
        if n < PLACES or n % PLACES:
            raise SaekitError(f"n = {n} must be a multiple of {PLACES}, so that shifts fall on samples")
        at = (torch.arange(n) - self.place[..., None] * (n // PLACES)) % n
        return (self.large[..., None] * sampled(self.functions, n)[self.atom[..., None], at]).sum(1)


def functions(n_atoms: int, generator: torch.Generator) -> Float[Tensor, "atom parts 2"]:
    """Cosine and sine parts of random smooth functions at frequencies 0 to ``MODES``, falling with frequency."""
    fall = torch.exp(-((torch.arange(MODES + 1) / MODES) ** 2))
    return torch.randn(n_atoms, MODES + 1, 2, generator=generator) * fall[:, None]


def sampled(functions: Float[Tensor, "atom parts 2"], n: int) -> Float[Tensor, "atom n"]:
    """The functions on n samples; their norm is 1 on ``PLACES``, so the root of ``n / PLACES`` on n."""
    angle = 2 * torch.pi * torch.arange(functions.shape[1])[:, None] * torch.arange(n) / n
    values = functions[..., 0] @ angle.cos() + functions[..., 1] @ angle.sin()
    return values / values.norm(dim=1, keepdim=True) * (n / PLACES) ** 0.5


def signals(functions: Float[Tensor, "atom parts 2"], rows: int, generator: torch.Generator) -> Signals:
    """Sums of 1 to ``MOST`` atoms of sizes 1 to 2 at random places."""
    shape = (rows, MOST)
    held = torch.arange(MOST) <= torch.randint(MOST, (rows, 1), generator=generator)
    return Signals(
        functions,
        torch.randint(len(functions), shape, generator=generator),
        torch.randint(PLACES, shape, generator=generator),
        (1 + torch.rand(shape, generator=generator)) * held,
    )
