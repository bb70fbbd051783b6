"""Windows and firings: what is shown is what fired, sides share no document, and silence is silence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.autointerp.firings import ARRAYS, Firings, Writer, record
from saekit.autointerp.negatives import NEGATIVES, silent
from saekit.autointerp.windows import BANDS, SAMPLINGS, SIDES, Windows
from saekit.testbed.concepts import World, world
from saekit.types import Codes, SaekitError

ROWS, SEQ, N = 60, 50, 12


def made(seed: int, path: Path, batches: int = 7) -> tuple[Firings, torch.Tensor]:
    """Random firings of random documents, with masked tokens; and the dense codes."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (ROWS, SEQ), generator=g)
    documents = (torch.rand(ROWS * SEQ, generator=g) < 0.02).cumsum(0).view(ROWS, SEQ)
    mask = torch.rand(ROWS, SEQ, generator=g) > 0.02
    dense = torch.randn(ROWS, SEQ, N, generator=g) * (torch.rand(ROWS, SEQ, N, generator=g) < 0.02)
    dense[..., 3] = 0
    writer = Writer(path, N)
    for part in torch.arange(ROWS).tensor_split(batches):
        writer.add(tokens[part], documents[part], mask[part], Codes.from_dense(dense[part]))
    return writer.close({}), dense * mask[..., None]


@pytest.fixture(scope="module")
def small() -> World:
    return world(0, documents=60)


@pytest.fixture(scope="module")
def windows(small: World, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    x = small.model.module(small.tokens)
    writer = Writer(tmp_path_factory.mktemp("firings"), small.dictionary.n_features)
    with torch.no_grad():
        writer.add(small.tokens, small.documents, small.mask, small.dictionary.encode(x))
    return Windows(writer.close({}))


def test_firings_are_the_codes_however_they_are_cut(tmp_path: Path) -> None:
    for batches in (1, 7):
        found, dense = made(0, tmp_path / str(batches), batches)
        for feature in range(N):
            places, values = found.of(feature)
            flat = dense[..., feature].reshape(-1)
            np.testing.assert_array_equal(places, flat.nonzero()[:, 0])
            np.testing.assert_array_equal(values, flat[flat != 0])
        assert found.counts.sum() == (dense != 0).sum() and found.counts[3] == 0
        assert found.n_tokens == int(found.mask.sum())
    for name in ARRAYS:
        assert (tmp_path / "1" / f"{name}.bin").read_bytes() == (tmp_path / "7" / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", ARRAYS)
def test_damaged_firings_are_refused(name: str, tmp_path: Path) -> None:
    made(0, tmp_path)
    file = tmp_path / f"{name}.bin"
    whole = file.read_bytes()
    for data, words in (
        (whole[:-1], "not .* bytes long"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "was changed"),
    ):
        file.write_bytes(data)
        with pytest.raises(SaekitError, match=words):
            Firings(tmp_path)
    file.write_bytes(whole)
    about = json.loads((tmp_path / "firings.json").read_text())
    (tmp_path / "firings.json").write_text(json.dumps({**about, "schema": 9}))
    with pytest.raises(SaekitError, match="has schema 9"):
        Firings(tmp_path)


@pytest.mark.parametrize("width", [2, 5, 16])
def test_windows_are_runs_of_one_document_and_share_no_token(width: int, tmp_path: Path) -> None:
    firings, dense = made(1, tmp_path)
    found = Windows(firings, width)
    expected = []
    for row in range(ROWS):  # by hand: cut each run from its beginning
        at = 0
        while at < SEQ:
            if not firings.mask[row, at]:
                at += 1
                continue
            end = at
            while (
                end < SEQ
                and firings.mask[row, end]
                and firings.documents[row, end] == firings.documents[row, at]
            ):
                end += 1
            expected += [row * SEQ + at + i * width for i in range((end - at) // width)]
            at = end
    assert found.starts.tolist() == expected
    flat = dense.reshape(-1, N).numpy()
    for feature in range(N):
        own = found.values(feature, np.arange(len(found))[::-1])[::-1]
        truth = np.abs(flat[found.starts[:, None] + np.arange(width), feature])
        np.testing.assert_array_equal(own, truth)
        window, peak = found.peaks(feature)
        np.testing.assert_array_equal(window, np.flatnonzero(truth.any(1)))
        np.testing.assert_array_equal(peak, truth.max(1)[window])
        assert (found.values(feature, np.repeat(window[:3], 2)) == np.repeat(truth[window[:3]], 2, 0)).all()


def test_sides_share_no_document_and_are_alike_in_size(tmp_path: Path) -> None:
    """Over 200 seeds: nothing that explanations are made from is of a document that they are scored on."""
    firings, _ = made(2, tmp_path)
    for seed in range(200):
        found = Windows(firings, 5, seed)
        shown = [found.firing(0, side, 1000).documents for side in SIDES]
        quiet = [silent(found, 0, side, 1000).documents for side in SIDES]
        a, b = (set(one) | set(two) for one, two in zip(shown, quiet, strict=True))
        assert a and b and not a & b
        sizes = [len(found.of_side(side)) for side in SIDES]
        assert abs(sizes[0] - sizes[1]) <= np.unique(found.documents, return_counts=True)[1].max()


def test_silence_is_silence_and_no_window_is_shown_twice(windows: Windows, small: World) -> None:
    truth = small.fires.reshape(-1, len(small.concepts)).numpy()
    at = windows.starts[:, None] + np.arange(windows.width)
    for feature in range(len(small.concepts)):
        for side in SIDES:
            found = silent(windows, feature, side, 40)
            assert not truth[at[found.windows], feature].any() and not found.values.any()
            assert (
                len(set(found.windows.tolist())) == len(found) == 40
                or small.concepts[feature].kind == "dense"
            )
            assert (windows.side[found.windows] == SIDES.index(side)).all()
            assert set(found.kinds) <= set(NEGATIVES)
            on = windows.firing(feature, side, 40)
            assert (truth[at[on.windows], feature] == (on.values > 0)).all() and on.fires.all()
            assert len(set(on.windows.tolist())) == len(on)


def test_each_kind_of_silence_is_what_it_says(windows: Windows, small: World) -> None:
    feature = small.feature("bank")  # but not right after "river"
    found = silent(windows, feature, "score", 40, ("token", "lexical", "neighbour", "random"))
    bank = [t for t, text in enumerate(small.tokenizer.texts) if text.strip() == "bank"]
    assert found.kinds.count("token") == 10
    for kind, tokens in zip(found.kinds, found.tokens, strict=True):
        assert kind != "token" or np.isin(tokens, bank).any()
    union = small.feature("colour or year")
    assert {small.concepts[i].name for i in windows.neighbours(union, 2)} == {"colour", "year"}
    plain = silent(windows, feature, "score", 40, ("random",))
    like = np.asarray(windows.words[windows.peaks(feature)[0]].sum(0)).reshape(-1)
    near = [w for w, kind in zip(found.windows, found.kinds, strict=True) if kind == "lexical"]
    assert (windows.words[near] @ like).mean() > (windows.words[plain.windows] @ like).mean()


def test_samplings_take_what_they_say(windows: Windows, small: World) -> None:
    feature = small.feature("small")
    window, peak = windows.peaks(feature)
    own = windows.side[window] == 0
    highest = np.sort(peak[own])[::-1]
    found = {how: windows.firing(feature, "explain", 20, how) for how in SAMPLINGS}
    for one in found.values():
        assert (np.diff(one.values.max(1)) <= 0).all() and len(one) == 20
    np.testing.assert_array_equal(found["top"].values.max(1), highest[:20])
    rank = np.searchsorted(-highest, -found["quantiles"].values.max(1))
    counts = np.histogram(rank, np.linspace(0, len(highest), BANDS + 1))[0]
    assert counts.sum() == 20 and counts.min() >= 1
    assert len(windows.firing(feature, "explain", 10**6)) == own.sum()
    with pytest.raises(SaekitError, match="how = 'best' is not one of top"):
        windows.firing(feature, "explain", 5, "best")
    with pytest.raises(SaekitError, match="side 'scoring' is not one of explain, score"):
        windows.firing(feature, "scoring", 5)


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    firings, _ = made(3, tmp_path / "a")
    with pytest.raises(SaekitError, match="width = 51 must be from 2 to the 50"):
        Windows(firings, 51)
    writer = Writer(tmp_path / "b", N)
    one = torch.zeros(4, SEQ, dtype=torch.int64)
    writer.add(one, one, torch.ones_like(one, dtype=torch.bool), Codes.from_dense(torch.zeros(4, SEQ, N)))
    with pytest.raises(SaekitError, match="the text has 1 document with 32 tokens in a row"):
        Windows(writer.close({}))


def test_recording_is_harvesting_and_is_done_once(small: World, tmp_path: Path) -> None:
    text = [
        small.tokenizer.decode(row[m].tolist())
        for row, m in zip(small.tokens[:40], small.mask[:40], strict=True)
    ]
    found = record(small.model, small.dictionary, text, tmp_path / "f", tokens=2000, split="all", context=128)
    assert found.counts.sum() > 0 and found.about["reads"] == ["stream"]
    before = (tmp_path / "f" / "firings.json").stat().st_mtime_ns
    again = record(small.model, small.dictionary, text, tmp_path / "f", tokens=2000, split="all", context=128)
    assert (tmp_path / "f" / "firings.json").stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.places, found.places)
    with pytest.raises(SaekitError, match=r"holds firings that differ in about\.tokens"):
        record(small.model, small.dictionary, text, tmp_path / "f", tokens=3000, split="all", context=128)
    kept = record(small.model, small.dictionary, text, tokens=2000, split="all", context=128)
    folder = kept.path
    np.testing.assert_array_equal(kept.values, found.values)
    del kept
    assert not folder.exists()
