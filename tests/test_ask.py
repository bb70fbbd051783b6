"""Asking: the same answers whatever is in flight, nothing asked twice, and errors that say what to do."""

import asyncio
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judge_server import Judged, key_of, serving
from judging import CONCEPTS, Scripted, Verdicts, question, truth, verdicts, words
from pydantic import BaseModel

from saekit.autointerp.ask import ask
from saekit.autointerp.budget import Budget, estimate
from saekit.autointerp.endpoint import (
    Endpoint,
    OpenAIEndpoint,
    Retry,
    most_tokens,
)
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.requests import STATUSES, Answer, Completion, Message, Request, tally
from saekit.errors import SaekitError


@pytest.fixture(scope="module")
def judge() -> Iterator[Judged]:
    with serving(*CONCEPTS) as running:
        yield running


def test_answers_come_in_the_requests_order_with_what_they_took(judge: Judged, tmp_path: Path) -> None:
    requests = [question(i) for i in range(40)]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        answers = ask(requests, judge.endpoint, ledger, progress=False)
        assert ledger.outcomes() == {"reply": 40}
    assert [a.unit for a in answers] == [r.unit for r in requests]
    assert [verdicts(a) for a in answers] == [truth(i) for i in range(40)]
    for request, answer in zip(requests, answers, strict=True):
        prompt, completion = most_tokens(request)
        assert 0 < answer.prompt_tokens <= prompt and 0 < answer.completion_tokens <= completion
        assert (answer.status, answer.repaired, answer.reasked, answer.reason) == ("ok", False, False, "")
    assert tally(answers) == {**dict.fromkeys(STATUSES, 0), "ok": 40}


def test_the_number_in_flight_and_the_order_of_replies_change_nothing(tmp_path: Path) -> None:
    requests, found = [question(i) for i in range(60)], []
    for n, (concurrency, shuffle) in enumerate([(1, 0), (8, 0), (64, 0), (64, 1), (8, 2)]):
        latency = ("--latency", "0.05", "--shuffle", str(shuffle)) if shuffle else ()
        # a fault comes with its prompt, so every run meets the same
        with serving(
            *CONCEPTS, *latency, "--faults", "0.3", "--kinds", "short,prose,nan,refusal,fenced"
        ) as judge:
            with Ledger(tmp_path / f"{n}.sqlite") as ledger:
                found.append(ask(requests, judge.endpoint, ledger, concurrency=concurrency, progress=False))
            assert judge.counts()["flying"] <= concurrency
    assert all(one == found[0] for one in found[1:])
    assert sum(a.reasked for a in found[0]) > 5 and tally(found[0])["ok"] == 60


def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    endpoint = Scripted()
    requests = [replace(words(i % 5), unit=f"unit {i}") for i in range(50)]
    for concurrency in (1, 16):
        with Ledger(tmp_path / f"{concurrency}.sqlite", "live") as ledger:
            answers = ask(requests, endpoint, ledger, concurrency=concurrency, progress=False)
            assert ledger.outcomes() == {"reply": 5}
        assert [a.unit for a in answers] == [f"unit {i}" for i in range(50)]
    assert len(endpoint.asked) == 10 and endpoint.closed == 2


def test_equal_requests_that_fail_are_tried_once_too(tmp_path: Path) -> None:
    def down(request: Request, n: int) -> Completion:
        raise Retry("503", after=0.0)

    for concurrency in (1, 8):
        endpoint = Scripted(script=down)
        with Ledger(tmp_path / f"{concurrency}.sqlite") as ledger:
            answers = ask(
                [words(1)] * 6, endpoint, ledger, retries=2, concurrency=concurrency, progress=False
            )
        assert len(endpoint.asked) == 3 and tally(answers)["error"] == 6
        assert answers[0].reason == "the last of 3 tries ended in: 503"


def test_the_modes_ask_always_what_is_missing_and_never(tmp_path: Path) -> None:
    requests, endpoint = (
        [words(i) for i in range(6)],
        Scripted(script=lambda r, n: Completion(f"reply {n}", 5, 1)),
    )

    def texts(mode: str, some: list[Request]) -> list[str]:
        with Ledger(tmp_path / "l.sqlite", mode) as ledger:
            return [a.text for a in ask(some, endpoint, ledger, concurrency=1, progress=False)]

    assert texts("cache", requests[:4]) == [f"reply {n}" for n in (1, 2, 3, 4)]
    assert texts("cache", requests) == [f"reply {n}" for n in range(1, 7)] and len(endpoint.asked) == 6
    assert texts("live", requests) == [f"reply {n}" for n in range(7, 13)] and len(endpoint.asked) == 12
    assert texts("replay", requests) == texts("cache", requests) == [f"reply {n}" for n in range(7, 13)]
    with pytest.raises(SaekitError, match=r"no reply of 'scripted' to 'words 9'.*mode='cache'"):
        texts("replay", [*requests, words(9)])
    assert len(endpoint.asked) == 12


@pytest.mark.parametrize(
    ("replies", "status", "reasked", "reason"),
    [
        (["fine"], "ok", False, ""),
        (["", "fine"], "ok", True, ""),
        (["", ""], "invalid_reply", True, "it is empty"),
        (["I'm sorry, but I can't help with that.", "fine"], "ok", True, ""),
        (["I'm sorry, but I can't help with that."] * 2, "refused", True, "it is a refusal"),
        (["", "I cannot assist with this."], "refused", True, "it is a refusal"),
        (["I cannot assist with this.", ""], "invalid_reply", True, "it is empty"),
    ],
)
def test_a_reply_that_cannot_be_used_is_asked_again_once_with_its_reason(
    replies: list[str], status: str, reasked: bool, reason: str, tmp_path: Path
) -> None:
    endpoint = Scripted(script=lambda r, n: Completion(replies[n - 1], 5, 1))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        (answer,) = ask([words(1)], endpoint, ledger, progress=False)
        assert ask([words(1)], endpoint, ledger, progress=False) == [answer]
    assert (answer.status, answer.reasked, answer.reason) == (status, reasked, reason)
    assert (answer.prompt_tokens, answer.completion_tokens) == (5 * len(replies), len(replies))
    assert len(endpoint.asked) == len(replies)
    if reasked:
        first, second = endpoint.asked
        assert second.messages[:1] == first.messages and second.unit == first.unit
        told = "it is a refusal" if replies[0] else "it is empty"
        assert second.messages[-1].role == "user" and told in second.messages[-1].content
        assert [m.content for m in second.messages[1:-1]] == ([replies[0]] if replies[0] else [])


def test_a_key_depends_on_all_that_decides_the_reply_and_on_nothing_else() -> None:
    class Other(BaseModel):
        answers: list[bool]

    base = question(0)
    turned = replace(base, messages=base.messages[::-1])
    different = [
        replace(base, messages=(*base.messages, Message("user", "?"))), turned, replace(base, schema=None),
        replace(base, schema=Other), replace(base, max_tokens=201), replace(base, temperature=0.5),
        replace(base, seed=0), replace(base, sample=1),
    ]  # fmt: skip
    assert len({r.key("m") for r in [base, *different]} | {base.key("n")}) == len(different) + 2
    assert base.key("m") == replace(base, unit="x", check=None).key("m") == question(0).key("m")
    assert replace(base, temperature=0).key("m") == base.key("m")
    code = "from judging import question; print(question(0).key('m'))"
    other = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.append({str(Path(__file__).parent)!r}); {code}"], capture_output=True, text=True, check=True)  # fmt: skip
    assert other.stdout.strip() == base.key("m")


REPLAY = """
import json, sys
sys.path.append(sys.argv[1])
for name in ("openai", "tenacity"):
    sys.modules[name] = None
def audit(event, args):
    if event.startswith("socket."):
        raise RuntimeError(f"{event} {args}")
import saekit.autointerp.ask, saekit.autointerp.endpoint, saekit.autointerp.budget
loaded = {"pydantic", "json_repair", "torch", "httpx", "httpx2", "transformers"} & set(sys.modules)
assert not loaded, loaded
from judging import question
from saekit.autointerp.ask import ask
from saekit.autointerp.endpoint import OpenAIEndpoint
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.requests import canonical
from dataclasses import asdict
sys.addaudithook(audit)
with Ledger(sys.argv[2], "replay") as ledger:
    answers = ask([question(i) for i in range(30)], OpenAIEndpoint("judge"), ledger)
print(canonical([{**asdict(a), "value": a.value.model_dump()} for a in answers]))
"""


def test_a_replay_needs_no_server_no_socket_no_key_and_no_openai(tmp_path: Path) -> None:
    from dataclasses import asdict

    from saekit.autointerp.requests import canonical

    requests = [question(i) for i in range(30)]
    with serving(*CONCEPTS, "--faults", "0.5") as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        answers = ask(requests, judge.endpoint, ledger, timeout=0.5, progress=False)
    command = [sys.executable, "-P", "-c", REPLAY, str(Path(__file__).parent), str(tmp_path / "l.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == canonical([{**asdict(a), "value": a.value.model_dump()} for a in answers])
    assert any(a.reasked for a in answers) and tally(answers)["ok"] == 30


def test_one_altered_byte_of_a_prompt_is_a_miss_that_names_the_unit(judge: Judged, tmp_path: Path) -> None:
    requests = [question(i) for i in range(5)]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ask(requests, judge.endpoint, ledger, progress=False)
    messages = requests[3].messages
    text = messages[1].content
    requests[3] = replace(requests[3], messages=(messages[0], Message("user", text[:50] + "X" + text[51:])))
    with Ledger(tmp_path / "l.sqlite", "replay") as ledger:
        with pytest.raises(SaekitError, match="no reply of 'judge' to 'question 3'"):
            ask(requests, judge.endpoint, ledger)


def test_it_works_inside_a_running_event_loop_and_beside_itself(judge: Judged, tmp_path: Path) -> None:
    async def cell() -> list[Answer]:
        with Ledger(tmp_path / "l.sqlite") as ledger:
            return ask([question(i) for i in range(5)], judge.endpoint, ledger, progress=False)

    assert tally(asyncio.run(cell()))["ok"] == 5
    found: dict[int, list[Answer]] = {}
    with Ledger(tmp_path / "both.sqlite") as ledger:

        def one(start: int) -> None:
            requests = [question(i) for i in range(start, start + 30)]
            found[start] = ask(requests, judge.endpoint, ledger, progress=False)

        threads = [threading.Thread(target=one, args=(start,)) for start in (0, 20, 40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all([verdicts(a) for a in found[s]] == [truth(i) for i in range(s, s + 30)] for s in (0, 20, 40))


def test_progress_is_told_from_the_calling_thread(judge: Judged, tmp_path: Path) -> None:
    told: list[tuple[int, int, str, bool]] = []

    def draw(done: int, total: int, note: str) -> None:
        told.append((done, total, note, threading.current_thread() is threading.main_thread()))

    with Ledger(tmp_path / "l.sqlite") as ledger:
        ask([question(i) for i in range(5)], judge.endpoint, ledger, progress=False)
        ask([question(i) for i in range(20)], judge.endpoint, ledger, progress=draw)
    assert told[-1] == (15, 15, "", True) and all(row[3] for row in told)
    assert [row[0] for row in told] == sorted(row[0] for row in told)


def test_ctrl_c_ends_at_once_and_keeps_what_came(tmp_path: Path) -> None:
    requests = [question(i) for i in range(200)]
    pressed = 0.0

    def draw(done: int, total: int, note: str) -> None:
        nonlocal pressed
        if done >= 20 and not pressed:
            pressed = time.monotonic()
            signal.raise_signal(signal.SIGINT)

    with serving(*CONCEPTS, "--latency", "0.1") as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in the background ignores it
        try:
            with pytest.raises(KeyboardInterrupt):
                ask(requests, judge.endpoint, ledger, concurrency=8, progress=draw)
        finally:
            signal.signal(signal.SIGINT, before)
        assert time.monotonic() - pressed < 1
        kept = ledger.outcomes()
        assert 20 <= kept["reply"] < 200 and kept["stopped"] <= 8
        answers = ask(requests, judge.endpoint, ledger, concurrency=64, progress=False)
        assert ledger.outcomes()["reply"] == 200
    assert [verdicts(a) for a in answers] == [truth(i) for i in range(200)]


def test_a_rate_holds_in_every_window(tmp_path: Path) -> None:
    starts: list[float] = []

    def note(request: Request, n: int) -> Completion:
        starts.append(time.monotonic())
        return Completion("fine", 1, 1)

    with Ledger(tmp_path / "l.sqlite") as ledger:
        ask(
            [words(i) for i in range(30)],
            Scripted(script=note),
            ledger,
            rate=50,
            concurrency=16,
            progress=False,
        )
    for i in range(30):
        for j in range(i + 1, 30):
            assert starts[j] - starts[i] >= (j - i) / 50 - 0.02  # the clock of asyncio rounds
    assert starts[-1] - starts[0] < 29 / 50 + 0.4


def test_a_server_that_asks_to_wait_for_hours_is_down(tmp_path: Path) -> None:
    def busy(request: Request, n: int) -> Completion:
        raise Retry("429", after=7200.0)

    with Ledger(tmp_path / "l.sqlite") as ledger:
        (answer,) = ask([words(1)], Scripted(script=busy), ledger, progress=False)
    assert (answer.status, answer.reason) == ("error", "429, and the server asks to wait 7200 s")


def test_a_fault_of_an_endpoint_of_ones_own_is_not_swallowed(tmp_path: Path) -> None:
    def broken(request: Request, n: int) -> Completion:
        if n == 4:
            raise ZeroDivisionError("a bug")
        return Completion("fine", 1, 1)

    endpoint = Scripted(script=broken)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(ZeroDivisionError):
            ask([words(i) for i in range(50)], endpoint, ledger, concurrency=2, progress=False)
        assert ledger.outcomes()["reply"] in (2, 3) and endpoint.closed == 1
    assert isinstance(endpoint, Endpoint)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "concurrency": ({"concurrency": 0}, "concurrency = 0 must be at least 1"),
    "retries": ({"retries": -1}, "retries = -1 must be at least 0"),
    "timeout": ({"timeout": 0}, "timeout = 0 must be a number above 0"),
    "timeout NaN": ({"timeout": math.nan}, "timeout = nan must be"),
    "rate": ({"rate": -1.0}, "rate = -1.0 must be a number above 0"),
    "money without a price": ({"budget": Budget(money=1.0)}, "endpoint 'scripted' has no price"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_told_before_anything_is_asked(case: str, tmp_path: Path) -> None:
    options, said = BAD[case]
    endpoint = Scripted(price=None)
    with Ledger(tmp_path / "l.sqlite") as ledger, pytest.raises(SaekitError, match=said):
        ask([words(1)], endpoint, ledger, **options)
    assert endpoint.asked == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": ()}, "messages of 'words 1' are empty"), ({"max_tokens": 0}, "max_tokens = 0 of 'words 1'"),
        ({"temperature": -0.1}, "temperature = -0.1"), ({"temperature": math.inf}, "temperature = inf"),
        ({"schema": dict}, "schema 'dict' of 'words 1' is not a pydantic model"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_when_it_is_made(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SaekitError, match=said):
        replace(words(1), **change)


def test_bad_messages_and_limits_are_told() -> None:
    for make, said in (
        (lambda: Message("robot", "x"), "role 'robot'"), (lambda: Message("user", "\ud83d"), "half a surrogate pair"),
        (lambda: Budget(tokens=-1), "tokens = -1"), (lambda: Budget(money=math.nan), "money = nan"),
        (lambda: OpenAIEndpoint("m", price=(1.0, -1.0)), r"price = \(1.0, -1.0\)"),
    ):  # fmt: skip
        with pytest.raises(SaekitError, match=said):
            make()


def test_no_requests_are_no_answers(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ask([], Scripted(), ledger) == []


def test_an_estimate_counts_each_call_once_and_holds_what_the_calls_take(
    judge: Judged, tmp_path: Path
) -> None:
    requests = [question(i, 6) for i in range(30)]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ask(requests[:10], judge.endpoint, ledger, progress=False)
        before = estimate(requests + requests, judge.endpoint, ledger)
        assert (before.calls, before.recorded) == (20, 10)
        answers = ask(requests, judge.endpoint, ledger, budget=(spent := Budget()), progress=False)
        used = sum(a.prompt_tokens + a.completion_tokens for a in answers[10:])
        assert before.tokens_low <= used == spent.spent.tokens <= before.tokens_high
        assert before.money_low is not None and before.money_high is not None
        assert before.money_low <= spent.spent.money <= before.money_high
        assert str(before).startswith("20 calls to make, 10 recorded; ") and "\n" not in str(before)
        after = estimate(requests, judge.endpoint, ledger)
        assert (after.calls, after.recorded, after.tokens_high, after.money_high) == (0, 30, 0, 0.0)


def test_the_judges_counts_name_the_prompts(judge: Judged, tmp_path: Path) -> None:
    request = question(12345)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ask([request], judge.endpoint, ledger, progress=False)
    messages = [{"role": m.role, "content": m.content} for m in request.messages]
    assert judge.counts()["keys"][key_of(messages)] == {"served": 1} and Verdicts is request.schema
