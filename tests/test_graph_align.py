"""Laws of graphs of several prompts: means over roles and differences are linear, add up, and say what came and went."""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from test_circuits import TOKENS, stand
from test_weights import toy

import saekit
from saekit.circuits.places import Heads, Neurons
from saekit.circuits.targets import Logit
from saekit.circuits.trace import trace
from saekit.graph import KINDS, Graph, Nodes, average
from saekit.graph.export import read
from saekit.graph.files import load_graph
from saekit.testbed import ioi
from saekit.testbed.known_circuits import NAMES, indirect_object
from saekit.testbed.transformer import Transformer
from saekit.types import SaekitError

Key = tuple[Any, ...]


def keys(graph: Graph, at: Sequence[Any]) -> list[Key]:
    """What each node is, at what ``at`` says of its position; of tokens not which."""
    n = graph.nodes
    columns = zip(n.kind, n.layer, n.stand, n.place, n.position, strict=True)
    return [
        (KINDS[kind], int(layer), int(stand), -1 if KINDS[kind] == "token" else int(place), None if p < 0 else at[p])
        for kind, layer, stand, place, p in columns
    ]  # fmt: skip


def numbers(graph: Graph, at: Sequence[Any]) -> dict[Any, float]:
    """All that is linear in a graph, by nodes' keys: edges, values of rows, dropped, total effects."""
    out: dict[Any, float] = defaultdict(float)
    names, totals = keys(graph, at), graph.total_effects()
    coo = graph.rows.tocoo()
    for row, source, weight in zip(*coo.coords, coo.data, strict=True):
        out["edge", names[graph.of[row]], names[source]] += float(weight)
    for row, node in enumerate(graph.of):
        out["value", names[node]] += float(graph.nodes.value[node])
        out["dropped", names[node]] += float(graph.dropped[row])
    for i, node in np.ndindex(totals.shape):
        out["total", i, names[node]] += float(totals[i, node])
        out["aware", i, names[node]] += float(graph.aware[i, node])
    return out


def same(one: dict[Any, float], two: dict[Any, float], atol: float = 2e-6) -> None:
    for key in one.keys() | two.keys():
        assert abs(one.get(key, 0.0) - two.get(key, 0.0)) <= atol, key


def added(several: Sequence[dict[Any, float]], by: Sequence[float]) -> dict[Any, float]:
    out: dict[Any, float] = defaultdict(float)
    for some, factor in zip(several, by, strict=True):
        for key, number in some.items():
            out[key] += factor * number
    return out


def places(graph: Graph) -> list[str]:
    return graph.about.get("roles") or list(range(len(graph.tokens)))


@pytest.fixture(scope="module")
def toys() -> list[Graph]:
    """Graphs of three prompts of other lengths, with features of three makes, errors, and some of it left out."""
    m = toy("layer norms, learned")
    stands = [stand("topk", m), Neurons("blocks.1.mlp"), Heads("blocks.0.self_attn")]
    prompts = (TOKENS, TOKENS.flip(0), TOKENS[3:].roll(2))
    return [trace(m, stands, prompt, [3, 5], edges=40) for prompt in prompts]


ROLES = {"first": [0, 1, 0], "names": [[2, 5], [3], []], "end": [11, 11, 8]}


def at_roles(graphs: Sequence[Graph], roles: dict[str, list[Any]]) -> list[list[str]]:
    """The role of each position of each graph."""
    out = [["elsewhere"] * len(graph.tokens) for graph in graphs]
    for name, given in roles.items():
        for own, some in zip(out, given, strict=True):
            for position in [some] if isinstance(some, int) else some:
                own[position] = name
    return out


def test_the_mean_of_one_graph_is_that_graph(toys: list[Graph]) -> None:
    whole = toys[0]
    roles = {f"p{i}": [i] for i in range(12)}
    for mean, names in (
        (average([whole]), range(12)),
        (average([whole] * 3), range(12)),
        (average([whole], roles), list(roles)),
        (average([average([whole], roles)] * 2), list(roles)),
    ):
        same(numbers(mean, names), numbers(whole, names))
        assert len(mean.nodes) == len(whole.nodes) and mean.rows.nnz == whole.rows.nnz
        assert mean.blocks == whole.blocks and mean.tokens == whole.tokens and mean.weights == whole.weights
        assert (mean.present == 1).all() and mean.rows.dtype == whole.rows.dtype
        before = dict(zip(keys(whole, names), range(len(whole.nodes)), strict=True))
        order = [before[key] for key in keys(mean, names)]
        np.testing.assert_allclose(mean.influence(), whole.influence()[order], atol=1e-6)
        for f in dataclasses.fields(Nodes):
            np.testing.assert_allclose(getattr(mean.nodes, f.name), getattr(whole.nodes, f.name)[order])


def test_the_mean_over_roles_is_the_mean_of_sums(toys: list[Graph]) -> None:
    """Against sums in dicts: nodes of one role add, what a prompt lacks is 0, and nothing is lost."""
    mean = average(toys, ROLES)
    own = [numbers(graph, at) for graph, at in zip(toys, at_roles(toys, ROLES), strict=True)]
    same(numbers(mean, mean.about["roles"]), added(own, [1 / 3] * 3))
    assert mean.about["roles"] == ["first", "names", "end", "elsewhere"]
    assert mean.words == ("[first]", "[names]", "[end]", "[elsewhere]") and mean.tokens[:2] == (-1, -1)
    assert mean.check(1e-6, 1e-6)["row"] > 0  # fp32 still rounds
    assert max(graph.check(1e-5, 1e-5)["row"] for graph in toys) < 1e-5
    seen = [set(keys(g, at)) for g, at in zip(toys, at_roles(toys, ROLES), strict=True)]
    shares = [sum(key in some for some in seen) / 3 for key in keys(mean, mean.about["roles"])]
    np.testing.assert_allclose(mean.present[0], shares)
    starts = (0, *mean.blocks)
    for first, stop in zip(starts, mean.blocks, strict=False):  # no later block, nor its own, adds to a block
        assert not mean.rows[first:stop][:, mean.of[first:]].nnz


def test_means_and_differences_are_linear(toys: list[Graph]) -> None:
    one, two, three = (average([g], {n: [e[i]] for n, e in ROLES.items()}) for i, g in enumerate(toys))
    names = one.about["roles"]
    same(numbers(average([one, two, three]), names), numbers(average(toys, ROLES), names))
    same(numbers(average([average([one, two]), average([three, one])]), names), numbers(average([one, two, three, one]), names))  # fmt: skip
    changed, mean = average([one - two, three - two]), average([one, three]) - average([two])
    own, theirs = numbers(changed, names), numbers(mean, names)
    same({k: v for k, v in own.items() if k[0] != "dropped"}, {k: v for k, v in theirs.items() if k[0] != "dropped"})  # fmt: skip
    np.testing.assert_allclose(changed.present[1], mean.present[1])


def tiny(parts: Sequence[tuple[int, int, float]], n: int) -> Graph:
    """Features (position, number, what it adds to the one target), each made by its token alone."""
    kinds = (
        [0] * n + [KINDS.index("pruned")] + [KINDS.index("feature")] * len(parts) + [KINDS.index("target")]
    )
    at = [*range(n), -1, *(p for p, _, _ in parts), n - 1]
    place = [7] * n + [-1] + [number for _, number, _ in parts] + [0]
    total = sum(w for _, _, w in parts)
    value = np.array([np.nan] * (n + 1) + [2.0] * len(parts) + [total])
    rows = np.zeros((len(parts) + 1, len(at)))
    for i, (p, _, w) in enumerate(parts):
        rows[i, p], rows[-1, n + 1 + i] = 2.0, w
    layer = np.array([-1] * (n + 1) + [0] * len(parts) + [1])
    table = Nodes(np.array(kinds), layer, np.array(at), np.where(layer == 0, 0, -1), np.array(place), value)
    k = len(parts)
    return Graph(table, csr_array(rows), np.arange(n + 1, n + 2 + k), (k, k + 1), np.zeros(k + 1),
                 np.zeros((1, len(at))), (1.0,), (7,) * n, (), ("d",), (), ("t",))  # fmt: skip


def test_thresholds_come_behind_the_mean() -> None:
    """What is small at each of many positions, but large in sum, survives; pruned first, it wouldn't (Marks et al.)."""
    many = [(p, 5, 0.1) for p in range(1, 9)]
    graphs = [tiny([(0, 3, 0.4), *many], 10), tiny([(0, 4, 0.4), *many], 10)]
    roles = {"begin": [0, 0]}
    mean = average(graphs, roles)
    node = mean.find("feature", place=5)
    assert len(node) == 1 and mean.edge(node[0], mean.of[-1]) == pytest.approx(0.8)
    assert mean.nodes.value[node[0]] == 16 and mean.total_effects()[0, node[0]] == pytest.approx(0.8)
    assert len(mean.prune(0.3, 0.5).find("feature", place=5)) == 1
    early = average([graph.prune(0.3, 0.5) for graph in graphs], roles)
    assert not len(early.find("feature", place=5)) and early.check()["row"] < 1e-12
    assert early.edge(early.pruned, early.of[-1]) == pytest.approx(0.8)
    assert mean.find("token", position=0).tolist() == [0] and mean.tokens == (7, 7)


def ioi_roles(tokens: Sequence[int]) -> dict[str, int]:
    a, b, s2 = (i for i, token in enumerate(tokens) if 2 <= token < 2 + NAMES)
    s1, io = (a, b) if tokens[a] == tokens[s2] else (b, a)
    return {"begin": 0, "s1": s1, "io": io, "s2": s2, "end": len(tokens) - 1}


KNOWN_HEADS = [Heads(f"layers.{i}.self_attn") for i in range(3)]


@pytest.fixture(scope="module")
def known() -> tuple[Any, list[list[int]]]:
    built = indirect_object(distractors=1, rotate=True)
    return built, [p.tokens.tolist() for p in built.prompts(6, torch.Generator().manual_seed(0))]


def asked(built: Any, tokens: list[int], like: list[int]) -> Graph:
    """A prompt's graph of the right name's logit less the wrong one's, as they are in another prompt."""
    at = ioi_roles(like)
    return trace(
        built.model, KNOWN_HEADS, tokens, Logit(like[at["io"]]) - Logit(like[at["s1"]]), scores="whole"
    )


def test_the_mean_of_prompts_of_indirect_objects_closes_and_names_its_roles(known: Any) -> None:
    built, prompts = known
    roles = {name: [ioi_roles(tokens)[name] for tokens in prompts] for name in ioi_roles(prompts[0])}
    graphs = [asked(built, tokens, tokens) for tokens in prompts]
    with pytest.raises(SaekitError, match=r"graph 1 has targets .* name what they have in common"):
        average(graphs, roles)
    mean = average(graphs, roles, targets=("right - wrong",))
    assert mean.check(1e-5, 1e-6)["target"] < 1e-6
    logits = built.logits([dataclasses.replace(built.prompts(1, torch.Generator())[0], tokens=torch.tensor(t)) for t in prompts])  # fmt: skip
    apart = [float(row[t[ioi_roles(t)["io"]]] - row[t[ioi_roles(t)["s1"]]]) for row, t in zip(logits, prompts, strict=True)]  # fmt: skip
    assert mean.nodes.value[-1] == pytest.approx(np.mean(apart), abs=1e-5)
    tokens = mean.find("token")
    totals = mean.total_effects()[0]
    assert (
        mean.nodes.position[tokens[np.argmax(np.abs(totals[tokens]))]] == 2
    )  # the indirect object, as it is known
    assert totals[tokens[2]] == pytest.approx(1, abs=0.15) and mean.label(tokens[2]) == "token at 2 ('[io]')"
    rare = mean.find("feature", layer=2)[mean.present[0, mean.find("feature", layer=2)] < 1]
    assert all("of prompts" in mean.label(node) for node in rare)


def test_tasks_prompts_bring_their_roles() -> None:
    """Prompts of the IOI task through a model of its shape: ``Prompts.roles`` are what ``average`` takes."""
    drawn = ioi.prompts(4, torch.Generator().manual_seed(1))
    config = dataclasses.replace(ioi.TASK.config, d_model=32, d_mlp=32, n_layers=2, n_heads=2)
    m = saekit.load_model(Transformer(config, seed=2), name="ioi")
    stands = [Neurons("layers.0.mlp"), Heads("layers.1.self_attn"), Neurons("layers.1.mlp")]
    names = drawn.tokens.gather(1, torch.stack([drawn.roles["io"], drawn.roles["s1"]], 1)).tolist()
    graphs = [
        trace(m, stands, tokens, Logit(io) - Logit(s1), scores="whole")
        for tokens, (io, s1) in zip(drawn.tokens, names, strict=True)
    ]
    mean = average(graphs, drawn.roles, ["answer"])
    given = {name: at.tolist() for name, at in drawn.roles.items()}
    own = [numbers(graph, at) for graph, at in zip(graphs, at_roles(graphs, given), strict=True)]
    same(numbers(mean, mean.about["roles"]), added(own, [1 / 4] * 4), atol=1e-5)
    assert mean.check(1e-5, 1e-5)["row"] < 1e-5 and mean.nodes.position[-1] == mean.words.index("[end]")
    assert mean.tokens[mean.words.index("[end]")] == ioi.VOCABULARY.index("to")


def test_a_difference_closes_and_with_itself_is_nothing(toys: list[Graph]) -> None:
    one, two = toys[:2]
    changed = one - two
    own = added([numbers(one, range(12)), numbers(two, range(12))], [1, -1])
    found = numbers(changed, range(12))
    same(
        {k: v for k, v in found.items() if k[0] != "dropped"},
        {k: v for k, v in own.items() if k[0] != "dropped"},
    )
    assert changed.check(1e-5, 1e-5)["row"] < 1e-5
    assert changed.words[1] == f"{two.tokens[1]}→{one.tokens[1]}" and set(changed.tokens) == {-1}
    mine, theirs = (set(keys(graph, range(12))) for graph in (one, two))
    for node, key in enumerate(keys(changed, range(12))):
        expected = "appeared" if key not in theirs else "vanished" if key not in mine else ""
        assert changed.note(node) == expected and changed.label(node).endswith(expected)
    assert {"appeared", "vanished", ""} == {changed.note(node) for node in range(len(changed.nodes))}
    nothing = one - one
    assert (
        not nothing.rows.nnz
        and not nothing.nodes.value[nothing.of].any()
        and not nothing.influence()[:-2].any()
    )
    assert (
        not nothing.total_effects().any()
        and not nothing.aware.any()
        and nothing.check() == {"row": 0, "target": 0}
    )
    assert nothing.tokens == one.tokens and nothing.words == tuple(map(str, one.tokens))
    twice = average([one - two, two - one])
    assert twice.words[1] == "[1]" and not twice.total_effects().any()


def test_another_giver_changes_the_duplicate_mark_and_what_follows(known: Any) -> None:
    """Nothing before S2 changes; of layer 0 what stands at S2, then what the end reads; and both names change sides."""
    built, prompts = known
    for tokens in prompts[:3]:
        at = ioi_roles(tokens)
        other = list(tokens)
        other[at["s2"]] = tokens[at["io"]]
        changed = asked(built, tokens, tokens) - asked(built, other, tokens)
        assert changed.check(1e-5, 1e-5)["target"] < 1e-5
        assert changed.nodes.value[-1] == pytest.approx(2, abs=0.3)  # from -1 to 1
        sizes = np.abs(changed.rows).sum(1)
        position, layer = changed.nodes.position[changed.of], changed.nodes.layer[changed.of]
        assert not sizes[position < at["s2"]].any()
        first_head = (
            changed.nodes.place[changed.of] < built.model.module.shape.d_head
        )  # the others only distract
        for where, own in enumerate(("s2", "end", "end")):
            inside = (layer == where) & first_head
            most = position[inside][np.argmax(sizes[inside])]
            assert most == at[own], (where, most)
        totals = changed.total_effects()[0]
        names = {name: totals[changed.find("token", position=at[name])[0]] for name in at}
        assert names["io"] == pytest.approx(1, abs=0.15) and names["s1"] == pytest.approx(1, abs=0.15)
        assert changed.words[at["s2"]] == f"{other[at['s2']]}→{tokens[at['s2']]}"
        # with attention frozen the token at S2 moves no value; through scores it is what flips the answer
        scores = changed.aware[0, changed.find("token", position=at["s2"])[0]]
        assert abs(names["s2"]) < 0.1 < abs(scores)


@pytest.mark.parametrize(("layer", "head"), [(0, 2), (1, 3)])
def test_the_difference_of_two_models_names_the_head_that_differs(layer: int, head: int) -> None:
    m = toy("layer norms, learned")
    module = copy.deepcopy(m.module)
    with torch.no_grad():
        module.layers[layer].self_attn.v_proj.weight[8 * head : 8 * head + 8] *= 1.5
    other = saekit.load_model(module, name="other")
    stands = [Heads("blocks.0.self_attn"), Heads("blocks.1.self_attn")]
    changed = trace(other, stands, TOKENS, [3]) - trace(m, stands, TOKENS, [3])
    assert changed.about["model"] == "other - toy" and changed.check(1e-5, 1e-5)["row"] < 1e-5
    n = changed.nodes
    moved = changed.of_kind("feature") & (np.abs(np.nan_to_num(n.value)) > 1e-5)
    assert n.layer[moved].min() == layer
    assert set((n.place[moved & (n.layer == layer)] // 8).tolist()) == {head}
    assert not moved[n.layer < layer].any()


def test_means_and_differences_are_pruned_kept_and_shown(toys: list[Graph], tmp_path: Path) -> None:
    for i, graph in enumerate((average(toys, ROLES), toys[0] - toys[1])):
        small = graph.prune()
        assert len(small.nodes) < len(graph.nodes) and small.check(1e-5, 1e-5)["target"] < 1e-5
        assert small.closure().max() <= graph.closure().max() * 3
        before = dict(zip(keys(graph, places(graph)), graph.total_effects().T.tolist(), strict=True))
        for node, key in enumerate(keys(small, places(small))):
            if key[0] != "pruned":
                np.testing.assert_array_equal(small.total_effects()[:, node], before[key])
        data = small.to_json(tmp_path / f"{i}.json")
        for back in (load_graph(small.save(tmp_path / str(i))), read(tmp_path / f"{i}.json")):
            assert abs(back.rows - small.rows).nnz == 0 and back.about == small.about
            for f in dataclasses.fields(small.several):
                np.testing.assert_array_equal(getattr(back.several, f.name), getattr(small.several, f.name))
        assert "elsewhere" in small.to_html() or i
        if i:
            assert data["metadata"]["scores"] == {} and "(appeared)" in small.to_html()
            with pytest.raises(SaekitError, match="a difference has no scores"):
                graph.scores()
        with pytest.raises(SaekitError, match="verify those that it was made of"):
            small.verify(None, [])
        for part, words in (
            (data["saekit"]["several"]["sizes"], "several has parts that don't fit the graph"),
            (data["saekit"]["totals"], "parts that don't fit together"),
        ):
            part.pop()
            with pytest.raises(SaekitError, match=words):
                read(data)
            part.append(part[0])
    (toys[0] - toys[0]).to_html()


def test_what_has_no_mean_or_difference_is_refused(toys: list[Graph]) -> None:
    one, two, short = toys
    elsewhere = dataclasses.replace(two, stands=("layers.1", *two.stands[1:]))
    of_other = dataclasses.replace(two, about={**two.about, "model": "other"})
    changed, mean = one - two, average(toys, ROLES)
    for do, words in (
        (lambda: average([]), "graphs is empty"),
        (lambda: average([one, short]), "graph 1 has 9 positions and graph 0 has 12 positions; give roles"),
        (lambda: average([one, two], {"end": [11]}), r"roles\['end'\] has 1 entries for 2 graphs"),
        (lambda: average([one], {"end": torch.tensor(11)}), r"roles\['end'\] = tensor\(11\) must be a list with the position"),
        (lambda: average([one, two], {"end": [11, 12]}), r"roles\['end'\]\[1\] = 12 is no position of graph 1; give one from 0 to 11"),
        (lambda: average([one, two], {"end": [[3, -1], 1]}), r"roles\['end'\]\[0\] = -1 is no position"),
        (lambda: average([one, two], {"end": [0.5, 1]}), r"roles\['end'\]\[0\] = 0.5 is no position"),
        (lambda: average([one, two], {"a": [1, 1], "b": [2, 1]}), "position 1 of graph 1 has two roles, 'a' and 'b'"),
        (lambda: average([one, two], {"elsewhere": [1, 1]}), "for positions without a role"),
        (lambda: average([one, two], {"end": [11, 3]}), r"target '3' of graph 1 stands at '\[elsewhere\]' and that of graph 0 at '\[end\]'"),
        (lambda: average([one, two], targets=["answer"]), "must name the 2 targets of graph 0"),
        (lambda: average([one, elsewhere]), "graph 1 has stands 'layers.1', .* trace both with dictionaries of the same places"),
        (lambda: average([one, of_other]), "graph 1 is of model 'other' and graph 0 of 'toy'"),
        (lambda: average([one, changed]), "of graphs 0 and 1 one is a difference"),
        (lambda: changed - one, "a graph is a difference already"),
        (lambda: one - short, "one graph has 12 positions and the other 9 positions; average each over the same roles first"),
        (lambda: mean - one, "one graph has the roles 'first', 'names', 'end', 'elsewhere' and the other 12 positions"),
        (lambda: one - elsewhere, "trace both with dictionaries of the same places"),
        (lambda: one - dataclasses.replace(two, targets=("3", "6")), "graph 1 has targets '3', '6' and graph 0 '3', '5'"),
    ):  # fmt: skip
        with pytest.raises(SaekitError, match=words):
            do()
    backwards = dataclasses.replace(two, of=two.of[::-1].copy(), rows=csr_array(two.rows[::-1]))
    with pytest.raises(SaekitError, match="orders that don't agree"):
        average([one, backwards])
