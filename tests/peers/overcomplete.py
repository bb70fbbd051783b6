"""overcomplete 0.3: the state dicts of its sparse autoencoders. See golden.py for how to run it.

It has no format and no reader of its own, so a case's name says what the file can't.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

# what the package imports first and its autoencoders don't need: vision models (torchvision, timm) and plots (cv2)
for name in ("models", "visualization"):
    part = ModuleType(f"overcomplete.{name}")
    part.__dict__["__getattr__"] = lambda _: None
    sys.modules[part.__name__] = part
sys.path.append(str(Path(__file__).parent))  # last, so that the package of this file's name is found first

from golden import D, F, Forward, K, drive, fill, stored  # noqa: E402
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, MpSAE, RAJumpSAE, RATopKSAE, TopKSAE  # noqa: E402

POINTS = torch.randn(12, D, generator=torch.Generator().manual_seed(7))
CASES_OF: dict[str, Callable[[], SAE]] = {
    "relu": partial(SAE, D, F),
    "topk": partial(TopKSAE, D, F, top_k=K),
    "topk-batchnorm": partial(TopKSAE, D, F, top_k=K, encoder_module="mlp_bn_1"),
    "topk-multiplier": partial(TopKSAE, D, F, top_k=K, dictionary_params={"use_multiplier": True}),
    "topk-tied": lambda: TopKSAE(D, F, top_k=K).tied(bias=True),
    "topk-untied": lambda: TopKSAE(D, F, top_k=K).untied(),
    "jump": partial(JumpSAE, D, F),
    "batchtopk": partial(BatchTopKSAE, D, F, top_k=K),
    "pursuit": partial(MpSAE, D, F, k=K),
    "archetypal-topk": partial(RATopKSAE, D, F, POINTS, top_k=K),
    "archetypal-jump": partial(RAJumpSAE, D, F, POINTS),
}
THRESHOLD = 0.75  # of batchtopk, whose running threshold is not in its state


def reopen(folder: Path) -> Forward:
    """The class that the folder's name says, with the state that lies in it."""
    name = folder.name
    model = CASES_OF[name]()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    if name == "batchtopk":
        model.running_threshold = torch.tensor(THRESHOLD)
    model.eval()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, codes = model.encode(x)
        return codes, model.decode(codes)

    return run


def write(name: str, folder: Path) -> Forward:
    """A state as a training run leaves it: atoms are brought back to norm 1 only when the model is used."""
    model = CASES_OF[name]()
    fill(model, len(name))
    g = torch.Generator().manual_seed(1)
    for key, value in model.named_buffers():
        if "running" in key:  # the statistics of a batch norm
            value.copy_(torch.rand(value.shape, generator=g) + 0.5)
    torch.save(stored(model.state_dict(), torch.float32), folder / "model.pt")
    return reopen(folder)


CASES = {name: partial(write, name) for name in CASES_OF}

if __name__ == "__main__":
    drive(CASES, reopen)
