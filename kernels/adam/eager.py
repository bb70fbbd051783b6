"""adam_step in plain torch, on any device and in any dtype."""

import torch

from saekit.kernels.factors import Factors


def _project(weight, gradient, unit):
    if isinstance(gradient, Factors):
        gradient = gradient.dense(len(weight))
    if unit:
        gradient = gradient.addcmul(torch.linalg.vecdot(gradient, weight)[:, None], weight, value=-1)
    return gradient


def adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit):
    """In place; the gradient is dense or Factors. See the package."""
    gradient = _project(weight, gradient, unit).mul(scale)
    # moments kept in fewer bits are computed in the weight's dtype; see _round
    mean = m.to(weight.dtype).mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    square = v.to(weight.dtype).mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    _round(m, mean)
    _round(v, square)
    root = square.div(1 - betas[1] ** step).sqrt_().add_(eps)
    weight.addcdiv_(mean, root, value=-rate / (1 - betas[0] ** step))
    if unit:
        weight.div_(torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp_(min=1e-12))


def _round(state, value):
    """Store a moment; into bf16 rounded up or down at random, since the nearest would lose small changes."""
    if state.dtype != torch.bfloat16 or value.dtype == torch.bfloat16:
        state.copy_(value)
        return
    bits = value.float().view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    state.copy_(((bits + noise) & ~0xFFFF).view(torch.float32))


def squares(weight, gradient, unit):
    """Squared length of every row of a gradient given as Factors, after the projection."""
    return _project(weight, gradient, unit).square().sum(-1)
