"""L1: the size of every code as it enters the output, ``z ||d||`` (Bricken et al. 2023; Conerly et al. 2024).

With the decoder's norms in it a dictionary can't evade the penalty by small codes for long atoms. For
a gated selection it falls on the gate, so that magnitudes are not shrunk.
"""

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import Coefficient, PenaltyConfig
from saekit.dictionaries.training import Forward, TrainState
from saekit.types import Codes


class L1(nn.Module):
    """``coefficient * mean_rows sum_i |z_i| ||d_i||``."""

    Config = PenaltyConfig
    fit = False
    needs = frozenset({"values"})

    def __init__(self, config: PenaltyConfig, n_features: int):
        super().__init__()
        self.coefficient = Coefficient(config)

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        codes = forward.penalised
        return self.coefficient(forward.state) * forward.sizes(codes).sum() / max(1, codes.rows)

    def observe(self, codes: Codes, state: TrainState) -> None:
        """Steer the coefficient."""
        self.coefficient.observe(codes, state)
