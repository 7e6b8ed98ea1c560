"""Owns the figure for room: how much a file grows by one life cycle with all that is remembered of it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import plain, with_huey
from benchmarks.callers import call_at_once
from benchmarks.measuring import Case, Way
from benchmarks.with_dbos import find_dbos, launch


def grow(path: Path, scale: float, work: Callable[[int], None]) -> Mapping[str, float]:
    """Return what the file and its log hold when closed, before and after life cycles; *work* opens, does so many, and closes."""
    cycles = max(1, int(1000 * scale))
    work(0)
    empty = size(path)
    work(cycles)
    return {"bytes_a_task": (size(path) - empty) / cycles, "empty_kib": empty / 1024}


def size(path: Path) -> int:
    """Return the bytes of a closed file and of the log beside it, if it has one still."""
    return sum(one.stat().st_size for one in (path, Path(f"{path}-wal")) if one.exists())


def by_plain(folder: Path, scale: float) -> Mapping[str, float]:
    path = folder / "plain.db"

    def work(cycles: int) -> None:
        is_new = not path.exists()
        connection = plain.open_plain(path, "FULL") if is_new else sqlite3.connect(path, isolation_level=None)
        for number in range(cycles):
            plain.life_cycle(connection, number)
        connection.close()

    return grow(path, scale, work)


def by_lash_store(folder: Path, scale: float) -> Mapping[str, float]:
    from lash_store import Recovery, TaskContext, TaskStore

    path = folder / "lash.db"

    async def main(cycles: int) -> None:
        store = TaskStore(path, runtime="bench")

        @store.task(recovery=Recovery.RERUN)
        async def job(task: TaskContext, number: int) -> int:
            return number

        async with store:
            session = await store.session("s1")

            async def turn(number: int) -> None:
                assert await (await session.spawn(job, number)) == number

            if cycles:
                await call_at_once(min(cycles, 100), cycles, turn)

    return grow(path, scale, lambda cycles: asyncio.run(main(cycles)))


def by_dbos(folder: Path, scale: float) -> Mapping[str, float]:
    dbos, path = find_dbos(), folder / "dbos.sqlite"

    async def job(number: int) -> int:
        return number

    workflow = dbos.workflow(name="job")(job)

    async def turn(number: int) -> None:
        handle = await dbos.start_workflow_async(workflow, number)
        assert await handle.get_result() == number

    async def main(cycles: int) -> None:
        with launch(path):
            if cycles:
                await call_at_once(min(cycles, 100), cycles, turn)

    return grow(path, scale, lambda cycles: asyncio.run(main(cycles)))


def by_huey(folder: Path, scale: float) -> Mapping[str, float]:
    path = folder / "huey.db"

    def job(number: int) -> int:
        return number

    def work(cycles: int) -> None:
        with with_huey.consume(path, job) as enqueue:
            if cycles:
                with_huey.call_at_once(enqueue, min(cycles, 100), cycles, preserve=True)

    return grow(path, scale, work)


CASE = Case(
    name="size",
    title="Room a life cycle takes in a closed file: spawn → body → completed → result",
    metrics={"bytes_a_task": "bytes/task", "empty_kib": "KiB when empty"},
    ways=[
        Way("plain sqlite3", by_plain, "a row and three events"),
        Way("lash_store", by_lash_store, "a row, a handle and three events"),
        Way("DBOS", by_dbos, "rows of its status, its pickled arguments and its pickled result, and no history"),
        Way("Huey", by_huey, "the pickled result, kept by get(preserve=True): of the task itself nothing stays"),
    ],
    notes="An empty file was opened and closed once. A task is what 1,000 of them add to it, divided by their number.",
)
