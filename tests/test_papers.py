"""The frame of ``saekit reproduce``; the claims themselves are run by ``pytest -m slow``."""

import importlib
import inspect
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from commandline import Done
from commandline import saekit as command

import saekit
from saekit import metrics
from saekit.activations import DrawnSource
from saekit.papers import PAPERS, result, row, training
from saekit.papers.claims import Claim, Reproduction, bars, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.registry import Registry
from saekit.report.papers import write_papers
from saekit.verbs.reproduce import table


def claim(*ours: float, sign: str = "<=", bound: float = 1.0) -> Claim:
    return Claim("error", "0.9 (table 1)", ours, sign, bound, [2.0], "control")


def test_a_claim_holds_by_its_mean() -> None:
    assert claim(0.5, 1.4).holds and not claim(0.5, 1.6).holds and not claim(math.nan).holds
    assert claim(2.0, sign=">").holds and not claim(1.0, sign=">").holds and claim(1.0, sign=">=").holds
    assert not claim(1.0, sign="<").holds


def test_its_interval_is_students() -> None:
    low, high = claim(1.0, 2.0, 3.0).interval
    assert (low + high) / 2 == pytest.approx(2) and high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert claim(1.0).interval is None


def test_a_reproduction_is_json_and_a_table() -> None:
    drawn = bars("t", "y", {"a": {"x": [1.0, 2.0]}})
    found = Reproduction("title", "source", "setting", [claim(0.5), claim(5.0)], drawn, ["a note"])
    data = json.loads(json.dumps(found.to_json(), default=lambda a: a.tolist()))
    assert not data["holds"] and [c["holds"] for c in data["claims"]] == [True, False]
    assert data["claims"][0]["control"] == {"name": "control", "values": [2.0]}
    text = table({"seconds": 3.0, **data}, Path("x"))
    assert (
        "HOLDS  error" in text
        and "DOES NOT HOLD  error" in text
        and "a note" in text
        and "demanded: at most 1" in text
    )
    assert figure("t", "x", "y", {"a": ([1], [2.0])})["data"][0]["name"] == "a"


def test_controls_are_json_and_a_table() -> None:
    controls = {"FVU": {"TopK": [0.1, 0.2], FROZEN: [0.5, 0.6], RANDOM: [2.0, 4.0]}, "dead": {"TopK": [0.0]}}
    found = Reproduction("title", "source", "setting", [claim(0.5)], {}, controls=controls)
    assert json.loads(json.dumps(found.to_json()))["controls"] == controls
    lines = table({"seconds": 3.0, **found.to_json()}, Path("x")).splitlines()
    start = lines.index("means over seeds        FVU      dead")
    assert lines[start + 1 : start + 5] == [
        "TopK                   0.15         0",
        "frozen decoder         0.55",
        "random dictionary         3",
        "",
    ]


def test_an_untrained_control_is_the_frozen_one_without_its_encoder() -> None:
    frozen = saekit.create("frozen", d_in=8, n_features=32, k=3, seed=5)
    atoms, encoder = frozen.W_dec.clone(), frozen.W_enc.detach().clone()
    x = 3 + 2 * torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    training.fit(frozen, x, 200, 128, lr=3e-3)
    random = untrained(frozen)
    assert torch.equal(frozen.W_dec, atoms) and torch.equal(random.W_dec, atoms)
    assert not torch.allclose(frozen.W_enc, encoder) and torch.equal(random.W_enc, atoms.T)
    assert random.normalised and torch.equal(random.norm_in(x), frozen.norm_in(x))
    assert metrics.l0(random.encode(x)) == pytest.approx(3, abs=0.1)
    assert metrics.fvu(x, frozen(x).detach()) < 0.9 * metrics.fvu(x, random(x).detach())


# rows about models, in which nothing is learnt by a dictionary: their controls are shuffled or random nodes
OF_MODELS = (
    "transcoder-circuits",
    "attribution-graphs",
    "sparse-attention-decomposition",
    "discrete-circuits",
    "neurons-dead-ngram-positional",
    "auto-interp",
    "single-direction",
    "saebench-evals",
    "sparse-probing",
    "geometry",
    "kernel-heterogeneity",
    "moe-x",
    "neural-operators",
    "clip-second-order",
)


@pytest.mark.parametrize("name", list(PAPERS))
def test_every_table_names_its_controls(name: str) -> None:
    source = inspect.getsource(importlib.import_module(PAPERS.table[name].split(":")[0]))
    assert all(word in source for word in ("controls=", *(() if name in OF_MODELS else ("FROZEN", "RANDOM"))))


TOY = "toy_row:ROW"


def ran(folder: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in (folder / "ran").read_text().splitlines())


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOY_ROW", str(tmp_path))
    return tmp_path


def test_seeds_run_side_by_side_and_are_judged_in_their_order(toy: Path) -> None:
    told: list[tuple[int, int | None]] = []
    found, _ = row.run(TOY, [5, 1, 4], toy, lambda done, total, note: told.append((done, total)))
    assert found.claims[0].ours == [25, 1, 16] and found.notes == ["[[5, -5], [1, -1], [4, -4]]"]
    processes = {line.split()[1] for line in (toy / "ran").read_text().splitlines()}
    assert len(processes) == min(3, torch.get_num_threads()) and not (toy / "seeds").exists()
    assert told[-1] == (6, 6) and told == sorted(told)


def test_what_seeds_share_is_made_once(toy: Path) -> None:
    found, seconds = row.run("toy_row:SHARED", range(3), toy, lambda *_: None)
    assert found.claims[0].ours == [0, 1, 4] and len(seconds) == 3 and not (toy / "seeds").exists()


def test_a_seed_that_fails_leaves_the_others_to_go_on_from(toy: Path) -> None:
    (toy / "fail").touch()
    with pytest.raises(saekit.SaekitError, match="seed = 2 fails"):
        row.run(TOY, [1, 2], toy, lambda *_: None)
    (toy / "fail").unlink()
    assert row.run(TOY, [1, 2, 0], toy, lambda *_: None)[0].claims[0].ours == [1, 4, 0]
    assert ran(toy).count(2) == 2 and ran(toy).count(0) == 1


def test_a_row_that_was_stopped_goes_on_and_leaves_no_process(toy: Path) -> None:
    (toy / "wait").touch()

    def stop(done: int, total: int | None, note: str) -> None:
        if note == "seed 0: done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        row.run(TOY, [0, 3], toy, stop)
    assert multiprocessing.active_children() == []
    (toy / "wait").unlink()
    assert row.run(TOY, [0, 3], toy, lambda *_: None)[0].claims[0].ours == [0, 9]
    assert ran(toy).count(0) == 1


def test_workers_end_with_a_parent_that_is_killed(toy: Path) -> None:
    (toy / "wait").touch()
    code = f"from pathlib import Path; from saekit.papers import row; row.run({TOY!r}, [3, 4], Path({str(toy)!r}), print)"
    places = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "2"}
    )

    def waiting() -> str | None:
        lines = (toy / "ran").read_text().splitlines() if (toy / "ran").exists() else []
        return next((line.split()[1] for line in lines if line.startswith("3 ")), None)

    try:
        until(lambda: waiting() is not None)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not Path(f"/proc/{waiting()}").exists())


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_another_row_measured_is_not_taken(toy: Path) -> None:
    (toy / "seeds").mkdir()
    for seed, text in enumerate(('{"of": "another", "found": {}}', "[]", "{", '{"found": {}}')):
        (toy / f"seeds/{seed}.json").write_text(text)
    assert row.run(TOY, range(4), toy, lambda *_: None)[0].claims[0].ours == [0, 1, 4, 9]


TOYS = {
    "toy": TOY,
    "shared": "toy_row:SHARED",
    "broken": "toy_row:BROKEN",
    "pair": "toy_row:PAIR",
    "hours": "toy_row:HOURS",
}


def test_all_rows_go_on_where_they_were_stopped_and_none_stops_another(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "PAPERS", Registry("paper", TOYS))
    said: list[str] = []

    def every() -> list[dict[str, Any]]:
        return list(result.every(1, 1, toy, lambda name: lambda *_: None, said.append))

    rows = every()
    assert [row["name"] for row in rows] == ["toy", "shared", "broken", "pair"]  # that of hours is left out
    assert rows[2]["failed"].startswith("ZeroDivisionError: ") and "toy_row.py" in rows[2]["failed"]
    assert [row.get("seeds") for row in rows] == [1, 1, None, 2]
    assert said[0].startswith("toy: 1 of 1 claims hold") and said[2].startswith("broken: failed")
    before = ran(toy)
    assert [row for row in every() if "failed" not in row] == [row for row in rows if "failed" not in row]
    assert ran(toy) == before  # taken as they were
    (toy / "toy" / result.RESULT).write_text("{")
    every()
    assert len(ran(toy)) == len(before) + 1
    shown = write_papers(rows, toy / "index.html").read_text()
    assert (
        "4 papers in 0 minutes, of 3 of which every claim holds; 3 of 3 claims hold." in shown
        and "ZeroDivisionError" in shown
    )
    plain = (toy / "index.md").read_text()
    assert "3 of 3 claims hold." in plain and plain.count("| holds |") == 3 and "ZeroDivisionError" in plain


@pytest.mark.browser
def test_in_a_browser_a_paper_s_figure_is_drawn_when_it_is_opened(browser: Browser, tmp_path: Path) -> None:
    drawn = figure("t", "x", "y", {"a": ([1, 2], [2.0, 3.0])})
    found = Reproduction("<b>title</b>", "source", "setting", [claim(0.5), claim(5.0)], drawn, ["a note"])
    row = {
        "name": "one",
        "seconds": 3.0,
        "seeds": 1,
        **json.loads(json.dumps(found.to_json(), default=lambda a: a.tolist())),
    }
    page = write_papers([row, {"name": "two", "failed": "why"}], tmp_path / "index.html")
    browser.open(f"file://{page}")
    assert browser.run("document.querySelectorAll('.main-svg').length") == 0
    browser.run("document.querySelector('details').open = true")
    until(lambda: browser.run("document.querySelectorAll('.main-svg').length") >= 1)
    assert browser.run("document.querySelectorAll('tbody tr').length") == 2
    assert browser.run("document.querySelectorAll('summary b').length") == 0
    assert browser.complaints() == []


def test_all_and_quick_are_asked_for_in_the_right_way(tmp_path: Path) -> None:
    for arguments, words in (
        (("--quick",), "--quick is given without --all"),
        (("matryoshka", "--all"), "'matryoshka' is named beside --all"),
        (("--all", "--peers", sys.executable), "--peers is given beside --all"),
        (("archetypal", "--seeds", "1"), "give --seeds 2 or more"),
    ):
        bad = run(*arguments, "--out", str(tmp_path / "x"))
        assert bad.returncode == 2 and words in bad.stderr and not (tmp_path / "x").exists()


def run(*arguments: str) -> Done:
    return command("reproduce", *arguments)


def test_the_command_lists_and_refuses(tmp_path: Path) -> None:
    assert run().stdout.split() == list(PAPERS)
    bad = run("matryoska", "--out", str(tmp_path / "x"))
    assert bad.returncode == 2 and "did you mean 'matryoshka'" in bad.stderr and not (tmp_path / "x").exists()
    assert run("matryoshka", "--seeds", "0").returncode == 2


def test_peers_are_asked_for_before_any_work(tmp_path: Path) -> None:
    out = str(tmp_path / "x")
    for arguments, words in (
        (("planted-peers",), "give --peers the python"),
        (("planted-peers", "--peers", "/nowhere/python"), "'/nowhere/python' is no file"),
        (("matryoshka", "--peers", sys.executable), "compares with no other toolkit"),
    ):
        bad = run(*arguments, "--out", out)
        assert bad.returncode == 2 and words in bad.stderr and not (tmp_path / "x").exists()
    none = run("planted-peers", "--peers", sys.executable, "--out", out, "--seeds", "1")
    assert none.returncode == 2 and "it has no sae_lens dictionary_learning" in none.stderr


@pytest.mark.peer
@pytest.mark.slow
def test_planted_features_are_recovered_no_worse_than_by_others(tmp_path: Path) -> None:
    done = run("planted-peers", "--peers", os.environ["SAEKIT_PEERS"], "--out", str(tmp_path), "--json")
    assert [c["claim"] for c in json.loads(done.stdout)["claims"] if not c["holds"]] == []


ALONE = ("synth-sae-bench", "synth-sae-bench-16k", "planted-peers")  # not all holds; days; needs peers
# claims that don't hold at this scale, or only just (LOG.md, 2026-11-27), and how far off they may be
MISSED = {
    "transcoders": ("nats by which its CE lies above the SAE's", 0.05),
    "k-sparse": ("the same at the k where it gains least", 0.5),
    "archetypal": ("agreement", 0.03),
}
# claims that plainly don't hold (why is in LOG.md)
FAILED = {
    "discrete-circuits": (
        "induction: the paper's score with shuffled labels",
        "indirect objects: AUC of the score less chance",
    ),
    "sparse-attention-decomposition": ("random head: directions in S",),
    "auto-interp": ("fuzzing won by the",),
    "clip-second-order": (
        "points of accuracy lost with one component for the top 2% of images, layer 0",
        "points of accuracy lost with one component for the top 2% of images, both layers",
    ),
    "kernel-heterogeneity": ("active codes of homogeneous",),
    "moe-x": ("coverage above that of the dense", "loss above that of the same"),
    "neural-operators": ("R2 at twice the resolution over R2 at that of training, convolution",),
    "topic-alignment": ("the same where clamping makes", "a trained dictionary: how many times"),
    "patch-free-othello": ("squares of which a feature", "of the squares' clearest features"),
}


def _near(claim: dict[str, Any], floor: float) -> bool:
    return abs(claim["mean"] - float(claim["demand"].split()[-1])) <= floor


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAPERS if name not in ALONE])
def test_the_claims_hold(name: str, tmp_path: Path) -> None:
    done = run(name, "--out", str(tmp_path), "--json")
    data = json.loads(done.stdout)
    text, floor = MISSED.get(name, ("none is", 0.0))
    failed = [
        c for c in data["claims"] if not (c["holds"] or (c["claim"].startswith(text) and _near(c, floor)))
    ]
    assert all(c["claim"].startswith(FAILED.get(name, ("none is",))) for c in failed), failed
    own = set() if name in OF_MODELS else {FROZEN, RANDOM}
    assert all(data["controls"][m].keys() >= own for m in data["controls"])
    assert (tmp_path / "figure.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "result.json").read_text())["name"] == name


def test_a_run_that_was_interrupted_or_failed_ends_a_reproduction() -> None:
    d = saekit.create("topk", d_in=4, n_features=8, k=2)
    rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def stop(batch_size: int, step: int, seed: int) -> torch.Tensor:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return rows[:batch_size]

    with pytest.raises(KeyboardInterrupt):
        training.fit(d, DrawnSource(stop, 4, "test"), 9, 32)
    with pytest.raises(RuntimeError, match="smaller lr"):
        training.fit_all({"a": saekit.create("topk", d_in=4, n_features=8, k=2)}, rows, 30, 32, lr=1e30)
