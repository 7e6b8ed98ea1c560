"""Owns the statements about monitors and what they wrote; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Text, and_, bindparam, case, func, insert, literal_column, null, or_, select, update

from .lifecycle import MONITOR, Task
from .lines import Line
from .models import Scope
from .monitor_models import MonitorRecord, MonitorSpec, MonitorUpdate
from .queries import LIVE, readable, task_record
from .schema import inbox, monitors, sessions, tasks, updates
from .statements import ONE, ZERO, hot, names, sql, unclaimed, values, word
from .transaction import Transaction

__all__ = ["MonitorRow", "UpdateRow"]

# --- monitors -------------------------------------------------------------------------------------------------------


class MonitorRow(NamedTuple):
    """The row of one monitor's task, every column as SQLite gives it."""

    task_seq: int
    scope: str
    monitor_id: str
    wake_policy: str
    armed: int
    lines: int
    bytes: int
    dropped: int
    kept_lines: int
    kept_bytes: int
    throttled_at: str | None
    exit_status: int | None


_OF_TASK = monitors.c.task_seq == bindparam("key_task_seq")
_MONITOR = sql(select(*monitors.c).where(monitors.c.task_seq == bindparam("task_seq")))
_INSERT_MONITOR = sql(
    insert(monitors).values(
        {name: bindparam(name) for name in ("task_seq", "scope", "monitor_id", "wake_policy", "armed")}
    )
)
_DISARM = sql(
    update(monitors)
    .where(monitors.c.scope == bindparam("key_scope"), monitors.c.monitor_id == bindparam("key_monitor_id"))
    .where(monitors.c.armed == ONE, monitors.c.task_seq != bindparam("but"))
    .values(armed=ZERO)
)
_DISARM_ONE = sql(update(monitors).where(_OF_TASK, monitors.c.armed == ONE).values(armed=ZERO))
_COUNT_UP = sql(
    update(monitors)
    .where(_OF_TASK)
    .values(
        lines=monitors.c.lines + bindparam("more_lines"),
        bytes=monitors.c.bytes + bindparam("more_bytes"),
        dropped=monitors.c.dropped + bindparam("more_dropped"),
        kept_lines=monitors.c.kept_lines + bindparam("more_kept"),
        kept_bytes=monitors.c.kept_bytes + bindparam("more_kept_bytes"),
    )
)
_THROTTLE = sql(update(monitors).where(_OF_TASK).values(throttled_at=bindparam("since")))
_SET_EXIT = sql(update(monitors).where(_OF_TASK).values(exit_status=bindparam("status"), throttled_at=null()))
_MOVE_MONITOR = sql(update(monitors).where(_OF_TASK).values(scope=bindparam("destination")))
_COUNT_LIVE = sql(
    select(func.count())
    .select_from(tasks)
    .where(tasks.c.scope == bindparam("scope"), LIVE, tasks.c.function == word(MONITOR))
)
_OF_ID = and_(monitors.c.scope == bindparam("scope"), monitors.c.monitor_id == bindparam("monitor_id"))
_HAS_KEPT = monitors.c.kept_lines > ZERO
_KEPT_LINES = sql(select(func.coalesce(func.sum(monitors.c.kept_lines), ZERO)).where(_OF_ID, _HAS_KEPT))
_KEPT_BYTES = sql(select(sessions.c.update_bytes).where(sessions.c.scope == bindparam("scope")))
_ADD_BYTES = sql(
    update(sessions)
    .where(sessions.c.scope == bindparam("key_scope"))
    .values(update_bytes=sessions.c.update_bytes + bindparam("more"))
)
_NEWEST = (
    select(
        func.coalesce(
            func.max(case((LIVE, monitors.c.task_seq), else_=null())),
            func.max(monitors.c.task_seq),
        )
    )
    .select_from(monitors.join(tasks, tasks.c.task_seq == monitors.c.task_seq))
    .where(monitors.c.scope == bindparam("scope"))
    .group_by(monitors.c.monitor_id)
    .correlate(None)
)
_UNREAD_OF_TASK = (
    select(func.count())
    .select_from(updates)
    .where(updates.c.task_seq == tasks.c.task_seq, updates.c.acknowledged_at.is_(None))
    .correlate(tasks)
    .scalar_subquery()
)
MONITORS = sql(
    select(*tasks.c, *monitors.c, _UNREAD_OF_TASK)
    .select_from(monitors.join(tasks, tasks.c.task_seq == monitors.c.task_seq))
    .where(monitors.c.task_seq.in_(_NEWEST))
    .order_by(monitors.c.task_seq)
)
"""
The live monitor of each id in a session, else the newest: the columns of its task, its own, and how much of it is unread.
"""

_IS_ARMED = sql(
    select(monitors.c.task_seq)
    .where(monitors.c.scope == bindparam("scope"), monitors.c.monitor_id == bindparam("monitor_id"))
    .where(monitors.c.armed == ONE)
    .limit(ONE)
    .offset(ZERO)
)
_TO_START = sql(
    select(monitors.c.monitor_id, tasks.c.arguments)
    .select_from(monitors.join(tasks, tasks.c.task_seq == monitors.c.task_seq))
    .where(monitors.c.scope == bindparam("scope"), monitors.c.armed == ONE, tasks.c.completed_at.is_not(None))
    .order_by(monitors.c.task_seq)
)


def monitor(tx: Transaction, task_seq: int) -> MonitorRow | None:
    """Return the row of a monitor's task."""
    row = tx.one(_MONITOR, {"task_seq": task_seq})
    return None if row is None else MonitorRow._make(row)


def insert_monitor(tx: Transaction, task: Task, spec: MonitorSpec, *, armed: bool) -> None:
    """Give a monitor's task its row."""
    columns = {"task_seq": task.task_seq, "scope": task.scope, "monitor_id": spec.id, "wake_policy": spec.wake_policy}
    tx.one(_INSERT_MONITOR, {**columns, "armed": int(armed)})


def disarm(tx: Transaction, scope: str, monitor_id: str, *, but: int) -> None:
    """Let none of a session's monitors of an id start with the session any more, *but* one."""
    tx.one(_DISARM, {"key_scope": scope, "key_monitor_id": monitor_id, "but": but})


def disarm_one(tx: Transaction, task_seq: int) -> None:
    """Let a monitor not start with its session any more."""
    tx.one(_DISARM_ONE, {"key_task_seq": task_seq})


def count_up(
    tx: Transaction, task_seq: int, *, lines: int, size: int, dropped: int, kept: int, kept_bytes: int
) -> None:
    """Add to what a monitor's row counts; what is *kept* may become less."""
    counts = {"more_lines": lines, "more_bytes": size, "more_dropped": dropped}
    tx.one(_COUNT_UP, {"key_task_seq": task_seq, **counts, "more_kept": kept, "more_kept_bytes": kept_bytes})


def set_throttled(tx: Transaction, task_seq: int, since: str | None) -> None:
    """Note since when a monitor writes more than is stored; None: it does not."""
    tx.one(_THROTTLE, {"key_task_seq": task_seq, "since": since})


def set_exit(tx: Transaction, task_seq: int, status: int | None) -> None:
    """Note how a monitor's process ended."""
    tx.one(_SET_EXIT, {"key_task_seq": task_seq, "status": status})


def move_monitor(tx: Transaction, task_seq: int, destination: str) -> None:
    """Put a monitor, and all it wrote, into another session."""
    tx.one(_MOVE_MONITOR, {"key_task_seq": task_seq, "destination": destination})
    tx.one(_MOVE_UPDATES, {"key_task_seq": task_seq, "destination": destination})


def count_live(tx: Transaction, scope: str) -> int:
    """Return how many live monitors a session has."""
    return int((tx.one(_COUNT_LIVE, {"scope": scope}) or (0,))[0])


def kept_lines(tx: Transaction, scope: str, monitor_id: str) -> int:
    """Return how many lines are kept of a session's monitors of an id."""
    return int((tx.one(_KEPT_LINES, {"scope": scope, "monitor_id": monitor_id}) or (0,))[0])


def kept_bytes(tx: Transaction, scope: str) -> int:
    """Return how many bytes of updates are kept of a session's monitors."""
    return int((tx.one(_KEPT_BYTES, {"scope": scope}) or (0,))[0])


def add_bytes(tx: Transaction, scope: str, more: int) -> None:
    """Count how many bytes more are kept of a session's monitors, or less."""
    tx.one(_ADD_BYTES, {"key_scope": scope, "more": more})


def is_armed(tx: Transaction, scope: str, monitor_id: str) -> bool:
    """Say whether a session's monitor of an id is to start with it."""
    return tx.one(_IS_ARMED, {"scope": scope, "monitor_id": monitor_id}) is not None


def to_start(tx: Transaction, scope: str) -> list[tuple[str, MonitorSpec | None]]:
    """Return a session's armed monitors that do not run, by their ids; None for one whose spec cannot be read."""
    return [(monitor_id, spec_of(arguments)) for monitor_id, arguments in tx.all(_TO_START, {"scope": scope})]


def spec_of(arguments: str | None) -> MonitorSpec | None:
    """Read what a monitor's task was given, as far as this version knows its words; None if it cannot be read."""
    try:
        said = json.loads(arguments or "{}")["spec"]
        return MonitorSpec.model_validate({name: said[name] for name in MonitorSpec.model_fields if name in said})
    except (ValueError, TypeError, KeyError):
        return None


_UNREADABLE = ("unreadable",)
"""The command of a spec of which, since somebody's hand has been at the row, only the id is known."""


def monitor_record(row: Sequence[Any]) -> MonitorRecord:
    """Build the public record of a row of `MONITORS`."""
    columns = len(Task._fields)
    task, own, unread = Task._make(row[:columns]), MonitorRow._make(row[columns:-1]), row[-1]
    with readable(f"the monitor of task #{task.task_seq}"):
        return MonitorRecord(
            id=own.monitor_id,
            scope=Scope.parse(own.scope),
            spec=spec_of(task.arguments) or MonitorSpec(id=own.monitor_id, command=_UNREADABLE),
            task=task_record(task),
            armed=bool(own.armed),
            lines=own.lines,
            bytes=own.bytes,
            dropped=own.dropped,
            unread=unread,
            throttled_at=own.throttled_at,  # type: ignore[arg-type]
            exit_status=own.exit_status,
        )


# --- updates --------------------------------------------------------------------------------------------------------


class UpdateRow(NamedTuple):
    """One kept line, as far as it matters for its keeping; without a *claim*, nobody was ever handed it."""

    update_seq: int
    scope: str
    task_seq: int
    bytes: int
    claim: str | None


_UPDATE_COLUMNS = (
    "update_seq",
    "scope",
    "monitor_id",
    "task_seq",
    "line",
    "stream",
    "text",
    "is_cut",
    "at",
    "acknowledged_at",
)
_UPDATE = select(*(updates.c[name] for name in _UPDATE_COLUMNS)).where(updates.c.scope == bindparam("scope"))
_IS_UNREAD = updates.c.acknowledged_at.is_(None)
_IS_UNCLAIMED = unclaimed(updates.c.claim, sessions.c.updates_claim)
_OF_MONITOR = or_(bindparam("monitor_id").is_(None), updates.c.monitor_id == bindparam("monitor_id"))
UNREAD_UPDATES = sql(
    _UPDATE.where(_IS_UNREAD, _OF_MONITOR).order_by(updates.c.update_seq).limit(bindparam("limit")).offset(ZERO)
)
ALL_UPDATES = sql(_UPDATE.where(_OF_MONITOR).order_by(updates.c.update_seq).limit(bindparam("limit")).offset(ZERO))
UPDATES_OF_TASK = sql(
    select(*(updates.c[name] for name in _UPDATE_COLUMNS))
    .where(updates.c.task_seq == bindparam("task_seq"))
    .order_by(updates.c.update_seq)
)
_INSERT_UPDATE = hot(
    insert(updates)
    .values(
        {
            name: bindparam(name)
            for name in ("scope", "task_seq", "monitor_id", "line", "stream", "text", "is_cut", "bytes", "at")
        }
    )
    .inline()
)
_TAKE_UPDATES = sql(
    _UPDATE.where(_IS_UNREAD, _IS_UNCLAIMED, _OF_MONITOR)
    .order_by(updates.c.update_seq)
    .limit(bindparam("limit"))
    .offset(ZERO)
)
_MARK_TAKEN = sql(update(updates).where(values(updates.c.update_seq, "update_seqs")).values(claim=bindparam("token")))
_ACKNOWLEDGE = sql(
    update(updates)
    .where(values(updates.c.update_seq, "update_seqs"), _IS_UNREAD, updates.c.claim == bindparam("token"))
    .values(acknowledged_at=bindparam("now"))
)
_HAS_UNREAD = sql(
    select(updates.c.update_seq)
    .where(updates.c.task_seq == bindparam("task_seq"), _IS_UNREAD, _IS_UNCLAIMED)
    .limit(ONE)
    .offset(ZERO)
)
_KEPT = select(*(updates.c[name] for name in UpdateRow._fields)).order_by(updates.c.update_seq)
_OLDEST_OF_MONITOR = sql(
    _KEPT.where(updates.c.task_seq.in_(select(monitors.c.task_seq).where(_OF_ID, _HAS_KEPT)))
    .limit(bindparam("limit"))
    .offset(ZERO)
)
_OLDEST_OF_SESSION = sql(_KEPT.where(updates.c.scope == bindparam("scope")).limit(bindparam("limit")).offset(ZERO))
_READ_OF_MONITOR = sql(
    _KEPT.where(
        updates.c.task_seq.in_(select(monitors.c.task_seq).where(_OF_ID, _HAS_KEPT)),
        updates.c.acknowledged_at.is_not(None),
    )
)
_DELETE = sql(updates.delete().where(values(updates.c.update_seq, "update_seqs")))
_MOVE_UPDATES = sql(
    update(updates).where(updates.c.task_seq == bindparam("key_task_seq")).values(scope=bindparam("destination"))
)
_UPDATES_CLAIMS = sql(select(sessions.c.scope, sessions.c.updates_claim).where(sessions.c.updates_claim.is_not(None)))
_CLAIM_UPDATES = sql(
    update(sessions).where(sessions.c.scope == bindparam("key_scope")).values(updates_claim=bindparam("claim"))
)
_RELEASE_CLAIMS = sql(
    update(sessions)
    .where(func.json_extract(sessions.c.updates_claim, word("$.owner_id")) == bindparam("owner_id"))
    .values(updates_claim=null())
)


def insert_line(tx: Transaction, task: Task, monitor_id: str, line: Line, number: int, size: int) -> None:
    """Store a line that a monitor wrote, the *number*-th of its task."""
    tx.bytes += size
    columns = {
        "scope": task.scope,
        "task_seq": task.task_seq,
        "monitor_id": monitor_id,
        "line": number,
        "stream": line.stream,
        "text": line.text,
        "is_cut": int(line.is_cut),
        "bytes": size,
        "at": tx.now,
    }
    tx.insert(_INSERT_UPDATE.sql, _INSERT_UPDATE.arrange(columns))


def has_unread(tx: Transaction, task_seq: int) -> bool:
    """Say whether a monitor wrote something that nobody has read, or reads now."""
    return tx.one(_HAS_UNREAD, {"task_seq": task_seq}) is not None


def oldest_of_monitor(tx: Transaction, scope: str, monitor_id: str, limit: int) -> list[UpdateRow]:
    """Return the oldest lines that are kept of a session's monitors of an id."""
    wanted = {"scope": scope, "monitor_id": monitor_id, "limit": limit}
    return [UpdateRow._make(row) for row in tx.all(_OLDEST_OF_MONITOR, wanted)]


def oldest_of_session(tx: Transaction, scope: str, limit: int) -> list[UpdateRow]:
    """Return the oldest lines that are kept of a session's monitors."""
    return [UpdateRow._make(row) for row in tx.all(_OLDEST_OF_SESSION, {"scope": scope, "limit": limit})]


def read_of_monitor(tx: Transaction, scope: str, monitor_id: str) -> list[UpdateRow]:
    """Return the lines that are kept of a session's monitors of an id and were acknowledged."""
    return [UpdateRow._make(row) for row in tx.all(_READ_OF_MONITOR, {"scope": scope, "monitor_id": monitor_id})]


def delete_updates(tx: Transaction, update_seqs: Iterable[int]) -> None:
    """Keep some lines no longer."""
    tx.one(_DELETE, {"update_seqs": names(update_seqs)})


def take_updates(
    tx: Transaction, scope: str, token: str, limit: int | None, monitor_id: str | None
) -> list[MonitorUpdate]:
    """Mark a session's unread updates as a reader's, but for those another live reader has, and return them."""
    found = {"scope": scope, "monitor_id": monitor_id, "limit": -1 if limit is None else limit}
    rows = tx.all(_TAKE_UPDATES, found)
    tx.one(_MARK_TAKEN, {"update_seqs": names(row[0] for row in rows), "token": token})
    return [update_record(row) for row in rows]


def acknowledge(tx: Transaction, update_seqs: Iterable[int], token: str) -> None:
    """Note that a reader has dealt with updates that are still its own."""
    tx.one(_ACKNOWLEDGE, {"update_seqs": names(update_seqs), "token": token, "now": tx.now})


def updates_claims(tx: Transaction) -> list[tuple[str, str]]:
    """Return every session whose updates somebody reads, with the claim, JSON text."""
    return [(scope, claim) for scope, claim in tx.all(_UPDATES_CLAIMS, {})]


def claim_updates(tx: Transaction, scope: str, claim: str | None) -> None:
    """Note who reads a session's updates; None: nobody does."""
    tx.one(_CLAIM_UPDATES, {"key_scope": scope, "claim": claim})


def release_claims(tx: Transaction, owner_id: int) -> None:
    """Note that an owner reads no session's updates any more."""
    tx.one(_RELEASE_CLAIMS, {"owner_id": owner_id})


def update_record(row: Sequence[Any]) -> MonitorUpdate:
    """Build the public record of an update."""
    columns = dict(zip(_UPDATE_COLUMNS, row, strict=True))
    with readable(f"update {columns['update_seq']}"):
        return MonitorUpdate.model_validate(
            {**columns, "scope": Scope.parse(columns["scope"]), "is_cut": bool(columns["is_cut"])}
        )


# --- the note of a monitor ------------------------------------------------------------------------------------------

_NOTE_TO_ADD_TO = sql(
    select(inbox.c.note_seq, inbox.c.data)
    .where(
        inbox.c.task_seq == bindparam("task_seq"),
        # not by the index of all keys: of those that were read there may be many
        literal_column('+inbox."key"', Text) >= word("monitor:"),
        literal_column('+inbox."key"', Text) < word("monitor;"),
        inbox.c.acknowledged_at.is_(None),
        unclaimed(inbox.c.claim, sessions.c.inbox_claim),
    )
    .order_by(inbox.c.note_seq.desc())
    .limit(ONE)
    .offset(ZERO)
)
_REWRITE_NOTE = sql(
    update(inbox)
    .where(inbox.c.note_seq == bindparam("key_note_seq"))
    .values(text=bindparam("said"), data=bindparam("what"))
)


def note_to_add_to(tx: Transaction, task_seq: int) -> tuple[int, str] | None:
    """Return the number and the data, JSON text, of a monitor's note that nobody has read, or reads now."""
    row = tx.one(_NOTE_TO_ADD_TO, {"task_seq": task_seq})
    return None if row is None else (int(row[0]), str(row[1]))


def rewrite_note(tx: Transaction, note_seq: int, said: str, data: str) -> None:
    """Let a note that nobody has read say something else."""
    tx.one(_REWRITE_NOTE, {"key_note_seq": note_seq, "said": said, "what": data})
