"""Files of others' formats, made and written: all of them, or a sentence that says why not."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.activations import write_atomic
from saekit.registry import nearest
from saekit.types import SaekitError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as they are stored in a dtype of ``DTYPES``; one that doesn't hold them is refused."""
    if dtype not in DTYPES:
        raise SaekitError(f"dtype {dtype!r} is unknown{nearest(dtype, list(DTYPES))}")
    out = {name: value.detach().to(DTYPES[dtype]).contiguous() for name, value in tensors.items()}
    for name, value in out.items():
        if not torch.isfinite(value).all():
            raise SaekitError(f"dtype {dtype!r} is too narrow for {name}; choose 'float32' or 'bfloat16'")
    return out


def as_torch(state: Mapping[str, Any]) -> bytes:
    """What ``torch.save`` writes; every tensor brings only numbers of its own."""
    buffer = io.BytesIO()
    torch.save({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}, buffer)
    return buffer.getvalue()


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file."""
    from safetensors.torch import save

    return save(dict(tensors), metadata={"format": "pt"})


def as_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return json.dumps(content, indent=1).encode()


def write(folder: "str | Path", files: Mapping[str, bytes]) -> Path:
    """Write files (by names with ``/``) into a folder, each whole or not at all; returns the folder."""
    folder = Path(folder)
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, content)
    except OSError as error:
        raise SaekitError(
            f"out {str(folder)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    return folder
