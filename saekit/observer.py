"""A model that reads texts once, and the one direction in its stream that tells of a label (O'Neill et al. 2025, 2507.23221).

The label may be of texts that any model or person wrote, as that an answer contradicts its context. A probe reads the
stream behind a text's last token, in the earliest layer where it ranks other texts as well as in the best. Its direction can be
followed back to neurons by gradient x activation. Steer by the difference of the classes' means: what a probe reads best is
where classes differ and little else does, which need not be what later layers read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.hooks import Clock, capture, intervene, passes
from saekit.interventions import Text
from saekit.models import Model, load_model
from saekit.probes import Probe, auroc, auroc_error, linear
from saekit.types import SaekitError

Tokens: TypeAlias = Sequence[Int[Tensor, "_"]] | Int[Tensor, "_ _"]  # texts of any lengths
Read: TypeAlias = tuple[Tokens, Bool[Tensor, "_"]]
AT_ONCE = 64  # texts of a forward pass


@dataclass(frozen=True)
class Observer:
    """``observer(tokens)`` is the log odds of the label of each text, in nats, where both classes are as frequent.

    ``aurocs``: of each hook point's probe on texts that it wasn't fitted on; ``hook_point`` is the first that is within a
    standard error of the highest. ``means``: by how much the mean of labelled texts differs there from that of others, in
    the stream's units.
    """

    model: Model
    hook_point: str
    probe: Probe
    means: Float[Tensor, " d"]
    aurocs: Mapping[str, float]

    def __call__(self, tokens: Tokens) -> Float[Tensor, " text"]:
        """Log odds of each text, at its last token."""
        return self.probe(read(self.model, tokens, [self.hook_point])[self.hook_point])

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """The probe's weights at length 1, in the stream's units."""
        return self.probe.direction


def read(model: "Model | str | nn.Module", tokens: Tokens, hook_points: Sequence[str]) -> dict[str, Float[Tensor, "text d"]]:  # fmt: skip
    """What stands at hook points behind the last token of each text."""
    model = load_model(model)
    sites = {point: model.site(point) for point in hook_points}
    out: dict[str, Tensor] = {}
    for at, batch in _batches(tokens):
        seen = capture(partial(model, _given(model, batch)), sites)
        for point, x in seen.items():
            if point not in out:
                out[point] = x.new_zeros(len(tokens), x.shape[-1])
            out[point][at.to(x.device)] = x[:, -1]
    return out


def observe(
    model: "Model | str | nn.Module", fitted: Read, held_out: Read, hook_points: Sequence[str], seed: int = 0
) -> Observer:
    """Fit a probe at each hook point to texts and labels, and keep the first that is as good as any on ``held_out``.

    That is the first in ``hook_points`` whose AUROC is within its standard error of the highest: the earlier one, the
    more of the model is still to read what is pushed there. Penalties are chosen within ``fitted``, by ``seed``. What is
    said of the hook point is slightly too good, since it was chosen by the same texts: judge it on others.
    """
    model = load_model(model)
    if not hook_points:
        raise SaekitError("hook_points is empty; name at least one, for example blocks.1.hook_resid_post")
    for name, (tokens, labels) in (("fitted", fitted), ("held_out", held_out)):
        if len(tokens) != len(labels):
            raise SaekitError(f"{name} has {len(tokens)} texts and {len(labels)} labels; give one for each")
    own, other = (read(model, tokens, hook_points) for tokens, _ in (fitted, held_out))
    probes = {point: linear(x, fitted[1], seed=seed) for point, x in own.items()}
    aurocs = {point: auroc(probe(other[point]), held_out[1]) for point, probe in probes.items()}
    highest, true = max(aurocs.values()), int(held_out[1].sum())
    errors = {point: auroc_error(value, true, len(held_out[1]) - true) for point, value in aurocs.items()}
    point = next(point for point in hook_points if highest - aurocs[point] <= errors[point])
    means = own[point][fitted[1]].mean(0) - own[point][~fitted[1]].mean(0)
    return Observer(model, point, probes[point], means, aurocs)


def localise(
    observer: Observer, tokens: Tokens, neurons: Sequence[str]
) -> dict[str, Float[Tensor, " neuron"]]:
    """Gradient x activation of the log odds by neuron: summed over positions, mean over texts, in nats.

    ``neurons`` are hook points of activations, as ``blocks.0.mlp.act_fn``; those behind the observer's hook point get 0.
    """
    model = observer.model
    sites = {point: model.site(point) for point in neurons}
    totals: dict[str, Tensor] = {}
    for _, batch in _batches(tokens):
        seen: dict[str, Tensor] = {}
        places = [*sites.items(), (observer.hook_point, model.site(observer.hook_point))]
        with torch.enable_grad(), intervene([(site, partial(_keep, seen, point)) for point, site in places]):
            model(_given(model, batch))
        odds = observer.probe(seen[observer.hook_point][:, -1]).sum()
        acts = [seen[point] for point in sites]
        for point, x, g in zip(sites, acts, torch.autograd.grad(odds, acts, allow_unused=True), strict=True):
            effect = torch.zeros_like(x) if g is None else g * x.detach()
            totals[point] = totals.get(point, 0.0) + effect.sum((0, 1))
    return {point: total / len(tokens) for point, total in totals.items()}


def strongest(effects: Mapping[str, Float[Tensor, " neuron"]], n: int) -> dict[str, Int[Tensor, " chosen"]]:
    """The ``n`` neurons of the largest effects, by hook point; the first of equals."""
    total = sum(len(effect) for effect in effects.values())
    if not 1 <= n <= total:
        raise SaekitError(f"n = {n} must lie in 1..{total}, the number of neurons; choose a smaller n")
    order = torch.cat(list(effects.values())).sort(descending=True, stable=True).indices[:n]
    return split(effects, order)


def split(
    effects: Mapping[str, Float[Tensor, " neuron"]], chosen: Int[Tensor, " chosen"]
) -> dict[str, Int[Tensor, " own"]]:
    """Neurons that are counted over all hook points, in their order, as neurons of each."""
    out: dict[str, Tensor] = {}
    first = 0
    for point, effect in effects.items():
        own = chosen[(chosen >= first) & (chosen < first + len(effect))] - first
        if len(own):
            out[point] = own
        first += len(effect)
    return out


@contextmanager
def without(model: "Model | str | nn.Module", neurons: Mapping[str, Int[Tensor, " chosen"]]) -> Iterator[Model]:  # fmt: skip
    """Run the model with activations of some neurons at 0; the hooks are gone when the context ends, however it ends."""
    model = load_model(model)

    def silence(own: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.index_fill(-1, own.to(x.device), 0.0)

    with intervene([(model.site(point), silence(own)) for point, own in neurons.items()]):
        yield model


@contextmanager
def pushed(
    model: "Model | str | nn.Module", hook_point: str, vector: Float[Tensor, " d"], positions: Sequence[int] | None = None
) -> Iterator[Model]:  # fmt: skip
    """Run the model with a vector added to what stands at a hook point, also in generation.

    ``positions`` count from the text's beginning (None: everywhere); those beyond its end may be reached in generation.
    Padding is left alone.
    """
    model = load_model(model)
    at = None if positions is None else [int(position) for position in positions]
    if at is not None and min(at, default=0) < 0:
        raise SaekitError(f"position {min(at)} must be counted from the text's beginning, from 0")

    def add(x: Tensor, clock: Clock) -> Tensor:
        if x.shape[-1] != len(vector):
            raise SaekitError(f"vector is {len(vector)} wide, and {hook_point!r} {x.shape[-1]}; give one of its width")  # fmt: skip
        text = Text.of(clock, x)
        here = text.real
        if at is not None:
            here = here & torch.isin(text.at, torch.tensor(at, device=x.device))
        return torch.where(here[..., None], x + vector.to(x), x)

    with passes(model.module) as clock, intervene([(model.site(hook_point), partial(add, clock=clock))]):
        yield model


def _keep(seen: dict[str, Tensor], point: str, x: Tensor) -> Tensor:
    """Leaves what stands at a hook point in ``seen``, so that gradients reach it."""
    seen[point] = x if x.requires_grad else x.detach().requires_grad_()
    return seen[point]


def _given(model: Model, batch: Tensor) -> dict[str, Tensor]:
    return model.inputs(batch, torch.ones_like(batch))


def _batches(tokens: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of texts of one length, and their tokens, so that nothing has to be padded."""
    lengths = torch.tensor([len(one) for one in tokens])
    if not len(lengths) or not lengths.all():
        raise SaekitError("tokens holds no text, or one without a token; give texts of at least one")
    for length in lengths.unique():
        for at in (lengths == length).nonzero()[:, 0].split(AT_ONCE):
            yield at, torch.stack([torch.as_tensor(tokens[i]) for i in at.tolist()])
