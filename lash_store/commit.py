"""
Owns what happens on the writer's thread: BEGIN, the units, COMMIT, the doubt after it, and the checkpoint.

Units mostly succeed, so they run without savepoints; once one fails, the others run again, each in a savepoint of its own, and so
do those of the next batches.

Nothing here knows of the event loop; nothing but here begins a transaction of the running store.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from . import guards, queries
from .database import Connection, Durability, open_sqlite
from .errors import CommitInDoubt, StorageBusy, StorageError, StorageMoved, StoreError
from .policies import Limits
from .reader import data_version, replacing
from .transaction import Committed, Transaction, utc_text
from .translation import DRIVER_ERRORS, PASSING, is_not_utf8, primary_code, translate

__all__ = ["Batch", "Committer", "Unit"]

T = TypeVar("T")
Unit = Callable[[Transaction], T]
"""A synchronous function of an open transaction, free of other effects: it may run twice."""

log = logging.getLogger(__name__)

_CHECKPOINT_PAGES = 4_000
"""About how many pages may pile up in the ``-wal`` before they are copied into the file (16 MB)."""

_AGAIN = 1 / 8
"""After what share of that another try comes, where a reader was in the way: the ``-wal`` can begin anew once a try."""

_PAGE = 4_096
_PAGES_A_COMMIT = 12
"""About how many pages a commit writes beside one a unit and its payload: the leaves of tables and indexes at their ends."""

_CAREFUL = 16
"""Batches in which each unit has its own savepoint after a unit of one failed: what fails once may well fail again."""

_CLOSING_PATIENCE = 1.0
"""Seconds a closing store waits for the lock of its last checkpoint; the next opener can do it as well."""


@dataclass(slots=True)
class Batch:
    """What became of the units of one hop, in their order: a result, or the error that names why not."""

    results: list[Any] = field(default_factory=list)
    errors: dict[int, BaseException] = field(default_factory=dict)
    events: list[Committed] = field(default_factory=list)
    fatal: StorageError | None = None


class _Lost(Exception):
    """The whole transaction is gone: *guilty* is the unit that did it, None if nobody knows; *cause* what SQLite said."""

    def __init__(self, guilty: int | None, cause: Exception) -> None:
        self.guilty = guilty
        self.cause = cause


@dataclass(frozen=True, slots=True)
class _Failed:
    """Which unit failed, None if it may not if asked again, why, and what others had committed by then (``data_version``)."""

    index: int | None
    error: BaseException
    version: int


class Committer:
    """
    Commits batches on one connection, guarded by the *identity* of its file; every method runs on the connection's thread.

    *patience* is how many seconds a batch waits for another process's write lock.
    """

    def __init__(
        self,
        connection: Connection,
        path: Path,
        identity: guards.FileIdentity,
        *,
        durability: Durability,
        patience: float,
        limits: Limits | None = None,
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._path = path
        self._name = str(path)
        self._identity = identity
        self._durability = durability
        self.patience = patience
        self._checkpointer: sqlite3.Connection | None = None
        self._careful = 0
        self._unchecked_pages = _pages_of(f"{path}-wal")
        self._foreign_version = self._guarded_version = data_version(self._raw)
        # once it has read, both are there, and stay until the last connection closes
        self._beside = [(name, guards.identify(name)) for name in (f"{path}-wal", f"{path}-shm")]
        self.foreign_seen = False
        self.guard: Callable[[Transaction], StoreError | None] | None = None
        self._forbidden: StoreError | None = None
        self._is_lost = False

    @property
    def wants_checkpoint(self) -> bool:
        """Whether enough piled up in the ``-wal``."""
        return self._unchecked_pages >= _CHECKPOINT_PAGES

    def look_for_foreign(self) -> None:
        """Note in *foreign_seen* whether another connection committed; reads no table."""
        if self._is_lost:
            return
        try:
            version = data_version(self._raw)
        except DRIVER_ERRORS as error:
            if primary_code(error) not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise translate(error, self._path) from error
            return
        if version != self._foreign_version:
            self._foreign_version = version
            self.foreign_seen = True

    def at_once(self, sql: str) -> Any:
        """Return the one value of a statement, outside of any transaction of ours."""
        return self._raw.execute(sql).fetchall()[0][0]

    def commit(self, units: Sequence[Unit[Any]]) -> Batch:
        """Commit *units* together; if one of them loses the whole transaction, each by itself."""
        everything = range(len(units))
        batch = Batch(results=[None] * len(units))
        try:
            try:
                self._commit_together(units, everything, batch)
            except _Lost as lost:
                self._commit_apart(units, lost, batch)
        except BaseException:
            # a bug of ours, which stops the store: others must not wait for the lock until it is closed
            self._let_go()
            raise
        return batch

    def _commit_apart(self, units: Sequence[Unit[Any]], lost: _Lost, batch: Batch) -> None:
        """One transaction a unit, from the start; the guilty one fails, unless opening the file again may cure it."""
        again = set(range(len(units)))
        if primary_code(lost.cause) in PASSING:
            try:
                self._reopen()
            except (*DRIVER_ERRORS, StoreError) as error:
                self._refuse(sorted(again), _named(error, self._path), batch)
                return
        elif lost.guilty is not None:
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

    def _commit_together(
        self, units: Sequence[Unit[Any]], chosen: Sequence[int], batch: Batch, failed: _Failed | None = None
    ) -> None:
        """
        One transaction: every unit, then COMMIT; *batch* learns only what is in the file.

        Of those that *failed* a moment ago, the others run again, each in a savepoint of its own.

        Raises:
            _Lost: the whole of it was rolled back, by SQLite inside a unit or because COMMIT refused it.
        """
        try:
            if self._is_lost:
                self._reopen()
            self._check_in_place()
            self._begin(self.patience)
            self.look_for_foreign()
        except (*DRIVER_ERRORS, StoreError) as error:
            self._let_go()
            self._refuse(chosen, _named(error, self._path), batch)
            return
        tx = Transaction(self._raw, utc_text(time.time()), self._limits)
        tx.forbidden = self._ask_guard(tx)
        before = tx.connection.total_changes
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        if failed is None and (len(chosen) == 1 or not self._careful):
            failed = self._run_together(tx, units, chosen, results)
            if failed is not None:
                self._let_go()
                self._fail(units, chosen, batch, failed)
                return
        else:
            self._careful -= 1
            if failed is not None and failed.index is not None and failed.version == self._foreign_version:
                # nobody wrote in between: it would fail again
                errors[failed.index] = failed.error
            for index in chosen:
                wrong = None if index in errors else self._run_apart(tx, units[index], index, results)
                if wrong is not None:
                    errors[index] = wrong
        try:
            queries.write_events(tx)
        except (*DRIVER_ERRORS, OverflowError) as error:
            self._let_go()
            raise _Lost(chosen[0] if len(chosen) == 1 else None, error) from error
        try:
            refused = self._end(tx, wrote=tx.connection.total_changes != before)
        except sqlite3.IntegrityError as error:
            raise _Lost(chosen[0] if len(chosen) == 1 else None, error) from error
        if refused is None:
            try:
                self._check_in_place()
            except StorageMoved as error:
                refused = error
        if refused is not None:
            self._refuse(chosen, refused, batch)
            return
        for index in chosen:
            batch.results[index] = None if index in errors else results.get(index)
        batch.errors.update(errors)
        batch.events += tx.events
        self._unchecked_pages += _PAGES_A_COMMIT + len(chosen) + tx.bytes / _PAGE

    def _fail(self, units: Sequence[Unit[Any]], chosen: Sequence[int], batch: Batch, failed: _Failed) -> None:
        """Give a unit its error, and commit the others."""
        if len(chosen) == 1 and failed.index is not None:
            batch.errors[failed.index] = failed.error
            return
        self._careful = _CAREFUL
        self._commit_together(units, chosen, batch, failed)

    def _ask_guard(self, tx: Transaction) -> StoreError | None:
        """Ask, if another connection committed since the last time, whether this one may still take work on."""
        if self.guard is not None and self._guarded_version != self._foreign_version:
            self._forbidden = self.guard(tx)
            self._guarded_version = self._foreign_version
        return self._forbidden

    def _check_in_place(self) -> None:
        """
        Make sure the path still names the file, and those beside it, that commits go to and locks are in; with `stat` alone.

        Raises:
            StorageMoved: SQLite would go on acknowledging into a file that nobody else can see, or without others' locks.
        """
        guards.check_same(self._name, self._identity)
        for name, identity in self._beside:
            if guards.identify(name) != identity:
                raise StorageMoved(
                    f"{name} was removed or replaced under this store, with commits or the locks of others in it: the store has "
                    "stopped; open it again and compare"
                )

    def _run_together(
        self, tx: Transaction, units: Sequence[Unit[Any]], chosen: Sequence[int], results: dict[int, Any]
    ) -> _Failed | None:
        """
        Run units without a savepoint, in which every page they touch would be written twice; return the first that fails.

        Some errors (disk full, I/O, memory, interrupt) roll back the whole transaction, and later statements would commit by
        themselves: so ask SQLite after each.
        """
        raw = tx.connection
        for index in chosen:
            try:
                results[index] = units[index](tx)
            except Exception as error:
                self._check_whole(raw, index, error)
                if _reads_on(raw, error):
                    return _Failed(None, error, self._foreign_version)
                return _Failed(index, _named(error, self._path), self._foreign_version)
            self._check_whole(raw, index)
        return None

    def _check_whole(self, raw: sqlite3.Connection, index: int, error: Exception | None = None) -> None:
        """
        Make sure that a unit, which raised *error* or nothing, left the transaction as it was.

        Raises:
            _Lost: it is gone, or worth nothing any more.
        """
        if raw.in_transaction and (error is None or primary_code(error) not in PASSING):
            return
        self._let_go()
        if error is None:
            error = StorageError(f"{self._path}: a unit ended the writer's transaction: it is refused")
        raise _Lost(index, error) from error

    def _run_apart(self, tx: Transaction, unit: Unit[Any], index: int, results: dict[int, Any]) -> BaseException | None:
        """Run one unit in a savepoint; return its error if only its own work was undone."""
        raw = tx.connection
        written = len(tx.events)
        try:
            raw.execute("SAVEPOINT unit").fetchall()
            result = unit(tx)
            raw.execute("RELEASE unit").fetchall()
        except Exception as error:
            self._check_whole(raw, index, error)
            try:
                raw.execute("ROLLBACK TO unit").fetchall()
                raw.execute("RELEASE unit").fetchall()
            except DRIVER_ERRORS as second:
                self._let_go()
                raise _Lost(index, error) from second
            del tx.events[written:]
            if _reads_on(raw, error):
                return self._run_apart(tx, unit, index, results)
            return _named(error, self._path)
        self._check_whole(raw, index)
        results[index] = result
        return None

    @staticmethod
    def _is_in_file(raw: sqlite3.Connection, event: Committed) -> bool:
        found = raw.execute(queries.EVENT_BY_SEQ, {"seq": event.seq}).fetchall()
        return found == [event[: len(queries.EVENT_COLUMNS)]]

    def _end(self, tx: Transaction, *, wrote: bool) -> StorageError | None:
        """
        Commit; if COMMIT raises, ask the file. None: the batch is there.

        Raises:
            sqlite3.IntegrityError: a program's own table has a deferred constraint that does not hold; nothing is there.
        """
        try:
            tx.connection.execute("COMMIT").fetchall()
        except sqlite3.IntegrityError:
            self._let_go()
            raise
        except DRIVER_ERRORS as error:
            return self._ask_the_file(tx, error) if wrote else self._not_applied(error)
        return None

    def _refuse(self, chosen: Sequence[int], error: BaseException, batch: Batch) -> None:
        for index in chosen:
            batch.errors[index] = error
        if isinstance(error, CommitInDoubt | StorageMoved):
            batch.fatal = error
            self._let_go()

    @property
    def _raw(self) -> sqlite3.Connection:
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

    def _ask_the_file(self, tx: Transaction, cause: Exception) -> StorageError | None:
        """
        Say what became of a COMMIT that raised: None if the batch is in the file, else the error for its callers.

        A batch is known by the last event it wrote, which names its task, attempt, time and owner. One without events cannot be
        asked for, and is never repeated blindly; but of one for which there was no room, what commits it is not there: that is
        written last.
        """
        doubt = CommitInDoubt(
            f"{self._path}: COMMIT failed ({cause}) and the file cannot be asked whether it took: "
            "the store has stopped; open it again and look"
        )
        doubt.__cause__ = cause
        if not tx.events:
            return self._not_applied(cause) if primary_code(cause) == sqlite3.SQLITE_FULL else doubt
        try:
            self._let_go()
            is_there = self._is_in_file(self._reopen(), tx.events[-1])
        except DRIVER_ERRORS:
            log.exception("commit_in_doubt")
            return doubt
        if is_there:
            return None
        return self._not_applied(cause)

    def _not_applied(self, cause: Exception) -> StorageError:
        self._let_go()
        named = translate(cause, self._path)
        failed = named if isinstance(named, StorageError) else StorageError(str(named))
        failed.add_note("COMMIT failed, and nothing of it is in the file")
        failed.__cause__ = cause
        return failed

    def checkpoint_if_free(self) -> None:
        """Copy the ``-wal`` into the file, unless somebody else is writing just now."""
        try:
            self._checkpoint(0.0)
        except StorageBusy:
            # somebody else is writing: the next batch tries again
            return
        except (*DRIVER_ERRORS, StoreError):
            self._unchecked_pages = 0.0
            log.warning("checkpoint_failed", exc_info=True)

    def last_checkpoint(self, *, in_order: bool) -> None:
        """Leave the ``-wal`` empty if this is the last use of the file in this process; *in_order*: no error stopped us."""
        in_place = in_order and guards.identify(self._path) == self._identity
        try:
            if in_place:
                self._checkpoint(min(self.patience, _CLOSING_PATIENCE))
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None
        # under the guard nobody can remove the -wal at the last close of this process
        if in_place and guards.is_last(self._identity):
            self._raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _reopen(self) -> sqlite3.Connection:
        """Open the file again, on the connection's thread."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
        opened = self._connection.reopen()
        self._is_lost = False
        return opened

    def _let_go(self) -> None:
        """
        End the transaction, and with it the write lock, whatever it takes: a ROLLBACK that fails may leave both.

        If the file cannot be opened again either, the connection is closed, and the next batch opens it.
        """
        if self._is_lost:
            return
        try:
            if self._raw.in_transaction:
                self._raw.execute("ROLLBACK").fetchall()
        except DRIVER_ERRORS:
            log.warning("rollback_failed", exc_info=True)
            try:
                self._reopen()
            except (*DRIVER_ERRORS, StoreError):
                self._raw.close()
                self._is_lost = True

    def _checkpoint(self, patience: float) -> None:
        """
        Copy the ``-wal`` into the file while holding SQLite's write lock, so that no commit runs beside it.

        That is the guard against the WAL-reset bug (sqlite.org/wal.html, section 11), which needs a commit of one connection
        during a checkpoint of another.
        """
        self._begin(patience)
        try:
            guards.check_same(self._path, self._identity)
            if self._checkpointer is None:
                self._checkpointer = open_sqlite(self._path, "write", self._durability)
            [(_, pages, copied)] = self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            # one that holds more than it should had a reader in the way when it could have begun anew
            is_kept = copied < pages or pages > _CHECKPOINT_PAGES
            self._unchecked_pages = _CHECKPOINT_PAGES * (1 - _AGAIN) if is_kept else 0.0
        finally:
            self._let_go()


def _pages_of(wal: str) -> float:
    """Return how many pages may lie in a ``-wal``: what owners that were killed have left counts, or it would grow with each."""
    try:
        return Path(wal).stat().st_size / _PAGE
    except OSError:
        return 0.0


def _named(error: Exception, path: Path) -> Exception:
    """Name a driver error in this package's words, with the error as its cause; pass anything else through."""
    if isinstance(error, OverflowError):
        named: StoreError = StorageError(
            f"{path}: a number would pass what SQLite holds, 2**63 - 1 ({error}): a counter in the file was edited by hand, "
            "or the one that was given is too large: see lash-store doctor; nothing was written"
        )
        named.__cause__ = error
        return named
    if not isinstance(error, DRIVER_ERRORS):
        return error
    named = translate(error, path)
    named.__cause__ = error
    return named


def _reads_on(raw: sqlite3.Connection, error: Exception) -> bool:
    """Whether a unit met a row edited by hand that is not UTF-8, and does better now: with replacement characters."""
    if not is_not_utf8(error) or raw.text_factory is not str:
        return False
    raw.text_factory = replacing
    return True
