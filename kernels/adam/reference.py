"""The definition of adam_step: the formulas of Kingma and Ba 2015 (1412.6980), algorithm 1, in plain torch."""

import torch


def adam_step(weight, gradient, m, v, rate, step, betas, eps, scale, unit, masked):
    """In place; the gradient is dense. Unit rows move along the sphere and are brought back to it."""
    if unit:
        gradient = gradient - (gradient * weight).sum(-1, keepdim=True) * weight
    gradient = gradient * scale
    m.copy_(betas[0] * m + (1 - betas[0]) * gradient)
    v.copy_(betas[1] * v + (1 - betas[1]) * gradient**2)
    corrected = v / (1 - betas[1] ** step)
    change = rate * m / (1 - betas[0] ** step) / (corrected.sqrt() + eps)
    weight.sub_(change * (gradient != 0) if masked else change)
    if unit:
        weight.div_(torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp(min=1e-12))
