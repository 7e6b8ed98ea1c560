"""
Owns what a program's own function may do in one of our transactions: its own tables, and nothing that ends or outlives it.

An authorizer (sqlite.org/c3ref/set_authorizer.html) refuses the rest while the statement is prepared. Two ways pass it by: a
statement that was prepared before, so guests' texts differ from ours, and a conflict clause that rolls back, so the connection is
asked after every statement whether it is still in the transaction.
"""

from __future__ import annotations

import inspect
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from .errors import InvalidArguments, StorageError, StoreError
from .schema import TRIGGERS, VERSION_TABLE, VIEWS, metadata
from .transaction import Transaction
from .translation import DRIVER_ERRORS, primary_code

__all__ = ["GuestError", "Rows", "TransactConnection", "guests_error", "run_guest"]

_OURS: Final = frozenset(
    {
        *metadata.tables,
        *(str(index.name) for table in metadata.tables.values() for index in table.indexes),
        *TRIGGERS,
        *VIEWS,
        VERSION_TABLE,
    }
)
"""Names that are the store's."""

_MARK: Final = "/* guest */ "

_WRITES: Final = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
_MADE: Final = frozenset(
    {sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_VIEW}
)
_MADE_ON: Final = frozenset(
    {
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_DROP_TRIGGER,
    }
)
_RESHAPING: Final = frozenset({sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_ALTER_TABLE})
_READS: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_REINDEX}
)
_HARMLESS_PRAGMAS: Final = frozenset(
    {
        "data_version",
        "page_size",
        "table_info",
        "table_xinfo",
        "table_list",
        "index_list",
        "index_info",
        "index_xinfo",
        "foreign_key_list",
    }
)
_MODULES: Final = frozenset({"fts3", "fts4", "fts5", "fts5vocab", "rtree", "geopoly"})
_UNSAFE_FUNCTIONS: Final = frozenset({"load_extension", "fts3_tokenizer", "writefile", "edit"})
_SCHEMA_TABLES: Final = frozenset({"sqlite_master", "sqlite_schema"})
_INTERNAL: Final = frozenset(
    {*_SCHEMA_TABLES, "sqlite_temp_master", "sqlite_temp_schema", "sqlite_sequence", "quick_check"}
)
"""What SQLite touches by itself when a table is dropped or altered."""


class GuestError(Exception):
    """Carries what a program's function raised out of our transaction, so that its class is not taken for one of ours."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(type(error)))
        self.error = error


def guests_error(error: BaseException | None) -> BaseException | None:
    """Return what a program's function is to blame for in an error of the writer: raised in it, or by its tables at COMMIT."""
    if isinstance(error, GuestError):
        return error.error
    cause = error.__cause__ if isinstance(error, StorageError) else None
    return cause if isinstance(cause, sqlite3.IntegrityError) else None


class Rows(Iterator[tuple[Any, ...]]):
    """What a statement gave, all of it: it stays readable after the transaction."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._rows = iter(cursor.fetchall())
        self.description = cursor.description
        self.lastrowid = cursor.lastrowid
        self.rowcount = cursor.rowcount

    def __next__(self) -> tuple[Any, ...]:
        return next(self._rows)

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, or None."""
        return next(self._rows, None)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows that are left."""
        return list(self._rows)


class TransactConnection:
    """
    The store's own connection, inside the transaction that stores a step or a result, for the time of one function.

    It runs SQL on tables of the program's own, reads everything, and refuses with `StoreError` whatever would change the store's
    tables, end the transaction, or outlive it (PRAGMA, ATTACH, temporary tables).
    """

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._raw = tx.connection
        self._thread = threading.get_ident()
        self._is_open = True
        self._refused: str | None = None
        self._reshaping = False
        self.storages_own: Exception | None = None
        self._changes = tx.connection.total_changes

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Rows:
        """Run one statement to its end and return its rows, as `sqlite3` would."""
        return self._run(lambda: self._raw.execute(_MARK + sql, parameters))

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any] | Mapping[str, Any]]) -> Rows:
        """Run one statement for each of many parameters."""
        rows = list(parameters)
        return self._run(lambda: self._raw.executemany(_MARK + sql, rows))

    def executescript(self, script: str) -> None:
        """Run several statements, one after the other, in the same transaction."""
        for statement in _statements(script):
            self.execute(statement)

    def _run(self, run: Callable[[], sqlite3.Cursor]) -> Rows:
        if not self._is_open or threading.get_ident() != self._thread:
            raise StoreError("this connection is for the function it was given to, on its thread, while it runs")
        self.check()
        self._refused, self._reshaping = None, False
        try:
            rows = Rows(run())
        except DRIVER_ERRORS as error:
            if primary_code(error) in _STORAGES_OWN and getattr(error, "sqlite_errorcode", 0) != _VIRTUAL_TABLE_CORRUPT:
                # the disk's trouble, not the function's: the writer knows what to do
                self.storages_own = error
                raise
            if not self._raw.in_transaction:
                raise StoreError(
                    f"the statement ended the store's transaction, which is refused ({error}): nothing of it was stored"
                ) from error
            if self._refused is not None:
                raise StoreError(f"{self._refused}: it works on tables of its own, and leaves the rest") from error
            raise
        self.check()
        return rows

    def check(self) -> None:
        """
        Make sure the transaction goes on: what came after its end would be stored by itself.

        Raises:
            StoreError: a statement has ended it.
        """
        if not self._raw.in_transaction:
            raise StoreError("a statement ended the store's transaction, which is refused: nothing of it was stored")

    def close(self) -> None:
        """Refuse everything from now on, and count what was written as pages to be checkpointed."""
        self._is_open = False
        self._tx.bytes += 200 * (self._raw.total_changes - self._changes)

    def authorize(self, action: int, one: str | None, two: str | None, database: str | None, source: str | None) -> int:
        """Say whether a statement may do one thing; what SQLite asks while it prepares it."""
        if self._may(action, one or "", two or "", database):
            if action in _RESHAPING:
                # what SQLite itself does to that end comes after it, in the same statement
                self._reshaping = True
            return sqlite3.SQLITE_OK
        self._refused = self._refused or (
            f"a function in a transaction of the store may not do this ({one or two or action})"
        )
        return sqlite3.SQLITE_DENY

    def _may(self, action: int, one: str, two: str, database: str | None) -> bool:
        if self._reshaping and one.lower() in _INTERNAL:
            return action in _WRITES or action in _READS or action == sqlite3.SQLITE_PRAGMA
        if action == sqlite3.SQLITE_ALTER_TABLE:
            # its database comes first, and in its place the column that goes
            return one == "main" and not _is_ours(two)
        if database not in {None, "main"}:
            return False
        if action in _READS:
            return True
        if action in _WRITES:
            # making a table writes the schema; by hand nobody can
            return one.lower() in _SCHEMA_TABLES or not _is_ours(one)
        if action in _MADE:
            return not _is_ours(one)
        if action in _MADE_ON:
            # a UNIQUE in a new table makes an index of SQLite's name
            return not _is_ours(two) and (not _is_ours(one) or one.startswith("sqlite_autoindex_"))
        if action == sqlite3.SQLITE_FUNCTION:
            return two.lower() not in _UNSAFE_FUNCTIONS
        if action == sqlite3.SQLITE_PRAGMA:
            return one.lower() in _HARMLESS_PRAGMAS
        if action in {sqlite3.SQLITE_CREATE_VTABLE, sqlite3.SQLITE_DROP_VTABLE}:
            return not _is_ours(one) and two.lower() in _MODULES
        return False


def _is_ours(name: str) -> bool:
    name = name.lower()
    return name in _OURS or name.startswith(("sqlite_", "lash_"))


def _statements(script: str) -> Iterator[str]:
    pending = ""
    for part in script.split(";"):
        pending += part
        if sqlite3.complete_statement(pending + ";"):
            if pending.strip():
                yield pending
            pending = ""
        else:
            pending += ";"
    if pending.strip(" \t\r\n;"):
        yield pending


def run_guest(tx: Transaction, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """
    Call ``fn(connection, *args)`` inside an open transaction, and return what it returns; a generator expression as a list.

    Raises:
        GuestError: what it raised, with the storage's own errors left as they are.
    """
    connection = TransactConnection(tx)
    shape = _shape(tx)
    tx.connection.set_authorizer(connection.authorize)
    try:
        try:
            result = fn(connection, *args, **kwargs)
            if inspect.isgenerator(result) and result.gi_code.co_name == "<genexpr>":
                # it is read as a list, and may use the connection only here
                result = [*result]
            if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
                # nothing of it has run
                if inspect.iscoroutine(result):
                    result.close()
                raise InvalidArguments(
                    f"{getattr(fn, '__name__', fn)!r} must be a plain function: it runs in a transaction"
                )
            connection.check()
        except BaseException as error:
            if error is connection.storages_own:
                raise
            raise GuestError(error) from error
        tx.connection.set_authorizer(None)
        # what fails while it is looked at is the storage's trouble, and none of the function's
        try:
            if _shape(tx) != shape:
                _check_shape(tx)
        except StoreError as error:
            raise GuestError(error) from error
        return result
    finally:
        tx.connection.set_authorizer(None)
        connection.close()


def _shape(tx: Transaction) -> int:
    """Return a number that changes with the schema."""
    return int(tx.connection.execute("PRAGMA schema_version").fetchall()[0][0])


_FOREIGN_KEYS: Final = """
SELECT own.name, key."table" FROM sqlite_schema AS own, pragma_foreign_key_list(own.name) AS key WHERE own.type = 'table'
"""


def _check_shape(tx: Transaction) -> None:
    """
    Look at what the authorizer is not asked about: where the keys of new tables lead, and what tables were renamed to.

    Raises:
        StoreError: a key into the store's tables, which would have their changes fail, or a name the store needs.
    """
    for own, parent in tx.connection.execute(_FOREIGN_KEYS).fetchall():
        if own not in metadata.tables and _is_ours(parent):
            raise StoreError(
                f"table {own!r} has a foreign key into the store's {parent!r}, whose changes it would hold up: "
                "keep the task's number or id in a plain column"
            )
    known = {*metadata.tables, VERSION_TABLE}
    for (name,) in tx.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        if name not in known and _is_ours(name) and not name.startswith("sqlite_"):
            raise StoreError(f"table {name!r} has a name that the store keeps for itself: choose another")


_STORAGES_OWN: Final = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    }
)
_VIRTUAL_TABLE_CORRUPT: Final = 267
"""SQLITE_CORRUPT_VTAB: what a virtual table says of its own, the file is whole."""
