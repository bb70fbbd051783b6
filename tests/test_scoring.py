"""Scores can be believed: a perfect judge of true explanations scores 1, and whoever can't read them scores chance.

A judge in a process of its own sees the prompts' text and nothing else.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from concept_rules import alive, judge, reader, serve, true_explanations
from scipy.stats import ks_2samp

from saekit.autointerp import llm, stats
from saekit.autointerp.explanation import Explanation
from saekit.autointerp.scorers import SCORERS
from saekit.autointerp.scorers.detection import Detection
from saekit.autointerp.scorers.fuzzing import Fuzzing
from saekit.autointerp.scoring import score, summaries
from saekit.autointerp.windows import Windows
from saekit.papers.auto_interp import windows_of
from saekit.testbed.concepts import World, world

JUDGED = ("detection", "fuzzing")


@pytest.fixture(scope="module")
def small() -> World:
    return world(0, documents=300)


@pytest.fixture(scope="module")
def windows(small: World, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    return windows_of(small, tmp_path_factory.mktemp("firings"))


@pytest.fixture(scope="module")
def true(small: World) -> list[Explanation]:
    return true_explanations(small, alive(small))


def asked(personality: str, given: list[Explanation], windows: Windows, small: World, path: Path, scorers: Any = JUDGED, **options: Any) -> Any:  # fmt: skip
    with serve(personality) as served:
        own = judge(served, path / "calls.sqlite", concurrency=64)
        return score(given, windows, reader(small), scorers, own, **{"controls": False, **options})


def values(out: list[Explanation], scorer: str) -> np.ndarray:
    return np.array([one.score(scorer).value for one in out])


def test_a_perfect_judge_of_true_explanations_scores_1(
    true, windows: Windows, small: World, tmp_path: Path
) -> None:
    """And what it says is what the rule says, example by example."""
    scorers = ("detection", "fuzzing", "simulation", "intruder")
    out = asked("perfect", true, windows, small, tmp_path, scorers, n=16)
    executed = score(true, windows, reader(small), scorers, n=16, controls=False)
    assert len(out) >= 24
    for scorer in ("detection", "fuzzing", "intruder"):
        assert (values(out, scorer) == 1).all() and (values(executed, scorer) == 1).all()
    assert values(out, "simulation").min() >= 0.95
    np.testing.assert_allclose(values(out, "simulation"), values(executed, "simulation"))
    for one in out:
        detection = one.score("detection")
        assert detection.auc == 1 and detection.n == 32 and detection.low > 0.85 and detection.corrected == 1
        assert set(detection.strata.values()) == {1.0} and detection.wrong == 1 and not detection.failures


def test_permuted_explanations_score_chance(true, windows: Windows, small: World, tmp_path: Path) -> None:
    texts = [true[(i + 1) % len(true)].text for i in range(len(true))]
    permuted = [dataclasses.replace(one, text=text, rule=None) for one, text in zip(true, texts, strict=True)]
    out = asked("perfect", permuted, windows, small, tmp_path, n=50)
    for scorer in JUDGED:
        assert values(out, scorer).mean() == pytest.approx(0.5, abs=0.02)
        assert all(one.score(scorer).low <= 0.65 for one in out)


@pytest.mark.parametrize(
    "personality",
    [
        pytest.param("yes", marks=pytest.mark.slow),
        "no",
        "coin",
        pytest.param("noisy:0.1", marks=pytest.mark.slow),
        "noisy:0.3",
    ],
)
def test_judges_without_skill_score_chance_and_noise_its_share(personality: str, true, windows: Windows, small: World, tmp_path: Path) -> None:  # fmt: skip
    constant = personality in ("yes", "no")
    out = asked(personality, true, windows, small, tmp_path, n=8 if constant else 40)
    for scorer in JUDGED:
        found = values(out, scorer)
        if constant:
            assert (found == 0.5).all() and all("constant judge" in one.score(scorer).notes[0] for one in out)
        else:
            assert found.mean() == pytest.approx(
                1 - float(personality[6:]) if personality.startswith("noisy") else 0.5, abs=0.02
            )
        if personality.startswith("noisy"):  # audited by what the rules say
            mean = next(one for one in summaries(out) if one.scorer == scorer)
            assert mean.corrected == pytest.approx(1, abs=0.04)
            assert all(0 <= one.score(scorer).corrected <= 1 for one in out)


@pytest.mark.parametrize(
    "cheater",
    ["position", *(pytest.param(one, marks=pytest.mark.slow) for one in ("count", "length")), "memoriser"],
)
def test_whoever_cannot_read_the_explanation_scores_chance(cheater: str, true, windows: Windows, small: World, tmp_path: Path) -> None:  # fmt: skip
    with serve(cheater) as served:
        own = judge(served, tmp_path / "calls.sqlite", concurrency=64)
        if cheater == "memoriser":  # recalls what it was shown to explain
            features = [one.feature for one in true]
            made, failed = llm.explain(windows, features, reader(small), own)
            assert len(made) == len(features) and not failed
        out = score(true, windows, reader(small), JUDGED, own, controls=False)
    for scorer in JUDGED:
        mean = values(out, scorer).mean()
        assert mean == pytest.approx(0.5, abs=0.03) if cheater == "memoriser" else 0.47 <= mean <= 0.53


def test_a_judge_of_its_own_explanations_finds_the_concepts(
    true, windows: Windows, small: World, tmp_path: Path
) -> None:
    """From texts to explanations to scores, by a model that knows 30 concepts; two are named where one is meant rarely."""
    features = [one.feature for one in true]
    with serve("perfect") as served:
        own = judge(served, tmp_path / "calls.sqlite", concurrency=64)
        made, _ = llm.explain(windows, features, reader(small), own)
        out = score(made, windows, reader(small), ("detection",), own)
    assert np.mean([one.text == two.text for one, two in zip(made, true, strict=True)]) >= 0.9
    (found,) = summaries(out)
    assert found.value >= 0.95 and found.low > 0.9
    assert found.controls["shuffled"] == pytest.approx(0.5, abs=0.04) and found.controls["empty"] == 0.5
    assert abs(found.controls["length of text"] - 0.5) < 0.1


def test_half_of_a_union_is_flagged(windows: Windows, small: World, tmp_path: Path) -> None:
    feature = small.feature("colour or year")
    half = dataclasses.replace(true_explanations(small, ("colour",))[0], feature=feature)
    (one,) = asked("perfect", [half], windows, small, tmp_path, ("detection",))
    found = one.score("detection")
    assert 0.25 < found.strata["firing"] < 0.75 and found.strata["random"] == 1
    assert any(note.startswith("two things") for note in found.notes)
    whole = dataclasses.replace(half, rule=true_explanations(small, ("colour or year",))[0].rule)
    (one,) = score([whole], windows, reader(small), ("detection",), controls=False)
    assert one.score("detection").value == 1 and not one.score("detection").notes


def test_marks_of_silent_windows_are_those_of_firing_ones(true, windows: Windows) -> None:
    """In number and place, over all features; and silent windows are as long."""
    on: dict[str, list[Any]] = {"count": [], "place": [], "size": []}
    off: dict[str, list[Any]] = {"count": [], "place": [], "size": []}
    for one in true:
        trials = Fuzzing().trials(windows, one.feature, "score", 40, 0)
        for kind, side in ((True, on), (False, off)):
            own = trials.truth == kind
            side["count"] += trials.marks[own].sum(1).tolist()
            side["place"] += trials.marks[own].nonzero()[1].tolist()
            side["size"] += windows.lengths(trials.examples.windows[own]).tolist()
        assert trials.marks.any(1).all() and not (trials.examples.values[~trials.truth] > 0).any()
        assert len(set(trials.examples.windows.tolist())) == len(trials.examples)
        pair = [trials.marks[trials.truth == kind].sum(1) for kind in (True, False)]
        assert ks_2samp(*pair).pvalue > 0.01
    for name in on:
        assert ks_2samp(on[name], off[name]).pvalue > 0.01, name


def test_what_is_explained_from_is_not_scored_on(true, windows: Windows) -> None:
    explained, scored = set(), set()
    for one in true:
        explained |= set(windows.firing(one.feature, "explain", 20).documents.tolist())
        trials = Detection().trials(windows, one.feature, "score", 40, 0)
        scored |= set(trials.examples.documents.tolist())
    assert explained and scored and not explained & scored


@pytest.mark.parametrize("accuracy", [0.55, 0.8, 0.97])
@pytest.mark.parametrize("measure", ["accuracy", "auc", "share"])
def test_intervals_cover_the_truth(accuracy: float, measure: str) -> None:
    """Nominal 95 %: the truth is inside in 92 to 98 % of repetitions."""
    rng, n, repeats = np.random.default_rng([7, int(100 * accuracy)]), 40, 1000
    truth = np.repeat([True, False], n)
    inside = 0
    for _ in range(repeats):
        if measure == "auc":
            from scipy.special import ndtri

            shift = np.sqrt(2) * ndtri(accuracy)
            low, high = stats.auc_interval(truth, rng.standard_normal(2 * n) + shift * truth)
        else:
            judged = truth ^ (rng.random(2 * n) > accuracy)
            found = stats.balanced_interval(truth, judged) if measure == "accuracy" else stats.wilson(float((judged == truth).sum()), 2 * n)  # fmt: skip
            low, high = found
        inside += low <= accuracy <= high
    assert 0.92 <= inside / repeats <= 0.98


RULES: dict[
    str, tuple[Any, ...]
] = {  # firing and silent windows, the text's ratio; recall, how alike in a window; of false ones
    "finds all, few": (10, 320, 320, 0.95, 0, 0, 0.0, 0.0),
    "rarely false": (20, 320, 160, 0.9, 0, 0, 0.003, 0.0),
    "seldom false": (160, 320, 50, 0.9, 2, 2, 0.003, 0.1),
    "often false": (160, 320, 3, 0.8, 2, 2, 0.3, 0.5),
    "clumps": (160, 320, 50, 0.5, 2, 2, 0.02, 0.1),
    "finds few": (40, 320, 5, 0.2, 0, 3, 0.1, 0.3),
}


@pytest.mark.parametrize("case", RULES)
def test_the_interval_of_a_rules_f1_covers_the_truth(case: str) -> None:
    firing, silent, ratio, recall, alike, more, false, here = RULES[case]
    rng = np.random.default_rng(12)

    def drawn(firing: int, silent: int) -> list[np.ndarray]:
        true = 1 + rng.poisson(more, firing)
        share = rng.beta(recall * alike, (1 - recall) * alike, firing) if alike else recall
        wrong = [
            rng.binomial(1, p, n) * (1 + rng.poisson(1, n)) for p, n in ((here, firing), (false, silent))
        ]
        return [part.astype(float) for part in (rng.binomial(true, share), wrong[0], true, wrong[1])]

    hits, wrong, true, elsewhere = (part.mean() for part in drawn(10**6, 10**6))
    value, inside = 2 * hits / (hits + wrong + true + ratio * elsewhere), 0
    for _ in range(300):
        low, high = stats.f1_interval(*drawn(firing, silent), ratio)
        inside += low <= value <= high
        assert low < high
    assert inside / 300 >= 0.92
    none, one = np.zeros(10), np.ones(10)
    assert (
        stats.f1_interval(none, none, one, none, 5)[0] == 0
        and stats.f1_interval(one, none, one, none, 5)[1] == 1
    )
    low, high = stats.f1_interval(one, none, 3 * one, none, 5)  # the same share in every window
    assert 0.1 < low < 0.5 < high


@pytest.mark.parametrize("kind", ["noise", "many", "lapses", "unlike"])
def test_the_interval_of_a_simulation_covers_the_truth(kind: str) -> None:
    """Over ten firing and ten silent windows, as Simulation draws them."""
    rng = np.random.default_rng(11)

    def drawn(n: int) -> tuple[Any, Any]:
        truth = np.zeros((2 * n, 32))
        for line in truth[:n]:
            count = rng.integers(1, 16 if kind == "many" else 4)
            line[rng.choice(32, count, replace=False)] = rng.integers(1, 11, count)
        if kind == "lapses":
            return truth, np.where(rng.random(truth.shape) < 0.05, 10 - truth, truth)
        noise = rng.standard_normal(truth.shape) * (
            rng.choice([0.5, 2], (2 * n, 1)) if kind == "unlike" else 1
        )
        return truth, np.clip(truth + noise, 0, None)

    value = stats.pearson(*(part.reshape(-1) for part in drawn(20000)))
    inside, firing = 0, np.repeat([True, False], 10)
    for _ in range(400):
        low, high = stats.correlation_interval(*drawn(10), firing)
        inside += low <= value <= high
    assert 0.92 <= inside / 400 <= 0.98
    assert stats.correlation_interval(*drawn(10), np.arange(20) < 19) is None


def test_measures_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    truth, at = rng.random(200) < 0.3, rng.random(200).round(1)
    pairs = [(a > b) + (a == b) / 2 for a in at[truth] for b in at[~truth]]
    assert stats.auc(truth, at) == pytest.approx(np.mean(pairs))
    assert stats.balanced_accuracy(truth, truth) == 1 and stats.balanced_accuracy(truth, ~truth) == 0
    assert stats.balanced_accuracy(truth, np.ones(200, bool)) == 0.5
    assert stats.balanced_accuracy(np.ones(9, bool), np.ones(9, bool)) is None
    assert stats.corrected(0.5 + 0.6 * 0.4, 0.6) == pytest.approx(0.9)
    assert stats.corrected(0.5, 0.0) is None and stats.corrected(0.1, 0.2) == 0


def test_a_feature_that_hardly_fires_is_not_scored(windows: Windows, small: World) -> None:
    rare = true_explanations(small, ("dodo",))
    for scorer in ("rule", "detection", "fuzzing", "simulation", "intruder", "embedding"):
        (one,) = score(rare, windows, reader(small), (scorer,))
        assert one.score(scorer).value is None and one.score(scorer).failures == {"feature untried": 1}
    bare = dataclasses.replace(true_explanations(small, ("hal",))[0], rule=None)
    (one,) = score([bare], windows, reader(small), ("detection",))
    assert one.score("detection").notes == ("has no rule to execute, and no judge was given",)


def test_every_scorer_is_in_the_table_and_says_what_it_is() -> None:
    for name in SCORERS:
        scorer = SCORERS[name]
        assert scorer.name == name and scorer.by in ("judge", "rule", "model") and scorer.metric


def test_rules_are_scored_token_by_token_at_their_own_rarity(true, windows: Windows, small: World) -> None:
    out = score(true, windows, reader(small), ("rule",))
    assert (values(out, "rule") == 1).all()
    every = small.fires.reshape(-1, len(small.concepts)).numpy()[windows.starts[:, None] + np.arange(32)][
        windows.side == 1
    ]
    for one in out:  # a rule that always says yes has the precision that the text gives it
        share = every[..., one.feature].mean()
        assert one.score("rule").controls["always"] == pytest.approx(2 * share / (1 + share), rel=0.25)
    assert np.mean([one.score("rule").controls["shuffled"] for one in out]) < 0.02
