"""A transformer of three layers that says the shortest way through mazes of 4 x 4 cells, learnt in about ten minutes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from saekit.models import Model, load_model
from saekit.testbed.lattice import WORDS, Lattice, random_of
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import SaekitError

LATTICE = Lattice(4, moved=3)
CONFIG = TransformerConfig(
    vocabulary=LATTICE.cells + WORDS, context=LATTICE.length, d_model=64, n_layers=3, n_heads=4, d_head=16, d_mlp=256
)  # fmt: skip
STEPS, ROWS = 7000, 32
RATE, MUON_RATE, DECAY = 3e-3, 6e-3, 0.01
WARM, FLAT = 200, 0.4  # steps to the full rate, and the share of steps at which it begins to fall to 0


def solver(
    seed: int,
    folder: Path | None = None,
    steps: int = STEPS,
    on_step: Callable[[int], None] = lambda _: None,
) -> Model:
    """The model; its weights are read from ``folder`` if they are there, else left there. ``on_step`` gets the number of each step.

    Matrices of the blocks are learnt by Muon, which takes half the steps of AdamW here, and the rest by AdamW. Mazes are
    drawn anew for each step. The same for the same seed and thread count.
    """
    from safetensors.torch import load_file, save_file

    if steps < 1:
        raise SaekitError(f"steps = {steps} learn nothing; give 1 or more")
    model = Transformer(CONFIG, seed)
    recipe = repr((CONFIG, LATTICE, steps, ROWS, RATE, MUON_RATE, DECAY, WARM, FLAT))
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    file = folder / f"solver-{seed}-{digest}.safetensors" if folder else None
    if file and file.is_file():
        model.load_state_dict(load_file(file))
    else:
        _learn(model, seed, steps, on_step)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), part := file.with_suffix(f".{os.getpid()}"))
            part.replace(file)
    return load_model(model.eval(), name="maze solver")


def _learn(model: Transformer, seed: int, steps: int, on_step: Callable[[int], None]) -> None:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers")]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, MUON_RATE, DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]

    def share(step: int) -> float:
        return min(1.0, (step + 1) / WARM, (steps - step) / (steps * (1 - FLAT)))

    rates = [torch.optim.lr_scheduler.LambdaLR(one, share) for one in optimizers]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        on_step(step)
        rng = random_of(generator)
        prompts = LATTICE.prompts([LATTICE.draw(rng) for _ in range(ROWS)], rng)
        allowed = prompts.allowed[prompts.asked].float()
        logits = model(prompts.tokens)[prompts.asked]
        loss = nn.functional.cross_entropy(logits, allowed / allowed.sum(-1, keepdim=True))
        for one in optimizers:
            one.zero_grad()
        loss.backward()
        for one, rate in zip(optimizers, rates, strict=True):
            one.step()
            rate.step()
