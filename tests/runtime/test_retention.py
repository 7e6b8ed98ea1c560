"""Rules of what is pruned: what may go, what must stay, what is left of it, and who is told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    ArmOn,
    Backoff,
    MonitorSpec,
    PruneReport,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    WakePolicy,
    database,
    retention,
)
from tests.runtime.support import (
    RUNTIME,
    everything,
    hold,
    rows,
    take,
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
    await handle.signal("go", "gone", key="s")
    await handle.signal("unasked")
    assert await handle == "gone"
    async with session.inbox() as notes:
        assert len(notes) == 2
    [row] = rows(path, "SELECT * FROM tasks")
    of_it = rows(path, "SELECT seq FROM events WHERE task_seq IS NOT NULL ORDER BY seq")

    report = await store.prune()

    assert {table: rows(path, f"SELECT * FROM {table} WHERE task_seq IS NOT NULL") for table in BOOKS} == dict.fromkeys(
        BOOKS, []
    )
    [left] = rows(path, "SELECT * FROM tombstones")
    assert row["completed_at"] <= left.pop("pruned_at") <= database.utc_text(time.time())
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
        async with session.inbox() as notes:
            assert len(notes) == 1
            1 / 0  # noqa: B018
    assert (await store.prune()).unread == 1
    async with session.inbox():
        # while it is being told it is not
        assert (await store.prune()).unread == 1
    assert (await store.prune()).tasks == 1
    assert rows(path, "SELECT * FROM inbox") == []


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
    now = database.utc_text(time.time())
    while database.utc_text(time.time()) == now:
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
    assert (await store.prune(sessions=["another:s1"])).seen == 0
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
