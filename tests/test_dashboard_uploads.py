"""SAEDashboard's uploads: they show what fires, are written whole, and hostile ones are refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_firings import N, codes, signed

from saekit.autointerp.firings import Firings, Writer
from saekit.autointerp.formats.saedashboard import Target, TopLogits, read_upload, write_upload
from saekit.types import Codes, SaekitError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Firings:
    return signed(tmp_path_factory.mktemp("firings"))


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
    write_upload(made, tmp_path / "some", TARGET, words, (np.int64(f) for f in (9, 4)))
    (batch,) = read_upload(tmp_path / "some")
    assert [one["feature_index"] for one in batch["features"]] == [4, 9]
    for features, said in (
        ([N], f"feature {N} is none"),
        ([], "none that fire"),
        ([4.0], "feature 4.0 is no number"),
    ):
        with pytest.raises(SaekitError, match=said):
            write_upload(made, tmp_path / "no", TARGET, words, features)
    with pytest.raises(ZeroDivisionError):
        write_upload(made, tmp_path / "no", TARGET, lambda tokens: [str(1 // 0)])
    assert {p.name for p in tmp_path.iterdir()} == {"up", "some"}


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
