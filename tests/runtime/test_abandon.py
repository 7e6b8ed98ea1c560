"""Giving work up by a person's decision: a stuck body, or a whole owner, is fenced out, and what it still does is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    CancelPolicy,
    EventType,
    HandleNotVisible,
    Recovery,
    SessionTasks,
    StaleAttempt,
    StoreClosed,
    StoreError,
    TaskAbandoned,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
)
from tests.runtime.support import RUNTIME, event_count, event_types, hold, next_event, rows

OTHER = TaskKind.OTHER
ABANDONED, PENDING, RUNNING = TaskState.ABANDONED, TaskState.PENDING, TaskState.RUNNING


class Stuck:
    """
    A body that swallows every cancellation until *release* is set, and then writes.

    What became of its writes, and how often it began, is noted.
    """

    def __init__(self) -> None:
        self.attempts: list[int] = []
        self.refused: list[str] = []
        self.saved: list[str] = []
        self.began = asyncio.Event()
        self.release = asyncio.Event()
        self.done = asyncio.Event()

    def register(self, store: TaskStore, recovery: Recovery = Recovery.RERUN, name: str = "stuck") -> Any:
        """Register the body with a store; a later attempt than the first returns at once."""

        @store.task(recovery=recovery, name=name)
        async def stuck(task: TaskContext) -> str:
            self.attempts.append(task.attempt)
            self.began.set()
            if len(self.attempts) > 1:
                return f"attempt {task.attempt}"
            while not self.release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.release.wait()
            for write in (task.save, task.progress, task.notify):
                await self._try(write)
            self.done.set()
            return "stale"

        return stuck

    async def _try(self, write: Callable[[str], Awaitable[None]]) -> None:
        """Write, whether or not it is being stopped meanwhile."""
        try:
            await write("too late")
        except asyncio.CancelledError:
            await self._try(write)
        except StaleAttempt as error:
            self.refused.append(type(error).__name__)
        else:
            self.saved.append("too late")

    async def has_begun(self) -> None:
        async with asyncio.timeout(20):
            await self.began.wait()

    async def goes_on(self) -> None:
        """Let it go on, and wait until it has tried to write."""
        self.release.set()
        async with asyncio.timeout(20):
            await self.done.wait()


@pytest.fixture
async def stuck() -> AsyncIterator[Stuck]:
    """A body that does not stop; let go when the test is over."""
    stuck = Stuck()
    yield stuck
    stuck.release.set()


def never_called() -> None:
    """A callback of work that is abandoned; its begin would be an event."""
    raise AssertionError("the callback was called")


async def ended(handle: TaskHandle) -> Any:
    """Wait for the end of a task and return its row."""
    record = await handle.wait(20)
    assert record.is_terminal, record
    return record


# --- one task -------------------------------------------------------------------------------------------------------


async def test_a_stuck_body_that_may_run_again_is_fenced_out_and_its_row_is_free(
    store: TaskStore, session: SessionTasks, stuck: Stuck, path: Path
) -> None:
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()

    record = await session.abandon("t", "it hangs")

    assert (record.state, record.owner_id, record.attempt, record.attempts_spent) == (PENDING, None, 2, 0)
    assert event_types(path, task.task_seq) == ["registered", "started", "released"]
    [event] = rows(path, "SELECT data ->> 'reason' AS reason FROM events WHERE type = 'released'")
    assert event == {"reason": "it hangs"}
    await stuck.goes_on()
    assert (stuck.refused, stuck.saved) == (["StaleAttempt"] * 3, [])
    assert await task.record() == record


async def test_what_was_given_up_is_run_by_the_next_recover(
    store: TaskStore, session: SessionTasks, stuck: Stuck, path: Path
) -> None:
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    await session.abandon("t", "it hangs")

    report = await store.recover()

    assert [record.id for record in report.reattached] == ["t"]
    assert await task.result(20) == "attempt 3"
    await stuck.goes_on()
    assert (stuck.attempts, stuck.saved) == ([1, 3], [])
    record = await task.record()
    assert (record.state, record.result, record.attempt) == (TaskState.COMPLETED, "attempt 3", 3)
    assert event_types(path, task.task_seq).count("completed") == 1


async def test_what_was_given_up_is_taken_once_while_peers_live(
    store: TaskStore, session: SessionTasks, stuck: Stuck, new: Callable[..., TaskStore], path: Path
) -> None:
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    peers = [new() for _ in range(2)]
    for peer in peers:
        stuck.register(peer)
    async with peers[0], peers[1]:
        await session.abandon("t", "it hangs")

        # by whichever sees it first, its old owner included
        assert await task.result(20) == "attempt 3"

    await stuck.goes_on()
    assert (stuck.attempts, stuck.saved) == ([1, 3], [])
    assert event_types(path, task.task_seq).count("completed") == 1


async def test_a_stuck_body_that_was_given_up_leaves_its_slot(opened: Callable[..., Any], stuck: Stuck) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    pending = await session.spawn(asyncio.sleep(0, "ran"), id="pending")

    await session.abandon("t", "it hangs")

    assert await pending.result(20) == "ran"
    await store.recover()
    assert await task.result(20) == "attempt 3"


async def test_what_was_given_up_keeps_its_place_when_the_stuck_body_ends(
    opened: Callable[..., Any], stuck: Stuck, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    await session.abandon("t", "it hangs")
    holder = await session.spawn(release.wait(), id="holder")
    await store.recover()

    await stuck.goes_on()
    await store.session("behind what the stuck body left")
    release.set()

    assert (await holder.wait(20)).state is TaskState.COMPLETED
    record = await task.wait(5)
    assert (record.state, record.result) == (TaskState.COMPLETED, "attempt 3")


async def test_a_stuck_body_that_was_succeeded_is_still_named_when_the_store_closes(
    new: Callable[..., TaskStore], stuck: Stuck
) -> None:
    async with new() as store:
        session = await store.session("s1")
        task = await session.spawn(stuck.register(store), id="t")
        await stuck.has_begun()
        await session.abandon("t", "it hangs")
        await store.recover()
        assert await task.result(20) == "attempt 3"

        with pytest.warns(ResourceWarning, match="desktop:s1/t"):
            await store.close(timeout=0.1)

    stuck.release.set()


async def test_a_waiter_of_what_was_freed_waits_on_for_the_true_end(
    store: TaskStore, session: SessionTasks, stuck: Stuck
) -> None:
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    waiting = asyncio.create_task(task.result(20))

    await session.abandon("t", "it hangs")

    assert (await task.wait(0.01)).state is PENDING
    assert not waiting.done()
    await store.recover()
    assert await waiting == "attempt 3"


@pytest.mark.parametrize("bare", [False, True])
async def test_a_stuck_body_bound_to_its_owner_is_abandoned_with_the_reason(
    store: TaskStore, session: SessionTasks, stuck: Stuck, release: asyncio.Event, bare: bool, path: Path
) -> None:
    work = stuck.register(store, Recovery.OWNER_BOUND)
    began = asyncio.Event()
    task = await session.spawn(hold(began, release) if bare else work, id="t")
    async with asyncio.timeout(20):
        await (began if bare else stuck.began).wait()
    waiting = asyncio.create_task(task.result(20))

    record = await session.abandon("t", "it hangs")

    assert (record.state, record.attempt) == (ABANDONED, 2)
    assert record.evidence is not None
    assert (record.evidence.owner_id, record.evidence.end, record.evidence.reason) == (1, "abandoned", "it hangs")
    assert record.evidence.by is not None
    assert record.evidence.by.startswith("desktop pid")
    with pytest.raises(TaskAbandoned, match="it hangs") as raised:
        await waiting
    assert raised.value.evidence == record.evidence
    if not bare:
        await stuck.goes_on()
    assert stuck.saved == []
    assert await task.record() == record
    assert event_types(path, task.task_seq) == ["registered", "started", "abandoned"]


async def test_a_body_learns_that_it_was_given_up(store: TaskStore, session: SessionTasks) -> None:
    reasons: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    began = asyncio.Event()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def work(task: TaskContext) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            reasons.set_result((task.stop_reason, task.cancel_requested))

    await session.spawn(work, id="t")
    await began.wait()

    await session.abandon("t", "not wanted")

    async with asyncio.timeout(20):
        assert await reasons == ("stale", False)


async def test_a_body_whose_task_was_freed_and_taken_again_before_its_process_noticed_is_stopped(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: asyncio.Queue[TaskContext] = asyncio.Queue()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        began.put_nowait(task)
        await asyncio.Event().wait()

    async def see_nothing() -> bool:
        return False

    task = await session.spawn(work, id="t")
    first = await began.get()
    assert store._core is not None
    monkeypatch.setattr(store._core.feed, "_changed", see_nothing)
    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        await (await outside.session("s1")).abandon("t", "looked stuck")
    assert first.stop_reason is None

    await store.recover()

    async with asyncio.timeout(20):
        second = await began.get()
    assert (first.stop_reason, second.stop_reason, second.attempt) == ("stale", None, 3)
    assert event_types(path, task.task_seq) == ["registered", "started", "released", "reattached"]


@pytest.mark.parametrize("recovery", [Recovery.RERUN, Recovery.OWNER_BOUND])
async def test_a_task_whose_cancel_does_not_come_to_an_end_is_abandoned(
    opened: Callable[..., Any], stuck: Stuck, recovery: Recovery, path: Path
) -> None:
    store = await opened(cancel_grace=0.01)
    session = await store.session("s1")
    task = await session.spawn(stuck.register(store, recovery), id="t", cancel_policy=CancelPolicy.ABORT_LOCAL)
    await stuck.has_begun()
    canceller = asyncio.create_task(session.cancel("t", "enough"))
    await next_event(store, EventType.CANCEL_REQUESTED)

    record = await session.abandon("t", "it does not stop")

    # work whose end was asked for is not begun again
    assert (record.state, record.cancel_reason) == (ABANDONED, "enough")
    async with asyncio.timeout(20):
        assert (await canceller).state is ABANDONED
    await stuck.goes_on()
    assert stuck.saved == []
    await store.recover()
    assert stuck.attempts == [1]
    assert event_types(path, task.task_seq) == ["registered", "started", "cancel_requested", "abandoned"]


@pytest.mark.parametrize("what", ["rerun", "owner_bound", "bare"])
async def test_work_that_waits_for_a_slot_can_be_given_up(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, what: str, path: Path
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    ran: list[int] = []

    @store.task(recovery=Recovery.RERUN if what == "rerun" else Recovery.OWNER_BOUND)
    async def work(task: TaskContext) -> None:
        ran.append(task.attempt)

    async def bare() -> None:
        ran.append(0)

    await session.spawn(hold(started, release), id="holder")
    await started.wait()
    coroutine = bare()
    task = await session.spawn(coroutine if what == "bare" else work, id="t")

    record = await session.abandon("t", "never mind")

    expected = (PENDING, None, 0) if what == "rerun" else (ABANDONED, 1, 0)
    assert (record.state, record.owner_id, record.attempt) == expected
    release.set()
    await (await session.handle("holder")).wait(20)
    await (await session.spawn(asyncio.sleep(0)))
    assert ran == []
    if what == "rerun":
        await store.recover()
        assert (await ended(task)).state is TaskState.COMPLETED
        assert ran == [1]
    coroutine.close()
    count = event_count(path)
    assert (await session.abandon("t", "again")).is_terminal
    assert event_count(path) == count


async def test_giving_up_what_is_free_already_changes_nothing(
    store: TaskStore, session: SessionTasks, stuck: Stuck, path: Path
) -> None:
    await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    record = await session.abandon("t", "it hangs")
    count = event_count(path)

    assert await session.abandon("t", "it still hangs") == record

    assert event_count(path) == count


@pytest.mark.parametrize("state", [RUNNING, TaskState.WAITING, TaskState.CANCEL_REQUESTED])
async def test_external_work_is_abandoned_and_its_callback_is_not_called(
    session: SessionTasks, release: asyncio.Event, state: TaskState, path: Path
) -> None:
    called = asyncio.Event()

    async def stop() -> None:
        called.set()
        await release.wait()

    task = await session.register("job", OTHER, stop)
    if state is TaskState.CANCEL_REQUESTED:
        await session.cancel("job", "enough", timeout=0)
        async with asyncio.timeout(20):
            await called.wait()
    else:
        await session.set_live_state("job", state)
    waiting = asyncio.create_task(task.result(20))

    record = await session.abandon("job", "its host is gone")

    assert (record.state, record.attempt) == (ABANDONED, 0)
    assert record.evidence is not None
    assert record.evidence.reason == "its host is gone"
    with pytest.raises(TaskAbandoned, match="its host is gone"):
        await waiting
    # what the callback leaves, or a later cancel, adds nothing
    release.set()
    assert await session.cancel("job", "late") == record
    assert (await session.register("job", OTHER)).task_seq != task.task_seq
    assert event_types(path, task.task_seq)[-1] == "abandoned"
    assert called.is_set() == (state is TaskState.CANCEL_REQUESTED)


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "abandoned"])
async def test_abandon_of_a_finished_task_returns_it_unchanged(
    store: TaskStore, session: SessionTasks, state: str, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        if state == "failed":
            raise RuntimeError("broken")
        if state == "cancelled":
            await asyncio.Event().wait()

    await session.register("job", OTHER)
    if state == "abandoned":
        task = await session.handle("job")
        await session.abandon("job", "first")
    else:
        task = await session.spawn(work, id="t", cancel_policy=CancelPolicy.ABORT_LOCAL)
        await (task.cancel() if state == "cancelled" else task.wait(20))
    record, count = await task.record(), event_count(path)
    assert record.state == state

    assert await session.abandon(task, "too late") == record

    assert event_count(path) == count


async def test_an_old_coroutine_cannot_close_a_new_task_that_reuses_its_id(
    store: TaskStore, session: SessionTasks, stuck: Stuck, release: asyncio.Event, path: Path
) -> None:
    old = await session.spawn(stuck.register(store, Recovery.OWNER_BOUND), id="t")
    await stuck.has_begun()
    await session.abandon("t", "it hangs")
    began = asyncio.Event()
    new = await session.spawn(hold(began, release), id="t")
    await began.wait()

    await stuck.goes_on()

    await session.update(new, progress="behind all that the old one wrote")
    assert stuck.saved == []
    assert (await new.record()).state is RUNNING
    assert (await old.record()).state is ABANDONED
    assert await old.cancel("late") == await old.record()
    release.set()
    assert (await ended(new)).state is TaskState.COMPLETED
    assert [event_types(path, task.task_seq)[-1] for task in (old, new)] == ["abandoned", "completed"]


async def test_children_of_what_is_given_up_live_on(session: SessionTasks) -> None:
    parent = await session.register("parent", OTHER)
    child = await session.register("child", OTHER, parent=parent)

    await session.abandon("parent", "gone")

    born_later = await session.register("born later", OTHER, parent=parent)
    assert [(await one.record()).state for one in (child, born_later)] == [RUNNING, RUNNING]


async def test_an_observer_gives_nothing_up(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await session.register("job", OTHER)
    other = await store.session("s2")
    seen = await other.observe(session, "job")
    count = event_count(path)

    with pytest.raises(HandleNotVisible):
        await other.abandon(seen, "not mine")

    assert event_count(path) == count


@pytest.mark.parametrize("bad", ["a\0b", "\ud800", None, 7])
async def test_a_reason_that_cannot_be_stored_is_refused(
    store: TaskStore, session: SessionTasks, bad: Any, path: Path
) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(ValueError):
        await session.abandon("job", bad)
    with pytest.raises(ValueError):
        await store.abandon_owner(7, bad)

    assert event_count(path) == count


# --- from connect() -------------------------------------------------------------------------------------------------


async def test_a_stuck_body_of_another_store_is_given_up_by_who_connects_and_begun_again(
    store: TaskStore, session: SessionTasks, stuck: Stuck, path: Path
) -> None:
    task = await session.spawn(stuck.register(store), id="t")
    await stuck.has_begun()
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        record = await (await asking.session("s1")).abandon("t", "it hangs")
        assert (record.state, record.owner_id, record.attempt) == (PENDING, None, 2)

    # its owner sees that it was freed, and that it may run
    assert await task.result(20) == "attempt 3"
    await stuck.goes_on()
    assert (stuck.attempts, stuck.saved) == ([1, 3], [])


@pytest.mark.parametrize("external", [False, True], ids=["owner_bound", "external"])
async def test_waiters_in_every_store_wake_when_who_connects_gives_work_up(
    store: TaskStore, session: SessionTasks, stuck: Stuck, opened: Callable[..., Any], external: bool, path: Path
) -> None:
    if external:
        task = await session.register("t", OTHER, never_called)
    else:
        task = await session.spawn(stuck.register(store, Recovery.OWNER_BOUND), id="t")
        await stuck.has_begun()
    other = await (await opened()).handle("desktop:s1", "t")
    async with TaskStore.open_readonly(path) as reader, TaskStore.connect(path, runtime=RUNTIME) as asking:
        handles = [task, other, await reader.handle("desktop:s1", "t")]
        waiting = [asyncio.create_task(handle.wait(20)) for handle in handles]

        record = await (await asking.session("s1")).abandon("t", "gone")

        assert await asyncio.gather(*waiting) == [record] * 3
    assert record.state is ABANDONED
    if not external:
        await stuck.goes_on()
        assert stuck.saved == []
    assert event_types(path, task.task_seq)[-1] == "abandoned"


# --- a whole owner --------------------------------------------------------------------------------------------------


async def test_an_owner_that_is_given_up_loses_all_its_work_and_creates_no_more(
    opened: Callable[..., Any], stuck: Stuck, path: Path
) -> None:
    store = await opened(max_running=2)
    session = await store.session("s1")
    called: list[str] = []
    began = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def stays(task: TaskContext) -> None:
        began.set()
        await asyncio.Event().wait()

    await session.spawn(stuck.register(store, Recovery.OWNER_BOUND), id="bound")
    await session.spawn(stays, id="rerun")
    await stuck.has_begun()
    await began.wait()
    await session.spawn(stays, id="pending")
    await session.spawn(asyncio.sleep(0), id="bare")
    await session.register("with", OTHER, lambda: called.append("old"))
    await session.register("without", OTHER)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        report = await asking.abandon_owner(1, "it hangs")

    assert [record.id for record in report.abandoned] == ["bound", "bare"]
    assert [record.id for record in report.released] == ["rerun", "pending", "with", "without"]
    assert [(record.state, record.attempt) for record in report.released] == [
        (PENDING, 2),
        (PENDING, 0),
        (RUNNING, 0),
        (RUNNING, 0),
    ]
    assert {record.owner_id for record in report.released} == {None}
    assert {record.evidence.reason for record in report.abandoned if record.evidence} == {"it hangs"}
    [owner] = rows(path, "SELECT end, ended_at FROM owners")
    assert (owner["end"], owner["ended_at"] is not None) == ("abandoned", True)
    await stuck.goes_on()
    assert stuck.saved == []
    count = event_count(path)
    for refused in (
        session.spawn(asyncio.sleep(0)),
        session.spawn(stays, id="again"),
        session.spawn_hidden("hidden", asyncio.sleep(0)),
        session.register("job", OTHER),
        session.register("with", OTHER, lambda: called.append("again")),
    ):
        with pytest.raises(StoreClosed, match="given up"):
            await refused
    assert await store.recover() == type(report)()
    assert event_count(path) == count
    assert called == []


async def test_an_owner_is_given_up_once(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await session.register("job", OTHER)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        first = await asking.abandon_owner(1, "it hangs")
        before, count = rows(path, "SELECT * FROM owners"), event_count(path)

        second = await asking.abandon_owner(1, "once more")

    assert [record.id for record in first.released] == ["job"]
    assert second == type(second)()
    assert rows(path, "SELECT * FROM owners") == before
    assert event_count(path) == count


async def test_external_work_of_an_owner_that_is_given_up_is_bound_to_its_next_keeper(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any], path: Path
) -> None:
    called: list[str] = []
    task = await session.register("job", OTHER, lambda: called.append("old"))
    peer = await opened()
    await peer.abandon_owner(1, "it hangs")

    bound = await (await peer.session("s1")).register("job", OTHER, lambda: called.append("new"))

    assert bound.task_seq == task.task_seq
    # the one that was given up still sees the file, and asks, but it is no longer its callback that is called
    async with asyncio.timeout(20):
        assert (await session.cancel("job", "enough")).state is TaskState.CANCELLED
    assert called == ["new"]
    assert event_types(path, task.task_seq) == [
        "registered",
        "released",
        "reattached",
        "cancel_requested",
        "state_changed",
        "cancelled",
    ]


async def test_a_callback_that_runs_in_an_owner_that_is_given_up_counts_as_cut_off(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any], release: asyncio.Event, path: Path
) -> None:
    called = asyncio.Event()

    async def stop() -> None:
        called.set()
        await release.wait()

    task = await session.register("job", OTHER, stop)
    await session.cancel("job", "enough", timeout=0)
    async with asyncio.timeout(20):
        await called.wait()
        peer = await opened()

        await peer.abandon_owner(1, "it hangs")

        record = await task.wait()
    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "enough")
    assert record.callback_error is not None
    assert record.callback_error.type == "CallbackCutOff"
    release.set()
    await session.update("job", progress="behind what the callback leaves")
    assert await task.record() == record
    assert event_types(path, task.task_seq)[-2:] == ["callback_failed", "cancelled"]


async def test_a_cancel_whose_callback_an_owner_did_not_begin_stands_when_it_is_given_up(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any], path: Path
) -> None:
    called: list[str] = []
    task = await session.register("job", OTHER, lambda: called.append("old"))
    assert store._core is not None
    assert store._core.callbacks is not None
    store._core.callbacks._closing = True  # it is stuck: it begins nothing
    await session.cancel("job", "enough", timeout=0)
    peer = await opened()

    report = await peer.abandon_owner(1, "it hangs")

    assert [(record.id, record.state, record.owner_id) for record in report.released] == [
        ("job", TaskState.CANCEL_REQUESTED, None)
    ]
    store._core.callbacks._closing = False
    bound = await (await peer.session("s1")).register("job", OTHER, lambda: called.append("new"))
    assert (await ended(bound)).state is TaskState.CANCELLED
    assert (bound.task_seq, called) == (task.task_seq, ["new"])
    [event] = rows(path, "SELECT data ->> 'reason' AS reason FROM events WHERE type = 'released'")
    assert event == {"reason": "owner_abandoned"}


async def test_an_owner_that_is_not_there_or_is_the_asker_is_not_given_up(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(StoreError, match="this store itself"):
        await store.abandon_owner(1, "me")
    with pytest.raises(StoreError, match="7"):
        await store.abandon_owner(7, "nobody")

    assert event_count(path) == count
    assert rows(path, "SELECT ended_at FROM owners") == [{"ended_at": None}]


async def test_an_owner_that_has_ended_is_left_as_it_is(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        await (await store.session("s1")).register("job", OTHER)
    async with new() as store:
        before, count = rows(path, "SELECT * FROM owners"), event_count(path)

        report = await store.abandon_owner(1, "long gone")

        assert report == type(report)()
        assert rows(path, "SELECT * FROM owners") == before
        assert event_count(path) == count


async def test_an_owner_that_was_given_up_closes_and_opens_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await session.register("job", OTHER)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        await asking.abandon_owner(1, "it hangs")

    await store.close()
    await store.open()

    again = await store.session("s1")
    assert (await again.register("job", OTHER)).task_seq == 1
    assert await (await again.spawn(asyncio.sleep(0, "fine"))) == "fine"
    assert [row["end"] for row in rows(path, "SELECT end FROM owners")] == ["abandoned", None]
