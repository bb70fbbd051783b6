"""Bad arguments, answered before any work by one sentence that names the argument, its value and the fix."""

import math

import torch


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
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)} and dtype {offsets.dtype}; expected int64 [rows + 1]"
        )
    if indices.ndim != 1 or values.shape != indices.shape or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices has shape {tuple(indices.shape)} and dtype {indices.dtype}, values {tuple(values.shape)}; "
            "expected both [nnz], indices int32 or int64"
        )
    for name, tensor in (("offsets", offsets), ("indices", indices)):
        beside(name, tensor, "values", values)
    nnz = len(indices)
    ends = offsets[0], offsets[-1], offsets.diff().amin() if len(offsets) > 1 else offsets[0]
    reach = (indices.amin(), indices.amax()) if nnz else (offsets[0], offsets[0])
    if offsets.is_cuda:  # a look would stall it; these fail there
        torch._assert_async((reach[0] >= 0) & (reach[1] < n_features), "indices are out of range")
        torch._assert_async(
            (ends[0] == 0) & (ends[1] == nnz) & (ends[2] >= 0), "offsets must rise from 0 to nnz"
        )
        return
    start, end, least, low, high = torch.stack([*ends, *reach]).tolist()
    if nnz and (low < 0 or high >= n_features):
        raise ValueError(f"indices reach from {low} to {high}; expected 0..n_features - 1 = {n_features - 1}")
    if start != 0 or end != nnz or least < 0:
        raise ValueError(f"offsets must rise from 0 to nnz = {nnz}; got {start}..{end}")


def beside(name, tensor, other, where):
    """Raise unless the tensor is on the device of another."""
    if tensor.device != where.device:
        raise ValueError(f"{name} is on {tensor.device} and {other} on {where.device}; move one of them")


def finite(result, **inputs):
    """Raise, naming the input, if the result of a computation (or an input itself) holds NaN or Inf.

    Their sum tells, in one quick pass. A GPU would have to be waited for: there NaN goes on into the results.
    """
    if result.device.type != "cpu" or math.isfinite(result.sum().item()):
        return
    for name, tensor in inputs.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            first = bad.flatten(1).any(-1) if tensor.ndim > 1 else bad
            raise ValueError(f"{name} holds NaN or Inf at {int(first.nonzero()[0])}; remove it")
    if not torch.isfinite(result).all():
        raise ValueError(f"{' and '.join(inputs)} are so large that their products overflow; scale them down")
