"""Children of a body: linked to it, remembered from attempt to attempt, and covered by its cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    Backoff,
    EventType,
    IdempotencyConflict,
    InvalidId,
    LimitExceeded,
    Limits,
    Recovery,
    SessionClosed,
    SessionError,
    SessionTasks,
    StaleAttempt,
    TaskCancelled,
    TaskContext,
    TaskExists,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    UnknownFunction,
    births,
)
from lash_store.runner import Runner
from tests.runtime.support import cancel_at, event_types, hold, next_event, rows, states
from tests.runtime.test_slots import assert_slots
from tests.runtime.test_waits import HOUR, SOON, again, settled

AT_ONCE = Backoff(initial=0)


@pytest.fixture
def leaf(store: TaskStore) -> Any:
    """Register a function that ends at once."""

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext, number: int = 0) -> int:
        return number

    return leaf


async def idle() -> None:
    """Go on for ever."""
    await asyncio.Event().wait()


def children(path: Path) -> list[int]:
    """Return the children of all tasks."""
    found = rows(path, "SELECT task_seq FROM tasks WHERE parent_seq IS NOT NULL ORDER BY task_seq")
    return [row["task_seq"] for row in found]


async def until_waiting(store: TaskStore) -> None:
    """Wait until a body has come to where its first attempt stays."""
    await next_event(store, EventType.PROGRESS)


async def stay(task: TaskContext) -> None:
    """Stay here in the first attempt."""
    if task.attempt == 1:
        await task.progress("stays")
        await asyncio.Event().wait()


async def test_a_child_is_linked_to_its_parent_and_in_its_session(
    store: TaskStore, session: SessionTasks, there: SessionTasks, leaf: Any
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        child = await task.spawn(
            leaf,
            7,
            id="child",
            kind=TaskKind.SUBAGENT,
            child_session_id="s2",
            cancel_policy="abort_local",
            close_policy="cancel",
            timeout=60.0,
            deadline=HOUR,
            notify_on_end=True,
        )
        return [child.task_seq, await child]

    task = await session.spawn(parent)
    task_seq, result = await task.result(timeout=SOON)  # type: ignore[misc]
    record = await session.get("child")

    assert (record.task_seq, record.parent_seq, record.result, result) == (task_seq, task.task_seq, 7, 7)
    assert str(record.scope) == "desktop:s1"
    assert (record.kind, record.child_session_id, record.cancel_policy) == ("subagent", "s2", "abort_local")
    assert (record.close_policy, record.timeout, record.notify_on_end) == ("cancel", 60.0, True)
    assert record.deadline is not None
    assert [note.task_id for note in await session.notes()] == ["child"]


# --- from attempt to attempt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["reattached", "retried"])
async def test_a_later_attempt_is_given_the_children_of_the_earlier_one(
    store: TaskStore, session: SessionTasks, leaf: Any, path: Path, end: str
) -> None:
    seen: list[list[int]] = []

    @store.task(recovery=Recovery.RERUN)
    async def other(task: TaskContext, number: int = 0) -> str:
        return "other"

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=AT_ONCE)
    async def parent(task: TaskContext) -> None:
        spawned = [
            await task.spawn(leaf, 1, id="named"),
            await task.spawn(leaf, 1, idempotency_key="key"),
            *[await task.spawn(leaf, 1) for _ in range(3)],
            await task.spawn(leaf, number=2),
            await task.spawn(other, 1),
            *await asyncio.gather(*[task.spawn(leaf, 3) for _ in range(5)]),
        ]
        await asyncio.gather(*spawned)
        seen.append([child.task_seq for child in spawned])
        if end == "reattached":
            await stay(task)
        elif task.attempt == 1:
            raise ValueError("at first")

    task = await session.spawn(parent)
    if end == "reattached":
        await until_waiting(store)
        await again(store, session, task)
    await task.result(timeout=SOON)

    assert len(set(seen[0])) == 12
    assert seen[1] == seen[0]
    assert children(path) == sorted(seen[0])


async def test_children_without_a_name_are_counted_since_the_last_save(
    store: TaskStore, session: SessionTasks, leaf: Any, path: Path
) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        if task.checkpoint is None:
            first = await task.spawn(leaf)
            await task.save("one child")
            seen.append(first.task_seq)
        child = await task.spawn(leaf)
        seen.append(child.task_seq)
        # behind a save, too, a name is one child
        seen.append((await task.spawn(leaf, 5, id="named")).task_seq)
        await task.save("three")
        seen.append((await task.spawn(leaf, 5, id="named")).task_seq)
        await stay(task)

    task = await session.spawn(parent)
    await until_waiting(store)
    assert len(set(seen)) == 3
    assert seen[2] == seen[3]
    await again(store, session, task)
    await task.result(timeout=SOON)

    # behind the last save nothing was spawned without a name
    assert seen[4] not in seen[:4]
    assert seen[5:] == [seen[2], seen[2]]
    assert len(children(path)) == 4


@pytest.mark.parametrize("how", ["at once", "in the transaction", "beside another"])
async def test_a_spawn_that_was_refused_does_not_count(
    store: TaskStore, session: SessionTasks, leaf: Any, path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    seen: list[list[int]] = []
    create, create_at_once, refusals, go_on = births.create, Runner.create, list[str](), asyncio.Event()

    def full(*args: Any, **options: Any) -> Any:
        # it may be asked for twice, in its batch and then by itself
        refusals[:] = refusals or [args[1].id]
        if args[1].id == refusals[0]:
            raise LimitExceeded("no room")
        return create(*args, **options)

    def closed(*args: Any, **options: Any) -> Any:
        if not refusals:
            refusals.append("the first")
            raise LimitExceeded("not now")
        return create_at_once(*args, **options)

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        born: list[Any] = []
        await go_on.wait()
        if task.attempt == 1:
            wanted = [task.spawn(leaf) for _ in range(2 if how == "beside another" else 1)]
            first, *born = await asyncio.gather(*wanted, return_exceptions=True)
            assert isinstance(first, LimitExceeded)
        while len(born) < 3:
            born.append(await task.spawn(leaf))
        seen.append(sorted(child.task_seq for child in born))
        await stay(task)

    task = await session.spawn(parent)
    if how == "at once":
        monkeypatch.setattr(Runner, "create", closed)
    else:
        monkeypatch.setattr(births, "create", full)
    go_on.set()
    await until_waiting(store)
    await again(store, session, task)
    await task.result(timeout=SOON)

    assert len(refusals) == 1
    assert seen[0] == seen[1] == children(path)


async def test_a_name_is_one_child_within_an_attempt_as_well(
    store: TaskStore, session: SessionTasks, leaf: Any, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        first = await task.spawn(leaf, 1, id="child")
        await first
        second = await task.spawn(leaf, 1, id="child")
        with pytest.raises(IdempotencyConflict):
            await task.spawn(leaf, 2, id="child")
        with pytest.raises(IdempotencyConflict):
            await task.spawn(parent, id="child")
        body = idle()
        with pytest.raises(IdempotencyConflict):
            await task.spawn(body, id="child")
        assert body.cr_frame is None
        return [first.task_seq, second.task_seq, await second]

    task = await session.spawn(parent)

    assert await task.result(timeout=SOON) == [2, 2, 1]
    assert children(path) == [2]


async def test_an_id_that_somebody_else_has_is_taken_while_that_is_live(
    store: TaskStore, session: SessionTasks, leaf: Any, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        with pytest.raises(TaskExists):
            await task.spawn(leaf, id="taken")
        release.set()
        await (await session.handle("taken")).wait()
        return await (await task.spawn(leaf, 3, id="taken"))

    other = await session.spawn(release.wait(), id="taken")
    task = await session.spawn(parent)

    assert await task.result(timeout=SOON) == 3
    assert (await session.get("taken")).task_seq != other.task_seq


@pytest.mark.parametrize(
    "by",
    [
        "id",
        "nothing",
        "key",
    ],
)
async def test_a_child_that_came_to_nothing_is_spawned_anew_by_a_retry_and_not_by_a_reattachment(
    store: TaskStore, session: SessionTasks, path: Path, by: str
) -> None:
    runs: list[int] = []
    seen: list[Any] = []
    name: dict[str, Any] = {"id": {"id": "child"}, "key": {"idempotency_key": "k"}, "nothing": {}}[by]

    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> str:
        runs.append(task.record.task_seq)
        if len(runs) == 1:
            raise ValueError("the first")
        return "made good"

    @store.task(recovery=Recovery.RERUN, retry_on=TaskFailed, backoff=AT_ONCE, max_attempts=3)
    async def parent(task: TaskContext) -> Any:
        spawned = await task.spawn(child, **name)
        record = await spawned.wait()
        seen.append((task.attempt, record.task_seq, record.state))
        await stay(task)
        return await spawned

    task = await session.spawn(parent)
    await until_waiting(store)
    await again(store, session, task)
    record = await task.wait(timeout=SOON)

    assert [one[:2] for one in seen[:2]] == [(1, 2), (3, 2)]
    assert (record.state, record.result) == ("completed", "made good")
    assert seen[2:] == [(4, 3, "completed")]
    assert runs == children(path) == [2, 3]


async def test_a_child_that_was_cancelled_is_spawned_anew_by_a_retry_and_a_completed_one_is_kept(
    store: TaskStore, session: SessionTasks, leaf: Any
) -> None:
    made_good = asyncio.Event()

    @store.task(recovery=Recovery.RERUN, retry_on=TaskCancelled, backoff=AT_ONCE)
    async def parent(task: TaskContext) -> Any:
        kept = await task.spawn(leaf, 1, id="kept")
        await kept
        lost = await task.spawn(waits, id="lost")
        if task.attempt == 1:
            await lost.cancel()
            made_good.set()
        await lost
        return [kept.task_seq, lost.task_seq]

    @store.task(recovery=Recovery.RERUN)
    async def waits(task: TaskContext) -> None:
        if not made_good.is_set():
            await task.sleep(HOUR)

    task = await session.spawn(parent)
    kept, anew = await task.result(timeout=SOON)  # type: ignore[misc]

    assert (kept, anew) == (2, 4)
    assert states(await session.list(include_terminal=True)) == ["completed", "completed", "cancelled", "completed"]


async def test_a_live_child_is_given_to_the_next_attempt(
    store: TaskStore, session: SessionTasks, release: asyncio.Event, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> int:
        await release.wait()
        return task.attempt

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=AT_ONCE)
    async def parent(task: TaskContext) -> Any:
        spawned = await task.spawn(child)
        if task.attempt == 1:
            raise ValueError("at first")
        release.set()
        return await spawned

    assert await (await session.spawn(parent)).result(timeout=SOON) == 1
    assert children(path) == [2]


async def test_a_coroutine_object_may_be_a_child_and_is_the_same_one_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    made: list[Coroutine[Any, Any, str]] = []

    async def body() -> str:
        await asyncio.sleep(0)
        return "once"

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        made.append(body())
        child = await task.spawn(made[-1])
        result = await child
        await stay(task)
        return [child.task_seq, result]

    task = await session.spawn(parent)
    await until_waiting(store)
    await again(store, session, task)

    assert await task.result(timeout=SOON) == [2, "once"]
    assert children(path) == [2]
    # the second one was closed: nobody will run it
    assert [one.cr_frame for one in made] == [None, None]


async def test_a_child_that_a_step_began_is_not_taken_for_one_of_the_bodys_own(
    store: TaskStore, session: SessionTasks, path: Path, leaf: Any
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> list[int]:
        async def inner() -> list[int]:
            return [(await task.spawn(leaf, 1)).task_seq, (await task.spawn(leaf, 1)).task_seq]

        in_step = await task.step("inner", inner)
        own = (await task.spawn(leaf, 1)).task_seq
        reached.put_nowait(None)
        if task.attempt < 5:
            await idle()
        return [*in_step, own]

    reached: asyncio.Queue[None] = asyncio.Queue()
    task = await session.spawn(parent)
    for _ in range(2):
        await reached.get()
        await settled(store)
        await again(store, session, task)

    assert await task.result(timeout=SOON) == children(path)
    assert len(children(path)) == 3


async def test_a_child_of_a_step_is_given_to_the_attempt_that_begins_the_same_try_again(
    store: TaskStore, session: SessionTasks, path: Path, leaf: Any
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> int:
        async def inner() -> int:
            child = await task.spawn(leaf, 1)
            if len(children(path)) < 2:
                raise ConnectionError
            if task.attempt == 1:
                await idle()
            return child.task_seq

        return await task.step("inner", inner, max_attempts=3, backoff=AT_ONCE)

    task = await session.spawn(parent)
    async with asyncio.timeout(SOON):
        while len(children(path)) < 2:
            await asyncio.sleep(0.01)
    await settled(store)
    await again(store, session, task)

    # that of the second try, not another, and not that of the first
    assert await task.result(timeout=SOON) == children(path)[1]
    assert len(children(path)) == 2


@pytest.mark.parametrize("meanwhile", ["it is asked for from elsewhere", "something is saved"])
async def test_a_try_of_a_step_is_given_its_children_whoever_asks_for_it_and_whatever_is_saved_meanwhile(
    store: TaskStore, session: SessionTasks, path: Path, leaf: Any, meanwhile: str
) -> None:
    given: list[list[int]] = []

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        saved = asyncio.Event()

        async def inner() -> None:
            children = [(await task.spawn(leaf, 1)).task_seq]
            await saved.wait()
            children.append((await task.spawn(leaf, 1)).task_seq)
            await task.sleep(0.001)
            given.append(children)
            if task.attempt == 1:
                await idle()

        async def outer() -> None:
            await task.step("inner", inner)

        is_asked_within = task.attempt == 1 and meanwhile == "it is asked for from elsewhere"
        running = asyncio.create_task(task.step(*(("outer", outer) if is_asked_within else ("inner", inner))))
        while task.attempt == 1 and not children(path):
            await asyncio.sleep(0.001)
        if task.attempt == 1 and meanwhile == "something is saved":
            await task.save("there")
        saved.set()
        await running

    task = await session.spawn(parent)
    async with asyncio.timeout(SOON):
        while not given:
            await asyncio.sleep(0.01)
    await again(store, session, task)

    await task.result(timeout=SOON)
    assert given == [children(path)] * 2
    assert len(children(path)) == 2


async def test_a_step_that_is_tried_again_with_the_one_around_it_begins_its_child_anew(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def fails_first(task: TaskContext) -> str:
        if len(children(path)) == 1:
            raise ConnectionError
        return task.id

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> str:
        async def inner() -> str:
            return await (await task.spawn(fails_first)).result()

        async def outer() -> str:
            return await task.step("inner", inner)

        return await task.step("outer", outer, max_attempts=2, backoff=AT_ONCE)

    await (await session.spawn(parent)).result(timeout=SOON)
    assert len(children(path)) == 2


async def test_sleeps_are_no_children_of_that_name(store: TaskStore, session: SessionTasks, path: Path) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        await task.sleep(0.001)
        await (await task.spawn(asyncio.sleep(0))).wait()

    await (await session.spawn(parent)).result(timeout=SOON)
    [child] = rows(path, "SELECT idempotency_key FROM tasks WHERE parent_seq IS NOT NULL")
    assert child["idempotency_key"] == "child:#0.1:sleep"


async def test_a_name_is_no_count(store: TaskStore, session: SessionTasks) -> None:
    async def body(result: str) -> str:
        return result

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        named, counted = await task.spawn(body("named"), id="#0.1:body"), await task.spawn(body("counted"))
        return await asyncio.gather(named, counted)

    assert await (await session.spawn(parent)).result(timeout=SOON) == ["named", "counted"]


async def test_what_cannot_be_spawned_is_refused_and_closed(
    opened: Callable[..., Any], path: Path, release: asyncio.Event
) -> None:
    store = await opened(limits=Limits(payload_bytes=100, live_tasks=2))
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, text: str = "") -> None:
        async def unknown(task: TaskContext) -> None: ...

        for error, fn, options in (
            (UnknownFunction, unknown, {}),
            (LimitExceeded, work, {"text": "x" * 100}),
            (InvalidId, idle(), {"id": "h-mine"}),
            (InvalidId, idle(), {"id": "a\nb"}),
            (InvalidId, idle(), {"idempotency_key": "child:mine"}),
            (ValueError, idle(), {"timeout": 0}),
            (SessionError, idle(), {"child_session_id": "s1"}),
        ):
            with pytest.raises(error):  # type: ignore[call-overload]
                await task.spawn(fn, **options)
            assert not asyncio.iscoroutine(fn) or fn.cr_frame is None
        await task.spawn(release.wait())
        body = idle()
        with pytest.raises(LimitExceeded):
            await task.spawn(body)
        assert body.cr_frame is None

    await (await session.spawn(work)).result(timeout=SOON)
    release.set()

    assert len(children(path)) == 1


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
async def test_a_spawn_that_was_cancelled_half_way_is_found_again(
    store: TaskStore, session: SessionTasks, leaf: Any, path: Path, late: bool
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> int:
        for at in range(1, 50):
            stepped = await cancel_at(task.spawn(leaf, at, id=f"c{at}"), at, late=late)
            assert stepped.error is None or stepped.was_cancelled
            assert await (await task.spawn(leaf, at, id=f"c{at}")) == at
            if not stepped.reached:
                return at
        raise AssertionError("it never ends")

    at: Any = await (await session.spawn(parent)).result(timeout=10)

    assert at > 1
    assert len(children(path)) == at


# --- slots ----------------------------------------------------------------------------------------------------------


async def test_one_slot_is_enough_for_any_depth(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def nested(task: TaskContext, depth: int) -> int:
        below: Any = 0 if depth == 0 else await (await task.spawn(nested, depth - 1))
        return below + 1

    assert await (await session.spawn(nested, 5)).result(timeout=10) == 6
    await assert_slots(store, 1)


async def test_one_slot_is_enough_for_any_number(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    running, most = 0, 0

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext, number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await task.progress("here")
        running -= 1
        return number

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> int:
        results: list[Any] = await asyncio.gather(*[await task.spawn(leaf, number) for number in range(20)])
        return sum(results)

    assert await (await session.spawn(parent)).result(timeout=10) == 190
    assert most == 1
    await assert_slots(store, 1)


# --- cancelling -----------------------------------------------------------------------------------------------------


async def test_a_cancel_covers_children_at_any_depth(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=2, cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def nested(task: TaskContext, depth: int) -> None:
        if depth == 0:
            await task.progress("deep")
            await asyncio.Event().wait()
        children = [await task.spawn(nested, depth - 1) for _ in range(2)]
        await asyncio.gather(*children)

    task = await session.spawn(nested, 3)
    await until_waiting(store)
    await task.cancel("all of you", timeout=SOON)
    await session.cancel_all(timeout=SOON)

    records = await session.list(include_terminal=True)
    assert {(record.state, record.cancel_reason) for record in records} == {(TaskState.CANCELLED, "all of you")}
    await assert_slots(store, 2)


async def test_a_child_of_a_task_that_is_to_be_cancelled_is_born_cancelled(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=HOUR)
    session = await store.session("s1")
    bodies: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> None:
        raise AssertionError("it ran")

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> list[Any]:
        started.set()
        await task.cancelled()
        bodies.append(idle())
        children = [await task.spawn(leaf), await task.spawn(bodies[0])]
        return [(await child.wait()).state for child in children]

    task = await session.spawn(parent)
    await started.wait()
    record = await task.cancel("enough", timeout=SOON)

    assert record.result == ["cancelled", "cancelled"]
    below = [record for record in await session.list(include_terminal=True) if record.parent_seq is not None]
    assert [(one.attempt, one.cancel_reason) for one in below] == [(0, "enough")] * 2
    assert bodies[0].cr_frame is None


async def test_cancels_that_race_with_spawns_leave_no_child_alive(opened: Callable[..., Any]) -> None:
    store = await opened(cancel_grace=0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> None:
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        while True:
            await task.spawn(child)

    async def race(number: int) -> None:
        task = await session.spawn(parent)
        for _ in range(number):
            await asyncio.sleep(0)
        await task.cancel()

    await asyncio.gather(*[race(number) for number in range(0, 40, 2)])
    await settled(store)

    assert await session.list() == []
    await assert_slots(store, 64)


# --- whose child ----------------------------------------------------------------------------------------------------


async def test_an_attempt_that_is_not_the_current_one_spawns_nothing(
    store: TaskStore, session: SessionTasks, leaf: Any, path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    refused: list[str] = []
    over = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            body = idle()
            for fn in (leaf, body):
                try:
                    await task.spawn(fn, id="child")
                except StaleAttempt as error:
                    refused.append(error.task_id)
            assert body.cr_frame is None
            over.set()

    await session.spawn(parent, id="t")
    await started.wait()
    await session.abandon("t", "stuck")
    await over.wait()

    assert refused == ["t", "t"]
    assert children(path) == []


async def test_what_a_body_left_behind_spawns_nothing(store: TaskStore, session: SessionTasks, leaf: Any) -> None:
    left: list[asyncio.Task[Any]] = []
    ended = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        async def later() -> TaskHandle:
            await ended.wait()
            return await task.spawn(leaf)

        left.append(asyncio.create_task(later()))

    await (await session.spawn(parent)).result(timeout=SOON)
    ended.set()

    with pytest.raises(StaleAttempt):
        await left[0]


async def test_a_child_goes_where_its_parent_was_given_to(
    store: TaskStore, session: SessionTasks, there: SessionTasks, leaf: Any, path: Path
) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        before = await task.spawn(leaf, 1)
        if task.attempt == 1:
            # in one commit with the transfer: the body has not heard of it yet
            _, child = await asyncio.gather(session.transfer(there, ["t"]), task.spawn(leaf, 2))
        else:
            child = await task.spawn(leaf, 2)
        seen.append((str(task.scope), before.task_seq, child.task_seq, str((await child.record()).scope)))
        await asyncio.gather(before, child)
        await stay(task)

    task = await session.spawn(parent, id="t")
    await until_waiting(store)
    await again(store, there, task)
    await task.result(timeout=SOON)

    assert seen[0] == seen[1]
    assert (seen[0][0], seen[0][3]) == ("desktop:s2", "desktop:s2")
    assert len(children(path)) == 2


@pytest.mark.parametrize("by", [{}, {"id": "paid"}, {"idempotency_key": "key"}])
@pytest.mark.parametrize("moves", ["parent", "child"])
async def test_a_body_is_given_its_child_after_either_was_given_to_another_session(
    store: TaskStore,
    session: SessionTasks,
    there: SessionTasks,
    started: asyncio.Event,
    release: asyncio.Event,
    path: Path,
    by: dict[str, Any],
    moves: str,
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def pay(task: TaskContext, amount: int) -> int:
        if moves == "child":
            await hold(started, release)
        return amount

    @store.task(recovery=Recovery.RERUN)
    async def other(task: TaskContext) -> None: ...

    @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, backoff=AT_ONCE)
    async def parent(task: TaskContext) -> list[Any]:
        child = await task.spawn(pay, 7, **by)
        paid = await child
        if task.attempt == 1:
            if moves == "parent":
                await hold(started, release)
            raise ConnectionError("at first")
        if by:
            with pytest.raises(IdempotencyConflict):
                await task.spawn(other, **by)
        return [paid, child.task_seq]

    task = await session.spawn(parent)
    await asyncio.wait_for(started.wait(), SOON)
    [child] = children(path)
    # another's, under a key that is the child's as well
    await there.spawn(other, idempotency_key="key")
    await session.transfer(there, [task if moves == "parent" else (await session.list())[-1].id])
    release.set()

    assert await task.result(timeout=SOON) == [7, child]
    assert children(path) == [child]


async def test_a_child_that_moves_with_its_parent_does_not_work_in_its_own_session(
    store: TaskStore, session: SessionTasks, there: SessionTasks, leaf: Any, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        spawned = task.spawn(leaf, kind=TaskKind.SUBAGENT, child_session_id="s2")
        await asyncio.gather(session.transfer(there, ["t"]), spawned, return_exceptions=True)

    await (await session.spawn(parent, id="t")).result(timeout=SOON)

    assert rows(path, "SELECT id FROM tasks WHERE scope = 'desktop:' || child_session_id") == []


async def test_a_task_that_a_closed_session_kept_may_still_have_children(
    store: TaskStore, session: SessionTasks, leaf: Any, started: asyncio.Event, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        await hold(started, release)
        with pytest.raises(SessionClosed):
            await session.spawn(leaf)
        child = await task.spawn(leaf, 4)
        return [await child, await (await task.spawn(leaf, 5, id="named"))]

    task = await session.spawn(parent)
    await started.wait()
    await session.close()
    release.set()

    assert await task.result(timeout=SOON) == [4, 5]


async def test_hidden_work_of_a_body_is_its_child(store: TaskStore, session: SessionTasks, leaf: Any) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> Any:
        child = await session.spawn_hidden("hidden", leaf, 1)
        return (await child.record()).parent_seq

    task = await session.spawn(parent)
    assert await task.result(timeout=SOON) == task.task_seq


# --- while the store closes -----------------------------------------------------------------------------------------


async def test_a_family_that_is_interrupted_at_many_moments_loses_and_repeats_nothing(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new(max_running=2, durability="normal")
    effects: list[tuple[str, int]] = []

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0.002), max_attempts=10_000)
    async def child(task: TaskContext, number: int) -> int:
        await task.sleep(0.002)
        if task.attempt % 2:
            raise ValueError("every other time")
        async with task.waiting("nothing"):
            await task.sleep(0.002, name="nap")
        return number

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> list[Any]:
        got: list[Any] = task.checkpoint or [await task.signal("go")]
        if task.checkpoint is None:
            got.append(await asyncio.gather(*[await task.spawn(child, number) for number in range(4)]))
            # before the save: a body may be stopped between a commit and what follows it
            effects.append((task.id, task.attempt))
            await task.save(got)
        return [*got, await task.signal("go"), await (await task.spawn(child, 5, id=f"last of {task.id}"))]

    async with store:
        session = await store.session("s1")
        for name in ("a", "b", "c"):
            task = await session.spawn(parent, id=name)
            await task.signal("go", 1)
            await task.signal("go", 2)
    for moment in range(300):
        async with store:
            # ever longer, so that a slow machine comes to the end
            await asyncio.sleep(moment % 10 / 400 * (1 + moment / 50))
            if not await store.count(TaskFilter(include_terminal=False)):
                break

    found = rows(path, "SELECT state, json_extract(result, '$') AS result FROM tasks WHERE parent_seq IS NULL")
    assert [tuple(row.values()) for row in found] == [("completed", "[1,[0,1,2,3],2,5]")] * 3
    below = rows(path, "SELECT state, count(*) AS n FROM tasks WHERE parent_seq IS NOT NULL GROUP BY state")
    assert [tuple(row.values()) for row in below] == [("completed", 15)]
    assert {name for name, _ in effects} == {"a", "b", "c"}


@pytest.mark.parametrize("how", ["spawn", "signal", "cancel"])
async def test_work_that_asks_for_more_while_its_store_closes_is_given_back(
    new: Callable[..., TaskStore], path: Path, how: str
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> None: ...

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        child = await task.spawn(leaf)
        await task.progress("works")
        while True:
            match how:
                case "spawn":
                    await task.spawn(leaf)
                case "signal":
                    await child.signal("a")
                case _:
                    await child.cancel()

    async with store:
        session = await store.session("s1")
        await session.spawn(parent, id="t")
        await until_waiting(store)
        # a look for dead owners that is under way, which the closing store lets end
        looking = asyncio.create_task(store.recover())
        await asyncio.sleep(0)
        await store.close()
        await asyncio.wait({looking})
        _ = looking.exception()

    [row] = rows(path, "SELECT state, failure FROM tasks WHERE id = 't'")
    assert tuple(row.values()) == ("pending", None)
    assert "failed" not in event_types(path, 1)


@pytest.mark.parametrize("how", ["await", "wait", "gather", "hidden"])
@pytest.mark.parametrize("lingers", [False, True])
async def test_a_parent_that_waits_for_its_child_is_cancelled_with_it(
    opened: Callable[..., Any], started: asyncio.Event, how: str, lingers: bool
) -> None:
    store = await opened(cancel_grace=20.0)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> None:
        try:
            await task.signal("never")
        finally:
            if lingers:
                # the parent does not wait for that
                await asyncio.sleep(0.05)

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        if how == "hidden":
            await session.spawn_hidden("leaf", leaf)
            started.set()
            await session.await_hidden()
            return
        child = await task.spawn(leaf)
        started.set()
        match how:
            case "await":
                await child
            case "wait":
                await child.wait()
            case _:
                await asyncio.gather(child, child.wait())

    task = await session.spawn(parent)
    await started.wait()
    body = store._core.runner._bodies[task.task_seq]
    while not body.slot._waits:
        await asyncio.sleep(0)

    record = await task.cancel("why", timeout=10)

    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "why")


async def test_a_parent_that_came_to_wait_for_a_child_after_the_cancel_is_cancelled_with_it(
    session: SessionTasks, store: TaskStore, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def leaf(task: TaskContext) -> None:
        await task.signal("never")

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        children = [await task.spawn(leaf, id=f"leaf {number}") for number in range(2)]
        started.set()
        await task.cancelled()
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(child.result())

    task = await session.spawn(parent)
    await started.wait()

    assert (await task.cancel(timeout=10)).state is TaskState.CANCELLED
