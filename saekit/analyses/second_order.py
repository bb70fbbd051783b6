"""What a neuron of a CLIP tower does to the image's embedding through the attention behind it, and which words tell of it.

Gandelsman, Efros and Steinhardt 2025, "Interpreting the Second-Order Effects of Neurons in CLIP" (2406.04341). The effect of
neuron n of layer l on image I is the flow through the heads h of later layers l' to the class token, and from there straight to
the output, with attention patterns a and the scales of layer norms taken as they are:

    phi(I) = sum over l' > l, h, tokens i of  p_i(I) a_i(I) P W_VO w_out

with p_i the neuron behind its activation function. It is exactly what the embedding loses without that flow. The layer norms'
weights and centring are part of P and W_VO. What doesn't come from a neuron (biases, the embeddings) stays with the rest.

A path is a head of a later layer. An effect is a sum over paths of one number times one vector of the weights, so it lies in a
space of at most as many dimensions as there are paths: means, norms and singular vectors are taken there, and no batch's effects
[image, neuron, joint] are held.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.analyses.clip_towers import Reading, Tower
from saekit.dictionaries.selection.omp import OMP, OMPConfig
from saekit.types import SaekitError

TOP = 100  # images of the largest effects, which a neuron's direction comes from
SHARE = 0.02  # of images, on which a neuron counts
BLOCK = 1024  # texts that are compared with all at once
TINY = 1e-6  # a length below which a text is none, and a cosine's distance from 1


def paths(tower: Tower, layer: int) -> Float[Tensor, "neuron path joint"]:
    """``P W_VO w_out`` for every neuron of a layer and every path behind it, but for the scales of layer norms."""
    _check_layer(tower, layer)
    out = []
    for later in range(layer + 1, tower.n_layers):
        written = tower.before[later][:, None] * _centred(tower.w_out[layer])
        moved = tower.w_o[later] @ (tower.w_v[later] @ written)  # [head, d, neuron]
        out.append(tower.projection @ (tower.after[:, None] * _centred(moved)))
    return torch.cat(out).permute(2, 0, 1)


def _centred(columns: Tensor) -> Tensor:
    """As a layer norm does it: less their mean over the stream."""
    return columns - columns.mean(-2, keepdim=True)


def amounts(reading: Reading) -> Float[Tensor, "image neuron path"]:
    """How much of each of a neuron's paths an image takes: sum over tokens of ``p_i a_i``, over the layer norms' scales."""
    weights = reading.patterns / reading.scales / reading.last[:, None, None]
    return torch.einsum("bpt,btn->bnp", weights, reading.neurons)


def effects(
    tower: Tower, images: Float[Tensor, "image channel h w"], layer: int
) -> Float[Tensor, "image neuron joint"]:
    """Second-order effects of every neuron of a layer on the embeddings of images, in the embeddings' units."""
    vectors = paths(tower, layer)
    return torch.einsum("bnp,npj->bnj", amounts(_read(tower, images, layer)), vectors)


@dataclass(frozen=True)
class Components:
    """What a set of ``n`` images tells of the effects of a layer's neurons.

    ``mean`` effects; ``direction``, of length 1, towards which most of the largest effects lie from the mean (0 for a neuron
    without effect); ``explained``, the share of these effects' squared distances from the mean that lies along it; ``least``,
    the distance from the mean that ``SHARE`` of images reach, above which a neuron counts.
    """

    layer: int
    n: int
    mean: Float[Tensor, "neuron joint"]
    direction: Float[Tensor, "neuron joint"]
    explained: Float[Tensor, " neuron"]
    least: Float[Tensor, " neuron"]


def components(
    tower: Tower,
    batches: Iterable[Float[Tensor, "_ channel h w"]],
    layer: int,
    top: int = TOP,
    share: float = SHARE,
) -> Components:
    """Means of a layer's effects, and the first right singular vector of the ``top`` farthest from it, for each neuron.

    Goes over the batches twice, and holds one, and ``top`` effects and ``share`` of the images' norms for each neuron.
    """
    if isinstance(batches, Iterator):
        raise SaekitError("batches can be gone over once only; give a list or a loader, which can be gone over again")  # fmt: skip
    if not 0 < share <= 1:
        raise SaekitError(f"share = {share} must lie in (0, 1]")
    vectors = paths(tower, layer)
    n, total = 0, torch.zeros_like(vectors[..., 0])
    for images in batches:
        total = total + amounts(_read(tower, images, layer)).sum(0)
        n += len(images)
    if not 2 <= top <= n:
        raise SaekitError(f"top = {top} must lie in 2..{n}, the number of images; choose fewer, or give more images")  # fmt: skip
    mean, counted = torch.einsum("np,npj->nj", total / n, vectors), max(1, round(share * n))
    basis, inside = _basis(vectors)
    least, largest = vectors.new_zeros(0, len(vectors)), vectors.new_zeros(0, *basis.shape[::2])
    for images in batches:
        between = _between(_read(tower, images, layer), mean, basis, inside)
        largest = _farthest(torch.cat([largest, between]), top)
        distances = torch.cat([least, between.norm(dim=2)])
        least = distances.topk(min(counted, len(distances)), 0).values
    direction, explained = _first(largest)
    return Components(layer, n, mean, torch.einsum("nk,njk->nj", direction, basis), explained, least[-1])


def _basis(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis [neuron, joint, k] of each neuron's paths, and the paths in it [neuron, k, path]."""
    basis, inside = torch.linalg.qr(vectors.mT)
    return basis, inside


def _between(reading: Reading, mean: Tensor, basis: Tensor, inside: Tensor) -> Tensor:
    """What lies between the mean and an image's effects, in the basis [image, neuron, k]."""
    middle = torch.einsum("nj,njk->nk", mean, basis)
    return torch.einsum("bnp,nkp->bnk", amounts(reading), inside) - middle


def _farthest(between: Tensor, top: int) -> Tensor:
    """The ``top`` longest of each neuron's vectors [image, neuron, k]."""
    chosen = between.norm(dim=2).topk(min(top, len(between)), 0).indices
    return between.gather(0, chosen[..., None].expand(-1, -1, between.shape[2]))


def _first(largest: Tensor) -> tuple[Tensor, Tensor]:
    """First right singular vectors [neuron, k] with the sign of most rows, and the share of squares along them."""
    _, values, right = torch.linalg.svd(largest.movedim(1, 0), full_matrices=False)
    along = torch.einsum("ink,nk->in", largest, right[:, 0])
    sign = torch.where(along.sign().sum(0) < 0, -1.0, 1.0)
    squares = values.square()
    whole = squares.sum(1)
    share = squares[:, 0] / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    return right[:, 0] * (sign * (whole > 0))[:, None], share


def replaced(
    tower: Tower, images: Float[Tensor, "image channel h w"], found: Sequence[Components]
) -> Float[Tensor, "image joint"]:
    """Embeddings with the effects of layers replaced: by ``mean + x direction`` where a neuron counts on an image, else by the mean.

    ``x`` is how far the effect lies from the mean along the direction. A neuron counts where its effect's distance from the mean
    is ``least`` or more: with ``least`` = inf nowhere, which is mean ablation. Layers' effects are added up, so give each once.
    """
    if not found or len({one.layer for one in found}) < len(found):
        raise SaekitError(f"found is of layers {[one.layer for one in found]}; give one or more, each once")
    out = _read(tower, images, found[0].layer).output
    for one in found:
        vectors = paths(tower, one.layer)
        basis, inside = _basis(vectors)
        reading = _read(tower, images, one.layer)
        between = _between(reading, one.mean, basis, inside)
        x = torch.einsum("bnk,njk,nj->bn", between, basis, one.direction)
        x = x * (between.norm(dim=2) >= one.least)
        out = out + x @ one.direction - torch.einsum("bnk,njk->bj", between, basis)
    return out


@dataclass(frozen=True)
class Description:
    """The ``k`` texts whose sum tells most of each direction, by falling size of their ``weights``; weights may be negative.

    ``explained`` is the share of the direction's squared length that the sum reaches.
    """

    texts: Int[Tensor, "direction k"]
    weights: Float[Tensor, "direction k"]
    explained: Float[Tensor, " direction"]


def describe(
    directions: Float[Tensor, "direction joint"], texts: Float[Tensor, "text width"], k: int
) -> Description:
    """Directions as sums of ``k`` texts' embeddings, by orthogonal matching pursuit.

    Each embedding is brought to length 1, all are centred by their mean, and brought to length 1 again, so that texts compete by
    their directions alone. (Public code divides each dimension by its norm over the texts instead.) A direction of 0 has weights of 0,
    which explain 0 of it.
    """
    check_axes("directions", directions, "direction", "joint")
    check_axes("texts", texts, "text", "joint")
    atoms = _atoms(texts)
    if directions.shape[1] != texts.shape[1]:
        raise SaekitError(f"directions have width {directions.shape[1]}, and texts {texts.shape[1]}; give texts' embeddings of the same joint space")  # fmt: skip
    if not directions.isfinite().all():
        raise SaekitError("directions hold NaN or Inf; remove them")
    config = OMPConfig(k)
    config.check(len(atoms))
    wanted = directions.to(atoms)
    lengths = wanted.norm(dim=1, keepdim=True)
    wanted = wanted / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    codes = OMP(config, *atoms.shape)(wanted, atoms, atoms.new_zeros(len(atoms)))
    chosen, weights = codes.rectangular()
    order = weights.abs().argsort(dim=1, descending=True, stable=True)
    chosen, weights = chosen.long().gather(1, order), weights.gather(1, order)
    left = (wanted - torch.einsum("nk,nkj->nj", weights, atoms[chosen])).square().sum(1)
    return Description(chosen, weights * lengths, wanted.square().sum(1) - left)


def _atoms(texts: Tensor) -> Tensor:
    """Texts of length 1, centred, of length 1 again, in float64."""
    if not texts.isfinite().all():
        raise SaekitError("texts hold NaN or Inf; leave those out")
    lengths = texts.double().norm(dim=1, keepdim=True)
    if len(none := (lengths[:, 0] <= TINY * lengths.max()).nonzero()):
        raise SaekitError(f"text {int(none[0])} has an embedding of 0, which has no direction; leave it out")
    units = texts.double() / lengths
    centred = units - units.mean(0)
    lengths = centred.norm(dim=1, keepdim=True)
    if len(none := (lengths[:, 0] <= TINY).nonzero()):
        raise SaekitError(f"text {int(none[0])} has the mean of all texts for its embedding, and tells nothing; leave it out")  # fmt: skip
    atoms = centred / lengths
    for first in range(0, len(atoms), BLOCK):
        # of each text the later ones
        near = (atoms[first : first + BLOCK] @ atoms[first:].T).triu(1) >= 1 - TINY
        if len(pairs := near.nonzero()):
            raise SaekitError(f"texts {(pairs[0] + first).tolist()} have the same embedding; leave one of them out")  # fmt: skip
    return atoms


def _read(tower: Tower, images: Tensor, layer: int) -> Reading:
    _check_layer(tower, layer)
    if not images.isfinite().all():
        raise SaekitError("images hold NaN or Inf; leave those images out")
    return tower.read(images, layer)


def _check_layer(tower: Tower, layer: int) -> None:
    if not 0 <= layer < tower.n_layers - 1:
        raise SaekitError(f"layer = {layer} must lie in 0..{tower.n_layers - 2}: behind the last of {tower.n_layers} there is no attention")  # fmt: skip
