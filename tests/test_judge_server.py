"""The judge that other tests trust: each personality does what its name says, from the prompt's text alone."""

import json
import random
from typing import Any

import pytest
from judge_server import Judge, Prompt
from judging import PREDICATES, SYSTEM

GOLD, DIGITS = PREDICATES


def prompt(
    texts: list[str], explanation: str = GOLD, system: str = SYSTEM, more: str = "", **body: Any
) -> Prompt:
    shown = "\n\n".join(f"Example {i}: {text}" for i, text in enumerate(texts, 1))
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Explanation: {explanation}\n\n{shown}{more}"},
    ]
    return Prompt({"messages": messages, **body})


def fires(name: str, texts: list[str], explanation: str = GOLD, judge: Judge | None = None) -> list[bool]:
    reply = (judge or Judge(name, PREDICATES, 0)).reply(prompt(texts, explanation))
    assert isinstance(reply, dict) and [row["id"] for row in reply["answers"]] == list(
        range(1, len(texts) + 1)
    )
    assert all((row["p"] > 0.5) == row["fires"] for row in reply["answers"])
    return [row["fires"] for row in reply["answers"]]


def test_the_perfect_judge_reads_words_marks_and_the_explanation() -> None:
    texts = ["a gold ring", "a golden ring", "iron", "7 gold"]
    assert fires("perfect", texts) == [True, False, False, True]
    assert fires("perfect", texts, DIGITS) == [False, False, False, True]
    assert fires("perfect", texts, "something unheard of") == [False] * 4
    marked = [
        "a «gold» ring",
        "«a» gold ring",
        "«gold» and «iron»",
        "«gold» «gold»",
        "«gold gold» iron",
        "gold",
    ]
    assert fires("perfect", marked) == [True, False, False, True, True, True]


def test_the_constant_and_the_random_judges() -> None:
    generator = random.Random(0)
    texts = [f"{generator.random()} {'gold' if i % 2 else 'iron'}" for i in range(2000)]
    truth = [i % 2 == 1 for i in range(2000)]
    assert set(fires("yes", texts)) == {True} and set(fires("no", texts)) == {False}
    assert abs(sum(fires("coin", texts)) / 2000 - 0.5) < 0.05
    for noise in (0.1, 0.3):
        wrong = sum(a != b for a, b in zip(fires(f"noisy:{noise}", texts), truth, strict=True)) / 2000
        assert abs(wrong - noise) < 0.04
    assert (
        fires("coin", texts) == fires("coin", texts) != fires("", texts, judge=Judge("coin", PREDICATES, 1))
    )


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [("position", "«a» b c d", "a b c «d»"), ("count", "«a» «b» «c» d", "«a» b c d"), ("length", "«a» b c d e f g", "«a» b")],
)  # fmt: skip
def test_the_cheaters_look_at_marks_and_lengths_and_at_nothing_else(name: str, yes: str, no: str) -> None:
    assert fires(name, [yes, no] * 3) == fires(name, [yes, no] * 3, DIGITS) == [True, False] * 3


def test_the_memoriser_knows_what_was_explained() -> None:
    judge = Judge("memoriser", PREDICATES, 0)
    judge.reply(prompt(["a «gold» ring", "more gold"], "", "You explain what a feature does."))
    assert fires("", ["a gold ring", "gold", "«more» gold"], judge=judge) == [True, False, True]


def test_simulation_intruders_and_explanations() -> None:
    judge = Judge("perfect", PREDICATES, 0)
    tokens = "".join(f"{i}\t{token}\n" for i, token in enumerate(["a", " go", "ld", " golden", " gold"]))
    reply = judge.reply(
        prompt(["a gold golden gold"], system='{"activations": []}', more=f"\n\nTokens:\n{tokens}")
    )
    assert isinstance(reply, dict) and [row["value"] for row in reply["activations"]] == [0, 10, 10, 0, 10]
    odd = ["a «gold» x", "gold", "«a» gold", "x gold"]
    assert judge.reply(prompt(odd, system='{"intruder": 1}')) == {"intruder": 3}
    assert judge.reply(prompt(["7 x", "8", "x", "9 y"], "", '{"intruder": 1}')) == {"intruder": 3}
    asked = prompt(["x «7» y", "«8» gold", "gold"], "", "You explain what a feature does.")
    assert judge.reply(asked) == DIGITS
    schema = {"json_schema": {"schema": {"properties": {"explanation": {}}}}}
    asked = prompt(["x «7» y"], "", "You explain what a feature does.", response_format=schema)
    assert judge.reply(asked) == {"explanation": DIGITS}


def test_the_refuser_and_the_chatty_one() -> None:
    asked = prompt(["a gold ring", "iron"])
    assert "can't help" in Judge("refuser", PREDICATES, 0).words(asked)
    words = Judge("chatty", PREDICATES, 0).words(asked)
    found = json.loads(words.split("```json")[1].split("```")[0])
    assert [row["fires"] for row in found["answers"]] == [True, False] and not words.startswith("{")
