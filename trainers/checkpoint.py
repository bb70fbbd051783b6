"""Checkpoints: everything that a bit-identical resume needs, written atomically, checked when read.

``checkpoints/step-00000100/`` holds ``state.safetensors`` (dictionary, optimizer moments, counts of
silence) and ``state.json`` (step, hash, and the machine it was made on).
"""

import hashlib
import json
import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import records
from saekit.activations import file_sha256, write_atomic
from saekit.types import SaekitError

SCHEMA = 1
STATE = {"step": int, "sha256": str, "machine": dict}
KEEP = 2  # the newest is the one to resume from; the one before it, should the newest be damaged


def machine() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _cpu(), "system": platform.platform(terse=True),
    }  # fmt: skip


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )


def save(folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write the checkpoint of a step, then drop the oldest beyond :data:`KEEP`."""
    from safetensors.torch import save as to_bytes

    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    data = to_bytes({key: value.detach().contiguous().cpu() for key, value in tensors.items()})
    write_atomic(temporary / "state.safetensors", data)
    state = {
        "schema": SCHEMA,
        "step": step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "machine": machine(),
        **about,
    }
    write_atomic(temporary / "state.json", json.dumps(state, indent=1).encode())
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    taken = sorted(folder.glob("step-*"))
    later = [path for path in taken if path.name > target.name]  # damaged ones that a resume passed over
    for old in (*later, *[path for path in taken if path not in later][:-KEEP]):
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest intact checkpoint (up to ``step``) as ``(tensors, state)``; a damaged one is named and passed over."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("step-*"), reverse=True):
        if step is not None and path.name > f"step-{step:08d}":
            continue
        try:
            state = records.read(path / "state.json", "a checkpoint's state", STATE, "delete it", SCHEMA)
            intact = file_sha256(path / "state.safetensors") == state["sha256"]
        except (OSError, SaekitError):
            intact = False
        if not intact:
            warnings.warn(f"checkpoint {path} is damaged; going on from the one before it", stacklevel=2)
            continue
        if state["machine"] != machine():
            changed = [key for key, value in machine().items() if state["machine"].get(key) != value]
            warnings.warn(
                f"checkpoint {path} was made with another {' and '.join(changed)}: the resumed run may differ in its last bits",
                stacklevel=2,
            )
        return load_file(path / "state.safetensors"), state
    return None
