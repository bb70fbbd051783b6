"""The types that cross rooms, and the glossary of axis names.

Axes in shapes: ``batch`` (rows of a training or evaluation batch), ``rows`` (rows of a Codes),
``seq`` (positions of a sequence), ``layer``, ``head``, ``d_in`` (width read), ``d_out`` (width
written), ``feature`` (units of a dictionary), ``k`` (active features of a row), ``nnz`` (active
features of all rows together).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError as SaekitError


@dataclass(frozen=True)
class Codes:
    """Sparse activations of features: compressed sparse rows.

    ``offsets`` int64 [rows + 1], ``indices`` int32 [nnz], ``values`` [nnz]; row r owns the entries
    ``offsets[r]:offsets[r + 1]``. ``shape`` is the leading shape of the rows, so that codes of
    ``[batch, seq, d_in]`` stay addressable. Entries keep the selection's order (falling value for
    topk, steps for a pursuit). An entry may hold 0 (a unit chosen by topk that ReLU silenced): it
    is stored but not active. Differentiable in ``values``.
    """

    offsets: Int[Tensor, " rows_plus_one"]
    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    n_features: int
    shape: tuple[int, ...]
    width: int | None = None  # entries per row where every row holds the same number

    @staticmethod
    def from_rectangular(
        indices: Int[Tensor, "rows k"],
        values: Float[Tensor, "rows k"],
        n_features: int,
        shape: tuple[int, ...] | None = None,
    ) -> "Codes":
        """Codes of rows that all hold k entries; the tensors are viewed, not copied."""
        rows, k = indices.shape
        offsets = torch.arange(rows + 1, device=indices.device) * k
        return Codes(
            offsets, indices.reshape(-1).int(), values.reshape(-1), n_features, shape or (rows,), width=k
        )

    @staticmethod
    def from_dense(dense: Float[Tensor, "*shape feature"]) -> "Codes":
        """The nonzero entries of a dense matrix, by rising index."""
        flat = dense.reshape(-1, dense.shape[-1])
        row, index = flat.nonzero(as_tuple=True)
        offsets = torch.zeros(flat.shape[0] + 1, dtype=torch.int64, device=dense.device)
        offsets[1:] = torch.bincount(row, minlength=flat.shape[0]).cumsum(0)
        return Codes(offsets, index.int(), flat[row, index], dense.shape[-1], tuple(dense.shape[:-1]))

    @staticmethod
    def beside(parts: "Sequence[Codes]") -> "Codes":
        """Codes of several dictionaries on the same rows as one: features in the order of the parts."""
        n_features = sum(part.n_features for part in parts)
        starts = [sum(part.n_features for part in parts[:i]) for i in range(len(parts))]
        if all(part.width is not None for part in parts):
            wide = [part.rectangular()[0] + start for part, start in zip(parts, starts, strict=True)]
            values = torch.cat([part.rectangular()[1] for part in parts], 1)
            return Codes.from_rectangular(torch.cat(wide, 1), values, n_features, parts[0].shape)
        indices = [part.indices + start for part, start in zip(parts, starts, strict=True)]
        order = torch.cat([part.row_ids() for part in parts]).argsort(stable=True)
        offsets = torch.stack([part.offsets for part in parts]).sum(0)
        values = torch.cat([part.values for part in parts])[order]
        return Codes(offsets, torch.cat(indices)[order], values, n_features, parts[0].shape)

    def part(self, first: int, stop: int) -> "Codes":
        """The codes of some features only, which are counted from 0."""
        kept = (self.indices >= first) & (self.indices < stop)
        before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
        return Codes(
            before[self.offsets], self.indices[kept] - first, self.values[kept], stop - first, self.shape
        )

    @property
    def rows(self) -> int:
        """Number of rows: the product of ``shape``."""
        return self.offsets.numel() - 1

    def rectangular(self) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """``(indices, values)`` as [rows, k] views, for codes whose rows all hold k entries."""
        if self.width is None:
            raise ValueError("these codes hold different numbers of entries per row; use offsets")
        return self.indices.view(-1, self.width), self.values.view(-1, self.width)

    def row_ids(self) -> Int[Tensor, " nnz"]:
        """Row of every entry."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(self.rows, device=counts.device), counts)

    def to_dense(self) -> Float[Tensor, "*shape feature"]:
        """Dense [*shape, n_features]; for tests and small inputs only."""
        dense = self.values.new_zeros(self.rows, self.n_features)
        dense = dense.index_put((self.row_ids(), self.indices.long()), self.values, accumulate=True)
        return dense.view(*self.shape, self.n_features)

    def l0(self) -> Int[Tensor, "*shape"]:
        """Number of active (nonzero) features of each row."""
        counts = torch.zeros(self.rows, dtype=torch.int64, device=self.values.device)
        counts.index_add_(0, self.row_ids(), (self.values != 0).long())
        return counts.view(self.shape)

    def firing_counts(self) -> Int[Tensor, " feature"]:
        """How many rows each feature is active in."""
        active = self.indices[self.values != 0]
        return torch.bincount(active.long(), minlength=self.n_features)

    def active(self) -> tuple[Int[Tensor, " active"], Int[Tensor, " active"]]:
        """Row and feature of the entries that fire."""
        on = self.values != 0
        return self.row_ids()[on], self.indices[on].long()

    def at(self, rows: Int[Tensor, " some"]) -> "Codes":
        """Some rows, in the order given; a row may come twice."""
        if rows.dtype == torch.bool:
            raise SaekitError("rows are bools; give the numbers of rows, as mask.nonzero()[:, 0]")
        counts = self.offsets.diff()[rows]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        entry = torch.arange(int(offsets[-1]), device=offsets.device)
        entry += torch.repeat_interleave(self.offsets[:-1][rows] - offsets[:-1], counts)
        return Codes(
            offsets, self.indices[entry], self.values[entry], self.n_features, (len(rows),), self.width
        )

    def select(self, features: Int[Tensor, " chosen"]) -> Float[Tensor, "*shape chosen"]:
        """Dense values of a few features only, [*shape, chosen]."""
        some, place = features.to(self.values.device).unique(return_inverse=True)
        column = torch.full((self.n_features,), -1, dtype=torch.int64, device=self.values.device)
        column[some] = torch.arange(len(some), device=self.values.device)
        at = column[self.indices.long()]
        kept = at >= 0
        out = self.values.new_zeros(self.rows, len(some))
        out = out.index_put((self.row_ids()[kept], at[kept]), self.values[kept], accumulate=True)
        return out[:, place].view(*self.shape, len(features))

    def scale(self, by: Float[Tensor, " feature"]) -> "Codes":
        """Codes with every feature's values multiplied by its factor."""
        return replace(self, values=self.values * by[self.indices.long()])

    def with_values(self, values: Float[Tensor, " nnz"]) -> "Codes":
        """The same support with other values."""
        return replace(self, values=values)

    def detach(self) -> "Codes":
        """The same codes, cut from the autograd graph."""
        return replace(self, values=self.values.detach())


def check_device(device: "str | torch.device") -> None:
    """Raise unless a tensor can be put there."""
    try:
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # as torch refuses, by the kind of device
        why = str(error).splitlines()[0]
        raise SaekitError(f"device {str(device)!r} can't be used here ({why}); choose cpu, or leave it out") from None  # fmt: skip


def check_codes(decoder: Tensor, truth: Tensor, codes: Codes, true_codes: Codes) -> None:
    """Raise unless each codes' features have directions, and both belong to as many rows."""
    for name, given, rows in (("codes", codes, decoder), ("true_codes", true_codes, truth)):
        if given.n_features != len(rows):
            raise SaekitError(
                f"{name}.n_features is {given.n_features}: its directions have {len(rows)} rows"
            )
    if codes.rows != true_codes.rows:
        raise SaekitError(f"codes have {codes.rows} rows: encode the {true_codes.rows} rows of true_codes")


def check_beside(
    tokens: Tensor,
    documents: Tensor | None,
    mask: Tensor,
    codes: Codes,
    n_features: int,
    seq: int | None = None,
) -> None:
    """Raise unless what belongs to rows of tokens (of ``seq``, where it is fixed) has their shape, and codes their features."""
    shape = tuple(tokens.shape)
    if len(shape) != 2 or shape[1] != (seq or shape[1]):
        raise SaekitError(f"tokens: shape {shape}, expected [rows, {seq or 'seq'}]")
    others = {"mask": mask.shape, "codes": codes.shape}
    if documents is not None:
        others["documents"] = documents.shape
    for name, other in others.items():
        if tuple(other) != shape:
            raise SaekitError(f"{name}: shape {tuple(other)}, but tokens has shape {shape}")
    if codes.n_features != n_features:
        raise SaekitError(f"codes: {codes.n_features} features, expected {n_features}")


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of whole sequences at several hook points, with what identifies their tokens.

    ``mask`` is true where a position counts: not padding, not a special token, not an outlier in
    norm. It is made once, where activations are harvested, and every room uses this one.
    """

    activations: Mapping[str, Float[Tensor, "batch seq _"]]
    mask: Bool[Tensor, "batch seq"]
    tokens: Int[Tensor, "batch seq"] | None = None
    documents: Int[Tensor, "batch seq"] | None = None

    def rows(self, hook_point: str) -> Float[Tensor, "rows d_in"]:
        """The unmasked positions of one hook point, flattened."""
        return self.activations[hook_point][self.mask]


@dataclass(frozen=True)
class Loss:
    """A training loss: ``total`` is what is minimised, ``terms`` its named, already weighted parts.

    Each term is a mean over rows of a sum over dimensions, in the normalised space of the
    dictionary (mean squared row norm d_out). ``codes`` are those of the batch, cut from the graph,
    for the counts of firing; ``fvu`` is the share of the batch's variance that they leave.
    """

    total: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]]
    codes: Codes
    fvu: Float[Tensor, ""]
