"""Owns what a session may do with its tasks: spawn, see, await and cancel them; builds units, and nothing else."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any

from pydantic import JsonValue

from . import queries, transitions
from .core import Core
from .errors import InvalidArguments, InvalidId, TaskAbandoned, TaskCancelled, TaskFailed
from .feed import Subscription
from .lifecycle import TERMINAL_EVENTS, Task
from .models import (
    CancelPolicy,
    EventType,
    Evidence,
    Failure,
    Recovery,
    Scope,
    TaskEvent,
    TaskFilter,
    TaskKind,
    TaskMode,
    TaskRecord,
    TaskState,
    check_id,
)
from .registry import Function
from .transitions import NewTask

__all__ = ["SessionTasks", "TaskHandle", "owner_handle"]


class TaskHandle:
    """
    A session's right to see and steer one incarnation of a task.

    ``await handle`` gives the result. Cancelling who waits never cancels the task.
    """

    def __init__(self, core: Core, task: Task, handle_id: str) -> None:
        self._core = core
        self._task = task
        self.handle_id = handle_id

    def __repr__(self) -> str:
        return f"<TaskHandle {self._task.scope}/{self.id} #{self.task_seq}>"

    @property
    def id(self) -> str:
        """The task's id in its session."""
        return self._task.id

    @property
    def task_seq(self) -> int:
        """The number of this incarnation, for ever."""
        return self._task.task_seq

    @property
    def scope(self) -> Scope:
        """The session the task was in when the handle was made."""
        return Scope.parse(self._task.scope)

    def __await__(self) -> Generator[Any, None, JsonValue]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> JsonValue:
        """
        Wait for the end and return the result: the stored JSON value, the same in every process.

        Raises:
            TaskFailed, TaskCancelled, TaskAbandoned: how else it ended.
            TimeoutError: *timeout* seconds passed; the task goes on.
            StoreClosed: the store closed meanwhile; the task's row tells the rest.
        """
        task = await self._core.end_within(self.task_seq, timeout)
        match task.state:
            case TaskState.FAILED:
                failure = Failure.model_validate_json(task.failure or "{}")
                message = f"task {task.id!r} failed: {failure.type}: {failure.message}"
                raise TaskFailed(message, task_id=task.id, failure=failure)
            case TaskState.CANCELLED:
                because = "" if task.cancel_reason is None else f": {task.cancel_reason}"
                raise TaskCancelled(
                    f"task {task.id!r} was cancelled{because}", task_id=task.id, reason=task.cancel_reason
                )
            case TaskState.ABANDONED:
                evidence = Evidence.model_validate_json(task.evidence or "{}")
                message = f"task {task.id!r} was abandoned: its owner {evidence.owner_id} {evidence.end}; the outcome is unknown"
                raise TaskAbandoned(message, task_id=task.id, evidence=evidence)
        value: JsonValue = json.loads(task.result or "null")
        return value

    async def wait(self, timeout: float | None = None) -> TaskRecord:
        """
        Wait for the end and return the row, whatever the outcome; after *timeout* seconds, the row as it stands.

        Raises:
            StoreClosed: the store closed meanwhile.
        """
        try:
            return queries.task_record(await self._core.end_within(self.task_seq, timeout))
        except TimeoutError:
            return await self.record()

    async def record(self) -> TaskRecord:
        """
        Return the row as it stands.

        Raises:
            TaskNotFound: it is not in the file any more.
        """
        return queries.task_record(await self._core.task(self.task_seq))

    async def cancel(self, reason: str | None = None, *, timeout: float | None = None) -> TaskRecord:
        """Ask this incarnation to stop; see `SessionTasks.cancel`."""
        return await self._core.cancel(lambda tx: transitions.by_seq(tx, self.task_seq), reason, timeout)

    async def events(self) -> AsyncIterator[TaskEvent]:
        """Yield this incarnation's events from its first, in order, and end after the one that ends it."""
        async for event in self._core.feed.subscribe(0, task_seq=self.task_seq):
            yield event
            if event.type in TERMINAL_EVENTS:
                return


async def owner_handle(core: Core, task: Task) -> TaskHandle:
    """Read the handle a task was born with."""
    rows = await core.reader.rows(queries.OWNER_HANDLE, {"task_seq": task.task_seq})
    return TaskHandle(core, task, rows[0][0])


class SessionTasks:
    """The background-task capability of one session: every method works on the tasks of its scope alone."""

    def __init__(self, core: Core, scope: Scope) -> None:
        self._core = core
        self._scope = scope

    def __repr__(self) -> str:
        return f"<SessionTasks {self._scope}>"

    @property
    def scope(self) -> Scope:
        """The key every row of the session carries."""
        return self._scope

    async def spawn(
        self,
        fn: Callable[..., Any] | Coroutine[Any, Any, Any],
        *args: Any,
        id: str | None = None,
        kind: TaskKind = TaskKind.OTHER,
        cancel_policy: CancelPolicy | None = None,
        **kwargs: Any,
    ) -> TaskHandle:
        """
        Start a task: a registered function with its arguments, or a coroutine object.

        The task, its first event and its handle are durable when this returns; the body starts when a slot is free. Without an
        *id* one is made. A finished task of the id is succeeded by a new incarnation. A coroutine object cannot be run again: if
        its owner goes away the task is abandoned; one that is refused is closed. Registered functions are cancelled
        cooperatively by default, coroutine objects at once.

        Raises:
            TaskExists: a live task has the id.
            UnknownFunction, InvalidArguments: not registered here, or the arguments do not fit.
            InvalidId: an id that cannot be stored.
        """
        coroutine = fn if inspect.iscoroutine(fn) else None
        try:
            runner, owner_id = self._core.to_create()
            reserved = _RESERVED & kwargs.keys()
            if reserved:
                raise InvalidArguments(
                    f"{sorted(reserved)} are words of spawn() itself: give the function's own by position"
                )
            function = None if coroutine is not None else self._core.registry.by_body(fn)  # type: ignore[arg-type]
            new = self._new_task(owner_id, function, coroutine, args, kwargs, id, TaskKind(kind), cancel_policy)
            created = runner.create(lambda start: lambda tx: transitions.create(tx, new, start=start))
        except BaseException:
            if coroutine is not None:
                coroutine.close()
            raise
        if coroutine is not None:
            # the commit adopts the coroutine or nobody does, whether or not the caller is still there to hear of it
            created.add_done_callback(lambda future: _close_if_refused(coroutine, future))
        return TaskHandle(self._core, await asyncio.shield(created), new.handle_id)

    def _new_task(
        self,
        owner_id: int,
        function: Function | None,
        coroutine: Coroutine[Any, Any, Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        task_id: str | None,
        kind: TaskKind,
        cancel_policy: CancelPolicy | None,
    ) -> NewTask:
        if coroutine is not None:
            if args or kwargs:
                raise InvalidArguments("a coroutine object has its arguments already: spawn(fn(…)) or spawn(fn, …)")
            label = getattr(coroutine, "__name__", "coroutine")
        else:
            assert function is not None
            label = function.name
        if task_id is None:
            task_id = f"{label.removeprefix('h-')[:200]}-{_base32(int.from_bytes(os.urandom(8)), 12, _PAIRS)}"
        elif check_id("task id", task_id).startswith("h-"):
            raise InvalidId(f"task id {task_id!r} begins with 'h-', as handle ids do: choose another")
        default = CancelPolicy.ABORT_LOCAL if function is None else CancelPolicy.COOPERATIVE
        return NewTask(
            scope=self._scope,
            id=task_id,
            kind=kind,
            mode=TaskMode.MANAGED,
            label=label,
            function=None if function is None else function.name,
            recovery=Recovery.OWNER_BOUND if function is None else function.recovery,
            cancel_policy=default if cancel_policy is None else CancelPolicy(cancel_policy),
            arguments=None if function is None else function.bind(args, kwargs),
            max_attempts=1 if function is None else function.max_attempts,
            owner_id=owner_id,
            handle_id=_new_handle_id(),
            body=coroutine,
        )

    async def get(self, id: str) -> TaskRecord:
        """
        Return the row of the live task of an id, else of the newest.

        Raises:
            TaskNotFound: no such task in this session.
        """
        return queries.task_record(await self._core.task_by_id(self._scope, id))

    async def handle(self, id: str) -> TaskHandle:
        """
        Return a handle on the live task of an id, else on the newest; it stays on that incarnation.

        Raises:
            TaskNotFound: no such task in this session.
        """
        return await owner_handle(self._core, await self._core.task_by_id(self._scope, id))

    async def list(
        self,
        *,
        kinds: Iterable[TaskKind] | None = None,
        states: Iterable[TaskState] | None = None,
        include_terminal: bool = False,
        include_hidden: bool = False,
        after_seq: int = 0,
        limit: int | None = None,
    ) -> Sequence[TaskRecord]:
        """Return the session's live tasks by ``task_seq``; naming a terminal state includes it."""
        wanted = TaskFilter(
            scope=self._scope,
            kinds=None if kinds is None else frozenset(map(TaskKind, kinds)),
            states=None if states is None else frozenset(map(TaskState, states)),
            include_terminal=include_terminal,
            include_hidden=include_hidden,
            after_seq=after_seq,
            limit=limit,
        )
        return await self._core.list(wanted)

    async def cancel(self, id: str, reason: str | None = None, *, timeout: float | None = None) -> TaskRecord:
        """
        Ask a task to stop and return its row.

        The request is durable when this returns. The row says ``cancelled`` only once the body has stopped; after *timeout*
        seconds the row comes back as it stands. A body that finishes first wins. A finished task comes back unchanged.

        Raises:
            TaskNotFound: no such task in this session.
        """
        check_id("task id", id)
        return await self._core.cancel(lambda tx: transitions.find(tx, self._scope, id), reason, timeout)

    def events(self, after: int | None = None, *, types: Iterable[EventType] | None = None) -> Subscription:
        """Return the session's events after a cursor; see `TaskStore.events`."""
        return self._core.feed.subscribe(after, scope=self._scope, types=types)


def _close_if_refused(coroutine: Coroutine[Any, Any, Any], stored: asyncio.Future[Task]) -> None:
    if stored.cancelled() or stored.exception() is not None:
        coroutine.close()


_RESERVED = frozenset({"parent", "child_session_id", "close_policy", "timeout", "idempotency_key", "notify_on_end"})
"""What `spawn` will say about a task some day must not reach its function today."""

_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_BASE32HEX = "0123456789abcdefghijklmnopqrstuv"
"""RFC 4648, sections 6 and 7: the second sorts as its numbers do."""


def _pairs(digits: str) -> list[str]:
    return [high + low for high in digits for low in digits]


_PAIRS, _SORTED_PAIRS = _pairs(_BASE32), _pairs(_BASE32HEX)


def _base32(number: int, digits: int, pairs: list[str]) -> str:
    return "".join([pairs[number >> shift & 1023] for shift in range(5 * digits - 10, -1, -10)])


def _new_handle_id() -> str:
    """
    Make a handle id: ``h-`` and 26 characters, the time in milliseconds first and 80 random bits after it.

    The order of ULIDs (github.com/ulid/spec), so that the index over a long history grows at its end.
    """
    number = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    return f"h-{_base32(number, 26, _SORTED_PAIRS)}"
