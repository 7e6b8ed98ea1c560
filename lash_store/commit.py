"""
Owns what happens on the writer's thread: BEGIN, the units, COMMIT, the doubt after it, and the checkpoint.

Units mostly succeed, so all of a batch share a savepoint; once one fails, the others run again, each in a savepoint of its own,
and so do those of the next batches.

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
from .database import (
    PASSING,
    Committed,
    Connection,
    Durability,
    Transaction,
    data_version,
    is_not_utf8,
    open_sqlite,
    primary_code,
    replacing,
    translate,
    utc_text,
)
from .errors import CommitInDoubt, StorageBusy, StorageError, StorageMoved, StoreError
from .policies import Limits

__all__ = ["Batch", "Committer", "Unit"]

T = TypeVar("T")
Unit = Callable[[Transaction], T]
"""A synchronous function of an open transaction, free of other effects: it may run twice."""

log = logging.getLogger(__name__)

_CHECKPOINT_PAGES = 4_000
"""About how many pages may pile up in the ``-wal`` before they are copied into the file (16 MB)."""

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
        self._wal_path = Path(f"{path}-wal")
        self._identity = identity
        self._durability = durability
        self.patience = patience
        self._checkpointer: sqlite3.Connection | None = None
        self._careful = 0
        self._unchecked_pages = 0.0
        self._wal: guards.FileIdentity | None = None
        self._foreign_version = self._guarded_version = data_version(self._raw)
        self.foreign_seen = False
        self.guard: Callable[[Transaction], StoreError | None] | None = None
        self._forbidden: StoreError | None = None

    @property
    def wants_checkpoint(self) -> bool:
        """Whether enough piled up in the ``-wal``."""
        return self._unchecked_pages >= _CHECKPOINT_PAGES

    def look_for_foreign(self) -> None:
        """Note in *foreign_seen* whether another connection committed; reads no table."""
        try:
            version = data_version(self._raw)
        except sqlite3.OperationalError as error:
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
            self._commit_together(units, everything, batch)
        except _Lost as lost:
            self._commit_apart(units, lost, batch)
        return batch

    def _commit_apart(self, units: Sequence[Unit[Any]], lost: _Lost, batch: Batch) -> None:
        """One transaction a unit, from the start; the guilty one fails, unless opening the file again may cure it."""
        again = set(range(len(units)))
        if primary_code(lost.cause) in PASSING:
            try:
                self._reopen()
            except (sqlite3.Error, StoreError) as error:
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

    def _commit_together(self, units: Sequence[Unit[Any]], chosen: Sequence[int], batch: Batch) -> None:
        """
        One transaction: every unit, then COMMIT; *batch* learns only what is in the file.

        Raises:
            _Lost: the whole of it was rolled back, by SQLite inside a unit or because COMMIT refused it.
        """
        try:
            self._check_in_place()
            self._begin(self.patience)
            self.look_for_foreign()
        except (sqlite3.Error, StoreError) as error:
            _roll_back(self._raw)
            self._refuse(chosen, _named(error, self._path), batch)
            return
        tx = Transaction(self._raw, utc_text(time.time()), self._limits)
        tx.forbidden = self._ask_guard(tx)
        before = tx.connection.total_changes
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        self._run_units(tx, units, chosen, results, errors)
        try:
            queries.write_events(tx)
        except sqlite3.Error as error:
            _roll_back(tx.connection)
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

    def _ask_guard(self, tx: Transaction) -> StoreError | None:
        """Ask, if another connection committed since the last time, whether this one may still take work on."""
        if self.guard is not None and self._guarded_version != self._foreign_version:
            self._forbidden = self.guard(tx)
            self._guarded_version = self._foreign_version
        return self._forbidden

    def _check_in_place(self) -> None:
        """
        Make sure the path still names the file, and the ``-wal`` beside it, that commits go to; with `stat` alone.

        Raises:
            StorageMoved: SQLite would go on acknowledging into a file that nobody else can see.
        """
        guards.check_same(self._path, self._identity)
        wal = guards.identify(self._wal_path)
        if self._wal is None:
            self._wal = wal
        elif wal != self._wal:
            raise StorageMoved(
                f"{self._wal_path} was removed or replaced under this store, with commits in it: the store has stopped; "
                "open it again and compare"
            )

    def _run_units(
        self,
        tx: Transaction,
        units: Sequence[Unit[Any]],
        chosen: Sequence[int],
        results: dict[int, Any],
        errors: dict[int, BaseException],
    ) -> None:
        """Run units in one savepoint, for they mostly succeed; if one fails, the others again, each in its own."""
        if self._careful:
            self._careful -= 1
        else:
            failed = self._run_in_savepoint(tx, units, chosen, results)
            if failed is None:
                return
            self._careful = _CAREFUL
            errors.update([failed])
        for index in chosen:
            if index not in errors:
                failed = self._run_in_savepoint(tx, units, [index], results)
                if failed is not None:
                    errors.update([failed])

    def _run_in_savepoint(
        self, tx: Transaction, units: Sequence[Unit[Any]], chosen: Sequence[int], results: dict[int, Any]
    ) -> tuple[int, BaseException] | None:
        """
        Run units in one savepoint; if one fails and only their own work was undone, return which, and its error.

        Some errors (disk full, I/O, memory, interrupt) roll back the whole transaction, and later statements would commit by
        themselves: so ask SQLite after each.
        """
        raw, written, guilty = tx.connection, len(tx.events), chosen[0]
        try:
            raw.execute("SAVEPOINT units").fetchall()
            for guilty in chosen:
                results[guilty] = units[guilty](tx)
                if not raw.in_transaction:
                    raise StorageError(f"{self._path}: a unit ended the writer's transaction: it is refused")
        except Exception as error:
            if not raw.in_transaction or primary_code(error) in PASSING:
                _roll_back(raw)
                raise _Lost(guilty, error) from error
            self._close_savepoint(raw, chosen, "ROLLBACK TO units")
            del tx.events[written:]
            if is_not_utf8(error) and raw.text_factory is str:
                # a row edited by hand: read it with replacement characters, from here on
                raw.text_factory = replacing
                return self._run_in_savepoint(tx, units, chosen, results)
            return guilty, _named(error, self._path)
        self._close_savepoint(raw, chosen)
        return None

    def _close_savepoint(self, raw: sqlite3.Connection, chosen: Sequence[int], first: str | None = None) -> None:
        """
        Release the savepoint of units.

        Raises:
            _Lost: one of them ended the transaction, and began another.
        """
        try:
            if first is not None:
                raw.execute(first).fetchall()
            raw.execute("RELEASE units").fetchall()
        except sqlite3.Error as error:
            _roll_back(raw)
            raise _Lost(chosen[0] if len(chosen) == 1 else None, error) from error

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
            _roll_back(tx.connection)
            raise
        except sqlite3.Error as error:
            return self._ask_the_file(tx, error) if wrote else self._not_applied(error)
        return None

    def _refuse(self, chosen: Sequence[int], error: BaseException, batch: Batch) -> None:
        for index in chosen:
            batch.errors[index] = error
        if isinstance(error, CommitInDoubt | StorageMoved):
            batch.fatal = error

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

    def _ask_the_file(self, tx: Transaction, cause: sqlite3.Error) -> StorageError | None:
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

    def checkpoint_if_free(self) -> None:
        """Copy the ``-wal`` into the file, unless somebody else is writing just now."""
        try:
            self._checkpoint(0.0)
        except StorageBusy:
            # somebody else is writing: the next batch tries again
            return
        except (sqlite3.Error, StoreError):
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
        return self._connection.reopen()

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
