"""What a repository offers: ``saekit-index.json`` beside its dictionaries, and a listing over all such repositories.

The file, schema version 1: ``licence``, and ``dictionaries``, each by the name of its folder with ``layouts``, ``wiring``,
``selection``, ``d_in``, ``d_out``, ``n_features``, ``k`` (None where there is no such number), ``model``, ``reads`` and
``writes`` (hook points), ``data`` and ``rows`` (trained on), ``metrics`` (by key: ``value``, ``n``, ``unit``, ``unit_n``,
``interval``, ``control``), ``measured`` (on what), ``sha256`` of the native weights and ``bytes`` of all files; and
``left_out``, why SAELens's layout is missing, where it is.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saekit import records
from saekit.hub import remote
from saekit.types import SaekitError

SCHEMA = 1
TAG = "saekit"  # of every repository that saekit publishes
MEASURE = {
    "value": float,
    "n": int,
    "unit": str,
    "unit_n": str,
    "interval": list | None,
    "control": {"*": float | None},
}
FIELDS = {
    "licence": str,
    "dictionaries": {
        "*": {
            "layouts": [str], "wiring": str, "selection": str, "d_in": int, "d_out": int, "n_features": int, "k": int | None,
            "model": str, "reads": [str], "writes": [str], "data": str, "rows": int | None, "metrics": {"*": MEASURE},
            "measured": str, "sha256": str, "bytes": int, "left_out?": str,
        }
    },
}  # fmt: skip


@dataclass(frozen=True)
class Released:
    """A dictionary on the Hub: its ``address`` (for ``saekit.load``) and what its repository's index says of it."""

    address: str
    model: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    wiring: str
    selection: str
    n_features: int
    k: int | None
    metrics: dict[str, dict[str, Any]]
    licence: str
    layouts: tuple[str, ...]


def read(file: Path) -> dict[str, Any]:
    """An index file, checked field by field; raises in one sentence that names the field."""
    return records.read(file, "an index of dictionaries", FIELDS, "publish them again", SCHEMA)


def written(licence: str, dictionaries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The content of an index file."""
    data = {"schema": SCHEMA, "licence": licence, "dictionaries": dict(sorted(dictionaries.items()))}
    return json.dumps(data, indent=1, allow_nan=False).encode()


def _rows(repo: str, index: dict[str, Any]) -> list[Released]:
    return [
        Released(
            f"{remote.SCHEME}{repo}/{name}", d["model"], tuple(d["reads"]), tuple(d["writes"]), d["wiring"],
            d["selection"], d["n_features"], d["k"], d["metrics"], index["licence"], tuple(d["layouts"]),
        )
        for name, d in index["dictionaries"].items()
    ]  # fmt: skip


def _cached() -> dict[str, Path]:
    """Index files in the cache, by repository: those of the main branch, as they were when last asked for."""
    from huggingface_hub import constants

    found = {}
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        snapshot = remote.cached_snapshot(repo, "main")
        if snapshot and (snapshot / remote.INDEX).is_file():
            found[repo] = snapshot / remote.INDEX
    return found


def _on_the_hub() -> dict[str, Path]:
    """Index files of all repositories with the tag, fetched where they have changed."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    found = {}
    for info in list(remote.api().list_models(filter=TAG)):
        try:
            found[info.id] = Path(hf_hub_download(info.id, remote.INDEX, library_name="saekit"))
        except RemoteEntryNotFoundError:
            continue  # somebody's use of the tag
        except Exception as error:
            if not remote.of_the_network(error):
                raise
            warnings.warn(f"{info.id} is left out: {remote.why(error)}", stacklevel=3)
    return found


def released(model: str | None = None, hook_point: str | None = None) -> list[Released]:
    """Dictionaries that are published with saekit, sorted by model and address.

    ``model`` and ``hook_point`` (one that it reads or writes) choose among them; ``*`` and ``?`` are wild. The Hub is asked
    for repositories with the tag ``saekit``, and each for its index file. Without a network, or with ``HF_HUB_OFFLINE``, the
    answer is what the cache holds, and a warning says so. An index file that is damaged is left out with a warning.
    """
    try:
        files = _on_the_hub()
    except Exception as error:
        if not remote.of_the_network(error):
            raise
        files = _cached()
        warnings.warn(
            f"the listing is of the {len(files)} repositories in the cache: {remote.why(error)}", stacklevel=2
        )
    rows = []
    for repo, file in files.items():
        try:
            rows += _rows(repo, read(file))
        except SaekitError as error:
            warnings.warn(f"{repo} is left out: {error}", stacklevel=2)
    chosen = [
        row
        for row in rows
        if remote.matches(row.model, model)
        and any(remote.matches(point, hook_point) for point in (*row.reads, *row.writes))
    ]
    return sorted(chosen, key=lambda row: (row.model, row.address))
