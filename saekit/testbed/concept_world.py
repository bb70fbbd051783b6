"""Concepts whose geometry is known: relations beside distractors, features that fire in lobes, spectra that are power laws."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.types import Codes

DISTRACTORS, STRENGTH = 2, 4.0  # directions along which pairs differ for other reasons, and by how much
TIGHT = 1.0  # distance of a lobe's centre from 0, in units of how far its atoms lie from it
LOYAL = 0.7  # share of a text's features that are of its own lobe


def related(
    pairs: int, relations: int, d: int, generator: torch.Generator
) -> tuple[Float[Tensor, "pairs d"], Int[Tensor, " pairs"]]:
    """Differences of pairs, and the relation of each: its own unit vector, noise of 0.1 a coordinate, and distractors."""
    steps = torch.nn.functional.normalize(torch.randn(relations, d, generator=generator), dim=1)
    basis = torch.nn.functional.normalize(torch.randn(DISTRACTORS, d, generator=generator), dim=1)
    own = torch.randint(relations, (pairs,), generator=generator)
    noise = 0.1 * torch.randn(pairs, d, generator=generator)
    return steps[own] + noise + STRENGTH * torch.randn(pairs, DISTRACTORS, generator=generator) @ basis, own


def lobed(
    features: int, lobes: int, d: int, generator: torch.Generator
) -> tuple[Float[Tensor, "features d"], Int[Tensor, " features"]]:
    """Atoms around the centres of their lobes, and each one's lobe."""
    own = torch.randperm(features, generator=generator) % lobes
    centres = torch.nn.functional.normalize(torch.randn(lobes, d, generator=generator), dim=1)
    return TIGHT * centres[own] + torch.randn(features, d, generator=generator) / d**0.5, own


def firing(
    own: Int[Tensor, " features"], texts: int, tokens: int, k: int, generator: torch.Generator
) -> Codes:
    """Codes of texts of one lobe each: a token has ``k`` features (or fewer, where one is drawn twice), mostly the lobe's."""
    n, lobes = len(own), int(own.max()) + 1
    text = torch.randint(lobes, (texts,), generator=generator).repeat_interleave(tokens)
    order = own.argsort(stable=True)
    counts = torch.bincount(own, minlength=lobes)
    begin = counts.cumsum(0) - counts
    place = (torch.rand(len(text), k, generator=generator) * counts[text][:, None]).long()
    mine = order[begin[text][:, None] + place]
    loyal = torch.rand(len(text), k, generator=generator) < LOYAL
    chosen = mine.where(loyal, torch.randint(n, (len(text), k), generator=generator))
    dense = torch.zeros(len(text), n).scatter(1, chosen, 1 + torch.rand(len(text), k, generator=generator))
    return Codes.from_dense(dense)


def power(features: int, d: int, exponent: float, generator: torch.Generator) -> Float[Tensor, "features d"]:
    """Gaussian atoms whose covariance has eigenvalues rank^-exponent, in random directions."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scale = torch.arange(1, d + 1).float().pow(-exponent / 2)
    return (torch.randn(features, d, generator=generator) * scale) @ basis.T
