"""What worker processes of the handoff tests run; each says on its pipe what it has seen."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from lash_store import (
    EventType,
    HandleNotVisible,
    Recovery,
    TaskContext,
    TaskKind,
    TaskRecord,
    TaskState,
    TaskStore,
)
from tests.acceptance.processes import Report

RUNTIME = "desktop"


async def happened(store: TaskStore, type: EventType, of: str) -> None:
    """Wait for an event of a task, or of a session."""
    async for event in store.events(0, types=[type]):
        if of in {event.task_id, str(event.scope)}:
            return


def die() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


# --- a handoff that is killed ---------------------------------------------------------------------------------------

KEEP = ["kept", "bound", "finished"]
MOVED = {*KEEP, "child", "grandchild", "external child"}
CANCELLED = {"rest", "child of the rest", "pending", "external", "with a callback"}
ANSWERS_AT = 3
"""The attempt at which what is kept answers: the family is settled, handed over, and taken up again by one process each."""


def family(path: str) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store whose bodies stay where they are, until what is kept answers."""
    store = TaskStore(path, runtime=RUNTIME, max_running=5, cancel_grace=0.0)

    @store.task(recovery=Recovery.RERUN)
    async def answers(task: TaskContext) -> int:
        if task.attempt < ANSWERS_AT:
            await asyncio.Event().wait()
        return task.attempt

    @store.task(recovery=Recovery.RERUN)
    async def tells(task: TaskContext) -> None:
        await task.notify("half way", key="half way")
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def stays(task: TaskContext) -> None:
        await asyncio.Event().wait()

    return store, {fn.__name__: fn for fn in (answers, tells, stays)}


async def settle(report: Report, path: str) -> None:
    """Open a session with a family, and another that it can be handed to, and die."""
    store, functions = family(path)
    async with store:
        session = await store.session("s1")
        await store.session("s2")
        kept = await session.spawn(functions["answers"], id="kept")
        child = await session.spawn(functions["tells"], id="child", parent=kept)
        await session.spawn(functions["stays"], id="grandchild", parent=child)
        await session.register("external child", TaskKind.MONITOR, parent=child)
        await session.register("finished", TaskKind.OTHER, notify_on_end=True)
        await session.complete("finished", TaskState.COMPLETED, result="unread")
        rest = await session.spawn(functions["stays"], id="rest", notify_on_end=True)
        await session.spawn(functions["stays"], id="child of the rest", parent=rest)
        await session.spawn(functions["stays"], id="pending")
        await session.register("external", TaskKind.OTHER)
        await session.register("with a callback", TaskKind.OTHER, cancel=lambda: None)
        await happened(store, EventType.NOTED, "child")
        die()


class Fuse:
    """Ends this process before the *at*-th statement of a connection; what only asks for others' commits does not count."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.count = 0

    def __call__(self, statement: str) -> None:
        if not statement.startswith("PRAGMA data_version"):
            self.count += 1
            if self.count == self._at:
                die()


async def hand_over_until(report: Report, path: str, at: int | None) -> None:
    """
    Take up a family, hand it over, and die before the *at*-th statement of that, or say how many there were.

    None: die when it is committed and nobody has been told.
    """
    store, _ = family(path)
    async with store:
        session = await store.session("s1")
        await session.spawn(asyncio.Event().wait(), id="bound")
        await session.register("with a callback", TaskKind.OTHER, cancel=lambda: None)
        writer = store._core.writer  # type: ignore[union-attr]
        if at is None:
            writer._on_commit = lambda events: die()  # type: ignore[union-attr]
        fuse = Fuse(at or 0)
        await writer._connection.run(lambda raw: raw.set_trace_callback(fuse))  # type: ignore[union-attr]
        report("ready")
        handoff = await session.handoff("s2", KEEP)
        report("done", fuse.count, handoff.id)
        die()


# --- work of another process ----------------------------------------------------------------------------------------

GO = f"{RUNTIME}:go"
"""The session whose opening lets the bodies below go on."""


async def stay_at_work(report: Report, path: str) -> None:
    """Keep three bodies and the books of external work, saying what becomes of them, until killed."""
    store = TaskStore(path, runtime=RUNTIME)

    @store.task(recovery=Recovery.RERUN)
    async def gated(task: TaskContext) -> list[Any]:
        report("body", task.id)
        await happened(store, EventType.SESSION_OPENED, GO)
        await task.progress("through the gate")
        return [task.attempt, str(task.scope)]

    @store.task(recovery=Recovery.RERUN)
    async def roams(task: TaskContext) -> list[Any]:
        report("body", task.id)
        await happened(store, EventType.TRANSFERRED, task.id)
        report("moved", str(task.scope), str(task.record.scope))
        await happened(store, EventType.SESSION_OPENED, GO)
        return [task.attempt, str(task.scope), task.stop_reason]

    @store.task(recovery=Recovery.RERUN)
    async def clings(task: TaskContext) -> None:
        report("body", task.id)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            report("asked", task.stop_reason, str(task.record.state), task.record.cancel_reason)
            await happened(store, EventType.SESSION_OPENED, GO)
            report("stopped")
            raise

    def called(record: TaskRecord) -> None:
        report("called", str(record.scope), record.cancel_reason)

    async with store:
        session = await store.session("s1")
        await store.session("s2")
        await session.spawn(gated, id="gated")
        roaming = await session.spawn(roams, id="roaming")
        await session.spawn(clings, id="clinging", cancel_policy="abort_local")
        await session.register("external", TaskKind.MONITOR, cancel=called)
        for task_id in ("gated", "roaming", "clinging"):
            await happened(store, EventType.STARTED, task_id)
        report("ready")
        report("result", await roaming.result())
        await asyncio.Event().wait()


async def await_and_validate(report: Report, path: str, to_await: str, to_validate: str) -> None:
    """Read one outcome and ask whether another may still be handed over."""
    async with TaskStore.connect(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        report("read", await (await session.handle(to_await)))
        try:
            report("valid", [record.id for record in await session.validate_handles([to_validate])])
        except HandleNotVisible as error:
            report("missing", list(error.missing))


async def pass_on(report: Report, path: str, name: str, source: str, destination: str, rounds: int) -> None:
    """Carry tasks of one's own to and fro, and a ball that somebody else carries the other way, saying what was done."""
    async with TaskStore.connect(path, runtime=RUNTIME) as store:
        here, there = await store.session(source), await store.session(destination)
        mine, ends = [f"{name}{number}" for number in range(3)], (here, there)
        report("ready")
        await happened(store, EventType.SESSION_OPENED, GO)
        for _ in range(rounds):
            await ends[0].transfer(ends[1], mine)
            ends = ends[::-1]
            try:
                await here.transfer(there, ["ball"])
            except HandleNotVisible:
                report("not here")
            else:
                report("carried")
        report("done")
