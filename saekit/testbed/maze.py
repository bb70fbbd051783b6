"""Mazes: the passages of a small lattice in any order, two cells, and the one way between them (Spies et al. 2024, 2412.11867).

``<start> a <-> b ; ... <from> a <to> b <path> a ... b``, as maze-dataset writes them. A maze is a tree, drawn by a random
depth-first walk, so that one way joins two cells.
"""

import random

import torch

from saekit.testbed.lattice import Lattice, Maze, Passage, random_of
from saekit.testbed.tasks import Prompts, Task
from saekit.testbed.transformer import TransformerConfig

LATTICE = Lattice(3)
SIDE, CELLS = LATTICE.side, LATTICE.cells  # tokens 0 .. CELLS - 1, from the top left
START, JOINED, THEN, FROM, TO, PATH, END = LATTICE.words  # END also fills up behind a path
VOCABULARY = CELLS + len(LATTICE.words)
PASSAGES = LATTICE.passages
ASKED = LATTICE.asked  # position of the path's first cell, behind which the first step is asked
LENGTH = LATTICE.length


def path(passages: list[Passage], begin: int, end: int) -> list[int]:
    """The cells of the shortest way, both ends included; empty if there is none."""
    return next(iter(LATTICE.shortest(passages, begin, end)), [])


def _draw(rng: random.Random) -> Maze:
    passages = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in LATTICE.tree(rng)]
    rng.shuffle(passages)
    begin, end = rng.sample(range(CELLS), 2)
    return passages, begin, end


def prompts(n: int, generator: torch.Generator) -> Prompts:
    """Mazes with the whole path, asked for each next cell and for the path's end."""
    rng = random_of(generator)
    return LATTICE.prompts([_draw(rng) for _ in range(n)], rng)


def opened(passages: list[Passage], at: int, door: Passage) -> list[Passage]:
    """The maze with a new passage in the place of another one."""
    return [*passages[:at], door, *passages[at + 1 :]]


def pairs(n: int, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Mazes up to the path's first cell, and the same with one passage moved, so that the first step is another.

    What is moved is the passage of the first step; the other maze is a tree again.
    """
    rng = random_of(generator)
    both: tuple[list[Maze], list[Maze]] = ([], [])
    while len(both[0]) < n:
        passages, begin, end = _draw(rng)
        step = path(passages, begin, end)[1]
        at = next(i for i, passage in enumerate(passages) if set(passage) == {begin, step})
        doors = [(begin, b) for b in LATTICE.beside[begin] if b != step]
        rng.shuffle(doors)
        for door in doors:
            other = opened(passages, at, door)
            way = path(other, begin, end)
            if way and door not in passages and door[::-1] not in passages:
                both[0].append((passages, begin, end))
                both[1].append((other, begin, end))
                break
    clean, changed = (LATTICE.prompts(mazes, rng) for mazes in both)
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
