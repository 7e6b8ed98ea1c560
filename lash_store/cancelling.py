"""Owns the seeing-through of many cancels at once: one that goes wrong does not stop the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from . import queries, session_queries, transitions
from .core import Core
from .failures import failure_of
from .lifecycle import Task
from .models import CancelReport, EventType, Failure, Scope, TaskRecord

__all__ = ["cancel_all", "stopped"]

_Waits = dict[int, asyncio.Task[TaskRecord]]


async def cancel_all(core: Core, scope: Scope, reason: str | None, timeout: float | None) -> list[CancelReport]:
    """
    Cancel every live task of a session, and those that come while it goes on, and report on each, by ``task_seq``.

    It ends once none is live that was not asked, or after *timeout* seconds.
    """
    writer = core.to_request()
    waits: _Waits = {}
    arrivals = core.feed.subscribe(None, scope=scope, types=[EventType.REGISTERED, EventType.TRANSFERRED])

    async def reach_all() -> None:
        arrival: asyncio.Task[Any] | None = None
        try:
            while True:
                # in the writer's turn: whatever was asked to be stored before this look is seen by it
                live = await writer.run(lambda tx: session_queries.live_tasks_of_session(tx, str(scope)))
                fresh = [task for task in live if task.task_seq not in waits]
                for task in fresh:
                    waits[task.task_seq] = _begin(core.cancel(_by_seq(task), reason, None), task)
                going_on = [wait for wait in waits.values() if not wait.done()]
                if not fresh and not going_on:
                    return
                if arrival is None or arrival.done():
                    arrival = asyncio.create_task(_next(arrivals), name="lash_store arrivals")
                await asyncio.wait({*going_on, arrival}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if arrival is not None:
                arrival.cancel()
                await asyncio.wait({arrival})

    try:
        await asyncio.wait_for(reach_all(), timeout)
    except TimeoutError:
        pass
    finally:
        await _give_up(waits)
    return [await _report(core, task_seq, waits[task_seq]) for task_seq in sorted(waits)]


async def stopped(core: Core, tasks: Sequence[Task], timeout: float | None) -> list[TaskRecord]:
    """Wait until each of several tasks whose cancel was requested has ended, or *timeout* seconds; return their rows."""
    waits = {task.task_seq: _begin(core.confirmed([task], None), task) for task in tasks}
    try:
        if waits:
            await asyncio.wait(waits.values(), timeout=timeout)
    finally:
        await _give_up(waits)
    return [(await _report(core, task_seq, wait)).record for task_seq, wait in waits.items()]


def _by_seq(task: Task) -> Callable[[Any], Task]:
    return lambda tx: transitions.by_seq(tx, task.task_seq)


def _begin(cancel: Coroutine[Any, Any, TaskRecord], task: Task) -> asyncio.Task[TaskRecord]:
    return asyncio.create_task(cancel, name=f"lash_store cancel {task.id}")


async def _next(arrivals: Any) -> None:
    async for _ in arrivals:
        return


async def _give_up(waits: _Waits) -> None:
    """Wait no more for what has not ended; its request stands."""
    left = {wait for wait in waits.values() if not wait.done()}
    for wait in left:
        wait.cancel()
    if left:
        await asyncio.wait(left)


async def _report(core: Core, task_seq: int, wait: asyncio.Task[TaskRecord]) -> CancelReport:
    if wait.cancelled():
        record = queries.task_record(await core.task(task_seq))
        return CancelReport(record=record, error=record.callback_error)
    error = wait.exception()
    if error is None:
        return CancelReport(record=wait.result(), error=wait.result().callback_error)
    record = queries.task_record(await core.task(task_seq))
    return CancelReport(record=record, error=Failure.model_validate_json(failure_of(error)))
