"""Concepts of the world as explanations that can be executed, and a judge in a process of its own."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge_server import Judged, serving

from saekit.autointerp.explanation import Explanation
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.prompts import Reader, reader_of
from saekit.autointerp.scoring import Judge
from saekit.testbed.concepts import DISJOINT, NAMES, World, firing


@dataclass(frozen=True)
class ConceptRule:
    """A concept's predicate as a rule, of lines of tokens."""

    world: World
    number: int

    def strength(self, tokens: np.ndarray) -> np.ndarray:
        """1 where the concept fires, else 0."""
        return firing(torch.from_numpy(tokens), self.world.tokenizer)[..., self.number].numpy().astype(float)

    def to_json(self) -> dict[str, Any]:
        """Its name."""
        return {"kind": "concept", "number": self.number}


def true_explanations(world: World, names: "tuple[str, ...]" = NAMES) -> list[Explanation]:
    """Each concept's own sentence and predicate."""
    numbers = [NAMES.index(name) for name in names]
    return [Explanation(i, world.concepts[i].explanation, "human", ConceptRule(world, i)) for i in numbers]


def alive(world: World) -> tuple[str, ...]:
    """Disjoint concepts that fire often enough to be tried."""
    return tuple(n for n in DISJOINT if n not in ("dodo", "quagga"))


def reader(world: World) -> Reader:
    """How its tokens are shown."""
    return reader_of(world.model)


def serve(personality: str = "perfect", *flags: str) -> AbstractContextManager[Judged]:
    """A judge that knows the world's concepts, in a process of its own."""
    return serving("--personality", personality, "--concepts", "saekit.testbed.concepts:PREDICATES", *flags)


def judge(served: Judged, ledger: "str | Path", **options: Any) -> Judge:
    """A judge that asks a server."""
    return Judge(served.endpoint, Ledger(ledger), progress=False, **options)
