"""
Owns copies of a file: backups made beside writers, what says that a file is a copy, and putting one back.

A copy does not run its work twice: it is stamped (``PRAGMA user_version`` is 1), and a stamped file runs only for who adopts it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from . import database, guards, queries, session_queries, transitions
from .commands import ConfirmCancel, Release
from .database import Transaction
from .errors import SchemaError, StorageError, StoreCopied
from .lifecycle import Task
from .models import OwnerEnd, TaskState
from .owners import Life, open_beside
from .queries import ALL_OPEN_OWNERS, OwnerRow

__all__ = [
    "BackupReport",
    "RestoreReport",
    "adopt",
    "back_up",
    "check_not_copied",
    "copy",
    "free_name",
    "made",
    "name",
    "restore",
]

STAMP = 1
"""The ``user_version`` of a copy; a store's own is 0."""

_PAGES = 1024
"""Pages copied between two looks at the time and two words of progress."""

_PATIENCE = 30.0

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
        StorageCorrupt: the copy does not hold what the file should; it is removed.
    """
    if target.exists() or target.is_symlink():
        raise StorageError(f"{target} exists: give a backup a name of its own, or move that away")
    with made(target) as making:
        database.probe(path)
        copy(path, making, progress=progress)
        report = _verified(making, target)
        name(making, target)
    return report


@contextmanager
def made(target: Path) -> Iterator[Path]:
    """
    Give a private file beside *target* to be filled; whatever happens, nothing is left of that under its own name.

    Raises:
        StorageError: it cannot be made, or written.
    """
    if not target.parent.is_dir():
        raise StorageError(f"the folder {target.parent} does not exist: create it first")
    making = Path(f"{target}-making")
    _remove(making)
    guards.create_private(making)
    try:
        yield making
    except sqlite3.Error as error:
        database.raise_translated(error, making)
    finally:
        _remove(making)


def _remove(making: Path) -> None:
    for left in (making, *database.side_files(making)):
        left.unlink(missing_ok=True)


def copy(path: Path, making: Path, *, stamp: int = STAMP, progress: Progress | None = None) -> None:
    """Copy a file as it is at one moment, through SQLite: a read transaction held for as long as it takes keeps it at that."""
    with closing(database.open_sqlite(path, "read")) as source, closing(sqlite3.connect(making)) as target:
        source.execute("BEGIN").fetchall()
        source.execute("SELECT count(*) FROM sqlite_schema").fetchall()

        def told(status: int, left: int, pages: int) -> None:
            if progress is not None:
                progress(pages - left, pages)

        source.backup(target, pages=_PAGES, progress=told, sleep=0.001)
        source.execute("ROLLBACK").fetchall()
        # a file alone, until it is opened as a store
        target.execute("PRAGMA journal_mode=DELETE").fetchall()
        target.execute(f"PRAGMA user_version={stamp:d}")
        target.execute("PRAGMA journal_mode=WAL").fetchall()


def _verified(making: Path, named: Path) -> BackupReport:
    """
    Read the whole of a copy once.

    Raises:
        StorageCorrupt: it is not whole.
    """
    with closing(sqlite3.connect(f"{making.as_uri()}?mode=ro", uri=True)) as connection:
        revision = database.read_revision(connection, named) or "none"
        database.check_whole(connection, named)
        has_tables = revision != "none"
        [tasks, events] = [
            connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] if has_tables else 0
            for name in ("tasks", "events")
        ]
    return BackupReport(path=named, revision=revision, bytes=making.stat().st_size, tasks=tasks, events=events)


def free_name(wanted: Path) -> Path:
    """Return a name that begins as *wanted* and that nothing has yet."""
    found, number = wanted, 1
    while found.exists() or found.is_symlink():
        number += 1
        found = Path(f"{wanted}-{number}")
    return found


def name(making: Path, target: Path) -> None:
    """Give what was made its name, unless something has it; durable on return."""
    _sync(making)
    try:
        os.link(making, target)
    except FileExistsError:
        raise StorageError(f"{target} exists: somebody made it meanwhile") from None
    making.unlink()
    guards.sync_folder(target.parent)


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

    The file goes on where the backup was made: its work is recovered when it is next opened. Blocks; for a thread.

    Raises:
        NotAStore, SchemaTooNew, StorageCorrupt: the backup is not one that can be used; nothing was changed.
        SchemaError: the file is open elsewhere; nothing was changed.
    """
    backup, path = guards.resolve(backup), guards.resolve(path)
    if not guards.check_target(backup, writing=False):
        raise StorageError(f"{backup} does not exist: check the path")
    if database.probe(backup) is None:
        raise StorageError(f"{backup} holds no store: check the path")
    if backup == path or (path.exists() and guards.identify(path) == guards.identify(backup)):
        raise StorageError(f"{backup} is the file itself: nothing to restore")
    is_there = guards.check_target(path, writing=True)
    kept: Path | None = None
    with guards.alone(path, _PATIENCE), made(path) as making:
        copy(backup, making, stamp=0, progress=progress)
        report = _verified(making, path)
        if is_there and database.has_content(path):
            kept = _put_aside(path)
        elif is_there:
            path.unlink()
        name(making, path)
    return RestoreReport(path=path, backup=backup, kept=kept, revision=report.revision, tasks=report.tasks)


def _put_aside(path: Path) -> Path:
    """Move a store that nobody has open out of the way, with all it has."""
    try:
        with closing(database.open_sqlite(path, "write")) as connection:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
            connection.execute("BEGIN EXCLUSIVE").fetchall()
            alive = [str(pid) for pid, life in open_beside(connection, path) if life is Life.ALIVE]
            if alive:
                raise SchemaError(
                    f"{path} is open in process {', '.join(alive)}: close it there first; nothing was changed"
                )
            connection.execute("COMMIT").fetchall()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as error:
        if database.primary_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise SchemaError(f"{path} is open elsewhere: close it there first; nothing was changed") from error
        if database.primary_code(error) not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            database.raise_translated(error, path)
        # what is damaged is what a restore is for
    kept = free_name(Path(f"{path}-replaced"))
    for suffix in ("", "-wal", "-journal"):
        if Path(f"{path}{suffix}").exists():
            Path(f"{path}{suffix}").rename(f"{kept}{suffix}")
    Path(f"{path}-shm").unlink(missing_ok=True)
    return kept
