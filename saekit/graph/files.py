"""A graph on disk: a folder with ``graph.safetensors`` and ``graph.json``. Schema version 1.

The tensors are the nodes' columns (``nodes.kind`` and so on, [node]), the rows in compressed form (``rows.offsets``
int64 [row + 1], ``rows.indices`` int32, ``rows.data``), ``of`` and ``dropped`` [row], and ``aware`` [target, node]; of
pruned graphs, means and differences also ``totals`` [target, node], and of the latter two ``several.present`` [side, node]
and ``several.sizes`` [row].
The JSON holds the lists of names, ``sha256`` of the tensors' file, and ``seal``, the hash of the JSON without it.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from saekit import records, registry
from saekit.activations import write_atomic
from saekit.graph.data import KINDS, Graph, Nodes, Several
from saekit.types import SaekitError

SCHEMA = 1
TENSORS, ABOUT = "graph.safetensors", "graph.json"
FIX = "trace and save the graph again"
LISTS = {
    "blocks": int,
    "weights": float,
    "tokens": int,
    "words": str,
    "stands": str,
    "biases": str,
    "targets": str,
}
SHAPE = {**{name: [kind] for name, kind in LISTS.items()}, "about": dict, "sha256": str, "seal": str}


def save(graph: Graph, path: "str | Path") -> Path:
    """Write a graph to a folder: each file whole or not at all; the JSON, with the tensors' hash, comes last."""
    from safetensors.numpy import save as to_bytes

    path = Path(path)
    data = to_bytes({name: np.ascontiguousarray(array) for name, array in arrays(graph).items()})
    about: dict[str, Any] = {name: list(getattr(graph, name)) for name in LISTS}
    about |= {"schema": SCHEMA, "about": graph.about, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / TENSORS, data)
        write_atomic(path / ABOUT, json.dumps({**about, "seal": _seal(about)}, indent=1).encode())
    except OSError as error:
        raise SaekitError(
            f"out {str(path)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    return path


def arrays(graph: Graph) -> dict[str, np.ndarray]:
    """All that a graph holds in arrays, by the names of its file."""
    rows = graph.rows
    named = {f"nodes.{f.name}": getattr(graph.nodes, f.name) for f in fields(Nodes)}
    if graph.totals is not None:
        named["totals"] = graph.totals
    if graph.several is not None:
        named |= {f"several.{f.name}": getattr(graph.several, f.name) for f in fields(Several)}
    named |= {"rows.offsets": rows.indptr.astype(np.int64), "rows.indices": rows.indices.astype(np.int32)}
    return {**named, "rows.data": rows.data, "of": graph.of, "dropped": graph.dropped, "aware": graph.aware}


def _seal(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def load_graph(path: "str | Path") -> Graph:
    """Read a graph back, bit for bit, from the folder that it was saved to or from the JSON file that it was exported to.

    One that was cut or changed after saving is refused.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    if path.is_file():
        return registry.load("saekit.graph.export:read")(path)
    if not (path / ABOUT).is_file():
        raise SaekitError(f"graph {str(path)!r} has no {ABOUT}; give a folder that a graph was saved to")
    about = records.read(path / ABOUT, "a graph's record", SHAPE, FIX, SCHEMA)
    seal = about.pop("seal")
    if _seal(about) != seal:
        raise SaekitError(
            f"file {str(path / ABOUT)!r} doesn't match its seal: it was changed after saving; {FIX}"
        )
    try:
        data = (path / TENSORS).read_bytes()
    except OSError:
        raise SaekitError(f"graph {str(path)!r} has no {TENSORS}; {FIX}") from None
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise SaekitError(
            f"file {str(path / TENSORS)!r} doesn't match the hash in {ABOUT}: it was changed after saving, or saving was cut short; {FIX}"
        )
    try:
        tensors = load(data)
        nodes = Nodes(*(tensors[f"nodes.{f.name}"] for f in fields(Nodes)))
        arrays = tuple(tensors[f"rows.{name}"] for name in ("data", "indices", "offsets"))
        rows = csr_array(arrays, shape=(len(tensors["of"]), len(nodes)))
        of, dropped, aware = (tensors[name] for name in ("of", "dropped", "aware"))
        whole = any(name.startswith("several.") for name in tensors)
        several = Several(*(tensors[f"several.{f.name}"] for f in fields(Several))) if whole else None
    except (SafetensorError, KeyError, ValueError) as error:
        raise SaekitError(f"file {str(path / TENSORS)!r} holds no graph ({error}); {FIX}") from None
    lists = {name: tuple(about[name]) for name in LISTS}
    graph = Graph(
        nodes=nodes, rows=rows, of=of, dropped=dropped, aware=aware, about=about["about"],
        totals=tensors.get("totals"), several=several, **lists,
    )  # fmt: skip
    check_parts(graph, str(path))
    return graph


def check_parts(graph: Graph, name: str, fix: str = FIX) -> None:
    """Raise unless the parts fit together."""
    n, t = len(graph.nodes), len(graph.targets)
    kinds = graph.nodes.kind
    fits = (
        n > 0 and all(len(getattr(graph.nodes, f.name)) == n for f in fields(Nodes))
        and graph.aware.shape == (t, n) and len(graph.dropped) == len(graph.of) and len(graph.weights) == t > 0
        and kinds.min() >= 0 and kinds.max() < len(KINDS) and (np.diff(graph.of) > 0).all() and graph.of[-1] < n
        and graph.blocks[-1:] == (len(graph.of),) and (np.diff(graph.blocks) > 0).all()
        and (graph.rows.nnz == 0 or 0 <= graph.rows.indices.min() <= graph.rows.indices.max() < n)
        and np.isfinite(graph.rows.data).all() and len(graph.words) in (0, len(graph.tokens))
        and graph.nodes.position.max() < len(graph.tokens) and (kinds == KINDS.index("pruned")).sum() == 1
        and (graph.totals is None or graph.totals.shape == (t, n))
        and (graph.several is None or fitting(graph.several, n, len(graph.of)))
    )  # fmt: skip
    if not fits:
        raise SaekitError(f"graph {name!r} has parts that don't fit together; {fix}")


def fitting(several: Several, n: int, n_rows: int) -> bool:
    """Whether the parts of a mean or difference are of the graph's shape."""
    shapes = (several.present.shape[1:], several.sizes.shape)
    return shapes == ((n,), (n_rows,)) and several.present.shape[0] in (1, 2)
