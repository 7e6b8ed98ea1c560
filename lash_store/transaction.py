"""Owns one open transaction, as the layers above see it, and the events that it commits."""

from __future__ import annotations

import functools
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from .errors import StoreError
from .lifecycle import Task
from .policies import Limits

__all__ = ["LAST_SEQ", "Committed", "Transaction", "utc_text"]

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
