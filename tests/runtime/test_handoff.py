"""Handoff: what is kept goes to the successor and the rest is asked to end, at once, and the same again when repeated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    HandleNotVisible,
    Handoff,
    IdempotencyConflict,
    InvalidId,
    Recovery,
    Scope,
    SessionClosed,
    SessionError,
    SessionTasks,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskRecord,
    TaskState,
    TaskStore,
    TransferConflict,
    UnknownSession,
)
from tests.runtime.support import RUNTIME, event_types, everything, hold, rows, states, take

OTHER = TaskKind.OTHER
FOREVER = 3600.0


def names(records: Any) -> list[str]:
    """Return the ids of records, in their order."""
    return [record.id for record in records]


async def register(session: SessionTasks, *task_ids: str) -> list[TaskHandle]:
    """Register external work without callbacks: its cancel ends it at once."""
    return [await session.register(task_id, OTHER) for task_id in task_ids]


async def live(session: SessionTasks) -> dict[str, str]:
    """List a session's live work, hidden too."""
    return {record.label: str(record.state) for record in await session.list(include_hidden=True)}


# --- what it does ---------------------------------------------------------------------------------------------------


async def test_what_is_kept_moves_the_rest_is_cancelled_and_it_is_written_down(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    kept, _, rest = await register(session, "kept", "gone before", "rest")
    await session.cancel("gone before", "no")

    handoff = await session.handoff(there, [kept])

    assert (handoff.source, handoff.destination) == (session.scope, there.scope)
    assert (names(handoff.moved), names(handoff.cancelled)) == (["kept"], ["rest"])
    assert handoff.moved == (await there.get("kept"),)
    assert handoff.cancelled == (await rest.record(),)
    assert (await rest.record()).cancel_requested_by is not None
    assert (await live(session), await live(there)) == ({}, {"kept": "running"})
    [row] = rows(path, "SELECT * FROM handoffs")
    assert (row["handoff_id"], row["source"], row["destination"]) == (handoff.id, "desktop:s1", "desktop:s2")
    assert handoff.id.startswith("handoff-")


async def test_it_is_one_commit_that_both_sessions_are_told_of(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    following = [one.events(types=[EventType.HANDED_OFF]) for one in (session, there)]
    kept, rest = await register(session, "kept", "rest")
    before = rows(path, "SELECT max(seq) AS seq FROM events")[0]["seq"]

    handoff = await session.handoff(there, [kept])

    written = rows(path, "SELECT * FROM events WHERE seq > ? ORDER BY seq", before)
    assert [event["type"] for event in written] == ["transferred", "cancel_requested", "cancelled", "handed_off"]
    assert len({event["at"] for event in written}) == 1
    [[seen], [too]] = [await take(events, 1) for events in following]
    assert seen == too
    assert (seen.scope, seen.from_scope, seen.task_seq, seen.at) == (there.scope, session.scope, None, handoff.at)
    assert seen.data == {"handoff_id": handoff.id, "moved": [kept.task_seq], "cancelled": [rest.task_seq]}
    assert await take(session.events(0, types=[EventType.HANDED_OFF]), 1) == [seen]


async def test_it_does_not_wait_for_bodies(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = await opened(cancel_grace=FOREVER)
    session, there = await store.session("s1"), await store.session("s2")
    called, asked = asyncio.Event(), asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def slow_to_end(task: TaskContext) -> str:
        started.set()
        await task.cancelled()
        asked.set()
        await release.wait()
        return "tidied up"

    async def callback() -> None:
        called.set()
        await release.wait()

    await session.spawn(slow_to_end, id="body")
    await session.register("external", OTHER, cancel=callback)
    await started.wait()

    handoff = await session.handoff(there, [])

    assert states(handoff.cancelled) == ["cancel_requested", "cancel_requested"]
    async with asyncio.timeout(20):
        await asyncio.gather(asked.wait(), called.wait())
    assert await live(session) == {"slow_to_end": "cancel_requested", "external": "cancel_requested"}
    release.set()
    # the handoff does not change what the bodies make of it
    assert (await (await session.handle("body")).wait()).result == "tidied up"
    assert (await (await session.handle("external")).wait()).state is TaskState.CANCELLED


async def test_what_waits_for_a_slot_is_cancelled_at_once_and_never_runs(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session, there = await store.session("s1"), await store.session("s2")
    ran: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        ran.append(task.id)
        return str(task.scope)

    running = await session.spawn(hold(started, release))
    await started.wait()
    kept, rest = [await session.spawn(work, id=name) for name in ("kept", "rest")]

    handoff = await session.handoff(there, [running, kept])

    assert (states(handoff.moved), states(handoff.cancelled)) == (["running", "pending"], ["cancelled"])
    release.set()
    assert await (await there.handle("kept")) == "desktop:s2"
    assert (await rest.record()).attempt == 0
    assert ran == ["kept"]


async def test_the_source_stays_open(session: SessionTasks, there: SessionTasks) -> None:
    await register(session, "kept", "rest")

    await session.handoff(there, ["kept"])

    [fresh] = await register(session, "rest")
    assert (await fresh.record()).state is TaskState.RUNNING


async def test_an_empty_keep_cancels_everything_that_is_listed(session: SessionTasks, there: SessionTasks) -> None:
    await register(session, "one", "two")

    handoff = await session.handoff(there, [])

    assert (handoff.moved, names(handoff.cancelled)) == ((), ["one", "two"])
    assert states(handoff.cancelled) == ["cancelled", "cancelled"]
    assert await session.handoff(there, []) == handoff


async def test_what_is_finished_and_not_kept_stays_to_be_read(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    kept, rest = await register(session, "kept", "rest")
    for task in (kept, rest):
        await session.complete(task.id, TaskState.COMPLETED, result=task.id)

    handoff = await session.handoff(there, [kept])

    assert (names(handoff.moved), states(handoff.moved), handoff.cancelled) == (["kept"], ["completed"], ())
    assert await (await session.handle("rest")) == "rest"
    assert await (await there.handle("kept")) == "kept"
    assert event_types(path, rest.task_seq) == ["registered", "completed"]


async def test_live_descendants_and_unread_notes_go_along(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    third = await store.session("s3")
    kept = await session.register("kept", OTHER, notify_on_end=True)
    child = await session.register("child", OTHER, parent=kept, notify_on_end=True)
    await session.register("grandchild", OTHER, parent=child)
    await third.register("elsewhere", OTHER, parent=kept)
    await session.complete("kept", TaskState.COMPLETED)

    handoff = await session.handoff(there, ["kept"])

    assert (names(handoff.moved), handoff.cancelled) == (["kept", "child", "grandchild"], ())
    assert await live(third) == {"elsewhere": "running"}
    assert ([note.task_id for note in await there.notes()], await session.notes()) == (["kept"], [])


async def test_a_kept_child_of_a_cancelled_parent_goes_on_and_may_go_on_spawning(
    store: TaskStore, session: SessionTasks, there: SessionTasks, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def grandchild(task: TaskContext) -> str:
        return str(task.scope)

    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> Any:
        await release.wait()
        here = await store.session(task.scope.session_id)
        return [task.stop_reason, await (await here.spawn(grandchild, parent=task.id))]

    parent = await session.spawn(asyncio.Event().wait(), id="parent")
    kept = await session.spawn(child, id="kept", parent=parent)
    sibling = await session.spawn(asyncio.Event().wait(), id="sibling", parent=parent)

    handoff = await session.handoff(there, [kept])

    assert (names(handoff.moved), names(handoff.cancelled)) == (["kept"], ["parent", "sibling"])
    assert (await parent.wait()).state is TaskState.CANCELLED
    assert (await sibling.wait()).state is TaskState.CANCELLED
    release.set()
    assert await (await there.handle("kept")).result(timeout=20) == [None, "desktop:s2"]


async def test_the_work_of_a_cancelled_sub_agents_session_is_cancelled_and_that_of_a_kept_one_is_not(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    agents = {name: await store.session(f"session of {name}") for name in ("kept", "rest")}
    for name, agent in agents.items():
        await session.register(name, TaskKind.SUBAGENT, child_session_id=agent.scope.session_id)
        await agent.register(f"work of {name}", OTHER)

    handoff = await session.handoff(there, ["kept"])

    assert (names(handoff.moved), names(handoff.cancelled)) == (["kept"], ["rest", "work of rest"])
    assert await live(agents["kept"]) == {"work of kept": "running"}
    assert await live(agents["rest"]) == {}


async def test_hidden_work_is_neither_moved_nor_cancelled_not_even_under_a_cancelled_parent(
    session: SessionTasks, there: SessionTasks, release: asyncio.Event, path: Path
) -> None:
    born = asyncio.Event()

    async def parent() -> None:
        await session.spawn_hidden("under a parent", release.wait())
        born.set()
        await asyncio.Event().wait()

    rest = await session.spawn(parent(), id="rest")
    await session.spawn_hidden("alone", release.wait())
    await born.wait()

    handoff = await session.handoff(there, [])

    assert (handoff.moved, names(handoff.cancelled)) == ((), ["rest"])
    await rest.wait()
    assert await live(session) == {"under a parent": "running", "alone": "running"}
    release.set()
    await session.await_hidden()


async def test_hidden_work_below_what_is_kept_goes_along(
    session: SessionTasks, there: SessionTasks, release: asyncio.Event
) -> None:
    born = asyncio.Event()

    async def parent() -> None:
        await session.spawn_hidden("below", release.wait())
        born.set()
        await asyncio.Event().wait()

    await session.spawn(parent(), id="kept")
    await born.wait()

    await session.handoff(there, ["kept"])

    assert (await live(session), await live(there)) == ({}, {"parent": "running", "below": "running"})
    assert await there.sync_needed()


async def test_a_store_that_only_makes_requests_hands_over_and_the_bodies_follow(
    store: TaskStore,
    session: SessionTasks,
    there: SessionTasks,
    started: asyncio.Event,
    release: asyncio.Event,
    path: Path,
) -> None:
    called = asyncio.Queue[TaskRecord]()
    kept = await session.spawn(hold(started, release), id="kept")
    rest = await session.spawn(asyncio.Event().wait(), id="rest")
    await session.register("external", OTHER, cancel=called.put_nowait)
    await started.wait()

    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        handoff = await (await outside.session("s1")).handoff("s2", [kept.to_json()])

    assert (names(handoff.moved), names(handoff.cancelled)) == (["kept"], ["rest", "external"])
    assert (await rest.wait(timeout=20)).state is TaskState.CANCELLED
    async with asyncio.timeout(20):
        assert (await called.get()).id == "external"
    release.set()
    assert (await kept.wait(timeout=20)).scope == there.scope


# --- repeated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [None, "plan 1"])
async def test_repeated_it_returns_what_was_done_and_changes_nothing_although_everything_moved_on(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path, id: str | None
) -> None:
    third = await store.session("s3")
    kept, too, _ = await register(session, "kept", "too", "rest")
    first = await session.handoff(there, [kept, "too"], id=id)
    assert id is None or first.id == id
    # everything moves on: ends, is read, goes elsewhere, and the ids are used again
    await there.complete("kept", TaskState.COMPLETED, result=1)
    await kept
    await there.transfer(third, ["too"])
    if id is not None:
        await register(session, "kept", "too", "rest")
    await register(there, "kept")
    await session.close()
    await there.close()
    before = everything(path)

    for keep in ([kept, "too"], ["too", kept.to_json()], ["kept", too.handle_id], [kept, kept, "kept", too]):
        assert await session.handoff(there, keep, id=id) == first

    assert everything(path) == before
    assert Handoff.model_validate_json(first.model_dump_json()) == first


async def test_repeated_after_a_restart_and_from_elsewhere_it_is_the_same(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        session, _ = await store.session("s1"), await store.session("s2")
        kept, _ = await register(session, "kept", "rest")
        first = await session.handoff("s2", [kept])

    for again in (new(), TaskStore.connect(path, runtime=RUNTIME)):
        async with again:
            session = await again.session("s1")
            assert await session.handoff("s2", [kept.to_json()]) == first
            assert await session.handoff(Scope(RUNTIME, "s2"), ["kept"]) == first

    assert len(rows(path, "SELECT * FROM handoffs")) == 1


async def test_asked_for_many_times_at_once_it_is_done_once(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    kept, rest = await register(session, "kept", "rest")

    done = await asyncio.gather(*(session.handoff(there, [name]) for name in ["kept", kept] * 10))

    assert done == [done[0]] * 20
    assert event_types(path, kept.task_seq) == ["registered", "transferred"]
    assert event_types(path, rest.task_seq) == ["registered", "cancel_requested", "cancelled"]
    assert rows(path, "SELECT count(*) AS n FROM events WHERE type = 'handed_off'") == [{"n": 1}]


@pytest.mark.parametrize("id", [None, "plan 1"])
async def test_repeated_with_another_keep_it_is_refused_and_nothing_is_changed(
    session: SessionTasks, there: SessionTasks, path: Path, id: str | None
) -> None:
    kept, too, _ = await register(session, "kept", "too", "rest")
    first = await session.handoff(there, [kept, too], id=id)
    await register(session, "late")
    before = everything(path)

    for keep in ([], ["kept"], [too], ["kept", "too", "rest"], ["kept", "too", "late"], ["kept", "too", "nobody"]):
        with pytest.raises(IdempotencyConflict, match="'desktop:s1' to 'desktop:s2'") as caught:
            await session.handoff(there, keep, id=id)
        assert caught.value.task_id == first.id

    assert everything(path) == before


async def test_a_keep_of_two_incarnations_of_one_id_is_the_same_keep_in_any_order(
    session: SessionTasks, there: SessionTasks
) -> None:
    [old] = await register(session, "t")
    await session.complete("t", TaskState.COMPLETED)
    [live] = await register(session, "t")
    keep = ["t", old]

    first = await session.handoff(there, keep)

    assert {record.task_seq for record in first.moved} == {live.task_seq, old.task_seq}
    assert await session.handoff(there, keep) == first
    assert await session.handoff(there, [old, "t"]) == first
    assert await session.handoff(there, [old, live]) == first


async def test_an_id_belongs_to_one_destination(store: TaskStore, session: SessionTasks, there: SessionTasks) -> None:
    await store.session("s3")
    await register(session, "kept")
    await session.handoff(there, ["kept"], id="plan 1")

    with pytest.raises(IdempotencyConflict, match="plan 1"):
        await session.handoff("s3", ["kept"], id="plan 1")


async def test_handoffs_under_other_ids_and_of_other_sessions_are_others(
    session: SessionTasks, there: SessionTasks
) -> None:
    await register(session, "a", "b", "c")
    await register(there, "d")
    named = await session.handoff(there, ["a", "b", "c"], id="plan 1")
    back = await there.handoff(session, ["a", "b"])
    without = await session.handoff(there, ["a"])
    again = await there.handoff(session, ["a"], id="plan 1")

    done = [named, back, without, again]

    assert [names(one.moved) for one in done] == [["a", "b", "c"], ["a", "b"], ["a"], ["a"]]
    assert [names(one.cancelled) for one in done] == [[], ["c", "d"], ["b"], []]
    assert len({(one.source, one.id) for one in done}) == 4
    assert await session.handoff(there, ["b", "c", "a"], id="plan 1") == named
    assert await there.handoff(session, ["a"], id="plan 1") == again
    with pytest.raises(IdempotencyConflict, match="has some of these again"):
        await session.handoff(there, ["a"])


async def test_of_two_that_keep_the_same_for_different_successors_one_is_refused_whole(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    third = await store.session("s3")
    await register(session, "kept", "rest")

    tries = await asyncio.gather(*(session.handoff(to, ["kept"]) for to in (there, third)), return_exceptions=True)

    assert sorted(type(one).__name__ for one in tries) == ["HandleNotVisible", "Handoff"]
    assert sorted([len(await there.list()), len(await third.list())]) == [0, 1]


# --- refused: nothing is changed, and nothing is remembered ---------------------------------------------------------


async def test_what_cannot_be_kept_stops_the_whole_and_a_better_keep_is_no_conflict(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    good, read, _ = await register(session, "good", "read", "rest")
    await session.complete("read", TaskState.COMPLETED)
    await read
    [foreign] = await register(there, "foreign")
    observed = await session.observe(there, "foreign")
    before = everything(path)

    with pytest.raises(HandleNotVisible) as caught:
        await session.handoff(there, [good, "nobody", "read", foreign, observed, "h-nobody"])
    assert caught.value.missing == ("nobody", "read", foreign.handle_id, observed.handle_id, "h-nobody")
    assert everything(path) == before

    assert names((await session.handoff(there, [good])).moved) == ["good"]


async def test_a_conflict_at_the_destination_stops_the_whole(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    kept, _, _ = await register(session, "kept", "also kept", "rest")
    await session.register("child", OTHER, parent=kept)
    before: Any = None

    for task_id in ("also kept", "child"):
        [in_the_way] = await register(there, task_id)
        before = everything(path)
        with pytest.raises(TransferConflict, match=repr(task_id)):
            await session.handoff(there, ["kept", "also kept"])
        assert everything(path) == before
        await in_the_way.cancel()

    assert names((await session.handoff(there, ["kept", "also kept"])).moved) == ["kept", "also kept", "child"]


async def test_a_destination_that_cannot_take_work_stops_the_whole_even_if_nothing_is_kept(
    opened: Callable[..., Any], store: TaskStore, session: SessionTasks, path: Path
) -> None:
    closed = await store.session("closed")
    await closed.close()
    stranger = await (await opened(runtime="other")).session("s2")
    await register(session, "kept", "rest")
    before = everything(path)

    for to, error in (
        ("nowhere", UnknownSession),
        (Scope("nobody", "s2"), UnknownSession),
        (closed, SessionClosed),
        (stranger, SessionError),
    ):
        for keep in (["kept"], []):
            with pytest.raises(error):
                await session.handoff(to, keep)

    assert everything(path) == before


async def test_an_id_that_cannot_be_stored_is_refused(session: SessionTasks, there: SessionTasks, path: Path) -> None:
    await register(session, "kept", "rest")
    before = everything(path)

    for bad in ("", "\0", "a\nb", "\ud800", "x" * 257, 5, b"plan"):
        with pytest.raises(InvalidId):
            await session.handoff(there, ["kept"], id=bad)  # type: ignore[arg-type]

    assert everything(path) == before


# --- cancel of what is not referenced -------------------------------------------------------------------------------


async def test_what_is_not_referenced_is_asked_to_end_and_what_is_goes_on(store: TaskStore) -> None:
    forms = (
        lambda task: task,
        lambda task: task.handle_id,
        lambda task: json.loads(json.dumps(task.to_json())),
        lambda task: task.id,
    )
    for number, form in enumerate(forms):
        one = await store.session(f"keeps by form {number}")
        first, second, _, _ = await register(one, "one", "two", "three", "four")

        asked = await one.cancel_unreferenced([form(first), form(second)])

        assert (names(asked), states(asked)) == (["three", "four"], ["cancelled", "cancelled"])
        assert await live(one) == {"one": "running", "two": "running"}


async def test_it_waits_for_no_body(opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event) -> None:
    store = await opened(cancel_grace=FOREVER)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def slow_to_end(task: TaskContext) -> str:
        await hold(started, release)
        return "tidied up"

    task = await session.spawn(slow_to_end)
    await started.wait()

    asked = await session.cancel_unreferenced([])

    assert asked == [await task.record()]
    assert states(asked) == ["cancel_requested"]
    release.set()
    assert await task == "tidied up"


async def test_what_descends_from_a_reference_is_covered_at_any_depth_and_its_ancestors_are_not(
    store: TaskStore, session: SessionTasks
) -> None:
    agents = await store.session("agent")
    above = await session.register("above", OTHER)
    kept = await session.register("kept", OTHER, parent=above)
    child = await session.register("child", OTHER, parent=kept)
    await session.register("grandchild", OTHER, parent=child)
    agent = await session.register("agent", TaskKind.SUBAGENT, parent=kept, child_session_id="agent")
    deep = await agents.register("deep", OTHER)
    await session.register("through the agent", OTHER, parent=deep)
    await session.register("sibling", OTHER, parent=above)

    asked = await session.cancel_unreferenced([kept])

    assert names(asked) == ["above", "sibling"]
    assert set(await live(session)) == {"kept", "child", "grandchild", "agent", "through the agent"}
    assert (await agent.record()).state is TaskState.RUNNING
    assert await live(agents) == {"deep": "running"}


async def test_the_cancel_of_what_is_not_referenced_reaches_what_descends_from_it(
    store: TaskStore, session: SessionTasks
) -> None:
    agents, third = await store.session("agent"), await store.session("s3")
    await session.register("agent", TaskKind.SUBAGENT, child_session_id="agent")
    await register(agents, "work")
    await register(third, "stranger")

    asked = await session.cancel_unreferenced([])

    assert names(asked) == ["agent", "work"]
    assert await live(third) == {"stranger": "running"}


async def test_hidden_work_is_not_touched(session: SessionTasks, release: asyncio.Event) -> None:
    born = asyncio.Event()

    async def parent() -> None:
        await session.spawn_hidden("under a parent", release.wait())
        born.set()
        await asyncio.Event().wait()

    rest = await session.spawn(parent())
    alone = await session.spawn_hidden("alone", release.wait())
    await born.wait()

    asked = await session.cancel_unreferenced([])

    assert names(asked) == [rest.id]
    await rest.wait()
    assert await live(session) == {"under a parent": "running", "alone": "running"}
    assert (await session.cancel(alone)).state is TaskState.CANCELLED


async def test_an_unknown_reference_cancels_nothing_and_all_are_named(
    session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    await register(session, "one", "two")
    [foreign] = await register(there, "foreign")
    before = everything(path)

    with pytest.raises(HandleNotVisible) as caught:
        await session.cancel_unreferenced(["one", "nobody", foreign, "h-nobody"])

    assert caught.value.missing == ("nobody", foreign.handle_id, "h-nobody")
    assert everything(path) == before


async def test_a_reference_to_what_has_finished_is_no_mistake(session: SessionTasks, path: Path) -> None:
    one, two, _ = await register(session, "one", "two", "three")
    for task in (one, two):
        await session.complete(task.id, TaskState.COMPLETED)
    await one

    assert names(await session.cancel_unreferenced([one, "two"])) == ["three"]

    count = everything(path)
    assert await session.cancel_unreferenced([one, "two"]) == []
    assert everything(path) == count
