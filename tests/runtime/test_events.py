"""The change feed: everything committed after a cursor, in order, once, from this process and from others."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    InvalidId,
    Recovery,
    SessionTasks,
    StoreClosed,
    TaskContext,
    TaskEvent,
    TaskKind,
    TaskStore,
)
from lash_store.lifecycle import TERMINAL_EVENTS
from tests.acceptance import programs
from tests.acceptance.processes import Worker, workers
from tests.runtime.support import check_file, hold, next_event, rows, take


async def noop() -> None:
    """A body that ends at once."""


def seqs(path: Path) -> list[int]:
    """Return the cursor of every event in the table."""
    return [row["seq"] for row in rows(path, "SELECT seq FROM events ORDER BY seq")]


async def busy(session: SessionTasks, tasks: int) -> None:
    """Run some tasks, three events each."""
    await asyncio.gather(*[await session.spawn(noop()) for _ in range(tasks)])


async def read_to(events: Any, last: int) -> list[TaskEvent]:
    """Read up to a seq."""
    found: list[TaskEvent] = []
    async with asyncio.timeout(30):
        async for event in events:
            found.append(event)
            if event.seq >= last:
                return found
    raise AssertionError("the feed ended")


async def test_after_0_is_everything_in_order(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await busy(session, 5)

    found = await take(store.events(0), 16)

    assert [event.seq for event in found] == seqs(path)
    assert [event.type for event in found[:1]] == [EventType.SESSION_OPENED]


@pytest.mark.parametrize("hand", ["UPDATE sqlite_sequence SET seq = 1", "DELETE FROM sqlite_sequence"])
async def test_who_follows_a_file_whose_counter_a_hand_set_back_comes_to_its_end(
    new: Callable[..., TaskStore], path: Path, tmp_path: Path, hand: str
) -> None:
    async with new() as store:
        await busy(await store.session("s1"), 2)
    edited = tmp_path / "edited.db"
    shutil.copy(path, edited)
    with closing(sqlite3.connect(edited)) as connection:
        connection.execute(hand)
        connection.commit()

    async with TaskStore.open_readonly(edited) as reader:
        found = await read_to(reader.events(0), seqs(path)[-1])

        assert [event.seq for event in found] == seqs(path)
        assert reader.events().cursor == seqs(path)[-1]


async def test_after_none_is_what_is_committed_from_now_on(store: TaskStore, session: SessionTasks) -> None:
    await busy(session, 3)
    events = store.events()

    task = await session.spawn(noop(), id="new")
    await task

    assert [(event.task_id, event.type) for event in await take(events, 3)] == [
        ("new", EventType.REGISTERED),
        ("new", EventType.STARTED),
        ("new", EventType.COMPLETED),
    ]


async def test_reading_goes_on_from_a_cursor(store: TaskStore, session: SessionTasks, path: Path) -> None:
    await busy(session, 4)
    first = await take(store.events(0), 6)

    rest = await take(store.events(first[-1].seq), 7)

    assert [event.seq for event in (*first, *rest)] == seqs(path)


async def test_a_cursor_beyond_the_end_waits_for_what_comes_after_it(store: TaskStore, session: SessionTasks) -> None:
    events = store.events(4)
    await busy(session, 2)

    assert [event.seq for event in await take(events, 3)] == [5, 6, 7]


async def test_an_event_tells_of_its_task(store: TaskStore, session: SessionTasks) -> None:
    task = await session.spawn(noop(), id="t")
    await task

    [opened, registered, started, completed] = await take(store.events(0), 4)

    assert (opened.task_seq, opened.task_id, opened.attempt) == (None, None, None)
    assert {event.task_seq for event in (registered, started, completed)} == {task.task_seq}
    assert [event.attempt for event in (registered, started, completed)] == [0, 1, 1]
    assert completed.scope == session.scope
    assert completed.from_scope is None
    assert completed.data["result"] is None
    assert completed.at.tzinfo is not None


async def test_a_scope_filter_lets_only_its_events_through(store: TaskStore, session: SessionTasks) -> None:
    other = await store.session("s2")
    for _ in range(5):
        await busy(session, 1)
        await busy(other, 1)

    for events in (store.events(0, scope=other.scope), store.events(0, scope="desktop:s2"), other.events(0)):
        found = await take(events, 16)
        assert {event.scope for event in found} == {other.scope}
        assert [event.seq for event in found] == sorted(event.seq for event in found)


async def test_a_type_filter_lets_only_those_types_through_live_and_from_the_table(
    store: TaskStore, session: SessionTasks
) -> None:
    live = store.events(types=[EventType.COMPLETED])
    await busy(session, 10)

    for events in (live, store.events(0, types=[EventType.COMPLETED]), session.events(0, types=["completed"])):  # type: ignore[list-item]
        assert {event.type for event in await take(events, 10)} == {EventType.COMPLETED}


async def test_an_unknown_type_or_scope_is_refused(store: TaskStore) -> None:
    with pytest.raises(ValueError):
        store.events(types=["exploded"])  # type: ignore[list-item]
    with pytest.raises(InvalidId):
        store.events(scope="no colon")


async def test_a_filter_that_nothing_fits_does_not_hold_up_what_comes(store: TaskStore, session: SessionTasks) -> None:
    events = store.events(0, types=[EventType.FAILED])
    reader = asyncio.create_task(take(events, 1))
    await busy(session, 20)

    async def fail() -> None:
        raise ValueError

    task = await session.spawn(fail())

    [found] = await reader
    assert found.task_seq == task.task_seq


async def test_a_slow_subscriber_misses_and_repeats_nothing(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    events = store.events(0)
    await take(events, 1)
    await busy(session, 400)

    found = await read_to(events, seqs(path)[-1])

    assert [event.seq for event in found] == seqs(path)[1:]
    assert len(found) == 1200


async def test_twenty_subscribers_of_different_haste_each_get_everything_once(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    def reading(subscriber: int) -> asyncio.Task[list[TaskEvent]]:
        async def read() -> list[TaskEvent]:
            found: list[TaskEvent] = []
            async for event in store.events(0):
                found.append(event)
                if subscriber % 3 == 0 and event.seq % (subscriber + 2) == 0:
                    for _ in range(20):
                        await asyncio.sleep(0)
                if event.type is EventType.SESSION_OPENED and event.scope.session_id == "end":
                    return found
            raise AssertionError("the feed ended")

        return asyncio.create_task(read())

    readers = [reading(number) for number in range(20)]
    await asyncio.gather(*(busy(session, 10) for _ in range(6)))
    await store.session("end")

    async with asyncio.timeout(30):
        for found in await asyncio.gather(*readers):
            assert [event.seq for event in found] == seqs(path)


async def test_a_reader_that_is_cancelled_and_begins_again_misses_nothing(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    events = store.events(0)
    found: list[int] = []

    async def write() -> None:
        await busy(session, 60)
        await store.session("end")

    work = asyncio.create_task(write())
    async with asyncio.timeout(20):
        for patience in itertools.cycle(range(12)):
            step = asyncio.create_task(anext(events))  # type: ignore[arg-type]
            for _ in range(patience):
                await asyncio.sleep(0)
            if patience < 11:
                step.cancel()
                await asyncio.wait({step})
            if not step.cancelled():
                event = await step
                found.append(event.seq)
                if event.scope.session_id == "end":
                    break
    await work

    assert found == seqs(path)


async def test_a_handle_tells_its_own_story_and_ends_with_it(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    await busy(session, 3)
    task = await session.spawn(hold(started, release))
    reader = asyncio.create_task(_types(task))
    await started.wait()
    await busy(session, 3)
    release.set()

    async with asyncio.timeout(5):
        assert await reader == ["registered", "started", "completed"]
        assert await _types(task) == ["registered", "started", "completed"]


async def _types(task: Any) -> list[str]:
    return [event.type async for event in task.events()]


async def test_a_failed_spawn_leaves_no_hole_that_stops_readers(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    await session.spawn(hold(started, release), id="taken")
    events = store.events(0)
    spawns = [session.spawn(noop(), id="taken" if number % 2 else None) for number in range(20)]
    await asyncio.gather(*spawns, return_exceptions=True)
    release.set()
    await next_event(store, EventType.COMPLETED, task_id="taken")

    found = await read_to(events, seqs(path)[-1])

    assert [event.seq for event in found] == seqs(path)


async def test_commits_of_another_store_are_noticed_within_tens_of_milliseconds(opened: Callable[..., Any]) -> None:
    one, two = await opened(), await opened(runtime="other")
    session = await two.session("s1")
    await session.spawn(noop())
    delays: list[float] = []
    events = one.events()

    for number in range(10):
        before = time.monotonic()
        await two.session(f"new {number}")
        event = await anext(events)
        while event.scope.session_id != f"new {number}":
            event = await anext(events)
        delays.append(time.monotonic() - before)

    assert sorted(delays)[5] < 0.05
    assert max(delays) < 0.5


async def test_two_stores_that_write_at_once_are_read_whole_by_both(opened: Callable[..., Any], path: Path) -> None:
    one, two = await opened(), await opened()
    first, second = await one.session("s1"), await two.session("s2")
    feeds = [one.events(0), two.events(0), one.events(0, types=list(TERMINAL_EVENTS))]
    readers = [
        asyncio.create_task(_until_scope(events, "end")) if index < 2 else None for index, events in enumerate(feeds)
    ]

    await asyncio.gather(*(busy(session, 40) for session in (first, second) for _ in range(3)))
    await one.session("end")

    async with asyncio.timeout(30):
        for reader in readers[:2]:
            assert reader is not None
            assert await reader == seqs(path)
        ends = await take(feeds[2], 240)
    assert [event.seq for event in ends] == sorted({event.seq for event in ends})


async def _until_scope(events: Any, session_id: str) -> list[int]:
    found: list[int] = []
    async for event in events:
        found.append(event.seq)
        if event.scope.session_id == session_id:
            return found
    raise AssertionError("the feed ended")


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start worker processes."""
    with workers() as start:
        yield start


async def test_commits_of_another_process_are_read_whole_while_this_one_writes(
    start: Callable[..., Worker], opened: Callable[..., Any], path: Path
) -> None:
    store = await opened(runtime="other")
    session = await store.session("mine")
    reader = asyncio.create_task(_until_scope(store.events(0), "end"))
    worker = start(programs.spawn_and_stay, str(path), [["count", f"t{number}", {}, [30]] for number in range(4)], {})

    for _ in range(30):
        await busy(session, 2)
    await worker.says("ready")
    for number in range(4):
        record = await (await store.handle("desktop:s1", f"t{number}")).wait(timeout=20)
        assert record.result == [0, 30]
    await store.session("end")

    async with asyncio.timeout(20):
        assert await reader == seqs(path)
    worker.kill()


async def test_folding_the_events_of_every_kind_of_story_gives_each_row(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new(max_running=2, cancel_grace=0)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, how: str, data: dict[str, Any]) -> Any:
        await task.progress("ünder way", 0.25)
        await task.save(data)
        await task.progress("no more known")
        match how:
            case "fail":
                raise ValueError("nicht möglich")
            case "forever":
                await asyncio.Event().wait()
        return {"data": data}

    data = {"task_seq": 5, "scope": "x", "attempt": 9, "nested": [{"ä": None}], "state": "nonsense"}
    async with store:
        session = await store.session("s1")
        for how in ("fine", "fail"):
            await (await session.spawn(work, how, data)).wait()
        task = await session.spawn(work, "forever", data)
        await next_event(store, EventType.SAVED, after=(await take(task.events(), 1))[0].seq)
        await task.cancel("r\"eason'")
        await session.spawn(work, "forever", data, id="goes on")
        await session.spawn(asyncio.sleep(3600), id="bound")
        await session.spawn(work, "fine", data, id="waits")
        check_file(path)
    check_file(path)
    found = {row["id"]: row["state"] for row in rows(path, "SELECT id, state FROM tasks WHERE id NOT LIKE 'work-%'")}
    assert found == {"goes on": "pending", "bound": "abandoned", "waits": "pending"}


async def test_from_now_leaves_out_what_another_store_has_committed_before(
    opened: Callable[..., Any], path: Path
) -> None:
    store, other = await opened(), await opened()
    session = await other.session("s1")
    async with TaskStore.open_readonly(path) as reader:
        for number in range(20):
            await session.register(f"t{number}", TaskKind.OTHER)
            newest = seqs(path)[-1]
            assert [each.events().cursor for each in (store, reader, other)] == [newest] * 3


async def test_from_now_leaves_it_out_while_a_long_read_sees_an_older_state(session: SessionTasks, path: Path) -> None:
    async with TaskStore.open_readonly(path) as reader:
        begun, over = threading.Event(), threading.Event()

        def read(raw: sqlite3.Connection) -> int:
            found = raw.execute("SELECT seq FROM events UNION ALL SELECT 1 UNION ALL SELECT 2")
            found.fetchone()
            begun.set()
            assert over.wait(10)
            return len(found.fetchall())

        reading = asyncio.create_task(reader._open.feed._reader.run(read))
        assert await asyncio.to_thread(begun.wait, 10)
        await session.register("t", TaskKind.OTHER)
        cursor = reader.events().cursor
        over.set()
        await reading
    assert cursor == seqs(path)[-1]


async def test_from_now_begins_before_whatever_is_asked_for_next(store: TaskStore, session: SessionTasks) -> None:
    for number in range(20):
        events = store.events(types=[EventType.REGISTERED])
        await session.register(f"t{number}", TaskKind.OTHER)
        assert [event.task_id for event in await take(events, 1)] == [f"t{number}"]


@pytest.mark.parametrize("after", [-1, -(2**70), 2**63, "0", 1.5])
async def test_what_is_no_cursor_is_refused(store: TaskStore, after: Any) -> None:
    with pytest.raises(ValueError, match="after"):
        store.events(after)


async def test_following_a_task_whose_store_closes_says_so(
    new: Callable[..., TaskStore], started: asyncio.Event
) -> None:
    async with new() as store:
        session = await store.session("s1")
        handle = await session.spawn(hold(started, asyncio.Event()))
        await started.wait()
        following = asyncio.create_task(anext_to_the_end(handle.events()))
        await asyncio.sleep(0)

    async with asyncio.timeout(5):
        # abandoned by the close, or closed before that was read
        end = await following
    assert end in ("abandoned", "StoreClosed")
    for ask in (session.events, handle.events):
        with pytest.raises(StoreClosed):
            await anext(aiter(ask()))


async def anext_to_the_end(events: Any) -> str:
    """Follow a task and return its last word."""
    last = ""
    try:
        async for event in events:
            last = str(event.type)
    except StoreClosed:
        return "StoreClosed"
    return last
