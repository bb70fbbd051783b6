"""Dictionaries with planted faults, and rows of which something is said: what evaluations of dictionaries should find.

Each world gives rows, labels, and a ReLU dictionary that reconstructs what it has features for: concepts whose features some
words have absorbed, a spurious attribute that stands alone or is entangled with the one asked about, and classes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.dictionaries import create
from saekit.dictionaries.rows import Rows

CONCEPTS, WORDS, OTHERS = 2, 100, 40  # words of each concept, and features that say nothing of it
WIDTH = 256
# of other features' firing, of rows, and below what a feature is silent: a feature that 100 words are taken off reads ten
# times the noise
RATE, NOISE, FLOOR = 0.1, 0.002, 0.1
BLUR = 0.3  # noise of rows with a spurious attribute: a biased probe guesses where the attributes disagree
CLASSES = 5


@dataclass(frozen=True)
class World:
    """``labels`` say one thing each of the rows."""

    x: Float[Tensor, "rows d"]
    labels: list[Bool[Tensor, " rows"]]
    dictionary: Rows


def absorbing(rate: float, rows: int, seed: int) -> World:
    """Each row has a word of one of two concepts. The first concept's feature is silent on a share ``rate`` of its words.

    Those words' features write the concept too, so that nothing is lost.
    """
    g = torch.Generator().manual_seed(seed)
    basis = _orthogonal(WIDTH, g)
    concepts, words, others = basis.split([CONCEPTS, CONCEPTS * WORDS, WIDTH - CONCEPTS * (1 + WORDS)])
    others = others[:OTHERS]
    word = torch.randint(CONCEPTS * WORDS, (rows,), generator=g)
    x = (
        concepts[word // WORDS]
        + words[word]
        + _firing(rows, OTHERS, g) @ others
        + NOISE * torch.randn(rows, WIDTH, generator=g)
    )
    taken = words[:WORDS][: round(rate * WORDS)]
    encoder, atoms = torch.cat([concepts, words, others]), torch.cat([concepts, words, others])
    encoder[0] = encoder[0] - taken.sum(0)
    atoms[CONCEPTS : CONCEPTS + len(taken)] += concepts[0]
    return World(x, [word // WORDS == 0], _relu(encoder, atoms))


def spurious(entangled: bool, rows: int, seed: int) -> World:
    """Rows with two independent attributes: each of their four values has a feature, or each of the four pairs of values."""
    g = torch.Generator().manual_seed(seed)
    first, second, *others = _orthogonal(OTHERS, g)
    signs = 2 * torch.randint(2, (rows, 2), generator=g).float() - 1
    x = signs @ torch.stack([first, second]) + _firing(rows, len(others), g) @ torch.stack(others)
    # of a pair's feature, what reads the sum: 2 in rows of the pair, 0 where one value is another, else -2
    own = [first + second, first - second] if entangled else [first, second]
    atoms = torch.stack([*own, *(-v for v in own), *others])
    bias = torch.full((len(atoms),), -FLOOR)
    bias[:4] = -1.0 if entangled else 0.0
    return World(
        x + BLUR * torch.randn(x.shape, generator=g), list((signs > 0).T), _relu(atoms, atoms.clone(), bias)
    )


def classes(rows: int, seed: int) -> World:
    """Rows of one class each; a class has a feature of its own, and other features fire whatever the class is."""
    g = torch.Generator().manual_seed(seed)
    basis = _orthogonal(WIDTH, g)
    which: Int[Tensor, " rows"] = torch.randint(CLASSES, (rows,), generator=g)
    x = (
        basis[which]
        + _firing(rows, WIDTH - CLASSES, g) @ basis[CLASSES:]
        + NOISE * torch.randn(rows, WIDTH, generator=g)
    )
    return World(x, [which == c for c in range(CLASSES)], _relu(basis, basis.clone()))


def _firing(rows: int, n: int, g: torch.Generator) -> Float[Tensor, "rows n"]:
    return (torch.rand(rows, n, generator=g) < RATE) * (0.5 + torch.rand(rows, n, generator=g))


def _orthogonal(d: int, g: torch.Generator) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(torch.randn(d, d, generator=g))[0]


@torch.no_grad()
def _relu(
    encoder: Float[Tensor, "feature d"], atoms: Float[Tensor, "feature d"], bias: Tensor | float = -FLOOR
) -> Rows:
    """A ReLU dictionary with these weights."""
    d = create("relu", d_in=atoms.shape[1], n_features=len(atoms), normalise="none", atoms="free")
    assert isinstance(d, Rows) and d.encoder is not None
    d.encoder.copy_(encoder)
    d.atoms.weight.copy_(atoms)
    d.b_enc.copy_(torch.as_tensor(bias))
    d.reads = d.writes = ("planted",)
    return d
