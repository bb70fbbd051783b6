"""Matching pursuit: atoms are taken one by one, each by what the ones before have left unexplained.

MP-SAE (Costa et al. 2025, 2506.03093). Features that are correlated, or that hold within others, stay
apart, since the part of one that another has explained is gone before it is measured.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import Selected, TrainState
from saekit.kernels import pursuit_encode
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class PursuitConfig:
    """``k`` steps per row, one atom each; ``k_inference`` steps at inference (default: k).

    A row stops early where its residual's norm has fallen to ``tolerance`` of its own, or below ``residual`` in the
    space that is pursued; with ``until_repeat`` after the first step that takes no atom that is new to it (both as
    SAELens' matching pursuit has them).
    """

    k: int
    k_inference: int | None = None
    tolerance: float = 0.0
    residual: float = 0.0
    until_repeat: bool = False

    def check(self, n_features: int) -> None:
        """Raise unless the choice is possible."""
        for name, value in (("k", self.k), ("k_inference", self.k_inference)):
            if value is not None and value < 1:
                raise SaekitError(f"{name} = {value} must be at least 1; it counts the steps of the pursuit")
        if not 0 <= self.tolerance < 1:
            raise SaekitError(f"tolerance = {self.tolerance} must lie in 0..1; it is a share of a row's norm")
        if not 0 <= self.residual < float("inf"):
            raise SaekitError(f"residual = {self.residual} must be a norm of at least 0")


class Pursuit(nn.Module):
    """Pursuit over the encoder's atoms in input space; a function of its own row alone."""

    Config = PursuitConfig
    offers = frozenset({"values", "ranked"})
    affine = False
    unit_encoder = True

    def __init__(self, config: PursuitConfig, n_features: int, d_in: int):
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
    ) -> Codes:
        """Codes of the rows, in the order of the steps; the bias is not used."""
        return self._pursue(x, W_enc, self.config.k_inference or self.config.k)

    def read_by(self, codes: Codes, W_enc: Float[Tensor, "feature d_in"]) -> tuple[Tensor, Tensor]:
        """``value = w x + b`` of each code, with the atoms taken as they are: each reads what those before it leave."""
        indices, values = codes.rectangular()
        again = torch.tril(indices[:, :, None] == indices[:, None, :], -1)  # taken before, and added there
        on = (values != 0) | again.any(2)
        atoms = W_enc[indices.long()] * on[..., None]
        overlap = torch.tril(atoms @ atoms.mT, -1)
        eye = torch.eye(atoms.shape[1], dtype=atoms.dtype, device=atoms.device)
        reads = torch.linalg.solve_triangular(overlap + eye, atoms, upper=False)
        first = (again.to(atoms.dtype).argmax(2) * again.any(2)) + torch.arange(
            len(eye), device=atoms.device
        ) * ~again.any(2)
        summed = torch.zeros_like(reads).scatter_add_(1, first[..., None].expand_as(reads), reads)
        return summed.flatten(0, 1), torch.zeros_like(codes.values)

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes; a pursuit has no pre-activations of dead features to offer."""
        return Selected(self._pursue(x, W_enc, self.config.k))

    def _pursue(self, x: Tensor, W_enc: Tensor, k: int) -> Codes:
        values, indices, residual = pursuit_encode(x, W_enc, k)
        if self.config.tolerance:
            # ||r_t||^2 = ||r_(t+1)||^2 + z_t^2 for atoms of norm 1, summed from the end
            step = values.detach().square()
            before = residual.detach().square().sum(1, keepdim=True) + step.flip(1).cumsum(1).flip(1)
            limit = self.config.tolerance**2 * x.square().sum(1, keepdim=True)
            values = values * (before > limit)
        if self.config.residual or self.config.until_repeat:
            values = values * self._going(x, W_enc, indices, values)
        return Codes.from_rectangular(indices, _merged(indices, values), len(W_enc))

    @torch.no_grad()
    def _going(self, x: Tensor, W_enc: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """Which steps [rows, k] a row still takes: those before it stops don't depend on the ones after."""
        going, left = torch.ones_like(values, dtype=torch.bool), x
        for step in range(values.shape[1] - 1):
            value, at = values[:, step], indices[:, step]
            left = left - value[:, None] * W_enc[at.long()]
            stops = torch.linalg.vector_norm(left, dim=1) < self.config.residual
            if self.config.until_repeat:
                taken = (indices[:, :step] == at[:, None]) & (values[:, :step] != 0)
                stops |= taken.any(1) | (value == 0)
            going[:, step + 1] = going[:, step] & ~stops
        return going


def _merged(indices: Tensor, values: Tensor) -> Tensor:
    """Values of atoms taken again, added to the first time: a feature has one code per row."""
    order = indices.sort(dim=1).values
    again = (order[:, 1:] == order[:, :-1]).any(1).nonzero()[:, 0]
    if len(again) == 0:
        return values
    same = indices[again, :, None] == indices[again, None, :]
    # [rows, first, later]: the first entry of each atom collects
    first = same & ~torch.tril(same, -1).any(2, keepdim=True)
    return values.index_copy(0, again, torch.einsum("rfl,rl->rf", first.to(values.dtype), values[again]))
