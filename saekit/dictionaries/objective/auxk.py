"""AuxK: dead features learn to reconstruct what the live ones left (Gao et al. 2024, app. A.2).

The k_aux dead features with the largest pre-activations reconstruct the residual, which is
detached; the error is divided by the residual's variance so that the term keeps its weight as the
reconstruction improves, and gradients reach decoder *and* encoder of the dead features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import check_coefficient
from saekit.dictionaries.training import Forward
from saekit.kernels import squared_error
from saekit.types import SaekitError


@dataclass(frozen=True)
class AuxKConfig:
    """``k_aux`` dead features per row (default: half the width written); weight ``coefficient``."""

    k_aux: int | None = None
    coefficient: float = 1 / 32

    def __post_init__(self):
        if self.k_aux is not None and self.k_aux < 1:
            raise SaekitError(f"k_aux = {self.k_aux} must be at least 1; leave it out for d_out / 2")
        check_coefficient("coefficient", self.coefficient)


class AuxK(nn.Module):
    """``coefficient * d_out * sum ||e - e_hat||^2 / sum ||e - mean(e)||^2``, 0 while nothing is dead."""

    Config = AuxKConfig
    fit = False
    needs = frozenset({"dead"})

    def __init__(self, config: AuxKConfig, n_features: int):
        super().__init__()
        self.config = config

    def picks(self, d_out: int) -> int:
        """How many dead features of a row the term asks for."""
        return self.config.k_aux or max(1, d_out // 2)

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term, in the unit of the reconstruction's."""
        dead, error = forward.selected.dead, forward.error
        assert error is not None  # the fit has gone before
        if dead is None:
            return error.new_zeros(())
        residual, d_out = -error, error.shape[1]
        variance = (residual - residual.mean(0)).square().sum()
        zero = torch.zeros_like(forward.b_dec)
        squared, _ = squared_error(dead.offsets, dead.indices, dead.values, forward.atoms, zero, residual)
        # a residual without variance (of one row, or of constant data) has nothing to teach
        taught = variance > 0
        term = torch.where(taught, squared.sum() / torch.where(taught, variance, 1.0), 0.0)
        return self.config.coefficient * d_out * term
