"""Owns a session's right to one task: what it can be named by, what it shows, and the outcome it hands out once."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import AsyncIterator, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import JsonValue

from . import memory, queries, session_queries, transitions
from .core import Core
from .errors import (
    HandleNotVisible,
    InvalidId,
    StoreClosed,
    TaskAbandoned,
    TaskCancelled,
    TaskError,
    TaskFailed,
    TaskNotFound,
    shown,
)
from .lifecycle import TERMINAL_EVENTS, Task
from .models import (
    EventType,
    Evidence,
    Failure,
    HandleRole,
    Scope,
    StepRecord,
    TaskEvent,
    TaskRecord,
    TaskState,
    Transition,
    check_id,
)
from .registry import from_json, to_json
from .transaction import Transaction
from .transitions import Outcome

if TYPE_CHECKING:
    from .sessions import SessionTasks

__all__ = ["Reference", "TaskHandle", "new_handle_id", "outcome_error", "owner_handle", "reference", "references"]


class TaskHandle:
    """
    A session's right to see one incarnation of a task and, for the one *owner* handle it has, to steer it.

    ``await handle`` gives the result. Cancelling who waits never cancels the task.
    """

    def __init__(self, core: Core, task: Task, handle_id: str, *, observer: Scope | None = None) -> None:
        self._core = core
        self._task = task
        self._holder = task.scope if observer is None else str(observer)
        self._is_read = False
        self.handle_id = handle_id
        self.role = HandleRole.OWNER if observer is None else HandleRole.OBSERVER

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

    def to_json(self) -> dict[str, str]:
        """Return what a model can carry: ``{"__handle__": "task", "id": <handle id>, "tool": <the task's label>}``."""
        return {"__handle__": "task", "id": self.handle_id, "tool": self._task.label}

    @classmethod
    async def from_json(cls, session: SessionTasks, value: Mapping[str, Any] | str) -> TaskHandle:
        """
        Read a handle back in the session that has it, from what `to_json` gave or the text of that.

        Raises:
            InvalidId: not the form that `to_json` gives.
            TaskPruned: it owned a task that is not in the file any more.
            HandleNotVisible: the session has no such handle, or not any more; an observer's goes with its task.
        """
        if not hasattr(session, "scope"):
            raise TypeError(f"from_json() is given the session that has the handle, not {type(session).__name__}")
        if isinstance(value, str):
            value = _parsed(value)
        if not isinstance(value, Mapping):
            raise InvalidId(f"a handle's JSON is an object, not {type(value).__name__}")
        name = reference(value)
        try:
            return await session.handle(name)
        except TaskNotFound as error:
            raise HandleNotVisible(f"session {str(session.scope)!r} has no handle {name!r}", missing=(name,)) from error

    def __await__(self) -> Generator[Any, None, JsonValue]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> JsonValue:
        """
        Wait for the end and return the result: the stored JSON value, the same in every process.

        That the outcome was handed out, whatever it is, is noted with the handle first, unless the task was given to another
        session since: a finished task that was read is not handed over any more.

        Raises:
            TaskFailed, TaskCancelled, TaskAbandoned: how else it ended.
            TimeoutError: *timeout* seconds passed; the task goes on.
            StoreClosed: the store closed meanwhile; the task's row tells the rest.
            StorageError: it ended, and that cannot be stored, for the file is damaged (`StorageCorrupt`) or a counter in it at
                its end; the store goes on trying.
        """
        if self._is_read:
            task = await self._core.end_within(self.task_seq, timeout)
        else:
            task, self._is_read = await self._core.outcome(self.task_seq, self.handle_id, self._holder, timeout)
        error = outcome_error(task)
        if error is not None:
            raise error
        with queries.readable(f"the result of task #{self.task_seq}"):
            value: JsonValue = from_json(task.result or "null")
        return value

    async def wait(self, timeout: float | None = None) -> TaskRecord:
        """
        Wait for the end and return the row, whatever the outcome; after *timeout* seconds, the row as it stands.

        The outcome still counts as unread.

        Raises:
            StoreClosed: the store closed meanwhile.
            StorageError: it ended, and that cannot be stored, for the file is damaged (`StorageCorrupt`) or a counter in it at
                its end; the store goes on trying.
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
        """
        Ask this incarnation to stop; see `SessionTasks.cancel`.

        Raises:
            HandleNotVisible: the handle only observes.
        """
        refuse_observer(self.handle_id, self.role)
        return await self._core.cancel(lambda tx: transitions.by_seq(tx, self.task_seq), reason, timeout)

    async def signal(self, name: str, payload: Any = None, *, key: str | None = None) -> Transition:
        """
        Send a signal to this incarnation's body, which receives it by ``task.signal(name)``; from any process.

        Durable on return: ``applied``. Signals of a name are received in the order they were sent, also by a body that does not
        run yet. With a *key* it is sent once, however often this is called: again it is ``unchanged``. A finished task takes
        none: ``superseded``.

        Raises:
            HandleNotVisible: the handle only observes.
            IdempotencyConflict: the *key* was used for another signal.
            TaskError: external work has no body here.
            InvalidId, ResultNotSerializable, LimitExceeded: a name, key or payload that cannot be stored.
        """
        refuse_observer(self.handle_id, self.role)
        check_id("signal name", name)
        if key is not None:
            check_id("signal key", key)
        core, what = self._core, f"the payload of signal {name!r}"
        text = core.limits.check_payload(to_json(payload, what), what)

        def unit(tx: Transaction) -> Outcome:
            return memory.send_signal(tx, transitions.by_seq(tx, self.task_seq), name, key, text, core.requester)

        outcome = await core.to_request().run(unit)
        return Transition(record=queries.task_record(outcome.task), verdict=outcome.verdict)

    async def steps(self) -> Sequence[StepRecord]:
        """
        Return what this incarnation remembers, in the order it was first noted: its checkpoint, its steps and its sleeps.

        Raises:
            TaskPruned: it is not in the file any more.
        """
        return await self._core.steps(self.task_seq)

    async def events(self) -> AsyncIterator[TaskEvent]:
        """
        Yield this incarnation's events from its first, in order, and end after the one that ends it.

        Raises:
            StoreClosed: the store closed before.
            TaskPruned: it is not in the file any more.
        """
        async for event in self._core.feed.subscribe(0, task_seq=self.task_seq):
            if event.type is EventType.PRUNED:
                await self._core.task(self.task_seq)
            yield event
            if event.type in TERMINAL_EVENTS:
                return
        raise StoreClosed(f"the store closed before task {self.id!r} ended: open it again to follow the task")


async def owner_handle(core: Core, task: Task) -> TaskHandle:
    """Read the handle a task was born with."""
    rows = await core.reader.rows(session_queries.OWNER_HANDLE, {"task_seq": task.task_seq})
    row = session_queries.owner_handle_of(rows[0] if rows else None, task.task_seq)
    return TaskHandle(core, task, row.handle_id)


def refuse_observer(handle_id: str, role: str) -> None:
    """
    Refuse what only the owner handle allows.

    Raises:
        HandleNotVisible: it is an observer's.
    """
    if role != HandleRole.OWNER:
        raise HandleNotVisible(
            f"handle {handle_id!r} observes: only the task's own session may do that", missing=(handle_id,)
        )


def outcome_error(task: Task) -> TaskError | None:
    """Return what awaiting a finished task raises, if it did not complete."""
    with queries.readable(f"the outcome of task #{task.task_seq}"):
        return _outcome_error(task)


def _outcome_error(task: Task) -> TaskError | None:
    match task.state:
        case TaskState.FAILED:
            failure = Failure.model_validate_json(task.failure or "{}")
            message = f"task {task.id!r} failed: {failure.type}: {failure.message}"
            return TaskFailed(message, task_id=task.id, failure=failure)
        case TaskState.CANCELLED:
            because = "" if task.cancel_reason is None else f": {task.cancel_reason}"
            message = f"task {task.id!r} was cancelled{because}"
            return TaskCancelled(message, task_id=task.id, reason=task.cancel_reason)
        case TaskState.ABANDONED:
            evidence = Evidence.model_validate_json(task.evidence or "{}")
            why = f"its owner {evidence.owner_id} {evidence.end}" if evidence.reason is None else evidence.reason
            message = f"task {task.id!r} was abandoned: {why}; the outcome is unknown"
            return TaskAbandoned(message, task_id=task.id, evidence=evidence)
    return None


# --- naming tasks ---------------------------------------------------------------------------------------------------

Reference: TypeAlias = TaskHandle | str | Mapping[str, Any]
"""What names a task in its session: a handle, a handle's id, its JSON, or the task's id."""


def reference(value: Reference) -> str:
    """
    Return the handle id or task id that a reference stands for.

    Raises:
        InvalidId: it is none.
    """
    if isinstance(value, TaskHandle):
        return value.handle_id
    if isinstance(value, str) and value.startswith("{") and '"__handle__"' in value:
        value = _parsed(value)
    if isinstance(value, Mapping):
        name = value.get("id")
        if value.get("__handle__") != "task" or not isinstance(name, str) or not name.startswith("h-"):
            raise InvalidId(f'{shown(dict(value))} is no handle: its JSON is {{"__handle__": "task", "id": "h-…"}}')
        return check_id("handle id", name)
    return check_id("task id", value)


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidId(f"{shown(text)} begins as a handle's JSON does, and is none: {error}") from error
    if not isinstance(value, dict):
        raise InvalidId(f"{shown(text)} is no handle's JSON")
    return value


def references(values: Iterable[Reference]) -> list[str]:
    """
    Return what several references stand for.

    Raises:
        InvalidId: one of them is none, or one was given where several belong.
    """
    if isinstance(values, str | bytes | bytearray | Mapping | TaskHandle) or not isinstance(values, Iterable):
        raise InvalidId(f"give a list of handles or ids, not one {type(values).__name__}")
    return [reference(value) for value in values]


# --- ids ------------------------------------------------------------------------------------------------------------

BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_BASE32HEX = "0123456789abcdefghijklmnopqrstuv"
"""RFC 4648, sections 6 and 7: the second sorts as its numbers do."""


_LETTERS, _SORTED_LETTERS = (digits.encode() * 8 for digits in (BASE32, _BASE32HEX))
"""What stands for each value of a random byte: eight of them for a letter."""


def _random(letters: bytes, count: int) -> str:
    """Return letters of five random bits each."""
    return os.urandom(count).translate(letters).decode("ascii")


@functools.lru_cache(maxsize=4)
def _milliseconds(number: int) -> str:
    return "".join([_BASE32HEX[number >> shift & 31] for shift in range(45, -1, -5)])


def new_id(what: str) -> str:
    """Make a task's id: *what* it is, and 12 random characters."""
    while f"{what}-".startswith("h-"):
        # so begin the ids of handles
        what = what[2:]
    what = what or "task"
    return f"{what[:200]}-{_random(_LETTERS, 12)}"


def new_handle_id() -> str:
    """
    Make a handle id: ``h-`` and 26 characters, the time in milliseconds first and 80 random bits after it.

    The order of ULIDs (github.com/ulid/spec), so that the index over a long history grows at its end.
    """
    return f"h-{_milliseconds(time.time_ns() // 1_000_000)}{_random(_SORTED_LETTERS, 16)}"
