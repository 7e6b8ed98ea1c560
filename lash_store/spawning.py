"""Owns how what a caller asks for becomes what a row is born with, or ends with: every check that needs no transaction."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from enum import StrEnum
from typing import Any

from .births import Born, NewTask
from .commands import Settle
from .errors import InvalidArguments, InvalidId, SessionError
from .failures import failure_text
from .handles import new_handle_id, new_id
from .models import (
    CancelPolicy,
    ClosePolicy,
    Failure,
    Recovery,
    Scope,
    TaskKind,
    TaskMode,
    TaskState,
    check_id,
    check_text,
)
from .registry import Registry, to_json

__all__ = ["body_columns", "close_refused", "close_unless_adopted", "ending", "new_task"]


def body_columns(
    registry: Registry,
    fn: Callable[..., Any] | Coroutine[Any, Any, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cancel_policy: CancelPolicy | None,
) -> dict[str, Any]:
    """
    Return the columns that say what a body will do: a registered function's, or a coroutine object's.

    Raises:
        UnknownFunction, InvalidArguments: not registered here, or the arguments do not fit.
    """
    if inspect.iscoroutine(fn):
        if args or kwargs:
            raise InvalidArguments("a coroutine object has its arguments already: spawn(fn(…)) or spawn(fn, …)")
        return {
            "label": getattr(fn, "__name__", "coroutine"),
            "recovery": Recovery.OWNER_BOUND,
            "cancel_policy": CancelPolicy(cancel_policy or CancelPolicy.ABORT_LOCAL),
        }
    function = registry.by_body(fn)  # type: ignore[arg-type]
    return {
        "label": function.name,
        "function": function.name,
        "recovery": function.recovery,
        "cancel_policy": CancelPolicy(cancel_policy or CancelPolicy.COOPERATIVE),
        "arguments": function.bind(args, kwargs),
        "max_attempts": function.max_attempts,
    }


def new_task(scope: Scope, owner_id: int, columns: dict[str, Any]) -> NewTask:
    """
    Check what a task is to be born with; without an ``id`` one is made of its label.

    Raises:
        InvalidId, ValueError: an id, key or word that cannot be stored.
        SessionError: it was to work in its own session.
    """
    columns = {**_DEFAULTS, **columns}
    label, task_id = check_text("label", columns.pop("label")), columns.pop("id", None)
    if task_id is None:
        task_id = new_id(label)
    elif check_id("task id", task_id).startswith("h-"):
        raise InvalidId(f"task id {task_id!r} begins with 'h-', as handle ids do: choose another")
    child_session_id, key = columns["child_session_id"], columns["idempotency_key"]
    if child_session_id is not None and check_id("child session id", child_session_id) == scope.session_id:
        raise SessionError(f"task {task_id!r} cannot work in its own session: child_session_id names another")
    if key is not None:
        check_id("idempotency key", key)
    for name, words in (("kind", TaskKind), ("close_policy", ClosePolicy)):
        columns[name] = _word(task_id, name, words, columns[name])
    return NewTask(scope=scope, id=task_id, label=label, owner_id=owner_id, handle_id=new_handle_id(), **columns)


def _word(task_id: str, name: str, words: type[StrEnum], given: str) -> StrEnum:
    try:
        return words(given)
    except ValueError:
        raise ValueError(f"task {task_id!r}: {name} is one of {', '.join(words)}, not {given!r}") from None


_DEFAULTS: dict[str, Any] = {
    "kind": TaskKind.OTHER,
    "mode": TaskMode.MANAGED,
    "function": None,
    "arguments": None,
    "max_attempts": 1,
    "cancel_policy": CancelPolicy.COOPERATIVE,
    "close_policy": ClosePolicy.KEEP,
    "child_session_id": None,
    "idempotency_key": None,
}


def ending(
    task_id: str, state: TaskState, result: Any, failure: Failure | BaseException | Mapping[str, Any] | str | None
) -> Settle:
    """
    Check how external work is said to have ended.

    Raises:
        ValueError: a state in which work does not end, or a result or failure that does not belong to it.
        ResultNotSerializable: the result is not JSON.
    """
    if state not in {TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED}:
        raise ValueError(f"task {task_id!r} may end 'completed', 'failed' or 'cancelled', not {str(state)!r}")
    if result is not None and state is not TaskState.COMPLETED:
        raise ValueError(f"task {task_id!r}: a result belongs to 'completed', not to {str(state)!r}")
    if failure is not None and state is not TaskState.FAILED:
        raise ValueError(f"task {task_id!r}: a failure belongs to 'failed', not to {str(state)!r}")
    return Settle(
        state,
        result=to_json(result, f"the result of task {task_id!r}") if state is TaskState.COMPLETED else None,
        failure=failure_text(failure) if state is TaskState.FAILED else None,
    )


def close_refused(fn: object) -> None:
    """Close a coroutine object that is refused: nobody will ever run it."""
    if inspect.iscoroutine(fn):
        fn.close()


def close_unless_adopted(coroutine: Coroutine[Any, Any, Any], stored: asyncio.Future[Born]) -> None:
    """Close a coroutine object unless a task of its own was stored for it."""
    if stored.cancelled() or stored.exception() is not None or not stored.result().is_new:
        coroutine.close()
