"""AuxK: dead features learn to reconstruct what the live ones left (Gao et al. 2024, app. A.2).

The k_aux dead features with the largest pre-activations reconstruct the residual, which is
detached; the error is divided by the residual's variance so that the term keeps its weight as the
reconstruction improves, and gradients reach decoder *and* encoder of the dead features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.dictionaries.objective.forward import Forward
from saekit.kernels import sparse_decode, topk_encode
from saekit.types import SaekitError


@dataclass(frozen=True)
class AuxKConfig:
    """``k_aux`` dead features per row (default: half the width written); weight ``coefficient``."""

    k_aux: int | None = None
    coefficient: float = 1 / 32

    def __post_init__(self):
        if self.k_aux is not None and self.k_aux < 1:
            raise SaekitError(f"k_aux = {self.k_aux} must be at least 1; leave it out for d_out / 2")


class AuxK:
    """``coefficient * d_out * sum ||e - e_hat||^2 / sum ||e - mean(e)||^2``, 0 while nothing is dead."""

    Config = AuxKConfig

    def __init__(self, config: AuxKConfig):
        self.config = config

    def __call__(self, forward: Forward) -> Float[Tensor, ""]:
        """The weighted term, in the unit of the reconstruction's."""
        dead = forward.state.dead
        if dead is None or not dead.any():
            return forward.y_hat.new_zeros(())
        chosen = dead.nonzero()[:, 0]
        d_out = forward.y.shape[1]
        k_aux = min(self.config.k_aux or max(1, d_out // 2), len(chosen))
        values, indices = topk_encode(forward.x, forward.W_enc[chosen], forward.b_enc[chosen], k_aux)
        offsets = torch.arange(len(forward.x) + 1, device=values.device) * k_aux
        atoms = forward.atoms[chosen]
        e_hat = sparse_decode(offsets, indices.reshape(-1), values.relu().reshape(-1), atoms)
        residual = (forward.y - forward.y_hat).detach()
        variance = (residual - residual.mean(0)).square().sum()
        term = (residual - e_hat).square().sum() / variance
        # a residual of zero has nothing to teach
        return self.config.coefficient * d_out * torch.nan_to_num(term, nan=0.0, posinf=0.0)
