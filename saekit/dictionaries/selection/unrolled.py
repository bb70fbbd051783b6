"""Unrolled: a few proximal steps of sparse coding as an encoder that learns through them.

Gregor and LeCun 2010 (LISTA); Tolooshams, Shen and Anandkumar 2025 (2509.03738). One step is the usual encoder; each
later one takes away what the codes explain already.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.proximal import PENALTIES, iterate
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels.checks import finite
from saekit.registry import nearest
from saekit.types import Codes, SaekitError

BLOCK = 512  # rows at a time where nothing is trained: pre-activations here are dense


@dataclass(frozen=True)
class UnrolledConfig:
    """``steps`` proximal steps of ``penalty`` ("soft", "hard", "half", "cel0"; :mod:`.proximal`) of the given ``weight``.

    The weight is in the space that is read, where by default a coordinate's mean square is 1.
    """

    penalty: str = "soft"
    weight: float = 0.5
    steps: int = 5

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible."""
        if self.penalty not in PENALTIES:
            raise SaekitError(f"penalty {self.penalty!r} is unknown{nearest(self.penalty, list(PENALTIES))}")
        if not 0 <= self.weight < float("inf"):
            raise SaekitError(f"weight = {self.weight} must be a number of at least 0; it weighs the penalty")
        if self.steps < 1:
            raise SaekitError(f"steps = {self.steps} must be at least 1; it counts proximal steps")


class Unrolled(nn.Module):
    """Proximal steps over the encoder's atoms in input space; codes have signs.

    Training keeps what each step gives, a dense [rows, n_features]: for widths and step counts that fit in memory.
    """

    Config = UnrolledConfig
    offers = frozenset({"values"})
    affine = False
    unit_encoder = True

    def __init__(self, config: UnrolledConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows, by rising index; the bias is not used."""
        finite(x, x=x)
        return _joined([Codes.from_dense(self._codes(rows, W_enc)) for rows in x.split(BLOCK)], len(x))

    def tangent(
        self, codes: Codes, x: Float[Tensor, "entry d_in"], W_enc: Float[Tensor, "feature d_in"]
    ) -> tuple[Tensor, Tensor]:
        """``value = w x + b`` of each code at the x that it reads, with w the gradient through all steps."""
        parts = []
        for rows, at in zip(x.split(BLOCK), codes.indices.long().split(BLOCK), strict=True):
            with torch.enable_grad():
                free = rows.detach().clone().requires_grad_()
                own = self._codes(free, W_enc.detach()).gather(1, at[:, None]).sum()
            parts.append(torch.autograd.grad(own, free)[0])
        weight = torch.cat(parts) if parts else torch.zeros_like(x)
        return weight, codes.values.detach() - (weight * x).sum(1)

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes, with gradients through every step."""
        return Selected(Codes.from_dense(self._codes(x, W_enc)))

    def _codes(self, x: Tensor, W_enc: Tensor) -> Tensor:
        c = self.config
        return iterate(x, W_enc, c.penalty, c.weight, c.steps)


def _joined(blocks: list[Codes], rows: int) -> Codes:
    if len(blocks) == 1:
        return blocks[0]
    counts = torch.cat([c.offsets.diff() for c in blocks])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    indices, values = (torch.cat([getattr(c, name) for c in blocks]) for name in ("indices", "values"))
    return Codes(offsets, indices, values, blocks[0].n_features, (rows,))
