"""External work: somebody else does it and the store keeps the books; the first end stands, and the books find a new keeper."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lash_store import (
    EventType,
    Failure,
    IdempotencyConflict,
    InvalidArguments,
    InvalidId,
    Recovery,
    ResultNotSerializable,
    Scope,
    SessionClosed,
    SessionTasks,
    StoreReadOnly,
    TaskCancelled,
    TaskContext,
    TaskError,
    TaskExists,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskKind,
    TaskMode,
    TaskNotFound,
    TaskRecord,
    TaskState,
    TaskStore,
    UnknownSession,
    Verdict,
)
from tests.runtime.support import RUNTIME, cancel_at, event_count, event_types, hold, rows, states, take

OTHER = TaskKind.OTHER
RUNNING, WAITING = TaskState.RUNNING, TaskState.WAITING
COMPLETED, FAILED, CANCELLED = TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED
ENDS = [COMPLETED, FAILED, CANCELLED, TaskState.ABANDONED]


def uncalled() -> None:
    """A callback that no test may see called."""
    raise AssertionError("the callback was called")


async def end(session: SessionTasks, task_id: str, state: TaskState) -> TaskRecord:
    """End external work in one of the four ways."""
    if state is TaskState.ABANDONED:
        return await session.abandon(task_id, "nobody knows")
    said = {"result": {"n": 1}} if state is COMPLETED else {"failure": "broken"} if state is FAILED else {}
    return (await session.complete(task_id, state, **said)).record


async def requested(session: SessionTasks, task_id: str) -> asyncio.Event:
    """Register work and request its cancel; its callback is running and returns once the event is set."""
    release, called = asyncio.Event(), asyncio.Event()

    async def stop() -> None:
        called.set()
        await release.wait()

    await session.register(task_id, OTHER, stop)
    await session.cancel(task_id, "asked", timeout=0)
    async with asyncio.timeout(20):
        await called.wait()
    return release


# --- register -------------------------------------------------------------------------------------------------------


async def test_registered_work_is_running_and_durable_when_register_returns(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", TaskKind.MONITOR, label="the job")

    [row] = rows(path, "SELECT * FROM tasks")
    assert (row["task_seq"], row["id"], row["state"], row["mode"]) == (handle.task_seq, "job", "running", "external")
    record = await session.get("job")
    assert (record.kind, record.mode, record.recovery) == (TaskKind.MONITOR, TaskMode.EXTERNAL, Recovery.EXTERNAL)
    assert (record.attempt, record.label, record.function, record.has_callback) == (0, "the job", None, False)
    assert record.started_at is not None
    assert await handle.record() == record
    assert await session.list() == [record]
    assert event_types(path, handle.task_seq) == ["registered"]


@pytest.mark.parametrize("given", ["job", "a:b", "Größe ∞", "x" * 256, " spaced ", "H-upper", "-"])
async def test_the_id_returned_is_the_id_registered(session: SessionTasks, given: str, path: Path) -> None:
    external = await session.register(given, OTHER)
    await session.complete(given, COMPLETED)
    managed = await session.spawn(asyncio.sleep(0), id=given)

    assert [handle.id for handle in (external, managed)] == [given, given]
    assert [row["id"] for row in rows(path, "SELECT id FROM tasks")] == [given, given]
    assert (await session.get(given)).task_seq == managed.task_seq
    assert (await session.handle(given)).handle_id == managed.handle_id
    await managed


async def test_a_generated_id_names_the_function_and_is_the_one_stored(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def index(task: TaskContext) -> str:
        return task.id

    handles = [await session.spawn(index) for _ in range(3)]

    assert [await handle for handle in handles] == [handle.id for handle in handles]
    assert len({handle.id for handle in handles}) == 3
    assert all(re.fullmatch(r"index-[a-z2-7]{12}", handle.id) for handle in handles)


async def test_an_id_may_be_used_again_once_its_task_has_ended_and_both_stay_known(
    session: SessionTasks, path: Path
) -> None:
    first = await session.register("job", OTHER)
    await session.complete("job", COMPLETED, result=1)

    second = await session.register("job", TaskKind.MONITOR)

    assert first.task_seq < second.task_seq
    assert (await session.get("job")).task_seq == second.task_seq
    assert states(await session.list(include_terminal=True)) == ["completed", "running"]
    await session.complete("job", FAILED, failure="second")
    assert await first == 1
    with pytest.raises(TaskFailed, match="second"):
        await second
    assert event_types(path, first.task_seq) == ["registered", "completed"]


async def test_a_handle_on_an_ended_task_does_not_touch_the_next_of_its_id(session: SessionTasks, path: Path) -> None:
    first = await session.register("job", OTHER)
    await session.complete("job", COMPLETED)
    second = await session.register("job", OTHER)
    count = event_count(path)

    record = await first.cancel("too late")
    by_handle = [await session.cancel(first), await session.abandon(first, "too late")]
    shown = await session.update(first, progress="too late")

    assert [record, *by_handle, shown.record] == [await first.record()] * 4
    assert shown.verdict is Verdict.SUPERSEDED
    assert (await second.record()).state is RUNNING
    assert event_count(path) == count


@pytest.mark.parametrize("way", ["complete", "set_live_state", "unregister"])
async def test_a_late_word_through_an_old_handle_does_not_reach_the_next_task_of_its_id(
    session: SessionTasks, way: str, path: Path
) -> None:
    first = await session.register("job", OTHER)
    await session.complete("job", COMPLETED)
    second = await session.register("job", OTHER)
    count = event_count(path)

    # by its id alone, a registrar that comes late would end the work of another
    if way == "complete":
        said = await session.complete(first, FAILED)  # type: ignore[arg-type]
        assert said.verdict is Verdict.SUPERSEDED
    elif way == "set_live_state":
        said = await session.set_live_state(first, WAITING)  # type: ignore[arg-type]
        assert said.verdict is Verdict.SUPERSEDED
    else:
        await session.unregister(first)  # type: ignore[arg-type]

    assert (await second.record()).state is RUNNING
    assert event_count(path) == count


@pytest.mark.parametrize("form", ["handle", "handle_id", "json", "id"])
async def test_every_word_on_external_work_takes_every_form_of_reference(session: SessionTasks, form: str) -> None:
    handle = await session.register("job", OTHER)
    name: Any = {"handle": handle, "handle_id": handle.handle_id, "json": handle.to_json(), "id": "job"}[form]

    said = [
        await session.update(name, progress="x"),
        await session.set_live_state(name, WAITING),
        await session.complete(name, COMPLETED),
    ]

    assert [one.record.task_seq for one in said] == [handle.task_seq] * 3
    assert [one.verdict for one in said] == [Verdict.APPLIED] * 3


@pytest.mark.parametrize("bad", ["", "x" * 257, "a\0b", "\ud800", "line\nbreak", "h-mine", 7, None])
async def test_an_id_that_cannot_be_stored_is_not_registered(session: SessionTasks, bad: Any, path: Path) -> None:
    count = event_count(path)

    with pytest.raises(InvalidId):
        await session.register(bad, OTHER)

    assert event_count(path) == count
    assert rows(path, "SELECT * FROM tasks") == []


async def test_what_is_no_function_is_no_callback(session: SessionTasks, path: Path) -> None:
    count = event_count(path)

    with pytest.raises(InvalidArguments, match="cancel"):
        await session.register("job", OTHER, "stop it")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        await session.register("job", "errand")  # type: ignore[arg-type]

    assert event_count(path) == count


async def test_nothing_is_registered_in_a_closed_session_nor_in_one_that_does_not_exist(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await session.close()
    count = event_count(path)

    with pytest.raises(SessionClosed):
        await session.register("job", OTHER)
    with pytest.raises(UnknownSession):
        await (await store.session("s2")).register("job", OTHER, child_session_id="nowhere")
    with pytest.raises(TaskNotFound):
        await (await store.session("s2")).register("job", OTHER, parent="nobody")

    assert event_count(path) == count + 1
    assert rows(path, "SELECT * FROM tasks") == []


# --- complete -------------------------------------------------------------------------------------------------------


async def test_completed_work_hands_out_the_result_as_it_was_stored(session: SessionTasks) -> None:
    handle = await session.register("job", OTHER)
    waiting = asyncio.create_task(handle.result(20))

    transition = await session.complete("job", COMPLETED, result={"n": (1, 2)})

    assert transition.verdict is Verdict.APPLIED
    assert (transition.record.state, transition.record.result) == (COMPLETED, {"n": [1, 2]})
    assert transition.record.completed_at is not None
    assert await waiting == {"n": [1, 2]}
    assert await handle == {"n": [1, 2]}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (Failure(type="Lost", message="the disk", traceback="here"), ("Lost", "the disk", "here")),
        ("no more", ("Failed", "no more", None)),
        (None, ("Failed", "", None)),
        (OSError("not there"), ("OSError", "not there", None)),
    ],
)
async def test_failed_work_keeps_what_is_said_of_the_failure(
    session: SessionTasks, said: Any, kept: tuple[Any, ...]
) -> None:
    handle = await session.register("job", OTHER)

    record = (await session.complete("job", FAILED, failure=said)).record

    assert record.failure is not None
    assert (record.failure.type, record.failure.message, record.failure.traceback) == kept
    with pytest.raises(TaskFailed) as raised:
        await handle
    assert raised.value.failure == record.failure


async def test_work_may_be_said_to_have_been_cancelled(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER, uncalled)

    record = (await session.complete("job", CANCELLED)).record

    assert (record.state, record.cancel_reason, record.callback_begun_at) == (CANCELLED, None, None)
    assert event_types(path, handle.task_seq) == ["registered", "cancelled"]
    with pytest.raises(TaskCancelled):
        await handle


async def test_natural_completion_publishes_exactly_one_event(store: TaskStore, session: SessionTasks) -> None:
    events = session.events()

    async def body() -> int:
        return 1

    external = await session.register("external", OTHER)
    await session.complete("external", COMPLETED, result=1)
    managed = await session.spawn(body(), id="managed")
    await managed.wait()
    await external.wait()
    await session.register("last", OTHER)

    told = await take(events, 6)
    assert [(event.task_id, event.type.value) for event in told] == [
        ("external", "registered"),
        ("external", "completed"),
        ("managed", "registered"),
        ("managed", "started"),
        ("managed", "completed"),
        ("last", "registered"),
    ]


@pytest.mark.parametrize(("first", "second"), [*itertools.product([COMPLETED, FAILED, CANCELLED], repeat=2)])
async def test_the_first_end_stands_and_the_same_said_again_changes_nothing(
    session: SessionTasks, first: TaskState, second: TaskState, path: Path
) -> None:
    handle = await session.register("job", OTHER)
    record = await end(session, "job", first)
    count = event_count(path)

    extra = {"result": {"n": 1}} if second is COMPLETED else {"failure": "broken"} if second is FAILED else {}
    again = await session.complete("job", second, **extra)

    assert again.record == record
    assert again.verdict is (Verdict.UNCHANGED if first is second else Verdict.SUPERSEDED)
    assert await handle.record() == record
    assert event_count(path) == count


async def test_another_result_does_not_replace_the_first(session: SessionTasks, path: Path) -> None:
    await session.register("job", OTHER)
    await session.complete("job", COMPLETED, result=1)
    count = event_count(path)

    again = await session.complete("job", COMPLETED, result=2)

    assert (again.verdict, again.record.result) == (Verdict.SUPERSEDED, 1)
    assert event_count(path) == count


async def test_of_many_ends_at_once_one_is_applied(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER)

    said = await asyncio.gather(*(session.complete("job", COMPLETED, result=number) for number in range(20)))

    assert [transition.verdict for transition in said].count(Verdict.APPLIED) == 1
    assert {transition.record.result for transition in said} == {await handle}
    assert event_types(path, handle.task_seq) == ["registered", "completed"]


@pytest.mark.parametrize("state", ENDS)
async def test_update_flip_cancel_unregister_and_abandon_never_overwrite_a_terminal_row(
    session: SessionTasks, state: TaskState, path: Path
) -> None:
    await session.register("job", OTHER, uncalled)
    record = await end(session, "job", state)
    count, before = event_count(path), rows(path, "SELECT * FROM tasks")

    shown = await session.update("job", progress="more", fraction=1.0)
    flips = [await session.set_live_state("job", live) for live in (RUNNING, WAITING)]
    cancelled = await session.cancel("job", "late")
    await session.unregister("job")
    abandoned = await session.abandon("job", "late")
    reports = await session.cancel_all("late")

    assert [shown.verdict, *(flip.verdict for flip in flips)] == [Verdict.SUPERSEDED] * 3
    assert [shown.record, *(flip.record for flip in flips), cancelled, abandoned] == [record] * 5
    assert list(reports) == []
    assert rows(path, "SELECT * FROM tasks") == before
    assert event_count(path) == count


@pytest.mark.parametrize("state", [COMPLETED, FAILED, CANCELLED])
async def test_work_whose_cancel_was_requested_may_end_by_itself_first(
    session: SessionTasks, state: TaskState, path: Path
) -> None:
    release = await requested(session, "job")
    canceller = asyncio.create_task(session.cancel("job"))

    record = await end(session, "job", state)

    assert (record.state, record.cancel_reason) == (state, "asked")
    async with asyncio.timeout(20):
        assert await canceller == record
    release.set()
    await session.register("job", OTHER)
    assert event_types(path, record.task_seq) == ["registered", "cancel_requested", "state_changed", state.value]


@pytest.mark.parametrize("live", [RUNNING, WAITING, TaskState.PENDING, TaskState.CANCEL_REQUESTED, "abandoned"])
async def test_work_cannot_be_completed_into_a_state_in_which_it_does_not_end(
    session: SessionTasks, live: Any, path: Path
) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(ValueError, match="'job' may end"):
        await session.complete("job", live)

    assert event_count(path) == count


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (FAILED, {"result": 1}),
        (CANCELLED, {"result": 1}),
        (COMPLETED, {"failure": "x"}),
        (CANCELLED, {"failure": "x"}),
        ("nonsense", {}),
    ],
)
async def test_an_end_that_contradicts_itself_is_refused(
    session: SessionTasks, state: Any, said: dict[str, Any], path: Path
) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(ValueError):
        await session.complete("job", state, **said)

    assert event_count(path) == count


async def test_a_result_that_is_not_json_is_refused_and_the_work_goes_on(session: SessionTasks, path: Path) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(ResultNotSerializable):
        await session.complete("job", COMPLETED, result=object())

    assert event_count(path) == count
    assert (await session.get("job")).state is RUNNING


@pytest.mark.parametrize("hidden", [False, True])
async def test_the_books_do_not_end_nor_flip_work_of_the_store_itself(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event, hidden: bool, path: Path
) -> None:
    spawn = session.spawn_hidden("own", hold(started, release)) if hidden else session.spawn(hold(started, release))
    task = await spawn
    await started.wait()
    count = event_count(path)

    for refused in (
        session.complete(task.id, COMPLETED),
        session.set_live_state(task.id, WAITING),
        session.unregister(task.id),
    ):
        with pytest.raises(TaskError, match=task.id):
            await refused
    with pytest.raises(TaskExists):
        await session.register(task.id, OTHER)

    assert event_count(path) == count
    assert (await task.record()).state is RUNNING
    release.set()
    await task


async def test_what_the_session_does_not_have_is_not_found_and_may_be_unregistered(
    session: SessionTasks, path: Path
) -> None:
    count = event_count(path)

    for unknown in (
        session.complete("nobody", COMPLETED),
        session.set_live_state("nobody", RUNNING),
        session.update("nobody", progress="x"),
        session.abandon("nobody", "x"),
    ):
        with pytest.raises(TaskNotFound, match="'nobody'"):
            await unknown
    await session.unregister("nobody")

    assert event_count(path) == count


# --- set_live_state, update, unregister -----------------------------------------------------------------------------


async def test_a_flip_shows_whether_work_runs_or_waits(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER)

    flips = [await session.set_live_state("job", state) for state in (RUNNING, WAITING, WAITING, RUNNING)]

    assert [flip.verdict.value for flip in flips] == ["unchanged", "applied", "unchanged", "applied"]
    assert states([flip.record for flip in flips]) == ["running", "waiting", "waiting", "running"]
    assert event_types(path, handle.task_seq) == ["registered", "state_changed", "state_changed"]


async def test_a_live_state_flip_keeps_a_pending_cancel(session: SessionTasks, path: Path) -> None:
    release = await requested(session, "job")
    count, before = event_count(path), await session.get("job")

    flips = [await session.set_live_state("job", state) for state in (RUNNING, WAITING)]

    assert [flip.verdict for flip in flips] == [Verdict.SUPERSEDED] * 2
    assert [flip.record for flip in flips] == [before] * 2
    assert before.state is TaskState.CANCEL_REQUESTED
    assert event_count(path) == count
    release.set()
    assert (await session.cancel("job")).state is CANCELLED


@pytest.mark.parametrize("state", [*ENDS, TaskState.PENDING, TaskState.CANCEL_REQUESTED, "idle"])
async def test_a_flip_into_any_other_state_is_refused(session: SessionTasks, state: Any, path: Path) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(ValueError):
        await session.set_live_state("job", state)

    assert event_count(path) == count


async def test_an_update_shows_what_is_given_and_leaves_the_rest(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER)

    shown = [
        await session.update("job", progress="half", fraction=0.5),
        await session.update("job", progress="more"),
        await session.update(handle, fraction=1),
        await session.update("job"),
    ]

    assert [(one.record.progress, one.record.fraction) for one in shown] == [
        ("half", 0.5),
        ("more", 0.5),
        ("more", 1.0),
        ("more", 1.0),
    ]
    assert [one.verdict for one in shown] == [Verdict.APPLIED] * 3 + [Verdict.UNCHANGED]
    assert rows(path, "SELECT progress, fraction FROM tasks") == [{"progress": "more", "fraction": 1.0}]
    assert event_types(path, handle.task_seq) == ["registered", "progress", "progress", "progress"]


async def test_an_update_keeps_a_pending_cancel(session: SessionTasks) -> None:
    release = await requested(session, "job")

    shown = await session.update("job", progress="tidying up")

    assert (shown.verdict, shown.record.state) == (Verdict.APPLIED, TaskState.CANCEL_REQUESTED)
    assert shown.record.cancel_reason == "asked"
    release.set()
    assert (await session.cancel("job")).state is CANCELLED


async def test_work_of_the_store_can_be_updated_from_outside_its_body(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    task = await session.spawn(hold(started, release))
    await started.wait()

    shown = await session.update(task, progress="seen from outside")

    assert (shown.verdict, shown.record.progress) == (Verdict.APPLIED, "seen from outside")
    release.set()
    assert (await task.wait()).progress == "seen from outside"


@pytest.mark.parametrize(
    "bad", [{"fraction": -0.1}, {"fraction": 1.1}, {"fraction": float("nan")}, {"progress": "a\0b"}, {"progress": 7}]
)
async def test_an_update_that_cannot_be_shown_is_refused(
    session: SessionTasks, bad: dict[str, Any], path: Path
) -> None:
    await session.register("job", OTHER)
    count = event_count(path)

    with pytest.raises(ValueError):
        await session.update("job", **bad)

    assert event_count(path) == count


async def test_unregistered_work_is_cancelled_without_its_callback(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER, uncalled)

    await session.unregister("job")

    record = await handle.record()
    assert (record.state, record.cancel_reason, record.callback_begun_at) == (CANCELLED, "unregistered", None)
    assert event_types(path, handle.task_seq) == ["registered", "cancelled"]
    with pytest.raises(TaskCancelled) as raised:
        await handle
    assert raised.value.reason == "unregistered"


async def test_work_whose_callback_runs_can_be_unregistered(session: SessionTasks, path: Path) -> None:
    release = await requested(session, "job")

    await session.unregister("job")

    record = await session.get("job")
    assert record.state is CANCELLED
    release.set()
    await session.register("next", OTHER)
    assert event_types(path, record.task_seq)[-1] == "cancelled"


# --- scopes ---------------------------------------------------------------------------------------------------------


async def test_the_same_id_in_two_scopes_never_interferes(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any], path: Path
) -> None:
    other_runtime = await opened(runtime="ci")
    others = [await store.session("s2"), await other_runtime.session("s1")]
    called: list[Scope] = []

    async def stop(record: TaskRecord) -> None:
        called.append(record.scope)

    await session.register("job", OTHER, stop)
    kept = [await other.register("job", OTHER, stop) for other in others]
    before = [await handle.record() for handle in kept]

    await session.update("job", progress="here")
    await session.set_live_state("job", WAITING)
    await session.cancel("job", "here")
    await session.register("job", TaskKind.MONITOR)
    await session.complete("job", FAILED)
    await session.register("job", OTHER, stop)
    await session.unregister("job")
    await session.register("job", OTHER)
    await session.abandon("job", "here")
    await session.register("job", OTHER)
    await session.cancel_all("here")

    assert [await handle.record() for handle in kept] == before
    assert [await other.get("job") for other in others] == before
    assert [event_types(path, handle.task_seq) for handle in kept] == [["registered"]] * 2
    assert called == [session.scope]
    assert (await others[0].cancel("job", "there")).state is CANCELLED
    assert called == [session.scope, others[0].scope]
    assert (await kept[1].record()).state is RUNNING


async def test_list_order_survives_a_clock_step_backwards(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch, started: asyncio.Event
) -> None:
    clock = itertools.count(2_000_000_000.0, -100.0)
    stepped = SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr("lash_store.commit.time", stepped)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.progress("going on")

    ids = [f"t{number}" for number in range(8)]
    for task_id in ids:
        await (session.register(task_id, OTHER) if int(task_id[1]) % 2 else session.spawn(work, id=task_id))
    await asyncio.gather(*[(await session.handle(task_id)).wait(20) for task_id in ids[::2]])
    await session.complete("t1", COMPLETED)

    listed = await session.list(include_terminal=True)

    created = [record.created_at for record in listed]
    assert [record.id for record in listed] == ids
    assert created == sorted(created, reverse=True)
    assert [record.id for record in await store.list(TaskFilter(after_seq=listed[3].task_seq, limit=2))] == ids[4:6]
    assert [record.id for record in await session.list()] == ["t3", "t5", "t7"]
    events = await take(session.events(0, types=[EventType.REGISTERED]), 8)
    assert [event.task_id for event in events] == ids
    for record in listed:
        assert record.completed_at is None or record.completed_at < record.created_at


# --- idempotency ----------------------------------------------------------------------------------------------------


async def test_a_repeated_register_with_the_same_idempotency_key_returns_the_row(
    session: SessionTasks, path: Path
) -> None:
    called: list[str] = []
    first = await session.register("job", OTHER, lambda: called.append("first"), idempotency_key="k")
    count = event_count(path)

    second = await session.register("job", OTHER, lambda: called.append("second"), idempotency_key="k")

    assert (second.task_seq, second.handle_id, second.id) == (first.task_seq, first.handle_id, "job")
    assert event_count(path) == count
    assert (await second.cancel()).state is CANCELLED
    assert called == ["first"]
    third = await session.register("job", OTHER, uncalled, idempotency_key="k")
    assert (third.task_seq, (await third.record()).state) == (first.task_seq, CANCELLED)
    assert len(rows(path, "SELECT * FROM tasks")) == 1


async def test_a_repeated_register_may_come_from_another_live_store(
    session: SessionTasks, opened: Callable[..., Any], path: Path
) -> None:
    first = await session.register("job", OTHER, idempotency_key="k")
    other = await (await opened()).session("s1")
    count = event_count(path)

    second = await other.register("job", OTHER, uncalled, idempotency_key="k")

    assert (second.task_seq, second.handle_id) == (first.task_seq, first.handle_id)
    assert event_count(path) == count
    with pytest.raises(TaskExists):
        await other.register("job", OTHER)


async def test_many_registers_of_one_key_at_once_make_one_task(session: SessionTasks, path: Path) -> None:
    handles = await asyncio.gather(*(session.register("job", OTHER, idempotency_key="k") for _ in range(10)))

    assert {handle.task_seq for handle in handles} == {1}
    assert len(rows(path, "SELECT * FROM tasks")) == 1


async def test_a_key_that_was_used_for_other_work_is_refused(
    store: TaskStore, session: SessionTasks, path: Path, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> int:
        return number

    @store.task(recovery=Recovery.RERUN)
    async def other(task: TaskContext, number: int) -> int:
        return number

    await session.register("job", OTHER, idempotency_key="external")
    await (await session.spawn(work, 1, idempotency_key="managed"))
    count = event_count(path)

    for refused in (
        session.register("another", OTHER, idempotency_key="external"),
        session.register("job", TaskKind.MONITOR, idempotency_key="external"),
        session.register("job", OTHER, idempotency_key="managed"),
        session.spawn(work, 1, idempotency_key="external"),
        session.spawn(work, 2, idempotency_key="managed"),
        session.spawn(other, 1, idempotency_key="managed"),
        session.spawn(release.wait(), idempotency_key="managed"),
    ):
        with pytest.raises(IdempotencyConflict, match="idempotency key"):
            await refused

    assert event_count(path) == count


async def test_a_spawn_repeated_with_its_key_returns_the_task_and_runs_nothing_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    ran: list[int] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> int:
        ran.append(number)
        return number

    together = await asyncio.gather(*(session.spawn(work, 1, idempotency_key="k") for _ in range(10)))
    assert await together[0] == 1
    later = await session.spawn(work, 1, idempotency_key="k")

    assert {(handle.task_seq, handle.handle_id, handle.id) for handle in [*together, later]} == {
        (together[0].task_seq, together[0].handle_id, together[0].id)
    }
    assert await later == 1
    assert ran == [1]
    elsewhere = await (await store.session("s2")).spawn(work, 1, idempotency_key="k")
    assert elsewhere.task_seq != later.task_seq
    assert await elsewhere == 1


async def test_a_spawn_repeated_with_its_key_gets_its_task_although_the_id_is_live(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, release)

    first = await session.spawn(work, id="t", idempotency_key="k")

    second = await session.spawn(work, id="t", idempotency_key="k")

    assert (second.task_seq, second.handle_id) == (first.task_seq, first.handle_id)
    with pytest.raises(TaskExists):
        await session.spawn(work, id="t")
    release.set()
    await first


async def test_a_coroutine_spawned_again_under_its_key_is_closed(session: SessionTasks, release: asyncio.Event) -> None:
    first = await session.spawn(release.wait(), idempotency_key="k")
    repeated = release.wait()

    second = await session.spawn(repeated, idempotency_key="k")

    assert second.task_seq == first.task_seq
    assert repeated.cr_frame is None
    release.set()
    assert await second is True


# --- who keeps the books --------------------------------------------------------------------------------------------


async def test_external_work_goes_on_when_its_keeper_closes(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")
        handle = await session.register("job", OTHER, uncalled)
        await session.set_live_state("job", WAITING)
        await session.update("job", progress="half", fraction=0.5)
    async with new() as store:
        record = await (await store.session("s1")).get("job")

        assert (record.state, record.owner_id, record.attempt) == (WAITING, None, 0)
        assert (record.progress, record.fraction) == ("half", 0.5)
        assert event_types(path, handle.task_seq)[-1] == "released"
        count = event_count(path)
        await store.recover()
        assert event_count(path) == count


async def test_work_without_a_keeper_is_reported_on_by_whoever_has_the_file(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        await (await store.session("s1")).register("job", OTHER, uncalled)
    async with TaskStore.connect(path, runtime=RUNTIME) as store:
        session = await store.session("s1")

        shown = [await session.update("job", progress="x"), await session.set_live_state("job", WAITING)]
        ended = await session.complete("job", COMPLETED, result="done")

        assert [one.verdict for one in (*shown, ended)] == [Verdict.APPLIED] * 3
        assert await (await session.handle("job")) == "done"


async def test_work_without_a_keeper_and_a_callback_is_cancelled_by_the_books(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        handle = await (await store.session("s1")).register("job", OTHER)
    async with TaskStore.connect(path, runtime=RUNTIME) as store:
        record = await (await store.session("s1")).cancel("job", "from outside")

    assert (record.state, record.cancel_reason) == (CANCELLED, "from outside")
    assert event_types(path, handle.task_seq) == ["registered", "released", "cancel_requested", "cancelled"]


async def test_a_live_row_is_bound_to_who_registers_it_after_a_clean_close(
    new: Callable[..., TaskStore], path: Path
) -> None:
    called: list[str] = []
    async with new() as store:
        session = await store.session("s1")
        first = await session.register("job", TaskKind.MONITOR, lambda: called.append("first"), label="mine")
        await session.set_live_state("job", WAITING)
        await session.update("job", progress="half")
    async with new() as store:
        session = await store.session("s1")

        second = await session.register("job", TaskKind.MONITOR, lambda: called.append("second"))

        assert (second.task_seq, second.handle_id) == (first.task_seq, first.handle_id)
        record = await second.record()
        assert (record.state, record.owner_id, record.attempt, record.has_callback) == (WAITING, 2, 0, True)
        assert (record.progress, record.label) == ("half", "mine")
        assert event_types(path, first.task_seq)[-2:] == ["released", "reattached"]
        assert (await second.cancel()).state is CANCELLED
    assert called == ["second"]


async def test_the_same_store_may_give_a_callback_later_but_not_another(session: SessionTasks, path: Path) -> None:
    called: list[int] = []
    first = await session.register("job", OTHER)

    second = await session.register("job", OTHER, lambda: called.append(2))

    assert second.task_seq == first.task_seq
    assert event_types(path, first.task_seq) == ["registered", "reattached"]
    assert (await second.record()).has_callback is True
    with pytest.raises(TaskExists, match="'job'"):
        await session.register("job", OTHER, uncalled)
    assert (await first.cancel()).state is CANCELLED
    assert called == [2]


@pytest.mark.parametrize("callback", [None, uncalled])
async def test_another_live_store_of_the_runtime_does_not_take_the_books(
    session: SessionTasks, opened: Callable[..., Any], callback: Any, path: Path
) -> None:
    handle = await session.register("job", OTHER, callback)
    other = await (await opened()).session("s1")
    count = event_count(path)

    with pytest.raises(TaskExists, match="'job'"):
        await other.register("job", OTHER, uncalled)

    assert event_count(path) == count
    assert (await handle.record()).owner_id == 1


async def test_a_row_of_another_kind_is_not_bound(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        await (await store.session("s1")).register("job", TaskKind.MONITOR)
    async with new() as store:
        session = await store.session("s1")
        count = event_count(path)

        with pytest.raises(TaskExists, match="'job'"):
            await session.register("job", TaskKind.SUBAGENT)

        assert event_count(path) == count
        assert (await session.get("job")).owner_id is None


async def test_of_two_stores_that_register_a_free_row_at_once_one_gets_it(
    new: Callable[..., TaskStore], opened: Callable[..., Any], path: Path
) -> None:
    async with new() as store:
        handle = await (await store.session("s1")).register("job", OTHER)
    sessions = [await (await opened()).session("s1") for _ in range(2)]

    answers = await asyncio.gather(*(one.register("job", OTHER) for one in sessions), return_exceptions=True)

    bound = [answer for answer in answers if isinstance(answer, TaskHandle)]
    refused = [answer for answer in answers if isinstance(answer, TaskExists)]
    assert (len(bound), len(refused), bound[0].task_seq) == (1, 1, handle.task_seq)
    assert event_types(path, handle.task_seq).count("reattached") == 1


async def test_the_key_of_a_row_whose_keeper_closed_binds_it_again(new: Callable[..., TaskStore]) -> None:
    called: list[int] = []
    async with new() as store:
        first = await (await store.session("s1")).register("job", OTHER, uncalled, idempotency_key="k")
    async with new() as store:
        session = await store.session("s1")

        second = await session.register("job", OTHER, lambda: called.append(1), idempotency_key="k")

        assert (second.task_seq, (await second.record()).owner_id) == (first.task_seq, 2)
        assert (await session.cancel("job")).state is CANCELLED
    assert called == [1]


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
async def test_a_register_that_is_cancelled_leaves_no_row_or_one_that_keeps_its_callback(
    store: TaskStore, session: SessionTasks, late: bool
) -> None:
    for at in itertools.count(1):
        called: list[str] = []
        stepped = await cancel_at(
            session.register(f"job{at}", OTHER, lambda record, called=called: called.append(record.id)), at, late=late
        )
        assert stepped.error is None or stepped.was_cancelled, stepped.error
        await store.session("behind it in the queue")
        try:
            record = await session.cancel(f"job{at}")
        except TaskNotFound:
            assert stepped.was_cancelled
            assert called == []
        else:
            assert (record.state, called) == (CANCELLED, [f"job{at}"])
        if not stepped.reached:
            assert at > 2, "it was never suspended: nothing was tested"
            break


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
@pytest.mark.parametrize("way", ["complete", "set_live_state", "update", "unregister", "abandon"])
async def test_a_word_on_external_work_that_is_cancelled_is_said_once_or_not_at_all(
    store: TaskStore, session: SessionTasks, way: str, late: bool, path: Path
) -> None:
    for at in itertools.count(1):
        job = f"job{at}"
        handle = await session.register(job, OTHER)
        operation = {
            "complete": lambda job=job: session.complete(job, COMPLETED),
            "set_live_state": lambda job=job: session.set_live_state(job, WAITING),
            "update": lambda job=job: session.update(job, progress="x"),
            "unregister": lambda job=job: session.unregister(job),
            "abandon": lambda job=job: session.abandon(job, "x"),
        }[way]
        stepped = await cancel_at(operation(), at, late=late)
        assert stepped.error is None or stepped.was_cancelled, stepped.error
        await store.session("behind it in the queue")
        told = event_types(path, handle.task_seq)
        event = {"complete": "completed", "set_live_state": "state_changed", "update": "progress"}.get(
            way, "cancelled" if way == "unregister" else "abandoned"
        )
        assert told == ["registered", event] or (told == ["registered"] and stepped.was_cancelled)
        if not stepped.reached:
            assert told == ["registered", event]
            assert at > 1, "it was never suspended: nothing was tested"
            break


# --- who may ask ----------------------------------------------------------------------------------------------------


async def test_a_store_that_only_reads_refuses_every_word_on_external_work(session: SessionTasks, path: Path) -> None:
    await session.register("job", OTHER)
    count = event_count(path)
    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reader:
        looking = await reader.session("s1")
        for refused in (
            looking.register("another", OTHER),
            looking.complete("job", COMPLETED),
            looking.set_live_state("job", WAITING),
            looking.update("job", progress="x"),
            looking.unregister("job"),
            looking.cancel("job"),
            looking.cancel_all(),
            looking.abandon("job", "x"),
            reader.abandon_owner(1, "x"),
        ):
            with pytest.raises(StoreReadOnly):
                await refused
        assert (await looking.get("job")).state is RUNNING

    assert event_count(path) == count


async def test_who_connects_to_ask_registers_nothing(session: SessionTasks, path: Path) -> None:
    count = event_count(path)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        with pytest.raises(StoreReadOnly, match="connect"):
            await (await asking.session("s1")).register("job", OTHER)

    assert event_count(path) == count


# --- registered again -------------------------------------------------------------------------------------------------


async def test_registering_again_replaces_what_is_said_anew_and_leaves_the_rest(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        session = await store.session("s1")
        await store.session("s2")
        before = await (
            await session.register("job", OTHER, label="first", notify_on_end=True, close_policy="transfer")
        ).record()
    async with new() as store:
        session = await store.session("s1")
        handle = await session.register("job", OTHER, uncalled, child_session_id="s2", idempotency_key="key")
        again = await session.register("job", OTHER, uncalled, idempotency_key="key")
        record = await handle.record()

    assert again.task_seq == handle.task_seq == before.task_seq
    assert (record.label, record.notify_on_end, record.close_policy) == ("first", True, "transfer")
    assert (record.child_session_id, record.idempotency_key, record.has_callback) == ("s2", "key", True)
    assert record.started_at == before.started_at
    assert event_types(path, record.task_seq) == ["registered", "released", "reattached", "released"]


async def test_registering_again_for_a_session_that_is_not_there_changes_nothing(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        await (await store.session("s1")).register("job", OTHER)
    async with new() as store:
        session = await store.session("s1")
        count = event_count(path)
        with pytest.raises(UnknownSession, match="nowhere"):
            await session.register("job", OTHER, child_session_id="nowhere")
        assert event_count(path) == count


# --- failures in whatever form ----------------------------------------------------------------------------------------


async def test_a_reported_exception_keeps_the_frame_that_raised_it(session: SessionTasks) -> None:
    await session.register("job", OTHER)
    try:
        raise ValueError("no such host")
    except ValueError as error:
        record = (await session.complete("job", "failed", failure=error)).record

    assert record.failure is not None
    assert "no such host" in str(record.failure.traceback)
    assert "test_a_reported_exception_keeps_the_frame_that_raised_it" in str(record.failure.traceback)


async def test_a_failure_may_be_reported_as_a_mapping(session: SessionTasks) -> None:
    for task_id in ("job", "other"):
        await session.register(task_id, OTHER)

    record = (await session.complete("job", FAILED, failure={"type": "Timeout", "message": "60 s"})).record

    assert record.failure == Failure(type="Timeout", message="60 s")
    with pytest.raises(ValueError, match="message"):
        await session.complete("other", FAILED, failure={"type": "Timeout"})


async def test_a_callback_that_is_a_coroutine_object_is_refused_and_closed(session: SessionTasks, path: Path) -> None:
    async def stop() -> None:
        uncalled()

    coroutine: Any = stop()
    with pytest.raises(InvalidArguments, match="'job'"):
        await session.register("job", OTHER, coroutine)

    assert coroutine.cr_frame is None


@pytest.mark.parametrize("words", [{"kind": "nonsense"}, {"kind": OTHER, "close_policy": "nonsense"}])
async def test_a_word_that_is_none_is_named_with_the_task_and_what_may_stand_there(
    session: SessionTasks, path: Path, words: dict[str, Any]
) -> None:
    count = event_count(path)

    with pytest.raises(ValueError, match=r"'job'.*nonsense"):
        await session.register("job", **words)

    assert event_count(path) == count


@pytest.mark.parametrize("fraction", [2, -0.1, float("nan"), "half", [1]])
async def test_a_fraction_that_is_none_is_refused_with_the_task_named(session: SessionTasks, fraction: Any) -> None:
    await session.register("job", OTHER)

    with pytest.raises(ValueError, match="'job'"):
        await session.update("job", fraction=fraction)


async def test_work_whose_sub_agents_session_was_closed_meanwhile_is_bound_again(
    new: Callable[..., TaskStore],
) -> None:
    async with new() as store:
        sub = await store.session("sub")
        await (await store.session("s1")).register("job", OTHER, uncalled, child_session_id="sub")
        await sub.close()
    async with new() as store:
        handle = await (await store.session("s1")).register("job", OTHER, uncalled, child_session_id="sub")
        record = await handle.record()

    assert (record.child_session_id, record.has_callback) == ("sub", True)


async def test_a_key_repeated_without_a_callback_writes_nothing(session: SessionTasks, path: Path) -> None:
    first = await session.register("job", OTHER, idempotency_key="key")
    count = event_count(path)

    again = await session.register("job", OTHER, idempotency_key="key")

    assert (again.task_seq, event_count(path)) == (first.task_seq, count)
    await session.register("job", OTHER, uncalled, idempotency_key="key")
    assert event_types(path, first.task_seq) == ["registered", "reattached"]
