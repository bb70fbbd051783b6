"""Publishing dictionaries to the Hugging Face Hub: a folder is made, and goes up as one commit.

In the repository every dictionary has a folder of its name, with saekit's files and, beside them, SAELens's, so that either
toolkit loads it by the same name; ``README.md`` is the model card and ``saekit-index.json`` the index. One commit means
that a reader sees all of it or nothing. What was uploaded before a fault stays with the Hub, under its hash, and isn't sent
again when the same call is repeated.
"""

import copy
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.activations import file_sha256
from saekit.dictionaries import Dictionary
from saekit.hub import card as cards
from saekit.hub import figure, formats, index, native, remote
from saekit.types import SaekitError

README = "README.md"
WAITS = (1.0, 4.0)  # seconds before the second and the third try of what fails in passing
LONGEST = 60.0  # seconds that the Hub may ask to wait
FIGURES = {"training": figure.of_training, "density": figure.of_density}
# names that can be a folder's on any system, and part of an address
BRANCH = re.compile(r"[A-Za-z0-9][\w./-]*")
RESERVED = ("README.md", ".gitattributes", remote.INDEX)
ODD = re.compile(r"[^\w.+-]+")
Source = str | Path | Dictionary


@dataclass(frozen=True)
class Published:
    """What was published, or would be: ``addresses`` for :func:`saekit.load`, ``files`` with their sizes in bytes.

    ``folder`` is where a dry run wrote them, ``commit`` the commit of an upload; the other is None. ``left_out`` says
    of each dictionary whose function SAELens's layout can't express why not.
    """

    repo: str
    addresses: tuple[str, ...]
    files: dict[str, int]
    folder: Path | None = None
    commit: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def _named(
    dictionaries: "Source | Sequence[Source] | Mapping[str, Source]",
) -> dict[str, tuple[Dictionary, Path | None]]:
    """The dictionaries by name, each with the folder of its run; raises before anything else where a name is not clear."""
    given: Sequence[Source] | Mapping[str, Source]
    if isinstance(dictionaries, Dictionary):
        given = [dictionaries]
    elif isinstance(dictionaries, str | Path):
        given = _runs(Path(dictionaries))
    elif isinstance(dictionaries, Mapping | Sequence):
        given = dictionaries
    else:
        raise SaekitError(
            f"dictionaries are a {type(dictionaries).__name__}; give a folder, a Dictionary, or several"
        )
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, source) for source in given]
    if not pairs:
        raise SaekitError("dictionaries are none; give a folder, a Dictionary, or several")
    found: dict[str, tuple[Dictionary, Path | None]] = {}
    for name, source in pairs:
        if isinstance(source, Dictionary):
            dictionary, folder = source, None
        elif not isinstance(source, str | Path):
            raise SaekitError(
                f"dictionary {name or source!r} is a {type(source).__name__}; give a folder or a Dictionary"
            )
        else:
            dictionary, folder = native.load(source), Path(source)
        # as SAELens's users name theirs: after the hook point
        name = ODD.sub(
            "-", name if name is not None else "_".join(dictionary.reads[:1]) or "dictionary"
        ).strip("-.")
        if not name or name in found:
            raise SaekitError(f"name {name!r} is that of two dictionaries; give them as a mapping of names")
        if name in RESERVED:
            raise SaekitError(
                f"name {name!r} is that of a file of the repository; give the dictionary another"
            )
        found[name] = dictionary, folder
    return found


def _runs(folder: Path) -> list[Source] | dict[str, Source]:
    """A folder's own dictionary, or by name those inside, without the frozen controls that a sweep trains beside."""
    inside = sorted(file.parent for file in folder.glob(f"*/{native.CARD}"))
    if not inside or (folder / native.CARD).is_file():
        return [folder]
    return {run.name: run for run in inside if run.name != "frozen" and not run.name.endswith("_frozen")}


def _scrubbed(value: Any) -> Any:
    """A card without paths of this machine: their last parts remain."""
    if isinstance(value, dict):
        return {key: _scrubbed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scrubbed(item) for item in value]
    return Path(value).name if isinstance(value, str) and cards.is_path(value) else value


def _for_others(dictionary: Dictionary, entry: Mapping[str, Any], licence: str) -> Dictionary:
    """The dictionary with the card that is published; the weights are shared."""
    shown = copy.copy(dictionary)
    about = _scrubbed(copy.deepcopy(dictionary.card))
    data = about.setdefault("data", {})
    data["model"] = {**data.get("model", {}), "name": entry["model"]}
    data["text"] = {**data.get("text", {}), "name": entry["data"]}
    shown.card = {**about, "licence": licence, "metrics": entry["metrics"]}
    return shown


def _write(
    folder: Path,
    name: str,
    dictionary: Dictionary,
    run: Path | None,
    entry: dict[str, Any],
    licence: str,
    layouts: Sequence[str] | None,
) -> None:
    """A dictionary's files, in every layout, and what the index says of them, into ``entry``."""
    place = folder / name
    shown = _for_others(dictionary, entry, licence)
    for layout in layouts or ("native", "saelens"):
        before = {f.name for f in place.rglob("*")} if place.is_dir() else set()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                if layout == "native":
                    native.save(shown, scratch)
                    entry["sha256"] = file_sha256(Path(scratch) / native.WEIGHTS)
                else:
                    save = formats.named(layout).save
                    assert save is not None  # _layouts has looked
                    save(shown, Path(scratch))
            except SaekitError as error:
                if layouts is not None:
                    raise
                entry["left_out"] = str(error)
                continue
            for file in sorted(f for f in Path(scratch).rglob("*") if f.is_file()):
                target = place / file.relative_to(scratch)
                if file.name in before:
                    raise SaekitError(
                        f"layouts = {list(layouts or ())} both have a file {file.name!r}; publish them as two repositories"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
                target.chmod(0o644)
        entry["layouts"].append(layout)
    for title, draw in FIGURES.items():
        if run and (picture := draw(run)):
            (place / f"{title}.svg").write_text(picture)
    entry["bytes"] = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())


def _write_front(
    folder: Path, repo: str, revision: str, licence: str, entries: dict[str, Any], kept: Sequence[str]
) -> None:
    """The index and the card, over all dictionaries of the repository; ``kept`` are files that are there already."""
    present = [*kept, *(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())]
    figures = {
        name: [f"{name}/{title}.svg" for title in FIGURES if f"{name}/{title}.svg" in present]
        for name in entries
    }
    entries = dict(sorted(entries.items()))
    (folder / remote.INDEX).write_bytes(index.written(licence, entries))
    (folder / README).write_text(cards.card(repo, revision, licence, entries, figures))


def _files(folder: Path) -> dict[str, int]:
    return {
        f.relative_to(folder).as_posix(): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()
    }


def _layouts(layouts: Sequence[str] | None) -> None:
    """Raise where a layout is unknown or can't be written."""
    for layout in layouts or ():
        if layout != "native" and formats.named(layout).save is None:
            raise SaekitError(f"layout {layout!r} can be read, not written; leave it out")
    if layouts is not None and "native" not in layouts:
        raise SaekitError(
            f"layouts = {list(layouts)} must hold 'native', which the index and saekit.load go by"
        )


def publish(
    dictionaries: "Source | Sequence[Source] | Mapping[str, Source]",
    repo: str,
    *,
    licence: str | None = None,
    base_model: str | None = None,
    data: str | None = None,
    private: bool = False,
    revision: str = "main",
    layouts: Sequence[str] | None = None,
    dry_run: bool = False,
    out: "str | Path | None" = None,
) -> Published:
    """Publish dictionaries as ``owner/repo`` on the Hub, in one commit; with ``dry_run`` write the folder instead.

    ``dictionaries``: a run or saved dictionary, a folder of them, a ``Dictionary``, a list of these, or a mapping of names
    to them; without a name it is the hook point that is read, and a folder of runs has theirs. Those that are in the
    repository already stay, unless one has the same name. ``layouts``: "native", and "saelens" beside it; by default both,
    where SAELens can express the dictionary (``left_out`` of the result says why where it can't).

    The model card is made from what the runs recorded. It needs a licence (an id of the Hub's list), the base model, the
    data, hook points, and metrics with n and unit; ``licence``, ``base_model`` and ``data`` say what a run doesn't. ``private``
    holds for a repository that is made; ``revision`` is a branch, made from the main one where it isn't there.

    A dry run asks no network, so its card is that of a repository which holds nothing else; ``out`` is its folder, by default ``publish_NAME`` after the repository's. The upload needs a token with
    the right to write, from ``HF_TOKEN`` or ``hf auth login``; ``huggingface_hub`` reads it, saekit doesn't.

    Raises SaekitError, with nothing changed: for missing metadata (each field is named), a token or right that is missing,
    or a Hub that can't be reached after three tries. The same call then goes on where it stopped.
    """
    remote.check_repo(repo)
    if not BRANCH.fullmatch(revision) or ".." in revision:
        raise SaekitError(f"revision {revision!r} is no name of a branch; give one such as 'main'")
    _layouts(layouts)
    if base_model is not None and not cards.is_id(base_model):
        raise SaekitError(f"base_model {base_model!r} must be an id of the Hub, owner/name")
    if data is not None and cards.is_path(data):
        raise SaekitError(f"data {data!r} is a path of this machine; give an id of the Hub, or words")
    target = Path(out) if out is not None else Path(f"publish_{repo.split('/')[1]}")
    if (
        dry_run
        and target.exists()
        and not (target / remote.INDEX).is_file()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise SaekitError(f"out {str(target)!r} is there and no dry run made it; choose another folder")
    found = _named(dictionaries)
    entries: dict[str, dict[str, Any]] = {}
    missing = {}
    for name, (dictionary, run) in found.items():
        entries[name], missing[name] = cards.facts(dictionary, run, licence, base_model, data)
        entries[name] |= {"layouts": []}
    cards.refuse(missing)
    licences = {licence or str(d.card["licence"]) for d, _ in found.values()}
    if len(licences) > 1:
        raise SaekitError(
            f"licence is {' and '.join(sorted(licences))} in one repository; publish them as several, or give licence="
        )
    licence = licences.pop()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise SaekitError(
            f"licence {licence!r} is no id of the Hub's list; write apache-2.0, mit, cc-by-4.0 or another in small letters"
        )
    if not dry_run:
        remote.check_token()
    with _staging(target if dry_run else None) as folder:
        for name, (dictionary, run) in found.items():
            _write(folder, name, dictionary, run, entries[name], licence, layouts)
        commit = None
        if dry_run:
            _write_front(folder, repo, revision, licence, entries, ())
        else:
            commit = _tried(repo, lambda: _upload(folder, repo, revision, licence or "", private, entries))
        files = _files(folder)
    at = "" if revision == "main" else f"@{revision}"
    addresses = tuple(f"{remote.SCHEME}{repo}/{name}{at}" for name in found)
    left_out = {name: e["left_out"] for name, e in entries.items() if "left_out" in e}
    return Published(repo, addresses, files, target if dry_run else None, commit, left_out)


@contextmanager
def _staging(target: Path | None) -> Iterator[Path]:
    """A folder to write into: a passing one, or beside the target, which it replaces when all is written."""
    parent = target.resolve().parent if target else None
    try:
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".publish_") as scratch:
            folder = Path(scratch) / "repository"
            folder.mkdir()
            yield folder
            if target:
                if target.is_dir():
                    shutil.rmtree(target)
                folder.replace(target)
    except OSError as error:
        raise SaekitError(
            f"out {str(target or tempfile.gettempdir())!r} can't be written: {error.strerror}; choose another folder"
        ) from None


def _tried(repo: str, act: Any) -> str:
    """What ``act`` returns; it is tried again where the Hub's trouble may pass, and its end is told in one sentence."""
    for wait in (*WAITS, None):
        try:
            return act()
        except SaekitError:
            raise
        except Exception as error:
            told = _told(error)
            if told is None:
                raise
            # 412: somebody else's commit came in between, and the index has to be read again
            if wait is None or not (remote.passing(error) or remote.status_of(error) == 412):
                raise SaekitError(
                    f"publishing to {repo!r} failed: {told}; it shows nothing of this, or all of it if only the answer was lost: run the same again, and what was uploaded isn't sent twice"
                ) from None
            warnings.warn(f"publishing to {repo!r}: {told}; trying again", stacklevel=4)
            time.sleep(max(wait, remote.asked_to_wait(error, LONGEST)))
    raise AssertionError("unreachable")


def _told(error: Exception) -> str | None:
    """What went wrong, of errors that are the Hub's or the connection's; None of a program's own."""
    if remote.of_the_network(error):
        return remote.why(error)
    if isinstance(
        error, ValueError
    ):  # how huggingface_hub tells that the Hub refuses a card, or a large file
        return remote.redacted(str(error))
    return None


def _upload(
    folder: Path, repo: str, revision: str, licence: str, private: bool, entries: dict[str, Any]
) -> str:
    """One commit on top of what the repository holds now; returns its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    hub = remote.api()
    info = _repository(hub, repo, revision, private)
    there = [found.rfilename for found in info.siblings or ()]
    others = _others(hub, repo, info.sha, licence, there)
    mine = _files(folder)
    stale = [f for f in there if f not in mine and f.split("/")[0] in entries and "/" in f]
    _write_front(folder, repo, revision, licence, {**others, **entries}, [f for f in there if f not in stale])
    operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in _files(folder)]
    operations += [CommitOperationDelete(name) for name in stale]
    message = (
        f"Publish {', '.join(sorted(entries)[:3])}{' and others' if len(entries) > 3 else ''} with saekit"
    )
    done = hub.create_commit(
        repo, operations, commit_message=message, revision=revision, parent_commit=info.sha
    )
    _verify(hub, repo, done.oid, folder)
    return done.oid


def _repository(hub: Any, repo: str, revision: str, private: bool) -> Any:
    """The state of the branch, which is made where it isn't there, as the repository is."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = hub.model_info(repo, timeout=remote.TIMEOUT)
    except RepositoryNotFoundError:
        hub.create_repo(repo, private=private, exist_ok=True)
        info = hub.model_info(repo, timeout=remote.TIMEOUT)
    if private and not info.private:
        raise SaekitError(
            f"repository {repo!r} is public already; make it private in its settings, or publish without private"
        )
    if revision == "main":
        return info
    try:
        return hub.model_info(repo, revision=revision, timeout=remote.TIMEOUT)
    except RevisionNotFoundError:
        hub.create_branch(repo, branch=revision, exist_ok=True)
        return hub.model_info(repo, revision=revision, timeout=remote.TIMEOUT)


def _others(hub: Any, repo: str, commit: str, licence: str, there: Sequence[str]) -> dict[str, Any]:
    """Entries of the dictionaries that are in the repository; raises where it isn't one of ours."""
    if remote.INDEX not in there:
        strange = [name for name in there if name != ".gitattributes"]
        if strange:
            raise SaekitError(
                f"repository {repo!r} holds {strange[0]!r} and no {remote.INDEX}, so saekit didn't make it; choose another name"
            )
        return {}
    found = index.read(Path(hub.hf_hub_download(repo, remote.INDEX, revision=commit)))
    if found["licence"] != licence:
        raise SaekitError(
            f"licence {licence!r} is not the {found['licence']!r} of what is in {repo!r}; give that, or choose another repository"
        )
    return found["dictionaries"]


def _verify(hub: Any, repo: str, commit: str, folder: Path) -> None:
    """Raise where the commit doesn't hold what was sent."""
    there = {
        f.path: f for f in hub.list_repo_tree(repo, recursive=True, revision=commit) if hasattr(f, "blob_id")
    }
    for name, size in _files(folder).items():
        found = there.get(name)
        large = found.lfs.sha256 if found is not None and found.lfs is not None else None
        if found is None or found.size != size or large not in (None, file_sha256(folder / name)):
            raise SaekitError(
                f"commit {commit[:12]} of {repo!r} doesn't hold {name!r} as it was sent; publish again"
            )
