"""A graph in the JSON that circuit-tracer's viewer and Neuronpedia open, with what saekit needs to read it back."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from saekit import records
from saekit.activations import write_atomic
from saekit.graph.data import KINDS, Graph, Nodes, Several
from saekit.graph.files import LISTS, arrays, check_parts, fitting
from saekit.types import SaekitError

DRAWN, LINKS = 2000, 100_000  # nodes and links that a page draws; a larger graph is pruned for it
TYPES = {
    "token": "embedding", "position": "position embedding", "bias": "bias", "error": "mlp reconstruction error",
    "feature": "cross layer transcoder", "pruned": "pruned mass", "target": "logit",
}  # fmt: skip
SEVERAL = [f.name for f in dataclasses.fields(Several)]
Labels = Mapping[tuple[int, int], str]  # of (stand, feature)
Contexts = Mapping[tuple[int, int], Sequence[Mapping[str, Any]]]


def ids(graph: Graph) -> list[str]:
    """A name for each node that no other has: ``3_117_5`` is feature 117 of layer 3's first dictionary at position 5."""
    n = graph.nodes
    first: dict[int, int] = {}
    for stand in sorted({int(s) for s in n.stand if s >= 0}):
        for layer in np.unique(n.layer[n.stand == stand]).tolist():
            first.setdefault(layer, stand)
    out = []
    for kind, layer, at, stand, place in zip(n.kind, n.layer, n.position, n.stand, n.place, strict=True):
        own = "" if stand == first.get(int(layer)) else f"d{stand}_"
        match KINDS[kind]:
            case "token":
                out.append(f"E_{place}_{at}")
            case "position":
                out.append(f"P_{at}")
            case "bias":
                out.append(f"{layer}_bias_{place}_{max(at, 0)}")
            case "error":
                out.append(f"{layer}_error_{own}{at}")
            case "feature":
                out.append(f"{layer}_{own}{place}_{at}")
            case "pruned":
                out.append("pruned")
            case _:
                out.append(f"{layer + 1}_{_vocabulary(graph, int(place))}_{at}")
    return out


def _vocabulary(graph: Graph, target: int) -> int:
    """A target's token, or a number behind all tokens."""
    name = graph.targets[target]
    return int(name) if name.isdecimal() else int(graph.about.get("vocabulary", 10**6)) + target


def export(
    graph: Graph, path: "str | Path | None" = None, slug: str = "graph", labels: Labels | None = None,
    contexts: Contexts | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The graph as JSON of circuit-tracer's schema 1 (also Neuronpedia's); written to ``path``, where one is given.

    ``labels`` names features by ``(stand, feature)``; ``contexts`` gives texts on which they are active, each with
    ``tokens``, ``values`` and ``at``. The same graph makes the same bytes.
    """
    if not re.fullmatch(r"[a-z0-9-]+", slug):
        raise SaekitError(f"slug {slug!r} must be lower-case letters, digits and dashes")
    names = ids(graph)
    words = graph.words or tuple(str(token) for token in graph.tokens)
    data = {
        "metadata": {
            "slug": slug, "scan": str(graph.about.get("model", "custom")), "transcoder_list": [],
            "prompt_tokens": list(words), "prompt": "".join(words), "node_threshold": graph.about.get("node_threshold", 1.0), "schema_version": 1,
            "scores": dataclasses.asdict(graph.scores()) if len(graph.present) == 1 else {},
            "info": {"generator": {"name": "saekit", "version": version("saekit")}, "create_time_ms": 0},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "", "clerps": "[]"},
        "nodes": _nodes(graph, names, words, labels or {}),
        "links": _links(graph, names),
        "saekit": {
            **{name: list(getattr(graph, name)) for name in LISTS}, "about": graph.about, "title": graph.title,
            "dropped": graph.dropped.tolist(), "aware": graph.aware.tolist(), "dtype": str(graph.rows.dtype), "seal": seal(graph),
            **({} if graph.totals is None else {"totals": graph.totals.tolist()}),
            **({"several": {name: getattr(graph.several, name).tolist() for name in SEVERAL}} if graph.several else {}),
        },
    }  # fmt: skip
    if contexts:
        n = graph.nodes
        features = np.flatnonzero(graph.of_kind("feature"))
        keys = {names[i]: (int(n.stand[i]), int(n.place[i])) for i in features}
        data["contexts"] = {name: list(contexts[key]) for name, key in keys.items() if key in contexts}
    if path is not None:
        _write(Path(path), json.dumps(data))
    return data


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise SaekitError(
            f"path {str(path)!r} can't be written: {error.strerror}; name a file in a folder that exists"
        ) from None


def _cumulative(influence: Float[np.ndarray, " node"], free: np.ndarray) -> np.ndarray:
    """The share of the influence that is reached with each node, the strongest first."""
    order = np.argsort(-influence[free], kind="stable")
    at = np.flatnonzero(free)[order]
    out = np.ones(len(influence))
    out[at] = np.cumsum(influence[at]) / max(influence[at].sum(), 1e-300)
    return out


def _nodes(graph: Graph, names: list[str], words: Sequence[str], labels: Labels) -> list[dict[str, Any]]:
    n, influence = graph.nodes, graph.influence()
    reached = _cumulative(influence, ~graph.of_kind("target", "pruned"))
    totals = graph.total_effects()
    last = len(graph.tokens) - 1
    out = []
    for i, name in enumerate(names):
        kind, layer, at, stand, place = (
            int(getattr(n, c)[i]) for c in ("kind", "layer", "position", "stand", "place")
        )
        what, target = KINDS[kind], KINDS[kind] == "target"
        number = {
            "feature": _cantor(layer, place),
            "token": at,
            "target": _vocabulary(graph, place) if target else 0,
        }
        label = _label(graph, i, labels) if what == "feature" else graph.label(i)
        label = repr(words[at]) if what == "token" else label
        if target:
            label = f'Output "{graph.output(place)}" (p={graph.weights[place]:.3f})'
        where = last if at < 0 else at
        out.append({
            "node_id": name, "feature": number.get(what, -1), "layer": "E" if layer < 0 else str(layer + target),
            "ctx_idx": where, "feature_type": TYPES[what], "jsNodeId": _js(what, name, layer, at, place), "clerp": label,
            "influence": None if target else float(reached[i]), "activation": _number(n.value[i]),
            "token_prob": float(graph.weights[place]) if target else 0.0, "is_target_logit": target,
            "run_idx": 0, "reverse_ctx_idx": 0, "kind": what, "stand": stand, "place": place, "depth": layer,
            "position": at, "total_effect": totals[:, i].tolist(),
        })  # fmt: skip
    return out


def _label(graph: Graph, node: int, labels: Labels) -> str:
    """A feature's label; nothing where it has none, unless there is to say in which of several graphs it is."""
    place, note = int(graph.nodes.place[node]), graph.note(node)
    label = labels.get((int(graph.nodes.stand[node]), place), "")
    return f"{label or f'feature {place}'} ({note})" if note else label


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _cantor(layer: int, feature: int) -> int:
    both = layer + feature
    return both * (both + 1) // 2 + feature


def _js(kind: str, name: str, layer: int, at: int, place: int) -> str:
    match kind:
        case "token":
            return f"E_{place}-{at}"
        case "feature":
            return f"{layer}_{place}-0"
        case "target":
            return f"L_{place}-{at}"
    return f"{name}-0"


def _links(graph: Graph, names: list[str]) -> list[dict[str, Any]]:
    rows = graph.rows
    targets = np.repeat(graph.of, np.diff(rows.indptr)).tolist()
    return [
        {"source": names[s], "target": names[t], "weight": w}
        for s, t, w in zip(rows.indices.tolist(), targets, rows.data.tolist(), strict=True)
    ]


SHAPE = {
    "nodes": [{"node_id": str, "kind": str, "depth": int, "position": int, "stand": int, "place": int}],
    "links": [{"source": str, "target": str, "weight": float}],
    "saekit": {**{name: [kind] for name, kind in LISTS.items()}, "about": dict, "dropped": [float], "aware": [list], "dtype": str, "seal": str,
        "totals?": [list], "several?": {"present": [list], "sizes": [float]}},
}  # fmt: skip


def read(given: "dict[str, Any] | str | Path") -> Graph:
    """A graph from the JSON that :func:`export` made, exactly as it was."""
    fix = "export the graph again"
    if isinstance(given, str | Path):
        data: dict[str, Any] = records.read(Path(given), "an exported graph", SHAPE, fix)
    else:
        data = given
        records.check(data, SHAPE, "an exported graph", fix)
    try:
        graph = _built(data, fix)
    except SaekitError:
        raise
    except (ValueError, TypeError, KeyError, IndexError):
        raise SaekitError(f"an exported graph has parts that don't fit together; {fix}") from None
    check_parts(graph, "exported", fix)
    if not graph.closure().max(initial=0) <= 1e-3:
        raise SaekitError(f"an exported graph has a row that doesn't add up to its node's value; {fix}")
    if seal(graph) != data["saekit"]["seal"]:
        raise SaekitError(f"an exported graph was changed after saving, or cut; {fix}")
    return graph


def seal(graph: Graph) -> str:
    """A hash of all that a graph is, whatever the types of its tables: labels and contexts aren't part of it."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays(graph).items()):
        plain = np.asarray(array, np.int64 if array.dtype.kind in "iub" else np.float64)
        digest.update(f"{name}{plain.shape}".encode())
        digest.update(np.ascontiguousarray(plain).data)
    lists = {name: list(getattr(graph, name)) for name in LISTS}
    digest.update(json.dumps([lists, graph.about, str(graph.rows.dtype)], sort_keys=True).encode())
    return digest.hexdigest()


def _built(data: dict[str, Any], fix: str) -> Graph:
    number = {node["node_id"]: i for i, node in enumerate(data["nodes"])}
    if len(number) < len(data["nodes"]):
        raise SaekitError(f"an exported graph names two nodes alike; {fix}")
    layer, position, stand, place = (
        np.array([node[c] for node in data["nodes"]]) for c in ("depth", "position", "stand", "place")
    )
    table = Nodes(
        np.array([KINDS.index(node["kind"]) for node in data["nodes"]]),
        layer,
        position,
        stand,
        place,
        np.array([np.nan if node["activation"] is None else node["activation"] for node in data["nodes"]]),
    )
    of = np.flatnonzero(np.isin(table.kind, [KINDS.index("feature"), KINDS.index("target")]))
    extra = data["saekit"]
    try:
        ends = [(number[link["target"]], number[link["source"]]) for link in data["links"]]
    except KeyError as error:
        raise SaekitError(
            f"an exported graph has a link to {error}, which is none of its nodes; {fix}"
        ) from None
    weights = np.array([link["weight"] for link in data["links"]], extra["dtype"])
    at, sources = np.array(ends, np.int64).reshape(-1, 2).T
    line = np.searchsorted(of, at)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(line, minlength=len(of)))])
    rows = csr_array((weights, sources.astype(np.int32), offsets), shape=(len(of), len(table)))
    lists = {name: tuple(extra[name]) for name in LISTS}
    aware = np.array(extra["aware"], np.float64).reshape(len(extra["targets"]), len(table))
    return Graph(
        nodes=table,
        rows=rows,
        of=of,
        dropped=np.array(extra["dropped"]),
        aware=aware,
        about=extra["about"],
        totals=np.array(extra["totals"], np.float64).reshape(aware.shape) if "totals" in extra else None,
        several=_several(extra.get("several"), len(table), len(of), fix),
        **lists,
    )


def _several(given: Mapping[str, Any] | None, n: int, n_rows: int, fix: str) -> Several | None:
    """What a mean or difference holds besides; raises unless it fits the graph."""
    if given is None:
        return None
    try:
        found = Several(*(np.array(given[name], np.float64) for name in SEVERAL))
    except (ValueError, TypeError):
        found = None
    if found is None or not fitting(found, n, n_rows):
        raise SaekitError(f"an exported graph's several has parts that don't fit the graph; {fix}")
    return found


def drawn(graph: Graph) -> Graph:
    """The graph, or as much of it as a page can draw: 2000 nodes and 100,000 links."""
    shown = graph
    if len(graph.nodes) > DRAWN:
        shown = _most(lambda share: graph.prune(share, 1.0), lambda one: len(one.nodes) <= DRAWN)
    if shown.rows.nnz > LINKS:
        whole = shown
        shown = _most(lambda share: whole.prune(1.0, share), lambda one: one.rows.nnz <= LINKS)
    return shown


def _most(pruned: Callable[[float], Graph], fits: Callable[[Graph], bool]) -> Graph:
    """The graph of the largest share that fits, to a hundredth."""
    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(pruned(middle / 100)) else (low, middle)
    return pruned(low / 100)


def html(
    graph: Graph,
    path: "str | Path | None" = None,
    labels: Labels | None = None,
    contexts: Contexts | None = None,
) -> str:
    """The graph as one page that needs no network; written to ``path``, where one is given.

    A graph of more than 2000 nodes or 100,000 links is pruned first, by as little as leaves that many; the page says to
    which shares of the influence.
    """
    from saekit.graph.page import page

    text = page(export(drawn(graph), labels=labels, contexts=contexts))
    if path is not None:
        _write(Path(path), text)
    return text
