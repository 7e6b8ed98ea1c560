"""
Owns every transaction: one queue, first in first out, many units a commit, one hop to the connection's thread a batch.

A caller holds a future and nothing else, so cancelling it neither undoes nor repeats what it asked for.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import guards, queries
from .database import (
    PASSING,
    Committed,
    Connection,
    Durability,
    Transaction,
    connect,
    data_version,
    open_sqlite,
    primary_code,
    translate,
    utc_text,
)
from .errors import CommitInDoubt, StorageBusy, StorageError, StorageMoved, StoreClosed, StoreError

__all__ = ["Unit", "Writer"]

T = TypeVar("T")
Unit = Callable[[Transaction], T]
"""A synchronous function of an open transaction, free of other effects: it may run twice."""

log = logging.getLogger(__name__)

_MOST = 256
"""Units in one commit: enough to hide the fsync, few enough that nobody waits long for the lock."""

_CHECKPOINT_PAGES = 4_000
"""About how many pages may pile up in the ``-wal`` before they are copied into the file."""

_PAGE = 4_096

_CLOSING_PATIENCE = 1.0
"""Seconds a closing store waits for the lock of its last checkpoint; the next opener can do it as well."""


@dataclass(slots=True)
class _Job(Generic[T]):
    unit: Unit[T]
    future: asyncio.Future[T]


@dataclass(slots=True)
class _Batch:
    """What became of the units of one hop, in their order: a result, or the error that names why not."""

    results: list[Any] = field(default_factory=list)
    errors: dict[int, BaseException] = field(default_factory=dict)
    events: list[Committed] = field(default_factory=list)
    fatal: StorageError | None = None


class _Lost(Exception):
    """The whole transaction is gone: *guilty* is the unit that did it, *cause* what SQLite said."""

    def __init__(self, guilty: int, cause: Exception) -> None:
        self.guilty = guilty
        self.cause = cause


class Writer:
    """
    Commits units in the order they came, and tells *on_commit* before any caller is answered.

    *patience* is how many seconds a batch waits for another process's write lock.
    """

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        patience: float,
        on_commit: Callable[[Sequence[Committed]], None],
        on_fatal: Callable[[StorageError], None],
    ) -> None:
        self._path = path
        self._durability = durability
        self._patience = patience
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._queue: deque[_Job[Any]] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._fatal: StorageError | None = None
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._identity: guards.FileIdentity | None = None
        self._checkpointer: sqlite3.Connection | None = None
        self._unchecked_pages = 0.0
        self._foreign_version = -1
        self._foreign_seen = False
        self._is_busy = False

    # --- life ---

    async def open(self) -> None:
        """
        Open the connection and start committing.

        Raises:
            StorageError: the file cannot be opened for writing.
        """
        self._connection = await connect(self._path, "write", self._durability)
        try:
            self._identity = guards.hold(self._path)
            self._foreign_version = await self._connection.run(data_version)
        except BaseException:
            await self._close_connection()
            raise
        self._task = asyncio.create_task(self._work(), name="lash_store writer")

    async def close(self) -> None:
        """Commit what was asked for so far, checkpoint, and close the file."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        await self._close_connection()

    async def _close_connection(self) -> None:
        connection, identity = self._connection, self._identity
        self._identity = None
        if connection is not None:
            try:
                if identity is not None and self._fatal is None and guards.identify(self._path) == identity:
                    await connection.run(lambda raw: self._last_checkpoint(raw, identity))
            except (sqlite3.Error, StoreError):
                log.warning("checkpoint_failed", exc_info=True)
            finally:
                self._connection = None
                await connection.close()
        if identity is not None:
            guards.let_go(identity)

    def _last_checkpoint(self, raw: sqlite3.Connection, identity: guards.FileIdentity) -> None:
        try:
            self._checkpoint(_CLOSING_PATIENCE)
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None
        # under the guard nobody can remove the -wal at the last close of this process: leave it empty
        if guards.is_last(identity):
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # --- asking ---

    def submit(self, unit: Unit[T]) -> asyncio.Future[T]:
        """
        Queue a unit. The future resolves once its commit is in the file; cancelling it changes nothing in the file.

        Raises:
            StoreClosed, StorageError: the writer has stopped.
        """
        if self._fatal is not None:
            raise self._fatal
        if self._closing or self._task is None:
            raise StoreClosed(f"the store on {self._path} is closed: open it again")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Job(unit, future))
        self._wake.set()
        return future

    async def run(self, unit: Unit[T]) -> T:
        """Queue a unit and wait for its commit; return what it returned."""
        return await self.submit(unit)

    async def foreign_commits(self) -> bool:
        """
        Say whether another connection committed since the last call; reads no table.

        An idle connection is asked from here, without a hop: a thousand sleeping tasks should cost nothing.
        """
        if self._connection is None or self._fatal is not None:
            return False
        if not self._is_busy:
            self._look_for_foreign(self._raw)
        seen, self._foreign_seen = self._foreign_seen, False
        return seen

    def _look_for_foreign(self, raw: sqlite3.Connection) -> None:
        try:
            version = data_version(raw)
        except sqlite3.OperationalError as error:
            if primary_code(error) not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise translate(error, self._path) from error
            return
        if version != self._foreign_version:
            self._foreign_version = version
            self._foreign_seen = True

    # --- working, on the loop ---

    async def _work(self) -> None:
        connection = self._connection
        assert connection is not None
        jobs: list[_Job[Any]] = []
        try:
            while self._queue or not self._closing:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                jobs = [self._queue.popleft() for _ in range(min(len(self._queue), _MOST))]
                units = [job.unit for job in jobs]
                self._is_busy = True
                batch = await connection.run(lambda _, units=units: self._commit(units))  # type: ignore[misc]
                self._is_busy = False
                self._answer(jobs, batch)
        except BaseException as error:
            # only a loop that is being torn down, or a bug of ours, gets here: nobody may be left waiting
            stopped = CommitInDoubt(f"{self._path}: the writer stopped ({error!r}): open the store again and look")
            stopped.__cause__ = error
            self._queue.extendleft(reversed(jobs))
            self._stop(stopped)
            if not isinstance(error, Exception):
                raise
            log.exception("writer_stopped")

    def _answer(self, jobs: Sequence[_Job[Any]], batch: _Batch) -> None:
        if batch.events:
            try:
                self._on_commit(batch.events)
            except Exception:
                log.exception("reaction_failed")
        for index, (job, result) in enumerate(zip(jobs, batch.results, strict=True)):
            if job.future.done():
                continue
            error = batch.errors.get(index)
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
        if batch.fatal is not None:
            self._stop(batch.fatal)

    def _stop(self, error: StorageError) -> None:
        self._fatal = error
        self._closing = True
        while self._queue:
            future = self._queue.popleft().future
            if not future.done():
                future.set_exception(error)
        self._on_fatal(error)

    # --- working, on the connection's thread ---

    def _commit(self, units: Sequence[Unit[Any]]) -> _Batch:
        """Commit *units* together; if one of them loses the whole transaction, each by itself."""
        everything = range(len(units))
        batch = _Batch(results=[None] * len(units))
        try:
            self._commit_together(units, everything, batch)
        except _Lost as lost:
            self._commit_apart(units, lost, batch)
        if self._unchecked_pages >= _CHECKPOINT_PAGES and batch.fatal is None:
            try:
                self._checkpoint(self._patience)
            except (sqlite3.Error, StoreError):
                log.warning("checkpoint_failed", exc_info=True)
        return batch

    def _commit_apart(self, units: Sequence[Unit[Any]], lost: _Lost, batch: _Batch) -> None:
        """One transaction a unit, from the start; the guilty one fails, unless opening the file again may cure it."""
        again = set(range(len(units)))
        if primary_code(lost.cause) in PASSING:
            self._reopen()
        else:
            again.remove(lost.guilty)
            batch.errors[lost.guilty] = _named(lost.cause, self._path)
        for index in sorted(again):
            if batch.fatal is not None:
                batch.errors[index] = batch.fatal
                continue
            try:
                self._commit_together(units, [index], batch)
            except _Lost as lost_alone:
                batch.errors[index] = _named(lost_alone.cause, self._path)

    def _commit_together(self, units: Sequence[Unit[Any]], chosen: Sequence[int], batch: _Batch) -> None:
        """
        One transaction: a savepoint a unit, then COMMIT; *batch* learns only what is in the file.

        Raises:
            _Lost: SQLite rolled the whole of it back inside a unit.
        """
        identity = self._identity
        assert identity is not None
        try:
            guards.check_same(self._path, identity)
            self._begin(self._patience)
            self._look_for_foreign(self._raw)
        except (sqlite3.Error, StoreError) as error:
            _roll_back(self._raw)
            self._refuse(chosen, _named(error, self._path), batch)
            return
        tx = Transaction(self._raw, utc_text(time.time()))
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        for index in chosen:
            wrong = self._run_unit(tx, units[index], index, results)
            if wrong is not None:
                errors[index] = wrong
        refused = self._end(tx)
        if refused is None:
            try:
                guards.check_same(self._path, identity)
            except StorageMoved as error:
                refused = error
        if refused is not None:
            self._refuse(chosen, refused, batch)
            return
        for index in chosen:
            batch.results[index] = results.get(index)
        batch.errors.update(errors)
        batch.events += tx.events
        self._unchecked_pages += len(chosen) + tx.bytes / _PAGE

    def _run_unit(self, tx: Transaction, unit: Unit[Any], index: int, results: dict[int, Any]) -> BaseException | None:
        """
        Run one unit in a savepoint; return its error if only its own work was undone.

        Some errors (disk full, I/O, memory, interrupt) roll back the whole transaction, and later statements would commit by
        themselves: so ask SQLite after each.
        """
        raw = tx.connection
        written = len(tx.events)
        try:
            raw.execute("SAVEPOINT unit").fetchall()
            result = unit(tx)
            raw.execute("RELEASE unit").fetchall()
        except Exception as error:
            if not raw.in_transaction or primary_code(error) in PASSING:
                _roll_back(raw)
                raise _Lost(index, error) from error
            try:
                raw.execute("ROLLBACK TO unit").fetchall()
                raw.execute("RELEASE unit").fetchall()
            except sqlite3.Error as second:
                _roll_back(raw)
                raise _Lost(index, error) from second
            del tx.events[written:]
            return _named(error, self._path)
        if not raw.in_transaction:
            raise _Lost(
                index, StorageError(f"{self._path}: a unit ended the writer's transaction; nothing was written")
            )
        results[index] = result
        return None

    def _end(self, tx: Transaction) -> StorageError | None:
        """Commit; if COMMIT raises, ask the file. None: the batch is there."""
        try:
            tx.connection.execute("COMMIT").fetchall()
        except sqlite3.Error as error:
            return self._ask_the_file(tx, error)
        return None

    def _refuse(self, chosen: Sequence[int], error: BaseException, batch: _Batch) -> None:
        for index in chosen:
            batch.errors[index] = error
        if isinstance(error, CommitInDoubt | StorageMoved):
            batch.fatal = error

    @property
    def _raw(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection.raw

    def _begin(self, patience: float) -> None:
        """Take the write lock with a retry of our own: SQLite's busy handler lets one process starve another."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self._raw.execute("BEGIN IMMEDIATE").fetchall()
                return
            except sqlite3.OperationalError as error:
                if primary_code(error) != sqlite3.SQLITE_BUSY:
                    raise
                if time.monotonic() > deadline:
                    raise StorageBusy(
                        f"{self._path}: another process held the write lock for {patience:g} s: "
                        "find it (a shell with an open transaction?) and try again; nothing was written"
                    ) from error
                time.sleep(0.001)

    def _ask_the_file(self, tx: Transaction, cause: sqlite3.Error) -> StorageError | None:
        """
        Say what became of a COMMIT that raised: None if the batch is in the file, else the error for its callers.

        A batch is known by the last event it wrote, which names its task, attempt, time and owner. One without events cannot be
        asked for, and is never repeated blindly.
        """
        doubt = CommitInDoubt(
            f"{self._path}: COMMIT failed ({cause}) and the file cannot be asked whether it took: "
            "the store has stopped; open it again and look"
        )
        doubt.__cause__ = cause
        if not tx.events:
            return doubt
        last = tx.events[-1]
        try:
            _roll_back(tx.connection)
            found = self._reopen().execute(queries.EVENT_BY_SEQ, {"seq": last.seq}).fetchall()
        except sqlite3.Error:
            log.exception("commit_in_doubt")
            return doubt
        if found == [last[: len(queries.EVENT_COLUMNS)]]:
            return None
        failed = StorageError(
            f"{self._path}: COMMIT failed and nothing of it is in the file: {translate(cause, self._path)}"
        )
        failed.__cause__ = cause
        return failed

    def _reopen(self) -> sqlite3.Connection:
        """Open the file again, on the connection's thread."""
        assert self._connection is not None
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
        return self._connection.reopen()

    def _checkpoint(self, patience: float) -> None:
        """
        Copy the ``-wal`` into the file while holding SQLite's write lock, so that no commit runs beside it.

        That is the guard against the WAL-reset bug (sqlite.org/wal.html, section 11), which needs a commit of one connection
        during a checkpoint of another.
        """
        self._begin(patience)
        try:
            if self._checkpointer is None:
                self._checkpointer = open_sqlite(self._path, "write", self._durability)
            self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._unchecked_pages = 0.0
        finally:
            _roll_back(self._raw)


def _named(error: Exception, path: Path) -> Exception:
    """Name a driver error in this package's words, with the error as its cause; pass anything else through."""
    if not isinstance(error, sqlite3.Error):
        return error
    named = translate(error, path)
    named.__cause__ = error
    return named


def _roll_back(raw: sqlite3.Connection) -> None:
    if raw.in_transaction:
        raw.execute("ROLLBACK").fetchall()
