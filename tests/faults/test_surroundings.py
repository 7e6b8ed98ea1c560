"""What is around a store and goes wrong: no descriptors, no room, locks held by others, a fork, files that go away under it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lash_store import StorageBusy, StorageFull, StorageMoved, TaskKind, TaskState, TaskStore
from tests.acceptance.processes import Worker, workers
from tests.checker import check
from tests.faults import programs
from tests.faults.programs import make, works
from tests.runtime.support import left_over, rows, threads

HOLD = float(os.environ.get("FAULTS_HOLD", "0.5"))
"""Seconds for which somebody else holds the write lock."""

Start = Callable[..., Worker]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that does not exist yet; what is left of it must be whole."""
    path = tmp_path / "agent.db"
    yield path
    if path.exists():
        assert check(path) == []


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers that end with the test."""
    with workers() as start:
        yield start


# --- descriptors, and room ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open descriptors are read from /proc")
@pytest.mark.parametrize("is_new", [False, True])
def test_without_descriptors_a_store_does_not_open_in_our_words_and_leaves_nothing(
    start: Start, path: Path, is_new: bool
) -> None:
    worker = start(programs.want_descriptors_at_open, str(path), is_new)
    worker.wait_for("over")

    tried = [words[1:] for words in worker.said if words[0] == "open"]

    assert [left for _, _, left in tried if left] == []
    assert {answer for _, answer, _ in tried} == {"StorageError", "opened"}
    assert len(tried) > 3, tried


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open descriptors are read from /proc")
def test_a_store_at_work_without_descriptors_answers_in_our_words_and_goes_on(start: Start, path: Path) -> None:
    worker = start(programs.want_descriptors_at_work, str(path))
    worker.wait_for("over")

    answers = {words[1]: words[2] for words in worker.said if words[0] == "asked"}

    # what is open already suffices for these
    assert [answers[name] for name in ("spawn", "result", "list", "session", "prune")] == ["success"] * 5
    # these open something
    assert (answers["inbox"], answers["backup"], answers["check"]) == ("StorageError",) * 3
    assert answers["recover"] in {"success", "StorageError"}
    assert worker.wait_for("copy")[1] is False


def test_a_file_that_may_not_grow_refuses_what_is_new_and_the_same_store_goes_on_once_it_may(
    start: Start, path: Path
) -> None:
    worker = start(programs.want_file_size, str(path))
    stored = worker.wait_for("over")[1]

    assert worker.wait_for("refused")[1] in {"StorageError", "StorageFull"}
    assert stored > 0
    ids = {row["id"] for row in rows(path, "SELECT id FROM tasks")}
    assert {f"t{number}" for number in range(stored)} <= ids
    assert f"t{stored}" not in ids


async def test_a_full_file_refuses_what_is_new_and_the_same_store_goes_on_once_there_is_room(path: Path) -> None:
    async with make(path) as store:
        session = await store.session("s1")
        assert store._core is not None
        assert store._core.writer is not None
        connection = store._core.writer._connection
        assert connection is not None
        [(pages,)] = await connection.run(lambda raw: raw.execute("PRAGMA page_count").fetchall())
        await connection.run(lambda raw: raw.execute(f"PRAGMA max_page_count={pages + 20}").fetchall())
        stored: list[str] = []

        async def fill() -> None:
            while True:
                await session.spawn(programs.echo, "x" * 2000, id=f"t{len(stored)}")
                stored.append(f"t{len(stored)}")

        with pytest.raises(StorageFull):
            await asyncio.wait_for(fill(), 30)
        assert [one.id for one in await session.list(include_terminal=True)] == stored
        await connection.run(lambda raw: raw.execute("PRAGMA max_page_count=1000000").fetchall())

        await works(session, "after")
        for name in stored:
            # ends that found no room are stored now
            await (await session.handle(name)).result(timeout=20)


# --- locks ----------------------------------------------------------------------------------------------------------


async def test_a_lock_that_outlasts_the_patience_is_storage_busy_and_a_longer_patience_outlasts_it(
    start: Start, path: Path
) -> None:
    async with make(path, lock_timeout=HOLD / 4) as store, make(path, lock_timeout=HOLD * 10 + 5) as patient:
        session, waiting = await store.session("s1"), await patient.session("s1")
        holder = start(programs.hold_write_lock, str(path), HOLD)
        await holder.says("holds")
        began = time.monotonic()
        waits = asyncio.create_task(waiting.spawn(programs.echo, "patient", id="patient"))

        with pytest.raises(StorageBusy):
            await session.spawn(programs.echo, "refused", id="refused")

        # the loop goes on meanwhile, and so do readers
        assert await session.list() == []
        assert time.monotonic() - began < HOLD
        assert await (await waits).result(timeout=20) == "patient"
        assert time.monotonic() - began >= HOLD * 0.8
        await works(session, "after")
        assert rows(path, "SELECT id FROM tasks WHERE id = 'refused'") == []


async def test_a_reader_that_pins_the_wal_holds_nobody_up_and_costs_room_only_until_it_ends(path: Path) -> None:
    wal = Path(f"{path}-wal")
    async with make(path) as store:
        session = await store.session("s1")
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            before = reader.execute("SELECT count(*) FROM tasks").fetchone()
            for number in range(40):
                await works(session, f"beside {number}")
            assert store._core is not None
            assert store._core.writer is not None
            committer, connection = store._core.writer._committer, store._core.writer._connection
            assert committer is not None
            assert connection is not None
            # what is pinned cannot be copied, and that is no error
            await connection.run(lambda _: committer.checkpoint_if_free())
            await works(session, "once more")

            assert reader.execute("SELECT count(*) FROM tasks").fetchone() == before
            reader.execute("ROLLBACK")
            assert reader.execute("SELECT count(*) FROM tasks").fetchone() == (41,)
            assert wal.stat().st_size > 0
    assert not wal.exists() or wal.stat().st_size == 0


# --- a fork ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("uses", [False, True])
def test_a_forked_child_costs_its_parent_nothing_and_is_told_to_fork_before(
    start: Start, path: Path, uses: bool
) -> None:
    worker = start(programs.fork_beside, str(path), uses)
    worker.wait_for("over")

    assert worker.wait_for("status") == ["status", 0]
    answers = {words[1]: words[2] for words in worker.said if words[0] == "child"}
    assert answers.pop("close", "success") == "success"
    # SQLite would take its parent's locks for its own
    for own in ("a store of its own", "a reader of its own"):
        assert answers.pop(own, "StorageError") == "StorageError"
    assert set(answers.values()) == ({"StoreClosed"} if uses else set()), answers
    assert rows(path, "SELECT id FROM tasks WHERE id = 'of the child'") == []


# --- files that go away ---------------------------------------------------------------------------------------------


def unlink(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed.db"))


def replace(path: Path) -> None:
    with closing(sqlite3.connect(path.with_name("other.db"))) as other:
        other.execute("CREATE TABLE theirs (x)")
    path.with_name("other.db").replace(path)


@pytest.mark.parametrize("away", [unlink, rename, replace])
@pytest.mark.parametrize("shell", [False, True], ids=["alone", "a shell comes by"])
async def test_a_store_whose_file_went_away_stops_before_anything_is_acknowledged(
    path: Path, away: Callable[[Path], None], shell: bool
) -> None:
    before = threads()
    store = make(path)
    await store.open()
    session = await store.session("s1")
    await works(session, "acknowledged")
    away(path)
    if shell:
        # it makes a file where there is none, as the sqlite3 shell does
        subprocess.run(
            [sys.executable, "-c", f"import sqlite3; sqlite3.connect({str(path)!r}).execute('CREATE TABLE x (y)')"],
            check=True,
        )

    for _ in range(2):
        with pytest.raises(StorageMoved):
            await session.spawn(programs.echo, "lost", id="lost")

    await store.close()
    assert await left_over(path, before) == []
    moved = path.with_name("renamed.db")
    if moved.exists() and shell:
        moved.unlink()
    elif moved.exists():
        # what was acknowledged is where the file is, with what was beside it; who makes a file at the old name first, beside
        # that -wal, has SQLite remove it
        for side in ("-wal", "-shm"):
            if Path(f"{path}{side}").exists():
                Path(f"{path}{side}").replace(f"{moved}{side}")
        assert [row["state"] for row in rows(moved, "SELECT state FROM tasks")] == ["completed"]
        assert check(moved) == []
    for side in ("", "-wal", "-shm"):
        Path(f"{path}{side}").unlink(missing_ok=True)


@pytest.mark.parametrize("side", ["-wal", "-shm"])
@pytest.mark.parametrize("kind", ["owner", "requester"])
async def test_a_store_beside_whose_file_one_goes_away_stops_before_anything_is_acknowledged(
    path: Path, side: str, kind: str
) -> None:
    async with make(path) as owner:
        await (await owner.session("s1")).register("job", TaskKind.OTHER)
        async with TaskStore.connect(path, runtime="desktop") as other:
            # before it writes for the first time, too
            session = await (owner if kind == "owner" else other).session("s1")
            Path(f"{path}{side}").unlink()
            # the next opener makes one of its own, in which the locks of this one are not
            with pytest.raises(StorageMoved, match=f"agent.db{side} was removed or replaced"):
                await session.complete("job", TaskState.COMPLETED, result=1)


# --- shells ---------------------------------------------------------------------------------------------------------

_SHELL = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=20)
connection.execute("CREATE TABLE theirs (n INTEGER)")
for number in range(60):
    connection.execute("INSERT INTO theirs VALUES (?)", (number,))
    connection.commit()
    connection.execute("SELECT count(*) FROM live_tasks").fetchall()
"""


async def test_what_a_shell_and_a_store_write_beside_each_other_is_all_there(path: Path) -> None:
    async with make(path) as store:
        session = await store.session("s1")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _SHELL, str(path))
        count = 0
        while process.returncode is None:
            await works(session, f"{count}")
            count += 1
            await asyncio.sleep(0)

        assert process.returncode == 0
        assert rows(path, "SELECT count(*) AS n FROM theirs") == [{"n": 60}]
        assert rows(path, "SELECT count(*) AS n FROM tasks WHERE state = 'completed'") == [{"n": count}]
        report = await store.check()
        assert [one.code for one in report.findings if one.severity not in {"info", "warning"}] == []
