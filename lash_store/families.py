"""Owns who descends from whom: children by parent, and all in the session that a sub-agent works in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, case, func, null, or_, select

from .lifecycle import Task
from .queries import LIVE, WAS_CANCELLED
from .schema import tasks
from .statements import ONE, names, sql, values, word
from .transaction import Transaction

__all__ = ["Above", "above", "live_descendants"]

_RUNTIME = func.substr(tasks.c.scope, ONE, func.instr(tasks.c.scope, word(":")))
_NODE = (
    tasks.c.task_seq,
    case((tasks.c.child_session_id.is_not(None), _RUNTIME + tasks.c.child_session_id), else_=None).label("child_scope"),
)
_IS_ROOT = values(tasks.c.task_seq, "roots")
_IS_AGENT = tasks.c.child_session_id.is_not(None)
_IS_OVER = tasks.c.completed_at.is_not(None)

# what most tasks are the root of; the sub-agents among them, finished ones too, tell that the family is wider
_children = select(tasks.c.task_seq).where(_IS_ROOT).cte("children", recursive=True)
_children = _children.union(
    select(tasks.c.task_seq).join_from(_children, tasks, tasks.c.parent_seq == _children.c.task_seq)
)
_BY_PARENT = sql(
    select(*tasks.c)
    .where(tasks.c.task_seq.in_(select(_children.c.task_seq)), or_(LIVE, _IS_AGENT))
    .order_by(tasks.c.task_seq)
)

# every session with live work: one look each, where a list of them would read all live tasks
_busy = select(func.min(tasks.c.scope).label("scope")).where(LIVE).cte("busy", recursive=True)
_busy = _busy.union_all(
    select(select(func.min(tasks.c.scope)).where(LIVE, tasks.c.scope > _busy.c.scope).scalar_subquery()).where(
        _busy.c.scope.is_not(None)
    )
)


def _worked_through(scope: ColumnElement[str]) -> ColumnElement[bool]:
    """A sub-agent of a session, or of one of that name in another runtime, from which no way leads down here."""
    return and_(tasks.c.child_session_id == func.substr(scope, func.instr(scope, word(":")) + ONE), _IS_AGENT)


# Finished work below which something lives, which descends from the sub-agent of the finished work's session, too. Found
# from what lives, upwards: of a session's history, nearly all is finished and has left nothing.
_REMAINS = (tasks.c.task_seq, tasks.c.scope, tasks.c.parent_seq)
_orphans = tasks.alias("orphans")
_remains = (
    select(*_REMAINS)
    .join_from(_orphans, tasks, tasks.c.task_seq == _orphans.c.parent_seq)
    .where(_orphans.c.completed_at.is_(None), _orphans.c.parent_seq.is_not(None), _IS_OVER)
    .cte("remains", recursive=True)
)
_remains = _remains.union(
    select(*_REMAINS).join_from(_busy, tasks, _worked_through(_busy.c.scope)).where(_IS_OVER),
    select(*_REMAINS).join_from(_remains, tasks, tasks.c.task_seq == _remains.c.parent_seq).where(_IS_OVER),
    select(*_REMAINS).join_from(_remains, tasks, _worked_through(_remains.c.scope)).where(_IS_OVER),
)

_down = select(*_NODE).where(_IS_ROOT).cte("down", recursive=True)
_down = _down.union(
    select(*_NODE).join_from(_down, tasks, tasks.c.parent_seq == _down.c.task_seq),
    select(*_NODE).join_from(_down, tasks, and_(tasks.c.scope == _down.c.child_scope, LIVE)),
    select(*_NODE).join_from(_down, tasks, and_(tasks.c.scope == _down.c.child_scope, _IS_AGENT)),
    select(_remains.c.task_seq, null()).join_from(_down, _remains, _remains.c.scope == _down.c.child_scope),
)
_WHOLE = sql(select(*tasks.c).where(tasks.c.task_seq.in_(select(_down.c.task_seq)), LIVE).order_by(tasks.c.task_seq))

# what has a say in what is begun below finished work later: a cancel comes from what lives, or was requested
_above = select(*_REMAINS).where(_IS_ROOT).cte("above", recursive=True)
_above = _above.union(
    select(*_REMAINS).join_from(_above, tasks, tasks.c.task_seq == _above.c.parent_seq),
    select(*_REMAINS).join_from(_above, tasks, _worked_through(_above.c.scope)),
)
_ABOVE = sql(
    select(func.total(LIVE), func.total(WAS_CANCELLED)).where(
        tasks.c.task_seq.in_(select(_above.c.task_seq)), ~_IS_ROOT
    )
)


class Above(NamedTuple):
    """Whether a task descends from anything live, and from anything that was cancelled."""

    lives: bool
    is_cancelled: bool


def above(tx: Transaction, task_seq: int) -> Above:
    """Say what a finished task descends from; the same of all of one parent in one session."""
    return Above._make(map(bool, tx.one(_ABOVE, {"roots": names([task_seq])}) or (0, 0)))


def live_descendants(tx: Transaction, *task_seqs: int) -> list[Task]:
    """Return the live tasks below some, at any depth and without themselves, oldest first."""
    roots = {"roots": names(task_seqs)}
    family = _tasks(tx.all(_BY_PARENT, roots))
    if any(task.child_session_id is not None for task in family):
        family = _tasks(tx.all(_WHOLE, roots))
    return [task for task in family if task.task_seq not in task_seqs]


def _tasks(rows: Iterable[Any]) -> list[Task]:
    return [Task._make(row) for row in rows]
