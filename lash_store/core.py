"""Owns what sessions and handles share of an open store: reading rows, waiting for ends, and seeing a cancel through."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from . import copies, leftovers, owners, queries, session_queries, step_queries, transitions
from .bodies import Body
from .callbacks import Callbacks
from .errors import StoreClosed, StoreError, StoreReadOnly
from .feed import Feed
from .gathering import Gathering
from .leftovers import Fates
from .lifecycle import Task
from .models import Scope, StepRecord, TaskFilter, TaskRecord, TaskState, Verdict, check_id, check_text, check_timeout
from .owners import Life, OwnerLock
from .policies import Limits
from .queries import OwnerRow
from .reader import Reader
from .readings import Reading, Readings
from .registry import Registry
from .runner import Runner
from .step_queries import StepRow
from .transaction import Transaction
from .transitions import Outcome
from .translation import is_damage
from .turns import all_over, next_turn
from .writer import Unit, Writer

__all__ = ["Core"]

T = TypeVar("T")
log = logging.getLogger(__name__)

_LOOK = 0.25
"""Seconds between looks at the lock of another process's owner while its confirmation of a cancel is awaited."""


_THREADS = 64
"""Plain functions of steps that run at once, each in a thread of its own."""

_NOTING = 0.5
"""Seconds that noting who was handed an outcome, or was not after all, may hold up who asks."""


@dataclass(slots=True)
class Core:
    """
    The layers below of one open store, as sessions and handles use them.

    Without a *writer* it only reads; without an *owner_id* and a *runner* it makes requests, but creates nothing.
    """

    path: Path
    runtime: str | None
    registry: Registry
    reader: Reader
    feed: Feed
    limits: Limits = field(default_factory=Limits)
    writer: Writer | None = None
    cancel_grace: float = 5.0
    owner_id: int | None = None
    runner: Runner | None = None
    callbacks: Callbacks | None = None
    gatherings: dict[str, Gathering] = field(default_factory=dict)
    claims: set[OwnerLock] = field(default_factory=set)
    threads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_THREADS))
    readings: Readings = field(default_factory=Readings)
    begun: set[Scope] = field(default_factory=set)
    endings: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    is_closing: bool = False

    def to_request(self) -> Writer:
        """
        Return the writer for a request.

        Raises:
            StoreReadOnly, StoreClosed: this store may not, or no more.
        """
        if self.is_closing:
            raise StoreClosed(
                f"the store on {self.path} was closed: open it again, and take its sessions and handles from it anew"
            )
        if self.writer is None:
            raise StoreReadOnly(f"{self.path} was opened read-only: open it with TaskStore.connect() to make requests")
        return self.writer

    def to_create(self) -> tuple[Runner, int]:
        """Return the runner and the owner id for new work; see `to_request`."""
        self.to_request()
        if self.runner is None or self.owner_id is None:
            raise StoreReadOnly(f"{self.path} was opened by connect(), to make requests: open a TaskStore to create")
        return self.runner, self.owner_id

    @property
    def writing(self) -> Writer:
        """
        The writer for what bodies say: also while the store closes, for they end only then.

        Raises:
            StoreReadOnly: this store has none.
        """
        if self.writer is None:
            return self.to_request()
        return self.writer

    async def write_for(self, body: Body, unit: Unit[Outcome]) -> Outcome:
        """
        Commit what a body says.

        Raises:
            StaleAttempt: the task is another attempt's, or has ended.
        """
        outcome = await self.writing.run(unit)
        if outcome.verdict is not Verdict.APPLIED:
            raise transitions.stale(outcome.task, body.fence.attempt)
        return outcome

    def tell_of_damage(self, task_seq: int, error: StoreError) -> None:
        """
        Tell whoever waits for the end of a task what keeps it from the file, if it is the file itself.

        A repair may still make it go, so it is tried again; that there is something to do, they must know.
        """
        if is_damage(error):
            self.feed.fail_waiters(task_seq, error)

    async def task(self, task_seq: int) -> Task:
        """Read one incarnation."""
        return await self.reader.run(lambda raw: transitions.by_seq(Transaction(raw, ""), task_seq))

    async def task_as_it_is(self, seen: Task) -> Task:
        """Read again a row that was seen before; see `transitions.as_it_is`."""
        return await self.look(lambda tx: transitions.as_it_is(tx, seen))

    async def task_by_id(self, scope: Scope, task_id: str) -> Task:
        """Read the live incarnation of an id, else the newest."""
        check_id("task id", task_id)
        return await self.look(lambda tx: transitions.find(tx, scope, task_id))

    async def check_session(self, scope: Scope) -> None:
        """
        Make sure the file has a session.

        Raises:
            UnknownSession: it has not.
        """
        if not await self.reader.rows(session_queries.SESSION, {"scope": str(scope)}):
            raise transitions.unknown_session(scope)

    async def list(self, wanted: TaskFilter) -> list[TaskRecord]:
        """
        Read the tasks a filter wants, by ``task_seq``.

        Raises:
            UnknownSession: the session of the filter is not in the file.
        """
        rows = await self.reader.rows(*queries.list_tasks(wanted))
        if not rows and wanted.scope is not None:
            await self.check_session(wanted.scope)
        records = []
        for number, row in enumerate(rows):
            await next_turn(number)
            records.append(queries.task_record(Task._make(row)))
        return records

    async def count(self, wanted: TaskFilter) -> int:
        """Return how many tasks a filter wants; see `list`."""
        found = int((await self.reader.rows(*queries.count_tasks(wanted)))[0][0])
        if not found and wanted.scope is not None:
            await self.check_session(wanted.scope)
        return found

    async def steps(self, task_seq: int) -> Sequence[StepRecord]:
        """Return what an incarnation remembers, in the order it was first noted."""

        def steps(tx: Transaction) -> list[Any]:
            transitions.by_seq(tx, task_seq)
            return tx.all(step_queries.STEPS, {"task_seq": task_seq})

        return [step_queries.step_record(StepRow._make(row)) for row in await self.look(steps)]

    async def look(self, function: Callable[[Transaction], T]) -> T:
        """Run a function of a transaction that only reads, on one state of the file."""
        return await self.reader.look(function)

    async def look_back(self, function: Callable[[Transaction], T]) -> T:
        """Do the same once what cancelled callers never heard of was taken back, unless that takes long."""
        if self.writer is not None:
            await self.writer.taken_back(_NOTING)
        return await self.look(function)

    async def outcome(self, task_seq: int, handle_id: str, holder: str, timeout: float | None) -> tuple[Task, bool]:
        """
        Wait until a task has ended and note that its outcome is handed out through the handle of the session *holder*.

        Return its row, and whether the handle has that note now. Whoever only reads does not read it in that sense, nor does who
        is cancelled before the outcome is handed out. With *timeout*, it is handed out after about so many seconds, even if the
        note is still to be stored.

        Raises:
            TimeoutError: *timeout* seconds passed before the end.
        """
        timeout = check_timeout(timeout)
        began = time.monotonic()
        writer = self.writer
        reading = self.readings.begin(task_seq, handle_id, holder)
        try:
            task = await self.end_within(task_seq, timeout)
            if not reading.is_noted and writer is not None and not self.is_closing:
                await self._note(writer, reading, None if timeout is None else timeout - (time.monotonic() - began))
            reading.is_handed_out = True
        finally:
            self.readings.end(reading)
            if reading.is_asked_for and not reading.is_handed_out and writer is not None:
                writer.take_back(reading.take_back)
        return task, reading.is_noted

    async def _note(self, writer: Writer, reading: Reading, within: float | None) -> None:
        """Note that an outcome, known by now, is handed out, in a commit of its own."""
        reading.is_asked_for = True
        try:
            async with asyncio.timeout(within if within is None else max(_NOTING, within)):
                reading.is_noted = await writer.run(reading.mark)
        except (StoreError, TimeoutError):
            # it may be handed out again
            log.warning("reading_not_noted", extra={"handle_id": reading.handle_id}, exc_info=True)

    # --- waiting ---

    async def end_within(self, task_seq: int, timeout: float | None) -> Task:
        """
        Wait until a task has ended, but no longer than *timeout* seconds; one that has is returned at any time-out.

        Raises:
            TimeoutError: it goes on.
        """
        timeout = check_timeout(timeout)
        if timeout is None:
            return await self.end_of(task_seq)
        task = await self.task(task_seq)
        if task.is_terminal:
            return task
        async with asyncio.timeout(timeout):
            return await self.end_of(task_seq)

    async def end_of(self, task_seq: int) -> Task:
        """Wait until a task has ended, without the slot of a body that waits, and return its row."""
        waiter = self.feed.wait_for_end(task_seq)
        try:
            row = await self._ended_already(task_seq)
            if row is None:
                row = await (waiter if self.runner is None else self.runner.wait_without_slot(waiter))
        finally:
            self.feed.forget(task_seq, waiter)
        return row or await self.task(task_seq)

    async def ends_of(self, task_seqs: Sequence[int]) -> Sequence[Task]:
        """Wait until each of several tasks has ended, as `end_of` does for one, and return their rows."""
        waiters = {task_seq: self.feed.wait_for_end(task_seq) for task_seq in task_seqs}
        try:
            rows = {task_seq: await self._ended_already(task_seq) for task_seq in task_seqs}
            missing = [waiters[task_seq] for task_seq, row in rows.items() if row is None]
            if missing:
                all_ended = asyncio.gather(*missing)
                await (all_ended if self.runner is None else self.runner.wait_without_slot(all_ended))
        finally:
            for task_seq, waiter in waiters.items():
                self.feed.forget(task_seq, waiter)
        return [rows[seq] or waiters[seq].result() or await self.task(seq) for seq in task_seqs]

    async def _ended_already(self, task_seq: int) -> Task | None:
        """Read a row, unless it is known to be live, and return it if it has its outcome; its waiter stands already."""
        if self.runner is not None and self.runner.is_live(task_seq):
            return None
        task = await self.task(task_seq)
        return task if task.is_terminal else None

    async def wait_aside(self, waits: Collection[asyncio.Future[Any]], *, first: bool = False) -> None:
        """Wait until all of several waits begun `aside` are over, or the *first*, without the slot of a body that waits."""
        wait = asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED) if first else all_over(waits)
        over: asyncio.Task[Any] = asyncio.create_task(wait, name="lash_store wait")
        try:
            await (over if self.runner is None else self.runner.wait_without_slot(over))
        finally:
            over.cancel()

    # --- cancelling ---

    async def cancel(
        self, task: Callable[[Transaction], Task], reason: str | None, timeout: float | None
    ) -> TaskRecord:
        """Request the cancel of the row a function of the transaction finds, and of all below it; wait for its stop."""
        timeout = check_timeout(timeout)
        if reason is not None:
            check_text("reason", reason)
        writer, requester = self.to_request(), self.requester
        outcomes = await writer.run(lambda tx: transitions.request_cancel(tx, task(tx), reason, requester))
        return await self.confirmed([outcome.task for outcome in outcomes], timeout)

    async def confirmed(self, tasks: Sequence[Task], timeout: float | None) -> TaskRecord:
        """Wait for the end of the first of cancelled tasks; none of them waits for an owner that is dead."""
        row = tasks[0]
        if await self.finish_for_the_dead(tasks):
            row = await self.task(row.task_seq)
        if not row.is_terminal:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    return queries.task_record(await self._confirmed(row))
            row = await self.task(row.task_seq)
        return queries.task_record(row)

    async def _confirmed(self, task: Task) -> Task:
        """Wait for the end of a cancelled task, looking whether its owner still lives if that is somebody else."""
        pause = None if task.owner_id == self.owner_id and not task.is_external else _LOOK
        while not task.is_terminal:
            if task.owner_id is None and task.awaits_callback:
                # nobody can call it before the work is registered again
                return task
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    return await self.end_of(task.task_seq)
            task = await self.task(task.task_seq)
            if await self.finish_for_the_dead([task]):
                task = await self.task(task.task_seq)
        return task

    async def finish_for_the_dead(self, tasks: Iterable[Task | TaskRecord]) -> bool:
        """
        End what was cancelled of the owners of some tasks, as far as they are dead, or have closed and left it, or of nobody.

        Return whether there was such an owner. One look an owner, one unit for all.
        """
        live = [task for task in tasks if not task.is_terminal]
        owner_ids = {task.owner_id for task in live} - {None, self.owner_id}
        rows = {owner_id: await self._owner(owner_id) for owner_id in owner_ids if owner_id is not None}

        def is_over(task: Task | TaskRecord) -> bool:
            return task.owner_id is None or not leftovers.runs_on(task, rows.get(task.owner_id))

        gone = [
            owner_id
            for owner_id, owner in rows.items()
            if self._is_gone(owner) and any(is_over(task) for task in live if task.owner_id == owner_id)
        ]
        # given up by a person, with a process that may live
        free = [task.task_seq for task in live if task.owner_id is None and task.process is not None]
        if not gone and not free:
            return False
        writer = self.to_request()
        left = [
            task
            for task in await leftovers.left_by(self.reader, gone, None)
            if task.state == TaskState.CANCEL_REQUESTED and (task.owner_id in gone or task.task_seq in free)
        ]

        is_copy = await self._is_copy()

        def is_settled(task: Task, fates: Fates) -> bool:
            return is_copy or leftovers.is_settled(task, fates)

        async def finish(fates: Fates) -> None:
            def is_gone(task: Task) -> bool:
                return is_settled(task, fates) and is_over(task)

            await writer.run(lambda tx: transitions.finish_cancels(tx, gone, free, is_gone))

        fates = await leftovers.look(left)
        await finish(fates)
        self._end_processes([task for task in left if not is_settled(task, fates)], finish)
        return True

    async def _is_copy(self) -> bool:
        """Whether what runs by the rows runs for the file's original, and is let be."""
        return await self.reader.run(copies.is_copy)

    def _end_processes(
        self, living: Sequence[Task], then: Callable[[Fates], Awaitable[None]]
    ) -> Sequence[asyncio.Task[None]]:
        """Begin to end what runs for tasks, each once, and return what can be waited for; who waits may be cancelled."""

        async def end(task: Task) -> None:
            try:
                await then(await leftovers.end([task], self.cancel_grace))
            except (StoreError, OSError):
                log.warning("process_left", extra={"task_seq": task.task_seq}, exc_info=True)
            finally:
                del self.endings[task.task_seq]

        for task in living:
            if task.task_seq not in self.endings:
                ending = asyncio.create_task(end(task), name=f"lash_store leftover {task.id}")
                self.endings[task.task_seq] = ending
        return [self.endings[task.task_seq] for task in living]

    async def end_given_up(self, tasks: Iterable[Task]) -> None:
        """End what runs for tasks that somebody gave up, whose owners may never come to it; their rows tell of that already."""

        async def nothing(fates: Fates) -> None:
            pass

        left = [task for task in tasks if task.process is not None]
        endings = [] if not left or await self._is_copy() else self._end_processes(left, nothing)
        if endings:
            await asyncio.wait(endings)

    async def end_endings(self, timeout: float | None) -> None:
        """Wait up to *timeout* seconds for what is being ended, then kill it."""
        endings = set(self.endings.values())
        if endings:
            _, late = await asyncio.wait(endings, timeout=timeout)
            for ending in late:
                ending.cancel()
            await asyncio.wait(endings)

    async def tidy_up_for_the_dead(self, tasks: Iterable[Task | TaskRecord]) -> None:
        """Do the same if it can be done: what was asked for is in the file by now, whatever comes of this."""
        try:
            await self.finish_for_the_dead(tasks)
        except (StoreError, OSError):
            log.warning("dead_owners_left", exc_info=True)

    async def is_gone(self, owner_id: int) -> bool:
        """Say whether an owner has ended, or its lock is free."""
        return self._is_gone(await self._owner(owner_id))

    async def _owner(self, owner_id: int) -> OwnerRow | None:
        rows = await self.reader.rows(queries.OWNER, {"owner_id": owner_id})
        # none: somebody's hand took its row away, or gave the task a number that nobody has
        return OwnerRow._make(rows[0]) if rows else None

    def _is_gone(self, owner: OwnerRow | None) -> bool:
        return owner is None or owner.ended_at is not None or owners.life_of(self.path, owner) is Life.DEAD

    @property
    def requester(self) -> str:
        """Who asks, for the row and the event of a cancel."""
        return f"{self.runtime} pid {os.getpid()} on {platform.node()}"
