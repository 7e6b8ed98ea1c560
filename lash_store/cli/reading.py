"""Owns how the commands read a file: what is in it now, to its end, through a store that only reads; prints nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

import click

from ..errors import TaskNotFound, UnknownSession

if TYPE_CHECKING:
    from ..models import EventType, Scope, TaskEvent, TaskRecord
    from ..store import TaskStore

__all__ = ["check_session", "events_so_far", "find_task", "task_by_seq"]

_LOOK = 0.01


async def check_session(store: TaskStore, scope: Scope) -> None:
    """
    Make sure the file has a session: an empty answer would hide a wrong name.

    Raises:
        UnknownSession: it has not.
    """
    known = [str(session.scope) for session in await store.sessions()]
    if str(scope) not in known:
        there = f"it has {_some(known)}" if known else "it has none"
        raise UnknownSession(f"no session {str(scope)!r} in this file: {there}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


async def events_so_far(
    store: TaskStore, after: int = 0, *, scope: Scope | None = None, types: Iterable[EventType] | None = None
) -> AsyncGenerator[TaskEvent, None]:
    """Yield the events after a cursor up to the newest of the file when this begins, then end."""
    head = store.events().cursor
    events = store.events(after, scope=scope, types=types)
    while events.cursor < head:
        # the subscription itself never ends: once its cursor is at the head, what it waits for has not happened yet
        step = asyncio.create_task(events.__anext__(), name="lash_store next event")
        try:
            while not step.done() and events.cursor < head:
                await asyncio.wait({step}, timeout=_LOOK)
        finally:
            if not step.done():
                step.cancel()
                await asyncio.wait({step})
        if step.cancelled():
            return
        event = step.result()
        if event.seq > head:
            return
        yield event


async def task_by_seq(store: TaskStore, task_seq: int) -> TaskRecord | None:
    """Return one incarnation, or None."""
    from ..models import TaskFilter

    found = await store.list(TaskFilter(after_seq=task_seq - 1, limit=1))
    return found[0] if found and found[0].task_seq == task_seq else None


async def find_task(store: TaskStore, name: str) -> TaskRecord:
    """
    Return the task a person means by ``#12``, by an id that one session alone has, or by a bare number.

    Raises:
        TaskNotFound: nothing of that name.
    """
    digits = name.removeprefix("#")
    task_seq = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None
    found = [] if name.startswith("#") and task_seq is not None else await _tasks_of_id(store, name)
    if len(found) > 1:
        scopes = _some([str(record.scope) for record in found])
        raise click.ClickException(f"task id {name!r} is in {len(found)} sessions: name one first: {scopes}")
    record = found[0] if found else None if task_seq is None else await task_by_seq(store, task_seq)
    if record is None:
        raise TaskNotFound(f"no task {name!r} in this file: see lash-store list --all", task_id=name)
    return record


async def _tasks_of_id(store: TaskStore, task_id: str) -> list[TaskRecord]:
    found = []
    for session in await store.sessions():
        try:
            found.append(await store.get(session.scope, task_id))
        except TaskNotFound:
            continue
    return found
