"""The run report: contexts equal brute force, the page stands alone, and hostile text stays text."""

import dataclasses
import gc
import itertools
import json
import re
import socket
import tracemalloc

import numpy as np
import pytest
import torch
from browser import HOSTILE, Page

from saekit.autointerp.explanation import Score
from saekit.report.contexts import ContextCollector, _mix
from saekit.report.page import Explained, Metric, RunReport, feature_card, render, write
from saekit.types import Codes, SaekitError

N_FEATURES, ROWS, SEQ = 40, 24, 17
FEATURES = [31, 0, 7, 39, 12, 5]  # 5 never fires


def world(seed=0, rows=ROWS, seq=SEQ):
    """Tokens, documents, mask, and dense activations with ties, both signs, and huge masked values."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, len(HOSTILE), (rows, seq), generator=generator)
    documents = torch.randint(0, 3, (rows, 1), generator=generator) + torch.arange(seq) // 6
    mask = torch.rand(rows, seq, generator=generator) > 0.15
    dense = torch.randn(rows, seq, N_FEATURES, generator=generator)
    dense = (dense * 4).round() / 4 * (torch.rand(dense.shape, generator=generator) < 0.2)
    dense[:, :, 0] = dense[:, :, 0].relu()
    dense[:, :, 5] = 0
    dense[~mask] *= 1000
    return tokens, documents, mask, dense


def collect(data, cuts=(), features=FEATURES, **options):
    collector = ContextCollector(N_FEATURES, features, data[0].shape[1], **options)
    for low, high in itertools.pairwise([0, *cuts, data[0].shape[0]]):
        tokens, documents, mask, dense = (part[low:high] for part in data)
        collector.add(tokens, documents, mask, Codes.from_dense(dense))
    return collector.result()


def brute_force(data, feature, n_top, n_quantile, per_quantile, radius, reservoir, seed):
    """The same result by loops over one feature's dense activations."""
    tokens, documents, mask, dense = data
    rows, seq = tokens.shape
    value = dense[:, :, feature]

    def context(row, at):
        places = range(max(0, at - radius), min(seq, at + radius + 1))
        return {
            "tokens": tuple(int(tokens[row, place]) for place in places),
            "activations": tuple(float(value[row, place]) if mask[row, place] else None for place in places),
            "documents": tuple(int(documents[row, place]) for place in places),
            "peak": at - places[0],
            "row": row,
            "position": at,
            "looked": None,
            "strongest": None,
        }

    fires = [(r, p) for r in range(rows) for p in range(seq) if mask[r, p] and value[r, p] != 0]
    size = {place: abs(float(value[place])) for place in fires}
    best = {}
    for row, at in fires:
        if row not in best or size[row, at] > size[row, best[row]]:
            best[row] = at
    top = sorted(best.items(), key=lambda place: (-size[place], place))[:n_top]

    def scalar_mix(number):
        return int(_mix(np.array([number % 2**64], dtype=np.uint64))[0])

    salt = scalar_mix(scalar_mix(seed) + feature)
    key = {(r, p): scalar_mix(salt + r * seq + p) for r, p in fires}
    drawn = sorted(sorted(fires, key=key.get)[:reservoir], key=lambda place: (size[place], place))
    bands = []
    for band in reversed(range(n_quantile)):
        members = drawn[band * len(drawn) // n_quantile : (band + 1) * len(drawn) // n_quantile]
        if members:
            shown = sorted(members, key=key.get)[:per_quantile]
            shown.sort(key=lambda place: (-size[place], place))
            bands.append((size[members[0]], size[members[-1]], [context(*place) for place in shown]))
    peak = float(value[top[0]]) if top else 0.0
    return [context(*place) for place in top], bands, len(fires) / int(mask.sum()), peak


@pytest.mark.parametrize(
    "options",
    [
        {"n_top": 10, "n_quantile": 5, "per_quantile": 2, "radius": 4, "reservoir": 20, "seed": 3},
        {"n_top": 3, "n_quantile": 4, "per_quantile": 3, "radius": 0, "reservoir": 128, "seed": 2**63 + 1},
        {"n_top": 100, "n_quantile": 1, "per_quantile": 1, "radius": 30, "reservoir": 1, "seed": 0},
    ],
)
def test_contexts_equal_brute_force(options):
    data = world()
    for feature, found in zip(FEATURES, collect(data, cuts=(5, 6, 15), **options), strict=True):
        top, bands, density, peak = brute_force(data, feature, **options)
        assert [dataclasses.asdict(context) for context in found.top] == top
        seen = [(b.low, b.high, [dataclasses.asdict(one) for one in b.contexts]) for b in found.bands]
        assert seen == bands
        assert (found.index, found.density, found.max_activation) == (feature, density, peak)
        assert len({context.row for context in found.top}) == len(found.top)
        value = data[3][:, :, feature][data[2]]
        counts, _ = np.histogram(value[value != 0], bins=found.histogram_edges or 1)
        assert list(found.histogram_counts) == (counts.tolist() if found.histogram_edges else [])


def test_contexts_say_what_a_feature_looks_at():
    """What each token of the window adds to the peak, and the one of the whole row that adds most."""
    tokens, documents, mask, dense = world()
    adds = torch.randn(N_FEATURES, *tokens.shape, tokens.shape[1], generator=torch.Generator().manual_seed(1))
    collector = ContextCollector(N_FEATURES, FEATURES, tokens.shape[1], radius=3, looks_back=True)
    for low, high in ((0, 7), (7, len(tokens))):
        own = adds[:, low:high].numpy()
        parts = (part[low:high] for part in (tokens, documents, mask))
        collector.add(*parts, Codes.from_dense(dense[low:high]), lambda f, row, at, own=own: own[f, row, at])
    n = 0
    for found in collector.result():
        for one in (*found.top, *(context for band in found.bands for context in band.contexts)):
            every = adds[found.index, one.row, one.position]
            first = one.position - one.peak
            assert one.looked == tuple(every[first : first + len(one.tokens)].tolist())
            most = int(every.argmax())
            assert one.strongest == (one.position - most, int(tokens[one.row, most]), float(every[most]))
            n += 1
    assert n > 20
    with pytest.raises(SaekitError, match="looks"):
        collector.add(tokens, documents, mask, Codes.from_dense(dense))


def test_masked_positions_never_count_and_unfired_features_are_empty():
    data = world(seed=1)
    for found in collect(data):
        contexts = [*found.top, *(one for band in found.bands for one in band.contexts)]
        assert all(data[2][one.row, one.position] for one in contexts)
        assert abs(found.max_activation) < 100  # masked values are 1000 times larger
    assert all(found.n_tokens == int(data[2].sum()) for found in collect(data))
    dead = collect(data)[FEATURES.index(5)]
    assert (dead.top, dead.bands, dead.density, dead.histogram_counts) == ((), (), 0.0, ())


@pytest.mark.parametrize("cuts", [(1,), (3, 4, 20), tuple(range(1, ROWS))])
def test_independent_of_the_batch_split(cuts):
    data = world(seed=2)
    data[3].mul_(torch.logspace(-3, 3, ROWS)[:, None, None])  # the histogram has to grow on its way
    assert collect(data, cuts, reservoir=16) == collect(data, reservoir=16)


def test_a_unit_chosen_twice_for_one_token_counts_once_with_its_sum():
    offsets = torch.tensor([0, 3, 5])
    indices, values = torch.tensor([2, 7, 2, 7, 7]).int(), torch.tensor([1.0, 4.0, 2.0, 1.0, -1.0])
    codes = Codes(offsets, indices, values.requires_grad_().bfloat16(), N_FEATURES, (1, 2))
    collector = ContextCollector(N_FEATURES, torch.tensor([2, 7]), 2)
    collector.add(torch.tensor([[8, 9]]), None, torch.ones(1, 2, dtype=torch.bool), codes)
    two, seven = collector.result()
    assert two.top[0].activations == (3.0, 0.0) and two.n_active == 1 and two.top[0].documents is None
    assert seven.top[0].activations == (4.0, 0.0) and seven.n_active == 1


def test_the_draw_is_uniform():
    data = world(seed=3, rows=10)
    fires = int(((data[3][:, :, 0] != 0) & data[2]).sum())
    hits: dict[tuple[int, int], int] = {}
    for seed in range(150):
        (found,) = collect(data, features=[0], n_quantile=1, per_quantile=8, reservoir=8, seed=seed)
        for one in found.bands[0].contexts:
            hits[one.row, one.position] = hits.get((one.row, one.position), 0) + 1
    assert len(hits) == fires
    expected = 150 * 8 / fires
    chi_square = sum((count - expected) ** 2 / expected for count in hits.values())
    assert abs(chi_square - fires) < 5 * (2 * fires) ** 0.5


def test_memory_does_not_grow_with_the_number_of_tokens():
    tokens, documents, mask, dense = world()
    codes = Codes.from_dense(dense)

    def peak(batches):
        collector = ContextCollector(N_FEATURES, range(20), SEQ, reservoir=16)
        gc.collect()
        gc.freeze()  # what other tests left is not looked through each time
        tracemalloc.start()
        for _ in range(batches):
            collector.add(tokens, documents, mask, codes)
            gc.collect()  # what is unreachable is not held
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.unfreeze()
        return highest

    peak(1)
    assert peak(50) < 1.3 * peak(5)  # ten times the batches


def test_bad_input_is_refused_with_the_field_and_the_fix():
    tokens, documents, mask, dense = world()
    for features, word in [([40], "40"), ([-1], "-1"), ([1, 1], "twice")]:
        with pytest.raises(SaekitError, match=f"features: .*{word}"):
            ContextCollector(N_FEATURES, features, SEQ)
    with pytest.raises(SaekitError, match=r"reservoir=3 .* at least 10"):
        ContextCollector(N_FEATURES, [1], SEQ, reservoir=3)
    collector = ContextCollector(N_FEATURES, [1], SEQ)
    with pytest.raises(SaekitError, match="tokens: shape"):
        collector.add(tokens[:, :3], documents[:, :3], mask[:, :3], Codes.from_dense(dense[:, :3]))
    with pytest.raises(SaekitError, match="codes: shape"):
        collector.add(tokens, documents, mask, Codes.from_dense(dense.flatten(0, 1)))
    with pytest.raises(SaekitError, match="nan or infinite"):
        collector.add(tokens, documents, mask, Codes.from_dense(dense / 0))


def run_report(words, curves=True):
    """A report whose every text is one of ``words``, from a collector's real output."""
    text = [words[place % len(words)] for place in range(len(HOSTILE))]
    found = collect(world(), n_top=4, radius=6)
    logits = [(word, 2.5 - place) for place, word in enumerate(text)]
    steps = list(range(5000))
    lines = {
        f"loss/{text[3]}": (steps, [1e3 / (s + 1) for s in steps]),
        "loss/b": (steps, [float("nan")] * 5000),
    }
    metrics = (
        Metric(
            text[0],
            0.14,
            1000,
            text[1],
            0.13,
            0.15,
            {f"{text[2]}1": 0.9, f"{text[3]}2": 0.14},
            "lower",
            text[4],
        ),
        Metric("l0", 32),
        Metric("kl", float("nan"), low=0.1, high=0.2),
    )
    scores = (
        Score(text[0], text[3], 0.9, 0.8, 0.95, 80, 0.85, {text[2]: 0.5, "b": None}, {text[4]: 0.7}, {text[5]: 3}, notes=(text[6],)),
        Score("none", "r", None, None, None, 0),
    )  # fmt: skip
    more = {
        "nearest": ((FEATURES[0], 0.5), (99, -0.1)),
        "together": ((FEATURES[1], 0.25),),
        "explanations": (Explained(text[3], "statistics", scores), Explained(text[9], "llm")),
    }
    return RunReport(
        title=text[0],
        facts=((text[6], text[7]), (text[8], text[1])),
        curves={**lines, text[1]: (steps, [3.0] * 5000)} if curves else {},
        density=[0.0, 0.1, 1.0, 2e-5] if curves else (),
        metrics=metrics,
        features=tuple(feature_card(one, text.__getitem__, logits, logits[:2], str, **more) for one in found),
        notes=tuple(text),
        versions={text[3]: text[8]},
    )


def test_the_page_is_one_valid_file_that_loads_nothing():
    page = Page(render(run_report(["plain"])))
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    referred = [v for n, v in page.attributes if n in ("aria-labelledby", "aria-controls")]
    assert set(referred) <= {*names, "detail-title"}  # the script draws that one
    for name, value in page.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster"):
            assert value.startswith("#") or value == "data:,", (name, value)
        assert not name.startswith("on") and name != "style"
    assert not re.search(r"url\(|@import", "".join(page.raw["style"]))
    data, _, script, plotly = page.raw["script"]
    assert not re.search(
        r"\bimport\b|fetch\(|XMLHttpRequest|innerHTML|eval\(|http(?!://www.w3.org/2000/svg)", script
    )
    assert "plotly.js" in plotly[:200] and len(plotly) > 1e6
    assert json.loads(data)["figures"].keys() == {"chart-0", "chart-1", "chart-2"}


def test_a_page_without_curves_goes_without_plotly():
    assert len(render(run_report(["plain"], curves=False))) < 200_000
    assert "<main>" in render(RunReport("empty"))


def test_hostile_text_never_becomes_markup():
    hostile = render(run_report(HOSTILE))
    page = Page(hostile)
    assert page.tags == Page(render(run_report(["plain"]))).tags
    assert not re.search(
        "[\0-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", hostile.split("<script>")[0]
    )
    data = json.loads(page.raw["script"][0])
    assert set(data["vocabulary"]) == set(HOSTILE)
    card = json.loads(page.raw["script"][1].split("\n")[0])
    assert card["explanations"][0]["text"] == data["features"][0]["said"][0] == HOSTILE[3]
    assert set(data["features"][0]["scores"]) == {HOSTILE[0], "none"}
    for context, shown in zip(collect(world(), n_top=4, radius=6)[0].top, card["top"], strict=True):
        texts = [HOSTILE[token] for token in context.tokens]
        assert [data["vocabulary"][token] for token in shown["tokens"]] == texts
        active = dict(zip(shown["active"][::2], shown["active"][1::2], strict=True))
        masked = dict.fromkeys(shown.get("masked", ()))
        read = [(active | masked).get(at, 0.0) for at in range(len(context.tokens))]
        assert tuple(read) == context.activations


def test_a_report_is_json_and_curves_keep_their_extremes():
    report = run_report(HOSTILE)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["features"][0]["index"] == FEATURES[0]
    steps = list(range(100_000))
    spiky = [1.0] * len(steps)
    spiky[54_321] = 99.0
    page = Page(render(RunReport("curves", curves={"l0": (steps, spiky)})))
    line = json.loads(page.raw["script"][0])["figures"]["chart-0"]["data"][0]
    assert max(line["y"]) == 99 and len(line["x"]) <= 2000 and line["x"][-1] == steps[-1]


def test_the_metrics_say_whether_they_beat_their_controls():
    def verdict(better, value, low, high, **controls):
        return render(RunReport("t", metrics=(Metric("m", value, 5, "", low, high, controls, better),)))

    assert "beats its controls" in verdict("lower", 0.1, 0.05, 0.2, a=0.5, b=0.9)
    assert "does not beat b" in verdict("lower", 0.1, 0.05, 0.2, a=0.5, b=0.1)
    assert "a lies within its interval" in verdict("higher", 0.7, 0.6, 0.8, a=0.65, b=0.1)
    assert 'verdict"' not in verdict(None, 0.7, 0.6, 0.8, a=0.65)


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "run.html"
    write(run_report(HOSTILE), path)
    before = path.read_bytes()
    assert before.decode().endswith("</html>")
    with pytest.raises(TypeError):
        write(dataclasses.replace(run_report(HOSTILE), metrics=(Metric("m", 1, low=1, high=object()),)), path)
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["run.html"]


@pytest.mark.browser
def test_in_a_browser_features_are_drawn_found_and_stepped_through(browser, tmp_path):
    report = run_report(HOSTILE)
    write(report, tmp_path / "run.html")
    address = (tmp_path / "run.html").as_uri()
    listed = "[...document.querySelectorAll('#list a')].map((link) => Number(link.dataset.index))"
    heading = "document.getElementById('detail-title').textContent"

    browser.open(address)
    assert browser.run(listed) == sorted(FEATURES)
    assert browser.run("document.querySelectorAll('.plot .main-svg').length") >= 3
    assert browser.run("document.title") == HOSTILE[0]  # not "pwned"
    assert browser.run("document.images.length + document.querySelectorAll('#detail script').length") == 0

    browser.open(f"{address}#f=12&values=true")  # a link to one feature
    assert browser.run(heading) == "Feature 12"
    best = report.features[FEATURES.index(12)].top[0]
    first = "[...document.querySelectorAll('.context')[0].querySelectorAll('.token')]"
    tips = browser.run(f"{first}.map((token) => token.dataset.tip)")
    told = [re.search(r"\n(?:activation (.*)|masked: not counted|does not fire)", tip) for tip in tips]
    shown = [float(one[1] or 0) if "masked" not in one[0] else None for one in told]
    assert (
        tuple(shown) == best.activations
        and browser.run(f"{first}.findIndex((t) => t.matches('.peak'))") == best.peak
    )
    safe = [place for place, word in enumerate(best.tokens) if word in HOSTILE[:3]]
    assert all(browser.run(f"{first}[{place}].textContent") == best.tokens[place] for place in safe)

    browser.open(f"{address}#f=5")
    assert "Dead: it fired on none of the" in browser.run("document.getElementById('detail').textContent")
    browser.open(f"{address}#q=no+such+text")
    assert browser.run(listed) == [] and browser.run(heading) == "No feature matches."
    browser.open(f"{address}#sort=-density")
    density = {one.index: one.density for one in report.features}
    assert browser.run(listed) == sorted(FEATURES, key=lambda index: -density[index])

    browser.press("/", "3", "9", "Enter")  # type an index, go to the list, walk down
    assert browser.run(listed)[0] == 39 and browser.run(heading) == "Feature 39"
    assert browser.run("document.activeElement.dataset.index") == "39"
    assert browser.run("location.hash") == "#f=39&q=39&sort=-density"
    browser.run("location.hash = '#f=0'; new Promise((done) => setTimeout(done, 50))")
    browser.press("j")
    assert browser.run(heading) == "Feature 5"


@pytest.mark.browser
def test_in_a_browser_nothing_complains_and_nothing_is_asked_for(browser, tmp_path):
    write(run_report(HOSTILE), tmp_path / "run.html")
    address = (tmp_path / "run.html").as_uri()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        browser.open(f"{address}#q=fox")
        browser.run("new Promise((done) => setTimeout(done, 300))")
        sent = [
            e["params"]["request"]["url"]
            for e in browser.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        assert [url.split("#")[0] for url in sent] == [address] and not browser.complaints()
        # the page's own policy stops what would ask for more, and the browser says so
        port = server.getsockname()[1]
        browser.run(
            f"new Image().src = 'http://127.0.0.1:{port}/x.png'; new Promise((done) => setTimeout(done, 300))"
        )
        browser.run(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
        )
        assert browser.run("window.ran") is None
        with pytest.raises(TimeoutError):
            server.accept()
        assert len(browser.complaints()) >= 2
