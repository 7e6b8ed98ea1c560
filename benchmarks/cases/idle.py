"""Owns the figures for doing nothing: an open store with 1,000 tasks that wait, for as long as nothing happens."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import Case, Goal, Missing, Way, figure

TASKS = 1_000
SECONDS = 10.0
SETTLED = 1.0
"""Seconds after the last task began to wait until it is measured."""


def number(scale: float) -> int:
    return max(10, round(TASKS * scale))


class Watch:
    """Tells what one process used, and what became of the files of a store, between two moments."""

    def __init__(self, path: Path) -> None:
        self._paths = [Path(f"{path}{suffix}") for suffix in ("", "-wal")]

    def begin(self) -> None:
        self._files = self._look()
        self._written = _written()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> dict[str, float]:
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return {
            "cpu": 100 * cpu / wall,
            "written": (_written() - self._written) / wall,
            "changed": float(self._look() != self._files),
        }

    def _look(self) -> list[tuple[int, int] | None]:
        return [(one.stat().st_size, one.stat().st_mtime_ns) if one.exists() else None for one in self._paths]


def _written() -> int:
    """Return how many bytes this process has given to the kernel to write, 0 where nobody counts them."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return 0
    return int(dict(line.split(": ") for line in counts.read_text().splitlines())["wchar"])


def by_lash_store(folder: Path, scale: float) -> Mapping[str, float]:
    from lash_store import Recovery, TaskContext, TaskStore

    path = folder / "lash.db"

    async def main() -> Mapping[str, float]:
        store = TaskStore(path, runtime="bench")
        waiting = 0

        @store.task(recovery=Recovery.RERUN)
        async def waits(task: TaskContext) -> None:
            nonlocal waiting
            waiting += 1
            await task.signal("never")

        async with store:
            session = await store.session("s1")
            tasks = number(scale)
            await asyncio.gather(*(session.spawn(waits) for _ in range(tasks)))
            while waiting < tasks:
                await asyncio.sleep(0.01)
            await asyncio.sleep(SETTLED)
            watch = Watch(path)
            watch.begin()
            await asyncio.sleep(SECONDS * scale)
            used = watch.end()
            # apart, so that being watched costs nothing of what was measured
            statements = await count_statements(store, SECONDS * scale / 4)
            return {**used, "statements": statements}

    return asyncio.run(main())


async def count_statements(store: Any, seconds: float) -> float:
    """Return how many statements a second the connections of a store run, but for the question whether others committed."""
    ran: list[str] = []

    def listen(raw: sqlite3.Connection) -> None:
        raw.set_trace_callback(ran.append)

    core = store._core
    for one in (core.reader, core.writer):
        await one._connection.run(listen)
    await asyncio.sleep(seconds)
    return sum(sql != "PRAGMA data_version" for sql in ran) / seconds


def by_asyncio(folder: Path, scale: float) -> Mapping[str, float]:
    async def main() -> Mapping[str, float]:
        never = asyncio.Event()
        tasks = [asyncio.create_task(never.wait()) for _ in range(number(scale))]
        await asyncio.sleep(SETTLED)
        watch = Watch(folder / "none.db")
        watch.begin()
        await asyncio.sleep(SECONDS * scale)
        used = watch.end()
        for task in tasks:
            task.cancel()
        return used

    return asyncio.run(main())


def by_dbos(folder: Path, scale: float) -> Mapping[str, float]:
    try:
        from dbos import DBOS
    except ImportError:
        raise Missing("DBOS is not installed: pip install -e '.[bench]'") from None
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    path = folder / "dbos.db"

    async def main() -> Mapping[str, float]:
        DBOS(config={"name": "bench", "system_database_url": f"sqlite:///{path}", "log_level": "ERROR"})
        waiting = 0

        @DBOS.workflow()  # type: ignore[untyped-decorator, unused-ignore]
        async def waits() -> None:
            nonlocal waiting
            waiting += 1
            await DBOS.sleep_async(3600)

        DBOS.launch()
        try:
            for _ in range(number(scale)):
                await DBOS.start_workflow_async(waits)
            while waiting < number(scale):
                await asyncio.sleep(0.01)
            await asyncio.sleep(SETTLED)
            watch, ran = Watch(path), []
            watch.begin()
            await asyncio.sleep(SECONDS * scale)
            used = watch.end()
            event.listen(Engine, "before_cursor_execute", lambda *what: ran.append(what[2]))
            await asyncio.sleep(SECONDS * scale / 4)
            return {**used, "statements": len(ran) / (SECONDS * scale / 4)}
        finally:
            # they would sleep for an hour
            DBOS.destroy(workflow_completion_timeout_sec=0)

    return asyncio.run(main())


OURS, PLAIN, DBOS = "lash_store", "bare asyncio tasks", "DBOS"
CASE = Case(
    name="idle",
    title="Nothing happens: a store with 1,000 waiting tasks",
    metrics={
        "cpu": "% of a core",
        "written": "bytes written/s",
        "changed": "files changed",
        "statements": "statements/s",
    },
    ways=[
        Way(
            OURS,
            by_lash_store,
            "bodies in `task.signal()`; the statement that asks whether others committed is not counted",
        ),
        Way(PLAIN, by_asyncio, "tasks that wait for an asyncio.Event, without a store"),
        Way(DBOS, by_dbos, "async workflows in `DBOS.sleep_async()`, as configured by default", rounds=2),
    ],
    goals=[
        Goal("share of a core", figure(OURS, "cpu"), at_most=0.3, unit="%"),
        Goal("bytes written", figure(OURS, "written"), at_most=0, unit="bytes/s"),
        Goal("files changed, by their size or time", figure(OURS, "changed"), at_most=0, unit=""),
        Goal("statements that read or write a table", figure(OURS, "statements"), at_most=0, unit="/s"),
    ],
)
