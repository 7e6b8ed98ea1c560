"""Owns the rules of a task's life: `decide` says what a command changes. Pure: no I/O, no clock, no asyncio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .commands import (
    Abandon,
    BeginCallback,
    CallbackFailed,
    Claim,
    Command,
    Complete,
    ConfirmCancel,
    Expire,
    Fail,
    Fence,
    Flip,
    GiveUp,
    GoOn,
    Launch,
    Move,
    Notify,
    Progress,
    Rebind,
    Release,
    RequestCancel,
    Retry,
    RetryStep,
    Save,
    Settle,
    Signal,
    Start,
    Wait,
)
from .failures import told
from .models import ClosePolicy, EventType, Recovery, TaskMode, TaskState, Verdict

__all__ = [
    "CUT_OFF",
    "DEFAULTS",
    "JSON_COLUMNS",
    "LIVE_STATES",
    "MONITOR",
    "TERMINAL_EVENTS",
    "Change",
    "Refused",
    "Task",
    "deadline_passed",
    "decide",
    "fold",
    "is_early",
    "recover",
    "stamps",
    "with_columns",
]

_EXECUTING = frozenset({TaskState.RUNNING, TaskState.WAITING, TaskState.CANCEL_REQUESTED})
LIVE_STATES = tuple(state for state in TaskState if not state.is_terminal)
TERMINAL_EVENTS = (EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED, EventType.ABANDONED)

JSON_COLUMNS = frozenset({"arguments", "result", "failure", "evidence", "callback_error", "last_error", "process"})
"""Columns of `tasks` that hold JSON text; in event data they stand as JSON, not as text of it."""

MONITOR = "lash_store:monitor"
"""The function of every monitor; no program's function may have such a name."""

DEFAULTS: Mapping[str, Any] = {"close_policy": ClosePolicy.KEEP, "notify_on_end": 0, "has_callback": 0}
"""What a row has in columns that its first event does not name."""


class Task(NamedTuple):
    """The row of one task, every column as SQLite gives it; `with_columns` is the quick way to another."""

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
    parent_seq: int | None
    child_session_id: str | None
    close_policy: str
    idempotency_key: str | None
    notify_on_end: int
    has_callback: int
    callback_begun_at: str | None
    callback_error: str | None
    version: str | None
    timeout: float | None
    deadline: str | None
    not_before: str | None
    last_error: str | None
    waiting_for: str | None
    process: str | None

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
        return self.state in _EXECUTING and self.mode != TaskMode.EXTERNAL

    def has_body(self, fence: Fence) -> bool:
        """Whether the body of *fence* is on the row: what it does is no stale attempt's."""
        return fence == (self.attempt, self.owner_id) and self.is_executing

    @property
    def is_external(self) -> bool:
        """Whether somebody else does the work."""
        return self.mode == TaskMode.EXTERNAL

    @property
    def is_monitor(self) -> bool:
        """Whether the body is one of this package that supervises a process; it takes no slot."""
        return self.function == MONITOR

    @property
    def awaits_callback(self) -> bool:
        """Whether a cancel was requested that only the task's registrar can see through: its callback has not begun."""
        return self.state == TaskState.CANCEL_REQUESTED and bool(self.has_callback) and self.callback_begun_at is None


_PLACES = {name: place for place, name in enumerate(Task._fields)}


def with_columns(task: Task, columns: Mapping[str, Any]) -> Task:
    """Return the row with some columns changed: as `_replace`, in a third of its time."""
    row = list(task)
    for name, value in columns.items():
        row[_PLACES[name]] = value
    return Task._make(row)


# --- answers --------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """The columns a command changes, the event that says so, and what the event tells beside them, by names of its own."""

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
    EventType.TRANSFERRED: (),
    **dict.fromkeys(TERMINAL_EVENTS, ("completed_at", "updated_at")),
}


def stamps(event: EventType, mode: str = TaskMode.MANAGED) -> tuple[str, ...]:
    """Return the columns that take the time of an event of this type; external work goes on when it is bound again."""
    if event is EventType.REATTACHED and mode == TaskMode.EXTERNAL:
        return ("updated_at",)
    return _STAMPS.get(event, ("updated_at",))


def decide(task: Task, command: Command, now: str) -> Change | Refused:
    """
    Say what *command* does to *task* at *now* (UTC text).

    The first terminal state wins; a fenced command of another attempt or owner is stale; everything else is one case a rule.
    """
    fence = getattr(command, "fence", None)
    if fence is not None and fence != (task.attempt, task.owner_id):
        return _STALE
    if isinstance(command, Move):
        return Change(EventType.TRANSFERRED, {"scope": command.scope}) if command.scope != task.scope else _UNCHANGED
    if task.completed_at is not None:
        return _already_ended(task, command)
    if fence is not None and not task.is_executing and not task.is_external:
        return _STALE
    change = (_decide_external if task.is_external else _decide_live)(task, command, now)
    if isinstance(change, Refused):
        return change
    stamped = dict.fromkeys(stamps(change.type, task.mode), now)
    return Change(change.type, {**change.columns, **_left_behind(task, command, change), **stamped}, change.detail)


def _left_behind(task: Task, command: Command, change: Change) -> dict[str, None]:
    """Return what is true of the old state alone: when a retry is due, what is waited for, and which process runs."""
    state = change.columns.get("state", task.state)
    left: dict[str, None] = {}
    if task.not_before is not None and state != TaskState.PENDING:
        left["not_before"] = None
    if task.waiting_for is not None and state != TaskState.WAITING:
        left["waiting_for"] = None
    if task.process is not None and _ends_process(command, change):
        left["process"] = None
    return left


_AFTER_PROCESS = {
    *TERMINAL_EVENTS,
    EventType.CLAIMED,
    EventType.STARTED,
    EventType.REATTACHED,
    EventType.RELEASED,
}


def _ends_process(command: Command, change: Change) -> bool:
    """Whether what ran for a task is gone: nobody ends, frees or takes it before, but for who gives it up, or cannot wait."""
    match command:
        case GiveUp() | Release(process_left=True) | Abandon(process_left=True):
            return False
    return change.type in _AFTER_PROCESS


_OUTCOME = {
    Complete: TaskState.COMPLETED,
    Fail: TaskState.FAILED,
    Abandon: TaskState.ABANDONED,
    GiveUp: TaskState.ABANDONED,
}


class _Unreadable(NamedTuple):
    """A text that should be JSON, and is not."""

    text: str


def _already_ended(task: Task, command: Command) -> Refused:
    if isinstance(command, RequestCancel | ConfirmCancel):
        return _UNCHANGED if task.state == TaskState.CANCELLED else _SUPERSEDED
    if isinstance(command, Settle):
        said = _plain(command.result), _plain(command.failure)
        same = command.state == task.state and said == (_plain(task.result), _plain(task.failure))
        return _UNCHANGED if same else _SUPERSEDED
    return _UNCHANGED if _OUTCOME.get(type(command)) == task.state else _SUPERSEDED


def _plain(text: str | None) -> Any:
    """
    Return what JSON text says, whatever the order of its keys and wherever an exception was raised.

    What somebody's hand made unreadable says itself, and nothing else does.
    """
    if text is None:
        return None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return _Unreadable(text)
    return {**said, "traceback": None} if isinstance(said, dict) and "traceback" in said else said


def _decide_live(task: Task, command: Command, now: str) -> Change | Refused:
    requested = task.state == TaskState.CANCEL_REQUESTED
    match command:
        case Complete(result=result):
            return Change(EventType.COMPLETED, {"state": TaskState.COMPLETED, "result": result})
        case Start() | Claim() | Release() if requested:
            return _SUPERSEDED
        case Start(from_owner=from_owner) if from_owner != task.owner_id:
            return _SUPERSEDED
        case Start(crashed=False) if task.is_executing:
            return _SUPERSEDED
        case Start() if task.deadline is not None and task.deadline <= now:
            return Change(EventType.FAILED, {"state": TaskState.FAILED, "failure": deadline_passed(task.deadline)})
        case Start(owner_id=owner_id, reattach=reattach, crashed=crashed, version=version):
            return Change(
                EventType.REATTACHED if reattach else EventType.STARTED,
                {
                    "state": TaskState.RUNNING,
                    "attempt": task.attempt + 1,
                    "owner_id": owner_id,
                    **_spent(task, crashed),
                    **({} if version == task.version else {"version": version}),
                },
                {"previous_owner_id": task.owner_id, **_how(crashed)} if reattach else None,
            )
        case Claim(owner_id=owner_id, crashed=crashed):
            if task.state == TaskState.PENDING and task.owner_id == owner_id:
                return _UNCHANGED
            return Change(
                EventType.CLAIMED,
                {"state": TaskState.PENDING, "owner_id": owner_id, **_spent(task, crashed)},
                {"previous_owner_id": task.owner_id, **_how(crashed)},
            )
        case Release(reason=reason, crashed=crashed):
            if task.state == TaskState.PENDING and task.owner_id is None:
                return _UNCHANGED
            return Change(
                EventType.RELEASED,
                {"state": TaskState.PENDING, "owner_id": None, **_spent(task, crashed)},
                {"reason": reason, "previous_owner_id": task.owner_id, **_how(crashed)},
            )
        case RequestCancel() if requested:
            return _UNCHANGED
        case RequestCancel() if task.state == TaskState.PENDING and task.process is None:
            return _never_begun(command, now)
        case RequestCancel():
            return _requested(command)
        case ConfirmCancel() if requested:
            return Change(EventType.CANCELLED, {"state": TaskState.CANCELLED})
        case ConfirmCancel():
            return _SUPERSEDED
        case Fail(failure=failure, crashed=crashed):
            columns = {"state": TaskState.FAILED, "failure": failure, **_spent(task, crashed)}
            return Change(EventType.FAILED, columns, _how(crashed))
        case Retry(failure=failure) if requested or not _may_try_again(task, command.not_before):
            return Change(EventType.FAILED, {"state": TaskState.FAILED, "failure": failure})
        case Retry(failure=failure, not_before=not_before):
            return Change(
                EventType.RETRY_SCHEDULED,
                {
                    "state": TaskState.PENDING,
                    "not_before": not_before,
                    "last_error": failure,
                    "attempts_spent": task.attempts_spent + 1,
                },
                {"ended_by": "failure"},
            )
        case Expire(owner_id=owner_id, failure=failure):
            if task.state != TaskState.PENDING or task.owner_id != owner_id:
                return _SUPERSEDED
            return Change(EventType.FAILED, {"state": TaskState.FAILED, "failure": failure})
        case Abandon(evidence=evidence):
            return Change(EventType.ABANDONED, {"state": TaskState.ABANDONED, "evidence": evidence})
        case GiveUp(reason=reason) if task.recovery == Recovery.RERUN and not requested:
            if task.state == TaskState.PENDING and task.owner_id is None:
                return _UNCHANGED
            return Change(
                EventType.RELEASED,
                {"state": TaskState.PENDING, "owner_id": None, "attempt": _fenced_out(task)},
                {"reason": reason, "previous_owner_id": task.owner_id},
            )
        case GiveUp(evidence=evidence):
            return Change(
                EventType.ABANDONED,
                {"state": TaskState.ABANDONED, "evidence": evidence, "attempt": _fenced_out(task)},
            )
        case Save(what=what):
            return Change(EventType.SAVED, {}, what)
        case RetryStep(what=what):
            return Change(EventType.RETRY_SCHEDULED, {}, what)
        case Signal(what=what):
            return Change(EventType.SIGNALLED, {}, what)
        case Launch() | Wait() | GoOn() if requested:
            return _SUPERSEDED
        case Launch(process=process):
            return Change(EventType.STATE_CHANGED, {"process": process})
        case Wait(reason=reason):
            if task.state == TaskState.WAITING and task.waiting_for == reason:
                return _UNCHANGED
            return Change(EventType.STATE_CHANGED, {"state": TaskState.WAITING, "waiting_for": reason})
        case GoOn():
            if task.state == TaskState.RUNNING:
                return _UNCHANGED
            return Change(EventType.STATE_CHANGED, {"state": TaskState.RUNNING})
    return _decide_any(command)


def _decide_external(task: Task, command: Command, now: str) -> Change | Refused:
    requested = task.state == TaskState.CANCEL_REQUESTED
    match command:
        case Rebind(from_owner=from_owner) if from_owner != task.owner_id:
            return _SUPERSEDED
        case Rebind(owner_id=owner_id, has_callback=has_callback, anew=anew):
            return Change(
                EventType.REATTACHED,
                {**anew, "owner_id": owner_id, "has_callback": int(has_callback)},
                {"previous_owner_id": task.owner_id},
            )
        case Release() if task.owner_id is None:
            return _UNCHANGED
        case Release(reason=reason):
            # the work goes on elsewhere: the state stays as it is
            return Change(
                EventType.RELEASED, {"owner_id": None}, {"reason": reason, "previous_owner_id": task.owner_id}
            )
        case RequestCancel() if requested:
            return _UNCHANGED
        case RequestCancel(at_birth=True):
            return _never_begun(command, now)
        case RequestCancel():
            return _requested(command)
        case BeginCallback() if task.awaits_callback:
            return Change(EventType.STATE_CHANGED, {"callback_begun_at": now})
        case CallbackFailed(error=error) if requested:
            return Change(EventType.CALLBACK_FAILED, {"callback_error": error})
        case ConfirmCancel() if requested:
            return Change(EventType.CANCELLED, {"state": TaskState.CANCELLED})
        case Flip(state=state) if not requested:
            return _UNCHANGED if state == task.state else Change(EventType.STATE_CHANGED, {"state": state})
        case Settle(state=TaskState.CANCELLED, reason=reason):
            why = {} if reason is None or requested else {"cancel_reason": reason}
            return Change(EventType.CANCELLED, {"state": TaskState.CANCELLED, **why})
        case Settle(state=TaskState.COMPLETED, result=result):
            return Change(EventType.COMPLETED, {"state": TaskState.COMPLETED, "result": result})
        case Settle(state=TaskState.FAILED, failure=failure):
            return Change(EventType.FAILED, {"state": TaskState.FAILED, "failure": failure})
        case Abandon(evidence=evidence) | GiveUp(evidence=evidence):
            return Change(EventType.ABANDONED, {"state": TaskState.ABANDONED, "evidence": evidence})
    return _decide_any(command)


def _decide_any(command: Command) -> Change | Refused:
    """What does not depend on who does the work."""
    match command:
        case Progress(message=message, fraction=fraction):
            shown = {"progress": message, "fraction": fraction}
            if command.fence is None:
                shown = {name: value for name, value in shown.items() if value is not None}
            return Change(EventType.PROGRESS, shown, command.detail) if shown else _UNCHANGED
        case Notify(note=note):
            return Change(EventType.NOTED, {}, note)
    return _SUPERSEDED


def _never_begun(command: RequestCancel, now: str) -> Change:
    columns = {"state": TaskState.CANCELLED, "cancel_reason": command.reason, "cancel_requested_by": command.by}
    return Change(EventType.CANCELLED, {**columns, "cancel_requested_at": now}, _because(command))


def _requested(command: RequestCancel) -> Change:
    return Change(
        EventType.CANCEL_REQUESTED,
        {
            "state": TaskState.CANCEL_REQUESTED,
            "cancel_reason": command.reason,
            "cancel_requested_by": command.by,
        },
        _because(command),
    )


def _because(command: RequestCancel) -> dict[str, int] | None:
    return None if command.because_of is None else {"because_of": command.because_of}


def _fenced_out(task: Task) -> int:
    """Return the attempt that no body has: nobody writes under the old one any more."""
    return task.attempt + 1 if task.is_executing else task.attempt


def _spent(task: Task, crashed: bool) -> dict[str, int]:
    return {"attempts_spent": task.attempts_spent + 1} if crashed else {}


def _how(crashed: bool) -> dict[str, str]:
    return {"ended_by": "crash"} if crashed else {}


def _may_try_again(task: Task, at: str) -> bool:
    return task.attempts_spent + 1 < task.max_attempts and (task.deadline is None or at < task.deadline)


# --- recovery: the table of what becomes of a row whose owner is gone -----------------------------------------------


CUT_OFF = told("CallbackCutOff", "its owner went away while the callback ran")
"""The error of a callback that a crash ended."""


def recover(
    task: Task, *, owner_id: int, known: bool, slot: bool, evidence: str, now: str, version: str | None = None
) -> Command:
    """
    Choose the command for a live row whose owner is dead or NULL; first match wins.

    *known*: its function is registered with *owner_id*, in a *version* that takes the row. *slot*: a body may be started now.
    *evidence* is the JSON text stored with a row that is abandoned.
    """
    if task.is_external:
        requested = task.state == TaskState.CANCEL_REQUESTED
        return ConfirmCancel(None) if requested and not task.awaits_callback else Release("owner_died")
    crashed = task.is_executing
    spent = task.attempts_spent + crashed
    if task.state == TaskState.CANCEL_REQUESTED:
        return ConfirmCancel(None)
    if not task.may_rerun:
        return Abandon(evidence)
    if spent >= task.max_attempts:
        how = "ended with their owner" if task.last_error is None else "ended with their owner or failed"
        message = f"{spent} of {task.max_attempts} attempts {how}"
        return Fail(None, told("AttemptsExhausted", message), crashed)
    if task.deadline is not None and task.deadline <= now:
        return Fail(None, deadline_passed(task.deadline), crashed)
    if not known:
        return Release("unknown_function", crashed)
    if slot and not is_early(task, now):
        return Start(owner_id, task.owner_id, reattach=True, crashed=crashed, version=version)
    return Claim(owner_id, crashed)


def is_early(task: Task, now: str) -> bool:
    """Whether a task waits for a retry that is not due at *now*."""
    return task.not_before is not None and task.not_before > now


def deadline_passed(deadline: str) -> str:
    """Write the failure of a task whose time is up, as JSON text."""
    return told("Timeout", f"the deadline {deadline} passed")


# --- fold: events give the row --------------------------------------------------------------------------------------


def fold(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Rebuild a task's row from its events (mappings of the `events` columns, ``data`` as a JSON value), in ``seq`` order.

    Every key of ``data`` that names a column is that column's new value; ``attempt`` and ``scope`` are the event's own, and
    `stamps` says which columns take its time. JSON columns come back as JSON values, not as text.
    """
    row: dict[str, Any] = {**dict.fromkeys(Task._fields), **DEFAULTS}
    for event in events:
        data = event["data"]
        row.update({column: data[column] for column in row.keys() & data.keys()})
        row.update(task_seq=event["task_seq"], scope=event["scope"], id=event["task_id"], attempt=event["attempt"])
        row.update(dict.fromkeys(stamps(EventType(event["type"]), row["mode"]), event["at"]))
    return row
