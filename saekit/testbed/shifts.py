"""Neurons some of which shift with a label: synthetic data of Gurnee et al. 2023 (2305.01610), with and without echoes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.types import SaekitError

ALIKE = 0.8  # of what it echoes, in an echo


def shifted(
    n: int, d: int, k: int, shift: float, share: float, generator: torch.Generator, echoes: int = 0,
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"], Int[Tensor, " k"]]:  # fmt: skip
    """Activations, labels of which ``share`` are true, and the ``k`` neurons whose inputs differ between the classes.

    Inputs have variance 1 in each class, and means of shift and -shift in those neurons; gelu (in the paper's approximation
    x sigmoid(1.702 x)) is applied to all. With ``echoes`` the neurons' shifts rise evenly from shift to twice as much, and so
    many others echo the strongest: ``ALIKE`` of its activation, and noise that makes up for the variance. They tell of the
    label by that neuron alone, so that the k neurons are the best ones together.
    """
    true = round(n * share)
    if not 0 < true < n or not 0 < k <= k + echoes <= d:
        raise SaekitError(f"n = {n}, share = {share}, d = {d}, k = {k}, echoes = {echoes}: give both classes rows, and d at least k + echoes")  # fmt: skip
    labels = torch.randperm(n, generator=generator) < true
    x = torch.randn(n, d, generator=generator)
    neurons = torch.randperm(d, generator=generator)[: k + echoes]
    support, copies = neurons[:k], neurons[k:]
    shifts = shift * torch.linspace(1, 2, k) if echoes else torch.full((k,), shift)
    x[:, support] += (2 * labels[:, None] - 1) * shifts
    out = x * torch.sigmoid(1.702 * x)
    out[:, copies] = ALIKE * out[:, support[-1:]] + (1 - ALIKE**2) ** 0.5 * x[:, copies]
    return out, labels, support.sort().values
