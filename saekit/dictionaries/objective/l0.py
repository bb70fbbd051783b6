"""L0: the number of active features, through the pseudo-gradient of their thresholds (Rajamanoharan et al. 2024, 2407.14435)."""

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import Coefficient, PenaltyConfig
from saekit.dictionaries.training import Forward, TrainState
from saekit.types import Codes


class L0(nn.Module):
    """``coefficient * mean_rows sum_i 1[u_i > threshold_i]``."""

    Config = PenaltyConfig
    fit = False
    needs = frozenset({"on"})

    def __init__(self, config: PenaltyConfig, n_features: int):
        super().__init__()
        self.coefficient = Coefficient(config)

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        on = forward.selected.on
        assert on is not None  # checked by ``needs``
        return self.coefficient(forward.state) * on.sum() / max(1, forward.codes.rows)

    def observe(self, codes: Codes, state: TrainState) -> None:
        """Steer the coefficient."""
        self.coefficient.observe(codes, state)
