"""Ask many questions of a model: at a rate, within a budget, through failures, and never twice.

What comes out is a function of the requests and of the ledger alone: not of the number in flight, of the order in which
replies come, or of how often a run was killed on the way. What the ledger holds is answered before a thread or a socket
is made; the rest is asked in an event loop in a thread of its own, so that ``ask`` works inside Jupyter's.
"""

import asyncio
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from saekit.autointerp.budget import Budget, Cost, cost
from saekit.autointerp.endpoint import Endpoint, Retry, most_tokens
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.reply import Read, read
from saekit.autointerp.requests import Answer, Completion, Request, digest, tally
from saekit.errors import SaekitError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds: of the jitter before the first retry, and of any
LONGEST_RETRY_AFTER = 600.0  # a server that asks for more is a server that is down
Draw = Callable[[int, int, str], None]


class _Lost(Exception):
    """No reply, and why: the status and the reason of the answer."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


def ask(
    requests: Sequence[Request],
    endpoint: Endpoint,
    ledger: Ledger,
    budget: Budget | None = None,
    concurrency: int = 16,
    rate: float | None = None,
    timeout: float = 60,
    retries: int = 5,
    progress: bool | Draw = True,
    seed: int = 0,
) -> list[Answer]:
    """Answers in the order of the requests.

    ``concurrency``: requests in flight; ``rate``: requests begun per second, None for no limit; ``timeout``: seconds of
    one try; ``retries``: tries after the first that fail by connection, timeout, a status of 408, 409, 425, 429 or from
    500 on, or a reply that is cut short or empty. They wait as long as the server says, else a random time (from
    ``seed``) below 0.5 s, doubled each time up to 30 s. A reply that can't be used, or a refusal, is asked again once,
    with the reason. Equal requests are asked once.

    Any other status (a wrong key, an unknown model) stops the run with SaekitError, and a replay that misses a reply
    does before anything is asked; replies recorded by then, or by Ctrl-C, are kept. ``progress``: a bar on a terminal,
    or a function that is given (done, total, a note) from the calling thread.
    """
    began = time.monotonic()
    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
        if value < least:
            raise SaekitError(f"{name} = {value} must be at least {least}")
    for name, number in (("timeout", timeout), ("rate", rate)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise SaekitError(f"{name} = {number} must be a number above 0")
    budget = budget or Budget()
    if budget.money is not None and getattr(endpoint, "price", None) is None:
        raise SaekitError(
            f"money = {budget.money} can't be kept to: endpoint {endpoint.name!r} has no price; give it price=(prompt, completion)"
        )
    answers: list[Answer | None] = [None] * len(requests)
    left = _recorded(requests, endpoint.name, ledger, answers)
    if left:
        engine = _Engine(endpoint, ledger, budget, concurrency, rate, timeout, retries, seed, began)
        with _drawn(progress) as draw:
            engine.run(requests, left, answers, draw)
    return [answer for answer in answers if answer is not None]


def _recorded(
    requests: Sequence[Request], name: str, ledger: Ledger, answers: list[Answer | None]
) -> list[int]:
    """Answer what the ledger holds; gives the places of the others."""
    if ledger.mode == "live":
        return list(range(len(requests)))
    left = []
    for i, request in enumerate(requests):
        talk = _talk(request)
        asked = next(talk)
        try:
            while (found := ledger.find(asked.key(name))) is not None:
                asked = talk.send(found)
        except StopIteration as end:
            answers[i] = end.value
            continue
        if ledger.mode == "replay":
            which = "" if asked is request else " after an unusable reply"
            raise SaekitError(
                f"ledger {str(ledger.path)!r} holds no reply of {name!r} to {request.unit!r}{which}: the prompt, its parameters or the "
                "model differ from what was recorded; undo the change, or record it with mode='cache'"
            )
        left.append(i)
    return left


def _talk(request: Request) -> Generator[Request, Completion, Answer]:
    """What is asked for one answer: the request, and once again if the reply can't be used."""
    replies: list[Completion] = []
    asked = request
    while True:
        try:
            replies.append((yield asked))
        except _Lost as lost:
            begun = "budget" if lost.status == "not_run" and replies else lost.status
            return _answer(request, replies, asked is not request, Read(begun, None, False, str(lost)))
        found = read(replies[-1], request.schema, request.check)
        if found.status == "ok" or asked is not request:
            return _answer(request, replies, asked is not request, found)
        asked = request.again(replies[-1].text, found.reason)


def _answer(request: Request, replies: Sequence[Completion], reasked: bool, found: Read) -> Answer:
    text = replies[-1].text if replies else ""
    spent = (sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies))
    return Answer(
        request.unit, found.status, found.value, text, found.repaired, reasked, *spent, found.reason
    )


class _Engine:
    """One run of ``ask`` over what isn't recorded."""

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: Ledger,
        budget: Budget,
        concurrency: int,
        rate: float | None,
        timeout: float,
        retries: int,
        seed: int,
        began: float,
    ):
        self.endpoint, self.ledger, self.budget = endpoint, ledger, budget
        self.concurrency, self.rate, self.timeout, self.retries, self.seed = (
            concurrency,
            rate,
            timeout,
            retries,
            seed,
        )
        limit = budget.seconds
        self.began, self.deadline = began, None if limit is None else began + limit - budget.spent_seconds
        self.price: Any = getattr(endpoint, "price", None)
        self.after = ledger.last() if ledger.mode == "live" else 0
        self.asking: dict[str, asyncio.Task[Completion]] = {}  # in flight, and those that failed
        self.over = ""  # the limit that ended the run
        self.slot = 0.0  # when the rate allows the next request
        self.failure: BaseException | None = None
        self.halted = threading.Event()
        self.halt: Callable[[], None] | None = None

    def run(
        self, requests: Sequence[Request], left: list[int], answers: list[Answer | None], draw: Draw
    ) -> None:
        """Fill in the answers that are left, from a thread; this thread draws."""

        def body() -> None:
            try:
                asyncio.run(self._main(requests, left, answers))
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                self.failure = error

        thread = threading.Thread(target=body, name="saekit-ask", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                done = [answers[i] for i in left if answers[i] is not None] if draw is not _nothing else []
                draw(len(done), len(left), _note(done))
        finally:  # Ctrl-C comes here
            self.halted.set()
            if self.halt is not None:
                self.halt()
            thread.join()
            self.budget.spent_seconds += time.monotonic() - self.began
        if self.failure is not None:
            raise self.failure

    async def _main(self, requests: Sequence[Request], left: list[int], answers: list[Answer | None]) -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        self.gate, self.settled = asyncio.Lock(), asyncio.Event()
        places = iter(left)

        async def work() -> None:
            for i in places:
                answers[i] = await self._answer(requests[i])

        def cancel() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(main.cancel)

        self.halt = cancel
        if self.halted.is_set():
            return
        workers = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(left)))]
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if close := getattr(self.endpoint, "close", None):
                await close()

    async def _answer(self, request: Request) -> Answer:
        talk = _talk(request)
        asked = next(talk)
        try:
            while True:
                try:
                    reply = await self._reply(asked)
                except _Lost as lost:
                    talk.throw(lost)
                else:
                    asked = talk.send(reply)
        except StopIteration as end:
            return end.value

    async def _reply(self, request: Request) -> Completion:
        """The reply that is recorded, that is being asked for, or that is asked for now."""
        body = request.body(self.endpoint.name)
        key = digest(body)
        if key not in self.asking:
            if (found := self.ledger.find(key, self.after)) is not None:
                return found
            self.asking[key] = asyncio.create_task(self._tried(request, key, body))
        reply = await self.asking[key]
        self.asking.pop(key, None)
        return reply

    async def _tried(self, request: Request, key: str, body: str) -> Completion:
        begun, loop = False, asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(self.deadline) as clock:
                failed, jitter = 0, random.Random(f"{self.seed} {key}")
                while True:
                    await self._admitted(request, begun)
                    begun = True
                    found = await self._once(request, key, body)
                    if isinstance(found, Completion):
                        return found
                    seen = loop.time()
                    failed += found.counts
                    if failed > self.retries:
                        tries = "the only try" if failed == 1 else f"the last of {failed} tries"
                        raise _Lost("error", f"{tries} ended in: {found.kind}")
                    longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** max(0, failed - 1))
                    wait = jitter.uniform(0, longest) if found.after is None else found.after
                    if wait > LONGEST_RETRY_AFTER:
                        raise _Lost("error", f"{found.kind}, and the server asks to wait {wait:.0f} s")
                    await asyncio.sleep(max(0.0, seen + wait - loop.time()))
        except TimeoutError:
            if self.deadline is None or not (clock.expired() or loop.time() >= self.deadline):
                raise
            self.over = self.over or f"seconds = {self.budget.seconds} are over"
            raise _Lost("budget" if begun else "not_run", self.over) from None

    async def _admitted(self, request: Request, begun: bool) -> None:
        """Wait, in order, until the budget has room and the rate allows it."""
        worst = cost(most_tokens(request), self.price)
        async with self.gate:
            if self.deadline is not None and asyncio.get_running_loop().time() >= self.deadline:
                raise TimeoutError  # before the first await, where a timeout that is over doesn't show
            while not self.over and (full := self.budget.admit(worst)):
                if not self.budget.in_flight:
                    self.over = full
                    break
                self.settled.clear()  # room is made as requests come back, those of another thread too
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self.settled.wait()
            if self.over:
                raise _Lost("budget" if begun else "not_run", self.over)
            if self.rate is not None:
                loop = asyncio.get_running_loop()
                self.slot = max(loop.time(), self.slot) + 1 / self.rate
                try:
                    await asyncio.sleep(max(0.0, self.slot - 1 / self.rate - loop.time()))
                except BaseException:
                    self.budget.settle(worst, Cost())
                    raise

    async def _once(self, request: Request, key: str, body: str) -> Completion | Retry:
        """One try, with what it cost and what became of it in the budget and the ledger."""
        most = most_tokens(request)
        worst, began = cost(most, self.price), time.monotonic()
        real, outcome = worst, "stopped"  # what is cancelled may be charged
        try:
            reply = await self.endpoint.complete(request, self.timeout)
            real, outcome = cost((reply.prompt_tokens, reply.completion_tokens), self.price), "reply"
            self.ledger.record(key, request.unit, body, reply, time.monotonic() - began)
            return reply
        except Retry as again:
            real, outcome = worst if again.billed else Cost(1), again.kind
            return again
        except SaekitError:
            real, outcome = (real, outcome) if outcome == "reply" else (Cost(1), "fatal")
            raise
        finally:
            self.budget.settle(worst, real)
            self.settled.set()
            if outcome != "reply":
                self.ledger.attempt(key, request.unit, outcome, time.monotonic() - began)


def _note(answers: Sequence[Answer | None]) -> str:
    """``2 refused, 1 error``: what isn't ok."""
    found = tally(answer for answer in answers if answer is not None)
    return ", ".join(f"{n} {status}" for status, n in found.items() if n and status != "ok")


def _nothing(done: int, total: int, note: str) -> None:
    """Draws nothing."""


@contextmanager
def _drawn(progress: bool | Draw) -> Iterator[Draw]:
    if callable(progress):
        yield progress
    elif not progress or not sys.stderr.isatty():
        yield _nothing
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("ask"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("ask", note="")
            yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)
