"""Many stores in one process, and the two ways of opening a file without owning it."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    Recovery,
    Scope,
    SessionError,
    SessionTasks,
    StoreReadOnly,
    TaskContext,
    TaskFilter,
    TaskNotFound,
    TaskState,
    TaskStore,
    UnknownSession,
)
from tests.acceptance import programs
from tests.acceptance.processes import Worker, workers
from tests.runtime.support import RUNTIME, check_file, event_count, hold, next_event, rows, take


async def noop() -> str:
    """A body that ends at once."""
    return "done"


# --- many stores ----------------------------------------------------------------------------------------------------


async def test_stores_on_several_files_live_beside_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.db" for number in range(4)]
    stores = [TaskStore(path, runtime=RUNTIME) for path in paths]
    for store in stores:
        await store.open()

    tasks = [await (await store.session("s1")).spawn(noop(), id="t") for store in stores]
    assert await asyncio.gather(*tasks) == ["done"] * 4

    for store in stores:
        await store.close()
    for path in paths:
        check_file(path)
        assert len(rows(path, "SELECT * FROM tasks")) == 1


async def test_several_stores_on_one_file_each_run_their_own(opened: Callable[..., Any], path: Path) -> None:
    stores = [await opened(), await opened(), await opened(runtime="other")]
    sessions = [await store.session(f"s{number}") for number, store in enumerate(stores)]

    spawned = await asyncio.gather(*(session.spawn(noop()) for session in sessions for _ in range(10)))
    assert await asyncio.gather(*spawned) == ["done"] * 30

    owners = {row["owner_id"]: row["n"] for row in rows(path, "SELECT owner_id, count(*) n FROM tasks GROUP BY 1")}
    assert owners == {1: 10, 2: 10, 3: 10}


async def test_closing_one_store_of_a_file_leaves_the_others_at_work(
    new: Callable[..., TaskStore], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    one, two = new(), new()
    await one.open()
    await two.open()
    task = await (await one.session("s1")).spawn(hold(started, release))
    await started.wait()

    await two.close()

    # a shell that opens the file now must not take the -wal away from under the first
    shell = sqlite3.connect(path)
    assert shell.execute("SELECT state FROM live_tasks").fetchall() == [("running",)]
    shell.close()
    release.set()
    assert await task is None
    await one.close()
    assert rows(path, "SELECT state FROM tasks") == [{"state": "completed"}]


async def test_a_task_of_one_store_is_awaited_and_cancelled_through_another(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    one, two = await opened(), await opened()
    first = await (await one.session("s1")).spawn(hold(started, release), id="a")
    await started.wait()
    second = await (await one.session("s1")).spawn(asyncio.sleep(3600), id="b")
    waiter = asyncio.create_task((await two.handle("desktop:s1", "a")).result(timeout=10))

    record = await (await two.session("s1")).cancel("b", "from the other")
    release.set()

    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "from the other")
    assert await waiter is None
    assert (await second.record()) == record
    assert await first is None


async def test_an_id_that_is_live_in_another_store_is_taken(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    one, two = await opened(), await opened()
    await (await one.session("s1")).spawn(hold(started, release), id="a")

    with pytest.raises(Exception, match="'a' is live"):
        await (await two.session("s1")).spawn(noop(), id="a")
    release.set()


async def test_a_function_belongs_to_the_store_that_registered_it(opened: Callable[..., Any]) -> None:
    one, two = await opened(), await opened()

    @one.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def work(task: TaskContext) -> str:
        return "one"

    with pytest.raises(LookupError, match="'work'"):
        await (await two.session("s1")).spawn(work)
    assert await (await (await one.session("s1")).spawn(work)) == "one"


async def test_a_store_that_was_closed_opens_again_as_a_new_owner(new: Callable[..., TaskStore], path: Path) -> None:
    store = new()
    for number in range(1, 4):
        async with store:
            session = await store.session("s1")
            task = await session.spawn(noop(), id="t")
            assert await task == "done"
            assert (await task.record()).owner_id == number

    assert [row["end"] for row in rows(path, 'SELECT "end" FROM owners')] == ["closed"] * 3


# --- open_readonly --------------------------------------------------------------------------------------------------


def writes(store: TaskStore, session: SessionTasks, handle: Any) -> list[Callable[[], Awaitable[Any]]]:
    """Return everything that would write."""
    return [
        lambda: session.spawn(noop_once()),
        lambda: session.cancel("live"),
        lambda: handle.cancel(),
        lambda: store.recover(),
    ]


def noop_once() -> Any:
    """Return a coroutine that the store must close."""
    return noop()


async def test_a_reader_beside_a_live_owner_sees_everything_and_may_change_nothing(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    await (await session.spawn(noop(), id="done"))
    await session.spawn(hold(started, release), id="live")
    await started.wait()

    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reader:
        mine = await reader.session("s1")
        count = event_count(path)
        assert [record.id for record in await reader.list()] == ["done", "live"]
        assert await reader.count(TaskFilter(include_terminal=False)) == 1
        assert await (await reader.handle("desktop:s1", "done")) == "done"
        assert (await mine.get("live")).state is TaskState.RUNNING
        assert [one.scope.session_id for one in await reader.sessions()] == ["s1"]
        assert len(await take(reader.events(0), 6)) == 6
        live = await mine.handle("live")
        for write in writes(reader, mine, live):
            with pytest.raises(StoreReadOnly, match=r"read-only|connect"):
                await write()
        with pytest.raises(UnknownSession):
            await reader.session("s2")
        assert event_count(path) == count

        release.set()
        assert await live.result(timeout=5) is None


async def test_a_reader_without_a_runtime_finds_the_one_session_of_an_id(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    await (await session.spawn(noop(), id="t"))

    async with TaskStore.open_readonly(path) as reader:
        assert (await reader.get("desktop:s1", "t")).state is TaskState.COMPLETED
        assert (await (await reader.session("s1")).get("t")).state is TaskState.COMPLETED
        with pytest.raises(UnknownSession, match="'nobody'"):
            await reader.session("nobody")
        async with TaskStore(path, runtime="elsewhere") as other:
            await other.session("s1")
        with pytest.raises(SessionError, match="desktop:s1, elsewhere:s1"):
            await reader.session("s1")


@pytest.mark.parametrize("ask", ["list", "count"])
async def test_a_filter_that_names_a_session_which_is_not_there_says_so(store: TaskStore, ask: str) -> None:
    with pytest.raises(UnknownSession, match="desktop:nobody"):
        await getattr(store, ask)(TaskFilter(scope=Scope("desktop", "nobody")))


async def test_a_filter_that_names_an_empty_session_finds_nothing(store: TaskStore, session: SessionTasks) -> None:
    wanted = TaskFilter(scope=session.scope)

    assert (await store.list(wanted), await store.count(wanted)) == ([], 0)


async def test_a_reader_of_a_quiet_file_changes_neither_the_file_nor_its_wal(
    new: Callable[..., TaskStore], path: Path
) -> None:
    async with new() as store:
        await (await (await store.session("s1")).spawn(noop(), id="t"))
    before = path.read_bytes()

    async with TaskStore.open_readonly(path) as reader:
        assert await (await reader.handle("desktop:s1", "t")) == "done"
        assert (await reader.get("desktop:s1", "t")).result == "done"

    assert path.read_bytes() == before
    wal = Path(f"{path}-wal")
    assert not wal.exists() or wal.stat().st_size == 0


async def test_a_reader_of_a_copy_without_its_side_files_reads_it(
    new: Callable[..., TaskStore], path: Path, tmp_path: Path
) -> None:
    async with new() as store:
        await (await (await store.session("s1")).spawn(noop(), id="t"))
    copy = tmp_path / "copies" / "copy.db"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    copy.chmod(0o400)

    async with TaskStore.open_readonly(copy) as reader:
        assert [record.id for record in await reader.list()] == ["t"]

    assert copy.read_bytes() == path.read_bytes()


async def test_a_reader_leaves_the_wal_of_a_dead_owner_as_it_was(start: Callable[..., Worker], path: Path) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["count", "t", {}, [10_000]]], {})
    worker.wait_for("saved", "t", 3)
    worker.kill()
    wal = Path(f"{path}-wal")
    before = path.read_bytes(), wal.read_bytes()
    assert before[1]

    async with TaskStore.open_readonly(path) as reader:
        assert (await reader.get("desktop:s1", "t")).state is TaskState.RUNNING

    assert (path.read_bytes(), wal.read_bytes()) == before


# --- connect --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start worker processes."""
    with workers() as start:
        yield start


async def test_a_request_cancels_the_task_of_a_live_owner_in_this_process(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, path: Path
) -> None:
    task = await session.spawn(hold(started, asyncio.Event()), id="t")
    await started.wait()

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:
        record = await (await requests.session("s1")).cancel("t", "by request", timeout=10)

    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "by request")
    assert await task.wait() == record


async def test_a_request_cancels_the_task_of_a_live_owner_in_another_process(
    start: Callable[..., Worker], path: Path
) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "t", {"cancel_policy": "abort_local"}, []]], {})
    await worker.says("body", "t")

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:
        record = await (await requests.session("s1")).cancel("t", timeout=10)

    assert record.state is TaskState.CANCELLED
    worker.kill()


async def test_a_request_ends_the_task_of_a_dead_owner(start: Callable[..., Worker], path: Path) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "t", {}, []], ["once", "o", {}, []]], {})
    worker.wait_for("body", "o")
    worker.kill()

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:
        session = await requests.session("s1")
        for task_id in ("t", "o"):
            assert (await session.cancel(task_id, timeout=10)).state is TaskState.CANCELLED


async def test_a_request_is_finished_when_the_owner_dies_meanwhile(start: Callable[..., Worker], path: Path) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["stubborn", "t", {"cancel_policy": "abort_local"}, []]], {})
    await worker.says("body", "t")

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:
        session = await requests.session("s1")
        cancelling = asyncio.create_task(session.cancel("t", timeout=10))
        await worker.says("swallowed", "t")
        assert (await session.get("t")).state is TaskState.CANCEL_REQUESTED
        worker.kill()
        assert (await cancelling).state is TaskState.CANCELLED


async def test_a_request_of_a_stopped_owner_stands_and_is_not_finished_for_it(
    start: Callable[..., Worker], path: Path
) -> None:
    import signal

    worker = start(programs.spawn_and_stay, str(path), [["forever", "t", {"cancel_policy": "abort_local"}, []]], {})
    await worker.says("body", "t")
    worker.signal(signal.SIGSTOP)

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:
        handle = await requests.handle("desktop:s1", "t")
        assert (await handle.cancel("later", timeout=0.6)).state is TaskState.CANCEL_REQUESTED
        worker.signal(signal.SIGCONT)
        assert (await handle.wait(timeout=10)).state is TaskState.CANCELLED
    worker.kill()


async def test_a_request_creates_nothing_and_owns_nothing(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    await session.spawn(hold(started, release), id="live")
    count = event_count(path)

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:

        @requests.task(recovery=Recovery.RERUN)
        async def work(task: TaskContext) -> None: ...

        mine = await requests.session("s1")
        for create in (lambda: mine.spawn(work), lambda: mine.spawn(noop_once()), requests.recover):
            with pytest.raises(StoreReadOnly, match="TaskStore"):
                await create()  # type: ignore[operator]
        with pytest.raises(UnknownSession):
            await requests.session("s2")
        with pytest.raises(TaskNotFound):
            await mine.cancel("nobody")
        assert len(rows(path, "SELECT * FROM owners")) == 1
        assert event_count(path) == count
    assert (await session.get("live")).state is TaskState.RUNNING
    release.set()


async def test_a_request_store_follows_events_and_results(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    await session.spawn(hold(started, release), id="t")
    await started.wait()

    async with TaskStore.connect(path, runtime=RUNTIME) as requests:
        release.set()
        assert await (await requests.handle("desktop:s1", "t")).result(timeout=5) is None
        assert (await next_event(requests, EventType.COMPLETED)).task_id == "t"
