"""Units, and other units that are known to carry the same: permuted copies, and blocks of two that are turned.

Also networks that learnt the same digits from different starts, of which nothing is known.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.testbed.digits import Digits

STEPS, BATCH, LR, DECAY = 400, 128, 3e-3, 1e-3


class Turned(NamedTuple):
    """Units ``a`` and ``b`` of the same rows, the block of each, and how far a block is turned, in radians."""

    a: Float[Tensor, "rows n"]
    b: Float[Tensor, "rows n"]
    blocks_a: Int[Tensor, " n"]
    blocks_b: Int[Tensor, " n"]
    angles: Float[Tensor, " blocks"]


def permuted(x: Float[Tensor, "rows n"], generator: torch.Generator) -> tuple[Float[Tensor, "rows n"], Int[Tensor, " n"]]:  # fmt: skip
    """The units in another order and of other sizes, and where each has gone: unit i is column ``went[i]``."""
    went = torch.randperm(x.shape[1], generator=generator)
    out = torch.empty_like(x)
    out[:, went] = x * (0.5 + torch.rand(x.shape[1], generator=generator))
    return out, went


def turned(rows: int, blocks: int, generator: torch.Generator, noise: float = 0.05) -> Turned:
    """Independent units of variance 1 (Laplace), and a copy in which each block of two is turned, with noise, in another order.

    A block is turned by 30 to 60 degrees, so that no unit of the one is a unit of the other: |r| is at most 0.87.
    """
    u = torch.rand(rows, 2 * blocks, generator=generator, dtype=torch.float64) - 0.5
    a = (-u.sign() * torch.log1p(-2 * u.abs()) / 2**0.5).float()
    angles = torch.pi / 6 * (1 + torch.rand(blocks, generator=generator))
    pairs = a.view(rows, blocks, 2)
    cos, sin = angles.cos(), angles.sin()
    b = torch.stack([cos * pairs[..., 0] - sin * pairs[..., 1], sin * pairs[..., 0] + cos * pairs[..., 1]], 2)
    b = b.reshape(rows, -1) + noise * torch.randn(rows, 2 * blocks, generator=generator)
    own, other = (torch.randperm(2 * blocks, generator=generator) for _ in range(2))
    of = torch.arange(2 * blocks) // 2
    return Turned(a[:, own], b[:, other], of[own], of[other], angles)


def digit_net(data: Digits, seed: int, width: int = 48, layers: int = 3, steps: int = STEPS) -> nn.Sequential:
    """A ReLU network that learnt which digit an image is: ``layers`` hidden layers of ``width`` units; at ``steps`` 0 it learnt nothing.

    Each hidden layer is a linear map and a ReLU, so that layer i's units are the outputs of module 2 i + 1.
    """
    g = torch.Generator().manual_seed(seed)
    widths = [64, *[width] * layers, 10]
    net = nn.Sequential()
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(fan_out, fan_in, generator=g) * (2 / fan_in) ** 0.5)
            linear.bias.zero_()
        net.append(linear)
        if i < layers:
            net.append(nn.ReLU())
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
    for _ in range(steps):
        batch = torch.randint(len(data.train), (BATCH,), generator=g)
        loss = nn.functional.cross_entropy(net(data.train[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def hidden(net: nn.Sequential, x: Float[Tensor, "rows 64"]) -> list[Float[Tensor, "rows width"]]:
    """Activations of each hidden layer, first to last."""
    out = []
    for module in net:
        x = module(x)
        if isinstance(module, nn.ReLU):
            out.append(x)
    return out
