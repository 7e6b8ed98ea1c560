"""
Owns copies of a file: backups made beside writers, what says that a file is a copy, and putting one back.

A copy does not run its work twice: it is stamped (``PRAGMA user_version`` is 1), and a stamped file runs only for who adopts it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from . import database, guards, queries, session_queries, transitions
from .commands import ConfirmCancel, Release
from .database import Transaction
from .errors import NotAStore, SchemaError, StorageBusy, StorageCorrupt, StorageError, StoreCopied
from .identity import VERSION_TABLE
from .lifecycle import Task
from .models import OwnerEnd, TaskState
from .owners import Life, describe_process, life_of
from .queries import ALL_OPEN_OWNERS, OwnerRow

__all__ = [
    "BackupReport",
    "RestoreReport",
    "adopt",
    "back_up",
    "check_not_copied",
    "copy",
    "free_name",
    "is_locked",
    "made",
    "name",
    "restore",
    "revision_of",
]

STAMP = 1
"""The ``user_version`` of a copy; a store's own is 0."""

_PAGES = 1024
"""Pages copied between two looks at the time and two words of progress."""

_PATIENCE = 30.0

_PASSING_READER = 2_000
"""Milliseconds that a restore waits for who only looks at the file."""

Progress = Callable[[int, int], object]
"""Called with the pages copied so far, and how many there are."""


class BackupReport(BaseModel):
    """A copy that was made and verified: where it is, its *revision*, how many *bytes*, *tasks* and *events* it has."""

    model_config = ConfigDict(frozen=True)

    path: Path
    revision: str
    bytes: int
    tasks: int
    events: int


class RestoreReport(BaseModel):
    """A file that was put back: where, from which *backup*, and where what was there before is *kept* (None: nothing was)."""

    model_config = ConfigDict(frozen=True)

    path: Path
    backup: Path
    kept: Path | None
    revision: str
    tasks: int


# --- what says so ---------------------------------------------------------------------------------------------------


def stamp_of(connection: sqlite3.Connection) -> int:
    """Return what the file under a connection says of itself; 0 is an original."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def revision_of(path: Path) -> str | None:
    """
    Return a file's revision; see `database.probe`.

    Raises:
        StorageCorrupt: it is damaged, also where SQLite's own words about that cannot be read.
    """
    try:
        return database.probe(path)
    except UnicodeDecodeError as error:
        raise StorageCorrupt(f"{path}: the file is damaged: copy it away, then restore a backup") from error


def check_not_copied(connection: sqlite3.Connection, path: Path) -> None:
    """
    Refuse to run what is a copy.

    Raises:
        StoreCopied: it is one, and nobody has adopted it.
    """
    if stamp_of(connection) == STAMP:
        raise StoreCopied(
            f"{path} is a copy, whose work its original may be running: look into it read-only, put it in the place of "
            "that with `lash-store restore`, or run it as a store of its own with TaskStore(…, adopt=True)"
        )


def refuse_copy(path: Path) -> None:
    """Look at a file before anything is done to it; see `check_not_copied`."""
    try:
        with closing(database.open_sqlite(path, "read")) as connection:
            check_not_copied(connection, path)
    except sqlite3.Error as error:
        database.raise_translated(error, path)


def adopt(tx: Transaction) -> None:
    """
    Make a copy a store of its own: owners and readers of the original are not its, nor are the original's processes.

    Their work is recovered as that of dead owners; no process is ended, for the original may have it.
    """
    if stamp_of(tx.connection) != STAMP:
        return
    for row in tx.all(ALL_OPEN_OWNERS, {}):
        queries.end_owner(tx, OwnerRow._make(row).owner_id, OwnerEnd.DIED)
    session_queries.forget_readers(tx)
    for row in tx.all(queries.LIVE_WITH_PROCESS, {}):
        task = Task._make(row)
        confirm = task.state == TaskState.CANCEL_REQUESTED
        transitions.transition(tx, task, ConfirmCancel(None) if confirm else Release("adopted"))
    tx.all("PRAGMA user_version = 0", {})


# --- making one -----------------------------------------------------------------------------------------------------


def back_up(path: Path, target: Path, progress: Progress | None = None) -> BackupReport:
    """
    Copy one consistent state of a file while others write to it, verify the copy, and give it its name at last.

    Blocks; for a thread. A kill leaves nothing of the name, but ``<target>-making``, which the next one removes.

    Raises:
        StorageError: the target exists, or cannot be made.
        StorageBusy: another process is making it.
        StorageCorrupt: the copy does not hold what the file should; it is removed.
    """
    for there in (target, *_with_commits(target)):
        if there.exists() or there.is_symlink():
            raise StorageError(f"{there} exists: give a backup a name of its own, or move that away")
    with made(target) as making:
        revision_of(path)
        copy(path, making, progress=progress)
        report = _verified(making, path).model_copy(update={"path": target})
        name(making, target)
    return report


@contextmanager
def made(target: Path) -> Iterator[Path]:
    """
    Give a private file beside *target* to be filled; whatever happens, nothing is left of that under its own name.

    Raises:
        StorageError: it cannot be made, or written.
        StorageBusy: another process is filling it.
    """
    if not target.parent.is_dir():
        raise StorageError(f"the folder {target.parent} does not exist: create it first")
    making = Path(f"{target}-making")
    descriptor = _claimed(making)
    try:
        yield making
    except sqlite3.Error as error:
        database.raise_translated(error, target)
    finally:
        # once it has its name, somebody else may be filling the next one
        if _is_named(making, descriptor):
            _remove(making)
        os.close(descriptor)


def _claimed(making: Path) -> int:
    """Make the file empty and lock it, so that two who fill it do not give half of each other's a name."""
    while True:
        try:
            descriptor = os.open(making, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{making} cannot be created: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(making, descriptor):
                for side in database.side_files(making):
                    side.unlink(missing_ok=True)
                os.ftruncate(descriptor, 0)
                os.fchmod(descriptor, 0o600)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise StorageBusy(f"another process is filling {making}: wait for it, or use another name") from None
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{making} cannot be written: {error.strerror}") from error
        # whoever had it before has named or removed it
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Say whether somebody holds the lock of a file: one that is being filled, or that says that an owner lives."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_named(making: Path, descriptor: int) -> bool:
    held = os.fstat(descriptor)
    return guards.identify(making) == (held.st_dev, held.st_ino)


def _remove(making: Path) -> None:
    for left in (making, *database.side_files(making)):
        left.unlink(missing_ok=True)


def _with_commits(path: Path) -> list[Path]:
    """Return the files beside *path* that SQLite would read as its commits: no other file may be put there."""
    found = (Path(f"{path}-wal"), Path(f"{path}-journal"))
    return [side for side in found if side.exists() and side.stat().st_size > 0]


def copy(path: Path, making: Path, *, stamp: int = STAMP, progress: Progress | None = None) -> None:
    """
    Copy a file as it is at one moment, through SQLite: a read transaction held for as long as it takes keeps it at that.

    Raises:
        StorageError: the file cannot be read.
        sqlite3.Error: the copy cannot be written.
    """
    try:
        source = database.open_sqlite(path, "read")
    except sqlite3.Error as error:
        database.raise_translated(error, path)
    with closing(source):
        try:
            source.execute("BEGIN").fetchall()
            source.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        except sqlite3.Error as error:
            database.raise_translated(error, path)
        _pour(source, making, stamp, progress)
        source.execute("ROLLBACK").fetchall()


def _pour(source: sqlite3.Connection, making: Path, stamp: int, progress: Progress | None) -> None:
    with closing(sqlite3.connect(making)) as target:
        source.backup(target, pages=_PAGES, progress=_told(progress), sleep=0.001)
        # a file alone, until it is opened as a store
        target.execute("PRAGMA journal_mode=DELETE").fetchall()
        target.execute(f"PRAGMA user_version={stamp:d}")
        target.execute("PRAGMA journal_mode=WAL").fetchall()


def _told(progress: Progress | None) -> Callable[[int, int, int], None]:
    def told(status: int, left: int, pages: int) -> None:
        if progress is not None:
            progress(pages - left, pages)

    return told


def _verified(making: Path, source: Path) -> BackupReport:
    """
    Read the whole of a copy once.

    Raises:
        StorageCorrupt: it is not whole, and so is not its *source*.
    """
    try:
        with closing(sqlite3.connect(f"{making.as_uri()}?mode=ro", uri=True)) as connection:
            revision = database.read_revision(connection, source) or "none"
            database.check_whole(connection, source)
            has_tables = revision != "none"
            [tasks, events] = [
                connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] if has_tables else 0
                for name in ("tasks", "events")
            ]
    except sqlite3.Error as error:
        database.raise_translated(error, source)
    for side in database.side_files(making):
        # a reader of a file in WAL mode leaves them, empty
        side.unlink(missing_ok=True)
    return BackupReport(path=making, revision=revision, bytes=making.stat().st_size, tasks=tasks, events=events)


def free_name(wanted: Path) -> Path:
    """Return a name that begins as *wanted* and that nothing has yet, nor what SQLite would keep beside it."""
    found, number = wanted, 1
    while any(one.exists() or one.is_symlink() for one in (found, *database.side_files(found))):
        number += 1
        found = Path(f"{wanted}-{number}")
    return found


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}
"""What a file system says that has no hard links, such as a memory stick's."""


def name(making: Path, target: Path) -> None:
    """Give what was made its name, unless something has it; durable on return."""
    try:
        _sync(making)
        try:
            os.link(making, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            making.replace(target)
        making.unlink(missing_ok=True)
        guards.sync_folder(target.parent)
    except FileExistsError:
        raise StorageError(f"{target} exists: somebody made it meanwhile") from None
    except OSError as error:
        raise StorageError(f"{target} cannot be made: {error.strerror}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- putting one back -----------------------------------------------------------------------------------------------


def restore(backup: Path, path: Path, progress: Progress | None = None) -> RestoreReport:
    """
    Put a backup in a file's place, once it is verified; what is there is kept beside it, as ``<file>-replaced``.

    The contents are replaced in one transaction of the file itself, so a kill at any point leaves the one or the other, whole,
    and no ``-wal`` of the one beside the other. What is there and damaged is moved away instead.

    The file goes on where the backup was made: its work is recovered when it is next opened. Blocks; for a thread.

    Raises:
        NotAStore, SchemaTooNew, StorageCorrupt: the backup is not one that can be used, or what is there is another
            application's; nothing was changed.
        SchemaError: the file is open elsewhere; nothing was changed.
        StorageError: the backup is the file itself, or a live store.
    """
    backup, path = guards.resolve(backup), guards.resolve(path)
    _check_source(backup, path)
    if not path.parent.is_dir():
        raise StorageError(f"the folder {path.parent} does not exist: create it, then restore")
    try:
        with guards.alone(path, _PATIENCE):
            _undo_half(path)
            is_there = guards.check_target(path, writing=True) and path.stat().st_size > 0
            _refuse_beside(path)
            with made(path) as making:
                copy(backup, making, stamp=0, progress=progress)
                report = _verified(making, backup)
                kept = _replace(making, path) if is_there else None
                if kept is None:
                    with closing(sqlite3.connect(making)) as connection:
                        _forget_owners(connection, path, ())
                    _sync(making)
                    kept = _put_aside(path)
                    making.replace(path)
                    guards.sync_folder(path.parent)
        guards.make_private(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be put back: {error.strerror or error}") from error
    return RestoreReport(path=path, backup=backup, kept=kept, revision=report.revision, tasks=report.tasks)


def _check_source(backup: Path, path: Path) -> None:
    """
    Refuse what is no backup.

    Raises:
        NotAStore, SchemaTooNew, StorageError: it is not.
    """
    if not guards.check_target(backup, writing=False):
        raise StorageError(f"{backup} does not exist: check the path")
    if backup == path or (path.exists() and guards.identify(path) == guards.identify(backup)):
        raise StorageError(f"{backup} is the file itself: nothing to restore")
    if revision_of(backup) is None:
        raise StorageError(f"{backup} holds no store: check the path")
    alive = _alive(backup)
    if alive:
        raise StorageError(
            f"{backup} is no backup but a store that is open in {alive}: make one with lash-store backup"
        )


def _alive(path: Path) -> str:
    """Name the processes that have a file open as its owners; empty: none has."""
    folder = guards.side_folder(path)
    # SQLite removes the -wal of an empty file
    if path.exists() and path.stat().st_size > 0:
        with suppress(sqlite3.Error, UnicodeDecodeError), closing(database.open_sqlite(path, "read")) as connection:
            if not _has_owners(connection):
                return ""
            owners = [OwnerRow._make(row) for row in connection.execute(ALL_OPEN_OWNERS)]
            # of a copy the same owner may be alive, in this process, beside its original
            here = [
                one for one in owners if life_of(path, one) is Life.ALIVE and (folder / f"{one.token}.lock").exists()
            ]
            return f"process {', '.join(str(one.pid) for one in here)}" if here else ""
    # what is damaged does not tell; their locks do
    held = [str(lock) for lock in folder.glob("o-*.lock") if is_locked(lock)]
    return f"the process that holds {', '.join(held)}" if held else ""


def _refuse_beside(path: Path) -> None:
    """
    Refuse to replace what somebody works with.

    Raises:
        SchemaError: an owner of the file lives.
    """
    if alive := _alive(path):
        raise SchemaError(f"{path} is open in {alive}: close it there first; nothing was changed")


def _replace(making: Path, path: Path) -> Path | None:
    """
    Put what was made into a file that nobody has open, in one transaction; return where what was in it is kept.

    None: that cannot be, for the file is damaged, which is what a restore is for; nothing was changed.

    Raises:
        NotAStore: it is another application's.
        SchemaError: somebody has it open.
    """
    kept: Path | None = None
    is_done = False
    try:
        with closing(database.open_sqlite(path, "write")) as target, closing(sqlite3.connect(making)) as source:
            target.execute(f"PRAGMA busy_timeout={_PASSING_READER}").fetchall()
            # nobody else comes in from here to the close
            target.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
            target.execute("BEGIN EXCLUSIVE").fetchall()
            if not _is_ours(target, path):
                return None
            _forget_owners(source, path, _ended(target))
            target.execute("COMMIT").fetchall()
            if _page_size(source) != _page_size(target):
                return None
            kept = free_name(Path(f"{path}-replaced"))
            with made(kept) as keeping:
                _pour(target, keeping, STAMP, None)
                name(keeping, kept)
            source.backup(target, pages=_PAGES, sleep=0.001)
            is_done = True
            target.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        code = database.primary_code(error)
        if is_done:
            # it is in the -wal: whoever opens the file next does the rest
            return kept
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise SchemaError(f"{path} is open elsewhere: close it there first; nothing was changed") from error
        if code not in _DAMAGE:
            database.raise_translated(error, path)
        return None
    finally:
        if kept is not None and not is_done:
            kept.unlink(missing_ok=True)
    return kept


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, None}
"""What SQLite says of a damaged file; None: its words about that could not be read."""


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """
    Say whether what is to be replaced is a store; one that has lost its mark is not, but is damaged.

    Raises:
        NotAStore: it is another application's file.
    """
    try:
        database.read_revision(connection, path)
    except NotAStore:
        if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (VERSION_TABLE,)).fetchall():
            return False
        raise
    return True


def _page_size(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA page_size").fetchone()[0])


def _has_owners(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'owners'").fetchall())


def _ended(connection: sqlite3.Connection) -> set[str]:
    """Return the tokens of the owners that a file names as ended."""
    if not _has_owners(connection):
        return set()
    return {token for (token,) in connection.execute("SELECT token FROM owners WHERE ended_at IS NOT NULL")}


def _forget_owners(connection: sqlite3.Connection, path: Path, ended: Collection[str]) -> None:
    """
    End the owners that were open when the backup was made, and have closed since: their process may live on, but not they.

    *ended* are those that the file itself names so; of this process' own it is known.
    """
    if not _has_owners(connection):
        return
    us = describe_process()
    tx = Transaction(connection, database.utc_text(time.time()))
    for row in tx.all(ALL_OPEN_OWNERS, {}):
        owner = OwnerRow._make(row)
        is_ours = (owner.pid, owner.process_start, owner.boot_id) == (us["pid"], us["process_start"], us["boot_id"])
        if owner.token in ended or (is_ours and life_of(path, owner) is Life.UNREACHABLE):
            queries.end_owner(tx, owner.owner_id, OwnerEnd.DIED)
    connection.commit()


# --- in the place of what is damaged, or of nothing -----------------------------------------------------------------


def _put_aside(path: Path) -> Path | None:
    """
    Give what is there, if anything is, a second name with all that SQLite keeps beside it; return that.

    Then nothing stands beside *path* that SQLite would read as commits of what is put there next. A damaged file keeps its
    name until then, for without any file the next program would begin a new one.
    """
    kept = free_name(Path(f"{path}-replaced"))
    found = [*_with_commits(path), *([path] if path.exists() else [])]
    for one in found:
        os.link(one, f"{kept}{one.name.removeprefix(path.name)}")
    guards.sync_folder(path.parent)
    for side in database.side_files(path):
        side.unlink(missing_ok=True)
    return Path(f"{kept}{found[-1].name.removeprefix(path.name)}") if found else None


def _undo_half(path: Path) -> None:
    """Undo what `_put_aside` did before a kill: the file has one name again, and beside it what belongs to it."""
    identity = guards.identify(path)
    for kept in path.parent.glob(f"{glob.escape(path.name)}-replaced*"):
        if identity is None or kept.is_symlink() or guards.identify(kept) != identity:
            continue
        for suffix in ("-wal", "-journal"):
            moved, side = Path(f"{kept}{suffix}"), Path(f"{path}{suffix}")
            if moved.exists():
                moved.replace(side)
                # of two names of one file neither is replaced
                moved.unlink(missing_ok=True)
        kept.unlink()
