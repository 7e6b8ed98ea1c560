"""Owns the waiting for a session's hidden work, to its fixed point, and the handing out of its failures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

from . import queries, session_queries, transitions
from .bodies import aside
from .core import Core
from .errors import TaskError, TaskPruned
from .feed import Subscription
from .gathering import Gathering
from .handles import outcome_error
from .lifecycle import Task
from .models import EventType, Scope
from .transaction import Transaction
from .writer import Unit

__all__ = ["acknowledge_all", "settle"]


class _Look(NamedTuple):
    """What one look at a session's hidden work found, in one transaction."""

    live: list[Task]
    failures: list[Task]
    sync_needed: bool
    cleared: bool
    gone: set[int]
    since: int


async def settle(core: Core, scope: Scope, *, clear: bool) -> bool:
    """
    Wait until no hidden task of a session is live, and return whether it must take its state up; with *clear*, for once.

    Raises:
        ExceptionGroup: what failed or was abandoned and nobody was told of, the same for all who waited.
        StoreClosed: the store closes; what failed is told to who waits after it was opened again.
    """
    writer = core.to_request()
    body = None if core.runner is None else core.runner.body_here()
    within = None if body is None else body.task_seq
    gathering = core.gatherings.setdefault(str(scope), Gathering())
    me = gathering.enter(within)
    leaving = core.feed.subscribe(None, scope=scope, types=[EventType.TRANSFERRED])
    known: dict[int, Task] = {}
    since: int | None = None
    try:
        while True:
            stuck = set() if within is None else {within, *gathering.bodies}
            clears = clear and not known
            try:
                look: _Look = await writer.run_or_undo(
                    partial(_look, scope=scope, since=since, stuck=stuck, clear=clears, known=set(known)),
                    partial(_flag_again, scope),
                )
            except asyncio.CancelledError:
                if clears:
                    # the flag may be down until it is raised again: others may have looked meanwhile
                    gathering.take_flag()
                raise
            since = look.since
            if look.cleared:
                gathering.take_flag()
            # also while others are still waited for: who is told of it meanwhile acknowledges it, and it is not found again
            known = {task_seq: task for task_seq, task in known.items() if task_seq not in look.gone}
            known |= {task.task_seq: task for task in look.failures if task.task_seq not in me.told}
            if not look.live:
                break
            await _any_change(core, look.live, leaving)
        if known:
            # of a store that closes nobody is told what could not be acknowledged any more: the next one tells it
            core.to_request()
        gathering.hand_out(known)
    finally:
        _acknowledge(core, gathering.leave(me))
        if gathering.is_idle:
            core.gatherings.pop(str(scope), None)
    if known:
        errors = [error for _, task in sorted(known.items()) if (error := outcome_error(task)) is not None]
        raise ExceptionGroup[TaskError](f"{len(errors)} hidden tasks of session {str(scope)!r} failed", errors)
    return look.sync_needed or me.sync_needed


def acknowledge_all(core: Core) -> None:
    """Note what was handed out to some of those who wait: the store closes, and the others will not be told."""
    for gathering in core.gatherings.values():
        _acknowledge(core, gathering.settle())


async def _any_change(core: Core, live: Sequence[Task], leaving: Subscription) -> None:
    """Wait until all of the live tasks have ended, or one may have left the session."""
    ended = aside(core.ends_of([task.task_seq for task in live]), "lash_store hidden work")
    left = aside(leaving.one(), "lash_store hidden work that leaves")
    try:
        await core.wait_aside({ended, left}, first=True)
    finally:
        for wait in (ended, left):
            wait.cancel()
        await asyncio.wait({ended, left})
    if not ended.cancelled():
        # what was taken away since has ended: the next look says what is left
        with contextlib.suppress(TaskPruned):
            ended.result()


def _look(
    tx: Transaction, *, scope: Scope, since: int | None, stuck: Collection[int], clear: bool, known: Collection[int]
) -> _Look:
    since = tx.next_seq - 1 if since is None else since
    row = session_queries.session(tx, str(scope))
    if row is None:
        raise transitions.unknown_session(scope)
    live = session_queries.live_hidden_tasks(tx, str(scope))
    # bodies that wait here, and those above them, cannot end before they are answered
    left_out = set().union(*(_line(tx, task_seq) for task_seq in stuck)) if stuck else set()
    failures = session_queries.hidden_failures(tx, str(scope), since)
    cleared = clear and bool(row.sync_needed) and not live and not failures
    if cleared:
        session_queries.flag_sync(tx, str(scope), needed=False)
    waited_for = [task for task in live if task.task_seq not in left_out]
    # what failed may have been given to another session since: it is told there. What was pruned is told by who knows it
    found = [queries.task_by_seq(tx, task_seq) for task_seq in known]
    gone = {task.task_seq for task in found if task is not None and task.scope != str(scope)}
    return _Look(waited_for, failures, bool(row.sync_needed), cleared, gone, since)


def _flag_again(scope: Scope, look: _Look) -> Unit[None] | None:
    """Flag a session again if nobody was told that it must take its state up: who would have been was cancelled."""
    return (lambda tx: session_queries.flag_sync(tx, str(scope), needed=True)) if look.cleared else None


def _line(tx: Transaction, of: int) -> set[int]:
    """Return a task and its ancestors."""
    line: set[int] = set()
    task_seq: int | None = of
    while task_seq is not None and task_seq not in line:
        line.add(task_seq)
        task = queries.task_by_seq(tx, task_seq)
        task_seq = None if task is None else task.parent_seq
    return line


def _acknowledge(core: Core, failures: list[int]) -> None:
    """Note that failures were handed out, once they are: nobody waits for it, so a crash before it hands them out again."""
    if failures and core.writer is not None:
        core.writer.post(lambda tx: session_queries.mark_all_read(tx, failures))
