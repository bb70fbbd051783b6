"""Codes and directions drawn from a seed, for the laws of measures."""

import math

import torch

from saekit.types import Codes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(rows: int, features: int, p: float, seed: int = 0, quantum: float = 0.0) -> Codes:
    """Independent features that fire with probability p, normal values or multiples of a quantum."""
    on = torch.rand(rows, features, generator=torch.Generator().manual_seed(seed)) < p
    values = normal(rows, features, seed=seed + 1)
    if quantum:
        values = quantum * (1 + (4 * values.abs()).floor())
    return Codes.from_dense(on * values)


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed).double()).Q.float()


def entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)
