"""
Owns the one door through which rows change: units of work over an open transaction.

Everything here is synchronous and a function of ``tx`` and its arguments alone: it may run twice, and never touches a coroutine.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from . import queries, session_queries
from .commands import (
    Abandon,
    CallbackFailed,
    Command,
    ConfirmCancel,
    Fence,
    GiveUp,
    Notify,
    Release,
    RequestCancel,
    Save,
    Settle,
    Start,
)
from .database import Transaction
from .errors import IdempotencyConflict, SessionClosed, StaleAttempt, TaskExists, TaskNotFound, UnknownSession
from .lifecycle import CUT_OFF, TERMINAL_EVENTS, Change, Refused, Task, decide
from .models import (
    CancelPolicy,
    ClosePolicy,
    EventType,
    HandleRole,
    OwnerEnd,
    Recovery,
    Scope,
    TaskKind,
    TaskMode,
    TaskState,
    Verdict,
)
from .session_queries import SessionRow

__all__ = [
    "Born",
    "NewTask",
    "Outcome",
    "create",
    "end_cancelled",
    "end_owner",
    "find",
    "finish_cancel",
    "give_up",
    "notify",
    "request_cancel",
    "save",
    "start",
    "transition",
]


@dataclass(frozen=True, slots=True)
class NewTask:
    """
    What a task is born with.

    ``local`` cannot be written down: a coroutine object, or the cancel callback of external work.
    """

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
    local: Any = None
    parent_seq: int | None = None
    child_session_id: str | None = None
    close_policy: ClosePolicy = ClosePolicy.KEEP
    idempotency_key: str | None = None
    notify_on_end: bool = False


@dataclass(frozen=True, slots=True)
class Born:
    """A task as it was stored and the handle of its session; not *is_new* if an idempotency key named one that was there."""

    task: Task
    handle_id: str
    is_new: bool = True


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
            if after.notify_on_end and decision.type in TERMINAL_EVENTS:
                _note_end(tx, after)
            data = queries.event_data(decision.type, decision.columns, decision.detail)
            from_scope = task.scope if decision.type is EventType.TRANSFERRED else None
            queries.insert_event(
                tx, decision.type, scope=after.scope, from_scope=from_scope, task=after, data=data, local=local
            )
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
    if session_queries.session(tx, str(scope)) is None:
        raise unknown_session(scope)
    raise task_not_found(scope, task_id)


def open_session_row(tx: Transaction, scope: Scope) -> SessionRow:
    """
    Return a session that work may be put into.

    Raises:
        UnknownSession: the file has no such session.
        SessionClosed: it is closed.
    """
    row = session_queries.session(tx, str(scope))
    if row is None:
        raise unknown_session(scope)
    if row.closed_at is not None:
        raise session_closed(scope)
    return row


def session_closed(scope: Scope) -> SessionClosed:
    """Say that a session takes no more work."""
    return SessionClosed(f"session {str(scope)!r} is closed: open it again with session(id, reopen=True)")


def task_exists(new: NewTask) -> TaskExists:
    """Say that a live task has the id."""
    return TaskExists(
        f"task {new.id!r} is live in session {str(new.scope)!r}: await or cancel it, or choose another id",
        task_id=new.id,
    )


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


def create(tx: Transaction, new: NewTask, *, start: bool = False) -> Born:
    """
    Store a task with its first event and its session's handle, and with *start* its first start in the same commit.

    One with an idempotency key that was used before for the same work is not made again. One under an ancestor whose cancel
    was requested is born cancelled, for the ancestor's reason.

    Raises:
        TaskExists: a live task has the id.
        IdempotencyConflict: the key was used for other work.
        SessionClosed: the session is closed, and no live task of it is the parent.
        StoreClosed: a person gave this owner up.
        UnknownSession: the file has no such session, or not the one a sub-agent should work in.
    """
    refuse_given_up(tx)
    before = same_before(tx, new)
    if before is not None:
        return Born(before, session_queries.owner_handle(tx, before.task_seq).handle_id, is_new=False)
    place = session_queries.birthplace(tx, str(new.scope))
    if place is None:
        raise unknown_session(new.scope)
    parent = None if new.parent_seq is None else by_seq(tx, new.parent_seq)
    if place.closed_at is not None and not _may_bear(parent, new):
        raise session_closed(new.scope)
    if new.child_session_id is not None:
        open_session_row(tx, Scope(new.scope.runtime, new.child_session_id))
    cancelled = cancelled_ancestor(tx, parent, place.agent)
    columns = _first_columns(tx, new)
    born = queries.NO_TASK._replace(**columns)
    started = decide(born, Start(new.owner_id, new.owner_id), tx.now) if start and cancelled is None else None
    assert not isinstance(started, Refused)
    try:
        task = queries.insert_task(tx, columns if started is None else {**columns, **started.columns})
    except sqlite3.IntegrityError as error:
        if queries.live_task_by_id(tx, str(new.scope), new.id) is None:
            raise
        raise task_exists(new) from error
    session_queries.insert_handle(tx, new.handle_id, task.scope, task.task_seq, HandleRole.OWNER)
    if new.mode is TaskMode.HIDDEN and not place.sync_needed:
        session_queries.flag_sync(tx, task.scope, needed=True)
    data = queries.event_data(EventType.REGISTERED, columns, {"handle_id": new.handle_id})
    born = born._replace(task_seq=task.task_seq)
    is_last = started is None and cancelled is None
    # a callback that will never be called is nobody's to keep; a coroutine is the runner's to close
    local = None if cancelled is not None and new.mode is TaskMode.EXTERNAL else new.local
    queries.insert_event(tx, EventType.REGISTERED, scope=task.scope, task=born, data=data, local=local, is_last=is_last)
    if cancelled is not None:
        task = _born_cancelled(tx, task, cancelled)
    elif started is not None:
        data = queries.event_data(started.type, started.columns, started.detail)
        queries.insert_event(tx, started.type, scope=task.scope, task=task, data=data)
    return Born(task, new.handle_id)


def refuse_given_up(tx: Transaction) -> None:
    """
    Refuse new work of an owner that somebody gave up while it was stuck: it would be taken from it at once.

    Raises:
        StoreClosed: the store must be opened again.
    """
    if tx.forbidden is not None:
        raise tx.forbidden


def _first_columns(tx: Transaction, new: NewTask) -> dict[str, Any]:
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
    if new.mode is TaskMode.EXTERNAL:
        columns |= {"state": TaskState.RUNNING, "started_at": tx.now, "has_callback": int(new.local is not None)}
    # what most tasks do not have is not written for them
    rare = {
        "parent_seq": new.parent_seq,
        "child_session_id": new.child_session_id,
        "idempotency_key": new.idempotency_key,
        "close_policy": None if new.close_policy is ClosePolicy.KEEP else new.close_policy,
        "notify_on_end": 1 if new.notify_on_end else None,
    }
    return columns | {name: value for name, value in rare.items() if value is not None}


def _may_bear(parent: Task | None, new: NewTask) -> bool:
    """Whether a closed session may still have this child: its parent was kept, and goes on there."""
    return parent is not None and not parent.is_terminal and parent.scope == str(new.scope)


def same_before(tx: Transaction, new: NewTask) -> Task | None:
    """
    Return the task that was created under the same idempotency key, if there is a key and it was used.

    Raises:
        IdempotencyConflict: it was used for other work.
    """
    if new.idempotency_key is None:
        return None
    task = session_queries.task_by_key(tx, str(new.scope), new.idempotency_key)
    if task is None:
        return None
    external = new.mode is TaskMode.EXTERNAL
    wanted = (new.id, new.kind) if external else (new.mode, new.function, new.arguments)
    found = (task.id, task.kind) if external else (task.mode, task.function, task.arguments)
    if task.is_external != external or wanted != found:
        raise IdempotencyConflict(
            f"idempotency key {new.idempotency_key!r} was used for task {task.id!r} of session {task.scope!r}, "
            "which is other work: use another key",
            task_id=task.id,
        )
    return task


def cancelled_ancestor(tx: Transaction, parent: Task | None, agent: int | None) -> Task | None:
    """
    Return the nearest ancestor whose cancel was requested: the parent, the sub-agent of the session, or one above them.

    A live one whose cancel was not requested answers for all above it: theirs has passed it by.
    """
    above = [parent, None if agent is None else queries.task_by_seq(tx, agent)]
    seen: set[int] = set()
    while above:
        task = above.pop(0)
        if task is None or task.task_seq in seen:
            continue
        seen.add(task.task_seq)
        if task.state in {TaskState.CANCEL_REQUESTED, TaskState.CANCELLED}:
            return task
        if not task.is_terminal:
            continue
        place = session_queries.birthplace(tx, task.scope)
        for seq in (task.parent_seq, None if place is None else place.agent):
            above.append(None if seq is None else queries.task_by_seq(tx, seq))
    return None


def _born_cancelled(tx: Transaction, task: Task, ancestor: Task) -> Task:
    if task.is_external:
        return transition(tx, task, Settle(TaskState.CANCELLED, reason=ancestor.cancel_reason)).task
    command = RequestCancel(ancestor.cancel_reason, ancestor.cancel_requested_by or "", ancestor.task_seq)
    return transition(tx, task, command).task


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


def request_cancel(
    tx: Transaction, task: Task, reason: str | None, by: str, spared: Collection[int] = frozenset()
) -> list[Outcome]:
    """
    Ask for the end of a task and of all that descends from it, but for who is *spared*; its own outcome comes first.

    One that is pending ends here, and so does external work without a callback.
    """
    outcome = _request(tx, task, RequestCancel(reason, by))
    if outcome.verdict is not Verdict.APPLIED:
        return [outcome]
    command = RequestCancel(reason, by, because_of=task.task_seq)
    below = session_queries.live_descendants(tx, task.task_seq)
    return [outcome, *(_request(tx, one, command) for one in below if one.task_seq not in spared)]


def _request(tx: Transaction, task: Task, command: RequestCancel) -> Outcome:
    outcome = transition(tx, task, command)
    if outcome.verdict is Verdict.APPLIED and outcome.task.is_external and not outcome.task.has_callback:
        return transition(tx, outcome.task, ConfirmCancel(None))
    return outcome


def finish_cancel(tx: Transaction, task_seq: int, dead_owner: int) -> Outcome:
    """End a cancelled task if it is still *dead_owner*'s: nothing of it runs any more."""
    task = by_seq(tx, task_seq)
    if task.owner_id != dead_owner or task.state != TaskState.CANCEL_REQUESTED:
        return Outcome(task, Verdict.SUPERSEDED)
    return end_cancelled(tx, task)


def end_cancelled(tx: Transaction, task: Task) -> Outcome:
    """
    Do with a cancelled task whose owner is gone what can be done.

    External work whose callback was not called waits for who registers it again; a callback that was cut off is noted.
    """
    if task.awaits_callback:
        return transition(tx, task, Release("owner_died"))
    if task.callback_begun_at is not None:
        task = transition(tx, task, CallbackFailed(CUT_OFF)).task
    return transition(tx, task, ConfirmCancel(None))


def end_called(tx: Transaction, task_seq: int, fence: Fence, error: str | None) -> Outcome:
    """End a cancelled task whose callback was called, and note what it raised, JSON text, if it did."""
    task = by_seq(tx, task_seq)
    if error is not None:
        task = transition(tx, task, CallbackFailed(error)).task
    return transition(tx, task, ConfirmCancel(fence))


def end_owner(tx: Transaction, owner_id: int, evidence: str, alive: Collection[int]) -> None:
    """
    Give back what a closing owner still holds, and note its end: what may run again is released, the rest is abandoned.

    A cancel in progress is finished, but for bodies that are still *alive*: whoever is asked next finds their owner gone.
    External work goes on without an owner.
    """
    for task in queries.live_tasks_of_owner(tx, owner_id):
        if task.is_external and (task.state != TaskState.CANCEL_REQUESTED or task.awaits_callback):
            transition(tx, task, Release("closed"))
        elif task.state != TaskState.CANCEL_REQUESTED:
            transition(tx, task, Release("closed") if task.may_rerun else Abandon(evidence))
        elif task.task_seq not in alive:
            end_cancelled(tx, task)
    queries.end_owner(tx, owner_id, OwnerEnd.CLOSED)


def give_up(tx: Transaction, task: Task, reason: str, evidence: str) -> Outcome:
    """End or free a task by a person's decision; nobody writes under its attempt any more."""
    return transition(tx, task, GiveUp(reason, evidence))


# --- notes ----------------------------------------------------------------------------------------------------------


def notify(tx: Transaction, task: Task, command: Notify, data: str) -> Outcome:
    """Post a note of a task to its session, if the attempt that posts it is the current one; one of its key only once."""
    current = by_seq(tx, task.task_seq)
    decision = decide(current, command, tx.now)
    if isinstance(decision, Refused):
        return Outcome(current, decision.verdict, decision.stale)
    key, note = command.note["note_key"], command.note["note"]
    if session_queries.insert_note(tx, current, key, note, data) is None:
        return Outcome(current, Verdict.UNCHANGED)
    return transition(tx, current, command)


def _note_end(tx: Transaction, task: Task) -> None:
    """Tell a task's session that it has ended, with the end itself."""
    key = f"end:{task.task_seq}"
    what: dict[str, Any] = {"state": task.state}
    said = f"task {task.id!r} {task.state}"
    if task.failure is not None:
        failure = json.loads(task.failure)
        what |= {"type": failure["type"], "message": failure["message"]}
        said += f": {failure['type']}: {failure['message']}"
    elif task.state == TaskState.CANCELLED and task.cancel_reason is not None:
        what |= {"reason": task.cancel_reason}
        said += f": {task.cancel_reason}"
    if session_queries.insert_note(tx, task, key, said, json.dumps(what)) is None:
        return
    data = queries.event_data(EventType.NOTED, {}, {"note_key": key, "note": said})
    queries.insert_event(tx, EventType.NOTED, scope=task.scope, task=task, data=data, is_last=False)
