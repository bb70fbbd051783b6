"""Orthogonal matching pursuit: greedy selection with a least-squares refit at every step.

Pati, Rezaiifar and Krishnaprasad 1993. The residual is kept orthogonal to the chosen atoms by
Gram-Schmidt, and the coefficients come from one triangular solve at the end.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.selection.topk import check_k
from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels.checks import finite
from saekit.types import Codes

BLOCK = 512  # rows pursued at a time: the [block, n_features] correlations should stay in cache
TINY = 1e-6  # an atom this close to the span of the chosen ones adds nothing


@dataclass(frozen=True)
class OMPConfig:
    """``k`` steps per row, one atom each; coefficients may be negative."""

    k: int

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible for a dictionary of this width."""
        check_k(self.k, n_features)


class OMP(nn.Module):
    """Pursuit over the encoder's atoms (of unit norm) in input space, steps in order of choice."""

    Config = OMPConfig
    offers = frozenset({"ranked"})
    affine = False
    tied_only = True  # codes are cut from the graph: an encoder of its own would never be trained
    unit_encoder = True

    def __init__(self, config: OMPConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows: k entries each, in the order of the steps; the bias is not used."""
        finite(x, x=x)
        kind = torch.promote_types(x.dtype, torch.float32)  # no triangle is solved in less
        parts = [self._pursue(block, W_enc.to(kind)) for block in x.to(kind).split(BLOCK)]
        indices = torch.cat([p[0] for p in parts]) if parts else x.new_zeros(0, self.config.k).long()
        values = torch.cat([p[1] for p in parts]) if parts else x.new_zeros(0, self.config.k)
        return Codes.from_rectangular(indices, values.to(x.dtype), W_enc.shape[0])

    def read_by(self, codes: Codes, W_enc: Float[Tensor, "feature d_in"]) -> tuple[Tensor, Tensor]:
        """``value = w x + b`` of each code, with the atoms taken as they are: their least-squares fit."""
        indices, values = codes.rectangular()
        atoms = W_enc[indices.long()] * (values != 0)[..., None]
        return torch.linalg.pinv(atoms).mT.flatten(0, 1), torch.zeros_like(codes.values)

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes, cut from the graph: the decoder alone is trained, by what they leave."""
        return Selected(self(x, W_enc, b_enc))

    def _pursue(self, x: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        rows, k = x.shape[0], self.config.k
        indices = torch.zeros(rows, k, dtype=torch.int64, device=x.device)
        basis = x.new_zeros(rows, k, x.shape[1])
        # atoms = R^T basis: R is upper triangular, its columns the chosen atoms' coordinates
        triangle = x.new_zeros(rows, k, k)
        coordinates = x.new_zeros(rows, k)
        residual = x.clone()
        for step in range(k):
            scores = (residual @ atoms.T).abs_().scatter_(1, indices[:, :step], -1.0)
            best = scores.argmax(-1)
            indices[:, step] = best
            atom = atoms[best]
            along = torch.bmm(basis[:, :step], atom[:, :, None])[:, :, 0]
            rest = atom - torch.bmm(along[:, None], basis[:, :step])[:, 0]
            norm = rest.norm(dim=-1, keepdim=True)
            usable = norm > TINY
            direction = torch.where(usable, rest / norm.clamp(min=TINY), torch.zeros_like(rest))
            basis[:, step] = direction
            triangle[:, :step, step] = torch.where(usable, along, torch.zeros_like(along))
            triangle[:, step, step] = torch.where(usable, norm, torch.ones_like(norm))[:, 0]
            coordinates[:, step] = (direction * residual).sum(-1)
            residual = residual - coordinates[:, step, None] * direction
        values = torch.linalg.solve_triangular(triangle, coordinates[:, :, None], upper=True)[:, :, 0]
        return indices, values
