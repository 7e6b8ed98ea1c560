"""Owns the statements that find what may be pruned, take it away, and leave a tombstone; decides nothing."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Text,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    union_all,
)

from .models import HandleRole, TaskMode, TaskState
from .queries import WAS_CANCELLED
from .schema import events, handles, inbox, monitors, sessions, signals, steps, tasks, tombstones, updates
from .statements import ONE, ZERO, names, sql, values, word
from .transaction import Transaction

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
    process: str | None
    is_read: int
    is_armed: int
    has_children: int
    parent_lives: int
    was_cancelled: int
    first_event: int
    last_event: int
    events: int

    @property
    def may_have_family(self) -> bool:
        """Whether anything may descend from it."""
        return bool(self.has_children) or self.child_session_id is not None


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
        tasks.c.process,
        and_(_IS_READ, ~_UNREAD_LINES).label("is_read"),
        exists().where(monitors.c.task_seq == tasks.c.task_seq, monitors.c.armed != ZERO).label("is_armed"),
        exists().where(_children.c.parent_seq == tasks.c.task_seq).label("has_children"),
        exists()
        .where(_parents.c.task_seq == tasks.c.parent_seq, _parents.c.completed_at.is_(None))
        .label("parent_lives"),
        WAS_CANCELLED.label("was_cancelled"),
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
    .order_by(tasks.c.task_seq.desc())
)
_CHILDREN = sql(select(tasks.c.task_seq).where(tasks.c.parent_seq == bindparam("task_seq")))

NEWEST_TASK = sql(
    select(
        func.max(
            *(
                func.coalesce(select(func.max(table.c.task_seq)).scalar_subquery(), ZERO)
                for table in (tasks, tombstones)
            )
        )
    )
)

_NEWEST_UP_TO = sql(
    select(
        *(
            select(func.max(table.c.task_seq)).where(table.c.task_seq <= bindparam("until")).scalar_subquery()
            for table in (tasks, tombstones)
        )
    )
)


def newest_up_to(tx: Transaction, until: int) -> int:
    """Return the number of the newest task up to one: in a file that was edited by hand, there may be any gap."""
    found = tx.one(_NEWEST_UP_TO, {"until": until}) or ()
    return max((task_seq for task_seq in found if task_seq is not None), default=0)


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


def candidates(
    tx: Transaction,
    after: int,
    until: int,
    *,
    before: str | None,
    states: Sequence[str] | None,
    scopes: Sequence[str] | None,
) -> Generator[Candidate, None, None]:
    """
    Yield the finished tasks in a range of ``task_seq`` that match, newest first; each is looked at when it is asked for.

    Close it if it was not read to its end.
    """
    wanted = {
        "after": after,
        "until": until,
        "before": before,
        "states": None if states is None else names(states),
        "scopes": None if scopes is None else names(scopes),
    }
    with closing(tx.connection.execute(_CANDIDATES, wanted)) as found:
        for row in found:
            yield Candidate._make(row)


def children(tx: Transaction, task_seq: int) -> Generator[int, None, None]:
    """Yield the children of a task; each is looked at when it is asked for."""
    with closing(tx.connection.execute(_CHILDREN, {"task_seq": task_seq})) as found:
        for (child,) in found:
            yield child


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

_SCOPES = [
    select(scope.label("scope"), func.max(events.c.seq).label("newest"))
    .where(values(events.c.task_seq, "task_seqs"), scope.is_not(None))
    .group_by(scope)
    for scope in (events.c.scope, events.c.from_scope)
]
_NEWEST_PRUNED = sql(union_all(*_SCOPES))
_MARK_PRUNED = sql(
    sessions.update()
    .where(sessions.c.scope == bindparam("key_scope"))
    .values(pruned_event=func.max(sessions.c.pruned_event, bindparam("newest")), pruned_at=bindparam("at"))
)
_IS_LEFT = and_(
    inbox.c.task_seq > bindparam("after"),
    inbox.c.task_seq <= bindparam("until"),
    inbox.c.acknowledged_at.is_not(None),
    ~exists().where(tasks.c.task_seq == inbox.c.task_seq),
)
_NOTES_LEFT = sql(delete(inbox).where(_IS_LEFT))
_HAS_NOTES_LEFT = sql(select(exists().where(_IS_LEFT)))


def bury(tx: Transaction, chosen: Sequence[Candidate]) -> None:
    """Take tasks away with everything of theirs, but notes nobody has read, and leave a tombstone of each."""
    these = {"task_seqs": names(one.task_seq for one in chosen)}
    for one in chosen:
        columns = {column.name: getattr(one, column.name, None) for column in tombstones.c}
        tx.one(_INSERT_TOMBSTONE, {**columns, "pruned_at": tx.now})
    for scope, fewer in tx.all(_KEPT_BYTES, these):
        tx.one(_FREE_BYTES, {"key_scope": scope, "fewer": fewer})
    for scope, newest in tx.all(_NEWEST_PRUNED, these):
        tx.one(_MARK_PRUNED, {"key_scope": scope, "newest": newest, "at": tx.now})
    for deletion in _DELETIONS:
        tx.all(deletion, these)


def has_notes_left(tx: Transaction, after: int, until: int) -> bool:
    """Say whether `sweep_notes` would take any away."""
    return tx.one(_HAS_NOTES_LEFT, {"after": after, "until": until}) == (1,)


def sweep_notes(tx: Transaction, after: int, until: int) -> None:
    """Take away the notes that were read after their task, of a range of ``task_seq``, was pruned."""
    tx.all(_NOTES_LEFT, {"after": after, "until": until})


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

_PRUNED = select(tombstones.c.last_event, tombstones.c.pruned_at, tombstones.c.scope)
_PRUNED_AFTER = sql(
    _PRUNED.where(tombstones.c.last_event > bindparam("after"))
    .order_by(tombstones.c.last_event.desc())
    .limit(ONE)
    .offset(ZERO)
)
_PRUNED_OF_TASK = sql(
    _PRUNED.where(tombstones.c.task_seq == bindparam("task_seq"), tombstones.c.last_event > bindparam("after"))
)
_PRUNED_OF_SESSION = sql(
    select(sessions.c.pruned_event, sessions.c.pruned_at, sessions.c.scope).where(
        sessions.c.scope == bindparam("scope"), sessions.c.pruned_event > bindparam("after")
    )
)

ENDS_PRUNED = sql(
    select(tombstones.c.task_seq).where(
        tombstones.c.last_event > bindparam("after"), tombstones.c.last_event <= bindparam("until")
    )
)
"""The tasks whose end was among the events of a range, and was taken away."""


class Gap(NamedTuple):
    """The newest of the events that are missing behind a cursor, when it was taken away, and whose it was."""

    last_event: int
    pruned_at: str
    scope: str


def gap_after(tx: Transaction, after: int, *, scope: str | None, task_seq: int | None) -> Gap | None:
    """Say what was taken away of the events behind a cursor, of one session, one task or all; one look at an index."""
    if task_seq is not None:
        row = tx.one(_PRUNED_OF_TASK, {"after": after, "task_seq": task_seq})
    elif scope is not None:
        row = tx.one(_PRUNED_OF_SESSION, {"after": after, "scope": scope})
    else:
        row = tx.one(_PRUNED_AFTER, {"after": after})
    return None if row is None else Gap._make(row)


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
