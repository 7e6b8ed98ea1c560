"""Owns what sessions and handles share of an open store: reading rows, waiting for ends, and seeing a cancel through."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import owners, queries, transitions
from .database import Reader, Transaction
from .errors import StoreClosed, StoreReadOnly
from .feed import Feed
from .lifecycle import Task
from .models import Scope, TaskFilter, TaskRecord, check_id, check_text
from .owners import Life
from .queries import OwnerRow
from .registry import Registry
from .runner import Runner
from .writer import Writer

__all__ = ["Core"]

_LOOK = 0.25
"""Seconds between looks at the lock of another process's owner while its confirmation of a cancel is awaited."""


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
    writer: Writer | None = None
    owner_id: int | None = None
    runner: Runner | None = None
    is_closing: bool = False

    def to_request(self) -> Writer:
        """
        Return the writer for a request.

        Raises:
            StoreReadOnly, StoreClosed: this store may not, or no more.
        """
        if self.is_closing:
            raise StoreClosed(f"the store on {self.path} is closed: open it again")
        if self.writer is None:
            raise StoreReadOnly(f"{self.path} was opened read-only: open it with TaskStore.connect() to make requests")
        return self.writer

    def to_create(self) -> tuple[Runner, int]:
        """Return the runner and the owner id for new work; see `to_request`."""
        self.to_request()
        if self.runner is None or self.owner_id is None:
            raise StoreReadOnly(f"{self.path} was opened by connect(), to make requests: open a TaskStore to create")
        return self.runner, self.owner_id

    async def task(self, task_seq: int) -> Task:
        """Read one incarnation."""
        rows = await self.reader.rows(queries.TASK_BY_SEQ, {"task_seq": task_seq})
        if not rows:
            raise transitions.task_not_found_by_seq(task_seq)
        return Task._make(rows[0])

    async def task_by_id(self, scope: Scope, task_id: str) -> Task:
        """Read the live incarnation of an id, else the newest."""
        check_id("task id", task_id)
        rows = await self.reader.rows(queries.TASK_BY_ID, {"scope": str(scope), "id": task_id})
        if rows:
            return Task._make(rows[0])
        await self.check_session(scope)
        raise transitions.task_not_found(scope, task_id)

    async def check_session(self, scope: Scope) -> None:
        """
        Make sure the file has a session.

        Raises:
            UnknownSession: it has not.
        """
        if not await self.reader.rows(queries.SESSION, {"scope": str(scope)}):
            raise transitions.unknown_session(scope)

    async def list(self, wanted: TaskFilter) -> list[TaskRecord]:
        """Read the tasks a filter wants, by ``task_seq``."""
        rows = await self.reader.rows(*queries.list_tasks(wanted))
        return [queries.task_record(Task._make(row)) for row in rows]

    # --- waiting ---

    async def end_within(self, task_seq: int, timeout: float | None) -> Task:
        """
        Wait until a task has ended, but no longer than *timeout* seconds; one that has is returned at any time-out.

        Raises:
            TimeoutError: it goes on.
        """
        if timeout is None:
            return await self.end_of(task_seq)
        task = await self.task(task_seq)
        if task.is_terminal:
            return task
        async with asyncio.timeout(timeout):
            return await self.end_of(task_seq)

    async def end_of(self, task_seq: int) -> Task:
        """Wait until a task has ended and return its row; gives back the slot of a body that waits."""
        waiter = self.feed.wait_for_end(task_seq)
        try:
            if self.runner is None or not self.runner.is_live(task_seq):
                task = await self.task(task_seq)
                if task.is_terminal:
                    return task
            if self.runner is None:
                ended = await waiter
            else:
                ended = await self.runner.wait_without_slot(waiter)
        finally:
            self.feed.forget(task_seq, waiter)
        return await self.task(task_seq) if ended is None else ended

    # --- cancelling ---

    async def cancel(
        self, task: Callable[[Transaction], Task], reason: str | None, timeout: float | None
    ) -> TaskRecord:
        """Request the cancel of the row a function of the transaction finds, and wait for the body's stop."""
        if reason is not None:
            check_text("reason", reason)
        writer, requester = self.to_request(), _requester(self.runtime)
        outcome = await writer.run(lambda tx: transitions.request_cancel(tx, task(tx), reason, requester))
        row = await self._finished_for_the_dead(writer, outcome.task)
        if not row.is_terminal:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    return queries.task_record(await self._confirmed(writer, row))
            row = await self.task(row.task_seq)
        return queries.task_record(row)

    async def _confirmed(self, writer: Writer, task: Task) -> Task:
        """Wait for the end of a cancelled task, looking whether its owner still lives if that is somebody else."""
        pause = None if task.owner_id == self.owner_id else _LOOK
        while not task.is_terminal:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    return await self.end_of(task.task_seq)
            task = await self._finished_for_the_dead(writer, task)
        return task

    async def _finished_for_the_dead(self, writer: Writer, task: Task) -> Task:
        """End a cancelled task if its owner is dead, or has closed and left it; return the row."""
        owner_id = task.owner_id
        if task.is_terminal or owner_id is None or owner_id == self.owner_id:
            return task
        owner = OwnerRow._make((await self.reader.rows(queries.OWNER, {"owner_id": owner_id}))[0])
        if owner.ended_at is None and owners.life_of(self.path, owner) is not Life.DEAD:
            return task
        outcome = await writer.run(lambda tx: transitions.finish_cancel(tx, task.task_seq, owner_id))
        return outcome.task


def _requester(runtime: str | None) -> str:
    """Name who asks, for the row and the event of a cancel."""
    return f"{runtime} pid {os.getpid()} on {platform.node()}"
