"""End to end: the model's predictions, and its later layers, should not notice the splice (Braun et al. 2024, 2405.12241).

``KL(original || spliced)`` is the direction that the paper's code minimises, and so does this.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.objective.coefficient import check_coefficient
from saekit.dictionaries.training import Forward
from saekit.types import SaekitError


@dataclass(frozen=True)
class EndToEndConfig:
    """``kl`` weighs the divergence (nats) and ``later`` the error in later layers (share of their variance).

    Both are multiplied with d_out, the size of the reconstruction's term for a prediction by the mean.
    """

    kl: float = 1.0
    later: float = 0.0

    def __post_init__(self):
        check_coefficient("kl", self.kl)
        check_coefficient("later", self.later)
        if not self.kl + self.later:
            raise SaekitError("kl = 0 and later = 0 leave nothing to minimise; choose one above 0")


class EndToEnd(nn.Module):
    """``d_out * (kl * KL + later * mean over later layers of ||h - h'||^2 / variance)``."""

    Config = EndToEndConfig
    fit = False
    needs: frozenset[str] = frozenset()
    downstream = True  # whether training has to carry the output on through the model

    def __init__(self, config: EndToEndConfig, n_features: int):
        super().__init__()
        self.config = config

    def forward(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term."""
        if forward.state.downstream is None:
            raise SaekitError(
                "objective 'end_to_end' needs the model behind the activations; train on ContinuedSource(harvest(model, text, [hook_point]))"
            )
        effects = forward.state.downstream(forward.to_model(forward.output()), self.config.later > 0)
        total = self.config.kl * effects["kl"]
        if self.config.later:
            total = total + self.config.later * effects["later"]
        return forward.y.shape[1] * total
