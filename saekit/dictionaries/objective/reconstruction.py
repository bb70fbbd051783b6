"""Squared error of the reconstruction: mean over rows of the sum over dimensions."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saekit.dictionaries.objective.forward import Forward


@dataclass(frozen=True)
class ReconstructionConfig:
    """Nothing to choose."""


class Reconstruction:
    """``mean_rows ||y - y_hat||^2``."""

    Config = ReconstructionConfig

    def __init__(self, config: ReconstructionConfig):
        self.config = config

    def __call__(self, forward: Forward) -> Float[Tensor, ""]:
        """The term; range [0, inf), about d_out for a reconstruction by the mean."""
        return forward.reconstruction[0].mean()
