"""JumpReLU on selected entries: silent below the threshold, with pseudo-gradients inside a window around it."""

import torch

from saekit.kernels.product import feature_sums

# on [-1/2, 1/2], of integral 1
KERNELS = {
    "rectangle": lambda t: torch.ones_like(t),
    "triangle": lambda t: 2 - 4 * t.abs(),
    "parabola": lambda t: 1.5 - 6 * t.square(),
}


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, features, threshold, bandwidth, kernel):
        at = threshold[features.long()]
        on = u > at
        ctx.save_for_backward(u, features, at, on, threshold)
        ctx.bandwidth, ctx.kernel = bandwidth, kernel
        return torch.where(on, u, 0), on.to(u.dtype)

    @staticmethod
    def backward(ctx, grad_z, grad_on):
        u, features, at, on, threshold = ctx.saved_tensors
        t = (u - at) / ctx.bandwidth
        window = torch.where(t.abs() < 0.5, KERNELS[ctx.kernel](t), 0) / ctx.bandwidth
        per_entry = -window * (at * grad_z + grad_on)
        grad_threshold = feature_sums(features, per_entry, len(threshold))
        return torch.where(on, grad_z, 0), None, grad_threshold, None, None


def jumprelu(u, features, threshold, bandwidth, kernel="rectangle"):
    """``(z, on)`` of entries: ``z = u 1[u > threshold]`` and ``on = 1[u > threshold]``, both [nnz].

    u and features are those of ``threshold_encode(x, W, b, threshold - bandwidth / 2)``: entries
    inside the window are silent and train the threshold. Rajamanoharan et al. 2024 (2407.14435),
    eq. 11 and 12, with a kernel K of width ``bandwidth``: ``dz/dthreshold = -(threshold / bandwidth) K``
    and ``d on/dthreshold = -(1 / bandwidth) K``, ``dz/du = on``.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel = {kernel!r} is not one of {', '.join(KERNELS)}")
    return _JumpReLU.apply(u, features, threshold, bandwidth, kernel)
