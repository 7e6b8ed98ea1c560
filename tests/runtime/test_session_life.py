"""A session from its opening to its close: parents, policies, what a closed one still does, and who hears of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    ClosePolicy,
    CloseReport,
    EventType,
    InvalidId,
    Recovery,
    Scope,
    SessionClosed,
    SessionError,
    SessionTasks,
    StoreReadOnly,
    TaskContext,
    TaskEvent,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    TransferConflict,
    UnknownSession,
    Verdict,
)
from tests.runtime.support import RUNTIME, event_count, event_types, hold, next_event, rows, states, take

KEEP, CANCEL, TRANSFER = ClosePolicy.KEEP, ClosePolicy.CANCEL, ClosePolicy.TRANSFER
BAD_IDS = ["", "a\x00b", "line\nbreak", "\ud800", "x" * 257, "\x1b[31m"]
BAD_FORMS = [5, b"s1", ["s1"], {"id": "s1"}]


async def noop() -> None:
    """A body that ends at once."""


async def forever() -> None:
    """A body that ends when it is cancelled."""
    await asyncio.Event().wait()


def whole(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read every table."""
    tables = [row["name"] for row in rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {table: rows(path, f"SELECT * FROM {table}") for table in tables}


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Hold that no row of any table is another afterwards."""
    before = whole(path)
    yield
    assert whole(path) == before


def ids(records: Iterable[Any]) -> list[str]:
    """Return the ids of records."""
    return [record.id for record in records]


def session_row(path: Path, session_id: str) -> dict[str, Any]:
    """Read one session."""
    return rows(path, "SELECT * FROM sessions WHERE session_id = ?", session_id)[0]


def story(path: Path, session_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Read what the file says of a session itself."""
    found = rows(
        path,
        "SELECT type, data FROM events WHERE scope = ? AND task_seq IS NULL ORDER BY seq",
        f"{RUNTIME}:{session_id}",
    )
    return [(event["type"], json.loads(event["data"])) for event in found]


def as_any(session: SessionTasks, form: str) -> Any:
    """Name a session in one of the forms that name one."""
    return {"id": session.scope.session_id, "scope": session.scope, "session": session}[form]


FORMS = pytest.mark.parametrize("form", ["id", "scope", "session"])


# --- opening --------------------------------------------------------------------------------------------------------


@FORMS
async def test_a_session_has_the_parent_it_was_opened_with(
    store: TaskStore, session: SessionTasks, path: Path, form: str
) -> None:
    await store.session("child", parent=as_any(session, form))

    assert {record.scope.session_id: record.parent for record in await store.sessions()} == {
        "s1": None,
        "child": session.scope,
    }
    assert story(path, "child") == [("session_opened", {"parent": "desktop:s1"})]


async def test_a_session_that_is_resumed_keeps_its_parent(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await store.session("child", parent="s1")

    with unchanged(path):
        await store.session("child")
        await store.session("child", parent="s1")
        await store.session("child", reopen=True)

    assert session_row(path, "child")["parent"] == "desktop:s1"


async def test_a_session_without_a_parent_may_be_given_one(store: TaskStore, session: SessionTasks) -> None:
    await store.session("child")
    await store.session("child", parent="s1")

    assert [record.parent for record in await store.sessions()] == [None, session.scope]


@pytest.mark.parametrize("parent", ["nobody", "desktop:s1", "child", Scope(RUNTIME, "nobody")])
async def test_a_parent_that_is_not_there_is_unknown_and_no_session_made(
    store: TaskStore, session: SessionTasks, path: Path, parent: Any
) -> None:
    with unchanged(path), pytest.raises(UnknownSession, match="is not in this file"):
        await store.session("child", parent=parent)


async def test_a_session_has_one_parent(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await store.session("other")
    await store.session("child", parent="s1")

    with unchanged(path), pytest.raises(SessionError, match=r"has the parent 'desktop:s1'"):
        await store.session("child", parent="other")


@pytest.mark.parametrize("of", ["a", "b", "c"])
async def test_a_session_is_not_its_own_ancestor(store: TaskStore, path: Path, of: str) -> None:
    await store.session("a")
    await store.session("b", parent="a")
    await store.session("c", parent="b")

    with unchanged(path), pytest.raises(SessionError):
        await store.session("a", parent=of)


async def test_a_parent_is_of_the_same_runtime(store: TaskStore, path: Path) -> None:
    async with TaskStore(path, runtime="ci") as other:
        theirs = await other.session("s1")

        for parent in (theirs, theirs.scope):
            with unchanged(path), pytest.raises(SessionError, match="another runtime"):
                await store.session("child", parent=parent)


@pytest.mark.parametrize("bad", BAD_IDS)
async def test_an_id_of_a_session_that_cannot_be_stored_is_refused(
    store: TaskStore, session: SessionTasks, path: Path, bad: str
) -> None:
    with unchanged(path):
        for opening in (store.session(bad), store.session("child", parent=bad), session.close(successor=bad)):
            with pytest.raises(InvalidId):
                await opening
        with pytest.raises(InvalidId):
            await session.spawn(noop(), child_session_id=bad)


@pytest.mark.parametrize("bad", BAD_FORMS)
async def test_what_names_no_session_is_refused(store: TaskStore, session: SessionTasks, path: Path, bad: Any) -> None:
    await session.register("t", TaskKind.OTHER, close_policy=TRANSFER)
    with unchanged(path):
        for operation in (
            store.session(bad),
            store.session("child", parent=bad),
            session.close(successor=bad),
            session.transfer(bad, ["t"]),
            session.handoff(bad, ["t"]),
            session.observe(bad, "t"),
        ):
            with pytest.raises(InvalidId):
                await operation


async def test_a_store_that_does_not_own_opens_no_session(store: TaskStore, session: SessionTasks, path: Path) -> None:
    for beside in (TaskStore.open_readonly(path, runtime=RUNTIME), TaskStore.connect(path, runtime=RUNTIME)):
        async with beside:
            with unchanged(path):
                with pytest.raises(UnknownSession):
                    await beside.session("new")
                with pytest.raises(StoreReadOnly):
                    await beside.session("s1", parent="s1")
                with pytest.raises(StoreReadOnly):
                    await beside.session("s1", reopen=True)
                assert (await beside.session("s1")).scope == session.scope


async def test_sessions_shows_what_each_is_about(store: TaskStore, session: SessionTasks) -> None:
    child = await store.session("child", parent=session)
    await session.register("live", TaskKind.OTHER)
    await session.register("ended", TaskKind.OTHER, notify_on_end=True)
    await session.complete("ended", TaskState.COMPLETED)
    await child.spawn_hidden("memory", noop())
    await child.await_hidden()
    closed = await child.close()

    first, second = await store.sessions()

    assert (first.scope, first.parent, first.closed_at) == (session.scope, None, None)
    assert (first.live_tasks, first.sync_needed, first.unread_notes) == (1, False, 1)
    assert (second.scope, second.parent, second.closed_at) == (child.scope, session.scope, closed.closed_at)
    assert (second.live_tasks, second.sync_needed, second.unread_notes) == (0, True, 0)
    assert first.opened_at.tzinfo is not None


# --- closing: what becomes of its tasks -----------------------------------------------------------------------------


async def one_of_each(session: SessionTasks, started: asyncio.Event) -> None:
    """Fill a session: for each policy a body and external work; hidden work, and finished work."""
    for policy in ClosePolicy:
        await session.spawn(forever(), id=f"body-{policy}", close_policy=policy)
        await session.register(f"external-{policy}", TaskKind.MONITOR, close_policy=policy)
    await session.spawn_hidden("hidden", hold(started, asyncio.Event()))
    await (await session.spawn(noop(), id="finished", close_policy=TRANSFER))
    await started.wait()


@FORMS
async def test_a_close_does_with_each_task_what_its_policy_says(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, path: Path, form: str
) -> None:
    successor = await store.session("s2")
    await one_of_each(session, started)
    by_id = {record.id: record.task_seq for record in await session.list(include_hidden=True)}
    [hidden] = [task_id for task_id in by_id if task_id.startswith("hidden")]

    report = await session.close(successor=as_any(successor, form))

    assert (report.scope, report.successor) == (session.scope, successor.scope)
    assert ids(report.kept) == ["body-keep", "external-keep"]
    assert ids(report.cancelled) == ["body-cancel", "external-cancel", hidden]
    assert ids(report.transferred) == ["body-transfer", "external-transfer"]
    assert {record.state for record in (*report.kept, *report.transferred)} == {TaskState.RUNNING}
    assert {record.scope for record in report.transferred} == {successor.scope}
    assert {(record.state, record.cancel_reason) for record in report.cancelled} == {("cancelled", "session closed")}
    assert ids(await session.list(include_hidden=True)) == ["body-keep", "external-keep"]
    assert ids(await successor.list(include_hidden=True)) == ["body-transfer", "external-transfer"]
    assert (await session.get("finished")).state is TaskState.COMPLETED
    assert story(path, "s1")[1:] == [
        (
            "session_closed",
            {
                "kept": [by_id[task_id] for task_id in ("body-keep", "external-keep")],
                "cancelled": [by_id[task_id] for task_id in ("body-cancel", "external-cancel", hidden)],
                "transferred": [by_id[task_id] for task_id in ("body-transfer", "external-transfer")],
                "destination": "desktop:s2",
            },
        )
    ]
    assert (await store.sessions())[0].closed_at == report.closed_at


async def test_without_a_policy_a_task_is_kept(session: SessionTasks) -> None:
    task = await session.spawn(forever())
    await session.register("external", TaskKind.OTHER)

    report = await session.close()

    assert ids(report.kept) == [task.id, "external"]
    assert (report.cancelled, report.transferred, report.successor) == ((), (), None)


async def test_what_waits_for_a_slot_is_cancelled_or_transferred_without_running(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = await opened(max_running=1)
    session, successor = await store.session("s1"), await store.session("s2")
    ran: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        ran.append(str(task.scope))

    await session.spawn(hold(started, release))
    await started.wait()
    ended = await session.spawn(work, close_policy=CANCEL)
    moved = await session.spawn(work, close_policy=TRANSFER)

    report = await session.close(successor=successor)

    assert (states(report.cancelled), states(report.transferred)) == (["cancelled"], ["pending"])
    assert event_types(path, ended.task_seq) == ["registered", "cancelled"]
    release.set()
    assert (await moved.wait(timeout=20)).scope == successor.scope
    assert ran == ["desktop:s2"]


async def test_without_a_successor_work_goes_to_the_parent(store: TaskStore, session: SessionTasks) -> None:
    child = await store.session("child", parent=session)
    await child.register("t", TaskKind.OTHER, close_policy=TRANSFER)

    report = await child.close()

    assert (report.successor, ids(await session.list())) == (session.scope, ["t"])


async def test_a_successor_is_preferred_to_the_parent(store: TaskStore, session: SessionTasks) -> None:
    child, successor = await store.session("child", parent=session), await store.session("s2")
    await child.register("t", TaskKind.OTHER, close_policy=TRANSFER)

    report = await child.close(successor=successor)

    assert (report.successor, ids(await successor.list()), await session.list()) == (successor.scope, ["t"], [])


async def test_a_successor_serves_where_the_parent_is_closed(store: TaskStore, session: SessionTasks) -> None:
    child, successor = await store.session("child", parent=session), await store.session("s2")
    await child.register("t", TaskKind.OTHER, close_policy=TRANSFER)
    await session.close()

    await child.close(successor=successor)

    assert ids(await successor.list()) == ["t"]


async def test_a_parent_that_is_closed_is_no_hindrance_if_nothing_is_to_go_there(
    store: TaskStore, session: SessionTasks
) -> None:
    child = await store.session("child", parent=session)
    await child.register("t", TaskKind.OTHER)
    await session.close()

    assert ids((await child.close()).kept) == ["t"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("no successor and no parent", SessionError),
        ("unknown successor", UnknownSession),
        ("closed successor", SessionClosed),
        ("itself", SessionError),
        ("another runtime", SessionError),
        ("closed parent", SessionClosed),
        ("id live at the successor", TransferConflict),
        ("id of a descendant live at the successor", TransferConflict),
        ("id live at the parent", TransferConflict),
    ],
)
async def test_without_a_usable_destination_a_close_changes_nothing(
    store: TaskStore, path: Path, started: asyncio.Event, case: str, error: type[Exception]
) -> None:
    parent, other = await store.session("parent"), await store.session("other")
    session = await store.session("s1", parent=parent if "parent" in case and "no parent" not in case else None)
    await one_of_each(session, started)
    await session.register("below", TaskKind.OTHER, parent="body-transfer")
    await parent.register("elsewhere", TaskKind.OTHER)
    successor: Any = None
    match case:
        case "unknown successor":
            successor = "nobody"
        case "closed successor":
            await other.close()
            successor = other
        case "itself":
            successor = session
        case "another runtime":
            async with TaskStore(path, runtime="ci") as theirs:
                successor = (await theirs.session("s2")).scope
        case "closed parent":
            await parent.close()
        case "id live at the successor":
            await other.register("external-transfer", TaskKind.OTHER)
            successor = other
        case "id of a descendant live at the successor":
            await other.register("below", TaskKind.OTHER)
            successor = other
        case "id live at the parent":
            await parent.register("body-transfer", TaskKind.OTHER)

    with unchanged(path), pytest.raises(error):
        await session.close(successor=successor)

    # the session is as it was in every other respect, too
    await session.spawn(noop())
    assert (await session.get("body-cancel")).state is TaskState.RUNNING


async def test_a_close_that_was_refused_succeeds_with_a_successor(store: TaskStore, session: SessionTasks) -> None:
    await session.register("t", TaskKind.OTHER, close_policy=TRANSFER)
    with pytest.raises(SessionError, match=r"'t' first.*successor.*nothing was changed"):
        await session.close()
    successor = await store.session("s2")

    assert ids((await session.close(successor=successor)).transferred) == ["t"]


async def test_transferred_work_ends_and_is_awaited_in_its_new_session(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    successor = await store.session("s2")

    async def work() -> int:
        await hold(started, release)
        return 5

    task = await session.spawn(work(), close_policy=TRANSFER, notify_on_end=True)
    await started.wait()
    await session.close(successor=successor)

    release.set()

    assert await (await successor.handle(task.id)).result(timeout=20) == 5
    assert (await task.record()).scope == successor.scope
    assert [note.task_id for note in await successor.notes()] == [task.id]
    assert event_types(path, task.task_seq) == ["registered", "started", "transferred", "noted", "completed"]


async def test_a_task_that_goes_is_not_cancelled_with_a_parent_that_is(store: TaskStore, session: SessionTasks) -> None:
    successor = await store.session("s2")
    parent = await session.spawn(forever(), id="parent", close_policy=CANCEL)
    child = await session.spawn(forever(), id="child", close_policy=TRANSFER, parent=parent)
    await session.spawn(forever(), id="grandchild", parent=child)

    report = await session.close(successor=successor)

    assert (ids(report.cancelled), ids(report.transferred)) == (["parent"], ["child", "grandchild"])
    assert states(await successor.list()) == ["running", "running"]


async def test_a_task_that_is_to_be_cancelled_is_so_although_its_parent_goes(
    store: TaskStore, session: SessionTasks
) -> None:
    successor = await store.session("s2")
    parent = await session.spawn(forever(), id="parent", close_policy=TRANSFER)
    await session.spawn(forever(), id="child", close_policy=CANCEL, parent=parent)

    report = await session.close(successor=successor)

    assert (ids(report.cancelled), ids(report.transferred)) == (["child"], ["parent"])
    assert ids(await successor.list()) == ["parent"]


async def test_a_cancel_by_policy_covers_the_tree_below(session: SessionTasks) -> None:
    parent = await session.spawn(forever(), id="parent", close_policy=CANCEL)
    await session.spawn(forever(), id="child", close_policy=KEEP, parent=parent)

    report = await session.close()

    assert (ids(report.cancelled), ids(report.kept)) == (["parent", "child"], [])
    assert await session.list() == []


async def test_the_session_of_a_sub_agent_ends_with_it_or_is_left_alone(
    store: TaskStore, session: SessionTasks
) -> None:
    successor = await store.session("s2")
    for policy in (CANCEL, TRANSFER):
        own = await store.session(f"own-{policy}")
        await session.spawn(forever(), id=f"agent-{policy}", close_policy=policy, child_session_id=f"own-{policy}")
        await own.spawn(forever(), id=f"of-{policy}")

    report = await session.close(successor=successor)

    assert ids(report.cancelled) == ["agent-cancel", "of-cancel"]
    assert ids(report.transferred) == ["agent-transfer"]
    assert await (await store.session("own-cancel")).list() == []
    assert states(await (await store.session("own-transfer")).list()) == ["running"]


@dataclass
class Planted:
    """A task of a random tree, and what the policies say must become of it."""

    id: str
    policy: ClosePolicy
    mode: str
    above: list[Planted] = field(default_factory=list)
    task: TaskHandle | None = None

    @property
    def is_live(self) -> bool:
        return self.mode != "finished"

    @property
    def is_to_end(self) -> bool:
        return self.is_live and (self.policy is CANCEL or self.mode == "hidden")

    @property
    def is_to_go(self) -> bool:
        return self.is_live and self.policy is TRANSFER and not self.is_to_end

    @property
    def goes_along(self) -> bool:
        return self.is_live and not self.is_to_end and any(one.is_to_go for one in (self, *self.above))


async def plant(session: SessionTasks, planted: Planted) -> None:
    """Put a task into its session, below the one it is to be below."""
    parent = planted.above[0].task if planted.above else None
    if planted.mode == "hidden":
        planted.task = await session.spawn_hidden("hidden", forever())
    elif planted.mode == "body":
        planted.task = await session.spawn(forever(), id=planted.id, parent=parent, close_policy=planted.policy)
    else:
        planted.task = await session.register(
            planted.id,
            TaskKind.OTHER,
            (lambda: None) if planted.mode == "callback" else None,
            parent=parent,
            close_policy=planted.policy,
        )


async def close_and_hold_against_policies(store: TaskStore, name: str, trees: list[Planted]) -> CloseReport:
    """Plant tasks in a session of their own, close it, and look where each is and how."""
    session, successor = await store.session(name), await store.session(f"{name}-successor")
    for planted in trees:
        await plant(session, planted)
    for planted in trees:
        if planted.mode == "finished":
            await session.complete(planted.id, TaskState.COMPLETED)
    async with asyncio.timeout(20):
        report = await session.close(successor=successor)

    sorted_out = [record.task_seq for part in (report.kept, report.cancelled, report.transferred) for record in part]
    assert sorted(sorted_out) == [planted.task.task_seq for planted in trees if planted.is_live and planted.task]
    for planted in trees:
        assert planted.task is not None
        record = await planted.task.record()
        where = (str(record.state), record.scope)
        if not planted.is_live:
            assert where == ("completed", session.scope)
        elif planted.is_to_end:
            assert where == ("cancelled", session.scope)
        elif planted.goes_along:
            assert where == ("running", successor.scope)
        elif not any(one.is_to_end for one in planted.above):
            assert where == ("running", session.scope)
        else:
            assert where in {("running", session.scope), ("cancelled", session.scope)}
    assert {record.close_policy for record in await session.list(include_hidden=True)} <= {KEEP}
    assert not [record for record in await successor.list() if record.close_policy is CANCEL]
    return report


async def test_a_close_leaves_no_live_row_against_its_policy_in_a_line_of_three(store: TaskStore) -> None:
    for number, policies in enumerate(itertools.product(ClosePolicy, repeat=3)):
        line: list[Planted] = []
        for policy in policies:
            line.insert(0, Planted(f"t{len(line)}", policy, "body", above=list(line)))
        await close_and_hold_against_policies(store, f"s{number}", line[::-1])


@pytest.mark.parametrize("seed", range(3))
async def test_a_close_leaves_no_live_row_against_its_policy_in_any_tree(store: TaskStore, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(10):
        trees: list[Planted] = []
        for task in range(8):
            mode = chance.choice(["body", "body", "external", "callback", "hidden", "finished"])
            parent = chance.choice([None, *trees]) if mode != "hidden" else None
            above = [] if parent is None else [parent, *parent.above]
            policy = KEEP if mode == "hidden" else chance.choice(list(ClosePolicy))
            trees.append(Planted(f"t{task}", policy, mode, above))
        await close_and_hold_against_policies(store, f"s{number}", trees)


# --- closing: waiting -----------------------------------------------------------------------------------------------


async def test_a_close_waits_for_the_bodies_it_cancelled(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    async def slow_to_end() -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            await release.wait()

    await session.spawn(slow_to_end(), close_policy=CANCEL)
    await started.wait()
    closing = asyncio.create_task(session.close())
    await next_event(store, EventType.CANCEL_REQUESTED)

    # closed for everybody in the same transaction, whether or not its bodies have stopped
    assert session_row(path, "s1")["closed_at"] is not None
    assert not closing.done()
    release.set()
    async with asyncio.timeout(20):
        assert states((await closing).cancelled) == ["cancelled"]


async def test_after_its_timeout_a_close_reports_what_swallows_its_cancel_as_it_stands(
    session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def stubborn() -> str:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return "done"

    task = await session.spawn(stubborn(), id="stubborn", close_policy=CANCEL)
    await session.spawn(forever(), id="willing", close_policy=CANCEL)
    await started.wait()

    report = await session.close(timeout=0.2)

    found = {record.id: str(record.state) for record in report.cancelled}
    assert found["stubborn"] == "cancel_requested"
    assert found.keys() == {"stubborn", "willing"}
    with pytest.raises(SessionClosed):
        await session.spawn(noop(), id="late")
    release.set()
    assert (await task.wait(timeout=20)).result == "done"


async def test_a_close_whose_caller_is_cancelled_stands(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def slow_to_end() -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            await release.wait()

    task = await session.spawn(slow_to_end(), close_policy=CANCEL)
    await started.wait()
    closing = asyncio.create_task(session.close())
    await next_event(store, EventType.SESSION_CLOSED)
    closing.cancel()
    await asyncio.wait({closing})

    release.set()

    assert closing.cancelled()
    assert (await task.wait(timeout=20)).state is TaskState.CANCELLED
    assert (await session.close()).closed_at is not None


@pytest.mark.parametrize("policy", [KEEP, CANCEL])
async def test_a_body_may_close_the_session_it_is_in(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path, policy: ClosePolicy
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    async def last() -> str:
        await hold(started, release)
        await session.close()
        return "closed"

    task = await session.spawn(last(), close_policy=policy)
    await started.wait()
    pending = await session.spawn(forever(), close_policy=CANCEL)
    release.set()

    record = await task.wait(timeout=20)

    assert record.state is (TaskState.COMPLETED if policy is KEEP else TaskState.CANCELLED)
    assert (await pending.wait(timeout=20)).state is TaskState.CANCELLED
    assert session_row(path, "s1")["closed_at"] is not None


async def test_closing_twice_changes_nothing(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await session.register("t", TaskKind.OTHER, close_policy=CANCEL)
    first = await session.close()

    with unchanged(path):
        for successor in (None, "nobody"):
            again = await session.close(successor=successor)
            assert again == CloseReport(scope=session.scope, closed_at=first.closed_at)


async def test_of_closes_at_once_one_closes(opened: Callable[..., Any], session: SessionTasks, path: Path) -> None:
    other = await (await opened()).session("s1")
    await session.spawn(forever(), id="t", close_policy=CANCEL)

    async with asyncio.timeout(20):
        reports = await asyncio.gather(*(each.close() for each in (session, other) * 3))

    assert len({report.closed_at for report in reports}) == 1
    # who comes later waits for what is being cancelled still, if it is
    assert {tuple(ids(report.cancelled)) for report in reports} <= {(), ("t",)}
    assert states(await session.list(include_terminal=True)) == ["cancelled"]
    assert [kind for kind, _ in story(path, "s1")] == ["session_opened", "session_closed"]


async def test_a_spawn_and_a_close_at_once_leave_no_row_against_its_policy(store: TaskStore, path: Path) -> None:
    for number in range(10):
        session = await store.session(f"s{number}")
        spawns = [session.spawn(forever(), close_policy=CANCEL) for _ in range(4)]
        operations = [*spawns[:2], session.close(), *spawns[2:]]
        async with asyncio.timeout(20):
            found = await asyncio.gather(*operations, return_exceptions=True)

        assert await session.list() == []
        assert all(isinstance(one, TaskHandle | CloseReport | SessionClosed) for one in found)
        assert [type(one) for one in found[:2]] == [TaskHandle] * 2
        assert [type(one) for one in found[3:]] == [SessionClosed] * 2


# --- closed ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def closed(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> SessionTasks:
    """A closed session that keeps "body", which runs until *release*, and "external"; "failed" failed in it."""

    async def fail() -> None:
        raise RuntimeError("no")

    await session.spawn(hold(started, release), id="body", notify_on_end=True)
    await session.register("external", TaskKind.OTHER)
    await (await session.spawn(fail(), id="failed", notify_on_end=True)).wait(timeout=20)
    await store.session("s2")
    await started.wait()
    await session.close()
    return session


@pytest.mark.parametrize(
    "operation", ["spawn", "spawn_hidden", "register", "observe", "transfer", "handoff", "child_session_id", "again"]
)
async def test_nobody_creates_in_a_closed_session(
    store: TaskStore, closed: SessionTasks, path: Path, operation: str
) -> None:
    other = await store.session("s2")
    await other.register("there", TaskKind.OTHER)
    work = noop()
    attempts: dict[str, Any] = {
        "spawn": lambda: closed.spawn(work),
        "spawn_hidden": lambda: closed.spawn_hidden("memory", work),
        "register": lambda: closed.register("new", TaskKind.OTHER),
        "observe": lambda: closed.observe(other, "there"),
        "transfer": lambda: other.transfer(closed, ["there"]),
        "handoff": lambda: other.handoff(closed, ["there"]),
        "child_session_id": lambda: other.spawn(work, child_session_id="s1"),
        "again": lambda: closed.spawn(work, id="failed"),
    }

    with unchanged(path), pytest.raises(SessionClosed, match=r"'desktop:s1' is closed.*reopen=True"):
        await attempts[operation]()

    if operation in {"spawn", "spawn_hidden", "child_session_id", "again"}:
        with pytest.raises(RuntimeError, match="cannot reuse"):
            await work
    else:
        work.close()


async def test_a_closed_session_shows_what_is_in_it_and_steers_what_it_kept(
    store: TaskStore, closed: SessionTasks, release: asyncio.Event
) -> None:
    view = await store.session("s1")

    assert ids(await view.list()) == ["body", "external"]
    assert ids(await view.list(include_terminal=True)) == ["body", "external", "failed"]
    assert (await view.get("failed")).state is TaskState.FAILED
    assert ids(await view.validate_handles(["body", "external", "failed"])) == ["body", "external", "failed"]
    assert (await view.update("external", progress="half", fraction=0.5)).verdict is Verdict.APPLIED
    assert (await view.complete("external", TaskState.COMPLETED, result=1)).verdict is Verdict.APPLIED
    assert await (await view.handle("external")) == 1
    release.set()
    assert await (await view.handle("body")).result(timeout=20) is None
    async with view.inbox() as notes:
        assert [note.task_id for note in notes] == ["failed", "body"]
    assert await view.sync_needed() is False
    await view.await_hidden()
    assert (await take(view.events(0), 1))[0].type is EventType.SESSION_OPENED


async def test_what_a_closed_session_kept_is_cancelled_or_handed_on_from_it(
    store: TaskStore, closed: SessionTasks
) -> None:
    other = await store.session("s2")

    assert ids(await closed.transfer(other, ["external"])) == ["external"]
    assert (await closed.cancel("body", timeout=20)).state is TaskState.CANCELLED
    assert await closed.cancel_all() == []
    assert ids(await other.list()) == ["external"]


async def test_a_kept_task_may_still_spawn_children_and_they_theirs(
    store: TaskStore, closed: SessionTasks, path: Path
) -> None:
    kept = await closed.handle("body")
    child = await closed.spawn(forever(), parent=kept, id="child")
    grandchild = await closed.register("grandchild", TaskKind.OTHER, parent="child")

    assert ids(await closed.list()) == ["body", "external", "child", "grandchild"]
    seqs = [(await task.record()).parent_seq for task in (child, grandchild)]
    assert seqs == [kept.task_seq, child.task_seq]


@pytest.mark.parametrize("parent", ["finished", "of another session", "that went"])
async def test_a_parent_that_is_no_live_task_of_a_closed_session_bears_nothing_in_it(
    store: TaskStore, closed: SessionTasks, path: Path, parent: str
) -> None:
    other = await store.session("s2")
    named: Any = "failed"
    if parent == "of another session":
        named = (await other.register("there", TaskKind.OTHER)).handle_id
    elif parent == "that went":
        named = await closed.handle("external")
        await closed.transfer(other, ["external"])

    work = noop()
    with unchanged(path), pytest.raises((SessionClosed, LookupError)):
        await closed.spawn(work, parent=named)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work


async def test_a_kept_body_spawns_its_children_in_its_closed_session(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def kept(task: TaskContext) -> list[Any]:
        await hold(started, release)
        child = await session.spawn(noop(), parent=task.id)
        return [await child, (await child.record()).parent_seq]

    task = await session.spawn(kept)
    await started.wait()
    await session.close()

    release.set()

    assert await task.result(timeout=20) == [None, task.task_seq]


async def test_kept_external_work_is_registered_again_after_a_restart(
    new: Callable[..., TaskStore], path: Path
) -> None:
    called: list[str] = []
    async with new() as store:
        session = await store.session("s1")
        first = await session.register("t", TaskKind.OTHER)
        await session.close()

    async with new() as store:
        session = await store.session("s1")
        again = await session.register("t", TaskKind.OTHER, lambda: called.append("t"))
        assert again.task_seq == first.task_seq
        with pytest.raises(SessionClosed):
            await session.register("other", TaskKind.OTHER)
        assert (await again.cancel(timeout=20)).state is TaskState.CANCELLED

    assert called == ["t"]
    assert event_types(path, first.task_seq)[:3] == ["registered", "released", "reattached"]


async def test_asking_a_closed_session_again_for_work_it_has_creates_nothing(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> int:
        return number

    task = await session.spawn(work, 5, idempotency_key="work")
    external = await session.register("t", TaskKind.OTHER, lambda: None, idempotency_key="t")
    await task
    await session.close()

    with unchanged(path):
        assert (await session.spawn(work, 5, idempotency_key="work")).task_seq == task.task_seq
        again = await session.register("t", TaskKind.OTHER, lambda: None, idempotency_key="t")
        assert again.task_seq == external.task_seq


async def test_a_session_stays_closed_until_it_is_opened_again(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.register("kept", TaskKind.OTHER)
        await session.close()
    async with new() as store:
        session = await store.session("s1")
        with pytest.raises(SessionClosed):
            await session.spawn(noop())

        reopened = await store.session("s1", reopen=True)

        assert session_row(path, "s1")["closed_at"] is None
        # whoever has the session has it open
        for each in (session, reopened):
            assert await (await each.spawn(noop())) is None
        with unchanged(path):
            await store.session("s1", reopen=True)
        assert ids(await reopened.list()) == ["kept"]
        assert story(path, "s1")[2:] == [("session_opened", {"reopened": True})]


async def test_a_session_that_was_opened_again_closes_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    first = await session.close()
    await store.session("s1", reopen=True)
    await session.register("t", TaskKind.OTHER, close_policy=CANCEL)

    second = await session.close()

    assert (ids(second.cancelled), second.closed_at >= first.closed_at) == (["t"], True)
    assert [kind for kind, _ in story(path, "s1")] == ["session_opened", "session_closed"] * 2


async def test_kept_work_runs_again_in_its_closed_session_after_a_restart(
    new: Callable[..., TaskStore], started: asyncio.Event
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            await hold(started, asyncio.Event())
        return task.attempt

    async with store:
        session = await store.session("s1")
        await session.spawn(work, id="t")
        await started.wait()
        await session.close()
    async with store:
        session = await store.session("s1")
        assert await (await session.handle("t")).result(timeout=20) == 2
        with pytest.raises(SessionClosed):
            await session.spawn(work)


async def test_a_session_is_closed_from_a_requesting_store_but_not_from_a_reading_one(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await session.spawn(forever(), id="t", close_policy=CANCEL)
    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reading:
        beside = await reading.session("s1")
        with unchanged(path), pytest.raises(StoreReadOnly):
            await beside.close()

    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        report = await (await asking.session("s1")).close(timeout=20)

    assert states(report.cancelled) == ["cancelled"]
    with pytest.raises(SessionClosed):
        await session.spawn(noop())


# --- who hears of it ------------------------------------------------------------------------------------------------


def told(events: Iterable[TaskEvent]) -> list[tuple[str | None, str]]:
    """Say what happened to whom."""
    return [(event.task_id, str(event.type)) for event in events]


async def test_a_subscriber_of_a_session_gets_its_events_alone_with_what_came_and_went(
    store: TaskStore, session: SessionTasks
) -> None:
    other = await store.session("s2")
    live = {each.scope: each.events() for each in (session, other)}
    for each, task_id in ((session, "stays"), (other, "theirs"), (session, "goes"), (other, "comes")):
        await each.register(task_id, TaskKind.OTHER, notify_on_end=True)
    await session.transfer(other, ["goes"])
    await other.transfer(session, ["comes"])
    await other.complete("goes", TaskState.COMPLETED)
    await session.complete("comes", TaskState.FAILED)
    await session.cancel("stays")
    await session.close()
    await other.close()

    expected = {
        session.scope: [
            (None, "session_opened"),
            ("stays", "registered"),
            ("goes", "registered"),
            ("goes", "transferred"),
            ("comes", "transferred"),
            ("comes", "noted"),
            ("comes", "failed"),
            ("stays", "cancel_requested"),
            ("stays", "noted"),
            ("stays", "cancelled"),
            (None, "session_closed"),
        ],
        other.scope: [
            (None, "session_opened"),
            ("theirs", "registered"),
            ("comes", "registered"),
            ("goes", "transferred"),
            ("comes", "transferred"),
            ("goes", "noted"),
            ("goes", "completed"),
            (None, "session_closed"),
        ],
    }
    for scope, events in live.items():
        # handed over as it was committed, and read from the table
        assert told(await take(events, len(expected[scope]) - 1)) == expected[scope][1:]
        again = await take(store.events(0, scope=scope), len(expected[scope]))
        assert told(again) == expected[scope]
        assert [event.seq for event in again] == sorted({event.seq for event in again})
        assert {event.scope for event in again if event.from_scope is None} == {scope}
        moves = {event.task_id: (event.from_scope, event.scope) for event in again if event.from_scope is not None}
        assert moves == {"goes": (session.scope, other.scope), "comes": (other.scope, session.scope)}


async def test_a_slow_subscriber_of_a_session_loses_nothing_and_resumes_from_its_cursor(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async def busy(session: SessionTasks, first: int) -> None:
        names = [f"t{number}" for number in range(first, first + 120)]
        await asyncio.gather(*(session.register(name, TaskKind.OTHER) for name in names))
        for _ in range(4):
            await asyncio.gather(*(session.update(name, progress="on") for name in names))
        await asyncio.gather(*(session.complete(name, TaskState.COMPLETED) for name in names))

    scope = Scope(RUNTIME, "s1")
    async with new() as store:
        session, other = await store.session("s1"), await store.session("s2")
        slow = session.events(0)
        found = await take(slow, 1)
        await asyncio.gather(busy(session, 0), busy(other, 0))
        await busy(session, 120)
        found += await take(slow, 700)
    async with new() as store:
        session, other = await store.session("s1"), await store.session("s2")
        # from the cursor of what was yielded, as whoever was killed with it would
        rest = store.events(found[-1].seq, scope=scope)
        await busy(session, 240)
        await session.close()
        expected = [row["seq"] for row in rows(path, "SELECT seq FROM events WHERE scope = ? ORDER BY seq", str(scope))]
        found += await take(rest, len(expected) - len(found))

    assert [event.seq for event in found] == expected
    assert len(expected) == 2 + 3 * 6 * 120
    assert (found[-1].type, event_count(path)) == (EventType.SESSION_CLOSED, len(expected) + 1 + 6 * 120)
    ends = [event.task_id for event in found if event.type is EventType.COMPLETED]
    assert sorted(ends) == sorted(f"t{number}" for number in range(360))


async def test_a_subscriber_hears_of_a_close_that_another_store_made(
    opened: Callable[..., Any], session: SessionTasks
) -> None:
    other = await (await opened()).session("s1")
    events = session.events(types=[EventType.SESSION_CLOSED, EventType.CANCELLED])
    await session.spawn(forever(), id="t", close_policy=CANCEL)

    await other.close()

    assert [str(event.type) for event in await take(events, 2)] == ["session_closed", "cancelled"]
