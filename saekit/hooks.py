"""Capture activations and replace them: the only place that registers forward hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saekit.types import SaekitError


@dataclass(frozen=True)
class Site:
    """A place in a model: the input or the output (``side``: ``in`` or ``out``) of a module."""

    module: nn.Module
    side: str
    path: str


class _Stop(BaseException):
    """Leaves a forward pass early; not an Exception, so that no handler in the model swallows it."""


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if is_dataclass(value) or isinstance(value, Mapping):
        items: Iterable = value.values() if isinstance(value, Mapping) else vars(value).values()
    elif isinstance(value, list | tuple):
        items = value
    else:
        items = ()
    found = next((item for item in items if isinstance(item, Tensor)), None)
    if found is None:
        raise SaekitError(
            f"a hook point gave a {type(value).__name__} that holds no tensor; choose a module that works on tensors"
        )
    return found


def _with_first_tensor(value: Any, new: Tensor) -> Any:
    """The same structure with its first tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple | list):
        at = next(i for i, item in enumerate(value) if isinstance(item, Tensor))
        changed = [*value[:at], new, *value[at + 1 :]]
        return type(value)(changed) if type(value) in (tuple, list) else type(value)(*changed)
    first = next(key for key, item in value.items() if isinstance(item, Tensor))
    value[first] = new
    return value


@contextmanager
def intervene(functions: "list[tuple[Site, Callable[[Tensor], Tensor | None]]]") -> Iterator[None]:
    """Run functions on the activations of sites; one that returns a tensor replaces the activation.

    The hooks are gone when the context ends, however it ends.
    """

    def on_input(function: Callable) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            holder, key = (
                (args, 0) if args else (kwargs, next(k for k, v in kwargs.items() if isinstance(v, Tensor)))
            )
            new = function(_first_tensor(holder[key]))
            if new is None:
                return None
            if args:
                return (_with_first_tensor(args[0], new), *args[1:]), kwargs
            return args, {**kwargs, key: _with_first_tensor(kwargs[key], new)}

        return hook

    def on_output(function: Callable) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
            new = function(_first_tensor(output))
            return None if new is None else _with_first_tensor(output, new)

        return hook

    handles = []
    try:
        for site, function in functions:
            if site.side == "in":
                handles.append(site.module.register_forward_pre_hook(on_input(function), with_kwargs=True))
            else:
                handles.append(site.module.register_forward_hook(on_output(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def capture(run: Callable[[], Any], sites: Mapping[str, Site], stop: bool = True) -> dict[str, Tensor]:
    """Activations of the sites during ``run()``, detached, in the order of ``sites``.

    With ``stop`` the forward pass is left as soon as every site has been seen, so no later module
    runs; a module that runs several times gives its first activation. Copied only where the model
    runs on, since a later module may write into the tensor (``ReLU(inplace=True)`` does).
    """
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            if name in seen:
                return
            last = stop and len(seen) == len(sites) - 1
            seen[name] = tensor.detach() if last else tensor.detach().clone()
            if last:
                raise _Stop

        return keep

    with torch.no_grad(), intervene([(site, keeper(name)) for name, site in sites.items()]):
        with suppress(_Stop):
            run()
    missing = [name for name in sites if name not in seen]
    if missing:
        raise SaekitError(
            f"hook point {missing[0]!r} ({sites[missing[0]].path}) did not run in the forward pass; choose a module that does"
        )
    return {name: seen[name] for name in sites}


@contextmanager
def whole_sequences(module: nn.Module) -> Iterator[None]:
    """Within it the module's passes see whole sequences: ``generate`` keeps no keys and values between them.

    A pass that is given cached keys and values, or an attention mask with padding before text, is refused:
    a function that looks back on its own would miss the ones, and look at the other.
    """

    def check(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        # by what it does, since its name differs from release to release of transformers
        known = [v.get_seq_length() > 0 for v in kwargs.values() if hasattr(v, "get_seq_length")]
        old = [k for k, v in kwargs.items() if k.startswith("past_") and isinstance(v, tuple | list) and v]
        if any(known) or old:
            raise SaekitError(
                "the model runs on cached keys and values, and features that look back need the whole sequence; generate with use_cache=False"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask.diff(dim=1) > 0).any()):
            raise SaekitError(
                "attention_mask has padding before text, which features that look back would look at; pad on the right"
            )

    settings = getattr(module, "generation_config", None)
    before = getattr(settings, "use_cache", None)
    handle = module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        if settings is not None:
            settings.use_cache = False
        yield
    finally:
        handle.remove()
        if settings is not None:
            settings.use_cache = before


class Clock:
    """Where in the text the running pass begins, behind what keys and values are cached for, and its token ids.

    ``end``: how far into a text the passes have come. ``attention`` [batch, tokens so far]: its attention mask, where it
    is given one.
    """

    start = 0
    end = 0
    tokens: Tensor | None = None
    attention: Tensor | None = None


@contextmanager
def passes(module: nn.Module) -> Iterator[Clock]:
    """A clock that is set at the beginning of each of the module's passes."""
    clock = Clock()

    def begin(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        clock.tokens = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        clock.attention = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        cached = [v.get_seq_length() for v in kwargs.values() if hasattr(v, "get_seq_length")]
        clock.start = int(cached[0]) if cached else 0
        seen = clock.tokens if clock.tokens is not None else kwargs.get("inputs_embeds")
        clock.end = max(clock.end, clock.start + (0 if seen is None else seen.shape[1]))

    handle = module.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield clock
    finally:
        handle.remove()


def spliced(site_mask: Tensor, replacement: Tensor) -> Callable[[Tensor], Tensor]:
    """An intervention that replaces the unmasked positions and leaves the others as they are."""

    def function(x: Tensor) -> Tensor:
        new = replacement.reshape(x.shape).to(x.dtype)
        if x.shape[:2] == site_mask.shape:  # behind positions may come heads
            kept = site_mask.reshape(*site_mask.shape, *[1] * (x.ndim - 2))
        else:
            kept = site_mask.reshape(x.shape[:-1])[..., None]
        return torch.where(kept.to(x.device), new, x)

    return function
