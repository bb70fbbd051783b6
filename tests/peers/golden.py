"""What the scripts of this folder share: the sizes, the inputs, and the two things that each can do.

    PYTHON -P tests/peers/NAME.py write FOLDER    files as the peer writes them, and what it makes of them
    PYTHON -P tests/peers/NAME.py open FOLDER     what the peer makes of files that are there

``PYTHON`` is that of an environment with the peer, torch and safetensors; ``-P`` keeps this folder, whose files are
named as the peers are, out of the way of their packages. A case is a folder ``FOLDER/CASE`` with the format's files
and nothing else; beside it ``CASE.safetensors`` holds the inputs ``x [rows, d_in]``, the peer's ``codes``
[rows, features], dense, and its output ``out`` [rows, d_out]. All forward passes are in fp32.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F, K, ROWS = 8, 24, 4, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


def inputs(d: int = D, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Rows whose mean is three standard deviations off zero in every column, so that a bias in the wrong place shows."""
    g = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (d,), generator=g) * 2.0 - 1
    return 3 * side + torch.randn(rows, d, generator=g)


def fill(module: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Random weights, kept at what ``dtype`` can hold; matrices get rows of about norm 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            size = D**-0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_((size * torch.randn(parameter.shape, generator=g)).to(dtype))


def stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state as it is stored in another dtype; whole numbers stay as they are."""
    return {
        k: (v.to(dtype) if v.is_floating_point() and v.ndim else v).detach().contiguous().clone()
        for k, v in state.items()
    }


@torch.no_grad()
def drive(cases: Mapping[str, Callable[[Path], Forward]], reopen: Callable[[Path], Forward]) -> None:
    """Do what the command line asks for; ``cases`` write into a folder, and give the forward pass."""
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "write":
        for i, (name, make) in enumerate(cases.items()):
            (folder / name).mkdir(parents=True, exist_ok=True)
            x = inputs(seed=i)
            codes, out = make(folder / name)(x)
            save_file(
                {"x": x, "codes": codes.contiguous(), "out": out.contiguous()}, folder / f"{name}.safetensors"
            )
        return
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        beside = folder / f"{case.name}.safetensors"
        x = load_file(beside)["x"]
        codes, out = reopen(case)(x)
        save_file({"x": x, "codes": codes.contiguous(), "out": out.contiguous()}, beside)
