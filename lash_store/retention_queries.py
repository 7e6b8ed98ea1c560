"""Owns the statements that find what may be pruned, take it away, and leave a tombstone; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Integer,
    Text,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
)

from .database import Transaction
from .models import HandleRole, TaskMode, TaskState
from .schema import events, handles, inbox, monitors, sessions, signals, steps, tasks, tombstones, updates
from .statements import ONE, ZERO, names, sql, values, word

__all__ = ["Candidate", "Tombstone"]

# --- what may go ----------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A finished task: what there is of it, and why it may have to stay."""

    task_seq: int
    scope: str
    id: str
    kind: str
    state: str
    parent_seq: int | None
    idempotency_key: str | None
    completed_at: str
    handle_id: str | None
    child_session_id: str | None
    is_read: int
    is_armed: int
    has_children: int
    parent_lives: int
    first_event: int
    last_event: int
    events: int


_parents, _children, _owned = tasks.alias("parents"), tasks.alias("children"), handles.alias("owned")
_IS_OWNERS = _owned.c.role == word(HandleRole.OWNER)


def _one(column: ColumnElement[int]) -> ColumnElement[int]:
    return select(column).where(events.c.task_seq == tasks.c.task_seq).scalar_subquery()


_END_WAS_READ = exists().where(
    inbox.c.task_seq == tasks.c.task_seq,
    inbox.c.key == word("end:") + func.cast(tasks.c.task_seq, Text),
    inbox.c.acknowledged_at.is_not(None),
)
_UNREAD_LINES = exists().where(updates.c.task_seq == tasks.c.task_seq, updates.c.acknowledged_at.is_(None))
_IS_MONITOR = exists().where(monitors.c.task_seq == tasks.c.task_seq)
_FAILED = or_(tasks.c.state == word(TaskState.FAILED), tasks.c.state == word(TaskState.ABANDONED))
_IS_READ = or_(
    # its outcome was handed out, or told by a note that was read
    _owned.c.read_at.is_not(None),
    _END_WAS_READ,
    # it has none that anybody could miss
    tasks.c.state == word(TaskState.CANCELLED),
    and_(tasks.c.mode == word(TaskMode.HIDDEN), ~_FAILED),
    _IS_MONITOR,
)

_CANDIDATES = sql(
    select(
        *(tasks.c[name] for name in Candidate._fields[:8]),
        _owned.c.handle_id,
        tasks.c.child_session_id,
        and_(_IS_READ, ~_UNREAD_LINES).label("is_read"),
        exists().where(monitors.c.task_seq == tasks.c.task_seq, monitors.c.armed != ZERO).label("is_armed"),
        exists().where(_children.c.parent_seq == tasks.c.task_seq).label("has_children"),
        exists()
        .where(_parents.c.task_seq == tasks.c.parent_seq, _parents.c.completed_at.is_(None))
        .label("parent_lives"),
        _one(func.min(events.c.seq)),
        _one(func.max(events.c.seq)),
        _one(func.count()),
    )
    .select_from(tasks.outerjoin(_owned, and_(_owned.c.task_seq == tasks.c.task_seq, _IS_OWNERS)))
    .where(
        tasks.c.task_seq > bindparam("after"),
        tasks.c.task_seq <= bindparam("until"),
        tasks.c.completed_at.is_not(None),
        or_(bindparam("before", type_=Text).is_(None), tasks.c.completed_at < bindparam("before", type_=Text)),
        or_(bindparam("states", type_=Text).is_(None), values(tasks.c.state, "states")),
        or_(bindparam("scopes", type_=Text).is_(None), values(tasks.c.scope, "scopes")),
    )
    .order_by(tasks.c.task_seq)
)

NEWEST_TASK = sql(select(func.coalesce(func.max(tasks.c.task_seq), ZERO)))

_ranked = (
    select(
        tasks.c.scope,
        tasks.c.task_seq,
        func.row_number().over(partition_by=tasks.c.scope, order_by=tasks.c.task_seq.desc()).label("place"),
    )
    .where(tasks.c.completed_at.is_not(None))
    .subquery()
)
LAST_KEPT = sql(select(_ranked.c.scope, _ranked.c.task_seq).where(_ranked.c.place == bindparam("keep_last")))
"""The oldest of the finished tasks that each session keeps; one with fewer keeps all."""

_descendants = (
    select(tasks.c.task_seq, tasks.c.scope, tasks.c.child_session_id, tasks.c.completed_at)
    .where(tasks.c.task_seq == bindparam("task_seq"))
    .cte("descendants", recursive=True)
)
_runtime = func.substr(_descendants.c.scope, literal_column("1"), func.instr(_descendants.c.scope, word(":")))
_descendants = _descendants.union(
    select(tasks.c.task_seq, tasks.c.scope, tasks.c.child_session_id, tasks.c.completed_at).where(
        or_(
            tasks.c.parent_seq == _descendants.c.task_seq,
            and_(
                _descendants.c.child_session_id.is_not(None),
                tasks.c.scope == _runtime + _descendants.c.child_session_id,
            ),
        )
    )
)
_LIVES_ON = sql(select(func.count()).select_from(_descendants).where(_descendants.c.completed_at.is_(None)))
"""How much of a task's family lives, by parents and by the sessions of its sub-agents, at any depth: a cancel must reach it."""


def candidates(
    tx: Transaction,
    after: int,
    until: int,
    *,
    before: str | None,
    states: Sequence[str] | None,
    scopes: Sequence[str] | None,
) -> list[Candidate]:
    """Return the finished tasks in a range of ``task_seq`` that match, oldest first."""
    wanted = {
        "after": after,
        "until": until,
        "before": before,
        "states": None if states is None else names(states),
        "scopes": None if scopes is None else names(scopes),
    }
    return [Candidate._make(row) for row in tx.all(_CANDIDATES, wanted)]


def lives_on(tx: Transaction, task_seq: int) -> bool:
    """Say whether anything that descends from a task is live."""
    found = tx.one(_LIVES_ON, {"task_seq": task_seq})
    return bool(found and found[0])


# --- taking it away -------------------------------------------------------------------------------------------------

_INSERT_TOMBSTONE = sql(insert(tombstones).values({column.name: bindparam(column.name) for column in tombstones.c}))
_KEPT_BYTES = sql(
    select(updates.c.scope, func.sum(updates.c.bytes))
    .where(values(updates.c.task_seq, "task_seqs"))
    .group_by(updates.c.scope)
)
_DELETIONS = [
    sql(delete(inbox).where(values(inbox.c.task_seq, "task_seqs"), inbox.c.acknowledged_at.is_not(None))),
    *(
        sql(delete(table).where(values(table.c.task_seq, "task_seqs")))
        for table in (updates, monitors, signals, steps, handles, events, tasks)
    ),
]
"""In an order in which no row is left without its parent."""

_FREE_BYTES = sql(
    sessions.update()
    .where(sessions.c.scope == bindparam("key_scope"))
    .values(update_bytes=func.max(ZERO, sessions.c.update_bytes - bindparam("fewer")))
)


def bury(tx: Transaction, chosen: Sequence[Candidate]) -> None:
    """Take tasks away with everything of theirs, but notes nobody has read, and leave a tombstone of each."""
    these = {"task_seqs": names(one.task_seq for one in chosen)}
    for one in chosen:
        columns = {column.name: getattr(one, column.name, None) for column in tombstones.c}
        tx.one(_INSERT_TOMBSTONE, {**columns, "pruned_at": tx.now})
    for scope, fewer in tx.all(_KEPT_BYTES, these):
        tx.one(_FREE_BYTES, {"key_scope": scope, "fewer": fewer})
    for deletion in _DELETIONS:
        tx.all(deletion, these)


def free_pages(tx: Transaction, pages: int) -> int:
    """Give back at most so many free pages to the file system; return how many are left."""
    # one at a time: the driver stops after the first step of a statement without columns, which is one page
    for _ in range(pages):
        tx.all("PRAGMA incremental_vacuum(1)", {})
    [(left,)] = tx.all("PRAGMA freelist_count", {})
    return int(left)


# --- what is left ---------------------------------------------------------------------------------------------------


class Tombstone(NamedTuple):
    """The row that is left of a task that was pruned."""

    task_seq: int
    scope: str
    id: str
    kind: str
    state: str
    handle_id: str | None
    parent_seq: int | None
    idempotency_key: str | None
    completed_at: str
    pruned_at: str
    first_event: int
    last_event: int


_TOMBSTONE = select(*tombstones.c)
_BY_SEQ = sql(_TOMBSTONE.where(tombstones.c.task_seq == bindparam("task_seq")))
_NEWEST = tombstones.c.task_seq.desc()
_BY_ID = sql(
    _TOMBSTONE.where(tombstones.c.scope == bindparam("scope"), tombstones.c.id == bindparam("id"))
    .order_by(_NEWEST)
    .limit(ONE)
    .offset(ZERO)
)
_BY_KEY = sql(
    _TOMBSTONE.where(tombstones.c.scope == bindparam("scope"), tombstones.c.idempotency_key == bindparam("key"))
    .order_by(_NEWEST)
    .limit(ONE)
    .offset(ZERO)
)
_BY_HANDLE = sql(_TOMBSTONE.where(tombstones.c.handle_id == bindparam("handle_id")))

PRUNED_AFTER = sql(
    select(
        func.min(tombstones.c.first_event),
        func.max(tombstones.c.last_event),
        func.max(tombstones.c.pruned_at),
        func.max(tombstones.c.scope),
    ).where(
        tombstones.c.last_event > bindparam("after"),
        or_(bindparam("scope", type_=Text).is_(None), tombstones.c.scope == bindparam("scope", type_=Text)),
        or_(
            bindparam("task_seq", type_=Integer).is_(None),
            tombstones.c.task_seq == bindparam("task_seq", type_=Integer),
        ),
    )
)
"""The range in which events behind a cursor are missing, and since when; nothing but a look at an index, if none are."""


def _tombstone(row: Sequence[Any] | None) -> Tombstone | None:
    return None if row is None else Tombstone._make(row)


def tombstone_by_seq(tx: Transaction, task_seq: int) -> Tombstone | None:
    """Return what is left of an incarnation."""
    return _tombstone(tx.one(_BY_SEQ, {"task_seq": task_seq}))


def tombstone_by_id(tx: Transaction, scope: str, task_id: str) -> Tombstone | None:
    """Return what is left of the newest pruned incarnation of an id."""
    return _tombstone(tx.one(_BY_ID, {"scope": scope, "id": task_id}))


def tombstone_by_key(tx: Transaction, scope: str, key: str) -> Tombstone | None:
    """Return what is left of the newest pruned task of an idempotency key."""
    return _tombstone(tx.one(_BY_KEY, {"scope": scope, "key": key}))


def tombstone_by_handle(tx: Transaction, handle_id: str) -> Tombstone | None:
    """Return what is left of the task of an owner's handle."""
    return _tombstone(tx.one(_BY_HANDLE, {"handle_id": handle_id}))
