"""Families of features: dead ones, detectors of tokens and n-grams, and those that tell the position.

After Voita, Ferrando and Nalmpantis 2023 (2309.04827), for neurons and for features of dictionaries. A feature is a
*detector* if at most 5 n-grams, ending where it fires, cover at least 95 % of the positions where it does; *positional*
if its firing and the position share more than 0.05 nats. Detectors mostly take away from the logit of what they detect.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int, Int64
from numpy import ndarray
from torch import Tensor, nn

from saekit.autointerp.grams import BITS, MOST, SIZES, Grams, gram_keys, gram_of
from saekit.autointerp.neurons import Logits, check_finite, directions_of, logits_of, neurons_of
from saekit.autointerp.positions import NATS, ROWS, Positional, position_information, positional
from saekit.autointerp.stats import wilson
from saekit.dictionaries import Dictionary
from saekit.harvest import HarvestConfig, Stream
from saekit.models import Model, load_model
from saekit.types import ActivationBatch, Codes, SaekitError, check_beside

MISSED = 20  # of a detector's firings one in so many may be without one of its grams
# the fewest firings of which none off its grams is evidence, at 95 %, that below one in 20 are: 0.95 ** 59 < 0.05
FIRINGS = 59
REACH = 0.5  # of a gram's occurrences: a feature that fires on fewer waits for more than the gram
LOWEST = 0.05  # share of the vocabulary that is among the most negative logits
RANDOM = 200  # directions
AT_ONCE = 64  # features or directions
GRAMS = 128  # counters of a feature
TEXT_GRAMS = 1 << 20  # counters of the text
TOKENS_AT_ONCE = 8192  # rows of so many tokens are counted together


@dataclass(frozen=True)
class Detector:
    """What a detector detects: ``grams`` of ``n`` tokens, the fewest that cover 95 % of its firings, commonest first.

    ``counts``: firings on each; ``coverage``: their share of its firings; both are lower bounds unless ``exact``.
    ``reach``: share of these grams' occurrences on which it fires. The last token of a trigram covers all that the
    trigram does, so by coverage the least n is always 1: ``n`` is the least whose grams it reaches by half, and 1 where
    there is none.
    """

    n: int
    grams: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    coverage: float
    reach: float
    exact: bool


@dataclass(frozen=True)
class Suppression:
    """Of ``n`` detectors those that take away from the logits of their trigger: the token that they fire at.

    ``suppressing``: its logit lies in the lower half of the vocabulary's, to which half of all directions would put it;
    ``lowest``: in the lowest 20th. ``random``: share of 200 random directions that suppress one's trigger;
    ``others``: of the directions of all other detectors.
    """

    n: int
    suppressing: int
    lowest: int
    random: float
    others: float

    @property
    def share(self) -> float:
        """Of the detectors that suppress; nan where there are none."""
        return self.suppressing / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson(self.suppressing, self.n)


@dataclass(frozen=True, eq=False)
class Families:
    """What ``n_features`` features did on ``n_tokens`` unmasked tokens; ``name`` says whose they are.

    ``n_active`` [feature] counts firings, ``fired_at`` [feature, position] by position, ``tokens_at`` [position] the
    unmasked tokens there. ``detectors``, ``positional`` and ``ranks`` (of a trigger's logit among the vocabulary's: 0 is
    the most negative) are by feature. ``undecided`` features may be detectors, ``rare`` ones fired, but fewer than 59
    times. ``suppression`` is None where what features write doesn't meet an unembedding.
    """

    name: str
    n_tokens: int
    n_active: Int64[ndarray, " feature"]
    fired_at: Int64[ndarray, "feature position"]
    tokens_at: Int64[ndarray, " position"]
    detectors: Mapping[int, Detector]
    positional: Mapping[int, Positional]
    undecided: tuple[int, ...]
    information: Float64[ndarray, " feature"]
    ranks: Mapping[int, float] = field(default_factory=dict)
    suppression: Suppression | None = None

    @property
    def n_features(self) -> int:
        """How many there are."""
        return len(self.n_active)

    @property
    def dead(self) -> tuple[int, ...]:
        """Features that never fired on ``n_tokens`` tokens."""
        return tuple(np.flatnonzero(self.n_active == 0).tolist())

    @property
    def rare(self) -> tuple[int, ...]:
        """Features that fired fewer times than a detector has to."""
        return tuple(np.flatnonzero((self.n_active > 0) & (self.n_active < FIRINGS)).tolist())

    def rates(self, feature: int) -> tuple[Float64[ndarray, " position"], Float64[ndarray, " position"]]:
        """How often a feature fires at each position, and the standard error; nan where no token counts."""
        with np.errstate(invalid="ignore"):
            rate = self.fired_at[feature] / np.where(self.tokens_at > 0, self.tokens_at, np.nan)
            return rate, np.sqrt(rate * (1 - rate) / self.tokens_at)

    def counts(self) -> dict[str, int]:
        """Features of each family."""
        of_size = {f"{n}-gram detectors": sum(d.n == n for d in self.detectors.values()) for n in SIZES}
        kinds = list(self.positional.values())
        return {
            "features": self.n_features, "dead": len(self.dead), "rare": len(self.rare),
            "detectors": len(self.detectors), **of_size, "undecided": len(self.undecided),
            "positional": len(kinds), "strong": sum(p.strong for p in kinds),
            "oscillatory": sum(p.oscillatory for p in kinds),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """The table: a dict for each feature, as JSON holds it."""
        out = []
        for i, fired in enumerate(self.n_active.tolist()):
            d, p = self.detectors.get(i), self.positional.get(i)
            out.append({
                "feature": i, "fired": fired, "density": fired / max(1, self.n_tokens), "dead": fired == 0,
                "detector": d.n if d else None, "grams": [list(g) for g in d.grams] if d else [],
                "coverage": d.coverage if d else None, "reach": d.reach if d else None,
                "positional": p.kind if p else None, "information": float(self.information[i]),
                "trigger_rank": self.ranks.get(i),
            })  # fmt: skip
        return out

    def __str__(self) -> str:
        c, s = self.counts(), self.suppression
        sizes = ", ".join(f"{c[f'{n}-gram detectors']} of {n}-grams" for n in SIZES)
        out = (
            f"{self.name}: {self.n_features:,} features on {self.n_tokens:,} tokens\n"
            f"  dead: {c['dead']} never fired; {c['rare']} fired fewer than {FIRINGS} times\n"
            f"  detectors: {c['detectors']} ({sizes}); {c['undecided']} undecided\n"
            f"  positional: {c['positional']} ({c['strong']} strong, {c['oscillatory']} oscillatory)\n"
        )
        if s is None:
            return out + "  suppression: not measured, for what they write meets no unembedding"
        low, high = s.interval
        return out + (
            f"  suppression: {s.suppressing} of {s.n} detectors put their trigger in the lower half of the logits"
            + (f" ({s.share:.1%}, 95 % interval {low:.1%} to {high:.1%}; random directions {s.random:.1%}, those of other detectors {s.others:.1%}), {s.lowest} in the lowest {LOWEST:.0%}" if s.n else "")
        )  # fmt: skip


class FamilyCollector:
    """Reads tokens and codes batch by batch, in memory bound by features, positions and ``grams``, not by tokens.

    A feature fires where its code is not 0. Grams don't reach over masked positions, padding or borders of documents;
    a firing at which no n-gram ends is covered by none. Masked positions count nowhere. Grams are counted by rows of
    8192 tokens together, from the first on, so results don't depend on how the stream is cut into batches.
    """

    def __init__(self, n_features: int, grams: int = GRAMS):
        if n_features < 1:
            raise SaekitError(f"n_features = {n_features} must be at least 1")
        if grams <= MOST:
            raise SaekitError(f"grams = {grams} must be above the {MOST} that a detector may have")
        self.n_features = n_features
        self._features = [Grams(n_features, grams) for _ in SIZES]
        self._text = [Grams(1, TEXT_GRAMS) for _ in SIZES]
        self._waiting: list[
            tuple[list[ndarray], ndarray, ndarray]
        ] = []  # keys, columns, places of whole rows
        self._n_waiting = self._n_tokens = 0
        self._n_active, self._n_positive = (np.zeros(n_features, dtype=np.int64) for _ in range(2))
        self._fired = np.zeros((n_features, 0), dtype=np.int64)
        self._tokens = np.zeros(0, dtype=np.int64)

    def add(
        self,
        tokens: Int[Tensor, "rows seq"],
        documents: Int[Tensor, "rows seq"] | None,
        mask: Bool[Tensor, "rows seq"],
        codes: Codes,
    ) -> None:
        """Read one batch of packed rows; ``codes`` has shape (rows, seq), ``mask`` is true where a token counts."""
        self._check(tokens, documents, mask, codes)
        rows, seq = tokens.shape
        ids, counted = tokens.cpu().numpy().astype(np.int64), mask.cpu().numpy()
        owner = np.zeros_like(ids) if documents is None else documents.cpu().numpy()
        columns, places, positive = self._entries(codes, counted.reshape(-1))
        self._n_tokens += int(counted.sum())
        self._n_active += np.bincount(columns, minlength=self.n_features)
        self._n_positive += np.bincount(columns[positive], minlength=self.n_features)
        self._by_position(columns, places % seq, counted)
        begin = 0
        while begin < rows:
            end = min(rows, begin + max(1, -(-(TOKENS_AT_ONCE - self._n_waiting) // seq)))
            own = slice(*np.searchsorted(places, [begin * seq, end * seq]))
            keys = gram_keys(ids[begin:end], owner[begin:end], counted[begin:end])
            self._waiting.append((keys, columns[own], places[own] - begin * seq))
            self._n_waiting += (end - begin) * seq
            if self._n_waiting >= TOKENS_AT_ONCE:
                self._features, self._text = self._counted()
                self._waiting, self._n_waiting = [], 0
            begin = end

    def _check(self, tokens, documents, mask, codes) -> None:
        check_beside(tokens, documents, mask, codes, self.n_features)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << BITS:
            raise SaekitError(f"tokens: ids must be at least 0 and below {1 << BITS}")

    def _entries(self, codes: Codes, mask: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        """Column and place of what fires where the mask is true, by rising place, and whether it is positive."""
        values = codes.values.detach().double().cpu().numpy().reshape(-1)
        columns = codes.indices.cpu().numpy().reshape(-1).astype(np.int64)
        places = codes.row_ids().cpu().numpy()
        on = mask[places] & (values != 0)
        columns, places, values = columns[on], places[on], values[on]
        if not np.isfinite(values).all():
            raise SaekitError("codes: some values are nan or infinite; look for the layer that made them")
        key = places * self.n_features + columns
        if len(key) > 1 and not np.diff(np.sort(key)).all():  # a pursuit may choose a unit twice for a token
            key, which = np.unique(key, return_inverse=True)
            values = np.bincount(which, values)
            places, columns = np.divmod(key[values != 0], self.n_features)
            values = values[values != 0]
        return columns, places, values > 0

    def _by_position(self, columns: ndarray, positions: ndarray, mask: ndarray) -> None:
        more = mask.shape[1] - len(self._tokens)
        if more > 0:
            self._tokens = np.pad(self._tokens, (0, more))
            self._fired = np.pad(self._fired, ((0, 0), (0, more)))
        self._tokens[: mask.shape[1]] += mask.sum(0)
        at, n = np.unique(columns * len(self._tokens) + positions, return_counts=True)
        self._fired.reshape(-1)[at] += n

    def _counted(self) -> tuple[list[Grams], list[Grams]]:
        """The counts with the rows that wait."""
        if not self._waiting:
            return self._features, self._text
        cells = np.cumsum([0, *(len(keys[0]) for keys, _, _ in self._waiting)])
        columns = np.concatenate([part for _, part, _ in self._waiting])
        places = np.concatenate([part + c for (_, _, part), c in zip(self._waiting, cells, strict=False)])
        every, none = np.arange(cells[-1]), np.zeros(cells[-1], dtype=np.int64)
        keys = [np.concatenate([parts[i] for parts, _, _ in self._waiting]) for i in range(len(SIZES))]
        return (
            [own.plus(columns, places, key) for own, key in zip(self._features, keys, strict=True)],
            [own.plus(none, every, key) for own, key in zip(self._text, keys, strict=True)],
        )

    def result(self, name: str = "features", seed: int = 0, logits: Logits | None = None) -> Families:
        """The families on what was read so far. ``seed``: of the chance and of random directions.

        ``logits`` gives what features write to the logits; without it suppression isn't measured.
        """
        features, text = self._counted()
        detectors, undecided = {}, []
        for i in np.flatnonzero(self._n_active >= FIRINGS).tolist():
            found, open_ = self._detector(i, features, text)
            if found is not None:
                detectors[i] = found
            elif open_:
                undecided.append(i)
        reached = np.where(self._tokens >= ROWS, self._tokens, 0)
        blocks = np.split(self._fired, range(AT_ONCE, self.n_features, AT_ONCE))
        information = np.concatenate([position_information(block, reached) for block in blocks])
        told = {
            i: positional(self._fired[i], self._tokens, (seed, i))
            for i in np.flatnonzero(information > NATS).tolist()
        }
        ranks, suppression = ({}, None) if logits is None else _suppression(
            logits, detectors, np.where(2 * self._n_positive < self._n_active, -1.0, 1.0), seed
        )  # fmt: skip
        return Families(
            name, self._n_tokens, self._n_active.copy(), self._fired.copy(), self._tokens.copy(), detectors,
            {i: p for i, p in told.items() if p is not None}, tuple(undecided), information, ranks, suppression,
        )  # fmt: skip

    def _detector(
        self, column: int, features: list[Grams], text: list[Grams]
    ) -> tuple[Detector | None, bool]:
        """The detector that a feature is, if it surely is one, and else whether it may be one."""
        fired, possible = int(self._n_active[column]), False
        first = None
        for n, own, whole in zip(SIZES, features, text, strict=True):
            grams, counts = own.of(column)
            grams, covered = grams[:MOST], counts[:MOST].cumsum()
            dropped = int(own.dropped[column])
            enough = np.flatnonzero(MISSED * (fired - covered) <= fired)
            possible |= bool(len(covered)) and MISSED * (fired - int(covered[-1]) - MOST * dropped) <= fired
            if not len(enough):
                break  # longer grams cover no more
            some = int(enough[0]) + 1
            occurred = whole.counts[np.searchsorted(whole.grams, grams[:some]).clip(max=len(whole.grams) - 1)]
            kept = np.isin(grams[:some], whole.grams)
            n_text = int(occurred[kept].sum()) + some * int(whole.dropped[0])
            hits = int(covered[some - 1])
            found = Detector(
                n, tuple(gram_of(g, n) for g in grams[:some].tolist()), tuple(counts[:some].tolist()), hits / fired,
                min(1.0, hits / n_text), dropped == int(whole.dropped[0]) == 0,
            )  # fmt: skip
            first = first or found
            if found.reach >= REACH:
                return found, False
        return first, possible


@torch.no_grad()
def _suppression(
    logits: Logits, detectors: Mapping[int, Detector], signs: Float64[ndarray, " feature"], seed: int
) -> tuple[dict[int, float], Suppression]:
    """Rank of each detector's trigger among the logits, by firings; and how many suppress it."""
    from scipy.sparse import csr_array

    listed = sorted(detectors)
    if not listed:
        return {}, Suppression(0, 0, 0, math.nan, math.nan)
    tokens, at = np.unique([g[-1] for i in listed for g in detectors[i].grams], return_inverse=True)
    counts = np.array([c for i in listed for c in detectors[i].counts], dtype=np.float64)
    owner = np.repeat(np.arange(len(listed)), [len(detectors[i].grams) for i in listed])
    shares = csr_array((counts / np.bincount(owner, counts)[owner], (owner, at)), (len(listed), len(tokens)))

    def ranked(directions: Tensor) -> Iterator[ndarray]:
        """Ranks of every detector's trigger by each direction."""
        for part in directions.split(AT_ONCE):
            yield from (shares @ logits.ranks(part, tokens).T).T

    own = logits.directions[listed] * torch.from_numpy(signs[listed]).to(logits.directions)[:, None]
    ranks, n, others = {}, len(listed), 0
    for j, found in enumerate(ranked(own)):
        ranks[listed[j]] = float(found[j])
        others += int((np.delete(found, j) < 0.5).sum())
    drawn = torch.randn(RANDOM, own.shape[1], generator=torch.Generator().manual_seed(seed)).to(own)
    random = sum(int((found < 0.5).sum()) for found in ranked(drawn))
    return ranks, Suppression(
        n, sum(r < 0.5 for r in ranks.values()), sum(r < LOWEST for r in ranks.values()),
        random / (n * RANDOM), others / (n * (n - 1)) if n > 1 else math.nan,
    )  # fmt: skip


def families(
    model: "Model | str | nn.Module",
    text: Any,
    dictionary: Dictionary | None = None,
    hook_point: str | None = None,
    max_tokens: int = 200_000,
    *,
    threshold: float | None = None,
    context: int | None = None,
    split: str = "train",
    device: "str | torch.device | None" = None,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Families:
    """The families of a dictionary's features, or else of the neurons of the MLP at ``hook_point`` (``blocks.0.mlp``).

    ``max_tokens`` of the text are read, masked ones included. A feature fires where its code is not 0; with a
    dictionary, ``hook_point`` is where it reads (None: what it names). A neuron fires where its non-linearity (of a
    gated MLP: the gate's) is given more than ``threshold``: by default 0 where the activation lets through what is
    above it and next to nothing of the rest (ReLU, GELU, SiLU); of others it has to be given. What is as wide as the
    rows of the unembedding is taken to be written to the stream, and has a ``suppression``.
    """
    if dictionary is None and hook_point is None:
        raise SaekitError(
            "give dictionary=, for the families of its features, or hook_point=, for those of an MLP's neurons"
        )
    if dictionary is not None and threshold is not None:
        raise SaekitError(f"threshold = {threshold} is for neurons; a dictionary says itself where it fires")
    view = load_model(model, device=device)
    codes: Callable[[ActivationBatch], Codes]
    written: Tensor | None
    if dictionary is None:
        neurons = neurons_of(view, str(hook_point), threshold)
        points, name, codes, written = (
            neurons.points,
            f"neurons of {hook_point}",
            neurons.codes,
            neurons.written,
        )
    else:
        points = dictionary.reads if hook_point is None else (hook_point,)
        name, context = f"features of {', '.join(points)}", context or dictionary.context
        codes, written = _codes(dictionary, points), directions_of(dictionary)
    stream = Stream(view, text, HarvestConfig(points, max_tokens, context, split=split))
    collector: FamilyCollector | None = None
    done = 0
    for batch in stream:
        if batch.tokens is None or batch.documents is None:
            raise SaekitError(
                f"model {view.name!r} reads no tokens here, and families are of tokens and positions"
            )
        found = codes(batch)
        collector = collector or FamilyCollector(found.n_features)
        collector.add(batch.tokens, batch.documents, batch.mask, found)
        done += batch.mask.numel()
        if on_batch is not None:
            on_batch(done, max_tokens)
    if collector is None:
        raise SaekitError("the text gives no tokens; give more text")
    return collector.result(name, seed, None if written is None else logits_of(view, written))


def _codes(dictionary: Dictionary, points: tuple[str, ...]) -> Callable[[ActivationBatch], Codes]:
    if not points:
        raise SaekitError("the dictionary names no hook point; give hook_point=, where it reads")

    @torch.no_grad()
    def codes(batch: ActivationBatch) -> Codes:
        for point in points:
            check_finite(batch, point)
        x = torch.cat([batch.activations[point] for point in points], -1)
        return dictionary.encode(x.to(dictionary.device))

    return codes
