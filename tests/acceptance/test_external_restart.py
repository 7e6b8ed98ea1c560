"""External work, its callbacks and its cancels across the deaths of real processes, and owners that a person gives up."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import Recovery, SessionTasks, TaskContext, TaskKind, TaskRecord, TaskState, TaskStore
from tests.acceptance import external_programs
from tests.acceptance.processes import Worker
from tests.runtime.support import RUNTIME, event_types, rows

OTHER = TaskKind.OTHER
CANCELLED, REQUESTED, WAITING = TaskState.CANCELLED, TaskState.CANCEL_REQUESTED, TaskState.WAITING
CUT_OFF = ["cancel_requested", "state_changed", "callback_failed", "cancelled"]


async def keeper(start: Callable[..., Worker], path: Path, shape: str) -> Worker:
    """Start a process that keeps the books of "job" and runs bodies."""
    worker = start(external_programs.keep, str(path), shape)
    await worker.says("ready")
    for task_id in ("again", "once"):
        await worker.says("body", task_id)
    return worker


async def stop(worker: Worker) -> None:
    """Stop a process where it stands, and wait until it does."""
    worker.stop()
    async with asyncio.timeout(20):
        while Path(f"/proc/{worker.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "T":
            await asyncio.sleep(0.001)


def called(worker: Worker) -> list[str]:
    """Return what a dead worker said its callbacks were called for."""
    return [words[1] for words in worker.said if words[0] == "called"]


def happened(path: Path, task_id: str, after: str) -> list[str]:
    """Return what happened to the first task of an id from the first event of a type on."""
    [first, *_] = rows(path, "SELECT task_seq FROM tasks WHERE id = ? ORDER BY task_seq", task_id)
    types = event_types(path, first["task_seq"])
    return types[types.index(after) :]


async def ask(path: Path, task_id: str, timeout: float | None) -> TaskRecord:
    """Cancel a task as another process would: through connect()."""
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        return await (await asking.session("s1")).cancel(task_id, "from outside", timeout=timeout)


# --- asking another process -----------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_cancel_from_another_process_calls_the_callback_in_its_owner(
    start: Callable[..., Worker], path: Path
) -> None:
    owner = await keeper(start, path, "quick")

    record = await ask(path, "job", timeout=None)

    assert (record.state, record.cancel_reason, record.callback_error) == (CANCELLED, "from outside", None)
    owner.kill()
    assert called(owner) == ["job"]
    assert happened(path, "job", "cancel_requested") == ["cancel_requested", "state_changed", "cancelled"]


async def test_two_processes_that_cancel_at_once_call_it_once(start: Callable[..., Worker], path: Path) -> None:
    owner = await keeper(start, path, "quick")
    go = path.with_name("go")
    asking = [start(external_programs.ask_at, str(path), str(go), "job") for _ in range(3)]
    for worker in asking:
        await worker.says("ready")

    go.touch()

    answers = [await worker.says("cancelled") for worker in asking]
    assert answers == [["cancelled", "cancelled"]] * 3
    owner.kill()
    assert called(owner) == ["job"]
    assert happened(path, "job", "cancel_requested") == ["cancel_requested", "state_changed", "cancelled"]
    for worker in asking:
        worker.join()


async def test_work_of_a_dead_owner_is_cancelled_by_who_connects(start: Callable[..., Worker], path: Path) -> None:
    owner = await keeper(start, path, "quick")
    owner.kill()

    records = {task_id: await ask(path, task_id, None) for task_id in ("job", "booked", "again", "once", "pending")}

    job = records.pop("job")
    # nobody can call its callback before it is registered again
    assert (job.state, job.owner_id, job.callback_begun_at) == (REQUESTED, None, None)
    assert {record.state for record in records.values()} == {CANCELLED}
    assert {record.cancel_reason for record in records.values()} == {"from outside"}
    assert called(owner) == []


async def test_all_work_of_a_dead_owner_is_cancelled_at_once(start: Callable[..., Worker], path: Path) -> None:
    (await keeper(start, path, "quick")).kill()
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        reports = await (await asking.session("s1")).cancel_all("from outside")

    assert [(report.record.id, str(report.record.state)) for report in reports] == [
        ("job", "cancel_requested"),
        ("booked", "cancelled"),
        ("again", "cancelled"),
        ("once", "cancelled"),
        ("pending", "cancelled"),
    ]
    assert {report.error for report in reports} == {None}


# --- crashes around the callback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks_again", [False, True], ids=["recovery", "cancel"])
async def test_a_cancel_whose_owner_died_before_its_callback_began_stands_and_the_next_register_fires_it(
    start: Callable[..., Worker], path: Path, asks_again: bool
) -> None:
    owner = await keeper(start, path, "quick")
    await stop(owner)
    record = await ask(path, "job", timeout=0.05)
    assert (record.state, record.owner_id) == (REQUESTED, 1)
    owner.kill()
    if asks_again:
        record = await ask(path, "job", timeout=None)
        assert (record.state, record.owner_id, record.callback_begun_at) == (REQUESTED, None, None)
    got: list[TaskRecord] = []
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        record = await session.get("job")
        assert (record.state, record.owner_id, record.callback_begun_at) == (REQUESTED, None, None)

        handle = await session.register("job", OTHER, lambda record: got.append(record))

        assert handle.task_seq == record.task_seq
        assert (await handle.wait(20)).state is CANCELLED
        await store.recover()
    assert called(owner) == []
    assert [record.cancel_reason for record in got] == ["from outside"]
    told = ["cancel_requested", "released", "reattached", "state_changed", "cancelled"]
    assert happened(path, "job", "cancel_requested") == told


@pytest.mark.parametrize("shape", ["hangs", "blocks"])
async def test_a_callback_that_died_with_its_owner_is_noted_at_the_next_open_and_not_called_again(
    start: Callable[..., Worker], path: Path, shape: str
) -> None:
    owner = await keeper(start, path, shape)
    await ask(path, "job", timeout=0)
    await owner.says("called", "job")
    owner.kill()
    again: list[int] = []
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")

        record = await session.get("job")

        assert (record.state, record.cancel_reason) == (CANCELLED, "from outside")
        assert record.callback_error is not None
        assert record.callback_error.type == "CallbackCutOff"
        handle = await session.register("job", OTHER, lambda: again.append(1))
        assert handle.task_seq != record.task_seq
        await store.recover()
        assert (await handle.record()).state is TaskState.RUNNING
    assert happened(path, "job", "cancel_requested") == CUT_OFF
    assert (called(owner), again) == (["job"], [])


async def test_a_callback_that_died_with_its_owner_is_noted_by_a_live_peer(
    start: Callable[..., Worker], path: Path
) -> None:
    owner = await keeper(start, path, "hangs")
    async with TaskStore(path, runtime=RUNTIME) as peer:
        session = await peer.session("s1")
        canceller = asyncio.create_task(session.cancel("job", "from a peer"))
        await owner.says("called", "job")

        owner.kill()

        async with asyncio.timeout(20):
            record = await canceller
        assert (record.state, record.cancel_reason) == (CANCELLED, "from a peer")
        assert record.callback_error is not None
        assert record.callback_error.type == "CallbackCutOff"
    assert happened(path, "job", "cancel_requested") == CUT_OFF


async def test_who_waits_through_connect_hears_of_a_callback_that_died_with_its_owner(
    start: Callable[..., Worker], path: Path
) -> None:
    owner = await keeper(start, path, "hangs")
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        session = await asking.session("s1")
        canceller = asyncio.create_task(session.cancel("job", "from outside"))
        await owner.says("called", "job")

        owner.kill()

        async with asyncio.timeout(20):
            record = await canceller
    assert record.state is CANCELLED
    assert record.callback_error is not None
    assert record.callback_error.type == "CallbackCutOff"
    assert happened(path, "job", "cancel_requested") == CUT_OFF


@pytest.mark.long
async def test_a_callback_is_called_at_most_once_wherever_its_process_is_killed(
    start: Callable[..., Worker], path: Path
) -> None:
    chance = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")
    calls, rounds, fates = path.with_name("calls"), 10, Counter[str]()
    calls.touch()
    for number in range(rounds):
        task_id = f"job{number}"
        worker = start(external_programs.one_call, str(path), task_id, str(calls))
        await worker.says("registered")
        async with TaskStore.connect(path, runtime=RUNTIME) as asking:
            session = await asking.session("s1")
            canceller = asyncio.create_task(session.cancel(task_id, timeout=20))
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            worker.kill()
            await canceller
        before = len(calls.read_text().splitlines())

        async with TaskStore(path, runtime=RUNTIME) as store:
            session = await store.session("s1")
            here: list[int] = []
            if not (await session.get(task_id)).is_terminal:
                handle = await session.register(task_id, OTHER, lambda here=here: here.append(1))
                assert (await handle.wait(20)).state is CANCELLED
            record = await session.get(task_id)
        lines = calls.read_text().splitlines()
        told = lines.count(str(worker.pid)) + len(here)
        fates["cut off" if record.callback_error else "called here" if here else "called there"] += 1
        # nobody is called twice, and who stands as called without an error was called
        assert (record.state, len(lines)) == (CANCELLED, before)
        assert told == 1 if record.callback_error is None else told <= 1
    print(dict(fates))
    found = rows(path, "SELECT task_seq FROM tasks")
    assert len(found) == rounds
    for row in found:
        assert event_types(path, row["task_seq"]).count("cancelled") == 1


# --- a new keeper ---------------------------------------------------------------------------------------------------


async def bound_again(session: SessionTasks, task_seq: int, **options: Any) -> None:
    """Register "job" again, and hold that it is the same row, as it was, and ends through the new callback."""
    got: list[int] = []

    handle = await session.register("job", OTHER, lambda: got.append(1), **options)

    record = await handle.record()
    assert (record.task_seq, record.state, record.attempt) == (task_seq, WAITING, 0)
    assert (record.progress, record.fraction) == ("half", 0.5)
    assert (await handle.cancel()).state is CANCELLED
    assert got == [1]


@pytest.mark.parametrize("key", [None, "key of the job"])
async def test_work_whose_keeper_crashed_is_bound_to_who_registers_it_after_a_restart(
    start: Callable[..., Worker], path: Path, key: str | None
) -> None:
    owner = await keeper(start, path, "quick")
    task_seq = owner.wait_for("ready")[1]
    owner.kill()
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        assert (await session.get("job")).owner_id is None

        await bound_again(session, task_seq, idempotency_key=key)

    assert called(owner) == []
    assert happened(path, "job", "released")[:2] == ["released", "reattached"]


async def test_a_live_peer_may_register_it_the_moment_its_keeper_is_dead(
    start: Callable[..., Worker], path: Path
) -> None:
    owner = await keeper(start, path, "quick")
    async with TaskStore(path, runtime=RUNTIME) as peer:
        session = await peer.session("s1")
        task_seq = owner.wait_for("ready")[1]
        owner.kill()

        # whether or not anybody has noticed yet
        await bound_again(session, task_seq)

    assert happened(path, "job", "registered").count("reattached") == 1
    assert called(owner) == []


async def test_the_moment_a_callback_died_with_its_owner_a_live_peer_may_register_the_id_anew(
    start: Callable[..., Worker], path: Path
) -> None:
    owner = await keeper(start, path, "hangs")
    again: list[int] = []
    async with TaskStore(path, runtime=RUNTIME) as peer:
        session = await peer.session("s1")
        await session.cancel("job", "from a peer", timeout=0)
        await owner.says("called", "job")
        owner.kill()

        handle = await session.register("job", OTHER, lambda: again.append(1))

        assert handle.task_seq != owner.wait_for("ready")[1]
        assert (await handle.record()).state is TaskState.RUNNING
    assert happened(path, "job", "cancel_requested") == CUT_OFF
    assert (called(owner), again) == (["job"], [])


# --- an owner that is stuck -----------------------------------------------------------------------------------------


async def test_a_stopped_owner_that_was_given_up_writes_and_creates_nothing_when_it_goes_on(
    start: Callable[..., Worker], path: Path
) -> None:
    go = path.with_name("go")
    worker = start(external_programs.be_stuck, str(path), str(go))
    await worker.says("ready")
    await stop(worker)
    peer, mine = TaskStore(path, runtime=RUNTIME), list[str]()

    @peer.task(recovery=Recovery.RERUN, name="again")
    async def again(task: TaskContext) -> list[Any]:
        return [task.attempt, task.checkpoint]

    async with peer:
        session = await peer.session("s1")
        await peer.recover()
        assert {record.owner_id for record in await session.list()} == {1}
        async with TaskStore.connect(path, runtime=RUNTIME) as asking:
            report = await asking.abandon_owner(1, "it is stopped")
        assert [record.id for record in report.released] == ["again", "job"]
        assert [record.id for record in report.abandoned] == ["once"]
        # its work is taken over while it still stands
        assert await (await session.handle("again")).result(20) == [3, "before"]
        job = await session.register("job", OTHER, lambda: mine.append("called"))
        go.touch()

        worker.signal(signal.SIGCONT)

        await worker.says("went on")
        for task_id in ("again", "once"):
            await worker.says("refused", f"{task_id} notify")
        assert (await job.cancel("enough", timeout=20)).state is CANCELLED
        assert await session.notes() == []

    said = worker.kill()
    assert [words for words in said if words[0] == "written"] == []
    refused = {words[1]: words[2] for words in said if words[0] == "refused"}
    assert refused == {
        **{f"{task_id} {write}": "StaleAttempt" for task_id in ("again", "once") for write in _WRITES},
        **dict.fromkeys(("spawn", "coroutine", "register"), "StoreClosed"),
    }
    assert (called(worker), mine) == ([], ["called"])
    found = rows(path, "SELECT id, state, attempt, result, progress FROM tasks ORDER BY task_seq")
    assert [tuple(row.values()) for row in found] == [
        ("again", "completed", 3, '[3,"before"]', None),
        ("once", "abandoned", 2, None, None),
        ("job", "cancelled", 0, None, None),
    ]
    assert event_types(path, 1).count("completed") == 1
    assert rows(path, "SELECT end FROM owners WHERE owner_id = 1") == [{"end": "abandoned"}]


_WRITES = ("save", "progress", "notify")
