"""Adam's whole step in one pass: gradient from its sparse terms, projection, clip scale, update, renorm.

A dense gradient of a dictionary's weights is as large as the weights; written, read for the
projection, read for its norm and read by the optimizer it would cost more than everything else
behind the encode product. Here each row's gradient is summed from its terms where it is used.
"""

import torch

from saekit.kernels import checks
from saekit.kernels.backend import run
from saekit.kernels.factors import Factors


@torch.no_grad()
def adam_step(
    weight, gradient, m, v, *, rate, step, betas=(0.9, 0.999), eps=1e-8, scale=1.0, unit=False, masked=False
):  # fmt: skip
    """One step of Adam on a weight, in place.

    weight [n, d] or [n]; gradient of the same shape, or :class:`Factors`; m and v its moments, in
    the weight's dtype, in bf16, or as uint8 in floats of 8 bits (2 of mantissa; m up to 2^4, v up to
    2^8), the short ones rounded stochastically; step counts from 1; the gradient is
    multiplied with ``scale`` (of a clip). With ``unit`` the rows stay on the sphere: the component
    of the gradient along a row is taken off before, and the row is brought back to norm 1 after.
    ``masked`` leaves entries alone whose gradient is 0, while their moments decay (SparseAdam of
    2508.16929): features that haven't fired for long aren't moved by what their moments still hold.
    """
    for name, state in (("m", m), ("v", v)):
        if state.shape != weight.shape or state.device != weight.device:
            raise ValueError(
                f"{name} has shape {tuple(state.shape)} on {state.device}; expected {tuple(weight.shape)} on {weight.device}"
            )
        if state.dtype not in (weight.dtype, torch.bfloat16, torch.uint8):
            raise ValueError(
                f"{name} has dtype {state.dtype}; expected {weight.dtype}, torch.bfloat16 or torch.uint8 (floats of 8 bits)"
            )
    if step < 1:
        raise ValueError(f"step = {step} must be at least 1; it counts the steps, this one included")
    if not weight.is_contiguous() or not m.is_contiguous() or not v.is_contiguous():
        raise ValueError("weight, m and v are changed in place and must be contiguous")
    if unit and weight.ndim != 2:
        raise ValueError(f"unit = True needs rows, and weight has shape {tuple(weight.shape)}")
    if not isinstance(gradient, Factors):
        if gradient.shape != weight.shape:
            raise ValueError(f"gradient has shape {tuple(gradient.shape)}; expected {tuple(weight.shape)}")
        checks.alike(weight=weight, gradient=gradient)
        checks.finite(gradient, gradient=gradient)
    else:
        for _, _, values, matrix in gradient.terms:
            checks.finite(values, values=values)
            checks.finite(matrix, matrix=matrix)
    if weight.ndim > 2:  # contiguous, so these are views
        weight, gradient, m, v = (t.reshape(len(t), -1) for t in (weight, gradient, m, v))
    run(
        "adam",
        "adam_step",
        weight,
        weight.detach(),
        gradient,
        m,
        v,
        rate,
        step,
        betas,
        eps,
        scale,
        unit,
        masked,
    )


@torch.no_grad()
def gradient_norm(weights, gradients, units):
    """Norm over all weights together, after the projection of unit rows: what a clip compares."""
    total = 0.0
    for weight, gradient, unit in zip(weights, gradients, units, strict=True):
        if isinstance(gradient, Factors):
            total = total + run("adam", "squares", weight, weight.detach(), gradient, unit).sum()
        else:
            flat = gradient if not unit else gradient - (gradient * weight).sum(-1, keepdim=True) * weight
            total = total + flat.square().sum()
    return torch.as_tensor(total).sqrt()
