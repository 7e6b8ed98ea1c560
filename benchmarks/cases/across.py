"""Owns the figures for what another process sees: how long after it happened a result, a cancel and an event are seen there."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from benchmarks import with_dbos
from benchmarks.measuring import Case, Found, Goal, Way, median

if TYPE_CHECKING:
    from lash_store import TaskStore

TASKS = 60
TASKS_OF_DBOS = 7
LEAST, MOST = 0.02, 0.05
"""Seconds a task takes, at random: what happens must not keep step with who looks for it."""

Access: TypeAlias = Literal["own", "request", "read"]

# All times are of `time.monotonic`, which on Linux is one clock for all processes.


def figures(**waited: list[float]) -> Mapping[str, float]:
    found = {}
    for name, seconds in waited.items():
        seconds.sort()
        found[f"{name}_p50_ms"] = seconds[len(seconds) // 2] * 1e3
        found[f"{name}_p99_ms"] = seconds[int(len(seconds) * 0.99)] * 1e3
    return found


@contextlib.contextmanager
def beside(target: Callable[[Path, Connection], None], path: Path) -> Any:
    """Give the connection to another process, which runs as long as this does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(path, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    try:
        yield ours
        ours.send("stop")
        process.join(30)
    finally:
        process.kill()
        process.join()


# --- lash_store ---


def own_lash_store(path: Path, told: Connection) -> None:
    """Own the store and run what is asked for: for each ``(what, number)`` a task, whose id goes back when it runs."""
    from lash_store import CancelPolicy, Recovery, TaskContext, TaskStore

    store = TaskStore(path, runtime="bench")

    @store.task(recovery=Recovery.RERUN)
    async def job(task: TaskContext, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return time.monotonic()

    @store.task(recovery=Recovery.RERUN)
    async def wait(task: TaskContext) -> None:
        told.send(task.id)
        try:
            await asyncio.Event().wait()
        finally:
            told.send(time.monotonic())

    async def main() -> None:
        asked = ThreadPoolExecutor(1)
        loop = asyncio.get_running_loop()
        async with store:
            session = await store.session("s1")
            told.send("ready")
            while (what := await loop.run_in_executor(asked, told.recv)) != "stop":
                if what == "wait":
                    await session.spawn(wait, cancel_policy=CancelPolicy.ABORT_LOCAL)
                else:
                    told.send((await session.spawn(job, what)).id)

    asyncio.run(main())


def store_of(path: Path, access: Access) -> TaskStore:
    from lash_store import TaskStore

    if access == "own":
        return TaskStore(path, runtime="bench")
    if access == "request":
        return TaskStore.connect(path, runtime="bench")
    return TaskStore.open_readonly(path, runtime="bench")


def by_lash_store(access: Access) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        from lash_store import EventType

        tasks = max(1, int(TASKS * scale))
        chance = random.Random(7)

        async def main(owner: Connection) -> Mapping[str, float]:
            async with store_of(folder / "lash.db", access) as store:
                session = await store.session("s1")
                results, events, cancels = [], [], []
                seen: asyncio.Queue[float] = asyncio.Queue()

                async def subscribe() -> None:
                    async for event in store.events(types=[EventType.COMPLETED]):
                        seen.put_nowait(time.monotonic() - event.data["result"])

                async def ask(what: Any) -> Any:
                    await asyncio.to_thread(owner.send, what)
                    return await asyncio.to_thread(owner.recv)

                subscriber = asyncio.create_task(subscribe())
                await asyncio.sleep(0)
                for _ in range(tasks):
                    handle = await session.handle(await ask(chance.uniform(LEAST, MOST)))
                    ended: Any = (await handle.wait()).result if access == "read" else await handle.result()
                    results.append(time.monotonic() - ended)
                    events.append(await seen.get())
                subscriber.cancel()
                for _ in range(0 if access == "read" else tasks):
                    task_id = await ask("wait")
                    await asyncio.sleep(chance.uniform(LEAST, MOST))
                    began = time.monotonic()
                    cancelled = asyncio.create_task(session.cancel(task_id))
                    cancels.append(await asyncio.to_thread(owner.recv) - began)
                    await cancelled
                return figures(result=results, event=events, **({"cancel": cancels} if cancels else {}))

        with beside(own_lash_store, folder / "lash.db") as owner:
            return asyncio.run(main(owner))

    return run


# --- DBOS ---


def define(dbos: Any) -> Any:
    @dbos.workflow()  # type: ignore[untyped-decorator]
    async def job(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return time.monotonic()

    return job


def own_dbos(path: Path, told: Connection) -> None:
    async def main() -> None:
        dbos, job = with_dbos.launch_again(path, define)
        asked = ThreadPoolExecutor(1)
        loop = asyncio.get_running_loop()
        told.send("ready")
        while (what := await loop.run_in_executor(asked, told.recv)) != "stop":
            told.send((await dbos.start_workflow_async(job, what)).workflow_id)

    asyncio.run(main())


def by_dbos(folder: Path, scale: float) -> Mapping[str, float]:
    with_dbos.find_dbos()
    dbos: Any = importlib.import_module("dbos")
    chance = random.Random(7)
    results = []
    with beside(own_dbos, folder / "dbos.sqlite") as owner:
        client = dbos.DBOSClient(system_database_url=f"sqlite:///{folder / 'dbos.sqlite'}")
        for _ in range(max(1, int(TASKS_OF_DBOS * scale))):
            # up to the longest it waits between two looks: when it looks must not keep step with what it looks for
            owner.send(chance.uniform(0, 1))
            handle: Any = client.retrieve_workflow(owner.recv())
            ended = handle.get_result()
            results.append(time.monotonic() - ended)
        client.destroy()
    return figures(result=results)


def slowest(metric: str) -> Callable[[Found], float | None]:
    """Return how to take the slowest of the ways that another process may be opened."""

    def figure(found: Found) -> float | None:
        medians = [
            median(found, way, metric) for way in WAYS if found.get(way) and all(metric in one for one in found[way])
        ]
        return max((one for one in medians if one is not None), default=None)

    return figure


DBOS = "DBOS"
WAYS = ("lash_store, TaskStore", "lash_store, connect", "lash_store, open_readonly")
CASE = Case(
    name="across",
    title="What happens in one process, seen by another",
    metrics={
        f"{what}_{part}_ms": f"{what}, {part} ms" for what in ("result", "cancel", "event") for part in ("p50", "p99")
    },
    ways=[
        Way(WAYS[0], by_lash_store("own"), "the other process owns the file as well, and may run tasks of its own"),
        Way(WAYS[1], by_lash_store("request"), "the other process makes requests only"),
        Way(WAYS[2], by_lash_store("read"), "the other process only reads: it may not cancel"),
        Way(
            DBOS,
            by_dbos,
            f"{with_dbos.WAL}: DBOSClient.retrieve_workflow(id).get_result() with its own time between two looks",
        ),
    ],
    goals=[
        Goal(f"{what} seen, p50, the slowest of the ways", slowest(f"{what}_p50_ms"), at_most=25, unit="ms")
        for what in ("result", "cancel", "event")
    ],
    notes=(
        "From a body's last line in one process, its commit included, to result() or the event in the other; and from cancel()"
        " in the other to the body's CancelledError. One at a time, at times that keep step with nothing."
    ),
)
