"""Owns the figures for a long history: what a session asks for, with 1,000,000 finished tasks in its file and with none."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import Case, Goal, Way, figure

FINISHED = 1_000_000
LIVE = 20
"""Live tasks that stand beside them, and are listed."""

TURNS = 200
CHUNK = 1_000
WHAT = ("spawn", "get", "list", "cancel")

NEW_VALUES: Mapping[str, Mapping[str, str]] = {
    "tasks": {"task_seq": ":tasks + n", "id": "'job-' || lower(hex(randomblob(6)))"},
    "handles": {
        "handle_seq": ":handles + n",
        "handle_id": "'h-' || substr(lower(hex(randomblob(13))), 1, 26)",
        "task_seq": ":tasks + n",
    },
    "events": {
        "seq": ":events + (n - 1) * :width + seq - :first + 1",
        "task_seq": ":tasks + n",
        "task_id": "(SELECT id FROM tasks WHERE task_seq = :tasks + n)",
    },
}
"""What of a copied row is its own; everything else is as the store wrote it."""


def multiply(path: Path, wanted: int) -> None:
    """Copy the one finished task of a file, with its handle and its events, until there are as many as wanted."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = OFF").fetchall()
    connection.execute("PRAGMA synchronous = OFF").fetchall()
    connection.execute("PRAGMA cache_size = -500000").fetchall()
    [[first, width]] = connection.execute("SELECT min(seq), count(*) FROM events WHERE task_seq = 1").fetchall()
    copies = {table: _copy(connection, table) for table in NEW_VALUES}
    connection.execute("BEGIN")
    done = 1
    while done < wanted:
        count = min(CHUNK, wanted - done)
        last = {
            table: connection.execute(f"SELECT max({key}) FROM {table}").fetchone()[0]
            for table, key in (("tasks", "task_seq"), ("handles", "handle_seq"), ("events", "seq"))
        }
        for sql in copies.values():
            connection.execute(sql, {**last, "count": count, "width": width, "first": first})
        done += count
    connection.execute("COMMIT")
    assert connection.execute("PRAGMA journal_mode = WAL").fetchall() == [("wal",)]
    connection.close()
    # nothing of the making may be on its way to the disk while it is measured
    os.sync()


def _copy(connection: sqlite3.Connection, table: str) -> str:
    """Return the statement that copies what a table has of task 1, :count times."""
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    taken = [NEW_VALUES[table].get(column, f'"{column}"') for column in columns]
    names = ", ".join(f'"{column}"' for column in columns)
    return (
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)"
        f" INSERT INTO {table} ({names}) SELECT {', '.join(taken)} FROM numbers CROSS JOIN {table} AS model"
        " WHERE model.task_seq = 1"
    )


def make_store(path: Path) -> Any:
    from lash_store import Recovery, TaskContext, TaskStore

    store = TaskStore(path, runtime="bench", max_running=LIVE + 10)

    @store.task(recovery=Recovery.RERUN)
    async def job(task: TaskContext, number: int) -> int:
        return number

    @store.task(recovery=Recovery.RERUN)
    async def waits(task: TaskContext) -> None:
        await asyncio.get_running_loop().create_future()

    return store, job, waits


async def finish_one(path: Path) -> None:
    store, job, _ = make_store(path)
    async with store:
        await (await (await store.session("s1")).spawn(job, 1))


class Measured:
    """One open file, and how long each thing asked of it took, by what it was."""

    def __init__(self, session: Any, waits: Any) -> None:
        self._session, self._waits = session, waits
        self.took: dict[str, list[float]] = {what: [] for what in WHAT}

    async def turn(self) -> None:
        from lash_store import CancelPolicy

        session = self._session
        handle = await self._time("spawn", lambda: session.spawn(self._waits, cancel_policy=CancelPolicy.ABORT_LOCAL))
        await self._time("get", lambda: session.get(handle.id))
        assert len(await self._time("list", session.list)) == LIVE + 1
        record = await self._time("cancel", handle.cancel)
        assert record.state == "cancelled"

    async def _time(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        began = time.perf_counter()
        answer = await call()
        self.took[what].append(time.perf_counter() - began)
        return answer


def run(folder: Path, scale: float) -> Mapping[str, float]:
    empty, full = folder / "empty.db", folder / "full.db"
    asyncio.run(finish_one(full))
    began = time.perf_counter()
    multiply(full, max(1_000, round(FINISHED * scale)))
    built = time.perf_counter() - began

    async def main() -> Mapping[str, float]:
        measured = []
        stores = [make_store(path) for path in (empty, full)]
        for store, _, waits in stores:
            await store.open()
            session = await store.session("s1")
            for _ in range(LIVE):
                await session.spawn(waits)
            measured.append(Measured(session, waits))
        for _ in range(10):
            for one in measured:
                await one.turn()
        for one in measured:
            one.took = {what: [] for what in WHAT}
        for _ in range(TURNS):
            for one in measured:
                await one.turn()
        figures = {"built": built, "bytes": full.stat().st_size / 1e6}
        for what in WHAT:
            without, beside = (statistics.median(one.took[what]) * 1e3 for one in measured)
            figures |= {f"{what}_empty": without, f"{what}_full": beside, f"{what}_ratio": beside / without}
        for store, _, _ in stores:
            await store.close()
        return figures

    return asyncio.run(main())


WAY = "lash_store"
CASE = Case(
    name="history",
    title="A long history: p50 with no finished task in the file, and with 1,000,000 in the same session",
    metrics={
        **{f"{what}_{file}": f"{what} {file} ms" for what in WHAT for file in ("empty", "full")},
        "bytes": "full: MB",
        "built": "s to make it",
    },
    ways=[
        Way(
            WAY,
            run,
            "both files open in one process, asked in turns; the finished tasks are copies of one that the store has run, with "
            "its handle and its events, under ids of their own",
        )
    ],
    goals=[Goal(f"{what} beside 1,000,000 finished tasks", figure(WAY, f"{what}_ratio"), at_most=1.3) for what in WHAT],
    rounds=1,
)
