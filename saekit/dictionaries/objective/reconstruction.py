"""Squared error of the reconstruction: mean over rows of the sum over dimensions."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.training import Forward
from saekit.kernels import squared_error


@dataclass(frozen=True)
class ReconstructionConfig:
    """Nothing to choose."""


class Reconstruction(nn.Module):
    """``mean_rows ||y - y_hat||^2``."""

    Config = ReconstructionConfig
    fit = True
    needs: frozenset[str] = frozenset()

    def __init__(self, config: ReconstructionConfig, n_features: int):
        super().__init__()

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The term; range [0, inf), about d_out for a reconstruction by the mean."""
        c = forward.codes
        squared, forward.error = squared_error(
            c.offsets, c.indices, c.values, forward.atoms, forward.b_dec, forward.y
        )
        forward.squared = squared.detach()
        return squared.mean()
