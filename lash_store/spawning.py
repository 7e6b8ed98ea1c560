"""Owns how what a caller asks for becomes a task, or the end of one: every check that needs no transaction, then the unit."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any

from . import births, transitions
from .births import Born, NewTask
from .commands import Settle
from .core import Core
from .errors import InvalidArguments, InvalidId, SessionError, shown
from .failures import failure_text
from .handles import TaskHandle, new_handle_id, new_id
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
    check_seconds,
    check_text,
    check_word,
)
from .policies import Limits
from .registry import Registry, to_json
from .transaction import Transaction, utc_text

__all__ = ["body_columns", "close_refused", "ending", "new_task", "spawn"]


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
            "cancel_policy": _policy(cancel_policy, CancelPolicy.ABORT_LOCAL),
        }
    function = registry.by_body(fn)  # type: ignore[arg-type]
    return {
        "label": function.name,
        "function": function.name,
        "recovery": function.recovery,
        "cancel_policy": _policy(cancel_policy, CancelPolicy.COOPERATIVE),
        "arguments": function.bind(args, kwargs),
        "max_attempts": function.max_attempts,
        "version": function.version,
        "timeout": function.timeout,
    }


async def spawn(
    core: Core,
    scope: Scope,
    fn: Callable[..., Any] | Coroutine[Any, Any, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    columns: dict[str, Any],
    *,
    cancel_policy: CancelPolicy | None = None,
    timeout: float | None = None,
    deadline: datetime | float | None = None,
    key: Callable[[str], str] | None = None,
    refused: Callable[[], None] | None = None,
    takes_slot: bool = True,
    prepare: Callable[[Transaction, NewTask], NewTask],
) -> TaskHandle:
    """
    Start a task, and return its handle once it is durable; see `SessionTasks.spawn`.

    *prepare* completes it in the transaction. *key* makes the key under which its parent knows it, from what it is to do, and
    *refused* is told that it was not born, whether or not the caller is still there. What takes no slot starts at once.
    """
    coroutine = fn if inspect.iscoroutine(fn) else None
    try:
        runner, owner_id = core.to_create()
        columns = {**body_columns(core.registry, fn, args, kwargs, cancel_policy), **columns, "local": coroutine}
        if timeout is not None:
            columns["timeout"] = check_seconds("timeout", timeout, at_least=0.001)
        columns["deadline"] = None if deadline is None else _deadline(deadline)
        arguments = columns.get("arguments")
        if arguments is not None:
            core.limits.check_payload(arguments, f"the arguments of {columns['label']!r}")
        new = new_task(scope, owner_id, columns)
        if key is not None:
            new = new._replace(idempotency_key=key(_work(new)), keyed_by_parent=True)

        def adopted(born: Born | None, _: BaseException | None) -> None:
            # the commit adopts the coroutine or nobody does, whether or not the caller is still there to hear of it
            if coroutine is not None and (born is None or not born.is_new):
                coroutine.close()
            if born is None and refused is not None:
                refused()

        created = runner.create(
            lambda start: lambda tx: births.create(tx, prepare(tx, new), start=start), adopted, takes_slot=takes_slot
        )
    except BaseException:
        close_refused(fn)
        if refused is not None:
            refused()
        # a body that asks again and again must not keep the loop to itself
        await asyncio.sleep(0)
        raise
    born = await created
    return TaskHandle(core, born.task, born.handle_id)


def _deadline(given: datetime | float) -> str:
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise ValueError(f"the deadline {given} has no time zone: datetime.now(UTC) has one")
        # the years the file can write; datetime.max is somebody's word for none
        return utc_text(min(max(given.timestamp(), 0.0), _END_OF_TIME))
    return utc_text(time.time() + check_seconds("deadline", given))


def _work(new: NewTask) -> str:
    """Return a short text that is the same for the same function and arguments."""
    if new.arguments is None:
        return new.label[:_MOST_LABEL]
    digest = hashlib.blake2b(transitions.plain(new.arguments).encode(), digest_size=8).hexdigest()
    return f"{new.label[:_MOST_LABEL]}:{digest}"


_MOST_LABEL = 80
_END_OF_TIME = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


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
    if key is not None and check_id("idempotency key", key).startswith("child:"):
        raise InvalidId(f"idempotency key {key!r} begins with 'child:', as those of children do: choose another")
    columns["kind"] = check_word(f"task {task_id!r}: kind", TaskKind, columns["kind"])
    columns["close_policy"] = check_word(f"task {task_id!r}: close_policy", ClosePolicy, columns["close_policy"])
    return NewTask(scope=scope, id=task_id, label=label, owner_id=owner_id, handle_id=new_handle_id(), **columns)


def _policy(given: CancelPolicy | None, otherwise: CancelPolicy) -> CancelPolicy:
    return otherwise if given is None else check_word("cancel_policy", CancelPolicy, given)


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
    limits: Limits,
    task_id: str,
    state: TaskState,
    result: Any,
    failure: Failure | BaseException | Mapping[str, Any] | str | None,
) -> Settle:
    """
    Check how external work is said to have ended.

    Raises:
        ValueError: a state in which work does not end, or a result or failure that does not belong to it.
        ResultNotSerializable, LimitExceeded: the result is not JSON, or too large.
    """
    if state not in {TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED}:
        raise ValueError(f"task {task_id!r} may end 'completed', 'failed' or 'cancelled', not {shown(state)}")
    if result is not None and state is not TaskState.COMPLETED:
        raise ValueError(f"task {task_id!r}: a result belongs to 'completed', not to {shown(state)}")
    if failure is not None and state is not TaskState.FAILED:
        raise ValueError(f"task {task_id!r}: a failure belongs to 'failed', not to {shown(state)}")
    what = f"the result of task {task_id!r}"
    return Settle(
        state,
        result=limits.check_payload(to_json(result, what), what) if state is TaskState.COMPLETED else None,
        failure=failure_text(failure) if state is TaskState.FAILED else None,
    )


def close_refused(fn: object) -> None:
    """Close a coroutine object that is refused: nobody will ever run it."""
    if inspect.iscoroutine(fn):
        fn.close()
