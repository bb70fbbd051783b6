"""Sparse feature circuits (Marks et al. 2025, 2403.19647): what features and errors do to a metric, by patching.

An indirect effect is ``IE(m; a) = m(clean | do(a = its value on the patch prompt)) - m(clean)``, for a node ``a`` of one
position of one prompt (eq. 1); without patch prompts nodes are set to zero. An edge is the part of a node's effect that
reaches another one directly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.circuits.frozen import Site
from saekit.circuits.spliced import Changes, Group, Pass, Spliced
from saekit.registry import nearest
from saekit.types import Codes, SaekitError

Metric = Callable[[Tensor], Tensor]  # of what is read [prompt, seq, vocabulary] to [prompt]
Prompts = Sequence[Sequence[int]] | Tensor
# by group, which nodes belong to it: of each position, or of all positions alike
Circuit = Sequence[Bool[Tensor, "..."]]
METHODS = ("exact", "attribution", "integrated")
STEPS, BATCH = 10, 256  # of integrated gradients; passes at a time
CHUNK = 1 << 14  # nodes whose vectors are made at a time


@dataclass(frozen=True)
class Effects:
    """What nodes of each group do to a metric: :attr:`by_prompt` are codes [prompt, seq] whose values are effects.

    A node is there where it is active on the clean or on the patch prompt. ``gradients``: by group and site those that
    the effects are made of; none of ``exact``.
    """

    groups: tuple[Group, ...]
    by_prompt: tuple[Codes, ...]
    gradients: tuple[dict[Site, Tensor], ...]

    def mean(self, positions: bool = True) -> list[Float[Tensor, "..."]]:
        """Mean over prompts, by group [seq, n]; without ``positions`` of the sums over them, [n]."""
        return [_mean(codes, codes.values, positions) for codes in self.by_prompt]

    def active(self, positions: bool = True) -> list[Bool[Tensor, "..."]]:
        """Whether each node is active on any prompt."""
        return [_mean(c, torch.ones_like(c.values), positions) > 0 for c in self.by_prompt]


def _mean(codes: Codes, values: Tensor, positions: bool) -> Tensor:
    prompts, seq = codes.shape
    row = codes.row_ids() % seq if positions else torch.zeros_like(codes.row_ids())
    out = values.new_zeros(seq if positions else 1, codes.n_features)
    out = out.index_put((row, codes.indices.long()), values, accumulate=True) / prompts
    return out if positions else out[0]


class _Move:
    """How a group's nodes go from the clean to the patch prompts: an entry for each that is active on either."""

    def __init__(self, group: int, clean: Pass, patch: Pass | None):
        self.group, self.sites = group, clean.spliced.groups[group].writes
        self.shape, self.n = tuple(clean.tokens.shape), clean.spliced.groups[group].n
        runs = [(clean, -1.0), *([(patch, 1.0)] if patch is not None else [])]
        found = [run.entries(group) for run, _ in runs]
        keys, inverse = torch.cat([r * self.n + u for r, u in found]).unique(return_inverse=True)
        self.rows, self.units = keys // self.n, keys % self.n
        self.runs = [
            (run, sign, at)
            for (run, sign), at in zip(runs, inverse.split([len(r) for r, _ in found]), strict=True)
        ]

    def vectors(self, some: Int[Tensor, " some"]) -> list[Float[Tensor, "some d"]]:
        """By how much what some entries write changes, at each site; their numbers rise."""
        clean, width = self.runs[0][0], len(some)
        place = torch.full((len(self.rows),), -1, device=some.device)
        place[some] = torch.arange(width, device=some.device)
        out = [clean.before[site].new_zeros(width, clean.before[site].shape[-1]) for site in self.sites]
        for run, sign, at in self.runs:
            mine = (place[at] >= 0).nonzero()[:, 0]
            for total, part in zip(out, run.vectors(self.group, mine), strict=True):
                total.index_add_(0, place[at[mine]], sign * part.detach())
        return out

    def dot(self, gradients: Mapping[Site, Float[Tensor, "prompt seq d"]]) -> Float[Tensor, " entry"]:
        """What the moves add by their gradients."""
        out = []
        for some in torch.arange(len(self.rows), device=self.rows.device).split(CHUNK):
            own = zip(self.sites, self.vectors(some), strict=True)
            out.append(_sum([(gradients[s].flatten(0, 1)[self.rows[some]] * v).sum(1) for s, v in own]))
        return torch.cat(out)

    def codes(self, values: Float[Tensor, " entry"]) -> Codes:
        """Values of the entries as codes."""
        counts = torch.bincount(self.rows, minlength=self.shape[0] * self.shape[1])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Codes(offsets, self.units.int(), values, self.n, self.shape)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def measure(metric: Metric, run: Pass) -> Float[Tensor, " prompt"]:
    """The metric of a pass; raises where it is not one number for each prompt."""
    value: Any = metric(run.out)
    wanted = (len(run.tokens),)
    if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise SaekitError(
            f"metric gives {got} for what is read, {tuple(run.out.shape)}; return one number for each prompt, {wanted}"
        )
    return value


def effects(
    spliced: Spliced, metric: Metric, clean: Prompts, patch: Prompts | None = None, method: str = "integrated",
    steps: int = STEPS, batch: int = BATCH,
) -> Effects:  # fmt: skip
    """Indirect effects of all nodes on a differentiable metric, from clean to patch prompts of the same shape (or to zero).

    ``exact``: one pass for each node that differs, ``batch`` at a time. ``attribution``: first order, two passes and one
    gradient in all. ``integrated``: the gradient averaged over midpoints between clean and patch, one site at a time, its
    features and error together; effects of a site then add up to what patching all of it does. Sites get ``steps``
    midpoints on average, more of them where the sum is missed by more.
    """
    if method not in METHODS:
        raise SaekitError(f"method {method!r} is unknown{nearest(method, list(METHODS))}")
    if steps < 1 or batch < 1:
        raise SaekitError(f"steps = {steps} and batch = {batch} must be at least 1")
    start, end = _runs(spliced, clean, patch)
    moves = [_Move(g, start, end) for g in range(len(spliced.groups))]
    if method == "exact":
        return Effects(tuple(spliced.groups), tuple(_exact(metric, start, m, batch) for m in moves), ())
    if method == "attribution":
        found = [_gradients(spliced, metric, start.tokens, list(spliced.written))] * len(spliced.units)
    else:
        found = _integrated(metric, start, end, steps)
    of = {g: gradients for unit, gradients in zip(spliced.units, found, strict=True) for g in unit}
    own = tuple({site: of[g][site] for site in group.writes} for g, group in enumerate(spliced.groups))
    return Effects(
        tuple(spliced.groups), tuple(m.codes(m.dot(g)) for m, g in zip(moves, own, strict=True)), own
    )  # fmt: skip


@torch.no_grad()
def _runs(spliced: Spliced, clean: Prompts, patch: Prompts | None) -> tuple[Pass, Pass | None]:
    if not spliced.groups:
        raise SaekitError("there are no nodes: stands are empty; give dictionaries, Neurons or Heads")
    start = spliced.run(clean)
    end = None if patch is None else spliced.run(patch)
    if end is not None and end.tokens.shape != start.tokens.shape:
        raise SaekitError(
            f"patch prompts are {tuple(end.tokens.shape)} and clean ones {tuple(start.tokens.shape)}, [prompt, seq]; give one of the same length for each"
        )
    return start, end


@torch.enable_grad()
def _gradients(
    spliced: Spliced, metric: Metric, tokens: Tensor, sites: Sequence[Site], added: "Mapping[Site, Tensor] | None" = None
) -> dict[Site, Tensor]:  # fmt: skip
    """The metric's gradient at some sites that are written, each prompt's by itself."""
    run = spliced.run(tokens, Changes(added=added or {}))
    value = measure(metric, run)
    if not value.requires_grad:
        raise SaekitError(
            "metric is not differentiable in what it reads; use method 'exact', or torch operations that are"
        )
    at = [run.at[site] for site in sites]
    found = torch.autograd.grad(value.sum(), at, allow_unused=True)
    return {s: torch.zeros_like(x) if g is None else g for s, x, g in zip(sites, at, found, strict=True)}


@torch.no_grad()
def way(start: Pass, end: Pass | None, unit: Sequence[int]) -> dict[Site, Float[Tensor, "prompt seq d"]]:
    """What has to be added at the sites of some groups so that all their nodes are what they are on ``end`` (None: 0)."""
    out: dict[Site, Tensor] = {}
    for g in unit:
        for site in start.spliced.groups[g].writes:
            moved = -start.written_by(g, site) + (0 if end is None else end.written_by(g, site))
            out[site] = out[site] + moved if site in out else moved
    return out


class _Way:
    """A site's gradient averaged over the way of its features and errors from clean to patch, by the midpoint rule.

    What its effects must add up to is known: the metric's change where all of the site is patched.
    """

    def __init__(self, metric: Metric, start: Pass, end: Pass | None, unit: Sequence[int]):
        self.metric, self.start, self.whole = metric, start, way(start, end, unit)
        with torch.no_grad():
            moved = start.spliced.run(start.tokens, Changes(added=self.whole))
            self.true = measure(metric, moved) - measure(metric, start)
        self.total: dict[Site, Tensor] = {site: torch.zeros_like(v) for site, v in self.whole.items()}
        self.steps = 0

    def refine(self, steps: int) -> None:
        """Take ``steps`` midpoints; of three times as many as before every second third is there already."""
        for step in range(steps):
            if self.steps and step % 3 == 1:
                continue
            share = (step + 0.5) / steps
            added = {site: share * v for site, v in self.whole.items()}
            found = _gradients(self.start.spliced, self.metric, self.start.tokens, list(added), added)
            self.total = {site: total + found[site] for site, total in self.total.items()}
        self.steps = steps

    @property
    def gradients(self) -> dict[Site, Tensor]:
        return {site: total / self.steps for site, total in self.total.items()}

    @property
    def missed(self) -> float:
        """By how much the effects miss their sum, mean over prompts."""
        found = _sum([(g * self.whole[site]).flatten(1).sum(1) for site, g in self.gradients.items()])
        return (found - self.true).abs().mean().item()


def _integrated(metric: Metric, start: Pass, end: Pass | None, steps: int) -> list[dict[Site, Tensor]]:
    """Averaged gradients by unit: half of the passes everywhere, then thirds of the steps where the sum is missed most.

    The paper's code takes steps 0 .. N - 1 of N (left Riemann), whose effects miss the sum by O(1/N).
    """
    ways = [_Way(metric, start, end, unit) for unit in start.spliced.units]
    for one in ways:
        one.refine(max(1, steps // 2))
    left = steps * len(ways) - sum(one.steps for one in ways)
    while affordable := [one for one in ways if 2 * one.steps <= left]:
        worst = max(affordable, key=lambda one: one.missed)
        left -= 2 * worst.steps
        worst.refine(3 * worst.steps)
    return [one.gradients for one in ways]


@torch.no_grad()
def _exact(metric: Metric, start: Pass, move: _Move, batch: int) -> Codes:
    """Effects by one pass for each entry whose node differs: in a round each prompt has one of its nodes patched."""
    (prompts, seq), before = move.shape, measure(metric, start)
    out = torch.zeros(len(move.rows), dtype=before.dtype, device=before.device)
    counts = torch.bincount(move.rows // seq, minlength=prompts)
    turn = torch.arange(len(move.rows), device=out.device) - (counts.cumsum(0) - counts)[move.rows // seq]
    rounds = max(1, batch // prompts)
    for first in range(0, int(counts.max()), rounds):
        some = ((turn >= first) & (turn < first + rounds)).nonzero()[:, 0]
        vectors = move.vectors(some)
        here, at = turn[some] - first, move.rows[some]
        n = int(here.max()) + 1
        added = {}
        for site, v in zip(move.sites, vectors, strict=True):
            whole = v.new_zeros(n, prompts * seq, v.shape[1])
            whole[here, at] = v
            added[site] = whole.view(n * prompts, seq, -1)
        run = start.spliced.run(start.tokens.repeat(n, 1), Changes(added=added))
        values = torch.stack([metric(part) for part in run.out.split(prompts)])
        # the pass of a node that doesn't differ is the clean one but for rounding
        differs = torch.stack([(v != 0).any(1) for v in vectors]).any(0)
        out[some] = (values - before)[here, at // seq] * differs
    return move.codes(out)


@dataclass(frozen=True)
class Edges:
    """Direct effects between the nodes of a circuit, mean over prompts.

    ``nodes`` are group, position (-1: all) and unit; ``weights`` [target, source] have the metric as their last target.
    Where all nodes are kept, what leaves a node adds up to its effect by the gradients that the edges are made of, where
    these are first-order ones.
    """

    nodes: Int[Tensor, "node 3"]
    weights: Float[Tensor, "target node"]


def edges(
    spliced: Spliced,
    metric: Metric,
    found: Effects,
    circuit: Circuit,
    clean: Prompts,
    patch: Prompts | None = None,
) -> Edges:
    """Edges ``grad_d m . grad_u d . (u_patch - u_clean)`` between kept nodes u and d, with all places between them held.

    ``found``: the nodes' effects on the same prompts, whose gradients are the first factor. Where nodes of all positions
    are one, their edges are the sums over both ends' positions. A node gets one gradient of the whole batch.
    """
    if not found.gradients:
        raise SaekitError("effects of method 'exact' have no gradients, of which edges are made; use another")
    start, end = _runs(spliced, clean, patch)
    check(spliced, circuit, start.tokens.shape[1])
    table = _Table(circuit)
    sources = []
    for g in range(len(spliced.groups)):
        move = _Move(g, start, end)
        nodes = table.of(g, move.rows % move.shape[1], move.units)
        kept = (nodes >= 0).nonzero()[:, 0]
        sources.append((move.sites, move.rows[kept], nodes[kept], move.vectors(kept)))
    weights = torch.zeros(len(table.nodes) + 1, len(table.nodes), device=start.tokens.device)

    def collect(target: int, gradients: Mapping[Site, Tensor]) -> None:
        for sites, rows, nodes, vectors in sources:
            for site, v in zip(sites, vectors, strict=True):
                if site in gradients:
                    share = (gradients[site].flatten(0, 1)[rows] * v).sum(1)
                    weights[target].index_add_(0, nodes, share.to(weights))

    with torch.enable_grad():
        run = spliced.run(start.tokens, cut=True)
        for g, _ in enumerate(spliced.groups):
            value, mine, slope = _downstream(run, g, table, found.gradients[g])
            for node in mine[mine >= 0].unique().tolist() if value.requires_grad else []:
                own = (mine == node).view(-1, *[1] * (slope.ndim - 1))
                collect(node, _to_places(run, value, slope * own))
        last = measure(metric, run)
        collect(len(table.nodes), _to_places(run, last, torch.ones_like(last)))
    return Edges(table.nodes, weights / len(start.tokens))


def check(spliced: Spliced, circuit: Circuit, seq: int) -> None:
    """Raise unless a circuit has a mask for each group, of its size and of bools: of others ``~`` isn't all other nodes."""
    wanted = [(group.n,) for group in spliced.groups]
    for g, kept in enumerate(circuit):
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            kind = str(getattr(kept, "dtype", type(kept).__name__)).removeprefix("torch.")
            raise SaekitError(
                f"circuit has {kind} for group {g}; give a mask of bools, as in circuit[{g}] > 0"
            )
    for g, n in enumerate(wanted):
        if len(circuit) != len(wanted) or tuple(circuit[g].shape) not in (n, (seq, *n)):
            got = tuple(circuit[g].shape) if g < len(circuit) else "nothing"
            raise SaekitError(
                f"circuit has {got} for group {g} of {len(wanted)}; give a mask {n} or {(seq, *n)} for each"
            )


class _Table:
    """The kept nodes, counted through the groups."""

    def __init__(self, circuit: Circuit):
        self.circuit, rows, at = circuit, [], 0
        self.numbers: list[Tensor] = []
        for g, kept in enumerate(circuit):
            where = kept.nonzero()
            number = torch.full(kept.shape, -1, device=kept.device)
            number[kept] = torch.arange(at, at + len(where), device=kept.device)
            self.numbers.append(number)
            position = where[:, :1] if kept.ndim == 2 else torch.full_like(where, -1)
            rows.append(torch.cat([torch.full_like(position, g), position, where[:, -1:]], 1))
            at += len(where)
        self.nodes: Int[Tensor, "node 3"] = torch.cat(rows)

    def of(self, group: int, position: Tensor, unit: Tensor) -> Tensor:
        """The numbers of nodes; -1 where they are not kept."""
        numbers = self.numbers[group]
        return numbers[unit] if numbers.ndim == 1 else numbers[position, unit]


def _downstream(
    run: Pass, group: int, table: _Table, gradients: Mapping[Site, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's own values in a cut pass, one an entry, the entries' nodes, and the metric's gradient in each."""
    seq, g = run.tokens.shape[1], run.spliced.groups[group]
    rows, units = run.entries(group)
    nodes = table.of(group, rows % seq, units)
    flat = {site: gradient.flatten(0, 1)[rows] for site, gradient in gradients.items()}
    if g.kind == "error":
        return run.error(g.writes[0]).flatten(0, 1), nodes, flat[g.writes[0]]
    codes = run.codes(group)
    slope = torch.zeros_like(codes.values[codes.values != 0])
    kept = (nodes >= 0).nonzero()[:, 0]
    own = zip(g.writes, run.vectors(group, kept, each=True), strict=True)
    slope[kept] = _sum([(flat[site][kept] * v.detach()).sum(1) for site, v in own]).to(slope)
    return codes.values[codes.values != 0], nodes, slope.detach()


def _to_places(run: Pass, value: Tensor, weight: Tensor) -> dict[Site, Tensor]:
    """Gradients of a weighted sum at the places, which are leaves."""
    found = torch.autograd.grad(value, list(run.at.values()), weight, retain_graph=True, allow_unused=True)
    return {site: g for site, g in zip(run.at, found, strict=True) if g is not None}
