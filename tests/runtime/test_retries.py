"""What becomes of an attempt that fails or takes too long, and of a task whose time is up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    Backoff,
    EventType,
    FunctionError,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskFailed,
    TaskHandle,
    TaskRecord,
    TaskState,
    TaskStore,
)
from tests.runtime.support import event_types, hold, next_event, rows
from tests.runtime.test_slots import assert_slots
from tests.runtime.test_waits import HOUR, SOON, Clock, alarms_of, clock, settled

__all__ = ["clock"]

AT_ONCE = Backoff(initial=0)
LATER = Backoff(initial=HOUR, maximum=HOUR, jitter=0)


def told(record: TaskRecord) -> tuple[str, str | None]:
    """Return how a task ended: its state, and the type of its failure."""
    return record.state, None if record.failure is None else record.failure.type


async def forever() -> None:
    """Go on for ever."""
    await asyncio.Event().wait()


@pytest.fixture
def failing(store: TaskStore) -> Any:
    """Register a function that fails in its first attempt, and is to be tried again in an hour."""

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=LATER)
    async def failing(task: TaskContext) -> int:
        if task.attempt == 1:
            raise ValueError("at first")
        return task.attempt

    return failing


async def in_backoff(store: TaskStore, task: TaskHandle) -> TaskRecord:
    """Wait until a task's first attempt has failed, and return its row."""
    await next_event(store, EventType.RETRY_SCHEDULED, task_id=task.id)
    await settled(store)
    return await task.record()


# --- which failures -------------------------------------------------------------------------------------------------


RULES: list[tuple[Any, Any, Any, int]] = [
    (KeyError, LookupError, (), 3),
    (KeyError, (OSError, KeyError), (), 3),
    (KeyError, [LookupError], KeyError, 1),
    (IndexError, LookupError, [KeyError], 3),
    (KeyError, Exception, (), 3),
    (KeyError, OSError, (), 1),
    (KeyError, (), (), 1),
    (KeyboardInterrupt, Exception, (), 1),
    (asyncio.CancelledError, Exception, (), 1),
    (TimeoutError, OSError, (), 3),
]
"""What is raised, what is worth another try and what is not, and how many attempts there are if there may be three."""


async def test_a_failure_is_retried_if_its_class_is_named_and_not_excepted(
    store: TaskStore, session: SessionTasks
) -> None:
    def register(number: int, raised: Any, retry_on: Any, no_retry_on: Any) -> Any:
        async def work(task: TaskContext) -> None:
            raise raised(f"attempt {task.attempt}")

        rule = {"retry_on": retry_on, "no_retry_on": no_retry_on, "backoff": AT_ONCE, "max_attempts": 3}
        return store.task(recovery=Recovery.RERUN, name=f"work {number}", **rule)(work)

    for number, (raised, retry_on, no_retry_on, attempts) in enumerate(RULES):
        task = await session.spawn(register(number, raised, retry_on, no_retry_on))
        record = await task.wait(timeout=SOON)

        assert (told(record), record.attempt) == (("failed", raised.__name__), attempts), RULES[number]
        assert record.attempts_spent == attempts - 1
        assert record.failure is not None
        last = None if record.last_error is None else record.last_error.message.strip("'")
        assert last == ("attempt 2" if attempts == 3 else None)
        assert attempts == 1 or "attempt 3" in record.failure.message


async def test_rules_without_sense_are_refused(store: TaskStore) -> None:
    refused: list[dict[str, Any]] = [
        {"retry_on": "ValueError"},
        {"retry_on": BaseException},
        {"retry_on": [ValueError, 1]},
        {"no_retry_on": KeyboardInterrupt},
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 2**31},
        {"backoff": 1.0},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": "1"},
    ]

    async def work(task: TaskContext) -> None: ...

    for options in refused:
        with pytest.raises(FunctionError, match="'work'"):
            store.task(recovery=Recovery.RERUN, **options)(work)


# --- between two attempts -------------------------------------------------------------------------------------------


async def test_the_row_tells_of_the_retry(store: TaskStore, session: SessionTasks, failing: Any, path: Path) -> None:
    task = await session.spawn(failing)
    record = await in_backoff(store, task)

    assert (record.state, record.attempt, record.attempts_spent, record.failure) == ("pending", 1, 1, None)
    assert record.last_error is not None
    assert (record.last_error.type, record.last_error.message) == ("ValueError", "at first")
    assert record.last_error.traceback is not None
    assert record.not_before is not None
    assert (record.not_before - datetime.now(UTC)).total_seconds() == pytest.approx(HOUR, abs=SOON)
    assert record.owner_id is not None
    [event] = rows(path, "SELECT data ->> 'ended_by' AS ended_by FROM events WHERE type = 'retry_scheduled'")
    assert event["ended_by"] == "failure"


async def test_what_is_true_of_the_old_attempt_alone_does_not_stay(store: TaskStore, session: SessionTasks) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=AT_ONCE)
    async def work(task: TaskContext) -> str:
        seen.append((task.attempt, task.stop_reason, task.record.not_before, task.checkpoint))
        await task.save(task.attempt)
        if task.attempt < 3:
            raise ValueError(f"{task.attempt}")
        return "done"

    task = await session.spawn(work)

    assert await task.result(timeout=SOON) == "done"
    assert seen == [(1, None, None, None), (2, None, None, 1), (3, None, None, 2)]
    record = await task.record()
    assert (record.not_before, record.failure, record.attempts_spent) == (None, None, 2)
    assert alarms_of(store) == 0


async def test_a_task_that_waits_for_its_retry_has_no_slot_and_its_waiters_wait_through_it(
    opened: Callable[..., Any],
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0.2, jitter=0))
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            raise ValueError("at first")
        return task.attempt

    task = await session.spawn(work)
    waiters = [asyncio.create_task(task.result()), asyncio.create_task(task.wait())]
    await in_backoff(store, task)
    await assert_slots(store, 1)

    async with asyncio.timeout(SOON):
        result, record = await asyncio.gather(*waiters)
    assert (result, record.state) == (2, "completed")
    await assert_slots(store, 1)


async def test_a_parent_waits_for_a_child_that_is_retried(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0.02))
    async def child(task: TaskContext) -> int:
        if task.attempt < 4:
            raise ValueError("not yet")
        return task.attempt

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        return await (await task.spawn(child))

    assert await (await session.spawn(parent)).result(timeout=10) == 4
    await assert_slots(store, 1)


async def test_hidden_work_is_retried_and_waited_for(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0.05), max_attempts=2)
    async def work(task: TaskContext, fails: int) -> None:
        if task.attempt <= fails:
            raise ValueError(f"{task.attempt}")

    one, two = await session.spawn_hidden("one", work, 1), await session.spawn_hidden("two", work, 2)
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.timeout(SOON):
            await session.await_hidden()

    assert [str(error).rsplit(" ", 1)[-1] for error in raised.value.exceptions] == ["2"]
    assert [told(await task.record()) for task in (one, two)] == [("completed", None), ("failed", "ValueError")]


@pytest.mark.parametrize("how", ["cancel_all", "parent"])
async def test_a_task_that_waits_for_its_retry_is_cancelled_at_once(
    store: TaskStore, session: SessionTasks, failing: Any, path: Path, how: str
) -> None:
    parent = await session.spawn(forever(), id="parent")
    task = await session.spawn(failing, parent=parent)
    await in_backoff(store, task)

    match how:
        case "cancel_all":
            await session.cancel_all("no more", timeout=SOON)
        case _:
            await parent.cancel("no more", timeout=SOON)

    record = await task.record()
    assert (record.state, record.cancel_reason, record.not_before) == ("cancelled", "no more", None)
    assert event_types(path, task.task_seq) == ["registered", "started", "retry_scheduled", "cancelled"]
    assert alarms_of(store) == 0
    await parent.cancel()


async def test_a_cancel_by_another_store_ends_the_wait_for_a_retry(
    store: TaskStore, session: SessionTasks, failing: Any, path: Path
) -> None:
    task = await session.spawn(failing, id="t")
    await in_backoff(store, task)
    waiter = asyncio.create_task(task.wait())
    async with TaskStore.connect(path, runtime="desktop") as other:
        await (await other.handle("desktop:s1", "t")).cancel()

    async with asyncio.timeout(SOON):
        assert (await waiter).state is TaskState.CANCELLED
    assert alarms_of(store) == 0


async def test_a_failure_of_a_task_that_is_to_be_cancelled_is_final(
    store: TaskStore, session: SessionTasks, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=Exception, backoff=AT_ONCE)
    async def work(task: TaskContext) -> None:
        started.set()
        await task.cancelled()
        raise ValueError("while it stopped")

    task = await session.spawn(work)
    await started.wait()
    record = await task.cancel(timeout=SOON)

    assert (told(record), record.attempt, record.attempts_spent) == (("failed", "ValueError"), 1, 0)


@pytest.mark.parametrize("pause", [0.4, HOUR])
async def test_a_retry_keeps_its_time_across_a_restart(new: Callable[..., TaskStore], path: Path, pause: float) -> None:
    store = new()
    backoff = Backoff(initial=pause, maximum=pause, jitter=0)

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=backoff)
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            raise ValueError("at first")
        return task.attempt

    async with store:
        task = await (await store.session("s1")).spawn(work, id="t")
        before = await in_backoff(store, task)
    [row] = rows(path, "SELECT state, owner_id, attempts_spent FROM tasks")
    assert tuple(row.values()) == ("pending", None, 1)

    async with store:
        task = await store.handle("desktop:s1", "t")
        after = await task.record()
        assert (after.state, after.not_before, after.owner_id) == ("pending", before.not_before, 2)
        if pause == HOUR:
            await task.cancel()
        else:
            assert await task.result(timeout=SOON) == 2
            ended = await task.record()
            assert before.not_before is not None
            assert ended.started_at is not None
            assert ended.started_at >= before.not_before - timedelta(milliseconds=2)
            assert "reattached" in event_types(path, task.task_seq)
        assert alarms_of(store) == 0


async def test_a_retry_whose_time_came_while_the_store_was_closed_is_started_at_once(
    new: Callable[..., TaskStore], clock: Clock
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=LATER)
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            raise ValueError("at first")
        return task.attempt

    async with store:
        await in_backoff(store, await (await store.session("s1")).spawn(work, id="t"))
    clock.ahead = HOUR
    async with store:
        assert await (await store.handle("desktop:s1", "t")).result(timeout=SOON) == 2


async def test_a_retry_keeps_its_time_when_its_row_is_freed_or_moved(
    store: TaskStore, session: SessionTasks, there: SessionTasks, failing: Any
) -> None:
    task = await session.spawn(failing, id="t")
    before = await in_backoff(store, task)
    await session.transfer(there, [task])
    await there.abandon("t", "by mistake")
    free = await task.record()
    await store.recover()
    after = await task.record()

    assert (free.state, free.owner_id, free.not_before) == ("pending", None, before.not_before)
    assert (after.state, after.owner_id, after.not_before) == ("pending", before.owner_id, before.not_before)
    assert (after.attempt, alarms_of(store)) == (1, 1)
    await there.cancel("t")
    assert alarms_of(store) == 0


@pytest.mark.parametrize("what", ["signal", "transfer"])
async def test_what_happens_to_a_row_while_its_start_is_asked_for_does_not_bring_its_retry_forward(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, what: str
) -> None:
    store = await opened(max_running=1)
    session, there = await store.session("s1"), await store.session("s2")
    attempts: list[int] = []

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=LATER)
    async def work(task: TaskContext) -> None:
        attempts.append(task.attempt)
        raise ValueError("never")

    first = await session.spawn(hold(started, release))
    await started.wait()
    task = await session.spawn(work, id="t")
    asked: list[asyncio.Task[Any]] = []
    release.set()
    # one a tick, so that some are asked for while the end of the first task, which frees its slot, is being committed
    while not attempts:
        if len(asked) < 300:
            places = (session, there) if len(asked) % 2 else (there, session)
            ask = task.signal("a") if what == "signal" else places[0].transfer(places[1], ["t"])
            asked.append(asyncio.create_task(ask))
        await asyncio.sleep(0)
    await asyncio.gather(first, *asked, return_exceptions=True)
    await settled(store)
    await settled(store)

    assert attempts == [1]
    assert (await task.record()).state is TaskState.PENDING


async def test_a_signal_to_work_of_an_earlier_owner_leaves_its_start_a_reattachment(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0.4, jitter=0))
    async def work(task: TaskContext) -> Any:
        if task.attempt == 1:
            raise ValueError("at first")
        return await task.signal("a")

    async with store:
        await in_backoff(store, await (await store.session("s1")).spawn(work, id="t"))
    async with store:
        task = await store.handle("desktop:s1", "t")
        await task.signal("a", 1)
        await task.result(timeout=SOON)

    assert event_types(path, task.task_seq)[3:] == ["released", "claimed", "signalled", "reattached", "completed"]


async def test_many_tasks_wait_for_their_retries_on_one_timer(
    store: TaskStore, session: SessionTasks, failing: Any
) -> None:
    tasks = await asyncio.gather(*[session.spawn(failing) for _ in range(100)])
    for task in tasks:
        await next_event(store, EventType.RETRY_SCHEDULED, task_id=task.id)

    assert alarms_of(store) == 100
    await session.cancel_all(timeout=10)
    assert alarms_of(store) == 0
    await assert_slots(store, 64)


async def test_a_retry_that_would_come_after_the_deadline_is_not_made(
    store: TaskStore, session: SessionTasks, failing: Any, path: Path
) -> None:
    task = await session.spawn(failing, deadline=HOUR / 2)
    record = await task.wait(timeout=SOON)
    await settled(store)

    assert (told(record), record.attempt) == (("failed", "ValueError"), 1)
    assert event_types(path, task.task_seq) == ["registered", "started", "failed"]
    assert alarms_of(store) == 0


async def test_work_bound_to_its_owner_is_retried_by_it_alone(new: Callable[..., TaskStore], path: Path) -> None:
    store = new()

    @store.task(recovery=Recovery.OWNER_BOUND, retry_on=ValueError, backoff=Backoff(initial=HOUR, maximum=HOUR))
    async def work(task: TaskContext) -> int:
        raise ValueError("at first")

    async with store:
        await in_backoff(store, await (await store.session("s1")).spawn(work))

    assert [row["state"] for row in rows(path, "SELECT state FROM tasks")] == ["abandoned"]


async def test_a_failure_that_a_close_brought_about_spends_no_attempt(
    new: Callable[..., TaskStore], path: Path, started: asyncio.Event
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=AT_ONCE)
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            started.set()
            try:
                await forever()
            finally:
                raise ValueError("in its clean-up")
        return task.attempt

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()
    [row] = rows(path, "SELECT state, owner_id, attempts_spent FROM tasks")
    assert tuple(row.values()) == ("pending", None, 0)
    async with store:
        assert await (await store.handle("desktop:s1", "t")).result(timeout=SOON) == 2


async def test_a_closed_store_leaves_no_timer(new: Callable[..., TaskStore], started: asyncio.Event) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=LATER)
    async def work(task: TaskContext) -> None:
        started.set()
        try:
            await forever()
        finally:
            raise ValueError("in its clean-up")

    async with store:
        await (await store.session("s1")).spawn(work, timeout=HOUR, deadline=2 * HOUR)
        await started.wait()

    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    assert [timer for timer in timers if not timer.cancelled()] == []


# --- attempts that take too long ------------------------------------------------------------------------------------


async def test_an_attempt_that_takes_too_long_is_stopped_before_its_row_says_so(
    opened: Callable[..., Any], path: Path
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            # it may still write
            await task.save("cleaned up")
            record = await session.get(task.id)
            seen.append((task.stop_reason, task.cancel_requested, record.state))
            raise

    record = await (await session.spawn(work, timeout=0.05)).wait(timeout=SOON)

    assert told(record) == ("failed", "Timeout")
    assert record.failure is not None
    assert "attempt 1 took longer than 0.05 s" in record.failure.message
    assert (record.timeout, record.cancel_requested_at) == (0.05, None)
    assert seen == [("timeout", False, "running")]
    await assert_slots(store, 1)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("returns", ("completed", None)),
        ("raises", ("failed", "Timeout")),
        ("goes on and returns", ("completed", None)),
        ("goes on and raises", ("failed", "Timeout")),
        ("waits", ("failed", "Timeout")),
    ],
)
async def test_a_body_that_is_out_of_time_ends_as_it_likes(
    opened: Callable[..., Any], release: asyncio.Event, how: str, expected: Any
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        try:
            await forever()
        except asyncio.CancelledError:
            await task.progress("out of time")
            match how:
                case "raises":
                    raise ValueError("in its clean-up") from None
                case "waits":
                    await task.sleep(HOUR)
                case "goes on and returns" | "goes on and raises":
                    await release.wait()
                    if how == "goes on and raises":
                        raise ValueError("long after") from None
        return "done"

    task = await session.spawn(work, timeout=0.02)
    await next_event(store, EventType.PROGRESS)
    if how.startswith("goes on"):
        await settled(store)
        assert (await task.record()).state is TaskState.RUNNING
    release.set()

    assert told(await task.wait(timeout=SOON)) == expected
    await assert_slots(store, 1)


async def test_an_attempt_that_took_too_long_is_retried_if_timeouts_are(
    store: TaskStore, session: SessionTasks
) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=TimeoutError, backoff=AT_ONCE, timeout=0.05)
    async def work(task: TaskContext) -> int:
        if task.attempt < 3:
            await forever()
        return task.attempt

    task = await session.spawn(work)

    assert await task.result(timeout=SOON) == 3
    record = await task.record()
    assert record.last_error is not None
    assert (record.last_error.type, record.attempts_spent) == ("Timeout", 2)


async def test_a_spawn_says_how_long_an_attempt_may_take_and_else_its_function_does(
    store: TaskStore, session: SessionTasks, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN, timeout=0.05)
    async def work(task: TaskContext) -> float | None:
        await release.wait()
        return task.record.timeout

    long, short = await session.spawn(work, timeout=HOUR), await session.spawn(work)
    bare = await session.spawn(forever(), timeout=0.05)

    assert told(await short.wait(timeout=SOON)) == told(await bare.wait(timeout=SOON)) == ("failed", "Timeout")
    release.set()
    assert await long.result(timeout=SOON) == HOUR


async def test_a_time_that_is_none_is_refused_and_a_coroutine_closed(session: SessionTasks, path: Path) -> None:
    for name, refused in (
        ("timeout", [0, -1, 0.0005, math.nan, math.inf, 1e12, True, "1"]),
        ("deadline", [-1, math.nan, math.inf, 1e12, True, "1", datetime.now()]),
    ):
        for given in refused:
            body = forever()
            with pytest.raises(ValueError, match=name):
                await session.spawn(body, **{name: given})  # type: ignore[arg-type]
            assert body.cr_frame is None
    assert rows(path, "SELECT * FROM tasks") == []


@pytest.mark.parametrize("what", ["a child", "its slot"])
async def test_an_attempt_may_be_out_of_time_while_it_waits_for(
    opened: Callable[..., Any], release: asyncio.Event, what: str
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        if what == "a child":
            await (await task.spawn(release.wait(), id="other"))
        else:
            await task.signal("go")

    task = await session.spawn(work, timeout=0.1)
    if what == "its slot":
        await session.spawn(release.wait(), id="other")
    await next_event(store, EventType.STARTED, task_id="other")
    await task.signal("go")

    assert told(await task.wait(timeout=SOON)) == ("failed", "Timeout")
    # a parent that ends so leaves its children alive
    other = await session.handle("other")
    assert (await other.record()).state is TaskState.RUNNING
    release.set()
    await other.wait(timeout=SOON)
    await assert_slots(store, 1)


async def test_a_cancel_after_the_time_was_up_is_a_cancel(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(cancel_grace=0.05)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN, retry_on=TimeoutError, backoff=AT_ONCE)
    async def work(task: TaskContext) -> None:
        try:
            await forever()
        finally:
            await hold(started, release)

    task = await session.spawn(work, timeout=0.02)
    await started.wait()
    await task.cancel("enough", timeout=0)
    release.set()

    assert (await task.wait(timeout=SOON)).state is TaskState.CANCELLED


async def test_time_that_is_up_after_a_cancel_changes_nothing(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=0.2)
    session = await store.session("s1")
    reasons: list[Any] = []

    @store.task(recovery=Recovery.RERUN, retry_on=TimeoutError, backoff=AT_ONCE)
    async def work(task: TaskContext) -> None:
        started.set()
        try:
            await forever()
        finally:
            reasons.append(task.stop_reason)

    task = await session.spawn(work, timeout=0.1, deadline=0.15)
    await started.wait()
    record = await task.cancel(timeout=SOON)

    assert (record.state, reasons) == (TaskState.CANCELLED, ["cancel"])
    assert alarms_of(store) == 0


async def test_cancels_that_race_with_timeouts_leave_every_row_and_slot_right(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=4, cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN, retry_on=TimeoutError, backoff=AT_ONCE, max_attempts=3)
    async def work(task: TaskContext) -> None:
        await task.sleep(HOUR)

    async def race(number: int) -> TaskRecord:
        task = await session.spawn(work, timeout=0.02, deadline=0.05)
        await asyncio.sleep(number % 30 / 400)
        return await task.cancel()

    async with asyncio.timeout(20):
        records = await asyncio.gather(*[race(number) for number in range(60)])

    assert {told(record) for record in records} <= {("failed", "Timeout"), ("cancelled", None)}
    assert alarms_of(store) == 0
    await assert_slots(store, 4)


# --- deadlines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["seconds", "a time"])
async def test_a_task_has_ended_by_its_deadline(store: TaskStore, session: SessionTasks, given: str) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN, retry_on=Exception, backoff=AT_ONCE)
    async def work(task: TaskContext) -> None:
        try:
            await task.sleep(HOUR)
        finally:
            seen.append(task.stop_reason)

    until = datetime.now(UTC) + timedelta(seconds=0.1)
    task = await session.spawn(work, deadline=0.1 if given == "seconds" else until)
    record = await task.wait(timeout=SOON)

    # once and for all: no attempt has more time
    assert (told(record), record.attempt, seen) == (("failed", "Timeout"), 1, ["timeout"])
    assert record.deadline is not None
    assert record.completed_at is not None
    assert abs((record.deadline - until).total_seconds()) < 0.05
    assert record.completed_at >= record.deadline
    assert record.failure is not None
    assert "deadline" in record.failure.message
    assert alarms_of(store) == 0


async def test_a_task_that_ended_in_time_leaves_no_alarm(store: TaskStore, session: SessionTasks) -> None:
    tasks = [await session.spawn(asyncio.sleep(0), deadline=HOUR, timeout=HOUR) for _ in range(10)]
    await asyncio.gather(*tasks)
    await settled(store)

    assert alarms_of(store) == 0


async def test_a_deadline_counts_in_the_queue_as_well(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    first = await session.spawn(hold(started, release))
    await started.wait()
    body = forever()

    task = await session.spawn(body, deadline=0.05)
    record = await task.wait(timeout=SOON)

    assert (told(record), record.attempt) == (("failed", "Timeout"), 0)
    assert event_types(path, task.task_seq) == ["registered", "failed"]
    assert body.cr_frame is None
    release.set()
    await first
    await assert_slots(store, 1)
    assert alarms_of(store) == 0


async def test_a_deadline_counts_over_all_attempts(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=(ValueError, TimeoutError), backoff=Backoff(initial=0.01))
    async def work(task: TaskContext) -> None:
        if task.attempt < 3:
            raise ValueError("not yet")
        await forever()

    record = await (await session.spawn(work, deadline=0.4)).wait(timeout=SOON)

    assert (told(record), record.attempt) == (("failed", "Timeout"), 3)


@pytest.mark.parametrize("how", ["running", "queued", "unknown"])
async def test_a_deadline_that_passed_while_the_store_was_closed_has_passed(
    new: Callable[..., TaskStore], clock: Clock, how: str, started: asyncio.Event
) -> None:
    store = new(max_running=1)
    attempts: list[int] = []

    async def work(task: TaskContext) -> None:
        attempts.append(task.attempt)
        await hold(started, asyncio.Event())

    store.task(recovery=Recovery.RERUN)(work)
    async with store:
        session = await store.session("s1")
        if how == "queued":
            await session.spawn(hold(started, asyncio.Event()))
            await started.wait()
        await session.spawn(work, id="t", deadline=HOUR)
        await started.wait()
    clock.ahead = HOUR
    if how == "unknown":
        store = new()
    async with store:
        record = await store.get("desktop:s1", "t")

    assert (told(record), attempts) == (("failed", "Timeout"), [] if how == "queued" else [1])


async def test_a_deadline_is_kept_across_a_restart(new: Callable[..., TaskStore], started: asyncio.Event) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    async with store:
        await (await store.session("s1")).spawn(work, id="t", deadline=0.5)
        await started.wait()
    async with store:
        record = await (await store.handle("desktop:s1", "t")).wait(timeout=SOON)

    assert (told(record), record.attempt) == (("failed", "Timeout"), 2)


async def test_a_deadline_in_the_past_lets_nothing_be_waited_for(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    for deadline in (0, datetime.now(UTC) - timedelta(days=365), datetime(1969, 1, 1, tzinfo=UTC)):
        task = await session.spawn(forever(), deadline=deadline)
        assert told(await task.wait(timeout=SOON)) == ("failed", "Timeout")
    await assert_slots(store, 1)


@pytest.mark.parametrize("deadline", [datetime.max.replace(tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)], ids=str)
async def test_a_deadline_that_the_file_cannot_hold_spoils_nothing(
    new: Callable[..., TaskStore], caplog: pytest.LogCaptureFixture, deadline: datetime
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        await task.signal("go")
        return "done"

    async with store:
        session = await store.session("s1")
        spawns = [session.spawn(work, id="before"), session.spawn(work, id="t", deadline=deadline)]
        await asyncio.gather(*spawns, session.spawn(work, id="after"), return_exceptions=True)
    async with store:
        for task_id in ("before", "after"):
            task = await store.handle("desktop:s1", task_id)
            await task.signal("go")
            assert await task.result(timeout=SOON) == "done"
        await store.list()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_row_that_was_freed_and_claimed_again_keeps_its_deadline(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    let_go = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def stubborn(task: TaskContext) -> None:
        started.set()
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    task = await session.spawn(stubborn, id="t", deadline=0.5)
    await started.wait()
    await session.abandon("t", "stuck")
    other = await session.spawn(release.wait())
    await store.recover()
    assert (await task.record()).state is TaskState.PENDING
    let_go.set()
    record = await task.wait(timeout=SOON)
    release.set()
    await other.wait()

    assert told(record) == ("failed", "Timeout")


async def test_who_awaits_a_task_that_was_out_of_time_is_told(store: TaskStore, session: SessionTasks) -> None:
    task = await session.spawn(forever(), timeout=0.02)

    with pytest.raises(TaskFailed, match="Timeout") as raised:
        await task
    assert raised.value.failure.type == "Timeout"


# --- what nobody has --------------------------------------------------------------------------------------------------


async def test_a_deadline_is_kept_for_work_whose_function_no_program_has(
    new: Callable[..., TaskStore], opened: Callable[..., Any]
) -> None:
    stranger = await opened()
    async with new() as store:

        @store.task(recovery=Recovery.RERUN)
        async def work(task: TaskContext) -> None:
            await asyncio.Event().wait()

        task = await (await store.session("s1")).spawn(work, id="t", deadline=0.3)
        seen = await stranger.handle("desktop:s1", task.id)

    record = await seen.wait(timeout=20)

    assert record.failure is not None
    assert (record.state, record.failure.type, record.owner_id) == (TaskState.FAILED, "Timeout", None)


async def test_a_deadline_is_kept_for_work_that_was_freed_here(session: SessionTasks, store: TaskStore) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await asyncio.Event().wait()

    task = await session.spawn(work, deadline=0.3)
    await session.abandon(task, "stuck")

    record = await task.wait(timeout=20)

    assert record.failure is not None
    assert (record.failure.type, record.owner_id) == ("Timeout", None)


# --- stopped by a close -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["group", "error instead", "step"])
async def test_what_a_close_does_to_a_body_is_no_failure_of_it_however_it_is_put(
    new: Callable[..., TaskStore], path: Path, started: asyncio.Event, how: str
) -> None:
    store = new()

    async def client() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError("the line was cut") from None

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> None: ...

    async def branch(task: TaskContext) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await task.spawn(leaf)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        match how:
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(branch(task))
                    group.create_task(branch(task))
            case "step":
                await task.step("s", client)
            case _:
                await client()

    async with store:
        task = await (await store.session("s1")).spawn(work)
        await started.wait()

    [row] = rows(path, "SELECT state, attempts_spent FROM tasks WHERE task_seq = ?", task.task_seq)
    assert (row["state"], row["attempts_spent"]) == ("pending", 0)


async def test_an_attempt_whose_time_was_up_when_the_store_closed_has_timed_out(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new()
    cleaning, clean = asyncio.Event(), asyncio.Event()

    @store.task(recovery=Recovery.RERUN, timeout=0.01)
    async def work(task: TaskContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await clean.wait()

    async with store:
        await (await store.session("s1")).spawn(work)
        await cleaning.wait()

    [row] = rows(path, "SELECT state, json_extract(failure, '$.type') AS failure FROM tasks")
    assert tuple(row.values()) == ("failed", "Timeout")


# --- too late from the start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_slot", [True, False])
async def test_work_whose_deadline_has_passed_when_it_is_spawned_is_not_begun(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, has_slot: bool
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    begun: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        begun.append(task.attempt)

    if not has_slot:
        await session.spawn(hold(started, release))
        await started.wait()
    task = await session.spawn(work, deadline=0, notify_on_end=True)

    record = await task.wait(timeout=20)
    release.set()

    assert record.failure is not None
    assert (record.state, record.failure.type, record.attempt, begun) == (TaskState.FAILED, "Timeout", 0, [])
    assert [note.task_seq for note in await session.notes()] == [task.task_seq]
