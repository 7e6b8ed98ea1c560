"""Every statement that the daily business of a store runs finds its rows by an index, as it was written, parameters unbound."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import CancelPolicy, Recovery, TaskCancelled, TaskContext, TaskKind, TaskState, TaskStore, database
from tests.acceptance import programs
from tests.acceptance.processes import workers

Ran = dict[str, Any]

SCANS = re.compile(
    # the index of rows with a process is read whole: of a long history, few have one
    r"SCAN (?!tasks USING (COVERING )?INDEX tasks_process\b)"
    r"(tasks|events|handles|owners|inbox|handoffs|steps|signals|tombstones|monitors|updates)\b|AUTOMATIC|"
    # a range of the primary key from a cursor is the whole history too
    r"PRIMARY KEY \(rowid>"
)
ON_TABLES = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b.*\b(tasks|events|handles)\b", re.DOTALL)

CURSORS = re.compile(r"FROM events\s+WHERE events\.seq > :after")
"""Pages of events begin where their reader is."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What connections that are opened from now on are given to run, each statement with some of its parameters."""
    found: Ran = {}

    class Noting(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:  # type: ignore[override]
            found[sql] = parameters
            return super().execute(sql, parameters)

    connect = sqlite3.connect
    monkeypatch.setattr(database.sqlite3, "connect", lambda *args, **named: connect(*args, **named, factory=Noting))
    return found


@pytest.fixture
def ask(path: Path, ran: Ran) -> Iterator[Callable[[], Ran]]:
    """Return how each statement on tasks, events or handles that ran since the last time finds its rows."""
    asking: list[sqlite3.Connection] = []

    def ask() -> Ran:
        given = {sql: parameters for sql, parameters in ran.items() if ON_TABLES.match(sql)}
        ran.clear()
        if not asking:
            asking.append(sqlite3.Connection(path, isolation_level=None))
        return {
            sql: [row[3] for row in asking[0].execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
            for sql, parameters in given.items()
        }

    yield ask
    for connection in asking:
        connection.close()


def scans(plans: Ran) -> Ran:
    """Return what looks at more than it must."""
    return {
        sql: plan
        for sql, plan in plans.items()
        if any(map(SCANS.search, plan)) and not (CURSORS.search(sql) and "SCAN" not in str(plan))
    }


def changes(plans: Ran, table: str) -> bool:
    """Whether a row of a table was inserted or changed."""
    return any(re.match(rf"\s*(INSERT INTO|UPDATE) {table}\b", sql) for sql in plans)


async def forever(task: TaskContext) -> None:
    await asyncio.get_running_loop().create_future()


async def job(task: TaskContext, number: int) -> int:
    return number


@pytest.fixture
async def running(ran: Ran, opened: Callable[..., Any]) -> TaskStore:
    """A store all of whose statements are noted."""
    store: TaskStore = await opened()
    store.task(recovery=Recovery.RERUN)(forever)
    store.task(recovery=Recovery.RERUN)(job)
    return store


async def test_spawning_finds_everything_by_an_index(running: TaskStore, ask: Callable[[], Ran]) -> None:
    session = await running.session("s1")
    await running.session("s2", parent=session.scope)
    ask()

    parent = await session.spawn(forever, id="parent", kind=TaskKind.SUBAGENT, child_session_id="s2")
    await session.spawn(forever, id="child", parent=parent, idempotency_key="key")
    await session.spawn_hidden("hidden", job, 1)

    plans = ask()
    assert changes(plans, "tasks")
    assert changes(plans, "handles")
    assert changes(plans, "events")
    assert not scans(plans)


async def test_looking_finds_everything_by_an_index(running: TaskStore, ask: Callable[[], Ran]) -> None:
    session = await running.session("s1")
    handle = await session.spawn(forever, id="t")
    ask()

    await session.get("t")
    await session.get(handle.handle_id)
    await session.handle("t")
    await session.list()
    await session.list(kinds=[TaskKind.OTHER], states=[TaskState.RUNNING])
    await handle.record()

    plans = ask()
    assert len(plans) >= 3
    assert not scans(plans)


async def test_cancelling_finds_everything_by_an_index(running: TaskStore, ask: Callable[[], Ran]) -> None:
    session = await running.session("s1")
    for task_id in ("one", "two"):
        await session.spawn(forever, id=task_id, cancel_policy=CancelPolicy.ABORT_LOCAL)
    ask()

    assert (await session.cancel("one")).state is TaskState.CANCELLED
    await session.cancel_all()

    plans = ask()
    assert changes(plans, "tasks")
    assert not scans(plans)


async def test_completing_and_handing_out_find_everything_by_an_index(
    running: TaskStore, ask: Callable[[], Ran]
) -> None:
    session = await running.session("s1")
    stopped = await session.spawn(forever, cancel_policy=CancelPolicy.ABORT_LOCAL)
    await session.register("theirs", TaskKind.OTHER)
    ask()

    assert await (await session.spawn(job, 1)) == 1
    await stopped.cancel()
    with pytest.raises(TaskCancelled):
        await stopped
    await session.complete("theirs", TaskState.COMPLETED, result=1)

    plans = ask()
    assert any(re.match(r"\s*UPDATE tasks\b.*\bresult\b", sql, re.DOTALL) for sql in plans)
    assert any(re.match(r"\s*UPDATE handles\b.*\bread_at\b", sql, re.DOTALL) for sql in plans)
    assert not scans(plans)


async def test_recovering_what_a_dead_owner_left_finds_everything_by_an_index(
    path: Path, new: Callable[..., TaskStore], ran: Ran, ask: Callable[[], Ran]
) -> None:
    with workers() as start:
        left: list[list[Any]] = [["forever", "again", {}, []], ["once", "gone", {}, []]]
        worker = start(programs.spawn_and_stay, str(path), left, {})
        worker.wait_for("ready")
        for _, task_id, _, _ in left:
            worker.wait_for("body", task_id)
        worker.kill()
    store = new()
    store.task(recovery=Recovery.RERUN)(forever)
    ask()

    async with store:
        session = await store.session("s1")
        assert (await session.get("again")).attempt == 2
        assert (await session.get("gone")).state is TaskState.ABANDONED
        await store.recover()

    plans = ask()
    assert changes(plans, "tasks")
    assert not scans(plans)
