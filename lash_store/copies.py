"""
Owns copies of a file: backups made beside writers, and what says that a file is a copy; `restoring` puts them back.

A copy does not run its work twice: it is stamped (``PRAGMA user_version`` is 1), and a stamped file runs only for who adopts it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from . import database, guards, queries, session_queries, transitions, translation
from .commands import ConfirmCancel, Release
from .errors import StorageBusy, StorageCorrupt, StorageError, StoreCopied
from .lifecycle import Task
from .models import OwnerEnd, TaskState
from .owners import open_owners
from .transaction import Transaction

__all__ = [
    "PAGES",
    "STAMP",
    "BackupReport",
    "adopt",
    "back_up",
    "check_not_copied",
    "copy",
    "free_name",
    "has_bytes",
    "is_copy",
    "is_locked",
    "made",
    "name",
    "pour",
    "refuse_copy",
    "stamp_of",
    "sync",
    "verified",
    "with_commits",
]

STAMP = 1
"""The ``user_version`` of a copy; a store's own is 0."""

PAGES = 1024
"""Pages copied between two looks at the time and two words of progress."""

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


# --- what says so ---------------------------------------------------------------------------------------------------


def stamp_of(connection: sqlite3.Connection) -> int:
    """Return what the file under a connection says of itself; 0 is an original."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def is_copy(connection: sqlite3.Connection) -> bool:
    """Say whether the file under a connection is a copy that nobody has adopted."""
    return stamp_of(connection) == STAMP


def check_not_copied(connection: sqlite3.Connection, path: Path) -> None:
    """
    Refuse to run what is a copy.

    Raises:
        StoreCopied: it is one, and nobody has adopted it.
    """
    if is_copy(connection):
        raise StoreCopied(
            f"{path} is a copy, whose work its original may be running: look into it read-only, put it in the place of "
            "that with `lash-store restore`, or run it as a store of its own with TaskStore(…, adopt=True)"
        )


def refuse_copy(path: Path) -> None:
    """Look at a file before anything is done to it; see `check_not_copied`."""
    try:
        with closing(database.open_sqlite(path, "read")) as connection:
            check_not_copied(connection, path)
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, path)


def adopt(tx: Transaction) -> None:
    """
    Make a copy a store of its own: owners and readers of the original are not its, nor are the original's processes.

    Their work is recovered as that of dead owners; no process is ended, for the original may have it.
    """
    if not is_copy(tx.connection):
        return
    for owner in open_owners(tx.connection):
        queries.end_owner(tx, owner.owner_id, OwnerEnd.DIED)
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
    taken = [target] if _is_taken(target) else with_commits(target)
    if taken:
        raise StorageError(f"{taken[0]} exists: give a backup a name of its own, or move that away")
    with made(target) as making:
        if not database.has_content(path):
            raise StorageError(f"{path} is empty: check the path")
        database.probe(path)
        copy(path, making, progress=progress)
        report = verified(making, path).model_copy(update={"path": target})
        name(making, target)
    return report


def _is_taken(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}: give a backup another name") from error
    return True


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
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, target)
    finally:
        # once it has its name, somebody else may be filling the next one
        if guards.is_named(making, descriptor):
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
            if guards.is_named(making, descriptor):
                for side in guards.side_files(making):
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
        return guards.is_held(path)
    except OSError:
        return False


def _remove(making: Path) -> None:
    for left in (making, *guards.side_files(making)):
        left.unlink(missing_ok=True)


def with_commits(path: Path) -> list[Path]:
    """Return the files beside *path* that SQLite would read as its commits: no other file may be put there."""
    return [side for side in (Path(f"{path}-wal"), Path(f"{path}-journal")) if has_bytes(side)]


def has_bytes(path: Path) -> bool:
    """Say whether a file is there, and not empty."""
    try:
        return path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def copy(path: Path, making: Path, *, stamp: int = STAMP, progress: Progress | None = None) -> None:
    """
    Copy a file as it is at one moment, through SQLite: a read transaction held for as long as it takes keeps it at that.

    Raises:
        StorageError: the file cannot be read.
        sqlite3.Error: the copy cannot be written.
    """
    try:
        source = database.open_sqlite(path, "read")
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, path)
    with closing(source):
        try:
            source.execute("BEGIN").fetchall()
            source.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        except translation.DRIVER_ERRORS as error:
            translation.raise_translated(error, path)
        pour(source, making, stamp, progress)
        source.execute("ROLLBACK").fetchall()


def pour(source: sqlite3.Connection, making: Path, stamp: int, progress: Progress | None = None) -> None:
    """Copy all that a connection sees into a file that nobody else knows, and stamp that."""
    with closing(sqlite3.connect(making)) as target:
        source.backup(target, pages=PAGES, progress=_told(progress), sleep=0.001)
        # a file alone, until it is opened as a store
        target.execute("PRAGMA journal_mode=DELETE").fetchall()
        target.execute(f"PRAGMA user_version={stamp:d}")
        target.execute("PRAGMA journal_mode=WAL").fetchall()


def _told(progress: Progress | None) -> Callable[[int, int, int], None]:
    def told(status: int, left: int, pages: int) -> None:
        if progress is not None:
            progress(pages - left, pages)

    return told


def verified(making: Path, source: Path) -> BackupReport:
    """
    Read the whole of a copy once.

    Raises:
        StorageCorrupt: it is not whole, and so is not its *source*.
    """
    try:
        with closing(sqlite3.connect(f"{making.as_uri()}?mode=ro", uri=True)) as connection:
            revision = database.read_revision(connection, source) or "none"
            if (wrong := database.amiss(connection)) is not None:
                raise StorageCorrupt(f"{source} is damaged: {wrong}: restore a backup")
            has_tables = revision != "none"
            [tasks, events] = [
                connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] if has_tables else 0
                for name in ("tasks", "events")
            ]
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, source)
    for side in guards.side_files(making):
        # a reader of a file in WAL mode leaves them, empty
        side.unlink(missing_ok=True)
    return BackupReport(path=making, revision=revision, bytes=making.stat().st_size, tasks=tasks, events=events)


def free_name(wanted: Path) -> Path:
    """Return a name that begins as *wanted* and that nothing has yet, nor what SQLite would keep beside it."""
    found, number = wanted, 1
    while any(one.exists() or one.is_symlink() for one in (found, *guards.side_files(found))):
        number += 1
        found = Path(f"{wanted}-{number}")
    return found


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}
"""What a file system says that has no hard links, such as a memory stick's."""


def name(making: Path, target: Path) -> None:
    """Give what was made its name, unless something has it; durable on return."""
    try:
        sync(making)
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


def sync(path: Path) -> None:
    """Make what was written to a file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
