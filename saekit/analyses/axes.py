"""The axes that an analysis needs of a tensor, for all of them: shapes are checked by types in tests alone."""

from torch import Tensor

from saekit.errors import SaekitError


def check_axes(name: str, x: Tensor, *axes: str) -> None:
    """Raise unless ``x`` has as many axes as are named."""
    if x.ndim != len(axes):
        raise SaekitError(f"the shape of {name} is {list(x.shape)}; give [{', '.join(axes)}]")
