"""Matryoshka: every prefix of the dictionary has to reconstruct by itself (Bussmann et al. 2025, 2503.17547).

The first features must stand for what is general, since they have to serve without the rest; so a
child's feature can't absorb its parent. Prefixes are fixed, or drawn anew each step (Nabeshima's
variant: lengths by a Pareto law, so that every length counts and none is a border). Drawn prefixes are
of the features in the order of their importance, ``E[(z |d|)^2]``, so a general feature needn't move to a
low index to be in them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import Forward, TrainState
from saekit.kernels import nested_error
from saekit.types import Codes, SaekitError

PURPOSE = 1  # of its random numbers
MEMORY = 20  # steps that the importance of features looks back on


@dataclass(frozen=True)
class MatryoshkaConfig:
    """``prefixes``: rising lengths, the last is n_features; None halves n_features ``levels - 1`` times.

    ``random``: the lengths are drawn each step instead, ``levels`` of them, from a Pareto law of index
    ``pareto``; the whole dictionary is always one of them.
    """

    prefixes: tuple[int, ...] | None = None
    levels: int = 5
    random: bool = False
    pareto: float = 0.5

    def __post_init__(self):
        if self.levels < 1:
            raise SaekitError(f"levels = {self.levels} must be at least 1; it counts the prefixes")
        if self.random and self.prefixes is not None:
            raise SaekitError("prefixes are given and random = True draws them anew each step; choose one")
        if not self.pareto > 0:
            raise SaekitError(f"pareto = {self.pareto} must be above 0; it is the index of a Pareto law")

    def check(self, n_features: int) -> None:
        """Raise unless the prefixes rise to the dictionary's width."""
        p = self.prefixes
        if p is not None and (not p or p[-1] != n_features or p[0] < 1 or sorted(set(p)) != list(p)):
            raise SaekitError(f"prefixes = {p} must rise from at least 1 to n_features = {n_features}")

    def fixed(self, n_features: int) -> list[int]:
        """The lengths, where they are the same at each step."""
        if self.prefixes is not None:
            return list(self.prefixes)
        return sorted({max(1, n_features >> level) for level in range(self.levels)})


class Matryoshka(nn.Module):
    """``mean over prefixes of mean_rows ||y - y_hat_prefix||^2``."""

    Config = MatryoshkaConfig
    fit = True
    importance: Tensor
    needs: frozenset[str] = frozenset()

    def __init__(self, config: MatryoshkaConfig, n_features: int):
        super().__init__()
        self.config = config
        if config.random:
            self.register_buffer("importance", torch.zeros(n_features))

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The term; range [0, inf)."""
        c, n = forward.codes, len(forward.atoms)
        indices, atoms, prefixes = c.indices, forward.atoms, self.config.fixed(n)
        if self.config.random:
            with torch.no_grad():
                order = self.importance * forward.atoms.square().sum(-1)
            order = order.argsort(descending=True, stable=True)
            indices, atoms, prefixes = (
                order.argsort().int()[indices.long()],
                atoms[order],
                self._drawn(forward, n),
            )
        total, squared, forward.error = nested_error(
            c.offsets, indices, c.values, atoms, forward.b_dec, forward.y, prefixes
        )
        forward.squared = squared[-1]
        return total.mean()

    @torch.no_grad()
    def observe(self, codes: Codes, state: TrainState) -> None:
        """Follow ``E[z^2]``; the norms of the atoms are taken as they are when prefixes are drawn."""
        if self.config.random:
            now = torch.zeros_like(self.importance).index_add_(0, codes.indices.long(), codes.values.square())
            self.importance.lerp_(now / max(1, codes.rows), 1 / MEMORY)

    def _drawn(self, forward: Forward, n: int) -> list[int]:
        uniform = torch.rand(self.config.levels - 1, generator=forward.state.generator(PURPOSE))
        # inverse of the Pareto law on 1..n
        shape = self.config.pareto
        length = (1 - uniform * (1 - float(n) ** -shape)) ** (-1 / shape)
        return sorted({*length.long().clamp(1, n).tolist(), n})
