"""Where dictionaries are trained: the hook points of a store or a model that an option names."""

import fnmatch
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saekit.errors import SaekitError
from saekit.registry import nearest

TAKES = {"each": 1, "module": 2, "all": math.inf, "modules": math.inf}  # hook points of one dictionary
Place = tuple[tuple[str, ...], tuple[str, ...]]  # what is read, and what is written


def open_source(
    acts: Sequence[str], model: str, text: str, wiring: Any, one: str | None, many: str | None,
    device: str | None,
) -> tuple[Any, dict[str, Place]]:  # fmt: skip
    """The source of rows or sequences, and the places by name ("" for the single one of ``--hook-point``)."""
    from saekit.activations import Store
    from saekit.harvest import SideBySide, harvest
    from saekit.models import load_model
    from saekit.trainers.loop import as_source

    if one and many:
        raise SaekitError(f"--hook-point {one!r} and --hook-points {many!r} are both given; leave one out")
    if acts:
        shown = ", ".join(acts)
        if len({Path(folder).name for folder in acts}) < len(acts):
            raise SaekitError(
                f"--acts {shown}: stores are named by their folders, and two have the same; rename one"
            )
        store = Store(acts[0]) if len(acts) == 1 else SideBySide({Path(f).name: Store(f) for f in acts})
        if not one and not many and len(store.hook_points) > TAKES[wiring.takes]:
            raise SaekitError(
                f"store {shown!r} holds several hook points; choose with --hook-point or --hook-points: {', '.join(store.hook_points)}"
            )
        found = _places(wiring, one, many, store.hook_points)
        for reads, writes in found.values():
            for point in wiring.points(reads, writes):
                store.check(point)
        return as_source(store, wiring.kind == "sequences"), found
    if not one and not many:
        raise SaekitError(
            "neither --acts nor --hook-point is given; name a store, or where in the model to read"
        )
    view = load_model(model, device=device)
    found = _places(wiring, one, many, view.hook_points())
    points = list(dict.fromkeys(p for reads, writes in found.values() for p in wiring.points(reads, writes)))
    stream = harvest(view, text, points, tokens=None)
    return as_source(stream, wiring.kind == "sequences"), found


def _places(wiring: Any, one: str | None, many: str | None, known: Sequence[str]) -> dict[str, Place]:
    """One place, or with ``many``, a glob, a place for each hook point (of a transcoder: module) that it matches."""
    if one:
        return {"": _as_given(wiring, one.split(","))}
    if not many:
        return {"": wiring.sites(known)}
    pairs = wiring.takes in ("module", "modules")
    names = list(dict.fromkeys(name.partition(":")[0] if pairs else name for name in known))
    found = fnmatch.filter(names, many)
    if not found:
        raise SaekitError(f"--hook-points {many!r} matches nothing{nearest(many, names)}")
    if wiring.takes == "modules":
        _check_unbroken(many, found)
    if wiring.takes in ("all", "modules"):
        return {"": wiring.sites(found)}
    return {name.replace(":", "-"): wiring.sites([name]) for name in found}


def _as_given(wiring: Any, given: list[str]) -> Place:
    """The place of hook points named one by one: their order is meant, so one that can't be is refused, not mended."""
    place = wiring.sites(given)
    for side in [place[0] + place[1]] if wiring.takes == "module" else place:
        at = [given.index(point if point in given else point.partition(":")[0]) for point in side]
        for i, (first, second) in enumerate(itertools.pairwise(side)):
            if at[i] > at[i + 1]:
                raise SaekitError(
                    f"--hook-point {','.join(given)!r} names {second!r} before {first!r}, and the model runs the latter first; swap them"
                )
    return place


def _check_unbroken(glob: str, found: Sequence[str]) -> None:
    """Raise where a glob for a dictionary over blocks misses one between them."""
    from saekit.dictionaries.wiring.cross_layer import block_of

    stems, numbers = zip(*map(block_of, found), strict=True)
    missing = sorted(set(range(min(numbers), max(numbers))) - set(numbers))
    if missing and len(set(stems)) == 1:
        block = f"{stems[0]}{missing[0]}"
        inside = found[0].removeprefix(f"{stems[0]}{numbers[0]}")
        raise SaekitError(
            f"--hook-points {glob!r} matches {', '.join(found)} and skips {block + inside!r}; harvest it, or name the layers with --hook-point"
        )


def widths(source: Any, place: Place, wiring: Any) -> dict[str, Any]:
    """The fields of the wiring that are widths of hook points."""
    return wiring.shape(*([source.width(point) for point in side] for side in place))


def batch_size_of(source: Any, given: int | None) -> int:
    """What is given, or the default for rows or sequences; raises where the source holds no whole batch."""
    from saekit.trainers.loop import default_batch

    size = default_batch(source) if given is None else given
    if source.n_rows is not None and source.n_rows < size:
        what = "sequences" if hasattr(source, "rows_per_item") else "rows"
        raise SaekitError(
            f"the data holds {source.n_rows} {what} and one batch takes batch_size = {size}; harvest more tokens or choose a smaller --batch-size"
        )
    return size


def layer_of(model: Any, point: str) -> Any:
    """The attention layer that a Lorsa stands in for, by the hook point it reads."""
    from saekit.layers import attention

    return attention(model, point.partition(":")[0])


def begun(
    source: Any, place: Place, wiring: Any, fields: dict[str, Any], device: str | None
) -> dict[str, Any]:
    """What a dictionary begins from: a Lorsa from the attention layer at its place, unless its heads are given."""
    from saekit.models import load_model

    if wiring.kind != "sequences" or "d_qk" in fields:
        return {}
    stream = getattr(source, "stream", None)
    model = load_model(source.store.manifest["model"]["name"]) if stream is None else stream.model
    return {"attention": layer_of(model, place[0][0])}
