"""Owns the seeing-through of many cancels at once: one that goes wrong does not stop the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

from . import handover, queries, session_queries, transitions
from .bodies import aside
from .core import Core
from .errors import TaskPruned
from .failures import failure_of
from .lifecycle import Task
from .models import CancelReport, EventType, Failure, Scope, TaskRecord, check_timeout
from .transaction import Transaction
from .turns import all_over, next_turn
from .writer import Unit

__all__ = ["cancel_all", "stopped"]

_Waits = dict[int, asyncio.Task[TaskRecord]]


async def cancel_all(core: Core, scope: Scope, reason: str | None, timeout: float | None) -> list[CancelReport]:
    """
    Cancel every live task of a session, and those that come while it goes on, and report on each, by ``task_seq``.

    It ends once none is live that was not asked, or after *timeout* seconds.
    """
    timeout = check_timeout(timeout)
    waits: _Waits = {}
    asked: dict[int, Task] = {}
    arrivals = core.feed.subscribe(None, scope=scope, types=[EventType.REGISTERED, EventType.TRANSFERRED])

    async def wait_for_all() -> None:
        arrival: asyncio.Task[Any] | None = None
        over: asyncio.Task[Any] | None = None
        try:
            while True:
                if arrival is None or arrival.done():
                    arrival = aside(arrivals.one(), "lash_store arrivals")
                going_on = [wait for wait in waits.values() if not wait.done()]
                if going_on:
                    # one wait for the end of all: one that came back with each end once took time in proportion to their square
                    over = aside(all_over(going_on), "lash_store cancels")
                    await core.wait_aside({over, arrival}, first=True)
                    over.cancel()
                if not await _request_all(core, scope, reason, asked, waits) and all(
                    wait.done() for wait in waits.values()
                ):
                    return
        finally:
            begun = {one for one in (arrival, over) if one is not None}
            for one in begun:
                one.cancel()
            if begun:
                await asyncio.wait(begun)

    try:
        await _request_all(core, scope, reason, asked, waits)
        async with asyncio.timeout(timeout):
            await wait_for_all()
    except TimeoutError:
        pass
    finally:
        await _give_up(waits)
    reports = []
    for number, task_seq in enumerate(sorted(waits)):
        await next_turn(number)
        # let go of one by one, as they are made
        reports.append(await _report(core, asked.pop(task_seq), waits.pop(task_seq)))
    return reports


async def _request_all(core: Core, scope: Scope, reason: str | None, asked: dict[int, Task], waits: _Waits) -> bool:
    """Request the cancel of every live task that was not asked yet, each by itself; say whether there was one."""
    writer, by = core.to_request(), core.requester

    def request(task_seq: int) -> Unit[list[Task]]:
        def unit(tx: Transaction) -> list[Task]:
            task = transitions.by_seq(tx, task_seq)
            if task.scope != str(scope):
                # what has left the session meanwhile is another's
                return []
            spared = handover.moved_away(tx, scope, [task])
            return [outcome.task for outcome in transitions.request_cancel(tx, task, reason, by, spared)]

        return unit

    # in the writer's turn: whatever was asked to be stored before this look is seen by it
    live = await writer.run(lambda tx: session_queries.live_tasks_of_session(tx, str(scope)))
    fresh = [task for task in live if task.task_seq not in waits]
    requests: list[asyncio.Future[list[Task]]] = []
    try:
        for number, task in enumerate(fresh):
            await next_turn(number)
            requests.append(writer.submit(request(task.task_seq)))
        await all_over(requests)
    except BaseException:
        # nobody looks at them any more; what was asked for stands
        for one in requests:
            one.cancel()
        raise
    outcomes: list[list[Task] | BaseException] = []
    others: list[Task] = []
    for number, one in enumerate(requests):
        await next_turn(number)
        outcomes.append(reached := one.exception() or one.result())
        if not isinstance(reached, BaseException):
            others += [task for task in reached if task.owner_id != core.owner_id]
    await core.tidy_up_for_the_dead(others)
    for number, (task, reached) in enumerate(zip(fresh, outcomes, strict=True)):
        await next_turn(number)
        asked[task.task_seq] = task if isinstance(reached, BaseException) or not reached else reached[0]
        if isinstance(reached, BaseException):
            waits[task.task_seq] = _begin(_raise(reached), task)
        elif reached:
            waits[task.task_seq] = _begin(core.confirmed(reached[:1], None), task)
    return bool(fresh)


async def _raise(error: BaseException) -> TaskRecord:
    raise error


async def stopped(core: Core, tasks: Sequence[Task], timeout: float | None) -> list[TaskRecord]:
    """Wait until each of several tasks whose cancel was requested has ended, or *timeout* seconds; return their rows."""
    await core.tidy_up_for_the_dead(tasks)
    waits: _Waits = {}
    try:
        for number, task in enumerate(tasks):
            await next_turn(number)
            waits[task.task_seq] = _begin(core.confirmed([task], None), task)
        async with asyncio.timeout(timeout):
            await core.wait_aside(waits.values())
    except TimeoutError:
        pass
    finally:
        await _give_up(waits)
    for wait in waits.values():
        if not wait.cancelled():
            # a store that closes meanwhile must not be taken for a wait that is over; one that was pruned is
            with suppress(TaskPruned):
                wait.result()
    return [(await _report(core, task, waits[task.task_seq])).record for task in tasks]


def _begin(cancel: Coroutine[Any, Any, TaskRecord], task: Task) -> asyncio.Task[TaskRecord]:
    return aside(cancel, f"lash_store cancel {task.id}")


async def _give_up(waits: _Waits) -> None:
    """Wait no more for what has not ended; its request stands."""
    left = {wait for wait in waits.values() if not wait.done()}
    for wait in left:
        wait.cancel()
    await all_over(left)
    for wait in waits.values():
        # looked at here, whoever is told of it
        _ = wait.cancelled() or wait.exception()


async def _report(core: Core, asked: Task, wait: asyncio.Task[TaskRecord]) -> CancelReport:
    if wait.cancelled():
        record = queries.task_record(await core.task_as_it_is(asked))
        return CancelReport(record=record, error=record.callback_error)
    error = wait.exception()
    if error is None:
        return CancelReport(record=wait.result(), error=wait.result().callback_error)
    record = queries.task_record(await core.task_as_it_is(asked))
    return CancelReport(record=record, error=Failure.model_validate_json(failure_of(error)))
