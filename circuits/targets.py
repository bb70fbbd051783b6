"""What a graph explains: logits and their differences, directions of the final stream, features."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Frozen
from saekit.models import Model
from saekit.types import SaekitError

_AT = " (position {})"
MOST, SHARE = 10, 0.95  # of the default targets: how many, and the probability that they cover together


@dataclass(frozen=True)
class Target:
    """A direction of the final stream (behind the last norm), at a position: ``direction x + bias`` is its value."""

    name: str
    direction: Float[Tensor, " d"]
    bias: float = 0.0
    position: int = -1
    weight: float = 1.0


@dataclass(frozen=True)
class Feature:
    """A feature of the graph's dictionary number ``stand`` at a position, as a target."""

    feature: int
    stand: int = 0
    position: int = -1

    @property
    def name(self) -> str:
        """The feature in words."""
        return f"feature {self.feature} of dictionary {self.stand}"


@dataclass(frozen=True)
class Logit:
    """Logits that add up with signs: ``Logit("Mary") - Logit("John")``, of tokens' text or ids.

    A sum whose signs don't cancel is taken less as many mean logits.
    """

    terms: tuple[tuple[str | int, float], ...]
    position: int = -1

    def __init__(self, token: str | int | tuple[tuple[str | int, float], ...], position: int = -1):
        object.__setattr__(self, "terms", token if isinstance(token, tuple) else ((token, 1.0),))
        object.__setattr__(self, "position", position)
        if not self.terms:
            raise SaekitError("a logit has no terms; give a token")
        for term in self.terms:
            if not (isinstance(term, tuple) and len(term) == 2 and isinstance(term[1], numbers.Real)):
                raise SaekitError(
                    f"term {term!r} of a logit is none; give (token, sign), or write Logit('a') - Logit('b')"
                )
            one = term[0]
            if not isinstance(one, str | numbers.Integral) or isinstance(one, bool):
                raise SaekitError(f"token {one!r} of a logit is none; give text that is one token, or an id")

    def __add__(self, other: "Logit") -> "Logit":
        if not isinstance(other, Logit):
            raise SaekitError(f"{other!r} is no logit; write Logit({other!r})")
        if self.position != other.position:
            raise SaekitError(
                f"logits at positions {self.position} and {other.position} don't add up to one target; give one position"
            )
        return Logit((*self.terms, *other.terms), self.position)

    def __neg__(self) -> "Logit":
        return Logit(tuple((token, -sign) for token, sign in self.terms), self.position)

    def __sub__(self, other: "Logit") -> "Logit":
        return self + (-other if isinstance(other, Logit) else other)


Given = int | str | Target | Feature | Logit


def resolve(frozen: Frozen, model: Model, given: "Given | Sequence[Given] | None") -> list[Target | Feature]:
    """The targets that are meant; by default the likeliest next tokens, up to ten, that cover 95 %."""
    if given is None:
        share, order = frozen.logits[-1].softmax(-1).sort(descending=True)
        n = min(MOST, int((share.cumsum(0) < SHARE).sum()) + 1)
        return [
            _logit(frozen, model, Logit(int(t)), float(p)) for t, p in zip(order[:n], share[:n], strict=True)
        ]
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    some = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    some = [int(one) if isinstance(one, np.integer) else one for one in some]
    if not some:
        raise SaekitError(
            "target is empty; name a token or a direction, or leave it out for the likeliest tokens"
        )
    plain = all(isinstance(one, int | str) for one in some)
    chances = frozen.logits[-1].softmax(-1)
    out: list[Target | Feature] = []
    for one in some:
        if isinstance(one, int | str) and not isinstance(one, bool):
            one = _logit(frozen, model, Logit(one))
            one = _weighed(one, float(chances[int(one.name)]) if plain else 1.0)
        elif isinstance(one, Logit):
            one = _logit(frozen, model, one)
        elif isinstance(one, Target) and not isinstance(one.direction, Tensor):
            raise SaekitError(
                f"target {one.name!r} has a direction of type {type(one.direction).__name__}; give a tensor"
            )
        elif isinstance(one, Target) and one.direction.shape != frozen.last[0].shape:
            raise SaekitError(
                f"target {one.name!r} has a direction of shape {tuple(one.direction.shape)} and the model is {len(frozen.last[0])} wide; give one number for each dimension"
            )
        elif not isinstance(one, Target | Feature):
            raise SaekitError(
                f"target {one!r} is none; give a token, Logit(...), Target(...) or Feature(...)"
            )
        if isinstance(one, Target) and not (_finite(one) and one.weight > 0):
            raise SaekitError(
                f"target {one.name!r} must have a finite direction and bias, a name, and a weight above 0"
            )
        if not isinstance(one.position, numbers.Integral):
            raise SaekitError(f"target position {one.position!r} must be a whole number")
        if not -len(frozen.last) <= one.position < len(frozen.last):
            raise SaekitError(
                f"target position {one.position} lies outside of the prompt's {len(frozen.last)} tokens"
            )
        out.append(one)
    for name in (names := names_of(out, len(frozen.last))):
        if names.count(name) > 1:
            raise SaekitError(f"target {name!r} is given {names.count(name)} times; give each target once")
    return out


def names_of(targets: Sequence[Target | Feature], seq: int) -> tuple[str, ...]:
    """What each target goes by in a graph: its name, with its position where another has the same at another one."""
    own = [(one.name, int(one.position) % seq) for one in targets]
    return tuple(
        f"{name}{_AT.format(at)}" if any(n == name and a != at for n, a in own) else name for name, at in own
    )


def plain_name(name: str, position: int) -> str:
    """A target's name without its position."""
    return name.removesuffix(_AT.format(position))


def _finite(target: Target) -> bool:
    numbers_ = (target.bias, target.weight)
    return bool(target.name) and bool(target.direction.isfinite().all()) and all(map(math.isfinite, numbers_))


def _weighed(target: Target, weight: float) -> Target:
    return Target(target.name, target.direction, target.bias, target.position, weight)


def _logit(frozen: Frozen, model: Model, logit: Logit, weight: float = 1.0) -> Target:
    w = frozen.weights
    ids = [(_token(model, token, len(w.W_U)), sign) for token, sign in logit.terms]
    direction, bias = torch.zeros_like(w.W_U[0]), 0.0
    for token, sign in ids:
        direction, bias = direction + sign * w.W_U[token], bias + sign * float(w.b_U[token])
    if left := sum(sign for _, sign in ids):
        direction, bias = direction - left * w.W_U.mean(0), bias - left * float(w.b_U.mean())
    name = (
        str(ids[0][0])
        if len(ids) == 1 and ids[0][1] == 1
        else "".join(f"{'+' if s > 0 else '-'}{'' if abs(s) == 1 else f'{abs(s):g}*'}{t}" for t, s in ids)
    )
    return Target(name, direction, bias, logit.position, weight)


def _token(model: Model, token: str | int, vocabulary: int) -> int:
    if isinstance(token, str):
        if model.tokenizer is None:
            raise SaekitError(
                f"target {token!r} is text, and model {model.name!r} has no tokenizer; give a token id"
            )
        ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise SaekitError(f"target {token!r} is {len(ids)} tokens; give text that is one token, or an id")
        return int(ids[0])
    if not 0 <= token < vocabulary:
        raise SaekitError(f"target {token} is no token; the model has 0 to {vocabulary - 1}")
    return token


def value(frozen: Frozen, target: Target) -> Tensor:
    """A target's value in the model's own pass."""
    x = frozen.last[target.position]
    norm = frozen.weights.norm
    return target.direction.to(x) @ (x if norm is None else norm(x)) + target.bias
