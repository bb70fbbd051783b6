"""Edits of features in a running model: what moves, where, and that nothing else does."""

import subprocess
import sys

import pytest
import torch
from test_circuits import POINTS, TOKENS, stand
from test_weights import toy

import saekit
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.hooks import capture
from saekit.interventions import Edit, intervened
from saekit.models import Model
from saekit.types import SaekitError

X = TOKENS[None]


def run(m: Model, points: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What the model has at some places, and its logits."""
    sites = {point: m.site(point) for point in points}
    given = m.inputs(X, torch.ones_like(X, dtype=torch.bool))
    out = {}

    def forward() -> None:
        with torch.no_grad():
            out["logits"] = m.logits(given)

    return {**capture(forward, sites, stop=False), **out}


@torch.no_grad()
def active(d: saekit.Dictionary, m: Model) -> tuple[int, int, float]:
    """A feature that is active behind the beginning: where, which and its value."""
    seen = run(m, d.reads)
    codes = d.encode(torch.cat([seen[p] for p in d.reads], -1))
    at = ((codes.row_ids() > 2) & (codes.values != 0)).nonzero()[0]
    return int(codes.row_ids()[at]), int(codes.indices[at]), float(codes.values[at])


@pytest.mark.parametrize("name", POINTS)
def test_an_edit_moves_what_the_feature_writes_and_nothing_else(name: str) -> None:
    m = toy("layer norms, learned")
    d = stand(name, m)
    at, feature, value = active(d, m)
    before = run(m, d.writes)
    reads = run(m, d.reads)
    x = torch.cat([reads[p] for p in d.reads], -1)
    with torch.no_grad():
        codes = d.encode(x)
    here = (codes.row_ids() == at) & (codes.indices == feature)
    for edit, factor in (
        (Edit(feature, at, scale=0.0), -1.0),
        (Edit(feature, at, set=3 * value), 2.0),
        (Edit(feature, at, add=-value), -1.0),
    ):
        with intervened(m, [(d, [edit])]):
            moved = run(m, d.writes)
        changed = codes.with_values(torch.where(here, codes.values * (1 + factor), codes.values))
        if isinstance(d, CrossLayer):
            should = (d.decode(changed) - d.decode(codes)).split(d.wiring.parts_out, -1)[:1]
        else:
            should = (d.decode(changed, x) - d.decode(codes, x)).split(d.wiring.parts_out, -1)
        for point, expected in zip(d.writes, should, strict=False):
            torch.testing.assert_close(
                moved[point] - before[point], expected.view_as(before[point]), rtol=1e-4, atol=2e-5
            )
        assert (moved["logits"] - before["logits"])[:, at:].abs().max() > 0
        assert torch.equal(moved["logits"][:, :at], before["logits"][:, :at])
    after = run(m, d.writes)
    assert all(torch.equal(after[p], before[p]) for p in before)  # the hooks are gone


def test_an_edit_of_nothing_changes_no_bit_and_an_exception_leaves_no_hook() -> None:
    m = toy("layer norms, learned")
    d = stand("topk", m)
    before = run(m, d.writes)
    for edits in ([], [Edit(0, position=11, scale=1.0)]):
        with intervened(m, [(d, edits)]):
            assert torch.equal(run(m, d.writes)["logits"], before["logits"])
    with pytest.raises(KeyError), intervened(m, [(d, {0: 9.0})]):
        raise KeyError
    assert torch.equal(run(m, d.writes)["logits"], before["logits"])


@pytest.mark.parametrize("name", ["transcoder", "clt"])
def test_a_pass_that_was_stopped_leaves_nothing_behind(name: str) -> None:
    """A look at what a dictionary reads, which ends the pass before it writes, also at another length."""
    m = toy("layer norms, learned")
    d = stand(name, m)
    _, feature, value = active(d, m)
    with intervened(m, [(d, [Edit(feature, add=value)])]):
        before = run(m, d.writes)
        for x in (X, X[:, :-2]):
            given = m.inputs(x, torch.ones_like(x, dtype=torch.bool))
            capture(lambda given=given: m.logits(given), {d.reads[0]: m.site(d.reads[0])})
        after = run(m, d.writes)
    assert all(torch.equal(before[point], after[point]) for point in before)


def test_generation_is_the_same_with_and_without_cached_keys(code_lm: Model) -> None:
    d = saekit.create("topk", d_in=256, n_features=512, k=8, seed=0)
    d.reads = d.writes = ("blocks.1.hook_resid_post",)
    stream = saekit.harvest(
        code_lm, ["def main(self):\n    return self.value + 1\n" * 20], list(d.points), tokens=None
    )
    d.prepare(d.gather(list(stream)))
    out = []
    for cache in (True, False):
        for edits in ([Edit(3, set=40.0)], [Edit(3, position=12, set=200.0), Edit(7, position=3, add=100.0)]):
            with intervened(code_lm, [(d, edits)]):
                out.append(code_lm.generate("def main(self", max_new_tokens=12, use_cache=cache))
    plain = code_lm.generate("def main(self", max_new_tokens=12)
    assert out[:2] == out[2:] and out[0] != plain and out[1] != plain


def test_wrong_edits_are_refused() -> None:
    m = toy("layer norms, learned")
    d = stand("topk", m)
    for make, words in (
        (lambda: Edit(3), "give one of set, scale and add"),
        (lambda: Edit(3, set=1.0, add=1.0), "give one of set, scale and add"),
        (lambda: Edit(True, set=1.0), "feature True of an edit must be a number"),
        (lambda: Edit(3, position=-1, set=1.0), "counted from the beginning"),
        (lambda: Edit(3, set=float("nan")), "set = nan of an edit of feature 3 must be a finite number"),
        (lambda: intervened(m, [(d, {96: 1.0})]).__enter__(), "feature 96 is none of the dictionary's 96"),
    ):
        with pytest.raises(SaekitError, match=words):
            make()
    with pytest.warns(
        UserWarning, match="edit of feature 3 at position 40 did nothing: the longest text had 12 tokens"
    ):
        with intervened(m, [(d, [Edit(3, position=40, set=1.0), Edit(3, position=2, set=1.0)])]):
            m.module(X)


UNTYPED = """
import torch, saekit
m = saekit.load_model("code-lm")
d = saekit.create("topk", d_in=m.module.config.n_embd, n_features=64, k=4)
d.reads = d.writes = ("blocks.1.hook_resid_post",)
g = saekit.trace(m, d, "import os", "os")
for call in (
    lambda: saekit.intervened(m, [d]).__enter__(),
    lambda: saekit.constrained(m, [(saekit.Neurons("blocks.1.mlp"), {})], "import os").__enter__(),
    lambda: saekit.constrained(m, [(d, [saekit.Edit(3, position=40, set=1.0)])], "import os").__enter__(),
    lambda: saekit.intervened(m, [(d, saekit.Edit(3, set=1.0))]).__enter__(),
    lambda: saekit.intervened(m, [(d, [3])]).__enter__(),
    lambda: saekit.intervened(m, [(d, {3: "x"})]).__enter__(),
    lambda: saekit.Edit(3, set=5.0, position=1.5),
    lambda: saekit.Logit("a") - 1,
    lambda: saekit.Logit(3.5),
    lambda: saekit.trace(m, d, "import os", saekit.Target("nan", torch.full((256,), float("nan")))),
    lambda: saekit.trace(m, d, "import os", saekit.Target("none", torch.zeros(256), weight=0.0)),
    lambda: g.label(10**9),
    lambda: g - 3,
    lambda: g.of_kind("feat"),
    lambda: g.verify(m, d, top=10**6),
    lambda: saekit.graph_contexts(g, m, [d, d]),
    lambda: saekit.trace(m, d, "import os", budget=10.5),
    lambda: saekit.trace(m, d, "import os", saekit.Target("away", [0.0] * 256)),
    lambda: g.prune("0.8"),
    lambda: g.to_html("nowhere/at/all.html"),
    lambda: g.to_json("nowhere/at/all.json"),
):
    try:
        call()
    except saekit.SaekitError as error:
        print(error)
"""


def test_arguments_of_other_types_are_refused_in_words() -> None:
    """Without the tests' own checker of types, as a user meets them."""
    done = subprocess.run([sys.executable, "-P", "-c", UNTYPED], capture_output=True, text=True, timeout=120)
    said = (
        "changes has a Rows; give pairs",
        "changes has a Neurons; give pairs",
        "position 40 of an edit of feature 3 lies behind the prompt's",
        "edits are a Edit; give a list of edits",
        "edit 3 is none; write Edit(",
        "set = 'x' of an edit of feature 3 must be a finite number",
        "position 1.5 of an edit must be counted",
        "1 is no logit; write Logit(1)",
        "token 3.5 of a logit is none",
        "target 'nan' must have a finite direction",
        "target 'none' must have a finite direction and bias, a name, and a weight above 0",
        "node 1000000000 is none of the graph's",
        "a int can't be subtracted from a graph",
        "kind 'feat' is none of token",
        "dictionaries are of blocks.1.hook_resid_post, blocks.1.hook_resid_post and the graph's of blocks.1.hook_resid_post",
        "budget = 10.5 must be a whole number",
        "target 'away' has a direction of type list; give a tensor",
        "nodes = '0.8' must be a share",
        "path 'nowhere/at/all.html' can't be written: No such file or directory",
        "path 'nowhere/at/all.json' can't be written",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), (done.stdout, done.stderr)
    for line, words in zip(lines, said, strict=True):
        assert line.startswith(words), line
