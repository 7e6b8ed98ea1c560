"""Rules of a prune by one store beside whoever works, waits and cancels in another: what went has ended, and says no more."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    ClosePolicy,
    EventType,
    MonitorSpec,
    Recovery,
    SessionTasks,
    StaleAttempt,
    TaskContext,
    TaskEvent,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskPruned,
    TaskState,
    TaskStore,
)

OTHER, SUBAGENT = TaskKind.OTHER, TaskKind.SUBAGENT


@pytest.fixture
async def here(opened: Callable[..., Any]) -> TaskStore:
    """The store that works, and prunes."""
    found: TaskStore = await opened()
    return found


@pytest.fixture
async def beside(opened: Callable[..., Any]) -> TaskStore:
    """Another on the same file, which waits."""
    found: TaskStore = await opened()
    return found


async def blindfold(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Let a store notice nothing of what others commit before the event is set."""
    looks, is_blind, may_see = store._core.feed._changed, asyncio.Event(), asyncio.Event()
    asked: list[None] = []

    async def changed() -> bool:
        # the first look may still act on what a subscriber read before: it has when the second comes
        asked.append(None)
        if len(asked) == 2:
            is_blind.set()
        return may_see.is_set() and await looks()

    monkeypatch.setattr(store._core.feed, "_changed", changed)
    # what it has noticed already it has acted on by then
    await is_blind.wait()
    return may_see


async def stubborn(release: asyncio.Event) -> None:
    """Stop, when asked to, only once that is allowed."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await release.wait()
        raise


# --- who waits ------------------------------------------------------------------------------------------------------


async def test_hidden_work_that_ended_and_was_pruned_is_waited_for_no_more(
    here: TaskStore, beside: TaskStore, release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await (await here.session("s1")).spawn_hidden("work", release.wait())
    may_see = await blindfold(beside, monkeypatch)
    waiter = asyncio.create_task((await beside.session("s1")).await_hidden())
    await asyncio.sleep(0.05)
    release.set()
    await handle.wait()

    assert (await here.prune()).tasks == 1
    may_see.set()

    async with asyncio.timeout(5):
        await waiter


async def test_a_failure_that_a_waiter_knows_is_told_to_it_also_when_it_was_pruned_since(
    here: TaskStore, beside: TaskStore, release: asyncio.Event
) -> None:
    session, there = await here.session("s1"), await here.session("s2")

    async def fail() -> None:
        raise ValueError("a torn page")

    going_on = [await session.spawn_hidden(label, release.wait()) for label in ("stays", "goes")]
    failed = await session.spawn_hidden("fails", fail())
    await failed.wait()
    seen = beside._core.feed._waiters
    waiter = asyncio.create_task((await beside.session("s1")).await_hidden())
    async with asyncio.timeout(5):
        while len(seen) < 2:
            await asyncio.sleep(0.001)
    with pytest.raises(TaskFailed):
        await failed
    assert (await here.prune()).tasks == 1
    # it looks again while it goes on waiting
    await session.transfer(there, [going_on[1]])
    async with asyncio.timeout(5):
        while len(seen) > 1:
            await asyncio.sleep(0.001)
    release.set()

    async with asyncio.timeout(5):
        with pytest.raises(ExceptionGroup) as told:
            await waiter
    assert [str(error) for error in told.value.exceptions] == [f"task {failed.id!r} failed: ValueError: a torn page"]


async def test_closing_a_session_tells_of_what_was_pruned_before_its_end_was_seen(
    here: TaskStore, beside: TaskStore, release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await (await here.session("s1")).spawn(stubborn(release), id="work", close_policy=ClosePolicy.CANCEL)
    await asyncio.sleep(0.05)
    may_see = await blindfold(beside, monkeypatch)
    closing = asyncio.create_task((await beside.session("s1")).close())
    await asyncio.sleep(0.1)
    release.set()
    ended = await handle.wait()

    assert (await here.prune()).tasks == 1
    may_see.set()

    async with asyncio.timeout(5):
        [row] = (await closing).cancelled
    assert (row.id, row.state, row.completed_at) == ("work", TaskState.CANCELLED, ended.completed_at)


async def test_cancelling_all_reports_on_what_was_pruned_before_its_end_was_seen(
    here: TaskStore, beside: TaskStore, release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await (await here.session("s1")).spawn(stubborn(release), id="work")
    await asyncio.sleep(0.05)
    may_see = await blindfold(beside, monkeypatch)
    cancelling = asyncio.create_task((await beside.session("s1")).cancel_all())
    await asyncio.sleep(0.1)
    release.set()
    await handle.wait()

    assert (await here.prune()).tasks == 1
    may_see.set()

    async with asyncio.timeout(5):
        [report] = await cancelling
    assert (report.record.id, report.record.state) == ("work", TaskState.CANCELLED)
    assert report.error is not None
    assert report.error.type == "TaskPruned"


# --- who follows the events -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [False, True])
async def test_who_follows_is_told_of_the_newest_events_also_if_they_were_pruned_before_they_were_seen(
    here: TaskStore, beside: TaskStore, monkeypatch: pytest.MonkeyPatch, filtered: bool
) -> None:
    session = await here.session("s1")
    await session.register("work", OTHER)
    seen = [event.seq async for event in until_now(here)]
    may_see = await blindfold(beside, monkeypatch)
    narrow: dict[str, Any] = {"scope": "desktop:s1", "types": [EventType.COMPLETED]} if filtered else {}
    followers = [beside.events(seen[-1], **narrow) for _ in range(3)]
    told = [asyncio.create_task(anext(follower)) for follower in followers]
    await session.complete("work", TaskState.COMPLETED)

    assert (await here.prune(unread=True)).tasks == 1
    may_see.set()

    async with asyncio.timeout(5):
        events = await asyncio.gather(*told)
    assert {event.type for event in events} == {EventType.PRUNED}
    assert [event.data for event in events] == [{"first_seq": seen[-1] + 1, "last_seq": seen[-1] + 1}] * 3


async def until_now(store: TaskStore) -> AsyncIterator[TaskEvent]:
    """Yield what there is to follow."""
    newest = store._core.feed.head
    async for event in store.events(0):
        yield event
        if event.seq >= newest:
            return


async def test_who_follows_a_task_is_told_that_it_was_pruned_before_its_end_was_seen(
    here: TaskStore, beside: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await here.session("s1")
    await session.register("work", OTHER)
    events = (await beside.handle("desktop:s1", "work")).events()
    assert (await anext(events)).type is EventType.REGISTERED
    may_see = await blindfold(beside, monkeypatch)
    last = asyncio.create_task(anext(events))
    await session.complete("work", TaskState.COMPLETED)

    assert (await here.prune(unread=True)).tasks == 1
    may_see.set()

    async with asyncio.timeout(5):
        with pytest.raises(TaskPruned):
            await last


async def test_who_follows_from_now_on_is_told_of_nothing_before_though_the_newest_was_pruned(here: TaskStore) -> None:
    session = await here.session("s1")
    await session.register("work", OTHER)
    await session.complete("work", TaskState.COMPLETED)
    await here.prune(unread=True)

    events = here.events()
    await session.register("next", OTHER)

    async with asyncio.timeout(5):
        assert (await anext(events)).task_id == "next"


# --- who works ------------------------------------------------------------------------------------------------------


async def child(task: TaskContext) -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    "write",
    [
        lambda task: task.progress("half"),
        lambda task: task.save(1),
        lambda task: task.step("look", lambda: 1),
        lambda task: task.transact("count", lambda tx: 1),
        lambda task: task.notify("there"),
        lambda task: task.sleep(0.001),
        lambda task: task.spawn(child),
    ],
    ids=["progress", "save", "step", "transact", "notify", "sleep", "spawn"],
)
async def test_the_body_of_what_was_given_up_and_pruned_is_refused_as_stale(
    here: TaskStore,
    beside: TaskStore,
    release: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[TaskContext], Awaitable[object]],
) -> None:
    told: list[BaseException] = []
    wrote = asyncio.Event()

    async def work(task: TaskContext) -> None:
        await release.wait()
        try:
            await write(task)
        except Exception as error:
            told.append(error)
            raise
        finally:
            wrote.set()

    for function in (work, child):
        beside.task(recovery=Recovery.OWNER_BOUND)(function)
    handle = await (await beside.session("s1")).spawn(work)
    await asyncio.sleep(0.05)
    await blindfold(beside, monkeypatch)
    await (await here.session("s1")).abandon(handle.id, "stuck")
    assert (await here.prune(unread=True)).tasks == 1

    release.set()
    await wrote.wait()

    assert [type(error) for error in told] == [StaleAttempt]


async def test_what_a_body_returns_whose_task_was_pruned_is_stored_no_more(
    here: TaskStore, beside: TaskStore, release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await (await beside.session("s1")).spawn(release.wait())
    await asyncio.sleep(0.05)
    await blindfold(beside, monkeypatch)
    await (await here.session("s1")).abandon(handle.id, "stuck")
    assert (await here.prune(unread=True)).tasks == 1

    release.set()

    bodies = beside._core.runner._bodies
    async with asyncio.timeout(5):
        while bodies:
            await asyncio.sleep(0.001)


async def test_what_waits_for_a_slot_and_was_cancelled_and_pruned_is_started_no_more(
    here: TaskStore, opened: Callable[..., Any], release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = await opened(max_running=1)
    session = await beside.session("s1")
    beside.task(recovery=Recovery.RERUN)(child)
    first = await session.spawn(release.wait())
    second = await session.spawn(child)
    await blindfold(beside, monkeypatch)
    await (await here.session("s1")).cancel(second.id)
    assert (await here.prune()).tasks == 1

    release.set()
    await first

    runner = beside._core.runner
    async with asyncio.timeout(5):
        while runner.is_live(second.task_seq):
            await asyncio.sleep(0.001)
    assert not runner._tried


# --- what a cancel has to come through ------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [False, True])
async def test_a_cancel_reaches_what_is_begun_later_in_the_session_of_an_agent_that_had_ended(
    here: TaskStore, between: bool
) -> None:
    first, second, third = [await here.session(id) for id in ("s1", "s2", "s3")]
    top = await first.register("top", SUBAGENT, child_session_id="s2")
    parent = await second.register("parent", OTHER) if between else None
    await second.register("agent", SUBAGENT, child_session_id="s3", parent=parent)
    await second.complete("agent", TaskState.COMPLETED)
    if between:
        await second.complete("parent", TaskState.COMPLETED)

    report = await here.prune(unread=True)
    late = await third.register("late", OTHER)
    await first.cancel(top)

    assert (await late.record()).state is TaskState.CANCELLED
    assert (report.tasks, report.needed) == (0, 1 + between)


async def test_an_agent_goes_once_no_cancel_can_come_through_it(here: TaskStore) -> None:
    first, second, _ = [await here.session(id) for id in ("s1", "s2", "s3")]
    await first.register("top", SUBAGENT, child_session_id="s2")
    await second.register("agent", SUBAGENT, child_session_id="s3")
    await second.complete("agent", TaskState.COMPLETED)
    await first.complete("top", TaskState.COMPLETED)

    await here.prune(unread=True)

    with pytest.raises(TaskPruned):
        await second.get("agent")


async def test_a_cancel_reaches_what_is_begun_in_the_session_of_an_agent_once_that_is_open_again(
    here: TaskStore,
) -> None:
    first, second, third = [await here.session(id) for id in ("s1", "s2", "s3")]
    top = await first.register("top", SUBAGENT, child_session_id="s2")
    await second.register("agent", SUBAGENT, child_session_id="s3")
    await second.complete("agent", TaskState.COMPLETED)
    await third.close()

    await here.prune(unread=True)
    third = await here.session("s3", reopen=True)
    late = await third.register("late", OTHER)
    await first.cancel(top)

    assert (await late.record()).state is TaskState.CANCELLED


async def test_what_stands_between_something_live_and_a_task_that_stays_stays(here: TaskStore) -> None:
    session = await here.session("s1")
    above: TaskHandle = await session.register("top", OTHER)
    for id in ("one", "two", "three", "four", "unread"):
        above = await session.register(id, OTHER, parent=above)
    # one more, below which nothing stays
    for id in ("other", "leaf"):
        await session.register(id, OTHER, parent="one" if id == "other" else "other")
    for id in ("one", "two", "three", "four", "unread", "other", "leaf"):
        await session.complete(id, TaskState.COMPLETED)
        if id != "unread":
            await (await session.handle(id))

    dry = await here.prune(dry_run=True)
    report = await here.prune()
    late = await session.register("late", OTHER, parent="unread")
    await session.cancel("top", "all of it")

    assert (report.tasks, report.needed) == (2, 4)
    assert dry == report.model_copy(update={"freed": 0})
    assert (await late.record()).state is TaskState.CANCELLED
    assert (await session.register("later", OTHER, parent="unread")).task_seq
    assert (await session.get("later")).cancel_reason == "all of it"
    # nothing lives there, but what is begun below it is born cancelled
    assert ((await here.prune()).tasks, (await here.prune(unread=True)).tasks) == (2, 6)


@pytest.mark.parametrize("below", ["itself", "what had ended below it"])
async def test_what_is_begun_in_the_session_of_a_cancelled_agent_is_born_cancelled_while_that_is_open(
    here: TaskStore, below: str
) -> None:
    first, second = [await here.session(id) for id in ("s1", "s2")]
    if below == "itself":
        cancelled = await first.register("agent", SUBAGENT, child_session_id="s2")
    else:
        cancelled = await first.register("top", OTHER)
        between = await first.register("between", OTHER, parent=cancelled)
        await first.register("agent", SUBAGENT, child_session_id="s2", parent=between)
        for id in ("agent", "between"):
            await first.complete(id, TaskState.COMPLETED)
    await cancelled.cancel("enough")

    kept = await here.prune(unread=True)
    late = await second.register("late", OTHER)

    assert ((await late.record()).state, (await late.record()).cancel_reason) == (TaskState.CANCELLED, "enough")
    assert (kept.tasks, kept.needed) == (0, 1 if below == "itself" else 3)
    await second.close()
    assert (await here.prune(unread=True)).tasks == kept.needed + 1


async def test_of_the_cancelled_agents_of_a_session_the_newest_stays(here: TaskStore) -> None:
    first, second = [await here.session(id) for id in ("s1", "s2")]
    for _ in range(3):
        agent = await first.register("agent", SUBAGENT, child_session_id="s2")
        await agent.cancel()
    report = await here.prune(unread=True)

    assert (report.tasks, report.needed) == (2, 1)
    assert (await (await second.register("late", OTHER)).record()).state is TaskState.CANCELLED
    # this one ended as its registrar said, and nobody asked for that
    await first.register("agent", SUBAGENT, child_session_id="s2")
    await first.complete("agent", TaskState.CANCELLED)
    assert (await here.prune(unread=True)).tasks == 3
    assert (await (await second.register("work", OTHER)).record()).state is TaskState.RUNNING


# --- processes ------------------------------------------------------------------------------------------------------


async def test_what_was_given_up_stays_until_its_process_has_ended(
    here: TaskStore, beside: TaskStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a line would be refused, and so tell the blind one
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monitor = await (await beside.session("s1")).start_monitor(MonitorSpec(id="m", command=command))
    async with asyncio.timeout(10):
        while (process := (await monitor.record()).process) is None:
            await asyncio.sleep(0.001)
    await blindfold(beside, monkeypatch)

    async def die_first(tasks: object) -> None:
        """End none of them."""

    monkeypatch.setattr(type(here._core), "end_given_up", lambda core, tasks: die_first(tasks))
    assert (await (await here.session("s1")).abandon(monitor.id, "stuck")).state is TaskState.ABANDONED
    try:
        report = await here.prune(unread=True)
        assert (report.tasks, report.needed) == (0, 1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)

    async with asyncio.timeout(10):
        while not (await here.prune(unread=True)).tasks:
            await asyncio.sleep(0.01)


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_a_key_names_the_newest_that_was_made_under_it_also_if_an_older_one_is_left(here: TaskStore) -> None:
    first, second = await here.session("s1"), await here.session("s2")

    async def again(state: TaskState) -> SessionTasks:
        handle = await first.register("work", OTHER, idempotency_key="once")
        await first.transfer(second, [handle])
        await second.complete("work", state)
        return second

    await again(TaskState.FAILED)
    await again(TaskState.COMPLETED)
    assert (await here.prune(unread=True, states=["completed"])).tasks == 1

    with pytest.raises(TaskPruned):
        await second.register("work", OTHER, idempotency_key="once")


# --- a full disk ----------------------------------------------------------------------------------------------------

FULL_BESIDE = """
import asyncio, os, sys
from pathlib import Path
from lash_store import StorageFull, TaskKind, TaskState, TaskStore
from lash_store.checking import check

folder = Path(sys.argv[1])

async def main():
    async with TaskStore(folder / "agent.db", runtime="desktop") as store:
        session = await store.session("s1")
        for number in range(20):
            handle = await session.register(f"t{number}", TaskKind.OTHER)
            await session.complete(handle.id, TaskState.COMPLETED, result="x" * 1000)
        filler = folder / "filler"
        with open(filler, "wb", buffering=0) as file:
            while True:
                try:
                    file.write(b"x" * 4096)
                except OSError:
                    break
        try:
            await store.prune(unread=True)
        except StorageFull:
            print("full")
        print(await handle == "x" * 1000, await store.count())
        filler.unlink()
        print((await store.prune(unread=True)).tasks, await store.count())

asyncio.run(main())
print(check(folder / "agent.db").is_sound)
"""


@pytest.mark.long
async def test_a_full_disk_does_not_stop_the_store_that_prunes_or_hands_out_a_result(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    command = 'mount -t tmpfs -o size=4m tmpfs "$2" && exec "$0" -c "$1" "$2"'
    inside = ["unshare", "-Urm", "sh", "-c", command, sys.executable, FULL_BESIDE, str(full)]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    done = await asyncio.to_thread(subprocess.run, inside, capture_output=True, text=True, check=False)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("no file system of a user's own on this machine")

    assert (done.returncode, done.stdout.split()) == (0, ["full", "True", "20", "20", "0", "True"]), done.stderr
