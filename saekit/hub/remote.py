"""Dictionaries on the Hugging Face Hub: ``hf://owner/repo/sub@revision`` becomes a folder or file of the local cache.

Everything goes through ``huggingface_hub``: its cache (``HF_HOME``), its endpoint (``HF_ENDPOINT``), its token
(``HF_TOKEN``, which is never read, kept or printed here), its ``HF_HUB_OFFLINE``. What is read from the cache because the
Hub was not asked is said in a warning, unless the address names a commit, which can't change.
"""

import fnmatch
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from saekit.activations import file_sha256
from saekit.hub.native import CARD, WEIGHTS
from saekit.registry import nearest
from saekit.types import SaekitError

SCHEME = "hf://"
INDEX = "saekit-index.json"
# what holds a dictionary's numbers, in any format
TENSORS = (".safetensors", ".npz", ".pt", ".pth")
# folders inside a dictionary that hold its numbers
INNER = ("checkpoints",)
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 10.0  # seconds for the first answer
CHUNK = 1 << 20


@dataclass(frozen=True)
class Address:
    """A place on the Hub: a model repository, a folder or file in it (may be empty), a branch, tag or commit."""

    repo: str
    sub: str
    revision: str

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{SCHEME}{self.repo}{'/' if self.sub else ''}{self.sub}{at}"


def parse(address: str) -> Address:
    """The parts of ``hf://owner/repo[/sub][@revision]``; raises in one sentence where it has another form."""
    body, at, revision = address.removeprefix(SCHEME).partition("@")
    parts = body.strip("/").split("/")
    plain = all(part not in ("", ".", "..") and not set(part) & set("\\?#*[]") for part in parts)
    if not address.startswith(SCHEME) or len(parts) < 2 or not plain or (at and not revision):
        raise SaekitError(
            f"address {address!r} is not of the form hf://owner/repo/name or hf://owner/repo/name@revision"
        )
    check_repo("/".join(parts[:2]))
    return Address("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")


def check_repo(repo: str) -> None:
    """Raise unless it is ``owner/name`` as the Hub allows them: letters, digits, ``-``, ``_`` and ``.``."""
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo, re.ASCII) or ".." in repo or "--" in repo:
        raise SaekitError(f"repository {repo!r} must be owner/name, of letters, digits, '-', '_' and '.'")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer that an error stems from; None where none came."""
    answers = (getattr(link, "response", None) for link in _chain(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


def of_the_network(error: BaseException) -> bool:
    """Whether an error is the Hub's or the connection's, and not a mistake in a program."""
    return any(
        isinstance(link, OSError) or type(link).__module__.split(".")[0].startswith(("httpx", "httpcore"))
        for link in _chain(error)
    )


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: no answer, too many requests, trouble of the server's."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status is None:
        return of_the_network(error) and not isinstance(error, OfflineModeIsEnabled)
    return status in (408, 429) or status >= 500


def why(error: BaseException) -> str:
    """What stood in the way, in words that never hold a token."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status is None:
        first = list(_chain(error))[-1]
        told = f": {first.strerror}" if isinstance(first, OSError) and first.strerror else ""
        return f"the connection to the Hub failed ({type(first).__name__}{told})"
    reasons = {
        401: "the Hub takes no such token: set HF_TOKEN to a valid one, or run `hf auth login`",
        403: "the token may not do this: it needs the right to read a private repository, or to write",
        404: "it isn't there, or is private and HF_TOKEN doesn't open it",
        429: "too many requests: wait some minutes",
    }
    said = next(filter(None, (getattr(link, "server_message", None) for link in _chain(error))), None)
    otherwise = (
        "it is in trouble, try again later"
        if status >= 500
        else f"it refuses this ({redacted(said or 'no reason given')})"
    )
    return f"the Hub answers {status}: {reasons.get(status, otherwise)}"


def redacted(text: str) -> str:
    """A text of the server's in one line, without the token, which some servers repeat."""
    from huggingface_hub import get_token

    token = get_token()
    return " ".join(text.replace(token, "***").split() if token else text.split())[:300]


def check_token() -> None:
    """Raise unless there may be a network and there is a token to write with."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise SaekitError("HF_HUB_OFFLINE is set, so nothing can be published; unset it, or make a dry run")
    if not get_token():
        raise SaekitError(
            "there is no token of the Hub; set HF_TOKEN to one that may write, run `hf auth login`, or make a dry run"
        )


def asked_to_wait(error: BaseException, longest: float) -> float:
    """Seconds that the Hub asks to wait (Retry-After), at most ``longest``; 0 where it asks for none."""
    for link in _chain(error):
        if getattr(link, "response", None) is not None:
            asked = link.response.headers.get("retry-after", "")  # type: ignore[attr-defined]
            return min(longest, float(asked)) if asked.isdigit() else 0.0
    return 0.0


def api() -> Any:
    """The client of the Hub, at its endpoint of the moment."""
    import huggingface_hub

    return huggingface_hub.HfApi(library_name="saekit")


def _cache(repo: str) -> Path:
    """Where the cache keeps a repository; the layout is documented by huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def cached_snapshot(repo: str, revision: str) -> Path | None:
    """The folder in which the cache keeps a revision, as it was when it was last asked for; None where it never was."""
    commit = revision
    if not COMMIT.fullmatch(revision):
        ref = _cache(repo) / "refs" / revision
        if not ref.is_file():
            return None
        commit = ref.read_text().strip()
    folder = _cache(repo) / "snapshots" / commit
    return folder if folder.is_dir() else None


def places(files: Sequence[str]) -> list[str]:
    """Folders of a repository that hold a dictionary of any format; '' is the repository itself."""
    found = set()
    for name in files:
        if name.endswith(TENSORS):
            folder = PurePosixPath(name).parent
            folder = folder.parent if folder.name in INNER else folder
            found.add("" if str(folder) == "." else str(folder))
    return sorted(found)


def wanted(address: Address, files: Sequence[str], format: str | None) -> tuple[str, list[str]]:
    """The folder or file that an address means in a listing, and the files to have for it; raises with what there is."""
    known, sub = places(files), address.sub
    if not sub and "" not in known and len(known) == 1:
        sub = known[0]  # the only one there is
    inside = f"{sub}/" if sub else ""
    if sub in files:  # formats of one file, whose config lies beside it
        folder = str(PurePosixPath(sub).parent)
        beside = [
            f for f in files if str(PurePosixPath(f).parent) == folder and f.endswith((".json", ".yaml"))
        ]
        return sub, [sub, *beside]
    if format in (None, "native") and f"{inside}{CARD}" in files:
        return sub, [f"{inside}{CARD}", f"{inside}{WEIGHTS}"]
    # at the top of a repository of several, what lies in folders is another dictionary's
    deeper = [place for place in known if place.startswith(inside) and place != sub]
    mine = [
        f
        for f in files
        if f.startswith(inside) and not (not sub and any(f.startswith(f"{d}/") for d in deeper))
    ]
    if format != "native":  # saekit's files lie beside those of the format that is asked for
        mine = [f for f in mine if PurePosixPath(f).name not in (CARD, WEIGHTS)]
    if not mine or not any(f.endswith(TENSORS) for f in mine) or (not sub and "" not in known):
        if not known:
            raise SaekitError(f"{address} holds no weights of a dictionary; choose another repository")
        raise SaekitError(
            f"{address} names no dictionary{nearest(address.sub, known) if address.sub else _listed(known)}; write hf://{address.repo}/NAME"
        )
    return sub, mine


def _listed(names: Sequence[str], most: int = 12) -> str:
    return (
        "; there are "
        + ", ".join(names[:most])
        + (f" and {len(names) - most} more" if len(names) > most else "")
    )


def _missing(address: Address, error: BaseException) -> SaekitError:
    """A repository or revision that the Hub doesn't have, answered with those that it has."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return SaekitError(f"{address} is gated; accept its conditions on its page, and set HF_TOKEN")
    hub = api()
    try:
        if isinstance(error, RevisionNotFoundError):
            refs = hub.list_repo_refs(address.repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return SaekitError(
                f"revision {address.revision!r} is not in {address.repo}{nearest(address.revision, names)}"
            )
        owner = address.repo.split("/")[0]
        repos = [found.id for found in hub.list_models(author=owner, limit=200)]
        if repos:
            return SaekitError(
                f"repository {address.repo!r} isn't on the Hub, or is private and HF_TOKEN doesn't open it{nearest(address.repo, repos)}"
            )
    except Exception as second:
        if not of_the_network(second):
            raise
    return SaekitError(f"{address} can't be had: {why(error)}")


def checked(path: Path) -> None:
    """Compare a cached file with the hash that its blob is named by (git's SHA-1, or SHA-256 of a large file).

    ``huggingface_hub`` compares sizes alone. A file that differs is taken out of the cache, so that the next try
    fetches it anew. Where the cache has no links (some Windows systems), there is no name to compare with.
    """
    blob = path.resolve()
    name = blob.name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        found = file_sha256(blob)
    elif COMMIT.fullmatch(name):
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
        with blob.open("rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
        found = digest.hexdigest()
    else:
        return
    if found != name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise SaekitError(
            f"file {path.name!r} arrived with another hash than the Hub states for it, and was removed from the cache; run it again, and if it happens twice, ask the repository's owner"
        )


def _from_cache(address: Address, format: str | None, reason: str) -> Path:
    """What the cache holds of an address, with a word about it; raises with what it holds."""
    snapshot = cached_snapshot(address.repo, address.revision)
    if snapshot is None:
        raise SaekitError(
            f"{address} can't be had: {reason}, and the cache doesn't hold it; fetch it once with a network"
        )
    files = sorted(str(f.relative_to(snapshot).as_posix()) for f in snapshot.rglob("*") if f.is_file())
    try:
        sub, names = wanted(address, files, format)
    except SaekitError as error:
        raise SaekitError(f"{error} (of what the cache holds: {reason})") from None
    for name in names:
        checked(snapshot / name)
    if not COMMIT.fullmatch(address.revision):
        warnings.warn(
            f"{address} is read from the cache, as of commit {snapshot.name[:12]}: {reason}", stacklevel=4
        )
    return snapshot / sub


def fetch(address: str, format: str | None = None) -> Path:
    """A dictionary on the Hub as a local folder (or file, for formats of one file), in ``huggingface_hub``'s cache.

    Only the files of that dictionary are downloaded; of a repository in several layouts those of ``format``, by default
    saekit's own. A commit that is cached is read without a question to the Hub. Every file is compared with its hash.

    Raises SaekitError for an unknown repository, revision or name, with what there is; and where there is neither a
    network (or ``HF_HUB_OFFLINE`` is set) nor a copy in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    place = parse(address)
    if COMMIT.fullmatch(place.revision) and cached_snapshot(place.repo, place.revision):
        try:
            return _from_cache(place, format, "it is a commit")
        except SaekitError:
            pass  # another dictionary of it was fetched; the Hub knows them all
    try:
        info = api().model_info(place.repo, revision=place.revision, timeout=TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _missing(place, error) from None
    except Exception as error:
        if not of_the_network(error):
            raise
        if status_of(error) in (401, 403):
            raise SaekitError(f"{place} can't be had: {why(error)}") from None
        return _from_cache(place, format, why(error))
    files = [found.rfilename for found in info.siblings]
    sub, names = wanted(place, files, format)
    patterns = [_literal(name) for name in (*names, *(f for f in files if f == INDEX))]
    try:
        # by the branch's name, so that the cache remembers which commit it was
        found = Path(
            snapshot_download(
                place.repo, revision=place.revision, allow_patterns=patterns, library_name="saekit"
            )
        )
    except Exception as error:
        if not of_the_network(error):
            raise
        raise SaekitError(
            f"{place} can't be downloaded: {why(error)}; run it again, it goes on where it stopped"
        ) from None
    if found.name != info.sha:  # the Hub went away in between, and an older copy came; or somebody published
        raise SaekitError(f"{place} changed, or the Hub went away, while it was downloaded; run it again")
    for name in names:
        checked(found / name)
    return found / sub


def _literal(name: str) -> str:
    """A pattern that matches one name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def matches(name: str, pattern: str | None) -> bool:
    """Whether a name is of a pattern (``*`` and ``?`` are wild); no pattern matches all."""
    return pattern is None or fnmatch.fnmatchcase(name, pattern)
