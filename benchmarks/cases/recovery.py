"""Owns the figure for reattaching 10,000 live tasks of a killed process: open → all bodies running."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import plain, with_dbos
from benchmarks.measuring import Case, Goal, Way, ratio

TASKS = 10_000
TASKS_OF_DBOS = 1_000


def figures(tasks: int, seconds: float) -> Mapping[str, float]:
    return {"tasks": tasks, "seconds": seconds, "ms_a_task": seconds * 1e3 / tasks}


def kill_after(spawn: Callable[[Path, int, Connection], None], path: Path, tasks: int) -> None:
    """Have another process spawn tasks, and kill it when the body of each runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=spawn, args=(path, tasks, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "all run"
    process.kill()
    process.join()


# --- plain sqlite3 ---


def left_in_plain(path: Path, tasks: int) -> sqlite3.Connection:
    """Leave live rows as a killed process would, and open the file anew."""
    connection = plain.open_plain(path, "FULL")
    connection.execute("BEGIN IMMEDIATE")
    for number in range(tasks):
        arguments = json.dumps({"number": number})
        named = {"id": f"job-{number}", "arguments": arguments, "now": plain.now()}
        seq = connection.execute(plain.SPAWN, named).lastrowid
        connection.execute(plain.EVENT, {"seq": seq, "type": "registered", "now": plain.now(), "data": arguments})
        connection.execute(plain.START, {"seq": seq, "now": plain.now()})
        connection.execute(plain.EVENT, {"seq": seq, "type": "started", "now": plain.now(), "data": "{}"})
    connection.execute("COMMIT")
    connection.close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL").fetchall()
    return connection


LIVE = "SELECT seq, arguments FROM tasks WHERE completed_at IS NULL ORDER BY seq"
REATTACH = "UPDATE tasks SET attempt = attempt + 1, updated_at = :now WHERE seq = :seq AND state = 'running'"


def by_plain(folder: Path, scale: float) -> Mapping[str, float]:
    tasks = max(1, int(TASKS * scale))
    connection = left_in_plain(folder / "plain.db", tasks)
    began = time.perf_counter()
    connection.execute("BEGIN IMMEDIATE")
    left = connection.execute(LIVE).fetchall()
    for seq, _ in left:
        connection.execute(REATTACH, {"seq": seq, "now": plain.now()})
        connection.execute(plain.EVENT, {"seq": seq, "type": "reattached", "now": plain.now(), "data": "{}"})
    connection.execute("COMMIT")
    took = time.perf_counter() - began
    assert len(left) == tasks
    connection.close()
    return figures(tasks, took)


def by_plain_at_once(folder: Path, scale: float) -> Mapping[str, float]:
    tasks = max(1, int(TASKS * scale))
    connection = left_in_plain(folder / "plain.db", tasks)
    began = time.perf_counter()
    connection.execute("BEGIN IMMEDIATE")
    left = connection.execute(LIVE).fetchall()
    at = plain.now()
    connection.executemany(REATTACH, [{"seq": seq, "now": at} for seq, _ in left])
    connection.executemany(
        plain.EVENT, [{"seq": seq, "type": "reattached", "now": at, "data": "{}"} for seq, _ in left]
    )
    connection.execute("COMMIT")
    took = time.perf_counter() - began
    connection.close()
    return figures(tasks, took)


# --- lash_store ---


async def run_all(path: Path, tasks: int, spawns: bool) -> float:
    """Open the store, spawn tasks if that is to be done, and return how long it took until each body ran; leave it open."""
    from lash_store import Recovery, TaskContext, TaskStore

    store = TaskStore(path, runtime="bench", max_running=tasks)
    running, all_run = 0, asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def job(task: TaskContext, number: int) -> None:
        nonlocal running
        running += 1
        if running == tasks:
            all_run.set()
        await asyncio.Event().wait()

    began = time.perf_counter()
    await store.open()
    if spawns:
        session = await store.session("s1")
        for first in range(0, tasks, 1_000):
            await asyncio.gather(*(session.spawn(job, number) for number in range(first, min(tasks, first + 1_000))))
    await all_run.wait()
    return time.perf_counter() - began


def spawn_in_lash_store(path: Path, tasks: int, told: Connection) -> None:
    async def main() -> None:
        await run_all(path, tasks, spawns=True)
        told.send("all run")
        await asyncio.Event().wait()

    asyncio.run(main())


def by_lash_store(folder: Path, scale: float) -> Mapping[str, float]:
    import lash_store  # noqa: F401  # the program that starts again has it, as that of each baseline has its own

    tasks = max(1, int(TASKS * scale))
    kill_after(spawn_in_lash_store, folder / "lash.db", tasks)
    with asyncio.Runner() as runner:
        took = runner.run(run_all(folder / "lash.db", tasks, spawns=False))
        answer(figures(tasks, took))
    raise AssertionError("not reached")


def answer(found: Mapping[str, float]) -> None:
    """Print the figures and end this process at once, as another kill: how long all of that takes to close is not asked."""
    print(json.dumps({"figures": dict(found)}), flush=True)
    os._exit(0)


# --- DBOS ---


async def run_all_in_dbos(path: Path, tasks: int, spawns: bool, journal_mode: str) -> float:
    running, all_run = 0, asyncio.Event()

    def define(dbos: Any) -> Any:
        @dbos.workflow()  # type: ignore[untyped-decorator]
        async def job(number: int) -> None:
            nonlocal running
            running += 1
            if running == tasks:
                all_run.set()
            await asyncio.Event().wait()

        return job

    began = time.perf_counter()
    dbos, job = with_dbos.launch_again(path, define, journal_mode)
    if spawns:
        for number in range(tasks):
            await dbos.start_workflow_async(job, number)
    await all_run.wait()
    return time.perf_counter() - began


def spawn_in_dbos(journal_mode: str, path: Path, tasks: int, told: Connection) -> None:
    async def main() -> None:
        await run_all_in_dbos(path, tasks, True, journal_mode)
        told.send("all run")
        await asyncio.Event().wait()

    asyncio.run(main())


def by_dbos(journal_mode: str) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        with_dbos.find_dbos()
        tasks = max(1, int(TASKS_OF_DBOS * scale))
        kill_after(partial(spawn_in_dbos, journal_mode), folder / "dbos.sqlite", tasks)
        with asyncio.Runner() as runner:
            took = runner.run(run_all_in_dbos(folder / "dbos.sqlite", tasks, False, journal_mode))
            answer(figures(tasks, took))
        raise AssertionError("not reached")

    return run


PLAIN, PLAIN_AT_ONCE, LASH_STORE = "plain sqlite3", "plain sqlite3, executemany", "lash_store"
DBOS, DBOS_WAL = "DBOS", "DBOS, WAL"
CASE = Case(
    name="recovery",
    title="Reattach the live tasks of a killed process: open → all bodies running",
    metrics={"tasks": "tasks", "seconds": "s", "ms_a_task": "ms a task"},
    ways=[
        Way(
            PLAIN,
            by_plain,
            "one transaction: the live rows are read, and for each an UPDATE of the attempt and the INSERT of an event; no body",
        ),
        Way(PLAIN_AT_ONCE, by_plain_at_once, "the same through executemany"),
        Way(LASH_STORE, by_lash_store, "from open() until the last body has begun, all of them at once (max_running)"),
        Way(
            DBOS,
            by_dbos("delete"),
            f"{with_dbos.AS_IT_COMES}: from DBOS() and launch() until the last workflow has begun; a tenth of the tasks",
            rounds=2,
        ),
        Way(DBOS_WAL, by_dbos("wal"), with_dbos.WAL),
    ],
    goals=[
        Goal("beside one plain transaction", ratio(LASH_STORE, "seconds", PLAIN), at_most=5),
        Goal("a task, DBOS as it comes beside it", ratio(DBOS, "ms_a_task", LASH_STORE), at_least=30),
        Goal("a task, DBOS put into WAL mode beside it", ratio(DBOS_WAL, "ms_a_task", LASH_STORE), at_least=30),
    ],
    notes="The process that spawned them is killed by SIGKILL while each body waits. What is imported is imported before.",
)
