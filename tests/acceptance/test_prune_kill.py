"""A prune that is killed with SIGKILL at random moments has done what it has done: a row or its tombstone stands, never both."""

from __future__ import annotations

import random
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance import programs
from tests.acceptance.processes import Worker
from tests.runtime.support import check_file, rows

TASKS, KILLS = 400, 8


@pytest.mark.long
def test_a_prune_that_is_killed_leaves_each_task_whole_or_its_tombstone(
    start: Callable[..., Worker], path: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made.db"
    start(programs.leave_finished, str(made), TASKS).join()
    before = {row["task_seq"]: row for row in rows(made, "SELECT * FROM tasks")}
    events = {row["seq"]: row for row in rows(made, "SELECT * FROM events")}
    assert len(before) == TASKS
    chance = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")
    cut_short = told = 0

    for _ in range(KILLS):
        if not path.exists() or not rows(path, "SELECT count(*) AS n FROM tasks")[0]["n"]:
            path.unlink(missing_ok=True)
            shutil.copy(made, path)
            told = 0
        worker = start(programs.prune, str(path))
        worker.wait_for("open")
        # after so many parts, and then at any moment of the next ones
        parts = chance.randrange(0, 6)
        while sum(words[0] == "part" for words in worker.said) < parts and worker.listen(20.0):
            pass
        deadline = time.monotonic() + chance.uniform(0.0, 0.02)
        while (left := deadline - time.monotonic()) > 0 and worker.listen(left):
            pass
        acknowledged = [words[1] for words in worker.kill() if words[0] == "part"]
        told += max(acknowledged, default=0)

        check_file(path)
        after = {row["task_seq"]: row for row in rows(path, "SELECT * FROM tasks")}
        buried = {row["task_seq"]: row for row in rows(path, "SELECT * FROM tombstones")}
        assert after.keys() | buried.keys() == before.keys()
        assert not after.keys() & buried.keys()
        assert len(buried) >= told
        told = len(buried)
        assert after == {seq: before[seq] for seq in after}
        assert {seq: row["id"] for seq, row in buried.items()} == {seq: before[seq]["id"] for seq in buried}
        assert rows(path, "SELECT * FROM events WHERE task_seq IS NOT NULL ORDER BY seq") == [
            event for event in events.values() if event["task_seq"] in after
        ]
        assert rows(path, "PRAGMA foreign_key_check") == []
        cut_short += 0 < len(after) < TASKS

    assert cut_short
    last = start(programs.prune, str(path))
    last.wait_for("pruned")
    last.join()
    assert rows(path, "SELECT count(*) AS n FROM tombstones") == [{"n": TASKS}]
