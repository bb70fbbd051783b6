"""Dictionaries that stand in for modules, spliced into a model all at once (Ameisen et al. 2025; Ge et al. 2026).

Each reads what the replaced model gives it, not what the original would have. Error terms, what each leaves of the
original on its own input, make the sum the model's own output again: an exact model in terms of features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hooks import Site, intervene
from saekit.models import Model, load_model
from saekit.types import SaekitError

Values = Mapping[str, Tensor]  # by hook point


class Replacement:
    """A model with dictionaries in the places of what they read and write."""

    def __init__(self, model: "Model | str | torch.nn.Module", dictionaries: Sequence[Dictionary]):
        self.model, self.dictionaries = load_model(model), list(dictionaries)
        if not self.dictionaries:
            raise SaekitError("dictionaries is empty; give at least one")
        writes = [point for d in self.dictionaries for point in d.writes]
        for d in self.dictionaries:
            if not d.writes:
                raise SaekitError(
                    "a dictionary doesn't name its hook points; set reads and writes, or train it on a store"
                )
        paths = [(self.model.site(p).path, self.model.site(p).side) for p in writes]
        twice = next((p for p, path in zip(writes, paths, strict=True) if paths.count(path) > 1), None)
        if twice is not None:
            raise SaekitError(f"hook point {twice!r} is written by two dictionaries; leave one of them out")
        self.points = list(dict.fromkeys(p for d in self.dictionaries for p in (*d.reads, *d.writes)))
        self.writes = tuple(writes)

    @contextmanager
    def spliced(
        self,
        mask: Bool[Tensor, "batch seq"] | None = None,
        errors: Values | None = None,
        *,
        straight_through: list[Tensor] | None = None,
    ) -> Iterator[None]:
        """Within it, the model's forward passes go through the dictionaries.

        ``mask``: the positions that are replaced (None: all); ``errors`` are added to what is written there (see
        :meth:`errors`). With ``straight_through`` gradients pass each place as if nothing stood there (Bengio et al.
        2013, 1308.3432), and the list gets for each the share of the original's variance that is left, differentiable
        in the dictionary's weights: for training on with dictionaries in place.
        """
        hooks: list[tuple[Site, Callable[[Tensor], Tensor | None]]] = []
        for d in self.dictionaries:
            seen: dict[str, Tensor] = {}
            hooks += [(self.model.site(point), _keep(point, seen)) for point in d.reads]
            for at, point in enumerate(d.writes):
                write = _Write(d, at, seen, mask, None if errors is None else errors[point], straight_through)
                hooks.append((self.model.site(point), write))
        with intervene(hooks):
            yield

    @torch.no_grad()
    def errors(self, activations: Values) -> dict[str, Tensor]:
        """What each dictionary leaves of the original, from the original's activations at :attr:`points`."""
        out: dict[str, Tensor] = {}
        for d in self.dictionaries:
            hat = d(torch.cat([activations[p] for p in d.reads], -1)).split(d.wiring.parts_out, -1)
            out |= {p: activations[p] - part for p, part in zip(d.writes, hat, strict=True)}
        return out


def _keep(point: str, into: dict[str, Tensor]) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        into[point] = x

    return keep


@dataclass(frozen=True)
class _Write:
    """What a dictionary writes in one of its places, from what it has read in the same pass."""

    dictionary: Dictionary
    at: int
    seen: dict[str, Tensor]
    mask: Tensor | None
    error: Tensor | None
    losses: list[Tensor] | None

    def __call__(self, y: Tensor) -> Tensor:
        d, point = self.dictionary, self.dictionary.writes[self.at]
        missing = [p for p in d.reads if p not in self.seen]
        if missing and d.config.wiring[0] != "cross_layer":
            raise SaekitError(
                f"a dictionary writes {point!r} before {missing[0]!r}, which it reads, has run; it can't stand in for it"
            )
        # what a layer of a cross-layer transcoder writes depends on none of the later ones
        widths = zip(d.reads, d.wiring.parts_in, strict=True)
        read = torch.cat([self.seen.get(p, y.new_zeros(*y.shape[:-1], w)) for p, w in widths], -1)
        if self.at == len(d.writes) - 1:
            self.seen.clear()  # for the next pass
        read = read if self.losses is None else read.detach()
        new = d(read).split(d.wiring.parts_out, -1)[self.at].to(y.dtype)
        if self.losses is not None:
            self.losses.append(_left(y.detach(), new, self.mask))
            new = new + (y - y.detach())
        if self.error is not None:
            new = new + self.error.to(new)
        return new if self.mask is None else torch.where(self.mask.to(y.device)[..., None], new, y)


def _left(y: Tensor, hat: Tensor, mask: Tensor | None) -> Tensor:
    """The share of the variance of y that is left."""
    here = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device) if mask is None else mask.to(y.device)
    y, hat = y[here], hat[here]
    return (hat - y).square().sum() / (y - y.mean(0)).square().sum().clamp(min=1e-30)
