"""Cancel of a whole session: everything live and everything that comes meanwhile, each reported on, none in another's way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    Recovery,
    SessionTasks,
    StoreClosed,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskMode,
    TaskRecord,
    TaskState,
    TaskStore,
    owners,
    transitions,
)
from lash_store.errors import StorageFull
from lash_store.owners import Life
from tests.runtime.support import RUNTIME, cancel_at, event_count, event_types, hold, next_event, rows, states

OTHER = TaskKind.OTHER
CANCELLED, REQUESTED = TaskState.CANCELLED, TaskState.CANCEL_REQUESTED
FOREVER = 3600.0


async def forever() -> None:
    """The body of work that only a cancel ends."""
    await asyncio.Event().wait()


async def until(release: asyncio.Event) -> None:
    """Swallow every cancellation until the event is set."""
    while not release.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await release.wait()


async def test_every_live_task_is_cancelled_whatever_its_mode_and_state(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(max_running=2)
    session = await store.session("s1")
    called: list[str] = []
    handles = [
        await session.spawn(hold(started, asyncio.Event()), id="running"),
        await session.spawn_hidden("hidden", forever()),
        await session.spawn(forever(), id="pending"),
        await session.register("booked", OTHER),
        await session.register("called", OTHER, lambda: called.append("called")),
        await session.register("waiting", OTHER),
    ]
    await started.wait()
    await session.set_live_state("waiting", TaskState.WAITING)

    reports = await session.cancel_all("all of you", timeout=20)

    assert [report.record.task_seq for report in reports] == [handle.task_seq for handle in handles]
    assert {(report.record.state, report.record.cancel_reason) for report in reports} == {(CANCELLED, "all of you")}
    assert {report.error for report in reports} == {None}
    assert [report.record for report in reports] == [await handle.record() for handle in handles]
    assert reports[1].record.mode is TaskMode.HIDDEN
    assert called == ["called"]
    assert await session.list(include_hidden=True) == []


async def test_an_empty_session_has_nothing_to_report(session: SessionTasks, path: Path) -> None:
    count = event_count(path)

    assert list(await session.cancel_all("all of you")) == []

    assert event_count(path) == count


async def test_what_had_ended_is_left_out_and_stays_as_it_was(session: SessionTasks, path: Path) -> None:
    done = await session.register("done", OTHER)
    await session.complete("done", TaskState.COMPLETED)
    live = await session.register("live", OTHER)

    reports = await session.cancel_all()

    assert [report.record.id for report in reports] == ["live"]
    assert (await live.record()).state is CANCELLED
    assert event_types(path, done.task_seq) == ["registered", "completed"]


async def test_other_sessions_go_on(store: TaskStore, session: SessionTasks, opened: Callable[..., Any]) -> None:
    others = [
        await (await store.session("s2")).register("job", OTHER),
        await (await (await opened(runtime="ci")).session("s1")).register("job", OTHER),
    ]
    await session.register("job", OTHER)

    await session.cancel_all()

    assert states([await other.record() for other in others]) == ["running", "running"]


async def test_a_body_that_finishes_first_is_reported_as_it_ended(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=FOREVER)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        started.set()
        await task.cancelled()
        return "in time"

    await session.spawn(work)
    await started.wait()

    [report] = await session.cancel_all(timeout=20)

    assert (report.record.state, report.record.result, report.error) == (TaskState.COMPLETED, "in time", None)


# --- what goes wrong ------------------------------------------------------------------------------------------------


async def test_a_callback_that_fails_stands_in_its_report_and_does_not_stop_the_rest(session: SessionTasks) -> None:
    def raises() -> None:
        raise ProcessLookupError("no such pid")

    await session.register("before", OTHER, lambda: None)
    await session.register("broken", OTHER, raises)
    await session.register("after", OTHER, lambda: None)
    await session.spawn(forever(), id="managed")

    reports = await session.cancel_all(timeout=20)

    assert states([report.record for report in reports]) == ["cancelled"] * 4
    assert [report.error and report.error.type for report in reports] == [None, "ProcessLookupError", None, None]
    assert reports[1].error == reports[1].record.callback_error


async def test_one_failing_cancel_does_not_stop_the_rest(
    session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_cancel = transitions.request_cancel

    def refused(tx: Any, task: Any, *arguments: Any) -> Any:
        if task.id == "stuck":
            raise StorageFull("no room for this one")
        return request_cancel(tx, task, *arguments)

    ids = ["first", "stuck", "last"]
    for task_id in ids:
        await session.spawn(forever(), id=task_id)
    monkeypatch.setattr(transitions, "request_cancel", refused)

    async with asyncio.timeout(20):
        reports = await session.cancel_all("all of you")

    assert [report.record.id for report in reports] == ids
    assert states([report.record for report in reports]) == ["cancelled", "running", "cancelled"]
    assert reports[1].error is not None
    assert (reports[1].error.type, reports[1].error.message) == ("StorageFull", "no room for this one")
    monkeypatch.undo()
    assert (await session.cancel("stuck")).state is CANCELLED


async def test_a_reason_that_cannot_be_stored_is_refused(session: SessionTasks, path: Path) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    for bad in ("a\0b", "\ud800", 7):
        with pytest.raises(ValueError):
            await session.cancel_all(bad)  # type: ignore[arg-type]

    assert event_count(path) == count


# --- time -----------------------------------------------------------------------------------------------------------


async def test_after_the_time_out_rows_come_as_they_stand(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def stubborn() -> None:
        started.set()
        await until(release)

    task = await session.spawn(stubborn(), id="stubborn")
    await session.register("booked", OTHER)
    await started.wait()

    reports = await session.cancel_all("all of you", timeout=0.5)

    assert states([report.record for report in reports]) == ["cancel_requested", "cancelled"]
    assert [report.error for report in reports] == [None, None]
    release.set()
    assert (await task.wait(20)).cancel_reason == "all of you"


async def test_without_any_time_to_wait_the_cancels_are_still_requested(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def stubborn() -> None:
        started.set()
        await until(release)

    tasks = [await session.spawn(stubborn(), id="stubborn"), await session.register("booked", OTHER)]
    await started.wait()

    reports = await session.cancel_all("all of you", timeout=0)

    asked = states([await task.record() for task in tasks])
    release.set()
    # the request comes first, the wait second: as cancel(timeout=0) does
    assert asked == ["cancel_requested", "cancelled"]
    assert [report.record.id for report in reports] == ["stubborn", "booked"]


# --- what comes meanwhile -------------------------------------------------------------------------------------------


async def test_it_outruns_bodies_that_keep_spawning(opened: Callable[..., Any]) -> None:
    store = await opened(cancel_grace=0.05, max_running=16)
    session = await store.session("s1")
    many = asyncio.Event()
    spawned: list[TaskHandle] = []

    @store.task(recovery=Recovery.RERUN)
    async def breeds(task: TaskContext, generation: int) -> None:
        # not its children: they are not covered by its own cancel
        while True:
            spawned.append(await session.spawn(breeds, generation + 1) if generation < 2 else await idle())
            if len(spawned) > 50:
                many.set()

    async def idle() -> TaskHandle:
        return await session.spawn(forever())

    first = await session.spawn(breeds, 0)
    async with asyncio.timeout(20):
        await many.wait()

        reports = await session.cancel_all("all of you")

    assert await session.list() == []
    assert {(report.record.state, report.error) for report in reports} == {(CANCELLED, None)}
    assert {handle.task_seq for handle in [first, *spawned]} <= {report.record.task_seq for report in reports}


async def test_bodies_that_spawn_a_successor_when_they_are_cancelled_are_outrun(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def relay(left: int) -> None:
        try:
            await forever()
        finally:
            if left:
                await session.spawn(relay(left - 1), id=f"t{left - 1}")

    await session.spawn(relay(10), id="t10")

    async with asyncio.timeout(20):
        reports = await session.cancel_all("all of you")

    assert [report.record.id for report in reports] == [f"t{left}" for left in range(10, -1, -1)]
    assert {report.record.state for report in reports} == {CANCELLED}
    assert await session.list() == []


@pytest.fixture
async def waiting(opened: Callable[..., Any], release: asyncio.Event) -> tuple[TaskStore, asyncio.Task[Any]]:
    """A store in whose first session a `cancel_all` waits for a callback that hangs until the release."""
    store: TaskStore = await opened(callback_timeout=FOREVER)
    session = await store.session("s1")
    called = asyncio.Event()

    async def stop() -> None:
        called.set()
        await release.wait()

    await session.register("slow", OTHER, stop)
    cancelling = asyncio.create_task(session.cancel_all("all of you"))
    async with asyncio.timeout(20):
        await called.wait()
    return store, cancelling


async def is_reached(late: TaskHandle, cancelling: asyncio.Task[Any], release: asyncio.Event) -> None:
    """See that the task is cancelled while another is still waited for, and reported with it."""
    async with asyncio.timeout(20):
        assert (await late.wait()).cancel_reason == "all of you"
        assert not cancelling.done()
        release.set()

        assert {report.record.id for report in await cancelling} == {"slow", late.id}


async def test_what_is_registered_while_it_waits_is_reached(
    waiting: tuple[TaskStore, asyncio.Task[Any]], release: asyncio.Event
) -> None:
    store, cancelling = waiting

    late = await (await store.session("s1")).register("late", OTHER, lambda: None)

    await is_reached(late, cancelling, release)


async def test_what_is_transferred_here_while_it_waits_is_reached(
    waiting: tuple[TaskStore, asyncio.Task[Any]], release: asyncio.Event
) -> None:
    store, cancelling = waiting
    other = await store.session("s2")
    moved = await other.register("moved", OTHER, lambda: None)

    await other.transfer(await store.session("s1"), ["moved"])

    await is_reached(moved, cancelling, release)


async def test_what_another_process_registers_while_it_waits_is_reached(
    waiting: tuple[TaskStore, asyncio.Task[Any]], opened: Callable[..., Any], release: asyncio.Event
) -> None:
    _, cancelling = waiting
    theirs = await (await opened()).session("s1")

    late = await theirs.register("late", OTHER, lambda: None)

    await is_reached(late, cancelling, release)


# --- who asks -------------------------------------------------------------------------------------------------------


async def test_several_at_once_report_the_same(session: SessionTasks, path: Path) -> None:
    tasks = [await session.spawn(forever()) for _ in range(5)]

    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(session.cancel_all(str(number)) for number in range(5)))

    assert {report.record.state for reports in answers for report in reports} == {CANCELLED}
    for task in tasks:
        assert event_types(path, task.task_seq).count("cancel_requested") == 1
    assert [report.record.task_seq for report in answers[0]] == [task.task_seq for task in tasks]


async def test_who_connects_may_cancel_the_session_of_a_live_owner(
    session: SessionTasks, started: asyncio.Event, path: Path
) -> None:
    called: list[str] = []
    await session.spawn(hold(started, asyncio.Event()), id="managed")
    await session.register("external", OTHER, lambda: called.append("external"))
    await started.wait()
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        reports = await (await asking.session("s1")).cancel_all("from outside")

    assert [(report.record.id, str(report.record.state)) for report in reports] == [
        ("managed", "cancelled"),
        ("external", "cancelled"),
    ]
    assert called == ["external"]


async def test_work_nobody_keeps_does_not_hold_it_up(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.register("with", OTHER, lambda: None)
        await session.register("without", OTHER)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        reports = await (await asking.session("s1")).cancel_all("from outside")

    assert states([report.record for report in reports]) == ["cancel_requested", "cancelled"]
    assert [report.error for report in reports] == [None, None]


async def test_a_body_may_cancel_its_own_session(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1, cancel_grace=0.05)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def ends_all(task: TaskContext) -> None:
        await session.spawn(forever(), id="pending")
        await session.cancel_all("all of us")

    task = await session.spawn(ends_all, id="ends all")

    record = await task.wait(20)

    assert (record.state, record.cancel_reason) == (CANCELLED, "all of us")
    assert await session.list() == []


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
async def test_a_cancelled_caller_leaves_every_row_and_body_in_agreement(
    store: TaskStore, session: SessionTasks, late: bool
) -> None:
    reached = 0
    for at in itertools.count(1):
        called: list[str] = []

        async def stop(record: TaskRecord, called: list[str] = called) -> None:
            await store.session("behind it in the queue")
            called.append(record.id)

        managed = await session.spawn(forever(), id="managed")
        external = await session.register("external", OTHER, stop)
        stepped = await cancel_at(session.cancel_all("stop"), at, late=late)
        assert stepped.error is None or stepped.was_cancelled, stepped.error
        await store.session("behind it, too")

        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not {name for name in names if name.startswith(("lash_store cancel", "lash_store arrivals"))}
        for handle in (managed, external):
            record = await handle.record()
            if record.cancel_requested_at is None:
                assert stepped.was_cancelled
                assert record.state is TaskState.RUNNING
            else:
                reached += 1
                assert (await handle.wait(20)).state is CANCELLED
        asked = (await external.record()).cancel_requested_at is not None
        assert called == (["external"] if asked else [])
        async with asyncio.timeout(20):
            await session.cancel_all("the rest")
        if not stepped.reached:
            assert at > 2, "it was never suspended: nothing was tested"
            break
    assert reached > 2


@pytest.mark.parametrize("waits", [False, True], ids=["just asked", "waiting"])
async def test_a_store_that_closes_wakes_who_waits_for_all(
    new: Callable[..., TaskStore], started: asyncio.Event, release: asyncio.Event, waits: bool, path: Path
) -> None:
    made: list[asyncio.Task[Any]] = []

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(asyncio.Task(coroutine, loop=loop, **options))
        return made[-1]

    async def stubborn() -> None:
        started.set()
        await until(release)

    async with new() as store:
        session = await store.session("s1")
        await session.spawn(stubborn(), id="stubborn")
        asyncio.get_running_loop().set_task_factory(make)
        try:
            async with asyncio.timeout(20):
                await started.wait()
                waiting = asyncio.create_task(session.cancel_all("all of you"))
                while rows(path, "SELECT state FROM tasks") != [{"state": "cancel_requested"}]:
                    await asyncio.sleep(0)
                while waits and "lash_store arrivals" not in {task.get_name() for task in asyncio.all_tasks()}:
                    await asyncio.sleep(0)
                with pytest.warns(ResourceWarning, match="stubborn"):
                    await store.close(timeout=0.1)

                with pytest.raises(StoreClosed):
                    await waiting
        finally:
            release.set()
            asyncio.get_running_loop().set_task_factory(None)
    # asyncio complains of exceptions nobody has looked at, when it collects the tasks that had them
    unseen = [task.get_name() for task in made if task._log_traceback]
    await asyncio.gather(*made, return_exceptions=True)
    assert unseen == []


# --- owners that are gone ---------------------------------------------------------------------------------------------


def die(path: Path) -> None:
    """Let the owners that this process has on a file look dead to whoever asks: their locks are free."""
    for lock in [lock for lock in owners._ours.values() if lock._database == path]:
        lock.release()


async def family(session: SessionTasks, there: SessionTasks, release: asyncio.Event) -> list[TaskHandle]:
    """Return work that does not stop when it is asked to: a parent, its child, and what works for a sub-agent."""

    async def stubborn() -> None:
        await until(release)

    parent = await session.spawn(stubborn(), id="parent", close_policy="cancel")
    child = await session.spawn(stubborn(), id="child", parent=parent)
    agent = await session.spawn(stubborn(), id="agent", parent=child, child_session_id="s2")
    return [parent, child, agent, await there.spawn_hidden("hidden", stubborn())]


@pytest.mark.parametrize("how", ["cancel", "cancel_all", "close", "cancel_unreferenced", "handoff"])
@pytest.mark.parametrize("timeout", [None, 0])
async def test_the_whole_family_of_a_dead_owners_work_is_ended_by_who_asks(
    store: TaskStore,
    session: SessionTasks,
    there: SessionTasks,
    release: asyncio.Event,
    path: Path,
    how: str,
    timeout: float | None,
) -> None:
    await store.session("s3")
    tasks = await family(session, there, release)
    die(path)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        from_outside = await asking.session("s1")
        match how:
            case "cancel":
                await from_outside.cancel("parent", timeout=timeout)
            case "cancel_all":
                await from_outside.cancel_all(timeout=timeout)
            case "close":
                await from_outside.close(timeout=timeout)
            case "cancel_unreferenced":
                await from_outside.cancel_unreferenced([])
            case "handoff":
                await from_outside.handoff("s3", [])

    found = states([await task.record() for task in tasks])
    release.set()
    assert found == ["cancelled"] * 4


async def test_the_family_is_ended_too_if_its_owner_dies_while_its_end_is_awaited(
    store: TaskStore, session: SessionTasks, there: SessionTasks, release: asyncio.Event, path: Path
) -> None:
    tasks = await family(session, there, release)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        cancelling = asyncio.create_task((await asking.session("s1")).cancel("parent"))
        # one commit asks all of them
        await next_event(store, EventType.CANCEL_REQUESTED)
        assert states([await task.record() for task in tasks]) == ["cancel_requested"] * 4
        die(path)
        assert (await cancelling).state is CANCELLED

    found = states([await task.record() for task in tasks])
    release.set()
    assert found == ["cancelled"] * 4


@pytest.mark.parametrize("how", ["cancel_all", "handoff", "cancel_unreferenced", "close"])
async def test_a_look_at_dead_owners_that_fails_undoes_nothing_and_hides_nothing(
    store: TaskStore,
    session: SessionTasks,
    release: asyncio.Event,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    async def stubborn() -> None:
        await until(release)

    task = await session.spawn(stubborn(), id="stubborn", close_policy="cancel")
    await store.session("s2")
    die(path)

    def no_descriptors(*_: Any) -> Life:
        raise OSError(24, "Too many open files")

    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        from_outside = await asking.session("s1")
        monkeypatch.setattr(owners, "life_of", no_descriptors)
        match how:
            case "cancel_all":
                [report] = await from_outside.cancel_all(timeout=0.5)
                assert report.error is not None
                assert "Too many open files" in report.error.message
            case "handoff":
                assert [one.id for one in (await from_outside.handoff("s2", [])).cancelled] == ["stubborn"]
            case "cancel_unreferenced":
                assert [one.id for one in await from_outside.cancel_unreferenced([])] == ["stubborn"]
            case "close":
                with pytest.raises(OSError, match="Too many"):
                    await from_outside.close(timeout=0.5)

    asked = (await task.record()).state
    release.set()
    assert asked is TaskState.CANCEL_REQUESTED
