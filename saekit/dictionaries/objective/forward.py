"""What a term of the objective may look at: one training forward pass, in normalised space."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from saekit.types import Codes


@dataclass(frozen=True)
class TrainState:
    """What training knows beside the batch: the step and which features count as dead."""

    step: int = 0
    dead: Bool[Tensor, " feature"] | None = None


@dataclass(frozen=True)
class Forward:
    """Input, target, codes and reconstruction of a batch, and the parameters that made them."""

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]
    codes: Codes
    y_hat: Float[Tensor, "batch d_out"]
    W_enc: Float[Tensor, "feature d_in"]
    b_enc: Float[Tensor, " feature"]
    atoms: Float[Tensor, "feature d_out"]
    state: TrainState
