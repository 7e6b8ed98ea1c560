"""The main path of managed tasks: spawning, looking, waiting, and how each outcome is told."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lash_store import (
    IdempotencyConflict,
    Recovery,
    Scope,
    SessionTasks,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskFilter,
    TaskKind,
    TaskMode,
    TaskState,
    TaskStore,
)
from tests.runtime.support import event_types, hold, rows, states


class Page(BaseModel):
    """A structured argument."""

    url: str
    depth: int = 1


def register(store: TaskStore) -> dict[str, Any]:
    """Register the functions these tests spawn, by name."""

    @store.task(recovery=Recovery.RERUN)
    async def double(task: TaskContext, number: int) -> int:
        return number * 2

    @store.task(recovery=Recovery.RERUN)
    async def fail(task: TaskContext, message: str) -> None:
        raise ValueError(message)

    @store.task(recovery=Recovery.RERUN)
    async def fetch(task: TaskContext, page: Page, *, day: date | None = None) -> dict[str, Any]:
        return {"url": page.url, "next": page.depth + 1, "weekday": day.weekday() if day else None}

    @store.task(recovery=Recovery.RERUN)
    async def wait(task: TaskContext) -> str:
        await task.cancelled()
        return "asked"

    return {"double": double, "fail": fail, "fetch": fetch, "wait": wait}


# --- spawning -------------------------------------------------------------------------------------------------------


async def test_a_spawned_task_is_in_the_file_when_spawn_returns(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    task = await session.spawn(register(store)["wait"], id="w", kind=TaskKind.OBSERVER)

    [row] = rows(path, "SELECT scope, id, kind, mode, recovery, function FROM tasks")
    assert row == {
        "scope": "desktop:s1",
        "id": "w",
        "kind": "observer",
        "mode": "managed",
        "recovery": "rerun",
        "function": "wait",
    }
    [handle] = rows(path, "SELECT handle_id, role FROM handles")
    assert handle == {"handle_id": task.handle_id, "role": "owner"}


async def test_awaiting_a_handle_gives_the_result(store: TaskStore, session: SessionTasks) -> None:
    assert await (await session.spawn(register(store)["double"], 21)) == 42


async def test_a_task_goes_from_pending_through_running_to_its_end(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    task = await session.spawn(register(store)["double"], 1)
    await task

    assert event_types(path, task.task_seq) == ["registered", "started", "completed"]
    record = await task.record()
    assert (record.state, record.attempt, record.attempts_spent) == (TaskState.COMPLETED, 1, 0)
    assert record.created_at <= record.started_at <= record.completed_at  # type: ignore[operator]
    assert record.created_at.utcoffset() == timedelta(0)


async def test_arguments_are_validated_into_their_annotations(store: TaskStore, session: SessionTasks) -> None:
    task = await session.spawn(register(store)["fetch"], {"url": "a", "depth": "3"}, day="2026-01-01")

    assert await task == {"url": "a", "next": 4, "weekday": 3}
    assert (await task.record()).arguments == {"page": {"url": "a", "depth": 3}, "day": "2026-01-01"}


async def test_a_generated_id_is_the_function_and_twelve_base32_characters(
    store: TaskStore, session: SessionTasks
) -> None:
    function = register(store)["double"]
    first, second = await session.spawn(function, 1), await session.spawn(function, 1)

    assert re.fullmatch(r"double-[a-z2-7]{12}", first.id)
    assert first.id != second.id


async def test_handle_ids_begin_with_h_and_have_26_characters_more(store: TaskStore, session: SessionTasks) -> None:
    task = await session.spawn(register(store)["double"], 1)

    assert re.fullmatch(r"h-[0-9a-z]{26}", task.handle_id)


async def test_a_bare_coroutine_is_a_task_bound_to_its_owner(session: SessionTasks) -> None:
    async def work() -> list[int]:
        return [1, 2]

    task = await session.spawn(work())

    assert await task == [1, 2]
    record = await task.record()
    assert (record.recovery, record.function, record.label) == (Recovery.OWNER_BOUND, None, "work")
    assert record.id.startswith("work-")


async def test_a_function_registered_under_another_name_is_stored_by_it(
    store: TaskStore, session: SessionTasks
) -> None:
    @store.task(recovery="owner_bound", name="public-name")
    async def private(task: TaskContext) -> str:
        return task.record.function or ""

    assert await (await session.spawn(private)) == "public-name"


async def test_many_tasks_spawned_at_once_all_complete(store: TaskStore, session: SessionTasks) -> None:
    double = register(store)["double"]
    tasks = await asyncio.gather(*(session.spawn(double, number) for number in range(200)))

    assert await asyncio.gather(*tasks) == [2 * number for number in range(200)]


async def test_a_body_may_spawn_in_its_own_session(store: TaskStore, session: SessionTasks) -> None:
    double = register(store)["double"]

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        own = await store.session(task.scope.session_id)
        return await (await own.spawn(double, 4))

    assert await (await session.spawn(parent)) == 8


# --- outcomes -------------------------------------------------------------------------------------------------------


async def test_a_result_is_the_stored_json_here_and_after_reopening(new: Callable[..., TaskStore]) -> None:
    async def work() -> Any:
        return {
            "page": Page(url="u"),
            "day": date(2026, 1, 2),
            "pair": (1, 2.5),
            "text": "ä\u2028\U0001f600",
            "none": None,
        }

    stored = {
        "page": {"url": "u", "depth": 1},
        "day": "2026-01-02",
        "pair": [1, 2.5],
        "text": "ä\u2028\U0001f600",
        "none": None,
    }
    store = new()
    async with store:
        session = await store.session("s1")
        task = await session.spawn(work(), id="t")
        assert await task == stored
        assert (await task.record()).result == stored
    async with store:
        again = await store.handle("desktop:s1", "t")
        assert await again == stored


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, 2**63, -1e300, "\x00"])
async def test_an_empty_looking_or_odd_result_comes_back_as_it_was(session: SessionTasks, value: Any) -> None:
    async def work() -> Any:
        return value

    task = await session.spawn(work())

    assert await task == value
    assert (await task.record()).state is TaskState.COMPLETED


async def test_a_failure_has_type_message_and_traceback(store: TaskStore, session: SessionTasks) -> None:
    task = await session.spawn(register(store)["fail"], "no such page", id="bad")

    with pytest.raises(TaskFailed, match=r"'bad' failed: ValueError: no such page") as caught:
        await task
    failure = caught.value.failure
    assert (failure.type, failure.message, caught.value.task_id) == ("ValueError", "no such page", "bad")
    assert failure.traceback is not None
    assert "raise ValueError(message)" in failure.traceback
    record = await task.record()
    assert record.failure == failure
    assert record.result is None


async def test_a_huge_failure_is_stored_bounded(session: SessionTasks) -> None:
    async def work() -> None:
        raise RuntimeError("x" * 5_000_000)

    record = await (await session.spawn(work())).wait()

    assert record.failure is not None
    assert len(record.failure.message) <= 10_000
    assert len(record.failure.traceback or "") <= 20_000


async def test_an_exception_that_cannot_be_printed_is_a_failure(session: SessionTasks) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise OSError("no")

    async def work() -> None:
        raise Unprintable("\ud800")

    record = await (await session.spawn(work())).wait()

    assert (record.state, record.failure and record.failure.type) == (TaskState.FAILED, "Unprintable")


async def test_an_exception_with_lone_surrogates_is_a_failure(session: SessionTasks) -> None:
    async def work() -> None:
        raise ValueError("\ud800 \x00")

    assert (await (await session.spawn(work())).wait()).state is TaskState.FAILED


async def test_a_cancelled_task_raises_its_reason(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await asyncio.Event().wait()

    task = await session.spawn(work, cancel_policy="abort_local", id="c")
    await task.cancel("not wanted")

    with pytest.raises(TaskCancelled, match=r"'c' was cancelled: not wanted") as caught:
        await task
    assert (caught.value.reason, caught.value.task_id) == ("not wanted", "c")


async def test_an_abandoned_task_raises_its_evidence(new: Callable[..., TaskStore], started: asyncio.Event) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.spawn(hold(started, asyncio.Event()), id="gone")
        await started.wait()
    async with new() as store:
        with pytest.raises(TaskAbandoned, match="'gone' was abandoned") as caught:
            await (await store.handle("desktop:s1", "gone"))
    assert caught.value.evidence.owner_id == 1
    assert caught.value.evidence.pid is not None


@pytest.mark.parametrize("outcome", ["fail", "cancel"])
async def test_wait_returns_the_row_and_never_raises_the_outcome(
    store: TaskStore, session: SessionTasks, outcome: str
) -> None:
    functions = register(store)
    if outcome == "fail":
        task = await session.spawn(functions["fail"], "x")
    else:

        @store.task(recovery=Recovery.RERUN)
        async def forever(_: TaskContext) -> None:
            await asyncio.Event().wait()

        task = await session.spawn(forever, cancel_policy="abort_local")
        await task.cancel()

    record = await task.wait()

    assert record.state == {"fail": TaskState.FAILED, "cancel": TaskState.CANCELLED}[outcome]


# --- waiting --------------------------------------------------------------------------------------------------------


async def test_result_raises_the_builtin_timeout_error_and_the_task_goes_on(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    task = await session.spawn(hold(started, release))

    with pytest.raises(TimeoutError):
        await task.result(timeout=0.01)
    await started.wait()
    assert (await task.record()).state is TaskState.RUNNING
    release.set()
    assert await task is None


async def test_wait_returns_the_live_row_at_its_timeout(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    task = await session.spawn(hold(started, release))
    await started.wait()

    record = await task.wait(timeout=0.01)

    assert record.state is TaskState.RUNNING
    release.set()
    await task


async def test_a_timeout_of_zero_still_sees_a_finished_task(store: TaskStore, session: SessionTasks) -> None:
    task = await session.spawn(register(store)["double"], 2)
    await task

    assert (await task.wait(timeout=0)).state is TaskState.COMPLETED


async def test_cancelling_a_waiter_never_cancels_the_task(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    task = await session.spawn(hold(started, release))
    waiter = asyncio.create_task(task.wait())
    await started.wait()

    waiter.cancel()
    await asyncio.wait({waiter})

    assert (await task.record()).state is TaskState.RUNNING
    release.set()
    assert (await task.wait()).state is TaskState.COMPLETED


async def test_every_waiter_is_woken(session: SessionTasks, started: asyncio.Event, release: asyncio.Event) -> None:
    task = await session.spawn(hold(started, release))
    waiters = [asyncio.create_task(task.wait()) for _ in range(50)]
    await started.wait()

    release.set()

    assert {record.state for record in await asyncio.gather(*waiters)} == {TaskState.COMPLETED}


async def test_a_result_is_read_back_fresh_for_each_awaiter(session: SessionTasks) -> None:
    async def work() -> list[int]:
        return [1]

    task = await session.spawn(work())
    first: Any = await task
    first.append(2)

    assert await task == [1]


# --- ids and incarnations -------------------------------------------------------------------------------------------


async def test_an_id_used_again_makes_a_new_incarnation_and_history_keeps_both(
    store: TaskStore, session: SessionTasks
) -> None:
    double = register(store)["double"]
    first = await session.spawn(double, 1, id="x")
    await first
    second = await session.spawn(double, 2, id="x")

    assert await second == 4
    assert second.task_seq > first.task_seq
    assert [record.result for record in await session.list(include_terminal=True)] == [2, 4]
    assert (await session.get("x")).task_seq == second.task_seq


async def test_an_old_handle_stays_on_its_own_incarnation(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    first = await session.spawn(register(store)["double"], 1, id="x")
    await first
    second = await session.spawn(hold(started, release), id="x")
    await started.wait()

    assert (await first.cancel()).state is TaskState.COMPLETED
    assert await first == 2
    assert (await second.record()).state is TaskState.RUNNING
    release.set()
    await second


async def test_the_same_id_lives_in_two_sessions_at_once(store: TaskStore, session: SessionTasks) -> None:
    double = register(store)["double"]
    other = await store.session("s2")
    one, two = await session.spawn(double, 1, id="x"), await other.spawn(double, 2, id="x")

    assert (await one, await two) == (2, 4)
    assert (await store.get(Scope("desktop", "s2"), "x")).result == 4
    assert (await store.get("desktop:s1", "x")).result == 2


async def test_of_many_spawns_of_one_id_at_once_one_wins(session: SessionTasks, release: asyncio.Event) -> None:
    async def work() -> None:
        await release.wait()

    tries = await asyncio.gather(*(session.spawn(work(), id="x") for _ in range(10)), return_exceptions=True)

    assert sum(not isinstance(one, Exception) for one in tries) == 1
    assert {type(one).__name__ for one in tries} == {"TaskHandle", "TaskExists"}
    release.set()


@pytest.mark.parametrize("id", ["a'; DROP TABLE tasks; --", "%", "_", "ünï ☃", "a:b/c", "x" * 256, "a\u202eb"])
async def test_an_odd_id_is_only_text(store: TaskStore, session: SessionTasks, id: str) -> None:
    task = await session.spawn(register(store)["double"], 1, id=id)

    assert await task == 2
    assert (await session.get(id)).id == id


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def mixed(store: TaskStore, session: SessionTasks) -> list[int]:
    """Four tasks: completed, failed, live, and live of another kind; their numbers."""
    functions = register(store)
    done = await session.spawn(functions["double"], 1, id="done")
    bad = await session.spawn(functions["fail"], "x", id="bad")
    await asyncio.gather(done.wait(), bad.wait())
    live = await session.spawn(functions["wait"], id="live")
    sub = await session.spawn(functions["wait"], id="sub", kind=TaskKind.SUBAGENT)
    for task in (live, sub):
        async for event in task.events():
            if event.type == "started":
                break
    return [done.task_seq, bad.task_seq, live.task_seq, sub.task_seq]


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({}, ["live", "sub"]),
        ({"include_terminal": True}, ["done", "bad", "live", "sub"]),
        ({"kinds": [TaskKind.SUBAGENT]}, ["sub"]),
        ({"kinds": []}, []),
        ({"states": [TaskState.COMPLETED]}, ["done"]),
        ({"states": [TaskState.FAILED, TaskState.RUNNING]}, ["bad", "live", "sub"]),
        ({"states": [TaskState.PENDING]}, []),
        ({"include_terminal": True, "limit": 2}, ["done", "bad"]),
        ({"include_terminal": True, "limit": 0}, []),
    ],
)
async def test_a_session_lists_what_is_asked_for_in_order(
    session: SessionTasks, mixed: list[int], wanted: dict[str, Any], ids: list[str]
) -> None:
    assert [record.id for record in await session.list(**wanted)] == ids


async def test_naming_a_live_state_leaves_terminal_rows_out_even_if_terminal_ones_are_included(
    session: SessionTasks, mixed: list[int]
) -> None:
    found = await session.list(states=[TaskState.RUNNING], include_terminal=True)

    assert states(found) == ["running", "running"]


async def test_a_list_is_paged_by_task_seq(session: SessionTasks, mixed: list[int]) -> None:
    seen: list[int] = []
    while page := await session.list(include_terminal=True, after_seq=seen[-1] if seen else 0, limit=1):
        seen += [record.task_seq for record in page]

    assert seen == mixed


async def test_a_session_lists_only_its_own(store: TaskStore, session: SessionTasks, mixed: list[int]) -> None:
    other = await store.session("s10")

    assert await other.list(include_terminal=True) == []


async def test_hidden_tasks_are_listed_only_when_asked_for(
    store: TaskStore, session: SessionTasks, mixed: list[int]
) -> None:
    hidden = TaskFilter(scope=session.scope, include_hidden=False)

    assert len(await store.list(hidden)) == len(await session.list(include_terminal=True, include_hidden=True)) == 4
    assert {record.mode for record in await store.list()} == {TaskMode.MANAGED}


async def test_the_store_lists_and_counts_the_whole_file(
    store: TaskStore, session: SessionTasks, mixed: list[int]
) -> None:
    other = await store.session("s2")
    done = await other.spawn(register_one(store), id="there")
    await done

    assert [record.task_seq for record in await store.list()] == [*mixed, done.task_seq]
    assert await store.count() == 5
    assert await store.count(TaskFilter(scope=other.scope)) == 1
    assert await store.count(TaskFilter(include_terminal=False)) == 2
    assert await store.count(TaskFilter(runtime="desk")) == 0
    assert await store.count(TaskFilter(limit=1)) == 5
    summary = {record.scope.session_id: record.live_tasks for record in await store.sessions()}
    assert summary == {"s1": 2, "s2": 0}


def register_one(store: TaskStore) -> Any:
    """Register one function more."""

    @store.task(recovery=Recovery.RERUN, name="one")
    async def one(task: TaskContext) -> int:
        return 1

    return one


async def test_records_are_frozen_and_dump_to_json(store: TaskStore, session: SessionTasks, mixed: list[int]) -> None:
    record = await session.get("bad")

    with pytest.raises(ValueError):
        record.id = "other"  # type: ignore[misc]
    dumped = json.loads(record.model_dump_json())
    assert dumped["state"] == "failed"
    assert dumped["failure"]["type"] == "ValueError"


async def test_resuming_a_session_writes_nothing(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await store.session("s1")

    assert [row["type"] for row in rows(path, "SELECT type FROM events")] == ["session_opened"]


# --- the same work under a key ----------------------------------------------------------------------------------------


async def test_a_key_knows_its_work_however_the_arguments_are_written(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, a: int, b: dict[str, int], c: set[str]) -> None: ...

    words = [f"word {number}" for number in range(20)]
    first = await session.spawn(work, 1, {"x": 1, "y": 2}, set(words), idempotency_key="key")
    again = [
        await session.spawn(work, 1, {"y": 2, "x": 1}, set(words), idempotency_key="key"),
        await session.spawn(work, c=set(words), b={"y": 2, "x": 1}, a=1, idempotency_key="key"),
    ]

    assert [handle.task_seq for handle in again] == [first.task_seq] * 2
    for other in ((2, {"x": 1, "y": 2}, set(words)), (1, {"x": 1}, set(words)), (1, {"x": 1, "y": 2}, {"word 1"})):
        with pytest.raises(IdempotencyConflict, match="'key'"):
            await session.spawn(work, *other, idempotency_key="key")


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (1, 1.0), ([1], [True]), ({"a": 1}, {"a": 1.0})])
async def test_what_python_calls_equal_is_not_the_same_argument(
    store: TaskStore, session: SessionTasks, one: Any, other: Any
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, value: Any) -> None: ...

    await session.spawn(work, one, idempotency_key="key")

    with pytest.raises(IdempotencyConflict):
        await session.spawn(work, other, idempotency_key="key")


async def test_another_coroutine_under_a_key_is_other_work_and_is_closed(session: SessionTasks) -> None:
    async def one() -> None: ...
    async def two() -> None: ...

    first = await session.spawn(one(), idempotency_key="key")
    assert (await session.spawn(one(), idempotency_key="key")).task_seq == first.task_seq
    coroutine = two()

    with pytest.raises(IdempotencyConflict):
        await session.spawn(coroutine, idempotency_key="key")
    assert coroutine.cr_frame is None


async def test_a_body_that_ends_by_another_tasks_stale_attempt_has_failed(
    store: TaskStore, session: SessionTasks, there: SessionTasks, started: asyncio.Event
) -> None:
    contexts: list[TaskContext] = []

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def lends(task: TaskContext) -> None:
        contexts.append(task)
        started.set()
        await task.cancelled()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def borrows(task: TaskContext) -> None:
        await contexts[0].save("not mine")

    await session.spawn(lends, id="x")
    await started.wait()
    await session.abandon("x", "by hand")

    record = await (await there.spawn(borrows, id="x")).wait(20)

    assert record.state is TaskState.FAILED
    assert record.failure is not None
    assert record.failure.type == "StaleAttempt"
