"""Asking through failures: a bad network, a bad model, a killed process, a spent budget."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from judge_server import REPLIES, TRANSIENT, key_of, serving
from judging import CONCEPTS, question, truth, verdicts

from saekit.autointerp.ask import ask
from saekit.autointerp.budget import Budget, cost
from saekit.autointerp.endpoint import most_tokens
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.requests import Answer, Request, canonical, tally
from saekit.errors import SaekitError


def key(request: Request) -> str:
    """What the judge counts a request under."""
    return key_of([{"role": m.role, "content": m.content} for m in request.messages])


def written(answers: Sequence[Answer]) -> bytes:
    """Answers as bytes."""
    rows = [{**asdict(a), "value": a.value and a.value.model_dump()} for a in answers]
    return canonical(rows).encode()


def test_faults_that_pass_change_no_answer(tmp_path: Path) -> None:
    requests = [question(i) for i in range(160)]
    with serving(*CONCEPTS) as judge, Ledger(tmp_path / "calm.sqlite") as ledger:
        calm = ask(requests, judge.endpoint, ledger, progress=False)
    with (
        serving(*CONCEPTS, "--faults", "0.3", "--slow", "6") as judge,
        Ledger(tmp_path / "l.sqlite") as ledger,
    ):
        stormy = ask(requests, judge.endpoint, ledger, concurrency=64, timeout=2, progress=False)
        counts, outcomes = judge.counts()["total"], ledger.outcomes()
    assert set(counts) == {"served", *TRANSIENT, *REPLIES}  # every fault was met
    assert [a.value for a in stormy] == [a.value for a in calm] and tally(stormy)["ok"] == 160
    assert sum(a.reasked for a in stormy) == sum(
        counts[kind] for kind in ("short", "prose", "nan", "refusal")
    )
    assert sum(a.repaired for a in stormy) == counts["fenced"]
    # what the ledger says became of the tries is what the server did to them
    told = {
        "timeout": ["slow"],
        "connection": ["reset", "truncated"],
        "empty": ["empty"],
        **{s: [s] for s in ("429", "500", "503")},
    }
    assert outcomes.pop("reply") == counts["served"] + sum(counts[kind] for kind in REPLIES)
    assert outcomes == {name: sum(counts[kind] for kind in kinds) for name, kinds in told.items()}


EXPECTED = {
    **dict.fromkeys(TRANSIENT, "error"), **dict.fromkeys(("short", "prose", "nan"), "invalid_reply"),
    "refusal": "refused", "fenced": "ok", "served": "ok",
}  # fmt: skip


def test_faults_that_stay_are_counted_by_kind_and_never_scored(tmp_path: Path) -> None:
    requests = [question(i) for i in range(100)]
    with serving(*CONCEPTS, "--faults", "0.6", "--slow", "6", "--persistent") as judge:
        with Ledger(tmp_path / "l.sqlite") as ledger:
            answers = ask(
                requests, judge.endpoint, ledger, concurrency=64, timeout=2, retries=1, progress=False
            )
            counts = judge.counts()
            kinds = {r.unit: counts["keys"][key(r)] for r in requests}
            again = ask(requests[:0] + [r for r, a in zip(requests, answers, strict=True) if a.status != "error"], judge.endpoint, ledger, progress=False)  # fmt: skip
            assert judge.counts()["total"] == counts["total"]  # what has a reply is not asked again
    assert set(counts["total"]) == {"served", *TRANSIENT, *REPLIES}
    expected = dict.fromkeys(tally([]), 0)
    for answer in answers:
        (kind, n), *others = kinds[answer.unit].items()
        assert not others
        first = EXPECTED[kind]
        assert n == (2 if first == "error" else 1)  # retries, and no more
        if first in ("invalid_reply", "refused"):  # the re-ask had a fault of its own
            assert (answer.reasked and answer.value is None) or answer.status == "ok"
            expected[answer.status] += 1
        else:
            assert answer.status == first
            expected[first] += 1
        assert (answer.value is None) == (answer.status != "ok") == bool(answer.reason)
        if answer.status == "ok":
            assert verdicts(answer) == truth(int(answer.unit.split()[1]))
    assert tally(answers) == expected and sum(expected.values()) == 100
    assert written(again) == written([a for a in answers if a.status != "error"])


# the tests beside this one take the processor now and then; by itself every wait is kept
@pytest.mark.parametrize("rank", [20, pytest.param(39, marks=pytest.mark.slow)])
def test_a_server_that_says_when_is_asked_then(rank: int, tmp_path: Path) -> None:
    requests = [question(i) for i in range(40)]
    with (
        serving(*CONCEPTS, "--faults", "1", "--kinds", "429") as judge,
        Ledger(tmp_path / "l.sqlite") as ledger,
    ):
        assert tally(ask(requests, judge.endpoint, ledger, concurrency=2, progress=False))["ok"] == 40
        waits = judge.counts()["waits"]
    late = sorted(waited - asked for waited, asked in waits)
    assert len(late) == 40 and late[0] >= -0.001  # the header has milliseconds
    assert late[rank] <= 0.05


@pytest.mark.parametrize("kinds", ["408,409,425,429", "500,502,503,504,529"])
def test_statuses_that_pass_are_tried_again(kinds: str, tmp_path: Path) -> None:
    with (
        serving(*CONCEPTS, "--faults", "1", "--kinds", kinds) as judge,
        Ledger(tmp_path / "l.sqlite") as ledger,
    ):
        answers = ask(
            [question(i) for i in range(40)], judge.endpoint, ledger, concurrency=40, progress=False
        )
        outcomes = ledger.outcomes()
    assert tally(answers)["ok"] == outcomes.pop("reply") == sum(outcomes.values()) == 40
    assert set(outcomes) == set(kinds.split(","))


@pytest.mark.parametrize(
    ("kind", "said"),
    [("400", "answered 400"), ("403", "use a key"), ("404", "check model"), ("413", "answered 413"), ("422", "answered 422"), ("quota", "until the quota is renewed")],
)  # fmt: skip
def test_statuses_that_stay_stop_the_run_and_keep_what_came(kind: str, said: str, tmp_path: Path) -> None:
    requests = [question(i) for i in range(100)]
    with (
        serving(*CONCEPTS, "--faults", "0.1", "--kinds", kind) as judge,
        Ledger(tmp_path / "l.sqlite") as ledger,
    ):
        with pytest.raises(SaekitError, match=said):
            ask(requests, judge.endpoint, ledger, concurrency=4, progress=False)
        kept = ledger.outcomes()
        assert kept["fatal"] >= 1 and sum(kept.values()) < 100 and kept.get("stopped", 0) <= 3
        assert sum(judge.counts()["total"].values()) <= sum(kept.values())


def test_waits_without_a_word_of_the_server_grow_and_are_drawn_from_the_seed(tmp_path: Path) -> None:
    with serving(*CONCEPTS, "--faults", "1", "--kinds", "500", "--persistent") as judge:
        seconds: dict[tuple[int, int], list[float]] = {}
        for run, seed in enumerate([0, 0, 1]):
            path = tmp_path / f"{run}.sqlite"
            with Ledger(path) as ledger:
                ask(
                    [question(i) for i in range(8)],
                    judge.endpoint,
                    ledger,
                    retries=2,
                    seed=seed,
                    progress=False,
                )
            with closing(sqlite3.connect(path)) as plain:
                rows = plain.execute("SELECT unit, at - seconds, at FROM attempts ORDER BY id").fetchall()
            for i in range(8):
                tries = [row[1:] for row in rows if row[0] == f"question {i}"]
                seconds[run, i] = [later[0] - earlier[1] for earlier, later in pairwise(tries)]
    for waits in seconds.values():
        assert len(waits) == 2 and all(
            -0.01 <= wait <= limit + 0.2 for wait, limit in zip(waits, (0.5, 1.0), strict=True)
        )
    apart = {
        run: sum(abs(a - b) for i in range(8) for a, b in zip(seconds[0, i], seconds[run, i], strict=True))
        / 16
        for run in (1, 2)
    }
    assert apart[1] < 0.05 < 0.1 < apart[2]
    assert max(waits[0] for waits in seconds.values()) - min(waits[0] for waits in seconds.values()) > 0.2


CHILD = """
import os, sys
sys.path.append(sys.argv[1])
import openai, json_repair
from judging import question
from saekit.autointerp.ask import ask
from saekit.autointerp.endpoint import OpenAIEndpoint
from saekit.autointerp.ledger import Ledger
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        with Ledger(sys.argv[2]) as ledger:
            ask([question(i) for i in range(int(sys.argv[4]))], OpenAIEndpoint("judge", base_url=sys.argv[3]), ledger, concurrency=8, progress=False)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def committed(path: Path) -> set[str]:
    """Prompts with a reply in the ledger, read beside it."""
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        bodies = [json.loads(body) for (body,) in plain.execute("SELECT request FROM replies")]
    return {key_of([{"role": role, "content": text} for role, text in body["messages"]]) for body in bodies}


def test_killed_at_20_moments_it_ends_where_it_would_have(tmp_path: Path) -> None:
    n, kills, generator = 420, 20, random.Random(5)
    faults = (
        "--faults",
        "0.2",
        "--kinds",
        ",".join(REPLIES),
        "--persistent",
    )  # the same however often it is asked
    with serving(*CONCEPTS, *faults, "--latency", "0.04") as judge:
        with Ledger(tmp_path / "whole.sqlite") as ledger:
            whole = ask(
                [question(i) for i in range(n)], judge.endpoint, ledger, concurrency=64, progress=False
            )
        path = tmp_path / "killed.sqlite"
        before = judge.counts()["keys"]
        command = [
            sys.executable,
            "-P",
            "-c",
            CHILD,
            str(Path(__file__).parent),
            str(path),
            judge.base_url,
            str(n),
        ]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None and child.stdout is not None

        kept: list[tuple[set[str], dict[str, Any]]] = []
        for _ in range(kills):
            print("go", file=child.stdin, flush=True)
            pid = int(child.stdout.readline())
            begun, wanted = judge.served(), generator.randint(1, 25)
            # three of four are killed behind a commit, however slow the machine commits; the others at any moment
            least = len(kept[-1][0]) if kept and kept[-1][0] and generator.random() < 0.75 else -1
            while judge.served() - begun < wanted or (least >= 0 and len(committed(path)) <= least):
                time.sleep(generator.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
            assert int(child.stdout.readline()) == -signal.SIGKILL
            time.sleep(0.06)  # the server counts what was on its way
            kept.append((committed(path) if path.exists() else set(), judge.counts()["keys"]))
        child.communicate()
        sizes = [len(keys) for keys, _ in kept]
        assert sizes == sorted(sizes) and len(set(sizes)) > kills / 2 and 0 < sizes[-1] < n  # killed at work
        with Ledger(path) as ledger:
            resumed = ask(
                [question(i) for i in range(n)], judge.endpoint, ledger, concurrency=64, progress=False
            )
        after = judge.counts()["keys"]
    assert written(resumed) == written(whole)
    repeated = 0
    for keys, counts in kept:
        assert all(after[k] == counts[k] for k in keys)  # what was committed is never asked again
    for k, served in after.items():
        repeated += sum(served.values()) - 2 * sum(before[k].values())
    assert 0 <= repeated <= 8 * kills
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        keys = [k for (k,) in plain.execute("SELECT key FROM replies")]
        assert len(keys) == len(set(keys))


LIMITS = {"requests": 70, "tokens": 30_000, "money": 0.045}


@pytest.mark.parametrize("limit", LIMITS)
def test_no_budget_is_passed_with_64_in_flight(limit: str, tmp_path: Path) -> None:
    requests = [question(i) for i in range(150)]
    faults = ("--faults", "0.3", "--kinds", "429,500,reset,truncated,empty,short,refusal")
    budget = Budget(**{limit: LIMITS[limit]})
    with serving(*CONCEPTS, "--latency", "0.03", *faults) as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        answers = ask(requests, judge.endpoint, ledger, budget=budget, concurrency=64, progress=False)
        counts = judge.counts()
        sent = sum(counts["total"].values())
        # the server's own count; its tokens cost at most the price of a completion's
        real = {"requests": sent, "tokens": counts["tokens"], "money": counts["tokens"] * 1.0 / 1e6}
        spent = budget.spent._asdict()
        assert real[limit] <= spent[limit] <= LIMITS[limit] and budget.in_flight == 0
        assert sent == spent["requests"] and counts["flying"] > 16
        # nothing more would have fitted
        assert spent[limit] + getattr(cost(most_tokens(requests[-1]), (1.0, 4.0)), limit) > LIMITS[limit]
        found = tally(answers)
        assert found["ok"] > 10 and found["not_run"] > 10 and found["error"] == found["invalid_reply"] == 0
        assert all(
            f"{limit} = {LIMITS[limit]}" in a.reason for a in answers if a.status in ("budget", "not_run")
        )
        assert all(a.value is None for a in answers if a.status != "ok")
        begun = [i for i, a in enumerate(answers) if a.status != "not_run"]
        assert begun == list(range(len(begun)))  # in the requests' order
        assert all(verdicts(a) == truth(i) for i, a in enumerate(answers) if a.status == "ok")
        rest = ask(requests, judge.endpoint, ledger, concurrency=64, progress=False)
    assert [verdicts(a) for a in rest] == [truth(i) for i in range(150)]


def test_time_runs_out_for_what_is_in_flight_too(tmp_path: Path) -> None:
    requests, budget = [question(i) for i in range(600)], Budget(seconds=1.5)
    with serving(*CONCEPTS, "--latency", "0.2") as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        began, ended = time.monotonic(), time.time() + 1.5
        answers = ask(requests, judge.endpoint, ledger, budget=budget, progress=False)
        took = time.monotonic() - began
        with closing(sqlite3.connect(ledger.path)) as plain:
            begins = [begin for (begin,) in plain.execute("SELECT at - seconds FROM attempts")]
        late = ask(requests, judge.endpoint, ledger, budget=budget, progress=False)
    found = tally(answers)
    assert max(begins) <= ended + 0.05
    assert took < 1.5 + 2  # cancelling takes its time beside other tests
    assert found["ok"] > 0 and 0 < found["budget"] <= 16 and found["not_run"] > 16
    assert found["ok"] + found["budget"] + found["not_run"] == 600
    assert {a.reason for a in answers if a.status != "ok"} == {"seconds = 1.5 are over"}
    assert tally(late) == {**found, "budget": 0, "not_run": found["not_run"] + found["budget"]}  # it is spent


def test_a_budget_too_small_for_one_request_asks_nothing(tmp_path: Path) -> None:
    with serving(*CONCEPTS) as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        for budget in (Budget(requests=0), Budget(tokens=300), Budget(money=0.0001), Budget(seconds=0)):
            answers = ask(
                [question(i) for i in range(5)], judge.endpoint, ledger, budget=budget, progress=False
            )
            assert tally(answers)["not_run"] == 5
        assert judge.counts()["total"] == {} and ledger.outcomes() == {}


def test_calls_of_ask_share_a_budget(tmp_path: Path) -> None:
    budget = Budget(requests=30)
    with serving(*CONCEPTS) as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        first = ask([question(i) for i in range(20)], judge.endpoint, ledger, budget=budget, progress=False)
        second = ask(
            [question(i) for i in range(10, 45)], judge.endpoint, ledger, budget=budget, progress=False
        )
        assert sum(judge.counts()["total"].values()) == 30
    assert tally(first)["ok"] == 20 and (tally(second)["ok"], tally(second)["not_run"]) == (20, 15)


SPEED = """
import json, sys, time
sys.path.append(sys.argv[1])
import psutil
from judging import question
from saekit.autointerp.ask import ask
from saekit.autointerp.endpoint import OpenAIEndpoint
from saekit.autointerp.ledger import Ledger
endpoint, me, out = OpenAIEndpoint("judge", base_url=sys.argv[3]), psutil.Process(), {}
def run(start, n):
    began, spent = time.monotonic(), time.process_time()
    answers = ask([question(i, 8) for i in range(start, start + n)], endpoint, ledger, concurrency=64, progress=False)
    assert all(a.status == "ok" for a in answers)
    return n / (time.monotonic() - began), (time.process_time() - spent) / n
with Ledger(sys.argv[2]) as ledger:
    run(0, 500)
    out["rate"], out["cpu"] = run(500, 3000)
    out["rss"] = [me.memory_info().rss]
    for i in range(20):
        run(3500 + 1000 * i, 1000)
        out["rss"].append(me.memory_info().rss)
print(json.dumps(out))
"""


@pytest.mark.slow
def test_it_is_fast_and_does_not_grow(tmp_path: Path) -> None:
    with serving(*CONCEPTS, "--latency", "0.2") as judge:
        command = [
            sys.executable,
            "-P",
            "-c",
            SPEED,
            str(Path(__file__).parent),
            str(tmp_path / "l.sqlite"),
            judge.base_url,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    print(out)
    assert out["rate"] >= 200 and out["cpu"] < 3e-3
    assert max(out["rss"]) - out["rss"][0] <= 20e6
