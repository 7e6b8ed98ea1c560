"""Hidden work: what a session waits for before it persists itself, to a fixed point, and whom its failures reach."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    InvalidArguments,
    InvalidId,
    Recovery,
    SessionClosed,
    SessionTasks,
    StoreClosed,
    StoreReadOnly,
    TaskAbandoned,
    TaskContext,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskMode,
    TaskState,
    TaskStore,
    UnknownFunction,
)
from tests.runtime.support import RUNTIME, cancel_at, event_count, hold, rows


async def noop() -> None:
    """A body that ends at once."""


async def fail(message: str, when: asyncio.Event | None = None) -> None:
    """A body that fails, at once or when it is told to."""
    if when is not None:
        await when.wait()
    raise RuntimeError(message)


async def failures_of(waiting: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> list[str]:
    """Wait for hidden work and return what it is said to have come to, in order; empty if nothing was said."""
    errors: tuple[Exception, ...] = ()
    async with asyncio.timeout(20):
        try:
            await waiting
        except ExceptionGroup as group:
            errors = group.exceptions
    return [_told(error) for error in errors]


def _told(error: Exception) -> str:
    if isinstance(error, TaskFailed):
        return error.failure.message
    assert isinstance(error, TaskAbandoned)
    return f"abandoned: {error.evidence.reason}"


async def looked(session: SessionTasks) -> None:
    """Return once whatever was asked of this session's store before is committed: its writer takes one after the other."""
    await asyncio.sleep(0)
    await session.unregister("nobody")


async def waits(session: SessionTasks) -> asyncio.Task[Any]:
    """Return an `await_hidden` that has looked at the session and found it busy."""
    waiting = asyncio.create_task(session.await_hidden())
    await looked(session)
    assert not waiting.done()
    return waiting


def flag(path: Path, session_id: str = "s1") -> int:
    """Read the sync flag of a session."""
    return int(rows(path, "SELECT sync_needed FROM sessions WHERE session_id = ?", session_id)[0]["sync_needed"])


def read_at(path: Path, task: TaskHandle) -> str | None:
    """Read when an outcome was handed out to the session of a task."""
    found: str | None = rows(path, "SELECT read_at FROM handles WHERE handle_id = ?", task.handle_id)[0]["read_at"]
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep everybody from committing."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@contextmanager
def forbidden(path: Path, when: str) -> Iterator[None]:
    """Have the file refuse a change, as a full disk would, in the middle of whatever makes it."""
    for statement in (f"CREATE TRIGGER forbidden BEFORE {when} BEGIN SELECT RAISE(ABORT, 'forbidden'); END", None):
        connection = sqlite3.connect(path, isolation_level=None, timeout=10)
        try:
            connection.execute(statement or "DROP TRIGGER forbidden")
        finally:
            connection.close()
        if statement is not None:
            yield


# --- being born -----------------------------------------------------------------------------------------------------


async def test_hidden_work_is_listed_only_when_asked_for(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    task = await session.spawn_hidden("memory", hold(started, release))
    shown = TaskFilter(scope=session.scope, include_hidden=False)

    assert (await session.list(), await session.list(include_terminal=True), await store.list(shown)) == ([], [], [])
    [record] = await session.list(include_hidden=True)
    assert (record.task_seq, record.mode, record.label) == (task.task_seq, TaskMode.HIDDEN, "memory")
    assert record.id.startswith("memory-")
    assert (await session.get(record.id)).task_seq == task.task_seq
    assert await store.count(shown) == 0
    release.set()


async def test_hidden_work_takes_a_registered_function_with_its_arguments(
    store: TaskStore, session: SessionTasks
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def load(task: TaskContext, path: str, *, depth: int = 0) -> list[Any]:
        return [path, depth]

    task = await session.spawn_hidden("memory", load, "/src", depth=3)

    assert await task == ["/src", 3]
    assert ((await task.record()).label, (await task.record()).function) == ("memory", "load")


async def test_spawned_in_a_body_hidden_work_is_that_bodys_child_and_ends_with_its_cancel(
    store: TaskStore, session: SessionTasks, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await session.spawn_hidden("below", hold(started, asyncio.Event()))
        await session.await_hidden()

    parent = await session.spawn(work, cancel_policy="abort_local")
    await started.wait()
    [below] = await session.list(include_hidden=True, after_seq=parent.task_seq)
    assert below.parent_seq == parent.task_seq

    await parent.cancel("enough")

    record = await (await session.handle(below.id)).wait(timeout=20)
    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "enough")


async def test_outside_a_body_hidden_work_has_no_parent(session: SessionTasks) -> None:
    task = await session.spawn_hidden("memory", noop())

    assert (await task.record()).parent_seq is None


@pytest.mark.parametrize("bad", ["", "a\x00b", "line\nbreak", "\ud800", "x" * 257, "\x1b[31m", 5, None])
async def test_a_label_that_cannot_be_stored_is_refused_and_the_coroutine_closed(
    session: SessionTasks, path: Path, bad: Any
) -> None:
    before, work = event_count(path), noop()

    with pytest.raises(InvalidId):
        await session.spawn_hidden(bad, work)

    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work
    assert (event_count(path), flag(path)) == (before, 0)


@pytest.mark.parametrize("label", ["x", "x" * 256, "h-1", "h-h-1", "h-", "-", "ein Wort: 日本 🜁", "%s'\"\\"])
async def test_hidden_work_is_found_by_the_id_that_its_label_gives_it(session: SessionTasks, label: str) -> None:
    task = await session.spawn_hidden(label, noop())

    assert (await session.get(task.id)).task_seq == task.task_seq
    assert (await session.get(task.id)).label == label


async def test_hidden_work_that_cannot_be_started_is_refused_and_flags_nothing(
    session: SessionTasks, path: Path
) -> None:
    before = event_count(path)

    async def unregistered(task: TaskContext) -> None: ...

    with pytest.raises(UnknownFunction):
        await session.spawn_hidden("memory", unregistered)
    work = noop()
    with pytest.raises(InvalidArguments):
        await session.spawn_hidden("memory", work, 1)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work
    assert (event_count(path), flag(path)) == (before, 0)


async def test_hidden_work_is_refused_in_a_closed_session_and_its_coroutine_closed(
    session: SessionTasks, path: Path
) -> None:
    await session.close()
    before, work = event_count(path), noop()

    with pytest.raises(SessionClosed, match="reopen"):
        await session.spawn_hidden("memory", work)

    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work
    assert (event_count(path), flag(path)) == (before, 0)


@pytest.mark.parametrize("how", ["closed", "read-only", "connected"])
async def test_hidden_work_is_refused_by_a_store_that_runs_nothing_and_its_coroutine_closed(
    new: Callable[..., TaskStore], path: Path, how: str
) -> None:
    async with new() as store:
        session = await store.session("s1")
    other = TaskStore.open_readonly(path, runtime=RUNTIME) if how == "read-only" else None
    other = TaskStore.connect(path, runtime=RUNTIME) if how == "connected" else other
    before, work = event_count(path), noop()

    if other is None:
        with pytest.raises(StoreClosed):
            await session.spawn_hidden("memory", work)
    else:
        async with other:
            with pytest.raises(StoreReadOnly):
                await (await other.session("s1")).spawn_hidden("memory", work)

    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work
    assert (event_count(path), flag(path)) == (before, 0)


# --- the fixed point ------------------------------------------------------------------------------------------------


async def test_nothing_to_wait_for_is_no_wait_and_writes_nothing(session: SessionTasks, path: Path) -> None:
    before = event_count(path)

    await session.await_hidden()

    assert await session.await_background_work() is False
    assert event_count(path) == before


async def test_who_awaits_hidden_work_does_not_wait_for_the_rest(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    other = await store.session("s2")
    await session.spawn(hold(started, release))
    await other.spawn_hidden("elsewhere", hold(asyncio.Event(), release))
    await session.spawn_hidden("memory", noop())
    await started.wait()

    assert await failures_of(session.await_hidden()) == []

    assert (len(await session.list()), len(await other.list(include_hidden=True))) == (1, 1)
    release.set()


async def test_hidden_work_that_hidden_work_spawns_is_waited_for_too(store: TaskStore, session: SessionTasks) -> None:
    begun, gates = ([asyncio.Event() for _ in range(4)] for _ in range(2))
    ended: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def step(task: TaskContext, number: int) -> None:
        begun[number].set()
        await gates[number].wait()
        ended.append(number)
        if number + 1 < len(gates):
            await session.spawn_hidden("step", step, number + 1)

    await session.spawn_hidden("step", step, 0)
    waiting = await waits(session)
    async with asyncio.timeout(20):
        for number, gate in enumerate(gates):
            await begun[number].wait()
            assert (waiting.done(), ended) == (False, list(range(number)))
            gate.set()

    assert await failures_of(waiting) == []
    assert ended == [0, 1, 2, 3]
    assert await session.list(include_hidden=True) == []


async def test_hidden_work_that_comes_from_elsewhere_while_somebody_waits_is_waited_for_too(
    session: SessionTasks,
) -> None:
    first, second = asyncio.Event(), asyncio.Event()
    one = await session.spawn_hidden("memory", hold(asyncio.Event(), first))
    waiting = await waits(session)
    two = await session.spawn_hidden("memory", fail("late", second))

    first.set()
    await one.wait(timeout=20)
    await looked(session)
    assert not waiting.done()
    second.set()

    assert await failures_of(waiting) == ["late"]
    assert (await two.record()).state is TaskState.FAILED


async def test_a_hidden_spawn_that_is_not_committed_yet_is_seen(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    with locked(path):
        spawning = asyncio.create_task(session.spawn_hidden("memory", hold(started, release)))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(session.await_hidden())
        await asyncio.sleep(0)
        assert rows(path, "SELECT * FROM tasks") == []
    await started.wait()
    await looked(session)

    assert not waiting.done()
    release.set()
    assert await failures_of(waiting) == []
    assert (await (await spawning).record()).state is TaskState.COMPLETED


async def test_a_second_who_waits_does_not_return_early(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    await session.spawn_hidden("memory", hold(started, release))
    callers = [await waits(session) for _ in range(3)]
    callers[0].cancel()
    await asyncio.wait({callers[0]})
    callers.append(await waits(session))

    assert [caller.done() for caller in callers] == [True, False, False, False]
    release.set()
    for caller in callers[1:]:
        assert await failures_of(caller) == []


async def test_hidden_work_that_was_released_runs_again_and_is_waited_for(
    new: Callable[..., TaskStore], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def load(task: TaskContext) -> int:
        await hold(started, release)
        return task.attempt

    async with store:
        task = await (await store.session("s1")).spawn_hidden("memory", load)
        await started.wait()
    async with store:
        session = await store.session("s1")
        waiting = await waits(session)
        release.set()

        assert await failures_of(waiting) == []
        assert await session.sync_needed()
        assert (await session.get(task.id)).result == 2


# --- failures -------------------------------------------------------------------------------------------------------


async def test_every_failure_is_reported_at_once_and_no_sibling_is_left_behind(session: SessionTasks) -> None:
    gates = [asyncio.Event() for _ in range(2)]
    early = await session.spawn_hidden("early", fail("early"))
    good = await session.spawn_hidden("good", hold(asyncio.Event(), gates[0]))
    late = await session.spawn_hidden("late", fail("late", gates[1]))
    await early.wait(timeout=20)
    waiting = await waits(session)

    gates[0].set()
    await good.wait(timeout=20)
    await looked(session)
    assert not waiting.done()
    gates[1].set()

    with pytest.raises(ExceptionGroup, match="2 hidden tasks of session 'desktop:s1' failed") as caught:
        await waiting
    first, second = caught.value.exceptions
    assert isinstance(first, TaskFailed)
    assert isinstance(second, TaskFailed)
    assert [first.task_id, second.task_id] == [early.id, late.id]
    assert (second.failure.type, second.failure.message) == ("RuntimeError", "late")
    assert await session.list(include_hidden=True) == []


async def test_all_who_wait_are_told_the_same_failures(session: SessionTasks, started: asyncio.Event) -> None:
    when = asyncio.Event()
    for number in range(3):
        await session.spawn_hidden("memory", fail(f"no {number}", when))
    lost = await session.spawn_hidden("lost", hold(started, asyncio.Event()))
    callers = [await waits(session) for _ in range(5)]
    await session.abandon(lost.id, "nobody knows")
    assert not any(caller.done() for caller in callers)

    when.set()

    expected = ["no 0", "no 1", "no 2", "abandoned: nobody knows"]
    assert [await failures_of(caller) for caller in callers] == [expected] * 5


async def test_who_comes_later_is_not_told_again(
    store: TaskStore, session: SessionTasks, new: Callable[..., TaskStore]
) -> None:
    await session.spawn_hidden("memory", fail("no"))

    assert await failures_of(session.await_hidden()) == ["no"]

    assert await failures_of(session.await_hidden()) == []
    async with new() as other:
        assert await failures_of((await other.session("s1")).await_hidden()) == []


async def test_failures_of_another_session_are_its_own(store: TaskStore, session: SessionTasks) -> None:
    other = await store.session("s2")
    task = await other.spawn_hidden("memory", fail("no"))
    await task.wait(timeout=20)

    assert await failures_of(session.await_hidden()) == []
    assert await failures_of(other.await_hidden()) == ["no"]


async def test_a_failure_of_listed_work_is_not_told(session: SessionTasks) -> None:
    task = await session.spawn(fail("no"))
    await task.wait(timeout=20)

    assert await failures_of(session.await_hidden()) == []


async def test_a_cancelled_one_is_no_failure(session: SessionTasks, started: asyncio.Event) -> None:
    task = await session.spawn_hidden("memory", hold(started, asyncio.Event()))
    waiting = await waits(session)

    await task.cancel("not needed")

    assert await failures_of(waiting) == []


async def test_a_failure_is_owed_until_the_last_who_waited_was_told(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    when, told, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def nosy(task: TaskContext) -> list[str]:
        heard = await failures_of(session.await_hidden())
        told.set()
        await go_on.wait()
        return heard

    failing = await session.spawn_hidden("failing", fail("no", when))
    body = await session.spawn_hidden("nosy", nosy)
    outside = await waits(session)
    when.set()
    async with asyncio.timeout(20):
        await told.wait()
    await looked(session)

    # the body was told; who waits outside still waits for the body
    assert read_at(path, failing) is None
    late = await waits(session)
    go_on.set()
    assert await body == ["no"]
    assert await failures_of(outside) == ["no"]
    assert await failures_of(late) == []
    await looked(session)
    assert read_at(path, failing) is not None
    assert await failures_of(session.await_hidden()) == []


async def test_failures_nobody_was_told_of_are_there_after_a_restart(new: Callable[..., TaskStore]) -> None:
    async with new() as store:
        session = await store.session("s1")
        failing = await session.spawn_hidden("memory", fail("no"))
        await failing.wait(timeout=20)

    async with new() as store:
        session = await store.session("s1")
        assert await failures_of(session.await_hidden()) == ["no"]
        assert await failures_of(session.await_hidden()) == []


async def test_a_coroutine_that_a_closed_store_left_is_told_as_abandoned_once(
    new: Callable[..., TaskStore], started: asyncio.Event
) -> None:
    async with new() as store:
        task = await (await store.session("s1")).spawn_hidden("memory", hold(started, asyncio.Event()))
        await started.wait()

    async with new() as store:
        session = await store.session("s1")
        with pytest.raises(ExceptionGroup) as caught:
            await session.await_hidden()
        [error] = caught.value.exceptions
        assert isinstance(error, TaskAbandoned)
        assert (error.task_id, error.evidence.owner_id, error.evidence.end) == (task.id, 1, "closed")
        assert await failures_of(session.await_hidden()) == []


async def test_a_failure_that_was_read_through_its_handle_was_told(session: SessionTasks) -> None:
    task = await session.spawn_hidden("memory", fail("no"))
    with pytest.raises(TaskFailed):
        await task

    assert await failures_of(session.await_hidden()) == []


async def test_a_failure_that_somebody_reads_through_its_handle_meanwhile_is_told_to_who_waits(
    session: SessionTasks, release: asyncio.Event
) -> None:
    when = asyncio.Event()
    task = await session.spawn_hidden("memory", fail("no", when))
    await session.spawn_hidden("slow", hold(asyncio.Event(), release))
    waiting = await waits(session)

    when.set()
    with pytest.raises(TaskFailed):
        await task
    release.set()

    assert await failures_of(waiting) == ["no"]


# --- waiting in a body ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["await_hidden", "await_background_work"])
async def test_hidden_bodies_wait_for_hidden_bodies_at_any_depth_in_one_slot(
    opened: Callable[..., Any], wait: str
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    ended: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def dig(task: TaskContext, depth: int) -> None:
        if depth:
            await session.spawn_hidden("dig", dig, depth - 1)
            await getattr(session, wait)()
        ended.append(depth)

    await session.spawn_hidden("dig", dig, 5)

    assert await failures_of(session.await_hidden()) == []
    assert ended == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("slots", [1, 2, 64])
async def test_a_tree_of_hidden_bodies_that_all_wait_comes_to_its_end(opened: Callable[..., Any], slots: int) -> None:
    store = await opened(max_running=slots)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def grow(task: TaskContext, depth: int) -> None:
        for _ in range(2 if depth else 0):
            await session.spawn_hidden("grow", grow, depth - 1)
        await session.await_hidden()

    await session.spawn_hidden("grow", grow, 3)

    assert await failures_of(session.await_hidden()) == []
    found = await session.list(include_hidden=True, include_terminal=True)
    assert [record.state for record in found] == [TaskState.COMPLETED] * 15


async def test_a_body_waits_for_what_is_not_above_it(
    store: TaskStore, session: SessionTasks, release: asyncio.Event
) -> None:
    """Above it are its parents, which may wait for it; a sibling that does its work is not."""
    here = asyncio.Event()
    heard: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def above(task: TaskContext) -> None:
        await session.spawn_hidden("sibling", fail("sibling", release))
        await (await session.spawn_hidden("below", below))

    @store.task(recovery=Recovery.RERUN)
    async def below(task: TaskContext) -> None:
        waiting = asyncio.create_task(session.await_hidden())
        await looked(session)
        assert not waiting.done()
        here.set()
        heard.extend(await failures_of(waiting))

    task = await session.spawn_hidden("above", above)
    async with asyncio.timeout(20):
        await here.wait()
        release.set()
        await task

    assert heard == ["sibling"]


@pytest.mark.parametrize("slots", [1, 64])
async def test_two_hidden_bodies_that_both_wait_do_not_wait_for_each_other(
    opened: Callable[..., Any], slots: int
) -> None:
    store = await opened(max_running=slots)
    session = await store.session("s1")
    here: list[str] = []
    both = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def sibling(task: TaskContext) -> None:
        here.append(task.id)
        if len(here) == 2 or slots == 1:
            both.set()
        await both.wait()
        await session.await_hidden()

    for _ in range(2):
        await session.spawn_hidden("sibling", sibling)

    assert await failures_of(session.await_hidden()) == []
    assert len(here) == 2


async def test_two_bodies_that_wait_do_not_wait_for_who_awaits_them(store: TaskStore, session: SessionTasks) -> None:
    """Each one's parent ends only after it: to wait for the other's parent is to wait for the other."""
    here: list[str] = []
    both = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def above(task: TaskContext) -> None:
        await (await session.spawn_hidden("below", below))

    @store.task(recovery=Recovery.RERUN)
    async def below(task: TaskContext) -> None:
        here.append(task.id)
        if len(here) == 2:
            both.set()
        await both.wait()
        await session.await_hidden()

    for _ in range(2):
        await session.spawn_hidden("above", above)

    assert await failures_of(session.await_hidden()) == []
    assert len(here) == 2


async def test_a_listed_body_waits_for_hidden_work_without_its_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[str]:
        await session.spawn_hidden("memory", fail("no"))
        return await failures_of(session.await_hidden())

    assert await (await session.spawn(work)).result(timeout=20) == ["no"]


# --- giving up ------------------------------------------------------------------------------------------------------


async def test_who_is_cancelled_while_waiting_leaves_the_work_and_its_failure_to_others(
    session: SessionTasks, path: Path
) -> None:
    when = asyncio.Event()
    task = await session.spawn_hidden("memory", fail("no", when))
    impatient, patient = await waits(session), await waits(session)

    impatient.cancel()
    await asyncio.wait({impatient})

    assert impatient.cancelled()
    assert (await task.record()).state is TaskState.RUNNING
    when.set()
    assert await failures_of(patient) == ["no"]
    await looked(session)
    assert read_at(path, task) is not None


async def test_a_failure_is_kept_for_the_next_if_the_only_one_who_waited_was_cancelled(session: SessionTasks) -> None:
    when = asyncio.Event()
    task = await session.spawn_hidden("memory", fail("no", when))
    waiting = await waits(session)
    waiting.cancel()
    await asyncio.wait({waiting})
    when.set()
    await task.wait(timeout=20)

    assert await failures_of(session.await_hidden()) == ["no"]


@pytest.mark.parametrize("late", [False, True])
async def test_a_wait_cancelled_anywhere_loses_no_failure(session: SessionTasks, late: bool) -> None:
    at = 0
    while True:
        at += 1
        failing = await session.spawn_hidden("memory", fail(f"no {at}"))
        if at % 2:
            await failing.wait(timeout=20)

        stepped = await cancel_at(session.await_hidden(), at, late=late)

        if stepped.was_cancelled:
            assert await failures_of(session.await_hidden()) == [f"no {at}"]
        else:
            assert isinstance(stepped.error, ExceptionGroup)
            assert await failures_of(session.await_hidden()) == []
            if not stepped.reached:
                break
    assert at > 1


async def test_a_hidden_body_that_is_cancelled_while_it_waits_holds_nobody_up(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def work() -> None:
        started.set()
        await session.await_hidden()

    slow = await session.spawn_hidden("slow", hold(asyncio.Event(), release))
    task = await session.spawn_hidden("work", work())
    await started.wait()
    waiting = await waits(session)

    assert (await task.cancel(timeout=20)).state is TaskState.CANCELLED

    await looked(session)
    assert not waiting.done()
    release.set()
    assert await failures_of(waiting) == []
    assert (await slow.record()).state is TaskState.COMPLETED


@pytest.mark.parametrize("wait", ["await_hidden", "await_background_work"])
async def test_who_waits_while_the_store_closes_is_told_so(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path, wait: str
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def load(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    async with store:
        session = await store.session("s1")
        await session.spawn_hidden("memory", load)
        waiting = asyncio.create_task(getattr(session, wait)())
        await started.wait()
        await looked(session)

    with pytest.raises(StoreClosed):
        await waiting
    with pytest.raises(StoreClosed):
        await getattr(session, wait)()
    assert flag(path) == 1


async def test_what_the_close_of_the_store_abandons_is_told_once(
    new: Callable[..., TaskStore], started: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To who waits after it was opened again: who waits while it closes may learn of it when nothing can be written any more."""
    async with new() as store:
        session = await store.session("s1")
        await session.spawn_hidden("memory", hold(started, asyncio.Event()))
        await started.wait()
        waiting = await waits(session)
        looks_are_answered_when_nothing_can_be_written(store, monkeypatch)

    with pytest.raises(StoreClosed):
        await waiting
    monkeypatch.undo()
    async with new() as store:
        assert await failures_of((await store.session("s1")).await_hidden()) == ["abandoned: None"]


async def test_what_one_of_two_was_told_before_the_store_closed_is_told_to_nobody_else(
    new: Callable[..., TaskStore], release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.spawn_hidden("memory", fail("broken", release))
        first = await waits(session)
        looks_are_answered_when_nothing_can_be_written(store, monkeypatch)
        second = asyncio.create_task(session.await_hidden())
        await asyncio.sleep(0)
        monkeypatch.undo()
        release.set()
        assert await failures_of(first) == ["broken"]

    with pytest.raises(StoreClosed):
        await second
    async with new() as store:
        assert await failures_of((await store.session("s1")).await_hidden()) == []


def looks_are_answered_when_nothing_can_be_written(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = store._core
    assert core is not None
    writer = core.writer
    assert writer is not None

    ask = writer.run_or_undo

    async def answered_late(*units: Any) -> Any:
        look = await ask(*units)
        while not writer._closing:
            await asyncio.sleep(0)
        return look

    monkeypatch.setattr(writer, "run_or_undo", answered_late)


# --- the sync flag --------------------------------------------------------------------------------------------------


async def test_spawning_hidden_work_flags_the_session_until_it_took_its_state_up(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    other = await store.session("s2")
    assert await session.sync_needed() is False
    await (await session.spawn(noop()))
    assert await session.sync_needed() is False
    task = await session.spawn_hidden("memory", noop())
    assert flag(path) == 1
    await task
    await session.await_hidden()
    assert (await session.sync_needed(), await other.sync_needed()) == (True, False)

    assert await session.await_background_work() is True

    assert (await session.sync_needed(), flag(path)) == (False, 0)
    assert await session.await_background_work() is False
    await session.spawn_hidden("memory", noop())
    assert await session.await_background_work() is True


@pytest.mark.parametrize("when", ["UPDATE OF sync_needed ON sessions", "INSERT ON handles", "INSERT ON events"])
async def test_the_flag_is_set_in_the_transaction_of_the_spawn(session: SessionTasks, path: Path, when: str) -> None:
    before, work = event_count(path), noop()

    with forbidden(path, when), pytest.raises(Exception, match="forbidden"):
        await session.spawn_hidden("memory", work)

    assert (flag(path), event_count(path), rows(path, "SELECT * FROM tasks")) == (0, before, [])
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work


async def test_the_flag_is_cleared_only_when_no_hidden_task_is_live(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    first = asyncio.Event()
    one = await session.spawn_hidden("one", hold(asyncio.Event(), first))
    waiting = asyncio.create_task(session.await_background_work())
    await looked(session)
    with locked(path):
        # its end and the next one's birth are committed before anybody can look
        first.set()
        for _ in range(5):
            await asyncio.sleep(0)
        spawning = asyncio.create_task(session.spawn_hidden("two", hold(started, release)))
        await asyncio.sleep(0)
        assert (await one.record()).state is TaskState.RUNNING
    await started.wait()
    await looked(session)

    assert ((await one.record()).state, waiting.done(), flag(path)) == (TaskState.COMPLETED, False, 1)
    release.set()
    async with asyncio.timeout(20):
        assert await waiting is True
    assert flag(path) == 0
    assert (await (await spawning).record()).state is TaskState.COMPLETED


async def test_failures_leave_the_flag(session: SessionTasks, path: Path) -> None:
    await session.spawn_hidden("memory", fail("no"))

    assert await failures_of(session.await_background_work()) == ["no"]

    assert flag(path) == 1
    assert await session.await_background_work() is True
    assert flag(path) == 0


async def test_a_hidden_body_does_not_clear_the_flag_under_itself(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def load(task: TaskContext) -> list[Any]:
        return [await session.await_background_work(), flag(path)]

    task = await session.spawn_hidden("memory", load)

    assert await task.result(timeout=20) == [True, 1]
    assert await session.await_background_work() is True


async def test_of_many_who_settle_background_work_at_once_one_at_least_takes_the_state_up(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    await session.spawn_hidden("memory", hold(started, release))
    callers = [asyncio.create_task(session.await_background_work()) for _ in range(4)]
    await looked(session)
    assert not any(caller.done() for caller in callers)

    release.set()

    async with asyncio.timeout(20):
        assert True in await asyncio.gather(*callers)
    assert flag(path) == 0


async def test_the_flag_outlives_a_restart(new: Callable[..., TaskStore]) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.spawn_hidden("memory", noop())
        await session.await_hidden()

    async with new() as store:
        session = await store.session("s1")
        assert [record.sync_needed for record in await store.sessions()] == [True]
        assert await session.sync_needed() is True
        assert await session.await_background_work() is True
    async with new() as store:
        assert await (await store.session("s1")).sync_needed() is False


# --- beside an owner ------------------------------------------------------------------------------------------------


async def test_a_reader_sees_the_flag_and_may_not_settle(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await session.spawn_hidden("memory", fail("no"))
    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reading:
        beside = await reading.session("s1")

        assert await beside.sync_needed() is True
        for wait in (beside.await_hidden, beside.await_background_work):
            with pytest.raises(StoreReadOnly):
                await wait()

    assert await failures_of(session.await_hidden()) == ["no"]


async def test_a_requesting_store_waits_and_is_told(store: TaskStore, session: SessionTasks, path: Path) -> None:
    when = asyncio.Event()
    await session.spawn_hidden("memory", fail("no", when))
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        beside = await asking.session("s1")
        waiting = await waits(beside)

        when.set()

        assert await failures_of(waiting) == ["no"]
        assert await failures_of(beside.await_hidden()) == []
        assert await beside.await_background_work() is True
    assert await failures_of(session.await_hidden()) == []
    assert await session.sync_needed() is False


async def test_of_two_stores_that_wait_each_is_told(opened: Callable[..., Any], session: SessionTasks) -> None:
    other = await (await opened()).session("s1")
    when = asyncio.Event()
    await session.spawn_hidden("memory", fail("here", when))
    await other.spawn_hidden("memory", fail("there", when))
    callers = [await waits(each) for each in (session, other, session, other)]

    when.set()

    for caller in callers:
        assert await failures_of(caller) == ["here", "there"]
    for each in (session, other):
        await looked(each)
        assert await failures_of(each.await_hidden()) == []


async def test_of_two_stores_that_wait_each_is_told_of_what_failed_before_they_came(
    opened: Callable[..., Any], session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    other = await (await opened()).session("s1")
    earlier = await session.spawn_hidden("memory", fail("earlier"))
    await earlier.wait(timeout=20)
    await session.spawn_hidden("slow", hold(started, release))
    here, there = await waits(session), await waits(other)

    release.set()

    assert await failures_of(here) == ["earlier"]
    assert await failures_of(there) == ["earlier"]


async def test_a_failure_leaves_the_flag_though_somebody_else_read_it_while_others_were_waited_for(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    failed = await session.spawn_hidden("memory", fail("no"))
    await failed.wait(timeout=20)
    await session.spawn_hidden("slow", hold(started, release))
    waiting = asyncio.create_task(session.await_background_work())
    await looked(session)
    with pytest.raises(TaskFailed):
        await failed

    release.set()

    assert await failures_of(waiting) == ["no"]
    assert flag(path) == 1


async def test_hidden_work_of_a_store_that_closes_is_waited_for_where_it_goes_on(
    opened: Callable[..., Any], new: Callable[..., TaskStore]
) -> None:
    """It is released by the one and runs again in the other: between them nobody has it, but it is live."""
    begun, release = asyncio.Event(), asyncio.Event()
    leaving, staying = new(), await opened()

    async def load(task: TaskContext) -> None:
        begun.set()
        await release.wait()
        raise RuntimeError(f"attempt {task.attempt}")

    for store in (leaving, staying):
        store.task(recovery=Recovery.RERUN)(load)
    async with leaving:
        await (await leaving.session("s1")).spawn_hidden("memory", load)
        await begun.wait()
        waiting = await waits(await staying.session("s1"))
        begun.clear()
    async with asyncio.timeout(20):
        await begun.wait()
    assert not waiting.done()

    release.set()

    assert await failures_of(waiting) == ["attempt 2"]


# --- when it goes elsewhere -----------------------------------------------------------------------------------------


async def test_hidden_work_that_goes_with_its_parent_is_waited_for_and_told_of_where_it_is(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    destination = await store.session("s2")

    @store.task(recovery=Recovery.RERUN)
    async def above(task: TaskContext) -> None:
        await session.spawn_hidden("below", fail("no", release))
        await hold(started, release)

    parent = await session.spawn(above)
    await started.wait()
    await session.transfer(destination, [parent])
    assert (await session.sync_needed(), await destination.sync_needed()) == (True, True)
    waiting = await waits(destination)
    assert await failures_of(session.await_hidden()) == []

    release.set()

    assert await failures_of(waiting) == ["no"]
    assert await failures_of(session.await_hidden()) == []


async def test_who_waits_goes_on_once_the_hidden_work_has_left_the_session(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    destination = await store.session("s2")
    task = await session.spawn_hidden("memory", hold(started, release))
    waiting = await waits(session)

    await session.transfer(destination, [task])

    assert await failures_of(waiting) == []
    assert (await task.record()).state is TaskState.RUNNING


# --- after the session's close --------------------------------------------------------------------------------------


async def test_hidden_work_of_a_closed_session_is_waited_for_and_its_failures_told(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def slow_to_end() -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            await release.wait()

    failing = await session.spawn_hidden("failing", fail("no"))
    await failing.wait(timeout=20)
    slow = await session.spawn_hidden("slow", slow_to_end())
    await started.wait()
    report = await session.close(timeout=0)
    assert [record.task_seq for record in report.cancelled] == [slow.task_seq]
    waiting = await waits(session)

    release.set()

    assert await failures_of(waiting) == ["no"]
    assert await session.await_background_work() is True
    assert await session.sync_needed() is False


async def test_a_task_that_a_closed_session_keeps_may_still_hide_work_in_it(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def kept(task: TaskContext) -> None:
        await hold(started, release)
        await session.spawn_hidden("memory", fail("late"))

    task = await session.spawn(kept)
    await started.wait()
    await session.close()

    release.set()
    await task

    assert await failures_of(session.await_hidden()) == ["late"]


# --- taking the state up, and who is told -----------------------------------------------------------------------------


async def test_who_was_cancelled_while_the_flag_was_taken_down_finds_it_at_once(
    store: TaskStore, session: SessionTasks
) -> None:
    await (await session.spawn_hidden("memory", noop())).wait()
    assert store._core is not None
    assert store._core.writer is not None
    settling = asyncio.create_task(session.await_background_work())
    while not store._core.writer._queue:
        await asyncio.sleep(0)
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling

    needed = await session.sync_needed()

    assert (needed, await session.await_background_work(), await session.await_background_work()) == (True, True, False)


async def test_all_who_settle_background_work_at_once_take_the_state_up(
    session: SessionTasks, release: asyncio.Event
) -> None:
    await session.spawn_hidden("memory", release.wait())
    settling = [asyncio.create_task(session.await_background_work()) for _ in range(5)]
    await looked(session)
    release.set()

    assert await asyncio.gather(*settling) == [True] * 5
    assert await session.await_background_work() is False


async def test_a_failure_that_left_the_session_with_its_task_is_told_where_it_went(
    session: SessionTasks, there: SessionTasks, release: asyncio.Event
) -> None:
    failed = await session.spawn_hidden("memory", fail("no room"))
    await session.spawn_hidden("slow", release.wait())
    await failed.wait()
    waiting = await waits(session)
    await session.transfer(there, [failed])
    release.set()

    assert await failures_of(waiting) == []
    assert await failures_of(there.await_hidden()) == ["no room"]


async def test_hidden_work_is_given_by_the_word_of_its_parameter(session: SessionTasks) -> None:
    handle = await session.spawn_hidden(label="memory", fn_or_coroutine=noop())

    assert (await handle.wait()).mode is TaskMode.HIDDEN


async def test_who_looked_while_the_flag_was_down_for_one_who_was_cancelled_takes_the_state_up(
    store: TaskStore, session: SessionTasks
) -> None:
    await (await session.spawn_hidden("memory", noop())).wait()
    assert store._core is not None
    assert store._core.writer is not None
    settling = [asyncio.create_task(session.await_background_work()) for _ in range(2)]
    while len(store._core.writer._queue) < 2:
        await asyncio.sleep(0)
    settling[0].cancel()

    assert await settling[1] is True
    assert settling[0].cancelled()
