"""Rules of the writer alone: many units a commit, what an error costs, and what is told to whom when."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lash_store import commit, guards, queries, session_queries, writer
from lash_store.database import open_sqlite
from lash_store.errors import (
    CommitInDoubt,
    StorageBusy,
    StorageError,
    StorageFull,
    StorageMoved,
    StoreClosed,
)
from lash_store.models import EventType, Scope
from lash_store.reader import Reader
from lash_store.transaction import Committed, Transaction
from lash_store.writer import Writer

Shell = Callable[..., str]


# --- a harness ------------------------------------------------------------------------------------------------------


class Watched(sqlite3.Connection):
    """A connection that says what it runs, and lets a test step in; `sqlite3` makes them while one is watched."""

    watch: Watch

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:  # type: ignore[override]
        self.watch.log.append((self, sql, self.in_transaction))
        step_in = self.watch.step_in
        if step_in is not None:
            step_in(self, sql)
        return super().execute(sql, *parameters)


class Watch:
    """What the connections opened since have run: connection, statement, and whether a transaction was open before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Watched, str, bool]] = []
        self.opened: list[Watched] = []
        self.step_in: Callable[[Watched, str], None] | None = None
        self.refuse: sqlite3.Error | None = None
        connect = sqlite3.connect

        def watched(*arguments: Any, **options: Any) -> sqlite3.Connection:
            if self.refuse is not None:
                raise self.refuse
            connection = connect(*arguments, **{"factory": Watched, **options})
            assert isinstance(connection, Watched)
            connection.watch = self
            self.opened.append(connection)
            return connection

        monkeypatch.setattr(sqlite3, "connect", watched)

    def count(self, sql: str) -> int:
        return sum(run == sql for _, run, _ in self.log)


@pytest.fixture
def watch(path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


class Harness:
    """A writer on a file, and what it told."""

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self.committed: list[Committed] = []
        self.fatal: list[StorageError] = []
        self.react: Callable[[Sequence[Committed]], None] = lambda events: None
        self.writer = Writer(
            path, durability="full", patience=patience, on_commit=self._on_commit, on_fatal=self.fatal.append
        )

    def _on_commit(self, events: Sequence[Committed]) -> None:
        self.committed += events
        self.react(events)

    @property
    def told(self) -> list[str]:
        return [event.scope for event in self.committed]

    async def on_connection(self, sql: str) -> list[Any]:
        """Run one statement on the writer's own connection, between its batches."""
        connection = self.writer._connection
        assert connection is not None
        return await connection.run(lambda raw: raw.execute(sql).fetchall())


@asynccontextmanager
async def opened(path: Path, patience: float = 10.0) -> AsyncIterator[Harness]:
    harness = Harness(path, patience)
    await harness.writer.open()
    try:
        yield harness
    finally:
        await harness.writer.close()


def note(name: str) -> Callable[[Transaction], str]:
    """A unit that writes one event of its name."""

    def unit(tx: Transaction) -> str:
        queries.insert_event(tx, EventType.SESSION_OPENED, scope=name)
        return name

    return unit


def notes(path: Path) -> list[str]:
    """Return the names of the events in the file, as somebody else sees them."""
    with closing(open_sqlite(path, "read")) as connection:
        return [name for (name,) in connection.execute("SELECT scope FROM events ORDER BY seq")]


def wal_of(path: Path) -> os.stat_result:
    return Path(f"{path}-wal").stat()


def descriptors() -> set[str]:
    """Return what this process has open."""
    return {found.name for found in Path("/proc/self/fd").iterdir()}


async def outcomes(*futures: asyncio.Future[Any]) -> list[Any]:
    """Wait for all; an error as its type."""
    found = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)
    return [type(result) if isinstance(result, BaseException) else result for result in found]


def driver_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("the test says so")
    error.sqlite_errorcode = code
    return error


# --- many units a commit --------------------------------------------------------------------------------------------


async def test_waiting_units_are_committed_together_and_in_order(path: Path) -> None:
    names = [f"n{number}" for number in range(100)]
    async with opened(path) as harness:
        commits: list[str] = []
        await harness.writer._connection.run(lambda raw: raw.set_trace_callback(commits.append))  # type: ignore[union-attr]

        results = await outcomes(*[harness.writer.submit(note(name)) for name in names])

        assert (commits.count("BEGIN IMMEDIATE"), commits.count("COMMIT")) == (1, 1)
    assert results == names
    assert notes(path) == harness.told == names


async def test_units_that_come_one_by_one_are_committed_one_by_one(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        before = watch.count("COMMIT")
        for number in range(3):
            await harness.writer.run(note(f"n{number}"))

        assert watch.count("COMMIT") - before == 3


async def test_a_batch_is_bounded(path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MOST", 10)
    async with opened(path) as harness:
        await outcomes(*[harness.writer.submit(note(f"n{number:02}")) for number in range(25)])

    assert watch.count("COMMIT") == 3
    assert notes(path) == [f"n{number:02}" for number in range(25)]


async def test_a_units_error_undoes_its_own_work_and_no_others(path: Path, watch: Watch) -> None:
    def fails(tx: Transaction) -> None:
        note("undone")(tx)
        raise LookupError("no such thing")

    async with opened(path) as harness:
        results = await outcomes(*map(harness.writer.submit, [note("a"), fails, note("b")]))

    assert results == ["a", LookupError, "b"]
    assert notes(path) == harness.told == ["a", "b"]
    assert watch.count("COMMIT") == 1


async def test_of_several_units_that_fail_in_one_batch_no_row_is_left(path: Path) -> None:
    def fails(name: str) -> Callable[[Transaction], None]:
        def unit(tx: Transaction) -> None:
            # a row, not an event: those are written once all units have run
            tx.one(
                "INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES (?, 'desktop', ?, '')",
                [f"desktop:{name}", name],
            )
            raise LookupError(name)

        return unit

    async with opened(path) as harness:
        # the first is known to fail when the others are run again; the second fails in the midst of that
        units = [note("a"), fails("x"), note("b"), fails("y"), note("c")]
        results = await outcomes(*map(harness.writer.submit, units))

    assert results == ["a", LookupError, "b", LookupError, "c"]
    assert notes(path) == harness.told == ["a", "b", "c"]
    with closing(open_sqlite(path, "read")) as connection:
        assert connection.execute("SELECT scope FROM sessions").fetchall() == []


async def test_a_constraint_fails_its_own_unit_alone(path: Path) -> None:
    def breaks(tx: Transaction) -> None:
        note("undone")(tx)
        tx.one("INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES ('x', 'y', 'z', '')", {})

    async with opened(path) as harness:
        results = await outcomes(*map(harness.writer.submit, [note("a"), breaks, note("b")]))

    assert results == ["a", StorageError, "b"]
    assert notes(path) == harness.told == ["a", "b"]


async def test_the_time_of_a_transaction_is_one(path: Path) -> None:
    async with opened(path) as harness:
        await outcomes(*[harness.writer.submit(note(f"n{number}")) for number in range(50)])

    assert len({event.at for event in harness.committed}) == 1


# --- when it is told ------------------------------------------------------------------------------------------------


async def test_a_caller_is_answered_only_after_the_commit(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        future = harness.writer.submit(note("a"))
        answered_before: list[bool] = []

        def look(connection: Watched, sql: str) -> None:
            if sql == "COMMIT":
                answered_before.append(future.done())

        watch.step_in = look
        await future

        assert answered_before == [False]
        assert notes(path) == ["a"]


async def test_who_acts_on_commits_hears_of_them_before_the_caller_and_after_the_file(path: Path) -> None:
    async with opened(path) as harness:
        future = harness.writer.submit(note("a"))
        seen: list[tuple[bool, list[str]]] = []
        harness.react = lambda events: seen.append((future.done(), notes(path)))

        await future

    assert seen == [(False, ["a"])]


async def test_a_reaction_that_fails_costs_nobody_an_answer(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(events: Sequence[Committed]) -> None:
        raise RuntimeError("a bug in a subscriber")

    async with opened(path) as harness:
        harness.react = fails

        assert await outcomes(*map(harness.writer.submit, [note("a"), note("b")])) == ["a", "b"]
    assert "reaction_failed" in caplog.text


async def test_a_caller_cancelled_while_it_waits_changes_nothing(path: Path, watch: Watch) -> None:
    in_commit, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold(connection: Watched, sql: str) -> None:
        if sql == "COMMIT":
            loop.call_soon_threadsafe(in_commit.set)
            assert go_on.wait(10)

    async with opened(path) as harness:
        watch.step_in = hold
        waiting = asyncio.create_task(harness.writer.run(note("in the commit")))
        await in_commit.wait()
        queued = asyncio.create_task(harness.writer.run(note("in the queue")))
        await asyncio.sleep(0)
        for caller in (waiting, queued):
            caller.cancel()
        cancelled = await asyncio.gather(waiting, queued, return_exceptions=True)
        watch.step_in = None
        go_on.set()

        assert [type(error) for error in cancelled] == [asyncio.CancelledError] * 2
        assert await harness.writer.run(note("after")) == "after"

    assert notes(path) == harness.told == ["in the commit", "in the queue", "after"]


# --- errors that cost the whole transaction -------------------------------------------------------------------------


def no_statement_outside_a_transaction(watch: Watch) -> bool:
    writes = [was_open for _, sql, was_open in watch.log if sql.lstrip().startswith(("INSERT", "UPDATE", "DELETE"))]
    return bool(writes) and all(writes)


def fills(tx: Transaction) -> None:
    """A unit the disk has no room for; it has no other rows to write, so the loss is the whole transaction."""
    tx.one(
        "INSERT INTO events (scope, type, at, data) VALUES ('big', 'noted', :at, '\"' || :much || '\"')",
        {"at": tx.now, "much": "x" * 4_000_000},
    )


async def test_a_full_disk_fails_the_guilty_unit_alone_and_the_others_land(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        (pages,) = (await harness.on_connection("PRAGMA page_count"))[0]
        await harness.on_connection(f"PRAGMA max_page_count={pages + 40}")

        results = await outcomes(*map(harness.writer.submit, [note("a"), fills, note("b"), note("c")]))

        assert results == ["a", StorageFull, "b", "c"]
        assert notes(path) == harness.told == ["a", "b", "c"]
        assert no_statement_outside_a_transaction(watch)
        assert not harness.fatal


def interrupted(tx: Transaction) -> None:
    note("undone")(tx)
    tx.connection.set_progress_handler(lambda: 1, 1)
    try:
        tx.one(
            "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 1000) "
            "INSERT INTO events (scope, type, at, data) SELECT x, 'noted', :at, '{}' FROM n",
            {"at": tx.now},
        )
    finally:
        tx.connection.set_progress_handler(None, 0)


async def test_an_interrupt_fails_the_guilty_unit_alone_and_the_others_land(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        before = watch.count("COMMIT")

        results = await outcomes(*map(harness.writer.submit, [note("a"), interrupted, note("b")]))

        assert results == ["a", StorageError, "b"]
        assert notes(path) == harness.told == ["a", "b"]
        assert no_statement_outside_a_transaction(watch)
        # the whole was lost: each of the others had a transaction of its own
        assert watch.count("COMMIT") - before == 2


async def test_two_guilty_units_fail_and_the_others_land(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        units = [note("a"), interrupted, note("b"), interrupted, note("c")]

        results = await outcomes(*map(harness.writer.submit, units))

        assert results == ["a", StorageError, "b", StorageError, "c"]
        assert notes(path) == harness.told == ["a", "b", "c"]
        assert no_statement_outside_a_transaction(watch)


async def test_a_lost_transaction_tells_no_event_of_it(path: Path) -> None:
    async with opened(path) as harness:
        await outcomes(*map(harness.writer.submit, [note("a"), interrupted]))

        seqs = [event.seq for event in harness.committed]
        with closing(open_sqlite(path, "read")) as connection:
            assert [seq for (seq,) in connection.execute("SELECT seq FROM events")] == seqs


async def test_a_passing_disk_error_is_met_by_opening_again(path: Path, watch: Watch) -> None:
    failing = [driver_error(sqlite3.SQLITE_IOERR_READ)]

    def unit(tx: Transaction) -> str:
        note("before")(tx)
        if failing:
            raise failing.pop()
        return "read"

    async with opened(path) as harness:
        results = await outcomes(*map(harness.writer.submit, [note("a"), unit, note("b")]))

    assert results == ["a", "read", "b"]
    assert notes(path) == harness.told == ["a", "before", "b"]


async def test_a_lasting_disk_error_fails_its_unit_alone(path: Path) -> None:
    def unit(tx: Transaction) -> None:
        raise driver_error(sqlite3.SQLITE_IOERR_READ)

    async with opened(path) as harness:
        results = await outcomes(*map(harness.writer.submit, [note("a"), unit, note("b")]))

        assert results == ["a", StorageError, "b"]
        assert notes(path) == harness.told == ["a", "b"]


async def test_very_much_in_one_commit_is_told_in_order_and_others_have_their_turn_in_between(path: Path) -> None:
    def much(tx: Transaction) -> str:
        for number in range(1_000):
            note(f"n{number:04}")(tx)
        return "much"

    async with opened(path) as harness:
        seen: list[int] = []
        asked = harness.writer.submit(much)
        while not asked.done():
            await asyncio.sleep(0)
            seen.append(len(harness.committed))

        assert await asked == "much"
        assert harness.told == [f"n{number:04}" for number in range(1_000)]
    # never all of it in one turn, and all of it before the caller is answered
    assert len({count for count in seen if 0 < count < 1_000}) >= 2
    assert seen[-1] == 1_000


async def test_a_unit_that_fails_is_not_asked_again_and_its_neighbours_land_once(path: Path) -> None:
    calls: list[str] = []

    def fails(tx: Transaction) -> None:
        calls.append("fails")
        note("never")(tx)
        raise ValueError("no")

    async with opened(path) as harness:
        for _ in range(2):
            # the second time each has a savepoint of its own from the start
            results = await outcomes(*map(harness.writer.submit, [note("a"), fails, note("b")]))
            assert results == ["a", ValueError, "b"]
            assert notes(path) == harness.told == ["a", "b"] * (len(calls))

    assert calls == ["fails"] * 2


async def test_who_acts_on_a_commit_is_told_before_who_waits_and_though_nobody_does(path: Path) -> None:
    told: list[object] = []

    def fails(tx: Transaction) -> None:
        raise ValueError("no")

    async with opened(path) as harness:
        left = harness.writer.submit(note("left"), lambda result, error: told.append(result))
        left.cancel()
        kept = harness.writer.submit(note("kept"), lambda result, error: told.append((result, kept.done())))
        harness.writer.tell(note("alone"), lambda result, error: told.append(result))
        harness.writer.tell(fails, lambda result, error: told.append(type(error)))
        harness.writer.tell(note("broken"), lambda result, error: 1 / 0)
        assert await kept == "kept"

    assert told == ["left", ("kept", False), "alone", ValueError]
    assert notes(path) == ["left", "kept", "alone", "broken"]


# --- units that end the transaction ---------------------------------------------------------------------------------


def commits(tx: Transaction) -> None:
    note("smuggled")(tx)
    tx.connection.execute("COMMIT")


def rolls_back(tx: Transaction) -> None:
    tx.connection.execute("ROLLBACK")


def rolls_back_on_conflict(tx: Transaction) -> None:
    tx.connection.execute(
        "INSERT OR ROLLBACK INTO sessions (scope, runtime, session_id, opened_at) VALUES ('x', 'y', 'z', '')"
    )


def rolls_back_and_hides_it(tx: Transaction) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        rolls_back_on_conflict(tx)


ENDING = [commits, rolls_back, rolls_back_on_conflict, rolls_back_and_hides_it]


@pytest.mark.parametrize("ends", ENDING)
async def test_a_unit_that_ends_the_transaction_is_refused(path: Path, ends: Callable[[Transaction], None]) -> None:
    async with opened(path) as harness:
        [refused] = await outcomes(harness.writer.submit(ends))

        assert refused is StorageError
        assert await harness.writer.run(note("after")) == "after"
        assert notes(path)[-1] == "after"


@pytest.mark.parametrize("ends", ENDING)
async def test_the_neighbours_of_a_unit_that_ends_the_transaction_land_once(
    path: Path, watch: Watch, ends: Callable[[Transaction], None]
) -> None:
    async with opened(path) as harness:
        results = await outcomes(*map(harness.writer.submit, [note("a"), ends, note("b")]))

    assert results == ["a", StorageError, "b"]
    found = notes(path)
    assert (found.count("a"), found.count("b")) == (1, 1)
    assert no_statement_outside_a_transaction(watch)


# --- COMMIT itself fails --------------------------------------------------------------------------------------------


class FailingCommit:
    """Let the next COMMIT raise, with or without being run before."""

    def __init__(self, watch: Watch, *, took: bool, unreadable: bool = False) -> None:
        self.watch = watch
        self.took = took
        self.unreadable = unreadable
        self.failed = 0

    def __call__(self, connection: Watched, sql: str) -> None:
        if sql != "COMMIT" or self.failed:
            return
        self.failed += 1
        error = driver_error(sqlite3.SQLITE_IOERR_FSYNC)
        if self.took:
            sqlite3.Connection.execute(connection, "COMMIT")
        if self.unreadable:
            self.watch.refuse = driver_error(sqlite3.SQLITE_CANTOPEN)
        raise error


async def test_a_commit_that_raised_but_took_is_a_commit(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        watch.step_in = failing = FailingCommit(watch, took=True)

        results = await outcomes(*map(harness.writer.submit, [note("a"), note("b")]))

        assert failing.failed == 1
        assert results == ["a", "b"]
        assert harness.told == notes(path) == ["a", "b"]
        assert await harness.writer.run(note("after")) == "after"


async def test_a_commit_that_raised_and_did_not_take_fails_its_batch_and_the_writer_lives_on(
    path: Path, watch: Watch
) -> None:
    async with opened(path) as harness:
        watch.step_in = failing = FailingCommit(watch, took=False)

        results = await outcomes(*map(harness.writer.submit, [note("a"), note("b")]))

        assert failing.failed == 1
        assert results == [StorageError, StorageError]
        assert harness.told == notes(path) == []
        assert not harness.fatal
        assert await harness.writer.run(note("after")) == "after"
    assert notes(path) == ["after"]


async def test_a_commit_sqlite_itself_refuses_did_not_take(path: Path) -> None:
    def orphan(tx: Transaction) -> None:
        tx.one("PRAGMA defer_foreign_keys=ON", {})
        tx.one(
            "INSERT INTO events (task_seq, task_id, scope, type, at, data) VALUES (99, 'x', 'x', 'noted', :at, '{}')",
            {"at": tx.now},
        )
        note("beside")(tx)

    async with opened(path) as harness:
        assert await outcomes(harness.writer.submit(orphan)) == [StorageError]
        assert await harness.writer.run(note("after")) == "after"
    assert notes(path) == harness.told == ["after"]


async def test_a_commit_that_raised_is_not_asked_of_another_processes_event(path: Path, watch: Watch) -> None:
    """The rolled-back number is given to somebody else's event before the file is asked."""

    def step_in(connection: Watched, sql: str) -> None:
        if sql == "COMMIT":
            watch.step_in = None
            sqlite3.Connection.execute(connection, "ROLLBACK")
            with closing(open_sqlite(path, "write")) as other:
                other.execute("INSERT INTO events (scope, type, at, data) VALUES ('other', 'noted', '', '{}')")
            raise driver_error(sqlite3.SQLITE_IOERR_FSYNC)

    async with opened(path) as harness:
        watch.step_in = step_in

        assert await outcomes(harness.writer.submit(note("a"))) == [StorageError]
        assert harness.told == []
    assert notes(path) == ["other"]


@pytest.mark.parametrize("took", [True, False])
async def test_a_commit_nobody_can_ask_for_is_in_doubt_and_stops_the_writer(
    path: Path, watch: Watch, took: bool
) -> None:
    async with opened(path) as harness:
        watch.step_in = FailingCommit(watch, took=took, unreadable=True)
        futures = [harness.writer.submit(note(name)) for name in ("a", "b")]

        assert await outcomes(*futures) == [CommitInDoubt, CommitInDoubt]

        assert [type(error) for error in harness.fatal] == [CommitInDoubt]
        assert harness.told == []
        with pytest.raises(CommitInDoubt):
            harness.writer.submit(note("later"))
    watch.refuse = None
    assert notes(path) == (["a", "b"] if took else [])


async def test_a_batch_that_wrote_nothing_is_not_in_doubt_when_its_commit_raised(path: Path, watch: Watch) -> None:
    async with opened(path) as harness:
        watch.step_in = FailingCommit(watch, took=False)

        await outcomes(harness.writer.submit(lambda tx: tx.all("SELECT 1", {})))

        assert not harness.fatal
        assert await harness.writer.run(note("after")) == "after"


def may_begin(path: Path) -> bool:
    """Say whether somebody else may take the write lock at once."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
    return True


@pytest.mark.parametrize("at", ["BEGIN IMMEDIATE", "PRAGMA data_version", "INSERT", "COMMIT"])
@pytest.mark.parametrize("took", [True, False])
async def test_want_of_memory_is_an_error_of_the_storage_and_the_writer_lives_on(
    path: Path, watch: Watch, at: str, took: bool
) -> None:
    """SQLite's SQLITE_NOMEM comes as Python's own MemoryError: it stopped the store, with the write lock in its hand."""

    def step_in(connection: Watched, sql: str) -> None:
        if sql.startswith(at):
            watch.step_in = None
            if took and at != "INSERT":
                sqlite3.Connection.execute(connection, sql).fetchall()
            raise MemoryError

    async with opened(path) as harness:
        watch.step_in = step_in

        [found] = await outcomes(harness.writer.submit(note("a")))

        assert watch.step_in is None
        assert found == ("a" if at == "COMMIT" and took else StorageError)
        assert not harness.fatal
        assert may_begin(path)
        assert await harness.writer.run(note("after")) == "after"


async def test_a_rollback_that_fails_keeps_no_lock_and_the_writer_lives_on(path: Path, watch: Watch) -> None:
    def fails(tx: Transaction) -> None:
        note("undone")(tx)
        raise ValueError("no")

    def step_in(connection: Watched, sql: str) -> None:
        if sql == "ROLLBACK":
            raise driver_error(sqlite3.SQLITE_IOERR_READ)

    async with opened(path) as harness:
        watch.step_in = step_in

        assert await outcomes(harness.writer.submit(fails)) == [ValueError]

        assert may_begin(path)
        assert not harness.fatal
        watch.step_in = None
        assert await harness.writer.run(note("after")) == "after"
    assert notes(path) == ["after"]


async def test_a_rollback_that_fails_while_nothing_can_be_opened_keeps_no_lock_either(path: Path, watch: Watch) -> None:
    def fails(tx: Transaction) -> None:
        raise ValueError("no")

    def step_in(connection: Watched, sql: str) -> None:
        if sql == "ROLLBACK":
            watch.refuse = driver_error(sqlite3.SQLITE_CANTOPEN)
            raise driver_error(sqlite3.SQLITE_IOERR_READ)

    async with opened(path) as harness:
        watch.step_in = step_in
        assert await outcomes(harness.writer.submit(fails)) == [ValueError]
        assert await outcomes(harness.writer.submit(note("not yet"))) == [StorageError]
        assert not await harness.writer.foreign_commits()

        watch.refuse = watch.step_in = None

        assert may_begin(path)
        assert await harness.writer.run(note("after")) == "after"


async def test_a_commit_in_doubt_keeps_no_lock(path: Path, watch: Watch) -> None:
    def silent(tx: Transaction) -> None:
        tx.all("UPDATE sessions SET sync_needed = 1", {})
        tx.all("INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES ('a:b', 'a', 'b', '')", {})

    async with opened(path) as harness:
        watch.step_in = FailingCommit(watch, took=False)

        assert await outcomes(harness.writer.submit(silent)) == [CommitInDoubt]

        assert may_begin(path)


async def test_a_bug_that_stops_the_writer_leaves_no_lock(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tx: Transaction) -> None:
        raise KeyError("a bug of ours")

    async with opened(path) as harness:
        monkeypatch.setattr(queries, "write_events", broken)

        assert await outcomes(harness.writer.submit(note("a"))) == [CommitInDoubt]

        assert may_begin(path)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_FSYNC])
async def test_a_batch_without_events_is_in_doubt_unless_there_was_no_room_for_it(
    path: Path, watch: Watch, code: int
) -> None:
    def silent(tx: Transaction) -> None:
        tx.all("UPDATE sessions SET sync_needed = 1", {})

    def step_in(connection: Watched, sql: str) -> None:
        if sql == "COMMIT":
            watch.step_in = None
            sqlite3.Connection.execute(connection, "ROLLBACK")
            raise driver_error(code)

    async with opened(path) as harness:
        await harness.writer.run(lambda tx: session_queries.insert_session(tx, Scope("desktop", "s1"), None))
        watch.step_in = step_in

        told = await outcomes(harness.writer.submit(silent))

        is_known = code == sqlite3.SQLITE_FULL
        assert told == [StorageFull if is_known else CommitInDoubt]
        assert bool(harness.fatal) is not is_known


async def test_what_waits_behind_a_commit_in_doubt_is_refused_and_not_run(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MOST", 1)
    async with opened(path) as harness:
        watch.step_in = FailingCommit(watch, took=False, unreadable=True)
        futures = [harness.writer.submit(note(name)) for name in ("a", "b", "c")]

        assert await outcomes(*futures) == [CommitInDoubt] * 3
    watch.refuse = None
    assert notes(path) == []


# --- other processes' locks -----------------------------------------------------------------------------------------


async def test_a_lock_nobody_lets_go_of_is_a_typed_error_and_nothing_is_written(path: Path) -> None:
    async with opened(path, patience=0.05) as harness:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")

            assert await outcomes(*map(harness.writer.submit, [note("a"), note("b")])) == [StorageBusy] * 2

            other.execute("ROLLBACK")
        assert not harness.fatal
        assert await harness.writer.run(note("after")) == "after"
    assert notes(path) == ["after"]


async def test_a_lock_that_is_let_go_of_in_time_is_waited_for(path: Path, watch: Watch) -> None:
    other = open_sqlite(path, "write")
    asked = 0

    def let_go(connection: Watched, sql: str) -> None:
        nonlocal asked
        if sql == "BEGIN IMMEDIATE" and connection is not other:
            asked += 1
            if asked == 3:
                sqlite3.Connection.execute(other, "ROLLBACK")

    async with opened(path) as harness:
        other.execute("BEGIN IMMEDIATE")
        watch.step_in = let_go

        assert await harness.writer.run(note("a")) == "a"

    other.close()
    assert asked >= 3


async def test_what_others_commit_is_noticed_and_what_this_one_commits_is_not(path: Path) -> None:
    async with opened(path) as harness:
        await harness.writer.run(note("mine"))
        assert not await harness.writer.foreign_commits()

        with closing(open_sqlite(path, "write")) as other:
            other.execute("INSERT INTO events (scope, type, at, data) VALUES ('other', 'noted', '', '{}')")

        assert await harness.writer.foreign_commits()
        assert not await harness.writer.foreign_commits()


# --- the file goes away ---------------------------------------------------------------------------------------------


def unlink(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))


def replace(path: Path) -> None:
    other = path.with_name("other.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(other)) as target:
        source.backup(target)
    other.replace(path)


GONE = [unlink, rename, replace]


@pytest.mark.parametrize("away", GONE)
async def test_a_file_that_is_gone_is_noticed_before_anything_is_acknowledged(
    path: Path, away: Callable[[Path], None]
) -> None:
    async with opened(path) as harness:
        await harness.writer.run(note("a"))
        away(path)

        assert await outcomes(*map(harness.writer.submit, [note("b"), note("c")])) == [StorageMoved] * 2

        assert [type(error) for error in harness.fatal] == [StorageMoved]
        assert harness.told == ["a"]
        with pytest.raises(StorageMoved):
            harness.writer.submit(note("later"))


@pytest.mark.parametrize("away", GONE)
async def test_a_file_that_goes_away_during_a_transaction_is_noticed_before_anything_is_acknowledged(
    path: Path, away: Callable[[Path], None]
) -> None:
    def unit(tx: Transaction) -> str:
        away(path)
        return note("b")(tx)

    async with opened(path) as harness:
        assert await outcomes(harness.writer.submit(unit)) == [StorageMoved]

        assert harness.told == []
        with pytest.raises(StorageMoved):
            harness.writer.submit(note("later"))


# --- the lock against stray closes ----------------------------------------------------------------------------------


def stray_close(path: Path) -> None:
    """What any tool in an agent's process may do; it drops every POSIX lock the process has on the file."""
    os.close(os.open(path, os.O_RDONLY))


async def test_a_stray_close_and_a_shell_do_not_cost_later_commits(path: Path, shell: Shell) -> None:
    async with opened(path) as harness:
        await harness.writer.run(note("before"))
        wal = wal_of(path).st_ino

        stray_close(path)
        assert "tasks" in shell(path, ".tables")

        assert wal_of(path).st_ino == wal
        await harness.writer.run(note("after"))
        assert shell(path, "SELECT scope FROM events ORDER BY seq").split() == ["before", "after"]
    assert notes(path) == ["before", "after"]


@pytest.mark.parametrize("first_to_close", [0, 1])
async def test_the_guard_stands_until_the_last_store_of_the_process_closes(
    path: Path, shell: Shell, first_to_close: int
) -> None:
    stores = [Harness(path, 10.0), Harness(path, 10.0)]
    for store in stores:
        await store.writer.open()
        await store.writer.run(note("before"))
    wal = wal_of(path).st_ino
    left = stores[1 - first_to_close]

    await stores[first_to_close].writer.close()
    stray_close(path)
    shell(path, ".tables")

    assert wal_of(path).st_ino == wal
    await left.writer.run(note("after"))
    assert shell(path, "SELECT count(*) FROM events") == "3"
    await left.writer.close()
    assert guards.identify(path) not in guards._held


WRITES = """
    import sqlite3, sys

    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.execute("INSERT INTO events (scope, type, at, data) VALUES ('other', 'noted', '', '{}')")
    print("written", flush=True)
    sys.stdin.readline()
"""


async def test_a_reader_sees_others_commits_after_its_processes_owner_has_closed(
    path: Path, shell: Shell, spawn: Callable[..., Any]
) -> None:
    reader = Reader(path)
    await reader.open()
    try:
        async with opened(path) as harness:
            await harness.writer.run(note("before"))
            assert await reader.rows("SELECT count(*) FROM events", {}) == [(1,)]

        # the owner's close let go of the guard's descriptor, and that drops every lock the process has on the file
        shell(path, ".tables")
        assert spawn(WRITES, path).stdout.readline() == "written\n"

        assert await reader.rows("SELECT count(*) FROM events", {}) == [(2,)]
    finally:
        await reader.close()


# --- checkpoints ----------------------------------------------------------------------------------------------------


async def test_no_checkpoint_runs_beside_a_commit(path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 5)
    checkpoints: list[bool] = []
    committers: list[commit.Committer] = []

    def look(connection: Watched, sql: str) -> None:
        if "wal_checkpoint(PASSIVE)" in sql:
            holder = committers[0]._raw
            checkpoints.append(holder is not connection and holder.in_transaction)

    async with opened(path) as harness:
        assert harness.writer._committer is not None
        committers.append(harness.writer._committer)
        watch.step_in = look
        for number in range(50):
            await harness.writer.run(note(f"n{number}"))

    assert len(checkpoints) >= 5
    assert all(checkpoints)


async def test_no_connection_that_writes_checkpoints_by_itself(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 5)
    async with opened(path) as harness:
        for number in range(20):
            await harness.writer.run(note(f"n{number}"))
        found = [
            sqlite3.Connection.execute(connection, "PRAGMA wal_autocheckpoint").fetchone()[0]
            for connection in watch.opened
        ]

    assert len(found) == 2
    assert found == [0, 0]


async def test_the_wal_stays_bounded_over_many_commits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 100)
    biggest = 0
    async with opened(path) as harness:
        for number in range(1_000):
            await harness.writer.run(note(f"n{number}"))
            biggest = max(biggest, wal_of(path).st_size)

    # a commit of one small event touches a handful of pages
    assert biggest < 100 * 8 * 4_200


async def test_a_checkpoint_comes_soon_again_where_a_reader_was_in_the_way(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 800)
    tries: list[int] = []

    def look(connection: Watched, sql: str) -> None:
        if "wal_checkpoint(PASSIVE)" in sql:
            tries.append(number)

    async with opened(path) as harness:
        watch.step_in = look
        number = 0
        await harness.writer.run(note("n"))
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN").fetchall()
            reader.execute("SELECT count(*) FROM events").fetchall()
            while not tries:
                number += 1
                await harness.writer.run(note(f"n{number}"))
            # it runs after the answer
            await harness.writer.run(note("n"))
            long = wal_of(path).st_size
        while len(tries) < 3:
            number += 1
            await harness.writer.run(note(f"n{number}"))
        [first, second, third] = tries
        most = wal_of(path).st_size

    # soon, but not at each commit; it found all free: until the third is due as usual, the -wal was written from its beginning
    assert first / 16 < second - first < first / 4
    assert third - second > first / 2
    assert most < long * 1.5


async def test_a_checkpoint_comes_soon_again_where_the_wal_could_not_begin_anew(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 200)
    tries: list[int] = []
    readers: list[sqlite3.Connection] = []
    number = 0

    def look(connection: Watched, sql: str) -> None:
        if "wal_checkpoint(PASSIVE)" in sql:
            tries.append(number)
            # whoever reads the newest state lets all be copied, and only keeps the -wal from its beginning
            reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            reader.execute("BEGIN").fetchall()
            reader.execute("SELECT count(*) FROM events").fetchall()
            readers.append(reader)

    async with opened(path) as harness:
        watch.step_in = look
        while len(tries) < 9:
            number += 1
            await harness.writer.run(note(f"n{number}"))
            if tries and tries[-1] < number:
                readers[-1].close()
        watch.step_in = None
        readers[-1].close()

    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps[-1] < gaps[0] / 4


async def test_what_killed_owners_left_in_the_wal_counts_for_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 100)
    # one that is idle keeps the last of the others from emptying it
    async with opened(path):
        with closing(sqlite3.connect(path, isolation_level=None)) as killed:
            killed.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
            killed.execute("CREATE TABLE much (bytes)")
            killed.execute("INSERT INTO much VALUES (zeroblob(1000000))")
        before = path.stat().st_size

        async with opened(path) as harness:
            await harness.writer.run(note("a"))
            await harness.writer.run(note("b"))
            checkpointed = path.stat().st_size

    assert checkpointed >= before + 1_000_000


async def test_a_checkpoint_that_cannot_be_taken_costs_nobody_an_answer(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 1)

    def refuse(connection: Watched, sql: str) -> None:
        if "wal_checkpoint" in sql:
            raise driver_error(sqlite3.SQLITE_IOERR)

    async with opened(path) as harness:
        watch.step_in = refuse

        assert await outcomes(harness.writer.submit(note("a"))) == ["a"]
        assert await outcomes(harness.writer.submit(note("b"))) == ["b"]
    assert "checkpoint_failed" in caplog.text
    assert notes(path) == ["a", "b"]


async def test_the_wal_is_empty_after_the_last_close(path: Path) -> None:
    async with opened(path) as harness:
        await harness.writer.run(note("a"))
        assert wal_of(path).st_size > 0

    assert wal_of(path).st_size == 0
    assert notes(path) == ["a"]


# --- the end --------------------------------------------------------------------------------------------------------


def is_open(connection: sqlite3.Connection) -> bool:
    try:
        sqlite3.Connection.execute(connection, "SELECT 1")
    except sqlite3.ProgrammingError:
        return False
    return True


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize("happens", [nothing, *GONE])
async def test_every_connection_and_thread_is_gone_after_the_close(
    path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(commit, "_CHECKPOINT_PAGES", 1)
    threads = set(threading.enumerate())
    before = descriptors()
    held = set(guards._held)

    async with opened(path) as harness:
        await harness.writer.run(note("a"))
        happens(path)
        await outcomes(harness.writer.submit(note("b")))

    assert watch.opened
    assert [connection for connection in watch.opened if is_open(connection)] == []
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=10)
    assert set(threading.enumerate()) <= threads
    assert descriptors() == before
    assert set(guards._held) == held


async def test_every_connection_is_gone_after_a_commit_in_doubt(path: Path, watch: Watch) -> None:
    held = set(guards._held)
    async with opened(path) as harness:
        watch.step_in = FailingCommit(watch, took=True, unreadable=True)
        await outcomes(harness.writer.submit(note("a")))

    assert [connection for connection in watch.opened if is_open(connection)] == []
    assert set(guards._held) == held


async def test_what_was_asked_before_the_close_is_committed(path: Path) -> None:
    harness = Harness(path, 10.0)
    await harness.writer.open()
    futures = [harness.writer.submit(note(f"n{number}")) for number in range(10)]

    await harness.writer.close()

    assert await outcomes(*futures) == [f"n{number}" for number in range(10)]
    assert len(notes(path)) == 10


async def test_a_closed_writer_refuses(path: Path) -> None:
    async with opened(path) as harness:
        pass

    with pytest.raises(StoreClosed):
        harness.writer.submit(note("late"))


async def test_a_writer_that_was_never_opened_refuses(path: Path) -> None:
    with pytest.raises(StoreClosed):
        Harness(path, 1.0).writer.submit(note("early"))


async def test_an_error_in_the_midst_of_opening_is_named_and_leaves_nothing_open(path: Path, watch: Watch) -> None:
    def step_in(connection: Watched, sql: str) -> None:
        if sql == "PRAGMA data_version":
            raise driver_error(sqlite3.SQLITE_INTERRUPT)

    watch.step_in = step_in
    with pytest.raises(StorageError):
        await Harness(path, 1.0).writer.open()

    watch.step_in = None
    for connection in watch.opened:
        with pytest.raises(sqlite3.ProgrammingError):
            connection.execute("SELECT 1")


async def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    missing = tmp_path / "nonesuch.db"
    held = set(guards._held)

    with pytest.raises(StorageError):
        await Harness(missing, 1.0).writer.open()

    assert guards.identify(missing) is None
    assert set(guards._held) == held
