"""Which implementation runs: one table, one rule, and a reason that can be asked for."""

import functools
import importlib
import subprocess
import warnings

import torch

PLACE = "saekit.kernels.{operation}.{backend}"


@functools.cache
def _missing(package):
    """Why a package can't be used here, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken install raises anything
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def explain(device, dtype):
    """``(backend, reason)`` for tensors of a device type and dtype."""
    if device == "cpu" and dtype == torch.float32:
        why = _missing("numba")
        return (
            ("cpu", "numba, tiles and threads of our own") if why is None else ("eager", f"no numba ({why})")
        )
    if device == "cuda" and dtype in (torch.float32, torch.bfloat16):
        why = _missing("triton")
        if why is None:
            return "triton", "Triton"
        warnings.warn(
            f"kernels run in plain torch on this GPU, exact but slower: no Triton ({why})", stacklevel=2
        )
        return "eager", f"no Triton ({why})"
    return "eager", f"plain torch: no kernel is written for {dtype} on {device}"


@functools.cache
def matrix_unit():
    """Whether the CPU multiplies bf16 matrices in hardware (AMX), so that a bf16 shortlist pays."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


# operations written in it; the others run in plain torch there
TRITON = ("adam", "encode", "error", "product")
_broken: dict[str, str] = {}  # operation -> why its Triton kernels don't run on this machine


def implementation(operation, tensor):
    """The module that computes an operation for such a tensor."""
    backend, _ = explain(tensor.device.type, tensor.dtype)
    if backend == "triton" and (operation not in TRITON or operation in _broken):
        backend = "eager"
    return importlib.import_module(PLACE.format(operation=operation, backend=backend))


def _cannot_compile(error):
    """Whether Triton itself gave up: its own errors, and those of the compilers that it calls."""
    if isinstance(error, ImportError | subprocess.CalledProcessError | FileNotFoundError):
        return True
    return type(error).__module__.split(".")[0] == "triton" or "C compiler" in str(error)


def run(operation, function, tensor, *arguments):
    """Call a function of an operation; where Triton fails to compile, in plain torch from then on, saying so once."""
    try:
        return getattr(implementation(operation, tensor), function)(*arguments)
    except Exception as error:
        triton = explain(tensor.device.type, tensor.dtype)[0] == "triton" and operation in TRITON
        if not triton or operation in _broken or not _cannot_compile(error):
            raise
        _broken[operation] = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"{operation} runs in plain torch on this GPU, exact but slower: Triton fails ({_broken[operation]})",
            stacklevel=2,
        )
        return run(operation, function, tensor, *arguments)
