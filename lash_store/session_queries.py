"""Owns the statements about sessions and what they hold: handles, families of tasks, notes and handoffs; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    and_,
    bindparam,
    func,
    insert,
    null,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from .errors import StorageError
from .lifecycle import TERMINAL_EVENTS, Task
from .models import EventType, HandleRole, Handoff, Note, Scope, SessionRecord, TaskMode, TaskState
from .queries import LIVE, readable
from .schema import HIDDEN_FAILED, events, handles, handoffs, inbox, owners, sessions, tasks
from .statements import ONE, ZERO, hot, names, sql, unclaimed, values, word
from .transaction import Transaction

__all__ = ["HandleRow", "SessionRow"]

# --- sessions -------------------------------------------------------------------------------------------------------


class SessionRow(NamedTuple):
    """One session, as its row stands; *inbox_claim* is JSON text."""

    scope: str
    parent: str | None
    closed_at: str | None
    sync_needed: int
    inbox_claim: str | None


_OF_SCOPE = sessions.c.scope == bindparam("key_scope")
SESSION = sql(select(*(sessions.c[name] for name in SessionRow._fields)).where(sessions.c.scope == bindparam("scope")))
SCOPES_OF_ID = sql(select(sessions.c.scope).where(sessions.c.session_id == bindparam("session_id")))
_INSERT_SESSION = sql(
    insert(sessions).values(
        {name: bindparam(name) for name in ("scope", "runtime", "session_id", "parent", "opened_at")}
    )
)
_ADOPT_SESSION = sql(update(sessions).where(_OF_SCOPE).values(parent=bindparam("new_parent")))
_CLOSE_SESSION = sql(update(sessions).where(_OF_SCOPE).values(closed_at=bindparam("now")))
_FLAG_SYNC = sql(update(sessions).where(_OF_SCOPE).values(sync_needed=bindparam("flag")))
_CLAIM_INBOX = sql(update(sessions).where(_OF_SCOPE).values(inbox_claim=bindparam("claim")))
_RELEASE_CLAIMS = sql(
    update(sessions)
    .where(func.json_extract(sessions.c.inbox_claim, word("$.owner_id")) == bindparam("owner_id"))
    .values(inbox_claim=null())
)
TOKENS_IN_USE = sql(
    union_all(
        select(owners.c.token).where(owners.c.ended_at.is_(None)),
        *(
            select(func.json_extract(claim, word("$.token"))).where(claim.is_not(None))
            for claim in (sessions.c.inbox_claim, sessions.c.updates_claim)
        ),
    )
)
"""The tokens of owners that have not ended, and of readers whose claim stands: what their locks say is asked for."""

_CLAIMS = sql(select(sessions.c.scope, sessions.c.inbox_claim).where(sessions.c.inbox_claim.is_not(None)))
SESSIONS = sql(
    select(
        sessions.c.scope,
        sessions.c.parent,
        sessions.c.opened_at,
        sessions.c.closed_at,
        select(func.count()).select_from(tasks).where(tasks.c.scope == sessions.c.scope, LIVE).scalar_subquery(),
        sessions.c.sync_needed,
        select(func.count())
        .select_from(inbox)
        .where(inbox.c.scope == sessions.c.scope, inbox.c.acknowledged_at.is_(None))
        .scalar_subquery(),
    ).order_by(sessions.c.session_seq)
)


_WORKS_HERE = and_(
    tasks.c.child_session_id == sessions.c.session_id,
    tasks.c.scope >= sessions.c.runtime + word(":"),
    tasks.c.scope < sessions.c.runtime + word(";"),
)
_IS_AT_WORK = and_(LIVE, tasks.c.state != word(TaskState.CANCEL_REQUESTED))
_FORGET_READERS = [
    sql(update(sessions).where(claim.is_not(None)).values({claim.name: null()}))
    for claim in (sessions.c.inbox_claim, sessions.c.updates_claim)
]
_REOPEN_SESSION = sql(
    update(sessions)
    .where(_OF_SCOPE)
    .values(
        closed_at=null(),
        reopened_after=select(func.coalesce(func.max(tasks.c.task_seq), ZERO)).scalar_subquery(),
        reopened_amid=select(func.json_group_array(tasks.c.task_seq))
        .where(_WORKS_HERE, _IS_AT_WORK)
        .correlate(sessions)
        .scalar_subquery(),
    )
)


def _agent(*where: ColumnElement[bool]) -> ScalarSelect[int]:
    """The newest task that works through a session, unless it had ended, or been asked to, when that was last opened again."""
    was_at_work = tasks.c.task_seq.in_(select(text("value")).select_from(func.json_each(sessions.c.reopened_amid)))
    return (
        select(func.max(tasks.c.task_seq))
        .where(_WORKS_HERE, or_(tasks.c.task_seq > sessions.c.reopened_after, was_at_work), *where)
        .correlate(sessions)
        .scalar_subquery()
    )


# whom a task is born to: one look at its session, and at the sub-agent it works for, one that lives before one that lived
_BIRTHPLACE = hot(
    select(
        sessions.c.closed_at,
        func.coalesce(_agent(_IS_AT_WORK), _agent(LIVE), _agent()),
        sessions.c.sync_needed,
    ).where(sessions.c.scope == bindparam("scope"))
).sql


class Birthplace(NamedTuple):
    """What a new task must know of its session; *agent* is the ``task_seq`` of the sub-agent that works in it, if one does."""

    closed_at: str | None
    agent: int | None
    sync_needed: int


def session(tx: Transaction, scope: str) -> SessionRow | None:
    """Return a session's row, if the file has it."""
    row = tx.one(SESSION, {"scope": scope})
    return None if row is None else SessionRow._make(row)


def birthplace(tx: Transaction, scope: str) -> Birthplace | None:
    """Return what a new task must know of its session; None if the file has no such session."""
    row = tx.one(_BIRTHPLACE, (scope,))
    return None if row is None else Birthplace._make(row)


def insert_session(tx: Transaction, scope: Scope, parent: str | None) -> None:
    """Insert a session."""
    columns = {"scope": str(scope), "runtime": scope.runtime, "session_id": scope.session_id, "parent": parent}
    tx.one(_INSERT_SESSION, {**columns, "opened_at": tx.now})


def set_parent(tx: Transaction, scope: str, parent: str) -> None:
    """Give a session a parent."""
    tx.one(_ADOPT_SESSION, {"key_scope": scope, "new_parent": parent})


def set_closed(tx: Transaction, scope: str) -> None:
    """Close a session."""
    tx.one(_CLOSE_SESSION, {"key_scope": scope, "now": tx.now})


def reopen_session(tx: Transaction, scope: str) -> None:
    """Open a session again, free of what became, by then, of the sub-agents that worked in it."""
    tx.one(_REOPEN_SESSION, {"key_scope": scope})


def flag_sync(tx: Transaction, scope: str, needed: bool) -> None:
    """Note whether a session must take its state up again."""
    tx.one(_FLAG_SYNC, {"key_scope": scope, "flag": int(needed)})


def session_record(row: Sequence[Any]) -> SessionRecord:
    """Build the public record of a row of `SESSIONS`."""
    scope, parent, opened_at, closed_at, live_tasks, sync_needed, unread_notes = row
    with readable(f"the row of session {scope!r}"):
        return SessionRecord(
            scope=Scope.parse(scope),
            parent=None if parent is None else Scope.parse(parent),
            opened_at=opened_at,
            closed_at=closed_at,
            live_tasks=live_tasks,
            sync_needed=bool(sync_needed),
            unread_notes=unread_notes,
        )


def forget_readers(tx: Transaction) -> None:
    """Take every session's claims away: what they read is for the next reader."""
    for statement in _FORGET_READERS:
        tx.all(statement, {})


# --- handles --------------------------------------------------------------------------------------------------------


class HandleRow(NamedTuple):
    """One session's right to one incarnation."""

    handle_id: str
    scope: str
    task_seq: int
    role: str
    read_at: str | None


_HANDLE = select(*(handles.c[name] for name in HandleRow._fields))
_IS_OWNERS = handles.c.role == word(HandleRole.OWNER)
OWNER_HANDLE = sql(_HANDLE.where(handles.c.task_seq == bindparam("task_seq"), _IS_OWNERS))
HANDLE_BY_ID = sql(_HANDLE.where(handles.c.handle_id == bindparam("handle_id")))
_OBSERVERS_HANDLE = sql(
    _HANDLE.where(
        handles.c.scope == bindparam("scope"),
        handles.c.task_seq == bindparam("task_seq"),
        handles.c.role == word(HandleRole.OBSERVER),
    )
)
_INSERT_HANDLE = hot(
    insert(handles)
    .values({name: bindparam(name) for name in ("handle_id", "scope", "task_seq", "role", "created_at")})
    .inline()
)
_MARK_READ = hot(
    update(handles)
    .where(
        handles.c.handle_id == bindparam("key_handle_id"),
        handles.c.scope == bindparam("holder"),
        handles.c.read_at.is_(None),
    )
    .values(read_at=bindparam("now"))
).sql
_MARK_UNREAD = sql(update(handles).where(handles.c.handle_id == bindparam("key_handle_id")).values(read_at=null()))
_MARK_READ_BY_SEQ = sql(
    update(handles)
    .where(values(handles.c.task_seq, "task_seqs"), _IS_OWNERS, handles.c.read_at.is_(None))
    .values(read_at=bindparam("now"))
)
_MOVE_HANDLE = sql(
    update(handles)
    .where(handles.c.task_seq == bindparam("key_task_seq"), _IS_OWNERS)
    .values(scope=bindparam("destination"))
)


def insert_handle(tx: Transaction, handle_id: str, scope: str, task_seq: int, role: HandleRole) -> None:
    """Give a session a handle on a task."""
    columns = {"handle_id": handle_id, "scope": scope, "task_seq": task_seq, "role": role, "created_at": tx.now}
    tx.insert(_INSERT_HANDLE.sql, _INSERT_HANDLE.arrange(columns))


def owner_handle(tx: Transaction, task_seq: int) -> HandleRow:
    """
    Return the handle a task was born with.

    Raises:
        StorageError: somebody's hand took it out of the file.
    """
    return owner_handle_of(tx.one(OWNER_HANDLE, {"task_seq": task_seq}), task_seq)


def owner_handle_of(row: Sequence[Any] | None, task_seq: int) -> HandleRow:
    """Read a row of `OWNER_HANDLE`, which every task has; see `owner_handle`."""
    if row is None:
        raise StorageError(
            f"task #{task_seq} has no handle: somebody took it out of the file, or it is damaged: see lash-store doctor"
        )
    return HandleRow._make(row)


def handle_by_id(tx: Transaction, handle_id: str) -> HandleRow | None:
    """Return a handle, of whatever session."""
    row = tx.one(HANDLE_BY_ID, {"handle_id": handle_id})
    return None if row is None else HandleRow._make(row)


def observers_handle(tx: Transaction, scope: str, task_seq: int) -> HandleRow | None:
    """Return the handle through which a session observes a task, if it does."""
    row = tx.one(_OBSERVERS_HANDLE, {"scope": scope, "task_seq": task_seq})
    return None if row is None else HandleRow._make(row)


def mark_read(tx: Transaction, handle_id: str, holder: str) -> bool:
    """Note that an outcome was handed out through the handle a session has, and say whether it was not before."""
    return tx.connection.execute(_MARK_READ, (tx.now, handle_id, holder)).rowcount == 1


def mark_unread(tx: Transaction, handle_id: str) -> None:
    """Note that nobody got the outcome after all."""
    tx.one(_MARK_UNREAD, {"key_handle_id": handle_id})


def mark_all_read(tx: Transaction, task_seqs: Iterable[int]) -> None:
    """Note that outcomes were handed out to the sessions of their tasks, unless they were before."""
    tx.one(_MARK_READ_BY_SEQ, {"task_seqs": names(task_seqs), "now": tx.now})


def move_handle(tx: Transaction, task_seq: int, destination: str) -> None:
    """Put the handle a task was born with into another session."""
    tx.one(_MOVE_HANDLE, {"key_task_seq": task_seq, "destination": destination})


# --- tasks of a session ----------------------------------------------------------------------------------------------

_TASK = select(*tasks.c)
_LIVE_OF_SESSION = sql(_TASK.where(tasks.c.scope == bindparam("scope"), LIVE).order_by(tasks.c.task_seq))
_LIVE_HIDDEN = sql(
    _TASK.where(tasks.c.scope == bindparam("scope"), LIVE, tasks.c.mode == word(TaskMode.HIDDEN)).order_by(
        tasks.c.task_seq
    )
)
_HIDDEN_FAILURES = sql(
    _TASK.select_from(tasks.join(handles, and_(handles.c.task_seq == tasks.c.task_seq, _IS_OWNERS)))
    .where(
        tasks.c.scope == bindparam("scope"),
        text(HIDDEN_FAILED),
        or_(
            handles.c.read_at.is_(None),
            select(events.c.seq)
            .where(
                events.c.task_seq == tasks.c.task_seq,
                or_(*(events.c.type == word(kind) for kind in TERMINAL_EVENTS)),
                events.c.seq > bindparam("since"),
            )
            .correlate(tasks)
            .exists(),
        ),
    )
    .order_by(tasks.c.task_seq)
)
_BY_KEY = sql(
    _TASK.where(tasks.c.scope == bindparam("scope"), tasks.c.idempotency_key == bindparam("key"))
    .order_by(tasks.c.task_seq.desc())
    .limit(ONE)
    .offset(ZERO)
)
_CHILD_BY_KEY = sql(
    _TASK.where(tasks.c.parent_seq == bindparam("parent_seq"), tasks.c.idempotency_key == bindparam("key"))
    .order_by(tasks.c.task_seq.desc())
    .limit(ONE)
    .offset(ZERO)
)
_RETRIED_AFTER = sql(
    select(events.c.seq)
    .where(
        events.c.task_seq == bindparam("parent_seq"),
        events.c.type == word(EventType.RETRY_SCHEDULED),
        func.json_extract(events.c.data, word("$.state")) == word(TaskState.PENDING),
        events.c.seq
        > select(func.max(events.c.seq))
        .where(
            events.c.task_seq == bindparam("child_seq"), or_(*(events.c.type == word(kind) for kind in TERMINAL_EVENTS))
        )
        .correlate(None)
        .scalar_subquery(),
    )
    .limit(ONE)
    .offset(ZERO)
)


def _count(*where: ColumnElement[bool]) -> str:
    found = select(ONE).select_from(tasks).where(tasks.c.scope == bindparam("scope"), *where)
    return sql(select(func.count()).select_from(found.limit(bindparam("most")).offset(ZERO).subquery()))


_COUNT_LIVE, _COUNT_ALL = _count(LIVE), _count()


def _tasks(rows: Iterable[Any]) -> list[Task]:
    return [Task._make(row) for row in rows]


def live_tasks_of_session(tx: Transaction, scope: str) -> list[Task]:
    """Return a session's live tasks, hidden ones too, oldest first."""
    return _tasks(tx.all(_LIVE_OF_SESSION, {"scope": scope}))


def live_hidden_tasks(tx: Transaction, scope: str) -> list[Task]:
    """Return a session's live hidden tasks, oldest first."""
    return _tasks(tx.all(_LIVE_HIDDEN, {"scope": scope}))


def hidden_failures(tx: Transaction, scope: str, since: int) -> list[Task]:
    """Return a session's failed or abandoned hidden tasks that nobody was told of, or that ended after event *since*."""
    return _tasks(tx.all(_HIDDEN_FAILURES, {"scope": scope, "since": since}))


def task_by_key(tx: Transaction, scope: str, key: str) -> Task | None:
    """Return the newest task of a session that was created under an idempotency key."""
    row = tx.one(_BY_KEY, {"scope": scope, "key": key})
    return None if row is None else Task._make(row)


def child_by_key(tx: Transaction, parent_seq: int, key: str) -> Task | None:
    """Return the newest child of a task that was created under a key, in whatever session it is."""
    row = tx.one(_CHILD_BY_KEY, {"parent_seq": parent_seq, "key": key})
    return None if row is None else Task._make(row)


def was_retried_after(tx: Transaction, parent_seq: int, child_seq: int) -> bool:
    """Say whether a task failed, and was to be tried again, after its child had ended."""
    return tx.one(_RETRIED_AFTER, {"parent_seq": parent_seq, "child_seq": child_seq}) is not None


def count_live(tx: Transaction, scope: str, most: int) -> int:
    """Return how many live tasks a session has, counting no further than *most*."""
    return int((tx.one(_COUNT_LIVE, {"scope": scope, "most": most}) or (0,))[0])


def count_all(tx: Transaction, scope: str, most: int) -> int:
    """Return how many tasks a session has, counting no further than *most*."""
    return int((tx.one(_COUNT_ALL, {"scope": scope, "most": most}) or (0,))[0])


# --- notes ----------------------------------------------------------------------------------------------------------

_NOTE_COLUMNS = ("note_seq", "scope", "key", "task_seq", "task_id", "text", "data", "posted_at", "acknowledged_at")
_NOTE = select(*(inbox.c[name] for name in _NOTE_COLUMNS)).where(inbox.c.scope == bindparam("scope"))
_UNREAD = inbox.c.acknowledged_at.is_(None)
UNREAD_NOTES = sql(_NOTE.where(_UNREAD).order_by(inbox.c.note_seq))
ALL_NOTES = sql(_NOTE.order_by(inbox.c.note_seq))
_INSERT_NOTE = sql(
    sqlite_insert(inbox)
    .values({name: bindparam(name) for name in ("scope", "key", "task_seq", "task_id", "text", "data", "posted_at")})
    .on_conflict_do_nothing(index_elements=[inbox.c.task_seq, inbox.c.key])
    .returning(inbox.c.note_seq)
)
_TAKE_NOTES = sql(
    _NOTE.where(
        _UNREAD,
        unclaimed(inbox.c.claim, sessions.c.inbox_claim),
    )
    .order_by(inbox.c.note_seq)
    .limit(bindparam("limit"))
    .offset(ZERO)
)
_MARK_TAKEN = sql(update(inbox).where(values(inbox.c.note_seq, "note_seqs")).values(claim=bindparam("token")))
_ACKNOWLEDGE = sql(
    update(inbox)
    .where(values(inbox.c.note_seq, "note_seqs"), _UNREAD, inbox.c.claim == bindparam("token"))
    .values(acknowledged_at=bindparam("now"))
)
_MOVE_NOTES = sql(
    update(inbox)
    .where(inbox.c.task_seq == bindparam("key_task_seq"), inbox.c.scope == bindparam("source"), _UNREAD)
    .values(scope=bindparam("destination"))
)


def insert_note(tx: Transaction, task: Task, key: str, note: str, data: str) -> int | None:
    """Post a note of a task to its session and return its number; None if one of that key was posted before."""
    tx.bytes += len(note) + len(data)
    columns = {"scope": task.scope, "key": key, "task_seq": task.task_seq, "task_id": task.id, "text": note}
    row = tx.one(_INSERT_NOTE, {**columns, "data": data, "posted_at": tx.now})
    return None if row is None else int(row[0])


def take_notes(tx: Transaction, scope: str, token: str, limit: int | None) -> list[Note]:
    """Mark a session's unread notes as a reader's, but for those another live reader has, and return them."""
    rows = tx.all(_TAKE_NOTES, {"scope": scope, "limit": -1 if limit is None else limit})
    tx.one(_MARK_TAKEN, {"note_seqs": names(row[0] for row in rows), "token": token})
    return [note_record(row) for row in rows]


def acknowledge(tx: Transaction, note_seqs: Iterable[int], token: str) -> None:
    """Note that a reader has dealt with notes that are still its own."""
    tx.one(_ACKNOWLEDGE, {"note_seqs": names(note_seqs), "token": token, "now": tx.now})


def move_notes(tx: Transaction, task: Task, destination: str) -> None:
    """Put what a task's session has not dealt with into another session's inbox."""
    tx.one(_MOVE_NOTES, {"key_task_seq": task.task_seq, "source": task.scope, "destination": destination})


def inbox_claims(tx: Transaction) -> list[tuple[str, str]]:
    """Return every session whose notes somebody reads, with the claim, JSON text."""
    return [(scope, claim) for scope, claim in tx.all(_CLAIMS, {})]


def claim_inbox(tx: Transaction, scope: str, claim: str | None) -> None:
    """Note who reads a session's notes; None: nobody does."""
    tx.one(_CLAIM_INBOX, {"key_scope": scope, "claim": claim})


def release_claims(tx: Transaction, owner_id: int) -> None:
    """Note that an owner reads no session's notes any more."""
    tx.one(_RELEASE_CLAIMS, {"owner_id": owner_id})


def note_record(row: Sequence[Any]) -> Note:
    """Build the public record of a note."""
    columns = dict(zip(_NOTE_COLUMNS, row, strict=True))
    with readable(f"note {columns['note_seq']}"):
        told = {"scope": Scope.parse(columns["scope"]), "data": json.loads(columns["data"])}
        return Note.model_validate({**columns, **told})


# --- handoffs -------------------------------------------------------------------------------------------------------


class HandoffRow(NamedTuple):
    """One handoff, as it was done; *kept*, *moved* and *cancelled* are JSON text."""

    handoff_id: str
    is_named: int
    source: str
    destination: str
    kept: str
    moved: str
    cancelled: str
    at: str


_HANDOFF = select(*(handoffs.c[name] for name in HandoffRow._fields)).where(handoffs.c.source == bindparam("source"))
_HANDOFF_BY_ID = sql(_HANDOFF.where(handoffs.c.handoff_id == bindparam("handoff_id")))
_HANDOFF_BETWEEN = sql(_HANDOFF.where(handoffs.c.destination == bindparam("destination"), handoffs.c.is_named == ZERO))
_INSERT_HANDOFF = sql(insert(handoffs).values({name: bindparam(name) for name in HandoffRow._fields}))


def handoff_by_id(tx: Transaction, source: str, handoff_id: str) -> HandoffRow | None:
    """Return what a session handed over under an id."""
    row = tx.one(_HANDOFF_BY_ID, {"source": source, "handoff_id": handoff_id})
    return None if row is None else HandoffRow._make(row)


def handoff_between(tx: Transaction, source: str, destination: str) -> HandoffRow | None:
    """Return what one session handed to another without an id."""
    row = tx.one(_HANDOFF_BETWEEN, {"source": source, "destination": destination})
    return None if row is None else HandoffRow._make(row)


def insert_handoff(tx: Transaction, row: HandoffRow) -> None:
    """Store a handoff."""
    tx.bytes += len(row.moved) + len(row.cancelled)
    tx.one(_INSERT_HANDOFF, row._asdict())


def handoff_record(row: HandoffRow) -> Handoff:
    """Build the public record of a handoff, its tasks as they stood after it."""
    with readable(f"handoff {row.handoff_id!r}"):
        return Handoff.model_validate(
            {
                "id": row.handoff_id,
                "source": Scope.parse(row.source),
                "destination": Scope.parse(row.destination),
                "moved": json.loads(row.moved),
                "cancelled": json.loads(row.cancelled),
                "at": row.at,
            }
        )
