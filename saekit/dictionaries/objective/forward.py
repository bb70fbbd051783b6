"""What a term of the objective may look at: one training forward pass, in normalised space."""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Float
from torch import Tensor

from saekit.kernels import squared_error
from saekit.types import Codes


@dataclass(frozen=True)
class TrainState:
    """What training knows beside the batch: the step and which features count as dead."""

    step: int = 0
    dead: Bool[Tensor, " feature"] | None = None


@dataclass(frozen=True)
class Forward:
    """Input, target and codes of a batch, and the parameters that made them.

    ``aux`` are the codes of dead features, where a term asked for some and there are any.
    """

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]
    codes: Codes
    aux: Codes | None
    atoms: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, " d_out"]
    state: TrainState

    @cached_property
    def reconstruction(self) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_out"]]:
        """Squared error of each row, and the error itself (output less target), cut from the graph."""
        c = self.codes
        return squared_error(c.offsets, c.indices, c.values, self.atoms, self.b_dec, self.y)
