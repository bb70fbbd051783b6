"""Dictionaries that begin where others ended: from the weights of any tool, or from another dictionary."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.presets import create
from saekit.dictionaries.rows import as_rows
from saekit.dictionaries.selection import SELECTIONS
from saekit.types import SaekitError


@torch.no_grad()
def from_weights(
    W_enc: Float[Tensor, "d_in feature"],
    W_dec: Float[Tensor, "_feature _d_out"],
    b_enc: Float[Tensor, " _feature"] | None = None,
    b_dec: Float[Tensor, " _d_out"] | None = None,
    *,
    selection: str = "relu",
    threshold: Float[Tensor, "..."] | float | None = None,
    pre_bias: Float[Tensor, " _d_in"] | None = None,
    wiring: str = "autoencoder",
    W_skip: Float[Tensor, "_d_out _d_in"] | None = None,
    **options: Any,
) -> Dictionary:
    """The dictionary ``selection((x - pre_bias) W_enc + b_enc) W_dec + b_dec`` of raw activations, as it is.

    What is left out is 0. ``threshold`` (one for all, or one per feature) needs a selection that has one:
    "jumprelu" or "batchtopk". With ``wiring`` "transcoder" the output may be another width, and ``W_skip`` passes
    the input on. ``options`` are those of the selection, as ``k`` of a "topk".
    """
    for name, matrix in (("W_enc", W_enc), ("W_dec", W_dec)):
        if matrix.ndim != 2:
            raise SaekitError(f"{name} has shape {tuple(matrix.shape)}; give [{'d_in, n_features' if matrix is W_enc else 'n_features, d_out'}]")  # fmt: skip
    made = SELECTIONS[selection]
    if not made.affine or hasattr(made, "tangent"):
        raise SaekitError(f"selection {selection!r} reads x by more than W_enc and b_enc; choose one that doesn't, as 'topk'")  # fmt: skip
    d_in, n_features = W_enc.shape
    if wiring not in ("autoencoder", "transcoder"):
        raise SaekitError(
            f"wiring {wiring!r} has weights of another shape; choose 'autoencoder' or 'transcoder'"
        )
    d_out = d_in if wiring == "autoencoder" else W_dec.shape[1]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "W_dec": (W_dec, (n_features, d_out)), "b_enc": (b_enc, (n_features,)), "b_dec": (b_dec, (d_out,)),
        "pre_bias": (pre_bias, (d_in,)), "W_skip": (W_skip, (d_out, d_in)),
    }  # fmt: skip
    for name, (given, shape) in {"W_enc": (W_enc, (d_in, n_features)), **shapes}.items():
        if given is not None and not given.isfinite().all():
            raise SaekitError(f"{name} holds NaN or Inf; give finite weights")
        if given is not None and given.shape != shape:
            raise SaekitError(
                f"{name} has shape {tuple(given.shape)}; with W_enc [d_in, n_features] = {tuple(W_enc.shape)} it must be {shape}"
            )
    if wiring != "autoencoder":
        options |= {"d_out": d_out, "skip": W_skip is not None}
    elif W_skip is not None:
        raise SaekitError("W_skip is given, and an autoencoder has no skip; choose wiring='transcoder'")
    d = create(
        "relu", wiring=wiring, d_in=d_in, n_features=n_features, selection=selection, atoms="free",
        normalise="none", objective=("reconstruction",), **options,
    )  # fmt: skip
    assert d.encoder is not None  # of free atoms
    d.encoder.copy_(W_enc.T)
    d.atoms.weight.copy_(W_dec)
    bias = torch.zeros(n_features, dtype=torch.float64) if b_enc is None else b_enc.double()
    d.b_enc.copy_(bias if pre_bias is None else bias - pre_bias.double() @ W_enc.double())
    if b_dec is not None:
        d.b_dec.copy_(b_dec)
    if W_skip is not None:
        d.wiring.skip.copy_(W_skip)
    if threshold is not None:
        if not hasattr(d.selection, "threshold"):
            raise SaekitError(
                f"threshold: selection {selection!r} has none; choose 'jumprelu' or 'batchtopk', or leave it out"
            )
        given, own = torch.as_tensor(threshold), d.selection.threshold
        if given.ndim and given.shape != own.shape:
            raise SaekitError(f"threshold has shape {tuple(given.shape)}, and selection {selection!r} one of {tuple(own.shape)}; give that, or one number")  # fmt: skip
        own.copy_(given)
    d.prepared.fill_(True)
    return d


@torch.no_grad()
def warm_start(dictionary: Dictionary, other: Dictionary) -> None:
    """Give a fresh dictionary the features of another, whatever their choices; training then goes on from there.

    It takes the other's normalisation where that is of its kind; else it keeps its own, which must have been
    set (``set_normalisation``), and atoms, encoder, biases and thresholds are brought into its space. Atoms
    that are kept at norm 1 hand their length to the codes. The two are the same function where the selections
    are, but for what lengths and spaces decide: ranks between atoms of several lengths, and pursuits.
    """
    for one in (dictionary, other):
        as_rows(one, "a warm start")
    for field in ("n_features", "d_in", "d_out"):
        mine, theirs = getattr(dictionary, field), getattr(other, field)
        if mine != theirs:
            raise SaekitError(f"{field} = {mine} differs from the {theirs} of the dictionary to begin from")
    weight = getattr(dictionary.atoms, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise SaekitError(
            f"atoms {dictionary.config.atoms[0]!r} are no trained rows of their own that could be taken from another dictionary; choose 'free', 'unit_norm' or 'tied'"
        )
    alike = (dictionary.norm_in.kind, dictionary.norm_in.parts) == (other.norm_in.kind, other.norm_in.parts)
    if not alike and (dictionary.norm_in.by_rows or other.norm_in.by_rows):
        raise SaekitError(
            f"normalise = {dictionary.norm_in.kind!r} is not that of the dictionary to begin from ({other.norm_in.kind!r}), and one goes by each row's own statistics; give both the same"
        )
    if alike and other.normalised:
        dictionary.norm_in.load_state_dict(other.norm_in.state_dict())
        dictionary.norm_out.load_state_dict(other.norm_out.state_dict())
    if not dictionary.normalised:
        raise SaekitError(
            f"normalise = {dictionary.norm_in.kind!r} is not that of the dictionary to begin from ({other.norm_in.kind!r}); call set_normalisation(rows) first"
        )
    read, bias, threshold = other.W_enc.T, other.b_enc.detach(), None
    if hasattr(other.selection, "thresholds"):
        read, bias, threshold = other.selection.thresholds(read, bias)
    raw, shift = other.norm_in.fold(read)
    read, back = dictionary.norm_in.unfold(raw)
    bias = bias.double() + shift + back
    written = dictionary.norm_out.normalised(other.norm_out.directions(other.W_dec.double()))
    length = torch.ones_like(bias)
    if dictionary.atoms.unit or dictionary.encoder_unit:
        length = torch.linalg.vector_norm(written, dim=1).clamp(min=1e-12)
    written, read = written / length[:, None], read * length[:, None]
    if dictionary.encoder_unit:
        read = nn.functional.normalize(read, dim=1)
    if dictionary.encoder is None and not torch.allclose(read, written, rtol=1e-3, atol=1e-3):
        raise SaekitError(
            f"atoms {dictionary.config.atoms[0]!r} read by the rows that they write, and the dictionary to begin from reads by others here; choose 'unit_norm' or 'free'"
        )
    weight.copy_(written)
    if dictionary.encoder is not None:
        dictionary.encoder.copy_(read)
    bias, threshold = bias * length, None if threshold is None else threshold.double() * length
    _route(dictionary, other)
    if hasattr(dictionary.selection, "begin"):
        bias = dictionary.selection.begin(bias, threshold)
        dictionary.prepared.fill_(threshold is not None)
    if not dictionary.encoder_unit:
        dictionary.b_enc.copy_(bias)
    centre = other.norm_out.unscaled(other.b_dec.double()[None]) + _skip(dictionary, other)
    if dictionary.norm_out.by_rows:  # the same rows, in the same units
        dictionary.b_dec.copy_(dictionary.norm_out.normalised(centre - dictionary.norm_out.mean)[0])
    else:
        dictionary.b_dec.copy_(dictionary.norm_out(centre)[0])


def _route(dictionary: Dictionary, other: Dictionary) -> None:
    """Bring along the weights by which both selections read the input themselves."""
    mine, theirs = dictionary.selection, other.selection
    if not (
        hasattr(mine, "router") and hasattr(theirs, "router") and mine.router.shape == theirs.router.shape
    ):
        return
    raw, shift = other.norm_in.fold(theirs.router)
    read, back = dictionary.norm_in.unfold(raw)
    mine.router.copy_(read)
    mine.b_router.copy_(theirs.b_router.double() + shift + back)


def _skip(dictionary: Dictionary, other: Dictionary) -> Tensor:
    """Bring the other's skip along; returns the bias that it adds to the output, in the units of the model."""
    mine, theirs = dictionary.wiring.skip, other.wiring.skip
    if theirs is None:
        if mine is not None:
            mine.zero_()
        return torch.zeros((), dtype=torch.float64, device=dictionary.device)
    if mine is None:
        raise SaekitError("skip = False, and the dictionary to begin from has a skip; choose skip=True")
    raw, shift = other.norm_in.fold(theirs)
    raw = other.norm_out.directions(raw.T).T
    read, back = dictionary.norm_in.unfold(raw)
    mine.copy_(dictionary.norm_out.normalised(read.T).T)
    return other.norm_out.directions(shift[None]) + back
