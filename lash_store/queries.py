"""Owns every statement, as SQLAlchemy Core compiled once, and the way between rows and records; decides nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Integer,
    Text,
    and_,
    bindparam,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.elements import ClauseElement

from .database import Committed, Transaction
from .lifecycle import JSON_COLUMNS, Task, stamps
from .models import (
    EventType,
    Evidence,
    Failure,
    HandleRole,
    OwnerEnd,
    Scope,
    SessionRecord,
    TaskEvent,
    TaskFilter,
    TaskMode,
    TaskRecord,
)
from .schema import CHECKPOINT, events, handles, owners, sessions, steps, tasks

__all__ = [
    "event_record",
    "insert_event",
    "insert_session",
    "insert_task",
    "session_record",
    "task_record",
    "update_task",
]

_DIALECT = sqlite_dialect(paramstyle="named")
_BY_POSITION = sqlite_dialect(paramstyle="qmark")


def _sql(statement: ClauseElement) -> str:
    compiled = statement.compile(dialect=_DIALECT)
    hidden = [name for name, value in compiled.params.items() if value is not None]
    assert not hidden, f"a value stands in the statement where a name should: {hidden}"
    return str(compiled)


class Hot(NamedTuple):
    """
    A statement run for every task, with its parameters by position: binding them by name costs half as much as SQLite itself.

    ``arrange`` takes them out of a mapping, in order.
    """

    sql: str
    arrange: Callable[[Mapping[str, Any]], tuple[Any, ...]]


def _hot(statement: ClauseElement, prefix: str = "") -> Hot:
    compiled = statement.compile(dialect=_BY_POSITION)
    names = [name.removeprefix(prefix) for name in compiled.positiontup or ()]  # type: ignore[attr-defined]
    return Hot(str(compiled), itemgetter(*names))


def _word(word: str) -> ColumnElement[str]:
    """Write a word of ours into a statement; a partial index is used only with a literal."""
    return literal_column(f"'{word}'", Text)


def _values(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """Match *column* against a JSON array bound as *name*: one statement for any number of values."""
    return column.in_(select(text("value")).select_from(func.json_each(bindparam(name))))


def names(values: Iterable[str | int]) -> str:
    """Write values for a parameter that is matched with a JSON array."""
    return json.dumps(sorted(values))


_NO_OFFSET: ColumnElement[int] = literal_column("0")
"""SQLAlchemy binds a 0 of its own if none is given."""

_TASK = select(*tasks.c)
EVENT_COLUMNS = tuple(column.name for column in events.c)
_EVENT = select(*events.c)
_LIVE = tasks.c.completed_at.is_(None)
# a scope begins with its runtime and ':'; ';' is the next character, so this is a range of the (scope, id) indexes
_OF_RUNTIME = and_(
    tasks.c.scope >= bindparam("runtime", type_=Text) + _word(":"),
    tasks.c.scope < bindparam("runtime", type_=Text) + _word(";"),
)

# --- tasks ----------------------------------------------------------------------------------------------------------

TASK_BY_SEQ = _sql(_TASK.where(tasks.c.task_seq == bindparam("task_seq")))
_OF_ID = and_(tasks.c.scope == bindparam("scope"), tasks.c.id == bindparam("id"))
TASK_BY_ID = _sql(
    _TASK.where(
        tasks.c.task_seq
        == func.coalesce(
            select(tasks.c.task_seq).where(_OF_ID, _LIVE).correlate(None).scalar_subquery(),
            select(func.max(tasks.c.task_seq)).where(_OF_ID).correlate(None).scalar_subquery(),
        )
    )
)
TASKS_BY_SEQ = _sql(_TASK.where(_values(tasks.c.task_seq, "task_seqs")).order_by(tasks.c.task_seq))
LIVE_TASK_BY_ID = _sql(_TASK.where(tasks.c.scope == bindparam("scope"), tasks.c.id == bindparam("id"), _LIVE))
LIVE_TASKS_OF_OWNER = _sql(_TASK.where(tasks.c.owner_id == bindparam("owner_id"), _LIVE).order_by(tasks.c.task_seq))
_LIVE_TASKS_LEFT = _sql(
    _TASK.select_from(tasks.outerjoin(owners, owners.c.owner_id == tasks.c.owner_id))
    .where(_OF_RUNTIME, _LIVE, or_(tasks.c.owner_id.is_(None), owners.c.ended_at.is_not(None)))
    .order_by(tasks.c.task_seq)
)


@functools.cache
def _insert_task(columns: tuple[str, ...]) -> Hot:
    return _hot(insert(tasks).values({column: bindparam(column) for column in columns}).inline())


@functools.cache
def _update_task(columns: tuple[str, ...]) -> Hot:
    return _hot(
        update(tasks)
        .where(
            tasks.c.task_seq == bindparam("new_task_seq"),
            tasks.c.state == bindparam("new_seen_state"),
            tasks.c.attempt == bindparam("new_seen_attempt"),
            tasks.c.owner_id.is_not_distinct_from(bindparam("new_seen_owner_id")),
        )
        .values({column: bindparam(f"new_{column}") for column in columns})
        .returning(*tasks.c),
        prefix="new_",
    )


NO_TASK = Task._make([None] * len(Task._fields))
"""A row before any of its columns is known."""


def insert_task(tx: Transaction, columns: Mapping[str, Any]) -> Task:
    """Insert a task and return its row; columns not named are NULL."""
    statement = _insert_task(tuple(columns))
    task_seq = tx.insert(statement.sql, statement.arrange(columns))
    return NO_TASK._replace(task_seq=task_seq, **columns)


def update_task(tx: Transaction, seen: Task, columns: Mapping[str, Any]) -> Task | None:
    """
    Change a row that still has the state, attempt and owner that were *seen*, and return it; None if it has not.

    Whatever `decide` looks at changes with one of the three; the rest is as the file has it.
    """
    statement = _update_task(tuple(columns))
    parameters = {
        **columns,
        "task_seq": seen.task_seq,
        "seen_state": seen.state,
        "seen_attempt": seen.attempt,
        "seen_owner_id": seen.owner_id,
    }
    row = tx.one(statement.sql, statement.arrange(parameters))
    return None if row is None else Task._make(row)


def task_by_seq(tx: Transaction, task_seq: int) -> Task | None:
    """Return one incarnation."""
    row = tx.one(TASK_BY_SEQ, {"task_seq": task_seq})
    return None if row is None else Task._make(row)


def task_by_id(tx: Transaction, scope: str, task_id: str) -> Task | None:
    """Return the live incarnation of an id, else the newest."""
    row = tx.one(TASK_BY_ID, {"scope": scope, "id": task_id})
    return None if row is None else Task._make(row)


def live_task_by_id(tx: Transaction, scope: str, task_id: str) -> Task | None:
    """Return the live incarnation of an id."""
    row = tx.one(LIVE_TASK_BY_ID, {"scope": scope, "id": task_id})
    return None if row is None else Task._make(row)


def live_tasks_of_owner(tx: Transaction, owner_id: int) -> list[Task]:
    """Return what an owner holds, oldest first."""
    return [Task._make(row) for row in tx.all(LIVE_TASKS_OF_OWNER, {"owner_id": owner_id})]


def live_tasks_left(tx: Transaction, runtime: str) -> list[Task]:
    """Return a runtime's live rows without an owner, or with one that has ended, oldest first."""
    return [Task._make(row) for row in tx.all(_LIVE_TASKS_LEFT, {"runtime": runtime})]


_UNINDEXED_SEQ: ColumnElement[int] = literal_column("+tasks.task_seq", Integer)

_CHOICES: Mapping[str, ColumnElement[bool]] = {
    "after_seq": tasks.c.task_seq > bindparam("after_seq"),
    "live_after_seq": bindparam("live_after_seq") < _UNINDEXED_SEQ,
    "states": _values(tasks.c.state, "states"),
    "kinds": _values(tasks.c.kind, "kinds"),
    "scope": tasks.c.scope == bindparam("scope"),
    "runtime": _OF_RUNTIME,
    "live": _LIVE,
    "listed": tasks.c.mode != _word(TaskMode.HIDDEN),
}


def _chosen(wanted: TaskFilter) -> dict[str, Any]:
    """Return the conditions a filter names, each with its parameter (None: it has none)."""
    chosen: dict[str, Any] = {"after_seq": wanted.after_seq}
    if wanted.states is not None:
        chosen["states"] = names(wanted.states)
    # naming a terminal state includes it
    if not any(state.is_terminal for state in wanted.states) if wanted.states else not wanted.include_terminal:
        chosen["live"] = None
    if "live" in chosen:
        chosen["live_after_seq"] = chosen.pop("after_seq")
    if not wanted.include_hidden:
        chosen["listed"] = None
    if wanted.kinds is not None:
        chosen["kinds"] = names(wanted.kinds)
    if wanted.scope is not None:
        chosen["scope"] = str(wanted.scope)
    if wanted.runtime is not None:
        chosen["runtime"] = wanted.runtime
    return chosen


@functools.cache
def _list_tasks(chosen: frozenset[str]) -> str:
    where = [_CHOICES[name] for name in sorted(chosen)]
    # live rows are few beside a long history: their own index first, then the order
    order = _UNINDEXED_SEQ if "live" in chosen else tasks.c.task_seq
    return _sql(_TASK.where(*where).order_by(order).limit(bindparam("limit")).offset(_NO_OFFSET))


@functools.cache
def _count_tasks(chosen: frozenset[str]) -> str:
    where = [_CHOICES[name] for name in sorted(chosen)]
    return _sql(select(func.count()).select_from(tasks).where(*where))


def list_tasks(wanted: TaskFilter) -> tuple[str, dict[str, Any]]:
    """Return the statement that lists what a filter wants, by ``task_seq``, and its parameters."""
    chosen = _chosen(wanted)
    return _list_tasks(frozenset(chosen)), {**chosen, "limit": -1 if wanted.limit is None else wanted.limit}


def count_tasks(wanted: TaskFilter) -> tuple[str, dict[str, Any]]:
    """Return the statement that counts what a filter wants, and its parameters."""
    chosen = _chosen(wanted)
    return _count_tasks(frozenset(chosen)), chosen


# --- checkpoints ----------------------------------------------------------------------------------------------------

_CHECKPOINT = _sql(
    select(steps.c.value).where(
        steps.c.task_seq == bindparam("task_seq"), steps.c.kind == _word(CHECKPOINT), steps.c.name == _word("")
    )
)

_SAVE_CHECKPOINT = _sql(
    sqlite_insert(steps)
    .values(
        task_seq=bindparam("task_seq"),
        kind=_word(CHECKPOINT),
        name=_word(""),
        attempt=bindparam("attempt"),
        value=bindparam("value"),
        saved_at=bindparam("saved_at"),
    )
    .on_conflict_do_update(
        index_elements=[steps.c.task_seq, steps.c.kind, steps.c.name],
        set_={"attempt": bindparam("attempt"), "value": bindparam("value"), "saved_at": bindparam("saved_at")},
    )
)


def checkpoint(tx: Transaction, task_seq: int) -> str | None:
    """Return what a task saved last, as JSON text."""
    row = tx.one(_CHECKPOINT, {"task_seq": task_seq})
    return None if row is None else row[0]


def save_checkpoint(tx: Transaction, task_seq: int, attempt: int, value: str) -> None:
    """Replace what a task saved last."""
    tx.bytes += len(value)
    tx.one(_SAVE_CHECKPOINT, {"task_seq": task_seq, "attempt": attempt, "value": value, "saved_at": tx.now})


# --- sessions, handles ----------------------------------------------------------------------------------------------

SESSION = _sql(select(sessions.c.scope).where(sessions.c.scope == bindparam("scope")))
_INSERT_SESSION = _sql(
    insert(sessions).values({name: bindparam(name) for name in ("scope", "runtime", "session_id", "opened_at")})
)
_INSERT_HANDLE = _hot(
    insert(handles)
    .values(
        handle_id=bindparam("handle_id"),
        scope=bindparam("scope"),
        task_seq=bindparam("task_seq"),
        role=_word(HandleRole.OWNER),
        created_at=bindparam("created_at"),
    )
    .inline()
)
OWNER_HANDLE = _sql(
    select(handles.c.handle_id).where(
        handles.c.task_seq == bindparam("task_seq"), handles.c.role == _word(HandleRole.OWNER)
    )
)
SESSIONS = _sql(
    select(
        sessions.c.scope,
        sessions.c.opened_at,
        sessions.c.closed_at,
        select(func.count()).select_from(tasks).where(tasks.c.scope == sessions.c.scope, _LIVE).scalar_subquery(),
    ).order_by(sessions.c.session_seq)
)


def has_session(tx: Transaction, scope: str) -> bool:
    """Say whether the file has a session."""
    return tx.one(SESSION, {"scope": scope}) is not None


def insert_session(tx: Transaction, scope: Scope) -> None:
    """Insert a session."""
    tx.one(
        _INSERT_SESSION,
        {"scope": str(scope), "runtime": scope.runtime, "session_id": scope.session_id, "opened_at": tx.now},
    )


def insert_owner_handle(tx: Transaction, task: Task, handle_id: str) -> None:
    """Give the task's session the handle that may cancel it."""
    columns = {"handle_id": handle_id, "scope": task.scope, "task_seq": task.task_seq, "created_at": tx.now}
    tx.insert(_INSERT_HANDLE.sql, _INSERT_HANDLE.arrange(columns))


# --- owners ---------------------------------------------------------------------------------------------------------

_INSERT_OWNER = _sql(
    insert(owners)
    .values(
        {
            name: bindparam(name)
            for name in ("token", "runtime", "pid", "process_start", "boot_id", "host", "version", "opened_at")
        }
    )
    .returning(owners.c.owner_id)
)
_END_OWNER = _sql(
    update(owners)
    .where(owners.c.owner_id == bindparam("key_owner_id"), owners.c.ended_at.is_(None))
    .values(ended_at=bindparam("now"), end=bindparam("how"))
)
_OWNER = select(
    owners.c.owner_id,
    owners.c.token,
    owners.c.runtime,
    owners.c.pid,
    owners.c.process_start,
    owners.c.boot_id,
    owners.c.host,
    owners.c.ended_at,
    owners.c.end,
)
OPEN_OWNERS = _sql(
    _OWNER.where(owners.c.runtime == bindparam("runtime"), owners.c.ended_at.is_(None)).order_by(owners.c.owner_id)
)
ALL_OPEN_OWNERS = _sql(_OWNER.where(owners.c.ended_at.is_(None)).order_by(owners.c.owner_id))
OWNER = _sql(_OWNER.where(owners.c.owner_id == bindparam("owner_id")))
_OPEN_OWNER_BY_TOKEN = _sql(_OWNER.where(owners.c.token == bindparam("token"), owners.c.ended_at.is_(None)))


class OwnerRow(NamedTuple):
    """One opened store, as its row stands."""

    owner_id: int
    token: str
    runtime: str
    pid: int
    process_start: str
    boot_id: str
    host: str
    ended_at: str | None
    end: str | None


def insert_owner(tx: Transaction, columns: Mapping[str, Any]) -> int:
    """Insert an owner and return its id."""
    row = tx.one(_INSERT_OWNER, {**columns, "opened_at": tx.now})
    assert row is not None
    return int(row[0])


def end_owner(tx: Transaction, owner_id: int, how: OwnerEnd) -> None:
    """Note that an owner has ended, unless it has already."""
    tx.one(_END_OWNER, {"key_owner_id": owner_id, "now": tx.now, "how": how})


def owner_by_id(tx: Transaction, owner_id: int) -> OwnerRow | None:
    """Return one owner, open or ended."""
    row = tx.one(OWNER, {"owner_id": owner_id})
    return None if row is None else OwnerRow._make(row)


def owner_is_open(tx: Transaction, token: str) -> bool:
    """Say whether an owner of this token stands in the file and has not ended."""
    return tx.one(_OPEN_OWNER_BY_TOKEN, {"token": token}) is not None


# --- events ---------------------------------------------------------------------------------------------------------

_INSERT_EVENT = _hot(insert(events).values({column: bindparam(column.name) for column in events.c}).inline()).sql
_EVENTS_A_STATEMENT = 64


@functools.cache
def _insert_events(count: int) -> str:
    # parameters stand in the order of the table's columns, as those of `Committed` do
    into, values = _INSERT_EVENT.split(" VALUES ")
    return f"{into} VALUES {', '.join([values] * count)}"


EVENT_BY_SEQ = _sql(_EVENT.where(events.c.seq == bindparam("seq")))
LAST_SEQ = _sql(select(func.coalesce(func.max(events.c.seq), literal_column("0"))))

_EVENT_CHOICES: Mapping[str, ColumnElement[bool]] = {
    "after": events.c.seq > bindparam("after"),
    "until": events.c.seq <= bindparam("until"),
    "scope": or_(events.c.scope == bindparam("scope"), events.c.from_scope == bindparam("scope")),
    "types": _values(events.c.type, "types"),
    "task_seq": events.c.task_seq == bindparam("task_seq"),
}


@functools.cache
def events_page(chosen: frozenset[str]) -> str:
    """Return the statement that pages events in ``seq`` order under the named conditions, up to ``:limit`` of them."""
    where = [_EVENT_CHOICES[name] for name in sorted(chosen)]
    return _sql(_EVENT.where(*where).order_by(events.c.seq).limit(bindparam("limit")).offset(_NO_OFFSET))


def insert_event(
    tx: Transaction,
    kind: EventType,
    *,
    scope: str,
    task: Task | None = None,
    data: str = "{}",
    from_scope: str | None = None,
    local: Any = None,
    is_last: bool = True,
) -> None:
    """
    Note what happened, to be written before COMMIT, and for those who act on the commit.

    Who acts sees the row only with the *last* of several events of one unit: in between, it was never in the file.
    """
    tx.bytes += len(data)
    values: tuple[Any, ...]
    if task is None:
        values = (None, scope, from_scope, None, None, kind, tx.now, data)
    else:
        values = (task.task_seq, scope, from_scope, task.id, task.attempt, kind, tx.now, data)
    tx.events.append(Committed._make((tx.next_seq, *values, task if is_last else None, local)))


def write_events(tx: Transaction) -> None:
    """Write what happened in a transaction, many rows a statement: the last thing before its COMMIT."""
    width = len(EVENT_COLUMNS)
    for first in range(0, len(tx.events), _EVENTS_A_STATEMENT):
        some = tx.events[first : first + _EVENTS_A_STATEMENT]
        tx.connection.execute(
            _insert_events(len(some)), [value for event in some for value in event[:width]]
        ).fetchall()


def event_data(kind: EventType, columns: Mapping[str, Any], detail: Mapping[str, Any] | None) -> str:
    """Write an event's data: the changed columns but those `fold` takes from the event itself, then the detail."""
    own = _own_columns(kind)
    plain = {name: value for name, value in columns.items() if name not in own}
    if detail:
        plain.update(detail)
    text = _encode(plain)
    for name, value in columns.items():
        if name in JSON_COLUMNS and value is not None:
            text = f'{text[:-1]}{"," if len(text) > 2 else ""}"{name}":{value}}}'
    return text


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@functools.cache
def _own_columns(kind: EventType) -> frozenset[str]:
    return frozenset({"scope", "id", "attempt", *stamps(kind), *JSON_COLUMNS})


# --- rows to records ------------------------------------------------------------------------------------------------


def task_record(task: Task) -> TaskRecord:
    """Build the public record of a row."""
    values: dict[str, Any] = task._asdict()
    values["scope"] = Scope.parse(task.scope)
    values["arguments"] = None if task.arguments is None else json.loads(task.arguments)
    values["result"] = None if task.result is None else json.loads(task.result)
    values["failure"] = None if task.failure is None else Failure.model_validate_json(task.failure)
    values["evidence"] = None if task.evidence is None else Evidence.model_validate_json(task.evidence)
    return TaskRecord.model_validate(values)


def event_record(event: Committed) -> TaskEvent:
    """Build the public record of an event."""
    return TaskEvent(
        seq=event.seq,
        task_seq=event.task_seq,
        scope=Scope.parse(event.scope),
        from_scope=None if event.from_scope is None else Scope.parse(event.from_scope),
        task_id=event.task_id,
        attempt=event.attempt,
        type=EventType(event.type),
        at=event.at,  # type: ignore[arg-type]
        data=json.loads(event.data),
    )


def session_record(row: Any) -> SessionRecord:
    """Build the public record of a session's row."""
    scope, opened_at, closed_at, live_tasks = row
    return SessionRecord(scope=Scope.parse(scope), opened_at=opened_at, closed_at=closed_at, live_tasks=live_tasks)
