"""Mazes on a square lattice, as passages between cells and as tokens (Spies et al. 2024, 2412.11867).

``<start> a <-> b ; ... <from> a <to> b <path> a ... b``, as maze-dataset writes them. A maze is a tree, drawn by a random
depth-first walk; where passages are ``moved``, some of the tree's are missing and as many others stand in their place, so that
mazes have cycles and cells that can't be reached, and no passage is implied by the rest.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from saekit.testbed.tasks import Prompts
from saekit.types import SaekitError

Passage = tuple[int, int]
Maze = tuple[list[Passage], int, int]  # passages in the order in which they are listed, first cell, last cell
WORDS = 7  # tokens beside the cells
TRIES = 200  # mazes drawn for each one whose path a passage changes


def _ordered(passage: Passage) -> Passage:
    a, b = passage
    return (a, b) if a < b else (b, a)


@dataclass(frozen=True)
class Lattice:
    """``side`` x ``side`` cells, numbered from the top left; up to ``moved`` passages of a tree stand elsewhere.

    Tokens are the cells and the seven words behind them. ``asked`` is the position of the path's first cell, behind which
    the first step is asked; what is listed are as many ``passages`` in every maze.
    """

    side: int
    moved: int = 0

    def __post_init__(self):
        if self.side < 2:
            raise SaekitError(f"side = {self.side} has no passages; give 2 or more cells")
        most = min(self.passages, len(self.edges) - self.passages)
        if not 0 <= self.moved <= most:
            raise SaekitError(f"moved = {self.moved} must lie in 0..{most}, for there is no room for more; choose fewer")  # fmt: skip

    @property
    def cells(self) -> int:
        """How many there are; also the token <start>."""
        return self.side * self.side

    @property
    def words(self) -> range:
        """The tokens <start>, <->, ;, <from>, <to>, <path> and <end>; the last one also fills up behind a path."""
        return range(self.cells, self.cells + WORDS)

    @property
    def passages(self) -> int:
        """How many a maze has: those of a tree."""
        return self.cells - 1

    @property
    def asked(self) -> int:
        """Position of the path's first cell."""
        return 4 * self.passages + 6

    @property
    def length(self) -> int:
        """Tokens of a maze with its path, filled up."""
        return self.asked + self.cells

    @cached_property
    def beside(self) -> list[list[int]]:
        """The cells beside each cell."""
        out = []
        for cell in range(self.cells):
            y, x = divmod(cell, self.side)
            near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            out.append([self.side * a + b for a, b in near if 0 <= a < self.side and 0 <= b < self.side])
        return out

    @cached_property
    def edges(self) -> list[Passage]:
        """All that may be passages, the lower cell first."""
        return [(a, b) for a in range(self.cells) for b in sorted(self.beside[a]) if a < b]

    def tree(self, rng: random.Random) -> list[Passage]:
        """The passages of a random depth-first walk over all cells."""
        at = rng.randrange(self.cells)
        way, seen, passages = [at], {at}, []
        while way:
            fresh = [cell for cell in self.beside[way[-1]] if cell not in seen]
            if not fresh:
                way.pop()
                continue
            cell = rng.choice(fresh)
            passages.append((way[-1], cell))
            seen.add(cell)
            way.append(cell)
        return passages

    def draw(self, rng: random.Random) -> Maze:
        """A maze with its passages in any order and direction, and two cells that a way joins."""
        passages = self.tree(rng)
        if self.moved and (n := rng.randrange(self.moved + 1)):
            there = {_ordered(passage) for passage in passages}
            free = rng.sample([edge for edge in self.edges if edge not in there], n)
            passages = rng.sample(passages, len(passages) - n) + free
        passages = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in passages]
        rng.shuffle(passages)
        while True:
            end = rng.randrange(self.cells)
            if reached := [cell for cell, steps in self.steps(passages, end).items() if steps]:
                return passages, rng.choices(reached)[0], end

    def steps(self, passages: Sequence[Passage], end: int) -> dict[int, int]:
        """How many steps each cell that can be reached is away from ``end``, by breadth-first search."""
        joined: dict[int, list[int]] = {}
        for a, b in passages:
            joined.setdefault(a, []).append(b)
            joined.setdefault(b, []).append(a)
        away, queue = {end: 0}, [end]
        for cell in queue:
            for nearer in joined.get(cell, ()):
                if nearer not in away:
                    away[nearer] = away[cell] + 1
                    queue.append(nearer)
        return away

    def onward(self, passages: Sequence[Passage], end: int) -> dict[int, list[int]]:
        """For each cell that can be reached, the next cells of its shortest ways to ``end``."""
        away = self.steps(passages, end)
        out: dict[int, list[int]] = {cell: [] for cell in away}
        for a, b in passages:
            for here, there in ((a, b), (b, a)):
                if here in away and away[there] == away[here] - 1:
                    out[here].append(there)
        return out

    def shortest(self, passages: Sequence[Passage], begin: int, end: int) -> list[list[int]]:
        """All shortest ways, both ends included; none where there is no way."""
        onward = self.onward(passages, end)
        ways = [[begin]] if begin in onward else []
        while ways and ways[0][-1] != end:
            ways = [[*way, cell] for way in ways for cell in onward[way[-1]]]
        return ways

    def prompt(self, passages: Sequence[Passage], begin: int, end: int) -> list[int]:
        """A maze as tokens, up to the path's first cell."""
        start, joined, then, from_, to, path, _ = self.words
        listed = [token for a, b in passages for token in (a, joined, b, then)]
        return [start, *listed, from_, begin, to, end, path, begin]

    def prompts(self, mazes: Sequence[Maze], rng: random.Random) -> Prompts:
        """Mazes with a shortest path, asked for each next cell of all shortest ones, and for the path's end."""
        fill = self.words[-1]
        tokens = torch.full((len(mazes), self.length), fill)
        allowed = torch.zeros(len(mazes), self.length, self.cells + WORDS, dtype=torch.bool)
        for i, (passages, begin, end) in enumerate(mazes):
            row, onward = self.prompt(passages, begin, end), self.onward(passages, end)
            while row[-1] != end:
                allowed[i, len(row) - 1, onward[row[-1]]] = True
                row.append(rng.choice(onward[row[-1]]))
            allowed[i, len(row) - 1, fill] = True
            tokens[i, : len(row)] = torch.tensor(row)
        return Prompts(tokens, allowed)


def random_of(generator: torch.Generator) -> random.Random:
    """Python's random numbers, by torch's."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


@dataclass(frozen=True)
class Change:
    """A maze, and what one passage more or less would make of it: both have one shortest path, and they differ.

    ``at`` is the place in the list of the passage that is lacking in the other world, or, where one is added, of a passage
    that lies on neither path. ``other`` is another passage that is or isn't there as ``passage`` is, with which the path
    stays as it was, and ``other_at`` its place likewise.
    """

    maze: Maze
    passage: Passage
    at: int
    before: list[int]
    after: list[int]
    other: Passage
    other_at: int


def changes(lattice: Lattice, n: int, rng: random.Random, add: bool) -> list[Change]:
    """Mazes in which one passage more, or one less, makes another path the only shortest one; raises where there are too few."""
    out: list[Change] = []
    for _ in range(TRIES * n):
        if len(out) == n:
            break
        passages, begin, end = lattice.draw(rng)
        before = lattice.shortest(passages, begin, end)
        if len(before) != 1:
            continue
        (way,) = before
        told = [_ordered(passage) for passage in passages]
        worlds = [(edge, [*passages, edge]) for edge in lattice.edges if edge not in told] if add else [
            (edge, [p for p, own in zip(passages, told, strict=True) if own != edge]) for edge in told
        ]  # fmt: skip
        rng.shuffle(worlds)
        ways = [(edge, lattice.shortest(world, begin, end)) for edge, world in worlds]
        moved = next(((edge, found[0]) for edge, found in ways if len(found) == 1 and found != before), None)
        same = next((edge for edge, found in ways if found == before), None)
        if moved is None or same is None:
            continue
        edge, after = moved
        steps = {_ordered(step) for one in (way, after) for step in pairwise(one)}
        free = [i for i, own in enumerate(told) if own not in steps]
        if add and not free:
            continue
        at, other_at = (rng.choice(free),) * 2 if add else (told.index(edge), told.index(same))
        out.append(Change((passages, begin, end), edge, at, way, after, same, other_at))
    if len(out) < n:
        raise SaekitError(f"side = {lattice.side} and moved = {lattice.moved} give {len(out)} of {n} mazes whose path changes with one passage {'more' if add else 'less'}; give more of either")  # fmt: skip
    return out
