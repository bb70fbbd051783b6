"""Metrics as pure functions: each states its formula, unit and range.

Ratios are ratios of sums over everything given, never means of ratios, so they do not change with
batch size, order or (where it says so) scale. Sums are taken in float64.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.types import Codes


def _centred_square(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return (rows - rows.mean(0)).square().sum()


def fvu(x: Float[Tensor, "*rows d_out"], x_hat: Float[Tensor, "*rows d_out"]) -> float:
    """Fraction of variance unexplained, ``sum ||x - x_hat||^2 / sum ||x - mean(x)||^2``.

    Dimensionless, in [0, inf): 0 is perfect, 1 is predicting the mean. The mean is over all rows
    given. Unchanged when x and x_hat are scaled together.
    """
    return ((x.double() - x_hat.double()).square().sum() / _centred_square(x)).item()


def explained_variance(x: Float[Tensor, "*rows d_out"], x_hat: Float[Tensor, "*rows d_out"]) -> float:
    """``1 - fvu``: dimensionless, at most 1; 0 is predicting the mean."""
    return 1.0 - fvu(x, x_hat)


def mse(x: Float[Tensor, "*rows d_out"], x_hat: Float[Tensor, "*rows d_out"]) -> float:
    """Mean over rows of the squared error summed over dimensions; in squared units of x, [0, inf)."""
    return (x.double() - x_hat.double()).square().sum(-1).mean().item()


def cosine(x: Float[Tensor, "*rows d_out"], x_hat: Float[Tensor, "*rows d_out"]) -> float:
    """Mean over rows of the cosine between row and reconstruction; in [-1, 1]."""
    return torch.nn.functional.cosine_similarity(x.double(), x_hat.double(), dim=-1).mean().item()


def norm_ratio(x: Float[Tensor, "*rows d_out"], x_hat: Float[Tensor, "*rows d_out"]) -> float:
    """``sum ||x_hat|| / sum ||x||``: dimensionless; below 1 the reconstruction is too short."""
    return (x_hat.double().norm(dim=-1).sum() / x.double().norm(dim=-1).sum()).item()


def l0(codes: Codes) -> float:
    """Mean number of active (nonzero) features per row."""
    return codes.l0().double().mean().item()


def density(codes: Codes) -> Float[Tensor, " feature"]:
    """Share of rows in which each feature is active; in [0, 1]."""
    return codes.firing_counts().double() / max(1, codes.rows)


def dead_share(density: Float[Tensor, " feature"]) -> float:
    """Share of features that were active in no row; in [0, 1]."""
    return (density == 0).double().mean().item()


def cross_entropy(
    logits: Float[Tensor, "*rows vocab"], targets: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """Next-token loss of each position, in nats."""
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]


def kl(logits: Float[Tensor, "*rows vocab"], changed: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """KL(original || changed) of each position's prediction, in nats; [0, inf)."""
    log_p, log_q = logits.float().log_softmax(-1), changed.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ce_recovered(original: float, spliced: float, ablated: float) -> float:
    """``(ablated - spliced) / (ablated - original)``: dimensionless; 1 loses nothing, 0 is no better than ablation.

    NaN where ablation changes nothing.
    """
    gap = ablated - original
    return (ablated - spliced) / gap if gap else float("nan")
