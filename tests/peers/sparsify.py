"""sparsify 1.3 (PyPI: eai-sparsify): its sparse coders, written and read by its own code. See golden.py for how to run it."""

import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))  # last, so that the package of this file's name is found first

from golden import DTYPES, D, F, Forward, K, drive, fill
from sparsify import SparseCoder, SparseCoderConfig


def forward(coder: SparseCoder) -> Forward:
    """Its codes, dense, and its output."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top, indices, _ = coder.encode(x)
        codes = x.new_zeros(len(x), coder.num_latents).scatter(1, indices, top)
        return codes, coder(x).sae_out

    return run


def reopen(folder: Path) -> Forward:
    """What the peer's own reader makes of a folder, in fp32; the only sparse coder in it, if it is one of hook points."""
    here = folder if (folder / "cfg.json").exists() else next(folder.glob("*/cfg.json")).parent
    return forward(SparseCoder.load_from_disk(here).float())


def write(activation: str, skip: bool, transcode: bool, latents: int, dtype: str, folder: Path) -> Forward:
    """The folder of one hook point, as a training run leaves it."""
    config = SparseCoderConfig(
        activation, expansion_factor=F // D, num_latents=latents, k=K, skip_connection=skip, transcode=transcode
    )  # fmt: skip
    coder = SparseCoder(D, config)
    fill(coder, 2 * skip + transcode, DTYPES[dtype])
    with torch.no_grad():
        coder.W_dec.copy_(nn.functional.normalize(coder.W_dec, dim=1))
    here = folder / ("layers.3.mlp" if transcode else "layers.3")
    coder.to(DTYPES[dtype]).save_to_disk(here)
    return reopen(folder)


CASES = {
    f"{activation}{'-skip' * skip}{'-transcode' * transcode}-{dtype}": partial(
        write, activation, skip, transcode, F if skip else 0, dtype
    )
    for activation, skip, transcode in product(("topk", "groupmax"), (False, True), (False, True))
    for dtype in (DTYPES if activation == "topk" and not skip and not transcode else ("float32",))
}

if __name__ == "__main__":
    drive(CASES, reopen)
