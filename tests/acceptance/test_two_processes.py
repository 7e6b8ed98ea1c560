"""Two processes, one file, one runtime: who lives keeps its work, and who dies has it taken over at once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import programs
from tests.acceptance.processes import Worker
from tests.runtime.support import event_count, event_types, rows

COUNTS = [["count", f"t{number}", {}, [100_000]] for number in range(5)]


def tasks(path: Path, columns: str = "id, state, attempt, owner_id") -> list[tuple[Any, ...]]:
    """Read every task."""
    return [tuple(row.values()) for row in rows(path, f"SELECT {columns} FROM tasks ORDER BY task_seq")]


def test_a_second_process_does_not_touch_the_live_work_of_the_first(start: Callable[..., Worker], path: Path) -> None:
    first = start(programs.spawn_and_stay, str(path), COUNTS, {})
    first.wait_for("saved", "t4")
    second = start(programs.stay, str(path), {})
    second.wait_for("ready")

    first.wait_for("saved", "t0", first.said[-1][2] + 20)

    assert not [words for words in second.said if words[0] == "body"]
    assert tasks(path) == [(f"t{number}", "running", 1, 1) for number in range(5)]
    first.kill()
    second.kill()


def test_the_work_of_a_killed_process_runs_again_in_the_second_in_under_a_second(
    start: Callable[..., Worker], path: Path
) -> None:
    first = start(programs.spawn_and_stay, str(path), COUNTS, {})
    first.wait_for("saved", "t4", 3)
    second = start(programs.stay, str(path), {})
    second.wait_for("ready")

    first.signal(signal.SIGKILL)
    killed = time.monotonic()
    for number in range(5):
        second.wait_for("body", f"t{number}", 2)
    took = time.monotonic() - killed

    print(f"all 5 tasks ran again {took * 1000:.0f} ms after SIGKILL")
    assert took < 2.0
    acked = {f"t{number}": 0 for number in range(5)}
    for words in first.join():
        if words[0] == "saved":
            acked[words[1]] = words[2]
    for _, task_id, _, checkpoint in [words for words in second.said if words[0] == "body"]:
        assert checkpoint >= acked[task_id]
    assert {state for _, state, _, _ in tasks(path)} == {"running"}
    assert {(attempt, owner) for _, _, attempt, owner in tasks(path)} == {(2, 2)}
    second.kill()


@pytest.mark.long
def test_nothing_is_taken_from_a_stopped_process_and_it_goes_on_where_it_was(
    start: Callable[..., Worker], path: Path
) -> None:
    first = start(programs.spawn_and_stay, str(path), [["count", "t", {}, [200]]], {})
    first.wait_for("saved", "t", 3)
    second = start(programs.stay, str(path), {})
    second.wait_for("ready")

    first.stop()
    before = event_count(path)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        second.listen(0.1)

    assert not [words for words in second.said if words[0] == "body"]
    assert tasks(path) == [("t", "running", 1, 1)]
    assert event_count(path) == before
    first.signal(signal.SIGCONT)
    first.wait_for("saved", "t", 200)
    last = start(programs.finish, str(path), {})
    last.wait_for("ended", "t", "completed", 1)
    for worker in (second, first, last):
        worker.kill()
    assert tasks(path, "state, attempt, result") == [("completed", 1, "[0,200]")]


def test_two_processes_finish_their_own_work_side_by_side(start: Callable[..., Worker], path: Path) -> None:
    both = [
        start(
            programs.spawn_and_stay,
            str(path),
            [["count", f"{name}{number}", {}, [20]] for number in range(10)],
            {"max_running": 4},
        )
        for name in ("a", "b")
    ]
    for name, worker in zip("ab", both, strict=True):
        for number in range(10):
            worker.wait_for("saved", f"{name}{number}", 20)
    third = start(programs.finish, str(path), {})
    third.wait_for("closed")

    owners = rows(path, "SELECT substr(id, 1, 1) AS name, count(DISTINCT owner_id) AS n FROM tasks GROUP BY 1")
    assert owners == [{"name": "a", "n": 1}, {"name": "b", "n": 1}]
    assert {(state, attempt) for _, state, attempt, _ in tasks(path)} == {("completed", 1)}
    for worker in both:
        worker.kill()
    third.join()


def test_a_rescued_task_completes_once_although_its_first_owner_wakes_up_later(
    start: Callable[..., Worker], path: Path
) -> None:
    """The zombie: its lock is dropped by hand, as by a person who gives up a stopped process."""
    first = start(programs.spawn_and_stay, str(path), [["count", "t", {}, [60]]], {})
    first.wait_for("saved", "t", 3)
    first.stop()
    second = start(programs.zombie_rescue, str(path), {})
    second.wait_for("body", "t", 2)

    first.signal(signal.SIGCONT)
    second.wait_for("ended", "t", "completed", 2)

    assert event_types(path, 1).count("completed") == 1
    assert tasks(path) == [("t", "completed", 2, 2)]
    saved = rows(path, "SELECT attempt FROM steps")
    assert saved == [{"attempt": 2}]
    refused = first.wait_for("refused", "t")
    assert refused[2] == "StaleAttempt"
    first.kill()
    second.join()


async def test_a_result_a_cancel_and_events_reach_another_process(start: Callable[..., Worker], path: Path) -> None:
    owner = start(
        programs.spawn_and_stay,
        str(path),
        [["count", "t", {}, [50]], ["forever", "f", {"cancel_policy": "abort_local"}, []]],
        {},
    )
    owner.wait_for("body", "f")
    result = start(programs.ask, str(path), "result", "t")
    events = start(programs.ask, str(path), "events", "t")
    cancel = start(programs.ask, str(path), "cancel", "f")

    assert await cancel.says("cancel") == ["cancel", "cancelled"]
    assert await result.says("result") == ["result", [0, 50]]
    await events.says("event", "completed")

    told = [words[1] for words in events.join() if words[0] == "event"]
    assert told == event_types(path, 1)
    assert told.count("saved") == 50
    assert rows(path, "SELECT cancel_reason FROM tasks WHERE id = 'f'") == [{"cancel_reason": "from outside"}]
    owner.kill()
    await asyncio.sleep(0)


def test_of_many_processes_that_open_a_new_file_at_once_each_gets_a_store(
    start: Callable[..., Worker], path: Path
) -> None:
    all_of_them = [start(programs.spawn_and_stay, str(path), [["count", f"t{n}", {}, [5]]], {}) for n in range(6)]
    for number, worker in enumerate(all_of_them):
        worker.wait_for("saved", f"t{number}", 5)

    assert len(tasks(path)) == 6
    assert len(rows(path, "SELECT * FROM owners")) == 6
    for worker in all_of_them:
        worker.kill()


def test_of_many_peers_one_alone_takes_each_task_of_a_dead_owner(start: Callable[..., Worker], path: Path) -> None:
    first = start(programs.spawn_and_stay, str(path), COUNTS, {})
    peers = [start(programs.stay, str(path), {}) for _ in range(3)]
    for peer in peers:
        peer.wait_for("ready")
    first.wait_for("saved", "t4", 2)
    first.kill()

    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        for peer in peers:
            peer.listen(0.02)

    bodies = [(words[1], words[2]) for peer in peers for words in peer.said if words[0] == "body"]
    assert sorted(bodies) == [(f"t{number}", 2) for number in range(5)]
    for peer in peers:
        peer.kill()
