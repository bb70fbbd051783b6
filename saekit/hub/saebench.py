"""saekit's dictionaries in SAEBench 0.6, unchanged: an object for ``selected_saes`` of its ``run_eval``.

    from saekit.hub.saebench import as_saebench
    core.run_evals(selected_saes=[("mine", as_saebench("run", "core"))], ...)

SAEBench splices every SAE in where it reads, reads some places by a name of its own and pads with zeros, without
saying so where that is wrong: an adapter is for one evaluation, and is refused where its numbers would not be of this
dictionary. SAEBench asks for numpy below 2 and datasets below 4: install saekit into its environment. It isn't imported.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.dictionaries.normalisation import ROWS
from saekit.dictionaries.rows import Rows
from saekit.dictionaries.sequences import Sequences
from saekit.hub import dictionary_of
from saekit.registry import nearest
from saekit.types import Codes, SaekitError

SPLICED, RESIDUAL, MASKED, SINGLE, ROWS_ONLY = "spliced", "residual", "masked", "single", "rows"
WHY = {  # what an evaluation takes for granted, and what to do where it doesn't hold
    SPLICED: "puts what is decoded where the dictionary reads, and this one writes elsewhere",
    RESIDUAL: "reads blocks.N.hook_resid_post whatever the dictionary's own place is",
    MASKED: "sets padded positions to zero before it encodes, and this one reads whole sequences",
    SINGLE: "encodes single positions, and this one reads whole sequences",
    ROWS_ONLY: "reads heads one by one, and this dictionary all of them as one row",
}
EVALS: dict[str, tuple[str, ...]] = {  # by what they take for granted
    "core": (SPLICED,),
    "sparse_probing": (MASKED, ROWS_ONLY),
    "scr_and_tpp": (SPLICED, MASKED, ROWS_ONLY),
    "autointerp": (ROWS_ONLY,),
    "absorption": (SPLICED, RESIDUAL, SINGLE),
    "ravel": (SPLICED, RESIDUAL, SINGLE),
    "unlearning": (SPLICED, ROWS_ONLY),
}
WIRINGS = ("autoencoder", "transcoder", "lorsa")
PER_HEAD = (".hook_z", ".hook_q", ".hook_k", ".hook_v")
HOOK = re.compile(r"blocks\.(\d+)\.(?:\w+\.)*hook_\w+")  # TransformerLens's names


@dataclass
class Settings:
    """What SAEBench reads as ``sae.cfg``; it adds fields of its own."""

    model_name: str
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    dtype: str
    architecture: str
    context_size: int | None
    device: str = "cpu"
    prepend_bos: bool = True
    normalize_activations: str = "none"
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they go into SAEBench's results."""
        return asdict(self)


class Adapter(nn.Module):
    """A dictionary as SAEBench has them: dense codes, and atoms of norm 1 whose norms the codes carry.

    ``W_enc`` [d_in, n_features], ``W_dec`` [n_features, d_out], ``b_enc`` and ``b_dec`` are of this form.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    norms: Tensor

    def __init__(self, dictionary: Rows, cfg: Settings):
        super().__init__()
        self.dictionary, self.cfg = dictionary, cfg
        with torch.no_grad():
            atoms = dictionary.norm_out.directions(dictionary.W_dec)
            norms = atoms.norm(dim=1)
            norms = norms.where(norms > 0, 1.0)
            nothing = Codes.from_dense(atoms.new_zeros(1, dictionary.n_features))
            self.register_buffer("norms", norms)
            self.register_buffer("W_dec", atoms / norms[:, None])
            self.register_buffer("W_enc", dictionary.W_enc * norms)
            self.register_buffer("b_enc", dictionary.b_enc * norms)
            self.register_buffer("b_dec", dictionary.decode(nothing)[0])
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """What they are."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> "Adapter":
        """Move or cast; ``cfg`` says so."""
        super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    hook_z_reshaping_mode = False  # "core" flattens heads itself, and tells an SAE not to

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """It never reshapes."""

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Codes times the norms of their atoms."""
        return self.dictionary.encode(x.to(self.dtype)).to_dense() * self.norms

    def decode(self, feature_acts: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch d_out"]:
        """What codes, also edited ones, write."""
        return feature_acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction."""
        return self.decode(self.encode(x))


def as_saebench(
    dictionary: "Dictionary | str | Path",
    eval: str,
    *,
    model: str | None = None,
    hook_name: str | None = None,
) -> Adapter:
    """A dictionary, or the folder or address of one, for one of SAEBench's evaluations (:data:`EVALS`).

    ``model`` and ``hook_name``: TransformerLens's names of the model and of the place that it reads, where the
    dictionary's own card says nothing or another name. It is a copy; SAEBench casts it to its ``llm_dtype``. Raises
    SaekitError with the reason where the evaluation's numbers would be wrong.
    """
    if eval not in EVALS:
        raise SaekitError(f"eval {eval!r} is none that is known to be right for a dictionary of saekit's{nearest(eval, list(EVALS))}")  # fmt: skip
    d = dictionary_of(dictionary)
    wiring = d.config.wiring[0]
    if not isinstance(d, Rows) or wiring not in WIRINGS:
        raise SaekitError(f"wiring {wiring!r} is none that SAEBench can hold ({', '.join(WIRINGS)}); use saekit.evaluate")  # fmt: skip
    if d.wiring.normalise in ROWS or getattr(d.wiring, "skip", None) is not None:
        raise SaekitError(f"wiring {wiring!r} decodes with its input (a skip, or a normalisation by row), and SAEBench decodes codes alone; use saekit.evaluate")  # fmt: skip
    place = hook_name or (d.reads[0] if d.reads else "")
    found = HOOK.fullmatch(place)
    if found is None:
        raise SaekitError(f"hook_name {place!r} is no name of TransformerLens; give one such as 'blocks.3.hook_resid_post'")  # fmt: skip
    _check(d, eval, place)
    data = d.card.get("data", {})
    name = model or data.get("model", {}).get("name")
    if not name:
        raise SaekitError(
            "model is not in the dictionary's card; give TransformerLens's name of it as model="
        )
    own = d.to_inference()
    cfg = Settings(
        model_name=name, hook_name=place, hook_layer=int(found[1]), d_in=d.d_in, d_sae=d.n_features,
        dtype=str(own.dtype).removeprefix("torch."), architecture=own.config.selection[0], context_size=data.get("context"),
        dataset_path=str(data.get("text", {}).get("name", "")),
    )  # fmt: skip
    return Adapter(own, cfg)


def _check(d: Rows, eval: str, place: str) -> None:
    """Refuse what the evaluation would get wrong."""
    fails = {
        SPLICED: tuple(d.reads) != tuple(d.writes) or d.config.wiring[0] != "autoencoder",
        RESIDUAL: not place.endswith(".hook_resid_post"),
        MASKED: isinstance(d, Sequences),
        SINGLE: isinstance(d, Sequences),
        ROWS_ONLY: place.endswith(PER_HEAD),
    }
    for need in EVALS[eval]:
        if fails[need]:
            right = [name for name, needs in EVALS.items() if not any(fails[n] for n in needs)]
            raise SaekitError(
                f"eval {eval!r} {WHY[need]}; SAEBench is right about it in {', '.join(right)}, and saekit.evaluate in the rest"
            )
