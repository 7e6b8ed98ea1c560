"""Rules of taking a file to another revision: every row is kept, its work goes on, and a kill leaves the old one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.operations import Operations
from alembic.script import ScriptDirectory

from lash_store import (
    Backoff,
    ClosePolicy,
    EventType,
    Recovery,
    SchemaError,
    SchemaTooOld,
    StorageFull,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskKind,
    TaskNotFound,
    TaskPruned,
    TaskState,
    TaskStore,
    TransactConnection,
    Verdict,
    database,
    guards,
    migrate,
    owners,
    processes,
    schema,
    transaction,
)
from lash_store import revisions as revisions_in_memory
from tests.runtime.support import check_file, next_event, rows, take
from tests.storage.test_schema import objects

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "data"

Contents = dict[str, list[dict[str, Any]]]


def copy_of(revision: str, folder: Path) -> Path:
    """
    Copy a file of a revision, written by the code of that revision in two processes that were killed.

    The first left what is finished; the second, owner 2, died over `half-way`, `asked`, `bare` and `open-ended`. At revision
    0002 there are also families, hidden and external work, notes and handoffs; `half-way` has counted to 2, not to 3. At
    revision 0003 session s8 has what bodies remember, finished and live: steps, sleeps, signals, children, retries, deadlines. At
    0004 session s9 has monitors: finished ones, whose lines were read, are unread, or were dropped, an armed one, and
    live ones (`restored`, `tail`, `follow`), the first two lines of which a reader had when it was killed.
    """
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(DATA / f"{revision}.db", folder / "agent.db"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of revision 0001."""
    return copy_of("0001", tmp_path)


@pytest.fixture(params=["0001", "0002", "0003", "0004"])
def before_us(request: pytest.FixtureRequest) -> str:
    """Each revision before the newest."""
    return str(request.param)


@pytest.fixture
def older(tmp_path: Path, before_us: str) -> Path:
    """A file of each of them."""
    return copy_of(before_us, tmp_path)


@pytest.fixture
def remembers(tmp_path: Path) -> Path:
    """A file of revision 0003, whose bodies remember."""
    return copy_of("0003", tmp_path)


@pytest.fixture
def watches(tmp_path: Path) -> Path:
    """A file of revision 0004, which has monitors."""
    return copy_of("0004", tmp_path)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def contents(path: Path, like: Contents | None = None) -> Contents:
    """Return every row of every table; with *like*, only of the tables and columns that has."""
    with reading(path) as connection:
        found = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
            if not name.startswith("sqlite_") and name != schema.VERSION_TABLE
        ]
        chosen = dict.fromkeys(found, "*")
        if like is not None:
            chosen = {name: ", ".join(f'"{column}"' for column in like[name][0]) for name in like if like[name]}
        return {
            table: [dict(row) for row in connection.execute(f"SELECT {columns} FROM {table} ORDER BY rowid")]
            for table, columns in chosen.items()
        }


def objects_of_ours(path: Path) -> dict[tuple[str, str], str]:
    """Return every object but the table that programs made for themselves, in a transaction of a step."""
    found = objects(path)
    found.pop(("table", "own"), None)
    return found


def bytes_of(path: Path) -> dict[str, bytes]:
    """Return the file and what stands in its log, as they lie on the disk."""
    files = (path, Path(f"{path}-wal"))
    return {file.name: file.read_bytes() for file in files if file.exists() and file.stat().st_size}


async def wait_here(task: TaskContext) -> None:
    await asyncio.Event().wait()


def working(path: Path, begun: list[Any]) -> TaskStore:
    """Make a store with the functions the old file names; each body tells *begun* with what it begins."""
    store = TaskStore(path, runtime="desktop", cancel_grace=0.0)
    store.task(recovery=Recovery.RERUN)(wait_here)

    @store.task(recovery=Recovery.RERUN)
    async def count(task: TaskContext, until: int) -> list[int]:
        first: Any = task.checkpoint
        begun.append((task.id, task.attempt, first))
        for done in range(first, until):
            await task.save(done + 1)
        return [first, until]

    @store.task(recovery=Recovery.RERUN)
    async def forever(task: TaskContext) -> None:
        begun.append((task.id, task.attempt, task.checkpoint))
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def broken(task: TaskContext) -> None:
        raise AssertionError("it has failed, and stays so")

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def once(task: TaskContext) -> None:
        raise AssertionError("it may not be run again")

    @store.task(recovery=Recovery.RERUN)
    async def tell(task: TaskContext, what: str) -> None:
        raise AssertionError("it was told, and stays so")

    remembering(store, begun, count, forever)
    return store


Body = Callable[..., Coroutine[Any, Any, Any]]

FAR = Backoff(initial=1e9, maximum=1e9)


def remembering(store: TaskStore, begun: list[Any], count: Body, forever: Body) -> None:
    """
    Register the bodies of 0003.db that remember, and what they do tells *begun*; what is done or in doubt may not be done again.

    *count* and *forever* are those of their children.
    """

    def never(*_: Any) -> Any:
        raise AssertionError("it was done, and is remembered")

    def doing(what: str) -> Callable[[], str]:
        def do() -> str:
            begun.append(what)
            return what

        return do

    @store.task(recovery=Recovery.RERUN, version="3", accepts=["2"])
    async def recalls(task: TaskContext) -> list[Any]:
        state: Any = task.checkpoint
        told = [await task.step("fetch", never), await task.transact("note", never, task.id)]
        await task.sleep(3600.0, name="nap")
        return [*told, state["first"], await task.signal("second")]

    @store.task(recovery=Recovery.RERUN)
    async def tries(task: TaskContext, hangs: bool) -> list[Any]:
        told: list[Any] = [await task.step("fetch", never)]
        steps = (
            task.step("break", never),
            task.step("call", doing("call"), max_attempts=3, backoff=FAR),
            task.step("slow", doing("slow")),
            task.step("charge", never, at_most_once=True),
        )
        told += await asyncio.gather(*steps, return_exceptions=True)
        return [repr(one) if isinstance(one, ValueError) else getattr(one, "task_id", one) for one in told]

    @store.task(recovery=Recovery.RERUN)
    async def receives(task: TaskContext) -> list[Any]:
        return [await task.step("ask", never), await task.signal("go"), await task.signal("go")]

    @store.task(recovery=Recovery.RERUN)
    async def dozes(task: TaskContext, seconds: float) -> str:
        await task.sleep(3600.0, name="nap")
        await task.sleep(0.001)
        await task.sleep(seconds)
        return f"awake from {task.checkpoint}"

    @store.task(recovery=Recovery.RERUN)
    async def hibernates(task: TaskContext) -> str:
        await task.sleep(1e9, name="winter")
        return "it is spring"

    @store.task(recovery=Recovery.RERUN)
    async def approves(task: TaskContext, waits: bool) -> None:
        async with task.waiting("approval"):
            await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, backoff=FAR)
    async def puts_off(task: TaskContext) -> list[Any]:
        begun.append((task.id, task.attempt, task.checkpoint))
        return [await task.step("fetch", never), task.attempt]

    @store.task(recovery=Recovery.RERUN)
    async def begets(task: TaskContext, waits: bool) -> list[Any]:
        unnamed = await task.spawn(count, 1)
        named = await task.spawn(count, 2, id=f"{task.id}-named")
        live = [await task.spawn(forever, id="begotten"), await task.spawn(forever)]
        return [await unnamed, await named, *(child.task_seq for child in live)]

    @store.task(recovery=Recovery.RERUN, version="2")
    async def dated(task: TaskContext) -> None:
        raise AssertionError("it was begun by code of another version")


# --- files from before a revision -----------------------------------------------------------------------------------


def revisions() -> list[tuple[str, str | None]]:
    """Return every revision with the one before it, as the scripts say."""
    scripts = ScriptDirectory(str(REPOSITORY / "migrations"))
    return [(script.revision, script.down_revision) for script in scripts.walk_revisions()]  # type: ignore[misc]


def test_every_script_is_named_by_its_revision() -> None:
    named = {script.name[:4] for script in (REPOSITORY / "migrations" / "versions").glob("[0-9]*.py")}

    assert named == {revision for revision, _ in revisions()}


@pytest.mark.parametrize("before", [before for _, before in revisions() if before is not None])
def test_every_revision_but_the_first_has_a_file_from_before_it(tmp_path: Path, before: str) -> None:
    copy = Path(shutil.copy(DATA / f"{before}.db", tmp_path / "agent.db"))

    assert migrate.current(copy) == before
    assert contents(copy)["tasks"]


@pytest.mark.parametrize("file", sorted(DATA.glob("*.db")), ids=lambda file: file.name)
def test_every_old_file_is_upgraded_to_what_a_new_file_is(tmp_path: Path, file: Path) -> None:
    old, new = Path(shutil.copy(file, tmp_path / "old.db")), tmp_path / "new.db"
    migrate.prepare(new)

    migrate.prepare(old)

    assert objects_of_ours(old) == objects(new)
    assert migrate.current(old) == schema.HEAD


# --- up -------------------------------------------------------------------------------------------------------------


COUNTS = {
    "0001": {"events": 33, "handles": 8, "owners": 2, "sessions": 2, "steps": 2, "tasks": 8},
    "0002": {
        "events": 215,
        "handles": 62,
        "handoffs": 2,
        "inbox": 6,
        "owners": 2,
        "sessions": 7,
        "steps": 7,
        "tasks": 60,
    },
    "0003": {
        "events": 378,
        "handles": 94,
        "handoffs": 2,
        "inbox": 8,
        "own": 3,
        "owners": 2,
        "sessions": 8,
        "signals": 11,
        "steps": 47,
        "tasks": 92,
    },
    "0004": {
        "events": 449,
        "handles": 108,
        "handoffs": 2,
        "inbox": 14,
        "monitors": 14,
        "own": 3,
        "owners": 2,
        "sessions": 9,
        "signals": 11,
        "steps": 47,
        "tasks": 106,
        "updates": 19,
    },
}


async def test_opening_an_old_file_upgrades_it_in_place_and_keeps_every_row(older: Path, before_us: str) -> None:
    before = contents(older)

    # of another runtime: nothing in the file is this store's to recover
    async with TaskStore(older, runtime="another"):
        pass

    after = contents(older, before)
    assert migrate.current(older) == schema.HEAD
    assert {table: len(found) for table, found in before.items() if found} == COUNTS[before_us]
    newcomer = after["owners"].pop()
    assert newcomer["runtime"] == "another"
    assert after == before


def test_every_column_of_every_row_is_kept_by_the_upgrade_itself(older: Path) -> None:
    before = contents(older)

    migrate.upgrade(older)

    assert contents(older, before) == before


def test_an_upgraded_file_has_the_schema_of_a_new_one(older: Path, newborn: Path) -> None:
    migrate.upgrade(older)

    assert objects_of_ours(older) == objects(newborn)


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_bodies_of_an_old_file_have_no_more_to_remember_than_their_checkpoints(tmp_path: Path, revision: str) -> None:
    older = copy_of(revision, tmp_path)
    migrate.upgrade(older)

    after = contents(older)
    names = ("version", "timeout", "deadline", "not_before", "last_error", "waiting_for")
    assert {tuple(task[name] for name in names) for task in after["tasks"]} == {(None,) * 6}
    assert {
        (step["kind"], step["state"], step["tries"], step["failure"], step["begun_at"], step["wake_at"])
        for step in after["steps"]
    } == {("checkpoint", "done", 1, None, None, None)}
    assert after["signals"] == []


def test_what_is_new_in_an_old_row_is_what_its_time_knew_of_it(old: Path) -> None:
    migrate.upgrade(old)

    after = contents(old)
    assert {
        (
            task["parent_seq"],
            task["child_session_id"],
            task["close_policy"],
            task["idempotency_key"],
            task["notify_on_end"],
            task["has_callback"],
            task["callback_begun_at"],
            task["callback_error"],
        )
        for task in after["tasks"]
    } == {(None, None, "keep", None, 0, 0, None, None)}
    assert {(row["parent"], row["sync_needed"], row["inbox_claim"]) for row in after["sessions"]} == {(None, 0, None)}
    assert (after["inbox"], after["handoffs"]) == ([], [])


def test_the_events_of_an_old_file_give_its_rows_after_the_upgrade(older: Path) -> None:
    migrate.upgrade(older)

    check_file(older)


@pytest.mark.parametrize("view", ["live_tasks", "task_history", "recent_failures", "session_summary"])
def test_the_views_of_an_upgraded_file_can_be_read(older: Path, view: str) -> None:
    migrate.upgrade(older)

    assert rows(older, f"SELECT * FROM {view}")


async def test_the_work_of_an_old_file_goes_on_after_the_upgrade(old: Path) -> None:
    begun: list[Any] = []

    async with asyncio.timeout(20), working(old, begun) as store:
        async for event in store.events(0, types=[EventType.REATTACHED]):
            if event.task_id == "open-ended":
                break
        assert await (await store.handle("desktop:s1", "half-way")) == [3, 3]
        states = {task.id: (str(task.state), task.attempt) for task in await store.list()}

    assert sorted(begun) == [("asked", 2, None), ("half-way", 2, 3), ("open-ended", 2, None)]
    assert states == {
        "counted": ("completed", 1),
        "broken": ("failed", 1),
        "stopped": ("cancelled", 1),
        "bound": ("abandoned", 1),
        "half-way": ("completed", 2),
        "asked": ("running", 2),
        "bare": ("abandoned", 1),
        "open-ended": ("running", 2),
    }
    check_file(old)


async def test_a_task_of_an_old_file_continues_from_its_checkpoint(old: Path) -> None:
    # as it would be had the process died one step earlier
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("UPDATE steps SET value = '2' WHERE task_seq = 5")
    begun: list[Any] = []

    async with asyncio.timeout(20), working(old, begun) as store:
        result = await (await store.handle("desktop:s1", "half-way"))

    assert result == [2, 3]
    assert ("half-way", 2, 2) in begun
    assert rows(old, "SELECT value, attempt FROM steps WHERE task_seq = 5") == [{"value": "3", "attempt": 2}]


RUN_AGAIN = ("passed-on", "kept", "agent-5", "carried", "again")
"""What ran for the second time when its second owner died."""

WHAT_BECOMES = {
    **dict.fromkeys(RUN_AGAIN, ("running", 3, 2, 3)),
    **dict.fromkeys(
        ("open-ended", "agent", "child", "inside", "moved", "memory", "in-5-again", "later"), ("running", 2, 1, 3)
    ),
    **dict.fromkeys(("queued", "claimed"), ("running", 1, 0, 3)),
    "half-way": ("completed", 2, 1, 3),
    "asked": ("cancelled", 1, 0, 2),
    "bare": ("abandoned", 1, 0, 2),
    "bare-memory": ("abandoned", 1, 0, 2),
    # nobody here knows its function
    "orphan": ("pending", 1, 1, None),
    # others do the work
    **dict.fromkeys(("ext-released", "ext-rebound", "ext-running"), ("running", 0, 0, None)),
    "ext-waiting": ("waiting", 0, 0, None),
    "ext-asked": ("cancel_requested", 0, 0, None),
    "ext-hangs": ("cancelled", 0, 0, 2),
}
"""State, attempt, attempts spent and owner of each live task of 0002.db once owner 3 has recovered it."""

WHAT_BECOMES_OF_THE_REMEMBERING = {
    **dict.fromkeys(("recalling", "hibernating"), ("running", 3, 2, 3)),
    **dict.fromkeys(("trying", "receiving", "patient", "due", "begotten", "forever"), ("running", 2, 1, 3)),
    "approving": ("waiting", 2, 1, 3),
    # its time has come since, and the children it asks for are there
    "dozing": ("completed", 3, 2, 3),
    "begetting": ("completed", 2, 1, 3),
    "late": ("failed", 1, 1, 2),
    "put-off": ("pending", 1, 1, 3),
    # this program has another version of its function
    "dated": ("pending", 1, 1, None),
}
"""The same of what 0003.db has beside that."""

WHAT_BECOMES_OF_MONITORS = {
    "monitor:restored": ("running", 3, 2, 3),
    "monitor:follow": ("running", 2, 1, 3),
    "monitor:tail": ("abandoned", 1, 0, 2),
}
"""The same of what 0004.db has beside that."""


@pytest.mark.parametrize(
    ("revision", "becomes", "reattached"),
    [
        ("0002", WHAT_BECOMES, 16),
        ("0003", WHAT_BECOMES | WHAT_BECOMES_OF_THE_REMEMBERING, 27),
        ("0004", WHAT_BECOMES | WHAT_BECOMES_OF_THE_REMEMBERING | WHAT_BECOMES_OF_MONITORS, 29),
    ],
)
async def test_the_work_of_families_sessions_and_others_goes_on_after_the_upgrade(
    tmp_path: Path, revision: str, becomes: dict[str, Any], reattached: int
) -> None:
    path = copy_of(revision, tmp_path)
    live = [task["task_seq"] for task in contents(path)["tasks"] if task["completed_at"] is None]
    begun: list[Any] = []

    async with asyncio.timeout(20), working(path, begun) as store:
        assert await (await store.handle("desktop:s1", "half-way")) == [2, 3]
        await take(store.events(COUNTS[revision]["events"], types=[EventType.REATTACHED]), reattached)
        if revision >= "0003":
            for name in ("dozing", "begetting"):
                await (await store.handle("desktop:s8", name))
            await next_event(store, EventType.STATE_CHANGED, task_id="approving", after=COUNTS[revision]["events"])
        after = {task["task_seq"]: task for task in contents(path)["tasks"]}

    assert ("half-way", 2, 2) in begun
    assert {
        # hidden work and a child without a name have a random end to their ids
        re.sub(rf"^({task['label']})-\w{{12}}$", r"\1", task["id"]): (
            task["state"],
            task["attempt"],
            task["attempts_spent"],
            task["owner_id"],
        )
        for task in map(after.__getitem__, live)
    } == becomes
    check_file(path)


async def test_the_outcomes_of_an_old_file_are_handed_out_after_the_upgrade(older: Path) -> None:
    async with asyncio.timeout(20), working(older, []) as store:
        session = await store.session("s1")
        assert await (await session.handle("counted")) == 2
        with pytest.raises(TaskFailed, match="no such page"):
            await (await session.handle("broken"))
        with pytest.raises(TaskCancelled, match="no longer wanted"):
            await (await session.handle("stopped"))
        with pytest.raises(TaskAbandoned):
            await (await session.handle("bound"))


async def test_an_upgraded_file_takes_new_work_of_every_kind(old: Path) -> None:
    async with asyncio.timeout(20), working(old, []) as store:
        session, other = await store.session("s1"), await store.session("s2", parent="s1")
        external = await session.register("build", TaskKind.OTHER)
        await session.complete("build", TaskState.COMPLETED, result="done")
        child = await session.spawn(wait_here, id="counted", parent="asked", notify_on_end=True)
        await child.cancel("enough")
        [moved] = await session.transfer(other, ["asked"])
        [note] = await session.notes()

        assert await external == "done"
        assert (note.task_id, note.key) == ("counted", f"end:{child.task_seq}")
        assert (str(moved.scope), moved.task_seq) == ("desktop:s2", 6)
    check_file(old)


async def test_the_owner_of_an_old_file_that_died_is_found_dead(older: Path) -> None:
    async with TaskStore(older, runtime="desktop"):
        pass

    assert [owner["end"] for owner in contents(older)["owners"]] == ["died", "died", "closed"]


async def test_the_log_of_an_old_file_is_upgraded_with_it(older: Path) -> None:
    left = left_with_a_log(older)

    async with TaskStore(left, runtime="another"):
        pass

    assert migrate.current(left) == schema.HEAD
    assert "desktop:in-the-log" in {session["scope"] for session in contents(left)["sessions"]}


def left_with_a_log(old: Path) -> Path:
    """Return a copy of the file as a kill leaves it, whose last session stands in the log alone."""
    left = old.with_name("left.db")
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(
            "INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES (?, 'desktop', 'in-the-log', '')",
            ("desktop:in-the-log",),
        )
        shutil.copy(old, left)
        shutil.copy(f"{old}-wal", f"{left}-wal")
    return left


async def test_the_file_from_before_an_upgrade_is_kept_beside_it(older: Path, before_us: str) -> None:
    before = contents(older)

    async with TaskStore(older, runtime="another"):
        pass

    beside = [file for file in older.parent.glob(f"{older.name}*") if file.is_file() and file != older]
    backups = [file for file in beside if file.read_bytes()[:16] == b"SQLite format 3\0"]
    assert len(backups) == 1
    assert migrate.current(backups[0]) == before_us
    assert contents(backups[0]) == before
    assert backups[0].stat().st_mode & 0o077 == 0


# --- up, with what bodies remember ----------------------------------------------------------------------------------


def set_back(path: Path, statement: str, *parameters: Any) -> None:
    """Change an old file, as if time had passed otherwise."""
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(statement, parameters).rowcount == 1


async def test_what_bodies_remembered_is_told_after_the_upgrade_as_it_was_left(remembers: Path) -> None:
    before = contents(remembers)

    async with TaskStore(remembers, runtime="another") as store:
        records = {record.task_seq: record.model_dump(mode="json") for record in await store.list()}
        steps = [step.model_dump(mode="json") for seq in sorted(records) for step in await store.steps(seq)]

    assert {(step["kind"], step["state"]) for step in steps} == {
        ("checkpoint", "done"),
        ("transact", "done"),
        ("sleep", "done"),
        *(("step", state) for state in ("begun", "retrying", "done", "failed")),
    }
    for step in before["steps"]:
        step["value"] = json.loads(step["value"])
        if step["failure"] is not None:
            step["failure"] = json.loads(step["failure"])
            # the class to raise again is no part of the record
            assert step["failure"].pop("again")
    # of each task in the order they were first noted
    assert steps == sorted(before["steps"], key=lambda step: step["task_seq"])
    added = ("version", "timeout", "deadline", "not_before", "last_error", "waiting_for")
    for task in before["tasks"]:
        task["last_error"] = task["last_error"] and json.loads(task["last_error"])
        record = records[task["task_seq"]]
        assert {name: record[name] for name in added} == {name: task[name] for name in added}
    assert [{task[name] is None for task in before["tasks"]} for name in added] == [{True, False}] * len(added)


async def test_a_recovery_after_the_upgrade_tells_what_was_in_flight_and_what_it_may_not_run(remembers: Path) -> None:
    async with asyncio.timeout(20), working(remembers, []) as store:
        found = store.recovered

    assert sorted(step.name for step in found.in_flight) == ["charge", "slow"]
    assert (found.unknown_functions, found.unknown_versions) == (("dated", "elsewhere"), ("dated@1",))
    [late] = found.failed
    assert late.failure is not None
    assert (late.id, late.failure.type) == ("late", "Timeout")
    assert late.deadline is not None
    assert late.deadline < datetime.now(UTC)


async def test_steps_done_before_the_upgrade_are_not_run_again_after_it(remembers: Path) -> None:
    # as it is once the next try is due
    set_back(
        remembers, "UPDATE steps SET wake_at = '2024-05-01T10:00:00.000Z' WHERE name = 'call' AND state = 'retrying'"
    )
    begun: list[Any] = []

    async with asyncio.timeout(20), working(remembers, begun) as store:
        task = await store.handle("desktop:s8", "trying")

        # what was begun runs again, but for what may run at most once
        assert await task == ["fetched", "ValueError('a torn page')", "call", "slow", "trying"]
        steps = {step.name: (step.state, step.tries, step.attempt) for step in await task.steps()}

    assert sorted(did for did in begun if isinstance(did, str)) == ["call", "slow"]
    assert steps == {
        "fetch": ("done", 1, 1),
        "break": ("failed", 1, 1),
        "call": ("done", 2, 2),
        "slow": ("done", 1, 2),
        "charge": ("begun", 0, 1),
    }
    check_file(remembers)


async def test_a_step_that_was_to_be_tried_again_waits_for_its_time_after_the_upgrade(remembers: Path) -> None:
    [before] = rows(remembers, "SELECT * FROM steps WHERE state = 'retrying'")
    begun: list[Any] = []

    async with asyncio.timeout(20), working(remembers, begun) as store:
        async for event in (await store.handle("desktop:s8", "trying")).events():
            if event.data.get("step") == "slow" and event.data["step_state"] == "done":
                break

    assert "call" not in begun
    assert rows(remembers, "SELECT * FROM steps WHERE state = 'retrying'") == [before]


async def test_a_body_goes_on_after_the_upgrade_behind_its_checkpoint_with_what_it_did_in_the_file(
    remembers: Path,
) -> None:
    own = rows(remembers, "SELECT * FROM own")
    assert {"name": "recalling"} in own

    async with asyncio.timeout(20), working(remembers, []) as store:
        task = await store.handle("desktop:s8", "recalling")
        # that key was used
        again = await task.signal("first", {"n": [1]}, key="one")
        await task.signal("second", "at last")

        assert await task == ["fetched", "recalling", {"n": [1]}, "at last"]
        assert again.verdict is Verdict.UNCHANGED
        assert (await task.record()).version == "3"

    assert rows(remembers, "SELECT * FROM own") == own
    check_file(remembers)


async def test_signals_not_taken_before_the_upgrade_are_received_after_it(remembers: Path) -> None:
    async with asyncio.timeout(20), working(remembers, []) as store:
        task = await store.handle("desktop:s8", "receiving")
        await task.signal("go", "page 3")

        assert await task == ["in a step", {"to": "page 2"}, "page 3"]

    signals = contents(remembers)["signals"]
    assert [(row["name"], row["taken_attempt"]) for row in signals if row["task_seq"] == task.task_seq] == [
        ("asked", 1),
        ("go", 2),
        ("stop", None),
        ("go", 2),
    ]
    check_file(remembers)


@pytest.mark.parametrize(
    ("name", "sleep", "result"), [("dozing", "#1.2", "awake from napped"), ("hibernating", "winter", "it is spring")]
)
async def test_a_sleep_begun_before_the_upgrade_lasts_only_what_is_left_of_it(
    remembers: Path, name: str, sleep: str, result: str
) -> None:
    [task] = [task for task in contents(remembers)["tasks"] if task["id"] == name]
    wake_at = transaction.utc_text(time.time() + 1.0)
    set_back(
        remembers, "UPDATE steps SET wake_at = ? WHERE task_seq = ? AND name = ?", wake_at, task["task_seq"], sleep
    )

    async with asyncio.timeout(20), working(remembers, []) as store:
        assert await (await store.handle("desktop:s8", name)) == result

    [after] = rows(remembers, "SELECT * FROM tasks WHERE task_seq = ?", task["task_seq"])
    assert after["completed_at"] >= wake_at
    check_file(remembers)


async def test_a_sleep_that_is_not_over_goes_on_after_the_upgrade(remembers: Path) -> None:
    sleeping = "SELECT s.* FROM steps AS s JOIN tasks AS t USING (task_seq) WHERE t.id = 'hibernating'"
    [before] = rows(remembers, sleeping)

    async with asyncio.timeout(20), working(remembers, []) as store:
        task = await store.handle("desktop:s8", "hibernating")
        record = await task.wait(timeout=0.3)

    assert (record.state, record.attempt) == (TaskState.RUNNING, 3)
    assert rows(remembers, sleeping) == [before]


async def test_a_retry_that_is_not_due_waits_for_its_time_after_the_upgrade(remembers: Path) -> None:
    [before] = [task for task in contents(remembers)["tasks"] if task["id"] == "put-off"]
    begun: list[Any] = []

    async with asyncio.timeout(20), working(remembers, begun) as store:
        await next_event(store, EventType.CLAIMED, task_id="put-off", after=COUNTS["0003"]["events"])
        await (await store.handle("desktop:s8", "put-off")).wait(timeout=0.3)
        [after] = [task for task in contents(remembers)["tasks"] if task["id"] == "put-off"]

    assert "put-off" not in {did[0] for did in begun}
    names = ("state", "attempt", "attempts_spent", "not_before", "last_error", "deadline")
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert after["not_before"] > transaction.utc_text(time.time())


async def test_a_retry_that_is_due_is_begun_after_the_upgrade_with_what_was_done(remembers: Path) -> None:
    set_back(remembers, "UPDATE tasks SET not_before = '2024-05-01T10:00:00.000Z' WHERE id = 'put-off'")

    async with asyncio.timeout(20), working(remembers, []) as store:
        task = await store.handle("desktop:s8", "put-off")
        assert await task == ["fetched", 2]
        record = await task.record()

    assert record.last_error is not None
    assert (record.not_before, record.last_error.message) == (None, "the line is dead")


async def test_children_of_a_body_are_given_to_it_again_after_the_upgrade(remembers: Path) -> None:
    before = contents(remembers)["tasks"]
    [parent] = [task["task_seq"] for task in before if task["id"] == "begetting"]
    live = [task["task_seq"] for task in before if task["parent_seq"] == parent and task["completed_at"] is None]

    async with asyncio.timeout(20), working(remembers, []) as store:
        assert await (await store.handle("desktop:s8", "begetting")) == [1, 2, *live]

    assert len(contents(remembers)["tasks"]) == len(before)
    check_file(remembers)


async def test_the_outcomes_of_bodies_that_remembered_are_handed_out_after_the_upgrade(remembers: Path) -> None:
    async with asyncio.timeout(20), working(remembers, []) as store:
        session = await store.session("s8")
        told = {
            name: await (await session.handle(name))
            for name in ("recalled", "tried", "received", "rested", "approved", "retried", "begot")
        }
        failed = {}
        for name in ("torn", "tired", "timed-out", "overdue", "in-doubt"):
            with pytest.raises(TaskFailed) as caught:
                await (await session.handle(name))
            failed[name] = caught.value.failure.type
        with pytest.raises(TaskCancelled, match="it is spring"):
            await (await session.handle("woken"))
        with pytest.raises(TaskAbandoned):
            await (await session.handle("bound-charge"))

    assert told == {
        "recalled": ["fetched", "recalled", [1, 2.5, None, "spät"], None],
        "tried": ["fetched", "a torn page", "called"],
        "received": ["asked", "go", "go"],
        "rested": "awake",
        "approved": "approved",
        "retried": "fetched",
        "begot": [1, 2],
    }
    assert failed == {
        "torn": "ValueError",
        "tired": "ConnectionError",
        "timed-out": "Timeout",
        "overdue": "Timeout",
        "in-doubt": "StepInDoubt",
    }


# --- up, with monitors ----------------------------------------------------------------------------------------------


async def test_what_monitors_wrote_is_handed_out_after_the_upgrade_but_for_what_was_read(watches: Path) -> None:
    kept = rows(watches, "SELECT text, acknowledged_at FROM updates ORDER BY update_seq")
    unread = [row["text"] for row in kept if row["acknowledged_at"] is None]
    assert (len(unread), len(kept)) == (15, 19)
    migrate.upgrade(watches)

    async with asyncio.timeout(20), TaskStore.connect(watches, runtime="desktop") as store:
        session = await store.session("s9")
        # who had two of them when it was killed was never done with them
        async with session.take_updates() as updates:
            assert [one.text for one in updates] == unread
        assert await session.updates() == []


async def test_monitors_are_shown_after_the_upgrade_as_they_were_left(watches: Path) -> None:
    migrate.upgrade(watches)

    async with TaskStore.connect(watches, runtime="desktop") as store:
        found = {one.id: one for one in await (await store.session("s9")).monitors()}

    assert {
        id: (str(one.state), one.lines, one.dropped, one.unread, one.exit_status, one.armed)
        for id, one in found.items()
    } == {
        "checks": ("completed", 3, 0, 0, 0, False),
        "lint": ("failed", 1, 0, 1, 3, False),
        "chatty": ("completed", 10, 7, 3, 0, False),
        "watch": ("cancelled", 2, 0, 1, -9, False),
        "slow": ("failed", 0, 0, 0, -9, False),
        "again": ("failed", 1, 0, 1, 1, False),
        "armed": ("completed", 1, 0, 1, 0, True),
        "disarmed": ("completed", 0, 0, 0, 0, False),
        "bound": ("abandoned", 1, 0, 1, None, False),
        "restored": ("running", 2, 0, 2, None, False),
        "tail": ("running", 2, 0, 2, None, False),
        "follow": ("running", 1, 0, 1, None, False),
    }
    assert (found["lint"].spec.label, found["follow"].spec.timeout, found["chatty"].spec.keep_lines) == (
        "the linter",
        3600.0,
        3,
    )


def test_the_view_of_live_monitors_shows_those_of_an_upgraded_file(watches: Path) -> None:
    migrate.upgrade(watches)

    shown = rows(watches, "SELECT monitor_id, process, unread_lines, owner_pid FROM live_monitors")
    assert [tuple(row.values()) for row in shown] == [
        ("restored", 6001, 2, 4002),
        ("tail", 6003, 2, 4002),
        ("follow", 6004, 1, 4002),
    ]


async def test_an_armed_monitor_is_started_with_its_session_after_the_upgrade_and_its_lines_go_on(
    watches: Path,
) -> None:
    async with asyncio.timeout(20), working(watches, []) as store:
        session = await store.session("s9")
        ended = await (await session.handle("monitor:armed")).wait()
        notes = {note.task_id: note.text for note in await session.notes()}
        incarnations = [task for task in await store.list() if task.id == "monitor:armed"]

    assert (str(ended.state), len(incarnations)) == ("completed", 3)
    assert notes["monitor:tail"].startswith("monitor 'tail' wrote 2 lines, and was abandoned")
    assert notes["monitor:again"] == "monitor 'again' wrote 1 line, and failed: exit status 1"
    check_file(watches)


def test_a_downgrade_loses_monitors_and_their_lines_and_keeps_their_tasks(watches: Path, tmp_path: Path) -> None:
    older = copy_of("0003", tmp_path / "older")
    like, was = contents(older), objects(older)
    before = contents(watches, like)

    migrate.downgrade(watches, "0003")

    assert contents(watches, like) == before
    assert objects(watches) == was
    migrate.upgrade(watches)
    assert contents(watches, like) == before
    after = contents(watches)
    assert (after["monitors"], after["updates"]) == ([], [])


# --- what was pruned ------------------------------------------------------------------------------------------------


async def test_finished_tasks_of_an_old_file_are_pruned_after_the_upgrade(older: Path, before_us: str) -> None:
    async with asyncio.timeout(20), TaskStore(older, runtime="another") as store:
        finished = rows(older, "SELECT task_seq FROM tasks WHERE completed_at IS NOT NULL")
        assert (await store.prune(older_than=timedelta(days=36_500), unread=True)).tasks == 0
        assert (await store.prune(unread=True, dry_run=True)).tasks == (report := await store.prune(unread=True)).tasks

        assert report.tasks + report.needed == report.seen == len(finished)
        assert 0 < report.tasks == len(contents(older)["tombstones"])
    assert rows(older, "PRAGMA foreign_key_check") == []
    check_file(older)


async def test_a_downgrade_loses_what_was_left_of_pruned_tasks_and_nothing_else(tmp_path: Path, watches: Path) -> None:
    older = copy_of("0004", tmp_path / "older")
    like, was = contents(older), objects_of_ours(older)
    async with asyncio.timeout(20), TaskStore(watches, runtime="another") as store:
        await store.prune(unread=True)
        with pytest.raises(TaskPruned):
            await store.get("desktop:s1", "keyed")
    before = contents(watches, like)

    migrate.downgrade(watches, "0004")

    assert contents(watches, like) == before
    assert objects_of_ours(watches) == was
    check_file(watches)
    async with asyncio.timeout(20), TaskStore(watches, runtime="desktop") as store:
        with pytest.raises(TaskNotFound):
            await store.get("desktop:s1", "keyed")
        # nor does anything tell of a gap
        assert (await anext(store.events(0))).type is not EventType.PRUNED
        task = await (await store.session("s1")).spawn(asyncio.sleep(0), id="again", idempotency_key="key of keyed")
        assert (await task.record()).id == "again"


# --- who does not upgrade -------------------------------------------------------------------------------------------

UNWILLING: dict[str, Callable[[Path], TaskStore]] = {
    "open_readonly": TaskStore.open_readonly,
    "connect": lambda path: TaskStore.connect(path, runtime="desktop"),
}


@pytest.mark.parametrize("make", UNWILLING.values(), ids=UNWILLING.keys())
async def test_a_store_that_does_not_own_refuses_an_old_file_and_says_what_to_do(
    older: Path, before_us: str, make: Callable[[Path], TaskStore]
) -> None:
    told = f"revision {before_us}, this lash_store knows {schema.HEAD}: open it once with TaskStore"

    with pytest.raises(SchemaTooOld, match=told):
        await make(older).open()


@pytest.mark.parametrize("log", [False, True], ids=["the file", "the file and its log"])
@pytest.mark.parametrize("make", UNWILLING.values(), ids=UNWILLING.keys())
async def test_a_store_that_does_not_own_changes_no_byte_of_an_old_file(
    older: Path, make: Callable[[Path], TaskStore], log: bool
) -> None:
    path = left_with_a_log(older) if log else older
    before = bytes_of(path)
    assert len(before) == 1 + log

    with pytest.raises(SchemaTooOld):
        await make(path).open()

    assert bytes_of(path) == before


async def test_what_refused_an_old_file_opens_it_once_it_was_upgraded(old: Path) -> None:
    migrate.upgrade(old)

    async with TaskStore.open_readonly(old) as reader:
        assert len(await reader.list()) == 8


async def test_an_owner_that_finds_the_file_old_after_all_is_not_written_into_it(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # somebody took the file back between this store's upgrade and its owner row
    monkeypatch.setattr(migrate, "prepare", lambda path, *_, **__: None)
    before = contents(old)

    with pytest.raises(SchemaTooOld):
        await TaskStore(old, runtime="desktop").open()

    assert contents(old) == before


# --- beside a live owner --------------------------------------------------------------------------------------------

HOLDS_A_LOCK = """
    import fcntl, sys

    with open(sys.argv[1], "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
"""


def bring_to_life(path: Path, owner_id: int, spawn: Any) -> Any:
    """Hold the lock of an owner in a process of its own, as the owner itself would."""
    [owner] = rows(path, "SELECT token FROM owners WHERE owner_id = ?", owner_id)
    folder = guards.make_side_folder(path)
    process = spawn(HOLDS_A_LOCK, folder / f"{owner['token']}.lock")
    assert process.stdout.readline() == "held\n"
    return process


async def test_an_upgrade_is_refused_beside_a_live_owner_and_changes_nothing(older: Path, spawn: Any) -> None:
    bring_to_life(older, 2, spawn)
    before = bytes_of(older)

    with pytest.raises(SchemaError, match=r"open in process 4002: close it there first"):
        await TaskStore(older, runtime="another").open()

    assert bytes_of(older) == before


async def test_an_upgrade_is_refused_beside_an_owner_whose_lock_file_is_gone_but_whose_process_lives(old: Path) -> None:
    parent = os.getppid()
    another = {**owners.describe_process(), "pid": parent, "process_start": processes.started(parent) or ""}
    with closing(sqlite3.connect(old)) as connection, connection:
        changed = "pid = :pid, process_start = :process_start, boot_id = :boot_id, host = :host"
        connection.execute(f"UPDATE owners SET {changed} WHERE owner_id = 2", another)
    before = bytes_of(old)

    with pytest.raises(SchemaError, match=f"open in process {parent}"):
        await TaskStore(old, runtime="another").open()

    assert bytes_of(old) == before


async def test_an_upgrade_is_done_once_the_owner_is_killed(old: Path, spawn: Any) -> None:
    owner = bring_to_life(old, 2, spawn)
    with pytest.raises(SchemaError):
        await TaskStore(old, runtime="desktop").open()

    owner.kill()
    owner.wait(timeout=20)
    async with TaskStore(old, runtime="desktop"):
        pass

    assert migrate.current(old) == schema.HEAD


async def test_an_upgrade_that_another_owner_finished_meanwhile_is_no_conflict_with_it(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with TaskStore(old, runtime="desktop"):
        # this one looked at the file before the other had upgraded it
        monkeypatch.setattr(database, "probe", lambda path: "0001")
        async with TaskStore(old, runtime="desktop") as second:
            assert len(await second.list()) == 8


OPENS = """
    import asyncio, sys
    from lash_store import TaskStore
    import alembic.command, sqlalchemy

    async def main():
        print("ready", flush=True)
        sys.stdin.readline()
        async with TaskStore(sys.argv[1], runtime="desktop") as store:
            print(len(await store.list()), flush=True)
            await asyncio.to_thread(sys.stdin.readline)

    asyncio.run(main())
"""


@pytest.mark.long
def test_several_processes_may_open_the_same_old_file_at_once(old: Path, spawn: Any) -> None:
    processes = [spawn(OPENS, old) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"

    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    opened = [process.stdout.readline() for process in processes]
    ended = [process.communicate("close\n", timeout=60)[1] for process in processes]

    assert (opened, ended) == (["8\n"] * 4, [""] * 4)
    check_file(old)


# --- killed, or out of room, in the middle --------------------------------------------------------------------------

DIES_IN_THE_MIDDLE = """
    import os, signal, sys
    from pathlib import Path
    from alembic.operations import Operations
    from lash_store import migrate, revisions

    path, action, beginning, when = sys.argv[1:]
    # what every revision has in it is found out in memory, where nobody is to be killed
    revisions.shapes()
    execute = Operations.execute

    def replaced(self, sql, **options):
        if when == "after":
            execute(self, sql, **options)
        if str(sql).startswith(beginning):
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            execute(self, sql, **options)

    Operations.execute = replaced
    if action == "up":
        migrate.prepare(Path(path))
    else:
        migrate.downgrade(Path(path), action)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("revision", "beginning", "when"),
    [
        pytest.param("0001", "DROP VIEW live_tasks", "after", marks=pytest.mark.slow),
        pytest.param("0001", "CREATE TABLE inbox", "before", marks=pytest.mark.slow),
        pytest.param("0001", "CREATE VIEW session_summary", "after", marks=pytest.mark.slow),
        # two revisions are one transaction
        ("0001", "CREATE TABLE signals", "after"),
        ("0002", "ALTER TABLE tasks ADD COLUMN waiting_for", "after"),
        pytest.param("0002", "CREATE INDEX signals_untaken", "before", marks=pytest.mark.slow),
        pytest.param("0002", "CREATE VIEW live_tasks", "after", marks=pytest.mark.slow),
        ("0003", "CREATE TABLE updates", "after"),
        ("0004", "CREATE TABLE tombstones", "after"),
        ("0004", "CREATE VIEW live_monitors", "before"),
    ],
)
def test_a_process_killed_in_the_middle_of_an_upgrade_leaves_the_old_file_row_by_row(
    tmp_path: Path, spawn: Any, revision: str, beginning: str, when: str
) -> None:
    old = copy_of(revision, tmp_path)
    before, was = contents(old), objects(old)

    killed = spawn(DIES_IN_THE_MIDDLE, old, "up", beginning, when)
    assert killed.wait(timeout=30) == -signal.SIGKILL

    assert (objects(old), contents(old), migrate.current(old)) == (was, before, revision)
    migrate.prepare(old)
    assert contents(old, before) == before
    check_file(old)


@pytest.mark.long
@pytest.mark.parametrize(
    ("revision", "beginning"),
    [
        ("0001", "DROP TABLE inbox"),
        ("0002", "ALTER TABLE steps DROP COLUMN state"),
        ("0002", "ALTER TABLE tasks DROP COLUMN version"),
        ("0004", "DROP TABLE tombstones"),
    ],
)
def test_a_process_killed_in_the_middle_of_a_downgrade_leaves_the_newer_file_row_by_row(
    tmp_path: Path, spawn: Any, revision: str, beginning: str
) -> None:
    old = copy_of(revision, tmp_path)
    migrate.upgrade(old)
    before, was = contents(old), objects(old)

    killed = spawn(DIES_IN_THE_MIDDLE, old, revision, beginning, "after")
    assert killed.wait(timeout=30) == -signal.SIGKILL

    assert (objects(old), contents(old), migrate.current(old)) == (was, before, schema.HEAD)
    check_file(old)


@pytest.mark.parametrize(
    ("revision", "table"), [("0001", "handoffs"), ("0001", "signals"), ("0002", "signals"), ("0004", "tombstones")]
)
def test_a_disk_that_is_full_in_an_upgrade_leaves_the_old_file_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str, table: str
) -> None:
    old = copy_of(revision, tmp_path)
    before, was = contents(old), objects(old)
    revisions_in_memory.shapes()
    execute = Operations.execute

    def without_room(self: Operations, sql: Any, **options: Any) -> None:
        if str(sql).startswith(f"CREATE TABLE {table}"):
            execute(self, "PRAGMA max_page_count=1")
        execute(self, sql, **options)

    monkeypatch.setattr(Operations, "execute", without_room)
    with pytest.raises(StorageFull):
        migrate.upgrade(old)

    assert (objects(old), contents(old), migrate.current(old)) == (was, before, revision)
    # room is what it lacks: no copy of what was not changed stays beside it
    assert not list(old.parent.glob("*backup*"))


# --- down, and up again ---------------------------------------------------------------------------------------------


def test_a_downgrade_gives_the_old_schema_exactly_and_keeps_every_row(older: Path, before_us: str) -> None:
    before, was = contents(older), objects(older)
    migrate.upgrade(older)

    migrate.downgrade(older, before_us)

    assert objects(older) == was
    assert contents(older) == before
    assert migrate.current(older) == before_us


def test_a_file_that_went_down_goes_up_again(older: Path, before_us: str) -> None:
    before = contents(older)
    migrate.upgrade(older)
    head = objects(older)
    migrate.downgrade(older, before_us)

    migrate.upgrade(older)

    assert (objects(older), migrate.current(older)) == (head, schema.HEAD)
    assert contents(older, before) == before
    check_file(older)


async def use_everything_new(path: Path) -> None:
    """Leave work in the file that revision 0001 knows nothing of."""
    async with asyncio.timeout(20), working(path, []) as store:
        first, second = await store.session("s1"), await store.session("s2", parent="s1")
        await store.session("s9")
        agent = await first.spawn(wait_here, id="agent", kind=TaskKind.SUBAGENT, child_session_id="s9")
        await first.spawn(wait_here, id="child", parent=agent, idempotency_key="k", close_policy=ClosePolicy.TRANSFER)
        await first.spawn_hidden("hidden", wait_here)
        await first.register("build", TaskKind.OTHER, cancel=lambda: None)
        noisy = await first.spawn(wait_here, id="noisy", notify_on_end=True)
        await noisy.cancel("enough")
        await second.observe(first.scope, "agent")
        await first.spawn(wait_here, id="moved")
        await first.handoff(second, ["moved", "agent", "build"], id="ho")


@pytest.fixture
async def full(tmp_path: Path) -> Path:
    """A file of the newest revision in which everything new was used, closed."""
    path = tmp_path / "full.db"
    await use_everything_new(path)
    check_file(path)
    return path


def test_a_downgrade_keeps_the_tasks_the_older_revision_could_not_have_made(full: Path, old: Path) -> None:
    like, was = contents(old), objects(old)
    before = contents(full, like)

    migrate.downgrade(full, "0001")

    assert {task["id"].partition("-")[0]: task["mode"] for task in before["tasks"]} == {
        "agent": "managed",
        "child": "managed",
        "hidden": "hidden",
        "build": "external",
        "noisy": "managed",
        "moved": "managed",
    }
    assert contents(full, like) == before
    assert objects(full) == was


async def test_work_that_went_down_and_up_again_goes_on(full: Path) -> None:
    migrate.downgrade(full, "0001")

    async with asyncio.timeout(20), working(full, []) as store:
        events = store.events(0, types=[EventType.REATTACHED])
        reattached = {(await anext(events)).task_id.partition("-")[0] for _ in range(4)}  # type: ignore[union-attr]

    assert reattached == {"agent", "child", "hidden", "moved"}
    assert migrate.current(full) == schema.HEAD


# --- what bodies remember -------------------------------------------------------------------------------------------


class Remembering:
    """A store whose bodies remember in every way there is, and what they did since it was made."""

    def __init__(self, path: Path, runtime: str = "desktop") -> None:
        self.store = store = TaskStore(path, runtime=runtime, cancel_grace=0.0)
        self.done: list[str] = []
        self.has_saved = asyncio.Event()

        def fetch() -> str:
            self.done.append("fetch")
            return "fetched"

        def note(connection: TransactConnection) -> str:
            connection.execute("CREATE TABLE IF NOT EXISTS own (name TEXT)")
            connection.execute("INSERT INTO own VALUES ('noted')")
            return "noted"

        @store.task(recovery=Recovery.RERUN, version="2", accepts=["1", None], timeout=3600.0)
        async def remembers(task: TaskContext) -> list[Any]:
            begins = task.checkpoint
            told = [await task.step("fetch", fetch), await task.transact("note", note)]
            await task.sleep(0.001, name="nap")
            told.append(await task.signal("first"))
            await task.save({"page": 2})
            self.has_saved.set()
            return [begins, *told, await task.signal("second")]

        @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, backoff=Backoff(initial=3600, maximum=3600))
        async def flaky(task: TaskContext) -> str:
            if task.attempt == 1:
                raise ConnectionError("the line is dead")
            return "it works"

        @store.task(recovery=Recovery.RERUN)
        async def fails(task: TaskContext) -> None:
            await task.step("break", lambda: 1 / 0)

        self.remembers, self.flaky, self.fails = remembers, flaky, fails


@pytest.fixture
async def remembered(tmp_path: Path) -> Path:
    """A file of the newest revision, closed, in which one body waits for a signal, one for its retry, and one has failed."""
    path = tmp_path / "agent.db"
    ours = Remembering(path)
    async with asyncio.timeout(20), ours.store as store:
        session = await store.session("s1")
        task = await session.spawn(ours.remembers, id="remembers", deadline=datetime.now(UTC) + timedelta(days=1))
        await task.signal("first", [1, 2], key="k")
        await task.signal("third")
        await ours.has_saved.wait()
        await session.spawn(ours.flaky, id="flaky")
        await next_event(store, EventType.RETRY_SCHEDULED, task_id="flaky")
        with pytest.raises(TaskFailed):
            await (await session.spawn(ours.fails, id="fails"))
    check_file(path)
    return path


async def test_an_upgraded_file_takes_steps_sleeps_signals_and_retries(older: Path) -> None:
    ours = Remembering(older, runtime="another")
    async with asyncio.timeout(20), ours.store as store:
        session = await store.session("s1")
        task = await session.spawn(ours.remembers, deadline=3600)
        for name in ("first", "second"):
            await task.signal(name, name)
        flaky = await session.spawn(ours.flaky, id="flaky")
        await next_event(store, EventType.RETRY_SCHEDULED, task_id="flaky")

        assert await task == [None, "fetched", "noted", "first", "second"]
        assert {step.name for step in await task.steps()} == {"fetch", "note", "nap", ""}
        assert (await flaky.record()).not_before is not None
    check_file(older)


def test_a_downgrade_loses_steps_sleeps_and_signals_and_keeps_tasks_and_checkpoints(
    remembered: Path, tmp_path: Path
) -> None:
    older = copy_of("0002", tmp_path / "older")
    like, was = contents(older), objects(older)
    before, full = contents(remembered, like), contents(remembered)
    assert {(step["kind"], step["name"]) for step in before["steps"]} == {
        ("checkpoint", ""),
        ("step", "fetch"),
        ("transact", "note"),
        ("sleep", "nap"),
        ("step", "break"),
    }
    assert [signal["name"] for signal in full["signals"]] == ["first", "third"]
    assert {task["not_before"] is None for task in full["tasks"]} == {True, False}

    migrate.downgrade(remembered, "0002")

    after = contents(remembered, like)
    [checkpoint] = after.pop("steps")
    assert checkpoint in before.pop("steps")
    assert checkpoint["value"] == '{"page":2}'
    assert after == before
    assert rows(remembered, "SELECT * FROM own") == [{"name": "noted"}]
    assert objects_of_ours(remembered) == was


@pytest.mark.parametrize("revision", ["0002", "0001"])
async def test_what_bodies_remembered_is_done_again_from_the_checkpoint_once_a_file_went_down_and_up(
    remembered: Path, revision: str
) -> None:
    migrate.downgrade(remembered, revision)

    ours = Remembering(remembered)
    async with asyncio.timeout(20), ours.store as store:
        session = await store.session("s1")
        # when its retry was due is lost as well
        assert await (await session.handle("flaky")) == "it works"
        task = await session.handle("remembers")
        await task.signal("first", "sent again", key="k")
        await task.signal("second")

        assert await task == [{"page": 2}, "fetched", "noted", "sent again", None]
        with pytest.raises(TaskFailed, match="division by zero"):
            await (await session.handle("fails"))
    assert ours.done == ["fetch"]
    assert rows(remembered, "SELECT count(*) AS n FROM own") == [{"n": 2}]
    # its events still tell of a deadline and a last error that its row has lost, so this is no `check_file`
    assert rows(remembered, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
