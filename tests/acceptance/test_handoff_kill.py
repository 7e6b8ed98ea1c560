"""A process is killed before every single statement of a handoff: the file has all of it or nothing, and a replay completes."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import Handoff, TaskState
from tests.acceptance import handoff_programs as programs
from tests.acceptance.handoff_programs import ANSWERS_AT, CANCELLED, KEEP, MOVED
from tests.acceptance.processes import Worker
from tests.runtime.support import check_file, rows

AT_ONCE = 3


@pytest.fixture
def family(start: Callable[..., Worker], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a file whose owner died in the midst of its work."""
    settled = tmp_path / "settled.db"
    worker = start(programs.settle, str(settled))
    assert worker.join() == []

    def copy(name: str) -> Path:
        path = tmp_path / name
        for suffix in ("", "-wal"):
            shutil.copy(f"{settled}{suffix}", f"{path}{suffix}")
        return path

    return copy


def count(path: Path, table: str) -> int:
    """Count the rows of a table, or of some events."""
    return int(rows(path, f"SELECT count(*) AS n FROM {table}")[0]["n"])


HANDED_OVER = "events WHERE type IN ('transferred', 'handed_off') OR type LIKE 'cancel%'"


def was_done(path: Path) -> bool:
    """Say whether a file has a handoff; it must have all of it, or nothing."""
    tasks = {row["id"]: row for row in rows(path, "SELECT * FROM tasks")}
    places = rows(
        path, "SELECT task_id, scope FROM inbox UNION ALL SELECT id, h.scope FROM handles h JOIN tasks USING (task_seq)"
    )
    moved = {task_id for task_id, row in tasks.items() if row["scope"] == "desktop:s2"}
    ending = {task_id for task_id, row in tasks.items() if row["state"] in {"cancel_requested", "cancelled"}}
    assert tasks.keys() == MOVED | CANCELLED
    assert {row["task_id"] for row in places if row["scope"] == "desktop:s2"} == moved
    assert count(path, "inbox") >= 2
    done = count(path, "handoffs")
    if not done:
        assert (moved, ending, count(path, HANDED_OVER)) == (set(), set(), 0)
        return False
    assert (moved, ending, done) == (MOVED, CANCELLED, 1)
    assert count(path, "events WHERE type = 'transferred'") == len(MOVED)
    assert count(path, "events WHERE type = 'handed_off'") == 1
    return True


async def repeat(path: Path) -> Handoff:
    """Ask for the same handoff again, twice, from a process that has not seen the file before."""
    store, _ = programs.family(str(path))
    async with store:
        session = await store.session("s1")
        stored = rows(path, "SELECT * FROM handoffs")
        before = count(path, HANDED_OVER)
        handoff = await session.handoff("s2", KEEP)
        assert not stored or (rows(path, "SELECT * FROM handoffs"), count(path, HANDED_OVER)) == (stored, before)
        kept = await store.handle("desktop:s2", "kept")
        assert await session.handoff("s2", [*reversed(KEEP[1:]), kept]) == handoff
        assert await kept.result(timeout=20) == ANSWERS_AT
        for task_id in CANCELLED - {"with a callback"}:
            assert (await (await session.handle(task_id)).wait(timeout=20)).state is TaskState.CANCELLED
        assert {record.id for record in await session.list()} <= {"with a callback"}
        assert {note.task_id for note in await (await store.session("s2")).notes()} == {"child", "finished"}
        assert [note.task_id for note in await session.notes()] == ["rest"]
    assert {record.id for record in handoff.moved} == MOVED
    assert {record.id for record in handoff.cancelled} == CANCELLED
    assert was_done(path)
    check_file(path)
    return handoff


@pytest.mark.long
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
async def test_killed_before_any_statement_of_it_a_handoff_is_done_whole_or_not_at_all_and_a_replay_completes_it(
    start: Callable[..., Worker], family: Callable[[str], Path], step: int
) -> None:
    done: list[Any] = []
    found: list[bool] = []
    # the next ones work while what the last one left is looked at
    at_work: deque[tuple[Path, Worker]] = deque()
    first = random.randrange(1, step + 1)
    print(f"every statement of number {first}, {first + step}, …")
    number = itertools.count(first, step)
    while not done:
        while len(at_work) < AT_ONCE:
            path = family(f"{(at := next(number))}.db")
            at_work.append((path, start(programs.hand_over_until, str(path), at)))
        path, worker = at_work.popleft()
        said = worker.join()
        assert (said[0], worker.exit_code) == (["ready"], -9), said
        done += said[1:]
        found.append(was_done(path))
        handoff = await repeat(path)
        # what was acknowledged is what is stored
        assert not said[1:] or (handoff.id, found[-1]) == (said[1][2], True)

    print(f"{done[0][1]} statements; {found.count(False)} kills left nothing, {found.count(True)} all of it")
    assert found == sorted(found)
    assert found.count(False) > 50 // step


async def test_killed_after_the_commit_and_before_anybody_was_told_a_replay_tells_what_was_done(
    start: Callable[..., Worker], family: Callable[[str], Path]
) -> None:
    path = family("told-nobody.db")
    worker = start(programs.hand_over_until, str(path), None)
    assert (worker.join(), worker.exit_code) == ([["ready"]], -9)
    assert was_done(path)
    [stored] = rows(path, "SELECT handoff_id, at FROM handoffs")

    handoff = await repeat(path)

    assert handoff.id == stored["handoff_id"]
