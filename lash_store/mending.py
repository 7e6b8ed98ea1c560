"""Owns what can be mended in a file without losing anything, and what of it there is to mend; decides nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from . import database, guards, translation
from .copies import is_locked, stamp_of
from .errors import StorageError
from .owners import sweep
from .retention_queries import free_pages
from .schema import create_statements
from .transaction import Transaction

__all__ = ["MENDERS", "own_files", "stale_locks", "wrong_definitions"]


class _Definition(NamedTuple):
    kind: str
    sql: str


def _definitions() -> dict[str, _Definition]:
    """Return each index, trigger and view of a schema, by its name."""
    found = {}
    for sql in create_statements():
        _, kind, name, *_ = sql.replace("UNIQUE ", "", 1).split(maxsplit=3)
        if kind != "TABLE":
            found[name.strip('"')] = _Definition(kind, sql)
    return found


def wrong_definitions(connection: sqlite3.Connection) -> tuple[list[str], list[str]]:
    """Return the names of indexes, triggers and views that are missing, and of those that say something else than ours."""
    there = dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall())
    ours = _definitions()
    changed = [name for name, one in ours.items() if name in there and there[name].split() != one.sql.split()]
    return sorted(ours.keys() - there.keys()), sorted(changed)


def own_files(path: Path) -> tuple[Path, ...]:
    """Return the file and those that SQLite keeps beside it."""
    return (path, *guards.side_files(path))


def stale_locks(path: Path) -> list[Path]:
    """Return lock files of owners that the file does not name as open, which nobody holds."""
    try:
        with closing(database.open_sqlite(path, "read")) as connection:
            database.read_revision(connection, path)
            tokens = {row[0] for row in connection.execute("SELECT token FROM owners WHERE ended_at IS NULL")}
    except (*translation.DRIVER_ERRORS, StorageError, UnicodeDecodeError):
        # what cannot be asked names nobody
        return []
    folder = guards.side_folder(path)
    locks = sorted([*folder.glob("o-*.lock"), *folder.glob("o-*.new")])
    return [lock for lock in locks if lock.stem not in tokens and not is_locked(lock)]


_PAGES = 256
"""How many free pages one transaction gives back."""


def _give_back(path: Path) -> None:
    with _writing(path) as connection:
        before, left = None, -1
        while left not in {0, before}:
            before = left
            connection.execute("BEGIN IMMEDIATE").fetchall()
            left = free_pages(Transaction(connection, ""), _PAGES)
            connection.execute("COMMIT").fetchall()


@contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(database.open_sqlite(path, "write")) as connection:
        connection.execute("PRAGMA busy_timeout=5000").fetchall()
        yield connection


def _empty_wal(path: Path) -> None:
    """Copy the ``-wal`` into the file under the write lock, so that no commit runs beside it; then begin it anew."""
    with _writing(path) as connection, _writing(path) as checkpointer:
        connection.execute("PRAGMA journal_size_limit=0").fetchall()
        connection.execute("BEGIN IMMEDIATE").fetchall()
        [(_, pages, copied)] = checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        connection.execute("ROLLBACK").fetchall()
        if copied < pages:
            raise sqlite3.OperationalError("a reader or a writer is at it")
        connection.execute("BEGIN IMMEDIATE").fetchall()
        stamp = stamp_of(connection)
        # a commit that says nothing new is the first of the next -wal
        connection.execute(f"PRAGMA user_version={stamp:d}").fetchall()
        connection.execute("COMMIT").fetchall()


def _make_wal(path: Path) -> None:
    with _writing(path) as connection:
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise sqlite3.OperationalError("somebody has it open, or the file system has no WAL")


def _make_schema(path: Path) -> None:
    with _writing(path) as connection:
        connection.execute("BEGIN IMMEDIATE").fetchall()
        missing, changed = wrong_definitions(connection)
        ours = _definitions()
        for name in changed:
            connection.execute(f'DROP {ours[name].kind} "{name}"')
        for name in (*missing, *changed):
            connection.execute(ours[name].sql)
        connection.execute("COMMIT").fetchall()


def _make_private(path: Path) -> None:
    for one in own_files(path):
        with suppress(FileNotFoundError):
            guards.make_private(one)


def _sweep(path: Path) -> None:
    """Remove the lock files of owners that have ended, or that nobody knows; one that is held is left."""
    with _writing(path) as connection:
        # an owner makes its file before its row, and holds it from the first
        connection.execute("BEGIN IMMEDIATE").fetchall()
        sweep(path, [lock.stem for lock in stale_locks(path)])
        connection.execute("ROLLBACK").fetchall()


MENDERS: Mapping[str, Callable[[Path], None]] = {
    "permissions": _make_private,
    "schema_changed": _make_schema,
    "not_wal": _make_wal,
    "free_pages": _give_back,
    "long_wal": _empty_wal,
    "stale_locks": _sweep,
}
