"""saekit's own format: a folder with ``dictionary.safetensors`` and ``card.json``. Schema version 1.

The tensors are the dictionary's state: ``encoder [n_features, d_in]`` (absent when tied),
``atoms.weight [n_features, d_out]`` (or what else the atoms are made of), ``b_enc [n_features]``,
``b_dec [d_out]``, ``prepared``, the normalisation ``norm_in.mean [d_in]``, ``norm_in.scale``,
``norm_in.fitted`` and the same for ``norm_out``, and the state of the selection (``selection.threshold``)
and of the terms (``terms.l0.coefficient.value``), where they have any. The card holds
``schema``, ``config`` (the four choices), ``reads`` and ``writes`` (hook points), ``sha256`` of the
tensors' file, and what is known of data, training and metrics.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import records
from saekit.activations import ABOUT, file_sha256, write_atomic
from saekit.dictionaries import Config, Dictionary, build
from saekit.registry import nearest
from saekit.tokens import GIVEN
from saekit.types import SaekitError

SCHEMA = 1
WEIGHTS, CARD = "dictionary.safetensors", "card.json"
FIELDS = {
    "config": dict,
    "reads": [str],
    "writes": [str],
    "sha256": str,
    "torch?": str,
    "data?": {
        "rows?" if key == "rows" else key: shape for key, shape in ABOUT.items()
    },  # others name no rows
    "training?": dict,
}


def save(dictionary: Dictionary, path: "str | Path") -> Path:
    """Write a dictionary to a folder: each file whole or not at all; the card, with the tensors' hash, comes last."""
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if dictionary.dtype != torch.float32:
        raise SaekitError(f"the dictionary is of {str(dictionary.dtype).removeprefix('torch.')}, and what is saved is float32; save dictionary.float()")  # fmt: skip
    try:
        data = to_bytes(
            {key: value.detach().contiguous().cpu() for key, value in dictionary.state_dict().items()}
        )
        card = {
            "schema": SCHEMA, "config": dictionary.config.to_json(), "reads": list(dictionary.reads),
            "writes": list(dictionary.writes), "sha256": hashlib.sha256(data).hexdigest(), "torch": torch.__version__,
            **dictionary.card,
        }  # fmt: skip
        text = json.dumps(card, indent=1).encode()
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / WEIGHTS, data)
        write_atomic(path / CARD, text)
    except (TypeError, ValueError) as error:
        raise SaekitError(f"the dictionary's card holds what no JSON can ({error}); give it numbers, strings, lists and dicts") from None  # fmt: skip
    except OSError as error:
        raise SaekitError(
            f"out {str(path)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    return path


def read_card(path: Path) -> dict[str, Any]:
    """The card of a dictionary, checked for schema and the fields that loading needs."""
    file = path / CARD
    if not file.is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{CARD}"))
        if inside:
            raise SaekitError(
                f"{str(path)!r} is a folder of dictionaries; give one of them: {', '.join(inside)}"
            )
        raise SaekitError(
            f"dictionary {str(path)!r} has no {CARD}; give a folder that saekit saved, or a finished run"
        )
    return records.read(file, "a dictionary's card", FIELDS, "save the dictionary again", SCHEMA)


def origin(card: Mapping[str, Any]) -> tuple[str, str | None]:
    """Names of the model and text that a card's dictionary was trained on; None for a text given in Python."""
    data = card.get("data", {})
    text = data.get("text", {}).get("name", "stdlib")
    return data.get("model", {}).get("name", "code-lm"), None if text == GIVEN else text


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or one sentence about why it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.is_file():
        raise SaekitError(f"file {str(file)!r} is not there; save the dictionary again")
    try:
        return load(file.read_bytes())
    except (SafetensorError, ValueError) as error:
        raise SaekitError(
            f"file {str(file)!r} is not an intact safetensors file ({error}); save it again"
        ) from None


def load(path: "str | Path", device: "str | torch.device | None" = None) -> Dictionary:
    """Read a dictionary back, bit for bit; a missing, unknown or misshapen tensor raises by name."""
    path = Path(path)
    if not path.is_dir():
        raise SaekitError(
            f"dictionary {str(path)!r} is not a folder; give one that saekit saved, or a finished run"
        )
    card = read_card(path)
    tensors = read_tensors(path / WEIGHTS)
    try:
        dictionary = build(Config.from_json(card["config"]))
    except SaekitError as error:
        raise SaekitError(f"card {str(path / CARD)!r}: {error}") from None
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())  # a value of the wrong type, found deep inside
        raise SaekitError(
            f"config in {str(path / CARD)!r} means no dictionary ({why}); save the dictionary again"
        ) from error
    expected = dictionary.state_dict()
    for name in sorted(set(expected) - set(tensors)):
        raise SaekitError(f"dictionary {str(path)!r} lacks the tensor {name!r}; save it again")
    for name in sorted(set(tensors) - set(expected)):
        raise SaekitError(
            f"dictionary {str(path)!r} holds an unknown tensor {name!r}{nearest(name, list(expected))}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise SaekitError(
                f"tensor {name!r} of {str(path)!r} is {tensor.dtype} {tuple(tensor.shape)} and the card's config means "
                f"{expected[name].dtype} {tuple(expected[name].shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SaekitError(f"tensor {name!r} of {str(path)!r} holds NaN or Inf; train or convert it again")
    if file_sha256(path / WEIGHTS) != card["sha256"]:
        raise SaekitError(
            f"file {str(path / WEIGHTS)!r} doesn't match the hash in {CARD}: it was changed after saving, or saving was cut short; save it again"
        )
    dictionary.load_state_dict(tensors)
    dictionary.reads, dictionary.writes = tuple(card["reads"]), tuple(card["writes"])
    fixed = {"schema", "config", "reads", "writes", "sha256", "torch"}
    dictionary.card = {key: value for key, value in card.items() if key not in fixed}
    return dictionary.to(device) if device else dictionary
