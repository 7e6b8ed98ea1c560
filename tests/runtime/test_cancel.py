"""Cancel of one task: a durable request first, a stop second, and never an outcome that the body contradicts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    CancelPolicy,
    ClosePolicy,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskNotFound,
    TaskState,
    TaskStore,
    turns,
)
from tests.runtime.support import event_count, event_types, hold, rows

FOREVER = 3600.0


async def test_a_cooperative_body_sees_the_request_and_its_result_stands(
    opened: Callable[..., Any], started: asyncio.Event, path: Path
) -> None:
    store = await opened(cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        before = task.cancel_requested
        started.set()
        await task.cancelled()
        return [before, task.cancel_requested, task.stop_reason]

    task = await (await store.session("s1")).spawn(work)
    await started.wait()

    record = await task.cancel("enough")

    assert (record.state, record.result) == (TaskState.COMPLETED, [False, True, "cancel"])
    assert record.cancel_reason == "enough"
    assert event_types(path, task.task_seq) == ["registered", "started", "cancel_requested", "completed"]


async def test_a_failure_after_the_request_is_failed(opened: Callable[..., Any], started: asyncio.Event) -> None:
    store = await opened(cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        started.set()
        await task.cancelled()
        raise RuntimeError("could not tidy up")

    task = await (await store.session("s1")).spawn(work)
    await started.wait()

    record = await task.cancel()

    assert record.state is TaskState.FAILED
    assert record.failure is not None
    assert record.failure.type == "RuntimeError"


async def test_after_the_grace_a_cooperative_body_is_cancelled(
    opened: Callable[..., Any], started: asyncio.Event, path: Path
) -> None:
    store = await opened(cancel_grace=0.05)

    @store.task(recovery=Recovery.RERUN)
    async def deaf(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    task = await (await store.session("s1")).spawn(deaf)
    await started.wait()
    before = asyncio.get_running_loop().time()

    record = await task.cancel("now")

    assert record.state is TaskState.CANCELLED
    assert asyncio.get_running_loop().time() - before >= 0.05
    assert event_types(path, task.task_seq) == ["registered", "started", "cancel_requested", "cancelled"]


async def test_abort_local_cancels_the_body_at_once(opened: Callable[..., Any], started: asyncio.Event) -> None:
    store = await opened(cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def deaf(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    task = await (await store.session("s1")).spawn(deaf, cancel_policy=CancelPolicy.ABORT_LOCAL)
    await started.wait()

    assert (await task.cancel()).state is TaskState.CANCELLED


async def test_a_bare_coroutine_is_cancelled_at_once(opened: Callable[..., Any], started: asyncio.Event) -> None:
    store = await opened(cancel_grace=FOREVER)
    task = await (await store.session("s1")).spawn(hold(started, asyncio.Event()))
    await started.wait()

    assert (await task.cancel()).state is TaskState.CANCELLED


async def test_a_bare_coroutine_may_be_given_the_grace(opened: Callable[..., Any], started: asyncio.Event) -> None:
    store = await opened(cancel_grace=0.03)
    task = await (await store.session("s1")).spawn(
        hold(started, asyncio.Event()), cancel_policy=CancelPolicy.COOPERATIVE
    )
    await started.wait()
    before = asyncio.get_running_loop().time()

    assert (await task.cancel()).state is TaskState.CANCELLED
    assert asyncio.get_running_loop().time() - before >= 0.03


@pytest.mark.parametrize("bare", [True, False])
async def test_a_pending_task_is_cancelled_without_ever_running(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path, bare: bool
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    ran: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        ran.append(1)

    async def bare_work() -> None:
        ran.append(1)

    first = await session.spawn(hold(started, release))
    await started.wait()
    second = await session.spawn(bare_work() if bare else work)

    record = await second.cancel("never mind")

    assert (record.state, record.attempt, record.started_at) == (TaskState.CANCELLED, 0, None)
    assert event_types(path, second.task_seq) == ["registered", "cancelled"]
    release.set()
    await first
    assert await (await session.spawn(hold(started, release))) is None
    assert ran == []


async def test_cancelled_is_never_reported_while_the_body_runs(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened()
    stopped: list[bool] = []

    @store.task(recovery=Recovery.RERUN)
    async def slow_to_end(task: TaskContext) -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            await release.wait()
            stopped.append(True)

    task = await (await store.session("s1")).spawn(slow_to_end, cancel_policy="abort_local")
    await started.wait()

    record = await task.cancel(timeout=0.05)
    assert (record.state, stopped) == (TaskState.CANCEL_REQUESTED, [])
    assert (await task.record()).state is TaskState.CANCEL_REQUESTED

    release.set()
    assert (await task.wait()).state is TaskState.CANCELLED
    assert stopped == [True]


async def test_a_body_that_swallows_the_cancellation_stays_cancel_requested_and_may_complete(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened()
    swallowed = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def stubborn(task: TaskContext) -> str:
        try:
            await hold(started, asyncio.Event())
        except asyncio.CancelledError:
            swallowed.set()
        await release.wait()
        return "done all the same"

    task = await (await store.session("s1")).spawn(stubborn, cancel_policy="abort_local")
    await started.wait()

    record = await task.cancel("please", timeout=0.05)

    assert (record.state, record.completed_at) == (TaskState.CANCEL_REQUESTED, None)
    await swallowed.wait()
    release.set()
    record = await task.wait()
    assert (record.state, record.result) == (TaskState.COMPLETED, "done all the same")


async def test_a_finished_task_comes_back_unchanged_and_no_event_is_written(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def work() -> int:
        return 1

    task = await session.spawn(work(), id="t")
    await task
    before, count = await task.record(), event_count(path)

    assert await task.cancel("late") == before
    assert await session.cancel("t", "late") == before
    assert event_count(path) == count


async def test_the_second_request_writes_no_event_and_the_first_reason_stands(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = await opened(cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, release)

    task = await (await store.session("s1")).spawn(work)
    await started.wait()
    first = await task.cancel("one", timeout=0)
    count = event_count(path)

    second = await task.cancel("two", timeout=0)

    assert second == first
    assert second.cancel_reason == "one"
    assert event_count(path) == count
    release.set()
    await task.wait()


async def test_the_request_says_who_asked_and_when(
    opened: Callable[..., Any], started: asyncio.Event, path: Path
) -> None:
    store = await opened()
    task = await (await store.session("s1")).spawn(hold(started, asyncio.Event()))
    await started.wait()

    record = await task.cancel("why not")

    assert record.cancel_requested_by is not None
    assert record.cancel_requested_by.startswith("desktop")
    assert record.cancel_requested_at is not None
    assert record.started_at is not None
    assert record.completed_at is not None
    assert record.started_at <= record.cancel_requested_at <= record.completed_at


async def test_many_cancels_at_once_make_one_request(
    opened: Callable[..., Any], started: asyncio.Event, path: Path
) -> None:
    store = await opened()
    task = await (await store.session("s1")).spawn(hold(started, asyncio.Event()))
    await started.wait()

    records = await asyncio.gather(*(task.cancel(str(number)) for number in range(20)))

    assert {record.state for record in records} == {TaskState.CANCELLED}
    assert event_types(path, task.task_seq).count("cancel_requested") == 1


async def test_a_cancelled_error_nobody_asked_for_is_failed(session: SessionTasks) -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    record = await (await session.spawn(work())).wait()

    assert record.state is TaskState.FAILED
    assert record.failure is not None
    assert record.failure.type == "CancelledError"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("base")])
async def test_an_exception_beyond_exception_settles_the_row_and_spares_the_loop(
    store: TaskStore, session: SessionTasks, error: BaseException
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        raise error

    record = await (await session.spawn(work)).wait()

    assert record.state is TaskState.FAILED
    assert record.failure is not None
    assert record.failure.type == type(error).__name__


@pytest.mark.parametrize("raises", [SystemExit, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("base", [RuntimeError, SystemExit])
@pytest.mark.parametrize("in_step", [True, False])
async def test_an_exception_whose_words_raise_settles_the_row_and_spares_the_loop(
    store: TaskStore, session: SessionTasks, base: type[BaseException], raises: type[BaseException], in_step: bool
) -> None:
    class Wordless(base):  # type: ignore[misc, valid-type]
        def __str__(self) -> str:
            raise raises

        __repr__ = __str__

    async def fail() -> None:
        raise Wordless

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await (task.step("fail", fail) if in_step else fail())

    record = await (await session.spawn(work)).wait()

    assert record.failure is not None
    assert record.failure.type == "Wordless"
    assert record.failure.message == f"(its message raised {raises.__name__})"


async def test_a_cancel_that_races_with_completion_gives_one_outcome(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def work() -> int:
        return 1

    tasks = [await session.spawn(work()) for _ in range(30)]
    records = await asyncio.gather(*(task.cancel() for task in tasks))

    assert {record.state for record in records} <= {TaskState.COMPLETED, TaskState.CANCELLED}
    for task, record in zip(tasks, records, strict=True):
        assert await task.record() == record


async def test_cancel_directly_after_spawn_leaves_no_body(
    store: TaskStore, session: SessionTasks, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    for _ in range(30):
        task = await session.spawn(work, cancel_policy="abort_local")
        assert (await task.cancel()).state is TaskState.CANCELLED
    names = {running.get_name() for running in asyncio.all_tasks()}
    assert not [name for name in names if name.startswith("lash_store body")]


async def test_a_task_may_cancel_itself(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        own = await store.session(task.scope.session_id)
        await own.cancel(task.id, "by itself")

    task = await session.spawn(work, cancel_policy="abort_local")

    record = await task.wait(timeout=10)

    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "by itself")


async def test_a_child_that_is_awaited_can_be_cancelled_and_the_parent_hears_of_it(
    store: TaskStore, session: SessionTasks, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> str:
        spawned = await session.spawn(child, id="child", cancel_policy="abort_local")
        return (await spawned.wait()).state

    task = await session.spawn(parent)
    await started.wait()
    await session.cancel("child")

    assert await task == "cancelled"


async def test_a_parent_that_waits_can_be_cancelled_while_its_child_holds_the_only_slot(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1, cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> None:
        await hold(started, release)

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        await (await session.spawn(child, id="child"))

    task = await session.spawn(parent)
    await started.wait()

    record = await task.cancel(timeout=5)

    assert record.state is TaskState.CANCELLED
    release.set()
    assert (await (await session.handle("child")).wait(timeout=5)).state is TaskState.COMPLETED
    assert await (await session.spawn(hold(started, release))).result(timeout=5) is None


async def test_cancelling_an_unknown_task_changes_nothing(session: SessionTasks, path: Path) -> None:
    count = event_count(path)

    with pytest.raises(TaskNotFound, match="'nobody'"):
        await session.cancel("nobody")

    assert event_count(path) == count
    assert rows(path, "SELECT * FROM tasks") == []


@pytest.mark.parametrize("how", ["cancel_all", "close"])
async def test_very_many_ends_are_waited_for_in_parts(
    session: SessionTasks, store: TaskStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await asyncio.get_running_loop().create_future()

    for _ in range(5):
        await session.spawn(work, cancel_policy=CancelPolicy.ABORT_LOCAL, close_policy=ClosePolicy.CANCEL)
    monkeypatch.setattr(turns, "_PART", 2)
    at_once: list[int] = []
    wait = asyncio.wait

    def spy(waits: Any, **how: Any) -> Any:
        at_once.append(len(waits))
        return wait(waits, **how)

    monkeypatch.setattr(asyncio, "wait", spy)

    if how == "cancel_all":
        ended = [report.record.state for report in await session.cancel_all()]
    else:
        ended = [record.state for record in (await session.close()).cancelled]

    assert ended == [TaskState.CANCELLED] * 5
    assert len(at_once) >= 3
    assert max(at_once) <= 2
