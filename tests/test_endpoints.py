"""Endpoints: a server that refuses, knows less or is not there, and a model on this machine."""

import asyncio
import json
import sys
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from judge_server import serving
from judging import CONCEPTS, question, truth, verdicts, words

from saekit.autointerp.ask import ask
from saekit.autointerp.endpoint import LocalEndpoint, OpenAIEndpoint, _completion, most_tokens, retry_after
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.requests import Message, Request
from saekit.errors import SaekitError
from saekit.models import Model


@pytest.mark.parametrize(
    ("place", "status", "fix"),
    [("", "401", "set the right key in SAEKIT_TEST_KEY"), ("/nowhere", "404", "check model and base_url")],
)
def test_a_refused_key_or_address_stops_the_run_at_once(
    place: str, status: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-very-secret-7731"  # which this server quotes in its refusal
    monkeypatch.setenv("SAEKIT_TEST_KEY", secret)
    with serving("--key", "another") as judge, Ledger(tmp_path / "l.sqlite") as ledger:
        endpoint = OpenAIEndpoint("judge", base_url=judge.base_url + place, api_key_env="SAEKIT_TEST_KEY")
        with pytest.raises(SaekitError) as caught:
            ask([words(i) for i in range(100)], endpoint, ledger, concurrency=4, progress=False)
        outcomes, served = ledger.outcomes(), judge.counts()["total"]
    said = str(caught.value)
    assert f"answered {status} (" in said and fix in said and "\n" not in said
    assert outcomes["fatal"] >= 1 and sum(outcomes.values()) <= 4 and sum(served.values()) <= 4
    assert secret not in said + repr(endpoint) + repr(vars(endpoint))
    assert secret.encode() not in (tmp_path / "l.sqlite").read_bytes()


def test_a_server_that_knows_less_is_asked_for_less_from_then_on(tmp_path: Path) -> None:
    requests = [question(i) for i in range(40)]
    for unknown, others in (("response_format", 1), ("max_tokens", 1), ("response_format,max_tokens", 2)):
        with (
            serving(*CONCEPTS, "--unknown", unknown) as judge,
            Ledger(tmp_path / f"{unknown}.sqlite") as ledger,
        ):
            answers = ask(requests[:20], judge.endpoint, ledger, concurrency=1, retries=0, progress=False)
            answers += ask(requests[20:], judge.endpoint, ledger, concurrency=8, retries=0, progress=False)
            assert judge.counts()["total"] == {"served": 40, "400": others}
        assert [verdicts(a) for a in answers] == [truth(i) for i in range(40)]
    with serving(*CONCEPTS, "--unknown", "temperature") as judge, Ledger(tmp_path / "t.sqlite") as ledger:
        with pytest.raises(SaekitError, match=r"400 .*temperature is not known"):
            ask(requests, judge.endpoint, ledger, progress=False)


def test_a_missing_key_or_server_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAEKIT_TEST_KEY", raising=False)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(SaekitError, match="'SAEKIT_TEST_KEY' is not set in the environment"):
            ask([words(1)], OpenAIEndpoint("m", api_key_env="SAEKIT_TEST_KEY"), ledger, progress=False)
        nobody = OpenAIEndpoint("m", base_url="http://127.0.0.1:9/v1", api_key_env="SAEKIT_TEST_KEY")
        (answer,) = ask([words(1)], nobody, ledger, retries=1, progress=False)
        assert (answer.status, answer.reason) == ("error", "the last of 2 tries ended in: connection")
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(SaekitError, match=r"pip install 'saekit\[llm\]'"):
            ask([words(1)], OpenAIEndpoint("m", base_url="http://127.0.0.1:9/v1"), ledger, progress=False)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0), ({"retry-after": "0.25"}, 0.25), ({"retry-after-ms": "120", "retry-after": "9"}, 0.12),
        ({"retry-after": "in an hour"}, 3600.0), ({"retry-after": formatdate(0, usegmt=True)}, 0.0),
        ({}, None), ({"retry-after": "soon"}, None), ({"retry-after": "-3"}, None), ({"retry-after": "NaN"}, None), ({"retry-after": "1e9"}, None),
    ],
)  # fmt: skip
def test_the_servers_wish_to_wait_is_read_in_each_form(
    headers: dict[str, str], seconds: float | None
) -> None:
    if headers.get("retry-after") == "in an hour":  # from when the test runs, not from when it is collected
        headers = {"retry-after": formatdate(time.time() + 3600, usegmt=True)}
    found = retry_after(headers)
    if seconds is None:
        assert found is None
    else:
        assert found == pytest.approx(seconds, abs=30 if seconds == 3600 else 0)


def test_a_reply_that_holds_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    choice = {"message": {"content": "a \ud83d b", "refusal": None}, "finish_reason": None}
    found = _completion({"choices": [choice], "usage": None}, words(1))
    assert (found.text, found.finish, found.refusal) == ("a ? b", "stop", False)
    assert (found.prompt_tokens, found.completion_tokens) == most_tokens(words(1))  # where nothing is counted
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.record("k", "u", "{}", found, 0.1)


def test_a_model_on_this_machine_answers_greedily_one_at_a_time(code_lm: Model, tmp_path: Path) -> None:
    endpoint = LocalEndpoint(code_lm)
    requests = [
        Request(f"code {i}", (Message("user", f"def f{i}(x):"),), None, max_tokens=6) for i in range(4)
    ]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        answers = ask(requests, endpoint, ledger, concurrency=4, progress=False)
        again = json.dumps([a.text for a in answers])
        assert json.dumps([a.text for a in ask(requests, endpoint, ledger, progress=False)]) == again
    with Ledger(tmp_path / "other.sqlite") as ledger:
        assert ask(requests, LocalEndpoint("code-lm"), ledger, concurrency=1, progress=False) == answers
    first = asyncio.run(endpoint.complete(requests[0], 1))
    ids = code_lm.tokenizer("user: def f0(x):\n\nassistant:", return_tensors="pt")["input_ids"]
    expected = code_lm.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
    assert first.text == code_lm.tokenizer.decode(expected, skip_special_tokens=True)
    assert (first.prompt_tokens, first.completion_tokens) == (ids.shape[1], len(expected))
    assert str(tmp_path) not in endpoint.name and endpoint.name == LocalEndpoint("code-lm").name


def test_a_model_on_this_machine_refuses_what_it_cannot_do(code_lm: Model, mlp: Any, tmp_path: Path) -> None:
    endpoint = LocalEndpoint(code_lm)
    long = Request("a long one", (Message("user", "x = 1\n" * 3000),), None, max_tokens=5)
    for request, said in (
        (replace(words(1), temperature=0.5), "must be 0"),
        (long, "'a long one' takes .* positions"),
    ):
        with Ledger(tmp_path / "l.sqlite") as ledger, pytest.raises(SaekitError, match=said):
            ask([request], endpoint, ledger, progress=False)
    with pytest.raises(SaekitError, match="has no tokenizer"):
        LocalEndpoint(mlp)
