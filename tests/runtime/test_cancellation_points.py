"""
A caller cancelled at every suspension of an operation in turn.

After each, row and body agree, no coroutine object is left behind, and the writer goes on. Each operation is cancelled both
while it waits and in the moment at which what it waits for has come.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lash_store import Recovery, SessionTasks, TaskContext, TaskExists, TaskHandle, TaskNotFound, TaskState, TaskStore
from tests.runtime.support import Stepped, cancel_at, left_over, rows, threads

pytestmark = pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])

Operation = Callable[[int], Coroutine[Any, Any, Any]]


async def at_every_point(
    operation: Operation, late: bool, after: Callable[[int, Stepped], Awaitable[None]], *, least: int = 1
) -> None:
    """Cancel an operation at its 1st, 2nd, 3rd … suspension until it has no more, and look after each."""
    for at in itertools.count(1):
        stepped = await cancel_at(operation(at), at, late=late)
        assert stepped.error is None or stepped.was_cancelled, stepped.error
        await after(at, stepped)
        if not stepped.reached:
            assert at > least, "the operation was never suspended: nothing was tested"
            return


async def works(store: TaskStore, session: SessionTasks) -> None:
    """Hold that the store still creates, runs and answers."""

    async def body() -> str:
        return "fine"

    async with asyncio.timeout(5):
        assert await (await session.spawn(body())) == "fine"


def bodies() -> set[str]:
    """Return the ids of the tasks whose bodies live."""
    prefix = "lash_store body "
    return {one.get_name().removeprefix(prefix) for one in asyncio.all_tasks() if one.get_name().startswith(prefix)}


async def agree(store: TaskStore, session: SessionTasks) -> None:
    """Hold that exactly the running rows have a body, once every unit before this is through."""
    await store.session("behind it in the queue")
    await store.session("and once more, for what that started")
    running = {record.id for record in await session.list(states=[TaskState.RUNNING, TaskState.CANCEL_REQUESTED])}
    assert bodies() == running


async def test_spawn_of_a_registered_function(
    store: TaskStore, session: SessionTasks, release: asyncio.Event, late: bool
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        await release.wait()
        return task.id

    async def after(at: int, stepped: Stepped) -> None:
        await agree(store, session)
        try:
            record = await session.get(f"t{at}")
        except TaskNotFound:
            assert stepped.was_cancelled
        else:
            assert record.state is TaskState.RUNNING
        await works(store, session)

    await at_every_point(lambda at: session.spawn(work, id=f"t{at}"), late, after)
    release.set()
    for record in await session.list():
        assert await (await session.handle(record.id)).result(timeout=5) == record.id


async def test_spawn_of_a_coroutine_object(
    store: TaskStore, session: SessionTasks, release: asyncio.Event, late: bool
) -> None:
    made: dict[int, Coroutine[Any, Any, None]] = {}

    async def body() -> None:
        await release.wait()

    def operation(at: int) -> Coroutine[Any, Any, Any]:
        made[at] = body()
        return session.spawn(made[at], id=f"t{at}")

    async def after(at: int, stepped: Stepped) -> None:
        await agree(store, session)
        stored = f"t{at}" in {record.id for record in await session.list()}
        # adopted and begun, or refused and closed: never left unawaited
        assert (made[at].cr_running or made[at].cr_await is not None) if stored else made[at].cr_frame is None
        assert stored or stepped.was_cancelled
        await works(store, session)

    await at_every_point(operation, late, after)
    release.set()
    for record in await session.list():
        await (await session.handle(record.id)).result(timeout=5)
    assert all(coroutine.cr_frame is None for coroutine in made.values())


async def test_spawn_of_a_coroutine_object_that_is_refused(
    store: TaskStore, session: SessionTasks, release: asyncio.Event, late: bool
) -> None:
    async def holder() -> None:
        await release.wait()

    await session.spawn(holder(), id="taken")
    made: list[Coroutine[Any, Any, None]] = []

    async def operation(at: int) -> None:
        async def body() -> None:
            raise AssertionError("it ran")

        made.append(body())
        with pytest.raises(TaskExists):
            await session.spawn(made[-1], id="taken")

    async def after(at: int, stepped: Stepped) -> None:
        await works(store, session)
        assert made[-1].cr_frame is None

    await at_every_point(operation, late, after)
    release.set()


@pytest.mark.parametrize("policy", ["abort_local", "cooperative"])
async def test_cancel_of_a_running_task(opened: Callable[..., Any], late: bool, policy: str, path: Path) -> None:
    store = await opened(cancel_grace=0.01)
    session = await store.session("s1")
    running: set[str] = set()

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def work(task: TaskContext) -> None:
        running.add(task.id)
        try:
            await asyncio.Event().wait()
        finally:
            running.discard(task.id)

    for at in range(1, 12):
        await session.spawn(work, id=f"t{at}", cancel_policy=policy)

    async def after(at: int, stepped: Stepped) -> None:
        await store.session("behind it in the queue")
        record = await session.get(f"t{at}")
        if record.state is TaskState.RUNNING:
            # the request did not reach the file, so nothing was stopped
            assert record.cancel_requested_at is None
            assert record.id in running
        else:
            record = await (await session.handle(record.id)).wait(timeout=5)
            assert record.state is TaskState.CANCELLED
            assert record.id not in running
        await works(store, session)

    await at_every_point(lambda at: session.cancel(f"t{at}", "stop"), late, after)


async def test_cancel_of_a_pending_task(opened: Callable[..., Any], release: asyncio.Event, late: bool) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    ran: list[str] = []

    async def holder() -> None:
        await release.wait()

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def work(task: TaskContext) -> None:
        ran.append(task.id)

    await session.spawn(holder(), id="holder")
    for at in range(1, 8):
        await session.spawn(work, id=f"t{at}")
    cancelled: set[str] = set()

    async def after(at: int, stepped: Stepped) -> None:
        await store.session("behind it in the queue")
        record = await session.get(f"t{at}")
        assert record.state in {TaskState.PENDING, TaskState.CANCELLED}
        if record.state is TaskState.CANCELLED:
            cancelled.add(record.id)
        else:
            assert stepped.was_cancelled

    await at_every_point(lambda at: session.cancel(f"t{at}"), late, after)
    release.set()
    await asyncio.gather(*[(await session.handle(f"t{at}")).wait() for at in range(1, 8)])
    assert set(ran) == {f"t{at}" for at in range(1, 8)} - cancelled


@pytest.mark.parametrize("how", ["result", "wait", "wait with a timeout", "record", "events"])
async def test_waiting_for_a_task(store: TaskStore, session: SessionTasks, late: bool, how: str) -> None:
    async def body(release: asyncio.Event) -> str:
        await release.wait()
        return "done"

    async def operation(task: TaskHandle) -> Any:
        match how:
            case "result":
                return await task
            case "wait":
                return (await task.wait()).result
            case "wait with a timeout":
                return (await task.wait(timeout=20)).result
            case "record":
                await task.record()
                return "done"
            case _:
                return [event.data async for event in task.events()][-1]["result"]

    for at in itertools.count(1):
        release = asyncio.Event()
        spawned = await session.spawn(body(release))
        task = await session.handle(spawned.id)
        waiter = asyncio.create_task(cancel_at(operation(task), at, late=late))
        for _ in range(3):
            await store.session("time for the waiter to wait")
        assert (await spawned.record()).state is TaskState.RUNNING
        release.set()
        stepped = await waiter
        assert stepped.was_cancelled or stepped.result == "done", stepped.error
        assert await spawned.result(timeout=5) == "done"
        # and once more, of a task that has ended
        ended = await cancel_at(operation(task), at, late=late)
        assert ended.was_cancelled or ended.result == "done", ended.error
        await works(store, session)
        if not stepped.reached and not ended.reached:
            break
    assert at > 1
    assert store._core is not None
    assert store._core.feed._waiters == {}


@pytest.mark.parametrize("write", ["save", "progress"])
async def test_a_write_of_a_body(store: TaskStore, session: SessionTasks, path: Path, late: bool, write: str) -> None:
    points: list[Stepped] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        for at in itertools.count(1):
            operation = task.save(at) if write == "save" else task.progress(str(at))
            stepped = await cancel_at(operation, at, late=late)
            points.append(stepped)
            assert stepped.error is None or stepped.was_cancelled, stepped.error
            await store.session("behind it in the queue")
            found = (
                rows(path, "SELECT value FROM steps") if write == "save" else rows(path, "SELECT progress FROM tasks")
            )
            [stored] = [int(next(iter(row.values())) or 0) for row in found] or [0]
            # it took or it did not; and one the caller saw succeed did
            assert stored in ({at} if not stepped.was_cancelled else {at, at - 1})
            if write == "save" and not stepped.was_cancelled:
                assert task.checkpoint == at
            if not stepped.reached:
                return at
        raise AssertionError

    result: Any = await (await session.spawn(work)).result(timeout=20)

    assert result > 1
    assert points[0].was_cancelled
    await works(store, session)


async def test_opening_a_session(store: TaskStore, session: SessionTasks, late: bool) -> None:
    async def after(at: int, stepped: Stepped) -> None:
        again = await store.session(f"n{at}")
        await works(store, again)

    await at_every_point(lambda at: store.session(f"n{at}"), late, after)


async def test_recover(store: TaskStore, session: SessionTasks, late: bool) -> None:
    async def after(at: int, stepped: Stepped) -> None:
        await works(store, session)

    await at_every_point(lambda at: store.recover(), late, after)
    report = await store.recover()
    assert report.dead_owners == ()


async def test_a_parent_body_that_waits_for_its_child(opened: Callable[..., Any], late: bool) -> None:
    store = await opened(max_running=2)
    session = await store.session("s1")

    async def child() -> int:
        return 1

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def parent(task: TaskContext) -> int:
        for at in itertools.count(1):
            spawned = await session.spawn(child())
            stepped = await cancel_at(spawned.result(), at, late=late)
            assert stepped.was_cancelled or stepped.result == 1, stepped.error
            await spawned.wait()
            if not stepped.reached:
                return at
        raise AssertionError

    result: Any = await (await session.spawn(parent)).result(timeout=20)

    assert result >= 1
    barrier = asyncio.Barrier(2)

    async def both_slots() -> None:
        async with asyncio.timeout(5):
            await barrier.wait()

    await asyncio.gather(*[await session.spawn(both_slots()) for _ in range(2)])


async def test_open_leaves_nothing_behind_wherever_it_is_cancelled(
    new: Callable[..., TaskStore], late: bool, path: Path
) -> None:
    async with new() as store:
        await store.session("s1")
    before = threads()

    async def after(at: int, stepped: Stepped) -> None:
        if not stepped.was_cancelled:
            await stepped.result.close()
        assert await left_over(path, before) == [], f"cancelled at {at}"

    async def opening(at: int) -> TaskStore:
        return await new()

    await at_every_point(opening, late, after)
    async with new() as store:
        await works(store, await store.session("s1"))


async def test_close_is_whole_wherever_its_caller_is_cancelled(
    new: Callable[..., TaskStore], late: bool, path: Path
) -> None:
    async def closing(at: int) -> None:
        store = await new()
        session = await store.session("s1")
        await session.spawn(asyncio.sleep(3600), id=f"t{at}")
        stepped = await cancel_at(store.close(), at, late=late)
        assert stepped.error is None or stepped.was_cancelled, stepped.error
        reached.append(stepped.reached)
        assert await left_over(path, before) == [], f"cancelled at {at}"

    reached: list[bool] = []
    before = threads()
    for at in itertools.count(1):
        await closing(at)
        if not reached[-1]:
            break
    assert reached[0]
    assert {row["state"] for row in rows(path, "SELECT state FROM tasks")} == {"abandoned"}
