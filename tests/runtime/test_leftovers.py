"""What runs for monitors whose owner was killed: who recovers them ends it first, and everything else goes on meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    MonitorSpec,
    ProcessFate,
    Recovery,
    StorageBusy,
    StorageError,
    StoreClosed,
    TaskContext,
    TaskRecord,
    TaskState,
    TaskStore,
    leftovers,
    threads,
)
from tests.acceptance.processes import Report, Worker, workers
from tests.runtime.support import RUNTIME, rows
from tests.runtime.watching import STAY, STUBBORN, Watch, nothing_left, said, until

ROOT = Path(__file__).parents[2]


async def keep(report: Report, path: str, spec: str, *work: str) -> None:
    """Own a monitor, and with it, maybe, work that can be run again; say when it has written a line."""
    store = TaskStore(path, runtime=RUNTIME)
    stay = stay_in(store, asyncio.Event())
    async with store:
        session = await store.session("s1")
        for id in work:
            await session.spawn(stay, id=id, cancel_policy="abort_local")
        await session.start_monitor(MonitorSpec.model_validate_json(spec))
        await said(session, "up")
        report("up")
        await asyncio.Event().wait()


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Have what owners come from started, before anything of a test could be inherited by it."""
    forkserver.ensure_running()


Own = Callable[..., Worker]


@pytest.fixture(autouse=True)
def watch(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Specs of processes; none of which, nor anything of them, may be left."""
    with nothing_left(monkeypatch) as watch:
        yield watch


@pytest.fixture
def own(new: Callable[..., TaskStore], path: Path, watch: Watch) -> Iterator[Own]:
    """Start owners whose monitors have written a line."""
    new()
    made: list[Worker] = []
    with workers() as start:

        def own(spec: MonitorSpec, *work: str) -> Worker:
            worker: Worker = start(keep, str(path), spec.model_dump_json(), *work)
            made.append(worker)
            worker.wait_for("up")
            return worker

        yield own
    for worker in made:
        worker._process.close()


def row(path: Path) -> dict[str, Any]:
    """Return the row of the monitor's task."""
    [found] = rows(path, "SELECT * FROM tasks WHERE id = 'monitor:m'")
    return found


def stay_in(store: TaskStore, started: asyncio.Event) -> Any:
    """Register what owners leave beside their monitors."""

    @store.task(recovery=Recovery.RERUN)
    async def stay(task: TaskContext) -> None:
        started.set()
        await asyncio.Event().wait()

    return stay


def recoverer_of(store: TaskStore) -> Any:
    assert store._recoverer is not None
    return store._recoverer


async def ending(store: TaskStore) -> None:
    """Wait until a store ends what a dead owner left."""
    await until(lambda: recoverer_of(store)._ending)


async def restarted(path: Path, watch: Watch, before: list[int]) -> None:
    """Wait until a monitor has been started again, and hold that nothing of its first attempt lives."""
    await until(lambda: row(path)["attempt"] == 2 and row(path)["process"] is not None)
    assert row(path)["state"] == "running"
    assert not set(watch.running()) & set(before)


# --- where one cannot look ------------------------------------------------------------------------------------------


async def test_a_recovery_that_cannot_look_for_want_of_a_descriptor_takes_nothing_for_gone(
    new: Callable[..., TaskStore], own: Own, watch: Watch, path: Path
) -> None:
    own(watch.sh("m", f"echo up; {STAY}", restart_on_restore=True)).kill()
    before = watch.running()
    real = os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if isinstance(name, str) and Path(name).match("/proc/*/stat"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(name, *arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="Too many open files"):
            await new(cancel_grace=0.2).open()
    assert (row(path)["attempt"], row(path)["state"], watch.running()) == (1, "running", before)

    async with new(cancel_grace=0.2):
        await restarted(path, watch, before)


async def test_where_processes_of_others_are_hidden_what_was_left_is_ended_all_the_same(
    new: Callable[..., TaskStore], own: Own, watch: Watch, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(watch.sh("m", f"echo up; {STAY}")).kill()
    real = os.open

    def hide(name: Any, *arguments: Any, **options: Any) -> int:
        if name == "/proc/1/stat":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", hide)
    async with new(cancel_grace=0.2) as store:
        assert (row(path)["state"], watch.running()) == ("abandoned", [])
        task = await (await store.session("s1")).start_monitor(watch.sh("another", "exit 0"))

        assert (await task.wait(timeout=10)).state is TaskState.COMPLETED


# --- tried again ----------------------------------------------------------------------------------------------------


async def test_a_recovery_that_meets_a_locked_file_once_what_was_left_is_ended_is_tried_again(
    opened: Callable[..., Any], own: Own, watch: Watch, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = own(watch.sh("m", f"echo up; {STAY}", restart_on_restore=True))
    before = watch.running()
    recoverer = recoverer_of(await opened(cancel_grace=0.2))
    in_one, met = recoverer._in_one, []

    async def meet_a_lock(dead: Any, fates: Any) -> Any:
        if ProcessFate.ENDED in fates.values() and not met:
            met.append(fates)
            raise StorageBusy("another process held the write lock")
        return await in_one(dead, fates)

    monkeypatch.setattr(recoverer, "_in_one", meet_a_lock)
    owner.kill()

    await restarted(path, watch, before)
    assert len(met) == 1


@pytest.mark.parametrize("which", ["to look", "to end it"])
async def test_a_recovery_that_finds_no_thread_is_tried_again(
    opened: Callable[..., Any],
    own: Own,
    watch: Watch,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    owner = own(watch.sh("m", f"echo up; {STAY}", restart_on_restore=True))
    before = watch.running()
    store = await opened(cancel_grace=0.2)
    wanted, asked = {"to look": 1, "to end it": 2}[which], 0

    async def find_none(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == wanted:
            raise RuntimeError("can't start new thread")
        return await threads.in_thread(*arguments, **options)

    monkeypatch.setattr(leftovers, "in_thread", find_none)
    owner.kill()

    await restarted(path, watch, before)
    assert asked > wanted
    assert not recoverer_of(store)._watch.done()


# --- what goes on meanwhile -----------------------------------------------------------------------------------------


async def test_while_opening_waits_for_what_was_left_other_work_is_started_and_can_be_cancelled_from_elsewhere(
    new: Callable[..., TaskStore], own: Own, watch: Watch, path: Path, started: asyncio.Event
) -> None:
    own(watch.python("m", STUBBORN), "t").kill()
    store = new(cancel_grace=60)
    stay_in(store, started)
    opening = asyncio.create_task(store.open())
    async with asyncio.timeout(10):
        await started.wait()
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        record = await (await asking.session("s1")).cancel("t", timeout=10)

    assert (record.state, opening.done(), len(watch.running())) == (TaskState.CANCELLED, False, 1)
    watch.kill()
    await opening
    assert row(path)["state"] == "abandoned"
    await store.close()


async def test_the_report_of_a_recovery_has_what_it_did_at_once_and_what_it_did_once_a_process_was_ended(
    opened: Callable[..., Any], new: Callable[..., TaskStore], own: Own, watch: Watch, path: Path
) -> None:
    owner = own(watch.python("m", STUBBORN), "t")
    store = new(cancel_grace=0.2)
    stay_in(store, asyncio.Event())
    async with store:
        owner.kill()
        await until(lambda: row(path)["state"] == "abandoned")
        await until(lambda: recoverer_of(store)._ending is None)

        report = store.recovered
    assert [record.id for record in report.reattached] == ["t"]
    assert [record.id for record in report.abandoned] == ["monitor:m"]
    assert len(report.dead_owners) == 1


async def test_the_report_of_an_opening_has_both_halves(new: Callable[..., TaskStore], own: Own, watch: Watch) -> None:
    own(watch.python("m", STUBBORN), "t").kill()
    store = new(cancel_grace=0.2)
    stay_in(store, asyncio.Event())
    async with store:
        report = store.recovered

        assert [record.id for record in (*report.reattached, *report.abandoned)] == ["t", "monitor:m"]


# --- when the store closes ------------------------------------------------------------------------------------------


async def test_who_recovers_while_the_store_closes_is_not_taken_for_cancelled(
    new: Callable[..., TaskStore], own: Own, watch: Watch
) -> None:
    owner = own(watch.python("m", STUBBORN))
    async with new(cancel_grace=60) as store:
        owner.kill()
        recovering = asyncio.create_task(store.recover())
        await ending(store)

        await store.close()

        async with asyncio.timeout(10):
            [found] = await asyncio.gather(recovering, return_exceptions=True)
    # never CancelledError: nobody has cancelled it
    assert isinstance(found, StoreClosed) or found.abandoned == ()
    await until(lambda: watch.running() == [])


async def test_who_only_asks_closes_in_its_time_while_it_ends_what_was_left_and_has_killed_it(
    own: Own, watch: Watch, path: Path
) -> None:
    own(watch.python("m", STUBBORN)).kill()
    asking = TaskStore.connect(path, runtime=RUNTIME)
    await asking.open()
    record = await (await asking.session("s1")).cancel("monitor:m", timeout=0)
    assert record.state is TaskState.CANCEL_REQUESTED
    began = time.monotonic()

    await asking.close(timeout=0.3)

    # it gives processes 5 s
    await until(lambda: watch.running() == [])
    assert time.monotonic() - began < 3.0


async def test_an_owner_closes_in_its_time_while_it_ends_what_was_left_beside_its_own_and_has_killed_both(
    new: Callable[..., TaskStore], own: Own, watch: Watch, path: Path
) -> None:
    owner = own(watch.python("m", STUBBORN))
    async with new(cancel_grace=60) as store:
        session = await store.session("s2")
        await session.start_monitor(watch.python("own", STUBBORN))
        await said(session, "up")
        owner.kill()
        cancelling = asyncio.create_task((await store.session("s1")).cancel("monitor:m"))
        await until(lambda: row(path)["state"] == "cancel_requested" and store._core.endings)  # type: ignore[union-attr]
        began = time.monotonic()

        await store.close(timeout=1.5)

        took = time.monotonic() - began
    assert watch.running() == []
    # once, not for the one and then for the other
    assert took < 2.9
    assert row(path)["state"] in {"cancel_requested", "cancelled"}
    [found] = await asyncio.gather(cancelling, return_exceptions=True)
    assert isinstance(found, TaskRecord | StoreClosed)


# --- of one's own ---------------------------------------------------------------------------------------------------

_INSIDE = """
import asyncio, os, sys, time
from lash_store import TaskStore

async def look():
    async with TaskStore(sys.argv[1], runtime=sys.argv[2], cancel_grace=0.1) as store:
        record = await (await store.session("s1")).get("monitor:m")
        print(record.state, record.attempt, record.owner_id, flush=True)
        with open(sys.argv[1] + ".out", "w") as out:
            out.write(f"{record.state} {record.attempt} {record.owner_id}")

print("up", flush=True)
while not os.path.exists(sys.argv[1] + ".go"):
    time.sleep(0.01)
try:
    # nobody reads what it writes any more
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    asyncio.run(look())
finally:
    open(sys.argv[1] + ".over", "w").close()
"""


async def test_a_store_that_what_was_left_opens_itself_leaves_its_row_alone(
    new: Callable[..., TaskStore], own: Own, watch: Watch, path: Path
) -> None:
    env = {**watch.sh("m", "true").env, "PYTHONPATH": str(ROOT)}
    owner = own(MonitorSpec(id="m", command=[sys.executable, "-c", _INSIDE, str(path), RUNTIME], env=env))
    before = row(path)
    owner.kill()

    Path(f"{path}.go").touch()
    await until(Path(f"{path}.over").exists)

    assert Path(f"{path}.out").read_text() == f"running 1 {before['owner_id']}"
    assert row(path) == before
    await until(lambda: watch.running() == [])
    async with new():
        assert row(path)["state"] == "abandoned"
