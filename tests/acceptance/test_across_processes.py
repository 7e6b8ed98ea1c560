"""What one process keeps, others await, follow, cancel and hand over; and while nothing happens nobody reads a table."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    HandleNotVisible,
    HandleRole,
    SessionTasks,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
)
from tests.acceptance import handoff_programs as programs
from tests.acceptance.handoff_programs import RUNTIME
from tests.acceptance.processes import Worker
from tests.runtime.support import event_types, rows, states, take


@pytest.fixture
async def other(start: Callable[..., Worker], path: Path) -> Worker:
    """Another process that has work."""
    worker = start(programs.stay_at_work, str(path))
    await worker.says("ready")
    return worker


@pytest.fixture
async def store(other: Worker, path: Path) -> AsyncIterator[TaskStore]:
    """A store of this process on the file of the other."""
    async with TaskStore(path, runtime=RUNTIME) as store:
        yield store


@pytest.fixture(params=["own", "connect"])
async def session(request: pytest.FixtureRequest, store: TaskStore, path: Path) -> AsyncIterator[SessionTasks]:
    """The other process's session, seen by a store that owns and by one that only makes requests."""
    if request.param == "own":
        yield await store.session("s1")
        return
    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        yield await outside.session("s1")


async def go(store: TaskStore) -> None:
    """Let the bodies of the other process go on."""
    await store.session("go")


def read_at(path: Path, handle: TaskHandle) -> str | None:
    """Read when an outcome was handed out through a handle."""
    [row] = rows(path, "SELECT read_at FROM handles WHERE handle_id = ?", handle.handle_id)
    found: str | None = row["read_at"]
    return found


# --- awaiting and following -----------------------------------------------------------------------------------------


@pytest.mark.long
async def test_the_result_of_another_processs_body_reaches_everybody_and_is_read_by_who_may_write(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    handle = await session.handle("gated")
    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reader:
        seen = await (await reader.session("s1")).handle("gated")
        waiting = asyncio.gather(*(one.wait(timeout=20) for one in (handle, seen)), seen.result(timeout=20))
        with pytest.raises(TimeoutError):
            await handle.result(timeout=0)

        await go(store)

        first, second, result = await waiting
    assert (first.state, first) == (TaskState.COMPLETED, second)
    assert result == [1, "desktop:s1"]
    assert read_at(path, handle) is None
    assert await handle.result(timeout=20) == result
    assert read_at(path, handle) is not None


async def test_the_events_of_another_processs_task_come_in_order_and_end_with_it(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    handle = await session.handle("gated")
    following = session.events(0, types=[EventType.PROGRESS, EventType.COMPLETED])

    async def follow() -> list[str]:
        return [str(event.type) async for event in handle.events()]

    story = asyncio.create_task(follow())
    await go(store)

    async with asyncio.timeout(20):
        assert await story == ["registered", "started", "progress", "completed"]
    assert [event.task_id for event in await take(following, 2)] == ["gated", "gated"]
    assert await story == event_types(path, handle.task_seq)


async def test_another_processs_task_is_observed_and_the_observers_await_is_its_own(
    store: TaskStore, path: Path
) -> None:
    watcher = await store.session("s9")

    seen = await watcher.observe("desktop:s1", "gated")

    assert (seen.role, await watcher.list()) == (HandleRole.OBSERVER, [])
    waiting = asyncio.create_task(seen.result(timeout=20))
    await go(store)
    assert await waiting == [1, "desktop:s1"]
    assert [row["role"] for row in rows(path, "SELECT role FROM handles WHERE read_at IS NOT NULL")] == ["observer"]


# --- cancelling -----------------------------------------------------------------------------------------------------


async def test_another_processs_body_is_asked_to_stop_and_is_cancelled_once_it_has(
    store: TaskStore, session: SessionTasks, other: Worker, path: Path
) -> None:
    cancelling = asyncio.create_task(session.cancel("clinging", "from outside"))
    assert (await other.says("asked"))[1] == "cancel"
    record = await session.get("clinging")
    assert (record.state, cancelling.done()) == (TaskState.CANCEL_REQUESTED, False)

    await go(store)

    record = await asyncio.wait_for(cancelling, 20)
    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, "from outside")
    assert f"pid {os.getpid()} " in str(record.cancel_requested_by)
    assert await other.says("stopped")
    assert event_types(path, record.task_seq) == ["registered", "started", "cancel_requested", "cancelled"]


async def test_a_body_sees_the_reason_that_another_process_gave_for_its_end(
    session: SessionTasks, other: Worker
) -> None:
    await session.cancel("clinging", "from outside", timeout=0)

    assert await other.says("asked") == ["asked", "cancel", "cancel_requested", "from outside"]


async def test_the_callback_is_called_in_the_process_that_registered_it(
    session: SessionTasks, other: Worker, path: Path
) -> None:
    record = await asyncio.wait_for(session.cancel("external", "from outside"), 20)

    assert (record.state, record.callback_error) == (TaskState.CANCELLED, None)
    assert await other.says("called") == ["called", "desktop:s1", "from outside"]
    assert [words for words in other.said if words[0] == "called"] == [["called", "desktop:s1", "from outside"]]


# --- handing over ---------------------------------------------------------------------------------------------------


async def test_a_body_goes_on_in_its_process_when_another_hands_it_over_and_completes_in_the_new_session(
    store: TaskStore, session: SessionTasks, other: Worker, path: Path
) -> None:
    handle = await session.handle("roaming")

    [moved] = await session.transfer("s2", ["roaming"])

    assert (str(moved.scope), moved.state) == ("desktop:s2", TaskState.RUNNING)
    assert await other.says("moved") == ["moved", "desktop:s2", "desktop:s2"]
    there = await store.session("s2")
    assert [record.id for record in await there.list()] == ["roaming"]
    await go(store)
    assert await (await there.handle("roaming")).result(timeout=20) == [1, "desktop:s2", None]
    # who waited in the other process since before is answered, too
    assert await other.says("result") == ["result", [1, "desktop:s2", None]]
    story = rows(path, "SELECT type, scope FROM events WHERE task_seq = ? ORDER BY seq", handle.task_seq)
    assert [(event["type"], event["scope"]) for event in story] == [
        ("registered", "desktop:s1"),
        ("started", "desktop:s1"),
        ("transferred", "desktop:s2"),
        ("completed", "desktop:s2"),
    ]


async def test_external_work_that_another_process_registered_is_cancelled_from_where_it_was_handed_to(
    store: TaskStore, session: SessionTasks, other: Worker
) -> None:
    await session.transfer("s2", ["external"])

    record = await asyncio.wait_for((await store.session("s2")).cancel("external", "from there"), 20)

    assert record.state is TaskState.CANCELLED
    assert await other.says("called") == ["called", "desktop:s2", "from there"]


async def test_a_handoff_of_another_processs_work_stops_what_is_not_kept_and_lets_the_rest_run(
    store: TaskStore, session: SessionTasks, other: Worker
) -> None:
    handoff = await session.handoff("s2", ["roaming"])

    assert [record.id for record in handoff.moved] == ["roaming"]
    assert states(handoff.cancelled) == ["cancel_requested"] * 3
    assert (await other.says("asked"))[1] == "cancel"
    assert (await other.says("called"))[1] == "desktop:s1"
    await go(store)
    assert await (await (await store.session("s2")).handle("roaming")).result(timeout=20) == [1, "desktop:s2", None]
    for task_id in ("clinging", "external"):
        assert (await (await session.handle(task_id)).wait(timeout=20)).state is TaskState.CANCELLED
    assert await session.handoff("s2", ["roaming"]) == handoff


async def test_two_processes_that_transfer_in_opposite_directions_do_not_deadlock_and_lose_nothing(
    start: Callable[..., Worker], path: Path
) -> None:
    rounds = 15
    async with TaskStore(path, runtime=RUNTIME) as store:
        here, there = await store.session("s1"), await store.session("s2")
        for number in range(3):
            await here.register(f"a{number}", TaskKind.OTHER)
            await there.register(f"b{number}", TaskKind.OTHER)
        ball = await here.register("ball", TaskKind.OTHER)
        both = [
            start(programs.pass_on, str(path), "a", "s1", "s2", rounds),
            start(programs.pass_on, str(path), "b", "s2", "s1", rounds),
        ]
        for worker in both:
            await worker.says("ready")

        await go(store)

        for worker in both:
            await worker.says("done")
        carried = [len([words for words in worker.said if words == ["carried"]]) for worker in both]
        ways = rows(
            path, "SELECT scope FROM events WHERE type = 'transferred' AND task_seq = ? ORDER BY seq", ball.task_seq
        )
        assert len(ways) == sum(carried)
        assert [way["scope"] for way in ways] == (["desktop:s2", "desktop:s1"] * rounds)[: len(ways)]
        assert (await ball.record()).scope == (there if len(ways) % 2 else here).scope
        moves = rows(path, "SELECT task_id, count(*) AS n FROM events WHERE type = 'transferred' GROUP BY task_id")
        assert {move["task_id"]: move["n"] for move in moves if move["task_id"] != "ball"} == {
            f"{name}{number}": rounds for name in "ab" for number in range(3)
        }
        # an odd number of ways: each set is where the other was
        found = [sorted(record.id for record in await one.list() if record.id != "ball") for one in (here, there)]
        assert found == [["b0", "b1", "b2"], ["a0", "a1", "a2"]]


async def test_what_one_process_has_read_no_other_can_hand_over(start: Callable[..., Worker], path: Path) -> None:
    async with TaskStore(path, runtime=RUNTIME) as store:
        session, there = await store.session("s1"), await store.session("s2")
        tasks = [await session.register(name, TaskKind.OTHER) for name in ("theirs", "ours", "nobody's")]
        for task in tasks:
            await session.complete(task.id, TaskState.COMPLETED, result=task.id)
        assert await tasks[1] == "ours"

        worker = start(programs.await_and_validate, str(path), "theirs", "ours")

        assert await worker.says("read") == ["read", "theirs"]
        assert await worker.says("missing") == ["missing", ["ours"]]
        with pytest.raises(HandleNotVisible) as caught:
            await session.transfer(there, tasks)
        assert caught.value.missing == (tasks[0].handle_id, tasks[1].handle_id)
        assert states(await session.validate_handles(["nobody's"])) == ["completed"]


# --- doing nothing --------------------------------------------------------------------------------------------------


async def test_while_nothing_happens_no_table_is_read_and_nothing_written(store: TaskStore, path: Path) -> None:
    """Others' commits are noticed by a number that SQLite keeps: everybody waits, and no connection asks for more."""

    def files() -> list[tuple[int, int]]:
        found = [Path(f"{path}{suffix}").stat() for suffix in ("", "-wal")]
        return [(one.st_size, one.st_mtime_ns) for one in found]

    said: list[str] = []

    async def listen(one: Any) -> None:
        await one._connection.run(lambda raw: raw.set_trace_callback(said.append))

    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reader:
        for core in (store._core, reader._core):
            assert core is not None
            await listen(core.reader)
            if core.writer is not None:
                await listen(core.writer)
        handles = [await one.handle("desktop:s1", "gated") for one in (store, reader)]
        waiting = asyncio.gather(*(handle.result(timeout=60) for handle in handles))
        following = asyncio.create_task(anext(store.events(types=[EventType.PROGRESS])))
        async with asyncio.timeout(20):
            # what the other process did as it started may still be on its way
            while True:
                said.clear()
                await asyncio.sleep(0.1)
                if set(said) <= {"PRAGMA data_version"}:
                    break
        said.clear()
        before = files()

        await asyncio.sleep(2.5)

        assert set(said) == {"PRAGMA data_version"}
        # hardly ever, either: nobody wrote, as the kernel would tell, if its notices are not all taken by others
        if all(core is not None and core.feed._stirs._descriptor >= 0 for core in (store._core, reader._core)):
            assert len(said) < 200
        assert files() == before
        # and nobody had fallen asleep
        await go(store)
        assert await waiting == [[1, "desktop:s1"]] * 2
        assert (await asyncio.wait_for(following, 20)).task_id == "gated"
