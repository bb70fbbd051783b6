"""``saekit steer``: a table and a page of effect against damage, with controls that do as much damage."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import HOSTILE, Browser, Page
from commandline import saekit as command
from refusals import leftovers, refusal, swap

import saekit
from saekit import metrics
from saekit.models import Model, load_model
from saekit.report import steering
from saekit.steer import Steering
from saekit.types import SaekitError

COMMAND = [
    "steer", "{good}/model", "--dictionary", "{good}/run", "--feature", "12", "--strengths", "0,20,60", "--text", "{good}/long.py",
    "--tokens", "128", "--controls", "2", "--prompt", "def main(", "--new-tokens", "4", "--out", "{out}",
]  # fmt: skip


def filled(argv: list[str], good: Path, out: Path) -> list[str]:
    return [word.replace("{good}", str(good)).replace("{out}", str(out)) for word in argv]


@pytest.fixture(scope="module")
def done(good: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What the command writes, and its JSON."""
    out = tmp_path_factory.mktemp("steering") / "out"
    more = ["--way", "add", "--save", str(out / "s.json"), "--checkpoint", str(out / "model"), "--json"]
    end = command(*filled([*COMMAND, *more], good, out))
    assert end.returncode == 0, end.stderr
    return out, json.loads(end.stdout)


def test_the_table_says_what_was_measured(done: tuple[Path, dict[str, Any]], good: Path) -> None:
    """KL, loss and effect again by hand, from the model's own logits; controls within 5 % of the feature's KL."""
    out, data = done
    m, d = load_model(str(good / "model")), saekit.load(good / "run")
    ids = torch.tensor(data["targets"])
    effects = steering.direct_effects(m, d, [12])[0]
    assert data["targets"] == effects.topk(10).indices.tolist() and len(data["target_texts"]) == 10
    direction = d.norm_out.directions(d.W_dec[12:13])
    head, gain = m.module.lm_head.weight, m.module.transformer.ln_f.weight
    lens = ((direction - direction.mean()) * gain @ head.T)[0]
    torch.testing.assert_close(effects, lens - lens.mean(), rtol=1e-4, atol=1e-5)
    assert [row["strength"] for row in data["rows"]] == [0.0, 20.0, 60.0]
    (batch,) = saekit.harvest(m, str(good / "long.py"), list(d.reads), tokens=128, context=64, split="all")
    given = m.inputs(batch.tokens, torch.ones_like(batch.tokens))
    with torch.no_grad():
        before = m.logits(given)
    inside = batch.mask[:, 1:] & batch.mask[:, :-1]
    chance = before.softmax(-1)[batch.mask][:, ids].sum(-1).mean().item()
    assert data["base"]["probability"] == pytest.approx(chance, rel=1e-4) and data["base"]["kl"] == 0
    for row in data["rows"]:
        with torch.no_grad(), saekit.steer(m, d, add={12: row["strength"]}):
            after = m.logits(given)
        measured = row["measured"]
        assert measured["kl"] == pytest.approx(
            metrics.kl(before, after)[batch.mask].mean().item(), rel=1e-3, abs=1e-6
        )
        ce = metrics.cross_entropy(after[:, :-1], batch.tokens[:, 1:])[inside].mean().item()
        assert measured["ce"] == pytest.approx(ce, rel=1e-4)
        ratio = after.softmax(-1)[batch.mask][:, ids].sum(-1).mean().item() / chance
        assert row["factor"] == pytest.approx(ratio, rel=1e-3)
        assert row["effect"] == pytest.approx(math.log(ratio), abs=1e-3)
        assert row["tried"] == (4 if row["strength"] else 0)
        for control in row["controls"]:
            assert control["measured"]["kl"] == pytest.approx(measured["kl"], rel=steering.NEAR)
            assert control["kind"] in steering.KINDS and (control["kind"], control["number"]) != (
                "random feature",
                12,
            )
    assert {c["kind"] for c in data["rows"][2]["controls"]} == set(steering.KINDS)
    assert data["rows"][0]["factor"] == pytest.approx(1.0) and data["rows"][2]["factor"] > 1.2
    assert data["rows"][2]["factor"] > data["rows"][2]["mean_factors"]["random direction"]
    assert json.loads((out / "sweep.json").read_text())["rows"] == data["rows"]


def test_what_is_saved_does_the_same(done: tuple[Path, dict[str, Any]], good: Path) -> None:
    out, data = done
    m, d = load_model(str(good / "model")), saekit.load(good / "run")
    prompt = "def main("
    given = m.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with saekit.steer(m, d, out / "s.json"):
        text = m.generate(prompt, 4)
        with torch.no_grad():
            ours = m.module(given).logits
    assert text == prompt + data["samples"][2]
    plain = load_model(str(out / "model"))
    assert plain.generate(prompt, 4) == text
    with torch.no_grad():
        torch.testing.assert_close(plain.module(given).logits, ours, rtol=1e-5, atol=1e-5)
        base = m.module(given).logits
    rise = [x[0, -1].log_softmax(-1)[data["targets"]].logsumexp(0) for x in (ours, base)]
    assert data["prompt_effects"][2] == pytest.approx(float(rise[0] - rise[1]), abs=1e-3)
    assert Steering.load(out / "s.json").parts[0].edits == (saekit.Edit(12, add=60.0),)


def test_text_and_targets_of_ones_own(good: Path, tmp_path: Path) -> None:
    given = filled(COMMAND, good, tmp_path / "x")[:-2]
    end = command(*given, "--controls", "0", "--target", "def", "--target", "'7'", "--target", "300")
    assert end.returncode == 0, end.stderr
    lines = end.stdout.splitlines()
    assert lines[0].startswith("targets: 'def', '7', ") and "random directions" in lines[2]
    assert [line.split()[0] for line in lines[3:6]] == ["0", "20", "60"]
    assert [line.split(":")[0] for line in lines[6:9]] == ["0", "20", "60"]
    assert end.stderr.count("strength ") >= 3 and not (tmp_path / "x").exists()


def test_the_page_asks_for_nothing_and_shows_text_as_text(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    page = (done[0] / "sweep.html").read_text()
    assert steering.POLICY in page and "Feature 12" in page and "random directions" in page
    measured = [steering.Measured(kl, 3.0, chance) for kl, chance in ((0.0, 0.01), (0.1, 0.02))]
    control = steering.Control("random feature", 5, 3.0, measured[1])
    rows = tuple(steering.Row(float(i), measured[1], (control,), 1) for i in range(len(HOSTILE)))
    found = steering.Sweep(3, "set", (1, 2), measured[0], 2.0, 0.1, 100, rows)
    file = steering.draw(found, HOSTILE, HOSTILE, HOSTILE[0], tmp_path / "hostile.html")
    parsed = Page(file.read_text(encoding="utf-8"))
    assert parsed.tags.count("script") == page.count("<script") and "img" not in parsed.tags
    assert parsed.tags.count("tr") == len(HOSTILE) + 1
    assert not [value for key, value in parsed.attributes if key in ("src", "href", "onerror")]


@pytest.mark.browser
def test_in_a_browser_the_page_draws_itself(browser: Browser, done: tuple[Path, dict[str, Any]]) -> None:
    address = f"file://{done[0] / 'sweep.html'}"
    browser.open(address)
    assert browser.run("document.querySelectorAll('.main-svg').length") >= 1
    points = browser.run("document.querySelectorAll('.scatterlayer .point').length")
    controls = sum(len(row["controls"]) for row in done[1]["rows"])
    assert points == 2 + controls
    assert browser.run("document.querySelectorAll('tbody tr').length") == 3
    sent = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    assert [url for url in sent if not url.startswith(("data:", "blob:"))] == [address]
    assert browser.complaints() == []


WRONG: dict[str, tuple[list[str], str]] = {
    "no numbers": (swap(COMMAND, "0,20,60", "0,a"), "strengths = '0,a' must be numbers"),
    "no finite numbers": (swap(COMMAND, "0,20,60", "0,inf"), "strengths = '0,inf' must be numbers"),
    "a feature that is none": (swap(COMMAND, "12", "64"), "feature 64 is none of the dictionary's 64"),
    "a way that is none": ([*COMMAND, "--way", "scale"], "way = 'scale' must be one of set, add"),
    "a target of several tokens": ([*COMMAND, "--target", "def main(self"], "tokens; give text that is one token"),
    "a target that is none": ([*COMMAND, "--target", "4096"], "target 4096 is no token"),
    "a text that is not there": (swap(COMMAND, "{good}/long.py", "/no/such.txt"), "/no/such.txt"),
    "an empty side": ([*COMMAND, "--split", "held_out"], "'held_out' side"),
    "a dictionary that is not there": (swap(COMMAND, "{good}/run", "{good}/nosuch"), "nosuch"),
    "a dictionary of another model": (swap(COMMAND, "{good}/run", "{good}/narrow"), "names no hook point"),
    "an empty prompt": (swap(COMMAND, "def main(", ""), "prompt is empty"),
    "a checkpoint of values that are set": ([*COMMAND, "--checkpoint", "{out}/model"], "needs --way add"),
    "a checkpoint where something lies": ([*COMMAND, "--way", "add", "--checkpoint", "{good}/model"], "holds something already"),
    "a folder as a file": ([*COMMAND, "--save", "{good}"], "is a folder; name a file"),
    "a folder below a file": (swap(COMMAND, "{out}", "{good}/text.py/x"), "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(
    case: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    argv, words = WRONG[case]
    assert words in refusal(filled(argv, good, tmp_path / "out"), monkeypatch, capfd)
    assert leftovers(tmp_path / "out") == [] and not list(tmp_path.rglob("steering.*"))


def test_what_cannot_be_measured_is_refused(tiny_gpt2: Model, mlp: torch.nn.Module, good: Path) -> None:
    d = saekit.load(good / "run")
    neutral = steering.Neutral(tiny_gpt2, d, str(good / "long.py"), tokens=64, split="all")
    for options, words in (
        ({"strengths": []}, "strengths = [] must be finite numbers"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": [4096]}, "target 4096 is none of the model's 4,096 tokens"),
        ({"targets": [-1]}, "target -1 is none of the model's 4,096 tokens"),
        ({"way": "clamp"}, "way = 'clamp'"),
        ({"feature": 64}, "feature 64 is none"),
    ):
        with pytest.raises(SaekitError) as told:
            steering.sweep(neutral, **{"feature": 3, "strengths": [1.0], **options})
        assert words in str(told.value)
    with pytest.raises(SaekitError, match="target -1 is none"):
        neutral.measure().of([-1])
    with pytest.raises(SaekitError, match="target 4096 is none"):
        steering.prompt_effects(tiny_gpt2, torch.tensor([[1, 2]]), [[(d, {3: 1.0})]], [4096])
    with pytest.raises(SaekitError, match="predicts no tokens"):
        steering.Neutral(mlp, d)
    inside = saekit.create("topk", d_in=128, n_features=64, k=4)
    inside.reads = inside.writes = ("blocks.1.mlp.act",)
    with pytest.raises(SaekitError, match="name targets"):
        steering.promoted(tiny_gpt2, inside, 3)


def test_targets_count_once_and_generators_are_taken(tiny_gpt2: Model, good: Path) -> None:
    d = saekit.load(good / "run")
    neutral = steering.Neutral(tiny_gpt2, d, str(good / "long.py"), tokens=64, split="all")
    once = steering.sweep(neutral, 3, [1.0, 2.0], [5, 7], controls=0)
    assert steering.sweep(neutral, 3, iter([1.0, 2.0]), iter([5, 7, 5]), controls=0) == once
    assert once.targets == (5, 7) and len(once.rows) == 2
    ids, changes = torch.tensor([[1, 2]]), [[(d, {3: 5.0})]]
    effects = [steering.prompt_effects(tiny_gpt2, ids, changes, targets) for targets in ([5, 7], [5, 7, 7])]
    assert effects[0] == effects[1]


@pytest.mark.parametrize(("law", "wanted"), [(1.7, 1e-3), (2.0, 7.0), (0.4, 0.5)])
def test_a_control_is_as_strong_as_the_kl_asks_for(law: float, wanted: float) -> None:
    """By a known law of KL; what was measured is kept, and a KL that is never reached is told."""

    class Known(steering.Arm):
        runs = 0

        def run(self, strength: float) -> steering.Predicted:
            self.runs += 1
            return steering.Predicted(strength**law, 0.0, torch.zeros(1))

    neutral: Any = None
    arm = Known.__new__(Known)
    arm.neutral, arm.curve = neutral, {}
    strength, reached = arm.at(wanted, 50.0) or (0.0, None)
    assert reached is not None and strength**law == pytest.approx(wanted, rel=steering.NEAR)
    assert arm.runs <= 12 and arm.at(wanted, 1.0) == (strength, reached)
    before = arm.runs
    assert arm.at(wanted * 1.02, 1.0) is not None and arm.runs <= before + 1

    class Flat(Known):
        def run(self, strength: float) -> steering.Predicted:
            return steering.Predicted(2.0, 0.0, torch.zeros(1))

    flat = Flat.__new__(Flat)
    flat.curve = {}
    assert flat.at(1.0, 1.0) is None
