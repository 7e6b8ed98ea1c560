"""
Owns the one door through which rows change: units of work over an open transaction.

Everything here is synchronous and a function of ``tx`` and its arguments alone: it may run twice, and never touches a coroutine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import families, monitor_queries, queries, retention_queries, session_queries, step_queries, waking
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
    Start,
)
from .errors import SessionClosed, StaleAttempt, TaskNotFound, TaskPruned, UnknownSession, shown
from .lifecycle import CUT_OFF, TERMINAL_EVENTS, Change, Refused, Task, decide
from .models import (
    EventType,
    OwnerEnd,
    Scope,
    TaskState,
    Verdict,
)
from .retention_queries import Tombstone
from .session_queries import SessionRow
from .transaction import Transaction

__all__ = [
    "Outcome",
    "end_cancelled",
    "end_owner",
    "find",
    "finish_cancels",
    "give_up",
    "notify",
    "plain",
    "request_cancel",
    "start",
    "start_all",
    "transition",
]

_STARTS_AT_ONCE = 500
"""What is made for a start is kept until it is in the file: of thousands, the garbage collector would look at it often."""


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
            if decision.type in TERMINAL_EVENTS:
                if after.notify_on_end:
                    _note_end(tx, after)
                if after.is_monitor:
                    waking.wake_at_end(tx, after)
            data = queries.event_data(decision.type, decision.columns, decision.detail)
            from_scope = task.scope if decision.type is EventType.TRANSFERRED else None
            queries.insert_event(
                tx, decision.type, scope=after.scope, from_scope=from_scope, task=after, data=data, local=local
            )
            return Outcome(after, Verdict.APPLIED)
    elif fresh:
        return Outcome(task, decision.verdict, decision.stale)
    if fresh:
        raise queries.not_as_read(f"the row of task #{task.task_seq}")
    return transition(tx, as_it_is(tx, task), command, local=local)


def as_it_is(tx: Transaction, seen: Task) -> Task:
    """
    Return a row that was seen before as it is now; of one that was pruned since, what was seen, with the end that is left of it.

    So a body, or whoever else had it in hand, is told that it has ended: what it was to say comes too late.

    Raises:
        TaskNotFound: the file never had it.
    """
    task = queries.task_by_seq(tx, seen.task_seq)
    if task is not None:
        return task
    left = retention_queries.tombstone_by_seq(tx, seen.task_seq)
    if left is None:
        raise task_not_found_by_seq(seen.task_seq)
    return seen._replace(scope=left.scope, state=left.state, owner_id=None, completed_at=left.completed_at)


def by_seq(tx: Transaction, task_seq: int) -> Task:
    """
    Return one incarnation.

    Raises:
        TaskNotFound, TaskPruned: the file has none of that number, or none any more.
    """
    # what no column holds is bound to no statement
    if not isinstance(task_seq, int) or not 0 < task_seq < 2**63:
        raise task_not_found_by_seq(task_seq)
    task = queries.task_by_seq(tx, task_seq)
    if task is None:
        refuse_pruned(retention_queries.tombstone_by_seq(tx, task_seq))
        raise task_not_found_by_seq(task_seq)
    return task


def find(tx: Transaction, scope: Scope, task_id: str) -> Task:
    """
    Return the live incarnation of an id, else the newest.

    Raises:
        UnknownSession: the file has no such session.
        TaskNotFound, TaskPruned: the session has no such task, or not any more.
    """
    task = queries.task_by_id(tx, str(scope), task_id)
    if task is None or task.is_terminal:
        refuse_pruned(newest_left(tx, scope, task_id, task))
    if task is not None:
        return task
    if session_queries.session(tx, str(scope)) is None:
        raise unknown_session(scope)
    raise task_not_found(scope, task_id)


def newest_left(tx: Transaction, scope: Scope, task_id: str, task: Task | None) -> Tombstone | None:
    """Return what is left of an id's newest incarnation, if that was pruned; *task* is the newest that is there."""
    left = retention_queries.tombstone_by_id(tx, str(scope), task_id)
    return left if left is not None and (task is None or task.task_seq < left.task_seq) else None


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


def unknown_session(scope: Scope) -> UnknownSession:
    """Say that a session is not in the file."""
    return UnknownSession(f"session {str(scope)!r} is not in this file: sessions() lists those that are")


def refuse_pruned(left: Tombstone | None) -> None:
    """
    Refuse what names a task that was pruned.

    Raises:
        TaskPruned: *left* is what is left of it.
    """
    if left is not None:
        raise TaskPruned(
            f"task {left.id!r} of session {left.scope!r} {left.state} at {left.completed_at}, and was pruned at {left.pruned_at}",
            task_id=left.id,
        )


def task_not_found_by_seq(task_seq: int) -> TaskNotFound:
    """Say that an incarnation is not in the file."""
    return TaskNotFound(
        f"task_seq {shown(task_seq)} is not in this file: was it opened by another path?", task_id=shown(task_seq)
    )


def task_not_found(scope: Scope, task_id: str) -> TaskNotFound:
    """Say that a task is not in its session."""
    return TaskNotFound(f"task {task_id!r} is not in session {str(scope)!r}: list() shows what is", task_id=task_id)


# --- bodies ---------------------------------------------------------------------------------------------------------


def start(tx: Transaction, task: Task, command: Start, *, fresh: bool = True) -> Outcome:
    """Start a body: the attempt rises here; the event carries the checkpoint the body begins with."""
    checkpoint = step_queries.checkpoint(tx, task.task_seq) if task.attempt else None
    return transition(tx, task, command, fresh=fresh, local=checkpoint)


def start_all(tx: Transaction, starts: Sequence[tuple[Task, Start]]) -> None:
    """Start many bodies of rows that were read in this transaction; as `start`, with a statement for many of them."""
    for first in range(0, len(starts), _STARTS_AT_ONCE):
        _start_some(tx, starts[first : first + _STARTS_AT_ONCE])


def _start_some(tx: Transaction, starts: Sequence[tuple[Task, Start]]) -> None:
    checkpoints = step_queries.checkpoints(tx, [task.task_seq for task, _ in starts if task.attempt])
    changes = []
    for task, command in starts:
        decision = decide(task, command, tx.now)
        assert isinstance(decision, Change)
        changes.append((task, decision))
    rows = queries.update_tasks(tx, [(task, decision.columns) for task, decision in changes])
    for after, (_, decision) in zip(rows, changes, strict=True):
        data = queries.event_data(decision.type, decision.columns, decision.detail)
        local = checkpoints.get(after.task_seq)
        queries.insert_event(tx, decision.type, scope=after.scope, task=after, data=data, local=local)


def stale(task: Task, attempt: int) -> StaleAttempt:
    """Say that an attempt is not the current one."""
    return StaleAttempt(
        f"attempt {attempt} of task {task.id!r} may not write: the row is {task.state}, attempt {task.attempt}, "
        f"owner {task.owner_id}; let this body end",
        task_id=task.id,
    )


def plain(text: str) -> str:
    """
    Write JSON text with its keys in order, so that what is the same reads the same: to Python 1, 1.0 and True are equal.

    What somebody's hand made unreadable is left as it is.
    """
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


# --- stopping -------------------------------------------------------------------------------------------------------


def request_cancel(
    tx: Transaction,
    task: Task,
    reason: str | None,
    by: str,
    spared: Collection[int] = frozenset(),
    *,
    stays_armed: bool = False,
) -> list[Outcome]:
    """
    Ask for the end of a task and of all that descends from it, but for who is *spared*; its own outcome comes first.

    One that is pending ends here, and so does external work without a callback. A monitor does not start with its session any
    more, unless it *stays armed*.
    """
    outcomes = _request_all(tx, task, reason, by, spared)
    for outcome in outcomes:
        if outcome.task.is_monitor and outcome.verdict is Verdict.APPLIED and not stays_armed:
            monitor_queries.disarm_one(tx, outcome.task.task_seq)
    return outcomes


def _request_all(tx: Transaction, task: Task, reason: str | None, by: str, spared: Collection[int]) -> list[Outcome]:
    outcome = _request(tx, task, RequestCancel(reason, by))
    if outcome.verdict is not Verdict.APPLIED:
        return [outcome]
    command = RequestCancel(reason, by, because_of=task.task_seq)
    below = families.live_descendants(tx, task.task_seq)
    return [outcome, *(_request(tx, one, command) for one in below if one.task_seq not in spared)]


def _request(tx: Transaction, task: Task, command: RequestCancel) -> Outcome:
    outcome = transition(tx, task, command)
    if outcome.verdict is Verdict.APPLIED and outcome.task.is_external and not outcome.task.has_callback:
        return transition(tx, outcome.task, ConfirmCancel(None))
    return outcome


def finish_cancels(
    tx: Transaction, dead_owners: Iterable[int], free: Iterable[int], is_gone: Callable[[Task], bool]
) -> None:
    """
    End the cancelled tasks of owners that are gone, and those of nobody that are *free*, by ``task_seq``.

    Not so those of which a process or a body may live, as *is_gone* tells.
    """
    left = [task for owner_id in dead_owners for task in queries.live_tasks_of_owner(tx, owner_id)]
    found = [queries.task_by_seq(tx, task_seq) for task_seq in free]
    left += [task for task in found if task is not None and task.owner_id is None]
    for task in left:
        if task.state == TaskState.CANCEL_REQUESTED and is_gone(task):
            end_cancelled(tx, task)


def end_cancelled(tx: Transaction, task: Task, why: str = "owner_died") -> Outcome:
    """
    Do with a cancelled task whose owner is gone what can be done.

    External work whose callback was not called waits for who registers it again; a callback that was cut off is noted.
    """
    if task.awaits_callback:
        return transition(tx, task, Release(why))
    if task.callback_begun_at is not None:
        task = transition(tx, task, CallbackFailed(CUT_OFF)).task
    return transition(tx, task, ConfirmCancel(None))


def end_called(tx: Transaction, task_seq: int, fence: Fence, error: str | None) -> Outcome:
    """End a cancelled task whose callback was called, and note what it raised, JSON text, if it did."""
    task = by_seq(tx, task_seq)
    if error is not None:
        task = transition(tx, task, CallbackFailed(error)).task
    return transition(tx, task, ConfirmCancel(fence))


def end_owner(tx: Transaction, owner_id: int, evidence: Callable[[Task], str], alive: Collection[int]) -> None:
    """
    Give back what a closing owner still holds, and note its end: what may run again is released, the rest is abandoned.

    A cancel in progress is finished, but for bodies that are still *alive*: whoever looks once they are gone does it.
    External work goes on without an owner.
    """
    for task in queries.live_tasks_of_owner(tx, owner_id):
        if task.is_external and (task.state != TaskState.CANCEL_REQUESTED or task.awaits_callback):
            transition(tx, task, Release("closed"))
        elif task.state != TaskState.CANCEL_REQUESTED:
            is_left = task.task_seq in alive
            if task.may_rerun:
                transition(tx, task, Release("closed", process_left=is_left))
            else:
                transition(tx, task, Abandon(evidence(task), process_left=is_left))
        elif task.task_seq not in alive:
            end_cancelled(tx, task)
    queries.end_owner(tx, owner_id, OwnerEnd.CLOSED)


def give_up(tx: Transaction, task: Task, reason: str, evidence: str) -> Outcome:
    """End or free a task by a person's decision; nobody writes under its attempt any more."""
    return transition(tx, task, GiveUp(reason, evidence))


# --- notes ----------------------------------------------------------------------------------------------------------


def notify(tx: Transaction, task: Task, command: Notify, data: str) -> Outcome:
    """Post a note of a task to its session, if the attempt that posts it is the current one; one of its key only once."""
    current = as_it_is(tx, task)
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
