"""Othello on a small board: random games, which moves are legal, and what a move turns over (Li et al. 2022, 2210.13382).

A token is the square of a move, counted from the top left; who has no legal move passes, without a token. The board is
4x4, of which there are 60,060 games: what is held out are all games that begin in some ways.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.testbed.tasks import Prompts, Task
from saekit.testbed.transformer import TransformerConfig

SIZE = 4
SQUARES = SIZE * SIZE
START = SQUARES  # the token in front of a game, and behind one that ends early
LENGTH = SQUARES - 4  # moves that fill the board
OPENING, SHARE = 6, 8  # moves that say whether a game is held out, and of how many openings one is
DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx)
Discs = Bool[Tensor, "n square"]


# a board is a whole number with a bit for each square; a step in each direction shifts it, and what lies over the edge is cut
_BITS = 2 ** torch.arange(SQUARES)
_LEFT, _RIGHT = (torch.tensor([max(0, sign * (dy * SIZE + dx)) for dy, dx in DIRECTIONS]) for sign in (1, -1))
_INSIDE = torch.stack(
    [_BITS.view(SIZE, SIZE)[max(dy, 0) : SIZE + dy, max(dx, 0) : SIZE + dx].sum() for dy, dx in DIRECTIONS]
)


def beginning(n: int) -> tuple[Discs, Discs]:
    """The first mover's discs and the other's: two each, crosswise in the middle."""
    a, b = SIZE // 2 - 1, SIZE // 2
    mine, yours = torch.zeros(2, n, SQUARES, dtype=torch.bool)
    mine[:, [a * SIZE + b, b * SIZE + a]] = True
    yours[:, [a * SIZE + a, b * SIZE + b]] = True
    return mine, yours


def _step(bits: Tensor) -> Tensor:
    """Boards [n, direction], each moved by a square in its direction."""
    return bits << _LEFT >> _RIGHT & _INSIDE


def _rows(origin: Tensor, yours: Tensor) -> Tensor:
    """The unbroken rows [n, direction] of the other's discs beside the squares of ``origin`` [n]."""
    row = _step(origin[:, None]) & yours[:, None]
    for _ in range(SIZE - 3):
        row = row | _step(row) & yours[:, None]
    return row


def _bits(discs: Discs) -> Tensor:
    return (discs * _BITS).sum(1)


def _discs(bits: Tensor) -> Discs:
    """The squares that are on boards [n, direction], in any direction."""
    return (bits[..., None] & _BITS).any(1)


def legal(mine: Discs, yours: Discs) -> Discs:
    """Where a move of mine turns over something, on any board."""
    return _discs(_step(_rows(_bits(mine), _bits(yours)))) & ~(mine | yours)


def after(mine: Discs, yours: Discs, to: Int[Tensor, " n"]) -> tuple[Discs, Discs]:
    """The discs of who moves next and of the other, behind a move (START: none)."""
    placed = torch.nn.functional.one_hot(to, SQUARES + 1)[:, :-1].bool()
    row = _rows(_bits(placed), _bits(yours))
    # what lies behind a row's end
    flips = _discs(row * ((_step(row) & _bits(mine)[:, None]) != 0))
    mine, yours = yours & ~flips, mine | flips | placed
    back = (to == START) | (~legal(mine, yours).any(1) & legal(yours, mine).any(1))
    return yours.where(back[:, None], mine), mine.where(back[:, None], yours)


def boards(
    tokens: Int[Tensor, "n seq"],
) -> tuple[Bool[Tensor, "n seq square"], Bool[Tensor, "n seq square"]]:
    """The discs of who moves next and of the other, behind each token of games."""
    seen = [beginning(len(tokens))]
    for to in tokens[:, 1:].unbind(1):
        seen.append(after(*seen[-1], to))
    mine, yours = (torch.stack(discs, 1) for discs in zip(*seen, strict=True))
    return mine, yours


def games(n: int, generator: torch.Generator) -> Prompts:
    """Games in which each legal move is as probable; asked for the legal moves until the game is over."""
    mine, yours = beginning(n)
    tokens, allowed = [torch.full((n,), START)], [legal(mine, yours)]
    for _ in range(LENGTH - 1):
        moves = allowed[-1]
        to = (torch.rand(n, SQUARES, generator=generator) * moves).argmax(1).where(moves.any(1), START)
        mine, yours = after(mine, yours, to)
        tokens.append(to)
        allowed.append(legal(mine, yours))
    may = torch.stack(allowed, 1)
    return Prompts(torch.stack(tokens, 1), torch.cat([may, torch.zeros(n, LENGTH, 1, dtype=torch.bool)], 2))


def unseen(tokens: Int[Tensor, "n seq"]) -> Bool[Tensor, " n"]:
    """Which games are never trained on, by a checksum of their first moves."""
    opening = tokens[:, 1 : OPENING + 1]
    return (opening * torch.arange(1, 2 * OPENING, 2)).sum(1) % SHARE == 0


def _chosen(n: int, generator: torch.Generator, held: bool) -> Prompts:
    found: list[Prompts] = []
    while sum(len(some.tokens) for some in found) < n:
        some = games(n * (SHARE + 4 if held else 2), generator)
        kept = unseen(some.tokens) == held
        found.append(Prompts(some.tokens[kept], some.allowed[kept]))
    both = ([getattr(some, name) for some in found] for name in ("tokens", "allowed"))
    tokens, allowed = (torch.cat(parts)[:n] for parts in both)
    return Prompts(tokens, allowed)


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Random games of those that are trained on."""
    return _chosen(n, generator, False)


def held_out(n: int, generator: torch.Generator) -> Prompts:
    """Random games of those that are not."""
    return _chosen(n, generator, True)


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Games up to their middle, and the same with another last move, behind which other moves are legal."""
    middle = LENGTH // 2
    drawn = held_out(4 * n, generator)
    other = drawn.allowed[:, middle - 1].scatter(1, drawn.tokens[:, middle, None], False)
    changed = drawn.tokens[:, : middle + 1].clone()
    changed[:, -1] = (torch.rand(other.shape, generator=generator) * other).argmax(1)
    # 4 n games are plenty: few have one legal move alone, or the same moves behind two
    allowed = drawn.allowed[:, : middle + 1].clone()
    mine, yours = boards(changed)
    allowed[:, -1, :-1] = legal(mine[:, -1], yours[:, -1])
    differs = other.any(1) & (allowed[:, -1] != drawn.allowed[:, middle]).any(1) & allowed[:, -1].any(1)
    kept = (differs & drawn.allowed[:, middle].any(1)).nonzero()[:n, 0]
    clean = Prompts(drawn.tokens[kept, : middle + 1], drawn.allowed[kept, : middle + 1])
    return clean, Prompts(changed[kept], allowed[kept])


TASK = Task(
    name="othello",
    config=TransformerConfig(
        vocabulary=SQUARES + 1, context=LENGTH, d_model=128, n_layers=4, n_heads=8, d_head=16, d_mlp=512
    ),
    prompts=prompts, held_out=held_out, pairs=pairs, demand=0.95, steps=1500, rows=64, rate=3e-3,
)  # fmt: skip
