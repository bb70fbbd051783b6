"""Mazes: the passages of a small lattice in any order, two cells, and the one way between them (Spies et al. 2024, 2412.11867).

``<start> a <-> b ; ... <from> a <to> b <path> a ... b``, as maze-dataset writes them. A maze is a tree, drawn by a random
depth-first walk, so that one way joins two cells.
"""

import random

import torch

from saekit.testbed.tasks import Prompts, Task, single
from saekit.testbed.transformer import TransformerConfig

SIDE = 3
CELLS = SIDE * SIDE  # tokens 0 .. CELLS - 1, from the top left
START, JOINED, THEN, FROM, TO, PATH, END = range(CELLS, CELLS + 7)  # END also fills up behind a path
VOCABULARY = CELLS + 7
PASSAGES = CELLS - 1
ASKED = 4 * PASSAGES + 6  # position of the path's first cell, behind which the first step is asked
LENGTH = ASKED + CELLS
Passage = tuple[int, int]


def neighbours(cell: int) -> list[int]:
    """The cells beside a cell."""
    y, x = divmod(cell, SIDE)
    beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return [SIDE * a + b for a, b in beside if 0 <= a < SIDE and 0 <= b < SIDE]


def maze(rng: random.Random) -> list[Passage]:
    """The passages of a random depth-first walk over all cells."""
    at = rng.randrange(CELLS)
    way, seen, passages = [at], {at}, []
    while way:
        fresh = [cell for cell in neighbours(way[-1]) if cell not in seen]
        if not fresh:
            way.pop()
            continue
        cell = rng.choice(fresh)
        passages.append((way[-1], cell))
        seen.add(cell)
        way.append(cell)
    return passages


def path(passages: list[Passage], begin: int, end: int) -> list[int]:
    """The cells of the shortest way, both ends included, by breadth-first search; empty if there is none."""
    beside: dict[int, list[int]] = {cell: [] for cell in range(CELLS)}
    for a, b in passages:
        beside[a].append(b)
        beside[b].append(a)
    before, queue = {end: end}, [end]
    for cell in queue:
        for nearer in beside[cell]:
            if nearer not in before:
                before[nearer] = cell
                queue.append(nearer)
    way = [begin] if begin in before else []
    while way and way[-1] != end:
        way.append(before[way[-1]])
    return way


def prompt(passages: list[Passage], begin: int, end: int) -> list[int]:
    """A maze as tokens, up to the path's first cell."""
    listed = [token for a, b in passages for token in (a, JOINED, b, THEN)]
    return [START, *listed, FROM, begin, TO, end, PATH, begin]


def _of(mazes: list[tuple[list[Passage], int, int]]) -> Prompts:
    rows, answers = [], []
    for passages, begin, end in mazes:
        steps = path(passages, begin, end)[1:]
        row = [*prompt(passages, begin, end), *steps]
        answers.append([*[-1] * (len(row) - 1 - len(steps)), *steps, END, *[-1] * (LENGTH - len(row))])
        rows.append([*row, *[END] * (LENGTH - len(row))])
    return single(torch.tensor(rows), torch.tensor(answers), VOCABULARY)


def _draw(rng: random.Random) -> tuple[list[Passage], int, int]:
    passages = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in maze(rng)]
    rng.shuffle(passages)
    begin, end = rng.sample(range(CELLS), 2)
    return passages, begin, end


def _random(generator: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Mazes with the whole path, asked for each next cell and for the path's end."""
    rng = _random(generator)
    return _of([_draw(rng) for _ in range(n)])


def opened(passages: list[Passage], at: int, door: Passage) -> list[Passage]:
    """The maze with a new passage in the place of another one."""
    return [*passages[:at], door, *passages[at + 1 :]]


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Mazes up to the path's first cell, and the same with one passage moved, so that the first step is another.

    What is moved is the passage of the first step; the other maze is a tree again.
    """
    rng = _random(generator)
    both: tuple[list, list] = ([], [])
    while len(both[0]) < n:
        passages, begin, end = _draw(rng)
        step = path(passages, begin, end)[1]
        at = next(i for i, passage in enumerate(passages) if set(passage) == {begin, step})
        doors = [(begin, b) for b in neighbours(begin) if b != step]
        rng.shuffle(doors)
        for door in doors:
            other = opened(passages, at, door)
            way = path(other, begin, end)
            if way and door not in passages and door[::-1] not in passages:
                both[0].append((passages, begin, end))
                both[1].append((other, begin, end))
                break
    clean, changed = (_of(mazes) for mazes in both)
    cut = slice(ASKED + 1)
    return (
        Prompts(clean.tokens[:, cut], clean.allowed[:, cut]),
        Prompts(changed.tokens[:, cut], changed.allowed[:, cut]),
    )


TASK = Task(
    name="maze",
    config=TransformerConfig(
        vocabulary=VOCABULARY, context=LENGTH, d_model=64, n_layers=3, n_heads=4, d_head=16, d_mlp=256
    ),
    prompts=prompts, pairs=pairs, demand=0.95, steps=2500, rows=32, rate=3e-3,
)  # fmt: skip
