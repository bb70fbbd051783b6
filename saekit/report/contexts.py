"""Where features fire: top contexts, sampled contexts, densities and histograms, in one bounded pass.

A context is a window of tokens around a peak, with the feature's activation at every token. Memory
depends on the number of features shown, never on the number of tokens read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64, UInt64
from numpy import ndarray
from torch import Tensor

from saekit.types import Codes, SaekitError, check_beside

Windows = dict[
    str, ndarray
]  # "tokens", "documents", "activations" (and "looked"), each [entries, width], "strongest"
# (features, rows, queries) -> what every position of the row adds to the feature's activation at the query, [entries, seq]
Looks = Callable[[ndarray, ndarray, ndarray], ndarray]


@dataclass(frozen=True)
class Context:
    """A window of tokens around ``peak`` (an index into the window).

    ``tokens`` are ids. ``activations`` holds None where the position is masked: it was not looked at.
    ``documents`` holds every token's document id, or is None where none were given. ``row`` counts the
    rows in the order they were added, ``position`` is the peak's place in its row. Of a feature that looks back,
    ``looked`` is what each token of the window adds to the peak's activation, and ``strongest`` the token that adds
    most, in the window or not: how far back it is, its id, and what it adds.
    """

    tokens: tuple[int, ...]
    activations: tuple[float | None, ...]
    documents: tuple[int, ...] | None
    peak: int
    row: int
    position: int
    looked: tuple[float, ...] | None = None
    strongest: tuple[int, int, float] | None = None

    @property
    def activation(self) -> float:
        """Activation at the peak."""
        value = self.activations[self.peak]
        assert value is not None  # a masked position is never a peak
        return value


@dataclass(frozen=True)
class QuantileBand:
    """Contexts drawn from one band of a feature's nonzero activations.

    The band holds the activations between the quantiles ``lower`` and ``upper`` (shares, 0 to 1) of
    the sample, which reach from ``low`` to ``high`` in magnitude.
    """

    lower: float
    upper: float
    low: float
    high: float
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class FeatureContexts:
    """What one feature did on the tokens read.

    ``max_activation`` is the activation of largest magnitude, with its sign (0 for a feature that
    never fired), ``n_tokens`` the unmasked tokens read, ``n_active`` those it fired on.
    ``histogram_counts`` [bins] are its nonzero activations between ``histogram_edges`` [bins + 1].
    """

    index: int
    n_tokens: int
    n_active: int
    max_activation: float
    histogram_edges: tuple[float, ...]
    histogram_counts: tuple[int, ...]
    top: tuple[Context, ...]
    bands: tuple[QuantileBand, ...]

    @property
    def density(self) -> float:
        """Share of the unmasked tokens that the feature fires on."""
        return self.n_active / self.n_tokens if self.n_tokens else 0.0


class ContextCollector:
    """Reads tokens and codes batch by batch and keeps what a person wants to see of each feature.

    Top contexts: the ``n_top`` rows in which the feature peaks highest, each around its peak, at most
    one per row, so that near-duplicates do not fill the list; ties go to the earlier token. Sampled
    contexts: ``reservoir`` of the nonzero activations are drawn uniformly, cut by value into
    ``n_quantile`` bands of equal count, and ``per_quantile`` shown of each. The draw gives every
    activation a pseudo-random key made of (seed, feature, place in the stream) and keeps the lowest
    keys, so it depends on the stream alone and not on how it was cut into batches.

    Signed codes are ranked by magnitude. Masked positions are never counted, never peaks. Values are
    read as float32. ``looks_back``: the features gather from other positions, and ``add`` is given how.
    """

    def __init__(
        self,
        n_features: int,
        features: Sequence[int] | Int[ndarray, " chosen"] | Int[Tensor, " chosen"],
        seq_len: int,
        n_top: int = 10,
        n_quantile: int = 5,
        per_quantile: int = 2,
        radius: int = 16,
        reservoir: int = 128,
        seed: int = 0,
        looks_back: bool = False,
    ):
        self.looks_back = looks_back
        self.features = np.asarray(features, dtype=np.int64)
        self.n_features, self.seq_len, self.radius = n_features, seq_len, radius
        self.n_quantile, self.per_quantile = n_quantile, per_quantile
        outside = self.features[(self.features < 0) | (self.features >= n_features)]
        if len(outside):
            raise SaekitError(f"features: {outside[0]} is not in a dictionary of {n_features} features")
        if len(np.unique(self.features)) < len(self.features):
            raise SaekitError("features: some are listed twice; give each feature once")
        if min(n_top, n_quantile, per_quantile) < 1 or radius < 0:
            raise SaekitError("n_top, n_quantile and per_quantile count from 1, radius from 0")
        if reservoir < n_quantile * per_quantile:
            raise SaekitError(
                f"reservoir={reservoir} cannot fill {n_quantile} bands with {per_quantile} contexts each; "
                f"give at least {n_quantile * per_quantile}"
            )
        chosen = len(self.features)
        self._column = torch.full((n_features,), -1, dtype=torch.int64)
        self._column[torch.from_numpy(self.features)] = torch.arange(chosen)
        self._salt = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + self.features.astype(np.uint64))
        self._n_rows = self._n_tokens = 0
        self._n_active = np.zeros(chosen, dtype=np.int64)
        self._histograms = _Histograms(chosen)
        width = 2 * radius + 1
        kinds: dict[str, tuple[type, int]] = {
            "tokens": (np.int32, width), "documents": (np.int32, width), "activations": (np.float32, width),
            **({"looked": (np.float32, width), "strongest": (np.float64, 3)} if looks_back else {}),
        }  # fmt: skip
        self._top = _Lowest(chosen, n_top, kinds, np.array(np.inf, dtype=np.float32))
        self._sample = _Lowest(chosen, reservoir, kinds, np.array(2**64 - 1, dtype=np.uint64))

    def add(
        self,
        tokens: Int[Tensor, "rows seq"],
        documents: Int[Tensor, "rows seq"] | None,
        mask: Bool[Tensor, "rows seq"],
        codes: Codes,
        looks: Looks | None = None,
    ) -> None:
        """Read one batch of packed rows; ``codes`` has shape (rows, seq), ``mask`` is true where a token counts."""
        if self.looks_back != (looks is not None):
            raise SaekitError("looks: give it with looks_back=True, and only then")
        check_beside(tokens, documents, mask, codes, self.n_features, self.seq_len)
        if documents is None:
            documents = torch.full_like(tokens, -1)
        # ids take half the memory of what they come in, and windows of ids are most of what is kept
        flat = {"tokens": _flat(tokens.int()), "documents": _flat(documents.int()), "mask": _flat(mask)}
        column, place, value = self._entries(mask, codes)
        key = column * mask.numel() + place
        start = self._n_rows * self.seq_len
        self._n_rows += tokens.shape[0]
        self._n_tokens += int(flat["mask"].sum())
        self._n_active += np.bincount(column, minlength=len(self.features))
        self._histograms.add(column, value)

        def windows(entries: Int64[ndarray, " entries"]) -> Windows:
            found = self._windows(flat, key, value, column[entries], place[entries])
            return (
                found
                if looks is None
                else {**found, **self._looked(looks, tokens, column[entries], place[entries])}
            )

        peaks = _peaks(column, place // self.seq_len, np.abs(value))
        self._top.offer(
            column[peaks], -np.abs(value[peaks]), start + place[peaks], lambda some: windows(peaks[some])
        )
        lottery = _mix(self._salt[column] + (start + place).astype(np.uint64))
        self._sample.offer(column, lottery, start + place, windows)

    def result(self) -> list[FeatureContexts]:
        """What was found so far, one entry per feature, in the order of ``features``."""
        return list(self.each())

    def each(self) -> Iterator[FeatureContexts]:
        """The same one by one: all at once take more memory than what they are made from."""
        return map(self._feature, range(len(self.features)))

    def _entries(
        self, mask: Bool[Tensor, "rows seq"], codes: Codes
    ) -> tuple[Int64[ndarray, " nnz"], Int64[ndarray, " nnz"], Float32[ndarray, " nnz"]]:
        """Column, place in the batch and value of what counts, sorted by column, then place.

        Chosen on the device where the codes are, so that only a small share of them travels.
        """
        columns = self._column.to(codes.indices.device)[codes.indices.long()]
        places = codes.row_ids()
        kept = ((columns >= 0) & mask.to(places.device).reshape(-1)[places]).nonzero().squeeze(1)
        column, place = _flat(columns[kept]), _flat(places[kept])
        value = _flat(codes.values.detach()[kept].float())
        # places rise already; a stable sort of small integers is a radix sort
        order = np.argsort(column.astype(np.min_scalar_type(len(self.features))), kind="stable")
        column, place, value = column[order], place[order], value[order]
        if not np.isfinite(value).all():
            raise SaekitError("codes: some values are nan or infinite; look for the layer that made them")
        # a pursuit may choose a unit twice for one token: what it contributes is the sum, as in to_dense
        first = np.flatnonzero(np.diff(column, prepend=-1) | np.diff(place, prepend=-1))
        if len(first) < len(value):
            column, place, value = column[first], place[first], np.add.reduceat(value, first)
        active = value != 0
        return column[active], place[active], value[active]

    def _windows(self, flat, key, value, column, place) -> Windows:
        """Windows of the flattened batch around entries; ``key`` and ``value`` hold all its activations."""
        at = place % self.seq_len
        around = np.arange(-self.radius, self.radius + 1) + at[:, None]
        # beyond the row's ends the last token is repeated; _context cuts that off again
        cell = (place - at)[:, None] + around.clip(0, self.seq_len - 1)
        wanted = column[:, None] * len(flat["mask"]) + cell
        found = np.searchsorted(key, wanted).clip(max=len(key) - 1)
        activations = np.where(key[found] == wanted, value[found], np.float32(0))
        activations[~flat["mask"][cell]] = np.nan
        return {
            "tokens": flat["tokens"][cell],
            "documents": flat["documents"][cell],
            "activations": activations,
        }

    def _looked(
        self, looks: Looks, tokens: Int[Tensor, "rows seq"], column: ndarray, place: ndarray
    ) -> Windows:
        """What the positions of a window add to its peak, and which position of the row adds most."""
        row, at = np.divmod(place, self.seq_len)
        adds = looks(self.features[column], row, at)
        around = (np.arange(-self.radius, self.radius + 1) + at[:, None]).clip(0, self.seq_len - 1)
        most = adds.argmax(1)
        ids = _flat(tokens).reshape(-1, self.seq_len)[row, most]
        strongest = np.stack([at - most, ids, np.take_along_axis(adds, most[:, None], 1)[:, 0]], 1)
        return {"looked": np.take_along_axis(adds, around, 1), "strongest": strongest.astype(np.float64)}

    def _feature(self, column: int) -> FeatureContexts:
        top = [self._context(self._top, entry) for entry in self._top.of(column).tolist()]
        edges, counts = self._histograms.of(column)
        return FeatureContexts(
            index=int(self.features[column]),
            n_tokens=self._n_tokens,
            n_active=int(self._n_active[column]),
            max_activation=top[0].activation if top else 0.0,
            histogram_edges=edges,
            histogram_counts=counts,
            top=tuple(top),
            bands=self._bands(column),
        )

    def _bands(self, column: int) -> tuple[QuantileBand, ...]:
        """The sample cut into bands, highest first; inside a band the lowest keys, highest value first."""
        drawn = self._sample.of(column)
        size = np.abs(self._sample.windows["activations"][self._sample.slot[drawn], self.radius])
        order = np.lexsort((self._sample.place[drawn], size))
        cuts = [band * len(drawn) // self.n_quantile for band in range(self.n_quantile + 1)]
        bands = []
        for band in reversed(range(self.n_quantile)):
            members = order[cuts[band] : cuts[band + 1]]
            if not len(members):
                continue
            shown = np.sort(members)[: self.per_quantile]  # `drawn` lies by rising key
            shown = shown[np.lexsort((self._sample.place[drawn][shown], -size[shown]))]
            bands.append(
                QuantileBand(
                    lower=band / self.n_quantile,
                    upper=(band + 1) / self.n_quantile,
                    low=float(size[members[0]]),
                    high=float(size[members[-1]]),
                    contexts=tuple(self._context(self._sample, one) for one in drawn[shown].tolist()),
                )
            )
        return tuple(bands)

    def _context(self, kept: "_Lowest", entry: int) -> Context:
        row, position = divmod(int(kept.place[entry]), self.seq_len)
        slot = kept.slot[entry]
        begin = max(0, self.radius - position)
        window = slice(begin, self.radius + self.seq_len - position)
        documents = kept.windows["documents"][slot, window].tolist()
        activations = kept.windows["activations"][slot, window].tolist()
        back: dict[str, Any] = {}
        if self.looks_back:
            far, token, most = kept.windows["strongest"][slot].tolist()
            looked = kept.windows["looked"][slot, window].tolist()
            back = {"looked": tuple(looked), "strongest": (int(far), int(token), most)}
        return Context(
            tokens=tuple(kept.windows["tokens"][slot, window].tolist()),
            activations=tuple(None if np.isnan(one) else one for one in activations),
            documents=None if set(documents) == {-1} else tuple(documents),
            peak=self.radius - begin,
            row=row,
            position=position,
            **back,
        )


class _Lowest:
    """The ``capacity`` entries of lowest rank of each column, with their windows; the earlier of equals.

    Entries lie sorted by column, then rank. Their windows stay where they were put, in ``slot``: moving them with
    every batch would cost more than all else.
    """

    def __init__(self, columns: int, capacity: int, kinds: dict[str, tuple[type, int]], highest: ndarray):
        self.capacity, self.highest = capacity, highest
        self.column = np.empty(0, dtype=np.int64)
        self.rank = np.empty(0, dtype=highest.dtype)
        self.place = np.empty(0, dtype=np.int64)
        self.slot = np.empty(0, dtype=np.int64)
        self.free = np.empty(0, dtype=np.int64)
        self.bar = np.full(columns, highest)  # rank of a full column's last entry
        self.windows: Windows = {
            name: np.empty((0, width), dtype=kind) for name, (kind, width) in kinds.items()
        }

    def of(self, column: int) -> Int64[ndarray, " entries"]:
        """Entries of one column, by rising rank."""
        first, last = np.searchsorted(self.column, [column, column + 1])
        return np.arange(first, last)

    def offer(
        self,
        column: Int64[ndarray, " offered"],
        rank: Float32[ndarray, " offered"] | UInt64[ndarray, " offered"],
        place: Int64[ndarray, " offered"],
        windows: Callable[[Int64[ndarray, " some"]], Windows],
    ) -> None:
        """Take what ranks low enough; ``windows`` is asked for those entries only."""
        near = np.flatnonzero(rank <= self.bar[column])
        if not len(near):
            return
        old = len(self.column)
        column = np.concatenate([self.column, column[near]])
        rank = np.concatenate([self.rank, rank[near]])
        place = np.concatenate([self.place, place[near]])
        order = np.lexsort((place, rank, column))
        ahead = np.arange(len(order)) - np.searchsorted(column[order], column[order])
        taken = order[ahead < self.capacity]
        fresh = taken >= old
        left = np.ones(old, dtype=bool)
        left[taken[~fresh]] = False
        self.free = np.concatenate([self.slot[left], self.free])
        self._put(windows(near[taken[fresh] - old]), taken, fresh)
        self.column, self.rank, self.place = column[taken], rank[taken], place[taken]
        full = order[ahead == self.capacity - 1]
        self.bar[column[full]] = rank[full]

    def _put(self, new: Windows, taken: Int64[ndarray, " taken"], fresh: Bool[ndarray, " taken"]) -> None:
        """Windows of the fresh among the entries taken go where there is room."""
        n, size = int(fresh.sum()), len(self.windows["tokens"])
        if n > len(self.free):
            room = min(size + max(n, size), len(self.bar) * self.capacity)
            for name, kept in self.windows.items():
                self.windows[name] = np.empty((room, kept.shape[1]), kept.dtype)
                self.windows[name][:size] = kept
            self.free = np.concatenate([self.free, np.arange(size, room)])
        slot = np.empty(len(taken), dtype=np.int64)
        slot[~fresh], slot[fresh] = self.slot[taken[~fresh]], self.free[:n]
        self.slot, self.free = slot, self.free[n:]
        for name, kept in self.windows.items():
            kept[slot[fresh]] = new[name]


class _Histograms:
    """One histogram per column, of values whose range is not known beforehand.

    Bins are a power of two wide and start at 0. When a larger value arrives, neighbours are merged,
    which is exact: the result depends on the values alone and not on their order or grouping.
    """

    BITS = 6
    HALF = 2**BITS  # bins on either side of 0

    def __init__(self, columns: int):
        self.exponent = np.full(columns, -200)  # log2 of the bin width; below any float32
        self.counts = np.zeros((columns, 2 * self.HALF), dtype=np.int64)

    def add(self, column: Int64[ndarray, " nnz"], value: Float32[ndarray, " nnz"]) -> None:
        """Count nonzero values."""
        largest = np.zeros(len(self.exponent), dtype=np.float32)
        np.maximum.at(largest, column, np.abs(value))
        above = np.where(largest > 0, np.frexp(largest)[1] - self.BITS, self.exponent)
        shift = np.maximum(above - self.exponent, 0)
        if shift.any():
            rows, bins = np.nonzero(self.counts)
            merged = np.zeros_like(self.counts)
            # >> rounds down, as floor does; more than BITS + 1 shifts change nothing further
            target = ((bins - self.HALF) >> shift[rows].clip(max=self.BITS + 1)) + self.HALF
            np.add.at(merged, (rows, target), self.counts[rows, bins])
            self.counts, self.exponent = merged, self.exponent + shift
        at = np.floor(np.ldexp(value.astype(np.float64), -self.exponent[column])).astype(np.int64)
        flat = column * 2 * self.HALF + at + self.HALF
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def of(self, column: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Edges [bins + 1] and counts [bins], from the lowest nonempty bin (or 0) to the highest (or 0)."""
        filled = np.flatnonzero(self.counts[column])
        if not len(filled):
            return (), ()
        first, last = min(filled[0], self.HALF), max(filled[-1] + 1, self.HALF)
        edges = np.ldexp(np.arange(first, last + 1, dtype=np.float64) - self.HALF, self.exponent[column])
        return tuple(edges.tolist()), tuple(self.counts[column, first:last].tolist())


def _peaks(column, row, size) -> Int64[ndarray, " groups"]:
    """Entry of the largest size in every (column, row), the first of equals; entries lie sorted by both."""
    starts = np.flatnonzero(np.diff(column, prepend=-1) | np.diff(row, prepend=-1))
    if not len(starts):
        return starts
    group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(size)))
    largest = np.flatnonzero(size == np.maximum.reduceat(size, starts)[group])
    return largest[np.flatnonzero(np.diff(group[largest], prepend=-1))]


def _mix(x: UInt64[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """splitmix64: a bijection of the 64-bit integers whose outputs look random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _flat(tensor: Tensor) -> ndarray:
    return tensor.detach().reshape(-1).cpu().numpy()
