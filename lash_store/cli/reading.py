"""Owns how the events of a file are read up to its newest, through a store that only reads; prints nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models import EventType, Scope, TaskEvent
    from ..store import TaskStore

__all__ = ["events_so_far"]

_LOOK = 0.01


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
