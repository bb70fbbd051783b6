"""Proximal steps of four penalties, and the iteration that sparse coding is made of (Rentzeperis et al. 2023).

Sparse coding of a row x by atoms D of norm 1 minimises ``E(z) = 1/2 ||x - z D||^2 + sum_i phi(z_i)``, by steps
``z <- prox(z + gamma (x - z D) D^T)``. With ``gamma <= 1 / ||D||^2`` no step raises E. The penalties, of weight w:

* soft: ``w |z|``;
* hard: ``w 1[z != 0]``;
* half: ``w |z|^(1/2)`` (closed form of Xu, Chang, Xu and Zhang 2012);
* cel0: ``w - 1/2 (|z| - sqrt(2 w))^2`` up to ``sqrt(2 w)`` and w beyond: hard's continuous exact relaxation, with the
  same global minimisers and fewer local ones (Soubies, Blanc-Feraud and Aubert 2015).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def soft(u: Float[Tensor, "*shape"], gamma: float, weight: float) -> Float[Tensor, "*shape"]:
    """``argmin_z 1/2 (z - u)^2 + gamma w |z|``: all shrink by ``gamma w``."""
    return u.sign() * (u.abs() - gamma * weight).relu()


def hard(u: Float[Tensor, "*shape"], gamma: float, weight: float) -> Float[Tensor, "*shape"]:
    """``argmin_z 1/2 (z - u)^2 + gamma w 1[z != 0]``: kept as they are above ``sqrt(2 gamma w)``."""
    return u * (u.abs() > math.sqrt(2 * gamma * weight))


def half(u: Float[Tensor, "*shape"], gamma: float, weight: float) -> Float[Tensor, "*shape"]:
    """``argmin_z 1/2 (z - u)^2 + gamma w |z|^(1/2)``: 0 up to ``1.5 (gamma w)^(2/3)``, and a root of a cubic beyond."""
    by = gamma * weight
    on = u.abs() > 1.5 * by ** (2 / 3)
    size = u.abs().where(
        on, 1.0 + 1.5 * by ** (2 / 3)
    )  # any that the root is real for: gradients stay finite
    angle = torch.arccos((by / 4 * (size / 3) ** -1.5).clamp(max=1.0))
    return (2 / 3 * u * (1 + torch.cos(2 / 3 * (math.pi - angle)))) * on


def cel0(u: Float[Tensor, "*shape"], gamma: float, weight: float) -> Float[Tensor, "*shape"]:
    """``argmin_z 1/2 (z - u)^2 + gamma phi(z)``: 0 up to ``gamma sqrt(2 w)``, as it is from ``sqrt(2 w)``, a line between.

    With a step of 1 or more that is hard's.
    """
    if gamma >= 1:
        return hard(u, gamma, weight)
    line = (u.abs() - gamma * math.sqrt(2 * weight)).relu() / (1 - gamma)
    return u.sign() * torch.minimum(u.abs(), line)


def _cel0_cost(z: Tensor, weight: float) -> Tensor:
    return weight - (math.sqrt(2 * weight) - z.abs()).relu().square() / 2


@dataclass(frozen=True)
class Penalty:
    """``prox(u, gamma, w)``, and ``cost(z, w)``, the penalty of each entry."""

    prox: Callable[[Tensor, float, float], Tensor]
    cost: Callable[[Tensor, float], Tensor]


PENALTIES = {
    "soft": Penalty(soft, lambda z, w: w * z.abs()),
    "hard": Penalty(hard, lambda z, w: w * (z != 0).to(z)),
    "half": Penalty(half, lambda z, w: w * z.abs().sqrt()),
    "cel0": Penalty(cel0, _cel0_cost),
}


@torch.no_grad()
def step_size(atoms: Float[Tensor, "feature d"]) -> float:
    """The longest step that never raises the energy: ``1 / ||D||^2``, by the atoms' largest singular value."""
    short = atoms if len(atoms) < atoms.shape[1] else atoms.T
    gram = short.double() @ short.double().T
    return 1 / max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-12)


def iterate(
    x: Float[Tensor, "rows d"], atoms: Float[Tensor, "feature d"], penalty: str, weight: float, steps: int
) -> Float[Tensor, "rows feature"]:
    """Codes after so many steps from 0; differentiable in rows and atoms (the step's length is taken as given)."""
    prox, gamma = PENALTIES[penalty].prox, step_size(atoms)
    z = prox(gamma * x @ atoms.T, gamma, weight)
    for _ in range(steps - 1):
        z = prox(z + gamma * (x - z @ atoms) @ atoms.T, gamma, weight)
    return z


def energy(
    x: Float[Tensor, "rows d"],
    z: Float[Tensor, "rows feature"],
    atoms: Float[Tensor, "feature d"],
    penalty: str,
    weight: float,
) -> Float[Tensor, " rows"]:
    """``E(z)`` of each row."""
    return (x - z @ atoms).square().sum(1) / 2 + PENALTIES[penalty].cost(z, weight).sum(1)
