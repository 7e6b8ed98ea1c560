"""What worker processes run that hide work, wait for it, speak to their session and read its inbox."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from lash_store import (
    InboxBusy,
    Recovery,
    SessionTasks,
    TaskAbandoned,
    TaskContext,
    TaskFailed,
    TaskKind,
    TaskStore,
)
from tests.acceptance.processes import Report

RUNTIME = "desktop"


def registered(path: str, report: Report) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store with the functions of these programs."""
    store = TaskStore(path, runtime=RUNTIME)

    @store.task(recovery=Recovery.RERUN)
    async def fail(task: TaskContext, message: str) -> None:
        raise RuntimeError(message)

    @store.task(recovery=Recovery.RERUN)
    async def stay(task: TaskContext) -> int:
        """Stay in the first attempt, end in the next."""
        report("body", task.id, task.attempt)
        if task.attempt == 1:
            await asyncio.Event().wait()
        return task.attempt

    @store.task(recovery=Recovery.RERUN)
    async def talk(task: TaskContext) -> None:
        """Say something once, and something each time; end in the second attempt."""
        await task.notify(f"attempt {task.attempt}", {"attempt": task.attempt}, key="once")
        await task.notify(f"attempt {task.attempt}")
        report("body", task.id, task.attempt)
        if task.attempt == 1:
            await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN, max_attempts=1)
    async def try_once(task: TaskContext) -> None:
        report("body", task.id, task.attempt)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def bound(task: TaskContext) -> None:
        report("body", task.id, task.attempt)
        await asyncio.Event().wait()

    return store, {fn.__name__: fn for fn in (fail, stay, talk, try_once, bound)}


def told(group: ExceptionGroup[Any]) -> list[str]:
    """Say what a group of failures says."""
    found = []
    for error in group.exceptions:
        if isinstance(error, TaskFailed):
            found.append(error.failure.message)
        else:
            assert isinstance(error, TaskAbandoned)
            found.append(f"abandoned: {error.evidence.end}")
    return found


async def looked(session: SessionTasks) -> None:
    """Return once what was asked of the store before is committed."""
    await asyncio.sleep(0)
    await session.unregister("nobody")


# --- hidden work ----------------------------------------------------------------------------------------------------


async def die_when_told(report: Report, path: str) -> None:
    """Let hidden work fail, and die in the block that is told of it."""
    store, functions = registered(path, report)
    async with store:
        session = await store.session("s1")
        for message in ("one", "two"):
            await session.spawn_hidden("memory", functions["fail"], message)
        try:
            await session.await_hidden()
        except ExceptionGroup as group:
            report("told", told(group))
            os.kill(os.getpid(), signal.SIGKILL)


async def die_when_the_first_was_told(report: Report, path: str) -> None:
    """Die when a hidden body was told of a failure that somebody who waits for that body was not told of yet."""
    store, functions = registered(path, report)
    async with store:
        session = await store.session("s1")
        waiting: list[asyncio.Task[None]] = []
        others_wait = asyncio.Event()

        async def nosy() -> None:
            await others_wait.wait()
            try:
                await session.await_hidden()
            except ExceptionGroup as group:
                # what was acknowledged until now would be in the file
                await looked(session)
                report("told", told(group), waiting[0].done())
                os.kill(os.getpid(), signal.SIGKILL)

        await session.spawn_hidden("nosy", nosy())
        waiting.append(asyncio.create_task(session.await_hidden()))
        await looked(session)
        await session.spawn_hidden("memory", functions["fail"], "one")
        others_wait.set()
        await asyncio.Event().wait()


async def hide_and_stay(report: Report, path: str, what: str) -> None:
    """Hide work that does not end, and stay until killed."""
    store, functions = registered(path, report)
    begun = asyncio.Event()

    async def bare() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with store:
        session = await store.session("s1")
        task = await session.spawn_hidden("memory", bare() if what == "bare" else functions[what])
        if what == "bare":
            await begun.wait()
            report("body", task.id, 1)
        await asyncio.Event().wait()


async def settle(report: Report, path: str) -> None:
    """Wait for hidden work until there is nothing new to be told, then until the session need not take its state up."""
    store, _ = registered(path, report)
    async with store:
        session = await store.session("s1")
        report("sync_needed", await session.sync_needed())
        for wait in (*[session.await_hidden] * 2, *[session.await_background_work] * 2):
            try:
                report(wait.__name__, await wait())
            except ExceptionGroup as group:
                report(wait.__name__, told(group))
        live = await session.list(include_hidden=True)
        report("live", len(live))
    report("closed")


async def wait_beside(report: Report, path: str) -> None:
    """Hide work that fails once somebody completes "go", and wait for all that is hidden, also by others."""
    store, _ = registered(path, report)
    async with store:
        session = await store.session("s1")

        async def follow() -> None:
            await (await session.handle("go"))
            raise RuntimeError(f"process {os.getpid()}")

        await session.spawn_hidden("memory", follow())
        report("hidden")
        await (await session.handle("all here"))
        waiting = asyncio.create_task(session.await_hidden())
        await looked(session)
        report("waiting")
        try:
            await waiting
        except ExceptionGroup as group:
            report("told", sorted(told(group)))
        # once everybody was told, and had the time to say so
        await (await session.handle("all told"))
        try:
            await session.await_hidden()
            report("told later", [])
        except ExceptionGroup as group:
            report("told later", told(group))


# --- the inbox ------------------------------------------------------------------------------------------------------


async def work_and_stay(report: Report, path: str, tasks: list[list[Any]]) -> None:
    """Spawn tasks (``[function, id, spawn options]``), ask for the cancel of those in "cancel", and stay until killed."""
    store, functions = registered(path, report)
    async with store:
        session = await store.session("s1")
        for function, task_id, options in tasks:
            how = dict(options)
            cancel = how.pop("cancel", False)
            if function == "external":
                await session.register(task_id, TaskKind.OTHER, **how)
            else:
                await session.spawn(functions[function], id=task_id, **how)
                async for event in session.events(0):
                    if event.task_id == task_id and event.type == "started":
                        break
            if cancel:
                await session.cancel(task_id, "asked before the end", timeout=0)
        report("ready")
        await asyncio.Event().wait()


async def recover_and_close(report: Report, path: str) -> None:
    """Open the store, wait for what may run again, and close it."""
    store, _ = registered(path, report)
    async with store:
        for record in await store.list():
            if record.mode != "external":
                await (await store.handle(record.scope, record.id)).wait()
    report("closed")


async def read_inbox(report: Report, path: str, how: str, what_then: str) -> None:
    """Claim the notes of the session, say what they are, and stay, or leave in order."""
    store = TaskStore(path, runtime=RUNTIME) if how == "own" else TaskStore.connect(path, runtime=RUNTIME)
    async with store:
        session = await store.session("s1")
        try:
            async with session.inbox() as notes:
                report("notes", [note.text for note in notes])
                if what_then == "stay":
                    await asyncio.Event().wait()
        except InboxBusy as error:
            report("busy", str(error))
    report("closed")
