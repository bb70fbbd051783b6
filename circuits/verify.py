"""Attribution against ablation: what a graph says of its nodes beside what taking them away does."""

import dataclasses
import numbers
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Site
from saekit.circuits.intervene import EMBEDDING, FrozenPass, free_pass
from saekit.circuits.places import Placeable
from saekit.circuits.rows import Trace
from saekit.circuits.targets import Given, Logit, Target, plain_name, resolve
from saekit.circuits.trace import traced
from saekit.graph import KINDS, Graph
from saekit.models import load_model
from saekit.types import SaekitError

BATCH = 32


def ablations(run: Trace, groups: Sequence[Sequence[int]]) -> list[dict[Site, Float[Tensor, "seq d"]]]:
    """For each group of nodes (features, errors, tokens, positions) what is added where so that it is gone."""
    table, out = run.columns.table(), []
    for group in groups:
        whole: dict[Site, Tensor] = {}
        for node in group:
            for site, vector in _written(run, node).items():
                like = _at(run, site)
                whole.setdefault(site, torch.zeros_like(like))[int(table.position[node])] -= vector.to(like)
        out.append(whole)
    return out


def _at(run: Trace, site: Site) -> Float[Tensor, "seq d"]:
    return run.frozen.seen[0]["resid_pre"] if site == EMBEDDING else run.frozen.at(site)


def _written(run: Trace, node: int) -> dict[Site, Float[Tensor, " d"]]:
    """What a node writes at its position, by site."""
    frozen, w = run.frozen, run.frozen.weights
    for own in run.parts:
        if own.nodes.start <= node < own.nodes.stop:
            at = node - own.nodes.start
            return {site: vectors[at] for site, vectors in zip(own.writes, own.part.written, strict=True)}
    for site, (_, error) in run.fixed.items():
        left = run.cuts[site].error
        if error is not None and left is not None and error.start <= node < error.stop:
            return {site: left[node - error.start]}
    if run.tokens.start <= node < run.tokens.stop:
        return {EMBEDDING: w.W_E[frozen.tokens[node - run.tokens.start]]}
    if run.positions is not None and w.W_pos is not None and run.positions.start <= node < run.positions.stop:
        return {EMBEDDING: w.W_pos[node - run.positions.start]}
    raise SaekitError(f"node {node} is no feature, error, token or position; only those can be ablated")


@torch.no_grad()
def effects(
    run: Trace, targets: Sequence[Target], groups: Sequence[Sequence[int]], free: bool
) -> Float[np.ndarray, "target group"]:
    """By how much targets change where groups of nodes are taken away, one group at a time.

    With patterns, norms, slopes and active features frozen, or (``free``) with the model reacting as it does.
    """
    changes, found = ablations(run, groups), []
    for at in range(0, len(changes), BATCH):
        some = changes[at : at + BATCH]
        sites = {site for one in some for site in one}
        nothing = {site: torch.zeros_like(_at(run, site)) for site in sites}
        batch = {site: torch.stack([one.get(site, nothing[site]) for one in some]) for site in sites}
        last = free_pass(run, batch) if free else FrozenPass(run, batch, react=True).last
        found.append(torch.stack([_moved(run, t, last, free) for t in targets]))
    return torch.cat(found, 1).cpu().double().numpy()


def _moved(run: Trace, target: Target, last: Tensor, free: bool) -> Tensor:
    """By how much a target changes with the final stream, [batch]."""
    norm, was = run.frozen.weights.norm, run.frozen.last[target.position]
    x, direction = last[:, target.position], target.direction.to(last)
    if norm is None:
        return (x - was) @ direction
    if free:
        return (norm(x) - norm(was)) @ direction
    return (x - was) @ norm.back(direction, norm.size(was))


def verify(
    graph: Graph, model: Any, dictionaries: "Placeable | Sequence[Placeable]", top: int = 50, seed: int = 0,
    target: "Given | Sequence[Given] | None" = None,
) -> Graph:  # fmt: skip
    """Ablate a graph's strongest nodes and as many random ones; the graph with what was found in ``about["verified"]``.

    Strongest are those of the largest total effect. Found are the Spearman correlations of total effects with ablation
    (frozen, which they predict exactly where nothing was left out, and free), of the totals through attention scores with free ablation, and the
    mean size of the free effects of the strongest and of the random nodes. Of a graph of fewer than ``2 * top`` features
    and errors it is half of them. ``target``: as it was traced; needed where
    it isn't made of tokens.
    """
    from scipy.stats import spearmanr

    if not isinstance(top, numbers.Integral) or top < 1:
        raise SaekitError(f"top = {top!r} must be a whole number from 1")
    model = load_model(model)
    run = traced(model, dictionaries, list(graph.tokens))
    resolved = resolve(run.frozen, model, target if target is not None else _named(graph))
    targets = [t for t in resolved if isinstance(t, Target)]
    if len(targets) < len(resolved):
        raise SaekitError(
            "target holds features, whose ablation this doesn't measure; trace with tokens or directions"
        )
    if len(targets) != len(graph.targets):
        raise SaekitError(
            f"target names {len(targets)} and the graph has {len(graph.targets)}; give target as it was traced"
        )
    ends = graph.nodes.value[graph.of[len(graph.of) - len(targets) :]]
    for one, was in zip(targets, ends, strict=True):
        _same(f"target {one.name!r}", float(run.value(one)), float(was))
    free_to_go = np.flatnonzero(graph.of_kind("feature", "error"))
    top = min(top, len(free_to_go) // 2)
    if not top:
        raise SaekitError(
            f"the graph has {len(free_to_go)} features and errors, of which none can be compared with a random one; trace with dictionaries, or keep more nodes"
        )
    totals = graph.total_effects()
    order = free_to_go[np.argsort(-np.abs(totals[:, free_to_go]).max(0), kind="stable")]
    chosen, rest = order[:top], order[top:]
    control = np.random.default_rng(seed).permutation(rest)[: len(chosen)]
    nodes = np.concatenate([chosen, control])
    groups = [[node] for node in _in_trace(graph, run, nodes)]
    frozen, free = (-effects(run, targets, groups, free=kind) for kind in (False, True))
    found = {
        "nodes": len(chosen), "random": len(control),
        "frozen": float(spearmanr(totals[:, nodes].ravel(), frozen.ravel()).statistic),
        "free": float(spearmanr(totals[:, nodes].ravel(), free.ravel()).statistic),
        "free, through scores": float(spearmanr(graph.aware[:, nodes].ravel(), free.ravel()).statistic),
        "mean effect": float(np.abs(free[:, : len(chosen)]).mean()),
        "mean effect of random nodes": float(np.abs(free[:, len(chosen) :]).mean()),
    }  # fmt: skip
    return dataclasses.replace(graph, about={**graph.about, "verified": found})


def _named(graph: Graph) -> list[Given]:
    """A graph's targets by their names."""
    out: list[Given] = []
    for i, named in enumerate(graph.targets):
        node = graph.of[len(graph.of) - len(graph.targets) + i]
        name = plain_name(named, int(graph.nodes.position[node]))
        terms = re.findall(r"([+-])(\d+)", name if name[0] in "+-" else "+" + name)
        if "".join(sign + token for sign, token in terms) != (name if name[0] in "+-" else "+" + name):
            raise SaekitError(
                f"target {name!r} of the graph is no sum of tokens; give target as it was traced"
            )
        out.append(
            Logit(
                tuple((int(t), 1.0 if s == "+" else -1.0) for s, t in terms), int(graph.nodes.position[node])
            )
        )
    return out


def _in_trace(graph: Graph, run: Trace, nodes: np.ndarray) -> list[int]:
    """The numbers that nodes of a graph have in a trace of the same prompt."""
    table = run.columns.table()
    names = ("kind", "layer", "position", "stand", "place")
    place = {key: i for i, key in enumerate(zip(*(getattr(table, n).tolist() for n in names), strict=True))}
    keys = zip(*(getattr(graph.nodes, n)[nodes].tolist() for n in names), strict=True)
    try:
        found = [place[key] for key in keys]
    except KeyError:
        raise SaekitError(
            "the graph has nodes that these dictionaries don't make on its prompt; give those that it was traced with"
        ) from None
    for node, own in zip(nodes, found, strict=True):
        if graph.nodes.kind[node] == KINDS.index("feature"):
            _same(graph.label(node), float(table.value[own]), float(graph.nodes.value[node]))
    return found


def _same(what: str, here: float, was: float) -> None:
    """Raise unless a value is the graph's but for rounding."""
    if abs(here - was) > 1e-3 * max(1.0, abs(was)):
        raise SaekitError(
            f"{what} is {here:.4g} here and {was:.4g} in the graph; give the model, dictionaries and target that it was traced with"
        )
