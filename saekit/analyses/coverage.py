"""How well single neurons tell of known factors, and how much the precise ones tell of them together.

The two measures of board games (Karvonen et al. 2024, 2408.00113, §3; of neurons in MoE-X, 2503.07639), but judged on rows that neither
neuron nor threshold was chosen by.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.errors import SaekitError
from saekit.probes import check_bools

THRESHOLDS = tuple(t / 10 for t in range(10))  # in shares of a neuron's maximum
PRECISE = 0.95


@dataclass(frozen=True)
class Coverage:
    """``coverage``: mean over factors of the F1 of the neuron and threshold that had the best. ``reconstruction``: mean F1 where
    a factor is said to hold if any neuron fires that told of it with precision 0.95. Both in [0, 1]; ``best`` by factor."""

    coverage: float
    reconstruction: float
    best: Float[Tensor, " factors"]


def coverage(
    chosen: Float[Tensor, "rows neurons"], labels: Bool[Tensor, "rows factors"],
    judged: Float[Tensor, "others _"], truth: Bool[Tensor, "others _"],
) -> Coverage:  # fmt: skip
    """Neurons and thresholds are ``chosen`` by some rows, and ``judged`` on others.

    A neuron fires above t times its maximum over the rows chosen by, t in 0, .1, ... .9. Raises SaekitError for non-finite
    activations and for a factor that always or never holds.
    """
    for name, other, x, y in (("labels", "chosen", chosen, labels), ("truth", "judged", judged, truth)):
        check_axes(other, x, "rows", "neurons")
        check_axes(name, y, "rows", "factors")
        check_bools(name, y)
        if len(x) != len(y):
            raise SaekitError(f"{name} has {len(y)} rows, and {other} {len(x)}; give as many of both")
    neurons, factors = chosen.shape[1], labels.shape[1]
    if (neurons, factors) != (judged.shape[1], truth.shape[1]) or not neurons * factors:
        raise SaekitError(f"chosen and judged have {neurons} and {judged.shape[1]} neurons, labels and truth {factors} and {truth.shape[1]} factors; give the same of both, and one or more of each")  # fmt: skip
    for name, x in (("chosen", chosen), ("judged", judged)):
        if not x.isfinite().all():
            raise SaekitError(f"{name} has non-finite activations: leave those rows out")
    for name, y in (("labels", labels), ("truth", truth)):
        if (one := y.all(0) | ~y.any(0)).any():
            raise SaekitError(f"{name}: factor {int(one.int().argmax())} has rows of one class: leave it out")
    tops = chosen.max(0).values.clamp(min=0)
    best = tops.new_full((factors,), -1.0, dtype=torch.float32)
    found, any_precise = torch.zeros_like(best), torch.zeros_like(truth)
    for t in THRESHOLDS:
        fires, fired = (chosen > t * tops).float(), (judged > t * tops).float()
        f1, precision = _scores(fires, labels)
        values, which = f1.max(0)
        own = _scores(fired, truth)[0].gather(0, which[None])[0]
        found, best = own.where(values > best, found), values.maximum(best)
        any_precise |= (fired @ (precision >= PRECISE).float()) > 0
    both, said = (any_precise & truth).sum(0), any_precise.sum(0)
    rebuilt = 2 * both / (said + truth.sum(0))
    return Coverage(found.mean().item(), rebuilt.mean().item(), found)


def _scores(fires: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """F1 and precision of every neuron for every factor; 0 where it never fires."""
    y = labels.float()
    both, fired = fires.T @ y, fires.sum(0)[:, None]
    return 2 * both / (fired + y.sum(0)), both / fired.clamp(min=1)
