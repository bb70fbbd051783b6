"""Edits in a frozen model do what the graph says: total effects where features react, direct edges where they don't."""

import pytest
import torch
from test_circuits import POINTS, TOKENS, stand
from test_interventions import run
from test_weights import toy

import saekit
from saekit.circuits.constrained import constrained
from saekit.circuits.places import Stand
from saekit.circuits.targets import Target, resolve
from saekit.circuits.trace import traced
from saekit.dictionaries import Dictionary
from saekit.interventions import Edit
from saekit.models import Model
from saekit.types import SaekitError


def effects(
    m: Model, stands: list[Stand], through: bool
) -> tuple[torch.Tensor, list[tuple[int, int, int, int]]]:
    """What every feature adds to token 3's logit, and its node, stand, number and position."""
    frozen = traced(m, stands, TOKENS)
    target = resolve(frozen.frozen, m, 3)[0]
    assert isinstance(target, Target)
    logit = Target("logit", frozen.frozen.weights.W_U[3], 0.0)
    row = frozen.targets([logit], through=through)[0]
    table = frozen.columns.table()
    nodes = [n for own in frozen.parts for n in range(own.nodes.start, own.nodes.stop)]
    return row, [(n, int(table.stand[n]), int(table.place[n]), int(table.position[n])) for n in nodes]


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("react", [True, False])
def test_an_ablation_takes_away_what_the_graph_says(name: str, react: bool) -> None:
    m = toy("layer norms, learned")
    other = "topk" if name != "topk" else "jumprelu"
    stands: list[Dictionary] = [stand(name, m), stand(other, m)]
    row, features = effects(m, list(stands), react)
    before = run(m, ())["logits"]
    mine = [f for f in features if f[1] == 0]
    for node, _, feature, position in mine[:: max(1, len(mine) // 4)]:
        for edit, factor in (
            (Edit(feature, position, scale=0.0), -1.0),
            (Edit(feature, position, scale=3.0), 2.0),
        ):
            with constrained(m, [(stands[0], [edit]), (stands[1], [])], TOKENS, react):
                change = (run(m, ())["logits"] - before)[0, -1]
            # of a logit alone: graphs' targets are less the mean
            assert change[3].item() == pytest.approx(factor * row[node].item(), abs=2e-5)
    torch.testing.assert_close(run(m, ())["logits"], before, rtol=0, atol=0)  # the hooks are gone


def test_two_edits_add_and_nothing_is_no_change() -> None:
    m = toy("root mean squares, rotary, gated, grouped")
    d = stand("topk", m)
    before = run(m, ())["logits"]

    def moved(edits: list[Edit]) -> torch.Tensor:
        with constrained(m, [(d, edits)], TOKENS):
            return run(m, ())["logits"] - before

    first, second = Edit(3, 4, set=2.0), Edit(90, add=-1.0)
    assert moved([]).abs().max() < 1e-5
    torch.testing.assert_close(moved([first, second]), moved([first]) + moved([second]), rtol=0, atol=2e-5)
    assert moved([first]).abs().max() > 1e-3
    with pytest.raises(SaekitError, match="feature 96 is none"), constrained(m, [(d, {96: 1.0})], TOKENS):
        pass
    with (
        pytest.raises(SaekitError, match="other tokens than the prompt"),
        constrained(m, [(d, [])], TOKENS.flip(0)),
    ):
        run(m, ())
    assert torch.equal(run(m, ())["logits"], before)


def test_generation_behind_a_frozen_prompt_is_the_same_with_and_without_cached_keys(code_lm: Model) -> None:
    d = saekit.create("topk", d_in=256, n_features=512, k=8, seed=0)
    d.reads = d.writes = ("blocks.1.hook_resid_post",)
    stream = saekit.harvest(
        code_lm, ["def main(self):\n    return self.value + 1\n" * 20], list(d.points), tokens=None
    )
    d.prepare(d.gather(list(stream)))
    prompt, out = "def main(self", []
    for cache in (True, False):
        for edits in ({3: 60.0}, {}):
            with constrained(code_lm, [(d, edits)], prompt):
                out.append(code_lm.generate(prompt, max_new_tokens=12, use_cache=cache))
    plain = code_lm.generate(prompt, max_new_tokens=12)
    assert out[0] == out[2] != plain and out[1] == out[3] == plain
