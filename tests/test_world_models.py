"""Games and mazes whose state a model works out: measures of the board, and what interventions and traces say of it."""

import pytest
import torch
from test_tasks import begun, turns

from saekit.papers.patch_free_othello import aurocs, touched
from saekit.testbed import othello
from saekit.types import Codes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_how_well_features_tell_mine_from_yours() -> None:
    dense = (torch.randn(60, 5, generator=generator()) - 0.3).clamp(min=0)
    dense[:, 4] = 0
    held = torch.randint(3, (60, 4), generator=generator(1))
    codes = Codes.from_dense(dense)
    found = aurocs(codes, held == 1, held == 2)
    for feature, square in torch.cartesian_prod(torch.arange(5), torch.arange(4)).tolist():
        mine, yours = (dense[held[:, square] == who, feature] for who in (1, 2))
        pairs = (mine[:, None] > yours).double() + 0.5 * (mine[:, None] == yours)
        assert found[feature, square].item() == pytest.approx(pairs.mean().item(), abs=1e-12)
    again = codes.with_values(codes.values)
    assert torch.equal(found[4], torch.full((4,), 0.5, dtype=found.dtype))  # a dead feature tells nothing
    assert torch.allclose(aurocs(again, held == 2, held == 1), 1 - found)


def test_moves_touch_what_they_set_and_turn_over() -> None:
    games = othello.prompts(300, generator(2))
    over = (~games.asked).any(1)
    passes = 0
    for tokens in torch.cat([games.tokens[over][:5], games.tokens[:30]]):
        found = touched(tokens[None])[0]
        board, who = begun(), 1
        for move, squares in zip(tokens.tolist(), found.tolist(), strict=True):
            if move == othello.START:
                assert not any(squares)
                continue
            y, x = divmod(move, othello.SIZE)
            if not (flips := turns(board, who, y, x)):
                who, passes = -who, passes + 1
                flips = turns(board, who, y, x)
            board |= dict.fromkeys([*flips, (y, x)], who)
            who = -who
            assert {place for place, on in zip(board, squares, strict=True) if on} == {*flips, (y, x)}
    assert passes
