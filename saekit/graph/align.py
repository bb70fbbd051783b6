"""Graphs of many prompts: their mean with positions aligned by role, and the difference of two graphs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from saekit.graph.combine import combine
from saekit.graph.data import Graph
from saekit.types import SaekitError

REST = "elsewhere"  # the role of positions that have none
FIXES = {
    "targets": "trace both with the same, or name what they have in common: average(..., targets=('answer',))",
    "stands": "trace both with dictionaries of the same places",
    "biases": "trace both on models of the same make",
}
Roles = Mapping[str, Iterable[Any]]  # for each graph a position or several: sequences, arrays, tensors


def average(
    graphs: Sequence[Graph], roles: Roles | None = None, targets: Sequence[str] | None = None
) -> Graph:
    """The mean of graphs of one model and its dictionaries over prompts.

    ``roles`` names positions by what stands there: of each graph one position, or several, or none, as
    ``Prompts.roles`` has them. Positions without a role are all at "elsewhere", behind the others, so that nothing is
    lost. Without ``roles`` each position stands for itself, and prompts must be of one length. ``targets`` gives the
    targets names, in their order, where each prompt has its own (its right answer).

    Nodes are one if kind, layer, stand, place and role are the same: edges and values of several positions of a role
    add; what a prompt hasn't got counts as 0. Every row adds up to its mean value. Give whole graphs and prune the
    mean: what is small in each prompt may be large in all. Total effects are the means of the prompts' own. Influence
    and scores are those of the mean edges, in which what has other signs in other prompts cancels, errors too.
    """
    graphs = list(graphs)
    if not graphs:
        raise SaekitError("graphs is empty; give at least one")
    if targets is not None:
        graphs = [_renamed(graph, i, tuple(targets)) for i, graph in enumerate(graphs)]
    for i, graph in enumerate(graphs):
        _same(graphs[0], graph, i)
        models = [one.about.get("model") for one in (graph, graphs[0])]
        if models[0] != models[1]:
            raise SaekitError(
                f"graph {i} is of model {models[0]!r} and graph 0 of {models[1]!r}; average graphs of one model, and subtract those of two"
            )
        if len(graph.present) != len(graphs[0].present):
            raise SaekitError(
                f"of graphs 0 and {i} one is a difference; average differences or graphs, not both"
            )
    if roles is None:
        at, tokens, words, names = _by_position(graphs)
    else:
        at, names = _by_role(graphs, roles)
        tokens, words = _tokens(graphs, at, len(names)), tuple(f"[{name}]" for name in names)
    _same_ends(graphs, at, words)
    about = {k: v for k, v in graphs[0].about.items() if k in ("model", "vocabulary", "outputs")}
    about |= {"averaged": len(graphs)} | ({"roles": names} if names else {})
    return combine(graphs, at, False, tokens, words, about)


def difference(first: Graph, second: Graph) -> Graph:
    """What ``first`` has more than ``second``: of two prompts, two models, or two sets of dictionaries whose features
    have the same numbers.

    Positions stand for themselves; graphs of other lengths are averaged by role first. Rows, values and total effects
    are differences and add up as they did. ``present`` says on which side each node is: what only the first has has
    appeared, what only the second has has vanished. Influence, and pruning by it, is of the absolute changes: the
    share of the change of the targets that comes through the changes of each node's edges. Weights of targets are the
    means of both sides; scores there are none.
    """
    for graph in (first, second):
        if len(graph.present) > 1:
            raise SaekitError("a graph is a difference already; subtract graphs that are none")
    said = [_positions(graph) for graph in (first, second)]
    if said[0] != said[1]:
        raise SaekitError(
            f"one graph has {said[0]} and the other {said[1]}; average each over the same roles first"
        )
    _same(first, second, 1)
    n = len(first.tokens)
    at, words = [np.arange(n)] * 2, [_words(graph) for graph in (first, second)]
    _same_ends([first, second], at, words[0])
    changed = tuple(a if a == b else f"{b}→{a}" for a, b in zip(*words, strict=True))
    models = [str(graph.about.get("model")) for graph in (first, second)]
    about = {k: v for k, v in first.about.items() if k in ("model", "vocabulary", "outputs", "roles")}
    if models[0] != models[1]:
        about["model"] = f"{models[0]} - {models[1]}"
    return combine([first, second], at, True, _tokens([first, second], at, n), changed, about)


def _renamed(graph: Graph, i: int, names: tuple[str, ...]) -> Graph:
    if len(names) != len(graph.targets) or len(set(names)) < len(names):
        raise SaekitError(
            f"targets = {names} must name the {len(graph.targets)} targets of graph {i}, each by its own name"
        )
    about = {k: v for k, v in graph.about.items() if k != "outputs"}
    return dataclasses.replace(graph, targets=names, about=about)


def _same(first: Graph, graph: Graph, i: int) -> None:
    """Raise unless a graph has what the first has."""
    for name, fix in FIXES.items():
        theirs, own = getattr(first, name), getattr(graph, name)
        if theirs != own:
            raise SaekitError(f"graph {i} has {name} {_list(own)} and graph 0 {_list(theirs)}; {fix}")


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _positions(graph: Graph) -> str:
    """A graph's positions in words."""
    names = graph.about.get("roles")
    return f"the roles {_list(names)}" if names else f"{len(graph.tokens)} positions"


def _words(graph: Graph) -> tuple[str, ...]:
    return graph.words or tuple(map(str, graph.tokens))


def _same_ends(graphs: Sequence[Graph], at: Sequence[Int[np.ndarray, " _"]], words: Sequence[str]) -> None:
    """Raise unless each target stands at one place."""
    ends = [own[graph.nodes.position[graph.find("target")]] for graph, own in zip(graphs, at, strict=True)]
    for i, own in enumerate(ends):
        for name, there, here in zip(graphs[0].targets, ends[0], own, strict=True):
            if here != there:
                raise SaekitError(
                    f"target {name!r} of graph {i} stands at {words[here]!r} and that of graph 0 at {words[there]!r}; give its position one role"
                )


def _by_position(
    graphs: Sequence[Graph],
) -> tuple[list[Int[np.ndarray, " _"]], tuple[int, ...], tuple[str, ...], list[str] | None]:
    """Positions as they are, with their tokens, words, and the names of their roles where they have them."""
    n, said = len(graphs[0].tokens), _positions(graphs[0])
    for i, graph in enumerate(graphs):
        if _positions(graph) != said:
            raise SaekitError(
                f"graph {i} has {_positions(graph)} and graph 0 has {said}; give roles, as in roles={{'end': [{n - 1}, ...]}}"
            )
    at = [np.arange(n)] * len(graphs)
    each = zip(*map(_words, graphs), strict=True)
    words = tuple(own[0] if len(set(own)) == 1 else f"[{i}]" for i, own in enumerate(each))
    return at, _tokens(graphs, at, n), words, graphs[0].about.get("roles")


def _tokens(graphs: Sequence[Graph], at: Sequence[Int[np.ndarray, " _"]], n: int) -> tuple[int, ...]:
    """The token that stands at each place in all graphs; -1 where there are several, or none."""
    found: list[set[int]] = [set() for _ in range(n)]
    for graph, own in zip(graphs, at, strict=True):
        for token, place in zip(graph.tokens, own, strict=True):
            found[place].add(token)
    return tuple(next(iter(some)) if len(some) == 1 else -1 for some in found)


def _by_role(graphs: Sequence[Graph], roles: Roles) -> tuple[list[Int[np.ndarray, " _"]], list[str]]:
    """For each graph the role's number of every position; and the roles' names."""
    if REST in roles:
        raise SaekitError(f"roles has {REST!r}, which is for positions without a role; name it otherwise")
    names = list(roles)
    at = [np.full(len(graph.tokens), -1) for graph in graphs]
    for number, name in enumerate(names):
        try:
            given = list(roles[name])
        except TypeError:
            raise SaekitError(
                f"roles[{name!r}] = {roles[name]!r} must be a list with the position in each graph"
            ) from None
        if len(given) != len(graphs):
            raise SaekitError(
                f"roles[{name!r}] has {len(given)} entries for {len(graphs)} graphs; give one for each"
            )
        for i, (own, some) in enumerate(zip(at, given, strict=True)):
            for position in np.atleast_1d(np.asarray(some)).tolist():
                if not isinstance(position, int) or not 0 <= position < len(own):
                    raise SaekitError(
                        f"roles[{name!r}][{i}] = {position} is no position of graph {i}; give one from 0 to {len(own) - 1}"
                    )
                if own[position] not in (-1, number):
                    raise SaekitError(
                        f"position {position} of graph {i} has two roles, {names[own[position]]!r} and {name!r}; give it one"
                    )
                own[position] = number
    if any((own < 0).any() for own in at):
        names.append(REST)
        for own in at:
            own[own < 0] = len(names) - 1
    return at, names
