"""Owns the rules of a task's life: `decide` says what a command changes. Pure: no I/O, no clock, no asyncio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .models import EventType, Recovery, TaskState, Verdict

__all__ = [
    "JSON_COLUMNS",
    "LIVE_STATES",
    "TERMINAL_EVENTS",
    "TERMINAL_STATES",
    "Abandon",
    "Change",
    "Claim",
    "Command",
    "Complete",
    "ConfirmCancel",
    "Fail",
    "Fence",
    "Progress",
    "Refused",
    "Release",
    "RequestCancel",
    "Save",
    "Start",
    "Task",
    "decide",
    "fold",
    "recover",
    "stamps",
]

TERMINAL_STATES = tuple(state for state in TaskState if state.is_terminal)
LIVE_STATES = tuple(state for state in TaskState if not state.is_terminal)
TERMINAL_EVENTS = (EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED, EventType.ABANDONED)

JSON_COLUMNS = frozenset({"arguments", "result", "failure", "evidence"})
"""Columns of `tasks` that hold JSON text; in event data they stand as JSON, not as text of it."""


class Task(NamedTuple):
    """The row of one task, every column as SQLite gives it."""

    task_seq: int
    scope: str
    id: str
    kind: str
    mode: str
    state: str
    label: str
    function: str | None
    recovery: str
    cancel_policy: str
    arguments: str | None
    attempt: int
    attempts_spent: int
    max_attempts: int
    owner_id: int | None
    progress: str | None
    fraction: float | None
    result: str | None
    failure: str | None
    evidence: str | None
    cancel_reason: str | None
    cancel_requested_by: str | None
    cancel_requested_at: str | None
    created_at: str
    started_at: str | None
    updated_at: str
    completed_at: str | None

    @property
    def is_terminal(self) -> bool:
        return self.completed_at is not None

    @property
    def may_rerun(self) -> bool:
        """Whether a body may be started after its owner is gone: always, or only because none ever was."""
        if self.function is None:
            return False
        return self.recovery == Recovery.RERUN or self.attempt == 0

    @property
    def is_executing(self) -> bool:
        """Whether some owner's body is on the row: the execution a crash of that owner would end."""
        return self.state in {TaskState.RUNNING, TaskState.WAITING, TaskState.CANCEL_REQUESTED}


class Fence(NamedTuple):
    """What a write from a body names, so that a zombie's is refused: its attempt, and the owner that ran it."""

    attempt: int
    owner_id: int


# --- commands: what somebody asks of a row --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Start a body of a row that *from_owner* holds; *crashed* when that owner died while it executed the row."""

    owner_id: int
    from_owner: int | None
    reattach: bool = False
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """Take a row over without starting it: no slot is free."""

    owner_id: int
    crashed: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Give a row back to whoever may run it next."""

    reason: str
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class RequestCancel:
    """Ask for the end of a task, durably."""

    reason: str | None
    by: str


@dataclass(frozen=True, slots=True)
class ConfirmCancel:
    """Say that the body of a cancelled task has stopped; no fence when its owner is dead."""

    fence: Fence | None


@dataclass(frozen=True, slots=True)
class Complete:
    """Store a body's result, as JSON text."""

    fence: Fence
    result: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Store a failure, as JSON text; no fence when recovery gives a task up."""

    fence: Fence | None
    failure: str
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Abandon:
    """Say that nobody will ever know the outcome; *evidence* is JSON text."""

    evidence: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Show how far a body has come."""

    fence: Fence
    message: str
    fraction: float | None


@dataclass(frozen=True, slots=True)
class Save:
    """Note that a checkpoint of *size* bytes was stored."""

    fence: Fence
    size: int


Command = Start | Claim | Release | RequestCancel | ConfirmCancel | Complete | Fail | Abandon | Progress | Save


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """The columns a command changes, the event that says so, and what the event tells beside the columns."""

    type: EventType
    columns: Mapping[str, Any]
    detail: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing changes: it is so already, another outcome stands, or the writer is *stale*."""

    verdict: Verdict
    stale: bool = False


_SUPERSEDED = Refused(Verdict.SUPERSEDED)
_UNCHANGED = Refused(Verdict.UNCHANGED)
_STALE = Refused(Verdict.SUPERSEDED, stale=True)

_STAMPS = {
    EventType.REGISTERED: ("created_at", "updated_at"),
    EventType.STARTED: ("started_at", "updated_at"),
    EventType.REATTACHED: ("started_at", "updated_at"),
    EventType.CANCEL_REQUESTED: ("cancel_requested_at", "updated_at"),
    **dict.fromkeys(TERMINAL_EVENTS, ("completed_at", "updated_at")),
}


def stamps(event: EventType) -> tuple[str, ...]:
    """Return the columns that take the time of an event of this type."""
    return _STAMPS.get(event, ("updated_at",))


def decide(task: Task, command: Command, now: str) -> Change | Refused:
    """
    Say what *command* does to *task* at *now* (UTC text).

    The first terminal state wins; a fenced command of another attempt or owner is stale; everything else is one case a rule.
    """
    fence = getattr(command, "fence", None)
    if fence is not None and fence != (task.attempt, task.owner_id):
        return _STALE
    if task.completed_at is not None:
        return _already_ended(task, command)
    if fence is not None and not task.is_executing:
        return _STALE
    change = _decide_live(task, command, now)
    if isinstance(change, Refused):
        return change
    return Change(change.type, {**change.columns, **dict.fromkeys(stamps(change.type), now)}, change.detail)


_OUTCOME = {Complete: TaskState.COMPLETED, Fail: TaskState.FAILED, Abandon: TaskState.ABANDONED}


def _already_ended(task: Task, command: Command) -> Refused:
    if isinstance(command, RequestCancel | ConfirmCancel):
        return _UNCHANGED if task.state == TaskState.CANCELLED else _SUPERSEDED
    return _UNCHANGED if _OUTCOME.get(type(command)) == task.state else _SUPERSEDED


def _decide_live(task: Task, command: Command, now: str) -> Change | Refused:
    requested = task.state == TaskState.CANCEL_REQUESTED
    match command:
        case Start() | Claim() | Release() if requested:
            return _SUPERSEDED
        case Start(from_owner=from_owner) if from_owner != task.owner_id:
            return _SUPERSEDED
        case Start(crashed=False) if task.is_executing:
            return _SUPERSEDED
        case Start(owner_id=owner_id, reattach=reattach, crashed=crashed):
            return Change(
                EventType.REATTACHED if reattach else EventType.STARTED,
                {
                    "state": TaskState.RUNNING,
                    "attempt": task.attempt + 1,
                    "owner_id": owner_id,
                    **_spent(task, crashed),
                },
                {"previous_owner_id": task.owner_id} if reattach else None,
            )
        case Claim(owner_id=owner_id, crashed=crashed):
            if task.state == TaskState.PENDING and task.owner_id == owner_id:
                return _UNCHANGED
            return Change(
                EventType.CLAIMED,
                {"state": TaskState.PENDING, "owner_id": owner_id, **_spent(task, crashed)},
                {"previous_owner_id": task.owner_id},
            )
        case Release(reason=reason, crashed=crashed):
            if task.state == TaskState.PENDING and task.owner_id is None:
                return _UNCHANGED
            return Change(
                EventType.RELEASED,
                {"state": TaskState.PENDING, "owner_id": None, **_spent(task, crashed)},
                {"reason": reason, "previous_owner_id": task.owner_id},
            )
        case RequestCancel() if requested:
            return _UNCHANGED
        case RequestCancel(reason=reason, by=by) if task.state == TaskState.PENDING:
            return Change(
                EventType.CANCELLED,
                {
                    "state": TaskState.CANCELLED,
                    "cancel_reason": reason,
                    "cancel_requested_by": by,
                    "cancel_requested_at": now,
                },
            )
        case RequestCancel(reason=reason, by=by):
            return Change(
                EventType.CANCEL_REQUESTED,
                {"state": TaskState.CANCEL_REQUESTED, "cancel_reason": reason, "cancel_requested_by": by},
            )
        case ConfirmCancel() if requested:
            return Change(EventType.CANCELLED, {"state": TaskState.CANCELLED})
        case ConfirmCancel():
            return _SUPERSEDED
        case Complete(result=result):
            return Change(EventType.COMPLETED, {"state": TaskState.COMPLETED, "result": result})
        case Fail(failure=failure, crashed=crashed):
            return Change(EventType.FAILED, {"state": TaskState.FAILED, "failure": failure, **_spent(task, crashed)})
        case Abandon(evidence=evidence):
            return Change(EventType.ABANDONED, {"state": TaskState.ABANDONED, "evidence": evidence})
        case Progress(message=message, fraction=fraction):
            return Change(EventType.PROGRESS, {"progress": message, "fraction": fraction})
        case Save(size=size):
            return Change(EventType.SAVED, {}, {"bytes": size})


def _spent(task: Task, crashed: bool) -> dict[str, int]:
    return {"attempts_spent": task.attempts_spent + 1} if crashed else {}


# --- recovery: the table of what becomes of a row whose owner is gone -----------------------------------------------


def recover(task: Task, *, owner_id: int, known: bool, slot: bool, evidence: str) -> Command:
    """
    Choose the command for a live managed row whose owner is dead or NULL; first match wins.

    *known*: its function is registered with *owner_id*. *slot*: a body may be started now. *evidence* is the JSON text stored
    with a row that is abandoned.
    """
    crashed = task.is_executing
    spent = task.attempts_spent + crashed
    if task.state == TaskState.CANCEL_REQUESTED:
        return ConfirmCancel(None)
    if not task.may_rerun:
        return Abandon(evidence)
    if spent >= task.max_attempts:
        message = f"{spent} of {task.max_attempts} attempts ended with their owner"
        return Fail(None, json.dumps({"type": "AttemptsExhausted", "message": message, "traceback": None}), crashed)
    if not known:
        return Release("unknown_function", crashed)
    if slot:
        return Start(owner_id, task.owner_id, reattach=True, crashed=crashed)
    return Claim(owner_id, crashed)


# --- fold: events give the row --------------------------------------------------------------------------------------


def fold(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Rebuild a task's row from its events (mappings of the `events` columns, ``data`` as a JSON value), in ``seq`` order.

    Every key of ``data`` that names a column is that column's new value; ``attempt`` and ``scope`` are the event's own, and
    `stamps` says which columns take its time. JSON columns come back as JSON values, not as text.
    """
    row: dict[str, Any] = dict.fromkeys(Task._fields)
    for event in events:
        data = event["data"]
        row.update({column: data[column] for column in row.keys() & data.keys()})
        row.update(task_seq=event["task_seq"], scope=event["scope"], id=event["task_id"], attempt=event["attempt"])
        row.update(dict.fromkeys(stamps(EventType(event["type"])), event["at"]))
    return row
