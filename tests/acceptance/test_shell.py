"""The file in the real `sqlite3` shell: it reads well, blocks nobody, and cannot undo an outcome."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lash_store import Recovery, SessionTasks, TaskContext, TaskState, TaskStore
from tests.runtime.support import check_file

SHELL = shutil.which("sqlite3")
pytestmark = pytest.mark.skipif(SHELL is None, reason="there is no sqlite3 shell on this machine")


async def shell(*arguments: str) -> str:
    """Run the shell beside the event loop, and return what it prints."""
    done = await asyncio.to_thread(
        subprocess.run, [str(SHELL), *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that does not exist yet."""
    return tmp_path / "agent.db"


@pytest.fixture
async def writing(path: Path) -> AsyncIterator[TaskStore]:
    """A store that writes all the time: one task fails, one is abandoned, one goes on and on."""
    store = TaskStore(path, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def index(task: TaskContext) -> None:
        number = 0
        while not task.cancel_requested:
            number += 1
            await task.progress(f"page {number}", (number % 100) / 100)

    async def explode() -> None:
        raise ValueError("no such page")

    async with store:
        session = await store.session("s1")
        await (await session.spawn(explode(), id="bad")).wait()
        task = await session.spawn(index, id="index")
        async for event in task.events():
            if event.type == "progress":
                break
        yield store
        await task.cancel()
    check_file(path)


async def test_live_tasks_reads_well_while_the_store_is_writing_and_does_not_block_it(
    writing: TaskStore, path: Path
) -> None:
    longest, before, reads = 0.0, 0.0, 5
    stop = asyncio.Event()

    async def measure() -> None:
        nonlocal longest
        session: SessionTasks = await writing.session("s2")
        while not stop.is_set():
            since = time.monotonic()
            await (await session.spawn(asyncio.sleep(0))).wait()
            longest = max(longest, time.monotonic() - since)

    measuring = asyncio.create_task(measure())
    for _ in range(reads):
        before = time.monotonic()
        # a read transaction that is open for a while, as of one who thinks about what is shown
        text = await shell(
            "-header",
            str(path),
            "BEGIN; SELECT * FROM live_tasks WHERE id = 'index'; SELECT count(*) FROM tasks; COMMIT",
        )
    stop.set()
    await measuring

    head, line, *_ = text.splitlines()
    assert head.split("|")[:7] == ["scope", "id", "kind", "state", "attempt", "done", "progress"]
    values = line.split("|")
    assert values[:5] == ["desktop:s1", "index", "other", "running", "1"]
    assert values[5].endswith("%")
    assert values[6].startswith("page ")
    print(f"the slowest task beside {reads} reads of the shell took {longest * 1000:.0f} ms")
    assert longest < 2.0
    assert time.monotonic() - before < 30


@pytest.mark.long
@pytest.mark.parametrize(
    ("view", "columns", "expected"),
    [
        ("task_history", "id, type", "bad|failed"),
        ("recent_failures", "id, error, message", "bad|ValueError|no such page"),
        ("session_summary", "scope, live, failed", "desktop:s1|1|1"),
        ("live_tasks", "id, state", "index|running"),
    ],
)
async def test_each_view_reads_well_while_the_store_is_writing(
    writing: TaskStore, path: Path, view: str, columns: str, expected: str
) -> None:
    assert expected in (await shell(str(path), f"SELECT {columns} FROM {view}")).splitlines()
    assert len((await shell("-box", str(path), f"SELECT * FROM {view} LIMIT 3")).splitlines()) >= 5


async def test_a_reader_that_keeps_its_transaction_open_does_not_block_the_store(
    writing: TaskStore, path: Path
) -> None:
    shell_process = subprocess.Popen([str(SHELL), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell_process.stdin is not None
    assert shell_process.stdout is not None
    shell_process.stdin.write("BEGIN; SELECT count(*) FROM live_tasks;\n")
    shell_process.stdin.flush()
    assert await asyncio.to_thread(shell_process.stdout.readline) == "1\n"

    session = await writing.session("s2")
    async with asyncio.timeout(10):
        for _ in range(50):
            await (await session.spawn(asyncio.sleep(0))).wait()

    shell_process.stdin.write("SELECT count(*) FROM tasks;\n")
    shell_process.stdin.flush()
    assert await asyncio.to_thread(shell_process.stdout.readline) == "2\n"
    shell_process.communicate(timeout=10)


async def test_a_read_only_shell_leaves_the_file_unchanged(path: Path) -> None:
    async with TaskStore(path, runtime="desktop") as store:
        await (await (await store.session("s1")).spawn(asyncio.sleep(0))).wait()
    before = path.read_bytes()

    assert await shell("-readonly", str(path), "SELECT count(*) FROM tasks") == "1\n"

    assert path.read_bytes() == before


async def test_a_shell_that_comes_and_goes_does_not_take_the_wal_away(writing: TaskStore, path: Path) -> None:
    # a stray open and close in the owner's process drops the locks that SQLite itself holds
    await asyncio.to_thread(lambda: path.open("rb").close())
    wal = Path(f"{path}-wal").stat().st_ino

    await shell(str(path), "SELECT count(*) FROM tasks")

    assert Path(f"{path}-wal").stat().st_ino == wal
    session = await writing.session("s2")
    await (await session.spawn(asyncio.sleep(0), id="after")).wait()
    assert await shell("-readonly", str(path), "SELECT state FROM tasks WHERE id = 'after'") == "completed\n"


@pytest.mark.long
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE tasks SET state = 'running', completed_at = NULL, failure = NULL WHERE id = 'bad'",
        "UPDATE tasks SET state = 'completed', result = '1', failure = NULL WHERE id = 'bad'",
        "UPDATE tasks SET failure = '{}' WHERE id = 'bad'",
        "DELETE FROM tasks WHERE id = 'index'",
        "UPDATE events SET type = 'completed' WHERE task_id = 'bad'",
        "INSERT INTO events (task_seq, scope, task_id, type, at, data) SELECT task_seq, scope, id, 'completed', 'x', '{}' "
        "FROM tasks WHERE id = 'bad'",
        "UPDATE tasks SET state = 'sleeping' WHERE id = 'index'",
    ],
)
async def test_a_hand_edit_that_would_undo_history_is_refused(writing: TaskStore, path: Path, statement: str) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [str(SHELL), "-cmd", ".timeout 5000", str(path), statement],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode != 0
    assert (
        "constraint" in done.stderr.lower()
        or "finished task" in done.stderr
        or "history" in done.stderr
        or ("never changed" in done.stderr or "live task" in done.stderr)
    ), done.stderr
    assert (await writing.get("desktop:s1", "bad")).state is TaskState.FAILED
    assert (await writing.get("desktop:s1", "index")).state is TaskState.RUNNING
