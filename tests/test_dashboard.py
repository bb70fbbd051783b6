"""The dashboard of a dictionary: cards equal brute force, explanations and neighbours are shown, thousands stay quick."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from browser import HOSTILE, Browser, Page
from commandline import saekit as command
from torch import nn

import saekit
from saekit.activations import Store
from saekit.autointerp import explanation
from saekit.autointerp.explanation import Explanation, Score
from saekit.report import nearest
from saekit.report.cards import explained, speller, spread
from saekit.report.nearest import CoFiring, nearest_by_decoder
from saekit.report.page import Band, Explained, FeatureCard, RunReport, Window, write
from saekit.types import Codes, SaekitError

POINT = "blocks.1.hook_resid_post"
SCORE = Score("detection", "balanced accuracy", 0.8125, 0.75, 0.875, 80, 0.78, {"shuffled": 0.5}, failures={"refused": 2})  # fmt: skip

QUICK = 300  # milliseconds; on an idle machine a third of it


def said_of(folder, n=64):
    """Explanations of two features in three, beside a dictionary."""
    some = [
        Explanation(f, f"{HOSTILE[f % len(HOSTILE)]} of {f}", ("statistics", "llm")[f % 2],
                    scores=(dataclasses.replace(SCORE, value=f / 64),) if f % 3 == 1 else ())
        for f in range(n) if f % 3
    ]  # fmt: skip
    explanation.save(some, folder, {})
    return some


@pytest.fixture(scope="module")
def run(good, tmp_path_factory):
    """A finished run of 64 features with explanations beside it."""
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    shutil.copytree(good / "run", folder)
    said_of(folder)
    return folder


@pytest.fixture(scope="module")
def page(run, good):
    """Its page, and what the page's script reads."""
    path = saekit.dashboard(run, run / "page.html", model=str(good / "model"), tokens=4096)
    return read(path.read_text())


def read(text):
    """The summaries with their cards, and the rest of the data of a page."""
    data, lines = Page(text).raw["script"][:2]
    data = json.loads(data)
    for one, line in zip(data["features"], lines.split("\n"), strict=True):
        one.update(json.loads(line))
    return data


# ---- what is on the page ----


def test_top_contexts_equal_brute_force_over_the_store(run, good, page, tiny_gpt2):
    d = saekit.load(run)
    batches = list(Store(good / "store").sequences())
    x = torch.cat([b.activations[POINT] for b in batches])
    tokens, mask = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "mask"))
    dense = d.encode(x).to_dense().detach() * mask[..., None]
    texts = page["vocabulary"]
    assert len(page["features"]) == int((dense != 0).flatten(0, 1).any(0).sum())
    for one in page["features"]:
        value = dense[..., one["index"]]
        best, at = value.abs().max(1)
        expected = [r for r in best.argsort(descending=True, stable=True).tolist() if best[r] > 0][:10]
        assert len(one["top"]) == len(expected)
        for window, row in zip(one["top"], expected, strict=True):
            first = int(at[row]) - window["peak"]
            span = slice(first, first + len(window["tokens"]))
            spelled = [tiny_gpt2.tokenizer.decode([t]) for t in tokens[row, span].tolist()]
            assert [texts[t] for t in window["tokens"]] == spelled or "\ufffd" in "".join(spelled)
            active = dict(zip(window["active"][::2], window["active"][1::2], strict=True))
            got = torch.tensor([active.get(i, 0.0) for i in range(len(spelled))])
            torch.testing.assert_close(got, value[row, span], rtol=1e-5, atol=1e-6)
        assert one["density"] == pytest.approx(float((value != 0).sum() / mask.sum()))


def test_explanations_are_shown_with_score_interval_and_controls(run, page):
    d = saekit.load(run)
    said = {one.feature: one for one in explanation.load(run)[0]}
    for one in page["features"]:
        mine = said.get(one["index"])
        if mine is None:
            assert one["said"] == one["explanations"] == [] and one["scores"] == {}
            continue
        (shown,) = one["explanations"]
        assert (one["said"], shown["text"], shown["method"]) == ([mine.text], mine.text, mine.method)
        assert one["scores"] == {s.scorer: s.value for s in mine.scores}
        for score, given in zip(shown["scores"], mine.scores, strict=True):
            assert score == json.loads(
                json.dumps({**dataclasses.asdict(given), "corrected": given.corrected})
            )
    near = {f for one in page["features"] for f, _ in (*one["nearest"], *one["together"])}
    hidden = near - {one["index"] for one in page["features"]}
    assert page["elsewhere"] == {str(f): said[f].text for f in hidden if f in said}
    assert explained(None, None, d) == {}
    with pytest.raises(SaekitError, match=r"explanations name feature 64, .* 64 features"):
        explained([Explanation(64, "x", "human")], None, d)


def test_features_are_chosen_by_number_or_by_density(run, good, tmp_path):
    model, out = str(good / "model"), tmp_path / "page.html"
    few = ("dashboard", str(run), "--model", model, "--tokens", "1024", "--out", str(out))
    done = command(*few, "--feature", "17", "--feature", "3", "--feature", "17", "--json")
    assert done.returncode == 0, done.stderr
    assert [one["index"] for one in read(out.read_text())["features"]] == [3, 17]
    out.unlink()
    for extra, words in (
        (("--feature", "64"), "feature 64 is none"),
        (("--features", "0"), "n_features = 0"),
    ):
        done = command(*few, *extra)
        assert done.returncode == 2 and words in done.stderr and not out.exists()
    for features in (np.array([17, 3]), torch.tensor([3, 17]), (one for one in (3, 17))):
        saekit.dashboard(run, out, model=model, tokens=1024, features=features)
        assert [one["index"] for one in read(out.read_text())["features"]] == [3, 17]
    for features, words in (([1.0], "feature 1.0 is no number"), ([], "features is empty"), ([-1], "feature -1 is none")):  # fmt: skip
        with pytest.raises(SaekitError, match=words):
            saekit.dashboard(run, out, model=model, tokens=1024, features=features)
    density = torch.tensor([0.1, 0, 0.3, 0.2, 0, 0.4])
    assert spread(density, 1000) == [0, 2, 3, 5] and spread(density, 2) == [0, 5]
    assert spread(torch.zeros(3), 2) == [0, 2]
    assert spread(density, 3, {3, 1}) == [0, 3, 5] and spread(density, 1, {0, 2, 3}) == [2]


def test_bytes_that_make_no_character_are_spelled_out(code_lm):
    spell = speller(code_lm.tokenizer)
    text = "é漢🦊 </script>\u202e\x00"
    joined = "".join(map(spell, code_lm.tokenizer(text)["input_ids"])).encode()
    assert rb"\x" in joined and "\ufffd".encode() not in joined
    assert re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), joined) == text.encode()


@pytest.mark.slow
def test_a_thousand_features_over_200_000_tokens_take_a_gigabyte_and_three_minutes(code_lm, tmp_path):
    d = saekit.create("topk", d_in=256, n_features=4096, k=32, seed=0)
    d.reads = d.writes = (POINT,)
    d.set_normalisation(next(iter(saekit.harvest(code_lm, "stdlib", [POINT]))).rows(POINT))
    saekit.save(d, tmp_path / "d")
    code = (
        "import resource, sys, saekit; saekit.dashboard(sys.argv[1], sys.argv[2]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    began = time.monotonic()
    arguments = [sys.executable, "-P", "-c", code, str(tmp_path / "d"), str(tmp_path / "page.html")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    seconds, peak = time.monotonic() - began, int(done.stdout) * 1024
    text = (tmp_path / "page.html").read_text()
    assert len(read(text)["features"]) == 1000
    said = (seconds, peak / 1e9, len(text.encode()) / 1e6)
    assert said[0] < 180 and said[1] < 1 and said[2] < 25, said
    print("seconds, GB, MB:", said)


# ---- what is alike ----


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_nearest_by_decoder_equals_the_whole_matrix_of_cosines(small_dictionary, monkeypatch, block):
    monkeypatch.setattr(nearest, "BLOCK", block)
    weight = nn.functional.normalize(small_dictionary.W_dec.detach(), dim=-1)
    cosine = (weight @ weight.T).fill_diagonal_(-2)
    features = [63, 0, 5]
    for feature, found in zip(features, nearest_by_decoder(small_dictionary, features, 4), strict=True):
        values, order = cosine[feature].sort(descending=True)
        assert [f for f, _ in found] == order[:4].tolist()
        assert [c for _, c in found] == pytest.approx(values[:4].tolist(), abs=1e-6)
    tiny = saekit.create("topk", d_in=4, n_features=3, k=1, seed=0)
    assert [len(found) for found in nearest_by_decoder(tiny, [0, 2], 5)] == [2, 2]  # all there are


def firing(seed=0, rows=40, seq=9, n=30):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, seq, n, generator=g) * (torch.rand(rows, seq, n, generator=g) < 0.15)
    dense[..., 4] = 0
    dense[..., 8] = dense[..., 9] * -2  # fire on the same tokens
    return torch.rand(rows, seq, generator=g) > 0.2, dense


def jaccard(mask, dense, feature, n):
    fires = (dense[mask] != 0).double()
    both = fires.T @ fires[:, feature]
    alike = both / (fires.sum(0) + fires[:, feature].sum() - both).clamp(min=1)
    alike[feature] = 0
    order = sorted(range(len(alike)), key=lambda f: (-float(alike[f]), f))[:n]
    return [(f, float(alike[f])) for f in order if alike[f] > 0]


@pytest.mark.parametrize(("cuts", "cells"), [((), 1 << 20), ((1, 2, 17), 1 << 20), ((5,), 60)])
def test_co_firing_equals_brute_force_however_it_is_cut(monkeypatch, cuts, cells):
    monkeypatch.setattr(nearest, "CELLS", cells)
    mask, dense = firing()
    features = [9, 4, 0, 29]
    counts = CoFiring(30, features)
    for low, high in itertools.pairwise([0, *cuts, len(mask)]):
        counts.add(mask[low:high], Codes.from_dense(dense[low:high]))
    assert counts.n_tokens == int(mask.sum())
    for feature, found in zip(features, counts.nearest(6), strict=True):
        assert found == jaccard(mask, dense, feature, 6)
    assert counts.nearest(1)[0] == [(8, 1.0)] and counts.nearest()[1] == []


def test_co_firing_counts_a_sample_of_the_batches_where_memory_ends():
    mask, dense = firing(rows=64)
    counts = CoFiring(30, [2], capacity=400)
    for row in range(64):
        counts.add(mask[row : row + 1], Codes.from_dense(dense[row : row + 1]))
        assert sum(len(features) for _, features in counts._kept) <= 400
    step = counts._stride
    kept = slice(0, 64, step)
    assert step > 1 and counts.n_tokens == int(mask[kept].sum())
    assert counts.nearest(6)[0] == jaccard(mask[kept], dense[kept], 2, 6)


def test_a_unit_chosen_twice_for_a_token_fires_once():
    offsets, values = torch.tensor([0, 3, 5]), torch.tensor([1.0, 4.0, 2.0, 1.0, 1.0])
    codes = Codes(offsets, torch.tensor([2, 7, 2, 7, 2]).int(), values, 9, (1, 2))
    counts = CoFiring(9, [2])
    counts.add(torch.ones(1, 2, dtype=torch.bool), codes)
    assert counts.nearest() == [[(7, 1.0)]]


# ---- in a browser ----

MANY = 1200
LISTED = "[...document.querySelectorAll('#list a')].map((link) => Number(link.dataset.index))"
HEADING = "document.getElementById('detail-title').textContent"
DETAIL = "document.getElementById('detail')"


def many(n=MANY):
    """A report of many features, with hostile texts, 20 contexts each, explanations, scores and neighbours."""
    rng = np.random.default_rng(0)
    words = [*HOSTILE, *(f" word{i}" for i in range(3000))]

    def window():
        tokens = tuple(words[i] for i in rng.integers(0, len(words), 33))
        size = rng.exponential(1, 33).astype(np.float32) * (rng.random(33) < 0.15)
        return Window(tokens, (*map(float, size[:16]), 3.5, *map(float, size[17:])), 16, "a.py; row 3")

    pool = [window() for _ in range(500)]

    def windows(count):
        return tuple(pool[i] for i in rng.integers(0, len(pool), count))

    def card(f):
        score = dataclasses.replace(SCORE, value=(f * 37 % n) / n, low=0.1, high=0.9, notes=(HOSTILE[1],))
        said = Explained(f"{HOSTILE[f % len(HOSTILE)]} meaning{f}", "statistics", (score,) if f % 2 else ())
        near = ((f + 1) % n, 0.9), (n + 5, 0.5)
        bands = tuple(Band(b / 5, (b + 1) / 5, 1, 2, windows(2)) for b in range(5))
        logits = tuple((word, 1.5) for word in HOSTILE[:10])
        return FeatureCard(2 * f, 0.1 + f / n / 10, 3.5, 1000, (0, 1, 2), (5, 7), windows(10),
                           bands, logits, logits, near, near, (said,) if f % 3 else ())  # fmt: skip

    return RunReport(HOSTILE[0], features=tuple(map(card, range(n))), elsewhere={n + 5: HOSTILE[0]})


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "page.html"
    report = many()
    write(report, path)
    return report, path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium here: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.call("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)  # fmt: skip
    browser.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)  # fmt: skip
    yield browser
    browser.close()


def quickest(browser, act, tries=3):
    """Milliseconds of an act until the page is laid out, the best of a few: other jobs share the machine."""
    timed = f"(() => {{ const began = performance.now(); {act}; document.body.getBoundingClientRect(); return performance.now() - began; }})()"
    return min(browser.run(timed) for _ in range(tries))


def typed(name, value, kind):
    return f"{{ const one = document.getElementById('{name}'); one.value = {json.dumps(value)}; one.dispatchEvent(new Event('{kind}', {{ bubbles: true }})); }}"


def test_a_page_of_many_features_is_small(large):
    _, path = large
    assert path.stat().st_size < 25e6 * MANY / 1000 - 5e6  # 5 MB are for the library of charts


@pytest.mark.browser
def test_in_a_browser_only_what_is_in_view_is_in_the_document(chromium, large):
    report, path = large
    chromium.open(path.as_uri())
    rows = "document.querySelectorAll('#list li').length"
    assert 10 < chromium.run(rows) < 70
    order = [card.index for card in report.features]
    end = "document.getElementById('list').scrollTop = 1e9; document.getElementById('list').dispatchEvent(new Event('scroll'))"
    for share in (0.5, 0.25, 0.9):
        chromium.run(f"{{ const box = document.getElementById('list'); box.scrollTop = box.scrollHeight * {share}; }} new Promise((done) => setTimeout(done, 100))")  # fmt: skip
        seen = chromium.run(LISTED)
        first = order.index(seen[0])
        assert seen == order[first : first + len(seen)] and len(seen) < 70
        assert abs(first / MANY - share) < 0.05
    assert quickest(chromium, end) < QUICK
    assert chromium.run(LISTED)[-1] == order[-1]

    # the row that has the focus stays in the document wherever the list is scrolled to, and arrows go on from it
    chromium.open(path.as_uri())
    chromium.run("document.querySelector('#list a').focus()")
    chromium.press("ArrowDown", "ArrowDown")
    chromium.run(
        "document.getElementById('list').scrollTop = 20000; new Promise((done) => setTimeout(done, 100))"
    )
    assert chromium.run("document.activeElement.dataset.index") == str(order[2])
    assert chromium.run(LISTED)[0] == order[2] and chromium.run(LISTED)[1] > 500
    chromium.press("ArrowDown")
    assert chromium.run(HEADING) == f"Feature {order[3]}"
    assert chromium.run("document.activeElement.dataset.index") == str(order[3])
    assert not chromium.complaints()


@pytest.mark.browser
def test_in_a_browser_search_and_sort_are_quick_and_right(chromium, large):
    report, path = large
    chromium.open(path.as_uri())
    count = "Number(document.getElementById('status').textContent.split(' ')[0].replace(',', ''))"

    def search(query):
        chromium.run(typed("query", query, "input"))
        return chromium.run(LISTED), chromium.run(count)

    assert quickest(chromium, typed("query", "word12", "input")) < QUICK  # the first try makes the index
    chromium.run("new Promise((done) => setTimeout(done, 1500))")
    queries = ("e", "word1", "word12 word", "no such text", "meaning7")
    for query in queries:
        assert quickest(chromium, typed("query", query, "input")) < QUICK
    assert search("#246")[0][0] == 246 and all(str(i).startswith("246") for i in search("#246")[0])
    assert search("246")[0][0] == 246
    assert search("MEANING77")[0][:2] == [2 * 77, 2 * 770]
    for query in (*queries, "</SCRIPT>", "{{ 7", "word5 word", report.features[700].top[0].tokens[16], "49"):
        assert search(query)[1] == sum(answers(card, query.lower()) for card in report.features), query
    assert search("zzzz")[0] == [] and chromium.run(HEADING) == "No feature matches."
    search("")

    graded = [one for one in report.features if score_of(one) is not None]
    rest = [one for one in report.features if score_of(one) is None]
    for kind, expected in (
        ("density", sorted(report.features, key=lambda one: one.density)),
        ("-density", sorted(report.features, key=lambda one: -one.density)),
        ("score:detection", sorted(graded, key=score_of) + rest),
        ("-score:detection", sorted(graded, key=lambda one: -score_of(one)) + rest),
    ):
        assert quickest(chromium, typed("sort", kind, "change")) < QUICK
        for share in (0, 1):
            chromium.run(f"{{ const box = document.getElementById('list'); box.scrollTop = {share} * box.scrollHeight; }} new Promise((done) => setTimeout(done, 100))")  # fmt: skip
            part = slice(20) if share == 0 else slice(-20, None)
            assert chromium.run(LISTED)[part] == [one.index for one in expected][part]
    assert not chromium.complaints()


def answers(card, query):
    """Whether a feature is found: by number, explanation, a top context where it fires, or a token it promotes."""
    texts = [said.text.lower() for said in card.explanations]
    texts.append("\n\n".join(text.lower() for text, _ in (*card.promoted, *card.suppressed)))
    if str(card.index).startswith(query) or any(query in text for text in texts):
        return True
    for one in card.top:
        words = [token.lower() for token in one.tokens]
        ends = list(itertools.accumulate(map(len, words)))
        active = [(end - len(word), end) for word, end, value in zip(words, ends, one.activations, strict=True) if value]  # fmt: skip
        for hit in re.finditer(f"(?={re.escape(query)})", "".join(words)):
            if any(start < hit.start() + len(query) and end > hit.start() for start, end in active):
                return True
    return False


def score_of(card):
    return next((s.value for said in card.explanations for s in said.scores), None)


@pytest.mark.browser
def test_in_a_browser_a_feature_is_opened_with_all_that_is_known(chromium, large):
    report, path = large
    card = report.features[601]
    chromium.open(f"{path.as_uri()}#f={card.index}")
    assert chromium.run("document.title") == HOSTILE[0]  # not "pwned"
    assert quickest(chromium, "document.querySelector('#list a[aria-current]').click()") < QUICK
    shown = chromium.run(f"{DETAIL}.textContent")
    for word in ("statistics", "meaning601", "balanced accuracy", "0.1 to 0.9", "controls: shuffled 0.5", "2 failed: refused 2", "failures as wrong 0.78", "n 80"):  # fmt: skip
        assert word in shown, word
    assert len(card.top) + 10 == chromium.run("document.querySelectorAll('.context').length")
    tips = "[...document.querySelectorAll('.context')[0].querySelectorAll('.token')].map((one) => one.dataset.tip.split('\\n')[0])"
    assert [json.loads(text) for text in chromium.run(tips)] == list(card.top[0].tokens)
    promoted = "[...document.querySelectorAll('.logits')[0].querySelectorAll('.token')].map((one) => one.textContent)"
    assert chromium.run(promoted)[:2] == HOSTILE[:2]
    near = chromium.run(
        "[...document.querySelectorAll('.near')[0].querySelectorAll('li')].map((one) => one.textContent)"
    )
    assert near[0].startswith("602") and near[0].endswith("0.90")
    assert near[1] == f"{MANY + 5}{HOSTILE[0]}0.50"
    chromium.run("document.querySelector('.near a').click()")
    assert chromium.run(HEADING) == "Feature 602" and chromium.run("location.hash") == "#f=602"
    assert chromium.run("document.querySelector('#list a[aria-current]').dataset.index") == "602"
    assert chromium.run(f"document.images.length + {DETAIL}.querySelectorAll('script, b > b').length") == 0
    assert not chromium.complaints()
