"""The small worlds of the attention and codebook reproductions are what they say."""

import pytest
import torch

from saekit.testbed import heads, induction, states


def test_planted_heads_look_one_back_and_at_marks() -> None:
    world = heads.PlantedHeads.draw(3)
    rows = world.rows(50, torch.Generator().manual_seed(0))
    x, y = rows.split(heads.D, -1)
    patterns = world.patterns(x)
    assert (patterns[:, 0].diagonal(-1, 1, 2) > 0.99).all()
    marked = (x @ world.basis[8] > 0.5).float()
    assert (torch.einsum("nqs,ns->nq", patterns[:, 1], marked) > 0.99).all()
    # the output is the sum of rank-one units under the patterns
    codes = torch.einsum("nhqs,nsu->nqhu", patterns, x @ world.read.T)
    z = torch.cat([codes[..., 0, :2], codes[..., 1, 2:]], -1)
    torch.testing.assert_close(y, z @ world.written, rtol=1e-4, atol=1e-4)
    for directions in (world.read, world.written):
        torch.testing.assert_close(directions @ directions.T, torch.eye(4), rtol=1e-5, atol=1e-5)


def test_sequences_repeat_with_periods_of_their_own() -> None:
    tokens, periods = induction.sequences(200, torch.Generator().manual_seed(0))
    assert periods.unique().numel() == induction.PERIODS[1] - induction.PERIODS[0] + 1
    for row, period in zip(tokens, periods, strict=True):
        assert row[0] == 0 and torch.equal(row[1 + period :], row[1:-period])
        assert row[1 : 1 + period].unique().numel() == period
    known = induction.known(periods)
    sequence, query = known[:, :-1].nonzero(
        as_tuple=True
    )  # the next token stood behind the previous occurrence
    assert torch.equal(tokens[sequence, query + 1], tokens[sequence, query - periods[sequence] + 1])
    ideal = torch.zeros(200, 1, tokens.shape[1], tokens.shape[1])
    for i, q in known.nonzero():
        ideal[i, 0, q, q - periods[i] + 1] = 1
    assert induction.mass_after_previous(ideal, periods).item() == pytest.approx(1)


def test_the_language_of_states_knows_right_from_wrong() -> None:
    language = states.StateLanguage.draw(1)
    walks = language.walks(64, torch.Generator().manual_seed(0))
    follows = language.next()
    assert follows.sum(1).unique().tolist() == [states.EDGES]
    assert follows[walks[:, :-1], walks[:, 1:]].all()
    tokens = states.tokens_of(walks)
    assert torch.equal(states.BASE * tokens[:, 1::2] + tokens[:, 2::2], walks)
    oracle = torch.nn.functional.one_hot(tokens.roll(-1, 1), states.BASE + 1).float()
    assert language.accuracy(oracle, walks) == 1
    blind = language.accuracy(torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1)), walks)
    assert 0.05 < blind < 0.4
