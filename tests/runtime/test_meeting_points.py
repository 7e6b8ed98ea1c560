"""Where two features meet: a cancel and a hand-over, a fence and a slot, a reader and a giving-up, a close and a close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    CancelPolicy,
    ClosePolicy,
    EventType,
    HandleNotVisible,
    IdempotencyConflict,
    Recovery,
    SessionTasks,
    StoreClosed,
    StoreError,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    Verdict,
    handover,
)
from lash_store.callbacks import Callbacks
from lash_store.queries import TASKS_BY_SEQ
from lash_store.writer import Writer
from tests.runtime.support import RUNTIME, cancel_at, event_count, event_types, hold, next_event, rows, states, sweep_up

FOREVER = 3600.0
OTHER = TaskKind.OTHER
MANY = 40
"""More suspensions than any of the operations has that are stepped through here."""


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something read from the store holds."""
    async with asyncio.timeout(20):
        while not await holds():
            await asyncio.sleep(0.005)


async def drained(store: TaskStore) -> None:
    """Return once what was asked of the store before is committed."""
    await asyncio.sleep(0)
    await store.session("drain")


async def forever(task: TaskContext) -> None:
    """Run until somebody cancels it."""
    await asyncio.Event().wait()


async def seven(task: TaskContext) -> int:
    """Return something at once."""
    return 7


class Lingering:
    """Bodies whose first attempt does not end when it is cancelled, but when it is let go; later ones end at once."""

    def __init__(self, *, swallows: bool) -> None:
        self.swallows = swallows
        self.started = asyncio.Event()
        self.fenced = asyncio.Event()
        self.release = asyncio.Event()
        self.ended = asyncio.Event()
        self.attempts: list[int] = []

    async def __call__(self, task: TaskContext) -> str:
        self.attempts.append(task.attempt)
        if len(self.attempts) > 1:
            return f"attempt {task.attempt}"
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.fenced.set()
            await self._stay()
            if not self.swallows:
                raise
        finally:
            self.ended.set()
        return "too late"

    async def _stay(self) -> None:
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                continue

    def register(self, store: TaskStore) -> Callable[..., Any]:
        """Register the body with a store, as ``lingers``."""

        @store.task(recovery=Recovery.RERUN, name="lingers")
        async def lingers(task: TaskContext) -> str:
            return await self(task)

        return lingers


@pytest.fixture
async def lingering() -> AsyncIterator[Callable[..., Lingering]]:
    """Make lingering bodies, all let go before the loop closes, which would wait for one that swallows its cancellation."""
    made: list[Lingering] = []

    def make(*, swallows: bool) -> Lingering:
        made.append(Lingering(swallows=swallows))
        return made[-1]

    yield make
    for body in made:
        body.release.set()


# --- a row that is claimed again while its fenced-out body still ends -------------------------------------------------


@pytest.mark.parametrize("swallows", [False, True])
async def test_a_task_that_a_person_freed_runs_again_though_its_old_body_ends_after_the_claim(
    opened: Callable[..., Any], path: Path, swallows: bool, lingering: Callable[..., Lingering]
) -> None:
    store = await opened(max_running=1)
    body = lingering(swallows=swallows)
    session = await store.session("s1")
    task = await session.spawn(body.register(store), id="x")
    await body.started.wait()

    async with TaskStore.connect(path, runtime=RUNTIME) as person:
        await (await person.session("s1")).abandon("x", "looks stuck")
        async with asyncio.timeout(20):
            async for event in store.events(0, types=[EventType.CLAIMED, EventType.REATTACHED]):
                assert event.task_id == "x"
                break
            await body.fenced.wait()
        body.release.set()

    assert await task.result(20) == f"attempt {body.attempts[-1]}"
    assert body.attempts[0] == 1
    assert body.attempts[-1] > 1
    assert len(body.attempts) == 2


async def test_a_freed_task_keeps_its_place_in_the_queue_when_its_old_body_ends(
    opened: Callable[..., Any], release: asyncio.Event, lingering: Callable[..., Lingering]
) -> None:
    store = await opened(max_running=2)
    body = lingering(swallows=False)

    @store.task(recovery=Recovery.RERUN)
    async def other(task: TaskContext) -> None:
        await release.wait()

    session = await store.session("s1")
    await session.spawn(other)
    task = await session.spawn(body.register(store), id="x")
    await body.started.wait()
    # takes the slot that the fenced-out body may give back
    await session.spawn(other)

    await session.abandon("x", "stuck")
    await store.recover()
    async with asyncio.timeout(20):
        await body.fenced.wait()
        body.release.set()
        await body.ended.wait()
    await drained(store)
    release.set()

    assert await task.result(20) == f"attempt {body.attempts[-1]}"
    assert len(body.attempts) == 2


async def test_rows_read_before_a_claim_do_not_undo_it(
    opened: Callable[..., Any], path: Path, release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(max_running=1)

    @store.task(recovery=Recovery.RERUN)
    async def hog(task: TaskContext) -> None:
        await release.wait()

    store.task(recovery=Recovery.RERUN)(seven)
    session = await store.session("s1")
    await session.spawn(hog)
    task = await session.spawn(seven, id="x")
    behind = await session.spawn(seven, id="y")
    reader = store._core.reader
    read = reader.rows
    slow = [True]

    async def read_slowly(sql: str, *parameters: Any) -> Any:
        found = await read(sql, *parameters)
        if sql == TASKS_BY_SEQ and slow:
            # by the time these rows are compared with what is held here, they are old
            slow.clear()
            await store.recover()
        return found

    monkeypatch.setattr(reader, "rows", read_slowly)
    async with TaskStore.connect(path, runtime=RUNTIME) as person:
        asking = await person.session("s1")
        for name in ("x", "y"):
            # what was read of the first has been compared when the second is claimed
            await asking.abandon(name, "please")
            await next_event(store, EventType.CLAIMED, task_id=name)

    release.set()

    assert await task.result(20) == 7
    assert await behind.result(20) == 7


async def test_a_fenced_out_body_that_swallows_its_cancellation_keeps_no_slot(
    opened: Callable[..., Any], lingering: Callable[..., Lingering]
) -> None:
    store = await opened(max_running=1)
    body = lingering(swallows=True)
    session = await store.session("s1")
    lingers = body.register(store)
    task = await session.spawn(lingers)
    await body.started.wait()

    await session.abandon(task, "stuck")
    await store.recover()

    assert await task.result(20) == f"attempt {body.attempts[-1]}"
    assert not body.ended.is_set()
    body.release.set()
    async with asyncio.timeout(20):
        await body.ended.wait()
    assert (await task.record()).result == f"attempt {body.attempts[-1]}"
    # nor does it give one back that it no longer has
    assert await (await session.spawn(lingers)).result(20) == "attempt 1"


@pytest.mark.parametrize("runs_again", [False, True])
async def test_a_fenced_out_body_that_does_not_end_is_reported_at_close(
    new: Callable[..., TaskStore], runs_again: bool, lingering: Callable[..., Lingering]
) -> None:
    store = new(max_running=4)
    body = lingering(swallows=True)
    lingers = body.register(store)
    await store.open()
    session = await store.session("s1")
    task = await session.spawn(lingers, id="deaf")
    await body.started.wait()
    await session.abandon(task, "stuck")
    if runs_again:
        await store.recover()
        await task.wait(20)

    with pytest.warns(ResourceWarning, match="deaf"):
        await store.close(timeout=0.2)

    body.release.set()
    async with asyncio.timeout(20):
        await body.ended.wait()


async def test_what_was_cancelled_while_it_was_pending_leaves_nothing_in_the_queue(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    store.task(recovery=Recovery.RERUN)(forever)
    session = await store.session("s1")
    hog = await session.spawn(forever)

    for _ in range(20):
        await (await session.spawn(forever)).cancel()
    for _ in range(20):
        await session.spawn(forever, id="many", idempotency_key=None)
        await session.cancel("many")

    runner = store._core.runner
    assert runner.holds(hog.task_seq)
    assert [*runner._queued, *getattr(runner, "_queue", ())] == []


# --- handing over, and over again -------------------------------------------------------------------------------------


async def register(session: SessionTasks, *ids: str) -> list[TaskHandle]:
    """Register external work without a callback."""
    return [await session.register(id, OTHER) for id in ids]


async def test_a_task_that_came_back_is_not_taken_for_handed_over_already(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    there = await store.session("s2")
    [task] = await register(session, "index")
    await session.handoff(there, [task])
    await there.handoff(session, [task])
    await register(session, "junk")
    count = event_count(path)

    for named in (task, "index", task.to_json()):
        with pytest.raises(IdempotencyConflict, match="id="):
            await session.handoff(there, [named])

    assert event_count(path) == count
    assert [(one.id, one.state) for one in await session.list()] == [("index", "running"), ("junk", "running")]
    done = await session.handoff(there, [task], id="once more")
    assert ([one.id for one in done.moved], [one.id for one in done.cancelled]) == (["index"], ["junk"])
    assert (await task.record()).scope == there.scope


async def test_one_of_several_that_came_back_is_enough(store: TaskStore, session: SessionTasks, path: Path) -> None:
    there = await store.session("s2")
    both = await register(session, "one", "two")
    await session.handoff(there, both)
    await there.transfer(session, ["two"])
    count = event_count(path)

    with pytest.raises(IdempotencyConflict):
        await session.handoff(there, ["one", "two"])

    assert event_count(path) == count
    assert [one.id for one in await session.list()] == ["two"]


async def test_a_new_incarnation_is_not_taken_for_the_one_that_was_handed_over(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    there = await store.session("s2")
    [first] = await register(session, "index")
    await session.handoff(there, ["index"])
    await there.cancel("index")
    [second] = await register(session, "index")
    count = event_count(path)

    with pytest.raises(IdempotencyConflict):
        await session.handoff(there, ["index"])

    assert event_count(path) == count
    assert (await second.record()).scope == session.scope
    done = await session.handoff(there, ["index"], id="the second")
    assert [one.task_seq for one in done.moved] == [second.task_seq]
    assert second.task_seq != first.task_seq


@pytest.mark.parametrize("by_id", [False, True])
async def test_a_handoff_that_is_repeated_gives_what_was_done(
    store: TaskStore, session: SessionTasks, path: Path, by_id: bool
) -> None:
    there = await store.session("s2")
    [task, _] = await register(session, "index", "junk")
    kept = ["index"] if by_id else [task]
    done = await session.handoff(there, kept)
    # what came afterwards is nothing to it, nor what became of what was moved
    await register(session, "later")
    await there.complete("index", TaskState.COMPLETED)
    count = event_count(path)

    assert await session.handoff(there, kept) == done

    assert event_count(path) == count
    assert states(await session.list()) == ["running"]


async def test_a_handoff_is_repeated_beside_an_older_incarnation_that_stayed(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    there = await store.session("s2")
    await register(session, "index")
    await session.complete("index", TaskState.COMPLETED)
    await register(session, "index")
    done = await session.handoff(there, ["index"])
    count = event_count(path)

    assert await session.handoff(there, ["index"]) == done

    assert event_count(path) == count


async def test_a_handoff_with_an_id_of_its_own_is_the_same_wherever_its_tasks_are(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    there = await store.session("s2")
    [task] = await register(session, "index")
    done = await session.handoff(there, [task], id="night")
    await there.handoff(session, [task], id="morning")
    count = event_count(path)

    assert await session.handoff(there, [task], id="night") == done

    assert event_count(path) == count
    assert (await task.record()).scope == session.scope


@pytest.mark.parametrize("before", [1, 2, 3, 4])
async def test_what_was_handed_over_before_its_request_is_not_cancelled_with_the_session(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    there = await store.session("s2")
    store.task(recovery=Recovery.RERUN)(forever)
    task = await session.spawn(forever, id="kept", cancel_policy=CancelPolicy.ABORT_LOCAL)
    await register(session, "left")
    await next_event(store, EventType.STARTED, after=0)
    submit, moving = Writer.submit, []
    count = 0

    def submit_behind_a_transfer(self: Writer, unit: Any, *then: Any) -> Any:
        nonlocal count
        count += 1
        if count == before:
            moving.append(submit(self, lambda tx: handover.transfer(tx, session.scope, there.scope, ["kept"])))
        return submit(self, unit, *then)

    monkeypatch.setattr(Writer, "submit", submit_behind_a_transfer)
    async with asyncio.timeout(20):
        reports = await session.cancel_all("bye")
    monkeypatch.undo()

    moved = not moving or not isinstance(moving[0].exception(), HandleNotVisible)
    was_asked = not moving or not moved or moving[0].result()[0].cancel_requested_at is not None
    record = await task.record()
    assert (record.state is TaskState.CANCELLED) == was_asked
    assert (record.cancel_requested_at is not None) == was_asked
    assert "left" in {report.record.id for report in reports}
    assert await session.list() == []


# --- cancelling many at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.0, 1e-6, 1e-3])
async def test_cancel_all_asks_all_and_reports_on_all_however_little_time_it_has(
    opened: Callable[..., Any], path: Path, timeout: float
) -> None:
    store = await opened(max_running=5, cancel_grace=FOREVER)

    @store.task(recovery=Recovery.RERUN)
    async def waits(task: TaskContext) -> None:
        await task.cancelled()

    session = await store.session("s1")
    tasks = [await session.spawn(waits, id=f"t{number}") for number in range(8)]
    tasks += [await session.spawn_hidden("h", waits), *await register(session, "e")]
    await until(lambda: _running(session, 6))

    reports = await session.cancel_all("bye", timeout=timeout)

    assert [report.record.task_seq for report in reports] == [task.task_seq for task in tasks]
    asked = rows(path, "SELECT id FROM tasks WHERE cancel_requested_at IS NOT NULL AND cancel_reason = 'bye'")
    assert len(asked) >= len(tasks) - 1
    assert rows(path, "SELECT id FROM tasks WHERE state IN ('pending', 'running', 'waiting')") == []
    async with asyncio.timeout(20):
        for task in tasks:
            assert (await task.wait()).is_terminal


async def _running(session: SessionTasks, count: int) -> bool:
    return len(await session.list(states=[TaskState.RUNNING], include_hidden=True)) == count


# --- the inbox ----------------------------------------------------------------------------------------------------------


async def post(store: TaskStore, session: SessionTasks, *texts: str) -> None:
    """Post notes to a session."""

    async def say(task: TaskContext, said: list[str]) -> None:
        for text in said:
            await task.notify(text)

    store.task(recovery=Recovery.RERUN, name="say")(say)
    await (await session.spawn(say, list(texts)))


async def test_what_a_reader_does_to_its_list_changes_nothing_of_what_is_acknowledged(
    store: TaskStore, session: SessionTasks
) -> None:
    await post(store, session, "one", "two", "three")
    taken = []

    async with session.inbox(2) as notes:
        while notes:
            taken.append(notes.pop(0).text)
        notes.append((await session.notes())[-1])

    assert taken == ["one", "two"]
    assert [note.text for note in await session.notes()] == ["three"]


async def test_an_owner_that_is_given_up_gives_its_inbox_up(opened: Callable[..., Any], path: Path) -> None:
    stuck, store = await opened(), await opened()
    session = await stuck.session("s1")
    await post(stuck, session, "one")
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def read_slowly() -> None:
        async with session.inbox():
            reading.set()
            await go_on.wait()

    old = asyncio.create_task(read_slowly())
    await reading.wait()
    await store.abandon_owner(stuck._core.owner_id, "stuck")
    there = await store.session("s1")

    async def read_and_fail() -> None:
        async with there.inbox() as notes:
            assert [note.text for note in notes] == ["one"]
            go_on.set()
            async with asyncio.timeout(20):
                await asyncio.wait({old})
            assert old.exception() is None or isinstance(old.exception(), StoreError)
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            await read_and_fail()
    finally:
        go_on.set()
        await asyncio.wait({old})

    assert [note.text for note in await there.notes()] == ["one"]
    async with there.inbox() as notes:
        assert [note.text for note in notes] == ["one"]
    assert await there.notes() == []


async def test_who_reads_beside_a_given_up_owner_keeps_its_claim(opened: Callable[..., Any]) -> None:
    stuck, peer, store = await opened(), await opened(), await opened()
    await post(stuck, await stuck.session("s1"), "one")

    async with (await peer.session("s1")).inbox() as notes:
        await store.abandon_owner(stuck._core.owner_id, "stuck")
        with pytest.raises(StoreError, match="inbox"):
            await (await store.session("s1")).inbox().__aenter__()

    assert [note.text for note in notes] == ["one"]
    assert await (await store.session("s1")).notes() == []


def test_a_reader_whose_loop_was_closed_leaves_nothing_beside_the_file(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store, left = new(), []

    cores: list[Any] = []

    async def begin_to_read() -> None:
        await store.open()
        cores.append(store._core)
        session = await store.session("s1")
        await post(store, session, "one")
        inbox = session.inbox()
        await inbox.__aenter__()
        left.append(inbox)
        # nothing runs on when the loop closes but what waits
        await drained(store)

    async def read_again() -> list[str]:
        async with new() as next_store, (await next_store.session("s1")).inbox() as notes:
            return [note.text for note in notes]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin_to_read())
    waiting = asyncio.all_tasks(loop)
    loop.close()

    assert asyncio.run(read_again()) == ["one"]

    folder = Path(f"{path}-owners")
    assert not folder.exists() or list(folder.iterdir()) == []
    for task in waiting:
        task._log_destroy_pending = False
    # an earlier life is forgotten with its loop
    asyncio.run(store.close())
    sweep_up(*cores)


def test_what_is_kept_of_a_life_whose_loop_was_closed_says_that_it_is_over(new: Callable[..., TaskStore]) -> None:
    store, kept = new(), []
    started: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def slow(task: TaskContext) -> int:
        started.append(task.attempt)
        await asyncio.Event().wait()
        return 1

    async def begin() -> None:
        await store.open()
        session = await store.session("s1")
        kept.extend([store._core, session, await session.spawn(slow, id="slow")])
        while not started:
            await asyncio.sleep(0.001)
        await drained(store)

    async def use_it() -> None:
        _, session, handle = kept
        async with store:
            calls = [handle.result, handle.wait, handle.cancel, handle.record, lambda: session.spawn(slow)]
            for call in [*calls, *calls, lambda: session.get("slow"), lambda: anext(session.events())]:
                with pytest.raises(StoreClosed, match="event loop that this store was opened in is closed"):
                    await asyncio.wait_for(call(), 20)
            assert (await (await store.handle(handle.scope, "slow")).cancel(timeout=20)).state is TaskState.CANCELLED

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    waiting = asyncio.all_tasks(loop)
    loop.close()
    asyncio.run(use_it())
    for task in waiting:
        task._log_destroy_pending = False
    sweep_up(kept[0])


# --- telling once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("ended", [False, True])
async def test_a_session_that_was_not_told_to_take_its_state_up_is_told_again(
    store: TaskStore, session: SessionTasks, late: bool, ended: bool
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def soon(task: TaskContext) -> None:
        await asyncio.sleep(0)

    for at in range(1, MANY):
        task = await session.spawn_hidden("hidden", soon)
        if ended:
            await task.wait(20)

        step = await cancel_at(session.await_background_work(), at, late=late)

        await drained(store)
        if step.result is True:
            assert await session.sync_needed() is False
        else:
            assert step.was_cancelled
            await until(session.sync_needed)
            await drained(store)
            assert await session.sync_needed()
            await session.await_background_work()
        if not step.reached:
            break
    else:
        raise AssertionError("it has more suspensions than were tried")


@pytest.mark.parametrize("late", [False, True])
async def test_an_outcome_that_was_not_handed_out_was_not_read(
    store: TaskStore, session: SessionTasks, late: bool
) -> None:
    store.task(recovery=Recovery.RERUN)(seven)

    async def is_seen(task: TaskHandle) -> bool:
        try:
            return len(await session.validate_handles([task])) == 1
        except HandleNotVisible:
            return False

    for at in range(1, MANY):
        task = await session.spawn(seven)
        await task.wait(20)

        step = await cancel_at(task.result(), at, late=late)

        await drained(store)
        if step.result == 7:
            assert not await is_seen(task)
        else:
            assert step.was_cancelled
            await until(lambda task=task: is_seen(task))  # type: ignore[misc]
            await drained(store)
            assert await is_seen(task)
        if not step.reached:
            break
    else:
        raise AssertionError("it has more suspensions than were tried")


@pytest.mark.parametrize("waits_already", [False, True])
async def test_who_awaits_what_it_handed_over_does_not_read_for_the_successor(
    store: TaskStore, session: SessionTasks, release: asyncio.Event, waits_already: bool
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        await release.wait()
        return 7

    there, further = await store.session("s2"), await store.session("s3")
    task = await session.spawn(work, id="x")
    waiter = asyncio.create_task(task.result(20)) if waits_already else None
    await drained(store)
    await session.handoff(there, [task])
    release.set()

    assert await (waiter or task.result(20)) == 7

    await drained(store)
    assert [record.id for record in await there.validate_handles(["x"])] == ["x"]
    await there.handoff(further, ["x"])
    # its own handle reads
    assert await (await further.handle("x")).result(20) == 7
    await drained(store)
    with pytest.raises(HandleNotVisible):
        await further.validate_handles(["x"])


# --- who waits while somebody gives up, or closes ---------------------------------------------------------------------


async def test_cancel_returns_the_row_when_nobody_is_left_to_call_the_callback(
    opened: Callable[..., Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, store = await opened(), await opened()
    session, there = await stuck.session("s1"), await store.session("s1")
    called: list[str] = []
    call, go_on = Callbacks._call, asyncio.Event()

    async def call_late(self: Callbacks, *arguments: Any) -> None:
        # as on a loop that is stuck between the request's commit and the call
        await go_on.wait()
        await call(self, *arguments)

    monkeypatch.setattr(Callbacks, "_call", call_late)
    task = await session.register("e", OTHER, lambda: called.append("stopped"))
    cancels = [asyncio.create_task(one.cancel("e", "enough")) for one in (session, there)]
    cancels.append(asyncio.create_task(task.cancel("enough")))
    all_of_it = asyncio.create_task(session.cancel_all("enough"))
    await next_event(store, EventType.CANCEL_REQUESTED, after=0)
    await drained(stuck)

    await store.abandon_owner(stuck._core.owner_id, "stuck")

    _, waiting = await asyncio.wait({*cancels, all_of_it}, timeout=20)
    go_on.set()
    assert not waiting
    for cancel in cancels:
        record = cancel.result()
        assert (record.state, record.owner_id) == (TaskState.CANCEL_REQUESTED, None)
        assert record.cancel_reason == "enough"
    assert states([report.record for report in all_of_it.result()]) == ["cancel_requested"]
    await stuck.close()
    assert called == []
    assert "cancelled" not in event_types(path, task.task_seq)


@pytest.mark.parametrize("first", ["waits", "timed out", "cancelled"])
async def test_who_closes_a_session_again_waits_as_well_for_what_is_being_cancelled(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, first: str
) -> None:
    stopping = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def slow_to_end(task: TaskContext) -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            stopping.set()
            await release.wait()

    task = await session.spawn(slow_to_end, close_policy=ClosePolicy.CANCEL, cancel_policy=CancelPolicy.ABORT_LOCAL)
    await started.wait()
    before = asyncio.create_task(session.close(timeout=0 if first == "timed out" else None))
    await stopping.wait()
    if first == "timed out":
        assert states((await before).cancelled) == ["cancel_requested"]
    elif first == "cancelled":
        before.cancel()
        await asyncio.wait({before})

    again = asyncio.create_task(session.close())
    for _ in range(3):
        await drained(store)
    waits = not again.done()
    release.set()

    async with asyncio.timeout(20):
        report = await again
        if first == "waits":
            assert (await before).cancelled == report.cancelled
    assert [(one.task_seq, one.state) for one in report.cancelled] == [(task.task_seq, TaskState.CANCELLED)]
    assert waits


async def test_who_waits_for_a_session_to_close_is_told_that_the_store_closed(
    new: Callable[..., TaskStore], lingering: Callable[..., Lingering]
) -> None:
    store = new()
    body = lingering(swallows=True)
    lingers = body.register(store)
    await store.open()
    session = await store.session("s1")
    await session.spawn(lingers, close_policy=ClosePolicy.CANCEL, cancel_policy=CancelPolicy.ABORT_LOCAL)
    await body.started.wait()
    closing = asyncio.create_task(session.close())
    await body.fenced.wait()

    with pytest.warns(ResourceWarning):
        await store.close(timeout=0.1)

    with pytest.raises(StoreClosed):
        async with asyncio.timeout(20):
            await closing
    body.release.set()
    async with asyncio.timeout(20):
        await body.ended.wait()


@pytest.mark.parametrize("of", ["handle", "session", "store"])
async def test_a_body_that_follows_its_child_lets_it_run(opened: Callable[..., Any], of: str) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    store.task(recovery=Recovery.RERUN)(seven)

    @store.task(recovery=Recovery.RERUN)
    async def follows(task: TaskContext) -> list[str]:
        child = await session.spawn(seven, parent=task.id)
        events = {"handle": child.events, "session": lambda: session.events(0), "store": lambda: store.events(0)}[of]
        seen = []
        async for event in events():
            if event.task_seq == child.task_seq:
                seen.append(str(event.type))
                if event.type == EventType.COMPLETED:
                    break
        return seen

    task = await session.spawn(follows, id="follows")

    assert await task.result(20) == ["registered", "started", "completed"]


# --- where a cancelled agent worked ------------------------------------------------------------------------------------


@pytest.fixture
async def parent(store: TaskStore) -> SessionTasks:
    """A session whose agents work in others; the store knows `forever` and `seven`."""
    store.task(recovery=Recovery.RERUN)(forever)
    store.task(recovery=Recovery.RERUN)(seven)
    return await store.session("parent")


async def agent(parent: SessionTasks, works_in: str, id: str) -> TaskHandle:
    """Start a sub-agent that ends when it is cancelled."""
    return await parent.spawn(
        forever, id=id, kind=TaskKind.SUBAGENT, child_session_id=works_in, cancel_policy=CancelPolicy.ABORT_LOCAL
    )


async def test_a_session_that_is_opened_again_outlives_the_cancel_of_its_agent(
    store: TaskStore, parent: SessionTasks
) -> None:
    child = await store.session("child", parent=parent)
    before = await agent(parent, "child", "agent")
    assert (await before.cancel("enough")).state is TaskState.CANCELLED
    # as long as nobody opens it again, the cancel covers what comes
    assert (await (await child.spawn(seven)).wait(20)).state is TaskState.CANCELLED
    await child.close()

    again = await store.session("child", reopen=True)

    assert await (await again.spawn(seven)).result(20) == 7
    assert (await (await again.register("e", OTHER)).record()).state is TaskState.RUNNING
    # an agent that comes to it now is its agent
    after = await agent(parent, "child", "agent")
    await after.cancel("enough of this, too")
    assert (await (await again.spawn(seven)).wait(20)).state is TaskState.CANCELLED


async def test_a_child_of_live_work_is_not_cancelled_for_the_agent_of_its_session(
    store: TaskStore, parent: SessionTasks
) -> None:
    child = await store.session("child", parent=parent)
    await (await agent(parent, "child", "agent")).cancel("enough")
    live = await parent.spawn(forever, id="live", cancel_policy=CancelPolicy.ABORT_LOCAL)
    await parent.transfer(child, [live])

    below = await child.spawn(seven, parent=live)

    assert await below.result(20) == 7
    assert not (await live.record()).is_terminal
    # and once its parent's own cancel was requested it is
    await live.cancel("enough of this, too")
    assert (await (await child.spawn(seven, parent=live)).wait(20)).state is TaskState.CANCELLED


@pytest.mark.parametrize("cancelled", ["first", "second"])
async def test_while_one_agent_of_a_session_lives_work_is_not_born_cancelled(
    store: TaskStore, parent: SessionTasks, cancelled: str
) -> None:
    child = await store.session("child", parent=parent)
    agents = {name: await agent(parent, "child", name) for name in ("first", "second")}
    await agents.pop(cancelled).cancel("enough")

    born = await child.spawn(seven)

    assert await born.result(20) == 7
    [live] = agents.values()
    assert not (await live.record()).is_terminal
    # nobody is left then
    await live.cancel("enough of this, too")
    assert (await (await child.spawn(seven)).wait(20)).state is TaskState.CANCELLED


# --- naming external work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["handle", "handle id", "JSON", "task id"])
async def test_external_work_is_named_by_whatever_names_a_task(
    store: TaskStore, session: SessionTasks, path: Path, form: str
) -> None:
    async def begin() -> tuple[TaskHandle, Any]:
        task = await session.register("e", OTHER)
        forms = {"handle": task, "handle id": task.handle_id, "JSON": task.to_json(), "task id": "e"}
        return task, forms[form]

    task, name = await begin()
    updated = await session.update(name, progress="half", fraction=0.5)
    assert (updated.verdict, updated.record.progress) == (Verdict.APPLIED, "half")
    flipped = await session.set_live_state(name, TaskState.WAITING)
    assert (flipped.verdict, flipped.record.state) == (Verdict.APPLIED, TaskState.WAITING)
    completed = await session.complete(name, TaskState.COMPLETED, result=[1])
    assert (completed.verdict, completed.record.result) == (Verdict.APPLIED, [1])
    assert (await task.record()).state is TaskState.COMPLETED

    task, name = await begin()
    await session.unregister(name)
    assert (await task.record()).state is TaskState.CANCELLED
    assert (await task.record()).cancel_reason == "unregistered"


async def test_a_handle_names_its_incarnation_and_not_the_one_that_reuses_its_id(session: SessionTasks) -> None:
    old = await session.register("e", OTHER)
    await session.complete(old, TaskState.COMPLETED)
    new = await session.register("e", OTHER)

    await session.unregister(old)
    late = await session.complete(old, TaskState.FAILED, failure="too late")

    assert (late.verdict, late.record.task_seq) == (Verdict.SUPERSEDED, old.task_seq)
    assert (await new.record()).state is TaskState.RUNNING
