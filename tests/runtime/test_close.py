"""Closing: bodies are detached, rows given back, waiters told, and nothing of the store is left in the process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import Recovery, SessionTasks, StoreClosed, StoreError, TaskContext, TaskState, TaskStore
from tests.runtime.support import RUNTIME, event_types, hold, left_over, rows, sweep_up, threads


def row(path: Path, task_id: str) -> dict[str, Any]:
    """Read one task."""
    return rows(path, "SELECT * FROM tasks WHERE id = ?", task_id)[0]


async def test_a_body_is_told_detach_and_its_row_is_released_unspent(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    reasons: list[Any] = []
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            reasons.append(task.stop_reason)

    async with store:
        task = await (await store.session("s1")).spawn(work, id="t")
        await started.wait()

    assert reasons == ["detach"]
    found = row(path, "t")
    assert (found["state"], found["owner_id"], found["attempt"], found["attempts_spent"]) == ("pending", None, 1, 0)
    assert event_types(path, task.task_seq) == ["registered", "started", "released"]


async def test_closing_well_never_spends_an_attempt(new: Callable[..., TaskStore], path: Path) -> None:
    store = new()
    runs = asyncio.Queue[int]()

    @store.task(recovery=Recovery.RERUN, max_attempts=2)
    async def work(task: TaskContext) -> int:
        runs.put_nowait(task.attempt)
        if task.attempt < 6:
            await asyncio.Event().wait()
        return task.attempt

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        assert await runs.get() == 1
    for attempt in range(2, 6):
        async with store:
            assert await runs.get() == attempt
    async with store:
        assert await (await store.handle("desktop:s1", "t")) == 6
    assert row(path, "t")["attempts_spent"] == 0


@pytest.mark.parametrize("bare", [True, False])
async def test_started_work_bound_to_its_owner_is_abandoned_with_evidence(
    new: Callable[..., TaskStore], started: asyncio.Event, bare: bool
) -> None:
    store = new()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def work(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    async with store:
        session = await store.session("s1")
        await session.spawn(hold(started, asyncio.Event()) if bare else work, id="t")
        await started.wait()
    async with store:
        record = await store.get("desktop:s1", "t")

    assert record.state is TaskState.ABANDONED
    assert record.evidence is not None
    assert (record.evidence.owner_id, record.evidence.end) == (1, "closed")
    assert record.failure is None


async def test_work_bound_to_its_owner_that_never_started_is_released(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    store = new(max_running=1)
    ran = asyncio.Event()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def work(task: TaskContext) -> int:
        ran.set()
        return task.attempt

    async with store:
        session = await store.session("s1")
        await session.spawn(hold(started, asyncio.Event()))
        await started.wait()
        await session.spawn(work, id="t")
    found = row(path, "t")
    assert (found["state"], found["owner_id"], found["attempt"], ran.is_set()) == ("pending", None, 0, False)

    async with store:
        assert await (await store.handle("desktop:s1", "t")).result(timeout=5) == 1


async def test_a_bare_coroutine_that_never_started_is_abandoned_and_closed(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    async def never() -> None:
        raise AssertionError("it ran")

    coroutine = never()
    async with new(max_running=1) as store:
        session = await store.session("s1")
        await session.spawn(hold(started, asyncio.Event()))
        await started.wait()
        await session.spawn(coroutine, id="t")

    assert row(path, "t")["state"] == "abandoned"
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await coroutine


async def test_a_body_that_returns_meanwhile_is_completed(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        try:
            await hold(started, asyncio.Event())
        except asyncio.CancelledError:
            await task.save("tidied up")
        return str(task.stop_reason)

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()

    assert (row(path, "t")["state"], row(path, "t")["result"]) == ("completed", '"detach"')
    assert rows(path, "SELECT value FROM steps") == [{"value": '"tidied up"'}]


async def test_a_cancel_in_progress_is_finished(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    store = new(cancel_grace=3600)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    async with store:
        task = await (await store.session("s1")).spawn(work, id="t")
        await started.wait()
        record = await task.cancel("enough", timeout=0)
        assert record.state is TaskState.CANCEL_REQUESTED

    assert (row(path, "t")["state"], row(path, "t")["cancel_reason"]) == ("cancelled", "enough")


async def test_a_body_that_ignores_its_cancellation_is_fenced_out_within_the_timeout(
    new: Callable[..., TaskStore], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = new()
    refused: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def stubborn(task: TaskContext) -> str:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        try:
            await task.save("late")
        except Exception as error:
            refused.append(type(error).__name__)
            raise
        return "late"

    await store.open()
    await (await store.session("s1")).spawn(stubborn, id="t")
    await started.wait()
    body = next(one for one in asyncio.all_tasks() if one.get_name() == "lash_store body t")

    with pytest.warns(ResourceWarning, match=r"desktop:s1/t"):
        async with asyncio.timeout(5):
            await store.close(timeout=0.05)

    assert (row(path, "t")["state"], row(path, "t")["owner_id"]) == ("pending", None)
    release.set()
    await asyncio.wait({body})
    assert refused in (["StoreClosed"], ["StaleAttempt"])
    assert row(path, "t")["state"] == "pending"
    assert rows(path, "SELECT * FROM steps") == []


async def test_a_body_whose_start_is_under_way_at_close_is_detached_too(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new()
    reasons: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            reasons.append(str(task.stop_reason))

    for _ in range(10):
        async with store:
            session = await store.session("s1")
            spawns = [asyncio.create_task(session.spawn(work)) for _ in range(5)]
            await asyncio.wait(spawns, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*spawns, return_exceptions=True)

    assert set(reasons) <= {"detach"}
    assert {found["state"] for found in rows(path, "SELECT state FROM tasks")} == {"pending"}
    assert {found["owner_id"] for found in rows(path, "SELECT owner_id FROM tasks")} == {None}


async def test_a_body_that_fails_while_it_is_detached_for_want_of_the_store_is_not_failed(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        session = await store.session("s1")
        try:
            await hold(started, asyncio.Event())
        finally:
            await session.cancel("nobody in particular")

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()

    assert row(path, "t")["state"] == "pending"


async def test_waiters_get_store_closed(new: Callable[..., TaskStore], started: asyncio.Event) -> None:
    async with new() as store:
        task = await (await store.session("s1")).spawn(hold(started, asyncio.Event()), cancel_policy="cooperative")
        stubborn = await (await store.session("s1")).spawn(asyncio.sleep(3600))
        waiters = [asyncio.create_task(one.wait()) for one in (task, stubborn)]
        await started.wait()

    ends = await asyncio.gather(*waiters, return_exceptions=True)
    # the row may reach them first: the close abandons it in a commit
    assert all(isinstance(end, StoreClosed) or getattr(end, "state", None) == "abandoned" for end in ends)


async def test_a_waiter_of_released_work_gets_store_closed(
    new: Callable[..., TaskStore], started: asyncio.Event
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    async with store:
        task = await (await store.session("s1")).spawn(work)
        waiters = [asyncio.create_task(task.wait()), asyncio.create_task(task.result(timeout=60))]
        await started.wait()

    for end in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(end, StoreClosed)


async def test_event_iterations_end(new: Callable[..., TaskStore]) -> None:
    async with new() as store:
        session = await store.session("s1")
        seen: list[str] = []

        async def follow() -> None:
            async for event in session.events(0):
                seen.append(event.type)

        follower = asyncio.create_task(follow())
        await asyncio.sleep(0)

    async with asyncio.timeout(5):
        await follower
    assert seen in (["session_opened"], [])


async def test_closing_twice_and_at_once_is_closing_once(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    store = new()
    await store.open()
    await (await store.session("s1")).spawn(hold(started, asyncio.Event()), id="t")
    await started.wait()

    await asyncio.gather(*(store.close() for _ in range(5)))
    await store.close()

    assert row(path, "t")["state"] == "abandoned"
    assert len(rows(path, "SELECT * FROM owners WHERE ended_at IS NOT NULL")) == 1


async def test_a_cancelled_close_finishes_first(
    new: Callable[..., TaskStore], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def slow_to_end(task: TaskContext) -> None:
        try:
            await hold(started, asyncio.Event())
        finally:
            await release.wait()

    await store.open()
    await (await store.session("s1")).spawn(slow_to_end, id="t")
    await started.wait()
    closing = asyncio.create_task(store.close())
    for _ in range(5):
        await asyncio.sleep(0)

    closing.cancel()
    await asyncio.sleep(0)
    assert not closing.done()
    release.set()
    await asyncio.wait({closing}, timeout=10)

    assert closing.cancelled()
    assert row(path, "t")["state"] == "pending"
    with pytest.raises(StoreClosed):
        await store.list()


async def test_close_before_open_is_nothing(path: Path) -> None:
    await TaskStore(path, runtime=RUNTIME).close()

    assert not path.exists()


async def test_a_body_may_not_wait_for_the_close_of_its_store_for_ever(
    new: Callable[..., TaskStore], started: asyncio.Event, path: Path
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def suicidal(task: TaskContext) -> None:
        started.set()
        await store.close(timeout=1)

    await store.open()
    await (await store.session("s1")).spawn(suicidal, id="t")
    await started.wait()

    with pytest.warns(ResourceWarning, match=r"desktop:s1/t"):
        async with asyncio.timeout(10):
            await store.close()

    assert row(path, "t")["state"] == "pending"


async def test_very_many_bodies_are_stopped_in_parts_and_each_knows_why_at_once(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new(max_running=350)
    contexts: list[TaskContext] = []
    all_run = asyncio.Event()
    knew: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        contexts.append(task)
        if len(contexts) == 350:
            all_run.set()
        try:
            await asyncio.Event().wait()
        finally:
            knew.append({context.stop_reason for context in contexts})

    async with store:
        session = await store.session("s1")
        for _ in range(350):
            await session.spawn(work)
        await all_run.wait()

    assert knew == [{"detach"}] * 350
    assert rows(path, "SELECT count(*) AS n FROM tasks WHERE state = 'pending' AND owner_id IS NULL") == [{"n": 350}]


async def test_nothing_is_left_in_the_process_after_many_lives(
    new: Callable[..., TaskStore], path: Path, started: asyncio.Event
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await hold(started, asyncio.Event())

    before = threads()
    for number in range(15):
        started.clear()
        async with store:
            session = await store.session("s1")
            await session.spawn(work, id=f"rerun {number}")
            await session.spawn(asyncio.sleep(3600), id=f"bound {number}")
            await asyncio.gather(*[await session.spawn(asyncio.sleep(0)) for _ in range(3)])
            await started.wait()

    assert await left_over(path, before) == []
    assert list(Path(f"{path}-owners").iterdir()) == []
    assert rows(path, "SELECT * FROM owners WHERE ended_at IS NULL") == []
    wal = Path(f"{path}-wal")
    assert not wal.exists() or wal.stat().st_size == 0


async def test_an_error_in_the_block_closes_the_store_and_passes(new: Callable[..., TaskStore], path: Path) -> None:
    before = threads()

    async def fail() -> None:
        async with new() as store:
            await store.session("s1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()

    assert await left_over(path, before) == []


async def test_a_failed_open_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.db"
    path.write_text("no database" * 200)
    before = threads()

    with pytest.raises(Exception, match=r"bad\.db"):
        await TaskStore(path, runtime="desktop").open()

    assert await left_over(path, before) == []
    assert [found.name for found in tmp_path.iterdir() if found.stat().st_size and found.suffix == ".lock"] == []


async def test_a_store_that_is_never_closed_warns(new: Callable[..., TaskStore]) -> None:
    store = new()
    await store.open()

    with pytest.warns(ResourceWarning, match="was not closed"):
        store.__del__()
    await store.close()


async def test_a_store_can_be_opened_with_await(new: Callable[..., TaskStore]) -> None:
    store = await new()
    try:
        assert await store.count() == 0
    finally:
        await store.close()


async def test_a_store_that_is_closing_is_opened_again_once_it_has_closed(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store = new()
    await store.open()
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)

    async with store:
        assert closing.done()
        await store.session("s1")


async def test_a_store_is_not_opened_twice_at_once(new: Callable[..., TaskStore], path: Path) -> None:
    store = new()

    first, second = await asyncio.gather(store.open(), store.open(), return_exceptions=True)

    assert [type(answer) for answer in (first, second)] == [type(None), StoreError]
    await store.close()


def test_a_store_whose_loop_died_unclosed_is_opened_again_in_another(
    new: Callable[..., TaskStore], path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            await asyncio.Event().wait()
        return task.attempt

    cores: list[Any] = []

    async def leave() -> None:
        await store.open()
        cores.append(store._core)
        await (await store.session("s1")).spawn(work, id="t")

    async def come_back() -> object:
        async with store:
            return await (await (await store.session("s1")).handle("t")).result(timeout=10)

    asyncio.run(leave())
    found = asyncio.run(come_back())
    sweep_up(*cores)
    gc.collect()

    assert found == 2


async def test_a_close_without_a_time_out_waits_for_the_bodies(
    new: Callable[..., TaskStore], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    async def stubborn() -> str:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await release.wait()
        await release.wait()
        return "done"

    store = new()
    await store.open()
    await (await store.session("s1")).spawn(stubborn())
    await started.wait()
    closing = asyncio.create_task(store.close(timeout=None))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not closing.done()
    release.set()
    await closing

    assert rows(path, "SELECT state FROM tasks") == [{"state": "completed"}]


async def test_a_time_out_that_is_no_number_is_refused_and_the_store_stays_open(
    store: TaskStore, session: SessionTasks
) -> None:
    timeout: Any = "soon"
    with pytest.raises(ValueError, match="soon"):
        await store.close(timeout)

    assert await session.list() == []


async def test_a_close_waits_for_a_body_that_came_after_it_seemed_that_all_had_ended(
    new: Callable[..., TaskStore],
) -> None:
    store, started, left = new(), asyncio.Event(), []

    async def slow() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            left.append(True)

    await store.open()
    await (await store.session("s1")).spawn(slow(), id="t")
    await started.wait()
    # as if a commit had brought it just then
    store._core.runner._idle.set()  # type: ignore[union-attr]

    await store.close()

    assert left == [True]
