"""Several models' activations of the same tokens, side by side: what a crosscoder of two models is trained on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import Store, shuffled_rows
from saekit.types import SaekitError

COMPARED = 1 << 20  # tokens that are held at a time while they are compared


class SideBySide:
    """Rows of several stores of the same tokens, in the same order; a hook point is ``NAME/HOOK_POINT``.

    A token counts where every store's mask keeps it. Held in memory are 4 bytes per token and store, the numbers
    of their rows (8 where a store has more than 2^32); activations stay on disk.
    """

    def __init__(self, stores: Mapping[str, Store]):
        if len(stores) < 2:
            raise SaekitError(f"{len(stores)} store is given; name two or more, each of another model")
        self.stores = dict(stores)
        _check_alike(self.stores)
        self._rows = dict(zip(self.stores, _common(list(self.stores.values())), strict=True))
        self.n_rows = len(next(iter(self._rows.values())))
        if self.n_rows == 0:
            raise SaekitError(
                f"stores {', '.join(self.stores)} keep no token in common; harvest the same text"
            )

    @property
    def hook_points(self) -> list[str]:
        """Names of the hook points of all stores."""
        return [f"{name}/{point}" for name, store in self.stores.items() for point in store.hook_points]

    def _of(self, hook_point: str | None) -> tuple[str, str]:
        name, _, point = (hook_point or self.hook_points[0]).partition("/")
        if name not in self.stores:
            raise SaekitError(
                f"hook point {hook_point!r} is of none of the stores; known: {', '.join(self.hook_points)}"
            )
        return name, point

    def check(self, hook_point: str) -> None:
        """Raise unless the hook point is here and all its values are finite."""
        name, point = self._of(hook_point)
        self.stores[name].check(point)

    def width(self, hook_point: str | None) -> int:
        """Width of a hook point (of the first, when none is named)."""
        name, point = self._of(hook_point)
        return self.stores[name].width(point)

    def gather(self, hook_point: str, rows: np.ndarray) -> Float[Tensor, "rows width"]:
        """Rows by number, in the order asked for, in fp32."""
        name, point = self._of(hook_point)
        return self.stores[name].gather(point, self._rows[name][rows])

    def batches(
        self, hook_points: Sequence[str], batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Endless batches, the hook points' columns side by side, globally shuffled with the seed."""
        for rows in shuffled_rows(self.n_rows, batch_size, seed, start):
            yield torch.cat([self.gather(point, rows) for point in hook_points], -1)

    def identity(self) -> dict[str, Any]:
        """What identifies each store."""
        stores = {name: store.identity() for name, store in self.stores.items()}
        return {"kind": "side by side", "rows": self.n_rows, "stores": stores}


def _check_alike(stores: Mapping[str, Store]) -> None:
    """Raise unless the stores hold the same tokens in the same order, as far as both go."""
    first, *others = stores
    for other in others:
        pieces = zip(stores[first].tokens(COMPARED), stores[other].tokens(COMPARED), strict=False)
        same = all(np.array_equal(a[: len(b)], b[: len(a)]) for a, b in pieces)
        if not any(len(piece) for piece in stores[first].tokens(COMPARED)):  # inputs that are no tokens
            same &= stores[first].manifest["text"] == stores[other].manifest["text"]
        if not same or stores[first].manifest["seq"] != stores[other].manifest["seq"]:
            raise SaekitError(
                f"stores {first!r} and {other!r} hold different tokens; harvest both from the same text, with the same tokenizer, context and rows per batch"
            )


def _common(stores: Sequence[Store]) -> list[np.ndarray]:
    """For each store the rows of the tokens that all keep, in order; two bytes per token are held meanwhile."""
    total = min(sum(entry["tokens"] for entry in store.manifest["shards"]) for store in stores)
    kept = np.ones(total, dtype=bool)
    for store in stores:
        own = np.zeros(total, dtype=bool)
        for positions in store.positions():
            own[positions[positions < total]] = True
        kept &= own
    out = []
    for store in stores:
        wide = np.uint32 if store.n_rows < 1 << 32 else np.int64
        start, parts = 0, []
        for positions in store.positions():
            some = kept[positions[positions < total]]  # they rise
            parts.append((start + np.flatnonzero(some)).astype(wide))
            start += len(positions)
        out.append(np.concatenate(parts))
    return out
