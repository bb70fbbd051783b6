"""Neuronpedia's dumps: rows come back as they were, and hostile files are refused in one sentence."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saekit.autointerp.explanation import Explanation
from saekit.autointerp.formats import READERS, WRITERS
from saekit.autointerp.formats.neuronpedia import SHAPES, read_rows, write_rows
from saekit.types import SaekitError

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
