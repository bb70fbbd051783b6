"""OpenMOSS' format (llamascopium, before that lm-saes): ``config.json`` and ``sae_weights.safetensors`` (or ``.pt``).

Five types of dictionary. With d the width, F features, L layers or H heads (d_model, d_sae, hook points):

* ``sae``, a transcoder where its two hook points differ: ``W_E [d, F]``, ``b_E [F]``, ``W_D [F, d]``, ``b_D [d]``;
* ``clt``: ``W_E [L, d, F]``, ``b_E [L, F]``, for each target t ``W_D.t [t + 1, F, d]`` (from layers 0..t), ``b_D.t [d]``;
* ``crosscoder``: ``W_E [H, d, F]``, ``b_E [H, F]``, ``W_D [H, F, d]``, ``b_D [H, d]``;
* ``lorsa``: ``W_Q``, ``W_K [n_qk, d, d_qk]``, ``b_Q``, ``b_K``, ``W_V``, ``W_O [F, d]``, ``b_V [F]``, ``b_D [d]``;
* ``molt``: ``W_E``, ``b_E``, for each rank r of n maps ``U_matrices.r [n, d, r]`` and ``V_matrices.r [n, r, d]``, ``b_D``.

Beside these ``activation_function.log_jumprelu_threshold`` [F] ([L, F]), and the scalars
``dataset_average_activation_norm.HOOK``. What they mean, as read from llamascopium 2.0.0b34 and run against it:

* under ``norm_activation`` "dataset-wise" an input is multiplied by ``sqrt(d) / norm`` of its hook point, and outputs
  are in units of ``norm / sqrt(d)`` of theirs; "inference": everything is in raw units; "token-wise" scales each row to
  the norm sqrt(d); "batch-wise" takes the mean norm of a batch, so it is read only with ``norms``;
* with ``sparsity_include_decoder_norm`` ranks and thresholds compare pre-activations times the norm of what a feature
  writes. A clt's is the norm over all its targets. A crosscoder's is that of each head by itself, so one feature may be
  on for one head and off for another: saekit's features are shared, and ``heads="each"`` reads H F features instead,
  feature ``h F + i`` writing to head h alone;
* "topk" ranks a row (of a clt: in each layer). "layertopk" ranks all layers of a row together, "batchtopk" and
  "batchlayertopk" a whole batch, also at inference, and no file holds a threshold: they are read with ``threshold``;
* a GLU encoder is no affine map, and is refused.

Folding a dataset's norms into the weights (``fold_activation_scale``) leaves the thresholds of a JumpReLU that
includes the decoder's norm where they were, though the norms change. Then a stored dictionary is not the one that was
trained: features fire at other values. The peer's own codes are given by default, with a warning that says by how
much thresholds are off; ``thresholds="trained"`` undoes it, if the file kept the norms.
"""

from collections.abc import Mapping

import torch

from saekit.dictionaries import Dictionary
from saekit.hub.files import Files
from saekit.hub.formats import Format
from saekit.hub.openmoss_read import READERS
from saekit.hub.openmoss_stored import CONFIG, NORM, OWN, WEIGHTS, Stored, read_config
from saekit.hub.openmoss_write import save
from saekit.registry import nearest
from saekit.types import SaekitError


def detect(files: Files) -> bool:
    """Whether the config names a type of dictionary, and weights are there."""
    if not files.has(CONFIG) or not any(files.has(name) for name in WEIGHTS):
        return False
    try:
        config = files.json(CONFIG)
    except SaekitError:
        return False
    return isinstance(config, dict) and config.get("sae_type") in OWN and "expansion_factor" in config


def load(
    files: Files,
    *,
    norms: Mapping[str, float] | None = None,
    threshold: float | None = None,
    thresholds: str = "stored",
    heads: str = "shared",
) -> Dictionary:
    """The dictionary of a folder, of raw activations.

    ``norms``: mean norms of activations by hook point, for a batch-wise dictionary or where the file's were never set;
    ``threshold``: for the act_fns that rank several rows or layers together, compared as they compare;
    ``thresholds``: "stored", or "trained" (undo a fold that left them behind); ``heads``: "shared", or "each" (of a
    crosscoder). A clt's rows are its layers side by side, a crosscoder's its heads.
    """
    for name, value, known in (
        ("thresholds", thresholds, ("stored", "trained")),
        ("heads", heads, ("shared", "each")),
    ):
        if value not in known:
            raise SaekitError(f"{name} {value!r} is unknown{nearest(value, list(known))}")
    config = read_config(files)
    name = next((name for name in WEIGHTS if files.has(name)), WEIGHTS[0])
    tensors = files.tensors(name, unchecked=("*IGNORE", f"*{NORM}*"))
    if name.endswith(".pt"):
        tensors = {key.removeprefix("sae."): value for key, value in tensors.items()}
    held = {
        k.removeprefix(NORM): float(tensors.pop(k))
        for k in list(tensors)
        if k.startswith(NORM) and tensors[k].numel() == 1
    }
    dtype = str(tensors["W_E"].dtype if "W_E" in tensors else torch.float32).removeprefix("torch.")
    where = f"file {str(files.root / name)!r}"
    stored = Stored(where, config, tensors, dtype, {**held, **(norms or {})}, threshold, thresholds, heads)
    if heads == "each" and config["sae_type"] != "crosscoder":
        raise SaekitError(
            f"heads = 'each' is for a crosscoder, and {where} is a {config['sae_type']}; leave it out"
        )
    d = READERS[config["sae_type"]](stored)
    for left in sorted(stored.tensors):
        raise SaekitError(
            f"{where} holds a tensor {left!r} that {CONFIG} has no use for; get the files again"
        )
    d.reads, d.writes = stored.hooks
    return d


FORMAT = Format("config.json with sae_type, sae_weights.safetensors", detect, load, save)
