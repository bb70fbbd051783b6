"""From text to a value: every reply is accepted, repaired with a flag, or rejected with its reason, and never guessed."""

import json
import random
import sys
from typing import Annotated, Any

import pytest
from judging import Verdicts, numbered
from pydantic import BaseModel, Field, RootModel

from saekit.autointerp.reply import read
from saekit.autointerp.requests import Completion


class Bits(RootModel[list[Annotated[int, Field(ge=0, le=1)]]]):
    """delphi's form of an answer."""


class Truths(RootModel[list[bool]]):
    pass


class Intruder(BaseModel):
    intruder: int


class Loose(BaseModel):
    """Fields that may be missing, and more that may come: the schema that false accepts slip through most easily."""

    p: float = -1.0
    q: str = "none"


FIVE = lambda value: None if len(value.root) == 5 else "5 answers are asked for"  # noqa: E731
TWO = numbered(2)
GOOD = '{"answers": [{"id": 1, "fires": true, "p": 0.9}, {"id": 2, "fires": false, "p": 0.05}]}'
PAIR: dict[str, Any] = json.loads(GOOD)
NESTED = "[" * 100_000

# text, schema, check, status (repaired is ok, flagged), the value or words of the reason
REPLIES: dict[str, tuple[str, Any, Any, str, Any]] = {
    # as asked
    "plain": (GOOD, Verdicts, TWO, "ok", PAIR),
    "white space around": (f"\n  {GOOD}\n\n", Verdicts, TWO, "ok", PAIR),
    "over several lines": (json.dumps(PAIR, indent=2), Verdicts, TWO, "ok", PAIR),
    "an integer where a number is asked": ('{"answers": [{"id": 1, "fires": true, "p": 1}, {"id": 2, "fires": false, "p": 0}]}', Verdicts, TWO, "ok", {"answers": [{"id": 1, "fires": True, "p": 1.0}, {"id": 2, "fires": False, "p": 0.0}]}),
    "exponents": ('{"p": 5e-1}', Loose, None, "ok", {"p": 0.5, "q": "none"}),
    "escapes in a text": ('{"q": "a \\u00ab \\n \\"b\\""}', Loose, None, "ok", {"p": -1.0, "q": 'a « \n "b"'}),
    "one number": ('{"intruder": 3}', Intruder, None, "ok", {"intruder": 3}),
    # delphi's five (it fails the first two, takes the third as true, loses the fourth and scores the fifth)
    "delphi: brackets in the prose": ("Example [0] fires. [1,0,0,0,1]", Bits, FIVE, "repaired", [1, 0, 0, 0, 1]),
    "delphi: Python's names": ("[True, False, False, True, True]", Truths, FIVE, "repaired", [True, False, False, True, True]),
    "delphi: seven is no truth": ("[1,0,0,0,7]", Bits, FIVE, "invalid_reply", "4 is wrong"),
    "delphi: a last batch of two": ("[1, 0]", Bits, None, "ok", [1, 0]),
    "delphi: no explanation is no text": ("", None, None, "invalid_reply", "empty"),
    # repaired: prose, fences, commas, quotes, names
    "a fence": (f"```json\n{GOOD}\n```", Verdicts, TWO, "repaired", PAIR),
    "a fence without a language": (f"```\n{GOOD}\n```", Verdicts, TWO, "repaired", PAIR),
    "a fence that isn't closed": (f"```json\n{GOOD}", Verdicts, TWO, "repaired", PAIR),
    "prose before": (f"Here is my answer: {GOOD}", Verdicts, TWO, "repaired", PAIR),
    "prose after": (f"{GOOD}\nI hope this helps!", Verdicts, TWO, "repaired", PAIR),
    "prose with an apostrophe": (f"I don't think there's much doubt. {GOOD}", Verdicts, TWO, "repaired", PAIR),
    "prose with a quoted bracket": (f'The mark "[" opens. It\'s clear: {GOOD}', Verdicts, TWO, "invalid_reply", "JSON"),
    "a sorry that answers": (f"I'm sorry for the confusion. {GOOD}", Verdicts, TWO, "repaired", PAIR),
    "the same answer twice": (f"{GOOD}\n\nFinal: {json.dumps(PAIR, indent=1)}", Verdicts, TWO, "repaired", PAIR),
    "the form quoted, then the answer": (f'Form: {{"answers": [{{"id": 1, "fires": true, "p": 0.9}}]}}. {GOOD}', Verdicts, TWO, "repaired", PAIR),
    "thoughts": (f"<think>[maybe] {{the answer}} is {GOOD[:30]}</think>\n{GOOD}", Verdicts, TWO, "repaired", PAIR),
    "thoughts with another answer": (f"<think>{GOOD.replace('true', 'false')}</think>{GOOD}", Verdicts, TWO, "repaired", PAIR),
    "a trailing comma": ("[1, 0, 0, 1, 1,]", Bits, FIVE, "repaired", [1, 0, 0, 1, 1]),
    "trailing commas inside": (GOOD.replace("}]", "},]").replace("0.9}", "0.9,}"), Verdicts, TWO, "repaired", PAIR),
    "single quotes": (GOOD.replace('"', "'"), Verdicts, TWO, "repaired", PAIR),
    "curly quotes": ("{“intruder”: 2}", Intruder, None, "repaired", {"intruder": 2}),
    "bare names of fields": ("{intruder: 2}", Intruder, None, "repaired", {"intruder": 2}),
    "a missing comma": ("[1 0 0 1 1]", Bits, FIVE, "repaired", [1, 0, 0, 1, 1]),
    "a Python dict": (str(PAIR), Verdicts, TWO, "repaired", PAIR),
    "a byte order mark": (f"\ufeff{GOOD}", Verdicts, TWO, "repaired", PAIR),
    "zeros at the end of numbers": ('{"p": 0.50,}', Loose, None, "repaired", {"p": 0.5, "q": "none"}),
    # rejected: well-formed and wrong
    "a list too short": (GOOD, Verdicts, numbered(3), "invalid_reply", "ids must be 1 to 3"),
    "a list too long": (GOOD, Verdicts, numbered(1), "invalid_reply", "ids must be 1 to 1"),
    "numbers from 0": (GOOD.replace('"id": 1', '"id": 0').replace('"id": 2', '"id": 1'), Verdicts, TWO, "invalid_reply", "ids"),
    "an id twice": (GOOD.replace('"id": 2', '"id": 1'), Verdicts, TWO, "invalid_reply", "ids"),
    "an empty list": ('{"answers": []}', Verdicts, TWO, "invalid_reply", "ids"),
    "truth as a number": (GOOD.replace("true", "1"), Verdicts, TWO, "invalid_reply", "answers.0.fires"),
    "truth as text": (GOOD.replace("true", '"true"'), Verdicts, TWO, "invalid_reply", "answers.0.fires"),
    "truth as yes": (GOOD.replace("true", '"yes"'), Verdicts, TWO, "invalid_reply", "answers.0.fires"),
    "truth as null": (GOOD.replace("true", "null"), Verdicts, TWO, "invalid_reply", "answers.0.fires"),
    "a number as truth": ('{"intruder": true}', Intruder, None, "invalid_reply", "intruder"),
    "a number as text": ('{"intruder": "3"}', Intruder, None, "invalid_reply", "intruder"),
    "a fraction where an integer is asked": ('{"intruder": 2.5}', Intruder, None, "invalid_reply", "intruder"),
    "truths for bits": ("[true, false, true, true, false]", Bits, FIVE, "invalid_reply", "0 is wrong"),
    "bits for truths": ("[1, 0, 1, 1, 0]", Truths, FIVE, "invalid_reply", "0 is wrong"),
    "a probability above 1": (GOOD.replace("0.9", "1.5"), Verdicts, TWO, "invalid_reply", "answers.0.p"),
    "a negative probability": (GOOD.replace("0.9", "-0.1"), Verdicts, TWO, "invalid_reply", "answers.0.p"),
    "a percentage": (GOOD.replace("0.9", "90%"), Verdicts, TWO, "invalid_reply", "JSON"),
    "NaN": (GOOD.replace("0.9", "NaN"), Verdicts, TWO, "invalid_reply", "not finite"),
    "NaN in prose": (f"Well: {GOOD.replace('0.9', 'NaN')}.", Verdicts, TWO, "invalid_reply", "not finite"),
    "NaN as nan": ('{"p": nan}', Loose, None, "invalid_reply", "JSON"),
    "NaN as text": ('{"p": "NaN"}', Loose, None, "invalid_reply", "p is wrong"),
    "infinity": ('{"p": Infinity}', Loose, None, "invalid_reply", "not finite"),
    "minus infinity": ('{"p": -Infinity}', Loose, None, "invalid_reply", "not finite"),
    "infinity by size": ('{"p": 1e999}', Loose, None, "invalid_reply", "not finite"),
    "a number of 5000 digits": ('{"p": ' + "9" * 5000 + "}", Loose, None, "invalid_reply", "JSON"),
    "a decimal comma": ('{"p": 0,9}', Loose, None, "invalid_reply", "JSON"),
    "two decimal points": ('{"p": 0.9.5}', Loose, None, "invalid_reply", "JSON"),
    "a fraction": ('{"p": 1/2}', Loose, None, "invalid_reply", "JSON"),
    "a number with an underscore": ('{"p": 1_000}', Loose, None, "invalid_reply", "JSON"),
    "a number with a plus": ('{"p": +1}', Loose, None, "invalid_reply", "JSON"),
    "half a name": ('{"p": 0.5, "q": tru', Loose, None, "invalid_reply", "JSON"),
    "a field twice": ('{"intruder": 1, "intruder": 2}', Intruder, None, "invalid_reply", "twice"),
    "a field twice, with a trailing comma": ('{"intruder": 1, "intruder": 2,}', Intruder, None, "invalid_reply", "JSON"),
    "another field": ('{"answer": 3}', Intruder, None, "invalid_reply", "intruder is wrong (missing)"),
    "a field too many": (GOOD.replace('"p": 0.9', '"p": 0.9, "why": "gold"'), Verdicts, TWO, "invalid_reply", "answers.0.why"),
    "the list alone": (GOOD[len('{"answers": ') : -1], Verdicts, TWO, "invalid_reply", "it is wrong"),
    "wrapped once more": (f'{{"result": {GOOD}}}', Verdicts, TWO, "invalid_reply", "answers is wrong (missing)"),
    "wrapped in a list": (f"[{GOOD}]", Verdicts, TWO, "invalid_reply", "it is wrong"),
    "JSON in a text": (json.dumps(GOOD), Verdicts, TWO, "invalid_reply", "it is wrong"),
    "a bare number": ("3", Intruder, None, "invalid_reply", "it is wrong"),
    "null": ("null", Intruder, None, "invalid_reply", "it is wrong"),
    # rejected: cut off, or not to be told
    "cut in the middle": (GOOD[:50], Verdicts, None, "invalid_reply", "JSON"),
    "cut before the last bracket": (GOOD[:-1], Verdicts, TWO, "invalid_reply", "JSON"),
    "cut, with a whole list inside": ('{"x": [1, 0, 0, 0, 1], "y": [', Bits, FIVE, "invalid_reply", "JSON"),
    "brackets that cross": ("[1, 0, 0, {1, 1]}", Bits, FIVE, "invalid_reply", "JSON"),
    "two answers that differ": (f"{GOOD} or rather {GOOD.replace('true', 'false')}", Verdicts, TWO, "invalid_reply", "more than one"),
    "a comment": ('{"intruder": 2 // the odd one\n}', Intruder, None, "invalid_reply", "JSON"),
    "prose": ("Most of them do fire, I would say.", Verdicts, TWO, "invalid_reply", "JSON"),
    "a list in prose": ("1: yes, 2: no", Verdicts, TWO, "invalid_reply", "JSON"),
    "nothing": ("", Verdicts, TWO, "invalid_reply", "empty"),
    "white space": (" \n\t", Verdicts, TWO, "invalid_reply", "empty"),
    "thoughts alone": ("<think>hmm</think>", Verdicts, TWO, "invalid_reply", "empty"),
    "thoughts without end": (f"<think>hmm {GOOD}", Verdicts, TWO, "invalid_reply", "thoughts"),
    "deep nesting": (NESTED, Verdicts, TWO, "invalid_reply", "JSON"),
    "deep nesting, closed": (NESTED + "]" * 100_000, Verdicts, TWO, "invalid_reply", ""),
    "null bytes": ("\x00\x00{", Verdicts, TWO, "invalid_reply", "JSON"),
    # refusals
    "can't help": ("I'm sorry, but I can't help with that.", Verdicts, TWO, "refused", ""),
    "a curly apostrophe": ("I’m sorry, I can’t assist with this request.", Verdicts, TWO, "refused", ""),
    "cannot comply": ("I cannot comply with this request.", Verdicts, TWO, "refused", ""),
    "as an AI": ("As an AI language model, I cannot provide judgements on this.", Verdicts, TWO, "refused", ""),
    "unable to": ("I am unable to assist with that.", Verdicts, TWO, "refused", ""),
    "decline": ("I must respectfully decline.", Verdicts, TWO, "refused", ""),
    "sorry": ("Sorry.", Verdicts, TWO, "refused", ""),
    "a refusal where words are asked": ("I'm sorry, but I can't help with that.", None, None, "refused", ""),
    # words
    "an explanation": ("  The word gold, in any case. ", None, None, "ok", "The word gold, in any case."),
    "an explanation of refusals": ("Phrases such as 'I cannot help with that'", None, None, "ok", "Phrases such as 'I cannot help with that'"),
    "an explanation that begins with sorry": ("sorry and other apologies", None, None, "ok", "sorry and other apologies"),
    "words after thoughts": ("<think>gold?</think>\nThe word gold", None, None, "repaired", "The word gold"),
    "words that fail a check": ("No idea", None, lambda text: "it says nothing", "invalid_reply", "it says nothing"),
}  # fmt: skip


def completion(text: str, finish: str = "stop", refusal: bool = False) -> Completion:
    return Completion(text, 1, 1, finish, refusal)


def plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


@pytest.mark.parametrize("case", REPLIES)
def test_a_reply_is_taken_repaired_or_rejected_as_the_table_says(case: str) -> None:
    text, schema, check, status, expected = REPLIES[case]
    found = read(completion(text), schema, check)
    assert (found.status, found.repaired) == (
        "ok" if status == "repaired" else status,
        status == "repaired",
    ), found
    if found.status == "ok":
        assert plain(found.value) == expected and found.reason == ""
    else:
        assert found.value is None and found.reason
        assert found.status == "refused" or expected in found.reason


def test_the_table_is_large_enough() -> None:
    assert len(REPLIES) >= 60


@pytest.mark.parametrize("schema", [None, Verdicts])
def test_the_servers_own_word_of_a_refusal_counts(schema: type | None) -> None:
    assert read(completion(GOOD, refusal=True), schema).status == "refused"
    assert read(completion("", finish="content_filter"), schema).status == "refused"


@pytest.mark.parametrize("text", ["The word go", f"Sure: {GOOD} Wait,", GOOD[:-2], ""])
def test_what_the_limit_of_tokens_cut_is_no_answer(text: str) -> None:
    for schema in (None, Verdicts):
        found = read(completion(text, finish="length"), schema)
        assert found.status == "invalid_reply" and "cut off" in found.reason
    assert read(completion(GOOD, finish="length"), Verdicts, TWO).status == "ok"  # it was whole by then


def answers(generator: random.Random) -> tuple[dict[str, Any], int]:
    n = generator.randint(1, 8)
    rows = [
        {"id": i, "fires": generator.random() < 0.5, "p": round(generator.random(), 3)}
        for i in range(1, n + 1)
    ]
    return {"answers": rows}, n


HARMLESS = {
    "fence": lambda text, g: f"```{g.choice(['', 'json', 'JSON'])}\n{text}\n```",
    "prose": lambda text, g: (
        f"{g.choice(['Sure!', 'Well, [1] it is:', 'OK (so far):'])} {text}{g.choice(['', ' Done.', ' [end]'])}"
    ),
    "trailing comma": lambda text, g: text.replace("]", ",]").replace("}", ",}"),
    "quotes": lambda text, g: text.replace('"', "'"),
    "names": lambda text, g: text.replace("true", "True").replace("false", "False"),
    "lines": lambda text, g: text.replace(", ", ",\n\t"),
}


@pytest.mark.parametrize("seed", range(60))
def test_harmless_changes_keep_the_value_whatever_their_number(seed: int) -> None:
    generator = random.Random(seed)
    data, n = answers(generator)
    text = json.dumps(data)
    inner = [name for name in ("trailing comma", "quotes", "names", "lines") if generator.random() < 0.5]
    for name in [*inner, generator.choice(["fence", "prose", "lines"])]:
        text = HARMLESS[name](text, generator)
    found = read(completion(text), Verdicts, numbered(n))
    assert found.status == "ok" and plain(found.value) == data
    assert found.repaired == (not _is_json(text))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("seed", range(3))
def test_no_cut_and_no_lost_sign_gives_another_value(seed: int) -> None:
    data, n = answers(random.Random(seed))
    text = json.dumps(data)
    for at in range(len(text)):
        assert read(completion(text[:at]), Verdicts, numbered(n)).status != "ok", text[:at]
        assert read(completion(text[:at]), Loose).status != "ok", text[
            :at
        ]  # nothing is asked, so nothing is missed
        if text[at] in '{}[]:,"':
            found = read(completion(text[:at] + text[at + 1 :]), Verdicts, numbered(n))
            assert found.status != "ok" or (found.repaired and plain(found.value) == data), (at, found)


@pytest.mark.parametrize("seed", range(6))
def test_a_value_holds_the_words_of_its_text_and_no_others(seed: int) -> None:
    """One sign is replaced by another, anywhere: what is taken then says what the text says."""
    generator = random.Random(seed)
    data, _ = answers(generator)
    text, taken = json.dumps(data), 0
    for _ in range(100):
        at, sign = generator.randrange(len(text)), generator.choice("{}[]:,\"' 01.e-truNy%/\\")
        changed = text[:at] + sign + text[at + 1 :]
        found = read(completion(changed), Verdicts)
        if found.status == "ok":
            taken += 1
            bare = lambda s: [float(w) if w[0].isdigit() else w for w in _split(s)]  # noqa: E731
            assert bare(changed) == bare(json.dumps(plain(found.value))), changed
    assert taken


def _split(text: str) -> list[str]:
    for sign in "{}[]:,\"'":
        text = text.replace(sign, " ")
    return text.split()


def test_without_json_repair_prose_and_fences_are_still_cut_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json_repair", None)
    found = read(completion(f"Sure:\n```json\n{GOOD}\n```"), Verdicts, TWO)
    assert found.repaired and plain(found.value) == PAIR
    assert read(completion("[1, 0, 0, 1, 1,]"), Bits, FIVE).status == "invalid_reply"
