"""Owns what the driver's errors are called here, and what each means for whoever was refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from . import guards
from .errors import (
    CommitInDoubt,
    NotAStore,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageMoved,
    StoreError,
)

__all__ = [
    "DRIVER_ERRORS",
    "PASSING",
    "is_damage",
    "is_not_utf8",
    "may_pass",
    "primary_code",
    "raise_translated",
    "translate",
]

_NAMED: Final[Mapping[int, tuple[type[StorageError], str]]] = {
    sqlite3.SQLITE_BUSY: (StorageBusy, "another process holds the write lock; try again, or see who has the file open"),
    sqlite3.SQLITE_LOCKED: (StorageBusy, "the file is locked; try again"),
    sqlite3.SQLITE_PROTOCOL: (StorageBusy, "the file's locks did not settle; try again"),
    sqlite3.SQLITE_FULL: (StorageFull, "the disk or its quota is full: make room, then go on; nothing was written"),
    sqlite3.SQLITE_CORRUPT: (StorageCorrupt, "the file is damaged: copy it away, then restore a backup"),
    sqlite3.SQLITE_NOTADB: (NotAStore, "the file is not an SQLite database: give the path of a store, or of no file"),
    sqlite3.SQLITE_IOERR: (StorageError, "the disk reported an error: see the system's log"),
    sqlite3.SQLITE_CANTOPEN: (StorageError, "the file or its folder cannot be opened: check path and permissions"),
    sqlite3.SQLITE_READONLY: (StorageError, "the file or its folder may not be written: check the permissions"),
    sqlite3.SQLITE_PERM: (StorageError, "the file may not be opened: check the permissions"),
    sqlite3.SQLITE_NOMEM: (StorageError, "there is not enough memory: make room, then try again"),
}


DRIVER_ERRORS: Final = (sqlite3.Error, MemoryError)
"""What the driver raises: that SQLite had no memory it tells by Python's own error, without a code."""

PASSING: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOTADB})
"""A passing read error can surface as any of these: the file is opened again before they are believed."""


def primary_code(error: BaseException) -> int | None:
    """Return SQLite's primary result code of a driver error, or None."""
    if isinstance(error, MemoryError):
        return sqlite3.SQLITE_NOMEM
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def may_pass(error: StoreError) -> bool:
    """Say whether what the storage refused may go another time: the disk had no room, or trouble of its own."""
    if isinstance(error, CommitInDoubt | StorageMoved):
        return False
    if isinstance(error, StorageFull | StorageBusy):
        return True
    code = None if error.__cause__ is None else primary_code(error.__cause__)
    return isinstance(error, StorageError) and code not in {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT}


def is_damage(error: StoreError) -> bool:
    """Say whether it is the file that takes no more until somebody mends it: damaged, or with a counter at its end."""
    return isinstance(error, StorageCorrupt) or isinstance(error.__cause__, OverflowError)


def translate(error: BaseException, path: Path) -> StoreError:
    """Name a driver error in this package's words; raise the answer ``from`` the error."""
    if isinstance(error, StoreError):
        return error
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_DBMOVED:
        return StorageMoved(f"{path} was moved or removed while it was open: put it back and open the store again")
    code = primary_code(error) or 0
    kind, advice = _NAMED.get(code, (StorageError, "SQLite refused"))
    links = [one.name for one in guards.side_files(path) if one.is_symlink()]
    if code == sqlite3.SQLITE_CANTOPEN and links:
        advice = (
            f"where SQLite has a file of its own, there is a link: see what it names, and remove {', '.join(links)}"
        )
    return kind(f"{path}: {advice} ({error})")


def raise_translated(error: BaseException, path: Path) -> NoReturn:
    """Raise *error* in this package's words, from itself."""
    raise translate(error, path) from error


def is_not_utf8(error: BaseException) -> bool:
    """Whether a read failed because somebody's hand put text into a row that is not UTF-8."""
    return isinstance(error, sqlite3.OperationalError) and "decode to UTF-8" in str(error)
