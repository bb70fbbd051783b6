"""Graphs on disk and in circuit-tracer's JSON: as they were, or refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_circuits import TOKENS
from test_graph import mixed

from saekit.circuits.trace import trace
from saekit.graph import Graph, Nodes
from saekit.graph.export import read
from saekit.graph.files import load_graph
from saekit.types import SaekitError
from saekit.verbs.doctor import explain


@pytest.fixture(scope="module")
def graph() -> Graph:
    m, stands = mixed("layer norms, learned")
    return trace(m, stands, TOKENS)


def test_a_graph_comes_back_from_disk_and_from_json(graph: Graph, tmp_path: Path) -> None:
    """I12: bit for bit; every id is unique; the same graph makes the same bytes."""
    back = load_graph(graph.save(tmp_path / "g"))
    small = graph.prune()
    data = small.to_json(tmp_path / "a.json")
    for one, two in ((graph, back), (small, read(tmp_path / "a.json")), (small, read(data))):
        for f in dataclasses.fields(Nodes):
            np.testing.assert_array_equal(getattr(one.nodes, f.name), getattr(two.nodes, f.name))
        assert abs(one.rows - two.rows).nnz == 0 and one.rows.dtype == two.rows.dtype
        for name in ("of", "dropped", "aware", "totals"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        for name in ("blocks", "weights", "tokens", "words", "stands", "biases", "targets", "about"):
            assert getattr(one, name) == getattr(two, name)
    names = [node["node_id"] for node in graph.to_json()["nodes"]]
    assert len(set(names)) == len(names)
    m, stands = mixed("layer norms, learned")
    again = trace(m, stands, TOKENS).prune()
    again.to_json(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_cut_or_altered_graph_is_refused(graph: Graph, tmp_path: Path) -> None:
    folder = graph.save(tmp_path / "g")
    whole = {name: (folder / name).read_bytes() for name in ("graph.safetensors", "graph.json")}
    changed = json.loads(whole["graph.json"])
    changed["targets"][0] = "other"
    for name, data, words in (
        ("graph.safetensors", whole["graph.safetensors"][:-9], "doesn't match the hash"),
        ("graph.safetensors", b"\0" + whole["graph.safetensors"][1:], "doesn't match the hash"),
        ("graph.json", whole["graph.json"][:-9], "is not a graph's record"),
        ("graph.json", json.dumps(changed).encode(), "doesn't match its seal"),
        ("graph.json", whole["graph.json"].replace(b'"schema": 1', b'"schema": 9'), "has schema 9"),
    ):
        (folder / name).write_bytes(data)
        with pytest.raises(SaekitError, match=words):
            load_graph(folder)
        (folder / name).write_bytes(whole[name])
    with pytest.raises(SaekitError, match=r"has no graph.json"):
        load_graph(tmp_path)
    data = graph.prune().to_json()
    data["links"][0]["source"] = "nowhere"
    with pytest.raises(SaekitError, match="which is none of its nodes"):
        read(data)


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda d: d["nodes"][0].update(kind="foo"), "parts that don't fit together"),
        (lambda d: d["nodes"][0].pop("activation"), "parts that don't fit together"),
        (lambda d: d["saekit"].update(dtype="foo"), "parts that don't fit together"),
        (lambda d: d["saekit"]["aware"][0].pop(), "parts that don't fit together"),
        (lambda d: d["saekit"].update(blocks=[3]), "parts that don't fit together"),
        (lambda d: d["saekit"]["dropped"].pop(), "parts that don't fit together"),
        (lambda d: d["links"][-1].update(weight=9.0), "doesn't add up to its node's value"),
    ],
)
def test_altered_json_is_refused(graph: Graph, alter: Callable[[dict], object], words: str) -> None:
    data = graph.prune().to_json()
    alter(data)
    with pytest.raises(SaekitError, match=words):
        read(data)


def test_an_exported_file_is_loaded_and_explained(graph: Graph, tmp_path: Path) -> None:
    small = graph.prune()
    small.to_json(tmp_path / "a.json")
    back = load_graph(tmp_path / "a.json")
    assert abs(back.rows - small.rows).nnz == 0 and back.title == graph.title
    for path, one in ((tmp_path / "a.json", small), (graph.save(tmp_path / "g"), graph)):
        said = explain(path)
        assert said["nodes"] == len(one.nodes) and said["edges"] == one.rows.nnz and said["of"] == graph.title
    for text, said in (("{}", "is no store, dictionary, run, graph"), ('{"nodes": [', "is no JSON")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(SaekitError, match=said):
            explain(tmp_path / "b.json")


def test_a_pruned_graph_keeps_the_whole_ones_totals(graph: Graph) -> None:
    """On disk, in JSON and pruned again; its leaves' totals add up to the target's value as before."""
    small, whole = graph.prune(0.5, 0.8), graph.total_effects()
    keys = [
        np.stack([getattr(g.nodes, f) for f in ("kind", "layer", "position", "stand", "place")], 1)
        for g in (graph, small)
    ]
    number = {tuple(key): i for i, key in enumerate(keys[0].tolist())}
    kept = [number[tuple(key)] for key in keys[1].tolist()]
    other = np.flatnonzero(~small.of_kind("pruned"))
    assert len(small.nodes) < len(graph.nodes)
    np.testing.assert_array_equal(small.total_effects()[:, other], whole[:, kept][:, other])
    small.check()
    small.prune(0.4).check()


@pytest.mark.parametrize("part", ["aware", "totals", "weights", "dropped", "tokens", "targets"])
def test_any_change_of_an_exported_graph_is_found(part: str, graph: Graph) -> None:
    data = json.loads(json.dumps(graph.prune().to_json()))
    values = data["saekit"][part]
    at = values[0] if isinstance(values[0], list) else values
    at[0] = "7" if isinstance(at[0], str) else at[0] + 1
    with pytest.raises(SaekitError, match="was changed after saving"):
        read(data)
