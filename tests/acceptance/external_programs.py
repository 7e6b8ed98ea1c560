"""What worker processes run in tests of external work; each says on its pipe what it has seen acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from lash_store import Recovery, StoreError, TaskContext, TaskKind, TaskRecord, TaskState, TaskStore
from tests.acceptance.processes import Report

RUNTIME = "desktop"


def callback(report: Report, shape: str) -> Callable[..., Any]:
    """Make a cancel callback that says it was called, and then returns, waits for ever, or blocks for ever."""

    async def quick(record: TaskRecord) -> None:
        report("called", record.id)

    async def hangs(record: TaskRecord) -> None:
        report("called", record.id)
        await asyncio.Event().wait()

    def blocks(record: TaskRecord) -> None:
        report("called", record.id)
        time.sleep(3600)

    return {"quick": quick, "hangs": hangs, "blocks": blocks}[shape]


def mark(calls: str, who: str) -> None:
    """Leave one line in a file; nothing tears it, and no kill takes it back."""
    descriptor = os.open(calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{who}\n".encode())
    os.close(descriptor)


async def keep(report: Report, path: str, shape: str) -> None:
    """Keep the books of work with a callback and of work without, run bodies beside them, and stay until killed."""
    store = TaskStore(path, runtime=RUNTIME, callback_timeout=3600.0, max_running=2)

    @store.task(recovery=Recovery.RERUN)
    async def again(task: TaskContext) -> None:
        report("body", task.id)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def once(task: TaskContext) -> None:
        report("body", task.id)
        await asyncio.Event().wait()

    async with store:
        session = await store.session("s1")
        job = await session.register("job", TaskKind.OTHER, callback(report, shape), idempotency_key="key of the job")
        await session.set_live_state("job", TaskState.WAITING)
        await session.update("job", progress="half", fraction=0.5)
        await session.register("booked", TaskKind.OTHER)
        for task_id, function in (("again", again), ("once", once), ("pending", again)):
            await session.spawn(function, id=task_id)
        report("ready", job.task_seq)
        await asyncio.Event().wait()


async def ask_at(report: Report, path: str, go: str, task_id: str) -> None:
    """Open the store to ask, wait until a file is there, and cancel a task."""
    async with TaskStore.connect(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        report("ready")
        while not Path(go).exists():
            await asyncio.sleep(0.001)
        record = await session.cancel(task_id, f"from {os.getpid()}", timeout=30)
        report("cancelled", str(record.state))


async def one_call(report: Report, path: str, task_id: str, calls: str) -> None:
    """Register work whose callback leaves a line in a file, and stay until killed."""

    async def stop() -> None:
        mark(calls, f"{os.getpid()}")
        await asyncio.sleep(0.005)

    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        handle = await session.register(task_id, TaskKind.OTHER, stop)
        report("registered", handle.task_seq)
        await asyncio.Event().wait()


async def be_stuck(report: Report, path: str, go: str) -> None:
    """Run bodies that do not stop; once a file is there, write and create, and say what became of it."""
    store = TaskStore(path, runtime=RUNTIME)

    async def attempt(name: str, operation: Callable[[], Awaitable[Any]]) -> None:
        try:
            await operation()
        except asyncio.CancelledError:
            # it does not let itself be stopped
            await attempt(name, operation)
        except StoreError as error:
            report("refused", name, type(error).__name__)
        else:
            report("written", name)

    async def work(task: TaskContext) -> str:
        await task.save("before")
        report("body", task.id, task.attempt)
        while not Path(go).exists():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
        for write in (task.save, task.progress, task.notify):
            await attempt(f"{task.id} {write.__name__}", lambda write=write: write("too late"))  # type: ignore[misc]
        return "too late"

    again = store.task(recovery=Recovery.RERUN, name="again")(work)

    @store.task(recovery=Recovery.OWNER_BOUND, name="once")
    async def once(task: TaskContext) -> str:
        return await work(task)

    async with store:
        session = await store.session("s1")
        await session.spawn(again, id="again")
        await session.spawn(once, id="once")
        await session.register("job", TaskKind.OTHER, callback(report, "quick"))
        while len(await session.list()) < 3 or {(await session.get(one)).state for one in ("again", "once")} != {
            TaskState.RUNNING
        }:
            await asyncio.sleep(0.01)
        report("ready")
        while not Path(go).exists():
            await asyncio.sleep(0.02)
        await attempt("spawn", lambda: session.spawn(again, id="new"))
        await attempt("coroutine", lambda: session.spawn(asyncio.sleep(0), id="new too"))
        await attempt("register", lambda: session.register("job", TaskKind.OTHER, callback(report, "quick")))
        report("went on")
        await asyncio.Event().wait()
