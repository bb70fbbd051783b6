"""What a folder of OpenMOSS' format holds: its config, checked and with defaults, and tensors that are taken one by one."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saekit import records
from saekit.hub.files import Files
from saekit.hub.record import about
from saekit.registry import nearest
from saekit.types import SaekitError

NAME = "openmoss"
CONFIG = "config.json"
WEIGHTS = tuple(
    f"{stem}.{end}"
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for end in ("safetensors", "pt")
)
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"
FIELDS: dict[str, Any] = {
    "sae_type": str, "d_model": int, "expansion_factor": float, "use_decoder_bias?": bool, "act_fn?": str,
    "norm_activation?": str, "sparsity_include_decoder_norm?": bool, "top_k?": int,
}  # fmt: skip
PAIR = {"hook_point_in": str, "hook_point_out": str}
OWN: dict[str, dict[str, Any]] = {
    "sae": {**PAIR, "use_glu_encoder?": bool},
    "clt": {"hook_points_in": [str], "hook_points_out": [str]},
    "crosscoder": {"hook_points": [str]},
    "lorsa": {
        **PAIR, "n_qk_heads": int, "d_qk_head": int, "positional_embedding_type?": str, "rotary_dim": int,
        "rotary_base?": float, "rotary_adjacent_pairs?": bool, "rotary_scale?": float, "n_ctx": int,
        "use_NTK_by_parts_rope?": bool, "NTK_by_parts_factor?": float, "NTK_by_parts_low_freq_factor?": float,
        "NTK_by_parts_high_freq_factor?": float, "old_context_len?": int, "attn_scale?": float | None,
        "use_post_qk_ln?": bool, "normalization_type?": str | None, "eps?": float,
    },
    "molt": {**PAIR, "rank_counts": {"*": int}},
}  # fmt: skip
DEFAULTS = {
    "use_decoder_bias": True, "act_fn": "relu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
    "top_k": 50, "use_glu_encoder": False, "positional_embedding_type": "rotary", "rotary_base": 10000,
    "rotary_adjacent_pairs": True, "rotary_scale": 1, "use_NTK_by_parts_rope": False, "NTK_by_parts_factor": 1.0,
    "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 1.0, "old_context_len": 2048,
    "attn_scale": None, "use_post_qk_ln": False, "normalization_type": None, "eps": 1e-6,
}  # fmt: skip
MODES = ("dataset-wise", "inference", "token-wise", "batch-wise")
TOGETHER = {
    "layertopk": "all layers of a row",
    "batchtopk": "a whole batch",
    "batchlayertopk": "a whole batch",
}
PLAUSIBLE = (1e-6, 1e9)  # of a mean norm; what was never set is whatever lay in memory
OFF = 1e-3  # how far thresholds may be off, relatively, before it is told


@dataclass
class Stored:
    """A folder, with what the caller of ``load`` says of it; ``told`` is what became of it, for the card."""

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: str
    norms: Mapping[str, float]
    threshold: float | None
    thresholds: str
    heads: str
    told: list[str] = field(default_factory=list)

    @property
    def d(self) -> int:
        """Width of what is read and written, at each hook point."""
        return self.config["d_model"]

    @property
    def n_features(self) -> int:
        """Features, of a clt in each layer."""
        if self.config["sae_type"] == "molt":
            return sum(self.config["rank_counts"].values())
        return int(self.d * self.config["expansion_factor"])

    @property
    def hooks(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Hook points that are read, and written."""
        c = self.config
        if "hook_points" in c:
            return tuple(c["hook_points"]), tuple(c["hook_points"])
        if "hook_points_in" in c:
            return tuple(c["hook_points_in"]), tuple(c["hook_points_out"])
        return (c["hook_point_in"],), (c["hook_point_out"],)

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of the file, which must have this shape."""
        if name not in self.tensors:
            raise SaekitError(f"{self.where} lacks the tensor {name!r}; get the file again")
        tensor = self.tensors.pop(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise SaekitError(
                f"tensor {name!r} of {self.where} is {tensor.dtype} {tuple(tensor.shape)}, and {CONFIG} means {shape}; get the files again"
            )
        return tensor.float()

    def bias(self, name: str, *shape: int) -> Tensor:
        """A decoder's bias; 0 where the config has none."""
        return self.take(name, *shape) if self.config["use_decoder_bias"] else torch.zeros(shape)

    def average(self, hook: str) -> float | None:
        """The mean norm at a hook point, if it is known and plausible."""
        value = self.norms.get(hook)
        return value if value is not None and PLAUSIBLE[0] < value < PLAUSIBLE[1] else None

    def scale(self, hook: str) -> float:
        """What activations of a hook point are multiplied with, before they are read or in what is written."""
        mode = self.config["norm_activation"]
        if mode in ("inference", "token-wise"):
            return 1.0
        value = self.average(hook)
        if value is None:
            given = self.norms.get(hook)
            why = "depends on the batch" if mode == "batch-wise" else f"is {given} in it"
            raise SaekitError(
                f"{self.where} is {mode}, and the mean norm at {hook!r} {why}; give norms = {{{hook!r}: ...}}, the mean norm of its activations"
            )
        return math.sqrt(self.d) / value

    def selection(self, *shape: int) -> tuple[str, dict[str, Any], Tensor | None]:
        """Name, options and thresholds (of this shape) of what chooses features."""
        act = self.config["act_fn"]
        if act == "jumprelu":
            return act, {}, self.take(THRESHOLD, *shape).exp()
        if act in ("relu", "topk"):
            return act, ({"k": self.config["top_k"]} if act == "topk" else {}), None
        if self.threshold is None:
            raise SaekitError(
                f"act_fn {act!r} of {self.where} ranks {TOGETHER[act]}, and no file of the format holds a threshold; give threshold = ..., above which features are on"
            )
        self.told.append(
            f"act_fn {act!r}, which ranks {TOGETHER[act]}, became one threshold of {self.threshold}"
        )
        return "jumprelu", {}, torch.full(shape, float(self.threshold))

    def drifted(self, threshold: Tensor | None, factor: "Tensor | float | None") -> Tensor | None:
        """Thresholds, after what folding the dataset's norms did to them was told, or undone where that is wanted.

        ``factor``: what a threshold of training is, of a stored one; None where the file has no norms to say so.
        """
        trained = self.thresholds == "trained"
        if (
            self.config["norm_activation"] != "inference"
            or self.config["act_fn"] != "jumprelu"
            or threshold is None
        ):
            if trained:
                raise SaekitError(
                    f"thresholds = 'trained' is for a folded JumpReLU, and {self.where} is {self.config['act_fn']} and {self.config['norm_activation']}; leave it out"
                )
            return threshold
        if factor is None:
            if trained:
                raise SaekitError(
                    f"thresholds = 'trained' needs the norms that were folded, and {self.where} has none that are plausible; leave it out"
                )
            self.told.append("whether thresholds were left behind when norms were folded, the file can't say")
            return threshold
        ratio = torch.as_tensor(factor).expand_as(threshold)
        if (ratio - 1).abs().max() <= OFF:
            return threshold
        if trained:
            self.told.append("thresholds were brought back to those of training")
            return threshold * ratio
        low, high = float((1 / ratio).min()), float((1 / ratio).max())
        by = f"{low:.3g}" if high - low < 1e-3 * high else f"{low:.3g} to {high:.3g}"
        said = f"thresholds are {by} times what they were in training, since norms were folded and thresholds were not: expect another L0 than in training; thresholds='trained' undoes it"
        self.told.append(said)
        warnings.warn(f"{self.where}: {said}", stacklevel=4)
        return threshold

    def card(self) -> dict[str, Any]:
        """The dictionary's card."""
        context = self.config.get("n_ctx")
        made = about(
            NAME, self.dtype, context=context, metadata=self.config, missing=("the model", "the text")
        )
        made["imported"]["folded"] = list(self.told)
        return made


def read_config(files: Files) -> dict[str, Any]:
    """The config of a folder, with what the peer takes for fields that are left out."""
    where = f"file {str(files.root / CONFIG)!r}"
    config = files.json(CONFIG)
    kind = config.get("sae_type") if isinstance(config, dict) else None
    if kind not in OWN:
        raise SaekitError(f"{where} has sae_type {kind!r}{nearest(str(kind), list(OWN))}")
    records.check(config, FIELDS | OWN[kind], where, "get the file again")
    config = {**DEFAULTS, **config}
    config["act_fn"] = config["act_fn"].lower()
    for name, known in (("norm_activation", MODES), ("act_fn", ("relu", "jumprelu", "topk", *TOGETHER))):
        if config[name] not in known:
            raise SaekitError(f"{where} has {name} {config[name]!r}{nearest(config[name], list(known))}")
    if config["d_model"] < 1 or not 0 < config["expansion_factor"] < 1e6:
        raise SaekitError(
            f"{where} has d_model = {config['d_model']} and expansion_factor = {config['expansion_factor']}; both must be above 0"
        )
    if config["norm_activation"] == "token-wise" and kind != "sae":
        raise SaekitError(
            f"{where} is a {kind} whose rows are normalised one by one (token-wise), which saekit's has no normalisation for; convert one that is dataset-wise"
        )
    return config
