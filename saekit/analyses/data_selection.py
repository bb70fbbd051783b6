"""Samples of a pool that fire the features which a task's exemplars fire: MoNA (Ma et al. 2025, 2503.15573).

A sample is its codes, pooled over tokens: a sparse vector s, nowhere negative. It is as near to a task's prototype p as their
generalised Jaccard similarity says, sum_i min(s_i, p_i) / sum_i max(s_i, p_i) (eq. 4), in as many steps as s has entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.probes import check_bools
from saekit.types import Codes, SaekitError

POOLINGS = ("max", "mean")


def pooled(codes: Codes, how: str = "max", mask: Bool[Tensor, "batch seq"] | None = None) -> Codes:
    """Codes of [batch, seq] tokens as those of [batch] samples: each feature's largest value, or its mean over the sample's tokens.

    ``mask`` says which tokens count (by default all); a sample of none has no entries.
    """
    if len(codes.shape) != 2:
        raise SaekitError(f"codes have shape {codes.shape}; give those of [batch, seq] tokens")
    if how not in POOLINGS:
        raise SaekitError(f"how = {how!r} must be one of {', '.join(POOLINGS)}")
    _check(codes)
    batch, seq = codes.shape
    counts = torch.ones(batch, seq, dtype=torch.bool) if mask is None else mask
    check_bools("mask", counts)
    if tuple(counts.shape) != (batch, seq):
        raise SaekitError(f"mask has shape {tuple(counts.shape)}, and codes {codes.shape}; give it the tokens' shape")  # fmt: skip
    row = codes.row_ids()
    kept = counts.to(row.device).flatten()[row] & (codes.values > 0)
    cell, place = (row[kept] // seq * codes.n_features + codes.indices[kept].long()).unique(return_inverse=True)  # fmt: skip
    sample, values = cell // codes.n_features, codes.values[kept].detach().float()
    out = values.new_zeros(len(cell))
    if how == "max":
        out = out.scatter_reduce(0, place, values, "amax")
    else:
        out = out.index_add(0, place, values) / counts.to(row.device).sum(1)[sample]
    offsets = torch.zeros(batch + 1, dtype=torch.int64, device=row.device)
    offsets[1:] = torch.bincount(sample, minlength=batch).cumsum(0)
    return Codes(offsets, (cell % codes.n_features).int(), out, codes.n_features, (batch,))


def prototype(exemplars: Codes) -> Float[Tensor, " feature"]:
    """The mean of a task's exemplars, which are pooled codes."""
    _check_pooled("exemplars", exemplars)
    if not exemplars.rows or not bool((exemplars.values > 0).any()):
        raise SaekitError(f"the {exemplars.rows} exemplars fire no feature; give some that do")
    values = exemplars.values.detach().float()
    return (
        values.new_zeros(exemplars.n_features).index_add(0, exemplars.indices.long(), values) / exemplars.rows
    )


def jaccard(samples: Codes, prototype: Float[Tensor, " feature"]) -> Float[Tensor, " rows"]:
    """Generalised Jaccard similarity of samples and a prototype, in [0, 1]: 1 where equal, 0 where no feature is shared.

    sum max = sum s + sum p - sum min, so that only the samples' entries are read. Not the same at another scale: 1/2 for a
    sample of twice the prototype.
    """
    _check_pooled("samples", samples)
    if len(prototype) != samples.n_features:
        raise SaekitError(f"prototype is of {len(prototype)} features, and samples of {samples.n_features}; take both from one dictionary")  # fmt: skip
    if not bool(prototype.isfinite().all()) or bool((prototype < 0).any()):
        raise SaekitError("prototype holds NaN, inf or values below 0; give one of codes that have none")
    row, values = samples.row_ids(), samples.values.detach().double()
    own = values.new_zeros(samples.rows).index_add(0, row, values)
    least = torch.minimum(values, prototype.double()[samples.indices.long()])
    both = values.new_zeros(samples.rows).index_add(0, row, least)
    return (both / (own + prototype.double().sum() - both).clamp_min(1e-300)).float()


@dataclass(frozen=True)
class Selection:
    """Places in the pool of the samples chosen, and their similarities, falling; of equals the first comes first."""

    samples: Int[Tensor, " chosen"]
    similarities: Float[Tensor, " chosen"]
    seen: int


def select(pool: Iterable[Codes], prototypes: Float[Tensor, "prototype feature"], count: int) -> Selection:
    """The ``count`` samples of a pool that are nearest to any of the prototypes, in one pass over batches of pooled codes.

    Holds one batch and ``count`` numbers. A share of a pool needs the pool's size: whether a sample is among the best 5 % is
    known at the end only, so give ``round(0.05 * size)``. A pool of fewer samples is chosen whole.
    """
    if count < 1:
        raise SaekitError(f"count = {count} must be at least 1; choose more")
    check_axes("prototypes", prototypes, "prototype", "feature")
    if not len(prototypes):
        raise SaekitError("prototypes has no rows; give 1 or more")
    chosen, best, seen = torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0
    for batch in pool:
        near = torch.stack([jaccard(batch, one) for one in prototypes]).amax(0).cpu()
        best, chosen = torch.cat([best, near]), torch.cat([chosen, seen + torch.arange(len(near))])
        order = best.sort(descending=True, stable=True).indices[:count]
        best, chosen, seen = best[order], chosen[order], seen + len(near)
    if not seen:
        raise SaekitError("pool has no samples; give 1 or more")
    return Selection(chosen, best, seen)


def _check_pooled(name: str, codes: Codes) -> None:
    if len(codes.shape) != 1:
        raise SaekitError(f"{name} have shape {codes.shape}; give pooled codes, one row a sample")
    _check(codes)


def _check(codes: Codes) -> None:
    if not bool(codes.values.isfinite().all()) or bool((codes.values < 0).any()):
        raise SaekitError("codes hold NaN, inf or values below 0, which have no Jaccard similarity; give a dictionary's whose codes are not negative")  # fmt: skip
