"""What a body left in steps, in tasks of its own, is ended with it, and its end is told once that is over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lash_store import Backoff, Recovery, TaskContext, TaskState, TaskStore
from tests.runtime.support import hold

FOREVER = 3600.0


class Work:
    """Work of a step that says whether it runs, and is over only some time after it was cancelled."""

    def __init__(self) -> None:
        self.started, self.cancelled, self.release = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.runs = self.most = 0

    async def __call__(self) -> None:
        self.runs += 1
        self.most = max(self.most, self.runs)
        try:
            await hold(self.started, asyncio.Event())
        finally:
            self.cancelled.set()
            await self.release.wait()
            self.runs -= 1

    async def stubborn(self) -> None:
        """Go on until it is released, however often it is cancelled."""
        with contextlib.suppress(asyncio.CancelledError):
            await self()
        while not self.release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.release.wait()


@pytest.fixture
def work() -> Iterator[Work]:
    """Work that was not begun, and is let go at the end."""
    work = Work()
    yield work
    work.release.set()


async def test_cancelled_is_told_once_the_steps_of_all_branches_have_left(
    opened: Callable[..., Any], work: Work
) -> None:
    store = await opened(cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def branching(task: TaskContext) -> None:
        await asyncio.gather(task.step("upload", work), task.sleep(FOREVER))

    task = await (await store.session("s1")).spawn(branching)
    await work.started.wait()

    record = await task.cancel(timeout=0.05)
    assert (record.state, work.cancelled.is_set(), work.runs) == (TaskState.CANCEL_REQUESTED, True, 1)

    work.release.set()
    assert ((await task.wait()).state, work.runs) == (TaskState.CANCELLED, 0)


async def test_a_branch_that_swallows_the_cancellation_keeps_the_task_cancel_requested(
    opened: Callable[..., Any], work: Work
) -> None:
    store = await opened(cancel_grace=0.01)

    @store.task(recovery=Recovery.RERUN)
    async def branching(task: TaskContext) -> None:
        await asyncio.gather(task.step("upload", work.stubborn), task.sleep(FOREVER))

    task = await (await store.session("s1")).spawn(branching)
    await work.started.wait()

    record = await task.cancel(timeout=0.1)

    assert (record.state, work.runs) == (TaskState.CANCEL_REQUESTED, 1)
    work.release.set()
    assert (await task.wait()).state is TaskState.CANCELLED


async def test_the_next_attempt_begins_once_the_steps_of_the_last_one_have_left(store: TaskStore, work: Work) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, backoff=Backoff(initial=0))
    async def branching(task: TaskContext) -> int:
        async def fail() -> None:
            await work.started.wait()
            if task.attempt < 3:
                raise ConnectionError("at first")

        work.started.clear()
        slow = asyncio.create_task(task.step("slow", work))
        await fail()
        slow.cancel()
        await asyncio.wait({slow})
        return task.attempt

    task = await (await store.session("s1")).spawn(branching)
    await work.cancelled.wait()
    assert ((await task.record()).attempt, work.runs) == (1, 1)

    work.release.set()

    assert (await task, work.most) == (3, 1)


async def test_a_step_that_a_finished_body_forgot_is_cancelled_before_its_end_is_told(
    opened: Callable[..., Any], work: Work
) -> None:
    store = await opened(cancel_grace=FOREVER)
    branches: list[asyncio.Task[Any]] = []

    @store.task(recovery=Recovery.RERUN)
    async def forgetful(task: TaskContext) -> str:
        branches.append(asyncio.create_task(task.step("forgotten", work)))
        await work.started.wait()
        return "done"

    task = await (await store.session("s1")).spawn(forgetful)
    await work.cancelled.wait()
    assert (await task.record()).state is TaskState.RUNNING

    work.release.set()

    assert (await task, work.runs) == ("done", 0)
    assert branches[0].cancelled()
    assert [step.name for step in await task.steps() if step.state == "done"] == []


async def test_what_the_way_out_of_a_branch_does_in_steps_is_done(store: TaskStore, work: Work) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def branching(task: TaskContext) -> None:
        async def branch() -> None:
            try:
                await task.step("upload", work)
            finally:
                await task.step("tidy up", lambda: "tidy")

        await asyncio.gather(branch(), task.sleep(FOREVER))

    task = await (await store.session("s1")).spawn(branching)
    await work.started.wait()
    work.release.set()

    assert (await task.cancel()).state is TaskState.CANCELLED
    assert [(step.name, step.value) for step in await task.steps() if step.kind == "step"] == [("tidy up", "tidy")]


async def test_no_step_begins_in_a_branch_of_a_body_that_has_ended(store: TaskStore, started: asyncio.Event) -> None:
    ran: list[int] = []
    branches: list[asyncio.Task[Any]] = []

    @store.task(recovery=Recovery.RERUN)
    async def forgetful(task: TaskContext) -> None:
        async def late() -> None:
            await started.wait()
            await task.step("late", lambda: ran.append(1))

        branches.append(asyncio.create_task(late()))

    await (await (await store.session("s1")).spawn(forgetful))
    started.set()
    await asyncio.wait(branches)

    assert (branches[0].cancelled(), ran) == (True, [])


async def test_a_result_waits_for_a_branch_that_does_not_leave_no_longer_than_the_grace(
    opened: Callable[..., Any], work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    store = await opened(cancel_grace=0.01)

    @store.task(recovery=Recovery.RERUN)
    async def forgetful(task: TaskContext) -> str:
        work_on = asyncio.create_task(task.step("forgotten", work))
        await work.started.wait()
        assert not work_on.done()
        return "done"

    task = await (await store.session("s1")).spawn(forgetful)

    assert (await task, work.runs) == ("done", 1)
    assert "steps_left" in [record.message for record in caplog.records]
    work.release.set()


async def test_a_close_that_is_out_of_time_stores_the_result_of_a_body_whose_branch_does_not_leave(
    new: Callable[..., TaskStore], work: Work
) -> None:
    store = new(cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def forgetful(task: TaskContext) -> str:
        work_on = asyncio.create_task(task.step("forgotten", work.stubborn))
        await work.started.wait()
        assert not work_on.done()
        return "done"

    await store.open()
    await (await store.session("s1")).spawn(forgetful, id="one")
    await work.cancelled.wait()
    with pytest.warns(ResourceWarning, match="s1/one"):
        await store.close(timeout=0.01)

    async with store:
        assert await (await (await store.session("s1")).handle("one")) == "done"
    work.release.set()
