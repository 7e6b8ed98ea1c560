"""Slots: how many bodies run at once, in which order they start, and that none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lash_store import (
    Recovery,
    TaskContext,
    TaskFilter,
    TaskKind,
    TaskRecord,
    TaskState,
    TaskStore,
    transitions,
    writer,
)
from lash_store.lifecycle import Task
from tests.runtime.support import hold


async def assert_slots(store: TaskStore, count: int) -> None:
    """Hold that *count* bodies can run at once, and no more."""
    session = await store.session("slots")
    all_in, release = asyncio.Barrier(count + 1), asyncio.Event()

    async def occupy() -> None:
        await all_in.wait()
        await release.wait()

    tasks = [await session.spawn(occupy()) for _ in range(count)]
    async with asyncio.timeout(5):
        await all_in.wait()
    one_more = await session.spawn(asyncio.sleep(0))
    assert (await one_more.record()).state is TaskState.PENDING
    release.set()
    await asyncio.gather(*tasks, one_more)


async def test_no_more_bodies_run_at_once_than_max_running(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=3)
    session = await store.session("s1")
    running, most, full = 0, 0, asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await full.wait()
        await task.progress("here")
        running -= 1

    tasks = [await session.spawn(work) for _ in range(20)]
    assert await store.count(TaskFilter(states=frozenset({TaskState.RUNNING}))) == 3
    full.set()
    await asyncio.gather(*tasks)

    assert most == 3


async def test_bodies_start_first_in_first_out(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    order: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> None:
        order.append(number)

    first = await session.spawn(hold(started, release))
    await started.wait()
    tasks = [await session.spawn(work, number) for number in range(20)]
    assert {record.state for record in await session.list(after_seq=first.task_seq)} == {TaskState.PENDING}

    release.set()
    await asyncio.gather(*tasks)

    assert order == list(range(20))


async def test_a_body_that_awaits_a_task_gives_its_slot_back(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def nested(task: TaskContext, depth: int) -> int:
        if depth == 0:
            return 1
        below: Any = await (await session.spawn(nested, depth - 1))
        return below + 1

    task = await session.spawn(nested, 3)

    assert await task.result(timeout=10) == 4
    await assert_slots(store, 1)


@pytest.mark.parametrize("how", ["wait", "gather", "cancel", "timeout"])
async def test_every_wait_in_a_body_gives_the_slot_back(opened: Callable[..., Any], how: str) -> None:
    store = await opened(max_running=1, cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> int:
        if how in {"cancel", "timeout"}:
            await task.cancelled()
            await asyncio.Event().wait()
        return 1

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        child = await session.spawn(leaf, id="leaf")
        match how:
            case "wait":
                return (await child.wait()).state
            case "gather":
                return await asyncio.gather(child, *[await session.spawn(leaf) for _ in range(5)])
            case "timeout":
                state = (await child.wait(timeout=0.05)).state
                await child.cancel()
                return state
            case _:
                return (await child.cancel()).state

    expected = {"wait": "completed", "gather": [1] * 6, "cancel": "cancelled", "timeout": "running"}[how]
    assert await (await session.spawn(parent)).result(timeout=10) == expected
    await assert_slots(store, 1)


async def test_two_parents_and_their_children_share_one_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    running, most = 0, 0

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext, number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await task.progress("x")
        running -= 1
        return number

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> int:
        nonlocal running, most
        children = [await session.spawn(leaf, number) for number in range(3)]
        total = 0
        for child in children:
            got: Any = await child
            total += got
            running += 1
            most = max(most, running)
            await task.progress("between")
            running -= 1
        return total

    parents = [await session.spawn(parent) for _ in range(4)]

    async with asyncio.timeout(20):
        assert await asyncio.gather(*parents) == [3, 3, 3, 3]
    assert most == 1


async def test_slots_come_back_however_a_body_ends(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=4, cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, how: str) -> Any:
        match how:
            case "fail":
                raise ValueError("x")
            case "escape":
                raise KeyboardInterrupt
            case "bad result":
                return object()
            case "forever":
                await asyncio.Event().wait()
        return None

    tasks = []
    for number in range(80):
        how = ("fail", "escape", "bad result", "forever", "fine")[number % 5]
        tasks.append((how, await session.spawn(work, how)))
    for how, task in tasks:
        await (task.cancel() if how == "forever" else task.wait())

    states = [record.state for record in await session.list(include_terminal=True)]
    assert states == ["failed", "failed", "failed", "cancelled", "completed"] * 16
    await assert_slots(store, 4)


async def test_a_body_that_is_cancelled_while_it_waits_gives_no_slot_twice(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(max_running=2, cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext, number: int) -> None:
        await (await session.spawn(leaf, id=f"leaf {number}"))

    for number in range(10):
        started.clear()
        task = await session.spawn(parent, number)
        await started.wait()
        await task.cancel()
        await session.cancel(f"leaf {number}")

    await assert_slots(store, 2)


@pytest.mark.parametrize("waits", ["sleep", "signal"])
async def test_a_body_that_waits_for_its_slot_alone_is_cancelled_at_once(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, waits: str
) -> None:
    store = await opened(max_running=1, cancel_grace=3600)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def waiter(task: TaskContext) -> None:
        await session.spawn(hold(started, release), id="other")
        while True:
            # one that is over once its begin is committed keeps its slot
            await (task.sleep(0.02) if waits == "sleep" else task.signal("go"))

    task = await session.spawn(waiter)
    await started.wait()
    await task.signal("go", None)
    returning = store._core.runner.slots._returning
    async with asyncio.timeout(10):
        while not returning:
            await asyncio.sleep(0)

        assert (await task.cancel()).state is TaskState.CANCELLED
    assert not returning
    release.set()
    await (await session.handle("other"))
    await assert_slots(store, 1)


async def test_a_wait_that_outlives_its_body_takes_no_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=2)
    session = await store.session("s1")
    release = asyncio.Event()
    left: list[asyncio.Task[Any]] = []

    async def held() -> None:
        await release.wait()

    @store.task(recovery=Recovery.RERUN)
    async def leaver(task: TaskContext) -> None:
        other = await session.handle("held")
        waiting = asyncio.Event()

        async def wait() -> Any:
            waiting.set()
            return await other.wait()

        left.append(asyncio.create_task(wait()))
        await waiting.wait()

    await session.spawn(held(), id="held")
    await (await session.spawn(leaver)).result(timeout=10)
    release.set()
    await asyncio.gather(*left)

    await assert_slots(store, 2)


async def test_who_awaited_a_task_finds_its_slot_free(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    release = asyncio.Event()

    await (await session.spawn(asyncio.sleep(0))).result(timeout=10)
    second = await session.spawn(release.wait(), id="second")

    assert (await second.record()).state is TaskState.RUNNING
    release.set()
    await second.wait(timeout=10)


async def test_bodies_that_awaited_hidden_work_come_back_one_a_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=2)
    session = await store.session("s1")
    release, running, most = asyncio.Event(), 0, 0

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        nonlocal running, most
        await session.spawn_hidden("hidden", release.wait())
        await session.await_hidden()
        running += 1
        most = max(most, running)
        await task.progress("here")
        await asyncio.sleep(0)
        running -= 1

    tasks = [await session.spawn(work) for _ in range(8)]
    release.set()
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)

    assert most <= 2


async def test_a_body_that_cancelled_all_of_a_session_comes_back_into_its_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1, cancel_grace=0.05)
    session, other = await store.session("s1"), await store.session("s2")
    running, most, called = 0, 0, asyncio.Event()

    async def callback() -> None:
        await called.wait()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        nonlocal running, most
        called.set()
        running += 1
        most = max(most, running)
        await task.progress("here")
        running -= 1

    @store.task(recovery=Recovery.RERUN)
    async def ends_all(task: TaskContext) -> None:
        await other.cancel_all("all of you")
        await work(task)

    await other.register("job", TaskKind.OTHER, callback)
    cancelling = await session.spawn(ends_all)
    tasks = [cancelling, *[await session.spawn(work) for _ in range(10)]]
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)

    assert most == 1


async def test_who_waits_for_a_task_that_was_cancelled_while_its_start_is_asked_for_is_told(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MOST", 1)
    store = await opened(max_running=1)
    session = await store.session("s1")
    first = await session.spawn(hold(started, release))
    await started.wait()
    queued = await session.spawn(asyncio.sleep(0), id="queued")
    runner, start = store._core.runner, store._core.runner._start
    waits: list[asyncio.Task[TaskRecord]] = []

    def cancelled_first(task: Task, reattach: bool) -> None:
        cancel = partial(transitions.request_cancel, task=task, reason=None, by="somebody")
        waits.append(asyncio.create_task(wait_after(store._core.writer.submit(cancel))))
        start(task, reattach)

    async def wait_after(cancelled: asyncio.Future[Any]) -> TaskRecord:
        await cancelled
        return await queued.wait()

    monkeypatch.setattr(runner, "_start", cancelled_first)
    release.set()
    await first
    async with asyncio.timeout(20):
        while not waits:
            await asyncio.sleep(0)
        assert (await waits[0]).state is TaskState.CANCELLED


async def test_a_body_that_closes_a_session_keeps_its_time_out_though_its_slot_is_taken(
    opened: Callable[..., Any], release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session, other = await store.session("s1"), await store.session("s2")
    await other.register("job", TaskKind.OTHER, release.wait, close_policy="cancel")

    @store.task(recovery=Recovery.RERUN)
    async def closes(task: TaskContext) -> None:
        await other.close(timeout=0.2)

    closing = await session.spawn(closes)
    staying = await session.spawn(release.wait())
    async with asyncio.timeout(20):
        await closing

    assert (await staying.record()).state is TaskState.RUNNING
    release.set()
