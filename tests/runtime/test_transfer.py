"""Transfer: work goes to another session whole, or not at all; its body does not notice, and what comes of it lands there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    HandleNotVisible,
    Recovery,
    Scope,
    SessionClosed,
    SessionError,
    SessionTasks,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskKind,
    TaskNotFound,
    TaskRecord,
    TaskState,
    TaskStore,
    TransferConflict,
    UnknownSession,
)
from tests.runtime.support import RUNTIME, event_types, everything, hold, next_event, rows, states, take

OTHER = TaskKind.OTHER


def places(path: Path, task_seq: int) -> list[tuple[str, str]]:
    """Read what happened to a task, and in which session."""
    found = rows(path, "SELECT type, scope FROM events WHERE task_seq = ? ORDER BY seq", task_seq)
    return [(event["type"], event["scope"].removeprefix("desktop:")) for event in found]


async def ids(session: SessionTasks, **wanted: Any) -> list[str]:
    """List a session."""
    return [record.id for record in await session.list(**wanted)]


# --- what moves -----------------------------------------------------------------------------------------------------


async def test_transferred_work_is_gone_here_and_is_there_under_the_same_handle(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    task = await session.register("t", OTHER)
    before = await task.record()

    moved = await session.transfer(there, [task])

    assert moved == [before.model_copy(update={"scope": there.scope})]
    assert await session.list(include_terminal=True, include_hidden=True) == []
    assert await there.list() == moved
    for name in (task, "t"):
        with pytest.raises(TaskNotFound, match="desktop:s1"):
            await session.get(name)
        with pytest.raises(HandleNotVisible):
            await session.validate_handles([name])
        assert await there.get(name) == moved[0]
    assert (await TaskHandle.from_json(there, task.to_json())).handle_id == task.handle_id
    assert (await there.handle("t")).handle_id == task.handle_id
    assert rows(path, "SELECT handle_id, scope FROM handles") == [{"handle_id": task.handle_id, "scope": "desktop:s2"}]


async def test_the_destination_may_be_given_in_any_form(session: SessionTasks, there: SessionTasks) -> None:
    forms = {"session": there, "scope": there.scope, "name": "s2"}

    for name, to in forms.items():
        await session.register(name, OTHER)
        await session.transfer(to, [name])

    assert await ids(there) == list(forms)


async def test_an_empty_list_moves_nothing(session: SessionTasks, there: SessionTasks, path: Path) -> None:
    await session.register("t", OTHER)
    before = everything(path)

    assert await session.transfer(there, []) == []

    assert everything(path) == before


async def test_a_task_that_is_named_twice_moves_once(session: SessionTasks, there: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)

    assert len(await session.transfer(there, [task, "t", task.handle_id, task.to_json()])) == 1

    assert event_types(path, task.task_seq) == ["registered", "transferred"]


async def test_managed_work_of_every_kind_is_listed_awaited_and_cancelled_from_the_destination(
    store: TaskStore, session: SessionTasks, there: SessionTasks, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> int:
        await release.wait()
        return number

    await store.session("agent")
    for kind in TaskKind:
        where = "agent" if kind is TaskKind.SUBAGENT else None
        one, two = [
            await session.spawn(work, number, kind=kind, child_session_id=where, cancel_policy="abort_local")
            for number in (1, 2)
        ]

        await session.transfer(there, [one, two])

        assert await ids(there, kinds=[kind]) == [one.id, two.id]
        record = await there.cancel(two.id, "from there")
        assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "from there")
    left = await ids(there)
    release.set()
    assert [await (await there.handle(task_id)) for task_id in left] == [1] * len(TaskKind)


async def test_external_work_of_every_kind_is_listed_ended_and_cancelled_from_the_destination(
    session: SessionTasks, there: SessionTasks
) -> None:
    called = asyncio.Queue[TaskRecord]()
    for kind in TaskKind:
        one, two = [await session.register(name, kind, cancel=called.put_nowait) for name in ("one", "two")]

        await session.transfer(there, [one, two])

        assert await ids(there, kinds=[kind]) == ["one", "two"]
        assert (await there.set_live_state("one", TaskState.WAITING)).record.state is TaskState.WAITING
        assert (await there.update("one", progress="half")).record.progress == "half"
        await there.complete("one", TaskState.COMPLETED, result=1)
        assert await one == 1
        assert (await there.cancel(two.to_json(), "from there")).state is TaskState.CANCELLED
        asked = called.get_nowait()
        assert (asked.task_seq, asked.scope, asked.cancel_reason) == (two.task_seq, there.scope, "from there")
        assert called.empty()


async def test_a_bare_coroutine_goes_on_in_the_destination(
    session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    task = await session.spawn(hold(started, release))
    await started.wait()

    await session.transfer(there, [task])
    release.set()

    assert await (await there.handle(task.id)) is None
    assert places(path, task.task_seq)[-2:] == [("transferred", "s2"), ("completed", "s2")]


async def test_who_gave_external_work_away_keeps_no_books_of_it(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    await session.register("t", OTHER)
    await session.transfer(there, ["t"])
    before = everything(path)

    for attempt in (
        session.complete("t", TaskState.COMPLETED),
        session.set_live_state("t", TaskState.WAITING),
        session.update("t", progress="half"),
        session.cancel("t"),
        session.abandon("t", "lost"),
    ):
        with pytest.raises(TaskNotFound):
            await attempt
    await session.unregister("t")

    assert everything(path) == before


async def test_an_id_that_went_away_is_free_and_the_two_do_not_interfere(
    session: SessionTasks, there: SessionTasks
) -> None:
    gone = await session.register("t", OTHER)
    await session.transfer(there, ["t"])

    fresh = await session.register("t", OTHER)

    assert (await session.get("t")).task_seq == fresh.task_seq
    assert (await there.get("t")).task_seq == gone.task_seq
    assert (await there.cancel("t")).state is TaskState.CANCELLED
    assert (await fresh.record()).state is TaskState.RUNNING
    await session.complete("t", TaskState.COMPLETED, result="here")
    assert await fresh == "here"


async def test_a_finished_task_of_the_id_at_the_destination_is_no_conflict(
    session: SessionTasks, there: SessionTasks
) -> None:
    before = await there.register("t", OTHER)
    await there.complete("t", TaskState.COMPLETED)
    task = await session.register("t", OTHER)

    await session.transfer(there, ["t"])

    assert (await there.get("t")).task_seq == task.task_seq
    assert [record.task_seq for record in await there.list(include_terminal=True)] == [before.task_seq, task.task_seq]


async def test_work_that_a_closed_session_kept_can_still_be_handed_on(
    session: SessionTasks, there: SessionTasks
) -> None:
    await session.register("t", OTHER)
    await session.close()

    await session.transfer(there, ["t"])

    assert (await ids(session), await ids(there)) == ([], ["t"])


# --- the body -------------------------------------------------------------------------------------------------------


async def test_a_running_body_is_not_disturbed_and_its_completion_lands_in_the_new_session(
    store: TaskStore,
    session: SessionTasks,
    there: SessionTasks,
    started: asyncio.Event,
    release: asyncio.Event,
    path: Path,
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        before = str(task.scope)
        await hold(started, release)
        await task.save({"at": 1})
        await task.progress("half", 0.5)
        return [before, str(task.scope), str(task.record.scope), task.attempt, task.stop_reason]

    task = await session.spawn(work, id="t")
    await started.wait()

    await session.transfer(there, ["t"])
    release.set()

    assert await (await there.handle("t")) == ["desktop:s1", "desktop:s2", "desktop:s2", 1, None]
    assert places(path, task.task_seq) == [
        ("registered", "s1"),
        ("started", "s1"),
        ("transferred", "s2"),
        ("saved", "s2"),
        ("progress", "s2"),
        ("completed", "s2"),
    ]
    record = await there.get("t")
    assert (record.state, record.attempt, record.scope) == (TaskState.COMPLETED, 1, there.scope)
    assert await session.list(include_terminal=True) == []


async def test_a_body_that_fails_fails_in_the_new_session(
    session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    async def work() -> None:
        await hold(started, release)
        raise RuntimeError("broken")

    task = await session.spawn(work(), id="t")
    await started.wait()

    await session.transfer(there, ["t"])
    release.set()

    with pytest.raises(TaskFailed, match="broken"):
        await (await there.handle("t"))
    assert places(path, task.task_seq)[-1] == ("failed", "s2")


async def test_who_waited_before_the_transfer_gets_the_result(session: SessionTasks, there: SessionTasks) -> None:
    task = await session.register("t", OTHER)
    waiting = asyncio.gather(task, task.result(timeout=20), task.wait())

    await session.transfer(there, ["t"])
    await there.complete("t", TaskState.COMPLETED, result=5)

    assert (await waiting)[:2] == [5, 5]
    assert (await waiting)[2].scope == there.scope
    assert await task.record() == await there.get("t")


async def test_a_task_that_waits_for_a_slot_starts_in_its_new_session(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = await opened(max_running=1)
    session, there = await store.session("s1"), await store.session("s2")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[str]:
        return [str(task.scope), str(task.record.scope)]

    first = await session.spawn(hold(started, release))
    await started.wait()
    task = await session.spawn(work, id="t")

    assert states(await session.transfer(there, ["t"])) == ["pending"]
    release.set()

    assert await (await there.handle("t")) == ["desktop:s2", "desktop:s2"]
    assert places(path, task.task_seq)[1:] == [("transferred", "s2"), ("started", "s2"), ("completed", "s2")]
    await first


async def test_a_cancel_that_was_pending_is_seen_through_in_the_new_session(
    session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    async def tidy_up() -> None:
        await hold(started, release)

    task = await session.register("t", OTHER, cancel=tidy_up)
    cancelling = asyncio.create_task(session.cancel("t", "enough"))
    await started.wait()

    assert states(await session.transfer(there, ["t"])) == ["cancel_requested"]
    release.set()

    assert (await cancelling).state is TaskState.CANCELLED
    record = await there.get("t")
    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "enough")
    assert places(path, task.task_seq)[-2:] == [("transferred", "s2"), ("cancelled", "s2")]


async def test_a_cancel_from_the_destination_reaches_the_body(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=3600.0)
    session, there = await store.session("s1"), await store.session("s2")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        started.set()
        await task.cancelled()
        return [task.stop_reason, str(task.scope), task.record.cancel_reason]

    await session.spawn(work, id="t")
    await started.wait()
    await session.transfer(there, ["t"])

    record = await there.cancel("t", "from there")

    assert (record.state, record.result) == (TaskState.COMPLETED, ["cancel", "desktop:s2", "from there"])


async def test_a_transferred_task_is_recovered_into_its_new_session(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    async def work(task: TaskContext) -> list[Any]:
        if task.attempt == 1:
            await hold(started, asyncio.Event())
        return [task.attempt, str(task.scope), str(task.record.scope)]

    first, second = new(), new()
    for store in (first, second):
        store.task(recovery=Recovery.RERUN)(work)
    async with first:
        session, there = await first.session("s1"), await first.session("s2")
        task = await session.spawn(work, id="t")
        await started.wait()
        await session.transfer(there, ["t"])

    async with second:
        assert await (await second.handle("desktop:s2", "t")) == [2, "desktop:s2", "desktop:s2"]

    assert [where for _, where in places(path, task.task_seq)] == ["s1", "s1", "s2", "s2", "s2", "s2"]


# --- when another process transfers ---------------------------------------------------------------------------------


async def test_a_body_learns_that_somebody_else_transferred_it(
    store: TaskStore, session: SessionTasks, there: SessionTasks, started: asyncio.Event, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[str]:
        moves = store.events(types=[EventType.TRANSFERRED])
        started.set()
        await anext(moves)
        return [str(task.scope), str(task.record.scope)]

    await session.spawn(work, id="t")
    await started.wait()

    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        await (await outside.session("s1")).transfer("s2", ["t"])

    assert await (await there.handle("t")).result(timeout=20) == ["desktop:s2", "desktop:s2"]
    assert (await ids(session), await ids(there, include_terminal=True)) == ([], ["t"])


async def test_what_a_body_writes_before_it_learns_of_a_transfer_lands_in_the_new_session(
    store: TaskStore,
    session: SessionTasks,
    there: SessionTasks,
    started: asyncio.Event,
    release: asyncio.Event,
    path: Path,
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        await hold(started, release)
        await task.notify("hello")
        await task.progress("half")
        return str(task.scope)

    task = await session.spawn(work, id="t", notify_on_end=True)
    await started.wait()

    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        await (await outside.session("s1")).transfer("s2", ["t"])
        release.set()

        assert await task == "desktop:s2"

    assert {where for kind, where in places(path, task.task_seq)[2:]} == {"s2"}
    assert await session.notes() == []
    assert [note.key for note in await there.notes()][1:] == [f"end:{task.task_seq}"]


async def test_the_callback_of_external_work_is_called_after_somebody_else_transferred_and_cancelled_it(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    called = asyncio.Queue[TaskRecord]()
    await session.register("t", OTHER, cancel=called.put_nowait)

    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        await (await outside.session("s1")).transfer("s2", ["t"])
        record = await (await outside.session("s2")).cancel("t", "from outside")

    assert record.state is TaskState.CANCELLED
    asked = called.get_nowait()
    assert (asked.scope, asked.cancel_reason) == (there.scope, "from outside")
    assert called.empty()


# --- what goes along, and what stays --------------------------------------------------------------------------------


async def test_live_descendants_of_the_session_go_along_and_everything_else_stays(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    third, agents = await store.session("s3"), await store.session("agent")
    above = await session.register("above", OTHER)
    top = await session.register("top", OTHER, parent=above)
    child = await session.register("child", OTHER, parent=top)
    await session.register("grandchild", OTHER, parent=child)
    elsewhere = await third.register("elsewhere", OTHER, parent=child)
    await session.register("through another session", OTHER, parent=elsewhere)
    await session.register("agent", TaskKind.SUBAGENT, parent=top, child_session_id="agent")
    await agents.register("work of the agent", OTHER)
    await session.register("finished child", OTHER, parent=top)
    await session.complete("finished child", TaskState.COMPLETED)
    await session.register("sibling", OTHER, parent=above)

    moved = await session.transfer(there, [top])

    gone = ["top", "child", "grandchild", "through another session", "agent"]
    assert [record.id for record in moved] == gone
    assert {record.scope for record in moved} == {there.scope}
    assert await ids(there, include_terminal=True) == gone
    assert await ids(session, include_terminal=True) == ["above", "finished child", "sibling"]
    assert await ids(third) == ["elsewhere"]
    assert await ids(agents) == ["work of the agent"]
    assert (await there.get("child")).parent_seq == top.task_seq


async def test_live_children_go_along_with_a_finished_parent(session: SessionTasks, there: SessionTasks) -> None:
    parent = await session.register("parent", OTHER)
    await session.register("child", OTHER, parent=parent)
    await session.complete("parent", TaskState.COMPLETED)

    await session.transfer(there, [parent])

    assert await ids(there, include_terminal=True) == ["parent", "child"]


async def test_a_parent_that_stays_behind_is_still_the_parent(session: SessionTasks, there: SessionTasks) -> None:
    parent = await session.register("parent", OTHER)
    child = await session.register("child", OTHER, parent=parent)
    await session.transfer(there, [child])

    await session.cancel("parent", "enough")

    record = await there.get("child")
    assert (record.parent_seq, record.state, record.cancel_reason) == (parent.task_seq, TaskState.CANCELLED, "enough")


async def test_a_child_that_stays_with_its_session_is_cancelled_from_where_its_parent_is(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    agents = await store.session("agent")
    agent = await session.register("agent", TaskKind.SUBAGENT, child_session_id="agent")
    await agents.register("work", OTHER)
    await session.transfer(there, [agent])

    await there.cancel("agent", "enough")

    assert (await agents.get("work")).state is TaskState.CANCELLED


async def test_hidden_work_goes_along_and_is_awaited_by_the_new_session(
    session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    born = asyncio.Event()

    async def parent() -> None:
        await session.spawn_hidden("indexing", hold(started, release))
        born.set()
        await asyncio.Event().wait()

    task = await session.spawn(parent(), id="parent")
    await asyncio.gather(born.wait(), started.wait())
    assert not await there.sync_needed()

    await session.transfer(there, [task])

    await session.await_hidden()
    assert [record.label for record in await there.list(include_hidden=True)] == ["parent", "indexing"]
    assert await there.sync_needed()
    waiting = asyncio.create_task(there.await_background_work())
    await asyncio.wait({waiting}, timeout=0.01)
    assert not waiting.done()
    release.set()
    assert await waiting is True


async def test_who_awaits_hidden_work_goes_on_when_the_last_of_it_has_gone_to_another_session(
    store: TaskStore, session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    hidden = await session.spawn_hidden("indexing", hold(started, release))
    waiting = asyncio.create_task(session.await_hidden())
    async with asyncio.timeout(20):
        while hidden.task_seq not in store._core.feed._waiters:  # type: ignore[union-attr]
            await asyncio.sleep(0)

    await session.transfer(there, [hidden])

    await asyncio.wait({waiting}, timeout=5)
    assert waiting.done(), "no hidden task of the session is live"
    await waiting
    release.set()
    await there.await_hidden()


async def test_hidden_work_that_failed_unread_is_told_to_the_new_session_alone(
    session: SessionTasks, there: SessionTasks
) -> None:
    async def fail() -> None:
        raise RuntimeError("broken")

    hidden = await session.spawn_hidden("indexing", fail())
    await hidden.wait()

    await session.transfer(there, [hidden])

    await session.await_hidden()
    with pytest.raises(ExceptionGroup) as caught:
        await there.await_hidden()
    assert [type(error) for error in caught.value.exceptions] == [TaskFailed]
    await there.await_hidden()


async def test_notes_that_nobody_has_read_go_along_and_later_ones_follow(
    store: TaskStore, session: SessionTasks, there: SessionTasks, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.notify("read", key="a")
        await task.notify("unread", key="b")
        await release.wait()
        await task.notify("later", key="c")

    task = await session.spawn(work, notify_on_end=True)
    await next_event(store, EventType.NOTED, after=(await next_event(store, EventType.NOTED)).seq)
    await session.register("stays", OTHER, notify_on_end=True)
    await session.complete("stays", TaskState.COMPLETED)
    async with session.inbox(limit=1) as read:
        assert [note.text for note in read] == ["read"]

    await session.transfer(there, [task])

    assert [note.key for note in await there.notes()] == ["b"]
    release.set()
    await task.wait()
    assert [note.key for note in await there.notes(unread=False)] == ["b", "c", f"end:{task.task_seq}"]
    assert {note.scope for note in await there.notes()} == {there.scope}
    assert [note.task_id for note in await session.notes(unread=False)] == [task.id, "stays"]
    assert [note.task_id for note in await session.notes()] == ["stays"]


@pytest.mark.parametrize("in_order", [True, False])
async def test_notes_that_are_being_read_while_their_task_moves_are_dealt_with_once(
    session: SessionTasks, there: SessionTasks, in_order: bool
) -> None:
    task = await session.register("t", OTHER, notify_on_end=True)
    await session.complete("t", TaskState.COMPLETED)

    with contextlib.nullcontext() if in_order else pytest.raises(ZeroDivisionError):
        async with session.inbox() as notes:
            assert [note.task_id for note in notes] == ["t"]
            await session.transfer(there, [task])
            async with there.inbox() as too_early:
                assert too_early == []
            if not in_order:
                raise ZeroDivisionError

    assert await session.notes() == []
    async with there.inbox() as notes:
        assert [note.task_id for note in notes] == ([] if in_order else ["t"])


# --- finished work --------------------------------------------------------------------------------------------------


async def test_finished_work_that_is_unread_moves_with_its_outcome_and_nothing_else_happens_to_it(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    for name in ("completed", "failed", "cancelled", "abandoned"):
        await session.register(name, OTHER)
    await session.complete("completed", TaskState.COMPLETED, result=[7])
    await session.complete("failed", TaskState.FAILED, failure="broken")
    await session.cancel("cancelled", "enough")
    await session.abandon("abandoned", "nobody knows")
    errors = {"failed": TaskFailed, "cancelled": TaskCancelled, "abandoned": TaskAbandoned}

    for state in ("completed", *errors):
        task = await session.handle(state)
        before = await task.record()

        moved = await session.transfer(there, [task])

        assert moved == [before.model_copy(update={"scope": there.scope})]
        assert places(path, task.task_seq)[-2:] == [(state, "s1"), ("transferred", "s2")]
        with pytest.raises(errors[state]) if state in errors else contextlib.nullcontext():
            assert await (await there.handle(state)) == [7]
        with pytest.raises(HandleNotVisible):
            await there.transfer(session, [task])


async def test_an_earlier_incarnation_is_moved_by_its_handle_alone(session: SessionTasks, there: SessionTasks) -> None:
    old = await session.register("t", OTHER)
    await session.complete("t", TaskState.COMPLETED, result="old")
    live = await session.register("t", OTHER)

    await session.transfer(there, [old])

    assert (await session.get("t")).task_seq == live.task_seq
    assert (await there.get("t")).task_seq == old.task_seq
    await session.transfer(there, ["t"])
    assert (await there.get("t")).task_seq == live.task_seq
    assert await (await there.handle(old)) == "old"


# --- there and back -------------------------------------------------------------------------------------------------


async def test_work_may_come_back_and_is_as_it_was(
    session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    task = await session.spawn(hold(started, release), id="t")
    await started.wait()
    before = everything(path)

    await session.transfer(there, [task])
    await there.transfer(session, [task])

    after = everything(path)
    assert (after["tasks"], after["handles"]) == (before["tasks"], before["handles"])
    assert (await ids(session), await ids(there)) == (["t"], [])
    assert places(path, task.task_seq)[2:] == [("transferred", "s2"), ("transferred", "s1")]
    release.set()
    assert await (await session.handle("t")) is None
    assert places(path, task.task_seq)[-1] == ("completed", "s1")


async def test_opposite_transfers_at_once_lose_nothing(session: SessionTasks, there: SessionTasks) -> None:
    here_first = [(await session.register(f"a{number}", OTHER)).id for number in range(20)]
    there_first = [(await there.register(f"b{number}", OTHER)).id for number in range(20)]

    async with asyncio.timeout(20):
        for _ in range(3):
            await asyncio.gather(
                *(session.transfer(there, [task_id]) for task_id in here_first),
                *(there.transfer(session, [task_id]) for task_id in there_first),
            )
            here_first, there_first = there_first, here_first

    assert (await ids(session), await ids(there)) == (sorted_by_number(here_first), sorted_by_number(there_first))


def sorted_by_number(task_ids: list[str]) -> list[str]:
    """Bring ids into the order in which they were registered."""
    return sorted(task_ids, key=lambda task_id: int(task_id[1:]))


async def test_of_those_who_transfer_one_task_back_and_forth_at_once_each_wins_in_turn_or_is_told_so(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    task = await session.register("t", OTHER)

    async with asyncio.timeout(20):
        tries = await asyncio.gather(
            *(one.transfer(other, [task]) for one, other in [(session, there), (there, session)] * 30),
            return_exceptions=True,
        )

    lost = [one for one in tries if isinstance(one, HandleNotVisible)]
    won = [one for one in tries if not isinstance(one, BaseException)]
    assert len(lost) + len(won) == 60
    where = [place for kind, place in places(path, task.task_seq) if kind == "transferred"]
    assert where == (["s2", "s1"] * 30)[: len(won)]
    assert await ids(there if len(won) % 2 else session) == ["t"]


# --- refusals: nothing moves ----------------------------------------------------------------------------------------


async def test_if_one_of_many_cannot_be_seen_none_moves(session: SessionTasks, there: SessionTasks, path: Path) -> None:
    good = await session.register("good", OTHER)
    await session.register("child", OTHER, parent=good)
    read = await session.register("read", OTHER)
    await session.complete("read", TaskState.COMPLETED)
    await read
    foreign = await there.register("foreign", OTHER)
    observed = await session.observe(there, "foreign")
    before = everything(path)

    for wrong in ("nobody", "h-nobody", foreign, "foreign", "read", read, observed):
        name = wrong.handle_id if isinstance(wrong, TaskHandle) else wrong
        with pytest.raises(HandleNotVisible) as caught:
            await session.transfer(there, [good, wrong])
        assert caught.value.missing == (name,)
    with pytest.raises(HandleNotVisible) as caught:
        await session.transfer(there, ["nobody", good, "read", foreign])
    assert caught.value.missing == ("nobody", "read", foreign.handle_id)

    assert everything(path) == before


async def test_a_live_task_of_the_id_at_the_destination_stops_the_whole_transfer(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    await session.register("good", OTHER)
    await session.register("t", OTHER)
    await there.register("t", OTHER)
    before = everything(path)

    for chosen in (["t"], ["good", "t"], ["t", "good"]):
        with pytest.raises(TransferConflict, match=r"'t' is live in session 'desktop:s2'"):
            await session.transfer(there, chosen)

    assert everything(path) == before


async def test_a_descendant_whose_id_is_live_at_the_destination_stops_the_whole_transfer(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    parent = await session.register("parent", OTHER)
    await session.register("child", OTHER, parent=parent)
    await there.register("child", OTHER)
    before = everything(path)

    with pytest.raises(TransferConflict, match="'child'"):
        await session.transfer(there, [parent])

    assert everything(path) == before


async def test_a_destination_that_cannot_take_work_is_named_and_nothing_moves(
    opened: Callable[..., Any], store: TaskStore, session: SessionTasks, path: Path
) -> None:
    closed = await store.session("closed")
    await closed.close()
    stranger = await (await opened(runtime="other")).session("s2")
    await session.register("t", OTHER)
    before = everything(path)

    for to, error, named in (
        ("nowhere", UnknownSession, "desktop:nowhere"),
        (Scope("desktop", "nowhere"), UnknownSession, "desktop:nowhere"),
        (Scope("nobody", "s2"), UnknownSession, "nobody:s2"),
        (closed, SessionClosed, "desktop:closed"),
        (stranger, SessionError, "other:s2"),
    ):
        with pytest.raises(error, match=named):
            await session.transfer(to, ["t"])

    assert everything(path) == before


async def test_into_the_same_session_there_is_nothing_to_do(session: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)
    await session.register("child", OTHER, parent=task)
    before = everything(path)

    for to in (session, session.scope, "s1"):
        assert await session.transfer(to, [task]) == [await task.record()]
    with pytest.raises(HandleNotVisible):
        await session.transfer(session, ["nobody"])

    assert everything(path) == before


# --- events and filters ---------------------------------------------------------------------------------------------


async def test_the_event_of_a_transfer_is_seen_from_both_sessions_and_what_follows_from_the_new_one_alone(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    live = [one.events() for one in (session, there)]
    before = (await next_event(store, EventType.SESSION_OPENED, after=1)).seq
    await session.register("t", OTHER)
    await session.transfer(there, ["t"])
    await there.update("t", progress="half")
    await there.complete("t", TaskState.COMPLETED)
    end = await session.register("end", OTHER)

    seen = [await take(events, 3) for events in live]

    assert [event.type for event in seen[0]] == [EventType.REGISTERED, EventType.TRANSFERRED, EventType.REGISTERED]
    assert [event.type for event in seen[1]] == [EventType.TRANSFERRED, EventType.PROGRESS, EventType.COMPLETED]
    assert seen[0][-1].task_seq == end.task_seq
    moved = seen[0][1]
    assert (moved, moved.scope, moved.from_scope) == (seen[1][0], there.scope, session.scope)
    assert {event.scope for event in seen[1]} == {there.scope}
    assert seen[0][0].scope == session.scope
    # read from the table afterwards it is the same
    assert [await take(one.events(before), 3) for one in (session, there)] == seen
    for one in (session, there):
        assert await take(one.events(0, types=[EventType.TRANSFERRED]), 1) == [moved]


async def test_a_handle_follows_its_task_through_sessions(session: SessionTasks, there: SessionTasks) -> None:
    task = await session.register("t", OTHER)
    await session.transfer(there, ["t"])
    await there.complete("t", TaskState.COMPLETED)

    assert [(str(event.type), event.scope.session_id) async for event in task.events()] == [
        ("registered", "s1"),
        ("transferred", "s2"),
        ("completed", "s2"),
    ]


async def test_every_filter_finds_transferred_work_where_it_is(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    await session.register("t", TaskKind.MONITOR)
    await session.transfer(there, ["t"])

    for scope, count in ((session.scope, 0), (there.scope, 1)):
        wanted = TaskFilter(scope=scope, kinds=frozenset({TaskKind.MONITOR}))
        assert [record.scope for record in await store.list(wanted)] == [scope] * count
        assert await store.count(wanted) == count
    assert {str(one.scope): one.live_tasks for one in await store.sessions()} == {"desktop:s1": 0, "desktop:s2": 1}
    assert (await store.get(there, "t")).scope == there.scope
    with pytest.raises(TaskNotFound):
        await store.get(session, "t")


# --- what was given away is the other's to end ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel_all", "cancel_unreferenced", "handoff", "close"])
async def test_a_session_that_ends_its_work_leaves_what_it_gave_away_before(
    store: TaskStore, session: SessionTasks, there: SessionTasks, how: str
) -> None:
    parent = await session.register("parent", OTHER, close_policy="cancel")
    child = await session.register("child", OTHER, parent=parent)
    below = await session.register("below", OTHER, parent=child)
    staying = await session.register("staying", OTHER, parent=parent)
    await session.transfer(there, [child])
    born_there = await there.register("born there", OTHER, parent=child)

    if how == "cancel_all":
        await session.cancel_all()
    elif how == "cancel_unreferenced":
        await session.cancel_unreferenced([])
    elif how == "handoff":
        await session.handoff(await store.session("s3"), [])
    else:
        await session.close()

    ended = [await handle.record() for handle in (parent, staying)]
    left = [await handle.record() for handle in (child, below, born_there)]
    assert states(ended) == ["cancelled"] * 2
    assert states(left) == ["running"] * 3


async def test_a_parents_own_cancel_reaches_a_child_that_was_given_away(
    session: SessionTasks, there: SessionTasks
) -> None:
    parent = await session.register("parent", OTHER)
    child = await session.register("child", OTHER, parent=parent)
    await session.transfer(there, [child])

    await session.cancel("parent")

    assert (await child.record()).state is TaskState.CANCELLED


async def test_a_transfer_and_a_cancel_of_all_in_one_commit_agree(session: SessionTasks, there: SessionTasks) -> None:
    parent = await session.register("parent", OTHER)
    child = await session.register("child", OTHER, parent=parent)

    await asyncio.gather(session.transfer(there, [child]), session.cancel_unreferenced([]))

    assert (await parent.record()).state is TaskState.CANCELLED
    assert (await child.record()).state is TaskState.RUNNING


@pytest.mark.parametrize("how", ["cancel", "cancel_all", "cancel_unreferenced", "close"])
async def test_what_was_given_to_the_session_of_a_sub_agent_ends_with_the_sub_agent(
    store: TaskStore, session: SessionTasks, there: SessionTasks, how: str
) -> None:
    await session.register("agent", OTHER, child_session_id="s2", close_policy="cancel")
    given = await session.register("given", OTHER)
    await session.transfer(there, [given])
    below = await there.register("below", OTHER, parent=given)
    elsewhere = await (await store.session("s3")).register("elsewhere", OTHER, parent=given)

    match how:
        case "cancel":
            await session.cancel("agent")
        case "cancel_all":
            await session.cancel_all()
        case "cancel_unreferenced":
            await session.cancel_unreferenced([])
        case "close":
            await session.close()

    assert states([await given.record(), await below.record(), await elsewhere.record()]) == ["cancelled"] * 3
