"""Bad arguments, answered before any work by one sentence that names the argument, its value and the fix."""


def matrix(name, tensor, width=None, rows=None):
    """Raise unless the tensor is [rows, width]."""
    wanted = f"[{'rows' if rows is None else rows}, {'width' if width is None else width}]"
    if (
        tensor.ndim != 2
        or (width is not None and tensor.shape[1] != width)
        or (rows is not None and tensor.shape[0] != rows)
    ):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}")


def vector(name, tensor, length):
    """Raise unless the tensor is [length]."""
    if tuple(tensor.shape) != (length,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [{length}]")


def alike(**tensors):
    """Raise unless all tensors have the dtype and device of the first, a floating-point one."""
    (first, one), *rest = tensors.items()
    if not one.is_floating_point():
        raise ValueError(f"{first} has dtype {one.dtype}; expected a floating-point dtype")
    for name, other in rest:
        if other.dtype != one.dtype:
            raise ValueError(f"{name} has dtype {other.dtype} and {first} {one.dtype}; convert one of them")
        if other.device != one.device:
            raise ValueError(f"{name} is on {other.device} and {first} on {one.device}; move one of them")


def count(name, value, most, of):
    """Raise unless ``value`` lies in 1..most."""
    if not 1 <= value <= most:
        raise ValueError(f"{name} = {value} is outside 1..{of} = {most}")


def entries(offsets, indices, values, n_features):
    """Raise unless these are compressed sparse rows over so many features."""
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype.is_floating_point:
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)} and dtype {offsets.dtype}; expected int64 [rows + 1]"
        )
    if indices.ndim != 1 or values.shape != indices.shape or indices.dtype.is_floating_point:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)} and values {tuple(values.shape)}; expected both [nnz], indices integers"
        )
    if indices.device.type == "cpu" and len(indices):  # on a GPU the look would wait for everything before
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= n_features:
            raise ValueError(
                f"indices reach from {low} to {high}; expected 0..n_features - 1 = {n_features - 1}"
            )
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(indices) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets must rise from 0 to nnz = {len(indices)}; got {int(offsets[0])}..{int(offsets[-1])}"
            )
