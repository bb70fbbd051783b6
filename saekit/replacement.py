"""Dictionaries that stand in for modules, spliced into a model all at once (Ameisen et al. 2025; Ge et al. 2026).

Each reads what the replaced model gives it, not what the original would have. Error terms, what each leaves of the
original on its own input, make the sum the model's own output again: an exact model in terms of features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.hooks import Site, intervene, whole_sequences
from saekit.models import Model, load_model
from saekit.types import Codes, SaekitError

Values = Mapping[str, Tensor]  # by hook point
Errors = Mapping[str, tuple[Tensor, Tensor]]
Hooks = list[tuple[Site, Callable[[Tensor], Tensor | None]]]


class Replacement:
    """A model with dictionaries in the places of what they read and write."""

    def __init__(
        self, model: "Model | str | torch.nn.Module", dictionaries: "Dictionary | Iterable[Dictionary]"
    ):
        if isinstance(dictionaries, Dictionary | str):
            dictionaries = [dictionaries]
        self.model, self.dictionaries = load_model(model), list(dictionaries)
        if not self.dictionaries:
            raise SaekitError("dictionaries is empty; give at least one")
        for d in self.dictionaries:
            if not isinstance(d, Dictionary):
                raise SaekitError(f"dictionaries hold a {type(d).__name__}; give dictionaries, as saekit.load returns them")  # fmt: skip
        writes = [point for d in self.dictionaries for point in d.writes]
        for d in self.dictionaries:
            if not d.writes:
                raise SaekitError(
                    "a dictionary doesn't name its hook points; set reads and writes, or train it on a store"
                )
        paths = [self._place(p) for p in writes]
        twice = next((p for p, path in zip(writes, paths, strict=True) if paths.count(path) > 1), None)
        if twice is not None:
            raise SaekitError(f"hook point {twice!r} is written by two dictionaries; leave one of them out")
        self.points = list(dict.fromkeys(p for d in self.dictionaries for p in (*d.reads, *d.writes)))
        self.writes = tuple(writes)

    def _place(self, point: str) -> tuple[str, str]:
        """Where a hook point is, whichever of its names it has."""
        return self.model.site(point).path, self.model.site(point).side

    @contextmanager
    def spliced(
        self,
        mask: Bool[Tensor, "batch seq"] | None = None,
        errors: Errors | None = None,
        *,
        straight_through: list[Tensor] | None = None,
    ) -> Iterator[None]:
        """Within it, the model's forward passes go through the dictionaries.

        ``mask``: the positions that are replaced (None: all); ``errors``, of :meth:`errors`, are added to what is
        written there. With ``straight_through`` gradients pass each place as if nothing stood there (Bengio et al.
        2013, 1308.3432), and the list gets for each the share of the original's variance that is left, differentiable
        in the dictionary's weights: for training on with dictionaries in place.
        """
        # where one dictionary reads what another writes, it has to read after that; its own place it reads before
        missing = [point for point in self.writes if errors is not None and point not in errors]
        if missing:
            raise SaekitError(f"errors lack {missing[0]!r}, which is written; give what errors() returns")
        own: Hooks = []
        writes: Hooks = []
        others: Hooks = []
        for d in self.dictionaries:
            stand = _ByLayers(d) if isinstance(d, CrossLayer) else _AtOnce(d)
            written = [self._place(point) for point in d.writes]
            for at, point in enumerate(d.reads):
                read = partial(_read, stand, at, straight_through is not None)
                (own if self._place(point) in written else others).append((self.model.site(point), read))
            for at, point in enumerate(d.writes):
                error = None if errors is None else errors[point]
                write = _Write(partial(stand.write, at), mask, error, straight_through)
                writes.append((self.model.site(point), write))
        hooks = [*own, *writes, *others]
        looks_back = any(d.wiring.kind == "sequences" for d in self.dictionaries)
        with intervene(hooks), whole_sequences(self.model.module) if looks_back else nullcontext():
            yield

    @torch.no_grad()
    def errors(self, activations: Values) -> Errors:
        """What each dictionary leaves of the original, from the original's activations at :attr:`points`.

        For each place that is written the original ``y`` and what is made of it, ``hat``. Their difference is
        added as ``y + (new - hat)``: where nothing else has changed ``new`` is ``hat`` and the original stays as it
        is, to the bit. ``new + (y - hat)`` would round, and the next dictionary might choose another of two
        features that nearly tie, which its error doesn't know.
        """
        missing = [point for point in self.points if point not in activations]
        if missing:
            raise SaekitError(
                f"activations lack {missing[0]!r}; give the model's at {', '.join(self.points)}"
            )
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for d in self.dictionaries:
            hat = d(torch.cat([activations[p] for p in d.reads], -1)).split(d.wiring.parts_out, -1)
            out |= {p: (activations[p], part) for p, part in zip(d.writes, hat, strict=True)}
        return out


class _AtOnce:
    """A dictionary that has read everything before it writes, in one forward pass."""

    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary
        self.seen: dict[int, Tensor] = {}

    def read(self, at: int, x: Tensor) -> None:
        """Take what the model has at one of the places that are read."""
        self.seen[at] = x

    def write(self, at: int) -> Tensor:
        """What the dictionary writes in one of its places."""
        d = self.dictionary
        missing = next((p for i, p in enumerate(d.reads) if i not in self.seen), None)
        if missing is not None:
            raise _late(d.writes[at], missing)
        read = torch.cat([self.seen[i] for i in range(len(d.reads))], -1)
        if at == len(d.writes) - 1:
            self.seen.clear()  # for the next pass
        return d(read).split(d.wiring.parts_out, -1)[at]


class _ByLayers:
    """A cross-layer transcoder in one forward pass: each layer is encoded once, when it has run."""

    def __init__(self, dictionary: CrossLayer):
        self.dictionary = dictionary
        self.codes: list[Codes] = []

    def read(self, at: int, x: Tensor) -> None:
        """Encode what the model has at a layer."""
        del self.codes[at:]  # of the pass before
        self.codes.append(self.dictionary.encode_layer(at, x))

    def write(self, at: int) -> Tensor:
        """What the layers up to this one write to it."""
        d = self.dictionary
        if len(self.codes) <= at:
            raise _late(d.writes[at], d.reads[len(self.codes)])
        return d.decode_layer(at, self.codes[: at + 1])


def _read(stand: "_AtOnce | _ByLayers", at: int, detached: bool, x: Tensor) -> None:
    stand.read(at, x.detach() if detached else x)


def _late(written: str, read: str) -> SaekitError:
    return SaekitError(
        f"a dictionary writes {written!r} before {read!r}, which it reads, has run; it can't stand in for it"
    )


@dataclass(frozen=True)
class _Write:
    """Puts what a dictionary makes in one of its places there."""

    made: Callable[[], Tensor]
    mask: Tensor | None
    error: tuple[Tensor, Tensor] | None
    losses: list[Tensor] | None

    def __call__(self, y: Tensor) -> Tensor:
        new = self.made().to(y.dtype)
        if new.shape != y.shape:
            raise SaekitError(
                f"a dictionary writes {new.shape[-1]} columns where the model has {y.shape[-1]}; give one of this model"
            )
        for name, other in (
            ("mask", self.mask),
            ("errors", None if self.error is None else self.error[0][..., 0]),
        ):
            if other is not None and other.shape != y.shape[: other.ndim]:
                raise SaekitError(
                    f"{name} has shape {tuple(other.shape)} and the model runs on {tuple(y.shape[:-1])}; give it for the same tokens"
                )
        if self.losses is not None:
            self.losses.append(_left(y.detach(), new, self.mask))
            new = new + (y - y.detach())
        if self.error is not None:
            original, hat = (t.to(new) for t in self.error)
            new = original + (new - hat)
        return new if self.mask is None else torch.where(self.mask.to(y.device)[..., None], new, y)


def _left(y: Tensor, hat: Tensor, mask: Tensor | None) -> Tensor:
    """The share of the variance of y that is left."""
    here = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device) if mask is None else mask.to(y.device)
    y, hat = y[here], hat[here]
    return (hat - y).square().sum() / (y - y.mean(0)).square().sum().clamp(min=1e-30)
