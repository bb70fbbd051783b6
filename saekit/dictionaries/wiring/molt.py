"""MOLT: a mixture of linear transforms, which stands in for a module (Kamath et al. 2025, transformer-circuits.pub).

A feature is a linear map of low rank, switched on by its code: the output is ``sum_i z_i U_i V_i x``. The codes come
from an encoder and a selection, as any other's. Maps of several ranks may be mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.dictionaries.normalisation import check_kind
from saekit.dictionaries.wiring.pair import Pair
from saekit.types import SaekitError


@dataclass(frozen=True)
class MoltConfig:
    """``d_in`` and ``d_out`` are the widths read and written (``d_out`` None: the same).

    ``ranks``: of the maps, in the order of the features; each rank has an equal share of them, or as many as
    ``counts`` says. ``normalise``: "scale" (centred, one scale), "whiten", "centre" or "none", for both sides.
    """

    d_in: int
    d_out: int | None = None
    ranks: tuple[int, ...] = (4,)
    counts: tuple[int, ...] | None = None
    normalise: str = "scale"

    def __post_init__(self):
        for name in ("d_in", "d_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaekitError(f"{name} = {value} must be at least 1")
        most = min(self.d_in, self.d_out or self.d_in)
        if not self.ranks or not 1 <= min(self.ranks) <= max(self.ranks) <= most:
            raise SaekitError(f"ranks = {self.ranks} must lie in 1..{most}, the smaller of the widths")
        if self.counts is not None and (len(self.counts) != len(self.ranks) or min(self.counts) < 0):
            raise SaekitError(
                f"counts = {self.counts} must say how many maps have each of ranks = {self.ranks}"
            )
        check_kind(self.normalise)

    def check(self, n_features: int) -> None:
        """Raise unless every feature has a rank."""
        if self.counts is not None and sum(self.counts) != n_features:
            raise SaekitError(
                f"counts = {self.counts} add up to {sum(self.counts)}, not to n_features = {n_features}"
            )
        if self.counts is None and n_features % len(self.ranks):
            raise SaekitError(
                f"n_features = {n_features} can't be shared out among {len(self.ranks)} ranks; give counts, or a multiple"
            )

    def rank_of(self, n_features: int) -> Int[Tensor, " feature"]:
        """The rank of every feature's map."""
        each = self.counts or (n_features // len(self.ranks),) * len(self.ranks)
        return torch.tensor(self.ranks).repeat_interleave(torch.tensor(each))


class Molt(Pair):
    """The features' maps are the dictionary's, see :class:`saekit.dictionaries.transforms.Transforms`."""

    Config = MoltConfig
    kind = "transforms"


def check_terms(names: Sequence[str]) -> None:
    """Raise for terms of an objective that cut features off by their place among the atoms."""
    for name in names:
        if name in ("matryoshka", "hierarchical"):
            raise SaekitError(
                f"objective {name!r} cuts features off by their place, and a map has several atoms; choose 'reconstruction'"
            )
