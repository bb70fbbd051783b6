"""Fourier atoms: features are smooth functions at places, given by their lowest frequencies (a neural operator).

The SAE-FNO of Tolooshams, Shen and Anandkumar 2025 (2509.03738): ``x = F^-1(sum_c W_c(f) z_c(f))`` with W 0 beyond ``modes``,
on a ring of as many samples as rows have coordinates. :mod:`saekit.analyses.operators` takes it to other resolutions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.atoms.shifts import kernels_of, shifted, shifts
from saekit.types import SaekitError


@dataclass(frozen=True)
class FourierConfig:
    """``modes``: the highest frequency, in periods a row; at half of a row's samples a function is any kernel."""

    modes: int = 8

    def __post_init__(self):
        if self.modes < 0:
            raise SaekitError(f"modes = {self.modes} must be at least 0; it is a frequency")


class Fourier(nn.Module):
    """Functions of norm 1, read and written at every place."""

    Config = FourierConfig
    unit = False  # functions are kept at norm 1, and are no rows of it
    tied = True
    trained = True
    shifts_over_rows = True
    by: Tensor

    def __init__(
        self, config: FourierConfig, directions: Float[Tensor, "feature d_out"], generator: torch.Generator
    ):
        super().__init__()
        n, self.places = directions.shape
        if config.modes > self.places // 2:
            raise SaekitError(f"modes = {config.modes} must be at most {self.places // 2}, half of a row's coordinates; choose fewer")  # fmt: skip
        own = directions[: kernels_of("fourier", n, self.places)]
        # as real numbers, so that any optimizer moves them
        self.parts = nn.Parameter(torch.view_as_real(torch.fft.rfft(own)[:, : config.modes + 1]).clone())
        self.register_buffer("by", shifts((self.places,)), persistent=False)
        self.after_step()

    def functions(self) -> Float[Tensor, "kernel place"]:
        """Each function on the places of a row."""
        return torch.fft.irfft(torch.view_as_complex(self.parts), n=self.places)

    def rows(self) -> Float[Tensor, "feature d_out"]:
        """Decoder and encoder: function by function, each at all places."""
        return shifted(self.functions(), self.by)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring every function back to norm 1."""
        self.parts.div_(self.functions().norm(dim=1).clamp_(min=1e-12)[:, None, None])
