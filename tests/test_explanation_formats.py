"""Other tools' files: what goes out comes back, what they hold is judged anew, and hostile files are refused in one sentence.

``SAEKIT_DELPHI`` names the python of an environment with eai-delphi 0.1.3 in it.
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from saekit.autointerp.explanation import Explanation
from saekit.autointerp.firings import Firings, Writer
from saekit.autointerp.formats import READERS, WRITERS, delphi_cache, strict
from saekit.autointerp.formats.delphi import (
    BARE,
    MARKS,
    SCORERS,
    STAND_INS,
    Judged,
    Simulated,
    read_cache,
    read_scores,
    read_windows,
    score_of,
    write_cache,
    write_scores,
)
from saekit.autointerp.formats.neuronpedia import SHAPES, read_rows, write_rows
from saekit.autointerp.formats.saedashboard import Target, TopLogits, read_upload, write_upload
from saekit.autointerp.windows import Windows
from saekit.types import Codes, SaekitError

ROWS, SEQ, N = 30, 64, 40
POINT = "layers.1"
HERE = Path(__file__).parent


def codes(seed: int, rows: int = ROWS, density: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows, SEQ] and dense codes [rows, SEQ, N], of which features 0-3, 17-24 and the last never fire."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 500, (rows, SEQ), generator=g)
    shape = (rows, SEQ, N)
    dense = torch.randn(shape, generator=g).exp() * (torch.rand(shape, generator=g) < density)
    dense[..., [0, 1, 2, 3, *range(17, 25), N - 1]] = 0
    return tokens, dense


def kept(path: Path, tokens: torch.Tensor, dense: torch.Tensor) -> Firings:
    writer = Writer(path, dense.shape[-1])
    everything = torch.ones(tokens.shape, dtype=torch.bool)
    writer.add(tokens, None, everything, Codes.from_dense(dense))
    return writer.close({"model": {"name": "toy"}, "text": {"name": "noise"}, "split": "train"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Firings:
    tokens, dense = codes(0)
    dense[2, 5, 6], dense[2, 6, 6], dense[3, 0, 7], dense[3, 1, 7] = -2.5, 1e-9, -1e-9, 65504.0
    return kept(tmp_path_factory.mktemp("firings"), tokens, dense)


def assert_same(found: Firings, truth: Firings) -> None:
    """Equal places and tokens; values that differ by rounding to float16, by at most the least of them where they are tiny."""
    assert (found.n_features, found.seq) == (truth.n_features, truth.seq)
    np.testing.assert_array_equal(found.tokens, truth.tokens)
    np.testing.assert_array_equal(found.offsets, truth.offsets)
    np.testing.assert_array_equal(found.places, truth.places)
    np.testing.assert_allclose(found.values, truth.values, rtol=2.0**-11, atol=2.0**-24)
    assert (np.sign(found.values) == np.sign(truth.values)).all()


# delphi: caches


@pytest.mark.parametrize("n_splits", [1, 3, 7, N])
def test_a_cache_comes_back_however_it_is_cut(
    n_splits: int, made: Firings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delphi_cache, "CHUNK", 100)  # several chunks to a shard, several blocks of rows
    folder = write_cache(made, tmp_path, POINT, n_splits)
    found = read_cache(tmp_path, POINT, tmp_path / "back")
    assert_same(found, made)
    assert found.mask.all() and (found.documents == np.arange(ROWS)[:, None]).all()
    assert found.about["model"] == {"name": "toy"} and "no documents" in found.about["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "latents"]
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    assert_same(read_cache(tmp_path, POINT), made)  # a temporary folder


@pytest.mark.parametrize("n_splits", [1, 3, 7, N])
def test_shards_are_delphis(n_splits: int, made: Firings, tmp_path: Path) -> None:
    """Bounds of its linspace, the end inclusive, no gap and no empty file; first latent by name; dtypes and tokens."""
    folder = write_cache(made, tmp_path, POINT, n_splits)
    ranges = sorted(tuple(map(int, file.stem.split("_"))) for file in folder.glob("*.safetensors"))
    bounds = set(torch.linspace(0, N, n_splits + 1).long().tolist())
    assert {first for first, _ in ranges} | {last + 1 for _, last in ranges} <= bounds
    assert ranges[0][0] == 0 and ranges[-1][1] == N - 1
    assert all(first == last + 1 for (_, last), (first, _) in pairwise(ranges))
    for first, last in ranges:
        tensors = load_file(folder / f"{first}_{last}.safetensors")
        at, values = tensors["locations"], tensors["activations"]
        assert at.dtype == np.uint16 and values.dtype == np.float16 and len(at) == len(values) > 0
        np.testing.assert_array_equal(tensors["tokens"], made.tokens)
        assert at[:, 2].max() <= last - first
        order = np.lexsort((at[:, 1], at[:, 0], at[:, 2]))
        own = slice(made.offsets[first], made.offsets[last + 1])
        place = at[order, 0].astype(np.int64) * SEQ + at[order, 1]
        np.testing.assert_array_equal(place, made.places[own])
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == SEQ and config["model_name"] == "toy" and config["n_tokens"] == ROWS * SEQ  # fmt: skip


@pytest.mark.parametrize(("rows", "n"), [(2**16 + 1, 3), (4, 2**16 + 1)])
def test_what_doesnt_fit_16_bits_is_written_with_32(rows: int, n: int, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "firings", n)
    tokens = torch.zeros((rows, 32), dtype=torch.int64)
    offsets = torch.ones(rows * 32 + 1, dtype=torch.int64)
    offsets[0], offsets[-1] = 0, 2  # fires at the first and the last token
    firing = Codes(offsets, torch.tensor([0, n - 1]), torch.tensor([1.0, 2.0]), n, (rows, 32))
    writer.add(tokens, None, torch.ones(rows, 32, dtype=torch.bool), firing)
    firings = writer.close({})
    folder = write_cache(firings, tmp_path, POINT, 1)
    assert load_file(folder / f"0_{n - 1}.safetensors")["locations"].dtype == np.uint32
    assert_same(read_cache(tmp_path, POINT), firings)


@pytest.mark.parametrize("order", ["rows", "shuffled"])
def test_a_cache_that_delphi_wrote_is_read_in_any_order(order: str, made: Firings, tmp_path: Path) -> None:
    folder = tmp_path / "latents" / POINT
    folder.mkdir(parents=True)
    latent = np.repeat(np.arange(N), made.counts)
    at = np.stack([made.places // SEQ, made.places % SEQ, latent], 1)
    chosen = np.lexsort((at[:, 2], at[:, 1], at[:, 0]))
    if order == "shuffled":
        chosen = np.random.default_rng(0).permutation(chosen)
    # a cache of latents 5 to 29 only, in files with a gap between them
    for first, last in ((5, 11), (14, 29)):
        own = chosen[(latent[chosen] >= first) & (latent[chosen] <= last)]
        half = made.values[own].astype(np.float16)
        where = (at[own] - [0, 0, first]).astype(np.uint16)
        tensors = {"locations": where, "activations": half, "tokens": made.tokens.astype(np.int64)}
        save_file(tensors, folder / f"{first}_{last}.safetensors")
    (folder / "config.json").write_text('{"model_name": "toy", "batch_size": 32}')
    found = read_cache(tmp_path, POINT)
    assert found.n_features == 30
    for feature in range(30):
        places, values = found.of(feature)
        truth, strength = made.of(feature)
        alive = (strength.astype(np.float16) != 0) & (5 <= feature <= 29) & (feature not in (12, 13))
        np.testing.assert_array_equal(places, truth[alive])
        np.testing.assert_array_equal(values, strength.astype(np.float16)[alive])


@pytest.mark.parametrize(
    ("value", "words"),
    [(65505.0, "65505"), (-7e4, "-70000"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_a_value_beyond_float16_is_refused_before_anything_is_written(
    value: float, words: str, tmp_path: Path
) -> None:
    """Infinity would be the peak of every window, and a clipped value would change which windows are the strongest."""
    tokens, dense = codes(1, rows=2)
    dense[1, 3, 9] = value
    firings = kept(tmp_path / "firings", tokens, dense)
    with pytest.raises(SaekitError, match=words):
        write_cache(firings, tmp_path / "run", POINT)
    assert not (tmp_path / "run").exists()


def test_rows_that_dont_fit_delphis_windows_are_refused(tmp_path: Path) -> None:
    tokens, dense = codes(1, rows=2)
    firings = kept(tmp_path / "firings", tokens[:, :33], dense[:, :33])
    with pytest.raises(SaekitError, match=r"rows of 33 tokens .* multiple of 32"):
        write_cache(firings, tmp_path / "run", POINT)
    for n_splits in (0, N + 1):
        with pytest.raises(SaekitError, match=f"n_splits = {n_splits} must be from 1 to the {N} features"):
            write_cache(kept(tmp_path / str(n_splits), tokens, dense), tmp_path / "run", POINT, n_splits)
    assert not (tmp_path / "run").exists()


OUTSIDE = ["../up", "a/../../b", "/etc", "", "a//b", ".", "..", "a\\b", "a\nb", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_outside(name: str, made: Firings, tmp_path: Path) -> None:
    run, one = tmp_path / "run", Explanation(1, "words", "human")
    row = {"modelId": "m", "layer": "s", "index": "1", "description": "d"}
    calls: list[Callable[[], Any]] = [
        lambda: write_cache(made, run, name), lambda: read_cache(run, name), lambda: read_scores(run, name),
        lambda: write_scores({1: JUDGED}, run, name, "fuzz"), lambda: write_rows([row], run, f"{name}/s", "explanations"),
        lambda: read_rows(run, f"m/{name}", "explanations"),
        *(lambda form=form: READERS[form](run, name) for form in READERS),
        *(lambda form=form: WRITERS[form]([one], run, name) for form in WRITERS),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(SaekitError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def shard(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def header(folder: Path) -> None:
    """A header that declares a tensor of many more entries than the file has."""
    data = first(folder).read_bytes()
    n = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + n])
    entries["activations"] = {"dtype": "F16", "shape": [10**15], "data_offsets": [0, 2 * 10**15]}
    text = json.dumps(entries).encode()
    first(folder).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def put(name: str, at: int, value: float) -> Callable[[Path], None]:
    return shard(lambda t: t[name].reshape(-1).__setitem__(at, value))


CACHES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a shard cut short": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-9]), ["not an intact safetensors file"]),
    "a shard that is text": (lambda f: first(f).write_text("hello"), ["not an intact safetensors file"]),
    "an empty shard": (lambda f: first(f).write_bytes(b""), ["not an intact safetensors file"]),
    "a pickle": (lambda f: torch.save({"locations": torch.zeros(3, 3)}, first(f)), ["not an intact safetensors file"]),
    "a header of absurd length": (lambda f: first(f).write_bytes(b"\xff" * 8 + b"{}"), ["not an intact safetensors file"]),
    "a huge declared size": (header, ["not an intact safetensors file"]),
    "no tokens": (shard(lambda t: t.pop("tokens")), ["holds no 'tokens'"]),
    "no locations": (shard(lambda t: t.pop("locations")), ["holds no 'locations'"]),
    "other tokens": (put("tokens", 3, 7777), ["different texts"]),
    "a negative token": (put("tokens", 3, -1), ["no token, -1"]),
    "fewer rows": (shard(lambda t: t.update(tokens=t["tokens"][:-1])), ["different texts"]),
    "rows that are flat": (shard(lambda t: t.update(tokens=t["tokens"].reshape(-1))), ["shapes that don't fit"]),
    "fewer values": (shard(lambda t: t.update(activations=t["activations"][:-1])), ["shapes that don't fit"]),
    "pairs for triples": (shard(lambda t: t.update(locations=t["locations"][:, :2].copy())), ["shapes that don't fit"]),
    "locations that are floats": (shard(lambda t: t.update(locations=t["locations"].astype(np.float32))), ["'locations' as F32"]),
    "values that are ints": (shard(lambda t: t.update(activations=t["activations"].astype(np.int32))), ["'activations' as I32"]),
    "NaN": (put("activations", 2, np.nan), ["NaN or infinite"]),
    "infinity": (put("activations", 2, np.inf), ["NaN or infinite"]),
    "a row beyond the text": (put("locations", 0, ROWS), [f"an entry at [{ROWS}, ", "beyond [30, 64, "]),
    "a position beyond the row": (put("locations", 1, SEQ), ["beyond [30, 64, "]),
    "a latent beyond the file": (put("locations", 2, 60000), ["60000] (row, position, latent)"]),
    "an entry that stands twice": (shard(lambda t: t["locations"].__setitem__(1, t["locations"][0])), ["twice at row"]),
    "a name without numbers": (lambda f: first(f).rename(f / "a_b.safetensors"), ["'a_b.safetensors'", "isn't called after"]),
    "a name with one number": (lambda f: first(f).rename(f / "7.safetensors"), ["isn't called after"]),
    "a name that goes down": (lambda f: first(f).rename(f / "7_2.safetensors"), ["isn't called after"]),
    "a name of absurd size": (lambda f: first(f).rename(f / "0_999999999.safetensors"), ["isn't called after"]),
    "names that overlap": (lambda f: first(f).rename(f / "0_39.safetensors"), ["share latents"]),
    "no shard": (lambda f: [file.unlink() for file in f.glob("*.safetensors")], ["no cache of delphi"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text('{"a": '), ["config.json", "not JSON"]),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "expected dict"]),
    "a config of another type": (lambda f: (f / "config.json").write_text('{"model_name": 3}'), ["model_name = 3", "expected str"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHES)
def test_a_damaged_cache_is_refused_in_one_sentence(case: str, made: Firings, tmp_path: Path) -> None:
    damage, words = CACHES[case]
    damage(write_cache(made, tmp_path, POINT, 3))
    with pytest.raises(SaekitError) as caught:
        read_cache(tmp_path, POINT, tmp_path / "back")
    for word in (*words, ";"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_what_exists_is_not_written_over(made: Firings, tmp_path: Path) -> None:
    write_cache(made, tmp_path, POINT)
    (tmp_path / "back").mkdir()
    for call in (
        lambda: write_cache(made, tmp_path, POINT),
        lambda: read_cache(tmp_path, POINT, tmp_path / "back"),
    ):
        with pytest.raises(SaekitError, match="exists already"):
            call()


def test_the_firing_counts_that_delphi_pickles_are_not_read(made: Firings, tmp_path: Path) -> None:
    write_cache(made, tmp_path, POINT)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "hookpoint_firing_counts.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_same(read_cache(tmp_path, POINT), made)


BIG = """
import resource, sys
from pathlib import Path
import torch
from saekit.autointerp.firings import Firings, Writer
from saekit.autointerp.formats.delphi import read_cache, write_cache
from saekit.types import Codes
out, stage, rows, seq, n, k = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), 256, 16384, 32
if stage == "make":
    writer, g = Writer(out / "firings", n), torch.Generator().manual_seed(0)
    for at in range(0, rows, 64):
        size = (min(64, rows - at), seq)
        # one feature of each of k ranges, so that none is drawn twice
        indices = torch.randint(0, n // k, (size[0] * seq, k), generator=g) + torch.arange(k) * (n // k)
        values = torch.rand(indices.shape, generator=g) + 0.1
        writer.add(torch.randint(0, 4096, size, generator=g), None, torch.ones(size, dtype=torch.bool), Codes.from_rectangular(indices, values, n, size))
    writer.close({})
elif stage == "write":
    write_cache(Firings(out / "firings"), out, "layers.1")
else:
    read_cache(out, "layers.1", out / "back")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_5_million_tokens_of_32_features_take_below_a_gigabyte(tmp_path: Path) -> None:
    """The process's whole resident memory, mapped files and libraries included."""
    taken = {}
    for stage in ("make", "write", "read"):
        command = (sys.executable, "-P", "-c", BIG, str(tmp_path), stage, str(5_000_000 // 256))
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        taken[stage] = int(ran.stdout.split()[-1]) / 1e6
    print(taken)
    assert max(taken["write"], taken["read"]) < 1.0
    back, truth = Firings(tmp_path / "back"), Firings(tmp_path / "firings")
    assert (back.places == truth.places).all() and (back.offsets == truth.offsets).all()
    assert (back.values == truth.values.astype(np.float16)).all()


# delphi: explanations and scores


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


# Neuronpedia: dumps


NAME = "gpt2-small/6-res-jb"
OWN = {"modelId": "gpt2-small", "layer": "6-res-jb"}


def row(kind: str, i: int) -> dict[str, Any]:
    """A row as Neuronpedia's export has it, and fields that it may have one day."""
    start = {"id": f"c{i}", **OWN, "index": str(i // 2)}
    later = {"later": {"nested": [i, None, 1e-30, -0.0, "é\u2028"]}, "large": 2**60 + i}
    if kind == "explanations":
        return {**start, "authorId": "someone", "description": f"about é {i}", "embedding": None, "typeName": "oai_token-act-pair",
                "explanationModelName": "gpt-4o-mini" if i % 2 else None, "umap_x": 0.1 * i, **later}  # fmt: skip
    if kind == "activations":
        return {**start, "tokens": [" a", "é", ""], "values": [0, 0.1 * i, -1.5], "maxValue": 0.1 * i, "dfaValues": None,
                "binMin": -1, "binMax": 3.5, "binContains": -1, **later}  # fmt: skip
    return {**start, "maxActApprox": 3.25, "hookName": "blocks.6.hook_resid_pre", "vector": [0.1, -2], "topkCosSimIndices": [1], **later}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("n", [1, 1024, 2500])
def test_rows_come_back_as_they_were(kind: str, n: int, tmp_path: Path) -> None:
    rows = [row(kind, i) for i in range(n)]
    folder = write_rows(iter(rows), tmp_path, NAME, kind)
    found = list(read_rows(tmp_path, NAME, kind))
    assert found == rows and [list(one) for one in found] == [list(one) for one in rows]
    assert json.dumps(found) == json.dumps(rows)  # 1 and 1.0 are equal and not the same
    assert [p.name for p in sorted(folder.iterdir())] == [f"batch-{i}.jsonl.gz" for i in range(-(-n // 1024))]
    write_rows(found, tmp_path / "again", NAME, kind)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again/v1" / NAME / kind / file.name).read_bytes()


def test_batches_are_read_in_the_order_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saekit.autointerp.formats.neuronpedia.BATCH", 5)
    write_rows([row("features", 2 * i) for i in range(58)], tmp_path, NAME, "features")
    assert [int(one["index"]) for one in read_rows(tmp_path, NAME, "features")] == list(range(58))


def test_imported_explanations_claim_and_are_written_as_they_were(tmp_path: Path) -> None:
    rows = [row("explanations", i) for i in range(5)]
    write_rows(rows, tmp_path, NAME, "explanations")
    found = READERS["neuronpedia"](tmp_path, NAME)
    assert [(one.feature, one.text) for one in found] == [(i // 2, f"about é {i}") for i in range(5)]
    for one, given in zip(found, rows, strict=True):
        assert one.method == "imported" and "unknown" in one.about["note"]
        assert one.about["claims"] == {
            "method": given["typeName"],
            "model": given["explanationModelName"],
        }
        json.dumps(one.about)
    WRITERS["neuronpedia"](found, tmp_path / "again", NAME)
    assert list(read_rows(tmp_path / "again", NAME, "explanations")) == rows


def test_our_explanations_never_name_a_model_that_wasnt_asked(tmp_path: Path) -> None:
    ours = [
        Explanation(3, "fires on numbers", "statistics", about={"model": "gpt"}),
        Explanation(4, "about é", "llm", about={"model": "small"}),
        Explanation(4, "two of a feature", "human"),
    ]
    WRITERS["neuronpedia"](ours, tmp_path, NAME)
    rows = list(read_rows(tmp_path, NAME, "explanations"))
    assert [(one["index"], one["typeName"], one["explanationModelName"]) for one in rows] == [
        ("3", "saekit_statistics", None), ("4", "saekit_llm", "small"), ("4", "saekit_human", None),
    ]  # fmt: skip
    assert len({one["id"] for one in rows}) == 3
    assert [(one.feature, one.text) for one in READERS["neuronpedia"](tmp_path, NAME)] == [
        (one.feature, one.text) for one in ours
    ]


def changed(kind: str, **change: Any) -> bytes:
    return gzip.compress(json.dumps({**row(kind, 0), **change}).encode())


GOOD = gzip.compress(b"".join(json.dumps(row("activations", i)).encode() + b"\n" for i in range(99)))
DUMPS: dict[str, tuple[bytes, list[str]]] = {
    "a gzip cut short": (GOOD[:-20], ["not an intact gzip file", "too early"]),
    "a gzip with a flipped bit": (GOOD[:40] + bytes([GOOD[40] ^ 255]) + GOOD[41:], ["batch-0.jsonl.gz"]),
    "no gzip": (b'{"id": 1}\n', ["not an intact gzip file"]),
    "a row cut short": (gzip.compress(b'{"id": \n'), ["line 1,", "not JSON"]),
    "a list for a row": (gzip.compress(b"[1, 2]\n"), ["line 1,", "expected dict"]),
    "a second row that is a number": (gzip.compress(json.dumps(row("activations", 0)).encode() + b"\n\n7\n"), ["line 3,", "expected dict"]),
    "NaN": (changed("activations", values=[float("nan"), 0, 0]), ["line 1,", "NaN"]),
    "a number beyond all": (changed("activations").replace(b"", b"") and gzip.compress(b'{"maxValue": -1e999}'), ["-1e999"]),
    "no index": (gzip.compress(json.dumps(OWN).encode()), ["lacks the field 'index'"]),
    "an index that is a number": (changed("activations", index=3), ["index = 3", "expected str"]),
    "an index that leads up": (changed("activations", index="../3"), ["'../3'", "no feature's number"]),
    "a negative index": (changed("activations", index="-3"), ["'-3'", "no feature's number"]),
    "an index of other digits": (changed("activations", index="٣"), ["no feature's number"]),
    "a huge index": (changed("activations", index="9" * 99), ["no feature's number"]),
    "another model": (changed("activations", modelId="../x"), ["is of ../x/6-res-jb, not of gpt2-small/6-res-jb"]),
    "another source": (changed("activations", layer="7-res-jb"), ["7-res-jb, not of"]),
    "tokens that are numbers": (changed("activations", tokens=[1, 2, 3]), ["3 tokens and 3 values"]),
    "values that are null": (changed("activations", values=[None] * 3), ["3 tokens and 3 values"]),
    "values that are truths": (changed("activations", values=[True] * 3), ["3 tokens and 3 values"]),
    "fewer values": (changed("activations", values=[1.0]), ["3 tokens and 1 values"]),
    "tokens that are text": (changed("activations", tokens="abc"), ["tokens = 'abc'", "expected list"]),
    "a bin in words": (changed("activations", binMin="low"), ["binMin = 'low'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DUMPS)
def test_a_damaged_dump_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    data, words = DUMPS[case]
    folder = tmp_path / "v1" / NAME / "activations"
    folder.mkdir(parents=True)
    (folder / "batch-0.jsonl.gz").write_bytes(data)
    with pytest.raises(SaekitError) as caught:
        list(read_rows(tmp_path, NAME, "activations"))
    for word in ("batch-0.jsonl.gz", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.autointerp.formats.neuronpedia.LONGEST", 1000)
    folder = tmp_path / "v1" / NAME / "activations"
    folder.mkdir(parents=True)
    (folder / "batch-0.jsonl.gz").write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(SaekitError, match="line of more than 1000 bytes"):
        list(read_rows(tmp_path, NAME, "activations"))


def endless() -> Iterator[dict[str, Any]]:
    yield row("features", 0)
    yield {**row("features", 1), "vector": [float("nan")]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (endless(), "row 1 of features can't be written as JSON"),
        ([{**row("features", 0), "index": "x"}], "no feature's number"),
        ([{**row("features", 0), "later": {1, 2}}], "can't be written as JSON"),
        ([], "are none"),
    ],
)
def test_rows_that_are_none_are_not_written(rows: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=words):
        write_rows(rows, tmp_path, NAME, "features")
    assert not list(tmp_path.rglob("*.gz"))


# SAEDashboard: uploads


TARGET = Target("gpt2-small", 6, "res-jb")


def words(tokens: Any) -> list[str]:
    return [f" t{token}" for token in tokens]


def test_an_upload_shows_what_fires(tmp_path: Path) -> None:
    tokens, dense = codes(3, rows=200, density=0.004)
    writer, mask = (
        Writer(tmp_path / "firings", N),
        torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) > 0.1,
    )
    writer.add(tokens, None, mask, Codes.from_dense(dense))
    firings = writer.close({"text": {"name": "noise"}})
    logits = {5: TopLogits((" up",), (2.0,), (" down",), (-1.0,))}
    write_upload(firings, tmp_path / "up", TARGET, words, logits=logits)
    (batch,) = read_upload(tmp_path / "up")
    assert {key: batch[key] for key in ("model_id", "layer", "sae_set")} == {"model_id": "gpt2-small", "layer": 6, "sae_set": "res-jb"}  # fmt: skip
    fired = np.flatnonzero(firings.counts)
    assert [one["feature_index"] for one in batch["features"]] == fired.tolist()
    skipped = json.loads((tmp_path / "up" / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert sorted(skipped + fired.tolist()) == list(range(N))
    seen = torch.where(mask[..., None], dense, 0)
    texts = {
        tuple(words(line[keep].tolist())): i for i, (line, keep) in enumerate(zip(tokens, mask, strict=True))
    }
    for one in batch["features"]:
        own = seen[..., one["feature_index"]]
        assert one["frac_nonzero"] == pytest.approx(float((own > 0).sum() / mask.sum()))
        assert sum(one["freq_hist_data_bar_heights"]) == int((own > 0).sum())
        assert one["pos_str"] == ([" up"] if one["feature_index"] == 5 else [])
        for shown in one["activations"]:
            i = texts[tuple(shown["tokens"])]
            np.testing.assert_allclose(shown["values"], own[i][mask[i]], atol=5.1e-4)
        top = [a for a in one["activations"] if a["bin_contains"] == -1]
        peaks = [max(a["values"]) for a in top]
        highest = own.amax(1).sort(descending=True).values[: len(top)]
        np.testing.assert_allclose(peaks, highest, atol=5.1e-4)
        assert len(top) == min(20, int((own > 0).any(1).sum())) and all(a["bin_min"] == -1 for a in top)
        assert all(a["values"][a["qualifying_token_index"]] == max(a["values"]) for a in top)
        for a in one["activations"]:
            if a["bin_contains"] != -1:
                assert a["bin_min"] - 1e-3 <= a["values"][a["qualifying_token_index"]] <= a["bin_max"] + 1e-3
                low, high = a["bin_min"], a["bin_max"]
                share = float(((own >= low - 1e-3) & (own <= high + 1e-3) & mask).sum() / mask.sum())
                assert a["bin_contains"] == pytest.approx(share, abs=0.003)


def test_an_upload_is_cut_into_batches_and_written_whole_or_not_at_all(made: Firings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("saekit.autointerp.formats.saedashboard.BATCH", 10)
    write_upload(made, tmp_path / "up", TARGET, words)
    batches = list(read_upload(tmp_path / "up"))
    assert [len(batch["features"]) for batch in batches] == [10, 10, 7]
    for features, said in (([N], f"feature {N} is none"), ([], "none that fire")):
        with pytest.raises(SaekitError, match=said):
            write_upload(made, tmp_path / "no", TARGET, words, features)
    with pytest.raises(ZeroDivisionError):
        write_upload(made, tmp_path / "no", TARGET, lambda tokens: [str(1 // 0)])
    assert [p.name for p in tmp_path.iterdir()] == ["up"]


UPLOADS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "no features": (lambda b: b.pop("features"), ["lacks the field 'features'"]),
    "a layer in words": (lambda b: b.update(layer="six"), ["layer = 'six'"]),
    "an index in words": (lambda b: b["features"][1].update(feature_index="../1"), ["features[1].feature_index = '../1'"]),
    "fewer values": (lambda b: b["features"][0]["activations"][0].update(values=[1.0]), ["64 tokens and 1 values"]),
    "a token beyond": (lambda b: b["features"][0]["activations"][0].update(qualifying_token_index=99), ["token 99 of 64"]),
    "NaN": (lambda b: b["features"][0].update(frac_nonzero=float("nan")), ["NaN"]),
}  # fmt: skip


@pytest.mark.parametrize("case", UPLOADS)
def test_a_damaged_upload_is_refused_in_one_sentence(case: str, made: Firings, tmp_path: Path) -> None:
    change, expected = UPLOADS[case]
    write_upload(made, tmp_path / "up", TARGET, words, [4, 5, 6])
    file = tmp_path / "up" / "batch-0.json"
    batch = json.loads(file.read_text())
    change(batch)
    file.write_text(json.dumps(batch))
    with pytest.raises(SaekitError) as caught:
        list(read_upload(tmp_path / "up"))
    for word in ("batch-0.json", *expected):
        assert word in str(caught.value)


@pytest.mark.parametrize("table", [READERS, WRITERS])
def test_every_row_of_the_tables_loads(table: Any) -> None:
    assert all(callable(table[name]) for name in table)
    with pytest.raises(ValueError, match="did you mean 'delphi'"):
        table["delfi"]


# delphi itself


@pytest.mark.peer
def test_delphi_reads_our_cache_as_its_own(tmp_path: Path) -> None:
    """Its LatentDataset gives the same windows for our cache and for the one that it writes of the same codes."""
    tokens, dense = codes(5, rows=120, density=0.02)
    firings = kept(tmp_path / "firings", tokens, dense)
    for n_splits in (1, 3, 8):
        run = tmp_path / str(n_splits)
        write_cache(firings, run, POINT, n_splits)
        save_file(
            {"tokens": tokens.numpy(), "dense": dense.numpy(), "n_splits": np.array(n_splits)}, run / "given"
        )
        command = (os.environ["SAEKIT_DELPHI"], "-P", str(HERE / "peer_delphi.py"), str(run), POINT)
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        ours, theirs, some = (load_file(run / f"windows.{name}") for name in ("ours", "theirs", "some"))
        assert set(ours) == set(theirs) and len(ours) > 2 * 20
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert set(some) <= set(ours) and len(some) >= 2 * 4  # read by number, over the joined ranges
        for name in some:
            np.testing.assert_array_equal(some[name], ours[name])
        # what it shows are the aligned windows that we know of
        windows = Windows(firings, 32)
        for feature in np.flatnonzero(firings.counts).tolist():
            found, peaks = windows.peaks(feature)
            np.testing.assert_allclose(
                ours[f"{feature}.activations"].max(1), np.sort(peaks)[::-1], rtol=2.0**-11
            )
            shown = {tuple(line) for line in ours[f"{feature}.tokens"].tolist()}
            assert shown == {tuple(line) for line in windows.tokens[found].tolist()}
        back = read_cache(run / "theirs", POINT)
        np.testing.assert_array_equal(back.places, firings.places)
        np.testing.assert_array_equal(back.values, firings.values.astype(np.float16))
        assert json.loads((run / "writer.json").read_text())["empty shards crash it"] or n_splits < 8
