"""The ledger: what was recorded is there, once and for all, whatever happens to the process or the file."""

import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from saekit.autointerp.ledger import SCHEMA, Ledger
from saekit.autointerp.requests import Completion
from saekit.errors import SaekitError


def reply(text: str, prompt: int = 10) -> Completion:
    return Completion(text, prompt, 3)


def filled(path: Path, n: int = 200) -> Path:
    """A closed ledger of n replies, over several pages."""
    with Ledger(path) as ledger:
        for i in range(n):
            ledger.record(f"key {i}", f"unit {i}", "{}" * 50, reply(f"text {i} " * 10), 0.5)
    return path


def test_a_reply_comes_back_as_it_was(tmp_path: Path) -> None:
    given = Completion("« 𝄞 \x00 ' \n", 7, 8, "content_filter", True)
    with Ledger(tmp_path / "new" / "folder" / "l.sqlite") as ledger:
        assert ledger.find("k") is None and ledger.last() == 0
        ledger.record("k", "u", "{}", given, 0.1)
        assert ledger.find("k") == given
    for mode in ("cache", "replay"):
        with Ledger(tmp_path / "new" / "folder" / "l.sqlite", mode) as ledger:
            assert ledger.find("k") == given and ledger.find("K") is None


def test_the_latest_reply_counts_and_the_earlier_ones_stay(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        for text in ("a", "b"):
            ledger.record("k", "u", "{}", reply(text), 0.1)
        mark = ledger.last()
        assert ledger.find("k") == reply("b") and ledger.find("k", after=mark) is None
        ledger.record("k", "u", "{}", reply("c"), 0.1)
        assert ledger.find("k", after=mark) == reply("c")
    with sqlite3.connect(tmp_path / "l.sqlite") as plain:
        assert [text for (text,) in plain.execute("SELECT text FROM replies ORDER BY id")] == ["a", "b", "c"]
    plain.close()


@pytest.mark.parametrize(
    "deed", ["UPDATE replies SET text = 'x'", "DELETE FROM replies", "UPDATE attempts SET outcome = 'x'", "DELETE FROM attempts"]
)  # fmt: skip
def test_nothing_that_is_recorded_can_be_changed(deed: str, tmp_path: Path) -> None:
    plain = sqlite3.connect(filled(tmp_path / "l.sqlite", 3))
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        plain.execute(deed)
    plain.close()


def test_attempts_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        for outcome in ("429", "timeout", "429"):
            ledger.attempt("k", "u", outcome, 0.1)
        ledger.record("k", "u", "{}", reply("a"), 0.2)
        assert ledger.outcomes() == {"429": 2, "reply": 1, "timeout": 1}


def test_a_reply_and_its_attempt_are_both_there_or_neither(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger._db.execute(
            "CREATE TEMP TRIGGER full BEFORE INSERT ON attempts BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
        with pytest.raises(SaekitError, match=r"l\.sqlite.*written.*disk is full"):
            ledger.record("k", "u", "{}", reply("a"), 0.1)
        ledger._db.execute("DROP TRIGGER full")
        assert ledger.find("k") is None and ledger.outcomes() == {}
        ledger.record("k", "u", "{}", reply("b"), 0.1)
        assert ledger.find("k") == reply("b")


def test_closed_it_is_one_plain_file_and_replaying_leaves_its_bytes(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite")
    assert [p.name for p in tmp_path.iterdir()] == ["l.sqlite"]
    before = path.read_bytes()
    assert before[18:20] == b"\x01\x01"  # not in WAL mode: readable from a medium that can't be written
    with Ledger(path, "replay") as ledger:
        assert ledger.find("key 5") == reply("text 5 " * 10)
        with pytest.raises(SaekitError, match="readonly"):
            ledger.record("k", "u", "{}", reply("a"), 0.1)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["l.sqlite"]


@pytest.mark.parametrize("mode", ["cache", "replay"])
def test_a_copy_of_a_ledger_in_use_holds_what_was_recorded(mode: str, tmp_path: Path) -> None:
    """What a killed process leaves: the file and its WAL, as they are on disk at that moment."""
    with Ledger(tmp_path / "l.sqlite") as ledger:
        for i in range(50):
            ledger.record(f"key {i}", "u", "{}", reply(f"text {i}"), 0.1)
        (tmp_path / "left").mkdir()
        for part in tmp_path.glob("l.sqlite*"):
            if not part.name.endswith("-shm"):
                shutil.copy(part, tmp_path / "left")
    with Ledger(tmp_path / "left" / "l.sqlite", mode) as left:
        assert [left.find(f"key {i}") for i in range(50)] == [reply(f"text {i}") for i in range(50)]


def test_threads_and_handles_share_a_file(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / "l.sqlite") for _ in range(3)]

    def write(who: int) -> None:
        for i in range(40):
            ledgers[who % 3].record(f"{who} {i}", "u", "{}", reply(f"{who} {i}"), 0.1)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ledger in ledgers:
        assert all(ledger.find(f"{who} {i}") == reply(f"{who} {i}") for who in range(6) for i in range(40))
        ledger.close()
    assert [p.name for p in tmp_path.iterdir()] == ["l.sqlite"]


def sql(*statements: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        plain = sqlite3.connect(path)
        for statement in statements:
            plain.execute(statement)
        plain.commit()
        plain.close()

    return damage


def other(path: Path) -> None:
    path.unlink()
    sql("CREATE TABLE songs (title TEXT)", "PRAGMA user_version = 1")(path)


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a database": (lambda p: p.write_text("replies: none\n" * 100), "not a database"),
    "a text of one line": (lambda p: p.write_text("{}"), "can't be read"),
    "random bytes": (lambda p: p.write_bytes(random.Random(0).randbytes(9000)), "not a database"),
    "somebody else's database": (other, "a database of something else"),
    "another schema": (sql(f"PRAGMA user_version = {SCHEMA + 1}"), f"schema {SCHEMA + 1} and this saekit reads {SCHEMA}"),
    "another column": (sql("ALTER TABLE replies ADD COLUMN more TEXT"), "with its own tables"),
    "a table more": (sql("CREATE TABLE songs (title TEXT)"), "with its own tables"),
    "no triggers": (sql("DROP TRIGGER replies_DELETE"), "with its own tables"),
    "cut to a half": (cut(0.5), "can't be read"),
    "cut by one byte": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "can't be read"),
    "cut to a page": (lambda p: p.write_bytes(p.read_bytes()[:4096]), "can't be read"),
    "cut to a header": (lambda p: p.write_bytes(p.read_bytes()[:100]), "can't be read"),
    "zeros inside": (lambda p: p.write_bytes(p.read_bytes()[:8192] + bytes(8192) + p.read_bytes()[16384:]), "can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cache", "live", "replay"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_ledger_is_refused_in_one_sentence_and_left_alone(
    case: str, mode: str, tmp_path: Path
) -> None:
    damage, words = DAMAGE[case]
    path = filled(tmp_path / "l.sqlite")
    damage(path)
    before = path.read_bytes()
    with pytest.raises(SaekitError) as caught:
        Ledger(path, mode)
    said = str(caught.value)
    assert words in said and "l.sqlite" in said and "\n" not in said
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["l.sqlite"]


@pytest.mark.parametrize(
    ("path", "mode", "words"),
    [(".", "cache", "is a folder"), ("none.sqlite", "replay", "isn't there to replay"), ("l.sqlite", "record", "mode 'record' is not one of live, cache, replay")],
)  # fmt: skip
def test_bad_arguments_are_told_and_make_no_file(path: str, mode: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=words):
        Ledger(tmp_path / path, mode)
    assert list(tmp_path.iterdir()) == []
