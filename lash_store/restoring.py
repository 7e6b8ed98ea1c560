"""
Owns putting a backup back: in one transaction into what is there, or in the place of what is damaged.

A ``-wal`` is not tied to its file: SQLite reads it into whatever stands beside it. So no file is put where one with commits is.
"""

from __future__ import annotations

import glob
import os
import sqlite3
import time
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from . import database, guards, queries, translation
from .copies import (
    PAGES,
    STAMP,
    Progress,
    copy,
    free_name,
    is_locked,
    made,
    name,
    pour,
    sync,
    verified,
    with_commits,
)
from .errors import NotAStore, SchemaError, StorageCorrupt, StorageError
from .identity import VERSION_TABLE
from .models import OwnerEnd
from .owners import Life, life_of, open_owners
from .transaction import Transaction, utc_text

__all__ = ["RestoreReport", "restore"]

_PATIENCE = 30.0

_PASSING_READER = 2_000
"""Milliseconds that a restore waits for who only looks at the file."""


class RestoreReport(BaseModel):
    """A file that was put back: where, from which *backup*, and where what was there before is *kept* (None: nothing was)."""

    model_config = ConfigDict(frozen=True)

    path: Path
    backup: Path
    kept: Path | None
    revision: str
    tasks: int


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
    if guards.check_target(path, writing=False) and path.stat().st_size > 0:
        _refuse_foreign(path)
    try:
        with guards.alone(path, _PATIENCE):
            _undo_half(path)
            is_there = guards.check_target(path, writing=True) and path.stat().st_size > 0
            _refuse_beside(path)
            with made(path) as making:
                copy(backup, making, stamp=0, progress=progress)
                report = verified(making, backup)
                kept = _replace(making, path) if is_there else None
                if kept is None:
                    with closing(sqlite3.connect(making)) as connection:
                        _forget_owners(connection, path, ())
                    sync(making)
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
    if database.probe(backup) is None:
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
        with (
            suppress(*translation.DRIVER_ERRORS, UnicodeDecodeError),
            closing(database.open_sqlite(path, "read")) as connection,
        ):
            # of a copy the same owner may be alive, in this process, beside its original
            here = [
                one
                for one in open_owners(connection)
                if life_of(path, one) is Life.ALIVE and (folder / f"{one.token}.lock").exists()
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
    for side in guards.side_files(path):
        if side.is_symlink():
            # SQLite follows none there: it is nobody's, and hinders whoever opens the file next
            side.unlink()
    try:
        with closing(database.open_sqlite(path, "write")) as target, closing(sqlite3.connect(making)) as source:
            target.execute(f"PRAGMA busy_timeout={_PASSING_READER}").fetchall()
            # nobody else comes in from here to the close
            target.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
            target.execute("BEGIN EXCLUSIVE").fetchall()
            if not _is_ours(target, path):
                return None
            _forget_owners(source, path, _ended(target))
            _go_on_counting(source, target)
            target.execute("COMMIT").fetchall()
            if _page_size(source) != _page_size(target):
                return None
            kept = free_name(Path(f"{path}-replaced"))
            with made(kept) as keeping:
                pour(target, keeping, STAMP)
                name(keeping, kept)
            source.backup(target, pages=PAGES, sleep=0.001)
            is_done = True
            target.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except (*translation.DRIVER_ERRORS, UnicodeDecodeError) as error:
        code = translation.primary_code(error)
        if is_done:
            # it is in the -wal: whoever opens the file next does the rest
            return kept
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise SchemaError(f"{path} is open elsewhere: close it there first; nothing was changed") from error
        if code not in _DAMAGE:
            translation.raise_translated(error, path)
        return None
    finally:
        if kept is not None and not is_done:
            kept.unlink(missing_ok=True)
    return kept


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, None}
"""What SQLite says of a damaged file; None: its words about that could not be read."""


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """
    Say whether what is to be replaced is a store; one that has lost its mark, or a table, is not, but is damaged.

    Raises:
        NotAStore: it is another application's file.
    """
    try:
        database.read_revision(connection, path)
    except NotAStore:
        if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (VERSION_TABLE,)).fetchall():
            return False
        raise
    except StorageCorrupt:
        return False
    return True


def _refuse_foreign(path: Path) -> None:
    """Refuse another application's file, before anything is made beside it; see `_is_ours`."""
    with (
        suppress(*translation.DRIVER_ERRORS, UnicodeDecodeError),
        closing(database.open_sqlite(path, "read")) as connection,
    ):
        _is_ours(connection, path)


def _page_size(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA page_size").fetchone()[0])


def _ended(connection: sqlite3.Connection) -> set[str]:
    """Return the tokens of the owners that a file names as ended."""
    if not connection.execute(
        "SELECT 1 FROM sqlite_schema WHERE name = 'owners' AND type = 'table' AND rootpage > 0"
    ).fetchall():
        return set()
    return {token for (token,) in connection.execute("SELECT token FROM owners WHERE ended_at IS NOT NULL")}


def _forget_owners(connection: sqlite3.Connection, path: Path, ended: Collection[str]) -> None:
    """
    End the owners that were open when the backup was made, and have closed since: their process may live on, but not they.

    *ended* are those that the file itself names so.
    """
    tx = Transaction(connection, utc_text(time.time()))
    for owner in open_owners(connection):
        if owner.token in ended or life_of(path, owner) is Life.DEAD:
            queries.end_owner(tx, owner.owner_id, OwnerEnd.DIED)
    connection.commit()


def _go_on_counting(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Have what is put back give no number that what it replaces has given: whoever keeps one must not meet another's task."""
    counted = "SELECT name, seq FROM sqlite_sequence WHERE typeof(seq) = 'integer' AND seq BETWEEN 1 AND ?"
    with suppress(sqlite3.OperationalError):
        # a file of the first revision before its first row has none
        for name, seq in target.execute(counted, (_NO_COUNTER,)).fetchall():
            source.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (seq, name))
            source.execute(
                "INSERT INTO sqlite_sequence SELECT name, ? FROM sqlite_schema WHERE type = 'table' AND name = ? "
                "AND name NOT IN (SELECT name FROM sqlite_sequence)",
                (seq, name),
            )
    source.commit()


_NO_COUNTER = 2**60
"""What no file comes to by counting: a hand wrote that."""


# --- in the place of what is damaged, or of nothing -----------------------------------------------------------------


def _put_aside(path: Path) -> Path | None:
    """
    Give what is there, if anything is, a second name with all that SQLite keeps beside it; return that.

    Then nothing stands beside *path* that SQLite would read as commits of what is put there next, nor does after a power cut. A
    damaged file keeps its name until then, for without any file the next program would begin a new one.
    """
    kept = free_name(Path(f"{path}-replaced"))
    found = [*with_commits(path), *([path] if path.exists() else [])]
    for one in found:
        os.link(one, f"{kept}{one.name.removeprefix(path.name)}")
    guards.sync_folder(path.parent)
    for side in guards.side_files(path):
        side.unlink(missing_ok=True)
    # a disk may keep a later name and forget that an earlier one went: the old -wal would be read into the new file
    guards.sync_folder(path.parent)
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
        # the name by which the next one to try knows that there is something to undo goes once that is done for good
        guards.sync_folder(path.parent)
        kept.unlink()
