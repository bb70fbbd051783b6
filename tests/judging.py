"""What the tests of asking share: questions in the judge's format, and their schema."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from saekit.autointerp.requests import Answer, Completion, Message, Request

CONCEPTS = ("--concepts", "judging:PREDICATES")  # of the judge's server


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: int
    fires: bool
    p: float = Field(ge=0, le=1)


class Verdicts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    answers: list[Verdict]


PREDICATES: dict[str, Callable[[list[str]], list[bool]]] = {
    "the word gold": lambda words: [word == "gold" for word in words],
    "words with a digit": lambda words: [any(c.isdigit() for c in word) for word in words],
}
SYSTEM = 'You judge examples. Reply with JSON: {"answers": [{"id": 1, "fires": true, "p": 0.9}]}'


def numbered(n: int) -> Callable[[Verdicts], str | None]:
    """A check that examples 1 to n are answered, each once and in order."""

    def check(value: Verdicts) -> str | None:
        ids = [answer.id for answer in value.answers]
        return None if ids == list(range(1, n + 1)) else f"ids must be 1 to {n}"

    return check


def question(i: int, examples: int = 4, explanation: str = "the word gold") -> Request:
    """Of the examples of question i, those whose number is a multiple of i % 3 + 2 hold gold."""
    texts = [
        f"item {i} has {'gold' if j % (i % 3 + 2) == 0 else 'iron'} in it" for j in range(1, examples + 1)
    ]
    shown = "\n\n".join(f"Example {j}: {text}" for j, text in enumerate(texts, 1))
    messages = (Message("system", SYSTEM), Message("user", f"Explanation: {explanation}\n{shown}"))
    return Request(f"question {i}", messages, Verdicts, max_tokens=200, check=numbered(examples))


def truth(i: int, examples: int = 4) -> list[bool]:
    """The right answers to question i."""
    return [j % (i % 3 + 2) == 0 for j in range(1, examples + 1)]


def verdicts(answer: Answer) -> list[bool] | None:
    """What an answer says of each example."""
    return None if answer.value is None else [row.fires for row in answer.value.answers]


def words(i: int, text: str = "say something") -> Request:
    return Request(f"words {i}", (Message("user", f"{text} {i}"),), None, max_tokens=20)


@dataclass
class Scripted:
    """An endpoint in this process: what it gives to each request, and how often it was asked."""

    name: str = "scripted"
    script: Any = None
    price: tuple[float, float] | None = (1.0, 2.0)
    asked: list[Request] = field(default_factory=list)
    closed: int = 0

    async def complete(self, request: Request, timeout: float) -> Completion:
        self.asked.append(request)
        await asyncio.sleep(0)
        return self.script(request, len(self.asked)) if self.script else Completion("fine", 5, 1)

    async def close(self) -> None:
        self.closed += 1
