"""Owns the cancel callbacks of external work that is registered here: each is called at most once, and bounded in time."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import queries, transitions
from .commands import BeginCallback, Fence
from .errors import CommitInDoubt, StorageError, StorageMoved
from .failures import failure_of
from .lifecycle import Task
from .models import TaskRecord, Verdict
from .threads import in_thread
from .transaction import Committed
from .transitions import Outcome
from .writer import Unit, Writer

__all__ = ["Callback", "Callbacks"]

Callback = Callable[..., Any]
"""Called without arguments, or with the task's record if it has a parameter for it; an ``async def``, or a plain function."""

log = logging.getLogger(__name__)

_RETRY = 0.5
"""Seconds between tries to store what became of a callback on a full or busy disk."""


class Callbacks:
    """
    Calls the callbacks of tasks whose books *owner_id* keeps, when a cancel request is committed by whatever process.

    That the call begins is committed first, so a crash cannot repeat it; after *timeout* seconds the cancel goes on without it.
    """

    def __init__(self, writer: Writer, *, owner_id: int, timeout: float) -> None:
        self._writer = writer
        self._owner_id = owner_id
        self._timeout = timeout
        self._callbacks: dict[int, Callback] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._closing = False

    def holds(self, task_seq: int) -> bool:
        """Whether the cancel of a task would call something here."""
        return task_seq in self._callbacks

    def react(self, events: Sequence[Committed]) -> None:
        """Act on events this process committed, each with the row after it."""
        for event in events:
            task = event.task
            if task is None or not task.is_external:
                continue
            if task.owner_id != self._owner_id:
                self._callbacks.pop(task.task_seq, None)
            elif event.local is not None:
                self._callbacks[task.task_seq] = event.local
            self._look(task)

    def compare(self, tasks: Iterable[Task]) -> None:
        """Act on rows read from the file, which may be older than what is known here."""
        for task in tasks:
            if task.is_external:
                self._look(task)

    def _look(self, task: Task) -> None:
        if task.is_terminal:
            self._callbacks.pop(task.task_seq, None)
        elif task.awaits_callback and task.owner_id == self._owner_id and not self._closing:
            callback = self._callbacks.pop(task.task_seq, None)
            if callback is not None:
                call = asyncio.create_task(self._call(task, callback), name=f"lash_store callback {task.id}")
                self._calls[task.task_seq] = call
                call.add_done_callback(lambda _: self._calls.pop(task.task_seq, None))

    async def _call(self, task: Task, callback: Callback) -> None:
        fence = Fence(task.attempt, self._owner_id)
        begun = await self._store(lambda tx: transitions.transition(tx, task, BeginCallback(fence), fresh=False))
        if begun is None or begun.verdict is not Verdict.APPLIED:
            return
        error = await self._bounded(callback, queries.task_record(begun.task))
        failure = None if error is None else failure_of(error)
        await self._store(lambda tx: transitions.end_called(tx, task.task_seq, fence, failure))
        if error is not None:
            # last: a handler of the host program may fail
            log.warning("callback_failed", extra={"task_seq": task.task_seq}, exc_info=error)

    async def _store(self, unit: Unit[Outcome]) -> Outcome | None:
        """Store what happened, trying again for as long as the store is open; None if it never will be."""
        while True:
            try:
                return await self._writer.run(unit)
            except (CommitInDoubt, StorageMoved):
                return None
            except StorageError:
                log.warning("callback_not_stored", exc_info=True)
                if self._closing:
                    return None
                await asyncio.sleep(_RETRY)

    async def _bounded(self, callback: Callback, record: TaskRecord) -> BaseException | None:
        """Call it, for no longer than it may take, and return what it raised; one that does not stop is left behind."""
        call = asyncio.create_task(_invoke(callback, record), name=f"lash_store call {record.id}")
        self._late.add(call)
        call.add_done_callback(self._late.discard)
        try:
            done, _ = await asyncio.wait({call}, timeout=self._timeout)
        except asyncio.CancelledError:
            call.cancel()
            raise
        if not done:
            call.cancel()
            return TimeoutError(f"the callback took longer than {self._timeout:g} s")
        return asyncio.CancelledError("the callback was cancelled") if call.cancelled() else call.result()

    async def detach(self, timeout: float | None) -> None:
        """Begin no more calls, and wait up to *timeout* seconds for those that have begun."""
        self._closing = True
        calls = set(self._calls.values())
        if calls:
            _, late = await asyncio.wait(calls, timeout=timeout)
            await _cancel_all(late)
        await _cancel_all(set(self._late), 0.1)

    def stop(self) -> None:
        """End every call: the file is out of reach."""
        self._closing = True
        self._callbacks.clear()
        for call in (*self._calls.values(), *self._late):
            call.cancel()


async def _cancel_all(calls: set[asyncio.Task[Any]], patience: float | None = None) -> None:
    for call in calls:
        call.cancel()
    if calls:
        await asyncio.wait(calls, timeout=patience)


async def _invoke(callback: Callback, record: TaskRecord) -> BaseException | None:
    arguments = (record,) if _wants_record(callback) else ()
    try:
        if inspect.iscoroutinefunction(callback):
            await callback(*arguments)
        else:
            returned = await in_thread(callback, *arguments)
            if inspect.isawaitable(returned):
                await returned
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        # SystemExit and KeyboardInterrupt of a callback are the callback's, not the loop's
        return error
    return None


def _wants_record(callback: Callback) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        for parameter in inspect.signature(callback).parameters.values():
            positional = parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
            return positional and parameter.default is parameter.empty
    return False
