"""Neuronpedia's public dumps: rows of features, explanations and activations, read and written as they are.

``v1/{modelId}/{sourceId}/{features|explanations|activations}/batch-{i}.jsonl.gz``: a JSON object a line, up to 1024
lines a file. ``sourceId`` is layer and set, ``"6-res-jb"``, and is called ``layer`` in a row; ``index`` is the feature,
as a string. What saekit has no use for stays in the row, or in an explanation's ``about``, and is written again.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from saekit import records
from saekit.autointerp.explanation import Explanation
from saekit.autointerp.formats.strict import LONGEST, inside, numbered, parse, whole
from saekit.types import SaekitError

BATCH = 1024  # rows of a file
FIX = "download it again"
COMMON = {"modelId": str, "layer": str, "index": str}
SHAPES: dict[str, dict[str, Any]] = {
    "features": {**COMMON, "maxActApprox?": float | None, "hookName?": str | None, "vector?": list | None},
    "explanations": {**COMMON, "description": str, "typeName?": str | None, "explanationModelName?": str | None},
    "activations": {**COMMON, "tokens": list, "values": list, "binMin?": float | None, "binMax?": float | None, "binContains?": float | None},
}  # fmt: skip
NOTE = (
    "imported: whether the model that is named wrote the text is unknown, "
    "for Neuronpedia puts a feature's top token in place of an unclear reply under the same name"
)


def read_rows(path: "str | Path", name: str, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of one kind of the dump that ``path`` holds ``v1`` of, for ``name``, ``"model/source"``; one at a time.

    A row that is of another model or source, lacks a field, or names no feature raises by file and line.
    """
    folder = _folder(path, name, kind)
    files = numbered(folder, "batch-", ".jsonl.gz")
    if not files:
        raise SaekitError(f"folder {str(folder)!r} holds no batch of {kind}; name a dump's folder, and model/source in it")  # fmt: skip
    return chain.from_iterable(_lines(file, name, kind) for file in files.values())


def write_rows(rows: Iterable[Mapping[str, Any]], path: "str | Path", name: str, kind: str) -> Path:
    """Write rows of one kind, checked as when they are read, all or none; gives their folder."""
    folder = _folder(path, name, kind)
    with whole(folder) as made:
        left, batch = iter(rows), 0
        while lines := [_line(row, name, kind, f"row {batch * BATCH + i}") for i, row in enumerate(islice(left, BATCH))]:  # fmt: skip
            # no time in it: equal rows make equal files
            (made / f"batch-{batch}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines), 5, mtime=0))
            batch += 1
        if not batch:
            raise SaekitError(f"{kind} of {name!r} are none; give at least one row")
    return folder


def read_explanations(path: "str | Path", name: str) -> list[Explanation]:
    """Explanations of ``name``, ``"model/source"``, in the dump's order; a feature may have several.

    Their method is ``imported``: ``about`` holds the type and model that each claims, and the rest of its row.
    """
    out = []
    for row in read_rows(path, name, "explanations"):
        feature, text = int(row["index"]), row["description"]
        rest = {
            key: value
            for key, value in row.items()
            if key not in ("modelId", "layer", "index", "description")
        }
        claims = {"method": row.get("typeName"), "model": row.get("explanationModelName")}
        about = {"format": "neuronpedia", "source": name, "note": NOTE, "claims": claims, "row": rest}
        out.append(Explanation(feature, text, "imported", None, about))
    return out


def write_explanations(explanations: Iterable[Explanation], path: "str | Path", name: str) -> Path:
    """Write explanations as a dump's rows; imported ones as they were, others under the type ``saekit_<method>``."""
    return write_rows((_row(one, name) for one in explanations), path, name, "explanations")


def _row(one: Explanation, name: str) -> dict[str, Any]:
    model, source = name.split("/")
    own = {"modelId": model, "layer": source, "index": str(one.feature), "description": one.text}
    if one.about.get("format") == "neuronpedia" and isinstance(one.about.get("row"), Mapping):
        return {**one.about["row"], **own}
    asked = one.about.get("model")
    digest = hashlib.sha256(json.dumps([own, one.method]).encode()).hexdigest()
    return {
        "id": f"saekit{digest[:19]}", **own, "authorId": None, "embedding": None, "typeName": f"saekit_{one.method}",
        "explanationModelName": asked if one.method == "llm" and isinstance(asked, str) else None,
        "umap_x": 0, "umap_y": 0, "umap_cluster": 0, "umap_log_feature_sparsity": 0,
    }  # fmt: skip


def _folder(path: "str | Path", name: str, kind: str) -> Path:
    if kind not in SHAPES:
        raise SaekitError(f"kind {kind!r} is not one of {', '.join(SHAPES)}")
    if inside(name, "model/source").count("/") != 1:
        raise SaekitError(f"model/source {name!r} must be two names with '/' between them")
    return Path(path) / "v1" / name / kind


def _lines(file: Path, name: str, kind: str) -> Iterator[dict[str, Any]]:
    where = f"file {str(file)!r}"
    try:
        with gzip.open(file, "rb") as lines:
            for number in range(1, LONGEST):
                # a few bytes of gzip can hold a line without end
                text = lines.readline(LONGEST + 1)
                if not text:
                    return
                if len(text) > LONGEST:
                    raise SaekitError(f"{where} has a line of more than {LONGEST} bytes; {FIX}")
                if not text.strip():
                    continue
                at = f"{where}, line {number},"
                row = parse(text, at, FIX)
                check_row(row, name, kind, at, FIX)
                yield row
    except (OSError, EOFError, zlib.error) as error:
        why = "it ends too early" if isinstance(error, EOFError) else " ".join(str(error).split())
        raise SaekitError(f"{where} is not an intact gzip file ({why}); {FIX}") from None


def _line(row: Mapping[str, Any], name: str, kind: str, at: str) -> bytes:
    check_row(dict(row), name, kind, at, "correct the row")
    try:
        return json.dumps(row, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise SaekitError(f"{at} of {kind} can't be written as JSON ({error}); correct the row") from None


def check_row(row: Any, name: str, kind: str, at: str, fix: str) -> None:
    """Raise unless a row is one of its kind, of this model and source, and of a feature."""
    records.check(row, SHAPES[kind], at, fix)
    if f"{row['modelId']}/{row['layer']}" != name:
        raise SaekitError(f"{at} is of {row['modelId']}/{row['layer']}, not of {name}; {fix}")
    index = row["index"]
    if not (index.isascii() and index.isdigit() and len(index) < 10 and str(int(index)) == index):
        raise SaekitError(f"{at} has the index {index[:20]!r}, which is no feature's number; {fix}")
    if kind == "activations":
        check_tokens(row["tokens"], row["values"], at, fix)


def check_tokens(tokens: list[Any], values: list[Any], at: str, fix: str) -> None:
    """Raise unless tokens are texts and there is a number for each."""
    # not by records.check: dumps hold hundreds of millions
    sound = all(type(one) is str for one in tokens) and all(type(one) in (int, float) for one in values)
    if not sound or len(tokens) != len(values):
        raise SaekitError(
            f"{at} has {len(tokens)} tokens and {len(values)} values, which aren't as many texts and numbers; {fix}"
        )
