"""What becomes of each live row when its owner is gone; the dead owners are real processes ended by SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    Recovery,
    RecoveryReport,
    TaskContext,
    TaskState,
    TaskStore,
    guards,
    owners,
    transitions,
)
from tests.acceptance import programs
from tests.acceptance.processes import Worker, workers
from tests.runtime.support import RUNTIME, event_count, event_types, hold, next_event, rows


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start worker processes."""
    with workers() as start:
        yield start


@pytest.fixture
def leave(start: Callable[..., Worker], path: Path) -> Callable[..., Worker]:
    """Leave tasks behind in the file: spawn them in a process and kill it."""

    def left(*tasks: list[Any], **options: Any) -> Worker:
        worker = start(programs.spawn_and_stay, str(path), list(tasks), options)
        worker.wait_for("ready")
        for _, task_id, how, _ in tasks:
            if not how.get("bare") and not how.get("waits"):
                worker.wait_for("body", task_id)
        worker.kill()
        return worker

    return left


def row(path: Path, task_id: str) -> dict[str, Any]:
    """Read one task."""
    return rows(path, "SELECT * FROM tasks WHERE id = ?", task_id)[0]


def registered(store: TaskStore, ran: list[Any] | None = None) -> None:
    """Register what the workers register, in a form that ends at once."""
    for name, recovery in (("count", "rerun"), ("forever", "rerun"), ("once", "owner_bound"), ("stubborn", "rerun")):

        def body(name: str) -> Any:
            async def run(task: TaskContext, until: int = 0) -> list[Any]:
                if ran is not None:
                    ran.append((task.id, task.attempt))
                return [task.attempt, task.checkpoint, until]

            return run

        store.task(recovery=recovery, name=name)(body(name))  # type: ignore[arg-type]


# --- the table ------------------------------------------------------------------------------------------------------


async def test_rerun_work_is_reattached_with_arguments_and_checkpoint(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    worker = leave(["count", "t", {}, [10_000]])
    saved = [words[2] for words in worker.said if words[0] == "saved"]
    store = new()
    registered(store)

    async with store:
        attempt, checkpoint, until = await (await store.handle("desktop:s1", "t"))  # type: ignore[misc]

    assert (attempt, until) == (2, 10_000)
    assert (checkpoint or 0) >= max(saved, default=0)
    assert (row(path, "t")["attempts_spent"], row(path, "t")["owner_id"]) == (1, 2)
    [reattached] = rows(path, "SELECT attempt, data FROM events WHERE type = 'reattached'")
    assert reattached["attempt"] == 2
    assert '"previous_owner_id":1' in reattached["data"]


async def test_many_rows_are_started_in_parts_each_with_its_own_checkpoint(
    start: Callable[..., Worker], new: Callable[..., TaskStore], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "_STARTS_AT_ONCE", 2)
    names = [f"t{number}" for number in range(5)]
    worker = start(
        programs.spawn_and_stay,
        str(path),
        [["count", name, {}, [10_000 + number]] for number, name in enumerate(names)],
        {},
    )
    for name in names[1:]:
        worker.wait_for("saved", name)
    worker.kill()
    store = new()
    registered(store)

    async with store:
        results: dict[str, Any] = {name: await (await store.handle("desktop:s1", name)) for name in names}

    saved = {
        found["id"]: found["value"]
        for found in rows(
            path, "SELECT id, value FROM steps JOIN tasks USING (task_seq) WHERE steps.kind = 'checkpoint'"
        )
    }
    assert len(saved) >= 4
    for number, name in enumerate(names):
        checkpoint = json.loads(saved[name]) if name in saved else None
        assert results[name] == [2, checkpoint, 10_000 + number]
    assert [found["n"] for found in rows(path, "SELECT count(*) AS n FROM events WHERE type = 'reattached'")] == [5]


async def test_the_collector_of_cycles_is_off_while_rows_are_taken_over_and_on_again_behind_it(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(["count", "t", {}, [10_000]])
    whether: list[bool] = []
    start_all = transitions.start_all

    def looking(tx: Any, starts: Any) -> None:
        whether.append(gc.isenabled())
        start_all(tx, starts)

    monkeypatch.setattr(transitions, "start_all", looking)
    store = new()
    registered(store)

    async with store:
        assert gc.isenabled()

    assert whether[-1] is False


async def test_a_cancel_that_was_asked_for_is_finished_and_the_body_not_run(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["forever", "t", {"cancel": True}, []], cancel_grace=3600.0)
    assert row(path, "t")["state"] == "cancel_requested"
    ran: list[Any] = []
    store = new()
    registered(store, ran)

    async with store:
        record = await store.get("desktop:s1", "t")

    assert (record.state, record.cancel_reason, ran) == (TaskState.CANCELLED, "asked before the end", [])
    assert record.attempt == 1


async def test_a_swallowed_cancel_is_finished_too(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["stubborn", "t", {"cancel": True, "cancel_policy": "abort_local"}, []])

    async with new() as store:
        assert (await store.get("desktop:s1", "t")).state is TaskState.CANCELLED


@pytest.mark.parametrize("bare", [True, False])
async def test_started_work_bound_to_its_owner_is_abandoned_with_evidence(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], bare: bool
) -> None:
    worker = leave(["once", "t", {"bare": bare}, []])
    ran: list[Any] = []
    store = new()
    registered(store, ran)

    async with store:
        record = await store.get("desktop:s1", "t")

    assert (record.state, ran) == (TaskState.ABANDONED, [])
    assert record.evidence is not None
    assert (record.evidence.owner_id, record.evidence.pid, record.evidence.end) == (1, worker.pid, "died")
    assert record.evidence.host == os.uname().nodename
    assert record.evidence.found_at >= record.created_at


async def test_a_bare_coroutine_that_never_started_is_abandoned(
    leave: Callable[..., Worker], new: Callable[..., TaskStore]
) -> None:
    leave(["forever", "first", {}, []], ["once", "t", {"bare": True}, []], max_running=1)

    async with new() as store:
        record = await store.get("desktop:s1", "t")

    assert (record.state, record.attempt) == (TaskState.ABANDONED, 0)


async def test_work_bound_to_its_owner_that_never_started_is_run(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["forever", "first", {}, []], ["once", "t", {"waits": True}, []], max_running=1)
    store = new()
    registered(store)

    async with store:
        assert await (await store.handle("desktop:s1", "t")) == [1, None, 0]

    assert (row(path, "t")["attempts_spent"], row(path, "first")["attempts_spent"]) == (0, 1)


async def test_rerun_work_whose_attempts_are_spent_fails(
    start: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    store = new()
    ran: list[int] = []

    @store.task(recovery=Recovery.RERUN, name="count")
    async def count(task: TaskContext, until: int) -> int:
        ran.append(task.attempt)
        return task.attempt

    worker = start(programs.spawn_and_stay, str(path), [["count", "t", {}, [10_000]]], {})
    worker.wait_for("body", "t")
    worker.kill()
    with sqlite3.connect(path) as connection:
        # as if it had been registered with max_attempts=1; the event too, as the two must agree
        connection.execute("UPDATE tasks SET max_attempts = 1")
        connection.execute("DROP TRIGGER events_are_history")
        connection.execute("UPDATE events SET data = json_set(data, '$.max_attempts', 1) WHERE type = 'registered'")
    connection.close()

    async with store:
        record = await store.get("desktop:s1", "t")

    assert (record.state, record.attempts_spent, ran) == (TaskState.FAILED, 1, [])
    assert record.failure is not None
    assert record.failure.type == "AttemptsExhausted"
    assert "1 of 1" in record.failure.message


async def test_work_of_an_unknown_function_is_released_and_reported_then_taken_once_it_is_known(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["count", "t", {}, [10_000]])
    task_seq = row(path, "t")["task_seq"]

    async with new() as store:
        found = row(path, "t")
        assert (found["state"], found["owner_id"], found["attempt"], found["attempts_spent"]) == ("pending", None, 1, 1)
        assert event_types(path, task_seq)[-1] == "released"
        count = event_count(path)
        report = await store.recover()
        assert report.unknown_functions == ("count",)
        assert (report.released, report.reattached) == ((), ())
        assert event_count(path) == count

        registered(store)
        report = await store.recover()

        assert [record.id for record in report.reattached] == ["t"]
        assert report.unknown_functions == ()
        result: Any = await (await store.handle("desktop:s1", "t"))
        assert result[0] == 2


async def test_never_started_work_of_an_unknown_function_is_released(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    waits = {"waits": True}
    leave(["forever", "first", {}, []], ["only_here", "a", waits, []], ["once", "b", waits, []], max_running=1)
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def forever(task: TaskContext) -> None: ...

    async with store:
        assert await (await store.handle("desktop:s1", "first")) is None
        for name in ("a", "b"):
            record = await store.get("desktop:s1", name)
            assert (record.state, record.owner_id, record.attempt) == (TaskState.PENDING, None, 0)


# --- the report, and writing nothing --------------------------------------------------------------------------------


async def test_a_second_recovery_that_finds_nothing_writes_nothing(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["count", "a", {}, [10_000]], ["only_here", "b", {}, []], ["once", "c", {}, []])
    store = new()
    registered(store)
    async with store:
        await (await store.handle("desktop:s1", "a"))
        await store.recover()
        watcher = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        version, count = watcher.execute("PRAGMA data_version").fetchone(), event_count(path)

        report = await store.recover()

        assert report == RecoveryReport(unknown_functions=("only_here",))
        assert watcher.execute("PRAGMA data_version").fetchone() == version
        assert event_count(path) == count
        watcher.close()


async def test_the_dead_owner_is_noted_and_its_side_file_removed(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["count", "a", {}, [10_000]])

    async with new():
        [dead, alive] = rows(path, 'SELECT token, ended_at, "end" FROM owners ORDER BY owner_id')
        assert (dead["end"], alive["end"]) == ("died", None)
        assert dead["ended_at"] is not None
        assert [found.stem for found in Path(f"{path}-owners").iterdir()] == [alive["token"]]


async def test_who_was_taken_over_from_is_no_reason_to_recover_once_more(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(["count", "a", {}, [10_000]])

    async with new() as store:
        recoverer = store._recoverer
        assert recoverer is not None
        recovered: list[bool] = []

        async def recover(*, wait: bool = True) -> None:
            recovered.append(wait)

        monkeypatch.setattr(recoverer, "recover", recover)
        await recoverer.take_what_was_left()
        assert recovered == []


async def test_side_files_of_processes_that_died_without_a_row_are_removed(
    new: Callable[..., TaskStore], path: Path
) -> None:
    # it was killed after it had made its file, and before its row was committed
    folder = guards.make_side_folder(path)
    (folder / "o-killed.lock").touch()
    async with new() as store:
        [alive] = rows(path, "SELECT token FROM owners")
        assert [found.stem for found in folder.iterdir()] == [alive["token"]]

        (folder / "o-later.new").touch()
        await store.recover()

        assert [found.stem for found in folder.iterdir()] == [alive["token"]]


async def test_the_side_file_of_a_reader_stays_as_long_as_its_claim(new: Callable[..., TaskStore], path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")
        # its process lives, and could not say that it reads no more: that its lock is free tells
        _claim(path, "o-reader")
        await store.recover()
        assert Path(f"{path}-owners", "o-reader.lock").exists()

        assert await session.inbox() == []
        assert not Path(f"{path}-owners", "o-reader.lock").exists()


async def test_what_tells_of_side_files_may_be_damaged_and_work_is_recovered_all_the_same(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(["count", "a", {}, [10_000]])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints=ON")
        db.execute("UPDATE sessions SET inbox_claim = '{'")

    store = new()
    ran: list[Any] = []
    registered(store, ran)
    async with store:
        assert store.recovered is not None
        assert [task.id for task in store.recovered.reattached] == ["a"]
        assert [one.message for one in caplog.records if one.name == "lash_store.recovery"] == ["side_files_not_swept"]


def _claim(path: Path, token: str) -> None:
    """Leave a claim of the notes of every session, whose lock is free."""
    claim = json.dumps({"token": token, **owners.describe_process()})
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE sessions SET inbox_claim = ?", [claim])
    Path(f"{path}-owners", f"{token}.lock").touch()


# --- whom recovery leaves alone -------------------------------------------------------------------------------------


async def test_recovery_never_touches_a_live_peer_of_the_same_runtime(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    first = await opened()
    task = await (await first.session("s1")).spawn(hold(started, release), id="t")
    await started.wait()
    before = row(path, "t")

    second = await opened()
    report = await second.recover()

    assert report == RecoveryReport()
    assert row(path, "t") == before
    release.set()
    assert await task is None


async def test_recovery_never_touches_another_runtime(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(["count", "t", {}, [10_000]])
    before = row(path, "t")
    for other in ("desktop2", "deskto", "other"):
        store = new(runtime=other)
        registered(store)
        async with store:
            assert await store.recover() == RecoveryReport()
    assert row(path, "t") == before

    store = new()
    registered(store)
    async with store:
        assert (await (await store.handle("desktop:s1", "t")).wait()).attempt == 2


async def test_a_live_peer_takes_what_a_closing_owner_releases(opened: Callable[..., Any], new: Any) -> None:
    peer, closing = new(), new()
    ran: asyncio.Queue[str] = asyncio.Queue()

    def functions(store: TaskStore, name: str, *, ends: bool) -> Any:
        async def work(task: TaskContext) -> str:
            ran.put_nowait(name)
            if not ends:
                await asyncio.Event().wait()
            return name

        return store.task(recovery=Recovery.RERUN, name="work")(work)

    functions(peer, "peer", ends=True)
    work = functions(closing, "closing", ends=False)
    async with peer:
        async with closing:
            await (await closing.session("s1")).spawn(work, id="t")
            assert await ran.get() == "closing"
        assert await (await peer.handle("desktop:s1", "t")).result(timeout=5) == "peer"


def test_an_owner_of_this_process_whose_loop_is_closed_is_dead(start: Callable[..., Worker], path: Path) -> None:
    worker = start(programs.two_loops, str(path))

    assert worker.wait_for("result") == ["result", 2]
    worker.join()
    assert [found["end"] for found in rows(path, 'SELECT "end" FROM owners')] == ["died", "closed"]


# --- slots ----------------------------------------------------------------------------------------------------------


async def test_rows_beyond_the_slots_wait_as_mine_and_start_later_in_order(
    leave: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    leave(*[["forever", f"t{number}", {}, []] for number in range(6)])
    store = new(max_running=2)
    gate, order = asyncio.Event(), []

    @store.task(recovery=Recovery.RERUN)
    async def forever(task: TaskContext) -> None:
        order.append(task.id)
        await gate.wait()

    async with store:
        found = [(one["state"], one["attempt"], one["owner_id"], one["attempts_spent"]) for one in _all(path)]
        assert found == [("running", 2, 2, 1)] * 2 + [("pending", 1, 2, 1)] * 4
        gate.set()
        for number in range(6):
            record = await (await store.handle("desktop:s1", f"t{number}")).wait(timeout=5)
            assert (record.state, record.attempt) == (TaskState.COMPLETED, 2)
    assert order == [f"t{number}" for number in range(6)]
    assert event_types(path, 5) == ["registered", "started", "claimed", "reattached", "completed"]


def _all(path: Path) -> list[dict[str, Any]]:
    return rows(path, "SELECT * FROM tasks ORDER BY task_seq")


async def test_an_owner_that_dies_again_and_again_spends_an_attempt_each_time(
    start: Callable[..., Worker], new: Callable[..., TaskStore], path: Path
) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "t", {}, []]], {})
    worker.wait_for("body", "t", 1)
    worker.kill()
    for attempt in (2, 3):
        worker = start(programs.stay, str(path), {})
        worker.wait_for("body", "t", attempt)
        worker.kill()

    assert (row(path, "t")["attempt"], row(path, "t")["attempts_spent"]) == (3, 2)
    store = new()
    registered(store)
    async with store:
        assert (await (await store.handle("desktop:s1", "t")).wait()).attempts_spent == 3


async def test_a_peer_that_is_open_already_takes_over_at_once(
    start: Callable[..., Worker], opened: Callable[..., Any], new: Callable[..., TaskStore], path: Path
) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["count", "t", {}, [10_000]], ["once", "o", {}, []]], {})
    await worker.says("body", "o")
    store = new()
    registered(store)
    async with store:
        assert (await store.get("desktop:s1", "t")).attempt == 1
        worker.kill()
        event = await next_event(store, EventType.REATTACHED, task_id="t")
        assert event.attempt == 2
        result: Any = await (await store.handle("desktop:s1", "t")).result(timeout=5)
        assert result[0] == 2
        assert (await store.get(f"{RUNTIME}:s1", "o")).state is TaskState.ABANDONED


async def test_a_plain_copy_of_a_live_file_starts_nothing(
    start: Callable[..., Worker], tmp_path: Path, path: Path
) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "t", {}, []]], {})
    worker.wait_for("body", "t")
    copy = tmp_path / "copy.db"
    source, target = sqlite3.connect(f"file:{path}?mode=ro", uri=True), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.close()
    other, ran = TaskStore(copy, runtime=RUNTIME), list[Any]()
    registered(other, ran)

    async with other:
        report = await other.recover()
        record = await other.get("desktop:s1", "t")

    assert (report.unreachable, report.dead_owners, ran) == ((1,), (), [])
    assert (record.state, record.attempt, record.owner_id) == (TaskState.RUNNING, 1, 1)


async def test_a_reattached_body_may_use_the_store_at_once(new: Callable[..., TaskStore]) -> None:
    # it starts while the store is still being opened
    first, second = new(), new()

    @first.task(recovery=Recovery.RERUN, name="asks")
    async def waits(task: TaskContext) -> None:
        await asyncio.Event().wait()

    @second.task(recovery=Recovery.RERUN)
    async def asks(task: TaskContext) -> str:
        session = await second.session("another")
        return f"{session.scope} {len(await second.list())} {len((await second.recover()).reattached)}"

    async with first:
        await (await first.session("s1")).spawn(waits, id="t")
    async with second:
        assert await (await second.handle("desktop:s1", "t")) == "desktop:another 1 0"
