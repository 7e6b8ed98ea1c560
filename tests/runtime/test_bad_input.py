"""Each mistake has its own error, which names the thing and the next step, and leaves file and bodies as they were."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    DuplicateFunction,
    FunctionError,
    IdempotencyConflict,
    InvalidArguments,
    InvalidId,
    MonitorSpec,
    NotAStore,
    Recovery,
    SchemaTooNew,
    SchemaTooOld,
    Scope,
    SessionError,
    SessionTasks,
    StorageCorrupt,
    StorageError,
    StoreClosed,
    StoreError,
    TaskContext,
    TaskExists,
    TaskFailed,
    TaskKind,
    TaskNotFound,
    TaskState,
    TaskStore,
    UnknownFunction,
    UnknownSession,
)
from tests.runtime.support import RUNTIME, event_count, hold, rows


@pytest.fixture
async def undisturbed(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> AsyncIterator[None]:
    """A body runs meanwhile; afterwards the file has no event more, the body goes on, and the store still works."""
    running = await session.spawn(hold(started, release), id="running")
    await started.wait()
    count = event_count(path)
    yield
    assert event_count(path) == count
    assert (await running.record()).state is TaskState.RUNNING
    release.set()
    assert await running.result(timeout=5) is None


@pytest.fixture
def work(store: TaskStore) -> Callable[..., Awaitable[Any]]:
    """A registered function."""

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int, *, name: str = "x") -> int:
        return number

    return work


# --- tasks and sessions ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("operation", ["get", "handle", "cancel"])
async def test_an_unknown_task_is_not_found(session: SessionTasks, operation: str) -> None:
    with pytest.raises(TaskNotFound, match=r"'nobody'.*desktop:s1.*list\(\)") as caught:
        await getattr(session, operation)("nobody")
    assert caught.value.task_id == "nobody"
    assert isinstance(caught.value, LookupError)


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("operation", ["get", "handle"])
async def test_an_unknown_task_or_session_of_the_file_is_not_found(store: TaskStore, operation: str) -> None:
    with pytest.raises(TaskNotFound, match="'nobody'"):
        await getattr(store, operation)(Scope(RUNTIME, "s1"), "nobody")
    with pytest.raises(UnknownSession, match=r"'desktop:s404' is not in this file.*sessions?\("):
        await getattr(store, operation)(Scope(RUNTIME, "s404"), "nobody")
    with pytest.raises(UnknownSession, match="'other:s1'"):
        await getattr(store, operation)("other:s1", "nobody")


@pytest.mark.usefixtures("undisturbed")
async def test_a_live_id_is_taken(session: SessionTasks, work: Any) -> None:
    with pytest.raises(TaskExists, match=r"'running' is live.*await or cancel it, or choose another id") as caught:
        await session.spawn(work, 1, id="running")
    assert caught.value.task_id == "running"


@pytest.mark.usefixtures("undisturbed")
async def test_a_coroutine_that_is_refused_is_closed(session: SessionTasks) -> None:
    async def body() -> None: ...

    for bad, error in (({"id": "running"}, TaskExists), ({"id": ""}, InvalidId), ({"kind": "nonsense"}, ValueError)):
        coroutine = body()
        with pytest.raises(error):
            await session.spawn(coroutine, **bad)
        with pytest.raises(RuntimeError, match="cannot reuse"):
            await coroutine


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("bad", ["", "a\x00b", "line\nbreak", "\ud800", "x" * 257, "\x1b[31m", 5, None, "h-abc"])
async def test_an_id_that_cannot_be_stored_is_refused(session: SessionTasks, work: Any, bad: Any) -> None:
    if bad is not None:
        with pytest.raises(InvalidId):
            await session.spawn(work, 1, id=bad)
    if bad != "h-abc":
        for operation in (session.get, session.handle, session.cancel):
            with pytest.raises(InvalidId):
                await operation(bad)


@pytest.mark.parametrize("bad", ["", "a:b", "a\x00", "\ud800", "x" * 257])
async def test_a_runtime_that_cannot_be_stored_is_refused(path: Path, bad: str) -> None:
    with pytest.raises(InvalidId):
        TaskStore(path, runtime=bad)
    assert not path.exists()


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("bad", ["", "a\x00b", "\ud800", "x" * 257])
async def test_a_session_id_that_cannot_be_stored_is_refused(store: TaskStore, bad: str) -> None:
    with pytest.raises(InvalidId):
        await store.session(bad)


async def test_a_session_id_may_have_a_colon(store: TaskStore) -> None:
    session = await store.session("a:b")

    assert Scope.parse(str(session.scope)) == session.scope == Scope(RUNTIME, "a:b")


@pytest.mark.parametrize("bad", ["no-colon", ":s", "r:"])
async def test_a_scope_without_its_parts_is_refused(store: TaskStore, bad: str) -> None:
    with pytest.raises(InvalidId):
        await store.get(bad, "x")


# --- functions ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undisturbed")
async def test_a_function_that_is_not_registered_is_unknown(session: SessionTasks) -> None:
    async def stranger(task: TaskContext) -> None: ...

    with pytest.raises(UnknownFunction, match=r"'stranger'.*@store\.task"):
        await session.spawn(stranger)


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("bad", [None, "work", 5, lambda task: None])
async def test_what_is_no_function_is_unknown(session: SessionTasks, bad: Any) -> None:
    with pytest.raises((UnknownFunction, TypeError)):
        await session.spawn(bad)


async def test_an_unhashable_callable_is_unknown(session: SessionTasks) -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        async def __call__(self, task: TaskContext) -> None: ...

    with pytest.raises(FunctionError):
        await session.spawn(Unhashable())


async def test_two_functions_of_one_name_are_refused(store: TaskStore, work: Any) -> None:
    async def other(task: TaskContext) -> None: ...

    with pytest.raises(DuplicateFunction, match=r"'work'.*name="):
        store.task(recovery="rerun", name="work")(other)


async def test_what_cannot_be_a_task_is_refused(store: TaskStore) -> None:
    def not_async(task: TaskContext) -> None: ...

    async def no_context() -> None: ...

    async def unresolved(task: TaskContext, thing: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for bad, why in ((not_async, "async def"), (no_context, "TaskContext"), (unresolved, "Nowhere")):
        with pytest.raises(FunctionError, match=why):
            store.task(recovery="rerun")(bad)  # type: ignore[type-var]
    with pytest.raises(FunctionError, match="max_attempts"):
        store.task(recovery="rerun", max_attempts=0)(_fine)
    with pytest.raises(ValueError):
        store.task(recovery="sometimes")(_fine)  # type: ignore[arg-type]


async def _fine(task: TaskContext) -> None: ...


async def test_recovery_has_no_default(store: TaskStore) -> None:
    with pytest.raises(TypeError, match="recovery"):
        store.task()  # type: ignore[call-arg]


async def test_a_function_may_refer_to_itself_and_to_what_comes_later(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def countdown(task: TaskContext, number: int) -> int:
        if number == 0:
            return later
        got: Any = await (await session.spawn(countdown, number - 1))
        return got + 1

    later = 10

    assert await (await session.spawn(countdown, 2)) == 12


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1, 2), {}),
        (("many",), {}),
        ((1,), {"nmae": "x"}),
        ((1,), {"name": 5}),
        ((object(),), {}),
        ((float("nan"),), {}),
        ((2**70,), {"name": "\ud800"}),
    ],
)
async def test_arguments_that_do_not_fit_are_refused(
    session: SessionTasks, work: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArguments, match="'work'"):
        await session.spawn(work, *args, **kwargs)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    "value",
    [object(), float("inf"), {1: "a", "1": "b"}, "\ud800", _nested(100_000), lambda: None],
    ids=["object", "infinity", "keys", "surrogate", "depth", "function"],
)
async def test_arguments_that_are_not_json_are_refused(store: TaskStore, session: SessionTasks, value: Any) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def anything(task: TaskContext, value) -> None:  # type: ignore[no-untyped-def]
        ...

    with pytest.raises(InvalidArguments, match="'anything'"):
        await session.spawn(anything, value)


@pytest.mark.usefixtures("undisturbed")
async def test_a_coroutine_takes_no_arguments(session: SessionTasks) -> None:
    async def body() -> None: ...

    coroutine = body()
    with pytest.raises(InvalidArguments):
        await session.spawn(coroutine, 1)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await coroutine


@pytest.mark.parametrize(
    "value",
    [object(), {1, object()}, float("nan"), {"a": [float("-inf")]}, "\udfff", _nested(100_000)],
    ids=["object", "set", "nan", "infinity", "surrogate", "depth"],
)
async def test_a_result_that_is_not_json_fails_the_task(session: SessionTasks, value: Any) -> None:
    async def body() -> Any:
        return value

    task = await session.spawn(body(), id="t")

    with pytest.raises(TaskFailed, match=r"'t'.*ResultNotSerializable.*not JSON"):
        await task


@pytest.mark.usefixtures("undisturbed")
async def test_options_without_sense_are_refused(path: Path, session: SessionTasks, work: Any) -> None:
    with pytest.raises(ValueError, match="durability"):
        TaskStore(path, runtime=RUNTIME, durability="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_running"):
        TaskStore(path, runtime=RUNTIME, max_running=0)
    for wrong in (
        {"max_running": "many"},
        {"cancel_grace": -1},
        {"lock_timeout": float("nan")},
        {"callback_timeout": "1"},
    ):
        options: dict[str, Any] = wrong
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TaskStore(path, runtime=RUNTIME, **options)
    with pytest.raises(ValueError):
        await session.spawn(work, 1, cancel_policy="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        await session.list(limit=-1)
    with pytest.raises(ValueError):
        await session.list(states=["sleeping"])  # type: ignore[list-item]


# --- use before open and after close --------------------------------------------------------------------------------


async def test_a_store_that_is_not_open_says_so(path: Path) -> None:
    store = TaskStore(path, runtime=RUNTIME)
    operations: list[Callable[[], Any]] = [
        lambda: store.session("s1"),
        lambda: store.sessions(),
        lambda: store.get("desktop:s1", "x"),
        lambda: store.list(),
        lambda: store.count(),
        lambda: store.handle("desktop:s1", "x"),
        lambda: store.recover(),
    ]
    for operation in operations:
        with pytest.raises(StoreClosed, match=r"not open.*async with"):
            await operation()
    with pytest.raises(StoreClosed):
        store.events()
    assert not path.exists()
    await store.close()


async def test_a_store_that_was_closed_says_so(new: Callable[..., TaskStore], path: Path) -> None:
    store = new()
    async with store:
        session = await store.session("s1")

        @store.task(recovery=Recovery.RERUN)
        async def work(task: TaskContext) -> None: ...

        async def body() -> None: ...

        task = await session.spawn(work, id="x")
        await task
    count = event_count(path)
    coroutine = body()
    operations: list[Callable[[], Any]] = [
        lambda: store.session("s1"),
        lambda: store.list(),
        lambda: store.recover(),
        lambda: session.spawn(work),
        lambda: session.spawn(coroutine),
        lambda: session.get("x"),
        lambda: session.list(),
        lambda: session.cancel("x"),
        lambda: session.handle("x"),
        lambda: task.result(),
        lambda: task.wait(),
        lambda: task.cancel(),
        lambda: task.record(),
    ]
    for operation in operations:
        with pytest.raises(StoreClosed):
            await operation()
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await coroutine
    assert event_count(path) == count


async def test_opening_twice_is_refused_and_the_store_goes_on(store: TaskStore, session: SessionTasks) -> None:
    with pytest.raises(StoreError, match="open already"):
        await store.open()

    assert await session.list() == []


# --- files ----------------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> dict[str, str]:
    """
    Read every file of a folder, to the byte.

    A reader of a file in WAL mode may leave an empty ``-wal`` and an index of it, the ``-shm``, which say nothing.
    """
    return {
        str(found.relative_to(folder)): hashlib.sha256(found.read_bytes()).hexdigest()
        for found in sorted(folder.rglob("*"))
        if found.is_file() and found.suffix != ".db-shm" and found.stat().st_size
    }


@pytest.fixture
async def quiet(path: Path, new: Callable[..., TaskStore]) -> Path:
    """A store file that was closed well."""
    async with new() as store:
        await store.session("s1")
    return path


def _not_sqlite(path: Path) -> None:
    path.write_bytes(b"this is no database at all, but it is long enough to be read as one" * 20)


def _other_application(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE tasks (id)")
        connection.execute("PRAGMA application_id=99")
    connection.close()


def _plain_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE tasks (id)")
    connection.close()


@pytest.mark.parametrize("make", [_not_sqlite, _other_application, _plain_sqlite])
@pytest.mark.parametrize("access", ["own", "read", "request"])
async def test_a_file_that_is_no_store_is_refused_and_left_as_it_was(
    tmp_path: Path, make: Callable[[Path], None], access: str
) -> None:
    path = tmp_path / "other.db"
    make(path)
    before = fingerprint(tmp_path)

    with pytest.raises(NotAStore, match=r"other\.db"):
        await _made(path, access).open()

    assert fingerprint(tmp_path) == before


def _made(path: Path, access: str) -> TaskStore:
    match access:
        case "read":
            return TaskStore.open_readonly(path)
        case "request":
            return TaskStore.connect(path, runtime=RUNTIME)
        case _:
            return TaskStore(path, runtime=RUNTIME)


@pytest.mark.parametrize("access", ["own", "read", "request"])
async def test_a_file_from_a_newer_version_is_refused_and_left_as_it_was(
    quiet: Path, tmp_path: Path, access: str
) -> None:
    with sqlite3.connect(quiet) as connection:
        connection.execute("UPDATE lash_store_version SET version_num = '9999'")
    connection.close()
    before = fingerprint(tmp_path)

    with pytest.raises(SchemaTooNew, match=r"revision 9999.*upgrade the package"):
        await _made(quiet, access).open()

    assert fingerprint(tmp_path) == before
    with sqlite3.connect(quiet) as connection:
        connection.execute("UPDATE lash_store_version SET version_num = '0001'")
    connection.close()


@pytest.mark.parametrize("access", ["read", "request"])
async def test_an_empty_file_is_not_upgraded_by_who_only_reads_or_asks(tmp_path: Path, access: str) -> None:
    path = tmp_path / "empty.db"
    path.touch()

    with pytest.raises(SchemaTooOld, match=r"open it once with TaskStore"):
        await _made(path, access).open()

    assert path.stat().st_size == 0


@pytest.mark.parametrize("damage", ["middle", "truncated", "empty"])
@pytest.mark.parametrize("access", ["own", "read", "request"])
async def test_a_damaged_file_is_refused_and_left_as_it_was(tmp_path: Path, damage: str, access: str) -> None:
    path = tmp_path / "hurt.db"
    async with TaskStore(path, runtime=RUNTIME) as store:
        await store.session("s1")
    for side in tmp_path.glob("hurt.db?*"):
        shutil.rmtree(side) if side.is_dir() else side.unlink()
    whole = path.read_bytes()
    match damage:
        case "middle":
            path.write_bytes(whole[:100] + b"\xff" * 8_000 + whole[8_100:])
        case "truncated":
            path.write_bytes(whole[:4096])
        case "empty":
            path.write_bytes(b"")
            Path(f"{path}-wal").write_bytes(whole[:2000])
    before = fingerprint(tmp_path)

    with pytest.raises(StorageCorrupt, match=r"hurt\.db.*restore a backup"):
        await _made(path, access).open()

    assert fingerprint(tmp_path) == before


def _put(path: Path, at: int, content: bytes) -> None:
    # in a process of its own: to close a file drops all locks of a process on it, and with them those of its store
    program = f"import sys; file = open({str(path)!r}, 'r+b'); file.seek({at}); file.write(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-S", "-c", program], input=content, check=True)


async def test_rows_that_a_hand_made_unreadable_are_named_and_compared_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "edited.db"
    store = TaskStore(path, runtime=RUNTIME)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> int:
        return number

    async with store:
        session = await store.session("s1")
        await (await session.spawn(work, 1, id="gone")).result(timeout=5)
        await store.prune()
        keyed = await session.spawn(work, 1, id="keyed", idempotency_key="k")
        await keyed.result(timeout=5)
        await session.register("job", TaskKind.OTHER)
        await session.complete("job", "completed", result={"a": 1})
        there = await store.session("s2")
        await session.register("moves", TaskKind.OTHER)
        await session.handoff(there, ["moves"], id="ho-1")
        with closing(sqlite3.connect(path)) as hand, hand:
            hand.execute("PRAGMA ignore_check_constraints = 1")
            hand.execute("DROP TRIGGER tasks_terminal_is_final")
            hand.execute("UPDATE tasks SET result = '{', arguments = '{'")
            hand.execute("UPDATE tombstones SET pruned_at = ?", ["yesterday" * 100_000])
            hand.execute("UPDATE handoffs SET kept = '{'")

        with pytest.raises(StorageError, match=r"the row of task #3 cannot be read .*see lash-store doctor"):
            await session.complete("job", "completed", result={"a": 1})
        with pytest.raises(StorageError, match=r"the result of task #3 cannot be read"):
            await (await session.handle("job")).result(timeout=5)
        with pytest.raises(StorageError, match=r"handoff 'ho-1' cannot be read"):
            await session.handoff(there, ["moves"], id="ho-1")
        with pytest.raises(IdempotencyConflict):
            await session.spawn(work, 1, id="keyed", idempotency_key="k")
        events = aiter(store.events(after=0))
        with pytest.raises(StorageError, match=r"the tombstone behind event 0 .*see lash-store doctor") as told:
            await anext(events)
        assert len(str(told.value)) < 500
        # what was kept is told all the same
        assert [(await anext(events)).task_id for _ in range(2)] == [None, "keyed"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("UPDATE steps SET value = '{' WHERE kind = 'step'", "StorageError: step 'fetch' cannot be read"),
        (
            "UPDATE steps SET value = '{' WHERE kind = 'sleep'",
            "StorageError: the sleep '#1.1' of task #1 cannot be read",
        ),
        ("UPDATE signals SET payload = '{'", "StorageError: signal #1 cannot be read"),
        ("UPDATE steps SET value = '{' WHERE kind = 'checkpoint'", "InvalidArguments: the checkpoint of task 'long'"),
        ("UPDATE tasks SET arguments = '{'", "InvalidArguments: the stored arguments do not fit"),
    ],
)
async def test_a_body_is_told_of_what_it_remembered_and_a_hand_made_unreadable(
    tmp_path: Path, edit: str, told: str
) -> None:
    path = tmp_path / "edited.db"
    asleep = asyncio.Event()

    def made() -> tuple[TaskStore, Any]:
        store = TaskStore(path, runtime=RUNTIME)

        @store.task(recovery=Recovery.RERUN, name="long")
        async def long(task: TaskContext, number: int) -> None:
            if task.attempt == 1:
                await task.save(number)
            await task.step("fetch", lambda: 1)
            await task.signal("go")
            asleep.set()
            await task.sleep(3600)

        return store, long

    store, long = made()
    async with store:
        handle = await (await store.session("s1")).spawn(long, 1, id="long")
        await handle.signal("go", {"a": 1})
        await asyncio.wait_for(asleep.wait(), 5)
        async with asyncio.timeout(5):
            while not rows(path, "SELECT 1 FROM steps WHERE kind = 'sleep'"):
                await asyncio.sleep(0.01)
    with closing(sqlite3.connect(path)) as hand, hand:
        hand.execute("PRAGMA ignore_check_constraints = 1")
        assert hand.execute(edit).rowcount == 1

    store, _ = made()
    async with store:
        with pytest.raises(TaskFailed) as caught:
            await (await (await store.session("s1")).handle("long")).result(timeout=5)
    assert told in str(caught.value)


async def test_a_row_that_a_broken_page_made_impossible_is_named_by_the_recovery_it_stops(tmp_path: Path) -> None:
    path = tmp_path / "edited.db"

    def made() -> tuple[TaskStore, Any]:
        store = TaskStore(path, runtime=RUNTIME)

        @store.task(recovery=Recovery.RERUN, name="long")
        async def long(task: TaskContext) -> None:
            await task.signal("never")

        return store, long

    store, long = made()
    async with store:
        await (await store.session("s1")).spawn(long, id="long")
    # no statement writes that where NOT NULL stands
    with closing(sqlite3.connect(path)) as hand, hand:
        [(as_it_was,)] = hand.execute("SELECT sql FROM sqlite_schema WHERE name = 'tasks'")
        hand.execute("PRAGMA writable_schema = 1")
        define = "UPDATE sqlite_schema SET sql = ? WHERE name = 'tasks'"
        hand.execute(define, [as_it_was.replace("attempts_spent INTEGER NOT NULL", "attempts_spent INTEGER")])
    with closing(sqlite3.connect(path)) as hand, hand:
        assert hand.execute("UPDATE tasks SET attempts_spent = NULL").rowcount == 1
        hand.execute("PRAGMA writable_schema = 1")
        hand.execute(define, [as_it_was])

    store, _ = made()
    with pytest.raises(StorageError, match=r"the row of task #1 cannot be read .*see lash-store doctor"):
        await store.open()
    async with TaskStore.open_readonly(path) as reader:
        assert [finding.code for finding in (await reader.check()).findings] == ["damaged", "fold"]


@pytest.mark.parametrize("name", ["[" * 200_000, "x:" + "y" * 300_000], ids=["no scope", "too long"])
async def test_a_session_that_a_hand_gave_a_name_without_end_is_named_by_its_beginning(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "agent.db"
    async with TaskStore(path, runtime=RUNTIME) as store:
        await store.session("s1")
    with closing(sqlite3.connect(path)) as hand, hand:
        hand.execute("PRAGMA ignore_check_constraints = 1")
        hand.execute("UPDATE sessions SET scope = ?", [name])

    async with TaskStore.open_readonly(path) as reader:
        with pytest.raises(
            StorageError, match=r"^the row of session '.*… cannot be read .*see lash-store doctor$"
        ) as told:
            await reader.sessions()
    assert len(str(told.value)) < 600


async def test_a_session_of_many_runtimes_is_asked_for_by_a_message_of_some_length(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    for runtime in ("a", "b"):
        async with TaskStore(path, runtime=runtime) as store:
            await store.session("s1")
    async with TaskStore.open_readonly(path) as reader:
        with pytest.raises(SessionError, match=r"^session 's1' is in several runtimes, a:s1, b:s1: give .* runtime=$"):
            await reader.session("s1")

    with closing(sqlite3.connect(path)) as hand, hand:
        hand.executemany(
            "INSERT INTO sessions (scope, runtime, session_id, opened_at) SELECT ?1 || ':s1', ?1, session_id, opened_at"
            " FROM sessions WHERE scope = 'a:s1'",
            [(f"r{number}",) for number in range(10_000)],
        )
    async with TaskStore.open_readonly(path) as reader:
        with pytest.raises(SessionError, match=r"several runtimes, a:s1, b:s1, r0:s1.*…: give .* runtime=$") as told:
            await reader.session("s1")
    assert len(str(told.value)) < 600


async def test_a_prune_names_the_row_whose_session_a_hand_made_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        await store.session("s2", parent=session)
        handle = await session.register("helper", TaskKind.SUBAGENT, child_session_id="s2")
        await session.cancel("helper", timeout=0)
        await session.complete("helper", "cancelled")
        with closing(sqlite3.connect(path)) as hand, hand:
            hand.execute("PRAGMA ignore_check_constraints = 1")
            hand.execute("DROP TRIGGER tasks_terminal_is_final")
            hand.execute("UPDATE tasks SET child_session_id = ?", ["y" * 300])

        with pytest.raises(
            StorageError, match=rf"^the row of task #{handle.task_seq} cannot be read .*lash-store doctor$"
        ):
            await store.prune(older_than=0)


async def test_who_waits_for_an_end_that_damage_keeps_from_the_file_is_told(quiet: Path) -> None:
    with closing(sqlite3.connect(quiet)) as connection:
        # the ends of all tasks are in it, and no other event is
        [(page, size)] = connection.execute(
            "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'events_one_end'"
        )
    sound = quiet.read_bytes()[(page - 1) * size : page * size]
    _put(quiet, (page - 1) * size, bytes(size))
    store = TaskStore(quiet, runtime=RUNTIME)

    @store.task(recovery=Recovery.RERUN)
    async def quick(task: TaskContext) -> int:
        return 1

    await store.open()
    session = await store.session("s1")
    handle = await session.spawn(quick, id="quick")
    for wait in (handle.result, handle.result, handle.wait):
        with pytest.raises(StorageCorrupt, match=r"damaged.*restore a backup"):
            await wait(timeout=5)
    with pytest.raises(StorageCorrupt, match=r"damaged.*restore a backup"):
        await asyncio.wait_for(handle.result(), 5)
    _put(quiet, (page - 1) * size, sound)

    assert await handle.result(timeout=5) == 1
    await store.close()


async def test_who_waits_for_a_monitor_whose_lines_damage_keeps_from_the_file_is_told(quiet: Path) -> None:
    with closing(sqlite3.connect(quiet)) as connection:
        [(page, size)] = connection.execute(
            "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'updates'"
        )
    sound = quiet.read_bytes()[(page - 1) * size : page * size]
    _put(quiet, (page - 1) * size, bytes(size))
    async with TaskStore(quiet, runtime=RUNTIME) as store:
        session = await store.session("s1")
        handle = await session.start_monitor(MonitorSpec(id="m", command="echo said; sleep 60", shell=True))
        with pytest.raises(StorageCorrupt, match=r"damaged.*restore a backup"):
            await asyncio.wait_for(handle.wait(), 10)
        _put(quiet, (page - 1) * size, sound)


@pytest.mark.parametrize("what", ["end", "step"])
async def test_who_waits_for_what_no_counter_has_a_number_for_is_told(quiet: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "edited.db"
    shutil.copyfile(quiet, path)
    with closing(sqlite3.connect(path)) as hand, hand:
        # there are numbers for two more events: its birth, and its start
        hand.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'events'", [2**63 - 3])
    store = TaskStore(path, runtime=RUNTIME)

    @store.task(recovery=Recovery.RERUN)
    async def quick(task: TaskContext) -> str:
        return "A" if what == "end" else await task.step("look", str.upper, "a")

    await store.open()
    handle = await (await store.session("s1")).spawn(quick, id="quick")
    for wait in (handle.result, handle.wait):
        with pytest.raises(StorageError, match=r"would pass what SQLite holds.*edited by hand"):
            await asyncio.wait_for(wait(), 5)
    # an end is tried again for as long as the store is open; a step ends with it
    with pytest.warns(ResourceWarning, match="1 bodies did not end") if what == "end" else nullcontext():
        await store.close(timeout=0.1 if what == "end" else 10)


@pytest.mark.parametrize("access", ["own", "read", "request"])
async def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, access: str) -> None:
    with pytest.raises(StorageError, match=r"folder .*nowhere does not exist: create it"):
        await _made(tmp_path / "nowhere" / "agent.db", access).open()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("access", ["read", "request"])
async def test_who_only_reads_or_asks_makes_no_file(path: Path, access: str) -> None:
    with pytest.raises(StorageError, match=r"agent\.db does not exist"):
        await _made(path, access).open()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("bad", ["", ":memory:", "file:x.db?mode=memory", "a\x00b", b"bytes.db"])
async def test_what_is_no_path_is_refused(bad: Any) -> None:
    with pytest.raises(StorageError):
        TaskStore(bad, runtime=RUNTIME)


async def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="not a regular file"):
        await TaskStore(tmp_path, runtime=RUNTIME).open()


async def test_a_symbolic_link_is_refused_for_writing(quiet: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(quiet)

    with pytest.raises(StorageError, match=r"symbolic link.*agent\.db"):
        await TaskStore(link, runtime=RUNTIME).open()


async def test_a_file_with_a_second_name_is_refused_for_writing(quiet: Path, tmp_path: Path) -> None:
    os.link(quiet, tmp_path / "second.db")

    with pytest.raises(StorageError, match="2 hard links"):
        await TaskStore(quiet, runtime=RUNTIME).open()


_UNPRIVILEGED = """
import asyncio, os, sys, tempfile
from pathlib import Path
from lash_store import StorageError, TaskStore

folder, uid = Path(sys.argv[1]), int(sys.argv[2])

async def warm():
    with tempfile.TemporaryDirectory() as other:
        async with TaskStore(Path(other) / "warm.db", runtime="desktop"):
            pass

async def main():
    if uid:
        # everything is imported by now: this user may not be able to read the interpreter's files
        os.setgroups([])
        os.setuid(uid)
    for name in ("new.db", "old.db"):
        try:
            await TaskStore(folder / name, runtime="desktop").open()
        except StorageError as error:
            print(name, str(error))
        else:
            print(name, "opened")

asyncio.run(warm())
asyncio.run(main())
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
async def test_a_folder_that_may_not_be_written_is_refused() -> None:
    nobody = 65534 if os.geteuid() == 0 else 0
    folder = Path(tempfile.mkdtemp())
    try:
        async with TaskStore(folder / "old.db", runtime=RUNTIME):
            pass
        if nobody:
            for found in (folder, *folder.rglob("*")):
                os.chown(found, nobody, nobody)
        folder.chmod(0o500)
        before = fingerprint(folder)

        done = subprocess.run(
            [sys.executable, "-c", _UNPRIVILEGED, str(folder), str(nobody)], capture_output=True, text=True, timeout=60
        )

        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["new.db", "old.db"], done.stderr
        assert "cannot be created" in lines[0]
        assert "may not be written: change the permissions" in lines[1]
        assert fingerprint(folder) == before
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


async def test_nothing_is_written_by_mistakes_in_a_whole_session(
    store: TaskStore, session: SessionTasks, work: Any, path: Path
) -> None:
    with pytest.raises(InvalidArguments):
        await session.spawn(work)
    with pytest.raises(TaskNotFound):
        await session.get("x")

    assert rows(path, "SELECT * FROM tasks") == []
    assert await (await session.spawn(work, 3)) == 3
