"""Rules of what a program's own function may do in one of our transactions, and of what it may not, however it tries."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import guest as guest_module
from lash_store import migrate, step_queries
from lash_store.database import open_sqlite
from lash_store.errors import InvalidArguments, StorageError, StorageFull, StoreError
from lash_store.guest import GuestError, Rows, TransactConnection, guests_error, run_guest
from lash_store.schema import TRIGGERS, VIEWS, metadata
from lash_store.transaction import Transaction
from tests.storage.test_writer import Harness, note, notes, opened, outcomes

Guest = Callable[[TransactConnection], Any]
Insert = Callable[..., int]

AT = "2024-05-01T10:00:00.000Z"
OURS = sorted(metadata.tables)


# --- a harness ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(path: Path, filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]) -> Path:
    """A file with a live task, a row in every other table of ours, and one table of the program's own."""
    filled.execute("BEGIN")
    task_seq = insert(filled, "tasks", task_row)
    event = {"task_seq": task_seq, "task_id": "index", "scope": "desktop:s1", "attempt": 1, "type": "noted", "at": AT}
    insert(filled, "events", {**event, "data": "{}"})
    handle = {"handle_id": "h-1", "scope": "desktop:s1", "task_seq": task_seq, "role": "owner", "created_at": AT}
    insert(filled, "handles", handle)
    step = {"task_seq": task_seq, "kind": "step", "name": "fetch", "attempt": 1, "value": "1", "saved_at": AT}
    insert(filled, "steps", {**step, "state": "failed"})
    insert(filled, "signals", {"task_seq": task_seq, "name": "go", "payload": "1", "sent_at": AT, "sent_by": "me"})
    said = {"scope": "desktop:s1", "key": "k", "task_seq": task_seq, "text": "", "data": "{}", "posted_at": AT}
    insert(filled, "inbox", said)
    kept = {"kept": "[]", "moved": "[]", "cancelled": "[]", "at": AT}
    given = {"handoff_id": "ho-1", "is_named": 1, "source": "desktop:s1", "destination": "desktop:s1"}
    insert(filled, "handoffs", {**given, **kept})
    filled.execute("CREATE TABLE own (id INTEGER PRIMARY KEY, v TEXT UNIQUE)")
    filled.execute("INSERT INTO own (v) VALUES ('kept')")
    filled.execute("COMMIT")
    return path


def running(*statements: str) -> Guest:
    """A function that runs statements and returns the rows of the last."""

    def guest(connection: TransactConnection) -> Any:
        rows = [connection.execute(sql).fetchall() for sql in statements]
        return rows[-1]

    return guest


def unit(fn: Guest) -> Callable[[Transaction], Any]:
    return lambda tx: run_guest(tx, fn)


def contents(path: Path) -> dict[str, Any]:
    """Return what stands in the file but for the events: every object, every row of ours and of the table `own`."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        found: dict[str, Any] = {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY rowid").fetchall()
            for name in [*OURS, "own"]
            if name != "events"
        }
        found["objects"] = connection.execute(
            "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
        ).fetchall()
        names = ("user_version", "application_id", "journal_mode")
        found["pragmas"] = [connection.execute(f"PRAGMA {name}").fetchall() for name in names]
        found["whole"] = connection.execute("PRAGMA integrity_check").fetchall()
        return found


async def beside_others(path: Path, fn: Guest) -> Any:
    """
    Run a function between two others' units in one batch; return its result, or the error it is to blame for.

    Whatever it did, the others land once, the store works on, and nobody else is asked for permission.
    """
    async with opened(path) as harness:
        units = [note("a"), unit(fn), note("b")]
        futures = [harness.writer.submit(one) for one in units]
        first, result, last = await asyncio.gather(*futures, return_exceptions=True)

        assert (first, last) == ("a", "b")
        assert await harness.writer.run(note("after")) == "after"
        # no guest may do this
        await harness.on_connection("PRAGMA page_count")
        assert harness.told == ["a", "b", "after"]
        assert not harness.fatal
    assert [name for name in notes(path) if name != "desktop:s1"] == ["a", "b", "after"]
    if isinstance(result, BaseException):
        blamed = guests_error(result)
        assert blamed is not None, f"{result!r} is not taken for the function's"
        return blamed
    return result


# --- what it may do -------------------------------------------------------------------------------------------------

ALLOWED: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "a table of its own": (
        ("CREATE TABLE t (a)", "INSERT INTO t VALUES (1), (2)", "SELECT a FROM t"),
        [(1,), (2,)],
    ),
    "a strict one": (("CREATE TABLE t (a TEXT PRIMARY KEY) STRICT, WITHOUT ROWID", "SELECT * FROM t"), []),
    "one with numbers never used again": (
        ("CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT, b)", "INSERT INTO t (b) VALUES (7)", "SELECT * FROM t"),
        [(1, 7)],
    ),
    "one with checks, uniques and generated columns": (
        (
            "CREATE TABLE t (a INT CHECK (a > 0) UNIQUE, b INT AS (a + 1), UNIQUE (a, b))",
            "INSERT INTO t (a) VALUES (1)",
            "SELECT * FROM t",
        ),
        [(1, 2)],
    ),
    "one made of ours": (("CREATE TABLE t AS SELECT id FROM tasks", "SELECT * FROM t"), [("index",)]),
    "one that goes again": (("CREATE TABLE t (a)", "DROP TABLE t", "DROP TABLE own", "SELECT 1"), [(1,)]),
    "one that grows a column": (
        ("ALTER TABLE own ADD COLUMN w INT NOT NULL DEFAULT 5", "SELECT * FROM own"),
        [(1, "kept", 5)],
    ),
    "rows": (
        (
            "INSERT INTO own (v) VALUES ('b')",
            "UPDATE own SET v = v || '!'",
            "REPLACE INTO own VALUES (2, 'c')",
            "INSERT INTO own (v) VALUES ('c') ON CONFLICT (v) DO UPDATE SET v = 'd'",
            "DELETE FROM own WHERE id = 1",
            "SELECT * FROM own",
        ),
        [(2, "d")],
    ),
    "rows that are told": (("INSERT INTO own (v) VALUES ('b') RETURNING id, v",), [(2, "b")]),
    "an index": (("CREATE UNIQUE INDEX i ON own (v DESC)", "REINDEX i", "DROP INDEX i", "SELECT 1"), [(1,)]),
    "a trigger": (
        (
            "CREATE TRIGGER g AFTER INSERT ON own BEGIN UPDATE own SET v = v || '!' WHERE id = NEW.id; END",
            "INSERT INTO own (v) VALUES ('b')",
            "DROP TRIGGER g",
            "SELECT v FROM own",
        ),
        [("kept",), ("b!",)],
    ),
    "a view, and one that can be written": (
        (
            "CREATE VIEW w AS SELECT v FROM own",
            "CREATE TRIGGER g INSTEAD OF INSERT ON w BEGIN INSERT INTO own (v) VALUES (NEW.v); END",
            "INSERT INTO w VALUES ('b')",
            "SELECT v FROM w ORDER BY v",
        ),
        [("b",), ("kept",)],
    ),
    "a view of ours": (
        ("CREATE VIEW w AS SELECT label, v FROM tasks JOIN own", "SELECT * FROM w", "DROP VIEW w", "SELECT 1"),
        [(1,)],
    ),
    "foreign keys between its own": (
        (
            "CREATE TABLE c (o INTEGER REFERENCES own (id) ON DELETE CASCADE)",
            "INSERT INTO c VALUES (1)",
            "DELETE FROM own",
            "SELECT * FROM c",
        ),
        [],
    ),
    "a full text of the old kind": (
        (
            "CREATE VIRTUAL TABLE f USING fts4 (a)",
            "INSERT INTO f VALUES ('x y')",
            "SELECT * FROM f WHERE f MATCH 'y'",
        ),
        [("x y",)],
    ),
    "reading every table of ours": (
        (*(f"SELECT * FROM {name}" for name in [*OURS, *VIEWS]), "SELECT name FROM signals"),
        [("go",)],
    ),
    "reading what there is": (
        ("SELECT count(*) FROM sqlite_schema WHERE name = 'own'", "SELECT count(*) FROM sqlite_sequence"),
        [(8,)],
    ),
    "asking for its columns": (("SELECT name FROM pragma_table_info('own')",), [("id",), ("v",)]),
    "recursion, JSON and numbers": (
        (
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT sum(i) FROM n",
            "SELECT value FROM json_each('[1, 2]')",
        ),
        [(1,), (2,)],
    ),
    "nothing": (("", "  -- only words", "SELECT 1"), [(1,)]),
}


@pytest.mark.parametrize(("statements", "expected"), ALLOWED.values(), ids=ALLOWED.keys())
async def test_a_function_works_on_tables_of_its_own_and_reads_everything(
    file: Path, statements: tuple[str, ...], expected: list[Any]
) -> None:
    ours = {name: rows for name, rows in contents(file).items() if name in OURS}

    assert await beside_others(file, running(*statements)) == expected

    with closing(open_sqlite(file, "read")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = {name: connection.execute(f"SELECT * FROM {name} ORDER BY rowid").fetchall() for name in ours}
    assert found == ours


@pytest.mark.parametrize(
    "statements",
    [
        ("CREATE VIRTUAL TABLE f USING fts5 (a)", "INSERT INTO f VALUES ('x y')", "SELECT * FROM f WHERE f MATCH 'y'"),
        ("CREATE VIRTUAL TABLE f USING rtree (a, b, c)", "INSERT INTO f VALUES (1, 2, 3)", "SELECT * FROM f"),
    ],
    ids=["fts5", "rtree"],
)
async def test_a_function_may_have_virtual_tables_of_the_modules_that_keep_their_rows_in_the_file(
    file: Path, statements: tuple[str, ...]
) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            expected = [connection.execute(sql).fetchall() for sql in statements][-1]
        except sqlite3.OperationalError as error:
            pytest.skip(f"not in this SQLite: {error}")

    assert await beside_others(file, running(*statements)) == expected


@pytest.mark.parametrize(
    "statements",
    [
        ("CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT)", "DROP TABLE t"),
        ("ALTER TABLE own RENAME TO mine",),
        ("ALTER TABLE own RENAME COLUMN v TO w",),
        ("CREATE TABLE t (a, b)", "ALTER TABLE t DROP COLUMN b"),
        ("ALTER TABLE own ADD COLUMN w INT CHECK (w > 0)",),
    ],
    ids=lambda statements: statements[-1],
)
async def test_a_function_may_change_the_shape_of_its_own_tables(file: Path, statements: tuple[str, ...]) -> None:
    assert await beside_others(file, running(*statements)) == []


async def test_what_a_function_returns_comes_out_with_its_rows_in_the_file(file: Path) -> None:
    def guest(connection: TransactConnection, word: str, *, count: int) -> dict[str, Any]:
        made = connection.executemany("INSERT INTO own (v) VALUES (?)", ((f"{word} {n}",) for n in range(count)))
        [(total,)] = connection.execute("SELECT count(*) FROM own WHERE v LIKE :like", {"like": f"{word}%"})
        return {"made": made.rowcount, "total": total}

    async with opened(file) as harness:
        assert await harness.writer.run(lambda tx: run_guest(tx, guest, "w", count=3)) == {"made": 3, "total": 3}

    assert [v for _, v in contents(file)["own"]] == ["kept", "w 0", "w 1", "w 2"]


async def test_rows_stay_readable_after_the_transaction(file: Path) -> None:
    rows: list[Rows] = []

    await beside_others(file, lambda connection: rows.append(connection.execute("SELECT id, v FROM own")))

    assert [column[0] for column in rows[0].description] == ["id", "v"]
    assert rows[0].fetchone() == (1, "kept")
    assert (rows[0].fetchone(), rows[0].fetchall(), list(rows[0])) == (None, [], [])


async def test_rows_say_what_was_inserted_and_changed(file: Path) -> None:
    def guest(connection: TransactConnection) -> list[Any]:
        inserted = connection.execute("INSERT INTO own VALUES (9, 'b')")
        changed = connection.execute("UPDATE own SET v = v || '!'")
        return [inserted.lastrowid, changed.rowcount]

    assert await beside_others(file, guest) == [9, 2]


async def test_a_script_is_run_statement_by_statement(file: Path) -> None:
    script = """
        CREATE TABLE t (a, b DEFAULT ';'); -- a; comment
        CREATE TRIGGER g AFTER INSERT ON t BEGIN
          UPDATE t SET b = CASE WHEN a THEN 'x;END;' END; SELECT 1;
        END;
        INSERT INTO t (a) VALUES ('1;2'); /* ; */ ; ;
        INSERT INTO "t" ("a") VALUES (2) -- the end;
    """

    def guest(connection: TransactConnection) -> list[Any]:
        connection.executescript(script)
        return connection.execute("SELECT * FROM t").fetchall()

    assert await beside_others(file, guest) == [("1;2", "x;END;"), (2, "x;END;")]


async def test_a_script_that_breaks_off_is_an_error_and_none_of_it_is_stored(file: Path) -> None:
    before = contents(file)

    error = await beside_others(file, lambda c: c.executescript("CREATE TABLE t (a); INSERT INTO t VALUES ('open"))

    assert isinstance(error, sqlite3.OperationalError)
    assert contents(file) == before


async def test_a_function_that_asks_again_while_its_parameters_are_read_is_run_in_order(file: Path) -> None:
    class Conforms:
        def __init__(self, connection: TransactConnection) -> None:
            self.connection = connection

        def __conform__(self, protocol: object) -> str:
            self.connection.execute("INSERT INTO own (v) VALUES ('first')")
            return "second"

    def guest(connection: TransactConnection) -> list[Any]:
        def rows() -> Iterator[tuple[str]]:
            connection.execute("INSERT INTO own (v) VALUES ('zeroth')")
            yield ("third",)

        connection.execute("INSERT INTO own (v) VALUES (?)", (Conforms(connection),))
        connection.executemany("INSERT INTO own (v) VALUES (?)", rows())
        return [v for (v,) in connection.execute("SELECT v FROM own ORDER BY id")]

    assert await beside_others(file, guest) == ["kept", "first", "second", "zeroth", "third"]


async def test_what_the_storage_says_while_its_tables_are_looked_at_is_no_failure_of_the_function(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tx: Transaction) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
        raise error

    monkeypatch.setattr(guest_module, "_check_shape", fails)
    async with opened(file) as harness:
        unit = harness.writer.submit(lambda tx: run_guest(tx, running("CREATE TABLE t (a)")))

        assert await outcomes(unit) == [StorageError]


async def test_what_a_function_writes_counts_towards_the_next_checkpoint(file: Path) -> None:
    seen: list[int] = []

    def counted(tx: Transaction) -> None:
        run_guest(tx, running("UPDATE own SET v = 'b'", "INSERT INTO own (v) VALUES ('c')", "SELECT 1"))
        seen.append(tx.bytes)

    async with opened(file) as harness:
        await harness.writer.run(counted)

    assert seen == [400]


# --- what it may not do ---------------------------------------------------------------------------------------------

SESSION = "INTO sessions (scope, runtime, session_id, opened_at) VALUES ('x:y', 'x', 'y', '')"

REFUSED: dict[str, tuple[str, ...]] = {
    # rows of ours
    **{f"delete from {name}": (f"DELETE FROM {name}",) for name in OURS},
    **{f"update {name}": (f"UPDATE {name} SET rowid = rowid",) for name in OURS},
    "insert": (f"INSERT {SESSION}",),
    "insert, and tell": (f"INSERT {SESSION} RETURNING *",),
    "insert nothing": ("INSERT INTO sessions SELECT * FROM sessions WHERE 0",),
    "replace": (f"REPLACE {SESSION}",),
    "insert or replace": (f"INSERT OR REPLACE {SESSION}",),
    "insert or ignore": (f"INSERT OR IGNORE {SESSION}",),
    "upsert": (f"INSERT {SESSION} ON CONFLICT DO UPDATE SET closed_at = ''",),
    "update from its own": ("UPDATE tasks SET label = own.v FROM own WHERE own.id = tasks.task_seq",),
    "update or rollback": ("UPDATE OR ROLLBACK tasks SET id = 'x'",),
    "after a common table": ("WITH x AS (SELECT 1) DELETE FROM events",),
    "by its schema": ("DELETE FROM main.events",),
    "in quotes": ('DELETE FROM "EvEnTs"',),
    "in brackets": ("DELETE FROM [events]",),
    "in back quotes": ("DELETE FROM main.`EVENTS`",),
    "behind a comment": ("/* x */ DELETE -- y\n FROM/**/events",),
    "explained": ("EXPLAIN DELETE FROM events",),
    "a condition that is never true": ("DELETE FROM events WHERE 0",),
    # through objects of its own
    "a trigger of its own that writes ours": (
        "CREATE TRIGGER g AFTER INSERT ON own BEGIN UPDATE tasks SET label = 'x'; END",
        "INSERT INTO own (v) VALUES ('b')",
    ),
    "a trigger of a trigger": (
        "CREATE TABLE t (a)",
        "CREATE TRIGGER h AFTER DELETE ON t BEGIN DELETE FROM events; END",
        "CREATE TRIGGER g AFTER INSERT ON own BEGIN DELETE FROM t; END",
        "INSERT INTO own (v) VALUES ('b')",
    ),
    "a trigger behind a cascade": (
        "CREATE TABLE t (a REFERENCES own (id) ON DELETE CASCADE)",
        "CREATE TRIGGER g AFTER DELETE ON t BEGIN DELETE FROM events; END",
        "DELETE FROM own",
    ),
    "a view of ours that is written": (
        "CREATE VIEW w AS SELECT * FROM sessions",
        "CREATE TRIGGER g INSTEAD OF DELETE ON w BEGIN DELETE FROM events; END",
        "DELETE FROM w",
    ),
    # objects of ours
    **{f"drop table {name}": (f"DROP TABLE {name}",) for name in OURS},
    **{f"drop view {name}": (f"DROP VIEW IF EXISTS {name}",) for name in VIEWS},
    **{f"drop trigger {name}": (f"DROP TRIGGER main.{name}",) for name in TRIGGERS},
    "drop an index": ("DROP INDEX events_one_end",),
    "drop the revision": ("DROP TABLE lash_store_version",),
    "another revision": ("UPDATE lash_store_version SET version_num = '0001'",),
    "a trigger on ours": ("CREATE TRIGGER g AFTER INSERT ON events BEGIN SELECT 1; END",),
    "a trigger before ours": ("CREATE TRIGGER g BEFORE UPDATE ON tasks BEGIN SELECT RAISE(IGNORE); END",),
    "a trigger on a view of ours": ("CREATE TRIGGER g INSTEAD OF INSERT ON live_tasks BEGIN SELECT 1; END",),
    "an index on ours": ("CREATE INDEX i ON tasks (label)",),
    "a unique index on ours": ("CREATE UNIQUE INDEX IF NOT EXISTS i ON tasks (kind)",),
    "alter: rename": ("ALTER TABLE tasks RENAME TO t",),
    "alter: rename a column": ("ALTER TABLE tasks RENAME COLUMN label TO l",),
    "alter: add": ("ALTER TABLE tasks ADD COLUMN x",),
    "alter: drop": ("ALTER TABLE tasks DROP COLUMN waiting_for",),
    # names of ours
    "a table of a name of ours": ("CREATE TABLE tombstones (a)",),
    "a table of a name that begins like ours": ('CREATE TABLE "Lash_own" (a)',),
    "a view of a name of ours": ("CREATE VIEW tombstones AS SELECT 1",),
    "a trigger of a name of ours": ("CREATE TRIGGER tombstones AFTER INSERT ON own BEGIN SELECT 1; END",),
    "rename to a name that begins like ours": ("ALTER TABLE own RENAME TO lash_own",),
    "hide ours behind a temporary table": ("CREATE TEMP TABLE tasks (a)",),
    "hide ours behind a temporary view": ("CREATE TEMPORARY VIEW tasks AS SELECT 1",),
    "a temporary table by its schema": ("CREATE TABLE temp.t (a)",),
    "a temporary trigger on ours": ("CREATE TEMP TRIGGER g AFTER INSERT ON events BEGIN SELECT 1; END",),
    "a temporary trigger on its own": ("CREATE TEMP TRIGGER g AFTER INSERT ON own BEGIN SELECT 1; END",),
    "a temporary virtual table": ("CREATE VIRTUAL TABLE temp.t USING fts4 (a)",),
    # SQLite's own
    "numbers used again": ("UPDATE sqlite_sequence SET seq = 0",),
    "numbers used again, another way": ("DELETE FROM sqlite_sequence",),
    "the schema, writable": ("PRAGMA writable_schema = ON",),
    "statistics": ("ANALYZE",),
    "statistics of its own": ("ANALYZE own",),
    "another file": ("ATTACH ':memory:' AS other",),
    "another file, by a value": ("ATTACH DATABASE (SELECT v FROM own) AS other",),
    "this file away": ("DETACH main",),
    "a module that is none of ours": ("CREATE VIRTUAL TABLE t USING dbstat",),
    "code": ("SELECT load_extension('x')",),
    "code, never called": ("SELECT load_extension('x') WHERE 0",),
    "code of a tokenizer": ("SELECT fts3_tokenizer('simple')",),
    # what ends or outlives the transaction
    **{f"pragma {name}": (f"PRAGMA {name}",) for name in ("user_version = 7", "main.foreign_keys = 0", "journal_mode")},
    "pragma behind a comment": ("/**/pRaGmA/**/journal_mode/**/=delete",),
    "pragma as a table": ("SELECT * FROM pragma_journal_mode",),
    "pragma as a table with an argument": ("SELECT * FROM pragma_synchronous('main')",),
    "pragma of the deferred": ("PRAGMA defer_foreign_keys = ON",),
    "pragma of a checkpoint": ("PRAGMA wal_checkpoint(TRUNCATE)",),
    "begin": ("BEGIN",),
    "begin immediate": ("BEGIN IMMEDIATE TRANSACTION",),
    "commit": ("COMMIT",),
    "commit in another case": ("cOmMiT tRaNsAcTiOn;",),
    "commit behind a comment": ("/* COMMIT */ -- x\n\t COMMIT",),
    "commit behind an empty statement": (";;COMMIT",),
    "commit explained": ("EXPLAIN COMMIT",),
    "end": ("END",),
    "rollback": ("\n\tROLLBACK ;",),
    "savepoint": ("SAVEPOINT mine",),
    "our savepoint, back": ("ROLLBACK TO unit",),
    "our savepoint, released": ("RELEASE SAVEPOINT unit",),
}


# one table stands for all; and a trigger of its own that writes ours keeps it from its own table, too
GOING_ON = {
    name: statements
    for name, statements in REFUSED.items()
    if "own" not in statements[-1].split()[:3] and name.split()[-1] not in {*OURS, *VIEWS} - {"events"}
}


@pytest.mark.parametrize("statements", REFUSED.values(), ids=REFUSED.keys())
async def test_what_is_not_its_own_is_refused_and_nothing_of_the_function_is_stored(
    file: Path, statements: tuple[str, ...]
) -> None:
    before = contents(file)

    error = await beside_others(file, running("INSERT INTO own (v) VALUES ('undone')", *statements))

    assert isinstance(error, StoreError)
    assert "works on tables of its own" in str(error) or "has a name that the store keeps for itself" in str(error)
    assert contents(file) == before


@pytest.mark.long
@pytest.mark.parametrize("statements", GOING_ON.values(), ids=GOING_ON.keys())
async def test_a_function_that_goes_on_after_a_refusal_has_changed_its_own_alone(
    file: Path, statements: tuple[str, ...]
) -> None:
    def guest(connection: TransactConnection) -> str:
        for sql in statements[:-1]:
            connection.execute(sql)
        for _ in range(2):
            # prepared before, it is refused as well
            with pytest.raises(StoreError):
                connection.execute(statements[-1])
        connection.execute("INSERT INTO own (v) VALUES ('gone on')")
        return "done"

    before = contents(file)
    assert await beside_others(file, guest) == "done"

    after = contents(file)
    assert after["own"] == [*before["own"], (2, "gone on")]
    assert {name: after[name] for name in [*OURS, "pragmas", "whole"] if name != "events"} == {
        name: before[name] for name in [*OURS, "pragmas", "whole"] if name != "events"
    }
    assert set(before["objects"]) <= set(after["objects"])


BY_SQLITE = {
    "alter a view": ("ALTER TABLE live_tasks RENAME TO t",),
    "the schema": ("DELETE FROM sqlite_schema",),
    "the schema by its old name": ("UPDATE main.sqlite_master SET sql = NULL WHERE name = 'own'",),
    "a row of the schema": ("INSERT INTO sqlite_schema VALUES ('table', 'x', 'x', 0, '')",),
    "rename to what we have": ("ALTER TABLE own RENAME TO tasks",),
    "rename to an index we have": ("ALTER TABLE own RENAME TO tasks_id",),
    "a name of SQLite's": ("CREATE TABLE sqlite_own (a)",),
    "vacuum": ("VACUUM",),
    "two statements": ("SELECT 1; COMMIT",),
    "a null": ("SELECT 1\0; COMMIT",),
    "half a statement": ("SELECT",),
}


@pytest.mark.parametrize("statements", BY_SQLITE.values(), ids=BY_SQLITE.keys())
async def test_what_sqlite_itself_refuses_is_sqlites_error(file: Path, statements: tuple[str, ...]) -> None:
    before = contents(file)

    error = await beside_others(file, running("INSERT INTO own (v) VALUES ('undone')", *statements))

    assert isinstance(error, sqlite3.Error)
    assert contents(file) == before


async def test_vacuum_into_another_file_makes_none(file: Path, tmp_path: Path) -> None:
    error = await beside_others(file, running(f"VACUUM INTO '{tmp_path / 'copy.db'}'"))

    assert isinstance(error, sqlite3.OperationalError | StoreError)
    assert not (tmp_path / "copy.db").exists()


async def test_a_statement_of_the_store_is_refused_to_a_function_also_if_it_is_prepared_already(file: Path) -> None:
    text = step_queries._FORGET_FAILED
    before = contents(file)

    def guest(connection: TransactConnection) -> None:
        connection.execute(text, {"task_seq": 99})

    async with opened(file) as harness:
        await harness.writer.run(lambda tx: step_queries.forget_failed_steps(tx, 99))
        assert await outcomes(harness.writer.submit(unit(guest))) == [GuestError]
        # and the store may run it afterwards
        await harness.writer.run(lambda tx: step_queries.forget_failed_steps(tx, 99))

    assert contents(file) == before


async def test_a_statement_refused_to_one_function_is_refused_to_the_next(file: Path) -> None:
    before = contents(file)
    async with opened(file) as harness:
        units = [unit(running("DELETE FROM events")) for _ in range(3)]

        assert await outcomes(*map(harness.writer.submit, units)) == [GuestError] * 3
        assert await outcomes(harness.writer.submit(units[0])) == [GuestError]
    assert contents(file) == before


async def test_a_refusal_names_what_was_refused_and_an_error_after_it_is_not_taken_for_one(file: Path) -> None:
    def guest(connection: TransactConnection) -> None:
        with pytest.raises(StoreError, match=r"may not do this \(events\)"):
            connection.execute("DELETE FROM events")
        connection.execute("INSERT INTO own (v) VALUES ('kept')")

    assert isinstance(await beside_others(file, guest), sqlite3.IntegrityError)


# --- what ends the transaction --------------------------------------------------------------------------------------

ENDING: dict[str, tuple[str, ...]] = {
    "insert or rollback": ("INSERT OR ROLLBACK INTO own (v) VALUES ('kept')",),
    "update or rollback": ("INSERT INTO own (v) VALUES ('b')", "UPDATE OR ROLLBACK own SET v = 'kept'"),
    "a check or rollback": ("CREATE TABLE t (a CHECK (a > 0))", "INSERT OR ROLLBACK INTO t VALUES (0)"),
    "a conflict clause of its own table": (
        "CREATE TABLE t (a UNIQUE ON CONFLICT ROLLBACK)",
        "INSERT INTO t VALUES (1)",
        "INSERT INTO t VALUES (1)",
    ),
    "a column that may not be null": (
        "CREATE TABLE t (a NOT NULL ON CONFLICT ROLLBACK)",
        "INSERT INTO t VALUES (NULL)",
    ),
    "a trigger that raises": (
        "CREATE TRIGGER g BEFORE INSERT ON own BEGIN SELECT RAISE(ROLLBACK, 'away'); END",
        "INSERT INTO own (v) VALUES ('b')",
    ),
    "a statement within a trigger": (
        "CREATE TRIGGER g AFTER INSERT ON own BEGIN INSERT OR ROLLBACK INTO own (v) VALUES ('kept'); END",
        "INSERT INTO own (v) VALUES ('b')",
    ),
}


def ending(*statements: str) -> Guest:
    def guest(connection: TransactConnection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS undone (a)")
        for sql in statements:
            connection.execute(sql)

    return guest


def hidden(*statements: str) -> Guest:
    """The same, by a function that does not care for errors and goes on."""

    def guest(connection: TransactConnection) -> str:
        for sql in (*statements, "CREATE TABLE smuggled (a)", "COMMIT", "CREATE TABLE smuggled_too (a)"):
            with contextlib.suppress(Exception):
                connection.execute(sql)
        return "all went well"

    return guest


@pytest.mark.parametrize("make", [ending, hidden], ids=["told", "hidden"])
@pytest.mark.parametrize("statements", ENDING.values(), ids=ENDING.keys())
async def test_a_function_that_ends_the_transaction_is_refused_alone_whether_it_tells_or_not(
    file: Path, statements: tuple[str, ...], make: Callable[..., Guest]
) -> None:
    before = contents(file)

    error = await beside_others(file, make(*statements))

    assert isinstance(error, StoreError)
    assert "ended the store's transaction" in str(error)
    assert contents(file) == before


async def test_a_script_with_a_commit_in_it_stops_there_and_none_of_it_is_stored(file: Path) -> None:
    before = contents(file)

    error = await beside_others(
        file, lambda c: c.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1); COMMIT; DROP TABLE t")
    )

    assert isinstance(error, StoreError)
    assert contents(file) == before


async def test_many_rows_one_of_which_ends_the_transaction_are_refused_together(file: Path) -> None:
    before = contents(file)

    error = await beside_others(
        file, lambda c: c.executemany("INSERT OR ROLLBACK INTO own (v) VALUES (?)", [("a",), ("kept",), ("b",)])
    )

    assert isinstance(error, StoreError)
    assert contents(file) == before


@pytest.mark.parametrize("raised", ["ABORT", "FAIL"])
async def test_an_error_that_leaves_the_transaction_is_the_functions_to_meet(file: Path, raised: str) -> None:
    def guest(connection: TransactConnection) -> list[Any]:
        connection.execute(
            f"CREATE TRIGGER g BEFORE INSERT ON own WHEN NEW.v = 'b' BEGIN SELECT RAISE({raised}, 'no b'); END"
        )
        with pytest.raises(sqlite3.IntegrityError, match="no b"):
            connection.execute("INSERT INTO own (v) VALUES ('a'), ('b'), ('c')")
        return connection.execute("SELECT v FROM own ORDER BY id").fetchall()

    kept = {"ABORT": [("kept",)], "FAIL": [("kept",), ("a",)]}
    assert await beside_others(file, guest) == kept[raised]


# --- what COMMIT would refuse ---------------------------------------------------------------------------------------

DEFERRED = (
    "CREATE TABLE c (o INTEGER REFERENCES own (id) DEFERRABLE INITIALLY DEFERRED)",
    "INSERT INTO c VALUES (99)",
)


async def test_a_deferred_constraint_that_does_not_hold_at_commit_fails_its_function_alone(file: Path) -> None:
    before = contents(file)

    error = await beside_others(file, running(*DEFERRED))

    assert isinstance(error, sqlite3.IntegrityError)
    assert contents(file) == before


async def test_a_deferred_constraint_that_holds_in_the_end_is_none_of_the_stores_business(file: Path) -> None:
    assert await beside_others(file, running(*DEFERRED, "INSERT INTO own VALUES (99, 'late')", "SELECT 1")) == [(1,)]


async def test_two_functions_that_commit_refuses_fail_and_the_others_land(file: Path) -> None:
    async with opened(file) as harness:
        good = running("INSERT INTO own (v) VALUES ('good') RETURNING v")
        units = [note("a"), unit(running(*DEFERRED)), unit(good), unit(running(*DEFERRED)), note("b")]

        first, failed, landed, failed_too, last = await asyncio.gather(
            *map(harness.writer.submit, units), return_exceptions=True
        )

        assert (first, landed, last) == ("a", [("good",)], "b")
        for error in (failed, failed_too):
            assert isinstance(guests_error(error), sqlite3.IntegrityError)
        assert await harness.writer.run(note("after")) == "after"
    assert contents(file)["own"] == [(1, "kept"), (2, "good")]


# --- foreign keys to ours -------------------------------------------------------------------------------------------


async def test_a_key_into_the_stores_tables_is_refused_and_says_what_to_do(file: Path) -> None:
    before = contents(file)

    error = await beside_others(file, running("CREATE TABLE t (task INTEGER REFERENCES tasks (task_seq))"))

    assert isinstance(error, StoreError)
    assert "plain column" in str(error)
    assert contents(file) == before


@pytest.mark.parametrize(
    "made",
    [
        "CREATE TABLE t (a TEXT REFERENCES tasks (state))",
        "CREATE TABLE t (a TEXT REFERENCES tasks (updated_at))",
        "CREATE TABLE t (a TEXT REFERENCES events (type) DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TABLE t (a TEXT REFERENCES tasks (nonesuch) DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TABLE t (a TEXT REFERENCES steps (nonesuch))",
        "ALTER TABLE own ADD COLUMN a TEXT REFERENCES tasks (state)",
    ],
)
async def test_no_table_of_its_own_can_keep_the_store_from_writing(file: Path, made: str) -> None:
    async with opened(file) as harness:
        await outcomes(harness.writer.submit(unit(running(made))))

        def works(tx: Transaction) -> str:
            tx.one("UPDATE tasks SET state = 'running', updated_at = '2024-05-01T10:00:01.000Z'", {})
            tx.one("INSERT INTO tasks SELECT NULL, scope, 'another', kind" + REST_OF_A_TASK, {})
            step_queries.forget_failed_steps(tx, 1)
            return note("after")(tx)

        assert await harness.writer.run(works) == "after"


REST_OF_A_TASK = "".join(f", {column.name}" for column in metadata.tables["tasks"].c[4:]) + " FROM tasks"


async def test_a_row_of_its_own_that_names_a_step_does_not_keep_the_store_from_forgetting_it(file: Path) -> None:
    made = "CREATE TABLE t (a, b, c, FOREIGN KEY (a, b, c) REFERENCES steps (task_seq, kind, name))"
    async with opened(file) as harness:
        units = unit(running(made, "INSERT INTO t VALUES (1, 'step', 'fetch')", "SELECT 1"))
        await outcomes(harness.writer.submit(units))

        await harness.writer.run(lambda tx: step_queries.forget_failed_steps(tx, 1))

    assert contents(file)["steps"] == []


async def test_a_trigger_of_its_own_does_not_write_ours_when_the_store_sets_it_off(file: Path) -> None:
    made = "CREATE TABLE t (a, b, c, FOREIGN KEY (a, b, c) REFERENCES steps (task_seq, kind, name) ON DELETE CASCADE)"
    trigger = "CREATE TRIGGER g AFTER DELETE ON t BEGIN UPDATE tasks SET label = 'taken over'; END"
    before = contents(file)["tasks"]
    async with opened(file) as harness:
        units = unit(running(made, trigger, "INSERT INTO t VALUES (1, 'step', 'fetch')", "SELECT 1"))
        await outcomes(harness.writer.submit(units))

        await outcomes(harness.writer.submit(lambda tx: step_queries.forget_failed_steps(tx, 1)))

    assert contents(file)["tasks"] == before


# --- the connection -------------------------------------------------------------------------------------------------

CALLS: dict[str, Guest] = {
    "execute": lambda connection: connection.execute("INSERT INTO own (v) VALUES ('late')"),
    "executemany": lambda connection: connection.executemany("INSERT INTO own (v) VALUES (?)", [("late",)]),
    "executescript": lambda connection: connection.executescript("INSERT INTO own (v) VALUES ('late')"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_connection_that_was_kept_cannot_be_used_after_its_function(file: Path, call: Guest) -> None:
    kept: list[TransactConnection] = []
    before = contents(file)

    async with opened(file) as harness:
        await harness.writer.run(unit(kept.append))

        with pytest.raises(StoreError, match="while it runs"):
            call(kept[0])
        # nor on its thread, in another's transaction
        late = await asyncio.gather(
            harness.writer.submit(note("a")), harness.writer.submit(lambda tx: call(kept[0])), return_exceptions=True
        )

    assert [type(result) for result in late] == [str, StoreError]
    assert contents(file) == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_connection_cannot_be_used_from_another_thread_while_its_function_runs(file: Path, call: Guest) -> None:
    def guest(connection: TransactConnection) -> list[type]:
        raised: list[type] = []

        def elsewhere() -> None:
            try:
                call(connection)
            except Exception as error:
                raised.append(type(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return raised

    before = contents(file)

    assert await beside_others(file, guest) == [StoreError]
    assert contents(file) == before


async def test_a_connection_that_was_kept_from_a_refused_function_cannot_be_used(file: Path) -> None:
    kept: list[TransactConnection] = []

    def guest(connection: TransactConnection) -> None:
        kept.append(connection)
        raise LookupError

    assert isinstance(await beside_others(file, guest), LookupError)
    with pytest.raises(StoreError):
        kept[0].execute("SELECT 1")


async def test_a_function_that_is_called_again_may_do_no_more(file: Path) -> None:
    kept: list[TransactConnection] = []

    def guest(connection: TransactConnection) -> list[Any]:
        kept.append(connection)
        with pytest.raises(StoreError):
            kept[0].execute("DELETE FROM events")
        return connection.execute("SELECT v FROM own").fetchall()

    async with opened(file) as harness:
        units = [unit(guest), unit(lambda c: c.execute("INSERT INTO own (v) VALUES ('b')").lastrowid), unit(guest)]

        assert await outcomes(*map(harness.writer.submit, units)) == [[("kept",)], 2, [("kept",), ("b",)]]


# --- the function ---------------------------------------------------------------------------------------------------


async def a_coroutine(connection: TransactConnection) -> None:
    raise AssertionError("never begun")


async def an_iterator(connection: TransactConnection) -> AsyncIterator[int]:
    yield 1


def an_awaitable(connection: TransactConnection) -> Any:
    connection.execute("INSERT INTO own (v) VALUES ('undone')")
    return a_coroutine(connection)


def a_generator(connection: TransactConnection) -> Iterator[int]:
    yield connection.execute("INSERT INTO own (v) VALUES ('never')").rowcount


def another(connection: TransactConnection) -> Any:
    connection.execute("INSERT INTO own (v) VALUES ('undone')")
    return a_generator(connection)


@pytest.mark.parametrize("fn", [a_coroutine, an_awaitable, a_generator, another, an_iterator])
async def test_a_function_that_returns_before_it_has_run_is_refused_by_its_name(file: Path, fn: Guest) -> None:
    before = contents(file)

    error = await beside_others(file, fn)

    assert isinstance(error, InvalidArguments)
    assert fn.__name__ in str(error)
    assert contents(file) == before


async def test_a_generator_expression_is_run_in_the_transaction(file: Path) -> None:
    def guest(connection: TransactConnection) -> Iterator[int | None]:
        return (connection.execute("INSERT INTO own (v) VALUES (?)", [text]).rowcount for text in "ab")

    async with opened(file) as harness:
        assert await harness.writer.run(unit(guest)) == [1, 1]
        assert await harness.writer.run(unit(lambda c: len(c.execute("SELECT v FROM own").fetchall()))) == 3


async def test_what_is_done_after_the_function_has_returned_is_refused(file: Path) -> None:
    def guest(connection: TransactConnection) -> Any:
        return lambda: connection.execute("INSERT INTO own (v) VALUES ('late')")

    before = contents(file)

    with pytest.raises(StoreError):
        (await beside_others(file, guest))()
    assert contents(file) == before


class Odd(Exception):
    """An exception of the program's."""


@pytest.mark.parametrize(
    "error",
    [
        Odd("mine"),
        KeyError("x"),
        StoreError("mine, too"),
        StopIteration(),
        SystemExit(3),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        GeneratorExit(),
        sqlite3.IntegrityError("by hand"),
        ExceptionGroup("several", [Odd()]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_a_function_raises_is_its_own_and_undoes_what_it_did(file: Path, error: BaseException) -> None:
    def guest(connection: TransactConnection) -> None:
        connection.execute("INSERT INTO own (v) VALUES ('undone')")
        raise error

    before = contents(file)

    assert await beside_others(file, guest) is error
    assert contents(file) == before


async def test_what_the_store_wrote_for_a_function_goes_with_it(file: Path) -> None:
    def both(tx: Transaction) -> None:
        note("undone")(tx)
        run_guest(tx, running("DELETE FROM events"))

    async with opened(file) as harness:
        assert await outcomes(*map(harness.writer.submit, [note("a"), both, note("b")])) == ["a", GuestError, "b"]
        assert harness.told == ["a", "b"]


async def test_a_function_sees_what_the_store_wrote_before_it_in_the_same_unit(file: Path) -> None:
    def both(tx: Transaction) -> Any:
        tx.one("UPDATE tasks SET progress = 'half'", {})
        return run_guest(tx, running("SELECT progress FROM tasks"))

    async with opened(file) as harness:
        assert await harness.writer.run(both) == [("half",)]


async def test_a_function_is_given_nothing_that_was_smuggled_by_another_connection(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TRIGGER g AFTER INSERT ON own BEGIN DELETE FROM inbox; END")
    before = contents(file)

    assert isinstance(await beside_others(file, running("INSERT INTO own (v) VALUES ('b')")), StoreError)
    assert contents(file) == before


# --- whose error it is ----------------------------------------------------------------------------------------------


def short_of_room(connection: TransactConnection, pages: int) -> None:
    """Let the file grow by so many pages alone, as if the disk were full then."""
    raw = connection._raw
    raw.set_authorizer(None)
    (count,) = raw.execute("PRAGMA page_count").fetchone()
    raw.execute(f"PRAGMA max_page_count = {count + pages}").fetchall()
    raw.set_authorizer(connection.authorize)


ONE_ROW = "INSERT INTO own (v) VALUES (hex(zeroblob(4000000)))"
MANY_ROWS = (
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) "
    "INSERT INTO own (v) SELECT hex(randomblob(2000)) FROM n"
)


@pytest.mark.parametrize("sql", [ONE_ROW, MANY_ROWS], ids=["one row", "many rows"])
async def test_a_full_disk_is_the_storages_error_whichever_statement_meets_it(file: Path, sql: str) -> None:
    def guest(connection: TransactConnection) -> None:
        short_of_room(connection, 40)
        connection.execute(sql)

    async with opened(file) as harness:
        results = await outcomes(*map(harness.writer.submit, [note("a"), unit(guest), note("b")]))

    assert results == ["a", StorageFull, "b"]


def a_locked_file(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as one, closing(sqlite3.connect(path, timeout=0)) as two:
        one.execute("BEGIN EXCLUSIVE")
        two.execute("SELECT * FROM sqlite_schema")


def no_database(path: Path) -> None:
    path.write_bytes(b"x" * 5_000)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT * FROM sqlite_schema")


@pytest.mark.parametrize("fails", [a_locked_file, no_database])
async def test_an_error_of_another_database_is_the_functions_own(
    file: Path, tmp_path: Path, fails: Callable[[Path], None]
) -> None:
    error = await beside_others(file, lambda connection: fails(tmp_path / "other.db"))

    assert isinstance(error, sqlite3.Error)


# --- what stays in the file -----------------------------------------------------------------------------------------


async def test_tables_of_its_own_do_not_keep_the_file_from_another_revision(file: Path) -> None:
    made = (
        "CREATE INDEX i ON own (v)",
        "CREATE VIEW w AS SELECT * FROM own",
        "CREATE TRIGGER g AFTER INSERT ON own BEGIN SELECT 1; END",
        "CREATE TABLE t (task INTEGER REFERENCES tasks (task_seq))",
        "INSERT INTO t VALUES (1)",
        "SELECT 1",
    )
    await beside_others(file, running(*made))
    before = contents(file)["own"]

    migrate.downgrade(file, "0002")
    migrate.upgrade(file)

    assert contents(file)["own"] == before


async def test_a_writer_asks_no_function_for_permission_after_any_outcome(file: Path) -> None:
    async with opened(file) as harness:
        for fn in (running("SELECT 1"), running("DELETE FROM events"), ending(*ENDING["insert or rollback"])):
            await outcomes(harness.writer.submit(unit(fn)))
            assert await may_everything(harness)


async def may_everything(harness: Harness) -> bool:
    def asks(tx: Transaction) -> None:
        note("x")(tx)
        tx.one("UPDATE tasks SET progress = 'half'", {})
        tx.one("PRAGMA cache_size", {})

    return await outcomes(harness.writer.submit(asks)) == [None]
