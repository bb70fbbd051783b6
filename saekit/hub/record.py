"""What a dictionary computes, said once, between saekit and the formats of others.

Formats differ less in their tensors than in what they mean by them: whether a bias is taken off first, what a
threshold is compared with, in which units. A format's reader fills a :class:`Record` with what its file means, and
:func:`to_dictionary` folds; its writer gets a record from :func:`from_dictionary` and refuses what its file can't say
(:func:`refuse_unless`). The function that a record states, for a row ``x`` of raw activations::

    u = per_row(x) * scale_in - pre_bias
    pre = encoder u + b_enc
    codes = selection(pre)                          compared in ``domain``, negatives by ``relu``
    y = per_row_inverse((codes atoms + b_dec) / scale_out) + skip x

``per_row_inverse`` uses the same row's statistics, and only an autoencoder has it: a transcoder's output has units of
its own. ``codes`` are the peer's own, to the last feature, but where ``domain`` says otherwise.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saekit.dictionaries import Config, Dictionary, build
from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.config import configure
from saekit.dictionaries.normalisation import ROWS
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.rows import Rows
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.wiring import WIRINGS
from saekit.registry import nearest
from saekit.types import SaekitError

ALLOWED = {
    "wiring": ("autoencoder", "transcoder"),
    "domain": ("pre", "norm"),
    "relu": ("after", "before", "none"),
    "per_row": ("none", *ROWS),
}
RANKED = ("topk", "abstopk", "groupmax")  # what compares features of a row with each other
THRESHOLDS = ("jumprelu", "batchtopk")
BY_THRESHOLDS = ("topk", "groupmax", "pursuit")  # what calibrate() can turn into thresholds
KEPT = {  # fields of a selection's config that its rule at inference depends on
    "topk": ("k",), "abstopk": ("k",), "groupmax": ("k",), "omp": ("k",), "codebook": ("k", "groups"),
    "pursuit": ("k", "tolerance", "residual", "until_repeat"),
    "iterative": ("penalty", "weight", "steps"), "unrolled": ("penalty", "weight", "steps"),
}  # fmt: skip
ROUTED = {"switch": "sends rows to experts by weights of its own, which a record doesn't hold"}
SIGNED = ("abstopk", "omp", "iterative", "unrolled", "codebook")  # what knows no ReLU


@dataclass(frozen=True)
class Record:
    """A dictionary that reads one place and writes one, as a file of any format means it.

    Tensors may be of any float dtype, on the CPU; they are read as they are and computed with in fp32.

    * ``encoder`` [n_features, d_in] and ``atoms`` [n_features, d_out]: one row per feature, both;
    * ``selection``: a name of saekit's table, with its ``options`` (``{"k": 32}``) and the tensors that it has beside
      a threshold in ``state`` (a gated one's ``r`` and ``b_mag``; ``b_enc`` is its gate's bias);
    * ``wiring``: "autoencoder" (one space) or "transcoder"; ``reads`` and ``writes`` are hook points, () unknown;
    * ``pre_bias`` [d_in] is taken off the input after ``scale_in``; None: nothing is;
    * ``scale_in`` multiplies the input; the output is divided by ``scale_out`` (set both for an autoencoder);
    * ``domain``: what is ranked, or compared with ``threshold``. "pre": the pre-activation itself; "norm": the
      pre-activation times its atom's norm. With "norm" a threshold's codes are still ``pre``, while codes that are
      ranked are ``pre * norm`` and the atoms that they multiply have norm 1;
    * ``relu``: "after" the selection, "before" it, or "none" (codes may be negative). After and before are the same
      function: a negative that is chosen ends at 0, and a threshold below 0 lets no negative through;
    * ``threshold`` [n_features] of "jumprelu" and "batchtopk": a code passes strictly above it. "batchtopk" is the
      same rule under the name of its training;
    * ``skip`` [d_out, d_in]: from raw rows to the raw output;
    * ``tied``: the encoder reads by the atoms (``encoder`` then holds the same rows);
    * ``per_row``: "row_std" (each row minus its mean, over its unbiased standard deviation + 1e-5), "row_norm"
      (each row scaled to the norm sqrt(d_in)) or "none";
    * ``card``: what is known beside the function, for the dictionary's card; see :func:`about`.
    """

    encoder: Shaped[Tensor, "feature d_in"]
    atoms: Shaped[Tensor, "_feature d_out"]
    b_enc: Shaped[Tensor, " _feature"]
    b_dec: Shaped[Tensor, " _d_out"]
    selection: str = "relu"
    options: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    wiring: str = "autoencoder"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    pre_bias: Shaped[Tensor, " _d_in"] | None = None
    scale_in: float = 1.0
    scale_out: float = 1.0
    domain: str = "pre"
    relu: str = "after"
    threshold: Shaped[Tensor, " _feature"] | None = None
    skip: Shaped[Tensor, "_d_out _d_in"] | None = None
    tied: bool = False
    per_row: str = "none"
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise SaekitError(f"{name} {value!r} is unknown{nearest(value, list(allowed))}")
        if self.selection not in SELECTIONS:
            raise SaekitError(
                f"selection {self.selection!r} is unknown{nearest(self.selection, SELECTIONS.table)}"
            )
        self._check_shapes()
        self._check_meaning()

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.encoder)

    @property
    def d_in(self) -> int:
        """Width read."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width written."""
        return self.atoms.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by the name of their field; what belongs to the selection as ``state.r``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        named = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return named | {f"state.{name}": value for name, value in self.state.items()}

    def _check_shapes(self) -> None:
        n, d = self.encoder.shape if self.encoder.ndim == 2 else (0, 0)
        out = self.atoms.shape[-1] if self.atoms.ndim else 0
        wanted = {
            "encoder": (n, d), "atoms": (n, out), "b_enc": (n,), "b_dec": (out,), "pre_bias": (d,), "threshold": (n,), "skip": (out, d),
        }  # fmt: skip
        for name, value in self.tensors().items():
            if name in wanted and tuple(value.shape) != wanted[name]:
                raise SaekitError(
                    f"{name} has shape {tuple(value.shape)}; with an encoder of [n_features, d_in] = {tuple(self.encoder.shape)} and atoms of [n_features, d_out] = {tuple(self.atoms.shape)} it must be {wanted[name]}"
                )
            if not value.is_floating_point():
                raise SaekitError(f"{name} is {value.dtype}; a dictionary's tensors are floating point")
            if not torch.isfinite(value).all():
                raise SaekitError(f"{name} holds NaN or Inf; take an intact file")
        for name in ("scale_in", "scale_out"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise SaekitError(f"{name} = {value} must be a factor above 0")

    def _check_meaning(self) -> None:
        name, transcodes = self.selection, self.wiring == "transcoder"
        if name in ROUTED:
            raise SaekitError(f"selection {name!r} {ROUTED[name]}; choose saekit's own format")
        if (self.threshold is not None) != (name in THRESHOLDS):
            raise SaekitError(
                f"selection {name!r} {'needs a threshold' if self.threshold is None else 'has no threshold'}; those with one are {', '.join(THRESHOLDS)}"
            )
        if not transcodes and self.d_in != self.d_out:
            raise SaekitError(
                f"an autoencoder reads {self.d_in} columns and writes {self.d_out}; choose wiring 'transcoder'"
            )
        if not transcodes and self.skip is not None:
            raise SaekitError("skip is given, and an autoencoder has none; choose wiring 'transcoder'")
        if not transcodes and self.scale_in != self.scale_out:
            raise SaekitError(
                f"scale_in = {self.scale_in} and scale_out = {self.scale_out} of an autoencoder differ, and it writes the space that it reads; give one"
            )
        if name in SIGNED and self.relu != "none":
            raise SaekitError(f"selection {name!r} has no ReLU; give relu = 'none'")
        if self.relu == "none" and name not in (*SIGNED, "topk", *THRESHOLDS):
            raise SaekitError(f"selection {name!r} always has its ReLU; give relu = 'after'")
        if self.domain == "norm" and name not in (*RANKED, *THRESHOLDS, "relu"):
            raise SaekitError(f"selection {name!r} isn't compared by its atoms' norms; give domain = 'pre'")


def about(
    format: str,
    dtype: str,
    *,
    model: str | None = None,
    text: str | None = None,
    context: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    missing: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The ``card`` of a record that was read from a file, JSON-able.

    ``dtype`` of the stored weights ("bfloat16"); ``model``, ``text`` and ``context`` as far as the file names them;
    ``metadata``: what else it says, kept as it stands and given back by a writer of the same format; ``missing``:
    what its readers would like to know and it doesn't say, as phrases ("the hook point").
    """
    data: dict[str, Any] = {}
    if model is not None:
        data["model"] = {"name": model}
    if text is not None:
        data["text"] = {"name": text}
    if context is not None:
        data["context"] = context
    imported = {
        "format": format,
        "dtype": dtype,
        "metadata": dict(metadata or {}),
        "missing": list(missing),
        "folded": [],
    }
    return {**({"data": data} if data else {}), "imported": imported}


@torch.no_grad()
def to_dictionary(record: Record) -> Dictionary:
    """The dictionary of raw activations that a record states, in fp32, folded in fp64.

    Into weights go the pre-bias (``b_enc - encoder pre_bias``), the scales (``encoder * scale_in``,
    ``atoms / scale_out``, ``b_dec / scale_out``: codes and thresholds keep their values) and norms (a threshold is
    divided by its atom's; where features are ranked, the encoder is multiplied and the atoms are divided). What
    depends on the row stays: ``per_row`` becomes the wiring's ``normalise``. A pursuit, a codebook and their like work
    in a space of their own, so there pre-bias and scale become its normalisation instead. What was folded is listed in
    ``card["imported"]["folded"]``, if the card says where the record is from.
    """
    record, folded = _without_norms(record)
    affine = SELECTIONS[record.selection].affine
    name, options, state = _selection(record)
    d = _built(record, name, options, affine)
    encoder, bias = record.encoder.double(), record.b_enc.double()
    written, b_dec = record.atoms.double(), record.b_dec.double()
    if affine:
        encoder, shift, told = _folded_input(record, encoder)
        bias, state, folded = bias + shift, _shifted(state, shift), folded + told
    if affine or record.wiring == "transcoder":
        written, b_dec = written / record.scale_out, b_dec / record.scale_out
    if not affine:
        b_dec = _set_spaces(d, record, b_dec)
    if d.encoder is not None:
        d.encoder.copy_(encoder)
    d.atoms.weight.copy_(written)
    d.b_enc.copy_(bias)
    d.b_dec.copy_(b_dec)
    if record.skip is not None:
        d.wiring.skip.copy_(record.skip)
    own = {**d.selection.state_dict(), **{k: v.float() for k, v in state.items()}}
    d.selection.load_state_dict(own)
    d.prepared.fill_(True)
    d.reads, d.writes = record.reads, record.writes
    d.card = copy.deepcopy(dict(record.card))
    if "imported" in d.card:
        d.card["imported"]["folded"] = [*d.card["imported"].get("folded", []), *folded]
    return d.eval()


def _without_norms(record: Record) -> tuple[Record, list[str]]:
    """The same function with its comparisons in the domain "pre", and what was folded."""
    if record.domain == "pre" or record.selection == "relu":
        return record, []
    norms = torch.linalg.vector_norm(record.atoms.double(), dim=1)
    if record.threshold is not None:
        # an atom of norm 0 writes nothing; a bound that nothing reaches keeps it silent, as 0 > threshold does
        top = torch.finfo(torch.float32).max
        moved = torch.where(norms > 0, record.threshold.double() / norms.clamp(min=1e-300), top).clamp(
            max=top
        )
        told = "thresholds were divided by their atoms' norms, with which pre-activations were compared"
        return dataclasses.replace(record, threshold=moved, domain="pre"), [told]
    told = "the encoder was multiplied by the atoms' norms, by which features were ranked, and the atoms divided: codes are pre-activations times norms"
    return dataclasses.replace(
        record,
        encoder=record.encoder.double() * norms[:, None],
        b_enc=record.b_enc.double() * norms,
        atoms=record.atoms.double() / torch.where(norms > 0, norms, 1.0)[:, None],
        domain="pre",
    ), [told]


def _built(record: Record, name: str, options: Mapping[str, Any], affine: bool) -> Rows:
    """A dictionary of the choices, with weights that are still to be set."""
    unused = set(options)
    chosen = configure(SELECTIONS, name, options, unused)
    if unused:
        odd = sorted(unused)[0]
        raise SaekitError(
            f"option {odd!r} is not one of selection {name!r}{nearest(odd, list(vars(chosen)))}"
        )
    required = getattr(SELECTIONS[name], "requires", None) or getattr(chosen, "requires", None)
    terms = ("reconstruction", *((required,) if required else ()))  # for whoever trains it on
    objective = tuple((term, OBJECTIVES[term].Config()) for term in terms)
    atoms: tuple[str, Any] = ("free", ATOMS["free"].Config())
    if record.tied and not affine:
        atoms = ("tied", ATOMS["tied"].Config(unit_norm=getattr(SELECTIONS[name], "unit_encoder", False)))
    d = build(Config(record.n_features, _wiring(record, affine), (name, chosen), atoms, objective))
    assert isinstance(d, Rows)  # of these wirings
    return d


def _selection(record: Record) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, options and tensors of the selection in saekit's table."""
    name, options = record.selection, dict(record.options)
    if record.threshold is not None:
        threshold = record.threshold.double()
        return "jumprelu", {}, {"threshold": threshold if record.relu == "none" else threshold.clamp(min=0)}
    if name == "topk":
        options["relu"] = record.relu != "none"
    return name, options, dict(record.state)


def _wiring(record: Record, affine: bool) -> tuple[str, Any]:
    moved = record.pre_bias is not None or record.scale_in != 1
    normalise = record.per_row
    if normalise == "none" and moved and not affine:
        normalise = "scale"
    sizes: dict[str, Any] = {"d_in": record.d_in, "normalise": normalise}
    if record.wiring == "transcoder":
        sizes |= {"d_out": record.d_out, "skip": record.skip is not None}
        if record.skip is not None and normalise == "scale":
            raise SaekitError(
                f"selection {record.selection!r} with a pre-bias or a scale reads other rows than the skip; leave out one of them"
            )
    return record.wiring, WIRINGS[record.wiring].Config(**sizes)


def _folded_input(record: Record, encoder: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """The encoder that reads rows without scale and pre-bias, what biases get in their place, and what was folded."""
    told, shift = [], torch.zeros(record.n_features, dtype=torch.float64)
    if record.pre_bias is not None and record.pre_bias.any():
        shift = -encoder @ record.pre_bias.double()
        told.append("the bias that is taken off the input went into b_enc")
    if record.scale_in != 1:
        encoder = encoder * record.scale_in
        told.append(f"the input's scale {record.scale_in:.6g} went into the encoder")
    if record.scale_out != 1:
        told.append(f"the output's scale {record.scale_out:.6g} went into the atoms and b_dec")
    return encoder, shift, told


def _shifted(state: dict[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
    """A gated selection's magnitudes have a bias of their own, whose products are ``exp(r)`` times the gate's."""
    if "b_mag" not in state:
        return state
    return state | {"b_mag": state["b_mag"].double() + state["r"].double().exp() * shift}


def _set_spaces(d: Rows, record: Record, b_dec: Tensor) -> Tensor:
    """Give a dictionary whose selection works in a space of its own that space; returns its b_dec."""
    centre = torch.zeros(record.d_in) if record.pre_bias is None else record.pre_bias
    centre = centre.double()
    d.norm_in.fitted.fill_(True)
    d.norm_out.fitted.fill_(True)
    if d.norm_in.kind == "none":
        return b_dec
    d.norm_in.mean.copy_(centre / record.scale_in)
    d.norm_in.scale.fill_(record.scale_in)
    if record.wiring == "transcoder":
        return b_dec
    d.norm_out.load_state_dict(d.norm_in.state_dict())
    return b_dec - centre


@torch.no_grad()
def from_dictionary(dictionary: Dictionary, target: str) -> Record:
    """What a dictionary computes, for the writer of the format named ``target``; on the CPU, in raw activations.

    It is taken from ``to_inference``: codes are unchanged, and every rule that comes down to a threshold per feature is
    a "jumprelu". A pursuit's normalisation becomes ``pre_bias``, ``scale_in`` and ``scale_out``. Dictionaries that a
    record can't state (several places read or written, sequences, transforms, whitened pursuits) are refused with
    the reason.
    """
    name = dictionary.config.wiring[0]
    if name not in ALLOWED["wiring"] or not isinstance(dictionary, Rows):
        raise SaekitError(
            f"wiring {name!r} is more than one place read and one written, and format {target!r} stores no more; choose another format"
        )
    d = dictionary.to_inference().cpu()
    selection, config = d.config.selection
    state = {key: value.detach() for key, value in d.selection.state_dict().items()}
    options = {key: getattr(config, key) for key in KEPT.get(selection, ())}
    if selection == "topk":
        options["k"] = d.selection.k_inference
    if selection == "pursuit" and config.k_inference:
        options["k"] = config.k_inference
    threshold = state.pop("threshold", None)
    linear = selection in SIGNED or not getattr(config, "relu", True)
    linear = linear or (threshold is not None and bool((threshold < 0).any()))
    atoms, b_dec, skip = d.atoms.rows().detach(), d.b_dec.detach(), d.wiring.skip
    record = Record(
        encoder=atoms if d.encoder is None else d.encoder.detach(), atoms=atoms, b_enc=d.b_enc.detach(), b_dec=b_dec,
        selection=selection, options=options, threshold=threshold, state=state, wiring=name,
        reads=tuple(d.reads), writes=tuple(d.writes), relu="none" if linear else "after",
        skip=None if skip is None else skip.detach(), tied=d.encoder is None,
        per_row=d.wiring.normalise if d.wiring.normalise in ROWS else "none", card=copy.deepcopy(d.card),
    )  # fmt: skip
    return record if d.selection.affine else _with_spaces(record, d, target)


def _with_spaces(record: Record, d: Rows, target: str) -> Record:
    """The record of a dictionary that isn't folded, with its normalisation as pre-bias and scales."""
    if d.norm_in.kind == "whiten":
        raise SaekitError(
            f"selection {record.selection!r} works in the whitened space of normalise = 'whiten', which format {target!r} can't say; train it with 'scale' or 'centre'"
        )
    if d.norm_in.kind == "none":
        return record
    scales = [float(norm.scale) for norm in (d.norm_in, d.norm_out)]
    if record.skip is not None and record.per_row == "none":
        raise SaekitError(
            f"selection {record.selection!r} with a normalisation reads other rows than the skip, which format {target!r} can't say; train it with normalise = 'none'"
        )
    return dataclasses.replace(
        record,
        pre_bias=d.norm_in.mean * scales[0],
        scale_in=scales[0],
        scale_out=scales[1],
        b_dec=record.b_dec + d.norm_out.mean * scales[1],
    )


def refuse_unless(
    record: Record,
    target: str,
    *,
    selections: tuple[str, ...],
    wirings: tuple[str, ...] = ALLOWED["wiring"],
    per_row: tuple[str, ...] = ("none",),
    skip: bool = True,
    linear: bool = False,
) -> None:
    """Raise unless the format named ``target`` can say a record: one sentence with the reason and the way out.

    ``selections``, ``wirings`` and ``per_row`` are those that it knows, ``skip`` whether it has one, and ``linear``
    whether it has selections by rank without a ReLU (beside those that never have one).
    """
    name = record.selection
    if name not in selections:
        rules = "jumprelu" in selections and name in BY_THRESHOLDS
        way = "ask for thresholds (convert --thresholds --sample ACTS, or saekit.calibrate)" if rules else "choose another format"  # fmt: skip
        raise SaekitError(
            f"format {target!r} has no selection {name!r} (it has {', '.join(selections)}); {way}"
        )
    if record.relu == "none" and not linear and name not in SIGNED:
        raise SaekitError(
            f"format {target!r} sets negative codes to 0, and this selection {name!r} keeps them; choose another format"
        )
    if record.wiring not in wirings:
        raise SaekitError(
            f"format {target!r} has no wiring {record.wiring!r} (it has {', '.join(wirings)}); choose another format"
        )
    if record.per_row not in per_row:
        raise SaekitError(
            f"format {target!r} can't say normalise = {record.per_row!r}, which depends on the row and doesn't fold; choose another format"
        )
    if record.skip is not None and not skip:
        raise SaekitError(f"format {target!r} has no skip from input to output; choose another format")
