"""
A real worker is killed with SIGKILL at random moments; what it was told is in the file must be there.

The worker says on a pipe what was acknowledged to it, one ``write(2)`` a line, and is a child of a warm process that has
opened nothing. The seed is printed.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import programs
from tests.acceptance.processes import Worker
from tests.runtime.support import check_file, rows

MANY = pytest.param(50, marks=pytest.mark.slow)


class Acknowledged:
    """What the workers were told, over all their lives."""

    def __init__(self) -> None:
        self.spawned: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.completed: set[int] = set()
        self.cancelled: set[int] = set()
        self.bodies: list[tuple[str, int, Any]] = []
        self.odd: list[Any] = []

    def add(self, said: list[list[Any]]) -> None:
        """Take in one life, in the order in which it was told, so that a body's start is held against the saves before it."""
        for kind, *words in said:
            match kind, words:
                case "spawned", [task_seq, task_id]:
                    self.spawned[task_id] = task_seq
                case "saved", [task_id, done, _]:
                    self.saved[task_id] = max(done, self.saved.get(task_id, 0))
                case "completed", [task_seq]:
                    self.completed.add(task_seq)
                case "cancelled", [task_seq]:
                    self.cancelled.add(task_seq)
                case "body", [task_id, attempt, checkpoint]:
                    if checkpoint is not None and checkpoint < self.saved.get(task_id, 0):
                        self.odd.append(("an attempt began before what was saved", task_id, attempt, checkpoint))
                case "odd", _:
                    self.odd.append(words)


@pytest.mark.parametrize("kills", [8, MANY])
def test_no_acknowledged_operation_is_lost_over_many_kills(
    start: Callable[..., Worker], tmp_path: Path, kills: int
) -> None:
    path, seed = tmp_path / "agent.db", secrets.randbits(32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    acked = Acknowledged()
    began = time.monotonic()

    for number in range(kills):
        worker = start(programs.life, str(path), number)
        worker.wait_for("born", number)
        # one kill in five falls into the opening and the recovery, the others into the work
        if number % 5:
            worker.wait_for("open")
            pause = chance.uniform(0.0, 0.35)
        else:
            pause = chance.uniform(0.0, 0.06)
        deadline = time.monotonic() + pause
        while (left := deadline - time.monotonic()) > 0:
            worker.listen(left)
        acked.add(worker.kill())
        assert worker.exit_code == -9, f"life {number} ended by itself: {worker.said[-3:]}"
    last = start(programs.finish, str(path), {"max_running": 64})
    last.wait_for("closed", seconds=40)
    acked.add(last.join())

    tasks = {row["id"]: row for row in rows(path, "SELECT * FROM tasks")}
    by_seq = {row["task_seq"]: row for row in tasks.values()}
    print(
        f"{kills} kills in {time.monotonic() - began:.1f} s: {len(acked.spawned)} spawns, "
        f"{sum(acked.saved.values())} saves, {len(acked.completed)} completions acknowledged; "
        f"{len(tasks)} tasks, at most {max(row['attempt'] for row in tasks.values())} attempts"
    )
    assert acked.odd == []
    assert {
        task_id: seq for task_id, seq in acked.spawned.items() if tasks.get(task_id, {}).get("task_seq") != seq
    } == {}
    assert {seq for seq in acked.completed if by_seq[seq]["state"] != "completed"} == set()
    assert {seq for seq in acked.cancelled if by_seq[seq]["state"] != "cancelled"} == set()
    checkpoints = {row["id"]: int(row["value"]) for row in rows(path, _CHECKPOINTS)}
    assert {task_id for task_id, done in acked.saved.items() if checkpoints.get(task_id, 0) < done} == set()
    # every task at last completed exactly once; those that were asked to end may have been cancelled
    ends = Counter(row["task_seq"] for row in rows(path, "SELECT task_seq FROM events WHERE type = 'completed'"))
    for row in tasks.values():
        if row["function"] == "count":
            assert (row["state"], ends[row["task_seq"]]) == ("completed", 1)
            assert checkpoints[row["id"]] == _until(row)
    check_file(path)
    assert len(acked.spawned) > kills
    assert len(acked.saved) > kills
    assert len(acked.completed) > kills
    assert max(row["attempt"] for row in tasks.values()) > 1


_CHECKPOINTS = "SELECT id, value FROM tasks JOIN steps USING (task_seq) WHERE steps.kind = 'checkpoint'"


def _until(row: dict[str, Any]) -> int:
    until = json.loads(row["arguments"])["until"]
    assert json.loads(row["result"])[1] == until
    return int(until)


def test_a_file_that_is_killed_while_it_is_made_is_whole_at_the_next_open(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    chance = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")
    for number in range(6):
        path = tmp_path / f"{number}.db"
        worker = start(programs.life, str(path), number)
        worker.wait_for("born", number)
        deadline = time.monotonic() + chance.uniform(0.0, 0.05)
        while (left := deadline - time.monotonic()) > 0:
            worker.listen(left)
        acked = Acknowledged()
        acked.add(worker.kill())

        last = start(programs.finish, str(path), {})
        last.wait_for("closed")
        last.join()

        check_file(path)
        assert set(acked.spawned) <= {row["id"] for row in rows(path, "SELECT id FROM tasks")}


def test_of_processes_that_make_a_new_file_at_once_none_is_refused(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    for number in range(6):
        path = tmp_path / f"{number}.db"
        together = [start(programs.stay, str(path), {}) for _ in range(4)]
        for worker in together:
            worker.wait_for("ready")
        for worker in together:
            worker.kill()
        check_file(path)
