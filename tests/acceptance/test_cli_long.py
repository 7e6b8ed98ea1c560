"""A file with a long history is looked at as quickly as it can be read."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from lash_store import TaskStore
from tests.acceptance.commands import run

TASKS = 100_000
SECONDS = 5.0
"""Of this process's own work; a record a task, or a library that lays every row out, would take many times as long."""


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred sessions with a thousand tasks each, of which every hundredth is live, and an event or three a task."""
    path = tmp_path_factory.mktemp("long") / "agent.db"

    async def make() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            for number in range(100):
                await store.session(f"s{number}")

    asyncio.run(make())
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            """
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :tasks)
            INSERT INTO tasks (task_seq, scope, id, kind, mode, state, label, recovery, cancel_policy, arguments, attempt,
              attempts_spent, max_attempts, progress, result, created_at, updated_at, completed_at)
            SELECT i, 'desktop:s' || (i % 100), 'task-' || i, 'other', 'managed', iif(i % 1000 < 10, 'pending', 'completed'),
              'task', 'rerun', 'cooperative', '{"path":"/some/where/' || i || '"}', 0, 0, 100, 'file ' || i,
              iif(i % 1000 < 10, NULL, '{"n":1}'), '2026-01-01T00:00:00.000Z', '2026-01-01T00:00:01.000Z',
              iif(i % 1000 < 10, NULL, '2026-01-01T00:00:01.000Z')
            FROM n
            """,
            {"tasks": TASKS},
        )
        for type, which in (("registered", "1"), ("completed", "completed_at IS NOT NULL")):
            connection.execute(
                f"""
                INSERT INTO events (task_seq, scope, task_id, attempt, type, at, data)
                SELECT task_seq, scope, id, 0, '{type}', created_at, '{{"state":"pending"}}' FROM tasks WHERE {which}
                """
            )
    connection.close()
    return path


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["list"], TASKS // 100 + 1),
        (["list", "--all"], TASKS + 1),
        (["list", "--all", "--text", "where/77777"], 2),
        (["list", "--all", "--since", "2025-12-31", "--limit", "3", "--json"], 5),
        (["sessions"], 101),
        (["stats"], None),
        (["tree", "desktop:s7"], 52),
        (["show", "task-99999"], None),
    ],
)
def test_a_hundred_thousand_tasks_are_told_of_at_once(long: Path, arguments: list[str], lines: int | None) -> None:
    before = time.process_time()
    done = run(*arguments, db=long)
    took = time.process_time() - before
    assert (done.returncode, done.stderr) == (0, "")
    assert lines is None or done.stdout.count("\n") == lines
    assert took < SECONDS
