"""Families of tasks: a cancel covers all below, through finished generations and other sessions, and who comes too late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lash_store import (
    InvalidId,
    Recovery,
    SessionClosed,
    SessionError,
    SessionTasks,
    TaskCancelled,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskMode,
    TaskNotFound,
    TaskRecord,
    TaskState,
    TaskStore,
    UnknownSession,
    families,
)
from tests.runtime.support import event_count, event_types, rows

OTHER, SUBAGENT = TaskKind.OTHER, TaskKind.SUBAGENT
CANCELLED, RUNNING = TaskState.CANCELLED, TaskState.RUNNING
ENDS = ["completed", "failed", "abandoned"]


async def forever() -> None:
    """The body of work that only a cancel ends."""
    await asyncio.Event().wait()


async def never() -> None:
    """The body of work that must not start."""
    raise AssertionError("it ran")


async def end(session: SessionTasks, task_id: str, how: str) -> None:
    """End external work in a way that is no cancel."""
    if how == "abandoned":
        await session.abandon(task_id, "by hand")
    else:
        await session.complete(task_id, TaskState(how))


async def all_end(*handles: TaskHandle) -> list[TaskRecord]:
    """Wait for the end of tasks and return their rows."""
    records = [await handle.wait(20) for handle in handles]
    assert all(record.is_terminal for record in records), [(record.id, record.state) for record in records]
    return records


async def fates(*handles: TaskHandle) -> list[str]:
    """Return how tasks ended."""
    return [str(record.state) for record in await all_end(*handles)]


async def now(*handles: TaskHandle) -> list[str]:
    """Return the states of tasks as they stand."""
    return [str((await handle.record()).state) for handle in handles]


async def requested(session: SessionTasks, task_id: str, **options: Any) -> asyncio.Event:
    """Register work whose cancel was requested and goes on until the event is set."""
    release, called = asyncio.Event(), asyncio.Event()

    async def stop() -> None:
        called.set()
        await release.wait()

    await session.register(task_id, OTHER, stop, **options)
    await session.cancel(task_id, "enough", timeout=0)
    async with asyncio.timeout(20):
        await called.wait()
    return release


# --- by parent ------------------------------------------------------------------------------------------------------


async def test_children_of_every_mode_are_cancelled_with_their_parent(session: SessionTasks, path: Path) -> None:
    called: list[str] = []
    parent = await session.spawn(forever(), id="parent")
    managed = await session.spawn(forever(), id="managed", parent=parent)
    by_id = await session.spawn(forever(), id="by id", parent="parent")
    by_json = await session.spawn(forever(), id="by json", parent=parent.to_json())
    external = await session.register("external", OTHER, lambda: called.append("external"), parent=parent.handle_id)
    booked = await session.register("booked", OTHER, parent=parent)
    outside = await session.spawn(forever(), id="outside")
    below = [managed, by_id, by_json, external, booked]
    assert {(await one.record()).parent_seq for one in below} == {parent.task_seq}

    record = await parent.cancel("enough")

    assert record.state is CANCELLED
    ended = await all_end(*below)
    assert {(one.state, one.cancel_reason) for one in ended} == {(CANCELLED, "enough")}
    assert {one.cancel_requested_by for one in ended} == {record.cancel_requested_by}
    assert called == ["external"]
    assert await now(outside) == ["running"]
    [*asked] = rows(path, "SELECT at, data ->> 'because_of' AS because FROM events WHERE type = 'cancel_requested'")
    assert [one["because"] for one in asked] == [None, *[parent.task_seq] * 5]
    assert len({one["at"] for one in asked}) == 1


async def test_a_cancel_that_cannot_cover_all_covers_none(
    session: SessionTasks, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    parent = await session.register("parent", OTHER)
    child = await session.register("child", OTHER, parent=parent)
    count = event_count(path)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no look below")

    monkeypatch.setattr(families, "live_descendants", broken)
    with pytest.raises(RuntimeError, match="no look below"):
        await parent.cancel()

    assert await now(parent, child) == ["running", "running"]
    assert event_count(path) == count


async def test_work_that_waits_for_a_slot_is_covered_and_never_starts(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    parent = await session.register("parent", OTHER)

    async def running() -> None:
        started.set()
        await forever()

    first = await session.spawn(running(), parent=parent)
    await started.wait()
    pending = await session.spawn(never(), parent=parent)

    await parent.cancel()

    assert await fates(first, pending) == ["cancelled", "cancelled"]
    assert (await pending.record()).attempt == 0
    assert await (await session.spawn(asyncio.sleep(0, "the slot is free"))) == "the slot is free"


async def test_hidden_work_of_a_body_is_cancelled_with_it(store: TaskStore, session: SessionTasks) -> None:
    hidden: asyncio.Future[TaskHandle] = asyncio.get_running_loop().create_future()

    async def hides() -> None:
        hidden.set_result(await session.spawn_hidden("hidden", forever()))
        await forever()

    hider = await session.spawn(hides())
    async with asyncio.timeout(20):
        child = await hidden

    await hider.cancel("enough")

    [record] = await all_end(child)
    assert (record.mode, record.state, record.cancel_reason) == (TaskMode.HIDDEN, CANCELLED, "enough")
    assert record.parent_seq == hider.task_seq
    async with asyncio.timeout(20):
        await session.await_hidden()


async def test_a_cancel_of_a_child_leaves_its_parent_and_siblings_alone(session: SessionTasks) -> None:
    parent = await session.spawn(forever(), id="parent")
    child = await session.spawn(forever(), id="child", parent=parent)
    sibling = await session.spawn(forever(), id="sibling", parent=parent)
    grandchild = await session.spawn(forever(), id="grandchild", parent=child)

    await child.cancel()

    assert await fates(child, grandchild) == ["cancelled", "cancelled"]
    assert await now(parent, sibling) == ["running", "running"]


async def test_a_descendant_that_had_ended_keeps_its_end(session: SessionTasks, path: Path) -> None:
    parent = await session.register("parent", OTHER)
    ended = [await session.register(f"{how} child", OTHER, parent=parent) for how in ENDS]
    for handle, how in zip(ended, ENDS, strict=True):
        await end(session, handle.id, how)
    before = [await handle.record() for handle in ended]

    await parent.cancel()

    assert [await handle.record() for handle in ended] == before
    assert [event_types(path, handle.task_seq) for handle in ended] == [["registered", how] for how in ENDS]


async def test_grandchildren_are_cancelled_with_their_grandparent(session: SessionTasks) -> None:
    line = [await session.spawn(forever(), id="t0")]
    for number in range(1, 40):
        line.append(await session.spawn(forever(), id=f"t{number}", parent=line[-1]))

    await line[0].cancel("all of you")

    assert {(one.state, one.cancel_reason) for one in await all_end(*line)} == {(CANCELLED, "all of you")}


@pytest.mark.parametrize("how", ENDS)
async def test_grandchildren_are_cancelled_through_a_finished_generation(session: SessionTasks, how: str) -> None:
    grandparent = await session.register("grandparent", OTHER)
    parent = await session.register("parent", OTHER, parent=grandparent)
    between = await session.register("between", OTHER, parent=parent)
    child = await session.spawn(forever(), id="child", parent=between)
    await end(session, "parent", how)
    await end(session, "between", how)

    await grandparent.cancel("enough")

    assert await fates(child) == ["cancelled"]
    assert (await child.record()).cancel_reason == "enough"


@pytest.mark.parametrize("how", ENDS)
async def test_a_parent_that_ends_in_another_way_leaves_its_children_alive(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event, how: str, path: Path
) -> None:
    parent = await session.register("parent", OTHER)
    child = await session.register("child", OTHER, parent=parent)

    await end(session, "parent", how)
    await session.cancel("parent", "too late")
    born_later = await session.register("born later", OTHER, parent=parent)

    assert await now(child, born_later) == ["running", "running"]
    assert event_types(path, child.task_seq) == ["registered"]
    assert (await born_later.record()).parent_seq == parent.task_seq


@pytest.mark.parametrize("way", ["unregister", "complete"])
@pytest.mark.parametrize("by_session", [False, True], ids=["parent", "subagent"])
async def test_work_that_leaves_the_books_as_cancelled_treats_who_is_below_and_who_comes_alike(
    store: TaskStore, session: SessionTasks, way: str, by_session: bool
) -> None:
    here, parent = (await store.session("inner"), None) if by_session else (session, "parent")
    await session.register("parent", OTHER, child_session_id="inner" if by_session else None)
    child = await here.register("child", OTHER, parent=parent)

    if way == "unregister":
        await session.unregister("parent")
    else:
        await session.complete("parent", CANCELLED)
    born_later = await here.register("born later", OTHER, parent=parent)

    # nobody asked for a cancel of the family: it would be odd to let one live and bury the other
    assert len(set(await now(child, born_later))) == 1


async def test_a_second_cancel_of_a_parent_writes_nothing(session: SessionTasks, path: Path) -> None:
    release = await requested(session, "parent")
    child = await session.register("child", OTHER, parent="parent")
    count = event_count(path)

    await session.cancel("parent", "again", timeout=0)

    assert event_count(path) == count
    assert (await child.record()).cancel_reason == "enough"
    release.set()
    await session.cancel("parent")


async def test_descendants_that_another_owner_runs_are_cancelled_there(
    session: SessionTasks, opened: Callable[..., Any], started: asyncio.Event
) -> None:
    parent = await session.register("parent", OTHER)
    theirs = await (await opened()).session("s1")
    stopped = asyncio.Event()

    async def body() -> None:
        started.set()
        try:
            await forever()
        finally:
            stopped.set()

    child = await theirs.spawn(body(), id="child", parent="parent")
    external = await theirs.register("external", OTHER, lambda: None, parent="child")
    await started.wait()

    await parent.cancel("enough")

    assert await fates(child, external) == ["cancelled", "cancelled"]
    assert stopped.is_set()
    assert (await external.record()).callback_begun_at is not None


# --- by the session a sub-agent works in ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TaskKind))
@pytest.mark.parametrize("external", [False, True], ids=["managed", "external"])
async def test_all_in_the_session_of_a_subagent_is_cancelled_with_it(
    store: TaskStore, session: SessionTasks, kind: TaskKind, external: bool
) -> None:
    inner = await store.session("inner", parent=session)
    where = {"id": "agent", "kind": kind, "child_session_id": "inner"}
    agent = await (session.register(**where) if external else session.spawn(forever(), **where))  # type: ignore[arg-type]
    below = [
        await inner.spawn(forever(), id="managed"),
        await inner.register("external", OTHER, lambda: None),
        await inner.spawn_hidden("hidden", forever()),
    ]
    below.append(await inner.spawn(forever(), id="its child", parent="managed"))
    beside = await session.spawn(forever(), id="beside")

    record = await agent.cancel("enough")

    assert record.child_session_id == "inner"
    assert {(one.state, one.cancel_reason) for one in await all_end(*below)} == {(CANCELLED, "enough")}
    assert await now(beside) == ["running"]


async def test_the_sessions_of_subagents_are_covered_at_any_depth(store: TaskStore, session: SessionTasks) -> None:
    agents, workers, here = [], [], session
    for depth in range(12):
        inner = await store.session(f"depth {depth}")
        agents.append(await here.register("agent", SUBAGENT, child_session_id=f"depth {depth}"))
        workers.append(await inner.spawn(forever(), id="worker"))
        here = inner

    await agents[0].cancel("all of you")

    assert {one.cancel_reason for one in await all_end(*agents, *workers)} == {"all of you"}
    assert set(await now(*agents, *workers)) == {"cancelled"}


@pytest.mark.parametrize("how", ENDS)
async def test_a_finished_subagent_between_does_not_hide_what_is_below_it(
    store: TaskStore, session: SessionTasks, how: str
) -> None:
    middle, inner = await store.session("middle"), await store.session("inner")
    agent = await session.register("agent", SUBAGENT, child_session_id="middle")
    await middle.register("second", SUBAGENT, child_session_id="inner")
    worker = await inner.spawn(forever(), id="worker")
    helper = await inner.spawn(forever(), id="helper", parent="worker")
    await end(middle, "second", how)

    await agent.cancel("enough")

    assert await fates(worker, helper) == ["cancelled", "cancelled"]


async def test_a_child_of_finished_work_in_the_session_of_a_subagent_is_covered_wherever_it_went(
    store: TaskStore, session: SessionTasks
) -> None:
    inner, elsewhere = await store.session("inner"), await store.session("elsewhere")
    agent = await session.register("agent", SUBAGENT, child_session_id="inner")
    lives = await inner.register("lives", OTHER)
    ended = await inner.register("ended", OTHER)
    children = [await inner.register(f"child of {parent.id}", OTHER, parent=parent) for parent in (lives, ended)]
    await inner.complete("ended", TaskState.COMPLETED)
    await inner.transfer(elsewhere, children)

    await agent.cancel("enough")

    # a finished generation hides nobody, neither below a parent nor below a sub-agent
    assert await now(*children) == ["cancelled", "cancelled"]


async def test_what_the_child_of_a_subagents_work_does_is_covered_by_both_ways(
    store: TaskStore, session: SessionTasks
) -> None:
    inner, deeper = await store.session("inner"), await store.session("deeper")
    root = await session.register("root", OTHER)
    agent = await session.register("agent", SUBAGENT, child_session_id="inner", parent=root)
    worker = await inner.register("worker", OTHER)
    second = await inner.register("second", SUBAGENT, child_session_id="deeper", parent=worker)
    last = await deeper.spawn(forever(), id="last")

    await root.cancel("enough")

    assert set(await fates(agent, worker, second, last)) == {"cancelled"}


async def test_circles_of_child_sessions_do_not_hang(store: TaskStore, session: SessionTasks) -> None:
    others = [await store.session(name) for name in ("s2", "s3")]
    ring = [session, *others]
    agents = [
        await here.register("agent", SUBAGENT, child_session_id=after.scope.session_id)
        for here, after in zip(ring, [*others, session], strict=True)
    ]
    workers = [await here.spawn(forever(), id="worker", parent="agent") for here in ring]

    async with asyncio.timeout(20):
        await agents[1].cancel("enough")
        assert set(await fates(*agents, *workers)) == {"cancelled"}
        late = await session.spawn(never(), id="late")
        assert (await late.record()).state is CANCELLED


async def test_a_circle_of_finished_subagents_lets_new_work_run(store: TaskStore, session: SessionTasks) -> None:
    other = await store.session("s2")
    await session.register("agent", SUBAGENT, child_session_id="s2")
    await other.register("agent", SUBAGENT, child_session_id="s1")
    await session.complete("agent", TaskState.COMPLETED)
    await other.complete("agent", TaskState.COMPLETED)

    async with asyncio.timeout(20):
        handle = await session.spawn(asyncio.sleep(0, "ran"))

        assert await handle == "ran"


async def test_a_session_of_that_name_in_another_runtime_is_left_alone(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any]
) -> None:
    inner = await store.session("inner")
    names = ("desktop2", "desktop-", "desk", "ci", "tablet")
    theirs = [await (await opened(runtime=name)).session("inner") for name in names]
    agent = await session.register("agent", SUBAGENT, child_session_id="inner")
    kept = [await other.register("job", OTHER) for other in theirs]
    covered = await inner.register("job", OTHER)

    await agent.cancel()
    kept += [await other.register("later", OTHER) for other in theirs]

    assert await now(covered) == ["cancelled"]
    assert set(await now(*kept)) == {"running"}


async def test_a_subagent_of_another_runtime_covers_the_session_of_its_own(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any]
) -> None:
    kept = await (await store.session("inner")).register("job", OTHER)
    other = await opened(runtime="tablet")
    covered = await (await other.session("inner")).register("job", OTHER)
    agent = await (await other.session("s1")).register("agent", SUBAGENT, child_session_id="inner")

    await agent.cancel("enough")

    assert await now(kept, covered) == ["running", "cancelled"]
    born_later = [await (await one.session("inner")).register("later", OTHER) for one in (store, other)]
    assert await now(*born_later) == ["running", "cancelled"]


async def test_sessions_whose_ids_have_colons_are_told_apart(store: TaskStore, session: SessionTasks) -> None:
    inner, outer = await store.session("a:b"), await store.session("a")
    agent = await session.register("agent", SUBAGENT, child_session_id="a:b")
    covered, kept = await inner.register("job", OTHER), await outer.register("job", OTHER)

    await agent.cancel()

    assert await fates(covered) == ["cancelled"]
    assert await now(kept) == ["running"]


async def test_a_cancel_reaches_into_a_session_that_is_closed(store: TaskStore, session: SessionTasks) -> None:
    inner = await store.session("inner")
    agent = await session.register("agent", SUBAGENT, child_session_id="inner")
    worker = await inner.spawn(forever(), id="worker")
    await inner.close()

    await agent.cancel()

    assert await fates(worker) == ["cancelled"]


async def test_a_child_session_must_be_there_and_open_and_another_one(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await (await store.session("closed")).close()
    count = event_count(path)

    for named, error in (
        ("nowhere", UnknownSession),
        ("closed", SessionClosed),
        ("s1", SessionError),
        ("", InvalidId),
        ("a\nb", InvalidId),
    ):
        with pytest.raises(error):
            await session.spawn(never(), child_session_id=named)
        with pytest.raises(error):
            await session.register("agent", SUBAGENT, child_session_id=named)

    assert event_count(path) == count
    assert rows(path, "SELECT * FROM tasks") == []


async def test_what_names_no_task_of_the_session_is_no_parent(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    foreign = await (await store.session("s2")).register("foreign", OTHER)
    count = event_count(path)

    for parent in ("foreign", "nobody", "h-nobody"):
        with pytest.raises(TaskNotFound):
            await session.spawn(never(), parent=parent)
        with pytest.raises(TaskNotFound):
            await session.register("job", OTHER, parent=parent)
    for bad in ("", "a\nb", 7, {"id": "t"}, [foreign]):
        with pytest.raises(InvalidId):
            await session.spawn(never(), parent=bad)  # type: ignore[arg-type]

    assert event_count(path) == count


async def test_a_handle_of_another_session_may_be_a_parent_and_a_cancel_reaches_across(
    store: TaskStore, session: SessionTasks
) -> None:
    parent = await session.register("parent", OTHER)
    successor = await store.session("s2")
    child = await successor.spawn(forever(), id="child", parent=parent)
    await session.transfer(successor, ["parent"])
    second = await session.register("second", OTHER, parent=parent)

    await successor.cancel("parent", "enough")

    assert await fates(child, second) == ["cancelled", "cancelled"]


async def test_a_task_of_another_runtime_is_no_parent(
    session: SessionTasks, opened: Callable[..., Any], path: Path
) -> None:
    theirs = await (await (await opened(runtime="ci")).session("s1")).register("theirs", OTHER)
    count = event_count(path)

    with pytest.raises(SessionError, match="runtime"):
        await session.spawn(never(), parent=theirs)
    with pytest.raises(SessionError, match="runtime"):
        await session.register("job", OTHER, parent=theirs)

    assert event_count(path) == count


async def test_a_handle_of_another_file_is_no_parent(session: SessionTasks, tmp_path: Path, path: Path) -> None:
    unrelated = await session.register("unrelated", OTHER)
    count = event_count(path)
    async with TaskStore(tmp_path / "other.db", runtime="desktop") as elsewhere:
        strange = await (await elsewhere.session("s1")).register("strange", OTHER)
        assert strange.task_seq == unrelated.task_seq

        # else a cancel of what happens to have its number here would take the child with it
        with pytest.raises((SessionError, TaskNotFound)):
            await session.register("child", OTHER, parent=strange)

    assert event_count(path) == count


# --- born cancelled -------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where something is spawned, and under whom; *release* lets a cancel that is in progress be finished."""

    here: SessionTasks
    parent: str | None = None
    release: asyncio.Event | None = None


async def under_a_requested_parent(store: TaskStore, session: SessionTasks) -> Place:
    return Place(session, "parent", await requested(session, "parent"))


async def under_a_cancelled_parent(store: TaskStore, session: SessionTasks) -> Place:
    await session.register("parent", OTHER)
    await session.cancel("parent", "enough")
    return Place(session, "parent")


async def under_a_cancelled_grandparent(store: TaskStore, session: SessionTasks) -> Place:
    await session.register("grandparent", OTHER)
    await session.register("parent", OTHER, parent="grandparent")
    await session.register("between", OTHER, parent="parent")
    await session.complete("parent", TaskState.COMPLETED)
    await session.complete("between", TaskState.FAILED)
    await session.cancel("grandparent", "enough")
    return Place(session, "between")


async def in_the_session_of_a_requested_subagent(store: TaskStore, session: SessionTasks) -> Place:
    inner = await store.session("inner")
    return Place(inner, release=await requested(session, "agent", child_session_id="inner"))


async def in_the_session_of_a_cancelled_subagent(store: TaskStore, session: SessionTasks) -> Place:
    inner = await store.session("inner")
    await session.register("agent", SUBAGENT, child_session_id="inner")
    await session.cancel("agent", "enough")
    return Place(inner)


async def below_a_finished_subagent_of_a_cancelled_one(store: TaskStore, session: SessionTasks) -> Place:
    middle, inner = await store.session("middle"), await store.session("inner")
    await session.register("agent", SUBAGENT, child_session_id="middle")
    await middle.register("second", SUBAGENT, child_session_id="inner")
    await middle.complete("second", TaskState.COMPLETED)
    await session.cancel("agent", "enough")
    return Place(inner)


async def below_the_parent_of_a_finished_subagent(store: TaskStore, session: SessionTasks) -> Place:
    inner = await store.session("inner")
    await session.register("root", OTHER)
    await session.register("agent", SUBAGENT, child_session_id="inner", parent="root")
    await session.complete("agent", TaskState.COMPLETED)
    await session.cancel("root", "enough")
    return Place(inner)


PLACES = [
    under_a_requested_parent,
    under_a_cancelled_parent,
    under_a_cancelled_grandparent,
    in_the_session_of_a_requested_subagent,
    in_the_session_of_a_cancelled_subagent,
    below_a_finished_subagent_of_a_cancelled_one,
    below_the_parent_of_a_finished_subagent,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("what", ["function", "coroutine", "external"])
async def test_what_is_spawned_under_a_cancelled_ancestor_is_born_cancelled_and_never_runs(
    opened: Callable[..., Any], place: Any, what: str, path: Path
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    ran: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def function(task: TaskContext) -> None:
        ran.append("function")

    async def body() -> None:
        ran.append("coroutine")

    here, parent, release = await place(store, session)
    coroutine = body()
    if what == "external":
        handle = await here.register("late", OTHER, lambda: ran.append("callback"), parent=parent)
    else:
        handle = await here.spawn(function if what == "function" else coroutine, id="late", parent=parent)

    record = await handle.record()
    assert (record.state, record.cancel_reason, record.id) == (CANCELLED, "enough", "late")
    assert (record.attempt, record.callback_begun_at) == (0, None)
    assert event_types(path, handle.task_seq) == ["registered", "cancelled"]
    with pytest.raises(TaskCancelled, match="enough"):
        await handle
    # the id is free, the slot too, and a cancel adds nothing
    count = event_count(path)
    assert await handle.cancel("again") == record
    await here.cancel("late", "again")
    assert event_count(path) == count
    if what == "coroutine":
        assert coroutine.cr_frame is None
    else:
        coroutine.close()
    other = await store.session("other")
    async with asyncio.timeout(20):
        assert await (await other.spawn(asyncio.sleep(0, "ran"))) == "ran"
    assert ran == []
    if release is not None:
        release.set()
    await session.cancel_all(timeout=20)


async def test_hidden_work_born_cancelled_holds_up_nobody(store: TaskStore, session: SessionTasks) -> None:
    inner = await store.session("inner")
    await session.register("agent", SUBAGENT, child_session_id="inner")
    await session.cancel("agent")

    handle = await inner.spawn_hidden("late", never())

    assert (await handle.record()).state is CANCELLED
    async with asyncio.timeout(20):
        await inner.await_hidden()
        await inner.await_background_work()


async def test_a_note_is_posted_for_the_end_of_what_is_born_cancelled(session: SessionTasks) -> None:
    await session.register("parent", OTHER)
    await session.cancel("parent", "enough")

    await session.spawn(never(), id="late", parent="parent", notify_on_end=True)

    [note] = await session.notes()
    assert (note.task_id, note.data) == ("late", {"state": "cancelled", "reason": "enough"})


async def test_a_session_runs_again_for_a_new_subagent_after_a_cancelled_one(
    store: TaskStore, session: SessionTasks
) -> None:
    inner = await store.session("inner")
    await session.register("first", SUBAGENT, child_session_id="inner")
    await session.cancel("first")
    assert (await (await inner.spawn(never())).record()).state is CANCELLED

    await session.register("second", SUBAGENT, child_session_id="inner")

    assert await (await inner.spawn(asyncio.sleep(0, "ran"))) == "ran"


async def test_two_subagents_of_one_session_cover_it_each(store: TaskStore, session: SessionTasks) -> None:
    inner = await store.session("inner")
    first = await session.register("first", SUBAGENT, child_session_id="inner")
    second = await session.register("second", SUBAGENT, child_session_id="inner")
    worker = await inner.register("worker", OTHER)

    await first.cancel("enough")

    assert await fates(worker) == ["cancelled"]
    assert await now(second) == ["running"]
    assert (await (await inner.register("next", OTHER)).record()).state is RUNNING
    await second.cancel("as well")
    assert (await session.list()) == []
    assert (await (await inner.register("last", OTHER)).record()).cancel_reason == "as well"


async def test_a_subagent_whose_cancel_was_requested_covers_its_session_although_a_later_one_has_ended(
    store: TaskStore, session: SessionTasks
) -> None:
    inner = await store.session("inner")
    release = await requested(session, "first", child_session_id="inner")
    await session.register("second", SUBAGENT, child_session_id="inner")
    await session.complete("second", TaskState.COMPLETED)

    late = await (await inner.register("late", OTHER)).record()

    release.set()
    await session.cancel("first")
    assert (late.state, late.cancel_reason) == (CANCELLED, "enough")


async def test_what_a_body_spawns_after_its_cancel_was_requested_is_born_cancelled(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=3600.0)
    session = await store.session("s1")
    late: list[TaskHandle] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        early.append(await session.spawn(forever(), parent=task.id))
        started.set()
        await task.cancelled()
        late.append(await session.spawn(never(), parent=task.id))
        late.append(await session.spawn_hidden("late", never()))

    early: list[TaskHandle] = []
    task = await session.spawn(work, id="work")
    await started.wait()

    record = await task.cancel("enough")

    assert record.state is TaskState.COMPLETED
    assert await fates(*early, *late) == ["cancelled"] * 3
    assert {(await handle.record()).cancel_reason for handle in late} == {"enough"}


async def test_a_cancel_outruns_a_body_that_keeps_spawning_children(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=3600.0, max_running=2)
    session = await store.session("s1")
    spawned: list[TaskHandle] = []

    @store.task(recovery=Recovery.RERUN)
    async def breeds(task: TaskContext) -> None:
        while not task.cancel_requested:
            spawned.append(await session.spawn(forever(), parent=task.id))
            if len(spawned) > 20:
                started.set()
        spawned.append(await session.spawn(never(), parent=task.id))

    task = await session.spawn(breeds, id="breeds")
    async with asyncio.timeout(20):
        await started.wait()

    await task.cancel("enough")

    assert set(await fates(*spawned)) == {"cancelled"}
    assert await session.list() == []


# --- who works in a session -------------------------------------------------------------------------------------------


async def test_a_parent_elsewhere_does_not_answer_for_the_sub_agent_of_the_session(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    await session.spawn(forever(), id="agent", kind=SUBAGENT, child_session_id="s2")
    parent = await session.spawn(forever(), id="parent")
    await session.cancel("agent", "enough")

    child = await there.spawn(never(), id="child", parent=parent)

    assert await fates(child) == ["cancelled"]
    assert (await child.record()).cancel_reason == "enough"
    assert await now(parent) == ["running"]


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_opening_a_session_again_frees_it_of_agents_that_were_cancelled_before_alone(
    store: TaskStore, session: SessionTasks, there: SessionTasks, cancelled_first: bool
) -> None:
    await session.spawn(forever(), id="agent", kind=SUBAGENT, child_session_id="s2")
    if cancelled_first:
        await session.cancel("agent")
    await there.close()
    there = await store.session("s2", reopen=True)
    if not cancelled_first:
        await session.cancel("agent")

    child = await there.spawn(asyncio.sleep(0), id="child")

    assert await fates(child) == ["completed" if cancelled_first else "cancelled"]


async def test_external_work_that_is_born_cancelled_says_who_asked_and_when(session: SessionTasks, path: Path) -> None:
    parent = await session.register("parent", OTHER)
    asked = await session.cancel("parent", "enough")

    child = await session.register("child", OTHER, parent=parent)
    grandchild = await session.register("grandchild", OTHER, parent=child)

    for born in (child, grandchild):
        record = await born.record()
        assert (record.state, record.cancel_reason) == (CANCELLED, "enough")
        assert record.cancel_requested_by == asked.cancel_requested_by
        assert record.cancel_requested_at is not None
        assert event_types(path, record.task_seq) == ["registered", "cancelled"]
