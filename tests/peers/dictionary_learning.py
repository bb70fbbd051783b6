"""dictionary_learning 0.1: all its classes, written and read by its own code. See golden.py for how to run it."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # last, so that the package of this file's name is found first

from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    Dictionary,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from golden import DTYPES, D, F, Forward, K, drive, fill, stored

GROUPS = [6, 6, 12]
CLASSES: dict[str, Callable[[], Dictionary]] = {
    "AutoEncoder": partial(AutoEncoder, D, F),
    "AutoEncoderNew": partial(AutoEncoderNew, D, F),
    "GatedAutoEncoder": partial(GatedAutoEncoder, D, F),
    "JumpReluAutoEncoder": partial(JumpReluAutoEncoder, D, F),
    "AutoEncoderTopK": partial(AutoEncoderTopK, D, F, K),
    "BatchTopKSAE": partial(BatchTopKSAE, D, F, K),
    "MatryoshkaBatchTopKSAE": partial(MatryoshkaBatchTopKSAE, D, F, K, GROUPS),
}


def forward(module: Dictionary) -> Forward:
    """Its codes, as it makes them at inference, and what it decodes of them."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = module.encode(x)
        return codes, module.decode(codes)

    return run


def reopen(folder: Path) -> Forward:
    """What the peer's own reader makes of a folder, in fp32."""
    return forward(load_dictionary(str(folder), "cpu")[0].float())


def write(name: str, dtype: str, seed: int, folder: Path) -> Forward:
    """A folder as a training run leaves it, and its forward pass after reading it back."""
    module = CLASSES[name]()
    fill(module, seed)
    if name == "JumpReluAutoEncoder":
        module.threshold.data.abs_().add_(0.5)
    if hasattr(module, "k") and name != "AutoEncoderTopK":  # TopK keeps the -1 of an unset threshold
        module.threshold.fill_(0.75)
    torch.save(stored(module.state_dict(), DTYPES[dtype]), folder / "ae.pt")
    trainer = {
        "trainer_class": "Trainer", "dict_class": name, "activation_dim": D, "dict_size": F, "seed": seed,
        "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3",
    }  # fmt: skip
    if hasattr(module, "k"):
        trainer["k"] = K
    config = {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return reopen(folder)


CASES = {
    f"{name}-{dtype}": partial(write, name, dtype, seed)
    for seed, name in enumerate(CLASSES)
    for dtype in (DTYPES if name == "AutoEncoderTopK" else ("float32",))
}

if __name__ == "__main__":
    drive(CASES, reopen)
