"""What the wirings share that read one hook point and write another, as a module's input and output."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from saekit.types import SaekitError


def backwards(read: str, write: str) -> bool:
    """Whether these are the output and the input of one module, which a forward pass meets the other way round."""
    module, _, side = read.rpartition(":")
    return side == "out" and write == f"{module}:in"


class Pair(nn.Module):
    """A row is the input's columns, then the output's; the config has ``d_in``, ``d_out`` and ``normalise``."""

    same_space = False
    takes = "module"
    unnamed = ("x", "y")
    skip: Any  # of a transcoder that passes its input on; else None

    def __init__(self, config: Any):
        super().__init__()
        self.d_in, self.d_out = config.d_in, config.d_out or config.d_in
        self.columns = self.d_in + self.d_out
        self.parts_in, self.parts_out = (self.d_in,), (self.d_out,)
        self.stated = f"d_in + d_out = {self.columns}"
        self.normalise = config.normalise
        self.register_parameter("skip", None)

    @staticmethod
    def sites(hook_points: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``(reads, writes)``: two hook points in this order, or the input and the output of one module, in any."""
        if len(hook_points) == 1 and not hook_points[0].endswith((":in", ":out")):
            return (f"{hook_points[0]}:in",), (f"{hook_points[0]}:out",)
        if len(hook_points) != 2:
            raise SaekitError(
                f"a transcoder needs a hook point to read and one to write, or one module, and {len(hook_points)} are given: {', '.join(hook_points)}; name two, or a module as in blocks.1.mlp"
            )
        first, second = hook_points
        return ((second,), (first,)) if backwards(first, second) else ((first,), (second,))

    @staticmethod
    def shape(reads: Sequence[int], writes: Sequence[int]) -> dict[str, int]:
        """The widths of its config, from those of the hook points."""
        return {"d_in": reads[0], "d_out": writes[0]}

    @staticmethod
    def mask(n_features: int) -> None:
        """Every feature reads and writes all columns."""

    @staticmethod
    def points(reads: Sequence[str], writes: Sequence[str]) -> tuple[str, ...]:
        """The hook points whose columns make a row of training data; what is read after it is written raises."""
        for read, write in zip(reads, writes, strict=False):
            if backwards(read, write):
                raise SaekitError(
                    f"{read!r} is read and {write!r} written, but a module's output comes after its input; swap them"
                )
        return (*reads, *writes)

    def split(
        self, rows: Float[Tensor, "*shape columns"]
    ) -> tuple[Float[Tensor, "*shape d_in"], Float[Tensor, "*shape d_out"]]:
        """What is encoded, and what the output is compared with."""
        return rows[..., : self.d_in], rows[..., self.d_in :]
