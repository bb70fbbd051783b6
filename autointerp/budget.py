"""What a run may cost: hard limits that count what is in flight at its worst, and an estimate before any call."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from saekit.autointerp.endpoint import Endpoint, most_tokens
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.requests import Request, schema_json
from saekit.errors import SaekitError


class Cost(NamedTuple):
    """Requests made, tokens read and written, money."""

    requests: int = 0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.requests + other.requests, self.tokens + other.tokens, self.money + other.money)

    def minus(self, other: "Cost") -> "Cost":
        """What is left without the other."""
        return Cost(self.requests - other.requests, self.tokens - other.tokens, self.money - other.money)


def cost(tokens: tuple[int, int], price: tuple[float, float] | None) -> Cost:
    """Of one request with (prompt, completion) tokens."""
    money = sum(n * p for n, p in zip(tokens, price, strict=True)) / 1e6 if price else 0.0
    return Cost(1, sum(tokens), money)


@dataclass
class Budget:
    """Limits that are never passed with a server that keeps to ``max_tokens``; None is no limit.

    ``requests`` counts every request sent, retries too; ``tokens`` prompt and completion tokens together; ``money`` is in
    the unit of the endpoint's price; ``seconds`` is time spent in ``ask``. Before a request is sent, its worst case (a
    token a byte of prompt, and ``max_tokens``) must fit beside what is spent and the worst cases of all in flight. A try
    that failed so that the server may have charged for it is charged at its worst. Several calls of ``ask`` that are
    given one budget share it.
    """

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None
    seconds: float | None = None
    spent: Cost = field(default=Cost(), init=False)
    spent_seconds: float = field(default=0.0, init=False)

    def __post_init__(self):
        for name in ("requests", "tokens", "money", "seconds"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise SaekitError(f"{name} = {value} must be a number from 0 up, or None for no limit")
        self._flying = Cost()
        self._lock = threading.Lock()

    def admit(self, worst: Cost) -> str:
        """Reserve a request's worst case: an empty string, or the limit that has no room for it now."""
        with self._lock:
            after = self.spent + self._flying + worst
            for name in Cost._fields:
                limit = getattr(self, name)
                if limit is not None and getattr(after, name) > limit:
                    used = getattr(self.spent, name)
                    return f"{name} = {limit} leaves no room: {used:.6g} used, the next request may take {getattr(worst, name):.6g}"
            self._flying += worst
            return ""

    def settle(self, worst: Cost, real: Cost) -> None:
        """Put what a request cost in the place of its worst case."""
        with self._lock:
            self._flying = self._flying.minus(worst)
            self.spent += real
            if not self._flying.requests:
                self._flying = Cost()  # sums of money leave dust

    @property
    def in_flight(self) -> int:
        """Requests whose cost isn't known yet."""
        return self._flying.requests


@dataclass(frozen=True)
class Estimate:
    """What asking would take: calls to make, requests that are recorded, and a range of tokens and money.

    The range is for one try each, without retries and re-asks: 5 bytes a token and no reply to speak of, up to 3 bytes a
    token and replies of ``max_tokens``. It is a guess for text in a Latin script; the limit is ``Budget``.
    """

    calls: int
    recorded: int
    tokens_low: int
    tokens_high: int
    money_low: float | None
    money_high: float | None

    def __str__(self) -> str:
        money = "" if self.money_low is None else f", {self.money_low:.4g} to {self.money_high:.4g} in money"
        return f"{self.calls:,} calls to make, {self.recorded:,} recorded; {self.tokens_low:,} to {self.tokens_high:,} tokens{money}"


def estimate(requests: Iterable[Request], endpoint: Endpoint, ledger: Ledger) -> Estimate:
    """What ``ask`` would take for these requests; equal ones are asked once."""
    price: Any = getattr(endpoint, "price", None)
    calls = recorded = 0
    low_cost, high_cost = Cost(), Cost()
    seen = set()
    for request in requests:
        key = request.key(endpoint.name)
        if key in seen:
            continue
        seen.add(key)
        if ledger.mode != "live" and ledger.find(key) is not None:
            recorded += 1
            continue
        calls += 1
        size = sum(len(m.content.encode()) for m in request.messages)
        size += len(schema_json(request.schema)) if request.schema else 0
        low_cost += cost((size // 5, 1), price)
        high_cost += cost(
            (min(size // 3 + 16 * len(request.messages), most_tokens(request)[0]), request.max_tokens), price
        )
    return Estimate(
        calls,
        recorded,
        low_cost.tokens,
        high_cost.tokens,
        low_cost.money if price else None,
        high_cost.money if price else None,
    )
