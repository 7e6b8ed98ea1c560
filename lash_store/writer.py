"""
Owns the queue of what is to be committed: first in first out, many units a commit, one hop to the connection's thread a batch.

A caller holds a future and nothing else, so cancelling it neither undoes nor repeats what it asked for.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import guards
from .commit import Batch, Committer, Unit
from .database import Connection, Durability, connect
from .errors import CommitInDoubt, StorageError, StoreClosed, StoreError
from .policies import Limits
from .strangers import refuse_meddlers
from .transaction import Committed, Transaction
from .translation import DRIVER_ERRORS, translate

__all__ = ["Answer", "Unit", "Writer"]

T = TypeVar("T")

log = logging.getLogger(__name__)

_MOST = 128
"""Units in one commit: enough to hide the fsync, few enough that nobody waits long for the lock, or for a turn on the loop."""

_AT_ONCE = 256
"""Events of one commit that are acted on in one turn of the loop."""


Answer = Callable[[T | None, BaseException | None], None]
"""Is told what a unit returned, or why it is not in the file; on the loop, before whoever waits for it goes on."""


@dataclass(slots=True)
class _Job(Generic[T]):
    unit: Unit[T]
    then: Answer[T] | None
    future: asyncio.Future[T] | None

    def answer(self, result: T | None, error: BaseException | None) -> None:
        """Tell of the commit: first who acts on it, whether or not anybody still waits, then who waits."""
        if self.then is not None:
            try:
                self.then(result, error)
            except Exception:
                log.exception("reaction_failed")
        future = self.future
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)


class Writer:
    """
    Commits units in the order they came, and tells *on_commit* before any caller is answered.

    *patience* is how many seconds a batch waits for another process's write lock; *limits* what units may put into the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        patience: float,
        on_commit: Callable[[Sequence[Committed]], None],
        on_fatal: Callable[[StorageError], None],
        limits: Limits | None = None,
    ) -> None:
        self._path = path
        self._durability = durability
        self._patience = patience
        self._limits = limits
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._queue: deque[_Job[Any]] = deque()
        self._undoing: set[asyncio.Future[Any]] = set()
        self._wake = asyncio.Event()
        self._closing = False
        self._fatal: StorageError | None = None
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._identity: guards.FileIdentity | None = None
        self._committer: Committer | None = None
        self._is_busy = False

    # --- life ---

    async def open(self) -> None:
        """
        Open the connection and start committing.

        Raises:
            StorageError: the file cannot be opened for writing, or has triggers that would write behind the store's back.
        """
        self._connection = await connect(self._path, "write", self._durability)
        try:
            await self._look_at_triggers(self._connection)
            self._identity = guards.hold(self._path)
            self._committer = await self._connection.run(self._make_committer)
        except BaseException as error:
            await self._close_connection()
            if isinstance(error, DRIVER_ERRORS):
                raise translate(error, self._path) from error
            raise
        self._task = asyncio.create_task(self._work(), name="lash_store writer")

    async def _look_at_triggers(self, connection: Connection) -> None:
        try:
            await connection.run(lambda raw: refuse_meddlers(raw, self._path))
        except sqlite3.Error as error:
            raise translate(error, self._path) from error

    def _make_committer(self, _: sqlite3.Connection) -> Committer:
        assert self._connection is not None
        assert self._identity is not None
        return Committer(
            self._connection,
            self._path,
            self._identity,
            durability=self._durability,
            patience=self._patience,
            limits=self._limits,
        )

    async def close(self) -> None:
        """Commit what was asked for so far, checkpoint, and close the file."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        await self._close_connection()

    async def _close_connection(self) -> None:
        connection, self._connection = self._connection, None
        committer, self._committer = self._committer, None
        identity, self._identity = self._identity, None
        if connection is not None:
            try:
                if committer is not None:
                    await connection.run(lambda _: committer.last_checkpoint(in_order=self._fatal is None))
            except (*DRIVER_ERRORS, StoreError):
                log.warning("checkpoint_failed", exc_info=True)
            finally:
                await connection.close()
        if identity is not None:
            guards.let_go(identity)

    # --- asking ---

    def submit(self, unit: Unit[T], then: Answer[T] | None = None) -> asyncio.Future[T]:
        """
        Queue a unit. The future resolves once its commit is in the file; cancelling it changes nothing in the file.

        *then* is told of the commit before, whatever became of the future.

        Raises:
            StoreClosed, StorageError: the writer has stopped.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(_Job(unit, then, future))
        return future

    def tell(self, unit: Unit[T], then: Answer[T]) -> None:
        """Queue a unit that nobody waits for: *then* is told of its commit; see `submit`."""
        self._put(_Job(unit, then, None))

    def _put(self, job: _Job[Any]) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._closing or self._task is None:
            raise StoreClosed(f"the store on {self._path} is closed: open it again")
        if self._connection is not None:
            self._connection.check_life()
        self._queue.append(job)
        self._wake.set()

    async def run(self, unit: Unit[T], then: Answer[T] | None = None) -> T:
        """Do the same, wait for its commit, and return what it returned. Others have their turn also before it is refused."""
        try:
            asked = self.submit(unit, then)
        except StoreError:
            await asyncio.sleep(0)
            raise
        return await asked

    def post(self, unit: Unit[Any]) -> asyncio.Future[Any] | None:
        """Queue a unit whose commit nobody need wait for; that it was lost is logged, None if it was at once."""
        try:
            posted = self.submit(unit)
        except StoreError as error:
            _log_lost(error)
            return None
        posted.add_done_callback(lambda future: None if future.cancelled() else _log_lost(future.exception()))
        return posted

    async def run_or_undo(self, unit: Unit[T], undo: Callable[[T], Unit[Any] | None]) -> T:
        """
        Queue a unit and wait for its commit; what nobody came to hear of is taken back.

        If the caller is cancelled, the unit that *undo* makes of the answer, if it makes one, is queued at once; see `take_back`.
        """
        answers: list[T] = []

        def answered(tx: Transaction) -> T:
            answers.clear()
            answers.append(unit(tx))
            return answers[0]

        def take_back(tx: Transaction) -> None:
            undoing = undo(answers[0]) if answers else None
            if undoing is not None:
                undoing(tx)

        try:
            return await self.submit(answered)
        except asyncio.CancelledError:
            self.take_back(take_back)
            raise

    def take_back(self, undo: Unit[Any]) -> None:
        """
        Queue at once the unit that takes back what nobody came to hear of: what its caller asks for next comes after it.

        `taken_back` tells who reads beside the queue.
        """
        undone = self.post(undo)
        if undone is not None:
            self._undoing.add(undone)
            undone.add_done_callback(self._undoing.discard)

    async def taken_back(self, timeout: float) -> None:
        """Wait until what is to be taken back was, but no longer than *timeout* seconds."""
        if self._undoing:
            await asyncio.wait(set(self._undoing), timeout=timeout)

    def at_once(self, sql: str) -> Any:
        """Return the one value of a statement that is quickly answered, without a hop; None if a batch is being committed."""
        if self._committer is None or self._is_busy or self._fatal is not None:
            return None
        assert self._connection is not None
        self._connection.check_life()
        return self._committer.at_once(sql)

    def limit_patience(self, patience: float) -> None:
        """Wait for other processes' write locks no longer than *patience* seconds from now on: the store is closing."""
        if self._committer is not None:
            self._committer.patience = min(self._committer.patience, patience)

    def guard(self, guard: Callable[[Transaction], StoreError | None]) -> None:
        """Have *guard* asked, after others' commits, why this owner may take no more work on; `Transaction.forbidden` has it."""
        if self._committer is not None:
            self._committer.guard = guard

    async def foreign_commits(self) -> bool:
        """
        Say whether another connection committed since the last call; reads no table.

        An idle connection is asked from here, without a hop: a thousand sleeping tasks should cost nothing.
        """
        committer, connection = self._committer, self._connection
        if committer is None or connection is None or self._fatal is not None:
            return False
        connection.check_life()
        if not self._is_busy:
            committer.look_for_foreign()
        seen, committer.foreign_seen = committer.foreign_seen, False
        return seen

    # --- working ---

    async def _work(self) -> None:
        connection, committer = self._connection, self._committer
        assert connection is not None
        assert committer is not None
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
                batch = await connection.run(lambda _, units=units: committer.commit(units))  # type: ignore[misc]
                await self._act_on(batch.events)
                self._answer(jobs, batch)
                jobs = []
                if committer.wants_checkpoint and self._fatal is None:
                    await connection.run(lambda _: committer.checkpoint_if_free())
                self._is_busy = False
        except (Exception, asyncio.CancelledError) as error:
            # only a loop that is being torn down, or a bug of ours, gets here: nobody may be left waiting
            stopped = CommitInDoubt(f"{self._path}: the writer stopped ({error!r}): open the store again and look")
            stopped.__cause__ = error
            self._queue.extendleft(reversed(jobs))
            self._stop(stopped)
            if not isinstance(error, Exception):
                raise
            log.exception("writer_stopped")

    async def _act_on(self, events: Sequence[Committed]) -> None:
        """Tell of a commit; of very much in one, in parts, so that others have their turn on the loop in between."""
        for first in range(0, len(events), _AT_ONCE):
            if first:
                await asyncio.sleep(0)
            try:
                self._on_commit(events[first : first + _AT_ONCE])
            except Exception:
                log.exception("reaction_failed")

    def _answer(self, jobs: Sequence[_Job[Any]], batch: Batch) -> None:
        for index, (job, result) in enumerate(zip(jobs, batch.results, strict=True)):
            job.answer(result, batch.errors.get(index))
        if batch.fatal is not None:
            self._stop(batch.fatal)

    def _stop(self, error: StorageError) -> None:
        self._fatal = error
        self._closing = True
        while self._queue:
            self._queue.popleft().answer(None, error)
        self._on_fatal(error)


def _log_lost(error: BaseException | None) -> None:
    if error is not None:
        log.warning("unit_lost", exc_info=error)
