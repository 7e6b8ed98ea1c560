"""
Owns the one door through which rows change: units of work over an open transaction.

Everything here is synchronous and a function of ``tx`` and its arguments alone: it may run twice, and never touches a coroutine.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from . import queries
from .database import Transaction
from .errors import StaleAttempt, TaskExists, TaskNotFound, UnknownSession
from .lifecycle import (
    Abandon,
    Change,
    Command,
    ConfirmCancel,
    Refused,
    Release,
    RequestCancel,
    Save,
    Start,
    Task,
    decide,
)
from .models import CancelPolicy, EventType, OwnerEnd, Recovery, Scope, TaskKind, TaskMode, TaskState, Verdict

__all__ = [
    "NewTask",
    "Outcome",
    "create",
    "end_owner",
    "find",
    "finish_cancel",
    "open_session",
    "request_cancel",
    "save",
    "start",
    "transition",
]


@dataclass(frozen=True, slots=True)
class NewTask:
    """What a task is born with. ``body`` is a coroutine object that cannot be written down, if it is one."""

    scope: Scope
    id: str
    kind: TaskKind
    mode: TaskMode
    label: str
    function: str | None
    recovery: Recovery
    cancel_policy: CancelPolicy
    arguments: str | None
    max_attempts: int
    owner_id: int
    handle_id: str
    body: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row as it stands, what became of the command, and whether the writer was refused as stale."""

    task: Task
    verdict: Verdict
    stale: bool = False


def transition(tx: Transaction, task: Task, command: Command, *, fresh: bool = True, local: Any = None) -> Outcome:
    """
    Decide, change the row under the state, attempt and owner that were seen, and write the event: all or nothing.

    *task* was read in this transaction, or (not *fresh*) is what this process saw last: then the row is read only if it is no
    longer so, or if the command would be refused.
    """
    decision = decide(task, command, tx.now)
    if isinstance(decision, Change):
        after = queries.update_task(tx, task, decision.columns)
        if after is not None:
            data = queries.event_data(decision.type, decision.columns, decision.detail)
            queries.insert_event(tx, decision.type, scope=after.scope, task=after, data=data, local=local)
            return Outcome(after, Verdict.APPLIED)
    elif fresh:
        return Outcome(task, decision.verdict, decision.stale)
    if fresh:
        raise RuntimeError(f"task {task.id!r} changed between two statements of one transaction")
    return transition(tx, by_seq(tx, task.task_seq), command, local=local)


def by_seq(tx: Transaction, task_seq: int) -> Task:
    """
    Return one incarnation.

    Raises:
        TaskNotFound: the file has none of that number.
    """
    task = queries.task_by_seq(tx, task_seq)
    if task is None:
        raise task_not_found_by_seq(task_seq)
    return task


def find(tx: Transaction, scope: Scope, task_id: str) -> Task:
    """
    Return the live incarnation of an id, else the newest.

    Raises:
        UnknownSession: the file has no such session.
        TaskNotFound: the session has no such task.
    """
    task = queries.task_by_id(tx, str(scope), task_id)
    if task is not None:
        return task
    if not queries.has_session(tx, str(scope)):
        raise unknown_session(scope)
    raise task_not_found(scope, task_id)


def unknown_session(scope: Scope) -> UnknownSession:
    """Say that a session is not in the file."""
    return UnknownSession(f"session {str(scope)!r} is not in this file: sessions() lists those that are")


def task_not_found_by_seq(task_seq: int) -> TaskNotFound:
    """Say that an incarnation is not in the file."""
    return TaskNotFound(
        f"task_seq {task_seq} is not in this file: was it opened by another path?", task_id=str(task_seq)
    )


def task_not_found(scope: Scope, task_id: str) -> TaskNotFound:
    """Say that a task is not in its session."""
    return TaskNotFound(f"task {task_id!r} is not in session {str(scope)!r}: list() shows what is", task_id=task_id)


# --- being born -----------------------------------------------------------------------------------------------------


def open_session(tx: Transaction, scope: Scope) -> None:
    """Create a session unless the file has it."""
    if not queries.has_session(tx, str(scope)):
        queries.insert_session(tx, scope)
        queries.insert_event(tx, EventType.SESSION_OPENED, scope=str(scope))


def create(tx: Transaction, new: NewTask, *, start: bool = False) -> Task:
    """
    Store a task with its first event and its session's handle, and with *start* its first start in the same commit.

    Raises:
        TaskExists: a live task has the id.
    """
    columns: dict[str, Any] = {
        "scope": str(new.scope),
        "id": new.id,
        "kind": new.kind,
        "mode": new.mode,
        "state": TaskState.PENDING,
        "label": new.label,
        "function": new.function,
        "recovery": new.recovery,
        "cancel_policy": new.cancel_policy,
        "arguments": new.arguments,
        "attempt": 0,
        "attempts_spent": 0,
        "max_attempts": new.max_attempts,
        "owner_id": new.owner_id,
        "created_at": tx.now,
        "updated_at": tx.now,
    }
    born = queries.NO_TASK._replace(**columns)
    started = decide(born, Start(new.owner_id, new.owner_id), tx.now) if start else None
    assert not isinstance(started, Refused)
    try:
        task = queries.insert_task(tx, columns if started is None else {**columns, **started.columns})
    except sqlite3.IntegrityError as error:
        if queries.live_task_by_id(tx, str(new.scope), new.id) is None:
            raise
        raise TaskExists(
            f"task {new.id!r} is live in session {str(new.scope)!r}: await or cancel it, or choose another id",
            task_id=new.id,
        ) from error
    queries.insert_owner_handle(tx, task, new.handle_id)
    data = queries.event_data(EventType.REGISTERED, columns, {"handle_id": new.handle_id})
    born = born._replace(task_seq=task.task_seq)
    queries.insert_event(
        tx, EventType.REGISTERED, scope=task.scope, task=born, data=data, local=new.body, is_last=started is None
    )
    if started is not None:
        data = queries.event_data(started.type, started.columns, started.detail)
        queries.insert_event(tx, started.type, scope=task.scope, task=task, data=data)
    return task


# --- bodies ---------------------------------------------------------------------------------------------------------


def start(tx: Transaction, task: Task, command: Start, *, fresh: bool = True) -> Outcome:
    """Start a body: the attempt rises here; the event carries the checkpoint the body begins with."""
    checkpoint = queries.checkpoint(tx, task.task_seq) if task.attempt else None
    return transition(tx, task, command, fresh=fresh, local=checkpoint)


def save(tx: Transaction, task: Task, command: Save, value: str) -> Outcome:
    """Replace a task's checkpoint, if the attempt that saves it is the current one."""
    outcome = transition(tx, task, command, fresh=False)
    if outcome.verdict is Verdict.APPLIED:
        queries.save_checkpoint(tx, task.task_seq, outcome.task.attempt, value)
    return outcome


def stale(task: Task, attempt: int) -> StaleAttempt:
    """Say that an attempt is not the current one."""
    return StaleAttempt(
        f"attempt {attempt} of task {task.id!r} may not write: the row is {task.state}, attempt {task.attempt}, "
        f"owner {task.owner_id}; let this body end",
        task_id=task.id,
    )


# --- stopping -------------------------------------------------------------------------------------------------------


def request_cancel(tx: Transaction, task: Task, reason: str | None, by: str) -> Outcome:
    """Ask for the end of a task; one that is pending ends here."""
    return transition(tx, task, RequestCancel(reason, by))


def finish_cancel(tx: Transaction, task_seq: int, dead_owner: int) -> Outcome:
    """End a cancelled task if it is still *dead_owner*'s: nothing of it runs any more."""
    task = by_seq(tx, task_seq)
    if task.owner_id != dead_owner:
        return Outcome(task, Verdict.SUPERSEDED)
    return transition(tx, task, ConfirmCancel(None))


def end_owner(tx: Transaction, owner_id: int, evidence: str, alive: Collection[int]) -> None:
    """
    Give back what a closing owner still holds, and note its end: what may run again is released, the rest is abandoned.

    A cancel in progress is finished, but for bodies that are still *alive*: whoever is asked next finds their owner gone.
    """
    for task in queries.live_tasks_of_owner(tx, owner_id):
        if task.state != TaskState.CANCEL_REQUESTED:
            transition(tx, task, Release("closed") if task.may_rerun else Abandon(evidence))
        elif task.task_seq not in alive:
            transition(tx, task, ConfirmCancel(None))
    queries.end_owner(tx, owner_id, OwnerEnd.CLOSED)
