"""Owns the units that keep the books of external work, which somebody else does: its births, flips, reports and ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from . import births, queries, session_queries, transitions
from .births import Born, NewTask
from .commands import Command, ConfirmCancel, Rebind
from .errors import TaskError
from .lifecycle import Task
from .models import ClosePolicy, Scope, TaskMode, TaskState
from .transaction import Transaction
from .transitions import Outcome

__all__ = ["change", "register"]


def register(tx: Transaction, new: NewTask, gone: Collection[int]) -> Born:
    """
    Store external work, or bind it to who registers it again; *gone* are owners whose locks were found free.

    A live row of the same kind is bound again if nobody keeps its books: no owner, one that is gone, or this one without a
    callback; what is said anew, but for the parent, replaces what the row has. Otherwise, under the same idempotency key, it
    comes back as it is.

    Raises:
        TaskExists: the id is live, and somebody keeps it.
        IdempotencyConflict, SessionClosed, UnknownSession: see `births.create`.
    """
    births.refuse_given_up(tx)
    before = births.same_before(tx, new)
    live = before if before is not None and not before.is_terminal else None
    if before is None:
        live = queries.live_task_by_id(tx, str(new.scope), new.id)
    is_repeated = before is not None and before.owner_id == new.owner_id and new.local is None
    if (
        live is not None
        and live.is_external
        and live.kind == new.kind
        and not is_repeated
        and _is_unkept(live, new.owner_id, gone)
    ):
        if live.state != TaskState.CANCEL_REQUESTED or live.awaits_callback:
            return _rebind(tx, live, new)
        live = transitions.end_cancelled(tx, live).task
    if before is not None:
        task = live or before
        return Born(task, session_queries.owner_handle(tx, task.task_seq).handle_id, is_new=False)
    if live is not None and not live.is_terminal:
        raise births.task_exists(new)
    return births.create(tx, new)


def _is_unkept(task: Task, owner_id: int, gone: Collection[int]) -> bool:
    # an owner that ended in order, or was given up, has let go of its books in the same transaction
    return task.owner_id is None or task.owner_id in gone or (task.owner_id == owner_id and not task.has_callback)


def _rebind(tx: Transaction, task: Task, new: NewTask) -> Born:
    if new.child_session_id not in {None, task.child_session_id}:
        transitions.open_session_row(tx, Scope(new.scope.runtime, new.child_session_id or ""))
    command = Rebind(new.owner_id, task.owner_id, new.local is not None, _said_anew(new))
    bound = transitions.transition(tx, task, command, local=new.local).task
    if bound.state == TaskState.CANCEL_REQUESTED and not bound.has_callback:
        bound = transitions.transition(tx, bound, ConfirmCancel(None)).task
    return Born(bound, session_queries.owner_handle(tx, task.task_seq).handle_id, is_new=False)


def _said_anew(new: NewTask) -> dict[str, Any]:
    """Return what a registration says beyond its defaults."""
    said = {
        "label": None if new.label == new.id else new.label,
        "child_session_id": new.child_session_id,
        "idempotency_key": new.idempotency_key,
        "close_policy": None if new.close_policy is ClosePolicy.KEEP else new.close_policy,
        "notify_on_end": 1 if new.notify_on_end else None,
    }
    return {column: value for column, value in said.items() if value is not None}


def change(tx: Transaction, task: Task, command: Command, what: str) -> Outcome:
    """
    Change external work as who does it says.

    Raises:
        TaskError: the store does this work itself, and its body says *what*.
    """
    _refuse_ours(task, what)
    return transitions.transition(tx, task, command)


def _refuse_ours(task: Task, what: str) -> None:
    if task.mode != TaskMode.EXTERNAL:
        raise TaskError(
            f"task {task.id!r} of session {task.scope!r} is {task.mode}: {what} is for external work; "
            "its body ends it, or cancel does",
            task_id=task.id,
        )
