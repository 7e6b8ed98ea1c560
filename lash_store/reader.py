"""Owns reading: a connection that only reads, and meets what passes by opening again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from . import guards
from .database import Connection, connect, open_sqlite
from .errors import StoreClosed
from .transaction import Transaction
from .translation import DRIVER_ERRORS, PASSING, is_not_utf8, primary_code, translate

__all__ = ["Reader", "data_version", "replacing"]

T = TypeVar("T")


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
            # a body that asks again and again must not keep the loop to itself
            await asyncio.sleep(0)
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
        self.check_life()
        if self._quick is None:
            self._quick = open_sqlite(self._path, "read")
        return self._quick.execute(sql).fetchall()[0][0]

    def check_life(self) -> None:
        """
        Refuse to be used where nothing would be answered.

        Raises:
            StoreClosed: not open, or in a forked child, or by a later event loop.
        """
        if self._connection is None:
            raise StoreClosed(f"the store on {self._path} is not open: use 'async with store:'")
        self._connection.check_life()

    async def has_changed(self) -> bool:
        """Say whether another connection committed since the last call; reads no table."""
        version = await self.run(data_version)
        changed, self._version = version != self._version, version
        return changed


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
