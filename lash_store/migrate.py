"""Owns the file's revision: current, head, upgrade and downgrade through Alembic's API, each in one transaction."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import additions, copies, database, guards, revisions, translation
from .errors import SchemaError, StorageCorrupt, StorageError
from .identity import HEAD
from .models import SchemaChange
from .owners import pids_beside
from .revisions import BASE, head

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = ["Willingness", "current", "downgrade", "head", "prepare", "transaction", "upgrade"]

log = logging.getLogger(__name__)

Willingness = Literal["auto", "refuse"]
"""What is done with an older file that is to be opened: it is upgraded, or refused."""

_PATIENCE = 30.0


def current(path: str | os.PathLike[str]) -> str | None:
    """Return the revision of the file, or None before the first; changes nothing."""
    return database.probe(guards.resolve(path))


def prepare(path: Path, willingness: Willingness = "auto", *, backup: bool = True) -> SchemaChange | None:
    """
    Make sure the file exists and is at head: born now, as it was, or upgraded; return what an upgrade did.

    Raises:
        NotAStore, SchemaTooNew, SchemaTooOld, StorageCorrupt: refused, with the file as it was.
    """
    if willingness == "refuse" and guards.check_target(path, writing=True) and database.has_content(path):
        database.refuse_older(database.probe(path), path, f"run: lash-store upgrade --db {shlex.quote(str(path))}")
    done = upgrade(path, backup=backup)
    database.keep_wal(path)
    # those beside it were made as it was until now
    for one in (path, *guards.side_files(path)):
        with suppress(FileNotFoundError):
            guards.make_private(one)
    return done


def make(path: Path, fill: Callable[[Path], None]) -> None:
    """
    Make a new file: born and filled under another name, then named, so that nobody ever sees half of it.

    A kill leaves nothing but a file that the next one to try removes.
    """
    with guards.alone(path, _PATIENCE):
        if database.has_content(path):
            return
        made = Path(f"{path}-making")
        try:
            for left in (made, *guards.side_files(made), *guards.side_files(path)):
                left.unlink(missing_ok=True)
            database.bear(made)
            fill(made)
            made.rename(path)
            guards.sync_folder(path.parent)
        except OSError as error:
            raise _unprepared(path, error) from error


def _unprepared(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be prepared: {error.strerror or error}")


def upgrade(path: str | os.PathLike[str], revision: str = "head", *, backup: bool = True) -> SchemaChange | None:
    """
    Bring the file to *revision* in one transaction; a crash leaves the old one. A file that is not there is made.

    Return what was done, None if the file is new or was there already. With *backup* the file from before is kept beside it, as
    ``<file>-<revision>.backup``.

    Raises:
        NotAStore, SchemaTooNew, StorageCorrupt: refused, with the file as it was.
        SchemaError: it is open elsewhere, in a process that an upgrade would break, or the revisions do not fit it.
    """
    path = guards.resolve(path)
    guards.check_target(path, writing=True)
    target = HEAD if revision == "head" else revision
    if not database.has_content(path):
        make(path, lambda made: _fill(made, target))
        return None
    if database.probe(path) == target:
        return None
    return _change(path, target, down=False, backup=backup)


def downgrade(path: str | os.PathLike[str], revision: str, *, backup: bool = True) -> SchemaChange | None:
    """
    Take the file back to *revision* in one transaction; ``base`` leaves a store without tables. See `upgrade`.

    What the older revision has no place for is lost: `rehearsal.losses` says what that is.
    """
    path = guards.resolve(path)
    if not guards.check_target(path, writing=True) or not database.has_content(path):
        raise SchemaError(f"{path} does not exist, or is empty: check the path")
    return _change(path, revision, down=True, backup=backup)


def _fill(made: Path, target: str) -> None:
    with transaction(made) as connection:
        revisions.bring(connection, target)


def _change(path: Path, target: str, *, down: bool, backup: bool) -> SchemaChange | None:
    begun = time.monotonic()
    with _one_transaction(path) as (raw, connection, revision):
        check_direction(path, revision, target, down=down)
        if (revision or BASE) == target:
            # somebody else has brought it there meanwhile
            return None
        _refuse_beside_owners(raw, path)
        kept: Path | None = None
        with copies.made(Path(f"{path}-backup")) as making:
            if backup and revision is not None:
                copies.copy(path, making)
            with _whole(raw, path, revision):
                revisions.bring(connection, target, down=down)
            if backup and revision is not None:
                # last of all, so that what is killed before leaves no copies behind
                kept = copies.free_name(Path(f"{path}-{revision}.backup"))
                copies.name(making, kept)
            try:
                raw.execute("COMMIT").fetchall()
            except BaseException:
                if kept is not None and raw.in_transaction:
                    kept.unlink(missing_ok=True)
                raise
    guards.make_private(path)
    seconds = time.monotonic() - begun
    after = None if target == BASE else target
    done = SchemaChange(from_revision=revision, to_revision=after, backup=kept, seconds=seconds)
    log.info("downgraded" if down else "upgraded", extra={"path": str(path), **done.model_dump(mode="json")})
    return done


def check_direction(path: Path, revision: str | None, target: str, *, down: bool) -> None:
    """
    Refuse to go up to an older revision, or down to a newer one.

    Raises:
        SchemaError: that, or one of them is unknown.
    """
    names = [BASE, *(script.revision for script in revisions.known())]
    if revision is not None and revision not in names:
        raise SchemaError(
            f"{path} is at revision {revision}, which this lash_store does not have: install the one that made it; "
            "nothing was changed"
        )
    here, there = names.index(revision or BASE), revisions.position(target)
    if here != there and (there < here) is not down:
        way, other = ("up", "an upgrade") if down else ("down", "a downgrade")
        raise SchemaError(
            f"{path} is at revision {revision or 'none'}, from which {target} is {way}: that is {other}; nothing was changed"
        )


@contextmanager
def transaction(path: Path) -> Iterator[Connection]:
    """
    Give an SQLAlchemy connection inside one ``BEGIN IMMEDIATE``, with Alembic's version table made; commit at the end.

    Raises:
        SchemaError: the file is open elsewhere, or the revisions left it unsound; nothing is committed.
        SchemaTooNew, NotAStore: the file is not one this package may change.
    """
    with _one_transaction(path) as (raw, connection, revision):
        _refuse_beside_owners(raw, path)
        with _whole(raw, path, revision):
            yield connection
        raw.execute("COMMIT").fetchall()


@contextmanager
def _one_transaction(path: Path) -> Iterator[tuple[sqlite3.Connection, Connection, str | None]]:
    """Give the driver's connection, SQLAlchemy's on it, and the file's revision, under the write lock; commit nothing."""
    import sqlalchemy.exc

    try:
        with closing(database.open_sqlite(path, "write")) as raw:
            # with foreign keys on, a revision that rebuilds a table would take the children with it
            raw.execute("PRAGMA foreign_keys=OFF").fetchall()
            with revisions.through_sqlalchemy(raw) as connection, connection.begin():
                # SQLAlchemy's side of the same transaction: Alembic then leaves the commit to us
                _begin(raw)
                revision = database.read_revision(raw, path)
                database.check_revision(revision, path)
                yield raw, connection, revision
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, path)
    except OSError as error:
        # the revisions are files, too
        raise _unprepared(path, error) from error
    except sqlalchemy.exc.DBAPIError as error:
        raise translation.translate(error.orig or error, path) from error


@contextmanager
def _whole(raw: sqlite3.Connection, path: Path, revision: str | None) -> Iterator[None]:
    """Hold what is done in between to the file's rules: what programs added works still, and no row or page is amiss."""
    raw.execute(revisions.MAKE_VERSION_TABLE).fetchall()
    try:
        with additions.set_aside(raw, revisions.shape(revision)):
            yield
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error
    amiss = database.amiss(raw)
    if amiss is None:
        return
    raw.execute("ROLLBACK").fetchall()
    if database.amiss(raw) is not None:
        raise StorageCorrupt(
            f"{path} was damaged before: {amiss}: restore a backup, or mend it first; nothing was changed"
        )
    raise SchemaError(f"{path}: the revision would leave it damaged: {amiss}; nothing was changed")


# --- under the lock -------------------------------------------------------------------------------------------------


def _refuse_beside_owners(raw: sqlite3.Connection, path: Path) -> None:
    # those that a copy names have its original open
    alive = [] if copies.is_copy(raw) else pids_beside(raw, path)
    if alive:
        raise SchemaError(
            f"{path} is open in process {', '.join(map(str, alive))}: close it there first; nothing was changed"
        )


def _begin(raw: sqlite3.Connection) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            raw.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if translation.primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
