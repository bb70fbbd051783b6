"""From a dictionary, a model and a text to scored explanations: by counting, and by a language model on loopback."""

import copy
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from concept_rules import judge, reader, serve, true_explanations
from refusals import refusal

import saekit
from saekit.autointerp.budget import Budget
from saekit.autointerp.endpoint import OpenAIEndpoint
from saekit.autointerp.explain import FEWEST, Explanations, explain
from saekit.autointerp.explanation import FILE, Explanation, Score, feature_numbers, load
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.prompts import reader_of
from saekit.autointerp.rules import Tokens
from saekit.autointerp.scorers.intervention import KL, NEAR, Intervention
from saekit.autointerp.scorers.surprisal import Surprisal
from saekit.autointerp.scoring import Judge, score, shuffled
from saekit.autointerp.windows import Windows
from saekit.cli import main
from saekit.models import Model
from saekit.papers.auto_interp import windows_of
from saekit.testbed.concepts import World, world
from saekit.types import SaekitError


@pytest.fixture(scope="module")
def small() -> World:
    return world(0, documents=160)


def text_of(small: World) -> list[str]:
    return [
        small.tokenizer.decode(small.tokens[small.documents == d].tolist())
        for d in range(int(small.documents.max()) + 1)
    ]


def explained(small: World, **options: Any) -> Explanations:
    given = {
        "tokens": None,
        "n": 16,
        "features": [small.feature(n) for n in ("hal", "ish", "oil", "sea", "colour", "year")],
    }
    return explain(small.dictionary, small.model, text_of(small), **{**given, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, code_lm: Model) -> Path:
    """A dictionary of code-lm, trained a little."""
    out = tmp_path_factory.mktemp("run")
    d = saekit.create("topk", d_in=256, n_features=256, k=8, seed=0)
    stream = saekit.harvest(code_lm, "stdlib", ["blocks.1.hook_resid_post"], tokens=30_000)
    saekit.train(d, stream, steps=30, batch_size=512, out=out)
    return out


def test_counting_explains_and_its_rules_hold_on_other_documents(small: World, tmp_path: Path) -> None:
    found = explained(small)
    assert found.about["method"] == "statistics" and len(found) == 6
    for name in ("hal", "ish", "oil", "colour", "year"):
        one = found.of(small.feature(name))
        assert one.score("rule").value >= 0.95 and one.score("detection").value >= 0.95, one.text
        assert one.method == "statistics" and "shuffled" in one.score("detection").controls
    assert found.of(small.feature("sea")).text.startswith("No simple rule")
    back, about = load(found.save(tmp_path))
    assert about == json.loads(json.dumps(dict(found.about)))
    tokens = small.tokens[:40, :32].numpy()
    for one, two in zip(found, back, strict=True):
        assert dataclasses.replace(one, rule=None, about={}) == dataclasses.replace(two, rule=None, about={})
        np.testing.assert_array_equal(one.rule.strength(tokens), two.rule.strength(tokens))
    assert repr(found).count("\n") == 3 and "blind: shuffled" in repr(found)


def test_a_language_model_explains_and_judges_once(small: World, tmp_path: Path) -> None:
    """Recorded, then replayed with the server gone: the same bytes; a changed question is missed by name."""
    options: dict[str, Any] = {"method": "contrastive", "scorers": ("detection", "simulation")}
    with serve("perfect") as served:
        first = explained(small, judge=judge(served, tmp_path / "calls"), **options).save(tmp_path / "a.json")
        before = served.counts()
        again = explained(small, judge=judge(served, tmp_path / "calls"), **options).save(tmp_path / "b.json")
        assert served.counts() == before
        endpoint = served.endpoint
    made, _ = load(first)
    assert {one.method for one in made} == {"llm"} and len(made) == 6
    replay = judge(served, tmp_path / "calls")
    replay = dataclasses.replace(replay, ledger=Ledger(tmp_path / "calls", "replay"), endpoint=endpoint)
    third = explained(small, judge=replay, **options).save(tmp_path / "c.json")
    assert first.read_bytes() == again.read_bytes() == third.read_bytes()
    with pytest.raises(SaekitError, match="feature"):
        explained(small, judge=replay, **{**options, "seed": 1})


def test_transient_faults_change_no_score(small: World, tmp_path: Path) -> None:
    windows, given = (
        windows_of(small, tmp_path / "f"),
        true_explanations(small, ("hal", "ish", "oil", "colour")),
    )
    out = []
    for flags in ((), ("--faults", "0.3", "--slow", "1.5")):
        with serve("perfect", *flags) as served:
            own = judge(served, tmp_path / f"calls{len(flags)}", concurrency=32, timeout=1.0, retries=8)
            out.append(score(given, windows, reader(small), ("detection", "fuzzing"), own, n=24))
    assert out[0] == out[1]


def test_lasting_faults_are_counted_and_scored_both_ways(small: World, tmp_path: Path) -> None:
    windows, given = (
        windows_of(small, tmp_path / "f"),
        true_explanations(small, ("hal", "ish", "oil", "colour")),
    )
    with serve("perfect", "--faults", "0.3", "--kinds", "refusal,prose", "--persistent") as served:
        own = judge(served, tmp_path / "calls")
        out = score(given, windows, reader(small), ("detection",), own, controls=False)
    scores = [one.score("detection") for one in out]
    assert sum(sum(s.failures.values()) for s in scores) > 1
    for s in scores:
        lost = sum(s.failures.values())
        assert s.value == 1 and s.n == 80 - 8 * lost and (s.wrong < 1) == bool(lost)
        assert set(s.failures) <= {"refused", "invalid_reply"}


def test_a_budget_is_kept_and_what_was_not_run_is_said(small: World, tmp_path: Path) -> None:
    windows, given = (
        windows_of(small, tmp_path / "f"),
        true_explanations(small, ("hal", "ish", "oil", "colour")),
    )
    with serve("perfect") as served:
        own = judge(served, tmp_path / "calls", budget=Budget(requests=12), concurrency=64)
        out = score(given, windows, reader(small), ("detection",), own, controls=False)
        asked = served.served()
    failures = [one.score("detection").failures.get("not_run", 0) for one in out]
    assert sum(failures) == 40 - 12 and asked == 12
    assert any(one.score("detection").value is None for one in out)


def test_explanations_that_there_are_can_be_scored(small: World, tmp_path: Path) -> None:
    given = true_explanations(small, ("hal", "ish", "oil"))
    found = explained(small, features=None, given=given, scorers=("detection",))
    assert found.about["method"] == "given" and [one.text for one in found] == [one.text for one in given]
    assert all(one.score("detection").value == 1 for one in found)
    with serve("perfect") as served:
        found = explained(
            small, features=None, given=given, scorers=("detection",), judge=judge(served, tmp_path / "c")
        )
    used = found.about["judge"]
    assert used["questions"] == 3 * 3 * 4 and used["prompt_tokens"] > 1000
    said = f"{used['questions']} questions, {used['prompt_tokens'] + used['completion_tokens']:,} tokens"
    assert said in repr(found)
    with pytest.raises(SaekitError, match="given are explanations of their own features"):
        explained(small, given=given)


def test_a_score_that_blind_judges_win_is_flagged() -> None:
    scores = [
        Score(
            "fuzzing", "balanced accuracy", 0.9, 0.8, 1.0, 80, controls={"empty": 0.5, "number of marks": 0.9}
        )
    ]
    found = Explanations((Explanation(0, "a", "human", scores=tuple(scores)),))
    assert "can be won without the explanation, by number of marks" in repr(found)
    other = dataclasses.replace(scores[0], controls={"empty": 0.5, "shuffled": 0.9})
    assert "can be won" not in repr(Explanations((Explanation(0, "a", "human", scores=(other,)),)))


@pytest.mark.slow
def test_500_features_are_explained_in_two_minutes(code_lm: Model, tmp_path: Path) -> None:
    """Of a dictionary of 2048, trained for 300 steps; the whole command, on two cores."""
    d = saekit.create("topk", d_in=256, n_features=2048, k=16, seed=0)
    stream = saekit.harvest(code_lm, "stdlib", ["blocks.1.hook_resid_post"], tokens=200_000)
    saekit.train(d, stream, steps=300, batch_size=2048, out=tmp_path)
    start = time.perf_counter()
    command = [sys.executable, "-P", "-m", "saekit.cli", "explain", str(tmp_path), "--features", "500"]
    done = subprocess.run(command, capture_output=True, text=True)
    took = time.perf_counter() - start
    print(f"{took:.0f} s\n{done.stdout}")
    assert done.returncode == 0 and took < 120
    made, about = load(tmp_path)
    assert len(made) == 500 and about["method"] == "statistics"
    rules = [one.score("rule") for one in made]
    mean, random = (
        np.mean([v for v in values if v is not None])
        for values in ([s.value for s in rules], [s.controls.get("shuffled") for s in rules])
    )
    assert mean > 10 * random


def test_numpys_numbers_and_generators_are_taken(small: World, tmp_path: Path) -> None:
    def facts(found: Explanations) -> list[Any]:
        return [(one.feature, one.text, one.scores) for one in found]

    numbers = [small.feature(n) for n in ("hal", "ish")]
    plain = explained(small, features=numbers, scorers=("detection",))
    found = explained(small, features=iter(numbers), scorers=(one for one in ("detection",)))
    assert facts(found) == facts(plain)
    again = explained(small, features=None, given=iter(plain.listed), scorers=("detection",))
    assert facts(again) == facts(plain)
    numpys = {"n": np.int64(16), "width": np.int64(32), "seed": np.int64(0), "tokens": np.int64(10**9)}
    unchecked: Any = inspect.unwrap(explain)  # its annotations say int
    given = small.dictionary, small.model, text_of(small)
    found = unchecked(*given, np.array(numbers), scorers=("detection",), **numpys)
    file = found.save(tmp_path / "kept.json")
    assert facts(found) == facts(plain) and [one.feature for one in load(file)[0]] == numbers
    assert feature_numbers(torch.tensor(numbers), 30) == numbers


def test_what_is_asked_for_wrongly_is_refused(small: World, run: Path) -> None:
    for options, words in (
        ({"method": "guess"}, "method 'guess' is unknown"),
        ({"method": "llm"}, "method 'llm' asks a language model; give judge="),
        ({"scorers": ("detect",)}, "scorer 'detect' is unknown; did you mean 'detection'"),
        ({"features": [3, 3]}, "listed twice"),
        ({"features": [10**6]}, "feature 1000000 is none of the dictionary's 30"),
        ({"features": 0}, "features = 0 must be"),
        ({"features": [1.0]}, "feature 1.0 is no number of a feature"),
        ({"features": np.array([0.5])}, "feature 0.5 is no number of a feature"),
        ({"features": [small.feature("dodo")]}, f"none of the features fires in {FEWEST} windows"),
        ({"n": 4}, "n = 4 must be a whole number from 5"),
        ({"width": 1}, "width = 1 must be a whole number from 2"),
        ({"seed": -1}, "seed = -1 must be a whole number from 0"),
    ):
        with pytest.raises(SaekitError, match=words):
            explained(small, **options)
    bare = saekit.create("topk", d_in=256, n_features=64, k=4)
    with pytest.raises(SaekitError, match="names no hook point"):
        explain(bare, "code-lm", ["text " * 100, "more " * 100])


def test_the_command_explains_a_run(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    argv = ["explain", str(run), "--features", "6", "--tokens", "80000", "--n", "8", "--json"]
    monkeypatch.setattr(sys, "argv", ["saekit", *argv])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, _ = capfd.readouterr()
    assert exit_.value.code in (0, None)
    said = json.loads(out)
    assert said["n"] == 6 and {one["scorer"] for one in said["summaries"]} == {
        "rule",
        "detection",
        "fuzzing",
    }
    made, _about = load(run)
    assert len(made) == 6 and (run / FILE).is_file()
    assert "no language" not in refusal(
        ["explain", str(run), "--endpoint", "http://127.0.0.1:9/v1"], monkeypatch, capfd
    )
    assert "asks a language model" in refusal(["explain", str(run), "--method", "llm"], monkeypatch, capfd)


WITHOUT = """
import sys, time
class Gone:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("openai", "pydantic", "json_repair", "tenacity", "vllm"):
            raise ImportError(name)
sys.meta_path.insert(0, Gone())
start = time.perf_counter()
import saekit.autointerp
took = time.perf_counter() - start
import saekit
text = ["import os\\nimport sys\\nprint(os.path)\\n" * 40, "def main(self):\\n    return self\\n" * 60] * 8
m = saekit.load_model("code-lm")
d = saekit.create("topk", d_in=256, n_features=64, k=8, seed=0)
d.reads = d.writes = ("blocks.1.hook_resid_post",)
found = saekit.explain(d, m, text, features=4, tokens=8000, n=8, scorers=("rule", "detection", "fuzzing", "intruder", "embedding"))
print(took, len(found), all(one.score("detection") for one in found))
"""


def test_without_a_client_all_but_language_models_works() -> None:
    """The clients are of the extra ``llm``, and nothing is asked for that needs them."""
    needed = [
        one for one in requires("saekit") or [] if re.match(r"(openai|json.repair|vllm|litellm)\b", one)
    ]
    assert needed and all('extra == "llm"' in one for one in needed)
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    took, n, scored = done.stdout.split()
    assert float(took) < 1 and int(n) == 4 and scored == "True"


def test_descriptions_make_texts_expected_and_interventions_make_them_written(
    code_lm: Model, tmp_path: Path
) -> None:
    """A feature that writes what makes 'self' likely, and one that fires on it."""
    token = code_lm.tokenizer(" self")["input_ids"][0]
    d = saekit.create("topk", d_in=256, n_features=32, k=4, seed=0, normalise="none")
    d.reads = d.writes = ("blocks.3.hook_resid_post",)
    with torch.no_grad():
        d.W_dec[7] = code_lm.module.lm_head.weight[token] / code_lm.module.lm_head.weight[token].norm()
    text = ["def f(self, x):\n    return self.x + x\n" * 12, "import os\nimport sys\nprint(1)\n" * 16] * 8
    from saekit.autointerp.firings import record

    r = reader_of(code_lm)
    windows = Windows(record(code_lm, d, text, tokens=12_000, split="all"), texts=r.texts)
    rule = Tokens((token,), (" self",), (1.0,))
    given = Explanation(7, "The word self.", "human", rule)
    scorer = Intervention(code_lm, d)
    trials = scorer.trials(windows, 7, "score", 24, 0)
    assert trials is not None and (np.abs(trials.divergence - KL) <= NEAR).all()
    assert len({trials.texts[arm].tobytes() for arm in range(3)}) == 3
    (one,) = score([given], windows, r, (scorer,), n=24)
    assert one.score("intervention").value == 1 and trials.truth.tolist() != [0] * len(trials.truth)
    with torch.no_grad():
        kept, d.W_dec[7] = d.W_dec[7].clone(), 0.0
    assert scorer.trials(windows, 7, "score", 24, 0) is None  # it writes nothing
    with torch.no_grad():
        d.W_dec[7] = kept
    surprisal = Surprisal(code_lm)
    (told,) = score([dataclasses.replace(given, text="self, self.x, (self)")], windows, r, (surprisal,), n=24)
    found = told.score("surprisal")
    assert found.metric == "AUC" and found.controls["empty"] == 0.5
    lines, wanted = ["self.x = self.y", "import os, sys"], "self.x = self.y"
    loss = surprisal._losses("x", lines), surprisal._losses(wanted, lines)
    assert loss[0][0] - loss[1][0] > loss[0][1] - loss[1][1]


def test_texts_longer_than_the_context_are_read_from_their_beginning(code_lm: Model) -> None:
    surprisal, lines = Surprisal(code_lm), ["x = 1\n" * 400, "x"]
    loss = surprisal._losses("assignments", lines)
    assert (
        np.isfinite(loss).all()
        and loss.tolist() == surprisal._losses("assignments", [lines[0] * 2, "x"]).tolist()
    )


def test_explanations_are_shuffled_to_another_feature_with_other_words() -> None:
    given = [Explanation(i, text, "human") for i, text in enumerate(["a", "a", "b", "c"])]
    for seed in range(20):
        for one, other in zip(given, shuffled(given, seed), strict=True):
            assert other is not None and other.feature != one.feature and other.text != one.text
    assert shuffled(given[:2], 0) == [None, None]


def test_a_server_that_is_gone_is_named_and_costs_no_explanation(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """And what isn't ours isn't written over."""
    explained_ = Explanations((Explanation(3, "by hand", "human"),), {"method": "given"}).save(run)
    before = explained_.read_bytes()
    command = [
        "explain",
        str(run),
        "--features",
        "2",
        "--tokens",
        "80000",
        "--n",
        "5",
        "--method",
        "llm",
        "--judge",
        "judge",
        "--ledger",
        str(run / "calls"),
    ]
    for more, words in (
        (["--endpoint", "not an address"], "base_url 'not an address' is no address"),
        (
            ["--endpoint", "http://127.0.0.1:9/v1", "--max-money", "2"],
            "max_money can't be kept to without a price",
        ),
    ):
        assert words in refusal([*command, *more], monkeypatch, capfd)
    windows_args = {"tokens": 80_000, "n": 5, "features": 2, "scorers": ()}
    gone = Judge(
        OpenAIEndpoint("judge", "http://127.0.0.1:9/v1"), Ledger(run / "calls"), retries=0, progress=False
    )
    with pytest.raises(SaekitError, match="gave no reply to any of 2 questions"):
        explain(run, method="llm", judge=gone, **windows_args)
    assert explained_.read_bytes() == before
    with pytest.raises(SaekitError, match="config"):
        Explanations((Explanation(3, "by hand", "human"),)).save(run / "config.json")
    assert json.loads((run / "config.json").read_text())


def test_a_file_of_another_dictionary_or_a_cut_one_is_refused_before_any_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """By whoever shows or adds to it: its features are not this dictionary's."""
    d = saekit.load(run)
    other = saekit.create("topk", d_in=256, n_features=d.n_features, k=8, seed=7)
    made = Explanations((Explanation(3, "by hand", "human"),), {"dictionary": other.digest()})
    out = tmp_path / "e.json"
    showing = [
        ["explain", str(run), "--out", str(out)], ["dashboard", str(run), "--out", str(tmp_path / "page.html")],
        ["trace", str(run), "--prompt", "import os", "--out", str(tmp_path / "graph")],
    ]  # fmt: skip
    for damaged, said in ((False, "are of another dictionary"), (True, "is not a record of explanations")):
        for path in (made.save(out), made.save(run)):
            if damaged:
                path.write_bytes(path.read_bytes()[:-9])
        for argv in showing:
            told = refusal(argv, monkeypatch, capfd)
            assert said in told and "remove it and explain the features again" in told, argv
        for path in (out, run / FILE):
            path.unlink()
    assert not (tmp_path / "page.html").exists() and not list(tmp_path.glob("graph/*"))
    assert "mode 'foo' is none of" in refusal(["explain", str(run), "--mode", "foo"], monkeypatch, capfd)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judged = ["explain", str(run), "--method", "llm", "--judge", "x", "--ledger", str(tmp_path / "calls")]
    assert "is not set in the environment" in refusal(judged, monkeypatch, capfd)


def test_a_model_that_explains_nothing_and_features_left_out_are_named(small: World, tmp_path: Path) -> None:
    with serve("perfect") as served:
        empty = judge(served, tmp_path / "calls", budget=Budget(requests=0))
        with pytest.raises(
            SaekitError, match=r"explained none of 6 features \(6 not_run; the first: requests = 0"
        ):
            explained(small, method="llm", judge=empty, scorers=())
    often, rare = small.feature("hal"), small.feature("sea")
    d = copy.deepcopy(small.dictionary)
    with torch.no_grad():
        d.b_enc[rare] = -1e4
    found = explain(d, small.model, text_of(small), [often, rare], tokens=None, scorers=())
    assert [one.feature for one in found] == [often] and found.about["left_out"] == [rare]
    assert f"left out: {rare}, firing in fewer than" in repr(found)


def test_scores_with_a_field_of_another_version_are_refused(tmp_path: Path) -> None:
    given = {"scorer": "rule", "metric": "F1", "value": 0.5, "low": None, "high": None, "n": 3, "later": 1.0}
    one = {"feature": 1, "text": "fires", "method": "given", "about": {}, "scores": [given]}
    file = tmp_path / "explanations.json"
    file.write_text(json.dumps({"schema": 1, "about": {}, "features": [one]}))
    with pytest.raises(SaekitError, match="field 'later', which this version"):
        load(file)
