"""Triggers that somebody else put on the store's tables: a program's own are welcome, those that meddle are refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lash_store import StorageError, TaskStore
from lash_store.schema import TRIGGERS
from tests.storage.test_database import print_of

RUNTIME = "desktop"

MEDDLERS = {
    "writes our rows": "CREATE TRIGGER evil AFTER INSERT ON events BEGIN DELETE FROM inbox; END",
    "writes the row that is written": "CREATE TRIGGER evil AFTER INSERT ON tasks BEGIN UPDATE tasks SET label = 'x'; END",
    "writes ours by way of a program's": (
        "CREATE TABLE log (said TEXT); CREATE TRIGGER step AFTER INSERT ON owners BEGIN INSERT INTO log VALUES ('x'); END; "
        "CREATE TRIGGER evil AFTER INSERT ON log BEGIN UPDATE sessions SET sync_needed = 1; END"
    ),
    "leaves rows out": "CREATE TRIGGER evil BEFORE INSERT ON events BEGIN SELECT RAISE /* not */ ( IGNORE ); END",
    "never ends": (
        "CREATE TRIGGER evil AFTER INSERT ON owners BEGIN SELECT (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL "
        "SELECT x + 1 FROM n) SELECT count(*) FROM n); END"
    ),
    "has one of our names": (
        f"DROP TRIGGER {next(iter(TRIGGERS))}; CREATE TRIGGER {next(iter(TRIGGERS))} AFTER UPDATE ON tasks "
        "BEGIN DELETE FROM events; END"
    ),
}


async def made(path: Path, script: str) -> None:
    async with TaskStore(path, runtime=RUNTIME) as store:
        await store.session("s1")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


@pytest.mark.parametrize("access", ["own", "request"])
@pytest.mark.parametrize("script", MEDDLERS.values(), ids=MEDDLERS.keys())
async def test_a_trigger_that_meddles_is_refused_before_anything_is_written(
    tmp_path: Path, script: str, access: str
) -> None:
    path = tmp_path / "agent.db"
    await made(path, script)
    before = print_of(path)
    store = TaskStore(path, runtime=RUNTIME) if access == "own" else TaskStore.connect(path, runtime=RUNTIME)

    with pytest.raises(StorageError, match=r"triggers that change what the store writes.*DROP TRIGGER"):
        await store.open()

    assert print_of(path) == before
    async with TaskStore.open_readonly(path) as reader:
        assert len(await reader.sessions()) == 1


async def test_a_programs_own_log_of_the_stores_tables_is_none_of_our_business(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    await made(
        path,
        "CREATE TABLE log (id TEXT); CREATE TRIGGER mine AFTER INSERT ON tasks BEGIN INSERT OR IGNORE INTO log VALUES "
        "(new.id); END; CREATE TRIGGER theirs AFTER INSERT ON log BEGIN UPDATE log SET id = upper(id); END",
    )

    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        await session.register("browser", "other")

    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT id FROM log").fetchall() == [("BROWSER",)]


async def test_meddling_ends_with_the_trigger(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    await made(path, MEDDLERS["writes our rows"])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER evil")
        connection.commit()

    async with TaskStore(path, runtime=RUNTIME) as store:
        assert len(await store.sessions()) == 1
