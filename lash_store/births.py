"""
Owns how a task is born: beside its parent, under its key, in an open session, and cancelled if an ancestor was.

Units over an open transaction, as in `transitions`.
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from . import monitoring, queries, retention_queries, session_queries, transitions
from .commands import Expire, RequestCancel, Start
from .errors import IdempotencyConflict, LimitExceeded, SessionError, TaskExists
from .lifecycle import Refused, Task, deadline_passed, decide, with_columns
from .models import (
    CancelPolicy,
    ClosePolicy,
    EventType,
    HandleRole,
    Recovery,
    Scope,
    TaskKind,
    TaskMode,
    TaskState,
)
from .monitor_models import MonitorSpec
from .transaction import Transaction

__all__ = ["Born", "NewTask", "check_room", "create", "moved", "refuse_given_up", "same_before", "task_exists"]


class NewTask(NamedTuple):
    """
    What a task is born with.

    ``local`` cannot be written down: a coroutine object, or the cancel callback of external work. *by_its_parent*: that one's
    body spawns it. Its key counts among that one's children, wherever those are, and, unless *keyed_by_parent*, in its session.
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
    keyed_by_parent: bool = False
    by_its_parent: bool = False
    version: str | None = None
    timeout: float | None = None
    deadline: str | None = None
    monitor: MonitorSpec | None = None


def moved(new: NewTask, scope: Scope) -> NewTask:
    """Return what is to be born, in another session."""
    if new.scope == scope:
        return new
    if new.child_session_id == scope.session_id:
        raise SessionError(f"task {new.id!r} cannot work in its own session: child_session_id names another")
    return new._replace(scope=scope)


class Born(NamedTuple):
    """A task as it was stored and the handle of its session; not *is_new* if an idempotency key named one that was there."""

    task: Task
    handle_id: str
    is_new: bool = True


def create(tx: Transaction, new: NewTask, *, start: bool = False) -> Born:
    """
    Store a task with its first event and its session's handle, and with *start* its first start in the same commit.

    One with an idempotency key that was used before for the same work is not made again. One under an ancestor whose cancel
    was requested is born cancelled, for the ancestor's reason.

    Raises:
        TaskExists: a live task has the id.
        IdempotencyConflict: the key was used for other work.
        SessionClosed: the session is closed, and no live task of it is the parent.
        LimitExceeded: the session holds as much as the store's limits allow.
        StoreClosed: a person gave this owner up.
        UnknownSession: the file has no such session, or not the one a sub-agent should work in.
    """
    refuse_given_up(tx)
    before = same_before(tx, new)
    if before is not None:
        return Born(before, session_queries.owner_handle(tx, before.task_seq).handle_id, is_new=False)
    scope = str(new.scope)
    place = session_queries.birthplace(tx, scope)
    if place is None:
        raise transitions.unknown_session(new.scope)
    parent = None if new.parent_seq is None else _parent(tx, new.scope, new.parent_seq)
    if place.closed_at is not None and not _may_bear(parent, new):
        raise transitions.session_closed(new.scope)
    if new.child_session_id is not None:
        transitions.open_session_row(tx, Scope(new.scope.runtime, new.child_session_id))
    check_room(tx, scope, adding=1)
    if new.monitor is not None:
        if queries.live_task_by_id(tx, scope, new.id) is not None:
            raise task_exists(new)
        monitoring.check_room(tx, scope, adding=1)
    cancelled = cancelled_ancestor(tx, scope, parent, place.agent)
    columns = _first_columns(tx, new, scope)
    born = with_columns(queries.NO_TASK, columns)
    is_late = new.deadline is not None and new.deadline <= tx.now
    ends_here = cancelled is not None or is_late
    command = Start(new.owner_id, new.owner_id, version=new.version)
    started = decide(born, command, tx.now) if start and not ends_here else None
    assert not isinstance(started, Refused)
    try:
        task = queries.insert_task(tx, columns if started is None else {**columns, **started.columns})
    except sqlite3.IntegrityError as error:
        if queries.live_task_by_id(tx, scope, new.id) is None:
            raise
        raise task_exists(new) from error
    session_queries.insert_handle(tx, new.handle_id, task.scope, task.task_seq, HandleRole.OWNER)
    if new.monitor is not None:
        monitoring.bear(tx, task, new.monitor)
    if new.mode is TaskMode.HIDDEN and not place.sync_needed:
        session_queries.flag_sync(tx, task.scope, needed=True)
    data = queries.event_data(EventType.REGISTERED, columns, {"handle_id": new.handle_id})
    born = with_columns(born, {"task_seq": task.task_seq})
    is_last = started is None and not ends_here
    # a callback that will never be called is nobody's to keep; a coroutine is the runner's to close
    local = None if cancelled is not None and new.mode is TaskMode.EXTERNAL else new.local
    queries.insert_event(tx, EventType.REGISTERED, scope=task.scope, task=born, data=data, local=local, is_last=is_last)
    if cancelled is not None:
        task = _born_cancelled(tx, task, cancelled)
    elif is_late:
        task = transitions.transition(tx, task, Expire(new.owner_id, deadline_passed(new.deadline or ""))).task
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


def _first_columns(tx: Transaction, new: NewTask, scope: str) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "scope": scope,
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
        "version": new.version,
        "timeout": new.timeout,
        "deadline": new.deadline,
    }
    return columns | {name: value for name, value in rare.items() if value is not None}


def _parent(tx: Transaction, scope: Scope, task_seq: int) -> Task:
    parent = transitions.by_seq(tx, task_seq)
    if Scope.parse(parent.scope).runtime != scope.runtime:
        raise SessionError(f"task {parent.id!r} of {parent.scope!r} is of another runtime: it cannot be a parent here")
    return parent


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
    task = None
    if new.by_its_parent and new.parent_seq is not None:
        # a body is given its own child, wherever either of them is by now; one that lives has all of its children in the file
        task = session_queries.child_by_key(tx, new.parent_seq, new.idempotency_key)
    if task is None and not new.keyed_by_parent:
        task = session_queries.task_by_key(tx, str(new.scope), new.idempotency_key)
        # it was done; what is left of it says so, and that nobody does it twice
        left = retention_queries.tombstone_by_key(tx, str(new.scope), new.idempotency_key)
        if left is not None and (task is None or task.task_seq < left.task_seq):
            transitions.refuse_pruned(left)
    if task is None:
        return None
    if new.by_its_parent and task.parent_seq == new.parent_seq and _is_to_be_tried_again(tx, task):
        return None
    if not _is_same_work(task, new):
        if new.keyed_by_parent:
            raise IdempotencyConflict(
                f"task {task.id!r} of session {task.scope!r} is a child of this task already, for other work: "
                "give this one an id of its own",
                task_id=task.id,
            )
        raise IdempotencyConflict(
            f"idempotency key {new.idempotency_key!r} was used for task {task.id!r} of session {task.scope!r}, "
            "which is other work: use another key",
            task_id=task.id,
        )
    return task


def _is_to_be_tried_again(tx: Transaction, child: Task) -> bool:
    """Whether a child came to nothing and its parent has been retried since: the retry is to make that good, too."""
    if not child.is_terminal or child.state == TaskState.COMPLETED or child.parent_seq is None:
        return False
    return session_queries.was_retried_after(tx, child.parent_seq, child.task_seq)


def check_room(tx: Transaction, scope: str, *, adding: int = 0) -> None:
    """
    Make sure a session may hold so many tasks more.

    Raises:
        LimitExceeded: it may not.
    """
    if tx.limits is None:
        return
    for name, most, count in (
        ("live_tasks", tx.limits.live_tasks, session_queries.count_live),
        ("total_tasks", tx.limits.total_tasks, session_queries.count_all),
    ):
        if most is not None and count(tx, scope, min(most, 2**62) + 1) + adding > most:
            raise LimitExceeded(
                f"session {scope!r} holds {most} tasks, which is its limit {name}: "
                "let some end, use another session, or give the store other Limits"
            )


def _is_same_work(task: Task, new: NewTask) -> bool:
    if new.mode != task.mode or new.function != task.function:
        return False
    if new.mode is TaskMode.EXTERNAL:
        return (new.id, new.kind) == (task.id, task.kind)
    if new.arguments is None or task.arguments is None:
        # of a coroutine object no more is known than its name
        return new.label == task.label
    return new.arguments == task.arguments or transitions.plain(new.arguments) == transitions.plain(task.arguments)


def cancelled_ancestor(tx: Transaction, scope: str, parent: Task | None, agent: int | None) -> Task | None:
    """
    Return the nearest ancestor whose cancel was requested: the parent, the sub-agent of the session, or one above them.

    A live one whose cancel was not requested answers for all above it: theirs has passed it by. A parent in another session
    does not answer for the sub-agent of this one.
    """
    if parent is None and agent is None:
        return None
    answers = parent is not None and not parent.is_terminal and parent.state != TaskState.CANCEL_REQUESTED
    above = [] if answers else [parent]
    if not (answers and parent is not None and parent.scope == scope):
        above.append(None if agent is None else queries.task_by_seq(tx, agent))
    seen: set[int] = set()
    while above:
        task = above.pop(0)
        if task is None or task.task_seq in seen:
            continue
        seen.add(task.task_seq)
        # work that its registrar says is cancelled was not asked to end, and nothing below it was
        if task.state == TaskState.CANCEL_REQUESTED or (task.state == TaskState.CANCELLED and task.cancel_requested_at):
            return task
        if not task.is_terminal:
            continue
        place = session_queries.birthplace(tx, task.scope)
        for seq in (task.parent_seq, None if place is None else place.agent):
            above.append(None if seq is None else queries.task_by_seq(tx, seq))
    return None


def _born_cancelled(tx: Transaction, task: Task, ancestor: Task) -> Task:
    by = ancestor.cancel_requested_by or ""
    command = RequestCancel(ancestor.cancel_reason, by, because_of=ancestor.task_seq, at_birth=True)
    return transitions.transition(tx, task, command).task


def task_exists(new: NewTask) -> TaskExists:
    """Say that a live task has the id."""
    if new.monitor is not None:
        return TaskExists(
            f"monitor {new.monitor.id!r} runs in session {str(new.scope)!r}: let it, or call "
            f"stop_monitor({new.monitor.id!r}) before another is started",
            task_id=new.id,
        )
    return TaskExists(
        f"task {new.id!r} is live in session {str(new.scope)!r}: await or cancel it, or choose another id",
        task_id=new.id,
    )
