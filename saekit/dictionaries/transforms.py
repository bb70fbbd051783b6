"""Dictionaries of linear maps: each feature writes what its map makes of the input, as far as its code is on."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.config import Config
from saekit.dictionaries.rows import Rows
from saekit.dictionaries.training import Forward, Selected, TrainState
from saekit.dictionaries.wiring.molt import check_terms
from saekit.kernels import sampled_product
from saekit.types import Codes, SaekitError


class Transforms(Rows):
    """Features are maps ``U_i V_i`` of low rank.

    A map of rank r is r atoms (rows of U), with codes ``z_i (V_i x)``: so decoding, its gradients and the terms of
    the objective are those of any dictionary, on the expanded codes. ``V`` [n_atoms, d_in] and ``shift`` [n_atoms]
    read the input in normalised space.
    """

    shift: Tensor
    ranks: Tensor

    def __init__(self, config: Config, seed: int = 0):
        check_terms([name for name, _ in config.objective])
        if config.selection[0] in ("gated", "pursuit", "omp", "iterative", "unrolled"):
            raise SaekitError(
                f"selection {config.selection[0]!r} with wiring {config.wiring[0]!r}: codes here switch maps on, and are no amounts of atoms; choose another"
            )
        super().__init__(config, seed)
        ranks = config.wiring[1].rank_of(config.n_features)
        self.register_buffer("ranks", ranks, persistent=False)
        generator = torch.Generator().manual_seed(seed + 1)
        rows = torch.randn(int(ranks.sum()), self.d_in, generator=generator)
        self.V = nn.Parameter(nn.functional.normalize(rows, dim=-1))
        self.register_buffer("shift", torch.zeros(len(rows)))

    @property
    def n_atoms(self) -> int:
        """How many atoms the maps have together: the sum of their ranks."""
        return int(self.config.wiring[1].rank_of(self.n_features).sum())

    def expanded(self, codes: Codes, x: Float[Tensor, "rows d_in"] | None) -> Codes:
        """Codes of the atoms: ``z_i (V_i x + shift_i)`` for each that a map has; ``x`` in normalised space."""
        assert x is not None  # decode() has asked for it
        at = codes.indices.long()
        ranks = self.ranks[at]
        starts = self.ranks.cumsum(0) - self.ranks
        entry = torch.repeat_interleave(torch.arange(len(at), device=at.device), ranks)
        before = ranks.cumsum(0) - ranks
        index = starts[at][entry] + torch.arange(len(entry), device=at.device) - before[entry]
        offsets = nn.functional.pad(ranks.cumsum(0), (1, 0))[codes.offsets]
        inside = sampled_product(offsets, index.int(), self.V, x) + self.shift[index]
        return Codes(offsets, index.int(), codes.values[entry] * inside, len(self.V), codes.shape)

    def written_by(self, codes: Codes, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "entry d_out"]:
        """What each code writes, in the units of the model: what its map makes of the input, as far as it is on."""
        atoms = self.expanded(codes, self.read(x))
        entry = torch.repeat_interleave(
            torch.arange(len(codes.indices), device=atoms.values.device), self.ranks[codes.indices.long()]
        )
        rows = self.norm_out.directions(self.atoms.rows()[atoms.indices.long()] * atoms.values[:, None])
        return rows.new_zeros(len(codes.indices), self.d_out).index_add(0, entry, rows)

    def judge(
        self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"], selected: Selected,
        state: TrainState, passed: Tensor | None = None, error: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Forward]:  # fmt: skip
        """The terms of the objective; penalties fall on ``|z_i| ||U_i V_i||_F``, the size of what a feature does."""
        dead = None if selected.dead is None else self.expanded(selected.dead, x)
        expanded = dataclasses.replace(
            selected,
            codes=self.expanded(selected.codes, x),
            dead=dead,
            gate=selected.codes if selected.gate is None else selected.gate,
            lengths=self.map_norms(),
        )
        return super().judge(x, y, expanded, state, passed, error)

    def map_norms(self) -> Float[Tensor, " feature"]:
        """``||U_i V_i||_F``, by ``sum_ab (u_a u_b)(v_a v_b)`` over the rows a, b of a map; differentiable."""
        atoms, stop = self.atoms.rows(), self.ranks.cumsum(0)
        norms = self.V.new_zeros(len(self.ranks))
        for rank in self.ranks.unique().tolist():
            of = (self.ranks == rank).nonzero()[:, 0]
            rows = (stop[of] - rank)[:, None] + torch.arange(rank, device=stop.device)
            u, v = atoms[rows], self.V[rows]
            squared = ((u @ u.mT) * (v @ v.mT)).sum((1, 2))
            norms = norms.index_put((of,), squared.clamp(min=1e-12).sqrt())
        return norms

    def unit_weights(self) -> list[Tensor]:
        """Rows of both sides of the maps are kept at norm 1: their size is in the codes."""
        return [*super().unit_weights(), *([self.V] if self.atoms.unit else [])]

    @torch.no_grad()
    def folded(self, selection: tuple[str, Any], weight: Tensor, bias: Tensor, state: dict) -> "Transforms":
        """As of any rows; the maps read raw activations too."""
        out = super().folded(selection, weight, bias, state)
        assert isinstance(out, Transforms)  # it is of its own kind
        inside, shift = self.norm_in.fold(self.V)
        out.V.copy_(inside)
        out.shift.copy_(shift + self.shift)
        return out
