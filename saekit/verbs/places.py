"""Where dictionaries are trained: the hook points of a store or a model that an option names."""

import fnmatch
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
    batch_size: int, device: str | None,
) -> tuple[Any, dict[str, Place]]:  # fmt: skip
    """The source of rows, and the places by name ("" for the single one of ``--hook-point``)."""
    from saekit.activations import Store
    from saekit.harvest import SideBySide, StreamSource, harvest
    from saekit.models import load_model

    if one and many:
        raise SaekitError(f"--hook-point {one!r} and --hook-points {many!r} are both given; leave one out")
    if acts:
        shown = ", ".join(acts)
        if len({Path(folder).name for folder in acts}) < len(acts):
            raise SaekitError(
                f"--acts {shown}: stores are named by their folders, and two have the same; rename one"
            )
        store = Store(acts[0]) if len(acts) == 1 else SideBySide({Path(f).name: Store(f) for f in acts})
        if store.n_rows < batch_size:
            raise SaekitError(
                f"store {shown!r} holds {store.n_rows} rows and one batch takes batch_size = {batch_size}; harvest more tokens or choose a smaller --batch-size"
            )
        if not one and not many and len(store.hook_points) > TAKES[wiring.takes]:
            raise SaekitError(
                f"store {shown!r} holds several hook points; choose with --hook-point or --hook-points: {', '.join(store.hook_points)}"
            )
        found = _places(wiring, one or ",".join(store.hook_points), many, store.hook_points)
        for reads, writes in found.values():
            for point in wiring.points(reads, writes):
                store.check(point)
        return store, found
    if not one and not many:
        raise SaekitError(
            "neither --acts nor --hook-point is given; name a store, or where in the model to read"
        )
    view = load_model(model, device=device)
    found = _places(wiring, one or "", many, view.hook_points())
    points = list(dict.fromkeys(p for reads, writes in found.values() for p in wiring.points(reads, writes)))
    return StreamSource(harvest(view, text, points, tokens=None)), found


def _places(wiring: Any, one: str, many: str | None, known: Sequence[str]) -> dict[str, Place]:
    """One place, or with ``many``, a glob, a place for each hook point (of a transcoder: module) that it matches."""
    if not many:
        return {"": wiring.sites(one.split(","))}
    pairs = wiring.takes in ("module", "modules")
    names = list(dict.fromkeys(name.partition(":")[0] if pairs else name for name in known))
    found = fnmatch.filter(names, many)
    if not found:
        raise SaekitError(f"--hook-points {many!r} matches nothing{nearest(many, names)}")
    if wiring.takes in ("all", "modules"):
        return {"": wiring.sites(found)}
    return {name.replace(":", "-"): wiring.sites([name]) for name in found}


def widths(source: Any, place: Place, wiring: Any) -> dict[str, Any]:
    """The fields of the wiring that are widths of hook points."""
    return wiring.shape(*([source.width(point) for point in side] for side in place))
