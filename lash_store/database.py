"""Owns connections: how a file is born, identified, opened and read, and how the driver's errors are named. Decides nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import quote

import aiosqlite

from . import guards
from .errors import (
    CommitInDoubt,
    NotAStore,
    SchemaTooNew,
    SchemaTooOld,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageMoved,
    StoreClosed,
    StoreError,
)
from .identity import APPLICATION_ID, HEAD, TABLES, VERSION_TABLE
from .lifecycle import Task
from .policies import Limits

__all__ = [
    "DRIVER_ERRORS",
    "Committed",
    "Connection",
    "Durability",
    "Transaction",
    "bear",
    "connect",
    "open_sqlite",
    "probe",
    "translate",
]

T = TypeVar("T")
Durability = Literal["full", "normal"]
Mode = Literal["write", "read"]

_CACHE: Final = 16_000
"""KiB of pages the writer may keep in memory: what busy batches touch of the indexes over a long history."""
_WAL_LIMIT: Final = 64 * 1024 * 1024
_PATIENCE: Final = 5_000
"""Milliseconds a reader, and whoever opens, waits for SQLite's rare exclusive moments."""


# --- errors ---------------------------------------------------------------------------------------------------------

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
    links = [one.name for one in side_files(path) if one.is_symlink()]
    if code == sqlite3.SQLITE_CANTOPEN and links:
        advice = (
            f"where SQLite has a file of its own, there is a link: see what it names, and remove {', '.join(links)}"
        )
    return kind(f"{path}: {advice} ({error})")


# --- opening --------------------------------------------------------------------------------------------------------


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
    """
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
        self._pid = os.getpid()
        self._thread = threading.Thread(target=_serve, args=(self._tx,), name="lash_store connection", daemon=True)

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """
        Run *function* on the connection's own thread and return what it returns.

        Raises:
            StoreClosed: this is a child that was forked since; it has neither that thread nor the file's locks.
        """
        self.check_process()
        return cast(T, await self._execute(lambda: function(self._conn)))  # type: ignore[no-untyped-call]

    def check_process(self) -> None:
        """Refuse to be used in a forked child; see `run`."""
        if self._pid != os.getpid():
            raise StoreClosed(
                f"this store was opened by process {self._pid}, which forked: a child opens a store of its own"
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


class Reader:
    """
    A connection that only reads, and keeps the file's guard as long as it is open.

    A passing disk error, which can look like corruption, is met by opening again once; text that is not UTF-8, in a row edited by
    hand, by reading it with replacement characters.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: Connection | None = None
        self._quick: sqlite3.Connection | None = None
        self._identity: guards.FileIdentity | None = None
        self._version = -1

    async def open(self) -> None:
        """
        Open the connection.

        Raises:
            StorageError: it cannot be opened.
        """
        self._connection = await connect(self._path, "read")
        try:
            self._identity = guards.hold(self._path)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the connection; what was asked for before is answered."""
        connection, self._connection = self._connection, None
        quick, self._quick = self._quick, None
        identity, self._identity = self._identity, None
        if quick is not None:
            quick.close()
        if connection is not None:
            await connection.close()
        if identity is not None:
            guards.let_go(identity)

    async def rows(self, sql: str, parameters: Mapping[str, Any]) -> list[Any]:
        """
        Return every row of one statement.

        Raises:
            StoreClosed: not open.
            StorageError: the file cannot be read.
        """
        return await self.run(lambda raw: raw.execute(sql, parameters).fetchall())

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function of the connection on its thread, in one hop; see `rows`."""
        connection = self._connection
        if connection is None:
            raise StoreClosed(f"the store on {self._path} is not open: use 'async with store:'")

        def guarded(raw: sqlite3.Connection) -> T:
            if raw.in_transaction:
                # an earlier read could not end: what is read in it is what was true then
                raw = connection.reopen()
            try:
                return function(raw)
            except DRIVER_ERRORS as error:
                if is_not_utf8(error):
                    return _with_replacements(raw, function)
                if primary_code(error) not in PASSING:
                    raise
                return function(connection.reopen())

        try:
            return await connection.run(guarded)
        except DRIVER_ERRORS as error:
            raise translate(error, self._path) from error

    async def look(self, function: Callable[[Transaction], T]) -> T:
        """Run a function of a transaction that only reads, on one state of the file; see `rows`."""

        def read(raw: sqlite3.Connection) -> T:
            try:
                raw.execute("BEGIN").fetchall()
                return function(Transaction(raw, ""))
            finally:
                if raw.in_transaction:
                    raw.execute("ROLLBACK").fetchall()

        return await self.run(read)

    def at_once(self, sql: str) -> Any:
        """
        Return the one value of a statement that is quickly answered, on the caller's thread.

        It has a connection of its own, opened when it is first needed: the other may be in the middle of a read, which sees an
        older state.

        Raises:
            sqlite3.Error, MemoryError: it could not be read just now.
            StoreClosed: not open.
        """
        if self._connection is None:
            raise StoreClosed(f"the store on {self._path} is not open: use 'async with store:'")
        self._connection.check_process()
        if self._quick is None:
            self._quick = open_sqlite(self._path, "read")
        return self._quick.execute(sql).fetchall()[0][0]

    async def has_changed(self) -> bool:
        """Say whether another connection committed since the last call; reads no table."""
        version = await self.run(data_version)
        changed, self._version = version != self._version, version
        return changed


def is_not_utf8(error: BaseException) -> bool:
    """Whether a read failed because somebody's hand put text into a row that is not UTF-8."""
    return isinstance(error, sqlite3.OperationalError) and "decode to UTF-8" in str(error)


def replacing(text: bytes) -> str:
    """A text factory that reads everything, for those rows."""
    return text.decode("utf-8", "replace")


def _with_replacements(raw: sqlite3.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    raw.text_factory = replacing
    try:
        return function(raw)
    finally:
        raw.text_factory = str


def data_version(raw: sqlite3.Connection) -> int:
    """Return a number that changes when another connection than *raw* commits; reads no table."""
    return int(raw.execute("PRAGMA data_version").fetchone()[0])


# --- what a file is -------------------------------------------------------------------------------------------------


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


# --- a transaction, as the layers above see it ----------------------------------------------------------------------


LAST_SEQ: Final = (
    "SELECT max(coalesce((SELECT CAST(seq AS INTEGER) FROM sqlite_sequence WHERE name = 'events'), 0), "
    "coalesce((SELECT max(seq) FROM events), 0))"
)
"""
The newest event there ever was: it may have been pruned since. Where somebody's hand set the counter back, the newest there is:
who follows events would else never come to the end of them.
"""


class Committed(NamedTuple):
    """
    An event as its transaction wrote it, with the task's row after it.

    ``local`` never reaches the file: it carries what the runner needs beside the row, a checkpoint's text or a coroutine.
    """

    seq: int
    task_seq: int | None
    scope: str
    from_scope: str | None
    task_id: str | None
    attempt: int | None
    type: str
    at: str
    data: str
    task: Task | None = None
    local: Any = None


class Transaction:
    """
    One open transaction: what a unit reads and writes through. Made by the writer alone, and only for as long as it is open.

    ``now`` is the time of everything in it (UTC text); ``events`` is what happened so far, written all at once before COMMIT;
    ``bytes`` how much payload. ``forbidden`` says why its owner may not take work on any more, if it may not; ``limits`` how
    much a session may hold.
    """

    __slots__ = ("_last_seq", "bytes", "connection", "events", "forbidden", "limits", "now")

    def __init__(self, connection: sqlite3.Connection, now: str, limits: Limits | None = None) -> None:
        self.connection = connection
        self.now = now
        self.limits = limits
        self.events: list[Committed] = []
        self.bytes = 0
        self.forbidden: StoreError | None = None
        self._last_seq: int | None = None

    @property
    def next_seq(self) -> int:
        """The ``seq`` of the next event: the write lock is ours, so nobody else can take it."""
        if self._last_seq is None:
            self._last_seq = int(self.connection.execute(LAST_SEQ).fetchone()[0])
        return self._last_seq + len(self.events) + 1

    def insert(self, sql: str, parameters: Sequence[Any]) -> int:
        """Insert one row and return its rowid."""
        row_id = self.connection.execute(sql, parameters).lastrowid
        assert row_id is not None
        return row_id

    def one(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any]) -> Any | None:
        """Run a statement to its end and return its only row, or None."""
        rows = self.connection.execute(sql, parameters).fetchall()
        return rows[0] if rows else None

    def all(self, sql: str, parameters: Mapping[str, Any]) -> list[Any]:
        """Run a statement and return all its rows."""
        return self.connection.execute(sql, parameters).fetchall()


def utc_text(seconds: float) -> str:
    """Write a time as this file does: UTC, ISO 8601, fixed width, milliseconds."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{_whole_second(whole)}.{thousandths:03d}Z"


@functools.lru_cache(maxsize=4)
def _whole_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def raise_translated(error: BaseException, path: Path) -> NoReturn:
    """Raise *error* in this package's words, from itself."""
    raise translate(error, path) from error


def side_files(path: Path) -> tuple[Path, ...]:
    """Return the files SQLite keeps beside *path*."""
    return tuple(Path(f"{path}{suffix}") for suffix in ("-wal", "-shm", "-journal"))
