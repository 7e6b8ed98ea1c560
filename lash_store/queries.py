"""Owns every statement, as SQLAlchemy Core compiled once, and the way between rows and records; decides nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json.encoder import encode_basestring
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
    update,
)

from .errors import StorageError, shortened
from .lifecycle import DEFAULTS, JSON_COLUMNS, Task, stamps, with_columns
from .models import (
    EventType,
    Evidence,
    Failure,
    OwnerEnd,
    ProcessIdentity,
    Scope,
    TaskEvent,
    TaskFilter,
    TaskMode,
    TaskRecord,
    TaskState,
)
from .schema import events, owners, tasks
from .statements import ONE, ZERO, Hot, hot, names, sql, values, word
from .transaction import Committed, Transaction

__all__ = [
    "LIVE",
    "WAS_CANCELLED",
    "event_record",
    "insert_event",
    "insert_task",
    "task_record",
    "update_task",
]

_TASK = select(*tasks.c)
EVENT_COLUMNS = tuple(column.name for column in events.c)
_EVENT = select(*events.c)
LIVE = tasks.c.completed_at.is_(None)
# by a cancel that somebody requested; work that its registrar says is cancelled was not asked to end
WAS_CANCELLED = and_(tasks.c.state == word(TaskState.CANCELLED), tasks.c.cancel_requested_at.is_not(None))
# a scope begins with its runtime and ':'; ';' is the next character, so this is a range of the (scope, id) indexes
_OF_RUNTIME = and_(
    tasks.c.scope >= bindparam("runtime", type_=Text) + word(":"),
    tasks.c.scope < bindparam("runtime", type_=Text) + word(";"),
)

# --- tasks ----------------------------------------------------------------------------------------------------------

TASK_BY_SEQ = sql(_TASK.where(tasks.c.task_seq == bindparam("task_seq")))
_OF_ID = and_(tasks.c.scope == bindparam("scope"), tasks.c.id == bindparam("id"))
TASK_BY_ID = sql(
    _TASK.where(
        tasks.c.task_seq
        == func.coalesce(
            select(tasks.c.task_seq).where(_OF_ID, LIVE).correlate(None).scalar_subquery(),
            select(func.max(tasks.c.task_seq)).where(_OF_ID).correlate(None).scalar_subquery(),
        )
    )
)
TASKS_BY_SEQ = sql(_TASK.where(values(tasks.c.task_seq, "task_seqs")).order_by(tasks.c.task_seq))
LIVE_TASK_BY_ID = sql(_TASK.where(tasks.c.scope == bindparam("scope"), tasks.c.id == bindparam("id"), LIVE))
LIVE_TASKS_OF_OWNER = sql(_TASK.where(tasks.c.owner_id == bindparam("owner_id"), LIVE).order_by(tasks.c.task_seq))
_LIVE_TASKS_LEFT = sql(
    _TASK.select_from(tasks.outerjoin(owners, owners.c.owner_id == tasks.c.owner_id))
    .where(_OF_RUNTIME, LIVE, or_(tasks.c.owner_id.is_(None), owners.c.ended_at.is_not(None)))
    .order_by(tasks.c.task_seq)
)


LEFT_PROCESSES = sql(
    _TASK.select_from(tasks.outerjoin(owners, owners.c.owner_id == tasks.c.owner_id))
    .where(
        # its own index first: of a long history, few rows have one
        tasks.c.task_seq.in_(select(tasks.c.task_seq).where(tasks.c.process.is_not(None)).correlate(None)),
        or_(
            tasks.c.owner_id.is_(None),
            owners.c.ended_at.is_not(None),
            values(tasks.c.owner_id, "dead"),
        ),
        or_(bindparam("runtime", type_=Text).is_(None), _OF_RUNTIME),
    )
    .order_by(tasks.c.task_seq)
)
"""
Rows with a recorded process that no owner has, one that has ended, or a dead one; of a runtime, or of all. What ran for a
finished one that was given up may have been left.
"""

LIVE_WITH_PROCESS = sql(
    _TASK.where(
        tasks.c.task_seq.in_(select(tasks.c.task_seq).where(tasks.c.process.is_not(None)).correlate(None)), LIVE
    ).order_by(tasks.c.task_seq)
)

NEXT_FREE_DEADLINE = sql(select(func.min(tasks.c.deadline)).where(LIVE, tasks.c.owner_id.is_(None), _OF_RUNTIME))


@functools.cache
def _insert_task(columns: tuple[str, ...]) -> Hot:
    return hot(insert(tasks).values({column: bindparam(column) for column in columns}).inline())


@functools.cache
def _update_task(columns: tuple[str, ...]) -> Hot:
    return hot(
        update(tasks)
        .where(
            tasks.c.task_seq == bindparam("new_task_seq"),
            tasks.c.state == bindparam("new_seen_state"),
            tasks.c.attempt == bindparam("new_seen_attempt"),
            tasks.c.owner_id.is_not_distinct_from(bindparam("new_seen_owner_id")),
            tasks.c.scope == bindparam("new_seen_scope"),
            tasks.c.updated_at == bindparam("new_seen_updated_at"),
        )
        .values({column: bindparam(f"new_{column}") for column in columns}),
        prefix="new_",
    )


NO_TASK = Task._make(DEFAULTS.get(column) for column in Task._fields)
"""A row before any of its columns is known."""


def insert_task(tx: Transaction, columns: Mapping[str, Any]) -> Task:
    """Insert a task and return its row; columns not named are NULL."""
    statement = _insert_task(tuple(columns))
    task_seq = tx.insert(statement.sql, statement.arrange(columns))
    return with_columns(NO_TASK, {**columns, "task_seq": task_seq})


def update_task(tx: Transaction, seen: Task, columns: Mapping[str, Any]) -> Task | None:
    """
    Change a row that still is what was *seen*, and return it; None if it is not.

    Whatever changes a row changes its state, attempt, owner, session or time: SQLite need not give all of it back.
    """
    statement = _update_task(tuple(columns))
    if not tx.connection.execute(statement.sql, statement.arrange(_key_of(seen, columns))).rowcount:
        return None
    return with_columns(seen, columns)


def _key_of(seen: Task, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **columns,
        "task_seq": seen.task_seq,
        "seen_state": seen.state,
        "seen_attempt": seen.attempt,
        "seen_owner_id": seen.owner_id,
        "seen_scope": seen.scope,
        "seen_updated_at": seen.updated_at,
    }


def update_tasks(tx: Transaction, changes: Sequence[tuple[Task, Mapping[str, Any]]]) -> list[Task]:
    """
    Change many rows that were *seen* in this transaction, and return them: as `update_task`, a statement a shape of change.

    Raises:
        StorageError: one of them is no longer what was seen.
    """
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for seen, columns in changes:
        alike.setdefault(tuple(columns), []).append(_key_of(seen, columns))
    for names_of, parameters in alike.items():
        statement = _update_task(names_of)
        changed = tx.connection.executemany(statement.sql, map(statement.arrange, parameters)).rowcount
        if changed != len(parameters):
            raise not_as_read(f"{len(parameters) - changed} rows of tasks")
    return [with_columns(seen, columns) for seen, columns in changes]


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
    "states": values(tasks.c.state, "states"),
    "kinds": values(tasks.c.kind, "kinds"),
    "scope": tasks.c.scope == bindparam("scope"),
    "runtime": _OF_RUNTIME,
    "live": LIVE,
    "listed": tasks.c.mode != word(TaskMode.HIDDEN),
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
    return sql(_TASK.where(*where).order_by(order).limit(bindparam("limit")).offset(ZERO))


@functools.cache
def _count_tasks(chosen: frozenset[str]) -> str:
    where = [_CHOICES[name] for name in sorted(chosen)]
    return sql(select(func.count()).select_from(tasks).where(*where))


def list_tasks(wanted: TaskFilter) -> tuple[str, dict[str, Any]]:
    """Return the statement that lists what a filter wants, by ``task_seq``, and its parameters."""
    chosen = _chosen(wanted)
    return _list_tasks(frozenset(chosen)), {**chosen, "limit": -1 if wanted.limit is None else wanted.limit}


def count_tasks(wanted: TaskFilter) -> tuple[str, dict[str, Any]]:
    """Return the statement that counts what a filter wants, and its parameters."""
    chosen = _chosen(wanted)
    return _count_tasks(frozenset(chosen)), chosen


# --- owners ---------------------------------------------------------------------------------------------------------

_INSERT_OWNER = sql(
    insert(owners)
    .values(
        {
            name: bindparam(name)
            for name in ("token", "runtime", "pid", "process_start", "boot_id", "host", "version", "opened_at")
        }
    )
    .returning(owners.c.owner_id)
)
_END_OWNER = sql(
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
OPEN_OWNERS = sql(
    _OWNER.where(owners.c.runtime == bindparam("runtime"), owners.c.ended_at.is_(None)).order_by(owners.c.owner_id)
)
ALL_OPEN_OWNERS = sql(_OWNER.where(owners.c.ended_at.is_(None)).order_by(owners.c.owner_id))
OWNER = sql(_OWNER.where(owners.c.owner_id == bindparam("owner_id")))
_OPEN_OWNER_BY_TOKEN = sql(_OWNER.where(owners.c.token == bindparam("token"), owners.c.ended_at.is_(None)))


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

_INSERT_EVENT = hot(insert(events).values({column: bindparam(column.name) for column in events.c}).inline()).sql
_EVENTS_A_STATEMENT = 64


@functools.cache
def _insert_events(count: int) -> str:
    # parameters stand in the order of the table's columns, as those of `Committed` do
    into, values = _INSERT_EVENT.split(" VALUES ")
    return f"{into} VALUES {', '.join([values] * count)}"


EVENT_BY_SEQ = sql(_EVENT.where(events.c.seq == bindparam("seq")))
_MOVED_FROM = sql(
    select(events.c.seq)
    .where(
        events.c.task_seq == bindparam("task_seq"),
        events.c.type == word(EventType.TRANSFERRED),
        events.c.from_scope == bindparam("scope"),
    )
    .limit(ONE)
    .offset(ZERO)
)

_EVENT_CHOICES: Mapping[str, ColumnElement[bool]] = {
    "after": events.c.seq > bindparam("after"),
    "until": events.c.seq <= bindparam("until"),
    "scope": or_(events.c.scope == bindparam("scope"), events.c.from_scope == bindparam("scope")),
    "types": values(events.c.type, "types"),
    "task_seq": events.c.task_seq == bindparam("task_seq"),
}


@functools.cache
def events_page(chosen: frozenset[str]) -> str:
    """Return the statement that pages events in ``seq`` order under the named conditions, up to ``:limit`` of them."""
    where = [_EVENT_CHOICES[name] for name in sorted(chosen)]
    return sql(_EVENT.where(*where).order_by(events.c.seq).limit(bindparam("limit")).offset(ZERO))


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
    seq, now = tx.next_seq, tx.now
    if task is None:
        event = Committed(seq, None, scope, from_scope, None, None, kind, now, data, None, local)
    else:
        of_task = task if is_last else None
        event = Committed(seq, task.task_seq, scope, from_scope, task.id, task.attempt, kind, now, data, of_task, local)
    tx.events.append(event)


def was_moved(tx: Transaction, task_seq: int, scope: str) -> bool:
    """Say whether a task was ever given to another session by this one."""
    # what other units of this transaction did is not in the table yet
    if any(
        (event.type, event.task_seq, event.from_scope) == (EventType.TRANSFERRED, task_seq, scope)
        for event in tx.events
    ):
        return True
    return tx.one(_MOVED_FROM, {"task_seq": task_seq, "scope": scope}) is not None


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
    # strings, most of what there is, are written far quicker one by one than an object of them
    plain, json_texts = [], []
    for name, value in columns.items():
        if name not in own:
            plain.append(f'"{name}":{_text(value)}')
        elif name in JSON_COLUMNS and (value is not None or kind is not EventType.REGISTERED):
            # at its birth a row has nothing in them
            json_texts.append(f'"{name}":{"null" if value is None else value}')
    if detail:
        plain += [f'"{name}":{_text(value)}' for name, value in detail.items()]
    return "{" + ",".join(plain + json_texts) + "}"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _text(value: Any) -> str:
    if isinstance(value, str):
        return encode_basestring(value)
    return str(value) if type(value) is int else _encode(value)


@functools.cache
def _own_columns(kind: EventType) -> frozenset[str]:
    return frozenset({"scope", "id", "attempt", *stamps(kind), *JSON_COLUMNS})


# --- rows to records ------------------------------------------------------------------------------------------------


def task_record(task: Task) -> TaskRecord:
    """
    Build the public record of a row.

    Raises:
        StorageError: somebody's hand made it unreadable.
    """
    with readable(f"the row of task #{task.task_seq}"):
        return _task_record(task)


def not_as_read(what: str) -> StorageError:
    """Say of rows that were read in this transaction that they cannot be found by what was read."""
    return StorageError(
        f"{what} cannot be changed, for it is not what was read of it: text in it that is not UTF-8, or a trigger of somebody "
        "else's: see lash-store doctor; nothing was written"
    )


@contextmanager
def readable(what: str) -> Iterator[None]:
    """
    Say of what is built in this block which row it is made from, if it cannot be.

    Raises:
        StorageError: somebody's hand made it unreadable.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = shortened(str(error).partition("\n")[0])
        raise StorageError(
            f"{shortened(what)} cannot be read ({reason}): somebody edited it, or it is damaged: see lash-store doctor"
        ) from error


def _task_record(task: Task) -> TaskRecord:
    values: dict[str, Any] = task._asdict()
    values["scope"] = Scope.parse(task.scope)
    values["arguments"] = None if task.arguments is None else json.loads(task.arguments)
    values["result"] = None if task.result is None else json.loads(task.result)
    values["failure"] = None if task.failure is None else Failure.model_validate_json(task.failure)
    values["evidence"] = None if task.evidence is None else Evidence.model_validate_json(task.evidence)
    for name in ("callback_error", "last_error"):
        values[name] = None if values[name] is None else Failure.model_validate_json(values[name])
    if task.process is not None:
        values["process"] = process_identity(task.process)
    return TaskRecord.model_validate(values)


def process_identity(text: str) -> ProcessIdentity | None:
    """Read what was recorded of a process; None if somebody's hand made it unreadable."""
    try:
        return ProcessIdentity.model_validate_json(text)
    except ValueError:
        return None


def event_record(event: Committed) -> TaskEvent:
    """
    Build the public record of an event.

    Raises:
        StorageError: somebody's hand made it unreadable.
    """
    with readable(f"event {event.seq}"):
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
