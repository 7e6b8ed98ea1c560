"""Copies of a file: made beside writers, refused to run by mistake, adopted, and put back whatever is in their place."""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    MonitorSpec,
    NotAStore,
    Recovery,
    SchemaError,
    SchemaTooNew,
    SessionTasks,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StoreCopied,
    TaskContext,
    TaskHandle,
    TaskNotFound,
    TaskState,
    TaskStore,
    copies,
    guards,
    processes,
    restoring,
    schema,
)
from tests.runtime.support import RUNTIME, check_file, event_types, everything, next_event, rows

DATA = Path(__file__).parents[1] / "data"


def store_on(path: Path, *, ends: bool = False, **options: Any) -> TaskStore:
    """Make a store whose ``work`` stays, unless it *ends*."""
    store = TaskStore(path, runtime=RUNTIME, **options)
    store.task(recovery=Recovery.RERUN, name="work")(done if ends else stay)
    return store


async def stay(task: TaskContext) -> str:
    await task.progress("has begun")
    await asyncio.Event().wait()
    return "never"


async def done(task: TaskContext) -> str:
    await task.progress("goes on")
    return "done"


async def live(store: TaskStore) -> TaskHandle:
    """Return a task whose body is at work."""
    handle = await (await store.session("s1")).spawn(stay, id="live")
    await next_event(store, EventType.PROGRESS, task_id="live")
    return handle


async def at_work(session: SessionTasks) -> tuple[TaskHandle, int]:
    """Return a monitor, and the process that runs for it."""
    monitor = await session.start_monitor(MonitorSpec(id="m", command="sleep 60", shell=True))
    async with asyncio.timeout(20):
        while (process := (await monitor.record()).process) is None:
            await asyncio.sleep(0.001)
    return monitor, process.pid


async def finished(store: TaskStore, *ids: str, text: str = "") -> None:
    session = await store.session("s1")
    for task_id in ids:
        await (await session.spawn(echo(text), id=task_id)).wait()


async def echo(text: str) -> str:
    return text


def ids(path: Path) -> list[str]:
    return [row["id"] for row in rows(path, "SELECT id FROM tasks ORDER BY task_seq")]


def bytes_beside(path: Path) -> dict[str, bytes]:
    """Read all that SQLite would take for the file, and whatever else stands beside it."""
    found = [one for one in path.parent.iterdir() if one.name.startswith(path.name) and one.is_file()]
    return {one.name: one.read_bytes() for one in found if one.stat().st_size and not one.name.endswith("-shm")}


def stamp(path: Path) -> int:
    return int(rows(path, "PRAGMA user_version")[0]["user_version"])


@pytest.fixture
async def stopped(path: Path, newborn: Path) -> Path:
    """A stopped file: ``before`` is done in it."""
    shutil.copy(newborn, path)
    async with store_on(path) as store:
        await finished(store, "before")
    return path


@pytest.fixture
def backup(stopped: Path, tmp_path: Path) -> Path:
    """A backup of that."""
    return copies.back_up(stopped, tmp_path / "backup.db").path


# --- making one -----------------------------------------------------------------------------------------------------


async def test_a_backup_is_one_moment_of_a_file_whose_owner_goes_on(new: Callable[..., TaskStore], path: Path) -> None:
    target, at = path.with_name("backup.db"), asyncio.get_running_loop()
    told: list[tuple[int, int]] = []
    async with new() as store:
        await finished(store, "before", text="x" * 6_000_000)
        meanwhile = threading.Event()

        def progress(done: int, pages: int) -> None:
            if not told:
                at.call_soon_threadsafe(written.set)
                assert meanwhile.wait(20), "no commit came through beside the copying"
            told.append((done, pages))

        written = asyncio.Event()
        making = asyncio.create_task(store.backup(target, progress=progress))
        await written.wait()
        assert not target.exists()
        await finished(store, *(f"later-{number}" for number in range(20)))
        meanwhile.set()
        report = await making
        assert (await (await store.session("s1")).get("later-19")).state is TaskState.COMPLETED

    assert len(told) > 1
    assert told[-1][0] == told[-1][1]
    assert ids(target) == ["before"]
    check_file(target)
    assert (report.path, report.revision, report.tasks) == (target, schema.HEAD, 1)
    assert report.bytes == target.stat().st_size
    assert report.events == rows(target, "SELECT count(*) AS n FROM events")[0]["n"]
    assert target.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in target.parent.iterdir() if "making" in one.name] == []


@pytest.mark.parametrize("there", ["file", "link", "folder", "-wal"])
def test_a_backup_takes_no_name_that_something_has(stopped: Path, tmp_path: Path, there: str) -> None:
    target = tmp_path / "backup.db"
    match there:
        case "file":
            target.write_text("precious")
        case "link":
            target.symlink_to(tmp_path / "nowhere")
        case "folder":
            target.mkdir()
        case _:
            Path(f"{target}-wal").write_text("commits of another file, which would become those of the copy")
    before = sorted(tmp_path.iterdir())

    with pytest.raises(StorageError, match="exists: give a backup a name of its own"):
        copies.back_up(stopped, target)

    assert sorted(tmp_path.iterdir()) == before


def test_a_name_taken_while_the_copy_is_made_is_not_taken_away(stopped: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.db"

    with pytest.raises(StorageError, match="somebody made it meanwhile"):
        copies.back_up(stopped, target, lambda done, pages: target.write_text("precious") and None)

    assert target.read_text() == "precious"
    assert not Path(f"{target}-making").exists()


def test_two_who_make_the_same_backup_do_not_name_each_others_half(stopped: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.db"
    refused = []

    def progress(done: int, pages: int) -> None:
        with pytest.raises(StorageBusy, match="another process is filling") as caught:
            copies.back_up(stopped, target)
        refused.append(caught.value)

    copies.back_up(stopped, target, progress)

    assert refused
    assert everything(target) == everything(stopped)
    assert [one.name for one in tmp_path.iterdir() if "making" in one.name] == []


def test_a_folder_that_is_missing_or_no_folder_is_named(stopped: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", stopped):
        with pytest.raises(StorageError, match=f"the folder {folder} does not exist: create it first"):
            copies.back_up(stopped, folder / "backup.db")


FULL = """
import sys
from pathlib import Path
from lash_store import StorageFull, copies
target = Path(sys.argv[2]) / "backup.db"
try:
    copies.back_up(Path(sys.argv[1]), target)
except StorageFull as error:
    print(error, [one.name for one in target.parent.iterdir()])
"""


async def test_a_full_disk_leaves_nothing_of_a_backup(stopped: Path, tmp_path: Path) -> None:
    async with store_on(stopped) as store:
        await finished(store, "large", text="x" * 3_000_000)
    full = tmp_path / "full"
    full.mkdir()
    command = 'mount -t tmpfs -o size=1m tmpfs "$3" && exec "$0" -c "$1" "$2" "$3"'
    inside = ["unshare", "-Urm", "sh", "-c", command, sys.executable, FULL, str(stopped), str(full)]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    done = await asyncio.to_thread(subprocess.run, inside, capture_output=True, text=True, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("no file system of a user's own on this machine")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{full}/backup.db: the disk or its quota is full: make room")
    assert done.stdout.endswith("[]\n")


def test_a_file_system_without_hard_links_is_good_enough_for_a_backup(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "backup.db"

    copies.back_up(stopped, target)

    assert everything(target) == everything(stopped)
    with pytest.raises(StorageError, match="exists"):
        copies.back_up(stopped, target)


def test_a_backup_of_what_is_damaged_is_not_made_and_says_what_is(stopped: Path, tmp_path: Path) -> None:
    damage(stopped, "middle")

    with pytest.raises(StorageCorrupt, match=f"^{stopped}.* is damaged: .*restore a backup"):
        copies.back_up(stopped, tmp_path / "backup.db")

    stopped.unlink()
    assert [one.name for one in tmp_path.iterdir() if "backup" in one.name] == []


def damage(path: Path, where: str) -> None:
    """Overwrite some of a stopped file's pages."""
    with open(path, "r+b") as file:
        match where:
            case "header":
                file.write(b"\xff" * 512)
            case "schema":
                file.seek(100)
                file.write(b"\xff" * 3000)
            case "middle":
                [(root,)] = _ask(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'tasks'")
                file.seek((root - 1) * 4096)
                file.write(b"\xff" * 4096)
            case "end":
                file.truncate(8192)
            case "all of it":
                file.truncate(0)
                file.write(os.urandom(20_000))
            case "empty":
                file.truncate(0)


def _ask(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


# --- a copy does not run --------------------------------------------------------------------------------------------


async def test_a_backup_is_read_by_anyone_and_run_by_nobody(backup: Path) -> None:
    before = bytes_beside(backup)

    with pytest.raises(StoreCopied, match=r"lash-store restore.*adopt=True"):
        await store_on(backup).open()
    async with TaskStore.open_readonly(backup) as store:
        assert [task.id for task in await store.list()] == ["before"]

    assert bytes_beside(backup) == before


async def test_who_adopts_a_backup_has_a_store_of_its_own_and_the_original_is_none_the_worse(
    path: Path, new: Callable[..., TaskStore]
) -> None:
    async with store_on(path) as store:
        await live(store)
        _, pid = await at_work(await store.session("s1"))
        target = (await store.backup(path.with_name("backup.db"))).path
        before = everything(path)

        async with store_on(target, ends=True, adopt=True) as adopted:
            handle = await adopted.handle(f"{RUNTIME}:s1", "live")
            assert await handle.result(20) == "done"
            assert (await handle.record()).attempt == 2
            assert (await adopted.get(f"{RUNTIME}:s1", "monitor:m")).state is TaskState.ABANDONED
            ended = rows(target, "SELECT end FROM owners WHERE ended_at IS NOT NULL")
            assert [row["end"] for row in ended] == ["died"]

        os.kill(pid, 0)
        assert everything(path) == before
        async with store_on(target):
            # adopted once, it is a store like any other
            assert stamp(target) == 0
    check_file(target)


@pytest.mark.parametrize("way", ["session", "owner", "cancel"])
async def test_what_is_given_up_in_a_copy_runs_on_in_the_original(path: Path, way: str) -> None:
    async with store_on(path) as store:
        monitor, pid = await at_work(await store.session("s1"))
        target = (await store.backup(path.with_name("backup.db"))).path

        if way == "cancel":
            # its owner had died when it was copied, say, and left the process
            with closing(sqlite3.connect(target)) as raw, raw:
                raw.execute("UPDATE owners SET pid = -1, token = 'o-0123456789'")
        async with TaskStore.connect(target, runtime=RUNTIME) as asking:
            if way == "session":
                await (await asking.session("s1")).abandon("monitor:m", "trying things")
            elif way == "owner":
                [owner] = rows(target, "SELECT owner_id FROM owners")
                await asking.abandon_owner(owner["owner_id"], "trying things")
            else:
                await (await asking.session("s1")).cancel("monitor:m", "trying things", timeout=20)
            ended = TaskState.CANCELLED if way == "cancel" else TaskState.ABANDONED
            assert (await asking.get(f"{RUNTIME}:s1", "monitor:m")).state is ended

        os.kill(pid, 0)
        assert (await monitor.record()).state is TaskState.RUNNING


async def test_a_backup_of_an_older_file_that_is_at_work_is_adopted_and_upgraded(tmp_path: Path) -> None:
    old, target = tmp_path / "old.db", tmp_path / "backup.db"
    shutil.copy(DATA / "0004.db", old)
    parent = os.getppid()
    with closing(sqlite3.connect(old)) as raw, raw:
        # any process that lives stands for its owner
        raw.execute(
            "INSERT INTO owners (token, runtime, pid, process_start, boot_id, host, version, opened_at) "
            "VALUES ('o-0123456789', ?, ?, ?, ?, ?, '0.0', '2026-01-01T00:00:00.000Z')",
            [RUNTIME, parent, processes.started(parent), processes.boot_id(), platform.node()],
        )
    copies.back_up(old, target)

    async with store_on(target, adopt=True) as store:
        assert store.upgraded is not None


async def test_a_plain_copy_beside_the_living_original_starts_nothing(path: Path) -> None:
    copied = path.with_name("copied.db")
    async with store_on(path) as store:
        handle = await live(store)
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{copied}{suffix}")
        async with store_on(copied, ends=True) as other:
            assert other.recovered.reattached == ()
            assert (await other.get(f"{RUNTIME}:s1", "live")).attempt == 1
        assert (await handle.record()).state is TaskState.RUNNING


# --- putting one back -----------------------------------------------------------------------------------------------


async def test_what_was_live_when_a_backup_was_made_goes_on_when_it_is_put_back(path: Path) -> None:
    """The same process, too, whose store has closed meanwhile: it lives, but its owner of then does not."""
    async with store_on(path, cancel_grace=0.01) as store:
        handle = await live(store)
        backup = (await store.backup(path.with_name("backup.db"))).path
        await handle.cancel("no more of it")
        await finished(store, "later")
    forgotten = everything(path)

    report = await TaskStore.restore(backup, path)

    assert (report.path, report.backup, report.kept) == (path, backup, Path(f"{path}-replaced"))
    assert (report.revision, report.tasks, ids(path), stamp(path)) == (schema.HEAD, 1, ["live"], 0)
    async with store_on(path, ends=True) as store:
        assert await (await store.handle(f"{RUNTIME}:s1", "live")).result(20) == "done"
    seq = rows(path, "SELECT task_seq FROM tasks")[0]["task_seq"]
    assert event_types(path, seq)[-3:] == ["reattached", "progress", "completed"]
    assert everything(report.kept or path) == forgotten
    with pytest.raises(StoreCopied):
        await store_on(report.kept or path).open()
    assert stamp(backup) == 1


async def test_what_another_process_put_back_is_not_owned_by_the_one_that_owned_it_when_it_was_copied(
    path: Path,
) -> None:
    async with store_on(path) as store:
        await live(store)
        session = await store.session("s1")
        await (await session.spawn(echo("x"), notify_on_end=True)).wait()
        async with session.inbox():
            backup = (await store.backup(path.with_name("backup.db"))).path
    # the file is lost, with what is beside it
    for lost in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    restore = [sys.executable, "-m", "lash_store.cli", "restore", "--db", str(path), str(backup)]
    assert (await asyncio.to_thread(subprocess.run, restore, check=False)).returncode == 0

    async with store_on(path, ends=True) as store:
        assert store.recovered.unreachable == ()
        assert await (await store.handle(f"{RUNTIME}:s1", "live")).result(20) == "done"
        async with (await store.session("s1")).inbox() as notes:
            assert len(notes) == 1


async def test_what_is_put_back_gives_no_number_again(path: Path, tmp_path: Path) -> None:
    async with store_on(path) as store:
        await finished(store, "before")
        backup = (await store.backup(tmp_path / "backup.db")).path
        await finished(store, "lost 1", "lost 2")
        [newest] = rows(path, "SELECT max(seq) AS seq FROM events")
        lost = await store.handle(f"{RUNTIME}:s1", "lost 2")

    await TaskStore.restore(backup, path)

    async with store_on(path) as store:
        told = aiter(store.events(after=newest["seq"]))
        await finished(store, "after")
        # who had seen what was lost is told of all that is new
        assert [(await anext(told)).type for _ in range(3)] == [
            EventType.REGISTERED,
            EventType.STARTED,
            EventType.COMPLETED,
        ]
        assert (await store.get(f"{RUNTIME}:s1", "after")).task_seq > lost.task_seq
        with pytest.raises(TaskNotFound):
            await store.steps(lost.task_seq)
    check_file(path)


async def test_what_was_replaced_can_be_put_back_itself(stopped: Path, backup: Path) -> None:
    async with store_on(stopped) as store:
        await finished(store, "after")
    first = restoring.restore(backup, stopped)
    assert (ids(stopped), first.kept) == (["before"], Path(f"{stopped}-replaced"))

    second = restoring.restore(first.kept or backup, stopped)

    assert (ids(stopped), second.kept) == (["before", "after"], Path(f"{stopped}-replaced-2"))
    async with store_on(stopped) as store:
        await finished(store, "and on")


async def test_a_file_that_is_open_is_not_replaced_under_its_owner(stopped: Path, backup: Path) -> None:
    async with store_on(stopped) as store:
        await finished(store, "after")
        before = bytes_beside(stopped)
        with pytest.raises(SchemaError, match=rf"{stopped} is open in process {os.getpid()}: close it there first"):
            restoring.restore(backup, stopped)
        assert bytes_beside(stopped) == before
        await finished(store, "goes on")
    assert ids(stopped) == ["before", "after", "goes on"]


async def test_a_file_that_is_open_is_not_replaced_even_if_it_is_damaged(stopped: Path, backup: Path) -> None:
    good = stopped.read_bytes()
    store = store_on(stopped)
    await store.open()
    damage(stopped, "header")
    # what is in memory, and in the -wal, does not count for who opens it now
    Path(f"{stopped}-wal").rename(f"{stopped}-hidden")
    before = stopped.read_bytes()

    with pytest.raises(SchemaError, match="close it there first"):
        restoring.restore(backup, stopped)

    assert stopped.read_bytes() == before
    Path(f"{stopped}-hidden").rename(f"{stopped}-wal")
    stopped.write_bytes(good)
    await store.close()


def test_who_only_looks_is_waited_for_and_not_robbed(
    stopped: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(stopped, check_same_thread=False)) as reader:
        reader.execute("SELECT count(*) FROM tasks").fetchall()
        before = bytes_beside(stopped)
        monkeypatch.setattr(restoring, "_PASSING_READER", 10)
        with pytest.raises(SchemaError, match="is open elsewhere"):
            restoring.restore(backup, stopped)
        assert bytes_beside(stopped) == before
        monkeypatch.setattr(restoring, "_PASSING_READER", 20_000)
        leaving = threading.Timer(0.1, reader.close)
        leaving.start()
        restoring.restore(backup, stopped)
        leaving.join()


@pytest.mark.parametrize("where", ["header", "schema", "middle", "end", "all of it"])
def test_a_damaged_file_is_what_a_restore_is_for(stopped: Path, backup: Path, where: str) -> None:
    damage(stopped, where)
    damaged = stopped.read_bytes()

    report = restoring.restore(backup, stopped)

    assert ids(stopped) == ["before"]
    assert report.kept == Path(f"{stopped}-replaced")
    if where != "middle":
        # byte for byte, for whoever wants to look for more
        assert Path(f"{stopped}-replaced").read_bytes() == damaged
    check_file(stopped)


@pytest.mark.parametrize("suffix", ["-shm", "-wal", "-journal"])
@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
def test_a_link_where_sqlite_has_a_file_goes_and_what_it_names_stays(
    stopped: Path, backup: Path, tmp_path: Path, target: str, suffix: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("not ours")
    with closing(sqlite3.connect(stopped)) as hand:
        # as a copy of it is, which can be read without
        hand.execute("PRAGMA journal_mode = delete")
    Path(f"{stopped}{suffix}").symlink_to(tmp_path / target)

    restoring.restore(backup, stopped)

    assert ids(stopped) == ["before"]
    check_file(stopped)
    assert (tmp_path / "file").read_text() == "not ours"
    assert [*(tmp_path / "folder").iterdir()] == []
    assert not (tmp_path / "nothing").exists()


def test_a_file_that_is_empty_or_not_there_is_made(stopped: Path, backup: Path, tmp_path: Path) -> None:
    damage(stopped, "empty")
    assert restoring.restore(backup, stopped).kept == Path(f"{stopped}-replaced")
    assert restoring.restore(backup, tmp_path / "new.db").kept is None
    assert ids(stopped) == ids(tmp_path / "new.db") == ["before"]
    with pytest.raises(StorageError, match=r"the folder .* does not exist"):
        restoring.restore(backup, tmp_path / "nowhere" / "new.db")


@pytest.mark.parametrize("left", ["damaged", "empty", "missing"])
async def test_commits_left_beside_a_file_never_become_those_of_the_backup(
    stopped: Path, backup: Path, left: str
) -> None:
    """A ``-wal`` is not tied to its file: SQLite would read it into any that stands beside it."""
    async with store_on(stopped) as store:
        await finished(store, "in the wal", "and this")
        wal = Path(f"{stopped}-wal").read_bytes()
        assert len(wal) > 4096
    Path(f"{stopped}-wal").write_bytes(wal)
    match left:
        case "missing":
            stopped.unlink()
        case _:
            stopped.write_bytes(b"" if left == "empty" else b"\xff" * 9000)

    report = restoring.restore(backup, stopped)

    assert ids(stopped) == ["before"]
    check_file(stopped)
    assert Path(f"{stopped}-replaced-wal").read_bytes() == wal
    assert report.kept is not None
    assert report.kept.exists()
    async with store_on(stopped) as store:
        await finished(store, "after")
    assert ids(stopped) == ["before", "after"]


@pytest.fixture
def unfit(backup: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make something that is no backup one could use."""

    def make(what: str) -> Path:
        made = tmp_path / "unfit.db"
        match what:
            case "missing":
                pass
            case "empty":
                made.touch()
            case "text":
                made.write_text("dear diary")
            case "foreign":
                with closing(sqlite3.connect(made)) as connection:
                    connection.execute("CREATE TABLE t (a)")
            case "newer":
                shutil.copy(backup, made)
                with closing(sqlite3.connect(made)) as connection, connection:
                    connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
            case "orphans":
                shutil.copy(backup, made)
                with closing(sqlite3.connect(made)) as connection, connection:
                    connection.execute("DELETE FROM sessions")
            case _:
                shutil.copy(backup, made)
                damage(made, what)
        return made

    return make


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [
        ("missing", StorageError, "does not exist"),
        ("empty", StorageError, "holds no store"),
        ("text", NotAStore, "not an SQLite database"),
        ("foreign", NotAStore, "another application's"),
        ("newer", SchemaTooNew, "at revision 9999"),
        ("orphans", StorageCorrupt, "rows without parents"),
        ("header", NotAStore, "not an SQLite database"),
        ("schema", StorageCorrupt, "damaged"),
        ("middle", StorageCorrupt, "is damaged"),
        ("end", StorageCorrupt, "damaged"),
    ],
)
def test_what_is_no_backup_changes_nothing(
    stopped: Path, unfit: Callable[[str], Path], what: str, error: type[StorageError], told: str
) -> None:
    source = unfit(what)
    before = bytes_beside(stopped)

    with pytest.raises(error, match=told) as caught:
        restoring.restore(source, stopped)

    assert str(source) in str(caught.value)
    assert bytes_beside(stopped) == before


async def test_a_live_store_is_no_backup_of_itself_nor_of_another(stopped: Path, backup: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is the file itself"):
        restoring.restore(stopped, stopped)
    async with store_on(tmp_path / "other.db"):
        before = bytes_beside(stopped)
        with pytest.raises(StorageError, match=f"is no backup but a store that is open in process {os.getpid()}"):
            restoring.restore(tmp_path / "other.db", stopped)
        assert bytes_beside(stopped) == before


async def test_a_backup_is_put_elsewhere_while_its_original_works_and_does_not_do_its_work(path: Path) -> None:
    elsewhere = path.with_name("elsewhere.db")
    async with store_on(path) as store:
        handle = await live(store)
        backup = (await store.backup(path.with_name("backup.db"))).path

        restoring.restore(backup, elsewhere)

        async with store_on(elsewhere, ends=True) as other:
            assert (await other.get(f"{RUNTIME}:s1", "live")).attempt == 1
        assert (await handle.record()).state is TaskState.RUNNING


def test_another_applications_file_is_not_replaced(backup: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.db"
    with closing(sqlite3.connect(theirs)) as connection:
        connection.execute("CREATE TABLE t (a)")
    before = bytes_beside(theirs)

    with pytest.raises(NotAStore, match=f"{theirs} is another application's"):
        restoring.restore(backup, theirs)

    assert bytes_beside(theirs) == before
    assert not guards.side_folder(theirs).exists()


def test_a_store_that_has_lost_its_mark_is_damaged_and_not_another_applications(stopped: Path, backup: Path) -> None:
    with closing(sqlite3.connect(stopped)) as connection:
        connection.execute("PRAGMA application_id = 1")

    assert restoring.restore(backup, stopped).kept == Path(f"{stopped}-replaced")

    assert ids(stopped) == ["before"]


@pytest.mark.parametrize("pragma", ["journal_mode = DELETE", "page_size = 8192"])
async def test_a_file_that_was_made_over_by_hand_is_a_store_again(stopped: Path, backup: Path, pragma: str) -> None:
    with closing(sqlite3.connect(stopped, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("VACUUM")

    restoring.restore(backup, stopped)

    assert rows(stopped, "PRAGMA journal_mode") == [{"journal_mode": "wal"}]
    async with store_on(stopped) as store:
        await finished(store, "after")
    assert ids(stopped) == ["before", "after"]


def test_two_restores_of_one_file_come_one_after_the_other(stopped: Path, backup: Path) -> None:
    others = [threading.Thread(target=restoring.restore, args=(backup, stopped)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(20)

    assert ids(stopped) == ["before"]
    assert len(list(stopped.parent.glob("agent.db-replaced*"))) == 3


def test_a_newer_file_is_replaced_for_that_is_the_way_back(stopped: Path, backup: Path) -> None:
    with closing(sqlite3.connect(stopped)) as connection, connection:
        connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")

    kept = restoring.restore(backup, stopped).kept

    assert ids(stopped) == ["before"]
    assert kept is not None
    assert rows(kept, f"SELECT version_num FROM {schema.VERSION_TABLE}") == [{"version_num": "9999"}]


@pytest.mark.parametrize("revision", sorted(file.stem for file in DATA.glob("*.db")))
async def test_a_backup_of_an_older_revision_is_put_back_and_upgraded_when_it_is_opened(
    tmp_path: Path, revision: str
) -> None:
    old = Path(shutil.copy(DATA / f"{revision}.db", tmp_path / "old.db"))
    backup = copies.back_up(old, tmp_path / "backup.db").path

    report = restoring.restore(backup, tmp_path / "agent.db")

    assert report.revision == revision
    async with TaskStore(tmp_path / "agent.db", runtime="another") as store:
        assert store.upgraded is not None
    assert ids(tmp_path / "agent.db") == ids(old)


def test_a_link_to_a_file_is_not_replaced(stopped: Path, backup: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(stopped)
    with pytest.raises(StorageError, match=r"is a symbolic link|is the file itself"):
        restoring.restore(backup, link)
    other = tmp_path / "hard.db"
    other.hardlink_to(stopped)
    with pytest.raises(StorageError, match="has 2 hard links"):
        restoring.restore(backup, stopped)
    other.unlink()


def test_a_full_disk_in_the_middle_of_a_restore_changes_nothing(
    stopped: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(stopped)
    opened = copies.database.open_sqlite

    def small(path: Path, mode: Any, *rest: Any) -> sqlite3.Connection:
        connection = opened(path, mode, *rest)
        if mode == "write":
            connection.execute("PRAGMA max_page_count=2").fetchall()
        return connection

    with closing(sqlite3.connect(stopped)) as connection, connection:
        connection.execute("DELETE FROM owners")
    monkeypatch.setattr(copies.database, "open_sqlite", small)
    grown = stopped.with_name("grown.db")
    shutil.copy(backup, grown)
    with closing(sqlite3.connect(grown)) as connection, connection:
        connection.execute("CREATE TABLE filler AS SELECT randomblob(1000000) AS a")

    with pytest.raises(StorageFull):
        restoring.restore(grown, stopped)

    assert everything(stopped) == {**before, "owners": []}
    assert not Path(f"{stopped}-replaced").exists()


def test_who_restores_waits_for_who_makes_the_file(
    stopped: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_PATIENCE", 0.01)
    with guards.alone(stopped, 1.0), pytest.raises(StorageBusy, match="another process has been making"):
        restoring.restore(backup, stopped)
