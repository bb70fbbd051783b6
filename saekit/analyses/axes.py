"""The axes that an analysis needs of a tensor, for all of them: shapes are checked by types in tests alone."""

from typing import Any

from torch import Tensor

from saekit.errors import SaekitError


def check_axes(name: str, x: Any, *axes: str) -> None:
    """Raise unless ``x`` is a tensor that has as many axes as are named."""
    if not isinstance(x, Tensor):
        raise SaekitError(f"{name} is {type(x).__name__}; give a torch tensor, as torch.as_tensor makes one")
    if x.ndim != len(axes):
        raise SaekitError(f"the shape of {name} is {list(x.shape)}; give [{', '.join(axes)}]")
