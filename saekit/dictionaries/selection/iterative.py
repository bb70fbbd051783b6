"""Iterative thresholding: sparse coding with a soft, hard, half or CEL0 penalty (Rentzeperis et al. 2023).

Codes are found first, by proximal steps; the atoms then learn from what these leave, as at a minimum over the codes the
energy's gradient in the atoms is that of the error alone. (:mod:`.unrolled` learns through the steps instead.)
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saekit.dictionaries.selection.unrolled import Unrolled, UnrolledConfig
from saekit.dictionaries.training import Selected, TrainState


@dataclass(frozen=True)
class IterativeConfig(UnrolledConfig):
    """The same, with ``steps`` enough to come near a minimum."""

    steps: int = 50


class Iterative(Unrolled):
    """Proximal steps over the atoms, cut from the graph."""

    Config = IterativeConfig
    offers: frozenset[str] = frozenset()
    tied_only = True  # codes are cut from the graph: an encoder of its own would never be trained

    def train_codes(
        self,
        x: Float[Tensor, "rows d_in"],
        W_enc: Float[Tensor, "feature d_in"],
        b_enc: Float[Tensor, " feature"],
        state: TrainState,
        k_aux: int = 0,
    ) -> Selected:
        """The same codes as at inference."""
        return Selected(self(x, W_enc, b_enc))
