"""overcomplete's autoencoders: a state dict in one ``.pt``, which says less than its class did.

``dictionary._weights`` [F, d] are brought to rows of norm 1 whenever the model is put to use (``normalization`` "l2", its
default; "identity" reads them as they are) and multiplied by ``exp(dictionary.multiplier)``; archetypal atoms are
``relu(W) C + Relax``, rows of W over their sum, times the same; rows of Relax longer than ``delta`` are shortened to it
whenever the model is put to use, and are read as they are where ``delta`` isn't given. The encoder is linear
(``encoder.final_block.0``), with a batch norm folded where there is one (``final_block.1``), or reads by the atoms
(``encoder.tied_to``), or by weights of its own (``encoder.weight``); without an encoder it is a matching pursuit. There
is no bias of the output and no pre-bias. ``thresholds`` are logarithms, and a code passes that *equals* its own.
k, and the running threshold of a BatchTopKSAE, are not in the state.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, to_dictionary
from saekit.hub.single import pickled
from saekit.registry import nearest
from saekit.types import SaekitError

NORMALIZATIONS = ("l2", "identity")
DENSE, NORM = "encoder.final_block.0", "encoder.final_block.1"
EPS = 1e-5  # of torch's batch norm


def _file(files: Files) -> str | None:
    """The only file of torch, if it has the weights of a dictionary layer."""
    found = pickled(files)
    return found[0] if found and {"dictionary._weights", "dictionary.C"} & set(found[1]) else None


def detect(files: Files) -> bool:
    """One file of ``torch.save`` with the weights of a dictionary layer."""
    return _file(files) is not None


def load(
    files: Files, *, hook_point: str | None = None, k: int | None = None, threshold: float | None = None,
    normalization: str = "l2", delta: float | None = None,
) -> Dictionary:  # fmt: skip
    """The autoencoder of a file.

    ``k`` for a TopKSAE (or the steps of an MpSAE), ``threshold`` for a BatchTopKSAE (its ``running_threshold``); with
    neither, and no thresholds in the file, it is a ReLU. ``normalization`` and ``delta``: as its class was made with.
    """
    name = _file(files)
    if name is None:
        raise SaekitError(
            f"{str(files)!r} holds no single .pt with 'dictionary._weights' or 'dictionary.C'; give one of overcomplete's"
        )
    if normalization not in NORMALIZATIONS:
        raise SaekitError(
            f"normalization {normalization!r} is unknown{nearest(normalization, list(NORMALIZATIONS))}"
        )
    state = files.tensors(name)
    where = str(files.root / name)
    atoms = _atoms(state, normalization, delta, where)
    encoder, b_enc = _encoder(state, atoms, where)
    at = (hook_point,) if hook_point else ()
    missing = (*(() if at else ("the hook point",)), "the class")
    return to_dictionary(
        Record(
            encoder=encoder, atoms=atoms, b_enc=b_enc, b_dec=torch.zeros(atoms.shape[1]), reads=at, writes=at,
            card=about("overcomplete", str(atoms.dtype).removeprefix("torch."), missing=missing),
            **_rule(state, k, threshold, where),
        )
    )  # fmt: skip


def _atoms(state: Mapping[str, Tensor], normalization: str, delta: float | None, where: str) -> Tensor:
    """The dictionary as the model uses it, in fp32."""
    factor = state["dictionary.multiplier"].float().exp() if "dictionary.multiplier" in state else 1.0
    if "dictionary._weights" in state:
        rows = state["dictionary._weights"].float()
        if normalization == "l2":
            rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-8)
        return rows * factor
    for name in ("W", "Relax"):
        if f"dictionary.{name}" not in state:
            raise SaekitError(f"file {where!r} lacks the tensor 'dictionary.{name}'; take an intact file")
    mixture = state["dictionary.W"].float().relu()
    mixture = mixture / (mixture.sum(1, keepdim=True) + 1e-8)
    relax = state["dictionary.Relax"].float()
    if delta is not None:
        norms = torch.linalg.vector_norm(relax, dim=1, keepdim=True)
        relax = relax * (delta / norms.clamp(min=1e-12)).clamp(max=1)
    return (mixture @ state["dictionary.C"].float() + relax) * factor


def _encoder(state: Mapping[str, Tensor], atoms: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Encoder [F, d] and its bias."""
    parts = {name for name in state if name.startswith("encoder.")}
    tied = {name for name in parts if name.startswith("encoder.tied_to.")}
    norm = {name for name in parts if name.startswith(f"{NORM}.")}
    zero = torch.zeros(len(atoms))
    if not parts - tied - {"encoder.bias"}:  # tied, or a pursuit's
        return atoms, state.get("encoder.bias", zero)
    if parts <= {"encoder.weight", "encoder.bias"}:
        return state["encoder.weight"], state.get("encoder.bias", zero)
    dense = {f"{DENSE}.weight", f"{DENSE}.bias"}
    if parts - norm != dense or (norm and f"{NORM}.running_mean" not in norm):
        other = sorted(parts - norm - dense or norm)[0]
        raise SaekitError(
            f"file {where!r} has the tensor {other!r} of an encoder that is not linear, and dictionaries here are; take another"
        )
    weight, bias = (state[f"{DENSE}.{part}"].double() for part in ("weight", "bias"))
    if not norm:
        return weight, bias
    scale, shift, mean, variance = (
        state[f"{NORM}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / (variance + EPS).sqrt()
    return weight * scale[:, None], (bias - mean) * scale + shift


def _rule(state: Mapping[str, Tensor], k: int | None, threshold: float | None, where: str) -> dict[str, Any]:
    """The selection, from what is in the state and what is given."""
    encodes = any(name.startswith("encoder.") for name in state)
    if (k is not None) + (threshold is not None) + ("thresholds" in state) > 1:
        have = " and ".join([*(["k"] if k is not None else []), *(["threshold"] if threshold is not None else []), *(["the file's thresholds"] if "thresholds" in state else [])])  # fmt: skip
        raise SaekitError(f"{have} are two rules for {where!r}; give one, or none")
    if not encodes:
        if k is None:
            raise SaekitError(
                f"file {where!r} has no encoder, as a matching pursuit hasn't, and its number of steps is not in it; give k=..."
            )
        return {"selection": "pursuit", "options": {"k": k}, "tied": True}
    if k is not None:
        return {"selection": "topk", "options": {"k": k}, "relu": "before"}
    if threshold is None and "thresholds" not in state:
        return {"selection": "relu"}
    bound = state["thresholds"].float().exp() if threshold is None else torch.tensor(threshold)
    n = len(next(v for name, v in state.items() if name in ("dictionary._weights", "dictionary.W")))
    # a code that equals its threshold passes there, so it has to be above the next smaller number
    below = torch.nextafter(bound.float(), torch.tensor(-torch.inf)).expand(n).clone()
    return {"selection": "jumprelu", "threshold": below, "relu": "before"}


FORMAT = Format("a .pt with dictionary._weights (overcomplete)", detect, load)
