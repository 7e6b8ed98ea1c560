"""Owns the tables, checks, indexes, triggers and views as they are at head: what Alembic compares with, what queries name."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import REAL

from .identity import APPLICATION_ID, HEAD, VERSION_TABLE
from .lifecycle import LIVE_STATES, TERMINAL_EVENTS
from .models import (
    CancelPolicy,
    ClosePolicy,
    EventType,
    HandleRole,
    OwnerEnd,
    Recovery,
    StepState,
    TaskKind,
    TaskMode,
    TaskState,
)
from .monitor_models import Stream, WakePolicy

__all__ = ["APPLICATION_ID", "HEAD", "TRIGGERS", "VERSION_TABLE", "VIEWS", "create_statements", "metadata"]

metadata = MetaData(naming_convention={"ck": "%(table_name)s_%(constraint_name)s"})


def _is_one_of(column: str, values: Iterable[StrEnum]) -> str:
    # not IN (…): in a CHECK, SQLite builds a table of the words for every row, which once cost a fifth of all writing
    return " OR ".join(f"{column} = '{value}'" for value in values)


def _one_of(column: str, values: Iterable[StrEnum]) -> CheckConstraint:
    return CheckConstraint(_is_one_of(column, values), name=column)


def _is_flag(column: str) -> CheckConstraint:
    return CheckConstraint(f"{column} = 0 OR {column} = 1", name=column)


def _json(column: str) -> CheckConstraint:
    return CheckConstraint(f"{column} IS NULL OR json_valid({column})", name=f"{column}_json")


HIDDEN_FAILED = "mode = 'hidden' AND (state = 'failed' OR state = 'abandoned')"
"""What `await_hidden` reports; an index has it, so statements must say it in these words."""

sessions = Table(
    "sessions",
    metadata,
    Column("session_seq", Integer, primary_key=True),
    Column("scope", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("opened_at", Text, nullable=False),
    Column("closed_at", Text),
    Column("parent", Text),
    Column("sync_needed", Integer, _is_flag("sync_needed"), nullable=False, server_default=text("0")),
    Column("inbox_claim", Text, _json("inbox_claim")),
    Column("reopened_after", Integer, nullable=False, server_default=text("0")),
    Column("reopened_amid", Text, _json("reopened_amid")),
    Column("updates_claim", Text, _json("updates_claim")),
    Column("update_bytes", Integer, nullable=False, server_default=text("0")),
    Column("pruned_event", Integer, nullable=False, server_default=text("0")),
    Column("pruned_at", Text),
    UniqueConstraint("scope", name="sessions_scope"),
    CheckConstraint("scope = runtime || ':' || session_id", name="scope_parts"),
    CheckConstraint("instr(runtime, ':') = 0", name="runtime"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)

Index("sessions_inbox_read", sessions.c.scope, sessions.c.inbox_claim, sqlite_where=text("inbox_claim IS NOT NULL"))
Index(
    "sessions_updates_read", sessions.c.scope, sessions.c.updates_claim, sqlite_where=text("updates_claim IS NOT NULL")
)
"""
``inbox_claim`` names the reader of the session's notes, and the lock that says whether it lives, ``updates_claim`` that of its
monitors' updates, of which ``update_bytes`` are kept; ``reopened_after`` is the newest
``task_seq`` when the session was last opened again, and ``reopened_amid`` a JSON array of the sub-agents that worked in it then.
"""

owners = Table(
    "owners",
    metadata,
    Column("owner_id", Integer, primary_key=True),
    Column("token", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_start", Text, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("opened_at", Text, nullable=False),
    Column("ended_at", Text),
    Column("end", Text),
    UniqueConstraint("token", name="owners_token"),
    CheckConstraint(_is_one_of('"end"', OwnerEnd), name="end"),
    CheckConstraint('(ended_at IS NULL) = ("end" IS NULL)', name="ended"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("owners_open", owners.c.runtime, sqlite_where=text("ended_at IS NULL"))

tasks = Table(
    "tasks",
    metadata,
    Column("task_seq", Integer, primary_key=True),
    Column("scope", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("function", Text),
    Column("recovery", Text, nullable=False),
    Column("cancel_policy", Text, nullable=False),
    Column("arguments", Text),
    Column("attempt", Integer, nullable=False),
    Column("attempts_spent", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("owner_id", Integer, ForeignKey("owners.owner_id")),
    Column("progress", Text),
    Column("fraction", REAL),
    Column("result", Text),
    Column("failure", Text),
    Column("evidence", Text),
    Column("cancel_reason", Text),
    Column("cancel_requested_by", Text),
    Column("cancel_requested_at", Text),
    Column("created_at", Text, nullable=False),
    Column("started_at", Text),
    Column("updated_at", Text, nullable=False),
    Column("completed_at", Text),
    Column("parent_seq", Integer),
    Column("child_session_id", Text),
    Column(
        "close_policy",
        Text,
        _one_of("close_policy", ClosePolicy),
        nullable=False,
        server_default=text(f"'{ClosePolicy.KEEP}'"),
    ),
    Column("idempotency_key", Text),
    Column("notify_on_end", Integer, _is_flag("notify_on_end"), nullable=False, server_default=text("0")),
    Column("has_callback", Integer, _is_flag("has_callback"), nullable=False, server_default=text("0")),
    Column("callback_begun_at", Text),
    Column("callback_error", Text, _json("callback_error")),
    Column("version", Text),
    Column("timeout", REAL, CheckConstraint("timeout > 0.0", name="timeout")),
    Column("deadline", Text),
    Column("not_before", Text, CheckConstraint("not_before IS NULL OR state = 'pending'", name="not_before")),
    Column("last_error", Text, _json("last_error")),
    Column("waiting_for", Text, CheckConstraint("waiting_for IS NULL OR state = 'waiting'", name="waiting_for")),
    Column("process", Text, _json("process")),
    _one_of("kind", TaskKind),
    _one_of("mode", TaskMode),
    _one_of("state", TaskState),
    _one_of("recovery", Recovery),
    _one_of("cancel_policy", CancelPolicy),
    _json("arguments"),
    _json("result"),
    _json("failure"),
    _json("evidence"),
    CheckConstraint(f"(completed_at IS NULL) = ({_is_one_of('state', LIVE_STATES)})", name="live"),
    CheckConstraint("(state = 'completed') = (result IS NOT NULL)", name="completed_has_result"),
    CheckConstraint("(state = 'failed') = (failure IS NOT NULL)", name="failed_has_failure"),
    CheckConstraint("(state = 'abandoned') = (evidence IS NOT NULL)", name="abandoned_has_evidence"),
    CheckConstraint("state <> 'cancel_requested' OR cancel_requested_at IS NOT NULL", name="cancel_is_dated"),
    CheckConstraint(
        "mode = 'external' OR (state <> 'running' AND state <> 'waiting') OR (owner_id IS NOT NULL AND attempt > 0)",
        name="running_has_owner",
    ),
    CheckConstraint("(mode = 'external') = (recovery = 'external')", name="external"),
    CheckConstraint("attempt >= 0 AND attempts_spent BETWEEN 0 AND attempt AND max_attempts > 0", name="attempts"),
    CheckConstraint("fraction BETWEEN 0.0 AND 1.0", name="fraction"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("tasks_id", tasks.c.scope, tasks.c.id)
Index("tasks_live", tasks.c.scope, tasks.c.id, unique=True, sqlite_where=text("completed_at IS NULL"))
Index("tasks_owned", tasks.c.owner_id, sqlite_where=text("completed_at IS NULL"))
Index("tasks_children", tasks.c.parent_seq, sqlite_where=text("parent_seq IS NOT NULL"))
Index(
    "tasks_live_children",
    tasks.c.parent_seq,
    sqlite_where=text("completed_at IS NULL AND parent_seq IS NOT NULL"),
)
Index("tasks_agents", tasks.c.scope, tasks.c.child_session_id, sqlite_where=text("child_session_id IS NOT NULL"))
Index("tasks_child_session", tasks.c.child_session_id, sqlite_where=text("child_session_id IS NOT NULL"))
Index(
    "tasks_live_agents",
    tasks.c.child_session_id,
    sqlite_where=text("completed_at IS NULL AND child_session_id IS NOT NULL"),
)
Index(
    "tasks_idempotency",
    tasks.c.scope,
    tasks.c.idempotency_key,
    sqlite_where=text("idempotency_key IS NOT NULL"),
)
Index("tasks_hidden_failed", tasks.c.scope, sqlite_where=text(HIDDEN_FAILED))
Index("tasks_process", tasks.c.owner_id, sqlite_where=text("process IS NOT NULL"))

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("task_seq", Integer, ForeignKey("tasks.task_seq")),
    Column("scope", Text, nullable=False),
    Column("from_scope", Text),
    Column("task_id", Text),
    Column("attempt", Integer),
    Column("type", Text, nullable=False),
    Column("at", Text, nullable=False),
    Column("data", Text, nullable=False),
    _one_of("type", EventType),
    CheckConstraint("json_valid(data)", name="data_json"),
    CheckConstraint("(task_seq IS NULL) = (task_id IS NULL)", name="task"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("events_task", events.c.task_seq)
Index(
    "events_one_end",
    events.c.task_seq,
    unique=True,
    sqlite_where=text(_is_one_of("type", TERMINAL_EVENTS)),
)

handles = Table(
    "handles",
    metadata,
    Column("handle_seq", Integer, primary_key=True),
    Column("handle_id", Text, nullable=False),
    Column("scope", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("task_seq", Integer, ForeignKey("tasks.task_seq"), nullable=False),
    Column("role", Text, nullable=False),
    Column("name", Text),
    Column("namespace", Text),
    Column("created_at", Text, nullable=False),
    Column("read_at", Text),
    UniqueConstraint("handle_id", name="handles_id"),
    _one_of("role", HandleRole),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("handles_owner", handles.c.task_seq, unique=True, sqlite_where=text("role = 'owner'"))
Index("handles_task", handles.c.task_seq)
Index(
    "handles_observers",
    handles.c.scope,
    handles.c.task_seq,
    unique=True,
    sqlite_where=text("role = 'observer'"),
)

steps = Table(
    "steps",
    metadata,
    Column("task_seq", Integer, ForeignKey("tasks.task_seq"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("value", Text, nullable=False),
    Column("saved_at", Text, nullable=False),
    Column(
        "state",
        Text,
        _one_of("state", StepState),
        nullable=False,
        server_default=text(f"'{StepState.DONE}'"),
    ),
    Column("tries", Integer, CheckConstraint("tries >= 0", name="tries"), nullable=False, server_default=text("1")),
    Column("failure", Text, _json("failure")),
    Column("begun_at", Text),
    Column("wake_at", Text),
    PrimaryKeyConstraint("task_seq", "kind", "name", name="steps_key"),
    CheckConstraint("json_valid(value)", name="value_json"),
    sqlite_strict=True,
)
Index("steps_begun", steps.c.task_seq, sqlite_where=text(f"state = '{StepState.BEGUN}'"))
"""
What a body remembers. Its checkpoint is the row of kind ``checkpoint``, whose *tries* counts how often one was saved; a sleep's
*value* is its seconds. *saved_at* is when the row was last written.
"""

signals = Table(
    "signals",
    metadata,
    Column("signal_seq", Integer, primary_key=True),
    Column("task_seq", Integer, ForeignKey("tasks.task_seq"), nullable=False),
    Column("name", Text, nullable=False),
    Column("key", Text),
    Column("payload", Text, nullable=False),
    Column("sent_at", Text, nullable=False),
    Column("sent_by", Text, nullable=False),
    Column("taken_at", Text),
    Column("taken_attempt", Integer),
    UniqueConstraint("task_seq", "key", name="signals_key"),
    CheckConstraint("json_valid(payload)", name="payload_json"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("signals_untaken", signals.c.task_seq, signals.c.name, sqlite_where=text("taken_at IS NULL"))
"""What was sent to a body. It is *taken* once what came of it is remembered; until then a later attempt is handed it again."""

inbox = Table(
    "inbox",
    metadata,
    Column("note_seq", Integer, primary_key=True),
    Column("scope", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("key", Text, nullable=False),
    Column("task_seq", Integer),
    Column("task_id", Text),
    Column("text", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("posted_at", Text, nullable=False),
    Column("claim", Text),
    Column("acknowledged_at", Text),
    UniqueConstraint("task_seq", "key", name="inbox_key"),
    CheckConstraint("json_valid(data)", name="data_json"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("inbox_scope", inbox.c.scope)
Index("inbox_unread", inbox.c.scope, sqlite_where=text("acknowledged_at IS NULL"))
Index("inbox_unread_of_task", inbox.c.task_seq, sqlite_where=text("acknowledged_at IS NULL"))

handoffs = Table(
    "handoffs",
    metadata,
    Column("handoff_seq", Integer, primary_key=True),
    Column("handoff_id", Text, nullable=False),
    Column("is_named", Integer, nullable=False),
    Column("source", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("destination", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("kept", Text, nullable=False),
    Column("moved", Text, nullable=False),
    Column("cancelled", Text, nullable=False),
    Column("at", Text, nullable=False),
    UniqueConstraint("source", "handoff_id", name="handoffs_id"),
    _is_flag("is_named"),
    CheckConstraint("json_valid(kept)", name="kept_json"),
    CheckConstraint("json_valid(moved)", name="moved_json"),
    CheckConstraint("json_valid(cancelled)", name="cancelled_json"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index(
    "handoffs_unnamed",
    handoffs.c.source,
    handoffs.c.destination,
    unique=True,
    sqlite_where=text("is_named = 0"),
)
"""One row a handoff: what was to be kept (handles and task ids), and the records as they stood after it."""

monitors = Table(
    "monitors",
    metadata,
    Column("task_seq", Integer, ForeignKey("tasks.task_seq"), primary_key=True),
    Column("scope", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("monitor_id", Text, nullable=False),
    Column("wake_policy", Text, nullable=False),
    Column("armed", Integer, nullable=False),
    Column("lines", Integer, nullable=False, server_default=text("0")),
    Column("bytes", Integer, nullable=False, server_default=text("0")),
    Column("dropped", Integer, nullable=False, server_default=text("0")),
    Column("kept_lines", Integer, nullable=False, server_default=text("0")),
    Column("kept_bytes", Integer, nullable=False, server_default=text("0")),
    Column("throttled_at", Text),
    Column("exit_status", Integer),
    _one_of("wake_policy", WakePolicy),
    _is_flag("armed"),
    CheckConstraint("lines >= 0 AND dropped BETWEEN 0 AND lines AND kept_lines BETWEEN 0 AND lines", name="counts"),
    CheckConstraint("bytes >= 0 AND kept_bytes >= 0", name="sizes"),
    sqlite_strict=True,
)
Index("monitors_id", monitors.c.scope, monitors.c.monitor_id)
Index("monitors_kept", monitors.c.scope, monitors.c.monitor_id, sqlite_where=text("kept_lines > 0"))
Index("monitors_armed", monitors.c.scope, sqlite_where=text("armed = 1"))
"""
One row a monitor's task. *lines* and *bytes* are what it has written, *kept_lines* and *kept_bytes* what of that is in `updates`,
*dropped* the lines that are not and that nobody was handed. An *armed* one is started again when its session starts.
"""

updates = Table(
    "updates",
    metadata,
    Column("update_seq", Integer, primary_key=True),
    Column("scope", Text, ForeignKey("sessions.scope"), nullable=False),
    Column("task_seq", Integer, ForeignKey("tasks.task_seq"), nullable=False),
    Column("monitor_id", Text, nullable=False),
    Column("line", Integer, nullable=False),
    Column("stream", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("is_cut", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("at", Text, nullable=False),
    Column("claim", Text),
    Column("acknowledged_at", Text),
    _one_of("stream", Stream),
    _is_flag("is_cut"),
    sqlite_autoincrement=True,
    sqlite_strict=True,
)
Index("updates_task", updates.c.task_seq)
Index("updates_scope", updates.c.scope)
Index("updates_unread", updates.c.scope, sqlite_where=text("acknowledged_at IS NULL"))
Index("updates_unread_of_task", updates.c.task_seq, sqlite_where=text("acknowledged_at IS NULL"))
"""One row a line that a monitor wrote; *line* counts what its task wrote, so a hole in it tells of lines that were dropped."""

tombstones = Table(
    "tombstones",
    metadata,
    Column("task_seq", Integer, primary_key=True, autoincrement=False),
    Column("scope", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("handle_id", Text),
    Column("parent_seq", Integer),
    Column("idempotency_key", Text),
    Column("completed_at", Text, nullable=False),
    Column("pruned_at", Text, nullable=False),
    Column("first_event", Integer, nullable=False),
    Column("last_event", Integer, nullable=False),
    _one_of("kind", TaskKind),
    _one_of("state", [state for state in TaskState if state.is_terminal]),
    CheckConstraint("first_event <= last_event", name="events"),
    sqlite_strict=True,
)
Index("tombstones_id", tombstones.c.scope, tombstones.c.id)
Index("tombstones_events", tombstones.c.last_event)
Index(
    "tombstones_key",
    tombstones.c.scope,
    tombstones.c.idempotency_key,
    sqlite_where=text("idempotency_key IS NOT NULL"),
)
Index("tombstones_handle", tombstones.c.handle_id, sqlite_where=text("handle_id IS NOT NULL"))
"""
What is left of a task that was pruned, in the session it was in: enough to say so. *handle_id* was its owner's;
*first_event* and *last_event* are the range in which its events are missing now.
"""

# every column but the one that a transfer changes
_FINAL = "\n  OR ".join(f"NEW.{column.name} IS NOT OLD.{column.name}" for column in tasks.c if column.name != "scope")

TRIGGERS = {
    "tasks_terminal_is_final": f"""
CREATE TRIGGER tasks_terminal_is_final
BEFORE UPDATE ON tasks
WHEN OLD.completed_at IS NOT NULL AND (
  {_FINAL}
)
BEGIN
  SELECT RAISE(ABORT, 'a finished task keeps its outcome');
END
""",
    "tasks_live_is_kept": """
CREATE TRIGGER tasks_live_is_kept
BEFORE DELETE ON tasks
WHEN OLD.completed_at IS NULL
BEGIN
  SELECT RAISE(ABORT, 'a live task is not deleted: cancel or abandon it first');
END
""",
    "events_are_history": """
CREATE TRIGGER events_are_history
BEFORE UPDATE ON events
BEGIN
  SELECT RAISE(ABORT, 'events are never changed');
END
""",
}

_AGE = "CAST((julianday('now') - julianday({since})) * 86400 AS INTEGER)"

VIEWS = {
    "live_tasks": f"""
CREATE VIEW live_tasks AS
SELECT t.scope, t.id, t.kind, t.state, t.attempt,
  CASE WHEN t.fraction IS NULL THEN NULL ELSE printf('%.0f%%', t.fraction * 100) END AS done,
  t.progress, t.waiting_for, t.not_before, t.deadline,
  {_AGE.format(since="t.created_at")} AS age_seconds,
  o.pid, json_extract(t.process, '$.pid') AS process,
  t.owner_id, t.label, t.mode, t.recovery, t.task_seq, t.parent_seq, t.child_session_id
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL
ORDER BY +t.task_seq
""",
    "task_history": """
CREATE VIEW task_history AS
SELECT e.seq, e.at, e.scope, e.task_id AS id, e.attempt, e.type, e.data, e.task_seq
FROM events AS e
WHERE e.task_seq IS NOT NULL
ORDER BY e.seq
""",
    "recent_failures": """
CREATE VIEW recent_failures AS
SELECT t.completed_at, t.scope, t.id, t.state, t.attempt,
  COALESCE(json_extract(t.failure, '$.type'), 'owner ' || json_extract(t.evidence, '$.end')) AS error,
  json_extract(t.failure, '$.message') AS message,
  t.label, t.task_seq
FROM tasks AS t
WHERE t.completed_at IS NOT NULL AND t.state IN ('failed', 'abandoned')
ORDER BY t.completed_at DESC, t.task_seq DESC
LIMIT 100
""",
    "session_summary": """
CREATE VIEW session_summary AS
SELECT s.scope, s.parent, s.opened_at, s.closed_at,
  COUNT(t.task_seq) FILTER (WHERE t.completed_at IS NULL) AS live,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'completed') AS completed,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'failed') AS failed,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'cancelled') AS cancelled,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'abandoned') AS abandoned,
  (SELECT COUNT(*) FROM inbox AS n WHERE n.scope = s.scope AND n.acknowledged_at IS NULL) AS unread_notes,
  MAX(t.updated_at) AS last_change
FROM sessions AS s LEFT JOIN tasks AS t ON t.scope = s.scope
GROUP BY s.session_seq
ORDER BY s.session_seq
""",
    "live_monitors": f"""
CREATE VIEW live_monitors AS
SELECT t.scope, m.monitor_id, t.state, json_extract(t.process, '$.pid') AS process,
  json_extract(t.arguments, '$.spec.command') AS command,
  {_AGE.format(since="t.created_at")} AS age_seconds,
  m.lines, m.dropped, m.kept_lines,
  (SELECT COUNT(*) FROM updates AS u WHERE u.task_seq = t.task_seq AND u.acknowledged_at IS NULL) AS unread_lines,
  m.armed, m.wake_policy, m.throttled_at, o.pid AS owner_pid, t.id, t.task_seq
FROM monitors AS m JOIN tasks AS t ON t.task_seq = m.task_seq LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL
ORDER BY +t.task_seq
""",
}


def create_statements() -> list[str]:
    """Return the statements that make the whole schema, in an order that works."""
    from sqlalchemy.dialects.sqlite import dialect
    from sqlalchemy.schema import CreateIndex, CreateTable

    statements: list[str] = []
    for table in metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=dialect())).strip())
        ordered = sorted(table.indexes, key=lambda index: str(index.name))
        statements += [str(CreateIndex(index).compile(dialect=dialect())) for index in ordered]
    return statements + [sql.strip() for sql in (*TRIGGERS.values(), *VIEWS.values())]
