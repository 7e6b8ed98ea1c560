"""Rules of what is pruned: what may go, what must stay, what is left of it, and who is told."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    ArmOn,
    Backoff,
    EventType,
    HandleNotVisible,
    MonitorSpec,
    PruneReport,
    Recovery,
    Retention,
    SessionTasks,
    StorageBusy,
    StoreReadOnly,
    TaskContext,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskNotFound,
    TaskPruned,
    TaskState,
    TaskStore,
    UnknownSession,
    WakePolicy,
    feed,
    retention,
    transaction,
)
from tests.runtime.support import (
    RUNTIME,
    cancel_at,
    check_file,
    event_count,
    everything,
    hold,
    left_over,
    rows,
    take,
    threads,
)

OTHER, SUBAGENT = TaskKind.OTHER, TaskKind.SUBAGENT
BOOKS = ("tasks", "events", "handles", "steps", "signals", "inbox", "monitors", "updates")
"""The tables that say something of a task."""


@pytest.fixture(autouse=True)
def _agrees(path: Path) -> Iterator[None]:
    """Hold, when a test is over, that what is left of a task stands in one place."""
    yield
    if path.exists():
        check_pruned(path)


def check_pruned(path: Path) -> None:
    """Hold that no row has lost its task, and that of what has a tombstone there is nothing but a note nobody has read."""
    assert rows(path, "PRAGMA foreign_key_check") == []
    buried = "SELECT count(*) AS n FROM {} WHERE task_seq IN (SELECT task_seq FROM tombstones)"
    assert {table: rows(path, buried.format(table))[0]["n"] for table in BOOKS if table != "inbox"} == dict.fromkeys(
        (table for table in BOOKS if table != "inbox"), 0
    )
    known = "SELECT task_seq FROM tasks UNION SELECT task_seq FROM tombstones"
    assert rows(path, f"SELECT * FROM inbox WHERE task_seq NOT IN ({known})") == []
    bytes_of = "SELECT coalesce(sum(bytes), 0) FROM updates AS u WHERE u.scope = s.scope"
    assert rows(path, f"SELECT * FROM sessions AS s WHERE update_bytes <> ({bytes_of})") == []


async def done(session: SessionTasks, id: str, *, read: bool = True, **options: Any) -> TaskHandle:
    """Leave a completed task, whose result was handed out unless it is to be unread."""
    handle = await session.register(id, OTHER, **options)
    await session.complete(id, TaskState.COMPLETED, result=id)
    if read:
        assert await handle == id
    return handle


def ids(path: Path) -> list[str]:
    """Return the ids of the tasks that are in the file, oldest first."""
    return [row["id"] for row in rows(path, "SELECT id FROM tasks ORDER BY task_seq")]


def buried(path: Path) -> list[str]:
    """Return the ids of the tasks of which a tombstone is left, oldest first."""
    return [row["id"] for row in rows(path, "SELECT id FROM tombstones ORDER BY task_seq")]


# --- what goes, and what is left of it ------------------------------------------------------------------------------


async def test_a_task_goes_with_everything_of_it_and_leaves_a_tombstone(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        await task.save(1)
        await task.step("fetch", lambda: "fetched")
        await task.notify("half way")
        return await task.signal("go")

    handle = await session.spawn(work, id="t", idempotency_key="k", notify_on_end=True)
    await there.observe(session.scope, "t")
    await handle.signal("unasked")
    await handle.signal("go", "gone", key="s")
    assert await handle == "gone"
    async with session.inbox() as notes:
        assert len(notes) == 2
    [row] = rows(path, "SELECT * FROM tasks")
    of_it = rows(path, "SELECT seq FROM events WHERE task_seq IS NOT NULL ORDER BY seq")

    report = await store.prune()

    assert [row for table in BOOKS for row in rows(path, f"SELECT * FROM {table} WHERE task_seq IS NOT NULL")] == []
    [left] = rows(path, "SELECT * FROM tombstones")
    assert row["completed_at"] <= left.pop("pruned_at") <= transaction.utc_text(time.time())
    assert left == {
        "handle_id": handle.handle_id,
        "first_event": of_it[0]["seq"],
        "last_event": of_it[-1]["seq"],
        **{name: row[name] for name in left.keys() & row.keys()},
    }
    told = report.model_dump(exclude={"freed"})
    assert told == {
        "tasks": 1,
        "events": len(of_it),
        "seen": 1,
        "unread": 0,
        "needed": 0,
        "task_seq": 1,
        "newest_seq": 1,
    }


async def test_an_empty_file_and_one_where_nothing_may_go_are_not_written(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    assert await store.prune() == PruneReport()
    await done(session, "unread", read=False)
    await session.register("live", OTHER)
    before = everything(path)

    report = await store.prune()

    assert everything(path) == before
    assert (report.tasks, report.seen, report.unread, report.freed) == (0, 1, 1, 0)


async def test_a_second_prune_finds_nothing_more(store: TaskStore, session: SessionTasks, path: Path) -> None:
    for id in ("a", "b"):
        await done(session, id)

    assert ((await store.prune()).tasks, (await store.prune()).seen) == (2, 0)


async def test_numbers_are_never_used_again_when_everything_was_pruned(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    old = await done(session, "a")
    newest = rows(path, "SELECT max(seq) AS seq FROM events")[0]["seq"]
    await store.prune()

    new = await done(session, "b")

    assert new.task_seq > old.task_seq
    assert rows(path, "SELECT min(seq) AS seq FROM events WHERE task_seq IS NOT NULL")[0]["seq"] > newest


# --- what stays -----------------------------------------------------------------------------------------------------


async def test_nothing_live_is_touched_whatever_is_told(
    opened: Callable[..., Any], path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def stubborn(task: TaskContext) -> None:
        await task.save("half")
        await task.step("fetch", lambda: 1)
        try:
            await hold(started, release)
        except asyncio.CancelledError:
            await release.wait()

    await session.spawn(stubborn, id="asked", cancel_policy="abort_local")
    await started.wait()
    await session.cancel("asked", timeout=0)
    await session.spawn(asyncio.sleep(0), id="pending")
    await session.register("running", OTHER)
    await session.register("waiting", OTHER)
    await session.set_live_state("waiting", TaskState.WAITING)
    before = everything(path)
    assert {row["state"] for row in before["tasks"]} == {"cancel_requested", "pending", "running", "waiting"}

    report = await store.prune(unread=True, older_than=0, keep_last=0, before_cursor=2**62)

    assert (report.tasks, report.seen) == (0, 0)
    assert everything(path) == before
    release.set()


async def test_what_live_work_descends_from_stays_and_goes_once_that_has_ended(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    parent = None
    for id in ("great-grandparent", "grandparent", "parent", "child"):
        parent = await session.register(id, OTHER, **({} if parent is None else {"parent": parent}))
    for id in ("great-grandparent", "grandparent", "parent"):
        await session.complete(id, TaskState.COMPLETED)
    before = everything(path)

    report = await store.prune(unread=True)

    assert everything(path) == before
    assert (report.seen, report.needed) == (3, 3)
    # a cancel still reaches it
    await session.complete("child", TaskState.COMPLETED)
    assert (await store.prune(unread=True)).tasks == 4


async def test_a_cancel_reaches_what_a_pruned_store_has_live(store: TaskStore, session: SessionTasks) -> None:
    parent = await session.register("parent", OTHER)
    await session.register("child", OTHER, parent=parent)
    await session.complete("parent", TaskState.COMPLETED)
    agent = await session.register("agent", OTHER, parent="child")
    await done(session, "leaf", parent=agent)

    await store.prune(unread=True)
    await session.cancel("child", "enough")

    assert (await agent.record()).state is TaskState.CANCELLED


async def test_an_agent_stays_while_anything_works_in_its_session_at_any_depth(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    second, third = await store.session("s2"), await store.session("s3")
    agents = {"agent": (session, "s2"), "inner": (second, "s3")}
    for id, (where, works_in) in agents.items():
        await where.register(id, SUBAGENT, child_session_id=works_in)
    await third.register("work", OTHER)
    await third.register("below", OTHER, parent="work")
    for where, id in ((third, "work"), (second, "inner"), (session, "agent")):
        await where.complete(id, TaskState.COMPLETED)

    report = await store.prune(unread=True)

    assert (report.tasks, report.needed) == (0, 3)
    await third.complete("below", TaskState.COMPLETED)
    assert (await store.prune(unread=True)).tasks == 4
    assert ids(path) == []


async def test_an_agent_of_another_runtime_is_not_held_by_a_session_of_the_same_name(
    opened: Callable[..., Any], path: Path
) -> None:
    one, other = await opened(), await opened(runtime="another")
    first = await one.session("s1")
    for store in (one, other):
        await store.session("s2")
    await (await other.session("s2")).register("live", OTHER)
    await first.register("agent", SUBAGENT, child_session_id="s2")
    await first.complete("agent", TaskState.COMPLETED)

    assert (await one.prune(unread=True)).tasks == 1
    assert ids(path) == ["live"]


async def test_children_of_a_live_parent_stay_so_that_a_body_is_given_them_again(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    ran: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def child(task: TaskContext) -> str:
        ran.append(task.id)
        return "done"

    @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, backoff=Backoff(initial=0.001))
    async def parent(task: TaskContext) -> Any:
        told = await (await task.spawn(child))
        if task.attempt == 1:
            await hold(started, release)
            raise ConnectionError("again")
        return told

    handle = await session.spawn(parent)
    await started.wait()
    report = await store.prune(unread=True)
    release.set()

    assert await handle == "done"
    assert (report.tasks, report.needed, len(ran)) == (0, 1, 1)
    assert (await store.prune(unread=True)).tasks == 2


async def test_random_families_keep_what_is_above_all_that_lives(store: TaskStore, path: Path) -> None:
    chance = random.Random(7)
    sessions = [await store.session(f"s{number}") for number in range(4)]
    live: list[tuple[SessionTasks, str]] = []
    for number in range(60):
        where, id = chance.choice(sessions), f"t{number}"
        options: dict[str, Any] = {}
        above = [name for session, name in live if session is where]
        if above and chance.random() < 0.7:
            options["parent"] = chance.choice(above)
        if chance.random() < 0.25:
            others = [one.scope.session_id for one in sessions if one is not where]
            options["child_session_id"] = chance.choice(others)
        await where.register(id, SUBAGENT if "child_session_id" in options else OTHER, **options)
        live.append((where, id))
        while len(live) > 12:
            ended, name = live.pop(chance.randrange(len(live)))
            await ended.complete(name, TaskState.COMPLETED)
        if number % 10 == 9:
            before = rows(path, "SELECT * FROM tasks")
            needed = ancestors_of_live(before)
            report = await store.prune(unread=True)
            # nothing that is needed has gone, and nothing else has stayed but children of what lives
            alive = {task["task_seq"] for task in before if task["completed_at"] is None}
            stays = {
                task["task_seq"] for task in before if task["task_seq"] in needed | alive or task["parent_seq"] in alive
            }
            after = rows(path, "SELECT * FROM tasks")
            assert after == [task for task in before if task["task_seq"] in stays]
            assert (report.tasks, report.needed) == (len(before) - len(after), len(stays - alive))
    assert buried(path)


def ancestors_of_live(tasks: list[dict[str, Any]]) -> set[int]:
    """Return what a cancel must be able to reach live work from, by parents and by sessions of sub-agents."""
    found = {task["task_seq"] for task in tasks if task["completed_at"] is None}
    alive = set(found)
    while True:
        below = [task for task in tasks if task["task_seq"] in found]
        scopes, parents = {task["scope"] for task in below}, {task["parent_seq"] for task in below}
        more = {
            task["task_seq"]
            for task in tasks
            if task["task_seq"] in parents or f"{RUNTIME}:{task['child_session_id']}" in scopes
        }
        if more <= found:
            return found - alive
        found |= more


# --- what nobody was told yet ---------------------------------------------------------------------------------------


async def test_an_outcome_nobody_was_handed_stays_unless_told(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    outcomes: dict[str, dict[str, Any]] = {
        "completed": {},
        "failed": {"failure": {"type": "E", "message": "m"}},
        "cancelled": {},
    }
    for state, outcome in outcomes.items():
        await session.register(state, OTHER)
        await session.complete(state, TaskState(state), **outcome)
    await session.register("abandoned", OTHER)
    await session.abandon("abandoned", "it hung")
    # looked at, but not handed out
    assert (await (await session.handle("completed")).wait()).state is TaskState.COMPLETED
    await session.get("failed")

    report = await store.prune()

    assert ids(path) == ["completed", "failed", "abandoned"]
    assert (report.tasks, report.seen, report.unread) == (1, 4, 3)
    with pytest.raises(TaskFailed):
        await (await session.handle("failed"))
    assert (await store.prune()).tasks == 1
    assert (await store.prune(unread=True)).tasks == 2


async def test_an_outcome_is_read_once_its_note_is(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await done(session, "told", read=False, notify_on_end=True)

    assert (await store.prune()).unread == 1
    # looking is not reading, and a reader that fails was not told
    assert len(await session.notes()) == 1
    with pytest.raises(ZeroDivisionError):
        await fail_over_notes(session)
    assert (await store.prune()).unread == 1
    async with session.inbox():
        # while it is being told it is not
        assert (await store.prune()).unread == 1
    assert (await store.prune()).tasks == 1
    assert rows(path, "SELECT * FROM inbox") == []


async def fail_over_notes(session: SessionTasks) -> None:
    async with session.inbox() as notes:
        raise ZeroDivisionError(len(notes))


async def test_hidden_work_goes_unless_it_failed_and_nobody_was_told(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def fail() -> None:
        raise ValueError("a torn page")

    await (await session.spawn_hidden("well", asyncio.sleep(0))).wait()
    await (await session.spawn_hidden("failed", fail())).wait()

    report = await store.prune()

    assert (report.tasks, report.unread) == (1, 1)
    with pytest.raises(ExceptionGroup):
        await session.await_hidden()
    assert (await store.prune()).tasks == 1


async def test_notes_nobody_has_read_stay_and_are_told_after_their_task_has_gone(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def tell(task: TaskContext) -> None:
        await task.notify("first")
        await task.notify("second", {"n": 1})

    handle = await session.spawn(tell, id="t", notify_on_end=True)
    assert await handle is None
    async with session.inbox(limit=1) as notes:
        assert [note.text for note in notes] == ["first"]

    assert (await store.prune()).tasks == 1

    assert [row["text"] for row in rows(path, "SELECT text FROM inbox")] == ["second", "task 't' completed"]
    async with session.inbox() as notes:
        assert [(note.text, note.task_id, note.task_seq) for note in notes] == [
            ("second", "t", handle.task_seq),
            ("task 't' completed", "t", handle.task_seq),
        ]
    assert await session.notes() == []


async def test_notes_that_were_read_after_their_task_went_go_with_the_next_prune(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await done(session, "t", notify_on_end=True)
    await store.prune()
    async with session.inbox() as notes:
        assert len(notes) == 1

    await store.prune()

    assert rows(path, "SELECT * FROM inbox") == []


def spec(id: str, line: str, **options: Any) -> MonitorSpec:
    return MonitorSpec(id=id, command=line, shell=True, **{"wake_policy": WakePolicy.NOTIFY, **options})


async def test_a_monitor_stays_while_lines_of_it_are_unread_and_while_it_is_armed(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    monitors = [
        await session.start_monitor(spec("talks", "echo one; echo two")),
        await session.start_monitor(spec("silent", "true")),
        await session.start_monitor(spec("armed", "true", arm_on=ArmOn.SESSION_START)),
    ]
    for one in monitors:
        await one.wait()

    report = await store.prune()
    assert (report.tasks, report.unread, report.needed) == (1, 1, 1)
    assert (await store.prune(unread=True, dry_run=True)).tasks == 1
    async with session.take_updates(1):
        pass
    assert (await store.prune()).unread == 1
    async with session.take_updates():
        pass
    assert (await store.prune()).tasks == 1
    assert ids(path) == ["monitor:armed"]
    await session.stop_monitor("armed")
    assert (await store.prune()).tasks == 1
    assert await session.monitors() == []


async def test_the_bytes_of_a_session_count_only_the_lines_that_are_left(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    for id in ("first", "second"):
        await (await session.start_monitor(spec(id, f"echo {id}"))).wait()
    async with session.take_updates(monitor="first"):
        pass

    assert (await store.prune()).tasks == 1

    assert rows(path, "SELECT update_bytes FROM sessions") == [{"update_bytes": len("second\n")}]
    assert [one.text for one in await session.updates()] == ["second"]


# --- each limit, and all of them ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say what time a prune takes it to be, by the text of a row."""

    def set_to(text: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.fromisoformat(text).astimezone(UTC)

        monkeypatch.setattr(retention, "datetime", Clock)

    return set_to


async def next_millisecond() -> None:
    now = transaction.utc_text(time.time())
    while transaction.utc_text(time.time()) == now:
        await asyncio.sleep(0.0005)


async def test_only_what_ended_longer_ago_goes(
    store: TaskStore, session: SessionTasks, path: Path, clock: Callable[[str], None]
) -> None:
    for id in ("old", "young"):
        await done(session, id)
        await next_millisecond()
    [old, young] = [datetime.fromisoformat(row["completed_at"]) for row in rows(path, "SELECT completed_at FROM tasks")]
    day = timedelta(days=1)

    # exactly as old as that is not older
    clock((old + day).isoformat())
    assert (await store.prune(older_than=day)).tasks == 0
    clock((young + day).isoformat())
    assert (await store.prune(older_than=day.total_seconds())).tasks == 1
    assert ids(path) == ["young"]
    # a clock that was put back, and an age from before all time
    clock((young - day).isoformat())
    assert (await store.prune(older_than=0)).tasks == 0
    assert (await store.prune(older_than=1e10)).tasks == 0


async def test_the_newest_of_each_session_stay_whatever_else_there_is(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    for id in ("a1", "a2", "a3"):
        await done(session, id)
    await done(there, "b1")
    await session.register("live", OTHER)
    await done(there, "b2")

    assert (await store.prune(keep_last=3)).tasks == 0
    assert (await store.prune(keep_last=2)).tasks == 1
    assert (await store.prune(keep_last=1)).tasks == 2
    assert ids(path) == ["a3", "live", "b2"]
    assert (await store.prune(keep_last=0)).tasks == 2


async def test_a_finished_task_counts_in_the_session_it_was_given_to(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    await done(session, "stayed")
    await done(session, "moved", read=False)
    await session.transfer(there, ["moved"])

    await store.prune(keep_last=1, unread=True)

    assert ids(path) == ["stayed", "moved"]
    await store.prune(sessions=[session], unread=True)
    assert ids(path) == ["moved"]


async def test_a_subscriber_at_the_cursor_misses_nothing(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    await done(session, "before")
    await done(session, "moved later", read=False)
    cursor = rows(path, "SELECT max(seq) AS seq FROM events")[0]["seq"]
    await session.transfer(there, ["moved later"])
    await done(session, "after")
    left = rows(path, "SELECT seq FROM events WHERE seq > ? ORDER BY seq", cursor)

    report = await store.prune(before_cursor=cursor, unread=True)

    assert (report.tasks, buried(path)) == (1, ["before"])
    assert [event.seq for event in await take(store.events(cursor), len(left))] == [row["seq"] for row in left]
    # one event less, and one more
    newest = rows(path, "SELECT max(seq) AS seq FROM events")[0]["seq"]
    assert (await store.prune(before_cursor=newest - 1, unread=True)).tasks == 1
    assert (await store.prune(before_cursor=newest, unread=True)).tasks == 1


async def test_sessions_are_named_in_every_way_and_states_by_their_words(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    others = [await store.session(name) for name in ("s2", "s3", "s4")]
    for one in (session, *others):
        await done(one, f"in {one.scope.session_id}")
        await one.register("cancelled", OTHER)
        await one.cancel("cancelled")

    named = [others[0], others[1].scope, str(others[2].scope)]
    assert (await store.prune(sessions=named, states=["cancelled"])).tasks == 3
    assert (await store.prune(sessions=iter(named), states={TaskState.COMPLETED})).tasks == 3
    assert ids(path) == ["in s1", "cancelled"]
    with pytest.raises(UnknownSession, match=r"another:s1"):
        await store.prune(sessions=[others[0], "another:s1"])
    # none of them is not all of them
    assert (await store.prune(sessions=[])).seen == 0
    assert (await store.prune(states=())).seen == 0


async def test_all_limits_together_take_what_each_of_them_would_let_go(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path, clock: Callable[[str], None]
) -> None:
    chance = random.Random(11)
    for number in range(24):
        where = chance.choice([session, there])
        if chance.random() < 0.3:
            await where.register(f"t{number}", OTHER)
            await where.cancel(f"t{number}")
        else:
            await done(where, f"t{number}", read=chance.random() < 0.7)
        if number % 6 == 5:
            await next_millisecond()
    tasks = rows(
        path,
        "SELECT t.*, h.read_at, (SELECT max(seq) FROM events AS e WHERE e.task_seq = t.task_seq) AS last_event "
        "FROM tasks AS t JOIN handles AS h USING (task_seq) ORDER BY task_seq",
    )
    clock(tasks[-1]["completed_at"])
    limits: dict[str, list[Any]] = {
        "older_than": [0.0, 0.002],
        "keep_last": [0, 2, 5],
        "states": [["completed"], ["cancelled", "failed"]],
        "sessions": [[session], [there.scope]],
        "before_cursor": [tasks[12]["last_event"], tasks[20]["last_event"] - 1],
        "unread": [True],
    }
    tried = 0
    for number in range(60):
        names = [name for name in limits if number < 6 or chance.random() < 0.5]
        names = [list(limits)[number]] if number < 6 else names
        chosen = {name: chance.choice(limits[name]) for name in names}
        expected = [task["id"] for task in tasks if goes(task, tasks, chosen)]
        report = await store.prune(dry_run=True, **chosen)
        assert report.tasks == len(expected), chosen
        tried += bool(expected)
    assert tried > 20
    chosen = {"keep_last": 2, "states": ["completed"], "before_cursor": tasks[20]["last_event"], "unread": True}
    await store.prune(**chosen)
    assert buried(path) == [task["id"] for task in tasks if goes(task, tasks, chosen)] != []


def goes(task: dict[str, Any], tasks: list[dict[str, Any]], limits: dict[str, Any]) -> bool:
    """Say whether a finished task without relatives may go, as the documentation has it."""
    last = [one["task_seq"] for one in tasks if one["scope"] == task["scope"]][-limits.get("keep_last", 0) :]
    newest = datetime.fromisoformat(tasks[-1]["completed_at"])
    age = newest - datetime.fromisoformat(task["completed_at"])
    scopes = [str(getattr(one, "scope", one)) for one in limits.get("sessions", [task["scope"]])]
    return (
        ("older_than" not in limits or age.total_seconds() > limits["older_than"])
        and not (limits.get("keep_last") and task["task_seq"] in last)
        and task["state"] in limits.get("states", [task["state"]])
        and task["scope"] in scopes
        and task["last_event"] <= limits.get("before_cursor", task["last_event"])
        and (limits.get("unread", False) or task["read_at"] is not None or task["state"] == "cancelled")
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "given",
    [
        {"older_than": -1},
        {"older_than": "yesterday"},
        {"older_than": timedelta.max},
        {"keep_last": -1},
        {"keep_last": True},
        {"keep_last": 1.0},
        {"states": ["running"]},
        {"states": ["gone"]},
        {"states": "completed"},
        {"states": [[]]},
        {"sessions": "desktop:s1"},
        {"sessions": ["s1"]},
        {"sessions": [7]},
        {"before_cursor": -1},
        {"before_cursor": 2**63},
        {"before_cursor": "7"},
        {"unread": "perhaps"},
    ],
    ids=repr,
)
async def test_arguments_without_sense_are_refused_and_nothing_goes(
    store: TaskStore, session: SessionTasks, path: Path, given: dict[str, Any]
) -> None:
    await done(session, "t")
    before = everything(path)

    with pytest.raises(ValueError, match=r"."):
        await store.prune(**given)

    assert everything(path) == before


@pytest.mark.parametrize("what", ["sessions", "states"])
async def test_one_session_or_state_where_several_belong_is_refused(store: TaskStore, what: str) -> None:
    one = {"sessions": await store.session("s1"), "states": 7}[what]

    with pytest.raises(ValueError, match=r"."):
        await store.prune(**{what: one})  # type: ignore[arg-type]


def test_a_store_is_given_a_retention_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"retention must be Retention"):
        TaskStore(tmp_path / "agent.db", runtime=RUNTIME, retention={"keep_last": 3})  # type: ignore[arg-type]


# --- who asks for what was pruned -----------------------------------------------------------------------------------


@pytest.fixture
async def gone(store: TaskStore, session: SessionTasks, there: SessionTasks) -> TaskHandle:
    """The handle of a task that was pruned."""
    handle = await done(session, "gone", idempotency_key="k")
    assert (await store.prune()).tasks == 1
    return handle


BY_NAME: dict[str, Callable[[SessionTasks, Any], Any]] = {
    "get": lambda session, name: session.get(name),
    "handle": lambda session, name: session.handle(name),
    "cancel": lambda session, name: session.cancel(name),
    "abandon": lambda session, name: session.abandon(name, "it hung"),
    "complete": lambda session, name: session.complete(name, TaskState.COMPLETED),
    "set_live_state": lambda session, name: session.set_live_state(name, TaskState.WAITING),
    "update": lambda session, name: session.update(name, progress="on"),
    "as a parent": lambda session, name: session.register("child", OTHER, parent=name),
}


@pytest.mark.parametrize("ask", BY_NAME.values(), ids=BY_NAME.keys())
async def test_whoever_names_what_was_pruned_is_told_so(
    store: TaskStore, session: SessionTasks, gone: TaskHandle, path: Path, ask: Callable[..., Any]
) -> None:
    before = everything(path)

    for name in ("gone", gone.handle_id, gone.to_json(), gone):
        with pytest.raises(TaskPruned, match=r"'gone' of session 'desktop:s1' completed at 2.*pruned at 2") as caught:
            await ask(session, name)
        assert caught.value.task_id == "gone"

    assert everything(path) == before


BY_HANDLE: dict[str, Callable[[TaskHandle], Any]] = {
    "record": lambda handle: handle.record(),
    "result": lambda handle: handle.result(),
    "result within a second": lambda handle: handle.result(timeout=1),
    "wait": lambda handle: handle.wait(),
    "wait within a second": lambda handle: handle.wait(timeout=1),
    "cancel": lambda handle: handle.cancel(),
    "signal": lambda handle: handle.signal("go"),
    "steps": lambda handle: handle.steps(),
    "events": lambda handle: anext(handle.events()),
}


@pytest.mark.parametrize("ask", BY_HANDLE.values(), ids=BY_HANDLE.keys())
async def test_the_handle_of_what_was_pruned_says_so(
    session: SessionTasks, gone: TaskHandle, ask: Callable[..., Any]
) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(TaskPruned, match=r"was pruned at"):
            await ask(gone)
        # the id has another incarnation now: that is not the one the handle is of
        await session.register("gone", OTHER)
        with pytest.raises(TaskPruned, match=r"was pruned at"):
            await ask(gone)


async def test_the_whole_file_tells_of_what_was_pruned_and_not_of_what_never_was(
    store: TaskStore, session: SessionTasks, there: SessionTasks, gone: TaskHandle
) -> None:
    for ask in (store.get, store.handle):
        with pytest.raises(TaskPruned):
            await ask(session, "gone")
        with pytest.raises(TaskNotFound):
            await ask(there, "gone")
        with pytest.raises(TaskNotFound):
            await ask(session, "never")
    with pytest.raises(TaskPruned):
        await store.steps(gone.task_seq)
    assert not issubclass(TaskPruned, LookupError)


async def test_the_json_of_a_handle_is_that_of_what_was_pruned_in_every_process(
    opened: Callable[..., Any], session: SessionTasks, gone: TaskHandle
) -> None:
    other = await (await opened()).session("s1")

    for where in (session, other):
        with pytest.raises(TaskPruned):
            await TaskHandle.from_json(where, gone.to_json())


async def test_an_observer_is_told_that_what_it_looks_at_was_pruned(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    await done(session, "seen")
    eye = await there.observe(session.scope, "seen")
    await store.prune()

    with pytest.raises(TaskPruned):
        await eye.record()
    with pytest.raises(TaskPruned):
        await there.observe(session.scope, "seen")
    # what an observer has of it went with it
    with pytest.raises(HandleNotVisible):
        await TaskHandle.from_json(there, eye.to_json())


async def test_a_child_of_what_was_pruned_is_refused(session: SessionTasks, gone: TaskHandle, path: Path) -> None:
    for parent in ("gone", gone):
        with pytest.raises(TaskPruned):
            await session.spawn(asyncio.sleep(0), parent=parent)
    assert ids(path) == []


async def test_to_let_go_of_what_was_pruned_does_nothing(session: SessionTasks, gone: TaskHandle) -> None:
    await session.unregister("gone")


async def test_what_was_pruned_is_not_visible_and_is_not_handed_over(
    session: SessionTasks, there: SessionTasks, gone: TaskHandle
) -> None:
    for ask in (
        session.validate_handles,
        lambda ids: session.transfer(there, ids),
        lambda ids: session.handoff(there, ids),
    ):
        for name in ("gone", gone):
            with pytest.raises(HandleNotVisible) as caught:
                await ask([name])
            assert caught.value.missing == (getattr(name, "handle_id", name),)


async def test_an_idempotency_key_stays_used_in_its_session(
    store: TaskStore, session: SessionTasks, there: SessionTasks, gone: TaskHandle, path: Path
) -> None:
    with pytest.raises(TaskPruned, match=r"'gone'"):
        await session.register("gone", OTHER, idempotency_key="k")
    with pytest.raises(TaskPruned, match=r"'gone'"):
        await session.register("another", OTHER, idempotency_key="k")
    assert ids(path) == []

    await there.register("gone", OTHER, idempotency_key="k")
    await session.register("gone", OTHER, idempotency_key="k2")
    assert ids(path) == ["gone", "gone"]


async def test_the_newest_incarnation_is_named_also_when_an_older_one_is_left(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    older = await done(session, "t", read=False)
    newer = await done(session, "t")
    assert (await store.prune()).tasks == 1
    assert [row["task_seq"] for row in rows(path, "SELECT task_seq FROM tasks")] == [older.task_seq]

    for ask in (lambda: store.get(session, "t"), lambda: store.handle(session, "t"), newer.record):
        with pytest.raises(TaskPruned):
            await ask()
    # the older one is there for who has its handle
    assert await older == "t"
    assert [record.task_seq for record in await session.list(include_terminal=True)] == [older.task_seq]


@pytest.mark.parametrize("name", ["get", "handle", "cancel", "update"])
async def test_a_session_names_the_newest_incarnation_as_the_store_does(
    store: TaskStore, session: SessionTasks, name: str
) -> None:
    await done(session, "t", read=False)
    await done(session, "t")
    await store.prune()

    with pytest.raises(TaskPruned):
        await BY_NAME[name](session, "t")


async def test_an_older_incarnation_is_pruned_and_the_id_names_the_newer(
    store: TaskStore, session: SessionTasks
) -> None:
    older = await done(session, "t")
    newer = await done(session, "t", read=False)
    assert (await store.prune()).tasks == 1

    assert (await session.get("t")).task_seq == (await store.get(session, "t")).task_seq == newer.task_seq
    with pytest.raises(TaskPruned):
        await older.record()


async def test_an_id_is_used_again_and_pruned_again(store: TaskStore, session: SessionTasks, path: Path) -> None:
    for _ in range(3):
        await done(session, "t", idempotency_key=None)
        await store.prune()
        with pytest.raises(TaskPruned):
            await session.get("t")
    live = await session.register("t", OTHER)

    assert buried(path) == ["t"] * 3
    assert (await session.get("t")).task_seq == live.task_seq
    await session.cancel("t")
    assert (await session.get("t")).state is TaskState.CANCELLED


async def test_a_live_incarnation_is_named_whatever_was_pruned_of_its_id(
    store: TaskStore, session: SessionTasks
) -> None:
    await done(session, "t")
    live = await session.register("t", OTHER)
    await store.prune()

    assert (await session.get("t")).task_seq == (await store.get(session, "t")).task_seq == live.task_seq
    assert (await session.cancel("t")).state is TaskState.CANCELLED


async def test_a_task_that_was_given_away_is_told_of_where_it_was_last(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    await session.register("moved", OTHER)
    await session.transfer(there, ["moved"])
    await there.complete("moved", TaskState.COMPLETED)
    await store.prune(unread=True)

    with pytest.raises(TaskPruned):
        await there.get("moved")
    with pytest.raises(TaskNotFound):
        await session.get("moved")


async def test_who_waits_in_another_store_is_told_when_the_end_was_pruned_before_it_was_seen(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await opened(), await opened()
    session = await one.session("s1")
    handle = await session.register("t", OTHER)
    looks = two._core.feed._changed
    seen = asyncio.Event()

    async def changed() -> bool:
        return seen.is_set() and await looks()

    monkeypatch.setattr(two._core.feed, "_changed", changed)
    waiter = asyncio.create_task((await two.handle("desktop:s1", "t")).wait())
    await asyncio.sleep(0.05)
    assert not waiter.done()

    await session.complete("t", TaskState.COMPLETED, result=1)
    assert await handle == 1
    assert (await one.prune()).tasks == 1
    seen.set()

    async with asyncio.timeout(3):
        with pytest.raises(TaskPruned):
            await waiter


# --- who follows the events -----------------------------------------------------------------------------------------


async def all_of(events: AsyncIterator[Any], until: int) -> list[Any]:
    """Return what a subscriber is given up to an event."""
    found = []
    async with asyncio.timeout(10):
        async for event in events:
            found.append(event)
            if event.type is not EventType.PRUNED and event.seq >= until:
                return found
    raise AssertionError("the feed ended")


def left_in(path: Path, where: str = "true") -> list[int]:
    return [row["seq"] for row in rows(path, f"SELECT seq FROM events WHERE {where} ORDER BY seq")]


async def test_an_old_cursor_is_told_of_the_gap_once_and_then_given_all_that_is_left_in_order(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    for number in range(12):
        await done(session, f"t{number}", read=number % 3 > 0)
    await store.prune()
    await session.register("live", OTHER)
    left = left_in(path)

    for cursor in (0, left[3], left[3] + 1):
        first, *rest = await all_of(store.events(cursor), left[-1])
        missing = "SELECT max(last_event) AS high FROM tombstones WHERE last_event > ?"
        [gap] = rows(path, missing, cursor)
        assert (first.type, first.seq, first.task_seq, first.task_id) == (EventType.PRUNED, cursor, None, None)
        assert first.data == {"first_seq": cursor + 1, "last_seq": gap["high"]}
        assert str(first.scope) == "desktop:s1"
        assert [event.seq for event in rest] == [seq for seq in left if seq > cursor]


async def test_a_cursor_that_has_seen_what_was_pruned_and_one_from_now_are_told_of_no_gap(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await done(session, "t")
    cursor = left_in(path)[-1]
    from_now = store.events()
    await store.prune()
    await session.register("live", OTHER)

    for events in (store.events(cursor), from_now):
        assert (await take(events, 1))[0].task_id == "live"


async def test_filters_by_session_and_type_tell_of_the_gap_that_is_theirs(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    for number in range(3):
        await done(session, f"a{number}")
        await done(there, f"b{number}", read=False)
    await store.prune()
    last = await there.register("live", OTHER)
    await session.register("live", OTHER)
    newest = left_in(path)[-1]

    told = await all_of(store.events(0, scope=session), newest)
    assert [event.type for event in told] == [EventType.PRUNED, EventType.SESSION_OPENED, EventType.REGISTERED]
    # nothing of the other was pruned
    theirs = left_in(path, "scope = 'desktop:s2'")
    assert [event.seq for event in await take(store.events(0, scope=there), len(theirs))] == theirs
    registered = left_in(path, "type = 'registered'")
    told = await all_of(store.events(0, types=[EventType.REGISTERED]), newest)
    assert (told[0].type, [event.seq for event in told[1:]]) == (EventType.PRUNED, registered)
    both = store.events(0, types=[EventType.REGISTERED], scope=there)
    assert (await take(both, 4))[-1].task_seq == last.task_seq


async def test_a_session_is_told_of_a_gap_in_what_happened_in_it_before_a_task_was_given_away(
    store: TaskStore, session: SessionTasks, there: SessionTasks, path: Path
) -> None:
    await session.register("moved", OTHER)
    await session.transfer(there, ["moved"])
    await there.complete("moved", TaskState.COMPLETED)
    await store.prune(unread=True)
    await session.register("live", OTHER)

    told = await all_of(store.events(0, scope=session), left_in(path)[-1])
    assert [event.type for event in told] == [EventType.PRUNED, EventType.SESSION_OPENED, EventType.REGISTERED]


async def test_a_slow_subscriber_is_told_of_each_gap_before_it_comes_to_it(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_PAGE", 4)
    monkeypatch.setattr(feed, "_BUFFER", 2)
    for number in range(6):
        await done(session, f"t{number}")
    slow = store.events(0)
    given = await take(slow, 2)

    await store.prune(keep_last=3)
    for number in range(6, 9):
        await done(session, f"t{number}")
    given += await take(slow, 6)
    await store.prune(keep_last=2)
    await session.register("live", OTHER)
    given += await all_of(slow, left_in(path)[-1])

    # what it was given before a prune it has; nothing else that is left is missing, nothing comes twice or out of turn
    seen = [event.seq for event in given if event.type is not EventType.PRUNED]
    assert seen == sorted(set(seen))
    assert set(left_in(path)) <= set(seen)
    gaps = {seq for event in given if event.type is EventType.PRUNED for seq in range_of(event)}
    assert set(range(1, seen[-1])) - set(seen) <= gaps
    for place, event in enumerate(given):
        if event.type is EventType.PRUNED:
            assert all(one.seq <= event.seq for one in given[:place])
            assert all(one.seq > event.seq or one.type is EventType.PRUNED for one in given[place + 1 :])


def range_of(event: Any) -> range:
    return range(event.data["first_seq"], event.data["last_seq"] + 1)


async def test_what_is_pruned_while_a_subscriber_looks_for_gaps_is_no_silent_gap(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        await done(session, f"t{number}")
    await session.register("live", OTHER)
    following = store._core.feed  # type: ignore[union-attr]
    reads = following.page_to_head

    async def page_to_head(*arguments: Any) -> Any:
        # it has found that nothing is missing just before
        monkeypatch.setattr(following, "page_to_head", reads)
        assert (await store.prune()).tasks == 3
        return await reads(*arguments)

    monkeypatch.setattr(following, "page_to_head", page_to_head)
    given = await all_of(store.events(0), left_in(path)[-1])

    gaps = {seq for event in given if event.type is EventType.PRUNED for seq in range_of(event)}
    missing = set(range(1, left_in(path)[-1])) - {event.seq for event in given}
    assert missing <= gaps


async def test_the_events_of_what_is_left_are_followed_beside_what_was_pruned(
    store: TaskStore, session: SessionTasks
) -> None:
    await done(session, "gone")
    left = await done(session, "left", read=False)
    await done(session, "gone too")
    await store.prune()

    told = [event.type async for event in left.events()]
    assert told == [EventType.REGISTERED, EventType.COMPLETED]


# --- the file, in parts ---------------------------------------------------------------------------------------------

MANY = 600


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory, newborn: Path) -> Path:
    """A closed file with many finished tasks, read, as a run would have left them; each with its events, handle and result."""
    path = Path(shutil.copy(newborn, tmp_path_factory.mktemp("crowd") / "agent.db"))

    async def first() -> None:
        async with TaskStore(path, runtime=RUNTIME) as store:
            session = await store.session("s1")
            await session.register("t1", OTHER)
            await session.complete("t1", TaskState.COMPLETED, result="x" * 300)
            assert await (await session.handle("t1"))

    asyncio.run(first())
    with closing(sqlite3.connect(path)) as connection, connection:
        for number in range(2, MANY + 1):
            multiply(connection, "tasks", task_seq=number, id=f"t{number}")
            multiply(connection, "handles", seq=None, handle_id=f"h-{number}", task_seq=number)
            multiply(connection, "events", seq=None, task_seq=number, task_id=f"t{number}")
    return path


def multiply(connection: sqlite3.Connection, table: str, **changed: Any) -> None:
    """Insert rows of the first task once more, with some columns changed."""
    columns = [name for (name,) in connection.execute(f"SELECT name FROM pragma_table_info('{table}') ORDER BY cid")]
    if "seq" not in columns:
        changed.pop("seq", None)
    keys = {row[1]: row[5] for row in connection.execute(f"PRAGMA table_info({table})")}
    chosen = [name for name in columns if name in changed or not (keys[name] and table != "tasks")]
    values = ", ".join(f":{name}" if name in changed else f'"{name}"' for name in chosen)
    names = ", ".join(f'"{name}"' for name in chosen)
    connection.execute(
        f"INSERT INTO {table} ({names}) SELECT {values} FROM {table} WHERE task_seq = 1 ORDER BY rowid", changed
    )


@pytest.fixture
def crowded(crowd: Path, path: Path) -> Path:
    """A copy of it, to be opened."""
    return Path(shutil.copy(crowd, path))


async def test_a_prune_goes_at_once_over_a_gap_that_a_hand_has_made(
    store: TaskStore, session: SessionTasks, opened: Callable[..., Any], path: Path
) -> None:
    await (await session.spawn(asyncio.sleep(0), id="before")).result(timeout=5)
    await store.close()
    with closing(sqlite3.connect(path)) as hand, hand:
        hand.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'tasks'", [2**62])
    store = await opened()
    session = await store.session("s1")
    assert (await session.spawn(asyncio.sleep(0), id="behind")).task_seq == 2**62 + 1
    await (await session.handle("behind")).result(timeout=5)

    async with asyncio.timeout(5):
        report = await store.prune()

    assert (report.tasks, report.task_seq) == (2, 2**62 + 1)
    assert buried(path) == ["before", "behind"]


async def test_a_prune_goes_in_parts_of_bounded_size_and_tells_of_each(
    crowded: Path, opened: Callable[..., Any]
) -> None:
    store = await opened()
    told: list[PruneReport] = []

    report = await store.prune(progress=told.append)

    assert (report.tasks, report.seen) == (MANY, MANY)
    assert event_count(crowded) == 1
    parts = [PruneReport(newest_seq=MANY), *(one for one in told if not one.freed)]
    for before, after in pairwise(parts):
        assert 0 <= after.tasks - before.tasks <= retention._TASKS
        assert 0 <= after.events - before.events <= retention._EVENTS
        assert before.task_seq < after.task_seq <= after.newest_seq == MANY
    assert len(parts) > MANY / retention._TASKS
    freed = [one.freed for one in told if one.freed]
    assert freed == sorted(freed)
    assert told[-1] == report


async def test_one_part_takes_few_statements_and_looks_at_few_rows(crowded: Path, opened: Callable[..., Any]) -> None:
    store = await opened()
    ran: list[str] = []
    parts: list[int] = []

    def told(_: PruneReport) -> None:
        # what triggers do is told under the name of the statement, once more
        parts.append(sum(1 for _ in groupby(ran)))
        ran.clear()

    raw = store._core.writer._connection._conn
    await store._core.writer._connection.run(lambda _: raw.set_trace_callback(ran.append))
    await store.prune(progress=told, keep_last=1)
    await store._core.writer._connection.run(lambda _: raw.set_trace_callback(None))

    # a tombstone each, and the same few for all
    assert len(parts) > MANY / retention._TASKS
    assert max(parts) <= retention._TASKS + 30


async def test_a_task_with_more_events_than_a_part_may_have_goes_alone(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_EVENTS", 6)
    for id in ("c", "b", "noisy", "a"):
        handle = await session.register(id, OTHER)
        for number in range(10 if id == "noisy" else 0):
            await session.update(id, progress=f"{number} of 10")
        await handle.cancel()
    told: list[PruneReport] = []

    await store.prune(progress=told.append)

    assert [one.tasks for one in told if not one.freed] == [1, 2, 4]


async def test_the_room_is_given_back(crowded: Path, new: Callable[..., TaskStore]) -> None:
    before = crowded.stat().st_size

    async with new() as store:
        dry = await store.prune(dry_run=True, keep_last=10)
        report = await store.prune(keep_last=10)
    after = crowded.stat().st_size

    assert (report.tasks, dry.tasks) == (MANY - 10, MANY - 10)
    assert rows(crowded, "PRAGMA freelist_count") == [{"freelist_count": 0}]
    assert dry.freed == 0
    # it was the larger part of the file, of which tombstones took a little again
    assert min(before - after, report.freed) > before / 2


async def test_a_file_that_was_not_made_to_shrink_is_pruned_and_stays_as_large(
    crowded: Path, new: Callable[..., TaskStore]
) -> None:
    with closing(sqlite3.connect(crowded, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
    async with asyncio.timeout(10), new() as store:
        report = await store.prune()

    assert (report.tasks, report.freed) == (MANY, 0)


async def test_a_dry_run_writes_nothing_and_counts_what_would_go(crowded: Path, opened: Callable[..., Any]) -> None:
    store = await opened()
    with closing(sqlite3.connect(crowded, isolation_level=None)) as connection:
        version = connection.execute("PRAGMA data_version").fetchone()
        files = {file.name: file.read_bytes() for file in (crowded, Path(f"{crowded}-wal"))}

        dry = await store.prune(dry_run=True)

        assert connection.execute("PRAGMA data_version").fetchone() == version
        assert {file.name: file.read_bytes() for file in (crowded, Path(f"{crowded}-wal"))} == files
    assert dry == (await store.prune()).model_copy(update={"freed": 0})


async def test_a_prune_that_is_cancelled_has_done_what_it_has_done(crowded: Path, opened: Callable[..., Any]) -> None:
    store = await opened()
    told: list[PruneReport] = []

    def progress(report: PruneReport) -> None:
        told.append(report)
        if len(told) == 3:
            pruning.cancel()

    pruning = asyncio.create_task(store.prune(progress=progress))
    with pytest.raises(asyncio.CancelledError):
        await pruning

    assert len(buried(crowded)) == told[-1].tasks == MANY - len(ids(crowded)) > 0
    check_file(crowded)
    check_pruned(crowded)
    assert (await store.prune()).tasks == MANY - told[-1].tasks


async def test_a_prune_cancelled_at_any_suspension_leaves_rows_and_tombstones_in_agreement(
    opened: Callable[..., Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_TASKS", 2)
    store = await opened()
    session = await store.session("s1")
    made = 0
    for late in (False, True):
        for at in range(1, 60):
            for number in range(4):
                await done(session, f"{late} {at} {number}", read=False)
            made += 4
            stepped = await cancel_at(store.prune(unread=True), at, late=late)
            if not stepped.reached:
                break
        assert not stepped.reached
        check_pruned(path)
        assert len(buried(path)) + len(ids(path)) == made


async def test_an_error_of_who_is_told_stops_the_prune_between_two_parts(
    crowded: Path, opened: Callable[..., Any]
) -> None:
    store = await opened()

    def progress(report: PruneReport) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.prune(progress=progress)

    assert len(buried(crowded)) == retention._TASKS


async def test_two_prunes_at_once_take_each_task_once(crowded: Path, opened: Callable[..., Any]) -> None:
    one, two = await opened(), await opened()

    reports = await asyncio.gather(one.prune(), one.prune(), two.prune())

    assert sum(report.tasks for report in reports) == MANY == len(buried(crowded))


async def test_who_writes_beside_a_long_prune_gets_in_between_its_parts(
    crowded: Path, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_TASKS", 20)
    store, peer = await opened(), await opened()
    session, beside = await store.session("s1"), await peer.session("s1")
    for id, where in (("here", session), ("beside", beside)):
        await where.register(id, OTHER)
    commits = {"here": 0, "beside": 0}
    parts: list[dict[str, int]] = []

    async def write(where: SessionTasks, id: str) -> None:
        while True:
            await where.update(id, progress=f"{commits[id]}")
            commits[id] += 1

    writers = [asyncio.create_task(write(session, "here")), asyncio.create_task(write(beside, "beside"))]
    report = await store.prune(progress=lambda _: parts.append(dict(commits)))
    for writer in writers:
        writer.cancel()
    await asyncio.wait(writers)

    assert report.tasks == MANY
    for id in commits:
        between = [after[id] - before[id] for before, after in pairwise(parts)]
        # now and then one loses its turn
        assert sum(count > 0 for count in between) > 0.7 * len(between), (id, between)


async def test_bodies_and_waiters_go_on_while_a_peer_and_a_caller_without_rows_prune(
    crowded: Path, opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    owner, peer = await opened(), await opened()
    task = await (await owner.session("s1")).spawn(hold(started, release), id="body")
    await started.wait()
    waiter = asyncio.create_task((await peer.handle("desktop:s1", "body")).wait())
    before = rows(crowded, "SELECT * FROM tasks WHERE id = 'body'")

    assert (await peer.prune(keep_last=300)).tasks == MANY - 300
    async with TaskStore.connect(crowded, runtime=RUNTIME) as caller:
        assert (await caller.prune()).tasks == 300

    assert rows(crowded, "SELECT * FROM tasks") == before
    with pytest.raises(TaskPruned):
        await owner.get("desktop:s1", "t7")
    release.set()
    assert await task is None
    assert (await waiter).state is TaskState.COMPLETED


async def test_who_only_reads_does_not_prune_and_sees_what_was(crowded: Path, opened: Callable[..., Any]) -> None:
    store = await opened()
    async with TaskStore.open_readonly(crowded) as reader:
        with pytest.raises(StoreReadOnly):
            await reader.prune()
        assert await reader.prune(dry_run=True) == (await store.prune()).model_copy(update={"freed": 0})

        with pytest.raises(TaskPruned):
            await reader.get("desktop:s1", "t7")
        assert (await take(reader.events(0), 1))[0].type is EventType.PRUNED


# --- in the background ----------------------------------------------------------------------------------------------


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def often(**limits: Any) -> Retention:
    """Return a retention that is applied all the time, which nobody could ask for."""
    return Retention(**limits).model_copy(update={"every": 0.01})


async def test_a_store_with_a_retention_prunes_when_it_opens_and_again_and_again(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        await done(await store.session("s1"), "before")

    async with new(retention=often(keep_last=1)) as store:
        session = await store.session("s1")
        for number in range(3):
            await done(session, f"t{number}")
            await until(lambda number=number: len(buried(path)) == number + 1)
        await done(session, "unread", read=False)
        await until(lambda: ids(path) == ["unread"])


async def test_a_store_whose_retention_works_closes_at_once_and_leaves_nothing(
    crowded: Path, new: Callable[..., TaskStore]
) -> None:
    before = threads()

    async with new(retention=often()):
        await until(lambda: buried(crowded))

    assert await left_over(crowded, before) == []
    check_file(crowded)
    assert len(buried(crowded)) + len(ids(crowded)) == MANY


async def test_a_retention_that_fails_is_tried_again(
    new: Callable[..., TaskStore], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune, calls = retention.prune, []

    async def failing(*arguments: Any, **options: Any) -> PruneReport:
        calls.append(1)
        if len(calls) < 3:
            raise StorageBusy("locked")
        return await prune(*arguments, **options)

    monkeypatch.setattr(retention, "prune", failing)
    async with new(retention=often()) as store:
        await done(await store.session("s1"), "t")
        await until(lambda: buried(path))

    assert len(calls) >= 3


async def test_a_store_without_a_retention_keeps_everything(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        await done(await store.session("s1"), "t")
    async with new():
        pass

    assert ids(path) == ["t"]


async def test_who_closes_a_retention_and_is_cancelled_meanwhile_hears_of_it(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, asked, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def in_a_transaction(self: retention.Pruner) -> None:
        begun.set()
        try:
            await may_end.wait()
        except asyncio.CancelledError:
            asked.set()
            await may_end.wait()

    monkeypatch.setattr(retention.Pruner, "_work", in_a_transaction)
    core = store._open
    pruner = retention.Pruner(core.to_request(), core.reader, Retention())
    await begun.wait()
    closing_it = asyncio.create_task(pruner.close())
    await asked.wait()
    closing_it.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing_it
    may_end.set()
    await asyncio.wait({pruner._task})
