"""What would pass a limit is refused with `LimitExceeded`, and nothing of it is written; what is there already may stay."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    CancelPolicy,
    ClosePolicy,
    HandleNotVisible,
    IdempotencyConflict,
    LimitExceeded,
    Limits,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskExists,
    TaskFailed,
    TaskKind,
    TaskState,
    TaskStore,
)
from tests.runtime.support import event_count, everything, rows
from tests.runtime.test_steps import told

pytestmark = pytest.mark.timeout(20)

FIT = "é" * 49
"""100 bytes of JSON, quotes included, and 51 characters."""
LARGE = FIT + "x"


async def with_limits(opened: Callable[..., Any], **limits: int | None) -> tuple[TaskStore, SessionTasks]:
    """Open a store with limits, and a session of it."""
    store: TaskStore = await opened(limits=Limits(**limits))
    return store, await store.session("s1")


def holds(store: TaskStore, release: asyncio.Event) -> Callable[..., Any]:
    """Register work that stays until it may go."""

    async def hold(task: TaskContext, *what: Any) -> str:
        await release.wait()
        return task.id

    return store.task(recovery=Recovery.RERUN)(hold)


# --- payloads -------------------------------------------------------------------------------------------------------


async def test_what_a_body_stores_has_at_most_so_many_bytes(opened: Callable[..., Any], path: Path) -> None:
    store, session = await with_limits(opened, payload_bytes=100)
    target = await session.spawn(holds(store, asyncio.Event()), id="target")

    async def work(task: TaskContext) -> str:
        ways: dict[str, Callable[[str], Any]] = {
            "checkpoint": task.save,
            "step": lambda text: task.step(f"step {len(text)}", lambda: text),
            "transact": lambda text: task.transact(f"transact {len(text)}", lambda connection: text),
            "note": lambda text: task.notify("a note", text),
            "signal": lambda text: target.signal("a signal", text),
        }
        for name, way in ways.items():
            await way(FIT)
            before = {} if name in {"step", "transact"} else everything(path)
            with pytest.raises(LimitExceeded, match="has 101 bytes, and the limit is 100"):
                await way(LARGE)
            assert not before or everything(path) == before, name
        assert task.checkpoint == FIT
        return "goes on"

    store.task(recovery=Recovery.RERUN)(work)
    assert await (await session.spawn(work)) == "goes on"
    assert rows(path, "SELECT max(length(CAST(value AS BLOB))) AS most FROM steps") == [{"most": 100}]
    # a failed step keeps no value
    assert rows(path, "SELECT value FROM steps WHERE state = 'failed'") == [{"value": "null"}] * 2


async def test_arguments_have_at_most_so_many_bytes_and_nothing_is_born(
    opened: Callable[..., Any], path: Path, release: asyncio.Event
) -> None:
    store, session = await with_limits(opened, payload_bytes=100)
    hold = holds(store, release)
    # {"what":["…"]} is the value and 11 bytes more
    fit = "x" * 87
    await session.spawn(hold, fit, id="fits")
    before = everything(path)

    for refused in (session.spawn(hold, fit + "x"), session.spawn_hidden("label", hold, fit + "x")):
        with pytest.raises(LimitExceeded, match="the arguments of"):
            await refused

    assert everything(path) == before
    release.set()
    assert await (await session.handle("fits")) == "fits"


async def test_a_result_that_is_too_large_is_the_failure_of_its_task(opened: Callable[..., Any]) -> None:
    store, session = await with_limits(opened, payload_bytes=100)

    @store.task(recovery=Recovery.RERUN, retry_on=Exception)
    async def work(task: TaskContext, text: str) -> str:
        return text

    async def bare(text: str) -> str:
        return text

    assert await (await session.spawn(work, FIT[:40])) == FIT[:40]
    assert await (await session.spawn(bare(FIT))) == FIT
    for task in (await session.spawn(work, "x" * 80), await session.spawn(bare(LARGE))):
        if task.id.startswith("work"):
            assert await task == "x" * 80
            continue
        with pytest.raises(TaskFailed) as failed:
            await task
        assert failed.value.failure.type == "LimitExceeded"
        assert "101 bytes" in failed.value.failure.message


async def test_a_result_of_external_work_has_at_most_so_many_bytes(opened: Callable[..., Any], path: Path) -> None:
    _, session = await with_limits(opened, payload_bytes=100)
    await session.register("ext", TaskKind.OTHER)
    before = everything(path)

    with pytest.raises(LimitExceeded, match="101 bytes"):
        await session.complete("ext", TaskState.COMPLETED, result=LARGE)

    assert everything(path) == before
    assert (await session.complete("ext", TaskState.COMPLETED, result=FIT)).record.result == FIT


async def test_a_requesting_store_has_limits_of_its_own(
    store: TaskStore, session: SessionTasks, path: Path, release: asyncio.Event
) -> None:
    await session.spawn(holds(store, release), id="t")
    async with TaskStore.connect(path, runtime="desktop", limits=Limits(payload_bytes=100)) as requesting:
        task = await requesting.handle("desktop:s1", "t")
        with pytest.raises(LimitExceeded):
            await task.signal("s", LARGE)
        assert (await task.signal("s", FIT)).verdict == "applied"


async def test_the_default_is_16_megabytes_and_none_is_no_limit(store: TaskStore, session: SessionTasks) -> None:
    large = "x" * (16 * 1024 * 1024 - 1)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return str(await told(task.save(large)))

    assert "16,777,217 bytes, and the limit is 16,777,216" in str(await (await session.spawn(work)))
    assert Limits(payload_bytes=None).check_payload(f"{large}xx", "it") == f"{large}xx"
    assert (Limits().live_tasks, Limits().total_tasks) == (None, None)


@pytest.mark.parametrize(
    "limits",
    [
        {"payload_bytes": 0},
        {"payload_bytes": -1},
        {"live_tasks": 0},
        {"total_tasks": 0},
        {"total_tasks": 1.5},
        {"total_tasks": float("nan")},
        {"live_tasks": "many"},
        {"unknown": 5},
        {"payload_bytes": True},
    ],
    ids=str,
)
def test_limits_without_sense_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Limits(**limits)


@pytest.mark.parametrize("limits", [5, {"payload_bytes": 5}, "none"])
def test_a_store_takes_limits_and_nothing_else(tmp_path: Path, limits: Any) -> None:
    with pytest.raises(ValueError, match="limits must be Limits"):
        TaskStore(tmp_path / "agent.db", runtime="desktop", limits=limits)


def test_limits_are_frozen() -> None:
    with pytest.raises(ValueError):
        Limits().live_tasks = 5  # type: ignore[misc]


async def test_the_largest_number_is_as_good_as_no_limit(opened: Callable[..., Any], release: asyncio.Event) -> None:
    store, session = await with_limits(opened, live_tasks=sys.maxsize, total_tasks=sys.maxsize)
    await session.spawn(holds(store, release), id="t")


# --- how many -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["live_tasks", "total_tasks"])
async def test_no_way_of_birth_passes_the_limit(
    opened: Callable[..., Any], path: Path, started: asyncio.Event, release: asyncio.Event, limit: str
) -> None:
    store, session = await with_limits(opened, **{limit: 2})
    hold = holds(store, release)
    refused: list[str] = []
    go_on = asyncio.Event()

    async def bare() -> None:
        raise AssertionError("it ran")

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> str:
        await go_on.wait()
        for child in (task.spawn(hold), task.spawn(bare()), session.spawn(hold, parent=task.id)):
            refused.append(repr(await told(child)))
        return "goes on"

    task = await session.spawn(parent)
    await session.spawn(hold, id="second")
    before = everything(path)
    coroutine = bare()
    for birth in (
        session.spawn(hold),
        session.spawn(coroutine),
        session.spawn_hidden("label", hold),
        session.register("ext", TaskKind.MONITOR),
    ):
        refused.append(repr(await told(birth)))
    assert coroutine.cr_frame is None
    assert everything(path) == before
    go_on.set()
    assert await task == "goes on"
    assert len(refused) == 7
    assert all(f"holds 2 tasks, which is its limit {limit}" in one for one in refused), refused
    # another session has room of its own
    await (await store.session("s2")).spawn(hold)
    assert await session.sync_needed() is False


async def test_one_that_ended_makes_room_among_the_live_and_not_in_total(
    opened: Callable[..., Any], release: asyncio.Event
) -> None:
    store, session = await with_limits(opened, live_tasks=1, total_tasks=3)

    async def quick() -> int:
        return 1

    for _ in range(2):
        assert await (await session.spawn(quick())) == 1
    task = await session.spawn(holds(store, release), id="t", cancel_policy=CancelPolicy.ABORT_LOCAL)
    with pytest.raises(LimitExceeded, match="live_tasks"):
        await session.spawn(quick())
    await task.cancel()
    with pytest.raises(LimitExceeded, match="total_tasks"):
        await session.spawn(quick())


async def test_a_birth_in_the_same_commit_counts(opened: Callable[..., Any], release: asyncio.Event) -> None:
    store, session = await with_limits(opened, live_tasks=5)
    hold = holds(store, release)

    got = await asyncio.gather(*[session.spawn(hold) for _ in range(20)], return_exceptions=True)

    assert sum(isinstance(one, LimitExceeded) for one in got) == 15
    assert len(await session.list()) == 5
    # what was refused holds no slot
    assert store._core is not None
    assert store._core.runner is not None
    assert store._core.runner.slots._free == 64 - 5


async def test_what_is_there_already_comes_back_at_the_limit(
    opened: Callable[..., Any], path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    store, session = await with_limits(opened, live_tasks=4, total_tasks=4)
    hold = holds(store, release)

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> list[int]:
        seqs = [(await task.spawn(hold, 1, id="child")).task_seq, (await task.spawn(hold, 2)).task_seq]
        if task.attempt == 1:
            started.set()
            await asyncio.Event().wait()
        return seqs

    task = await session.spawn(parent, id="parent", idempotency_key="parent")
    await started.wait()
    await session.register("ext", TaskKind.MONITOR, idempotency_key="ext")
    before = event_count(path)

    assert (await session.spawn(parent, id="parent", idempotency_key="parent")).task_seq == task.task_seq
    assert (await session.register("ext", TaskKind.MONITOR, idempotency_key="ext")).id == "ext"
    assert event_count(path) == before
    # bound again to who can be asked to end it
    await session.register("ext", TaskKind.MONITOR, cancel=lambda: asyncio.sleep(0))
    with pytest.raises(IdempotencyConflict):
        await session.spawn(hold, idempotency_key="parent")
    await session.abandon("parent", "dies")
    await store.recover()
    assert await task == [2, 3]


async def test_a_live_id_at_the_limit_is_still_told_so(opened: Callable[..., Any], release: asyncio.Event) -> None:
    store, session = await with_limits(opened, live_tasks=2)
    hold = holds(store, release)
    for id in ("a", "b"):
        await session.spawn(hold, id=id)

    # either is true; and neither writes
    with pytest.raises((TaskExists, LimitExceeded)):
        await session.spawn(hold, id="a")


async def test_recovery_takes_what_is_above_the_limit(new: Callable[..., TaskStore], release: asyncio.Event) -> None:
    async with new() as store:
        session = await store.session("s1")
        hold = holds(store, release)
        for number in range(3):
            await session.spawn(hold, id=f"t{number}")
    limited = new(limits=Limits(live_tasks=1, total_tasks=1, payload_bytes=5))
    limited.task(recovery=Recovery.RERUN)(hold)
    async with limited:
        session = await limited.session("s1")
        release.set()
        # the result has 4 bytes
        assert [await (await session.handle(f"t{number}")) for number in range(3)] == ["t0", "t1", "t2"]
        with pytest.raises(LimitExceeded):
            await session.spawn(hold)


# --- handing over ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["transfer", "handoff", "close"])
@pytest.mark.parametrize("limit", ["live_tasks", "total_tasks"])
async def test_work_is_handed_into_a_full_session_as_a_whole_or_not_at_all(
    opened: Callable[..., Any], path: Path, release: asyncio.Event, how: str, limit: str
) -> None:
    store, session = await with_limits(opened, **{limit: 3})
    there, hold = await store.session("s2"), holds(store, release)
    for id in ("there 1", "there 2"):
        await there.spawn(hold, id=id)
    for id in ("a", "b", "c"):
        await session.spawn(hold, id=id, close_policy=ClosePolicy.TRANSFER)
    before = everything(path)

    async def hand_over(ids: list[str]) -> Any:
        if how == "transfer":
            return await session.transfer(there, ids)
        if how == "handoff":
            return await session.handoff(there, ids, id=f"{len(ids)}")
        return await session.close(successor=there)

    with pytest.raises(LimitExceeded, match=f"'desktop:s2' holds 3 tasks, which is its limit {limit}"):
        await hand_over(["a", "b"])

    assert everything(path) == before
    if how == "close":
        return
    await hand_over(["a"])
    assert sorted(record.id for record in await there.list()) == ["a", "there 1", "there 2"]
    release.set()
    assert await (await there.handle("a")) == "a"


async def test_a_handoff_that_is_said_again_is_not_refused_in_a_full_session(
    opened: Callable[..., Any], release: asyncio.Event
) -> None:
    store, session = await with_limits(opened, live_tasks=1)
    there = await store.session("s2")
    await session.spawn(holds(store, release), id="a")

    handoff = await session.handoff(there, ["a"])

    assert await session.handoff(there, ["a"]) == handoff
    assert await session.transfer(there, []) == []
    # to hand over nothing is to add nothing
    assert (await session.handoff(there, [], id="nothing")).moved == ()


async def test_finished_tasks_count_in_total_where_they_go(opened: Callable[..., Any], path: Path) -> None:
    store, session = await with_limits(opened, total_tasks=1)
    there = await store.session("s2")

    async def quick() -> int:
        return 1

    await there.spawn(quick())
    task = await session.spawn(quick(), id="done")
    await task.wait()

    with pytest.raises(LimitExceeded, match="total_tasks"):
        await session.transfer(there, ["done"])
    with pytest.raises(HandleNotVisible):
        await there.transfer(session, ["done"])


async def test_moved_work_may_have_children_only_where_there_is_room(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store, session = await with_limits(opened, live_tasks=2)
    there, hold = await store.session("s2"), holds(store, release)
    go_on = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def parent(task: TaskContext) -> str:
        started.set()
        await go_on.wait()
        return str(await told(task.spawn(hold)))

    task = await session.spawn(parent, id="parent")
    await started.wait()
    await there.spawn(hold)
    await session.transfer(there, ["parent"])
    go_on.set()

    assert "session 'desktop:s2' holds 2 tasks" in str(await task)
