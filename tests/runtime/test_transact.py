"""What a body does in the store's own file is done exactly once: effect and memory are one transaction, at its end as well."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    Backoff,
    IdempotencyConflict,
    InvalidArguments,
    InvalidId,
    LimitExceeded,
    Limits,
    Recovery,
    ResultNotSerializable,
    SessionTasks,
    StaleAttempt,
    StepFailed,
    StorageFull,
    StoreError,
    TaskContext,
    TaskFailed,
    TaskState,
    TaskStore,
    TransactConnection,
    queries,
)
from tests.runtime.support import cancel_at, event_types, rows
from tests.runtime.test_context import move_on
from tests.runtime.test_steps import Refused, die, in_attempts, kept, run, told

pytestmark = pytest.mark.timeout(20)

AT_ONCE = Backoff(initial=0, maximum=0)


@pytest.fixture(autouse=True)
async def _ledger(store: TaskStore) -> None:
    """Make the program's own table; the store does not mind."""
    assert store._core is not None
    assert store._core.writer is not None

    def make(tx: Any) -> None:
        tx.connection.execute("CREATE TABLE ledger (entry TEXT NOT NULL, amount INTEGER CHECK (amount < 1000))")

    await store._core.writer.run(make)


def post(connection: TransactConnection, entry: str, amount: int = 1) -> int:
    """Write an entry, and return how many there are."""
    connection.execute("INSERT INTO ledger VALUES (?, ?)", (entry, amount))
    return int(connection.execute("SELECT count(*) FROM ledger").fetchall()[0][0])


def post_and_fail(connection: TransactConnection, entry: str) -> None:
    post(connection, entry)
    raise Refused(f"not {entry}")


def entries(path: Path) -> list[str]:
    return [row["entry"] for row in rows(path, "SELECT entry FROM ledger ORDER BY rowid")]


# --- once -----------------------------------------------------------------------------------------------------------


async def test_effect_and_memory_are_in_the_file_on_return_and_the_result_is_replayed(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def do(task: TaskContext) -> list[Any]:
        number = await task.transact("a", post, "first", amount=5)
        return [number, entries(path), kept(path, "a")["state"], kept(path, "a")["value"]]

    assert await in_attempts(store, session, do) == [[1, ["first"], "done", "1"]] * 2
    assert rows(path, "SELECT * FROM ledger") == [{"entry": "first", "amount": 5}]


async def test_neither_effect_nor_success_is_stored_if_it_raises(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    first, again = await in_attempts(store, session, lambda task: task.transact("a", post_and_fail, "it"))

    assert (type(first), str(first)) == (type(again), str(again)) == (Refused, "not it")
    assert isinstance(again.__cause__, StepFailed)
    assert entries(path) == []
    assert kept(path, "a")["state"] == "failed"


async def test_it_survives_a_restart_and_other_stores_read_the_programs_tables(
    store: TaskStore, session: SessionTasks, new: Callable[..., TaskStore], path: Path, started: asyncio.Event
) -> None:
    async def work(task: TaskContext) -> Any:
        number = await task.transact("a", post, "it")
        if task.attempt == 1:
            started.set()
            await asyncio.Event().wait()
        return number

    store.task(recovery=Recovery.RERUN)(work)
    await session.spawn(work, id="t")
    await started.wait()
    async with TaskStore.open_readonly(path) as reading, TaskStore.connect(path, runtime="desktop") as requesting:
        for other in (reading, requesting):
            [step] = await (await other.handle("desktop:s1", "t")).steps()
            assert (step.kind, step.name, step.state, step.value) == ("transact", "a", "done", 1)
        assert entries(path) == ["it"]
        await store.close()
        # a file with tables of somebody else opens as it did
        after = new()
        after.task(recovery=Recovery.RERUN)(work)
        async with after:
            assert await (await after.handle("desktop:s1", "t")) == 1
    assert entries(path) == ["it"]


def typed(connection: TransactConnection) -> set[int]:
    return {1, 2}


async def test_a_result_has_its_type_and_a_lambda_may_do_it(store: TaskStore, session: SessionTasks) -> None:
    async def do(task: TaskContext) -> list[Any]:
        return [await task.transact("typed", typed), await task.transact("lambda", lambda connection: (1, None))]

    assert await in_attempts(store, session, do) == [[{1, 2}, [1, None]]] * 2


async def test_rows_stay_readable_and_the_connection_does_not(store: TaskStore, session: SessionTasks) -> None:
    kept_by_it: list[Any] = []

    def fn(connection: TransactConnection) -> None:
        connection.executemany("INSERT INTO ledger VALUES (?, ?)", [("a", 1), ("b", 2)])
        connection.executescript("UPDATE ledger SET amount = 5; INSERT INTO ledger VALUES ('c;', 6);")
        kept_by_it.extend([connection, connection.execute("SELECT entry, amount FROM ledger")])

    async def do(task: TaskContext) -> Any:
        await task.transact("a", fn)
        with pytest.raises(StoreError, match="while it runs"):
            kept_by_it[0].execute("SELECT 1")
        return kept_by_it[1].fetchall()

    assert await run(store, session, do) == [["a", 5], ["b", 5], ["c;", 6]]


async def test_the_same_name_again_is_the_same_step(store: TaskStore, session: SessionTasks, path: Path) -> None:
    async def do(task: TaskContext) -> list[Any]:
        alone = [await task.transact("a", post, "a") for _ in range(2)]
        at_once = await asyncio.gather(*[task.transact("b", post, "b") for _ in range(5)])
        with pytest.raises(IdempotencyConflict, match="'a'"):
            await task.transact("a", post, "other")
        with pytest.raises(IdempotencyConflict, match="'a'"):
            await task.step("a", lambda entry: 1, "a")
        await task.step("c", lambda: 1)
        with pytest.raises(IdempotencyConflict, match="'c'"):
            await task.transact("c", lambda connection: 1)
        return [alone, at_once]

    assert await run(store, session, do) == [[1, 1], [2] * 5]
    assert entries(path) == ["a", "b"]


async def test_a_failure_is_final_in_its_own_attempt_too(store: TaskStore, session: SessionTasks, path: Path) -> None:
    calls: list[int] = []

    def fn(connection: TransactConnection) -> None:
        calls.append(1)
        raise Refused("no")

    async def do(task: TaskContext) -> list[str]:
        return [repr(await told(task.transact("a", fn))) for _ in range(2)]

    assert await run(store, session, do) == ["Refused('no')"] * 2
    assert calls == [1]


async def test_a_retry_of_the_task_tries_it_again_and_keeps_what_was_done(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def do(task: TaskContext) -> int:
        await task.transact("done", post, "done")
        return await task.transact("last", post_and_fail if task.attempt == 1 else post, "last")

    assert await run(store, session, do, retry_on=Refused, backoff=AT_ONCE) == 2
    assert entries(path) == ["done", "last"]


async def test_many_at_once_are_all_done_and_a_bad_one_harms_no_neighbour(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    def ends_it(connection: TransactConnection) -> None:
        connection.executescript(
            "CREATE TABLE IF NOT EXISTS one (x UNIQUE); INSERT INTO one VALUES (1); INSERT OR ROLLBACK INTO one VALUES (1)"
        )

    def defers(connection: TransactConnection) -> None:
        connection.executescript(
            "CREATE TABLE parent (x PRIMARY KEY); CREATE TABLE child (x REFERENCES parent DEFERRABLE INITIALLY DEFERRED);"
            "INSERT INTO child VALUES (1)"
        )

    async def do(task: TaskContext) -> list[str]:
        good = [task.transact(f"good {n}", post, f"good {n}") for n in range(40)]
        bad: list[Any] = [
            task.transact("raises", post_and_fail, "raises"),
            task.transact("ends", ends_it),
            task.transact("defers", defers),
            task.step("step", lambda: "a step"),
            task.progress("half"),
        ]
        mixed = [*good[:20], *bad, *good[20:]]
        got = await asyncio.gather(*mixed, return_exceptions=True)
        assert sorted(got[:20] + got[25:]) == list(range(1, 41))
        return [type(one).__name__ for one in got[20:25]]

    assert await run(store, session, do) == ["Refused", "StoreError", "IntegrityError", "str", "NoneType"]
    assert sorted(entries(path)) == sorted(f"good {n}" for n in range(40))
    assert rows(path, "SELECT name FROM sqlite_schema WHERE name IN ('one', 'parent', 'child')") == []
    assert rows(path, "SELECT name, state FROM steps WHERE state != 'done' ORDER BY name") == [
        {"name": "defers", "state": "failed"},
        {"name": "ends", "state": "failed"},
        {"name": "raises", "state": "failed"},
    ]


async def test_what_may_be_called_twice_is_undone_the_first_time(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    calls: list[int] = []

    def counted(connection: TransactConnection) -> int:
        calls.append(1)
        return post(connection, "it")

    def ends_it(connection: TransactConnection) -> None:
        connection.execute("INSERT OR ROLLBACK INTO ledger VALUES ('x', 2000)")

    async def do(task: TaskContext) -> Any:
        got = await asyncio.gather(task.transact("a", counted), task.transact("b", ends_it), return_exceptions=True)
        return got[0]

    assert await run(store, session, do) == 1
    assert calls in ([1], [1, 1])
    assert entries(path) == ["it"]


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
@pytest.mark.parametrize("fails", [False, True], ids=["done", "fails"])
async def test_a_caller_cancelled_at_any_point_leaves_it_whole(
    store: TaskStore, session: SessionTasks, path: Path, fails: bool, late: bool
) -> None:
    calls: dict[str, int] = {}

    def fn(connection: TransactConnection, entry: str) -> str:
        calls[entry] = calls.get(entry, 0) + 1
        (post_and_fail if fails else post)(connection, entry)
        return entry

    async def do(task: TaskContext) -> int:
        for at in itertools.count(1):
            stepped = await cancel_at(task.transact(f"s{at}", fn, f"s{at}"), at, late=late)
            await store.session("behind it in the queue")
            found = rows(path, "SELECT state FROM steps WHERE name = ?", f"s{at}")
            before = calls.get(f"s{at}", 0)
            assert (f"s{at}" in entries(path)) == (found == [{"state": "done"}])
            again = await told(task.transact(f"s{at}", fn, f"s{at}"))
            assert str(again) == (f"not s{at}" if fails else f"s{at}")
            if found:
                assert calls[f"s{at}"] == before
            if not stepped.reached:
                return at
        raise AssertionError

    assert await run(store, session, do) > 1
    assert entries(path) == ([] if fails else list(calls))


async def test_a_stale_attempt_does_not_run_it(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    calls: list[int] = []
    refused: list[StaleAttempt] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        started.set()
        await release.wait()
        try:
            await task.transact("a", lambda connection: calls.append(1))
        except StaleAttempt as error:
            refused.append(error)
            raise

    task = await session.spawn(work, id="t")
    await started.wait()
    await move_on(store, task.task_seq)
    body = next(one for one in asyncio.all_tasks() if one.get_name() == "lash_store body t")
    release.set()
    await asyncio.wait({body})

    assert len(refused) == 1
    assert calls == []
    assert rows(path, "SELECT * FROM steps") == []


async def test_the_attempt_that_dies_on_the_way_back_has_done_it(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    in_it = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fn(connection: TransactConnection) -> int:
        loop.call_soon_threadsafe(in_it.set)
        return post(connection, "it")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        return await task.transact("a", fn)

    task = await session.spawn(work, id="t")
    await in_it.wait()
    await die(store, session, "t")

    assert await task == 1
    assert entries(path) == ["it"]


# --- what it may not ------------------------------------------------------------------------------------------------


async def test_an_ordinary_error_of_sqlite_is_raised_as_it_is(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    wanted: dict[str, type[Exception]] = {
        "INSERT INTO ledger VALUES (NULL, 1)": sqlite3.IntegrityError,
        "INSERT INTO ledger VALUES ('a', 2000)": sqlite3.IntegrityError,
        "SELECT nonsense": sqlite3.OperationalError,
        "SELECT ?": sqlite3.ProgrammingError,
    }

    def fn(connection: TransactConnection, sql: str) -> None:
        post(connection, "before it")
        connection.execute(sql)

    async def do(task: TaskContext) -> list[Any]:
        return [await told(task.transact(sql, fn, sql)) for sql in wanted]

    first, again = await in_attempts(store, session, do)

    assert [type(one) for one in first] == [type(one) for one in again] == list(wanted.values())
    assert [str(one) for one in first] == [str(one) for one in again]
    assert entries(path) == []


async def test_an_error_that_it_catches_itself_harms_nothing(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    def fn(connection: TransactConnection) -> int:
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute("INSERT INTO ledger VALUES ('a', 2000)")
        return post(connection, "after it")

    assert await run(store, session, lambda task: task.transact("a", fn)) == 1
    assert entries(path) == ["after it"]


async def test_what_would_change_the_store_is_refused_and_said_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    forbidden = [
        "UPDATE tasks SET label = 'x'",
        "DELETE FROM steps",
        "DROP TABLE events",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT unit",
        "RELEASE unit",
        "ROLLBACK TO unit",
        "PRAGMA synchronous=OFF",
        "ATTACH ':memory:' AS other",
        "CREATE TEMP TABLE mine (x)",
    ]

    def fn(connection: TransactConnection, sql: str) -> None:
        post(connection, "before it")
        connection.execute(sql)

    async def do(task: TaskContext) -> list[str]:
        errors = [await told(task.transact(sql, fn, sql)) for sql in forbidden]
        assert {type(error) for error in errors} == {StoreError}
        assert await task.transact("b", post, "after it") == 1
        return [str(error) for error in errors]

    first, again = await in_attempts(store, session, do)
    assert first == again
    assert entries(path) == ["after it"]


async def test_what_is_no_plain_function_is_refused(store: TaskStore, session: SessionTasks, path: Path) -> None:
    async def fn(connection: TransactConnection) -> None: ...

    async def do(task: TaskContext) -> str:
        for wrong in (fn, 5):
            with pytest.raises(InvalidArguments, match="'a'"):
                await task.transact("a", wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArguments, match="plain function"):
            await task.transact("b", lambda connection: fn(connection))
        for name in ("", 5, "\0"):
            with pytest.raises(InvalidId):
                await task.transact(name, post, "x")  # type: ignore[arg-type]
        return "goes on"

    assert await run(store, session, do) == "goes on"


async def test_any_keyword_reaches_the_function(store: TaskStore, session: SessionTasks) -> None:
    def echo(connection: TransactConnection, **kwargs: str) -> dict[str, str]:
        return kwargs

    async def echoed(task: TaskContext, name: str) -> Any:
        return await task.transact(f"s {name}", echo, **{name: "x"})

    async def do(task: TaskContext) -> list[str]:
        return [repr(await told(echoed(task, name))) for name in names]

    names = ["x", "tx", "fn", "name"]
    assert await run(store, session, do) == [repr({name: "x"}) for name in names]


async def test_a_result_that_cannot_be_stored_takes_the_effect_with_it(
    new: Callable[..., TaskStore], store: TaskStore, path: Path
) -> None:
    wanted = {"object": ResultNotSerializable, "nan": ResultNotSerializable, "large": LimitExceeded}
    values: dict[str, Any] = {"object": object(), "nan": {float("nan")}, "large": "x" * 300}

    def fn(connection: TransactConnection, name: str) -> Any:
        post(connection, "it")
        return values[name]

    async def do(task: TaskContext) -> dict[str, Any]:
        return {name: type(await told(task.transact(name, fn, name))) for name in values}

    async with new(limits=Limits(payload_bytes=300)) as limited:
        got = await in_attempts(limited, await limited.session("s1"), do)

    assert got == [wanted] * 2
    assert entries(path) == []
    assert rows(path, "SELECT DISTINCT state FROM steps") == [{"state": "failed"}]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
async def test_an_exit_in_it_ends_the_body_and_not_the_writer(
    store: TaskStore, session: SessionTasks, path: Path, error: BaseException
) -> None:
    def fn(connection: TransactConnection) -> None:
        post(connection, "it")
        raise error

    failed = await told(run(store, session, lambda task: task.transact("a", fn)))

    assert isinstance(failed, TaskFailed)
    assert failed.failure.type == type(error).__name__
    assert entries(path) == []
    await store.session("the writer goes on")


async def test_an_error_of_another_database_says_nothing_about_this_one(
    store: TaskStore, session: SessionTasks, tmp_path: Path
) -> None:
    def fn(connection: TransactConnection) -> None:
        with closing(sqlite3.connect(no_database(tmp_path))) as other:
            other.execute("SELECT * FROM notes")

    error = await told(run(store, session, lambda task: task.transact("a", fn)))
    assert isinstance(error, TaskFailed)
    assert error.failure.type == "DatabaseError"


async def test_a_full_text_index_may_be_used(store: TaskStore, session: SessionTasks) -> None:
    def fn(connection: TransactConnection) -> list[Any]:
        connection.executescript(
            "CREATE VIRTUAL TABLE search USING fts5(entry); INSERT INTO search VALUES ('one two'), ('three')"
        )
        return connection.execute("SELECT entry FROM search WHERE search MATCH 'two'").fetchall()

    assert await run(store, session, lambda task: task.transact("a", fn)) == [["one two"]]


async def test_a_full_disk_is_not_its_failure(store: TaskStore, session: SessionTasks, path: Path) -> None:
    connection = await no_room(store)

    async def do(task: TaskContext) -> int:
        with pytest.raises(StorageFull):
            await task.transact("a", post, "x" * 200_000)
        await connection.run(lambda raw: raw.execute("PRAGMA max_page_count=1000000").fetchall())
        return await task.transact("a", post, "x" * 200_000)

    assert await run(store, session, do) == 1
    assert kept(path, "a")["state"] == "done"


# --- at completion --------------------------------------------------------------------------------------------------


async def test_what_is_to_be_done_at_completion_is_done_in_order_with_the_result(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def do(task: TaskContext) -> str:
        for entry in ("one", "two", "three"):
            task.at_completion(lambda connection, entry=entry: post(connection, entry))  # type: ignore[misc]
        task.at_completion(lambda connection: connection.execute("UPDATE ledger SET amount = 7"))
        await store.session("not yet")
        assert entries(path) == []
        return "result"

    assert await run(store, session, do) == "result"
    assert entries(path) == ["one", "two", "three"]
    assert rows(path, "SELECT DISTINCT amount FROM ledger") == [{"amount": 7}]


async def test_it_sees_the_end_it_is_stored_with(store: TaskStore, session: SessionTasks, path: Path) -> None:
    def fn(connection: TransactConnection) -> None:
        [state, result] = next(connection.execute("SELECT state, result FROM tasks WHERE id = 't'"))
        post(connection, f"{state} {result}")

    async def do(task: TaskContext) -> str:
        task.at_completion(fn)
        return "it"

    await run(store, session, do)
    assert entries(path) == ['completed "it"']


def fails_deferred(connection: TransactConnection) -> None:
    connection.executescript(
        "CREATE TABLE parent (x PRIMARY KEY); CREATE TABLE child (x REFERENCES parent DEFERRABLE INITIALLY DEFERRED);"
        "INSERT INTO child VALUES (1)"
    )


def fails_by_ending_it(connection: TransactConnection) -> None:
    connection.execute("INSERT OR ROLLBACK INTO ledger VALUES ('x', 2000)")


def fails_by_exit(connection: TransactConnection) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("fails", "type"),
    [
        (lambda connection: post_and_fail(connection, "it"), "Refused"),
        (lambda connection: connection.execute("INSERT INTO ledger VALUES ('x', 2000)"), "IntegrityError"),
        (lambda connection: connection.execute("DELETE FROM tasks"), "StoreError"),
        (lambda connection: asyncio.sleep(0), "InvalidArguments"),
        (fails_deferred, "IntegrityError"),
        (fails_by_ending_it, "StoreError"),
        (fails_by_exit, "SystemExit"),
    ],
    ids=["raises", "constraint", "forbidden", "coroutine", "deferred", "ends it", "exit"],
)
async def test_the_task_has_failed_if_it_raises_and_nothing_of_it_is_stored(
    store: TaskStore, session: SessionTasks, path: Path, fails: Callable[..., Any], type: str
) -> None:
    async def do(task: TaskContext) -> str:
        task.at_completion(lambda connection: post(connection, "before"))
        task.at_completion(fails)
        task.at_completion(lambda connection: post(connection, "after"))
        return "result"

    with pytest.raises(TaskFailed) as failed:
        await run(store, session, do)

    assert failed.value.failure.type == type
    assert entries(path) == []
    task = await session.handle("t")
    assert event_types(path, task.task_seq) == ["registered", "started", "failed"]


async def test_a_task_whose_completion_fails_is_retried_and_must_say_so_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def do(task: TaskContext) -> int:
        if task.attempt == 1:
            task.at_completion(lambda connection: post_and_fail(connection, "first"))
        if task.attempt == 2:
            task.at_completion(lambda connection: post_and_fail(connection, "second"))
        if task.attempt == 3:
            task.at_completion(lambda connection: post(connection, "third"))
        return task.attempt

    assert await run(store, session, do, retry_on=Refused, backoff=AT_ONCE) == 3
    assert entries(path) == ["third"]


async def test_it_is_not_done_if_the_task_ends_in_another_way(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event
) -> None:
    async def fails(task: TaskContext) -> None:
        task.at_completion(lambda connection: post(connection, "failed"))
        raise Refused("no")

    async def bad_result(task: TaskContext) -> Any:
        task.at_completion(lambda connection: post(connection, "no json"))
        return object()

    async def stays(task: TaskContext) -> None:
        task.at_completion(lambda connection: post(connection, "cancelled"))
        started.set()
        await asyncio.Event().wait()

    for fn in (fails, bad_result, stays):
        store.task(recovery=Recovery.OWNER_BOUND)(fn)
    states = [(await (await session.spawn(fn)).wait()).state for fn in (fails, bad_result)]
    task = await session.spawn(stays, cancel_policy="abort_local")  # type: ignore[arg-type]
    await started.wait()
    states.append((await task.cancel()).state)
    started.clear()
    task = await session.spawn(stays)
    await started.wait()
    states.append((await session.abandon(task.id, "enough")).state)

    assert states == ["failed", "failed", "cancelled", "abandoned"]
    assert entries(path) == []


async def test_a_body_that_wins_over_a_cancel_does_it(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        task.at_completion(lambda connection: post(connection, "it"))
        started.set()
        await task.cancelled()
        return "all the same"

    task = await session.spawn(work)
    await started.wait()

    assert (await task.cancel()).state is TaskState.COMPLETED
    assert entries(path) == ["it"]


async def test_a_full_disk_at_completion_is_waited_out(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    update_task = queries.update_task

    def full(tx: Any, task: Any, columns: Any) -> Any:
        if not refused and columns.get("state") == "completed":
            refused.append(1)
            raise StorageFull("no room")
        return update_task(tx, task, columns)

    monkeypatch.setattr(queries, "update_task", full)

    async def do(task: TaskContext) -> str:
        task.at_completion(lambda connection: post(connection, "it"))
        return "done"

    assert await run(store, session, do) == "done"
    assert refused == [1]
    assert entries(path) == ["it"]


async def test_a_completion_that_will_never_be_stored_does_not_hang(
    store: TaskStore, session: SessionTasks, tmp_path: Path
) -> None:
    looked = False

    def fn(connection: TransactConnection) -> None:
        # as an FTS5 index of the program's own does that does not fit its table: SQLITE_CORRUPT_VTAB
        if not looked:
            with closing(sqlite3.connect(no_database(tmp_path))) as other:
                other.execute("SELECT * FROM notes")

    async def do(task: TaskContext) -> str:
        task.at_completion(fn)
        return "done"

    store.task(recovery=Recovery.RERUN)(do)
    task = await session.spawn(do, id="t")
    record = await task.wait(timeout=0.5)
    looked = True
    await task.wait()
    assert record.state is TaskState.FAILED


async def test_a_disk_that_is_full_at_completion_is_waited_out(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = asyncio.Event()
    writer = await no_room(store)
    stored = store._core.runner._stored  # type: ignore[union-attr]

    def spy(body: Any, command: Any, pause: float, future: asyncio.Future[Any]) -> None:
        refused.set()
        stored(body, command, pause, future)

    monkeypatch.setattr(store._core.runner, "_stored", spy)  # type: ignore[union-attr]

    async def do(task: TaskContext) -> str:
        task.at_completion(lambda connection: post(connection, "x" * 200_000))
        return "done"

    store.task(recovery=Recovery.RERUN)(do)
    task = await session.spawn(do, id="t")
    await refused.wait()
    await writer.run(lambda raw: raw.execute("PRAGMA max_page_count=1000000").fetchall())

    assert await task == "done"
    assert len(entries(path)) == 1


async def no_room(store: TaskStore) -> Any:
    """Let the file grow by ten pages and no further; return its connection."""
    assert store._core is not None
    assert store._core.writer is not None
    connection = store._core.writer._connection
    assert connection is not None
    pages = await connection.run(lambda raw: raw.execute("PRAGMA page_count").fetchone()[0])
    await connection.run(lambda raw: raw.execute(f"PRAGMA max_page_count={pages + 10}").fetchall())
    return connection


def no_database(folder: Path) -> Path:
    """Make a file that SQLite will not read."""
    other = folder / "notes.txt"
    other.write_text("no database " * 1000)
    return other


async def test_a_task_whose_completion_has_yet_to_run_when_it_returns_has_failed(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    def each(connection: TransactConnection) -> Iterator[int]:
        yield post(connection, "never")

    async def do(task: TaskContext) -> None:
        task.at_completion(lambda connection: each(connection))

    with pytest.raises(TaskFailed, match="plain function"):
        await run(store, session, do)
    assert entries(path) == []


async def test_what_is_no_plain_function_is_not_taken(store: TaskStore, session: SessionTasks) -> None:
    def each(connection: TransactConnection) -> Iterator[int]:
        yield post(connection, "never")

    async def later(connection: TransactConnection) -> AsyncIterator[int]:
        yield post(connection, "never")

    async def do(task: TaskContext) -> str:
        for wrong in (5, None, asyncio.sleep, each, later):
            with pytest.raises(InvalidArguments):
                task.at_completion(wrong)  # type: ignore[arg-type]
        return "goes on"

    assert await run(store, session, do) == "goes on"
