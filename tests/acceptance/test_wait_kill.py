"""What a body waits for outlives its process: times, signals, retries, children; and who comes back late may write nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lash_store import Failure, TaskHandle, TaskState, TaskStore
from tests.acceptance import wait_programs as programs
from tests.acceptance.processes import Worker
from tests.acceptance.step_programs import RUNTIME
from tests.acceptance.wait_programs import BACKOFF, LEAVES, TURNS
from tests.runtime.support import check_file, everything, rows

SCOPE = f"{RUNTIME}:s1"
SLOW = 1.0
"""Seconds this machine may be late."""


def seconds(at: str) -> float:
    """Return a time of the file in seconds since the epoch."""
    return datetime.fromisoformat(at).timestamp()


def task(path: Path, task_id: str) -> dict[str, Any]:
    """Read the row of a task."""
    [row] = rows(path, "SELECT * FROM tasks WHERE id = ?", task_id)
    return row


def sleeps(path: Path, task_id: str) -> dict[str, tuple[int, float]]:
    """Return attempt and wake time of each sleep that a task remembers."""
    found = rows(
        path,
        """SELECT name, s.attempt, wake_at FROM steps s JOIN tasks USING (task_seq)
           WHERE s.kind = 'sleep' AND id = ? ORDER BY name""",
        task_id,
    )
    return {row["name"]: (row["attempt"], seconds(row["wake_at"])) for row in found}


async def happened(path: Path, task_id: str, type: str, times: int = 1, **data: Any) -> None:
    """Wait until something has happened to a task so many times."""
    async with asyncio.timeout(20), TaskStore.open_readonly(path) as store:
        async for event in store.events(0):
            if (event.task_id, str(event.type)) == (task_id, type) and data.items() <= event.data.items():
                times -= 1
                if times == 0:
                    return


async def until(when: float) -> None:
    """Let the time pass."""
    await asyncio.sleep(max(0.0, when - time.time()))


@asynccontextmanager
async def from_outside(path: Path, task_id: str) -> Any:
    """Take hold of a task as another process does that runs nothing."""
    async with TaskStore.connect(path, runtime=RUNTIME) as store:
        yield await store.handle(SCOPE, task_id)


async def go(handle: TaskHandle, *numbers: int, then: str = "go on") -> None:
    """Send signals, each with its number."""
    for number in numbers:
        await handle.signal("go", {"number": number, "then": then})


def received(said: list[list[Any]], attempt: int) -> list[Any]:
    """Return what an attempt received, in its order."""
    return [words[3] for words in said if words[0] == "received" and words[2] == attempt]


# --- time -----------------------------------------------------------------------------------------------------------


async def test_of_a_sleep_that_was_begun_before_a_kill_only_the_rest_is_slept(
    start: Callable[..., Worker], path: Path
) -> None:
    long, short = 0.9, 0.4
    tasks = [["nap", "long", {}, [long]], ["nap", "short", {}, [short]]]
    start(programs.begin_and_die_asleep, str(path), tasks, 2).join()
    begun = {task_id: sleeps(path, task_id) for task_id in ("long", "short")}
    [(_, ends)], [(_, is_over)] = begun["long"].values(), begun["short"].values()
    # a part of the one passes while nobody runs, and all of the other
    await until(max(ends - long / 2, is_over))

    second = start(programs.finish, str(path))
    await second.says("closed")

    times = {words[1]: second.wait_for("asleep", words[1], 2)[3] for words in second.said if words[0] == "awake"}
    woke = {task_id: second.wait_for("awake", task_id, 2)[3] for task_id in times}
    late = (woke["long"] - max(ends, times["long"])) * 1000
    print(f"the rest of {long} s was {woke['long'] - times['long']:.3f} s, and ended {late:.1f} ms late")
    assert ends <= woke["long"] < times["long"] + long
    assert is_over <= woke["short"] < times["short"] + short
    assert {task_id: sleeps(path, task_id) for task_id in ("long", "short")} == begun


async def test_a_sleep_behind_a_save_is_a_new_one_and_goes_on_if_it_was_begun(
    start: Callable[..., Worker], path: Path
) -> None:
    pause = 0.4
    said = start(programs.begin_and_stay, str(path), [["nap_by_turns", "t", {}, [pause]]]).join()
    assert sleeps(path, "t") == {}
    # the turn that it begins with sleeps anew; it dies in the next
    said = said + start(programs.begin_and_die_asleep, str(path), [], 2).join()
    [(name, (attempt, ends))] = sleeps(path, "t").items()
    assert (name, attempt) == ("#2.1", 2)
    await until(ends - pause / 2)

    third = start(programs.finish, str(path))
    await third.says("closed")

    said = said + third.join()
    times = {(words[0], words[1], words[2]): words[3] for words in said if words[0] in {"asleep", "awake"}}
    assert [(turn, attempt) for what, turn, attempt in times if what == "asleep"] == [(0, 1), (1, 2), (2, 2), (2, 3)]
    for turn, attempt in [(0, 1), (1, 2)]:
        assert times["awake", turn, attempt] - times["asleep", turn, attempt] > pause - 0.002
    assert ends <= times["awake", 2, 3] < times["asleep", 2, 3] + pause
    assert json.loads(rows(path, "SELECT value FROM steps WHERE kind = 'checkpoint'")[0]["value"]) == TURNS


@pytest.mark.parametrize("how", ["killed", "closed"])
async def test_a_retry_that_waits_for_its_time_still_does_after_its_process_was(
    start: Callable[..., Worker], path: Path, how: str
) -> None:
    first = start(programs.begin_and_leave, str(path), [["fail_first", "t", {}, []]], how)
    assert first.join()[-1][0] == ("body" if how == "killed" else "closed")
    left = task(path, "t")
    due = seconds(left["not_before"])
    assert (left["state"], left["attempt"], left["owner_id"]) == ("pending", 1, 1 if how == "killed" else None)

    second = start(programs.finish, str(path))
    await second.says("ready")
    taken = task(path, "t")
    asked_at = time.time()
    [*_, began] = await second.says("body", "t", 2)

    if asked_at < due:
        assert (taken["state"], taken["owner_id"], taken["not_before"]) == ("pending", 2, left["not_before"])
    print(
        f"{how}: opened {(due - asked_at) * 1000:.0f} ms before the time, began {(began - due) * 1000:.1f} ms after it"
    )
    assert due <= began < due + SLOW
    await second.says("ended", "t", "completed", 2)
    assert task(path, "t")["not_before"] is None


async def test_a_deadline_that_passes_while_nobody_runs_has_ended_the_task_at_the_next_open(
    start: Callable[..., Worker], path: Path
) -> None:
    # a retry would come in time if anybody ran
    how = {"deadline": BACKOFF + 0.1, "notify_on_end": True}
    tasks = [["stay", "stays", how, []], ["nap", "sleeps", how, [3_600.0]], ["fail_first", "fails", how, []]]
    tasks += [["stay", "has time", {"deadline": 3_600.0}, []]]
    start(programs.begin_and_leave, str(path), tasks, "killed").join()
    late = ("stays", "sleeps", "fails")
    assert {task(path, task_id)["state"] for task_id in late} == {"running", "pending"}
    await until(max(seconds(task(path, task_id)["deadline"]) for task_id in late))
    said: list[Any] = []

    store, _ = programs.waiting(str(path), lambda *words: said.append(words))
    async with store:
        records = {record.id: record for record in await store.list()}
        notes = await (await store.session("s1")).notes()

    for task_id in late:
        failure = records[task_id].failure
        assert failure == Failure(type="Timeout", message=f"the deadline {task(path, task_id)['deadline']} passed")
        assert records[task_id].state is TaskState.FAILED
    assert sorted(note.task_id or "" for note in notes) == sorted(late)
    assert records["has time"].state is TaskState.RUNNING
    assert [words[:3] for words in said] == [("body", "has time", 2)]


# --- signals --------------------------------------------------------------------------------------------------------


async def test_signals_that_were_sent_while_no_process_ran_are_received_in_their_order(
    start: Callable[..., Worker], path: Path
) -> None:
    first = start(programs.begin_and_stay, str(path), [["listen", "t", {}, []]])
    await first.says("ready")
    first.kill()
    async with from_outside(path, "t") as handle:
        await go(handle, *range(10))
        await handle.signal("other", "not for it")
        await go(handle, 10, then="end")

    second = start(programs.finish, str(path))
    await second.says("ended", "t", "completed", list(range(11)))

    assert [payload["number"] for payload in received(second.join(), 2)] == list(range(11))
    # what it did not ask for is still there
    assert [row["name"] for row in rows(path, "SELECT name FROM signals WHERE taken_at IS NULL")] == ["other"]


async def test_a_signal_is_received_again_by_the_next_attempt_unless_a_save_is_behind_it(
    start: Callable[..., Worker], path: Path
) -> None:
    first = start(programs.begin_and_stay, str(path), [["listen", "t", {}, []]])
    await first.says("ready")
    async with from_outside(path, "t") as handle:
        await go(handle, 1)
        await go(handle, 2, then="save")
        await go(handle, 3, 4)
        await first.says("received", "t", 1, {"number": 4, "then": "go on"})
        said = first.kill()
        await go(handle, 5, then="save")
        second = start(programs.finish, str(path))
        await second.says("saved", "t", 2, [1, 2, 3, 4, 5])
        said = said + second.kill()
        await go(handle, 6, then="end")

    third = start(programs.finish, str(path))
    await third.says("ended", "t", "completed", [1, 2, 3, 4, 5, 6])

    said = said + third.join()
    numbers = [[payload["number"] for payload in received(said, attempt)] for attempt in (1, 2, 3)]
    assert numbers == [[1, 2, 3, 4], [3, 4, 5], [6]]


async def test_a_signal_that_was_received_in_a_step_is_received_again_unless_the_step_is_over(
    start: Callable[..., Worker], path: Path
) -> None:
    tasks = [["listen_in_a_step", "t", {}, []]]
    first = start(programs.begin_and_stay, str(path), tasks)
    await first.says("ready")
    async with from_outside(path, "t") as handle:
        await handle.signal("answer", "one")
        await happened(path, "t", "saved", step="ask", step_state="done")
        said = first.kill()
        await handle.signal("answer", "two")

    second = start(programs.finish, str(path))
    await second.says("ended", "t", "completed", ["one", "two"])

    said = said + second.join()
    assert [received(said, attempt) for attempt in (1, 2)] == [["one"], ["two"]]


async def test_a_signal_of_another_process_wakes_the_body_that_waits_for_it(
    start: Callable[..., Worker], path: Path
) -> None:
    worker = start(programs.begin_and_stay, str(path), [["listen", "t", {}, []]])
    await worker.says("ready")
    took = []
    async with from_outside(path, "t") as handle:
        for number in range(5):
            sent = time.monotonic()
            await go(handle, number)
            await worker.says("received", "t", 1, {"number": number, "then": "go on"})
            took.append(time.monotonic() - sent)
        await go(handle, 5, then="end")
        assert (await handle.wait(timeout=20)).result == list(range(6))
    print(f"from signal() to the body: {[round(one * 1000) for one in took]} ms")
    assert min(took) < SLOW / 2


# --- children -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_parent_that_is_killed_anywhere_has_the_same_children_in_the_next_attempt(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    places = ["before commit", "after commit"]
    paths = {place: tmp_path / f"{place}.db" for place in places}
    said: dict[str, list[list[Any]]] = defaultdict(list)
    kills = dict.fromkeys(places, 0)
    for number in count(1):
        workers = {place: start(programs.grow_and_die, str(paths[place]), place, number) for place in places}
        for place, worker in workers.items():
            said[place] += worker.join()
            if worker.exit_code == 0:
                places.remove(place)
            else:
                assert said[place][-1][:3] == ["dies", place, number], said[place][-3:]
                kills[place] += 1
        if not places:
            break
    for place, path in paths.items():
        check_file(path)
        tasks = {row["task_seq"]: row for row in rows(path, "SELECT * FROM tasks")}
        below = defaultdict(list)
        for row in tasks.values():
            below[row["parent_seq"]].append(row["task_seq"])
        for _, task_seq, _, children in (words for words in said[place] if words[0] == "children"):
            assert children == below[task_seq], "two attempts have different children"
        roots = below.pop(None)
        for root in roots:
            [middle] = below[root]
            leaves = below[middle]
            assert len(leaves) == LEAVES
            assert json.loads(tasks[root]["result"]) == [[f"leaf {leaf}" for leaf in leaves]]
        assert len(tasks) == len(roots) * (2 + LEAVES)
        again = sum(row["attempt"] > 1 for row in tasks.values())
        print(f"{kills[place]} kills {place}: {len(tasks)} tasks in {len(roots)} families, {again} began again")
        # the spawn, start and end of four tasks, where the root starts as it is born
        assert kills[place] >= 11


# --- versions -------------------------------------------------------------------------------------------------------


async def test_a_task_of_another_version_is_left_and_reported_and_one_that_accepts_it_goes_on(
    start: Callable[..., Worker], path: Path
) -> None:
    first = start(programs.begin_version, str(path), "1")
    await first.says("half", "t")
    first.kill()
    said: list[Any] = []

    def say(*words: Any) -> None:
        said.append(words)

    for version in ("2", None):
        store, _ = programs.versioned(str(path), say, version, set())
        async with store:
            report = await store.recover()
            assert (report.unknown_versions, report.unknown_functions) == (("work@1",), ("work",))
        left = task(path, "t")
        assert (left["state"], left["owner_id"], left["attempt"], left["version"]) == ("pending", None, 1, "1")

    store, _ = programs.versioned(str(path), say, "2", {"1"})
    async with store:
        result = await (await store.handle(SCOPE, "t")).result(timeout=20)
        assert (await store.recover()).unknown_versions == ()

    assert result == ["half", "done by version 1 in attempt 1", "2", 2]
    assert (task(path, "t")["version"], said) == ("2", [])


# --- who comes back late --------------------------------------------------------------------------------------------


async def test_a_stopped_process_that_goes_on_after_its_work_was_given_away_can_write_nothing(
    start: Callable[..., Worker], path: Path, tmp_path: Path
) -> None:
    effects = tmp_path / "effects"
    first = start(programs.begin_and_be_stopped, str(path), str(effects))
    await first.says("stops")
    acted = asyncio.Event()
    store, _ = programs.stopping(str(path), lambda *words: acted.set(), str(effects))
    async with store:
        session = await store.session("s1")
        abandoned = await session.abandon("t", "its process is stuck")
        assert (abandoned.state, abandoned.owner_id) == (TaskState.PENDING, None)
        report = await store.recover()
        assert [record.id for record in report.reattached] == ["t"]
        # the task is live, and another attempt's
        await asyncio.wait_for(acted.wait(), 20)
        before = everything(path)

        first.signal(signal.SIGCONT)
        [_, error, reason] = await first.says("ended")
        await first.says("tried all")

        assert everything(path) == before
        handle = await session.handle("t")
        await handle.signal("end")
        result = await handle.result(timeout=20)
    print(f"the body was told by {error}, stop reason {reason}")
    assert first.kill()[2:-1] == [[write, "StaleAttempt"] for write in ("step", "transact", "save", "spawn")]
    # the step took effect in the world twice, and is remembered once
    assert (result, effects.read_text().split()) == (f"attempt {abandoned.attempt + 1}", ["[3]", "[1]"])
    assert rows(path, "SELECT attempt FROM noted") == [{"attempt": 3}]
    assert [(step["name"], step["attempt"]) for step in before["steps"]] == [("act", 3), ("note", 3)]
