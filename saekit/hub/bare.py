"""State dicts without a format: what they mean is known from where they come, and their keys and shapes say that.

======================  =============================================================================================
Goodfire                ``encoder_linear`` and ``decoder_linear``, each weight [out, in] and bias: ReLU, no pre-bias
DeepSeek-R1 (qresearch) ``encoder`` and ``decoder``, likewise
Qwen Scope              ``W_enc`` [F, d], ``W_dec`` **[d, F]**, ``b_enc``, ``b_dec``: TopK, no pre-bias; k stands in the
                        repository's name (``...-L0_50``), the layer in the file's (``layer7.sae.pt``)
hook_z (Connor, Rob)    ``W_enc`` [d, F], ``W_dec`` [F, d], biases, and ``NAME_cfg.json`` beside ``NAME.pt``: ReLU of the
                        outputs of all heads side by side, with ``b_dec`` taken off first
======================  =============================================================================================
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saekit import records
from saekit.dictionaries import Dictionary
from saekit.hub import dictionary_learning
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.record import Record, about, to_dictionary
from saekit.hub.single import pickled
from saekit.types import SaekitError


@dataclass(frozen=True)
class Layout:
    """Keys of the encoder, its bias, the decoder and its bias; ``turned``: which matrices lie features last."""

    keys: tuple[str, str, str, str]
    turned: tuple[bool, bool]
    place: str  # of the layer's number, in the file's name
    pre_bias: bool = False
    ranked: bool = False


def _dense(encoder: str, decoder: str) -> tuple[str, str, str, str]:
    return f"{encoder}.weight", f"{encoder}.bias", f"{decoder}.weight", f"{decoder}.bias"


PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
LAYOUTS = {
    "goodfire": Layout(_dense("encoder_linear", "decoder_linear"), (False, True), r"-l(\d+)\."),
    "deepseek": Layout(_dense("encoder", "decoder"), (False, True), r"-l(\d+)\."),
    "qwen_scope": Layout(PLAIN, (False, True), r"layer(\d+)\.", ranked=True),
    "hook_z": Layout(PLAIN, (True, False), r"_L(\d+)", pre_bias=True),
}
FIELDS = {"act_name": str, "act_size?": int, "dict_size?": int}


def _config(files: Files, name: str) -> tuple[Files, str]:
    """Where the config of a file would lie: beside it, even if the file alone was given."""
    return Files(files.root), name.rpartition(".")[0] + "_cfg.json"


def _layout(files: Files) -> tuple[str, str] | None:
    """The only file with tensors, and which layout it has."""
    found = pickled(files)
    if found is None or dictionary_learning.detect(files):  # one of its classes has the keys of a layout
        return None
    name, heads = found
    for kind, layout in LAYOUTS.items():
        if set(heads) != set(layout.keys):
            continue
        shapes = [tuple(heads[key].shape) for key in layout.keys]
        enc, dec = (
            s[::-1] if turn else s for s, turn in zip((shapes[0], shapes[2]), layout.turned, strict=True)
        )
        fits = enc[:1] == shapes[1] == dec[:1] and enc[1:] == shapes[3] == dec[1:] and len(shapes[1]) == 1
        beside, config = _config(files, name)
        if fits and (kind == "hook_z") == beside.has(config):
            return name, kind
    return None


def detect(files: Files) -> bool:
    """One file with just the tensors of a layout, in its shapes."""
    return _layout(files) is not None


def load(files: Files, *, hook_point: str | None = None, k: int | None = None) -> Dictionary:
    """The autoencoder of a file; ``k`` is for Qwen Scope's outside of a repository of its name."""
    found = _layout(files)
    if found is None:
        raise SaekitError(
            f"{str(files)!r} holds no single file with the tensors of {', '.join(LAYOUTS)}; give the file of one dictionary"
        )
    name, kind = found
    layout, state = LAYOUTS[kind], files.tensors(name)
    metadata: Mapping[str, Any] = {}
    if kind == "hook_z":
        beside, config = _config(files, name)
        metadata = beside.json(config)
        records.check(metadata, FIELDS, f"file {str(files.root / config)!r}", "take an intact folder")
        hook_point = hook_point or metadata["act_name"]
    layer = re.search(layout.place, name.rpartition("/")[2])
    at = hook_point or (f"blocks.{layer[1]}.hook_resid_post" if layer else None)
    encoder, b_enc, decoder, b_dec = (state[key] for key in layout.keys)
    encoder, atoms = (m.T if turn else m for m, turn in zip((encoder, decoder), layout.turned, strict=True))
    dtype = str(encoder.dtype).removeprefix("torch.")
    return to_dictionary(
        Record(
            encoder=encoder, atoms=atoms, b_enc=b_enc, b_dec=b_dec, pre_bias=b_dec if layout.pre_bias else None,
            reads=(at,) if at else (), writes=(at,) if at else (),
            card=about(kind, dtype, metadata=metadata, missing=() if at else ("the hook point",)),
            **(_topk(files, k, name) if layout.ranked else {}),
        )
    )  # fmt: skip


def _topk(files: Files, k: int | None, name: str) -> dict[str, Any]:
    said = re.findall(r"-L0_(\d+)(?=/|$)", files.root.resolve().as_posix())
    if k is None and not said:
        raise SaekitError(
            f"k of file {str(files.root / name)!r} stands neither in it nor in its path (as in ...-L0_50); give k=..."
        )
    return {"selection": "topk", "options": {"k": k if k is not None else int(said[-1])}}


FORMAT = Format("one .pt of Goodfire, DeepSeek-R1, Qwen Scope, or hook_z", detect, load)
