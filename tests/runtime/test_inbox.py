"""Notes: posted once, with the end they tell of; given to one reader at a time, and again until one has dealt with them."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    ClosePolicy,
    InboxBusy,
    InvalidId,
    Note,
    Recovery,
    ResultNotSerializable,
    SessionTasks,
    StaleAttempt,
    StorageFull,
    StoreClosed,
    StoreError,
    StoreReadOnly,
    TaskContext,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    Verdict,
)
from lash_store.commit import Committer
from tests.acceptance import hidden_programs
from tests.acceptance.processes import Worker, workers
from tests.runtime.support import RUNTIME, cancel_at, event_count, event_types, hold, rows


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start worker processes."""
    with workers() as start:
        yield start


@pytest.fixture
def say(store: TaskStore) -> Callable[..., Awaitable[Any]]:
    """A function that posts notes, one a text."""

    @store.task(recovery=Recovery.RERUN)
    async def say(task: TaskContext, texts: list[str], key: str | None = None) -> None:
        for text in texts:
            await task.notify(text, {"said": text}, key=key)

    return say


@pytest.fixture
async def two_sessions(store: TaskStore, session: SessionTasks, say: Any) -> tuple[SessionTasks, SessionTasks, str]:
    """A source with three notes, "one" of them acknowledged, and a destination; and the id of the live task of the notes."""

    @store.task(recovery=Recovery.RERUN)
    async def talkative(task: TaskContext) -> None:
        for text in ("one", "two", "three"):
            await task.notify(text)
        posted.set()
        await asyncio.Event().wait()

    posted = asyncio.Event()
    await session.spawn(talkative, id="talkative", close_policy=ClosePolicy.TRANSFER)
    await posted.wait()
    async with session.inbox(limit=1) as notes:
        assert texts(notes) == ["one"]
    return session, await store.session("s2"), "talkative"


def texts(notes: Sequence[Note]) -> list[str]:
    """Return what notes say."""
    return [note.text for note in notes]


async def read(session: SessionTasks, limit: int | None = None) -> list[str]:
    """Claim the notes of a session, deal with them, and return what they said."""
    async with asyncio.timeout(20):
        async with session.inbox(limit=limit) as notes:
            return texts(notes)


def side_files(path: Path) -> set[str]:
    """Return what lies in the folder of side files."""
    return {file.name for file in Path(f"{path}-owners").iterdir()}


async def looked(session: SessionTasks) -> None:
    """Return once what was asked of the store before is committed."""
    await asyncio.sleep(0)
    await session.unregister("nobody")


def check_ends(path: Path) -> dict[str, str]:
    """
    Hold what is true of every end: one note if one was asked for, posted by the event before it, in the same transaction.

    Return what the notes say, by task id.
    """
    said: dict[str, str] = {}
    for task in rows(path, "SELECT * FROM tasks"):
        notes = rows(path, "SELECT * FROM inbox WHERE task_seq = ? AND key LIKE 'end:%'", task["task_seq"])
        story = rows(path, "SELECT seq, type, at, data FROM events WHERE task_seq = ? ORDER BY seq", task["task_seq"])
        noted = [event for event in story if event["type"] == "noted" and '"end:' in event["data"]]
        if not task["notify_on_end"] or task["completed_at"] is None:
            assert (notes, noted) == ([], [])
            continue
        [note], [posted], end = notes, noted, story[-1]
        assert (note["key"], note["task_id"]) == (f"end:{task['task_seq']}", task["id"])
        assert json.loads(note["data"])["state"] == end["type"] == task["state"]
        assert (posted["seq"], posted["at"]) == (end["seq"] - 1, end["at"])
        assert json.loads(posted["data"])["note"] == note["text"]
        assert note["posted_at"] == task["completed_at"]
        said[task["id"]] = note["text"]
    return said


# --- posting --------------------------------------------------------------------------------------------------------


async def test_a_note_is_in_the_file_when_notify_returns(store: TaskStore, session: SessionTasks, path: Path) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.notify("found it", {"line": 12})
        seen.extend(rows(path, "SELECT text, data, acknowledged_at FROM inbox"))

    task = await session.spawn(work, id="t")
    await task

    assert seen == [{"text": "found it", "data": '{"line":12}', "acknowledged_at": None}]
    [note] = await session.notes()
    assert (note.scope, note.task_seq, note.task_id) == (session.scope, task.task_seq, "t")
    assert (note.text, note.data, note.acknowledged_at) == ("found it", {"line": 12}, None)
    assert note.key.startswith("note:")
    assert event_types(path, task.task_seq) == ["registered", "started", "noted", "completed"]


async def test_without_a_key_every_call_posts_a_note(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["same", "same", "same"]))

    notes = await session.notes()

    assert texts(notes) == ["same"] * 3
    assert len({note.key for note in notes}) == 3


async def test_with_a_key_one_note_is_posted_and_the_first_stands(session: SessionTasks, say: Any, path: Path) -> None:
    task = await session.spawn(say, ["first", "second"], "k")
    await task

    assert [(note.key, note.text, note.data) for note in await session.notes()] == [("k", "first", {"said": "first"})]
    assert event_types(path, task.task_seq).count("noted") == 1


async def test_a_key_is_one_tasks_own(session: SessionTasks, say: Any) -> None:
    for text in ("one", "two"):
        await (await session.spawn(say, [text], "k", id="same-id"))

    assert texts(await session.notes()) == ["one", "two"]


async def test_a_key_that_was_read_is_not_posted_again(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.notify("first", key="k")
        await hold(started, release)
        await task.notify("second", key="k")

    task = await session.spawn(work)
    await started.wait()
    assert await read(session) == ["first"]
    release.set()
    await task

    assert await session.notes() == []


async def test_across_attempts_a_note_with_a_key_is_posted_once(
    start: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    worker = start(hidden_programs.work_and_stay, str(path), [["talk", "t", {}]])
    worker.wait_for("body", "t", 1)
    worker.kill()

    start(hidden_programs.recover_and_close, str(path)).wait_for("closed")

    async with TaskStore.open_readonly(path, runtime=RUNTIME) as store:
        notes = await (await store.session("s1")).notes()
    assert [(note.text, note.key == "once") for note in notes] == [
        ("attempt 1", True),
        ("attempt 1", False),
        ("attempt 2", False),
    ]


async def test_a_stale_attempt_posts_nothing(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, path: Path
) -> None:
    refused = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            for key in (None, "k"):
                with pytest.raises(StaleAttempt):
                    await task.notify("too late", key=key)
            refused.set()

    task = await session.spawn(work)
    await started.wait()
    before = event_count(path)

    await session.abandon(task, "it hangs")

    async with asyncio.timeout(20):
        await refused.wait()
    assert await session.notes() == []
    assert event_count(path) == before + 1


@pytest.mark.parametrize(
    ("text", "data", "key", "error"),
    [
        ("nul\x00", None, None, ValueError),
        ("\ud800", None, None, ValueError),
        (5, None, None, ValueError),
        ("x", object(), None, ResultNotSerializable),
        ("x", float("nan"), None, ResultNotSerializable),
        ("x", None, "", InvalidId),
        ("x", None, "x" * 257, InvalidId),
        ("x", None, "a\x00b", InvalidId),
        ("x", None, "\ud800", InvalidId),
        ("x", None, "\x1b[31m", InvalidId),
        ("x", None, 5, InvalidId),
        ("x", None, "end:1", InvalidId),
    ],
)
async def test_a_note_that_cannot_be_stored_is_refused_and_nothing_posted(
    store: TaskStore, session: SessionTasks, path: Path, text: Any, data: Any, key: Any, error: type[Exception]
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        before = event_count(path)
        with pytest.raises(error):
            await task.notify(text, data, key=key)
        assert event_count(path) == before
        return "went on"

    assert await (await session.spawn(work)) == "went on"
    assert await session.notes() == []


# --- the note of an end ---------------------------------------------------------------------------------------------


async def test_a_task_that_was_not_asked_to_tells_nobody_of_its_end(session: SessionTasks, path: Path) -> None:
    await (await session.spawn(asyncio.sleep(0)))

    assert (check_ends(path), await session.notes()) == ({}, [])


async def test_each_end_of_a_body_is_one_note(opened: Callable[..., Any], started: asyncio.Event, path: Path) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    async def fail() -> None:
        raise RuntimeError("no")

    await (await session.spawn(asyncio.sleep(0, 5), id="completed", notify_on_end=True))
    with pytest.raises(TaskFailed):
        await (await session.spawn(fail(), id="failed", notify_on_end=True))
    running = await session.spawn(hold(started, asyncio.Event()), id="running", notify_on_end=True)
    await started.wait()
    pending = await session.spawn(asyncio.sleep(0), id="pending", notify_on_end=True)
    await pending.cancel("not needed")
    await running.cancel()
    started.clear()
    lost = await session.spawn(hold(started, asyncio.Event()), id="lost", notify_on_end=True)
    await started.wait()
    await session.abandon(lost, "nobody knows")

    assert check_ends(path) == {
        "completed": "task 'completed' completed",
        "failed": "task 'failed' failed: RuntimeError: no",
        "pending": "task 'pending' cancelled: not needed",
        "running": "task 'running' cancelled",
        "lost": "task 'lost' abandoned",
    }
    notes = {note.task_id: note.data for note in await session.notes()}
    assert notes["failed"] == {"state": "failed", "type": "RuntimeError", "message": "no"}
    assert notes["pending"] == {"state": "cancelled", "reason": "not needed"}


async def test_each_end_of_external_work_is_one_note(session: SessionTasks, path: Path) -> None:
    for task_id in ("completed", "failed", "cancelled", "unregistered", "asked", "abandoned"):
        await session.register(task_id, TaskKind.OTHER, notify_on_end=True)
    callback = await session.register("callback", TaskKind.OTHER, lambda: None, notify_on_end=True)

    for task_id in ("completed", "failed", "cancelled"):
        await session.complete(task_id, TaskState(task_id))
        again = await session.complete(task_id, TaskState(task_id))
        assert again.verdict is Verdict.UNCHANGED
    await session.unregister("unregistered")
    await session.cancel("asked", "enough")
    await session.abandon("abandoned", "nobody knows")
    await callback.cancel()

    assert check_ends(path) == {
        "completed": "task 'completed' completed",
        "failed": "task 'failed' failed: Failed: ",
        "cancelled": "task 'cancelled' cancelled",
        "unregistered": "task 'unregistered' cancelled: unregistered",
        "asked": "task 'asked' cancelled: enough",
        "abandoned": "task 'abandoned' abandoned",
        "callback": "task 'callback' cancelled",
    }


async def test_a_cancel_that_comes_down_from_an_ancestor_is_told_of_each_it_ends(
    opened: Callable[..., Any], started: asyncio.Event, path: Path
) -> None:
    store = await opened(max_running=1)
    session, own = await store.session("s1"), await store.session("own")
    parent = await session.spawn(
        hold(started, asyncio.Event()), id="parent", child_session_id="own", kind=TaskKind.SUBAGENT
    )
    await started.wait()
    await session.spawn(asyncio.sleep(0), id="pending", parent=parent, notify_on_end=True)
    await own.register("external", TaskKind.OTHER, notify_on_end=True)

    await parent.cancel("enough")
    await session.spawn(asyncio.sleep(0), id="born-cancelled", parent=parent, notify_on_end=True)

    ended = ("pending", "external", "born-cancelled")
    assert check_ends(path) == {task_id: f"task {task_id!r} cancelled: enough" for task_id in ended}
    assert [note.task_id for note in await own.notes()] == ["external"]


async def test_a_session_that_closes_is_told_of_what_it_cancelled(
    session: SessionTasks, started: asyncio.Event, path: Path
) -> None:
    await session.spawn(hold(started, asyncio.Event()), id="t", close_policy=ClosePolicy.CANCEL, notify_on_end=True)
    await started.wait()

    await session.close()

    assert check_ends(path) == {"t": "task 't' cancelled: session closed"}
    assert await read(session) == ["task 't' cancelled: session closed"]


async def test_a_store_that_closes_tells_of_what_it_abandons(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.spawn(hold(started, asyncio.Event()), id="t", notify_on_end=True)
        await started.wait()

    assert check_ends(path) == {"t": "task 't' abandoned"}
    async with new() as store:
        assert await read(await store.session("s1")) == ["task 't' abandoned"]


async def test_each_end_that_recovery_finds_after_a_kill_is_one_note(
    start: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    tell = {"notify_on_end": True}
    first = start(
        hidden_programs.work_and_stay,
        str(path),
        [
            ["bound", "abandoned", tell],
            ["try_once", "exhausted", tell],
            ["stay", "cancelled", {**tell, "cancel": True}],
            ["stay", "again", tell],
            ["external", "external", tell],
        ],
    )
    first.wait_for("ready")
    first.kill()
    assert check_ends(path) == {}

    for _ in range(2):
        start(hidden_programs.recover_and_close, str(path)).wait_for("closed")

    assert check_ends(path) == {
        "abandoned": "task 'abandoned' abandoned",
        "exhausted": "task 'exhausted' failed: AttemptsExhausted: 1 of 1 attempts ended with their owner",
        "cancelled": "task 'cancelled' cancelled: asked before the end",
        "again": "task 'again' completed",
    }
    async with new() as store:
        assert len(await read(await store.session("s1"))) == 4


async def test_a_note_that_cannot_be_posted_keeps_the_end_from_being_stored(session: SessionTasks, path: Path) -> None:
    """They stand or fall together: an end that nobody is told of would be lost to the session."""
    await session.register("t", TaskKind.OTHER, notify_on_end=True)
    before = event_count(path)
    connection = sqlite3.connect(path, isolation_level=None, timeout=10)
    connection.execute("CREATE TRIGGER full BEFORE INSERT ON inbox BEGIN SELECT RAISE(ABORT, 'no room'); END")

    with pytest.raises(StoreError, match="no room"):
        await session.complete("t", TaskState.COMPLETED)

    assert ((await session.get("t")).state, event_count(path)) == (TaskState.RUNNING, before)
    connection.execute("DROP TRIGGER full")
    connection.close()
    await session.complete("t", TaskState.COMPLETED)
    assert check_ends(path) == {"t": "task 't' completed"}


async def test_the_end_of_work_that_was_handed_over_is_told_where_it_is(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    other = await store.session("s2")
    await session.register("t", TaskKind.OTHER, notify_on_end=True)
    await session.transfer(other, ["t"])

    await other.complete("t", TaskState.COMPLETED)

    assert (await session.notes(), await read(other)) == ([], ["task 't' completed"])
    assert check_ends(path) == {"t": "task 't' completed"}


# --- reading --------------------------------------------------------------------------------------------------------


async def test_notes_only_looks(session: SessionTasks, say: Any, path: Path) -> None:
    await (await session.spawn(say, ["one", "two"]))
    before = (event_count(path), rows(path, "SELECT * FROM inbox"), rows(path, "SELECT * FROM sessions"))

    assert texts(await session.notes()) == texts(await session.notes(unread=False)) == ["one", "two"]
    async with session.inbox() as claimed:
        assert texts(await session.notes()) == texts(claimed) == ["one", "two"]
        during = await session.notes(unread=False)

    assert [note.acknowledged_at for note in during] == [None, None]
    assert before[0] == event_count(path)
    assert [row["acknowledged_at"] for row in before[1]] == [None, None]
    assert [row["inbox_claim"] for row in before[2]] == [None]


async def test_leaving_in_order_acknowledges(store: TaskStore, session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one", "two"]))
    assert [record.unread_notes for record in await store.sessions()] == [2]

    async with session.inbox() as notes:
        assert texts(notes) == ["one", "two"]

    assert (await read(session), await session.notes()) == ([], [])
    everything = await session.notes(unread=False)
    assert [(note.text, note.acknowledged_at is not None) for note in everything] == [("one", True), ("two", True)]
    assert [record.unread_notes for record in await store.sessions()] == [0]


async def test_an_exception_passes_through_and_the_notes_are_given_again(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one", "two"]))

    with pytest.raises(ZeroDivisionError):
        async with session.inbox():
            raise ZeroDivisionError

    assert texts(await session.notes()) == ["one", "two"]
    assert await read(session) == ["one", "two"]
    assert await read(session) == []


async def test_a_reader_that_is_cancelled_gives_its_notes_back(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one"]))
    reading = asyncio.Event()

    async def reader() -> None:
        async with session.inbox():
            reading.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(reader())
    await reading.wait()
    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert await read(session) == ["one"]


@pytest.mark.parametrize("late", [False, True])
async def test_a_reader_that_is_cancelled_anywhere_loses_no_note_and_keeps_nobody_out(
    session: SessionTasks, say: Any, path: Path, late: bool
) -> None:
    at = 0
    alone = side_files(path)
    while True:
        at += 1
        await (await session.spawn(say, [f"note {at}"]))
        seen: list[str] = []

        async def reader(seen: list[str] = seen) -> None:
            async with session.inbox() as notes:
                seen += texts(notes)

        stepped = await cancel_at(reader(), at, late=late)

        rest = await read(session)
        # one who was cancelled on the way out may have dealt with it; one who never saw it has not
        assert rest == [f"note {at}"] if not seen else rest in ([], seen)
        assert stepped.was_cancelled or (seen == [f"note {at}"] and rest == [])
        await looked(session)
        assert side_files(path) == alone
        if not stepped.reached:
            break
    assert at > 2


async def test_at_most_limit_notes_are_given_the_oldest_first(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, [str(number) for number in range(5)]))

    async with session.inbox(limit=2) as notes:
        assert texts(notes) == ["0", "1"]
    assert [await read(session, 2), await read(session, 1), await read(session, 9)] == [["2", "3"], ["4"], []]


@pytest.mark.parametrize("limit", [0, -1, 2**63, 1.5, "2"])
async def test_a_limit_that_is_no_number_of_notes_is_refused(session: SessionTasks, say: Any, limit: Any) -> None:
    await (await session.spawn(say, ["one"]))

    with pytest.raises((ValueError, TypeError)):
        async with session.inbox(limit=limit):
            pass

    assert await read(session) == ["one"]


async def test_notes_come_in_the_order_they_were_posted_whoever_posted_them(session: SessionTasks, say: Any) -> None:
    expected = []
    for number in range(4):
        await (await session.spawn(say, [f"{number}"], notify_on_end=True, id=f"t{number}"))
        expected += [f"{number}", f"task 't{number}' completed"]

    async with session.inbox() as notes:
        assert texts(notes) == expected
        assert [note.note_seq for note in notes] == sorted(note.note_seq for note in notes)


async def test_what_is_posted_while_somebody_reads_is_for_the_next(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one"]))

    async with session.inbox() as notes:
        await (await session.spawn(say, ["two"]))
        assert texts(notes) == ["one"]

    assert await read(session) == ["two"]


async def test_an_inbox_is_its_sessions_own(store: TaskStore, session: SessionTasks, say: Any) -> None:
    other = await store.session("s2")
    await (await session.spawn(say, ["one"]))

    async with session.inbox() as notes:
        assert await read(other) == []
        assert texts(notes) == ["one"]


async def test_the_inbox_of_a_closed_session_is_read(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one"]))
    await session.close()

    assert texts(await session.notes()) == ["one"]
    assert await read(session) == ["one"]


# --- one reader at a time -------------------------------------------------------------------------------------------


async def test_a_second_reader_is_refused_and_the_first_undisturbed(
    session: SessionTasks, say: Any, opened: Callable[..., Any], path: Path
) -> None:
    await (await session.spawn(say, ["one"]))
    other = await (await opened()).session("s1")
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        beside = await asking.session("s1")

        async with session.inbox() as notes:
            for second in (session, other, beside):
                with pytest.raises(InboxBusy, match=r"desktop:s1.*one reader a session"):
                    await read(second)
            await (await session.spawn(say, ["two"]))
            with pytest.raises(InboxBusy):
                await read(other)
            assert texts(notes) == ["one"]

        assert [await read(beside), await read(other), await read(session)] == [["two"], [], []]


async def test_of_readers_that_come_at_once_one_reads(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one"]))
    together = asyncio.Event()
    refused = 0

    async def reader() -> list[str]:
        nonlocal refused
        try:
            async with session.inbox() as notes:
                await together.wait()
                return texts(notes)
        except InboxBusy:
            refused += 1
            if refused == 4:
                together.set()
            return []

    async with asyncio.timeout(20):
        assert sorted(await asyncio.gather(*(reader() for _ in range(5)))) == [[], [], [], [], ["one"]]
    assert await read(session) == []


async def test_one_claim_is_entered_once(session: SessionTasks, say: Any) -> None:
    await (await session.spawn(say, ["one"]))
    inbox = session.inbox()

    async with inbox as notes:
        with pytest.raises(InboxBusy, match="once a block"):
            await inbox.__aenter__()
        assert texts(notes) == ["one"]

    async with inbox as notes:
        assert notes == []


@pytest.mark.parametrize("how", ["own", "connect"])
async def test_a_reader_of_another_process_keeps_others_out_while_it_lives(
    session: SessionTasks, say: Any, start: Callable[..., Worker], path: Path, how: str
) -> None:
    await (await session.spawn(say, ["one"]))
    reader = start(hidden_programs.read_inbox, str(path), how, "stay")
    await reader.says("notes", ["one"])
    with pytest.raises(InboxBusy, match=f"process {reader.pid} on .* reads the inbox of 'desktop:s1'"):
        await read(session)
    # a stopped process is not dead
    reader.signal(signal.SIGSTOP)
    with pytest.raises(InboxBusy):
        await read(session)

    reader.signal(signal.SIGKILL)
    reader.join()

    assert await read(session) == ["one"]
    assert await read(session) == []


async def test_a_reader_of_this_process_keeps_other_processes_out(
    session: SessionTasks, say: Any, start: Callable[..., Worker], path: Path
) -> None:
    await (await session.spawn(say, ["one"]))

    async with session.inbox():
        for how in ("own", "connect"):
            refused = start(hidden_programs.read_inbox, str(path), how, "leave")
            assert "one reader a session" in (await refused.says("busy"))[1]
            await refused.says("closed")

    assert await session.notes() == []


async def test_the_notes_of_a_killed_reader_are_given_to_the_next_process_at_once(
    session: SessionTasks, say: Any, start: Callable[..., Worker], path: Path
) -> None:
    await (await session.spawn(say, ["one", "two"]))
    reader = start(hidden_programs.read_inbox, str(path), "connect", "stay")
    await reader.says("notes", ["one", "two"])
    reader.kill()

    following = start(hidden_programs.read_inbox, str(path), "connect", "leave")

    await following.says("notes", ["one", "two"])
    await following.says("closed")
    assert await session.notes() == []
    assert len(side_files(path)) == 1


async def test_a_reading_store_looks_and_claims_nothing(session: SessionTasks, say: Any, path: Path) -> None:
    await (await session.spawn(say, ["one"]))

    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reading:
        beside = await reading.session("s1")
        assert texts(await beside.notes()) == ["one"]
        with pytest.raises(StoreReadOnly):
            await read(beside)

    assert await read(session) == ["one"]


async def test_a_claim_leaves_nothing_in_the_folder_of_side_files(
    session: SessionTasks, say: Any, path: Path, start: Callable[..., Worker]
) -> None:
    alone = side_files(path)
    await (await session.spawn(say, ["one"]))

    async with session.inbox():
        assert len(side_files(path)) == 2
        with pytest.raises(InboxBusy):
            await read(session)
    assert side_files(path) == alone
    with pytest.raises(ZeroDivisionError):
        async with session.inbox():
            raise ZeroDivisionError
    assert side_files(path) == alone
    dead = start(hidden_programs.read_inbox, str(path), "connect", "stay")
    await dead.says("notes")
    dead.kill()
    await read(session)
    assert side_files(path) == alone


# --- when the store closes meanwhile --------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [False, True])
async def test_a_store_that_closes_in_the_block_leaves_its_notes_to_the_next(
    new: Callable[..., TaskStore], path: Path, failing: bool
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def say_one(task: TaskContext) -> None:
        await task.notify("one")

    async with store:
        session = await store.session("s1")
        await (await session.spawn(say_one))

        async def close_in_the_block() -> None:
            async with session.inbox() as notes:
                assert texts(notes) == ["one"]
                await store.close()
                if failing:
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError if failing else StoreClosed):
            await close_in_the_block()

    async with new() as store:
        session = await store.session("s1")
        assert await read(session) == ["one"]
        assert len(side_files(path)) == 1


async def test_a_reader_whose_leave_a_full_disk_refused_gives_its_notes_back(
    session: SessionTasks, say: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await (await session.spawn(say, ["one"]))
    commit = Committer._end

    def refuse_once(self: Committer, tx: Any, *, wrote: bool) -> StorageFull:
        monkeypatch.setattr(Committer, "_end", commit)
        tx.connection.execute("ROLLBACK").fetchall()
        return StorageFull("the disk is full")

    async def read_on_a_full_disk() -> None:
        async with session.inbox() as notes:
            assert texts(notes) == ["one"]
            monkeypatch.setattr(Committer, "_end", refuse_once)

    with pytest.raises(StorageFull):
        await read_on_a_full_disk()

    assert await read(session) == ["one"]
    assert len(side_files(path)) == 1


async def test_a_closed_store_claims_nothing(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")

    with pytest.raises(StoreClosed):
        await read(session)
    assert side_files(path) == set()


# --- notes that are carried along -----------------------------------------------------------------------------------

Two = tuple[SessionTasks, SessionTasks, str]


@pytest.mark.parametrize("how", ["transfer", "handoff", "close"])
async def test_unread_notes_go_with_their_task_and_read_ones_stay(
    store: TaskStore, two_sessions: Two, say: Any, path: Path, how: str
) -> None:
    source, destination, task_id = two_sessions
    await (await source.spawn(say, ["of a finished task"]))
    await (await destination.spawn(say, ["of its own"]))
    if how == "close":
        await source.close(successor=destination)
    else:
        await getattr(source, how)(destination, [task_id])

    assert texts(await source.notes()) == ["of a finished task"]
    assert texts(await source.notes(unread=False)) == ["one", "of a finished task"]
    assert {note.scope for note in await destination.notes()} == {destination.scope}
    assert {record.scope.session_id: record.unread_notes for record in await store.sessions()} == {"s1": 1, "s2": 3}
    assert await read(destination) == ["two", "three", "of its own"]


async def test_a_note_that_a_live_reader_of_the_source_has_is_not_given_to_the_destination(two_sessions: Two) -> None:
    source, destination, task_id = two_sessions

    async with source.inbox(limit=1) as notes:
        assert texts(notes) == ["two"]
        await source.transfer(destination, [task_id])
        assert texts(await destination.notes()) == ["two", "three"]
        assert await read(destination) == ["three"]
        assert await read(destination) == []

    # who had it has dealt with it, wherever it is now
    assert (await destination.notes(), await read(destination)) == ([], [])


async def test_a_note_that_a_reader_of_the_source_gives_back_is_given_to_the_destination(two_sessions: Two) -> None:
    source, destination, task_id = two_sessions

    async def hand_over_and_fail() -> None:
        async with source.inbox() as notes:
            assert texts(notes) == ["two", "three"]
            await source.handoff(destination, [task_id])
            assert await read(destination) == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await hand_over_and_fail()

    assert await read(source) == []
    assert await read(destination) == ["two", "three"]


async def test_a_note_that_a_dead_reader_of_the_source_had_is_given_to_the_destination(
    two_sessions: Two, start: Callable[..., Worker], path: Path
) -> None:
    source, destination, task_id = two_sessions
    reader = start(hidden_programs.read_inbox, str(path), "connect", "stay")
    await reader.says("notes", ["two", "three"])
    await source.transfer(destination, [task_id])
    assert await read(destination) == []

    reader.kill()

    assert await read(destination) == ["two", "three"]
    assert await read(source) == []
    assert len(side_files(path)) == 1


async def test_notes_go_back_and_forth_with_their_task(two_sessions: Two) -> None:
    source, destination, task_id = two_sessions
    await source.transfer(destination, [task_id])
    await destination.transfer(source, [task_id])

    assert await destination.notes(unread=False) == []
    assert texts(await source.notes(unread=False)) == ["one", "two", "three"]
    assert await read(source) == ["two", "three"]


async def test_a_handle_on_a_finished_task_still_carries_its_notes(
    store: TaskStore, session: SessionTasks, say: Any
) -> None:
    destination = await store.session("s2")
    task: TaskHandle = await session.spawn(say, ["one"], notify_on_end=True, id="t")
    await task.wait(timeout=20)

    await session.transfer(destination, [task])

    assert (await read(session), await read(destination)) == ([], ["one", "task 't' completed"])


# --- claims that somebody else's hand, or two of one's own, brought about ---------------------------------------------


@pytest.mark.parametrize("claim", ["null", "[]", "5", '"o-1"', "{}", '{"token": 7}', '{"token": ["o-1"]}'])
async def test_a_claim_that_no_reader_wrote_holds_nobody_up(
    store: TaskStore, session: SessionTasks, there: SessionTasks, say: Callable[..., Any], path: Path, claim: str
) -> None:
    for of in (session, there):
        await (await of.spawn(say, ["hello"]))
    with sqlite3.connect(path) as hand:
        hand.execute("UPDATE sessions SET inbox_claim = ? WHERE session_id = 's1'", [claim])
    hand.close()

    for of in (there, session):
        async with of.inbox() as notes:
            assert [note.text for note in notes] == ["hello"]


async def test_a_claim_whose_token_leads_out_of_the_folder_unlinks_nothing(
    session: SessionTasks, path: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "poetry.lock"
    victim.write_text("somebody's")
    tokens = [str(tmp_path / "poetry"), "../poetry", "", ".", "a\0b"]
    for token in tokens:
        with sqlite3.connect(path) as hand:
            hand.execute("UPDATE sessions SET inbox_claim = json_object('token', ?)", [token])
        hand.close()
        async with session.inbox() as notes:
            assert notes == []

    assert victim.read_text() == "somebody's"


async def test_a_reader_entered_twice_at_once_is_refused_once_and_acknowledges_once(
    session: SessionTasks, say: Callable[..., Any]
) -> None:
    await (await session.spawn(say, ["hello"]))
    inbox, entered = session.inbox(), asyncio.Event()

    async def read() -> list[str]:
        async with inbox as notes:
            await entered.wait()
            return [note.text for note in notes]

    reads = [asyncio.create_task(read()) for _ in range(2)]
    done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
    assert isinstance(done.pop().exception(), InboxBusy)
    entered.set()
    await asyncio.wait(reads)

    assert [read.result() for read in reads if read.exception() is None] == [["hello"]]
    assert await session.notes() == []


@pytest.mark.parametrize("how", ["own", "request"])
async def test_a_block_that_outlives_its_store_leaves_the_notes_to_others(
    new: Callable[..., TaskStore], opened: Callable[..., Any], path: Path, how: str
) -> None:
    peer = await opened()
    session = await peer.session("s1")

    @peer.task(recovery=Recovery.RERUN)
    async def talk(task: TaskContext) -> None:
        await task.notify("hello")

    await (await session.spawn(talk))
    store = new() if how == "own" else TaskStore.connect(path, runtime=RUNTIME)
    await store.open()
    block = (await store.session("s1")).inbox()
    assert len(await block.__aenter__()) == 1
    await store.close()

    async with session.inbox() as notes:
        assert [note.text for note in notes] == ["hello"]
    with pytest.raises(StoreClosed):
        await block.__aexit__(None, None, None)
