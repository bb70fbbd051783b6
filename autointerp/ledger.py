"""The ledger: every reply that came and every try that was made, append-only in one SQLite file.

    replies    id, key, unit, request (canonical JSON), text, finish, refusal, prompt_tokens, completion_tokens
    attempts   id, key, unit, outcome, seconds, prompt_tokens, completion_tokens, at (Unix time)

``application_id`` and ``user_version`` hold what it is and the schema's version; triggers refuse updates and deletions.
A reply and its attempt are one transaction, so a process that is killed leaves all replies that it had taken and no half
one. While it is open the file is in WAL mode; a power cut may lose the last replies, never the file. Closed, it is one
plain file. A key's latest reply counts. It holds prompts and replies as they were, and no key of an endpoint.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from saekit.autointerp.requests import Completion
from saekit.errors import SaekitError

SCHEMA = 1
APPLICATION = 0x5341454C  # "SAEL"
MODES = ("live", "cache", "replay")
_TABLES = (
    "CREATE TABLE replies (id INTEGER PRIMARY KEY, key TEXT NOT NULL, unit TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL, refusal INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)",
    "CREATE INDEX replies_by_key ON replies (key)",
    "CREATE TABLE attempts (id INTEGER PRIMARY KEY, key TEXT NOT NULL, unit TEXT NOT NULL, outcome TEXT NOT NULL, seconds REAL NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, at REAL NOT NULL)",
    *(
        f"CREATE TRIGGER {table}_{deed} BEFORE {deed} ON {table} BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END"
        for table in ("replies", "attempts")
        for deed in ("UPDATE", "DELETE")
    ),
)


class Ledger:
    """A ledger on disk, made if it isn't there.

    ``mode``: ``cache`` asks what isn't recorded, ``live`` asks everything and records it anew, ``replay`` never asks and
    never writes: a reply that isn't recorded is an error that names the unit. Threads may share one, processes a file.
    """

    def __init__(self, path: str | Path, mode: str = "cache"):
        if mode not in MODES:
            raise SaekitError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        self.path, self.mode = Path(path), mode
        self._lock = threading.RLock()
        self._closed = False
        if self.path.is_dir():
            raise SaekitError(f"ledger {str(path)!r} is a folder; give a file")
        if mode == "replay" and not self.path.is_file():
            raise SaekitError(
                f"ledger {str(path)!r} isn't there to replay; record one with mode='cache' first"
            )
        with self._told("opened"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            access = "ro" if mode == "replay" else "rwc"
            self._db = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={access}", uri=True, timeout=30,
                isolation_level=None, check_same_thread=False,
            )  # fmt: skip
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        waiting = self.path.with_name(f"{self.path.name}-wal").exists()
        with self._told("read"):
            if not self._is_one() and self.mode != "replay":
                self._make()
            if not self._is_one():
                raise SaekitError(
                    f"ledger {str(self.path)!r} is a database of something else; give another path"
                )
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version != SCHEMA or self._tables() != sorted(_TABLES):
                raise SaekitError(
                    f"ledger {str(self.path)!r} has schema {version} and this saekit reads {SCHEMA}, with its own tables; "
                    "give another path, or install another saekit"
                )
            page = self._db.execute("PRAGMA page_size").fetchone()[0]
            if not waiting and self.path.stat().st_size % page:
                raise sqlite3.DatabaseError("its last page is cut short")  # which SQLite fills with zeros
            if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            if self.mode != "replay":
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")  # safe against kills; fsync at checkpoints

    def _is_one(self) -> bool:
        return self._db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION

    def _tables(self) -> list[str]:
        return sorted(
            sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
        )

    def _make(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")  # of two processes that make it at once, one does
        try:
            if not self._tables() and not self._is_one():
                for statement in _TABLES:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise SaekitError(
                f"ledger {str(self.path)!r} can't be {what} ({' '.join(str(error).split())}); give another path, or the whole file from a copy"
            ) from None

    def last(self) -> int:
        """Id of the latest reply; 0 where there is none."""
        with self._lock, self._told("read"):
            return self._db.execute("SELECT coalesce(max(id), 0) FROM replies").fetchone()[0]

    def find(self, key: str, after: int = 0) -> Completion | None:
        """The latest reply of a key, if it is one of those after the id ``after``."""
        with self._lock, self._told("read"):
            row = self._db.execute(
                "SELECT text, prompt_tokens, completion_tokens, finish, refusal FROM replies"
                " WHERE key = ? AND id > ? ORDER BY id DESC LIMIT 1",
                (key, after),
            ).fetchone()
        if row is None:
            return None
        text, prompt, completion, finish, refusal = row
        return Completion(text, prompt, completion, finish, bool(refusal))

    def record(self, key: str, unit: str, request: str, reply: Completion, seconds: float) -> None:
        """Append a reply, and the attempt that gave it, as one transaction."""
        spent = (reply.prompt_tokens, reply.completion_tokens)
        with self._lock, self._told("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute(
                    "INSERT INTO replies VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (key, unit, request, reply.text, reply.finish, int(reply.refusal), *spent),
                )
                self._attempt(key, unit, "reply", seconds, *spent)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def attempt(self, key: str, unit: str, outcome: str, seconds: float) -> None:
        """Append a try that gave no reply, with what became of it."""
        with self._lock, self._told("written"):
            self._attempt(key, unit, outcome, seconds, 0, 0)

    def _attempt(self, *row: str | float) -> None:
        self._db.execute("INSERT INTO attempts VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", (*row, time.time()))

    def outcomes(self) -> dict[str, int]:
        """How many attempts had each outcome: ``reply``, or the kind of failure."""
        with self._lock, self._told("read"):
            return dict(
                self._db.execute("SELECT outcome, count(*) FROM attempts GROUP BY outcome ORDER BY outcome")
            )

    def close(self) -> None:
        """Leave one plain file; a ledger that is open elsewhere stays in WAL mode."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self.mode != "replay":
                    self._db.execute("PRAGMA busy_timeout = 0")
                    self._db.execute("PRAGMA journal_mode = DELETE")
            except sqlite3.Error:
                pass  # somebody else has it open; the last one to close it does this
            finally:
                self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
