"""Chains through the layers of a hand-built network: what each MLP adds is a function of what the one before added."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.types import SaekitError


@dataclass(frozen=True)
class ChainConfig:
    """``chains`` independent chains through ``layers`` MLPs; each is on at rate ``p``, at sizes ``1 + Uniform``."""

    chains: int = 8
    layers: int = 3
    p: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.chains < 1 or self.layers < 1 or not 0 < self.p < 1:
            raise SaekitError(
                f"chains = {self.chains} and layers = {self.layers} must be at least 1, and p = {self.p} a rate in 0..1"
            )

    @property
    def d(self) -> int:
        """Width of the residual stream: a direction for each stage of each chain."""
        return self.chains * (self.layers + 1)


class Chain:
    """``stages`` [layers + 1, chains, d]: orthonormal directions; MLP l is ``ReLU(r stages[l]^T) stages[l + 1]``."""

    def __init__(self, config: ChainConfig):
        self.config = config
        g = torch.Generator().manual_seed(config.seed)
        basis = torch.linalg.qr(torch.randn(config.d, config.d, generator=g)).Q
        self.stages: Float[Tensor, "stage chain d"] = basis.view(config.layers + 1, config.chains, config.d)

    def batch(self, rows: int, step: int) -> Float[Tensor, "rows columns"]:
        """What every MLP reads, then what every MLP writes, side by side."""
        c = self.config
        g = torch.Generator().manual_seed(step)
        on = torch.rand(rows, c.chains, generator=g) < c.p
        residual = (on * (1 + torch.rand(rows, c.chains, generator=g))) @ self.stages[0]
        reads, writes = [], []
        for layer in range(c.layers):
            reads.append(residual)
            writes.append((residual @ self.stages[layer].T).relu() @ self.stages[layer + 1])
            residual = residual + writes[-1]
        return torch.cat([*reads, *writes], 1)


@torch.no_grad()
def path_length(
    encoders: list[Float[Tensor, "feature d"]], decoders: list[Float[Tensor, "feature _out"]],
    codes: list[Float[Tensor, "rows feature"]], x: Float[Tensor, "rows d"], target: Float[Tensor, "chain d"],
) -> float:  # fmt: skip
    """Mean number of features on the ways from the input to some directions of the last residual stream.

    Of a residual stream of MLPs that are replaced: ``encoders[l]`` read layer l's residual, ``decoders[l]`` write
    to the layers from l on, side by side, with ``codes[l]`` on the rows of the input ``x``. A feature's length is
    1 more than that of what it reads from, each earlier feature by its share of the pre-activation's absolute
    contributions; the input's is 0. The mean is over the features that write the target, by what they write.
    """
    d, layers = x.shape[1], len(encoders)
    lengths: list[Tensor] = []
    for layer, encoder in enumerate(encoders):
        whole = (x @ encoder.T).abs()
        weighted = torch.zeros_like(whole)
        for earlier in range(layer):
            # what it has written to the stream by then, and how much of it this layer's features read
            written = decoders[earlier].view(-1, layers - earlier, d)[:, : layer - earlier].sum(1)
            share = codes[earlier][:, :, None] * (written @ encoder.T)
            whole += share.abs().sum(1)
            weighted += (share.abs() * lengths[earlier][:, :, None]).sum(1)
        lengths.append(1 + weighted / whole.clamp(min=1e-12))
    total = weight = 0.0
    for layer, decoder in enumerate(decoders):
        written = decoder.view(-1, layers - layer, d).sum(1) @ target.T
        share = (codes[layer][:, :, None] * written).abs().sum(2)
        total += (share * lengths[layer]).sum().item()
        weight += share.sum().item()
    return total / max(weight, 1e-12)
