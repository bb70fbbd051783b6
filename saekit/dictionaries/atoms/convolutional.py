"""Convolutional atoms: features are kernels at places, so that what is learnt at one place is known at all.

Convolutional sparse coding; the convolutional autoencoder that Tolooshams, Shen and Anandkumar 2025 (2509.03738) compare
operators with. Rows are signals on a ring of as many samples as they have coordinates, or images on a torus.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.atoms.shifts import kernels_of, shifted, shifts
from saekit.types import SaekitError


@dataclass(frozen=True)
class ConvolutionalConfig:
    """``grid``: the places of a row along each axis, as (16, 16) of images (None: a ring); kernels have ``size`` along each.

    Of several sizes, as (4, 8, 16), kernels get each in turn (heterogeneous kernels).
    """

    size: int | tuple[int, ...] = 8
    grid: tuple[int, ...] | None = None

    def __post_init__(self):
        if min(self.sizes, default=0) < 1:
            raise SaekitError(
                f"size = {self.size} must be at least 1; it counts a kernel's samples along an axis"
            )
        if self.grid is not None and min(self.grid, default=0) < 1:
            raise SaekitError(f"grid = {self.grid} must hold lengths of at least 1, as (16, 16)")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of which kernels are."""
        return self.size if isinstance(self.size, tuple) else (self.size,)


class Convolutional(nn.Module):
    """Kernels of norm 1, read and written at every place."""

    Config = ConvolutionalConfig
    unit = False  # its kernels are kept at norm 1, and are no rows of it
    tied = True
    trained = True
    shifts_over_rows = True
    by: Tensor
    room: Tensor

    def __init__(
        self, config: ConvolutionalConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):  # fmt: skip
        super().__init__()
        n, places = directions.shape
        self.grid = config.grid or (places,)
        if math.prod(self.grid) != places:
            raise SaekitError(f"grid = {self.grid} has {math.prod(self.grid)} places, and rows have {places} coordinates; give as many")  # fmt: skip
        largest = max(config.sizes)
        if largest > min(self.grid):
            raise SaekitError(f"size = {config.size} is more than the grid's {min(self.grid)} places along an axis; choose a smaller one")  # fmt: skip
        own = directions[: kernels_of("convolutional", n, places)].unflatten(1, self.grid)
        for axis in range(1, own.ndim):
            own = own.narrow(axis, 0, largest)
        size = torch.tensor(config.sizes).repeat(len(own))[: len(own)]
        room = torch.ones(own.shape, dtype=torch.bool)
        for axis in range(1, own.ndim):
            at = torch.arange(largest).view(-1, *[1] * (own.ndim - axis - 1))
            room &= at < size.view(-1, *[1] * (own.ndim - 1))
        self.register_buffer("room", room, persistent=False)
        self.kernels = nn.Parameter(own * room)
        self.register_buffer("by", shifts(self.grid), persistent=False)
        self.after_step()

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """Decoder and encoder: kernel by kernel, each at all places."""
        left = [(0, n - size) for n, size in zip(self.grid, self.kernels.shape[1:], strict=True)]
        padded = nn.functional.pad(
            self.kernels * self.room, [side for axis in reversed(left) for side in axis]
        )
        return shifted(padded.flatten(1), self.by)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring every kernel back to norm 1."""
        norm = self.kernels.flatten(1).norm(dim=1).clamp_(min=1e-12)
        self.kernels.div_(norm.view(-1, *[1] * (self.kernels.ndim - 1)))
