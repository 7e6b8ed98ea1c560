"""Rules of upgrading a file with much in it: nothing differs after, two may open it at once, a kill leaves it whole."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import TaskStore, migrate, schema
from tests.storage.test_schema import objects
from tests.storage.test_upgrade import DATA, contents, objects_of_ours

OLDEST = "0001"
AT = "2024-05-01T10:00:00.000Z"
FEW, MANY = 3_000, 100_000

TASK = (
    "INSERT INTO tasks (task_seq, scope, id, kind, mode, state, label, function, recovery, cancel_policy, arguments, attempt, "
    "attempts_spent, max_attempts, owner_id, result, created_at, started_at, updated_at, completed_at) VALUES (:seq, "
    f"'desktop:s1', 'n-' || :seq, 'other', 'managed', :state, 'n', 'n', 'rerun', 'cooperative', '{{}}', 1, 0, 3, 1, :result, "
    f"'{AT}', '{AT}', '{AT}', :completed_at)"
)
EVENT = (
    "INSERT INTO events (task_seq, scope, task_id, attempt, type, at, data) "
    f"VALUES (:seq, 'desktop:s1', 'n-' || :seq, 1, :type, '{AT}', :data)"
)
HANDLE = (
    "INSERT INTO handles (handle_id, scope, task_seq, role, created_at) "
    f"VALUES ('h-' || :seq, 'desktop:s1', :seq, 'owner', '{AT}')"
)


def fill(path: Path, tasks: int) -> Path:
    """Put so many tasks of a dead owner into an old file, with their events and handles; every tenth is live."""
    first = 1_000
    rows = [
        {
            "seq": first + n,
            "state": "completed" if n % 10 else "running",
            "result": json.dumps(n) if n % 10 else None,
            "completed_at": AT if n % 10 else None,
        }
        for n in range(tasks)
    ]
    told = [
        {"seq": row["seq"], "type": type, "data": json.dumps({"state": row["state"], "n": row["seq"]})}
        for row in rows
        for type in ("registered", "started", *(["completed"] if row["completed_at"] else []))
    ]
    shutil.copy(DATA / f"{OLDEST}.db", path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(TASK, rows)
        connection.executemany(EVENT, told)
        connection.executemany(HANDLE, rows)
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("few") / "few.db", FEW)


@pytest.fixture
def path(few: Path, tmp_path: Path) -> Path:
    """A copy of an old file with a few thousand tasks."""
    return Path(shutil.copy(few, tmp_path / "agent.db"))


@pytest.mark.parametrize("tasks", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_rows_events_and_handles_are_equal_before_and_after(tmp_path: Path, newborn: Path, tasks: int) -> None:
    path = fill(tmp_path / "agent.db", tasks)
    before = contents(path)
    assert len(before["tasks"]) > tasks

    # of another runtime: nothing in the file is this store's to recover
    async with TaskStore(path, runtime="another") as store:
        done = store.upgraded

    assert done is not None
    print(f"{tasks} tasks, {path.stat().st_size >> 20} MiB: upgraded in {done.seconds:.1f} s")
    after = contents(path, before)
    assert after.pop("owners")[:-1] == before["owners"]
    assert after == {table: rows for table, rows in before.items() if table != "owners" and rows}
    assert objects_of_ours(path) == objects(newborn)
    assert done.backup is not None
    assert contents(done.backup) == before


OPENS = """
    import asyncio, json, sys
    from lash_store import TaskStore
    import alembic.command, sqlalchemy

    async def main():
        print("ready", flush=True)
        sys.stdin.readline()
        async with TaskStore(sys.argv[1], runtime="another") as store:
            done = store.upgraded
            print(json.dumps(done and done.from_revision), flush=True)
            await asyncio.to_thread(sys.stdin.readline)

    asyncio.run(main())
"""


@pytest.mark.long
def test_of_two_processes_that_open_it_at_once_one_upgrades_it_and_both_go_on(path: Path, spawn: Any) -> None:
    before = contents(path)
    processes = [spawn(OPENS, path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"

    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.stdout.readline() for process in processes]
    ended = [process.communicate("close\n", timeout=60)[1] for process in processes]

    assert (sorted(told), ended) == ([f'"{OLDEST}"\n', "null\n"], ["", ""])
    assert len(list(path.parent.glob("*.backup"))) == 1
    after = contents(path, before)
    assert {table: after[table] for table in ("tasks", "events", "handles")} == {
        table: before[table] for table in ("tasks", "events", "handles")
    }


UPGRADES = """
    import sys
    from pathlib import Path
    from lash_store import migrate, revisions
    import alembic.command, sqlalchemy

    revisions.shapes()
    print("ready", flush=True)
    migrate.prepare(Path(sys.argv[1]))
    print("done", flush=True)
"""


def kill_while_upgrading(path: Path, spawn: Any, after: float) -> str:
    """Kill a process that upgrades the file so many seconds after it began; return the revision it left."""
    process = spawn(UPGRADES, path)
    assert process.stdout.readline() == "ready\n"
    time.sleep(after)
    process.kill()
    assert process.wait(timeout=30) in {-signal.SIGKILL, 0}
    return str(migrate.current(path))


@pytest.mark.long
@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(600)])], ids=["a few", "many"]
)
def test_a_kill_at_a_random_time_leaves_the_old_file_or_the_new_one_whole(
    few: Path, tmp_path: Path, spawn: Any, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    before, was = contents(few), objects(few)
    trial = Path(shutil.copy(few, tmp_path / "trial.db"))
    done = migrate.upgrade(trial)
    assert done is not None
    left = []
    for n in range(kills):
        path = Path(shutil.copy(few, tmp_path / f"{n}.db"))

        left.append(kill_while_upgrading(path, spawn, chance.uniform(0.0, 1.5 * done.seconds)))

        if left[-1] == OLDEST:
            assert (objects(path), contents(path)) == (was, before)
            migrate.prepare(path)
        assert migrate.current(path) == schema.HEAD
        assert contents(path, before) == {table: rows for table, rows in before.items() if rows}
        assert objects(path) == objects(trial)
        assert len(list(tmp_path.glob(f"{n}.db-*backup"))) == 1
    print(f"{left.count(OLDEST)} of {kills} left the old revision")
