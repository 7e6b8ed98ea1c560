"""What worker processes run whose time is drawn: every way in which a task spends it, a SIGKILL among them."""

from __future__ import annotations

import asyncio
from typing import Any

from lash_store import Backoff, Recovery, SessionTasks, TaskContext, TaskKind, TaskStore
from tests.acceptance.processes import Report


def busy(path: str) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store with the functions of these programs."""
    store = TaskStore(path, runtime="desktop", cancel_grace=60.0)

    @store.task(recovery=Recovery.RERUN)
    async def steady(task: TaskContext) -> str:
        """Work on until it is sent a signal."""
        await task.progress("at work", 0.1)
        await task.signal("go")
        return "went"

    @store.task(recovery=Recovery.RERUN)
    async def sleeper(task: TaskContext) -> None:
        """Sleep until after it was killed."""
        await task.sleep(3600, name="long")

    @store.task(recovery=Recovery.RERUN)
    async def asker(task: TaskContext) -> str:
        """Wait for a person."""
        async with task.waiting("a person's answer"):
            return str(await task.signal("answer"))

    @store.task(recovery=Recovery.RERUN, retry_on=(OSError,), backoff=Backoff(initial=0.2, jitter=0.0))
    async def flaky(task: TaskContext) -> str:
        """Fail once, in a way that another try may make good."""
        if task.attempt == 1:
            raise OSError("the network is down")
        return "there"

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def once(task: TaskContext) -> None:
        """Work that must not be run again."""
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> str:
        """Spawn a child, and wait for it."""
        child = await task.spawn(steady, id="child")
        return str(await child)

    @store.task(recovery=Recovery.RERUN)
    async def stubborn(task: TaskContext) -> None:
        """Go on though a cancel was requested: its grace is long."""
        await asyncio.Event().wait()

    functions = {fn.__name__: fn for fn in (steady, sleeper, asker, flaky, once, parent, stubborn)}
    return store, functions


async def until(session: SessionTasks, **types: str) -> None:
    """Wait until an event of its type happened to each task that is named."""
    left = dict(types)
    async for event in session.events(0):
        if left.get(event.task_id or "") == event.type:
            del left[event.task_id or ""]
        if not left:
            return


async def first_life(report: Report, path: str) -> None:
    """Begin everything, and stay until killed."""
    store, functions = busy(path)
    async with store:
        session = await store.session("s1")
        await store.session("s2")
        await (await session.spawn(functions["flaky"], id="flaky")).wait()
        for name in ("steady", "sleeper", "asker", "once", "parent"):
            await session.spawn(functions[name], id=name)
        await until(session, steady="progress", child="progress", sleeper="saved", asker="state_changed")
        # so that all of this takes time that the clock of the file shows
        await asyncio.sleep(0.02)
        await session.spawn(functions["stubborn"], id="stubborn")
        await until(session, stubborn="started")
        await asyncio.sleep(0.02)
        await session.cancel("stubborn", "no longer wanted", timeout=0)
        report("ready")
        await asyncio.Event().wait()


async def second_life(report: Report, path: str) -> None:
    """Take over, hand two tasks to another session, end what can be ended, and stay until killed."""
    store, _ = busy(path)
    async with store:
        session = await store.session("s1")
        await until(session, steady="reattached", child="reattached", asker="reattached")
        await session.handoff("s2", ["sleeper", "asker", "steady", "parent"])
        other = await store.session("s2")
        for task_id, name in (("steady", "go"), ("child", "go")):
            handle = await other.handle(task_id)
            await handle.signal(name, None)
            await handle.wait()
        await (await other.handle("parent")).wait()
        await session.register("elsewhere", TaskKind.OTHER)
        report("ready")
        await asyncio.Event().wait()
