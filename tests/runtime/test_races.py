"""Races between stores on one file, each stepped to the moment that once lost something."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    InvalidArguments,
    Recovery,
    SchemaError,
    StorageBusy,
    StorageMoved,
    TaskContext,
    TaskNotFound,
    TaskState,
    TaskStore,
    migrate,
    owners,
    recovery,
)
from lash_store.errors import StorageError
from lash_store.transaction import Transaction
from tests.runtime.support import RUNTIME, hold, next_event, rows
from tests.runtime.watching import until


async def swallow(release: asyncio.Event) -> None:
    """Go on until it is released, however often it is cancelled."""
    while not release.is_set():
        with suppress(asyncio.CancelledError):
            await release.wait()


def register(store: TaskStore) -> Any:
    @store.task(recovery=Recovery.RERUN)
    async def stay(task: TaskContext) -> None:
        await asyncio.Event().wait()

    return stay


async def test_a_cancel_that_meets_the_close_of_the_owner_is_finished(
    new: Callable[..., TaskStore], path: Path
) -> None:
    owner, peer = new(), new()
    stay = register(owner)
    cleaning, clean = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await clean.wait()

    async with peer:
        async with owner:
            session = await owner.session("s1")
            task = await session.spawn(stay, id="t")
            await session.spawn(slow_to_end())
            await next_event(owner, EventType.STARTED, task_id=task.id)
            closing_owner = asyncio.create_task(owner.close())
            await cleaning.wait()
            cancelling = asyncio.create_task((await peer.session("s1")).cancel("t"))
            await next_event(peer, EventType.CANCEL_REQUESTED)
            clean.set()
            await closing_owner

        async with asyncio.timeout(10):
            assert (await cancelling).state is TaskState.CANCELLED


async def test_a_cancel_left_by_a_body_that_would_not_end_is_finished_for_its_closed_owner_once_it_has(
    new: Callable[..., TaskStore], release: asyncio.Event
) -> None:
    owner, peer = new(cancel_grace=0), new()

    async with peer:
        await owner.open()
        await (await owner.session("s1")).spawn(swallow(release), id="t")
        await next_event(owner, EventType.STARTED, task_id="t")
        cancelling = asyncio.create_task((await peer.session("s1")).cancel("t"))
        await next_event(peer, EventType.CANCEL_REQUESTED)
        with pytest.warns(ResourceWarning, match="fenced out"):
            await owner.close(timeout=0.1)

        for _ in range(2):
            assert not (await peer.recover()).cancelled
            assert (await (await peer.session("s1")).cancel("t", timeout=0.01)).state is TaskState.CANCEL_REQUESTED
        assert not cancelling.done()
        release.set()
        async with asyncio.timeout(10):
            assert (await cancelling).state is TaskState.CANCELLED


@pytest.mark.parametrize("who", ["the next life of the store", "a client"])
async def test_whoever_opens_the_file_does_not_take_a_body_for_ended_that_outlived_its_store(
    new: Callable[..., TaskStore], path: Path, release: asyncio.Event, who: str
) -> None:
    store = new(cancel_grace=0)
    await store.open()
    task = await (await store.session("s1")).spawn(swallow(release), id="t")
    await next_event(store, EventType.STARTED, task_id="t")
    await task.cancel(timeout=0)
    with pytest.warns(ResourceWarning, match="fenced out"):
        await store.close(timeout=0.01)

    async with store if who == "the next life of the store" else TaskStore.connect(path, runtime=RUNTIME) as again:
        record = await (await again.session("s1")).cancel("t", timeout=0.01)
        assert record.state is TaskState.CANCEL_REQUESTED
        release.set()
        async with asyncio.timeout(10):
            assert (await (await again.session("s1")).cancel("t")).state is TaskState.CANCELLED


async def test_nothing_is_kept_of_a_closed_store_once_the_last_body_that_outlived_it_has_ended(
    new: Callable[..., TaskStore], release: asyncio.Event
) -> None:
    store = new()
    await store.open()
    task = await (await store.session("s1")).spawn(swallow(release), id="t")
    await next_event(store, EventType.STARTED, task_id="t")
    with pytest.warns(ResourceWarning, match="fenced out"):
        await store.close(timeout=0.01)
    assert [lock.runs(task.task_seq) for lock in owners._outlived.values()] == [True]

    release.set()
    await until(lambda: not owners._outlived)


async def test_a_cancel_that_waits_for_a_body_of_a_closed_store_is_finished_without_anybody_who_asks(
    new: Callable[..., TaskStore], release: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_AGAIN", (0.01, 0.01))
    owner, peer = new(cancel_grace=0), new()
    async with peer:
        await owner.open()
        task = await (await owner.session("s1")).spawn(swallow(release), id="t")
        await next_event(owner, EventType.STARTED, task_id="t")
        await task.cancel(timeout=0)
        with pytest.warns(ResourceWarning, match="fenced out"):
            await owner.close(timeout=0.01)

        waiting = asyncio.create_task((await (await peer.session("s1")).handle("t")).wait(10))
        await peer.recover()
        release.set()

        assert (await waiting).state is TaskState.CANCELLED


@pytest.mark.parametrize("answered", ["after what was read was acted on", "meanwhile"])
async def test_a_cancel_that_is_read_before_the_start_is_answered_still_stops_the_body(
    new: Callable[..., TaskStore], path: Path, monkeypatch: pytest.MonkeyPatch, answered: str
) -> None:
    async with new(cancel_grace=0) as owner, TaskStore.connect(path, runtime=RUNTIME) as client:
        stay = register(owner)
        session = await owner.session("s1")
        committer = owner._core.writer._committer  # type: ignore[union-attr]
        assert committer is not None
        answer, end = threading.Event(), committer._end

        def end_and_hold(tx: Transaction, *, wrote: bool) -> StorageError | None:
            failure = end(tx, wrote=wrote)
            if any(event.type == EventType.STARTED for event in tx.events):
                answer.wait(10)
            return failure

        monkeypatch.setattr(committer, "_end", end_and_hold)
        recoverer = owner._recoverer
        assert recoverer is not None
        acting, acted, take = asyncio.Event(), asyncio.Event(), recoverer.take_what_was_left

        async def act_slowly() -> None:
            # the last step of acting on a page, after its rows were compared with the bodies
            if rows(path, "SELECT 1 FROM events WHERE type = 'cancel_requested'"):
                acting.set()
                await acted.wait()
            await take()

        monkeypatch.setattr(recoverer, "take_what_was_left", act_slowly)
        spawning = asyncio.create_task(session.spawn(stay, id="t"))
        asking = await client.session("s1")
        while not rows(path, "SELECT 1 FROM tasks"):
            await asyncio.sleep(0)
        cancelling = asyncio.create_task(asking.cancel("t"))
        requested = await next_event(client, EventType.CANCEL_REQUESTED)
        # as if a third process had committed just before: the owner looks, and finds no body to stop yet
        committer.foreign_seen = True
        feed = owner._core.feed  # type: ignore[union-attr]
        if answered == "meanwhile":
            async with asyncio.timeout(10):
                await acting.wait()
        else:
            acted.set()
            while feed._seen < requested.seq:
                await asyncio.sleep(0)
        answer.set()
        await spawning
        acted.set()

        async with asyncio.timeout(10):
            assert (await cancelling).state is TaskState.CANCELLED


async def test_a_recovery_that_met_a_locked_file_is_tried_again(
    new: Callable[..., TaskStore], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, peer = new(), new()
    stay, _ = register(owner), register(peer)
    async with peer:
        recoverer = peer._recoverer
        assert recoverer is not None
        recover, refusals = recoverer.recover, 2

        async def refused_at_first(**how: bool) -> Any:
            # once because somebody left, and once because a lock was found free
            nonlocal refusals
            if refusals:
                refusals -= 1
                raise StorageBusy("another process held the write lock")
            return await recover(**how)

        async with owner:
            await (await owner.session("s1")).spawn(stay, id="t")
            monkeypatch.setattr(recoverer, "recover", refused_at_first)

        async with asyncio.timeout(10):
            await next_event(peer, EventType.REATTACHED, task_id="t")
    assert refusals == 0


async def test_what_cannot_be_shown_of_an_exception_does_not_keep_its_task_running(store: TaskStore) -> None:
    class Unshowable(Exception):
        @property
        def __notes__(self) -> list[str]:
            raise RuntimeError("no notes")

    @store.task(recovery=Recovery.RERUN)
    async def broken(task: TaskContext) -> None:
        raise Unshowable("shown anyway")

    session = await store.session("s1")

    record = await (await session.spawn(broken)).wait(timeout=10)

    assert record.state is TaskState.FAILED
    assert record.failure is not None
    assert (record.failure.type, record.failure.message) == ("Unshowable", "shown anyway")


async def test_two_waits_of_a_body_that_cross_leave_the_slot_to_its_child(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    hold, second = asyncio.Event(), asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def holder(task: TaskContext) -> None:
        await hold.wait()

    @store.task(recovery=Recovery.RERUN)
    async def quick(task: TaskContext) -> int:
        return 1

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        await session.spawn(holder, id="holder")
        first, other = await session.spawn(quick, id="first"), await session.spawn(quick, id="other")

        async def cross() -> None:
            await second.wait()
            await other.wait()

        await asyncio.gather(first.wait(), cross())

    task = await session.spawn(parent)
    await next_event(store, EventType.STARTED, task_id="holder")
    await session.cancel("first")
    second.set()
    await asyncio.sleep(0)
    hold.set()

    assert (await task.wait(timeout=10)).state is TaskState.COMPLETED


async def test_a_file_is_not_migrated_under_a_live_owner(store: TaskStore, path: Path) -> None:
    with pytest.raises(SchemaError, match="is open in process"):
        await asyncio.to_thread(migrate.downgrade, path, "base")

    await store.session("s1")


async def test_a_log_removed_under_its_owner_stops_the_store(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")
        following = store.events()
        Path(f"{path}-wal").unlink()

        with pytest.raises(StorageMoved, match="-wal"):
            await session.spawn(asyncio.sleep(0))
        with pytest.raises(StorageMoved):
            await anext(following)


async def test_a_row_that_is_not_unicode_does_not_keep_the_store_shut(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new()
    stay = register(store)
    async with store:
        await (await store.session("s1")).spawn(stay, id="t")
    with closing(sqlite3.connect(path)) as shell, shell:
        shell.execute("UPDATE tasks SET progress = CAST(x'ff41' AS TEXT)")

    async with store:
        session = await store.session("s1")
        assert (await session.get("t")).progress == "\ufffdA"
        await session.cancel("t", timeout=0)
        with closing(sqlite3.connect(path)) as shell, shell:
            shell.execute("UPDATE tasks SET progress = NULL WHERE completed_at IS NULL")
    with closing(sqlite3.connect(path)) as shell, shell:
        shell.execute("UPDATE tasks SET progress = NULL")


async def test_a_finished_task_is_told_at_any_time_out(store: TaskStore) -> None:
    session = await store.session("s1")
    task = await session.spawn(asyncio.sleep(0, "done"))
    await task.wait()

    assert await task.result(timeout=0) == "done"


async def test_a_word_that_spawn_keeps_for_itself_does_not_reach_the_function(store: TaskStore) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def fetch(task: TaskContext, timeout: float) -> float:
        return timeout

    session = await store.session("s1")

    with pytest.raises(ValueError, match="reason"):
        await session.cancel("x", 5)  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments, match="missing a required argument: 'timeout'"):
        await session.spawn(fetch, timeout=3.0)
    with pytest.raises(TaskNotFound):
        await session.get("x")
    assert await (await session.spawn(fetch, 3.0)) == 3.0


async def test_a_close_finishes_a_cancel_that_came_after_the_body_had_gone(
    new: Callable[..., TaskStore], path: Path
) -> None:
    owner = new()
    stay = register(owner)
    cleaning, clean = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await clean.wait()

    await owner.open()
    session = await owner.session("s1")
    await session.spawn(stay, id="t")
    await session.spawn(slow_to_end())
    closing_owner = asyncio.create_task(owner.close())
    await cleaning.wait()
    async with TaskStore.connect(path, runtime=RUNTIME) as client:
        record = await (await client.session("s1")).cancel("t", timeout=0)
        assert record.state is TaskState.CANCEL_REQUESTED
    clean.set()
    await closing_owner

    assert rows(path, "SELECT state FROM tasks WHERE id = 't'") == [{"state": "cancelled"}]


async def test_a_row_that_is_given_up_and_claimed_again_in_the_batch_of_its_start_is_started(
    opened: Callable[..., Any],
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    writer, waits, go = store._core.writer, asyncio.Event(), asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def quick(task: TaskContext) -> int:
        return 1

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> None:
        waits.set()
        await go.wait()
        # here the slot is free for who waits for one
        await child.wait()

    async def queued(count: int) -> None:
        async with asyncio.timeout(10):
            while len(writer._queue) != count:
                await asyncio.sleep(0)

    await session.spawn(parent)
    await waits.wait()
    child = await session.spawn(quick, id="t")
    held = threading.Event()
    holding = writer.submit(lambda tx: held.wait(10))
    async with asyncio.timeout(10):
        while writer._queue:
            await asyncio.sleep(0)

    abandoning = asyncio.create_task(session.abandon("t", "it hangs"))
    await queued(1)
    go.set()
    await queued(2)
    recovering = asyncio.create_task(store.recover())
    await queued(3)
    held.set()
    await asyncio.gather(holding, abandoning, recovering)

    assert (await child.wait(timeout=10)).state is TaskState.COMPLETED


async def test_a_wait_that_begins_once_finished_work_was_given_away_tells_where_it_is(
    opened: Callable[..., Any], path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened()
    session, feed = await store.session("s1"), store._core.feed
    await store.session("s2")
    handle = await session.spawn(hold(started, release))
    committer = store._core.writer._committer
    commit, committed, tell, deaf = committer.commit, threading.Event(), threading.Event(), asyncio.Event()

    def commit_and_wait(units: Any) -> Any:
        batch = commit(units)
        committed.set()
        tell.wait(20)
        return batch

    async def hear_nothing() -> None:
        deaf.set()
        await asyncio.Event().wait()

    # the end is in the file, and this process does not know of it yet
    feed._stirs.next = hear_nothing
    await deaf.wait()
    committer.commit = commit_and_wait
    try:
        release.set()
        await asyncio.to_thread(committed.wait, 20)
        async with TaskStore.connect(path, runtime=RUNTIME) as other:
            await (await other.session("s1")).transfer("s2", [handle.id])
        waiting = asyncio.create_task(handle.wait())
        await asyncio.sleep(0)
    finally:
        tell.set()

    record = await waiting
    assert (record.state, record.scope.session_id) == (TaskState.COMPLETED, "s2")
