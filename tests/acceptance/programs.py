"""What worker processes run; each says on its pipe what it has seen acknowledged."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

from lash_store import Recovery, StaleAttempt, TaskContext, TaskKind, TaskState, TaskStore, owners, retention
from tests.acceptance.processes import Report

RUNTIME = "desktop"


def steady(path: str, report: Report, *, pause: float = 0.02, **options: Any) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store with the functions of these programs."""
    store = TaskStore(path, runtime=RUNTIME, **options)

    @store.task(recovery=Recovery.RERUN)
    async def count(task: TaskContext, until: int) -> list[int]:
        """Count on from the checkpoint, one save a step."""
        done: Any = task.checkpoint or 0
        first = done
        report("body", task.id, task.attempt, done)
        try:
            while done < until:
                await asyncio.sleep(pause)
                done += 1
                await task.save(done)
                report("saved", task.id, done, task.attempt)
        except StaleAttempt as error:
            report("refused", task.id, type(error).__name__)
            raise
        except asyncio.CancelledError:
            if task.stop_reason == "stale":
                # nothing of it may reach the file any more, however hard it tries
                try:
                    await task.save(-1)
                except BaseException as error:
                    report("refused", task.id, type(error).__name__)
                    raise
            raise
        return [first, done]

    @store.task(recovery=Recovery.RERUN)
    async def forever(task: TaskContext) -> None:
        report("body", task.id, task.attempt, task.checkpoint)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def once(task: TaskContext) -> None:
        report("body", task.id, task.attempt, task.checkpoint)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def stubborn(task: TaskContext) -> None:
        report("body", task.id, task.attempt, task.checkpoint)
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                report("swallowed", task.id)

    @store.task(recovery=Recovery.RERUN)
    async def only_here(task: TaskContext) -> str:
        report("body", task.id, task.attempt, task.checkpoint)
        await asyncio.Event().wait()
        return "never"

    functions = {fn.__name__: fn for fn in (count, forever, once, stubborn, only_here)}
    return store, functions


async def spawn_and_stay(report: Report, path: str, tasks: list[list[Any]], options: dict[str, Any]) -> None:
    """Spawn tasks (``[function, id, spawn options, arguments]``), say so, cancel what is to be, and stay until killed."""
    store, functions = steady(path, report, **options)
    async with store:
        session = await store.session("s1")
        for function, task_id, how, arguments in tasks:
            how = dict(how)
            bare, cancel, _ = how.pop("bare", False), how.pop("cancel", False), how.pop("waits", None)
            work = asyncio.Event().wait() if bare else functions[function]
            await session.spawn(work, *arguments, id=task_id, **how)
            if cancel:
                async for event in session.events(0):
                    if event.task_id == task_id and event.type == "started":
                        break
                await session.cancel(task_id, "asked before the end", timeout=0)
            report("spawned", task_id)
        report("ready")
        await asyncio.Event().wait()


async def stay(report: Report, path: str, options: dict[str, Any]) -> None:
    """Open the store, say what recovery has left, and stay until killed."""
    store, _ = steady(path, report, **options)
    async with store:
        report("ready", [[task.id, str(task.state), task.attempt] for task in await store.list()])
        await asyncio.Event().wait()


async def finish(report: Report, path: str, options: dict[str, Any]) -> None:
    """Open the store, wait until nothing is live, and close it."""
    store, _ = steady(path, report, **options)
    await finish_with(report, store)


async def finish_with(report: Report, store: TaskStore) -> None:
    """Wait until nothing is live in a store, and close it."""
    async with store:
        report("ready")
        for task in await store.list():
            handle = await store.handle(task.scope, task.id)
            record = await (handle.cancel("left over") if task.function == "forever" else handle.wait())
            report("ended", task.id, str(record.state), record.attempt)
    report("closed")


async def zombie_rescue(report: Report, path: str, options: dict[str, Any]) -> None:
    """Take over from an owner that is stopped, as if it had been found dead, and wait until nothing is live."""
    store, _ = steady(path, report, **options)
    life_of = owners.life_of
    owners.life_of = lambda path, owner: owners.Life.DEAD if owner.pid != os.getpid() else life_of(path, owner)
    await finish_with(report, store)


async def life(report: Report, path: str, seed: int) -> None:
    """Spawn, save, cancel and complete at random, saying what was acknowledged, for as long as it may."""
    chance = random.Random(seed)
    report("born", seed)
    store, functions = steady(path, report, pause=0.0, max_running=8, cancel_grace=0.0)
    async with store:
        session = await store.session("s1")
        report("open")

        async def follow() -> None:
            async for event in store.events(after=0, types=[TaskState.COMPLETED]):  # type: ignore[list-item]
                report("completed", event.task_seq)

        follower = asyncio.create_task(follow())
        number = 0
        while True:
            for _ in range(chance.randrange(1, 4)):
                number += 1
                task = await session.spawn(functions["count"], chance.randrange(1, 12), id=f"{seed}-{number}")
                report("spawned", task.task_seq, task.id)
            if chance.random() < 0.1:
                number += 1
                task = await session.spawn(functions["forever"], id=f"{seed}-{number}", cancel_policy="abort_local")
                record = await task.cancel("no")
                report("cancelled" if record.state == "cancelled" else "odd", task.task_seq)
            live = await session.list()
            while len(live) > 20:
                await (await session.handle(live[0].id)).wait()
                live = await session.list()
            assert not follower.done(), follower
            await asyncio.sleep(0)


async def two_loops(report: Report, path: str) -> None:
    """Leave a task behind in an event loop that is closed without its store, and wait for it in this one."""

    def make() -> tuple[TaskStore, Any]:
        store = TaskStore(path, runtime=RUNTIME)

        @store.task(recovery=Recovery.RERUN)
        async def work(task: TaskContext) -> int:
            if task.attempt == 1:
                started.set()
                await asyncio.Event().wait()
            return task.attempt

        return store, work

    async def leave() -> None:
        store, work = make()
        await store.open()
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()

    def run() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        loop.close()

    started = asyncio.Event()
    await asyncio.to_thread(run)
    store, _ = make()
    async with store:
        report("result", await (await store.handle(f"{RUNTIME}:s1", "t")).result(timeout=10))


async def ask(report: Report, path: str, operation: str, task_id: str) -> None:
    """Look at or steer a task of another process."""
    if operation == "cancel":
        async with TaskStore.connect(path, runtime=RUNTIME) as store:
            session = await store.session("s1")
            record = await session.cancel(task_id, "from outside", timeout=20)
            report("cancel", str(record.state))
    elif operation == "result":
        async with TaskStore.open_readonly(path) as store:
            handle = await store.handle(f"{RUNTIME}:s1", task_id)
            report("waiting")
            report("result", await handle.result(timeout=20))
    else:
        async with TaskStore.open_readonly(path) as store:
            events = store.events(0, scope=f"{RUNTIME}:s1")
            report("listening")
            async for event in events:
                if event.task_id == task_id:
                    report("event", str(event.type))
                    if event.type == "completed":
                        return


async def leave_finished(report: Report, path: str, count: int) -> None:
    """Leave so many finished tasks, read, in a file."""
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        for number in range(count):
            await session.register(f"t{number}", TaskKind.OTHER)
            await session.complete(f"t{number}", TaskState.CANCELLED)


async def prune(report: Report, path: str) -> None:
    """Prune everything in small parts, saying how far each has come, beside work that goes on."""
    retention._TASKS = 10
    async with TaskStore(path, runtime=RUNTIME) as store:
        report("open")
        done = await store.prune(progress=lambda report_: report("part", report_.tasks))
        report("pruned", done.tasks)
