"""OpenAI's autoencoders (Gao et al. 2024): one ``.pt`` with tensors, the name of the activation and its state.

``encoder.weight`` [F, d], ``decoder.weight`` [d, F], ``latent_bias`` [F] and ``pre_bias`` [d], which is taken off the
input and added to the output. ``activation`` "TopK" (with ``activation_state_dict``: ``k`` and ``postact_fn``) also
means that each row is standardised first, ``(x - mean) / (std + 1e-5)`` with the unbiased deviation, and the output
brought back by the same two; "ReLU", or none in older files, means that rows are read as they are. The statistics of
training (``stats_last_nonzero``, ``latents_activation_frequency``, ``latents_mean_square``) are not needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary
from saekit.hub.single import pickled
from saekit.hub.written import as_torch, stored, write
from saekit.types import SaekitError

NAME = "autoencoder.pt"
KEYS = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")


def _file(files: Files) -> str | None:
    """The only file of torch, if it has the tensors of the format."""
    found = pickled(files)
    return found[0] if found and set(KEYS) <= set(found[1]) else None


def detect(files: Files) -> bool:
    """One file of ``torch.save`` with a ``pre_bias`` and a ``latent_bias``."""
    return _file(files) is not None


def load(files: Files, *, hook_point: str | None = None) -> Dictionary:
    """The autoencoder of a file, which doesn't say what it reads: ``hook_point`` does."""
    name = _file(files)
    if name is None:
        raise SaekitError(
            f"{str(files)!r} holds no single .pt with the tensors {', '.join(KEYS)}; give one of OpenAI's"
        )
    state, weights = files.state(name), files.tensors(name)
    where = str(files.root / name)
    activation, after = state.get("activation", "ReLU"), state.get("activation_state_dict.postact_fn", "ReLU")
    parts: dict[str, Any] = {"selection": "relu"}
    if activation == "TopK" and after in ("ReLU", "Identity"):
        k = state.get("activation_state_dict.k")
        if not isinstance(k, int):
            raise SaekitError(f"k = {k!r} of file {where!r} must be a whole number; take an intact file")
        relu = "after" if after == "ReLU" else "none"
        parts = {"selection": "topk", "options": {"k": k}, "per_row": "row_std", "relu": relu}
    elif activation != "ReLU":
        raise SaekitError(
            f"activation {activation!r} (then {after!r}) of file {where!r} is unknown; 'TopK' with 'ReLU' or 'Identity', and 'ReLU', are read"
        )
    at = (hook_point,) if hook_point else ()
    encoder, pre_bias = weights["encoder.weight"], weights["pre_bias"]
    card = about(
        "openai", str(encoder.dtype).removeprefix("torch."), missing=() if at else ("the hook point",)
    )
    return to_dictionary(
        Record(
            encoder=encoder, atoms=weights["decoder.weight"].T, b_enc=weights["latent_bias"], b_dec=pre_bias,
            pre_bias=pre_bias, reads=at, writes=at, card=card, **parts,
        )
    )  # fmt: skip


def save(dictionary: Dictionary, folder: "str | Path", *, dtype: str = "float32") -> Path:
    """Write an autoencoder: TopK, if its rows are standardised (``normalise = "row_std"``), or ReLU, if they aren't."""
    record = from_dictionary(dictionary, "openai")
    refuse_unless(
        record, "openai", selections=("topk", "relu"), wirings=("autoencoder",), per_row=("none", "row_std"),
        skip=False, linear=True,
    )  # fmt: skip
    ranked = record.selection == "topk"
    if ranked != (record.per_row == "row_std"):
        raise SaekitError(
            f"format 'openai' standardises rows for TopK and only for it, and this one has selection {record.selection!r} with normalise = {record.per_row!r}; choose another format"
        )
    encoder, b_dec = record.encoder.double(), record.b_dec.double()
    tensors: dict[str, Tensor] = {
        "pre_bias": b_dec, "encoder.weight": encoder, "latent_bias": record.b_enc.double() + encoder @ b_dec,
        "decoder.weight": record.atoms.T,
    }  # fmt: skip
    n = record.n_features
    state: dict[str, Any] = {
        **stored(tensors, dtype), "stats_last_nonzero": torch.zeros(n, dtype=torch.long),
        "latents_activation_frequency": torch.ones(n), "latents_mean_square": torch.zeros(n),
        "activation": "TopK" if ranked else "ReLU", "activation_state_dict": {},
    }  # fmt: skip
    if ranked:
        after = "Identity" if record.relu == "none" else "ReLU"
        state["activation_state_dict"] = {"k": record.options["k"], "postact_fn": after}
    return write(folder, {NAME: as_torch(state)})


FORMAT = Format(NAME, detect, load, save)
