"""Texts hold the pairs that are said, and pairs need three neurons."""

from itertools import combinations

import pytest
import torch

from saekit.testbed.neurons import (  # fmt: skip
    CODES,
    FILLER,
    FIRST_WORD,
    FOLLOWER,
    LENGTH,
    NEURONS,
    PAIRS,
    SECOND,
    SECOND_WORD,
    TONGUES,
    VOCABULARY,
    model,
    planted,
    texts,
)


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pairs_are_where_a_second_word_follows_a_first_one() -> None:
    drawn = texts(300, g())
    tokens = drawn.tokens
    assert tokens.shape == (300, LENGTH) and int(tokens.max()) < VOCABULARY and torch.equal(tokens[:, 0], drawn.tongue)  # fmt: skip
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    first = (before >= FIRST_WORD) & (before < SECOND_WORD)
    second = (tokens >= SECOND_WORD) & (tokens < FOLLOWER)
    pair = (SECOND * (before - FIRST_WORD) + tokens - SECOND_WORD).where(first & second, -1)
    assert torch.equal(pair, drawn.pair) and set(pair.unique().tolist()) == {-1, *range(PAIRS)}
    behind = tokens[:, 1:] - FOLLOWER
    ends = drawn.pair[:, :-1] >= 0
    moved = (drawn.pair[:, :-1] + PAIRS // 2 * (drawn.tongue == 0)[:, None]) % PAIRS
    assert torch.equal(behind[ends], moved[ends])
    fillers = tokens >= FILLER
    assert torch.equal((tokens >= FILLER + 4)[fillers], drawn.first_tongue[fillers])
    assert {0, TONGUES - 1} < set(drawn.tongue.tolist())


def test_three_neurons_tell_a_pair_and_two_never_do() -> None:
    drawn = texts(300, g(1))
    on = planted(drawn)
    assert torch.equal(on[..., 0], drawn.first_tongue)
    assert not on[drawn.pair < 0][:, 1:].any() and (on[drawn.pair >= 0][:, 1:].sum(1) == 3).all()
    assert len({tuple(code) for code in CODES.tolist()}) == PAIRS > NEURONS
    for pair, code in enumerate(CODES.tolist()):
        assert torch.equal(on[..., code].all(-1), drawn.pair == pair)
    for two in combinations(range(1, 1 + NEURONS), 2):
        of = drawn.pair[on[..., list(two)].all(-1)]
        assert len(of.unique()) == 4


@pytest.mark.slow
def test_the_model_s_neurons_fire_as_planted() -> None:
    from saekit.hooks import capture
    from saekit.testbed.neurons import FIRM, POINT

    lm, drawn = model(0), texts(100, g(2))
    fires = capture(lambda: lm.module(drawn.tokens), {POINT: lm.site(POINT)})[POINT]
    away = fires[..., : 1 + NEURONS] - planted(drawn).float()
    assert away.square().mean((0, 1)).sqrt().max() < FIRM
    assert fires[drawn.pair >= 0][:, 1 + NEURONS :].abs().mean() < FIRM
    losses = torch.nn.functional.cross_entropy(lm.module(drawn.tokens)[:, :-1].flatten(0, 1), drawn.tokens[:, 1:].flatten(), reduction="none")  # fmt: skip
    assert losses[(drawn.pair[:, :-1] >= 0).flatten()].mean() < 0.2  # log 40 by chance
