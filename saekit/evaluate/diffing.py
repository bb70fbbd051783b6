"""Model diffing: which features of a crosscoder are of one model alone.

A feature's decoder norms in the two sources tell which model it writes (Lindsey et al. 2024), but an L1
crosscoder makes features look one-sided that aren't: it may shrink a shared feature's weaker side to nothing,
or keep one for each side. Latent scaling (Minder et al. 2025, 2504.02922) looks at what the other model's
activations hold of the feature after all.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.kernels.product import sum_outer
from saekit.types import Codes, SaekitError


def _blocks(d: Dictionary, source: int, other: int) -> tuple[Tensor, Tensor]:
    name, settings = d.config.wiring
    if name != "crosscoder":
        raise SaekitError(
            f"the dictionary's wiring is {name!r}, whose features don't read and write each source; give a crosscoder"
        )
    terms = [term for term, _ in d.config.objective]
    if settings.normalise == "none" and d.config.atoms[0] == "free" and terms == ["reconstruction"]:
        raise SaekitError(
            "the crosscoder has normalise = 'none', free atoms and reconstruction alone, as to_inference() and calibrate() leave it: norms are in each source's own units, which can't be compared; give the one that was trained"
        )
    parts = d.wiring.parts_out
    for name, index in (("source", source), ("other", other)):
        if not 0 <= index < len(parts):
            raise SaekitError(
                f"{name} = {index} is not in 0..{len(parts) - 1}, the sources of this dictionary"
            )
    if source == other:
        raise SaekitError(f"source = {source} is compared with itself; give another one as other")
    blocks = d.W_dec.detach().split(parts, 1)
    return blocks[source], blocks[other]


def norm_difference(d: Dictionary, source: int = 1, other: int = 0) -> Float[Tensor, " feature"]:
    """``(1 + (||d_source|| - ||d_other||) / max of the two) / 2`` of each feature, in [0, 1].

    1 is a feature of ``source`` alone, 0 one of ``other`` alone, 1/2 one that both have alike. The norms are
    those in normalised space, so that a model whose activations are larger doesn't seem to own everything: a
    crosscoder whose normalisation has been folded into its weights is refused.
    """
    a, b = (torch.linalg.vector_norm(block, dim=1) for block in _blocks(d, source, other))
    return (1 + (a - b) / torch.maximum(a, b).clamp(min=1e-12)) / 2


@torch.no_grad()
def latent_scaling(
    d: Dictionary, rows: Float[Tensor, "rows columns"], source: int = 1, other: int = 0
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """``(nu_error, nu_reconstruction)``: what ``other`` holds of each feature, over what ``source`` does.

    For feature j with codes f_j and direction d_j in ``source``, ``beta(y) = argmin ||beta f_j d_j - y||^2``
    over the rows. The error's ratio is ``beta(e_other) / beta(e_source + f_j d_j)`` for the errors e of the
    two reconstructions, the reconstruction's ``beta(x_hat_other) / beta(x_hat_source)`` (2504.02922,
    section 3). A feature of ``source`` alone has both near 0; a high error ratio means that the other side was
    shrunk away, a high reconstruction ratio that another feature has it. NaN for features that never fire.
    Both sources must be equally wide, and their spaces comparable, as those of a model and its fine-tune are.
    """
    block, _ = _blocks(d, source, other)
    parts = d.wiring.parts_out
    if parts[source] != parts[other]:
        raise SaekitError(
            f"source {source} is {parts[source]} wide and other {other} {parts[other]}: latent scaling compares directions, which needs equal widths"
        )
    if rows.ndim != 2 or rows.shape[1] != sum(parts):
        raise SaekitError(
            f"rows have shape {tuple(rows.shape)}; expected [rows, {' + '.join(map(str, parts))}], the sources side by side"
        )
    x = d.norm_in(rows.to(d.dtype))
    codes = d.encode(rows)
    x_hat = d.norm_out(d.decode(codes))
    error = (x - x_hat).split(parts, 1)
    hats = x_hat.split(parts, 1)
    size = _squares(codes) * block.square().sum(1)

    def beta(y: Tensor) -> Tensor:
        products = sum_outer(codes.row_ids(), codes.indices, codes.values, y.contiguous(), codes.n_features)
        return (products * block).sum(1) / size

    return beta(error[other]) / (1 + beta(error[source])), beta(hats[other]) / beta(hats[source])


def _squares(codes: Codes) -> Float[Tensor, " feature"]:
    """Sum of squared codes of each feature."""
    return codes.values.new_zeros(codes.n_features).index_add_(0, codes.indices.long(), codes.values.square())


def specific(
    d: Dictionary, rows: Float[Tensor, "rows columns"], source: int = 1, other: int = 0,
    norm: float = 0.9, scaling: float = 0.5,
) -> Tensor:  # fmt: skip
    """Mask of the features that are of ``source`` alone: norm difference above ``norm``, both ratios below ``scaling``."""
    return alone(
        norm_difference(d, source, other), *latent_scaling(d, rows, source, other), norm=norm, scaling=scaling
    )


def alone(
    difference: Float[Tensor, " feature"], error: Float[Tensor, " feature"], reconstruction: Float[Tensor, " feature"],
    norm: float = 0.9, scaling: float = 0.5,
) -> Bool[Tensor, " feature"]:  # fmt: skip
    """The rule of :func:`specific`, for norm differences and ratios that are known."""
    low = (error.abs() < scaling) & (reconstruction.abs() < scaling)  # NaN is neither
    return (difference > norm) & low
