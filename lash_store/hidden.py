"""Owns the waiting for a session's hidden work, to its fixed point, and the handing out of its failures."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import NamedTuple

from . import queries, session_queries, transitions
from .core import Core
from .database import Transaction
from .errors import StoreError, TaskError
from .gathering import Gathering
from .handles import outcome_error
from .lifecycle import Task
from .models import Scope

__all__ = ["settle"]

log = logging.getLogger(__name__)


class _Look(NamedTuple):
    """What one look at a session's hidden work found, in one transaction."""

    live: list[Task]
    failures: list[Task]
    sync_needed: bool
    since: int


async def settle(core: Core, scope: Scope, *, clear: bool) -> bool:
    """
    Wait until no hidden task of a session is live, and return whether it must take its state up; with *clear*, for once.

    Raises:
        ExceptionGroup: what failed or was abandoned and nobody was told of, the same for all who waited.
    """
    writer = core.to_request()
    body = None if core.runner is None else core.runner.body_here()
    within = None if body is None else body.task_seq
    gathering = core.gatherings.setdefault(str(scope), Gathering())
    me = gathering.enter(within)
    failures: list[Task] = []
    try:
        since: int | None = None
        while True:
            beside = gathering.bodies if within is not None else set()
            look = await writer.run(
                lambda tx, since=since, beside=beside: _look(tx, scope, since, within, beside, clear=clear)  # type: ignore[misc]
            )
            since = look.since
            if not look.live:
                break
            await core.ends_of([task.task_seq for task in look.live])
        failures = [task for task in look.failures if task.task_seq not in me.told]
        gathering.hand_out(task.task_seq for task in failures)
    finally:
        _acknowledge(core, gathering.leave(me))
        if gathering.is_idle:
            core.gatherings.pop(str(scope), None)
    if failures:
        errors = [error for error in map(outcome_error, failures) if error is not None]
        raise ExceptionGroup[TaskError](f"{len(errors)} hidden tasks of session {str(scope)!r} failed", errors)
    return look.sync_needed


def _look(
    tx: Transaction, scope: Scope, since: int | None, within: int | None, beside: Collection[int], *, clear: bool
) -> _Look:
    since = tx.next_seq - 1 if since is None else since
    row = session_queries.session(tx, str(scope))
    if row is None:
        raise transitions.unknown_session(scope)
    live = session_queries.live_hidden_tasks(tx, str(scope))
    left_out = {*beside, *_line(tx, within)}
    waited_for = [task for task in live if task.task_seq not in left_out]
    failures = [] if waited_for else session_queries.hidden_failures(tx, str(scope), since)
    if clear and row.sync_needed and not live and not failures:
        session_queries.flag_sync(tx, str(scope), needed=False)
    return _Look(waited_for, failures, bool(row.sync_needed), since)


def _line(tx: Transaction, task_seq: int | None) -> set[int]:
    """Return a task and its ancestors: they cannot end before who waits in it goes on."""
    line: set[int] = set()
    while task_seq is not None and task_seq not in line:
        line.add(task_seq)
        task = queries.task_by_seq(tx, task_seq)
        task_seq = None if task is None else task.parent_seq
    return line


def _acknowledge(core: Core, failures: list[int]) -> None:
    """Note that failures were handed out, once they are: nobody waits for it, so a crash before it hands them out again."""
    if not failures or core.writer is None:
        return
    try:
        noted = core.writer.submit(lambda tx: session_queries.mark_all_read(tx, failures))
    except StoreError:
        return
    noted.add_done_callback(lambda future: None if future.cancelled() else _log_error(future.exception()))


def _log_error(error: BaseException | None) -> None:
    if error is not None:
        log.warning("acknowledgement_lost", exc_info=error)
