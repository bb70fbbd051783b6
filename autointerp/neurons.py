"""Neurons of MLPs: where they stand, when they fire and what they, or a dictionary's features, write to the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.models import Model
from saekit.types import ActivationBatch, Codes, SaekitError

# a block's projections and what stands between them, as the families of transformers call them
PROJECTIONS = (("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"), ("fc1", "fc2"))  # fmt: skip
ACTIVATIONS = ("act", "act_fn", "activation_fn")
LAST = ("ln_f", "norm", "final_layer_norm")


@dataclass(frozen=True)
class Logits:
    """What features write to the logits directly: ``directions`` [feature, d] through the last norm's gain and ``W_U``.

    The norm's division is left out: it is the same for all tokens.
    """

    directions: Float[Tensor, "feature d"]
    gain: Float[Tensor, " d"]
    centred: bool
    W_U: Float[Tensor, "vocabulary d"]

    def _moved(self, directions: Float[Tensor, "row d"]) -> Float[Tensor, "row vocabulary"]:
        if self.centred:
            directions = directions - directions.mean(-1, keepdim=True)
        return (directions.to(self.W_U) * self.gain) @ self.W_U.T

    def effects(self, directions: Float[Tensor, "row d"]) -> Float[Tensor, "row vocabulary"]:
        """What each direction adds to the logits, about their mean."""
        logits = self._moved(directions)
        return logits - logits.mean(-1, keepdim=True)

    def ranks(
        self, directions: Float[Tensor, "row d"], tokens: Int64[ndarray, " token"]
    ) -> Float64[ndarray, "row token"]:
        """Share of the vocabulary whose logits each direction leaves below those of ``tokens``, ties counted half."""
        logits = self._moved(directions)
        own = logits[:, torch.from_numpy(tokens).to(logits.device)].contiguous()
        ordered = logits.sort(-1).values
        below, to = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
        return ((below + to - 1).double() / 2 / max(1, logits.shape[1] - 1)).cpu().numpy()


@torch.no_grad()
def directions_of(
    dictionary: Dictionary, features: Sequence[int] | None = None
) -> Float[Tensor, "feature d"] | None:
    """What each feature (or each of some) writes, in the model's units; None where that is not one direction at one place."""
    if dictionary.wiring.kind == "transforms" or len(dictionary.wiring.parts_out) > 1:
        return None
    rows = dictionary.W_dec if features is None else dictionary.W_dec[list(features)]
    return dictionary.norm_out.directions(rows).detach()


def logits_of(model: Model, directions: Tensor) -> Logits | None:
    """The way of directions to the logits; None where they are not as wide as the unembedding's rows."""
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    head = head if head is not None else getattr(model.module, "lm_head", None)
    if head is None or head.weight.shape[1] != directions.shape[1]:
        return None
    W_U, width = head.weight.detach().float(), directions.shape[1]
    norms = [m for name, m in model.module.named_modules() if name.rpartition(".")[2] in LAST]
    norms = [m for m in norms if any(p.shape == (width,) for p in m.parameters())]
    gain = _gain(norms[-1], width).to(W_U) if norms else W_U.new_ones(width)
    return Logits(directions.to(W_U), gain, bool(norms) and isinstance(norms[-1], nn.LayerNorm), W_U)


@dataclass(frozen=True)
class Neurons:
    """The neurons of an MLP: ``written`` [neuron, d] each.

    ``points`` are where its non-linearity is given its input and, of a gated MLP, where what the gate multiplies is.
    """

    points: tuple[str, ...]
    threshold: float
    written: Float[Tensor, "neuron d"]

    def codes(self, batch: ActivationBatch) -> Codes:
        """Where neurons fire: 1, and -1 where the gate multiplies something negative."""
        for point in self.points:
            check_finite(batch, point)
        fires, *gated = (batch.activations[point] for point in self.points)
        on = (fires > self.threshold).float()
        return Codes.from_dense(on * gated[0].sign() if gated else on)


def check_finite(batch: ActivationBatch, point: str) -> None:
    """Raise where activations that count are no numbers."""
    if not torch.isfinite(batch.activations[point][batch.mask]).all():
        raise SaekitError(f"activations at {point!r} hold NaN or Inf; find what makes the model overflow")


def neurons_of(model: Model, hook_point: str, threshold: float | None) -> Neurons:
    """The neurons of the MLP at a hook point; a ``threshold`` of None is 0 where the activation allows it."""
    site = model.site(hook_point)
    module: Any = site.module
    pair = next((p for p in PROJECTIONS if all(hasattr(module, name) for name in p)), None)
    if pair is None:
        raise SaekitError(
            f"hook point {hook_point!r} is a {type(module).__name__}, and neurons are found in an MLP with {', '.join('/'.join(p) for p in PROJECTIONS)}; name it, as in blocks.1.mlp"
        )
    if threshold is None:
        act = getattr(module, next((name for name in ACTIVATIONS if hasattr(module, name)), ""), None)
        if act is None or not _rectifies(act):
            raise SaekitError(
                f"threshold is not given, and {hook_point!r} has a {type(act).__name__}, which doesn't say where a neuron begins to fire; give threshold="
            )
        threshold = 0.0
    out = getattr(module, pair[1])
    written = out.weight.detach().float()
    written = written.T if isinstance(out, nn.Linear) else written  # of GPT-2: [in, out]
    block: Any = dict(model.module.named_modules()).get(site.path.rpartition(".")[0])
    after = getattr(block, "post_feedforward_layernorm", None)
    if after is not None:  # what the MLP adds is normalised first
        written = written * _gain(after, written.shape[1]).to(written)
    names = ("gate_proj", pair[0]) if getattr(module, "gate_proj", None) is not None else pair[:1]
    return Neurons(tuple(f"{site.path}.{name}" for name in names), threshold, written)


@torch.no_grad()
def _rectifies(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation lets through what is above 0 and at most a 50th as much of what is below."""
    u = torch.cat([torch.linspace(0.01, 4, 200), torch.tensor([20.0])])
    return bool((act(u) > 0).all() and (act(-u) <= 0).all() and act(-u[-1:]).abs() <= act(u[-1:]) / 50)


@torch.no_grad()
def _gain(norm: nn.Module, width: int) -> Tensor:
    """What a norm multiplies each dimension by once a row's mean square is 1 (its weight; of Gemma 1 more)."""
    weight: Any = next(norm.parameters())
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean()
    given = (1e3 * x).to(weight)
    return (
        ((norm(given) - norm(torch.zeros_like(given))) / x.to(weight)) * x.square().mean().sqrt().to(weight)
    )[0]
