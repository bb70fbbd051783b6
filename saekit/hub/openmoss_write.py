"""Writers of OpenMOSS' format, one for each type of dictionary; what the format means is in :mod:`saekit.hub.openmoss`.

All are written in raw units (``norm_activation`` "inference"), thresholds and ranks of plain pre-activations where the
type lets that be said (``sparsity_include_decoder_norm`` false). Tensors are in the dtype of the dictionary.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hub.names import lens
from saekit.hub.openmoss_stored import CONFIG, NAME, THRESHOLD, WEIGHTS
from saekit.hub.record import from_dictionary, refuse_unless
from saekit.hub.written import as_json, as_safetensors, stored, write
from saekit.types import SaekitError

SELECTIONS = ("relu", "jumprelu", "topk")
TINY = 1e-37  # the threshold that stands for 0, of which the format would store the logarithm
Written = tuple[dict[str, Any], dict[str, Tensor]]


def save(
    dictionary: Dictionary, folder: "str | Path", *, n_ctx: int | None = None, dtype: str = "float32"
) -> Path:
    """Write a dictionary; ``dtype`` is that of the weights.

    ``n_ctx`` is the longest sequence of a lorsa, if its card doesn't say.
    """
    name = dictionary.config.wiring[0]
    if name not in WRITERS:
        raise SaekitError(f"format {NAME!r} has no wiring {name!r}; choose another format")
    if n_ctx is not None and name != "lorsa":
        raise SaekitError(f"n_ctx = {n_ctx} is for a lorsa, and this is a {name!r}; leave it out")
    if not dictionary.reads or not dictionary.writes:
        raise SaekitError(
            f"reads and writes are empty, and format {NAME!r} names hook points; set dictionary.reads and dictionary.writes"
        )
    config, tensors = WRITERS[name](dictionary, n_ctx)
    for key in config.keys() & {"hook_point_in", "hook_point_out"}:
        config[key] = lens(config[key], dictionary.card)
    for key in config.keys() & {"hook_points", "hook_points_in", "hook_points_out"}:
        config[key] = [lens(point, dictionary.card) for point in config[key]]
    common = {
        "use_decoder_bias": True, "norm_activation": "inference", "sparsity_include_decoder_norm": False, "top_k": 50,
        "use_triton_kernel": False, "jumprelu_threshold_window": 2.0,
    }  # fmt: skip
    kept = {key: tensors.pop(key) for key in ("mask", "IGNORE") if key in tensors}  # no weights
    held = {key: value.clone() for key, value in stored(tensors, dtype).items()}
    return write(folder, {WEIGHTS[0]: as_safetensors(held | kept), CONFIG: as_json(common | config)})


def _width(reads: "list[int]", writes: "list[int]") -> int:
    if len({*reads, *writes}) != 1:
        raise SaekitError(
            f"format {NAME!r} has one width for all hook points, and this dictionary reads {reads} and writes {writes}; choose another format"
        )
    return reads[0]


def expansion(d: int, n: int) -> float:
    """What the peer multiplies d with, and cuts to a whole number, to get n."""
    factor = n / d
    while int(d * factor) < n:
        factor = math.nextafter(factor, math.inf)
    return factor


def _chosen(name: str, k: int | None, threshold: Tensor | None) -> Written:
    """What config and tensors say of a selection."""
    config: dict[str, Any] = {"act_fn": name}
    if name == "topk":
        config["top_k"] = k
    if threshold is None:
        return config, {}
    if (threshold < 0).any():
        raise SaekitError(
            f"threshold holds {float(threshold.min()):.3g}, and format {NAME!r} stores its logarithm; keep thresholds at 0 or above"
        )
    return config, {THRESHOLD: threshold.clamp(min=TINY).log()}


def _whole(dictionary: Dictionary) -> tuple[Any, str, int | None, Tensor | None]:
    """Of one that no record states: itself in raw units, and its selection's name, k and thresholds."""
    d: Any = dictionary.to_inference().cpu()
    name, config = d.config.selection
    rule = d.parts[0].selection if hasattr(d, "parts") else d.selection
    if name not in SELECTIONS:
        raise SaekitError(
            f"format {NAME!r} has no selection {name!r} (it has {', '.join(SELECTIONS)}); choose another format"
        )
    if name == "topk" and not config.relu:
        raise SaekitError(
            f"format {NAME!r} sets negative codes to 0, and selection 'topk' with relu = False keeps them; choose another format"
        )
    k = rule.k_inference if name == "topk" else None
    if name != "jumprelu":
        return d, name, k, None
    rules = [part.selection for part in d.parts] if hasattr(d, "parts") else [rule]
    thresholds = torch.stack([each.threshold.detach() for each in rules])
    return d, name, k, thresholds if hasattr(d, "parts") else thresholds[0]


def _sae(dictionary: Dictionary, _: int | None) -> Written:
    record = from_dictionary(dictionary, NAME)
    refuse_unless(record, NAME, selections=SELECTIONS, per_row=("none", "row_norm"), skip=False)
    d = _width([record.d_in], [record.d_out])
    config, tensors = _chosen(record.selection, record.options.get("k"), record.threshold)
    config |= {
        "sae_type": "sae", "d_model": d, "expansion_factor": expansion(d, record.n_features),
        "hook_point_in": dictionary.reads[0], "hook_point_out": dictionary.writes[0], "use_glu_encoder": False,
    }  # fmt: skip
    if record.per_row == "row_norm":
        config["norm_activation"] = "token-wise"
    tensors |= {"W_E": record.encoder.T, "b_E": record.b_enc, "W_D": record.atoms, "b_D": record.b_dec}
    return config, tensors


def _clt(dictionary: Dictionary, _: int | None) -> Written:
    whole, name, k, threshold = _whole(dictionary)
    wiring, layers = whole.wiring, whole.wiring.layers
    d = _width(list(wiring.parts_in), list(wiring.parts_out))
    n = whole.n_features // layers
    decoders = torch.zeros(layers, layers, n, d)  # [from, to, feature, d]; 0 beyond the reach
    for source, part in enumerate(whole.parts):
        first, stop = wiring.written(source)
        decoders[source, first:stop] = part.W_dec.detach().view(n, stop - first, d).transpose(0, 1)
    config, tensors = _chosen(name, k, threshold)
    config |= {
        "sae_type": "clt", "d_model": d, "expansion_factor": expansion(d, n),
        "hook_points_in": list(dictionary.reads), "hook_points_out": list(dictionary.writes),
    }  # fmt: skip
    tensors["W_E"] = torch.stack([part.W_enc.detach() for part in whole.parts])
    tensors["b_E"] = torch.stack([part.b_enc.detach() for part in whole.parts])
    for to, bias in enumerate(whole.b_dec.detach().split(d)):
        tensors |= {f"W_D.{to}": decoders[: to + 1, to], f"b_D.{to}": bias}
    return config, tensors


def _crosscoder(dictionary: Dictionary, _: int | None) -> Written:
    whole, name, k, threshold = _whole(dictionary)
    d = _width(list(whole.wiring.parts_in), list(whole.wiring.parts_out))
    heads, n = len(whole.wiring.parts_in), whole.n_features
    atoms = whole.W_dec.detach().view(n, heads, d).transpose(0, 1)
    norms = torch.linalg.vector_norm(atoms, dim=2)
    if (norms == 0).any():
        head, feature = (int(at) for at in (norms == 0).nonzero()[0])
        raise SaekitError(
            f"feature {feature} writes nothing to source {head}, and format {NAME!r} divides a crosscoder's codes by the norm of what is written to each; choose another format"
        )
    uneven = float((norms / norms.mean(0)).sub(1).abs().max())
    level = float((norms / norms.mean()).sub(1).abs().max())
    if (name == "jumprelu" and uneven > 1e-6) or (name == "topk" and level > 1e-6):
        raise SaekitError(
            f"format {NAME!r} turns a crosscoder's features on for each source by the norm of what is written there, and with selection {name!r} these norms must be equal; choose another format"
        )
    config, tensors = _chosen(name, k, None if threshold is None else threshold * norms.mean(0))
    config |= {
        "sae_type": "crosscoder", "d_model": d, "expansion_factor": expansion(d, n),
        "hook_points": list(dictionary.reads), "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    tensors["W_E"] = whole.W_enc.detach().view(heads, d, n)
    # the heads' biases add up
    tensors["b_E"] = torch.cat([whole.b_enc.detach()[None], torch.zeros(heads - 1, n)])
    return config, tensors | {"W_D": atoms, "b_D": whole.b_dec.detach().view(heads, d)}


def _lorsa(dictionary: Dictionary, n_ctx: int | None) -> Written:
    whole, name, k, threshold = _whole(dictionary)
    patterns, c = whole.wiring.patterns, whole.wiring.patterns.config
    d = _width([whole.d_in], [whole.d_out])
    if dictionary.reads == dictionary.writes:
        raise SaekitError(
            f"reads and writes are both {dictionary.reads[0]!r}, and the peer's lorsa needs two hook points; set dictionary.reads and dictionary.writes"
        )
    n_ctx = n_ctx or whole.context
    if n_ctx is None or n_ctx < 1:
        raise SaekitError(
            f"n_ctx = {n_ctx}: format {NAME!r} stores how long sequences may be, and the card doesn't say; give n_ctx = ..."
        )
    if c.window is not None or c.rotary_scale != 1:
        raise SaekitError(
            f"format {NAME!r} has no window and no scale of rotary positions, and these are {c.window} and {c.rotary_scale}; choose another format"
        )
    plain = c.rotary_base ** -(torch.arange(0, c.rotary, 2) / max(c.rotary, 1))
    if c.rotary and (patterns.frequencies / plain - 1).abs().max() > 1e-5:
        raise SaekitError(
            f"queries and keys turn at frequencies that are not those of rotary_base = {c.rotary_base}, and format {NAME!r} would read others; choose another format"
        )
    config, tensors = _chosen(name, k, threshold)
    config |= {
        "sae_type": "lorsa", "d_model": d, "expansion_factor": expansion(d, whole.n_features),
        "hook_point_in": dictionary.reads[0], "hook_point_out": dictionary.writes[0], "n_qk_heads": c.n_qk,
        "d_qk_head": c.d_qk, "positional_embedding_type": "rotary" if c.rotary else "none", "rotary_dim": c.rotary,
        "rotary_base": int(c.rotary_base) if c.rotary_base.is_integer() else c.rotary_base,
        "rotary_adjacent_pairs": c.rotary_pairs == "neighbours", "rotary_scale": 1, "n_ctx": n_ctx,
        "attn_scale": 1 / patterns.scale, "use_post_qk_ln": c.qk_norm, "normalization_type": "RMS" if c.qk_norm else None,
        "eps": c.eps,
    }  # fmt: skip
    for side in "QK":
        weight, bias = getattr(patterns, f"W_{side}").detach(), getattr(patterns, f"b_{side}").detach()
        copies = c.n_qk // len(weight)  # a set of keys for several heads
        tensors |= {
            f"W_{side}": weight.mT.repeat_interleave(copies, 0),
            f"b_{side}": bias.repeat_interleave(copies, 0),
        }
        if c.qk_norm:
            tensors[f"ln_{side.lower()}.w"] = (
                getattr(patterns, f"norm_{side.lower()}").detach().expand(c.n_qk, -1)
            )
    tensors |= {"mask": torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril(), "IGNORE": torch.tensor(-math.inf)}
    if c.rotary:
        angles = torch.arange(n_ctx)[:, None] * plain
        angles = angles.repeat(1, 2) if c.rotary_pairs == "halves" else angles.repeat_interleave(2, 1)
        tensors |= {"rotary_sin": angles.sin(), "rotary_cos": angles.cos()}
    tensors |= {"W_V": whole.W_enc.detach().T, "b_V": whole.b_enc.detach(), "W_O": whole.W_dec.detach()}
    return config, tensors | {"b_D": whole.b_dec.detach()}


def _molt(dictionary: Dictionary, _: int | None) -> Written:
    whole, name, k, threshold = _whole(dictionary)
    d = _width([whole.d_in], [whole.d_out])
    if whole.shift.any():
        raise SaekitError(
            f"the maps read centred inputs, and format {NAME!r} has no bias inside a map; train it with normalise = 'none'"
        )
    ranks, counts = whole.ranks.unique_consecutive(return_counts=True)
    if not torch.equal(ranks, whole.ranks.unique()):
        raise SaekitError(
            f"ranks {tuple(ranks.tolist())} must rise from feature to feature in format {NAME!r}; choose another format"
        )
    config, tensors = _chosen(name, k, threshold)
    config |= {
        "sae_type": "molt", "d_model": d, "expansion_factor": whole.n_features / d, "hook_point_in": dictionary.reads[0],
        "hook_point_out": dictionary.writes[0],
        "rank_counts": {str(r): n for r, n in zip(ranks.tolist(), counts.tolist(), strict=True)},
    }  # fmt: skip
    sizes = (ranks * counts).tolist()
    rows = zip(
        ranks.tolist(), whole.atoms.rows().detach().split(sizes), whole.V.detach().split(sizes), strict=True
    )
    for rank, u, v in rows:
        tensors[f"U_matrices.{rank}"] = u.view(-1, rank, d).mT
        tensors[f"V_matrices.{rank}"] = v.view(-1, rank, d)
    tensors |= {"W_E": whole.W_enc.detach(), "b_E": whole.b_enc.detach(), "b_D": whole.b_dec.detach()}
    return config, tensors


WRITERS: dict[str, Any] = {
    "autoencoder": _sae, "transcoder": _sae, "cross_layer": _clt, "crosscoder": _crosscoder, "lorsa": _lorsa, "molt": _molt,
}  # fmt: skip
