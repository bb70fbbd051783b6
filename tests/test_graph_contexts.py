"""Top contexts of a graph's features: the highest peaks of the text, shown on the graph's page."""

import sys
from pathlib import Path

import pytest
import torch
from refusals import refusal
from test_graph_page import Seat, chromium, seat  # noqa: F401 (fixtures)

import saekit
from saekit.circuits.places import Neurons
from saekit.circuits.trace import trace
from saekit.cli import main
from saekit.dictionaries import Dictionary
from saekit.graph.export import ids
from saekit.models import Model
from saekit.report import graph_contexts
from saekit.types import SaekitError

TEXT = [
    "import os\nimport sys\nos.path.join('a', 'b')\n" * 4,
    "def main(self, other):\n    return self.x\n" * 5,
]
POINTS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def stands(code_lm: Model) -> list[Dictionary | Neurons]:
    """A dictionary, neurons, and a cross-layer transcoder, untrained but for their scale."""
    width = code_lm.module.config.n_embd
    d = saekit.create("topk", d_in=width, n_features=256, k=8, seed=0)
    d.reads = d.writes = POINTS[:1]
    clt = saekit.create("clt", d_in=width, n_layers=2, n_features=2 * 128, k=8, seed=1)
    clt.reads, clt.writes = ("blocks.2.mlp:in", "blocks.3.mlp:in"), ("blocks.2.mlp:out", "blocks.3.mlp:out")
    acts = {p: [] for p in (*d.reads, *clt.reads, *clt.writes)}
    for batch in saekit.harvest(code_lm, TEXT, list(acts), tokens=2000, split="all"):
        for point, kept in acts.items():
            kept.append(batch.rows(point))
    rows = {point: torch.cat(kept) for point, kept in acts.items()}
    for one in (d, clt):
        one.set_normalisation(torch.cat([rows[point] for point in one.points], -1))
    return [d, Neurons("blocks.0.mlp"), clt]


@pytest.fixture(scope="module")
def graph(code_lm: Model, stands: list[Dictionary | Neurons]) -> saekit.Graph:
    return trace(code_lm, stands, "import os\nos.").prune(0.97)


def test_contexts_are_the_highest_peaks(code_lm: Model, stands, graph: saekit.Graph) -> None:
    found = graph_contexts(graph, code_lm, stands, TEXT, tokens=2000, n_top=3)
    of = {(i, int(place)) for i in (0, 2) for place in graph.nodes.place[graph.find("feature", stand=i)]}
    assert set(found) == of and {stand for stand, _ in of} == {0, 2}
    for i, d in ((0, stands[0]), (2, stands[2])):
        highest = torch.zeros(d.n_features)
        d.requires_grad_(False)
        for batch in saekit.harvest(code_lm, TEXT, list(d.reads), tokens=2000):
            codes = d.encode(torch.cat([batch.activations[point] for point in d.reads], -1))
            dense = codes.to_dense()[batch.mask]
            highest = torch.maximum(highest, dense.amax(0))
        for (stand, feature), contexts in found.items():
            if stand == i:
                best = max((one["values"][one["at"]] for one in contexts), default=0.0)
                assert best == pytest.approx(float(highest[feature]), rel=1e-5)
                assert all(len(one["tokens"]) == len(one["values"]) for one in contexts)
    for wrong in (stands[:1], stands[::-1]):
        with pytest.raises(SaekitError, match="give those that it was traced with, in their order"):
            graph_contexts(graph, code_lm, wrong, TEXT)


def test_tokens_keep_the_space_that_a_decoder_takes_from_a_texts_first(
    code_lm: Model, stands, graph: saekit.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"text": TEXT, "tokens": 256, "n_top": 1}
    before, decode = graph_contexts(graph, code_lm, stands, **options), code_lm.tokenizer.decode
    assert any(" " in "".join(one["tokens"]) for shown in before.values() for one in shown)
    monkeypatch.setattr(code_lm.tokenizer, "decode", lambda ids: decode(ids).removeprefix(" "))
    assert graph_contexts(graph, code_lm, stands, **options) == before


@pytest.mark.browser
def test_in_a_browser_a_traced_features_contexts_are_shown(
    seat: Seat, code_lm: Model, stands, graph: saekit.Graph, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    contexts = graph_contexts(graph, code_lm, stands, TEXT, tokens=2000, n_top=2)
    names = {int(f): graph.nodes.place[f] for f in graph.find("feature", stand=0)}
    node = next(n for n, place in names.items() if contexts[0, int(place)])
    graph.to_html(seat.path, contexts=contexts, labels={(0, int(names[node])): "a label of ours"})
    seat.open()
    seat.go(ids(graph)[node])
    shown = seat.run("document.getElementById('detail').textContent")
    best = contexts[0, int(names[node])][0]
    assert "a label of ours" in shown and "Top contexts" in shown
    assert best["tokens"][best["at"]].strip() in shown
    assert seat.run("document.title") == graph.title
    seat.quiet()


def test_the_command_traces_neurons_where_no_dictionary_stands(
    stands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Named as in Python, so that graphs of both subtract; by default all of them, beside a transcoder the others."""
    saekit.save(stands[2], tmp_path / "clt")
    shared = ["--prompt", "import os", "--model", "code-lm", "--budget", "50", "--contexts", "0", "--json"]
    for given, names in (
        ([], [f"blocks.{i}.mlp" for i in range(4)]),
        ([str(tmp_path / "clt"), "--neurons"], [", ".join(stands[2].writes), "blocks.0.mlp", "blocks.1.mlp"]),
    ):
        out = tmp_path / f"graph{len(given)}"
        monkeypatch.setattr(sys, "argv", ["saekit", "trace", *given, *shared, "--out", str(out)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None), capfd.readouterr()
        assert list(saekit.load_graph(out).stands) == names
    said = refusal(["trace", *shared, "--scores", "slop", "--out", str(tmp_path / "x")], monkeypatch, capfd)
    assert said.startswith("scores = 'slop' must be one of whole, slope")
