"""Attribution graphs: what every feature, error, token and bias adds to features and logits, exactly."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_array
from torch import Tensor, nn

from saekit.circuits.frozen import Frozen
from saekit.circuits.places import Placeable, place, stands_of
from saekit.circuits.rows import Own, Trace
from saekit.circuits.targets import Feature, Given, Target, names_of, resolve
from saekit.circuits.weights import weights
from saekit.graph import Graph
from saekit.graph.compress import Rows, below, compress
from saekit.graph.data import with_targets
from saekit.graph.prune import without
from saekit.kernels.threads import parallel
from saekit.models import Model, load_model
from saekit.tokens import Decode, in_text
from saekit.types import SaekitError

BATCH = 128  # targets whose gradients are walked down together
BUDGET, EDGES = 8192, 8192  # features that get a row, and entries of a row
WAYS = ("whole", "slope")  # of going through scores
ROUND = 4  # batches between two rankings


def trace(
    model: "Model | str | nn.Module",
    dictionaries: "Placeable | Sequence[Placeable]",
    prompt: "str | Sequence[int] | Int[Tensor, ' seq']",
    target: "Given | Sequence[Given] | None" = None,
    budget: int = BUDGET,
    edges: int = EDGES,
    batch: int = BATCH,
    scores: str = "slope",
    on_rows: "Callable[[int, int], None] | None" = None,
) -> Graph:
    """The attribution graph of a prompt: text, or token ids.

    ``target``: tokens, whose logits less the mean logit are meant, differences (``Logit("a") - Logit("b")``),
    directions (:class:`Target`) or features (:class:`Feature`); by default the likeliest next tokens, up to ten, that
    cover 95 %. ``budget``: how many features get a row of their own, those of most influence first; ``edges``: how
    many inputs of each row are kept, the strongest ones. What is left out is in each row's pruned node, so that every
    row still adds up to its value.

    ``scores``: how ``graph.aware`` goes through attention scores: by their "slope", as if a little of what stands behind
    a score went, and then through norms too, or as a "whole", as if all did. Slopes foretell ablations better where many
    nodes share a score, as in language models; where attention is saturated, as in hand-built circuits, they are 0.
    ``on_rows(done, total)`` is told how many features have their row.
    """
    if scores not in WAYS:
        raise SaekitError(f"scores = {scores!r} must be one of {', '.join(WAYS)}")
    for name, number in (("budget", budget), ("edges", edges), ("batch", batch)):
        if not isinstance(number, numbers.Integral) or number < 1:
            raise SaekitError(f"{name} = {number!r} must be a whole number from 1")
    model = load_model(model)
    run = traced(model, dictionaries, prompt)
    targets = resolve(run.frozen, model, target)
    rows = _Rows(run, targets, edges, batch, scores)
    rows.fill(budget, on_rows or (lambda *_: None))
    graph = rows.graph(model)
    stays = ~(graph.leaves & graph.of_kind("feature"))
    # over all paths, those through features that have no row too
    totals = np.pad(run.targets(targets, through=True).cpu().double().numpy(), ((0, 0), (0, len(targets))))
    return dataclasses.replace(without(graph, stays), totals=totals[:, stays])


def traced(
    model: "Model | str | nn.Module",
    dictionaries: "Placeable | Sequence[Placeable]",
    prompt: "str | Sequence[int] | Int[Tensor, ' seq']",
) -> Trace:
    """A prompt with dictionaries in place."""
    model = load_model(model)
    stands = stands_of(dictionaries)
    w = weights(model)
    frozen = Frozen(w, _tokens(model, prompt, len(w.W_E)))
    return Trace(frozen, [place(frozen, model, stand) for stand in stands])


class _Rows:
    """Rows of a graph while they are computed; features are numbered over all parts in order."""

    def __init__(self, run: Trace, targets: Sequence[Target | Feature], edges: int, batch: int, scores: str):
        self.run, self.targets, self.edges, self.batch, self.scores = run, targets, edges, batch, scores
        self.names = names_of(targets, run.seq)
        self.ends = np.cumsum([0, *(len(own.part.positions) for own in run.parts)])
        self.numbers: list[np.ndarray] = []  # of the features whose rows are there
        self.found: list[Rows] = []
        self.last = self._compress(run.targets(targets))
        self.aware = run.targets(targets, through=True, free=scores)

    def _compress(self, block: Tensor) -> Rows:
        width = self.run.columns.n + len(self.targets)
        return compress(block.cpu().numpy(), self.edges, self.run.pruned.start, width)

    def fill(self, budget: int, tell: Callable[[int, int], None]) -> None:
        """Compute the rows of as many features as the budget admits, by influence if it doesn't admit all."""
        n, done = int(self.ends[-1]), 0
        left, budget = np.ones(n, bool), min(n, budget)
        while done < budget:
            chosen = (
                np.arange(n) if n == budget else self._strongest(left, min(budget - done, ROUND * self.batch))
            )
            if not len(chosen):
                break
            self._add(chosen, tell, done, budget)
            left[chosen], done = False, done + len(chosen)
        tell(budget, budget)

    def _strongest(self, left: np.ndarray, n: int) -> np.ndarray:
        """Features of most influence by the rows that are there, of those that have none."""
        influence = np.where(left, self.graph().influence()[self._nodes()], 0)
        order = np.argsort(-influence, kind="stable")[:n]
        return np.sort(order[influence[order] > 0])

    def _nodes(self) -> np.ndarray:
        """The node of each feature."""
        each = [np.arange(own.nodes.start, own.nodes.stop) for own in self.run.parts]
        return np.concatenate([np.zeros(0, np.int64), *each])

    def _add(self, chosen: np.ndarray, tell: Callable[[int, int], None], done: int, total: int) -> None:
        """Compute the rows of some features, a batch of one part at a time on each thread."""
        jobs: list[tuple[Own, np.ndarray, int]] = []
        for own, first, stop in zip(self.run.parts, self.ends[:-1], self.ends[1:], strict=True):
            some = chosen[(chosen >= first) & (chosen < stop)]
            starts = range(0, len(some), self.batch)
            jobs += [(own, some[at : at + self.batch], int(first)) for at in starts]
        found: list[Any] = [None] * len(jobs)
        told = Lock()

        def work(start: int, end: int) -> None:
            nonlocal done
            for i in range(start, end):
                own, some, first = jobs[i]
                entries = torch.from_numpy(some - first).to(own.part.positions.device)
                found[i] = self._compress(self.run.features(own, entries, own.nodes.start))
                with told:
                    done += len(some)
                    tell(done, total)

        parallel(work, len(jobs), 1)
        self.numbers += [some for _, some, _ in jobs]
        self.found += found

    def graph(self, model: Model | None = None) -> Graph:
        """The graph of the rows that are there; features that have none are leaves."""
        run, n_targets = self.run, len(self.targets)
        numbers = np.concatenate([np.zeros(0, np.int64), *self.numbers])
        matrix, dropped = below([*self.found, self.last])
        order = np.argsort(numbers, kind="stable")
        if (order[1:] < order[:-1]).any():
            lines = np.concatenate([order, np.arange(len(numbers), len(numbers) + n_targets)])
            matrix, dropped, numbers = csr_array(matrix[lines]), dropped[lines], numbers[order]
        ends = [*np.searchsorted(numbers, self.ends[1:]).tolist(), len(numbers) + n_targets]
        values = [float(run.value(t)) for t in self.targets]
        positions = np.array([t.position % run.seq for t in self.targets])
        table = with_targets(run.columns.table(), len(run.frozen.weights.blocks), positions, values)
        of = np.concatenate([self._nodes()[numbers], np.arange(len(table) - n_targets, len(table))])
        tokens = tuple(run.frozen.tokens.tolist())
        decode = None if model is None else _words(model)
        aware = np.pad(self.aware.cpu().double().numpy(), ((0, 0), (0, n_targets)))
        return Graph(
            table, matrix, of, tuple(dict.fromkeys(e for e in ends if e)), dropped, aware,
            tuple(t.weight if isinstance(t, Target) else 1.0 for t in self.targets), tokens,
            () if decode is None else tuple(decode([t]) for t in tokens), tuple(one.name for one in run.placed),
            tuple(run.biases), self.names, {} if model is None else self._about(model),
        )  # fmt: skip

    def _about(self, model: Model) -> dict[str, Any]:
        """What graphs say of their model: its name, and its words for tokens that are targets."""
        words, decode = {}, _words(model)
        for name, target in zip(self.names, self.targets, strict=True):
            if decode is not None and target.name.isdecimal():
                words[name] = decode([int(target.name)]) + name.removeprefix(target.name)
        return {
            "model": model.name,
            "vocabulary": len(self.run.frozen.weights.W_E),
            "outputs": words,
            "aware": self.scores,
        }


def _tokens(model: Model, prompt: "str | Sequence[int] | Tensor", vocabulary: int) -> Tensor:
    """Token ids of a prompt; raises where it is none that the model can read."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise SaekitError(f"prompt is text, and model {model.name!r} has no tokenizer; give token ids")
        ids = model.tokenizer(prompt, verbose=False)["input_ids"]  # too long a prompt is refused below
    else:
        ids = prompt
    try:
        given = torch.as_tensor(ids)
        tokens = given.to(model.device, torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise SaekitError(f"prompt {ids!r} is none; give text or token ids") from None
    if given.is_floating_point() and given.numel():
        raise SaekitError(f"prompt has numbers of type {given.dtype}; give whole numbers, the ids of tokens")
    if tokens.ndim != 1 or len(tokens) == 0:
        raise SaekitError(f"prompt has shape {tuple(tokens.shape)}; give one sequence of at least one token")
    if model.context is not None and len(tokens) > model.context:
        raise SaekitError(
            f"prompt has {len(tokens)} tokens and model {model.name!r} reads {model.context}; give fewer"
        )
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(wrong):
        raise SaekitError(f"token {int(wrong[0])} of the prompt is none; the model has 0 to {vocabulary - 1}")
    return tokens


def _words(model: Model) -> Decode | None:
    """What tokens say within a text, where the model has a tokenizer."""
    return None if model.tokenizer is None else in_text(model.tokenizer.decode, len(model.tokenizer))
