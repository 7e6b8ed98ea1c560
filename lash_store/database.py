"""Owns connections: how a file is born, identified and opened, and with which PRAGMAs. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast
from urllib.parse import quote

import aiosqlite

from . import guards
from .errors import NotAStore, SchemaTooNew, SchemaTooOld, StorageCorrupt, StorageError, StoreClosed
from .identity import APPLICATION_ID, HEAD, TABLES, VERSION_TABLE
from .translation import DRIVER_ERRORS, PASSING, primary_code, translate

__all__ = [
    "Connection",
    "Durability",
    "Mode",
    "amiss",
    "bear",
    "check_revision",
    "connect",
    "has_content",
    "is_alone",
    "keep_wal",
    "open_sqlite",
    "probe",
    "read_revision",
    "refuse_older",
]

T = TypeVar("T")
Durability = Literal["full", "normal"]
Mode = Literal["write", "read"]

_CACHE: Final = 16_000
"""KiB of pages the writer may keep in memory: what busy batches touch of the indexes over a long history."""
_WAL_LIMIT: Final = 64 * 1024 * 1024
_PATIENCE: Final = 5_000
"""Milliseconds a reader, and whoever opens, waits for SQLite's rare exclusive moments."""


# --- opening ----------------------------------------------------------------------------------------------------------


def _pragma(connection: sqlite3.Connection, name: str, value: object, expect: object = None) -> None:
    """Set a PRAGMA, read its answer to the end, and compare: an unread one once hid an I/O error."""
    connection.execute(f"PRAGMA {name}={value}").fetchall()
    found = connection.execute(f"PRAGMA {name}").fetchall()
    if found != [(value if expect is None else expect,)]:
        raise StorageError(f"PRAGMA {name} is {found!r}, not {value!r}: this SQLite or file system will not do")


@functools.cache
def _json_is_innocuous() -> bool:
    """
    Say whether this SQLite lets CHECKs call JSON functions under ``trusted_schema=OFF``.

    Builds from 3.38 to at least 3.40.1 call them unsafe, and would refuse every write of a row with a ``json_valid`` check. A
    writer then trusts the schema: it has no functions of its own that a hostile trigger could reach.
    """
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("PRAGMA trusted_schema=OFF").fetchall()
        connection.execute("CREATE TABLE probe (value TEXT CHECK (json_valid(value)))")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


def open_sqlite(path: Path, mode: Mode, durability: Durability = "full") -> sqlite3.Connection:
    """
    Open *path*, which must exist, with every PRAGMA of this package; the one place they stand in.

    Opening waits for a sibling that is closing the file or recovering its ``-wal``: both shut others out for a moment. Open, a
    writer waits for no lock by itself: the writer's own retry is fairer than SQLite's busy handler.

    Raises:
        StorageCorrupt: the file is empty beside a ``-wal`` with commits, which SQLite would remove, even to read.
        StorageError: it was open when this process was forked.
    """
    guards.check_not_inherited(path)
    has_content(path)
    access = "rw" if mode == "write" else "ro&immutable=1" if is_alone(path) else "ro"
    uri = f"file:{quote(str(path))}?mode={access}"
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=0, cached_statements=256
    )
    try:
        _pragma(connection, "busy_timeout", _PATIENCE)
        if mode == "read" or _json_is_innocuous():
            _pragma(connection, "trusted_schema", 0)
        _pragma(connection, "foreign_keys", 1)
        if mode == "read":
            _pragma(connection, "query_only", 1)
        else:
            _pragma(connection, "synchronous", 2 if durability == "full" else 1)
            _pragma(connection, "wal_autocheckpoint", 0)
            _pragma(connection, "cache_size", -_CACHE)
            connection.execute(f"PRAGMA journal_size_limit={_WAL_LIMIT}").fetchall()
            _pragma(connection, "busy_timeout", 0)
    except BaseException:
        connection.close()
        raise
    return connection


def is_alone(path: Path) -> bool:
    """
    Whether a file is a stopped one in a folder where nothing may be made.

    SQLite makes a ``-shm`` to read a file in WAL mode; this one it can only read as one that nobody changes.
    """
    wal, shm = Path(f"{path}-wal"), Path(f"{path}-shm")
    is_stopped = not shm.exists() and not (wal.exists() and wal.stat().st_size)
    return is_stopped and not os.access(path.parent, os.W_OK)


class Connection(aiosqlite.Connection):
    """
    An aiosqlite connection that runs a whole function in one hop to its thread.

    The thread is a daemon: an event loop that died without closing its store must not keep the process from ending.
    """

    def __init__(self, opener: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(opener, iter_chunk_size=64)
        self._pid, self._loop = os.getpid(), asyncio.get_running_loop()
        self._thread = threading.Thread(target=_serve, args=(self._tx,), name="lash_store connection", daemon=True)

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """
        Run *function* on the connection's own thread and return what it returns.

        Raises:
            StoreClosed: this is a child that was forked since, which has neither that thread nor the file's locks; or the event
                loop that it answers is closed.
        """
        self.check_life()
        return cast(T, await self._execute(lambda: function(self._conn)))  # type: ignore[no-untyped-call]

    def check_life(self) -> None:
        """Refuse to be used in a forked child, or by a later loop; see `run`."""
        if self._pid != os.getpid():
            raise StoreClosed(
                f"this store was opened by process {self._pid}, which forked: fork before a store is opened, or start a "
                "process anew, which opens a store of its own"
            )
        if self._loop.is_closed():
            raise StoreClosed(
                "the event loop that this store was opened in is closed: open it again, and take its sessions and handles from "
                "it anew"
            )

    @property
    def raw(self) -> sqlite3.Connection:
        """The driver's connection; to be used on this connection's own thread only."""
        return self._conn

    def reopen(self) -> sqlite3.Connection:
        """Open again and close what was open; if that fails, all is as it was. On the connection's own thread only."""
        opened: sqlite3.Connection = self._connector()
        if self._connection is not None:
            self._connection.close()
        self._connection = opened
        return opened


def _serve(queue: Any) -> None:
    # aiosqlite's worker cannot answer a loop that was closed without closing its store: nobody is left to hear it
    with contextlib.suppress(RuntimeError):
        aiosqlite.core._connection_worker_thread(queue)


async def connect(path: Path, mode: Mode, durability: Durability = "full") -> Connection:
    """
    Open *path* on a thread of its own.

    Raises:
        StorageError: it cannot be opened.
    """
    try:
        return cast(Connection, await Connection(lambda: open_sqlite(path, mode, durability)))
    except DRIVER_ERRORS as error:
        raise translate(error, path) from error


# --- what a file is ----------------------------------------------------------------------------------------------------


def read_revision(connection: sqlite3.Connection, path: Path) -> str | None:
    """
    Return the revision of the file under *connection*, or None for one of ours without tables.

    Raises:
        NotAStore: it is some other application's file.
        StorageCorrupt: its revision cannot be one, or something else stands where a table of the store should: a view can be
            one whose reading never ends.
    """
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    schema = connection.execute("SELECT name, type = 'table' AND rootpage > 0 FROM sqlite_schema").fetchall()
    names = {name for name, _ in schema}
    if found != APPLICATION_ID:
        raise NotAStore(f"{path} is another application's database (application_id {found}): nothing was changed")
    odd = sorted(name for name, is_table in schema if not is_table and str(name).lower() in TABLES)
    if odd:
        raise StorageCorrupt(
            f"{path} has something else where a table of the store should be ({', '.join(odd)}): somebody changed its "
            "schema by hand: restore a backup; nothing was changed"
        )
    if VERSION_TABLE not in names:
        return None
    row = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
    revision = None if row is None else str(row[0])
    if revision is not None and len(revision) > _LONGEST_REVISION:
        raise StorageCorrupt(
            f"{path} names a revision of {len(revision)} characters, which none has: restore a backup; nothing was changed"
        )
    return revision


_LONGEST_REVISION = 32
"""Characters for which Alembic makes room."""

_FEW = 5


def amiss(connection: sqlite3.Connection) -> str | None:
    """Read all of a file and return what is wrong with its pages, indexes and rows, the first few things, or None."""
    found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(3)").fetchall()]
    if found != ["ok"]:
        lines = [line for one in found for line in one.splitlines()]
        return "; ".join(lines[:_FEW]) + (f"; and {len(lines) - _FEW} more" if len(lines) > _FEW else "")
    orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
    some = ", ".join(f"{table} {row} without its {parent}" for table, row, parent, _ in orphans[:3])
    return f"{len(orphans)} rows without parents ({some})" if orphans else None


def check_revision(revision: str | None, path: Path) -> None:
    """
    Refuse a file this package is too old for.

    Raises:
        SchemaTooNew: the file's revision is not one this package knows.
    """
    if revision is not None and revision > HEAD:
        raise SchemaTooNew(
            f"{path} is at revision {revision}, this lash_store knows {HEAD}: upgrade the package; nothing was changed"
        )


def refuse_older(
    revision: str | None,
    path: Path,
    advice: str = "open it once with TaskStore to upgrade it, or run lash-store upgrade",
) -> None:
    """
    Refuse a file that is not at head, and say what to do.

    Raises:
        SchemaTooOld: it is older, or has nothing in it yet.
    """
    if revision is None and not has_content(path):
        raise SchemaTooOld(f"{path} is empty: check the path, or open it once with TaskStore to make a store of it")
    if revision != HEAD:
        raise SchemaTooOld(f"{path} is at revision {revision or 'none'}, this lash_store knows {HEAD}: {advice}")


def probe(path: Path) -> str | None:
    """
    Return the revision of *path*, None before the first, through a read-only connection: file and ``-wal`` stay as they are.

    Raises:
        NotAStore: not SQLite's, or another application's.
        SchemaTooNew: written by a newer lash_store.
        StorageCorrupt: damaged, also when it is opened again.
    """
    if not has_content(path):
        return None
    for again in (True, False):
        try:
            connection = open_sqlite(path, "read")
            try:
                revision = read_revision(connection, path)
            finally:
                connection.close()
        except DRIVER_ERRORS as error:
            if again and primary_code(error) in PASSING:
                continue
            raise translate(error, path) from error
        except UnicodeDecodeError as error:
            # SQLite's own words about damage have a part of that in them
            raise StorageCorrupt(f"{path}: the file is damaged: copy it away, then restore a backup") from error
        check_revision(revision, path)
        return revision
    raise AssertionError("unreachable")


def has_content(path: Path) -> bool:
    """
    Say whether *path* names a file with something in it.

    Raises:
        StorageCorrupt: it does not, beside a ``-wal`` that has: somebody took a database away from its last commits.
    """
    size = path.stat().st_size if path.exists() else 0
    wal = Path(f"{path}-wal")
    # SQLite takes a single byte for none, and removes the -wal of a file without any
    if size <= 1 and wal.exists() and wal.stat().st_size > 0:
        raise StorageCorrupt(
            f"{path} is missing or empty beside {wal.name}, which has commits: put it back, or restore a backup; "
            "nothing was changed"
        )
    return size > 0


def keep_wal(path: Path) -> None:
    """
    Put a file back into WAL mode that somebody, or a ``VACUUM INTO``, took out of it.

    Raises:
        StorageBusy: somebody else has it open now.
    """
    try:
        with contextlib.closing(open_sqlite(path, "read")) as connection:
            if connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]:
                return
        with contextlib.closing(open_sqlite(path, "write")) as connection:
            _pragma(connection, "busy_timeout", _PATIENCE)
            _pragma(connection, "journal_mode", "wal")
    except DRIVER_ERRORS as error:
        raise translate(error, path) from error


def bear(path: Path) -> None:
    """
    Make *path* a new file of ours, without tables, in WAL mode.

    The order is the file format's: ``auto_vacuum``, then ``application_id``, then WAL; later the first is silently ignored.
    Nobody else may know the path yet: no busy handler covers the conversion to WAL, and a kill in it leaves a journal.

    Raises:
        StorageError: the folder may not be written, or the file system has no WAL.
    """
    guards.create_private(path)
    try:
        connection = open_sqlite(path, "write")
        try:
            _pragma(connection, "auto_vacuum", 2)
            _pragma(connection, "application_id", APPLICATION_ID)
            _pragma(connection, "journal_mode", "wal")
        finally:
            connection.close()
    except DRIVER_ERRORS as error:
        raise translate(error, path) from error
