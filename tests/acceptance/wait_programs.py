"""What worker processes of the waiting tests run: bodies that sleep, are signalled, fail, have children, and are stopped."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from lash_store import (
    Backoff,
    EventType,
    Recovery,
    StaleAttempt,
    TaskContext,
    TaskFilter,
    TaskStore,
    TransactConnection,
    commit,
)
from tests.acceptance.processes import Report
from tests.acceptance.step_programs import RUNTIME, Death, Say, append

TURNS = 3
BACKOFF = 0.6


def waiting(path: str, say: Say, **options: Any) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store whose bodies wait for times and signals, and try again."""
    store = TaskStore(path, runtime=RUNTIME, **options)

    @store.task(recovery=Recovery.RERUN)
    async def nap(task: TaskContext, seconds: float) -> None:
        say("asleep", task.id, task.attempt, time.time())
        await task.sleep(seconds)
        say("awake", task.id, task.attempt, time.time())

    @store.task(recovery=Recovery.RERUN)
    async def nap_by_turns(task: TaskContext, seconds: float) -> None:
        """Sleep once a turn; the first attempt dies as soon as it has saved that the first turn is over."""
        done: Any = task.checkpoint or 0
        for turn in range(done, TURNS):
            say("asleep", turn, task.attempt, time.time())
            await task.sleep(seconds)
            say("awake", turn, task.attempt, time.time())
            await task.save(turn + 1)
            if task.attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    @store.task(recovery=Recovery.RERUN)
    async def listen(task: TaskContext) -> list[Any]:
        """Receive signals, each of which says what to do then: save, end, or nothing."""
        received: Any = task.checkpoint or []
        while True:
            payload: Any = await task.signal("go")
            say("received", task.id, task.attempt, payload)
            received = [*received, payload["number"]]
            if payload["then"] == "save":
                await task.save(received)
                say("saved", task.id, task.attempt, received)
            elif payload["then"] == "end":
                return list(received)

    @store.task(recovery=Recovery.RERUN)
    async def listen_in_a_step(task: TaskContext) -> list[Any]:
        """Receive one signal in a step, and one of the same name outside of it."""

        async def ask() -> Any:
            payload = await task.signal("answer")
            say("received", task.id, task.attempt, payload)
            return payload

        first = await task.step("ask", ask)
        return [first, await ask()]

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=BACKOFF, factor=1.0, jitter=0.0))
    async def fail_first(task: TaskContext) -> int:
        say("body", task.id, task.attempt, time.time())
        if task.attempt == 1:
            raise ValueError("the first time")
        return task.attempt

    @store.task(recovery=Recovery.RERUN)
    async def stay(task: TaskContext) -> None:
        say("body", task.id, task.attempt, time.time())
        await asyncio.Event().wait()

    functions = (nap, nap_by_turns, listen, listen_in_a_step, fail_first, stay)
    return store, {fn.__name__: fn for fn in functions}


async def begin(store: TaskStore, functions: dict[str, Any], tasks: list[list[Any]]) -> None:
    """Begin tasks: ``[function, id, spawn options, arguments]``."""
    session = await store.session("s1")
    for function, task_id, options, arguments in tasks:
        await session.spawn(functions[function], *arguments, id=task_id, **options)


async def begin_and_stay(report: Report, path: str, tasks: list[list[Any]]) -> None:
    """Begin tasks, and stay until killed."""
    store, functions = waiting(path, report)
    async with store:
        await begin(store, functions, tasks)
        report("ready")
        await asyncio.Event().wait()


async def begin_and_leave(report: Report, path: str, tasks: list[list[Any]], how: str) -> None:
    """Begin tasks, and be killed or close the store as soon as one of them is to be tried again."""
    store, functions = waiting(path, report)
    async with store:
        await begin(store, functions, tasks)
        await anext(aiter(store.events(0, types=[EventType.RETRY_SCHEDULED])))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    report("closed")


async def begin_and_die_asleep(report: Report, path: str, tasks: list[list[Any]], sleeps: int) -> None:
    """Begin tasks, if they are not there, and die as soon as so many sleeps are in the file."""
    end, begun = commit.Committer._end, 0

    def watched(committer: Any, tx: Any, *, wrote: bool) -> Any:
        nonlocal begun
        refused = end(committer, tx, wrote=wrote)
        begun += sum(json.loads(event.data).get("step_kind") == "sleep" for event in tx.events)
        if begun >= sleeps:
            os.kill(os.getpid(), signal.SIGKILL)
        return refused

    commit.Committer._end = watched  # type: ignore[method-assign]
    await begin_and_stay(report, path, tasks)


async def finish(report: Report, path: str) -> None:
    """Wait for the end of what is there."""
    store, _ = waiting(path, report)
    async with store:
        report("ready")
        for record in await store.list():
            ended = await (await store.handle(record.scope, record.id)).wait()
            report("ended", ended.id, str(ended.state), ended.result)
    report("closed")


# --- children -------------------------------------------------------------------------------------------------------

LEAVES = 2


def family(path: str, say: Say) -> tuple[TaskStore, Any]:
    """Make a store in which one body runs at a time, and waits for its children."""
    store = TaskStore(path, runtime=RUNTIME, max_running=1)

    @store.task(recovery=Recovery.RERUN)
    async def branch(task: TaskContext, depth: int) -> Any:
        """Wait for a branch below, and that for equal leaves."""
        say("body", task.record.task_seq, task.attempt)
        if depth == 0:
            return f"leaf {task.record.task_seq}"
        children = [await task.spawn(branch, depth - 1) for _ in range(LEAVES if depth == 1 else 1)]
        say("children", task.record.task_seq, task.attempt, [child.task_seq for child in children])
        return [await child for child in children]

    return store, branch


async def grow_and_die(report: Report, path: str, place: str, number: int) -> None:
    """Let what the last life left come to its end, then begin a family, and die at the n-th pass of a place."""
    death = Death(report, place, number, armed=False)
    death.watch_commits()
    store, branch = family(path, report)
    async with store:
        session = await store.session("s1")
        for record in await store.list(TaskFilter(include_terminal=False)):
            await (await store.handle(record.scope, record.id)).wait()
        death.armed = True
        await (await session.spawn(branch, 2, id=f"root {number}")).wait()
        death.armed = False
    report("closed")


# --- versions -------------------------------------------------------------------------------------------------------


def versioned(path: str, say: Say, version: str | None, accepts: set[str | None]) -> tuple[TaskStore, Any]:
    """Make a store with code of a version."""
    store = TaskStore(path, runtime=RUNTIME)

    @store.task(recovery=Recovery.RERUN, version=version, accepts=accepts)
    async def work(task: TaskContext) -> list[Any]:
        """Do the first half in one attempt, and the second in the next."""
        done = await task.step("first half", lambda: f"done by version {version} in attempt {task.attempt}")
        if task.attempt == 1:
            await task.save("half")
            say("half", task.id)
            await asyncio.Event().wait()
        return [task.checkpoint, done, version, task.attempt]

    return store, work


async def begin_version(report: Report, path: str, version: str | None) -> None:
    """Begin a task with code of a version, and stay until killed."""
    store, work = versioned(path, report, version, set())
    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await asyncio.Event().wait()


# --- a process that is stopped in a step ----------------------------------------------------------------------------


def stopping(path: str, say: Say, effects: str) -> tuple[TaskStore, Any]:
    """Make a store whose body stops its process, in the midst of a step of the first attempt."""
    store = TaskStore(path, runtime=RUNTIME)

    def note(connection: TransactConnection, attempt: int) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS noted (attempt INTEGER)")
        connection.execute("INSERT INTO noted VALUES (?)", (attempt,))

    @store.task(recovery=Recovery.RERUN)
    async def stop(task: TaskContext) -> str:
        async def act() -> str:
            if task.attempt == 1:
                say("stops")
                os.kill(os.getpid(), signal.SIGSTOP)
            append(effects, task.attempt)
            return f"attempt {task.attempt}"

        async def nothing() -> None:
            pass

        try:
            done = await task.step("act", act)
            await task.transact("note", note, task.attempt)
        except (StaleAttempt, asyncio.CancelledError) as error:
            say("ended", type(error).__name__, str(task.stop_reason))
            writes = {
                "step": functools.partial(task.step, "later", nothing),
                "transact": functools.partial(task.transact, "note later", note, task.attempt),
                "save": functools.partial(task.save, "of the dead"),
                "spawn": functools.partial(task.spawn, stop, id="a child of the dead"),
            }
            for name, write in writes.items():
                say(name, await outcome(write))
            say("tried all")
            raise
        say("acted", task.attempt)
        await task.signal("end")
        return done

    return store, stop


async def outcome(write: Callable[[], Awaitable[Any]]) -> str:
    """Try to write, again if the body is cancelled meanwhile, and say how that ended."""
    while True:
        try:
            await write()
            return "written"
        except asyncio.CancelledError:
            continue
        except Exception as error:
            return type(error).__name__


async def begin_and_be_stopped(report: Report, path: str, effects: str) -> None:
    """Begin a task that stops this process, and stay until killed."""
    store, stop = stopping(path, report, effects)
    async with store:
        await (await store.session("s1")).spawn(stop, id="t")
        await asyncio.Event().wait()
