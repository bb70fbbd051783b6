"""Dictionaries made from dictionaries: other objectives, thresholds for a wanted L0, fewer features."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.dictionaries.config import CHOICES, Config, configure
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.kinds import build
from saekit.dictionaries.rows import Rows, as_rows
from saekit.dictionaries.selection import SELECTIONS
from saekit.kernels import threshold_encode
from saekit.registry import nearest
from saekit.types import SaekitError

NOT_THRESHOLDS = {
    "abstopk": "its codes have signs, and a threshold lets none below 0 through",
    "omp": "its codes have signs, and a threshold lets none below 0 through",
    "iterative": "its codes have signs, and a threshold lets none below 0 through",
    "unrolled": "its codes have signs, and a threshold lets none below 0 through",
    "switch": "its codes depend on the router too",
    "codebook": "its codes are 1, and a threshold's are the pre-activations",
}
TIED = 0.01  # relative difference of an L0 from the one asked for that is said
NEAR = 0.05  # relative difference of the offsets at which two features still fire together
GROUPED = {
    "groupmax": "k",
    "switch": "experts",
    "codebook": "groups",
}  # of equal size, which dropping features breaks


def with_objective(dictionary: Dictionary, objective: "str | tuple[str, ...]", **options: Any) -> Dictionary:
    """The same dictionary, weights and all, that minimises something else; for going on with training.

    ``options`` are the fields of the new terms, as in :func:`create`.
    """
    names = (objective,) if isinstance(objective, str) else tuple(objective)
    unused = set(options)
    terms = tuple((name, configure(CHOICES["objective"], name, options, unused)) for name in names)
    if unused:
        known = sorted({f for _, config in terms for f in vars(config)})
        field = sorted(unused)[0]
        raise SaekitError(f"option {field!r} is not one of objective {names}{nearest(field, known)}")
    changed = build(dataclasses.replace(dictionary.config, objective=terms), dictionary.seed)
    mine = {k: v for k, v in dictionary.state_dict().items() if not k.startswith("terms.")}
    changed.load_state_dict({**changed.state_dict(), **mine})
    return _described(changed, dictionary)


def _described(new: Dictionary, old: Dictionary) -> Dictionary:
    new.reads, new.writes, new.card = old.reads, old.writes, copy.deepcopy(old.card)
    return new.to(old.device)


@torch.no_grad()
def calibrate(dictionary: Dictionary, rows: Float[Tensor, "batch *seq d_in"], k: float) -> Dictionary:
    """A JumpReLU dictionary of raw activations whose mean L0 on ``rows`` (whole sequences for a Lorsa) is exactly k.

    Where equal pre-activations stand at the threshold that k needs, it is the nearer of both sides, and a warning says so.

    Rows should be held out from training. One shift moves the thresholds that the selection's rule at
    inference comes down to (0 for rules by rank), so their differences stay. Encoder and decoder are the
    dictionary's; for a pursuit that means codes by one look instead of step by step, so measure the FVU. The layers
    of a cross-layer transcoder get k in equal shares.
    """
    if isinstance(dictionary, CrossLayer):
        return _calibrated_layers(dictionary, rows, k)
    dictionary = as_rows(dictionary, "calibrate()", alike=False)
    name = dictionary.config.selection[0]
    if name in NOT_THRESHOLDS:
        raise SaekitError(f"selection {name!r} can't be calibrated: {NOT_THRESHOLDS[name]}")
    whole = dictionary.wiring.kind == "sequences"
    if rows.ndim != 2 + whole or rows.shape[-1] != dictionary.d_in:
        expected = "batch, seq" if whole else "rows"
        raise SaekitError(
            f"rows have shape {tuple(rows.shape)}; expected [{expected}, d_in = {dictionary.d_in}]"
        )
    weight, bias = dictionary.W_enc.T, dictionary.b_enc.detach()
    base = torch.zeros_like(bias)
    if hasattr(dictionary.selection, "thresholds"):
        weight, bias, base = dictionary.selection.thresholds(weight, bias)
    n = rows.shape[:-1].numel()
    wanted = round(k * n)
    if not 0 < k <= dictionary.n_features or wanted < 1:
        raise SaekitError(
            f"k = {k} must lie in 0..n_features = {dictionary.n_features}, and give a code on {n} rows"
        )
    # counted by what will be run: folded, by the kernel whose every bit is the same for every batch
    selection = ("jumprelu", SELECTIONS["jumprelu"].Config())
    out = dictionary.folded(selection, weight, bias, {"threshold": base.clamp(min=0)})
    assert out.encoder is not None  # of its own

    def above() -> Iterator[Tensor]:
        """By how much pre-activations lie above their thresholds; what lies below 0 can't become a code."""
        for block in rows.split(max(1, 2048 * len(rows) // n)):
            read = out.read(block.to(bias))
            _, indices, u = threshold_encode(read, out.encoder, out.b_enc, torch.zeros_like(base))
            yield u - base[indices.long()]

    best = torch.empty(0, device=bias.device)
    for some in above():
        best = torch.cat([best, some])
        best = best.topk(min(len(best), wanted + 1)).values
    if len(best) < wanted:
        raise SaekitError(
            f"k = {k} is more than the {len(best) / n:.1f} positive pre-activations of a row; ask for fewer"
        )
    # between the last that passes and the first that doesn't; below all where all that are positive pass
    cut = (best[wanted - 1] + best[wanted]) / 2 if len(best) > wanted else -base.max()
    if len(best) > wanted and best[wanted - 1] == best[wanted]:
        cut = _beside(best[wanted], k, n, int((best > best[wanted]).sum()), sum(int((some >= best[wanted]).sum()) for some in above()))  # fmt: skip
    out.selection.threshold.copy_((base + cut).clamp(min=0))
    return out


def _beside(tie: Tensor, k: float, n: int, fewer: int, more: int) -> Tensor:
    """Above or below pre-activations that are equal, whichever gives an L0 nearer to k on n rows."""
    down = more - k * n < k * n - fewer
    found = (more if down else fewer) / n
    if abs(found - k) > TIED * k:
        warnings.warn(f"{more - fewer} pre-activations are equal at the threshold that k = {k} needs, so that L0 is {found:.3g}; give rows that differ", stacklevel=3)  # fmt: skip
    return tie.nextafter(tie.new_tensor(-torch.inf if down else torch.inf))


def _calibrated_layers(d: CrossLayer, rows: Tensor, k: float) -> CrossLayer:
    if rows.ndim != 2 or rows.shape[-1] != d.d_in:
        raise SaekitError(f"rows have shape {tuple(rows.shape)}; expected [rows, d_in = {d.d_in}]")
    inputs = rows.split(d.wiring.parts_in, 1)
    pairs = [(d.whole_part(layer), x.contiguous()) for layer, x in enumerate(inputs)]
    return d.assembled([as_rows(calibrate(part, x, k / d.layers), "calibrate()") for part, x in pairs])


@torch.no_grad()
def duplicates(dictionary: Dictionary, cosine: float = 0.99) -> Int[Tensor, " feature"]:
    """For every feature the first one that it copies and that copies none itself; itself where there is none before it.

    A copy's atom and encoder both have at least this cosine with the other's. Where each feature decides by
    itself at inference, the two also fire together: how far along its encoder's direction a row must lie for a
    feature to fire, ``(threshold - bias) / ||encoder||``, differs by at most 5 % of the larger. Copies of
    another size have the same offset.
    """
    dictionary = as_rows(dictionary, "duplicates()")
    if not -1 <= cosine <= 1:
        raise SaekitError(f"cosine = {cosine} must lie in -1..1; 0.99 finds near copies")
    sides = [torch.nn.functional.normalize(w, dim=-1) for w in (dictionary.W_dec, dictionary.W_enc.T)]
    offsets = _offsets(dictionary)
    first = np.arange(dictionary.n_features)
    for start in range(0, len(first), 1024):
        block, before = slice(start, start + 1024), slice(start + 1024)
        alike = torch.stack([side[block] @ side[before].T for side in sides]).amin(0) >= cosine
        mine, theirs = offsets[block, None], offsets[None, before]
        larger = torch.maximum(mine.abs(), theirs.abs())
        alike &= (mine - theirs).abs() <= NEAR * larger + 1e-6  # by which 0 is rounded
        for i, row in enumerate(alike.tril(start - 1).cpu().numpy(), start):
            copied = row.nonzero()[0]
            copied = copied[first[copied] == copied]  # what is a copy itself stands for another
            first[i] = copied[0] if len(copied) else i
    return torch.from_numpy(first).to(dictionary.device)


def _offsets(dictionary: Rows) -> Float[Tensor, " feature"]:
    """Where along its encoder's direction each feature begins to fire; 0 for all where features compete."""
    weight, bias = dictionary.W_enc.T, dictionary.b_enc
    if not getattr(dictionary.selection, "elementwise", False):
        return torch.zeros_like(bias)
    threshold = torch.zeros_like(bias)
    if hasattr(dictionary.selection, "thresholds"):
        weight, bias, threshold = dictionary.selection.thresholds(weight, bias)
    return (threshold - bias) / torch.linalg.vector_norm(weight, dim=1).clamp(min=1e-12)


@torch.no_grad()
def prune(
    dictionary: Dictionary,
    keep: Bool[Tensor, " feature"],
    onto: Int[Tensor, " feature"] | None = None,
) -> tuple[Dictionary, Int[Tensor, " feature"]]:
    """The dictionary with some features only, and where each went: its new index, or -1.

    Dropped features may be mapped ``onto`` others (see :func:`duplicates`), whose new index they then
    get. Weights, thresholds and statistics of the kept ones are unchanged, so outputs are the same where no
    dropped feature was active.
    """
    as_rows(dictionary, "prune()")
    n_old = dictionary.n_features
    if not isinstance(keep, Tensor):
        raise SaekitError(f"keep is of type {type(keep).__name__}; give a tensor of {n_old} bools")
    if keep.dtype != torch.bool or keep.shape != (n_old,):
        raise SaekitError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}; give one bool for each of n_features = {n_old}"
        )
    name = dictionary.config.selection[0]
    groups = getattr(dictionary.config.selection[1], GROUPED[name]) if name in GROUPED else 1
    if groups > 1:
        raise SaekitError(
            f"selection {name!r} has {GROUPED[name]} = {groups} groups of equal size, which pruning would break"
        )
    if getattr(dictionary.atoms, "shifts_over_rows", False):
        raise SaekitError(
            f"atoms {dictionary.config.atoms[0]!r} are shifts of kernels, none of which can go alone; prune what to_inference() gives"
        )
    n_new = int(keep.sum())
    if n_new == 0:
        raise SaekitError("keep holds no feature; a dictionary needs one")
    if onto is not None:
        _check_onto(onto, n_old)
    remap = torch.full((n_old,), -1, device=keep.device)
    remap[keep] = torch.arange(n_new, device=keep.device)
    if onto is not None:
        remap = torch.where(keep, remap, remap[onto])
    new = build(_narrowed(dictionary.config, keep), dictionary.seed)
    wanted, state = new.state_dict(), {}
    for key, value in dictionary.state_dict().items():
        fits = wanted[key].shape == value.shape
        state[key] = value if fits else value[keep]
    new.load_state_dict(state)
    return _described(new, dictionary), remap


def _check_onto(onto: Any, n: int) -> None:
    """Raise unless it names a feature for each feature."""
    if not isinstance(onto, Tensor) or onto.dtype not in (torch.int32, torch.int64) or onto.shape != (n,):
        given = (
            f"{onto.dtype} of shape {tuple(onto.shape)}" if isinstance(onto, Tensor) else type(onto).__name__
        )
        raise SaekitError(f"onto is {given}; give one index for each of n_features = {n}")
    if not 0 <= onto.min() <= onto.max() < n:
        raise SaekitError(
            f"onto holds {int(onto.min())}..{int(onto.max())}; its indices must lie in 0..{n - 1}, as duplicates() gives them"
        )


@torch.no_grad()
def merge(
    dictionary: Dictionary, onto: Int[Tensor, " feature"]
) -> tuple[Dictionary, Int[Tensor, " feature"]]:
    """Add features up with those that they copy, and where each went; a dictionary of raw activations.

    ``onto[i]`` is the feature that i is merged with, itself where it stays (see :func:`duplicates`). The
    merged atom is the sum, each as long as its encoder makes its code, so features whose encoders (biases,
    thresholds) are multiples of each other leave outputs unchanged. Of selections where each feature
    decides by itself at inference; rules by rank give copies a place each.
    """
    as_rows(dictionary, "merge()")
    name = dictionary.config.selection[0]
    if not getattr(dictionary.selection, "elementwise", False):
        raise SaekitError(
            f"selection {name!r} lets copies compete, so they can't be added up; calibrate() it first, or prune()"
        )
    n = dictionary.n_features
    _check_onto(onto, n)
    if not torch.equal(onto[onto], onto):
        raise SaekitError("onto must name for each feature one that stays: onto[onto] = onto")
    d = dictionary.to_inference()
    assert d.encoder is not None  # of its own
    length = torch.linalg.vector_norm(d.encoder.double(), dim=1).clamp(min=1e-300)
    ratio = (length / length[onto]).to(d.dtype)
    keep = onto == torch.arange(len(onto), device=onto.device)
    summed = torch.zeros_like(d.atoms.weight).index_add_(0, onto, d.atoms.weight * ratio[:, None])
    d.atoms.weight.copy_(torch.where(keep[:, None], summed, d.atoms.weight))
    return prune(d, keep, onto)


def _narrowed(config: Config, keep: Tensor) -> Config:
    """The config for the kept features: prefixes end where they ended, candidates stay as many, and dedicated ones are counted anew."""
    n_old, n_new = config.n_features, int(keep.sum())
    below = keep.cpu().cumsum(0)
    terms = []
    for name, term in config.objective:
        if name == "matryoshka" and not term.random:
            ends = sorted({int(below[p - 1]) for p in term.fixed(n_old)} - {0} | {n_new})
            term = dataclasses.replace(term, prefixes=tuple(ends))
        terms.append((name, term))
    wiring = config.wiring
    if counts := getattr(wiring[1], "dedicated", None):
        ends = [n_old - sum(counts), *(n_old - sum(counts[i + 1 :]) for i in range(len(counts)))]
        kept = tuple(int(keep[a:b].sum()) for a, b in pairwise(ends))
        wiring = (wiring[0], dataclasses.replace(wiring[1], dedicated=kept))
    atoms = config.atoms
    if atoms[0] == "archetypal" and atoms[1].candidates is None:
        atoms = (atoms[0], dataclasses.replace(atoms[1], candidates=n_old))
    return dataclasses.replace(config, n_features=n_new, objective=tuple(terms), atoms=atoms, wiring=wiring)
