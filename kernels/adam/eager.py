"""adam_step in plain torch, on any device and in any dtype."""

import torch

from saekit.kernels.adam.short import restored, store
from saekit.kernels.factors import Factors


def _project(weight, gradient, unit):
    if isinstance(gradient, Factors):
        gradient = gradient.dense(len(weight))
    if unit:
        gradient = gradient.addcmul(torch.linalg.vecdot(gradient, weight)[:, None], weight, value=-1)
    return gradient


def adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked):
    """In place; the gradient is dense or Factors. See the package."""
    dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype  # computed in full, whatever is kept
    gradient = _project(weight, gradient, unit).to(dtype).mul(scale)
    mean = restored(m, True, dtype).mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    square = restored(v, False, dtype).mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    store(m, mean, True)
    store(v, square, False)
    root = square.div(1 - betas[1] ** step).sqrt_().add_(eps)
    if masked:
        mean = mean.masked_fill(gradient == 0, 0.0)
    new = weight.to(dtype, copy=True).addcdiv_(mean, root, value=-rate / (1 - betas[0] ** step))
    if unit:
        new.div_(torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_(min=1e-12))
    store(weight, new, True)


def squares(weight, gradient, unit):
    """Squared length of every row of a gradient given as Factors, after the projection."""
    return _project(weight, gradient, unit).square().sum(-1)
