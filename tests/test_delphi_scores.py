"""delphi's explanations and scores: what its files hold is judged anew, and hostile ones are refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_firings import POINT

from saekit.autointerp.explanation import Explanation
from saekit.autointerp.formats import READERS, WRITERS, strict
from saekit.autointerp.formats.delphi import (
    BARE,
    MARKS,
    SCORERS,
    STAND_INS,
    Judged,
    Simulated,
    read_scores,
    read_windows,
    score_of,
    write_scores,
)
from saekit.types import SaekitError

JUDGED = [
    Judged((" a", "b"), (0.0, 1.5), 0, True, True, 0.9),
    Judged((" a", "é"), (2.0, 0.0), 3, True, False),
    Judged((" c", "b"), (0.0, 0.0), -1, False, False, 0.0),
    Judged(("x",), (0.5,), -0.25, False, True),
    Judged(("x",), (0.0,), -1, False, None),
]
SIMULATED = [
    Simulated(("a", "b"), (0, 10), (1.0, 7.5), 0),
    Simulated(("a", "c"), (0, 4), (0.0, 0.0), 2),
    Simulated(("a", "d"), (0, 0), (2.0, 0.0), -1),
]


@pytest.mark.parametrize("name", ["layers.1", "layers.1/mlp", "blocks.0.hook_resid_post_latent3"])
def test_explanations_come_back_with_what_they_score(name: str, tmp_path: Path) -> None:
    """Files of ``layers.1`` aren't those of ``layers.10``; what the file doesn't hold is said to be missing."""
    texts = {0: "plain", 12: 'of "quotes"\n and é', 3: STAND_INS[0]}
    WRITERS["delphi"]([Explanation(i, text, "human") for i, text in texts.items()], tmp_path, name)
    for other in (f"{name}0", f"x{name}"):
        WRITERS["delphi"]([Explanation(1, "other", "human")], tmp_path, other)
        write_scores({1: JUDGED}, tmp_path, other, "fuzz")
    (tmp_path / "run_config.json").write_text('{"explainer_model": "big", "hookpoints": []}')
    write_scores({0: JUDGED, 3: []}, tmp_path, name, "detection")
    write_scores({0: SIMULATED}, tmp_path, name, "simulation")
    found = READERS["delphi"](tmp_path, name)
    assert {one.feature: one.text for one in found} == texts and [one.feature for one in found] == [0, 3, 12]
    assert all(one.method == "imported" and one.about["claims"] == {"model": "big"} for one in found)
    assert ["failed" in one.about for one in found] == [False, True, False]
    assert [score.scorer for score in found[0].scores] == ["detection", "simulation"]
    assert found[1].score("detection").value is None and not found[2].scores
    for score in found[0].scores:
        assert score.low is score.high is None and not score.controls and BARE in score.notes
    stem = name.replace("/", "--")
    assert (tmp_path / "scores" / "detection" / f"{stem}_latent0.txt").is_file()
    assert json.loads((tmp_path / "explanations" / f"{name}_latent12.txt").read_bytes()) == texts[12]
    assert read_windows(tmp_path, name, "detection") == {0: tuple(JUDGED), 3: ()}
    assert read_windows(tmp_path, name, "simulation") == {0: tuple(SIMULATED)}
    with pytest.raises(SaekitError, match="already, as of feature 0"):
        WRITERS["delphi"]([Explanation(5, "more", "human")], tmp_path, name)


def test_two_explanations_of_a_feature_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match="feature 3 has two explanations"):
        WRITERS["delphi"]([Explanation(3, word, "human") for word in "ab"], tmp_path, POINT)
    assert list(tmp_path.iterdir()) == []


def test_scores_are_of_the_windows_and_not_of_what_the_file_says_of_them(tmp_path: Path) -> None:
    write_scores({4: JUDGED}, tmp_path, POINT, "fuzz")
    file = tmp_path / "scores" / "fuzz" / f"{POINT}_latent4.txt"
    data = json.loads(file.read_text())
    assert [one["correct"] for one in data] == [True, False, True, False, None]
    for one in data:
        one["correct"] = True
    file.write_text(json.dumps(data))
    score = read_scores(tmp_path, POINT)[4][0]
    assert (score.scorer, score.metric, score.n) == ("fuzzing", "balanced accuracy", 4)
    assert score.value == 0.5 and score.wrong == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert score.failures == {"invalid_reply": 1} and MARKS in score.notes
    assert score.strata == {"quantile 0": 1.0, "quantile 3": 0.0, "random": 1.0, "neighbour": 0.0}


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("n_silent", [0, 1, 50])
def test_a_judge_of_one_answer_scores_half_or_nothing(said: bool, n_silent: int) -> None:
    fires, silent = replace(JUDGED[0], prediction=said), replace(JUDGED[2], prediction=said)
    score = score_of("detection", [fires] * 10 + [silent] * n_silent)
    assert score.value == (0.5 if n_silent else None)
    # its probabilities are another matter
    assert score.auc == (1.0 if n_silent else None)


def test_simulations_correlate_over_all_windows_and_zero_replies_are_counted() -> None:
    score = score_of("simulation", SIMULATED)
    true, predicted = [0, 10, 0, 4, 0, 0], [1.0, 7.5, 0, 0, 2.0, 0]
    assert score.value == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    assert score.n == 3 and any("1 of 3 predictions are 0 throughout" in note for note in score.notes)
    assert score_of("simulation", [SIMULATED[0], replace(SIMULATED[0], predicted=(0.0, 0.0))]).value is not None  # fmt: skip
    constant = score_of("simulation", [replace(SIMULATED[0], predicted=(3.0, 3.0))])
    assert constant.value is None and "no silent window was simulated" in constant.notes


def test_groups_of_a_simulation_are_delphis(tmp_path: Path) -> None:
    write_scores({4: SIMULATED, 5: SIMULATED[:2]}, tmp_path, POINT, "simulation")
    whole, partial = (
        json.loads((tmp_path / "scores/simulation" / f"{POINT}_latent{i}.txt").read_text()) for i in (4, 5)
    )
    assert [group["distance"] for group in whole] == [1, 3, 0]
    assert [len(group["scored_sequence_simulations"]) for group in whole] == [1, 1, 3]
    assert whole[1]["ev_correlation_score"] == "nan" and partial[0]["distance"] == 1
    assert [one["distance"] for one in whole[2]["scored_sequence_simulations"]] == [0, 2, -1]
    assert read_windows(tmp_path, POINT, "simulation") == {4: tuple(SIMULATED), 5: tuple(SIMULATED[:2])}


def entry(**change: Any) -> str:
    good = {"str_tokens": ["a"], "activations": [1.0], "distance": 0, "activating": True, "prediction": True}
    return json.dumps([{**good, **change}])


TEXTS: dict[str, tuple[str | bytes, list[str]]] = {
    "no JSON": ('[{"str', ["not JSON"]),
    "nothing": ("", ["not JSON"]),
    "bytes": (b"\xff\xfe\x00", ["not JSON"]),
    "a nest without end": ("[" * 100_000, ["not JSON"]),
    "a number without end": ("[" + "9" * 5000 + "]", ["not JSON"]),
    "NaN": (entry(activations=[float("nan")]), ["NaN"]),
    "infinity": (entry(activations=[float("inf")]), ["Infinity"]),
    "1e999": ('[{"activations": [1e999]}]', ["1e999", "beyond all numbers"]),
    "a number": ("3", ["expected list"]),
    "an object": ("{}", ["expected list"]),
    "a list of numbers": ("[1]", ["[0] = 1", "expected dict"]),
    "an entry without tokens": ("[{}]", ["lacks the field 'str_tokens'"]),
    "tokens that are numbers": (entry(str_tokens=[1]), ["str_tokens[0] = 1", "expected str"]),
    "values that are null": (entry(activations=[None]), ["activations[0] = None", "expected float"]),
    "fewer values": (entry(activations=[]), ["1 tokens and 0 values"]),
    "a prediction of 7": (entry(prediction=7), ["prediction 7"]),
    "a prediction in words": (entry(prediction="yes"), ["prediction = 'yes'"]),
    "a probability of 3": (entry(probability=3), ["probability of 3"]),
    "words for truth": (entry(activating="true"), ["activating = 'true'", "expected bool"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_damaged_scores_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    text, words = TEXTS[case]
    for scorer in SCORERS:
        folder = tmp_path / "scores" / scorer
        folder.mkdir(parents=True)
        (folder / f"{POINT}_latent4.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    for scorer in SCORERS:
        with pytest.raises(SaekitError) as caught:
            read_windows(tmp_path, POINT, scorer)
        for word in (f"{POINT}_latent4.txt", *(words if scorer != "simulation" else ())):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["3", "null", '["a"]', '{"a": "b"}', '"a', ""])
def test_an_explanation_that_is_no_text_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / f"{POINT}_latent4.txt").write_text(text)
    with pytest.raises(SaekitError, match=f"{POINT}_latent4.txt"):
        READERS["delphi"](tmp_path, POINT)


@pytest.mark.parametrize(
    ("scorer", "windows", "words"),
    [
        ("detection", SIMULATED, "windows of Judged"),
        ("simulation", JUDGED, "windows of Simulated"),
        ("surprisal", JUDGED, "not one of delphi's"),
        ("fuzz", [replace(JUDGED[0], activations=(1.0,))], "2 tokens and 1 values"),
        ("fuzz", [replace(JUDGED[0], distance=float("nan"))], "NaN"),
        ("simulation", [replace(SIMULATED[0], predicted=(1.0, float("nan")))], "NaN"),
    ],
)
def test_windows_that_mean_nothing_are_not_written(
    scorer: str, windows: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SaekitError, match=words):
        write_scores({1: windows}, tmp_path, POINT, scorer)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "LONGEST", 100)
    (tmp_path / "explanations").mkdir()
    (tmp_path / "explanations" / f"{POINT}_latent4.txt").write_text(json.dumps("x" * 100))
    with pytest.raises(SaekitError, match="longer than 100 bytes"):
        READERS["delphi"](tmp_path, POINT)
