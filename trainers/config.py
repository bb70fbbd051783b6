"""What decides a training run: its settings, why they are so, and the file that they are written to."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from saekit import records
from saekit.activations import ABOUT
from saekit.dictionaries import Dictionary
from saekit.harvest import HarvestConfig
from saekit.records import check_types, shape_of
from saekit.registry import nearest
from saekit.trainers import dead, optim
from saekit.trainers.init import check_init
from saekit.types import SaekitError


@dataclass(frozen=True)
class TrainConfig:
    """A training run. What is None is chosen from the rest, and the reason written to the run's config.

    ``steps`` of ``batch_size`` rows; ``lr`` peak rate of Adam, with ``warmup`` steps up and the
    last ``decay`` share of the run down to zero; ``clip`` limits the gradient's norm;
    ``dead_after`` rows without firing make a feature dead; ``optimizer`` is "adam" or "sparse_adam", with ``betas``;
    ``init`` names where atoms begin (a row of ``saekit.trainers.init.INITS``, or the folder of a
    dictionary to go on from; None: random directions); dead features are resampled ``resample_every`` so many steps; ``seed`` fixes the
    order of the data and everything random in the loss.
    """

    steps: int = 1000
    batch_size: int = 4096
    lr: float | None = None
    warmup: int | None = None
    decay: float = 0.3
    clip: float | None = None
    dead_after: int | None = None
    optimizer: str = "adam"
    betas: tuple[float, ...] = optim.BETAS
    init: str | None = None
    resample_every: int | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    wandb: str | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "dead_after", "resample_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaekitError(f"{name} = {value!r} must be a whole number of at least 1")
        for name in ("seed", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**31:
                raise SaekitError(f"{name} = {value!r} must be a whole number in 0..2^31 - 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SaekitError(f"{name} = {value!r} must be a number above 0")
        optim.is_masked(self.optimizer)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SaekitError(f"betas = {self.betas!r} must be two numbers in 0..1, without 1")
        if self.init is not None:
            check_init(self.init)
        if not 0 <= self.decay <= 1:
            raise SaekitError(f"decay = {self.decay!r} must lie in 0..1; it is a share of the run")


def resolve(
    config: TrainConfig, n_features: int, rows_per_item: int = 1
) -> tuple[TrainConfig, dict[str, str]]:
    """The config with every open value chosen, and the reasons; ``batch_size`` counts items of so many rows."""
    lr = optim.learning_rate(n_features, config.steps)
    warmup = optim.warmup_steps(config.steps)
    silent = dead.dead_after(config.steps, config.batch_size * rows_per_item)
    values = asdict(config)
    reasons = {}
    for key, chosen in (("lr", lr), ("warmup", warmup), ("dead_after", silent)):
        if values[key] is None:
            values[key] = chosen.value if key == "lr" else int(chosen.value)
            reasons[key] = chosen.reason
    if values["checkpoint_every"] is None:
        values["checkpoint_every"] = max(1, config.steps // 10)
        reasons["checkpoint_every"] = "ten times in the run"
    return TrainConfig(**values), reasons


RUN = {
    "train": shape_of(TrainConfig), "reasons?": {"*": str}, "dictionary": dict, "init_seed": int, "init?": str, "hook_points": [str], "data?": ABOUT,
    "source": {"acts?": str, "stores?": {"*": str}, "model?": str, "text?": str, **shape_of(HarvestConfig)},
}  # fmt: skip


def weights_digest(dictionary: Dictionary) -> str:
    """A digest of some of the weights: tells a fresh dictionary from one that was trained before."""
    digest = hashlib.sha256()
    for name, weight in dictionary.named_parameters():
        flat = weight.detach().reshape(-1)
        digest.update(name.encode() + flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_config(file: Path) -> dict[str, Any]:
    """The config.json of a run; an unknown, missing or misshapen field raises by name."""
    data = records.read(file, "a run's config", RUN, "give the config.json of a run")
    known = [key.removesuffix("?") for key in RUN]
    for where, keys, names in (
        ("", data, known),
        ("train.", data["train"], [f.name for f in fields(TrainConfig)]),
    ):
        for key in sorted(set(keys) - set(names)):
            raise SaekitError(f"key {where + key!r} of {str(file)!r} is unknown{nearest(key, names)}")
    return data
