"""What a decomposition needs of a CLIP-like image tower: its weights, and what a forward pass settles.

A tower is a stack of pre-norm layers over a class token and an image's patches; its output is the projection of the class token
behind a last layer norm. :func:`clip_tower` reads transformers' CLIP models; another tower is given as a :class:`Tower`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.hooks import Site, capture
from saekit.types import SaekitError


@dataclass(frozen=True)
class Reading:
    """What one batch settles for the ``path`` behind a layer, which are the heads of all later layers, in their order.

    ``neurons`` behind their activation function; ``patterns``, the class token's attention; ``scales`` that the layer norm
    before each head's layer divides a token by, and ``last`` that of the layer norm at the end, each with its epsilon;
    ``output``, the image's embedding.
    """

    neurons: Float[Tensor, "image token neuron"]
    patterns: Float[Tensor, "image path token"]
    scales: Float[Tensor, "image path token"]
    last: Float[Tensor, " image"]
    output: Float[Tensor, "image joint"]


@dataclass(frozen=True)
class Tower:
    """Weights of all layers, as columns are multiplied by them, and ``read(images, layer)``.

    ``before`` and ``after`` are the weights of the layer norms before each attention and at the end. Biases aren't needed: no
    effect of a neuron depends on them, given what a :class:`Reading` holds.
    """

    w_out: Float[Tensor, "layer d neuron"]
    before: Float[Tensor, "layer d"]
    w_v: Float[Tensor, "layer head d_head d"]
    w_o: Float[Tensor, "layer head d d_head"]
    after: Float[Tensor, " d"]
    projection: Float[Tensor, "joint d"]
    read: Callable[[Tensor, int], Reading]

    @property
    def n_layers(self) -> int:
        """Number of layers; those before the last have attention behind them."""
        return len(self.w_out)


def clip_tower(model: nn.Module) -> Tower:
    """The image tower of transformers' ``CLIPModel``, ``CLIPVisionModelWithProjection`` or ``CLIPVisionModel``.

    The last has no projection: its effects are on what it pools. Weights in half precision are read in float32. A model whose
    tower is built otherwise is refused.
    """
    root: Any = getattr(model, "vision_model", model)
    try:
        blocks, last = list(root.encoder.layers), root.post_layernorm
        heads = blocks[0].self_attn.num_heads
        if hasattr(root, "head"):  # SigLIP: it pools all tokens by attention
            raise AttributeError("no class token")
        weights = {
            "w_out": torch.stack([b.mlp.fc2.weight for b in blocks]),
            "before": torch.stack([b.layer_norm1.weight for b in blocks]),
            "w_v": torch.stack([b.self_attn.v_proj.weight.unflatten(0, (heads, -1)) for b in blocks]),
            "w_o": torch.stack([b.self_attn.out_proj.weight.unflatten(1, (heads, -1)).movedim(1, 0) for b in blocks]),
            "after": last.weight,
        }  # fmt: skip
        projection = getattr(model, "visual_projection", None)
        weights["projection"] = torch.eye(len(last.weight)).to(last.weight) if projection is None else projection.weight  # fmt: skip
    except (AttributeError, TypeError, IndexError) as error:
        raise SaekitError(f"a {type(model).__name__} is not built as transformers' CLIP models ({error}); give one of those, or its parts as a Tower") from error  # fmt: skip
    model.eval()

    def read(images: Tensor, layer: int) -> Reading:
        return _read(root, weights["projection"].detach(), images, layer)

    return Tower(**{name: _full(one) for name, one in weights.items()}, read=read)


def _full(one: Tensor) -> Tensor:
    return one.detach() if one.dtype == torch.float64 else one.detach().float()


def _read(root: Any, projection: Tensor, images: Tensor, layer: int) -> Reading:
    blocks = list(root.encoder.layers)
    sites = {"neurons": Site(blocks[layer].mlp.fc2, "in", "mlp.fc2")}
    for i, block in enumerate(blocks[layer + 1 :]):
        sites[f"stream {i}"] = Site(block.layer_norm1, "in", "layer_norm1")
        sites |= {f"{p} {i}": Site(getattr(block.self_attn, f"{p}_proj"), "out", p) for p in "qk"}
    sites |= {side: Site(root.post_layernorm, side, "post_layernorm") for side in ("in", "out")}
    found = {name: _full(one) for name, one in capture(lambda: root(pixel_values=images), sites).items()}
    patterns, scales = [], []
    for i, block in enumerate(blocks[layer + 1 :]):
        q, k = (found[f"{p} {i}"].unflatten(2, (block.self_attn.num_heads, -1)) for p in "qk")
        patterns.append((torch.einsum("bhe,bthe->bht", q[:, 0], k) * block.self_attn.scale).softmax(2))
        scales.append(_scale(found[f"stream {i}"], block.layer_norm1)[:, None].expand_as(patterns[-1]))
    return Reading(
        found["neurons"], torch.cat(patterns, 1), torch.cat(scales, 1), _scale(found["in"], root.post_layernorm),
        found["out"] @ _full(projection).T,
    )  # fmt: skip


def _scale(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return (x.var(-1, correction=0) + norm.eps).sqrt()
