"""Rules of what is opened and what is refused, with the file as it was, and of how the driver's errors are named."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lash_store import database, guards, migrate, transaction, translation
from lash_store.database import open_sqlite, probe
from lash_store.errors import (
    NotAStore,
    SchemaTooNew,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageMoved,
    StoreClosed,
    StoreError,
    TaskNotFound,
)
from lash_store.reader import Reader
from lash_store.schema import APPLICATION_ID, HEAD, VERSION_TABLE
from lash_store.translation import translate

Spawn = Callable[..., "subprocess.Popen[str]"]

# --- files that are refused -----------------------------------------------------------------------------------------


def print_of(path: Path) -> dict[str, str]:
    """Return a hash of the file and of its ``-wal``, as far as they are there and not empty."""
    found = {}
    for name in ("", "-wal"):
        side = Path(f"{path}{name}")
        if side.is_file() and side.stat().st_size:
            found[name] = hashlib.sha256(side.read_bytes()).hexdigest()
    return found


def random_bytes(path: Path) -> None:
    path.write_bytes(random.Random(7).randbytes(64 * 1024))


def text(path: Path) -> None:
    path.write_text("these are my notes\n" * 200)


def truncated(path: Path) -> None:
    migrate.prepare(path)
    os.truncate(path, path.stat().st_size // 2)


def cut_within_a_page(path: Path) -> None:
    migrate.prepare(path)
    os.truncate(path, 1000)


def zeroed_first_page(path: Path) -> None:
    migrate.prepare(path)
    content = path.read_bytes()
    path.write_bytes(bytes(4096) + content[4096:])


def scribbled_schema(path: Path) -> None:
    migrate.prepare(path)
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * 3996 + content[4096:])


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA application_id=0x0f055112; CREATE TABLE blob (x);")


def foreign_without_an_id(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE tasks (x)")


def foreign_in_wal_mode(path: Path) -> None:
    # a crash left its -wal: the last one to close is still open while the files are copied
    made = path.with_name("made.db")
    with closing(sqlite3.connect(made)) as connection:
        connection.executescript("PRAGMA journal_mode=WAL; CREATE TABLE notes (x); INSERT INTO notes VALUES (1);")
        for name in ("", "-wal"):
            Path(f"{path}{name}").write_bytes(Path(f"{made}{name}").read_bytes())


def from_the_future(path: Path) -> None:
    migrate.prepare(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def of_a_revision_nobody_knows(path: Path) -> None:
    migrate.prepare(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '0000'")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def empty_beside_a_wal(path: Path) -> None:
    path.touch(0o600)
    Path(f"{path}-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(5000))


def a_view_without_an_end(path: Path) -> None:
    migrate.prepare(path)
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) AS version_num FROM n"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"DROP TABLE {VERSION_TABLE}")
        connection.execute(f"CREATE VIEW {VERSION_TABLE} AS {endless}")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def a_virtual_table(path: Path) -> None:
    migrate.prepare(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE steps")
        connection.execute("CREATE VIRTUAL TABLE steps USING rtree (a, b, c)")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


Maker = Callable[[Path], None]

REFUSED: list[tuple[Maker, type[StoreError]]] = [
    (random_bytes, NotAStore),
    (text, NotAStore),
    (truncated, StorageCorrupt),
    (zeroed_first_page, NotAStore),
    (scribbled_schema, StorageCorrupt),
    (foreign, NotAStore),
    (foreign_without_an_id, NotAStore),
    (foreign_in_wal_mode, NotAStore),
    (from_the_future, SchemaTooNew),
    (empty_beside_a_wal, StorageCorrupt),
    (a_view_without_an_end, StorageCorrupt),
    (a_virtual_table, StorageCorrupt),
]


@pytest.mark.parametrize(("make", "error"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
@pytest.mark.parametrize("ask", [probe, migrate.prepare, migrate.current])
def test_a_file_that_is_no_store_of_ours_is_refused_and_stays_as_it_was(
    tmp_path: Path, make: Maker, error: type[StoreError], ask: Callable[[Path], object]
) -> None:
    path = tmp_path / "agent.db"
    make(path)
    before = print_of(path)

    with pytest.raises(error, match=r"agent\.db"):
        ask(path)

    assert print_of(path) == before


@pytest.mark.parametrize("make", [cut_within_a_page, of_a_revision_nobody_knows])
def test_other_damage_is_refused_in_our_words_and_the_file_stays_as_it_was(tmp_path: Path, make: Maker) -> None:
    path = tmp_path / "agent.db"
    make(path)
    before = print_of(path)

    with pytest.raises(StoreError):
        migrate.prepare(path)

    assert print_of(path) == before


def test_a_refused_file_gets_no_side_files(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    foreign(path)

    with pytest.raises(NotAStore):
        migrate.prepare(path)

    assert [found.name for found in tmp_path.iterdir()] == ["agent.db"]


def test_the_permissions_of_a_foreign_file_are_its_owners_business(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    foreign(path)
    path.chmod(0o644)

    with pytest.raises(NotAStore):
        migrate.prepare(path)

    assert path.stat().st_mode & 0o777 == 0o644


def test_a_newer_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    from_the_future(path)

    with pytest.raises(SchemaTooNew, match=f"9999.*{HEAD}.*upgrade the package"):
        probe(path)


def test_a_revision_that_none_can_be_is_damage_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    from_the_future(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE lash_store_version SET version_num = ?", ("[" * 200_000,))

    with pytest.raises(StorageCorrupt, match=r"names a revision of 200000 characters") as caught:
        probe(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_store_a_crash_left_is_read_without_a_change(tmp_path: Path) -> None:
    path, made = tmp_path / "agent.db", tmp_path / "made.db"
    migrate.prepare(made)
    with closing(sqlite3.connect(made, isolation_level=None)) as connection:
        connection.execute("INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES ('a:b','a','b','')")
        for name in ("", "-wal"):
            Path(f"{path}{name}").write_bytes(Path(f"{made}{name}").read_bytes())
    before = print_of(path)
    assert set(before) == {"", "-wal"}

    assert probe(path) == HEAD

    assert print_of(path) == before


# --- paths that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", ":memory:", "file:x?mode=rw", "file:/tmp/agent.db", "a\0b", b"agent.db"])
def test_what_is_not_the_path_of_a_file_is_refused(path: str) -> None:
    with pytest.raises(StorageError):
        guards.resolve(path)


def test_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert guards.resolve("agent.db") == tmp_path / "agent.db"


@pytest.mark.parametrize("name", ["a b%20?#&é.db", "100%.db", "mode=ro.db", "'quoted'.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    migrate.prepare(path)

    assert migrate.current(path) == HEAD
    assert all(found.name.startswith(name) for found in tmp_path.iterdir())


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="regular file"):
        migrate.prepare(tmp_path)


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "agent.db")

    with pytest.raises(NotAStore, match="regular file"):
        migrate.prepare(tmp_path / "agent.db")


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nonesuch does not exist"):
        migrate.prepare(tmp_path / "nonesuch" / "agent.db")

    assert not (tmp_path / "nonesuch").exists()


def test_a_path_through_a_file_is_refused(path: Path) -> None:
    with pytest.raises(StorageError):
        migrate.prepare(path / "agent.db")


def test_a_file_name_that_is_too_long_is_refused_in_our_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        migrate.prepare(tmp_path / ("x" * 300))


def test_a_symbolic_link_is_refused_for_writing_by_the_file_it_names(tmp_path: Path, path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    before = print_of(path)

    with pytest.raises(StorageError, match=r"agent\.db"):
        migrate.prepare(link)

    assert print_of(path) == before
    assert guards.check_target(link, writing=False)


def test_a_dangling_symbolic_link_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere.db")

    with pytest.raises(StorageError, match="symbolic link"):
        migrate.prepare(tmp_path / "link.db")

    assert not (tmp_path / "elsewhere.db").exists()


def test_a_file_with_a_second_hard_link_is_refused_for_writing(tmp_path: Path, path: Path) -> None:
    os.link(path, tmp_path / "other.db")
    before = print_of(path)

    with pytest.raises(StorageError, match="2 hard links"):
        migrate.prepare(path)

    assert print_of(path) == before
    assert guards.check_target(path, writing=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    try:
        with pytest.raises(StorageError, match="cannot be created"):
            migrate.prepare(tmp_path / "agent.db")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any file")
def test_a_file_that_may_not_be_written_is_refused(path: Path) -> None:
    path.chmod(0o400)

    with pytest.raises(StorageError, match="may not be written"):
        migrate.prepare(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_another_users_file_is_refused_for_writing(path: Path) -> None:
    os.chown(path, 12345, -1)

    with pytest.raises(StorageError, match="another user"):
        migrate.prepare(path)


# --- connections ----------------------------------------------------------------------------------------------------


CLOSES = """
    import fcntl, os, sys, time

    descriptor = os.open(sys.argv[1], os.O_RDWR)
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0x40000000)  # SQLite's PENDING byte, which every close asks for
    print("held", flush=True)
    time.sleep(0.3)
"""


@pytest.mark.parametrize("mode", ["write", "read"])
def test_who_opens_waits_for_a_sibling_that_is_just_closing(path: Path, spawn: Spawn, mode: database.Mode) -> None:
    sibling = spawn(CLOSES, path)
    assert sibling.stdout is not None
    assert sibling.stdout.readline() == "held\n"

    with closing(open_sqlite(path, mode)) as connection:
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


def test_a_writer_waits_for_no_lock_by_itself(path: Path) -> None:
    with closing(open_sqlite(path, "write")) as connection:
        assert setting(connection, "busy_timeout") == 0


def setting(connection: sqlite3.Connection, name: str) -> object:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1)])
def test_a_writing_connection_is_durable_checks_parents_and_never_checkpoints_by_itself(
    path: Path, durability: database.Durability, synchronous: int
) -> None:
    with closing(open_sqlite(path, "write", durability)) as connection:
        found = {name: setting(connection, name) for name in ("synchronous", "foreign_keys", "wal_autocheckpoint")}

    assert found == {"synchronous": synchronous, "foreign_keys": 1, "wal_autocheckpoint": 0}


def test_a_reading_connection_cannot_write_and_does_not_trust_the_schema(path: Path) -> None:
    with closing(open_sqlite(path, "read")) as connection:
        assert (setting(connection, "query_only"), setting(connection, "trusted_schema")) == (1, 0)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM events")


@pytest.mark.parametrize("mode", ["read", "write"])
def test_opening_makes_no_file(tmp_path: Path, mode: database.Mode) -> None:
    with pytest.raises(sqlite3.OperationalError):
        open_sqlite(tmp_path / "agent.db", mode)

    assert not list(tmp_path.iterdir())


def test_a_file_made_twice_is_as_it_was(path: Path) -> None:
    before = path.read_bytes()

    migrate.make(path, lambda made: None)

    assert path.read_bytes() == before
    assert migrate.current(path) == HEAD


def test_a_file_is_ours_from_its_birth_on(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"

    database.bear(path)

    assert probe(path) is None
    with closing(sqlite3.connect(path)) as connection:
        assert setting(connection, "application_id") == APPLICATION_ID


async def test_a_reader_that_is_not_open_says_so(path: Path) -> None:
    with pytest.raises(StoreClosed):
        await Reader(path).rows("SELECT 1", {})


async def test_a_reader_notices_what_another_connection_commits(path: Path, raw: sqlite3.Connection) -> None:
    reader = Reader(path)
    await reader.open()
    try:
        await reader.has_changed()
        assert not await reader.has_changed()

        raw.execute("INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES ('a:b', 'a', 'b', '')")

        assert await reader.has_changed()
        assert not await reader.has_changed()
    finally:
        await reader.close()


async def test_a_passing_read_error_is_met_by_opening_again(path: Path) -> None:
    reader = Reader(path)
    await reader.open()
    asked: list[sqlite3.Connection] = []

    def fails_once(raw: sqlite3.Connection) -> str:
        asked.append(raw)
        if len(asked) == 1:
            raise driver_error(sqlite3.SQLITE_CORRUPT)
        return str(raw.execute("SELECT 'read'").fetchone()[0])

    try:
        assert await reader.run(fails_once) == "read"
        assert asked[0] is not asked[1]
    finally:
        await reader.close()


class Forgetful(sqlite3.Connection):
    """A connection that loses the reply to, or the whole of, one statement."""

    loses: str | None = None
    took = True

    def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:  # type: ignore[override]
        if sql == Forgetful.loses:
            Forgetful.loses = None
            if Forgetful.took:
                super().execute(sql, *parameters).fetchall()
            raise driver_error(sqlite3.SQLITE_FULL)
        return super().execute(sql, *parameters)


@pytest.mark.parametrize(("lost", "took"), [("BEGIN", True), ("ROLLBACK", False)])
async def test_a_read_that_could_not_end_does_not_have_later_ones_see_what_was_true_then(
    path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, took: bool
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **named: connect(*given, **{"factory": Forgetful, **named}))
    count = "SELECT count(*) FROM sqlite_schema WHERE name = 'added'"
    reader = Reader(path)
    await reader.open()
    try:
        monkeypatch.setattr(Forgetful, "took", took)
        monkeypatch.setattr(Forgetful, "loses", lost)
        with pytest.raises(StorageFull):
            await reader.look(lambda tx: tx.one(count, {}))
        with closing(connect(path)) as other:
            other.execute("CREATE TABLE added (x)")

        assert await reader.rows(count, {}) == [(1,)]
        assert await reader.look(lambda tx: tx.one(count, {})) == (1,)
    finally:
        await reader.close()


async def test_want_of_memory_in_a_read_is_an_error_of_the_storage(path: Path) -> None:
    reader = Reader(path)
    await reader.open()

    def fails(raw: sqlite3.Connection) -> None:
        raise MemoryError

    try:
        with pytest.raises(StorageError, match="memory"):
            await reader.run(fails)
    finally:
        await reader.close()


async def test_a_lasting_read_error_is_believed(path: Path) -> None:
    reader = Reader(path)
    await reader.open()

    def fails(raw: sqlite3.Connection) -> None:
        raise driver_error(sqlite3.SQLITE_CORRUPT)

    try:
        with pytest.raises(StorageCorrupt):
            await reader.run(fails)
        assert await reader.rows("SELECT 1", {}) == [(1,)]
    finally:
        await reader.close()


async def test_text_that_is_not_unicode_does_not_take_a_list_of_rows_down(path: Path, raw: sqlite3.Connection) -> None:
    raw.execute(
        "INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES ('a:b', 'a', 'b', CAST(x'ff' AS TEXT))"
    )
    reader = Reader(path)
    await reader.open()
    try:
        rows = await reader.rows("SELECT scope, opened_at FROM sessions", {})
    finally:
        await reader.close()

    assert rows[0][0] == "a:b"


# --- errors ---------------------------------------------------------------------------------------------------------


def driver_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("what SQLite said")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (sqlite3.SQLITE_BUSY, StorageBusy),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, StorageBusy),
        (sqlite3.SQLITE_LOCKED, StorageBusy),
        (sqlite3.SQLITE_FULL, StorageFull),
        (sqlite3.SQLITE_CORRUPT, StorageCorrupt),
        (sqlite3.SQLITE_CORRUPT_INDEX, StorageCorrupt),
        (sqlite3.SQLITE_NOTADB, NotAStore),
        (sqlite3.SQLITE_IOERR_WRITE, StorageError),
        (sqlite3.SQLITE_CANTOPEN, StorageError),
        (sqlite3.SQLITE_READONLY, StorageError),
        (sqlite3.SQLITE_CONSTRAINT_CHECK, StorageError),
    ],
)
def test_a_drivers_error_is_named_with_the_file_and_what_sqlite_said(code: int, named: type[StorageError]) -> None:
    error = translate(driver_error(code), Path("/data/agent.db"))

    assert type(error) is named
    assert "/data/agent.db" in str(error)
    assert "what SQLite said" in str(error)


def test_sqlites_own_word_for_a_moved_file_is_taken() -> None:
    assert type(translate(driver_error(sqlite3.SQLITE_READONLY_DBMOVED), Path("agent.db"))) is StorageMoved


def test_an_error_without_a_code_is_a_storage_error() -> None:
    assert type(translate(sqlite3.ProgrammingError("closed"), Path("agent.db"))) is StorageError


def test_an_error_of_ours_is_not_renamed() -> None:
    error = TaskNotFound("gone", task_id="index")

    assert translate(error, Path("agent.db")) is error


def test_a_translated_error_keeps_its_cause() -> None:
    cause = driver_error(sqlite3.SQLITE_FULL)

    with pytest.raises(StorageFull) as caught, contextlib.nullcontext():
        translation.raise_translated(cause, Path("agent.db"))

    assert caught.value.__cause__ is cause


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1714557600.0004, "2024-05-01T10:00:00.000Z"),
        (1714557600.9996, "2024-05-01T10:00:01.000Z"),
        (1714557600.25, "2024-05-01T10:00:00.250Z"),
    ],
)
def test_a_time_is_utc_text_of_one_width(seconds: float, text: str) -> None:
    assert transaction.utc_text(seconds) == text


def test_a_stopped_file_in_a_folder_that_may_not_be_written_is_read_without_making_anything(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _folder, mode: mode != os.W_OK)

    with contextlib.closing(database.open_sqlite(path, "read")) as connection:
        assert connection.execute("SELECT count(*) FROM tasks").fetchall() == [(0,)]
        assert [*path.parent.iterdir()] == [path]
