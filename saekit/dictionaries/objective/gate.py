"""The gate's own reconstruction, through a frozen decoder: how a gated dictionary's gate learns (2404.16014)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import check_coefficient
from saekit.dictionaries.training import Forward
from saekit.kernels import squared_error


@dataclass(frozen=True)
class GateConfig:
    """``coefficient`` of the term."""

    coefficient: float = 1.0

    def __post_init__(self):
        check_coefficient("coefficient", self.coefficient)


class Gate(nn.Module):
    """``coefficient * mean_rows ||y - ReLU(gate) D - b_dec||^2`` with D and b_dec cut from the graph."""

    Config = GateConfig
    fit = False
    needs = frozenset({"gate"})

    def __init__(self, config: GateConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        gate = forward.selected.gate
        assert gate is not None  # checked by ``needs``
        squared, _ = squared_error(
            gate.offsets,
            gate.indices,
            gate.values,
            forward.atoms.detach(),
            forward.b_dec.detach(),
            forward.y.detach(),
        )
        return self.config.coefficient * squared.mean()
