"""Owns the figure for five memoised steps in a body: each is remembered by a commit before the next begins."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plain
from benchmarks.callers import call_at_once, figures
from benchmarks.measuring import Case, Goal, Way, ratio
from benchmarks.with_dbos import AS_IT_COMES, WAL, find_dbos, launch

STEPS, CALLERS = 5, 100

SCHEMA = """
CREATE TABLE steps (task INTEGER NOT NULL REFERENCES tasks (seq), name TEXT NOT NULL, value TEXT NOT NULL,
  saved_at TEXT NOT NULL, PRIMARY KEY (task, name)) WITHOUT ROWID;
"""
STEP = "INSERT INTO steps (task, name, value, saved_at) VALUES (:seq, :name, :value, :now)"


async def double(number: int) -> int:
    return 2 * number


def by_plain(folder: Path, scale: float) -> Mapping[str, float]:
    bodies, waited = max(1, int(600 * scale)), []
    connection = plain.open_plain(folder / "plain.db", "FULL")
    connection.executescript(SCHEMA)
    began = time.perf_counter()
    for number in range(bodies):
        one = time.perf_counter()
        run_plain(connection, number)
        waited.append(time.perf_counter() - one)
    took = time.perf_counter() - began
    connection.close()
    return figures(bodies, took, waited)


def run_plain(connection: sqlite3.Connection, number: int) -> None:
    """Make one task, start it, do five steps and complete it: eight commits, each with its event."""
    arguments = json.dumps({"number": number})

    def commit(statement: str, type: str, data: str, **values: Any) -> int:
        connection.execute("BEGIN IMMEDIATE")
        made = connection.execute(statement, {"now": plain.now(), **values}).lastrowid
        seq: int = values.get("seq") or made or 0
        connection.execute(plain.EVENT, {"seq": seq, "type": type, "now": plain.now(), "data": data})
        connection.execute("COMMIT")
        return seq

    seq = commit(plain.SPAWN, "registered", arguments, id=f"job-{number}", arguments=arguments)
    commit(plain.START, "started", "{}", seq=seq)
    for turn in range(STEPS):
        number *= 2
        commit(STEP, "saved", json.dumps({"name": f"double {turn}"}), seq=seq, name=f"double {turn}", value=str(number))
    commit(plain.COMPLETE, "completed", str(number), seq=seq, result=str(number))


def by_lash_store(callers: int) -> Any:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        from lash_store import Recovery, TaskContext, TaskStore

        bodies = max(callers, int((300 if callers == 1 else 2000) * scale))

        async def main() -> Mapping[str, float]:
            store = TaskStore(folder / "lash.db", runtime="bench", durability="full", max_running=CALLERS)

            @store.task(recovery=Recovery.RERUN)
            async def job(task: TaskContext, number: int) -> int:
                for turn in range(STEPS):
                    number = await task.step(f"double {turn}", double, number)
                return number

            async with store:
                session = await store.session("s1")

                async def turn(number: int) -> None:
                    assert await (await session.spawn(job, number)) == number << STEPS

                return await call_at_once(callers, bodies, turn)

        return asyncio.run(main())

    return run


def by_dbos(journal_mode: str) -> Callable[[Path, float], Mapping[str, float]]:
    return lambda folder, scale: run_dbos(folder, scale, journal_mode)


def run_dbos(folder: Path, scale: float, journal_mode: str) -> Mapping[str, float]:
    dbos = find_dbos()
    step = dbos.step(name="double")(double)

    async def job(number: int) -> int:
        for _ in range(STEPS):
            number = await step(number)
        return number

    workflow = dbos.workflow(name="job")(job)

    async def turn(number: int) -> None:
        handle = await dbos.start_workflow_async(workflow, number)
        assert await handle.get_result() == number << STEPS

    async def main() -> Mapping[str, float]:
        with launch(folder / "dbos.sqlite", journal_mode):
            return await call_at_once(CALLERS, max(CALLERS, int(200 * scale)), turn)

    return asyncio.run(main())


PLAIN, DBOS, DBOS_WAL, OURS = "plain sqlite3", "DBOS", "DBOS, WAL", f"lash_store, {CALLERS} callers"
CASE = Case(
    name="steps",
    title="Five memoised steps in a body: spawn → five steps → completed → result, each durable before the next",
    metrics={"per_second": "bodies/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms"},
    ways=[
        Way(
            PLAIN,
            by_plain,
            "tables of tasks, steps and events, eight commits a body, one caller: SQLite has one writer",
        ),
        Way("lash_store, 1 caller", by_lash_store(1), 'task.step(name, fn, …) of an async function, durability="full"'),
        Way(OURS, by_lash_store(CALLERS), "the same"),
        Way(
            DBOS,
            by_dbos("delete"),
            f"@DBOS.step in an async @DBOS.workflow, {CALLERS} callers; {AS_IT_COMES}",
            rounds=3,
        ),
        Way(DBOS_WAL, by_dbos("wal"), WAL),
    ],
    goals=[
        Goal(f"{CALLERS} callers beside DBOS as it comes", ratio(OURS, "per_second", DBOS), at_least=30),
        Goal(f"{CALLERS} callers beside DBOS put into WAL mode", ratio(OURS, "per_second", DBOS_WAL), at_least=30),
    ],
    notes="DBOS commits seven times a body: its insert, each step and its end; and it notes no events.",
)
