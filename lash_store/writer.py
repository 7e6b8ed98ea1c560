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
"""About how many pages may pile up in the ``-wal`` before they are copied into the file (16 MB)."""

_PAGE = 4_096
_PAGES_A_COMMIT = 12
"""About how many pages a commit writes beside one a unit and its payload: the leaves of tables and indexes at their ends."""

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
    """
    The whole transaction is gone: *guilty* is the unit that did it, *cause* what SQLite said.

    *landed* if it was committed, not rolled back, and what the units before it did is in the file.
    """

    def __init__(self, guilty: int, cause: Exception, *, landed: bool) -> None:
        self.guilty = guilty
        self.cause = cause
        self.landed = landed


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
        if connection is not None:
            try:
                await connection.run(lambda raw: self._last_checkpoint(raw, identity))
            except (sqlite3.Error, StoreError):
                log.warning("checkpoint_failed", exc_info=True)
            finally:
                self._connection = None
                await connection.close()
        if identity is not None:
            self._identity = None
            guards.let_go(identity)

    def _last_checkpoint(self, raw: sqlite3.Connection, identity: guards.FileIdentity | None) -> None:
        in_place = identity is not None and self._fatal is None and guards.identify(self._path) == identity
        try:
            if in_place:
                self._checkpoint(_CLOSING_PATIENCE)
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None
        # under the guard nobody can remove the -wal at the last close of this process: leave it empty
        if in_place and identity is not None and guards.is_last(identity):
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
                self._answer(jobs, batch)
                jobs = []
                if self._unchecked_pages >= _CHECKPOINT_PAGES and self._fatal is None:
                    await connection.run(lambda _: self._checkpoint_if_free())
                self._is_busy = False
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
        return batch

    def _commit_apart(self, units: Sequence[Unit[Any]], lost: _Lost, batch: _Batch) -> None:
        """One transaction a unit, from the start; the guilty one fails, unless opening the file again may cure it."""
        again = set(range(lost.guilty if lost.landed else 0, len(units)))
        if primary_code(lost.cause) in PASSING:
            try:
                self._reopen()
            except (sqlite3.Error, StoreError) as error:
                self._refuse(sorted(again), _named(error, self._path), batch)
                return
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
        before = tx.connection.total_changes
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        for position, index in enumerate(chosen):
            written = len(tx.events)
            try:
                wrong = self._run_unit(tx, units[index], index, results)
            except _Lost as lost:
                if lost.landed:
                    self._land(chosen[:position], results, errors, tx.events[:written], batch)
                raise
            if wrong is not None:
                errors[index] = wrong
        refused = self._end(tx, wrote=tx.connection.total_changes != before)
        if refused is None:
            try:
                guards.check_same(self._path, identity)
            except StorageMoved as error:
                refused = error
        if refused is not None:
            self._refuse(chosen, refused, batch)
            return
        self._land(chosen, results, errors, tx.events, batch)
        self._unchecked_pages += _PAGES_A_COMMIT + len(chosen) + tx.bytes / _PAGE

    @staticmethod
    def _land(
        chosen: Sequence[int],
        results: dict[int, Any],
        errors: dict[int, BaseException],
        events: Sequence[Committed],
        batch: _Batch,
    ) -> None:
        for index in chosen:
            batch.results[index] = results.get(index)
        batch.errors.update(errors)
        batch.events += events

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
                raise self._lost(tx, index, error, written) from error
            try:
                raw.execute("ROLLBACK TO unit").fetchall()
                raw.execute("RELEASE unit").fetchall()
            except sqlite3.Error as second:
                raise self._lost(tx, index, error, written) from second
            del tx.events[written:]
            return _named(error, self._path)
        if not raw.in_transaction:
            ended = StorageError(f"{self._path}: a unit ended the writer's transaction: it is refused")
            raise self._lost(tx, index, ended, written)
        results[index] = result
        return None

    def _lost(self, tx: Transaction, index: int, cause: Exception, written: int) -> _Lost:
        """Say what became of a transaction that is not ours any more: almost always it was rolled back."""
        _roll_back(tx.connection)
        landed = written > 0 and self._is_in_file(tx.connection, tx.events[written - 1])
        return _Lost(index, cause, landed=landed)

    @staticmethod
    def _is_in_file(raw: sqlite3.Connection, event: Committed) -> bool:
        found = raw.execute(queries.EVENT_BY_SEQ, {"seq": event.seq}).fetchall()
        return found == [event[: len(queries.EVENT_COLUMNS)]]

    def _end(self, tx: Transaction, *, wrote: bool) -> StorageError | None:
        """Commit; if COMMIT raises, ask the file. None: the batch is there."""
        try:
            tx.connection.execute("COMMIT").fetchall()
        except sqlite3.Error as error:
            return self._ask_the_file(tx, error) if wrote else self._not_applied(error)
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
        try:
            _roll_back(tx.connection)
            is_there = self._is_in_file(self._reopen(), tx.events[-1])
        except sqlite3.Error:
            log.exception("commit_in_doubt")
            return doubt
        if is_there:
            return None
        return self._not_applied(cause)

    def _not_applied(self, cause: sqlite3.Error) -> StorageError:
        _roll_back(self._raw)
        named = translate(cause, self._path)
        failed = named if isinstance(named, StorageError) else StorageError(str(named))
        failed.add_note("COMMIT failed, and nothing of it is in the file")
        failed.__cause__ = cause
        return failed

    def _checkpoint_if_free(self) -> None:
        try:
            self._checkpoint(0.0)
        except StorageBusy:
            # somebody else is writing: the next batch tries again
            return
        except (sqlite3.Error, StoreError):
            self._unchecked_pages = 0.0
            log.warning("checkpoint_failed", exc_info=True)

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
        assert self._identity is not None
        self._begin(patience)
        try:
            guards.check_same(self._path, self._identity)
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
