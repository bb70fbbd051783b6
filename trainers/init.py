"""Where a dictionary's atoms begin, when not at random directions: one function and one line each, or where another ended."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from saekit.dictionaries import Dictionary, warm_start
from saekit.dictionaries.config import Config
from saekit.dictionaries.kinds import build
from saekit.dictionaries.rows import as_rows
from saekit.hub import load
from saekit.registry import nearest
from saekit.trainers import checkpoint
from saekit.types import SaekitError

VARIANCE = 0.99  # share of the data's variance that the active subspace holds


def check_init(name: str) -> None:
    """Raise unless it is a row of the table, or the folder of a dictionary."""
    if name not in INITS and not Path(name).is_dir():
        raise SaekitError(
            f"init {name!r} is neither a folder with a dictionary nor a way to begin{nearest(name, list(INITS))}"
        )


@torch.no_grad()
def initialise(dictionary: Dictionary, name: str, batch: Any) -> None:
    """Move atoms and encoder of a fresh dictionary to where they shall begin; the normalisation must be set.

    ``batch`` is what ``dictionary.gather`` gives.
    """
    if name not in INITS:
        warm_start(dictionary, unfinished(Path(name)) or load(name))
        return
    weight = getattr(dictionary.atoms, "weight", None)
    if not isinstance(weight, torch.nn.Parameter):
        raise SaekitError(
            f"init = {name!r} needs atoms that are trained one by one, and those of {dictionary.config.atoms[0]!r} aren't; leave it out"
        )
    INITS[name](dictionary, as_rows(dictionary, f"init = {name!r}", alike=False).pairs(batch)[1])
    if dictionary.encoder is not None and dictionary.wiring.same_space:
        dictionary.encoder.copy_(weight)


def unfinished(path: Path) -> Dictionary | None:
    """The dictionary of the newest checkpoint of a run that isn't finished, or of the checkpoint that is named; else None."""
    from saekit.trainers.config import read_config  # which checks what is named here

    named = re.fullmatch(r"step-(\d+)", path.name)
    run, step = (path.parent.parent, int(named[1])) if named else (path, None)
    if (step is None and (run / "dictionary.safetensors").exists()) or not (run / "checkpoints").is_dir():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of last bits on another machine
        found = checkpoint.latest(run / "checkpoints", step)
    if found is None or step not in (None, found[1]["step"]):
        raise SaekitError(
            f"init {str(path)!r} holds no intact checkpoint; name a run, or one of its checkpoints"
        )
    config = read_config(run / "config.json")
    d = build(Config.from_json(config["dictionary"]), config["init_seed"])
    d.load_state_dict(
        {k.removeprefix("dictionary."): v for k, v in found[0].items() if k.startswith("dictionary.")}
    )
    return d


def active_subspace(dictionary: Dictionary, y: Float[Tensor, "batch d_out"]) -> None:
    """Project every atom onto the directions that hold 99 % of the variance (Wang et al. 2025, 2508.16929).

    Where activations fill few of their dimensions, as attention outputs do, most of a random atom's
    length lies where there is no data, and features that are so handicapped die. Rows are brought back
    to norm 1, which the paper's code leaves out.
    """
    weight = dictionary.atoms.weight
    basis = _basis(y)
    weight.copy_(normalize(weight @ basis @ basis.T, dim=-1))


def _basis(y: Tensor) -> Float[Tensor, "d_out kept"]:
    centred = (y - y.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum().clamp(min=1e-300)
    kept = int((share < VARIANCE).sum()) + 1
    return vectors.flip(1)[:, :kept].to(y)


def data(dictionary: Dictionary, y: Float[Tensor, "batch d_out"]) -> None:
    """Begin each atom at the direction of a row of the data, drawn without repetition while there are enough."""
    weight = dictionary.atoms.weight
    generator = torch.Generator().manual_seed(dictionary.seed)
    n, have = len(weight), len(y)
    order = torch.cat([torch.randperm(have, generator=generator) for _ in range(-(-n // have))])[:n]
    weight.copy_(normalize(y[order.to(y.device)], dim=-1))


INITS: dict[str, Callable[[Dictionary, Tensor], None]] = {
    "active_subspace": active_subspace,
    "data": data,
}
